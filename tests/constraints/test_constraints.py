"""After a projection the true operator norm is within the limit; patterns say which parameter gets which."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, NormError, constraints, layers, losses
from clipless_dp.constraints import (
    AlmostOrthogonal,
    Ball,
    Constraint,
    Frobenius,
    Orthogonal,
    OrthogonalConvolution,
    RowNorm,
    Spectral,
    almost_orthogonal,
    orthogonal,
)
from clipless_dp.norms.gram import single_gram_matrix, sizes_gram_bound
from clipless_dp.norms.operators import ConvOperator, DenseOperator
from tests.soundness.attack import wrap
from tests.soundness.mutation import Mutant, with_each
from tests.support import no_certificates

TRUTH_ROUNDING = 1e-13
"""LAPACK's float64 singular values err by a small multiple of n·2^-53·‖A‖, below 1e-13 for n < 200."""

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "square": (nn.Linear(6, 6), (6,)),
    "wide": (nn.Linear(9, 3), (9,)),
    "tall": (nn.Linear(2, 8), (2,)),
    "row": (nn.Linear(7, 1), (7,)),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5)),
    "strided conv": (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 6, 6)),
    "dilated conv": (nn.Conv2d(1, 2, 3, dilation=2, padding=2), (1, 6, 6)),
    "grouped conv": (nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 4, 4)),
    "conv1d": (nn.Conv1d(2, 3, 3, padding=1, dilation=2), (2, 7)),
    "circular conv": (nn.Conv2d(1, 2, 3, padding=2, padding_mode="circular"), (1, 4, 4)),
    "transposed conv": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), (2, 4, 4)),
    "grouped transposed conv1d": (nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 5)),
    "large kernel on a small map": (nn.Conv2d(1, 2, 5, padding=2), (1, 3, 3)),
}
CONSTRAINTS: tuple[Constraint, ...] = (
    Spectral(),
    Spectral(0.3),
    Orthogonal(),
    Orthogonal(2.0, iterations=8),
    Ball(0.7),
    AlmostOrthogonal(),
    AlmostOrthogonal(0.3),
    Frobenius(0.7),
    RowNorm(0.7),
)

KINDS: tuple[Constraint, ...] = (
    Spectral(),
    Orthogonal(),
    OrthogonalConvolution(),
    Ball(),
    AlmostOrthogonal(),
    Frobenius(),
    RowNorm(),
)


