from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from clipless_dp.cli import image_classifier, main
from clipless_dp.datasets import load_dataset
from clipless_dp.errors import ConfigurationError

pytest.importorskip("sklearn")


@pytest.fixture
def table(tmp_path):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(400, 5))
    path = tmp_path / "table.npz"
    np.savez(path, X=inputs, y=(inputs[:, 0] > 0).astype(np.int64))
    return path


@pytest.mark.parametrize("route", ["gated", "spectral", "orthogonal"])
def test_training_on_a_table_prints_accuracy_and_what_was_spent(table, tmp_path, capsys, route):
    checkpoint = tmp_path / "table.pt"
    arguments = [
        "train", "--dataset", str(table), "--epsilon", "3", "--delta", "1e-3", "--epochs", "4",
        "--batch-size", "64", "--route", route, "--checkpoint", str(checkpoint), "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    epsilon = float(re.search(r"epsilon\s+([\d.]+)", printed)[1])
    assert 2.9 < epsilon <= 3.0
    assert re.search(r"test accuracy\s+[\d.]+ % of 80 held-out samples", printed)
    assert re.search(r"delta\s+0.001", printed)
    assert str(checkpoint) in printed
    assert checkpoint.exists()


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "clipless_dp", "train", "--dataset", "digits", "--epsilon", "3"]
    command += ["--delta", "1e-4", "--epochs", "1", "--batch-size", "256"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "total Δ" in finished.stdout
    assert "test accuracy" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagenet"], "unknown data set 'imagenet'"),
        (["--dataset", "missing.npz"], "missing.npz"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "mnist.npz"),
        (["--dataset", "digits", "--batch-size", "5000"], "batch_size"),
        (["--dataset", "digits", "--epsilon", "-1"], "epsilon"),
        (["--dataset", "digits", "--delta", "0"], "delta"),
    ],
)
def test_refusals_go_to_standard_error_with_status_2(capsys, arguments, message):
    assert main(["train", "--epsilon", "3", "--delta", "1e-4", "--quiet", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_npz_file_with_its_own_split_is_taken_as_it_is(tmp_path):
    images = np.arange(4 * 4, dtype=np.uint8).reshape(1, 4, 4).repeat(3, 0)
    np.savez(tmp_path / "i.npz", x_train=images, y_train=[0, 1, 2], x_test=images[:1], y_test=[0])
    data = load_dataset(str(tmp_path / "i.npz"))
    assert data.inputs.shape == (3, 1, 4, 4)
    assert float(data.inputs.max()) == pytest.approx(15 / 255)
    assert data.classes == 3


def test_an_npz_file_without_the_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "i.npz", data=[1])
    with pytest.raises(ConfigurationError, match="no array 'X'"):
        load_dataset(str(tmp_path / "i.npz"))
    np.savez(tmp_path / "j.npz", X=np.zeros((5, 2)), y=np.linspace(0, 1, 5))
    with pytest.raises(ConfigurationError, match="class indices"):
        load_dataset(str(tmp_path / "j.npz"))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_the_image_classifier_takes_the_sizes_it_names(shape):
    import torch

    assert image_classifier(shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)
