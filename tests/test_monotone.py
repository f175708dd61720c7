"""Monotone networks are monotone everywhere, whatever was learnt; what is not is refused before anything is charged."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipless_dp
from clipless_dp import ConfigurationError, DPLipModel, UnsupportedModuleError, constraints, layers, losses, monotone
from clipless_dp.commands.results import opened
from clipless_dp.features import TableEncoding
from clipless_dp.layers import coordinates
from clipless_dp.layers import monotone as monotone_layers
from clipless_dp.layers.monotone import BoxProjection, MonotoneResidual
from clipless_dp.layers.pairing import Paired
from clipless_dp.norms.operators import DenseOperator
from clipless_dp.tables import TableModel, bounded_table, fit_table, fitting
from clipless_dp.tables import monotone as monotone_tables
from tests.soundness.mutation import Mutant
from tests.support import assert_projected, one_in_two

SIGNS = (1, -1, 0, 1)
SORTS = (
    lambda: layers.MaxMin(),
    lambda: layers.GroupSort(4),
    lambda: layers.FullSort(),
    lambda: nn.ReLU(),
    lambda: nn.Tanh(),
)
LOSS = losses.BinaryCrossEntropy()


def chain(width: int = 8, sort: Any = layers.MaxMin, outputs: int = 1, inputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), sort(), nn.Linear(width, width), sort(), nn.Linear(width, outputs))


def monotone_net(slope: float | None = None, sort: Any = layers.MaxMin, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(BoxProjection(-2.0, 2.0), MonotoneResidual(chain(sort=sort, outputs=outputs), SIGNS, slope))


LIMITS = {
    "1.net.0.weight": constraints.EntryBound(1.5),
    "1.net.2.weight": constraints.RowSum(),
    "1.net.4.weight": constraints.RowSum(2.0),
}
SLOPE = 3.0
"""The product of these."""


def wrapped(slope: float | None, sort: Any = layers.MaxMin, outputs: int = 1) -> DPLipModel:
    return DPLipModel(monotone_net(slope, sort, outputs), input_shape=(4,), loss=LOSS, constraint=LIMITS)


def pairs(count: int, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows, and rows with more of what has a sign: near and far, on a grid, along lines, in and outside of the box."""
    lattice = torch.tensor(list(itertools.product((-2.0, -0.5, 0.5, 2.0), repeat=4)), dtype=dtype)
    steps = torch.zeros(4, 4, dtype=dtype)
    steps[range(4), range(4)] = torch.tensor(SIGNS, dtype=dtype)
    on_grid = lattice.repeat_interleave(4, 0), (lattice[:, None] + 0.5 * steps).reshape(-1, 4)
    firsts, seconds = [on_grid[0]], [on_grid[1]]
    for reach, length in ((2.0, 1.0), (2.0, 1e-2), (20.0, 20.0), (1e6, 1e6)):
        first = (2.0 * torch.rand(count, 4, generator=generator, dtype=dtype) - 1.0) * reach
        more = torch.rand(count, 4, generator=generator, dtype=dtype) * length
        more *= (torch.rand(count, 4, generator=generator) < 0.5) * torch.tensor(SIGNS, dtype=dtype)
        firsts.append(first)
        seconds.append(first + more)
    return torch.cat(firsts), torch.cat(seconds)


