"""Learnt splines and fixed activations in 1-Lipschitz networks, on a function of one number whose slopes are ±1.

    python benchmarks/splines.py

Dense networks with two hidden layers, all weights semi-orthogonal (``Orthogonal()``), slopes within [-1, 1], learn a
zigzag of eight pieces on [-1, 1] from noisy values: without privacy, and at ε = 3. Splines have 10 units a layer, 16
segments each; the others 20 units, which have as many parameters or more, and ReLU 10 units too. For each activation
the learning rate of a grid with the least error on held-out points (one seed) is trained with several seeds; reported
is the root of the mean square error against the function itself, on an even grid. All numbers of the setting, the
splines' reach among them, are chosen without the data. Results go to benchmarks/results/splines.json and .md; cells
that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from clipless_dp import DPLipModel, fit, fit_without_privacy, layers, losses
from clipless_dp.constraints import Ball, Orthogonal, SplineVariation

KNOTS = (-1.0, -0.75, -0.55, -0.2, 0.0, 0.35, 0.5, 0.8, 1.0)
MODES: dict[str, dict[str, Any]] = {
    "not private": {"rows": 1000, "epochs": 40, "batch_size": 100, "rates": (0.01, 0.03)},
    "epsilon 3": {"rows": 20000, "epochs": 20, "batch_size": 1000, "rates": (0.01, 0.03)},
}
DELTA = 1e-5
STRENGTH = 3e-4


def spline(width: int, init: Any) -> nn.Module:
    """Knots are 1/16 apart; fresh entries are of size 1/√10."""
    return layers.LinearSpline(width, 16, 0.5, init=init)


ACTIVATIONS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "ReLU, 10 units": (10, lambda width: nn.ReLU()),
    "ReLU": (20, lambda width: nn.ReLU()),
    "absolute value": (20, lambda width: layers.AbsoluteValue()),
    "MaxMin": (20, lambda width: layers.MaxMin()),
    "Householder": (20, layers.Householder),
    "Householder, order 2": (20, lambda width: layers.Householder(width, order=2)),
    "spline from ReLU": (10, lambda width: spline(width, "relu")),
    "spline from abs": (10, lambda width: spline(width, "abs")),
    "spline from maxmin": (10, lambda width: spline(width, "maxmin")),
    "spline from abs, variation": (10, lambda width: spline(width, "abs")),
}


def zigzag(points: Tensor) -> Tensor:
    """The integral of slopes 1 and -1 in turn between the knots, of about mean 0."""
    values, slope = torch.zeros_like(points), 1.0
    for low, high in pairwise(KNOTS):
        values += slope * (points.clamp(low, high) - low)
        slope = -slope
    return values - 0.15


def made(name: str, seed: int) -> DPLipModel:
    """A fresh network; the seed is of its random weights."""
    width, activation = ACTIVATIONS[name]
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Linear(1, width), activation(width)), *(nn.Linear(width, width), activation(width)), nn.Linear(width, 1)
    )
    for part in net:
        if isinstance(part, nn.Linear):
            nn.init.orthogonal_(part.weight)
            # Kinks within the inputs' range.
            nn.init.uniform_(part.bias, -1.0 / math.sqrt(width), 1.0 / math.sqrt(width))
    constraint: dict[str, Any] = {
        **{f"{place}.weight": Orthogonal() for place in (0, 2, 4)}, "*.bias": Ball(1.0)
    }  # fmt: skip
    if "spline" in name:
        # So weak a step that nothing vanishes keeps the limit alone.
        constraint["*.slopes"] = SplineVariation(STRENGTH if "variation" in name else 1e-12)
    return DPLipModel(
        net, input_shape=(1,), input_norm=1.0, loss=losses.Huber(0.05), constraint=constraint,
    )  # fmt: skip


def drawn(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points and noisy values, ``(rows, 1)`` each."""
    generator = torch.Generator().manual_seed(1000 + seed)
    points = 2.0 * torch.rand(rows, 1, generator=generator) - 1.0
    return points, zigzag(points) + 0.02 * torch.randn(rows, 1, generator=generator)


@torch.no_grad()
def error(model: DPLipModel, points: Tensor, values: Tensor) -> float:
    """Root of the mean square error."""
    return float((model.eval()(points) - values).square().mean().sqrt())


def trained(name: str, mode: str, rate: float, seed: int) -> dict[str, Any]:
    """One run."""
    setting = MODES[mode]
    model, data = made(name, seed), drawn(setting["rows"], seed)
    parameters = sum(one.numel() for one in model.net.parameters())
    common = {"epochs": setting["epochs"], "batch_size": setting["batch_size"], "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mode == "not private":
            fit_without_privacy(model, data, lr=rate, rng_seed=seed, **common)
        else:
            fit(model, data, epsilon=3.0, delta=DELTA, lr=rate, optimizer="adam", audit=False, **common)
    grid = torch.linspace(-1.0, 1.0, 2001).unsqueeze(1)
    return {
        "error": error(model, grid, zigzag(grid)),
        "held out": error(model, *drawn(1000, seed + 100)),
        "parameters": parameters,
        "lipschitz": model.lipschitz_constant(),
        "pieces": layers.effective_regions(model.net).mean if "spline" in name else None,
    }


def markdown(cells: dict[str, dict[str, Any]]) -> str:
    """The table of what is there."""
    grid = torch.linspace(-1.0, 1.0, 2001)
    still = float(zigzag(grid).std())
    rows = []
    for name, (width, _) in ACTIVATIONS.items():
        row = [name, width, next((c[name]["parameters"] for c in cells.values() if name in c), "")]
        for mode in MODES:
            cell = cells.get(mode, {}).get(name)
            found = [] if cell is None else cell["errors"]
            row.append(f"{fmean(found):.4f} ± {stdev(found):.4f} ({cell['rate']:g})" if cell else "")
            row.append(f"{fmean(cell['pieces']):.1f}" if cell and cell["pieces"] else "")
        rows.append(row)
    headers = ["activation", "units", "parameters", *(h for mode in MODES for h in (mode, "pieces"))]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return (
        "# Splines and fixed activations\n\n`python benchmarks/splines.py`: root mean square error of 1-Lipschitz "
        "networks on a zigzag of slopes ±1, mean and deviation over seeds, in brackets the learning rate; linear "
        f"pieces of a spline on average. A constant has {still:.4f}.\n\n{table}\n"
    )


def main() -> None:
    """Runs the cells that the file of results lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "splines.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.activations:
        for mode in options.modes:
            if name in cells.setdefault(mode, {}):
                continue
            tries = {rate: trained(name, mode, rate, options.seeds[0]) for rate in MODES[mode]["rates"]}
            best = min(tries, key=lambda rate: tries[rate]["held out"])
            runs = [tries[best], *(trained(name, mode, best, seed) for seed in options.seeds[1:])]
            cells[mode][name] = {
                "rate": best,
                "errors": [one["error"] for one in runs],
                "pieces": [one["pieces"] for one in runs if one["pieces"] is not None],
                "lipschitz": max(one["lipschitz"] for one in runs),
                "parameters": runs[0]["parameters"],
            }
            options.out.write_text(json.dumps(cells, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(markdown(cells))
            print(mode, name, cells[mode][name], flush=True)


if __name__ == "__main__":
    main()
