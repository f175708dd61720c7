"""Numerical composition of privacy losses: certified upper and lower (ε, δ)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .errors import EngineRangeError
from .pairs import DominatingPair, PoissonGaussianPair
from .privacy_loss import Composition, DiscreteLoss, Side, discretise, loss_edges

__all__ = ["compose_delta", "compose_epsilon"]

Array = NDArray[np.float64]
Parts = Sequence[tuple[DominatingPair, int]]

_TOLERANCE = 1e-4
_MAX_SIZE = 1 << 22
_ULP = float(np.finfo(float).eps)


@lru_cache(maxsize=1024)
def _discrete(
    pair: DominatingPair, width: float, t: float, log_tail: float, tolerance: float, side: Side
) -> DiscreteLoss:
    low, high = pair.reach(log_tail)
    index = loss_edges(low, high, width, t, tolerance)
    if len(index) < 2:
        index = np.array([index[0], index[0] + 1])
    return discretise(pair, index, width, side)


def _build(
    parts: Parts, width: float, t: float, log_tail: float, tolerance: float, side: Side
) -> Composition:
    # A power of two lets queries at nearby tilts share their discretisation.
    coarse_t = 2.0 ** math.ceil(math.log2(max(t, 1e-6)))
    return Composition(
        [(_discrete(p, width, coarse_t, log_tail, tolerance, side), n) for p, n in parts], side
    )


def _width(steps: int, epsilon: float, t: float, tolerance: float) -> float:
    """Grid width whose spread adds about tolerance·ε: n(t+1)h²/12 = tolerance·ε; a power of two."""
    wanted = math.sqrt(12.0 * tolerance * max(epsilon, 1e-12) / (steps * (t + 1.0)))
    return 2.0 ** math.floor(math.log2(min(wanted, 0.25 / (t + 1e-300), 1.0)))


def _prepare(
    parts: Parts, side: Side, epsilon: float, t: float, log_delta: float, tolerance: float
) -> tuple[Composition, int]:
    steps = sum(n for _, n in parts)
    log_tail = float(math.floor(log_delta - math.log(steps) - 12.0))
    width = _width(steps, epsilon, t, tolerance)
    while True:
        composition = _build(parts, width, t, log_tail, tolerance, side)
        if composition.size(t, -23.0) <= _MAX_SIZE:
            return composition, steps
        width *= 2.0


def _rounding(composition: Composition, steps: int) -> float:
    """Bound of the error in ε from the rounding of the bin edges, a few ulp of each loss a step."""
    reach = max(float(np.abs(loss.index[[0, -1]]).max()) * loss.width for loss, _ in composition.parts)
    return 8.0 * _ULP * steps * (1.0 + reach) if steps else 0.0


def compose_epsilon(
    parts: Parts,
    delta: float,
    side: Side,
    *,
    guess: tuple[float, float],
    tolerance: float = _TOLERANCE,
) -> float:
    """Returns an ε of a composition that is certified from the given side.

    Args:
        parts: Pairs (dominating pair, number of steps).
        delta: In (0, 1).
        side: `"upper"` or `"lower"`.
        guess: Approximate (ε, tilt), from Rényi accounting.
        tolerance: Relative error that the grid is laid out for.

    Raises:
        EngineRangeError: When no tilt brackets δ.
    """
    epsilon, t = max(guess[0], 1e-12), guess[1]
    log_delta = math.log(delta)
    composition, steps = _prepare(parts, side, epsilon, t, log_delta, tolerance)
    t = _best_tilt(composition, t, lambda k, s: (k - log_delta - np.log1p(s)) / s + np.log(s / (s + 1.0)))
    for _ in range(40):
        profile = composition.tilted(t)
        answer = profile.epsilon(delta)
        if answer is not None:
            if side == "upper":
                if answer > profile.loss[0] or answer <= 0.0:
                    return max(answer, 0.0) + _rounding(composition, steps)
            elif answer < profile.loss[-2]:
                return max(answer - _rounding(composition, steps), 0.0)
            else:
                t *= 1.5
                continue
            t = t / 2.0 if t > 1e-8 else 0.0
            if t == 0.0 and profile.t == 0.0:
                return max(answer, 0.0) + _rounding(composition, steps)
        elif side == "upper":
            t = 1.5 * max(t, 1e-8)
        else:
            if profile.loss[0] <= 0.0 or profile.t == 0.0:
                return 0.0
            t = t / 2.0 if t > 1e-8 else 0.0
    raise EngineRangeError(f"numerical composition could not bracket delta={delta!r}")


def compose_delta(
    parts: Parts,
    epsilon: float,
    side: Side,
    *,
    guess: tuple[float, float],
    tolerance: float = _TOLERANCE,
) -> float:
    """Returns a δ of a composition that is certified from the given side.

    Args:
        parts: Pairs (dominating pair, number of steps).
        epsilon: At least 0.
        side: `"upper"` or `"lower"`.
        guess: Approximate (δ, tilt), from Rényi accounting.
        tolerance: Relative error that the grid is laid out for.
    """
    t = guess[1]
    log_delta = math.log(max(guess[0], 1e-300)) - 7.0
    composition, steps = _prepare(parts, side, max(epsilon, 1e-6), t, log_delta, tolerance)
    slack = _rounding(composition, steps)
    epsilon = max(epsilon - slack, 0.0) if side == "upper" else epsilon + slack
    t = _best_tilt(composition, t, lambda k, s: k - s * epsilon)
    for _ in range(60):
        profile = composition.tilted(t)
        if profile.loss[0] > epsilon:
            if t == 0.0:
                # Everything that matters lies above ε: the trivial bounds are all the window can say.
                return 1.0 if side == "upper" else profile.delta(float(profile.loss[0]))
            t = t / 2.0 if t > 1e-8 else 0.0
        elif profile.loss[-2] < epsilon:
            if t > 1e8:
                return composition.infinite if side == "upper" else 0.0
            t = 1.5 * max(t, 1e-8)
        else:
            return profile.delta(epsilon)
    raise EngineRangeError(f"numerical composition could not reach epsilon={epsilon!r}")


def _best_tilt(composition: Composition, t: float, objective: Callable[[Array, Array], Array]) -> float:
    grid = t * np.geomspace(0.4, 2.5, 11)
    return float(grid[int(np.argmin(objective(composition.cumulant(grid), grid)))])


def poisson_parts(phases: dict[tuple[float, float], int], adding: bool) -> list[tuple[DominatingPair, int]]:
    """Returns the dominating pairs of subsampled phases {(σ, q): steps} in one direction."""
    return [(PoissonGaussianPair(sigma, q, adding), n) for (sigma, q), n in phases.items()]
