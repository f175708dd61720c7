"""Tables, presets, search, audits and the command line speak of people where they are given whose rows are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from accounting import create_accountant
from clipless_dp import ConfigurationError, InputError, audit, fit, presets, report
from clipless_dp.cli import main
from clipless_dp.datasets import load_dataset
from clipless_dp.search import Candidate, private_search
from clipless_dp.tables import fit_table
from tests.people.test_drawing import IDS, PEOPLE, ROWS
from tests.support import gated_model, samples

TERMS: dict[str, Any] = {
    "epsilon": 8.0,
    "delta": 1e-3,
    "epochs": 1,
    "batch_size": 12,
    "progress": False,
    "audit": False,
}


def test_a_table_of_people_is_charged_about_people() -> None:
    inputs, targets = samples(ROWS)
    found = fit_table(
        inputs, (targets > 0).long(), epsilon=8.0, delta=1e-3, groups=IDS, cosines=8, epochs=2, progress=False
    )
    assert found.result.optimizer.accountant.ledger.units == {"person"}
    assert found.result.optimizer.dataset_size == PEOPLE
    assert float(found.result.epsilon) <= 8.0


def test_a_preset_with_statistics_is_charged_about_people() -> None:
    inputs, targets = samples(ROWS)
    trained = presets.get("transfer").fit(
        (inputs, targets), outputs=3, epsilon=8.0, delta=1e-3, epochs=1, groups=IDS, progress=False
    )
    ledger = trained.result.optimizer.accountant.ledger
    assert ledger.units == {"person"}
    assert {event.kind for event, _ in ledger} >= {"gaussian_release"}


@pytest.mark.parametrize("compared", [{"validation": samples(20)}, {"score_noise_multiplier": 5.0}], ids=[*"vn"])
def test_a_search_is_about_people(compared: dict[str, Any]) -> None:
    candidate = Candidate(gated_model, {"epochs": 1, "batch_size": 12, "lr": 0.5})
    accountant = create_accountant("rdp")
    settings: dict[str, Any] = {"epsilon": 20.0, "delta": 1e-2, "mean_runs": 1.0, "groups": IDS}
    found = private_search([candidate], samples(ROWS), accountant=accountant, **compared, **settings)
    assert found.accountant.ledger.units == {"person"}
    assert found.epsilon <= 20.0


def test_the_statement_says_that_people_are_protected() -> None:
    result = fit(gated_model(), samples(ROWS), groups=IDS, **TERMS)
    statement = report(result.optimizer)
    assert "The unit of privacy is one person" in str(statement)
    assert "24 people, taken to be public" in str(statement)
    assert "most that one person can change" in str(statement)
    assert {entry["unit"] for entry in statement.facts["steps"]["entries"]} == {"person"}
    of_rows = str(report(fit(gated_model(), samples(ROWS), **TERMS).optimizer))
    assert "one person" not in of_rows


def test_canaries_are_people() -> None:
    def train(model: Any, data: Any, ids: Any = None) -> Any:
        return fit(model, data, groups=ids, **{**TERMS, "delta": 1e-3})

    found = audit.canaries(train, gated_model(), samples(ROWS), delta=1e-3, canaries=40, confidence=0.999, groups=IDS)
    assert found.passed
    assert found.trained.optimizer.dataset_size == PEOPLE + 40
    with pytest.raises(InputError, match="120 ids"):
        audit.canaries(
            lambda model, data: train(model, data, IDS), gated_model(), samples(ROWS), delta=1e-3, canaries=40
        )
    with pytest.raises(ConfigurationError, match="give groups="):
        audit.canaries(
            lambda model, data: train(model, data, np.arange(len(data[0])) // 2),
            gated_model(), samples(ROWS), delta=1e-3, canaries=40,
        )  # fmt: skip


@pytest.fixture
def file(tmp_path: Any) -> str:
    inputs, targets = samples(ROWS)
    path = tmp_path / "rows.npz"
    np.savez(path, X=inputs.numpy(), y=targets.numpy(), who=np.array([f"u{one}" for one in IDS]))
    return str(path)


def test_the_command_line_takes_an_array_of_ids(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--dataset", file, "--classes", "3", "--epsilon", "8", "--delta", "1e-3", "--epochs", "1"]
    assert main([*command, "--batch-size", "8", "--groups", "who", "--quiet", "--audit", "off"]) == 0
    assert "add-or-remove-one person" in capsys.readouterr().out
    assert main([*command, "--groups", "whose", "--quiet"]) == 2
    assert "no array 'whose'" in capsys.readouterr().err
    assert main([*command, "--rows-per-group", "3", "--quiet"]) == 2
    assert "about groups" in capsys.readouterr().err


def test_what_is_held_out_of_a_file_are_whole_people(file: str) -> None:
    split = load_dataset(file, classes=3, groups="who")
    assert split.groups is not None
    assert len(split.groups) == len(split.inputs)
    held_out = ~np.isin([f"u{one}" for one in IDS], split.groups)
    assert int(held_out.sum()) == len(split.test_inputs) > 0
