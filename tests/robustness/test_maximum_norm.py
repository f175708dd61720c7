"""Certificates in the maximum norm, against formulas, interval bounds, attacks and Boolean functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from clipless_dp import (
    ConfigurationError,
    DPLipModel,
    InputError,
    UnsupportedModuleError,
    architectures,
    constraints,
    layers,
    losses,
    robustness,
)
from clipless_dp.layers import DistanceLinear, SortLinear
from clipless_dp.robustness import attack_inf, certify, constants, intervals, maximum_norm
from tests.soundness.mutation import Mutant, with_each

FAR = 1e3


def wrap(net: nn.Module, shape: tuple[int, ...], *, input_norm: float = FAR) -> DPLipModel:
    return DPLipModel(net.double(), input_shape=shape, input_norm=input_norm, loss=losses.TauCrossEntropy(4.0))


def drawn(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NETWORKS: dict[str, Callable[[], DPLipModel]] = {
    "one layer": lambda: wrap(DistanceLinear(4, 3), (4,)),
    "order statistics": lambda: wrap(architectures.sort_mlp((4,), 3, widths=(6, 5)), (4,)),
    "p = 8": lambda: wrap(nn.Sequential(DistanceLinear(4, 5, p=8.0), DistanceLinear(5, 3, p=8.0)), (4,)),
    "means": lambda: wrap(architectures.sort_mlp((4,), 3, widths=(6,), quantile=None, p=8.0), (4,)),
    "a linear layer and activations": lambda: wrap(
        nn.Sequential(
            SortLinear(4, 6), nn.ReLU(), layers.MaxMin(), nn.Linear(6, 4), layers.CotangentGate(0.1), SortLinear(4, 3)
        ),
        (4,),
    ),
    "one output": lambda: wrap(SortLinear(4, 1), (4,)),
    "pooled images": lambda: wrap(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), SortLinear(4, 3)), (1, 4, 4)),
}


def made(name: str) -> DPLipModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return NETWORKS[name]()


def samples(model: DPLipModel, count: int = 40) -> Tensor:
    return drawn(count, *model.input_shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_radius_is_the_margin_over_twice_the_constant(name: str) -> None:
    model = made(name)
    inputs = samples(model)
    found = certify(model, inputs, norm="inf")
    constant = model.lipschitz_constant(norm="inf")
    if name in ("one layer", "order statistics", "one output", "means", "pooled images"):
        assert constant == pytest.approx(1.0, abs=1e-9)
    assert torch.allclose(found.radii, found.margins / (2.0 * constant), rtol=1e-6, atol=1e-9)
    assert bool((found.radii <= found.margins / (2.0 * constant)).all())
    assert found.norm == "inf"
    assert "maximum norm" in found.claim


@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_attack_in_the_maximum_norm_succeeds_within_a_radius(name: str, box: tuple[float, float] | None) -> None:
    model = made(name)
    inputs = samples(model)
    found = certify(model, inputs, norm="inf", box=box)
    radii = found.radii.clamp(max=1.0)
    attacked = attack_inf(model, inputs, radii * (1.0 - 1e-9), box=box, steps=15, restarts=2)
    assert bool((attacked.distances <= radii).all())
    assert not bool((attacked.flipped & (radii > 0.0)).any())
    if name != "a linear layer and activations":
        assert bool(attack_inf(model, inputs, radii * 4.0 + 0.2, steps=15, restarts=2).flipped.any())


def test_the_attack_turns_a_layer_of_distances_just_beyond_where_it_is_tight() -> None:
    model = boolean(torch.zeros(5))
    inputs = corners(5)
    assert float(attack_inf(model, inputs, 0.5 + 1e-6).flipped.double().mean()) > 0.9
    assert not bool(attack_inf(model, inputs, 0.5 - 1e-6).flipped.any())


@pytest.mark.parametrize("name", NETWORKS)
def test_interval_bounds_hold_the_outputs_of_all_inputs_between(name: str) -> None:
    model = made(name)
    plain = robustness.plain_network(model)
    lowest = samples(model, 10)
    highest = lowest + 0.3 * drawn(10, *model.input_shape, seed=1)
    low, high = intervals.output_interval(plain.net[0], lowest, highest)
    for seed in range(50):
        between = lowest + drawn(10, *model.input_shape, seed=seed).round(decimals=seed % 3) * (highest - lowest)
        outputs = plain.outputs(between)
        assert bool(((outputs >= low - 1e-12) & (outputs <= high + 1e-12)).all())
    same = intervals.output_interval(plain.net[0], lowest, lowest)
    assert torch.allclose(same[0], plain.outputs(lowest))
    assert torch.allclose(same[1], same[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_box_makes_no_radius_smaller(name: str) -> None:
    model = made(name)
    inputs = samples(model)
    plain, within = certify(model, inputs, norm="inf"), certify(model, inputs, norm="inf", box=(0.0, 1.0))
    assert bool((within.radii >= plain.radii).all())
    assert within.box == (0.0, 1.0)


def test_a_box_makes_some_radii_larger_and_those_infinite_that_nothing_in_it_turns() -> None:
    layer = DistanceLinear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-5.0, 0.0], [0.0, 0.0]]))
        layer.bias.zero_()
    model = wrap(layer, (2,))
    inputs = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert float(certify(model, inputs, norm="inf").radii) == pytest.approx(2.5)
    assert float(certify(model, inputs, norm="inf", box=(0.0, 1.0)).radii) == math.inf
    larger = [certify(made("order statistics"), drawn(40, 4), norm="inf", box=box).radii for box in (None, (0.0, 1.0))]
    assert bool((larger[1] > larger[0] * 1.01).any())


def boolean(target: Tensor, build: Callable[[int], nn.Module] = lambda d: DistanceLinear(d, 1)) -> DPLipModel:
    """One output ``‖x - t‖_∞ - ½`` on corners of the cube: OR at ``t = 0``, NAND at ``t = 1``."""
    layer = build(len(target))
    with torch.no_grad():
        layer.weight.copy_(target[None])
        layer.bias.fill_(-0.5)
    return wrap(layer, (len(target),))


def corners(entries: int) -> Tensor:
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * entries)


@pytest.mark.parametrize("entries", [2, 7])
@pytest.mark.parametrize(
    "build", [lambda d: DistanceLinear(d, 1), lambda d: SortLinear(d, 1, 1.0)], ids=["distances", "order statistics"]
)
def test_and_and_or_have_radius_one_half_in_every_dimension_where_a_linear_net_has_one_over_2d(
    entries: int, build: Callable[[int], nn.Module]
) -> None:
    inputs = corners(entries)
    for target, expected in ((0.0, inputs.amax(1)), (1.0, 1.0 - inputs.amin(1))):
        found = certify(boolean(torch.full((entries,), target), build), inputs, norm="inf")
        assert torch.equal(found.predictions, expected.long())
        assert torch.allclose(found.radii, torch.full_like(found.radii, 0.5), atol=1e-9)
        assert bool((found.radii <= 0.5).all())
    linear = nn.Linear(entries, 1)
    with torch.no_grad():
        linear.weight.fill_(1.0 / entries)
        linear.bias.fill_(-0.5 / entries)
    found = certify(wrap(linear, (entries,)), inputs, norm="inf")
    assert torch.equal(found.predictions, inputs.amax(1).long())
    assert float(found.radii.min()) == pytest.approx(0.5 / entries, abs=1e-9)


def turning() -> tuple[DPLipModel, Tensor]:
    """A sample on the gate's sphere that a move along it turns, by less than its margin says."""
    layer = DistanceLinear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-99.0, 0.0]]))
    sample = torch.tensor([[math.cos(1.178), math.sin(1.178)]], dtype=torch.float64)
    with torch.no_grad():
        layer.bias.fill_(-99.0 - float(sample[0, 0]) + 0.05)
    return wrap(layer, (2,), input_norm=1.0), sample


