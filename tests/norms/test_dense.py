"""The certified norm of a dense matrix is never below the truth, and close above it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipless_dp.errors import NormError
from clipless_dp.norms import dense_norm, eigenvalue
from tests.norms.matrices import FAMILIES
from tests.norms.truth import TRUTH_ROUNDING, exactly_bounds, spectral

BUDGETS = ("cheap", "balanced", "tight")
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 40), (40, 3), (33, 33), (170, 200)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_bound_is_below_the_truth_for_any_family_type_or_scale(family: str, budget: str) -> None:
    torch.manual_seed(3)
    for rows, columns in SHAPES:
        matrix = FAMILIES[family](rows, columns)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for scale in (1e-30, 1.0, 1e30) if dtype != torch.float16 else (1e-3, 1.0, 1e2):
                weight = (matrix * scale).to(dtype)
                if not bool(torch.isfinite(weight).all()):
                    continue
                truth = spectral(weight)
                bound = dense_norm(weight, budget=budget)  # type: ignore[arg-type]
                assert bound >= truth * (1.0 - TRUTH_ROUNDING)
                assert math.isfinite(bound)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda columns: st.lists(
            st.lists(
                st.floats(-1e30, 1e30, allow_subnormal=True) | st.floats(-2.0, 2.0),
                min_size=columns,
                max_size=columns,
            ),
            min_size=1,
            max_size=4,
        )
    ),
    st.sampled_from(BUDGETS),
)
def test_the_bound_holds_in_exact_rational_arithmetic(rows: list[list[float]], budget: str) -> None:
    weight = torch.tensor(rows, dtype=torch.float64)
    assert exactly_bounds(dense_norm(weight, budget=budget), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_structured_matrices_are_bounded_in_exact_rational_arithmetic(family: str, budget: str) -> None:
    torch.manual_seed(4)
    for rows, columns in [(2, 5), (6, 6), (9, 4)]:
        weight = FAMILIES[family](rows, columns).to(torch.float32)
        assert exactly_bounds(dense_norm(weight, budget=budget), weight)  # type: ignore[arg-type]


def test_default_is_within_a_thousandth_on_gaussian_512() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    # The balanced budget stops at a relative slack of 2.5e-4.
    assert dense_norm(weight) <= spectral(weight) * (1.0 + 1e-3)


@pytest.mark.parametrize("shape", [(512, 512), (128, 784), (784, 128)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_float32_orthogonal_matrices_are_certified_within_a_thousandth(shape: tuple[int, int], budget: str) -> None:
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(max(shape), min(shape)))[0]
    weight = weight if shape[0] >= shape[1] else weight.T
    # The float32 residual is about √n·2⁻²⁴; 1e-4 is a tenth of the promised 1e-3.
    assert 1.0 - 1e-6 <= dense_norm(weight, budget=budget) <= 1.0 + 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gaussian", "decaying", "clustered", "hidden_top", "rank_one"])
def test_tight_budget_is_within_1e_8(family: str) -> None:
    torch.manual_seed(1)
    weight = FAMILIES[family](200, 300)
    # 1e-9 of slack for the search, and 8(r+4)u·r < 4e-11 for the factorisation.
    assert dense_norm(weight, budget="tight") <= spectral(weight) * (1.0 + 1e-8)


def test_a_zero_or_empty_matrix_has_norm_zero() -> None:
    for shape in [(3, 4), (0, 4), (4, 0), (0, 0)]:
        assert dense_norm(torch.zeros(shape)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_gets_a_typed_error(bad: float) -> None:
    weight = torch.ones(3, 3)
    weight[1, 2] = bad
    with pytest.raises(NormError, match="NaN or an infinity"):
        dense_norm(weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3),
        torch.ones(2, 2, 2),
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(2, 2).to_sparse(),
    ],
)
def test_anything_but_a_dense_real_matrix_gets_a_typed_error(weight: Tensor) -> None:
    with pytest.raises(NormError):
        dense_norm(weight)


def test_an_unknown_budget_gets_a_typed_error() -> None:
    with pytest.raises(NormError, match="budget"):
        dense_norm(torch.ones(2, 2), budget="fast")  # type: ignore[arg-type]


def test_strides_do_not_matter() -> None:
    torch.manual_seed(0)
    storage = torch.randn(60, 80)
    view = storage[::2, 1::3]
    assert not view.is_contiguous()
    assert dense_norm(view) == dense_norm(view.clone())
    assert dense_norm(torch.ones(1, 1).expand(5, 6)) >= math.sqrt(30.0)


def test_scaling_by_a_power_of_two_scales_the_bound_exactly() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30, dtype=torch.float64)
    assert dense_norm(weight * 2.0**-300) == dense_norm(weight) * 2.0**-300
    assert dense_norm(weight * 2.0**300) == dense_norm(weight) * 2.0**300


@pytest.mark.parametrize("entry", [5e-324, 1e-310, 1.7e308])
def test_the_ends_of_float64_are_bounded(entry: float) -> None:
    weight = torch.full((2, 2), entry, dtype=torch.float64)
    bound = dense_norm(weight)
    # Infinity is the only float above the norm of the largest matrix.
    assert bound == math.inf if entry > 1e308 else exactly_bounds(bound, weight)


def test_autocast_matmul_precision_and_default_dtype_do_not_reach_a_certificate() -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 90)
    expected = dense_norm(weight)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert dense_norm(weight) == expected
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)


def test_a_certificate_touches_neither_the_weight_nor_its_graph_nor_the_random_state() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 180, requires_grad=True)
    before, state = weight.detach().clone(), torch.get_rng_state()
    first, second = dense_norm(weight), dense_norm(weight)
    assert type(first) is float
    assert first == second
    assert torch.equal(weight.detach(), before)
    assert weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("answer", [0.0, 1e-3, 1.0, 1e9, math.inf, math.nan])
def test_a_lying_guide_cannot_push_a_bound_below_the_truth(answer: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(170, 190)
    truth = spectral(weight)

    def lie(*_: object) -> float:
        return answer

    monkeypatch.setattr(eigenvalue, "lanczos_estimate", lie)
    assert dense_norm(weight) >= truth * (1.0 - TRUTH_ROUNDING)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrices: matrices.new_full((1,), answer))
    assert dense_norm(weight) >= truth * (1.0 - TRUTH_ROUNDING)
    assert dense_norm(weight[:20]) >= spectral(weight[:20]) * (1.0 - TRUTH_ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_guides_approach_the_largest_eigenvalue_from_below_and_know_how_far(family: str) -> None:
    torch.manual_seed(0)
    matrix = FAMILIES[family](150, 170)
    gram = matrix @ matrix.mT
    values = torch.linalg.eigvalsh(gram)
    found = list(eigenvalue.ritz_values(gram))
    # Rounding is relative to the largest; copies of converged values are lost orthogonality.
    rounding = 1e-6 * float(values[-1])
    assert float(values[-1]) == 0.0 or family == "hidden_top" or found[-1][0] >= 0.999 * float(values[-1])
    for value, residual in found[:3]:
        assert value <= float(values[-1]) + rounding
        assert float((values - value).abs().min()) <= 1.01 * residual + rounding


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_no_guide_of_a_matrix_with_close_eigenvalues_is_above_the_largest(dtype: torch.dtype, rounding: float) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        matrix = torch.randn(160 + 25 * seed, 160 + 25 * seed, dtype=dtype)
        gram = matrix @ matrix.mT
        top = float(torch.linalg.eigvalsh(gram.double())[-1])
        # Newton's method ended before it was there: .004 above in float32.
        assert all(value <= top * (1.0 + rounding) for value, _ in eigenvalue.ritz_values(gram))


def test_the_largest_eigenvalue_of_a_tridiagonal_matrix_is_that_of_lapack() -> None:
    torch.manual_seed(0)
    for size in (1, 2, 12, 60):
        for scale in (0.0, 1e-12, 1.0, 1e9):
            diagonal, beside = torch.randn(2, size, dtype=torch.float64)
            beside = beside.abs() * scale
            matrix = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
            expected = torch.linalg.eigvalsh(matrix)
            value, slope = eigenvalue._tridiagonal_top(diagonal.tolist(), beside.tolist())
            # Newton's method stops at 1e-13.
            assert abs(value - float(expected[-1])) <= 1e-11 * float(expected.abs().max())
            assert slope >= 1.0


def test_when_no_factorisation_succeeds_the_products_still_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(30, 40)
    refuse: Callable[[Tensor, float], Tensor] = lambda grams, level: torch.zeros(len(grams), dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(eigenvalue, "cholesky_certifies", refuse)
    assert dense_norm(weight) >= spectral(weight)
