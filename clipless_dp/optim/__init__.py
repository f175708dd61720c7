"""Optimizers that add calibrated noise, record what was released, and project back onto the constraints."""

from clipless_dp.errors import PrivacyWarning
from clipless_dp.optim.optimizer import STATE_FORMAT, CliplessDPOptimizer, CliplessDPSGD, Rates, Sampling

__all__ = ["STATE_FORMAT", "CliplessDPOptimizer", "CliplessDPSGD", "PrivacyWarning", "Rates", "Sampling"]
