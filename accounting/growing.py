"""Compositions that grow step by step: whether (ε, δ) still holds after one step more, without composing anew.

A composition near one ε is laid out once, ahead of its growth: grid, tilt, and length of the transform. A further
loss then costs its discretisation and one transform, and a question one transform back. Every answer is an upper bound
of δ, certified as those of `accounting.prv` are: by the upper form of every loss, with the rounding of all transforms,
and with what lies outside the window. Where the layout does not fit any more, there is no answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from .errors import EngineRangeError
from .pairs import DominatingPair
from .privacy_loss import DiscreteLoss, Spectrum
from .prv import Laboratory
from .rdp import Cumulant, rdp_to_epsilon
from .terms import Terms

__all__ = ["Growing", "GrowingRenyi", "Limit"]

Array = NDArray[np.float64]

_TOLERANCE = 5e-4
"""Relative error in ε that the grid is laid out for, at the number of steps that are expected."""
_MARGIN = 2e-3
"""How far below the limit ε has to stay, relative to it: several times what two bounds of one ε usually differ by."""
_MOST_SIZE = 1 << 18
_MOST_AHEAD = 4096.0
_FEW = 16
_ROOM = 1.5
_LEAST_AHEAD = 2.0
_LOG_OUTSIDE = -21.0
_LOG_SEEN = math.log(1e-6)
"""A δ down to which nothing needs to be tilted: float64 noise is far below."""
_SHIFTS = 16
_ROUNDING = 1e-9
_ORDERS: Array = np.geomspace(1e-3, 2e4, 96)


@dataclass(frozen=True)
class Limit:
    """What is not to be exceeded.

    Attributes:
        epsilon: ε, positive and finite.
        delta: δ in (0, 1).
    """

    epsilon: float
    delta: float


@dataclass(frozen=True, eq=False)
class _Direction:
    """The sum of losses in one direction of the neighbouring relation.

    Attributes:
        laboratory: Makes the discrete losses.
        saddle: The tilt that their edges are laid out for.
        log_outside: Log of the tilted mass that may lie on either side of the window.
        orders: t, t + s and t − s for positive s, shape (orders,).
        spectrum: Of the sum, under the tilt t.
        cumulants: K of the sum at `orders`.
        mean: Of the sum under the tilt.
        variance: Of the sum under the tilt.
        infinite: Mass of the sum at +∞ at most.
        reach: The largest size of a loss.
        edges: By how much the edges of all losses may be off.
    """

    laboratory: Laboratory
    saddle: float
    log_outside: float
    orders: Array
    spectrum: Spectrum
    cumulants: Array
    mean: float = 0.0
    variance: float = 0.0
    infinite: float = 0.0
    reach: float = 0.0
    edges: float = 0.0

    @classmethod
    def laid_out(cls, parts: list[tuple[DominatingPair, int]], limit: Limit, saddle: float) -> _Direction | None:
        """Lays out a sum that is empty, for parts that are to come, of which this tilt has its mean near the limit.

        What comes may be other parts: the sum is tilted less than that, only so far that rounding is small against δ.
        """
        log_delta = math.log(limit.delta)
        laboratory = Laboratory(parts, "upper", log_delta)
        composition = laboratory.composition(limit.epsilon, saddle, _TOLERANCE)
        if composition.empty:
            return None
        t = saddle * max(1.0 - math.sqrt(_LOG_SEEN / log_delta), 0.0)
        outside = log_delta + math.log(_TOLERANCE) + t * limit.epsilon - float(composition.cumulant(np.array([t]))[0])
        log_outside = min(outside, _LOG_OUTSIDE)
        bottom, top = composition.window(t, log_outside)
        size = int(fft.next_fast_len(int(_ROOM * (top - bottom) / composition.width) + 3, real=True))
        if size > _MOST_SIZE:
            return None
        s = np.geomspace(0.1, 12.0, _SHIFTS) / (math.sqrt(composition.moments(t)[1]) + composition.width)
        orders: Array = np.concatenate(([t], t + s, t - s))
        spectrum = Spectrum.empty(composition.width, t, size)
        return cls(laboratory, saddle, log_outside, orders, spectrum, np.zeros(len(orders)))

    def grown(self, pair: DominatingPair, n: int) -> _Direction | None:
        """The sum with n more of a loss, where it fits the layout."""
        spectrum = self.spectrum
        if spectrum.steps + n > self.laboratory.steps:
            return None
        loss = self.laboratory.discrete(pair, spectrum.width, Laboratory.coarse(self.saddle), _TOLERANCE)
        if not loss.mass.any():
            return None
        k, mean, variance = _figures(loss, self.orders)
        return replace(
            self,
            spectrum=spectrum.times(loss, n),
            cumulants=self.cumulants + n * k,
            mean=self.mean + n * mean,
            variance=self.variance + n * variance,
            infinite=self.infinite + n * loss.infinite * (1.0 + _ROUNDING),
            reach=max(self.reach, loss.reach),
            edges=self.edges + n * loss.edge_error * (1.0 + _ROUNDING),
        )

    def delta(self, epsilon: float) -> float | None:
        """An upper bound of δ(ε), or nothing where the window does not reach down to ε."""
        spectrum, k = self.spectrum, self.cumulants
        point = epsilon - Laboratory.rounding_of(spectrum.steps, self.reach, self.edges)
        if point <= 0.0:
            return None
        count = len(k) // 2
        above, below = slice(1, count + 1), slice(count + 1, None)
        s = self.orders[above] - spectrum.t
        spread = math.sqrt(self.variance) + spectrum.width
        # As `Composition.window`: outside, the tilted sum has mass e^log_outside at most per side.
        top = max(float(np.min((k[above] - k[0] - self.log_outside) / s)), self.mean + spread)
        bottom = min(float(np.max(-(k[below] - k[0] - self.log_outside) / s)), self.mean - spread)
        if (top - bottom) / spectrum.width + 3.0 > spectrum.size:
            return None
        # (1 − e^{ε−L})₊ ≤ e^{t(L−ε)} for every t > 0.
        upwards = slice(0, count + 1)
        shift = self.orders[upwards] * point
        log_delta = float(np.min(k[upwards] - shift + _ROUNDING * (1.0 + np.abs(k[upwards]) + shift)))
        chernoff = min(math.exp(min(log_delta, 0.0)) + self.infinite, 1.0)
        if point >= top - spectrum.width:
            return chernoff
        if point <= bottom + spectrum.width:
            return None
        return min(spectrum.profile("upper", bottom, self.log_outside, infinite=self.infinite).delta(point), chernoff)


def _figures(loss: DiscreteLoss, orders: Array) -> tuple[Array, float, float]:
    """K at the orders, and mean and variance under the first of them."""
    value = loss.loss
    exponent = np.multiply.outer(orders, value)
    top = exponent.max(axis=1)
    weights = np.exp(exponent - top[:, None]) * loss.mass
    total = weights.sum(axis=1)
    tilted = weights[0] / total[0]
    mean = float(tilted @ value)
    return top + np.log(total), mean, float(tilted @ (value - mean) ** 2)


@dataclass(frozen=True, eq=False)
class Growing:
    """What is known of a ledger that grows towards a limit; it never changes, so that threads may share it.

    Attributes:
        limit: What is not to be exceeded.
        terms: What is in the sums.
        directions: One sum for each direction of the neighbouring relation.
    """

    limit: Limit
    terms: Terms
    directions: tuple[_Direction, ...]

    @classmethod
    def towards(cls, limit: Limit, terms: Terms) -> Growing | None:
        """Lays out grids for terms that go on as they are until the limit, and composes them; nothing if it cannot."""
        if terms.renyi_only or not terms.poisson:
            return None
        cumulant = terms.cumulant(fixed_as_guess=True)
        share = min(max(_room(limit, cumulant), _LEAST_AHEAD), _MOST_AHEAD)
        _, order = rdp_to_epsilon(lambda t: share * cumulant(t), limit.delta, max_order=terms.max_order)
        found: list[_Direction] = []
        try:
            # A grid needs a few losses of about the same kind only.
            for few, parts in zip(terms.rough(_FEW).directions(), terms.directions(), strict=True):
                planned = [(pair, math.ceil(share * n)) for pair, n in few]
                direction = _Direction.laid_out(planned, limit, order - 1.0)
                for pair, n in parts:
                    direction = direction and direction.grown(pair, n)
                if direction is None:
                    return None
                found.append(direction)
        except EngineRangeError:
            return None
        return cls(limit, terms, tuple(found))

    def reaching(self, terms: Terms) -> Growing | None:
        """These sums grown to the terms; nothing where they hold more than these, or do not fit the layout."""
        more = _added(self.terms, terms)
        if more is None:
            return None
        directions = list(self.directions)
        try:
            for (sigma, q), n in more.items():
                for index, pair in enumerate(terms.pairs(sigma, q)):
                    direction = directions[index].grown(pair, n)
                    if direction is None:
                        return None
                    directions[index] = direction
        except EngineRangeError:
            return None
        return replace(self, terms=terms, directions=tuple(directions))

    def within(self) -> bool:
        """Whether the limit certainly holds, by a margin; otherwise nothing is said."""
        epsilon = self.limit.epsilon * (1.0 - _MARGIN)
        bounds = [direction.delta(epsilon) for direction in self.directions]
        return all(bound is not None and bound <= self.limit.delta for bound in bounds)


@dataclass(frozen=True, eq=False)
class GrowingRenyi:
    """As `Growing`, by Rényi accounting at fixed orders.

    Attributes:
        limit: What is not to be exceeded.
        terms: What is in the sum.
        orders: Orders less one, shape (orders,).
        cumulants: K of the sum at each.
    """

    limit: Limit
    terms: Terms
    orders: Array
    cumulants: Array

    @classmethod
    def towards(cls, limit: Limit, terms: Terms) -> GrowingRenyi | None:
        """Adds up the terms at orders that fit them and about twice as much noise."""
        if terms.fixed or not terms.poisson:
            return None
        orders = np.geomspace(1e-3, max(2.0 * terms.max_order, 2.0), len(_ORDERS))
        return cls(limit, terms, orders, terms.cumulant()(orders))

    def reaching(self, terms: Terms) -> GrowingRenyi | None:
        """This sum grown to the terms; nothing where it holds more than these."""
        more = _added(self.terms, terms)
        if more is None:
            return None
        added = Terms(terms.relation, terms.group_size, poisson=more).cumulant()(self.orders)
        return replace(self, terms=terms, cumulants=self.cumulants + added)

    def within(self) -> bool:
        """As `Growing.within`."""
        t = self.orders
        epsilons = (self.cumulants - math.log(self.limit.delta) - np.log1p(t)) / t + np.log(t / (t + 1.0))
        return float(np.min(epsilons)) <= self.limit.epsilon * (1.0 - _MARGIN)


def _added(before: Terms, after: Terms) -> dict[tuple[float, float], int] | None:
    """The Poisson steps that are in the one and not in the other; nothing where that is not all that differs."""
    if replace(after, poisson={}) != replace(before, poisson={}):
        return None
    old, new = before.poisson, after.poisson
    more = {phase: n - old.get(phase, 0) for phase, n in new.items() if n != old.get(phase)}
    if any(n < 0 for n in more.values()) or not old.keys() <= new.keys():
        return None
    return more


def _room(limit: Limit, cumulant: Cumulant) -> float:
    """How many times what was released fits the limit by Rényi accounting."""
    t = _ORDERS
    # (share · K − log δ − log(1 + t))/t + log(t/(t + 1)) ≤ ε, solved for the share at every order.
    room = limit.epsilon * t + math.log(limit.delta) + np.log1p(t) - t * np.log(t / (t + 1.0))
    return float(np.max(room / np.maximum(cumulant(t), 1e-300)))
