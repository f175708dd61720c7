"""The tightness report observes what per-sample gradients observe, advises what helps, and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    DPLipModel,
    InputError,
    LayerBounds,
    PrivacyError,
    RuleContext,
    constraints,
    layers,
    losses,
    register_rule,
)
from clipless_dp.rules import base
from tests.soundness.attack import observed, per_sample_gradients, wrap


def mixed_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        layers.ConvexPotentialConv2d(4),
        layers.GatedResidual(nn.Conv2d(4, 4, 3, padding=1)),
        nn.Flatten(),
        nn.Linear(4 * 36, 6),
        nn.PReLU(),
        nn.Linear(6, 3),
    )


def mixed_model() -> DPLipModel:
    return DPLipModel(mixed_net().double(), input_shape=(1, 6, 6), input_norm=2.0, loss=losses.TauCrossEntropy(4.0))


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def test_gradient_ratios_are_those_of_per_sample_gradients() -> None:
    model = mixed_model()
    inputs, targets = batch()
    bounds = model.sensitivity()
    largest: dict[str, float] = {}
    for sample, target in zip(inputs, targets, strict=True):
        for name, gradient in per_sample_gradients(model, sample, target).items():
            largest[name] = max(largest.get(name, 0.0), float(gradient.norm()))
    report = model.tightness((inputs, targets))
    found = {f"{layer.path}.{name}": ratio for layer in report.layers for name, ratio in layer.gradients.items()}
    expected = {name: norm / bounds.per_parameter[name] for name, norm in largest.items()}
    assert found == pytest.approx(expected, rel=1e-9)  # both in float64
    assert report.samples == 5
    assert 0.0 < report.total <= 1.0


def test_activations_and_cotangents_are_those_that_a_layer_sees() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    model = wrap(net, (4,), input_norm=2.0, cotangent_norm=1.5)
    sample = torch.tensor([[0.6, 0.0, 0.8, 0.0]], dtype=torch.float64)
    target = torch.tensor([[0.0, 0.3, 0.4]], dtype=torch.float64)
    first, last = model.tightness((sample, target)).layers
    assert first.largest_activation == pytest.approx(1.0)
    assert first.activation == pytest.approx(0.5)
    assert last.largest_cotangent == pytest.approx(0.5)
    assert last.cotangent == pytest.approx(1.0 / 3.0)
    hidden = net[0](sample).detach()
    assert last.largest_activation == pytest.approx(float(torch.relu(hidden).norm()))
    # Behind the first layer, before the ReLU that overwrites it.
    arriving = (target @ net[2].weight.detach()) * (hidden > 0)
    assert first.largest_cotangent == pytest.approx(float(arriving.norm()))


def test_nothing_is_changed_by_measuring() -> None:
    model = DPLipModel(
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)),
        input_shape=(3,),
        input_norm=1.0,
        loss=losses.TauCrossEntropy(),
    )
    inputs = torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 0.0, 0.0]])
    model.loss(model(inputs[:1]), torch.tensor([1])).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        model.tightness((inputs, torch.tensor([0, 7])))
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.nonfinite_samples) == 0
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


def advice_of(net: nn.Module, sample: Tensor, target: Tensor) -> list[str]:
    shape = tuple(sample.shape)
    report = wrap(net.double(), shape).tightness((sample.double()[None], target.double()[None]))
    return [layer.advice for layer in report.layers]


def test_each_kind_of_slack_gets_its_own_advice() -> None:
    unit = torch.eye(4)[0]
    layer = nn.Linear(4, 4, bias=False)
    assert advice_of(layer, unit, unit) == ["–"]
    (ball,) = advice_of(layer, 0.1 * unit, unit)
    assert ball.startswith("BallProjection(0.11) before")
    (gate,) = advice_of(layer, unit, 0.02 * unit)
    assert gate.startswith("CotangentGate(0.021) behind")
    pixel = torch.zeros(1, 7, 7)
    pixel[0, 3, 3] = 1.0
    (windows,) = advice_of(nn.Conv2d(1, 1, 5, bias=False), pixel, torch.eye(3)[:1].reshape(1, 1, 3).expand(1, 3, 3) / 3)
    assert "coverage 9" in windows


def test_a_gate_that_is_advised_lowers_the_bound_and_leaves_the_samples_gradients_alone() -> None:
    torch.manual_seed(1)
    first, last = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
    with torch.no_grad():
        first.weight.copy_(torch.diag(torch.tensor([9.0, 0.1, 0.1, 0.1, 0.1, 0.1])))
    inputs = torch.randn(8, 6, dtype=torch.float64)
    inputs[:, 0] = 0.0
    targets = torch.randn(8, 3, dtype=torch.float64)
    plain = wrap(nn.Sequential(first, nn.Identity(), last).double(), (6,))
    line = plain.tightness((inputs, targets)).layers[1]
    assert line.advice.startswith("BallProjection(")
    radius = float(line.advice.removeprefix("BallProjection(").split(")")[0])
    gated = wrap(nn.Sequential(first, layers.BallProjection(radius), last).double(), (6,))
    assert gated.sensitivity().per_parameter["2.weight"] < 0.1 * plain.sensitivity().per_parameter["2.weight"]
    for sample, target in zip(inputs, targets, strict=True):
        before, after = observed(plain, sample, target), observed(gated, sample, target)
        assert float(before["2.weight"].detach()) == pytest.approx(float(after["2.weight"].detach()), rel=1e-9)


def test_a_rule_that_understates_its_bound_is_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))

    class Amplifier(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return 3.0 * values

    @register_rule(Amplifier)
    def amplifier_rule(module: Amplifier, context: RuleContext) -> LayerBounds:
        return LayerBounds(output_norm=context.input_norm)

    model = wrap(nn.Sequential(Amplifier(), nn.Linear(3, 3)), (3,))
    with pytest.raises(PrivacyError, match=r"the input of 1.*observed 3.*above its bound 1"):
        model.tightness((torch.ones(1, 3), torch.ones(1, 3)))


def test_the_report_prints_a_line_for_each_use_of_a_layer() -> None:
    shared = nn.Linear(4, 4)
    model = wrap(nn.Sequential(shared, nn.ReLU(), shared), (4,), constraint=constraints.Spectral())
    report = model.tightness((torch.randn(2, 4), torch.randn(2, 4)))
    lines = str(report).splitlines()
    assert [layer.kind for layer in report.layers] == ["Linear", "Linear"]
    assert "what would help" in lines[0]
    assert len(lines) == 2 + 2 + 1
    assert "not private" in lines[-1]


def test_an_empty_batch_or_one_of_another_shape_is_refused() -> None:
    model = mixed_model()
    inputs, targets = batch()
    with pytest.raises(InputError, match="at least one sample"):
        model.tightness((inputs[:0], targets[:0]))
    with pytest.raises(InputError, match="expected inputs of shape"):
        model.tightness((inputs[:, :, :3], targets))


def test_a_network_of_frozen_parameters_has_an_empty_report() -> None:
    net = nn.Linear(3, 3).requires_grad_(False)
    report = wrap(net, (3,)).tightness((torch.ones(1, 3), torch.ones(1, 3)))
    assert report.layers == ()
    assert report.total == 0.0
