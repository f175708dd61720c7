"""Discretised privacy losses: certified from above and from below, and their composition.

A dominating pair is reduced to atoms on the grid {k·h}. Write u = e^{−ℓ} for a loss ℓ; the
hockey-stick divergence of a composition is δ(ε) = E_P[(1 − e^ε Π uᵢ)₊], which is convex and
decreasing in every uᵢ. Hence, one mechanism at a time and whatever the others are,

* spreading the mass between two grid points over these two so that P and Q are both kept
  (a mean-preserving spread of u), or raising a loss, can only increase δ: `"upper"`;
* merging mass from both sides of a grid point whose mean u is that of the point (a
  mean-preserving contraction), or lowering a loss, can only decrease δ: `"lower"`.

Both errors are of second order in the grid width. The upper form is the connect-the-dots
construction of Doroshenko et al. 2022 (*Connect the dots*, §3), seen as a spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from .errors import EngineRangeError
from .pairs import DominatingPair

__all__ = ["Composition", "DiscreteLoss", "Side", "Spectrum", "discretise", "loss_edges"]

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Side = Literal["upper", "lower"]

_ULP = float(np.finfo(float).eps)
_NEGLIGIBLE = 50.0
_MAX_EDGES = 1 << 22
# The formats whose machine epsilon bounds each rounding: 80-bit and quadruple precision.
_EXTENDED = np.longdouble if np.finfo(np.longdouble).nmant in (63, 112) else np.float64


@dataclass(frozen=True)
class DiscreteLoss:
    """Atoms of a privacy loss on a grid.

    Attributes:
        width: Grid width h.
        index: Grid index of every atom, increasing, shape (atoms,).
        mass: P-mass of every atom, shape (atoms,).
        infinite: P-mass at +∞ (upper form only).
        offset: Loss of the grid point of index 0.
        edge_error: By how much atoms may be off on the wrong side (`BinMasses.edge_error`).
    """

    width: float
    index: Index
    mass: Array
    infinite: float
    offset: float = 0.0
    edge_error: float = 0.0

    @property
    def loss(self) -> Array:
        """Privacy loss of every atom, shape (atoms,)."""
        return (self.index * self.width + self.offset).astype(np.float64)

    @property
    def reach(self) -> float:
        """Size of the largest atom's loss."""
        return float(np.abs(self.loss[[0, -1]]).max())

    def cumulant(self, t: Array) -> Array:
        """Returns log Σ mass · e^{t·loss} for every t, shape (t,)."""
        exponent = np.multiply.outer(t, self.loss)
        top = exponent.max(axis=1)
        total = np.exp(exponent - top[:, None]) @ self.mass
        result: Array = top + np.log(total)
        return result

    def root_mean_square(self, t: float) -> float:
        """Returns the root of the mean squared loss under the tilt t."""
        value = self.loss
        weight = self.mass * np.exp(t * (value - value.max()))
        return math.sqrt(float(weight @ value**2) / float(weight.sum()))


def loss_edges(low: float, high: float, width: float, t: float, tolerance: float, core: float = 0.0) -> Index:
    """Returns increasing grid indices that cover [low, high], sparser where the loss is large.

    Up to |ℓ| = core every grid point is an edge. Beyond, a bin of
    width w at loss ℓ adds about t(t+1)w²/12 to the cumulant where the loss itself adds
    tℓ; w = min(|ℓ|/32, √(12·tolerance·|ℓ|/(t+1))), at least h, keeps their ratio at the tolerance.
    """
    sides = []
    for end in (max(high, 0.0), max(-low, 0.0)):
        if end <= 0.0:
            sides.append(np.zeros(1, dtype=np.int64))
            continue
        position = np.concatenate(([0.0], np.geomspace(min(width, end) / 4.0, end, 600)))
        step = np.minimum(position / 32.0, np.sqrt(12.0 * tolerance * position / (t + 1.0)))
        step = np.where(position <= core, 0.0, step)
        density = 1.0 / np.maximum(step, width)
        cells = np.concatenate(([0.0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(position))))
        if not (cells[-1] <= _MAX_EDGES and end <= 2.0**52 * width):
            raise EngineRangeError(f"losses up to {end:.3g} do not fit on a grid of width {width:.3g}")
        points = np.interp(np.arange(math.ceil(cells[-1])), cells, position)
        sides.append(np.append(np.round(points / width), math.ceil(end / width)).astype(np.int64))
    index = np.unique(np.concatenate((-sides[1], sides[0])))
    # The band between 0 and the nearer end may be empty of mass; one edge outside the range suffices.
    first = max(int(np.searchsorted(index, math.floor(low / width), side="right")) - 1, 0)
    last = min(int(np.searchsorted(index, math.ceil(high / width), side="left")), len(index) - 1)
    return index[first : last + 1]


