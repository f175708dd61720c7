"""Gram iteration with its rounding inside the bound: products only, no factorisation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clipless_dp.norms.rounding import gamma, product_error


def gram_iteration_bound(matrices: Tensor, rounds: int = 6) -> Tensor:
    """Upper bound of the operator norm of each matrix of a batch, by repeated squaring.

    Args:
        matrices: Shape (batch, rows, columns), float64 or complex128, entries below 1e100 in size.
        rounds: Number of squarings; each halves the logarithm of the slack, which starts below
            `½·log(rank)`.

    Returns:
        Float64 tensor of shape (batch,).

    Formula: `H₀ = M`, `H_{t+1} = H_t H_tᴴ`; then `‖H_t‖² = ‖H_{t+1}‖` and `‖H_T‖ ≤ ‖H_T‖_F` give
    `‖M‖ ≤ ‖H_T‖_F^(2^-T)`. Every `H_t` is first divided by a power of two, which is exact.

    Source: T. Delattre et al., "Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
    Iteration", ICML 2023; the treatment of rounding is added here.

    Guarantee: the computed `Ĝ = fl(H Hᴴ)` satisfies `|Ĝ - H Hᴴ| ≤ γ_n |H||H|ᵀ` entry by entry, whose
    operator norm is at most `γ_n‖H‖_F²`. Hence `‖H‖² ≤ ‖Ĝ‖ + γ_n‖H‖_F²`, which is unwound from the last
    round to the first with `γ_n` enlarged to `8(n+4)u`. The unwinding's own roundings (a sum, a root) are
    two of those that the 4 and the 8 leave room for, because `n‖H‖_F² ≥ ‖H‖²`. Without this term float32
    and even float64 Gram iteration can end below the norm.
    """
    current = matrices
    levels: list[tuple[Tensor, Tensor]] = []
    for _ in range(rounds):
        current, exponent = _unit_scale(current)
        slack = gamma(current.shape[-1]) * frobenius_bound(current).square()
        levels.append((exponent, slack))
        current = current @ current.mH
    bound = frobenius_bound(current)
    for exponent, slack in reversed(levels):
        bound = torch.ldexp((bound + slack).sqrt(), exponent)
    return bound


def _unit_scale(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Divides each matrix by the power of two that brings its largest entry into [1/2, 1)."""
    largest = _entries(matrices).abs().amax(-1)
    exponent = torch.frexp(largest)[1]
    return matrices * torch.ldexp(torch.ones_like(largest), -exponent)[:, None, None], exponent


_BLOCKED_FROM = 160
"""Rows from which half of a Gram matrix costs less than all of it (measured on one CPU core)."""

_BLOCK_ROWS = 128
_WIDE_FROM = 1024
"""Rows from which narrower products pay: what they are added to stays in the processor's cache."""

_CHUNK_COLUMNS = 392
"""Columns that are converted to float64 at once."""


def gram_matrix(matrices: Tensor) -> Tensor:
    """`M Mᵀ` of each matrix of a batch, in float64.

    Args:
        matrices: Shape (batch, rows, columns), real, of any floating-point type.

    Returns:
        Float64, shape (batch, rows, rows); symmetric up to rounding.

    Guarantee: entries are sums of exact conversions' products in some order, so the computed matrix errs by at most
    `γ_n|M||M|ᵀ` entry by entry, n being the number of columns. Large matrices are multiplied block by block below
    the diagonal only, and mirrored, after converting a part of the columns at a time.
    """
    batch, rows, columns = matrices.shape
    if batch != 1 or rows < _BLOCKED_FROM:
        exact = matrices.double()
        return exact @ exact.mT
    gram = torch.empty(rows, rows, dtype=torch.float64, device=matrices.device)
    for first, last in _spans(columns, _CHUNK_COLUMNS):
        part = matrices[0, :, first:last].double()
        for top, below in _spans(rows, _BLOCK_ROWS):
            block, left, right = gram[top:below, :below], part[top:below], part[:below].mT
            if first == 0:
                torch.mm(left, right, out=block)
            else:
                block.addmm_(left, right)
    return _mirrored_(gram, _BLOCK_ROWS)[None]


