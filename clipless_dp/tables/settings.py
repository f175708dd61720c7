"""Settings for all tables, from the public number of rows and ε."""

from __future__ import annotations

from typing import Any

from clipless_dp.training import constant
from clipless_dp.training.plan import epochs_of

LARGEST_BATCH = 4096
"""Expected batch size, or the whole table. At ε = 1 the mean's noise is 4 % above that of full batches for 30 000 rows,
17 % for 200 000."""

STATISTICS_SHARE = 0.1
"""Of the budget, counted as the inverse squared noise multipliers that Gaussian mechanisms compose by."""

LABELS_SHARE = 0.01
"""For the count of positive labels: at ε = 1, noise of some 32 to 45 rows."""


def learning_rate(rows: int, epsilon: float) -> float:
    """``min(60, ε·N/1000)``, with momentum 0.9: the mean gradient's noise is in proportion to ``1/(εN)``."""
    return min(60.0, epsilon * rows / 1000.0)


def number_of_steps(rows: int, epsilon: float) -> int:
    """100, and where the learning rate is at its largest in proportion to ``ε·N``, up to 300."""
    return min(300, max(100, round(epsilon * rows / 600.0)))


def learning(size: int, epsilon: float, rate: float, largest: float) -> dict[str, Any]:
    """Arguments of ``fit`` that follow from the public number of rows and ε, and from the task.

    Args:
        size: ``N``.
        epsilon: of all together.
        rate: the task's factor of the learning rate.
        largest: its largest one.
    """
    batch_size = min(size, LARGEST_BATCH)
    return {
        "epochs": epochs_of(number_of_steps(size, epsilon), batch_size, size),
        "batch_size": batch_size,
        "lr": min(largest, rate * learning_rate(size, epsilon)),
        "momentum": 0.9,
        "scheduler": constant,
        "ema": 0.97,
    }
