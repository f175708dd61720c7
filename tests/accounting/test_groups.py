"""Privacy of a person with several rows: proofs by number, references, and mutants."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr
from scipy.stats import binom

import accounting.accountants
import accounting.terms
from accounting import ADD_OR_REMOVE_ONE, REPLACE_ONE, events
from accounting.accountants import PRVAccountant, RDPAccountant, create_accountant
from accounting.calibration import calibrate_ledger, calibrate_noise_multiplier, calibrate_sample_rate, calibrate_steps
from accounting.cli import main
from accounting.errors import InvalidParameterError, UnsupportedEventError
from accounting.gaussian import gaussian_epsilon
from accounting.groups import GroupPoissonPair, ReplaceGroupPoissonPair, binomial_log_weights, log_likelihood_ratio
from accounting.inversion import invert
from accounting.pairs import PoissonGaussianPair, ReplaceOnePoissonPair
from accounting.privacy_loss import discretise, loss_edges
from accounting.prv import compose_epsilon
from accounting.rdp import group_cumulant, rdp_to_epsilon
from accounting.selection import AnyOf, PrivateSelection
from accounting.terms import collect

REFERENCE = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "groups.json").read_text())
"""Written by `python benchmarks/groups.py --reference` with dp-accounting 0.6.0."""


def accountant(kind, phases, relation=ADD_OR_REMOVE_ONE):
    result = create_accountant(kind, relation=relation)
    for sigma, q, n in phases:
        result.step(noise_multiplier=sigma, sample_rate=q, steps=n)
    return result


def one_step_deltas(sigma, q, k, epsilon):
    """Exact δ(ε) of one step, removing and adding a group: half-lines where the likelihood ratio is e^ε."""
    j = np.arange(k + 1)
    b = binom.pmf(j, k, q)

    def ratio(x):
        return float(logsumexp((2 * j * x - j**2) / (2 * sigma**2), b=b))

    def solve(value):
        ends = -60.0 * sigma**2 - 60.0 * sigma, k + 60.0 * sigma
        return brentq(lambda x: ratio(x) - value, *ends, xtol=1e-13) if ratio(ends[0]) < value else None

    x = solve(epsilon)
    remove = float(b @ ndtr((j - x) / sigma) - math.exp(epsilon) * ndtr(-x / sigma))
    x = solve(-epsilon)
    add = 0.0 if x is None else float(ndtr(x / sigma) - math.exp(epsilon) * (b @ ndtr((x - j) / sigma)))
    return remove, add


@pytest.mark.parametrize("k", [2, 7, 40])
@pytest.mark.parametrize(("sigma", "q"), [(0.7, 0.01), (3.0, 0.2), (8.0, 0.7)])
@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_one_step_of_a_group_lies_between_its_bounds(k, sigma, q, epsilon):
    exact = max(one_step_deltas(sigma, q, k, epsilon))
    if exact < 1e-12:
        pytest.skip("the closed form loses its digits to cancellation")
    bound = accountant("prv", [(sigma, q, 1)]).get_delta(epsilon, group_size=k)
    # 1e-7 (and 1e-15 absolute): cancellation of two tails in the closed form.
    assert bound.lower <= exact * (1.0 + 1e-7) + 1e-15
    assert exact <= bound.upper * (1.0 + 1e-7) + 1e-15
    # The grid is laid out for a relative 2e-4 in ε, times the tilt.
    assert bound.upper <= 1.02 * bound.lower


ARRANGEMENTS = [
    ([(1.0, 0.0), (0.0, 1.0)], "right angle"),
    ([(1.0, 0.0), (-1.0, 0.0)], "opposite"),
    ([(1.0, 0.0), (0.6, 0.8)], "acute"),
    ([(1.0, 0.0), (0.3, 0.0)], "short"),
    ([(0.5, 0.5), (0.9, -0.2)], "short and askew"),
]


@pytest.mark.parametrize("vectors", [a for a, _ in ARRANGEMENTS], ids=[name for _, name in ARRANGEMENTS])
@pytest.mark.parametrize("direction", ["remove", "add", "replace"])
def test_no_arrangement_of_a_groups_rows_reveals_more_than_aligned_ones(vectors, direction):
    sigma, q, width = 0.8, 0.3, 0.04
    side = np.arange(-8.0, 8.0, width)
    grid = np.stack(np.meshgrid(side, side), axis=-1)

    def mixture(rows):
        total = np.zeros(grid.shape[:2])
        for chosen in range(4):
            drawn = [row for i, row in enumerate(rows) if chosen >> i & 1]
            centre = np.sum(drawn, axis=0) if drawn else np.zeros(2)
            weight = q ** len(drawn) * (1.0 - q) ** (2 - len(drawn))
            total += weight * np.exp(-((grid - centre) ** 2).sum(-1) / (2 * sigma**2))
        return total * (width**2 / (2 * math.pi * sigma**2))

    # Replacing: by rows turned a quarter, which is worse than nothing and better than a half turn.
    others = {"replace": [(-y, x) for x, y in vectors]}.get(direction, [(0.0, 0.0)] * 2)
    aligned_others = {"replace": [(-1.0, 0.0)] * 2}.get(direction, [(0.0, 0.0)] * 2)
    p, m = mixture(vectors), mixture(others)
    worst_p, worst_m = mixture([(1.0, 0.0)] * 2), mixture(aligned_others)
    if direction == "add":
        p, m, worst_p, worst_m = m, p, worst_m, worst_p
    relation = REPLACE_ONE if direction == "replace" else ADD_OR_REMOVE_ONE
    stated = accountant("prv", [(sigma, q, 1)], relation)
    for epsilon in (0.0, 0.4, 1.5):
        value = np.maximum(p - math.exp(epsilon) * m, 0.0).sum()
        worst = np.maximum(worst_p - math.exp(epsilon) * worst_m, 0.0).sum()
        # 1e-3: the midpoint rule across the kink, of order width², here and below.
        assert value <= worst + 1e-3
        assert worst <= stated.get_delta(epsilon, group_size=2).upper + 1e-3


COMPOSED = [
    ([(1.0, 0.01, 1000)], 2, 1e-5, ADD_OR_REMOVE_ONE),
    ([(4.0, 0.05, 300)], 5, 1e-6, ADD_OR_REMOVE_ONE),
    ([(20.0, 0.02, 2000)], 20, 1e-6, ADD_OR_REMOVE_ONE),
    ([(15.0, 0.8, 200)], 4, 1e-5, ADD_OR_REMOVE_ONE),
    ([(3.0, 0.02, 300), (30.0, 1.0, 4)], 3, 1e-7, ADD_OR_REMOVE_ONE),
    ([(5.0, 0.02, 500)], 3, 1e-6, REPLACE_ONE),
    ([(20.0, 0.3, 50)], 6, 1e-8, REPLACE_ONE),
]
COMPOSED_IDS = [f"{phases[0]} of {k}, {relation}" for phases, k, _, relation in COMPOSED]


def inversions(phases, k, delta, relation):
    engine = accountant("prv", phases, relation)
    terms = collect(engine.ledger, relation, k)
    _, order = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
    found = invert(terms, order - 1.0, seconds=4.0)
    assert all(inversion.truncation < 1e-12 for inversion in found)
    return found


@pytest.mark.parametrize(("phases", "k", "delta", "relation"), COMPOSED, ids=COMPOSED_IDS)
def test_composed_groups_are_bracketed_around_the_inverse_laplace_transform(phases, k, delta, relation):
    bound = accountant("prv", phases, relation).get_epsilon(delta, group_size=k)
    found = inversions(phases, k, delta, relation)
    # 1e-6: the inversion agrees with itself to that when its line is moved.
    assert max(i.delta(bound.upper) - i.noise(bound.upper) for i in found) <= delta * (1.0 + 1e-6)
    assert max(i.delta(bound.lower) + i.noise(bound.lower) for i in found) >= delta * (1.0 - 1e-6)
    assert bound.upper <= 1.01 * bound.lower
    rdp = accountant("rdp", phases, relation).get_epsilon(delta, group_size=k)
    assert bound.upper < rdp


def agrees_with_the_reference(row, *, upper, lower):
    """Whether bounds of a ledger enclose those of dp-accounting, and are tight where its grid is fine."""
    sound = row["optimistic"] <= upper * (1.0 + 1e-6) and lower <= row["pessimistic"] * (1.0 + 1e-6)
    tight = upper <= 1.01 * lower and upper <= 1.01 * row["pessimistic"]
    # Its pessimistic estimate, of second order in a grid of a twentieth of a loss's spread, is within 2 %.
    return sound and tight and (row["coarse"] or row["pessimistic"] <= 1.02 * upper)


def checked(rows):
    result = []
    for row in rows:
        engine = accountant("prv", [(row["sigma"], row["q"], row["steps"])])
        bound = engine.get_epsilon(row["delta"], group_size=row["k"])
        result.append(agrees_with_the_reference(row, upper=bound.upper, lower=bound.lower))
    return result


def test_every_fourth_ledger_is_bracketed_to_a_per_cent_and_agrees_with_dp_accounting():
    assert all(checked(REFERENCE[::4]))


@pytest.mark.slow
def test_more_than_fifty_ledgers_are_bracketed_to_a_per_cent_and_agree_with_dp_accounting():
    assert len(REFERENCE) >= 50
    assert {row["k"] for row in REFERENCE} >= {2, 3, 5, 10, 20, 50, 100}
    assert all(checked(REFERENCE))


def test_mutants_of_a_groups_epsilon_disagree_with_dp_accounting():
    def disagreeing(mutant):
        values = [mutant(row) for row in rows]
        return sum(not agrees_with_the_reference(row, upper=v, lower=v) for row, v in zip(rows, values, strict=True))

    rows = [row for row in REFERENCE if not row["coarse"]][::3]

    def thumb(row):
        engine = accountant("prv", [(row["sigma"], row["q"], row["steps"])])
        return row["k"] * float(engine.get_epsilon(row["delta"]))

    def all_rows_always(row):
        engine = accountant("prv", [(row["sigma"] / row["k"], row["q"], row["steps"])])
        return float(engine.get_epsilon(row["delta"]))

    def one_after_another(row):
        engine = accountant("prv", [(row["sigma"], row["q"], row["steps"] * row["k"])])
        return float(engine.get_epsilon(row["delta"]))

    for mutant in (thumb, all_rows_always, one_after_another):
        assert disagreeing(mutant) > 0.8 * len(rows), mutant.__name__


def test_k_times_the_epsilon_of_a_row_at_the_same_delta_is_below_the_truth():
    engine = accountant("prv", [(1.0, 0.01, 1000)])
    for k in (2, 4):
        assert k * float(engine.get_epsilon(1e-6)) < engine.get_epsilon(1e-6, group_size=k).lower


def truth_is_violated(phases, k, delta, relation=ADD_OR_REMOVE_ONE):
    """Whether the numerical engine, as it stands, reports less than the inversion proves."""
    reported = float(accountant("prv", phases, relation).get_epsilon(delta, group_size=k))
    found = inversions(phases, k, delta, relation)
    return max(i.delta(reported) - i.noise(reported) for i in found) > delta * (1.0 + 1e-6)


def test_mutant_one_direction_of_a_group_is_caught(monkeypatch):
    case = ([(4.0, 0.05, 300)], 5, 1e-6)
    assert not truth_is_violated(*case)
    original = accounting.terms._pairs
    monkeypatch.setattr(accounting.terms, "_pairs", lambda *asked: original(*asked)[-1:])
    assert truth_is_violated(*case)


def test_mutant_adding_pair_in_place_of_replacing_is_caught(monkeypatch):
    case = ([(5.0, 0.02, 500)], 3, 1e-6, REPLACE_ONE)
    assert not truth_is_violated(*case)
    mutant = staticmethod(lambda sigma, q, k: GroupPoissonPair(sigma, q, k, False))
    monkeypatch.setattr(accounting.terms, "ReplaceGroupPoissonPair", mutant)
    assert truth_is_violated(*case)


def test_mutant_mean_number_of_rows_in_place_of_its_law_is_caught():
    # kq rows in every step: a Gaussian release of that sensitivity.
    sigma, q, n, k, delta = 1.0, 0.01, 1000, 10, 1e-6
    mean = gaussian_epsilon(k * q * math.sqrt(n) / sigma, delta)
    assert mean < accountant("prv", [(sigma, q, n)]).get_epsilon(delta, group_size=k).lower


@pytest.mark.parametrize("relation", [ADD_OR_REMOVE_ONE, REPLACE_ONE])
@pytest.mark.parametrize("kind", ["prv", "rdp", "auto"])
def test_a_group_of_one_row_has_the_epsilon_of_a_row_to_the_last_digit(kind, relation):
    engine = accountant(kind, [(1.1, 0.013, 700), (6.0, 1.0, 3)], relation)
    engine.record(events.LaplaceRelease(9.0))
    one, row = engine.get_epsilon(1e-6, group_size=1), engine.get_epsilon(1e-6)
    assert (one.upper.hex(), one.lower.hex()) == (row.upper.hex(), row.lower.hex())
    pairs = {type(pair) for direction in collect(engine.ledger, relation, 1).directions() for pair, _ in direction}
    assert (ReplaceOnePoissonPair if relation == REPLACE_ONE else PoissonGaussianPair) in pairs
    assert not pairs & {GroupPoissonPair, ReplaceGroupPoissonPair}


@pytest.mark.parametrize(("sigma", "q", "n"), [(1.0, 0.01, 1000), (0.5, 1e-3, 100), (20.0, 0.9, 1000)])
def test_the_pairs_of_a_group_of_one_are_those_of_a_row(sigma, q, n):
    guess = 3.0, 4.0
    rows = [[(PoissonGaussianPair(sigma, q, adding), n)] for adding in (False, True)]
    groups = [[(GroupPoissonPair(sigma, q, 1, adding), n)] for adding in (False, True)]
    for ours, theirs in (
        (groups, rows),
        ([[(ReplaceGroupPoissonPair(sigma, q, 1), n)]], [[(ReplaceOnePoissonPair(sigma, q), n)]]),
    ):
        # 2e-3: both bracket one truth on grids laid out for a relative 2e-4.
        assert compose_epsilon(ours, 1e-6, guess=guess) == pytest.approx(
            compose_epsilon(theirs, 1e-6, guess=guess), rel=2e-3
        )


@pytest.mark.parametrize("relation", [ADD_OR_REMOVE_ONE, REPLACE_ONE])
@pytest.mark.parametrize("k", [2, 10, pytest.param(100, marks=pytest.mark.slow)])
def test_releases_of_all_rows_cost_a_group_k_sensitivities_exactly(k, relation):
    change = 2.0 if relation == REPLACE_ONE else 1.0
    for event in (
        events.GaussianRelease(30.0),
        events.GaussianStep(30.0, events.NoSampling()),
        events.ShuffledEpoch(30.0),
    ):
        engine = PRVAccountant(relation=relation)
        engine.record(event, 4)
        bound = engine.get_epsilon(1e-6, group_size=k)
        assert bound.engine == "analytic-gaussian"
        assert bound.upper == pytest.approx(gaussian_epsilon(change * k * 2.0 / 30.0, 1e-6), rel=1e-9)
    engine = PRVAccountant(relation=relation)
    engine.record(events.LaplaceRelease(50.0))
    bound = engine.get_epsilon(1e-3, group_size=k)
    # δ(ε) of one Laplace release is 1 − e^{(ε − k/b)/2}; 1e-3 is the grid.
    exact = change * k / 50.0 + 2.0 * math.log1p(-1e-3)
    assert bound.lower <= exact <= bound.upper <= 1.001 * exact


def test_layers_on_one_draw_cost_a_group_what_their_joint_noise_costs():
    vector, single = PRVAccountant(), PRVAccountant()
    step = events.GaussianVectorStep((6.0, 4.0), events.PoissonSampling(0.02))
    vector.record(step, 200)
    single.step(noise_multiplier=step.noise_multiplier, sample_rate=0.02, steps=200)
    assert vector.get_epsilon(1e-6, group_size=5) == single.get_epsilon(1e-6, group_size=5)


def test_mixed_ledgers_of_groups_lie_between_their_parts_and_their_sum():
    steps, release = (events.GaussianStep(3.0, events.PoissonSampling(0.01)), 500), (events.GaussianRelease(50.0), 1)
    whole, alone = PRVAccountant(), []
    for event, count in (steps, release):
        single = PRVAccountant()
        single.record(event, count)
        whole.record(event, count)
        alone.append(single)
    whole.record(events.LaplaceRelease(40.0))
    bound = whole.get_epsilon(2e-6, group_size=6)
    assert bound.lower >= max(one.get_epsilon(2e-6, group_size=6).lower for one in alone)
    # Basic composition: half of δ each, and the pure ε of six rows of the Laplace release.
    assert bound.upper <= sum(float(one.get_epsilon(1e-6, group_size=6)) for one in alone) + 6.0 / 40.0
    assert bound.upper <= 1.01 * bound.lower


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize(("sigma", "q", "k"), [(0.5, 0.01, 3), (3.0, 0.3, 8), (10.0, 0.02, 40)])
def test_renyi_divergences_of_groups_are_those_of_both_directions(sigma, q, k, replacing):
    j = np.arange(k + 1)
    b = binom.pmf(j, k, q)
    for t in (0.05, 0.7, 3.0):
        x = np.linspace(-k - 20.0 * sigma, (2.0 * t + 1.0) * k + 20.0 * sigma, 10_001)
        log_g = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(x[1] - x[0])
        up, down = (
            logsumexp(np.multiply.outer(side, j) / sigma**2 - j**2 / (2 * sigma**2), b=b, axis=1) for side in (x, -x)
        )
        values = [log_g + (1.0 + t) * up - t * down] if replacing else [log_g + (1.0 + t) * up, log_g - t * up]
        exact = max(math.log(math.fsum(np.exp(v - v.max()))) + float(v.max()) for v in values)
        stated = float(group_cumulant(sigma, q, np.array([t]), group_size=k, replacing=replacing)[0])
        # 1e-6: the fine Riemann sum of the test.
        assert stated == pytest.approx(exact, rel=1e-6, abs=1e-9)
        assert stated >= exact - 1e-6 * abs(exact) - 1e-9


@pytest.mark.parametrize(("sigma", "q", "k"), [(0.5, 1e-4, 30), (1.0, 0.01, 5), (40.0, 0.9, 20)])
def test_the_log_likelihood_ratio_is_within_its_error_bound_of_multiple_precision(sigma, q, k):
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    x = np.linspace(-5.0 * sigma, k + 5.0 * sigma, 23)
    found = log_likelihood_ratio(x, sigma, *binomial_log_weights(q, k))
    for at, value, error in zip(x, found.value, found.error, strict=True):
        s, p = mpmath.mpf(sigma), mpmath.mpf(q)
        terms = [
            mpmath.binomial(k, j)
            * p**j
            * (1 - p) ** (k - j)
            * mpmath.exp((2 * j * mpmath.mpf(at) - j * j) / (2 * s**2))
            for j in range(k + 1)
        ]
        exact = mpmath.log(mpmath.fsum(terms))
        assert abs(exact - mpmath.mpf(value)) <= error
        # Where most of the weight is near 0, so must the error be.
        assert error < 1e-11 * (1.0 + abs(value))


PAIRS = [
    GroupPoissonPair(1.0, 0.05, 4, False),
    GroupPoissonPair(1.0, 0.05, 4, True),
    GroupPoissonPair(20.0, 0.6, 50, False),
    GroupPoissonPair(0.5, 1e-4, 20, True),
    ReplaceGroupPoissonPair(2.0, 0.05, 4),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_masses_of_a_group_lie_between_the_losses_they_are_asked_for(pair):
    low, high = pair.reach(-40.0)
    edges = np.linspace(low, high, 4001)
    bins = pair.masses(edges)
    assert bins.p.sum() == pytest.approx(1.0, abs=1e-9)
    assert bins.q.sum() == pytest.approx(1.0, abs=1e-9)
    assert bins.p[0] + bins.p[-1] <= 4.0 * math.exp(-40.0)
    # Losses are found to rounding, so that thousands of steps do not feel it.
    assert bins.edge_error < 1e-12 * (1.0 + max(abs(low), abs(high)))
    counted = (bins.p[1:-1] > 1e-12) & (bins.q[1:-1] > 1e-12)
    ratio = np.log(bins.p[1:-1][counted] / bins.q[1:-1][counted])
    # 1e-3: masses of 1e-12 have that many digits left.
    assert (ratio >= edges[:-1][counted] - 1e-3).all()
    assert (ratio <= edges[1:][counted] + 1e-3).all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_rounding_a_group_moves_its_divergence_only_in_the_stated_direction(pair):
    low, high = pair.reach(-40.0)
    width = 0.02 * (high - low)
    index = loss_edges(low, high, width, 2.0, 1e-3)
    upper, lower = (discretise(pair, index, width, side) for side in ("upper", "lower"))
    for epsilon in np.linspace(low + width, high - width, 17):
        bins = pair.masses(np.array([epsilon]))
        exact = float(bins.p[1] - math.exp(epsilon) * bins.q[1])
        above = float(np.maximum(-np.expm1(epsilon - upper.loss), 0.0) @ upper.mass) + upper.infinite
        below = float(np.maximum(-np.expm1(epsilon - lower.loss), 0.0) @ lower.mass)
        # 1e-15 and 1e-9: cancellation of the two tail masses.
        assert below <= exact * (1.0 + 1e-9) + 1e-15
        assert above >= exact * (1.0 - 1e-9) - 1e-15


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([ADD_OR_REMOVE_ONE, REPLACE_ONE]),
    st.integers(2, 30),
    st.floats(-3.5, -0.1).map(lambda x: 10.0**x),
    st.integers(1, 3000),
    st.floats(0.3, 3.0),
    st.floats(-9.0, -3.0).map(lambda x: 10.0**x),
)
def test_a_groups_epsilon_grows_with_its_rows_and_is_at_most_that_of_all_rows_whenever_one_is_drawn(
    relation, k, q, n, strength, delta
):
    sigma = max(k * q * math.sqrt(n) / strength, 0.5)
    engine = accountant("prv", [(sigma, q, n)], relation)
    smaller, bound = (engine.get_epsilon(delta, group_size=size) for size in (k - 1, k))
    assert smaller.lower <= bound.lower * 1.002 + 1e-2  # the slack of two grids, as in the row's tests
    assert bound.lower <= bound.upper
    # More rows in a batch tell more: Choquette-Choo et al. 2024, "Privacy amplification for matrix mechanisms", §4.
    together = accountant("prv", [(sigma / k, -math.expm1(k * math.log1p(-q)), n)], relation).get_epsilon(delta)
    assert bound.lower <= together.upper
    assert bound.upper <= engine.get_epsilon(delta / 10.0, group_size=k).upper * 1.002 + 1e-2


def test_searches_and_choices_count_groups_in_their_trials():
    trial = ((events.GaussianStep(8.0, events.PoissonSampling(0.02)), 200),)
    search, choice = RDPAccountant(), create_accountant("auto")
    search.record(PrivateSelection(trial, 5.0, 1.0))
    choice.record(AnyOf((trial, ((events.GaussianStep(9.0, events.PoissonSampling(0.02)), 200),))))
    once = accountant("rdp", [(8.0, 0.02, 200)])
    for k in (1, 6):
        assert search.get_epsilon(1e-6, group_size=k) > once.get_epsilon(1e-6, group_size=k)
        chosen, alone = (float(one.get_epsilon(1e-6, group_size=k)) for one in (choice, once))
        assert chosen == pytest.approx(alone, rel=1e-3)  # the grids of orders differ
    assert search.get_epsilon(1e-6, group_size=6) > 4.0 * search.get_epsilon(1e-6)


def test_many_phases_are_rounded_to_no_smaller_loss_of_groups(monkeypatch):
    monkeypatch.setattr(accounting.accountants, "_PRV_PHASES", 8)
    engine = PRVAccountant()
    for i in range(12):
        engine.step(noise_multiplier=20.0 * (1.0 + i / 120.0), sample_rate=0.02, steps=50)
    bound = engine.get_epsilon(1e-6, group_size=5)
    assert "rounded" in bound.engine
    assert accountant("prv", [(22.0, 0.02, 600)]).get_epsilon(1e-6, group_size=5).lower <= bound.upper
    assert bound.upper <= accountant("prv", [(19.9, 0.02, 600)]).get_epsilon(1e-6, group_size=5).upper


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "4", math.inf, math.nan, None])
def test_a_group_that_is_no_whole_number_of_rows_is_refused(size):
    engine = accountant("prv", [(1.0, 0.01, 10)])
    for ask in (engine.get_epsilon, engine.get_delta):
        with pytest.raises(InvalidParameterError, match="group_size"):
            ask(1e-6, group_size=size)


def test_a_group_too_large_for_the_mixture_is_refused_where_it_matters_only():
    with pytest.raises(InvalidParameterError, match="sample people instead of rows"):
        accountant("prv", [(1.0, 0.01, 10)]).get_epsilon(1e-6, group_size=10_001)
    assert accountant("prv", [(1e6, 1.0, 10)]).get_epsilon(1e-6, group_size=20_000) > 0.0


def test_fixed_size_batches_are_refused_for_groups_and_say_what_to_do():
    engine = PRVAccountant(relation=REPLACE_ONE)
    engine.record(events.GaussianStep(2.0, events.FixedSizeSampling(10, 1000)), 5)
    assert engine.get_epsilon(1e-6, group_size=1) > 0.0
    with pytest.raises(UnsupportedEventError, match="draw them by Poisson sampling"):
        engine.get_epsilon(1e-6, group_size=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::accounting.FallbackWarning")  # At an ε of 1e8 the Rényi bound answers.
def test_extreme_groups_are_answered_finitely_and_in_order():
    for sigma, q, n, k, delta in [
        (0.3, 1e-5, 1000, 100, 1e-9),
        (1e-3, 0.5, 10, 5, 1e-6),
        (1.0, 0.999, 5, 100, 1e-6),
        (1e4, 0.01, 10**6, 100, 1e-12),
        (2.0, 1e-9, 3, 7, 1e-60),
        (5.0, 0.01, 100, 3000, 1e-6),
    ]:
        for kind in ("prv", "rdp"):
            bound = accountant(kind, [(sigma, q, n)]).get_epsilon(delta, group_size=k)
            assert 0.0 <= bound.lower <= bound.upper < math.inf


def test_calibration_meets_a_persons_target_and_not_much_more():
    asked = {"target_epsilon": 3.0, "delta": 1e-6, "group_size": 4, "accountant": "rdp"}
    sigma = calibrate_noise_multiplier(sample_rate=0.02, steps=100, **asked)
    engine = accountant("rdp", [(sigma, 0.02, 100)])
    assert 0.999 * 3.0 < engine.get_epsilon(1e-6, group_size=4) <= 3.0
    assert calibrate_steps(noise_multiplier=sigma, sample_rate=0.02, **asked) in range(99, 102)
    rate = calibrate_sample_rate(noise_multiplier=sigma, steps=100, **asked)
    assert rate == pytest.approx(0.02, rel=2e-3)
    factor, _ = calibrate_ledger(engine.ledger, **asked)
    assert factor == pytest.approx(1.0, abs=2e-3)
    assert sigma > 1.5 * calibrate_noise_multiplier(**{**asked, "group_size": 1}, sample_rate=0.02, steps=100)


def test_a_bound_and_a_statements_line_say_whom_they_are_about():
    engine = accountant("prv", [(4.0, 0.01, 1000)])
    bound = engine.get_epsilon(1e-6, group_size=10)
    assert bound.group_size == 10
    assert "group_size=10" in repr(bound)
    assert pickle.loads(pickle.dumps(bound)).group_size == 10
    assert "group_size" not in repr(engine.get_epsilon(1e-6))
    line = engine.line_for_a_person(1e-6, rows=10)
    assert line.startswith("for a person with up to 10 rows: ε = ")
    assert float(line.split("ε = ")[1].split()[0]) >= bound.upper
    assert engine.line_for_a_person(1e-6, rows=1).startswith("for a person with one row: ")


def test_the_command_line_answers_for_groups(capsys, tmp_path):
    engine = accountant("prv", [(4.0, 0.01, 1000)])
    expected = f"{engine.get_epsilon(1e-6, group_size=10).upper:.4g}"
    path = tmp_path / "ledger.json"
    engine.ledger.save(path)
    schedule = ["--noise-multiplier", "4", "--sample-rate", "0.01", "--steps", "1000"]
    for command in (
        ["epsilon", *schedule, "--delta", "1e-6"],
        ["curve", *schedule, "--deltas", "1e-6"],
        ["explain", str(path), "--delta", "1e-6"],
    ):
        assert main([*command, "--group-size", "10"]) == 0
        assert f"for a person with up to 10 rows: epsilon = {expected}" in capsys.readouterr().out
    assert main(["noise", "--epsilon", "3", *schedule[2:], "--delta", "1e-6", "--group-size", "4"]) == 0
    assert "up to 4 rows" in capsys.readouterr().out
    assert main(["epsilon", *schedule, "--delta", "1e-6", "--group-size", "0"]) == 2
    assert "group_size" in capsys.readouterr().err
