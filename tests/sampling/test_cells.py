"""Cells of columns: what is read of one never depends on those beside it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from clipless_dp import InputError
from clipless_dp.features import TableEncoding
from clipless_dp.sampling import People, Samples
from clipless_dp.sampling.cells import absent, as_numbers, cells_of, places_of
from clipless_dp.tables.tasks import Classes, Numbers, Task

CODE = 2**53
"""From here on neighbouring whole numbers are one as floating-point numbers."""


def _series(dtype: str | None = None) -> Callable[[list[Any]], Any]:
    def made(cells: list[Any]) -> Any:
        return pytest.importorskip("pandas").Series(cells, dtype=dtype)

    return made


def _polars(cells: list[Any]) -> Any:
    return pytest.importorskip("polars").Series(cells)


def _arrow(cells: list[Any]) -> Any:
    return pytest.importorskip("pyarrow").chunked_array([cells])


def _not_available() -> Any:
    return pytest.importorskip("pandas").NA


def _objects(cells: list[Any]) -> Any:
    return np.fromiter(cells, dtype=object, count=len(cells))


def _masked(cells: list[Any]) -> Any:
    gone = [cell is None for cell in cells]
    return np.ma.array([cells[gone.index(False)] if cell is None else cell for cell in cells], mask=gone)


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "objects": _objects,
    "masked": _masked,
    "tensor": torch.tensor,
    "pandas": _series(),
    "pandas object": _series("object"),
    "pandas string": _series("string"),
    "pandas Int64": _series("Int64"),
    "pandas Float64": _series("Float64"),
    "pandas category": _series("category"),
    "polars": _polars,
    "arrow": _arrow,
}
COMPANY: dict[str, Any] = {
    "None": None,
    "NaN": math.nan,
    "NA": _not_available,
    "a category": 3,
    "a whole number": 7,
    "a fraction": 1.5,
    "a truth value": True,
    "2^53": CODE,
    "2^63": 2**63,
    "beyond every float": 10**400,
    "text": "cook",
    "NUL at the end": "cook\0",
    "a list": [1, 2],
}
CELLS: list[Any] = [None, math.nan, 3, 1.5, True, CODE, CODE + 1, 2**63, 10**400, "cook", "cook\0", "3", "nan"]


def _read_by() -> dict[str, Callable[[Any], Any]]:
    text = TableEncoding(categories={"c": ("cook", "3")}, missing={"c": None})
    codes = TableEncoding(categories={"c": (3, CODE, CODE + 1)}, missing={"c": None})
    numbers = TableEncoding(["c"], missing={"c": 5.0})

    def labels(task: Task) -> Callable[[Any], Any]:
        return lambda column: task.read(column, len(column))

    return {
        "text": lambda column: text({"c": column}),
        "codes": lambda column: codes({"c": column}),
        "numbers": lambda column: numbers({"c": column}),
        "labels": labels(Classes((3, "3", CODE, CODE + 1, "cook", "nan", None), 0.0)),
        "targets": labels(Numbers((0.0, 1e30))),
    }


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("reader", ["text", "codes", "numbers", "labels", "targets"])
def test_a_cell_is_read_alone_as_beside_any_other_or_the_column_is_refused(reader: str, container: str) -> None:
    read, column = _read_by()[reader], CONTAINERS[container]
    compared = 0
    for cell in CELLS:
        for kind, beside in COMPANY.items():
            company = beside() if kind == "NA" else beside
            if cell == "cook\0" and container in ("numpy", "masked"):
                # numpy's text has no NUL at its end: the cell is another one before it is read.
                continue
            try:
                alone, among = column([cell]), column([cell, company])
            except Exception:
                # No such column can be made; each library has an error of its own.
                continue
            try:
                one, other = read(alone)[0], read(among)[0]
            except InputError:
                continue
            compared += 1
            assert torch.equal(one, other), (cell, kind)
    # Text is no target, nor is a missing one.
    assert compared > 0 or (reader, container) == ("targets", "pandas string")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("abc", "a cell for each row, got str"),
        ({"a": 1}, "got dict"),
        (3, "got int"),
        (torch.tensor(3), r"got Tensor \(\)"),
        (np.ones((2, 2)), r"got ndarray \(2, 2\)"),
        (np.array(["cook", math.nan], dtype=object).astype(str), "numpy writes where a cell is missing"),
        (torch.ones(2).to_sparse(), "cannot be read from a Tensor"),
    ],
    ids=["a word", "a mapping", "a number", "a tensor of one number", "a matrix", "NaN as text", "sparse"],
)
def test_what_is_no_column_is_refused(column: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cells_of(column, "this")


def test_numbers_are_read_as_numbers_of_any_size_and_text_never_is() -> None:
    cells = cells_of([1, True, 1.5, Fraction(1, 4), 10**400, -(10**400), Fraction(10**400), None], "x")
    assert absent(cells).tolist() == [False] * 7 + [True]
    assert as_numbers(cells, "x")[:7].tolist() == [1.0, 1.0, 1.5, 0.25, math.inf, -math.inf, math.inf]
    with pytest.raises(InputError, match="something else"):
        as_numbers(cells_of([1, "2"], "x"), "x")


def test_tensors_are_read_whatever_their_type_and_their_gradients() -> None:
    for column in (torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.bfloat16)):
        assert as_numbers(cells_of(column, "x"), "x").tolist() == [1.0, 1.0]
    assert People(torch.arange(3), 3).count == 3


@pytest.mark.parametrize(
    "column",
    [[CODE + 1, 1.0 * CODE], np.array([CODE + 1, math.nan]), torch.tensor([2**24 + 1, math.nan])],
    ids=["list", "numpy", "tensor"],
)
def test_codes_that_floating_point_numbers_may_have_merged_are_refused(column: Any) -> None:
    cells = cells_of(column, "codes")
    largest = 2**24 if isinstance(column, torch.Tensor) else CODE
    with pytest.raises(InputError, match="one with their neighbours"):
        places_of(cells, {3: 0, largest: 1}, "codes")
    # Values below stay themselves.
    assert places_of(cells, {3: 0, largest - 1: 1}, "codes").tolist() == [-1, -1]


def test_labels_of_several_types_are_told_apart_in_lists_and_refused_in_text_of_numpy() -> None:
    task = Classes((1, "1"), 0.0)
    assert task.read([1, "1", 1], 3).tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="give a list"):
        task.read(np.array([1, "1", 1]), 3)


def test_what_a_mask_covers_is_missing_whatever_lies_under_it() -> None:
    encode = TableEncoding(["age"], {"job": ("cook", "nurse")}, missing={"age": 40.0, "job": None})
    rows = [
        encode({"age": np.ma.array([30.0, under], mask=[0, 1]), "job": np.ma.array(["cook", job], mask=[0, 1])})
        for under, job in ((999.0, "nurse"), (math.nan, "nan"))
    ]
    assert torch.equal(*rows)
    assert torch.equal(rows[0], encode({"age": [30.0, None], "job": ["cook", None]}))
    with pytest.raises(InputError, match="none of 0 or 1"):
        Classes(None, 0.0).read(np.ma.array([0, 1], mask=[0, 1]), 2)
    with pytest.raises(InputError, match="missing"):
        Numbers((0.0, 1.0)).read(np.ma.array([0.0, 1.0], mask=[0, 1]), 2)


def test_training_data_under_a_mask_is_refused() -> None:
    for pair in (
        (np.ma.array(np.ones((2, 3)), mask=np.eye(2, 3)), np.ones(2)),
        (np.ones((2, 3)), np.ma.array([1, 0], mask=[0, 1])),
    ):
        with pytest.raises(InputError, match="is masked"):
            Samples(pair)
    assert len(Samples((np.ma.array(np.ones((2, 3))), np.ones(2)))) == 2


SECRET = "HIV positive: Jane Doe"


class _Refusing:
    """A cell whose conversions quote it."""

    def _quote(self, *arguments: object) -> Any:
        raise ValueError(f"could not convert {SECRET!r}")

    __float__ = __array__ = __len__ = __hash__ = __eq__ = _quote  # type: ignore[assignment]

    def __repr__(self) -> str:
        return SECRET


class _Column(list[Any]):
    """A column that cannot be read, and quotes what it holds."""

    def to_list(self) -> Any:
        raise RuntimeError(f"{self[0]} is of no type")


@pytest.mark.parametrize("reader", ["text", "codes", "numbers", "labels", "targets", "ids", "samples"])
@pytest.mark.parametrize(
    "column",
    [
        [SECRET, 1],
        [[SECRET], [SECRET, SECRET]],
        [_Refusing(), _Refusing()],
        [{"said": SECRET}, 2],
        _objects([SECRET, 1.0]),
        np.array([SECRET, SECRET]),
        _Column([SECRET, SECRET]),
    ],
    ids=["text", "lists", "objects", "mappings", "array of objects", "array of text", "column"],
)
def test_what_refuses_a_cell_does_not_quote_it_or_show_who_did(column: Any, reader: str) -> None:
    readers = {
        **_read_by(),
        "ids": lambda ids: People(ids, len(ids) + 1),
        "samples": lambda inputs: Samples(({"x": inputs}, torch.zeros(2))),
    }
    said = None
    try:
        readers[reader](column)
    except InputError as error:
        said = "".join(traceback.format_exception(error))
    # Text among text has the place of unknown ones.
    assert SECRET not in said if said else reader == "text"
