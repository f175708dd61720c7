"""Numbers that rules state: negative ones and such that are none are refused before anything is charged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accounting import create_accountant
from clipless_dp import CliplessDPOptimizer, DPLipModel, LayerBounds, UnsupportedModuleError, losses, register_rule
from clipless_dp.layers import SortLinear
from clipless_dp.rules import base, pooling
from tests.soundness.mutation import Mutant


class Scaled(nn.Module):
    """A layer of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, values: Tensor) -> Tensor:
        return values * 2.0 + self.weight - self.weight


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))


def wrap(net: nn.Module, entries: int) -> DPLipModel:
    return DPLipModel(net, input_shape=(entries,), input_norm=100.0, loss=losses.TauCrossEntropy(1.0))


def stated(**changes: Any) -> DPLipModel:
    """A model with a layer whose rule states these numbers, among layers of which ℓ1 norms are carried too."""
    told: dict[str, Any] = {
        "output_norm": 200.0, "lipschitz": 2.0, "gradients": {"weight": 1.0}, "lipschitz_inf": 2.0,
        "output_norm_inf": 9.0,
    }  # fmt: skip

    @register_rule(Scaled)
    def rule(module: Scaled, context: base.RuleContext) -> LayerBounds:
        return LayerBounds(**{**told, **changes})

    return wrap(nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 4), SortLinear(4, 3)), 4)


STATED: dict[str, Callable[[float], dict[str, Any]]] = {
    "output_norm": lambda bad: {"output_norm": bad},
    "lipschitz": lambda bad: {"lipschitz": bad},
    "lipschitz of each input": lambda bad: {"lipschitz": [bad]},
    "lipschitz_inf": lambda bad: {"lipschitz_inf": bad},
    "lipschitz_inf of each input": lambda bad: {"lipschitz_inf": (bad,)},
    "output_norm_inf": lambda bad: {"output_norm_inf": bad},
    "gradients": lambda bad: {"gradients": {"weight": bad}},
    "cotangent_cap": lambda bad: {"cotangent_cap": bad},
    "gradient_limits": lambda bad: {"gradient_limits": {"weight": bad}},
    "gradient_stretches": lambda bad: {"gradient_limits": {"weight": 1.0}, "gradient_stretches": {"weight": bad}},
    "joint_limits": lambda bad: {"joint_limits": [(("weight",), bad)]},
}


@pytest.mark.parametrize("bad", [-1.0, math.nan, -math.inf])
@pytest.mark.parametrize("name", STATED)
def test_a_negative_number_or_none_of_a_users_rule_is_refused(name: str, bad: float) -> None:
    with pytest.raises(UnsupportedModuleError, match=rf"1 \(Scaled\).*{name.split()[0]}"):
        stated(**STATED[name](bad))
    assert stated(**STATED[name](3.0)).sensitivity().total > 0.0


@pytest.mark.parametrize("name", ["lipschitz", "lipschitz_inf"])
@pytest.mark.parametrize("numbers", [(), (2.0, 0.0), [2.0, 2.0, 2.0]])
def test_fewer_or_more_factors_than_values_that_are_read_are_refused(name: str, numbers: Any) -> None:
    with pytest.raises(UnsupportedModuleError, match=rf"{len(numbers)} numbers for .*{name}.*reads 1 values"):
        stated(**{name: numbers})


@pytest.mark.parametrize("returned", [None, 2.0, (2.0, 3.0)])
def test_a_rule_that_returns_no_bounds_is_refused_in_words(returned: Any) -> None:
    register_rule(Scaled)(lambda module, context: returned)
    with pytest.raises(UnsupportedModuleError, match=r"return a LayerBounds"):
        wrap(nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 3)), 4)


@pytest.mark.parametrize("count", [-1, 0, 1.5, True, math.nan])
def test_a_count_that_is_no_number_of_times_is_refused(count: Any) -> None:
    with pytest.raises(UnsupportedModuleError, match="counts a sample"):
        stated(counted={"weight": count})


@pytest.mark.parametrize("name", ["output_norm", "lipschitz", "lipschitz_inf"])
def test_one_that_is_computed_later_is_refused_before_anything_is_charged(name: str) -> None:
    value = 2.0
    model = stated(**{name: lambda: value})
    ledger = create_accountant("rdp", dataset_size=10)
    optimizer = CliplessDPOptimizer(
        model, torch.optim.SGD(model.net.parameters(), lr=0.1),
        noise_multiplier=1.0, sample_rate=1.0, dataset_size=10, accountant=ledger,
    )  # fmt: skip
    value = -2.0
    with pytest.raises(UnsupportedModuleError, match=name):
        optimizer.step()
    assert len(ledger) == 0