def test_radii_end_where_the_input_gate_begins_which_stretches_the_maximum_norm() -> None:
    model, sample = turning()
    found = certify(model, sample, norm="inf")
    assert float(found.radii) <= 1e-9
    assert found.reason is not None
    assert "input_norm" in found.reason
    moved = sample + 0.048 * torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    plain = robustness.plain_network(model)
    assert int(plain(sample).argmax()) == 1
    assert int(plain(moved).argmax()) == 0


def test_a_sample_inside_the_gate_has_a_radius_up_to_it() -> None:
    model = boolean(torch.tensor([-9.0, 0.0]))
    narrow = DPLipModel(model.net, input_shape=(2,), input_norm=1.0, loss=losses.TauCrossEntropy())
    found = certify(narrow, torch.tensor([[0.3, 0.4]], dtype=torch.float64), norm="inf")
    assert float(found.radii) == pytest.approx(0.5 / math.sqrt(2.0), rel=1e-9)
    assert float(found.radii) <= 0.5 / math.sqrt(2.0)
    boxed = certify(narrow, torch.tensor([[0.3, 0.4]], dtype=torch.float64), norm="inf", box=(-0.7, 0.7))
    assert float(boxed.radii) == math.inf


@pytest.mark.parametrize("name", ["p = 8", "order statistics", "a linear layer and activations"])
def test_the_rounding_that_is_taken_off_covers_that_of_float64(name: str) -> None:
    model = made(name)
    error = model.forward_error(norm="inf")
    assert 0.0 < error < 1e-7
    inputs = samples(model)
    plain = robustness.plain_network(model)
    scores = plain.outputs(inputs)
    coarse = robustness.plain_network(model, dtype=torch.float32).outputs(inputs)
    # 2²⁹ times the unit.
    assert float((scores - coarse).abs().max()) <= error * 2.0**29
    less = certify(model, inputs, norm="inf", score_error=1e-3).radii
    constant = model.lipschitz_constant(norm="inf")
    expected = (certify(model, inputs, norm="inf").radii - 1e-3 / constant).clamp(min=0.0)
    assert torch.allclose(less, expected, atol=1e-9)


