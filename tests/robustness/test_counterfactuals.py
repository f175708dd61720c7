"""Counterfactuals reach the boundary where it is known, and never inside of what is certified."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError, layers
from clipless_dp.robustness import certify, counterfactual, counterfactuals, networks, plain_network
from clipless_dp.robustness.counterfactuals import Form
from tests.robustness.nets import NETWORKS, points, seeded, wrapped
from tests.soundness.mutation import Mutant, with_each

FORMS: tuple[Form, ...] = ("gradient", "newton")


class SignedDistance(nn.Module):
    """``‖x‖ - 1``: below 0 in the ball."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.norm(dim=1) - 1.0


class HalfSpace(nn.Module):
    """``3x₁/5 + 4x₂/5 + 1``, of slope 1, times a number."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, inputs: Tensor) -> Tensor:
        return self.slope * (0.6 * inputs[:, 0] + 0.8 * inputs[:, 1] + 1.0)


class Wave(nn.Module):
    """``cos(x)``: its sign changes back."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, 0].cos()


def around() -> Tensor:
    return points(12, 2, size=0.9)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_lands_on_the_boundary_of_a_half_space_of_slope_one(form: Form) -> None:
    found = counterfactual(HalfSpace(), around(), form=form, steps=1, lipschitz=1.0)
    values = HalfSpace()(around())
    assert float(values.min()) < 0.0 < float(values.max())
    # A few roundings of numbers of size 5.
    assert float(HalfSpace()(found.inputs).abs().max()) < 1e-14
    assert torch.allclose(found.distances, values.abs(), rtol=1e-9)
    assert torch.allclose(found.radii, values.abs(), rtol=1e-9)
    assert torch.allclose(found.slopes, torch.ones(12, dtype=torch.float64), rtol=1e-14)
    assert bool(found.reached.all())
    assert bool(((found.tightness <= 1.0) & (found.tightness > 1.0 - 1e-9)).all())


