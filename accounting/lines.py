"""Lines of a ledger: equal neighbours put together, by one thread at a time, and what the first ones amount to."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .events import Event, GaussianRelease
from .provenance import Provenance, Unit

__all__ = ["UNKNOWN", "Closed", "Line", "Taker", "Turn", "begins", "together"]

UNKNOWN = Provenance()
"""Of lines that nobody has told anything about."""


@dataclass(frozen=True)
class Line:
    """Equal events of one provenance, one after the other.

    Attributes:
        event: What was released.
        count: How often.
        provenance: Whose it is, and what it rests on.
    """

    event: Event
    count: int
    provenance: Provenance = UNKNOWN

    @property
    def key(self) -> str:
        """What tells in two ledgers whether they hold the same: the release's own identity, or its run; or empty."""
        identity = self.event.identity if isinstance(self.event, GaussianRelease) else ""
        return f"release {identity}" if identity else self.provenance.run


@dataclass(frozen=True)
class Closed:
    """The first lines of a ledger, which do not change any more, and what they amount to."""

    lines: int = 0
    events: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    units: frozenset[Unit] = frozenset()

    def and_then(self, lines: Sequence[Line]) -> Closed:
        """These and further lines, which do not change any more either."""
        counts = Counter(self.counts)
        for line in lines:
            if line.key:
                counts[line.key] += line.count
        units = self.units.union(line.provenance.unit for line in lines)
        return Closed(self.lines + len(lines), self.events + sum(line.count for line in lines), counts, units)


class Taker:
    """Who takes a turn, as long as it lives and has not let go, in the process that it is of."""

    def __init__(self) -> None:
        self.process: int | None = os.getpid()


class Turn:
    """A turn at putting lines together. It is over once who took it lives no more, however that came to its end.

    A lock that an exception leaves behind before anybody is to release it would be held for ever.
    """

    def __init__(self) -> None:
        self._taken: dict[None, weakref.ref[Taker]] = {}
        self._next: dict[None, Turn] = {}

    def or_next(self, taker: Taker) -> tuple[Turn, bool]:
        """The first turn that is not over, and whether it is this taker's now."""
        turn = self
        while True:
            # One operation each: of several threads one takes a turn, and all see the same next one.
            by = turn._taken.setdefault(None, weakref.ref(taker))()
            if by is taker or (by is not None and by.process == taker.process):
                return turn, by is taker
            turn = turn._next.setdefault(None, Turn())


def together(lines: Iterable[Line]) -> list[Line]:
    """The same lines, equal neighbours of one provenance on one."""
    found: list[Line] = []
    for line in lines:
        before = found[-1] if found else None
        if before is not None and before.event == line.event and before.provenance == line.provenance:
            found[-1] = Line(line.event, before.count + line.count, line.provenance)
        else:
            found.append(line)
    return found


def begins(lines: Sequence[Line], start: Sequence[Line]) -> bool:
    """Whether lines are these ones, perhaps with further events behind them."""
    if not start:
        return True
    last = len(start) - 1
    if len(lines) <= last or lines[:last] != start[:last]:
        return False
    mine, its = lines[last], start[last]
    return (mine.event, mine.provenance) == (its.event, its.provenance) and mine.count >= its.count
