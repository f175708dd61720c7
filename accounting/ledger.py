"""The append-only record of everything that was released."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import _validation as check
from .errors import (
    AccountingError,
    InvalidParameterError,
    LedgerFormatError,
    MixedUnitsError,
    UnsupportedEventError,
)
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
from .lines import UNKNOWN, Closed, Line, Taker, Turn, begins, together
from .provenance import Provenance, Unit

__all__ = ["FORMAT", "VERSION", "Ledger", "Line"]

FORMAT = "accounting.ledger"
VERSION = 2
_READ = (1, VERSION)
_LOOSE = 16
"""Lines that may wait for being put together."""


class Ledger:
    """Events in the order in which they happened, equal neighbours of one run counted on one line.

    Several threads may append to it, and an exception may come in at any place, such as that of Ctrl-C: what was
    recorded stays, and an event is recorded wholly or not at all.

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
        # What happened goes to the end, in one operation. What reads puts equal neighbours together, in one operation
        # too, which changes nothing of what is read. So nothing is ever taken away to be put back.
        self._record: list[Line] = []
        self._closed = Closed()
        self._turn = Turn()

    def __getstate__(self) -> dict[str, Any]:
        return {"relation": self.relation, "_lines": self.lines}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["relation"])  # type: ignore[misc]
        # Pickles of before lines had a provenance hold pairs.
        for event, count in state.get("_entries", ()):
            self._put(event, count)
        for line in state.get("_lines", ()):
            self._put(line.event, line.count, line.provenance)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        return self.copy()

    @property
    def lines(self) -> list[Line]:
        """The lines as they are kept: equal events of different provenance apart."""
        self._compact()
        closed = self._closed.lines
        record = self._record[:]
        return record[:closed] + together(record[closed:])

    @property
    def entries(self) -> list[tuple[Event, int]]:
        """What was released: (event, count), equal neighbours together, whosever they are."""
        entries: list[tuple[Event, int]] = []
        for line in self.lines:
            count = line.count
            if entries and entries[-1][0] == line.event:
                count += entries.pop()[1]
            entries.append((line.event, count))
        return entries

    def __iter__(self) -> Iterator[tuple[Event, int]]:
        return iter(self.entries)

    def __len__(self) -> int:
        """Number of events, each repetition counted."""
        closed, open_lines = self._totals()
        return closed.events + sum(line.count for line in open_lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ledger):
            return NotImplemented
        return self.relation == other.relation and self.lines == other.lines

    __hash__ = None  # type: ignore[assignment]

    def copy(self) -> Ledger:
        """Returns a ledger of its own with the same lines."""
        copied = Ledger(self.relation)
        copied._record = self.lines
        return copied

    def append(self, event: Event, count: int = 1, provenance: Provenance = UNKNOWN) -> None:
        """Records `count` further events.

        Args:
            event: What was released.
            count: How often.
            provenance: Whose it is. Only who takes a run's events may append under its identity.

        Raises:
            InvalidParameterError: When `count` is negative or fractional.
            MixedUnitsError: When there are lines about another unit than the provenance names.
            UnsupportedEventError: When `event` is not an event.
        """
        if check.count(count, "count") and self.units - {provenance.unit}:
            about, other = ("people", "rows") if provenance.unit == "" else ("rows", "people")
            raise MixedUnitsError(
                f"this ledger is about {about}, and the event about {other}, so that their ε would not add up. Release "
                "all of it about people (groups= of statistics and fit, Provenance(unit='person') of what is recorded "
                "by hand), keep two ledgers, or, where each person has one row only, say so by "
                f"accountant.ledger = accountant.ledger.about({provenance.unit!r})"
            )
        self._put(event, count, provenance)

    def _put(self, event: Event, count: int = 1, provenance: Provenance = UNKNOWN) -> None:
        """Records events of whichever unit: what is read was mixed where it was written."""
        count = check.count(count, "count")
        lines = []
        for single, n in flatten([(event, count)]):
            if not hasattr(single, "kind") or isinstance(single, (str, bytes)):
                raise UnsupportedEventError(f"{single!r} is not an event; see accounting.events")
            if n:
                lines.append(Line(single, n, provenance))
        self._record.extend(lines)
        if len(self._record) - self._closed.lines > _LOOSE:
            self._compact()

    def _totals(self) -> tuple[Closed, list[Line]]:
        """What the closed lines amount to, and the lines behind them."""
        self._compact()
        closed = self._closed
        return closed, self._record[closed.lines :]

    def lines_from(self, number: int) -> tuple[list[Line], list[Line]]:
        """The lines from this number on: first those that do not change any more, then the others."""
        closed, open_lines = self._totals()
        return self._record[number : closed.lines], open_lines

    def _compact(self) -> None:
        """Puts equal neighbours together, unless that is being done already, by a thread or below a signal handler."""
        if len(self._record) - self._closed.lines < 2:
            return
        mine = Taker()
        try:
            self._turn, taken = self._turn.or_next(mine)
            if not taken:
                return
            first = self._closed.lines
            loose = self._record[first:]
            lines = together(loose)
            # What others append meanwhile is behind these.
            self._record[first : first + len(loose)] = lines
            self._closed = self._closed.and_then(lines[:-1])
        finally:
            # The traceback of an exception may hold it.
            mine.process = None

    def count(self, run: str) -> int:
        """Number of events of a run."""
        if not run:
            return 0
        closed = self._closed
        # A list, not a generator: every step asks.
        return closed.counts.get(run, 0) + sum([line.count for line in self._record[closed.lines :] if line.key == run])

    @property
    def runs(self) -> dict[str, int]:
        """Number of events of each run, and of each release that has an identity."""
        closed, open_lines = self._totals()
        return dict(closed.and_then(open_lines).counts)

    def starts_with(self, start: Ledger) -> bool:
        """Whether this ledger is `start`, of the same runs, perhaps with further events behind it."""
        return self.relation == start.relation and begins(self.lines, start.lines)

    def merge(self, other: Ledger) -> Ledger:
        """Returns what happened according to either ledger: sequential composition on the same data.

        Of a run, or of a release with an identity, that is in both, the longer record is taken. What has no identity,
        and a run of whose two records neither is the beginning of the other, is added, however alike it looks.

        Raises:
            InvalidParameterError: When the two are about different neighbouring relations.
            MixedUnitsError: When they are about different units.

        Guarantee:
            The result holds every event of either ledger, provided that runs with one identity are one run.
        """
        if other.relation != self.relation:
            raise InvalidParameterError(f"ledgers about {self.relation!r} and {other.relation!r} cannot be merged")
        if self.units | other.units > {""}:
            raise MixedUnitsError(
                "one ledger is about rows and the other about people, whose ε do not add up: where each person has one "
                "row only, say so by ledger.about('person')"
            )
        merged = self.copy()
        known: dict[str, int] = {}
        conflicting = set()
        own_runs = merged.runs
        for run in own_runs.keys() & other.runs.keys():
            own, its = merged._of(run), other._of(run)
            if begins(own, its) or begins(its, own):
                known[run] = own_runs[run]
            else:
                conflicting.add(run)
        for line in other.lines:
            held = min(line.count, known.get(line.key, 0))
            if held:
                known[line.key] -= held
            provenance = replace(line.provenance, run="") if line.key in conflicting else line.provenance
            merged.append(line.event, line.count - held, provenance)
        return merged

    @property
    def units(self) -> set[Unit]:
        """What the lines are about: `"person"`, or, empty, a record; of a ledger without lines nothing."""
        closed = self._closed
        return {*closed.units, *[line.provenance.unit for line in self._record[closed.lines :]]}

    def require_one_unit(self) -> None:
        """Refuses a ledger of rows and people, as an earlier version may have written, and as a file may hold.

        Raises:
            MixedUnitsError: When it is one.
        """
        if len(self.units) > 1:
            raise MixedUnitsError(
                "some lines of this ledger are about rows and others about people, so that no ε of either follows from "
                "all of them: take the lines apart, or, where each person has one row only, say so by "
                "accountant.ledger = accountant.ledger.about('person')"
            )

    def about(self, unit: Unit) -> Ledger:
        """Returns the ledger as one about people, or rows: right only where each person has no more than one row.

        Raises:
            InvalidParameterError: When there is no such unit.
        """
        told = Ledger(self.relation)
        for line in self.lines:
            told.append(line.event, line.count, replace(line.provenance, unit=unit))
        return told

    def _of(self, run: str) -> list[Line]:
        """What a run released, equal neighbours together; of a release its identity tells enough."""
        own = Ledger(self.relation)
        for line in self.lines:
            if line.key == run:
                own._put(line.event, line.count, line.provenance if run == line.provenance.run else UNKNOWN)
        return own.lines

    def attributed(self, provenance: Provenance) -> Ledger:
        """Returns the ledger with this provenance on the lines that have none, which stay about rows.

        Raises:
            MixedUnitsError: When there are such lines, and the provenance is about people.
        """
        if provenance.unit != UNKNOWN.unit and any(line.provenance == UNKNOWN for line in self.lines):
            raise MixedUnitsError(
                "lines without a provenance are about rows, and this provenance is about people: where each person has "
                "one row only, say so by ledger.about('person'), and else leave the unit out"
            )
        attributed = Ledger(self.relation)
        for line in self.lines:
            attributed._put(line.event, line.count, provenance if line.provenance == UNKNOWN else line.provenance)
        return attributed

    def scaled(self, factor: float) -> Ledger:
        """Returns the ledger with every noise multiplier times `factor`: a plan, which nobody has carried out yet."""
        scaled = Ledger(self.relation)
        for line in self.lines:
            event = from_dict(_scale(to_dict(line.event), factor))
            scaled._put(event, line.count, Provenance(unit=line.provenance.unit))
        return scaled

    def history(self, unit: Unit = "") -> list[tuple[float, float, int]]:
        """Returns (noise_multiplier, sample_rate, steps) lines, as other accountants keep them.

        Args:
            unit: What whoever reads them takes them to be about, which the lines themselves do not say: rows.

        Raises:
            MixedUnitsError: When the ledger is about another unit.
            UnsupportedEventError: When a line is not a step with Poisson or no sampling.
        """
        if self.units - {unit}:
            raise MixedUnitsError(
                "steps as (σ, q, steps) do not say what they are about, and whoever reads them takes them for steps of "
                "rows: this ledger is about people. Keep it as it is (state_dict, ledger.save), or say "
                "ledger.history('person') where you keep the unit yourself"
                if unit == ""
                else "this ledger is not about people, or not all of it: ask for ledger.history()"
            )
        lines = []
        for event, count in self.entries:
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
            "entries": [
                {"event": to_dict(line.event), "count": line.count}
                | ({"provenance": line.provenance.to_dict()} if line.provenance != UNKNOWN else {})
                for line in self.lines
            ],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Ledger:
        """Returns the ledger that `state_dict` described.

        Raises:
            LedgerFormatError: When it is not a ledger, incomplete, or of an unknown version.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise LedgerFormatError(f"not a ledger: expected a mapping with format {FORMAT!r}")
        if state.get("version") not in _READ:
            raise LedgerFormatError(
                f"unknown ledger version {state.get('version')!r}: this release reads up to version {VERSION}; "
                "update the package that reads it"
            )
        try:
            ledger = cls(state["relation"])
            entries = state["entries"]
            if not isinstance(entries, (list, tuple)):
                raise LedgerFormatError(f"the entries of a ledger are a list, got {type(entries).__name__}")
            for line in entries:
                provenance = Provenance.from_dict(line.get("provenance", {}))
                ledger._put(from_dict(line["event"]), line["count"], provenance)
        except LedgerFormatError:
            raise
        except (AttributeError, KeyError, TypeError, OverflowError, RecursionError, InvalidParameterError) as error:
            raise LedgerFormatError(f"the ledger is incomplete, or was altered: {error!r}") from error
        return ledger

    def to_json(self) -> str:
        """Returns the ledger as JSON."""
        return json.dumps(self.state_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Returns the ledger that `to_json` wrote, or the one in an accountant's state or a privacy statement.

        Raises:
            LedgerFormatError: When the text is truncated or not a ledger of a known version.
        """
        try:
            state = json.loads(text)
        except (ValueError, RecursionError) as error:  # Overlong numbers and deep nesting are no JSON errors.
            raise LedgerFormatError(f"not JSON, perhaps a truncated file: {error}") from error
        while isinstance(state, dict) and state.get("format") != FORMAT and isinstance(state.get("ledger"), dict):
            state = state["ledger"]
        return cls.from_state_dict(state)

    def save(self, path: str | Path) -> None:
        """Writes the ledger as JSON, replacing the file in one move."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(self.to_json() + "\n", encoding="utf-8")
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Reads a ledger written by `save`, or the one in the JSON file of a privacy statement.

        Raises:
            LedgerFormatError: When the file holds no ledger of a known version; it is named.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (AccountingError, UnicodeDecodeError) as error:
            raise LedgerFormatError(f"{path} is no ledger: {error}") from error

    def table(self) -> str:
        """Returns the ledger as aligned text: what was released, and where that is known, whose it is."""
        rows = [("count", "event", "noise multiplier", "sampling", "unit", "drawn", "source of the noise", "run")]
        for line in self.lines:
            event, provenance = line.event, line.provenance
            sampling = getattr(event, "sampling", None)
            noise = getattr(event, "noise_multiplier", None)
            rows.append(
                (
                    str(line.count),
                    event.kind,
                    "" if noise is None else f"{noise:.6g}",
                    "" if sampling is None else _describe(sampling),
                    provenance.unit,
                    provenance.sampling,
                    provenance.noise.rpartition(".")[2],
                    provenance.run[:8],
                )
            )
        shown = [column for column in zip(*rows, strict=True) if any(column[1:]) or column[0] in rows[0][:4]]
        widths = [max(map(len, column)) for column in shown]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in zip(*shown, strict=True)
        ]
        return "\n".join([f"relation: {self.relation}", *lines])

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"Ledger(relation={self.relation!r}, lines={len(self.lines)}, events={len(self)})"


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
