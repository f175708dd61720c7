"""What a private step costs on an accelerator, beside compiled plain training and Opacus' ghost clipping.

    python benchmarks/accelerator.py                                 # one GPU, within ten minutes; writes results/
    python benchmarks/accelerator.py --device cpu --batch 4 --rounds 2 --minutes 2    # whether it runs, on a CPU

LipVGG, LipResNet and a small vision transformer at the size of CIFAR images, BERT (4 layers of 256) on 128 tokens, as
GLUE has them. The first two have signal gates, whose steps can be compiled; the others run sample by sample behind
gradient gates. All contenders get the same network, data and expected batch and take turns in each round, in a new
random order; the device is waited for at both ends of a turn and not within. Figures are medians of a step's time, and
of its ratio to compiled plain SGD's in the same round; the peak is of memory that tensors held. Then each contender's
batch is doubled until memory or ``--largest`` ends it, and its samples per second are taken there. What is left when
``--minutes`` are over is left out, and said so.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from any_network import NETWORKS, ViT
from step import RESULTS, peak_bytes, synchronize
from steps import private_step

from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatches, gated, gradient_gated, losses
from clipless_dp.architectures import lipresnet, lipvgg
from clipless_dp.model.surroundings import is_out_of_memory
from clipless_dp.sampling import PoissonBatchSampler

STEPS, RATE_OF_LEARNING, NOISE, TOKENS = 100_000, 0.01, 1.0, 128
WORDS = 30_522
CIFAR = (3, 32, 32)
BASELINE = "SGD, compiled"

Step = Callable[[], None]
Rows = Tensor | dict[str, Tensor]

BUILDS: dict[str, Callable[[], nn.Module]] = {
    "LipVGG": lambda: lipvgg(CIFAR, 10, widths=(64, 128, 256)),
    "LipResNet": lambda: lipresnet(CIFAR, 10, widths=(128, 256), patch_size=2),
    "ViT-tiny": lambda: ViT(32, 4, 6),
    "BERT": lambda: NETWORKS["bert-full"].build(),
}
BATCHES = {"LipVGG": 512, "LipResNet": 512, "ViT-tiny": 256, "BERT": 64}
GATED = ("LipVGG", "LipResNet")


def made(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[name]().to(device).train()


def data_of(name: str, count: int, device: torch.device) -> tuple[Rows, Tensor]:
    torch.manual_seed(1)
    labels = torch.randint(4, (count,), device=device)
    if name != "BERT":
        return torch.rand(count, *CIFAR, device=device), labels
    ids = torch.randint(WORDS, (count, TOKENS), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def called(net: Any, rows: Rows) -> Tensor:
    found: Tensor = net(rows) if isinstance(rows, Tensor) else net(**rows).logits
    return found


def drawn(data: tuple[Rows, Tensor], batch: int) -> Iterator[tuple[Rows, Tensor]]:
    rows, labels = data
    for indices in PoissonBatchSampler(len(labels), sample_rate=batch / len(labels), steps=STEPS).draws():
        some = torch.from_numpy(indices).to(labels.device)
        yield rows[some] if isinstance(rows, Tensor) else {key: part[some] for key, part in rows.items()}, labels[some]


def plain(name: str, batch: int, device: torch.device, *, compiled: bool) -> Step:
    net, (rows, labels) = made(name, device), data_of(name, batch, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE_OF_LEARNING)

    def loss(rows: Rows, labels: Tensor) -> Tensor:
        return functional.cross_entropy(called(net, rows), labels)

    run = torch.compile(loss) if compiled else loss

    def step() -> None:
        optimizer.zero_grad()
        run(rows, labels).backward()
        optimizer.step()

    return step


def ours(name: str, batch: int, device: torch.device, *, compiled: bool = False) -> Step:
    if compiled and name not in GATED:
        raise NotImplementedError("networks that run sample by sample are not compiled")
    net, (rows, labels) = made(name, device), data_of(name, 8 * batch, device)
    model = DPLipModel(
        gated(net) if name in GATED else gradient_gated(net, isolation="vmap"),
        input_shape=rows if isinstance(rows, dict) else CIFAR,
        input_norm=10.0 if name in GATED else None,
        loss=losses.TauCrossEntropy(1.0),
    ).to(device)
    settings: dict[str, Any] = {"noise_multiplier": NOISE, "sample_rate": 0.125, "dataset_size": len(labels)}
    optimizer = CliplessDPSGD(model, lr=RATE_OF_LEARNING, **settings)
    packed = rows if isinstance(rows, Tensor) or model.packing is None else model.packing.pack(rows)
    batches = iter(
        PoissonBatches((packed, labels), sample_rate=0.125, steps=STEPS, physical_batch_size=max(1, batch // 8))
    )
    return private_step(model, optimizer, batches, compiled=compiled)


def ghost(name: str, batch: int, device: torch.device) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    net = made(name, device)
    base = torch.optim.SGD(net.parameters(), lr=RATE_OF_LEARNING)
    module: Any = GradSampleModuleFastGradientClipping(net, max_grad_norm=1.0, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        base, noise_multiplier=NOISE, max_grad_norm=1.0, expected_batch_size=batch
    )
    criterion: Any = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())
    batches = drawn(data_of(name, 8 * batch, device), batch)

    def step() -> None:
        rows, labels = next(batches)
        if isinstance(rows, dict):
            # For each sample its own, since Opacus reads the axis of samples off each layer's input.
            rows["position_ids"] = torch.arange(TOKENS, device=device).expand(len(labels), TOKENS).contiguous()
        optimizer.zero_grad()
        criterion(called(module, rows), labels).backward()
        optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[str, int, torch.device], Step]] = {
    BASELINE: partial(plain, compiled=True),
    "SGD": partial(plain, compiled=False),
    "gates": ours,
    "gates, compiled": partial(ours, compiled=True),
    "Opacus, ghost": ghost,
}


def peak(build: Callable[[], Step], device: torch.device) -> int:
    """The most bytes that tensors held in a step."""
    if device.type != "cuda":
        return peak_bytes(build, device)
    step = build()
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def timed(step: Step, repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def throughput(name: str, contender: str, options: argparse.Namespace, until: float) -> tuple[int, float] | None:
    """The largest batch that fits, by powers of two, and samples per second at it."""
    device, batch, found = torch.device(options.device), options.batch or BATCHES[name], None
    while batch <= options.largest and time.perf_counter() < until:
        try:
            step = CONTENDERS[contender](name, batch, device)
            step()
            found = batch, batch / timed(step, 3, device)
        except RuntimeError as error:
            if is_out_of_memory(error):
                break
            raise
        finally:
            step = None  # type: ignore[assignment]
            emptied(device)
        batch *= 2
    return found


def measure(name: str, options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """A row for each contender."""
    device, batch = torch.device(options.device), options.batch or BATCHES[name]
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for contender, build in CONTENDERS.items():
        row: dict[str, Any] = {"network": name, "batch": batch, "contender": contender}
        rows[contender] = row
        try:
            emptied(device)
            row["peak"] = peak(partial(build, name, batch, device), device)
            step = build(name, batch, device)
            for _ in range(3):
                step()
            steps[contender] = step
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    times: dict[str, list[float]] = {contender: [] for contender in steps}
    order, shuffler = list(steps), random.Random(0)
    for _ in range(options.rounds):
        shuffler.shuffle(order)
        for contender in order:
            times[contender].append(timed(steps[contender], options.repeats, device))
    base = BASELINE if BASELINE in times else "SGD"
    for contender, own in times.items():
        ratios = [mine / theirs for mine, theirs in zip(own, times[base], strict=True)]
        rows[contender] |= {"ms": 1e3 * statistics.median(own), "ratio": statistics.median(ratios)}
        rows[contender]["peak ratio"] = rows[contender]["peak"] / rows[base]["peak"]
    steps.clear()
    for contender in times:
        rows[contender]["largest"] = throughput(name, contender, options, until)
    return list(rows.values())


def table(rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    shown = []
    for row in rows:
        where = [row["network"], row["batch"], row["contender"]]
        if "failed" in row:
            shown.append([*where, row["failed"], "", "", "", "", ""])
            continue
        batch, rate = row["largest"] or ("–", "–")
        rate = rate if isinstance(rate, str) else f"{rate:.0f}"
        peak, ratio = f"{row['peak'] / 1e6:.0f}", f"{row['peak ratio']:.2f}"
        shown.append([*where, f"{row['ms']:.2f}", f"{row['ratio']:.2f}", peak, ratio, batch, rate])
    heads = ["network", "batch", "contender", "ms", "ratio", "peak MB", "ratio ", "largest batch", "samples/s there"]
    return (
        f"# A step on {report['device']}\n\ntorch {report['torch']}, {report['rounds']} rounds of {report['repeats']} "
        "steps; ratios are to compiled plain SGD. `python benchmarks/accelerator.py`\n\n"
        + tabulate(shown, heads, tablefmt="github", disable_numparse=True)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(BUILDS), default=list(BUILDS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, help="by default each network's own")
    parser.add_argument("--largest", type=int, default=16_384, help="batch at which doubling ends")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "accelerator.json", help="JSON; the table goes beside it")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu --batch 4 --rounds 2 tries whether it runs")
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU",
        "torch": torch.__version__,
        "rounds": options.rounds,
        "repeats": options.repeats,
    }
    until, rows = time.perf_counter() + 60.0 * options.minutes, []
    for name in options.networks:
        if time.perf_counter() > until:
            print(f"{name}: left out, as the time was over", file=sys.stderr)
            continue
        rows += measure(name, options, until)
        if device.type == "cuda":
            # At once, so that an interrupt leaves what was measured.
            options.out.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", "utf-8")
            options.out.with_suffix(".md").write_text(table(rows, report), "utf-8")
    print(table(rows, report))


if __name__ == "__main__":
    main()
