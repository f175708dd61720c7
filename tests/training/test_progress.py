"""Signal over noise, layer by layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from clipless_dp import DPLipModel, FitResult, fit, gradient_gated, losses
from clipless_dp.training import constant, progress

SETTINGS: dict[str, Any] = {
    "epsilon": 3.0,
    "delta": 1e-4,
    "epochs": 3,
    "batch_size": 200,
    "progress": False,
    "audit": False,
    "reproducible_seed": 0,
}


def trained(scale: float, **options: Any) -> FitResult:
    """Without inputs, at scale 0, no gradient of these weights is anything but noise."""
    labels = torch.arange(1000) % 4
    inputs = scale * torch.eye(4, 32)[labels]
    net = gradient_gated(nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 4, bias=False)))
    model = DPLipModel(net, input_shape=(32,), input_norm=2.0, loss=losses.TauCrossEntropy())
    return fit(model, (inputs, labels), **{**SETTINGS, "lr": 0.1, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "scheduler": constant},
        {"momentum": 0.9},
        {"momentum": 0.5},
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=1.0), "scheduler": constant},
        {"momentum": 0.9, "noise_schedule": lambda step, steps: 1.5 if step < 7 else 0.7},
    ],
    ids=["plain", "momentum", "rates that change", "momentum that forgets nothing", "noise that changes"],
)
def test_weights_that_noise_alone_moves_have_a_ratio_of_one(options: dict[str, Any]) -> None:
    history = trained(0.0, **options).history
    assert len(history) == 3
    for record in history:
        assert record.signal_to_noise is not None
        # The root of a mean of 2048 squares, or of 256, is off by 0.016, or 0.045: four deviations.
        assert record.signal_to_noise["0"] == pytest.approx(1.0, abs=0.064)
        assert record.signal_to_noise["2"] == pytest.approx(1.0, abs=0.18)


@pytest.mark.parametrize("mutant", ["no momentum", "twice the noise", "no buffer from before"])
def test_a_wrong_account_of_the_noise_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = progress._Added.step

    def wrong(self: progress._Added, noise: float, rate: float, momentum: float) -> None:
        if mutant == "no buffer from before" and self.change == 0.0:
            self.velocity = 0.0
        factor = 4.0 if mutant == "twice the noise" else 1.0
        right(self, factor * noise, rate, 0.0 if mutant == "no momentum" else momentum)

    monkeypatch.setattr(progress._Added, "step", wrong)
    ratios = [record.signal_to_noise["0"] for record in trained(0.0, momentum=0.9).history]  # type: ignore[index]
    assert abs(ratios[-1] - 1.0) > 0.1


def test_a_signal_shows_in_the_ratio() -> None:
    first = trained(2.0, momentum=0.9).history[0].signal_to_noise
    assert first is not None
    assert min(first.values()) > 1.5


def test_it_is_not_known_of_a_momentum_that_grows() -> None:
    growing = trained(1.0, optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-3, momentum=1.1))
    assert {record.signal_to_noise for record in growing.history} == {None}


def test_it_is_not_known_of_adam() -> None:
    assert {record.signal_to_noise for record in trained(1.0, optimizer="adam").history} == {None}


def test_a_run_that_goes_on_counts_what_its_momentum_holds(tmp_path: Any) -> None:
    path = tmp_path / "run.pt"
    whole = trained(0.0, momentum=0.9, checkpoint=tmp_path / "whole.pt").history

    class Stop(Exception):
        pass

    def stop(record: Any) -> str:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipless_dp.training.loop._shown", stop)
        with pytest.raises(Stop):
            trained(0.0, momentum=0.9, checkpoint=path)
    history = trained(0.0, momentum=0.9, checkpoint=path).history
    # Initial weights differ, and so does the rounding.
    assert history[0].signal_to_noise == pytest.approx(whole[0].signal_to_noise, rel=1e-5)
    for record in history:
        assert record.signal_to_noise["0"] == pytest.approx(1.0, abs=0.064)  # type: ignore[index]


def test_copies_of_a_record_keep_it() -> None:
    record = trained(0.0).history[0]
    for copied in (copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert copied.signal_to_noise == record.signal_to_noise
        assert "signal_to_noise" in repr(copied)
