"""Frames of every type of column that pandas has, by every door: as the same numbers in NumPy's columns."""

from __future__ import annotations

from collections import UserList, deque
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", minversion="1.6")
pytest.importorskip("pandas")

import pandas

from clipless_dp import InputError, PrivacyError
from clipless_dp.estimators import PrivateClassifier, PrivateRegressor
from clipless_dp.features import TableEncoding
from clipless_dp.tables import fit_table

N = 40
GIVEN = {"epsilon": 5.0, "delta": 1e-3, "accountant": "rdp", "cosines": 4, "reproducible_seed": 0}
OPTIONS = {"epochs": 1, "audit": False}
NUMBERS = np.random.default_rng(0).integers(0, 2, (N, 3))
LABELS = np.arange(N) % 2
TEXT = np.array(["no", "yes"])[NUMBERS]

KINDS_OF_NUMBERS = [
    "float32", "float16", "Float64", "Float32", "int64", "uint8", "Int64", "UInt8", "bool", "boolean",
    "Sparse[float]", "Sparse[int]",
]  # fmt: skip
KINDS_OF_TEXT = ["str", "string", "category"]


def frame_of(kind: str, cells: np.ndarray = NUMBERS) -> pandas.DataFrame:
    frame = pandas.DataFrame(cells.astype(object), columns=[*"abc"])
    if kind == "converted":
        return frame.infer_objects().astype({"c": "float64"}).convert_dtypes()
    if kind == "mixed":
        return frame.astype({"a": "Float64", "b": "int64", "c": "boolean"})
    if kind.startswith("Sparse"):
        return frame.astype("float64" if "float" in kind else "int64").astype(kind)
    return frame.astype(kind)


WAYS_OF_LABELS: dict[str, Callable[[pandas.DataFrame], tuple[pandas.DataFrame, object]]] = {
    "array": lambda frame: (frame, LABELS),
    "list": lambda frame: (frame, LABELS.tolist()),
    "Series": lambda frame: (frame, pandas.Series(LABELS)),
    "Series of Int64": lambda frame: (frame, pandas.Series(LABELS, dtype="Int64")),
    "named column": lambda frame: (frame.assign(y=LABELS), "y"),
    "named column of Int64": lambda frame: (frame.assign(y=pandas.Series(LABELS, dtype="Int64")), "y"),
}


def table_scores(frame: pandas.DataFrame, labels: object, encoding: TableEncoding) -> torch.Tensor:
    asked = {**GIVEN, **OPTIONS, "encoding": encoding, "classes": (0, 1), "progress": False}
    made = fit_table(frame, labels, **asked)
    assert made.result.epsilon <= 5.0
    return made.scores(frame)


def fitted(kind: type, rows: object, labels: object, **more: object) -> np.ndarray:
    own = {"classes": [0, 1]} if kind is PrivateClassifier else {"target_range": (0.0, 1.0)}
    made = kind(**GIVEN, **own, options=OPTIONS, **more).fit(rows, labels)
    return made.predict_proba(rows) if kind is PrivateClassifier else made.predict(rows)


OF_NUMBERS = TableEncoding([*"abc"])
OF_TEXT = TableEncoding(categories={name: ["no", "yes"] for name in "abc"})


@cache
def plain_table(is_text: bool) -> torch.Tensor:
    frame = frame_of("object", TEXT) if is_text else frame_of("float64")
    return table_scores(frame, LABELS, OF_TEXT if is_text else OF_NUMBERS)


@cache
def plain(door: type) -> np.ndarray:
    return fitted(door, frame_of("float64"), LABELS)


@pytest.mark.parametrize("kind", [*KINDS_OF_NUMBERS, "converted"])
@pytest.mark.parametrize("way", ["array", "Series of Int64"])
def test_a_table_of_numbers_of_any_type_is_trained_on_as_numpys(kind, way):
    assert torch.equal(table_scores(*WAYS_OF_LABELS[way](frame_of(kind)), OF_NUMBERS), plain_table(False))


@pytest.mark.parametrize("way", WAYS_OF_LABELS)
def test_a_table_of_several_types_is_trained_on_however_labels_are_given(way):
    assert torch.equal(table_scores(*WAYS_OF_LABELS[way](frame_of("mixed")), OF_NUMBERS), plain_table(False))
    assert torch.equal(table_scores(*WAYS_OF_LABELS[way](frame_of("Float64")), OF_NUMBERS), plain_table(False))