def discretise(pair: DominatingPair, index: Index, width: float, side: Side, offset: float = 0.0) -> DiscreteLoss:
    """Rounds the privacy loss of a pair to grid points, with a certified direction.

    Args:
        pair: The dominating pair.
        index: Increasing grid indices, shape (points,), at least two.
        width: Grid width h.
        side: `"upper"` for a loss that dominates the pair's, `"lower"` for one it dominates.
        offset: Loss of the grid point of index 0.

    Guarantee:
        For every composition, replacing the pair by the result moves δ(ε) only in the stated
        direction (module docstring). Rounding errors of the masses are pushed that way as well.
    """
    loss: Array = (index * width + offset).astype(np.float64)
    bins = pair.masses(loss)
    p, q, p_error, q_error = bins.p, bins.q, bins.p_error, bins.q_error
    mass = np.zeros(len(index))
    gap = -np.expm1(-np.diff(loss))
    with np.errstate(over="ignore", invalid="ignore"):
        growth = np.exp(loss)
        # Part of the bin (loss[j], loss[j+1]] that belongs at its upper end, up to the rounding error.
        scaled_q = np.nan_to_num(q[1:-1] * growth[:-1], nan=0.0, posinf=0.0)
        scaled_error = np.nan_to_num(q_error[1:-1] * growth[:-1], nan=np.inf, posinf=np.inf)
    inner = p[1:-1]
    # An edge that is off by η moves the share of its bin by about η/gap, on either side of it.
    error = (p_error[1:-1] + scaled_error + (4.0 * _ULP + 4.0 * bins.edge_error) * inner) / gap
    exact = (inner - scaled_q) / gap
    if side == "upper":
        inner = inner + p_error[1:-1]
        to_upper = np.clip(exact + error, 0.0, inner)
        mass[1:] += to_upper
        mass[:-1] += inner - to_upper
        mass[0] += p[0] + p_error[0]
        # Beyond the last edge the spread goes to that edge and to +∞, where Q has no mass.
        top = p[-1] + p_error[-1]
        with np.errstate(over="ignore", invalid="ignore"):
            kept = (q[-1] - q_error[-1]) * growth[-1]
        kept = min(max(float(np.nan_to_num(kept, nan=0.0, posinf=0.0)), 0.0), top)
        mass[-1] += kept
        return _loss(width, index, mass, float(top - kept), offset, bins.edge_error)
    # Lower form. A share α of every bin goes to its lower end, whose u exceeds the bin's mean u, the
    # rest to its upper end, whose u falls short of it; the mean at a point must not exceed its u.
    inner = np.maximum(inner - p_error[1:-1], 0.0)
    to_upper = np.clip(exact - error, 0.0, inner)
    # Amounts by which the mean u of a bin misses that of its ends, relative to the end's u.
    shortfall = to_upper * gap
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # Huge bins hold no exp(their width); an infinite excess is never balanced.
        excess = np.nan_to_num((inner - to_upper) * np.expm1(np.diff(loss)), nan=0.0, posinf=np.inf)
        position = np.clip(np.nan_to_num(1.0 - to_upper / inner, nan=0.5), 0.0, 1.0)
    finite = np.minimum(excess, np.finfo(float).max)
    share = np.asarray(_balanced_shares(shortfall.tolist(), finite.tolist(), position.tolist()))
    down, up = share * inner, (1.0 - share) * inner
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = (share * shortfall)[1:] / ((1.0 - share) * excess)[:-1]
    kept = np.clip(np.nan_to_num(kept, nan=0.0, posinf=1.0), 0.0, 1.0)
    mass[:-1] += down
    # What the balance does not allow at a point is lowered to the next one; so is the last bin.
    mass[1:-1] += kept * up[:-1]
    mass[:-2] += (1.0 - kept) * up[:-1]
    mass[-2] += up[-1]
    mass[-1] += max(float(p[-1] - p_error[-1]), 0.0)
    return _loss(width, index, mass, 0.0, offset, bins.edge_error)


def _loss(width: float, index: Index, mass: Array, infinite: float, offset: float, edge_error: float) -> DiscreteLoss:
    occupied = mass > 0.0
    if not occupied.any():
        occupied[0] = True
    return DiscreteLoss(width, index[occupied], mass[occupied], infinite, offset, edge_error)


