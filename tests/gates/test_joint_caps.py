"""One cap for the gradients of a layer, or of the whole network, is never passed and is reached."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, PrivacyError, gradient_gated
from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.gates import gradient_gated_layer, parts
from clipless_dp.isolation import joint as joint_sums
from clipless_dp.losses.base import InnerProduct
from tests.soundness.attack import add_or_remove_one

LIMIT, FLOOR = 0.5, 0.01


class Tied(nn.Module):
    """One weight that is used twice, with a bias and without, and a parameter that no gate of its own knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.randn(5))
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(values))) * self.scale
        hidden = torch.nn.functional.linear(hidden, self.first.weight)
        return self.last(hidden)


class Attends(nn.Module):
    """A block of attention over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.last(self.block(values).mean(1))


class Recurs(nn.Module):
    """Whole sequences behind one operation."""

    def __init__(self, cell: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.cell, self.last = cell, nn.Linear(width, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.last(self.cell(values)[0].flatten(1))


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "tied": (Tied, (5,)),
    "attention": (Attends, (5, 4)),
    "recurrence": (lambda: Recurs(nn.GRU(3, 4, batch_first=True), 16), (4, 3)),
    "projected both ways": (
        lambda: Recurs(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2), 16),
        (4, 3),
    ),
    "maps": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
        ),
        (2, 6, 6),
    ),
    "signals": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), (2, 8)),
}


def wrapped(name: str, *, scale: float = 1.0, dtype: torch.dtype = torch.float64, **options: Any) -> DPLipModel:
    build, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = build().to(dtype)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(scale)
    options = {"limit": LIMIT, "floor": FLOOR, "isolation": "vmap", **options}
    loss = InnerProduct(1e6)
    return DPLipModel(gradient_gated(net, **options), input_shape=shape, loss=loss)


def samples(name: str, count: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = NETS[name][1]
    inputs = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randn(count, 3, generator=generator, dtype=torch.float64).to(dtype)


def gradients(model: DPLipModel, inputs: Tensor, targets: Tensor, size: float) -> dict[str, Tensor]:
    model.register.drop()
    model.loss(model(inputs), targets * size).backward()
    named = dict(model.net.named_parameters())
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    model.register.drop()
    return found


def ratios(found: dict[str, Tensor], sensitivity: Sensitivity) -> list[float]:
    """Of each set of parameters that is bounded together, and of all of them: observed over bound."""
    blocks = sensitivity.blocks(found)
    observed = [math.hypot(*(float(found[name].norm()) for name in members)) / bound for members, bound in blocks]
    return [*observed, math.hypot(*(float(value.norm()) for value in found.values())) / sensitivity.total]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("joint", ["layer", "network"])
@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_no_sample_passes_a_joint_cap_and_large_ones_reach_it(name: str, joint: str, mode: str) -> None:
    worst: list[float] = []
    for scale in (0.3, 3.0):
        model = wrapped(name, joint=joint, mode=mode, scale=scale)
        sensitivity = model.sensitivity()
        inputs, targets = samples(name, 2)
        for size in (1e-6, 1.0, 1e4):
            for index in range(len(inputs)):
                row = slice(index, index + 1)
                worst += ratios(gradients(model, inputs[row], targets[row], size), sensitivity)
    assert max(worst) <= 1.0 + 1e-9  # float64 rounding
    assert max(worst) >= 0.99


@pytest.mark.parametrize("name", [name for name in NETS if name != "tied"])
@pytest.mark.parametrize("joint", ["layer", "network"])
@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_the_sum_is_that_of_samples_scaled_by_one_factor_for_all_that_is_joint(
    name: str, joint: str, mode: str
) -> None:
    model, free = wrapped(name, joint=joint, mode=mode), wrapped(name, mode="clip", limit=1e8)
    inputs, targets = samples(name)
    for size in (1e-4, 1.0, 30.0):
        found = gradients(model, inputs, targets, size)
        expected = {key: torch.zeros_like(value) for key, value in found.items()}
        for index in range(len(inputs)):
            alone = gradients(free, inputs[index : index + 1], targets[index : index + 1], size)
            blocks = [members for members, _ in model.sensitivity().blocks(alone)]
            for members in blocks:
                norm = math.hypot(*(float(alone[key].norm()) for key in members))
                factor = min(1.0, LIMIT / norm) if mode == "clip" else LIMIT / max(norm, FLOOR * LIMIT)
                for key in members:
                    expected[key] += factor * alone[key]
        for key, value in found.items():
            # Norms by Gram matrices add about 1e-12; what cancels below a thousandth of its terms counts as larger.
            assert float((value - expected[key]).norm()) <= 1e-8 * max(1.0, float(expected[key].norm())), key


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("joint", ["layer", "network"])
def test_one_row_more_moves_the_sum_within_the_bounds_in_single_precision(name: str, joint: str) -> None:
    model = wrapped(name, joint=joint, dtype=torch.float32)
    sensitivity = model.sensitivity()
    inputs, targets = samples(name, dtype=torch.float32)
    add_or_remove_one(model, inputs, targets)
    whole, without = gradients(model, inputs, targets, 1e3), gradients(model, inputs[1:], targets[1:], 1e3)
    moved = {key: value - without[key] for key, value in whole.items()}
    # Sums of five samples at the cap round by 5·2^-23 of it.
    assert max(ratios(moved, sensitivity)) <= 1.0 + 1e-5


def test_the_sensitivity_of_a_network_is_its_joint_cap_whatever_the_number_of_parameters() -> None:
    network, layers, each = (wrapped("attention", joint=joint).sensitivity() for joint in ("network", "layer", None))
    # Rounding slack of sums over up to 24 entries and 28 norms in float32: about 1e-5.
    assert network.total == pytest.approx(LIMIT, rel=1e-4)
    parameters = len(each.per_parameter)
    assert each.total == pytest.approx(LIMIT * math.sqrt(parameters), rel=1e-4)
    assert layers.total == pytest.approx(LIMIT * math.sqrt(parameters / 2), rel=1e-4)  # all have a bias
    assert "together" in str(network)
    assert network.blocks(["last.bias"]) == [(["last.bias"], network.total)]


@pytest.mark.parametrize("name", ["linear", "tokens", "map", "transposed"])
@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_a_gated_layer_scales_weight_and_bias_by_one_factor(name: str, mode: str) -> None:
    torch.manual_seed(0)
    layer, shape = {
        "linear": (nn.Linear(4, 3), (4,)),
        "tokens": (nn.Linear(3, 4), (7, 3)),
        "map": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
        "transposed": (nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), (2, 4, 4)),
    }[name]
    layer = layer.double()
    gate = gradient_gated_layer(layer, LIMIT, mode=mode, joint="layer", floor=FLOOR)
    values = torch.randn(6, *shape, dtype=torch.float64)
    cotangents = torch.randn_like(layer(values)) * (10.0 ** torch.linspace(-5, 2, 6).double()).reshape(
        -1, *[1] * len(layer(values).shape[1:])
    )
    found = torch.autograd.grad(gate(values), list(layer.parameters()), cotangents)
    expected = [torch.zeros_like(parameter) for parameter in layer.parameters()]
    for index in range(6):
        row = slice(index, index + 1)
        alone = torch.autograd.grad(layer(values[row]), list(layer.parameters()), cotangents[row])
        norm = math.hypot(*(float(part.norm()) for part in alone))
        factor = min(1.0, LIMIT / norm) if mode == "clip" else LIMIT / max(norm, FLOOR * LIMIT)
        for total, part in zip(expected, alone, strict=True):
            total += factor * part
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= 1e-11 * max(1.0, float(other.norm()))


def test_traced_networks_have_joint_caps_of_layers() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    traced = DPLipModel(
        gradient_gated(net, limit=LIMIT, joint="layer", isolation="graph"),
        input_shape=(6,),
        input_norm=10.0,
        loss=InnerProduct(1e6),
    )
    sensitivity = traced.sensitivity()
    assert sensitivity.total == pytest.approx(LIMIT * math.sqrt(2.0), rel=1e-4)
    assert sensitivity.layers[0].sensitivity == pytest.approx(LIMIT, rel=1e-4)
    inputs, targets = samples("vectors")
    assert max(ratios(gradients(traced, inputs[:1], targets[:1], 1e3), sensitivity)) == pytest.approx(1.0, abs=1e-3)


def squares_forgotten(squares: Any) -> Tensor:
    """The largest in place of the root of the sum of squares."""
    return torch.stack([norms for norms, _ in squares]).amax(0)


def uses_forgotten(squares: Any) -> Tensor:
    return torch.stack([norms.square() for norms, _ in squares]).sum(0).sqrt()


@pytest.mark.parametrize(("wrong", "name"), [(squares_forgotten, "vectors"), (squares_forgotten, "attention")])
@pytest.mark.parametrize("joint", ["layer", "network"])
def test_a_wrong_norm_of_several_gradients_is_caught(
    wrong: Any, name: str, joint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(name, joint=joint)
    inputs, targets = samples(name, 1)
    monkeypatch.setattr(parts, "combined", wrong)
    assert max(ratios(gradients(model, inputs, targets, 1e3), model.sensitivity())) > 1.05


def test_uses_of_one_weight_that_add_up_are_within_the_cap_only_if_their_squares_count_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, values: Tensor) -> Tensor:
            return self.layer(values) + self.layer(values)

    model = DPLipModel(
        gradient_gated(Twice().double(), limit=LIMIT, joint="network"),
        input_shape=(4,),
        loss=InnerProduct(1e6),
    )
    inputs, targets = torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    assert ratios(gradients(model, inputs, targets, 1e3), model.sensitivity())[-1] == pytest.approx(1.0, abs=1e-4)
    monkeypatch.setattr(parts, "combined", uses_forgotten)
    assert ratios(gradients(model, inputs, targets, 1e3), model.sensitivity())[-1] > 1.4


def test_what_is_frozen_counts_for_no_joint_cap() -> None:
    model = wrapped("vectors", joint="network")
    inputs, targets = samples("vectors", 1)
    named = dict(model.net.named_parameters())
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight"):
        named[name].requires_grad_(False)
    found = gradients(model, inputs, targets, 1e3)
    assert found.keys() == {"3.bias"}
    assert float(found["3.bias"].norm()) == pytest.approx(LIMIT, rel=1e-9)


def test_a_backward_pass_that_ends_early_leaves_nothing_to_the_next_one() -> None:
    model, other = wrapped("vectors", joint="network"), wrapped("vectors", joint="network")
    inputs, targets = samples("vectors", 2)
    net: Any = model.net
    values = inputs.clone().requires_grad_(True)
    output = net(values)
    # To the inputs alone: the gates are passed, and what gathers their sums is not.
    torch.autograd.grad(output.sum() * 1e3, values, retain_graph=True)
    found = torch.autograd.grad((output * targets).sum() * 1e3, list(net.parameters()))
    expected = gradients(other, inputs, targets, 1e3)
    for one, name in zip(found, expected, strict=True):
        torch.testing.assert_close(one, expected[name], rtol=1e-9, atol=1e-12)
    assert joint_sums.Together(1.0, 1.0).sums(counted=False) == ({}, None)


def test_arguments_that_a_joint_cap_cannot_have_are_refused() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    with pytest.raises(ConfigurationError, match="bias_limit"):
        gradient_gated(net(), joint="layer", bias_limit=0.1)
    with pytest.raises(ConfigurationError, match="bias_limit"):
        gradient_gated(net(), joint="network", bias_limit=0.1)
    with pytest.raises(ConfigurationError, match="'network'"):
        gradient_gated(net(), joint="network", isolation="graph")
    with pytest.raises(ConfigurationError, match="all parameters"):
        gradient_gated(net(), joint="network", layers=["0"])
    with pytest.raises(ConfigurationError, match="joint"):
        gradient_gated(net(), joint="block", isolation="vmap")  # type: ignore[arg-type]
    isolated = gradient_gated(net(), joint="layer", isolation="vmap")
    with pytest.raises(ConfigurationError, match="joint"):
        gradient_gated(isolated, joint="network")
    with pytest.raises(ConfigurationError, match="whole layers"):
        gradient_gated(isolated, limit=2.0, layers=["*.weight"])


def test_a_weight_and_a_bias_that_part_are_refused() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.apart = nn.Linear(4, 3), False

        def forward(self, values: Tensor) -> Tensor:
            if not self.apart:
                return self.layer(values)
            return torch.nn.functional.linear(values, self.layer.weight) + self.layer.bias

    net = Parts()
    isolated = gradient_gated(net, joint="layer", isolation="vmap")
    isolated(torch.randn(2, 4))
    net.apart = True
    with pytest.raises(PrivacyError, match="used together"):
        isolated(torch.randn(2, 4))
