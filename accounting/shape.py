"""What a privacy statement holds, by kinds of values: looked at before anything in it is believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import LedgerFormatError

__all__ = ["FORMATS", "require_statement"]

FORMATS = {"clipless_dp.privacy_statement": 2, "clipless_dp.ledger_statement": 1}
"""The versions that are read, of each kind up to this one."""

_LARGEST = 1 << 62
Kind = Callable[[Any], bool]


def require_statement(name: str, facts: Any) -> None:
    """Refuses what is no privacy statement of a known version.

    Args:
        name: of its file, for messages.
        facts: what JSON made of it.

    Raises:
        LedgerFormatError: it is of another format or version, or a value is missing or is none that can be.
    """
    try:
        wrong = next(_wrong(facts), None)
    except RecursionError:
        wrong = "it is nested too deeply"
    if wrong is not None:
        raise LedgerFormatError(f"{name} is no privacy statement that is read here, or was altered: {wrong}")


def _wrong(facts: Any) -> Iterator[str]:
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), str):
        yield "it names no format"
        return
    kind, version = facts["format"], facts.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMATS.get(kind, 0):
        yield f"format {kind!r}, version {version!r}"
        return
    yield from _unwritable({name: value for name, value in facts.items() if name != "ledger"})
    for path, is_one in {**_COMMON, **(_OF_LEDGERS if "ledger" in kind else _OF_RESULTS)}.items():
        yield from _lacking(facts, path, path.rstrip("?").split("."), is_one)


def _lacking(value: Any, path: str, names: list[str], is_one: Kind) -> Iterator[str]:
    """Follows names to what they are of; ``*`` stands for each of a list, and a last ``?`` for what may be missing."""
    if not names:
        if not is_one(value):
            yield f"{path.rstrip('?')} cannot be {str(value)[:60]!r}"
        return
    first, *others = names
    if value is None and path.endswith("?"):
        return
    if first == "*":
        if not isinstance(value, list):
            yield f"{path.rstrip('?')} is no list"
            return
        for one in value:
            yield from _lacking(one, path, others, is_one)
    elif not isinstance(value, dict) or first not in value:
        if not path.endswith("?"):
            yield f"{path} is missing"
    else:
        yield from _lacking(value[first], path, others, is_one)


def _unwritable(value: Any) -> Iterator[str]:
    """What no file in JSON and UTF-8 holds, although Python's reader makes it of one."""
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield f"{value[:60]!r} is no text"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{value!r} is no number"
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from _unwritable(name)
            yield from _unwritable(one)
    elif isinstance(value, list):
        for one in value:
            yield from _unwritable(one)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def _is_delta(value: Any) -> bool:
    """None below the smallest numbers that are kept in full, of which no engine computes."""
    return _is_number(value) and (value == 0.0 or 1e-300 <= value < 1.0)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _or_none(kind: Kind) -> Kind:
    return lambda value: value is None or kind(value)


_COMMON: dict[str, Kind] = {
    "title": _is_text,
    "relation": _is_text,
    "created": _is_text,
    "findings": _is_texts,
    "not_covered": lambda value: _is_texts(value) and bool(value),
    "epsilon.epsilon": _or_none(_is_number),
    "epsilon.delta": _is_delta,
    "epsilon.curve.*.epsilon": _or_none(_is_number),
    "epsilon.curve.*.delta": _is_delta,
    "epsilon.curve.*.lower?": _or_none(_is_number),
    "risk?": _or_none(lambda value: isinstance(value, dict) and bool(value.get("curve"))),
    "about?": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
}
_OF_LEDGERS: dict[str, Kind] = {"counted.*": lambda value: value in ("row", "person"), "table": _is_text}
_OF_RESULTS: dict[str, Kind] = {
    "unit": _is_text,
    "counted?": lambda value: value in ("row", "person"),
    "dataset_size": lambda value: _is_count(value) and value > 0,
    "sampling.sample_rate": lambda value: _is_number(value) and 0.0 <= value <= 1.0,
    "sampling.expected_batch_size": _is_number,
    "sampling.drawn?": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "steps.recorded": _is_count,
    "steps.taken": _is_count,
    "steps.entries.*.event": _is_text,
    "steps.entries.*.noise_multiplier": _or_none(_is_number),
    "steps.entries.*.sample_rate": _is_number,
    "steps.entries.*.count": lambda value: _is_count(value) and value > 0,
    "noise.sources": _is_texts,
    "noise.deviations": _is_numbers,
    "bounds.total": _is_number,
    "bounds.relation": lambda value: value == "add-or-remove-one",
    "bounds.per_parameter": _is_numbers,
    "learning_rates.*.rates.*": _or_none(_is_number),
    "learning_rates.*.count": _is_count,
    "weights?": _or_none(lambda value: isinstance(value, dict)),
    "weights.as_counted?": lambda value: isinstance(value, bool),
    "weights.uncounted_changes?": _is_count,
    "weights.changed_settings?": _is_texts,
    "weights.changed_bounds?": _is_texts,
    "notes": _is_texts,
    "audits.*.kind": _is_text,
    "audits.*.text": _is_text,
    "audits.*.passed": _or_none(lambda value: isinstance(value, bool)),
}
