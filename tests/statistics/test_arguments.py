"""Numbers of numpy are computed with as they are recorded, and what is no number is refused before it is charged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accounting import create_accountant
from clipless_dp import ConfigurationError, InputError
from clipless_dp.noise import RELEASE_MARGIN
from clipless_dp.statistics import (
    moments,
    private_fraction,
    private_moments,
    private_quantile,
    private_standardisation,
)

VALUES = torch.linspace(0.1, 2.0, 60)
TABLE = VALUES.reshape(20, 3)


def of_moments(values=TABLE, **changes):
    return private_moments(values, **{"norm": 3.0, **changes})


def of_columns(values=TABLE, **changes):
    return private_standardisation(values, **changes)


def of_quantile(values=VALUES, **changes):
    return private_quantile(values, **{"quantile": 0.5, "lower": 0.1, "upper": 10.0, **changes})


def of_share(values=VALUES > 1.0, **changes):
    return private_fraction(values, **changes)


STATISTICS = [of_moments, of_columns, of_quantile, of_share]
NOT_A_NUMBER = [True, "1", None, torch.tensor(1.0), np.array([1.0]), [1.0], 1j, float("nan"), float("inf"), 0.0, -1.0]


class Constant:
    """Noise that is the same number everywhere."""

    reproducible = False

    def __init__(self, value):
        self.value = value

    def begin_step(self, step):
        pass

    def standard_normal_(self, out):
        return out.fill_(self.value)


def check_noise_of(sigma):
    def mean(value):
        accountant = create_accountant("rdp")
        found = of_moments(noise_multiplier=sigma, accountant=accountant, noise=Constant(value))
        ((event, _),) = accountant.ledger
        return float(found.mean[0]), event.noise_multiplier

    (without, _), (with_one, recorded) = mean(0.0), mean(1.0)
    added = (with_one - without) * len(TABLE) / 3.0
    # Sums of twenty records in float64.
    assert added == pytest.approx(recorded * 2.0**0.5 * RELEASE_MARGIN, rel=1e-12)


# 5.6875·√2 is 8.0434, and 8.039 in the sixteen bits that numpy would compute it in.
@pytest.mark.parametrize("kind", [float, np.float16, np.float32, np.float64])
def test_the_noise_is_what_was_recorded_whatever_type_the_multiplier_has(kind):
    check_noise_of(kind(5.6875))


def test_a_multiplier_that_stays_what_it_was_is_caught(monkeypatch):
    monkeypatch.setattr(moments, "positive", lambda name, value: value)
    with pytest.raises(AssertionError):
        check_noise_of(np.float16(5.6875))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=repr)
def test_a_multiplier_that_is_no_positive_number_is_refused_before_it_is_charged(statistic, value):
    accountant = create_accountant("rdp")
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        statistic(noise_multiplier=value, accountant=accountant)
    assert len(accountant) == 0


@pytest.mark.parametrize(
    ("statistic", "name"),
    [(of_moments, "norm"), (of_quantile, "quantile"), *((made, end) for made in (of_quantile, of_columns)
     for end in ("lower", "upper"))],
)  # fmt: skip
def test_other_numbers_are_taken_of_any_type_and_refused_where_they_are_none(statistic, name):
    accountant = create_accountant("rdp")
    for value in NOT_A_NUMBER:
        with pytest.raises(ConfigurationError, match=name):
            statistic(noise_multiplier=5.0, accountant=accountant, **{name: value})
    assert len(accountant) == 0
    right = {"norm": 3.0, "quantile": 0.25, "lower": 0.5, "upper": 4.0}[name]
    statistic(noise_multiplier=5.0, accountant=accountant, **{name: np.float32(right)})
    assert len(accountant) == 1


@pytest.mark.parametrize("statistic", STATISTICS)
def test_sizes_are_whole_numbers_of_any_type_and_no_truth_values(statistic):
    accountant = create_accountant("rdp")
    for size in (True, 20.0, "20", 0, torch.tensor(20)):
        with pytest.raises(ConfigurationError, match="dataset_size"):
            statistic(noise_multiplier=5.0, accountant=accountant, dataset_size=size)
    assert len(accountant) == 0
    statistic(noise_multiplier=5.0, accountant=accountant, dataset_size=np.int64(20))
    assert len(accountant) == 1


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(
    "values",
    [TABLE.numpy(), TABLE.tolist(), None, "x", TABLE.to_sparse(), VALUES.to_sparse(), TABLE.to("meta")],
    ids=["array", "list", "none", "string", "sparse table", "sparse vector", "no data"],
)
def test_values_that_are_no_dense_tensor_are_refused_before_they_are_charged(statistic, values):
    accountant = create_accountant("rdp")
    with pytest.raises(InputError, match="expected"):
        statistic(values, noise_multiplier=5.0, accountant=accountant)
    assert len(accountant) == 0


def test_a_statistic_with_arguments_of_numpy_is_reread_by_plain_ones(tmp_path):
    accountant, file = create_accountant("rdp"), tmp_path / "quantile.pt"
    options = {"accountant": accountant, "file": file}
    first = of_quantile(quantile=np.float32(0.25), noise_multiplier=np.float16(5.0), **options)
    assert of_quantile(quantile=0.25, noise_multiplier=5.0, **options) == first
    assert len(accountant) == 1
