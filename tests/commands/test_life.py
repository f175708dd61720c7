"""One life of a model for each kind of file: plan, train, evaluate, predict, certify, audit, report, export."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import clipless_dp
from clipless_dp.bounds import SensitivityTracker
from clipless_dp.cli import main
from clipless_dp.commands.columns import read_columns
from clipless_dp.commands.held_out import file_beside
from clipless_dp.statement import PrivacyStatement

from .conftest import READ

PRIVACY = ["--epsilon", "8", "--delta", "1e-3", "--accountant", "rdp", "--audit", "off", "--quiet"]


def told(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(table, folder, arrays, tmp_path_factory):
    """A model of each kind of file, trained for a few steps."""
    root = tmp_path_factory.mktemp("trained")
    asked = {
        "table": ["--data", table, *READ, "--epochs", 20],
        "folder": ["--data", folder, "--epochs", 8],
        "arrays": ["--data", arrays, "--route", "orthogonal", "--network", "mlp", "--epochs", 8, "--batch-size", 60],
    }
    for name, arguments in asked.items():
        assert main(["train", *map(str, arguments), *PRIVACY, "--out", str(root / f"{name}.pt")]) == 0
    return {name: (root / f"{name}.pt", arguments[1]) for name, arguments in asked.items()}


def test_a_plan_says_the_route_the_settings_and_the_command_and_trains_nothing(table, folder, arrays, capsys):
    printed = told(capsys, "plan", "--data", table, *READ, "--epsilon", "1")
    assert "240 rows of shape (5,), ε = 1 at δ = 0.001" in printed
    assert "preset tables" in printed
    again = re.search(r"python -m clipless_dp train (.*)", printed)[1]
    assert "--labels no yes" in again
    assert "--categories colour=red,blue" in again
    assert "preset features-linear" in told(capsys, "plan", "--data", folder, "--epsilon", "1")
    printed = told(capsys, "plan", "--data", arrays, "--route", "gated", "--epsilon", "1", "--rows", "60000")
    assert re.search(r"lr +[\d.]+ +0.6/√T behind signal gates", printed)
    printed = told(capsys, "plan", "--rows", "50000", "--shape", "3", "32", "32", "--epsilon", "8", "--minutes", "0.01")
    assert "rows fit the time" in printed


def test_settings_of_a_plan_are_the_same_whatever_the_cells_are(table, tmp_path, capsys):
    other = tmp_path / table.name
    lines = table.read_text().splitlines()
    other.write_text("\n".join([lines[0], *(["7,blue,-1e9,no"] * (len(lines) - 1))]) + "\n")
    first = told(capsys, "plan", "--data", table, *READ, "--epsilon", "1")
    second = told(capsys, "plan", "--data", other, *READ, "--epsilon", "1")
    assert first.replace(str(table), "") == second.replace(str(other), "")


@pytest.mark.parametrize("kind", ["table", "folder", "arrays"])
def test_what_was_trained_is_evaluated_and_says_what_it_was_evaluated_on(trained, kind, tmp_path, capsys):
    result, data = trained[kind]
    printed = told(capsys, "evaluate", result, "--data", data, "--held-out", "--out", tmp_path / "figures.json")
    assert file_beside(result).exists()
    count = re.search(r"accuracy  [\d.]+ % of (\d+) held-out samples", printed)[1]
    assert "no ε covers" in printed
    facts = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert facts["rows"] == int(count)
    assert sum(one["rows"] for one in facts["classes"]) == int(count)
    total = {"table": 300, "folder": 140, "arrays": 300}[kind]
    printed = told(capsys, "evaluate", result, "--data", data)
    # Chance is 50 %, within three standard deviations.
    assert float(re.search(rf"accuracy  ([\d.]+) % of all {total} samples", printed)[1]) > 50 + 150 / np.sqrt(total)


def test_predictions_of_a_table_are_those_of_its_file_in_python(trained, table, tmp_path, capsys):
    result, _ = trained["table"]
    out = tmp_path / "predictions.csv"
    told(capsys, "predict", result, "--data", table, "--out", out)
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert [line["row"] for line in lines] == [str(index) for index in range(300)]
    predictor = clipless_dp.load(result)
    frame = read_columns(table).frame(predictor.encode)
    assert [line["prediction"] for line in lines] == predictor.predict(frame)
    shares = torch.tensor([[float(line["p(no)"]), float(line["p(yes)"])] for line in lines])
    torch.testing.assert_close(shares, predictor.predict_proba(frame), rtol=1e-4, atol=1e-5)
    assert told(capsys, "predict", result, "--data", table, "--threshold", "1").count(",yes,") == 0


def test_a_table_without_its_label_and_a_folder_without_classes_are_predicted(trained, table, folder, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    with table.open() as file, rows.open("w") as out:
        out.writelines(line.rpartition(",")[0] + "\n" for line in file)
    assert told(capsys, "predict", trained["table"][0], "--data", rows).count("\n") == 301
    printed = told(capsys, "predict", trained["folder"][0], "--data", folder / "left")
    assert printed.splitlines()[1].startswith("0.png,left,")


def test_certificates_are_by_the_constant_or_by_noise(trained, capsys, tmp_path):
    result, data = trained["arrays"]
    arguments = ["certify", result, "--data", data, "--attacks", "none", "--samples", "20"]
    printed = told(capsys, *arguments, "--out", tmp_path / "certificate.json")
    assert re.search(r"Lipschitz +[\d.]+ \(certified", printed)
    assert "held-out samples" in json.loads((tmp_path / "certificate.json").read_text("utf-8"))["data"]
    for kind in ("table", "folder"):
        result, data = trained[kind]
        arguments = ["certify", result, "--data", data, "--samples", "5"]
        assert main([*map(str, arguments)]) == 2
        assert "--sigma" in capsys.readouterr().err
        printed = told(capsys, *arguments, "--sigma", "0.2", "--draws", "50")
        assert "smoothing      σ = 0.2, 50 draws" in printed
        assert "Lipschitz" not in printed


def test_maps_are_of_networks_that_read_samples_as_they_are(trained, capsys):
    result, data = trained["arrays"]
    assert "tightness" in told(capsys, "explain", result, "--data", data, "--samples", "2", "--measured", "0")
    for kind, message in (("table", "is of a table"), ("folder", "reads features")):
        assert main(["explain", *map(str, trained[kind][:1]), "--data", str(trained[kind][1])]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["table", "folder", "arrays"])
def test_bounds_of_what_was_trained_withstand_an_audit(trained, kind, capsys):
    printed = told(capsys, "audit", trained[kind][0], "--attempts", "20")
    assert 0.0 < float(re.search(r"worst ratio ([\d.]+)", printed)[1]) <= 1.0


def test_an_audit_that_finds_something_has_a_status_of_its_own(trained, capsys, monkeypatch):
    true = SensitivityTracker.evaluate

    def too_small(self, *arguments, **named):
        found, reads = true(self, *arguments, **named)
        return replace(found, per_parameter={name: 0.1 * bound for name, bound in found.per_parameter.items()}), reads

    monkeypatch.setattr(SensitivityTracker, "evaluate", too_small)
    assert main(["audit", str(trained["arrays"][0]), "--attempts", "20"]) == 1
    assert "error:" in capsys.readouterr().err


def test_the_statement_says_who_states_it_in_all_forms(trained, tmp_path, capsys):
    about = ["--organisation", "Clinic <A>", "--purpose", "triage", "--data-set", "visits", "--contact", "dpo@clinic"]
    told(capsys, "report", trained["table"][0], "--out", tmp_path / "statement", *about)
    facts = json.loads((tmp_path / "statement.json").read_text("utf-8"))
    assert facts["about"]["organisation"] == "Clinic <A>"
    assert "Clinic &lt;A&gt;" in (tmp_path / "statement.html").read_text("utf-8")
    assert (tmp_path / "statement.md").read_text("utf-8").index("triage") < 1000
    assert any("eight public tables" in note for note in facts["notes"])
    # Again from the statement itself: what is not said stays.
    printed = told(capsys, "report", tmp_path / "statement.json", "--purpose", "research")
    assert "research" in printed
    assert "dpo@clinic" in printed
    assert PrivacyStatement.read(tmp_path / "statement.json").facts == facts


@pytest.mark.parametrize("kind", ["table", pytest.param("folder", marks=pytest.mark.slow), "arrays"])
def test_an_exported_program_says_what_the_model_says_of_any_number_of_rows(trained, kind, tmp_path, capsys):
    result, _ = trained[kind]
    told(capsys, "export", result, "--out", tmp_path / "model", "--formats", "pt2")
    facts = json.loads((tmp_path / "model.json").read_text("utf-8"))
    predictor = clipless_dp.load(result, net=_net(kind, result))
    shape, dtype = facts["input"]["shape"][1:], getattr(torch, facts["input"]["dtype"])
    rows = 3.0 * torch.randn(7, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    scores = torch.export.load(tmp_path / "model.pt2").module()(rows)
    with torch.no_grad():
        torch.testing.assert_close(scores, predictor.net(rows).float(), rtol=1e-4, atol=1e-5)
    assert facts["classes"] == {"table": ["no", "yes"], "folder": ["left", "right"], "arrays": [0, 1]}[kind]
    assert facts["privacy"]["epsilon"] == pytest.approx(predictor.epsilon)


def _net(kind, result):
    if kind != "arrays":
        return None
    from clipless_dp.commands.results import opened

    return opened(result).model


def test_presets_are_listed_with_what_they_need_and_each_tells_where_it_is_from(capsys):
    printed = told(capsys, "presets")
    for name in (*clipless_dp.presets.PRESETS, "tables"):
        assert re.search(rf"^{name} +[^–\s]", printed, re.MULTILINE), name
    assert clipless_dp.presets.get("transfer").provenance in told(capsys, "presets", "transfer")
