"""The spectral constraint."""

from __future__ import annotations

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.norms.operators import Operator


class Spectral(Constraint):
    """Divides a weight by its certified operator norm wherever that is above the limit.

    Args:
        limit: the largest operator norm, 1 by default.

    Guarantee:
        Let ``c ≥ ‖W‖`` be the certificate. If ``c ≤ limit`` nothing changes; else ``‖W·limit/c‖ ≤ limit``.

    Cost:
        One certificate per weight and step; independent of the batch. Large dense weights get one from float32 products
        (:mod:`clipless_dp.norms.single`), after which their norm is 0.5 to 1.2 % below the limit.
    """

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place."""
        scale_to_limit_(weight, operators, self.limit)
