"""Losses of optimal transport: Kantorovich-Rubinstein terms, hinges, and their sums, for networks of a Lipschitz bound.

The Kantorovich-Rubinstein term drives scores apart without end, so the network's constant is what stops it: all of
these are for constrained networks, whose margins they turn into certified radii (Serrurier et al. 2021). Nothing is
taken from the batch, and priors are public. Proofs of the bounds: ``docs/robustness.md``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import flag, not_negative, positive, share
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.losses.base import Loss, class_labels, invalid_as_nan, right_class
from clipless_dp.losses.classification import TauCrossEntropy, class_scores, public_priors, require_classes

_RAREST = 1e-30
"""Priors below have inverses that are near the largest number of float32."""


class _Inverses:
    """``1/π_c`` and ``1/(1-π_c)`` of public priors, computed as plain numbers: in float32 ``1-π_c`` may round to 0.

    Raises:
        ConfigurationError: a prior is below 1e-30, or so near to one that nothing is left for the others.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        for prior in priors:
            if prior < _RAREST or prior >= 1.0:
                raise ConfigurationError(
                    f"priors must lie in [{_RAREST:g}, 1), so that 1/π and 1/(1-π) are numbers, got {prior!r}: leave "
                    "out classes that do not occur"
                )
        self.own = [1.0 / prior for prior in priors]
        self.other = [1.0 / (1.0 - prior) for prior in priors]

    def of(self, signed: Tensor, own: Tensor) -> Tensor:
        """The factor of each score ``(B, C)``: of the true class and of others."""
        require_classes("priors", self.own, signed.shape[1])
        return torch.where(own, signed.new_tensor(self.own), signed.new_tensor(self.other))

    def steepest(self, label: int, classes: int) -> list[float]:
        """The same of a sample of a label."""
        require_classes("priors", self.own, classes)
        return [self.own[c] if c == label else other for c, other in enumerate(self.other)]


class _OneAgainstAll(Loss):
    """Mean over classes of a term of the signed score ``s_c·z_c``, with ``s_y = 1`` and ``s_c = -1`` else.

    Shape:
        output ``(B, C)``, or ``(B,)`` or ``(B, 1)`` for two classes, with scores ``(-f, f)``; target ``(B,)`` integers
        in ``[0, C)``.
    """

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        scores = class_scores(output)
        labels, valid = class_labels(scores, target)
        own = torch.arange(scores.shape[1], device=scores.device) == labels.unsqueeze(1)
        return invalid_as_nan(self._terms(torch.where(own, scores, -scores), own).mean(1), valid)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the largest score is that of the label; of one output ``f``, the larger of ``(-f, f)``."""
        return right_class(class_scores(output), target)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``max_y √(Σ_c b_{yc}²)/C`` with the steepest slopes ``b`` of terms; of one output ``max_y Σ_c b_{yc}/2``.

        The terms fall in ``s_c·z_c``, and are steepest all at once, far to the left: the bound is the supremum. One
        output moves both scores in the same signed direction.
        """
        classes = max(2, math.prod(output_shape))
        steepest = [self._slopes(label, classes) for label in range(classes)]
        if math.prod(output_shape) == 1:
            return max(sum(slopes) for slopes in steepest) / 2.0
        return max(math.hypot(*slopes) for slopes in steepest) / classes

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``max_y Σ_c b_{yc}/C``; of one output that of its size."""
        if math.prod(output_shape) == 1:
            return self.gradient_bound(output_shape)
        classes = max(2, math.prod(output_shape))
        return max(sum(self._slopes(label, classes)) for label in range(classes)) / classes

    @abstractmethod
    def _terms(self, signed: Tensor, own: Tensor) -> Tensor:
        """Of signed scores ``(B, C)`` and where the true class is: the terms ``(B, C)``."""

    @abstractmethod
    def _slopes(self, label: int, classes: int) -> list[float]:
        """The steepest slope of each class's term, for samples of a label."""


