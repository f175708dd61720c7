"""Statistics of people: a person's records change each sum by no more than one record does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from accounting import create_accountant
from clipless_dp import ConfigurationError, statistics
from clipless_dp.sampling import People
from clipless_dp.statistics.columns import _counts
from clipless_dp.statistics.moments import MOMENTS_SENSITIVITY, moment_sums
from tests.soundness.mutation import Mutant

SIZES = (1, 2, 3, 9, 4)
TARGET = 3
IDS = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
NOISELESS = 1e-6
"""A multiplier whose noise is below the tolerances here."""


def rows(columns: int = 4) -> Tensor:
    values = torch.randn(len(IDS), columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The same in all of a person's records, with all of its norm on one column: what attains the bounds.
    values[IDS == TARGET] = 0.0
    values[IDS == TARGET, 0] = 1e3
    return values


def moved(summed: Callable[[Tensor, Tensor], Tensor]) -> float:
    values, others = rows(), IDS != TARGET
    whole = summed(values, People(IDS, len(IDS)).shares())
    part = summed(values[others], People(IDS[others], int(others.sum())).shares())
    return float((whole - part).norm())


def test_a_person_moves_the_sums_of_moments_as_one_record_may() -> None:
    change = moved(lambda values, shares: moment_sums(values, 1.0, shares))
    # Float64 sums of some twenty numbers round by under 1e-14.
    assert 0.999 * MOMENTS_SENSITIVITY <= change <= MOMENTS_SENSITIVITY * (1.0 + 1e-9)


def test_a_person_moves_the_counts_as_one_record_may() -> None:
    thresholds = torch.full((4,), 1e4, dtype=torch.float64)
    change = moved(lambda values, shares: _counts(values, thresholds, shares))
    assert change == pytest.approx(2.0)  # The root of four columns.


def test_records_that_weigh_one_each_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    Mutant("one each", People, "shares", "1.0 / self._sizes[self.codes]", "1.0 + 0.0 * self.codes").apply(monkeypatch)
    assert moved(lambda values, shares: moment_sums(values, 1.0, shares)) > 2.0 * MOMENTS_SENSITIVITY


def released(kind: str, accountant: Any, **options: Any) -> Any:
    settings = {"noise_multiplier": NOISELESS, "accountant": accountant, **options}
    values = 0.1 * torch.arange(len(IDS), dtype=torch.float64)
    if kind == "moments":
        return statistics.private_moments(values[:, None], norm=10.0, **settings).mean
    if kind == "quantile":
        return statistics.private_quantile(values + 1.0, 0.5, lower=0.1, upper=100.0, **settings)
    if kind == "fraction":
        return statistics.private_fraction(IDS == TARGET, **settings)
    return statistics.private_standardisation(values[:, None], **settings).mean


def test_people_count_alike_however_many_records_they_have() -> None:
    values, mean = 0.1 * torch.arange(len(IDS), dtype=torch.float64), 0.0
    for person in range(len(SIZES)):
        mean += float(values[person == IDS].mean()) / len(SIZES)
    # Noise of 1e-6 times the range of ten over five people.
    assert float(released("moments", create_accountant("prv"), groups=IDS)) == pytest.approx(mean, abs=1e-4)
    assert released("fraction", create_accountant("prv"), groups=IDS) == pytest.approx(1 / len(SIZES), abs=1e-4)


@pytest.mark.parametrize("kind", ["moments", "quantile", "fraction", "standardisation"])
def test_releases_about_people_are_recorded_as_such_and_do_not_join_others(kind: str) -> None:
    accountant = create_accountant("prv")
    released(kind, accountant, groups=IDS)
    assert accountant.ledger.units == {"person"}
    with pytest.raises(ConfigurationError, match="about people"):
        released(kind, accountant)
    assert len(accountant) == 1


def test_a_release_that_is_kept_is_of_its_unit(tmp_path: Any) -> None:
    file = tmp_path / "kept"
    first = released("fraction", create_accountant("prv"), groups=IDS, file=file)
    again = create_accountant("prv")
    assert released("fraction", again, groups=IDS, file=file) == first
    assert again.ledger.units == {"person"}
    with pytest.raises(RuntimeError, match="does not hold this statistic"):
        released("fraction", create_accountant("prv"), dataset_size=len(SIZES), file=file)
