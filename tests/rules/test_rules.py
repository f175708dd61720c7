"""Each rule's three numbers by hand, and the configurations that a rule refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import UnsupportedModuleError, layers
from clipless_dp.constraints import Spectral
from clipless_dp.norms.operators import DenseOperator
from clipless_dp.rules import base
from tests.soundness.attack import Probed, Traced, bounds_of, wrap
from tests.support import with_each_of


def numbers(layer: nn.Module, shape: tuple[int, ...], *, input_norm: float = 3.0) -> tuple[float, float]:
    """The tracker's Y and K·G of a layer, for G = 0.5."""
    with torch.no_grad():
        output_shape = tuple(layer.double()(torch.zeros(2, *shape, dtype=torch.float64)).shape[1:])
    net = Probed(layer, shape, output_shape).double()
    bounds = bounds_of(wrap(net, shape, input_norm=input_norm, cotangent_norm=0.5))
    return bounds["after.input"], bounds["before.shift"]


def numbers_are_those_of(
    table: Iterable[tuple[str, Callable[[], nn.Module], tuple[int, ...], float, float]], *, below: float, above: float
) -> Callable[..., None]:
    """A test that Y and K of layers are those of a table, of name, layer, shape, Y and K, but for relative errors."""

    @with_each_of("build, shape, output, slope", {name: line for name, *line in table})
    def test(build: Callable[[], nn.Module], shape: tuple[int, ...], output: float, slope: float) -> None:
        reached, passed = numbers(build(), shape)
        assert output * (1.0 - below) <= reached <= output * (1.0 + above)
        assert 0.5 * slope * (1.0 - below) <= passed <= 0.5 * slope * (1.0 + above)

    return test


def weighted(layer: nn.Module, weight: list[list[float]], bias: list[float]) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight).reshape(layer.weight.shape))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def circular(taps: int) -> nn.Module:
    return nn.Conv1d(1, 1, taps, padding="same", padding_mode="circular")


def with_parameters(layer: nn.Module, **values: list[float]) -> nn.Module:
    with torch.no_grad():
        for name, entries in values.items():
            parameter = layer.get_parameter(name)
            parameter.copy_(torch.tensor(entries).reshape(parameter.shape))
    return layer


def potential(weight: list[list[float]], bias: list[float]) -> nn.Module:
    return weighted(layers.ConvexPotential(2), weight, bias)


def pixel_potential(weight: float, bias: float) -> nn.Module:
    return weighted(layers.ConvexPotentialConv2d(1, 1), [[weight]], [bias])


R2, R3 = math.sqrt(2.0), math.sqrt(3.0)

