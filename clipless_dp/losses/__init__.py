"""Losses that state the bound of their gradient with respect to the network's output.

Each is a sum over samples of a term that depends on that sample alone. The bound sets the cotangent gate, so a
loss that overshoots its own bound costs accuracy but never privacy.
"""

from clipless_dp.losses.base import BoundedLoss, Loss, described
from clipless_dp.losses.classification import (
    BinaryCrossEntropy,
    CosineSimilarity,
    HingeKR,
    MulticlassHinge,
    TauCrossEntropy,
    balanced_weights,
    class_scores,
)
from clipless_dp.losses.maximum_norm import LInfMargin
from clipless_dp.losses.regression import Huber, MeanAbsoluteError, Quantization
from clipless_dp.losses.tokens import CausalCrossEntropy, TokenCrossEntropy
from clipless_dp.losses.transport import (
    ConvexHingeKR,
    HingeMargin,
    KantorovichRubinstein,
    LogSumExpHKR,
    OffsetCrossEntropy,
    SoftHKR,
)

__all__ = [
    "BinaryCrossEntropy",
    "BoundedLoss",
    "CausalCrossEntropy",
    "ConvexHingeKR",
    "CosineSimilarity",
    "HingeKR",
    "HingeMargin",
    "Huber",
    "KantorovichRubinstein",
    "LInfMargin",
    "LogSumExpHKR",
    "Loss",
    "MeanAbsoluteError",
    "MulticlassHinge",
    "OffsetCrossEntropy",
    "Quantization",
    "SoftHKR",
    "TauCrossEntropy",
    "TokenCrossEntropy",
    "balanced_weights",
    "class_scores",
    "described",
]
