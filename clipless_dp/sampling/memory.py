"""What a function of a user's can remember from one call to the next, as far as Python shows it."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import io
import mmap
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from clipless_dp.errors import PrivacyError
from clipless_dp.sampling import caches, fingerprints
from clipless_dp.sampling.generators import left_alone
from clipless_dp.sampling.reach import ATOMS, CONTAINERS, GLOBAL_GENERATORS, Label, package, reachable
from clipless_dp.sampling.windows import is_plain

_READ_ONLY = 1 << 24
"""Bytes of an array that cannot be written into, a file's say, up to which all are compared."""

_WEIGHT = 64
"""Bytes of an array that take as long to compare as one of what is written in Python."""


_PER_PART = 8
_PER_OBJECT = 32
"""What a part and an object count for in the size of a state, in bytes of what is written in Python."""

_ABSENT = "absent"
_OF_NONE = " of 0"
"""What was not there, and how words for an empty container end (:func:`_shown`)."""

Entry = tuple[int, Label, Any]
"""The entry of what something is a part of, -1 of the root; how it is called there; and what it is told apart by: its
type and content, or, of what was met before, the number of its entry."""


_MADE_AGAIN = 8
"""Results that are new in a cache of which so many are made again, whichever: most are of functions of a value."""


class State:
    """All that is reachable from a function or an object, at one time.

    Tensors on the processor are compared by :func:`clipless_dp.sampling.fingerprints.fingerprint` and by their
    versions, on other devices by their versions and places.

    Two states are the same if nothing differs but which results a cache (``functools.lru_cache``) holds; some results
    that are new in a later state are made again then, by the function that is cached, and must come out the same: a
    list that is cached and filled, or what was made of a sample, does not.

    Args:
        root: the function.
        by_content: whether tensors of other devices are read, so that those of several objects can be compared.

    Attributes:
        entries: in the order of :func:`clipless_dp.sampling.reach.reachable`.
        size: how many bytes were compared, those of arrays for less.
    """

    def __init__(self, root: object, *, by_content: bool = False) -> None:
        self.entries: list[Entry] = []
        self._caches: dict[int, tuple[Any, dict[int, Any]]] = {}
        size = 0
        numbers: dict[int, int] = {}
        for value, parent, label in reachable(root):
            if type(value) in ATOMS:
                told: Any = repr(value)
                size += _PER_PART + len(told)
            elif id(value) in numbers:
                told = numbers[id(value)]
            else:
                numbers[id(value)] = len(self.entries)
                told = type(value).__qualname__, _content(value, by_content)
                size += _PER_OBJECT
                if isinstance(value, caches.CACHES):
                    kept: dict[int, Any] = {caches.entry(key): key for key, _ in caches.results(value)}
                    self._caches[len(self.entries)] = value, kept
                if isinstance(value, np.ndarray) or is_plain(value):
                    size += value.nbytes // _WEIGHT
            self.entries.append((parent, label, told))
        self.size = size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return False
        return self.entries == other.entries or not (self.changes(other) or other._made_otherwise(self))

    __hash__ = None  # type: ignore[assignment]

    def changes(self, later: State) -> list[Change]:
        """What differs in a later state: its way from the root, what it was, and what it is; no values of samples.

        Of what came or went as a whole its parts are left out.
        """
        before, after = self._by_way(), later._by_way()
        found: dict[tuple[Label, ...], tuple[str, str]] = {}
        for way in [*before, *(way for way in after if way not in before)]:
            one, other = before.get(way, _ABSENT), after.get(way, _ABSENT)
            if one == other or any(way[:length] in found for length in range(len(way))):
                continue
            result = next((place + 1 for place, label in enumerate(way) if isinstance(label, caches.Entry)), None)
            if result is None or (way[:result] in before) == (way[:result] in after):
                found[way] = _shown(one), _shown(other)
        made = [(_written(way), "a result", "another one when made again") for way in self._made_otherwise(later)]
        return [(_written(way), *both) for way, both in found.items()] + made

    def _made_otherwise(self, later: State) -> list[tuple[Label, ...]]:
        """The caches with a result that is new in a later state, and that their functions do not make now."""
        if not later._caches:
            return []
        known = {id(cache): kept for cache, kept in self._caches.values()}
        ways = later._ways()
        return [
            ways[place]
            for place, (cache, kept) in later._caches.items()
            if not _makes_again(cache, [key for label, key in kept.items() if label not in known.get(id(cache), {})])
        ]

    def _by_way(self) -> dict[tuple[Label, ...], object]:
        ways = self._ways()
        tolds = (ways[told] if isinstance(told, int) else told for *_, told in self.entries)
        return dict(zip(ways, tolds, strict=True))

    def _ways(self) -> list[tuple[Label, ...]]:
        """From the root to each entry."""
        ways: list[tuple[Label, ...]] = []
        found: set[tuple[Label, ...]] = set()
        for parent, label, _ in self.entries:
            way = (*ways[parent], label) if parent >= 0 else ()
            while way in found:
                # A name may stand for several things, a class's attribute and the object's own.
                way = (*way[:-1], f"{way[-1]}") if isinstance(way[-1], int) else (*way[:-1], way[-1] + " ")
            ways.append(way)
            found.add(way)
        return ways


