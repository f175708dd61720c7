"""The orthogonality constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.errors import ConfigurationError, NormError
from clipless_dp.norms.dense import dense_norm
from clipless_dp.norms.eigenvalue import trace_bounds
from clipless_dp.norms.gram import gram_matrix
from clipless_dp.norms.operators import DenseOperator, Operator
from clipless_dp.norms.rounding import certified_arithmetic, exact_float64, gamma
from clipless_dp.precision import coarse_products

_SMALLEST_LIMIT = 1e-20
"""Below it, and above its inverse, entries of a scaled weight may leave the range of float32."""


class Orthogonal(Constraint):
    """Moves a weight towards the nearest semi-orthogonal matrix, then divides by the certified norm that is left.

    Björck's iteration ``W ← W(3I - WᵀW)/2`` (Björck and Bowie 1971) maps singular values in (0, √3) towards 1. It
    is started from the weight itself, which after a small step is nearly orthogonal already, so that one iteration is
    mostly enough. A convolution's kernel is treated as the matrix ``c_out × c_in·k²`` of each group (reshaped-kernel
    orthogonalisation).

    Args:
        iterations: most Björck steps for each projection.
        limit: the largest operator norm, 1 by default.
        tangent: whether to project the noisy gradient on the tangent space of the semi-orthogonal matrices (the
            Stiefel manifold) at the weight. What it drops, noise above all, the projection after the step would
            undo to first order, but momentum and adaptive step sizes would remember. For an ``n × n`` weight it
            drops ``(n+1)/2n`` of the noise's energy, for a ``p × n`` one ``(p+1)/2n``, ``p`` the smaller side.

    Guarantee:
        The operator norm is at most ``limit``. For a dense weight Björck's last iteration is its own certificate
        (:func:`_last_step`); otherwise the last act is :class:`Spectral`'s division by a certified norm, whatever the
        iteration did. Orthogonality itself is approximate and no bound relies on it. The tangent
        projection costs no privacy: it is a function of the noisy gradient, once the noise is in it and the step is in
        the ledger, and of the weight, which earlier steps have released.

    Cost:
        Two products of a Gram matrix's size for each iteration: one iteration after a small step, where the root mean
        square of the eigenvalues of ``WᵀW - I`` is below 0.015, which it leaves below 0.0005; for kernels
        a certificate on top. Two more products for the tangent projection.
    """

    def __init__(self, iterations: int = 4, limit: float = 1.0, *, tangent: bool = False) -> None:
        super().__init__(limit)
        if iterations < 1:
            raise ConfigurationError(f"iterations must be at least 1, got {iterations}")
        self.iterations = iterations
        self.tangent = tangent

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place."""
        if not all(type(operator) is DenseOperator for operator in operators):
            self._orthogonalize_(weight, operators[0])
        elif self._orthogonalize_dense_(weight):
            return
        scale_to_limit_(weight, operators, self.limit)

    @torch.no_grad()
    def initialize_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Starts from the exact polar factor, which later projections only have to follow."""
        matrices = operators[0].matrix(exact_float64(weight))
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        weight.copy_((self.limit * (left @ right)).reshape(weight.shape))
        scale_to_limit_(weight, operators, self.limit)

    def holds(self, weight: Tensor, operators: tuple[Operator, ...]) -> bool:
        """As for any constraint; for a dense weight with a certificate as tight as what its projection leaves."""
        if all(type(operator) is DenseOperator for operator in operators):
            return dense_norm(weight, budget="tight") <= self.limit
        return super().holds(weight, operators)

    @torch.no_grad()
    def project_gradient_(self, gradient: Tensor, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects a noisy gradient on the tangent space, where ``tangent`` asks for it.

        ``P(Z) = Z - (ZVᵀ + VZᵀ)V/2`` for a weight with orthonormal rows ``V`` (transposed where columns are fewer than
        rows), the orthogonal projection on ``{Z: ZVᵀ + VZᵀ = 0}`` (Edelman, Arias and Smith, "The geometry of
        algorithms with orthogonality constraints", 1998, §2.2.1). ``V`` is the weight divided by the root mean square
        of its singular values, which for a kernel are far below the limit where windows overlap. ``P`` is linear, so
        that the sum and its noise are projected alike.
        """
        if self.tangent:
            frame, noisy = operators[0].matrix(weight), operators[0].matrix(gradient)
            gradient.copy_(tangent_step(frame / typical_size(frame), noisy).reshape(gradient.shape))

    def _orthogonalize_(self, weight: Tensor, operator: Operator) -> None:
        current = operator.matrix(weight) / self.limit
        current = current / overshoot(current)
        for _ in range(self.iterations):
            current = bjorck_step(current)
        weight.copy_((self.limit * current).reshape(weight.shape))

    def _orthogonalize_dense_(self, weight: Tensor) -> bool:
        """Björck's iterations on a dense weight, in place, and whether its norm is then at most the limit for certain.

        Raises:
            NormError: an entry is not finite.
        """
        wide = weight.shape[0] <= weight.shape[1]
        with certified_arithmetic(weight):
            current = ((weight if wide else weight.mT) / self.limit).contiguous()
            rows, columns = current.shape
            # Away from the ends of the range first. Dividing by a power of two rounds nothing.
            current *= 2.0 ** -max(0, math.frexp(_largest_entry(current))[1])
            for _ in range(self.iterations):
                gram = gram_matrix(current[None])[0]
                upper, squares = _largest_eigenvalue(gram, columns)
                error = gamma(columns) * squares
                if upper > 2.0:
                    # Beyond √3 the iteration would diverge, and next to it singular values collapse.
                    scale = math.sqrt(2.0 / min(upper, _near_identity(gram, error)))
                    if scale < 1.0:
                        current, gram, squares = current * scale, gram * scale**2, squares * scale**2
                        error += 4.0 * torch.finfo(current.dtype).eps * squares
                gram.diagonal().sub_(1.0)
                residual = float(torch.linalg.matrix_norm(gram))
                current, growth = _last_step(current, gram, residual, squares, error)
                if residual <= 0.015 * math.sqrt(rows):
                    break
            # A tight certificate, of 1e-9, must find the weight within the limit when it is loaded again.
            growth = max(growth, 1e-8)
            certain = growth < 0.01 and _SMALLEST_LIMIT < self.limit < 1.0 / _SMALLEST_LIMIT
            certain = certain and coarse_products(current.device) is None
            current = current.div_(1.0 + growth if certain else 1.0).mul_(self.limit)
            weight.copy_(current if wide else current.mT)
        return certain


