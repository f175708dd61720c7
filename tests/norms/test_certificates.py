"""Each method that certifies an eigenvalue or a norm, on its own."""

from __future__ import annotations

import math

import pytest
import torch

from clipless_dp.norms import eigenvalue
from clipless_dp.norms.budget import effort_of
from clipless_dp.norms.eigenvalue import cholesky_certifies, trace_bounds
from clipless_dp.norms.gram import gram_iteration_bound, gram_matrix
from clipless_dp.norms.rounding import enlarge, gamma, scale_up
from tests.norms.matrices import FAMILIES
from tests.norms.truth import TRUTH_ROUNDING, exactly_bounds, spectral
from tests.soundness.mutation import Mutant


@pytest.mark.parametrize("family", FAMILIES)
def test_gram_iteration_is_never_below_the_truth(family: str) -> None:
    torch.manual_seed(0)
    for rows, columns in [(1, 4), (20, 20), (12, 40), (40, 12)]:
        matrix = FAMILIES[family](rows, columns)
        for scale in (1e-30, 1.0, 1e30):
            for rounds in (0, 1, 3, 8):
                bound = float(gram_iteration_bound(matrix[None] * scale, rounds)[0])
                assert bound >= spectral(matrix * scale) * (1.0 - TRUTH_ROUNDING)


def test_gram_iteration_converges_at_its_rate() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(1, 30, 30, dtype=torch.float64)
    truth = spectral(matrix[0])
    for rounds in (2, 4, 6, 8):
        ratio = float(gram_iteration_bound(matrix, rounds)[0]) / truth
        # ‖H‖_F ≤ √rank·‖H‖ after `rounds` squarings; the rounding terms add about 1e-10.
        assert ratio <= 30.0 ** (0.5 ** (rounds + 1)) * (1.0 + 1e-9)


def test_gram_iteration_bounds_complex_matrices() -> None:
    torch.manual_seed(0)
    batch = torch.randn(50, 6, 9, dtype=torch.complex128)
    truths = torch.linalg.svdvals(batch)[:, 0]
    assert bool((gram_iteration_bound(batch) >= truths * (1.0 - TRUTH_ROUNDING)).all())


def test_gram_iteration_holds_in_exact_rational_arithmetic() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        matrix = torch.randn(4, 5, dtype=torch.float64)
        assert exactly_bounds(float(gram_iteration_bound(matrix[None], 20)[0]), matrix)


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_bounds_enclose_the_largest_eigenvalue(family: str) -> None:
    torch.manual_seed(0)
    for size in (2, 7, 60):
        matrix = FAMILIES[family](size, size + 3)
        gram = matrix @ matrix.T
        upper, lower = trace_bounds(gram[None])
        largest = spectral(gram)
        assert float(upper[0]) >= largest * (1.0 - TRUTH_ROUNDING)
        # The lower guide carries no certificate; its sums round like any other.
        assert float(lower[0]) <= largest * (1.0 + 1e-9)


def test_the_trace_bound_is_exact_for_rank_one_and_for_multiples_of_the_identity() -> None:
    vector = torch.arange(1.0, 9.0, dtype=torch.float64)
    both = torch.stack([torch.outer(vector, vector), 3.0 * torch.eye(8, dtype=torch.float64)])
    upper, _ = trace_bounds(both)
    # A sum of r² squares is enlarged by 8(2r²+4)u < 2e-13.
    torch.testing.assert_close(upper, torch.tensor([204.0, 3.0], dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_cholesky_refuses_a_level_below_the_largest_eigenvalue_and_accepts_one_above() -> None:
    torch.manual_seed(0)
    factors = torch.randn(40, 12, 30, dtype=torch.complex128)
    grams = factors @ factors.mH
    largest = torch.linalg.eigvalsh(grams)[:, -1]
    for i in range(len(grams)):
        # A shift of 1e-9 is far above the factorisation's own error, 8(r+4)u·r < 2e-13.
        assert not bool(cholesky_certifies(grams[i : i + 1].clone(), float(largest[i]) * (1.0 - 1e-9))[0])
        assert bool(cholesky_certifies(grams[i : i + 1].clone(), float(largest[i]) * (1.0 + 1e-9))[0])


def test_outward_rounding_never_rounds_down() -> None:
    assert enlarge(1.0) > 1.0
    assert enlarge(0.0) > 0.0
    assert scale_up(1.0 + 2.0**-52, -1070) >= 2.0**-1070 + 2.0**-1074
    assert scale_up(1.0, 2000) == float("inf")


@pytest.mark.parametrize("size", [255, 256, 300, 513])
def test_large_matrices_factorise_by_halves_at_the_same_level(size: int) -> None:
    torch.manual_seed(0)
    grams = gram_matrix(torch.randn(1, size, size + 7, dtype=torch.float64) / size**0.5)
    top = float(torch.linalg.eigvalsh(grams)[0, -1])
    assert not bool(cholesky_certifies(grams.clone(), top * (1.0 - 1e-9))[0])
    assert bool(cholesky_certifies(grams.clone(), top * (1.0 + 1e-9))[0])


@pytest.mark.parametrize("shape", [(1, 256, 300), (1, 301, 1100), (3, 300, 40), (1, 5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gram_matrix_built_from_blocks_is_symmetric_and_within_its_rounding(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=dtype)
    found, exact = gram_matrix(matrices), matrices.double() @ matrices.double().mT
    sizes = matrices.double().abs()
    # Both err by γ_n|M||M|ᵀ at most, and so does a mirror image: a library may sum the two in different orders.
    rounding = 2.0 * gamma(shape[-1]) * (sizes @ sizes.mT)
    assert bool(((found - exact).abs() <= rounding).all())
    assert bool(((found - found.mT).abs() <= rounding).all())


def worst_of_misled_batches(monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Relative errors below and above the truth of batches of small matrices whose guide is wrong."""
    torch.manual_seed(0)
    below = above = 0.0
    for kind in (torch.float64, torch.complex128):
        for spread in (1.0, 1e-3):
            factors = torch.randn(12, 6, 9, dtype=kind)
            grams = (1.0 - spread) * torch.eye(6, dtype=kind) + spread * (factors @ factors.mH) / 9.0
            truth = float(torch.linalg.eigvalsh(grams).max())
            for share in (0.0, 0.3, 0.9, 0.9999, 1.0, 1e9, math.inf, math.nan):
                monkeypatch.setattr(eigenvalue, "_small_estimate", lambda _, guess=share * truth: guess)
                bound = eigenvalue.largest_eigenvalue_bound(grams.clone(), effort_of("balanced"))
                below = max(below, 1.0 - bound / truth)
                above = above if 1.0 < share < math.inf else max(above, bound / truth - 1.0)
    return below, above


def test_matrices_that_a_guide_misses_are_certified_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    below, above = worst_of_misled_batches(monkeypatch)
    assert below <= TRUTH_ROUNDING
    # The slack of the square.
    assert above <= 2.0 * effort_of("balanced").tolerance * (1.0 + 1e-6)


def test_misled_batches_catch_a_certificate_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "grams = bound, grams[~certain]", "grams = bound, grams[certain] if certain.any() else grams[:1]"
    Mutant("others", eigenvalue, "largest_eigenvalue_bound", old, new).apply(monkeypatch)
    assert worst_of_misled_batches(monkeypatch)[0] > 1e-6
