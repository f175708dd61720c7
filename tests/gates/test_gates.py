"""Gates cap every sample by itself, whatever the input, and pass what is under the cap unchanged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import ConfigurationError
from clipless_dp.gates import (
    BallProjection,
    CotangentGate,
    SphereScaling,
    cotangent_gate,
    input_gate,
    rounding_slack,
    sample_norms,
)
from clipless_dp.gates.arithmetic import sample_products

SIZES = st.sampled_from([1e-30, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e15])
FORWARD = (BallProjection(0.5), SphereScaling(0.5, floor=1e-2))


def passed_back(gate: CotangentGate, cotangents: Tensor) -> Tensor:
    values = torch.zeros_like(cotangents).requires_grad_(True)
    gate(values).backward(cotangents)
    assert values.grad is not None
    return values.grad


def true_norms(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.flatten(1).double(), dim=1)


@given(
    size=SIZES,
    entries=st.sampled_from([1, 7, 300, 70_000]),
    cap=st.sampled_from([1e-8, 0.3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_no_gate_lets_more_through_than_its_cap_times_the_rounding_slack(
    size: float, entries: int, cap: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    signals = size * torch.randn(3, entries, generator=generator, dtype=dtype)
    signals[1] = size
    limit = cap * rounding_slack(entries, dtype)
    outputs = [
        input_gate(signals, cap)[0],
        BallProjection(cap)(signals),
        SphereScaling(cap, floor=1e-8)(signals),
        passed_back(CotangentGate(cap), signals),
        passed_back(CotangentGate(cap, mode="normalize"), signals),
    ]
    for output in outputs:
        assert bool((true_norms(output) <= limit).all())


@pytest.mark.parametrize("size", [2e35, 1e36, 9e36, 2.3e37, 1e38, 3e38])
def test_long_samples_whose_factor_float32_cannot_hold_become_zero(size: float) -> None:
    signals = torch.full((2, 70_000), size / math.sqrt(70_000))
    signals[1] = 1e-6
    for cap in (1e-8, 1e-2, 1.0):
        gated, finite = input_gate(signals, cap)
        assert bool(finite[0]) == (size <= 1e37 * cap)
        for output in (gated, passed_back(CotangentGate(cap), signals)):
            assert bool((true_norms(output) <= cap * rounding_slack(70_000)).all())
            assert bool(output[0].any()) == (size <= 1e37 * cap)
            assert bool(output[1].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rounding_slack_stays_below_one_percent_for_any_image(dtype: torch.dtype) -> None:
    assert all(1.0 < rounding_slack(entries, dtype) < 1.01 for entries in (1, 784, 65_536, 65_537, 3 * 512 * 512))


def test_signals_under_the_cap_pass_unchanged() -> None:
    signals = torch.randn(4, 3, 5)
    for cap in 2.0 * float(true_norms(signals).max()) * (1.0 + torch.rand(20, dtype=torch.float64)):
        assert torch.equal(input_gate(signals, float(cap))[0], signals)
        assert torch.equal(BallProjection(float(cap))(signals), signals)
        assert torch.equal(passed_back(CotangentGate(float(cap)), signals), signals)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_input_gate_zeroes_samples_without_a_finite_norm_and_no_others(bad: float) -> None:
    signals = torch.ones(3, 2, 2)
    signals[1, 0, 1] = bad
    gated, finite = input_gate(signals, 10.0)
    assert finite.tolist() == [True, False, True]
    assert torch.equal(gated[1], torch.zeros(2, 2))
    assert torch.equal(gated[0], signals[0])


@pytest.mark.parametrize("mode", ["clip", "normalize"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_the_cotangent_gate_zeroes_cotangents_without_a_finite_norm(mode: str, bad: float) -> None:
    cotangents = torch.ones(3, 4)
    cotangents[1] = bad
    found = passed_back(CotangentGate(0.5, mode=mode), cotangents)  # type: ignore[arg-type]
    assert torch.equal(found[1], torch.zeros(4))
    assert torch.allclose(found[[0, 2]], torch.full((2, 4), 0.25))


@pytest.mark.parametrize("gate", FORWARD, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_gate_on_activations_stops_what_has_overflowed_forwards_and_backwards(gate: nn.Module, bad: float) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = bad
    values.requires_grad_(True)
    output = gate(values)
    assert torch.equal(output[1], torch.zeros(4))
    output.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad[1], torch.zeros(4))
    assert bool(values.grad[0].isfinite().all())


@pytest.mark.parametrize("gate", FORWARD, ids=repr)
def test_a_gate_on_activations_treats_each_sample_alone(gate: nn.Module) -> None:
    values = torch.randn(4, 3, 2, dtype=torch.float64)
    alone = torch.cat([gate(values[i : i + 1]) for i in range(4)])
    values[0] *= 1e6
    # Elementwise products of the same numbers; vectorised sums of 6 squares may round differently.
    assert torch.allclose(gate(values)[1:], alone[1:], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("gate", FORWARD, ids=repr)
def test_a_zero_sample_stays_zero_and_has_a_finite_gradient(gate: nn.Module) -> None:
    values = torch.zeros(2, 3, requires_grad=True)
    output = gate(values)
    assert not output.any()
    output.sum().backward()
    assert values.grad is not None
    assert bool(values.grad.isfinite().all())


@pytest.mark.parametrize(
    ("gate", "constant"), [(BallProjection(0.5), 1.0), (SphereScaling(0.5, floor=1e-2), 50.0)], ids=repr
)
def test_the_jacobian_of_a_gate_is_within_its_lipschitz_constant(gate: nn.Module, constant: float) -> None:
    for size in (1e-3, 9.9e-3, 1.1e-2, 0.3, 0.51, 20.0):
        point = torch.randn(5, dtype=torch.float64)
        point = size * point / point.norm()
        jacobian = torch.autograd.functional.jacobian(lambda x: gate(x.unsqueeze(0)).squeeze(0), point)
        # The factors are numbers of size one computed with a few float64 roundings.
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= constant * (1.0 + 1e-12)


@pytest.mark.parametrize("gate", [BallProjection(0.5), SphereScaling(2.0, floor=0.1)], ids=repr)
@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3, 2), (6,)])
def test_a_gates_own_backward_is_the_derivative_of_its_formula_once_and_twice(
    gate: BallProjection | SphereScaling, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([1e-3, 0.05, 0.3, 1.0, 30.0, 1e4], dtype=torch.float64)
    values = torch.randn(shape, dtype=torch.float64)
    values = (sizes / true_norms(values.reshape(6, -1))).reshape(-1, *[1] * (len(shape) - 1)) * values
    values = torch.where(values.abs() < 1e-4, 1e-4, values).requires_grad_(True)
    floor = gate.floor if isinstance(gate, SphereScaling) else gate.radius

    def formula(x: Tensor) -> Tensor:
        norms = x.reshape(6, -1).square().sum(1).sqrt().reshape(-1, *[1] * (x.dim() - 1))
        return gate.radius * x / norms.clamp(min=floor)

    probe, second = torch.randn_like(values), torch.randn_like(values)
    found = []
    for run in (gate, formula):
        (first,) = torch.autograd.grad(run(values), values, probe, create_graph=True)
        (twice,) = torch.autograd.grad(first, values, second)
        found.append((first.detach(), twice))
    # Differences of numbers of size 1/‖x‖ in float64.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-9)


def test_the_input_gate_passes_no_gradient_to_samples_that_it_zeroed() -> None:
    signals = torch.ones(3, 4)
    signals[1] = math.nan
    signals.requires_grad_(True)
    input_gate(signals, 0.5)[0].sum().backward()
    assert torch.equal(signals.grad[1], torch.zeros(4))  # type: ignore[index]
    assert bool(signals.grad.isfinite().all())  # type: ignore[union-attr]


def test_normalising_lifts_small_cotangents_to_the_limit_but_not_those_below_the_floor() -> None:
    gate = CotangentGate(2.0, mode="normalize", floor=1e-3)
    found = true_norms(passed_back(gate, torch.tensor([[1e-2, 0.0], [0.0, 1e-4], [0.0, 0.0]])))
    assert found.tolist() == pytest.approx([2.0, 0.2, 0.0], rel=1e-6)  # float32 products of two factors


def test_the_cotangent_gate_is_the_identity_forwards() -> None:
    values = torch.randn(3, 2)
    assert torch.equal(CotangentGate(0.1)(values), values)
    assert torch.equal(cotangent_gate(values, 0.1, "normalize"), values)


def test_sample_norms_are_per_sample_over_all_other_axes() -> None:
    values = torch.randn(3, 2, 5, 4)
    # 40 float32 squares: γ_40 ≈ 40·2^-24.
    assert torch.allclose(sample_norms(values).double(), true_norms(values), rtol=3e-6)
    assert torch.allclose(sample_norms(torch.tensor([-2.0, 3.0])), torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e-9, "1"])
def test_caps_and_floors_out_of_range_are_refused(value: object) -> None:
    for build in (
        lambda: BallProjection(value),  # type: ignore[arg-type]
        lambda: SphereScaling(value),  # type: ignore[arg-type]
        lambda: SphereScaling(1.0, floor=value),  # type: ignore[arg-type]
        lambda: CotangentGate(value),  # type: ignore[arg-type]
        lambda: CotangentGate(1.0, "normalize", value),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigurationError, match="at least 1e-8"):
            build()


def test_gates_lift_small_signals_a_hundredfold_at_most_by_default() -> None:
    signals = torch.full((1, 4), 1e-9)
    for cap in (1e-3, 1.0, 50.0):
        assert float(SphereScaling(cap)(signals)[0, 0]) <= 1e-7 * (1 + 1e-6)  # float32 rounding of one product
        given = signals.clone().requires_grad_(True)
        CotangentGate(cap, mode="normalize")(given).backward(signals)
        assert float(given.grad[0, 0]) <= 1e-7 * (1 + 1e-6)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="mode"):
        CotangentGate(1.0, mode="scale")  # type: ignore[arg-type]


def test_norms_and_products_do_not_depend_on_how_maps_lie_in_memory() -> None:
    first, second = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64)
    expected = (first * second).sum((1, 2, 3))
    orders = (torch.contiguous_format, torch.channels_last)
    for one in orders:
        left = first.contiguous(memory_format=one)
        torch.testing.assert_close(sample_norms(left), true_norms(first))
        for other in orders:
            torch.testing.assert_close(sample_products(left, second.contiguous(memory_format=other)), expected)
