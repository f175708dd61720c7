"""What decides a module's output, told to a hash, or that something of it cannot be."""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import types
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from clipless_dp.features.recipes import is_plain
from clipless_dp.sampling.reach import is_installed, package

HELD: Final = frozenset(vars(nn.Module())) - {name for name in vars(nn.Module()) if name.endswith("_hooks")}
"""What torch keeps in each module, apart from hooks: told by its parts, its tensors and its repr."""

_BLOCK = 1 << 24
"""Bytes hashed at once."""

_DEPTH = 8


class Told:
    """Adds values to a hash, each fully or not at all.

    Args:
        digest: the hash.
        module: whose parts need not be told again.

    Attributes:
        is_all: whether all values so far could be told.
    """

    def __init__(self, digest: Any, module: nn.Module) -> None:
        self.is_all = True
        self._digest = digest
        self._parts = {id(part): name for name, part in module.named_modules()}
        self._sources: set[object] = set()

    def add(self, value: object, depth: int = 0) -> None:
        """Adds one: numbers, text, tensors, arrays, containers, classes and functions of files, parts of the module."""
        kind = type(value)
        self._digest.update(f"{kind.__module__}.{kind.__qualname__}:".encode())
        if depth > _DEPTH:
            self.is_all = False
        elif value is None or kind in _PLAIN or isinstance(value, (enum.Enum, np.generic)):
            self._digest.update(repr(value).encode())
        elif isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta":
            update(self._digest, "", value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
            self._digest.update(repr((value.dtype, value.shape)).encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, (tuple, list, dict, set, frozenset)):
            self._add_all(value, depth)
        elif isinstance(value, functools.partial):
            self._add_all((value.func, value.args, value.keywords), depth)
        elif isinstance(value, nn.Module):
            # Its own tensors and settings are told where it is a part.
            self._digest.update(repr(self._parts.get(id(value))).encode())
            self.is_all &= id(value) in self._parts
        elif isinstance(value, _MODES):
            self._add_all(vars(value), depth)
        elif isinstance(value, types.MethodType):
            self._add_all((value.__func__, value.__self__), depth)
        elif isinstance(value, type):
            self._add_class(value, depth)
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            self._add_named(value)
        else:
            self._add_configuration(value, depth)

    def _add_all(self, value: Any, depth: int) -> None:
        self._digest.update(f"{len(value)}".encode())
        some = value.items() if isinstance(value, dict) else value
        for item in sorted(some, key=repr) if isinstance(value, (set, frozenset)) else some:
            self.add(item, depth + 1)

    def _add_configuration(self, value: Any, depth: int) -> None:
        """What holds fields alone: a data class, or what other packages have that says what it holds."""
        if hasattr(type(value), "__dataclass_fields__"):
            fields = {name: getattr(value, name, None) for name in type(value).__dataclass_fields__}
            self._add_all({**getattr(value, "__dict__", {}), **fields}, depth)
            self._add_class(type(value), depth)
            return
        try:
            said = value.to_dict()
        except Exception:
            # Every package has errors of its own.
            said = None
        self.is_all &= isinstance(said, dict)
        if isinstance(said, dict):
            self._add_all(said, depth)

    def _add_code(self, code: types.CodeType) -> None:
        """What a method does: it may have been set on a class whose file tells another one."""
        self._digest.update(code.co_code + repr((code.co_names, code.co_freevars)).encode())
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            else:
                self._digest.update(repr(constant).encode())

    def _add_class(self, kind: type, depth: int) -> None:
        """A class by the files of all that it comes from, and what functions of it enclose."""
        for base in kind.__mro__:
            self._digest.update(f"{base.__module__}.{base.__qualname__}".encode())
            if base in self._sources or _is_torch(base.__module__):
                continue
            self._sources.add(base)
            if self._is_of_a_package(base.__module__):
                self._add_changes(base, depth)
                continue
            self._add_source(base)
            for name, member in sorted(vars(base).items()):
                if name in _OF_FIELDS and hasattr(base, "__dataclass_fields__"):
                    continue
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(function, types.FunctionType):
                    self._add_method(function, depth)
                elif name.startswith("__"):
                    # Python's own, some of it noted when an object is copied.
                    continue
                elif is_plain(member) or isinstance(member, (Tensor, np.ndarray, list, tuple, dict, set)):
                    self._digest.update(repr(name).encode())
                    self.add(member, depth + 1)

    def _is_of_a_package(self, module: str | None) -> bool:
        """Whether a module is of a package that was installed, whose version is told in its stead."""
        name = package(module)
        if not is_installed(name) or not _distributions().get(name):
            return False
        self._digest.update(f"{name} {_version(name)}".encode())
        return True

    def _add_changes(self, kind: type, depth: int) -> None:
        """What a class of an installed package says in numbers and words, and methods that were set on it by others."""
        for name, member in sorted(vars(kind).items()):
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(function, types.FunctionType):
                home = function.__globals__.get("__name__")
                # Data classes have theirs from text.
                if home is not None and not _is_torch(home) and not self._is_of_a_package(home):
                    self._add_method(function, depth)
            elif not name.startswith("__") and is_plain(member):
                self._digest.update(repr((name, member)).encode())

    def _add_method(self, function: types.FunctionType, depth: int) -> None:
        """A method by its code and what it encloses: of decorated ones, methods."""
        self._digest.update(function.__qualname__.encode())
        if function in self._sources:
            # Wrappers may enclose themselves.
            return
        self._sources.add(function)
        self.is_all &= depth <= _DEPTH
        self._add_code(function.__code__)
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if free == "__class__" or depth > _DEPTH:
                continue
            self._digest.update(free.encode())
            held = _contents(cell)
            if isinstance(held, types.FunctionType):
                self._add_method(held, depth + 1)
            else:
                self.add(held, depth + 1)

    def _add_named(self, function: Any) -> None:
        """A function by its name in a file, and the file."""
        name, place = function.__qualname__, getattr(function, "__module__", None)
        found: Any = sys.modules.get(place or "")
        for part in name.split("."):
            found = getattr(found, part, None)
        self._digest.update(f"{place}.{name}".encode())
        if found is not function and not any(getattr(home, function.__name__, None) is function for home in _HOMES):
            self.is_all = False
        elif not (isinstance(function, types.BuiltinFunctionType) or _is_torch(place) or self._is_of_a_package(place)):
            self._add_source(function)

    def _add_source(self, value: Any) -> None:
        try:
            self._digest.update(Path(inspect.getfile(value)).read_bytes())
        except (OSError, TypeError):
            self.is_all = False


_PLAIN = (
    bool, int, float, complex, str, bytes, slice, range, type(...), torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format,
)  # fmt: skip


_MODES = (torch.no_grad, torch.enable_grad, torch.inference_mode)
"""Of autograd, which decorate methods."""

_OF_FIELDS = ("__init__", "__repr__", "__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__setattr__", "__delattr__")
"""What data classes are given, told by their fields."""


_HOMES = (torch, nn.functional)
"""Of functions that do not tell their modules."""


def _is_torch(module: str | None) -> bool:
    """Whether a module is torch's, whose version is in the hash, or built in."""
    return package(module) in ("torch", "builtins", "abc", "typing")


@functools.lru_cache(maxsize=256)
def _version(name: str) -> str:
    """Of the distributions that an installed package is of."""
    return repr([(one, metadata.version(one)) for one in sorted({*_distributions().get(name, ())})])


@functools.lru_cache(maxsize=1)
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def update(digest: Any, name: str, value: Tensor) -> None:
    """Adds a tensor to a hash: its name, type, shape and bytes, some at once."""
    digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
    if value.numel() == 0:
        return
    rows = value.detach().reshape(len(value) if value.dim() else 1, -1)
    size = max(1, _BLOCK // max(1, rows.shape[1] * value.element_size()))
    for some in rows.split(size):
        digest.update(some.contiguous().cpu().view(torch.uint8).numpy().tobytes())
