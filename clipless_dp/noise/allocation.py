"""How noise is shared among the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from clipless_dp.arguments import choice
from clipless_dp.errors import PrivacyError
from clipless_dp.noise.adding import RELEASE_MARGIN

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
    checked_allocation(scheme)
    raise AssertionError(scheme)


def checked_allocation(value: object) -> Allocation:
    """How noise is shared.

    Raises:
        ConfigurationError: the scheme is unknown.
    """
    scheme: Allocation = choice("allocation", value, *get_args(Allocation))
    return scheme


def effective_noise_multiplier(sensitivities: Sequence[float], deviations: Sequence[float]) -> float:
    """``σ_eff = (Σ (Δ_θ/σ_θ)²)^(-½)``: the joint Gaussian mechanism's noise multiplier.

    The parts are independent Gaussian mechanisms on one sample's joint contribution, so rescaling each part by
    ``1/σ_θ`` makes them one mechanism of unit noise and sensitivity ``(Σ (Δ_θ/σ_θ)²)^½``.
    """
    ratio = math.hypot(*(d / s for d, s in zip(sensitivities, deviations, strict=True) if d > 0))
    return math.inf if ratio == 0 else 1.0 / ratio


def drawn_deviations(
    sensitivities: Sequence[float],
    sizes: Sequence[int],
    noise_multiplier: float,
    scheme: Allocation = "global",
    *,
    counts: float = 0.0,
    share: float = 0.0,
) -> tuple[list[float], float]:
    """The deviations that a step's noise is drawn with, and the noise multiplier that they are to be recorded with.

    Args:
        sensitivities: ``Δ_θ``, positive.
        sizes: ``p_θ``, entries of each parameter.
        noise_multiplier: ``σ``.
        scheme: as in :func:`allocate`.
        counts: ``Δ_b``: how much one sample changes the counts that are released along, in Euclidean norm.
        share: ``ρ``, of ``σ⁻²``, what these take: they get ``σ_b = σ·Δ_b/√ρ``, and the gradients what is allocated for
            ``σ/√(1-ρ)``, so that ``(Σ (Δ_θ/σ_θ)² + (Δ_b/σ_b)²)^(-½) = σ``.

    Returns:
        ``RELEASE_MARGIN`` times what was allocated, that of the counts last if there are some; and ``σ``, or less if
        rounding made it less.

    Raises:
        PrivacyError: they amount to no positive, finite noise multiplier.
    """
    counted = counts > 0.0
    left = noise_multiplier / math.sqrt(1.0 - share) if counted else noise_multiplier
    planned = allocate(sensitivities, sizes, left, scheme)
    if counted:
        planned.append(noise_multiplier * counts / math.sqrt(share))
    drawn = [deviation * RELEASE_MARGIN for deviation in planned]
    effective = effective_noise_multiplier([*sensitivities, counts] if counted else sensitivities, drawn)
    if not (math.isfinite(effective) and effective > 0):
        raise PrivacyError(f"the noise amounts to a multiplier of {effective!r}; nothing was released")
    # The margin exceeds float64 rounding, so this is the planned value: equal steps stay one line in the ledger.
    return drawn, noise_multiplier if effective >= noise_multiplier else effective
