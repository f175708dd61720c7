"""The configurations under attack: every rule, on shapes where it is easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import layers
from clipless_dp.gates import gradient_gated_layer
from clipless_dp.testing import LipschitzLayerTestCase
from tests.soundness.attack import Case, Traced


class OneCase(LipschitzLayerTestCase):
    """All checks on the case that a test is parametrized with, the patient one among the slow tests."""

    @pytest.fixture(autouse=True)
    def _choose(self, case: Any) -> None:
        self.case = self.of(case)

    def of(self, case: Any) -> Case:
        """The case to check."""
        return case

    def cases(self) -> list[Case]:
        return [self.case]

    @pytest.mark.slow
    def test_no_parameters_pass_a_bound(self) -> None:
        super().test_no_parameters_pass_a_bound()


def _linear(name: str, features: tuple[int, int], shape: tuple[int, ...], *, bias: bool = True) -> Case:
    attained = (("layer.weight", 0.999),) + ((("layer.bias", 0.999),) if bias else ())
    return Case(name, lambda: nn.Linear(*features, bias=bias), shape, attained=attained)


def _conv(
    name: str,
    channels: tuple[int, int],
    kernel: int | tuple[int, int],
    size: tuple[int, int],
    *,
    weight: float | None = 0.7,
    **options: Any,
) -> Case:
    attained = (("layer.bias", 0.999),) if options.get("bias", True) else ()
    if weight is not None:
        attained = (("layer.weight", weight), *attained)
    return Case(name, lambda: nn.Conv2d(*channels, kernel, **options), (channels[0], *size), attained=attained)


def _function(name: str, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], **options: Any) -> Case:
    return Case(name, lambda: Traced(function), shape, **options)


LINEAR_CASES = (
    _linear("linear", (6, 5), (6,)),
    _linear("linear, wide output", (3, 8), (3,)),
    _linear("linear, one number", (1, 1), (1,)),
    _linear("linear, no bias", (5, 4), (5,), bias=False),
    _linear("linear on 5 tokens", (4, 3), (5, 4)),
    _linear("linear on 2×3 positions", (4, 3), (2, 3, 4)),
)

# √N is attained by an input whose pixels all lie in N windows, each offset of which sees the same pattern. Where
# borders are as wide as the map no input is like that: such a geometry has weight=None and is only held to 1.
CONV_CASES = (
    _conv("conv 3×3, padding 1", (2, 3), 3, (8, 8), padding=1),
    _conv("conv 5×5, valid", (1, 2), 5, (14, 14), padding="valid"),
    _conv("conv 5×5, padding 2", (1, 2), 5, (12, 12), padding=2),
    _conv("conv 5×5 on a 3×3 map", (2, 2), 5, (3, 3), padding=2),
    _conv("conv 2×2, padding 'same'", (1, 2), 2, (6, 6), padding="same"),
    _conv("conv 4×3, padding 'same', dilation 2", (1, 2), (4, 3), (9, 9), padding="same", dilation=2),
    _conv("conv 3×3, stride 2, padding 1", (2, 2), 3, (9, 9), padding=1, stride=2),
    _conv("conv 4×4, stride 2", (1, 2), 4, (12, 12), stride=2),
    _conv("conv 5×5, stride 2, padding 2", (1, 2), 5, (12, 12), stride=2, padding=2),
    _conv("conv 5×5, stride 4, few pixels covered twice", (1, 1), 5, (21, 21), stride=4),
    _conv("conv 2×2, stride 3", (1, 2), 2, (8, 8), stride=3),
    _conv("conv 3×3, dilation 2, stride 2", (1, 2), 3, (13, 13), stride=2, dilation=2),
    _conv(
        "conv 3×3, dilation 3, stride 2, padding 3", (1, 2), 3, (10, 10), stride=2, dilation=3, padding=3, weight=None
    ),
    _conv("conv 3×1, stride (1, 2)", (2, 2), (3, 1), (9, 7), stride=(1, 2), padding=(1, 0)),
    _conv("conv 3×3, groups 2", (4, 4), 3, (8, 8), padding=1, groups=2),
    _conv("conv 3×3, depthwise", (3, 3), 3, (8, 8), padding=1, groups=3),
    _conv("conv 1×1", (3, 2), 1, (4, 4)),
    _conv("conv 3×3 on one pixel", (2, 2), 3, (1, 1), padding=1),
    _conv("conv 3×3, no bias", (2, 2), 3, (8, 8), padding=1, bias=False),
)


def _signal(name: str, length: int, *settings: Any, weight: float | None = 0.7, **options: Any) -> Case:
    attained = (("layer.bias", 0.999),)
    if weight is not None:
        attained = (("layer.weight", weight), *attained)
    return Case(name, lambda: nn.Conv1d(*settings, **options), (settings[0], length), attained=attained)


SIGNAL_CASES = (
    _signal("conv1d 3, padding 1", 12, 2, 3, 3, padding=1),
    _signal("conv1d 5, stride 2, padding 2", 17, 1, 2, 5, padding=2, stride=2),
    _signal("conv1d 4, stride 3", 22, 2, 2, 4, stride=3),
    _signal("conv1d 3, dilation 2, groups 2, padding 'same'", 11, 4, 2, 3, padding="same", dilation=2, groups=2),
    _signal("conv1d 7 on a length of 3", 3, 1, 2, 7, padding=3, weight=None),
)

# On a torus a flat signal lies in as many windows everywhere, so √N is attained exactly at stride 1.
CIRCULAR_CASES = (
    _conv("circular conv 3×3, padding 1", (2, 2), 3, (6, 6), padding=1, padding_mode="circular", weight=0.999),
    _conv(
        "circular conv 3×3, padding 'same'", (1, 2), 3, (4, 5), padding="same", padding_mode="circular", weight=0.999
    ),
    _conv("circular conv 3×3, stride 2", (1, 2), 3, (8, 8), stride=2, padding=1, padding_mode="circular"),
    _conv("circular conv 5×5 on a 3×3 map", (1, 2), 5, (3, 3), padding=2, padding_mode="circular", weight=0.999),
    _conv("circular conv 3×3, padding 3 on a 3×3 map", (1, 1), 3, (3, 3), padding=3, padding_mode="circular"),
    _signal("circular conv1d 3", 8, 2, 2, 3, padding=1, padding_mode="circular", weight=0.999),
)


def _transposed(name: str, channels: tuple[int, int], kernel: int, size: tuple[int, ...], **options: Any) -> Case:
    kind = nn.ConvTranspose1d if len(size) == 1 else nn.ConvTranspose2d
    weight = options.pop("weight", 0.7)
    attained = (("layer.bias", 0.999),)
    if weight is not None:
        attained = (("layer.weight", weight), *attained)
    return Case(name, lambda: kind(*channels, kernel, **options), (channels[0], *size), attained=attained)


class Enlarged(nn.Module):
    """A transposed convolution that is told its output's size at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(1, 2, 3, stride=2)

    def forward(self, values: Tensor) -> Tensor:
        return self.deconv(values, output_size=[10, 9])  # type: ignore[no-any-return]


