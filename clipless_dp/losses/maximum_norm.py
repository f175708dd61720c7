"""The loss of networks that are certified in the maximum norm (Zhang et al. 2022). Proofs: ``docs/bounds.md``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import not_negative, positive, share
from clipless_dp.errors import InputError
from clipless_dp.losses.base import Loss, class_labels, invalid_as_nan, right_class


class LInfMargin(Loss):
    """``max_{j≠y} clamp((z_j - z_y + 2r)/(2r), 0, 1) + s·λ·CE(τz)/τ`` (Zhang et al. 2022, §5.1, whose hinge this is).

    Scores that are 1-Lipschitz in the maximum norm certify a radius above ``r`` where the margin's term is 0. It is
    flat where the prediction is wrong, so that cross-entropy leads at first, and decays: ``s`` falls from 1 to 0, a
    *public* number that is set between steps (:meth:`set_decay`).

    Args:
        radius: ``r``, positive.
        cross_entropy: ``λ``, at least 0.
        tau: ``τ``, positive.

    Shape:
        output ``(B, C)``, ``C ≥ 2``; target ``(B,)`` integers in ``[0, C)``.

    Attributes:
        decay: ``s``.
    """

    def __init__(self, radius: float, *, cross_entropy: float = 1.0, tau: float = 1.0) -> None:
        self.radius = positive("radius", radius)
        self.cross_entropy = not_negative("cross_entropy", cross_entropy)
        self.tau = positive("tau", tau)
        self.decay = 1.0

    def set_decay(self, decay: float) -> None:
        """Sets ``s``: a number in [0, 1] that follows from the step's number alone. Bounds stay those of ``s = 1``.

        Raises:
            ConfigurationError: it is none.
        """
        self.decay = share("decay", decay, "[0, 1]")

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        labels, valid = class_labels(output, target)
        if output.shape[1] < 2:
            raise InputError("expected scores of two or more classes, got one")
        others = torch.arange(output.shape[1], device=output.device) != labels.unsqueeze(1)
        own = output.gather(1, labels.unsqueeze(1)).squeeze(1)
        most = output.masked_fill(~others, -math.inf).amax(1)
        losses = ((most - own + 2.0 * self.radius) / (2.0 * self.radius)).clamp(0.0, 1.0)
        weight = self.decay * self.cross_entropy
        if weight > 0.0:
            entropy = functional.cross_entropy(self.tau * output, labels, reduction="none") / self.tau
            losses = losses + weight * entropy
        return invalid_as_nan(losses, valid)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the largest score is that of the label."""
        return right_class(output, target)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``max(√2·λ, max_{1≤m≤C} √((a + λ(m-1)/m)² + (a + λ[m>1]/m)² + (m-2)⁺λ²/m²))`` with ``a = 1/(2r)``.

        Where the margin's term moves no score is above the true one, so that ``p_y`` is the largest of the ``p``: the
        norm is convex in ``p``, and largest where ``p`` is even on ``m`` classes. Elsewhere cross-entropy is alone.
        """
        slope, weight = 0.5 / self.radius, self.cross_entropy
        found = [math.sqrt(2.0) * weight]
        for m in range(1, output_shape[-1] + 1):
            other = weight / m if m > 1 else 0.0
            found.append(math.hypot(slope + weight * (m - 1) / m, slope + other, math.sqrt(max(m - 2, 0)) * other))
        return max(found)

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``max(2λ, 1/r + 2λ(1 - 1/C))``: entries add to zero, and the true class's is ``-(a + λ(1 - p_y))``."""
        return max(
            2.0 * self.cross_entropy, 1.0 / self.radius + 2.0 * self.cross_entropy * (1.0 - 1.0 / output_shape[-1])
        )
