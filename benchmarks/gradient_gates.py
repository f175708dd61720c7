"""What gradient gates cost: training steps against plain SGD, and each layer's weight gradient against torch's own.

    python benchmarks/gradient_gates.py                   # writes results/gradient-gates.json
    python benchmarks/gradient_gates.py --quick

Networks of ``benchmarks/step.py``. Contenders take turns, so that what else the machine does hits all alike; figures
are medians over rounds of the processor time of one forward and backward pass, and of its ratio to plain torch in
the same round. Networks with gates run as they are trained, in a ``DPLipModel``, its input gate and its loss included.
Peak: bytes held by tensors during one pass. The C library's allocator is told to keep its memory, as a GPU's does,
unless ``--default-allocator``. ``step.py`` has whole private steps, sampling and noise included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from networks import network
from step import ALLOCATORS, RESULTS

from clipless_dp import DPLipModel, gradient_gated, losses
from clipless_dp.gates import gradient_gated_layer
from clipless_dp.training.memory import traffic

Run = Callable[[], Any]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 784-512": (lambda: nn.Linear(784, 512), (784,)),
    "linear 128-128, 64 tokens": (lambda: nn.Linear(128, 128), (64, 128)),
    "linear 512-512, 16 tokens": (lambda: nn.Linear(512, 512), (16, 512)),
    "conv 1-16, 8×8, stride 2, on 28×28": (lambda: nn.Conv2d(1, 16, 8, stride=2, padding=3), (1, 28, 28)),
    "conv 16-32, 4×4, stride 2, on 13×13": (lambda: nn.Conv2d(16, 32, 4, stride=2), (16, 13, 13)),
    "conv 1-16, 5×5, on 28×28": (lambda: nn.Conv2d(1, 16, 5, padding=2), (1, 28, 28)),
    "conv 16-32, 5×5, on 14×14": (lambda: nn.Conv2d(16, 32, 5, padding=2), (16, 14, 14)),
    "conv 64-64, 3×3, on 28×28": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 28, 28)),
    "conv 64-64, 3×3, on 16×16": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 16, 16)),
    "conv 256-256, 3×3, on 4×4": (lambda: nn.Conv2d(256, 256, 3, padding=1), (256, 4, 4)),
}


def compared(runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Times of ``plain`` and ``gated``, in turns, and their peaks."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    ratios = [gated / plain for plain, gated in zip(times["plain"], times["gated"], strict=True)]
    peaks = {name: traffic(run, torch.device("cpu")).peak for name, run in runs.items()}
    return {
        "plain_ms": 1e3 * statistics.median(times["plain"]),
        "gated_ms": 1e3 * statistics.median(times["gated"]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [statistics.quantiles(ratios, n=4)[index] for index in (0, 2)],
        "peak_ratio": peaks["gated"] / peaks["plain"],
    }


def of_network(kind: str, batch: int, rounds: int) -> dict[str, Any]:
    inputs, targets = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))

    plain = network(kind)
    gated = DPLipModel(
        gradient_gated(network(kind)), input_shape=(1, 28, 28), input_norm=8.0, loss=losses.TauCrossEntropy()
    )

    def passes(net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        net.zero_grad()
        loss(net(inputs), targets).backward()

    summed = partial(functional.cross_entropy, reduction="sum")
    found = compared({"plain": lambda: passes(plain, summed), "gated": lambda: passes(gated, gated.loss)}, rounds)
    return {"network": kind, "batch": batch, **found}


def of_layer(name: str, batch: int, rounds: int) -> dict[str, Any]:
    build, shape = LAYERS[name]
    plain = build()
    gated = gradient_gated_layer(plain, 1.0)
    values = torch.randn(batch, *shape)
    cotangents: Tensor = torch.randn_like(plain(values))

    def gradient(layer: nn.Module) -> None:
        torch.autograd.grad(layer(values), next(layer.parameters()), cotangents)

    found = compared({"plain": lambda: gradient(plain), "gated": lambda: gradient(gated)}, rounds)
    return {"layer": name, "batch": batch, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1, help="with more than one, elapsed time")
    parser.add_argument("--quick", action="store_true", help="few rounds, the smaller batch, nothing written")
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "gradient-gates.json")
    options = parser.parse_args()
    kept = ALLOCATORS["keeps memory"]
    if not options.default_allocator and any(os.environ.get(name) != value for name, value in kept.items()):
        # It reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **kept})
    if options.quick:
        options.batches, options.rounds = options.batches[:1], 3
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [of_network(kind, batch, options.rounds) for kind in ("mlp", "cnn") for batch in options.batches]
    rows += [of_layer(name, 128, options.rounds) for name in LAYERS]
    for row in rows:
        name = row.get("network") or row["layer"]
        print(
            f"{name}, batch {row['batch']}: {row['plain_ms']:.1f} → {row['gated_ms']:.1f} ms, "
            f"ratio {row['ratio']:.3f}, peak {row['peak_ratio']:.2f}"
        )
    if not options.quick:
        report = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": options.threads,
            "rounds": options.rounds,
            "allocator": "default" if options.default_allocator else "keeps memory",
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
