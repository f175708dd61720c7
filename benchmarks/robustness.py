"""Clean, certified and attacked accuracy of networks that are trained with and without privacy.

    python benchmarks/robustness.py --data-dir DIR --epsilon 3 8 inf --out benchmarks/results/robustness-mnist.json
    python benchmarks/robustness.py --data-dir DIR --data-set 0-vs-8 --out benchmarks/results/robustness-0-vs-8.json
    python benchmarks/robustness.py --data-dir DIR --data-set cifar10 --epsilon 8 --tau 16

``mnist``: average pooling, centering, a ball, two orthogonal layers; constraints bound everything, δ = 1e-5.
``0-vs-8``: hinge-KR without privacy, the network of Serrurier et al. 2021: 784-128-64-32-1, full sort, α = 0.98.
``cifar10``: the same as for MNIST, with 128 hidden units; it is meant for ``--tau 16``.

``inf`` trains without privacy. Hyper-parameters were chosen on held-out training images (``--validate``), never on the
test set. Certificates are of all test images, attacks of the first ``--attacked``. Without ``--data-dir`` images are
downloaded from OpenML.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, constraints, fit, fit_without_privacy, layers, losses
from clipless_dp.datasets import load_dataset
from clipless_dp.robustness import Curve, attack, attacks, curve, pareto

RADII = {
    "mnist": (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0),
    "0-vs-8": (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0),
    "cifar10": (0.0, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 36 / 255, 72 / 255, 108 / 255, 1.0),
}
HELD_OUT = {"mnist": 10_000, "0-vs-8": 2_000, "cifar10": 5_000}
ATTACKS = (attacks.PGD(steps=20, restarts=1), attacks.DeepFool(), attacks.HKRStep())
DELTA = 1e-5
Pair = tuple[Tensor, Tensor]


def pooled(tau: float, shape: tuple[int, ...], norm: float, width: int, cap: float) -> DPLipModel:
    """What the constraints certify: pooling halves distances, nothing after it expands them."""
    net = nn.Sequential(
        *(nn.AvgPool2d(2), nn.Flatten(), layers.LayerCentering(), layers.BallProjection(4.0)),
        *(nn.Linear(math.prod(shape) // 4, width, bias=False), layers.GroupSort(2), nn.Linear(width, 10, bias=False)),
        layers.CotangentGate(cap),
    )
    loss = losses.TauCrossEntropy(tau)
    return DPLipModel(net, input_shape=shape, input_norm=norm, loss=loss, constraint=constraints.Orthogonal())


def mnist(tau: float) -> DPLipModel:
    return pooled(tau, (1, 28, 28), 28.0, 64, 0.1)


def two_digits(tau: float) -> DPLipModel:
    """The hinge-KR network of Serrurier et al. 2021, §5."""
    widths, parts = (784, 128, 64, 32), [nn.Flatten()]
    for before, after in pairwise(widths):
        parts += [nn.Linear(before, after), layers.FullSort()]
    return DPLipModel(
        nn.Sequential(*parts, nn.Linear(32, 1)),
        input_shape=(1, 28, 28),
        input_norm=28.0,
        loss=losses.ConvexHingeKR((0.5, 0.5), alpha=0.98, margin=1.0),
        constraint=constraints.Orthogonal(),
    )


def photographs(tau: float) -> DPLipModel:
    """The same as for MNIST, wider."""
    return pooled(tau, (3, 32, 32), 56.0, 128, 0.2)


def settings(name: str, epsilon: float) -> dict[str, Any]:
    if math.isinf(epsilon):
        return {"epochs": 10, "batch_size": 128, "lr": 1e-3}
    if name == "cifar10":
        return {"epochs": 25, "batch_size": 2048, "lr": 2.0}
    return {"epochs": 30, "batch_size": 2048, "lr": 2.0}


def load(options: argparse.Namespace) -> tuple[Pair, Pair]:
    data = load_dataset("cifar10" if options.data_set == "cifar10" else "mnist", options.data_dir)
    train, test = data.train, data.test
    if options.data_set == "0-vs-8":
        train, test = (_digits(*part) for part in (train, test))
    if options.validate:
        cut = len(train[0]) - HELD_OUT[options.data_set]
        train, test = (train[0][:cut], train[1][:cut]), (train[0][cut:], train[1][cut:])
    return train, test


def _digits(images: Tensor, labels: Tensor) -> Pair:
    kept = (labels == 0) | (labels == 8)
    return images[kept], (labels[kept] == 8).long()


def run(options: argparse.Namespace, train: Pair, test: Pair, epsilon: float, tau: float, seed: int) -> Curve:
    """Trains one network, and prints its curve."""
    name = options.data_set
    torch.manual_seed(seed)
    model = {"mnist": mnist, "0-vs-8": two_digits, "cifar10": photographs}[name](tau)
    arguments = settings(name, epsilon)
    if options.epochs is not None:
        arguments["epochs"] = options.epochs
    start = time.perf_counter()
    if math.isinf(epsilon):
        print(fit_without_privacy(model, train, rng_seed=seed, progress=False, **arguments))
    else:
        result = fit(model, train, epsilon=epsilon, delta=DELTA, reproducible_seed=seed, progress=False, **arguments)
        print(result)
    trained = time.perf_counter() - start
    found = curve(model, test, RADII[name], ATTACKS, box=(0.0, 1.0), attacked_samples=options.attacked, rng_seed=seed)
    # The certificate knows of no box: how tight it is shows without one.
    some = test[0][: options.attacked], test[1][: options.attacked]
    away = attack(model, some, ATTACKS, radii=RADII[name][1:], rng_seed=seed).distances
    radii = found.certificate.radii[: options.attacked]
    reached = (radii > 0.0) & (away > 0.0) & away.isfinite()
    tight = float((radii / away)[reached].median()) if bool(reached.any()) else math.nan
    print(f"{name}, ε = {epsilon:g}, τ = {tau:g}, seed {seed}: trained in {trained:.0f} s", found, sep="\n")
    print(
        f"certificate/flip distance without the box, median: {tight:.3f}; L = {found.certificate.lipschitz:.4g}\n",
        flush=True,
    )
    options.runs.append(
        {
            "epsilon": None if math.isinf(epsilon) else epsilon,
            "tau": tau,
            "seed": seed,
            "tightness": tight,
            "seconds": round(trained, 1),
            **found.described(f"{name}, {'held-out training images' if options.validate else 'test images'}"),
        }
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-set", choices=sorted(RADII), default="mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0])
    parser.add_argument("--tau", type=float, nargs="+", default=[8.0], help="temperatures: several make a front")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--attacked", type=int, default=500)
    parser.add_argument("--epochs", type=int, help="in place of the setting's")
    parser.add_argument("--validate", action="store_true", help="evaluate on the last training images, held out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.data_set == "0-vs-8":
        options.epsilon = [math.inf]
    options.runs = []
    train, test = load(options)
    certificates = {}
    for epsilon in options.epsilon:
        for tau in options.tau:
            for seed in options.seeds:
                found = run(options, train, test, epsilon, tau, seed)
                certificates[f"ε = {epsilon:g}, τ = {tau:g}, seed {seed}"] = found.certificate
    print(pareto(certificates, RADII[options.data_set][1]))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {
            "data set": options.data_set,
            "delta": DELTA,
            "runs": options.runs,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        }
        options.out.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
