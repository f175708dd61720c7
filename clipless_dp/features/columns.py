"""Columns of a data frame as numbers: each row by itself, by rules that are public and that no data entered."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.sampling.cells import Cells, absent, as_numbers, cells_of, is_number, places_of

_LARGEST_SCALED = 4.0
"""Up to which a place of a category is scaled, as standardised numbers are."""


class TableEncoding:
    """How the named columns of a data frame become rows of numbers. Columns that are not named are not read.

    A column of numbers stays one; what brings it to a common scale is a matter of charged statistics, see
    :func:`clipless_dp.tables.fit_table`. A column of ``K`` categories becomes ``K + 1`` places, of which one is set:
    the last is for whatever is not among the categories. A place is ``(e_j - 1/K)·s``, with the ``s`` at which it would
    have deviation one were all categories equally frequent, at most 4 in size: a public scale.

    A column named in ``missing`` gets one further place, which is 1 where its cell is missing and 0 elsewhere. Whether
    a column gets one never depends on the data.

    Args:
        numbers: names of columns of numbers, truth values among them.
        categories: for each column of categories all values that are told apart: text, or whole numbers, in an order
            that stays. They must be *public*, from a code book say: values read off the training data tell who has a
            rare one.
        missing: columns in which cells may be missing, each with a public number that stands in for a missing one;
            ``None``, and always for categories, where nothing stands in: such a number becomes the mean, and such a
            category none of the places. Cells that are missing elsewhere become the mean, or the place of unknown ones.

    Raises:
        ConfigurationError: there is no column, a name occurs twice, categories are fewer than two, doubled, or of mixed
            types, or a fill is no finite number or of no column.

    Attributes:
        names: what each number of an encoded row is.
        measured: how many of them, the first ones, are numbers whose scale the data has.

    Guarantee:
        An encoded row is a function of its own cells and of these arguments: whether a cell is missing, text or a
        number is decided for each by itself. A frame is data as it is given: where the library that made a column may
        have changed its cells for the sake of others, and it matters (categories of 2⁵³ or more in floating-point
        numbers, missing cells that numpy wrote as text), it is refused.
    """

    def __init__(
        self,
        numbers: Sequence[str] = (),
        categories: Mapping[str, Sequence[str | int]] | None = None,
        *,
        missing: Mapping[str, float | None] | Collection[str] = (),
    ) -> None:
        if isinstance(numbers, str) or not all(isinstance(name, str) for name in numbers):
            raise ConfigurationError(f"numbers must be a list of column names, got {numbers!r}")
        self.numbers = tuple(numbers)
        self.categories = {name: _checked_categories(name, values) for name, values in dict(categories or {}).items()}
        named = [*self.numbers, *self.categories]
        if not named or len(set(named)) < len(named):
            raise ConfigurationError(f"name each column once, among the numbers or the categories, got {named}")
        self.missing = dict(missing) if isinstance(missing, Mapping) else dict.fromkeys(missing)
        for name, fill in self.missing.items():
            self._check_fill(name, fill)
        self._places: dict[str, dict[Any, int]] = {
            name: {value: index for index, value in enumerate(values)} for name, values in self.categories.items()
        }

    def _check_fill(self, name: str, fill: float | None) -> None:
        if name not in self.numbers and name not in self.categories:
            raise ConfigurationError(f"missing names {name!r}, which is no column: {[*self.numbers, *self.categories]}")
        if fill is None:
            return
        if name in self.categories:
            raise ConfigurationError(f"nothing stands in for a missing category of {name!r}: its fill must be None")
        if isinstance(fill, bool) or not isinstance(fill, Real) or not math.isfinite(fill):
            raise ConfigurationError(f"the fill of {name!r} must be a public finite number or None, got {fill!r}")

    @property
    def measured(self) -> int:
        """How many numbers of an encoded row, the first ones, have a scale that only the data knows."""
        return len(self.numbers)

    @property
    def names(self) -> tuple[str, ...]:
        """What each number of an encoded row is, ``(width,)``."""
        places = [f"{name} = {value}" for name, values in self.categories.items() for value in (*values, "another")]
        return (*self.numbers, *places, *(f"{name} is missing" for name in self.missing))

    @property
    def width(self) -> int:
        """Numbers in an encoded row."""
        return len(self.names)

    def __call__(self, frame: Any) -> Tensor:
        """Encodes a frame of ``N`` rows as ``(N, width)``, float64; NaN where a number is missing and has no fill.

        Args:
            frame: anything that gives a column by ``frame[name]``: a data frame of pandas or polars, a table of arrow,
                a dictionary of arrays or lists.

        Raises:
            InputError: a named column is not there, or as long as the others, or of another type: text among numbers,
                whose categories must be given; numbers among categories that are text; or what is neither.
        """
        columns = {name: _cells(frame, name) for name in (*self.numbers, *self.categories)}
        lengths = {name: len(cells) for name, cells in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"the columns differ in length: {lengths}")
        gone = {name: absent(cells) for name, cells in columns.items()}
        parts = [self._number(name, columns[name])[:, None] for name in self.numbers]
        parts += [self._category(name, columns[name], gone[name]) for name in self.categories]
        parts += [gone[name].astype(np.float64)[:, None] for name in self.missing]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def column(self, frame: Any, name: str) -> Cells:
        """A column of a frame as it is, ``(N,)``, of labels say: named here or not.

        Raises:
            InputError: it is not there, or holds neither numbers nor text.
        """
        return _cells(frame, name)

    def _number(self, name: str, cells: Cells) -> npt.NDArray[np.float64]:
        try:
            values = as_numbers(cells, f"column {name!r}")
        except InputError as error:
            raise InputError(
                f"{error}: if they are categories, give all of them in "
                f"TableEncoding(categories={{{name!r}: (...)}}), from public knowledge"
            ) from None
        fill = self.missing.get(name)
        return values if fill is None else np.where(np.isnan(values), fill, values)

    def _category(self, name: str, cells: Cells, gone: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        places = self._places[name]
        text = isinstance(self.categories[name][0], str)
        unknown = len(places)
        alike = (lambda cell: isinstance(cell, str)) if text else is_number
        if not all(map(alike, cells[~gone].tolist())):
            here, there = ("text", "numbers") if text else ("numbers", "text")
            raise InputError(
                f"the categories of {name!r} are {here}, and its column holds {there}, or what is neither: convert one "
                "of them"
            )
        index = places_of(cells, places, f"column {name!r}")
        index[index < 0] = unknown
        # A missing cell that has a place of its own is none of these.
        index[gone] = unknown + 1 if name in self.missing else unknown
        shown = np.eye(unknown + 2)[index, : unknown + 1]
        return (shown - 1.0 / unknown) * min(unknown / math.sqrt(unknown - 1.0), _LARGEST_SCALED)

    def described(self) -> str:
        """The public choices, in a sentence."""
        parts = [f"numbers {', '.join(self.numbers)}"] if self.numbers else []
        parts += [f"{name} of {len(values)} categories" for name, values in self.categories.items()]
        fills = [f"{name} ({'none' if fill is None else f'{fill:g}'})" for name, fill in self.missing.items()]
        told = f"; whether a cell is missing, and what stands in for it: {', '.join(fills)}" if fills else ""
        return f"columns {', '.join(parts)}{told}"


def _checked_categories(name: str, values: Sequence[str | int]) -> tuple[str | int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigurationError(f"the categories of {name!r} must be a list of public values, got {values!r}")
    known = tuple(values)
    kinds = {str if isinstance(value, str) else int if isinstance(value, int) else type(value) for value in known}
    if len(known) < 2 or len(set(known)) < len(known) or kinds not in ({str}, {int}):
        raise ConfigurationError(
            f"the categories of {name!r} must be two or more values, all text or all whole numbers, none twice; "
            f"got {known!r}"
        )
    return known


def _cells(frame: Any, name: str) -> Cells:
    """A column, one-dimensional."""
    try:
        column = frame[name]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        rows = ": give columns, {name: [row[name] for row in rows] for name in rows[0]}"
        raise InputError(
            f"there is no column {name!r} in the {type(frame).__name__}{rows if isinstance(frame, list) else ''}"
        ) from error
    except Exception as error:
        # Each library of data frames has an error of its own.
        raise InputError(f"column {name!r} of the {type(frame).__name__} cannot be read: {error}") from error
    cells = cells_of(column, f"column {name!r}")
    if cells.dtype.kind not in "biufOU":
        raise InputError(f"column {name!r} must hold numbers or text, got {cells.dtype}")
    return cells
