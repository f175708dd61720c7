"""Losses of a sample's class, or of the direction of its output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import positive, share
from clipless_dp.errors import ConfigurationError
from clipless_dp.losses.base import Loss, class_labels, invalid_as_nan, matching, right_class


def class_scores(output: Tensor) -> Tensor:
    """Scores of classes, ``(B, C)``: a single output ``f`` stands for two of them, ``(-f, f)``."""
    if output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1):
        column = output.reshape(-1, 1)
        return torch.cat((-column, column), 1)
    return output


def _public(name: str, values: object) -> tuple[float, ...]:
    """Positive numbers, one for each class, fixed before any data is seen.

    Raises:
        ConfigurationError: they are anything else. Tensors, arrays and functions are refused, since what is computed
            from a batch lets its samples enter each other's gradients, which no bound covers.
    """
    if not (isinstance(values, (tuple, list)) and all(isinstance(value, Real) for value in values)):
        raise ConfigurationError(
            f"{name} must be a tuple of public numbers, one for each class, got {type(values).__name__}: counts of a "
            "batch mix its samples, and counts of the training data are private (release them with noise first)"
        )
    if len(values) < 2:
        raise ConfigurationError(f"{name} must have one number for each of two or more classes, got {values!r}")
    return tuple(positive(name, value) for value in values)


def public_priors(values: object) -> tuple[float, ...]:
    """Shares of classes, once they are known to be public numbers that add to one.

    Raises:
        ConfigurationError: they are not.
    """
    priors = _public("priors", values)
    if not math.isclose(sum(priors), 1.0, rel_tol=1e-6):
        raise ConfigurationError(f"priors must add to one, got {sum(priors)!r}")
    return tuple(prior / sum(priors) for prior in priors)


def _public_weights(values: object) -> tuple[float, ...] | None:
    return None if values is None else _public("class_weights", values)


def smoothing_share(value: float) -> float:
    """Label smoothing ``s`` in [0, 1)."""
    return share("label_smoothing", value, "[0, 1)")


def cross_entropy_bound(classes: int, smoothing: float) -> float:
    """``√(1 + (1-s)² - s²/C)``, see :class:`TauCrossEntropy`."""
    return math.sqrt(1.0 + (1.0 - smoothing) ** 2 - smoothing**2 / classes)


def require_classes(name: str, values: Sequence[float], classes: int) -> None:
    """Refuses numbers that are not one for each class."""
    if len(values) != classes:
        raise ConfigurationError(f"{len(values)} {name} were given for {classes} classes")


def _weighted(losses: Tensor, labels: Tensor, weights: tuple[float, ...] | None, classes: int) -> Tensor:
    """Each sample's loss times the weight of its class."""
    if weights is None:
        return losses
    require_classes("class_weights", weights, classes)
    return losses * losses.new_tensor(weights)[labels]


def _largest(weights: tuple[float, ...] | None, classes: int) -> float:
    if weights is None:
        return 1.0
    require_classes("class_weights", weights, classes)
    return max(weights)


def balanced_weights(priors: Sequence[float], power: float = 1.0) -> tuple[float, ...]:
    """Class weights ``π_c^-p / Σ_k π_k^(1-p)``: rare classes count more, the mean weight of a sample is one.

    The gradient's bound, and with it the noise, grows by the largest weight, so that full balance (``p = 1``:
    ``1/(C·π_c)``) costs most where it is wanted most; ``p = ½`` is a compromise.

    Args:
        priors: public ``π_c``, positive, adding to one.
        power: ``p`` in [0, 1].

    Raises:
        ConfigurationError: an argument is out of range, or the priors are not plain numbers.
    """
    known = public_priors(priors)
    power = share("power", power, "[0, 1]")
    total = sum(prior ** (1.0 - power) for prior in known)
    return tuple(prior**-power / total for prior in known)


