"""The ball constraint."""

from __future__ import annotations

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.norms.operators import Operator, VectorOperator


class Ball(Constraint):
    """Projects a parameter onto the Euclidean ball; meant for biases.

    Args:
        limit: the radius.

    Guarantee:
        ``‖b‖ ≤ limit``. For a weight the operator norm is at most ``p·‖W‖_F`` (``p`` the operator's perturbation
        factor), so the weight is scaled until that product meets the limit.

    Cost:
        One pass over the parameter.
    """

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the parameter in place."""
        factor = max(operator.perturbation(weight) for operator in operators)
        # A kernel whose windows read nothing but padding is the zero operator: any limit holds.
        if factor > 0.0:
            scale_to_limit_(weight, (VectorOperator(),), self.limit / factor)
