"""Base optimizers behind gradient gates: SGD, Adam, Adam that is corrected for the noise, and
sharpness-aware steps, each tuned alike.

python benchmarks/optimizers.py --data-dir DIR

Digits, 10 000 rows of MNIST and a table, as in benchmarks/defaults.py, by small dense networks behind gradient gates.
Of each optimizer the best learning rate of a grid by the score on held-out training rows (one seed) is trained with
several seeds and scored on test rows. Results go to benchmarks/results/optimizers.json and .md; cells that are there
are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from defaults import problem, score, wrapped
from tabulate import tabulate
from torch import nn

from clipless_dp import fit
from clipless_dp.architectures.small import two_hidden_layers
from clipless_dp.optim import AdamBC, SharpnessAwareAdam

DATA_SETS = ("digits", "mnist", "table")
EPSILONS = (1.0, 3.0, 8.0)
SGD_RATES, ADAM_RATES = (0.1, 0.3, 1.0, 3.0), (0.003, 0.01, 0.03, 0.1)


def corrected(parameters: Any, lr: float, floor: float) -> AdamBC:
    """Adam corrected for the noise, with the moments that ``fit`` gives Adam."""
    return AdamBC(parameters, lr=lr, floor=floor)


def sharpness_aware(parameters: Any, lr: float, radius: float) -> SharpnessAwareAdam:
    """Adam at weights that the last noisy gradient shifts."""
    return SharpnessAwareAdam(parameters, lr=lr, radius=radius)


RULES: dict[str, tuple[tuple[float, ...], Any]] = {
    "SGD": (SGD_RATES, lambda lr: {"optimizer": "sgd", "momentum": 0.0, "lr": lr}),
    "SGD, momentum .9": (
        tuple(lr / 10 for lr in SGD_RATES),
        lambda lr: {"optimizer": "sgd", "momentum": 0.9, "lr": lr},
    ),
    "Adam": (ADAM_RATES, lambda lr: {"optimizer": "adam", "lr": lr}),
    "AdamBC, floor .3": (ADAM_RATES, lambda lr: {"optimizer": partial(corrected, lr=lr, floor=0.3)}),
    "AdamBC, floor 1": (ADAM_RATES, lambda lr: {"optimizer": partial(corrected, lr=lr, floor=1.0)}),
    "sharpness .03": (ADAM_RATES, lambda lr: {"optimizer": partial(sharpness_aware, lr=lr, radius=0.03)}),
    "sharpness .3": (ADAM_RATES, lambda lr: {"optimizer": partial(sharpness_aware, lr=lr, radius=0.3)}),
}


def _flat(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), two_hidden_layers((math.prod(shape),), outputs))


def trained(name: str, folder: Path, epsilon: float, rule: str, lr: float, seed: int) -> tuple[float, float]:
    """Scores on held-out rows and on test rows."""
    torch.set_num_threads(1)
    given = problem(name, folder)
    if name == "mnist":
        given = replace(given, network=_flat)
    torch.manual_seed(seed)
    model = wrapped("gradient_gated", given)
    settings = {**given.tuned, **RULES[rule][1](lr)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit(model, given.train, epsilon=epsilon, delta=given.delta, progress=False, audit=False, **settings)
    return score(model, given.held_out), score(model, given.test)


def markdown(cells: list[dict[str, Any]]) -> str:
    """The table of the cells that are there."""
    rows = [
        (
            one["data set"],
            f"{one['epsilon']:g}",
            *(
                f"{fmean(one[rule]['test']):.1f} ± {stdev(one[rule]['test']):.1f} ({one[rule]['lr']:g})"
                for rule in RULES
            ),
        )
        for one in cells
    ]
    table = tabulate(rows, headers=["data", "ε", *RULES], tablefmt="github", disable_numparse=True)
    return (
        "# Base optimizers\n\n`python benchmarks/optimizers.py`: percent of correct predictions on test rows, mean and "
        f"deviation of {len(cells[0]['SGD']['test'])} seeds, in brackets the learning rate that was best on held-out "
        f"rows.\n\n{table}\n"
    )


def main() -> None:
    """Runs the cells that the file of results lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", nargs="+", default=DATA_SETS, choices=DATA_SETS)
    parser.add_argument("--epsilons", nargs="+", type=float, default=EPSILONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "optimizers.json")
    options = parser.parse_args()
    cells = json.loads(options.out.read_text()) if options.out.exists() else []
    with ProcessPoolExecutor(options.workers) as pool:
        for name in options.data_sets:
            for epsilon in options.epsilons:
                cell = next((one for one in cells if (one["data set"], one["epsilon"]) == (name, epsilon)), None)
                if cell is None:
                    cells.append(cell := {"data set": name, "epsilon": epsilon})
                rules = {rule: rates for rule, (rates, _) in RULES.items() if rule not in cell}
                if not rules:
                    continue
                run = partial(pool.submit, trained, name, options.data_dir, epsilon)
                tries = {rule: {lr: run(rule, lr, 0) for lr in rates} for rule, rates in rules.items()}
                best = {rule: max(found, key=lambda lr: found[lr].result()[0]) for rule, found in tries.items()}
                of_seeds = {rule: [run(rule, lr, seed) for seed in options.seeds] for rule, lr in best.items()}
                for rule, found in of_seeds.items():
                    cell[rule] = {"lr": best[rule], "test": [one.result()[1] for one in found]}
                options.out.write_text(json.dumps(cells, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(
                    markdown([one for one in cells if one.keys() >= RULES.keys()])
                )
                print(markdown([cell]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
