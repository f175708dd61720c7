"""The least that a smoothed Lipschitz function can fall to: exact, attained by a ramp.

``h`` with values in [0, 1] is L-Lipschitz; its smoothed mean is ``h̃(x) = E h(x + σZ)``. Of all such ``h`` with ``h̃(x)
= p``, the least of ``h̃(x + δ)`` is that of a ramp along ``δ``, 1 up to ``a`` and 0 from ``a + 1/L`` on. With ``Ψ(z) =
zΦ(z) + φ(z)``, whose derivative is ``Φ``, its mean is ``M(a) = Lσ(Ψ((a + 1/L)/σ) - Ψ(a/σ))``, and at distance ``r``
``M(a - r)``. docs/robustness.md has the proof. ``L = ∞`` is Cohen et al. 2019, *Certified adversarial robustness via
randomized smoothing*, theorem 1.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri

from clipless_dp.robustness.confidence import Array

_STEEPEST = 64.0
"""``Lσ`` above which a ramp counts as a step, which certifies no more: it gives away less than ``1e-4·σ``."""

_FAR = 40.0
"""Deviations beyond which the normal distribution has no mass in float64."""


def ramp_mean(start: float, lipschitz: float, sigma: float) -> float:
    """``M(a)``: mean under the noise of a ramp that falls from 1 at ``a`` to 0 at ``a + 1/L``.

    Args:
        start: ``a``.
        lipschitz: ``L``, above 0 and finite.
        sigma: ``σ``.
    """
    return lipschitz * sigma * (_psi((start + 1.0 / lipschitz) / sigma) - _psi(start / sigma))


def _psi(z: float) -> float:
    return z * 0.5 * math.erfc(-z / math.sqrt(2.0)) + math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def ramp_start(mean: float, lipschitz: float, sigma: float, *, upwards: bool = False) -> float:
    """The ``a`` with ``M(a) = p``, rounded down, or up.

    Args:
        mean: ``p``.
        lipschitz: ``L``, with ``Lσ`` at most 64.
        sigma: ``σ``.
        upwards: whether to round up.

    Returns:
        ``-∞`` or ``∞`` where ``p`` is 0 or 1 but for rounding.
    """
    # M errs by a few ulp of Ψ, which is at most 40 + 1/(Lσ) here, times Lσ.
    error = 2.0**-49 * (64.0 * lipschitz * sigma + 1.0)
    sign = 1.0 if upwards else -1.0
    left, right = -_FAR * sigma - 1.0 / lipschitz, _FAR * sigma
    wanted = mean + sign * error
    if not error < wanted < 1.0 - error:
        return math.inf if mean > 0.5 else -math.inf
    start = float(brentq(lambda start: ramp_mean(start, lipschitz, sigma) - wanted, left, right))
    step = (right - left) * 2.0**-50
    while sign * (ramp_mean(start, lipschitz, sigma) - mean) < error:
        start, step = start + sign * step, 2.0 * step
    return start


def radii(lower: Array, upper: Array | None, sigma: float, lipschitz: float = math.inf) -> Array:
    """How far the smoothed mean of one class stays above that of the others, rounded down.

    Args:
        lower: ``p_A``, lower bounds of the class's smoothed mean, ``(N,)``.
        upper: ``p_B``, upper bounds of those of all others; ``None``: ``1 - p_A``, as means that add up to at most 1.
        sigma: ``σ``.
        lipschitz: ``L`` of every class's function by itself; infinite: nothing is known.

    Returns:
        ``(N,)``; with ``a`` for ``M⁻¹``: ``a(p_A) + 1/(2L)`` in the first case, ``(a(p_A) - a(p_B))/2`` in the second.
        0 where ``p_A`` is not above ``p_B``.
    """
    if lipschitz == 0.0:
        ahead = lower > (0.5 if upper is None else upper)
        return np.where(ahead, math.inf, 0.0)
    # A larger constant certifies less, and the inverse of a smaller one is no number.
    lipschitz = max(lipschitz, 1e-150)
    if lipschitz * sigma > _STEEPEST:
        gap = ndtri(lower) if upper is None else 0.5 * (ndtri(lower) - ndtri(upper))
        size = np.abs(ndtri(lower)) if upper is None else np.abs(ndtri(lower)) + np.abs(ndtri(upper))
        return _rounded(sigma * gap, sigma * size)
    first = np.array([ramp_start(p, lipschitz, sigma) for p in lower.tolist()])
    if upper is None:
        middle = 0.5 / lipschitz
        return _rounded(first + middle, np.abs(first) + middle)
    second = np.array([ramp_start(p, lipschitz, sigma, upwards=True) for p in upper.tolist()])
    return _rounded(0.5 * (first - second), np.abs(first) + np.abs(second))


def _rounded(found: Array, size: Array) -> Array:
    """Radii less what sums of numbers of a size, normal quantiles among them, err by in float64."""
    with np.errstate(invalid="ignore"):
        lowered = found - 2.0**-46 * size
    # Where a bound is 0 or 1 but for rounding, nothing is claimed.
    return np.where(np.isfinite(lowered), lowered, 0.0).clip(min=0.0)
