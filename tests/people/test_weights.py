"""A row weighs what it was drawn with, whatever is vouched for and however a batch came about; else it is refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from clipless_dp import ConfigurationError, PoissonBatches, PoissonBatchSampler, PrivacyError, fit, poisson_collate
from clipless_dp.sampling import StreamedBatches, draws
from clipless_dp.sampling.fingerprints import of_rows
from tests.people.test_drawing import IDS, PEOPLE, ROWS, a_draw, accumulated, optimizer, passed_by_hand
from tests.support import gated_model, samples


@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
def test_no_sampling_vouches_for_weights_of_people(sampling: Any) -> None:
    inputs, targets = samples(ROWS)
    by_hand, drawn_by_hand, added = (optimizer(sampling=sampling) for _ in range(3))
    with pytest.raises(PrivacyError, match="of a draw of people") as first:
        passed_by_hand(by_hand, (inputs, targets, targets == targets))
    with pytest.raises(PrivacyError, match="accumulate") as second:
        passed_by_hand(drawn_by_hand, a_draw())
    changed = a_draw()
    with pytest.raises(PrivacyError, match="of a draw of people") as third:
        accumulated(added, (changed[0] * 1.1, *changed[1:]))
    assert not any(len(own.accountant) for own in (by_hand, drawn_by_hand, added))
    assert not any("vouch" in str(refused.value) for refused in (first, second, third))


@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
def test_draws_of_people_are_stepped_on_under_each_sampling(sampling: Any) -> None:
    own = optimizer(sampling=sampling)
    accumulated(own, a_draw())
    assert own.accountant.ledger.units == {"person"}


def test_memory_for_people_is_measured_on_rows_that_are_nobodys() -> None:
    result = fit(
        gated_model(), samples(ROWS), groups=IDS, epsilon=8.0, delta=1e-3, epochs=1, batch_size=12, progress=False,
        memory_budget=1e8,
    )  # fmt: skip
    assert result.optimizer.accountant.ledger.units == {"person"}


def test_rows_at_full_weight_that_are_vouched_for_stay_a_matter_of_rows() -> None:
    own = optimizer(unit="row", sampling="none")
    inputs, targets = samples(ROWS)
    passed_by_hand(own, (inputs, targets, targets == targets))
    assert len(own.accountant) == 1


class Sorting(Dataset[Any]):
    """As one over a file is, of which several rows are read in an order of the file's, ascending say.

    Args:
        missing: how many of several rows it leaves out; less than zero: returns twice.
        order: by what it reads them.
    """

    def __init__(self, missing: int = 0, order: Callable[[int], Any] = lambda index: index) -> None:
        self.inputs, self.targets = samples(ROWS)
        self.missing, self.order = missing, order

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        read = [self[index] for index in sorted(indices, key=self.order)]
        return (read + read)[: len(read) - self.missing] if len(indices) > 1 else read


ORDERS = {
    "ascending": Sorting,
    "descending": lambda: Sorting(order=lambda index: -index),
    "by file": lambda: Sorting(order=lambda index: (index % 3, index)),
    "in order": lambda: TensorDataset(*samples(ROWS)),
}


def weighed(batches: Iterable[Any]) -> Counter[float]:
    """How often each weight is given to a row of a person, who is known by the row's content."""
    inputs, _ = samples(ROWS)
    person = {tuple(row.flatten().tolist()): int(one) for row, one in zip(inputs, IDS, strict=True)}
    own, total = optimizer(sample_rate=1.0), Counter[float]()
    apart = own.model.register.apart

    def noted(*args: Any, divisor: int = 1, **options: Any) -> Any:
        divisors.append(divisor)
        return apart(*args, divisor=divisor, **options)

    divisors: list[int] = []
    own.model.register.apart = noted  # type: ignore[method-assign]

    def loss(some: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        for row in some[mask]:
            total[person[tuple(row.flatten().tolist())]] += 1.0 / divisors[-1]
        return own.model.loss(own.model(some), targets, mask)

    for inputs, targets, mask in batches:
        own.zero_grad()
        own.accumulate((inputs, targets, mask), loss=loss)
        own.step()
    return total


def loaded(dataset: Any, workers: int = 0, **options: Any) -> Iterator[Any]:
    settings: dict[str, Any] = {"sample_rate": 1.0, "steps": 1, "groups": IDS, "rows_per_group": 50, **options}
    sampler = PoissonBatchSampler(PEOPLE, **settings)
    for inputs, targets in DataLoader(
        dataset, batch_sampler=sampler, collate_fn=poisson_collate(dataset), num_workers=workers
    ):
        yield inputs, targets, torch.ones(len(inputs), dtype=torch.bool)


ROADS = {
    "streamed": lambda dataset: StreamedBatches(dataset, sample_rate=1.0, steps=1, groups=IDS, rows_per_group=50),
    "held": lambda dataset: PoissonBatches(dataset, sample_rate=1.0, steps=1, groups=IDS, rows_per_group=50),
    "a loader": loaded,
    "a loader of a subset": lambda dataset: loaded(Subset(dataset, range(ROWS))),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("order", ORDERS)
def test_people_weigh_one_in_whatever_order_a_data_set_returns_their_rows(road: str, order: str) -> None:
    total = weighed(ROADS[road](ORDERS[order]()))
    assert len(total) == PEOPLE
    # Sums of at most a dozen numbers.
    assert all(weight <= 1.0 + 1e-12 for weight in total.values())
    assert sum(total.values()) > 0.9 * PEOPLE


@pytest.mark.slow
def test_people_weigh_one_in_whatever_order_a_worker_reads_their_rows() -> None:
    assert max(weighed(loaded(Sorting(), workers=1)).values()) <= 1.0 + 1e-12


@pytest.mark.parametrize("road", ["streamed", "a loader"])
@pytest.mark.parametrize("missing", [1, -1], ids=["fewer", "more"])
def test_a_data_set_that_returns_another_number_of_rows_of_people_is_refused(road: str, missing: int) -> None:
    with pytest.raises(ConfigurationError, match="were asked for"):
        weighed(ROADS[road](Sorting(missing)))


OF_ROWS = {
    "streamed": lambda dataset: StreamedBatches(dataset, sample_rate=1.0, steps=1),
    "held": lambda dataset: PoissonBatches(dataset, sample_rate=1.0, steps=1),
    "a loader": lambda dataset: DataLoader(
        dataset,
        batch_sampler=PoissonBatchSampler(ROWS, sample_rate=1.0, steps=1),
        collate_fn=poisson_collate(dataset),
    ),
}


@pytest.mark.parametrize("road", OF_ROWS)
@pytest.mark.parametrize("missing", [1, -1, -ROWS], ids=["fewer", "more", "twice as many"])
def test_a_data_set_that_returns_another_number_of_rows_is_refused_where_rows_are_the_unit_too(
    road: str, missing: int
) -> None:
    with pytest.raises(ConfigurationError, match="were asked for"):
        list(OF_ROWS[road](Sorting(missing)))


@pytest.mark.parametrize("road", OF_ROWS)
def test_rows_in_another_order_are_taken_where_rows_are_the_unit(road: str) -> None:
    (batch,) = OF_ROWS[road](Sorting(order=lambda index: -index))
    drawn = batch[0][:ROWS]
    assert {tuple(row.flatten().tolist()) for row in drawn} == {
        tuple(row.flatten().tolist()) for row in samples(ROWS)[0]
    }


def alike(*, apart: bool) -> tuple[Tensor, Tensor]:
    """Rows of which two are equal: of people with as many rows each, or one and another number."""
    inputs, targets = (part.clone() for part in samples(ROWS))
    sizes = Counter(IDS.tolist())
    first = next(row for row in range(ROWS) if sizes[int(IDS[row])] == 1)
    wanted = 12 if apart else 1
    other = next(row for row in range(ROWS) if sizes[int(IDS[row])] == wanted and row != first)
    inputs[other] = inputs[first]
    return inputs, targets


def copied(data: tuple[Tensor, Tensor], **options: Any) -> tuple[Any, ...]:
    settings: dict[str, Any] = {"groups": IDS, "rows_per_group": 50, **options}
    (batch,) = PoissonBatches(data, sample_rate=1.0, steps=1, **settings)
    return (batch.inputs.clone(), *batch[1:])


def test_copies_of_equal_rows_that_weigh_differently_are_refused() -> None:
    with pytest.raises(PrivacyError, match="hold the same"):
        accumulated(optimizer(sample_rate=1.0), copied(alike(apart=True)))


@pytest.mark.parametrize(
    "batch",
    [
        lambda: copied(samples(ROWS)),
        lambda: copied(alike(apart=False)),
        lambda: copied(alike(apart=True), group_weights="cap"),
        lambda: tuple(*PoissonBatches(alike(apart=True), sample_rate=1.0, steps=1, groups=IDS, rows_per_group=50)),
    ],
    ids=["all differ", "of one class", "one weight for all", "no copies"],
)
def test_copies_of_rows_that_say_how_they_weigh_are_taken(batch: Any) -> None:
    own = optimizer(sample_rate=1.0)
    accumulated(own, batch())
    assert own.accountant.ledger.units == {"person"}


@pytest.mark.parametrize("start", [0, 40])
def test_pieces_of_a_copy_weigh_by_their_place_in_the_draw(start: int) -> None:
    (batch,) = PoissonBatches(samples(ROWS), sample_rate=1.0, steps=1, groups=IDS, rows_per_group=50)
    copy = batch.inputs[start : start + 30].clone()
    found = [draws.find(piece) for piece in copy.split(10)]
    assert all(some.draw is not None for some in found)
    assert [some.start for some in found] == [start, start + 10, start + 20]


def test_rows_are_alike_where_they_compare_equal() -> None:
    rows = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [math.nan, 1.0], [math.nan, 1.0], [2.0, 1.0]])
    found = of_rows(rows)
    assert [found.index(one) for one in found] == [0, 0, 2, 2, 4]


