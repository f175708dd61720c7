"""Cells are read one by one, by what is said of their column; what is held out is decided by each row alone."""

import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipless_dp.commands import columns
from clipless_dp.commands.held_out import HeldOut, file_beside
from clipless_dp.commands.scores import auroc, scores_of
from clipless_dp.commands.sources import Known, Part, read_rows, read_to_train
from clipless_dp.errors import CheckpointError, ConfigurationError, InputError
from clipless_dp.features import TableEncoding

OPTIONS = {
    "dataset": None, "data_dir": None, "classes": None, "label": None, "labels": None, "target_range": None,
    "categories": [], "drop": [], "missing": [], "groups": None,
    "columns": None, "header": False, "no_header": False, "image_size": None, "channels": None,
}  # fmt: skip


def options(path, **changes):
    return argparse.Namespace(**{**OPTIONS, "dataset": str(path), **changes})


def known_of(data, model, **changes):
    """What the file of a model says, with the private file beside it."""
    model.write_bytes(b"weights")
    data.held_out.write(file_beside(model), model)
    shape = None if data.encoding else data.shape
    return Known(data.classes, shape, data.encoding, data.label, **{"result": model, **changes})


CELLS = st.one_of(st.floats().map(repr), st.sampled_from(["", " NA ", "nan", "?", "1e400", "-0"]))


@settings(max_examples=50)
@given(st.lists(CELLS, min_size=1, max_size=8))
def test_a_number_is_read_as_it_is_alone(cells):
    alone = [columns.numbers_of([cell], "a")[0] for cell in cells]
    np.testing.assert_array_equal(columns.numbers_of(cells, "a"), alone)


def test_missing_cells_are_missing_and_text_is_refused_by_its_row_without_its_words():
    assert columns.numbers_of(["1", "", "None"], "a").tolist()[0] == 1.0
    assert np.isnan(columns.numbers_of(["", "NULL", "n/a"], "a")).all()
    with pytest.raises(InputError, match="row 2") as caught:
        columns.numbers_of(["1", "secret"], "a")
    assert "secret" not in str(caught.value)


def test_a_row_more_in_a_table_changes_no_other_row(tmp_path):
    lines = ["a,b,label", *(f"{index},{index % 7},{index % 2}" for index in range(200))]
    found = []
    for content in (lines, [*lines, "1e300,,1"]):
        (tmp_path / "table.csv").write_text("\n".join(content) + "\n")
        data = read_to_train(options(tmp_path / "table.csv"))
        rows = zip(*(data.train.rows[name].tolist() for name in ("a", "b")), data.train.labels, strict=True)
        held = zip(*(data.test.rows[name].tolist() for name in ("a", "b")), data.test.labels, strict=True)
        found.append((list(rows), list(held)))
    (few, few_held), (many, many_held) = found
    assert (few == many[: len(few)], few_held == many_held[: len(few_held)]) == (True, True)
    assert len(many) + len(many_held) == len(few) + len(few_held) + 1
    # A fifth of 200, within six standard deviations of 5.7.
    assert abs(len(few_held) - 40) < 34


def test_the_label_is_the_column_of_a_usual_name_or_the_last_one_whatever_it_holds(tmp_path):
    for header, expected in (("a,Target,b", "Target"), ("a,b,c", "c"), ("y,label", "y")):
        (tmp_path / "table.csv").write_text(f"{header}\n" + "0," * header.count(",") + "1\n")
        table = columns.read_columns(tmp_path / "table.csv")
        assert columns.label_of(table, options("")) == expected


