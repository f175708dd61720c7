"""``fit(model, data, epsilon=…, delta=…)`` and nothing else, against settings tuned on held-out rows of the same data.

python benchmarks/defaults.py --data-sets digits
python benchmarks/defaults.py --data-sets digits mnist table regression cifar10 --data-dir DIR

Each cell is a data set, a route and an ε. Tuned settings are the best of a grid (Adam's and SGD's learning rates, one
number of epochs and one batch size that suit the data set) by the score on held-out training rows; both they and the
defaults are then trained with several seeds, and scored on test rows. Scores are shares of correct predictions in
percent, of regression 100·R². Rows and epochs are few, so that it takes a CPU an hour. Results go to
benchmarks/results/defaults.json and .md; cells that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_friedman1
from tabulate import tabulate
from torch import Tensor, nn

from clipless_dp import DPLipModel, constraints, evaluate, fit, gated, gradient_gated, layers, losses
from clipless_dp.architectures.small import image_classifier, linear_from_zero, two_hidden_layers
from clipless_dp.datasets import load_dataset
from clipless_dp.features import FrozenFeatures, MirroredScattering

ROUTES = ("spectral", "orthogonal", "gated", "gradient_gated")
EPSILONS = (1.0, 3.0, 8.0)
WITHIN, SHARE = 2.0, 0.9
"""Points that defaults may stay behind, in this share of the cells."""

GRID: tuple[dict[str, Any], ...] = tuple(
    [{"optimizer": "adam", "lr": lr} for lr in (0.01, 0.03, 0.1)]
    + [{"optimizer": "sgd", "momentum": 0.0, "lr": lr} for lr in (0.1, 0.3, 1.0)]
)

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Rows to train on, to tune on and to test on; the network, the loss, δ, and the length that tuned runs have."""

    train: Pair
    held_out: Pair
    test: Pair
    network: Callable[[tuple[int, ...], int], nn.Module]
    loss: losses.Loss
    delta: float
    outputs: int
    tuned: dict[str, float]
    input_norm: float | None = None


def _dense(shape: tuple[int, ...], outputs: int) -> nn.Module:
    size = math.prod(shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 64), layers.GroupSort(2), nn.Linear(64, outputs))


def _parts(inputs: Tensor, targets: Tensor, train: int, held_out: int) -> tuple[Pair, Pair]:
    stop = train + held_out
    return (inputs[:train], targets[:train]), (inputs[train:stop], targets[train:stop])


@cache
def problem(name: str, folder: Path | None) -> Problem:
    """A data set by name, with few rows."""
    cross_entropy = losses.TauCrossEntropy(8.0)
    if name == "digits":
        data = load_dataset(name)
        train, held = _parts(data.inputs, data.targets, 1150, 287)
        return Problem(train, held, data.test, _dense, cross_entropy, 1e-4, 10, {"epochs": 40, "batch_size": 512})
    if name in ("mnist", "cifar10"):
        data = load_dataset(name, folder)
        train, held = _parts(data.inputs, data.targets, 10_000, 2_000)
        test = data.test_inputs[:4000], data.test_targets[:4000]
        length = {"epochs": 10, "batch_size": 1024}
        if name == "mnist":
            return Problem(train, held, test, image_classifier, cross_entropy, 1e-5, 10, length)
        features = FrozenFeatures(MirroredScattering((32, 32), 3), batch_size=64)
        train, held, test = ((features.compute(some), labels) for some, labels in (train, held, test))
        return Problem(train, held, test, linear_from_zero, cross_entropy, 1e-5, 10, length, input_norm=1.01)
    length = {"epochs": 30, "batch_size": 1024}
    if name == "regression":
        rows, values = make_friedman1(6000, noise=1.0, random_state=0)
        inputs = torch.from_numpy(2.0 * rows - 1.0).float()
        targets = torch.from_numpy((values - 15.0) / 10.0).float()[:, None]
        return _table(inputs, targets, losses.Huber(1.0), 1, length)
    if folder is None:
        raise SystemExit(f"{name} needs --data-dir")
    # Scales are taken to be public here: defaults and tuned settings see the same columns.
    with np.load(folder / "tabular" / "magic.npz") as file:
        order = np.random.default_rng(0).permutation(len(file["y"]))[:6000]
        rows, labels = file["X"][order].astype(np.float32), file["y"][order].astype(np.int64).ravel()
    rows = np.clip((rows - rows.mean(0)) / rows.std(0), -3.0, 3.0) / 3.0
    return _table(torch.from_numpy(rows), torch.from_numpy(labels), cross_entropy, 2, length)


def _table(inputs: Tensor, targets: Tensor, loss: losses.Loss, outputs: int, length: dict[str, float]) -> Problem:
    train, held = _parts(inputs, targets, 4000, 1000)
    return Problem(train, held, (inputs[5000:], targets[5000:]), two_hidden_layers, loss, 1e-5, outputs, length)


