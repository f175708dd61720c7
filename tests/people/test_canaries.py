"""Canaries who have several rows: silent where a person counts as one row, loud where their rows count in full."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clipless_dp import ConfigurationError, DPLipModel, InputError, audit, fit
from clipless_dp.sampling.series import Draw
from tests.audit.test_canaries import CERTAIN, DELTA, ENTRIES, wide_model
from tests.soundness.mutation import Mutant

COUNT, MOST = 600, 8

REAL = np.repeat(np.arange(25), 2)


def real_data() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(len(REAL), ENTRIES, generator=torch.Generator().manual_seed(1))
    return inputs, (inputs[:, 0] > 0).long()


def several_rows() -> tuple[torch.Tensor, torch.Tensor, np.ndarray[Any, Any]]:
    """People of seven or eight rows in about one direction each, which are at right angles, with the same target."""
    generator = torch.Generator().manual_seed(2)
    ids = np.repeat(np.arange(COUNT), MOST - np.arange(COUNT) % 2)
    directions = torch.linalg.qr(torch.randn(ENTRIES, COUNT, generator=generator)).Q.T
    rows = directions[torch.from_numpy(ids)]
    rows = 2.0 * rows + 1e-3 * torch.randn(rows.shape, generator=generator)
    return rows, torch.randint(4, (COUNT,), generator=generator)[torch.from_numpy(ids)], ids


def train(model: DPLipModel, data: Any, ids: Any) -> Any:
    settings = {"epsilon": 1.0, "delta": DELTA, "epochs": 10, "batch_size": 150, "lr": 0.5, "momentum": 0.0}
    return fit(model, data, groups=ids, rows_per_group=MOST, progress=False, accountant="rdp", audit=False, **settings)


def audited(confidence: float, **changes: Any) -> audit.CanaryAudit:
    settings = {"delta": DELTA, "canaries": several_rows(), "groups": REAL, "confidence": confidence, **changes}
    return audit.canaries(train, wide_model(), real_data(), **settings)


def test_people_of_several_rows_are_not_told_apart_by_more_than_is_charged() -> None:
    found = audited(CERTAIN)
    assert found.passed
    assert found.canaries == COUNT
    assert found.trained.optimizer.dataset_size == 25 + COUNT


LOST = Mutant("weights lost", Draw, "divisors", "min(stop, end), divisor))", "min(stop, end), 1))")


def test_a_run_that_counts_each_row_in_full_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    LOST.apply(monkeypatch)
    # One run in twelve goes unnoticed; of honest ones at most one in twenty is refuted.
    found = [audited(0.95) for _ in range(5)]
    assert sum(not one.passed for one in found) >= 2, [str(one) for one in found]


def test_one_coin_decides_about_all_rows_of_a_person() -> None:
    seen: list[Any] = []

    def looking(model: DPLipModel, data: Any, ids: Any) -> Any:
        seen.append((data[0][len(REAL) :].isnan().any(1).numpy(), ids))
        return train(model, data, ids)

    rows, targets, ids = several_rows()
    # Neither the order of a person's rows nor their names are anyone's concern.
    order = np.random.default_rng(3).permutation(len(ids))
    given = rows[order], targets[order], [f"person {one}" for one in ids[order]]
    audit.canaries(looking, wide_model(), real_data(), delta=DELTA, canaries=given, groups=REAL, confidence=CERTAIN)
    ((out, all_ids),) = seen
    assert (all_ids[: len(REAL)] == REAL).all()
    assert not set(all_ids[: len(REAL)]) & set(all_ids[len(REAL) :])
    of_each = [set(out[ids[order] == one].tolist()) for one in range(COUNT)]
    assert all(len(coins) == 1 for coins in of_each)
    # Six standard deviations of 600 fair coins.
    assert abs(sum(True in coins for coins in of_each) - COUNT / 2) < 6 * (COUNT / 4) ** 0.5


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"groups": None}, ConfigurationError, "the data has none"),
        ({"canaries": tuple(part[:50] for part in several_rows())}, ConfigurationError, "canaries say nothing"),
        ({"canaries": (*several_rows()[:2], several_rows()[2][1:])}, InputError, "ids"),
        ({"canaries": (*several_rows(), 1)}, ConfigurationError, "inputs, targets"),
        ({"canaries": (*several_rows()[:2], several_rows()[2] / 2)}, InputError, "floating-point"),
    ],
    ids=["no groups", "too few people", "too few ids", "too many parts", "floats"],
)
def test_canaries_that_say_nothing_about_people_are_refused(
    changes: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        audited(CERTAIN, **changes)
