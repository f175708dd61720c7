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

__all__ = [
    "BinMasses",
    "DominatingPair",
    "FixedSizeGaussianPair",
    "GaussianPair",
    "LaplacePair",
    "PoissonGaussianPair",
    "ReplaceOnePoissonPair",
]

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
        edge_error: By how much the losses between which the masses lie may differ from the edges, beyond a few ulp.
    """

    p: Array
    q: Array
    p_error: Array
    q_error: Array
    edge_error: float = 0.0


class DominatingPair(Hashable, Protocol):
    """A pair of distributions whose hockey-stick divergences bound those of a mechanism."""

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns losses (low, high) outside which P weighs at most e^log_tail on each side."""
        ...

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses of P and Q between edges of the privacy loss."""
        ...


def normal_masses(z: Array) -> tuple[Array, Array]:
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
        p, p_error = normal_masses(edges / self.mu - self.mu / 2.0)
        q, q_error = normal_masses(edges / self.mu + self.mu / 2.0)
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
        g, g_error = normal_masses(x / sigma)
        h, h_error = normal_masses((x - 1.0) / sigma)
        m, m_error = (1.0 - q) * g + q * h, (1.0 - q) * g_error + q * h_error
        if self.adding:
            return BinMasses(g[::-1], m[::-1], g_error[::-1], m_error[::-1])
        return BinMasses(m, g, m_error, g_error)


@dataclass(frozen=True)
class LaplacePair:
    """P = Laplace(0, b) against Q = Laplace(1, b): a release with Laplace noise; symmetric.

    Attributes:
        scale: b, noise scale over L1 sensitivity.
    """

    scale: float

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns the ends of the loss, ∓1/b, which it attains with positive probability."""
        return -1.0 / self.scale, 1.0 / self.scale

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses between the edges; the loss at x ∈ (0, 1) is (1 − 2x)/b.

        P(ℓ ≤ s) = ½ e^{(s − 1/b)/2} and Q(ℓ ≤ s) = 1 − ½ e^{−(s + 1/b)/2} for s inside (−1/b, 1/b).
        """
        end = 1.0 / self.scale
        # A grid edge that equals the end up to rounding has to count the atom there on one side only.
        outside, whole = edges < -end * (1.0 + 4.0 * _ULP), edges >= end * (1.0 - 4.0 * _ULP)
        inside = np.clip(edges, -end, end)
        p = np.where(outside, 0.0, np.where(whole, 1.0, 0.5 * np.exp(0.5 * (inside - end))))
        q = np.where(outside, 0.0, np.where(whole, 1.0, 1.0 - 0.5 * np.exp(-0.5 * (inside + end))))
        # Nothing is rounded where there is no mass: beyond the ends. An error there would count as a loss of +∞.
        none = np.concatenate((outside, [False])) | np.concatenate(([False], whole))
        sizes = np.where(none, 0.0, 4.0 * _ULP)
        return BinMasses(
            np.maximum(np.diff(p, prepend=0.0, append=1.0), 0.0),
            np.maximum(np.diff(q, prepend=0.0, append=1.0), 0.0),
            sizes,
            sizes,
        )


@dataclass(frozen=True)
class ReplaceOnePoissonPair:
    """One Poisson-subsampled Gaussian release under replace-one; symmetric.

    P = (1 − q) N(0, σ²) + q N(1, σ²) against Q = (1 − q) N(0, σ²) + q N(−1, σ²): the two records
    contribute opposite unit vectors.

    Guarantee:
        With contributions v, v′ of norm at most 1 and α ≥ 1, H_α(P‖Q) = sup over events A of
        q [N_v(A) − α N_v′(A) − c N_0(A)] with c = (1 − q)(α − 1)/q ≥ 0. At fixed N_v(A) = p the two
        subtracted terms are at least α Φ(Φ⁻¹(p) − 2/σ) and c Φ(Φ⁻¹(p) − 1/σ) (Neyman and Pearson),
        and a half-line attains both when v = −v′. For α < 1 swap the roles; the pair is symmetric.
    """

    noise_multiplier: float
    sample_rate: float

    def _loss(self, x: float) -> float:
        q, variance = self.sample_rate, 2.0 * self.noise_multiplier**2
        low = math.log1p(-q)
        return float(
            np.logaddexp(low, math.log(q) + (2.0 * x - 1.0) / variance)
            - np.logaddexp(low, math.log(q) + (-2.0 * x - 1.0) / variance)
        )

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns the losses at quantiles of P."""
        z = -float(ndtri_exp(log_tail)) * self.noise_multiplier
        return self._loss(-z), self._loss(1.0 + z)

    def _position(self, loss: Array) -> Array:
        """The x of a loss ℓ: with y = e^{x/σ²}, q c y² + (1 − q)(1 − e^ℓ) y − e^ℓ q c = 0, c = e^{−1/2σ²}.

        Solved for ℓ ≥ 0; x is odd in ℓ.
        """
        q, sigma = self.sample_rate, self.noise_multiplier
        size = np.abs(loss)
        log_c = math.log(q) - 0.5 / sigma**2
        # y = [B + √(B² + 4 (qc)² e^ℓ)] / 2qc with B = (1 − q)(e^ℓ − 1), in logarithms.
        b = (1.0 - q) * -np.expm1(-size)
        with np.errstate(divide="ignore"):
            log_b = np.log(b) + size
        log_root = 0.5 * np.logaddexp(2.0 * log_b, math.log(4.0) + size + 2.0 * log_c)
        x = sigma**2 * (np.logaddexp(log_b, log_root) - math.log(2.0) - log_c)
        signed: Array = np.where(loss >= 0.0, x, -x)
        return signed

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses of both mixtures between the edges."""
        q, sigma = self.sample_rate, self.noise_multiplier
        x = self._position(edges)
        g, g_error = normal_masses(x / sigma)
        up, up_error = normal_masses((x - 1.0) / sigma)
        down, down_error = normal_masses((x + 1.0) / sigma)
        return BinMasses(
            (1.0 - q) * g + q * up,
            (1.0 - q) * g + q * down,
            (1.0 - q) * g_error + q * up_error,
            (1.0 - q) * g_error + q * down_error,
        )


@dataclass(frozen=True)
class FixedSizeGaussianPair:
    """One Gaussian release on a fixed-size subset, under replace-one; symmetric.

    With M = (1 − q) N(0, σ²) + q N(2, σ²) and G = N(0, σ²), the privacy profile is that of (M, G)
    for α ≥ 1 and that of (G, M) for α < 1: the positive losses of the first, the negative ones of the
    second, and the rest of the mass at 0.

    Source:
        Zhu, Dong, Wang 2022, *Optimal accounting of differential privacy via characteristic
        function*, Theorem 11 (subset sampling), with the Gaussian pair of sensitivity 2.
    """

    noise_multiplier: float
    sample_rate: float

    def _parts(self) -> tuple[PoissonGaussianPair, PoissonGaussianPair]:
        sigma, q = 0.5 * self.noise_multiplier, self.sample_rate
        return PoissonGaussianPair(sigma, q, False), PoissonGaussianPair(sigma, q, True)

    def reach(self, log_tail: float) -> tuple[float, float]:
        """Returns the low end of the adding, the high end of the removing direction."""
        removing, adding = self._parts()
        return adding.reach(log_tail)[0], removing.reach(log_tail)[1]

    def masses(self, edges: Array) -> BinMasses:
        """Returns the masses between the edges."""
        split = int(np.searchsorted(edges, 0.0))
        with_zero = edges
        added = split == len(edges) or edges[split] != 0.0
        if added:
            with_zero = np.insert(edges, split, 0.0)
        removing, adding = (pair.masses(with_zero) for pair in self._parts())
        # Bins 0 … split end at or below 0, the others begin there.
        low = np.arange(len(with_zero) + 1) <= split
        parts = [
            np.where(low, a, r)
            for a, r in (
                (adding.p, removing.p),
                (adding.q, removing.q),
                (adding.p_error, removing.p_error),
                (adding.q_error, removing.q_error),
            )
        ]
        # Mass exactly at 0 belongs to the bin (…, 0].
        for k in (0, 1):
            parts[k][split] += max(1.0 - float(parts[k].sum()), 0.0)
        for k in (2, 3):
            parts[k][split] += 64.0 * _ULP
        if added:
            parts = [np.concatenate((v[:split], [v[split] + v[split + 1]], v[split + 2 :])) for v in parts]
        p, q, p_error, q_error = parts
        return BinMasses(p, q, p_error, q_error)