TRANSPOSED_CASES = (
    _transposed("transposed conv 3×3", (2, 3), 3, (8, 8)),
    _transposed("transposed conv 3×3, padding 1", (2, 2), 3, (8, 8), padding=1),
    _transposed("transposed conv 4×4, stride 2, padding 1", (2, 2), 4, (5, 5), stride=2, padding=1),
    _transposed("transposed conv 3×3, stride 2, output padding 1", (1, 2), 3, (6, 6), stride=2, output_padding=1),
    _transposed("transposed conv 2×2, stride 2", (2, 1), 2, (4, 4), stride=2),
    _transposed(
        "transposed conv 3×3, dilation 3, output padding 2",
        (1, 1),
        3,
        (7, 7),
        dilation=3,
        output_padding=2,
        weight=None,
    ),
    _transposed("transposed conv 3×3, groups 2", (4, 2), 3, (6, 6), groups=2, padding=1),
    _transposed("transposed conv 5×5 on one pixel", (2, 2), 5, (1, 1), padding=1),
    _transposed(
        "transposed conv 3×3, stride 2, padding 1, of one pixel",
        (2, 2),
        3,
        (1, 1),
        stride=2,
        padding=1,
        output_padding=1,
    ),
    _transposed("transposed conv1d 3", (2, 2), 3, (9,)),
    _transposed("transposed conv1d 5, stride 3, output padding 2", (1, 2), 5, (7,), stride=3, output_padding=2),
    Case("transposed conv with the output's size", Enlarged, (1, 4, 4)),
)