def test_a_stated_constant_is_of_the_maximum_norm() -> None:
    inputs = drawn(5, 4)
    stated = certify(nn.Linear(4, 3).double(), inputs, lipschitz=2.0, norm="inf")
    assert torch.allclose(stated.radii, stated.margins / 4.0, rtol=1e-6, atol=1e-9)
    each = certify(nn.Linear(4, 3).double(), inputs, lipschitz=[1.0, 2.0, 3.0], norm="inf")
    assert bool((each.radii > 0.0).any())


def test_units_scale_radii() -> None:
    model, inputs = made("order statistics"), drawn(5, 4)
    plain, scaled = certify(model, inputs, norm="inf"), certify(model, inputs, norm="inf", units=0.5)
    assert torch.allclose(scaled.radii, 0.5 * plain.radii)


@with_each(
    Mutant("r in place of 2r", constants, "constants_of", "2.0 * joint * R", "joint * R"),
    Mutant(
        "√2r in place of 2r",
        constants,
        "constants_of",
        "2.0 * joint * ROUNDING, max",
        "1.4 * joint * ROUNDING, max",
    ),
)
def test_an_attack_catches(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    monkeypatch.setattr("clipless_dp.robustness.frozen.constants_of", constants.constants_of)
    inputs, model = corners(3), boolean(torch.zeros(3))
    radii = certify(model, inputs, norm="inf").radii
    assert bool(attack_inf(model, inputs, radii).flipped.any())


def test_an_attack_catches_a_certificate_through_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "clipless_dp.robustness.certificates.gate_caps", lambda inputs, norm, box: torch.full((len(inputs),), math.inf)
    )
    model, sample = turning()
    found = certify(model, sample, norm="inf")
    assert bool(attack_inf(model, sample, found.radii * 0.99, steps=60).flipped.any())


def least_output_around_a_weight() -> float:
    """Of a distance over an interval that holds its weight, where it is zero."""
    layer = DistanceLinear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    graph = robustness.plain_network(wrap(layer, (1,))).net[0]
    end = torch.ones(1, 1, dtype=torch.float64)
    low, high = intervals.output_interval(graph, -end, 2.0 * end)
    assert float(high) == 2.0
    return float(low)


