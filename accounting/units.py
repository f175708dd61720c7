"""Two ways to protect a person who has several rows, compared by their noise, without looking at data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import _validation as check
from .accountants import create_accountant
from .calibration import calibrate_noise_multiplier
from .errors import InvalidParameterError
from .events import ADD_OR_REMOVE_ONE, Relation

__all__ = ["SamplingComparison", "SamplingFigures", "compare_samplings"]

_TIE = 1e-3
"""Relative difference that calibration and grids may make."""


@dataclass(frozen=True)
class SamplingFigures:
    """What one way of sampling costs.

    Attributes:
        noise_multiplier: σ, noise standard deviation over the bound of one row's gradient.
        epsilon: ε for a whole person.
        relative_noise: Noise standard deviation over the sum of gradients that a step expects, were each of them of
            full norm and all aligned: σ over the expected number of averages, or rows, in a batch.
    """

    noise_multiplier: float
    epsilon: float
    relative_noise: float


@dataclass(frozen=True)
class SamplingComparison:
    """Sampling people, each counting as the average of their rows, against sampling rows with group privacy.

    Attributes:
        by_person: Figures of Poisson sampling over people.
        by_row: Figures of Poisson sampling over rows, accounted for as groups of `rows_per_person`.
        better: `"person"` or `"row"`: less relative noise at one ε, or a smaller ε at one relative noise. What differs
            by less than a thousandth is a tie, and a person's: no cap on rows has to be kept for that guarantee.
        ratio: The other's figure over the better one's.
    """

    by_person: SamplingFigures
    by_row: SamplingFigures
    better: Literal["person", "row"]
    ratio: float

    def __str__(self) -> str:
        rows = [("sampling", "noise multiplier", "epsilon", "relative noise")]
        rows += [
            (name, f"{one.noise_multiplier:.4g}", f"{one.epsilon:.4g}", f"{one.relative_noise:.4g}")
            for name, one in (("people", self.by_person), ("rows", self.by_row))
        ]
        lines = ["  ".join(cell.ljust(16) for cell in row).rstrip() for row in rows]
        chosen = {"person": "people", "row": "rows"}[self.better]
        return "\n".join([*lines, f"sample {chosen}: the other way costs {self.ratio:.3g} times as much"])


def compare_samplings(
    *,
    people: int,
    rows_per_person: int,
    sample_rate: float,
    steps: int,
    delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    mean_rows: float | None = None,
    relation: Relation = ADD_OR_REMOVE_ONE,
    accountant: str = "prv",
) -> SamplingComparison:
    """Says by public numbers which sampling protects whole people with less noise relative to the signal.

    With m rows of a person on average and N people, a step expects qN averages or qNm rows, each of norm at most 1:
    the relative noise is σ/(qN) by person, σ_k/(qNm) by row, where σ_k is the σ of a group of k rows. Both ways
    read the same number of rows in expectation. That a person's average varies less than a row does, is no part of it:
    in both ways a batch averages over as many rows.

    Args:
        people: N.
        rows_per_person: k, the cap: nobody has, or keeps, more rows.
        sample_rate: q, of people and of rows alike.
        steps: Number of steps.
        delta: In (0, 1), for a person.
        target_epsilon: ε of a person to be met by both; the noise is compared.
        noise_multiplier: Instead: σ by person; both then have this relative noise, and ε is compared.
        mean_rows: m, rows of a person on average once capped, in (0, k]; k where it is left out.
        relation: Neighbouring relation; replacing replaces a person by another.
        accountant: Name of the engine, as in `create_accountant`.

    Raises:
        InvalidParameterError: When a value lies outside its range, or not one of ε and σ is given.
        UnreachableTargetError: When no noise reaches the target.
    """
    n = check.count(people, "people", 1)
    k = check.count(rows_per_person, "rows_per_person", 1)
    q = check.sample_rate(sample_rate)
    mean = float(k) if mean_rows is None else check.target_epsilon(mean_rows, "mean_rows")
    if mean > k:
        raise InvalidParameterError(f"mean_rows {mean!r} exceeds rows_per_person {k}, the most that anybody has")
    if q == 0.0:
        raise InvalidParameterError("sample_rate 0 samples nobody: there is nothing to compare")
    if (target_epsilon is None) == (noise_multiplier is None):
        raise InvalidParameterError("give one of target_epsilon and noise_multiplier: the other one is compared")

    def figures(sigma: float, weight: float, group_size: int) -> SamplingFigures:
        probe = create_accountant(accountant, relation=relation)
        probe.step(noise_multiplier=sigma, sample_rate=q, steps=steps)
        epsilon = float(probe.get_epsilon(delta, group_size=group_size))
        return SamplingFigures(sigma, epsilon, sigma / (q * n * weight))

    def calibrated(group_size: int, weight: float) -> SamplingFigures:
        assert target_epsilon is not None
        sigma = calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            delta=delta,
            sample_rate=q,
            steps=steps,
            accountant=accountant,
            relation=relation,
            group_size=group_size,
        )
        return figures(sigma, weight, group_size)

    if noise_multiplier is None:
        by_person, by_row = calibrated(1, 1.0), calibrated(k, mean)
        costs = by_person.relative_noise, by_row.relative_noise
    else:
        sigma = check.noise_multiplier(noise_multiplier)
        by_person, by_row = figures(sigma, 1.0, 1), figures(sigma * mean, mean, k)
        costs = by_person.epsilon, by_row.epsilon
    better: Literal["person", "row"] = "row" if costs[1] < (1.0 - _TIE) * costs[0] else "person"
    least = min(costs)
    return SamplingComparison(by_person, by_row, better, max(costs) / least if least > 0.0 else 1.0)