def test_labels_of_any_kind_are_those_that_are_said(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,label\n" + "".join(f"{index},{('0', '1.0', '2')[index % 3]}\n" for index in range(60)))
    assert set(read_to_train(options(path, classes=3)).train.labels) == {0, 1, 2}
    with pytest.raises(InputError, match="are none of 0, 1"):
        read_to_train(options(path))
    with pytest.raises(InputError, match="none of a, b"):
        read_to_train(options(path, labels=["a", "b"]))
    data = read_to_train(options(path, target_range=[0.0, 2.0]))
    assert data.classes is None
    assert set(data.train.labels.tolist()) == {0.0, 1.0, 2.0}


def test_held_out_rows_of_a_file_are_those_that_training_leaves_out(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,label\n" + "".join(f"{index},{index % 2}\n" for index in range(100)))
    data = read_to_train(options(path))
    known = known_of(data, tmp_path / "model.pt")
    held_out = read_rows(options(path), known, labelled=True, held_out=True)
    assert held_out.rows["a"].tolist() == data.test.rows["a"].tolist()
    assert [int(name) for name in held_out.names] == data.test.rows["a"].tolist()
    whole = read_rows(options(path), known, labelled=False)
    assert whole.rows["a"].tolist() == [*range(100)]
    assert whole.labels is None


def test_people_of_a_table_are_held_out_as_a_whole(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,who,label\n" + "".join(f"{index},p{index // 4},{index % 2}\n" for index in range(200)))
    data = read_to_train(options(path, groups="who"))
    assert data.encoding.numbers == ("a",)
    trained = set(data.groups)
    assert len(data.groups) == len(data.train)
    assert not trained & {f"p{int(number) // 4}" for number in data.test.rows["a"]}


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_what_was_trained_on_by_people_is_never_held_out_of_the_same_file(kind, tmp_path):
    path, who = tmp_path / f"table.{kind}", np.arange(200) // 4
    if kind == "csv":
        path.write_text("a,who,label\n" + "".join(f"{row},{one},{row % 2}\n" for row, one in enumerate(who)))
    else:
        np.savez(path, X=np.arange(400.0).reshape(200, 2) / 2, y=np.arange(200) % 2, who=who)
    data = read_to_train(options(path, groups="who"))
    known = known_of(data, tmp_path / "model.pt")
    held_out = read_rows(options(path), known, labelled=True, held_out=True)

    def numbers(part):
        return (part.rows["a"] if data.encoding else part.rows[:, 0]).tolist()

    assert numbers(held_out) == numbers(data.test)
    assert not {*numbers(held_out)} & {*numbers(data.train)}
    # Rows by themselves are others.
    assert {*numbers(read_to_train(options(path)).test)} & {*numbers(data.train)}


def test_rows_are_held_out_by_nothing_but_what_training_has_kept(tmp_path):
    path, model = tmp_path / "table.csv", tmp_path / "model.pt"
    path.write_text("a,b,label\n" + "".join(f"{row},{row % 3},{row % 2}\n" for row in range(100)))
    known = known_of(read_to_train(options(path)), model)
    private = file_beside(model)
    assert len(read_rows(options(path), known, labelled=True, held_out=True)) > 5
    with pytest.raises(ConfigurationError, match="nothing says which rows"):
        read_rows(options(path), replace(known, result=None), labelled=True, held_out=True)
    kept = private.read_text("utf-8")
    for content, error, message in (
        (None, ConfigurationError, "stays with the data"),
        (kept[:-9], CheckpointError, "cannot be read"),
        ("[]", CheckpointError, "cannot be read"),
        ("[" * 10**5, CheckpointError, "cannot be read"),
        (kept.replace("held_out/1", "held_out/2"), CheckpointError, "a later version"),
        (kept.replace(": 1", ": -1"), CheckpointError, "does not say"),
    ):
        private.unlink() if content is None else private.write_text(content, "utf-8")
        with pytest.raises(error, match=message):
            read_rows(options(path), known, labelled=True, held_out=True)
    private.write_text(kept, "utf-8")
    # Another model's, as of a file that was moved.
    model.write_bytes(b"other weights")
    with pytest.raises(ConfigurationError, match="is of another model"):
        read_rows(options(path), known, labelled=True, held_out=True)
    model.write_bytes(b"weights")
    for lines in ("a,b,note,label", "b,a,label"):
        cells = "{0},{1},x,{2}" if "note" in lines else "{1},{0},{2}"
        path.write_text(f"{lines}\n" + "".join(cells.format(row, row % 3, row % 2) + "\n" for row in range(100)))
        with pytest.raises(ConfigurationError, match="taken for held-out ones"):
            read_rows(options(path), known, labelled=True, held_out=True)
    assert len(read_rows(options(path), known, labelled=True)) == 100


def test_the_private_file_holds_digests_of_held_out_rows_alone_and_says_that_it_is_private(tmp_path):
    path, model = tmp_path / "table.csv", tmp_path / "model.pt"
    path.write_text("a,name,label\n" + "".join(f"{row},secret{row},{row % 2}\n" for row in range(100)))
    data = read_to_train(options(path, drop=["name"]))
    known_of(data, model)
    text = file_beside(model).read_text("utf-8")
    assert "PRIVATE" in text
    assert "private" in file_beside(model).name
    assert "secret" not in text
    assert json.loads(text)["rows"] == data.held_out.rows
    assert data.held_out.rows.total() == len(data.test)
    assert HeldOut.of_model(model, "t") == data.held_out


def float32(values):
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


STORED = {
    "float32": lambda X, who: (float32(X), who),
    "big-endian": lambda X, who: (X.astype(">f8"), who.astype(">i4")),
    "Fortran": lambda X, who: (np.asfortranarray(X), who.astype("u4")),
    "ids as float64": lambda X, who: (X, who.astype("f8")),
    "ids as text": lambda X, who: (X, who.astype(str)),
    "ids as bytes": lambda X, who: (X, who.astype("S")),
    "zeros of another sign": lambda X, who: (np.where(X == 0.0, -X, X), who),
}


def rows_with_timestamps(groups, tmp_path):
    """Numbers of several kinds, a model's file, and the private one beside it."""
    generator = np.random.default_rng(0)
    X, who, y = generator.normal(size=(300, 4)), np.arange(300) // 3 + 10**6, np.arange(300) % 2
    X[::7, 1], X[::9, 2], X[::11, 0] = 0.0, math.nan, 1e300
    X[:, 3] = generator.integers(1_600_000_000, 1_700_000_000, 300)
    np.savez(tmp_path / "a.npz", X=X, y=y, who=who)
    with np.errstate(over="ignore"):
        data = read_to_train(options(tmp_path / "a.npz", groups=groups))
    return X, y, who, data, known_of(data, tmp_path / "model.pt")


@pytest.mark.parametrize("groups", [None, "who"])
@pytest.mark.parametrize("case", STORED)
def test_the_same_numbers_are_held_out_whatever_they_are_stored_as(case, groups, tmp_path):
    X, y, who, data, known = rows_with_timestamps(groups, tmp_path)
    stored, ids = STORED[case](X, who)
    np.savez(tmp_path / "b.npz", X=stored, y=y.astype(">i2"), who=ids)
    with np.errstate(over="ignore"):
        part = read_rows(options(tmp_path / "b.npz"), known, labelled=True, held_out=True)
    np.testing.assert_array_equal(part.rows, data.test.rows)
    np.testing.assert_array_equal(part.labels, data.test.labels)
    assert 20 < len(part) < 120
    with np.errstate(over="ignore"):
        again = read_to_train(options(tmp_path / "b.npz", groups=groups))
    np.testing.assert_array_equal(again.train.rows, data.train.rows)


CHANGED = {
    "float16": lambda X, y, who: (X.astype(np.float16), y, who),
    "three digits": lambda X, y, who: (X.round(3), y, who),
    "another order of columns": lambda X, y, who: (X[:, ::-1], y, who),
    "other labels": lambda X, y, who: (X, 1 - y, who),
    "a row twice": lambda X, y, who: (np.r_[X, X], np.r_[y, y], np.r_[who, who]),
    "fewer rows": lambda X, y, who: (X[:150], y[:150], who[:150]),
    "people by other ids": lambda X, y, who: (X, y, (who - 10**6 + 50) % 100 + 10**6),
    "no ids": lambda X, y, who: (X, y, who[:5]),
}


@pytest.mark.parametrize(
    ("case", "groups"),
    [(case, groups) for case in CHANGED for groups in (None, "who") if groups or "ids" not in case],
)
def test_a_file_that_is_another_is_refused_and_none_of_its_rows_is_judged(case, groups, tmp_path):
    generator = np.random.default_rng(1)
    X, y, who = generator.normal(size=(300, 4)), np.arange(300) % 2, np.arange(300) // 3 + 10**6
    np.savez(tmp_path / "a.npz", X=X, y=y, who=who)
    data = read_to_train(options(tmp_path / "a.npz", groups=groups))
    X, y, who = CHANGED[case](X, y, who)
    np.savez(tmp_path / "b.npz", X=X, y=y, who=who)
    known = known_of(data, tmp_path / "model.pt")
    with pytest.raises(ConfigurationError, match=r"taken for held-out ones|said in training whose"):
        read_rows(options(tmp_path / "b.npz"), known, labelled=True, held_out=True)


@pytest.mark.parametrize("seed", range(40))
def test_no_chance_lets_a_copy_of_lower_precision_through(seed, tmp_path):
    """Of so few rows the number that is left agreed in one of twelve copies, whose trained rows were judged."""
    generator = np.random.default_rng(seed)
    X, y = generator.normal(size=(100, 5)), generator.integers(0, 2, 100)
    np.savez(tmp_path / "a.npz", X=X, y=y)
    np.savez(tmp_path / "b.npz", X=X.astype(np.float16), y=y)
    data = read_to_train(options(tmp_path / "a.npz"))
    with pytest.raises(ConfigurationError, match="taken for held-out ones"):
        read_rows(options(tmp_path / "b.npz"), known_of(data, tmp_path / "m.pt"), labelled=True, held_out=True)


def test_rows_that_are_more_are_not_judged(tmp_path):
    X, y, _, data, known = rows_with_timestamps(None, tmp_path)
    more = np.random.default_rng(5).normal(size=(100, 4))
    np.savez(tmp_path / "b.npz", X=np.r_[more, X], y=np.r_[np.zeros(100, int), y])
    with np.errstate(over="ignore"):
        part = read_rows(options(tmp_path / "b.npz"), known, labelled=True, held_out=True)
    np.testing.assert_array_equal(part.rows, data.test.rows)
    assert min(map(int, part.names)) >= 100


@pytest.mark.parametrize("groups", [None, "who"])
def test_truth_values_are_one_in_any_way_to_write_them(groups, tmp_path):
    """A library of frames writes True, a spreadsheet TRUE."""
    generator = np.random.default_rng(49)
    rows = [(a, a > 0.3, f"p{index // 2}", int(a > 0)) for index, a in enumerate(generator.normal(size=120))]
    found = []
    for name, write in (("a", str), ("b", lambda one: str(one).upper()), ("c", lambda one: str(one).lower())):
        lines = [f"{a},{write(flag)},{who},{label}" for a, flag, who, label in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(["aa,flag,who,label", *lines]) + "\n")
        asked = options(tmp_path / f"{name}.csv", drop=["flag"] if groups else ["flag", "who"], groups=groups)
        found.append((asked, read_to_train(asked)))
    known = known_of(found[0][1], tmp_path / "model.pt")
    for asked, data in found:
        part = read_rows(asked, known, labelled=True, held_out=True)
        assert part.rows["aa"].tolist() == data.test.rows["aa"].tolist() == found[0][1].test.rows["aa"].tolist()


def test_cells_are_held_out_by_what_they_say_and_not_by_how_it_is_written(tmp_path):
    pandas = pytest.importorskip("pandas")
    lines = ["a,b,who,label", *(f"{row / 8:.4f},{row % 5 - 2}.0,p{row},{row % 2}" for row in range(300))]
    lines += [f"{word},1e-3,p{300 + place},1" for place, word in enumerate(["", "NA", "NaN", " null "] * 9)]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    pandas.read_csv(tmp_path / "a.csv", dtype={"who": str}).to_csv(tmp_path / "b.csv", index=False)
    assert (tmp_path / "a.csv").read_text() != (tmp_path / "b.csv").read_text()
    for groups in (None, "who", "b"):
        found = [columns.read_columns(tmp_path / name).contents(groups) for name in ("a.csv", "b.csv")]
        assert found[0] == found[1]
        assert len({*found[0]}) == {None: 336, "who": 336, "b": 6}[groups]


@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=2, max_size=2, unique=True))
def test_cells_do_not_run_into_each_other(rows):
    one, other = (columns.Columns("f", ("a", "b"), {"a": [a], "b": [b]}, True, 1).contents()[0] for a, b in rows)
    alike = [columns._content(cell) for cell in rows[0]] == [columns._content(cell) for cell in rows[1]]
    assert (one == other) == alike


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["7", "7.0", " 7 ", 7, 7.0, "7e0", b"7", True + 6], b"7"),
        (["", None, "nan", math.nan], b""),
        (["-0.0", -0.0, 0, "0", 0.0], b"0"),
        ([2**60 + 1, str(2**60 + 1), float(np.float32(2**60 + 1))], b"1152921504606846976"),
        ([1_650_000_037, "1650000037", float(np.float32(1_650_000_037)), "1.65e9"], b"1650000000"),
        ([2**24 - 1, float(2**24 - 1)], b"16777215"),
        ([10**400, "9" * 400], b"inf"),
        (["TRUE", "True", " true", True, "1"], b"1"),
        (["False", "FALSE", False, "0.0"], b"0"),
        ([0.1, "0.1", "0.10", float(np.float32(0.1))], repr(float(np.float32(0.1))).encode()),
        (["red", " red"], b"red"),
        ([math.inf, "inf", "1e999", 1e300, float(np.float32(math.inf))], b"inf"),
        ([-1e300, "-inf"], b"-inf"),
        ([2.0**80, "1.2089258e24"], b"1208925819614629174706176"),
    ],
)
def test_a_cell_is_what_it_says(cells, said):
    assert {columns._content(cell) for cell in cells} == {said}


