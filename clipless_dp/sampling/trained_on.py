"""The data that this process trains on privately, as far as it lies in memory: what augmentations must not hold.

A view that is mixed with rows of the training data puts a sample into the gradients of others, which no bound covers.
Known are where tensors and arrays lie, and data sets as objects; nothing is kept alive for that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import Dataset

from clipless_dp.errors import PrivacyError
from clipless_dp.sampling.windows import extent

_READ = 1024
"""Samples of a list whose memory is known: what holds a hundredth of them is found but for one case in 10⁴."""

_DEEP = 4
"""Data sets within data sets that are followed."""


class _Block(NamedTuple):
    """Memory from one address to another, and whether what was there lives."""

    start: int
    stop: int
    lives: Callable[[], bool]


class _Known(NamedTuple):
    """One data set: its objects by their identities, and its memory in the order of addresses."""

    objects: dict[int, weakref.ref[Any]]
    blocks: list[_Block]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    stops: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def lives(self) -> bool:
        return any(one() is not None for one in self.objects.values()) or any(block.lives() for block in self.blocks)


_known: list[_Known] = []
_lock = threading.Lock()


def note(dataset: Any, tensors: Sequence[Tensor] = ()) -> None:
    """Notes that a data set is trained on.

    Args:
        dataset: the data set.
        tensors: what it consists of, if it is tensors.
    """
    objects: dict[int, weakref.ref[Any]] = {}
    blocks: dict[tuple[int, int], _Block] = {}
    shared: set[tuple[int, int]] = set()
    for value, is_row in [*((tensor, False) for tensor in tensors), *_parts(dataset, _DEEP)]:
        block = _block(value)
        if block is not None:
            place = block[:2]
            if is_row and place in blocks:
                # A constant that samples share tells nothing of one.
                shared.add(place)
            blocks[place] = block
        elif not isinstance(value, (Tensor, np.ndarray)):
            objects[id(value)] = weakref.ref(value)
    ordered = sorted((block for place, block in blocks.items() if place not in shared), key=lambda block: block[:2])
    starts, stops = np.asarray([block[:2] for block in ordered], dtype=np.int64).reshape(-1, 2).T
    made = _Known(objects, ordered, starts, stops)
    with _lock:
        _known[:] = [*(one for one in _known if one.lives), made]


def holds(value: Any) -> bool:
    """Whether a value is a data set that is trained on, or lies where one does."""
    reach = extent(value)
    with _lock:
        known = [*_known]
    for one in known:
        reference = one.objects.get(id(value))
        if reference is not None and reference() is value:
            return True
        if reach is not None:
            # Blocks may lie in one another: a table, and views of some of its rows.
            last = int(np.searchsorted(one.starts, reach[1]))
            if any(one.blocks[at].lives() for at in np.flatnonzero(one.stops[:last] > reach[0])):
                return True
    return False


def refuse(function: Any, name: str, reached: Iterable[object]) -> None:
    """Refuses a function of a user's that reaches data which is trained on.

    Args:
        function: the function.
        name: of the argument.
        reached: what it reaches.

    Raises:
        PrivacyError: it does.
    """
    if _known and any(map(holds, reached)):
        called = getattr(function, "__qualname__", type(function).__qualname__)
        raise PrivacyError(
            f"{name}={called} reaches the data that is trained on (an attribute, a closure, a global that its code "
            "names), so that one sample may enter the gradients of all others, which no bound covers: let it reach "
            "rows of public data alone, as a copy of their own, and the numbers that it needs (a shape, a length) in "
            "place of the data. Nothing was released"
        )


def _parts(dataset: Any, deep: int) -> Iterator[tuple[Any, bool]]:
    """A data set, those in it, and what holds something of each sample; with whether that is of one sample alone."""
    if isinstance(dataset, (Tensor, np.ndarray)):
        yield dataset, False
        return
    columns = _columns(dataset)
    if columns is not None:
        for column in columns:
            yield from _parts(column, deep - 1)
    elif isinstance(dataset, (list, tuple)):
        step = max(1, len(dataset) // _READ)
        for sample in dataset[::step]:
            parts = [*sample.values()] if isinstance(sample, Mapping) else sample
            yield from ((part, True) for part in _tensors(parts))
    elif isinstance(dataset, Dataset) or hasattr(dataset, "__getitem__"):
        yield from ((one, False) for one in [dataset] if _has_references(one))
        count = _length(dataset)
        for value in list(getattr(dataset, "__dict__", {}).values()) if deep else ():
            inner = value if isinstance(value, (list, tuple)) and _length(value) != count else [value]
            for part in inner:
                if isinstance(part, Dataset) or (count > 1 and _length(part) == count):
                    yield from _parts(part, deep - 1)


def _columns(dataset: Any) -> list[Any] | None:
    """The columns of a mapping, or of a pair of inputs and targets; ``None`` of a list of samples and of others."""
    if isinstance(dataset, Mapping):
        return [*dataset.values()]
    if isinstance(dataset, (list, tuple)) and len(dataset) == 2 and not isinstance(dataset[0], (list, tuple)):
        return [*dataset]
    return None


def _tensors(sample: Any) -> Iterator[Any]:
    """Tensors and arrays of a sample, whose target, which many share, comes last."""
    if isinstance(sample, (Tensor, np.ndarray)):
        yield sample
    elif isinstance(sample, (list, tuple)):
        for part in sample[: max(1, len(sample) - 1)]:
            yield from _tensors(part)
    elif isinstance(sample, Mapping):
        for part in sample.values():
            yield from _tensors(part)


def _length(value: Any) -> int:
    try:
        return len(value)
    except Exception:
        return -1


def _has_references(value: Any) -> bool:
    return getattr(type(value), "__weakrefoffset__", 0) != 0


def _block(value: Any) -> _Block | None:
    reach = extent(value)
    if reach is None:
        return None
    if isinstance(value, Tensor):
        storage = StorageWeakRef(value.untyped_storage())
        return _Block(*reach, lambda: not storage.expired())
    while isinstance(value.base, np.ndarray):
        value = value.base
    array = weakref.ref(value)
    return _Block(*reach, lambda: array() is not None)
