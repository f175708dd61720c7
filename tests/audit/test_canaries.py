"""Canaries among a user's own data: silent on honest training, loud on less noise than is charged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    InputError,
    PoissonBatches,
    audit,
    fit,
    gated,
    losses,
    report,
)
from tests.audit.mutants import ScaledNoise
from tests.support import gated_model, samples

DELTA = 1e-5
CERTAIN = 1.0 - 1e-6
"""Correct code must not fail by luck."""
ENTRIES = 700


class TenthOfTheNoise(ScaledNoise):
    factor = 0.1


def wide_model() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(ENTRIES, 4, bias=False))
    return DPLipModel(gated(net), input_shape=(ENTRIES,), input_norm=1.0, loss=losses.MulticlassHinge(9.0))


def real_data(count: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(count, ENTRIES, generator=torch.Generator().manual_seed(1))
    return inputs, (inputs[:, 0] > 0).long()


def trained_with(noise, epsilon: float = 1.0):
    def train(model, data):
        settings = {"epsilon": epsilon, "delta": DELTA, "epochs": 10, "batch_size": 150, "lr": 0.5, "momentum": 0.0}
        return fit(model, data, noise=noise, progress=False, accountant="rdp", **settings)

    return train


def test_honest_training_is_not_refuted():
    found = audit.canaries(trained_with(None), wide_model(), real_data(), delta=DELTA, canaries=600, confidence=CERTAIN)
    assert found.passed
    assert found.epsilon == found.trained.epsilon <= 1.0
    assert "not refuted" in str(found)
    assert "has spent ε = " in str(found)


@pytest.mark.parametrize("noise", [ScaledNoise, TenthOfTheNoise])
def test_mutant_caught_in_one_run_on_the_users_own_data(noise):
    found = audit.canaries(trained_with(noise()), wide_model(), real_data(), delta=DELTA, canaries=600)
    assert not found.passed, str(found)
    assert "REFUTED" in str(found)
    statement = report(found.trained.optimizer, delta=DELTA, audit=found)
    assert any("CanaryAudit" in finding for finding in statement.findings)


def test_coins_change_neither_the_size_of_the_data_nor_a_real_sample():
    inputs, targets = samples(50)
    seen = []

    def train(model, data):
        seen.append(data)
        return trained_with_optimizer(model, data)

    audit.canaries(train, gated_model(), (inputs, targets), delta=DELTA, canaries=200)
    (data,) = seen
    assert len(data[0]) == len(data[1]) == 250
    assert torch.equal(data[0][:50], inputs)
    assert torch.equal(data[1][:50], targets)
    out = int(data[0][50:].isnan().any(1).sum())
    # Six standard deviations of 200 fair coins.
    assert abs(out - 100) < 6 * math.sqrt(50)
    assert 0 <= int(data[1].min()) <= int(data[1].max()) < 3


def trained_with_optimizer(model, data):
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.5, dataset_size=len(data[0]))
    for batch in PoissonBatches(data, sample_rate=0.5, steps=2):
        optimizer.zero_grad()
        optimizer.accumulate(batch)
        optimizer.step()
    return optimizer


def test_a_loop_of_ones_own_is_audited_with_canaries_of_ones_own():
    inputs, targets = samples(40, seed=3)
    found = audit.canaries(
        trained_with_optimizer, gated_model(), samples(50), delta=DELTA, canaries=(inputs, targets), confidence=CERTAIN
    )
    assert found.passed
    assert found.canaries == 40
    with pytest.raises(InputError):
        audit.canaries(
            trained_with_optimizer, gated_model(), samples(50), delta=DELTA, canaries=(inputs[:, :3], targets)
        )


class Pairs(torch.utils.data.Dataset):
    """Rows and labels as Python numbers."""

    def __init__(self, count: int) -> None:
        self.inputs, self.targets = samples(count)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], int(self.targets[index])


def test_data_sets_and_tokens_take_canaries():
    settings = {"epsilon": 3.0, "delta": DELTA, "epochs": 1, "batch_size": 40, "progress": False, "accountant": "rdp"}

    def train(model, data):
        return fit(model, data, **settings)

    assert audit.canaries(train, gated_model(), Pairs(50), delta=DELTA, canaries=50, confidence=CERTAIN).passed
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    model = DPLipModel(gated(net), input_shape=(2,), loss=losses.TauCrossEntropy())
    tokens = torch.randint(5, (50, 2)), torch.randint(2, (50,))
    assert audit.canaries(train, model, tokens, delta=DELTA, canaries=50, confidence=CERTAIN).passed


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"canaries": 20}, "at least 30"),
        ({"delta": 1.0}, "delta must lie"),
        ({"confidence": 0.3}, "confidence"),
        ({"train": lambda model, data: model}, "train must train"),
        ({"train": lambda model, data: trained_with_optimizer(gated_model(), data)}, "train must train"),
        ({"dataset": (samples(5)[0], torch.zeros(5, 7))}, "no usual targets"),
    ],
)
def test_what_cannot_be_audited_is_refused(wrong, words):
    settings = {
        "train": trained_with_optimizer,
        "model": gated_model(),
        "dataset": samples(50),
        "delta": DELTA,
        **wrong,
    }
    with pytest.raises(ConfigurationError, match=words):
        audit.canaries(**settings)


@pytest.mark.parametrize(
    "asked",
    [True, 100.0, None, "100", {"x": 1, "y": 2}, (torch.zeros(40, 6),)],
    ids=lambda asked: type(asked).__name__,
)
def test_what_are_no_canaries_is_refused_in_words(asked):
    with pytest.raises(ConfigurationError, match="whole number, or a tuple"):
        audit.canaries(lambda model, data: None, gated_model(), samples(50), delta=DELTA, canaries=asked)
