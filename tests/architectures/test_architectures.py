"""The architectures: shapes for any size, norms kept before any training, private steps on every route, bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    architectures,
    constraints,
    gated,
    layers,
    losses,
)
from clipless_dp.architectures import parts
from clipless_dp.architectures.lipsll import _NAMED
from clipless_dp.norms import conv2d_norm

IMAGES: dict[str, Callable[[tuple[int, ...]], nn.Sequential]] = {
    "mlp": lambda shape: architectures.mlp(shape, 4, widths=(12, 8)),
    "residual mlp": lambda shape: architectures.residual_mlp(shape, 4, width=9, depth=2),
    "lipvgg": lambda shape: architectures.lipvgg(shape, 4, widths=(4, 6), hidden=8),
    "lipvgg, average": lambda shape: architectures.lipvgg(shape, 4, widths=(4, 6), hidden=8, pooling="average"),
    "lipresnet": lambda shape: architectures.lipresnet(shape, 4, widths=(4, 6), blocks=1),
    "lipresnet, truncated": lambda shape: architectures.lipresnet(shape, 4, widths=(4,), blocks=2, paths=1),
    "mixer": lambda shape: architectures.mixer(shape, 4, channels=6, depth=1),
    "lipsll": lambda shape: architectures.lipsll(shape, 4, 2, 1, 4, 5),
    "lipsll, strided": lambda shape: architectures.lipsll(shape, 4, 1, 1, 4, 5, kernel_size=2, stride=2),
}
TABLES: dict[str, Callable[[tuple[int, ...]], nn.Sequential]] = {
    "mlp": lambda shape: architectures.mlp(shape, 4, widths=(12, 8)),
    "residual mlp": lambda shape: architectures.residual_mlp(shape, 4, width=9, depth=2),
}


def check_forward_and_backward(net: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(2, *shape)
    outputs = net(inputs)
    assert outputs.shape == (2, 4)
    outputs.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("name", IMAGES)
@given(channels=st.sampled_from([1, 3]), height=st.integers(28, 64), width=st.integers(28, 64))
@settings(max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_images_of_any_size_go_forwards_and_reach_every_weight_backwards(
    name: str, channels: int, height: int, width: int
) -> None:
    shape = channels, height, width
    check_forward_and_backward(IMAGES[name](shape), shape)


@pytest.mark.parametrize("name", TABLES)
@given(columns=st.integers(1, 60))
@settings(max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_tables_of_any_width_go_forwards_and_reach_every_weight_backwards(name: str, columns: int) -> None:
    check_forward_and_backward(TABLES[name]((columns,)), (columns,))


def test_unshuffled_maps_keep_every_entry() -> None:
    net = architectures.lipvgg((3, 32, 32), 4, widths=(4, 8, 8), hidden=8, pooling="unshuffle")
    check_forward_and_backward(net, (3, 32, 32))
    assert net[9](net[:9](torch.randn(2, 3, 32, 32))).shape == (2, 32 * 4 * 4)


@pytest.mark.parametrize("side", [9, 28, 32, 64, 65])
def test_default_sizes_leave_maps_and_grids_of_at_most_eight_by_eight(side: int) -> None:
    vgg = architectures.lipvgg((1, side, side), 10)
    flat = next(index for index, part in enumerate(vgg) if isinstance(part, nn.Flatten))
    assert 4 <= vgg[:flat](torch.zeros(1, 1, side, side)).shape[-1] <= 8
    for net in (architectures.lipresnet((1, side, side), 10), architectures.mixer((1, side, side), 10)):
        assert 4 <= net[0](torch.zeros(1, 1, side, side)).shape[-1] <= 8


@pytest.mark.parametrize(("height", "width", "patch"), [(28, 28, 4), (29, 30, 4), (31, 33, 5), (7, 64, 8), (5, 5, 9)])
def test_patches_read_each_pixel_exactly_once(height: int, width: int, patch: int) -> None:
    entry, grid = parts.patches(1, 1, (height, width), patch)
    with torch.no_grad():
        entry.weight.fill_(1.0)
    image = torch.zeros(1, 1, height, width, requires_grad=True)
    output = entry(image)
    assert tuple(output.shape[2:]) == grid
    output.sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad, torch.ones_like(image))


@pytest.mark.parametrize("name", IMAGES)
def test_fresh_weights_have_norm_one_and_lose_no_direction_that_they_have_room_for(name: str) -> None:
    torch.manual_seed(2)
    for module in IMAGES[name]((3, 30, 28)).modules():
        if isinstance(module, nn.Linear):
            singular = torch.linalg.svdvals(module.weight.detach().double())
            # float32 entries of an orthogonal matrix.
            assert torch.allclose(singular, torch.ones_like(singular), atol=1e-5)
        elif isinstance(module, nn.Conv2d):
            padding = module.padding
            assert not isinstance(padding, str)
            norm = conv2d_norm(module.weight.detach(), input_size=(8, 8), stride=module.stride, padding=padding)
            # Above 1 by what the certificate costs.
            assert 0.9 < norm <= 1.0 + 1e-2
        assert getattr(module, "bias", None) is None or not bool(module.bias.any())


def test_initialising_sees_the_generator_and_nothing_else() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(4)
        nets.append(IMAGES["lipvgg"]((1, 28, 28)))
    for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(next(IMAGES["lipvgg"]((1, 28, 28)).parameters()), next(nets[0].parameters()))


def wrapped(name: str, route: str, shape: tuple[int, ...] = (1, 10, 10)) -> DPLipModel:
    torch.manual_seed(1)
    net: nn.Module = IMAGES[name](shape)
    constraint = {"spectral": constraints.Spectral(), "orthogonal": constraints.Orthogonal()}.get(route)
    if route == "gated":
        net = gated(net, cotangent_mode="normalize")
    return DPLipModel(net, input_shape=shape, input_norm=2.0, loss=losses.TauCrossEntropy(8.0), constraint=constraint)


@pytest.mark.parametrize("route", ["spectral", "orthogonal", "gated"])
@pytest.mark.parametrize("name", IMAGES)
def test_a_private_step_moves_every_weight_and_keeps_it_within_its_limit(name: str, route: str) -> None:
    model = wrapped(name, route)
    before = {key: value.detach().clone() for key, value in model.net.named_parameters()}
    sensitivity = model.sensitivity().per_parameter
    optimizer = CliplessDPSGD(
        model, lr=0.5, noise_multiplier=1.0, sample_rate=1.0, dataset_size=6, accountant="rdp", sampling="none"
    )
    model.loss(model(torch.randn(6, 1, 10, 10)), torch.arange(6) % 4).backward()
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in model.net.named_parameters())
    if route == "gated":
        # A residual layer reads its weight twice, so that its own norm enters even between gates.
        assert name.startswith(("residual mlp", "lipsll")) or model.sensitivity().per_parameter == sensitivity
    else:
        for key, constraint in model.constraints.items():
            assert constraint.holds(model.net.get_parameter(key).detach(), model.operators(key))
        assert model.lipschitz_constant() <= 1.0 + 1e-9


@pytest.mark.parametrize("name", IMAGES)
def test_no_direction_is_stretched_by_more_than_the_stated_constant(name: str) -> None:
    model = wrapped(name, "spectral").double()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    free = model.lipschitz_constant()
    model.project_()
    constrained = model.lipschitz_constant()
    assert constrained <= 1.0 + 1e-9 < free
    for scale in (0.01, 1.0):
        point = scale * torch.randn(1, 10, 10, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x: model.net(x.unsqueeze(0)).squeeze(0), point)
        assert float(torch.linalg.svdvals(jacobian.reshape(4, -1))[0]) <= constrained


SUMMARY = (
    r"(?P<count>[\d,]+) parameters, Δ = (?P<total>[\d.e+]+) \((?P<layers>.*)\), "
    r"Lipschitz constant (?P<constant>[\d.e+]+|inf)"
)


def test_a_summary_is_one_line_with_what_the_model_says_of_itself() -> None:
    model = wrapped("lipvgg", "spectral")
    line = architectures.summary(model)
    assert "\n" not in line
    found = re.fullmatch(SUMMARY, line)
    assert found is not None
    sensitivity = model.sensitivity()
    assert int(found["count"].replace(",", "")) == sum(p.numel() for p in model.net.parameters())
    assert float(found["total"]) == pytest.approx(sensitivity.total, rel=1e-3)
    # G = √2 and X = 2; a 3×3 convolution reads each pixel nine times, the dense layers have biases.
    expected = {"0": 3 * 2**1.5, "3": 3 * 2**1.5, "7": 10**0.5, "9": 10**0.5}
    layers_found = {name: float(value) for name, value in (part.split() for part in found["layers"].split(", "))}
    assert layers_found == pytest.approx(expected, rel=1e-2)
    assert float(found["constant"]) == pytest.approx(1.0, rel=1e-6)


def test_a_summary_counts_what_is_trained_only_and_says_where_no_constant_is_known() -> None:
    net = nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 2))
    net[1].bias.requires_grad_(False)
    line = architectures.summary(DPLipModel(net, input_shape=(3,), loss=losses.TauCrossEntropy(2.0)))
    found = re.fullmatch(SUMMARY, line)
    assert found is not None
    assert found["count"] == "28"
    assert found["constant"] == "inf"


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a table for images": (lambda: architectures.lipvgg((7,), 2), "input_shape"),
    "an image without pixels": (lambda: architectures.mixer((1, 0, 8), 2), "input_shape"),
    "no columns": (lambda: architectures.mlp((0,), 2), "input_shape"),
    "no shape": (lambda: architectures.residual_mlp((), 2), "input_shape"),
    "no classes": (lambda: architectures.mlp((3,), 0), "classes"),
    "an odd width": (lambda: architectures.mlp((3,), 2, widths=(8, 5)), "widths must be even"),
    "no width": (lambda: architectures.lipresnet((1, 8, 8), 2, widths=()), "widths must be even"),
    "an odd hidden layer": (lambda: architectures.lipvgg((1, 8, 8), 2, hidden=3), "hidden must be even"),
    "an even kernel": (lambda: architectures.lipvgg((1, 8, 8), 2, kernel_size=4), "kernel_size must be odd"),
    "an unknown pooling": (lambda: architectures.lipvgg((1, 8, 8), 2, pooling="max"), "pooling must be"),
    "an odd map to unshuffle": (
        lambda: architectures.lipvgg((1, 28, 28), 2, widths=(4, 4, 4), pooling="unshuffle"),
        "map of 7×7 cannot be unshuffled",
    ),
    "no block": (lambda: architectures.lipresnet((1, 8, 8), 2, blocks=0), "blocks must be positive"),
    "no depth": (lambda: architectures.mixer((1, 8, 8), 2, depth=0), "depth must be positive"),
    "an empty patch": (lambda: architectures.mixer((1, 8, 8), 2, patch_size=0), "patch_size must be positive"),
    "fewer channels than the image": (lambda: architectures.lipsll((3, 8, 8), 2, width=2), "width must be a whole"),
    "an unknown size": (lambda: architectures.lipsll((3, 8, 8), 2, size="XXL"), "size must be"),  # type: ignore[arg-type]
    "no stride": (lambda: architectures.lipsll((3, 8, 8), 2, 1, 1, 4, 4, stride=0), "stride must be positive"),
    "paths below none": (lambda: architectures.lipresnet((1, 8, 8), 2, paths=-1), "paths must be a whole number"),
    "alpha above one": (lambda: architectures.mixer((1, 8, 8), 2, alpha=1.5), "alpha must lie in"),
}


@pytest.mark.parametrize("name", BAD)
def test_sizes_out_of_range_are_refused_by_name(name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(ConfigurationError, match=message):
        build()


@pytest.mark.parametrize(("size", "sizes"), [("S", (20, 7, 45)), ("M", (30, 10, 60)), ("L", (50, 10, 90))])
def test_named_sizes_are_the_papers(size: Any, sizes: tuple[int, int, int]) -> None:
    net = architectures.lipsll((3, 8, 8), 10, inner=2, size=size)
    convolutions = [part for part in net.modules() if isinstance(part, layers.ConvexPotentialConv2d)]
    dense = [part for part in net.modules() if isinstance(part, layers.ConvexPotential)]
    assert (len(convolutions), len(dense), convolutions[0].channels) == sizes
    assert dense[0].features == sizes[2] * 2 * 2
    assert _NAMED["XL"] == (70, 15, 120, 2048)


@pytest.mark.parametrize("side", [1, 3, 5, 8, 9, 29, 30, 31, 32])
def test_averages_before_the_dense_layers_read_every_pixel(side: int) -> None:
    net = architectures.lipsll((1, side, side), 2, 1, 0, 1, 1)
    with torch.no_grad():
        net.body[1].weight.zero_()  # type: ignore[index, union-attr, operator]
    image = torch.zeros(1, 1, side, side, requires_grad=True)
    net.body(image).sum().backward()
    assert image.grad is not None
    assert bool((image.grad == image.grad[0, 0, 0, 0]).all())
    assert float(image.grad.max()) > 0.0


def test_rows_of_norm_one_and_scaled_potentials_make_scores_that_each_are_one_lipschitz() -> None:
    torch.manual_seed(0)
    net = architectures.lipsll((2, 8, 4), 3, 2, 2, 4, 6)
    limits = {"head": constraints.UnitRows(), "*": constraints.AlmostOrthogonal(scales="norm", side="outputs")}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    loss = losses.TauCrossEntropy(4.0)
    model = DPLipModel(net, input_shape=(2, 8, 4), input_norm=3.0, loss=loss, constraint=limits).double()
    point = torch.randn(2, 8, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x.unsqueeze(0)).squeeze(0), point).reshape(3, -1)
    assert float(jacobian.norm(dim=1).max()) <= 1.0 + 1e-6
    pairs = model.margin_constants()
    rows = net.head.weight.detach()  # type: ignore[union-attr, operator]
    assert torch.allclose(rows.norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(pairs, torch.cdist(rows, rows), rtol=1e-6, atol=1e-6)
    assert float(pairs.max()) <= 2.0 + 1e-6
    assert float((jacobian[0] - jacobian[1]).norm()) <= float(pairs[0, 1]) * (1.0 + 1e-9)


def test_a_mixer_block_without_biases_has_none() -> None:
    names = [name for name, _ in layers.MixerBlock(4, 3, bias=False).named_parameters()]
    assert len(names) == 4
    assert all(name.endswith("weight") for name in names)
