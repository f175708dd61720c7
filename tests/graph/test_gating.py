"""Gates at every layer: constant sensitivity, the network's own names, no certificate."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, UnsupportedModuleError, gated, layers
from tests.soundness.attack import Record, add_or_remove_one, wrap
from tests.support import no_certificates


class Branches(nn.Module):
    """Tied layers, an unused one, an unused parameter and a keyword call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.alias = self.stem
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
        self.unused = nn.Linear(2, 2)
        self.spare = nn.Parameter(torch.zeros(2))
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("fleeting", torch.zeros(1), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        stem = self.stem(input=values)
        return self.head(stem + self.alias(stem))  # type: ignore[no-any-return]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


NETWORKS: tuple[tuple[Callable[[], nn.Module], tuple[int, ...]], ...] = ((Branches, (4,)), (convolutional, (1, 8, 8)))


@pytest.mark.parametrize(("build", "shape"), NETWORKS)
def test_names_and_storage_are_the_networks_own(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net = build()
    result = gated(net)
    assert set(result.state_dict()) == set(net.state_dict())
    assert [name for name, _ in sorted(result.named_buffers())] == [name for name, _ in sorted(net.named_buffers())]
    for name, parameter in net.named_parameters():
        assert result.get_parameter(name) is parameter
    result.load_state_dict(net.state_dict())


@pytest.mark.parametrize(("build", "shape"), NETWORKS)
@pytest.mark.parametrize("input_mode", ["sphere", "ball"])
@pytest.mark.parametrize("cotangent_mode", ["clip", "normalize"])
def test_every_layer_gets_the_constants_of_its_gates_and_no_certificate_is_computed(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    input_mode: str,
    cotangent_mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_certificates(monkeypatch)
    net = gated(
        build(),
        input_norm=0.5,
        cotangent_norm=0.25,
        input_mode=input_mode,  # type: ignore[arg-type]
        cotangent_mode=cotangent_mode,  # type: ignore[arg-type]
    )
    model = wrap(net, shape)
    sensitivity = model.sensitivity()
    for layer in sensitivity.layers:
        # Only the gates' float32 slack, below 1e-4, comes on top.
        assert layer.input_norm == pytest.approx(0.5, rel=1e-4)
        assert layer.cotangent_norm == pytest.approx(0.25, rel=1e-4)
        assert layer.certified_norm is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e3)
    assert model.sensitivity() is sensitivity


@pytest.mark.parametrize(("build", "shape"), NETWORKS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("mode", ["clip", "normalize"])
def test_no_weight_breaks_the_bounds_of_a_gated_network(
    build: Callable[[], nn.Module], shape: tuple[int, ...], size: float, mode: str
) -> None:
    torch.manual_seed(0)
    net = build().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
    model = wrap(gated(net, cotangent_mode=mode), shape)  # type: ignore[arg-type]
    inputs = torch.randn(4, *shape, dtype=torch.float64) * torch.tensor([1e6, 1.0, 1e-3, 1.0]).double().reshape(
        -1, *[1] * len(shape)
    )
    targets = torch.randn(4, *model.output_shape, dtype=torch.float64)
    record = Record(model)
    for sample, target in zip(inputs, targets, strict=True):
        record.try_(sample, target)
    assert max(record.worst.values()) > 0.5
    if mode == "clip":
        # Normalising lifts a cotangent that vanishes in exact arithmetic out of its rounding, which differs from
        # batch to batch: there the sum of the batch is a statement about real arithmetic only.
        add_or_remove_one(model, inputs, targets)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_weights_that_overflow_never_put_nan_into_a_gated_networks_gradient(value: float) -> None:
    model = wrap(gated(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))), (4,))
    for name in ("0.weight", "2.weight", "4.weight", "2.bias"):
        with torch.no_grad():
            model.net.get_parameter(name).fill_(value)
        model.zero_grad()
        model.loss(model(torch.randn(3, 4)), torch.randn(3, 2)).backward()
        for parameter_name, parameter in model.net.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), (name, parameter_name)


def test_only_the_layers_that_a_pattern_names_are_gated() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    kinds = [type(module) for module in gated(net, layers=["1.*"]).modules()]
    assert kinds.count(layers.SphereScaling) == 1
    assert kinds.count(layers.CotangentGate) == 1


def test_a_gated_network_computes_what_the_gates_make_of_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    values = torch.randn(5, 3)
    ball = layers.BallProjection(0.5)
    expected = net[2](ball(torch.relu(net[0](ball(values)))))
    assert torch.equal(gated(net, input_norm=0.5, input_mode="ball")(values), expected)


def test_the_original_network_is_left_as_it_was() -> None:
    net = convolutional()
    before = [name for name, _ in net.named_modules()]
    gated(net)
    assert [name for name, _ in net.named_modules()] == before


def test_patterns_that_match_nothing_values_out_of_range_and_untraceable_networks_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match="no parametrised layer"):
        gated(net, layers=["conv*"])
    with pytest.raises(ConfigurationError, match="input_norm"):
        gated(net, input_norm=0.0)
    with pytest.raises(ConfigurationError, match="cotangent_norm"):
        gated(net, cotangent_norm=math.inf)
    with pytest.raises(ConfigurationError, match="mode"):
        gated(net, cotangent_mode="scale")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"nn\.Sequential"):
        gated(nn.Linear(4, 4))

    class Branching(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values if values.sum() > 0 else -values

    with pytest.raises(UnsupportedModuleError, match="control flow"):
        gated(Branching())