# (layer, shape, Y for X = 3, K): Y and K as the table of layer rules has them.
TABLE: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], float, float], ...] = (
    ("linear", lambda: weighted(nn.Linear(2, 2), [[2.0, 0.0], [0.0, 1.0]], [3.0, 4.0]), (2,), 11.0, 2.0),
    ("linear, 4 tokens", lambda: weighted(nn.Linear(2, 2), [[2.0, 0.0], [0.0, 1.0]], [3.0, 4.0]), (4, 2), 16.0, 2.0),
    ("conv 1×1, 9 pixels", lambda: weighted(nn.Conv2d(1, 1, 1), [[2.0]], [1.0]), (1, 3, 3), 9.0, 2.0),
    ("conv1d 1, 4 entries", lambda: weighted(nn.Conv1d(1, 1, 1), [[2.0]], [1.0]), (1, 4), 8.0, 2.0),
    ("circular sum", lambda: weighted(circular(3), [[1.0, 1.0, 1.0]], [0.0]), (1, 5), 9.0, 3.0),
    ("transposed, disjoint", lambda: weighted(nn.ConvTranspose1d(1, 1, 2, 2), [[3.0, 4.0]], [1.0]), (1, 2), 17.0, 5.0),
    ("relu", nn.ReLU, (4,), 3.0, 1.0),
    ("prelu", lambda: with_parameters(nn.PReLU(2), weight=[0.5, -3.0]), (2, 4), 9.0, 3.0),
    ("gentle prelu", lambda: with_parameters(nn.PReLU(), weight=[0.5]), (2, 4), 3.0, 1.0),
    ("spline", lambda: with_parameters(layers.LinearSpline(1, 2), slopes=[0.5, -2.0]), (4,), 6.0, 2.0),
    ("gentle spline", lambda: with_parameters(layers.LinearSpline(1, 2), slopes=[0.5, -0.5]), (4,), 1.5, 0.5),
    ("full sort", layers.FullSort, (4,), 3.0, 1.0),
    ("pixel unshuffle", lambda: nn.PixelUnshuffle(2), (1, 4, 4), 3.0, 1.0),
    ("channel shuffle", lambda: nn.ChannelShuffle(2), (4, 2, 2), 3.0, 1.0),
    ("scaled pooling", lambda: layers.ScaledAvgPool2d(2), (1, 4, 4), 3.0, 1.0),
    ("scaled pooling, overlapping", lambda: layers.ScaledAvgPool2d(3, 1), (1, 9, 9), 9.0, 3.0),
    ("sigmoid-gated residual", lambda: layers.GatedResidual(nn.LeakyReLU(3.0), math.log(3.0)), (4,), 7.5, 2.5),
    ("convex potential", lambda: potential([[1.0, 0.0], [0.0, 0.5]], [3.0, 4.0]), (2,), 13.0, 1.0),
    ("convex potential, 4 tokens", lambda: potential([[1.0, 0.0], [0.0, 0.5]], [3.0, 4.0]), (4, 2), 23.0, 1.0),
    ("steep convex potential", lambda: potential([[2.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), (2,), 21.0, 7.0),
    ("convex potential 1×1, 4 pixels", lambda: pixel_potential(2.0, 1.0), (1, 2, 2), 29.0, 7.0),
    ("leaky relu", lambda: nn.LeakyReLU(0.5), (4,), 3.0, 1.0),
    ("leaky relu, steep", lambda: nn.LeakyReLU(-2.0), (4,), 6.0, 2.0),
    ("tanh of 4", nn.Tanh, (4,), 2.0, 1.0),
    ("tanh of 100", nn.Tanh, (100,), 3.0, 1.0),
    ("group sort", lambda: layers.GroupSort(2), (4,), 3.0, 1.0),
    ("centering", layers.LayerCentering, (4,), 3.0, 1.0),
    ("dropout", lambda: nn.Dropout(0.75), (4,), 12.0, 4.0),
    ("ball", lambda: layers.BallProjection(2.0), (4,), 2.0, 1.0),
    ("large ball", lambda: layers.BallProjection(5.0), (4,), 3.0, 1.0),
    ("sphere", lambda: layers.SphereScaling(2.0, floor=0.5), (4,), 2.0, 4.0),
    ("sphere, high floor", lambda: layers.SphereScaling(2.0, floor=12.0), (4,), 0.5, 1.0 / 6.0),
    ("cotangent gate", lambda: layers.CotangentGate(0.25), (4,), 3.0, 0.5),
    ("large cotangent gate", lambda: layers.CotangentGate(7.0), (4,), 3.0, 1.0),
    ("normalising gate", lambda: layers.CotangentGate(4.0, "normalize", 1e-3), (4,), 3.0, 8.0),
    ("normalising gate, high floor", lambda: layers.CotangentGate(4.0, "normalize", 2.0), (4,), 3.0, 2.0),
    ("max pooling", lambda: nn.MaxPool2d(2), (1, 4, 4), 3.0, 1.0),
    ("max pooling, overlapping", lambda: nn.MaxPool2d(3, 2, 1), (1, 8, 8), 6.0, 2.0),
    ("average pooling", lambda: nn.AvgPool2d(2), (1, 4, 4), 1.5, 0.5),
    ("average pooling, overlapping", lambda: nn.AvgPool2d(3, 1), (1, 9, 9), 3.0, 1.0),
    ("global average pooling", lambda: nn.AdaptiveAvgPool2d(1), (2, 5, 5), 0.6, 0.2),
    ("norm pooling", lambda: layers.L2NormPool2d(2), (1, 4, 4), 3.0, 1.0),
    ("norm pooling, overlapping", lambda: layers.L2NormPool2d(2, 1), (1, 4, 4), 6.0, 2.0),
    ("flatten", nn.Flatten, (2, 3), 3.0, 1.0),
    ("sum", lambda: Traced(lambda x: x + x), (4,), 6.0, 2.0),
    ("difference", lambda: Traced(lambda x: x - functional.relu(x)), (4,), 6.0, 2.0),
    ("residual", lambda: layers.Residual(nn.LeakyReLU(3.0)), (4,), 12.0, 4.0),
    ("convex residual", lambda: layers.ConvexResidual(nn.LeakyReLU(3.0), 0.25), (4,), 4.5, 1.5),
    ("concatenation", lambda: Traced(lambda x: torch.cat([x, x], 1)), (4,), 3.0 * R2, 2.0),
    ("stack", lambda: Traced(lambda x: torch.stack([x, x, x], 1)), (4,), 3.0 * R3, 3.0),
    ("product with a number", lambda: Traced(lambda x: -1.5 * x), (4,), 4.5, 1.5),
    ("quotient by a number", lambda: Traced(lambda x: x / -4), (4,), 0.75, 0.25),
    ("mean of 4", lambda: Traced(lambda x: x.mean(-1)), (3, 4), 1.5, 0.5),
    ("permute", lambda: Traced(lambda x: x.permute(0, 2, 1)), (3, 4), 3.0, 1.0),
)


# Certified norms may exceed the truth by 1e-3; gates' float64 slack is below 1e-9. Never below the truth.
test_the_rules_numbers_are_those_of_the_contract = numbers_are_those_of(TABLE, below=1e-12, above=1e-3)


def test_parameter_bounds_are_those_of_the_contract() -> None:
    def of(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
        return dict(wrap(layer.double(), shape, input_norm=3.0, cotangent_norm=0.5).sensitivity().per_parameter)

    # Only the gates' float64 slack and the sweeps' rounding allowance come on top, below 1e-8.
    assert of(nn.Linear(4, 2), (4,)) == pytest.approx({"weight": 1.5, "bias": 0.5}, rel=1e-8)
    assert of(nn.Linear(4, 2), (9, 4)) == pytest.approx({"weight": 1.5, "bias": 1.5}, rel=1e-8)
    assert of(nn.Conv2d(2, 3, 3, padding=1), (2, 6, 6)) == pytest.approx({"weight": 4.5, "bias": 3.0}, rel=1e-8)
    assert of(nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 8, 8)) == pytest.approx(
        {"weight": 3.0, "bias": 2.0}, rel=1e-8
    )
    assert of(nn.Conv2d(1, 1, 5, padding=2), (1, 2, 2)) == pytest.approx({"weight": 3.0, "bias": 1.0}, rel=1e-8)
    assert of(nn.Conv1d(2, 3, 3, padding=1), (2, 9)) == pytest.approx({"weight": 1.5 * R3, "bias": 1.5}, rel=1e-8)
    assert of(circular(3), (1, 4)) == pytest.approx({"weight": 1.5 * R3, "bias": 1.0}, rel=1e-8)
    # Zero padding of a length of 2 lets a window of 3 read 2 entries; a circle lets it read one of them twice.
    assert of(circular(3), (1, 2)) == pytest.approx({"weight": 1.5 * R3, "bias": 0.5 * R2}, rel=1e-8)
    assert of(nn.Conv1d(1, 1, 3, padding=1), (1, 2)) == pytest.approx({"weight": 1.5 * R2, "bias": 0.5 * R2}, rel=1e-8)
    assert of(nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1), (2, 3, 3)) == pytest.approx(
        {"weight": 3.0, "bias": 3.0}, rel=1e-8
    )
    assert of(nn.ConvTranspose2d(1, 1, 3), (1, 1, 1)) == pytest.approx({"weight": 1.5, "bias": 1.5}, rel=1e-8)
    assert of(nn.PReLU(4), (4, 5, 5)) == pytest.approx({"weight": 1.5}, rel=1e-8)
    assert of(layers.LinearSpline(4), (4, 5, 5)) == pytest.approx({"slopes": 1.5}, rel=1e-8)
    assert of(layers.GatedResidual(nn.Identity()), (4,)) == pytest.approx({"mix.logit": 0.75}, rel=1e-8)
    # 2G(2wX + ‖b‖) and 2wG with w = 2; on 4 pixels √P = 2 joins the bias.
    assert of(potential([[2.0, 0.0], [0.0, 1.0]], [3.0, 4.0]), (2,)) == pytest.approx(
        {"weight": 17.0, "bias": 2.0}, rel=1e-3
    )
    assert of(pixel_potential(2.0, 1.0), (1, 2, 2)) == pytest.approx({"weight": 14.0, "bias": 4.0}, rel=1e-3)
    assert of(layers.Householder(4), (4, 5, 5)) == pytest.approx({"theta": 1.5}, rel=1e-8)


def conv(**options: object) -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1, **options)  # type: ignore[arg-type]