def _makes_again(cache: Any, keys: Sequence[Any]) -> bool:
    """Whether some results of a cache are what its function makes, called again."""
    if not keys:
        return True
    held = {caches.entry(key): result for key, result in caches.results(cache)}
    some = [key for key in random.SystemRandom().sample(keys, min(len(keys), _MADE_AGAIN)) if caches.entry(key) in held]
    try:
        with left_alone():
            for key in some:
                given, named = caches.arguments(cache, key)
                made = State(cache.__wrapped__(*given, **named), by_content=True)
                if made.entries != State(held[caches.entry(key)], by_content=True).entries:
                    return False
    except Exception:
        return False
    return True


Change = tuple[str, str, str]
"""Its way from the root, what it was, and what it is."""


def is_made_once(changes: Sequence[Change]) -> bool:
    """Whether what has moved is what some functions make when they are called first: values in place of none, flags
    that are set, contents of what was empty."""
    return all(
        was in (_ABSENT, "None") or (was, is_) == ("False", "True") or was.endswith(_OF_NONE) for _, was, is_ in changes
    )


def told(name: str, changes: Sequence[Change]) -> str:
    """Changes in words, three at most."""
    shown = "; ".join(
        f"{'.'.join(filter(None, (name, way)))}{' changed' if was == is_ else f': {was} → {is_}'}"
        for way, was, is_ in changes[:3]
    )
    return shown + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def pristine(function: Any) -> Any:
    """A copy of a function with attributes, which shares tensors, arrays and tokenizers; ``None`` if there is none."""
    shared = {
        id(value): value
        for value, *_ in reachable(function)
        if isinstance(value, (Tensor, np.ndarray)) or package(type(value).__module__) == "tokenizers"
    }
    try:
        made = copy.deepcopy(function, shared)
    except Exception:
        return None
    return None if made is function else made


def state_of_copy(
    function: Any, fresh: Any, changes: Sequence[Change], call: Callable[[Any], Any]
) -> tuple[State, Any] | None:
    """What a new copy is like once it was called, and what it returned.

    ``None`` where the copy has not changed as the function had, or the function itself has: they share what they keep.

    Args:
        function: that the copy is of.
        fresh: a copy that was never called (:func:`pristine`).
        changes: of the function in its first call.
        call: calls a copy.
    """
    own = pristine(fresh)
    if own is None:
        return None
    before, its_own = State(function), State(own)
    returned = call(own)
    after = State(own)
    same = State(function) == before and its_own.changes(after) == [*changes]
    return (State(own, by_content=True), returned) if same else None


_refused: Any = WeakIdKeyDictionary()
"""Functions that have kept something of samples, which they hold still."""


