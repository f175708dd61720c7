"""What an accountant keeps of its answers: for a ledger that only grows, and only as long as it is the same one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .bounds import PrivacyBound
from .events import Event
from .growing import Growing, GrowingRenyi, Limit
from .ledger import Ledger
from .terms import Collection, Terms

__all__ = ["Answers"]

_MOST = 64
_FEW = 8
"""Distinct phases up to which composing anew takes no longer than growing."""
_GROWTH = 1.05


@dataclass(frozen=True, eq=False)
class _Collected:
    """The lines of a ledger that do not change any more, put together."""

    relation: str
    group_size: int
    lines: int
    collection: Collection


@dataclass(frozen=True, eq=False)
class _Grown:
    """Sums of the recorded terms, and of these with a trial, towards one limit.

    Attributes:
        sums: To begin from, the latest first.
        tried: How many steps there were when sums were last laid out, or could not be.
    """

    limit: Limit
    sums: tuple[Growing | GrowingRenyi, ...]
    tried: int


class Answers:
    """Answers about one ledger.

    Each is kept in one operation, and is never changed: threads may share it, and an exception may come in at any
    place. A copy, or a pickle, begins empty.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._bounds: dict[tuple[Any, ...], PrivacyBound] = {}
        self._collected: _Collected | None = None
        self._grown: _Grown | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def state(self) -> tuple[Any, ...]:
        """What tells the ledger from itself at another time: it only grows, by at least one event."""
        return self._ledger.relation, len(self._ledger)

    def bound(self, key: tuple[Any, ...]) -> PrivacyBound | None:
        """The answer that was kept, as an object of its own."""
        kept = self._bounds.get(key)
        return None if kept is None else copy.copy(kept)

    def keep(self, key: tuple[Any, ...], bound: PrivacyBound) -> None:
        """Keeps an answer; `key` begins with the `state` of before it was sought, so that it never lacks an event."""
        bounds = self._bounds
        if len(bounds) >= _MOST:
            bounds = {}
        self._bounds = {**bounds, key: copy.copy(bound)}

    def collection(self, group_size: int) -> Collection:
        """Everything recorded, put together, to go on with."""
        relation = self._ledger.relation
        kept = self._collected
        if kept is None or (kept.relation, kept.group_size) != (relation, group_size):
            kept = _Collected(relation, group_size, 0, Collection(relation, group_size))
        closed, open_lines = self._ledger.lines_from(kept.lines)
        collection = kept.collection.copy()
        if closed:
            collection.add((line.event, line.count) for line in closed)
            self._collected = _Collected(relation, group_size, kept.lines + len(closed), collection)
            collection = collection.copy()
        collection.add((line.event, line.count) for line in open_lines)
        return collection

    def fits(
        self, limit: Limit, trial: list[tuple[Event, int]], upper: Callable[[Terms, float], float], *, renyi: bool
    ) -> bool:
        """Whether everything recorded and a trial keep the limit.

        Args:
            limit: What is not to be exceeded.
            trial: Events and their counts.
            upper: (terms, δ) ↦ a certified upper bound of ε, composed anew.
            renyi: Whether Rényi accounting is to tell.
        """
        recorded = self.collection(1)
        both = recorded.copy()
        both.add(trial)
        terms = both.terms()
        if terms.empty or self.surely_within(limit, recorded.terms, terms, renyi=renyi):
            return True
        # Not "greater": a NaN fits no target.
        return upper(terms, limit.delta) <= limit.epsilon

    def surely_within(self, limit: Limit, recorded: Callable[[], Terms], trial: Terms, *, renyi: bool) -> bool:
        """Whether a trial certainly keeps the limit, told by sums that grow with the ledger; no says nothing.

        Args:
            limit: What is not to be exceeded.
            recorded: The ledger's terms.
            trial: These, and steps that are perhaps recorded next.
            renyi: Whether Rényi accounting is to tell.
        """
        if len(trial.poisson) <= _FEW:
            return False
        kept = self._grown
        if kept is None or kept.limit != limit:
            kept = _Grown(limit, (), 0)
        for sums in kept.sums:
            grown = sums.reaching(trial)
            if grown is not None:
                # Another layout would not tell more.
                if within := grown.within():
                    self._grown = _Grown(limit, (grown, sums), kept.tried)
                return within
        steps = sum(trial.poisson.values())
        if steps <= _GROWTH * kept.tried:
            return False
        # Laid out for what there is now.
        fresh = (GrowingRenyi if renyi else Growing).towards(limit, recorded())
        with_trial = None if fresh is None else fresh.reaching(trial)
        self._grown = _Grown(limit, tuple(sums for sums in (with_trial, fresh) if sums is not None), steps)
        return with_trial is not None and with_trial.within()
