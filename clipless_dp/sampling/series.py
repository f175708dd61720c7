"""Draws in the series that a sampler makes of them, and rows of memory, which may be a draw's."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from clipless_dp.sampling.people import Classes, People


class Source:
    """A sampler, as its draws know it.

    Attributes:
        user: the optimizer that used a draw of it last, as long as it lives.
    """

    user: weakref.ref[object] | None = None

    def __reduce__(self) -> tuple[type[Source], tuple[()]]:
        return Source, ()

    def is_for(self, user: object) -> bool:
        """Whether nobody else has used a draw of it."""
        known = None if self.user is None else self.user()
        return known is None or known is user


class Series:
    """One iteration of a sampler: which of its draws have been used or skipped.

    Args:
        source: the sampler.

    Attributes:
        started: when its first draw was made, on the clock of all draws.
        ended: whether the iteration is over, or was left.
    """

    def __init__(self, source: Source | None = None) -> None:
        self.source = source or Source()
        self.started = next(clock)
        self.ended = False
        self._reached = 0
        self._closed: set[int] = set()

    def close(self, place: int) -> None:
        """The draw at a place was used or skipped, or nothing is to be said of it."""
        if place >= self._reached:
            self._closed.add(place)
        while self._reached in self._closed:
            self._closed.discard(self._reached)
            self._reached += 1

    def is_closed(self, place: int) -> bool:
        """Whether that was said of the draw at a place."""
        return place < self._reached or place in self._closed

    def close_before(self, place: int) -> int:
        """The same for all draws before one; returns how many of them had not been."""
        count = self.open_before(place)
        self._reached = max(self._reached, place)
        self._closed = {other for other in self._closed if other >= self._reached}
        return count

    def open_before(self, place: int, start: int = 0) -> int:
        """How many draws before one, from another on, were neither used nor skipped, handed out or not."""
        start = max(start, self._reached)
        return max(0, place - start - sum(start <= other < place for other in self._closed))


clock = itertools.count(1)
"""The clock that all draws share."""


@dataclass(eq=False)
class Draw:
    """One Poisson draw: every sample is in it with the same probability, independently.

    Attributes:
        sample_rate: the probability.
        seeded: whether a seed determines it.
        identity: then what it follows from: the seed and its number.
        series: the iteration of a sampler that it comes from.
        place: its number there.
        rows: how many rows of its batch are samples; they come first.
        amplifies: whether it was handed out where gradients are on. What is only looked at amplifies nothing.
        used: whether a step has used it up.
        delivered: when it was handed out, in turns of a clock that all draws share.
        thread: in which thread.
        reached: whether a loop is known to have it: a loader's workers may be ahead.
        tensors: its batch, while it is in hand.
        matched: behind which of its rows copies of others are sought first.
        left_by: the models, by the names that their parameters go by, that have left it out for good.
        original: makes its samples again, where that can be asked for.
        people: whose its rows are, where people were drawn, and the rate is theirs; else ``None``.
        classes: of rows of people, what their gradients are divided by.
    """

    sample_rate: float
    seeded: bool = False
    identity: tuple[object, ...] | None = None
    series: Series = field(default_factory=lambda: Series())
    place: int = 0
    rows: int = 0
    amplifies: bool = True
    used: bool = False
    delivered: int = 0
    thread: int = 0
    reached: bool = True
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)
    matched: int = field(default=0, repr=False)
    left_by: frozenset[int] = frozenset()
    original: Callable[[], Tensor] | None = field(default=None, repr=False)
    people: People | None = field(default=None, repr=False)
    classes: Classes = ()

    def divisors(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Of some rows of its batch: from where to where gradients are divided by what; padding is of the last class.

        Args:
            start: the first row.
            stop: the one behind the last.
        """
        found, reached = [], 0
        for place, (end, divisor) in enumerate(self.classes):
            end = max(end, stop) if place == len(self.classes) - 1 else end
            if max(start, reached) < min(stop, end):
                found.append((max(start, reached), min(stop, end), divisor))
            reached = end
        return found or [(start, stop, self.classes[-1][1] if self.classes else 1)]


class Rows(NamedTuple):
    """Rows of a tensor in memory.

    Attributes:
        base: names the tensor that they are a part of, also when it is gone.
        start: the first one.
        stop: the one behind the last.
        draw: what ``base`` is a draw of, if it is one.
    """

    base: int
    start: int
    stop: int
    draw: Draw | None = None

    def part(self, start: int, stop: int) -> Rows:
        """Some of these."""
        return Rows(self.base, self.start + start, self.start + stop, self.draw)


def span_of(inputs: Tensor, base: Tensor) -> tuple[int, int] | None:
    """Which rows of ``base`` these are, by their place in memory."""
    rows = len(inputs)
    if inputs is base:
        return 0, rows
    if base.dim() == 0 or len(base) == 0 or rows == 0:
        return 0, 0
    size = base[0].numel()
    if len(base) > 1 and base.stride(0) != size:
        return None
    step = inputs.storage_offset() - base.storage_offset()
    within = sum((length - 1) * stride for length, stride in zip(inputs.shape[1:], inputs.stride()[1:], strict=True))
    if rows > 1 and inputs.stride(0) != size:
        return None
    if size == 0 or step < 0 or step % size + within >= size:
        return None
    return step // size, step // size + rows


def overlapping(passed: list[Rows]) -> bool:
    """Whether a row is in two of these."""
    # Copies of a draw are the draw.
    kept: dict[Draw | int, list[tuple[int, int]]] = {}
    for rows in passed:
        kept.setdefault(rows.draw or rows.base, []).append((rows.start, rows.stop))
    return any(first[1] > second[0] for spans in kept.values() for first, second in itertools.pairwise(sorted(spans)))


def covered(passed: list[Rows], rows: int) -> bool:
    """Whether these, of one batch and apart, hold its first rows without a gap."""
    reached = 0
    for start, stop in sorted((some.start, some.stop) for some in passed):
        if start > reached:
            return reached >= rows
        reached = max(reached, stop)
    return reached >= rows
