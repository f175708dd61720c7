"""What in training data lies on one another in memory: one person's numbers in several samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clipless_dp.errors import PrivacyError
from clipless_dp.packing import LABELS
from clipless_dp.sampling import memory
from clipless_dp.sampling.people import People
from clipless_dp.sampling.windows import (
    extent,
    has_places,
    is_expanded,
    lags,
    overlapping,
    placed,
    row_step,
    shared_parts,
    shared_rows,
)

AT_ONCE = 4
"""Samples that are held at once to see whether a data set reads into memory that it uses again."""

INSTEAD = (
    "each person may be one row, once: a person's rows, windows or views together (fit's augment= and multiplicity= "
    "average views), rare classes by class_weights of the loss"
)


def lying_together(which: str) -> PrivacyError:
    """What lies on one another, in words."""
    return PrivacyError(
        f"{which} lie on one another in memory (an expanded tensor, one object several times in a list, windows that "
        "overlap, a series beside the same series one step later), so that what is one "
        f"person's enters a batch more than once: {INSTEAD}; or say whose the rows are, groups=, where all that "
        "overlap are one person's. Of a constant that few samples share give each a copy, .clone(); of equal rows of "
        "several people that a cache keeps once, too, [*map(list, rows)]"
    )


def refuse_overlapping_columns(inputs: Sequence[Any], beside: Sequence[Any] = (), people: People | None = None) -> None:
    """Refuses tensors and arrays of which a row lies on a row of another number, of the same or of another one.

    Args:
        inputs: ``(N, ...)`` each. One may hold one row for all samples (types of tokens that are all zero, expanded),
            if not all of them do.
        beside: targets, which may be one row for all.
        people: whose rows are, if the unit is a person: one person's may overlap.

    Raises:
        PrivacyError: one does.
    """
    codes = None if people is None else people.codes
    varying = [values for values in inputs if not (has_places(values) and is_expanded(values))]
    if inputs and not varying:
        raise lying_together("rows of the inputs")
    count = max((len(values) for values in inputs if has_places(values)), default=0)
    columns = [
        values
        for values in (*varying, *beside)
        if has_places(values) and not is_expanded(values) and len(values) == count
    ]
    steps = [*map(row_step, columns)]
    for step in {*steps}:
        for lag in lags([values for values, own in zip(columns, steps, strict=True) if own == step]):
            if codes is None or bool((codes[lag:] != codes[:-lag]).any()):
                raise lying_together(
                    "rows of the inputs" if len(columns) == 1 else "rows of the inputs, or of targets,"
                )
    if len({*steps}) < 2:
        return
    placed_columns = [
        (reach, *one) for one in zip(columns, steps, strict=True) if (reach := extent(one[0])) is not None
    ]
    for ((low, high), one, first), ((least, most), other, second) in combinations(placed_columns, 2):
        if first != second and low < most and least < high:
            rows = shared_rows(one, other)
            if rows.size and (codes is None or bool((codes[rows[0]] != codes[rows[1]]).any())):
                raise lying_together("rows of the inputs, or of targets,")


def refuse_overlapping_table(rows: Any, labels: Any, people: People | None = None) -> None:
    """Refuses rows that lie on one another, in what was given: of a copy it is seen no more.

    Args:
        rows: a tensor, an array, what gives one without a copy (a buffer), a data frame, a mapping of columns, or a
            list of rows. Of a list the same row may not be there twice; tuples that Python and caches keep once for all
            that are equal, those of whole numbers and text alone, may.
        labels: of the rows; only tensors, arrays, columns, and lists of these are looked at.
        people: whose rows are, if the unit is a person.

    Raises:
        PrivacyError: some do.
    """
    rows, labels = _array_of(rows), _array_of(labels)
    if isinstance(labels, (list, tuple)):
        labels = [*map(_array_of, labels)]
    if isinstance(rows, (list, tuple)):
        rows = [*map(_array_of, rows)]
        _refuse_overlapping_list(rows, people)
        _refuse_targets_among(rows, labels, people)
        return
    columns = _columns_of(rows)
    arrays = [column for column in columns if isinstance(column, (Tensor, np.ndarray))]
    if len(arrays) < len(columns):
        # Columns of other types are objects of their own, which vary.
        arrays = [column for column in arrays if not (has_places(column) and is_expanded(column))]
    if arrays:
        refuse_overlapping_columns(arrays, [labels], people)
    _refuse_repeated_names(rows, people)
    if isinstance(labels, list):
        _refuse_targets_among(arrays, labels, people, as_columns=True)


def _columns_of(rows: Any) -> list[Any]:
    """Columns of a table, those that are tensors or arrays as such; a tensor or an array is one column."""
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):
        return [_array_of(rows.iloc[:, place]) for place in range(len(rows.columns))]
    if isinstance(rows, Mapping):
        return [*map(_array_of, rows.values())]
    names = getattr(rows, "column_names", None) or getattr(rows, "columns", None)
    if names is not None:
        return [_array_of(rows[name]) for name in names]
    return [rows] if has_places(rows) else []


_OF_PYTHON = (str, bytes, bool, int, float, complex, np.generic, list, tuple, Mapping, type(None))


def _array_of(values: Any) -> Any:
    """What a column, a buffer, or what gives an array of itself, holds, where that is to be had as an array.

    Without a copy, where there is one: a copy lies on nothing. All else as it is.
    """
    if isinstance(values, (Tensor, np.ndarray, *_OF_PYTHON)):
        return values
    try:
        if hasattr(values, "columns") or hasattr(values, "column_names"):
            return values
        if hasattr(values, "to_numpy"):
            found = getattr(values, "values", None)
            if isinstance(found, np.ndarray) or getattr(getattr(values, "dtype", None), "kind", "f") not in "biuf":
                return found
            return values.to_numpy()
        if hasattr(values, "__array__") or hasattr(values, "__array_interface__"):
            return np.asarray(values)
        return np.asarray(memoryview(values))
    except Exception:
        # What cannot be read is told by who reads it.
        return values


def _refuse_overlapping_list(rows: Sequence[Any], people: People | None) -> None:
    """Refuses lists in which a row is there twice, or lies on another one."""
    owners = range(len(rows)) if people is None else people.codes.tolist()
    first: dict[Any, int] = {}
    for row, owner in zip(rows, owners, strict=True):
        place = _place_of(row)
        if place is not None and first.setdefault(place, owner) != owner:
            raise lying_together("rows of the inputs")
    pair = overlapping(placed([[(0, row)] if isinstance(row, (Tensor, np.ndarray)) else [] for row in rows]), owners)
    if pair is not None:
        raise lying_together(f"rows {pair[0]} and {pair[1]} of the inputs")


def _place_of(row: Any) -> Any:
    """What only one row has: where it lies, or which object it is; ``None`` where equal rows may be one object."""
    if isinstance(row, (Tensor, np.ndarray)):
        return extent(row)
    if isinstance(row, tuple):
        return None if all(type(cell) in (int, bool, str, bytes, type(None)) for cell in row) else id(row)
    return None if isinstance(row, _OF_PYTHON) and not isinstance(row, (list, Mapping)) else id(row)


def _refuse_targets_among(rows: Sequence[Any], labels: Any, people: People | None, as_columns: bool = False) -> None:
    """Refuses targets that lie on a row of another number, where rows, or targets, are a list.

    Args:
        rows: one by one, or columns of them.
        labels: a list, a tensor or an array.
        people: whose rows are, if the unit is a person.
        as_columns: whether rows are columns.
    """
    reaches = [reach for part in rows if (reach := extent(part)) is not None]
    if not reaches or not (isinstance(labels, list) or has_places(labels)):
        return
    count = len(labels)
    low, high = min(start for start, _ in reaches), max(stop for _, stop in reaches)
    targets = labels if isinstance(labels, list) else [labels[place : place + 1] for place in range(count)]
    near = [
        [(-1, one)] if (reach := extent(one)) is not None and low < reach[1] and reach[0] < high else []
        for one in targets
    ]
    if not any(near) or count != (len(people.codes) if people is not None else count):
        return
    if as_columns:
        columns = [column for column in rows if has_places(column) and len(column) == count and not is_expanded(column)]
        samples = [[column[place : place + 1] for column in columns] for place in range(count)]
    else:
        samples = [[row] for row in rows]
    if len(samples) != count:
        return
    owners = range(count) if people is None else people.codes.tolist()
    first = {extent(part): owner for sample, owner in zip(samples, owners, strict=True) for part in sample}
    for one, owner in zip(near, owners, strict=True):
        if one and first.get(extent(one[0][1]), owner) != owner:
            raise lying_together("rows of the inputs, or of targets,")
    named = [
        [*((number, part) for number, part in enumerate(sample) if isinstance(part, (Tensor, np.ndarray))), *one]
        for sample, one in zip(samples, near, strict=True)
    ]
    if overlapping(placed(named), owners) is not None:
        raise lying_together("rows of the inputs, or of targets,")


_REPEATED = 4
"""Rows of one name in an index up to which, on average, a name may be of one row that repeats, not of a class."""


def _refuse_repeated_names(rows: Any, people: People | None) -> None:
    """Refuses a frame in which rows repeat, where its index tells it: of one name all rows are equal, of two none are.

    Names of which rows differ (two frames one after the other, a date, a person's number) are usual; so are equal rows
    under names of their own. What cannot be compared is left.
    """
    if not (hasattr(rows, "iloc") and hasattr(rows, "columns")):
        return
    names = rows.index
    try:
        if names.is_unique or not len(rows.columns):
            return
        number = np.asarray(names.factorize()[0])
        count = len({*number.tolist()})
        if count * _REPEATED < len(rows) or (
            people is not None and len({*zip(number.tolist(), people.codes.tolist(), strict=True)}) == count
        ):
            return
        distinct = int((~rows.duplicated()).sum())
        together = rows.copy(deep=False)
        together.insert(0, "", number, allow_duplicates=True)
        is_told = distinct == count == int((~together.duplicated()).sum())
    except (TypeError, ValueError):
        return
    if is_told:
        raise PrivacyError(
            "rows of the frame repeat: those of one name in its index are equal, and those of different names are not, "
            "as sample(replace=True) and loc with repeated names leave them, so that what is one person's enters a "
            f"batch more than once: {INSTEAD}; or say whose the rows are, groups=. Rows that are different persons' "
            "need names of their own, reset_index(drop=True)"
        )


def refuse_overlap(samples: Sequence[Any], count: int, owners: Any = None, read: str = "") -> None:
    """Refuses samples of which one lies on another.

    Args:
        samples: some of a data set.
        count: how many the data set has.
        owners: whose they are.
        read: how they were come by, for the message.
    """
    parts = placed([*map(_parts, samples)])
    pair = overlapping(parts, owners) or shared_parts(parts, len(samples), count, owners)
    if pair is not None:
        raise lying_together(f"samples {pair[0]} and {pair[1]}{read}")


class Beside:
    """The first samples that a data set returns, held at once to see whether they lie on one another.

    Args:
        count: samples of the data set.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._owners: list[int] | None = []
        self._samples: list[Any] = []
        self._first: memory.State | None = None

    def add(self, sample: Any, owner: int | None = None) -> None:
        """Holds a sample, if few are.

        Args:
            sample: what was read.
            owner: whose it is, if the unit is a person.
        """
        if len(self._samples) < AT_ONCE:
            self._samples.append(sample)
            self._owners = None if owner is None or self._owners is None else [*self._owners, owner]
            self._first = self._first or memory.State(_arrays(sample))

    def refuse_overlap(self) -> None:
        """Refuses windows of what the data set holds.

        Raises:
            PrivacyError: two samples overlap, and reading the second has left the first one as it was: what is read
                into memory that is used again lies on nothing.
        """
        try:
            refuse_overlap(self._samples, self._count, self._owners, " of those that were read")
        except PrivacyError:
            if memory.State(_arrays(self._samples[0])) == self._first:
                raise


def _arrays(sample: Any) -> list[Any]:
    """Tensors and arrays of a sample's inputs."""
    return [part for name, part in _parts(sample) if name >= 0]


def _leaves(value: Any) -> list[Any]:
    return [value] if isinstance(value, (Tensor, np.ndarray, int, float)) else tree_leaves(value)


def _parts(sample: Any) -> list[tuple[int, Any]]:
    """Tensors and arrays of a sample, by their places in it: those of targets are negative."""
    targets: Any = ()
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        sample, targets = sample
    if isinstance(sample, Mapping):
        targets = [targets, *(part for name, part in sample.items() if name in LABELS)]
        sample = [part for name, part in sample.items() if name not in LABELS]
    named = [*enumerate(_leaves(sample)), *((-1 - place, part) for place, part in enumerate(_leaves(targets)))]
    return [(name, part) for name, part in named if isinstance(part, (Tensor, np.ndarray))]
