"""How noise is shared among the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from clipless_dp.errors import ConfigurationError

Allocation = Literal["global", "per-layer", "min-variance"]


def allocate(
    sensitivities: Sequence[float],
    sizes: Sequence[int],
    noise_multiplier: float,
    scheme: Allocation = "global",
) -> list[float]:
    """Standard deviation of each parameter's noise, all schemes having the same effective noise multiplier.

    * ``"global"``: ``σ_θ = σ·Δ`` with ``Δ² = Σ Δ_θ²``.
    * ``"per-layer"``: ``σ_θ = σ·√D·Δ_θ`` over the ``D`` parameters.
    * ``"min-variance"``: ``σ_θ² ∝ Δ_θ/√p_θ``, which minimises the total variance ``Σ p_θσ_θ²`` (Lagrange) at the
      given effective noise multiplier.

    Args:
        sensitivities: ``Δ_θ``; a parameter of zero sensitivity needs no noise and gets none.
        sizes: ``p_θ``, entries of each parameter.
        noise_multiplier: ``σ``.
        scheme: as above.

    Raises:
        ConfigurationError: the scheme is unknown.
    """
    active = [(delta, size) for delta, size in zip(sensitivities, sizes, strict=True) if delta > 0]
    if scheme == "global":
        total = math.hypot(*(delta for delta, _ in active))
        return [noise_multiplier * total if delta > 0 else 0.0 for delta in sensitivities]
    if scheme == "per-layer":
        return [noise_multiplier * math.sqrt(len(active)) * delta for delta in sensitivities]
    if scheme == "min-variance":
        scale = noise_multiplier * math.sqrt(sum(delta * math.sqrt(size) for delta, size in active))
        return [
            scale * math.sqrt(delta / math.sqrt(size)) if delta > 0 else 0.0
            for delta, size in zip(sensitivities, sizes, strict=True)
        ]
    raise ConfigurationError(f"allocation must be 'global', 'per-layer' or 'min-variance', got {scheme!r}")


def effective_noise_multiplier(sensitivities: Sequence[float], deviations: Sequence[float]) -> float:
    """``σ_eff = (Σ (Δ_θ/σ_θ)²)^(-½)``: the joint Gaussian mechanism's noise multiplier.

    The parts are independent Gaussian mechanisms on one sample's joint contribution, so rescaling each part by
    ``1/σ_θ`` makes them one mechanism of unit noise and sensitivity ``(Σ (Δ_θ/σ_θ)²)^½``.
    """
    ratio = math.hypot(*(d / s for d, s in zip(sensitivities, deviations, strict=True) if d > 0))
    return math.inf if ratio == 0 else 1.0 / ratio
