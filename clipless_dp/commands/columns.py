"""Tables in CSV and Parquet files: columns as they are, and what public options say that they are.

A cell of a CSV file is read by itself: whether a column is of numbers, and which labels there are, is said, and never
told by looking at what is in it.
"""

from __future__ import annotations

import argparse
import csv
import decimal
import importlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipless_dp.datasets import alone
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features import TableEncoding

SUFFIXES = (".csv", ".tsv", ".parquet")
_LABELS = ("label", "target", "class", "y")
"""Names of columns that are what is learnt, where nothing is said."""

_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
"""How a missing number is written, in any case."""

_VALUES = ("true", "false", "yes", "#n/a", "#na", "#value!", "<na>", "n.a.", "nil", "nat")
_MONTH = (
    "(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?"
    "|dec(ember)?)"
)
_VALUE = re.compile(
    rf"""
    [\W\d_]*                                             # No letter: a number, a range, a date, a telephone, a dash.
    |.*\d{{5}}.*                                          # A number that tells who somebody is, or when.
    |.*[^\s@]@[^\s@]+\.[^\s@]+.*                          # An address of electronic mail.
    |[<>≤≥=~≈±]+\s*\d.*                                  # A bound.
    |[-+(]*\d.*\s.*                                      # Number and words: a quantity, a street, a date.
    |[-+(]*\d+([.,]\d+)*(?!(st|nd|rd|th)$)[^\W\d_]{{1,6}}(/[^\W\d_]+)?[)]*   # A number and its unit.
    |\d{{1,2}}:\d\d.*|\d{{1,4}}[-/.]\d{{1,2}}[-/.T ].*         # A time, a date with more behind it.
    |(.*[^a-z])?{_MONTH}[^a-z_]*\d.*                     # A date in words.
    |\d+[^a-z_]*{_MONTH}([^a-z].*)?
    |0x[0-9a-f]+|[-+]?\d+(\.\d*)?e[-+]?\d+|[-+]?(inf|infinity)
    |[a-z]\d\d\.\d[0-9a-z]*                               # A diagnosis (ICD).
    |[0-9a-f]{{8}}-[0-9a-f]{{4}}-.*                           # A random identity (UUID).
    """,
    re.VERBOSE | re.DOTALL,
)
"""What a cell of a row looks like, in small letters, with a hyphen for each dash, and without money and units of it."""

_WINDOW = re.compile(r"\d{1,3}(h|min)")
"""How spans of time are called, which columns are of: 24h, 5min."""

_NUMBERED = re.compile(r"(.*[^\W\d].*?)(\d{5,6})", re.DOTALL)
"""A name with a number behind it, of so many digits that it could say who somebody is."""

