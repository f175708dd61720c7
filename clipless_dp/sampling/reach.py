"""What a function of a user's can reach, as far as Python shows it, and by which way."""

from __future__ import annotations

import contextvars
import dis
import functools
import gc
import heapq
import importlib.util
import math
import os
import pathlib
import random
import sys
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FrameType, FunctionType, GeneratorType, ModuleType, TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from clipless_dp.sampling import caches
from clipless_dp.sampling.windows import components, is_plain

Label = str | int
"""How a part is called in what it is a part of: an attribute's or a variable's name; a place in a container."""

_APART = {"accelerate", "clipless_dp", "lightning", "logging", "pytorch_lightning"}
"""Packages whose objects are not looked into: what trains holds all of a process."""

_OF_DATA = ("clipless_dp.audit.canaries", "clipless_dp.datasets", "clipless_dp.sampling")
"""Modules whose objects are looked into all the same: they hold data."""

_OF_LOGGERS = {"_cache", "disabled", "filters", "handlers", "level", "manager", "name", "parent", "propagate", "root"}
"""Attributes that loggers have: others are a user's."""

_TOOLS = {
    "IPython",
    "_pytest",
    "anyio",
    "execnet",
    "hypothesis",
    "ipykernel",
    "joblib",
    "jupyter_client",
    "matplotlib",
    "numba",
}
_TOOLS |= {
    "opacus",
    "peft",
    "pluggy",
    "polars",
    "pygments",
    "pytest",
    "sympy",
    "timm",
    "tornado",
    "tqdm",
    "traitlets",
    "xdist",
}
"""Packages that tests, notebooks and scripts import; by pytest's rewritten assertions a test reaches all of it."""

_LIBRARIES = (
    _APART
    | _TOOLS
    | {"PIL", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "tokenizers", "torch", "torchaudio", "torchvision"}
    | {"transformers"}
    | set(sys.stdlib_module_names)
)
"""Packages whose code is not read for the names of globals; the attributes of their objects are looked at."""

