"""The certified Lipschitz constant of a whole network: exact where it can be, never too small, mutants caught."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipless_dp import LayerBounds, RuleContext, constraints, layers, losses, register_rule
from clipless_dp.bounds.sweep import Sweep
from clipless_dp.model import DPLipModel
from clipless_dp.rules import base
from tests.soundness.attack import wrap
from tests.soundness.mutation import Mutant


def scaled(factor: float, features: int = 3) -> nn.Linear:
    layer = nn.Linear(features, features)
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(features))
    return layer


EXACT: dict[str, tuple[nn.Module, float]] = {
    "a product": (nn.Sequential(scaled(2.0), nn.ReLU(), scaled(1.5)), 3.0),
    "a residual": (layers.Residual(scaled(2.0)), 3.0),
    "residuals of residuals": (layers.Residual(layers.Residual(scaled(2.0))), 4.0),
    "a convex residual": (layers.ConvexResidual(scaled(2.0), alpha=0.25), 1.25),
    "a clipping gate does nothing forwards": (nn.Sequential(scaled(2.0), layers.CotangentGate(0.1), scaled(2.0)), 4.0),
    "nor does a normalising one": (nn.Sequential(scaled(2.0), layers.CotangentGate(0.1, mode="normalize")), 2.0),
    "a ball": (nn.Sequential(scaled(2.0), layers.BallProjection(0.5)), 2.0),
    "a sphere stretches what is small": (nn.Sequential(layers.SphereScaling(1.0, floor=0.1), scaled(1.0)), 10.0),
    "dropout": (nn.Sequential(nn.Dropout(0.5), scaled(1.0)), 2.0),
    "the identity": (nn.Sequential(nn.Identity(), scaled(1.0)), 1.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_constant_is_that_of_the_composition(name: str) -> None:
    net, expected = EXACT[name]
    # Certificates of 3×3 matrices are tight to 1e-3 at worst.
    assert wrap(net, (3,)).lipschitz_constant() == pytest.approx(expected, rel=1e-3)
    assert wrap(net, (3,)).lipschitz_constant() >= expected


def stretch(model: DPLipModel) -> float:
    """The largest observed between pairs of points near and far."""
    generator = torch.Generator().manual_seed(0)
    points = 0.3 * torch.randn(6, *model.input_shape, generator=generator, dtype=torch.float64)
    points[1] = points[0] + 1e-5 * points[1]
    points[2:4] *= 1e-3
    values = model(points).detach().flatten(1)
    apart = torch.cdist(points.flatten(1), points.flatten(1))
    moved = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
    return float((moved / apart.masked_fill(apart == 0, math.inf)).max())


@pytest.mark.parametrize("name", EXACT)
def test_no_two_points_move_apart_by_more_than_the_constant(name: str) -> None:
    model = wrap(EXACT[name][0].double().eval(), (3,))
    # float64 differences of size 1e-6 have relative errors of 1e-10.
    assert stretch(model) <= model.lipschitz_constant() * (1.0 + 1e-8)


MUTANTS = (
    (
        Mutant(
            "the larger of two ways instead of their sum",
            Sweep,
            "_summed",
            "total += factor(consumer, position) * beyond",
            "total = max(total, factor(consumer, position) * beyond)",
        ),
        "a residual",
    ),
    (
        Mutant(
            "a gate's cap taken for its slope",
            Sweep,
            "_forward",
            "return 1.0",
            "return bounds.cotangent_cap",
        ),
        "a clipping gate does nothing forwards",
    ),
)


@pytest.mark.parametrize(("mutant", "name"), MUTANTS, ids=lambda value: getattr(value, "name", value))
def test_pairs_of_points_catch(mutant: Mutant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(EXACT[name][0].double(), (3,))
    assert stretch(model) <= model.lipschitz_constant() * (1.0 + 1e-8)
    mutant.apply(monkeypatch)
    assert stretch(model) > model.lipschitz_constant() * (1.0 + 1e-8)


def test_a_constraint_gives_its_limit_and_loose_weights_their_own_norm() -> None:
    net = nn.Sequential(scaled(7.0), layers.GroupSort(3), scaled(0.5))
    model = DPLipModel(
        net, input_shape=(3,), input_norm=1.0, loss=losses.Huber(), constraint={"0": constraints.Spectral(2.0)}
    )
    assert model.lipschitz_constant() == pytest.approx(1.0, rel=1e-3)
    with torch.no_grad():
        net[2].weight.mul_(4.0)
    assert model.lipschitz_constant() == pytest.approx(4.0, rel=1e-3)


def test_no_constant_is_claimed_for_tokens_nor_for_a_rule_that_caps_cotangents(monkeypatch: pytest.MonkeyPatch) -> None:
    bag = DPLipModel(nn.Sequential(nn.EmbeddingBag(4, 2)), input_shape=(3,), loss=losses.Huber())
    assert bag.lipschitz_constant() == math.inf

    class Amplifier(nn.Module):
        """Returns ten times its input, with a backward of its own that a rule caps."""

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * 10.0

    monkeypatch.setattr(base, "_RULES", dict(base._RULES))

    @register_rule(Amplifier)
    def amplifier_rule(module: Amplifier, context: RuleContext) -> LayerBounds:
        return LayerBounds(output_norm=lambda: 10.0 * context.input_norm, cotangent_cap=1.0)

    assert wrap(nn.Sequential(scaled(1.0), Amplifier()), (3,)).lipschitz_constant() == math.inf
