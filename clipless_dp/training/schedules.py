"""How the learning rate and the noise change from step to step, by the number of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from clipless_dp.arguments import positive, whole

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
NoiseSchedule = Callable[[int, int], float]


def linear_decay(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Learning rate that rises over the first twentieth of the steps and falls linearly to zero."""
    rise = max(1, steps // 20)
    return LambdaLR(optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise), 1.0))


def constant(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Learning rate that stays as it is."""
    return LambdaLR(optimizer, lambda step: 1.0)


def noise_stages(first: float, last: float, count: int = 10) -> NoiseSchedule:
    """Factors of the noise that go from one value to another in equal stages, each the same multiple of the one before.

    ``fit(noise_schedule=noise_stages(1.5, 0.7))`` learns roughly first and finely at the end, at the same ε in all.

    Args:
        first: positive factor of the first stage.
        last: positive factor of the last stage.
        count: stages, at least 2; few keep the accounting fast.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    first = positive("the first factor of noise_stages", first)
    last = positive("the last factor of noise_stages", last)
    count = whole("the count of noise_stages", count, 2)

    def factor(step: int, steps: int) -> float:
        stages = min(count, steps)
        return first * math.pow(last / first, step * stages // steps / max(1, stages - 1))

    return factor


def noise_factors(schedule: NoiseSchedule | None, steps: int) -> list[float] | None:
    """The factor of each step's noise, or ``None`` where all are alike.

    Raises:
        ConfigurationError: one is not finite and positive.
    """
    if schedule is None:
        return None
    return [positive(f"what noise_schedule returns at step {step}", schedule(step, steps)) for step in range(steps)]