REFUSED: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], str], ...] = (
    ("centering over the batch", lambda: layers.LayerCentering((0, 1)), (4,), "batch axis"),
    ("centering over a negative batch axis", lambda: layers.LayerCentering((-2,)), (4,), "batch axis"),
    ("centering over no axis, which means all", lambda: layers.LayerCentering(()), (4,), "batch"),
    ("max pooling of unbatched maps", lambda: nn.MaxPool2d(2), (4, 4), "batch, channels"),
    ("average pooling of unbatched maps", lambda: nn.AvgPool2d(2), (4, 4), "batch, channels"),
    ("max pooling of padding alone", lambda: nn.MaxPool2d(2, dilation=3, padding=1), (1, 2, 2), "-inf"),
    ("certain dropout", lambda: nn.Dropout(1.0), (4,), "below 1"),
    ("dropout in place", lambda: nn.Dropout(0.5, inplace=True), (4,), "inplace=False"),
    ("steep slope in place", lambda: nn.LeakyReLU(2.0, inplace=True), (4,), "inplace=False"),
)


@pytest.mark.parametrize(("name", "build", "shape", "message"), REFUSED, ids=[line[0] for line in REFUSED])
def test_a_rule_refuses(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=message) as refusal:
        wrap(nn.Sequential(nn.Identity(), build()), shape)
    assert [part.path for part in refusal.value.parts] == ["1"]


