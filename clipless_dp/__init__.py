"""Differentially private training of Lipschitz and gated networks, without per-sample gradient clipping."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipless_dp import (
    architectures,
    audit,
    constraints,
    distributed,
    layers,
    losses,
    monotone,
    one_class,
    presets,
    recipes,
    robustness,
)
from clipless_dp.bounds import LayerTightness, Sensitivity, SensitivityTracker, TightnessReport
from clipless_dp.conversion import PrivateTraining, make_private
from clipless_dp.errors import (
    AuditError,
    BudgetExhaustedError,
    CheckpointError,
    CliplessError,
    ConfigurationError,
    InputError,
    LossBoundError,
    NormError,
    PrivacyError,
    PrivacyWarning,
    RankError,
    UnsupportedModuleError,
)
from clipless_dp.former import alias_modules
from clipless_dp.gates import AdaptiveLimit
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.loading import load
from clipless_dp.model import (
    DPLipModel,
    GateSuggestion,
    GateSuggestions,
    WeightAverage,
    passes,
    rescale_,
    suggest_gates,
)
from clipless_dp.noise import ReproducibleNoise, SecureNoise, SystemNoise
from clipless_dp.optim import CliplessDPOptimizer, CliplessDPSGD
from clipless_dp.prediction import Predictor
from clipless_dp.rules import LayerBounds, RuleContext, register_rule
from clipless_dp.sampling import (
    GaussianNoise,
    PoissonBatches,
    PoissonBatchSampler,
    RowAugmentation,
    ShiftAndFlip,
    StreamedBatches,
    poisson_collate,
)
from clipless_dp.statement import PrivacyStatement, report
from clipless_dp.training import (
    FitResult,
    SuggestedSettings,
    UnprotectedResult,
    evaluate,
    fit,
    fit_without_privacy,
    suggest_sampling,
    suggest_settings,
)
from clipless_dp.version import __version__

if TYPE_CHECKING:
    from clipless_dp.estimators import PrivateClassifier as PrivateClassifier
    from clipless_dp.estimators import PrivateRegressor as PrivateRegressor
    from clipless_dp.one_class.detector import PrivateOutlierDetector as PrivateOutlierDetector

alias_modules()


def __getattr__(name: str) -> Any:
    # Estimators need scikit-learn, which nothing else here imports.
    if name not in ("PrivateClassifier", "PrivateOutlierDetector", "PrivateRegressor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        room = "one_class.detector" if name == "PrivateOutlierDetector" else "estimators"
        estimators = import_module(f"clipless_dp.{room}")
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{name} needs scikit-learn: pip install 'clipless-dp[sklearn]'") from error
    return getattr(estimators, name)


__all__ = [
    "AdaptiveLimit",
    "AuditError",
    "BudgetExhaustedError",
    "CheckpointError",
    "CliplessDPOptimizer",
    "CliplessDPSGD",
    "CliplessError",
    "ConfigurationError",
    "DPLipModel",
    "FitResult",
    "GateSuggestion",
    "GateSuggestions",
    "GaussianNoise",
    "InputError",
    "LayerBounds",
    "LayerTightness",
    "LossBoundError",
    "NormError",
    "PoissonBatchSampler",
    "PoissonBatches",
    "Predictor",
    "PrivacyError",
    "PrivacyStatement",
    "PrivacyWarning",
    "PrivateTraining",
    "RankError",
    "ReproducibleNoise",
    "RowAugmentation",
    "RuleContext",
    "SecureNoise",
    "Sensitivity",
    "SensitivityTracker",
    "ShiftAndFlip",
    "StreamedBatches",
    "SuggestedSettings",
    "SystemNoise",
    "TightnessReport",
    "UnprotectedResult",
    "UnsupportedModuleError",
    "WeightAverage",
    "__version__",
    "architectures",
    "audit",
    "constraints",
    "distributed",
    "evaluate",
    "fit",
    "fit_without_privacy",
    "gated",
    "gradient_gated",
    "layers",
    "load",
    "losses",
    "make_private",
    "monotone",
    "one_class",
    "passes",
    "poisson_collate",
    "presets",
    "recipes",
    "register_rule",
    "report",
    "rescale_",
    "robustness",
    "suggest_gates",
    "suggest_sampling",
    "suggest_settings",
]
