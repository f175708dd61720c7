"""The comparison of tables with other libraries: what they pay for, and that settings are chosen without test rows."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tables.py"


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("benchmark_of_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ranges_hold_the_columns_and_no_single_row_moves_them(tables):
    rows = np.random.default_rng(0).normal(size=(20_000, 3)) * [1e-3, 1.0, 100.0]
    rows[:, 2] = np.abs(rows[:, 2])
    bounds = tables.released_bounds(rows, 1.0, seed=0)
    inside = (rows >= bounds[:, 0]) & (rows <= bounds[:, 1])
    assert (inside.mean(0) > 0.99).all()
    assert (np.abs(bounds).max(1) <= 16.0 * rows.std(0)).all(), "within powers of two of what is there"
    assert bounds[2, 0] >= 0.0, "a column of one sign has a range of it"
    rows[7] = [1e9, -1e9, np.inf]
    assert np.array_equal(tables.released_bounds(rows, 1.0, seed=0), bounds)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 3.0, -3.0, 1e-30, 1e30, np.inf])
def test_a_row_counts_once_in_each_column_where_it_lies_and_noise_is_of_that_sensitivity(tables, monkeypatch, value):
    drawn = []

    class Silent:
        def laplace(self, scale, size):
            drawn.append((scale, size))
            return np.zeros(size)

    monkeypatch.setattr(tables.np.random, "default_rng", lambda seed: Silent())
    counted = []
    bincount = np.bincount
    monkeypatch.setattr(tables.np, "bincount", lambda *a, **k: counted.append(bincount(*a, **k)) or counted[-1])
    bounds = tables.released_bounds(np.full((1000, 5), value), 0.5, seed=0)
    assert drawn == [(5 / 0.5, 2 * len(tables.EXPONENTS))] * 5
    assert [(counts.sum(), counts.max()) for counts in counted] == [(1000, 1000)] * 5
    largest = 2.0 ** tables.EXPONENTS[-1]
    assert (bounds[:, 0] <= np.clip(value, -largest, largest)).all()
    assert (bounds[:, 1] >= np.clip(value, -largest, largest)).all()


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("rival", ["dp-ebm", "logistic"])
def test_what_ranges_cost_is_missing_from_what_a_rival_trains_with(tables, monkeypatch, rival, free):
    told, asked = {}, []

    class Other:
        def __init__(self, **arguments):
            told.update(arguments)

        def fit(self, rows, labels):
            return self

        def decision_function(self, rows):
            return rows[:, 0]

    def released(rows, epsilon, seed):
        asked.append(epsilon)
        return np.array([[-4.0, 4.0]] * rows.shape[1])

    monkeypatch.setattr(tables, "released_bounds", released)
    for name in ("interpret.privacy", "diffprivlib.models"):
        module = argparse.Namespace(DPExplainableBoostingClassifier=Other, LogisticRegression=Other)
        monkeypatch.setitem(sys.modules, name.partition(".")[0], module)
        monkeypatch.setitem(sys.modules, name, module)
    rows = np.random.default_rng(0).normal(size=(50, 4))
    for settings in tables.grid(rival, 1000, free):
        tables.fit_rival(rival, rows, np.arange(50) % 2, settings, free=free, epsilon=2.0, delta=1e-5, seed=0)
        share = settings.get("share", 0.0)
        assert share == 0.0 or not free
        assert share > 0.0 or free or rival == "logistic", "DP-EBM needs ranges"
        assert told["epsilon"] == pytest.approx(2.0 * (1.0 - share))
        assert asked == ([2.0 * share] if share else []), "ranges are released if, and only if, they are paid for"
        asked.clear()
    assert told.get("delta", 1e-5) == 1e-5
    if rival == "logistic":
        assert told["data_norm"] == pytest.approx(settings["norm"] * 2.0)


def test_the_settings_are_those_that_held_out_training_rows_prefer(tables, tmp_path, monkeypatch):
    rows = np.arange(200.0)[:, None]
    np.savez(tmp_path / "yeast.npz", X=rows, y=(np.arange(200) % 2))
    (train_rows, _), (test_rows, _) = tables.train_and_test(tmp_path / "yeast.npz")
    train, test = set(train_rows.ravel().tolist()), set(test_rows.ravel().tolist())
    seen = []

    def fit_rival(rival, rows, labels, settings, *, free, epsilon, delta, seed):
        assert set(rows.ravel()) <= train

        def scores(held_out):
            part = "test" if set(held_out.ravel()) == test else "validation"
            assert part == "test" or set(held_out.ravel()) <= train - set(rows.ravel())
            seen.append((part, settings["learning_rate"]))
            odd = held_out[:, 0] % 2
            # The best on held-out training rows would be the worst on test rows.
            return odd if (part == "validation") == (settings["learning_rate"] == 0.01) else -odd

        return scores

    monkeypatch.setattr(tables, "fit_rival", fit_rival)
    content: dict = {"runs": []}
    options = argparse.Namespace(tables=["yeast"], data_dir=tmp_path, choices=2, seeds=[0, 1, 2], epsilon=1.0)
    kept = []
    tables.compare("dp-ebm", options, content, lambda: kept.append(len(content["rivals"])))
    assert {rate for part, rate in seen if part == "test"} == {0.01}
    assert sum(part == "test" for part, _ in seen) == 6, "three seeds, with free scales and without"
    assert kept == list(range(1, len(seen) + 1)), "each run is kept at once"
    before = len(seen)
    tables.compare("dp-ebm", options, content, lambda: None)
    assert len(seen) == before, "what is there is not run again"
    grid = tables.grid
    monkeypatch.setattr(tables, "grid", lambda *about: [one for one in grid(*about) if one["learning_rate"] != 0.01])
    tables.compare("dp-ebm", options, content, lambda: None)
    tested = [entry["settings"]["learning_rate"] for entry in content["rivals"] if entry["split"] == "test"]
    assert len(tested) == 6, "runs of another choice are gone"
    assert 0.01 not in tested
    monkeypatch.undo()
    shown = "\n".join(tables.rivals_markdown(content))
    assert "| yeast | – | 100.00 ± 0.00 (3) | 100.00 ± 0.00 (3) | – | – |" in shown
