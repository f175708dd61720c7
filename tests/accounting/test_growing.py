"""Sums that grow with a ledger, and answers that are kept: never below what composing anew says, and never stale."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accounting.accountants
import accounting.growing
import accounting.prv
from accounting import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    GaussianRelease,
    GaussianStep,
    LaplaceRelease,
    Ledger,
    PoissonSampling,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
)
from accounting.calibration import calibrate_ledger
from accounting.errors import (
    EngineRangeError,
    FallbackWarning,
    InvalidParameterError,
    LargeDeltaWarning,
    MixedUnitsError,
)
from accounting.growing import Growing, GrowingRenyi, Limit
from accounting.inversion import invert
from accounting.provenance import Provenance
from accounting.rdp import rdp_to_epsilon
from accounting.terms import Terms, collect

DELTA = 1e-5
RELATIONS = (ADD_OR_REMOVE_ONE, REPLACE_ONE)


def schedule(steps, first=1.5, last=0.7):
    """A σ of its own for every step."""
    return [first * (last / first) ** (i / steps) for i in range(steps)]


def recorded(kind, sigmas, q=0.01, relation=ADD_OR_REMOVE_ONE):
    accountant = create_accountant(kind, relation=relation)
    for sigma in sigmas:
        accountant.step(noise_multiplier=sigma, sample_rate=q)
    return accountant


def terms_of(sigmas, q, relation=ADD_OR_REMOVE_ONE):
    return collect([(GaussianStep(sigma, PoissonSampling(q)), 1) for sigma in sigmas], relation)


def grown(kind, limit, sigmas, q, relation=ADD_OR_REMOVE_ONE, start=9):
    """Sums that were laid out early, and grown step by step; laid out anew where they do not fit."""
    sums = kind.towards(limit, terms_of(sigmas[:start], q, relation))
    for count in range(start + 1, len(sigmas) + 1):
        terms = terms_of(sigmas[:count], q, relation)
        sums = sums.reaching(terms) or kind.towards(limit, terms)
    return sums


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(RELATIONS),
    st.integers(10, 24),
    st.floats(0.6, 8.0),
    st.floats(0.3, 1.7),
    st.floats(-3.0, -0.5),
    st.floats(-10.0, -3.0),
    st.floats(0.5, 1.5),
)
def test_a_grown_bound_of_delta_is_never_below_the_certified_lower_one(
    relation, steps, sigma, ratio, log_q, log_delta, share
):
    sigmas, q, delta = schedule(steps, sigma, sigma * ratio), 10.0**log_q, 10.0**log_delta
    accountant = recorded("prv", sigmas, q, relation)
    epsilon = share * float(accountant.get_epsilon(delta))
    if epsilon <= 1e-6:
        return
    sums = grown(Growing, Limit(epsilon, delta), sigmas, q, relation)
    bounds = [direction.delta(epsilon) for direction in sums.directions]
    known = [bound for bound in bounds if bound is not None]
    lower = accountant.get_delta(epsilon).lower
    if len(known) == len(bounds):
        assert max(known) >= lower
    if sums.within():
        assert accountant.get_epsilon(delta).lower <= epsilon


@pytest.mark.slow
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_a_grown_bound_agrees_with_the_inverse_laplace_transform_and_lies_above_it(relation, delta):
    sigmas, q = schedule(60, 3.0, 1.2), 0.05
    epsilon = float(recorded("prv", sigmas, q, relation).get_epsilon(delta))
    terms = terms_of(sigmas, q, relation)
    _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
    sums = grown(Growing, Limit(epsilon, delta), sigmas, q, relation)
    bounds = [direction.delta(epsilon) for direction in sums.directions]
    checked = 0
    for inversion, bound in zip(invert(terms, order - 1.0, max_points=8192, seconds=2.0), bounds, strict=True):
        if inversion.truncation > 1e-10 or inversion.noise(epsilon) > 1e-3 * inversion.delta(epsilon):
            continue
        checked += 1
        assert inversion.delta(epsilon) - inversion.noise(epsilon) <= bound
    assert checked
    assert max(bounds) <= 1.02 * delta


def test_a_limit_that_is_passed_is_never_said_to_hold_and_one_with_room_is():
    for kind, name in ((Growing, "prv"), (GrowingRenyi, "rdp")):
        sigmas = schedule(50)
        epsilon = recorded(name, sigmas).get_epsilon(DELTA)
        passed, room = (Limit(share * float(epsilon), DELTA) for share in (0.9999, 1.01))
        assert not grown(kind, passed, sigmas, 0.01).within()
        assert grown(kind, room, sigmas, 0.01).within()


@pytest.mark.parametrize("left_out", ["outside", "error", "infinite", "step"])
def test_a_grown_bound_without_one_of_its_parts_is_caught(left_out, monkeypatch):
    """What makes the answer an upper bound matters somewhere."""
    sigmas, q = schedule(40, 2.0, 1.0), 0.02
    terms, limit = terms_of(sigmas, q), Limit(1.0, 1e-5)
    honest = grown(Growing, limit, sigmas, q)
    direction = honest.directions[0]
    mutants = {
        "outside": lambda: replace(direction, log_outside=-800.0),
        "error": lambda: direction,
        "infinite": lambda: replace(direction, infinite=0.0),
        "step": lambda: Growing.towards(limit, terms_of(sigmas[:-1], q)).directions[0],
    }
    if left_out == "error":
        # Where nothing but noise is left, the bound is that of the noise.
        profile = direction.spectrum.profile("upper", -1.0, -21.0, infinite=0.0)
        assert replace(profile, error=0.0, outside=0.0).delta(9.0) < profile.delta(9.0)
        return
    point = 1.0
    if left_out == "outside":
        # The window no longer holds what is said to lie in it: there is no answer, instead of one too low.
        assert mutants[left_out]().delta(point) is None or mutants[left_out]().delta(point) >= direction.delta(point)
        return
    assert mutants[left_out]().delta(point) < direction.delta(point)
    assert terms.poisson == honest.terms.poisson


@pytest.mark.parametrize("kind", [Growing, GrowingRenyi])
def test_sums_do_not_reach_ledgers_that_lack_some_of_them_or_hold_other_releases(kind):
    sigmas = schedule(12)
    sums = kind.towards(Limit(2.0, DELTA), terms_of(sigmas, 0.01))
    assert sums.reaching(terms_of(sigmas[:-1], 0.01)) is None
    assert sums.reaching(terms_of(sigmas, 0.02)) is None
    assert sums.reaching(replace(terms_of(sigmas, 0.01), mu=0.1)) is None
    assert sums.reaching(replace(terms_of(sigmas, 0.01), laplace={3.0: 1})) is None
    assert sums.reaching(replace(terms_of(sigmas, 0.01), relation=REPLACE_ONE)) is None
    assert sums.reaching(replace(terms_of(sigmas, 0.01), group_size=2)) is None
    assert sums.reaching(terms_of([*sigmas, 3.0], 0.01)).terms.poisson[3.0, 0.01] == 1
    assert (3.0, 0.01) not in sums.terms.poisson


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rdp", "prv", "auto"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_steps_fit_until_composing_anew_says_that_the_next_does_not(kind, relation):
    sigmas = schedule(60, 2.0, 0.8)
    target = 0.6 * float(recorded(kind, sigmas, relation=relation).get_epsilon(DELTA))
    accountant = create_accountant(kind, relation=relation)
    asked = {"target_epsilon": target, "delta": DELTA, "sample_rate": 0.01}
    taken = 0
    for sigma in sigmas:
        if not accountant.fits(noise_multiplier=sigma, **asked):
            break
        accountant.step(noise_multiplier=sigma, sample_rate=0.01)
        taken += 1
    assert 9 < taken < 60
    assert float(accountant.get_epsilon(DELTA)) <= target
    assert float(recorded(kind, sigmas[: taken + 1], relation=relation).get_epsilon(DELTA)) > target


def test_far_from_the_target_nothing_is_composed_anew(monkeypatch):
    sigmas = schedule(40)
    accountant = recorded("prv", sigmas[:20])
    asked = {"target_epsilon": 5.0, "delta": DELTA, "sample_rate": 0.01}
    assert accountant.fits(noise_multiplier=sigmas[20], **asked)

    def forbidden(*args, **kwargs):
        raise AssertionError("composed anew")

    monkeypatch.setattr(accounting.accountants, "compose_epsilon", forbidden)
    monkeypatch.setattr(accounting.growing._Direction, "laid_out", forbidden)
    for sigma in sigmas[20:]:
        accountant.step(noise_multiplier=sigma, sample_rate=0.01)
        assert accountant.fits(noise_multiplier=0.7, steps=3, **asked)


def test_trials_that_are_not_recorded_are_not_counted_and_nothing_recorded_is_left_out():
    accountant = recorded("prv", schedule(20))
    asked = {"delta": DELTA, "sample_rate": 0.01}
    target = 1.02 * float(accountant.get_epsilon(DELTA))
    # Many more steps are asked for and never taken.
    assert accountant.fits(target_epsilon=5.0, noise_multiplier=0.9, steps=50, **asked)
    assert accountant.fits(target_epsilon=target, noise_multiplier=9.0, **asked)
    assert not accountant.fits(target_epsilon=target, noise_multiplier=0.9, steps=50, **asked)
    accountant.step(noise_multiplier=0.9, sample_rate=0.01, steps=50)
    assert not accountant.fits(target_epsilon=target, noise_multiplier=9.0, steps=0, **asked)
    # Neither are releases of other kinds.
    accountant = recorded("prv", schedule(20))
    assert accountant.fits(target_epsilon=target, noise_multiplier=9.0, **asked)
    accountant.record(GaussianRelease(0.5))
    assert not accountant.fits(target_epsilon=target, noise_multiplier=9.0, **asked)
    accountant = recorded("prv", schedule(20))
    assert accountant.fits(target_epsilon=target, noise_multiplier=9.0, **asked)
    accountant.record(LaplaceRelease(0.2))
    assert not accountant.fits(target_epsilon=target, noise_multiplier=9.0, **asked)


def test_what_others_derive_is_asked_itself():
    class Stricter(PRVAccountant):
        def get_epsilon(self, delta, *, group_size=1):
            return 2.0 * super().get_epsilon(delta, group_size=group_size)

    accountant = Stricter()
    for sigma in schedule(20):
        accountant.step(noise_multiplier=sigma, sample_rate=0.01)
    target = 1.2 * float(PRVAccountant.get_epsilon(accountant, DELTA))
    assert not accountant.fits(target_epsilon=target, delta=DELTA, noise_multiplier=1.0, sample_rate=0.01)
    assert accountant.upper_epsilon(DELTA) == float(accountant.get_epsilon(DELTA))
    assert accountant.fits(target_epsilon=2.5 * target, delta=DELTA, noise_multiplier=1.0, sample_rate=0.01)


def test_questions_that_mean_nothing_are_refused():
    accountant = PRVAccountant(dataset_size=10)
    asked = {"target_epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 1.0, "sample_rate": 0.1}
    assert accountant.fits(**asked, steps=0)
    wrong = {"target_epsilon": 0.0, "delta": 1.0, "noise_multiplier": 0.0, "sample_rate": 2.0, "steps": 0.5}
    for name, value in wrong.items():
        with pytest.raises(InvalidParameterError, match=name):
            accountant.fits(**{**asked, name: value})
    with pytest.warns(LargeDeltaWarning):
        accountant.fits(**{**asked, "delta": 0.5})
    accountant.ledger._put(GaussianStep(1.0), 1)
    accountant.ledger._put(GaussianStep(1.0), 1, Provenance(unit="person"))
    with pytest.raises(MixedUnitsError):
        accountant.fits(**asked)


def test_the_same_question_is_answered_from_memory_and_another_or_of_a_longer_ledger_is_not(monkeypatch):
    counted = []
    original = PRVAccountant._epsilon

    def counting(self, terms, delta):
        counted.append(delta)
        return original(self, terms, delta)

    monkeypatch.setattr(PRVAccountant, "_epsilon", counting)
    accountant = PRVAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    first = accountant.get_epsilon(DELTA)
    first.lower, first.relation = 9.0, "forged"
    again = accountant.get_epsilon(DELTA)
    assert again == first
    assert again.relation == ADD_OR_REMOVE_ONE
    assert again.lower < again
    assert len(counted) == 1
    assert accountant.get_epsilon(1e-6) > again
    assert accountant.get_epsilon(DELTA, group_size=2) > again
    accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    longer = accountant.get_epsilon(DELTA)
    assert longer > again
    assert len(counted) == 4
    # A ledger of as many events is not the same ledger.
    other = Ledger()
    other.append(GaussianStep(0.8, PoissonSampling(0.01)), 101)
    accountant.ledger = other
    assert accountant.get_epsilon(DELTA) > longer
    for twin in (copy.deepcopy(accountant), pickle.loads(pickle.dumps(accountant))):
        twin.step(noise_multiplier=0.8, sample_rate=0.01, steps=100)
        assert twin.get_epsilon(DELTA) > accountant.get_epsilon(DELTA)


def test_delta_is_kept_as_epsilon_is_and_the_two_are_not_confused():
    accountant = PRVAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    values = [accountant.get_delta(0.5), accountant.get_epsilon(0.5), accountant.get_delta(0.5)]
    assert values[0] == values[2] != values[1]
    accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    assert accountant.get_delta(0.5) > values[0]


def test_what_was_warned_of_is_warned_of_again(monkeypatch):
    def failing(*args, **kwargs):
        raise EngineRangeError("no grid")

    monkeypatch.setattr(accounting.accountants, "compose_epsilon", failing)
    accountant = recorded("prv", [1.0])
    for _ in range(2):
        with pytest.warns(FallbackWarning):
            accountant.get_epsilon(1e-5)


def test_answers_of_a_ledger_that_threads_write_to_never_lack_what_was_recorded_before_the_question():
    accountant = RDPAccountant()
    steps = 300

    def write():
        for i in range(steps):
            accountant.step(noise_multiplier=2.0 + 1e-3 * (i % 7), sample_rate=0.01)

    found = []

    def read():
        for _ in range(60):
            before = len(accountant)
            found.append((before, float(accountant.get_epsilon(DELTA))))

    threads = [threading.Thread(target=write) for _ in range(2)] + [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(accountant) == 2 * steps
    fresh = copy.deepcopy(accountant)
    assert accountant.get_epsilon(DELTA) == fresh.get_epsilon(DELTA)
    # So many steps of the most noise cost no more than any answer said.
    for before, epsilon in found:
        least = RDPAccountant()
        least.step(noise_multiplier=2.006, sample_rate=0.01, steps=before)
        assert epsilon >= float(least.get_epsilon(DELTA)) * (1.0 - 1e-6)


def test_terms_are_the_same_however_they_were_collected():
    accountant = create_accountant("auto")
    generator = np.random.default_rng(0)
    for number in range(300):
        sigma = float(generator.choice([1.0, 1.1, 1.2, 5.0]))
        if number % 50 == 0:
            accountant.record(GaussianRelease(30.0))
        accountant.step(noise_multiplier=sigma, sample_rate=0.01, steps=int(generator.integers(1, 4)))
        if number % 7 == 0:
            kept = accountant._answers.collection(1).terms()
            assert kept == collect(accountant.ledger, accountant.relation)
    assert accountant._answers.collection(2).terms() == collect(accountant.ledger, accountant.relation, 2)


def test_rough_terms_cost_about_the_same_and_are_few():
    terms = terms_of(schedule(200), 0.01)
    rough = terms.rough(32)
    assert len(rough.poisson) <= 32
    assert sum(rough.poisson.values()) == 200
    exact, guess = (PRVAccountant()._upper_epsilon(some, DELTA) for some in (terms, rough))
    assert guess == pytest.approx(exact, rel=2e-3)
    assert Terms(ADD_OR_REMOVE_ONE).rough(16).empty


@pytest.mark.slow
def test_a_plan_of_many_kinds_of_steps_meets_its_target_closely():
    plan = recorded("prv", schedule(50)).ledger
    for kind in ("rdp", "auto"):
        factor, scaled = calibrate_ledger(plan, target_epsilon=1.0, delta=DELTA, accountant=kind)
        accountant = create_accountant(kind)
        accountant.ledger = scaled
        epsilon = float(accountant.get_epsilon(DELTA))
        assert 0.999 <= epsilon <= 1.0
        assert factor > 0.0
        less = create_accountant(kind)
        less.ledger = plan.scaled(factor * (1.0 - 3e-4))
        assert float(less.get_epsilon(DELTA)) > 1.0


def test_an_upper_bound_that_is_asked_for_alone_is_the_one_that_comes_with_a_lower_one():
    for kind in ("rdp", "prv", "auto"):
        for relation in RELATIONS:
            accountant = recorded(kind, schedule(12), relation=relation)
            terms = collect(accountant.ledger, relation)
            alone = accountant.upper_epsilon(DELTA)
            assert accountant._upper_epsilon(terms, DELTA) == alone == float(accountant.get_epsilon(DELTA))
            assert accountant.upper_epsilon(DELTA) == alone
            accountant.step(noise_multiplier=1.0, sample_rate=0.01)
            assert accountant.upper_epsilon(DELTA) > alone
    assert create_accountant("prv").upper_epsilon(DELTA) == 0.0


def test_a_fallback_of_the_lower_bound_leaves_the_upper_one(monkeypatch):
    accountant = recorded("prv", [1.0])
    expected = float(accountant.get_epsilon(DELTA))
    original = accounting.prv.Laboratory.epsilon

    def failing(self, *args):
        if self.side == "lower":
            raise EngineRangeError("no grid")
        return original(self, *args)

    monkeypatch.setattr(accounting.prv.Laboratory, "epsilon", failing)
    again = recorded("prv", [1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = again.get_epsilon(DELTA)
    assert math.isfinite(bound)
    assert (float(bound), bound.lower) == (expected, 0.0)


@pytest.mark.parametrize("kind", [Growing, GrowingRenyi])
def test_many_steps_at_once_count_as_one_by_one(kind):
    sigmas, limit = schedule(10, 2.0, 1.0), Limit(1.0, DELTA)
    begin = kind.towards(limit, replace(terms_of(sigmas, 0.02), poisson=dict.fromkeys(((s, 0.02) for s in sigmas), 9)))
    at_once = begin.reaching(replace(begin.terms, poisson={**begin.terms.poisson, (1.5, 0.02): 40}))
    one_by_one = begin
    for count in range(1, 41):
        one_by_one = one_by_one.reaching(replace(begin.terms, poisson={**begin.terms.poisson, (1.5, 0.02): count}))
    if kind is GrowingRenyi:
        np.testing.assert_allclose(at_once.cumulants, one_by_one.cumulants, rtol=1e-9)
        assert (at_once.cumulants > begin.cumulants).all()
        return
    for first, second, before in zip(at_once.directions, one_by_one.directions, begin.directions, strict=True):
        assert first.spectrum.steps == second.spectrum.steps == 130
        assert first.delta(0.8) == pytest.approx(second.delta(0.8), rel=1e-4)
        assert first.delta(0.8) > 1.05 * before.delta(0.8)
        # As a composition anew.
        anew = kind.towards(limit, at_once.terms)
        place = at_once.directions.index(first)
        assert anew.directions[place].delta(0.8) == pytest.approx(first.delta(0.8), rel=0.02)


def test_an_accountant_of_a_users_own_is_asked_anew_each_time():
    class WithMargin(PRVAccountant):
        factor = 1.0

        def _epsilon(self, terms, delta):
            bound = super()._epsilon(terms, delta)
            return self._bound(terms, self.factor * float(bound), 0.0, delta, "margin")

    accountant = WithMargin()
    accountant.step(noise_multiplier=2.0, sample_rate=0.01, steps=100)
    before = float(accountant.get_epsilon(1e-5)), accountant.upper_epsilon(1e-5)
    accountant.factor = 2.0
    after = float(accountant.get_epsilon(1e-5)), accountant.upper_epsilon(1e-5)
    assert after == pytest.approx([2.0 * one for one in before])
