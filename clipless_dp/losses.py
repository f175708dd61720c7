"""Losses that state the bound of their gradient with respect to the network's output.

Each is a sum over samples of a term that depends on that sample alone. The bound sets the cotangent gate, so a
loss that overshoots its own bound costs accuracy but never privacy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.errors import ConfigurationError, InputError


class Loss(ABC):
    """A per-sample loss with a bounded gradient.

    Subclasses supply :meth:`per_sample` and :meth:`gradient_bound`. They hold no parameters.
    """

    @abstractmethod
    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample.

        Args:
            output: ``(B, *output_shape)``.
            target: ``(B, ...)``, as the loss documents.

        Returns:
            ``(B,)``; NaN where a sample's target is out of range, so that it contributes nothing.
        """

    @abstractmethod
    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``G``: sup over outputs and targets of ``‖∂loss/∂output‖`` for one sample, finite and positive."""

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({values})"


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"{name} must be finite and positive, got {value!r}")
    return float(value)


def _class_scores(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Valid class indices, and a mask of the samples whose label is one."""
    if output.dim() != 2:
        raise InputError(f"expected class scores (batch, classes), got {tuple(output.shape)}")
    if target.shape != output.shape[:1] or target.is_floating_point():
        raise InputError(
            f"expected integer labels of shape {tuple(output.shape[:1])}, got {target.dtype} {tuple(target.shape)}"
        )
    target = target.long()
    valid = (target >= 0) & (target < output.shape[1])
    return target.clamp(0, output.shape[1] - 1), valid


def _matching(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Output and target as ``(B, k)``."""
    if output.shape[0] != target.shape[0] or output.numel() != target.numel():
        raise InputError(f"output {tuple(output.shape)} and target {tuple(target.shape)} must have one size")
    return output.reshape(output.shape[0], -1), target.reshape(target.shape[0], -1).to(output.dtype)


def _invalid_as_nan(losses: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, losses, torch.full_like(losses, math.nan))


class TauCrossEntropy(Loss):
    """``CE(τz, y)/τ``: cross-entropy at temperature ``1/τ`` (Béthune et al. 2024, §4).

    The gradient is ``softmax(τz) - e_y``, whose norm is below ``√2``. Larger ``τ`` sharpens the softmax, which a
    network of small Lipschitz constant needs.

    Args:
        tau: ``τ``, positive.

    Shape:
        output ``(B, C)``, target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, tau: float = 1.0) -> None:
        self.tau = _positive("tau", tau)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        labels, valid = _class_scores(output, target)
        losses = functional.cross_entropy(self.tau * output, labels, reduction="none") / self.tau
        return _invalid_as_nan(losses, valid)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``√2``."""
        return math.sqrt(2.0)


class BinaryCrossEntropy(Loss):
    """``BCE(sigmoid(τz), y)/τ``, the mean over ``k`` outputs; gradient ``(sigmoid(τz) - y)/k``, bound ``1/√k``.

    Args:
        tau: ``τ``, positive.

    Shape:
        output ``(B,)`` or ``(B, k)``, target of the same size with entries in [0, 1].
    """

    def __init__(self, tau: float = 1.0) -> None:
        self.tau = _positive("tau", tau)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        scores, labels = _matching(output, target)
        valid = ((labels >= 0) & (labels <= 1)).all(1)
        losses = functional.binary_cross_entropy_with_logits(self.tau * scores, labels.clamp(0, 1), reduction="none")
        return _invalid_as_nan(losses.mean(1) / self.tau, valid)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``1/√k``."""
        return 1.0 / math.sqrt(math.prod(output_shape))


class MulticlassHinge(Loss):
    """``Σ_{c≠y} max(0, m - z_y + z_c)/C`` (Weston and Watkins 1999; torch's ``multi_margin_loss``).

    The gradient has at most ``C-1`` entries ``1/C`` and one ``-(C-1)/C``: norm at most ``√((C-1)/C)``.

    Args:
        margin: ``m``, positive.

    Shape:
        output ``(B, C)``, target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, margin: float = 1.0) -> None:
        self.margin = _positive("margin", margin)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        labels, valid = _class_scores(output, target)
        losses = functional.multi_margin_loss(output, labels, margin=self.margin, reduction="none")
        return _invalid_as_nan(losses, valid)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``√((C-1)/C)``."""
        classes = output_shape[-1]
        return math.sqrt(max(classes - 1, 1) / classes)


class CosineSimilarity(Loss):
    """``-⟨z, t⟩/max(‖z‖, K)`` with a target direction ``t`` of unit norm; bound ``1/K`` (Béthune et al. 2024, §4).

    Above the floor the gradient is the part of ``t`` orthogonal to ``z``, over ``‖z‖ ≥ K``; below it is ``t/K``.

    Args:
        floor: ``K``, positive.

    Shape:
        output ``(B, k)``; target ``(B,)`` integers (``t = e_y``) or ``(B, k)`` directions, normalised here.
    """

    def __init__(self, floor: float = 1.0) -> None:
        self.floor = _positive("floor", floor)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        if target.dim() == 1 and not target.is_floating_point():
            labels, valid = _class_scores(output, target)
            products = output.gather(1, labels.unsqueeze(1)).squeeze(1)
        else:
            scores, directions = _matching(output, target)
            lengths = torch.linalg.vector_norm(directions, dim=1)
            valid = lengths > 0
            products = (scores * directions).sum(1) / torch.where(valid, lengths, torch.ones_like(lengths))
        norms = torch.linalg.vector_norm(output.flatten(1), dim=1).clamp(min=self.floor)
        return _invalid_as_nan(-products / norms, valid)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``1/K``."""
        return 1.0 / self.floor


class MeanAbsoluteError(Loss):
    """Mean over ``k`` outputs of ``|z - y|``; bound ``1/√k``.

    Shape:
        output ``(B,)`` or ``(B, k)``, target of the same size.
    """

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        values, truth = _matching(output, target)
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
        self.delta = _positive("delta", delta)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        values, truth = _matching(output, target)
        return functional.huber_loss(values, truth, reduction="none", delta=self.delta).mean(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``δ/√k``."""
        return self.delta / math.sqrt(math.prod(output_shape))


class BoundedLoss(Loss):
    """Any per-sample loss, with the bound at which its gradient is to be gated.

    Args:
        function: maps output ``(B, ...)`` and target to ``(B,)``; entry ``i`` must depend on sample ``i`` alone.
        bound: ``G``; cotangents above it are clipped, so a wrong bound biases but never leaks.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], bound: float) -> None:
        self.function = function
        self.bound = _positive("bound", bound)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        losses = self.function(output, target)
        if losses.shape != output.shape[:1]:
            raise InputError(
                f"the loss function must return one value a sample, shape {tuple(output.shape[:1])}, "
                f"got {tuple(losses.shape)}; use reduction='none'"
            )
        return losses

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """The stated bound."""
        return self.bound
