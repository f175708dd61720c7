"""Where rows lie in memory, and whether one lies on another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        try:
            start = value.data_ptr() if value.numel() else 0
            steps = [stride * value.element_size() for stride in value.stride()]
        except RuntimeError:
            return None
        size = value.element_size()
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


def overlapping(samples: Sequence[Sequence[Any]]) -> tuple[int, int] | None:
    """Two samples of which a tensor or an array lies on one of the other, in part; ``None`` if none do.

    What lies where another lies as a whole is one and the same, and may be a constant.

    Args:
        samples: tensors and arrays of each.
    """
    placed = [
        (*reach, number, value)
        for number, sample in enumerate(samples)
        for value in sample
        if (reach := extent(value)) is not None
    ]
    placed.sort(key=lambda one: one[:3])
    tried, widest = 0, 0
    for place in range(1, len(placed)):
        low, _, number, value = placed[place]
        for before in {place - 1, widest}:
            start, stop, other, earlier = placed[before]
            if low >= stop or number == other or _layout(value) == _layout(earlier):
                continue
            if _is_dense(value, low, placed[place][1]) and _is_dense(earlier, start, stop):
                return min(number, other), max(number, other)
            tried += 1
            if tried <= _TRIED and max(_size(value), _size(earlier)) <= _ENTRIES and _meet(value, earlier):
                return min(number, other), max(number, other)
        if placed[place][1] > placed[widest][1]:
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


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else int(value.size)


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


def rows_overlap(values: Tensor) -> bool:
    """Whether a row of a tensor shares memory with another one."""
    if values.layout != torch.strided or len(values) < 2 or values.numel() == 0:
        return False
    step = values.stride(0)
    if step == 0:
        return True
    inner = [(stride, size) for stride, size in zip(values.stride()[1:], values.shape[1:], strict=True) if stride]
    reach = 0
    for stride, size in sorted([(step, len(values)), *inner]):
        if size > 1 and stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    places = np.zeros(1, dtype=np.int64)
    for stride, size in inner:
        places = np.unique(places[:, None] + stride * np.arange(size))
    # Two places whose distance is k steps are one and the same in two rows that are k apart. Of all pairs with one
    # remainder the nearest are neighbours.
    order = np.lexsort((places, places % step))
    same = np.diff((places % step)[order]) == 0
    return bool((np.diff(places[order])[same] < step * len(values)).any())
