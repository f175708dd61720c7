"""Columns read cell by cell: what is read of a cell never depends on the cells beside it.

A library that makes an array of a list chooses one type for all of it: text for numbers among text, floating-point
numbers, in which neighbouring whole numbers above 2⁵³ are one, for whole numbers beside a NaN. One row more would then
change what is read of every other. So type and missingness are decided here for each cell by itself. What a library did
when the column was made is seen no more: what can have been lost there is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipless_dp.errors import InputError

Cells = npt.NDArray[Any]
"""``(N,)``: of one type, if the column has one of its own; else objects."""

_MISSING_TYPES = frozenset({"MaskedConstant", "NAType", "NaTType"})
"""What numpy and pandas put in place of a missing cell, by name: the latter is not needed."""

_WRITTEN = ("<NA>", "NaT", "None", "nan")
"""What numpy writes for missing cells among text."""

_LISTS = ("to_pylist", "to_list", "tolist")
"""How columns of arrow, polars and pandas, and arrays of Python's own, give their cells one by one."""


def cells_of(column: Any, name: str) -> Cells:
    """The cells of a column: a list, an array, a tensor, or a column of pandas, polars or arrow.

    An array keeps its type; what masks cover is ``None``, as are missing cells of columns that have a type for them.

    Args:
        column: the cells, in order.
        name: what it is, for messages.

    Raises:
        InputError: it is no column: a word, a mapping, a set, a table; or it is one of numpy's text in which numpy may
            have written what was missing.
    """
    shape = getattr(column, "shape", None)
    unordered = isinstance(column, (Mapping, Set, str, bytes)) or not hasattr(column, "__len__")
    if unordered or (shape is not None and len(shape) != 1):
        shown = type(column).__name__ + ("" if shape is None else f" {tuple(shape)}")
        raise InputError(f"{name} must be a column, a cell for each row, got {shown}")
    try:
        cells = _copied(column)
    except Exception as error:
        # Every library has errors of its own, whose words may hold a cell.
        raise InputError(f"{name} cannot be read from a {type(column).__name__}: {type(error).__name__}") from None
    if cells.dtype.kind == "U" and bool(np.isin(cells, _WRITTEN).any()):
        raise InputError(
            f"{name} holds one of the words {', '.join(_WRITTEN)}, which numpy writes where a cell is missing among "
            "text: give a list, or an array of objects"
        )
    return cells


def _copied(column: Any) -> Cells:
    if isinstance(column, Tensor):
        column = column.detach().cpu()
        # numpy has no such type; each of its numbers is one of these.
        return np.asarray((column.float() if column.dtype is torch.bfloat16 else column).numpy())
    if isinstance(column, np.ma.MaskedArray):
        if not np.ma.is_masked(column):
            return np.asarray(column.data)
        objects: Cells = column.data.astype(object)
        objects[np.ma.getmaskarray(column)] = None
        return objects
    if isinstance(getattr(column, "dtype", None), np.dtype):
        cells: Cells = np.asarray(column)
        return cells.astype(object) if cells.dtype.kind == "T" else cells
    listed = next((getattr(column, way)() for way in _LISTS if hasattr(column, way)), column)
    return np.fromiter(listed, dtype=object, count=len(column))


def absent(cells: Cells) -> npt.NDArray[np.bool_]:
    """``(N,)``: where cells are missing: NaN, ``None``, or what pandas has for it."""
    if cells.dtype.kind == "f":
        return np.isnan(cells)
    if cells.dtype.kind != "O":
        return np.zeros(len(cells), dtype=bool)
    return np.fromiter(map(is_missing, cells), dtype=bool, count=len(cells))


def is_missing(cell: Any) -> bool:
    """Whether a cell is NaN, ``None``, or what numpy and pandas have for what is missing."""
    if cell is None or type(cell).__name__ in _MISSING_TYPES:
        return True
    # NaN alone is not itself; math.isnan overflows for large whole numbers.
    return isinstance(cell, Real) and bool(cell != cell)


def is_number(cell: Any) -> bool:
    """Whether a cell is a number, truth values among them."""
    return isinstance(cell, (Real, np.bool_))


