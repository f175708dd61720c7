"""What a statement is asked for wrongly ends in errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipless_dp import CheckpointError, CliplessDPSGD, ConfigurationError, constraints, report
from clipless_dp.datasets import load_dataset
from tests.support import gated_model


def private():
    return CliplessDPSGD(
        gated_model(), lr=0.1, noise_multiplier=1.5, sample_rate=0.1, dataset_size=300, accountant="rdp"
    )


@pytest.mark.parametrize("what", [gated_model, object, lambda: None], ids=["model", "object", "none"])
def test_a_report_of_what_is_no_optimizer_says_what_to_give(what):
    with pytest.raises(ConfigurationError, match="optimizer that trained"):
        report(what())


@pytest.mark.parametrize("path", ["", ".", "/", "..", "a\0b", 3, b"statement", Path()], ids=repr)
def test_a_path_that_names_no_file_is_refused(path):
    with pytest.raises(CheckpointError):
        report(private(), path)


@pytest.mark.parametrize(
    "change", [{"unit": 3}, {"title": None}, {"notes": None}, {"notes": "one"}, {"notes": [3]}, {"title": "\ud800"}]
)
def test_texts_that_are_none_are_refused(change):
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        report(private(), **change)


@pytest.mark.parametrize("delta", [True, "a", 0.0, 1.0, 2, float("nan")])
def test_a_delta_that_is_no_probability_is_refused(delta):
    with pytest.raises(ConfigurationError, match="delta"):
        report(private(), delta=delta)


def test_a_delta_of_numpy_and_a_path_of_each_kind_are_taken(tmp_path):
    for path in (tmp_path / "one", str(tmp_path / "two.md")):
        statement = report(private(), path, delta=np.float32(1e-5), notes=("a", "b"))
        assert all(file.exists() for file in statement.files)


def test_a_file_is_read_by_its_path_and_refused_where_inputs_are_complex(tmp_path):
    inputs, targets = np.linspace(0.0, 1.0, 80).reshape(40, 2), np.arange(40) % 2
    for name, values in (("real.npz", inputs), ("complex.npz", inputs * 1j)):
        np.savez(tmp_path / name, X=values, y=targets)
    assert load_dataset(tmp_path / "real.npz", classes=np.int64(2)).classes == 2
    with pytest.raises(ConfigurationError, match="complex"):
        load_dataset(tmp_path / "complex.npz", classes=2)
    for classes in (True, 2.0, "2", None):
        with pytest.raises(ConfigurationError, match="classes"):
            load_dataset(tmp_path / "real.npz", classes=classes)
    with pytest.raises(ConfigurationError, match="name"):
        load_dataset(3)


@pytest.mark.parametrize("kind", ["AlmostOrthogonal", "Ball", "Frobenius", "Orthogonal", "RowNorm", "Spectral"])
def test_limits_that_no_arithmetic_keeps_are_refused(kind):
    for limit in (1e-300, 1e-9, 1e19, 1e300):
        with pytest.raises(ConfigurationError, match="limit"):
            getattr(constraints, kind)(limit)
    assert getattr(constraints, kind)(1e-8).limit == 1e-8