def note_refused(function: Any) -> None:
    """Notes that a function keeps something of samples, as far as it can be told from others."""
    with suppress(TypeError):
        _refused[getattr(function, "__self__", function)] = True


def refuse_refused(function: Any, name: str) -> None:
    """Refuses a function that was refused before.

    Raises:
        PrivacyError: it was.
    """
    if getattr(function, "__self__", function) in _refused:
        raise PrivacyError(
            f"{name} keeps a state that changed before, for which it was refused, and holds it still: make a new one "
            "that keeps nothing. Nothing was released"
        )


def own_generators(reached: Iterable[object]) -> Iterator[object]:
    """Generators of random numbers among what is reached, other than the global ones of torch, numpy and Python."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
    for value in reached:
        if isinstance(value, kinds) and not any(value is one for one in GLOBAL_GENERATORS):
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
        if is_plain(value) and value.numel():
            yield value.data_ptr()
    elif isinstance(value, np.ndarray):
        if value.size:
            yield int(value.__array_interface__["data"][0])
    elif isinstance(value, (Mapping, list, tuple)):
        parts = [*value.values()] if isinstance(value, Mapping) else value
        if isinstance(value, list):
            yield id(value)
        if isinstance(value, (Mapping, tuple)) or (parts and type(parts[0]) not in ATOMS):
            for part in parts:
                yield from _places(part)


def _content(value: Any, by_content: bool) -> object:
    """What tells an object from what it was before, beside its parts."""
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        ashore = by_content and value.device.type not in ("cpu", "meta")
        print_ = fingerprints.fingerprint(value.cpu() if ashore else value)
        place = value.data_ptr() if print_ is None and is_plain(value) else None
        # Of nested ones components tell.
        return None if value.is_nested else tuple(value.shape), value.dtype, version, place, print_
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.shape, value.dtype.str, _bytes_of(value)
    if isinstance(value, np.generic):
        return repr(value)
    if isinstance(value, (dict, *CONTAINERS)):
        return len(value)
    if isinstance(value, (FunctionType, type)):
        return value.__qualname__
    return _asked(value)


def _bytes_of(value: np.ndarray[Any, Any]) -> bytes:
    some = value
    if value.nbytes > _READ_ONLY and not value.flags.writeable:
        some = value.reshape(-1)[:: max(1, value.nbytes // _READ_ONLY)]
    return hashlib.blake2b(np.ascontiguousarray(some).tobytes(), digest_size=16).digest()


def _asked(value: Any) -> object:
    """What types that are written in C say of themselves."""
    try:
        if isinstance(value, (io.StringIO, io.BytesIO)):
            return value.tell(), hashlib.blake2b(repr(value.getvalue()).encode(), digest_size=16).digest()
        if isinstance(value, mmap.mmap):
            return value.tell(), None if len(value) > _READ_ONLY else hashlib.blake2b(value, digest_size=16).digest()
        if isinstance(value, (ctypes.Array, ctypes.Structure, ctypes.Union, ctypes._SimpleCData, memoryview)):
            return hashlib.blake2b(bytes(value), digest_size=16).digest()
        if isinstance(value, sqlite3.Connection):
            return value.total_changes
        if package(type(value).__module__) in ("tokenizers", "sentencepiece"):
            return [getattr(value, name)() for name in ("get_vocab_size", "GetPieceSize") if hasattr(value, name)]
    except Exception:
        return None
    return None


def _shown(told: object) -> str:
    """In words that hold no sample: a type, and of ``None``, truth values and lengths what they are."""
    if isinstance(told, str):
        return told if told in (_ABSENT, "None", "True", "False") else "another value"
    if isinstance(told, tuple) and len(told) == 2 and isinstance(told[0], str):
        return f"{told[0]} of {told[1]}" if type(told[1]) is int else told[0]
    return "something else"


def _written(way: Sequence[Label]) -> str:
    """A way from the root, without the keys of mappings, which samples may be."""
    return "".join("[…]" if isinstance(label, int) else f".{label.strip()}" for label in way if label).lstrip(".")
