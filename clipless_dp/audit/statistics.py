"""From how often an adversary was right to a lower bound on ε, with confidence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special, stats

from accounting import FallbackWarning, PRVAccountant

Numbers = np.ndarray[Any, np.dtype[np.float64]]

_WEAKEST, _STRONGEST = 1.0 / 64.0, 64.0
"""Between these multiples of the recorded noise an explanation is looked for."""

_WITNESS, _PLACES = 1.5, 10
"""Rates are held against (ε, δ(ε)) at ε between ``1.5^-9/2`` and ``1.5^9/2 ≈ 19``, at these steps."""

_PRECISION = 2e-2
"""Relative precision to which the explaining noise is found; the side that is returned is the sound one."""


def highest_rate(count: Any, trials: Any, confidence: float) -> Numbers:
    """Clopper and Pearson's (1934) one-sided upper limit of a probability.

    Args:
        count: how often the event was seen; numbers or arrays.
        trials: among how many independent trials; with none the limit is 1.
        confidence: that the probability lies below.
    """
    count, rest = np.asarray(count, float), np.asarray(trials, float) - np.asarray(count, float)
    limit = special.betaincinv(count + 1.0, np.maximum(rest, 1e-9), confidence)
    return np.asarray(np.where(rest > 0.0, limit, 1.0), float)


def epsilon_of_rates(false_positive: Any, false_negative: Any, delta: float) -> Numbers:
    """The least ε at which an (ε, δ)-private release allows a test of these error rates (Kairouz et al. 2015, §2).

    ``FP + e^ε·FN ≥ 1 - δ`` and ``e^ε·FP + FN ≥ 1 - δ``, so
    ``ε ≥ max(ln((1 - δ - FP)/FN), ln((1 - δ - FN)/FP))``, of which the second counts where FP is the smaller.
    """
    smaller, larger = np.minimum(false_positive, false_negative), np.maximum(false_positive, false_negative)
    with np.errstate(divide="ignore"):
        epsilon = np.log(np.maximum(1.0 - delta - larger, 0.0)) - np.log(smaller)
    return np.asarray(np.maximum(epsilon, 0.0), float)


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Chance of so many correct guesses in one run of an (ε, δ)-private algorithm, at most.

    Each of ``m`` canaries is included with probability one half; the adversary guesses of ``r`` of them whether they
    were. With ``W`` binomial of ``r`` trials and probability ``e^ε/(1 + e^ε)``,
    ``P[at least v correct] ≤ P[W ≥ v] + 2mδ·max_{1≤i≤m} P[v > W ≥ v - i]/i``.

    Source:
        Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", Theorem 5.2.

    Args:
        canaries: ``m``.
        guesses: ``r ≤ m``.
        correct: ``v ≤ r``.
        epsilon: ε ≥ 0.
        delta: δ in [0, 1].
    """
    chance = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, chance))
    if delta == 0.0 or correct == 0:
        return min(1.0, tail)
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, chance))
    # Beyond i = v nothing is added to the probability, so the quotient only falls.
    steepest = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2.0 * canaries * delta * steepest)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest ε that :func:`one_run_p_value` refutes with this confidence; 0 if there is none."""
    low, high = 0.0, 1.0
    if not one_run_p_value(canaries, guesses, correct, low, delta) < 1.0 - confidence:
        return 0.0
    while high < 64.0 and one_run_p_value(canaries, guesses, correct, high, delta) < 1.0 - confidence:
        low, high = high, 2.0 * high
    while high - low > 1e-4:
        middle = 0.5 * (low + high)
        if one_run_p_value(canaries, guesses, correct, middle, delta) < 1.0 - confidence:
            low = middle
        else:
            high = middle
    return low


class Claim:
    """What a ledger says of every test at once, and what it would say had its noise been another multiple.

    Args:
        history: runs of equal steps: noise multiplier, sample rate, count.
    """

    def __init__(self, history: Sequence[tuple[float, float, int]]) -> None:
        self.history = tuple((float(noise), float(rate), int(count)) for noise, rate, count in history)

    def epsilon(self, delta: float, noise: float = 1.0) -> float:
        """ε at δ with ``noise`` times the recorded noise."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            return float(_accountant(self.history, noise).get_epsilon(delta))

    def delta(self, epsilon: float, noise: float = 1.0) -> float:
        """δ at ε with ``noise`` times the recorded noise, at least the true one."""
        return _delta(self.history, epsilon, noise)

    def tension(self, false_positive: Numbers, false_negative: Numbers) -> Numbers:
        """For each pair of rates the largest quotient, over several ε, of the δ(ε) that they need and the stated one.

        Above 1 where the rates refute the ledger.
        """
        epsilons = [0.0, *(_WITNESS**place / 2.0 for place in range(-4, 7))]
        needed = [
            _left(false_positive, false_negative, epsilon, 0.0) / max(self.delta(epsilon), 1e-12)
            for epsilon in epsilons
        ]
        return np.asarray(np.max(needed, axis=0), float)

    def explaining_epsilon(self, false_positive: float, false_negative: float, delta: float) -> float:
        """What the ledger would say at δ for the most noise that allows a test of these error rates.

        The trade-off function of the recorded steps with ``c`` times their noise is
        ``f_c(α) = sup_ε max(1 - δ_c(ε) - e^ε·α, e^-ε·(1 - δ_c(ε) - α))`` (Dong et al. 2022, Proposition 6). A test with
        ``FN < f_c(FP)`` is impossible under it. ε at the largest ``c`` that is left is returned: above the stated ε
        exactly where the ledger itself is refuted. This is the audit of Nasr et al. 2023, §5, with the trade-off
        function of the steps in place of a Gaussian's (the two agree for unsampled steps).

        Returns:
            ∞ if no multiple above 1/64 explains the test, which steps that are not what was recorded can do.
        """
        if false_positive + false_negative >= 1.0:
            return 0.0
        place = 0

        def refuted(noise: float) -> bool:
            nonlocal place
            # Any ε is a sound witness. What is left over is concave in e^ε: the best one is found by climbing.
            left: dict[int, float] = {}

            def at(candidate: int) -> float:
                epsilon = _WITNESS**candidate / 2.0
                if candidate not in left:
                    left[candidate] = float(_left(false_positive, false_negative, epsilon, self.delta(epsilon, noise)))
                return left[candidate]

            for direction in (1, -1):
                while at(place) <= 0.0 and -_PLACES < place + direction < _PLACES and at(place + direction) > at(place):
                    place += direction
            return at(place) > 0.0

        low, high = 1.0, 1.0
        if refuted(1.0):
            while refuted(low):
                if low <= _WEAKEST:
                    return math.inf
                low, high = low / 2.0, low
        else:
            while not refuted(high):
                if high >= _STRONGEST:
                    return 0.0
                low, high = high, high * 2.0
        while high / low > 1.0 + _PRECISION:
            middle = math.sqrt(low * high)
            if refuted(middle):
                high = middle
            else:
                low = middle
        return self.epsilon(delta, high)


def _left(false_positive: Any, false_negative: Any, epsilon: float, delta: float) -> Numbers:
    """What is left of ``1 - δ`` above ``e^ε·min + max`` of the rates: an (ε, δ)-private release leaves nothing."""
    smaller, larger = np.minimum(false_positive, false_negative), np.maximum(false_positive, false_negative)
    return np.asarray(1.0 - delta - math.exp(epsilon) * smaller - larger, float)


@lru_cache(maxsize=4096)
def _delta(history: tuple[tuple[float, float, int], ...], epsilon: float, noise: float) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        return float(_accountant(history, noise).get_delta(epsilon))


def _accountant(history: tuple[tuple[float, float, int], ...], noise: float) -> PRVAccountant:
    accountant = PRVAccountant()
    for multiplier, rate, count in history:
        accountant.step(noise_multiplier=noise * multiplier, sample_rate=rate, steps=count)
    return accountant
