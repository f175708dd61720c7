"""What every privacy curve satisfies, on random ledgers, and mutants that break it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accounting.privacy_loss
import accounting.prv
from accounting import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    GaussianStep,
    GaussianVectorStep,
    PoissonSampling,
    PRVAccountant,
    create_accountant,
)
from accounting.inversion import invert
from accounting.pairs import PoissonGaussianPair
from accounting.privacy_loss import Composition, TiltedProfile, discretise, loss_edges
from accounting.rdp import rdp_to_epsilon
from accounting.terms import collect

SIGMAS = st.floats(0.5, 20.0)
RATES = st.floats(1e-4, 0.9)
STEPS = st.integers(1, 20_000)
DELTAS = st.floats(-11.0, -3.0).map(lambda exponent: 10.0**exponent)
PHASES = st.tuples(SIGMAS, RATES, STEPS)
KINDS = st.sampled_from(["rdp", "prv"])
RELATIONS = st.sampled_from([ADD_OR_REMOVE_ONE, REPLACE_ONE])

# Grids differ between neighbouring queries; each is laid out for a relative 2e-4 in ε. Where ε is
# tiny against rare large losses, the promise is an absolute 0.01.
SLACK, FLOOR = 1.002, 1e-2


def epsilon(kind, phases, delta, relation=ADD_OR_REMOVE_ONE):
    accountant = create_accountant(kind, relation=relation)
    for sigma, q, n in phases:
        accountant.step(noise_multiplier=sigma, sample_rate=q, steps=n)
    return accountant.get_epsilon(delta)


@settings(max_examples=12, deadline=None)
@given(KINDS, RELATIONS, PHASES, DELTAS, st.floats(1.05, 3.0))
def test_epsilon_grows_with_steps_rate_and_confidence_and_falls_with_noise(kind, relation, phase, delta, factor):
    sigma, q, n = phase
    base = epsilon(kind, [phase], delta, relation)
    worse = [
        ([(sigma, q, math.ceil(factor * n))], delta),
        ([(sigma / factor, q, n)], delta),
        ([(sigma, min(factor * q, 0.95), n)], delta),
        ([phase], delta / factor),
    ]
    for phases, other in worse:
        assert base <= SLACK * epsilon(kind, phases, other, relation) + FLOOR


@settings(max_examples=8, deadline=None)
@given(KINDS, PHASES, st.integers(1, 99), DELTAS)
def test_splitting_a_run_changes_nothing(kind, phase, percent, delta):
    sigma, q, n = phase
    part = n * percent // 100
    assert epsilon(kind, [phase], delta) == epsilon(kind, [(sigma, q, part), (sigma, q, n - part)], delta)


@settings(max_examples=8, deadline=None)
@given(KINDS, st.permutations([(1.0, 0.01, 100), (2.0, 0.1, 50), (0.8, 0.001, 300), (5.0, 1.0, 2)]), DELTAS)
def test_the_order_of_phases_does_not_matter(kind, phases, delta):
    # Sums in another order may differ in the last digits.
    assert float(epsilon(kind, phases, delta)) == pytest.approx(float(epsilon(kind, sorted(phases), delta)), rel=1e-6)


@settings(max_examples=8, deadline=None)
@given(KINDS, st.lists(st.floats(1.0, 20.0), min_size=1, max_size=6), st.floats(1e-3, 0.3), DELTAS)
def test_per_parameter_noise_costs_what_its_effective_multiplier_costs(kind, sigmas, q, delta):
    vector, single = create_accountant(kind), create_accountant(kind)
    step = GaussianVectorStep(tuple(sigmas), PoissonSampling(q))
    vector.record(step, 100)
    effective = 1.0 / math.sqrt(sum(s**-2 for s in sigmas))
    assert step.noise_multiplier == pytest.approx(effective, rel=1e-12)
    single.step(noise_multiplier=step.noise_multiplier, sample_rate=q, steps=100)
    assert vector.get_epsilon(delta) == single.get_epsilon(delta)


@settings(max_examples=12, deadline=None)
@given(RELATIONS, st.lists(PHASES, min_size=1, max_size=3), DELTAS)
def test_auto_is_sound_against_the_inversion_and_not_above_either_engine(relation, phases, delta):
    auto = epsilon("auto", phases, delta, relation)
    assert auto <= epsilon("rdp", phases, delta, relation)
    assert auto == epsilon("prv", phases, delta, relation)
    accountant = create_accountant("auto", relation=relation)
    for sigma, q, n in phases:
        accountant.step(noise_multiplier=sigma, sample_rate=q, steps=n)
    terms = collect(accountant.ledger, relation)
    _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
    inversions = invert(terms, order - 1.0, seconds=0.3)
    if auto > 0.0 and all(inversion.truncation < 1e-10 for inversion in inversions):
        # 1e-6: what the inversion is worth.
        assert max(i.delta(auto.upper) - i.noise(auto.upper) for i in inversions) <= delta * (1.0 + 1e-6)
        if auto.lower > 0.0:
            assert max(i.delta(auto.lower) + i.noise(auto.lower) for i in inversions) >= delta * (1.0 - 1e-6)


@pytest.mark.slow
def test_rounding_ten_thousand_phases_never_lowers_epsilon():
    accountant = PRVAccountant()
    for sigma in np.linspace(1.0, 2.0, 3000):
        accountant.step(noise_multiplier=float(sigma), sample_rate=0.01)
    bound = accountant.get_epsilon(1e-5)
    assert "rounded" in bound.engine
    coarse = [(float(s), 0.01, 30) for s in np.linspace(1.0, 2.0, 101)[1:]]
    # Each of these 100 phases has more noise than the 30 steps that it stands for.
    assert bound >= epsilon("prv", coarse, 1e-5).lower
    finer = [(float(s), 0.01, 30) for s in np.linspace(1.0, 2.0, 101)[:-1]]
    assert bound <= 1.01 * epsilon("prv", finer, 1e-5)


def truth_is_violated(delta=1e-5, phases=((1.0, 0.01, 1000),), relation=ADD_OR_REMOVE_ONE):
    """Whether the numerical engine, as it stands, reports less than the inversion proves."""
    accounting.prv._discrete.cache_clear()
    accountant = PRVAccountant(relation=relation)
    for sigma, q, n in phases:
        accountant.step(noise_multiplier=sigma, sample_rate=q, steps=n)
    reported = float(accountant.get_epsilon(delta))
    accounting.prv._discrete.cache_clear()
    terms = collect(accountant.ledger, relation)
    _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
    return max(i.delta(reported) - i.noise(reported) for i in invert(terms, order - 1.0)) > delta * (1.0 + 1e-6)


def test_the_unchanged_engine_passes_the_check_that_catches_the_mutants():
    assert not truth_is_violated()
    assert not truth_is_violated(relation=REPLACE_ONE)


def test_mutant_losses_rounded_down_are_caught(monkeypatch):
    def mutant(pair, index, width, side, offset=0.0):
        return discretise(pair, index, width, "lower", offset)

    monkeypatch.setattr(accounting.prv, "discretise", mutant)
    assert truth_is_violated()


def test_mutant_one_direction_only_is_caught(monkeypatch):
    from accounting.terms import Terms

    original = Terms.directions
    monkeypatch.setattr(Terms, "directions", lambda self: original(self)[-1:])
    assert truth_is_violated()


def test_mutant_add_or_remove_pair_for_replacing_is_caught(monkeypatch):
    import accounting.terms

    monkeypatch.setattr(
        accounting.terms, "ReplaceOnePoissonPair", lambda sigma, q: PoissonGaussianPair(sigma, q, False)
    )
    assert truth_is_violated(relation=REPLACE_ONE)


def test_mutant_dropped_step_is_caught(monkeypatch):
    original = Composition.__init__

    def mutant(self, parts, side):
        original(self, [(loss, max(1, int(0.99 * n))) for loss, n in parts], side)

    monkeypatch.setattr(Composition, "__init__", mutant)
    assert truth_is_violated()


def test_mutant_window_without_what_it_leaves_out_is_caught(monkeypatch):
    composition = Composition([(_one_loss(), 3000)], "upper")
    wide = composition.tilted(3.0, log_outside=-40.0)
    mean, variance = composition.moments(3.0)
    # Cut one spread above the mean, where less than e^−1 of the tilted mass lies beyond.
    edges = (mean - 10.0 * variance**0.5, mean + variance**0.5)
    monkeypatch.setattr(composition, "window", lambda t, log_outside: edges)
    honest = composition.tilted(3.0, log_outside=-1.0)
    mutant = TiltedProfile(**{**honest.__dict__, "outside": 0.0})
    points = np.linspace(mean, edges[1], 9)[:-1]
    assert all(honest.delta(float(e)) >= wide.delta(float(e)) * (1.0 - 1e-9) for e in points)
    assert all(mutant.delta(float(e)) < wide.delta(float(e)) * 0.95 for e in points)


def test_mutant_each_layer_amplified_by_itself_is_caught():
    whole, mutant = PRVAccountant(), PRVAccountant()
    whole.record(GaussianVectorStep((2.0,) * 4, PoissonSampling(0.01)), 1000)
    mutant.record(GaussianStep(2.0, PoissonSampling(0.01)), 4000)
    assert mutant.get_epsilon(1e-5) == pytest.approx(1.308, abs=2e-3)  # three decimals and the grid's error
    assert whole.get_epsilon(1e-5) == pytest.approx(1.828, abs=2e-3)
    assert whole.get_epsilon(1e-5).lower > mutant.get_epsilon(1e-5).upper


@pytest.mark.parametrize("error", [1e-9, 1e-6])
def test_noise_in_the_transform_only_raises_the_upper_and_lowers_the_lower_bound(error):
    for side, sign in (("upper", 1.0), ("lower", -1.0)):
        composition = Composition([(_one_loss(side), 300)], side)
        clean = composition.tilted(8.0)
        rng = np.random.default_rng(0)
        noise = rng.uniform(-error, error, len(clean.mass)) * clean.mass.max()
        fields = {**clean.__dict__, "mass": clean.mass + noise, "error": clean.error + error * clean.mass.max()}
        noisy = TiltedProfile(**fields)
        for e in np.linspace(1.0, 2.5, 7):
            assert sign * noisy.delta(float(e)) >= sign * clean.delta(float(e)) * (1.0 - sign * 1e-12)


def _one_loss(side="upper"):
    pair = PoissonGaussianPair(1.0, 0.01, False)
    width = 2.0**-10
    return discretise(pair, loss_edges(*pair.reach(-40.0), width, 8.0, 1e-4), width, side)
