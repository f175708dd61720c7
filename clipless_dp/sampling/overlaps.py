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
        f"{which} lie on one another in memory (an expanded tensor, windows that overlap, a series beside the same "
        "series one step later), so that what is one "
        f"person's enters a batch more than once: {INSTEAD}; or say whose the rows are, groups=, where all that "
        "overlap are one person's. Of a constant that few samples share give each a copy, .clone()"
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
    columns = [
        values
        for values in (*varying, *beside)
        if has_places(values) and not is_expanded(values) and len(values) == len(inputs[0])
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
        rows: a tensor, an array, a data frame, or a list of rows.
        labels: of the rows; only tensors, arrays and columns of pandas are looked at.
        people: whose rows are, if the unit is a person.

    Raises:
        PrivacyError: some do.
    """
    if isinstance(rows, (list, tuple)):
        _refuse_overlapping_list(rows, people)
        return
    beside = [_array_of(labels)]
    if hasattr(rows, "iloc") and hasattr(rows, "columns"):
        columns = [_array_of(rows.iloc[:, place]) for place in range(len(rows.columns))]
        if all(isinstance(column, np.ndarray) for column in columns):
            refuse_overlapping_columns(columns, beside, people)
            return
        # Columns of other types are objects of their own, which vary.
        columns = [column for column in columns if isinstance(column, np.ndarray) and not is_expanded(column)]
        refuse_overlapping_columns(columns, beside, people)
    elif has_places(found := _array_of(rows)):
        refuse_overlapping_columns([found], beside, people)


def _array_of(values: Any) -> Any:
    """What a column of pandas holds, without a copy; all else as it is."""
    return values.values if hasattr(values, "iloc") else values


def _refuse_overlapping_list(rows: Sequence[Any], people: People | None) -> None:
    """Refuses lists in which a row is there twice, or lies on another one."""
    owners = range(len(rows)) if people is None else people.codes.tolist()
    first: dict[Any, int] = {}
    for row, owner in zip(rows, owners, strict=True):
        place = extent(row) if isinstance(row, (Tensor, np.ndarray)) else id(row) if isinstance(row, list) else None
        if place is not None and first.setdefault(place, owner) != owner:
            raise lying_together("rows of the inputs")
    pair = overlapping(placed([[(0, row)] if isinstance(row, (Tensor, np.ndarray)) else [] for row in rows]), owners)
    if pair is not None:
        raise lying_together(f"rows {pair[0]} and {pair[1]} of the inputs")


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
