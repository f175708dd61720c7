"""The append-only record of everything that was released."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import _validation as check
from .errors import AccountingError, InvalidParameterError, LedgerFormatError, UnsupportedEventError
from .events import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    Event,
    GaussianStep,
    GaussianVectorStep,
    NoSampling,
    PoissonSampling,
    Relation,
    flatten,
    from_dict,
    to_dict,
)

__all__ = ["FORMAT", "VERSION", "Ledger"]

FORMAT = "accounting.ledger"
VERSION = 1


class Ledger:
    """Events in the order in which they happened, equal neighbours counted on one line.

    Args:
        relation: The neighbouring relation that the guarantee is about: two data sets are neighbours
            when one results from the other by adding or removing one record, or by replacing one.
    """

    def __init__(self, relation: Relation = ADD_OR_REMOVE_ONE) -> None:
        if relation not in (ADD_OR_REMOVE_ONE, REPLACE_ONE):
            raise InvalidParameterError(
                f"unknown neighbouring relation {relation!r}: {ADD_OR_REMOVE_ONE!r} or {REPLACE_ONE!r}"
            )
        self.relation: Relation = relation
        self._entries: list[tuple[Event, int]] = []

    @property
    def entries(self) -> list[tuple[Event, int]]:
        """The lines: (event, count)."""
        return list(self._entries)

    def __iter__(self) -> Iterator[tuple[Event, int]]:
        return iter(self.entries)

    def __len__(self) -> int:
        """Number of events, each repetition counted."""
        return sum(count for _, count in self._entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ledger):
            return NotImplemented
        return self.relation == other.relation and self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def append(self, event: Event, count: int = 1) -> None:
        """Records `count` further events.

        Raises:
            InvalidParameterError: When `count` is negative or fractional.
            UnsupportedEventError: When `event` is not an event.
        """
        count = check.count(count, "count")
        for single, n in flatten([(event, count)]):
            if not hasattr(single, "kind") or isinstance(single, (str, bytes)):
                raise UnsupportedEventError(f"{single!r} is not an event; see accounting.events")
            if n == 0:
                continue
            if self._entries and self._entries[-1][0] == single:
                n += self._entries.pop()[1]
            self._entries.append((single, n))

    def starts_with(self, start: Ledger) -> bool:
        """Whether this ledger is `start`, perhaps with further events behind it."""
        if not start._entries or self.relation != start.relation:
            return self.relation == start.relation
        last = len(start._entries) - 1
        if len(self._entries) <= last or self._entries[:last] != start._entries[:last]:
            return False
        (event, count), (final, fewest) = self._entries[last], start._entries[last]
        return event == final and count >= fewest

    def merge(self, other: Ledger) -> Ledger:
        """Returns this ledger followed by another: sequential composition on the same data.

        Raises:
            InvalidParameterError: When the two are about different neighbouring relations.
        """
        if other.relation != self.relation:
            raise InvalidParameterError(f"ledgers about {self.relation!r} and {other.relation!r} cannot be merged")
        merged = Ledger(self.relation)
        for event, count in (*self._entries, *other._entries):
            merged.append(event, count)
        return merged

    def scaled(self, factor: float) -> Ledger:
        """Returns the ledger with every noise multiplier times `factor`."""
        scaled = Ledger(self.relation)
        for event, count in self._entries:
            data = to_dict(event)
            scaled.append(from_dict(_scale(data, factor)), count)
        return scaled

    def history(self) -> list[tuple[float, float, int]]:
        """Returns (noise_multiplier, sample_rate, steps) lines, as other accountants keep them.

        Raises:
            UnsupportedEventError: When a line is not a step with Poisson or no sampling.
        """
        lines = []
        for event, count in self._entries:
            if not isinstance(event, (GaussianStep, GaussianVectorStep)):
                raise UnsupportedEventError(f"{event!r} has no place in a (σ, q, steps) history; use the ledger")
            if isinstance(event.sampling, NoSampling):
                rate = 1.0
            elif isinstance(event.sampling, PoissonSampling):
                rate = event.sampling.sample_rate
            else:
                raise UnsupportedEventError(f"{event!r} has no place in a (σ, q, steps) history; use the ledger")
            lines.append((event.noise_multiplier, rate, count))
        return lines

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings, lists and dicts, with a format version."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "relation": self.relation,
            "entries": [{"event": to_dict(event), "count": count} for event, count in self._entries],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Ledger:
        """Returns the ledger that `state_dict` described.

        Raises:
            LedgerFormatError: When it is not a ledger, incomplete, or of an unknown version.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise LedgerFormatError(f"not a ledger: expected a mapping with format {FORMAT!r}")
        if state.get("version") != VERSION:
            raise LedgerFormatError(
                f"unknown ledger version {state.get('version')!r}: this release reads version {VERSION}; "
                "update the package that reads it"
            )
        try:
            ledger = cls(state["relation"])
            for line in state["entries"]:
                ledger.append(from_dict(line["event"]), line["count"])
        except (KeyError, TypeError, RecursionError) as error:
            raise LedgerFormatError(f"the ledger is incomplete: {error!r}") from error
        return ledger

    def to_json(self) -> str:
        """Returns the ledger as JSON."""
        return json.dumps(self.state_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Returns the ledger that `to_json` wrote.

        Raises:
            LedgerFormatError: When the text is truncated or not a ledger of a known version.
        """
        try:
            state = json.loads(text)
        except (ValueError, RecursionError) as error:  # Overlong numbers and deep nesting are no JSON errors.
            raise LedgerFormatError(f"not JSON, perhaps a truncated file: {error}") from error
        return cls.from_state_dict(state)

    def save(self, path: str | Path) -> None:
        """Writes the ledger as JSON, replacing the file in one move."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_json() + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Reads a ledger written by `save`.

        Raises:
            LedgerFormatError: When the file holds no ledger of a known version; it is named.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (AccountingError, UnicodeDecodeError) as error:
            raise LedgerFormatError(f"{path} is no ledger: {error}") from error

    def table(self) -> str:
        """Returns the ledger as aligned text, one line per run of equal events."""
        rows = [("count", "event", "noise multiplier", "sampling")]
        for event, count in self._entries:
            sampling = getattr(event, "sampling", None)
            noise = getattr(event, "noise_multiplier", None)
            rows.append(
                (
                    str(count),
                    event.kind,
                    "" if noise is None else f"{noise:.6g}",
                    "" if sampling is None else _describe(sampling),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"relation: {self.relation}", *lines])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"Ledger(relation={self.relation!r}, lines={len(self._entries)}, events={len(self)})"


def _describe(sampling: Any) -> str:
    if isinstance(sampling, NoSampling):
        return "none"
    if isinstance(sampling, PoissonSampling):
        return f"poisson q={sampling.sample_rate:.6g}"
    return f"fixed size {sampling.batch_size} of {sampling.dataset_size}"


def _scale(data: Any, factor: float) -> Any:
    if isinstance(data, dict):
        return {
            key: _scale_number(value, factor) if key.startswith("noise_multiplier") else _scale(value, factor)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [_scale(item, factor) for item in data]
    return data


def _scale_number(value: Any, factor: float) -> Any:
    return [v * factor for v in value] if isinstance(value, list) else value * factor
