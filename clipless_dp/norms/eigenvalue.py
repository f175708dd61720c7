"""Certified upper bounds of the largest eigenvalue of Gram matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from clipless_dp.norms.budget import Effort
from clipless_dp.norms.gram import frobenius_bound, gram_iteration_bound
from clipless_dp.norms.rounding import UNIT, enlarge, gamma

_LANCZOS_FROM = 160
"""Above this size a Lanczos estimate is cheaper than all eigenvalues (measured on one CPU core)."""

_HALVED_FROM = 256
"""From this size on a factorisation by halves is faster (measured on one CPU core)."""

_SMALL_ENTRIES = 1 << 15
"""Entries of all matrices together up to which factorising all costs less than choosing (measured likewise)."""

_DENSE_TO = 20
"""Rows up to which a tridiagonal matrix is treated as any other in less time (measured likewise)."""

_ROUNDS = 48


def largest_eigenvalue_bound(grams: Tensor, effort: Effort, floor: float = 0.0) -> float:
    """Upper bound of the largest eigenvalue over a batch of positive semidefinite matrices.

    Args:
        grams: Shape (batch, r, r), float64 or complex128: computed Gram matrices, Hermitian up to rounding.
        effort: How tight the bound should be and whether to factorise.
        floor: A bound that the caller already holds for other matrices: nothing below it is worth work.

    Returns:
        A number `b >= floor` with `λ_max(S) <= b` for every matrix of the batch, where `S` is Hermitian and
        each of its entries is one that was given, or the mean of one and its mirror image's conjugate. The
        caller adds the distance between `S` and the exact Gram matrix.

    Formula: few small matrices are checked by :func:`cholesky_certifies` at once, at a level a little above an
    estimate of the largest eigenvalue. Of others, first what can be read off the entries (:func:`trace_bounds`);
    those that it leaves loose are checked. The estimate comes from below (Lanczos, or LAPACK's
    eigenvalues of a few matrices) and only guides: too low a level fails the check and is raised.

    Guarantee: each matrix of the batch is covered by a trace bound, by a completed factorisation, or by
    :func:`~clipless_dp.norms.gram.gram_iteration_bound`; the result is the largest of these.
    """
    size = grams.shape[-1]
    if size == 1:
        return max(floor, float(grams.real.max()))
    slack = 2.0 * effort.tolerance
    if effort.factorise and grams.numel() <= _SMALL_ENTRIES and size < _LANCZOS_FROM:
        estimate = _small_estimate(grams)
        for _ in range(2):
            # A floor that the estimate does not pass may cover all as it is.
            level = floor if floor > estimate else estimate * (1.0 + (slack if len(grams) > 1 else min(slack, 1e-9)))
            if not 0.0 < level < math.inf:
                break
            certain = cholesky_certifies(grams.clone(), level)
            bound = enlarge(level * (1.0 + size * gamma(size)))
            if bool(certain.all()):
                return bound
            # Those that are left are few, and one of them has the largest eigenvalue.
            floor, grams = bound, grams[~certain]
            estimate = float(torch.linalg.eigvalsh(grams).max())
    upper, lower = trace_bounds(grams)
    if not effort.factorise:
        return max(floor, float(upper.max()))
    # The slack is added to what these matrices reach, never to the floor: of many batches, one after the other, each
    # would raise the bound by it.
    reached = float(lower.max())
    loose = upper > max(floor, reached * (1.0 + slack))
    bound = max(floor, float(torch.where(loose, 0.0, upper).max()))
    pending = torch.nonzero(loose).flatten()
    if pending.numel() == 0:
        return bound
    if 0.0 < floor < math.inf and floor >= reached:
        # Most of many batches are covered by what an earlier one needed, and no estimate is.
        pending = pending[~cholesky_certifies(grams[pending], floor)]
        bound = max(bound, floor * (1.0 + size * gamma(size)))
        if pending.numel() == 0:
            return enlarge(bound)
        reached = floor
    pending = pending[torch.argsort(upper[pending], descending=True)]
    ceiling = float(upper[pending[0]])

    probes = 1
    level = 0.0
    for attempt in range(_ROUNDS):
        candidates = grams[pending[:probes]]
        if size >= _LANCZOS_FROM and len(grams) == 1 and attempt < 2:
            tolerance = slack * 0.01**attempt
            single = torch.complex64 if grams.is_complex() else torch.float32
            guide = candidates[0].to(single) if tolerance > 1e-5 else candidates[0]
            estimate, step = lanczos_estimate(guide, tolerance), slack
        else:
            estimate = float(torch.linalg.eigvalsh(candidates).max())
            step = slack if len(grams) > 1 else min(slack, 1e-9)
        # The last term makes progress certain where the estimate cannot exceed the failed level.
        level = max(bound, max(reached, estimate) * (1.0 + step))
        if attempt:
            level = max(level, reached * (1.0 + slack * 2.0 ** (attempt - 10)))
        if level >= ceiling:
            return max(bound, ceiling)
        pending = pending[~cholesky_certifies(grams[pending], level)]
        reached = level
        if pending.numel() == 0:
            break
        probes = min(4 * probes, 16)
    else:
        bound = max(bound, float(gram_iteration_bound(grams[pending]).max()))
    # Proof in cholesky_certifies.
    return enlarge(max(bound, level * (1.0 + size * gamma(size))))


def trace_bounds(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the largest eigenvalue that need the traces of S and S² only, and a lower guide.

    Args:
        grams: Shape (batch, r, r) as in :func:`largest_eigenvalue_bound`, contiguous. Its diagonal is changed
            for a while and restored bit by bit.

    Returns:
        `upper`, certified, and `lower`, a guide without certificate; float64 of shape (batch,).

    Formula: with `a` near `tr(S)/r`, `D = S - aI` and `τ = tr(D)`,
    `λ_max(S) ≤ a + τ/r + √((r-1)/r)·‖D‖_F`. It is exact for multiples of the identity (so it is the
    orthogonality residual bound, rescaled) and for rank one, and never above the Frobenius norm. From
    below, `λ_max ≥ tr(S²)/tr(S)` and every diagonal entry.

    Source: H. Wolkowicz and G. P. H. Styan, "Bounds for eigenvalues using traces", Linear Algebra and its
    Applications 29 (1980), Theorem 2.1.

    Guarantee: for eigenvalues `μ_i` of `D` with mean `τ/r`, Cauchy–Schwarz on the other r-1 gives
    `(μ_1 - τ/r)² ≤ (r-1)/r · Σ(μ_i - τ/r)² ≤ (r-1)/r · ‖D‖_F²`. Taking all entries means that `S` is the
    Hermitian part, whose `‖D‖_F` is not larger. Roundings: `‖D‖_F` is a sum of r² (complex: 2r²) squares,
    relative error at most `γ_{2r²}`; the subtraction on the diagonal errs by at most `u·max|S_ii|` per
    entry and `τ` by `γ_r·Σ|D_ii|`; `gamma(2r)` times the trace exceeds both.
    """
    size = grams.shape[-1]
    diagonal = grams.diagonal(dim1=-2, dim2=-1).real
    trace = diagonal.abs().sum(-1)
    centre = diagonal.mean(-1)
    shifted = diagonal - centre[:, None]
    drift = shifted.mean(-1)
    # A copy would cost as much as the sums, so the diagonal is lent out and put back.
    kept = diagonal.clone()
    diagonal.copy_(shifted)
    spread = frobenius_bound(grams)
    diagonal.copy_(kept)
    shrink = (1.0 - 1.0 / size) ** 0.5
    upper = (centre + drift.abs() + shrink * spread) * (1.0 + gamma(0)) + gamma(2 * size) * trace
    square = spread.square() + size * centre.square()
    lower = torch.maximum(square / trace.clamp_min(5e-324), diagonal.amax(-1))
    return upper, torch.where(trace > 0.0, lower, 0.0)