class KantorovichRubinstein(_OneAgainstAll):
    """``(1/C)·(-z_y/π_y + Σ_{c≠y} z_c/(1-π_c))``: in the mean ``-(1/C)·Σ_c (E[z_c | y=c] - E[z_c | y≠c])``.

    Over 1-Lipschitz scores each difference is at most the Wasserstein-1 distance of the class from the others, and
    reaches it at the optimum. The gradient is constant, and the bound attained everywhere.

    Args:
        priors: ``π_c``: *public* numbers in [1e-30, 1) that add to one.

    Shape:
        output ``(B, C)``, or ``(B,)`` or ``(B, 1)`` for two classes; target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self.priors = public_priors(priors)
        _Inverses(self.priors)

    def _terms(self, signed: Tensor, own: Tensor) -> Tensor:
        return -signed * _Inverses(self.priors).of(signed, own)

    def _slopes(self, label: int, classes: int) -> list[float]:
        return _Inverses(self.priors).steepest(label, classes)


class HingeMargin(_OneAgainstAll):
    """``(1/C)·Σ_c w_c·max(0, m - s_c·z_c)``: each class against all others; ``w_y = C-1`` where ``balanced``, else 1.

    Balanced, the one true class weighs as much as all others together. The bounds are ``1/√C``, and ``√((C-1)/C)``
    where balanced; 1 for one output.

    Args:
        margin: ``m``, positive.
        balanced: whether the true class weighs ``C-1``.

    Shape:
        output ``(B, C)``, or ``(B,)`` or ``(B, 1)`` for two classes; target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, margin: float = 1.0, *, balanced: bool = False) -> None:
        self.margin = positive("margin", margin)
        self.balanced = flag("balanced", balanced)

    def _terms(self, signed: Tensor, own: Tensor) -> Tensor:
        missed = functional.relu(self.margin - signed)
        return torch.where(own, missed * (signed.shape[1] - 1), missed) if self.balanced else missed

    def _slopes(self, label: int, classes: int) -> list[float]:
        return [float(classes - 1) if self.balanced and c == label else 1.0 for c in range(classes)]


class ConvexHingeKR(_OneAgainstAll):
    """``α·hinge + (1-α)·(-KR)``: :class:`HingeMargin` and :class:`KantorovichRubinstein`, with weights that add to one.

    At α near 1 it classifies, at 0 it is the distance of the classes; in between, margins are certified radii.

    Args:
        priors: ``π_c``: *public* numbers in [1e-30, 1) that add to one.
        alpha: ``α`` in [0, 1].
        margin: ``m``, positive.

    Shape:
        output ``(B, C)``, or ``(B,)`` or ``(B, 1)`` for two classes; target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, priors: Sequence[float], *, alpha: float = 0.98, margin: float = 1.0) -> None:
        self.priors = public_priors(priors)
        _Inverses(self.priors)
        self.alpha = share("alpha", alpha, "[0, 1]")
        self.margin = positive("margin", margin)

    def _terms(self, signed: Tensor, own: Tensor) -> Tensor:
        distance = signed * _Inverses(self.priors).of(signed, own)
        return self.alpha * functional.relu(self.margin - signed) - (1.0 - self.alpha) * distance

    def _slopes(self, label: int, classes: int) -> list[float]:
        return [
            self.alpha + (1.0 - self.alpha) * inverse for inverse in _Inverses(self.priors).steepest(label, classes)
        ]


class _TrueAgainstOthers(Loss):
    """``α·(max(0, m/2 - z_y) + max(0, m/2 + o)) - (1-α)·(z_y - o)``, with one number ``o`` for all other scores.

    Shape:
        output ``(B, C)``, ``C ≥ 2``; target ``(B,)`` integers in ``[0, C)``.
    """

    alpha: float
    margin: float

    def _loss(self, own: Tensor, others: Tensor, reached: Tensor) -> Tensor:
        """Of the true score, what the others count as in the KR term, and as in the hinge, each ``(B,)``."""
        hinge = functional.relu(self.margin / 2.0 - own) + reached
        return self.alpha * hinge - (1.0 - self.alpha) * (own - others)

    def _apart(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The true scores, all scores, where others are, and which labels are valid."""
        labels, valid = class_labels(output, target)
        if output.shape[1] < 2:
            raise InputError("expected scores of two or more classes, got one")
        others = torch.arange(output.shape[1], device=output.device) != labels.unsqueeze(1)
        return output.gather(1, labels.unsqueeze(1)).squeeze(1), output, others, valid

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the largest score is that of the label."""
        return right_class(output, target)


class LogSumExpHKR(_TrueAgainstOthers):
    """Hinge-KR of the true score against a smooth maximum of the others, of scores ``θ·z``.

    ``o = (1/t)·log Σ_{j≠y} exp(t·θz_j)`` with ``t = log(C-1)/(p·m/2)`` lies above the largest other score by at most
    ``log(C-1)/t = p·m/2``; of two classes it is the other score itself. Its gradient is a softmax, of norm at most 1,
    and so is that of the true score's part: the bound is ``√2·θ``, approached where both hinges are missed and one
    score is far above the other wrong ones.

    Args:
        alpha: ``α`` in [0, 1].
        margin: ``m``, positive: of ``θ·z``.
        penalty: ``p``, positive: how far above, relative to half of the margin, the smooth maximum may lie.
        temperature: ``θ``, positive: a *public* number.

    Shape:
        output ``(B, C)``, ``C ≥ 2``; target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(
        self, *, alpha: float = 0.98, margin: float = 1.0, penalty: float = 0.5, temperature: float = 1.0
    ) -> None:
        self.alpha = share("alpha", alpha, "[0, 1]")
        self.margin = positive("margin", margin)
        self.penalty = positive("penalty", penalty)
        self.temperature = positive("temperature", temperature)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        own, scores, others, valid = self._apart(self.temperature * output, target)
        rate = math.log(scores.shape[1] - 1) / (self.penalty * self.margin / 2.0)
        wrong = scores.masked_fill(~others, -math.inf)
        most = wrong.amax(1) if rate == 0.0 else torch.logsumexp(rate * wrong, 1) / rate
        return invalid_as_nan(self._loss(own, most, functional.relu(self.margin / 2.0 + most)), valid)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``√2·θ``."""
        return math.sqrt(2.0) * self.temperature

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``2θ``: the true score's part is at most ``θ``, and a softmax adds to one."""
        return 2.0 * self.temperature


