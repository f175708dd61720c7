"""Pairs of channels: which two, and how often they are reflected."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import layers
from clipless_dp.layers import householder
from clipless_dp.layers.pairing import Paired
from clipless_dp.testing import LipschitzLayerTestCase
from tests.soundness.mutation import Mutant


class TestOrderTwo(LipschitzLayerTestCase):
    shapes = ((2, 2),)
    attained: ClassVar = {"theta": 0.8}
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return layers.Householder(shape[0], order=2)


class TestHalves(LipschitzLayerTestCase):
    shapes = ((4,),)
    attained: ClassVar = {"theta": 0.8}
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return layers.Householder(4, pairing="halves")


class TestSortedHalves(LipschitzLayerTestCase):
    shapes = ((4, 2, 2),)
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return layers.MaxMin(pairing="halves")


class TestAbsoluteValue(LipschitzLayerTestCase):
    shapes = ((2, 2, 2),)
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return layers.AbsoluteValue()


def test_halves_pair_each_channel_with_the_one_half_of_all_further() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 9.0, 0.0, 8.0]])
    assert layers.MaxMin(pairing="halves")(values).tolist() == [[3.0, 0.0, 2.0, 9.0, 1.0, 8.0]]
    assert layers.GroupSort(2, pairing="halves")(values).tolist() == [[3.0, 0.0, 2.0, 9.0, 1.0, 8.0]]


@pytest.mark.parametrize(("make", "dim"), [
    (lambda **given: layers.MaxMin(**given), 1),
    (lambda **given: layers.MaxMin(**given), -1),
    (lambda **given: layers.Householder(6, **given), 1),
    (lambda **given: layers.Householder(6, order=2, **given), -1),
])  # fmt: skip
def test_halves_are_neighbours_of_channels_in_another_order(make: Any, dim: int) -> None:
    torch.manual_seed(0)
    halves, adjacent = make(pairing="halves", dim=dim).double(), make(dim=dim).double()
    for parameter in halves.parameters():
        nn.init.uniform_(parameter, -4.0, 4.0)
    adjacent.load_state_dict(halves.state_dict())
    values = torch.randn(5, 6, 6, dtype=torch.float64)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    expected = adjacent(values.index_select(dim, order)).index_select(dim, order.argsort())
    assert torch.equal(halves(values), expected)


def turned(theta: Tensor | float, order: int, values: Tensor) -> Tensor:
    module = layers.Householder(2, order=order).double()
    with torch.no_grad():
        module.theta.copy_(torch.as_tensor(theta, dtype=torch.float64).reshape(module.theta.shape))
        return module(values)  # type: ignore[no-any-return]


def circle(count: int = 4001) -> Tensor:
    angles = torch.linspace(0.0, 2.0 * math.pi, count, dtype=torch.float64)
    return torch.stack((angles.cos(), angles.sin()), 1)


ANGLES = 20.0 * torch.rand(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 10.0


def order_two_is_an_isometry_by_pieces() -> None:
    """No arc of the circle grows, none shrinks, and nothing jumps, at whatever angles."""
    points = circle()
    for theta in ANGLES:
        found = turned(theta, 2, points)
        assert torch.allclose(found.norm(dim=1), torch.ones(len(points), dtype=torch.float64), rtol=1e-13)
        ratios = found.diff(dim=0).norm(dim=1) / points.diff(dim=0).norm(dim=1)
        assert float(ratios.max()) <= 1.0 + 1e-9
        # But where a piece ends within an arc.
        assert float(ratios.quantile(0.01)) >= 1.0 - 1e-9


def test_order_two_is_an_isometry_by_pieces() -> None:
    order_two_is_an_isometry_by_pieces()


def test_order_two_without_rotation_is_order_one() -> None:
    points = torch.randn(200, 2, dtype=torch.float64)
    for angle, width in ANGLES[:, :2]:
        # Order 1 keeps the side of smaller angles than that of its line, and order 2 that of larger ones.
        expected = turned(angle + 2.0 * math.pi, 1, points)
        theta = torch.stack((angle, angle + width, torch.zeros_like(angle)))
        assert torch.allclose(turned(theta, 2, points), expected, atol=1e-12)


def order_two_composes_order_one() -> None:
    """Four sectors of which two are the mirror images of the others: two folds, one after the other."""
    points = torch.randn(200, 2, dtype=torch.float64)
    for start, raw in ANGLES[:, :2]:
        width = float(raw) % (2.0 * math.pi)
        start = float(start)
        theta = torch.tensor([start, start + width, 2.0 * math.pi - width], dtype=torch.float64)
        found = turned(theta, 2, points)
        first = kept_beyond(points, start / 2.0)
        expected = kept_before(first, (start + width) / 2.0)
        assert torch.allclose(found, expected, atol=1e-12)


def kept_beyond(points: Tensor, line: float) -> Tensor:
    """Reflects what lies clockwise of a ray's line onto the other side."""
    side = points[:, 1] * math.cos(line) - points[:, 0] * math.sin(line)
    return torch.where((side >= 0).unsqueeze(1), points, mirrored(points, line))


