"""How a training step scales: time per example and the largest batch that fits, by width, depth and batch size.

    python benchmarks/scaling.py                # what is missing in results/scaling.json; then the table and the plot
    python benchmarks/scaling.py --quick        # small networks, few rounds, nothing written

One thing is varied at a time, around a common point. Times are those of ``benchmarks/step.py``: whole steps, sampling
included, of contenders that take turns, each point in a process of its own with an allocator that keeps its memory;
medians over rounds, and of the ratio to plain SGD in the same round. The largest batch is the largest expected batch
whose step holds no more bytes in tensors than the limit (weights, gradients and batch included, the data set not), to
within a sixteenth. Two processes of one thread each, which gloo joins, take turns with one process of one thread and
one of two threads, at the same global batch.

Every point is written once it is measured, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import ALLOCATORS, BASELINE, CONTENDERS, RESULTS, SAMPLES, peak_bytes

from clipless_dp.precision import full_precision
from clipless_dp.training.memory import rows_within

CHOSEN = [BASELINE, "gated", "spectral", "Opacus, ghost"]
CENTRE = {"mlp": (512, 2, 1024), "cnn": (16, 2, 256)}
SWEEPS: dict[str, dict[str, list[int]]] = {
    "mlp": {"width": [64, 256, 512, 1024], "depth": [1, 2, 4, 8], "batch": [64, 256, 1024, 4096]},
    "cnn": {"width": [4, 16, 64], "depth": [1, 2, 4, 8], "batch": [64, 256, 1024, 4096]},
}
QUICK: dict[str, dict[str, list[int]]] = {
    "mlp": {"width": [64, 512], "batch": [64]},
    "cnn": {"width": [4, 16], "batch": [64]},
}
PROCESSES = {"one process, one thread": (1, 1), "one process, two threads": (1, 2), "two processes": (2, 1)}
EXAMPLES = 2048
"""Each contender's steps in one round hold so many: a round should outlast what else the machine does at a moment."""
LIMIT = 64 * 2**20
LARGEST = 8192

Point = dict[str, Any]


def points(sweeps: dict[str, dict[str, list[int]]]) -> Iterator[Point]:
    """What is to be measured, each once."""
    seen = []
    for family, swept in sweeps.items():
        for axis, values in swept.items():
            for value in values:
                width, depth, batch = CENTRE[family]
                size = {"width": width, "depth": depth, "batch": batch, axis: value}
                kind = f"{family}-{size['width']}x{size['depth']}"
                for point in (
                    {"what": "time", "kind": kind, "batch": size["batch"]},
                    {"what": "largest", "kind": kind},
                    {"what": "processes", "kind": kind, "batch": size["batch"]},
                ):
                    if point["what"] == "processes" and (width, depth) != (size["width"], size["depth"]):
                        continue
                    if point not in seen:
                        seen.append(point)
                        yield point


