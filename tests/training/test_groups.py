"""Arguments of ``fit`` are in four groups, from which all that pass them on take their names."""

from __future__ import annotations

import inspect
import math
from dataclasses import MISSING, fields
from typing import Any

import pytest

from accounting import create_accountant
from clipless_dp import ConfigurationError, fit, presets, search, tables
from clipless_dp.training import Execution, Keeping, Learning, Plan, Privacy
from clipless_dp.training.groups import Asked, names
from clipless_dp.training.plan import epochs_of
from tests.support import gated_model, samples

GROUPS = (Privacy, Learning, Execution, Keeping)


def test_each_argument_of_fit_is_in_one_group_with_the_same_type_and_default() -> None:
    grouped = {field.name: field for group in GROUPS for field in fields(group)}
    assert len(grouped) == sum(len(fields(group)) for group in GROUPS) == len(names())
    model, dataset, *arguments = inspect.signature(fit).parameters.values()
    assert (model.name, dataset.name) == ("model", "dataset")
    assert {argument.name for argument in arguments} == set(names())
    for argument in arguments:
        field = grouped[argument.name]
        assert argument.kind is argument.KEYWORD_ONLY
        assert argument.default == (argument.empty if field.default is MISSING else field.default)
        assert argument.annotation == field.type


@pytest.mark.parametrize("group", GROUPS)
def test_each_argument_is_described_in_its_group(group: type) -> None:
    described = inspect.getdoc(group) or ""
    assert all(f"\n    {field.name}: " in described for field in fields(group))
    assert all(name in (fit.__doc__ or "") for name in names(group))


def test_groups_take_their_own_arguments_and_leave_out_the_rest() -> None:
    given = {"epsilon": 1.0, "delta": 1e-3, "epochs": 2, "batch_size": 10, "stream": True, "model": None}
    asked = Asked.of(given)
    assert asked == (
        Privacy(epsilon=1.0, delta=1e-3),
        Learning(epochs=2, batch_size=10),
        Execution(stream=True),
        Keeping(),
    )


@pytest.mark.parametrize(("steps", "batch_size", "size"), [(1, 1, 3), (7, 49, 343), (100, 4096, 30_001), (300, 13, 13)])
def test_a_plan_of_the_passes_of_so_many_steps_has_that_many(steps: int, batch_size: int, size: int) -> None:
    plan = Plan.of(epochs_of(steps, batch_size, size), batch_size, size)
    assert plan.steps == steps
    assert sum(count for _, count in plan.ledger.entries) == steps


UNFIT = [
    ("learning_rate", 1.0),
    ("dataset_size", 0),
    ("lr", math.nan),
    ("momentum", 1.0),
    ("batch_size", "3"),
    ("micro_batch_size", math.inf),
    ("scheduler", None),
    ("progress", 1),
]


@pytest.mark.parametrize(("name", "value"), [*UNFIT, ("epsilon", "3"), ("delta", 1.0), ("sample_rate", True)])
def test_a_preset_refuses_what_fit_would_before_statistics_are_charged(name: str, value: Any) -> None:
    accountant = create_accountant("rdp")
    changes = {"accountant": accountant, "epsilon": 3.0, "delta": 1e-3, name: value}
    with pytest.raises(ConfigurationError, match=name):
        presets.get("transfer").fit(samples(60), outputs=3, **changes)
    assert len(accountant) == 0


@pytest.mark.parametrize(("name", "value"), [*UNFIT, ("epsilon", "3"), ("accountant", None)])
def test_a_table_refuses_what_fit_would_before_statistics_are_charged(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables.fitting, "private_standardisation", None)
    rows, labels = samples(60)
    with pytest.raises(ConfigurationError, match=name):
        tables.fit_table(rows, (labels > 0).float(), **{"epsilon": 3.0, "delta": 1e-3, name: value})


@pytest.mark.parametrize(("name", "value"), [one for one in UNFIT if one[0] not in ("dataset_size", "progress")])
def test_a_search_refuses_what_fit_would_before_it_is_charged(name: str, value: Any) -> None:
    accountant = create_accountant("rdp")
    candidate = search.Candidate(gated_model, {"epochs": 1, "batch_size": 8, name: value})
    with pytest.raises(ConfigurationError, match=name):
        search.private_search(
            [candidate], samples(60), epsilon=3.0, delta=1e-3, mean_runs=2.0, validation=samples(20, 1),
            accountant=accountant,
        )  # fmt: skip
    assert len(accountant) == 0


def test_a_preset_takes_a_public_size_to_which_statistics_and_steps_refer() -> None:
    settings = {"epsilon": 3.0, "delta": 1e-3, "accountant": "rdp", "epochs": 1, "progress": False, "audit": False}
    result = presets.get("transfer").fit(samples(60), outputs=3, dataset_size=100, **settings).result
    assert result.optimizer.dataset_size == 100
    assert result.sample_rate == 0.07
