"""Numbers in attributes of layers of a user's own: what they set themselves is told from what a loop sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from types import MemberDescriptorType
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

Numbers = Mapping[tuple[str, str], object]
"""What tells numbers apart, by the path of the module that has one and its name."""

_moving: WeakKeyDictionary[nn.Module, set[tuple[str, str]]] = WeakKeyDictionary()

_NUMBERS = (bool, int, float, complex, str, type(None), np.generic, Enum, Fraction, Decimal)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def numbers_of(layer: nn.Module) -> Numbers:
    """Numbers, switches and names among the attributes of a layer and its parts, and of their classes; the mode, too.

    Those of torch's own modules' making are left out.
    """
    return {
        (path, name): _mark(value)
        for path, part in layer.named_modules()
        for name, value in _attributes_of(part).items()
        if isinstance(value, _NUMBERS) and name not in _OF_EVERY_MODULE
    }


def _attributes_of(module: nn.Module) -> dict[str, object]:
    """Without running code of the module's, or of its classes'."""
    found: dict[str, object] = {}
    for kind in reversed(type(module).__mro__):
        if kind not in (nn.Module, object):
            for name, value in vars(kind).items():
                if isinstance(value, MemberDescriptorType):
                    # Of __slots__.
                    value = value.__get__(module) if _is_set(value, module) else Ellipsis
                elif name.startswith("__"):
                    continue
                found[name] = value
    return found | vars(module)


def _is_set(slot: MemberDescriptorType, module: nn.Module) -> bool:
    try:
        slot.__get__(module)
    except AttributeError:
        return False
    return True


def _mark(value: object) -> tuple[type, object]:
    """A number as values of Python's own: others may compare as they like, or change in place."""
    kind = type(value)
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if isinstance(value, Enum):
        return kind, value.name
    for plain in (int, float, complex, str):
        if isinstance(value, plain):
            return kind, plain.__repr__(value)
    if isinstance(value, Fraction):
        return kind, (value.numerator, value.denominator)
    return kind, Decimal.__repr__(value) if isinstance(value, Decimal) else None


def moved_by(layer: nn.Module) -> Set[tuple[str, str]]:
    """Which of its numbers a layer has set itself when it ran, one way or the other."""
    return _moving.get(layer, frozenset())


def note_moved(layer: nn.Module, before: Numbers) -> None:
    """A layer has run, in whose attributes there were these numbers before: those that changed are its own to set."""
    now = numbers_of(layer)
    moved = {name for name in {*now, *before} if now.get(name) != before.get(name)}
    _moving.setdefault(layer, set()).update(moved)


@contextmanager
def moving(layer: nn.Module) -> Iterator[None]:
    """The layer runs within, to its end or not."""
    before = numbers_of(layer)
    try:
        yield
    finally:
        note_moved(layer, before)
