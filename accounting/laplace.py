"""Releases with Laplace noise alone: their joint (ε, δ) in closed form, close to the ε that holds with certainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from scipy.special import gammainc, gammaln

__all__ = ["laplace_delta", "laplace_epsilon"]

_MARGIN = 1e-9
"""Above the relative error of what is summed here, for as many releases as are taken."""
_TINY = 1e-300
"""Above what underflows of it."""
_MOST = 1 << 16


def laplace_epsilon(scales: Mapping[float, int], delta: float) -> tuple[float, float]:
    """Returns certified (lower, upper) bounds of the ε of Laplace releases at δ: equal where there is a closed form.

    Args:
        scales: {b, noise scale over L1 sensitivity: releases}.
        delta: In (0, 1).

    Guarantee:
        With P = Laplace(0, b), Q = Laplace(1, b), the loss of a release is at most a = 1/b, and falls short of it by
        D ∈ [0, 2a] with P(D ≤ d) = 1 − ½ e^{−d/2} for d < 2a: by min(E, 2a), E being 0 with probability ½ and
        exponential with mean 2 else, whatever b is. Let A = Σ a and g = A − ε. Then δ(ε) = E[(1 − e^{ΣD − g})₊].
        ΣD ≤ ΣE, and where g ≤ 2a for each a, both give the same: where they differ both are at least g. Hence

            δ(A − g) ≥ hₙ(g) = E[(1 − e^{ΣE − g})₊], with equality for g ≤ 2 min a.

        The Laplace transform of hₙ is ((1 + s)/(1 + 2s))ⁿ / (s(1 + s)). Expanding (1 + s)ⁿ⁻¹ in powers of 1 + 2s,

            hₙ(g) = Σᵢ C(n − 1, i) 2^{−(n−1)} P(1 + i, g/2),  i = 0 … n − 1,

        with P the regularised lower incomplete gamma function; h₁(g) = 1 − e^{−g/2}. Releases of a smaller a than g/2
        fall short by 0 at least: without them hₙ, of the fewer others, bounds δ from above.
    """
    largest = _largest(scales)
    count = sum(scales.values())
    least = 0.0
    if count <= _MOST and _at_least(count, largest) >= delta:
        _, far = _crossing(lambda g: _at_least(count, g) >= delta, 0.0, largest)
        least = max(0.0, _down(_down(largest) - far))
    most = _up(largest)
    for counted, reach in _counted(scales):
        end = min(reach, largest)
        if end == largest and _at_most(counted, end) <= delta:
            return 0.0, 0.0
        near, _ = _crossing(lambda g, n=counted: _at_most(n, g) > delta, 0.0, end)  # type: ignore[misc]
        most = min(most, _up(_up(largest) - near))
    return min(least, most), most


def laplace_delta(scales: Mapping[float, int], epsilon: float) -> tuple[float, float]:
    """Returns certified (lower, upper) bounds of the δ of Laplace releases at ε ≥ 0; see `laplace_epsilon`."""
    largest, count = _largest(scales), sum(scales.values())
    if epsilon >= _up(largest):
        return 0.0, 0.0
    short = _up(_up(largest) - epsilon)
    most = min([1.0, *(_at_most(counted, short) for counted, reach in _counted(scales) if short <= reach)])
    if count > _MOST:
        return 0.0, most
    return min(most, _at_least(count, max(0.0, _down(_down(largest) - epsilon)))), most


def _largest(scales: Mapping[float, int]) -> float:
    """A, the loss that no outcome exceeds."""
    return math.fsum(n / scale for scale, n in scales.items())


def _counted(scales: Mapping[float, int]) -> Iterator[tuple[int, float]]:
    """(n, 2 min a) of the releases with the least noise, more and more of them; the latter rather less than it is."""
    count = 0
    for scale, n in sorted(scales.items()):
        count += n
        if count > _MOST:
            return
        yield count, _down(_down(2.0 / scale))


def _crossing(reached: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Neighbours, the first of which has not reached it and the second has, as `low` and `high`."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low, high


def _at_least(count: int, short: float) -> float:
    return _exact(count, short) * (1.0 - _MARGIN)


def _at_most(count: int, short: float) -> float:
    return min(1.0, _exact(count, short) * (1.0 + _MARGIN) + _TINY)


def _exact(count: int, short: float) -> float:
    """h(g) of so many releases."""
    index = np.arange(count)
    weights = np.exp(gammaln(count) - gammaln(index + 1.0) - gammaln(count - index) - (count - 1) * math.log(2.0))
    return float(weights @ gammainc(index + 1.0, 0.5 * short))


def _up(value: float) -> float:
    return math.nextafter(value * (1.0 + 1e-14), math.inf)


def _down(value: float) -> float:
    return math.nextafter(value * (1.0 - 1e-14), -math.inf)
