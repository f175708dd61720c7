"""The orthogonality constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import Operator
from clipless_dp.norms.rounding import exact_float64


class Orthogonal(Constraint):
    """Moves a weight towards the nearest semi-orthogonal matrix, then divides by the certified norm that is left.

    Björck's iteration ``W ← W(3I - WᵀW)/2`` (Björck and Bowie 1971) maps singular values in (0, √3) towards 1. It
    is started from the weight itself, which after a small step is nearly orthogonal already. A convolution's
    kernel is treated as the matrix ``c_out × c_in·k²`` of each group (reshaped-kernel orthogonalisation).

    Args:
        iterations: Björck steps for each projection.
        limit: the largest operator norm, 1 by default.
        tangent: whether to project the noisy gradient on the tangent space of the semi-orthogonal matrices (the
            Stiefel manifold) at the weight. What it drops, noise above all, the projection after the step would
            undo to first order, but momentum and adaptive step sizes would remember. For an ``n × n`` weight it
            drops ``(n+1)/2n`` of the noise's energy, for a ``p × n`` one ``(p+1)/2n``, ``p`` the smaller side.

    Guarantee:
        The operator norm is at most ``limit``: the last act is :class:`Spectral`'s division by a certified norm,
        whatever the iteration did. Orthogonality itself is approximate and no bound relies on it. The tangent
        projection costs no privacy: it is a function of the noisy gradient, once the noise is in it and the step is in
        the ledger, and of the weight, which earlier steps have released.

    Cost:
        ``iterations`` products with the smaller Gram matrix and one certificate per weight and step; two more products
        for the tangent projection.
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
        self._orthogonalize_(weight, operators[0])
        scale_to_limit_(weight, operators, self.limit)

    @torch.no_grad()
    def initialize_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Starts from the exact polar factor, which later projections only have to follow."""
        matrices = operators[0].matrix(exact_float64(weight))
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        weight.copy_((self.limit * (left @ right)).reshape(weight.shape))
        scale_to_limit_(weight, operators, self.limit)

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
