"""Noise: where random numbers come from, how noise is shared among parameters, and the one way to add it."""

from clipless_dp.noise.adding import RELEASE_MARGIN, add_normal_, noisy
from clipless_dp.noise.allocation import (
    Allocation,
    allocate,
    checked_allocation,
    drawn_deviations,
    effective_noise_multiplier,
)
from clipless_dp.noise.secure import SecureNoise
from clipless_dp.noise.sources import (
    NoiseSource,
    ReproducibleNoise,
    SystemNoise,
    derived_seed,
    is_own,
    noise_source,
    random_state,
    refuse_no_source,
    source_name,
    system_generator,
)

__all__ = [
    "RELEASE_MARGIN",
    "Allocation",
    "NoiseSource",
    "ReproducibleNoise",
    "SecureNoise",
    "SystemNoise",
    "add_normal_",
    "allocate",
    "checked_allocation",
    "derived_seed",
    "drawn_deviations",
    "effective_noise_multiplier",
    "is_own",
    "noise_source",
    "noisy",
    "random_state",
    "refuse_no_source",
    "source_name",
    "system_generator",
]
