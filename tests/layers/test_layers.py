"""The package's own modules compute what they say, on vectors, maps and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, layers

PRESERVING: tuple[tuple[nn.Module, tuple[int, ...]], ...] = (
    (layers.GroupSort(2), (4,)),
    (layers.GroupSort(3), (6, 2, 2)),
    (layers.GroupSort(4, dim=-1), (3, 8)),
    (layers.MaxMin(), (4, 3, 3)),
    (layers.MaxMin(dim=2), (3, 4)),
    (layers.Householder(4), (4, 3, 3)),
    (layers.Householder(4, dim=-1), (3, 4)),
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
