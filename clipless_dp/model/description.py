"""What a model's bounds rest on besides its weights, as plain values that states hold, and where two of them differ.

States and statements are published, and are no place for what a layer has kept of samples. So of objects that are none
of this package's or torch's a value is told as long as it is what it was when the network was first wrapped, before any
pass of private rows; of one that has changed since, that it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipless_dp.modules import kind_of

_TORCHS_OWN = frozenset(vars(nn.Module()))
"""Parameters, buffers, children, hooks and the mode of a module."""

_DEPTH = 4
"""How far objects within objects are followed."""

_SHOWN = 4
"""Parts of a tuple up to which all of it is shown."""


UNTOLD = "not told, as it has changed since the network was wrapped"
"""In place of the value of an attribute of a user's own."""

_FIRST = "__clipless_dp_first"
"""Where a layer of a user's own holds what was told of it first: its copies, and networks that it is in, have it."""


class _Own(dict[str, Any]):
    """The attributes of an object of a user's own."""


def settings_of(model: Any) -> dict[str, Any]:
    """What a model's bounds rest on besides its weights: caps, loss, constraints and layers, as plain values.

    Of an object all attributes, private ones too, since bounds do not ask what a name begins with; but of torch's own
    layers the public ones. Of objects of a user's own :data:`UNTOLD` in place of what has changed since they were
    wrapped.
    """
    objects = _objects(model)
    first = vars(model).get("_first", objects)
    layers = {".".join(leaf.path): leaf.module for leaf in model._watch.leaves}
    for leaf in model._watch.leaves:
        if leaf.within:
            within = leaf.module.named_modules(remove_duplicate=False)
            layers |= {".".join((*leaf.path, name)): part for name, part in within if name}
    return {
        "input_norm": float(model.input_norm),
        **({} if model.packing is None else {"inputs": model.packing.described()}),
        **{name: _as_first(part, first[name]) for name, part in objects.items()},
        "layers": {path: _layer_as_first(module) for path, module in layers.items()},
    }


def make_room(net: nn.Module) -> None:
    """Gives modules of a user's own a place for what is told of them first; before their attributes are noted."""
    for module in net.modules():
        if not _is_known(kind_of(module)):
            vars(module).setdefault(_FIRST, None)


def remember(model: Any) -> None:
    """Notes what is told of a model that was just wrapped; of layers that were before, what was told then stays."""
    model._first = _objects(model)
    for module in model.net.modules():
        if vars(module).get(_FIRST, _NEW) is None:
            vars(module)[_FIRST] = _of_layer(module)


def forget(model: Any) -> None:
    """Nothing says what objects of a user's own were when the model was wrapped: it was by a former version."""
    model.__dict__.setdefault("_first", {"loss": {}, "constraints": {}})
    for module in model.net.modules():
        if vars(module).get(_FIRST, _NEW) is None:
            vars(module)[_FIRST] = {}


def _layer_as_first(module: nn.Module) -> Any:
    now = _of_layer(module)
    first = vars(module).get(_FIRST)
    return _as_first(now, now if first is None else first)


def _objects(model: Any) -> dict[str, Any]:
    return {
        "loss": _parts(model.loss_function),
        "constraints": {name: _parts(constraint) for name, constraint in model.constraints.items()},
    }


_NEW = object()
"""In place of what was told first of something that was not there."""


def _as_first(now: Any, first: Any, own: bool = False) -> Any:
    """Plain values: of objects of a user's own those that are what was told first.

    Args:
        now: what is told.
        first: what was told first, at the same place.
        own: whether it is of an object of a user's own.
    """
    own = own or isinstance(now, _Own)
    if isinstance(now, dict):
        then = first if isinstance(first, dict) else {}
        return {
            name: part if name == "type" else _as_first(part, then.get(name, _NEW), own)
            for name, part in now.items()
            if not own or name in then or name == "type"
        }
    if isinstance(now, tuple):
        alike = isinstance(first, (tuple, list)) and len(first) == len(now)
        if own and not alike:
            return UNTOLD
        return tuple(
            _as_first(one, then, own) for one, then in zip(now, first if alike else [_NEW] * len(now), strict=True)
        )
    return now if not own or (type(now) is type(first) and _agree(first, now)) else UNTOLD


def _is_known(kind: Any) -> bool:
    return _package(kind) in ("clipless_dp", "torch")


def without_untold(lines: list[str]) -> list[str]:
    """Differences in words, less those of values that neither side tells: they refuse nothing."""
    return [line for line in lines if not line.endswith(UNTOLD)]


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """In words, where two nested settings differ; of two objects of one type, in what both versions know of them."""
    if isinstance(there, dict) and isinstance(here, dict):
        objects = "type" in there and "type" in here and there["type"] == here["type"]
        names = there.keys() & here.keys() if objects else there.keys() | here.keys()
        return [
            line
            for name in sorted(names, key=str)
            for line in differences(there.get(name), here.get(name), f"{place}.{name}" if place else str(name))
        ]
    if _agree(there, here):
        return []
    if UNTOLD in (there, here):
        return [f"{place}: {UNTOLD}"]
    if isinstance(there, tuple) and isinstance(here, tuple) and len(there) == len(here) > _SHOWN:
        there, here = next((one, other) for one, other in zip(there, here, strict=True) if not _agree(one, other))
        return [f"{place}: {there!r} there, {here!r} here, and maybe more"]
    return [f"{place}: {there!r} there, {here!r} here"]


