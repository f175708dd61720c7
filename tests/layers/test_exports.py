"""Every layer of this package computes the same numbers behind each exporter, or is refused in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, gradient_gated, layers, losses
from clipless_dp.gates.plain import plain_copy
from clipless_dp.modules import Unscripted

Build = Callable[[], nn.Module]
MAPS, TOKENS, ROWS = (4, 6, 6), (5, 4), (4,)

LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "AbsoluteValue": (layers.AbsoluteValue, MAPS),
    "AdaptiveL2NormPool1d": (lambda: layers.AdaptiveL2NormPool1d(3), (2, 7)),
    "AdaptiveL2NormPool2d": (lambda: layers.AdaptiveL2NormPool2d((4, 1)), MAPS),
    "BallProjection": (lambda: layers.BallProjection(0.5), MAPS),
    "BiasedCentering": (lambda: layers.BiasedCentering(4, (-2, -1)), MAPS),
    "BoxProjection": (lambda: layers.BoxProjection(-0.5, 1.0), MAPS),
    "BoxProjection of columns": (lambda: layers.BoxProjection([-1.0, 0.0, 0.2, -3.0], 0.5), ROWS),
    "CausalMixing": (lambda: layers.CausalMixing(5), TOKENS),
    "CausalMixing, squares": (lambda: layers.CausalMixing(5, "squares"), TOKENS),
    "ChannelBias": (lambda: layers.ChannelBias(4), MAPS),
    "ConcatReLU": (layers.ConcatReLU, MAPS),
    "ConcatResidual": (lambda: layers.ConcatResidual(nn.Linear(4, 2)), ROWS),
    "ConvexPotential": (lambda: layers.ConvexPotential(4, 3), TOKENS),
    "ConvexPotentialConv2d": (lambda: layers.ConvexPotentialConv2d(4, 3), MAPS),
    "ConvexResidual": (lambda: layers.ConvexResidual(nn.Linear(4, 4)), ROWS),
    "CotangentGate": (lambda: layers.CotangentGate(0.5), MAPS),
    "Diagonal": (lambda: layers.Diagonal(4), ROWS),
    "DistanceLinear": (lambda: layers.DistanceLinear(4, 3), ROWS),
    "DistanceLinear, p = 8": (lambda: layers.DistanceLinear(4, 3, p=8.0, mean=True), ROWS),
    "Foton": (lambda: layers.Foton(_sequence(), 1.0), ROWS),
    "FullSort": (layers.FullSort, MAPS),
    "GatedResidual": (lambda: layers.GatedResidual(nn.Linear(4, 4)), ROWS),
    "GradientGatedConvexPotential": (lambda: gradient_gated(nn.Sequential(layers.ConvexPotential(4, 3))), TOKENS),
    "GradientGatedConvexPotentialConv2d": (
        lambda: gradient_gated(nn.Sequential(layers.ConvexPotentialConv2d(4, 3))),
        MAPS,
    ),
    "GradientGatedDiagonal": (lambda: gradient_gated(nn.Sequential(layers.Diagonal(4))), ROWS),
    "GradientGatedStructuredLinear": (lambda: gradient_gated(nn.Sequential(layers.StructuredLinear(4, 3))), ROWS),
    "Highway": (lambda: layers.Highway([nn.Linear(4, 4) for _ in range(3)]), ROWS),
    "GroupSort": (lambda: layers.GroupSort(2), MAPS),
    "Householder": (lambda: layers.Householder(4), MAPS),
    "Householder, order 2": (lambda: layers.Householder(4, order=2, pairing="halves"), MAPS),
    "L2NormPool1d": (lambda: layers.L2NormPool1d(3, 2, 1), (2, 7)),
    "L2NormPool2d": (lambda: layers.L2NormPool2d(3, 2, 1), MAPS),
    "LayerCentering": (layers.LayerCentering, MAPS),
    "LinearSpline": (lambda: layers.LinearSpline(4), MAPS),
    "MaxMin": (layers.MaxMin, MAPS),
    "MixerBlock": (lambda: layers.MixerBlock(4, 3), (4, 3)),
    "MonotoneResidual": (lambda: layers.MonotoneResidual(nn.Sequential(nn.Linear(4, 2)), [1, -1, 0, 0], 2), ROWS),
    "NoiseInjection": (lambda: layers.NoiseInjection(0.5, 1.0), ROWS),
    "PadChannels": (lambda: layers.PadChannels(7), MAPS),
    "ConvexPotentialConv2d, strided": (lambda: layers.ConvexPotentialConv2d(4, 3, 2, stride=2), MAPS),
    "Pepita": (lambda: layers.Pepita(_sequence(), 1.0), ROWS),
    "Residual": (lambda: layers.Residual(nn.Linear(4, 4)), ROWS),
    "SampleGroupNorm": (lambda: layers.SampleGroupNorm(2, floor=0.1), MAPS),
    "ScaledAvgPool2d": (lambda: layers.ScaledAvgPool2d(3, 2, 1), MAPS),
    "SigmoidMix": (lambda: _Mixed(), ROWS),
    "SortLinear": (lambda: layers.SortLinear(4, 3, 0.4), ROWS),
    "SphereScaling": (lambda: layers.SphereScaling(0.5), MAPS),
    "StopGradient": (layers.StopGradient, ROWS),
    "StructuredLinear": (lambda: layers.StructuredLinear(4, 3), ROWS),
    "StructuredLinear, Toeplitz": (lambda: layers.StructuredLinear(4, 3, "toeplitz"), ROWS),
    "SymmetricPad1d": (lambda: layers.SymmetricPad1d((2, 0)), (2, 7)),
    "SymmetricPad2d": (lambda: layers.SymmetricPad2d((2, 0, 1, 3)), MAPS),
    "TokenMixing": (lambda: layers.TokenMixing(nn.Linear(5, 3)), TOKENS),
    "Tokens": (layers.Tokens, MAPS),
    # Torch's own, whose divisor ONNX drops.
    "AvgPool2d": (lambda: nn.AvgPool2d((3, 2), 2, 1, divisor_override=1), MAPS),
    "AvgPool2d, ceil_mode": (lambda: nn.AvgPool2d(2, 3, ceil_mode=True, divisor_override=5), (4, 6, 7)),
}


def _sequence() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.1), nn.Linear(5, 3))


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = layers.SigmoidMix(0.3)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.mix(values, values.abs())
        return found


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, torch.randn(5, *shape)


def traced(net: nn.Module, values: Tensor) -> nn.Module:
    return torch.jit.trace(net, (values[:3],))  # type: ignore[no-any-return, no-untyped-call]


def exported(net: nn.Module, values: Tensor) -> nn.Module:
    rows = ({0: torch.export.Dim("rows")},)
    return torch.export.export(net, (values[:3],), dynamic_shapes=rows).module()


FORMS = {"torch.jit.trace": traced, "torch.export": exported}


def expected_of(layer: nn.Module, values: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = layer(values)
    return found


def test_every_layer_is_exported_here() -> None:
    values = {name: getattr(layers, name) for name in layers.__all__}
    kinds = {name for name, value in values.items() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert kinds <= LAYERS.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_form_of_a_layer_computes_what_the_layer_does_on_another_number_of_rows(name: str, form: str) -> None:
    layer, values = built(name)
    found = FORMS[form](plain_copy(layer), values)(values)
    # float32 of other kernels, on sums of under 100 numbers of size one.
    torch.testing.assert_close(found, expected_of(layer, values), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_onnx_computes_what_a_layer_does_on_another_number_of_rows(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(
            package, reason=f"{package} is not installed: pip install 'clipless-dp[export]' onnxruntime"
        )
    import onnxruntime  # type: ignore[import-not-found, unused-ignore]

    layer, values = built(name)
    path = tmp_path / "layer.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = ({0: torch.export.Dim("rows")},)
        torch.onnx.export(plain_copy(layer), (values[:3],), path, dynamo=True, dynamic_shapes=rows, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected_of(layer, values), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_scripting_a_layer_computes_the_same_or_is_refused_in_words(name: str) -> None:
    layer, values = built(name)
    plain = plain_copy(layer)
    if any(isinstance(part, Unscripted) for part in plain.modules()):
        with pytest.raises(ConfigurationError, match=r"torch\.jit\.script does not compile .* by torch\.jit\.trace"):
            torch.jit.script(plain)
        return
    scripted = torch.jit.script(plain)
    torch.testing.assert_close(scripted(values), expected_of(layer, values), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_scripting_a_wrapped_model_is_refused_in_words() -> None:
    model = DPLipModel(nn.Sequential(nn.Linear(4, 2)), input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy())
    with pytest.raises(ConfigurationError, match=r"export_net\(\)"):
        torch.jit.script(model)