def test_all_steps_are_about_the_same_people() -> None:
    own = optimizer()
    accumulated(own, a_draw())
    with pytest.raises(PrivacyError, match="other rows than those of the steps before"):
        accumulated(own, a_draw(groups=np.roll(IDS, 1)))
    assert len(own.accountant) == 1


def test_people_by_other_names_and_under_another_cap_are_the_same() -> None:
    own = optimizer()
    for options in ({}, {"groups": [f"{'zyx'[one % 3]}{one}" for one in IDS]}, {"rows_per_group": 2}):
        accumulated(own, a_draw(**options))
    assert len(own.accountant) == 3


class Wrapped(PoissonBatchSampler):
    """Hands out lists of its own."""

    def __iter__(self) -> Any:
        return map(list, super().__iter__())


@pytest.mark.parametrize("ids", [IDS, np.arange(ROWS) // 5], ids=["of many sizes", "of one size"])
def test_copies_of_lists_are_refused_whoever_was_drawn(ids: Any) -> None:
    dataset = TensorDataset(*samples(ROWS))
    sampler = Wrapped(len(set(ids.tolist())), sample_rate=1.0, steps=1, groups=ids, rows_per_group=5)
    (batch,) = DataLoader(dataset, batch_sampler=sampler, collate_fn=poisson_collate(dataset))
    own = optimizer(sample_rate=1.0, dataset_size=sampler.dataset_size)
    with pytest.raises(PrivacyError, match="own lists"):
        own.accumulate((*batch, torch.ones(ROWS, dtype=torch.bool)))


def test_copies_of_lists_are_taken_where_all_rows_weigh_alike() -> None:
    dataset = TensorDataset(*samples(ROWS))
    sampler = Wrapped(PEOPLE, sample_rate=1.0, steps=1, groups=IDS, rows_per_group=5, group_weights="cap")
    (batch,) = DataLoader(dataset, batch_sampler=sampler, collate_fn=poisson_collate(dataset))
    own = optimizer(sample_rate=1.0)
    accumulated(own, (*batch, torch.ones(len(batch[0]), dtype=torch.bool)))
    assert len(own.accountant) == 1
