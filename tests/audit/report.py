"""ε stated and ε measured, for correct code and for each mutant: ``python -m tests.audit.report``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial

from tabulate import tabulate

from clipless_dp import audit
from tests.audit.mutants import MUTANTS, Scenario

DELTA = 1e-5


def correct(**changes):
    scenario = Scenario(**changes)
    return nullcontext((scenario.optimizer, scenario.batches))


ROWS = {
    "correct": correct,
    "correct, σ = 1": partial(correct, noise_multiplier=1.0),
    "correct, σ = 0.3": partial(correct, noise_multiplier=0.3),
    "correct, σ = 1, q = 1, one step": partial(correct, noise_multiplier=1.0, sample_rate=1.0, steps=1),
    **MUTANTS,
}
"""Where nothing else is said: σ = 2 (0.3 for shuffled batches), q = 1/4, four steps."""

METHODS: tuple[tuple[str, int, int], ...] = (("f-dp", 10, 2000), ("clopper-pearson", 10, 2000), ("one-run", 1, 3000))


def main() -> None:
    """Runs every audit and prints a table."""
    rows = []
    for name, scenario in ROWS.items():
        found = []
        for method, runs, canaries in METHODS:
            with scenario(dataset_size=4000) as (optimizer, batches):
                found.append(
                    audit.privacy(optimizer, batches, delta=DELTA, method=method, runs=runs, canaries=canaries)
                )
        rows.append([name, f"{found[0].epsilon:.2f}", *(f"{one.lower_bound:.2f}" for one in found)])
        print(rows[-1], file=sys.stderr)
    methods = [f"{method} ({runs} × {canaries})" for method, runs, canaries in METHODS]
    print(tabulate(rows, headers=["code", "stated ε", *methods], disable_numparse=True, tablefmt="github"))


if __name__ == "__main__":
    main()
