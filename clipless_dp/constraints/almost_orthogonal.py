"""The almost-orthogonal (AOL) constraint."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.norms.operators import Operator


class AlmostOrthogonal(Constraint):
    """Rescales the input channels (or the output channels, if fewer) by the almost-orthogonal diagonal.

    ``W ← W·D`` with ``D = diag(S_j)^-½``, ``S_j = Σ_k |WᵀW|_jk`` for a dense weight, and
    ``S_j = Σ_{k,δ} |Σ_{o,τ} W_{o,j,τ} W_{o,k,τ+δ}|`` for a kernel (Prach and Lampert, "Almost-orthogonal layers for
    efficient general-purpose Lipschitz networks", ECCV 2022, §3). Channels that are orthogonal to all others get norm
    1, up or down; orthogonal weights stay as they are. Weights are rescaled after the step, not re-parametrised.

    Args:
        limit: the largest operator norm, 1 by default.

    Guarantee:
        ``D⁻² - WᵀW`` is symmetric and diagonally dominant with a non-negative diagonal, hence positive semi-definite:
        ``‖WD‖ ≤ 1``. A zero-padded convolution is part of a circular one of stride 1, whose ``CᵀC`` has rows with
        absolute sums of at most ``S_j``, so the same ``D`` serves; for fewer outputs the argument runs on ``WWᵀ``.
        None of this is relied upon: the last act is :class:`Spectral`'s division by a certified norm, rounding
        included, which has nothing left to do but where padding or strides repeat windows.

    Cost:
        One Gram product, or one correlation of the kernel with itself, and one certificate per weight and step.
    """

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place."""
        kernel = operators[0].kernel(weight.double())
        inputs_are_fewer = kernel.shape[2] <= kernel.shape[1]
        if not inputs_are_fewer:
            kernel = kernel.transpose(1, 2)
        sums = _correlation_sums(kernel).sqrt()
        factors = torch.where(sums > 0.0, self.limit / sums, torch.ones_like(sums))
        kernel = kernel * factors.reshape(*sums.shape[:1], 1, -1, *([1] * (kernel.dim() - 3)))
        if not inputs_are_fewer:
            kernel = kernel.transpose(1, 2)
        weight.copy_(kernel.reshape(weight.shape))
        scale_to_limit_(weight, operators, self.limit)


def _correlation_sums(kernel: Tensor) -> Tensor:
    """``S_j`` of each group: ``(groups, rows, columns, *taps)`` to ``(groups, columns)``."""
    groups, rows, columns, *taps = kernel.shape
    if not taps:
        return (kernel.mT @ kernel).abs().sum(2)
    filters = kernel.transpose(1, 2).reshape(groups * columns, rows, *taps)
    maps = kernel.movedim(2, 0).reshape(columns, groups * rows, *taps)
    correlate = functional.conv1d if len(taps) == 1 else functional.conv2d
    shifts: Tensor = correlate(maps, filters, padding=[size - 1 for size in taps], groups=groups)
    sizes = shifts.abs().reshape(columns, groups, -1)
    return sizes.sum(2).t()
