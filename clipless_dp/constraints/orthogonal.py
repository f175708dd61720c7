"""The orthogonality constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import Operator


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
        matrices = operators[0].matrix(weight)
        left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
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
        if not self.tangent:
            return
        matrices, noisy = operators[0].matrix(weight), operators[0].matrix(gradient)
        tall = matrices.shape[1] > matrices.shape[2]
        if tall:
            matrices, noisy = matrices.mT, noisy.mT
        size = torch.linalg.matrix_norm(matrices, keepdim=True) / math.sqrt(max(1, matrices.shape[1]))
        frame = matrices / size.clamp(min=torch.finfo(size.dtype).tiny)
        inner = noisy @ frame.mT
        kept = noisy - 0.5 * (inner + inner.mT) @ frame
        gradient.copy_((kept.mT if tall else kept).reshape(gradient.shape))

    def _orthogonalize_(self, weight: Tensor, operator: Operator) -> None:
        matrices = operator.matrix(weight) / self.limit
        tall = matrices.shape[1] >= matrices.shape[2]
        current = matrices if tall else matrices.transpose(1, 2)
        # ‖W‖² ≤ ‖WᵀW‖_F: above 3 the iteration would diverge, so such a weight is scaled inside first.
        gram = current.transpose(1, 2) @ current
        size = torch.linalg.matrix_norm(gram, keepdim=True).sqrt()
        scale = torch.where(size * size > 2.9, size.clamp(min=1.0), torch.ones_like(size))
        current = current / scale
        gram = gram / (scale * scale)
        for step in range(self.iterations):
            if step:
                gram = current.transpose(1, 2) @ current
            current = 1.5 * current - 0.5 * current @ gram
        result = current if tall else current.transpose(1, 2)
        weight.copy_((self.limit * result).reshape(weight.shape))