@pytest.mark.parametrize("kind", [*KINDS_OF_TEXT, "converted"])
def test_a_table_of_text_of_any_type_is_trained_on_as_objects_are_however_labels_are_given(kind):
    frame = frame_of("object", TEXT).convert_dtypes() if kind == "converted" else frame_of(kind, TEXT)
    for give in WAYS_OF_LABELS.values():
        assert torch.equal(table_scores(*give(frame), OF_TEXT), plain_table(True))
    assert np.isfinite(fitted(PrivateClassifier, frame, LABELS, encoding=OF_TEXT)).all()


@pytest.mark.parametrize("kind", [*KINDS_OF_NUMBERS, "converted", "mixed"])
@pytest.mark.parametrize("door", [PrivateClassifier, PrivateRegressor])
def test_estimators_train_on_numbers_of_any_type_as_on_numpys(kind, door):
    frame = frame_of(kind)
    assert np.array_equal(fitted(door, frame, LABELS), plain(door))
    assert np.array_equal(fitted(door, frame, pandas.Series(LABELS, dtype="Int64"), encoding=OF_NUMBERS), plain(door))


@pytest.mark.parametrize("way", ["array", "list", "Series", "Series of Int64"])
@pytest.mark.parametrize("door", [PrivateClassifier, PrivateRegressor])
def test_estimators_train_on_pandas_own_types_however_labels_are_given(door, way):
    frame, labels = WAYS_OF_LABELS[way](frame_of("Float64"))
    assert np.array_equal(fitted(door, frame, labels), plain(door))


OTHER_LAYOUTS = {
    "rows in reverse": lambda rows: rows[::-1].copy()[::-1],
    "columns in reverse": lambda rows: rows[:, ::-1].copy()[:, ::-1],
    "a tensor of bfloat16": lambda rows: torch.from_numpy(rows.copy()).bfloat16(),
    "a buffer": lambda rows: memoryview(rows.copy()),
    "a tuple of tuples": lambda rows: tuple(map(tuple, rows.tolist())),
    "a list of Series": lambda rows: [pandas.Series(row) for row in rows],
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
@pytest.mark.parametrize("door", [PrivateClassifier, PrivateRegressor])
def test_estimators_train_on_rows_of_other_layouts_as_on_plain_ones(name, door):
    rows = NUMBERS.astype(np.float64)
    assert np.array_equal(fitted(door, OTHER_LAYOUTS[name](rows), LABELS), plain(door))


@pytest.mark.parametrize("door", [PrivateClassifier, PrivateRegressor])
def test_estimators_read_labels_of_other_layouts(door):
    rows = NUMBERS.astype(np.float64)
    for labels in (
        LABELS[::-1].copy()[::-1],
        LABELS.astype(float)[::-1].copy()[::-1],
        torch.from_numpy(LABELS).bfloat16(),
        pandas.Series(LABELS).astype("Sparse[int]"),
    ):
        assert np.array_equal(fitted(door, rows, labels), plain(door))


NO_TABLES = {
    "a dictionary of columns": (lambda: {"a": NUMBERS[:, 0], "b": NUMBERS[:, 1]}, "rows are a dict: give a data frame"),
    "a frame without columns": (lambda: frame_of("float64")[[]], "have no columns"),
    "a frame with a column twice": (lambda: frame_of("float64")[["a", "a", "b"]], "several columns of one name"),
}


@pytest.mark.parametrize("name", NO_TABLES)
@pytest.mark.parametrize("door", [PrivateClassifier, PrivateRegressor])
def test_what_estimators_cannot_read_is_refused_in_words(name, door):
    make, said = NO_TABLES[name]
    with pytest.raises(InputError, match=said):
        fitted(door, make(), LABELS)


@pytest.mark.parametrize("kind", [deque, UserList])
def test_sequences_of_other_classes_are_looked_at_as_lists_are(kind: Any) -> None:
    generator = np.random.default_rng(0)
    rows = [generator.random(3) for _ in range(N)]
    asked = {**GIVEN, "options": OPTIONS, "classes": (0, 1)}
    PrivateClassifier(**asked).fit(kind(rows), kind(LABELS.tolist()))
    series = generator.random(N + 2)
    for shared in (kind([*rows[:-1], rows[0]]), kind([series[at : at + 3] for at in range(N)])):
        with pytest.raises(PrivacyError):
            PrivateClassifier(**asked).fit(shared, LABELS)
