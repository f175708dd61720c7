"""Optimizers that add calibrated noise, record what was released, and project back onto the constraints."""

from clipless_dp.errors import PrivacyWarning
from clipless_dp.optim.adam import AdamBC
from clipless_dp.optim.adaptation import CapRecord
from clipless_dp.optim.books import STATE_FORMAT, Rates
from clipless_dp.optim.charging import Sampling
from clipless_dp.optim.optimizer import CliplessDPOptimizer
from clipless_dp.optim.sgd import CliplessDPSGD
from clipless_dp.optim.sharpness import SharpnessAwareAdam, SharpnessAwareSGD

__all__ = [
    "STATE_FORMAT",
    "AdamBC",
    "CapRecord",
    "CliplessDPOptimizer",
    "CliplessDPSGD",
    "PrivacyWarning",
    "Rates",
    "Sampling",
    "SharpnessAwareAdam",
    "SharpnessAwareSGD",
]
