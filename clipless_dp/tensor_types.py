"""Tensors of types with code of their own, which functions of torch run in place of what gates and bounds know."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from clipless_dp.errors import ConfigurationError, InputError

_INHERITED = (
    cast(Any, Tensor.__torch_function__).__func__,
    torch._C._disabled_torch_function_impl,
    torch._C._disabled_torch_dispatch_impl,
)

_ABOUT_THE_TYPE = {
    "__annotations__", "__class__", "__copy__", "__deepcopy__", "__dict__", "__dir__", "__doc__", "__firstlineno__",
    "__format__", "__getstate__", "__init__", "__init_subclass__", "__module__", "__new__", "__reduce__",
    "__reduce_ex__", "__repr__", "__setstate__", "__sizeof__", "__slots__", "__static_attributes__", "__str__",
    "__subclasshook__", "__torch_dispatch__", "__torch_function__", "__weakref__",
}  # fmt: skip
_COMPUTING = frozenset(dir(Tensor)) - _ABOUT_THE_TYPE
"""What a type that overrides it computes otherwise than torch; the two that torch asks are looked at by value."""

_VALUES_ALONE = ("torch", "torchvision")
"""Packages whose types compute what plain tensors of their values do, and say more about these at most."""

_PLACED = ("torch.distributed.", "torch._subclasses.")
"""Where torch has types that stand for plain tensors: parts of one on several devices, or one that is being traced."""


def is_of(kind: type, packages: tuple[str, ...]) -> bool:
    """Whether a type is where it says that it is, in a module of a package."""
    return kind.__module__.partition(".")[0] in packages and _is_there(kind)


@cache
def _is_there(kind: type) -> bool:
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def dispatches(kind: type[Tensor]) -> bool:
    """Whether code in Python is run for each operation on tensors of a type, whosever it is."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def computes(kind: type[Tensor], besides: tuple[str, ...] = ("torch",)) -> bool:
    """Whether a type of tensors, other than those of some packages, has code of its own that functions of torch run."""
    own = takewhile(lambda base: base is not Tensor, kind.__mro__)
    return any(_overrides(base) and not is_of(base, besides) for base in own)


def _overrides(base: type) -> bool:
    held = vars(base)
    asked = [held[name] for name in ("__torch_function__", "__torch_dispatch__") if name in held]
    # By identity, as compilers follow it.
    inherited = [any(getattr(found, "__func__", found) is one for one in _INHERITED) for found in asked]
    return not _COMPUTING.isdisjoint(held) or not all(inherited)


def is_coded(kind: type[Tensor], besides: tuple[str, ...] = ("torch",)) -> bool:
    """Whether what is computed with tensors of a type may be another function than with plain ones.

    Parts of tensors on several devices, and tensors that stand for others while these are traced, are none.
    """
    if kind is Tensor or kind is Parameter:
        return False
    placed = kind.__module__.startswith(_PLACED) and is_of(kind, ("torch",))
    return not placed and (dispatches(kind) or computes(kind, besides))


def refuse_code(value: Tensor, name: str) -> None:
    """Refuses a tensor of a type with code of its own; what torch's and torchvision's have is known to change nothing.

    Raises:
        InputError: it is one.
    """
    kind = type(value)
    if is_coded(kind, _VALUES_ALONE):
        raise InputError(
            f"{name} is a {kind.__name__}, a tensor of a type with code of its own (__torch_function__, "
            "__torch_dispatch__, or methods of tensors), which would run in place of what the bounds are of: give a "
            "plain tensor of the values that are meant, tensor.as_subclass(torch.Tensor) where these are its own"
        )


def plain(value: Any, name: str) -> Tensor:
    """A tensor whose operations are torch's own: as it is, or its values, where its type says more about them.

    Args:
        value: what came in.
        name: what it is called in messages.

    Raises:
        InputError: it is none, or nested, or of a type with code of its own (``__torch_function__``,
            ``__torch_dispatch__``, methods of tensors), of which nobody knows whether its values are what is meant.
    """
    kind = type(value)
    if kind is Tensor or kind is Parameter:
        if value.is_nested:
            raise InputError(f"{name} must be a dense tensor, got a nested one: pad its parts, with to_padded_tensor")
        return value  # type: ignore[no-any-return]
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor, got a {kind.__name__}: convert it first, by torch.as_tensor")
    refuse_code(value, name)
    if dispatches(kind) or not computes(kind, ()):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def coded_in(net: nn.Module, *, placed: bool = True) -> Iterator[tuple[str, str]]:
    """Parameters and buffers of types with code of their own: their names, and the names of the types.

    Args:
        net: holds them.
        placed: whether such as are parts on several devices are let through.
    """
    for name, held in (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)):
        kind = type(held)
        if is_coded(kind) or (not placed and dispatches(kind)):
            yield name, kind.__name__


def refuse_coded(net: nn.Module) -> None:
    """Refuses parameters and buffers of types with code of their own.

    Raises:
        ConfigurationError: names the first.
    """
    for name, kind in coded_in(net):
        raise ConfigurationError(
            f"{name!r} is a {kind}, a tensor of a type with code of its own (__torch_function__, __torch_dispatch__, "
            "or methods of tensors), as quantised weights are: what it computes is not what its values say, which the "
            "bounds are of. Hold a plain tensor in its place, dequantised say"
        )
