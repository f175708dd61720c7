"""The package's own modules compute what they say, on vectors, maps and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, InputError, layers, losses
from clipless_dp.constraints import Spectral
from clipless_dp.norms import conv2d_norm
from tests.soundness.attack import wrap

PRESERVING: tuple[tuple[nn.Module, tuple[int, ...]], ...] = (
    (layers.GroupSort(2), (4,)),
    (layers.GroupSort(3), (6, 2, 2)),
    (layers.GroupSort(4, dim=-1), (3, 8)),
    (layers.MaxMin(), (4, 3, 3)),
    (layers.FullSort(), (5,)),
    (layers.FullSort(), (4, 3, 3)),
    (layers.FullSort(dim=-1), (3, 4)),
    (layers.MaxMin(dim=2), (3, 4)),
    (layers.Householder(4), (4, 3, 3)),
    (layers.Householder(4, dim=-1), (3, 4)),
    (layers.Householder(4, pairing="halves"), (4, 3)),
    (layers.Householder(4, order=2), (4, 3, 3)),
    (layers.Householder(6, dim=-1, order=2, pairing="halves"), (2, 6)),
    (layers.GroupSort(2, pairing="halves"), (6,)),
    (layers.MaxMin(pairing="halves"), (4, 3, 3)),
    (layers.MaxMin(dim=-1, pairing="halves"), (3, 4)),
)


@pytest.mark.parametrize(("module", "shape"), PRESERVING, ids=repr)
def test_norms_are_preserved_exactly_and_distances_never_grow(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = module.double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -4.0, 4.0)
    first, second = torch.randn(2, 50, *shape, dtype=torch.float64)
    second[25:] = first[25:] + 1e-3 * second[25:]
    with torch.no_grad():
        left, right = module(first).flatten(1), module(second).flatten(1)
    norms, before = left.norm(dim=1), first.flatten(1).norm(dim=1)
    assert torch.allclose(norms, before, rtol=1e-13)  # float64 sums of under 30 squares
    distances = (left - right).norm(dim=1)
    assert bool((distances <= (first - second).flatten(1).norm(dim=1) * (1.0 + 1e-10)).all())


def test_group_sort_sorts_adjacent_channels() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 9.0, 7.0, 8.0]])
    assert layers.GroupSort(3)(values).tolist() == [[1.0, 2.0, 3.0, 7.0, 8.0, 9.0]]
    assert layers.GroupSort(2)(values).tolist() == [[1.0, 3.0, 2.0, 9.0, 7.0, 8.0]]
    assert layers.GroupSort(6)(values).tolist() == [sorted(values[0].tolist())]


def test_max_min_acts_on_the_channels_of_each_pixel() -> None:
    values = torch.randn(2, 4, 3, 3)
    found = layers.MaxMin()(values)
    assert torch.equal(found[:, 0], torch.minimum(values[:, 0], values[:, 1]))
    assert torch.equal(found[:, 3], torch.maximum(values[:, 2], values[:, 3]))


def test_householder_at_a_right_angle_is_max_min_up_to_order() -> None:
    values = torch.randn(8, 6, dtype=torch.float64)
    found = layers.Householder(6).double()(values)
    expected = layers.MaxMin()(values)
    # cos(π/2) is 6e-17 in float64, and the initial angle is a rounded float32: an error of 4e-8.
    assert torch.allclose(found.unflatten(1, (3, 2)).sort(2).values.flatten(1), expected, atol=1e-6)


def test_householder_is_continuous_across_its_line() -> None:
    module = layers.Householder(2).double()
    with torch.no_grad():
        module.theta.fill_(1.1)
    along = torch.tensor([math.cos(0.55), math.sin(0.55)], dtype=torch.float64)
    across = torch.tensor([-along[1], along[0]], dtype=torch.float64)
    near, far = module(torch.stack([along + 1e-9 * across, along - 1e-9 * across]))
    assert torch.allclose(near, far, atol=1e-8)


def test_layer_centering_subtracts_each_samples_own_mean() -> None:
    values = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    everything = layers.LayerCentering()(values)
    channels = layers.LayerCentering((-2, -1))(values)
    # Means of 32 float64 numbers of size one.
    assert torch.allclose(everything.flatten(1).mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(channels.mean((2, 3)), torch.zeros(3, 2, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(layers.LayerCentering()(everything), everything, atol=1e-14)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, None, 0), (3, 1, 1), ((2, 3), (1, 2), (0, 1))])
def test_l2_norm_pooling_is_the_norm_of_each_window(
    kernel: int | tuple[int, int], stride: int | tuple[int, int] | None, padding: int | tuple[int, int]
) -> None:
    values = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    module = layers.L2NormPool2d(kernel, stride, padding)
    found = module(values)
    windows = nn.functional.unfold(
        values.reshape(6, 1, 6, 7), module.kernel_size, stride=module.stride, padding=module.padding
    )
    expected = windows.norm(dim=1).reshape(found.shape)
    assert bool((found <= expected).all())
    assert torch.allclose(found, expected, atol=1e-6)  # the module's own ε


def test_l2_norm_pooling_has_a_finite_gradient_at_zero() -> None:
    values = torch.zeros(1, 1, 2, 2, requires_grad=True)
    layers.L2NormPool2d(2)(values).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.zeros(1, 1, 2, 2))


def test_residual_blocks_add_and_mix() -> None:
    block = nn.Linear(3, 3)
    values = torch.randn(2, 3)
    assert torch.equal(layers.Residual(block)(values), values + block(values))
    assert torch.equal(layers.ConvexResidual(block, alpha=0.0)(values), values)
    assert torch.equal(layers.ConvexResidual(block, alpha=1.0)(values), block(values))


def test_a_fresh_spline_is_a_relu() -> None:
    values = 3.0 * torch.randn(50, 4, dtype=torch.float64)
    # The knots' values are cumulative sums of under 10 float64 numbers of size one.
    assert torch.allclose(layers.LinearSpline(4).double()(values), torch.relu(values), atol=1e-14)


@pytest.mark.parametrize(("channels", "dim", "shape"), [(1, 1, (5, 3)), (5, 1, (5, 3)), (3, -1, (5, 3)), (4, 1, (4,))])
def test_a_spline_is_the_integral_of_its_slopes(channels: int, dim: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = layers.LinearSpline(channels, 6, 1.5, dim).double()
    nn.init.normal_(module.slopes)
    values = 2.0 * torch.randn(40, *shape, dtype=torch.float64)
    found = module(values)
    knots = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    lows, highs = knots[:-1].clone(), knots[1:].clone()
    lows[0], highs[-1] = -math.inf, math.inf
    spread = values.movedim(dim, -1).unsqueeze(-1)
    lengths = spread.clamp(lows, highs) - torch.zeros(1, dtype=torch.float64).clamp(lows, highs)
    expected = (lengths * module.slopes).sum(-1).movedim(-1, dim)
    assert torch.allclose(found, expected, atol=1e-13)  # sums of 6 products of size at most ten


def test_a_splines_gradient_reaches_the_slopes_by_the_lengths_that_each_segment_covers() -> None:
    module = layers.LinearSpline(1, 4, 2.0).double()
    module(torch.tensor([[2.5]], dtype=torch.float64)).sum().backward()
    assert module.slopes.grad is not None
    assert module.slopes.grad.tolist() == [[0.0, 0.0, 1.0, 1.5]]
    module.zero_grad()
    module(torch.tensor([[-1.25]], dtype=torch.float64)).sum().backward()
    assert module.slopes.grad.tolist() == [[-0.25, -1.0, 0.0, 0.0]]


def test_scaled_average_pooling_keeps_the_norm_of_a_constant_map() -> None:
    values = torch.full((2, 3, 6, 6), 0.7, dtype=torch.float64)
    found = layers.ScaledAvgPool2d((2, 3))(values)
    assert torch.allclose(found.flatten(1).norm(dim=1), values.flatten(1).norm(dim=1), rtol=1e-13)  # 108 squares
    assert torch.allclose(found, math.sqrt(6.0) * nn.functional.avg_pool2d(values, (2, 3)), rtol=1e-13)


def test_token_mixing_applies_its_block_along_the_tokens() -> None:
    block = nn.Linear(5, 3)
    values = torch.randn(2, 5, 4)
    expected = torch.einsum("st,btc->bsc", block.weight, values) + block.bias[:, None]
    assert torch.allclose(layers.TokenMixing(block)(values), expected, atol=1e-6)  # sums of 5 float32 products


def test_a_gated_residual_mixes_by_the_sigmoid_of_its_logit() -> None:
    values = torch.randn(2, 3)
    module = layers.GatedResidual(nn.Tanh(), logit=math.log(3.0))
    assert torch.allclose(module(values), 0.25 * values + 0.75 * torch.tanh(values), atol=1e-6)  # float32


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (layers.ConvexPotential(5, 7), (5,)),
        (layers.ConvexPotential(4, 3), (5, 4)),
        (layers.ConvexPotentialConv2d(2, 3), (2, 5, 5)),
        (layers.ConvexPotentialConv2d(2, 4, 3, padding=0), (2, 6, 6)),
        (layers.MixerBlock(4, 6), (4, 6)),
    ],
    ids=repr,
)
def test_under_a_spectral_constraint_of_one_these_layers_never_increase_distances(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    wrap(nn.Sequential(module), shape, constraint=Spectral())
    first, second = torch.randn(2, 60, *shape, dtype=torch.float64)
    second[30:] = first[30:] + 1e-3 * second[30:]
    with torch.no_grad():
        distances = (module(first) - module(second)).flatten(1).norm(dim=1)
    assert bool((distances <= (first - second).flatten(1).norm(dim=1) * (1.0 + 1e-10)).all())
    assert float(distances.max()) > 0.1


def test_a_layer_with_a_diagonal_between_folds_into_a_convex_potential() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    diagonal = (weight @ weight.t()).abs().sum(1)
    values = torch.randn(6, 4, dtype=torch.float64)
    expected = values - 2.0 * (torch.relu(values @ weight.t() + bias) / diagonal) @ weight
    module = layers.ConvexPotential(4, 7).double()
    assert module.bias is not None
    with torch.no_grad():
        module.weight.copy_(weight / diagonal.sqrt()[:, None])
        module.bias.copy_(bias / diagonal.sqrt())
    assert torch.allclose(module(values), expected, atol=1e-13)  # sums of 7 products of size one
    assert float(torch.linalg.matrix_norm(module.weight.detach(), 2)) <= 1.0


def test_fresh_convex_potentials_have_a_weight_of_norm_about_one() -> None:
    torch.manual_seed(0)
    dense = layers.ConvexPotential(20, 30).weight.detach()
    assert float(torch.linalg.matrix_norm(dense, 2)) == pytest.approx(1.0, abs=1e-5)  # float32 QR of 20 columns
    conv = layers.ConvexPotentialConv2d(16).weight.detach()
    assert 0.3 < conv2d_norm(conv, input_size=(16, 16)) < 2.0


def refusals() -> list[tuple[str, type[Exception], object]]:
    return [
        ("group_size", ConfigurationError, lambda: layers.GroupSort(1)),
        ("batch axis", ConfigurationError, lambda: layers.GroupSort(2, dim=0)),
        ("batch axis", ConfigurationError, lambda: layers.MaxMin(dim=0)),
        ("batch axis", ConfigurationError, lambda: layers.GroupSort(2, dim=-2)(torch.zeros(4, 4))),
        ("does not divide", ConfigurationError, lambda: layers.GroupSort(3)(torch.zeros(2, 4))),
        ("even", ConfigurationError, lambda: layers.Householder(3)),
        ("batch axis", ConfigurationError, lambda: layers.Householder(4, dim=0)),
        ("channels", ConfigurationError, lambda: layers.Householder(4)(torch.zeros(2, 6))),
        ("non-batch", ConfigurationError, lambda: layers.Householder(4, dim=-2)(torch.zeros(4, 6))),
        ("kernel_size", ConfigurationError, lambda: layers.L2NormPool2d(0)),
        ("batch axis", ConfigurationError, lambda: layers.FullSort(dim=0)),
        ("batch axis", ConfigurationError, lambda: layers.FullSort(dim=-2)(torch.zeros(4, 4))),
        ("order", ConfigurationError, lambda: layers.Householder(4, order=3)),
        ("halves", ConfigurationError, lambda: layers.Householder(4, pairing="thirds")),  # type: ignore[arg-type]
        ("halves", ConfigurationError, lambda: layers.MaxMin(pairing="neighbours")),  # type: ignore[arg-type]
        ("groups of two", ConfigurationError, lambda: layers.GroupSort(4, pairing="halves")),
        ("init", ConfigurationError, lambda: layers.LinearSpline(init="gelu")),  # type: ignore[arg-type]
        ("pairs", ConfigurationError, lambda: layers.LinearSpline(3, init="maxmin")),
        ("pairs", ConfigurationError, lambda: layers.LinearSpline(init="maxmin")),
        ("tolerance", ConfigurationError, lambda: layers.effective_regions(nn.ReLU(), tolerance=-1.0)),
        ("even", ConfigurationError, lambda: layers.LinearSpline(segments=3)),
        ("channels", ConfigurationError, lambda: layers.LinearSpline(channels=0)),
        ("reach", ConfigurationError, lambda: layers.LinearSpline(reach=math.inf)),
        ("batch axis", ConfigurationError, lambda: layers.LinearSpline(dim=0)),
        ("channels", ConfigurationError, lambda: layers.LinearSpline(3)(torch.zeros(2, 4))),
        ("non-batch", ConfigurationError, lambda: layers.LinearSpline(4, dim=-2)(torch.zeros(4, 6))),
        ("positive", ConfigurationError, lambda: layers.ConvexPotential(0)),
        ("positive", ConfigurationError, lambda: layers.ConvexPotentialConv2d(2, 0)),
        ("padding", ConfigurationError, lambda: layers.ConvexPotentialConv2d(2, padding=-1)),
        ("alpha", ConfigurationError, lambda: layers.ConvexResidual(nn.Identity(), alpha=1.5)),
        ("alpha", ConfigurationError, lambda: layers.ConvexResidual(nn.Identity(), alpha=-0.1)),
    ]


@pytest.mark.parametrize(("message", "kind", "build"), refusals())
def test_settings_out_of_range_are_refused(message: str, kind: type[Exception], build: object) -> None:
    with pytest.raises(kind, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(("module", "shape"), PRESERVING, ids=repr)
def test_samples_do_not_interact(module: nn.Module, shape: tuple[int, ...]) -> None:
    values: Tensor = torch.randn(4, *shape)
    module = module.float()
    together = module(values)
    values[1:] = torch.randn(3, *shape)
    assert torch.equal(module(values)[0], together[0])


def test_sample_group_norm_is_group_norm_above_its_floor_and_a_multiple_below():
    torch.manual_seed(0)
    values = 3.0 + torch.randn(5, 6, 4, 4, dtype=torch.float64)
    expected = nn.functional.group_norm(values, 3, eps=0.0)
    torch.testing.assert_close(layers.SampleGroupNorm(3, floor=0.1)(values), expected)
    centered = values.reshape(5, 3, -1) - values.reshape(5, 3, -1).mean(2, keepdim=True)
    below = layers.SampleGroupNorm(3, floor=10.0)(values)
    torch.testing.assert_close(below.reshape(5, 3, -1), centered / 10.0)


def test_sample_group_norm_refuses_groups_that_do_not_divide_and_floors_that_are_none():
    with pytest.raises(InputError, match="4 groups"):
        layers.SampleGroupNorm(4, floor=0.1)(torch.zeros(1, 6, 2))
    for groups, floor in ((0, 0.1), (2, 0.0), (2, float("nan"))):
        with pytest.raises(ConfigurationError):
            layers.SampleGroupNorm(groups, floor=floor)


def test_a_group_norm_whose_output_is_overwritten_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), layers.SampleGroupNorm(2, floor=0.1), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match="inplace"):
        DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy())
