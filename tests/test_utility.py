"""The comparison of accuracies: what is done is kept, and a clipped run spends what it was told."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "utility.py"


@pytest.fixture
def utility(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_of_utility", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up annotations.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def options(**changes):
    settings = {"data_dir": None, "cache_dir": None, "share": 1.0, "validate": False, "seeds": [0, 1]}
    return argparse.Namespace(**{**settings, "epsilons": [1.0, 8.0], **changes})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    out = tmp_path / "utility.json"

    def compare(*methods):
        arguments = ["--data", "digits", "--epsilons", "3", "--seeds", "0", "--share", "0.05", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--methods", *methods])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads(out.read_text("utf-8"))["runs"]

    (first,) = compare("gradient gates")
    runs = compare("gradient gates", "DP-SGD (Opacus)")
    assert len(runs) == 2
    assert first in runs, "what is there is not run again"
    clipped = next(run for run in runs if run != first)
    # Calibrated to 0.01 %, on one ledger of as many steps.
    assert (clipped["steps"], clipped["noise_multiplier"]) == (first["steps"], first["noise_multiplier"])
    assert 2.9 < clipped["spent"] <= 3.0
    table = out.with_suffix(".md").read_text("utf-8")
    assert "| DP-SGD (Opacus) |" in table
    assert "| gradient gates |" in table
    assert f"{100 * first['accuracy']:.2f} (1)" in table
    assert "gradient gates" in capsys.readouterr().out


def test_a_grid_is_chosen_from_at_each_epsilon_on_held_out_training_rows_only(utility, tmp_path, monkeypatch):
    out = tmp_path / "utility.json"
    bench = utility.Bench("digits", options(), out)
    data = utility.load_dataset("digits", None)
    whole = {tuple(row) for row in data.inputs.flatten(1).tolist()}
    tests = []

    def train(contender, parts, outputs, *, epsilon, delta, seed, share):
        (inputs, _), (held_out, _) = parts
        on_test = torch.equal(held_out, data.test_inputs)
        if on_test:
            tests.append((epsilon, contender.norm, contender.lr))
            assert len(inputs) == len(data.inputs)
        else:
            assert {tuple(row) for row in held_out.flatten(1).tolist()} <= whole
            assert len(inputs) + len(held_out) == len(data.inputs)
        favourite = (contender.norm, round(contender.lr, 6)) == ((0.1, 0.6) if epsilon == 1.0 else (1.0, 0.12))
        return {"accuracy": float(favourite != on_test), "epochs": 1, "seconds": 1.0}

    monkeypatch.setattr(utility, "train", train)
    method = utility.OPACUS + utility.CHOSEN
    chosen = utility.comparison("digits").contenders[method]
    bench.compare(method, chosen)
    assert [(epsilon, norm, round(lr, 6)) for epsilon, norm, lr in tests] == 2 * [(1.0, 0.1, 0.6), (8.0, 1.0, 0.12)]
    runs = utility.read(out)
    assert [run["split"] for run in runs].count("validation") == 2 * len(chosen.grid)
    shown = utility.markdown(runs)
    assert f"| {method} | 0.00 ± 0.00 (2) | 0.00 ± 0.00 (2) |" in shown
    assert {(run.get("norm"), run.get("lr")) for run in runs if run["split"] == "test"} == {(0.1, 0.6), (1.0, 0.12)}
    assert "norm" not in shown.partition("## digits")[2], "what was tried is in the JSON file only"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_defaults_are_a_fit_with_no_other_setting_than_the_budget(utility, tmp_path, monkeypatch):
    asked = []

    def fit(model, dataset, **arguments):
        asked.append(arguments)
        return argparse.Namespace(steps=50, noise_multiplier=1.0, epsilon=2.9, sample_rate=0.2)

    monkeypatch.setattr(utility, "fit", fit)
    bench = utility.Bench("digits", options(seeds=[5], epsilons=[3.0], share=0.01), tmp_path / "utility.json")
    bench.compare(utility.DEFAULTS, utility.comparison("digits").contenders[utility.DEFAULTS])
    assert asked == [{"epsilon": 3.0, "delta": 1e-4, "reproducible_seed": 5, "progress": False}]
    (run,) = utility.read(tmp_path / "utility.json")
    assert (run["epochs"], run["spent"]) == (10.0, 2.9)


def test_results_of_the_other_script_are_runs_of_the_route_whose_preset_they_had(utility, tmp_path):
    path = utility.RESULTS / "cifar10-photographs-linear.json"
    runs = utility.taken(path)
    kept = json.loads(path.read_text("utf-8"))
    assert [run["accuracy"] for run in runs] == [run["accuracy"] for run in kept["runs"]]
    assert {(run["data"], run["method"], run["split"]) for run in runs} == {("cifar10", "whitened features", "test")}
    out = tmp_path / "utility.json"
    utility.put(out, runs)
    utility.put(out, runs)
    assert len(utility.read(out)) == len(runs), "taken twice, there once"
    assert "| whitened features |" in utility.markdown(utility.read(out))


def test_routes_are_chosen_for_as_opacus_is_and_another_choice_is_another_run(utility, tmp_path, monkeypatch):
    out = tmp_path / "utility.json"
    bench = utility.Bench("digits", options(epsilons=[3.0]), out)
    favourite = 0.1

    def train(contender, parts, outputs, **asked):
        return {"accuracy": float(contender.settings["lr"] == favourite), "epochs": 1, "seconds": 1.0}

    monkeypatch.setattr(utility, "train", train)
    for method, contender in utility.comparison("digits").contenders.items():
        if method != "gradient gates" + utility.CHOSEN:
            continue
        bench.compare(method, contender)
        assert {run["lr"] for run in utility.read(out) if run["split"] == "test"} == {favourite}
        less = utility.Chosen(contender.preset, tuple(one for one in contender.grid if one[1] != favourite))
        bench.compare(method, less)
        tests = [run for run in utility.read(out) if run["split"] == "test"]
        assert len(tests) == 2
        assert favourite not in {run["lr"] for run in tests}
