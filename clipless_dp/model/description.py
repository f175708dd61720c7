"""What a model's bounds rest on besides its weights, as plain values that states hold, and where two of them differ."""

from __future__ import annotations

from functools import partial
from types import NoneType
from typing import Any

from torch import Tensor


def settings_of(model: Any) -> dict[str, Any]:
    """What a model's bounds rest on besides its weights: caps, loss, constraints and layers, as plain values."""
    return {
        "input_norm": float(model.input_norm),
        **({} if model.packing is None else {"inputs": model.packing.described()}),
        "loss": _parts(model.loss_function),
        "constraints": {name: _parts(constraint) for name, constraint in model.constraints.items()},
        "layers": {
            ".".join(leaf.path): {
                "type": leaf.kind.__qualname__ if isinstance(leaf.kind, type) else str(leaf.kind),
                **{
                    name: _plain(value)
                    for name, value in vars(leaf.module).items()
                    if isinstance(value, (int, float, str, tuple, NoneType)) and name != "training" and name[0] != "_"
                },
            }
            for leaf in model._watch.leaves
        },
    }


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
    return [] if there == here else [f"{place}: {there!r} there, {here!r} here"]


def _parts(value: object) -> dict[str, Any]:
    """An object's type and public attributes."""
    known = getattr(value, "__dict__", {}).items()
    return {"type": type(value).__qualname__, **{name: _plain(part) for name, part in known if name[:1] != "_"}}


def _described(value: object) -> str:
    """An object in words that are the same in every process: no addresses."""
    if isinstance(value, partial):
        return f"partial({_described(value.func)}, {_plain(value.args)!r}, {_plain(tuple(value.keywords.items()))!r})"
    return str(value.__qualname__) if hasattr(value, "__qualname__") else type(value).__qualname__


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    return _described(value)
