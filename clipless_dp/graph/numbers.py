"""Numbers in attributes of layers of a user's own: what they set themselves is told from what a loop sets."""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import Enum
from fractions import Fraction
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

_moving: WeakKeyDictionary[nn.Module, set[tuple[str, str]]] = WeakKeyDictionary()

_NUMBERS = (bool, int, float, complex, str, type(None), np.generic, Enum, Fraction)


def attributes_of(module: nn.Module) -> dict[str, object]:
    """The attributes of a module, and of its classes down to torch's own, without running code of theirs."""
    kinds = type(module).__mro__
    own = kinds[: kinds.index(nn.Module)]
    return {name: value for held in (*map(vars, reversed(own)), vars(module)) for name, value in held.items()}


def numbers_of(layer: nn.Module) -> dict[tuple[str, str], object]:
    """Numbers, switches and names among the attributes of a layer and its parts, by path and name, but for the mode.

    Those of torch's own modules' making are left out.
    """
    return {
        (path, name): value
        for path, part in layer.named_modules()
        for name, value in attributes_of(part).items()
        if isinstance(value, _NUMBERS) and name not in _OF_EVERY_MODULE and not name.startswith("__")
    }


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def moved_by(layer: nn.Module) -> Set[tuple[str, str]]:
    """Which of its numbers a layer has set itself when it ran, one way or the other."""
    return _moving.get(layer, frozenset())


def note_moved(layer: nn.Module, before: Mapping[tuple[str, str], object]) -> None:
    """A layer has run, in whose attributes there were these numbers before: those that changed are its own to set."""
    now = numbers_of(layer)
    moved = {name for name, value in now.items() if name not in before or not is_same(before[name], value)}
    _moving.setdefault(layer, set()).update(moved)


def is_same(one: object, other: object) -> bool:
    """Whether a number is what it was, one that is none included."""
    return one is other or (type(one) is type(other) and bool(one == other or (one != one and other != other)))
