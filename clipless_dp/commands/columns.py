"""Tables in CSV and Parquet files: columns as they are, and what public options say that they are.

A cell of a CSV file is read by itself: whether a column is of numbers, and which labels there are, is said, and never
told by looking at what is in it.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features import TableEncoding

SUFFIXES = (".csv", ".tsv", ".parquet")
_LABELS = ("label", "target", "class", "y")
"""Names of columns that are what is learnt, where nothing is said."""

_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
"""How a missing number is written, in any case."""


@dataclass(frozen=True)
class Columns:
    """A table of a file.

    Attributes:
        file: its name.
        names: of the columns, in order.
        cells: a column by its name: of CSV text, in a list; of Parquet a column of pandas.
        is_text: whether all cells are text.
        rows: how many there are.
    """

    file: str
    names: tuple[str, ...]
    cells: Mapping[str, Any]
    is_text: bool
    rows: int

    def require(self, names: Iterable[str], option: str) -> None:
        """Refuses names that are none of the columns.

        Raises:
            ConfigurationError: one is none.
        """
        if lacking := [name for name in names if name not in self.names]:
            raise ConfigurationError(
                f"{option}: {self.file} has no column {lacking[0]!r}; it has {', '.join(self.names)}"
            )

    def listed(self, name: str) -> list[Any]:
        """The cells of a column as plain values."""
        cells = self.cells[name]
        return list(cells) if self.is_text else list(cells.tolist())

    def contents(self) -> list[bytes]:
        """Each row by itself, as bytes."""
        columns = [self.listed(name) for name in self.names]
        return [repr(row).encode() for row in zip(*columns, strict=True)]

    def part(self, chosen: np.ndarray[Any, Any]) -> Columns:
        """Some of the rows, ``(N,)`` truth values."""
        if self.is_text:
            places = chosen.nonzero()[0].tolist()
            cells = {name: [column[place] for place in places] for name, column in self.cells.items()}
        else:
            cells = {name: self.cells[name][chosen] for name in self.names}
        return Columns(self.file, self.names, cells, self.is_text, int(chosen.sum()))

    def frame(self, encoding: TableEncoding) -> dict[str, Any]:
        """Columns that an encoding reads, in the types that it says.

        Raises:
            ConfigurationError: one is missing.
            InputError: a cell of a column of numbers is something else.
        """
        self.require([*encoding.numbers, *encoding.categories], "the columns that are read")
        if not self.is_text:
            return {name: self.cells[name] for name in (*encoding.numbers, *encoding.categories)}
        typed: dict[str, Any] = {name: numbers_of(self.cells[name], name) for name in encoding.numbers}
        for name, values in encoding.categories.items():
            whole = isinstance(values[0], int)
            cells = [_whole(cell) if whole else (cell if cell else None) for cell in self.cells[name]]
            typed[name] = np.fromiter(cells, dtype=object, count=len(cells))
        return typed


def numbers_of(cells: Sequence[str], name: str) -> np.ndarray[Any, Any]:
    """Text as numbers ``(N,)``, NaN where one is missing.

    Raises:
        InputError: a cell is neither; it is told by its place.
    """
    found = np.empty(len(cells))
    for place, cell in enumerate(cells):
        try:
            found[place] = math.nan if cell.strip().lower() in _MISSING else float(cell)
        except ValueError:
            raise InputError(
                f"column {name!r} is read as numbers, and row {place + 1} holds something else: say "
                f"--categories '{name}=A,B,C' with all values that there can be, or --drop {name}"
            ) from None
    return found


def _whole(cell: str) -> int | None:
    """A whole number, or ``None`` for what is none."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def read_columns(path: Path) -> Columns:
    """The table of a CSV or Parquet file.

    Raises:
        ConfigurationError: it cannot be read; or it is Parquet, and pandas is missing.
        InputError: it has no rows, or one of another length than its header.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = tuple(name.strip() for name in next(lines, []))
            _check_header(header, path)
            rows = []
            for line in lines:
                if not line:
                    continue
                if len(line) != len(header):
                    raise InputError(
                        f"{path}, line {lines.line_num}: {len(line)} cells, and the header has {len(header)} columns"
                    )
                rows.append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not rows:
        raise InputError(f"{path} holds a header and no rows")
    cells = {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}
    return Columns(str(path), header, cells, True, len(rows))


def _parquet(path: Path) -> Columns:
    try:
        import pandas
    except ImportError as error:
        raise ConfigurationError(
            f"{path}: Parquet files are read by pandas: pip install 'clipless-dp[parquet]', or write a CSV file"
        ) from error
    try:
        table = pandas.read_parquet(path)
    except ImportError as error:
        raise ConfigurationError(
            f"{path}: pandas reads Parquet by pyarrow, which is missing: pip install 'clipless-dp[parquet]'"
        ) from error
    except Exception as error:  # Its libraries have errors of their own.
        raise ConfigurationError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    header = tuple(map(str, table.columns))
    _check_header(header, path)
    if not len(table):
        raise InputError(f"{path} holds no rows")
    return Columns(str(path), header, {name: table[name] for name in header}, False, len(table))


def _check_header(header: Sequence[str], path: Path) -> None:
    if len(header) < 2 or "" in header or len(set(header)) < len(header):
        raise ConfigurationError(
            f"{path} needs a header of two or more columns, each with a name of its own, separated by commas (of .tsv "
            f"by tabs); it has {list(header)[:8]}"
        )


def label_of(columns: Columns, options: argparse.Namespace) -> str:
    """The column that is learnt: that which is named, or by its usual name, or the last one.

    Raises:
        ConfigurationError: there is none of the name.
    """
    if options.label is not None:
        columns.require([options.label], "--label")
        return str(options.label)
    usual = [name for name in columns.names if name.lower() in _LABELS]
    return usual[0] if usual else columns.names[-1]


def encoding_of(columns: Columns, label: str, groups: str | None, options: argparse.Namespace) -> TableEncoding:
    """What the columns are, by header and options alone: all that are not told of are numbers.

    Raises:
        ConfigurationError: an option names no column, or one twice.
    """
    categories = dict(_categories(text) for text in options.categories)
    left_out = {label, *options.drop, *([groups] if groups is not None else [])}
    columns.require(left_out, "--label, --groups and --drop")
    columns.require(categories, "--categories")
    columns.require(options.missing, "--missing")
    if both := left_out & categories.keys():
        raise ConfigurationError(f"--categories: {sorted(both)[0]!r} is the label, or whose rows are, or dropped")
    numbers = [name for name in columns.names if name not in left_out and name not in categories]
    return TableEncoding(numbers, categories, missing=options.missing)


def _categories(text: str) -> tuple[str, tuple[str, ...] | tuple[int, ...]]:
    name, sign, values = text.partition("=")
    listed = tuple(value.strip() for value in values.split(","))
    if not sign or not name or "" in listed:
        raise ConfigurationError(f"--categories {text!r} is not COLUMN=A,B,C: a column and all its values")
    whole = [_whole(value) for value in listed]
    if all(value is not None and str(value) == one for value, one in zip(whole, listed, strict=True)):
        return name, tuple(value for value in whole if value is not None)
    return name, listed


def classes_of(options: argparse.Namespace) -> tuple[Any, ...] | None:
    """All labels there can be; ``None`` of a regression.

    Raises:
        ConfigurationError: options contradict each other.
    """
    told = [name for name in ("labels", "classes", "target_range") if getattr(options, name) is not None]
    if len(told) > 1:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in told)
        raise ConfigurationError(f"{shown} say the same thing in several ways: leave all but one out")
    if options.target_range is not None:
        return None
    return tuple(options.labels) if options.labels is not None else tuple(range(options.classes or 2))


def labels_from(columns: Columns, label: str, classes: tuple[Any, ...] | None) -> Any:
    """The column that is learnt: labels in a list, or numbers ``(N,)`` of a regression.

    Raises:
        InputError: a label is none of the classes; how they are given is told.
    """
    if classes is None:
        if columns.is_text:
            return numbers_of(columns.cells[label], label)
        return columns.cells[label]
    cells = columns.listed(label)
    if all(isinstance(one, int) for one in classes) and columns.is_text:
        cells = [_whole(cell) for cell in cells]
    strangers = [place for place, cell in enumerate(cells) if cell not in classes]
    if strangers:
        shown = ", ".join(map(str, classes[:8])) + (", …" if len(classes) > 8 else "")
        raise InputError(
            f"{len(strangers)} of {len(cells)} labels in column {label!r} are none of {shown} (row {strangers[0] + 1} "
            "is the first): say --labels A B C with all labels that there can be, --classes K for 0 to K-1, or "
            "--target-range LOW HIGH for numbers"
        )
    return cells
