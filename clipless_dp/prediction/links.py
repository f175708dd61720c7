"""From scores to probabilities: what a loss takes the scores for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError
from clipless_dp.losses import (
    BinaryCrossEntropy,
    CosineSimilarity,
    HingeKR,
    Huber,
    Loss,
    MeanAbsoluteError,
    MulticlassHinge,
    TauCrossEntropy,
    class_scores,
)

Kind = Literal["softmax", "logistic", "largest", "number", "scores"]


class Link(NamedTuple):
    """How scores are read.

    Attributes:
        kind: ``"softmax"``: probabilities of classes are ``softmax(scale·z)``. ``"logistic"``: that of the second of
            two is ``sigmoid(scale·z)``. ``"largest"``: the largest score is of the class, and says no probability.
            ``"number"``: a score is the prediction. ``"scores"``: nothing is known of them.
        scale: ``τ`` of the loss.
    """

    kind: Kind
    scale: float = 1.0

    @classmethod
    def of(cls, loss: Loss, outputs: int) -> Link:
        """What a loss takes the scores for; of a loss that is none of this package's, nothing is known.

        Args:
            loss: that the network was trained by.
            outputs: numbers of one sample.
        """
        kind = type(loss)
        if isinstance(loss, TauCrossEntropy) and kind is TauCrossEntropy:
            return cls("softmax", loss.tau)
        if isinstance(loss, BinaryCrossEntropy) and kind is BinaryCrossEntropy and outputs == 1:
            return cls("logistic", loss.tau)
        if kind in (MulticlassHinge, CosineSimilarity, HingeKR):
            return cls("largest")
        if kind in (Huber, MeanAbsoluteError):
            return cls("number")
        return cls("scores")

    @classmethod
    def read(cls, value: Sequence[object]) -> Link:
        """One that was written to a file, as a list.

        Raises:
            ValueError: it is none.
        """
        kind, scale = value
        if kind not in get_args(Kind):
            raise ValueError(f"{kind!r} is no link")
        return cls(cast(Kind, kind), float(cast(float, scale)))

    @property
    def is_of_classes(self) -> bool:
        """Whether the prediction is a class."""
        return self.kind in ("softmax", "logistic", "largest")

    def probabilities(self, scores: Tensor) -> Tensor:
        """``(B, C)``, which add up to one.

        Raises:
            ConfigurationError: the loss says none.
        """
        if self.kind == "softmax":
            return torch.softmax(self.scale * scores, 1)
        if self.kind == "logistic":
            second = torch.sigmoid(self.scale * scores.reshape(-1))
            return torch.stack([1.0 - second, second], 1)
        raise ConfigurationError(
            "the loss that the model was trained by says no probabilities: scores() has what it says. "
            "losses.TauCrossEntropy and BinaryCrossEntropy do"
        )

    def classes(self, scores: Tensor) -> Tensor:
        """Indices of the classes predicted, ``(B,)``."""
        if self.kind == "logistic":
            return (scores.reshape(-1) > 0.0).long()
        return class_scores(scores).argmax(1)