def test_an_id_is_told_apart_to_its_last_digit():
    ids = [2**60 + 1, str(2**60), 1_650_000_037, "1650000038"]
    assert len({columns._content(one, is_id=True) for one in ids}) == len(ids)


ROWS = {
    "numbers": "0.1257,-0.1321,0.6404,1",
    "a number among words": "red,0,london",
    "an empty cell": "red,,london",
    "a missing cell": "red,NA,london",
    "a cell twice": "red,blue,red",
    "a date": "red,2024-03-01,london",
    "a time": "12/31/2023 23:59,red,london",
    "money": "ann,$12.50,london",
    "a truth value": "ann,True,london",
    "a few counted ones": "0,1,red",
    "four answers": "1,2,3,4,ill",
    "an identity": "A12345678,M,ill",
    "an identity with a letter behind": "9780306406157X,M,ill",
    "a random identity": "deadbeef-cafe-4bad-8abc-abcdefabcdef,M,ill",
    "an address": "a@b.com,M,ill",
    "quantities": "5.1cm,3.5cm,setosa",
    "a dose": "5 mg/l,M,ill",
    "thousands": "£30k,M,ill",
    "a bound": "<30,M,ill",
    "a range": "30-40,M,ill",
    "a range with a dash": "30–40,M,ill",
    "an open range": "30+,M,ill",
    "a date in words": "Jan 3 2020,M,ill",
    "a date that begins by its day": "3-Jan-20,M,ill",
    "a date with a time": "20200102T10,M,ill",
    "a date and more": "2020/01/02 x,M,ill",
    "a time of day": "10:30pm,M,ill",
    "a minus sign": "−5,M,ill",
    "a hidden letter": "\u200b5,M,ill",
    "wide digits": "５,M,ill",
    "other money": "¥5,M,ill",
    "a number in brackets": "(5),M,ill",
    "an error": "#N/A,M,ill",
    "another missing cell": "<NA>,M,ill",
    "a dash": "-,M,ill",
    "a street": "1234 Main St,M,ill",
    "a telephone": "555-1234,M,ill",
    "a diagnosis": "K50.9,M,ill",
    "a hexadecimal number": "0x1F,M,ill",
    "a month before a day": "mar1,M,ill",
    "a long month": "September 12,M,ill",
    "a month between": "01JAN2020,M,ill",
    "a span of time with a fraction": "1.5h,M,ill",
    "two identities that follow one another": "A12345,A12346,ill",
    "an identity of five digits": "A12345,M,ill",
    "a label": "ann,london,maybe",
}


