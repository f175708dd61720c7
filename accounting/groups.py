"""Dominating pairs of a group of rows under Poisson sampling: mixtures over how many of its rows are drawn.

A person has at most k rows. Each joins the batch independently with probability q, so that
J ~ Binomial(k, q) of them are drawn, and a set S of drawn rows moves the release by a vector v_S with
‖v_S‖ ≤ |S|, in units of one row's bound. With M = Σ_j P(J = j) N(j, σ²) the pairs are

* removing the person: M against N(0, σ²); adding: N(0, σ²) against M;
* replacing the person by another: M against its mirror image Σ_j P(J = j) N(−j, σ²).

Guarantee:
    The case of all rows aligned dominates. Fix what the other rows release and an event A, and let
    z = Φ⁻¹(N_0(A)). By Neyman and Pearson Φ(z − ‖v‖/σ) ≤ N_v(A) ≤ Φ(z + ‖v‖/σ), and both ends grow
    apart with ‖v‖. Hence Σ_S p_S N_{v_S}(A) lies between Σ_j b_j Φ(z − j/σ) and Σ_j b_j Φ(z + j/σ)
    with b_j = P(J = j): of all mixtures with this z, the largest P(A) − αN_0(A), N_0(A) − αP(A) and
    P(A) − αP′(A) (v_S and v′_S both bounded by |S|) are those of the aligned pairs, attained by one
    half-line for all j at once. Averaging over the other rows' draw only lowers H_α, which is jointly
    convex. With k rows of equal gradients of full norm the pair *is* the mechanism.

Source:
    Choquette-Choo, Ganesh, Steinke, Thakurta 2024, *Privacy amplification for matrix mechanisms*, §4, and
    Ganesh 2024, *Tight group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians
    mechanisms*, Theorem 3.1. The argument above is shorter and covers replacing too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtri_exp

from .errors import EngineRangeError, InvalidParameterError
from .pairs import BinMasses, normal_masses

__all__ = ["GroupPoissonPair", "ReplaceGroupPoissonPair", "binomial_log_weights", "log_likelihood_ratio"]

Array = NDArray[np.float64]

_ULP = float(np.finfo(float).eps)
_LOST = -690.0
"""Log-probability below which a number of drawn rows is counted as lost mass instead."""
_LOST_MASS = 1e-295
_BLOCK = 1 << 20
_TABLE = 8192
_LARGEST = 10_000
_BEYOND = 38.5
"""Standard deviations beyond which a normal tail lies below `_LOST_MASS`."""


@lru_cache(maxsize=256)
def binomial_log_weights(sample_rate: float, group_size: int) -> tuple[Array, Array]:
    """Returns log P(J = j) of J ~ Binomial(k, q), j = 0 … k, and bounds of their errors; shapes (k + 1,).

    Raises:
        InvalidParameterError: When the group is larger than the mixture is evaluated for.
    """
    k = group_size
    if k > _LARGEST:
        raise InvalidParameterError(
            f"group_size must be at most {_LARGEST} where batches are Poisson-sampled, got {k}: cap each person's "
            "rows, or sample people instead of rows"
        )
    coefficients, coefficient = np.empty(k + 1), 1
    for j in range(k + 1):
        coefficients[j] = math.log(coefficient)
        coefficient = coefficient * (k - j) // (j + 1)
    rows = np.arange(k + 1)
    drawn, left = rows * math.log(sample_rate), (k - rows) * math.log1p(-sample_rate)
    return coefficients + drawn + left, 4.0 * _ULP * (1.0 + coefficients - drawn - left)


class _Evaluated(NamedTuple):
    """ℓ, its derivative and a bound of its rounding error, at each x; shapes (points,)."""

    value: Array
    slope: Array
    error: Array


def log_likelihood_ratio(
    x: Array, noise_multiplier: float, weights: Array, errors: Array, first: int = 0
) -> _Evaluated:
    """Evaluates ℓ(x) = log Σ_j b_j e^{(2jx − j²)/2σ²}, convex and increasing in x.

    Args:
        x: Points, shape (points,).
        noise_multiplier: σ.
        weights: log b_j for j = first, first + 1, …
        errors: Bounds of their errors.
        first: The smallest j.
    """
    parts = [_evaluate(part, noise_multiplier, weights, errors, first) for part in _blocks(x, len(weights))]
    return _Evaluated(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _blocks(x: Array, width: int) -> Iterator[Array]:
    rows = max(1, _BLOCK // width)
    for start in range(0, max(len(x), 1), rows):
        yield x[start : start + rows]


def _evaluate(x: Array, sigma: float, weights: Array, errors: Array, first: int) -> _Evaluated:
    j = np.arange(first, first + len(weights), dtype=float)
    shift = (np.multiply.outer(x, j) - 0.5 * j * j) / sigma**2
    exponent = shift + weights
    top = exponent.max(axis=1)
    share = np.exp(exponent - top[:, None])
    total = share.sum(axis=1)
    share /= total[:, None]
    value = top + np.log(total)
    # Relative errors of the summands: of the weight, of the exponent, and of their sum.
    relative = errors + _ULP * (4.0 * np.abs(shift) + len(weights) + 8.0)
    error = (share * relative).sum(axis=1) + _ULP * (4.0 + 2.0 * np.abs(value) + np.abs(top))
    near = np.flatnonzero(np.abs(value) < 0.5)
    if len(near):
        # log1p of Σ b_j (e^… − 1), since Σ b_j = 1: losses close to 0 keep their digits.
        part, weight = shift[near], np.exp(weights)
        with np.errstate(over="ignore", invalid="ignore"):
            excess = np.where(part < 1.0, weight * np.expm1(np.minimum(part, 1.0)), np.exp(exponent[near]) - weight)
        value[near] = np.log1p(excess.sum(axis=1))
        # e^ℓ is at least e^−½.
        error[near] = 2.0 * (np.abs(excess) * relative[near]).sum(axis=1) + 2.0 * _ULP * np.abs(value[near])
    return _Evaluated(value, share @ j / sigma**2, error)


class _Mixture:
    """M = Σ_j b_j N(j, σ²) against N(0, σ²), with a table of its loss to start inversions from."""

    def __init__(self, noise_multiplier: float, sample_rate: float, group_size: int, *, mirrored: bool) -> None:
        weights, errors = binomial_log_weights(sample_rate, group_size)
        kept = np.flatnonzero(weights > _LOST)
        if not len(kept):
            raise EngineRangeError(f"no number of drawn rows of {group_size} has a probability above 1e-299")
        self.sigma, self.mirrored = noise_multiplier, mirrored
        self.first, last = int(kept[0]), int(kept[-1])
        self.log_weights, self.errors = weights[kept], errors[kept]
        self.weights = np.exp(self.log_weights)
        self.j = np.arange(self.first, last + 1, dtype=float)
        self.low = 0.0 if mirrored else -_BEYOND * self.sigma
        self.high = last + _BEYOND * self.sigma
        self.table = np.linspace(self.low, self.high, _TABLE)
        self.table_loss = np.maximum.accumulate(self.loss(self.table).value)

    def loss(self, x: Array) -> _Evaluated:
        """ℓ(x) of M against N(0, σ²), or against its mirror image, where it is odd."""
        up = log_likelihood_ratio(x, self.sigma, self.log_weights, self.errors, self.first)
        if not self.mirrored:
            return up
        down = log_likelihood_ratio(-x, self.sigma, self.log_weights, self.errors, self.first)
        value = up.value - down.value
        return _Evaluated(value, up.slope + down.slope, up.error + down.error + _ULP * np.abs(value))

    def position(self, loss: Array) -> tuple[Array, float]:
        """Returns x with ℓ(x) near each loss, ±∞ beyond all mass, and a bound of |ℓ(x) − loss|."""
        sign = np.where(loss < 0.0, -1.0, 1.0) if self.mirrored else np.ones(len(loss))
        target = sign * loss
        x = np.where(target <= self.table_loss[0], self.low if self.mirrored else -np.inf, np.inf)
        inside = np.flatnonzero((target > self.table_loss[0]) & (target < self.table_loss[-1]))
        if not len(inside):
            return sign * x, 0.0
        goal = target[inside]
        after = np.searchsorted(self.table_loss, goal, side="right")
        low, high = self.table[after - 1], self.table[after]
        rise = self.table_loss[after] - self.table_loss[after - 1]
        at = low + (high - low) * (goal - self.table_loss[after - 1]) / rise
        off = np.full(len(goal), np.inf)
        open_ = np.arange(len(goal))
        best = at.copy()
        # Newton's step where it stays inside the bracket, else the middle; the last pass only measures.
        for _ in range(60):
            found = self.loss(at[open_])
            miss = found.value - goal[open_]
            reached = np.abs(miss) + found.error
            better = reached < off[open_]
            off[open_[better]], best[open_[better]] = reached[better], at[open_[better]]
            above = miss > 0.0
            high[open_[above]], low[open_[~above]] = at[open_[above]], at[open_[~above]]
            with np.errstate(divide="ignore", invalid="ignore"):
                step = at[open_] - miss / found.slope
            bad = ~((step > low[open_]) & (step < high[open_]))
            at[open_] = np.where(bad, 0.5 * (low[open_] + high[open_]), step)
            again = (np.abs(miss) > 2.0 * found.error) & (high[open_] - low[open_] > 2.0 * _ULP * np.abs(high[open_]))
            open_ = open_[again]
            if not len(open_):
                break
        x[inside] = best
        return sign * x, float(off.max())

    def masses(self, x: Array, side: float = 1.0) -> tuple[Array, Array]:
        """Masses of Σ_j b_j N(side·j, σ²) between positions, and their errors."""
        mass, error = np.zeros(len(x) + 1), np.full(len(x) + 1, _LOST_MASS)
        for j, weight, relative in zip(self.j, self.weights, self.errors, strict=True):
            part, part_error = normal_masses((x - side * j) / self.sigma)
            mass += weight * part
            error += weight * (part_error + (relative + len(self.j) * _ULP) * part)
        return mass, error

    def quantile(self, log_tail: float) -> tuple[float, float]:
        """Returns x below and above which M weighs about e^log_tail."""

        def tail(x: float, side: float) -> float:
            return float(logsumexp(self.log_weights + log_ndtr(side * (x - self.j) / self.sigma))) - log_tail

        z = -float(ndtri_exp(log_tail)) * self.sigma
        ends = self.j[0] - z - self.sigma, self.j[-1] + z + self.sigma
        return float(brentq(tail, *ends, args=(1.0,))), float(brentq(tail, *ends, args=(-1.0,)))


@lru_cache(maxsize=64)
def _mixture(noise_multiplier: float, sample_rate: float, group_size: int, *, mirrored: bool = False) -> _Mixture:
    return _Mixture(noise_multiplier, sample_rate, group_size, mirrored=mirrored)


@dataclass(frozen=True)
class GroupPoissonPair:
    """A group of k rows removed from (or added to) one Poisson-subsampled Gaussian release.

    Removing: P = Σ_j P(J = j) N(j, σ²) against Q = N(0, σ²), J ~ Binomial(k, q); adding: the two swapped.
    Proved in the module's docstring.
    """

    noise_multiplier: float
    sample_rate: float
    group_size: int
    adding: bool

    @property
    def _of(self) -> _Mixture:
        return _mixture(self.noise_multiplier, self.sample_rate, self.group_size)

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns the losses at quantiles of P."""
        z = -float(ndtri_exp(log_tail)) * self.noise_multiplier
        ends = (-z, z) if self.adding else self._of.quantile(log_tail)
        low, high = self._of.loss(np.array(ends)).value.tolist()
        return (-high, -low) if self.adding else (low, high)

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses of the mixture and the Gaussian between the edges, swapped when adding."""
        x, off = self._of.position(-edges[::-1] if self.adding else edges)
        g, g_error = normal_masses(x / self.noise_multiplier)
        m, m_error = self._of.masses(x)
        if self.adding:
            return BinMasses(g[::-1], m[::-1], g_error[::-1] + _LOST_MASS, m_error[::-1], off)
        return BinMasses(m, g, m_error, g_error + _LOST_MASS, off)


@dataclass(frozen=True)
class ReplaceGroupPoissonPair:
    """A group of k rows replaced by k others in one Poisson-subsampled Gaussian release; symmetric.

    P = Σ_j P(J = j) N(j, σ²) against Q = Σ_j P(J = j) N(−j, σ²), J ~ Binomial(k, q). Proved in the module's
    docstring.
    """

    noise_multiplier: float
    sample_rate: float
    group_size: int

    @property
    def _of(self) -> _Mixture:
        return _mixture(self.noise_multiplier, self.sample_rate, self.group_size, mirrored=True)

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns the losses at quantiles of P."""
        low, high = self._of.loss(np.array(self._of.quantile(log_tail))).value.tolist()
        return low, high

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses of both mixtures between the edges."""
        x, off = self._of.position(edges)
        p, p_error = self._of.masses(x)
        q, q_error = self._of.masses(x, -1.0)
        return BinMasses(p, q, p_error, q_error, off)