def _small_estimate(grams: Tensor) -> float:
    """A guess, from below, of the largest eigenvalue over a batch of small matrices. It guides and never certifies.

    The Frobenius norm of its eighth power says which matrix it may be in, LAPACK its eigenvalues.
    """
    chosen = 0
    if len(grams) > 1:
        powers = grams.to(torch.complex64 if grams.is_complex() else torch.float32)
        for _ in range(3):
            powers = powers @ powers
        entries = torch.view_as_real(powers) if powers.is_complex() else powers
        chosen = int(torch.linalg.vector_norm(entries.flatten(1), dim=1, dtype=torch.float64).nan_to_num().argmax())
    return float(torch.linalg.eigvalsh(grams[chosen])[-1])


def cholesky_certifies(grams: Tensor, level: float) -> Tensor:
    """Whether `level·I - S` factorises, which proves `λ_max(S) <= level·(1 + r·8(r+4)u)`.

    Args:
        grams: Shape (batch, r, r); the lower triangle is read. Overwritten, which saves a copy.
        level: A positive number, at least every diagonal entry's size up to rounding.

    Returns:
        Boolean tensor of shape (batch,).

    Source: N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., Theorem 10.3; the use
    as a proof of definiteness is S. M. Rump, "Verification of positive definiteness", BIT 46 (2006), §2.

    Guarantee: let `A = fl(level·I - S)`. If Cholesky runs to completion, its factor satisfies
    `R^H R = A + ΔA` with `|ΔA| ≤ γ_{r+1}|R|ᴴ|R|`, whatever the order of the sums. So `‖ΔA‖ ≤
    γ_{r+1}‖R‖_F²`, and `‖R‖_F² = tr(A + ΔA)` gives `‖R‖_F² ≤ tr(A)/(1-γ_{r+1}) ≤
    r·level·(1+u)/(1-γ_{r+1})`. As `R^H R ⪰ 0`, `A ⪰ -‖ΔA‖`, and with the diagonal's rounding, at most
    `2u·level`, `λ_max(S) ≤ level + ‖ΔA‖ + 2u·level ≤ level·(1 + r·8(r+4)u)`. The factor 8 covers complex
    arithmetic and diagonal entries that rounding made slightly negative.
    """
    shifted = grams.neg_()
    shifted.diagonal(dim1=-2, dim2=-1).add_(level)
    return _factorises(shifted)