def test_an_interval_that_forgets_what_lies_between_its_ends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert least_output_around_a_weight() == 0.0
    mutant = Mutant(
        "|x - w| taken to be nearest at an end", intervals, "_through_distances",
        "torch.maximum(above, below).clamp(min=0.0)", "torch.minimum(above.abs(), below.abs())",
    )  # fmt: skip
    mutant.apply(monkeypatch)
    assert least_output_around_a_weight() == 1.0


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "Householder": lambda: nn.Sequential(SortLinear(4, 4), layers.Householder(4), SortLinear(4, 3)),
    "BallProjection": lambda: nn.Sequential(SortLinear(4, 4), layers.BallProjection(1.0), SortLinear(4, 3)),
    "ConvexPotential": lambda: nn.Sequential(SortLinear(4, 4), layers.ConvexPotential(4), SortLinear(4, 3)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_stretches_the_maximum_norm_is_refused_by_name(kind: str) -> None:
    model = DPLipModel(
        REFUSED[kind]().double(), input_shape=(4,), input_norm=FAR, loss=losses.TauCrossEntropy(),
        constraint={"1.weight": constraints.Spectral()} if kind == "ConvexPotential" else None,
    )  # fmt: skip
    with pytest.raises(UnsupportedModuleError, match=f"{kind}.*maximum norm"):
        certify(model, drawn(3, 4), norm="inf")
    with pytest.raises(UnsupportedModuleError, match=kind):
        model.lipschitz_constant(norm="inf")
    certify(model, drawn(3, 4))


def test_what_does_not_go_with_the_norm_is_refused() -> None:
    model, inputs = made("order statistics"), drawn(3, 4)
    with pytest.raises(ConfigurationError, match="norm must be"):
        certify(model, inputs, norm=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="norm must be"):
        model.lipschitz_constant(norm=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="box narrows"):
        certify(model, inputs, box=(0.0, 1.0))
    with pytest.raises(ConfigurationError, match="front"):
        certify(model, inputs, norm="inf", front=nn.Identity(), front_lipschitz=1.0)
    with pytest.raises(ConfigurationError, match="graph of a wrapped model"):
        certify(nn.Linear(4, 3).double(), inputs, lipschitz=1.0, norm="inf", box=(0.0, 1.0))
    with pytest.raises(InputError, match="outside of the box"):
        certify(model, inputs - 1.0, norm="inf", box=(0.0, 1.0))
    with pytest.raises(ConfigurationError, match="radii"):
        attack_inf(model, inputs, -1.0)
    for radii in (torch.tensor([0.1, -0.1, 0.1]), torch.full((3,), math.nan), torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ConfigurationError, match="radii"):
            attack_inf(model, inputs, radii)


def test_layers_without_an_interval_rule_are_refused_with_a_box() -> None:
    model = wrap(nn.Sequential(SortLinear(4, 4), layers.LayerCentering(), SortLinear(4, 3)), (4,))
    certify(model, drawn(3, 4), norm="inf")
    with pytest.raises(UnsupportedModuleError, match="interval rule"):
        certify(model, drawn(3, 4), norm="inf", box=(0.0, 1.0))


class Coded(nn.Module):
    """Two layers with a line of code between."""

    def __init__(self, code: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.code = SortLinear(4, 4), SortLinear(4, 3), code

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.code(self.first(values.flatten(1)), values))


CODE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": lambda h, x: torch.relu(h) + h,
    "torch.relu(input=)": lambda h, x: torch.relu(input=h),
    "torch.flatten(input=)": lambda h, x: torch.flatten(input=h, start_dim=1),
    "torch.add(other=)": lambda h, x: torch.add(h, other=x),
    "add of a tensor": lambda h, x: h.add(x),
    "a shape": lambda h, x: h.reshape(h.shape[0], -1),
    "a size": lambda h, x: h.view(h.size(0), 4),
    "a minus": lambda h, x: -h,
    "a factor": lambda h, x: 0.5 * h,
    "a negative factor": lambda h, x: h * -2.0,
    "a negative quotient": lambda h, x: h / -2.0,
    "a difference": lambda h, x: h - x,
    "a difference in another order": lambda h, x: torch.sub(other=x, input=h),
    "absolute values": lambda h, x: torch.abs(h - x),
    "a concatenation": lambda h, x: torch.cat((h, x), 1).unflatten(1, (2, 4)).mean(1),
    "an average of a negative divisor": lambda h, x: functional.avg_pool2d(
        h.unflatten(1, (1, 2, 2)), 1, divisor_override=-2
    ).flatten(1),
}


