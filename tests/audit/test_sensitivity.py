"""The attack on a user's own model: correct rules survive it, wrong ones are named, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from accounting import create_accountant
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
    gradient_gated,
    layers,
    losses,
    register_rule,
)
from clipless_dp.bounds.sweep import Sweep
from clipless_dp.rules.base import value_of
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


SCALAR_OUTPUTS = [
    (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), losses.BinaryCrossEntropy()),
    (nn.Sequential(nn.Linear(6, 1)), losses.BinaryCrossEntropy()),
    (gated(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))), losses.Huber()),
]


@pytest.mark.parametrize(("net", "loss"), SCALAR_OUTPUTS)
@pytest.mark.parametrize("attempts", [None, 30])
def test_outputs_of_one_number_a_sample_are_audited(net, loss, attempts):
    model = DPLipModel(net, input_shape=(6,), input_norm=3.0, loss=loss)
    report = audit.sensitivity(model, attempts=attempts)
    # The bias sees the cotangent itself, whose gate caps it.
    assert 0.99 < report.worst <= 1.0 + 1e-9
    assert not report.notes


def test_mutant_caught_a_cap_that_forgets_what_normalising_lifts(monkeypatch):
    # A gate that normalises lifts small gradients up to its cap: the bound is not what would arrive without the gate.
    def forgetful(sweep, bounds, name, arriving):
        unit, cap = value_of(bounds.gradients[name]), bounds.gradient_limits.get(name)
        return unit * arriving if cap is None else min(cap, unit * arriving)

    monkeypatch.setattr(Sweep, "_gradient", forgetful)
    model = gradient_gated(nn.Sequential(nn.Linear(8, 3)), limit=1.0)
    lifted = DPLipModel(model, input_shape=(8,), input_norm=0.1, loss=losses.TauCrossEntropy())
    for attempts in (None, 20):
        with pytest.raises(AuditError, match=r"0\.weight"):
            audit.sensitivity(lifted, attempts=attempts)


def test_mutant_caught_a_gate_that_a_scaled_loss_passes(monkeypatch):
    monkeypatch.setattr("clipless_dp.model.wrapped.outermost_gate", lambda values, limit, opened, own: values)
    with pytest.raises(AuditError):
        audit.sensitivity(model_with(nn.ReLU()), attempts=5)


class Doubled(nn.Module):
    """Twice its input where any row of the batch is large: a shortcut that looks at the batch."""

    def forward(self, values):
        return values * (1.0 + float(values.detach().abs().max() > 1e6))


@register_rule(Doubled)
def doubled_rule(module: Doubled, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm)


@pytest.mark.parametrize("attempts", [None, 5])
def test_mutant_caught_a_shortcut_that_one_large_row_flips_for_all(attempts, monkeypatch):
    # What is flipped lies behind the input gate, which no large row passes: the gate is taken away.
    monkeypatch.setattr(
        "clipless_dp.model.network.input_gate", lambda values, radius: (values, values.new_ones(len(values)) > 0)
    )
    with pytest.raises(AuditError):
        audit.sensitivity(model_with(Doubled()), attempts=attempts)


class Wobbling(nn.Module):
    """Errs by a last bit that the number of rows decides, as a product does whose kernel changes."""

    def forward(self, values):
        return values + (1.0 - 2.0 * (len(values) % 2)) * 1e-14


@register_rule(Wobbling)
def wobbling_rule(module: Wobbling, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm)


def test_mutant_caught_products_that_the_number_of_rows_decides():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 8, bias=False), Wobbling(), nn.ReLU(), nn.Linear(8, 3, bias=False))
    model = DPLipModel(gated(net), input_shape=(20,), input_norm=1.0, loss=losses.TauCrossEntropy())
    with pytest.raises(AuditError, match="the number of rows decides"):
        audit.sensitivity(model, attempts=5, counts=True)


def batch_hard(outputs, targets):
    apart = torch.cdist(outputs, outputs)
    same = targets[:, None] == targets[None]
    nearest = apart.masked_fill(same, 1e9).min(1).values
    return torch.relu(1.0 + (apart * same).max(1).values - nearest)


def embedded(loss, outputs: int = 8) -> DPLipModel:
    torch.manual_seed(0)
    net = gated(nn.Sequential(nn.Linear(4, outputs, bias=False)))
    return DPLipModel(net, input_shape=(4,), input_norm=4.0, loss=losses.BoundedLoss(loss, 1.0))


def mean_squares(outputs, targets):
    return ((outputs - targets) ** 2).mean(1)


COMPARING = {
    "the hardest triplets of a batch": (embedded(batch_hard), torch.tensor(1)),
    "targets (B,) against outputs (B, 1)": (embedded(mean_squares, 1), torch.tensor(0.5)),
    "a loss centred by its batch": (embedded(lambda o, t: (o - o.mean(0)).square().sum(1)), torch.tensor(0.5)),
    "a mean over the batch": (embedded(lambda o, t: o.square().sum(1) / len(o)), torch.tensor(0.5)),
}


@pytest.mark.parametrize("attempts", [None, 10])
@pytest.mark.parametrize("name", COMPARING)
def test_mutant_caught_a_loss_that_compares_rows(name, attempts):
    model, like = COMPARING[name]
    with pytest.raises(AuditError, match="depends on the other samples"):
        audit.sensitivity(model, attempts=attempts, like=like)


def test_fit_does_not_start_on_a_loss_that_compares_rows():
    inputs, targets = samples(40)
    with pytest.raises(AuditError, match="depends on the other samples"):
        fit(embedded(batch_hard), (inputs[:, :4], targets), **SETTINGS)


def test_a_loss_is_judged_by_targets_of_its_own_format():
    model = embedded(mean_squares, 1)
    assert not audit.sensitivity(model, attempts=10, like=torch.zeros(1)).notes
    (note,) = audit.sensitivity(model, attempts=10).notes
    assert "compares rows" in note
    with pytest.raises(AuditError, match="depends on the other samples"):
        audit.sensitivity(model, (torch.randn(5, 4), torch.randn(5)), attempts=10)


def test_a_loss_of_targets_that_nobody_knows_is_reported_as_not_tried():
    with_pairs = embedded(lambda o, t: (o * t["weight"]).sum(1))
    (note,) = audit.sensitivity(with_pairs, attempts=10).notes
    assert "give a batch" in note


def test_losses_that_draw_random_numbers_are_not_taken_for_ones_that_compare_rows():
    model = embedded(lambda o, t: (o * torch.randn_like(o)).sum(1))
    assert audit.sensitivity(model, attempts=10).passed


@pytest.mark.parametrize("attempts", [None, 30])
def test_dropout_is_no_interaction_of_rows(attempts):
    model = model_with(nn.Dropout(0.5)).train()
    assert audit.sensitivity(model, attempts=attempts).passed
    assert all(module.training for module in model.modules())


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
    assert all(report.passed and not report.quick for report in result.audits)
    assert not fit(gated_model(), samples(40), audit=False, **SETTINGS).audits


def test_fit_audits_quickly_before_training_unless_told_not_to(tmp_path):
    settings = {**SETTINGS, "checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    (report,) = fit(gated_model(), samples(40), **settings).audits
    assert report.quick
    assert report.passed
    assert report.attempts < 60
    assert "quick form" in str(report)
    with pytest.raises(ConfigurationError, match="audit must be"):
        fit(gated_model(), samples(40), audit="thorough", **SETTINGS)


@pytest.mark.parametrize("mutant", [lambda: model_with(Doubling()), lambda: model_with(Mixing())])
def test_mutant_caught_by_the_quick_form_before_a_step_is_taken(mutant):
    model = mutant()
    before = [parameter.detach().clone() for parameter in model.net.parameters()]
    spent = create_accountant("rdp")
    with pytest.raises(AuditError):
        fit(model, samples(40), **{**SETTINGS, "accountant": spent})
    assert not spent.history
    assert all(torch.equal(p, q) for p, q in zip(model.net.parameters(), before, strict=True))


def test_the_quick_form_leaves_a_reproducible_run_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    plain = DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    audited = copy.deepcopy(plain)
    for model, audited_or_not in ((plain, False), (audited, "quick")):
        torch.manual_seed(4)
        fit(model, samples(40), audit=audited_or_not, reproducible_seed=3, **{**SETTINGS, "epochs": 1})
    assert int(plain.nonfinite_samples) == int(audited.nonfinite_samples)
    for one, other in zip(plain.net.parameters(), audited.net.parameters(), strict=True):
        assert torch.equal(one, other)


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