def _balanced_shares(shortfall: list[float], excess: list[float], position: list[float]) -> list[float]:
    """Shares α of the bins with α[j]·shortfall[j] ≈ (1 − α[j−1])·excess[j−1] at every inner point.

    The recursion contracts towards heavier bins, so it climbs every peak from both of its sides,
    starting in every valley from `position`, the share that the mean of the bin suggests. Any α in [0, 1] is valid.
    """
    count = len(shortfall)
    share = list(position)
    # Outside the range there is nothing to balance with.
    share[0], share[-1] = 0.0, 1.0
    for j in range(1, count):
        if shortfall[j] >= shortfall[j - 1]:
            value = (1.0 - share[j - 1]) * excess[j - 1]
            share[j] = min(value / shortfall[j], 1.0) if shortfall[j] > 0.0 else position[j]
    for j in range(count - 1, 0, -1):
        if shortfall[j - 1] > shortfall[j] and (j == 1 or shortfall[j - 1] < shortfall[j - 2]):
            value = share[j] * shortfall[j]
            share[j - 1] = max(1.0 - value / excess[j - 1], 0.0) if excess[j - 1] > 0.0 else position[j - 1]
    return share


class Composition:
    """Sum of independent discretised privacy losses, evaluated near one point by a tilted FFT.

    Tilting every loss by e^{tℓ} moves the region that decides δ(ε) to the middle of the
    distribution, so that the float64 noise of the transform is relative to δ instead of absolute:
    with K the cumulant generating function of the sum and P̃ its tilted law,
    δ(ε) = e^{K(t) − tε} E_P̃[(1 − e^{ε−L})₊ e^{−t(L−ε)}].
    """

    def __init__(self, parts: list[tuple[DiscreteLoss, int]], side: Side) -> None:
        self.parts = parts
        self.side: Side = side
        self.width = parts[0][0].width
        self.infinite = math.fsum(n * loss.infinite for loss, n in parts)
        self.offset = math.fsum(n * loss.offset for loss, n in parts)

    @property
    def empty(self) -> bool:
        """Whether some loss has no finite mass at all, so that the sum has none either."""
        return any(not loss.mass.any() for loss, _ in self.parts)

    @property
    def maximum(self) -> float:
        """Largest finite value of the sum, with room for the rounding of the grid."""
        top = math.fsum(n * float(loss.loss[-1]) for loss, n in self.parts)
        return top + 1e-12 * abs(top) + self.width

    def cumulant(self, t: Array) -> Array:
        """Returns K(t) of the finite part of the sum, shape (t,)."""
        total = np.zeros(len(t))
        for loss, n in self.parts:
            total += n * loss.cumulant(t)
        return total

    def moments(self, t: float) -> tuple[float, float]:
        """Returns mean and variance of the sum under the tilt t."""
        mean = variance = 0.0
        for loss, n in self.parts:
            value = loss.loss
            exponent = t * value
            weight = loss.mass * np.exp(exponent - exponent.max())
            weight /= weight.sum()
            centre = float(weight @ value)
            mean += n * centre
            variance += n * float(weight @ (value - centre) ** 2)
        return mean, variance

    def window(self, t: float, log_outside: float = -21.0) -> tuple[float, float]:
        """Returns (bottom, top): outside, the tilted sum has mass e^log_outside at most per side.

        Chernoff: P̃(L ≥ x) ≤ e^{K(t+s) − K(t) − sx} for every s > 0, and likewise below.
        """
        mean, variance = self.moments(t)
        spread = math.sqrt(variance) + self.width
        s = np.geomspace(0.3, 12.0, 12) / spread
        k = self.cumulant(np.concatenate(([t], t + s, t - s)))
        top = float(np.min((k[1:13] - k[0] - log_outside) / s))
        bottom = float(np.max(-(k[13:] - k[0] - log_outside) / s))
        return min(bottom, mean - spread), max(top, mean + spread)

    def size(self, t: float, log_outside: float = -21.0) -> int:
        """Returns the length of the transform that `tilted` would use."""
        bottom, top = self.window(t, log_outside)
        return int((top - bottom) / self.width) + 3

    def tilted(self, t: float, log_outside: float = -21.0, *, extended: bool = False) -> TiltedProfile:
        """Composes under the tilt t ≥ 0, in extended precision on request, where the platform has it."""
        bottom, top = self.window(t, log_outside)
        size = int(fft.next_fast_len(int((top - bottom) / self.width) + 3, real=True))
        spectrum = Spectrum.empty(self.width, t, size, extended=extended)
        for loss, n in self.parts:
            spectrum = spectrum.times(loss, n)
        return spectrum.profile(self.side, bottom, log_outside, infinite=self.infinite, offset=self.offset)


