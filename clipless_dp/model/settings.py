"""What a module is set to, as a value that can be compared later, whatever the settings' types are."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from itertools import repeat
from operator import is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn

_TORCHS_OWN = frozenset({*vars(nn.Module()), "_is_fsdp_managed_module", "_fsdp_use_orig_params"})
"""Parameters, buffers, children and hooks, which are looked at elsewhere, and the mode, which bounds do not rest on;
and what ``fully_shard`` leaves on a module."""

_PLAIN = {NoneType, bool, int, float, complex, str, bytes, type, range, torch.dtype, torch.device, torch.Size}
_BY_IDENTITY = (FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_DEPTH = 12
"""How far objects within objects are followed."""


class _Same:
    """Compares an object with itself only, and keeps it, so that no other takes its place in memory."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]


class _Copy:
    """A tensor's numbers, compared bit by bit, so that a NaN is what it was."""

    def __init__(self, values: Tensor) -> None:
        self._kind = values.shape, values.dtype, values.device, values.layout
        self._bits = values.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Copy) and self._kind == other._kind and torch.equal(self._bits, other._bits)

    __hash__ = None  # type: ignore[assignment]


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Every attribute of a module that is its own, as :func:`snapshot` has it; not its parameters, buffers, children.

    Names that torch's tools reserve for themselves (``__…``) are left out.
    """
    return {
        name: snapshot(value)
        for name, value in vars(module).items()
        if name not in _TORCHS_OWN and not name.startswith("__")
    }


class Settings:
    """The settings of a module at one time.

    Args:
        module: the module.

    Attributes:
        module: the module.
        count: how many attributes it has.
        fixed: those, by name, that are the same as long as they are the same objects.
        lists: those that are lists of such, and what was in them.
        is_quick: whether these are all.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._known = settings_of(module)
        values = vars(module)
        self.count = len(values)
        own = [(name, values[name]) for name in self._known]
        # What cannot change in place is the same as long as it is the same object.
        self.fixed = [(name, value) for name, value in own if _is_fixed(value)]
        self.lists = [(value, list(value)) for _, value in own if type(value) is list and all(map(_is_fixed, value))]
        self.fixed += [(name, value) for name, value in own if any(value is some for some, _ in self.lists)]
        self.is_quick = len(self.fixed) == len(own)

    def hold(self) -> bool:
        """Whether the module is still set so."""
        return settings_of(self.module) == self._known


class AllSettings:
    """The settings of many modules, which are looked at in one go, as every pass does twice.

    Args:
        settings: of each.
    """

    def __init__(self, settings: Iterable[Settings]) -> None:
        self._each = [*settings]
        quick = [one for one in self._each if one.is_quick]
        self._slow = [one for one in self._each if not one.is_quick]
        entries = [(vars(one.module), *entry) for one in quick for entry in one.fixed]
        self._dicts, self._names, self._values = ([entry[place] for entry in entries] for place in range(3))
        self._modules = [one.module for one in quick]
        self._owned = [*map(vars, self._modules)]
        self._counts = [one.count for one in quick]
        self._lists = [some for one in quick for some in one.lists]

    def hold(self) -> bool:
        """Whether all modules are still set so."""
        # What is absent is nobody's value.
        known = map(is_, map(_get, self._dicts, self._names, repeat(self)), self._values)
        if (
            all(known)
            and [*map(len, self._owned)] == self._counts
            and all(map(is_, map(vars, self._modules), self._owned))
            and _are_as(self._lists)
        ):
            return all(one.hold() for one in self._slow)
        return all(one.hold() for one in self._each)


_get = cast("Callable[..., object]", dict.get)


def _are_as(lists: list[tuple[list[Any], list[Any]]]) -> bool:
    return all(value == entries for value, entries in lists)


def _is_fixed(value: object) -> bool:
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(_is_fixed(entry) for entry in cast("tuple[object, ...]", value)))


def snapshot(value: Any, depth: int = _DEPTH) -> Any:
    """A value equal to a later one as long as nothing within has changed: lists, tensors and objects are copied.

    Functions, generators of random numbers, and what can neither be pickled nor looked into, are compared by identity.
    """
    if _is_fixed(value):
        return value
    if isinstance(value, torch.Generator):
        # One of a user's own draws for a batch from a seed: its state changes as it does.
        return _Same(value), _Copy(value.get_state())
    if isinstance(value, Enum):
        return _Same(value)
    if isinstance(value, (tuple, list)):
        return type(value), [snapshot(entry, depth - 1) for entry in value] if depth else _Same(value)
    if isinstance(value, Mapping):
        # In its order, which may decide what is computed.
        pairs = (
            [(snapshot(key, depth - 1), snapshot(entry, depth - 1)) for key, entry in value.items()] if depth else []
        )
        return type(value), pairs
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta":
        return _Copy(value)
    if isinstance(value, _BY_IDENTITY):
        return _Same(value)
    if not isinstance(value, nn.Module):
        try:
            return type(value), pickle.dumps(value)
        except Exception:
            pass
    held = getattr(value, "__dict__", None)
    if held is None or not depth:
        return _Same(value)
    return type(value), {name: snapshot(entry, depth - 1) for name, entry in held.items()}
