"""Sums of parameters' bit patterns, the same in every layout and on every device, by which changes of weights show."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipless_dp.distributed import placement
from clipless_dp.sampling import fingerprints

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}

Array = np.ndarray[Any, Any]
Mark = tuple[int, int, bytes | None]

_BOTH = 1 << 128
"""What tells a number that holds both sums from one that is the first alone."""


class Numbers:
    """One parameter's numbers in the memory where they lie, found once: every step asks."""

    def __init__(self, parameter: nn.Parameter) -> None:
        values = placement.local(parameter.detach())
        self._place = _place(values)
        self._patterns = values.view(INTEGERS[values.element_size()])
        self._dtype = torch.int64 if values.element_size() == 8 else torch.int32
        self._flat = self._patterns.reshape(-1) if self._patterns.is_contiguous() else None
        # Of a few numbers, torch takes ten times as long.
        self._array = self._flat.numpy() if self._flat is not None and self._flat.is_cpu else None
        self._weights = _weights(min(values.numel(), _COLUMNS), self._dtype, values.device)
        self._sampled = fingerprints.Sampled(values)

    def are_of(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter's numbers still lie here."""
        return self._place == _place(placement.local(parameter))

    def mark(self, parameter: nn.Parameter) -> Mark:
        """What tells, without a look at all numbers, that they may have changed."""
        return placement.local(parameter)._version, self._place[0], self._sampled.now()

    def sums(self) -> Sums:
        """The sums now, on the device where the numbers are."""
        if self._array is not None:
            kind = np.int64 if self._dtype == torch.int64 else np.int32
            return Sums(_sums_of_columns(self._array, kind), self._weights)
        columns = self._patterns.reshape(-1) if self._flat is None else self._flat
        whole = len(columns) // _COLUMNS * _COLUMNS
        if whole:
            rest = columns[whole:]
            columns = columns[:whole].view(-1, _COLUMNS).sum(0, dtype=self._dtype)
            columns[: len(rest)] += rest
        else:
            columns = columns.to(self._dtype, copy=True)
        return Sums(columns, self._weights)


def _sums_of_columns(patterns: Array, dtype: type[np.signedinteger[Any]]) -> Array:
    """As torch makes them."""
    whole = patterns.size // _COLUMNS * _COLUMNS
    if not whole:
        return patterns.astype(dtype)
    columns: Array = np.add.reduce(patterns[:whole].reshape(-1, _COLUMNS), axis=0, dtype=dtype)
    rest = patterns[whole:]
    columns[: rest.size] += rest
    return columns


_COLUMNS = 16381
"""A prime: rows of hardly any weight are as long, so that what changes places changes columns.

What changes places with what is a multiple of this further on is not seen. (One pass over the numbers has no more.)
"""


@cache
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Public odd numbers, one for each column."""
    bits = 64 if dtype == torch.int64 else 32
    # Of a generator with a fixed formula, so that every process and version has the same.
    numbers = np.random.PCG64(20240507).random_raw(_COLUMNS)[:count] | np.uint64(1)
    signed = numbers.view(np.int64) if bits == 64 else numbers.astype(np.uint32).view(np.int32)
    return torch.from_numpy(signed.copy()).to(device)


class Sums:
    """Sums of one parameter's bit patterns, on its device; every step makes them, and few are ever asked for.

    Args:
        columns: sums of those in a column, of a CPU's numbers an array.
        weights: of the columns.
    """

    def __init__(self, columns: Tensor | Array, weights: Tensor) -> None:
        self._columns = columns
        self._weights = weights

    def _tensor(self) -> Tensor:
        return self._columns if isinstance(self._columns, Tensor) else torch.from_numpy(self._columns)

    @property
    def first(self) -> Tensor:
        """The sum of all, modulo 2³² (2⁶⁴ for numbers as long)."""
        columns = self._tensor()
        return columns.sum(dtype=columns.dtype)

    @property
    def second(self) -> Tensor:
        """That of those in a column, modulo as much, times its weight, modulo as much again: this sees the order."""
        products = self._tensor() * self._weights
        if products.dtype == torch.int64:
            # Their carries are lost, as those of shorter ones: without that, doubling all numbers might not be seen.
            products = products >> 32
        return products.sum(dtype=torch.int64)

    def __int__(self) -> int:
        return _BOTH | (int(self.second) % 2**64) << 64 | int(self.first) % 2**64


def agree(one: int, other: int) -> bool:
    """Whether two numbers are the sums of the same values, as far as both tell."""
    return one == other or (min(one, other) < _BOTH <= max(one, other) and _first(one) == _first(other))


def _first(sums: int) -> int:
    return sums % 2**64


def _place(values: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return values.data_ptr(), values.shape, values.stride()