def overshoot(matrices: Tensor) -> Tensor:
    """By how much each matrix may lie outside of the region where Björck's iteration converges, at least 1.

    Singular values above √3 diverge, and those next to it collapse. ``‖W‖⁴`` is at most ``‖G²‖_F`` with ``G = WᴴW``,
    and ``‖W‖²`` at most ``1 + ‖(G - I)²‖_F^½``, which is the smaller one near orthogonality. Where both allow for
    ``‖W‖² > 2`` the excess is taken from the smaller one.

    Args:
        matrices: ``(..., rows, columns)``, real or complex.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mH
    # Large weights are brought to this size first: their fourth powers would overflow.
    size = typical_size(matrices).clamp(min=1.0)
    gram = (matrices / size).mH @ (matrices / size)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    residual = (gram - identity) @ (gram - identity)
    whole = torch.linalg.matrix_norm(residual + 2.0 * gram - identity, keepdim=True).sqrt()
    beyond = 1.0 + torch.linalg.matrix_norm(residual, keepdim=True).sqrt()
    return size * (torch.minimum(whole, beyond) / 2.0).clamp(min=1.0).sqrt()


def bjorck_step(matrices: Tensor) -> Tensor:
    """``W ← W(3I - WᴴW)/2``, for ``(..., rows, columns)``, real or complex."""
    if matrices.shape[-2] < matrices.shape[-1]:
        return bjorck_step(matrices.mH).mH
    return 1.5 * matrices - 0.5 * matrices @ (matrices.mH @ matrices)


def tangent_step(frames: Tensor, noisy: Tensor) -> Tensor:
    """``Z - (ZVᴴ + VZᴴ)V/2``: drops the part of ``Z`` that is normal to the semi-orthogonal matrices at ``V``.

    Args:
        frames: ``V``, ``(..., rows, columns)``, with orthonormal rows (or columns, where these are fewer).
        noisy: ``Z``, of the same shape.
    """
    if frames.shape[-2] > frames.shape[-1]:
        return tangent_step(frames.mH, noisy.mH).mH
    inner = noisy @ frames.mH
    kept: Tensor = noisy - 0.5 * (inner + inner.mH) @ frames
    return kept


def typical_size(matrices: Tensor) -> Tensor:
    """Root mean square of each matrix's singular values; the smallest positive number for zeros."""
    size: Tensor = torch.linalg.matrix_norm(matrices, keepdim=True) / math.sqrt(max(1, min(matrices.shape[-2:])))
    return size.clamp(min=torch.finfo(size.dtype).tiny)


