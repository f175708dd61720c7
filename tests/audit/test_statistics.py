"""The step from error rates to ε: known answers, and how often it claims more than there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from accounting.gaussian import gaussian_delta, gaussian_epsilon
from clipless_dp.audit import release
from clipless_dp.audit.statistics import Claim, epsilon_of_rates, highest_rate, one_run_epsilon, one_run_p_value

DELTA = 1e-5


def gaussian_rates(mu: float, threshold: float) -> tuple[float, float]:
    return float(stats.norm.sf(threshold)), float(stats.norm.cdf(threshold - mu))


@pytest.mark.parametrize(("count", "trials"), [(0, 10), (3, 10), (9, 10), (250, 1000)])
def test_the_limit_of_a_rate_is_the_exact_binomial_one(count, trials):
    exact = stats.binomtest(count, trials).proportion_ci(0.9, method="exact").high
    assert float(highest_rate(count, trials, 0.95)) == pytest.approx(exact, rel=1e-9)


def test_an_event_that_always_happens_has_no_limit():
    assert float(highest_rate(7, 7, 0.95)) == 1.0
    assert float(highest_rate(0, 0, 0.95)) == 1.0


def test_the_epsilon_of_exact_rates_is_met_by_randomised_response_and_never_passed_by_a_gaussian():
    flip = 1.0 / (1.0 + math.exp(1.5))
    assert float(epsilon_of_rates(flip, flip, 0.0)) == pytest.approx(1.5)
    for epsilon in (0.5, 1.0, 3.0):
        delta = gaussian_delta(1.2, epsilon)
        reached = [float(epsilon_of_rates(*gaussian_rates(1.2, t), delta)) for t in np.linspace(-3, 8, 400)]
        # The best threshold of the grid lies within 0.01 of the best there is.
        assert epsilon - 1e-3 <= max(reached) <= epsilon + 1e-9


def test_the_one_run_bound_is_the_papers():
    # Steinke et al. 2023, Appendix D: three quarters of 100 guesses right at ε = ln 3 is no surprise.
    assert one_run_p_value(100, 100, 75, math.log(3.0), 0.0) == pytest.approx(0.5535, abs=1e-4)
    assert one_run_p_value(100, 100, 100, 0.0, 0.0) == pytest.approx(0.5**100)


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(12, 12, 9), (40, 12, 12), (9, 6, 0), (30, 20, 11)])
def test_the_one_run_bound_is_its_formula_summed_term_by_term(canaries, guesses, correct):
    epsilon, delta = 0.8, 1e-3
    chance = math.exp(epsilon) / (1.0 + math.exp(epsilon))

    def weight(k: int) -> float:
        return math.comb(guesses, k) * chance**k * (1.0 - chance) ** (guesses - k)

    tail = sum(weight(k) for k in range(correct, guesses + 1))
    steepest = max(sum(weight(k) for k in range(max(correct - i, 0), correct)) / i for i in range(1, canaries + 1))
    expected = min(1.0, tail + 2.0 * canaries * delta * steepest)
    assert one_run_p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_the_one_run_epsilon_is_where_the_p_value_crosses():
    bound = one_run_epsilon(1000, 200, 180, DELTA, 0.95)
    assert one_run_p_value(1000, 200, 180, bound, DELTA) <= 0.05
    assert one_run_p_value(1000, 200, 180, bound + 2e-4, DELTA) >= 0.05
    assert one_run_epsilon(1000, 200, 100, DELTA, 0.95) == 0.0


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0])
def test_the_one_run_bound_is_the_exact_chance_of_randomised_response(epsilon):
    # All 2^r outcomes of answers that are right with probability e^ε/(1 + e^ε), one by one.
    guesses, chance = 8, math.exp(epsilon) / (1.0 + math.exp(epsilon))
    for correct in range(guesses + 1):
        exact = sum(
            math.prod(chance if right else 1.0 - chance for right in outcome)
            for outcome in itertools.product((True, False), repeat=guesses)
            if sum(outcome) >= correct
        )
        assert one_run_p_value(20, guesses, correct, epsilon, 0.0) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("delta", [1e-3, 0.05])
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_no_private_mechanism_beats_the_one_run_bound(epsilon, delta):
    canaries, chance = 40, math.exp(epsilon) / (1.0 + math.exp(epsilon))
    told = delta + (1.0 - delta) * chance
    for correct in range(canaries + 1):
        allowed = one_run_p_value(canaries, canaries, correct, epsilon, delta)
        # Each coin told with probability δ, a noisy answer else; and all coins told at once with probability δ.
        each = float(stats.binom.sf(correct - 1, canaries, told))
        together = delta + (1.0 - delta) * float(stats.binom.sf(correct - 1, canaries, chance))
        assert max(each, together) <= allowed + 1e-12


def test_the_one_run_bound_covers_randomised_response_as_often_as_it_says():
    # The tightest case there is: every answer leaks ε in full, and all are used.
    generator, epsilon, repetitions = np.random.default_rng(8), 1.0, 400
    chance = math.exp(epsilon) / (1.0 + math.exp(epsilon))
    above = 0
    for _ in range(repetitions):
        inside = generator.random(300) < 0.5
        answers = np.where(generator.random(300) < chance, inside, ~inside)
        # Ties are broken at random, as an adversary without more to go by would.
        views = {"answer": answers + 1e-3 * generator.random(300)}
        bound, _ = release.guess(views, inside, 100, 0.0, 0.95)
        above += bound > epsilon
    # 38 of 400 at a true chance of 5 % has probability 2e-4, and the seed is fixed; some are, or the test sees nothing.
    assert 1 <= above <= 37


@pytest.mark.parametrize("mu", [0.5, 1.0, 3.0])
def test_exact_rates_of_a_gaussian_explain_its_own_epsilon(mu):
    claim = Claim([(1.0 / mu, 1.0, 1)])
    for threshold in (-0.5, mu / 2, mu + 0.7):
        explained = claim.explaining_epsilon(*gaussian_rates(mu, threshold), DELTA)
        # The noise is found to 2 %, and witnesses ε stand a factor 1.5 apart, which costs up to 6 % of the noise.
        assert 0.85 * claim.epsilon(DELTA) <= explained <= claim.epsilon(DELTA) * 1.0000001


def test_better_rates_than_the_ledger_allows_refute_it():
    claim = Claim([(1.0, 1.0, 1)])
    assert claim.explaining_epsilon(*gaussian_rates(1.3, 0.65), DELTA) > claim.epsilon(DELTA)
    assert claim.explaining_epsilon(0.5, 0.5, DELTA) == 0.0
    # A sample that Poisson sampling never draws cannot be told from one that is absent, whatever the noise.
    assert Claim([(1.0, 0.25, 1)]).explaining_epsilon(0.01, 0.1, DELTA) == math.inf


def synthetic(mu: float, trials: int, generator: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    inside = generator.random(trials) < 0.5
    return {"sum": mu * inside + generator.standard_normal(trials)}, inside


def excesses(method: str, mu: float, confidence: float, repetitions: int = 200, trials: int = 300) -> int:
    """How often the lower bound lies above the true ε of a Gaussian mechanism."""
    generator = np.random.default_rng(5)
    truth, claim = gaussian_epsilon(mu, DELTA), Claim([(1.0 / mu, 1.0, 1)])
    count = 0
    for _ in range(repetitions):
        views, inside = synthetic(mu, trials, generator)
        if method == "one-run":
            bound, _ = release.guess(views, inside, trials // 3, DELTA, confidence)
        else:
            bound, _ = release._test(views, inside, trials // 3, DELTA, confidence, claim if method == "f-dp" else None)
        count += bound > truth
    return count


@pytest.mark.parametrize("mu", [0.7, 2.0])
@pytest.mark.parametrize("method", ["f-dp", "clopper-pearson", "one-run"])
def test_the_lower_bound_passes_the_truth_no_more_often_than_it_says(method, mu):
    # 20 of 200 at a true chance of 5 % has probability 3e-3, and the seed is fixed.
    assert excesses(method, mu, 0.95) <= 19


def test_mutant_caught_rates_in_place_of_their_limits(monkeypatch):
    monkeypatch.setattr(release, "highest_rate", lambda count, trials, confidence: count / np.maximum(trials, 1))
    assert excesses("f-dp", 2.0, 0.95) > 40
