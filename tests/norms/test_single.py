"""Certificates from float32 products are never below the truth, however unlucky the rounding."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from clipless_dp.constraints import Spectral
from clipless_dp.errors import NormError
from clipless_dp.norms import gram, single
from clipless_dp.norms.gram import single_gram_matrix
from clipless_dp.norms.operators import DenseOperator
from clipless_dp.norms.rounding import product_error
from clipless_dp.norms.single import single_frobenius_bound, single_precision_norm
from tests.norms.matrices import FAMILIES
from tests.norms.truth import TRUTH_ROUNDING, spectral
from tests.soundness.mutation import Mutant, with_each

SHAPES = [(160, 160), (170, 333), (333, 170)]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bound_is_below_the_truth_for_any_family_or_scale(family: str) -> None:
    torch.manual_seed(3)
    for rows, columns in SHAPES:
        matrix = FAMILIES[family](rows, columns)
        for scale in (1e-38, 1e-9, 1e-5, 1.0, 0.3, 10.0, 1e9, 1e30):
            weight = (matrix * scale).float()
            bound = single_precision_norm(weight)
            if bound is not None:
                assert math.isfinite(bound)
                assert bound >= spectral(weight) * (1.0 - TRUTH_ROUNDING)


@pytest.mark.parametrize("family", ["gaussian", "orthogonal", "clustered", "rank_one", "constant"])
def test_the_bound_is_within_twelve_thousandths_and_strides_do_not_matter(family: str) -> None:
    torch.manual_seed(0)
    weight = FAMILIES[family](512, 300).float()
    bound = single_precision_norm(weight)
    assert bound is not None
    # Half of the slack in the square, 1e-2 at the first attempt, and rounding: γ_420·rank/2 at most, here 3.8e-3.
    assert bound <= spectral(weight) * (1.0 + 1.2e-2)
    # Products of a transposed view may round in another order.
    assert single_precision_norm(weight.mT.contiguous().mT) == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("answer", [0.0, 1e-3, 1.0, 1e9, math.inf, math.nan])
def test_a_lying_guide_cannot_push_a_bound_below_the_truth(answer: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(single, "ritz_values", lambda *_: iter([(answer, 0.0)]))
    for weight in (torch.randn(170, 190), FAMILIES["orthogonal"](170, 190).float()):
        bound = single_precision_norm(weight)
        assert bound is None or bound >= spectral(weight) * (1.0 - TRUTH_ROUNDING)


@pytest.mark.parametrize("shape", [(160, 200), (301, 1100), (129, 64)])
@pytest.mark.parametrize("chunk", [64, 128])
def test_a_float32_gram_matrix_is_within_its_rounding(shape: tuple[int, int], chunk: int) -> None:
    torch.manual_seed(0)
    for matrix in (torch.randn(shape), torch.full(shape, 0.1), torch.full(shape, 1.0 + 2.0**-20)):
        found, relative = single_gram_matrix(matrix, chunk)
        exact = matrix.double() @ matrix.double().mT
        sizes = matrix.double().abs()
        assert bool(((found.double() - exact).abs() <= relative * (sizes @ sizes.mT) * (1.0 + 1e-12)).all())
        # As short as the sums are.
        assert relative <= product_error(chunk + shape[1] // chunk)


def test_a_frobenius_norm_from_float32_sums_is_not_below_the_truth() -> None:
    torch.manual_seed(0)
    for matrix in (torch.randn(300, 200), torch.full((600, 700), 0.1), torch.full((300, 300), 1e-30)):
        assert single_frobenius_bound(matrix) >= float(torch.linalg.vector_norm(matrix.double()))


SIZED = [
    torch.full((300, 700), 0.1),
    torch.full((300, 200), 0.7),
    torch.randn(200, 300, generator=torch.Generator().manual_seed(0)),
    torch.diag(torch.arange(300.0, 0.0, -1.0)),
    -torch.ones(1, 1),
]


def worst_of_sizes() -> float:
    """Largest relative error below the truth of the bound of ``‖|M||M|ᵀ‖``."""
    return max(1.0 - gram.sizes_gram_bound(matrix) / spectral(matrix.abs()) ** 2 for matrix in (*SIZED, SIZED[2].mT))


def test_the_norm_of_sizes_is_not_below_the_truth_and_less_than_that_of_frobenius() -> None:
    assert worst_of_sizes() <= TRUTH_ROUNDING
    assert gram.sizes_gram_bound(SIZED[2]) <= 0.75 * float(SIZED[2].double().square().sum())


@with_each(
    Mutant("no rounding", gram, "sizes_gram_bound", "(1.0 + 2.0 *", "(1.0 - 0.0 *"),
    Mutant("signs", gram, "sizes_gram_bound", "part.abs() @ sums", "part @ sums"),
    Mutant(
        "the last rows only",
        gram,
        "sizes_gram_bound",
        "max(float((part.abs() @ sums).amax()) for part in parts)",
        "float((parts[-1][-1:].abs() @ sums).amax())",
    ),
)
def test_constant_and_uneven_matrices_catch(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    assert worst_of_sizes() > 1e-8


@pytest.mark.parametrize("chunk", [16, 64])
def test_blocks_of_large_gram_matrices_are_those_of_small_ones(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1100, 70)
    found, relative = single_gram_matrix(matrix, chunk)
    monkeypatch.setattr(gram, "_WIDE_FROM", 2000)
    known, same = single_gram_matrix(matrix, chunk)
    assert relative == same
    assert torch.allclose(found, known, rtol=1e-5, atol=1e-4)


@functools.cache
def unlucky() -> list[tuple[Tensor, float]]:
    """Sums that float32 rounds the same way again and again, and spectra that a factorisation barely misses."""
    torch.manual_seed(0)
    constants = [torch.full((160, 1024), value) for value in (0.1, 0.3, 0.7, 1.0 + 2.0**-12, 1.0 + 2.0**-20)]
    spectra = ("orthogonal", "clustered", "hidden_top", "gaussian")
    # Those of more than 256 rows are factorised by blocks.
    flat = [FAMILIES[family](rows, rows).float() for family in spectra for rows in (200, 290)]
    return [(weight, spectral(weight)) for weight in constants + flat]


def worst_below(monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest relative error below the truth, with guides at, around and far below what float32 can tell."""
    monkeypatch.setattr(single, "_ATTEMPTS", ((0.0, 0.0),))
    worst = 0.0
    for weight, truth in unlucky():
        top = float(torch.linalg.eigvalsh(single_gram_matrix(weight, single._CHUNK)[0].double())[-1])
        for factor in (0.5, 0.9, 0.99, *(1.0 + step * 2.0**-24 for step in (-4, -2, -1, 0, 1, 2, 4, 8))):
            monkeypatch.setattr(single, "ritz_values", lambda *_, level=top * factor: iter([(level, 0.0)]))
            bound = single.single_precision_norm(weight)
            if bound is not None:
                worst = max(worst, 1.0 - bound / truth)
    return worst


