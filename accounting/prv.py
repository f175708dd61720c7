"""Numerical composition of privacy losses: certified upper and lower (ε, δ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .errors import EngineRangeError
from .pairs import DominatingPair, PoissonGaussianPair, ReplaceOnePoissonPair
from .privacy_loss import Composition, DiscreteLoss, Side, TiltedProfile, discretise, loss_edges

__all__ = ["COARSE", "Laboratory", "compose_delta", "compose_deltas", "compose_epsilon"]

Array = NDArray[np.float64]
Parts = Sequence[tuple[DominatingPair, int]]

_TOLERANCE = 2e-4
COARSE = 1e-2
"""Relative error of a composition that only finds the grid for another one."""
_MAX_SIZE = 1 << 21
_LARGE = 1 << 16
_LARGEST_EPSILON = 1e8
_NEAR = 24
_MOST_EQUAL = 1 << 17
_CONCENTRATED = 0.1
_MANY = 64
"""Distinct losses above which those of nearly the same noise share what nothing but tightness hangs on."""
_NEARLY = 64.0
_LOG_OUTSIDE = -30.0
_ULP = float(np.finfo(float).eps)


@lru_cache(maxsize=2048)
def _discrete(
    pair: DominatingPair, width: float, t: float, log_tail: float, tolerance: float, side: Side, many: bool = False
) -> DiscreteLoss:
    low, high = pair.reach(log_tail)
    core = offset = 0.0
    if side == "lower":
        # Balancing the lower form needs equal bins where the mass is; its tails may be sparse.
        upper = _discrete(pair, width, t, log_tail, tolerance, "upper", many)
        # Bounded losses whose ε lies near their end ask for tiny cells: elsewhere, any bins are valid.
        core = min(8.0 * upper.root_mean_square(t), _MOST_EQUAL * width)
        # Any shift is valid, and one that was sought for nearly the same noise is nearly as good.
        offset = _offset(_nearly(pair) if many else pair, width)
    index = loss_edges(low - offset, high - offset, width, t, tolerance, core)
    if len(index) < 2:
        index = np.array([index[0], index[0] + 1])
    return discretise(pair, index, width, side, offset)


def _nearly(pair: DominatingPair) -> DominatingPair:
    """Returns the pair whose noise is the nearest of a grid of 1 %, or the pair itself where it is of another kind."""
    if not isinstance(pair, PoissonGaussianPair | ReplaceOnePoissonPair):
        return pair
    return replace(pair, noise_multiplier=2.0 ** (round(_NEARLY * math.log2(pair.noise_multiplier)) / _NEARLY))


@lru_cache(maxsize=1024)
def _offset(pair: DominatingPair, width: float) -> float:
    """Returns the shift of the grid under which the lower form loses least.

    With small q nearly all mass lies within a cell of 0; merging it without loss needs a grid point at its mean.
    """
    index = np.arange(-_NEAR, _NEAR + 1)

    def loss(offset: float) -> float:
        """Mean u that rounding adds: none where everything is balanced."""
        edges: Array = (index * width + offset).astype(np.float64)
        bins = pair.masses(edges)
        rounded = discretise(pair, index, width, "lower", offset)
        exact = float(bins.q[1:-1].sum()) + float(bins.p[-1]) * math.exp(-float(edges[-1]))
        return float(rounded.mass @ np.exp(-rounded.loss)) - exact

    best, reach = 0.0, 0.5 * width
    if width * _NEAR < 100.0 and float(pair.masses((index * width).astype(np.float64)).p[1:-1].max()) >= _CONCENTRATED:
        for _ in range(4):
            best = min((best + 0.2 * k * reach for k in (0, -4, -3, -2, -1, 1, 2, 3, 4, 5)), key=loss)
            reach *= 0.2
    return best


class Laboratory:
    """Compositions of one ledger at varying tilt and grid width."""

    def __init__(self, parts: Parts, side: Side, log_delta: float) -> None:
        self.parts = parts
        self.side: Side = side
        self.log_delta = log_delta
        self.steps = sum(n for _, n in parts)
        # Truncated tails add their mass to δ: e^−12 of it at most.
        self.log_tail = float(math.floor(log_delta - math.log(self.steps) - 12.0))

    def composition(self, epsilon: float, t: float, tolerance: float) -> Composition:
        """Lays out the grid so that its spread adds about tolerance·ε: n(t+1)h²/12 = tolerance·ε."""
        # ε may be small against the spread of the loss, about 3/t, which is what has to be resolved.
        scale = max(epsilon, 0.1 / max(t, 1e-9), 1e-12)
        for _ in range(8):
            composition = self._laid_out(scale, t, tolerance)
            spread = math.sqrt(composition.moments(t)[1]) if not composition.empty else 0.0
            if spread == 0.0 or (scale <= max(epsilon, spread) and composition.width <= 0.25 * spread):
                break
            scale = min(0.1 * scale, max(epsilon, 0.1 * spread))
        return composition

    def _laid_out(self, scale: float, t: float, tolerance: float) -> Composition:
        wanted = math.sqrt(12.0 * tolerance * scale / (self.steps * (t + 1.0)))
        # A coarse ladder of widths and tilts lets nearby queries share their discretisations.
        width = 2.0 ** (0.5 * math.floor(2.0 * math.log2(min(wanted, 0.25 / max(t, 1e-9)))))
        coarse_t = self.coarse(t)
        composition = self._at(width, coarse_t, tolerance)
        size = composition.size(t)
        while size > _LARGE:
            # The formula is too careful where nearly all mass lies close to a grid point: measure.
            wider = self._at(2.0 * width, coarse_t, tolerance)
            point = np.array([max(t, 1e-6)])
            growth = float((wider.cumulant(point) - composition.cumulant(point))[0]) / point[0]
            if size <= _MAX_SIZE and not abs(growth) <= tolerance * scale:
                break
            width, composition = 2.0 * width, wider
            size = composition.size(t)
        return composition

    @staticmethod
    def coarse(t: float) -> float:
        """Returns the tilt, of a ladder, that the edges of losses are laid out for."""
        return float(2.0 ** math.ceil(math.log2(max(t, 1e-6))))

    def _at(self, width: float, t: float, tolerance: float) -> Composition:
        return Composition([(self.discrete(pair, width, t, tolerance), n) for pair, n in self.parts], self.side)

    def discrete(self, pair: DominatingPair, width: float, t: float, tolerance: float) -> DiscreteLoss:
        """Returns the loss of one pair on the grid, its edges laid out for tilts up to t."""
        return _discrete(pair, width, t, self.log_tail, tolerance, self.side, len(self.parts) > _MANY)

    def profile(self, composition: Composition, epsilon: float, t: float, tolerance: float) -> TiltedProfile:
        """Composes under the tilt, in extended precision and on a wider window where δ near ε asks for it."""
        profile = composition.tilted(t)
        allowed = 5.0 * tolerance * math.exp(self.log_delta)
        point = min(max(epsilon, float(profile.loss[0])), float(profile.loss[-2]))
        if profile.uncertainty(point) > allowed:
            log_outside = min(self.log_delta + t * point - profile.log_scale + math.log(tolerance), -21.0)
            if composition.size(t, log_outside) <= _MAX_SIZE:
                profile = composition.tilted(t, log_outside, extended=True)
        return profile

    def rounding(self, composition: Composition) -> float:
        """Bound of the error in ε from the rounding of the bin edges, a few ulp of each loss a step."""
        reach = max(loss.reach for loss, _ in composition.parts)
        return self.rounding_of(self.steps, reach, math.fsum(n * loss.edge_error for loss, n in composition.parts))

    @staticmethod
    def rounding_of(steps: int, reach: float, edges: float) -> float:
        """That error, by the number of steps, the largest loss, and the sum of what the edges may be off besides."""
        return 8.0 * _ULP * steps * (1.0 + reach) + edges

    def epsilon(self, delta: float, epsilon: float, t: float, tolerance: float) -> tuple[float, float, bool]:
        """Returns (ε, tilt, whether ε is bracketed or a certified 0)."""
        for attempt in range(60):
            composition = self.composition(epsilon, t, tolerance)
            if composition.empty:
                return 0.0, t, True
            profile = self.profile(composition, epsilon, t, tolerance)
            answer = profile.epsilon(delta, epsilon)
            slack = self.rounding(composition)
            low, high = float(profile.loss[0]), float(profile.loss[-2])
            if self.side == "upper":
                if answer is None:
                    if attempt >= 8 and composition.infinite <= delta:
                        # Grids grow with the tilt; the largest loss there can be is a bound as well.
                        return max(composition.maximum, 0.0) + slack, t, True
                    t = 1.5 * max(t, 1e-6)
                    continue
                if answer > low or low <= 0.0 or t == 0.0:
                    return max(answer, 0.0) + (slack if answer > 0.0 else 0.0), t, True
            else:
                if answer is not None and answer >= high:
                    t = 1.5 * max(t, 1e-6)
                    continue
                if answer is not None or low <= 0.0 or t == 0.0:
                    return max((answer or 0.0) - slack, 0.0), t, True
            t = t / 3.0 if t > 1e-6 else 0.0
        return 0.0, t, False

    def saddle(self, epsilon: float, t: float) -> float:
        """Returns a tilt under which the mean of the sum is near ε, starting from a guess."""
        t = max(t, 1e-3)
        for _ in range(4):
            composition = self.composition(epsilon, t, COARSE)
            if composition.empty or composition.maximum <= epsilon:
                return t
            mean, variance = composition.moments(t)
            if abs(mean - epsilon) <= 0.5 * math.sqrt(variance):
                return t
            # The discretisation was laid out for t: trust it for a factor of eight at a time.
            low, high = t / 8.0, 8.0 * t
            if composition.moments(low)[0] >= epsilon:
                t = low
                continue
            if composition.moments(high)[0] <= epsilon:
                t = high
                continue
            for _ in range(12):
                middle = math.sqrt(low * high)
                low, high = (middle, high) if composition.moments(middle)[0] < epsilon else (low, middle)
            return math.sqrt(low * high)
        return t

    def delta(self, epsilon: float, t: float, tolerance: float) -> tuple[float, float]:
        """Returns (δ, mass at +∞ in it)."""
        for _ in range(60):
            composition = self.composition(epsilon, t, tolerance)
            slack = self.rounding(composition)
            point = max(epsilon - slack, 0.0) if self.side == "upper" else epsilon + slack
            if composition.empty or composition.maximum <= point:
                return (composition.infinite if self.side == "upper" else 0.0), composition.infinite
            profile = composition.tilted(t)
            if profile.loss[0] > point:
                if t == 0.0:
                    # Everything lies above ε: δ is 1 to the accuracy of the window.
                    value = 1.0 if self.side == "upper" else profile.delta(float(profile.loss[0]))
                    return value, composition.infinite
                t = t / 3.0 if t > 1e-6 else 0.0
            elif profile.loss[-2] < point:
                if t > 1e9:
                    return (composition.infinite if self.side == "upper" else 0.0), composition.infinite
                t = 1.5 * max(t, 1e-6)
            else:
                return profile.delta(point), composition.infinite
        raise EngineRangeError(f"numerical composition could not reach epsilon={epsilon!r}")


def compose_epsilon(
    directions: Sequence[Parts],
    delta: float,
    *,
    guess: tuple[float, float],
    tolerance: float = _TOLERANCE,
    bracket: bool = True,
) -> tuple[float, float]:
    """Returns certified (lower, upper) bounds of the ε of a composition.

    Args:
        directions: For each direction of the neighbouring relation, the pairs (dominating pair, steps).
        delta: In (0, 1).
        guess: Approximate (ε, tilt), from Rényi accounting.
        tolerance: Relative error that the grid is laid out for.
        bracket: Whether the lower bound is wanted, which takes as long as the upper one; else it is 0.

    Raises:
        EngineRangeError: When no tilt brackets δ, or ε is beyond use.
    """
    if guess[0] > _LARGEST_EPSILON:
        raise EngineRangeError(f"numerical composition is not tried at an epsilon of {guess[0]:.3g}")
    log_delta = math.log(delta)
    coarse = []
    # The grid follows from the answer; a coarse composition finds both to a per cent, cheaply.
    for parts in directions:
        epsilon, t, found = Laboratory(parts, "upper", log_delta).epsilon(delta, *guess, COARSE)
        if not found:
            raise EngineRangeError(f"numerical composition could not bracket delta={delta!r}")
        coarse.append((epsilon, t, parts))
    coarse.sort(key=lambda entry: -entry[0])
    upper, worst = 0.0, coarse[0]
    for epsilon, t, parts in coarse:
        # Coarse or not, these are upper bounds: the direction that matters less may stay coarse.
        if epsilon <= upper or epsilon == 0.0:
            continue
        laboratory = Laboratory(parts, "upper", log_delta)
        if t > 0.0:
            t = _best_tilt(laboratory.composition(epsilon, t, COARSE), t, log_delta)
        fine, t, found = laboratory.epsilon(delta, epsilon, t, tolerance)
        if found and fine < epsilon:
            epsilon = fine
        if epsilon > upper:
            upper, worst = epsilon, (epsilon, t, parts)
    if upper == 0.0 or not bracket:
        return 0.0, upper
    epsilon, t, parts = worst
    try:
        lower, _, found = Laboratory(parts, "lower", log_delta).epsilon(delta, epsilon, t, tolerance)
    except EngineRangeError:
        # An upper bound holds without a lower one.
        return 0.0, upper
    return min(lower, upper) if found else 0.0, upper


def compose_delta(
    directions: Sequence[Parts], epsilon: float, *, guess: tuple[float, float], tolerance: float = _TOLERANCE
) -> tuple[float, float]:
    """Returns certified (lower, upper) bounds of the δ of a composition.

    Args:
        directions: For each direction of the neighbouring relation, the pairs (dominating pair, steps).
        epsilon: At least 0.
        guess: Approximate (δ, tilt), from Rényi accounting.
        tolerance: Relative error in ε that the grid is laid out for.

    Raises:
        EngineRangeError: When no tilt reaches ε.
    """
    best: tuple[float, float, Parts, float] | None = None
    coarse_values = []
    for parts in directions:
        log_delta = math.log(max(guess[0], 1e-290)) - 7.0
        for _ in range(4):
            laboratory = Laboratory(parts, "upper", log_delta)
            t = laboratory.saddle(epsilon, guess[1])
            value, infinite = laboratory.delta(epsilon, t, COARSE)
            # The Rényi bound may exceed δ by orders of magnitude; tails are cut relative to δ.
            if infinite <= 1e-3 * value or value < 1e-290:
                break
            log_delta = min(math.log(value), log_delta) - 12.0
        coarse_values.append(value)
        if best is None or value > best[0]:
            best = value, t, parts, log_delta
    assert best is not None
    coarse, t, worst, log_delta = best
    if coarse == 0.0:
        return 0.0, 0.0
    upper = 0.0
    for parts, rough in zip(directions, coarse_values, strict=True):
        # Coarse or not, these are upper bounds.
        value, _ = Laboratory(parts, "upper", log_delta).delta(epsilon, t, tolerance)
        upper = max(upper, min(value, rough))
    lower, _ = Laboratory(worst, "lower", log_delta).delta(epsilon, t, tolerance)
    return min(lower, upper), upper


def compose_deltas(
    directions: Sequence[Parts], epsilons: Sequence[float], *, tolerance: float = _TOLERANCE
) -> list[float]:
    """Returns certified upper bounds of the δ of a composition at several ε, from one transform for each direction.

    No tilt is sought for any ε: bounds are tight to the grid's error where δ is well above 1e-12.

    Args:
        directions: For each direction of the neighbouring relation, the pairs (dominating pair, steps).
        epsilons: At least 0 each.
        tolerance: Relative error that the grid is laid out for, at the spread of the loss.

    Raises:
        EngineRangeError: When the losses do not fit on a grid.
    """
    largest = [0.0] * len(epsilons)
    for parts in directions:
        laboratory = Laboratory(parts, "upper", _LOG_OUTSIDE)
        composition = laboratory.composition(0.0, 0.0, tolerance)
        if composition.empty:
            return [1.0] * len(epsilons)
        if composition.size(0.0, _LOG_OUTSIDE) > _MAX_SIZE:
            raise EngineRangeError("the losses do not fit on a grid without a tilt")
        profile = composition.tilted(0.0, _LOG_OUTSIDE)
        low, high = float(profile.loss[0]), float(profile.loss[-2])
        slack = laboratory.rounding(composition)
        for index, epsilon in enumerate(epsilons):
            # δ decreases: above the window its value at the end of the window is a bound, and below it 1 is.
            point = min(max(epsilon - slack, 0.0), high)
            value = profile.delta(point) if point >= low else 1.0
            largest[index] = max(largest[index], value)
    return largest


def _best_tilt(composition: Composition, t: float, log_delta: float) -> float:
    """Returns the tilt near t that the Rényi conversion would choose for the composition."""
    if composition.empty:
        return t
    s = t * np.geomspace(0.4, 2.5, 11)
    objective = (composition.cumulant(s) - log_delta - np.log1p(s)) / s + np.log(s / (s + 1.0))
    return float(s[int(np.argmin(objective))])
