"""Where rows lie in memory, and whether one lies on another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_TRIED = 256
"""Pairs of samples whose entries are compared where no pair is contiguous: columns of a table lie between each other,
and on nothing."""

_ENTRIES = 1 << 20
"""Entries of a tensor up to which it is compared entry by entry."""


def extent(value: Any) -> tuple[int, int] | None:
    """From where to where a tensor or an array lies in memory; ``None`` if it has no place."""
    if is_plain(value):
        size = value.element_size()
        try:
            start = value.data_ptr() if value.numel() else 0
            if value.is_contiguous():
                return (start, start + size * value.numel()) if start else None
            steps = [stride * size for stride in value.stride()]
        except RuntimeError:
            return None
    elif isinstance(value, np.ndarray) and value.size:
        start, steps, size = int(value.__array_interface__["data"][0]), [*value.strides], value.itemsize
    else:
        return None
    ends = [(length - 1) * step for length, step in zip(value.shape, steps, strict=True)]
    low, high = sum(end for end in ends if end < 0), sum(end for end in ends if end > 0)
    return (start + low, start + high + size) if start else None


def is_plain(value: Any) -> bool:
    """Whether a tensor is one whose entries lie in memory by its strides."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def components(value: Any) -> list[Tensor]:
    """The plain tensors that a sparse or nested one, or a storage, consists of; of a plain one none."""
    if isinstance(value, torch.UntypedStorage):
        return [torch.empty(0, dtype=torch.uint8, device=value.device).set_(value)]
    if not isinstance(value, Tensor) or is_plain(value):
        return []
    value = value.detach()
    if value.is_nested:
        lengths = value.offsets() if value.layout is torch.jagged else value._nested_tensor_size()
        return [value.values(), lengths]
    if value.layout is torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return []


Places = np.ndarray[Any, np.dtype[np.int64]]
"""Addresses."""


class Placed(NamedTuple):
    """A tensor or an array of a sample: from where to where it lies, whose it is, its name (of a target a negative
    one) and itself."""

    start: int
    stop: int
    sample: int
    name: int
    value: Any


def placed(samples: Sequence[Sequence[tuple[int, Any]]]) -> list[Placed]:
    """What samples consist of, in the order in which it lies in memory.

    Args:
        samples: names and tensors or arrays of each.
    """
    found = [
        Placed(*reach, number, name, value)
        for number, sample in enumerate(samples)
        for name, value in sample
        if (reach := extent(value)) is not None
    ]
    # No two parts of a sample have one name.
    return sorted(found)


def _reaches(parts: Sequence[Placed]) -> tuple[Places, Places]:
    starts = np.fromiter((one[0] for one in parts), dtype=np.int64, count=len(parts))
    return starts, np.fromiter((one[1] for one in parts), dtype=np.int64, count=len(parts))


def overlapping(parts: Sequence[Placed], owners: Sequence[int] | None = None) -> tuple[int, int] | None:
    """Two samples of which a tensor or an array lies on one of the other, in part; ``None`` if none do.

    What lies where another lies as a whole is one and the same: :func:`shared_parts`.

    Args:
        parts: of :func:`placed`.
        owners: whose samples are: one person's may overlap.
    """
    starts, stops = _reaches(parts)
    if len(parts) < 2 or not bool((np.maximum.accumulate(stops)[:-1] > starts[1:]).any()):
        return None
    tried, widest = 0, 0
    for place in range(1, len(parts)):
        low, high, number, _, value = parts[place]
        for before in {place - 1, widest}:
            start, stop, other, _, earlier = parts[before]
            if low >= stop or number == other or (owners is not None and owners[number] == owners[other]):
                continue
            if _layout(value) == _layout(earlier):
                continue
            if _is_dense(value, low, high) and _is_dense(earlier, start, stop):
                return min(number, other), max(number, other)
            tried += 1
            if tried <= _TRIED and max(_size(value), _size(earlier)) <= _ENTRIES and _meet(value, earlier):
                return min(number, other), max(number, other)
        if high > parts[widest].stop:
            widest = place
    return None