@pytest.mark.parametrize("name", CODE)
def test_code_is_followed_in_intervals(name: str) -> None:
    torch.manual_seed(1)
    model, inputs = wrap(Coded(CODE[name]), (4,)), drawn(20, 4)
    assert math.isfinite(model.lipschitz_constant(norm="inf"))
    plain, low = robustness.plain_network(model), 0.6 * inputs
    least, most = intervals.output_interval(plain.net[0], low, low + 0.4)
    for seed in range(20):
        outputs = plain.outputs(low + 0.4 * drawn(20, 4, seed=seed).round(decimals=seed % 3))
        assert bool(((outputs >= least - 1e-12) & (outputs <= most + 1e-12)).all())
    radii = certify(model, inputs, norm="inf", box=(0.0, 1.0)).radii.clamp(max=1.0)
    attacked = attack_inf(model, inputs, radii * (1.0 - 1e-9), box=(0.0, 1.0), steps=10, restarts=2)
    assert not bool((attacked.flipped & (radii > 0.0)).any())


@pytest.mark.parametrize("divisor", [-4, -1, 4])
def test_averages_of_a_negative_divisor_turn_intervals_around(divisor: int) -> None:
    net = nn.Sequential(nn.AvgPool2d(2, divisor_override=divisor), nn.Flatten(), SortLinear(4, 3))
    model, inputs = wrap(net, (1, 4, 4)), drawn(30, 1, 4, 4)
    found = certify(model, inputs, norm="inf", box=(0.0, 1.0))
    assert not bool(found.radii.isinf().any())
    attacked = attack_inf(model, inputs, found.radii * (1.0 - 1e-9), box=(0.0, 1.0), steps=15, restarts=2)
    assert not bool((attacked.flipped & (found.radii > 0.0)).any())


@settings(max_examples=60, deadline=None)
@given(
    p=st.one_of(st.floats(0.31, 6.0).map(lambda power: 10.0**power), st.just(math.inf)),
    size=st.floats(-12.0, 12.0).map(lambda power: 10.0**power),
    entries=st.integers(1, 9),
    mean=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_an_interval_of_one_point_ends_at_the_layers_output_at_every_exponent_and_scale(
    p: float, size: float, entries: int, mean: bool, dtype: torch.dtype
) -> None:
    layer = DistanceLinear(entries, 3, p=p, mean=mean, bias=False).to(dtype)
    inputs = (size * drawn(5, entries)).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(size)
        outputs = layer(inputs)
        for end in intervals._through_distances(layer, intervals.Interval(inputs, inputs)):
            assert torch.allclose(end, outputs, rtol=1e-5 if dtype is torch.float32 else 1e-12, atol=0.0)
    assert bool((outputs > 0.0).all())


DEFAULT_LAST = 1000.0
"""The last finite exponent of a relaxation."""


def small_distances(size: float, p: float = DEFAULT_LAST) -> tuple[DPLipModel, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = architectures.sort_mlp((8,), 3, widths=(16,), quantile=None, p=p)
    return wrap(net, (8,)), size * drawn(40, 8)


def flipped_within_a_box(size: float) -> int:
    model, inputs = small_distances(size)
    radii = certify(model, inputs, norm="inf", box=(0.0, size)).radii
    attacked = attack_inf(model, inputs, radii.clamp(max=size) * 0.999, box=(0.0, size), steps=30, restarts=2)
    return int((attacked.flipped & (radii > 0.0)).sum())


@pytest.mark.parametrize("size", [1.0, 0.1])
def test_no_attack_in_a_box_succeeds_at_large_exponents(size: float) -> None:
    assert flipped_within_a_box(size) == 0


def test_powers_that_underflow_in_intervals_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "p_norms", lambda sizes, p: torch.linalg.vector_norm(sizes, ord=p, dim=-1))
    assert flipped_within_a_box(0.1) > 0


def test_an_empty_gap_is_no_radius() -> None:
    caps = maximum_norm.gate_caps(torch.tensor([[3.0, 4.0], [30.0, 40.0]]), 10.0, None)
    assert caps.tolist() == pytest.approx([5.0 / math.sqrt(2.0), 0.0])


@torch.no_grad()
def test_intervals_read_operands_by_name_and_values_that_are_overwritten_as_they_run() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)

        def forward(self, values: Tensor) -> Tensor:
            inner = self.a(values)
            return torch.add(other=self.b(self.act(inner)), input=inner)

    torch.manual_seed(0)
    net = Named().double()
    lowest = -torch.rand(5, 3, dtype=torch.float64)
    low, high = intervals.output_interval(fx.symbolic_trace(net), lowest, lowest + 1.0)
    for _ in range(200):
        outputs = net(lowest + torch.rand_like(lowest))
        assert bool((low <= outputs + 1e-12).all())
        assert bool((outputs <= high + 1e-12).all())