def _factorises(matrices: Tensor) -> Tensor:
    """Whether Cholesky runs to completion, for each matrix of a batch.

    A large matrix is halved: with `A₁₁ = L₁L₁ᵀ` and `X = L₁⁻¹A₁₂`, what is left is `A₂₂ - XᵀX`. These are the same sums
    in another order, and a third of the time of LAPACK's own blocking.
    """
    size = matrices.shape[-1]
    halved = size >= _HALVED_FROM and len(matrices) == 1
    half = size // 2 if halved else size
    factor, info = torch.linalg.cholesky_ex(matrices[:, :half, :half])
    certain: Tensor = (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).real.amin(-1) > 0.0)
    if not (halved and bool(certain)):
        return certain
    solved = torch.linalg.solve_triangular(factor, matrices[:, half:, :half].mH, upper=False)
    return _factorises(matrices[:, half:, half:] - solved.mH @ solved)


def lanczos_estimate(gram: Tensor, tolerance: float) -> float:
    """A guess of the largest eigenvalue of one Hermitian matrix, from below but for rounding: a guide, no certificate.

    Args:
        gram: Shape (r, r), float64 or complex128, or of half the precision where that is enough for the tolerance.
        tolerance: Relative residual at which to stop, or twenty times the relative change of the estimate.
    """
    estimate = 0.0
    for latest, residual in ritz_values(gram):
        if latest <= estimate * (1.0 + 0.05 * tolerance) or residual <= tolerance * latest:
            return max(latest, estimate)
        estimate = latest
    return estimate * (1.0 + UNIT)


def ritz_values(gram: Tensor) -> Iterator[tuple[float, float]]:
    """Larger and larger guesses of the largest eigenvalue of one Hermitian matrix, from below but for rounding.

    Args:
        gram: Shape (r, r), real or complex.

    Returns:
        Pairs of an estimate and the norm of its residual: some eigenvalue is that close, mostly the largest. They end
        where nothing but rounding is left of the vectors, or squares of tiny ones underflow.

    Formula: the Lanczos recurrence without reorthogonalisation (a copy of a converged Ritz value does no
    harm to the maximum), from a fixed start so that the same weight always gets the same bound.
    """
    size = gram.shape[-1]
    vector = gram @ _start(size, gram.dtype, gram.device)
    vector = vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(gram.dtype).tiny)
    previous = torch.zeros_like(vector)
    rounding = size * torch.finfo(gram.dtype).eps
    beta, exhausted = 0.0, False
    alphas: list[float] = []
    betas: list[float] = []
    for target in (12, 18, 27, 40, 60, 90, 135):
        while len(alphas) < min(target, size) and not exhausted:
            image = torch.addmv(previous, gram, vector, beta=-beta)
            alpha = float(torch.vdot(vector, image).real)
            image.add_(vector, alpha=-alpha)
            # Twice: where little is left of it, rounding of the first time would be most of that.
            image.add_(vector, alpha=-torch.vdot(vector, image).item())
            beta = float(torch.linalg.vector_norm(image))
            if not math.isfinite(alpha + beta):
                return
            alphas.append(alpha)
            betas.append(beta)
            exhausted = beta <= rounding * max(alphas) or len(alphas) == size
            previous, vector = vector, image if exhausted else image.div_(beta)
        value, slope = _tridiagonal_top(alphas, betas)
        yield value, beta / math.sqrt(slope)
        if exhausted:
            return


@functools.lru_cache(maxsize=32)
def _start(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    steps = torch.arange(size, dtype=dtype.to_real(), device=device)
    return torch.cos(steps * steps).to(dtype)


def _tridiagonal_top(alphas: list[float], betas: list[float]) -> tuple[float, float]:
    """The largest eigenvalue of a symmetric tridiagonal matrix, and one over its vector's last entry squared.

    Args:
        alphas: Diagonal.
        betas: Beside it; the last one is not read.
    """
    last = len(alphas) - 1
    if last < _DENSE_TO:
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], -1))
        return float(values[-1]), 1.0 / max(float(vectors[-1, -1]) ** 2, 1e-300)
    values, vectors = eigh_tridiagonal(
        np.asarray(alphas), np.asarray(betas[:-1]), select="i", select_range=(last, last), check_finite=False
    )
    return float(values[0]), 1.0 / max(float(vectors[-1, 0]) ** 2, 1e-300)
