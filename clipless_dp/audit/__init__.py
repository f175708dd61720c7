"""Checks of the guarantee that a user can run: attacks on the bounds, and a lower bound on ε from outside."""

from clipless_dp.audit.canaries import CanaryAudit, canaries
from clipless_dp.audit.gradients import ParameterAudit, SensitivityAudit, sensitivity
from clipless_dp.audit.release import PrivacyAudit, privacy

__all__ = [
    "CanaryAudit",
    "ParameterAudit",
    "PrivacyAudit",
    "SensitivityAudit",
    "canaries",
    "privacy",
    "sensitivity",
]
