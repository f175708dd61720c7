"""What a base optimizer keeps between steps (momentum, second moments): what private steps have left, and nothing else.

A method of the base optimizer that is called between the passes and the step (``update_hessian()`` of Sophia), or a
state that is assigned or loaded, may hold gradients as they were before the noise. So each step leaves marks on the
state, and the next one begins with a look whether it is as marked, or is that of a new optimizer.
"""

from __future__ import annotations

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


class _Mark:
    """A tensor of a state as a step left it.

    Args:
        tensor: it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = ref(tensor)
        self._place = -1
        self.renew(tensor)

    def renew(self, tensor: Tensor) -> None:
        """The tensor, which is the same object, is as a further step left it."""
        local = placement.local(tensor)
        if self._place != local.data_ptr():
            self._place = local.data_ptr()
            # Some of its numbers, where they lie; None on other devices.
            self._entries = fingerprints.sampled(local) if local.numel() else None
        self.version = local._version
        self.sample = None if self._entries is None else self._entries.tobytes()

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor is the one that was marked, unchanged, or holds what that did."""
        local = placement.local(tensor)
        if self.tensor() is tensor and self.version == local._version and self._place == local.data_ptr():
            return self._entries is None or self._entries.tobytes() == self.sample
        known = self.tensor()
        if known is None:
            # What a copy was made of is gone, as where a state is moved, or loaded again.
            entries = fingerprints.sampled(local)
            return self.sample is not None and entries is not None and entries.tobytes() == self.sample
        if known is tensor or known.shape != tensor.shape or known.dtype != tensor.dtype:
            return False
        return self.fits(known) and _equal(known, tensor)


_marks: WeakKeyDictionary[Optimizer, dict[_Place, object]] = WeakKeyDictionary()


def note(optimizer: Optimizer) -> None:
    """The state is one that a private step has left, or was loaded together with its ledger."""
    before = _marks.get(optimizer, {})
    marks: dict[_Place, object] = {}
    for place, _, value in _values(optimizer):
        if isinstance(value, Tensor):
            mark = before.get(place)
            if isinstance(mark, _Mark) and mark.tensor() is value:
                mark.renew(value)
            else:
                mark = _Mark(value)
            marks[place] = mark
        else:
            marks[place] = value
    _marks[optimizer] = marks


def refuse_other_state(optimizer: Optimizer) -> None:
    """Refuses a state that is neither as it was noted nor that of a new optimizer; one may be cleared at any time.

    Raises:
        PrivacyError: something else has written to it.
    """
    known = _marks.get(optimizer)
    for place, parameter, value in _values(optimizer):
        if known is None:
            if _is_new(place, parameter, value):
                continue
        else:
            mark = known.get(place)
            if isinstance(mark, _Mark):
                same = isinstance(value, Tensor) and mark.fits(value)
            else:
                same = mark is value or (not isinstance(value, Tensor) and mark == value)
            if same:
                continue
            if _is_reset(parameter, value):
                continue
        raise PrivacyError(
            f"{place[1]!r} in the state of the base optimizer, a {type(optimizer).__name__}, was not left by a private "
            "step: by steps from before, a method that reads gradients as they are (update_hessian()), an assignment, "
            "or a state that was loaded into it. No noise protects what is in it. Make a new optimizer, or clear its "
            "state (optimizer.state.clear()); load states into the private optimizer. Nothing was released"
        )


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the state, or a schedule's note, tells that an optimizer has taken steps."""
    # torch's schedules note it, also of those that keep no state.
    noted = bool(getattr(optimizer, "_opt_called", False))
    return noted or not all(_is_new(*found) for found in _values(optimizer))


def _values(optimizer: Optimizer) -> Iterator[tuple[_Place, object, object]]:
    """Tensors and numbers of a state: where they are, of which parameter, and they."""
    for key, held in optimizer.state.items():
        place = key if isinstance(key, (str, int)) else id(key)
        for name, value in held.items() if isinstance(held, Mapping) else (("", held),):
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
