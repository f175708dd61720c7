"""Weights that were trained before survive being wrapped."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clipless_dp import DPLipModel, constraints, layers, losses, rescale_
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import BallProjection
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


def small(*between: nn.Module, biases: bool = True) -> nn.Sequential:
    """Weights of norm above 1 around some layers, for inputs ``(B, 1, 6, 6)`` that are flattened behind them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=biases), *between, nn.Flatten(), nn.LazyLinear(3, biases))
    net(torch.zeros(1, 1, 6, 6))
    with torch.no_grad():
        for layer in (net[0], net[-1]):
            layer.weight.mul_(4.0)
    return net


KEPT = {
    "identity": nn.Identity, "ReLU": nn.ReLU, "LeakyReLU": lambda: nn.LeakyReLU(0.3), "GroupSort": layers.GroupSort,
    "MaxMin": layers.MaxMin, "halves": lambda: layers.MaxMin(pairing="halves"), "absolute": layers.AbsoluteValue,
    "order 2": lambda: layers.Householder(4, order=2), "FullSort": layers.FullSort, "centering": layers.LayerCentering,
    "maxima": lambda: nn.MaxPool2d(2, padding=1), "averages": lambda: nn.AvgPool2d(3, padding=1),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(2), "scaled": lambda: layers.ScaledAvgPool2d(2),
    "dropout": lambda: nn.Dropout(0.5), "shuffle": lambda: nn.PixelShuffle(2), "channels": lambda: nn.ChannelShuffle(2),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_parts_that_are_homogeneous_keep_the_function_at_any_size_of_the_input(name: str, scale: float) -> None:
    net = small(KEPT[name]()).eval()
    inputs = scale * torch.randn(20, 1, 6, 6)
    before = net(inputs).detach()
    factor = rescale_(net, (1, 6, 6), constraints.Spectral())
    assert factor > 2.0
    # Rounding of three layers in float32, of the largest output.
    assert float((factor * net(inputs).detach() - before).abs().max()) < 1e-5 * float(before.abs().max())


def test_angles_are_no_biases_and_stay() -> None:
    net = small(layers.Householder(4))
    with torch.no_grad():
        net[1].theta.uniform_(-2.0, 2.0)
    angles, inputs = net[1].theta.clone(), torch.randn(20, 1, 6, 6)
    before = net(inputs).detach()
    factor = rescale_(net, (1, 6, 6), constraints.Spectral())
    assert torch.equal(net[1].theta, angles)
    # Rounding of three layers in float32.
    torch.testing.assert_close(factor * net(inputs), before, rtol=1e-4, atol=1e-4)


REFUSED = {
    "tanh that is linear there": nn.Tanh, "a ball": lambda: BallProjection(1e6),
    "a sphere": lambda: layers.SphereScaling(1.0), "a spline": lambda: layers.LinearSpline(4, reach=1e6),
    "L2 pooling": lambda: layers.L2NormPool2d(2), "a norm with a floor": lambda: layers.SampleGroupNorm(2, floor=1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_parts_with_a_size_of_their_own_are_refused_by_name_even_where_random_rows_do_not_show_it(name: str) -> None:
    part = REFUSED[name]()
    net = small(part)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match=f"1 is a {type(part).__name__}.*use ReLU"):
        rescale_(net, (1, 6, 6), constraints.Spectral())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_functions_are_known_by_their_rules() -> None:
    class Net(nn.Module):
        def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
            super().__init__()
            self.first, self.last, self.function = nn.Linear(6, 8), nn.Linear(16, 3), function

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            values = 2.0 * self.function(self.first(values)).abs()
            return self.last(torch.cat([values, -values / 3.0], 1))

    def made(function: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
        torch.manual_seed(0)
        net = Net(function)
        with torch.no_grad():
            net.first.weight.mul_(1e-6)
            net.last.weight.mul_(1e7)
        return net

    assert rescale_(made(torch.relu), (6,), constraints.Spectral()) > 1e6
    with pytest.raises(ConfigurationError, match=r"tanh.*not known"):
        rescale_(made(torch.tanh), (6,), constraints.Spectral())


def test_weights_that_a_layer_is_not_linear_in_are_not_divided() -> None:
    net = nn.Sequential(layers.ConvexPotential(6), nn.Linear(6, 3))
    with torch.no_grad():
        net[1].weight.mul_(5.0)
    assert rescale_(net, (6,), constraints.Spectral()) > 1.0
    with torch.no_grad():
        net[0].weight.mul_(1.5)
    with pytest.raises(ConfigurationError, match="ConvexPotential, which is not linear in it"):
        rescale_(net, (6,), constraints.Spectral())


def test_each_layer_keeps_its_own_mode() -> None:
    net = small(nn.Dropout(0.5), nn.Dropout(0.5)).train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    rescale_(net, (1, 6, 6), constraints.Spectral())
    assert [module.training for module in net.modules()] == modes == [True, True, False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constraints_that_turn_weights_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigurationError, match="directions"):
        rescale_(trained_net().to(dtype), (1, 6, 6), constraints.Orthogonal())


def own_part(outputs: torch.Tensor) -> torch.Tensor:
    """What a last bias does not hide."""
    return outputs - outputs.mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last_bias", [0.0, 1e6])
def test_weights_of_either_type_compute_the_same_function_at_any_size_of_the_input_and_of_the_last_bias(
    dtype: torch.dtype, last_bias: float
) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
        with torch.no_grad():
            net[0].weight.mul_(10.0)
            net[2].bias.add_(last_bias)
        inputs = torch.randn(50, 4, dtype=torch.float64)
        before = copy.deepcopy(net).double().requires_grad_(False)
        factor = rescale_(net, (4,), constraints.Spectral())
        after = copy.deepcopy(net).double().requires_grad_(False)
        assert factor > 3.0
        for scale in (1e-6, 1.0, 1e6):
            expected, found = before(scale * inputs), factor * after(scale * inputs)
            # Rounding of each weight, and of the sum of an output in float64.
            rounding = 100.0 * torch.finfo(dtype).eps * float(own_part(expected).norm()) + 1e-13 * (1.0 + last_bias)
            assert float((own_part(found) - own_part(expected)).norm()) <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_large_last_bias_does_not_hide_another_function(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, share: float
) -> None:
    """Half of what the weights were divided by is another function, and all of it the same, next to a bias of 1e6."""
    divide = rescaling._divide_

    def partly(net: nn.Module, *given: Any) -> float:
        factor = divide(net, *given)
        net[0].weight.mul_(share)
        return factor

    monkeypatch.setattr(rescaling, "_divide_", partly)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        net[0].weight.mul_(10.0)
        net[2].bias.mul_(1e6)
    if share == 1.0:
        assert rescale_(net, (4,), constraints.Spectral()) > 3.0
    else:
        with pytest.raises(ConfigurationError, match="another function"):
            rescale_(net, (4,), constraints.Spectral())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_weights_within_their_limit_are_left_as_they_are(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    for layer in (net[0], net[2]):
        nn.init.orthogonal_(layer.weight)
    # A certificate may see what rounding left.
    assert rescale_(net, (6,), constraints.Orthogonal()) == pytest.approx(1.0, abs=1e-5)


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


def test_a_bias_that_is_no_number_is_named_and_not_taken_for_a_part_that_is_not_homogeneous() -> None:
    net = trained_net()
    with torch.no_grad():
        net[-1].bias[0] = torch.nan
    with pytest.raises(ConfigurationError, match=r"bias' holds a NaN"):
        rescale_(net, (1, 6, 6), constraints.Spectral())


def test_a_table_of_embeddings_is_told_that_spectral_projects_its_rows() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3))
    with torch.no_grad():
        net[0].weight[0].mul_(30.0)
    with pytest.raises(ConfigurationError, match="tables of embeddings"):
        rescale_(net, (5,), constraints.Spectral())
