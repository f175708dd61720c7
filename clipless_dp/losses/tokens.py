"""Losses of sequences: one number for all tokens of a sample, which is the unit of privacy."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import positive, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates.arithmetic import can_look
from clipless_dp.losses.base import Loss, invalid_as_nan
from clipless_dp.losses.classification import cross_entropy_bound, smoothing_share


class TokenCrossEntropy(Loss):
    """Cross-entropy ``ℓ_t = CE(τz_t, y_t)/τ`` of each token: the mean, or the sum, over a sample's ``n`` that count.

    A token counts unless its target is ``ignore_index``. A sample in which none counts has the loss 0 and no gradient.
    One token that counts, and whose target is no class, drops its sample. What the network says of tokens that do not
    count is not looked at.

    The gradient of ``ℓ_t`` is ``p_t - y_t``, of norm below ``g = √(1 + (1-s)² - s²/C)``, ``√2`` without smoothing
    (:class:`TauCrossEntropy`). Each token has scores of its own, so that squared norms add up: the sum's gradient is
    at most ``√n·g ≤ √T·g``, which all tokens together approach if all count and all are wrong. The mean's is at most
    ``√n·g/n = g/√n``, largest where a single token counts: ``g``, which is approached too. Both are suprema.

    Which to take: the noise follows the bound. A mean over ``n`` tokens stays ``√n`` times below it, a sum near it
    where most of ``T`` tokens count. So the sum has the better signal for sequences of about one length, the mean where
    few tokens count.

    Guarantee:
        The unit of privacy is the sample, the whole sequence with all its targets, not a token. Someone whose text is
        in several sequences is protected as several samples are.

    Args:
        ignore_index: the target of tokens that do not count, a public number.
        reduction: ``"mean"`` or ``"sum"`` over a sample's tokens that count.
        tau: ``τ``, positive.
        label_smoothing: ``s`` in [0, 1).

    Shape:
        output ``(B, T, C)``, target ``(B, T)`` integers, ``ignore_index`` or in ``[0, C)``. Losses of outputs in half
        precision are computed in float32.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum"] = "mean",
        tau: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        self.ignore_index = whole("ignore_index", ignore_index, least=torch.iinfo(torch.int64).min, most=None)
        if self.ignore_index > torch.iinfo(torch.int64).max:
            raise ConfigurationError(f"ignore_index must fit into 64 bits, got {self.ignore_index}")
        if reduction not in ("mean", "sum"):
            raise ConfigurationError(f"reduction must be 'mean' or 'sum', over one sample's tokens, got {reduction!r}")
        self.reduction = reduction
        self.tau = positive("tau", tau)
        self.label_smoothing = smoothing_share(label_smoothing)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        return _of_samples(self, output, _labels(output, target))

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """The share of tokens that count whose largest score is that of the target; 0 where none counts."""
        return _shares_right(self, output, _labels(output, target))

    def counts(self, target: Tensor) -> Tensor | None:
        """The samples in which a token counts."""
        return (target != self.ignore_index).any(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``√(1 + (1-s)² - s²/C)``, for the sum times ``√T``.

        Raises:
            ConfigurationError: the network's output is not ``(T, C)``.
        """
        tokens, classes = _sizes(self, output_shape)
        norm = cross_entropy_bound(classes, self.label_smoothing)
        return norm if self.reduction == "mean" else norm * math.sqrt(tokens)


class CausalCrossEntropy(TokenCrossEntropy):
    """:class:`TokenCrossEntropy` of language models: the scores at a position are those of the token after it.

    As models of Hugging Face do with their ``labels``, which are their tokens: ``z_t`` is held against ``y_{t+1}``, for
    ``t`` from 1 to ``T-1``. The last scores and the first target are not looked at, so that bounds are those of ``T-1``
    tokens. The network must be causal itself: in one that sees the token after, this loss measures nothing.

    Guarantee:
        The unit of privacy is the sequence of ``T`` tokens, not a token. A document that is cut into ``m`` sequences is
        ``m`` samples, and who wrote it is protected as ``m`` are: one row for each person is what ε is said of.

    Args:
        ignore_index: the target of tokens that do not count, such as padding and a prompt.
        reduction: ``"mean"`` or ``"sum"`` over a sample's tokens that count.
        tau: ``τ``, positive.
        label_smoothing: ``s`` in [0, 1).

    Shape:
        output ``(B, T, C)``, target ``(B, T)`` integers, ``ignore_index`` or in ``[0, C)``; ``T`` at least 2.
    """

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        return _of_samples(self, output, _next_labels(self, output, target))

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """The share of tokens that count which the position before predicts; 0 where none counts."""
        return _shares_right(self, output, _next_labels(self, output, target))

    def counts(self, target: Tensor) -> Tensor | None:
        """The samples in which a token after the first counts."""
        return (target[:, 1:] != self.ignore_index).any(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``√(1 + (1-s)² - s²/C)``, for the sum times ``√(T-1)``.

        Raises:
            ConfigurationError: the network's output is not ``(T, C)``, or has a single token.
        """
        tokens, classes = _sizes(self, output_shape)
        if tokens < 2:
            raise ConfigurationError(f"{self!r} predicts the token after each; sequences of {tokens} have none")
        return super().gradient_bound((tokens - 1, classes))


def _sizes(loss: Loss, output_shape: tuple[int, ...]) -> tuple[int, int]:
    if len(output_shape) != 2:
        raise ConfigurationError(
            f"{loss!r} needs an output (tokens, classes) for each sample, got {tuple(output_shape)}; one class for a "
            "whole sample is for TauCrossEntropy"
        )
    tokens, classes = output_shape
    return tokens, classes


def _labels(output: Tensor, target: Tensor) -> Tensor:
    """Targets ``(B, T)`` of outputs ``(B, T, C)``."""
    if output.dim() != 3:
        raise InputError(f"expected scores (batch, tokens, classes), got {tuple(output.shape)}")
    if target.shape != output.shape[:2] or target.is_floating_point() or target.is_complex():
        raise InputError(
            f"expected integer labels of shape {tuple(output.shape[:2])}, got {target.dtype} {tuple(target.shape)}"
        )
    return target.long()


def _next_labels(loss: CausalCrossEntropy, output: Tensor, target: Tensor) -> Tensor:
    """At each position the target of the one after it; at the last none counts."""
    # Labels move, not scores, of which a slice would be copied.
    labels = _labels(output, target)
    return torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], loss.ignore_index)), 1)