def true_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of the layer, without its bias, written out as a float64 matrix."""
    count = math.prod(shape)
    twin = copy.deepcopy(layer).double()
    twin.bias = None
    with torch.no_grad():
        columns = twin(torch.eye(count, dtype=torch.float64).reshape(count, *shape))
    return float(torch.linalg.svdvals(columns.reshape(count, -1))[0])


def fresh(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    layer, shape = LAYERS[name]
    return copy.deepcopy(layer), shape


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_projection_brings_the_true_norm_within_the_limit(
    constraint: Constraint, name: str, size: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer, shape = fresh(name)
    model = wrap(nn.Sequential(layer.to(dtype)), shape, constraint={"0.weight": constraint})
    with torch.no_grad():
        layer.weight.copy_(size * torch.randn(layer.weight.shape))
    model.project_()
    assert true_norm(layer, shape) <= constraint.limit * (1.0 + TRUTH_ROUNDING)


@pytest.mark.parametrize("constraint", KINDS, ids=repr)
@pytest.mark.parametrize("name", ["square", "strided conv"])
def test_wrapping_brings_the_true_norm_within_the_limit(constraint: Constraint, name: str) -> None:
    layer, shape = fresh(name)
    with torch.no_grad():
        layer.weight.mul_(100.0)
    wrap(nn.Sequential(layer), shape, constraint={"0.weight": constraint})
    assert true_norm(layer, shape) <= constraint.limit * (1.0 + TRUTH_ROUNDING)


def test_a_weight_within_the_limit_is_left_alone_by_the_spectral_constraint() -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.mul_(0.1)
    before = layer.weight.detach().clone()
    wrap(nn.Sequential(layer), (4,), constraint=Spectral()).project_()
    assert torch.equal(layer.weight, before)


def test_the_spectral_constraint_keeps_directions_and_comes_close_to_the_limit() -> None:
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight.mul_(30.0)
    before = layer.weight.detach().clone()
    wrap(nn.Sequential(layer), (6,), constraint=Spectral())
    cosine = torch.nn.functional.cosine_similarity(layer.weight.flatten(), before.flatten(), dim=0)
    assert float(cosine.detach()) == pytest.approx(1.0, abs=1e-6)  # float32 rounding of 30 entries
    assert 0.99 < true_norm(layer, (6,)) <= 1.0


def test_the_orthogonal_constraint_makes_singular_values_nearly_equal_and_keeps_them_so() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 5)
    model = wrap(nn.Sequential(layer), (8,), constraint=Orthogonal(limit=2.0))
    for _ in range(3):
        with torch.no_grad():
            layer.weight.add_(0.05 * torch.randn_like(layer.weight))
        model.project_()
        values = torch.linalg.svdvals(layer.weight.detach().double())
        # Björck's steps converge quadratically from perturbations of 0.05·√13, and the certificate is within 1e-3.
        assert float(values[-1]) > 0.99 * 2.0
        assert float(values[0]) <= 2.0


@pytest.mark.parametrize("size", [0.02, 0.2])
def test_large_weights_stay_orthogonal_as_small_ones_do(size: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(200, 200, bias=False)
    model = wrap(layer, (200,), constraint=Orthogonal())
    for _ in range(2):
        with torch.no_grad():
            # Of operator norm near `size`.
            layer.weight.add_(size * torch.randn_like(layer.weight) / (2.0 * math.sqrt(200)))
        model.project_()
    # What the certificate takes away.
    # f(σ) = 1 - 3(σ-1)²/2 where the last iteration starts at a root mean square of 0.03/2, and the float32 rounding.
    assert float(torch.linalg.svdvals(layer.weight.detach().double())[-1]) > 0.9975


@pytest.mark.parametrize("constraint", KINDS, ids=repr)
def test_a_kernel_that_reads_nothing_but_padding_is_projected_without_error(constraint: Constraint) -> None:
    layer = nn.Conv2d(1, 1, 1, stride=3, padding=1)
    model = wrap(nn.Sequential(layer), (1, 1, 1), constraint={"0.weight": constraint})
    model.project_()
    assert bool(layer.weight.isfinite().all())
    assert true_norm(layer, (1, 1, 1)) == 0.0


@pytest.mark.parametrize("constraint", KINDS, ids=repr)
def test_a_zero_weight_stays_finite(constraint: Constraint) -> None:
    layer = nn.Linear(4, 3)
    model = wrap(nn.Sequential(layer), (4,), constraint=constraint)
    with torch.no_grad():
        layer.weight.zero_()
    model.project_()
    assert bool(layer.weight.isfinite().all())
    assert true_norm(layer, (4,)) <= 1.0


@pytest.mark.parametrize("constraint", KINDS, ids=repr)
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_parameter_that_is_not_finite_is_refused_by_name(constraint: Constraint, parameter: str) -> None:
    layer = nn.Linear(4, 3)
    model = wrap(nn.Sequential(nn.ReLU(), layer), (4,), constraint={"1.*": constraint})
    with torch.no_grad():
        layer.get_parameter(parameter).view(-1)[0] = math.nan
    for project in (model.project_, model.settle_):
        with pytest.raises(NormError, match=rf"1\.{parameter}: .*no bound"):
            project()


def test_a_ball_on_a_bias_bounds_its_euclidean_norm() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.bias.fill_(10.0)
    wrap(nn.Sequential(layer), (4,), constraint={"0.bias": Ball(0.5)})
    assert float(torch.linalg.vector_norm(layer.bias.detach().double())) <= 0.5


@pytest.mark.parametrize("name", ["square", "wide", "tall", "conv", "dilated conv", "grouped conv", "conv1d"])
def test_the_almost_orthogonal_diagonal_alone_brings_the_true_norm_to_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(almost_orthogonal, "scale_to_limit_", lambda *_: None)
    for seed in range(5):
        torch.manual_seed(seed)
        layer, shape = fresh(name)
        model = wrap(nn.Sequential(layer.double()), shape, constraint={"0.weight": AlmostOrthogonal()})
        with torch.no_grad():
            layer.weight.copy_(10.0 ** (seed - 2) * torch.randn(layer.weight.shape))
        model.project_()
        # Sums of under 100 float64 products, and the truth's own rounding.
        assert 0.3 < true_norm(layer, shape) <= 1.0 + 1e-12


def test_the_almost_orthogonal_diagonal_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(2, 3, 2, 3, 2, dtype=torch.float64)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for group in range(2):
        for first in range(2):
            for second in range(2):
                for down in range(-2, 3):
                    for right in range(-1, 2):
                        total = 0.0
                        for a in range(3):
                            for b in range(2):
                                if 0 <= a + down < 3 and 0 <= b + right < 2:
                                    pair = kernel[group, :, first, a, b] * kernel[group, :, second, a + down, b + right]
                                    total += float(pair.sum())
                        expected[group, first] += abs(total)
    found = almost_orthogonal._correlation_sums(kernel)
    assert torch.allclose(found, expected, rtol=1e-12)  # sums of 18 float64 products


def test_the_almost_orthogonal_constraint_leaves_orthogonal_rows_alone_and_lifts_short_ones() -> None:
    layer = nn.Linear(6, 3).double()
    rows = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0].t()
    model = wrap(nn.Sequential(layer), (6,), constraint=AlmostOrthogonal())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.01], [100.0]]) * rows)
    model.project_()
    # Off-diagonal entries of 1e-16·100 join sums of size 1e-4, and the division by the certificate takes 1e-3.
    assert torch.allclose(layer.weight.detach(), rows, atol=2e-3)


def test_the_frobenius_constraint_is_exact_for_each_group_of_rank_one_and_keeps_directions() -> None:
    layer = nn.Linear(4, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 5.0)))
    before = layer.weight.detach().clone()
    wrap(nn.Sequential(layer), (4,), constraint=Frobenius(0.5))
    assert true_norm(layer, (4,)) == pytest.approx(0.5, rel=1e-6)  # float32 rounding
    assert torch.allclose(layer.weight / layer.weight[0, 0], before, rtol=1e-6)


def test_the_row_norm_constraint_shortens_long_rows_only() -> None:
    layer = nn.Linear(2, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, -9.0], [0.1, 0.0]]))
    wrap(nn.Sequential(layer), (2,), constraint=RowNorm(1.0))
    expected = torch.tensor([[0.3, 0.4], [0.3, 0.4], [0.0, -0.5], [0.1, 0.0]])
    assert torch.allclose(layer.weight.detach(), expected, atol=1e-6)  # float32


@pytest.mark.parametrize("constraint", [Frobenius(), RowNorm()], ids=repr)
def test_cheap_constraints_ask_for_no_certificate(constraint: Constraint, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = fresh("conv")
    model = wrap(nn.Sequential(layer), shape, constraint={"0.weight": constraint})
    no_certificates(monkeypatch)
    model.project_()
    assert model.sensitivity().per_parameter["0.weight"] > 0.0


def near_orthogonal(rows: int, columns: int, spread: float) -> Tensor:
    """Singular values of ``1 ± spread``."""
    left, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))
    size = min(rows, columns)
    return (left[:, :size] * (1.0 + spread * torch.linspace(-1, 1, size, dtype=torch.float64))) @ right[:, :size].mT


DENSE_WEIGHTS: dict[str, Any] = {
    "orthogonal": lambda m, n: near_orthogonal(m, n, 0.0),
    "nearly": lambda m, n: near_orthogonal(m, n, 0.02),
    "singular values up to √3": lambda m, n: near_orthogonal(m, n, 3.0**0.5 - 1.0),
    "singular values up to 2": lambda m, n: near_orthogonal(m, n, 1.0),
    "gaussian": lambda m, n: torch.randn(m, n, dtype=torch.float64) / n**0.5,
    "equal entries": lambda m, n: torch.ones(m, n, dtype=torch.float64),
    "one large entry": lambda m, n: torch.eye(m, n, dtype=torch.float64) + 1e6 * (torch.arange(n) == 1),
    "a scaled row": lambda m, n: near_orthogonal(m, n, 0.0) * (1.0 + 2.0 * (torch.arange(m) == 0))[:, None],
}


@pytest.mark.parametrize("family", DENSE_WEIGHTS)
@pytest.mark.parametrize("shape", [(6, 6), (20, 90), (90, 20), (1, 5), (64, 64), (300, 260), (257, 400)], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1.0), (torch.float32, 0.3), (torch.float64, 7.0)])
def test_the_last_orthogonal_step_is_its_own_certificate(
    family: str, shape: tuple[int, int], dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    constraint = Orthogonal(limit=limit)
    weight = (limit * DENSE_WEIGHTS[family](*shape)).to(dtype)
    no_certificates(monkeypatch)
    constraint.project_(weight, (DenseOperator(),))
    values = torch.linalg.svdvals(weight.double())
    assert float(values[0]) <= limit * (1.0 + TRUTH_ROUNDING)
    assert constraint.holds(weight, (DenseOperator(),)), "a weight that is loaded again must stay as it is"
    if family in ("orthogonal", "nearly"):
        # The allowance for rounding takes little; from afar four iterations may not arrive.
        assert float(values[-1]) > 0.998 * limit


def test_one_small_step_away_an_orthogonal_weight_is_taken_back_by_one_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    weight = (near_orthogonal(200, 200, 0.0) + 5e-4 * torch.randn(200, 200, dtype=torch.float64)).float()
    calls = []
    for name in ("_difference_in_single", "_difference_"):
        honest = getattr(orthogonal, name)
        monkeypatch.setattr(orthogonal, name, lambda matrix, honest=honest: calls.append(1) or honest(matrix))
    Orthogonal().project_(weight, (DenseOperator(),))
    assert len(calls) == 1
    values = torch.linalg.svdvals(weight.double())
    # f(σ) = 1 - 3(σ-1)²/2 at σ = 1 ± 0.015; and the allowance for float32 products.
    assert float(values[-1]) > 0.997
    assert float(values[0]) <= 1.0


def test_a_kernel_one_small_step_away_is_taken_back_by_one_iteration_whatever_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    operator = ConvOperator((9, 9), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=2, coverage=9)
    start = torch.stack([near_orthogonal(4, 27, 0.0) for _ in range(2)])
    calls: list[Tensor] = []
    honest = orthogonal.bjorck_step

    def counted(matrices: Tensor) -> Tensor:
        # Of wide matrices it takes the transposed ones.
        calls.extend([matrices] if matrices.shape[-2] >= matrices.shape[-1] else [])
        return honest(matrices)

    monkeypatch.setattr(orthogonal, "bjorck_step", counted)
    for size in (1e-6, 0.4, 1.0, 1e6):
        kernel = (size * (start + 5e-4 * torch.randn(2, 4, 27, dtype=torch.float64))).float().reshape(8, 3, 3, 3)
        calls.clear()
        Orthogonal().project_(kernel, (operator,))
        assert len(calls) == 1
        values = torch.linalg.svdvals(kernel.double().reshape(2, 4, 27))
        assert float(values.min()) >= 0.999 * float(values.max())
        assert 0.99 < operator.norm(kernel) <= 1.0


def test_products_coarser_than_float32_are_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    honest = DenseOperator.norm
    monkeypatch.setattr(DenseOperator, "norm", lambda self, weight: calls.append(1) or honest(self, weight))
    weight = near_orthogonal(64, 64, 0.01).float()
    Orthogonal().project_(weight.clone(), (DenseOperator(),))
    assert not calls
    torch.set_float32_matmul_precision("medium")
    try:
        Orthogonal().project_(weight, (DenseOperator(),))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert calls
    assert float(torch.linalg.svdvals(weight.double())[0]) <= 1.0 + TRUTH_ROUNDING


LAST_STEP_MUTANTS = (
    (
        Mutant(
            "no division by the bound", Orthogonal, "_orthogonalize_dense_", "1.0 + growth if certain else 1.0", "1.0"
        ),
        0.0,
    ),
    (Mutant("iteration from beyond √3", orthogonal, "_difference_", "upper > 2.0", "upper > 1e9"), 2.5),
    (Mutant("half a correction", orthogonal, "_last_step_", "alpha=0.5", "alpha=0.25"), 0.02),
)


@pytest.mark.parametrize(("mutant", "spread"), LAST_STEP_MUTANTS, ids=lambda value: getattr(value, "name", value))
def test_weights_near_the_limit_catch(mutant: Mutant, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonal, "scale_to_limit_", lambda *_: None)

    def worst() -> float:
        torch.manual_seed(0)
        weight = near_orthogonal(40, 60, spread).float()
        Orthogonal(iterations=1).project_(weight, (DenseOperator(),))
        return float(torch.linalg.svdvals(weight.double())[0])

    assert worst() <= 1.0 + TRUTH_ROUNDING
    mutant.apply(monkeypatch)
    assert not worst() <= 1.0 + TRUTH_ROUNDING


def as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats weights of 200 rows as those of more than a thousand."""
    monkeypatch.setattr(orthogonal, "_LARGE", 100)
    monkeypatch.setattr(orthogonal, "_TERMS", 64)