ACTIVATION_CASES = (
    Case("ReLU", nn.ReLU, (6,)),
    Case("ReLU in place", lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True)), (6,)),
    Case("LeakyReLU", lambda: nn.LeakyReLU(0.2), (6,)),
    Case("LeakyReLU, slope 3", lambda: nn.LeakyReLU(3.0), (6,)),
    Case("LeakyReLU, slope -2", lambda: nn.LeakyReLU(-2.0), (6,)),
    Case("tanh", nn.Tanh, (6,)),
    Case("tanh, saturated", nn.Tanh, (6,), input_norm=50.0),
    Case("PReLU", nn.PReLU, (6,), attained=(("layer.weight", 0.999),)),
    Case("PReLU of each channel", lambda: nn.PReLU(12), (12, 2, 2), attained=(("layer.weight", 0.999),)),
    Case("linear spline", lambda: layers.LinearSpline(), (6,), attained=(("layer.slopes", 0.7),)),
    Case("linear spline of each channel", lambda: layers.LinearSpline(4, 6, 0.5), (4, 3, 3)),
    Case(
        "linear spline on tokens, two slopes",
        lambda: layers.LinearSpline(4, 2, 3.0, dim=-1),
        (3, 4),
        attained=(("layer.slopes", 0.999),),
    ),
    Case("linear spline of 64 segments", lambda: layers.LinearSpline(3, 64, 2.0, init="abs"), (3,)),
    Case(
        "linear spline, knots near 0", lambda: layers.LinearSpline(2, 4, 0.05), (2,), attained=(("layer.slopes", 0.9),)
    ),
    Case("absolute value", layers.AbsoluteValue, (6,)),
    Case("full sort", layers.FullSort, (6,)),
    Case("full sort of each pixel's channels", layers.FullSort, (4, 3, 3)),
    Case("full sort of tokens' features", lambda: layers.FullSort(dim=-1), (3, 4)),
    Case("identity", nn.Identity, (3, 2)),
    Case("GroupSort 2", lambda: layers.GroupSort(2), (6,)),
    Case("GroupSort 3", lambda: layers.GroupSort(3), (6,)),
    Case("GroupSort 4 on maps", lambda: layers.GroupSort(4), (4, 3, 3)),
    Case("MaxMin on maps", layers.MaxMin, (4, 3, 3)),
    Case("MaxMin on tokens", lambda: layers.MaxMin(dim=-1), (3, 4)),
    Case("Householder", lambda: layers.Householder(4), (4,), attained=(("layer.theta", 0.9),)),
    Case("Householder on maps", lambda: layers.Householder(2), (2, 3, 3), attained=(("layer.theta", 0.999),)),
    Case("Householder on tokens", lambda: layers.Householder(4, dim=-1), (3, 4)),
    Case("MaxMin of halves on maps", lambda: layers.MaxMin(pairing="halves"), (4, 3, 3)),
    Case("Householder of halves", lambda: layers.Householder(4, pairing="halves"), (4,)),
    Case("Householder, order 2", lambda: layers.Householder(2, order=2), (2, 3, 3), attained=(("layer.theta", 0.8),)),
    Case("Householder of halves, order 2", lambda: layers.Householder(4, -1, order=2, pairing="halves"), (3, 4)),
    Case("centering", layers.LayerCentering, (2, 3, 3)),
    Case("centering of each channel", lambda: layers.LayerCentering((-2, -1)), (2, 3, 3)),
    Case("centering over channels", lambda: layers.LayerCentering((1,)), (4, 2)),
)

DISTANCE_CASES = (
    Case("distances", lambda: layers.DistanceLinear(5, 4), (5,), attained=(("layer.weight", 0.999),)),
    Case("distances, p = 8", lambda: layers.DistanceLinear(5, 4, p=8.0), (5,)),
    Case("distances, means of p = 4", lambda: layers.DistanceLinear(5, 3, p=4.0, mean=True), (5,)),
    Case("order statistics", lambda: layers.SortLinear(6, 4, 0.4, terms=4), (6,), attained=(("layer.bias", 0.999),)),
    Case("order statistics, one term", lambda: layers.SortLinear(3, 3, 1.0), (3,), attained=(("layer.weight", 0.999),)),
    Case(
        "order statistics behind a linear layer",
        lambda: nn.Sequential(layers.SortLinear(4, 4), nn.Linear(4, 4), layers.DistanceLinear(4, 2)),
        (4,),
    ),
)

