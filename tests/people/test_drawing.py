"""Whose rows are: what ids are taken, how people are drawn on every road, and what a step refuses."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from accounting import create_accountant
from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    InputError,
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyError,
    fit,
    poisson_collate,
)
from clipless_dp.errors import CheckpointError
from clipless_dp.sampling import People, StreamedBatches, bound_contributions
from clipless_dp.sampling.people import number_of
from tests.soundness.mutation import Mutant
from tests.support import gated_model, samples

ROWS = 120
IDS = np.random.default_rng(0).permutation(np.repeat(np.arange(24), [1, 2, 3, 4, 5, 6, 7, 12] * 3)[:ROWS])
PEOPLE = 24


def optimizer(**options: Any) -> CliplessDPSGD:
    settings: dict[str, Any] = {"sample_rate": 0.5, "dataset_size": PEOPLE, "unit": "person", "noise_multiplier": 1.0}
    return CliplessDPSGD(gated_model(), lr=0.1, **{**settings, **options})


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([1, None, 2], "no id"),
        (["a", "", "b"], "no id"),
        (["a", float("nan"), "b"], "no id"),
        (np.array([1.0, 2.0, 2.0]), "floating-point"),
        (np.array([1.0, math.nan, 2.0]), "missing ids"),
        ([1.0, 2.0, 2.0], "float"),
        (["a", 1, 2], "one type"),
        ([True, False, True], "bool"),
        ([1, 2], "2 ids"),
        ([[1, 2], [2], [3]], "several people"),
        (np.ones((3, 2), dtype=int), "several people"),
        ([7, 7, 7], "one id"),
        ("abc", "an id for each row"),
        (np.ma.masked_array([1, 1, 2], mask=[0, 1, 0]), "no id"),
        ({1, 2, 3}, "an id for each row"),
        ({1: 0, 2: 0, 3: 0}, "an id for each row"),
    ],
    ids=["none", "empty", "nan among strings", "floats", "a hole", "python floats", "mixed", "flags", "too few",
         "several", "a matrix", "one person", "a string", "masked", "a set", "a mapping"],
)  # fmt: skip
def test_ids_that_do_not_say_whose_a_row_is_are_refused(groups: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        People(groups, 3)


@pytest.mark.parametrize(
    "groups",
    [[5, 9, 5], ["x", "y", "x"], np.array(["x", "y", "x"], dtype=object), torch.tensor([2, 0, 2]), (1, 0, 1)],
    ids=["integers", "strings", "objects", "a tensor", "a tuple"],
)
def test_integers_and_strings_are_ids(groups: Any) -> None:
    with pytest.warns(UserWarning, match="one person has 2 of the 3 rows"):
        whose = People(groups, 3)
    assert whose.count == 2
    assert whose.shares().tolist() == [0.5, 1.0, 0.5]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    cap=st.integers(1, 40),
    weights=st.sampled_from(["mean", "cap"]),
    seed=st.integers(0, 1000),
)
def test_all_rows_of_a_person_together_weigh_at_most_one(sizes: list[int], cap: int, weights: Any, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ids = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whose = People(ids, len(ids), rows_per_group=cap, weights=weights)
    people = np.flatnonzero(generator.random(len(sizes)) < 0.5)
    rows, classes = whose.choose(people, generator)
    weighed = dict.fromkeys(people.tolist(), Fraction(0))
    start = 0
    for stop, divisor in classes:
        for one in ids[rows[start:stop]].tolist():
            weighed[one] += Fraction(1, divisor)
        start = stop
    assert start == len(rows) == len(set(rows.tolist()))
    expected = (Fraction(min(sizes[one], cap), cap) if weights == "cap" else Fraction(1) for one in people.tolist())
    assert list(weighed.values()) == list(expected)


def test_ids_beyond_64_bits_are_told_apart() -> None:
    assert People([1 << 80, (1 << 80) + 1, -1, 1 << 63], 4).count == 4


def test_strings_that_differ_by_a_nul_are_told_apart() -> None:
    assert People(["a", "a\0", "b"], 3).count == 3
    assert People([b"a", b"a\0", b"b"], 3).count == 3
    assert People(np.ma.masked_array([1, 2, 3]), 3).count == 3


def test_people_are_drawn_with_the_rate_and_not_rows() -> None:
    sampler = PoissonBatchSampler(PEOPLE, sample_rate=0.3, steps=4000, groups=IDS, rows_per_group=12)
    seen: Counter[int] = Counter()
    together = 0
    for rows in sampler.draws():
        drawn = set(IDS[rows].tolist())
        seen.update(drawn)
        together += len({0, 7} & drawn) == 2
        # A person of two rows is there with both of them, or not at all.
        assert Counter(IDS[rows].tolist())[1] in (0, 2)
    # Five standard deviations of a binomial count; drawing rows, a person of 12 would be there in 98 of 100 draws.
    spread = 5.0 * math.sqrt(4000 * 0.3 * 0.7)
    assert all(abs(seen[person] - 1200) < spread for person in range(PEOPLE))
    assert abs(together - 4000 * 0.09) < 5.0 * math.sqrt(4000 * 0.09 * 0.91)


def classes_hold(rows: Any, classes: Any, cap: int) -> None:
    owners = IDS[np.asarray(rows)]
    assert classes[-1][0] == len(rows) if classes else not len(rows)
    ends = [end for end, _ in classes]
    divisors = np.repeat([divisor for _, divisor in classes], np.diff([0, *ends]))
    for one in set(owners.tolist()):
        own, has = divisors[owners == one].tolist(), int((one == IDS).sum())
        assert len(own) == min(has, cap)
        assert sum(Fraction(1, divisor) for divisor in own) == 1
        # No row weighs more than twice what another one does.
        assert max(own) <= 2 * min(own)
        assert has < cap or set(own) == {cap}


@pytest.mark.parametrize("cap", [1, 3, 5, 50])
def test_all_rows_up_to_the_cap_enter_and_weigh_about_as_much_as_one_another(cap: int) -> None:
    for rows, classes in PoissonBatchSampler(
        PEOPLE, sample_rate=0.5, steps=20, groups=IDS, rows_per_group=cap
    ).chosen():
        classes_hold(rows, classes, cap)


def weights_of_rows(draws: int) -> Any:
    """The mean weight of each of seven rows of one person, of whom at most six enter, over so many draws; and of five
    of another one, who is below the cap."""
    ids = np.repeat([0, 1, 2], [7, 5, 3])
    whose, generator, total = People(ids, len(ids), rows_per_group=6), np.random.default_rng(0), np.zeros(len(ids))
    for _ in range(draws):
        rows, classes = whose.choose(np.arange(3), generator)
        start = 0
        for stop, divisor in classes:
            total[rows[start:stop]] += 1.0 / divisor
            start = stop
    return total / draws * np.repeat([7, 5, 3], [7, 5, 3])


DRAWS = 4000
SPREAD = 6.0 * (2.0 / DRAWS) ** 0.5
"""Six standard errors: a weight times its person's number of rows lies in [0, 2] with mean 1, so that its variance is
at most 1."""


def test_each_row_of_a_person_weighs_the_same_in_expectation() -> None:
    assert float(np.abs(weights_of_rows(DRAWS) - 1.0).max()) < SPREAD


def test_rows_that_are_heavier_than_others_in_each_draw_show(monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = Mutant("by place", People, "choose", "np.lexsort((generator.random(len(rows)), owners))", "slice(None)")
    mutant.apply(monkeypatch)
    assert float(np.abs(weights_of_rows(50) - 1.0).max()) > SPREAD


@pytest.mark.parametrize("road", [PoissonBatches, StreamedBatches], ids=["held", "streamed"])
def test_steps_on_people_are_recorded_as_such(road: Any) -> None:
    inputs, targets = samples(ROWS)
    own = optimizer()
    for batch in road((inputs, targets), sample_rate=0.5, steps=3, groups=IDS, rows_per_group=5):
        own.zero_grad()
        own.accumulate(batch, micro_batch_size=4)
        own.step()
    assert own.accountant.ledger.units == {"person"}
    assert own.steps_taken == 3
    (line,) = own.accountant.ledger.lines
    assert line.provenance.sampling == "announced"


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_loader_brings_people(workers: int) -> None:
    dataset = TensorDataset(*samples(ROWS))
    sampler = PoissonBatchSampler(PEOPLE, sample_rate=0.5, steps=3, groups=IDS, rows_per_group=5)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=poisson_collate(dataset), num_workers=workers)
    own = optimizer()
    for inputs, targets in loader:
        own.zero_grad()
        own.accumulate((inputs, targets, torch.ones(len(inputs), dtype=torch.bool)))
        own.step()
    assert own.accountant.ledger.units == {"person"}
    assert own.steps_taken == 3


class Reordered(PoissonBatchSampler):
    """Hands the same rows out in another order."""

    def __iter__(self) -> Any:
        for indices in super().__iter__():
            indices.sort()
            yield indices


class Copied(PoissonBatchSampler):
    """The same, as lists of its own."""

    def __iter__(self) -> Any:
        for indices in super().__iter__():
            yield sorted(indices)


@pytest.mark.parametrize("kind", [Reordered, Copied])
def test_rows_of_people_in_another_order_are_no_draw(kind: Any) -> None:
    dataset = TensorDataset(*samples(ROWS))
    sampler = kind(PEOPLE, sample_rate=1.0, steps=1, groups=IDS, rows_per_group=5)
    own = optimizer(sample_rate=1.0)
    for inputs, targets in DataLoader(dataset, batch_sampler=sampler, collate_fn=poisson_collate(dataset)):
        own.zero_grad()
        with pytest.raises(PrivacyError, match="of a draw of people"):
            own.accumulate((inputs, targets, torch.ones(len(inputs), dtype=torch.bool)))
    assert len(own.accountant) == 0


def a_draw(**options: Any) -> tuple[Any, ...]:
    settings: dict[str, Any] = {"sample_rate": 0.5, "steps": 1, "groups": IDS, **options}
    if settings["groups"] is not None:
        settings.setdefault("rows_per_group", 5)
    (batch,) = PoissonBatches(samples(ROWS), **settings)
    return tuple(batch)


def passed_by_hand(own: CliplessDPSGD, batch: tuple[Tensor, ...]) -> None:
    own.zero_grad()
    own.model.loss(own.model(batch[0]), batch[1], batch[2]).backward()
    own.step()


def accumulated(own: CliplessDPSGD, batch: tuple[Tensor, ...]) -> None:
    own.zero_grad()
    own.accumulate(batch)  # type: ignore[arg-type]
    own.step()


def test_rows_of_people_at_full_weight_are_refused() -> None:
    own = optimizer()
    with pytest.raises(PrivacyError, match="accumulate"):
        passed_by_hand(own, a_draw())
    assert len(own.accountant) == 0


def test_a_draw_of_people_is_no_step_of_rows_and_the_other_way_round() -> None:
    with pytest.raises(PrivacyError, match="unit='person'"):
        accumulated(optimizer(unit="row"), a_draw())
    with pytest.raises(PrivacyError, match="draw of people"):
        accumulated(optimizer(), a_draw(groups=None))


def test_a_sampler_of_people_has_as_many_as_there_are() -> None:
    with pytest.raises(ConfigurationError, match="counts rows"):
        PoissonBatchSampler(ROWS, sample_rate=0.5, steps=1, groups=IDS)
    with pytest.raises(ConfigurationError, match="names 24 people"):
        PoissonBatchSampler(20, sample_rate=0.5, steps=1, groups=IDS)


def test_ledgers_about_people_and_about_rows_do_not_compose_unless_it_is_said_how() -> None:
    rows, people = optimizer(unit="row", dataset_size=ROWS), optimizer()
    accumulated(rows, a_draw(groups=None))
    accumulated(people, a_draw())
    with pytest.raises(ConfigurationError, match=r"about\('person'\)"):
        optimizer(accountant=rows.accountant)
    with pytest.raises(ConfigurationError, match="about people"):
        optimizer(unit="row", accountant=people.accountant)
    with pytest.raises(ConfigurationError, match="about rows"):
        optimizer().load_state_dict(rows.state_dict())
    with pytest.raises(ValueError, match="do not add up"):
        rows.accountant.ledger.merge(people.accountant.ledger)
    joined = rows.accountant.ledger.about("person").merge(people.accountant.ledger)
    assert len(joined) == 2
    assert joined.from_json(joined.to_json()) == joined
    accountant = create_accountant("prv")
    accountant.ledger = joined
    assert optimizer(accountant=accountant).get_epsilon(1e-3) > people.get_epsilon(1e-3)


def test_fit_is_about_people_and_resumes_with_the_same_terms_only(tmp_path: Any) -> None:
    terms: dict[str, Any] = {
        "epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 8, "groups": IDS.tolist(), "rows_per_group": 4,
        "progress": False, "audit": False, "checkpoint": tmp_path / "run.pt",
    }  # fmt: skip
    result = fit(gated_model(), samples(ROWS), **terms)
    assert result.optimizer.unit == "person"
    assert result.optimizer.dataset_size == PEOPLE
    assert result.steps == 3
    assert "person" in str(result)
    with pytest.raises(CheckpointError, match="groups"):
        fit(gated_model(), samples(ROWS), **{**terms, "rows_per_group": 5})
    again = fit(gated_model(), samples(ROWS), **terms)
    assert again.epsilon == result.epsilon


def test_what_is_about_groups_is_not_ignored_without_them() -> None:
    terms: dict[str, Any] = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 8}
    with pytest.raises(ConfigurationError, match="about groups"):
        fit(gated_model(), samples(ROWS), rows_per_group=3, **terms)
    with pytest.warns(UserWarning, match="is the number of rows"):
        result = fit(gated_model(), samples(ROWS), groups=IDS, dataset_size=ROWS, **terms)
    assert result.optimizer.dataset_size == ROWS
    with pytest.raises(ConfigurationError, match="24 people"):
        fit(gated_model(), samples(ROWS), groups=IDS, **{**terms, "batch_size": 60})


def test_a_column_of_ids_is_no_input() -> None:
    inputs, targets = samples(ROWS)
    batches = PoissonBatches(
        {"x": inputs, "labels": targets, "whose": torch.from_numpy(IDS)}, sample_rate=0.5, steps=1, groups="whose"
    )
    (batch,) = batches
    assert batch.inputs.shape[1:] == inputs.shape[1:]
    with pytest.raises(ConfigurationError, match="no column"):
        PoissonBatches((inputs, targets), sample_rate=0.5, steps=1, groups="whose")


def test_seeded_draws_of_people_are_a_function_of_the_seed() -> None:
    options: dict[str, Any] = {"sample_rate": 0.5, "steps": 3, "seed": 5, "groups": IDS, "rows_per_group": 3}
    first = [rows.tolist() for rows in PoissonBatchSampler(PEOPLE, **options).draws()]
    assert first == [rows.tolist() for rows in PoissonBatchSampler(PEOPLE, **options).draws()]
    assert first[1:] == [rows.tolist() for rows in PoissonBatchSampler(PEOPLE, start=1, **options).draws()]


def test_a_row_counts_against_all_who_share_it() -> None:
    owners = [["a", "b"], ["b", "c"], ["c"], ["a"], ["b"], "d", ["d", "a"], ["d", "d"]]
    for seed in range(20):
        kept = bound_contributions(owners, 2, seed=seed)
        held = Counter(one for row in kept for one in set(owners[row] if isinstance(owners[row], list) else ["d"]))
        assert max(held.values()) <= 2
        # Greedy: no row that is left out would fit.
        for row in set(range(len(owners))) - set(kept.tolist()):
            assert any(held[one] == 2 for one in owners[row])
    with pytest.raises(InputError, match="no id"):
        bound_contributions([["a"], []], 2)


@pytest.mark.parametrize(
    "owners",
    [torch.tensor([1, 1, 2]), np.array([1, 1, 2]), [torch.tensor([1, 3]), torch.tensor(1), {2}], [1, 1, 2]],
    ids=["a tensor", "an array", "tensors", "a list"],
)
def test_owners_come_in_whatever_holds_ids(owners: Any) -> None:
    kept = bound_contributions(owners, 1, seed=0).tolist()
    assert len(kept) == 2
    assert 2 in kept


def test_owners_of_no_order_and_other_seeds_are_refused() -> None:
    for owners in ({1, 2}, {1: 2}, [{1: 2}]):
        with pytest.raises(InputError):
            bound_contributions(owners, 1)
    for seed in (-1, "a"):
        with pytest.raises(ConfigurationError, match="seed"):
            bound_contributions([1, 2], 1, seed=seed)  # type: ignore[arg-type]


def test_whether_a_pass_by_hand_is_refused_does_not_depend_on_who_was_drawn() -> None:
    alone = list(range(ROWS))
    with pytest.raises(PrivacyError, match="accumulate"):
        passed_by_hand(optimizer(dataset_size=ROWS), a_draw(groups=alone))
    passed_by_hand(optimizer(dataset_size=ROWS), a_draw(groups=alone, rows_per_group=1))


def test_an_error_in_a_later_class_leaves_nothing_of_an_earlier_one() -> None:
    own, batch, calls = optimizer(), a_draw(sample_rate=1.0), []
    own.sample_rate = 1.0

    def failing(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        calls.append(len(inputs))
        if len(calls) == 3:
            raise ValueError("no more")
        return own.model.loss(own.model(inputs), targets, mask)

    own.zero_grad()
    with pytest.raises(ValueError, match="no more"):
        own.accumulate(batch, loss=failing)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in own.model.parameters())


@pytest.mark.parametrize("more", [np.uint64(1 << 62), np.uint8(3), np.int64(-1), 1 << 70])
def test_one_more_id_of_another_type_merges_nobody(more: Any) -> None:
    ids = [np.int64((1 << 60) + place) for place in range(50)]
    assert np.array_equal(People(ids, None).codes, np.arange(50))
    codes = People([*ids, more], None).codes
    assert len(set(codes.tolist())) == 51
    assert number_of([*ids, more], 51) == 51
