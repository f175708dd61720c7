"""A ledger is about rows or about people, whichever road a release takes into it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

from accounting import GaussianRelease, Ledger, MixedUnitsError, Provenance, calibrate_steps, create_accountant
from accounting.cli import main
from clipless_dp import ConfigurationError, report, statistics
from tests.people.test_drawing import PEOPLE, ROWS, a_draw, accumulated, optimizer
from tests.support import samples

PERSON = Provenance("a run", unit="person")


def mixed() -> Ledger:
    """As an earlier version may have written one."""
    state = {"people": about("person").state_dict(), "rows": about("").state_dict()}
    return Ledger.from_state_dict(
        {**state["rows"], "entries": [*state["rows"]["entries"], *state["people"]["entries"]]}
    )


def about(unit: Any, count: int = 1) -> Ledger:
    ledger = Ledger()
    ledger.append(GaussianRelease(2.0), count, Provenance(unit=unit))
    return ledger


@pytest.mark.parametrize("unit", ["", "person"])
@pytest.mark.parametrize("before", [1, 200])
def test_one_ledger_takes_no_events_of_two_units(unit: Any, before: int) -> None:
    ledger = Ledger()
    other: Any = {"": "person", "person": ""}[unit]
    for place in range(before):
        ledger.append(GaussianRelease(1.0 + place), 1, Provenance(unit=unit))
    kept = ledger.copy()
    with pytest.raises(MixedUnitsError, match=r"about\("):
        ledger.append(GaussianRelease(1.0), 1, Provenance(unit=other))
    assert ledger == kept
    ledger.append(GaussianRelease(1.0), 0, Provenance(unit=other))
    ledger.append(GaussianRelease(1.0), 1, Provenance(unit=unit))
    assert len(ledger) == before + 1


def test_a_shared_accountant_that_was_filled_later_is_refused_at_the_step() -> None:
    accountant = create_accountant("prv")
    own = optimizer(accountant=accountant)
    _, targets = samples(ROWS)
    statistics.private_fraction(targets > 0, noise_multiplier=1.0, accountant=accountant, dataset_size=ROWS)
    with pytest.raises(ConfigurationError, match="about rows"):
        accumulated(own, a_draw())
    assert len(accountant) == 1


def test_a_record_by_hand_says_what_it_is_about() -> None:
    own = optimizer()
    accumulated(own, a_draw())
    with pytest.raises(MixedUnitsError, match="about people"):
        own.accountant.record(GaussianRelease(2.0))
    with pytest.raises(MixedUnitsError, match="about people"):
        own.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    own.accountant.record(GaussianRelease(2.0), provenance=Provenance(unit="person"))
    assert len(own.accountant) == 2


def test_the_unit_of_an_optimizer_stays() -> None:
    own = optimizer()
    with pytest.raises(AttributeError):
        own.unit = "row"  # type: ignore[misc]
    assert own.unit == "person"


def test_a_ledger_that_is_mixed_already_has_no_epsilon_and_is_a_finding() -> None:
    own = optimizer()
    accumulated(own, a_draw())
    own.accountant.ledger = mixed()
    with pytest.raises(MixedUnitsError, match="some lines"):
        own.get_epsilon(1e-3)
    with pytest.raises(MixedUnitsError, match="some lines"):
        own.accountant.get_delta(1.0)
    assert any("1 of 2 entries of the ledger are about rows" in line for line in report(own).findings)
    for formed in (mixed().copy(), copy.deepcopy(mixed()), pickle.loads(pickle.dumps(mixed())), mixed().scaled(2.0)):
        assert formed.units == {"", "person"}
    own.accountant.ledger = about("person")
    assert not any("entries of the ledger are about" in line for line in report(own).findings)


def test_a_ledger_without_units_is_about_rows() -> None:
    entry = {"event": {"kind": "gaussian_release", "noise_multiplier": 2.0}, "count": 3}
    state = {**about("").state_dict(), "entries": [entry]}
    accountant = create_accountant("prv")
    accountant.ledger = Ledger.from_state_dict(state)
    assert accountant.get_epsilon(1e-3) > 0.0
    accountant.record(GaussianRelease(2.0))
    assert accountant.ledger.units == {""}


def test_a_scaled_ledger_is_about_what_it_was() -> None:
    assert about("person", 2).scaled(2.0).units == {"person"}
    assert about("", 2).scaled(2.0).units == {""}


def test_budgets_and_plans_count_on_top_of_what_people_have_spent() -> None:
    spent = create_accountant("prv")
    spent.ledger = about("person")
    assert calibrate_steps(
        target_epsilon=8.0, delta=1e-3, noise_multiplier=1.0, sample_rate=0.1, spent=spent
    ) > 1  # fmt: skip
    own = optimizer(accountant=spent, budget=(50.0, 1e-3), dataset_size=PEOPLE)
    accumulated(own, a_draw())
    assert own.allows(3)
    assert len(spent) == 2


def test_steps_of_people_do_not_pass_for_steps_of_rows_on_the_road_through_opacus() -> None:
    accountant = create_accountant("prv")
    accountant.step(noise_multiplier=1.0, sample_rate=0.1, steps=10, provenance=PERSON)
    for road in (accountant.to_opacus, lambda: accountant.history, accountant.ledger.history):
        with pytest.raises(MixedUnitsError, match="about people"):
            road()
    assert accountant.ledger.history("person") == [(1.0, 0.1, 10)]
    again = create_accountant("prv")
    again.load_state_dict(accountant.state_dict())
    assert again.ledger.units == {"person"}
    rows = create_accountant("prv")
    rows.step(noise_multiplier=1.0, sample_rate=0.1, steps=10)
    assert rows.to_opacus()["history"] == rows.history == [(1.0, 0.1, 10)]
    with pytest.raises(MixedUnitsError, match="not about people"):
        rows.ledger.history("person")


def test_attributing_lines_does_not_turn_rows_into_people() -> None:
    rows = about("")
    with pytest.raises(MixedUnitsError, match="about rows"):
        rows.attributed(PERSON)
    assert rows.attributed(Provenance("a run")).units == {""}
    assert about("person").attributed(PERSON).units == {"person"}
    assert Ledger().attributed(PERSON).units == set()


@pytest.mark.parametrize(
    ("unit", "size", "words"),
    [
        ("", 1, "a person with one row"),
        ("", 3, "a person with up to 3 rows"),
        ("person", 1, "a person"),
        ("person", 3, "3 people together"),
    ],
)
def test_a_group_is_of_rows_or_of_people_as_the_ledger_is(
    unit: Any, size: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accountant = create_accountant("prv")
    accountant.step(noise_multiplier=5.0, sample_rate=0.1, steps=3, provenance=Provenance("a run", unit=unit))
    bound = accountant.get_epsilon(1e-5, group_size=size)
    assert (bound.whom, pickle.loads(pickle.dumps(bound)).whom) == (words, words)
    assert accountant.get_delta(1.0, group_size=size).whom == words
    assert accountant.line_for_a_person(1e-5, rows=size).startswith(f"for {words}: ε = ")
    accountant.ledger.save(tmp_path / "ledger.json")
    assert main(["explain", str(tmp_path / "ledger.json"), "--delta", "1e-5", "--group-size", str(size)]) == 0
    assert (f"for {words}: epsilon" in capsys.readouterr().out) is (size > 1)