POOLING_CASES = (
    Case("max pooling 2", lambda: nn.MaxPool2d(2), (2, 6, 6)),
    Case("max pooling 3, stride 1", lambda: nn.MaxPool2d(3, stride=1), (1, 6, 6)),
    Case("max pooling 3, stride 2, padding 1", lambda: nn.MaxPool2d(3, 2, padding=1), (2, 7, 7)),
    Case("max pooling 3, stride 2, ceil_mode", lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (1, 6, 6)),
    Case("max pooling 2, dilation 2", lambda: nn.MaxPool2d(2, 1, dilation=2), (1, 6, 6)),
    Case("average pooling 2", lambda: nn.AvgPool2d(2), (2, 6, 6)),
    Case("average pooling 3, stride 1, padding 1", lambda: nn.AvgPool2d(3, 1, padding=1), (1, 6, 6)),
    Case(
        "average pooling without counting padding",
        lambda: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False),
        (1, 4, 4),
    ),
    Case("average pooling 3, stride 2, ceil_mode", lambda: nn.AvgPool2d(3, 2, ceil_mode=True), (1, 6, 6)),
    Case("average pooling, divisor 1", lambda: nn.AvgPool2d(2, 1, divisor_override=1), (1, 5, 5)),
    Case("scaled average pooling 2", lambda: layers.ScaledAvgPool2d(2), (2, 6, 6)),
    Case("scaled average pooling 3, stride 2, padding 1", lambda: layers.ScaledAvgPool2d(3, 2, 1), (1, 7, 7)),
    Case("adaptive average pooling to 1", lambda: nn.AdaptiveAvgPool2d(1), (2, 5, 4)),
    Case("adaptive average pooling 7×5 to 3×2", lambda: nn.AdaptiveAvgPool2d((3, 2)), (1, 7, 5)),
    Case("adaptive average pooling upwards", lambda: nn.AdaptiveAvgPool2d((5, None)), (1, 3, 4)),
    Case("L2-norm pooling 2", lambda: layers.L2NormPool2d(2), (2, 6, 6)),
    Case("L2-norm pooling 3, stride 1, padding 1", lambda: layers.L2NormPool2d(3, 1, 1), (1, 6, 6)),
)

GATE_CASES = (
    Case("ball projection that bites", lambda: layers.BallProjection(0.5), (5,), input_norm=2.0),
    Case("ball projection that does not", lambda: layers.BallProjection(5.0), (5,), input_norm=2.0),
    Case("box that bites", lambda: layers.BoxProjection(-0.3, 0.5), (5,), input_norm=2.0),
    Case("box without zero", lambda: layers.BoxProjection(0.5, 0.7), (5,), input_norm=2.0),
    Case("box of a side for each", lambda: layers.BoxProjection((-1.0, 0.0, -9.0), (2.0, 0.0, 9.0)), (3,)),
    Case("sphere scaling", lambda: layers.SphereScaling(1.0, floor=0.1), (2, 3), input_norm=2.0),
    Case("group norm", lambda: layers.SampleGroupNorm(2, floor=0.3), (4, 3), input_norm=2.0),
    Case("group norm under its floor", lambda: layers.SampleGroupNorm(2, floor=10.0), (2, 2, 3)),
    Case("group norm of single entries", lambda: layers.SampleGroupNorm(3, floor=0.5), (3,)),
    Case("sphere scaling under its floor", lambda: layers.SphereScaling(2.0, floor=10.0), (5,)),
    Case("cotangent gate that bites", lambda: layers.CotangentGate(0.3), (5,)),
    Case("cotangent gate that does not", lambda: layers.CotangentGate(5.0), (5,)),
    Case("normalising cotangent gate", lambda: layers.CotangentGate(0.5, mode="normalize", floor=0.1), (5,)),
    Case("normalising cotangent gate, floor above G", lambda: layers.CotangentGate(3.0, "normalize", 4.0), (5,)),
    Case(
        "normalising cotangent gate that lifts",
        lambda: layers.CotangentGate(0.5, mode="normalize", floor=0.01),
        (5,),
        cotangent_norm=0.05,
    ),
    Case(
        "gates around a linear layer",
        lambda: nn.Sequential(
            nn.Linear(4, 6), layers.SphereScaling(1.0), nn.Linear(6, 5), layers.CotangentGate(0.5), nn.Linear(5, 3)
        ),
        (4,),
    ),
)


def _gradient_gated(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], mode: str, limit: float = 0.05, **floor: float
) -> Case:
    attained = ("layer.weight", 0.999), ("layer.bias", 0.999)
    return Case(name, lambda: gradient_gated_layer(build(), limit, mode=mode, **floor), shape, attained=attained)


