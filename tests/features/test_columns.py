"""Columns of data frames as rows of numbers: by public rules, each row by itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipless_dp import ConfigurationError, InputError
from clipless_dp.features import TableEncoding

JOBS = ("cook", "nurse", "pilot")


def encoding() -> TableEncoding:
    return TableEncoding(["age", "hours"], {"job": JOBS, "grade": (1, 2)}, missing={"age": 40.0, "job": None})


def frame() -> dict[str, list[object]]:
    return {
        "age": [30.0, math.nan, 50.0],
        "hours": [38, 40, None],
        "job": ["nurse", None, "baker"],
        "grade": [1, 2, 7],
        "unread": [object(), object(), object()],
    }


def test_numbers_come_first_then_places_of_categories_then_what_is_missing() -> None:
    encode = encoding()
    rows = encode(frame())
    assert encode.measured == 2
    assert rows.dtype == torch.float64
    assert rows.shape == (3, encode.width) == (3, len(encode.names))
    column = {name: rows[:, index].tolist() for index, name in enumerate(encode.names)}
    assert column["age"] == [30.0, 40.0, 50.0]
    assert column["hours"][:2] == [38.0, 40.0]
    # Without a public number it is left to what standardises.
    assert math.isnan(column["hours"][2])
    assert column["age is missing"] == [0.0, 1.0, 0.0]
    assert column["job is missing"] == [0.0, 1.0, 0.0]
    places = np.array([column[f"job = {name}"] for name in (*JOBS, "another")])
    # One place of each row is above the rest; of one that is missing, none.
    assert [np.flatnonzero(row > 0.0).tolist() for row in places.T] == [[1], [], [3]]
    assert column["grade = another"] == [-1.0, -1.0, 1.0]


@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_a_place_has_deviation_one_among_equally_frequent_categories_unless_that_is_large(count: int) -> None:
    values = tuple(range(count))
    rows = TableEncoding(categories={"c": values})({"c": list(values)})[:, :count]
    assert rows.mean(0).abs().max() < 1e-12
    assert float(rows[:, 0].square().mean().sqrt()) == pytest.approx(min(1.0, 4.0 * math.sqrt(count - 1.0) / count))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
            st.one_of(st.none(), st.sampled_from([*JOBS, "other", ""])),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_a_row_is_encoded_alone_as_it_is_among_others(rows: list[tuple[float | None, str | None]]) -> None:
    encode = TableEncoding(["x"], {"job": JOBS}, missing={"x": -1.0, "job": None})
    together = encode({"x": [x for x, _ in rows], "job": [job for _, job in rows]})
    alone = torch.cat([encode({"x": [x], "job": [job]}) for x, job in rows])
    assert torch.equal(together, alone)
    assert not torch.isnan(together).any()


def test_every_kind_of_pandas_column_encodes_alike() -> None:
    pandas = pytest.importorskip("pandas")
    plain = pandas.DataFrame({name: cells for name, cells in frame().items() if name != "unread"})
    wanted = encoding()(frame())
    nullable = plain.convert_dtypes()
    categorical = plain.astype({"job": "category"})
    for kind in (plain, nullable, categorical):
        torch.testing.assert_close(encoding()(kind), wanted, equal_nan=True, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"age": ["old", "young", "old"]}, "give all of them in TableEncoding"),
        ({"job": [1, 2, 3]}, "the categories of 'job' are text"),
        ({"grade": ["1", "2", "2"]}, "the categories of 'grade' are numbers"),
        ({"job": ["cook", 3, None]}, "the categories of 'job' are text"),
        ({"hours": [1, 2]}, "differ in length"),
        ({"age": np.zeros((3, 2))}, "a cell for each row"),
        ({"age": np.array(["2020-01-01"] * 3, dtype="datetime64[D]")}, "numbers or text"),
    ],
    ids=["text among numbers", "numbers for text", "text for numbers", "mixed", "short", "wide", "dates"],
)
def test_columns_of_another_type_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        encoding()({**frame(), **changes})


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no column 'age' in the dict"):
        encoding()({})

    def refuse(self: object, name: str) -> object:
        raise RuntimeError("of a library")

    with pytest.raises(InputError, match="'age' of the Foreign cannot be read: of a library"):
        encoding()(type("Foreign", (SimpleNamespace,), {"__getitem__": refuse})())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((), None), "name each column once"),
        ((("a", "a"), None), "name each column once"),
        ((("a",), {"a": (1, 2)}), "name each column once"),
        (("ab", None), "list of column names"),
        (((), {"c": ("x",)}), "two or more values"),
        (((), {"c": ("x", "x")}), "none twice"),
        (((), {"c": ("x", 1)}), "all text or all whole numbers"),
        (((), {"c": (0.5, 1.5)}), "all text or all whole numbers"),
        (((), {"c": "xy"}), "list of public values"),
    ],
    ids=["none", "twice", "both", "text", "one", "doubled", "mixed", "fractions", "a word"],
)
def test_what_is_no_encoding_is_refused(arguments: tuple[object, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TableEncoding(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("missing", "words"),
    [({"z": 1.0}, "no column"), ({"x": math.inf}, "finite"), ({"x": "mean"}, "finite"), ({"c": 1.0}, "must be None")],
    ids=["no column", "infinite", "text", "of a category"],
)
def test_fills_are_public_finite_numbers_of_columns_of_numbers(missing: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        TableEncoding(["x"], {"c": (0, 1)}, missing=missing)
