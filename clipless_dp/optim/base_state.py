"""What a base optimizer keeps between steps (momentum, second moments): what private steps have left, and nothing else.

A method of the base optimizer that is called between the passes and the step (``update_hessian()`` of Sophia), or a
state that is assigned or loaded, may hold gradients as they were before the noise. So each step leaves marks on the
state, and the next one begins with a look whether it is as marked, or is that of a new optimizer.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from clipless_dp.distributed import placement
from clipless_dp.errors import PrivacyError
from clipless_dp.sampling import fingerprints

_Place = tuple[object, ...]


class _Marks:
    """A state as a step left it.

    Args:
        optimizer: whose.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._held: dict[_Place, tuple[ref[Tensor], int] | object] = {
            place: (ref(value), _version(value)) if isinstance(value, Tensor) else value
            for place, _, value in _values(optimizer)
        }
        # Of one tensor some numbers: what is written beneath the counters goes into all of a kind, as a rule.
        some = [value for _, _, value in _values(optimizer) if isinstance(value, Tensor) and value.numel() > 1]
        self._looked_at = secrets.choice(some) if some else None
        self._sample = None if self._looked_at is None else fingerprints.sample(placement.local(self._looked_at))

    def hold(self, optimizer: Optimizer) -> bool:
        """Whether all is as it was, but for what is gone."""
        return self._numbers_hold() and all(self.fit(place, value) for place, _, value in _values(optimizer))

    def _numbers_hold(self) -> bool:
        some = self._looked_at
        return some is None or self._sample is None or fingerprints.sample(placement.local(some)) == self._sample

    def fit(self, place: _Place, value: Any) -> bool:
        """Whether a value is the one that was there, or holds what that did."""
        mark = self._held.get(place)
        if not isinstance(mark, tuple):
            return mark is value or (not isinstance(value, Tensor) and mark == value)
        known = mark[0]()
        if known is not None and known is value:
            return _version(known) == mark[1] and (known is not self._looked_at or self._numbers_hold())
        if known is None or not isinstance(value, Tensor) or _version(known) != mark[1]:
            return False
        return known.shape == value.shape and known.dtype == value.dtype and _equal(known, value)


_marks: WeakKeyDictionary[Optimizer, _Marks] = WeakKeyDictionary()


def note(optimizer: Optimizer) -> None:
    """The state is one that a private step has left, or was loaded together with its ledger."""
    _marks[optimizer] = _Marks(optimizer)


def refuse_other_state(optimizer: Optimizer) -> None:
    """Refuses a state that is neither as it was noted nor that of a new optimizer; one may be cleared at any time.

    Raises:
        PrivacyError: something else has written to it.
    """
    marks = _marks.get(optimizer)
    if marks is not None and marks.hold(optimizer):
        return
    for place, parameter, value in _values(optimizer):
        if (
            _is_new(place, parameter, value)
            if marks is None
            else _is_reset(parameter, value) or marks.fit(place, value)
        ):
            continue
        raise PrivacyError(
            f"{place[1]!r} in the state of the base optimizer, a {type(optimizer).__name__}, was not left by a private "
            "step: by steps from before, a method that reads gradients as they are (update_hessian()), an assignment, "
            "or a state that was loaded into it. No noise protects what is in it. Make a new optimizer, or clear its "
            "state (optimizer.state.clear()); load states into the private optimizer. Nothing was released"
        )


def _version(tensor: Tensor) -> int:
    return placement.local(tensor)._version


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the state, or a schedule's note, tells that an optimizer has taken steps."""
    # torch's schedules note it, also of those that keep no state.
    noted = bool(getattr(optimizer, "_opt_called", False))
    return noted or not all(_is_new(*found) for found in _values(optimizer))


def _values(optimizer: Optimizer) -> Iterator[tuple[_Place, object, object]]:
    """Tensors and numbers of a state: where they are, of which parameter, and they."""
    for key, held in optimizer.state.items():
        place = key if isinstance(key, str) else id(key)
        for name, value in held.items() if isinstance(held, dict) else (("", held),):
            if isinstance(value, (Tensor, int, float)):
                yield (place, name), key, value
            elif isinstance(value, (Mapping, list, tuple)):
                yield from _within((place, name), key, value)


def _within(place: _Place, key: object, value: Any) -> Iterator[tuple[_Place, object, object]]:
    for name, one in value.items() if isinstance(value, Mapping) else enumerate(value):
        if isinstance(one, (Tensor, int, float)):
            yield (*place, name), key, one
        elif isinstance(one, (Mapping, list, tuple)):
            yield from _within((*place, name), key, one)


def _is_new(place: _Place, parameter: object, value: object) -> bool:
    """Whether a constructor may have left this: no steps yet, one number throughout, or the parameter itself."""
    if not isinstance(value, Tensor):
        return place[-1] != "step" or not value
    if value.numel() == 1:
        return place[-1] != "step" or not bool(value.any())
    return _is_reset(parameter, value) or bool((value == value.flatten()[0]).all())


def _is_reset(parameter: object, value: object) -> bool:
    """Whether a number is zero, or a tensor is of zeros or a copy of the parameter."""
    if not isinstance(value, Tensor):
        return not value
    if isinstance(parameter, Tensor) and value.shape == parameter.shape and _equal(value, parameter):
        return True
    return not bool(value.detach().any())


def _equal(one: Tensor, other: Tensor) -> bool:
    with torch.no_grad():
        return bool((one.detach() == other.detach().to(one.device, one.dtype)).all())
