"""The Frobenius constraint."""

from __future__ import annotations

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, shrink_blocks_
from clipless_dp.norms.operators import Operator


class Frobenius(Constraint):
    """Scales each group of a weight until its Frobenius norm certifies the limit: cheap, and loose at high rank.

    A dense weight is one group, each slope of an activation is one (so that slopes are clamped one by one).

    Args:
        limit: the largest operator norm, 1 by default.

    Guarantee:
        Every group ``W_i`` of an operator has ``‖operator(W_i)‖ ≤ p·‖W_i‖_F`` with the operator's perturbation factor
        ``p`` (1 for a dense weight, ``√N`` for a convolution of coverage N). Groups act on separate channels, so the
        operator's norm is the largest of theirs, at most ``p·max_i‖W_i‖_F ≤ limit``: the factors make ``‖W_i‖_F ≤
        limit/p``, rounding included (:func:`~clipless_dp.constraints.base.shrink_blocks_`). Where one weight is several
        operators they are met in turn; none of the factors is above 1, so no earlier bound is lost.

    Cost:
        A pass over the weight; no certificate is computed.
    """

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place."""
        for operator in operators:
            factor = operator.perturbation(weight)
            if factor > 0.0:
                shrink_blocks_(weight, operator, self.limit / factor, rows=False)