GRADIENT_GATE_CASES = (
    _gradient_gated("clipped gradients, linear", lambda: nn.Linear(6, 5), (6,), "clip"),
    _gradient_gated("normalised gradients, linear", lambda: nn.Linear(6, 5), (6,), "normalize"),
    _gradient_gated("clipped gradients, linear on 2 tokens", lambda: nn.Linear(6, 8), (2, 6), "clip"),
    _gradient_gated("normalised gradients, linear on 5 tokens", lambda: nn.Linear(4, 3), (5, 4), "normalize"),
    _gradient_gated("clipped gradients, conv 3×3", lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 6), "clip"),
    _gradient_gated("normalised gradients, conv 3×3", lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 4), "normalize"),
    _gradient_gated("clipped gradients, transposed conv", lambda: nn.ConvTranspose2d(2, 2, 3, 2), (2, 3, 3), "clip"),
    _gradient_gated("gradients below the cap of a gate that clips", lambda: nn.Linear(6, 5), (6,), "clip", 20.0),
    _gradient_gated(
        "normalised gradients below the cap, linear", lambda: nn.Linear(6, 5), (6,), "normalize", 20.0, floor=0.1
    ),
    _gradient_gated(
        "normalised gradients below the cap, linear on 5 tokens", lambda: nn.Linear(4, 3), (5, 4), "normalize", 9.0
    ),
    _gradient_gated(
        "normalised gradients below floor and cap, conv 1×1",
        lambda: nn.Conv2d(3, 2, 1),
        (3, 3, 2),
        "normalize",
        50.0,
        floor=0.1,
    ),
)

DROPOUT_CASES = (
    Case("dropout 0.5", lambda: nn.Dropout(0.5), (6,)),
    Case("dropout 0.9", lambda: nn.Dropout(0.9), (6,)),
    Case("dropout of channels", lambda: nn.Dropout2d(0.5), (4, 3, 3)),
)


class Tied(nn.Module):
    """One linear layer used three times, its weight also serving another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, values: Tensor) -> Tensor:
        values = self.first(self.first(values)) + self.first(values)
        return self.second(values)  # type: ignore[no-any-return]


class Parallel(nn.Module):
    """One linear layer applied twice to one value: both uses see the same signals."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.shared(values) + self.shared(values)  # type: ignore[no-any-return]


class TiedConvolutions(nn.Module):
    """One kernel at two strides and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(1, 1, 3, padding=1)
        self.coarse = nn.Conv2d(1, 1, 3, stride=2)
        self.coarse.weight = self.fine.weight

    def forward(self, values: Tensor) -> Tensor:
        return self.coarse(self.fine(values))  # type: ignore[no-any-return]


class FanOut(nn.Module):
    """One value with three consumers, joined by concatenation and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        stem = self.stem(values)
        return torch.cat([self.left(stem), self.right(stem), 0.5 * stem], dim=1)