def data_set(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.rand(SAMPLES, 1, 28, 28, device=device), torch.randint(10, (SAMPLES,), device=device)


def repeats(batch: int) -> int:
    return max(1, EXAMPLES // batch)


def times(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """What ``benchmarks/step.py`` measures of one network and batch size."""
    command = [sys.executable, str(Path(__file__).with_name("step.py")), "--child", point["kind"], str(point["batch"])]
    command += [
        "--threads",
        str(options.threads),
        "--rounds",
        str(options.rounds),
        "--repeats",
        str(repeats(point["batch"])),
    ]
    command += ["--device", options.device, "--contenders", *CHOSEN]
    measured = json.loads(_answer(command))
    return {"rows": measured["rows"], "skipped": measured["skipped"]}


def largest(point: Point, device: torch.device) -> dict[str, Any]:
    """The largest expected batch of each contender within the limit; 0 where none is."""
    data = data_set(device)
    found = {}
    for name in CHOSEN:

        def peak(batch: int, name: str = name) -> float:
            return peak_bytes(lambda: CONTENDERS[name](point["kind"], data, batch), device)

        found[name] = rows_within(LIMIT, peak, LARGEST)
    return {"largest": found}


class Group:
    """Processes that step together when they are told to."""

    def __init__(self, ranks: int, threads: int, point: Point, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(Path(folder) / f"store-{ranks}-{threads}")
        self.ends = []
        self.processes = []
        for rank in range(ranks):
            end, other = context.Pipe()
            process = context.Process(target=_rank, args=(rank, ranks, threads, point, store, other), daemon=True)
            process.start()
            other.close()
            self.ends.append(end)
            self.processes.append(process)
        self.steps(1)

    def steps(self, count: int) -> float:
        """Seconds until the last rank has taken so many steps."""
        start = time.perf_counter()
        for end in self.ends:
            end.send(count)
        for end in self.ends:
            end.recv()
        return time.perf_counter() - start

    def stop(self) -> None:
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.join()


def _rank(rank: int, ranks: int, threads: int, point: Point, store: str, end: Connection) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    with full_precision():
        step: Callable[[], None] = CONTENDERS["gated"](point["kind"], data_set(torch.device("cpu")), point["batch"])
        while True:
            try:
                count = end.recv()
            except EOFError:
                return
            for _ in range(count):
                step()
            end.send(None)


def processes(point: Point, rounds: int) -> dict[str, Any]:
    """Time of a gated step, sampling and sums over ranks included, relative to one process of one thread."""
    steps = repeats(point["batch"])
    with tempfile.TemporaryDirectory() as folder:
        groups = {name: Group(*sizes, point, folder) for name, sizes in PROCESSES.items()}
        taken: dict[str, list[float]] = {name: [] for name in groups}
        for _ in range(rounds):
            for name, group in groups.items():
                taken[name].append(group.steps(steps) / steps)
        for group in groups.values():
            group.stop()
    alone = taken[next(iter(PROCESSES))]
    return {
        "processes": {
            name: {
                "milliseconds": 1e3 * statistics.median(own),
                "ratio": statistics.median(mine / base for mine, base in zip(own, alone, strict=True)),
            }
            for name, own in taken.items()
        }
    }


def _answer(command: list[str]) -> str:
    environment = {**os.environ, **ALLOCATORS["keeps memory"]}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return answer.stdout.splitlines()[-1]


def markdown(report: dict[str, Any]) -> str:
    rows = sorted(report["points"], key=lambda point: [*_size(point["kind"]), point.get("batch", 0)])
    lines = [
        "# How a step scales",
        "",
        f"{report['machine']}, {report['threads']} thread(s), torch {report['torch']}, medians over {report['rounds']} "
        f"interleaved rounds of {report['examples']} examples or a step. Regenerate by `python benchmarks/scaling.py`. "
        "Plot: `scaling.png`. Networks: `mlp-WxD` has D hidden layers of W, `cnn-WxD` D convolutions of W channels; "
        "images are 28×28. Times include sampling; ratios are to plain SGD in the same round, "
        "and tell more than times do where a machine is shared.",
        "",
        "| network | batch | " + " | ".join(f"{name}: µs per example, ratio" for name in CHOSEN) + " |",
        "| --- | ---: |" + " ---: |" * len(CHOSEN),
    ]
    for point in rows:
        if point["what"] == "time":
            own = {row["contender"]: row for row in point["rows"]}
            shown = [
                f"{1e3 * own[name]['milliseconds'] / point['batch']:.1f}, {own[name]['ratio']:.2f}"
                if name in own
                else f"not run ({point['skipped'][name]})"
                for name in CHOSEN
            ]
            lines.append(f"| {point['kind']} | {point['batch']} | " + " | ".join(shown) + " |")
    lines += [
        "",
        f"Largest expected batch whose step holds at most {report['limit'] / 2**20:.0f} MiB in tensors (0: none; at "
        f"most {LARGEST} were tried). With `memory_budget`, or `micro_batch_size`, larger ones are passed in pieces.",
        "",
        "| network | " + " | ".join(CHOSEN) + " |",
        "| --- |" + " ---: |" * len(CHOSEN),
    ]
    for point in rows:
        if point["what"] == "largest":
            lines.append(f"| {point['kind']} | " + " | ".join(str(point["largest"][name]) for name in CHOSEN) + " |")
    lines += [
        "",
        "A gated step at the same global batch: milliseconds, and ratio to one process of one thread.",
        "",
        "| network | batch | " + " | ".join(PROCESSES) + " |",
        "| --- | ---: |" + " ---: |" * len(PROCESSES),
    ]
    for point in rows:
        if point["what"] == "processes":
            shown = [f"{one['milliseconds']:.1f}, {one['ratio']:.2f}" for one in point["processes"].values()]
            lines.append(f"| {point['kind']} | {point['batch']} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _size(kind: str) -> tuple[str, int, int]:
    family, size = kind.split("-")
    width, depth = map(int, size.split("x"))
    return family, width, depth


def plot(report: dict[str, Any], path: Path) -> None:
    """Time per example against width, depth and batch size, and the largest batch against width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, grid = pyplot.subplots(len(CENTRE), 4, figsize=(15, 7), layout="constrained")
    for panels, (family, centre) in zip(grid, CENTRE.items(), strict=True):
        for panel, axis in zip(panels, ("width", "depth", "batch", "largest"), strict=True):
            curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CHOSEN}
            for point in report["points"]:
                name, width, depth = _size(point["kind"])
                size = {"width": width, "depth": depth, "batch": point.get("batch", centre[2])}
                swept = "width" if axis == "largest" else axis
                fixed = [size[other] == value for other, value in zip(size, centre, strict=True) if other != swept]
                if name != family or not all(fixed):
                    continue
                if axis == "largest" and point["what"] == "largest":
                    for contender, batch in point["largest"].items():
                        curves[contender].append((width, batch))
                if axis != "largest" and point["what"] == "time":
                    for row in point["rows"]:
                        each = 1e3 * row["milliseconds"] / point["batch"]
                        curves[row["contender"]].append((size[swept], each))
            for contender, curve in curves.items():
                if curve:
                    panel.plot(*zip(*sorted(curve), strict=True), marker="o", markersize=4, label=contender)
            ticks = sorted({x for curve in curves.values() for x, _ in curve})
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            if axis == "largest":
                panel.set_ylim(bottom=0)
            else:
                panel.set_yscale("log")
                for labels in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                    labels(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
            panel.set_xlabel("width" if axis == "largest" else axis)
            limit = f"largest batch within {report['limit'] / 2**20:.0f} MiB"
            panel.set_ylabel(limit if axis == "largest" else "µs per example")
            others = zip(("width", "depth", "batch"), centre, strict=True)
            shown = [f"{other} {value}" for other, value in others if other != axis and axis != "largest"]
            panel.set_title(f"{family}, {', '.join(shown) or f'depth {centre[1]}'}", fontsize=10)
            panel.grid(alpha=0.3, which="both")
    next(panel for panel in grid.flat if panel.lines).legend()
    figure.suptitle(f"One training step, sampling included ({report['machine']}, {report['threads']} thread)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="at least 5")
    parser.add_argument("--what", nargs="+", choices=["time", "largest", "processes"], help="only these figures")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling", help="without suffix")
    parser.add_argument("--quick", action="store_true", help="small networks, few rounds, nothing written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.child is not None:
        torch.set_num_threads(options.threads)
        warnings.simplefilter("ignore")
        with full_precision():
            print(json.dumps(largest(json.loads(options.child), device)))
        return
    if options.quick:
        options.rounds = 5
    report: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU" if device.type == "cpu" else torch.cuda.get_device_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "examples": EXAMPLES,
        "limit": LIMIT,
        "points": [],
    }
    file = options.out.with_suffix(".json")
    if file.exists() and not options.quick:
        known = json.loads(file.read_text())
        differing = [name for name, value in report.items() if name != "points" and known[name] != value]
        if differing:
            raise SystemExit(f"{file} was measured with another {', '.join(differing)}: choose another --out")
        report["points"] = known["points"]
    for point in points(QUICK if options.quick else SWEEPS):
        if any(point.items() <= known.items() for known in report["points"]):
            continue
        if point["what"] == "processes" and device.type != "cpu":
            continue
        if options.what is not None and point["what"] not in options.what:
            continue
        if point["what"] == "time":
            found = times(point, options)
        elif point["what"] == "processes":
            found = processes(point, options.rounds)
        else:
            own = ["--child", json.dumps(point), "--device", options.device, "--threads", str(options.threads)]
            found = json.loads(_answer([sys.executable, __file__, *own]))
        report["points"].append({**point, **found})
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
