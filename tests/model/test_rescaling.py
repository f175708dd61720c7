"""Weights that were trained before survive being wrapped."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from clipless_dp import DPLipModel, constraints, layers, losses, rescale_
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import rescaling


def trained_net(activation: nn.Module | None = None, convolution: bool = True) -> nn.Sequential:
    """Entries three times as large as fresh ones, and biases that count."""
    torch.manual_seed(0)
    between = nn.ReLU() if activation is None else activation
    first = [nn.Conv2d(1, 4, 3, padding=1), between, nn.MaxPool2d(2), nn.Flatten()] if convolution else [nn.Flatten()]
    net = nn.Sequential(*first, nn.Linear(36, 16), layers.GroupSort(2), nn.Linear(16, 5))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0)
    return net


def wrapped(net: nn.Module, shape: tuple[int, ...] = (1, 6, 6), **changes: object) -> DPLipModel:
    settings = {"input_norm": 100.0, "loss": losses.TauCrossEntropy(8.0), "constraint": constraints.Spectral()}
    return DPLipModel(net, input_shape=shape, **{**settings, **changes})


def test_rescaled_networks_predict_as_before_and_their_norms_are_within_the_limit() -> None:
    net = trained_net()
    inputs = torch.randn(64, 1, 6, 6)
    before = net(inputs).detach()
    model = wrapped(net, rescale=True)
    after = model(inputs).detach()
    factor = float(before.norm() / after.norm())
    # Rounding of three layers in float32.
    torch.testing.assert_close(factor * after, before, rtol=1e-3, atol=1e-3)
    assert factor > 8.0
    assert all(one.limit == 1.0 for one in model.constraints.values())
    assert model.lipschitz_constant() <= 1.001


def test_without_rescaling_biases_outweigh_the_shrunk_weights_and_a_warning_says_by_how_much() -> None:
    net = trained_net()
    inputs = torch.randn(64, 1, 6, 6)
    before = net(inputs).detach()
    with pytest.warns(UserWarning, match=r"0\.weight by [2-9].*rescale=True"):
        model = wrapped(net)
    after = model(inputs).detach()
    factor = float((before * after).sum() / after.square().sum())
    assert float((factor * after - before).norm() / before.norm()) > 0.1


def test_fresh_weights_raise_no_warning() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)))


def test_the_factor_is_returned_and_nothing_shrinks_twice() -> None:
    net = trained_net(convolution=False)
    inputs = torch.randn(8, 1, 6, 6)
    before = net(inputs).detach()
    factor = rescale_(net, (1, 6, 6), constraints.Spectral())
    # Float32 rounding.
    torch.testing.assert_close(factor * net(inputs), before, rtol=1e-4, atol=1e-4)
    # A certificate may see what rounding left.
    assert rescale_(net, (1, 6, 6), constraints.Spectral()) == pytest.approx(1.0, abs=1e-3)


def test_what_is_not_homogeneous_is_refused_and_left_as_it_was() -> None:
    net = trained_net(nn.Tanh())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match="homogeneous"):
        rescale_(net, (1, 6, 6), constraints.Spectral())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_constraints_that_turn_weights_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="directions"):
        rescale_(trained_net(), (1, 6, 6), constraints.Orthogonal())


def test_paths_of_different_factors_are_refused() -> None:
    net = nn.Sequential(layers.Residual(nn.Linear(6, 6)), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(5.0)
    with pytest.raises(ConfigurationError, match="rescal"):
        rescale_(net, (6,), constraints.Spectral())


def test_biases_left_as_they_are_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescaling, "_divide_", lambda *given: 1.0)
    net = trained_net()
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    assert rescale_(net, (1, 6, 6), constraints.Spectral()) == 1.0
    monkeypatch.setattr(rescaling, "_divide_", lambda *given: given[0][0].bias.mul_(3.0) is None or 1.0)
    with pytest.raises(ConfigurationError, match="another function"):
        rescale_(net, (1, 6, 6), constraints.Spectral())
