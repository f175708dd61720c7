"""The row-norm constraints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.constraints.base import Constraint, shrink_blocks_
from clipless_dp.constraints.coordinates import require_dense
from clipless_dp.norms.operators import Operator
from clipless_dp.norms.rounding import exact_float64


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


class UnitRows(Constraint):
    """Gives each row of a dense weight (each class's weights) one norm, longer ones and shorter ones.

    The last-layer normalisation of Singla, Singla and Feizi, "Improved deterministic l2 robustness on CIFAR-10 and
    CIFAR-100", ICLR 2022, §4. The scores together are then up to ``√rows``-Lipschitz, but each is ``limit``-Lipschitz
    in what the layer reads, and the difference of two has the constant ``‖w_i - w_j‖``: with a body of constant ``L``
    the certified radius is ``min_j (z_i - z_j)/(L‖w_i - w_j‖)``, which :func:`clipless_dp.robustness.certify` takes
    (:meth:`clipless_dp.DPLipModel.margin_constants`).

    Args:
        limit: the norm of each row, 1 by default.

    Guarantee:
        Each row of what is stored has a norm of at most ``limit``, rounding included, and less than it by a few
        roundings only; a row of zeros stays one. Hence ``‖W‖ ≤ ‖W‖_F ≤ limit·√rows`` (:meth:`implied`), which gradient
        bounds rest on, or on the certified norm of the projected weight where that is less.

    Cost:
        A pass over the weight, and a certificate of its norm.
    """

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Scales the rows in place.

        Raises:
            ConfigurationError: the weight is not that of a dense layer.
        """
        require_dense(self, operators)
        kept = self._kept(weight)
        if bool(kept.all()):
            return
        rows = exact_float64(weight)
        # A power of two first, which rounds nothing: squares of large or tiny entries leave the range of numbers.
        largest = rows.abs().amax(1, keepdim=True)
        rows = rows * torch.exp2(-torch.frexp(largest).exponent.double().clamp(-1000.0, 1000.0))
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        # As in shrink_blocks_: the norm's rounding, that of the scaled entries, and the factor's own.
        scaled = rows * (self.limit / (lengths * (1.0 + self._slack(weight))))
        weight.copy_(torch.where(kept.unsqueeze(1).to(weight.device), weight, scaled.to(weight)))

    def holds(self, weight: Tensor, operators: tuple[Operator, ...]) -> bool:
        """Whether every row has the norm already, or is zero."""
        require_dense(self, operators)
        return bool(self._kept(weight).all())

    def implied(self, rows: int, columns: int) -> float:
        """``limit·√rows``."""
        return self.limit * math.sqrt(rows) * (1.0 + 1e-12)

    def _kept(self, weight: Tensor) -> Tensor:
        """Which rows are as a projection leaves them, ``(rows,)``: at most the limit for certain, and nearly it."""
        exact = exact_float64(weight)
        lengths = torch.linalg.vector_norm(exact, dim=1)
        surely = lengths * (1.0 + (weight.shape[1] + 8) * 2.0**-53) <= self.limit
        near: Tensor = surely & (lengths >= self.limit * (1.0 - 4.0 * self._slack(weight)))
        return near | ~exact.any(1)

    @staticmethod
    def _slack(weight: Tensor) -> float:
        return 2.0 * torch.finfo(weight.dtype).eps + (weight.shape[1] + 8) * 2.0**-52