def kept_before(points: Tensor, line: float) -> Tensor:
    side = points[:, 1] * math.cos(line) - points[:, 0] * math.sin(line)
    return torch.where((side <= 0).unsqueeze(1), points, mirrored(points, line))


def mirrored(points: Tensor, line: float) -> Tensor:
    along = torch.tensor([math.cos(line), math.sin(line)], dtype=torch.float64)
    return 2.0 * (points @ along).unsqueeze(1) * along - points


def test_order_two_composes_two_reflections_one_after_the_other() -> None:
    order_two_composes_order_one()


def test_fresh_order_two_takes_absolute_values_along_the_diagonals() -> None:
    points = torch.randn(200, 2, dtype=torch.float64)
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2.0)
    found = layers.Householder(2, order=2).double()(points)
    assert torch.allclose(found, (points @ turn.T).abs() @ turn, atol=1e-6)  # angles are rounded to float32


def test_each_position_moves_one_angle_at_most() -> None:
    torch.manual_seed(0)
    for point in torch.randn(60, 2, dtype=torch.float64):
        module = layers.Householder(2, order=2).double()
        nn.init.uniform_(module.theta, -5.0, 5.0)
        output = module(point.unsqueeze(0))
        (gradient,) = torch.autograd.grad(output, module.theta, torch.randn(1, 2, dtype=torch.float64))
        assert int((gradient != 0.0).sum()) <= 1


def test_rows_that_are_not_numbers_stay_so() -> None:
    values = torch.tensor([[math.nan, 1.0], [0.0, 0.0], [1.0, math.inf]])
    for order in (1, 2):
        found = layers.Householder(2, order=order)(values)
        assert bool(found[0].isnan().any())
        assert found[1].tolist() == [0.0, 0.0]
        assert not bool(found[2].isfinite().all())


@pytest.mark.parametrize(
    ("mutant", "claim"),
    [
        (
            Mutant(
                "mirrors in the other order", householder, "_folded_twice",
                "torch.where(mirrored, mirror, torch.where(rotated, rotation, start))",
                "torch.where(mirrored, start, torch.where(rotated, rotation, mirror))",
            ),
            order_two_is_an_isometry_by_pieces,
        ),
        (
            Mutant("rotated the other way", householder, "_folded_twice", "-moved[1], moved[1]", "moved[1], moved[1]"),
            order_two_is_an_isometry_by_pieces,
        ),
        (
            Mutant("sectors in another order", householder, "_folded_twice", "next_width + math.pi", "width + math.pi"),
            order_two_composes_order_one,
        ),
        (
            Mutant("halves taken for neighbours", Paired, "_pairs", 'self.pairing == "halves"', "False"),
            test_halves_pair_each_channel_with_the_one_half_of_all_further,
        ),
        (
            Mutant("halves put back as neighbours", Paired, "_joined", 'self.pairing == "halves"', "False"),
            test_halves_pair_each_channel_with_the_one_half_of_all_further,
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_mutant_caught(mutant: Mutant, claim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises(AssertionError):
        claim()
