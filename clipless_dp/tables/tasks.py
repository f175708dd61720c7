"""What is learnt of a table, classes or a number: each reads its labels and starts from a charged statistic of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.arguments import share
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.losses import BinaryCrossEntropy, Huber, TauCrossEntropy, balanced_weights
from clipless_dp.losses.base import Loss
from clipless_dp.sampling.cells import Cells, as_numbers, cells_of, is_missing, places_of
from clipless_dp.statistics import private_fraction, private_moments, private_shares

_LARGEST = 1e30
"""Of the ends of a range of targets: sums and products of them are float32 numbers, too."""

_GATE = 0.5
"""Of a gradient that is at most 1: rows that are far off count no more than those of even odds."""


@dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        loss: with class weights, if there are any.
        bias: of the layer, ``(outputs,)``; it does not train.
        cap: of each row's cotangent.
        targets: from labels that the task has read to those of the loss.
        head: from the layer's outputs ``(B, outputs)`` to scores.
        rate: factor of the learning rate, relative to that of two classes.
        largest_rate: the largest one. With momentum 0.9 descent is stable below ``3.8/(cλ)``, ``c`` the loss's
            curvature and ``λ ≤ 1`` the largest eigenvalue of the features' second moments, most often below ¼.
    """

    loss: Loss
    bias: Tensor
    cap: float
    targets: Callable[[Tensor], Tensor]
    head: nn.Module
    rate: float
    largest_rate: float


class Task(ABC):
    """What is learnt.

    Attributes:
        told: what was public and what is charged of the labels, in words.
        settings: the public choices, as plain values.
    """

    told: str
    settings: dict[str, Any]

    @abstractmethod
    def read(self, labels: Any, rows: int) -> Tensor:
        """Labels as numbers ``(N,)``, or a refusal, before anything is released.

        Raises:
            InputError: they are of another number, shape or type, or there is one that cannot be.
        """

    @abstractmethod
    def start(self, labels: Tensor, noise_multiplier: float, **release: Any) -> Start:
        """Releases what training starts from."""


class Classes(Task):
    """Labels that are one of several public ones.

    Args:
        classes: all of them; ``None``: 0 and 1.
        balance: ``p`` of :func:`clipless_dp.losses.balanced_weights`.

    Raises:
        ConfigurationError: there are fewer than two, or one twice, or one that has no hash or is NaN, or the power is
            out of range.
    """

    def __init__(self, classes: Sequence[Any] | None, balance: float) -> None:
        if classes is not None and (isinstance(classes, (str, Tensor)) or not isinstance(classes, Sequence)):
            raise ConfigurationError(f"classes must be a list of all labels there can be, got {classes!r}")
        self.classes = (0, 1) if classes is None else tuple(classes)
        self.balance = share("balance", balance, "[0, 1]")
        try:
            self._index = {label: index for index, label in enumerate(self.classes)}
        except TypeError:
            raise ConfigurationError(f"classes must be values that can be told apart, got {self.classes!r}") from None
        if any(label is not None and is_missing(label) for label in self.classes):
            raise ConfigurationError(f"a missing label (NaN, NA) is no class, got {self.classes!r}")
        if len(self.classes) < 2 or len(self._index) < len(self.classes):
            raise ConfigurationError(f"classes must be two or more, none of them twice, got {self.classes!r}")
        charged = "the share of the second was" if len(self.classes) == 2 else "the shares of all were"
        # Labels may be of any type, which a checkpoint does not hold.
        self.settings = {"classes": [repr(label) for label in self.classes], "balance": float(self.balance)}
        self.told = f"Labels: which there are was public ({len(self.classes)}); {charged} charged."

    def read(self, labels: Any, rows: int) -> Tensor:
        """See :meth:`Task.read`."""
        if isinstance(labels, Tensor):
            if labels.shape != (rows,) or labels.is_complex():
                raise InputError(f"expected {rows} labels {self._shown()}, got {labels.dtype} {tuple(labels.shape)}")
            if self.classes == (0, 1):
                if not bool(((labels == 0) | (labels == 1)).all()):
                    raise InputError("labels must be 0 or 1; others would contribute nothing")
                return labels.detach()
        index = places_of(_cells(labels, rows), self._index, "labels")
        if strangers := int((index < 0).sum()):
            raise InputError(
                f"{strangers} of {rows} labels are none of {self._shown()}: a label must be one of those that classes= "
                "names, which is all that there can be"
            )
        return torch.from_numpy(index)

    def _shown(self) -> str:
        return " or ".join(map(repr, self.classes[:8])) + (" or …" if len(self.classes) > 8 else "")

    def start(self, labels: Tensor, noise_multiplier: float, **release: Any) -> Start:
        """See :meth:`Task.start`: from the charged shares, as logarithms."""
        if len(self.classes) > 2:
            shares = private_shares(labels, len(self.classes), noise_multiplier=noise_multiplier, **release)
        else:
            positive = private_fraction(labels, noise_multiplier=noise_multiplier, **release)
            shares = (1.0 - positive, positive)
        weights = balanced_weights(shares, self.balance) if self.balance else None
        largest = 1.0 if weights is None else max(weights)
        odds = [math.log(part) + (0.0 if weights is None else math.log(weights[at])) for at, part in enumerate(shares)]
        if len(self.classes) == 2:
            binary = BinaryCrossEntropy(class_weights=weights)
            return Start(
                binary, torch.tensor([odds[1] - odds[0]]), _GATE * largest, Tensor.float, nn.Flatten(0), 1.0, 60.0
            )
        centre = sum(odds) / len(odds)
        return Start(
            TauCrossEntropy(class_weights=weights),
            torch.tensor([one - centre for one in odds]),
            # Two rows of even odds are as far off here as there.
            math.sqrt(2.0) * _GATE * largest,
            Tensor.long,
            nn.Identity(),
            1.0,
            # The curvature of the softmax is at most ½, that of the logistic function ¼.
            30.0,
        )


