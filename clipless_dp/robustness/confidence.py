"""Bounds of means from a number of independent draws, each at a stated confidence, rounded outwards."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import rel_entr
from scipy.stats import beta

from clipless_dp.arguments import share
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.rounding import gamma

Array = NDArray[np.float64]

_ROUNDING = 2.0**-43
"""Covers what a quantile of the beta distribution errs by in float64, absolutely."""


LEAST_ALPHA = 1e-50
"""From some 1e-110 down quantiles of the beta distribution err by more than is taken off, or cannot be had."""


def confidence_of(alpha: object) -> float:
    """What all bounds of a certificate may fail with together, as a float.

    Raises:
        ConfigurationError: it is no number in [1e-50, 1).
    """
    number = share("alpha", alpha, "(0, 1)")
    if number < LEAST_ALPHA:
        raise ConfigurationError(
            f"alpha must be at least {LEAST_ALPHA:g}, where bounds are known to hold, got {alpha!r}"
        )
    return number


def clopper_pearson_lower(counts: Any, draws: int, alpha: Any) -> Array:
    """``p`` with ``P(true share < p) ≤ α``: the quantile ``Beta⁻¹(α; k, n - k + 1)`` (Clopper & Pearson 1934).

    Args:
        counts: ``k``, any shape.
        draws: ``n``.
        alpha: of each bound by itself, broadcast to the counts.

    Raises:
        ConfigurationError: an alpha is below 1e-100.
    """
    counts = np.asarray(counts, dtype=np.float64)
    alpha = np.broadcast_to(np.asarray(alpha, dtype=np.float64), counts.shape)
    # Of a certificate's alpha each of 10^50 bounds may have a share.
    if not bool((alpha >= LEAST_ALPHA * 1e-50).all()):
        raise ConfigurationError(f"alpha of each bound must be at least {LEAST_ALPHA * 1e-50:g}")
    some = counts > 0
    found = beta.ppf(alpha, np.where(some, counts, 1.0), draws - np.where(some, counts, 1.0) + 1.0)
    lower: Array = np.where(some, found - _ROUNDING, 0.0).clip(0.0, 1.0)
    return lower


def clopper_pearson_upper(counts: Any, draws: int, alpha: Any) -> Array:
    """``p`` with ``P(true share > p) ≤ α``; arguments as :func:`clopper_pearson_lower`."""
    upper: Array = 1.0 - clopper_pearson_lower(draws - np.asarray(counts, dtype=np.float64), draws, alpha) + 2.0**-53
    return upper.clip(0.0, 1.0)


def bernstein_lower(sums: Any, squares: Any, draws: int, alpha: float) -> Array:
    """``m`` with ``P(true mean < m) ≤ α``, of variables within [0, 1], from their sums and sums of squares.

    ``mean - √(2V·ln(2/α)/n) - 7·ln(2/α)/(3(n - 1))`` with ``V`` the sample variance, unbiased (Maurer & Pontil 2009,
    *Empirical Bernstein bounds and sample-variance penalization*, theorem 4). It is one-sided: the 2 in the logarithm
    pays for the variance, which is estimated too.

    Args:
        sums: of ``n`` draws, any shape.
        squares: likewise.
        draws: ``n``, at least 2.
        alpha: of each bound by itself.
    """
    mean, deviation = _bernstein(sums, squares, draws, alpha)
    return (mean - deviation).clip(0.0, 1.0)


def bernstein_upper(sums: Any, squares: Any, draws: int, alpha: float) -> Array:
    """``m`` with ``P(true mean > m) ≤ α``; see :func:`bernstein_lower`."""
    mean, deviation = _bernstein(sums, squares, draws, alpha)
    return (mean + deviation).clip(0.0, 1.0)


def chernoff_lower(sums: Any, draws: int, alpha: float) -> Array:
    """``m`` with ``P(true mean < m) ≤ α``, of variables within [0, 1]: ``n·kl(mean, m) = ln(1/α)``.

    Hoeffding 1963, theorem 1, equation 2.1, holds for all such variables, and not for counts alone. Where the mean is 1
    it gives ``α^{1/n}``, as Clopper and Pearson's bound does, and so more than Bernstein's.

    Args:
        sums: of ``n`` draws, any shape.
        draws: ``n``.
        alpha: of each bound by itself.
    """
    means = np.asarray(sums, dtype=np.float64) / draws - gamma(draws)
    wanted = float(np.log(1.0 / alpha)) / draws * (1.0 + 2.0**-40) + 2.0**-46
    found = np.zeros_like(means)
    for where, mean in np.ndenumerate(means):

        def excess(low: float, mean: float = float(mean)) -> float:
            return float(rel_entr(mean, low) + rel_entr(1.0 - mean, 1.0 - low)) - wanted

        if mean > _ROUNDING and excess(_ROUNDING) > 0.0:
            found[where] = brentq(excess, _ROUNDING, float(mean), xtol=2.0**-47)
    return (found - _ROUNDING).clip(0.0, 1.0)


def concentrated_lower(sums: Any, draws: int, alpha: float, spread: float) -> Array:
    """``m`` with ``P(true mean < m) ≤ α``, of ``h(x + σZ)`` with an ``L``-Lipschitz ``h`` and normal ``Z``.

    ``mean - Lσ√(2·ln(1/α)/n)``. The mean of ``n`` draws is an ``Lσ/√n``-Lipschitz function of their standard normal
    numbers together, which concentrates as one number of that deviation does (Tsirelson, Ibragimov & Sudakov 1976;
    Boucheron, Lugosi & Massart 2013, *Concentration inequalities*, theorem 5.6). It knows the constant in place of the
    variance, and has no term in ``1/n``: where noise is small it is by far the largest of all.

    Args:
        sums: of ``n`` draws within [0, 1], any shape.
        draws: ``n``.
        alpha: of each bound by itself.
        spread: ``Lσ``.
    """
    mean = np.asarray(sums, dtype=np.float64) / draws
    width = spread * float(np.sqrt(2.0 * np.log(1.0 / alpha) / draws)) * (1.0 + 2.0**-40)
    return (mean - width - gamma(draws)).clip(0.0, 1.0)


def bounded_lower(sums: Any, squares: Any, draws: int, alpha: float, spread: float) -> Array:
    """The largest of Bernstein's, Chernoff's and the concentrated bound, each at ``α/3``; see the three of them."""
    third = split(alpha, 3)
    found = [bernstein_lower(sums, squares, draws, third), chernoff_lower(sums, draws, third)]
    lower: Array = np.maximum.reduce([*found, concentrated_lower(sums, draws, third, spread)])
    return lower


def bounded_upper(sums: Any, squares: Any, draws: int, alpha: float, spread: float) -> Array:
    """``m`` with ``P(true mean > m) ≤ α``; see :func:`bounded_lower`."""
    sums = np.asarray(sums, dtype=np.float64)
    third = split(alpha, 3)
    others = np.maximum(
        chernoff_lower(draws - sums, draws, third), concentrated_lower(draws - sums, draws, third, spread)
    )
    return np.minimum(bernstein_upper(sums, squares, draws, third), 1.0 - others + 2.0**-53).clip(0.0, 1.0)


def _bernstein(sums: Any, squares: Any, draws: int, alpha: float) -> tuple[Array, Array]:
    mean = np.asarray(sums, dtype=np.float64) / draws
    # Sums of n numbers within [0, 1] err by γn at most, in whatever order; the variance is a difference of two.
    error = gamma(draws)
    variance = (np.asarray(squares, dtype=np.float64) / draws - mean**2).clip(min=0.0) + 4.0 * error
    log = float(np.log(2.0 / alpha))
    width = np.sqrt(2.0 * variance * draws / (draws - 1.0) * log / draws) + 7.0 * log / (3.0 * (draws - 1.0))
    return mean, width + error


def split(alpha: float, bounds: Any) -> Any:
    """What each of several bounds may fail with, so that all hold together at ``1 - α`` (Boole's inequality)."""
    return alpha / bounds


def buckets(counts: Array) -> list[list[int]]:
    """Classes in groups, by what a *selection* sample counted: the first by itself, the second, the others together.

    The others are merged by falling count as long as a group counts no more than the second class, so that none of them
    makes the largest share that is to be bounded any larger, and few bounds share ``α``.

    Args:
        counts: ``(C,)``, of draws that the bounds are not computed from.

    Returns:
        Two groups or more of at least one class each, and together all classes.
    """
    first, second, *others = np.argsort(-counts, kind="stable").tolist()
    groups, room = [[first], [second]], -1.0
    for one in others:
        if counts[one] > room:
            groups.append([])
            room = float(counts[second])
        groups[-1].append(one)
        room -= float(counts[one])
    return groups
