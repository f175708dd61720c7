"""Average certified radius of randomized smoothing on a privately trained network, by method, with the same draws.

    python benchmarks/smoothing.py --data-dir DIR --epochs 10 --out benchmarks/results/smoothing.json

The network is that of ``benchmarks/robustness.py`` for MNIST, trained at δ = 1e-5: its constant is tight, and the
deterministic certificate hard to beat. ``--network relu`` has ReLU, one layer more and limits on norms in place of
orthogonal layers: it falls nowhere near as fast as its constant says, which smoothing sees. It is deployed without the
ball that its private training needs: noise would be projected onto it, and layers behind it are as Lipschitz without.
Average pooling of 2×2 pixels comes first, and is linear: noise of ``σ`` on pixels is noise of ``σ/2`` behind it, and a
radius there is half of one in pixels, which all figures are in.

For each ``--sigma`` all methods and maps see the same noise; the deterministic certificate needs none. The temperature
of each method is chosen on ``--held-out`` test images, the last ones, which are not among those reported.
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
from torch import Tensor, nn

from clipless_dp import DPLipModel, GaussianNoise, constraints, fit, layers, losses
from clipless_dp.datasets import load_dataset
from clipless_dp.robustness import (
    Draws,
    Smoothed,
    average_certified_radius,
    certified_accuracy,
    certify,
    draw_together,
)

RADII = (0.0, 0.5, 1.0, 1.5, 2.0)
METHODS: tuple[tuple[Any, Any, Any], ...] = (
    ("argmax", "cohen", "rest"),
    ("argmax", "partition", "rest"),
    ("softmax", "bernstein", "each"),
    ("softmax", "lipschitz", "each"),
    ("margin", "bernstein", "rest"),
    ("margin", "lipschitz", "rest"),
    ("margin", "lipschitz", "each"),
    ("pairs", "lipschitz", "rest"),
)
TEMPERATURES: dict[Any, tuple[float, ...]] = {
    "argmax": (1.0,),
    "softmax": (4.0, 16.0, 64.0),
    "margin": (0.7, 1.0, 1.5, 2.0, 4.0, 16.0),
    "pairs": (0.7, 1.0, 1.5, 2.0, 4.0, 6.0),
}
Pair = tuple[Tensor, Tensor]


def evaluated(certificate: Any) -> dict[str, Any]:
    return {
        "average radius": average_certified_radius(certificate),
        "certified": {f"{radius:g}": certified_accuracy(certificate, radius) for radius in RADII},
    }


def loose() -> DPLipModel:
    """Pooling, then ReLU layers of spectral norm 1 at most."""
    net = nn.Sequential(
        *(nn.AvgPool2d(2), nn.Flatten(), layers.LayerCentering(), layers.BallProjection(4.0)),
        *(nn.Linear(196, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.ReLU()),
        *(nn.Linear(64, 10, bias=False), layers.CotangentGate(0.1)),
    )
    return DPLipModel(
        net, input_shape=(1, 28, 28), input_norm=28.0, loss=losses.TauCrossEntropy(8.0),
        constraint=constraints.Spectral(),
    )  # fmt: skip


def deployed(model: DPLipModel) -> DPLipModel:
    """The network behind its pooling, without the ball and the gate of its training."""
    left = (nn.AvgPool2d, layers.BallProjection, layers.CotangentGate)
    net = nn.Sequential(*(part for part in model.net.children() if not isinstance(part, left)))
    return DPLipModel(net, input_shape=(1, 14, 14), input_norm=1e3, loss=losses.TauCrossEntropy(8.0))


def compared(model: DPLipModel, chosen: Pair, test: Pair, sigma: float, options: argparse.Namespace) -> list[Any]:
    """Every method at one σ: the temperature from the first samples, the figures from the others."""

    def drawn(data: Pair, pairs: list[tuple[Any, float]], draws: int, rng_seed: int) -> dict[tuple[str, float], Draws]:
        several = [Smoothed(model, sigma / 2.0, map=name, temperature=one, units=2.0) for name, one in pairs]
        found = draw_together(several, data, options.select, draws, rng_seed=rng_seed)
        return dict(zip(pairs, found, strict=True))

    grid = [(name, one) for name, temperatures in TEMPERATURES.items() for one in temperatures]
    tried = drawn(chosen, grid, options.draws // 2, 1)

    def best(name: str, method: Any, against: Any) -> tuple[str, float]:
        return max(
            ((name, one) for one in TEMPERATURES[name]),
            key=lambda pair: average_certified_radius(tried[pair].certify(options.alpha, method, against)),
        )

    settled = [best(*method) for method in METHODS]
    final = drawn(test, list(dict.fromkeys(settled)), options.draws, 2)
    found = []
    for (name, method, against), pair in zip(METHODS, settled, strict=True):
        row = {"sigma": sigma, "method": method, "map": name, "against": against, "temperature": pair[1]}
        row |= evaluated(final[pair].certify(options.alpha, method, against))
        print(f"σ = {sigma:g}  {method:<10} {name:<10} {pair[1]:<5g} {row['average radius']:.4f}", flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--augment", type=float, help="train on views with noise of this deviation")
    parser.add_argument("--network", choices=["orthogonal", "relu"], default="orthogonal")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--select", type=int, default=100)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--alpha", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, help="in place of the setting's")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data = load_dataset("mnist", options.data_dir)
    inputs, labels = nn.AvgPool2d(2)(data.test[0]), data.test[1]
    test = inputs[: options.samples], labels[: options.samples]
    held_out = inputs[len(inputs) - options.held_out :], labels[len(inputs) - options.held_out :]
    torch.manual_seed(options.seed)
    model = mnist(8.0) if options.network == "orthogonal" else loose()
    arguments = settings("mnist", options.epsilon)
    if options.epochs is not None:
        arguments["epochs"] = options.epochs
    if options.augment is not None:
        arguments["augment"] = GaussianNoise(options.augment)
    start = time.perf_counter()
    arguments |= {"epsilon": options.epsilon, "delta": DELTA, "reproducible_seed": options.seed, "progress": False}
    print(fit(model, data.train, **arguments))
    trained = time.perf_counter() - start
    with_ball = certify(model, (data.test[0][: options.samples], labels[: options.samples]))
    model = deployed(model)
    certificate = certify(model, test, units=2.0)
    print(f"deterministic  {average_certified_radius(certificate):.4f}, L = {certificate.lipschitz:.4g}", flush=True)
    summary: dict[str, Any] = {
        "data set": f"MNIST, the first {options.samples} test images",
        "network": options.network,
        "seed": options.seed,
        "epsilon": options.epsilon,
        "delta": DELTA,
        "epochs": arguments["epochs"],
        "augmented with noise of deviation": options.augment,
        "draws": options.draws,
        "draws that select": options.select,
        "alpha": options.alpha,
        "lipschitz": certificate.lipschitz,
        "deterministic, with the ball": evaluated(with_ball),
        "deterministic": evaluated(certificate),
        "smoothed": [],
        "seconds of training": round(trained, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }
    for sigma in options.sigma:
        summary["smoothed"] += compared(model, held_out, test, sigma, options)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
