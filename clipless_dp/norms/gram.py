"""Gram iteration with its rounding inside the bound: products only, no factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from clipless_dp.norms.rounding import gamma


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


_TALL_FROM = 256
"""Rows from which half of a Gram matrix costs less than all of it (measured on one CPU core)."""

_CHUNK_COLUMNS = 512
"""Columns that are converted to float64 at once."""


def gram_matrix(matrices: Tensor) -> Tensor:
    """`M Mᵀ` of each matrix of a batch, in float64.

    Args:
        matrices: Shape (batch, rows, columns), real, of any floating-point type.

    Returns:
        Float64, shape (batch, rows, rows); exactly symmetric for a batch of one.

    Guarantee: entries are sums of exact conversions' products in some order, so the computed matrix errs by at most
    `γ_n|M||M|ᵀ` entry by entry, n being the number of columns. Large matrices are multiplied block by block below
    the diagonal only, and mirrored, after converting a part of the columns at a time.
    """
    batch, rows, columns = matrices.shape
    if batch != 1 or rows < _TALL_FROM:
        exact = matrices.double()
        return exact @ exact.mT
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=matrices.device)
    step = -(-rows // 4)
    for first in range(0, columns, _CHUNK_COLUMNS):
        part = matrices[0, :, first : first + _CHUNK_COLUMNS].double()
        for top in range(0, rows, step):
            below = top + step
            gram[top:below, :below].addmm_(part[top:below], part[:below].mT)
    lower = gram.tril(-1)
    return (gram.tril_().add_(lower.mT))[None]


def frobenius_bound(matrices: Tensor) -> Tensor:
    """Frobenius norm of each matrix of a batch, enlarged by the rounding of its sum of squares."""
    norms: Tensor = torch.linalg.vector_norm(_entries(matrices), dim=-1)
    return norms * (1.0 + gamma(2 * matrices.shape[-2] * matrices.shape[-1]))


def _entries(matrices: Tensor) -> Tensor:
    """Real entries of each matrix as one row, which torch reduces far faster than a complex matrix."""
    real = torch.view_as_real(matrices.contiguous()) if matrices.is_complex() else matrices
    return real.flatten(1)
