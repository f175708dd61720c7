"""What a base optimizer keeps between steps (momentum, second moments): what private steps have left, and nothing else.

A method of the base optimizer that is called between the passes and the step (``update_hessian()`` of Sophia), or a
state that is assigned or loaded, may hold gradients as they were before the noise. So each step leaves marks on the
state, and the next one begins with a look whether it is as marked, or is that of a new optimizer. The state is what
lies in ``state``, of optimizers within it too, and tensors in attributes of the optimizer and of its parameters, and in
its groups. Numbers there are settings, which schedules change.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipless_dp.distributed import placement
from clipless_dp.errors import PrivacyError
from clipless_dp.optim.around import OF_TORCH, everything, is_plain, nested
from clipless_dp.sampling import fingerprints

_Place = tuple[object, ...]
"""In what of the base optimizer, of which part of that, and under which name; and further within."""

_Found = tuple[_Place, object, Any]


class _Mark(NamedTuple):
    """A tensor, which nothing is kept alive for and no number of which is read, or an array's numbers."""

    tensor: ref[Tensor] | None
    version: int
    numbers: Tensor | None


def _mark_of(value: object) -> object:
    if isinstance(value, Tensor):
        return _Mark(ref(value), _version(value), None)
    return _Mark(None, 0, _tensor(value)) if isinstance(value, np.ndarray) else value


class _Marks:
    """Values as they were left.

    Args:
        found: where they are, and they.
    """

    def __init__(self, found: Iterable[_Found]) -> None:
        values = [*found]
        self._held = {place: _mark_of(value) for place, _, value in values}
        # Of one tensor some numbers: what is written beneath the counters goes into all of a kind, as a rule.
        some = [value for _, _, value in values if isinstance(value, Tensor) and value.numel() > 1]
        self._looked_at = secrets.choice(some) if some else None
        self._sample = None if self._looked_at is None else fingerprints.sample(placement.local(self._looked_at))

    def replace(self, found: Iterable[_Found], replaced: Callable[[_Place], bool]) -> None:
        """These are there now, in place of what was at certain places."""
        kept = {place: mark for place, mark in self._held.items() if not replaced(place)}
        self._held = {**kept, **{place: _mark_of(value) for place, _, value in found}}

    def first_other(self, found: Iterable[_Found]) -> _Found | None:
        """The first value that is not as it was left, nor reset, if there is one; some may be gone."""
        values = [*found]
        if self._numbers_hold() and all(self._fit(place, value) for place, _, value in values):
            return None
        others = (one for one in values if not (_is_reset(*one[1:]) or self._fit(one[0], one[2])))
        return next(others, None)

    def _numbers_hold(self) -> bool:
        some = self._looked_at
        return some is None or self._sample is None or fingerprints.sample(placement.local(some)) == self._sample

    def _fit(self, place: _Place, value: Any) -> bool:
        """Whether a value is the one that was there, or holds what that did."""
        mark = self._held.get(place)
        if not isinstance(mark, _Mark):
            return mark is value or (not isinstance(value, (Tensor, np.ndarray)) and bool(mark == value))
        if mark.numbers is not None:
            return isinstance(value, np.ndarray) and _same(_tensor(value), mark.numbers)
        known = None if mark.tensor is None else mark.tensor()
        if known is None or not isinstance(value, Tensor) or _version(known) != mark.version:
            return False
        if known is value:
            return value is not self._looked_at or self._numbers_hold()
        # Swapped to and fro.
        return known.dtype == value.dtype and _same(known, value)


class _Noted(NamedTuple):
    """What was left in the optimizer's own state, and in all else; of a plain one, as long as it is plain, the latter
    stays what it was at first: neither the step nor a look at it was concerned with it."""

    own: _Marks
    rest: _Marks


_noted: WeakKeyDictionary[Optimizer, _Noted] = WeakKeyDictionary()
_seen: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
"""Whether the last look before a step was at all of it."""