def single_gram_matrix(matrix: Tensor, chunk: int) -> tuple[Tensor, float]:
    """`M Mᵀ` in float32, and its relative error: for half of the time and of the memory of :func:`gram_matrix`.

    Args:
        matrix: Shape (rows, columns), float32.
        chunk: Columns that one product takes: fewer are slower and err less.

    Returns:
        Float32, shape (rows, rows), symmetric up to rounding, and `ε` with `‖Ĝ - MMᵀ‖ ≤ ε‖M‖_F²` for the computed
        `Ĝ`, and `|Ĝ_ii - (MMᵀ)_ii| ≤ ε(MMᵀ)_ii`, as long as nothing underflows.

    Guarantee: a product of k columns errs by `γ_k|M||M|ᵀ` over these columns, in any order, with or without fused
    multiply-add (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., §3.1 and §3.5); adding m of them
    up one by one by `γ_{m-1}` of their sizes (§4.2). Together `γ_{k+m-1}|M||M|ᵀ`, and `‖|M||M|ᵀ‖ ≤ ‖M‖_F²`. Each
    product is computed apart and added afterwards: accumulated by the library it would err by `γ_n`.
    """
    rows, columns = matrix.shape
    gram = torch.empty(rows, rows, dtype=matrix.dtype, device=matrix.device)
    spans = _spans(columns, chunk)
    high, wide = (_BLOCK_ROWS, rows) if rows <= _WIDE_FROM else (2 * _BLOCK_ROWS, 4 * _BLOCK_ROWS)
    for top, below in _spans(rows, high):
        for start, stop in _spans(below, wide):
            block = gram[top:below, start:stop]
            for first, last in spans:
                left, right = matrix[top:below, first:last], matrix[start:stop, first:last].mT
                if first == 0:
                    torch.mm(left, right, out=block)
                else:
                    block += left @ right
    return _mirrored_(gram, high), product_error(spans[0][1] + len(spans) - 1)


def sizes_gram_bound(matrix: Tensor) -> float:
    """Upper bound of `‖|M||M|ᵀ‖` for the sizes `|M|` of a float32 matrix's entries, up to underflow.

    `‖M‖_F²` bounds it too, and is half as large again for entries that are spread like normal ones.

    Formula: the largest row sum of `|M||M|ᵀ`, which is symmetric, `|M|(|M|ᵀ1)`.

    Guarantee: all terms are positive, so that the two sums err by `γ_rows` and `γ_columns` of themselves, in any order.
    """
    rows, columns = matrix.shape
    parts = matrix.split(_BLOCK_ROWS)
    sums = functools.reduce(torch.add, [part.abs().sum(0) for part in parts])
    largest = max(float((part.abs() @ sums).amax()) for part in parts)
    return largest * (1.0 + 2.0 * (product_error(rows + 4) + product_error(columns + 4)))


def _mirrored_(gram: Tensor, high: int) -> Tensor:
    """Copies the blocks below the diagonal, of so many rows at most, to those above it."""
    for top, below in _spans(len(gram), high):
        gram[:top, top:below] = gram[top:below, :top].mT
    return gram


def _spans(length: int, most: int) -> list[tuple[int, int]]:
    """Cuts 0..length into equal parts, the last one perhaps shorter, of at most so many."""
    parts = -(-length // most)
    step = -(-length // max(1, parts))
    return [(first, min(first + step, length)) for first in range(0, length, max(1, step))]


def frobenius_bound(matrices: Tensor) -> Tensor:
    """Frobenius norm of each matrix of a batch, enlarged by the rounding of its sum of squares."""
    norms: Tensor = torch.linalg.vector_norm(_entries(matrices), dim=-1)
    return norms * (1.0 + gamma(2 * matrices.shape[-2] * matrices.shape[-1]))


def _entries(matrices: Tensor) -> Tensor:
    """Real entries of each matrix as one row, which torch reduces far faster than a complex matrix."""
    real = torch.view_as_real(matrices.contiguous()) if matrices.is_complex() else matrices
    return real.flatten(1)