def integers_of(value: object) -> dict[str, int]:
    """An object's attributes that are whole numbers: what counts calls is among them, and is no setting."""
    return {name: part for name, part in getattr(value, "__dict__", {}).items() if type(part) is int}


def moved(before: Mapping[str, int], after: Mapping[str, int]) -> set[str]:
    """Whole numbers that calls have changed."""
    return {name for name, value in after.items() if before.get(name, value) != value}


def without_counts(lines: list[str], counted: Iterable[str]) -> list[str]:
    """Differences in words, less those of numbers that calls change, given where these are."""
    known = {*counted}
    return [line for line in lines if line.partition(": ")[0].removeprefix("model.") not in known]


def _agree(there: Any, here: Any) -> bool:
    if isinstance(there, (tuple, list)) and isinstance(here, (tuple, list)) and len(there) == len(here):
        return all(not differences(one, other) for one, other in zip(there, here, strict=True))
    # States of before objects were looked into hold the names of their types.
    typed = isinstance(here, dict) and isinstance(there, str) and here.get("type") == there
    # A NaN is not what it equals.
    return bool(typed or there == here or (isinstance(there, float) and there != there and repr(there) == repr(here)))


def _of_layer(module: nn.Module) -> dict[str, Any]:
    """A layer's type and attributes; of a user's own those that are plain, as it may keep what it saw."""
    kind: Any = kind_of(module)
    told = {"type": kind.__qualname__ if isinstance(kind, type) else str(kind)}
    if _package(kind) == "clipless_dp":
        return {**_parts(module), **told}
    hidden = _package(kind) == "torch"
    plain = {name: _plain(value) for name, value in _attributes(module) if _is_plain(value)}
    if hidden:
        return {**{name: value for name, value in plain.items() if name[0] != "_"}, **told}
    return _Own({**plain, **told})


def _parts(value: Any, depth: int = _DEPTH) -> dict[str, Any]:
    """An object's type and attributes."""
    parts = {name: _plain(part, depth - 1) for name, part in _attributes(value)}
    told = {**parts, "type": type(value).__qualname__}
    return told if _is_known(type(value)) else _Own(told)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    is_module = isinstance(value, nn.Module)
    for name, part in getattr(value, "__dict__", {}).items():
        if isinstance(name, str) and not name.startswith("__") and not (is_module and name in _TORCHS_OWN):
            yield name, part
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                yield name, getattr(value, name)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str, Enum, torch.dtype, np.generic))


def _package(kind: Any) -> str:
    return str(getattr(kind, "__module__", "")).partition(".")[0]


def _described(value: object) -> str:
    """An object in words that are the same in every process: no addresses."""
    if isinstance(value, partial):
        return f"partial({_described(value.func)}, {_plain(value.args)!r}, {_plain(tuple(value.keywords.items()))!r})"
    return str(value.__qualname__) if hasattr(value, "__qualname__") else type(value).__qualname__


def _plain(value: Any, depth: int = _DEPTH) -> Any:
    name = type(value).__qualname__
    if isinstance(value, np.float64):
        return float(value)
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(part, depth) for part in value)
    if isinstance(value, (Tensor, np.ndarray)):
        shape = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else name
        return {"type": shape, "numbers": _numbers(value)}
    if isinstance(value, Mapping):
        return {"type": name, "items": tuple((str(key), _plain(part, depth)) for key, part in value.items())}
    if isinstance(value, (set, frozenset)):
        return {"type": name, "items": tuple(sorted(map(repr, map(_plain, value))))}
    if isinstance(value, Enum):
        return {"type": name, "name": value.name}
    if isinstance(value, (np.generic, complex, bytes, torch.dtype, torch.device)):
        return {"type": name, "value": repr(value)}
    functions = (partial, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
    return _described(value) if isinstance(value, functions) or depth <= 0 else _parts(value, depth)


def _numbers(value: Tensor | np.ndarray[Any, Any]) -> str | None:
    """A digest of an array's bits; ``None`` where it has none to be read."""
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject else _hashed(value)
    if value.layout is not torch.strided or value.is_nested or value.device.type == "meta":
        return None
    bits = value.detach().resolve_conj().resolve_neg().to("cpu", copy=True).contiguous().reshape(-1)
    return _hashed(bits.view(torch.uint8).numpy())


def _hashed(values: np.ndarray[Any, Any]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()
