"""The cotangent's ℓ1 norm, carried beside the Euclidean one through layers of distances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, UnsupportedModuleError, layers, losses
from clipless_dp.errors import LossBoundError
from clipless_dp.layers import DistanceLinear, SortLinear, distance
from clipless_dp.model import wrapped
from clipless_dp.rules import distance as distance_rules
from clipless_dp.rules import linear
from clipless_dp.testing import BoundBroken, add_or_remove_one
from tests.soundness.mutation import Mutant

Build = Callable[[], nn.Sequential]

SLACK = 1e-6


def wrap(net: nn.Module, entries: int, loss: losses.Loss | None = None, *, input_norm: float = 3.0) -> DPLipModel:
    chosen = losses.TauCrossEntropy(50.0) if loss is None else loss
    return DPLipModel(net.double(), input_shape=(entries,), input_norm=input_norm, loss=chosen)


def sorts(*sizes: int, quantile: float = 0.5) -> nn.Sequential:
    return nn.Sequential(*[SortLinear(n, m, quantile) for n, m in itertools.pairwise(sizes)])


def distances(*sizes: int, p: float = math.inf, mean: bool = False) -> nn.Sequential:
    return nn.Sequential(*[DistanceLinear(n, m, p=p, mean=mean) for n, m in itertools.pairwise(sizes)])


@pytest.mark.parametrize("build", [sorts, distances, lambda *s: distances(*s, p=8.0, mean=True)])
@pytest.mark.parametrize("input_norm", [1e-3, 1e6])
def test_the_bound_is_the_same_at_every_depth_whatever_weights_widths_and_inputs_are(
    build: Callable[..., nn.Sequential], input_norm: float
) -> None:
    for depth in (1, 5, 40):
        net = build(6, *[3 + (7 * layer) % 5 for layer in range(depth - 1)], 4)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1e4).add_(17.0)
        found = wrap(net, 6, input_norm=input_norm).sensitivity()
        bounds = list(found.per_parameter.values())
        assert max(bounds) <= 2.0 * (1.0 + SLACK)
        assert bounds[-1] == pytest.approx(math.sqrt(2.0), rel=1e-6)
        assert found.total <= 2.0 * math.sqrt(2.0 * depth) * (1.0 + SLACK)


def test_nothing_of_the_weights_is_read_so_that_the_bound_holds_for_all_of_them() -> None:
    model = wrap(sorts(5, 6, 3), 5)
    assert model._tracker.evaluate({}, "add-or-remove-one")[1] == set()


def test_a_p_norm_grows_the_bound_by_its_own_factor_a_layer_and_a_mean_by_none() -> None:
    plain = wrap(distances(6, 5, 4, p=8.0), 6).sensitivity().per_parameter
    means = wrap(distances(6, 5, 4, p=8.0, mean=True), 6).sensitivity().per_parameter
    assert plain["0.bias"] == pytest.approx(2.0 * 5 ** (1 / 8), rel=1e-6)
    assert plain["0.weight"] == pytest.approx(2.0 * 5 ** (1 / 8), rel=1e-6)
    assert means["0.bias"] == pytest.approx(2.0, rel=1e-6)
    assert means["0.weight"] == pytest.approx(2.0 * 6 ** (-1 / 8), rel=1e-6)


def test_through_a_linear_layer_the_smaller_of_its_column_sums_and_its_euclidean_norm_is_taken() -> None:
    net = nn.Sequential(SortLinear(3, 2), nn.Linear(2, 2, bias=False), SortLinear(2, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.5, 0.5], [0.5, -0.5]]))
    found = wrap(net, 3).sensitivity().per_parameter
    # ‖Wᵀg‖₁ ≤ 1·2, ‖Wᵀg‖₂ ≤ 2/√2.
    assert found["0.bias"] == pytest.approx(math.sqrt(2.0), rel=1e-6)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert wrap(net, 3).sensitivity().per_parameter["0.bias"] == pytest.approx(6.0, rel=1e-6)


def test_networks_without_such_layers_have_neither_another_gate_nor_other_bounds() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    model = wrap(net, 4)
    assert model._cotangent_norm_l1 is None
    sweep = model._tracker._sweep({})
    sweep.sensitivity("add-or-remove-one")
    assert not sweep._pairs
    assert sweep._cotangents


def opposed() -> DPLipModel:
    """Two layers in which both scores hang on one hidden neuron, with opposite signs."""
    net = distances(3, 2, 2)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        net[0].bias.zero_()
        net[1].weight.copy_(torch.tensor([[-99.0, 0.0], [99.0, 0.0]]))
        net[1].bias.copy_(torch.tensor([-200.0, 0.0]))
    return wrap(net, 3)


def test_a_constructed_sample_attains_the_bound_of_an_inner_layer() -> None:
    model = opposed()
    sample, label = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    model.loss(model(sample), label).backward()
    bounds = model.sensitivity().per_parameter
    for name in ("0.weight", "1.weight", "1.bias"):
        ratio = float(model.net.get_parameter(name).grad.norm()) / bounds[name]
        assert 0.999 <= ratio <= 1.0 + SLACK


NETWORKS: dict[str, Build] = {
    "order statistics": lambda: sorts(5, 6, 6, 4),
    "distances": lambda: distances(5, 6, 4),
    "p = 4": lambda: distances(5, 6, 4, p=4.0),
    "means, p = 4": lambda: distances(5, 6, 4, p=4.0, mean=True),
    "a linear layer between": lambda: nn.Sequential(*sorts(5, 6), nn.Linear(6, 6), *sorts(6, 4)),
    "activations between": lambda: nn.Sequential(
        *sorts(5, 6), nn.ReLU(), layers.MaxMin(), *sorts(6, 6), layers.Householder(6), *distances(6, 4)
    ),
    "a gate between": lambda: nn.Sequential(*sorts(5, 6), layers.CotangentGate(0.5, "normalize"), *sorts(6, 4)),
}


def neighbours(net: nn.Module, loss: losses.Loss | None = None, *, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (6,), generator=generator)
    return add_or_remove_one(wrap(net, 5, loss), inputs, labels)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sample_more_or_less_moves_the_sums_by_no_more_than_the_bounds(name: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        net = NETWORKS[name]()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(10.0 ** (seed % 3 - 1))
        assert neighbours(net, seed=seed) > 0.05


def test_a_sample_more_or_less_moves_some_sum_by_nearly_its_bound() -> None:
    inputs = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]], dtype=torch.float64)
    assert add_or_remove_one(opposed(), inputs, torch.tensor([0, 0])) >= 0.9


class Overstated(losses.Loss):
    """A loss whose cotangents are far larger than what it states of their ℓ1 norm."""

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        return 100.0 * output.sum(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        return 1.0

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        return 1.0


def mirrored() -> nn.Sequential:
    """All four scores rise with one hidden neuron."""
    net = distances(5, 3, 4)
    with torch.no_grad():
        net[0].weight.zero_()[0, 0] = -9.0
        net[1].weight.zero_()[:, 0] = -99.0
    return net


def test_a_loss_that_oversteps_its_l1_bound_is_scaled_to_it() -> None:
    assert neighbours(mirrored(), Overstated()) >= 0.9


def test_a_loss_without_such_a_gate_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapped, "cotangent_gate_l1", lambda values, limit: values)
    with pytest.raises(BoundBroken):
        neighbours(mirrored(), Overstated())


@pytest.mark.parametrize("bound", [0.0, math.nan, -1.0, "2"])
def test_an_l1_bound_that_is_none_is_refused(bound: object) -> None:
    loss = losses.TauCrossEntropy()
    loss.gradient_bound_l1 = lambda shape: bound  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(LossBoundError, match="gradient_bound_l1"):
        wrap(sorts(4, 3), 4, loss)


def stretching() -> nn.Sequential:
    net = nn.Sequential(*distances(5, 3), nn.Linear(3, 3, bias=False), *distances(3, 4))
    with torch.no_grad():
        net[1].weight.copy_(5.0 * torch.eye(3))
        net[0].weight.zero_()[0, 0] = -9.0
        net[2].weight.zero_()[:, 0] = torch.tensor([-99.0, 99.0, -99.0, 99.0])
    return net


def even() -> nn.Sequential:
    """Scores of p-norms of a hidden layer all of whose neurons are alike: each is one entry of the layer before."""
    net = distances(5, 3, 8, 4, p=2.0)
    with torch.no_grad():
        net[0].weight.fill_(-9.0)
        net[1].weight.zero_()[:, 0] = -9999.0
        net[1].bias.fill_(-10000.0)
        net[2].weight.fill_(-999.0)[::2] = 999.0
    return net


def alternating() -> nn.Sequential:
    """Scores rise and fall with one hidden neuron."""
    net = mirrored()
    with torch.no_grad():
        net[1].weight[::2, 0] = 99.0
    return net


MUTANTS: list[tuple[Mutant, Build]] = [
    (
        Mutant(
            "ℓ1 through a Linear without its column sums",
            linear,
            "linear_rule",
            "lipschitz_inf=stretch",
            "lipschitz_inf=1.0",
        ),
        stretching,
    ),
    (
        Mutant("n^{1/p} forgotten", distance_rules, "distance_rule", "entries ** (1.0 / p) * _ROUNDING", "1.0"),
        even,
    ),
    (
        Mutant(
            "the batch's mean kept",
            distance._MaximumNorm,
            "_biased",
            "return values if",
            "values = values - values.mean(0)\n    return values if",
        ),
        lambda: distances(5, 6, 4),
    ),
    (
        Mutant("ℓ1 halved", distance_rules, "_bounds", "lipschitz_inf=most", "lipschitz_inf=0.5 * most"),
        alternating,
    ),
]


@pytest.mark.parametrize(("mutant", "build"), MUTANTS, ids=lambda value: getattr(value, "name", ""))
def test_neighbouring_data_catch(mutant: Mutant, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = build()
    for seed in range(4):
        neighbours(net, seed=seed)
    mutant.apply(monkeypatch)
    with pytest.raises(BoundBroken):
        _ = [neighbours(net, seed=seed) for seed in range(4)]


class Shifted(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values - values.mean(0)


@pytest.mark.parametrize("between", [nn.BatchNorm1d(4, affine=False), Shifted()])
def test_a_shift_by_the_batchs_mean_is_refused(between: nn.Module) -> None:
    with pytest.raises(UnsupportedModuleError, match=r"batch|mean"):
        wrap(nn.Sequential(DistanceLinear(5, 4), between, DistanceLinear(4, 3)), 5)


def test_an_exponent_below_two_is_refused_wherever_it_was_set() -> None:
    layer = DistanceLinear(5, 4)
    layer.p = 1.5
    with pytest.raises(UnsupportedModuleError, match="at least 2"):
        wrap(layer, 5)
