"""Order statistics in the maximum norm: Δ by depth, and accuracy, certified and attacked, with and without privacy.

    python benchmarks/sort_net.py --data-dir DIR          # some ten minutes on one thread; writes results/sort-net.*
    python benchmarks/sort_net.py --only digits           # one part, the others as they are in these files

``digits`` are scikit-learn's, 8×8; ``mnist`` is averaged over 4×4 pixels within the network, which moves no entry by
more than its pixels do, so that radii are of pixels. Entries are in [-½, ½]. Settings were not searched: one learning
rate, one temperature. Certificates and attacks are of the first test images (``--certified``, ``--attacked``).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, architectures, constraints, fit, fit_without_privacy, losses
from clipless_dp.datasets import load_dataset
from clipless_dp.layers import DistanceLinear
from clipless_dp.robustness import attack_inf, certified_accuracy, certify

RESULTS = Path(__file__).resolve().parent / "results"
DEPTHS = (1, 2, 5, 10, 20, 50, 100)
RADII = (0.0, 0.05, 0.1)
BOX = (-0.5, 0.5)
WIDTH = 64
Pair = tuple[Tensor, Tensor]


def depths() -> list[dict[str, float]]:
    """The largest Δ of a parameter, and that of stacks of p-norms and of orthogonal layers besides."""
    rows = []
    for depth in DEPTHS:
        widths = (WIDTH,) * (depth - 1)
        entry: dict[str, float] = {"depth": depth}
        nets: dict[str, nn.Sequential] = {
            "order statistics": architectures.sort_mlp((WIDTH,), 10, widths=widths),
            "means of p = 8": architectures.sort_mlp((WIDTH,), 10, widths=widths, quantile=None, p=8.0),
            "norms of p = 8": nn.Sequential(
                *[DistanceLinear(WIDTH, WIDTH, p=8.0) for _ in widths], DistanceLinear(WIDTH, 10, p=8.0)
            ),
        }
        for name, net in nets.items():
            model = wrapped(net, (WIDTH,), losses.TauCrossEntropy(8.0))
            entry[name] = max(model.sensitivity().per_parameter.values())
        if depth > 1:
            plain = architectures.mlp((WIDTH,), 10, widths=widths)
            model = DPLipModel(
                plain, input_shape=(WIDTH,), input_norm=math.sqrt(WIDTH), loss=losses.TauCrossEntropy(8.0),
                constraint=constraints.Orthogonal(),
            )  # fmt: skip
            entry["orthogonal layers, inputs in [0, 1]"] = max(model.sensitivity().per_parameter.values())
        rows.append(entry)
    return rows


def wrapped(net: nn.Module, shape: tuple[int, ...], loss: losses.Loss) -> DPLipModel:
    """With a ball that holds the box: Δ does not depend on it."""
    return DPLipModel(net, input_shape=shape, input_norm=math.sqrt(math.prod(shape)), loss=loss)


def digits() -> tuple[Pair, Pair]:
    """A fixed fifth is held out to test on."""
    split = load_dataset("digits")
    train, test = ((inputs.flatten(1) - 0.5, labels) for inputs, labels in (split.train, split.test))
    return train, test


def mnist(data_dir: str | None) -> tuple[Pair, Pair]:
    """60,000 and 10,000 images."""
    split = load_dataset("mnist", data_dir=data_dir)
    train, test = ((inputs.reshape(-1, 1, 28, 28) - 0.5, labels) for inputs, labels in (split.train, split.test))
    return train, test


def pooled(widths: tuple[int, ...]) -> nn.Sequential:
    """Averages of 4×4 pixels, then order statistics of 49 entries."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), *architectures.sort_mlp((49,), 10, widths=widths))


