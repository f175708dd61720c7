from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from accounting import GaussianRelease, GaussianStep
from clipless_dp import ConfigurationError, InputError, PrivacyError
from clipless_dp.features import TableEncoding
from clipless_dp.tables import (
    LABELS_SHARE,
    LARGEST_BATCH,
    STATISTICS_SHARE,
    fit_table,
    fitting,
    learning_rate,
    number_of_steps,
    tasks,
)

BUDGET = {"epsilon": 2.0, "delta": 1e-4, "progress": False, "reproducible_seed": 0, "cosines": 128}


def table(rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of scales 1e-3 to 1e4; the label is whether two of them have one sign, which no linear score tells."""
    columns = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (columns[:, 0] * columns[:, 1] > 0).long()
    return columns * torch.tensor([1e-3, 1.0, 1e4, 1.0]).double(), labels


def share_of_ordered_pairs(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The area under the ROC curve."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    return float((positive[:, None] > negative).double().mean())


def test_a_table_of_any_scales_is_learnt_from_within_the_budget():
    rows, labels = table()
    rows[5, 2], rows[3999, 1] = math.nan, math.nan
    trained = fit_table(rows[:3000], labels[:3000], validation=(rows[3000:], labels[3000:]), **BUDGET)
    scores = trained.scores(rows[3000:])
    assert torch.isfinite(scores).all()
    # 0.9 as a rule; 0.5 by chance, and by any linear score.
    assert share_of_ordered_pairs(scores, labels[3000:]) > 0.85
    assert trained.result.history[-1].accuracy == float(((scores > 0) == (labels[3000:] == 1)).double().mean())
    assert 0.98 * BUDGET["epsilon"] < trained.result.epsilon <= BUDGET["epsilon"]


def test_arrays_are_trained_on_as_tensors_are_and_what_a_mask_covers_is_not():
    rows, labels = table(300)
    of_tensors = fit_table(rows, labels, **BUDGET)
    of_arrays = fit_table(rows.numpy(), labels.numpy(), **BUDGET)
    assert torch.equal(of_arrays.scores(rows.numpy()), of_tensors.scores(rows))
    with pytest.raises(InputError, match="mask"):
        fit_table(np.ma.masked_greater(rows.numpy(), 2.0), labels.numpy(), **BUDGET)


@pytest.mark.parametrize("kind", [">f8", ">f4"])
def test_arrays_of_another_byte_order_are_read_by_their_numbers(kind):
    rows, labels = (part.numpy() for part in table(400))
    found = [
        fit_table(some, own, **BUDGET, epochs=1).scores(some)
        for some, own in ((rows.astype(kind[1:]), labels), (rows.astype(kind), labels.astype(">i8")))
    ]
    assert torch.equal(*found)


def test_arrays_wider_than_tensors_are_refused_in_words_before_anything_is_spent(monkeypatch):
    rows, labels = (part.numpy() for part in table(400))
    trained = fit_table(rows, labels, **BUDGET, epochs=1)
    assert trained.scores(rows[:0]).shape == (0,)
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("the widest numbers are float64 here")
    monkeypatch.setattr(fitting, "private_standardisation", lambda *_, **__: pytest.fail("released"))
    for refuse in (trained.scores, lambda wide: fit_table(wide, labels, **BUDGET)):
        with pytest.raises(InputError, match="give float64"):
            refuse(rows.astype(np.longdouble))


def _masked(rows: np.ndarray) -> np.ndarray:
    return np.ma.masked_array(rows, mask=np.zeros(rows.shape, dtype=bool))


def _of_records(rows: np.ndarray) -> np.ndarray:
    records = np.zeros(len(rows), dtype=[("id", "i1"), ("rows", rows.dtype, rows.shape[1:])])
    records["rows"] = rows
    return records["rows"]


def _mapped(rows: np.ndarray, path: Path) -> np.ndarray:
    np.save(path / "rows.npy", rows)
    return np.load(path / "rows.npy", mmap_mode="r")


APART = {
    "Fortran order": lambda rows, path: np.asfortranarray(rows),
    "every other row and column": lambda rows, path: np.repeat(np.repeat(rows, 2, 0), 2, 1)[::2, ::2],
    "in reverse": lambda rows, path: rows[::-1].copy()[::-1],
    "columns in reverse": lambda rows, path: rows[:, ::-1].copy()[:, ::-1],
    "columns of a wider table": lambda rows, path: np.concatenate([rows, rows], 1)[:, 2:6][:, [2, 3, 0, 1]],
    "a slice of a wider table": lambda rows, path: np.concatenate([0 * rows, rows, rows], 1)[:, 4:8],
    "a field of records": lambda rows, path: _of_records(rows),
    "read from a mapped file": _mapped,
    "read-only": lambda rows, path: np.frombuffer(rows.tobytes()).reshape(rows.shape),
    "under a mask that covers nothing": lambda rows, path: _masked(rows),
}


@pytest.fixture(scope="module")
def plain_scores():
    rows, labels = (part.numpy() for part in table(100))
    return fit_table(rows, labels, **BUDGET).scores(rows)


@pytest.mark.parametrize("name", APART)
def test_arrays_of_any_layout_in_which_rows_lie_apart_are_trained_on_as_others(name, tmp_path, plain_scores):
    rows, labels = (part.numpy() for part in table(100))
    found = fit_table(APART[name](rows, tmp_path), labels, **BUDGET)
    assert torch.equal(found.scores(rows), plain_scores)


def test_labels_may_be_one_for_all_and_a_column_within_rows_too():
    rows, _ = table(100)
    fit_table(rows.numpy(), np.broadcast_to(np.int64(1), (100,)), **BUDGET)
    fit_table(np.broadcast_to(rows.numpy()[:, :1], (100, 4)), np.arange(100) % 2, **BUDGET)


def _windows(kind: str) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(np.random.default_rng(0).normal(size=103).astype(kind), 4)


TOGETHER = {
    "one row for all": lambda: np.broadcast_to(np.random.default_rng(0).normal(size=4), (100, 4)),
    "windows": lambda: _windows("f8"),
    "windows of float32": lambda: _windows("f4"),
    "windows of float16": lambda: _windows("f2"),
    "windows in reverse": lambda: _windows("f8")[::-1],
    "reversed windows": lambda: _windows("f8")[:, ::-1],
    "every other window": lambda: np.lib.stride_tricks.sliding_window_view(np.arange(202.0), 4)[::2],
    "windows under a mask that covers nothing": lambda: _masked(_windows("f8")),
    "a tensor's windows": lambda: torch.randn(103).unfold(0, 4, 1),
    "a frame of windows": lambda: pytest.importorskip("pandas").DataFrame(
        _windows("f8"), columns=[*"abcd"], copy=False
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_lie_on_one_another_are_refused_before_a_copy_hides_it_and_nothing_is_charged(name, monkeypatch):
    rows, labels = TOGETHER[name](), np.arange(100) % 2
    asked = {"encoding": TableEncoding([*"abcd"])} if hasattr(rows, "iloc") else {}
    monkeypatch.setattr(fitting, "private_standardisation", None)
    for task in ({}, {"target_range": (0.0, 1.0)}):
        if asked and not task:
            task = {"classes": (0, 1)}
        with pytest.raises(PrivacyError, match="lie on one another"):
            fit_table(rows, labels, **BUDGET, **asked, **task)


def test_targets_that_are_the_series_of_the_rows_one_step_later_are_refused():
    series = np.random.default_rng(0).normal(size=(101, 4))
    with pytest.raises(PrivacyError, match="lie on one another"):
        fit_table(series[:-1], series[1:, 0], target_range=(-1.0, 1.0), **BUDGET)
    # Of the same rows it is a column of theirs.
    fit_table(series[:, :3], series[:, 3], target_range=(-1.0, 1.0), **BUDGET)


def test_columns_of_a_mapping_that_are_the_series_one_step_later_are_refused():
    series, encoding = np.random.default_rng(0).normal(size=101), TableEncoding(["now", "next"])
    asked = {**BUDGET, "encoding": encoding, "classes": (0, 1)}
    with pytest.raises(PrivacyError, match="lie on one another"):
        fit_table({"now": series[:-1], "next": series[1:]}, np.arange(100) % 2, **asked)
    fit_table({"now": series[:-1], "next": series[1:].copy()}, np.arange(100) % 2, **asked)
    fit_table({"now": series[:-1].tolist(), "next": series[1:]}, np.arange(100) % 2, **asked)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_windows_of_one_person_may_overlap_and_of_two_may_not(as_tensor):
    # The series of two people by turns.
    series, labels = np.random.default_rng(0).normal(size=106), np.arange(100) % 3 // 2
    rows = np.lib.stride_tricks.as_strided(series, (100, 4), (8, 16))
    if as_tensor:
        rows, labels = torch.from_numpy(series).as_strided((100, 4), (1, 2)), torch.from_numpy(labels)
    fit_table(rows, labels, groups=np.arange(100) % 2, **BUDGET)
    with pytest.raises(PrivacyError, match="lie on one another"):
        fit_table(rows, labels, groups=np.arange(100) // 50, **BUDGET)


def test_statistics_and_training_are_in_one_ledger_with_their_shares():
    trained = fit_table(*table(500), **BUDGET)
    (columns, once), (labels, one), (step, count) = trained.result.optimizer.accountant.ledger
    assert (type(columns), once, type(labels), one) == (GaussianRelease, 1, GaussianRelease, 1)
    assert (type(step), count) == (GaussianStep, 100)
    assert step.noise_multiplier == pytest.approx(trained.result.noise_multiplier)
    # At sample rate 1 squared inverse multipliers add up; calibration is to 0.01 %.
    paid = [columns.noise_multiplier**-2, labels.noise_multiplier**-2, 100 * step.noise_multiplier**-2]
    assert paid[0] / sum(paid) == pytest.approx(STATISTICS_SHARE, rel=1e-2)
    assert paid[1] / sum(paid) == pytest.approx(LABELS_SHARE, rel=1e-2)


@pytest.mark.parametrize("positive", [0.02, 0.3, 0.9])
def test_scores_are_log_odds_of_the_share_of_positive_labels_where_columns_tell_nothing(positive):
    rows = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20_000) % 100 < 100 * positive
    trained = fit_table(rows, labels, **{**BUDGET, "delta": 1e-5})
    predicted = torch.sigmoid(trained.scores(rows))
    # The count has noise of 13 rows at ε = 2; weights learn noise only.
    assert float(predicted.mean()) == pytest.approx(positive, abs=0.03)
    assert not any(name.endswith("bias") for name, p in trained.net.named_parameters() if p.requires_grad)


def test_a_run_with_a_checkpoint_pays_for_its_statistics_once(tmp_path):
    rows, labels = table(500)
    settings = {**BUDGET, "checkpoint": tmp_path / "run.pt", "reproducible_seed": None}
    first = fit_table(rows, labels, **settings)
    again = fit_table(rows, labels, **settings)
    assert again.result.epsilon == first.result.epsilon
    assert torch.equal(again.scores(rows), first.scores(rows))


def test_the_settings_follow_from_public_numbers_alone():
    rows, labels = table(300)
    one, other = (
        fit_table(values, labels, dataset_size=1000, **BUDGET).result for values in (rows, torch.ones(300, 4))
    )
    assert one.noise_multiplier == other.noise_multiplier
    assert one.sample_rate == other.sample_rate == 1.0
    assert one.optimizer.param_groups[0]["lr"] == learning_rate(1000, BUDGET["epsilon"])
    assert learning_rate(10**9, 1.0) == 60.0
    assert [number_of_steps(rows, 0.5) for rows in (1, 240_000, 10**9)] == [100, 200, 300]
    assert LARGEST_BATCH > 1000


def test_what_is_no_table_is_refused_before_anything_is_spent(monkeypatch):
    def released(*arguments, **settings):
        raise AssertionError("statistics were released")

    monkeypatch.setattr(fitting, "private_standardisation", released)
    monkeypatch.setattr(tasks, "private_fraction", released)
    rows, labels = table(50)
    for bad in (rows[0], rows.long(), rows[:, :0]):
        with pytest.raises(InputError, match="rows"):
            fit_table(bad, labels, **BUDGET)
    for bad in (labels[:10], labels[:, None], labels.to(torch.complex64)):
        with pytest.raises(InputError, match="labels"):
            fit_table(rows, bad, **BUDGET)
    with pytest.raises(InputError, match="0 or 1"):
        fit_table(rows, 2 * labels - 1, **BUDGET)
    for name, value in {"dataset_size": 0, "cosines": 0, "learning_rate": 1.0, "noise": "secure"}.items():
        with pytest.raises(ConfigurationError, match=name):
            fit_table(rows, labels, **{**BUDGET, name: value})
