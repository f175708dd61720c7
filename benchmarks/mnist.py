"""MNIST from pixels at ε = 3, δ = 1e-5: the routes side by side.

    python benchmarks/mnist.py --data-dir DIR --route gated --seeds 0 1 2

Hyper-parameters were chosen on 10 000 held-out training images (``--validate`` shows them), never on the test set.
Without ``--data-dir`` the images are downloaded from OpenML. Writes JSON with ``--out``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from clipless_dp import DPLipModel, constraints, evaluate, fit, gated, gradient_gated, layers, losses
from clipless_dp.datasets import load_dataset


@dataclass(frozen=True)
class Recipe:
    epochs: float
    batch_size: int
    lr: float
    tau: float
    input_norm: float
    optimizer: Literal["sgd", "adam"] = "sgd"


RECIPES = {
    "gated": Recipe(epochs=30, batch_size=4096, lr=0.02, tau=8.0, input_norm=28.0, optimizer="adam"),
    "gradient": Recipe(epochs=20, batch_size=2048, lr=0.01, tau=8.0, input_norm=28.0, optimizer="adam"),
    "orthogonal": Recipe(epochs=30, batch_size=2048, lr=0.2, tau=8.0, input_norm=28.0),
    "spectral": Recipe(epochs=30, batch_size=2048, lr=0.2, tau=8.0, input_norm=28.0),
}


def network(route: str) -> nn.Sequential:
    if route == "gated":
        # Small coverage and few weights: Δ√p, summed over layers, is what the noise costs. Centering takes away what
        # all samples share, so that more of each layer's unit norm tells them apart.
        return nn.Sequential(
            layers.LayerCentering(),
            nn.Conv2d(1, 16, 6, stride=2, padding=2, bias=False),
            nn.ReLU(),
            layers.LayerCentering(),
            nn.Conv2d(16, 64, 2, stride=2, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            layers.LayerCentering(),
            nn.Linear(64 * 9, 10),
        )
    if route == "gradient":
        return nn.Sequential(
            layers.LayerCentering(),
            layers.SphereScaling(),
            nn.Conv2d(1, 16, 8, stride=2, padding=3, bias=False),
            nn.ReLU(),
            layers.LayerCentering(),
            layers.SphereScaling(),
            nn.Conv2d(16, 32, 4, stride=2, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            layers.LayerCentering(),
            layers.SphereScaling(),
            nn.Linear(32 * 25, 10),
        )
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Flatten(),
        layers.LayerCentering(),
        layers.SphereScaling(4.0),
        nn.Linear(196, 64, bias=False),
        layers.GroupSort(2),
        nn.Linear(64, 10, bias=False),
    )


def wrapped(route: str, recipe: Recipe) -> DPLipModel:
    net: nn.Module = network(route)
    if route == "gated":
        net = gated(net, cotangent_norm=0.3)
    elif route == "gradient":
        net = gradient_gated(net, floor=0.3)
    constraint = {"orthogonal": constraints.Orthogonal(), "spectral": constraints.Spectral()}.get(route)
    return DPLipModel(
        net,
        input_shape=(1, 28, 28),
        input_norm=recipe.input_norm,
        loss=losses.TauCrossEntropy(recipe.tau),
        constraint=constraint,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--route", choices=sorted(RECIPES), default="gated")
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--validate", action="store_true", help="train on 50 000, evaluate on the other 10 000")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    recipe = RECIPES[options.route]
    data = load_dataset("mnist", options.data_dir)
    train, test = data.train, data.test
    if options.validate:
        test = (train[0][50_000:], train[1][50_000:])
        train = (train[0][:50_000], train[1][:50_000])
    runs = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = wrapped(options.route, recipe)
        start = time.perf_counter()
        result = fit(
            model,
            train,
            epsilon=options.epsilon,
            delta=options.delta,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            optimizer=partial(torch.optim.Adam, lr=recipe.lr) if recipe.optimizer == "adam" else None,
            reproducible_seed=seed,
        )
        seconds = time.perf_counter() - start
        accuracy, _ = evaluate(model, test)
        assert accuracy is not None
        runs.append({"seed": seed, "accuracy": accuracy, "epsilon": result.epsilon, "seconds": round(seconds, 1)})
        print(f"{options.route}: seed {seed}, accuracy {100 * accuracy:.2f} %, {result}, {seconds:.0f} s", flush=True)
    accuracies = [run["accuracy"] for run in runs]
    spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
    print(f"{options.route}: {100 * statistics.mean(accuracies):.2f} ± {100 * spread:.2f} % over {len(runs)} seed(s)")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {
            "route": options.route,
            "split": "validation" if options.validate else "test",
            "delta": options.delta,
            "recipe": vars(recipe),
            "runs": runs,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        }
        options.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
