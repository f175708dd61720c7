"""The engines against closed forms, against an independent inversion, and against one another."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.special import ndtr

from accounting import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    FallbackWarning,
    FixedSizeSampling,
    GaussianRelease,
    GaussianStep,
    InvalidParameterError,
    LaplaceRelease,
    NoSampling,
    PoissonSampling,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
)
from accounting.events import Relation
from accounting.gaussian import gaussian_delta, gaussian_epsilon
from accounting.inversion import invert
from accounting.pairs import (
    FixedSizeGaussianPair,
    GaussianPair,
    LaplacePair,
    PoissonGaussianPair,
    ReplaceOnePoissonPair,
)
from accounting.privacy_loss import Composition, discretise, loss_edges
from accounting.prv import _discrete, _offset
from accounting.rdp import rdp_to_epsilon, replace_one_cumulant, subsampled_gaussian_cumulant
from accounting.terms import collect


def accountant(kind, phases, relation: Relation = ADD_OR_REMOVE_ONE):
    result = create_accountant(kind, relation=relation)
    for sigma, q, n in phases:
        result.step(noise_multiplier=sigma, sample_rate=q, steps=n)
    return result


def single_step_delta(sigma, q, epsilon):
    """Exact δ(ε) of one Poisson-sampled step, removing a record."""
    point = 0.5 + sigma**2 * math.log1p(math.expm1(epsilon) / q)
    g, h = ndtr(-point / sigma), ndtr(-(point - 1.0) / sigma)
    return float(q * h - (math.expm1(epsilon) + q) * g)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("q", [1e-4, 0.05, 0.9])
@pytest.mark.parametrize("fraction", [0.1, 1e-3, 1e-9])
def test_one_step_lies_between_its_bounds_and_the_upper_one_is_tight(sigma, q, fraction):
    # q · erf(1/√8σ) is δ(0): the largest there is.
    delta = fraction * q * math.erf(1.0 / (math.sqrt(8.0) * sigma))
    engine = accountant("prv", [(sigma, q, 1)])
    bound = engine.get_epsilon(delta)
    # The closed form loses digits to cancellation: a relative 1e-6 at these sizes.
    assert single_step_delta(sigma, q, bound.upper) <= delta * (1.0 + 1e-6)
    assert single_step_delta(sigma, q, bound.lower) >= delta * (1.0 - 1e-6)
    # Half a per cent of ε, a few times what the grid is laid out for, or 0.01 where ε is tiny.
    assert single_step_delta(sigma, q, max(0.995 * bound.upper - 1e-2, 0.0)) > delta
    epsilon = float(bound)
    exact = single_step_delta(sigma, q, epsilon)
    asked = engine.get_delta(epsilon)
    assert asked.lower <= exact * (1.0 + 1e-6)
    assert exact <= asked.upper * (1.0 + 1e-6)
    assert asked.upper <= single_step_delta(sigma, q, max(0.995 * epsilon - 1e-2, 0.0))


CASES = [
    ([(1.0, 0.01, 1000)], 1e-5, ADD_OR_REMOVE_ONE),
    ([(1.0, 0.01, 10_000)], 1e-12, ADD_OR_REMOVE_ONE),
    ([(5.0, 0.1, 100_000)], 1e-6, ADD_OR_REMOVE_ONE),
    ([(20.0, 0.9, 100_000)], 1e-6, ADD_OR_REMOVE_ONE),
    ([(0.8, 0.02, 300), (2.0, 0.3, 50)], 1e-7, ADD_OR_REMOVE_ONE),
    ([(1.0, 0.01, 1000), (10.0, 1.0, 20)], 1e-6, ADD_OR_REMOVE_ONE),
    ([(1.0, 0.01, 1000)], 1e-5, REPLACE_ONE),
    ([(2.0, 0.2, 500), (30.0, 1.0, 100)], 1e-9, REPLACE_ONE),
]


@pytest.mark.parametrize(("phases", "delta", "relation"), CASES)
def test_numerical_composition_brackets_the_inverse_laplace_transform(phases, delta, relation):
    engine = accountant("prv", phases, relation)
    bound = engine.get_epsilon(delta)
    terms = collect(engine.ledger, relation)
    _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
    inversions = invert(terms, order - 1.0)
    assert all(inversion.truncation < 1e-12 for inversion in inversions)
    # 1e-6: the inversion agrees with itself to that when its line is moved.
    assert max(i.delta(bound.upper) - i.noise(bound.upper) for i in inversions) <= delta * (1.0 + 1e-6)
    assert max(i.delta(bound.lower) + i.noise(bound.lower) for i in inversions) >= delta * (1.0 - 1e-6)
    assert bound.upper <= 1.01 * bound.lower


HEAVY_TAILS = [
    ([(0.467, 0.0025, 62)], 2.6e-9, ADD_OR_REMOVE_ONE),
    ([(0.3, 1e-5, 1000)], 1e-12, REPLACE_ONE),
    ([(88.0, 4e-4, 2), (4.9, 0.0016, 1952), (0.37, 9e-4, 107)], 3e-8, ADD_OR_REMOVE_ONE),
    ([(1.8, 2.8e-5, 7181), (17.0, 0.034, 425)], 8e-10, REPLACE_ONE),
    ([(8.8, 0.0065, 69_477), (0.49, 0.0034, 181_749)], 1e-9, REPLACE_ONE),
]


@pytest.mark.parametrize(("phases", "delta", "relation"), HEAVY_TAILS)
def test_rare_large_losses_are_bounded_to_a_per_cent_from_both_sides(phases, delta, relation):
    bound = accountant("prv", phases, relation).get_epsilon(delta)
    assert bound.upper <= 1.01 * bound.lower


def test_a_bound_where_float64_noise_exceeds_delta_agrees_with_published_distributions():
    bound = accountant("prv", [(1.67, 9.6e-5, 3743), (9.37, 0.048, 17), (0.574, 1.2e-5, 9)]).get_epsilon(1.3e-12)
    # dp-accounting 0.6.0, pessimistic, intervals 1e-4 and 3e-4; its own noise is about 1e-15 in δ.
    assert float(bound) == pytest.approx(0.4627, rel=5e-3)
    assert bound.upper <= 1.01 * bound.lower


@pytest.mark.parametrize("t", [0.0, 1.5])
def test_the_noise_of_the_transform_stays_within_its_bound_and_shrinks_in_extended_precision(t):
    loss = _discrete(PoissonGaussianPair(0.6, 0.01, False), 2.0**-9, 2.0, -40.0, 1e-3, "upper")
    composition = Composition([(loss, 5000)], "upper")
    double, extended = (composition.tilted(t, extended=extended) for extended in (False, True))
    if extended.error == double.error:
        pytest.skip("no extended precision on this platform")
    assert extended.error < 1e-3 * double.error
    deviation = np.abs(double.mass - extended.mass).max()
    assert 0.0 < deviation <= double.error + extended.error


@pytest.mark.parametrize(("phases", "delta", "relation"), CASES)
def test_delta_and_epsilon_are_inverse_to_one_another(phases, delta, relation):
    engine = accountant("prv", phases, relation)
    again = engine.get_delta(float(engine.get_epsilon(delta)))
    # Both are upper bounds of the same curve on grids laid out for a relative 2e-4 in ε.
    assert math.log(again.upper / delta) == pytest.approx(0.0, abs=0.05)


def test_large_epsilon_cases_that_a_published_engine_underestimates_are_bounded():
    assert accountant("prv", [(5.0, 0.1, 100_000)]).get_epsilon(1e-5).upper >= 46.83
    assert accountant("prv", [(20.0, 0.9, 100_000)]).get_epsilon(1e-5).upper >= 161.05


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9, 1e-12, 1e-30])
@pytest.mark.parametrize(("sigma", "steps"), [(30.0, 2000), (1.0, 1), (0.2, 7), (300.0, 1)])
def test_unsampled_steps_are_one_gaussian_mechanism_exactly(sigma, steps, delta):
    bound = accountant("prv", [(sigma, 1.0, steps)]).get_epsilon(delta)
    mu = math.sqrt(steps) / sigma
    assert bound.engine == "analytic-gaussian"
    assert gaussian_delta(mu, float(bound)) <= delta
    if bound > 0.0:
        # A relative 1e-9 below, the guarantee fails.
        assert gaussian_delta(mu, float(bound) * (1.0 - 1e-9)) > delta


def test_the_analytic_gaussian_mechanism_matches_multiple_precision():
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    for mu, epsilon in [(0.01, 0.06), (1.0, 4.9), (20.0, 340.0), (1.5, 11.2), (0.3, 0.0)]:
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        exact = mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)
        assert gaussian_delta(mu, epsilon) >= exact
        # 1e-9: the margin that is added for the rounding of log Φ.
        assert gaussian_delta(mu, epsilon) <= exact * (1 + mpmath.mpf("1e-9"))
        assert gaussian_delta(mu, epsilon, lower=True) <= exact


def test_the_analytic_gaussian_epsilon_is_zero_where_delta_is_generous():
    assert gaussian_epsilon(0.01, 0.5) == 0.0
    assert gaussian_epsilon(0.0, 1e-9) == 0.0


@pytest.mark.parametrize("order", [2, 5, 8, 40])
@pytest.mark.parametrize(("sigma", "q"), [(0.3, 0.01), (1.0, 0.01), (3.0, 0.5), (20.0, 0.9)])
def test_renyi_quadrature_equals_the_binomial_sum_at_whole_orders(sigma, q, order):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    s = mpmath.mpf(sigma)
    p = mpmath.mpf(q)
    terms = [
        mpmath.binomial(order, k) * (1 - p) ** (order - k) * p**k * mpmath.exp((k * k - k) / (2 * s**2))
        for k in range(order + 1)
    ]
    exact = mpmath.log(mpmath.fsum(terms))
    value = float(subsampled_gaussian_cumulant(sigma, q, np.array([order - 1.0]))[0])
    assert value >= exact
    # The margin covers the rounding of the logarithmic sum, about 1e-12 here.
    assert value <= exact * (1 + mpmath.mpf("1e-9")) + mpmath.mpf("1e-11")


@pytest.mark.parametrize("alpha", [1.01, 1.7, 6.3])
@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.01), (1.0, 0.1), (4.0, 0.6)])
def test_renyi_quadrature_holds_at_fractional_orders_for_both_relations(sigma, q, alpha):
    x = np.linspace(-20.0 * sigma - 2.0, 2.0 * alpha + 20.0 * sigma, 400_001)
    g = np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    up = np.exp(-((x - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    down = np.exp(-((x + 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    p, m = (1 - q) * g + q * up, (1 - q) * g + q * down
    t = np.array([alpha - 1.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        for lower, function in ((g, subsampled_gaussian_cumulant), (m, replace_one_cumulant)):
            integrand = np.where(lower > 0.0, p * (p / lower) ** (alpha - 1.0), 0.0)
            exact = math.log(float(integrand.sum()) * ((x[-1] - x[0]) / 400_000))
            # 1e-9: what the fine Riemann sum of the test is worth.
            assert float(function(sigma, q, t)[0]) == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("function", [subsampled_gaussian_cumulant, replace_one_cumulant])
@pytest.mark.parametrize(("sigma", "q"), [(0.3, 1e-3), (0.5, 1e-5), (3.0, 0.02)])
def test_renyi_orders_are_as_precise_together_as_one_by_one(function, sigma, q):
    orders = np.geomspace(1e-4, 60.0, 40)
    alone = np.concatenate([function(sigma, q, orders[i : i + 1]) for i in range(len(orders))])
    # 1e-9: twice the margin for rounding, which is relative to the exponent.
    assert function(sigma, q, orders) == pytest.approx(alone, rel=1e-9, abs=1e-11)
    if q < 1e-3:
        assert alone[np.searchsorted(orders, 1.0)] < 1e-2


def test_a_phase_of_little_noise_does_not_spoil_the_renyi_bound_of_the_others():
    phases = [(0.38, 2e-5, 2071), (60.0, 2e-5, 7)]
    assert accountant("rdp", phases).get_epsilon(1e-3) < 2.5


def test_both_directions_are_composed_and_the_larger_one_is_reported():
    sigma, q, n, delta = 2.0, 0.3, 200, 1e-3
    engine = accountant("prv", [(sigma, q, n)])
    terms = collect(engine.ledger, engine.relation)
    _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
    remove, add = (i.delta(float(engine.get_epsilon(delta))) for i in invert(terms, order - 1.0))
    assert add < remove
    assert remove == pytest.approx(delta, rel=0.02)  # the grid's relative 2e-4 in ε, times the tilt


PAIRS = [
    GaussianPair(0.7),
    LaplacePair(0.6),
    PoissonGaussianPair(1.0, 0.05, False),
    PoissonGaussianPair(1.0, 0.05, True),
    PoissonGaussianPair(0.4, 0.7, False),
    ReplaceOnePoissonPair(1.0, 0.05),
    FixedSizeGaussianPair(2.0, 0.1),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_discretisation_moves_the_hockey_stick_divergence_only_in_its_direction(pair):
    low, high = pair.reach(-40.0)
    fine = np.linspace(low - 1e-3, high + 1e-3, 200_001)
    bins = pair.masses(fine)
    assert bins.p.sum() == pytest.approx(1.0, abs=1e-9)
    assert bins.q.sum() == pytest.approx(1.0, abs=1e-9)
    width = 0.05
    index = loss_edges(low, high, width, 2.0, 1e-3)
    upper, lower = (discretise(pair, index, width, side) for side in ("upper", "lower"))
    for epsilon in np.linspace(max(low, -3.0), min(high, 6.0), 23):
        keep = np.concatenate(([False], fine[:-1] >= epsilon, [True]))
        # Bins beyond ε contribute P − e^ε Q; the one that holds ε is left out, so the sum is from below.
        exact = float((bins.p[keep] - math.exp(epsilon) * bins.q[keep]).sum())
        spread = float(bins.p.max())
        above = np.maximum(-np.expm1(epsilon - upper.loss), 0.0) @ upper.mass + upper.infinite
        below = np.maximum(-np.expm1(epsilon - lower.loss), 0.0) @ lower.mass
        assert above >= exact - 1e-12
        assert below <= exact + spread * 1e-3 + 1e-9
        assert above <= below + 0.02


CONCENTRATED = [
    (PoissonGaussianPair(0.363, 1e-5, False), 1e-3),
    (PoissonGaussianPair(0.467, 0.0025, False), 0.01),
    (PoissonGaussianPair(0.467, 0.0025, True), 0.01),
    (PoissonGaussianPair(47.7, 0.002, False), 0.005),
    (ReplaceOnePoissonPair(51.0, 0.0013), 5e-4),
    (ReplaceOnePoissonPair(0.3, 1e-5), 1e-3),
]


@pytest.mark.parametrize("shift", [None, 0.0, 0.37])
@pytest.mark.parametrize(("pair", "width"), CONCENTRATED, ids=str)
def test_a_loss_within_one_cell_is_rounded_down_everywhere_and_by_little_where_the_grid_is_shifted(pair, width, shift):
    low, high = pair.reach(-40.0)
    offset = _offset(pair, width) if shift is None else shift * width
    index = loss_edges(low - offset, high - offset, width, 2.0, 1e-4, 20.0 * width)
    rounded = discretise(pair, index, width, "lower", offset)
    for epsilon in np.concatenate((np.linspace(-4.0 * width, 4.0 * width, 41), np.geomspace(4.0 * width, 5.0, 12))):
        bins = pair.masses(np.array([epsilon]))
        exact = float(bins.p[1] - math.exp(epsilon) * bins.q[1])
        below = float(np.maximum(-np.expm1(epsilon - rounded.loss), 0.0) @ rounded.mass)
        # 1e-15: cancellation of the two tail masses.
        assert below <= exact * (1.0 + 1e-9) + 1e-15
    excess = float(rounded.mass @ np.exp(-rounded.loss)) - 1.0
    if shift is None:
        # An unshifted grid adds up to a quarter of a cell to the mean of e^{−ℓ}.
        assert excess < 5e-3 * width


def test_fixed_size_one_step_matches_the_known_profile():
    sigma, q, epsilon = 2.0, 0.1, 0.3
    engine = create_accountant("prv", relation=REPLACE_ONE)
    engine.record(GaussianStep(sigma, FixedSizeSampling(100, 1000)))
    # For ε ≥ 0: the profile of the subsampled Gaussian of sensitivity 2 (half the noise).
    exact = single_step_delta(sigma / 2.0, q, epsilon)
    bound = engine.get_delta(epsilon)
    assert bound.lower <= exact <= bound.upper <= 1.01 * exact


def test_laplace_releases_are_bounded_by_their_pure_guarantee_and_tight_at_one():
    engine = PRVAccountant()
    engine.record(LaplaceRelease(2.0))
    bound = engine.get_epsilon(1e-3)
    # δ(ε) of one Laplace release: 1 − e^{(ε − 1/b)/2}.
    exact = 0.5 + 2.0 * math.log(1.0 - 1e-3)
    assert bound.lower <= exact <= bound.upper <= min(0.5, 1.001 * exact)


def test_replace_one_doubles_the_sensitivity_of_unsampled_releases():
    single = accountant("prv", [(1.0, 1.0, 4)]).get_epsilon(1e-6)
    replaced = accountant("prv", [(2.0, 1.0, 4)], REPLACE_ONE).get_epsilon(1e-6)
    assert float(replaced) == pytest.approx(float(single), rel=1e-9)  # the same mechanism
    engine = create_accountant("prv", relation=REPLACE_ONE)
    engine.record(GaussianRelease(2.0), 4)
    assert float(engine.get_epsilon(1e-6)) == pytest.approx(float(single), rel=1e-9)


@pytest.mark.parametrize(("phases", "delta", "relation"), CASES)
def test_renyi_accounting_is_above_numerical_composition(phases, delta, relation):
    rdp = accountant("rdp", phases, relation).get_epsilon(delta)
    prv = accountant("prv", phases, relation).get_epsilon(delta)
    assert prv.lower < prv.upper < rdp
    assert rdp < 1.6 * prv


@pytest.mark.slow
def test_renyi_accounting_matches_opacus_where_opacus_is_precise():
    opacus = pytest.importorskip("opacus.accountants")
    reference = opacus.RDPAccountant()
    reference.history = [(1.0, 0.01, 1000), (2.0, 0.02, 500)]
    ours = float(accountant("rdp", reference.history).get_epsilon(1e-5))
    theirs = reference.get_epsilon(1e-5)
    assert ours <= theirs
    assert ours == pytest.approx(theirs, rel=1e-3)  # their orders are spaced by 0.1


def test_tiny_targets_are_reached_because_orders_extend_beyond_those_of_opacus():
    rdp = RDPAccountant()
    rdp.step(noise_multiplier=300.0, sample_rate=0.01, steps=1000)
    assert rdp.get_epsilon(1e-6) < 2.5 * accountant("prv", [(300.0, 0.01, 1000)]).get_epsilon(1e-6)
    assert rdp.get_epsilon(1e-6) < 0.01


def test_extreme_steps_are_answered_finitely_and_never_below_zero():
    for sigma, q, n, delta in [
        (0.01, 0.5, 3, 1e-6),
        (1e3, 1e-6, 1, 1e-9),
        (50.0, 1e-3, 10**7, 1e-6),
        (1.0, 0.999999, 10, 1e-6),
        (1.0, 0.01, 10, 0.5),
        (1e-3, 0.5, 10**6, 1e-12),
        (0.2, 1e-9, 77, 1e-100),
    ]:
        for kind in ("prv", "rdp", "auto"):
            with warnings.catch_warnings():
                # At an ε of 5e11 the Rényi bound answers.
                warnings.simplefilter("ignore", FallbackWarning)
                bound = accountant(kind, [(sigma, q, n)]).get_epsilon(delta)
            assert 0.0 <= bound.lower <= bound.upper < math.inf


def test_a_vanishing_delta_is_still_certified():
    engine = accountant("prv", [(1.0, 0.01, 1000)])
    bound = engine.get_epsilon(1e-100)
    assert 0.95 * bound.upper < bound.lower < bound.upper < accountant("rdp", engine.history).get_epsilon(1e-100)


def test_unsampled_phases_mixed_with_sampled_ones_are_merged():
    whole = accountant("prv", [(20.0, 1.0, 400), (1.0, 0.01, 1000)]).get_epsilon(1e-6)
    merged = PRVAccountant()
    merged.record(GaussianStep(1.0, NoSampling()))
    merged.record(GaussianStep(1.0, PoissonSampling(0.01)), 1000)
    assert float(whole) == pytest.approx(float(merged.get_epsilon(1e-6)), rel=1e-9)


@pytest.mark.parametrize("accountant", [RDPAccountant, PRVAccountant])
@pytest.mark.parametrize("sigma", [1e-100, 1e-20, 1e-5, 1e20, 1e100])
def test_noise_of_any_size_has_an_answer_in_order(accountant, sigma):
    spent = accountant()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spent.step(noise_multiplier=sigma, sample_rate=0.1, steps=10)
        epsilon = float(spent.get_epsilon(1e-5))
    # One step alone reveals about 1/(2σ²) where there is hardly any noise, and nothing where there is nothing else.
    assert epsilon >= 0.4 / sigma**2 if sigma < 1 else epsilon <= 1e-3


@pytest.mark.parametrize("sigma", [1e-101, 1e101, 1e308, 5e-324])
def test_noise_whose_square_is_no_float_is_refused(sigma):
    with pytest.raises(InvalidParameterError, match="1e-100"):
        GaussianStep(sigma, PoissonSampling(0.1))