def as_numbers(cells: Cells, name: str) -> npt.NDArray[np.float64]:
    """``(N,)``: cells as numbers, NaN where one is missing; what is beyond the largest number is infinite.

    Args:
        cells: of :func:`cells_of`.
        name: what they are, for messages.

    Raises:
        InputError: one is neither a number nor missing.
    """
    if cells.dtype.kind in "biuf":
        return cells.astype(np.float64)
    gone = absent(cells)
    if cells.dtype.kind != "O" or not all(map(is_number, cells[~gone])):
        text = any(isinstance(cell, str) for cell in cells[~gone].tolist()) or cells.dtype.kind in "US"
        read = " (text such as '3', as csv returns it, is none: use pandas.read_csv, or float(cell))" if text else ""
        raise InputError(f"{name} must be numbers, and something else is among them{read}")
    values = np.full(len(cells), math.nan)
    values[~gone] = [_as_float(cell) for cell in cells[~gone]]
    return values


def _as_float(cell: Any) -> float:
    try:
        return float(cell)
    except OverflowError:
        return math.copysign(math.inf, 1 if cell > 0 else -1)


def places_of(cells: Cells, places: Mapping[Any, int], name: str) -> npt.NDArray[np.int64]:
    """``(N,)``: the place of each cell, -1 where it has none.

    Args:
        cells: of :func:`cells_of`.
        places: of public values.
        name: what they are, for messages.

    Raises:
        InputError: a value is so large that it may be a rounded neighbour where it is a floating-point number, and a
            cell is one as large; or all cells are text by their array's type, where some values are none.
    """
    if cells.dtype.kind == "U" and not all(isinstance(value, str) for value in places):
        raise InputError(
            f"{name} is an array of text, which numpy makes of numbers among text too, and not all of {[*places]} are "
            "text: give a list, or an array of objects"
        )
    largest: Any = max((abs(value) for value in places if is_number(value)), default=0)
    if any(_may_be_rounded(cell, largest) for cell in _floats(cells)):
        raise InputError(
            f"{name} holds floating-point numbers, in which whole numbers as large as {largest} are one with their "
            "neighbours, and converting them back brings none: read the column as whole numbers (of pandas, "
            'dtype="Int64" where the file is read) or as text'
        )
    return np.fromiter((_place(cell, places) for cell in cells.tolist()), dtype=np.int64, count=len(cells))


def _floats(cells: Cells) -> list[Any]:
    if cells.dtype.kind == "f":
        # The largest one tells of all.
        return [np.max(np.abs(cells), initial=0.0, where=~np.isnan(cells))]
    return [cell for cell in cells if isinstance(cell, (float, np.floating))] if cells.dtype.kind == "O" else []


def _may_be_rounded(cell: Any, largest: Any) -> bool:
    """Whether both are beyond what a floating-point number of this type holds exactly."""
    exact = 2.0 / float(np.finfo(type(cell)).eps)
    return bool(largest >= exact and abs(cell) >= exact)


def _place(cell: Any, places: Mapping[Any, int]) -> int:
    try:
        return places.get(cell, -1)
    except Exception:
        # What has no hash, or cannot be compared, is none of them.
        return -1


_OTHER_FLOATS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of tensors that numpy has none for."""


def readable(name: str, values: Any) -> Any:
    """What numpy and scikit-learn read: of tensors those that numpy has a type for, of frames no sparse columns.

    Raises:
        InputError: there is no reading it as a table.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.layout is torch.strided and values.dtype in _OTHER_FLOATS:
            # Which holds all of them.
            return values.to(torch.float32)
        return values
    refuse_mapping(name, values)
    if not hasattr(values, "iloc"):
        return values
    if not hasattr(values, "columns"):
        return values.sparse.to_dense() if _is_sparse(values.dtype) else values
    if not len(values.columns):
        raise InputError(f"{name} have no columns")
    if not values.columns.is_unique:
        raise InputError(f"{name} have several columns of one name: rename them, or give an array (N, columns)")
    sparse = {column: kind.subtype for column, kind in values.dtypes.items() if _is_sparse(kind)}
    return values.astype(sparse) if sparse else values


def listed(values: Any) -> Any:
    """A list of a sequence of another class, which numpy would read and nothing else look into; all else as it is."""
    is_other = isinstance(values, Sequence) and not isinstance(values, (list, tuple, str, bytes, bytearray, memoryview))
    return list(values) if is_other else values


def refuse_mapping(name: str, values: Any) -> None:
    """Refuses a mapping of columns where an array, or a frame, is read.

    Raises:
        InputError: it is one.
    """
    # A sparse matrix by its keys is none, and refused where sparse ones are.
    if isinstance(values, Mapping) and not hasattr(values, "toarray"):
        raise InputError(f"{name} are a {type(values).__name__}: give a data frame, pandas.DataFrame(...), or an array")


def _is_sparse(kind: Any) -> bool:
    """Whether a type of a column is pandas' own for few values among many equal ones."""
    return hasattr(kind, "subtype") and hasattr(kind, "fill_value")
