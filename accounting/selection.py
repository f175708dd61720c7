"""Private hyper-parameter search: run a mechanism a random number of times, keep the best run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from . import _validation as check
from .errors import InvalidParameterError
from .events import register
from .rdp import Cumulant, rdp_to_delta

__all__ = ["AnyOf", "PrivateSelection"]

Array = NDArray[np.float64]


@register
@dataclass(frozen=True)
class AnyOf:
    """One of several mechanisms, chosen without looking at the data, at random or not.

    Its Rényi divergence is at most the largest of theirs at each order, whether or not the choice is released: Rényi
    divergences are quasi-convex. So a trial of a search may draw its hyper-parameters, batch sizes and steps included.

    Attributes:
        alternatives: The events of each mechanism, pairs (event, count).

    Source:
        Van Erven and Harremoës 2014, *Rényi divergence and Kullback-Leibler divergence*, Theorem 13.
    """

    kind: ClassVar[str] = "any_of"
    alternatives: tuple[tuple[tuple[Any, int], ...], ...]

    def __post_init__(self) -> None:
        if not self.alternatives:
            raise InvalidParameterError("alternatives must not be empty")
        object.__setattr__(
            self,
            "alternatives",
            tuple(tuple((event, check.count(n, "count")) for event, n in events) for events in self.alternatives),
        )


@register
@dataclass(frozen=True)
class PrivateSelection:
    """K runs of the same training, K random and secret; only the best run is released.

    K follows the negative binomial distribution truncated to K ≥ 1 with shape η (η = 1: geometric,
    η = 0: logarithmic), or the Poisson distribution (η = ∞; nothing is released when K = 0).

    Attributes:
        trial: The events of one run, pairs (event, count).
        mean: E[K], at least 1 for finite shape, positive for Poisson.
        shape: η ≥ 0, or infinity for Poisson.

    Source:
        Papernot and Steinke 2022, *Hyperparameter tuning with Rényi differential privacy*,
        Theorems 2 and 6.
    """

    kind: ClassVar[str] = "private_selection"
    trial: tuple[tuple[Any, int], ...]
    mean: float
    shape: float | str

    def __post_init__(self) -> None:
        # JSON knows no infinity: the Poisson shape is stored by its name.
        shape = math.inf if self.shape == "poisson" else self.shape
        if isinstance(shape, str) or math.isnan(shape) or shape < 0.0:
            raise InvalidParameterError(f"shape must be at least 0, or 'poisson', got {self.shape!r}")
        object.__setattr__(self, "shape", "poisson" if shape == math.inf else float(shape))
        mean = check.target_epsilon(self.mean, "mean")
        if mean < 1.0 and shape != math.inf:
            raise InvalidParameterError(f"mean must be at least 1, got {self.mean!r}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "trial", tuple((event, check.count(n, "count")) for event, n in self.trial))

    @property
    def gamma(self) -> float:
        """Parameter γ of the truncated negative binomial distribution with this mean, rounded down."""
        if self.shape == "poisson":
            raise InvalidParameterError("the Poisson distribution has no gamma")
        shape = float(self.shape)
        low, high = 0.0, 1.0
        for _ in range(200):
            middle = 0.5 * (low + high) if low > 1e-6 else math.sqrt(max(low, 1e-300) * high)
            if not low < middle < high:
                break
            if _negative_binomial_mean(middle, shape) < self.mean:
                high = middle
            else:
                low = middle
        return low if low > 0.0 else high

    def quantile(self, share: float) -> int:
        """Returns K for a `share` drawn uniformly from [0, 1) by a cryptographic generator.

        K must stay secret, and so must the share, the other runs, and how long all of them took.
        """
        if not 0.0 <= share < 1.0:
            raise InvalidParameterError(f"share must lie in [0, 1), got {share!r}")
        if self.shape == "poisson":
            first, shape, fail, log_probability = 0, 0.0, 0.0, -self.mean
        else:
            gamma = self.gamma
            first, shape, fail = 1, float(self.shape), 1.0 - gamma
            odds = -shape * math.log(gamma)
            # log of γ^(-η) - 1 over η, which is log(1/γ) where η vanishes.
            total = math.log(-math.log(gamma)) if shape == 0.0 else odds + math.log(-math.expm1(-odds) / shape)
            log_probability = math.log(fail) - total
        count, below = first, math.exp(log_probability)
        while below <= share:
            factor = (self.mean if first == 0 else fail * (count + shape)) / (count + 1)
            count += 1
            log_probability += math.log(factor)
            more = math.exp(log_probability)
            if 0.0 < below == below + more and factor < 1.0:
                break  # What is left is below rounding.
            below += more
        return count

    def cumulant(self, trial: Cumulant) -> Cumulant:
        """Returns the bound of K(t) of the search, given that of one run."""
        orders = np.geomspace(1e-3, 2e3, 60)

        def truncated(t: Array) -> Array:
            shape = float(self.shape)
            constant = (1.0 + shape) * float(np.min((trial(orders) - math.log(self.gamma)) / (orders + 1.0)))
            value: Array = trial(t) + t * constant + math.log(self.mean)
            return value

        def poisson(t: Array) -> Array:
            base = trial(t)
            delta = np.array([rdp_to_delta(trial, math.log1p(1.0 / s))[0] for s in t])
            value: Array = base + t * self.mean * delta + max(math.log(self.mean), 0.0)
            return value

        return poisson if self.shape == "poisson" else truncated


def _negative_binomial_mean(gamma: float, shape: float) -> float:
    """E[K] = η(1 − γ) / (γ(1 − γ^η)), and (1/γ − 1)/log(1/γ) for η = 0."""
    odds = 1.0 / gamma - 1.0
    if shape == 0.0:
        return odds / -math.log(gamma)
    return shape * odds / -math.expm1(shape * math.log(gamma))
