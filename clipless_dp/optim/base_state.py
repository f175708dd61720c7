"""What a base optimizer keeps between steps (momentum, second moments): what private steps have left, and nothing else.

A method of the base optimizer that is called between the passes and the step (``update_hessian()`` of Sophia), or a
state that is assigned or loaded, may hold gradients as they were before the noise. So each step leaves marks on the
state, and the next one begins with a look whether it is as marked, or is that of a new optimizer. The state is what
lies in ``state``, of optimizers within it too, and tensors in attributes of the optimizer and of its parameters, and in
its groups; arrays, bytes, and more than a few numbers in one of these count as tensors. A few numbers are settings,
which schedules change.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from accounting.errors import warn_caller
from clipless_dp.distributed import placement
from clipless_dp.errors import PrivacyError, PrivacyWarning
from clipless_dp.optim.around import everything, is_known, is_plain
from clipless_dp.optim.holdings import (
    GROUP,
    SETTINGS,
    Found,
    Place,
    are_equal,
    are_same,
    as_tensor,
    bits_of,
    is_array,
    is_dense,
    is_number,
    own_of,
    rest_of,
    values_of,
    within,
)
from clipless_dp.sampling import fingerprints


class _Mark(NamedTuple):
    """A tensor, which nothing is kept alive for and no number of which is read, or the bits of an array or of bytes."""

    tensor: ref[Tensor] | None
    version: int
    bits: object


def _mark_of(value: object) -> object:
    if isinstance(value, Tensor):
        return _Mark(ref(value), _version(value), None)
    return _Mark(None, 0, bits_of(value)) if is_array(type(value)) else value


class _Marks:
    """Values as they were left.

    Args:
        found: where they are, and they.
    """

    def __init__(self, found: Iterable[Found]) -> None:
        values = [*found]
        self._held = {place: _mark_of(value) for place, _, value in values}
        # Of one tensor some numbers: what is written beneath the counters goes into all of a kind, as a rule.
        some = [value for _, _, value in values if isinstance(value, Tensor) and value.numel() > 1]
        chosen = secrets.choice(some) if some else None
        self._looked_at = chosen if chosen is None or is_dense(placement.local(chosen)) else None
        self._sample = None if self._looked_at is None else fingerprints.sample(placement.local(self._looked_at))

    def add(self, found: Iterable[Found]) -> None:
        """These are there now, in place of what was there, if anything was."""
        self._held.update((place, _mark_of(value)) for place, _, value in found)

    def first_other(self, found: Iterable[Found]) -> Found | None:
        """The first value that is not as it was left, nor reset, if there is one; some may be gone."""
        values = [*found]
        return None if self.hold(values) else next(self.others(values), None)

    def hold(self, values: Sequence[Found]) -> bool:
        """Whether all of these values are as they were left; some may be gone."""
        return self._numbers_hold() and all(self._fit(place, value) for place, _, value in values)

    def lack(self, values: Sequence[Found], besides: Iterable[Found] = ()) -> Place | None:
        """Where something was left that is not among these any more, or not as it was, if there is such a place.

        Args:
            values: what is there.
            besides: what is there too, and may be another by now.
        """
        there = {place for place, *_ in (*values, *besides)}
        gone = next((place for place in self._held if place not in there), None)
        if gone is not None or self.hold(values):
            return gone
        return next((place for place, _, value in values if not self._fit(place, value)), None)

    def others(self, found: Iterable[Found]) -> Iterator[Found]:
        """All of these values."""
        return (one for one in found if not (_is_reset(*one[1:]) or self._fit(one[0], one[2])))

    def _numbers_hold(self) -> bool:
        some = self._looked_at
        return some is None or self._sample is None or fingerprints.sample(placement.local(some)) == self._sample

    def _fit(self, place: Place, value: Any) -> bool:
        """Whether a value is the one that was there, or holds what that did."""
        mark = self._held.get(place)
        if not isinstance(mark, _Mark):
            return mark is value or (not isinstance(value, Tensor) and not is_array(type(value)) and mark == value)
        if mark.tensor is None:
            return is_array(type(value)) and bits_of(value) == mark.bits
        known = mark.tensor()
        if known is None or not isinstance(value, Tensor) or _version(known) != mark.version:
            return False
        if known is value:
            return value is not self._looked_at or self._numbers_hold()
        # Swapped to and fro.
        return known.dtype == value.dtype and are_same(known, value)


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
    whole = before is None or _seen.get(optimizer, False)
    # Gradients have their noise by now, and may be kept as they are; the next ones have not.
    rest = _Marks(rest_of(optimizer, gradients=True)) if before is None or whole else before.rest
    _noted[optimizer] = _Noted(_Marks(own_of(optimizer, whole=whole)), rest)


def settle_resets(optimizer: Optimizer) -> None:
    """What was cleared since the last step was so before private gradients are computed that might have decided it."""
    noted = _noted.get(optimizer)
    if noted is None:
        return
    whole = not is_plain(optimizer)
    own = [*own_of(optimizer, whole=whole)]
    if noted.own.lack(own) and noted.own.first_other(own) is None:
        noted = noted._replace(own=_Marks(own))
    # A gradient of the last step that something keeps has its noise, and may be in its parameter still.
    rest = [*rest_of(optimizer, gradients=True)] if whole else []
    if whole and noted.rest.lack(rest) and noted.rest.first_other(rest) is None:
        noted = noted._replace(rest=_Marks(rest))
    _noted[optimizer] = noted


def refuse_resets(optimizer: Optimizer) -> None:
    """Refuses what was cleared since :func:`settle_resets`.

    Raises:
        PrivacyError: something was.
    """
    noted = _noted.get(optimizer)
    if noted is None:
        return
    whole = not is_plain(optimizer)
    place = noted.own.lack([*own_of(optimizer, whole=whole)])
    if place is None and whole:
        # Gradients that are there are noised before they are read.
        place = noted.rest.lack([*rest_of(optimizer)], besides=rest_of(optimizer, gradients=True))
    if place is not None:
        raise PrivacyError(
            f"{place[2]!r} in {place[0]} of the base optimizer, a {type(optimizer).__name__}, was cleared between a "
            "pass and its step: a restart that private gradients decide releases them without noise. Clear it before "
            "the pass, where public numbers decide, and behind a refused step call skip_draw() first. Nothing was "
            "released"
        )


@contextmanager
def loading(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[None]:
    """The state that is loaded within comes together with its ledger. All else has to be as it was.

    Optimizers whose ``load_state_dict`` keeps entries of their own, or fills what they keep elsewhere, may do so where
    all was as it was left; else what equals a loaded value is the state, and nothing else. After an error nothing is
    noted.
    """
    before = _noted.get(optimizer) or _Noted(_Marks(()), _Marks(()))
    elsewhere = before.rest.first_other(rest_of(optimizer)) is None
    # A load may leave what it finds, or move it.
    holds = elsewhere and before.own.first_other(own_of(optimizer)) is None
    # What is loaded must not be what was written to: torch's states hold the tensors themselves.
    written = set() if holds else {_memory(value) for _, _, value in own_of(optimizer) if isinstance(value, Tensor)}
    loaded: dict[object, list[Any]] = {}
    for place, _, value in within((), None, state_dict, None):
        if not (isinstance(value, Tensor) and _memory(value) in written):
            loaded.setdefault(place[-1], []).append(value)
    yield
    if holds:
        _noted[optimizer] = _Noted(_Marks(own_of(optimizer)), _Marks(rest_of(optimizer)))
        return
    before.own.add(one for one in own_of(optimizer) if _is_loaded(one, loaded))
    before.rest.add(one for one in rest_of(optimizer) if one[0][0] == GROUP and _is_loaded(one, loaded))
    _noted[optimizer] = before


def _is_loaded(found: Found, loaded: Mapping[object, list[Any]]) -> bool:
    """Whether a value is one of those of its name that were loaded, up to the dtype of a parameter."""
    place, _, value = found
    for other in loaded.get(place[-1], ()):
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if are_same(value, other):
                return True
        elif type(value) is type(other) and (
            bits_of(value) == bits_of(other) if is_array(type(value)) else value == other
        ):
            return True
    return False


def _memory(value: Tensor) -> int:
    """Where the numbers of a tensor lie; of those that have no place, the tensor itself."""
    local = placement.local(value)
    return local.untyped_storage().data_ptr() if is_dense(local) else id(value)


def first_other(optimizer: Optimizer) -> Found | None:
    """What is neither as it was noted nor that of a new optimizer, if anything is; it may be cleared at any time."""
    noted = _noted.get(optimizer)
    if noted is None:
        # A constructor may have made any tensors of its own beside it.
        return next(_not_new(optimizer), None)
    # A plain one reads nothing else.
    _seen[optimizer] = whole = not is_plain(optimizer)
    other = noted.own.first_other(own_of(optimizer, whole=whole))
    return noted.rest.first_other(rest_of(optimizer)) if other is None and whole else other


def private_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state to save: what private steps have left, and where something else was written, groups' numbers alone.

    Args:
        optimizer: whose it is.
        state: what it says that it is.
    """
    noted, known = _noted.get(optimizer), first_other(optimizer) is None
    # Gradients that are there may be those of a pass.
    beside = [*noted.rest.others(rest_of(optimizer, gradients=True))] if known and noted is not None else []
    if known and (not beside or is_plain(optimizer)):
        # What a plain one's groups have besides, its steps do not read, and refuse nothing of it.
        left_out = {(place[1], place[2]) for place, *_ in beside if place[0] == GROUP}
        groups = [
            {name: value for name, value in group.items() if ((0, at), name) not in left_out}
            for at, group in enumerate(state["param_groups"])
        ]
        if left_out:
            warn_caller(
                f"{', '.join(sorted({repr(name) for _, name in left_out}))} in groups of the base optimizer changed "
                "between private steps, and may hold what no noise is on: left out of what is saved. Keep it beside "
                "the optimizer",
                PrivacyWarning,
            )
        try:
            return _copied({**state, "param_groups": groups})
        except (RuntimeError, TypeError):
            # What cannot be copied may be written to before it is saved.
            pass
    warn_caller(
        f"the state of the base optimizer, a {type(optimizer).__name__}, holds what no private step has left, such as "
        "a method made that reads gradients as they are: it is left out of what is saved. The ledger is in it; "
        "momentum and the like begin anew",
        PrivacyWarning,
    )
    return {"state": {}, "param_groups": _settings_of(state["param_groups"])}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy: torch hands out what it holds, which something else may write to before it is saved."""
    tensors = [value for _, _, value in within((), None, state, None) if isinstance(value, Tensor)]
    # Their numbers alone, not what hangs on them.
    return copy.deepcopy(state, {id(value): value.detach().clone() for value in tensors})


def _settings_of(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if name == "params" or _is_setting(value)} for group in groups
    ]


def _is_setting(value: object) -> bool:
    """Whether a value has no more numbers than a setting may have."""
    parts = tree_leaves(value)
    return len(parts) <= SETTINGS and all(one is None or isinstance(one, (bool, int, float, str)) for one in parts)


def refuse_other_state(optimizer: Optimizer) -> None:
    """Refuses what :func:`first_other` finds.

    Raises:
        PrivacyError: something else has written to the state.
    """
    other = first_other(optimizer)
    if other is not None:
        place = other[0]
        raise PrivacyError(
            f"{place[2]!r} in {place[0]} of the base optimizer, a {type(optimizer).__name__}, was not left by a "
            "private step: by steps from before, a method that reads gradients as they are (update_hessian()), an "
            "assignment, or a state that was loaded into it. No noise protects what is in it. Make a new optimizer, or "
            "clear its state (optimizer.state.clear()) and what it keeps elsewhere; load states into the private "
            "optimizer. Averages and copies of weights are not told from gradients there: keep them beside the "
            "optimizer and its parameters (clipless_dp.WeightAverage, a list of your own), or update them within the "
            "private step, by a hook of the base optimizer (base.register_step_post_hook(lambda *_: ...)). Nothing was "
            "released"
        )


def _version(tensor: Tensor) -> int:
    return placement.local(tensor)._version


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the state, or a schedule's note, tells that an optimizer has taken steps."""
    # torch's schedules note it, also of those that keep no state.
    noted = bool(getattr(optimizer, "_opt_called", False))
    return noted or next(_not_new(optimizer), None) is not None


