"""Dominating pairs (P, Q) of single releases, as masses between privacy-loss edges.

Every pair answers the same three questions, from which the discretised privacy loss is built:
where its loss ℓ = log dP/dQ lies, how far its tails reach, and what P and Q weigh between edges.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri_exp

__all__ = ["BinMasses", "DominatingPair", "GaussianPair", "PoissonGaussianPair"]

Array = NDArray[np.float64]

_ULP = float(np.finfo(float).eps)


@dataclass(frozen=True)
class BinMasses:
    """Masses of P and Q on (−∞, e₀], (e₀, e₁], …, (e_J, ∞) for edges e₀ < … < e_J of the privacy loss.

    Attributes:
        p: P-mass of each bin, shape (J + 2,).
        q: Q-mass of each bin, shape (J + 2,).
        p_error: Bound of the rounding error of `p`.
        q_error: Bound of the rounding error of `q`.
    """

    p: Array
    q: Array
    p_error: Array
    q_error: Array


class DominatingPair(Hashable, Protocol):
    """A pair of distributions whose hockey-stick divergences bound those of a mechanism."""

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns losses (low, high) outside which P weighs at most e^log_tail on each side."""
        ...

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses of P and Q between edges of the privacy loss."""
        ...


def _normal_masses(z: Array) -> tuple[Array, Array]:
    """Masses of N(0, 1) on (−∞, z₀], …, (z_J, ∞) and their rounding error bounds; shape (J + 2,)."""
    below, above = ndtr(z), ndtr(-z)
    left = np.concatenate(([0.0], below))
    right = np.concatenate((below, [1.0]))
    left_sf = np.concatenate(([1.0], above))
    right_sf = np.concatenate((above, [0.0]))
    upper_half = np.concatenate(([False], z > 0.0))
    mass = np.where(upper_half, left_sf - right_sf, right - left)
    size = np.where(upper_half, left_sf, right)
    # Φ(z) is computed with a relative error of a few ulp, growing as z² in the tail; z itself is rounded.
    square = np.concatenate(([0.0], np.minimum(z * z, 1500.0)))
    square = np.maximum(square, np.concatenate((square[1:], [0.0])))
    return np.maximum(mass, 0.0), (4.0 + square) * _ULP * size


@dataclass(frozen=True)
class GaussianPair:
    """P = N(μ, 1) against Q = N(0, 1): the Gaussian mechanism without sampling; symmetric."""

    mu: float

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns μ²/2 ∓ zμ with Φ(−z) = e^log_tail."""
        z = -float(ndtri_exp(log_tail))
        return self.mu**2 / 2.0 - z * self.mu, self.mu**2 / 2.0 + z * self.mu

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses of N(μ²/2, μ²) and N(−μ²/2, μ²) between the edges."""
        p, p_error = _normal_masses(edges / self.mu - self.mu / 2.0)
        q, q_error = _normal_masses(edges / self.mu + self.mu / 2.0)
        return BinMasses(p, q, p_error, q_error)


@dataclass(frozen=True)
class PoissonGaussianPair:
    """One Poisson-subsampled Gaussian release under add-or-remove-one.

    Removing: P = (1 − q) N(0, σ²) + q N(1, σ²) against Q = N(0, σ²); adding: the two swapped.

    Source:
        Zhu, Dong, Wang 2022, *Optimal accounting of differential privacy via characteristic
        function*, Theorem 11.
    """

    noise_multiplier: float
    sample_rate: float
    adding: bool

    def _loss(self, x: float) -> float:
        """log of the mixture's density over that of N(0, σ²), at x."""
        z = (2.0 * x - 1.0) / (2.0 * self.noise_multiplier**2)
        return float(np.logaddexp(math.log1p(-self.sample_rate), math.log(self.sample_rate) + z))

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns the losses at the quantiles of P, with the finite end log(1 − q) kept as it is."""
        z = -float(ndtri_exp(log_tail)) * self.noise_multiplier
        end = math.log1p(-self.sample_rate)
        if self.adding:
            return -self._loss(z), -end
        return end, self._loss(1.0 + z)

    def _position(self, loss: Array) -> Array:
        """The x at which log(1 − q + q e^{(2x−1)/2σ²}) equals the loss; −∞ where it never does."""
        q, sigma = self.sample_rate, self.noise_multiplier
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            near = np.log1p(np.expm1(np.minimum(loss, 1.0)) / q)
            far = loss - math.log(q) + np.log1p(-(1.0 - q) * np.exp(-np.maximum(loss, 0.5)))
        near = np.where(np.isnan(near), -np.inf, near)
        z: Array = np.where(loss > 0.7, far, near)
        return 0.5 + sigma**2 * z

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses of the mixture and the Gaussian between the edges, swapped when adding."""
        q, sigma = self.sample_rate, self.noise_multiplier
        x = self._position(-edges[::-1] if self.adding else edges)
        g, g_error = _normal_masses(x / sigma)
        h, h_error = _normal_masses((x - 1.0) / sigma)
        m, m_error = (1.0 - q) * g + q * h, (1.0 - q) * g_error + q * h_error
        if self.adding:
            return BinMasses(g[::-1], m[::-1], g_error[::-1], m_error[::-1])
        return BinMasses(m, g, m_error, g_error)
