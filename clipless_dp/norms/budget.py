"""How much work a certificate may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from clipless_dp.errors import NormError

Budget: TypeAlias = Literal["cheap", "coarse", "balanced", "tight"]


@dataclass(frozen=True)
class Effort:
    """What a budget means.

    Attributes:
        factorise: Whether a certificate may factorise a Gram matrix, or must read its bound off the
            entries.
        tolerance: Relative slack of the norm at which a certificate stops looking for a smaller one.
        riesz_slack: Relative slack per axis that replacing all frequencies by a grid may cost.
        explicit_flops: Largest cost of writing a convolution out as a matrix, in multiply-adds.
        between: Relative slack of the squared norm that a coarse grid may cost where all singular values are nearly the
            same, as those of orthogonal convolutions.
        single: Relative slack of the squared norm that the rounding of float32 factorisations may cost elsewhere.
    """

    factorise: bool
    tolerance: float
    riesz_slack: float
    explicit_flops: float
    between: float = 0.0
    single: float = 0.0


_EFFORTS: dict[str, Effort] = {
    "cheap": Effort(factorise=False, tolerance=1e-1, riesz_slack=1e-1, explicit_flops=0.0),
    "coarse": Effort(factorise=True, tolerance=2.5e-4, riesz_slack=5e-3, explicit_flops=1e8, between=2e-3, single=8e-3),
    "balanced": Effort(factorise=True, tolerance=2.5e-4, riesz_slack=5e-3, explicit_flops=1e8, between=7e-4),
    "tight": Effort(factorise=True, tolerance=1e-9, riesz_slack=5e-4, explicit_flops=1e10),
}


def effort_of(budget: str) -> Effort:
    """Looks a budget up.

    Raises:
        NormError: if the name is none of `cheap`, `coarse`, `balanced`, `tight`.
    """
    try:
        return _EFFORTS[budget]
    except (KeyError, TypeError):
        raise NormError(f"budget must be 'cheap', 'coarse', 'balanced' or 'tight', got {budget!r}") from None