def row(
    name: str, data: tuple[Pair, Pair], net: nn.Sequential, epsilon: float, asked: argparse.Namespace
) -> dict[str, Any]:
    """One training, its certificates and its attack."""
    (train, (inputs, labels)), began = data, time.perf_counter()
    small = len(train[0]) < 5000
    loss = losses.TauCrossEntropy(8.0)
    model = wrapped(net, tuple(train[0].shape[1:]), loss)
    if math.isinf(epsilon):
        fit_without_privacy(
            model,
            train,
            epochs=40 if small else 2,
            batch_size=128 if small else 512,
            lr=0.02,
            progress=False,
            rng_seed=0,
        )
    else:
        fit(
            model, train, epsilon=epsilon, delta=1e-4 if small else 1e-5, epochs=40 if small else 6,
            batch_size=400 if small else 4096, optimizer="adam", lr=0.02, audit=False, progress=False,
            reproducible_seed=0,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    some = inputs[: asked.certified], labels[: asked.certified]
    plain, boxed = certify(model, some, norm="inf"), certify(model, some, norm="inf", box=BOX)
    hit = attack_inf(model, (inputs[: asked.attacked], labels[: asked.attacked]), 0.1, box=BOX, steps=10, restarts=1)
    found = {
        "data": name,
        "network": "-".join(str(layer.out_features) for layer in net if hasattr(layer, "out_features")),
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "largest Δ": max(model.sensitivity().per_parameter.values()),
        "certified": {str(radius): certified_accuracy(plain, radius) for radius in RADII},
        "certified in the box": {str(radius): certified_accuracy(boxed, radius) for radius in RADII},
        "attacked at 0.1": 1.0 - float(hit.flipped.double().mean()),
        "certified images": len(some[1]),
        "attacked images": asked.attacked,
        "seconds of training": round(seconds, 1),
    }
    print(json.dumps(found, ensure_ascii=False), flush=True)
    return found


def page(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = list(dict.fromkeys(name for entry in report["depths"] for name in entry if name != "depth"))
    lines = [
        "# Order statistics in the maximum norm",
        "",
        f"{report['machine']}, one thread, torch {report['torch']}. Made by "
        "`python benchmarks/sort_net.py --data-dir DIR`.",
        "",
        "## The largest Δ of a parameter by depth",
        "",
        "Cross-entropy, width 64. Of order statistics and means for weights of any size and inputs of any norm.",
        "",
        f"| depth | {' | '.join(names)} |",
        f"| ---: | {' | '.join('---:' for _ in names)} |",
    ]
    for entry in report["depths"]:
        shown = [f"{entry[name]:.4g}" if name in entry else "–" for name in names]
        lines += [f"| {entry['depth']} | {' | '.join(shown)} |"]
    lines += [
        "",
        "## Accuracy, in percent",
        "",
        "Certified at 0.05 and 0.1 in the maximum norm, by the constant alone / by intervals within the box; "
        "attacked by 10 signed steps at 0.1.",
        "",
        "| data | widths | ε | clean | certified .05 | certified .1 | attacked .1 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in report["rows"]:
        plain, boxed = entry["certified"], entry["certified in the box"]
        both = [f"{100 * plain[r]:.1f} / {100 * boxed[r]:.1f}" for r in ("0.05", "0.1")]
        epsilon = "∞, not private" if entry["epsilon"] is None else f"{entry['epsilon']:g}"
        lines.append(
            f"| {entry['data']} | {entry['network']} | {epsilon} | {100 * plain['0.0']:.1f} | {both[0]} | {both[1]} | "
            f"{100 * entry['attacked at 0.1']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--only", choices=("depth", "digits", "mnist"))
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--certified", type=int, default=500, help="the MNIST rows in results/ are of 300")
    parser.add_argument("--attacked", type=int, default=100)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file = RESULTS / "sort-net.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    report |= {"machine": f"{platform.machine()} CPU", "torch": torch.__version__}
    parts: dict[str, list[tuple[tuple[int, ...], float]]] = {
        name: [((), asked.epsilon), ((WIDTH,), math.inf), ((WIDTH,), asked.epsilon)] for name in ("digits", "mnist")
    }
    if asked.only in (None, "depth"):
        report["depths"] = depths()
        _write(report)
    for name, rows in parts.items():
        if asked.only not in (None, name):
            continue
        data = digits() if name == "digits" else mnist(asked.data_dir)
        report["rows"] = [entry for entry in report["rows"] if entry["data"] != name]
        for widths, epsilon in rows:
            net = architectures.sort_mlp((64,), 10, widths=widths) if name == "digits" else pooled(widths)
            report["rows"].append(row(name, data, net, epsilon, asked))
            _write(report)


def _write(report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / "sort-net.json").write_text(text, encoding="utf-8")
    (RESULTS / "sort-net.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
