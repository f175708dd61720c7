"""Losses of numbers that a network predicts."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import positive, whole
from clipless_dp.errors import ConfigurationError, InputError
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


class Quantization(Loss):
    """The distance of the nearest of ``m`` predicted points: networks that learn several answers to one input.

    ``min_i`` of the mean over ``k`` entries of Huber's loss of ``z_i - y``; with a weight ``λ`` the network also says
    how likely each point is, and ``λ`` times the cross-entropy of the nearest one is added. Only the nearest point
    gets a gradient, so that points part among the modes of the targets: a quantisation of their conditional
    distribution (Delattre 2025). Bound ``(δ²/k + 2λ²)^½``.

    Args:
        points: ``m``, at least 1.
        delta: ``δ``, positive.
        weight: ``λ``; 0: there are no probabilities.

    Shape:
        output ``(B, m·k)``, point after point, and with a weight ``m`` more entries, the logarithms of probabilities up
        to a constant; target ``(B,)`` or ``(B, k)``.
    """

    def __init__(self, points: int, delta: float = 1.0, weight: float = 0.0) -> None:
        self.points = whole("points", points)
        self.delta = positive("delta", delta)
        self.weight = 0.0 if weight == 0.0 and not isinstance(weight, bool) else positive("weight", weight)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        entries = self._entries(tuple(output.shape[1:]))
        truth = target.reshape(len(target), -1).to(output.dtype)
        if truth.shape != (len(output), entries):
            raise InputError(
                f"{self.points} points of {entries} entries need targets (batch, {entries}), got {tuple(target.shape)}"
            )
        flat = output.reshape(len(output), -1)
        places = flat[:, : self.points * entries].unflatten(1, (self.points, entries))
        # The nearest one by an index: of equal distances one gets all of the gradient.
        errors = functional.huber_loss(
            places, truth.unsqueeze(1).expand_as(places), reduction="none", delta=self.delta
        ).mean(2)
        nearest = errors.detach().argmin(1, keepdim=True)
        least = errors.gather(1, nearest).squeeze(1)
        if self.weight == 0.0:
            return least
        chances = functional.log_softmax(flat[:, self.points * entries :], 1)
        return least - self.weight * chances.gather(1, nearest).squeeze(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``(δ²/k + 2λ²)^½``: the nearest point and the probabilities are entries of their own."""
        return math.sqrt(self.delta**2 / self._entries(output_shape) + 2.0 * self.weight**2)

    def _entries(self, output_shape: tuple[int, ...]) -> int:
        size = math.prod(output_shape)
        entries, rest = divmod(size, self.points)
        entries -= self.weight > 0.0
        if rest or entries < 1:
            more = " and as many for their probabilities" if self.weight else ""
            raise ConfigurationError(
                f"{self.points} points take a multiple of {self.points} outputs{more}, got {output_shape}"
            )
        return entries
