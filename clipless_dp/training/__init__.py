"""Training in one call: what is asked for, the plan of its steps, the run, its history and its checkpoints."""

from clipless_dp.model.compiled import BatchLoss, compiled_loss
from clipless_dp.training.evaluation import Data, evaluate
from clipless_dp.training.fit import fit
from clipless_dp.training.groups import OPTIMIZERS, Execution, Keeping, Learning, OptimizerFactory, Privacy
from clipless_dp.training.people import suggest_sampling
from clipless_dp.training.plan import Plan
from clipless_dp.training.result import EpochRecord, FitResult
from clipless_dp.training.schedules import (
    NoiseSchedule,
    SchedulerFactory,
    constant,
    linear_decay,
    noise_factors,
    noise_stages,
    relaxation,
)
from clipless_dp.training.settings import StepNoise, SuggestedSettings, suggest_settings
from clipless_dp.training.unprotected import UnprotectedResult, fit_without_privacy
from clipless_dp.training.watching import Watcher, watched_by

__all__ = [
    "OPTIMIZERS",
    "BatchLoss",
    "Data",
    "EpochRecord",
    "Execution",
    "FitResult",
    "Keeping",
    "Learning",
    "NoiseSchedule",
    "OptimizerFactory",
    "Plan",
    "Privacy",
    "SchedulerFactory",
    "StepNoise",
    "SuggestedSettings",
    "UnprotectedResult",
    "Watcher",
    "compiled_loss",
    "constant",
    "evaluate",
    "fit",
    "fit_without_privacy",
    "linear_decay",
    "noise_factors",
    "noise_stages",
    "relaxation",
    "suggest_sampling",
    "suggest_settings",
    "watched_by",
]