class SoftHKR(_TrueAgainstOthers):
    """Hinge-KR of the true score against a mean of the others, weighted towards the largest.

    Weights ``w_j ∝ exp(z_j/T)``, ``j ≠ y``, count as constants: no gradient flows through them. With them the KR term
    is ``z_y - Σ w_j z_j``, and the hinge ``max(0, m/2 - z_y) + Σ w_j·max(0, m/2 + z_j)``. The gradient's entry ``j`` is
    at most ``w_j``, ``y``'s at most 1, so that the bound is ``√(1 + ‖w‖²) ≤ √2``, approached where one wrong score is
    far above the other ones and both hinges are missed.

    Args:
        alpha: ``α`` in [0, 1].
        margin: ``m``, positive.
        temperature: ``T``, positive, a *public* number. (A running mean of batches would mix samples.)

    Shape:
        output ``(B, C)``, ``C ≥ 2``; target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, *, alpha: float = 0.98, margin: float = 1.0, temperature: float = 1.0) -> None:
        self.alpha = share("alpha", alpha, "[0, 1]")
        self.margin = positive("margin", margin)
        self.temperature = positive("temperature", temperature)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        own, scores, others, valid = self._apart(output, target)
        weights = torch.softmax(scores.detach().masked_fill(~others, -math.inf) / self.temperature, 1)
        mean = (weights * scores).sum(1)
        reached = (weights * functional.relu(self.margin / 2.0 + scores)).sum(1)
        return invalid_as_nan(self._loss(own, mean, reached), valid)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``√2``."""
        return math.sqrt(2.0)

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``2``: the true score's part is at most 1, and the weights add to one."""
        return 2.0


class OffsetCrossEntropy(TauCrossEntropy):
    """``w_y·CE(τ(z - o·e_y), t)/τ``: cross-entropy in which the true score must lead by ``o`` more.

    The gradient is ``w_y(p - t)`` as without offset, with another ``p`` of the same simplex: the bound is that of
    :class:`TauCrossEntropy`.

    Args:
        tau: ``τ``, positive.
        offset: ``o``, at least 0: a margin in the units of the scores.
        label_smoothing: ``s`` in [0, 1).
        class_weights: ``w_c``, *public* numbers; by default 1.

    Shape:
        output ``(B, C)``, target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(
        self,
        tau: float = 1.0,
        *,
        offset: float,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(tau, label_smoothing=label_smoothing, class_weights=class_weights)
        self.offset = not_negative("offset", offset)
        if not math.isfinite(self.offset * self.tau):
            raise ConfigurationError(f"offset·tau must be finite, got {offset!r} and {tau!r}")

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        labels, _ = class_labels(output, target)
        own = torch.arange(output.shape[1], device=output.device) == labels.unsqueeze(1)
        return super().per_sample(output - self.offset * own, target)
