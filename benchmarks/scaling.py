"""How a training step scales: time and memory by width, depth, batch size and tokens, bytes and flops by ranks.

    python benchmarks/scaling.py                # what is missing in results/scaling.json; then the table and the plot
    python benchmarks/scaling.py --quick        # small networks, few rounds, nothing written

One thing is varied at a time, around a common point. Times are those of ``benchmarks/step.py``: whole steps, sampling
included, of contenders that take turns, each point in a process of its own with an allocator that keeps its memory;
medians over rounds, and of the ratio to the faster way of running plain SGD in the same round: as it is, or with
convolutions channels last. (Compiled SGD is left out, as compiling each point takes longer than measuring it;
``step.py`` has it.) On a CPU and one thread it is the process's processor time, which others on the machine change
little; with ``--clock wall``, more threads or on a GPU it is elapsed time.

Ranks are gloo processes on this machine, of which time would say nothing about a cluster: flops, bytes that
collectives carry and sockets send, and normal numbers are counted, by ``benchmarks/cost.py``, from whose results the
table takes them.

Every point is written once it is measured, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cost import ENTRY, Stack
from step import ALLOCATORS, CLOCKS, PLAIN, RESULTS

OURS = ["gated", "gradient gates", "spectral"]
CHOSEN = [*OURS, "Opacus, ghost"]
CENTRE = {
    "mlp": {"width": 512, "depth": 2, "batch": 1024},
    "cnn": {"width": 16, "depth": 2, "batch": 256},
    "tokens": {"width": 256, "depth": 2, "tokens": 16, "batch": 64},
}
SWEEPS: dict[str, dict[str, list[int]]] = {
    "mlp": {"width": [64, 256, 512, 1024], "depth": [1, 2, 4, 8], "batch": [64, 256, 1024, 4096]},
    "cnn": {"width": [4, 16, 64], "depth": [1, 2, 4, 8], "batch": [64, 256, 1024, 4096]},
    "tokens": {"width": [64, 256], "tokens": [4, 16, 49, 196], "batch": [16, 64, 256]},
}
QUICK: dict[str, dict[str, list[int]]] = {
    "mlp": {"width": [64, 512], "batch": [64]},
    "cnn": {"width": [4, 16], "batch": [64]},
    "tokens": {"tokens": [4]},
}
EXAMPLES = {"mlp": 1024, "cnn": 512, "tokens": 128}
"""Each contender's steps in one round hold so many: a round should outlast what else the machine does at a moment."""
COUNTED = Stack(width=256, depth=4, rows=32)
"""Of what ``cost.py`` counts, the stack whose ranks are in the table."""

Point = dict[str, Any]


def kind(family: str, size: dict[str, int]) -> str:
    """The name that ``step.py`` knows a network by."""
    return f"{family}-" + "x".join(str(value) for axis, value in size.items() if axis != "batch")


def points(sweeps: dict[str, dict[str, list[int]]]) -> Iterator[Point]:
    """What is to be measured, each once."""
    seen = []
    for family, swept in sweeps.items():
        for axis, values in swept.items():
            for value in values:
                size = {**CENTRE[family], axis: value}
                point = {"family": family, "size": size}
                if point not in seen:
                    seen.append(point)
                    yield point