@dataclass(frozen=True)
class TripleOperator(DenseOperator):
    """``x ↦ 3Wx``."""

    def norm(self, weight: Tensor) -> float:
        return 3.0 * super().norm(weight)


class Triple(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return 3.0 * super().forward(values)


def test_a_limit_is_not_taken_for_the_norm_of_an_operator_that_its_constraint_never_saw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))

    @base.register_rule(Triple)
    def triple_rule(module: Triple, context: base.RuleContext) -> base.LayerBounds:
        stretch = lambda: context.norm("weight", TripleOperator())  # noqa: E731
        return base.LayerBounds(
            output_norm=lambda: stretch() * context.input_norm,
            lipschitz=stretch,
            gradients={"weight": lambda: 3.0 * context.input_norm},
            operators={"weight": DenseOperator()},
        )

    torch.manual_seed(0)
    layer = Triple(4, 4, bias=False).double()
    model = wrap(Probed(layer, (4,), (4,)).double(), (4,), constraint={"layer": Spectral(0.5)})
    # Initial weights of norm 1/2 or so: the truth is 3 times the norm that is left.
    truth = 3.0 * float(torch.linalg.svdvals(layer.weight.detach())[0])
    assert truth > 1.0
    assert bounds_of(model)["before.shift"] >= truth


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize("constraint", [None, Spectral()], ids=["free", "constrained"])
def test_strides_and_dilations_that_are_lists_are_as_good_as_tuples(
    kind: type[nn.Module], constraint: Spectral | None
) -> None:
    axes = 1 if kind in (nn.Conv1d, nn.ConvTranspose1d) else 2
    totals = []
    for form in (tuple, list):
        torch.manual_seed(0)
        layer: Any = kind(2, 2, 3)
        layer.stride, layer.dilation = form([2] * axes), form([1] * axes)
        totals.append(wrap(nn.Sequential(layer), (2, *[6] * axes), constraint=constraint).sensitivity().total)
    assert totals[0] == totals[1] > 0.0