def _layout(value: Any) -> tuple[Any, ...]:
    start = value.data_ptr() if isinstance(value, Tensor) else value.__array_interface__["data"][0]
    return start, tuple(value.shape), _strides(value)


def _strides(value: Any) -> tuple[int, ...]:
    """In bytes."""
    if isinstance(value, Tensor):
        return tuple(step * value.element_size() for step in value.stride())
    return tuple(value.strides)


def row_step(values: Any) -> int:
    """Bytes from a row of a tensor, or array, to the next one; below zero where rows are in reverse."""
    return _strides(values)[0]


def is_expanded(values: Any) -> bool:
    """Whether all rows of a tensor, or array, are one and the same in memory."""
    return len(values) > 1 and _size(values) > 0 and row_step(values) == 0


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else int(value.size)


def _bytes(value: Any) -> int:
    """Of an entry."""
    return value.element_size() if isinstance(value, Tensor) else int(value.itemsize)


def _is_dense(value: Any, low: int, high: int) -> bool:
    """Whether a tensor or an array has no gaps."""
    return bool(high - low <= value.nbytes)


def _meet(one: Any, other: Any) -> bool:
    """Whether an entry lies on one of the other."""
    return np.intersect1d(_places(one), _places(other)).size > 0


def _places(value: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The addresses of all entries."""
    start, shape, strides = _layout(value)
    places = np.asarray([start], dtype=np.int64)
    for size, step in zip(shape, strides, strict=True):
        places = (places[:, None] + step * np.arange(size)).reshape(-1)
    return places


def rows_overlap(values: Any) -> bool:
    """Whether a row of a tensor, or array, shares memory with another one."""
    if not has_places(values):
        return False
    return is_expanded(values) or len(lags([values])) > 0


def has_places(values: Any) -> bool:
    """Whether something has rows, several, that lie in memory by its strides."""
    if not (is_plain(values) or isinstance(values, np.ndarray)):
        return False
    return len(values.shape) > 0 and len(values) > 1 and _size(values) > 0


def lags(columns: Sequence[Any]) -> list[int]:
    """Distances of rows that share memory: one of one column with one of the same or of another column.

    All rows that share memory are linked by steps of these distances, through rows that share it too.

    Args:
        columns: tensors and arrays of as many rows each, and of one stride from row to row that is not zero.
    """
    count, step = len(columns[0]), abs(row_step(columns[0]))
    reaches = sorted(reach for column in columns if (reach := extent(column)) is not None)
    apart = all(before[1] <= after[0] for before, after in pairwise(reaches))
    if apart and all(map(_rows_apart, columns)):
        return []
    # Entries of packed records lie at any bytes.
    starts = [_layout(column)[0] for column in columns]
    of_all = (*map(_bytes, columns), *(step for column in columns for step in _strides(column)))
    unit = math.gcd(*of_all, *(start - starts[0] for start in starts))
    places = np.unique(np.concatenate([_places_of_row(column, unit) for column in columns]))
    # Two places whose distance is k steps are one and the same in two rows that are k apart. Of all pairs with one
    # remainder the nearest are neighbours.
    order = np.lexsort((places, places % step))
    same = np.diff((places % step)[order]) == 0
    found = np.unique(np.diff(places[order])[same] // step)
    return [int(lag) for lag in found if lag < count]


def _rows_apart(values: Any) -> bool:
    """Whether each axis steps over all that those of smaller steps reach: no entry lies on another."""
    reach = _bytes(values) - 1
    steps = [abs(step) for step in _strides(values)]
    inner = [(step, size) for step, size in zip(steps[1:], values.shape[1:], strict=True) if step]
    for step, size in sorted([(steps[0], len(values)), *inner]):
        if size > 1 and step <= reach:
            return False
        reach += step * (size - 1)
    return True


def _places_of_row(values: Any, unit: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where the first row's entries lie, in steps of so many bytes."""
    row = _without_copies(values)[:1]
    return np.asarray((_places(row)[:, None] + np.arange(0, _bytes(row), unit)).reshape(-1))


def _without_copies(values: Any) -> Any:
    """Rows without what is expanded within them."""
    once = [slice(None), *(slice(None) if step else slice(1) for step in _strides(values)[1:])]
    return values[tuple(once)]


def shared_rows(one: Any, other: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``(2, pairs)``: rows of two columns, of other numbers, that share memory; of large ones of the first rows.

    Args:
        one: a column, a tensor or an array.
        other: a column of as many rows and another stride from row to row.
    """
    nothing = np.zeros((2, 0), dtype=np.int64)
    reaches = extent(one), extent(other)
    if reaches[0] is None or reaches[1] is None or reaches[0][1] <= reaches[1][0] or reaches[1][1] <= reaches[0][0]:
        return nothing
    one, other = _without_copies(one), _without_copies(other)
    rows = max(1, _ENTRIES // max(_size(one[:1]), _size(other[:1])))
    places, others = _places(one[:rows]), _places(other[:rows])
    order = np.argsort(others, kind="stable")
    begins = np.searchsorted(others[order], places, side="left")
    met = np.searchsorted(others[order], places, side="right") - begins
    inner = np.arange(met.sum()) - np.repeat(np.cumsum(met) - met, met)
    first = np.repeat(np.arange(len(places)), met) // _size(one[:1])
    second = order[np.repeat(begins, met) + inner] // _size(other[:1])
    return np.unique(np.stack([first, second])[:, first != second], axis=1)


_FEW = 8
"""A pool of constants has so many samples for each, on average."""


def shared_parts(
    parts: Sequence[Placed], samples: int, count: int, owners: Sequence[int] | None = None
) -> tuple[int, int] | None:
    """Two samples of which a part of one is a part of the other, and no constant; ``None`` if there are none.

    A part lies at the same place as a whole. It is a constant where more than half of the samples have it, or where it
    is of a small pool: classes have prototypes, which on average eight samples share, or which are views of a tensor
    that has an eighth as many rows. Else it is of two samples under two names (a series beside the same series, one
    step later), or, among other inputs under one name, of fewer than eight samples: a row that several samples share.

    Args:
        parts: of :func:`placed`.
        samples: how many they are of.
        count: samples of the data set.
        owners: whose samples are: what one person's samples share is theirs.
    """
    starts, stops = _reaches(parts)
    if not bool(((starts[1:] == starts[:-1]) & (stops[1:] == stops[:-1])).any()):
        return None
    together = [[*some] for _, some in groupby(parts, key=lambda one: one[:2])]
    held, places = Counter(one.name for one in parts), Counter[int]()
    for some in together:
        places.update({one.name for one in some})
    inputs = sum(name >= 0 for name in held)
    few = max(1.5, min(_FEW, samples / 5))
    for some in together:
        own: dict[int, set[int]] = {}
        for one in some:
            own.setdefault(one.sample, set()).add(one.name)
        if len(own) < 2 or (owners is not None and len({owners[number] for number in own}) < 2):
            continue
        names = {one.name for one in some}
        several = min(held[name] / places[name] for name in names)
        if several >= few or 2 * len(own) > samples or _is_of_small_pool(some[0].value, count):
            continue
        first, *others = own
        meets_nowhere = next((number for number in others if not own[number] & own[first]), None)
        if meets_nowhere is not None:
            return first, meets_nowhere
        if inputs > 1 and len(own) < few and min(names) >= 0:
            return first, others[0]
    return None


def _is_of_small_pool(value: Any, count: int) -> bool:
    """Whether a tensor or an array is a part of one that holds few of this size."""
    if isinstance(value, Tensor):
        whole = value.untyped_storage().nbytes()
    else:
        base = value
        while isinstance(base.base, np.ndarray):
            base = base.base
        whole = base.nbytes
    own = _size(value) * _bytes(value)
    return bool(own < whole and _FEW * whole <= count * own)