@dataclass(frozen=True)
class Spectrum:
    """Product of the transforms of tilted losses on one circular grid, with what rounding may have done to it.

    A further loss makes another spectrum and leaves this one as it is, so that a composition grows by one transform
    and whoever is interrupted has the one or the other.

    Attributes:
        width: Grid width h.
        t: The tilt.
        size: Points of the circular grid.
        log_total: Log modulus of the product at every frequency, shape (size // 2 + 1,), float64 or extended.
        log_bound: Log of a bound of it that counts the rounding of every factor.
        phase: Its angle, up to whole turns.
        factors: How many transforms were multiplied, each once however often it counts.
        steps: How many losses are composed.
        extreme: Largest exponent of a tilt.
        cumulant: K(t) of the sum.
    """

    width: float
    t: float
    size: int
    log_total: Any
    log_bound: Any
    phase: Any
    factors: int = 0
    steps: int = 0
    extreme: float = 0.0
    cumulant: float = 0.0

    @classmethod
    def empty(cls, width: float, t: float, size: int, *, extended: bool = False) -> Spectrum:
        """The spectrum of no loss at all, in extended precision on request, where the platform has it."""
        real: Any = _EXTENDED if extended else np.float64
        bins = size // 2 + 1
        none = np.zeros(bins, dtype=real)
        return cls(width, t, size, none, none, none)

    @property
    def _ulp(self) -> float:
        return float(np.finfo(self.log_total.dtype).eps)

    @property
    def _forward_error(self) -> float:
        # Every output of the transform is a sum of at most log2(size) rounded butterflies of
        # unit total weight; 8 ulp a level covers complex products and twiddle factors.
        return 8.0 * self._ulp * (math.log2(self.size) + 4.0)

    def times(self, loss: DiscreteLoss, n: int) -> Spectrum:
        """Returns the spectrum with n more of a loss, which has finite mass, on a grid of the same width."""
        real, ulp = self.log_total.dtype.type, self._ulp
        # π of the precision used: the phase is reduced by many turns.
        turn = 8.0 * np.arctan(real(1.0))
        exponent = self.t * loss.loss
        shift = float(exponent.max())
        weight = loss.mass * np.exp(exponent - shift)
        total = float(weight.sum())
        image = np.bincount(loss.index % self.size, weights=weight / total, minlength=self.size)
        spectrum = fft.rfft(image.astype(real))
        modulus = np.abs(spectrum)
        with np.errstate(divide="ignore"):
            log_total = self.log_total + n * np.log(modulus)
        return Spectrum(
            self.width,
            self.t,
            self.size,
            log_total,
            self.log_bound + n * np.log(modulus + self._forward_error + 4.0 * ulp),
            self.phase + np.remainder(n * np.angle(spectrum), turn),
            self.factors + 1,
            self.steps + n,
            max(self.extreme, float(np.abs(exponent - shift).max()), abs(shift)),
            self.cumulant + n * (shift + math.log(total)),
        )

    def profile(
        self, side: Side, bottom: float, log_outside: float, *, infinite: float, offset: float = 0.0
    ) -> TiltedProfile:
        """Transforms back, onto the window of the grid that begins at `bottom`.

        Args:
            side: Direction in which the answers are to be certified.
            bottom: Where the window begins.
            log_outside: Log of the tilted mass that lies on either side of the window at most.
            infinite: Mass of the sum at +∞.
            offset: Loss of the grid point of index 0.
        """
        ulp, size = self._ulp, self.size
        start = math.floor((bottom - offset) / self.width)
        # n·angle loses n·π·ulp; the exponential of n·log loses its own magnitude in ulp, and so does every addition.
        magnitude = np.exp(self.log_total)
        rotation = 8.0 * ulp * (self.steps + 1.0)
        live = self.log_bound > -200.0
        shrunk = -np.expm1(np.minimum(self.log_total - self.log_bound, 0.0))
        error_there = np.where(live, np.exp(self.log_bound) * shrunk, 1e-80)
        logarithm = (4.0 + self.factors) * ulp * np.abs(np.maximum(self.log_total, -200.0))
        error_there = error_there + magnitude * (rotation + logarithm)
        composed = fft.irfft(magnitude * np.exp(1j * self.phase), n=size)
        error = (2.0 * float(error_there.sum()) + self._forward_error * 2.0 * float(magnitude.sum())) / size
        composed = np.roll(composed.astype(np.float64), -(start % size))
        return TiltedProfile(
            side=side,
            t=self.t,
            log_scale=self.cumulant,
            loss=((start + np.arange(size)) * self.width + offset).astype(np.float64),
            mass=composed,
            error=error,
            outside=math.exp(log_outside),
            relative=16.0 * _ULP * (self.steps + 1.0) * (1.0 + min(self.extreme, 700.0)),
            infinite=infinite,
        )


