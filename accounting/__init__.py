"""Privacy accounting that never underestimates: NumPy and SciPy only, usable with any DP library."""

from __future__ import annotations

from .accountants import Accountant, AutoAccountant, PRVAccountant, RDPAccountant, create_accountant
from .bounds import PrivacyBound
from .calibration import (
    calibrate_ledger,
    calibrate_noise_multiplier,
    calibrate_sample_rate,
    calibrate_steps,
)
from .errors import (
    AccountingError,
    AccountingWarning,
    EngineRangeError,
    FallbackWarning,
    InvalidParameterError,
    LargeDeltaWarning,
    LedgerFormatError,
    MixedUnitsError,
    UnreachableTargetError,
    UnsupportedEventError,
)
from .events import (
    ADD_OR_REMOVE_ONE,
    CHANGE_OF_A_SUM,
    REPLACE_ONE,
    FixedSizeSampling,
    GaussianRelease,
    GaussianStep,
    GaussianVectorStep,
    LaplaceRelease,
    NoSampling,
    PoissonSampling,
    Repeat,
    ShuffledEpoch,
    repeat,
)
from .ledger import Ledger, Line
from .provenance import Provenance, new_run
from .risk import FALSE_POSITIVE_RATES, TradeOff, trade_off
from .second_opinion import Opinion, SecondOpinion, second_opinion
from .selection import AnyOf, PrivateSelection
from .units import SamplingComparison, SamplingFigures, compare_samplings

__all__ = [
    "ADD_OR_REMOVE_ONE",
    "CHANGE_OF_A_SUM",
    "FALSE_POSITIVE_RATES",
    "REPLACE_ONE",
    "Accountant",
    "AccountingError",
    "AccountingWarning",
    "AnyOf",
    "AutoAccountant",
    "EngineRangeError",
    "FallbackWarning",
    "FixedSizeSampling",
    "GaussianRelease",
    "GaussianStep",
    "GaussianVectorStep",
    "InvalidParameterError",
    "LaplaceRelease",
    "LargeDeltaWarning",
    "Ledger",
    "LedgerFormatError",
    "Line",
    "MixedUnitsError",
    "NoSampling",
    "Opinion",
    "PRVAccountant",
    "PoissonSampling",
    "PrivacyBound",
    "PrivateSelection",
    "Provenance",
    "RDPAccountant",
    "Repeat",
    "SamplingComparison",
    "SamplingFigures",
    "SecondOpinion",
    "ShuffledEpoch",
    "TradeOff",
    "UnreachableTargetError",
    "UnsupportedEventError",
    "calibrate_ledger",
    "calibrate_noise_multiplier",
    "calibrate_sample_rate",
    "calibrate_steps",
    "compare_samplings",
    "create_accountant",
    "new_run",
    "repeat",
    "second_opinion",
    "trade_off",
]
