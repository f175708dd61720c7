"""Losses of numbers that a network predicts."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import positive
from clipless_dp.losses.base import Loss, matching


class MeanAbsoluteError(Loss):
    """Mean over ``k`` outputs of ``|z - y|``; bound ``1/√k``.

    Shape:
        output ``(B,)`` or ``(B, k)``, target of the same size.
    """

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        values, truth = matching(output, target)
        return (values - truth).abs().mean(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``1/√k``."""
        return 1.0 / math.sqrt(math.prod(output_shape))


class Huber(Loss):
    """Mean over ``k`` outputs of Huber's loss: quadratic up to ``δ``, then of slope ``δ``; bound ``δ/√k``.

    Args:
        delta: ``δ``, positive.

    Shape:
        output ``(B,)`` or ``(B, k)``, target of the same size.
    """

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = positive("delta", delta)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        values, truth = matching(output, target)
        return functional.huber_loss(values, truth, reduction="none", delta=self.delta).mean(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``δ/√k``."""
        return self.delta / math.sqrt(math.prod(output_shape))