class Numbers(Task):
    """Labels that are numbers of a public range, to which they are cut.

    Args:
        target_range: its two ends.

    Raises:
        ConfigurationError: they are not two finite numbers, the lower first, or float32 does not hold them.
    """

    def __init__(self, target_range: tuple[float, float]) -> None:
        try:
            low, high = (float(end) for end in target_range)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"target_range must be two numbers, got {target_range!r}") from error
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigurationError(f"target_range must be two finite numbers, the lower first, got {target_range!r}")
        if max(abs(low), abs(high)) > _LARGEST or high - low < 1.0 / _LARGEST:
            raise ConfigurationError(
                f"target_range must lie within {_LARGEST:g} of zero and be wider than {1.0 / _LARGEST:g}, got "
                f"{target_range!r}: predictions are float32. Give targets in other units"
            )
        self.target_range = (low, high)
        self.settings = {"target_range": [low, high]}
        self.told = f"Targets: their range, {low:g} to {high:g}, was public; their mean and deviation were charged."

    def read(self, labels: Any, rows: int) -> Tensor:
        """See :meth:`Task.read`: numbers in [-1, 1]."""
        if isinstance(labels, Tensor):
            numbers = labels.detach()
        else:
            numbers = torch.from_numpy(as_numbers(_cells(labels, rows), "the targets of a regression"))
        if numbers.shape != (rows,) or numbers.is_complex() or bool(torch.isnan(numbers).any()):
            raise InputError(
                f"expected {rows} numbers, none of them missing, got {numbers.dtype} {tuple(numbers.shape)}"
            )
        low, high = self.target_range
        return ((numbers.double().clamp(low, high) - low) * (2.0 / (high - low)) - 1.0).clamp(-1.0, 1.0)

    def start(self, labels: Tensor, noise_multiplier: float, **release: Any) -> Start:
        """See :meth:`Task.start`: from the charged mean, in units of the charged deviation."""
        moments = private_moments(labels[:, None], norm=1.0, noise_multiplier=noise_multiplier, **release)
        mean, deviation = float(moments.mean[0].clamp(-1.0, 1.0)), float(moments.variance[0].sqrt().clamp(max=1.0))
        low, high = self.target_range
        half = 0.5 * (high - low)
        return Start(
            Huber(),
            torch.zeros(1),
            _OUTLYING,
            lambda numbers: ((numbers - mean) / deviation).float(),
            regression_head(half * deviation, low + half * (1.0 + mean)),
            0.5,
            # The curvature of squares is 1.
            8.0,
        )


_OUTLYING = 0.5
"""Of a residual in deviations: beyond it rows count no more, and squares become absolute values."""


class _Affine(nn.Module):
    """``scale·z + shift``, numbers that were released."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, values: Tensor) -> Tensor:
        return self.scale * values + self.shift


def regression_head(scale: float, shift: float) -> nn.Module:
    """From the layer's output ``(B, 1)`` to numbers ``(B,)`` in units of the labels."""
    return nn.Sequential(nn.Flatten(0), _Affine(scale, shift))


def _cells(labels: Any, rows: int) -> Cells:
    cells = cells_of(labels, "labels")
    if len(cells) != rows:
        raise InputError(f"expected a label for each of {rows} rows, got {len(cells)} of them")
    return cells