@pytest.mark.parametrize("row", ROWS)
def test_a_first_line_that_looks_like_a_row_is_refused_without_its_cells(row, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(f"{ROWS[row]}\n" * 3)
    labels = ["maybe", "no"] if row == "a label" else None
    with pytest.raises(ConfigurationError, match="--no-header") as caught:
        columns.read_table(str(path), options(path, labels=labels))
    said = str(caught.value).replace(str(path), "")
    assert not any(cell in said for cell in ROWS[row].split(",") if len(cell) > 1)
    if len({*ROWS[row].split(",")}) == ROWS[row].count(",") + 1 and ",," not in ROWS[row]:
        said = columns.read_table(str(path), options(path, labels=labels, header=True))
        assert (said.names, said.rows) == (tuple(ROWS[row].split(",")), 2)
    count = ROWS[row].count(",") + 1
    names = [f"c{place}" for place in range(count)]
    found = columns.read_table(str(path), options(path, labels=labels, columns=names, no_header=True))
    assert (found.names, found.rows) == (tuple(names), 3)
    assert [found.cells[name][0] for name in names] == ROWS[row].split(",")
    assert columns.read_table(str(path), options(path, columns=names)).rows == 2


HEADERS = [
    "0,1,2,3,4", "0,1,2,3,label", "1,2,3,4,5,6,7,8,y", "1x1,1x2,label", "age_2,Q1 (a),label", "a b,x.1,y-2", "#,a,y",
    "Unnamed: 0,a,y", "1st,2nd,y", "feature 1,feature 2,y", "E1,E2,E3", "No,a,y", "K,Ca,Fe", "pct_50,share (%),y",
    "may_2020,sales_2021,y", "novel1,decision2,y", "octave1,marks1,marital1", "mayor1,maybe2,junction3,augment1,y",
    "24h,5min,y", "V9999,V10000,V10001,y", "feature_10000,feature_10001,feature_10002,y", "march,april,y",
    "größe,年齢,y", "x@2,b,y", "sepal length (cm),petal width (cm),y",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_headers_with_digits_and_counted_columns_are_headers(header, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(header + "\n" + ",".join("7" * (header.count(",") + 1)) + "\n")
    assert columns.read_columns(path).names == tuple(header.split(","))


def test_names_of_columns_are_as_many_as_there_are_and_said_where_there_is_no_header(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,0\n")
    with pytest.raises(ConfigurationError, match="3 names"):
        columns.read_columns(path, ["a", "b", "c"])
    with pytest.raises(InputError, match="there are 3 columns"):
        columns.read_columns(path, ["a", "b", "c"], has_header=False)
    with pytest.raises(ConfigurationError, match="say how the columns are called"):
        columns.read_columns(path, has_header=False)


@pytest.mark.parametrize("header", ["Na,Mg,K", "ID,NA,class", "2020,2021,y", "5%,10%,y", "0,1,2,y", "100m,200m,y"])
def test_ordinary_headers_that_look_like_rows_are_read_where_they_are_said_to_be_headers(header, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(header + "\n" + ",".join("7" * (header.count(",") + 1)) + "\n")
    with pytest.raises(ConfigurationError, match=r"where it is a header, say so, --header"):
        columns.read_table(str(path), options(path))
    found = columns.read_table(str(path), options(path, header=True))
    assert (found.names, found.rows) == (tuple(header.split(",")), 1)
    for other in ({"no_header": True}, {"columns": ["a", "b", "c"]}):
        with pytest.raises(ConfigurationError, match="leave --no-header and --columns out"):
            columns.read_table(str(path), options(path, header=True, **other))


def _written(path, cells, types):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in types.items()])
    parquet.write_table(pyarrow.table(cells, schema=schema), path)
    return columns.read_columns(path)


@pytest.mark.parametrize("groups", [None, "who"])
@pytest.mark.parametrize("kind", ["int64", "float64"])
def test_a_missing_cell_of_one_row_changes_what_no_other_row_of_a_parquet_file_is(kind, groups, tmp_path):
    cells = {
        "age": [*range(18, 318)],
        "who": [row // 3 for row in range(300)],
        "label": [row % 2 for row in range(300)],
    }
    types = {"age": "int64", "who": "int64", "label": "int64"}
    without = _written(tmp_path / "table.parquet", cells, types)
    more = {"age": [*cells["age"], None], "who": [*cells["who"], None], "label": [*cells["label"], 1]}
    # As pandas writes whole numbers of which one is missing.
    found = _written(tmp_path / "more.parquet", more, {**types, "age": kind, "who": kind})
    assert found.contents(groups)[:-1] == without.contents(groups)
    assert [type(cell) for cell in found.cells["age"][:-1]] == [int] * 300


def test_whole_numbers_of_a_parquet_file_are_read_to_their_last_digit_beside_a_missing_one(tmp_path):
    big = [2**60 + 1, 2**60 + 3, None]
    found = _written(tmp_path / "table.parquet", {"a": big, "label": [0, 1, 0]}, {"a": "int64", "label": "int64"})
    assert found.cells["a"] == big
    assert np.isnan(found.frame(TableEncoding(["a"]))["a"].astype(float)[2])


def test_a_parquet_file_is_read_as_the_csv_file_of_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = pandas.DataFrame({"a": np.arange(60) * 1.5, "c": ["x", "y"] * 30, "label": np.arange(60) % 2})
    table.to_csv(tmp_path / "table.csv", index=False)
    table.to_parquet(tmp_path / "table.parquet")
    found = []
    for name in ("table.csv", "table.parquet"):
        data = read_to_train(options(tmp_path / name, categories=["c=x,y"]))
        part = read_rows(
            options(tmp_path / name), Known((0, 1), None, data.encoding, data.label), labelled=True, held_out=False
        )
        found.append((data.encoding(part.rows), part.labels))
    assert (found[0][0] == found[1][0]).all()
    assert found[0][1] == found[1][1]


def test_categories_that_are_whole_numbers_are_and_others_are_text(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b,label\n" + "1,01,0\n2,02,1\n" * 20)
    encoding = read_to_train(options(path, categories=["a=1,2", "b=01,02"])).encoding
    assert encoding.categories == {"a": (1, 2), "b": ("01", "02")}
    with pytest.raises(ConfigurationError, match="label, or whose rows"):
        read_to_train(options(path, categories=["label=0,1"]))


class Fixed:
    """Predicts what it is given."""

    def __init__(self, scores):
        self.scores_given = scores

    def scores(self, rows):
        return self.scores_given[rows[:, 0].long()]

    def predict(self, rows):
        return self.scores(rows).argmax(1)


def test_figures_are_those_of_a_count_by_hand():
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 3, generator=generator).double()
    labels = torch.randint(3, (60,), generator=generator)
    scores[7] = math.nan
    rows = torch.arange(60.0)[:, None]
    found = scores_of(Fixed(scores), Part(rows, labels, [str(one) for one in range(60)], "rows"), (0, 1, 2))
    said = [-1 if torch.isnan(row).any() else int(row.argmax()) for row in scores]
    assert found.accuracy == pytest.approx(sum(a == b for a, b in zip(said, labels.tolist(), strict=True)) / 60)
    for one in found.classes:
        own, called = [b == one.label for b in labels.tolist()], [a == one.label for a in said]
        hits = sum(a and b for a, b in zip(own, called, strict=True))
        assert (one.rows, one.predicted) == (sum(own), sum(called))
        assert one.recall == pytest.approx(hits / sum(own))
        assert one.precision == pytest.approx(hits / sum(called))
        clean = scores.nan_to_num(0.0)
        others = clean[:, [k for k in range(3) if k != one.label]].amax(1)
        assert one.auroc == pytest.approx(auroc(clean[:, one.label] - others, torch.tensor(own).long()))


def test_data_with_a_test_part_is_read_there_and_said_to_be(folder, tmp_path):
    torch = pytest.importorskip("torch")
    for part in ("train", "test"):
        for name in ("left", "right"):
            (tmp_path / "split" / part / name).mkdir(parents=True)
            for file in list((folder / name).iterdir())[: 6 if part == "train" else 2]:
                (tmp_path / "split" / part / name / file.name).write_bytes(file.read_bytes())
    data = read_to_train(options(tmp_path / "split"))
    assert (len(data.train), len(data.test), data.classes) == (12, 4, ("left", "right"))
    known = Known(data.classes, data.shape)
    part = read_rows(options(tmp_path / "split"), known, labelled=True)
    assert part.told == f"4 test samples of {tmp_path / 'split'}"
    assert torch.equal(part.rows, data.test.rows)
    np.savez(
        tmp_path / "s.npz", x_train=np.ones((5, 2)), y_train=[0, 1] * 2 + [0], x_test=np.zeros((3, 2)), y_test=[1] * 3
    )
    part = read_rows(options(tmp_path / "s.npz"), Known((0, 1), (2,)), labelled=True)
    assert (part.told, part.labels.tolist()) == (f"3 test samples of {tmp_path / 's.npz'}", [1, 1, 1])
    # Held-out images are those that training leaves out, in its order.
    whole = read_to_train(options(folder))
    known = known_of(whole, tmp_path / "model.pt")
    held_out = read_rows(options(folder), known, labelled=True, held_out=True)
    assert torch.equal(held_out.rows, whole.test.rows)
    assert torch.equal(held_out.labels, whole.test.labels)


def test_a_test_part_of_rows_that_were_trained_on_is_refused_and_the_private_file_is_its_owner_s_alone(tmp_path):
    X, y, _, data, known = rows_with_timestamps(None, tmp_path)
    assert file_beside(known.result).stat().st_mode & 0o077 == 0
    train = data.train
    np.savez(
        tmp_path / "b.npz", x_train=X[:9], y_train=y[:9], x_test=np.asarray(train.rows), y_test=np.asarray(train.labels)
    )
    with pytest.raises(ConfigurationError, match="says itself which of its rows are for testing"):
        read_rows(options(tmp_path / "b.npz"), known, labelled=True, held_out=True)
    assert len(read_rows(options(tmp_path / "b.npz"), known, labelled=True)) == len(train)


def test_columns_whose_names_were_exchanged_are_others(tmp_path):
    generator = np.random.default_rng(0)
    lines = [
        f"{a:.6f},{b:.6f},{c}" for a, b, c in zip(*generator.normal(size=(2, 200)), np.arange(200) % 2, strict=True)
    ]
    for name, header in (("a", "first,second,y"), ("b", "second,first,y")):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")
    data = read_to_train(options(tmp_path / "a.csv", label="y"))
    known = known_of(data, tmp_path / "model.pt")
    assert len(read_rows(options(tmp_path / "a.csv", label="y"), known, labelled=True, held_out=True)) > 0
    with pytest.raises(ConfigurationError, match="taken for held-out ones"):
        read_rows(options(tmp_path / "b.csv", label="y"), known, labelled=True, held_out=True)
