"""People on several ranks: nobody is on two of them, and all together are drawn as on one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clipless_dp import CliplessDPSGD, PoissonBatches, ReproducibleNoise, distributed, fit
from clipless_dp.distributed import placement
from clipless_dp.optim import accumulation
from clipless_dp.sampling import People
from clipless_dp.sampling.sampler import PoissonBatchSampler
from tests.distributed.test_sharding import model_of
from tests.people.test_drawing import IDS, PEOPLE, ROWS
from tests.ranks import Failure, Ranks, same_weights, weights
from tests.soundness.mutation import Mutant
from tests.support import gated_model, samples


def trained(other_ids: bool = False) -> tuple[torch.Tensor, list[set[int]], float]:
    rank = distributed.world().rank
    ids = np.roll(IDS, rank) if other_ids else IDS
    model = gated_model()
    optimizer = CliplessDPSGD(
        model, lr=0.5, noise=ReproducibleNoise(7), noise_multiplier=1.0, sample_rate=0.5, dataset_size=PEOPLE,
        unit="person",
    )  # fmt: skip
    batches = PoissonBatches(samples(ROWS), sample_rate=0.5, steps=3, seed=5, groups=ids, rows_per_group=4)
    drawn = [set(IDS[rows].tolist()) for rows in PoissonBatchSampler(
        PEOPLE, sample_rate=0.5, steps=3, seed=5, groups=ids, rows_per_group=4).draws()]  # fmt: skip
    for batch in batches:
        optimizer.zero_grad()
        optimizer.accumulate(batch)
        optimizer.step()
    return weights(model), drawn, optimizer.get_epsilon(1e-3)


@pytest.mark.slow
def test_ranks_train_on_people_of_their_own_as_one_process_does(ranks: Ranks) -> None:
    first, second = ranks.run(trained)
    alone = trained()
    assert same_weights(first[0], second[0])
    # Sums of the same rows in another order.
    torch.testing.assert_close(first[0], alone[0], rtol=1e-4, atol=1e-5)
    for one, other, both in zip(first[1], second[1], alone[1], strict=True):
        assert not one & other
        assert one | other == both
    assert first[2] == alone[2]


@pytest.mark.slow
def test_ranks_with_other_ids_are_refused(ranks: Ranks) -> None:
    answers = ranks.run(trained, True)
    assert all(isinstance(answer, Failure) and answer.kind == "RankError" for answer in answers)
    assert "ids of groups" in answers[0].message


def test_rows_of_a_person_in_two_ranks_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(whose: People) -> set[int]:
        one, other = (set(IDS[whose.rows_of(rank, 2)].tolist()) for rank in (0, 1))
        return one & other

    assert not shared(People(IDS, ROWS))
    Mutant("by row", People, "rows_of", "self.codes % ranks", "np.arange(self.rows) % ranks").apply(monkeypatch)
    assert shared(People(IDS, ROWS))


SIZES = np.array([1, 2, 4, 8] * 3)
DEALT = np.repeat(np.arange(12), SIZES)
"""Of two ranks the first one has people of one or four rows, the second one of two or eight."""


def trained_in_parts(kind: str | None, mutant: str = "") -> torch.Tensor:
    """Two steps on all people, without noise: what is left is the arithmetic."""

    def scale_(tensors: Any, deviations: Any, source: Any, factor: float = 1.0) -> None:
        torch._foreach_mul_(tensors, factor)

    model = model_of("gradient gates", kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "add_normal_", scale_)
        if mutant:
            patch.setattr(accumulation, "_of_all_classes", lambda spans, divisors: spans)
        if mutant == "and not compared":
            patch.setattr(accumulation, "agree", lambda fields, remedy: None)
        optimizer = CliplessDPSGD(
            model, lr=0.5, noise_multiplier=1.0, sample_rate=1.0, dataset_size=len(SIZES), unit="person"
        )
        batches = PoissonBatches(samples(len(DEALT)), sample_rate=1.0, steps=2, groups=DEALT, rows_per_group=8)
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            optimizer.accumulate(batch, micro_batch_size=(None, 2)[step])
            optimizer.step()
    return weights(model)


@pytest.mark.slow
def test_ranks_that_hold_parts_average_people_as_one_process_does(ranks: Ranks) -> None:
    alone = trained_in_parts(None)
    for found in ranks.run(trained_in_parts, "layers"):
        assert not isinstance(found, Failure), found.message
        assert same_weights(found, alone)


def test_ranks_that_divide_parts_by_other_numbers_are_refused_and_would_show(ranks: Ranks) -> None:
    answers = ranks.run(trained_in_parts, "layers", "own classes alone")
    assert all(isinstance(answer, Failure) and answer.kind == "RankError" for answer in answers)
    assert "divided by" in answers[0].message
    alone = trained_in_parts(None)
    for found in ranks.run(trained_in_parts, "layers", "and not compared"):
        assert isinstance(found, Failure) or not same_weights(found, alone)


def fitted_in_parts() -> tuple[set[str], float]:
    result = fit(
        model_of("gradient gates", "layers"), samples(len(DEALT)), groups=DEALT, rows_per_group=8, epsilon=8.0,
        delta=1e-3, epochs=2, batch_size=4, progress=False, accountant="rdp",
    )  # fmt: skip
    return result.optimizer.accountant.ledger.units, float(result.epsilon)


def test_fit_takes_people_where_each_rank_holds_a_part(ranks: Ranks) -> None:
    for found in ranks.run(fitted_in_parts):
        assert not isinstance(found, Failure), found.message
        assert found[0] == {"person"}
        assert found[1] <= 8.0
