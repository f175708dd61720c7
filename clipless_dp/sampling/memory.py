"""What a function of a user's can remember from one call to the next, as far as Python shows it."""

from __future__ import annotations

import copy
import dis
import functools
import hashlib
import random
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType, GeneratorType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from clipless_dp.sampling import fingerprints

_APART = {"accelerate", "clipless_dp", "lightning", "logging", "pytorch_lightning"}
"""Packages whose objects are not looked into: what trains holds all of a process."""

_LIBRARIES = (
    _APART
    | {"PIL", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "tokenizers", "torch", "torchaudio", "torchvision"}
    | {"transformers"}
    | set(sys.stdlib_module_names)
)
"""Packages whose code is not read for the names of globals; the attributes of their objects are looked at."""

_ATOMS = (bool, int, float, complex, str, bytes, bytearray, range, slice, type(None), type(Ellipsis))

_CONTAINERS = (list, tuple, set, frozenset, deque)

_TELL_THEIR_STATE = {"array", "builtins", "collections", "itertools"}
"""Modules of types without attributes, iterators above all, that say by ``__reduce_ex__`` how far they are."""

_WRAPPED = ("__self__", "__func__", "__wrapped__", "fget", "func")

_WARNED = ("deprecation_warnings", "warnings_issued")
"""Attributes in which tokenizers and models of transformers keep of what they have warned, once for all samples."""

_HASHED = 1 << 24
"""Bytes of an array up to which all are compared."""

_GLOBAL_GENERATORS = (
    torch.default_generator,
    cast(Any, random.random).__self__,
    cast(Any, np.random.rand).__self__,
    cast(Any, np.random.rand).__self__._bit_generator,
)


def reachable(root: object) -> Iterator[object]:
    """Everything that a function or an object can reach, once for each way to it; an object's parts once.

    Of functions: contents of closures, defaults, attributes, and the globals that their code names, in functions that
    these call and in modules, too; of objects: attributes, contents, and the attributes and methods of their classes.
    Code of libraries is not read, though what objects of theirs hold is looked at. What C extensions, files, the
    environment and context variables hold is not seen.
    """
    # Parts are kept, since another object could get the identity of one that is gone.
    known: dict[int, object] = {}
    waiting = [root]
    while waiting:
        value = waiting.pop()
        yield value
        if type(value) not in _ATOMS and id(value) not in known:
            known[id(value)] = value
            waiting.extend(reversed(_parts(value)))


def digest(root: object) -> tuple[bytes, int]:
    """A digest of all that is reachable, which differs where anything has moved; and how many bytes went into it.

    Tensors on the processor are compared by :func:`clipless_dp.sampling.fingerprints.fingerprint` and by their
    versions, on other devices by their versions and places.
    """
    content, size = hashlib.blake2b(digest_size=16), 0
    numbers: dict[int, int] = {}
    for value in reachable(root):
        if type(value) in _ATOMS:
            told: object = repr(value)
        elif id(value) in numbers:
            told = numbers[id(value)]
        else:
            numbers[id(value)] = len(numbers)
            told = (type(value).__qualname__, _content(value))
        some = repr(told).encode()
        content.update(len(some).to_bytes(8, "little") + some)
        size += len(some)
    return content.digest(), size


def own_generators(root: object) -> Iterator[object]:
    """Generators of random numbers that are reachable, other than the global ones of torch, numpy and Python."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
    for value in reachable(root):
        if isinstance(value, kinds) and not any(value is one for one in _GLOBAL_GENERATORS):
            yield value


def copied(value: Any) -> Any:
    """A sample whose parts are nobody else's: mappings, sequences, tensors, arrays, and what else can be copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: copied(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    try:
        return copy.deepcopy(value)
    except Exception:
        return copy.copy(value)


def lie_together(samples: Sequence[Any]) -> bool:
    """Whether two samples have a tensor, an array or a list of numbers at one place in memory."""
    places = [{*_places(sample)} for sample in samples]
    return len(set().union(*places)) < sum(map(len, places))