_DASHES = re.compile(r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_COUNTED = {0: 4, 1: 8}
"""Names that are numbers are none, but for so many or more that count columns from 0, or from 1: a frame without names;
four answers on a scale count from 1 as well."""


@dataclass(frozen=True)
class Columns:
    """A table of a file.

    Attributes:
        file: its name.
        names: of the columns, in order.
        cells: a column by its name, in a list: of CSV text; of Parquet values, each as it is alone.
        is_text: whether all cells are text.
        rows: how many there are.
    """

    file: str
    names: tuple[str, ...]
    cells: Mapping[str, list[Any]]
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

    def contents(self, groups: str | None = None) -> list[bytes]:
        """Each row by itself, or whose it is, as bytes: what decides whether it is held out.

        Args:
            groups: the column that says whose the rows are.
        """
        if groups is not None:
            return [_content(one, is_id=True) for one in self.cells[groups]]
        return [b"".join(map(_framed, row)) for row in zip(*self.cells.values(), strict=True)]

    def part(self, chosen: np.ndarray[Any, Any]) -> Columns:
        """Some of the rows, ``(N,)`` truth values."""
        places = chosen.nonzero()[0].tolist()
        cells = {name: [column[place] for place in places] for name, column in self.cells.items()}
        return Columns(self.file, self.names, cells, self.is_text, len(places))

    def frame(self, encoding: TableEncoding) -> dict[str, Any]:
        """Columns that an encoding reads, in the types that it says.

        Raises:
            ConfigurationError: one is missing.
            InputError: a cell of a column of numbers is something else.
        """
        self.require([*encoding.numbers, *encoding.categories], "the columns that are read")
        if not self.is_text:
            return {name: _objects(self.cells[name]) for name in (*encoding.numbers, *encoding.categories)}
        typed: dict[str, Any] = {name: numbers_of(self.cells[name], name) for name in encoding.numbers}
        for name, values in encoding.categories.items():
            whole = isinstance(values[0], int)
            cells = [_whole(cell) if whole else (cell if cell else None) for cell in self.cells[name]]
            typed[name] = _objects(cells)
        return typed


def _content(cell: Any, *, is_id: bool = False) -> bytes:
    """A cell by what it says; text that stands for a missing one as a missing one."""
    return b"" if isinstance(cell, str) and cell.strip().lower() in _MISSING else alone(cell, is_id=is_id)


def _framed(cell: Any) -> bytes:
    """The same beside others, which it does not run into."""
    content = _content(cell)
    return b"%d:%b" % (len(content), content)


def _objects(cells: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Cells ``(N,)`` in the types that they have."""
    return np.fromiter(cells, dtype=object, count=len(cells))


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


def read_table(name: str, options: argparse.Namespace) -> Columns:
    """The table of a file, by the options that say what its first line is.

    Raises:
        ConfigurationError: it cannot be read; or its first line looks like a row, and nothing says that it is none.
        InputError: it has no rows, or one of another length than its header.
    """
    if options.header and (options.no_header or options.columns is not None):
        raise ConfigurationError("--header: the first line says the names; leave --no-header and --columns out")
    found = read_columns(Path(name), options.columns, has_header=not options.no_header, is_public=options.header)
    if (
        not options.header
        and options.columns is None
        and options.label is None
        and (label := label_of(found, options)) in (options.labels or ())
    ):
        raise _looks_like_a_row(found.file, [found.names.index(label)], "one of --labels")
    return found


def read_columns(
    path: Path, names: Sequence[str] | None = None, *, has_header: bool = True, is_public: bool = False
) -> Columns:
    """The table of a CSV or Parquet file.

    Args:
        path: of the file.
        names: of its columns, in order, which are public; by default its header says them.
        has_header: whether the first line of a CSV file is none of its rows.
        is_public: whether that was said to be so, whatever it looks like.

    Raises:
        ConfigurationError: it cannot be read; or its header looks like a row, whose cells would be published as the
            names of columns; or it is Parquet, and pyarrow is missing.
        InputError: it has no rows, or one of another length than its header.
    """
    if not has_header and names is None:
        raise ConfigurationError("--no-header: say how the columns are called, --columns A,B,C, in order")
    if path.suffix.lower() == ".parquet":
        if names is not None or not has_header:
            raise ConfigurationError(f"{path} has names of its columns: leave --columns and --no-header out")
        return _parquet(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            found = [name.strip() for name in next(lines, [])] if has_header else None
            if names is None:
                assert found is not None
                if not is_public:
                    _refuse_row(found, path)
            header = tuple(name.strip() for name in (found if names is None else names) or ())
            _check_header(header, path)
            if found is not None and len(found) != len(header):
                raise ConfigurationError(f"--columns: {len(header)} names, and {path} has {len(found)} columns")
            rows = []
            for line in lines:
                if not line:
                    continue
                if len(line) != len(header):
                    raise InputError(
                        f"{path}, line {lines.line_num}: {len(line)} cells, and there are {len(header)} columns"
                    )
                rows.append(line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not rows:
        raise InputError(f"{path} holds a header and no rows" if has_header else f"{path} holds no rows")
    cells = {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}
    return Columns(str(path), header, cells, True, len(rows))


def _parquet(path: Path) -> Columns:
    """A table cell by cell: a library of frames makes numbers of other rows' cells where one is missing."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigurationError(
            f"{path}: Parquet files are read by pyarrow: pip install 'clipless-dp[parquet]', or write a CSV file"
        ) from error
    try:
        table = parquet.read_table(path)
        index = (table.schema.pandas_metadata or {}).get("index_columns", ())
        table = table.drop_columns([name for name in index if isinstance(name, str) and name in table.column_names])
        header = tuple(table.column_names)
        columns = [[_alone(cell) for cell in column.to_pylist()] for column in table.columns]
    except Exception as error:  # It has errors of its own.
        raise ConfigurationError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    _check_header(header, path)
    if not table.num_rows:
        raise InputError(f"{path} holds no rows")
    return Columns(str(path), header, dict(zip(header, columns, strict=True)), False, table.num_rows)


def _alone(cell: Any) -> Any:
    """A cell in the same type whatever its column's is: one missing cell makes floating-point numbers of whole ones."""
    if isinstance(cell, decimal.Decimal):
        cell = float(cell)
    if not isinstance(cell, float):
        return cell
    return None if math.isnan(cell) else int(cell) if cell.is_integer() else cell


def _refuse_row(header: Sequence[str], path: Path) -> None:
    """Refuses a header that looks like a row: the names of columns are kept in the file of a model, and are public."""
    numbers = [name for name in header if name.isdecimal()]
    counted = {
        str(first + place)
        for first, least in _COUNTED.items()
        if len(numbers) >= least and numbers == [str(first + place) for place in range(len(numbers))]
        for place in range(len(numbers))
    }
    known = {*header}
    # Three numbers that follow one another, V9999 to V10001, are of columns; identities in one row are others.
    counted |= {
        name
        for name in header
        if (found := _NUMBERED.fullmatch(name))
        and sum(f"{found[1]}{int(found[2]) + step}" in known for step in (-2, -1, 1, 2)) > 1
    }
    if places := [place for place, name in enumerate(header) if name not in counted and _is_value(name)]:
        raise _looks_like_a_row(path, places, "empty, a number, a quantity, a date or an identity")


def _is_value(name: str) -> bool:
    """Whether it is rather a cell than a name."""
    seen = "".join(one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) not in ("Cf", "Sc"))
    text = _DASHES.sub("-", seen).strip().lower()
    # How rows and shares are called.
    if _WINDOW.fullmatch(text):
        return False
    return text in (*_MISSING, *_VALUES) or (text not in ("#", "%") and _VALUE.fullmatch(text) is not None)


def _looks_like_a_row(path: object, places: Sequence[int], what: str) -> ConfigurationError:
    shown = ", ".join(str(place + 1) for place in places[:8]) + (", …" if len(places) > 8 else "")
    return ConfigurationError(
        f"the first line of {path} looks like a row, and names of columns are published with the model (column "
        f"{shown}: {what}): add a line with public names, or say --no-header --columns A,B,C; where it is a header, "
        "say so, --header, or give other names, --columns A,B,C alone"
    )


def _check_header(header: Sequence[str], path: Path) -> None:
    """Refuses names that are none, without quoting them: where there is no header, they are a person's cells."""
    if len(header) < 2 or "" in header or len(set(header)) < len(header):
        raise ConfigurationError(
            f"{path} needs a header of two or more columns, each with a name of its own, separated by commas (of .tsv "
            f"by tabs); it has {len(header)}, {len(set(header) - {''})} of them with names of their own: add one, or "
            "say the names, --columns A,B,C, with --no-header where the first line is a row"
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
        return numbers_of(columns.cells[label], label) if columns.is_text else _objects(columns.cells[label])
    cells = columns.cells[label]
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
