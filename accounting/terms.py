"""A ledger reduced to what the engines compose: counts of distinct mechanisms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import events
from .errors import UnsupportedEventError
from .events import CHANGE_OF_A_SUM, REPLACE_ONE, Relation, flatten
from .groups import GroupPoissonPair, ReplaceGroupPoissonPair
from .pairs import (
    DominatingPair,
    FixedSizeGaussianPair,
    GaussianPair,
    LaplacePair,
    PoissonGaussianPair,
    ReplaceOnePoissonPair,
)
from .rdp import (
    MAX_ORDER,
    Cumulant,
    group_cumulant,
    laplace_cumulant,
    largest_useful_order,
    replace_one_cumulant,
    subsampled_gaussian_cumulant,
)
from .selection import AnyOf, PrivateSelection

__all__ = ["Collection", "Terms", "collect"]

Array = NDArray[np.float64]
Phases = dict[tuple[float, float], int]


@dataclass
class Terms:
    """Counts of distinct mechanisms under one neighbouring relation; order does not matter.

    Attributes:
        relation: The neighbouring relation.
        group_size: k, the most rows that one person has: neighbours differ by this many.
        mu: μ of all unsampled Gaussian releases together, √(Σ n (Δ/σ)²), Δ = k, and 2k for replace-one.
        poisson: {(σ, q): steps} with 0 < q < 1.
        fixed: {(σ, q): steps} of fixed-size sampling.
        laplace: {scale over the group's sensitivity: releases}.
        selections: (search, its trial, how often).
        choices: (the alternatives, how often).
    """

    relation: Relation
    group_size: int = 1
    mu: float = 0.0
    poisson: Phases = field(default_factory=dict)
    fixed: Phases = field(default_factory=dict)
    laplace: dict[float, int] = field(default_factory=dict)
    selections: list[tuple[PrivateSelection, Terms, int]] = field(default_factory=list)
    choices: list[tuple[list[Terms], int]] = field(default_factory=list)
    grouping: float = 0.0

    def copy(self) -> Terms:
        """Returns terms of their own."""
        return replace(
            self,
            poisson=dict(self.poisson),
            fixed=dict(self.fixed),
            laplace=dict(self.laplace),
            selections=self.selections[:],
            choices=self.choices[:],
        )

    @property
    def empty(self) -> bool:
        """Whether nothing was released."""
        return not (self.mu or self.poisson or self.fixed or self.laplace or self.renyi_only)

    @property
    def gaussian_only(self) -> bool:
        """Whether everything together is one Gaussian mechanism."""
        return not (self.poisson or self.fixed or self.laplace or self.renyi_only)

    @property
    def laplace_only(self) -> bool:
        """Whether everything together is releases with Laplace noise."""
        return bool(self.laplace) and not (self.mu or self.poisson or self.fixed or self.renyi_only)

    @property
    def renyi_only(self) -> bool:
        """Whether something is there that has no dominating pair."""
        return bool(self.selections or self.choices)

    @property
    def sampling(self) -> str:
        """How batches were formed, in a word."""
        kinds = [name for name, there in (("poisson", self.poisson), ("fixed_size", self.fixed)) if there]
        return "+".join(kinds) or "none"

    @property
    def max_order(self) -> float:
        """Order up to which the Rényi grid starts out."""
        orders = [largest_useful_order(sigma, q, self.group_size) for sigma, q in self.poisson] or [1e3]
        return min(CHANGE_OF_A_SUM[self.relation] * max(orders), MAX_ORDER)

    def cumulant(self, *, fixed_as_guess: bool = False) -> Cumulant:
        """Returns t ↦ Σ K(t), remembering what it was asked.

        Args:
            fixed_as_guess: Approximate fixed-size steps (no certified Rényi bound is offered for them).

        Raises:
            UnsupportedEventError: When fixed-size steps are present and may not be approximated.
        """
        if self.fixed and not fixed_as_guess:
            raise UnsupportedEventError(
                "Rényi accounting does not cover FixedSizeSampling here; ask the 'prv' or 'auto' accountant"
            )
        sampled = _sampled(self.relation, self.group_size)
        inner = [(search.cumulant(terms.cumulant()), n) for search, terms, n in self.selections]
        inner += [(_largest([terms.cumulant() for terms in alternatives]), n) for alternatives, n in self.choices]
        memory: dict[bytes, Array] = {}

        def cumulant(t: Array) -> Array:
            t = np.ascontiguousarray(t, dtype=float)
            key = t.tobytes()
            if key not in memory:
                total = 0.5 * self.mu**2 * t * (t + 1.0)
                for (sigma, q), n in self.poisson.items():
                    total = total + n * _memoised(sampled, sigma, q, t, key)
                for (sigma, q), n in self.fixed.items():
                    total = total + n * _memoised(subsampled_gaussian_cumulant, 0.5 * sigma, q, t, key)
                for scale, n in self.laplace.items():
                    total = total + n * laplace_cumulant(scale, t)
                for several, n in inner:
                    total = total + n * several(t)
                memory[key] = total
            return memory[key]

        return cumulant

    def directions(self) -> list[list[tuple[DominatingPair, int]]]:
        """Returns, for each direction of the relation, the dominating pairs with their counts.

        Raises:
            UnsupportedEventError: When a private selection or a choice is present, which have no dominating pair.
        """
        if self.renyi_only:
            raise UnsupportedEventError(
                f"{'PrivateSelection' if self.selections else 'AnyOf'} is covered by Rényi accounting only; ask the "
                "'rdp' or 'auto' accountant"
            )
        both: list[tuple[DominatingPair, int]] = []
        if self.mu:
            both.append((GaussianPair(self.mu), 1))
        both += [(FixedSizeGaussianPair(sigma, q), n) for (sigma, q), n in self.fixed.items()]
        both += [(LaplacePair(scale), n) for scale, n in self.laplace.items()]
        if not self.poisson:
            return [both]
        pairs = [self.pairs(sigma, q) for sigma, q in self.poisson]
        return [
            both + list(zip(direction, self.poisson.values(), strict=True)) for direction in zip(*pairs, strict=True)
        ]

    def pairs(self, sigma: float, q: float) -> list[DominatingPair]:
        """The pairs of a Poisson-sampled step, one for each direction of the relation."""
        return _pairs(self.relation, self.group_size, sigma, q)

    def grouped(self, limit: int) -> Terms:
        """Returns terms with at most `limit` distinct Poisson phases, never of smaller loss.

        Each σ is rounded down and each q up on a geometric grid, the finest that is coarse enough;
        the loss grows when σ falls and when q rises, since more rows of a group are drawn then. `grouping` holds the
        relative grid width.
        """
        if len(self.poisson) <= limit:
            return self
        width = 2e-5
        while True:
            phases: Phases = {}
            for (sigma, q), n in self.poisson.items():
                key = _round_down(sigma, width), min(1.0 / _round_down(1.0 / q, width), 1.0 - 1e-12)
                key = key[0], max(key[1], q)
                phases[key] = phases.get(key, 0) + n
            if len(phases) <= limit:
                return replace(self, poisson=phases, grouping=width)
            width *= 1.5

    def rough(self, limit: int) -> Terms:
        """Returns terms of about the same loss with at most `limit` distinct Poisson phases: a guess, and no bound.

        Neighbouring σ of one q become one, which keeps Σ n/σ².
        """
        width = 1e-3
        while len(self.poisson) > limit:
            found: dict[tuple[int, float], tuple[float, int]] = {}
            for (sigma, q), n in self.poisson.items():
                key = round(math.log(sigma) / width), q
                inverse, count = found.get(key, (0.0, 0))
                found[key] = inverse + n / sigma**2, count + n
            if len(found) <= limit or width > 1e3:
                return replace(self, poisson={(math.sqrt(n / inverse), q): n for (_, q), (inverse, n) in found.items()})
            width *= 1.5
        return self


@lru_cache(maxsize=64)
def _sampled(relation: Relation, group_size: int) -> Callable[[float, float, Array], Array]:
    """(σ, q, t) ↦ K(t) of a Poisson-sampled step."""
    if group_size > 1:
        return partial(group_cumulant, group_size=group_size, replacing=relation == REPLACE_ONE)
    return replace_one_cumulant if relation == REPLACE_ONE else subsampled_gaussian_cumulant


def _pairs(relation: Relation, group_size: int, sigma: float, q: float) -> list[DominatingPair]:
    """See `Terms.pairs`."""
    if relation == REPLACE_ONE:
        return [ReplaceGroupPoissonPair(sigma, q, group_size) if group_size > 1 else ReplaceOnePoissonPair(sigma, q)]
    if group_size > 1:
        return [GroupPoissonPair(sigma, q, group_size, adding) for adding in (False, True)]
    return [PoissonGaussianPair(sigma, q, adding) for adding in (False, True)]


def _largest(cumulants: list[Cumulant]) -> Cumulant:
    def cumulant(t: Array) -> Array:
        value: Array = np.max([one(t) for one in cumulants], axis=0)
        return value

    return cumulant


def _round_down(value: float, width: float) -> float:
    step = math.log1p(width)
    return min(math.exp(math.floor(math.log(value) / step) * step), value)


_memory: dict[tuple[Any, ...], Array] = {}


def _memoised(function: Any, sigma: float, q: float, t: Array, key: bytes) -> Array:
    entry = (function, sigma, q, key)
    if entry not in _memory:
        if len(_memory) > 2048:
            _memory.clear()
        _memory[entry] = function(sigma, q, t)
    return _memory[entry]


class Collection:
    """Lines of a ledger as they come in.

    Args:
        relation: The neighbouring relation.
        group_size: k: neighbours differ by so many rows. What all of them enter changes k times as much.
    """

    def __init__(self, relation: Relation, group_size: int = 1) -> None:
        self._terms = Terms(relation, group_size)
        self._squares: list[float] = []

    def copy(self) -> Collection:
        """Returns another one to go on with."""
        collection = Collection(self._terms.relation, self._terms.group_size)
        collection._terms, collection._squares = self._terms.copy(), self._squares[:]
        return collection

    def terms(self) -> Terms:
        """Returns the terms of all lines so far."""
        return replace(self._terms.copy(), mu=math.sqrt(math.fsum(self._squares)))

    def add(self, entries: Iterable[tuple[Any, int]]) -> None:
        """Adds lines, (event, count).

        Raises:
            UnsupportedEventError: When an event, or its sampling under this relation, is not understood.
        """
        terms, squares = self._terms, self._squares
        relation, group_size = terms.relation, terms.group_size
        sensitivity = CHANGE_OF_A_SUM[relation] * group_size
        for event, n in flatten(entries):
            if isinstance(event, (events.GaussianStep, events.GaussianVectorStep)):
                sigma, sampling = event.noise_multiplier, event.sampling
                if isinstance(sampling, events.PoissonSampling):
                    q = sampling.sample_rate
                    if 0.0 < q < 1.0:
                        terms.poisson[sigma, q] = terms.poisson.get((sigma, q), 0) + n
                    elif q == 1.0:
                        squares.append(n * (sensitivity / sigma) ** 2)
                elif isinstance(sampling, events.NoSampling):
                    squares.append(n * (sensitivity / sigma) ** 2)
                elif isinstance(sampling, events.FixedSizeSampling):
                    if relation != REPLACE_ONE:
                        raise UnsupportedEventError(
                            f"{event!r} under {relation!r}: a fixed batch size has no neighbours of another size; "
                            "use a replace_one ledger, or draw the batches by Poisson sampling"
                        )
                    q = sampling.sample_rate
                    if q == 1.0:
                        squares.append(n * (sensitivity / sigma) ** 2)
                    elif q > 0.0:
                        if group_size > 1:
                            raise UnsupportedEventError(
                                f"{event!r} for a person with {group_size} rows: fixed-size batches are covered row by "
                                "row only; draw them by Poisson sampling, or let one person be one row"
                            )
                        terms.fixed[sigma, q] = terms.fixed.get((sigma, q), 0) + n
                else:
                    raise UnsupportedEventError(f"unknown sampling {sampling!r} of {event!r}")
            elif isinstance(event, (events.GaussianRelease, events.ShuffledEpoch)):
                squares.append(n * (sensitivity / event.noise_multiplier) ** 2)
            elif isinstance(event, events.LaplaceRelease):
                scale = event.noise_multiplier / sensitivity
                terms.laplace[scale] = terms.laplace.get(scale, 0) + n
            elif isinstance(event, PrivateSelection):
                terms.selections.append((event, collect(event.trial, relation, group_size), n))
            elif isinstance(event, AnyOf):
                terms.choices.append(([collect(several, relation, group_size) for several in event.alternatives], n))
            else:
                raise UnsupportedEventError(f"no engine understands the event {event!r}")


def collect(entries: Iterable[tuple[Any, int]], relation: Relation, group_size: int = 1) -> Terms:
    """Returns the terms of a ledger's lines; arguments and errors are those of `Collection`."""
    collection = Collection(relation, group_size)
    collection.add(entries)
    return collection.terms()
