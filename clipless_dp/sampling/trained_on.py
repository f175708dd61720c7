"""The data that this process trains on privately, as far as it lies in memory: what augmentations must not hold.

A view that is mixed with rows of the training data puts a sample into the gradients of others, which no bound covers.
Known are where tensors and arrays lie that a data set reaches, whatever its class, and data sets as objects; nothing is
kept alive for that.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from clipless_dp.errors import PrivacyError, PrivacyWarning
from clipless_dp.sampling.reach import CONTAINERS, Reached, shared_out, stride
from clipless_dp.sampling.windows import extent, is_plain

_READ = 1024
"""Samples of a list whose memory is known: what holds a hundredth of them is found but for one case in 10⁴."""

_MOST = 1 << 16
"""Things that are looked at of what a data set reaches, those beside tensors and arrays: tenths of a second."""

_SAMPLES = 8
_NAMED = 64
"""Entries from which on a sequence, or a mapping, holds samples, though a data set has another number of these."""

_SHARED = 8
"""What one sample in so many has is a constant, which tells nothing of one."""

_FEW = 16
"""Numbers that a constant has at most, where nothing tells how many a sample has: statistics of channels."""


class _Block(NamedTuple):
    """Memory from one address to another, and whether what was there lives."""

    start: int
    stop: int
    lives: Callable[[], bool]


class _Known(NamedTuple):
    """One data set: its objects by their identities, and its memory in the order of addresses.

    Blocks may lie in one another: a table, and views of some of its rows. So up to where those before reach, too. What
    lay beyond what is looked at is not known, which :func:`refuse` says once.
    """

    objects: dict[int, weakref.ref[Any]]
    blocks: list[_Block]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    stops: np.ndarray[Any, np.dtype[np.int64]]
    furthest: np.ndarray[Any, np.dtype[np.int64]]
    untold: list[str]

    @property
    def lives(self) -> bool:
        return any(one() is not None for one in self.objects.values()) or any(block.lives() for block in self.blocks)


_known: list[_Known] = []
_lock = threading.Lock()
_noted = 0


def version() -> int:
    """Another number once more data is trained on."""
    return _noted


def note(dataset: Any, tensors: Sequence[Tensor] = (), sample: Any = ()) -> None:
    """Notes that a data set is trained on: all tensors and arrays that it reaches, but for constants.

    A constant is what lies alone (not among samples) and has as many numbers as a part of a sample (a mean image), or
    fewer than a sample and than there are samples (statistics of channels), as long as there are not half as many such
    as samples; what one sample in eight has, and no sample by itself; and parameters of modules, but for those that
    hold rows: of as many rows, or columns, as there are samples (a table in an ``nn.Embedding``, a row for padding
    beside it), or in a list of as many. Numbers are not compared: rows that were scaled are rows.

    Args:
        dataset: the data set, or what it was made of.
        tensors: what it consists of, if it is tensors.
        sample: one of its samples.
    """
    global _noted
    objects: dict[int, weakref.ref[Any]] = {}
    blocks: dict[tuple[int, int], _Block] = {}
    varying = [tensor for tensor in tensors if not (is_plain(tensor) and len(tensor) > 1 and not tensor.stride(0))]
    parts = [part for part in tree_leaves(sample) if isinstance(part, (Tensor, np.ndarray))]
    count = max([_length(dataset), *map(_length, tensors)])
    reached, is_all = shared_out(dataset, _READ, _MOST)
    for value in [*varying, *_data(dataset, reached, count, parts)]:
        block = _block(value)
        if block is not None:
            blocks[block[:2]] = block
        elif not isinstance(value, (Tensor, np.ndarray)):
            objects[id(value)] = weakref.ref(value)
    ordered = sorted(blocks.values(), key=lambda block: block[:2])
    starts, stops = np.asarray([block[:2] for block in ordered], dtype=np.int64).reshape(-1, 2).T
    made = _Known(
        objects, ordered, starts, stops, np.maximum.accumulate(stops), [] if is_all else [type(dataset).__name__]
    )
    with _lock:
        _known[:] = [*(one for one in _known if one.lives), made]
        _noted += 1


_loaders: weakref.WeakSet[Any] = weakref.WeakSet()


def note_of(loader: Any) -> None:
    """Notes what the iterator of a ``DataLoader`` reads, once."""
    if loader not in _loaders:
        _loaders.add(loader)
        note(loader._dataset)


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
            last = int(np.searchsorted(one.starts, reach[1]))
            if not last or one.furthest[last - 1] <= reach[0]:
                continue
            if any(one.blocks[at].lives() for at in np.flatnonzero(one.stops[:last] > reach[0])):
                return True
    return False


def refuse(function: Any, name: str, reached: Iterable[object], batch: Tensor | None = None) -> None:
    """Refuses a function of a user's that reaches data which is trained on.

    Args:
        function: the function.
        name: of the argument.
        reached: what it reaches.
        batch: rows that it is called on, which are trained on, whatever is known of where they are from.

    Raises:
        PrivacyError: it does.
    """
    place = None if batch is None else extent(batch)
    _tell(name)
    if any((_known and holds(value)) or (place is not None and _meets(value, place)) for value in reached):
        called = getattr(function, "__qualname__", type(function).__qualname__)
        raise PrivacyError(
            f"{name}={called} reaches the data that is trained on (an attribute, a closure, a global that its code "
            "names), so that one sample may enter the gradients of all others, which no bound covers: let it reach "
            "rows of public data alone, as a copy of their own, and the numbers that it needs (a shape, a length) in "
            "place of the data. A method reaches all that its object holds: let a function do it. Constants that a "
            "transform of the data set holds, too, need a copy, .clone(); rows of one part of a data set that was "
            "split, a copy in place of the Subset, which reaches the others. (Data of an earlier training in this "
            "process counts as such while it is in memory.) "
            "Nothing was released"
        )


def _tell(name: str) -> None:
    """Says once of each data set what of it is not known."""
    with _lock:
        kinds = [one.untold.pop() for one in _known if one.untold]
    for kind in kinds:
        warnings.warn(
            f"a {kind} that is trained on reaches more than {_MOST} things, of which that many were looked at: {name}= "
            "is not refused if it reaches rows in others of them. Keep rows in a tensor or an array of the data set",
            PrivacyWarning,
            stacklevel=3,
        )


def _meets(value: object, place: tuple[int, int]) -> bool:
    reach = extent(value)
    return reach is not None and reach[0] < place[1] and place[0] < reach[1]


def _data(dataset: Any, reached: Sequence[Reached], count: int, parts: Sequence[Any]) -> Iterator[Any]:
    """A data set, those in it, and tensors and arrays that it reaches and that are no constants.

    Args:
        dataset: the data set.
        reached: what it reaches.
        count: of its samples.
        parts: tensors and arrays of a sample.
    """
    sizes = {*map(_size, parts)}
    sets = [value for value, *_ in reached if value is dataset or isinstance(value, Dataset)]
    lengths = {count, *map(_length, sets)} - {-1, 0, 1}
    parameters = {
        id(one): value for value, *_ in reached if isinstance(value, nn.Module) for one in value._parameters.values()
    }
    entries: list[_Entry | None] = []
    found: dict[int, tuple[Any, list[_Entry | None]]] = {}
    met = Counter(id(value) for value, *_ in reached)
    for value, parent, label in reached:
        entry = entries[parent] if parent >= 0 else None
        if entry is None and isinstance(label, int) and parent >= 0 and _holds_samples(reached[parent][0], lengths):
            entry = parent, label // 2 if isinstance(reached[parent][0], dict) else label
        entries.append(entry)
        if isinstance(value, (Tensor, np.ndarray)):
            is_learnt = id(value) in parameters and not _are_rows(
                value, parameters[id(value)], _container(entry, parent, reached, met), lengths
            )
            if not is_learnt and (is_plain(value) or isinstance(value, np.ndarray)):
                found.setdefault(id(value), (value, []))[1].append(entry)
        elif _has_references(value) and (value is dataset or isinstance(value, Dataset) or _has_rows(value, count)):
            yield value
    shared = _shared(found.values(), entries, reached, lengths)
    row = max(sizes, default=0)
    is_known = row > 0
    if not is_known:
        # A table tells it by its rows where no sample is at hand.
        tables = [value for value, within in found.values() if within == [None] * len(within)]
        sizes = {_size(value) // length for value in tables if (length := _length(value)) in lengths}
        row = max(sizes, default=_FEW)
    alone = Counter(_size(value) for value, within in found.values() if within == [None] * len(within))
    for value, within in found.values():
        size = _size(value)
        if within != [None] * len(within):
            is_constant = extent(value) in shared and (not is_known or size <= row or id(value) in parameters)
        elif _length(value) in lengths:
            is_constant = False
        else:
            # Half as many of a size as there are samples are the samples, wherever each lies.
            are_few = alone[size] < max(_SAMPLES, count / 2)
            is_constant = are_few and (size in sizes or size <= min(row, count - 1))
        if not is_constant:
            yield value


_Entry = tuple[int, int]
"""Where a container of samples was met, and which entry of it something is in."""


def _shared(
    found: Iterable[tuple[Any, list[_Entry | None]]],
    entries: Iterable[_Entry | None],
    reached: Sequence[Reached],
    lengths: Set[int],
) -> set[tuple[int, int] | None]:
    """Places that several samples of one container have, one in :data:`_SHARED` at least.

    Not those that one alone has of a container with an entry for each sample: a row that is a neighbour of many.
    """
    counts = {container: _looked_at(reached[container][0]) for container in {one[0] for one in entries if one}}
    having: dict[tuple[int, tuple[int, int] | None], set[int]] = {}
    for value, within in found:
        place = extent(value)
        for entry in within:
            if entry is not None:
                having.setdefault((entry[0], place), set()).add(entry[1])
    own = {
        place for (container, place), some in having.items() if len(some) == 1 and len(reached[container][0]) in lengths
    }
    found_shared = {
        place for (container, place), some in having.items() if len(some) >= max(2, counts[container] / _SHARED)
    }
    return found_shared - own


def _container(entry: _Entry | None, parent: int, reached: Sequence[Reached], met: Mapping[int, int]) -> Any:
    """The list, or mapping, of samples that something is in, if one entry of it alone leads there; or ``None``."""
    if entry is None:
        return None
    while parent != entry[0]:
        if met[id(reached[parent][0])] > 1:
            return None
        parent = reached[parent][1]
    return reached[parent][0]


def _are_rows(value: Any, module: nn.Module, container: Any, lengths: Set[int]) -> bool:
    """Whether a parameter of a module holds samples, as far as its shape and where it is show it.

    Args:
        value: the parameter.
        module: whose it is.
        container: the list, or mapping, of samples of which one entry leads to it, or ``None``.
        lengths: numbers of samples.
    """
    if container is not None and (len(container) in lengths or container is module._parameters):
        return True
    padding = 1 if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else 0
    return value.dim() > 0 and bool({len(value), len(value) - padding, value.shape[-1]} & lengths)


def _looked_at(container: Any) -> int:
    """How many entries of a container are looked at, numbers and text among them."""
    count = len(container) * (2 if isinstance(container, dict) else 1)
    return min(len(container), -(-count // stride(count, _READ)))


def _holds_samples(value: Any, lengths: Set[int]) -> bool:
    if isinstance(value, dict):
        return len(value) in lengths or len(value) >= _NAMED
    return isinstance(value, CONTAINERS) and (len(value) in lengths or len(value) >= _SAMPLES)


def _has_rows(value: Any, count: int) -> bool:
    """Whether something is read by numbers, or names, and has as many as there are samples."""
    kind = type(value)
    return count > 1 and hasattr(kind, "__getitem__") and hasattr(kind, "__len__") and _length(value) == count


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else int(value.size)


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
