"""Average certified radius of randomized smoothing on a privately trained network, by method, with the same draws.

    python benchmarks/smoothing.py --data-dir DIR --epsilon 3 --out benchmarks/results/smoothing.json

The network is that of ``benchmarks/robustness.py`` for MNIST, trained at δ = 1e-5. For each ``--sigma`` every method
sees the same noise: Cohen's and the partition certificate the predictions, Bernstein's and the Lipschitz-aware one the
same scores through the same soft map; the deterministic certificate needs no noise. Temperatures are chosen, for each
``σ`` and each map and method by itself, on ``--held-out`` test images that are not among those reported: the last ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from robustness import DELTA, mnist, settings
from torch import Tensor

from clipless_dp import DPLipModel, GaussianNoise, fit
from clipless_dp.datasets import load_dataset
from clipless_dp.robustness import Smoothed, average_certified_radius, certified_accuracy, certify

RADII = (0.0, 0.5, 1.0, 1.5, 2.0)
METHODS = (
    ("argmax", "cohen", "rest"),
    ("argmax", "partition", "rest"),
    ("softmax", "bernstein", "each"),
    ("margin", "bernstein", "rest"),
    ("softmax", "lipschitz", "each"),
    ("sparsemax", "lipschitz", "each"),
    ("margin", "lipschitz", "rest"),
)
TEMPERATURES = {
    "argmax": (1.0,),
    "softmax": (2.0, 4.0, 8.0, 16.0),
    "sparsemax": (0.5, 1.0, 2.0, 4.0),
    "margin": (0.35, 0.5, 0.7, 1.0, 2.0),
}
Pair = tuple[Tensor, Tensor]


def evaluated(certificate: Any) -> dict[str, Any]:
    return {
        "average radius": average_certified_radius(certificate),
        "certified": {f"{radius:g}": certified_accuracy(certificate, radius) for radius in RADII},
    }


def compared(model: DPLipModel, chosen: Pair, test: Pair, sigma: float, options: argparse.Namespace) -> list[Any]:
    """Every method at one σ: the temperature from the first samples, the figures from the others."""
    found = []
    tried = options.draws // 4
    drawn: dict[tuple[str, float], Any] = {}
    for name, method, against in METHODS:
        best, temperature = -1.0, 1.0
        for one in TEMPERATURES[name]:
            if (name, one) not in drawn:
                smoothed = Smoothed(model, sigma, map=name, temperature=one)
                drawn[name, one] = smoothed.draw(chosen, options.select, tried, rng_seed=1)
            radius = average_certified_radius(drawn[name, one].certify(options.alpha, method, against))
            if radius > best:
                best, temperature = radius, one
        key = ("reported " + name, temperature)
        if key not in drawn:
            smoothed = Smoothed(model, sigma, map=name, temperature=temperature)
            drawn[key] = smoothed.draw(test, options.select, options.draws, rng_seed=2)
        certificate = drawn[key].certify(options.alpha, method, against)
        row = {
            "sigma": sigma,
            "method": method,
            "map": name,
            "against": against,
            "temperature": temperature,
            **evaluated(certificate),
        }
        print(f"σ = {sigma:g}  {method:<10} {name:<10} {temperature:<5g} {row['average radius']:.4f}", flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--augment", type=float, help="train on views with noise of this deviation")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--select", type=int, default=100)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, help="in place of the setting's")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data = load_dataset("mnist", options.data_dir)
    inputs, labels = data.test
    test = inputs[: options.samples], labels[: options.samples]
    held_out = inputs[len(inputs) - options.held_out :], labels[len(inputs) - options.held_out :]
    torch.manual_seed(0)
    model = mnist(8.0)
    arguments = settings("mnist", options.epsilon)
    if options.epochs is not None:
        arguments["epochs"] = options.epochs
    if options.augment is not None:
        arguments["augment"] = GaussianNoise(options.augment)
    start = time.perf_counter()
    print(
        fit(model, data.train, epsilon=options.epsilon, delta=DELTA, reproducible_seed=0, progress=False, **arguments)
    )
    trained = time.perf_counter() - start
    certificate = certify(model, test)
    print(f"deterministic  {average_certified_radius(certificate):.4f}, L = {certificate.lipschitz:.4g}", flush=True)
    rows = [row for sigma in options.sigma for row in compared(model, held_out, test, sigma, options)]
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {
            "data set": f"MNIST, the first {options.samples} test images",
            "epsilon": options.epsilon,
            "delta": DELTA,
            "augmented with noise of deviation": options.augment,
            "draws": options.draws,
            "draws that select": options.select,
            "alpha": options.alpha,
            "lipschitz": certificate.lipschitz,
            "deterministic": evaluated(certificate),
            "smoothed": rows,
            "seconds of training": round(trained, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        }
        options.out.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
