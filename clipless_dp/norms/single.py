"""What float32 products can certify: for large dense matrices on the CPU, in half of the time and of the memory."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from clipless_dp.norms.eigenvalue import ritz_values
from clipless_dp.norms.gram import single_gram_matrix
from clipless_dp.norms.rounding import SINGLE_UNIT, certified_arithmetic, enlarge, product_error, single_number
from clipless_dp.precision import coarse_products

_FROM, _TO = 160, 2048
"""Rows from which it pays, and up to which the rounding stays below one per cent."""

_CHUNK, _ROUNDED = 392, 1 << 18
"""Most columns of one product, and most times rows: more would err by more than 0.8 % of the norm at worst."""

_BLOCK, _WHOLE_TO = 96, 256
"""Rows that are factorised at once, of a matrix with more rows than the second number (measured on one CPU core)."""

_ATTEMPTS = (1e-2, 2.5e-2), (2e-2, 1e-3)
"""Relative slack of the squared norm above an estimate from below, and the residual at which the estimate stops."""


def single_precision_serves(matrix: Tensor) -> bool:
    """Whether float32 products are what the proofs here assume, and pay: a large float32 matrix on the CPU.

    Other devices may compute triangular solves through inverses, and have float64 that is fast, or TF32.
    """
    return (
        matrix.dtype == torch.float32
        and matrix.device.type == "cpu"
        and matrix.layout == torch.strided
        and min(matrix.shape) >= _FROM
        and coarse_products(matrix.device) is None
    )


def single_frobenius_bound(matrix: Tensor) -> float:
    """Upper bound of the Frobenius norm of a float32 matrix, from float32 sums of each row's squares."""
    rounding = product_error(matrix.shape[1] + 4)
    if rounding > 0.1:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) * (1.0 + 1e-6)
    # Squares that underflow lose less than the last term. Norms of rows are added up in float64.
    rows = torch.linalg.vector_norm(matrix, dim=1).double()
    return float(torch.linalg.vector_norm(rows)) * (1.0 + 2.0 * rounding) + math.sqrt(matrix.numel()) * 2.0**-62


