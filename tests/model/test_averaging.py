"""Averaged weights: the formula, the constraints, the way back, and what fit returns, evaluates and saves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipless_dp import (
    CheckpointError,
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    ReproducibleNoise,
    WeightAverage,
    constraints,
    evaluate,
    fit,
    losses,
)
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.training import plan
from tests.support import gated_model, power_cut, protected, samples

SETTINGS = {"noise_multiplier": 1.3, "sample_rate": 0.25, "dataset_size": 40, "accountant": "rdp", "sampling": "none"}
RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 6, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def orthogonal_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return DPLipModel(
        net, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(4.0), constraint=constraints.Orthogonal()
    )


BUILDS = pytest.mark.parametrize("build", [gated_model, orthogonal_model], ids=["gated", "orthogonal"])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_average_is_the_normalised_geometric_sum_of_the_weights(decay):
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    average = WeightAverage(model, decay)
    history = []
    for _ in range(6):
        optimizer.step()
        average.update()
        history.append(weights(model).double())
    shares = [decay ** (5 - index) for index in range(6)]
    expected = sum(share * values for share, values in zip(shares, history, strict=True)) / sum(shares)
    with average.applied():
        # Five float32 interpolations.
        torch.testing.assert_close(weights(model).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights(model).double(), history[-1])


def test_the_average_of_orthogonal_weights_is_projected_and_the_weights_come_back_bit_by_bit():
    model = orthogonal_model()
    optimizer = CliplessDPSGD(model, lr=0.1, noise=ReproducibleNoise(0), **SETTINGS)
    average = WeightAverage(model, 0.9)
    for _ in range(20):
        optimizer.step()
        average.update()
    before, bounds = weights(model), model.sensitivity().per_parameter

    def shortest(weight):
        return float(torch.linalg.svdvals(weight.detach().double()).min())

    mean = shortest(average.state_dict()["average"]["0.weight"])
    assert mean < 0.95, "or else the projection would show nothing"
    with average.applied():
        # Björck's iteration brings singular values near one, so what was lost of the length is nearly all regained.
        assert 1.0 - shortest(model.net.get_parameter("0.weight")) < 0.1 * (1.0 - mean)
        assert model.lipschitz_constant() <= 1.0 + 1e-9, "the limits, with the slack that certificates have"
    assert torch.equal(weights(model), before)
    assert model.sensitivity().per_parameter == bounds


def test_an_average_without_updates_changes_nothing():
    model = gated_model()
    before = weights(model)
    average = WeightAverage(model, 0.9)
    with average.applied():
        assert torch.equal(weights(model), before)
    average.apply_()
    assert torch.equal(weights(model), before)


@BUILDS
def test_fit_evaluates_saves_and_returns_the_average_and_keeps_the_last_weights(tmp_path, build, monkeypatch):
    path, data, test = tmp_path / "run.pt", samples(300), samples(60, seed=1)
    seen = []
    honest = WeightAverage.update

    def watching(average):
        honest(average)
        seen.append(weights(average.model))

    monkeypatch.setattr(WeightAverage, "update", watching)
    model = build()
    result = fit(model, data, validation=test, ema=0.8, checkpoint=path, reproducible_seed=3, **RUN)
    plain = build()
    without = fit(plain, data, reproducible_seed=3, **RUN)
    assert result.epsilon == without.epsilon, "averages are free"
    assert torch.equal(seen[-1], weights(plain)), "and do not touch the training"
    assert not torch.equal(weights(model), weights(plain))
    assert (result.history[-1].accuracy, result.history[-1].validation_loss) == evaluate(model, test)
    content = load_checkpoint(path)
    assert all(torch.equal(value, content["model"][name]) for name, value in model.net.state_dict().items())
    model.net.load_state_dict(result.last_weights, strict=False)
    assert torch.equal(weights(model), weights(plain))
    assert without.last_weights is None


@BUILDS
def test_a_resumed_average_equals_an_uninterrupted_one_bit_by_bit(tmp_path, build):
    data, path = samples(300), tmp_path / "run.pt"
    settings = {**RUN, "reproducible_seed": 7, "ema": 0.9, "validation": samples(50, seed=1)}
    whole = build()
    expected = fit(whole, data, **settings)
    with power_cut(20):
        fit(build(), data, checkpoint=path, **settings)
    for _ in range(2):
        # The second time the run is finished already.
        resumed = build()
        result = fit(resumed, data, checkpoint=path, **settings)
        assert torch.equal(weights(whole), weights(resumed))
        assert protected(result.history) == protected(expected.history)
        assert all(torch.equal(result.last_weights[name], value) for name, value in expected.last_weights.items())


def test_a_checkpoint_of_another_average_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(gated_model(), samples(300), checkpoint=path, ema=0.9, **RUN)
    for ema in (None, 0.5):
        with pytest.raises(CheckpointError, match=r"ema: 0\.9 there"):
            fit(gated_model(), samples(300), checkpoint=path, ema=ema, **RUN)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused_before_calibration(monkeypatch, decay):
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", None)
    with pytest.raises(ConfigurationError, match="decay"):
        fit(gated_model(), samples(300), ema=decay, **RUN)


def test_states_of_other_networks_and_decays_are_refused():
    model = gated_model()
    average = WeightAverage(model, 0.9)
    average.update()
    state = average.state_dict()
    with pytest.raises(ConfigurationError, match="not the state"):
        WeightAverage(orthogonal_model(), 0.9).load_state_dict({**state, "average": {"0.weight": torch.zeros(1)}})
    with pytest.raises(ConfigurationError, match="not the state"):
        WeightAverage(gated_model(bias=False), 0.9).load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"decay 0\.9"):
        WeightAverage(model, 0.8).load_state_dict(state)
    with pytest.raises(ConfigurationError, match="not the state"):
        WeightAverage(model, 0.9).load_state_dict({})
