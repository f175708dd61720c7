"""What tells tensors apart by their bits, where autograd's counters of versions say nothing."""

from __future__ import annotations

import hashlib
import math
import secrets
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SAMPLED = 128
"""Entries that are looked at: each is a miss of the cache."""

_SPARSE = 0.5
"""Where so large a share of the entries that are looked at is zero, all are summed up."""


def fingerprint(values: Tensor, known: object = None) -> object:
    """Tells tensors apart by entries of each row, where no device is waited for; by all bits where many are zero.

    What is written through ``.data``, or an array that shares memory, counts no versions. ``None`` on other devices.

    Args:
        values: the tensor.
        known: one that it is compared with: entries that are the same are as sparse as they were.
    """
    array = _array_of(values)
    if array is None:
        return None
    if values.dim() < 2 or values.stride(0) < max(values.stride()) or array.size <= 8 * _PRIME:
        return _sums_of_bits(values)
    some = array[_places(values.shape[0], array.size)]
    if known is not None and some.tobytes() == known:
        return known
    # Padding is not zero, whatever the samples are.
    sparse = np.count_nonzero(some) < 0.9 * some.size or _repeats_one_value(some)
    return _sums_of_bits(values) if sparse else some.tobytes()


def _repeats_one_value(some: np.ndarray[Any, Any]) -> bool:
    """Whether a value, a background say, takes more than a fifth of the entries, which hardly tell rows apart then.

    Of rows that share a fifth of their entries, four agree in less than one case of 10⁵.
    """
    few = np.sort(some[:: max(1, some.size // _SAMPLED)])
    count = few.size // 5
    return bool((few[count:] == few[: few.size - count]).any()) if count else False


def of_rows(values: Tensor) -> list[bytes]:
    """A digest of each row, ``(B, ...)``: equal rows have equal ones, zeros of either sign and NaN included."""
    flat = values.detach().reshape(len(values), -1).cpu()
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(len(flat), -1)
    digests = []
    for row in flat:
        if row.is_floating_point():
            row = torch.where(row == 0.0, 0.0, row.double())
            row[row.isnan()] = math.nan
        digests.append(hashlib.blake2b(row.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).digest())
    return digests


def sample(values: Tensor, known: object = None) -> object:
    """As :func:`fingerprint`, by some of the entries, where few of them are zero."""
    array = _array_of(values)
    if array is None:
        return None
    some = array[_some(array.size)]
    if known is not None and some.tobytes() == known:
        return known
    sparse = np.count_nonzero(some) < (1.0 - _SPARSE) * some.size
    return _sums_of_bits(values) if sparse else some.tobytes()


def of_all(values: Tensor) -> object:
    """As :func:`fingerprint`, by sums over the bits of all entries."""
    return None if _in_memory(values) is None else _sums_of_bits(values)


class Sampled:
    """The entries that :func:`sample` looks at, in the memory that they are in.

    Args:
        values: the tensor.
    """

    def __init__(self, values: Tensor) -> None:
        flat = _in_memory(values)
        apart = flat is None or flat.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()
        self._entries = None if flat is None or apart else _as_array(flat)

    def now(self) -> bytes | None:
        """As they are; ``None`` where that memory has gaps, or is not the processor's."""
        entries = self._entries
        return None if entries is None else entries[_some(entries.size)].tobytes()


_SECRET = secrets.randbits(64)
"""So that places are the same whenever they are asked for, and nobody's data is made for them."""

_OF_EACH_ROW = 4
"""Entries that are looked at: of another row, whose numbers are bits, all of them agree in one case of sixteen."""


@lru_cache(maxsize=512)
def _some(size: int) -> np.ndarray[Any, Any]:
    """Places of some entries, one in each of as many parts: on no line along which something is written."""
    if size <= _SAMPLED:
        return np.arange(size)
    drawn = np.random.default_rng((_SECRET, size)).random(_SAMPLED)
    return np.minimum(((np.arange(_SAMPLED) + drawn) * (size / _SAMPLED)).astype(np.int64), size - 1)


@lru_cache(maxsize=64)
def _places(rows: int, size: int) -> np.ndarray[Any, Any]:
    """Places of some entries of each row, as many as there are rows in the order of memory; others in each process."""
    drawn = np.random.default_rng((_SECRET, rows, size)).random((rows, _OF_EACH_ROW))
    places: np.ndarray[Any, Any] = ((np.arange(rows)[:, None] + drawn) * (size / rows)).astype(np.int64)
    found: np.ndarray[Any, Any] = np.minimum(places, size - 1).ravel()
    return found


def _array_of(values: Tensor) -> np.ndarray[Any, Any] | None:
    """As :func:`_in_memory`, for NumPy: at once where nothing has to be done, as several times in each step."""
    plain = type(values) in _DENSE and values.dtype in _COMMON and values.is_cpu and values.layout is torch.strided
    if plain and not values.is_nested and values.is_contiguous() and not values.is_neg():
        array: np.ndarray[Any, Any] = (values.detach() if values.requires_grad else values).numpy()
        return array.reshape(-1)
    flat = _in_memory(values)
    return None if flat is None else _as_array(flat)


_DENSE = frozenset({Tensor, nn.Parameter})
_COMMON = frozenset({torch.float32, torch.float64})


def _as_array(flat: Tensor) -> np.ndarray[Any, Any]:
    entries: np.ndarray[Any, Any] = (
        flat.view(_INTEGERS[flat.element_size()]) if flat.dtype in _UNKNOWN_TO_NUMPY else flat
    ).numpy()
    return entries


def _in_memory(values: Tensor) -> Tensor | None:
    """All entries in the order in which they lie in memory, if that is the processor's; copied if there are gaps."""
    if not values.is_cpu or values.layout is not torch.strided or values.is_nested:
        return None
    values = values.detach()
    if values.is_conj():
        values = values.conj()
    if values.is_neg():
        values = torch._neg_view(values)
    if type(values) is not Tensor and hasattr(values, "to_local"):
        return _in_memory(values.to_local())
    if not values.is_contiguous():
        values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    # One stride throughout is a view without gaps to torch.
    return values.reshape(-1).contiguous()


def _sums_of_bits(values: Tensor) -> bytes:
    flat = _in_memory(values)
    assert flat is not None
    size = flat.element_size()
    patterns = flat.view(_INTEGERS[size])
    if flat.numel() * size <= 8 * _PRIME:
        short: bytes = patterns.numpy().tobytes()
        return short
    if size in (1, 2, 4) and not (flat.numel() * size % 8 or flat.storage_offset() * size % 8):
        # torch converts narrower integers one by one.
        patterns = flat.view(torch.int64)
    whole = len(patterns) // _PRIME * _PRIME
    sums = patterns[:whole].view(-1, _PRIME).sum(0, dtype=torch.int64)
    rest: bytes = patterns[whole:].numpy().tobytes()
    return sums.numpy().tobytes() + rest


_PRIME = 509
"""Places at which entries are summed up apart: without a common factor with the rows' lengths, as a rule."""

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_UNKNOWN_TO_NUMPY = (
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