@torch.no_grad()
def largest_drop(model: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> float:
    """By how much an output goes the wrong way, at most, over many pairs."""
    first, second = pairs(500, torch.Generator().manual_seed(seed), dtype)
    return float((model(first) - model(second)).max())


def steepest_wrong_gradient(model: Any, seed: int = 0) -> float:
    points, _ = pairs(300, torch.Generator().manual_seed(seed), torch.float64)
    points.requires_grad_(True)
    (found,) = torch.autograd.grad(model(points).sum(), points)
    return float((-found * torch.tensor(SIGNS)).max())


def turned(model: DPLipModel, *, steps: int = 40, lr: float = 0.1, project: bool = True) -> DPLipModel:
    """The model after training *against* its signs: what lowers an output where more should raise it."""
    model.double()
    optimizer = torch.optim.Adam(model.net.parameters(), lr)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        first, second = pairs(40, generator, torch.float64)
        optimizer.zero_grad()
        # The residual alone is monotone: what can be turned is the network beside it.
        net = model.net[1].net  # type: ignore[index,union-attr]
        box = model.net[0]  # type: ignore[index]
        (net(box(second)) - net(box(first))).mean().backward()  # type: ignore[operator]
        optimizer.step()
        if project:
            model.project_()
    return model


@pytest.mark.parametrize(
    ("slope", "sort"), one_in_two([(slope, sort) for slope, sort in zip([None, SLOPE] * 5, SORTS * 2, strict=True)])
)
def test_a_network_trained_against_its_signs_stays_monotone_everywhere(slope: float | None, sort: Any) -> None:
    torch.manual_seed(0)
    model = turned(wrapped(slope, sort))
    net = model.net[1].net  # type: ignore[index,union-attr]
    assert largest_drop(lambda x: net(model.net[0](x))) > 0.5, "it did learn to fall"
    found = monotone.certificate(model)
    assert found.holds
    assert math.isinf(found.input_norm)
    assert largest_drop(model.net) <= found.rounding < 1e-11
    assert steepest_wrong_gradient(model.net) <= 1e-12
    with torch.no_grad():
        assert largest_drop(model.eval()) <= found.rounding
    single = model.float()
    rounding = monotone.certificate(single).rounding
    assert largest_drop(single, torch.float32) <= rounding < 1e-3


def test_weights_without_any_limit_stay_monotone_where_the_slope_follows_them() -> None:
    torch.manual_seed(0)
    model = DPLipModel(monotone_net(), input_shape=(4,), loss=LOSS)
    turned(model, lr=1.0, project=False)
    found = monotone.certificate(model)
    assert found.features[0].slope > 1e3
    assert found.holds
    assert largest_drop(model.net) <= found.rounding


def worst_chain(width: int = 4) -> nn.Sequential:
    """Falls in its first coordinate as fast as entries and row sums allow: every bound is attained."""
    net = nn.Sequential(nn.Linear(4, width), layers.MaxMin(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    with torch.no_grad():
        for part in (net[0], net[2], net[4]):
            part.weight.zero_()  # type: ignore[union-attr,operator]
            part.bias.fill_(100.0)  # type: ignore[union-attr,operator]
        net[0].weight[:, 0] = -1.5  # type: ignore[index,operator]
        net[2].weight.fill_(1.0 / width)  # type: ignore[union-attr,operator]
        net[4].weight.fill_(2.0 / width)  # type: ignore[union-attr,operator]
    return net.double()


def swapping_chain() -> nn.Sequential:
    """Falls in its first coordinate where a sort puts that in another's place, and is constant elsewhere."""
    net = nn.Sequential(nn.Linear(4, 2), layers.MaxMin(), nn.Linear(2, 1))
    with torch.no_grad():
        for part in (net[0], net[2]):
            part.weight.zero_()  # type: ignore[operator,union-attr]
            part.bias.zero_()  # type: ignore[operator,union-attr]
        net[0].weight[0, 0], net[2].weight[0, 1] = 1.5, -1.0  # type: ignore[index,operator]
    return net.double()


def free_drop() -> float:
    """Of weights that follow a slope of their own, and of a network that reaches it."""
    torch.manual_seed(0)
    chains = worst_chain(), swapping_chain()
    nets = [nn.Sequential(BoxProjection(-2.0, 2.0), MonotoneResidual(net, SIGNS)).double() for net in chains]
    nets.append(turned(DPLipModel(monotone_net(), input_shape=(4,), loss=LOSS), lr=0.5, project=False).net)  # type: ignore[arg-type]
    return max(largest_drop(net) for net in nets)


def limited_drop() -> float:
    """Of weights within limits, and a slope that is their product."""
    torch.manual_seed(0)
    model = DPLipModel(
        nn.Sequential(BoxProjection(-2.0, 2.0), MonotoneResidual(worst_chain(), SIGNS, SLOPE)).double(),
        input_shape=(4,), loss=LOSS, constraint=LIMITS,
    )  # fmt: skip
    with torch.no_grad():
        for name in LIMITS:
            model.net.get_parameter(name).mul_(1.5)
    model.project_()
    return largest_drop(model.net)


def householder_refused() -> float:
    with pytest.raises(UnsupportedModuleError, match="Householder"):
        MonotoneResidual(nn.Sequential(nn.Linear(4, 4), layers.Householder(4), nn.Linear(4, 1)), SIGNS)
    return 0.0


HALVES = [lambda: layers.MaxMin(pairing="halves"), lambda: layers.GroupSort(2, pairing="halves")]
GROUPED = [*HALVES, lambda: layers.MaxMin(), lambda: layers.GroupSort(4), lambda: layers.FullSort()]


@torch.no_grad()
def halves_drop(sort: Any = HALVES[0]) -> float:
    """Of a sort of halves whose pairs cancel out where neighbours would not."""
    net = nn.Sequential(nn.Linear(4, 4), sort(), nn.Linear(4, 1))
    for part in (net[0], net[2]):
        part.weight.zero_()  # type: ignore[operator,union-attr]
        part.bias.zero_()  # type: ignore[operator,union-attr]
    net[0].weight[:2, 0] = 1.0  # type: ignore[index,operator]
    net[2].weight.copy_(torch.tensor([[1.0, 1.0, -1.0, -1.0]]))  # type: ignore[operator,union-attr]
    return largest_drop(nn.Sequential(BoxProjection(-2.0, 2.0), MonotoneResidual(net, (1, 0, 0, 0))).double())


MUTANTS = (
    (
        free_drop,
        Mutant(
            "a layer missing in the slope",
            monotone_layers,
            "chain_slopes",
            "reversed(parts)",
            "reversed([*parts[:2], *parts[3:]])",
        ),
    ),
    (
        free_drop,
        Mutant(
            "ℓ2 for ℓ1 in the slope",
            coordinates.Slopes,
            "linear",
            "size.sum(1).amax()",
            "size.square().sum(1).sqrt().amax()",
        ),
    ),
    (
        free_drop,
        Mutant("column maximum for row sum", coordinates.Slopes, "linear", "size.sum(1).amax()", "size.amax(0).amax()"),
    ),
    (
        free_drop,
        Mutant("own place for the group of a sort", coordinates.Slopes, "sorted", "low.amin(2, keepdim=True)", "low"),
    ),
    (
        free_drop,
        Mutant(
            "upper for lower bounds",
            MonotoneResidual,
            "slope_bounds",
            "-found.low, found.high",
            "-found.high, found.low",
        ),
    ),
    (
        free_drop,
        Mutant(
            "ball for box",
            BoxProjection,
            "forward",
            "torch.minimum(torch.maximum(values, low), high)",
            "values * (2.0 / values.norm(dim=1, keepdim=True)).clamp(max=1.0)",
        ),
    ),
    (
        limited_drop,
        Mutant(
            "ℓ2 for ℓ1 in the constraint",
            constraints.RowSum,
            "project_",
            "exact.abs().sum(1) >",
            "exact.square().sum(1).sqrt() >",
        ),
    ),
    (
        limited_drop,
        Mutant(
            "column sums for row sums",
            constraints.RowSum,
            "project_",
            "exact = exact_float64(weight)",
            "weight, exact = weight.mT, exact_float64(weight.mT)",
        ),
    ),
    (
        limited_drop,
        Mutant(
            "entries twice the limit",
            constraints.EntryBound,
            "project_",
            "weight.clamp_(-limit",
            "weight.clamp_(-2.0 * limit",
        ),
    ),
    (
        halves_drop,
        Mutant(
            "neighbours for halves",
            Paired,
            "groups",
            "self._pairs(torch.arange(channels), 0)",
            "torch.arange(channels).unflatten(0, (-1, 2)).unbind(1)",
        ),
    ),
    (
        householder_refused,
        Mutant("Householder accepted", coordinates, "reason_against", "nn.LeakyReLU)", "nn.LeakyReLU, Householder)"),
    ),
)


def test_the_library_itself_passes_what_mutants_are_caught_by() -> None:
    assert max(free_drop(), halves_drop(), limited_drop(), householder_refused()) <= 1e-9


@pytest.mark.parametrize(("attack", "mutant"), MUTANTS, ids=lambda value: getattr(value, "name", ""))
def test_mutants_are_caught(attack: Any, mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    try:
        drop = attack()
    except (pytest.fail.Exception, RuntimeError, IndexError):
        return
    assert drop > 1e-3, mutant.name


@pytest.mark.parametrize("make", GROUPED)
def test_groups_of_a_sort_are_those_in_which_its_forward_pass_moves_values(make: Any) -> None:
    sort, generator = make(), torch.Generator().manual_seed(0)
    meets = torch.zeros(8, 8, dtype=torch.bool)
    for _ in range(200):
        values = torch.rand(1, 8, generator=generator)
        meets |= values == sort(values).T
    told = torch.zeros_like(meets)
    for group in sort.groups(8):
        told[group[:, None], group] = True
    assert torch.equal(meets, told)


@pytest.mark.parametrize("sort", HALVES)
def test_sorts_of_halves_are_paired_as_they_run(sort: Any) -> None:
    assert halves_drop(sort) <= 1e-9
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(BoxProjection(-2.0, 2.0), MonotoneResidual(chain(4, sort), SIGNS)).double()
        found = monotone.certificate(net)
        points = torch.rand(300, 4, dtype=torch.float64) * 4.0 - 2.0
        slopes = torch.autograd.functional.jacobian(lambda rows, net=net: net(rows).sum(0), points)[0]
        for feature, seen in zip(found.features, slopes.T, strict=True):
            assert feature.low <= float(seen.min()) + 1e-12
            assert float(seen.max()) <= feature.high + 1e-12
        assert found.holds


@pytest.mark.parametrize("make", GROUPED)
def test_rounding_of_a_sort_is_that_of_the_entries_it_sorts_together(make: Any) -> None:
    net = nn.Sequential(BoxProjection(-2.0, 2.0), nn.Linear(1, 8), make(), nn.Linear(8, 1))
    with torch.no_grad():
        for part in (net[1], net[3]):
            part.weight.zero_()  # type: ignore[operator,union-attr]
            part.bias.zero_()  # type: ignore[operator,union-attr]
        net[1].bias[0] = 2.0**20  # type: ignore[index,operator]
        for entry in range(8):
            net[3].weight.zero_()  # type: ignore[operator,union-attr]
            net[3].weight[0, entry] = 1.0  # type: ignore[index,operator]
            met = any(0 in group and entry in group for group in make().groups(8).tolist())
            assert (monotone.certificate(net).rounding > 1e-3) == met


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(range(len(SORTS))), st.integers(1, 3), st.floats(0.1, 5.0))
def test_outputs_differ_by_what_the_slopes_of_single_coordinates_allow(
    seed: int, sort: int, outputs: int, scale: float
) -> None:
    torch.manual_seed(seed)
    net = chain(8, SORTS[sort], outputs, inputs=5).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
        first, second = 3.0 * torch.randn(2, 400, 5, dtype=torch.float64)
        second[200:] = first[200:] + 1e-3 * second[200:]
        slopes, moved = coordinates.chain_slopes(net), net(second) - net(first)
        way = second - first
        upper = way.clamp(min=0.0) @ slopes.high.T + way.clamp(max=0.0) @ slopes.low.T
        lower = way.clamp(min=0.0) @ slopes.low.T + way.clamp(max=0.0) @ slopes.high.T
    assert bool((moved <= upper + 1e-9).all())
    assert bool((moved >= lower - 1e-9).all())
    assert bool((moved.abs() <= slopes.total * way.abs().amax(1, keepdim=True) + 1e-9).all())


def test_lipschitz_constants_of_other_norms_are_attained_and_hold() -> None:
    net = nn.Sequential(BoxProjection(-50.0, 50.0), worst_chain())
    model = DPLipModel(net, input_shape=(4,), loss=LOSS)
    assert model.lipschitz_constant(norm=(1, math.inf)) == pytest.approx(3.0, rel=1e-9)
    assert model.lipschitz_constant(norm=(math.inf, math.inf)) == pytest.approx(3.0, rel=1e-9)
    one, other = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    assert float((net(one) - net(other)).abs().detach()) == pytest.approx(3.0, rel=1e-9)
    model = wrapped(None, outputs=3).double()
    generator = torch.Generator().manual_seed(0)
    first, second = 2.0 * torch.randn(2, 4000, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        moved = (model.net(first) - model.net(second)).abs().amax(1)
    single, together = (model.lipschitz_constant(norm=(p, math.inf)) for p in (1, math.inf))
    assert single <= together <= 4.0 * single
    assert bool((moved <= single * (first - second).abs().sum(1)).all())
    assert bool((moved <= together * (first - second).abs().amax(1)).all())
    assert model.lipschitz_constant() == model.lipschitz_constant(norm=(2, 2))
    for unknown in ((2, 1), (1, 1), 3, "two", [1, math.inf]):
        with pytest.raises(ConfigurationError, match="norm must be"):
            model.lipschitz_constant(norm=unknown)  # type: ignore[arg-type]
    other_layers = DPLipModel(
        nn.Sequential(nn.Linear(4, 4), layers.Householder(4)),
        input_shape=(4,),
        input_norm=1.0,
        loss=losses.CosineSimilarity(),
    )
    assert other_layers.lipschitz_constant(norm=(1, math.inf)) == math.inf > other_layers.lipschitz_constant()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_rows_are_projected_on_the_l1_ball_and_entries_are_clipped_rounding_included(
    seed: int, rows: int, columns: int, limit: float
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0
    operators = (DenseOperator(),)
    row_sum, entry = constraints.RowSum(limit), constraints.EntryBound(limit)
    summed, clipped = weight.clone(), weight.clone()
    row_sum.project_(summed, operators)
    entry.project_(clipped, operators)
    for row, before in zip(summed.tolist(), weight.tolist(), strict=True):
        assert sum(abs(Fraction(one)) for one in row) <= Fraction(limit)
        if sum(map(abs, before)) > limit:
            # Bisection for the number that all sizes shrink by.
            low, high = 0.0, max(map(abs, before))
            for _ in range(80):
                middle = 0.5 * (low + high)
                low, high = (
                    (middle, high) if sum(max(abs(one) - middle, 0.0) for one in before) > limit else (low, middle)
                )
            expected = [math.copysign(max(abs(one) - low, 0.0), one) for one in before]
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-5 * max(1.0, limit))
    assert all(abs(Fraction(one)) <= Fraction(limit) for row in clipped.tolist() for one in row)
    assert torch.equal(clipped, torch.where(weight.abs() <= limit, weight, clipped))
    assert_projected(row_sum, summed, operators)
    assert_projected(entry, clipped, operators)


def test_entries_of_one_sign_are_clipped_at_zero_and_only_dense_weights_have_such_limits() -> None:
    weight = torch.tensor([[-1.0, 0.5], [3.0, -0.0]])
    one_sign = constraints.EntryBound(2.0, signed=False)
    assert not one_sign.holds(weight, (DenseOperator(),))
    one_sign.project_(weight, (DenseOperator(),))
    assert weight.tolist() == [[0.0, 0.5], [2.0, 0.0]]
    for constraint in (constraints.EntryBound(), constraints.RowSum()):
        with pytest.raises(ConfigurationError, match="dense"):
            DPLipModel(
                nn.Conv2d(1, 2, 3),
                input_shape=(1, 4, 4),
                input_norm=1.0,
                loss=losses.CosineSimilarity(),
                constraint=constraint,
            )


@pytest.mark.parametrize("route", ["tracker", "gates"])
@pytest.mark.parametrize("slope", [None, SLOPE])
def test_one_sample_moves_sums_of_gradients_by_no_more_than_the_bounds(route: str, slope: float | None) -> None:
    torch.manual_seed(0)
    net: nn.Module = monotone_net(slope)
    if route == "gates":
        net = clipless_dp.gradient_gated(net, limit=0.5, mode="clip")
    model = DPLipModel(net, input_shape=(4,), loss=LOSS, constraint=LIMITS).double()
    bounds, worst = model.sensitivity().per_parameter, dict.fromkeys(LIMITS, 0.0)
    corners = torch.tensor(list(itertools.product((-1e3, 1e3), repeat=4)), dtype=torch.float64)

    def summed(rows: Tensor, targets: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        with clipless_dp.passes.unwitnessed():
            model.loss(model(rows), targets).backward()
        return {name: p.grad.clone() for name, p in model.net.named_parameters() if p.grad is not None}

    for target in (0.0, 1.0):
        for index in range(len(corners)):
            targets = torch.full((len(corners), 1), target, dtype=torch.float64)
            rest = torch.arange(len(corners)) != index
            whole, less = summed(corners, targets), summed(corners[rest], targets[rest])
            for name, bound in bounds.items():
                moved = float((whole[name] - less[name]).norm())
                assert moved <= bound * (1.0 + 1e-9), name
                worst[name] = max(worst.get(name, 0.0), moved / bound)
    # Far from them in a part of the parameters only.
    assert max(worst.values()) > 0.2


def test_bounds_follow_slopes_that_follow_weights() -> None:
    torch.manual_seed(0)
    # What comes before is stretched by the lift, too: its slopes are in the bounds of what trains there.
    net = nn.Sequential(BoxProjection(-2.0, 2.0), nn.Linear(4, 4), MonotoneResidual(chain(), SIGNS))
    model = DPLipModel(net, input_shape=(4,), loss=LOSS)
    before = model.sensitivity().per_parameter["1.weight"]
    with torch.no_grad():
        model.net.get_parameter("2.net.4.weight").mul_(100.0)
    assert model.sensitivity().per_parameter["1.weight"] > 50.0 * before


def test_a_copy_s_slope_follows_its_own_weights() -> None:
    torch.manual_seed(0)
    model = wrapped(None)
    copied = copy.deepcopy(model)
    before = copied.coordinate_slopes()
    with torch.no_grad():
        model.net.get_parameter("1.net.4.weight").mul_(0.0)
    assert torch.equal(copied.coordinate_slopes().low, before.low)
    assert float(model.lipschitz_constant(norm=(1, math.inf))) == 0.0
    point = torch.rand(3, 4)
    with torch.no_grad():
        copied.net.get_parameter("1.net.4.weight").mul_(0.0)
        assert torch.equal(copied.net(point), model.net(point))


def test_a_box_is_increasing_and_non_expansive_in_every_norm_and_bounds_what_follows() -> None:
    box = BoxProjection([-1.0, 0.0, 2.0], [1.0, 0.0, 5.0])
    rows = 10.0 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    moved = box(rows)
    assert float(moved.norm(dim=1).max()) <= box.norm(3) <= math.sqrt(26.0) * (1.0 + 1e-5)
    for p in (1, 2, 3, math.inf):
        assert bool((torch.pdist(moved, p) <= torch.pdist(rows, p) * (1.0 + 1e-6) + 1e-6).all())
    ordered = rows.sort(dim=0).values
    assert bool((box(ordered).diff(dim=0) >= 0.0).all())
    strange = torch.tensor([[math.nan, math.inf, -math.inf]])
    assert box(strange).tolist() == [[0.0, 0.0, 2.0]]
    net = nn.Sequential(BoxProjection([3.0, 3.0], [4.0, 4.0]), nn.Linear(2, 1))
    # Zero is not in the box, so that a norm may grow: to that of the corner.
    assert DPLipModel(net, input_shape=(2,), input_norm=0.1, loss=LOSS).sensitivity().layers[0].input_norm > 5.6


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ((torch.zeros(3), 1.0), "public"),
        ((0.0, torch.ones(3).numpy()), "public"),
        ((1.0, 0.0), "at most"),
        (([0.0, 2.0], [1.0, 1.0]), "at most"),
        (([0.0], [1.0, 1.0]), "same columns"),
        ((0.0, math.inf), "finite"),
        ((-1e30, 0.0), "1e18"),
    ],
)
def test_boxes_of_data_and_other_ends_are_refused(ends: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        BoxProjection(*ends)


class Unknown(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (layers.BallProjection(1.0), "one factor"),
        (layers.SphereScaling(1.0), "one factor"),
        (layers.SampleGroupNorm(2, floor=0.1), "one factor"),
        (nn.LayerNorm(4), "one factor"),
        (nn.BatchNorm1d(4), "samples meet"),
        (layers.Householder(4), "turns signs"),
        (layers.LayerCentering(), "not known"),
        (nn.Dropout(0.1), "not known"),
        (Unknown(), "not known"),
    ],
)
def test_layers_that_may_turn_signs_are_refused_with_the_reason(layer: nn.Module, why: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer), nn.Linear(4, 1))
    with pytest.raises(UnsupportedModuleError, match=why) as refused:
        MonotoneResidual(net, SIGNS)
    assert [part.path for part in refused.value.parts] == ["1.0"]


class Joined(nn.Module):
    """A network of its own ``forward``, whose weights are positive: ``c(join(h, tanh(h)))`` with ``h = a(x)``."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.box, self.a, self.c, self.join = BoxProjection(-4.0, 4.0), nn.Linear(2, 4), nn.Linear(4, 1), join
        with torch.no_grad():
            self.a.weight.abs_()
            self.c.weight.abs_()

    def forward(self, values: Tensor) -> Tensor:
        inner = self.a(self.box(values))
        output: Tensor = self.c(self.join(inner, torch.tanh(inner)))
        return output


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(4, 1)

    def forward(self, inner: Tensor, tanh: Tensor) -> Tensor:
        output: Tensor = tanh + self.narrow(inner)
        return output


SUMS: dict[str, Any] = {
    "h + t": lambda h, t: h + t,
    "h - t": lambda h, t: h - t,
    "h - h": lambda h, t: h - h,
    "t - h": lambda h, t: t - h,
    "add(input, other)": lambda h, t: torch.add(input=h, other=t),
    "sub(input, other)": lambda h, t: torch.sub(input=h, other=t),
    "sub(other, input)": lambda h, t: torch.sub(other=t, input=h),
    "sub(other, h)": lambda h, t: torch.sub(h, other=t),
    "sub(x2, x1)": lambda h, t: torch.sub(x2=t, x1=h),
    "h.sub(other)": lambda h, t: h.sub(other=t),
    "alpha of 1": lambda h, t: torch.sub(h, t, alpha=1),
    "mul": lambda h, t: torch.mul(other=-2.0, input=h),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "add alpha": (lambda h, t: torch.add(h, t, alpha=-5.0), "sums|alpha"),
    "sub alpha": (lambda h, t: torch.sub(h, t, alpha=5.0), "sums|alpha"),
    "h.add alpha": (lambda h, t: h.add(t, alpha=-5.0), "sums|alpha"),
    "sub alpha by name": (lambda h, t: torch.sub(other=t, alpha=5.0, input=h), "sums|alpha"),
    "broadcast": (Broadcast(), "one shape"),
    "relu in place": (lambda h, t: nn.functional.relu(h, inplace=True) + h, "inplace=False"),
    "relu in place, by position": (lambda h, t: nn.functional.relu(h, True) + h, "inplace=False"),
    "relu_": (lambda h, t: h.relu_() + h, "inplace=False"),
    "torch.relu_": (lambda h, t: torch.relu_(h) + h, "inplace=False"),
}
ROUTES = ("wrapped", "plain")


def certificate_of(net: nn.Module, route: str) -> monotone.MonotoneCertificate:
    if route == "plain":
        return monotone.certificate(net, columns=2)
    return monotone.certificate(DPLipModel(net, input_shape=(2,), loss=LOSS))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SUMS)
def test_operands_are_read_by_name_in_whatever_order_they_are_written(name: str, route: str) -> None:
    torch.manual_seed(0)
    net = Joined(SUMS[name]).double()
    found = certificate_of(net, route)
    points = torch.rand(500, 2, dtype=torch.float64) * 8.0 - 4.0
    slopes = torch.autograd.functional.jacobian(lambda rows: net(rows).sum(0), points)[0]
    for feature, seen in zip(found.features, slopes.T, strict=True):
        assert feature.low <= float(seen.min()) + 1e-12
        assert float(seen.max()) <= feature.high + 1e-12


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_compute_something_else_are_refused_wrapped_or_not(name: str, route: str) -> None:
    join, why = REFUSED[name]
    with pytest.raises(UnsupportedModuleError, match=why):
        certificate_of(Joined(join), route)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.LeakyReLU(-1.0, inplace=True), nn.LeakyReLU(0.1, inplace=True)]
)
def test_layers_that_overwrite_what_others_read_are_refused_with_the_remedy(act: nn.Module, route: str) -> None:
    class Own(Joined):
        def __init__(self) -> None:
            super().__init__(None)
            self.act, self.b = act, nn.Linear(4, 4)

        def forward(self, values: Tensor) -> Tensor:
            inner = self.a(self.box(values))
            output: Tensor = self.c(self.b(self.act(inner)) + inner)
            return output

    with pytest.raises(UnsupportedModuleError, match="inplace=False") as refused:
        certificate_of(Own(), route)
    assert [part.path for part in refused.value.parts] == ["act"]
    with pytest.raises(UnsupportedModuleError, match="inplace=False"):
        MonotoneResidual(nn.Sequential(act, *chain()), SIGNS)


def written_in_place(inner: Tensor, tanh: Tensor) -> Tensor:
    scaled = inner
    scaled *= -3.0
    return inner + tanh


def written_in_place_alone(inner: Tensor, tanh: Tensor) -> Tensor:
    tanh += inner
    return tanh


def test_a_module_that_is_written_in_place_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModuleError, match="write h = h"):
        monotone.certificate(Joined(written_in_place_alone).double(), columns=2)
    # What reads the overwritten value would read another one in the graph.
    with pytest.raises(ConfigurationError, match="write h = h"):
        monotone.certificate(Joined(written_in_place).double(), columns=2)
    with pytest.raises(ConfigurationError, match="write h = h"):
        DPLipModel(Joined(written_in_place), input_shape=(2,), loss=LOSS)


def test_a_layer_that_is_told_later_to_work_in_place_is_refused_from_then_on() -> None:
    net = monotone_net(SLOPE, sort=nn.ReLU)
    model = DPLipModel(net, input_shape=(4,), loss=LOSS)
    assert len(monotone.certificate(model).features) == 4
    net[1].net[1].inplace = True  # type: ignore[union-attr,index]
    for one in (net, model):
        with pytest.raises(UnsupportedModuleError, match="inplace=False"):
            monotone.certificate(one)


def test_gates_of_signals_around_a_monotone_network_are_refused_and_of_gradients_are_not() -> None:
    with pytest.raises(UnsupportedModuleError, match="one factor"):
        DPLipModel(clipless_dp.gated(monotone_net()), input_shape=(4,), loss=LOSS)
    ball = nn.Sequential(layers.BallProjection(2.0), *monotone_net())
    with pytest.raises(UnsupportedModuleError, match="BoxProjection"):
        DPLipModel(ball, input_shape=(4,), input_norm=4.0, loss=LOSS)
    gated = clipless_dp.gradient_gated(nn.Sequential(*monotone_net(), layers.CotangentGate(1.0)), limit=1.0)
    assert monotone.certificate(DPLipModel(gated, input_shape=(4,), loss=LOSS)).holds


def test_a_box_that_comes_late_is_told_to_come_first() -> None:
    with pytest.raises(ConfigurationError, match="put BoxProjection first"):
        DPLipModel(nn.Sequential(nn.Flatten(), *monotone_net()), input_shape=(4,), loss=LOSS)


def test_slopes_that_follow_weights_are_exported_as_numbers() -> None:
    torch.manual_seed(0)
    model = DPLipModel(monotone_net(), input_shape=(4,), loss=LOSS)
    rows, plain = torch.randn(5, 4), model.export_net()
    exported = torch.export.export(plain, (rows,)).module()
    assert torch.equal(exported(rows), model(rows).detach())
    with torch.no_grad():
        model.net.get_parameter("1.net.0.weight").mul_(2.0)
    assert not torch.equal(model(rows).detach(), plain(rows))
    assert torch.equal(model(rows).detach(), model.export_net()(rows))


def test_the_input_gate_s_ball_needs_a_box_before_it() -> None:
    bare = MonotoneResidual(chain(), SIGNS)
    assert monotone.certificate(bare).holds
    with pytest.raises(ConfigurationError, match="input_norm must be given"):
        DPLipModel(nn.Sequential(bare), input_shape=(4,), loss=LOSS)
    with pytest.raises(ConfigurationError, match="no box comes first"):
        monotone.certificate(DPLipModel(nn.Sequential(bare), input_shape=(4,), input_norm=1.0, loss=LOSS))
    with pytest.raises(ConfigurationError, match="below the norm"):
        monotone.certificate(DPLipModel(monotone_net(), input_shape=(4,), input_norm=3.9, loss=LOSS))
    within = monotone.certificate(DPLipModel(monotone_net(), input_shape=(4,), input_norm=40.0, loss=LOSS))
    assert within.holds
    assert within.input_norm == 40.0
    assert "norm at most 40" in str(within)


def test_a_certificate_prints_each_feature_and_says_where_a_slope_is_too_small() -> None:
    torch.manual_seed(0)
    names = ["income", "debts", "city", "years"]
    found = monotone.certificate(wrapped(SLOPE), names=names)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == names
    assert "yes, increasing" in lines[1]
    assert "yes, decreasing" in lines[2]
    assert lines[3].endswith("no")
    assert found["debts"].is_decreasing
    assert not found["debts"].is_increasing
    assert found["city"].sign == 0
    flat = monotone.certificate(wrapped(1e-6), names=names)
    assert not flat.holds
    assert "NO" in str(flat).splitlines()[1]
    with pytest.raises(ConfigurationError, match="one for each"):
        monotone.certificate(wrapped(None), names=["a"])
    with pytest.raises(UnsupportedModuleError, match="not known"):
        monotone.certificate(nn.Sequential(nn.Linear(4, 4), layers.LayerCentering()), columns=4)


@pytest.mark.parametrize("head", [nn.Tanh(), nn.Sequential(nn.ReLU(), nn.Flatten(1))])
def test_scalar_functions_behind_keep_the_signs(head: nn.Module) -> None:
    torch.manual_seed(0)
    model = DPLipModel(nn.Sequential(*monotone_net(), head), input_shape=(4,), loss=LOSS).double()
    assert monotone.certificate(model).holds
    assert largest_drop(model.net) <= 1e-12


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"signs": (1, 1)}, "4 columns"),
        ({"signs": (0, 0, 0, 0)}, "all 0"),
        ({"signs": (2, 0, 0, 0)}, "1, -1 or 0"),
        ({"signs": "1111"}, "1, -1 or 0"),
        ({"signs": SIGNS, "slope": -1.0}, "at least 0"),
        ({"signs": SIGNS, "slope": [1.0, 1.0]}, "4 of them"),
        ({"signs": SIGNS, "slope": math.inf}, "finite"),
    ],
)
def test_signs_and_slopes_that_are_none_are_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        MonotoneResidual(chain(), **arguments)


# Tables.

BUDGET: dict[str, Any] = {
    "epsilon": 4.0, "delta": 1e-3, "progress": False, "reproducible_seed": 0, "accountant": "rdp", "audit": False
}  # fmt: skip


def rows_and_labels(count: int = 600) -> tuple[Tensor, Tensor]:
    """The first column counts against its sign, as far as the data go."""
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (rows[:, 1] - rows[:, 0] > 0).long()
    return rows * torch.tensor([1e3, 1.0, 1e-2]).double() + torch.tensor([50.0, 0.0, 0.0]), labels


@torch.no_grad()
def table_drop(trained: TableModel, signs: tuple[int, ...], scales: tuple[float, ...]) -> float:
    generator = torch.Generator().manual_seed(3)
    drops = []
    for reach in (1.0, 30.0):
        first = torch.randn(4000, len(signs), generator=generator, dtype=torch.float64) * reach
        more = torch.rand(first.shape, generator=generator, dtype=torch.float64) * torch.tensor(signs) * reach
        scale = torch.tensor(scales, dtype=torch.float64)
        drops.append(trained.scores(first * scale) - trained.scores((first + more) * scale))
    return float(torch.cat(drops).max())


@pytest.mark.slow
def test_a_table_is_monotone_in_raw_columns_whatever_its_data_say_and_stays_so_in_a_file(tmp_path: Any) -> None:
    rows, labels = rows_and_labels()
    trained = fit_table(rows, labels, monotone={0: 1, 1: 1}, **BUDGET)
    free = fit_table(rows, labels, cosines=32, **BUDGET)
    scales = (1e3, 1.0, 1e-2)
    found = trained.certificate()
    assert found.holds
    assert [one.sign for one in found.features] == [1, 1, 0]
    assert table_drop(free, (1, 0, 0), scales) > 0.5
    assert table_drop(trained, (1, 1, 0), scales) <= found.rounding < 0.1
    assert float((torch.tensor(trained.predict(rows)) == labels).double().mean()) > 0.65
    # In raw units: the column of thousands has a slope of thousandths, which is held against a search.
    first, more = rows[:300].clone(), rows[:300].clone()
    more[:, 0] += 10.0
    steepest = float(((trained.scores(more) - trained.scores(first)) / 10.0).max())
    assert 0.0 <= steepest <= found[0].slope + found.rounding < 0.5
    assert "Monotone, whatever was learnt, in the public columns 0 (+1), 1 (+1)." in str(trained.notes)
    trained.save(tmp_path / "table.pt")
    loaded = clipless_dp.load(tmp_path / "table.pt")
    assert torch.equal(loaded.scores(rows), trained.scores(rows))
    assert loaded.certificate() == copy.deepcopy(loaded).certificate() == trained.predictor().certificate() == found
    file = opened(str(tmp_path / "table.pt"))
    attacked = bounded_table(file.content, file.predictor)
    assert attacked.sensitivity().total == trained.result.optimizer.model.sensitivity().total
    assert torch.equal(attacked.net.get_parameter("1.net.2.weight"), trained.net[2].get_parameter("1.net.2.weight"))
    with pytest.raises(ConfigurationError, match="not trained to be monotone"):
        free.certificate()
    with pytest.raises(ConfigurationError, match="nothing is certified"):
        free.predictor().certificate()


def test_rounding_of_a_regression_covers_what_the_shift_to_a_far_range_loses() -> None:
    rows = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    trained = fit_table(
        rows, 1e6 + torch.sigmoid(2.0 * rows[:, 0]), target_range=(1e6, 1e6 + 1), monotone={0: 1}, **BUDGET
    )
    with torch.no_grad():
        trained.net.get_parameter("2.1.net.2.weight").fill_(0.05)
    found, step = trained.certificate(), 1e-3
    more = rows + torch.tensor([step, 0.0])
    moved = (trained.scores(more).double() - trained.scores(rows).double()).abs().max()
    assert 0.0 < float(moved) <= found[0].slope * step * 1.01 + found.rounding
    assert 0.06 < found.rounding < 1.0


def test_frames_name_columns_and_regressions_have_signs_too() -> None:
    rows, _ = rows_and_labels(300)
    frame = {"income": rows[:, 0].numpy(), "age": rows[:, 1].numpy(), "town": ["a", "b", "c"] * 100}
    encoding = TableEncoding(["income", "age"], {"town": ("a", "b", "c")}, missing={"age": 0.0})
    targets = (rows[:, 1] - 1e-3 * rows[:, 0]).numpy()
    trained = fit_table(
        frame, targets, encoding=encoding, target_range=(-3, 3), monotone={"income": 1, "age": -1}, **BUDGET
    )
    found = trained.certificate()
    assert found.holds
    assert found["income"].is_increasing
    assert found["age"].is_decreasing
    more = {**frame, "income": frame["income"] + 500.0}
    assert float((trained.scores(frame) - trained.scores(more)).max()) <= found.rounding


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"monotone": {"town": 1}}, "categories"),
        ({"monotone": {"wage": 1}}, "none of the numbers income"),
        ({"monotone": {"income": 2}}, "1 or -1"),
        ({"monotone": {"income": True}}, "1 or -1"),
        ({"monotone": {"income": 1, 0: 1}}, "twice"),
        ({"monotone": {}}, "name columns"),
        ({"monotone": ["income"]}, "name columns"),
        ({"monotone": {"income": 1}, "classes": (0, 1, 2)}, "3 classes"),
    ],
)
def test_what_has_no_order_is_refused_before_anything_is_charged(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def charged(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a statistic was released")

    monkeypatch.setattr(fitting, "private_standardisation", charged)
    monkeypatch.setattr(fitting, "create_accountant", charged)
    frame = {"income": [1.0, 2.0, 3.0], "town": ["a", "b", "a"]}
    encoding = TableEncoding(["income"], {"town": ("a", "b")})
    with pytest.raises(ConfigurationError, match=why):
        fit_table(frame, [0, 1, 0], encoding=encoding, **{**BUDGET, **changes})
    with pytest.raises(ConfigurationError, match="columns 0 to 1"):
        fit_table(torch.rand(3, 2), torch.tensor([0, 1, 0]), monotone={-1: 1}, **BUDGET)


def test_the_checkpoint_of_a_free_table_is_not_gone_on_with_as_a_monotone_one(tmp_path: Any) -> None:
    rows, labels = rows_and_labels(200)
    made = fit_table(rows, labels, monotone={0: 1}, checkpoint=tmp_path / "run.pt", epochs=2, **BUDGET)
    assert made.certificate().holds
    with pytest.raises(clipless_dp.CheckpointError, match="monotone"):
        fit_table(rows, labels, monotone={0: -1}, checkpoint=tmp_path / "run.pt", epochs=2, **BUDGET)


def test_units_increase_where_signs_say_so_and_no_data_enter() -> None:
    signs = (1, -1, 0, 0, 1)
    net = monotone_tables.chain(signs)
    weight = net[0].weight
    assert bool((weight[:, 0] >= 0.0).all())
    assert bool((weight[:, 1] <= 0.0).all())
    quarter = monotone_tables.UNITS // 4
    assert torch.equal(weight[:quarter], -weight[quarter : 2 * quarter])
    assert not bool(weight[: 2 * quarter][:, [0, 1, 4]].any())
    assert bool(weight[: 2 * quarter].any())
    assert torch.equal(monotone_tables.chain(signs)[0].weight, weight)


def test_where_values_may_leave_what_float32_holds_the_rounding_is_infinite() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, 4), layers.MaxMin(), nn.Linear(4, 1))
    net = nn.Sequential(layers.BoxProjection(1e6, 1e6 + 1.0), layers.MonotoneResidual(body, [1, 1]))
    assert math.isfinite(monotone.certificate(net).rounding)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.mul_(1e25)
    assert math.isinf(monotone.certificate(net).rounding)