def wrapped(route: str, given: Problem) -> DPLipModel:
    """The network by a route, as one who tunes nothing wraps it."""
    shape = tuple(given.train[0].shape[1:])
    net, constraint = given.network(shape, given.outputs), None
    if route == "gated":
        net = gated(net, cotangent_mode="normalize")
    elif route == "gradient_gated":
        net = gradient_gated(net, floor=0.3)
    else:
        constraint = constraints.Spectral() if route == "spectral" else constraints.Orthogonal()
    norm = math.sqrt(math.prod(shape)) if given.input_norm is None else given.input_norm
    return DPLipModel(net, input_shape=shape, input_norm=norm, loss=given.loss, constraint=constraint)


def score(model: DPLipModel, pair: Pair) -> float:
    """Percent of correct predictions, or 100·R²."""
    accuracy, _ = evaluate(model, pair)
    if accuracy is not None:
        return 100.0 * accuracy
    with torch.no_grad():
        errors = model(pair[0]) - pair[1]
    return 100.0 * (1.0 - float(errors.square().mean() / pair[1].var()))


def trained(name: str, folder: Path | None, route: str, epsilon: float, seed: int, settings: dict[str, Any]) -> Any:
    """Scores on held-out rows and on test rows, and the settings."""
    torch.set_num_threads(1)
    given = problem(name, folder)
    torch.manual_seed(seed)
    model = wrapped(route, given)
    with warnings.catch_warnings():
        # That of the noise of one step, which parts of the grid deserve.
        warnings.simplefilter("ignore", UserWarning)
        result = fit(model, given.train, epsilon=epsilon, delta=given.delta, progress=False, audit=False, **settings)
    learning = result.learning
    used = {key: getattr(learning, key) for key in ("epochs", "batch_size", "optimizer", "lr", "momentum")}
    return score(model, given.held_out), score(model, given.test), used


def cell(pool: Any, name: str, folder: Path | None, route: str, epsilon: float, seeds: Sequence[int]) -> dict[str, Any]:
    """Defaults and tuned settings of one data set, route and ε."""
    run = partial(trained, name, folder, route, epsilon)
    length = problem(name, folder).tuned
    tries = [pool.submit(run, 0, {**length, **settings}) for settings in GRID]
    defaults = [pool.submit(run, seed, {}) for seed in seeds]
    best = max(range(len(GRID)), key=lambda index: tries[index].result()[0])
    tuned = [tries[best].result() if seed == 0 else run(seed, {**length, **GRID[best]}) for seed in seeds]
    of_defaults, of_tuned = [one.result()[1] for one in defaults], [one[1] for one in tuned]
    return {
        "data set": name,
        "route": route,
        "epsilon": epsilon,
        "defaults": of_defaults,
        "tuned": of_tuned,
        "settings of defaults": defaults[0].result()[2],
        "tuned settings": {**length, **GRID[best]},
        "behind": fmean(of_tuned) - fmean(of_defaults),
    }


def markdown(cells: Sequence[dict[str, Any]]) -> str:
    """The table, and the share of cells in which defaults keep up."""
    rows = [
        (
            one["data set"],
            one["route"],
            f"{one['epsilon']:g}",
            f"{fmean(one['defaults']):.1f}",
            f"{fmean(one['tuned']):.1f}",
            f"{one['behind']:+.1f}",
        )
        for one in cells
    ]
    close = sum(one["behind"] <= WITHIN for one in cells)
    head = ["data", "route", "ε", "defaults", "tuned", "behind"]
    table = tabulate(rows, headers=head, tablefmt="github", disable_numparse=True)
    return (
        "# Defaults against tuned settings\n\n"
        "`python benchmarks/defaults.py`: percent of correct predictions on test rows (100·R² for regression), "
        f"mean of {len(cells[0]['defaults'])} seeds; tuned: the best of {len(GRID)} settings on held-out rows.\n\n"
        f"{table}\n\nWithin {WITHIN:g} points in {close} of {len(cells)} cells; asked for: {100 * SHARE:g} %.\n"
    )


def main() -> None:
    """Runs the cells that the file of results lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", nargs="+", default=["digits"])
    parser.add_argument("--routes", nargs="+", default=ROUTES, choices=ROUTES)
    parser.add_argument("--epsilons", nargs="+", type=float, default=EPSILONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "defaults.json")
    options = parser.parse_args()
    cells = json.loads(options.out.read_text()) if options.out.exists() else []
    known = {(one["data set"], one["route"], one["epsilon"]) for one in cells}
    with ProcessPoolExecutor(options.workers) as pool:
        for name in options.data_sets:
            for route in options.routes:
                for epsilon in options.epsilons:
                    if (name, route, epsilon) in known:
                        continue
                    cells.append(cell(pool, name, options.data_dir, route, epsilon, options.seeds))
                    options.out.write_text(json.dumps(cells, indent=1) + "\n")
                    options.out.with_suffix(".md").write_text(markdown(cells))
                    print(markdown(cells[-1:]).splitlines()[-3], flush=True)


if __name__ == "__main__":
    main()