def _not_new(optimizer: Optimizer) -> Iterator[Found]:
    """What no constructor has left."""
    # Such as the accumulator that Adagrad begins from.
    parts = [*everything(optimizer)]
    public = {value for one in parts for value in one.defaults.values() if type(value) in (int, float)}
    for place, parameter, value in values_of(optimizer):
        number = place[1][0] if place[0] == "the state" and isinstance(place[1], tuple) else None
        if isinstance(number, int) and is_known(parts[number]) and _is_moment(place, value):
            # These fill it with zeros, or with a setting.
            is_new = _is_one_of({0.0, *public}, value)
        else:
            is_new = _is_new(place, parameter, value) or (_is_moment(place, value) and _is_one_of(public, value))
        if not is_new:
            yield place, parameter, value


def _is_moment(place: Place, value: Any) -> bool:
    return place[-1] != "step" and isinstance(value, Tensor) and value.is_floating_point() and is_dense(value)


def _is_one_of(numbers: Collection[float], value: Tensor) -> bool:
    """Whether a tensor is one of some numbers throughout."""
    held = placement.local(value.detach())
    return any(bool((held == torch.tensor(number).to(held)).all()) for number in numbers)


def _is_new(place: Place, parameter: object, value: Any) -> bool:
    """Whether a constructor may have left this: no steps yet, one number throughout, or the parameter itself."""
    value = value if is_number(type(value)) else as_tensor(value)
    if not isinstance(value, Tensor):
        return place[-1] != "step" or not value
    if value.numel() == 1 and (place[-1] == "step" or not _has_one_entry(parameter)):
        return place[-1] != "step" or not bool(value.any())
    # One number is as much as a parameter of one entry has.
    return _is_reset(parameter, value) or (value.numel() > 1 and _is_constant(value))


def _has_one_entry(parameter: object) -> bool:
    return isinstance(parameter, Tensor) and parameter.numel() == 1


def _is_constant(value: Tensor) -> bool:
    return bool((value == value.flatten()[0]).all())


def _is_reset(parameter: object, value: Any) -> bool:
    """Whether a number is zero, or a tensor is of zeros or a copy of the parameter."""
    value = value if is_number(type(value)) else as_tensor(value)
    if not isinstance(value, Tensor):
        return not value
    if isinstance(parameter, Tensor) and value.shape == parameter.shape and are_equal(value, parameter):
        return True
    return not bool(value.detach().any())
