"""What a refusal names exists, and what it says of the refused layer is true."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import clipless_dp
from clipless_dp import DPLipModel, UnsupportedModuleError, gradient_gated, layers, losses
from clipless_dp.rules import base, find_rule
from tests.soundness.attack import wrap

NAMES = re.compile(r"\b(clipless_dp(?:\.\w+)+|torch(?:\.\w+)+|nn\.\w+)")
REMEDIES = sorted({*base._REMEDIES.values()})


@pytest.mark.parametrize("remedy", REMEDIES, ids=lambda text: text[:60])
def test_whatever_a_refusal_names_exists_and_layers_that_it_names_have_rules(remedy: str) -> None:
    found = NAMES.findall(remedy)
    assert found
    for name in found:
        value: object = {"clipless_dp": clipless_dp, "torch": torch, "nn": nn}[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        if name.startswith("nn.") and isinstance(value, type):
            assert value in base._RULES, name
    for name in re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", NAMES.sub("", remedy)):
        assert hasattr(layers, name) or hasattr(nn, name), name


RUN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (4,)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2), (2, 4, 4)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), (2, 4, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4,)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), (3, 4)),
    "Softmax": (lambda: nn.Softmax(1), (4,)),
    "GELU": (nn.GELU, (4,)),
    "Softplus": (nn.Softplus, (4,)),
    "Hardswish": (nn.Hardswish, (4,)),
    "GLU": (lambda: nn.GLU(1), (4,)),
    "Threshold": (lambda: nn.Threshold(0.1, 0.0), (4,)),
    "Hardshrink": (nn.Hardshrink, (4,)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2), (1, 3, 3, 3)),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), (1, 4, 4)),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (1, 4, 4)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), (1, 4, 4)),
}


def network(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    width = layer(torch.zeros(2, *shape)).flatten(1).shape[1]
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 2))


@pytest.mark.parametrize("name", RUN)
def test_a_layer_that_is_said_to_run_behind_gradient_gates_does(name: str) -> None:
    build, shape = RUN[name]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModuleError, match=r"gradient_gated\(net\), it runs as it is") as refusal:
        wrap(network(build(), shape), shape)
    assert refusal.value.parts[0].kind == name
    model = DPLipModel(
        gradient_gated(network(build(), shape)),
        input_shape=shape,
        input_norm=10.0,
        loss=losses.TauCrossEntropy(1.0),
    )
    model.loss(model(torch.randn(3, *shape)), torch.tensor([0, 1, 1])).sum().backward()
    assert 0.0 < model.sensitivity().total < 10.0


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_that_has_seen_a_batch_of_zeros_is_an_ordinary_one() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(UnsupportedModuleError, match=r"run the network once on a batch of zeros"):
        wrap(net, (4,))
    net(torch.zeros(2, 4))
    wrap(net.double(), (4,)).sensitivity()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_frozen_batch_norm_folds_into_the_layer_before_as_its_refusal_says(kind: type[nn.BatchNorm2d]) -> None:
    torch.manual_seed(0)
    flat = kind is nn.BatchNorm1d
    before = nn.Linear(4, 3) if flat else nn.Conv2d(4, 3, 3)
    shape = (4,) if flat else (4, 5, 5)
    norm = kind(3)
    norm(before(torch.randn(64, *shape)))
    net = nn.Sequential(before, norm).eval()
    with pytest.raises(UnsupportedModuleError, match=r"fuse_conv_bn_eval or fuse_linear_bn_eval folds it"):
        wrap(net, shape)
    fuse = torch.nn.utils.fuse_linear_bn_eval if flat else torch.nn.utils.fuse_conv_bn_eval
    folded = fuse(net[0], net[1])  # type: ignore[arg-type]
    values = torch.randn(3, *shape)
    torch.testing.assert_close(folded(values), net(values), rtol=1e-4, atol=1e-5)  # float32, sums of 36 products
    wrap(nn.Sequential(folded).double(), shape).sensitivity()


def test_every_kind_of_torch_that_takes_one_tensor_has_a_rule_or_a_refusal_of_its_own() -> None:
    told = tuple(base._REMEDIES)
    plain = {
        kind
        for name in torch.nn.modules.__all__
        if isinstance(kind := getattr(nn, name), type)
        and kind.__module__.rpartition(".")[2]
        in ("activation", "batchnorm", "conv", "dropout", "instancenorm", "normalization", "padding", "pooling", "rnn")
    }
    silent = {kind.__name__ for kind in plain if kind not in base._RULES and not issubclass(kind, told)}
    # RMSNorm and UNKNOWN here are told the general remedy.
    assert silent <= {"RMSNorm", "CrossMapLRN2d", "Container"}, silent
    assert find_rule(nn.ReLU()) is not None
