from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from accounting import Ledger
from clipless_dp import presets
from clipless_dp.architectures.small import image_classifier
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.cli import main
from clipless_dp.commands.scores import auroc
from clipless_dp.datasets import load_dataset
from clipless_dp.errors import ConfigurationError

from .support import before_steps

pytest.importorskip("sklearn")


@pytest.fixture
def table(tmp_path):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(400, 5))
    path = tmp_path / "table.npz"
    np.savez(path, X=inputs, y=(inputs[:, 0] > 0).astype(np.int64))
    return path


def test_an_audit_is_shown_and_enters_the_statement(table, tmp_path, capsys):
    arguments = [
        "train", "--dataset", str(table), "--classes", "2",
        "--epsilon", "3", "--delta", "1e-3", "--epochs", "1",
        "--batch-size", "64", "--audit", "--report", str(tmp_path / "statement"), "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 0
    shown = re.search(r"audit\s+(\d+ attempts, worst ratio ([\d.]+).*)", capsys.readouterr().out)
    assert 0.0 < float(shown[2]) <= 1.0
    assert shown[1] in (tmp_path / "statement.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("form", "shown"), [("off", None), ("quick", "quick form"), ("full", "attempts")])
def test_the_form_of_the_audit_is_chosen(table, capsys, form, shown):
    arguments = [
        "train", "--dataset", str(table), "--classes", "2",
        "--epsilon", "3", "--delta", "1e-3", "--epochs", "1",
        "--batch-size", "64", "--audit", form, "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit")]
    assert len(lines) == (shown is not None)
    assert all(shown in line for line in lines)
    assert form == "quick" or not any("quick" in line for line in lines)


@pytest.mark.parametrize("route", ["gradient_gated", "gated", "spectral", "orthogonal"])
def test_training_on_a_table_prints_accuracy_and_what_was_spent(table, tmp_path, capsys, route):
    checkpoint = tmp_path / "table.pt"
    arguments = [
        "train", "--dataset", str(table), "--classes", "2",
        "--epsilon", "3", "--delta", "1e-3", "--epochs", "4",
        "--batch-size", "64", "--route", route, "--checkpoint", str(checkpoint), "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    epsilon = float(re.search(r"epsilon\s+([\d.]+)", printed)[1])
    assert 2.9 < epsilon <= 3.0
    assert re.search(r"test accuracy\s+[\d.]+ % of 73 held-out samples", printed)
    assert re.search(r"delta\s+0.001", printed)
    assert str(checkpoint) in printed
    assert checkpoint.exists()


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(path, X=generator.integers(256, size=(100, 10, 12), dtype=np.uint8), y=np.arange(100) % 3)
    return path


def test_a_preset_brings_network_and_settings_which_options_change(images, tmp_path, capsys):
    checkpoint, statement = tmp_path / "run.pt", tmp_path / "statement"
    arguments = [
        "train", "--dataset", str(images), "--classes", "3",
        "--epsilon", "3", "--delta", "1e-3", "--preset", "mnist-orthogonal",
        "--epochs", "1", "--batch-size", "40", "--accountant", "rdp", "--checkpoint", str(checkpoint),
        "--report", str(statement),
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "preset mnist-orthogonal" in printed
    assert presets.get("mnist-orthogonal").provenance in printed
    settings = load_checkpoint(checkpoint)["settings"]
    assert settings["steps"] == 3
    assert settings["lr and momentum"] == [(presets.get("mnist-orthogonal").settings["lr"], 0.9)]
    assert "Hyper-parameters, of the preset mnist-orthogonal" in (tmp_path / "statement.md").read_text("utf-8")
    assert main([*arguments, "--route", "gated", "--tau", "3"]) == 2
    assert "--preset mnist-orthogonal decides what --route, --tau would" in capsys.readouterr().err


def test_the_front_end_of_a_preset_stands_before_training_and_test(images, tmp_path, capsys):
    arguments = [
        "train", "--dataset", str(images), "--classes", "3",
        "--epsilon", "3", "--delta", "1e-3", "--preset", "features-linear",
        "--epochs", "1", "--batch-size", "40", "--accountant", "rdp", "--quiet",
        "--cache-dir", str(tmp_path / "features"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "held-out samples" in capsys.readouterr().out
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2


def test_a_preset_for_regression_prints_its_loss_and_takes_no_classes(tmp_path, capsys):
    arguments = ["--epsilon", "3", "--delta", "1e-3", "--preset", "regression", "--epochs", "1", "--accountant", "rdp"]
    inputs = np.random.default_rng(0).normal(size=(100, 4))
    for name, targets in (("one", np.zeros(100, int)), ("three", np.arange(100) % 3)):
        np.savez(tmp_path / f"{name}.npz", X=inputs, y=targets)
    assert main(["train", "--dataset", str(tmp_path / "one.npz"), "--classes", "1", "--quiet", *arguments]) == 0
    assert re.search(r"test loss +[\d.]+ on 24 held-out samples", capsys.readouterr().out)
    assert main(["train", "--dataset", str(tmp_path / "three.npz"), "--classes", "3", "--quiet", *arguments]) == 2
    assert "must have one size" in capsys.readouterr().err


def test_the_preset_for_tables_charges_its_statistics_and_states_where_it_is_from(table, tmp_path, capsys):
    arguments = ["--epsilon", "3", "--delta", "1e-3", "--preset", "tables", "--epochs", "1", "--accountant", "rdp"]
    assert main(["train", "--dataset", str(table), *arguments, "--report", str(tmp_path / "statement")]) == 0
    printed = capsys.readouterr().out
    assert float(re.search(r"test AUROC +([\d.]+) % on 73 held-out samples", printed)[1]) > 60  # Chance is 50 %.
    facts = json.loads((tmp_path / "statement.json").read_text("utf-8"))
    assert facts["steps"]["entries"][0]["event"] == "gaussian_release"
    assert any("eight public tables" in note for note in facts["notes"])
    assert main(["train", "--dataset", "digits", "--quiet", *arguments]) == 2
    assert "rows (N, columns)" in capsys.readouterr().err


def test_the_area_under_the_curve_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randint(5, (40,), generator=generator), torch.randint(2, (40,), generator=generator)
    above, below = scores[labels == 1].double(), scores[labels == 0].double()
    pairs = (above[:, None] > below).double() + 0.5 * (above[:, None] == below)
    assert auroc(scores.float(), labels) == pytest.approx(float(pairs.mean()))


def test_options_of_training_reach_it(images, tmp_path, capsys):
    checkpoint = tmp_path / "run.pt"
    arguments = [
        "train", "--dataset", str(images), "--classes", "3",
        "--epsilon", "3", "--delta", "1e-3", "--epochs", "1", "--batch-size", "40",
        "--accountant", "rdp", "--optimizer", "adam", "--lr", "0.01", "--lr-schedule", "constant", "--quiet",
        "--noise-schedule", "1.5:0.75", "--ema", "0.9", "--augment", "1", "--flip", "--multiplicity", "2",
        "--checkpoint", str(checkpoint), "--report", str(tmp_path / "statement"),
    ]  # fmt: skip
    assert main(arguments) == 0
    settings = load_checkpoint(checkpoint)["settings"]
    assert (settings["optimizer"], settings["ema"], settings["multiplicity"]) == ("Adam", 0.9, 2)
    assert settings["augment"] == "ShiftAndFlip"
    factors = [factor for factor, _ in settings["noise_schedule"]]
    assert (factors[0], factors[-1]) == pytest.approx((1.5, 0.75))
    facts = json.loads((tmp_path / "statement.json").read_text("utf-8"))
    assert facts["learning_rates"] == [{"rates": [0.01], "count": 3}]
    # σ of each step follows the factors; their shared multiple is calibrated.
    noise = [entry["noise_multiplier"] for entry in facts["steps"]["entries"]]
    assert noise[0] / noise[-1] == pytest.approx(2.0)


def test_a_noise_schedule_that_is_none_is_refused(table, capsys):
    arguments = [
        "train", "--dataset", str(table), "--classes", "2", "--epsilon", "3", "--delta", "1e-3", "--noise-schedule"
    ]  # fmt: skip
    for bad, message in (("1.5", "FIRST:LAST"), ("x:y", "FIRST:LAST")):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, bad])
        assert message in capsys.readouterr().err
    assert main([*arguments, "1:0"]) == 2
    assert "last factor of noise_stages must be a finite and positive" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["residual-mlp", "lipvgg"])
def test_an_architecture_trains_from_the_command_line(network, images, capsys):
    arguments = [
        "train", "--dataset", str(images), "--classes", "3",
        "--epsilon", "3", "--delta", "1e-3", "--epochs", "1", "--batch-size", "40",
        "--network", network, "--accountant", "rdp",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"parameters, Δ = [\d.]+ \(.*\), Lipschitz constant", printed)
    assert "test accuracy" in printed


@pytest.mark.slow
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
        (["--dataset", "digits", "--device", "nonsense"], "--device nonsense"),
        (["--dataset", "digits", "--device", "meta"], "--device meta"),
    ],
)
def test_refusals_go_to_standard_error_with_status_2(capsys, arguments, message):
    assert main(["train", "--epsilon", "3", "--delta", "1e-4", "--quiet", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_architecture_for_images_refuses_a_table(table, capsys):
    arguments = ["--dataset", str(table), "--classes", "2", "--network", "mixer"]
    assert main(["train", "--epsilon", "3", "--delta", "1e-4", *arguments]) == 2
    assert "input_shape must be (channels, height, width), got (5,)" in capsys.readouterr().err


def test_an_npz_file_with_its_own_split_is_taken_as_it_is(tmp_path):
    images = np.arange(4 * 4, dtype=np.uint8).reshape(1, 4, 4).repeat(3, 0)
    np.savez(tmp_path / "i.npz", x_train=images, y_train=[0, 1, 2], x_test=images[:1], y_test=[0])
    data = load_dataset(str(tmp_path / "i.npz"), classes=3)
    assert data.inputs.shape == (3, 1, 4, 4)
    assert float(data.inputs.max()) == pytest.approx(15 / 255)
    assert data.classes == 3


def rows_of(data):
    return {(row.tobytes(), int(target)) for row, target in zip(data.inputs.numpy(), data.targets, strict=True)}


def test_a_row_more_in_a_file_is_a_training_row_more_at_most(tmp_path):
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(301, 3)), generator.integers(0, 2, 301)
    splits = []
    for rows in (300, 301):
        np.savez(tmp_path / "rows.npz", X=inputs[:rows], y=targets[:rows])
        splits.append(load_dataset(str(tmp_path / "rows.npz"), classes=2))
    few, many = map(rows_of, splits)
    assert few <= many
    assert len(many - few) <= 1
    # A fifth of 300, within six standard deviations of 6.9.
    assert abs(len(splits[0].test_targets) - 60) < 42


def test_the_number_of_classes_of_a_file_is_not_read_from_its_rows(tmp_path, capsys):
    path = tmp_path / "rows.npz"
    np.savez(path, X=np.random.default_rng(0).normal(size=(50, 3)), y=np.arange(50) % 3)
    assert load_dataset(str(path), classes=7).classes == 7
    with pytest.raises(ConfigurationError, match="how many classes"):
        load_dataset(str(path))
    with pytest.raises(ConfigurationError, match="below 2"):
        load_dataset(str(path), classes=2)
    with pytest.raises(ConfigurationError, match="digits has 10 classes"):
        load_dataset("digits", classes=2)
    assert main(["train", "--dataset", str(path), "--epsilon", "3", "--delta", "1e-3", "--quiet"]) == 2
    assert "--classes" in capsys.readouterr().err


def test_a_public_size_of_a_file_fixes_the_sample_rate(table, capsys):
    arguments = [
        "train", "--dataset", str(table), "--classes", "2", "--dataset-size", "256", "--batch-size", "64",
        "--epochs", "1", "--epsilon", "3", "--delta", "1e-3", "--accountant", "rdp", "--audit", "off", "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "4 Poisson steps, q = 0.25" in capsys.readouterr().out


def test_an_npz_file_without_the_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "i.npz", data=[1])
    with pytest.raises(ConfigurationError, match="no array 'X'"):
        load_dataset(str(tmp_path / "i.npz"), classes=2)
    np.savez(tmp_path / "j.npz", X=np.zeros((5, 2)), y=np.linspace(0, 1, 5))
    with pytest.raises(ConfigurationError, match="class indices"):
        load_dataset(str(tmp_path / "j.npz"), classes=2)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_the_image_classifier_takes_the_sizes_it_names(shape):
    assert image_classifier(shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


def test_help_names_no_default_that_is_none(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "None" not in printed
    assert "(default: 8.0)" in printed


def test_a_run_goes_on_from_its_checkpoint_after_an_interrupt(table, tmp_path, capsys):
    checkpoint = tmp_path / "run.pt"

    def interrupting(run):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    arguments = ["train", "--dataset", str(table), "--epsilon", "3", "--delta", "1e-3", "--epochs", "2"]
    arguments += ["--classes", "2", "--dataset-size", "320"]
    arguments += ["--batch-size", "64", "--quiet"]
    with before_steps(interrupting):
        assert main(arguments) == 130
        assert "nothing was saved" in capsys.readouterr().err
        assert main([*arguments, "--checkpoint", str(checkpoint)]) == 130
        assert "goes on from the checkpoint" in capsys.readouterr().err
    assert main([*arguments, "--checkpoint", str(checkpoint)]) == 0
    ledger = load_checkpoint(checkpoint)["optimizer"]["clipless_dp"]
    assert ledger["steps_taken"] == 10
    runs = Ledger.from_state_dict(ledger["accountant"]["ledger"]).runs
    trained = [count for run, count in runs.items() if not run.startswith("release")]
    assert len(trained) == 2, "two processes' optimizers share the ledger"
    assert sum(trained) == 10
    assert len(runs) - len(trained) == 2, "the statistics are paid for once"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros(10), "y": np.zeros(10, int)}, "shapes"),
        ({"X": np.zeros((10, 4)), "y": np.zeros((10, 1), int)}, "shapes"),
        ({"X": np.zeros((10, 4)), "y": np.int64(3)}, "shapes"),
        ({"X": np.zeros((3, 4)), "y": np.zeros(3, int)}, "for testing"),
        ({"X": np.zeros((10, 4)), "y": np.arange(10) - 1}, "from -1"),
        ({"X": np.full((10, 4), "a"), "y": np.zeros(10, int)}, "numbers"),
        ({"X": np.arange(160.0).reshape(10, 4, 4), "y": np.zeros(10, int)}, "uint8"),
        (
            {
                "x_train": np.zeros((9, 4)),
                "y_train": np.zeros(9, int),
                "x_test": np.zeros((9, 4)),
                "y_test": np.ones(9),
            },
            "class indices",
        ),
        (
            {"x_train": np.zeros((9, 4)), "y_train": np.zeros(9, int), "x_test": np.zeros((1, 3)), "y_test": [0]},
            "differ in shape",
        ),
    ],
    ids=[
        "vector",
        "column",
        "scalar",
        "no test data",
        "negative",
        "text",
        "floats as images",
        "test labels",
        "columns",
    ],
)
def test_arrays_that_are_no_classification_data_are_refused_in_words(tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    arguments = ["train", "--dataset", str(tmp_path / "data.npz"), "--epsilon", "3", "--delta", "1e-3", "--quiet"]
    assert main([*arguments, "--classes", "1", "--batch-size", "2"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"text", None, "npy"], ids=["empty", "foreign", "truncated", "npy"])
def test_a_file_that_is_no_npz_archive_is_refused_by_name(tmp_path, content):
    path = tmp_path / "data.npz"
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        np.savez(path, X=np.zeros((10, 4)), y=np.zeros(10, int))
        path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    with pytest.raises(ConfigurationError, match=r"cannot read .*data\.npz"):
        load_dataset(str(path), classes=2)
