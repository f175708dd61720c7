"""What a loss is, any function as one, and checks of targets that losses share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from clipless_dp.arguments import positive
from clipless_dp.errors import InputError
from clipless_dp.gates.arithmetic import can_look, flat_rows


class Loss(ABC):
    """A per-sample loss with a bounded gradient.

    Subclasses supply :meth:`per_sample` and :meth:`gradient_bound`. They hold no parameters. What a subclass of yours
    computes is called on rows alone, or held against that: see :class:`clipless_dp.model.rowwise.RowLosses`.
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

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``G₁``: the same in the ℓ1 norm, for layers that keep it; by default ``√n·G``, which always holds."""
        return math.sqrt(math.prod(output_shape)) * self.gradient_bound(output_shape)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Which predictions are right, for :func:`clipless_dp.evaluate`; training never asks.

        Args:
            output: ``(B, *output_shape)``.
            target: ``(B, ...)``, as the loss documents.

        Returns:
            ``(B,)``: truth values, or numbers in [0, 1] where a prediction may be right in part. ``None``, the default,
            where the loss has no notion of it: no accuracy is reported then. The rows of samples that
            :class:`clipless_dp.DPLipModel` drops are NaN: they are not right. It is called on rows alone: an entry is a
            function of its own row.
        """
        return None

    def counts(self, target: Tensor) -> Tensor | None:
        """Which samples ask for a prediction, for the means of :func:`clipless_dp.evaluate`; training never asks.

        Args:
            target: ``(B, ...)``, as the loss documents.

        Returns:
            Truth values ``(B,)``, each of its own row. ``None``, the default: all do. No numbers: how many tokens of a
            sample are right is a share, of :meth:`correct`, and a sample counts once.
        """
        return None

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({values})"


class BoundedLoss(Loss):
    """Any per-sample loss, with the bound at which its gradient is to be gated.

    Args:
        function: maps output ``(B, ...)`` and target to ``(B,)`` for any ``B``, one row included; entry ``i`` must
            depend on sample ``i`` alone, which :class:`clipless_dp.model.rowwise.RowLosses` sees to: it maps the
            function over rows by ``torch.func.vmap`` where that is cheap, and refuses one whose rows it finds to meet.
            Without control flow that depends on numbers it can be mapped, and compiled. It is called more than once a
            batch.
        bound: ``G``; cotangents above it are clipped, so a wrong bound biases but never leaks.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], bound: float) -> None:
        self.function = function
        self.bound = positive("bound", bound)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        losses = self.function(output, target)
        if not isinstance(losses, Tensor) or losses.shape != output.shape[:1]:
            raise InputError(
                f"the loss function must return a tensor with one value a sample, shape {tuple(output.shape[:1])}, "
                f"got {described(losses)}; use reduction='none'"
            )
        return losses

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """The stated bound."""
        return self.bound


class InnerProduct(Loss):
    """``⟨output, target⟩``, for attacks on networks: its cotangent is the target itself, of any norm.

    Args:
        bound: ``G``; cotangents above it are clipped.
    """

    def __init__(self, bound: float) -> None:
        self.bound = positive("bound", bound)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        output, target = matching(output, target)
        return (output * target).sum(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """The stated bound."""
        return self.bound


def described(value: object) -> str:
    """What a function of a user's own has returned, for messages: type and shape, never numbers."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def class_labels(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """Valid class indices, and a mask of the samples whose label is one; ``None`` where all are seen to be."""
    if output.dim() != 2:
        raise InputError(f"expected class scores (batch, classes), got {tuple(output.shape)}")
    if target.shape != output.shape[:1] or target.is_floating_point() or target.is_complex():
        raise InputError(
            f"expected integer labels of shape {tuple(output.shape[:1])}, got {target.dtype} {tuple(target.shape)}"
        )
    target = target.long()
    looks = can_look(target) and not torch._C._functorch.is_batchedtensor(target)
    if looks and len(target) and int(target.min()) >= 0 and int(target.max()) < output.shape[1]:
        return target, None
    valid = (target >= 0) & (target < output.shape[1])
    return target.clamp(0, output.shape[1] - 1), valid


def right_class(scores: Tensor, target: Tensor) -> Tensor | None:
    """Where the largest score is that of the label; labels out of range are none, and NaN is no score."""
    return (scores.argmax(1) == target) & ~scores.isnan().any(1) if target.dim() == 1 else None


def matching(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Output and target as ``(B, k)``."""
    if output.shape[0] != target.shape[0] or output.numel() != target.numel():
        raise InputError(f"output {tuple(output.shape)} and target {tuple(target.shape)} must have one size")
    if target.is_complex():
        raise InputError(f"expected real targets, got {target.dtype}")
    return flat_rows(output), flat_rows(target).to(output.dtype)


def invalid_as_nan(losses: Tensor, valid: Tensor | None) -> Tensor:
    """Losses ``(B,)``, NaN where a sample is not valid; ``None`` where all are."""
    return losses if valid is None else torch.where(valid, losses, torch.full_like(losses, math.nan))