def single_precision_norm(weight: Tensor) -> float | None:
    """Upper bound of the operator norm of a float32 matrix, about one per cent above it.

    Args:
        weight: Shape (out, in).

    Returns:
        A float ``b`` with ``‖W‖ ≤ b``; None where float32 does not serve: small matrices, other types and devices,
        entries far from 1 or not finite, or a spectrum that no estimate gets hold of.

    Formula: Cholesky's factorisation of ``λI - WWᵀ`` runs to completion at a ``λ`` a little above Lanczos' estimate,
    all in float32.

    Source: as :func:`~clipless_dp.norms.eigenvalue.cholesky_certifies`; blocked so that sums are short.

    Guarantee: with ``ε`` the relative error of the Gram matrix (:func:`~clipless_dp.norms.gram.single_gram_matrix`),
    ``S`` the computed one below the diagonal and its mirror image above, ``‖WWᵀ - S‖ ≤ ε‖W‖_F²``, since it errs entry
    by entry. Let ``A = fl(λI - S)``, off by ``u|A_ii|/(1-u)`` on the diagonal. By :func:`_factorised`
    ``A + ΔA ⪰ 0`` with a bound of ``‖ΔA‖``. Hence ``λ_max(WWᵀ) ≤ λ + u/(1-u)·max A_ii + ‖ΔA‖ + ε‖W‖_F²``,
    where ``‖W‖_F² ≤ tr S/(1-ε)``. Underflow loses less than ``2⁻¹²⁶`` in a product and ``2⁻¹²⁶√λ`` in a quotient; sizes
    are refused outside of ``2^±12``, so that ``rows·columns·2⁻¹²⁰(1 + λ)`` makes up for all of it.
    """
    if not single_precision_serves(weight):
        return None
    matrix = weight.detach()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    if len(matrix) > _TO:
        return None
    with certified_arithmetic(matrix):
        gram = None
        for slack, enough in _ATTEMPTS:
            if gram is None or len(gram) > _WHOLE_TO:
                gram, relative = single_gram_matrix(matrix, min(_CHUNK, _ROUNDED // len(matrix)))
            squared = _squared_norm_bound(gram, relative, matrix.shape[1], slack, enough)
            if squared < math.inf:
                return enlarge(math.sqrt(squared))
    return None


def _squared_norm_bound(gram: Tensor, relative: float, columns: int, slack: float, enough: float) -> float:
    """A bound of ``‖W‖²``; infinity if sizes are extreme, there is no estimate, or no factorisation so far above it.

    Proof: :func:`single_precision_norm`. A Gram matrix that is large is overwritten.
    """
    squares = float(gram.diagonal().sum(dtype=torch.float64)) / (1.0 - relative)
    # A NaN or an infinity fails the comparison as well.
    if not 2.0**-24 <= squares <= 2.0**24:
        return math.inf
    estimate = 0.0
    for estimate, residual in ritz_values(gram):
        if residual <= enough * estimate:
            break
    level = single_number(estimate * (1.0 + slack))
    if not 0.0 < level < math.inf:
        return math.inf
    rows = len(gram)
    shifted = gram.neg() if rows <= _WHOLE_TO else gram.neg_()
    shifted.diagonal().add_(level)
    diagonal = shifted.diagonal().double()
    sizes = diagonal.abs()
    largest, rounding = float(sizes.max()), float(sizes @ _relative_errors(rows))
    if not _factorised(shifted):
        return math.inf
    bound = level + 2.0 * SINGLE_UNIT * largest + rounding
    bound += relative * squares + rows * columns * 2.0**-120 * (1.0 + level)
    return enlarge(bound, rows + 16)


@functools.lru_cache(maxsize=32)
def _relative_errors(rows: int) -> Tensor:
    """``c_j/(1 - c_j)`` of :func:`_factorised`."""
    terms = range(4, rows + 4) if rows <= _WHOLE_TO else [_BLOCK + -(-rows // _BLOCK) + 2] * rows
    errors = [product_error(count) for count in terms]
    return torch.tensor([error / (1.0 - error) for error in errors], dtype=torch.float64, device="cpu")


def _factorised(matrix: Tensor) -> bool:
    """Whether Cholesky runs to completion on a float32 matrix, which it overwrites if it is large.

    Args:
        matrix: Shape (r, r), ``A``; the lower triangle is read.

    Guarantee: if so, there is ``R`` with ``RᵀR = A + ΔA`` and ``‖ΔA‖ ≤ Σ_j c_j/(1 - c_j)·A_jj`` for the numbers of
    :func:`_relative_errors`. Entry ``i ≤ j`` of a matrix that is factorised at once is a sum of i products and a term,
    in any order, then divided by a number, perhaps through its inverse, or its root: ``|ΔA_ij| ≤ c_i Σ_k|R_ki||R_kj|``
    with ``c_i = γ_{i+3}`` (Higham 2002, Lemma 8.4 and Theorem 10.3). Larger ones are factorised by blocks, so that sums
    are short: what reaches an entry of block row I from the block rows before are products of b terms each, computed
    apart (error ``γ_b``) and subtracted one by one (``γ_{r/b}``); within the block, b more terms and a division or root
    (``γ_{b+1}``): ``c_i = γ_{b + r/b + 2}`` for all. As ``c_i ≤ √(c_i c_j)``, ``|ΔA| ≤ |S|ᵀ|S|`` where ``S`` has the
    columns ``√c_j R_j``, so that ``‖ΔA‖ ≤ Σ_j c_j‖R_j‖²``, and ``‖R_j‖² ≤ A_jj + c_j‖R_j‖²``.
    """
    size = len(matrix)
    block = size if size <= _WHOLE_TO else _BLOCK
    for first in range(0, size, block):
        last = min(first + block, size)
        factor, info = torch.linalg.cholesky_ex(matrix[first:last, first:last])
        if int(info) != 0 or not float(factor.diagonal().amin()) > 0.0:
            return False
        if last == size:
            break
        solved = torch.linalg.solve_triangular(factor, matrix[last:, first:last].mT, upper=False)
        for top in range(last, size, 2 * block):
            below = min(top + 2 * block, size)
            matrix[top:below, last:below].sub_(solved[:, top - last : below - last].mT @ solved[:, : below - last])
    return True
