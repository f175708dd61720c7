"""The Gaussian mechanism without sampling: exact closed forms."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr

__all__ = ["gaussian_delta", "gaussian_epsilon"]

_RELATIVE_MARGIN = 1e-12


def gaussian_delta(mu: float, epsilon: float, *, lower: bool = False) -> float:
    """Returns the exact δ(ε) of the Gaussian mechanism, rounded up (down if `lower`).

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), with μ = sensitivity / noise standard deviation.

    Guarantee:
        The value is tight; a relative margin of 1e-12 plus the rounding of the two
        logarithms is added, so that it is an upper bound in floating point too.

    Source:
        Balle and Wang 2018, *Improving the Gaussian mechanism*, Theorem 8.
    """
    return _delta(mu, epsilon, sign=-1.0 if lower else 1.0)


def _delta(mu: float, epsilon: float, sign: float) -> float:
    if mu == 0.0 or epsilon == math.inf:
        return 0.0
    if not math.isfinite(mu):
        return 1.0
    a = mu / 2.0 - epsilon / mu
    b = -mu / 2.0 - epsilon / mu
    log_p = float(log_ndtr(a))
    log_ratio = epsilon + float(log_ndtr(b)) - log_p
    # log_ndtr is accurate to a few units in the last place of its own magnitude.
    slack = 8.0 * np.finfo(float).eps * (1.0 + epsilon + abs(log_p) + a * a + b * b)
    ratio = min(log_ratio - sign * slack, 0.0)
    value = math.exp(min(log_p + sign * slack, 0.0)) * -math.expm1(ratio)
    return min(max(value * (1.0 + sign * _RELATIVE_MARGIN), 0.0), 1.0)


def gaussian_epsilon(mu: float, delta: float, *, lower: bool = False) -> float:
    """Returns the exact ε(δ) of the Gaussian mechanism, by bisection, on the safe side.

    Args:
        mu: Sensitivity over noise standard deviation, at least 0.
        delta: In (0, 1).
        lower: Round down instead of up.

    Guarantee:
        The mechanism is (ε, δ)-differentially private for the returned ε (`lower=False`), and
        is not for any smaller ε by more than a relative 1e-11.

    Source:
        Balle and Wang 2018, *Improving the Gaussian mechanism*, Theorem 8.
    """
    sign = -1.0 if lower else 1.0
    if mu == 0.0 or _delta(mu, 0.0, sign) <= delta:
        return 0.0
    if not math.isfinite(mu):
        return math.inf
    # P(L > hi) ≤ δ for the Gaussian privacy loss L ~ N(μ²/2, μ²).
    low, high = 0.0, mu * mu / 2.0 + mu * math.sqrt(2.0 * math.log(1.0 / delta))
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if _delta(mu, middle, sign) <= delta:
            high = middle
        else:
            low = middle
        if high - low <= 1e-13 * high:
            break
    return low if lower else high