@pytest.mark.parametrize("family", DENSE_WEIGHTS)
@pytest.mark.parametrize("shape", [(200, 200), (300, 260), (257, 400)], ids=str)
def test_the_last_orthogonal_step_of_a_large_weight_is_its_own_certificate(
    family: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    as_large_ones(monkeypatch)
    weight = DENSE_WEIGHTS[family](*shape).float()
    no_certificates(monkeypatch)
    Orthogonal().project_(weight, (DenseOperator(),))
    values = torch.linalg.svdvals(weight.double())
    assert float(values[0]) <= 1.0 + TRUTH_ROUNDING
    assert Orthogonal().holds(weight, (DenseOperator(),))
    if family in ("orthogonal", "nearly"):
        assert float(values[-1]) > 0.998


def test_a_large_weight_is_taken_back_in_float32_where_the_frobenius_norm_says_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    as_large_ones(monkeypatch)
    start = near_orthogonal(300, 300, 0.0)
    for name in ("_difference_", "scale_to_limit_"):
        monkeypatch.setattr(orthogonal, name, lambda *_: pytest.fail("float32 and Björck's steps are enough"))
    # Root mean squares of the eigenvalues of WᵀW - I of 0.06 and 0.15: Frobenius norms of 1 and 2.6.
    for noise, least in ((2.5e-3, 0.99), (6e-3, 0.98)):
        weight = (start + noise * torch.randn(300, 300, dtype=torch.float64)).float()
        Orthogonal().project_(weight, (DenseOperator(),))
        values = torch.linalg.svdvals(weight.double())
        assert float(values[0]) <= 1.0
        assert float(values[-1]) > least


@pytest.mark.parametrize("longest", [1.4, 1.6, 1.72, 1.9])
def test_one_singular_value_that_stands_out_does_not_collapse(longest: float) -> None:
    torch.manual_seed(0)
    left, right = (near_orthogonal(200, 200, 0.0) for _ in range(2))
    sizes = torch.ones(200, dtype=torch.float64)
    sizes[3] = longest
    weight = (left * sizes @ right).float()
    Orthogonal().project_(weight, (DenseOperator(),))
    values = torch.linalg.svdvals(weight.double())
    assert float(values[0]) <= 1.0
    # f(1.4) = 0.73 and f(f(1.4)) = 0.9; beyond √2 the weight is divided by what stands out first.
    assert float(values[-1]) > 0.85


def far_from_one_step(monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest distance of an entry from that of ``W - (WWᵀ - I)W/2``, of a product in pieces."""
    as_large_ones(monkeypatch)
    torch.manual_seed(0)
    weight = near_orthogonal(200, 260, 0.06).float()
    exact = weight.double()
    expected = 1.5 * exact - 0.5 * exact @ exact.mT @ exact
    difference = orthogonal._difference_in_single(weight)
    assert difference is not None
    orthogonal._last_step_(weight, difference)
    return float((weight.double() - expected).abs().max())


def test_a_product_in_pieces_is_that_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert far_from_one_step(monkeypatch) <= 1e-6


@with_each(
    Mutant("a piece of what is new", orthogonal, "_last_step_", "part.clone() if pieces > 1 else part", "part"),
    Mutant("pieces in another order", orthogonal, "_last_step_", "before.split(terms)", "before.split(terms)[::-1]"),
)
def test_one_step_catches(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    assert far_from_one_step(monkeypatch) > 1e-4


def worst_of_unlucky_products(monkeypatch: pytest.MonkeyPatch) -> float:
    """Norm after a step whose Gram matrix is as far off as it may be, in the direction that hurts."""
    torch.manual_seed(0)
    weight = near_orthogonal(200, 260, 0.0).float()
    left, _, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    direction = left[:, 0].float()

    def unlucky(matrix: Tensor, chunk: int) -> tuple[Tensor, float]:
        gram, relative = single_gram_matrix(matrix, chunk)
        most = len(gram) if len(gram) <= orthogonal._LARGE else sizes_gram_bound(matrix)
        # Ten times the error, so that other allowances do not hide it.
        return gram - 10.0 * relative * most * torch.outer(direction, direction), 10.0 * relative

    monkeypatch.setattr(orthogonal, "single_gram_matrix", unlucky)
    monkeypatch.setattr(orthogonal, "scale_to_limit_", lambda *_: None)
    Orthogonal(iterations=1).project_(weight, (DenseOperator(),))
    return float(torch.linalg.svdvals(weight.double())[0])


@pytest.mark.parametrize("large", [False, True])
def test_a_float32_gram_matrix_as_far_off_as_it_may_be_does_no_harm(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        as_large_ones(monkeypatch)
    assert worst_of_unlucky_products(monkeypatch) <= 1.0


UNLUCKY_MUTANTS = (
    Mutant("its error forgotten", orthogonal, "_difference_in_single", "relative * sizes +", "0.0 *"),
    Mutant("a third of its error", orthogonal, "_last_step_", "size * error +", "size * error / 3.0 +"),
)


@pytest.mark.parametrize("large", [False, True])
@with_each(*UNLUCKY_MUTANTS)
def test_an_unlucky_gram_matrix_catches(mutant: Mutant, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        as_large_ones(monkeypatch)
    mutant.apply(monkeypatch)
    assert worst_of_unlucky_products(monkeypatch) > 1.0


CONSTRAINT_MUTANTS = (
    (Mutant("Frobenius without √N", Frobenius, "project_", "self.limit / factor", "self.limit"), Frobenius(), "conv"),
    (
        Mutant("rows without √rows", RowNorm, "project_", "math.sqrt(operator.matrix(weight).shape[1])", "1.0"),
        RowNorm(),
        "tall",
    ),
    (Mutant("rows without √N", RowNorm, "project_", "operator.perturbation(weight) *", "1.0 *"), RowNorm(), "conv"),
    (
        Mutant(
            "an orthogonal kernel taken for an orthogonal operator",
            Orthogonal,
            "project_",
            "scale_to_limit_(weight",
            "(lambda *_: 0)(weight",
        ),
        Orthogonal(),
        "conv",
    ),
    (
        Mutant(
            "AOL without the correlations of shifts",
            almost_orthogonal.AlmostOrthogonal,
            "_divisors",
            "_correlation_sums(kernel)",
            "kernel.flatten(3).square().sum((1, 3))",
        ),
        AlmostOrthogonal(),
        "conv",
    ),
)


@pytest.mark.parametrize(
    ("mutant", "constraint", "name"), CONSTRAINT_MUTANTS, ids=lambda value: getattr(value, "name", value)
)
def test_flat_weights_catch(mutant: Mutant, constraint: Constraint, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "AOL" in mutant.name:
        # Its certified division would hide the mistake.
        monkeypatch.setattr(almost_orthogonal, "scale_to_limit_", lambda *_: None)
    layer, shape = fresh(name)
    model = wrap(nn.Sequential(layer), shape, constraint={"0.weight": constraint})

    def projected() -> float:
        with torch.no_grad():
            layer.weight.fill_(1.0)
        model.project_()
        return true_norm(layer, shape)

    assert projected() <= constraint.limit * (1.0 + 1e-12)
    mutant.apply(monkeypatch)
    assert projected() > 1.1 * constraint.limit


def test_one_constraint_for_all_clamps_slopes_one_by_one() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.PReLU(3), layers.LinearSpline(3, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.25, -3.0, 1.0]))  # type: ignore[union-attr]
    model = wrap(net, (3,), constraint=Orthogonal())
    assert type(model.constraints["1.weight"]) is type(model.constraints["2.slopes"]) is Frobenius
    clamped = net[1].weight.detach()  # type: ignore[union-attr]
    assert clamped[0] == 0.25
    assert clamped.abs().max() <= 1.0
    assert float(clamped[1]) == pytest.approx(-1.0, abs=1e-6)  # float32
    # Constants of the limits: X = G = 1 and every norm is 1, but for roundings of 1e-6 in all.
    assert dict(model.sensitivity().per_parameter) == pytest.approx(
        {"0.weight": 1.0, "1.weight": 1.0, "2.slopes": 1.0}, rel=1e-5
    )


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(10.0)
    return net


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, {}),
        (Spectral(2.0), {"0.weight": "Spectral", "1.0.weight": "Spectral", "2.weight": "Spectral"}),
        ({"0": Spectral()}, {"0.weight": "Spectral"}),
        ({"0.weight": Spectral(), "*": Orthogonal()}, None),
        ({"1.*": Orthogonal(), "*.weight": Spectral()}, None),
        ({"0": None, "*.weight": Spectral()}, {"1.0.weight": "Spectral", "2.weight": "Spectral"}),
        ({"*.bias": Ball()}, {"0.bias": "Ball", "1.0.bias": "Ball", "2.bias": "Ball"}),
        ({}, {}),
    ],
)
def test_patterns_choose_each_parameters_constraint_and_the_first_match_counts(
    spec: constraints.ConstraintSpec, expected: dict[str, str] | None
) -> None:
    model = wrap(three_layers(), (4,), constraint=spec)
    chosen = {name: type(constraint).__name__ for name, constraint in model.constraints.items()}
    if expected is not None:
        assert chosen == expected
    elif "0.weight" in (spec or {}):
        assert chosen["0.weight"] == "Spectral"
        assert chosen["1.0.weight"] == chosen["2.bias"] == "Orthogonal"
    else:
        assert chosen["1.0.weight"] == "Orthogonal"
        assert chosen["0.weight"] == chosen["2.weight"] == "Spectral"
    for name, constraint in model.constraints.items():
        if name.endswith("weight"):
            assert float(torch.linalg.svdvals(model.net.get_parameter(name).detach().double())[0]) <= (
                constraint.limit * (1.0 + TRUTH_ROUNDING)
            )


@pytest.mark.parametrize("spec", ["spectral", {"0": "spectral"}, {"0": 1.0}, [Spectral()], Spectral])
def test_what_is_not_a_constraint_is_refused(spec: Any) -> None:
    with pytest.raises(ConfigurationError, match="constraint"):
        wrap(three_layers(), (4,), constraint=spec)


def test_a_pattern_that_matches_nothing_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ConfigurationError, match=r"'conv\*'.*'0.weight'"):
        wrap(three_layers(), (4,), constraint={"conv*": Spectral()})


KINDS = [Spectral, Ball, AlmostOrthogonal, Frobenius, RowNorm, Orthogonal, OrthogonalConvolution]
NO_LIMITS = [0.0, -1.0, math.nan, math.inf, 10**400, Fraction(1, 10**400), True, np.True_, None, "1", (1.0,), 1j]
NO_LIMITS += [torch.tensor(1.0), np.ones(1), np.float64(math.nan)]


@pytest.mark.parametrize("limit", NO_LIMITS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_limits_that_are_no_finite_positive_numbers_are_refused_when_the_constraint_is_made(
    kind: Any, limit: object
) -> None:
    with pytest.raises(ConfigurationError, match="limit"):
        kind(limit)


@pytest.mark.parametrize("limit", [2, np.int64(2), np.float32(2.0), Fraction(4, 2)], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_argument_of_each_constraint_is_its_limit_a_real_number_of_any_kind(kind: Any, limit: Any) -> None:
    assert type(kind(limit).limit) is float
    assert kind(limit).limit == kind(limit=limit).limit == 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_beside_the_limit_are_named(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"positional.*Write {kind.__name__}\(limit=1.0"):
        kind(1.0, 4)
    with pytest.raises(ConfigurationError, match="radius"):
        kind(radius=1.0)
    assert pickle.loads(pickle.dumps(kind(2.0))).limit == copy.copy(kind(2.0)).limit == 2.0


@pytest.mark.parametrize(
    "arguments",
    [{"iterations": value} for value in (0, -1, 1.0, True, "4", None, math.inf, torch.tensor(4))]
    + [{"tangent": value} for value in (1, 0, None, "no", torch.tensor(True))],
    ids=repr,
)
@pytest.mark.parametrize("kind", [Orthogonal, OrthogonalConvolution])
def test_iterations_are_whole_numbers_and_tangent_is_a_truth_value(kind: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        kind(**arguments)


def test_settings_of_constraints_are_the_plain_values_that_earlier_states_hold() -> None:
    made = Orthogonal(np.float32(2.0), iterations=np.int64(8))
    assert vars(made) == {"limit": 2.0, "iterations": 8, "tangent": False}
    assert [type(value) for value in vars(made).values()] == [float, int, bool]
    # A pickle of a time when the number of iterations came first: it restores attributes and calls no constructor.
    before = pickle.loads(
        b"\x80\x04cclipless_dp.constraints.orthogonal\nOrthogonal\n)\x81}(\x8c\x05limitG@\x00\x00\x00\x00\x00"
        b"\x00\x00\x8c\niterationsK\x08\x8c\x07tangent\x89ub."
    )
    assert vars(before) == vars(made)


def test_one_kernel_at_two_strides_is_within_the_limit_of_both_operators() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Conv2d(1, 1, 3, padding=1, bias=False)
            self.coarse = nn.Conv2d(1, 1, 3, stride=2, bias=False)
            self.coarse.weight = self.fine.weight

        def forward(self, values: Tensor) -> Tensor:
            return self.coarse(self.fine(values))  # type: ignore[no-any-return]

    net = Shared()
    with torch.no_grad():
        net.fine.weight.fill_(5.0)
    model = wrap(net, (1, 7, 7), constraint=Spectral(0.5))
    assert len(model.operators("fine.weight")) == 2
    assert true_norm(net.fine, (1, 7, 7)) <= 0.5 * (1.0 + TRUTH_ROUNDING)
    assert true_norm(net.coarse, (1, 7, 7)) <= 0.5 * (1.0 + TRUTH_ROUNDING)


def test_constrained_sensitivity_is_a_constant_of_the_limits() -> None:
    def total(seed: int) -> float:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
        model = DPLipModel(
            net, input_shape=(5,), input_norm=1.0, loss=losses.TauCrossEntropy(), constraint=Spectral(0.5)
        )
        return model.sensitivity().total

    assert total(0) == total(1)