def times(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """What ``benchmarks/step.py`` measures of one network and batch size."""
    batch = point["size"]["batch"]
    name = kind(point["family"], point["size"])
    plain = [name for name in PLAIN if name == "SGD" or (name == "SGD, channels last" and point["family"] == "cnn")]
    command = [sys.executable, str(Path(__file__).with_name("step.py")), "--child", name, str(batch)]
    command += ["--threads", str(options.threads), "--rounds", str(options.rounds), "--clock", options.clock]
    command += ["--repeats", str(max(1, EXAMPLES[point["family"]] // batch)), "--device", options.device]
    command += ["--contenders", *plain, *CHOSEN]
    measured = json.loads(_answer(command))
    return {"best": measured["best"], "rows": measured["rows"], "skipped": measured["skipped"]}


def _answer(command: list[str]) -> str:
    environment = {**os.environ, **ALLOCATORS["keeps memory"]}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return answer.stdout.splitlines()[-1]


def _order(point: Point) -> list[Any]:
    return [list(CENTRE).index(point["family"]), *point["size"].values()]


def markdown(report: dict[str, Any]) -> str:
    timed = sorted(report["points"], key=_order)
    rows = {id(point): {row["contender"]: row for row in point["rows"]} for point in timed}
    lines = [
        "# How a step scales",
        "",
        f"{report['machine']}, {report['threads']} thread(s), torch {report['torch']}, {report['clock']} time, medians "
        f"over {report['rounds']} interleaved rounds. {report['condition']} Regenerate by `python "
        "benchmarks/scaling.py`. Plot: `scaling.png`. Networks: `mlp-WxD` has D hidden layers of W, `cnn-WxD` D "
        "convolutions of W channels, images are 28×28; `tokens-WxDxT` has D layers of W on each of T tokens, of "
        "784/T pixels. Times include sampling. Ratios are to the faster plain SGD in the same round (of `cnn`, as it "
        "is or channels last, which the column names), and tell more than times do where a machine is shared.",
        "",
        _extremes(timed, rows),
        "",
        "| network | batch | plain SGD: µs per example | " + " | ".join(f"{name}: ratio" for name in CHOSEN) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(CHOSEN),
    ]
    for point in timed:
        own, batch = rows[id(point)], point["size"]["batch"]
        base = f"{1e3 * own[point['best']]['milliseconds'] / batch:.1f}"
        base += ", channels last" if point["best"] != "SGD" else ""
        shown = [
            f"{own[name]['ratio']:.2f}" if name in own else f"not run ({point['skipped'][name]})" for name in CHOSEN
        ]
        lines.append(f"| {kind(point['family'], point['size'])} | {batch} | {base} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "The most bytes that tensors hold during a step, weights, gradients and batch included, the data set not: of "
        "plain SGD, and as a ratio to it.",
        "",
        "| network | batch | plain SGD: MB | " + " | ".join(CHOSEN) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(CHOSEN),
    ]
    for point in timed:
        own, batch = rows[id(point)], point["size"]["batch"]
        shown = [f"{own[name]['peak_ratio']:.2f}" if name in own else "–" for name in CHOSEN]
        base = f"{own[point['best']]['peak_bytes'] / 1e6:.1f}"
        lines.append(f"| {kind(point['family'], point['size'])} | {batch} | {base} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *_of_ranks()]) + "\n"


def _extremes(timed: list[Point], rows: dict[int, dict[str, Any]]) -> str:
    parts = []
    for name in CHOSEN:
        found = sorted(
            (rows[id(point)][name]["ratio"], f"{kind(point['family'], point['size'])} at {point['size']['batch']}")
            for point in timed
            if name in rows[id(point)]
        )
        if found:
            (low, where), (high, other) = found[0], found[-1]
            parts.append(f"{name} {low:.2f} ({where}) to {high:.2f} ({other})")
    return "Least and largest ratio: " + "; ".join(parts) + "."


def _of_ranks() -> list[str]:
    file = RESULTS / "cost.json"
    if not file.exists():
        return ["Ranks: run `python benchmarks/cost.py` first."]
    fields = COUNTED._asdict()
    rows = [row for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if fields.items() <= row.items()]
    lines = [
        f"Ranks: gloo processes on one machine, each with {COUNTED.rows} rows and {COUNTED.depth} layers of "
        f"{COUNTED.width}×{COUNTED.width} ({ENTRY * COUNTED.parameters / 1e3:.0f} kB of weights); `sharded`: "
        "`fully_shard` of each layer. Counted in one step (`python benchmarks/cost.py`), of the rank that has most: "
        "flops of products and factorisations; bytes that collectives carry (a tensor's size for each reduction or "
        "broadcast of it, the whole one's for what is gathered or scattered); bytes that its sockets send by gloo's "
        "algorithms; normal numbers drawn. Plain: `DistributedDataParallel`, or `fully_shard`, and SGD. [What a step "
        "costs on N machines](../../docs/cost.md) has the formulas. No time: two cores say nothing of a cluster.",
        "",
        "| layout | route | ranks | Mflop | carried, kB | sent, kB | normal numbers |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: row["layout"]):
        most = {name: max(count[name] for count in row["counts"]) for name in ("flops", "sent", "drawn")}
        carried = max(sum(count["carried"].values()) for count in row["counts"])
        lines.append(
            f"| {row['layout']} | {row['route']} | {row['ranks']} | {most['flops'] / 1e6:.1f} | {carried / 1e3:.1f} "
            f"| {most['sent'] / 1e3:.1f} | {most['drawn']} |"
        )
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """The ratio to plain SGD against width, depth, tokens and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, grid = pyplot.subplots(len(SWEEPS), 3, figsize=(12, 10), layout="constrained")
    for panels, (family, swept) in zip(grid, SWEEPS.items(), strict=True):
        for panel, axis in zip(panels, swept, strict=True):
            curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CHOSEN}
            for point in report["points"]:
                if point["family"] != family:
                    continue
                if all(point["size"][other] == value for other, value in CENTRE[family].items() if other != axis):
                    for row in point["rows"]:
                        if row["contender"] in curves:
                            curves[row["contender"]].append((point["size"][axis], row["ratio"]))
            for contender, curve in curves.items():
                if curve:
                    panel.plot(*zip(*sorted(curve), strict=True), marker="o", markersize=4, label=contender)
            panel.axhline(1.0, color="black", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_xticks(swept[axis], [str(tick) for tick in swept[axis]])
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter(ticker.ScalarFormatter())
            panel.set_xlabel(axis)
            panel.set_ylabel("ratio to plain SGD")
            shown = [f"{other} {value}" for other, value in CENTRE[family].items() if other != axis]
            panel.set_title(f"{family}, {', '.join(shown)}", fontsize=10)
            panel.grid(alpha=0.3, which="both")
    next(panel for panel in grid.flat if panel.lines).legend()
    figure.suptitle(f"One training step, sampling included ({report['machine']}, {report['threads']} thread)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--clock", choices=list(CLOCKS), help="processor time on a CPU, else wall")
    parser.add_argument("--condition", default="", help="a sentence on what else the machine did, for the table's head")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="without suffix")
    parser.add_argument("--quick", action="store_true", help="small networks, few rounds, nothing written")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.clock is None:
        options.clock = "processor" if device.type == "cpu" and options.threads == 1 else "wall"
    if options.quick:
        options.rounds = 5
    report: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU" if device.type == "cpu" else torch.cuda.get_device_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "clock": options.clock,
        "condition": options.condition,
        "points": [],
    }
    file = options.out.with_suffix(".json")
    if file.exists() and not options.quick:
        known = json.loads(file.read_text())
        differing = [name for name, value in report.items() if name != "points" and known.get(name) != value]
        if differing:
            raise SystemExit(f"{file} was measured with another {', '.join(differing)}: choose another --out")
        report["points"] = known["points"]
    for point in points(QUICK if options.quick else SWEEPS):
        if any(point.items() <= known.items() for known in report["points"]):
            continue
        report["points"].append({**point, **times(point, options)})
        print(f"{json.dumps(point)}: done", file=sys.stderr)
        if not options.quick:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".json.partial")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(file)
    text = markdown(report)
    print(text)
    if not options.quick:
        options.out.with_suffix(".md").write_text(text)
        plot(report, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
