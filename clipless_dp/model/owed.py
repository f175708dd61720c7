"""Passes whose private gradients were computed, and which are owed to a step until it releases them.

They are owed for parameters, not for a model: a network may be wrapped more than once, and what one wrapper has
computed may move the weights that another one passes by.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor

from clipless_dp.model.passes import Pass

_MOST = 4096
"""Passes that are kept of those that no step takes: that there are some is known by the latest."""

_keys = itertools.count(1)


class Owed:
    """What is owed for some parameters, in the order in which it was computed.

    Attributes:
        key: by which draws that were left out know these parameters.
        lock: held where their gradients are filled or looked at, see :class:`clipless_dp.model.turns.Turns`.
        passes: whose gradients were computed, and neither released nor skipped.
        wrappers: what turns are taken by, of each model that has such parameters.
    """

    def __init__(self) -> None:
        self.key = next(_keys)
        self.lock = threading.RLock()
        self.passes: list[Pass] = []
        self.wrappers: WeakSet[object] = WeakSet()

    def note(self, computed: Pass) -> None:
        """Notes a pass once."""
        if all(computed is not other for other in self.passes):
            self.passes.append(computed)
            del self.passes[:-_MOST]

    def strike(self, done: Iterable[Pass]) -> None:
        """Nothing is owed of these any more."""
        gone = {id(one) for one in done}
        self.passes[:] = [one for one in self.passes if id(one) not in gone]


class _Hung:
    """An attribute of a parameter; what copies of the parameter take along is for another one, and tells nothing."""

    NAME = "_clipless_dp_owed"

    def __init__(self, parameter: Tensor, owed: Owed) -> None:
        self.owner, self.owed = id(parameter), owed

    def __reduce__(self) -> tuple[type[OrderedDict[Any, Any]], tuple[()]]:
        # Something that files of weights alone may hold.
        return OrderedDict, ()


def _of(parameter: Tensor) -> Owed | None:
    hung = parameter.__dict__.get(_Hung.NAME)
    return hung.owed if isinstance(hung, _Hung) and hung.owner == id(parameter) else None


def for_all(parameters: Sequence[Tensor], known: Iterable[Owed]) -> list[Owed]:
    """What is owed for any of these parameters, those that nothing is known of included.

    Args:
        parameters: of one model.
        known: what was found before, which torch may have swapped off its parameters.
    """
    found = {one.key: one for one in known}
    if len(found) == 1:
        # Nearly always all are of one: several times in each step.
        (only,) = found.values()
        for parameter in parameters:
            hung = parameter.__dict__.get(_Hung.NAME)
            if type(hung) is not _Hung or hung.owed is not only or hung.owner != id(parameter):
                break
        else:
            return [only]
    bare = []
    for parameter in parameters:
        one = _of(parameter)
        if one is None:
            bare.append(parameter)
        else:
            found[one.key] = one
    if bare or not found:
        own = Owed()
        found[own.key] = own
        for parameter in bare:
            setattr(parameter, _Hung.NAME, _Hung(parameter, own))
    return list(found.values())
