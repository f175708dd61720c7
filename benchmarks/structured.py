"""One circulant-diagonal layer beside a dense one of the same width: private MNIST, parameters, time of a step.

    python benchmarks/structured.py --data-dir DIR       # writes results/structured.{json,md}
    python benchmarks/structured.py --quick              # a minute, digits, prints

Both networks are 784 entries, one square layer, sorted in pairs, ten outputs, within orthogonal constraints, of centred
images scaled to norm 4, with the loss's gradient capped at 0.1: the settings of preset ``mnist-orthogonal``, chosen for
a dense network on held-out training images and not again for these. One seed, test images once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from families import parser_of

from clipless_dp import CliplessDPSGD, DPLipModel, architectures, constraints, evaluate, fit, layers, losses
from clipless_dp.datasets import Split, load_dataset

RESULTS = Path(__file__).resolve().parent / "results"
EPSILON, DELTA = 3.0, 1e-5


def network(kind: str, size: int) -> nn.Sequential:
    """Behind centering and a sphere, before a cotangent gate."""
    torch.manual_seed(0)
    if kind == "circulant":
        body = architectures.circulant_mlp((size,), 10)
    else:
        dense = nn.Linear(size, size, bias=False), layers.GroupSort(2), nn.Linear(size, 10, bias=False)
        body = architectures.isometric_(nn.Sequential(*dense))
    return nn.Sequential(
        nn.Flatten(), layers.LayerCentering(), layers.SphereScaling(4.0), *body, layers.CotangentGate(0.1)
    )


def wrapped(kind: str, split: Split) -> DPLipModel:
    """Within orthogonal constraints."""
    shape = tuple(split.inputs.shape[1:])
    return DPLipModel(
        network(kind, math.prod(shape)),
        input_shape=shape,
        input_norm=math.sqrt(math.prod(shape)),
        loss=losses.TauCrossEntropy(8.0),
        constraint=constraints.Orthogonal(),
    )


def step_milliseconds(kind: str, split: Split, rows: int) -> float:
    """The best of three, projections included, of processor time: other processes do not count."""
    model, batch = wrapped(kind, split), (split.inputs[:rows], split.targets[:rows])
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=rows, sampling="none")
    times = []
    for _ in range(4):
        began = time.process_time()
        optimizer.accumulate(batch)
        optimizer.step()
        times.append(time.process_time() - began)
    return round(1000.0 * min(times[1:]), 1)


def row(kind: str, split: Split, asked: argparse.Namespace) -> dict[str, Any]:
    """One training."""
    model, rows = wrapped(kind, split), len(split.inputs)
    found = {
        "layer": kind,
        "parameters": sum(p.numel() for p in model.net.parameters() if p.requires_grad),
        "milliseconds of a step": step_milliseconds(kind, split, min(2048, rows)),
        "Δ": model.sensitivity().total,
    }
    began = time.process_time()
    fit(
        model, split.train, epsilon=EPSILON, delta=DELTA, epochs=asked.epochs, batch_size=min(2048, rows // 5),
        lr=asked.lr, audit=False, progress=False, reproducible_seed=0,
    )  # fmt: skip
    found["processor seconds of training"] = round(time.process_time() - began, 1)
    found["accuracy"] = round(100.0 * float(evaluate(model, split.test)[0] or 0.0), 1)
    print(json.dumps(found, ensure_ascii=False), flush=True)
    return found


def main() -> None:
    """See above."""
    parser = parser_of(__doc__, epochs=10)
    parser.add_argument("--lr", type=float, default=2.0)
    parser.add_argument("--layers", nargs="+", choices=("circulant", "dense"), default=["circulant", "dense"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    split = load_dataset("digits") if asked.quick else load_dataset("mnist", data_dir=asked.data_dir)
    rows = [row(kind, split, asked) for kind in asked.layers]
    if asked.quick:
        return
    (RESULTS / "structured.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    lines = [
        "# A circulant-diagonal layer beside a dense one",
        "",
        f"Private MNIST at ε = {EPSILON:g}, δ = {DELTA:g}, {asked.epochs} epochs, one seed, one thread, processor "
        f"time, torch {torch.__version__}. Steps of 2,048 images. Made by "
        "`python benchmarks/structured.py --data-dir DIR`.",
        "",
        "| square layer | parameters | accuracy | a step | training |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['layer']} | {r['parameters']:,} | {r['accuracy']} % | {r['milliseconds of a step']} ms | "
        f"{r['processor seconds of training']} s |"
        for r in rows
    ]
    (RESULTS / "structured.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
