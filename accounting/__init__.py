"""Privacy accounting that never underestimates: NumPy and SciPy only, usable with any DP library."""

from __future__ import annotations

from .accountants import Accountant, AutoAccountant, PRVAccountant, RDPAccountant, create_accountant
from .bounds import PrivacyBound
from .calibration import calibrate_noise_multiplier
from .errors import (
    AccountingError,
    AccountingWarning,
    EngineRangeError,
    FallbackWarning,
    InvalidParameterError,
    LargeDeltaWarning,
    LedgerFormatError,
    UnreachableTargetError,
    UnsupportedEventError,
)

__all__ = [
    "Accountant",
    "AccountingError",
    "AccountingWarning",
    "AutoAccountant",
    "EngineRangeError",
    "FallbackWarning",
    "InvalidParameterError",
    "LargeDeltaWarning",
    "LedgerFormatError",
    "PRVAccountant",
    "PrivacyBound",
    "RDPAccountant",
    "UnreachableTargetError",
    "UnsupportedEventError",
    "calibrate_noise_multiplier",
    "create_accountant",
]