MUTANTS = (
    Mutant("no rounding", single, "_squared_norm_bound", "enlarge(bound, rows + 16)", "level"),
    Mutant("half an update", single, "_factorised", ".mT @ solved", ".mT @ (0.5 * solved)"),
    Mutant("the first block only", single, "_factorised", "matrix[top:below, last:below].sub_(", "id("),
    Mutant("nobody looks at pivots", single, "_factorised", "int(info) != 0 or not", "False and"),
    Mutant("not shifted", single, "_squared_norm_bound", "gram.neg() if", "gram.neg().mul_(0.9) if"),
)


def test_the_least_level_that_factorises_is_still_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst_below(monkeypatch) <= TRUTH_ROUNDING


@with_each(*MUTANTS)
def test_the_least_level_that_factorises_catches(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    # Gram matrices of constants round down by 7e-7.
    assert worst_below(monkeypatch) > 1e-7


def excess(matrix: Tensor) -> float:
    """By how much a float32 Gram matrix leaves its own bound, entry by entry, in units of the bound."""
    found, relative = gram.single_gram_matrix(matrix, 64)
    sizes = matrix.double().abs()
    return float(((found.double() - matrix.double() @ matrix.double().mT).abs() / (relative * sizes @ sizes.mT)).max())


@with_each(
    Mutant("one rounding", gram, "single_gram_matrix", "spans[0][1] + len(spans) - 1", "1"),
    Mutant("a lost chunk", gram, "single_gram_matrix", "block += left", "block += 0.999 * left"),
    Mutant("no mirror image", gram, "_mirrored_", "gram[top:below, :top].mT", "0.999 * gram[top:below, :top].mT"),
)
def test_constant_matrices_catch(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [weight for weight, _ in unlucky() if bool((weight == weight[0, 0]).all())]
    assert max(excess(matrix) for matrix in matrices) <= 1.0
    mutant.apply(monkeypatch)
    assert max(excess(matrix) for matrix in matrices) > 1.0


@pytest.mark.parametrize("family", [*FAMILIES, "denormal"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_large_weight_is_projected_within_the_limit_and_stays_when_it_is_loaded(family: str, scale: float) -> None:
    torch.manual_seed(0)
    weight = FAMILIES.get(family, lambda m, n: torch.full((m, n), 1e-40 / scale))(170, 200) * scale
    weight = weight.float() if family == "denormal" else (weight / max(1.0, float(weight.abs().max()) / 1e37)).float()
    before = spectral(weight)
    for limit in (1.0, 0.3):
        constraint = Spectral(limit)
        constraint.project_(weight, (DenseOperator(),))
        assert spectral(weight) <= limit * (1.0 + TRUTH_ROUNDING)
        assert before < limit or spectral(weight) > 0.99 * limit
        assert constraint.holds(weight, (DenseOperator(),))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_large_weight_that_is_not_finite_gets_a_typed_error(bad: float) -> None:
    weight = torch.ones(200, 200)
    weight[150, 7] = bad
    assert single_precision_norm(weight) is None
    with pytest.raises(NormError, match="NaN or an infinity"):
        Spectral().project_(weight, (DenseOperator(),))


def test_float32_is_used_where_it_serves_only() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 300)
    expected = single_precision_norm(weight)
    assert expected is not None
    assert single_precision_norm(weight.double()) is None
    assert single_precision_norm(weight.bfloat16()) is None
    assert single_precision_norm(weight[:100]) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert single_precision_norm(weight) == expected
    torch.set_float32_matmul_precision("medium")
    try:
        assert single_precision_norm(weight) is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_where_no_factorisation_succeeds_float32_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(single, "_factorised", lambda matrix: False)
    assert single_precision_norm(torch.randn(200, 300)) is None