def note(optimizer: Optimizer) -> None:
    """The state is one that a private step has left."""
    before = _noted.get(optimizer)
    rest = _Marks(_rest(optimizer)) if before is None or _seen.get(optimizer, False) else before.rest
    _noted[optimizer] = _Noted(_Marks(_own(optimizer)), rest)


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """The state that is loaded within comes together with its ledger. All else has to be as it was.

    Optimizers whose ``load_state_dict`` fills what they keep elsewhere may do so, where all there was as it was left.
    Gradients, which need not be private by then, are put aside meanwhile.
    """
    before = _noted.get(optimizer) or _Noted(_Marks(()), _Marks(()))
    elsewhere = (one for one in _rest(optimizer) if not _is_loaded(one[0]))
    holds = before.rest.first_other(elsewhere) is None
    parameters = {id(one): one for some in nested(optimizer) for group in some.param_groups for one in group["params"]}
    gradients = [(parameter, parameter.grad) for parameter in parameters.values()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    rest = _Marks(_rest(optimizer)) if holds else before.rest
    if not holds:
        rest.replace((one for one in _rest(optimizer) if _is_loaded(one[0])), _is_loaded)
    _noted[optimizer] = _Noted(_Marks(_own(optimizer)), rest)


def _is_loaded(place: _Place) -> bool:
    """Whether this is in groups of the optimizer itself, which are a part of what is loaded."""
    return place[0] == _GROUP and isinstance(place[1], tuple) and place[1][0] == 0


def refuse_other_state(optimizer: Optimizer) -> None:
    """Refuses a state that is neither as it was noted nor that of a new optimizer; one may be cleared at any time.

    Raises:
        PrivacyError: something else has written to it.
    """
    noted = _noted.get(optimizer)
    if noted is None:
        # A constructor may have made any tensors of its own beside it.
        other = next((found for found in _values(optimizer) if not _is_new(*found)), None)
    else:
        other = noted.own.first_other(_own(optimizer))
        # A plain one reads nothing else.
        _seen[optimizer] = whole = not is_plain(optimizer)
        if other is None and whole:
            other = noted.rest.first_other(_rest(optimizer))
    if other is not None:
        place = other[0]
        raise PrivacyError(
            f"{place[2]!r} in {place[0]} of the base optimizer, a {type(optimizer).__name__}, was not left by a "
            "private step: by steps from before, a method that reads gradients as they are (update_hessian()), an "
            "assignment, or a state that was loaded into it. No noise protects what is in it. Make a new optimizer, or "
            "clear its state (optimizer.state.clear()) and what it keeps elsewhere; load states into the private "
            "optimizer. Nothing was released"
        )


def _version(tensor: Tensor) -> int:
    return placement.local(tensor)._version


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the state, or a schedule's note, tells that an optimizer has taken steps."""
    # torch's schedules note it, also of those that keep no state.
    noted = bool(getattr(optimizer, "_opt_called", False))
    return noted or not all(_is_new(*found) for found in _values(optimizer))


def _values(optimizer: Optimizer) -> Iterator[_Found]:
    """Tensors and numbers of the states of all optimizers that take part."""
    for number, one in enumerate(everything(optimizer)):
        yield from _own(one, number)


def _own(optimizer: Optimizer, number: int = 0) -> Iterator[_Found]:
    """Tensors and numbers of one state: where they are, of which parameter, and they."""
    for key, held in optimizer.state.items():
        place = "the state", (number, key if isinstance(key, str) else id(key))
        for name, value in held.items() if isinstance(held, dict) else (("", held),):
            yield from _within((*place, name), key, value)


def _rest(optimizer: Optimizer) -> Iterator[_Found]:
    """All that is beside an optimizer's own state: states within, and tensors in attributes, parameters and groups."""
    optimizers = nested(optimizer)
    for number, some in enumerate(optimizers):
        if some is not optimizer:
            yield from _own(some, number)
    parameters = {id(one): one for some in optimizers for group in some.param_groups for one in group["params"]}
    # Which are known, and are as private.
    known = {*parameters, *(id(one.grad) for one in parameters.values())}
    places: list[tuple[_Place, object, Mapping[str, Any]]] = []
    for number, some in enumerate(optimizers):
        places.append((("an attribute", number), None, {k: v for k, v in vars(some).items() if k not in OF_TORCH}))
        places += [((_GROUP, (number, at)), None, group) for at, group in enumerate(some.param_groups)]
    places += [(("an attribute of a parameter", key), one, one.__dict__) for key, one in parameters.items()]
    for place, owner, held in places:
        for name, value in held.items():
            if isinstance(value, _KEPT) and name != "params":
                for found in _within((*place, name), owner, value):
                    one = found[2]
                    if (isinstance(one, Tensor) and one.numel() > 1 and id(one) not in known) or (
                        isinstance(one, np.ndarray) and one.size > 1
                    ):
                        yield found


_GROUP = "a group"
_PARAMETERS = (nn.ParameterList, nn.ParameterDict)
_KEPT = (Tensor, np.ndarray, Mapping, list, tuple, deque, set, frozenset, *_PARAMETERS)


def _within(place: _Place, key: object, value: Any, around: tuple[int, ...] = ()) -> Iterator[_Found]:
    if isinstance(value, (Tensor, int, float)) or (
        isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub"
    ):
        yield place, key, value
        return
    if id(value) in around:
        return
    if isinstance(value, (Mapping, nn.ParameterDict)):
        # Parameters compare by their numbers.
        held: Iterable[tuple[object, object]] = (
            (id(name) if isinstance(name, Tensor) else name, one) for name, one in value.items()
        )
    elif isinstance(value, _KEPT):
        held = enumerate(value)
    elif isinstance(value, (nn.Module, Optimizer, type)) or callable(value):
        return
    else:
        held = getattr(value, "__dict__", {}).items()
    for name, one in held:
        yield from _within((*place, name), key, one, (*around, id(value)))


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy, since arrays of some kinds and strides are none of torch's."""
    return torch.from_numpy(array.astype(np.float64))


def _is_new(place: _Place, parameter: object, value: object) -> bool:
    """Whether a constructor may have left this: no steps yet, one number throughout, or the parameter itself."""
    value = _tensor(value) if isinstance(value, np.ndarray) else value
    if not isinstance(value, Tensor):
        return place[-1] != "step" or not value
    if value.numel() == 1:
        return place[-1] != "step" or not bool(value.any())
    return _is_reset(parameter, value) or bool((value == value.flatten()[0]).all())


def _is_reset(parameter: object, value: object) -> bool:
    """Whether a number is zero, or a tensor is of zeros or a copy of the parameter."""
    value = _tensor(value) if isinstance(value, np.ndarray) else value
    if not isinstance(value, Tensor):
        return not value
    if isinstance(parameter, Tensor) and value.shape == parameter.shape and _equal(value, parameter):
        return True
    return not bool(value.detach().any())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and _equal(one, other)


def _equal(one: Tensor, other: Tensor) -> bool:
    with torch.no_grad():
        return bool((one.detach() == other.detach().to(one.device, one.dtype)).all())