def _places(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not value.is_nested and value.numel():
            yield value.data_ptr()
    elif isinstance(value, np.ndarray):
        if value.size:
            yield int(value.__array_interface__["data"][0])
    elif isinstance(value, (Mapping, list, tuple)):
        parts = [*value.values()] if isinstance(value, Mapping) else value
        if isinstance(value, list):
            yield id(value)
        if isinstance(value, (Mapping, tuple)) or (parts and type(parts[0]) not in _ATOMS):
            for part in parts:
                yield from _places(part)


def _content(value: object) -> object:
    """What tells an object from what it was before, beside its parts."""
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        print_ = fingerprints.fingerprint(value)
        place = value.data_ptr() if print_ is None and value.layout is torch.strided else None
        return tuple(value.shape), value.dtype, version, place, print_
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        some = (
            value if value.nbytes <= _HASHED else value.reshape(-1)[:: max(1, value.size * value.itemsize // _HASHED)]
        )
        return value.shape, value.dtype.str, hashlib.blake2b(np.ascontiguousarray(some).tobytes()).digest()
    if isinstance(value, np.generic):
        return repr(value)
    if isinstance(value, (dict, *_CONTAINERS)):
        return len(value)
    return getattr(value, "__qualname__", None) if isinstance(value, (FunctionType, type)) else None


def _parts(value: Any) -> list[object]:
    kind = type(value)
    if isinstance(value, (ModuleType, CodeType)) or _package(kind.__module__) in _APART:
        return []
    if any(value is one for one in _GLOBAL_GENERATORS):
        return []
    if isinstance(value, FunctionType):
        return _parts_of_function(value)
    if isinstance(value, type):
        return _parts_of_class(value)
    if isinstance(value, CellType):
        return _filled([value])
    parts: list[object] = []
    if isinstance(value, dict):
        parts += [part for item in dict.items(value) for part in item]
        parts.append(getattr(value, "default_factory", None))
    for container in _CONTAINERS:
        if isinstance(value, container):
            # As it lies there, whatever a class of a user's makes of it.
            parts += cast(Any, container).__iter__(value)
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        parts.append(value.tolist())
    if isinstance(value, weakref.ref):
        parts.append(value())
    if isinstance(value, functools.partial):
        parts += [*value.args, value.keywords]
    if isinstance(value, GeneratorType) and value.gi_frame is not None:
        parts += [value.gi_frame.f_lasti, dict(value.gi_frame.f_locals)]
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        parts.append(value.bit_generator if isinstance(value, np.random.Generator) else value.get_state(legacy=False))
    if isinstance(value, np.random.BitGenerator):
        parts.append(value.state)
    if isinstance(value, random.Random):
        parts.append(value.getstate())
    if isinstance(value, torch.Generator) and value.device.type == "cpu":
        parts.append(value.get_state())
    attributes = _attributes(value)
    parts += attributes
    if not parts and kind.__module__ in _TELL_THEIR_STATE and not callable(value):
        parts += _reduced(value)
    return [*parts, kind]


def _parts_of_function(function: FunctionType) -> list[object]:
    parts: list[object] = [*_filled(function.__closure__ or ()), *vars(function).values()]
    parts += [function.__defaults__, function.__kwdefaults__]
    reach = function.__globals__
    if _package(reach.get("__name__")) in _LIBRARIES:
        return parts
    loaded, named, imported = _names(function.__code__)
    found = [reach[name] for name in loaded if name in reach]
    found += [sys.modules[name] for name in imported if name in sys.modules]
    for value in found:
        if isinstance(value, ModuleType) and _package(value.__name__) not in _LIBRARIES:
            # What is written module.name, or imported from it.
            parts += [vars(value)[name] for name in named if name in vars(value)]
    return [*parts, *found]


@functools.lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[list[str], list[str], list[str]]:
    """Names that code loads as globals, all that it names, and modules that it imports; of functions within, too."""
    loaded: dict[str, None] = {}
    imported: dict[str, None] = {}
    named = dict.fromkeys(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            imported[str(instruction.argval)] = None
        elif instruction.opname.endswith(("_GLOBAL", "_NAME")):
            loaded[str(instruction.argval)] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            within = _names(constant)
            loaded |= dict.fromkeys(within[0])
            named |= dict.fromkeys(within[1])
            imported |= dict.fromkeys(within[2])
    return [*loaded], [*named], [*imported]


def _parts_of_class(kind: type) -> list[object]:
    if _package(kind.__module__) in _LIBRARIES:
        return []
    own = [part for name, part in vars(kind).items() if isinstance(part, FunctionType) or not name.startswith("__")]
    return [*own, *kind.__bases__]


def _attributes(value: Any) -> list[object]:
    parts: list[object] = []
    try:
        # Names, too: an attribute may be gone, and another be there.
        known = _WARNED if any(_package(kind.__module__) == "transformers" for kind in type(value).__mro__) else ()
        parts += [part for item in vars(value).items() if item[0] not in known for part in item]
    except Exception:
        parts.clear()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            parts.append(_attribute(value, f"_{kind.__name__.lstrip('_')}{name}" if _is_mangled(name) else name))
    if callable(value) or isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
        parts += [_attribute(value, name) for name in _WRAPPED]
    return [part for part in parts if part is not None]


def _is_mangled(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _attribute(value: Any, name: str) -> object:
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def _reduced(value: Any) -> list[object]:
    """What a type in C says of itself for copies: of iterators how far they are."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [*value.__reduce_ex__(4)[1:]]
    except Exception:
        return []


def _filled(cells: Any) -> list[object]:
    found: list[object] = []
    for cell in cells:
        try:
            found.append(cell.cell_contents)
        except ValueError:
            continue
    return found


def _package(name: object) -> str:
    return name.partition(".")[0] if isinstance(name, str) else ""