def _of_samples(loss: TokenCrossEntropy, output: Tensor, labels: Tensor) -> Tensor:
    """Each sample's loss ``(B,)``; under ``torch.func`` and in compiled graphs no step depends on numbers."""
    counts = labels != loss.ignore_index
    scores = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    losses = _of_tokens(loss, scores, labels) if _can_look(labels) else None
    if losses is None or not bool((torch.isfinite(losses) | counts).all()):
        # Zero times the slope of what is not finite is no zero. A finite loss has finite slopes, and saves this copy.
        losses = _of_tokens(loss, scores.masked_fill(~counts.unsqueeze(2), 0.0), labels)
    totals = losses.masked_fill(~counts, 0.0).sum(1)
    if loss.reduction == "mean":
        totals = totals / counts.sum(1).clamp(min=1)
    known = (labels >= 0) & (labels < output.shape[2])
    return invalid_as_nan(totals, (known | ~counts).all(1))


def _of_tokens(loss: TokenCrossEntropy, scores: Tensor, labels: Tensor) -> Tensor:
    """Each token's loss ``(B, T)``, whatever where its label is no class."""
    if loss.tau != 1.0:
        scores = loss.tau * scores
    losses = functional.cross_entropy(
        scores.flatten(0, 1),
        labels.clamp(0, scores.shape[2] - 1).flatten(),
        reduction="none",
        label_smoothing=loss.label_smoothing,
    )
    return losses.reshape(labels.shape) / loss.tau


def _can_look(labels: Tensor) -> bool:
    return can_look(labels) and torch._C._functorch.peek_interpreter_stack() is None


def _shares_right(loss: TokenCrossEntropy, output: Tensor, labels: Tensor) -> Tensor:
    """Of each sample's tokens that count, how many are the class of the largest score: ``(B,)`` in [0, 1]."""
    counts = labels != loss.ignore_index
    right = (output.argmax(2) == labels) & ~output.isnan().any(2) & counts
    return right.sum(1) / counts.sum(1).clamp(min=1)
