"""How far many Hermitian matrices lie above and below zero, from float32 factorisations with their rounding."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clipless_dp.norms.eigenvalue import ritz_values
from clipless_dp.norms.rounding import SINGLE_UNIT, enlarge, product_error, single_number
from clipless_dp.precision import coarse_products

_TO = 512
"""Rows up to which the rounding stays below a twentieth of what it is added to."""

_ABOVE = 0.1
"""How much of a guess is added to it: eigenvalues at other frequencies differ by a few per cent."""

_LEAST = 1e-3
"""The same, at least: float32 hides where the eigenvalue is."""

_PROBES = 16
"""Matrices whose largest eigenvalues are guessed at once, at most; fewer at first."""

_ATTEMPTS = 6
"""Levels that are tried before Frobenius norms are believed."""


def single_deviations_serve(rows: int, device: torch.device) -> bool:
    """Whether float32 factorisations are what the proof here assumes, and tight."""
    return rows <= _TO and device.type == "cpu" and coarse_products(device) is None


def single_rounding(rows: int) -> float:
    """How much of ``tr A`` the rounding of :func:`single_extremes` is at most, where no diagonal entry is special."""
    return product_error((3 * rows + 19) // 2)


def single_extremes(batches: Iterable[Tensor], slack: float, signs: Sequence[float] = (1.0, -1.0)) -> tuple[float, ...]:
    """How far the eigenvalues of all matrices reach above and below zero, at most.

    Args:
        batches: Tensors of shape (batch, r, r), complex64 or float32: Hermitian up to rounding, diagonals real.
        slack: How far above a guess of either reach its bound may lie, at most.
        signs: 1 for what lies above, -1 for what lies below.

    Returns:
        ``p`` and ``q`` with ``-q ≤ λ ≤ p`` for every eigenvalue ``λ`` of every ``H``, where ``H`` is Hermitian and each
        of its entries is one that was given, or the mean of one and its mirror image's conjugate; or what is asked for.

    Formula: of matrices whose Frobenius norm is above a level ``t``, ``tI - H`` (and ``tI + H``) is factorised by
    Cholesky. ``t`` is a guess by Lanczos, which fails where it is too low and is raised.

    Source: as :func:`~clipless_dp.norms.eigenvalue.cholesky_certifies`.

    Guarantee: a Frobenius norm bounds both reaches, and that of all given entries bounds that of their Hermitian part;
    its sum of ``n`` squares errs by ``γ_n`` and less than ``2⁻⁶²`` an entry where squares underflow. Let ``A`` be the
    computed ``tI - H``, off by ``u|A_ii|/(1-u)`` on the diagonal. If Cholesky runs to completion, ``RᴴR = A + ΔA`` with
    ``|ΔA_ij| ≤ c_ij Σ_k|R_ki||R_kj|``: real and imaginary part of an entry are sums of at most ``2m`` products and a
    term, ``m = min(i, j)``, then divided by a real number, perhaps through its inverse; each errs by ``γ_{2m+4}`` of
    ``Σ|a||b|`` in any order (Higham 2002, Lemma 8.4 and Theorem 10.3), both together by √2 as much, so that ``c_ij =
    γ_{3m+8}`` is enough. As ``c_ij ≤ √(c_ii c_jj)``, ``|ΔA| ≤ |S|ᴴ|S|`` where ``S`` has the columns ``√c_jj R_j``, so
    ``‖ΔA‖ ≤ ‖S‖_F² = Σ_j c_jj‖R_j‖² ≤ Σ_j c_jj/(1 - c_jj)·A_jj``. Hence ``λ ≤ t + Σ_j c_jj/(1 - c_jj)·A_jj + 2u·max
    A_ii``. Underflow loses less than ``2⁻¹²⁶``
    in a product and ``2⁻¹²⁶√t`` in a quotient, for which ``r²·2⁻¹¹⁰(1 + t)`` makes up.
    """
    levels, rounding = [0.0] * len(signs), [0.0] * len(signs)
    for batch in batches:
        norms = _frobenius_bounds(batch)
        for side, sign in enumerate(signs):
            levels[side], lost = _covered(batch, norms, sign, levels[side], slack)
            rounding[side] = max(rounding[side], lost)
    return tuple(enlarge(level + lost, 8) for level, lost in zip(levels, rounding, strict=True))


def _covered(batch: Tensor, norms: Tensor, sign: float, level: float, slack: float) -> tuple[float, float]:
    """A level, no lower than the one given, that no eigenvalue of ``sign·H`` passes by more than the second number."""
    relative = _relative_errors(batch.shape[-1]).to(batch.device)
    lost = 0.0
    for attempt in range(_ATTEMPTS):
        # A NaN is covered by nothing.
        pending = ~(norms <= level)
        batch, norms = batch[pending], norms[pending]
        if len(norms) == 0:
            return level, lost
        if level == 0.0 or attempt:
            likely = norms.argsort(descending=True)[: min(4**attempt, _PROBES)]
            size = float(norms[likely[0]])
            guess = max(_guess(sign * batch[k], float(norms[k]), slack) for k in likely.tolist())
            more = max(min(slack, _ABOVE * guess), _LEAST * abs(guess))
            # One of the others is largest where the guess does not raise the level.
            raised = max(guess + more, level + 2.0**attempt * more if attempt else 0.0)
            tried = size if size <= slack else min(size, raised)
            level = max(level, single_number(tried * (1.0 + 4.0 * SINGLE_UNIT)))
        shifted = batch * -sign
        shifted.diagonal(dim1=-2, dim2=-1).add_(level)
        diagonal = shifted.diagonal(dim1=-2, dim2=-1).real.double().abs()
        beyond = diagonal @ relative + 2.0 * SINGLE_UNIT * diagonal.amax(-1)
        beyond += batch.shape[-1] ** 2 * 2.0**-110 * (1.0 + level)
        factor, info = torch.linalg.cholesky_ex(shifted)
        certain = (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).real.amin(-1) > 0.0)
        lost = max(lost, float(torch.where(certain, beyond, 0.0).max()))
        norms = torch.where(certain, 0.0, norms)
    largest = float(norms.max())
    return single_number(max(largest, level) * (1.0 + 4.0 * SINGLE_UNIT)) if math.isfinite(largest) else math.inf, lost


@functools.lru_cache(maxsize=32)
def _relative_errors(rows: int) -> Tensor:
    """``c_jj/(1 - c_jj)`` of :func:`single_extremes`."""
    errors = [product_error(3 * (row + 1) + 8) for row in range(rows)]
    return torch.tensor([error / (1.0 - error) for error in errors], dtype=torch.float64, device="cpu")


def _frobenius_bounds(batch: Tensor) -> Tensor:
    """Upper bounds of Frobenius norms, from float32 sums, float64 of shape (batch,)."""
    entries = (torch.view_as_real(batch) if batch.is_complex() else batch).flatten(1)
    relative = product_error(entries.shape[1] + 4)
    norms: Tensor = torch.linalg.vector_norm(entries, dim=1).double() * (1.0 + 2.0 * relative)
    return norms + math.sqrt(entries.shape[1]) * 2.0**-62


def _guess(matrix: Tensor, size: float, slack: float) -> float:
    """A guess of the largest eigenvalue of a Hermitian matrix of about this norm, from below: certifies nothing."""
    # Without negative eigenvalues, as Lanczos is stopped by comparison with the largest.
    matrix.diagonal().add_(size)
    estimate = 0.0
    for latest, residual in ritz_values(matrix):
        if residual <= 0.1 * slack or latest <= estimate + 0.01 * slack:
            return max(latest, estimate) - size
        estimate = latest
    return max(estimate - size, 0.0)