_PATHS = (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
"""Values, which from Python 3.12 on find their parts out when they are first asked for them."""

ATOMS = (bool, int, float, complex, str, bytes, bytearray, range, slice, type(None), type(Ellipsis), *_PATHS)

CONTAINERS = (list, tuple, set, frozenset, deque)

_TELL_THEIR_STATE = {"array", "builtins", "collections", "itertools"}
"""Modules of types without attributes, iterators above all, that say by ``__reduce_ex__`` how far they are."""

_WRAPPED = ("__self__", "__func__", "__wrapped__", "fget", "func")

_ENVIRONMENT = {"environ", "environb", "getenv", "putenv"}
_OF_CACHES = {"cache_info"}
"""Names in a function's code, by which it may read what this process remembers."""

_WARNED = ("deprecation_warnings", "warnings_issued")
"""Attributes in which tokenizers and models of transformers keep of what they have warned, once for all samples."""

GLOBAL_GENERATORS = (
    torch.default_generator,
    cast(Any, random.random).__self__,
    cast(Any, np.random.rand).__self__,
    cast(Any, np.random.rand).__self__._bit_generator,
)


Part = tuple[Label, object]

Reached = tuple[Any, int, Label]
"""What was reached; the place in the walk of what it is a part of, -1 of the root; how it is called there."""


def reachable(root: object) -> Iterator[Reached]:
    """Everything that a function or an object can reach, once for each way to it; an object's parts once.

    Of functions: contents of closures, defaults, attributes, and the globals that their code names, in functions that
    these call and in modules, too; of modules, wherever they are met, what any of this code names; of objects:
    attributes, contents, and the attributes and methods of their classes and of the classes of these; of tensors their
    gradients; of context variables what they hold; of cached functions their results, last of all. Code of libraries is
    not read, though what objects of theirs hold is looked at. What C extensions, files and other processes hold is not
    seen, but for what :mod:`clipless_dp.sampling.memory` asks some types.

    Args:
        root: the function or object.
    """
    # Parts are kept, since another object could get the identity of one that is gone.
    known: dict[int, object] = {}
    waiting: list[Reached] = [(root, -1, "")]
    last = _Last()
    place = -1
    while waiting or (waiting := last.opened()):
        reached = waiting.pop()
        place += 1
        yield reached
        value = reached[0]
        if type(value) not in ATOMS and id(value) not in known:
            known[id(value)] = value
            last.note(value, place)
            parts = _parts_of_function(value, last.reads(value)) if isinstance(value, FunctionType) else _parts(value)
            waiting.extend([(part, place, label) for label, part in reversed(parts)])


def shared_out(root: object, longest: int, most: int) -> tuple[list[Reached], bool]:
    """What :func:`reachable` finds, that of the largest share first: each thing shares its own evenly among its parts.

    So a list of many things, or many lists, hide nothing that lies beside them, nor do deep ones. Tensors and arrays
    come with what they are a part of, before all else; numbers and text are left out.

    Args:
        root: the function or object.
        longest: of longer lists, tuples, sets and mappings about so many parts are followed, evenly.
        most: things that are looked at, but for tensors and arrays, of which there may be eight times as many.

    Returns:
        What was reached, and whether that is all.
    """
    known: dict[int, object] = {}
    found: list[Reached] = []
    waiting: list[tuple[float, int, Reached]] = [(0.0, 0, (root, -1, ""))]
    pushed = others = 0
    last = _Last()
    while True:
        if not waiting:
            for reached in last.opened()[::-1]:
                pushed += 1
                heapq.heappush(waiting, (math.inf, pushed, reached))
            if not waiting:
                return found, True
        if others >= most or len(found) >= 9 * most:
            return found, False
        cost, _, reached = heapq.heappop(waiting)
        place, value = len(found), reached[0]
        found.append(reached)
        others += not isinstance(value, (Tensor, np.ndarray))
        if id(value) in known:
            continue
        known[id(value)] = value
        last.note(value, place)
        parts = _parts_of_function(value, last.reads(value)) if isinstance(value, FunctionType) else _parts(value)
        if isinstance(value, (dict, *CONTAINERS)):
            parts = parts[:: stride(len(parts), longest)]
        parts = [part for part in parts if type(part[1]) not in ATOMS]
        further = cost + math.log2(max(1, len(parts)))
        for label, part in parts:
            pushed += 1
            own = cost if isinstance(part, (Tensor, np.ndarray)) else further
            heapq.heappush(waiting, (own, pushed, (part, place, label)))


def stride(count: int, longest: int) -> int:
    """Of so many parts each of which is looked at; of mappings, keys and values alternate, so that it is odd."""
    return count // longest | 1 if count > longest else 1


class _Last:
    """What is opened when all else was looked at: modules, by the names that all code says, and then caches.

    A result that is new in a cache so moves nothing that was there before it.

    Packages that are installed are read where code that is looked at names them, and within themselves; not where they
    are met behind modules alone: else a project reaches all that its dependencies import.
    """

    def __init__(self) -> None:
        self._opens = False
        self._near: set[str] = set()
        self._named: dict[str, None] = {}
        self._modules: list[tuple[int, ModuleType, set[str]]] = []
        self._caches: list[tuple[int, Any]] = []

    def note(self, value: object, place: int) -> None:
        """Notes what was met, and the names that its code says."""
        if isinstance(value, (FunctionType, ModuleType)) and not self._opens:
            self._near.add(_package_of(value))
        if isinstance(value, FunctionType) and self.reads(value):
            self._named |= dict.fromkeys(_names(value.__code__)[1])
        elif isinstance(value, ModuleType) and self.reads(value):
            self._modules.append((place, value, set()))
        elif isinstance(value, caches.CACHES):
            self._caches.append((place, value))

    def reads(self, value: FunctionType | ModuleType) -> bool:
        """Whether code of the package that a function or a module is of is read."""
        of = _package_of(value)
        return of not in _LIBRARIES and (of in self._near or not is_installed(of))

    def opened(self) -> list[Reached]:
        """What was not looked at yet, in reverse order."""
        self._opens = True
        found: list[Reached] = []
        for place, module, done in self._modules:
            held = vars(module)
            new = [name for name in self._named if name in held and name not in done]
            done.update(new)
            found += [(held[name], place, name) for name in new]
        if not found:
            for place, cache in self._caches:
                found += [(result, place, caches.entry(key)) for key, result in caches.results(cache)]
                if _OF_CACHES & self._named.keys():
                    found.append((tuple(cache.cache_info()), place, "cache_info"))
            self._caches.clear()
        return found[::-1]


def _parts(value: Any) -> list[Part]:
    kind = type(value)
    if isinstance(value, (ModuleType, CodeType, FrameType, TracebackType)):
        return []
    if package(kind.__module__) in _APART and not kind.__module__.startswith(_OF_DATA):
        own = vars(value) if kind.__module__ == "logging" and hasattr(value, "manager") else {}
        return [(name, part) for name, part in own.items() if name not in _OF_LOGGERS]
    if kind is Tensor and is_plain(value) and value.is_leaf and value.grad is None and not vars(value):
        return []
    if kind is np.ndarray and not value.dtype.hasobject:
        return []
    if any(value is one for one in GLOBAL_GENERATORS):
        return []
    if isinstance(value, type):
        return _parts_of_class(value)
    if isinstance(value, CellType):
        return _filled("", [value])
    if package(kind.__module__) == "pandas" and (numbers := _of_pandas(value)) is not None:
        # Beside these it keeps what it has looked up.
        return numbers
    parts: list[Part] = []
    if isinstance(value, dict):
        parts += _numbered(part for item in dict.items(value) for part in item)
        if kind in (dict, OrderedDict):
            return parts
        parts.append(("default_factory", getattr(value, "default_factory", None)))
    elif kind in (list, tuple, set, frozenset):
        return _numbered(value)
    for container in CONTAINERS:
        if isinstance(value, container):
            # As it lies there, whatever a class of a user's makes of it.
            parts += _numbered(cast(Any, container).__iter__(value))
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        parts.append(("entries", value.tolist()))
    if isinstance(value, weakref.ref):
        parts.append(("", value()))
    if isinstance(value, contextvars.ContextVar):
        parts += [("value", value.get(None)), *_numbered(gc.get_referents(value))]
    if isinstance(value, np.ufunc) and gc.is_tracked(value):
        # Of numpy.frompyfunc.
        parts += _numbered(gc.get_referents(value))
    if kind.__module__ == "operator":
        # A methodcaller's arguments, those by name in a partial.
        parts += _numbered(_reduced(value, 0))
    if isinstance(value, functools.partial):
        parts += [*_numbered(value.args), ("keywords", value.keywords)]
    if isinstance(value, GeneratorType) and value.gi_frame is not None:
        parts += [("place", value.gi_frame.f_lasti), ("locals", dict(value.gi_frame.f_locals))]
    parts += [("state", state) for state in _state_of_generator(value)]
    parts += [("component", part) for part in components(value)]
    if isinstance(value, Tensor) and (value.is_leaf or value.retains_grad) and value.grad is not None:
        parts.append(("grad", value.grad))
    parts += _attributes(value)
    if not parts and not callable(value):
        if kind.__module__ in _TELL_THEIR_STATE:
            parts += _numbered(_reduced(value))
        if not parts and package(kind.__module__) in sys.stdlib_module_names:
            # Queues and views of mappings: what their garbage collection visits.
            parts += _numbered(part for part in gc.get_referents(value) if part is not kind)
    return parts if package(kind.__module__) in _LIBRARIES else [*parts, ("__class__", kind)]


def _state_of_generator(value: Any) -> list[object]:
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        return [value.bit_generator if isinstance(value, np.random.Generator) else value.get_state(legacy=False)]
    if isinstance(value, np.random.BitGenerator):
        return [value.state]
    if isinstance(value, random.Random):
        return [value.getstate()]
    if isinstance(value, torch.Generator) and value.device.type == "cpu":
        return [value.get_state()]
    return []


def _of_pandas(value: Any) -> list[Part] | None:
    """Numbers and names of a table, a column or an index; ``None`` of what is none of these."""
    if not hasattr(value, "to_numpy"):
        return None
    parts: list[Part] = [("attrs", getattr(value, "attrs", None)), ("dtype", str(getattr(value, "dtype", None)))]
    if value.ndim == 1:
        parts += [("values", value.to_numpy()), ("name", getattr(value, "name", None))]
    else:
        parts += [(place, value.iloc[:, place].to_numpy()) for place in range(value.shape[1])]
        parts.append(("columns", value.columns.to_numpy()))
    return [*parts, ("index", value.index.to_numpy())] if hasattr(value, "iloc") else parts


def _parts_of_function(function: FunctionType, read: bool) -> list[Part]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    parts: list[Part] = [part for name, cell in cells for part in _filled(name, [cell])]
    parts += [*vars(function).items(), ("defaults", function.__defaults__), ("defaults", function.__kwdefaults__)]
    if not read:
        return parts
    reach = function.__globals__
    loaded, named, imported = _names(function.__code__)
    parts += [(name, reach[name]) for name in loaded if name in reach]
    if _ENVIRONMENT & {*named}:
        parts.append(("os.environ", dict(os.environ)))
    within = reach.get("__package__") or ""
    return [*parts, *(part for one in imported for part in _imported(one, within))]


Import = tuple[str, int, tuple[str, ...]]
"""The name of a module, of how many packages above, and what is taken from it."""


def _imported(one: Import, within: str) -> list[Part]:
    """Modules that are there already, of those that an import within a package may mean."""
    name, level, taken = one
    try:
        whole = importlib.util.resolve_name("." * level + name, within) if level else name
    except ImportError:
        return []
    steps = whole.split(".")
    meant = [".".join(steps[: count + 1]) for count in range(len(steps))]
    meant += [f"{whole}.{inner}" for inner in taken]
    return [(module, sys.modules[module]) for module in meant if module in sys.modules]


@functools.lru_cache(maxsize=65536)
def _names(code: CodeType) -> tuple[list[str], list[str], list[Import]]:
    """Names that code loads as globals, all that it names, and what it imports; of functions within, too."""
    loaded: dict[str, None] = {}
    imported: dict[Import, None] = {}
    named = dict.fromkeys(code.co_names)
    instructions = [one for one in dis.get_instructions(code) if one.opname != "EXTENDED_ARG"]
    for place, instruction in enumerate(instructions):
        if instruction.opname == "IMPORT_NAME":
            # Level and names lie on the stack before it.
            level, taken = (one.argval for one in instructions[place - 2 : place])
            imported[str(instruction.argval), level, tuple(taken or ())] = None
        elif instruction.opname.endswith(("_GLOBAL", "_NAME")):
            loaded[str(instruction.argval)] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            within = _names(constant)
            loaded |= dict.fromkeys(within[0])
            named |= dict.fromkeys(within[1])
            imported |= dict.fromkeys(within[2])
    return [*loaded], [*named], [*imported]


def _parts_of_class(kind: type) -> list[Part]:
    if package(kind.__module__) in _LIBRARIES:
        return []
    own = [(name, part) for name, part in vars(kind).items() if isinstance(part, FunctionType) or name[:2] != "__"]
    bases = [("", base) for base in kind.__bases__]
    return [*own, *bases, *([] if type(kind) is type else [("__class__", type(kind))])]


def _attributes(value: Any) -> list[Part]:
    parts: list[Part] = []
    try:
        known = _WARNED if any(package(kind.__module__) == "transformers" for kind in type(value).__mro__) else ()
        parts += [(name, part) for name, part in vars(value).items() if name not in known]
    except Exception:
        parts.clear()
    parts += [(name, _attribute(value, mangled)) for name, mangled in _slots(type(value))]  # type: ignore[arg-type]
    if callable(value) or isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
        held = [("" if name == "__self__" else name, _attribute(value, name)) for name in _WRAPPED]
        parts += [(name, part) for name, part in held if part is not None]
    return parts


@functools.lru_cache(maxsize=1024)
def _slots(kind: Any) -> list[tuple[str, str]]:
    """Names of slots, and what Python makes of private ones."""
    held = [(base, vars(base).get("__slots__", ())) for base in kind.__mro__]
    return [
        (name, f"_{base.__name__.lstrip('_')}{name}" if _is_mangled(name) else name)
        for base, slots in held
        for name in ([slots] if isinstance(slots, str) else slots)
    ]


def _is_mangled(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _attribute(value: Any, name: str) -> object:
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def _reduced(value: Any, start: int = 1) -> list[object]:
    """What a type in C says of itself for copies: of iterators how far they are."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [*value.__reduce_ex__(4)[start:]]
    except Exception:
        return []


def _filled(name: str, cells: Iterable[CellType]) -> list[Part]:
    found: list[Part] = []
    for cell in cells:
        try:
            found.append((name, cell.cell_contents))
        except ValueError:
            continue
    return found


def _numbered(parts: Iterable[object]) -> list[Part]:
    return [*enumerate(parts)]


def _package_of(code: FunctionType | ModuleType) -> str:
    return package((vars(code) if isinstance(code, ModuleType) else code.__globals__).get("__name__"))


@functools.lru_cache(maxsize=4096)
def is_installed(of: str) -> bool:
    """Whether a package lies where installers put it."""
    module = sys.modules.get(of)
    places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
    return any({"site-packages", "dist-packages"} & {*place.split(os.sep)} for place in places)


@functools.lru_cache(maxsize=4096)
def package(name: object) -> str:
    """The package that a module is of."""
    return name.partition(".")[0] if isinstance(name, str) else ""
