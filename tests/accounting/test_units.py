"""Sampling people against sampling rows."""

from __future__ import annotations

import pytest

from accounting import (
    InvalidParameterError,
    PRVAccountant,
    calibrate_noise_multiplier,
    compare_samplings,
)

COMMON = {"people": 1000, "sample_rate": 0.02, "steps": 100, "delta": 1e-6}


def test_both_samplings_meet_the_target_and_the_one_with_less_noise_is_named():
    compared = compare_samplings(**COMMON, rows_per_person=5, target_epsilon=3.0)
    by_person, by_row = compared.by_person, compared.by_row
    assert by_person.epsilon <= 3.0
    assert by_row.epsilon <= 3.0
    assert by_person.noise_multiplier == calibrate_noise_multiplier(
        target_epsilon=3.0, delta=1e-6, sample_rate=0.02, steps=100
    )
    assert by_person.relative_noise == pytest.approx(by_person.noise_multiplier / 20.0, rel=1e-12)
    assert by_row.relative_noise == pytest.approx(by_row.noise_multiplier / 100.0, rel=1e-12)
    less = min(by_person.relative_noise, by_row.relative_noise)
    assert (by_person.relative_noise if compared.better == "person" else by_row.relative_noise) == less
    assert compared.ratio == pytest.approx(max(by_person.relative_noise, by_row.relative_noise) / less, rel=1e-12)
    assert f"sample {'people' if compared.better == 'person' else 'rows'}" in str(compared)


def test_rows_win_where_all_have_as_many_and_people_where_few_reach_the_cap():
    # Independent rows hide a person better than one coin for all of them; a cap that few reach costs noise in vain.
    even = compare_samplings(**COMMON, rows_per_person=10, target_epsilon=3.0)
    uneven = compare_samplings(**COMMON, rows_per_person=10, mean_rows=2.0, target_epsilon=3.0)
    assert (even.better, uneven.better) == ("row", "person")
    assert even.by_row.noise_multiplier == uneven.by_row.noise_multiplier
    assert uneven.by_row.relative_noise == pytest.approx(5.0 * even.by_row.relative_noise, rel=1e-12)


def test_one_row_each_is_a_tie_and_a_persons():
    tie = compare_samplings(**COMMON, rows_per_person=1, target_epsilon=3.0)
    assert (tie.better, tie.ratio) == ("person", 1.0)
    assert tie.by_person == tie.by_row


def test_at_a_given_noise_epsilons_are_compared_at_one_relative_noise():
    compared = compare_samplings(**COMMON, rows_per_person=5, noise_multiplier=1.0)
    assert compared.by_row.noise_multiplier == 5.0
    assert compared.by_row.relative_noise == pytest.approx(compared.by_person.relative_noise, rel=1e-12)
    engine = PRVAccountant()
    engine.step(noise_multiplier=5.0, sample_rate=0.02, steps=100)
    assert compared.by_row.epsilon == float(engine.get_epsilon(1e-6, group_size=5))
    assert (compared.better == "row") == (compared.by_row.epsilon < compared.by_person.epsilon)


def test_nothing_sampled_is_the_same_either_way():
    # All rows in every step: a sum of k rows with k times the noise.
    compared = compare_samplings(
        people=10, rows_per_person=7, sample_rate=1.0, steps=10, delta=1e-6, target_epsilon=1.0
    )
    assert compared.better == "person"
    assert compared.ratio == pytest.approx(1.0, rel=2e-4)  # calibration is to 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give one of"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0}, "give one of"),
        ({"target_epsilon": 1.0, "mean_rows": 6.0}, "exceeds rows_per_person"),
        ({"target_epsilon": 1.0, "mean_rows": 0.0}, "mean_rows"),
        ({"target_epsilon": 1.0, "sample_rate": 0.0}, "samples nobody"),
        ({"target_epsilon": 1.0, "people": 0}, "people"),
        ({"target_epsilon": 1.0, "rows_per_person": 0}, "rows_per_person"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(InvalidParameterError, match=message):
        compare_samplings(**{**COMMON, "rows_per_person": 5, **change})
