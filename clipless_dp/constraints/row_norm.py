"""The row-norm constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, shrink_blocks_
from clipless_dp.norms.operators import Operator


class RowNorm(Constraint):
    """Projects each row of a weight (each output's weights) on a ball, so that no output starves another.

    All rows get the same radius ``limit/(p·√rows)``. It suits a last layer of few outputs; with one row, as in a
    network with a single score, it is the exact norm. Rows of an embedding are looked up one at a time, each an
    operator of its own: they get the radius ``limit``.

    Args:
        limit: the largest operator norm, 1 by default.

    Guarantee:
        With rows of norm at most ``limit/(p·√rows)`` each group has ``‖W_i‖_F ≤ limit/p``, and the operator norm is
        at most ``p·max_i‖W_i‖_F ≤ limit`` as in :class:`Frobenius`: ``p`` is 1 for a dense weight and ``√N`` for a
        convolution of coverage N. Rounding is included (:func:`~clipless_dp.constraints.base.shrink_blocks_`). Factors
        are never above 1, so a second operator of the same weight keeps what the first one got.

    Cost:
        A pass over the weight; no certificate is computed.
    """

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place."""
        for operator in operators:
            factor = operator.perturbation(weight) * math.sqrt(operator.matrix(weight).shape[1])
            if factor > 0.0:
                shrink_blocks_(weight, operator, self.limit / factor, rows=True)
