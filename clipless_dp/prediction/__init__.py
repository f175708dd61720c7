"""Predictions of trained models, and the file that carries them to another process."""

from clipless_dp.prediction.files import ODD, Content, Probe, content_of, read_result, rebuilt
from clipless_dp.prediction.links import Link
from clipless_dp.prediction.predictor import Predictor, Predicts, Promise
from clipless_dp.prediction.whole import Whole

__all__ = [
    "ODD",
    "Content",
    "Link",
    "Predictor",
    "Predicts",
    "Probe",
    "Promise",
    "Whole",
    "content_of",
    "read_result",
    "rebuilt",
]
