"""Rényi differential privacy of the Poisson-subsampled Gaussian mechanism.

Throughout, t = α − 1 and K(t) = t · ε_α = log E_Q[(P/Q)^α] is the cumulant generating function
of the privacy loss under P: it adds up over composition and is convex in t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps

import numpy as np
from numpy.typing import NDArray

from .groups import binomial_log_weights, log_likelihood_ratio

__all__ = [
    "MAX_ORDER",
    "Cumulant",
    "group_cumulant",
    "laplace_cumulant",
    "largest_useful_order",
    "rdp_to_delta",
    "rdp_to_epsilon",
    "replace_one_cumulant",
    "subsampled_gaussian_cumulant",
]

Array = NDArray[np.float64]

#: Largest Rényi order that is looked at.
MAX_ORDER = 2.0e4

_MAX_NODES = 200_000
_MAX_GROUP_WORK = 1 << 23
_LARGEST_SHIFT = 1e4
_BLOCK_WORK = 2e4
_NODE_TAIL = 9.5
_EPS = float(np.finfo(float).eps)


def _in_blocks(
    quadrature: Callable[[float, float, Array], Array], work: float = _BLOCK_WORK
) -> Callable[[float, float, Array], Array]:
    """Splits the orders into blocks of similar size, unless together they take less than some work.

    The largest order of a block sets its range and step.
    """

    @wraps(quadrature)
    def cumulant(noise_multiplier: float, sample_rate: float, t: Array) -> Array:
        t = np.asarray(t, dtype=float)
        block = np.floor(0.5 * np.log2(t + 1.0)).astype(int)
        if t.size * t.max(initial=0.0) < work * min(noise_multiplier, noise_multiplier**2):
            return quadrature(noise_multiplier, sample_rate, t)
        result = np.empty_like(t)
        for number in np.unique(block):
            chosen = block == number
            result[chosen] = quadrature(noise_multiplier, sample_rate, t[chosen])
        return result

    return cumulant


@_in_blocks
def subsampled_gaussian_cumulant(noise_multiplier: float, sample_rate: float, t: Array) -> Array:
    """Returns an upper bound of K(t) = log E_{x~N(0,σ²)}[(1 − q + q e^{(2x−1)/2σ²})^{1+t}].

    Args:
        noise_multiplier: σ, positive.
        sample_rate: q in [0, 1].
        t: Rényi orders minus one, positive, shape (orders,).

    Returns:
        K at each order, shape (orders,); the Rényi divergence of order 1 + t is K / t.

    Guarantee:
        The divergence from the mixture to the Gaussian is the larger of the two directions, so
        it covers adding and removing a record (source, Theorem 5). The trapezoidal rule is applied
        to an integrand f that is analytic for |Im x| < πσ² and satisfies there
        |f(x + iy)| ≤ f(x) e^{y²/2σ²}; its relative error is therefore at most
        2 e^{y²/2σ²} / (e^{2πy/h} − 1) for every such y, and the step h is chosen to keep it below
        2 e^{−37}. The range leaves out tails of relative weight below 1e-18, and a margin
        covers the rounding of the logarithmic sum.

    Source:
        Mironov, Talwar, Zhang 2019, *Rényi differential privacy of the sampled Gaussian mechanism*,
        §3.3. Trefethen, Weideman 2014, *The exponentially convergent trapezoidal rule*, Theorem 5.1.
    """
    sigma, q = noise_multiplier, sample_rate
    t = np.asarray(t, dtype=float)
    if q == 0.0:
        return np.zeros_like(t)
    gaussian = t * (t + 1.0) / (2.0 * sigma**2)
    if q == 1.0:
        return gaussian
    # Below h = 2 the strip of analyticity binds, above it the growth e^{y²/2σ²}.
    h = sigma * math.sqrt(2.0 * math.pi**2 / 37.0)
    if h < 2.0:
        h = 2.0 * math.pi**2 * sigma**2 / (37.0 + math.pi**2 * sigma**2 / 2.0)
    alpha = t + 1.0
    low = -_NODE_TAIL * sigma
    high = float(alpha.max()) + _NODE_TAIL * sigma
    count = math.ceil((high - low) / h) + 1
    if count > _MAX_NODES:
        # So little noise that sampling hardly helps the exponent: q = 1 is a valid bound.
        return gaussian
    x = low + h * np.arange(count)
    loss = np.logaddexp(math.log1p(-q), math.log(q) + (2.0 * x - 1.0) / (2.0 * sigma**2))
    base = -0.5 * (x / sigma) ** 2
    exponent = np.multiply.outer(alpha, loss) + base
    top = exponent.max(axis=1)
    total = np.exp(exponent - top[:, None]).sum(axis=1)
    value = top + np.log(total) + math.log(h / (sigma * math.sqrt(2.0 * math.pi)))
    margin = 8.0 * _EPS * (2.0 + alpha * max(abs(float(loss[0])), abs(float(loss[-1]))))
    # For large arguments only the neighbourhood of the peak matters for the rounding.
    margin = np.minimum(margin, 8.0 * _EPS * (2.0 + np.abs(top) + alpha * alpha / sigma**2 + 200.0))
    result: Array = np.minimum(np.maximum(value + margin, 0.0), gaussian)
    return result


@_in_blocks
def replace_one_cumulant(noise_multiplier: float, sample_rate: float, t: Array) -> Array:
    """Returns an upper bound of K(t) for a Poisson-subsampled Gaussian step under replace-one.

    The pair is P, Q = (1 − q) N(0, σ²) + q N(±1, σ²) (see `ReplaceOnePoissonPair`).

    Args:
        noise_multiplier: σ, relative to the add-or-remove-one sensitivity.
        sample_rate: q in [0, 1].
        t: Rényi orders minus one, positive, shape (orders,).

    Guarantee:
        The trapezoidal rule as in `subsampled_gaussian_cumulant`: for |y| ≤ cσ², c < π, the integrand
        P^α Q^{1−α} is analytic and |f(x + iy)| ≤ f(x) e^{y²/2σ²} cos(y/2σ²)^{−t}, because
        |a + b e^{iθ}| ≥ (a + b) cos(θ/2) for a, b ≥ 0. The step keeps the relative error below 2 e^{−37}.
    """
    sigma, q = noise_multiplier, sample_rate
    t = np.asarray(t, dtype=float)
    if q == 0.0:
        return np.zeros_like(t)
    gaussian = 2.0 * t * (t + 1.0) / sigma**2
    if q == 1.0:
        return gaussian
    largest = float(t.max())
    c = min(0.5 * math.pi, math.sqrt(74.0 / (sigma**2 + 0.25 * largest)))
    h = 2.0 * math.pi * sigma**2 * c / (37.0 + 0.5 * sigma**2 * c**2 - largest * math.log(math.cos(0.5 * c)))
    low, high = -1.0 - _NODE_TAIL * sigma, 2.0 * (largest + 1.0) + _NODE_TAIL * sigma
    count = math.ceil((high - low) / h) + 1
    if count > _MAX_NODES // 4:
        return gaussian
    x = low + h * np.arange(count)
    variance = 2.0 * sigma**2
    with np.errstate(over="ignore"):
        log_p = np.logaddexp(math.log1p(-q), math.log(q) + (2.0 * x - 1.0) / variance)
        log_q = np.logaddexp(math.log1p(-q), math.log(q) + (-2.0 * x - 1.0) / variance)
    exponent = np.multiply.outer(t, log_p - log_q) + log_p - x * x / variance
    top = exponent.max(axis=1)
    total = np.exp(exponent - top[:, None]).sum(axis=1)
    value = top + np.log(total) + math.log(h / (sigma * math.sqrt(2.0 * math.pi)))
    margin = 16.0 * _EPS * (200.0 + np.abs(top) + 4.0 * (t + 1.0) ** 2 / sigma**2)
    result: Array = np.minimum(np.maximum(value + margin, 0.0), gaussian)
    return result


def group_cumulant(noise_multiplier: float, sample_rate: float, t: Array, *, group_size: int, replacing: bool) -> Array:
    """Returns an upper bound of K(t) of a group of k rows in a Poisson-subsampled Gaussian step.

    The pairs are those of `accounting.groups`; of adding and removing the group the larger K is returned.

    Args:
        noise_multiplier: σ, relative to one row's presence.
        sample_rate: q in (0, 1).
        t: Rényi orders minus one, positive, shape (orders,).
        group_size: k.
        replacing: Whether the group is replaced by another, instead of added or removed.

    Guarantee:
        With S(x) = Σ_j b_j e^{(2jx − j²)/2σ²} the integrands are N_0 S(x)^α, N_0 S(x)^{−t} and N_0 S(x)^α S(−x)^{−t}.
        As a polynomial in w = e^{x/σ²}, S has negative zeros only: Σ_j b_j w^j = (1 − q + qw)^k has, and the factors
        e^{−j²/2σ²} keep them so (source; proved in docs/accounting.md). So S has no zero for |Im x| < πσ²; there
        |S(x + iy)| ≤ S(x) and, its k factors being w + r with r > 0, |S(x + iy)| ≥ S(x) cos(y/2σ²)^k. The
        trapezoidal rule has therefore the error bounds of `subsampled_gaussian_cumulant` and, with kt for t, of
        `replace_one_cumulant`; its steps keep them below 2 e^{−37}.

    Source:
        Pólya and Schur 1914, *Über zwei Arten von Faktorenfolgen in der Theorie der algebraischen Gleichungen*.
    """
    t = np.asarray(t, dtype=float)
    reach = (2.0 if replacing else 1.0) * group_size
    gaussian: Array = 0.5 * (reach / noise_multiplier) ** 2 * t * (t + 1.0)
    binomial_log_weights(sample_rate, group_size)  # Refuses groups that are too large, whatever the noise.
    if reach / noise_multiplier > _LARGEST_SHIFT:
        return gaussian
    powers = [(1.0, 1.0, -1.0)] if replacing else [(1.0, 1.0, 0.0), (0.0, -1.0, 0.0)]
    directions = [
        _in_blocks(partial(_group_quadrature, group_size, power), 0.0)(noise_multiplier, sample_rate, t)
        for power in powers
    ]
    value: Array = np.minimum(np.max(directions, axis=0), gaussian)
    return value


def _group_quadrature(
    k: int, powers: tuple[float, float, float], noise_multiplier: float, sample_rate: float, t: Array
) -> Array:
    """log ∫ N_0(x) S(x)^{c + at} S(−x)^{bt} dx for powers (c, a, b), or infinity where that takes too long."""
    sigma, largest = noise_multiplier, float(t.max())
    constant, forward, backward = powers
    inverse = largest * (max(-forward, 0.0) + max(-backward, 0.0))
    if inverse == 0.0:
        h = sigma * math.sqrt(2.0 * math.pi**2 / 37.0)
        if h < 2.0:
            h = 2.0 * math.pi**2 * sigma**2 / (37.0 + math.pi**2 * sigma**2 / 2.0)
    else:
        c = min(0.5 * math.pi, math.sqrt(74.0 / (sigma**2 + 0.25 * k * inverse)))
        h = 2.0 * math.pi * sigma**2 * c / (37.0 + 0.5 * sigma**2 * c**2 - k * inverse * math.log(math.cos(0.5 * c)))
    # log S has a slope of at most k/σ², so the integrand falls like e^{−x²/2σ²} from `rising` on; S^{−t} times the
    # Gaussian does so below −t times the mean number of rows at x = 0.
    rising = (constant + max(forward, 0.0) * largest + max(-backward, 0.0) * largest) * k
    weights, errors = binomial_log_weights(sample_rate, k)
    falling = 0.0
    if forward < 0.0:
        falling = largest * float(log_likelihood_ratio(np.zeros(1), sigma, weights, errors).slope[0]) * sigma**2
    low, high = -falling - _NODE_TAIL * sigma, rising + _NODE_TAIL * sigma
    count = math.ceil((high - low) / h) + 1
    if count > _MAX_NODES // 4 or count * (k + 1) > _MAX_GROUP_WORK:
        return np.full_like(t, np.inf)
    x: Array = (low + h * np.arange(count)).astype(np.float64)
    exponent = np.multiply.outer(t, np.zeros(count)) - 0.5 * (x / sigma) ** 2
    error = np.zeros(len(t))
    for power, mirrored in ((constant + forward * t, 1.0), (backward * t, -1.0)):
        if power.any():
            loss = log_likelihood_ratio(mirrored * x, sigma, weights, errors)
            exponent += np.multiply.outer(power, loss.value)
            error += np.abs(power) * float(loss.error.max())
    top = exponent.max(axis=1)
    total = np.exp(exponent - top[:, None]).sum(axis=1)
    value: Array = top + np.log(total) + math.log(h / (sigma * math.sqrt(2.0 * math.pi)))
    # The peak lies where the parts of the exponent, of this size at most, cancel.
    size = 200.0 + np.abs(top) + (rising / sigma) ** 2
    result: Array = np.maximum(value + error + 16.0 * _EPS * size, 0.0)
    return result


def laplace_cumulant(scale: float, t: Array) -> Array:
    """Returns K(t) of a release with Laplace noise of scale b over its L1 sensitivity.

    K = log[ α/(2α − 1) e^{(α−1)/b} + (α − 1)/(2α − 1) e^{−α/b} ].

    Source:
        Mironov 2017, *Rényi differential privacy*, Proposition 6.
    """
    alpha = t + 1.0
    value: Array = np.logaddexp(
        np.log(alpha / (2.0 * alpha - 1.0)) + t / scale, np.log(t / (2.0 * alpha - 1.0)) - alpha / scale
    )
    return np.maximum(value + 4.0 * _EPS * (1.0 + t / scale), 0.0)


def largest_useful_order(noise_multiplier: float, sample_rate: float, group_size: int = 1) -> float:
    """Returns an order beyond which no optimum for δ ≥ 1e-100 lies.

    The optimum satisfies tK′(t) − K(t) = log(1/δ); at t = σ² log(1/q) the subsampled mechanism
    behaves as the Gaussian one, whose optimum lies at σ√(2 log(1/δ)) at most. Of a group, from t = 2σ² log(1/q)/k on
    all k rows together decide, with σ/k for σ.
    """
    sigma, q, k = noise_multiplier, sample_rate, group_size
    share = 1.0 if k == 1 else 2.0 / k
    reach = 22.0 * sigma / k + (share * sigma**2 * math.log(1.0 / q) if 0.0 < q < 1.0 else 0.0)
    return min(MAX_ORDER, 2.0 + 2.0 * reach)


Cumulant = Callable[[Array], Array]


def _orders(top: float, count: int = 96) -> Array:
    return np.geomspace(1e-4, max(top - 1.0, 1.0), count)


def rdp_to_epsilon(cumulant: Cumulant, delta: float, *, max_order: float = MAX_ORDER) -> tuple[float, float]:
    """Converts a Rényi curve into the smallest ε it certifies at δ.

    ε = ε_α + log((α − 1)/α) − (log δ + log α)/(α − 1), minimised over α: a grid from 1 + 1e-4 to
    `max_order`, extended when the optimum lies at its edge, then refined locally.

    Args:
        cumulant: t ↦ K(t), an upper bound at every t > 0; takes and returns shape (orders,).
        delta: In (0, 1).
        max_order: Largest order of the first grid.

    Returns:
        (ε, α); every order gives a valid bound, so the optimum need not be exact.

    Source:
        Canonne, Kamath, Steinke 2020, *The discrete Gaussian for differential privacy*,
        Proposition 12; Balle et al. 2020, *Hypothesis testing interpretations*, Theorem 21.
    """

    def objective(t: Array) -> Array:
        value: Array = (cumulant(t) - math.log(delta) - np.log1p(t)) / t + np.log(t / (t + 1.0))
        return value

    epsilon, t_best = _minimise(objective, max_order)
    return max(epsilon, 0.0), 1.0 + t_best


def rdp_to_delta(cumulant: Cumulant, epsilon: float, *, max_order: float = MAX_ORDER) -> tuple[float, float]:
    """Converts a Rényi curve into the smallest δ it certifies at ε.

    δ = exp(K(t) − tε) (1 − 1/α)^α / t with t = α − 1, minimised over α.

    Returns:
        (δ, α), δ at most 1.

    Source:
        As `rdp_to_epsilon`.
    """

    def objective(t: Array) -> Array:
        value: Array = cumulant(t) - t * epsilon + (t + 1.0) * np.log(t / (t + 1.0)) - np.log(t)
        return value

    log_delta, t_best = _minimise(objective, max_order)
    return min(math.exp(min(log_delta, 0.0)), 1.0), 1.0 + t_best


def _minimise(objective: Callable[[Array], Array], max_order: float) -> tuple[float, float]:
    grid = _orders(max_order)
    values = objective(grid)
    best = int(np.argmin(values))
    while best == len(grid) - 1 and grid[-1] < MAX_ORDER:
        extension = np.geomspace(grid[-1], min(4.0 * grid[-1], MAX_ORDER), 24)[1:]
        grid, values = np.append(grid, extension), np.append(values, objective(extension))
        best = int(np.argmin(values))
    while best == 0 and grid[0] > 1e-9:
        extension = np.geomspace(grid[0] / 100.0, grid[0], 24)[:-1]
        grid, values = np.append(extension, grid), np.append(objective(extension), values)
        best = int(np.argmin(values))
    t_best, value_best = float(grid[best]), float(values[best])
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    for _ in range(4):
        inner = np.linspace(low, high, 9)
        inner_values = objective(inner)
        i = int(np.argmin(inner_values))
        if float(inner_values[i]) < value_best:
            t_best, value_best = float(inner[i]), float(inner_values[i])
        low, high = float(inner[max(i - 1, 0)]), float(inner[min(i + 1, 8)])
    return value_best, t_best