GRAPH_CASES = (
    Case("residual sum", lambda: layers.Residual(nn.Linear(5, 5)), (5,)),
    Case("residual of a residual", lambda: layers.Residual(layers.Residual(nn.Linear(4, 4))), (4,)),
    Case("residual of the identity", lambda: layers.Residual(nn.Identity()), (4,)),
    Case("convex residual", lambda: layers.ConvexResidual(nn.Linear(5, 5), alpha=0.3), (5,)),
    Case("fan-out and concatenation", FanOut, (4,)),
    Case("tied linear layers", Tied, (4,)),
    Case("linear layer used twice", Parallel, (4,), attained=(("layer.shared.weight", 0.999),)),
    Case("tied convolutions", TiedConvolutions, (1, 7, 7)),
    Case(
        "linear across tokens",
        lambda: nn.Sequential(Traced(lambda x: x.transpose(1, 2)), nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, 3)),
        (3, 4),
    ),
    Case("sigmoid-gated residual", lambda: layers.GatedResidual(nn.Linear(5, 5)), (5,)),
    Case(
        "sigmoid-gated residual of a sign change",
        lambda: layers.GatedResidual(Traced(lambda x: -x)),
        (5,),
        attained=(("layer.mix.logit", 0.8),),
    ),
    Case("sigmoid-gated residual of the identity", lambda: layers.GatedResidual(nn.Identity()), (5,)),
    Case("token mixing", lambda: layers.TokenMixing(nn.Linear(5, 3)), (5, 4)),
    Case("mixer block", lambda: layers.MixerBlock(4, 3), (4, 3)),
    Case(
        "convex potential",
        lambda: layers.ConvexPotential(5),
        (5,),
        attained=(("layer.weight", 0.6), ("layer.bias", 0.9)),
    ),
    Case(
        "convex potential, wide, no bias",
        lambda: layers.ConvexPotential(4, 7, bias=False),
        (4,),
        attained=(("layer.weight", 0.75),),
    ),
    Case("convex potential, narrow, on 5 tokens", lambda: layers.ConvexPotential(4, 2), (5, 4)),
    Case("convex potential 3×3", lambda: layers.ConvexPotentialConv2d(1, hidden=2), (1, 7, 7)),
    Case("convex potential 3×3, no bias", lambda: layers.ConvexPotentialConv2d(2, hidden=1, bias=False), (2, 6, 6)),
    Case("convex potential 4×4, padding 0", lambda: layers.ConvexPotentialConv2d(1, 4, 2, padding=0), (1, 8, 8)),
    Case("convex potential 3×3, stride 2", lambda: layers.ConvexPotentialConv2d(1, hidden=2, stride=2), (1, 6, 7)),
    Case("convex potential 2×2, stride 2", lambda: layers.ConvexPotentialConv2d(2, 2, 2, stride=2), (2, 4, 5)),
    Case("convex potential 5×5 on a 2×2 map", lambda: layers.ConvexPotentialConv2d(2, 5), (2, 2, 2)),
    Case("pixel unshuffle", lambda: nn.PixelUnshuffle(2), (2, 4, 6)),
    Case("pixel shuffle", lambda: nn.PixelShuffle(2), (4, 2, 3)),
    Case("channel shuffle", lambda: nn.ChannelShuffle(2), (4, 3, 3)),
    _function("sum with itself", lambda x: x + x, (4,)),
    _function("difference", lambda x: x - functional.relu(x), (4,)),
    _function("torch.add and torch.sub", lambda x: torch.add(torch.sub(x, -x), x), (4,)),
    _function("scalar multiples", lambda x: (2.5 * x - x * 3.0) / 0.25, (4,)),
    _function("torch.mul and torch.div", lambda x: torch.div(torch.mul(x, -3), 0.5), (4,)),
    _function("mean over one axis", lambda x: x.mean(1), (3, 4)),
    _function("mean over positions", lambda x: torch.mean(x, dim=(2, 3)), (2, 3, 3)),
    _function("mean, keepdim", lambda x: x.mean(-1, keepdim=True), (3, 4)),
    _function("concatenation with itself", lambda x: torch.cat([x, x, torch.relu(x)], dim=-1), (4,)),
    _function("stack", lambda x: torch.stack([x, -x], dim=1), (4,)),
    _function("flatten and view", lambda x: x.flatten(1).view(x.size(0), 2, -1), (2, 4, 3)),
    _function("reshape and permute", lambda x: x.permute(0, 3, 1, 2).reshape(x.shape[0], -1), (2, 4, 3)),
    _function("transpose and unflatten", lambda x: x.transpose(1, 2).unflatten(1, (2, 2)), (3, 4)),
    _function("swapaxes and unsqueeze", lambda x: torch.swapaxes(x, 1, 2).unsqueeze(1).contiguous(), (3, 4)),
    Case("flatten and unflatten modules", lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 3))), (2, 3, 2)),
    _function("functional activations", lambda x: torch.tanh(functional.relu(x)) + torch.abs(x).neg(), (5,)),
    _function("functional max pooling", lambda x: functional.max_pool2d(x, 3, stride=1, padding=1), (1, 5, 5)),
    _function("functional average pooling", lambda x: functional.avg_pool2d(x, 3, stride=2, padding=1), (1, 5, 5)),
    _function("functional adaptive pooling", lambda x: functional.adaptive_avg_pool2d(x, (2, 3)), (2, 5, 4)),
)

CASES = (
    *LINEAR_CASES,
    *CONV_CASES,
    *SIGNAL_CASES,
    *CIRCULAR_CASES,
    *TRANSPOSED_CASES,
    *ACTIVATION_CASES,
    *DISTANCE_CASES,
    *POOLING_CASES,
    *GATE_CASES,
    *GRADIENT_GATE_CASES,
    *DROPOUT_CASES,
    *GRAPH_CASES,
)


def case_named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
