"""What the runs of a search are compared by: one person, or one row, moves it by no more than what is charged."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from accounting import GaussianRelease, PrivateSelection
from clipless_dp import DPLipModel, evaluate, gated, losses, noise
from clipless_dp import search as search_module
from clipless_dp.sampling import People
from clipless_dp.search import Candidate, private_search
from tests.people.test_drawing import IDS, PEOPLE, ROWS
from tests.soundness.mutation import Mutant
from tests.support import gated_model, samples

TOLERANCE = 1e-12
"""Sums of some hundred shares in float64."""

IGNORED = -100


def score(model: DPLipModel, data: tuple[Tensor, Tensor], ids: Any = None) -> float:
    """What noise is added to, of some data."""
    trial = PrivateSelection(((GaussianRelease(1.0), 1),), 2.0, 1.0)
    whose = None if ids is None else People(ids, len(data[0]))
    return search_module._Search(
        [], data, 1, None, noise.SystemNoise(), trial, [], 1.0, whose
    )._hits(model)  # fmt: skip


def knowing() -> tuple[DPLipModel, Tensor, Tensor]:
    """A model, and rows with their predictions: right where they are taken for targets."""
    model = gated_model()
    inputs, _ = samples(ROWS)
    with torch.no_grad():
        return model, inputs, model.eval()(inputs).argmax(1)


def moved_by(leaving: int, *, right: bool) -> float:
    """By how much a person moves the score who is right throughout where the others are wrong, or the reverse."""
    model, inputs, predicted = knowing()
    theirs = torch.from_numpy(leaving == IDS)
    targets = torch.where(theirs == right, predicted, (predicted + 1) % 3)
    whole = score(model, (inputs, targets), IDS)
    return abs(whole - score(model, (inputs[~theirs], targets[~theirs]), IDS[~theirs.numpy()]))


LARGEST = int(np.bincount(IDS).argmax())


@pytest.mark.parametrize("right", [True, False], ids=["alone right", "alone wrong"])
def test_a_whole_person_moves_the_score_by_at_most_one_and_attains_it(right: bool) -> None:
    moved = [moved_by(person, right=right) for person in (LARGEST, int(np.bincount(IDS).argmin()))]
    assert max(moved) <= 1.0 + TOLERANCE
    assert max(moved) >= 1.0 - TOLERANCE if right else max(moved) <= TOLERANCE


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 30), min_size=5, max_size=9), seed=st.integers(0, 1000))
def test_whoever_leaves_takes_at_most_one_along(sizes: list[int], seed: int) -> None:
    model, _, _ = knowing()
    ids = np.repeat(np.arange(len(sizes)), sizes)
    inputs, targets = samples(len(ids), seed=seed)
    kept = ids != seed % len(sizes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "one person has", UserWarning)
        whole = score(model, (inputs, targets), ids)
        part = score(model, (inputs[kept], targets[kept]), ids[kept])
    assert -TOLERANCE <= whole - part <= 1.0 + TOLERANCE
    assert 0.0 <= whole <= len(sizes) + TOLERANCE


@pytest.mark.parametrize(
    "shares",
    ["right.mean() * self.people.count", "right.sum()", "right @ self.people.shares() * self.people.rows_per_group"],
    ids=["mean over rows", "sum over rows", "no mean"],
)
def test_mutants_of_the_score_are_seen(shares: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Mutant("shares", search_module._Search, "_hits", "right @ self.people.shares()", shares).apply(monkeypatch)
    assert max(moved_by(LARGEST, right=right) for right in (True, False)) > 1.0 + TOLERANCE


def sequences() -> tuple[DPLipModel, Tensor, Tensor]:
    """A tagger and sequences, in most of which no token counts."""
    torch.manual_seed(0)
    model = DPLipModel(
        gated(nn.Sequential(nn.Linear(4, 3))),
        input_shape=(5, 4),
        input_norm=3.0,
        loss=losses.TokenCrossEntropy(ignore_index=IGNORED),
    )
    inputs = torch.randn(60, 5, 4)
    with torch.no_grad():
        targets = model.eval()(inputs).argmax(2)
    targets[2:] = IGNORED
    targets[0] = (targets[0] + 1) % 3
    return model, inputs, targets


def accuracy_times_rows(model: DPLipModel, data: tuple[Tensor, Tensor]) -> float:
    accuracy, _ = evaluate(model, data)
    return float(round((accuracy or 0.0) * len(data[0])))


def test_a_sequence_moves_the_score_by_at_most_one_where_most_ask_for_no_prediction() -> None:
    model, inputs, targets = sequences()
    assert abs(score(model, (inputs, targets)) - 1.0) <= TOLERANCE
    for leaving in range(3):
        kept = torch.arange(60) != leaving
        assert abs(score(model, (inputs, targets)) - score(model, (inputs[kept], targets[kept]))) <= 1.0 + TOLERANCE
    kept = torch.arange(60) != 0
    moved = accuracy_times_rows(model, (inputs, targets)) - accuracy_times_rows(model, (inputs[kept], targets[kept]))
    assert abs(moved) > 2.0, "an accuracy is over the sequences that count, of which there may be few"


class Fixed(noise.SystemNoise):
    def standard_normal_(self, out: Tensor) -> Tensor:
        return out.fill_(2.0) if out.dtype == torch.float64 else super().standard_normal_(out)


def test_scores_of_people_are_noisy_sums_of_their_shares_and_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "noise_source", lambda _: Fixed())
    data = samples(ROWS)
    result = private_search(
        [Candidate(gated_model, {"epochs": 1, "batch_size": 12, "lr": 0.5})], data, score_noise_multiplier=5.0,
        epsilon=20.0, delta=1e-2, mean_runs=1.0, groups=IDS, rows_per_group=3,
    )  # fmt: skip
    ((event, _),) = result.accountant.ledger
    assert isinstance(event, PrivateSelection)
    ((choice, _),) = event.trial
    (*_, (release, times)) = choice.alternatives[0]
    assert (type(release), times) == (GaussianRelease, 1)
    assert release.noise_multiplier >= 5.0
    with torch.no_grad():
        right = (result.model.eval()(data[0]).argmax(1) == data[1]).double().numpy()
    means = [right[person == IDS].mean() for person in range(PEOPLE)]
    assert result.score == pytest.approx((sum(means) + 2.0 * release.noise_multiplier) / PEOPLE, rel=1e-5)
