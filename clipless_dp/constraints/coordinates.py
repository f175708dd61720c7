"""Limits on how far outputs move with single coordinates: norms of weights other than the Euclidean one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.arguments import flag
from clipless_dp.constraints.base import Constraint
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import DenseOperator, Operator
from clipless_dp.norms.rounding import exact_float64, gamma


class EntryBound(Constraint):
    """Clips the entries of a dense weight: the norm from ℓ1 to ℓ∞, for the first layer of a monotone network.

    It is the Euclidean projection on ``max_ij |W_ij| ≤ limit``. With :class:`RowSum` on later layers no output moves by
    more than the product of all limits per unit of any one coordinate (Kitouni et al. 2023, §3).

    Args:
        limit: the largest size of an entry, 1 by default.
        signed: whether entries may be negative: otherwise they are clipped to ``[0, limit]``. Between layers that
            increase, weights of one sign leave a :class:`clipless_dp.layers.MonotoneResidual` nothing to outweigh.

    Guarantee:
        ``|W_ij| ≤ limit`` of what is stored, and ``W_ij ≥ 0`` unless signed, hence ``‖W‖ ≤ ‖W‖_F ≤ limit·√(in·out)``
        (:meth:`implied`). Gradient bounds rest on this, or on the certified norm of the clipped weight where that is
        less.

    Cost:
        A pass over the weight, and a certificate of its norm.
    """

    def __init__(self, limit: float = 1.0, *, signed: bool = True) -> None:
        super().__init__(limit)
        self.signed = flag("signed", signed)

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Clips the weight in place."""
        require_dense(self, operators)
        limit = _rounded_down(self.limit, weight.dtype)
        exact_float64(weight)
        weight.clamp_(-limit if self.signed else 0.0, limit)

    def holds(self, weight: Tensor, operators: tuple[Operator, ...]) -> bool:
        """Whether no entry is above the limit, or of the wrong sign."""
        exact = exact_float64(weight)
        return float(exact.abs().max()) <= self.limit and (self.signed or float(exact.min()) >= 0.0)

    def implied(self, rows: int, columns: int) -> float:
        """``limit·√(in·out)``."""
        return self.limit * math.sqrt(rows * columns) * (1.0 + 1e-12)


class RowSum(Constraint):
    """Projects each row of a dense weight on the ℓ1 ball: the norm from ℓ∞ to ℓ∞, for later layers.

    It is the Euclidean projection on ``Σ_j |W_ij| ≤ limit`` of each row ``i`` (Duchi et al. 2008, figure 1): all
    entries of a row shrink by one number, and those that are smaller become zero.

    Args:
        limit: the largest sum, 1 by default.

    Guarantee:
        ``Σ_j |W_ij| ≤ limit`` of what is stored, rounding included: the projection is on a ball that is smaller by more
        than float64 sums and the weight's own dtype round. Hence ``‖W‖ ≤ limit·√out`` (:meth:`implied`), which gradient
        bounds rest on, or on the certified norm of the projected weight where that is less.

    Cost:
        A sort of each row that is above the limit, and a certificate of the norm.
    """

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the rows in place."""
        require_dense(self, operators)
        exact = exact_float64(weight)
        above = exact.abs().sum(1) > self._within(weight)
        if bool(above.any()):
            radius = self._within(weight) * (1.0 - 2.0 * torch.finfo(weight.dtype).eps)
            weight[above.to(weight.device)] = _on_l1_ball(exact[above], radius).to(weight)

    def holds(self, weight: Tensor, operators: tuple[Operator, ...]) -> bool:
        """Whether no row has a sum above the limit."""
        return float(exact_float64(weight).abs().sum(1).max()) <= self._within(weight)

    def implied(self, rows: int, columns: int) -> float:
        """``limit·√out``."""
        return self.limit * math.sqrt(rows) * (1.0 + 1e-12)

    def _within(self, weight: Tensor) -> float:
        """What a computed sum must be below for the exact one to be below the limit."""
        return self.limit * (1.0 - gamma(weight.shape[1]))


def require_dense(constraint: Constraint, operators: tuple[Operator, ...]) -> None:
    """Raises :class:`ConfigurationError` for weights of which rows and entries say nothing of the operator."""
    if any(type(operator) is not DenseOperator for operator in operators):
        raise ConfigurationError(
            f"{type(constraint).__name__} is of the weights of dense layers (nn.Linear), which map numbers to numbers: "
            "name them, constraint={'0.weight': ...}, and give other parameters other constraints"
        )


def _rounded_down(limit: float, dtype: torch.dtype) -> float:
    nearest = torch.tensor(limit, dtype=dtype)
    if float(nearest) > limit:
        nearest = torch.nextafter(nearest, torch.zeros_like(nearest))
    return float(nearest)


def _on_l1_ball(rows: Tensor, radius: float) -> Tensor:
    """Rows ``(n, d)`` with sums above the radius, projected: ``sign(w)·max(|w| - θ, 0)``."""
    size = rows.abs()
    ordered = size.sort(dim=1, descending=True).values
    ranks = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
    thresholds = (ordered.cumsum(1) - radius) / ranks
    kept = (ordered > thresholds).sum(1, keepdim=True).clamp(min=1)
    projected = rows.sign() * (size - thresholds.gather(1, kept - 1)).clamp(min=0.0)
    # What is left of rounding: rows are far larger than the radius at times.
    return projected * (radius / projected.abs().sum(1, keepdim=True).clamp(min=radius))
