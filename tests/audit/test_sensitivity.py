"""The attack on a user's own model: correct rules survive it, wrong ones are named, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipless_dp import (
    AuditError,
    ConfigurationError,
    DPLipModel,
    InputError,
    LayerBounds,
    PrivacyError,
    RuleContext,
    audit,
    constraints,
    fit,
    gated,
    layers,
    losses,
    register_rule,
)
from tests.support import gated_model, samples


class Doubling(nn.Module):
    """Multiplies by a number; its rule says that it does not."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values):
        return self.factor * values


@register_rule(Doubling)
def doubling_rule(module: Doubling, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm)


class Gain(nn.Module):
    """Multiplies by a learnt number, which its rule believes to stay 1 at most."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, values):
        return self.gain * values


@register_rule(Gain)
def gain_rule(module: Gain, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, gradients={"gain": context.input_norm})


class Mixing(nn.Module):
    """Subtracts the batch's mean, which no layer may."""

    def forward(self, values):
        return 0.5 * (values - values.mean(0, keepdim=True))


@register_rule(Mixing)
def mixing_rule(module: Mixing, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm)


def model_with(layer: nn.Module) -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 3))
    return DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


def convolutional() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), layers.GroupSort(2), nn.Flatten(), nn.Linear(16, 3))
    return DPLipModel(
        net, input_shape=(1, 6, 6), input_norm=2.0, loss=losses.MulticlassHinge(), constraint=constraints.Spectral()
    )


def tokens() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    return DPLipModel(gated(net), input_shape=(3,), loss=losses.TauCrossEntropy())


@pytest.mark.parametrize(
    "build",
    [gated_model, tokens, lambda: model_with(nn.ReLU()), pytest.param(convolutional, marks=pytest.mark.slow)],
)
def test_bounds_of_correct_rules_survive(build):
    model = build()
    report = audit.sensitivity(model)
    assert {line.name for line in report.parameters} == set(model.sensitivity().per_parameter)
    assert report.passed
    # The last bias sees the cotangent itself, whose gate caps it.
    assert 0.99 < report.worst <= 1.0 + 1e-9
    assert 0.0 < report.total <= 1.0 + 1e-9
    assert "parameter" in str(report)
    assert str(report.attempts) in str(report)


@pytest.mark.parametrize("factor", [2.0, 1.05])
def test_mutant_caught_a_rule_that_is_wrong(factor):
    with pytest.raises(AuditError, match=r"2\.weight") as caught:
        audit.sensitivity(model_with(Doubling(factor)))
    report = caught.value.report
    assert isinstance(report, audit.SensitivityAudit)
    assert report.worst > 1.0
    assert not report.passed
    assert isinstance(caught.value, PrivacyError)


def test_mutant_caught_a_layer_that_mixes_samples():
    with pytest.raises(AuditError, match="sample"):
        audit.sensitivity(model_with(Mixing()))


def test_mutant_caught_half_of_a_bound(monkeypatch):
    model = gated_model()
    honest = DPLipModel.sensitivity

    def halved(self, *rest):
        found = honest(self, *rest)
        return type(found)(
            {name: bound / 2 for name, bound in found.per_parameter.items()}, found.total, found.relation, found.layers
        )

    monkeypatch.setattr(DPLipModel, "sensitivity", halved)
    with pytest.raises(AuditError):
        audit.sensitivity(model)


def test_given_samples_are_tried_with_the_models_own_loss():
    model = gated_model()
    report = audit.sensitivity(model, samples(5), steps=0)
    assert report.attempts == audit.sensitivity(model, steps=0).attempts + 5
    with pytest.raises(InputError):
        audit.sensitivity(model, (torch.zeros(2, 9), torch.zeros(2)))
    with pytest.raises(ConfigurationError):
        audit.sensitivity(model, steps=-1)


def test_an_audit_changes_nothing():
    model = gated_model().train()
    inputs, targets = samples(4)
    model.loss(model(inputs), targets).backward()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.net.parameters()]
    dropped, random = int(model.nonfinite_samples), torch.get_rng_state()
    audit.sensitivity(model)
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.net.parameters(), gradients, strict=True))
    assert int(model.nonfinite_samples) == dropped
    assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(model.loss_function, losses.TauCrossEntropy)
    assert model.training


SETTINGS = {"epsilon": 3.0, "delta": 1e-3, "epochs": 3, "batch_size": 10, "progress": False, "accountant": "rdp"}


def test_fit_audits_before_training_and_at_checkpoints():
    result = fit(gated_model(), samples(40), audit=True, checkpoint_every=2, **SETTINGS)
    # Before training, after the second epoch, at the end.
    assert len(result.audits) == 3
    assert all(report.passed for report in result.audits)
    assert not fit(gated_model(), samples(40), **SETTINGS).audits


def test_audits_leave_a_reproducible_run_as_it_is():
    plain, audited = gated_model(), gated_model()
    settings = {**SETTINGS, "epochs": 1, "reproducible_seed": 3}
    fit(plain, samples(40), **settings)
    fit(audited, samples(40), audit=True, **settings)
    for one, other in zip(plain.net.parameters(), audited.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fit_does_not_start_on_a_wrong_bound():
    model = model_with(Doubling())
    before = [parameter.detach().clone() for parameter in model.net.parameters()]
    with pytest.raises(AuditError):
        fit(model, samples(40), audit=True, **SETTINGS)
    assert all(torch.equal(p, q) for p, q in zip(model.net.parameters(), before, strict=True))


def test_fit_stops_where_training_has_made_a_bound_wrong_and_does_not_go_on(tmp_path):
    model = model_with(Gain())
    audit.sensitivity(model)
    settings = {**SETTINGS, "audit": True, "lr": 5.0, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(AuditError):
        # Noise this large moves the gain beyond 1.
        fit(model, samples(40), **settings)
    assert float(model.net[1].gain.detach().abs()) > 1.0
    with pytest.raises(AuditError):
        fit(model_with(Gain()), samples(40), **settings)