@pytest.mark.parametrize("slope", [0.1, 7.0])
def test_newtons_step_lands_on_the_boundary_whatever_the_slope(slope: float) -> None:
    net = HalfSpace(slope)
    assert float(net(counterfactual(net, around(), steps=1).inputs).abs().max()) < 1e-13
    ends = counterfactual(net, around(), form="gradient").inputs
    # ``x - f∇f`` moves f to ``f(1 - slope²)``.
    assert torch.allclose(net(ends), net(around()) * (1.0 - slope**2), rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_signed_distance_is_walked_to_the_sphere_from_inside_and_outside(form: Form) -> None:
    net, inputs = SignedDistance(), around()
    values = net(inputs)
    assert float(values.min()) < 0.0 < float(values.max())
    found = counterfactual(net, inputs, form=form, lipschitz=1.0)
    assert torch.allclose(found.inputs.norm(dim=1), torch.ones(12, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(found.distances, values.abs(), rtol=1e-8)
    assert bool((found.found != found.predictions).all())
    # The certificate is the distance itself: nothing is lost.
    assert float(found.tightness.min()) > 1.0 - 1e-8
    assert float(found.tightness.max()) <= 1.0
    again = counterfactual(net, inputs, form=form, t=0.5, steps=1, lipschitz=1.0)
    assert torch.allclose(net(again.inputs), values / 2.0, rtol=1e-12)
    assert not bool(again.reached.any())


@with_each(
    Mutant(
        "sign of f dropped",
        counterfactuals,
        "_gap",
        "(scores.gather(1, own) - scores.gather(1, other)).squeeze(1)",
        "(lambda f: f + (f.abs() - f).detach())(scores[:, 1] - scores[:, 0])",
    ),
    Mutant("the slope for its square", counterfactuals, "_step", ".square()", ""),
    Mutant("a single output counted twice", counterfactuals, "_gap", "apart / 2.0", "apart"),
)
def test_a_mutant_misses_the_boundary(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    nets: tuple[tuple[nn.Module, Form], ...] = ((HalfSpace(7.0), "newton"), (SignedDistance(), "gradient"))
    mutant.apply(monkeypatch)
    missed = [
        float(net(counterfactual(net, around(), form=form, steps=1).inputs).abs().max()) > 0.1 for net, form in nets
    ]
    assert any(missed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_flip_is_nearer_than_what_is_certified(name: str, form: Form) -> None:
    model = seeded(NETWORKS[name]).double()
    inputs = points(12, *model.input_shape)
    # The gradient's form is short where slopes are: what counts is that something is reached.
    found = counterfactual(model, inputs, form=form, t=1.0 if form == "newton" else 300.0)
    plain, certificate = plain_network(model), certify(model, inputs)
    assert torch.equal(found.radii, certificate.radii)
    hit = found.reached
    if name not in ("residual", "loose weights, a small ball"):
        assert bool(hit.any())
    assert torch.equal(hit, found.distances.isfinite())
    assert bool((plain(found.flips).argmax(1) != found.predictions)[hit].all())
    moved = (found.flips - inputs).flatten(1).norm(dim=1)
    assert torch.allclose(moved[hit], found.distances[hit], rtol=1e-12)
    assert torch.equal(found.flips[~hit], inputs[~hit])
    assert bool((found.tightness[hit] <= 1.0).all())
    assert bool(found.tightness[~hit].isnan().all())
    just_before = inputs + (found.flips - inputs) * (1.0 - 1e-4)
    assert bool((plain(just_before).argmax(1) == found.predictions)[hit].all())


def test_a_target_is_what_the_prediction_becomes() -> None:
    layer = seeded(lambda: nn.Linear(4, 3).double())
    inputs = points(30, 4)
    own = layer(inputs).argmax(1)
    target = (own + 1) % 3
    found = counterfactual(layer, inputs, target, form="newton", lipschitz=1e3)
    assert torch.equal(found.rivals, target)
    assert bool(found.reached.any())
    assert torch.equal(found.found[found.reached], target[found.reached])
    weight, scores = layer.weight.detach(), layer(inputs).detach()
    gaps = scores.gather(1, own[:, None]) - scores.gather(1, target[:, None])
    apart = (weight[own] - weight[target]).norm(dim=1)
    # The third class may have to be passed, which takes longer.
    assert bool((found.distances >= gaps.squeeze(1) / apart * (1.0 - 1e-9)).all())
    with pytest.raises(InputError, match="predicted as their target"):
        counterfactual(layer, inputs, int(own[0]))


def test_the_default_rival_is_the_nearest_class_and_not_the_second_best() -> None:
    layer = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.1], [0.0, 2.0]]))
    model = wrapped(layer, (2,), input_norm=100.0)
    inputs = torch.tensor([[1.0, 0.1]], dtype=torch.float64)
    scores = layer(inputs)[0]
    away = [(scores[0] - scores[j]) / (layer.weight[0] - layer.weight[j]).norm() for j in (1, 2)]
    assert scores[1] > scores[2]
    assert away[1] < away[0]
    found = counterfactual(model, inputs)
    assert found.rivals.tolist() == [2]
    assert float(found.distances[0]) == pytest.approx(float(away[1].detach()), rel=1e-9)
    assert counterfactual(layer, inputs).rivals.tolist() == [1]


def test_a_prediction_that_changes_and_changes_back_is_found_on_the_way() -> None:
    inputs = torch.tensor([[0.5]], dtype=torch.float64)
    step = math.cos(0.5) * math.sin(0.5)
    found = counterfactual(Wave(), inputs, form="gradient", t=6.0 / step, lipschitz=1.0)
    assert float(Wave()(found.inputs)) > 0.5
    assert bool(found.reached.all())
    assert float(found.distances) == pytest.approx(math.pi / 2.0 - 0.5, rel=1e-9)


def test_nothing_leaves_the_box() -> None:
    found = counterfactual(HalfSpace(), around().clamp(-1.0, 1.0), t=3.0, box=(-1.0, 1.0))
    assert float(found.inputs.abs().max()) <= 1.0
    assert float(found.flips.abs().max()) <= 1.0
    with pytest.raises(InputError, match="outside of the box"):
        counterfactual(HalfSpace(), around(), box=(0.0, 0.5))


def test_a_mutant_that_differentiates_through_gates_misses_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    model = wrapped(nn.Sequential(layer, layers.CotangentGate(0.1)), (2,), input_norm=100.0)
    # The difference of scores is of slope 1, so that one step lands on the boundary.
    free = counterfactual(model, around(), form="gradient")
    Mutant("gates stay", networks, "_without_gates", "isinstance(child, CotangentGate)", "False").apply(monkeypatch)
    through = counterfactual(model, around(), form="gradient")
    assert bool(free.reached.all())
    assert not bool(through.reached.any())


def test_without_a_constant_the_certificate_is_none_and_says_so() -> None:
    found = counterfactual(HalfSpace(), around())
    assert bool(found.reached.all())
    assert found.tightness.tolist() == [0.0] * 12
    assert "no Lipschitz constant" in str(found.certificate.reason)


def test_a_front_is_walked_through() -> None:
    front = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        front.weight.copy_(torch.eye(2) / 2.0)
    found = counterfactual(HalfSpace(), around(), lipschitz=1.0, front=front, front_lipschitz=0.5)
    expected = 2.0 * HalfSpace()(around() / 2.0).abs()
    assert torch.allclose(found.distances, expected, rtol=1e-9)
    assert float(found.tightness.min()) > 1.0 - 1e-8
    with pytest.raises(ConfigurationError, match="front where it is made"):
        counterfactual(plain_network(HalfSpace()), around(), front=front)


def test_it_prints_as_a_table() -> None:
    text = str(counterfactual(HalfSpace(), torch.tensor([[0.0, 0.0], [9.0, 9.0]]).double(), lipschitz=1.0))
    assert "tightness" in text
    assert len(text.splitlines()) == 4


def test_what_does_not_fit_is_refused() -> None:
    net, inputs = HalfSpace(), around()
    for wrong in (
        {"form": "hkr"},
        {"t": 0.0},
        {"steps": 0},
        {"overshoot": -0.1},
        {"bisections": 0},
        {"batch_size": 0},
        {"box": (1.0, 0.0)},
        {"lipschitz": -1.0},
    ):
        with pytest.raises(ConfigurationError):
            counterfactual(net, inputs, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        counterfactual(net, inputs, 2)
    with pytest.raises(InputError, match="not finite"):
        counterfactual(net, inputs * math.nan)