@dataclass(frozen=True)
class TiltedProfile:
    """The composed loss under a tilt, on a window of the grid, with everything that was left out.

    Attributes:
        side: Direction in which the answers are certified.
        t: The tilt.
        log_scale: K(t).
        loss: Window of the grid, shape (size,).
        mass: Tilted mass at every loss, wrapped around the window, shape (size,).
        error: Bound of the rounding error of each mass.
        outside: Bound of the tilted mass above the window, and of that below it.
        relative: Bound of the relative error from the rounding of the tilt and of K.
        infinite: Mass at +∞.
    """

    side: Side
    t: float
    log_scale: float
    loss: Array
    mass: Array
    error: float
    outside: float
    relative: float
    infinite: float

    def _weights(self, epsilon: float) -> tuple[slice, Array]:
        """Returns what in the window counts, and how much; beyond it weights are below e^−_NEGLIGIBLE."""
        end = epsilon + _NEGLIGIBLE / self.t if self.t > 0.0 else math.inf
        start, stop = (int(i) for i in np.searchsorted(self.loss, [epsilon, end], side="right"))
        above = self.loss[start:stop] - epsilon
        return slice(start, stop), -np.expm1(-above) * np.exp(-self.t * above)

    def delta(self, epsilon: float) -> float:
        """Returns a bound of δ(ε), for ε inside the window."""
        counted, weight = self._weights(epsilon)
        sign = 1.0 if self.side == "upper" else -1.0
        total = float(weight @ np.maximum(self.mass[counted] + sign * self.error, 0.0))
        if self.side == "upper":
            # Mass above the window wraps into it from below and would be lost.
            total += self.outside * math.exp(-self.t * max(float(self.loss[-1]) - epsilon, 0.0))
            total += math.exp(-_NEGLIGIBLE) * (1.0 + len(self.loss) * self.error)
        else:
            # Mass outside the window may have wrapped in; it counts at most once each.
            total -= 2.0 * self.outside
        total *= 1.0 + sign * self.relative
        if total <= 0.0:
            return self.infinite
        log_value = self.log_scale - self.t * epsilon + math.log(total)
        return min(math.exp(min(log_value, 0.0)) + self.infinite, 1.0)

    def uncertainty(self, epsilon: float) -> float:
        """Returns how much of δ(ε) the rounding and what lies outside the window may amount to."""
        _, weight = self._weights(epsilon)
        total = self.error * float(weight.sum()) + self.outside
        return math.exp(min(self.log_scale - self.t * epsilon + math.log(total), 0.0))

    def epsilon(self, delta: float, guess: float = 0.0) -> float | None:
        """Returns an ε inside the window with δ(ε) on the certified side, or None if there is none.

        For `"upper"`, δ(ε) ≤ delta at the answer; for `"lower"`, δ(ε) > delta there. At or below
        the lower end of the window the answer is that end (upper) or None (lower).
        """
        low, high = float(self.loss[0]), float(self.loss[-2])
        if self.side == "lower":
            # Far below the saddle point the bound is swallowed by what the window leaves out.
            base = max(low, 0.0)
            shares = (0.999, 0.99, 0.97, 0.9, 0.8, 0.65, 0.5)
            points = [base + share * (guess - base) for share in shares if low < guess < high]
            points += [low + share * (high - low) for share in (0.5, 0.4, 0.3, 0.6, 0.2, 0.7, 0.8)]
            low = next((point for point in points if self.delta(point) > delta), low)
        f_low, f_high = self._excess(low, delta), self._excess(high, delta)
        if f_high > 0.0:
            return None if self.side == "upper" else high
        if f_low <= 0.0:
            return low if self.side == "upper" else None
        resolution = 1e-7 * (high - low)
        for iteration in range(100):
            if high - low <= resolution:
                break
            # Secant on the nearly linear log δ, alternating with bisection of the bracket.
            guess = low + (high - low) * (f_low / (f_low - f_high)) if math.isfinite(f_high) else low
            if iteration % 3 == 2 or not low < guess < high:
                guess = 0.5 * (low + high)
            else:
                nudge = 0.25 * resolution
                guess = min(max(guess + (nudge if iteration % 2 else -nudge), low + nudge), high - nudge)
            value = self._excess(guess, delta)
            if value > 0.0:
                low, f_low = guess, value
            else:
                high, f_high = guess, value
        return high if self.side == "upper" else low

    def _excess(self, epsilon: float, delta: float) -> float:
        value = self.delta(epsilon)
        return math.log(value) - math.log(delta) if value > 0.0 else -math.inf