def _largest_entry(matrix: Tensor) -> float:
    low, high = torch.aminmax(matrix)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        raise NormError("weight holds a NaN or an infinity; its operator norm has no bound")
    return largest


def _largest_eigenvalue(gram: Tensor, columns: int) -> tuple[float, float]:
    """Upper bounds of the largest eigenvalue and of the trace of the exact Gram matrix."""
    upper, _ = trace_bounds(gram[None])
    squares = float(gram.diagonal().sum()) * (1.0 + gamma(len(gram) + columns))
    return float(upper) + gamma(columns) * squares, squares


def _near_identity(gram: Tensor, error: float) -> float:
    """``1 + ‖(G - I)²‖_F^½``: an upper bound of the largest eigenvalue that is close for matrices near the identity."""
    difference = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    squared = float(torch.linalg.matrix_norm(difference @ difference))
    rounding = gamma(len(gram)) * float(torch.linalg.matrix_norm(difference)) ** 2
    return 1.0 + math.sqrt(squared + rounding) + error


def _last_step(
    matrix: Tensor, difference: Tensor, residual: float, squares: float, error: float
) -> tuple[Tensor, float]:
    """One Björck iteration ``V = W - RW/2`` and a bound ``δ`` with ``‖V‖ ≤ 1 + δ``, rounding included.

    Args:
        matrix: ``W``, shape ``(rows, columns)``, with ``‖W‖² ≤ 2``.
        difference: ``R``, the computed ``WWᵀ - I``, float64.
        residual: ``‖R‖_F``.
        squares: a bound of ``‖W‖_F²``.
        error: a bound of the distance between the computed and the exact ``WWᵀ``.

    Guarantee:
        With the exact ``WWᵀ - I = R + E``, ``W - RW/2 = (W - (R + E)W/2) + EW/2``. The first part has singular values
        ``|f(σ)|`` with ``f(σ) = σ(3 - σ²)/2``, and ``|f| ≤ 1`` on ``[0, 2]``: ``f' = 3(1 - σ²)/2`` vanishes at 1 alone,
        where ``f = 1``, and ``f(0) = 0``, ``f(2) = -1``. The second has norm at most ``‖E‖``, where ``‖E‖ ≤ error +
        2⁻⁵³(‖R‖_F + 2√rows) + u‖R‖_F``, the last two from the diagonal's subtraction and from rounding ``R`` to the
        weight's dtype of unit roundoff ``u``. (``error`` is ``gamma(columns)‖W‖_F²`` from the float64 product, and
        ``8u‖W‖_F²`` where ``W`` was scaled, and rounded, after it.) The product with ``n = rows`` terms
        a sum errs by at most ``γ_n‖R‖_F‖W‖_F/2`` (Higham 2002, §3.5), its half being exact; the difference by
        ``u‖V‖_F``; what the caller divides by ``1 + δ`` and multiplies by its limit by ``4u`` more. Every term
        is doubled against second-order ones. Underflow loses less than ``2⁻¹²⁰`` an entry.
    """
    unit = torch.finfo(matrix.dtype).eps / 2.0
    rows, columns = matrix.shape
    moved = difference.to(matrix.dtype) @ matrix
    frobenius = math.sqrt(squares)
    lost = error + 2.0**-53 * (residual + 2.0 * math.sqrt(rows)) + unit * residual
    lost += 0.5 * rows * unit * residual * frobenius
    lost += 5.0 * unit * (frobenius * (1.0 + residual) + 1.0)
    return torch.sub(matrix, moved, alpha=0.5), 2.0 * lost + rows * columns * 2.0**-120