class _SmoothedCrossEntropy(Loss):
    """A cross-entropy of smoothed labels at a temperature, with weights of classes."""

    def __init__(
        self, tau: float = 1.0, *, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> None:
        self.tau = positive("tau", tau)
        self.label_smoothing = smoothing_share(label_smoothing)
        self.class_weights = _public_weights(class_weights)


class TauCrossEntropy(_SmoothedCrossEntropy):
    """``w_y·CE(τz, t)/τ``: cross-entropy at temperature ``1/τ`` (Béthune et al. 2024, §4).

    ``t = (1-s)·e_y + s/C`` are the smoothed labels (Szegedy et al. 2016). Larger ``τ`` sharpens the softmax, which a
    network of small Lipschitz constant needs.

    The gradient is ``w_y(p - t)`` with ``p = softmax(τz)``. ``‖p - t‖`` is convex in ``p``, so largest at a corner
    ``e_c`` of the simplex, and there at one with ``c ≠ y``: ``‖e_c - t‖² = 1 + (1-s)² - s²/C``, against ``s² - s²/C``
    at ``e_y``. Softmax comes as close to a corner as one likes, so the bound is the supremum.

    Args:
        tau: ``τ``, positive.
        label_smoothing: ``s`` in [0, 1).
        class_weights: ``w_c``, *public* numbers, such as :func:`balanced_weights` of public priors; by default 1.

    Shape:
        output ``(B, C)``, target ``(B,)`` integers in ``[0, C)``.
    """

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        labels, valid = class_labels(output, target)
        losses = functional.cross_entropy(
            self.tau * output, labels, reduction="none", label_smoothing=self.label_smoothing
        )
        return invalid_as_nan(_weighted(losses / self.tau, labels, self.class_weights, output.shape[1]), valid)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the largest score is that of the label."""
        return right_class(output, target)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``max_c w_c·√(1 + (1-s)² - s²/C)``, which is ``√2`` without weights and smoothing."""
        classes = output_shape[-1]
        return _largest(self.class_weights, classes) * cross_entropy_bound(classes, self.label_smoothing)

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``max_c w_c·2(1 - s/C)``: the ℓ1 norm of ``e_c - t``, ``c ≠ y``, at the corner where it is largest too."""
        classes = output_shape[-1]
        return _largest(self.class_weights, classes) * 2.0 * (1.0 - self.label_smoothing / classes)


class BinaryCrossEntropy(_SmoothedCrossEntropy):
    """``BCE(sigmoid(τz), t)/τ``, the mean over ``k`` outputs, with smoothed targets ``t = (1-s)y + s/2``.

    The gradient of one output is ``w_0(1-t)p - w_1·t(1-p)`` over ``k``, ``p = sigmoid(τz)``: a difference of two
    numbers that are not negative, the one at most ``w_0(1-s/2)``, the other ``w_1(1-s/2)``. Either is approached, as
    ``z`` grows against a target of 0 or 1, so the bound is the supremum.

    Args:
        tau: ``τ``, positive.
        label_smoothing: ``s`` in [0, 1).
        class_weights: *public* ``(w_0, w_1)`` of negative and positive targets, for each output; by default 1.

    Shape:
        output ``(B,)`` or ``(B, k)``, target of the same size with entries in [0, 1].
    """

    def __init__(
        self, tau: float = 1.0, *, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(tau, label_smoothing=label_smoothing, class_weights=class_weights)
        _largest(self.class_weights, 2)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        scores, labels = matching(output, target)
        valid = ((labels >= 0) & (labels <= 1)).all(1)
        smoothed = (1.0 - self.label_smoothing) * labels.clamp(0, 1) + self.label_smoothing / 2.0
        negative, positive = (1.0, 1.0) if self.class_weights is None else self.class_weights
        likelihoods = negative * (1.0 - smoothed) * functional.logsigmoid(-self.tau * scores)
        likelihoods = likelihoods + positive * smoothed * functional.logsigmoid(self.tau * scores)
        return invalid_as_nan(-likelihoods.mean(1) / self.tau, valid)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the score is above zero and the target above one half, or neither; ``None`` for several outputs."""
        if output.numel() != len(output):
            return None
        scores = output.flatten()
        return ((scores > 0) == (target.flatten() > 0.5)) & ~scores.isnan()

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``max(w_0, w_1)·(1 - s/2)/√k``."""
        return _largest(self.class_weights, 2) * (1.0 - self.label_smoothing / 2.0) / math.sqrt(math.prod(output_shape))

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``max(w_0, w_1)·(1 - s/2)``: ``k`` entries of a ``k``-th of it."""
        return _largest(self.class_weights, 2) * (1.0 - self.label_smoothing / 2.0)


class MulticlassHinge(Loss):
    """``w_y·Σ_{c≠y} max(0, m - z_y + z_c)/C`` (Weston and Watkins 1999; torch's ``multi_margin_loss``).

    The gradient has ``n ≤ C-1`` entries ``w_y/C`` and one ``-n·w_y/C``: norm at most ``w_y·√((C-1)/C)``, attained where
    all margins are missed.

    Args:
        margin: ``m``, positive.
        class_weights: ``w_c``, *public* numbers, such as :func:`balanced_weights` of public priors; by default 1.

    Shape:
        output ``(B, C)``, target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, margin: float = 1.0, *, class_weights: Sequence[float] | None = None) -> None:
        self.margin = positive("margin", margin)
        self.class_weights = _public_weights(class_weights)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        labels, valid = class_labels(output, target)
        losses = functional.multi_margin_loss(output, labels, margin=self.margin, reduction="none")
        return invalid_as_nan(_weighted(losses, labels, self.class_weights, output.shape[1]), valid)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the largest score is that of the label."""
        return right_class(output, target)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``max_c w_c·√((C-1)/C)``."""
        classes = output_shape[-1]
        return _largest(self.class_weights, classes) * math.sqrt(max(classes - 1, 1) / classes)

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``max_c w_c·2(C-1)/C``."""
        classes = output_shape[-1]
        return _largest(self.class_weights, classes) * 2.0 * max(classes - 1, 1) / classes


class HingeKR(Loss):
    """Kantorovich–Rubinstein term plus ``α`` times hinge, one class against all others (Serrurier et al. 2021).

    ``(1/C)·(-z_y/π_y + Σ_{c≠y} z_c/(1-π_c)) + (α/C)·Σ_c max(0, m - s_c·z_c)``, with ``s_y = 1`` and ``s_c = -1`` else.
    In the mean over samples with priors ``π`` the first part is ``-(1/C)·Σ_c (E[z_c | y=c] - E[z_c | y≠c])``: a
    distance of the classes, for networks whose Lipschitz constant is constrained (else it falls without end). With
    one output ``f`` instead of two, the scores are ``(-f, f)``.

    The first part's gradient is constant, ``-1/π_y`` in entry ``y`` and ``1/(1-π_c)`` in the others, over ``C``. The
    second's entries are 0 or ``-α·s_c``, over ``C``: of the same signs, so that the norm is largest where all margins
    are missed, as at ``z = 0``. There the bound is attained. It is at most the sum of the parts' bounds.

    Args:
        priors: ``π_c``, the classes' shares: *public* numbers in (0, 1) that add to one. Shares of the batch would let
            samples enter each other's gradients.
        margin: ``m``, positive.
        alpha: ``α``, positive.

    Shape:
        output ``(B, C)``, or ``(B,)`` or ``(B, 1)`` for two classes; target ``(B,)`` integers in ``[0, C)``.
    """

    def __init__(self, priors: Sequence[float], *, margin: float = 1.0, alpha: float = 1.0) -> None:
        self.priors = public_priors(priors)
        self.margin = positive("margin", margin)
        self.alpha = positive("alpha", alpha)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        scores = class_scores(output)
        labels, valid = class_labels(scores, target)
        require_classes("priors", self.priors, scores.shape[1])
        priors = scores.new_tensor(self.priors)
        own = torch.arange(len(self.priors), device=scores.device) == labels.unsqueeze(1)
        signed = torch.where(own, scores, -scores)
        shares = torch.where(own, priors, 1.0 - priors)
        losses = (self.alpha * functional.relu(self.margin - signed) - signed / shares).mean(1)
        return invalid_as_nan(losses, valid)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the largest score is that of the label; of one output ``f``, the larger of ``(-f, f)``."""
        return right_class(class_scores(output), target)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``max_y √((1/π_y + α)² + Σ_{c≠y} (1/(1-π_c) + α)²)/C``; for one output ``max_y 1/π_y + α``."""
        classes = max(2, math.prod(output_shape))
        require_classes("priors", self.priors, classes)
        if math.prod(output_shape) == 1:
            # The one output moves both scores: the sum of two equal entries, over two.
            return max(1.0 / prior + self.alpha for prior in self.priors)
        squares = [(1.0 / (1.0 - prior) + self.alpha) ** 2 for prior in self.priors]
        own = [(1.0 / prior + self.alpha) ** 2 for prior in self.priors]
        return math.sqrt(max(sum(squares) - square + mine for square, mine in zip(squares, own, strict=True))) / classes

    def gradient_bound_l1(self, output_shape: tuple[int, ...]) -> float:
        """``max_y (1/π_y + Σ_{c≠y} 1/(1-π_c))/C + α``; of one output that of its size."""
        classes = max(2, math.prod(output_shape))
        if math.prod(output_shape) == 1:
            return self.gradient_bound(output_shape)
        require_classes("priors", self.priors, classes)
        others = [1.0 / (1.0 - prior) for prior in self.priors]
        each = (sum(others) - other + 1.0 / prior for other, prior in zip(others, self.priors, strict=True))
        return max(each) / classes + self.alpha


class CosineSimilarity(Loss):
    """``-⟨z, t⟩/max(‖z‖, K)`` with a target direction ``t`` of unit norm; bound ``1/K`` (Béthune et al. 2024, §4).

    Above the floor the gradient is the part of ``t`` orthogonal to ``z``, over ``‖z‖ ≥ K``; below it is ``t/K``.

    Args:
        floor: ``K``, positive.

    Shape:
        output ``(B, k)``; target ``(B,)`` integers (``t = e_y``) or ``(B, k)`` directions, normalised here.
    """

    def __init__(self, floor: float = 1.0) -> None:
        self.floor = positive("floor", floor)

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        """See :meth:`Loss.per_sample`."""
        if target.dim() == 1 and not (target.is_floating_point() or target.is_complex()):
            labels, valid = class_labels(output, target)
            products = output.gather(1, labels.unsqueeze(1)).squeeze(1)
        else:
            scores, directions = matching(output, target)
            lengths = torch.linalg.vector_norm(directions, dim=1)
            valid = lengths > 0
            products = (scores * directions).sum(1) / torch.where(valid, lengths, torch.ones_like(lengths))
        norms = torch.linalg.vector_norm(output.flatten(1), dim=1).clamp(min=self.floor)
        return invalid_as_nan(-products / norms, valid)

    def correct(self, output: Tensor, target: Tensor) -> Tensor | None:
        """Where the largest score is that of the label; ``None`` for targets that are directions."""
        return right_class(output, target)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        """``1/K``."""
        return 1.0 / self.floor