class Two(nn.Module):
    """Two averages of one map, of which the other has a divisor below zero: their bounds add."""

    def __init__(self, side: int, divisor: int) -> None:
        super().__init__()
        self.first, self.second, self.side = SortLinear(6, side * side), SortLinear(1, 3), side
        self.mean, self.other = nn.AvgPool2d(side), nn.AvgPool2d(side, divisor_override=divisor)

    def forward(self, values: Tensor) -> Tensor:
        maps = self.first(values).unflatten(1, (1, self.side, self.side))
        return self.second((self.mean(maps) - self.other(maps)).flatten(1))


def largest_ratio(side: int, divisor: int) -> float:
    """Of any sample's gradient and its bound."""
    torch.manual_seed(0)
    model = wrap(Two(side, divisor).double(), 6)
    inputs, labels, largest = torch.rand(8, 6, dtype=torch.float64), torch.arange(8) % 3, 0.0
    bounds = model.sensitivity().per_parameter
    for row, label in zip(inputs.split(1), labels.split(1), strict=True):
        model.zero_grad()
        model.loss(model(row), label).sum().backward()
        found = {name: float(p.grad.norm()) for name, p in model.net.named_parameters() if p.grad is not None}
        largest = max(largest, *(found[name] / bounds[name] if bounds[name] else math.inf for name in found))
    return largest


@pytest.mark.parametrize(("side", "divisor"), [(8, -513), (4, -65), (2, -9), (2, -4), (2, -1), (4, 16)])
def test_no_gradient_passes_its_bound_behind_averages_of_negative_divisors(side: int, divisor: int) -> None:
    assert largest_ratio(side, divisor) <= 1.0 + 1e-9


def test_the_sum_of_signed_weights_in_place_of_absolute_ones_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = Mutant("signed weights", pooling, "_linear_bounds", "rows.detach().abs().max()", "rows.detach().max()")
    mutant.apply(monkeypatch)
    with pytest.raises(UnsupportedModuleError, match=r"AvgPool2d.*lipschitz_inf"):
        largest_ratio(8, -513)
    monkeypatch.setattr("clipless_dp.bounds.sweep.required_sizes", lambda bounds, *place, operands, own: bounds)
    assert largest_ratio(8, -513) > 100.0


@pytest.mark.parametrize("divisor", [-4, -1, 3])
def test_the_constant_of_a_signed_average_is_that_of_its_absolute_weights(divisor: int) -> None:
    def net(number: int) -> nn.Module:
        return nn.Sequential(
            SortLinear(4, 16), nn.Unflatten(1, (1, 4, 4)), nn.AvgPool2d(2, divisor_override=number), nn.Flatten(),
            SortLinear(4, 3),
        )  # fmt: skip

    found = wrap(net(divisor), 4).lipschitz_constant(norm="inf")
    assert found == pytest.approx(4.0 / abs(divisor), rel=1e-9)
    assert found == wrap(net(abs(divisor)), 4).lipschitz_constant(norm="inf")


def test_a_parameter_of_bound_zero_has_no_gradient_and_does_not_move() -> None:
    """Frozen zeros behind it: nothing of any sample comes to it, and it needs no noise."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.zero_()
    net[1].weight.requires_grad_(False)
    model = wrap(net, 3)
    bounds = model.sensitivity().per_parameter
    assert [bounds[name] for name in ("0.weight", "0.bias")] == [0.0, 0.0]
    assert all(bound > 0.0 for name, bound in bounds.items() if not name.startswith("0."))
    before = [p.detach().clone() for p in net[0].parameters()]
    for sample, label in itertools.product(torch.randn(5, 1, 3) * 50.0, (0, 1)):
        model.zero_grad()
        model.loss(model(sample), torch.tensor([label])).sum().backward()
        assert all(not bool(p.grad.any()) for p in net[0].parameters() if p.grad is not None)
    model.zero_grad()
    model.register.forget()
    optimizer = CliplessDPOptimizer(
        model, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1),
        noise_multiplier=1.0, sample_rate=1.0, dataset_size=10, accountant="rdp",
    )  # fmt: skip
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(net[0].parameters(), before, strict=True))
    assert "0.weight" not in optimizer.noise_deviations()
