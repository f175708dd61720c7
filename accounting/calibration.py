"""Noise and steps for a privacy target, on its safe side."""

from __future__ import annotations

import math
from collections.abc import Callable

from . import _validation as check
from .accountants import create_accountant
from .errors import UnreachableTargetError

__all__ = ["calibrate_noise_multiplier"]

_MAX_NOISE = 1e9
_RELATIVE = 2e-4


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
) -> float:
    """Returns the smallest σ, to 0.02 %, whose ε does not exceed the target.

    Args:
        target_epsilon: Positive, finite.
        delta: In (0, 1).
        sample_rate: q in [0, 1].
        steps: Whole number of steps, at least 1.
        accountant: Name of the engine, as in `create_accountant`.

    Raises:
        UnreachableTargetError: When even very large noise misses the target.

    Guarantee:
        The accountant, asked about the returned σ, answers at most `target_epsilon`.
    """
    target = check.target_epsilon(target_epsilon)
    delta = check.delta(delta)
    q = check.sample_rate(sample_rate)
    n = check.count(steps, minimum=1)

    def epsilon(sigma: float) -> float:
        probe = create_accountant(accountant)
        probe.step(noise_multiplier=sigma, sample_rate=q, steps=n)
        return float(probe.get_epsilon(delta))

    return smallest_sufficient(epsilon, target)


def smallest_sufficient(epsilon: Callable[[float], float], target: float) -> float:
    """Returns the smallest σ, to a relative 2e-4, with epsilon(σ) ≤ target, for a decreasing epsilon."""
    low, high = 0.0, 1.0
    while epsilon(high) > target:
        low, high = high, 2.0 * high
        if high > _MAX_NOISE:
            raise UnreachableTargetError(
                f"epsilon={target!r} is not reached with noise_multiplier={high!r}: "
                "take fewer steps, a smaller sample_rate, or a larger delta"
            )
    while low == 0.0:
        middle = high / 2.0
        if middle < 1e-3 or epsilon(middle) > target:
            low = middle
        else:
            high = middle
    while high - low > _RELATIVE * high:
        middle = math.sqrt(low * high)
        if epsilon(middle) <= target:
            high = middle
        else:
            low = middle
    return high
