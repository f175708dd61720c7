"""Splines begin as they say, lose needless knots after the noise for free, and tell their pieces."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import lsq_linear
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, NormError, fit, gradient_gated, layers, losses, optim
from clipless_dp.constraints import Ball, Constraint, Frobenius, Spectral, SplineVariation, spline_variation
from clipless_dp.norms.operators import DiagonalOperator, SegmentsOperator
from clipless_dp.testing import BoundBroken, LipschitzLayerTestCase, attack_parameters
from tests.soundness.mutation import Mutant, with_each

SEGMENTS = (SegmentsOperator(),)


class TestSpline(LipschitzLayerTestCase):
    shapes = ((2, 2),)
    attained: ClassVar = {"slopes": 0.7}
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return layers.LinearSpline(2, 16, 0.1, init="maxmin")


class TestSharedSpline(LipschitzLayerTestCase):
    shapes = ((3,),)
    input_norm = 3.0
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return layers.LinearSpline(1, 4, 0.3, init="abs")


@pytest.mark.parametrize("segments", [2, 8, 64])
@pytest.mark.parametrize(
    ("init", "function"),
    [("identity", lambda x: x), ("abs", torch.abs), ("relu", torch.relu)],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_fresh_spline_is_what_it_is_asked_to_be(init: Any, function: Any, segments: int) -> None:
    values = 3.0 * torch.randn(50, 4, dtype=torch.float64)
    found = layers.LinearSpline(4, segments, 0.7, init=init).double()(values)
    assert torch.allclose(found, function(values), atol=1e-13)  # cumulative sums of 32 numbers below one


def test_between_two_rotations_of_each_pair_maxmin_splines_are_max_and_min() -> None:
    values = torch.randn(50, 3, 2, dtype=torch.float64)
    low, high = values.sort(2).values.unbind(2)
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2.0)
    spline = layers.LinearSpline(6, 8, init="maxmin").double()
    # The first channel is the difference, whose absolute value is taken, the second one the sum.
    found = spline((values @ turn.T).flatten(1)).unflatten(1, (3, 2)) @ turn
    assert torch.allclose(found[..., 0], high, atol=1e-13)
    assert torch.allclose(found[..., 1], low, atol=1e-13)


@pytest.mark.parametrize("init", ["identity", "abs", "maxmin"])
def test_norms_of_values_and_gradients_are_preserved_by_fresh_splines_that_say_so(init: Any) -> None:
    values = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    spline = layers.LinearSpline(4, 8, init=init).double()
    cotangent = torch.randn(50, 4, dtype=torch.float64)
    output = spline(values)
    (gradient,) = torch.autograd.grad(output, values, cotangent)
    assert torch.allclose(output.norm(dim=1), values.norm(dim=1), rtol=1e-13)
    assert torch.allclose(gradient.norm(dim=1), cotangent.norm(dim=1), rtol=1e-13)


def spline_model(constraint: Constraint | None = None, *, segments: int = 16, init: Any = "abs") -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), layers.LinearSpline(4, segments, 0.5, init=init), nn.Linear(4, 3))
    return DPLipModel(
        net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0),
        constraint={"*.slopes": Frobenius() if constraint is None else constraint, "*.weight": Spectral(),
                    "*.bias": Ball(1.0)},
    )  # fmt: skip


def test_the_bound_of_the_slopes_is_the_same_for_any_number_of_segments_and_any_reach() -> None:
    found = set()
    for segments, reach in ((2, 1.0), (16, 0.01), (256, 30.0)):
        net = nn.Sequential(layers.LinearSpline(4, segments, reach))
        model = DPLipModel(net, input_shape=(4,), input_norm=3.0, loss=losses.MeanAbsoluteError())
        found.add(model.sensitivity().per_parameter["0.slopes"])
    assert len(found) == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=8, max_size=8), min_size=1, max_size=4),
    st.floats(1e-3, 3.0),
    st.floats(0.3, 2.0),
)
def test_the_step_is_the_minimiser_within_the_limit(rows: list[list[float]], strength: float, limit: float) -> None:
    slopes = torch.tensor(rows, dtype=torch.float64)
    found = slopes.clone()
    SplineVariation(strength, limit=limit).project_(found, SEGMENTS)
    assert float(found.abs().max()) <= limit

    def objective(values: Tensor) -> Tensor:
        return 0.5 * (values - slopes).square().sum(1) + strength * values.diff(dim=1).abs().sum(1)

    # Convex, so that no feasible value is below a minimiser's: here those of a solver of the dual problem, clipped,
    # what is between, and neighbours.
    differences = torch.eye(8, dtype=torch.float64).diff(dim=0).T
    solved = [
        row - differences @ torch.from_numpy(lsq_linear(differences, row, (-strength, strength), "bvls").x)
        for row in slopes
    ]
    generator = torch.Generator().manual_seed(0)
    others = [torch.stack(solved).clamp(-limit, limit), slopes.clamp(-limit, limit)]
    others += [
        found + size * torch.randn(found.shape, generator=generator, dtype=torch.float64) for size in (1e-3, 0.1)
    ]
    for other in others:
        assert bool((objective(found) <= objective(other.clamp(-limit, limit)) + 1e-10).all())
    assert torch.allclose(found, others[0], atol=1e-7)  # the solver's own tolerance


def test_what_one_step_leaves_of_a_function_by_hand() -> None:
    # A peak of one segment between flats of two: it falls by twice the strength, they rise by half of it.
    weight = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5, 0.5]])
    SplineVariation(0.2).project_(weight, SEGMENTS)
    assert torch.allclose(weight, torch.tensor([[0.1, 0.1, 0.5, 0.1, 0.1], 5 * [0.5]]), atol=1e-7)


def test_functions_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 10)
    apart = weight.clone()
    SplineVariation(0.3).project_(weight, SEGMENTS)
    for row in range(7):
        SplineVariation(0.3).project_(apart[row : row + 1], SEGMENTS)
    assert torch.equal(weight, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1.0, 0.1, 1.0 / 3.0, 1e-8])
def test_no_slope_is_above_the_limit_by_even_a_rounding(limit: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = 5.0 * torch.randn(6, 12, dtype=dtype)
    fresh = weight.clone()
    constraint = SplineVariation(1e-9, limit=limit)
    constraint.project_(weight, SEGMENTS)
    constraint.initialize_(fresh, SEGMENTS)
    for values in (weight, fresh):
        assert all(abs(value) <= limit for value in values.double().flatten().tolist())
        assert float(values.abs().max()) >= limit * (1.0 - 1e-6)
        assert constraint.holds(values, SEGMENTS)


def test_fresh_slopes_within_the_limit_stay_as_they_are() -> None:
    model = spline_model(SplineVariation(10.0))
    assert torch.equal(model.net[1].slopes, layers.LinearSpline(4, 16, init="abs").slopes)  # type: ignore[index]


@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan, math.inf, None, "1", True])
def test_strengths_that_are_no_positive_numbers_are_refused(strength: Any) -> None:
    with pytest.raises(ConfigurationError, match="strength"):
        SplineVariation(strength)


def test_parameters_that_hold_no_slopes_of_segments_are_refused_when_the_model_is_wrapped() -> None:
    for net in (nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.PReLU(4))):
        with pytest.raises(ConfigurationError, match=r"LinearSpline.*slopes"):
            DPLipModel(
                net, input_shape=(4,), input_norm=1.0, loss=losses.MeanAbsoluteError(),
                constraint={"0.weight": SplineVariation(0.1)},
            )  # fmt: skip
    with pytest.raises(ConfigurationError, match="LinearSpline"):
        SplineVariation(0.1).project_(torch.ones(2, 2), (DiagonalOperator(),))


def test_slopes_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NormError):
        SplineVariation(0.1).project_(torch.tensor([[1.0, math.nan]]), SEGMENTS)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


def privately_trained(constraint: Constraint | None = None) -> tuple[DPLipModel, Any]:
    model = spline_model(constraint)
    result = fit(
        model, data(), epsilon=3.0, delta=1e-4, epochs=2, batch_size=50, lr=0.5, progress=False, audit=False,
        reproducible_seed=5,
    )  # fmt: skip
    return model, result


def test_sensitivity_and_ledger_are_those_without_the_variation() -> None:
    plain, with_it = spline_model(), spline_model(SplineVariation(0.05))
    assert with_it.sensitivity().per_parameter == pytest.approx(dict(plain.sensitivity().per_parameter), rel=1e-12)
    (one, first), (other, second) = privately_trained(), privately_trained(SplineVariation(0.05))
    assert one.sensitivity().total == pytest.approx(other.sensitivity().total, rel=1e-5)  # limits, rounded
    assert first.epsilon == second.epsilon
    assert first.noise_multiplier == second.noise_multiplier
    assert not torch.equal(one.net[1].slopes, other.net[1].slopes)  # type: ignore[index]


def claims_after_private_steps() -> None:
    """Slopes are within the limit, and neighbours that the step joined are equal to the bit, noise or not."""
    model, _ = privately_trained(SplineVariation(0.05))
    slopes = model.net[1].slopes.detach()  # type: ignore[index]
    assert float(slopes.abs().max()) <= 1.0
    assert layers.effective_regions(model).mean < 12.0


def test_after_private_steps_slopes_are_within_the_limit_and_neighbours_joined() -> None:
    claims_after_private_steps()
    model, _ = privately_trained(Frobenius())
    assert layers.effective_regions(model).mean > 12.0


@with_each(
    Mutant(
        "noise added after the proximal step",
        optim.CliplessDPOptimizer,
        "_step",
        "self.base_optimizer.step()\n            self.model.project_()",
        "self.model.project_()\n                self.base_optimizer.step()",
    ),
    Mutant("slopes unclipped", SplineVariation, "_store_", "weight.clamp_(-bound, bound)", "pass"),
    Mutant(
        "no proximal step",
        SplineVariation,
        "project_",
        "_taut(exact_float64(weight), self.strength)",
        "exact_float64(weight)",
    ),
)
def test_mutant_caught_in_private_steps(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises(AssertionError):
        claims_after_private_steps()


@with_each(
    Mutant("half the strength", spline_variation, "_taut", "sums - strength", "sums - 0.5 * strength"),
    Mutant("an end not pinched", spline_variation, "_taut", "sums[:, 0], sums[:, -1]", "sums[:, 0], side[:, -1]"),
    Mutant("other side touched", spline_variation, "_taut", "torch.where(rises, high", "torch.where(~rises, high"),
)  # fmt: skip
def test_mutant_caught_in_the_minimiser(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        test_what_one_step_leaves_of_a_function_by_hand()


def test_mutant_caught_knots_outside_the_reach_with_slopes_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TestSharedSpline().cases()[0]
    attack_parameters(case, steps=1)
    Mutant(
        "steeper outside",
        layers.LinearSpline,
        "forward",
        "value + slope * (values - step * start.to(values.dtype))",
        "value + slope * (values - step * start.to(values.dtype)) * (1 + (position.abs() > half))",
    ).apply(monkeypatch)
    with pytest.raises(BoundBroken):
        attack_parameters(case, steps=1)


def test_pieces_are_runs_of_equal_slopes() -> None:
    net = nn.Sequential(
        layers.LinearSpline(3, 4, init="identity"), nn.ReLU(), layers.LinearSpline(1, 6, 2.0, init="abs")
    )
    with torch.no_grad():
        net[0].slopes[1] = torch.tensor([0.5, 0.5, 0.25, 0.5])  # type: ignore[index]
        net[0].slopes[2] = torch.tensor([0.5, 0.5001, 0.5, 0.5])  # type: ignore[index]
    found = layers.effective_regions(net)
    assert [layer.pieces for layer in found.layers] == [(1, 3, 3), (2,)]
    assert [layer.path for layer in found.layers] == ["0", "2"]
    assert found.total == 9
    assert found.mean == 9 / 4
    assert layers.effective_regions(net, tolerance=1e-3).layers[0].pieces == (1, 3, 1)
    printed = str(found)
    assert "mean pieces" in printed
    assert "2.33" in printed
    assert "<table" in found._repr_html_()
    assert math.isnan(layers.effective_regions(nn.ReLU()).mean)
    assert "(the network)" in str(layers.effective_regions(layers.LinearSpline()))


@pytest.mark.parametrize("gate", [lambda net: net, gradient_gated], ids=["constraints", "gradient gates"])
def test_exported_networks_of_splines_and_mirrors_say_what_the_model_says(gate: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 4), layers.LinearSpline(4, 16, 0.5, init="maxmin"), nn.Linear(4, 4),
        layers.Householder(4, order=2, pairing="halves"), layers.MaxMin(pairing="halves"), layers.AbsoluteValue(),
        nn.Linear(4, 3),
    )  # fmt: skip
    model = DPLipModel(gate(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0)).eval()
    with torch.no_grad():
        net[1].slopes.uniform_(-1.0, 1.0)
        net[3].theta.uniform_(-4.0, 4.0)
    rows = torch.randn(20, 6)
    with torch.no_grad():
        # float32 of other kernels.
        torch.testing.assert_close(model.export_net()(rows), model(rows), rtol=1e-4, atol=1e-6)


def test_modules_that_a_former_version_saved_pair_neighbours() -> None:
    for module in (layers.MaxMin(), layers.GroupSort(2), layers.Householder(4)):
        old = copy.deepcopy(module)
        for name in ("pairing", "order"):
            vars(old).pop(name, None)
        values = torch.randn(5, 4)
        assert torch.equal(old(values), module(values))
        assert repr(old) == repr(module)
