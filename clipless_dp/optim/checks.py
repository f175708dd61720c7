"""What an optimizer asks of its arguments."""

from __future__ import annotations

import math

from torch.optim import LBFGS, Optimizer, SparseAdam

from clipless_dp.errors import ConfigurationError
from clipless_dp.noise import Allocation, allocate
from clipless_dp.optim.charging import Sampling


def refuse_arguments(base: Optimizer, sample_rate: float, dataset_size: int, allocation: Allocation) -> None:
    """Refuses arguments that are out of range."""
    _refuse_closures(base)
    if not 0.0 < sample_rate <= 1.0:
        raise ConfigurationError(
            f"sample_rate must lie in (0, 1], got {sample_rate!r}; above 1 the batch exceeds the data set"
        )
    if not (isinstance(dataset_size, int) and dataset_size >= 1):
        raise ConfigurationError(f"dataset_size must be a positive integer, got {dataset_size!r}")
    allocate([1.0], [1], 1.0, allocation)


def checked_multiplier(value: float) -> float:
    """A noise multiplier."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ConfigurationError(f"noise_multiplier must be finite and positive, got {value!r}")
    return float(value)


def checked_sampling(value: Sampling) -> Sampling:
    """How batches are drawn."""
    if value not in ("announced", "poisson", "none"):
        raise ConfigurationError(f"sampling must be 'announced', 'poisson' or 'none', got {value!r}")
    return value


def _refuse_closures(base: Optimizer) -> None:
    """Refuses optimizers that take more than one dense gradient a step.

    Raises:
        ConfigurationError: the optimizer is one.
    """
    if isinstance(base, (LBFGS, SparseAdam)):
        raise ConfigurationError(
            f"{type(base).__name__} evaluates gradients several times a step or needs sparse ones; "
            "use SGD, Adam or another first-order optimizer"
        )
