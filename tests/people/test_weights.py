"""A row weighs what it was drawn with, whatever is vouched for and however a batch came about; else it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from clipless_dp import ConfigurationError, PoissonBatches, PoissonBatchSampler, PrivacyError, poisson_collate
from clipless_dp.sampling import StreamedBatches
from tests.people.test_drawing import IDS, PEOPLE, ROWS, a_draw, accumulated, optimizer, passed_by_hand
from tests.support import samples


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


def test_rows_at_full_weight_that_are_vouched_for_stay_a_matter_of_rows() -> None:
    own = optimizer(unit="row", sampling="none")
    inputs, targets = samples(ROWS)
    passed_by_hand(own, (inputs, targets, targets == targets))
    assert len(own.accountant) == 1


class Sorting(Dataset[Any]):
    """As one over a file is, of which several rows are read in ascending order only."""

    def __init__(self, returned: int = 0) -> None:
        self.inputs, self.targets = samples(ROWS)
        self.returned = returned

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        read = [self[index] for index in sorted(indices)]
        return read[: len(read) - self.returned] if len(indices) > 1 else read


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
@pytest.mark.parametrize("kind", [Sorting, lambda: TensorDataset(*samples(ROWS))], ids=["sorting", "in order"])
def test_people_weigh_one_in_whatever_order_a_data_set_returns_their_rows(road: str, kind: Any) -> None:
    total = weighed(ROADS[road](kind()))
    assert len(total) == PEOPLE
    # Sums of at most a dozen numbers.
    assert all(weight <= 1.0 + 1e-12 for weight in total.values())
    assert sum(total.values()) > 0.9 * PEOPLE


@pytest.mark.slow
def test_people_weigh_one_in_whatever_order_a_worker_reads_their_rows() -> None:
    assert max(weighed(loaded(Sorting(), workers=1)).values()) <= 1.0 + 1e-12


@pytest.mark.parametrize("road", ["streamed", "a loader"])
def test_a_data_set_that_returns_fewer_rows_than_were_asked_for_is_refused(road: str) -> None:
    with pytest.raises(ConfigurationError, match="were asked for"):
        weighed(ROADS[road](Sorting(returned=1)))
