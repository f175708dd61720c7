"""What a curve says of itself, read before a statement repeats it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: object) -> bool:
    """An accuracy with its interval."""
    if not isinstance(value, Mapping) or not all(_is_number(value.get(name)) for name in ("low", "value", "high")):
        return False
    # Ends of an interval of nothing or of all samples are computed apart from the share.
    low, middle, high = (float(value[name]) for name in ("low", "value", "high"))
    return -1e-9 <= low <= middle + 1e-9 and middle <= high + 1e-9 and high <= 1.0 + 1e-9


def _is_point(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and _is_number(value.get("radius"))
        and value["radius"] >= 0.0
        and _is_share(value.get("certified"))
        and "attacked" in value
        and (value["attacked"] is None or _is_share(value["attacked"]))
    )


def _all(kind: Callable[[object], bool], *, some: bool = False) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(kind, value)) and (bool(value) or not some)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _may_lack(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or kind(value)


_FIELDS: dict[str, Callable[[object], bool]] = {
    "assumptions": _all(_is_text, some=True),
    "attacks": _all(_is_text),
    "average_radius": _may_lack(_is_number),
    "clean": _is_share,
    "data": _is_text,
    "input_norm": _may_lack(lambda value: _is_number(value) and float(value) > 0.0),  # type: ignore[arg-type]
    "level": lambda value: _is_number(value) and 0.0 < float(value) < 1.0,  # type: ignore[arg-type]
    "lipschitz": _may_lack(lambda value: _is_number(value) and float(value) >= 0.0),  # type: ignore[arg-type]
    "method": _is_text,
    "points": _all(_is_point, some=True),
    "samples": _is_count,
    "weights": _may_lack(_is_text),
}
_LATER: dict[str, Callable[[object], bool]] = {"answers": _may_lack(_is_text), "function": _may_lack(_is_text)}
"""What certificates of former versions do not hold."""


def check_described(robustness: object) -> None:
    """Refuses what no curve says of itself.

    Raises:
        ConfigurationError: it is no mapping, or a value in it is missing or of another kind.
    """
    wanted = "robustness must be what a curve says of itself, robustness.curve(...).described('which public data')"
    if not isinstance(robustness, Mapping):
        raise ConfigurationError(f"{wanted}, got {type(robustness).__name__}")
    held: Mapping[Any, Any] = robustness
    missing = sorted(_FIELDS.keys() - held.keys())
    if missing:
        raise ConfigurationError(f"{wanted}: {', '.join(missing)} is missing")
    for name, kind in {**_FIELDS, **_LATER}.items():
        if name in held and not kind(held[name]):
            raise ConfigurationError(f"{wanted}: {name} cannot be {shown(held[name])}")
