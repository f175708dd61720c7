"""What all audits that bound ε from below answer."""

from __future__ import annotations

from dataclasses import dataclass

from clipless_dp.errors import ConfigurationError


@dataclass(frozen=True)
class EpsilonAudit:
    """A lower bound on ε, measured, beside the ε that is stated.

    Attributes:
        lower_bound: ε is at least this at ``delta``, with ``confidence``.
        epsilon: what the accountant states at ``delta``.
        delta: δ.
        confidence: of the lower bound.
    """

    lower_bound: float
    epsilon: float
    delta: float
    confidence: float

    @property
    def passed(self) -> bool:
        """False where the measured lower bound is above the stated ε: training leaks more than it is accounted for."""
        return self.lower_bound <= self.epsilon

    def headline(self, kind: str) -> str:
        """The verdict in a line."""
        verdict = "not refuted" if self.passed else "REFUTED: it leaks more than is stated"
        return (
            f"{kind}: ε ≥ {self.lower_bound:.3f} with {100 * self.confidence:g} % confidence, "
            f"stated ε = {self.epsilon:.3f}, at δ = {self.delta:g}: {verdict}"
        )


def check_levels(delta: float, confidence: float) -> None:
    """Refuses a δ outside [0, 1) and a confidence outside [0.5, 1).

    Raises:
        ConfigurationError: one of them is.
    """
    if not 0.0 <= delta < 1.0 or not 0.5 <= confidence < 1.0:
        raise ConfigurationError(f"delta must lie in [0, 1) and confidence in [0.5, 1), got {delta!r}, {confidence!r}")
