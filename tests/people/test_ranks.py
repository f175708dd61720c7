"""People on several ranks: nobody is on two of them, and all together are drawn as on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipless_dp import CliplessDPSGD, PoissonBatches, ReproducibleNoise, distributed
from clipless_dp.sampling import People
from clipless_dp.sampling.sampler import PoissonBatchSampler
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
    Mutant("by row", People, "rows_of", "self._codes % ranks", "np.arange(self.rows) % ranks").apply(monkeypatch)
    assert shared(People(IDS, ROWS))
