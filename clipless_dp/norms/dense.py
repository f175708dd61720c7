"""Certified operator norm of a dense matrix."""

from __future__ import annotations

import math

from torch import Tensor

from clipless_dp.errors import NormError
from clipless_dp.norms.budget import Budget, Effort, effort_of
from clipless_dp.norms.eigenvalue import largest_eigenvalue_bound
from clipless_dp.norms.gram import gram_matrix
from clipless_dp.norms.rounding import certified_arithmetic, enlarge, exact_float64, gamma, normalised, scale_up


def dense_norm(weight: Tensor, *, budget: Budget = "balanced") -> float:
    """Guaranteed upper bound of the largest singular value of a matrix.

    Args:
        weight: Shape (out, in), any floating-point type, strides, scale and rank. Read in place, never
            changed.
        budget: `"cheap"` reads bounds off the entries and one Gram matrix; `"balanced"` comes within about
            1e-3 of the norm; `"tight"` within about 1e-8. `"coarse"` is `"balanced"` here: of convolutions that are
            nearly orthogonal it may be 1e-3 looser, and costs less.

    Returns:
        A float `b` with `‖W‖₂ <= b`; 0.0 for a zero or empty matrix.

    Raises:
        NormError: if the weight is not two-dimensional, not real floating-point, or not finite.

    Formula: the least of `‖W‖_F`, `(‖W‖_1‖W‖_∞)^½` and the root of a certified bound of `λ_max` of the Gram
    matrix on the smaller side (see :mod:`clipless_dp.norms.eigenvalue` for its proof).

    Source: G. Golub and C. Van Loan, *Matrix Computations*, 4th ed., §2.3.2 and Corollary 2.3.2 for the
    entrywise bounds.

    Guarantee: holds for the exact real matrix stored in the tensor, rounding included, under any autocast
    or TF32 setting. Everything is computed in float64 after an exact rescaling. The computed Gram matrix
    errs by at most `γ_n|W||W|ᵀ` entry by entry, so by at most `γ_n‖W‖_F²` in norm, which is added.
    """
    effort = effort_of(budget)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise NormError("a dense weight is a tensor of shape (out, in)")
    scaled, exponent = normalised(exact_float64(weight))
    return scale_up(matrix_norm_bound(scaled[None], effort), exponent)


def matrix_norm_bound(matrices: Tensor, effort: Effort) -> float:
    """The largest certified operator norm over a batch of normalised matrices.

    Args:
        matrices: Float64, shape (batch, rows, columns), entries at most 1 in size.
        effort: What the bound may cost.

    Returns:
        A bound of every matrix's operator norm; 0.0 if all are zero or empty. Proof: :func:`dense_norm`.
    """
    if matrices.numel() == 0:
        return 0.0
    with certified_arithmetic(matrices):
        if matrices.shape[-2] > matrices.shape[-1]:
            matrices = matrices.mT
        rows, columns = matrices.shape[-2:]
        grams = gram_matrix(matrices)
        traces = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
        squares = float(traces.max()) * (1.0 + gamma(rows + columns))
        if squares == 0.0:
            return 0.0
        bound = enlarge(math.sqrt(squares))
        if rows == 1:
            return bound
        if not effort.factorise:
            sizes = matrices.abs()
            sums = sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)
            bound = min(bound, enlarge(math.sqrt(float(sums.max()) * (1.0 + gamma(rows + columns)))))
        largest = largest_eigenvalue_bound(grams, effort)
    return min(bound, enlarge(math.sqrt(enlarge(largest + gamma(columns) * squares))))
