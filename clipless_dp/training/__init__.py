"""Training in one call: what is asked for, the plan of its steps, the run, its history and its checkpoints."""

from clipless_dp.training.fit import (
    OPTIMIZERS,
    BatchLoss,
    Data,
    EpochRecord,
    FitResult,
    NoiseSchedule,
    OptimizerFactory,
    SchedulerFactory,
    compiled_loss,
    constant,
    evaluate,
    fit,
    linear_decay,
    noise_factors,
    noise_stages,
)

__all__ = [
    "OPTIMIZERS",
    "BatchLoss",
    "Data",
    "EpochRecord",
    "FitResult",
    "NoiseSchedule",
    "OptimizerFactory",
    "SchedulerFactory",
    "compiled_loss",
    "constant",
    "evaluate",
    "fit",
    "linear_decay",
    "noise_factors",
    "noise_stages",
]
