"""The spectral constraint."""

from __future__ import annotations

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.constraints.circulant import clip_
from clipless_dp.norms.operators import CirculantOperator, Operator


class Spectral(Constraint):
    """Divides a weight by its certified operator norm wherever that is above the limit.

    Of circulant matrices (:class:`clipless_dp.layers.StructuredLinear`) each eigenvalue above the limit is shortened to
    it first, ``min(1, limit/|ĉ|)·ĉ``: the nearest circulant within the limit; of circulant blocks each singular value
    at each frequency.

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
        for operator in operators:
            if isinstance(operator, CirculantOperator) and operator.norm(weight) > self.limit:
                clip_(weight, operator, self.limit)
        scale_to_limit_(weight, operators, self.limit)
