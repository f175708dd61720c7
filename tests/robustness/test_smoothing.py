"""Smoothed classifiers: exact radii where they are known, and bounds that hold as often as they say."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import rel_entr
from scipy.stats import binom, norm
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError, layers
from clipless_dp.robustness import (
    Curve,
    Draws,
    Smoothed,
    SmoothedCertificate,
    average_certified_radius,
    certified_accuracy,
    certify,
    confidence,
    draw_together,
    draws,
    maps,
    ramps,
)
from clipless_dp.robustness.confidence import Array
from clipless_dp.robustness.constants import constants_of
from tests.robustness.nets import NETWORKS, points, seeded
from tests.soundness.mutation import Mutant

REPETITIONS = 10_000
ALPHA = 0.05
ALLOWED = ALPHA + 4.0 * math.sqrt(ALPHA * (1.0 - ALPHA) / REPETITIONS)
"""Four deviations of a share of so many repetitions."""
SIGMA = 0.5


def half_space(*rows: tuple[float, ...]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows, dtype=torch.float64))
    return layer


OPPOSED = half_space((1.0, 0.0), (-1.0, 0.0))
JOINT = math.sqrt(2.0)
"""Of the scores of ``OPPOSED`` together; their difference is 2-Lipschitz."""


def drawn(sums: Array, squares: Array, selection: Array, n0: int, n: int, kind: str, slope: float = math.inf) -> Draws:
    """Draws whose sums were simulated."""
    count = len(sums)
    origin = SmoothedCertificate(
        torch.zeros(count, dtype=torch.float64), torch.full((count,), -1), n0=n0, n=n, sigma=SIGMA, map=kind
    )
    tensors = [torch.from_numpy(np.asarray(one, dtype=np.float64)) for one in (selection, sums, squares)]
    nothing = torch.zeros(count, dtype=torch.float64)
    return Draws(*tensors, n0, n, nothing, nothing.bool(), slope, None, 1.0, origin)


def counted(shares: tuple[float, ...], n: int, seed: int = 0, n0: int | None = None) -> Draws:
    """Counts of ten thousand repetitions of predictions that fall on classes with these probabilities."""
    random = np.random.default_rng(seed)
    n0 = n if n0 is None else n0
    first = random.multinomial(n0, shares, REPETITIONS)
    second = random.multinomial(n, shares, REPETITIONS)
    return drawn(second, second, first, n0, n, "argmax")


def wrong_bounds(certificate: SmoothedCertificate, made: Draws, shares: tuple[float, ...]) -> float:
    """How often the bounds do not hold both: of the selected class, and of the largest share of another one."""
    true = torch.tensor(shares, dtype=torch.float64)
    chosen = made.selection.argmax(1)
    own = true[chosen]
    others = true.expand(len(made), -1).clone()
    others[torch.arange(len(made)), chosen] = 0.0
    assert certificate.lower is not None
    assert certificate.upper is not None
    return float(((certificate.lower > own) | (certificate.upper < others.amax(1))).double().mean())


def wrong_radii(certificate: SmoothedCertificate, made: Draws, shares: tuple[float, ...]) -> float:
    """How often the radius passes that of half-spaces with these shares, which are the worst case."""
    true = np.asarray(shares)
    chosen = made.selection.argmax(1).numpy()
    others = np.array([np.delete(true, one).max() for one in range(len(true))])
    radii = 0.5 * SIGMA * (norm.ppf(true) - norm.ppf(others)).clip(min=0.0)
    return float((certificate.radii.numpy() > radii[chosen]).mean())


SHARES = {
    "one ahead": (0.75, 0.1, 0.1, 0.05),
    "two close": (0.5, 0.3, 0.1, 0.1),
    "almost certain": (0.97, 0.01, 0.01, 0.01),
    "ten alike": (0.1,) * 10,
}
PAIRS = [("cohen", "rest"), ("cohen", "each"), ("bernstein", "rest"), ("bernstein", "each"), ("partition", "rest")]


@pytest.mark.parametrize("n", [10, 50, 200])
@pytest.mark.parametrize(("method", "against"), PAIRS)
@pytest.mark.parametrize("name", SHARES)
def test_counts_certify_too_much_at_most_as_often_as_alpha_says(name: str, method: str, against: str, n: int) -> None:
    made = counted(SHARES[name], n)
    found = made.certify(ALPHA, method, against)  # type: ignore[arg-type]
    assert wrong_bounds(found, made, SHARES[name]) <= ALLOWED
    assert wrong_radii(found, made, SHARES[name]) <= ALLOWED


@pytest.mark.parametrize("n", [10, 50, 200])
@pytest.mark.parametrize("slope", [0.5, 4.0])
def test_ramps_are_certified_too_much_at_most_as_often_as_alpha_says(slope: float, n: int) -> None:
    start = 0.4
    random = np.random.default_rng(n)
    noise = SIGMA * random.standard_normal((REPETITIONS, n))
    values = (slope * (start + 1.0 / slope - noise)).clip(0.0, 1.0)
    sums = np.stack([values.sum(1), (1.0 - values).sum(1)], 1)
    squares = np.stack([(values**2).sum(1), ((1.0 - values) ** 2).sum(1)], 1)

    def radii(rows: Array, method: str) -> Tensor:
        selection = np.tile([1.0, 0.0], (len(rows), 1))
        made = drawn(sums[rows], squares[rows], selection, 1, n, "margin", slope)
        found = made.certify(ALPHA, method)  # type: ignore[arg-type]
        assert found.lower is not None
        assert bool((found.lower <= made.sums[:, 0] / n).all())
        return found.radii

    # The ramp is the worst of all functions: no radius is above its own but by chance.
    true = start + 0.5 / slope
    every = np.arange(REPETITIONS)
    assert float((radii(every, "bernstein") > true).double().mean()) <= ALLOWED
    # Since bounds lie below the mean of the draws, only means above the true one can give a radius above it.
    high = np.flatnonzero(sums[:, 0] > n * ramps.ramp_mean(start, slope, SIGMA))
    assert int((radii(high, "lipschitz") > true).sum()) <= ALLOWED * REPETITIONS
    if n == 200:
        assert float(radii(every[:500], "lipschitz").mean()) > 0.2 * true


def test_mutants_of_the_statistics_are_caught_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    unsplit = Mutant("α not split", confidence, "split", "alpha / bounds", "alpha + 0.0 * bounds")
    reused = Mutant("selection draws reused", Draws, "certify", "self.selection.argmax(1)", "self.sums.argmax(1)")
    uncorrected = Mutant(
        "partition uncorrected", Draws, "_partitioned", "confidence.split(alpha, bounds)", "alpha + 0.0 * bounds"
    )
    likely, alike = SHARES["two close"], SHARES["ten alike"]
    cases: list[tuple[Mutant, tuple[float, ...], str, str]] = [
        (unsplit, likely, "cohen", "each"),
        (reused, alike, "cohen", "rest"),
        (uncorrected, likely, "partition", "rest"),
    ]
    for mutant, shares, method, against in cases:
        with monkeypatch.context() as patch:
            mutant.apply(patch)
            made = counted(shares, 2000)
            # Of what is selected from the same draws the chosen class is another one, so that it is read off them.
            seen = replace(made, selection=made.sums) if mutant is reused else made
            found = made.certify(ALPHA, method, against)  # type: ignore[arg-type]
            assert wrong_bounds(found, seen, shares) > ALLOWED + 0.01, mutant.name


def test_the_best_of_several_maps_is_wrong_more_often_than_each_of_them() -> None:
    # Twenty smoothed classifiers that are equally good: the best certificate is that of the luckiest draws.
    share, k = (0.8, 0.2), 20
    made = [counted(share, 200, seed) for seed in range(k)]
    true = SIGMA * norm.ppf(0.8)
    best = torch.stack([one.certify(ALPHA).radii for one in made]).amax(0)
    assert float((best > true).double().mean()) > 5.0 * ALLOWED
    shared = torch.stack([one.certify(ALPHA / k).radii for one in made]).amax(0)
    assert float((shared > true).double().mean()) <= ALLOWED


def test_the_lower_bound_is_the_one_sided_quantile_and_no_other() -> None:
    counts = np.arange(0, 101)
    lower = confidence.clopper_pearson_lower(counts, 100, 0.001)
    upper = confidence.clopper_pearson_upper(counts, 100, 0.001)
    assert lower[0] == 0.0
    assert upper[-1] == 1.0
    # The definition, which a two-sided quantile, of α/2, fails by a factor of two. Bounds, of 1e-5 and more, are
    # rounded by 1e-13.
    assert binom.sf(counts[1:] - 1, 100, lower[1:]) == pytest.approx(0.001, rel=1e-5)
    assert binom.cdf(counts[:-1], 100, upper[:-1]) == pytest.approx(0.001, rel=1e-5)
    assert bool((binom.sf(counts[1:] - 1, 100, lower[1:]) <= 0.001).all())
    two_sided = confidence.clopper_pearson_lower(counts[1:], 100, 0.0005)
    assert binom.sf(counts[1:] - 1, 100, two_sided) != pytest.approx(0.001, rel=0.1)


def test_bernsteins_bound_is_maurers_and_pontils() -> None:
    values = np.array([0.1, 0.4, 0.9, 0.3, 0.3])
    expected = values.mean() - math.sqrt(2.0 * values.var(ddof=1) * math.log(40.0) / 5) - 7 * math.log(40.0) / 12.0
    many = np.tile(values, 400)
    found = confidence.bernstein_lower(many.sum(), (many**2).sum(), 2000, 0.05)
    expected = many.mean() - math.sqrt(2.0 * many.var(ddof=1) * math.log(40.0) / 2000) - 7 * math.log(40.0) / (3 * 1999)
    assert float(found) == pytest.approx(expected, abs=1e-6)
    assert float(found) <= expected
    assert float(confidence.bernstein_upper(many.sum(), (many**2).sum(), 2000, 0.05)) == pytest.approx(
        2.0 * many.mean() - expected, abs=1e-6
    )


def test_chernoffs_bound_is_where_the_divergence_is_and_reaches_what_counts_do() -> None:
    sums = np.array([0.0, 3.0, 50.5, 99.9, 100.0])
    lower = confidence.chernoff_lower(sums, 100, 0.001)
    assert lower[0] == 0.0
    means = sums[1:] / 100
    divergence = 100 * (rel_entr(means, lower[1:]) + rel_entr(1.0 - means, 1.0 - lower[1:]))
    # Means are rounded down by 1e-13, bounds too.
    assert divergence == pytest.approx(np.log(1000.0), rel=1e-6)
    assert bool((divergence >= np.log(1000.0)).all())
    assert lower[-1] == pytest.approx(0.001**0.01, abs=1e-11)
    for spread in (0.01, 1.0, math.inf):
        both = confidence.bounded_lower(sums, sums**2 / 100, 100, 0.003, spread)
        assert bool((both >= confidence.bernstein_lower(sums, sums**2 / 100, 100, 0.001)).all())
        assert bool((both >= lower).all())
        upper = confidence.bounded_upper(100 - sums, (100 - sums) ** 2 / 100, 100, 0.003, spread)
        assert upper == pytest.approx(1.0 - both, abs=1e-9)
    near = confidence.bounded_lower(np.array([50.0]), np.array([25.0]), 100, 0.003, 0.01)
    assert near == pytest.approx(0.5 - 0.01 * math.sqrt(2.0 * math.log(1000.0) / 100), abs=1e-9)


@pytest.mark.parametrize("n", [10, 100])
def test_a_lipschitz_functions_mean_is_concentrated_as_one_number_of_its_spread_is_and_no_more(n: int) -> None:
    random, slope = np.random.default_rng(n), 0.2
    # A line is the worst of all functions, but for its ends.
    values = (0.5 + slope * SIGMA * random.standard_normal((200_000 // n, n))).clip(0.0, 1.0)
    lower = confidence.concentrated_lower(values.sum(1), n, ALPHA, slope * SIGMA)
    wrong = float((lower > 0.5).mean())
    assert wrong <= ALPHA
    # Of half of the spread it is wrong too often.
    short = values.mean(1) - slope * SIGMA * math.sqrt(0.5 * math.log(1.0 / ALPHA) / n)
    assert float((short > 0.5).mean()) > ALPHA


def test_noise_that_is_not_normal_alone_has_no_such_bound() -> None:
    sums = np.array([[5_000.0, 5_000.0]])
    normal = drawn(sums, sums**2 / 10_000, np.array([[1.0, 0.0]]), 1, 10_000, "margin", 0.01)
    mixed = replace(normal, origin=replace(normal.origin, noise="categories replaced"))
    first, second = (one.certify(ALPHA, "lipschitz").lower for one in (normal, mixed))
    assert first is not None
    assert second is not None
    assert bool((second < first).all())


def test_groups_hold_no_more_than_the_second_class_and_every_class_once() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        counts = np.sort(random.multinomial(50, random.dirichlet(np.full(7, 0.4))))[random.permutation(7)].astype(float)
        groups = confidence.buckets(counts)
        second = np.sort(counts)[-2]
        assert sorted(one for group in groups for one in group) == list(range(7))
        assert [len(group) for group in groups[:2]] == [1, 1]
        assert counts[groups[0]].sum() == counts.max()
        assert all(counts[group].sum() <= second for group in groups[1:])


@pytest.mark.parametrize("name", maps.MAPS)
def test_what_is_averaged_lies_in_the_unit_interval_and_no_two_classes_pass_one_together(name: maps.Map) -> None:
    scores = points(200, 4, size=2.0)
    scores[0] = 1.0
    scores[1, :2] = 3.0
    values = maps.mapped(scores, name, 0.7)
    assert bool((values >= 0).all() & (values <= 1).all())
    assert bool((values.topk(2, 1).values.sum(1) <= 1.0 + 1e-12).all())
    # Another order of classes is another order of values.
    if name != "argmax":
        assert torch.allclose(maps.mapped(scores[:, [2, 0, 3, 1]], name, 0.7), values[:, [2, 0, 3, 1]])


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    for row in points(8, 4, size=1.5):
        found = minimize(
            lambda p, row=row: ((p - 0.7 * row.numpy()) ** 2).sum(),
            np.full(4, 0.25),
            bounds=[(0.0, 1.0)] * 4,
            constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1.0}],
            options={"ftol": 1e-14},
        )
        assert maps.mapped(row[None], "sparsemax", 0.7).numpy() == pytest.approx(found.x[None], abs=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sparsemax", "margin"])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_slope_of_a_map_is_never_passed_and_attained_for_two_classes(name: maps.Map, classes: int) -> None:
    known = maps.slope(name, 3.0, constants_of(nn.Identity(), 1.0, classes))
    scores = points(4000, classes, size=0.5)
    scores[:2] = 0.0
    step = 1e-5 * nn.functional.normalize(points(4000, classes, seed=1), dim=1)
    step[0] = 0.0
    step[0, :2] = 1e-5 * torch.tensor([0.5**0.5, -(0.5**0.5)])
    moved = (maps.mapped(scores + step, name, 3.0) - maps.mapped(scores, name, 3.0)).abs().amax(1)
    seen = float((moved / 1e-5).max())
    # Differences of numbers near 1, over 1e-5.
    assert seen <= known * (1.0 + 1e-9) + 1e-10
    if classes == 2:
        assert seen == pytest.approx(known, rel=1e-6)


METHODS: list[tuple[maps.Map, draws.Method]] = [
    ("argmax", "cohen"),
    ("argmax", "partition"),
    ("argmax", "bernstein"),
    ("softmax", "bernstein"),
    ("softmax", "lipschitz"),
    ("sparsemax", "lipschitz"),
    ("margin", "lipschitz"),
    ("pairs", "lipschitz"),
    ("pairs", "bernstein"),
]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_radii_of_a_half_space_are_below_the_distance_and_near_it(name: maps.Map, method: draws.Method) -> None:
    inputs = torch.tensor([[0.3, 2.0], [-0.6, 0.0], [0.9, -1.0]], dtype=torch.float64)
    smoothed = Smoothed(OPPOSED, SIGMA, map=name, temperature=0.5, lipschitz=JOINT)
    found = smoothed.certify(inputs, 20, 20_000, 1e-3, method)
    assert found.predictions.tolist() == [0, 1, 0]
    distances = inputs[:, 0].abs()
    assert bool((found.radii <= distances).all())
    # Softmax at τ = ½ is far from a ramp; Cohen's bound of so many draws is 3 % short at the first.
    least = 0.9 if name in ("argmax", "sparsemax", "margin", "pairs") else 0.4
    if not (name in ("softmax", "pairs") and method == "bernstein"):
        assert bool((found.radii >= least * distances).all())


def test_the_lipschitz_aware_radius_is_above_what_the_same_means_certify_without() -> None:
    model = seeded(NETWORKS["orthogonal"]).double()
    inputs = points(30, 5)
    kept = Smoothed(model, 0.3, map="margin", temperature=2.0).draw(inputs, 20, 2000)
    exact, plain = kept.certify(1e-3, "lipschitz"), kept.certify(1e-3, "bernstein")
    assert exact.lower is not None
    certified = exact.radii > 0
    assert bool((exact.radii >= plain.radii)[certified].all())
    assert bool((exact.radii >= (exact.lower - 0.5) / exact.slope - 1e-9)[certified].all())
    assert float(exact.radii.sum()) > 1.1 * float(plain.radii.sum())
    assert exact.lipschitz == certify(model, inputs).lipschitz


def test_no_smoothed_mean_changes_its_class_within_a_radius() -> None:
    model = seeded(NETWORKS["residual"]).double()
    inputs = points(12, 5)
    smoothed = Smoothed(model, 0.2, map="softmax", temperature=3.0)
    found = smoothed.certify(inputs, 50, 4000, 1e-3, "lipschitz", against="each")
    assert int((found.radii > 0).sum()) >= 6
    directions = nn.functional.normalize(points(12, 5, seed=2), dim=1)
    for sign in (1.0, -1.0):
        moved = smoothed.draw(inputs + sign * 0.99 * found.radii[:, None] * directions, 1, 4000, rng_seed=7)
        assert bool((moved.sums.argmax(1) == found.predictions)[found.radii > 0].all())


def test_no_pair_changes_its_order_within_a_radius_and_pairs_certify_more_than_margins() -> None:
    model = seeded(NETWORKS["residual"]).double()
    inputs = points(12, 5)
    several = [Smoothed(model, 0.2, map=name, temperature=1.0) for name in ("pairs", "margin")]
    pairs, margins = draw_together(several, inputs, 50, 4000)
    found = pairs.certify(1e-3, "lipschitz")
    certified = found.radii > 0
    assert int(certified.sum()) >= 6
    below = margins.certify(1e-3, "lipschitz").radii
    assert bool((found.radii >= below - 1e-12).all())
    assert float(found.radii.sum()) > float(below.sum())
    directions = nn.functional.normalize(points(12, 5, seed=2), dim=1)
    for sign in (1.0, -1.0):
        moved = several[0].predict(inputs + sign * 0.99 * found.radii[:, None] * directions, 4000, rng_seed=7)
        assert bool(((moved == found.predictions) | (moved == -1))[certified].all())


@pytest.mark.parametrize("n", [20, 200])
def test_the_least_of_nine_bounds_is_wrong_no_more_often_than_one_of_them(n: int) -> None:
    random = np.random.default_rng(n)
    shares = np.array([0.75, 0.76, 0.8, 0.8, 0.9, 0.9, 0.95, 0.97, 0.99])
    counts = random.binomial(n, shares, (REPETITIONS, 9))
    sums = np.concatenate([np.full((REPETITIONS, 1), float(n)), counts], 1)
    selection = np.tile([1.0, *[0.0] * 9], (REPETITIONS, 1))
    found = drawn(sums, sums, selection, 1, n, "pairs").certify(ALPHA, "bernstein")
    assert found.lower is not None
    assert float((found.radii > SIGMA * norm.ppf(0.75)).double().mean()) <= ALLOWED
    assert float((found.lower > 0.75).double().mean()) <= ALLOWED
    # Of the largest in place of the least it would be wrong almost always.
    largest = confidence.bernstein_lower(counts.max(1), counts.max(1), n, ALPHA)
    assert n == 20 or float((largest > 0.75).mean()) > 0.9


def test_a_pairs_slope_is_its_own_and_never_passed() -> None:
    factors = torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    joint = math.sqrt(1.0 + 9.0)
    smoothed = Smoothed(half_space(*torch.diag(factors).tolist()), SIGMA, map="pairs", temperature=0.5, lipschitz=joint)
    kept = smoothed.draw(points(3, 3), 5, 10)
    assert kept.slopes is not None
    steps = 1e-6 * nn.functional.normalize(points(4000, 3, seed=1), dim=1)
    own = torch.zeros(4000, dtype=torch.long)
    for best in range(3):
        chosen = own + best
        before = maps.mapped(torch.zeros(4000, 3).double(), "pairs", 0.5, chosen)
        moved = (maps.mapped(steps * factors, "pairs", 0.5, chosen) - before).abs().amax(0) / 1e-6
        assert bool((moved <= kept.slopes[best] * (1.0 + 1e-9) + 1e-9).all())
        assert bool((before[:, best] == 1.0).all())


def test_draws_that_are_kept_certify_what_fresh_ones_do_and_chunks_change_nothing_but_noise() -> None:
    smoothed = Smoothed(OPPOSED, SIGMA, map="argmax")
    inputs = torch.tensor([[0.3, 2.0], [-0.6, 0.0]], dtype=torch.float64)
    kept = pickle.loads(pickle.dumps(smoothed.draw(inputs, 30, 700, rng_seed=3)))
    again = smoothed.certify(inputs, 30, 700, 0.01, rng_seed=3)
    assert torch.equal(kept.certify(0.01).radii, again.radii)
    assert torch.equal(kept.sums.sum(1), torch.full((2,), 700.0).double())
    assert bool((kept.certify(0.001).radii < again.radii).all())
    assert not torch.equal(smoothed.certify(inputs, 30, 700, 0.01, rng_seed=4).radii, again.radii)
    for rows in (1, 64, 10_000):
        other = smoothed.draw(inputs, 30, 700, batch_size=rows, progress=rows == 64)
        assert torch.equal(other.sums.sum(1), torch.full((2,), 700.0).double())
        # Five deviations of a difference of two counts.
        assert bool(((other.sums - kept.sums).abs() < 5.0 * math.sqrt(2 * 700 * 0.25)).all())


def test_several_maps_on_the_same_noise_are_what_each_is_alone() -> None:
    inputs = torch.tensor([[0.3, 2.0], [-0.6, 0.0]], dtype=torch.float64)
    several = [Smoothed(OPPOSED, SIGMA), Smoothed(OPPOSED, SIGMA, map="margin", temperature=0.5, lipschitz=JOINT)]
    for one, kept in zip(several, draw_together(several, inputs, 20, 300, rng_seed=5), strict=True):
        alone = one.draw(inputs, 20, 300, rng_seed=5)
        assert torch.equal(kept.sums, alone.sums)
        assert torch.equal(kept.squares, alone.squares)
        assert kept.origin.map == one.map
        assert kept.slope == alone.slope
    for other in ([], [several[0], Smoothed(OPPOSED, 0.4)], [several[0], Smoothed(half_space((1.0, 0.0)), SIGMA)]):
        with pytest.raises(ConfigurationError):
            draw_together(other, inputs, 20, 300)


def test_answers_abstain_on_the_boundary_and_are_right_off_it() -> None:
    inputs = torch.tensor([[0.0, 2.0], [-0.6, 0.0], [0.4, 1.0]], dtype=torch.float64)
    for name in ("argmax", "softmax", "margin", "pairs"):
        smoothed = Smoothed(OPPOSED, SIGMA, map=name, temperature=2.0)
        assert smoothed.predict(inputs, 1000).tolist() == [-1, 1, 0]
    # At the boundary every answer is wrong: they are as rare as α says.
    answers = Smoothed(OPPOSED, SIGMA).predict(torch.zeros(800, 2).double(), 100, ALPHA)
    assert float((answers >= 0).double().mean()) <= ALPHA + 4.0 * math.sqrt(ALPHA / 800)


def test_curves_and_averages_take_smoothed_certificates_and_statements_say_what_they_hold_for() -> None:
    inputs = torch.tensor([[0.3, 2.0], [-0.6, 0.0], [0.0, 1.0], [0.9, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    found = Smoothed(OPPOSED, SIGMA).certify((inputs, labels), 20, 1000)
    assert found.predictions.tolist() == [0, 1, -1, 0]
    assert certified_accuracy(found, 0.1) == 0.5
    assert average_certified_radius(found) == pytest.approx(float(found.radii[:2].sum()) / 4.0)
    curve = Curve.of(found, None, (0.0, 0.4))
    assert [point.certified.value for point in curve.points] == [0.5, 0.25]
    told = curve.described("made samples")
    text = "\n".join(told["assumptions"])
    for words in ("smoothed classifier", "deviation 0.5", "0.999", "cohen"):
        assert words in text
    assert "real arithmetic" not in text
    other = Smoothed(OPPOSED, 0.4).certify((inputs, labels), 20, 1000)
    assert other.digest != found.digest


def test_units_and_fronts_scale_radii() -> None:
    inputs = torch.tensor([[0.3, 2.0], [-0.6, 0.0]], dtype=torch.float64)
    plain = Smoothed(OPPOSED, SIGMA, map="margin", lipschitz=JOINT).certify(inputs, 20, 500, method="lipschitz")
    raw = Smoothed(OPPOSED, SIGMA, map="margin", lipschitz=JOINT, units=(0.5, 2.0)).certify(
        inputs, 20, 500, method="lipschitz"
    )
    assert raw.radii.tolist() == pytest.approx((0.5 * plain.radii).tolist())
    front = half_space((2.0, 0.0), (0.0, 2.0))
    behind = Smoothed(OPPOSED, SIGMA, map="margin", lipschitz=JOINT, front=front, front_lipschitz=2.0)
    found = behind.certify(inputs, 20, 500, method="lipschitz")
    assert found.slope == pytest.approx(2.0 * plain.slope)
    assert found.front is not None
    assert bool((found.radii <= inputs[:, 0].abs()).all())


def test_samples_with_scores_that_are_not_finite_are_not_certified() -> None:
    model = seeded(NETWORKS["orthogonal"]).double()
    inputs = points(4, 5)
    inputs[1, 2] = math.nan
    found = Smoothed(model, 0.1, map="margin").certify(inputs, 10, 100, 0.01, "lipschitz")
    assert (float(found.radii[1]), int(found.predictions[1]), found.dropped) == (0.0, -1, 1)
    assert int(Smoothed(model, 0.1).predict(inputs, 100)[1]) == -1


def test_a_method_that_does_not_go_with_the_map_is_refused_before_anything_is_drawn() -> None:
    inputs = points(2, 2)

    def refuse(words: str, smoothed: Callable[[], Smoothed], **arguments: object) -> None:
        with pytest.raises(ConfigurationError, match=words):
            smoothed().certify(inputs, 10, 100, **arguments)  # type: ignore[arg-type]

    stated = {"lipschitz": JOINT}
    refuse("argmax jumps", lambda: Smoothed(OPPOSED, 0.5, **stated), method="lipschitz")
    refuse("map='argmax'", lambda: Smoothed(OPPOSED, 0.5, map="softmax"), method="cohen")
    refuse("map='argmax'", lambda: Smoothed(OPPOSED, 0.5, map="softmax"), method="partition")
    refuse("lipschitz=...", lambda: Smoothed(OPPOSED, 0.5, map="softmax"), method="lipschitz")
    refuse("lipschitz=None", lambda: Smoothed(OPPOSED, 0.5, map="softmax", lipschitz=None), method="lipschitz")
    refuse("leave against out", lambda: Smoothed(OPPOSED, 0.5), method="partition", against="each")
    refuse("method", lambda: Smoothed(OPPOSED, 0.5), method="best")
    refuse("sigma", lambda: Smoothed(OPPOSED, 0.0))
    refuse("map", lambda: Smoothed(OPPOSED, 0.5, map="hardmax"))  # type: ignore[arg-type]
    refuse("temperature", lambda: Smoothed(OPPOSED, 0.5, temperature=-1.0))
    refuse("'auto'", lambda: Smoothed(OPPOSED, 0.5, lipschitz="none"))  # type: ignore[arg-type]
    refuse("alpha", lambda: Smoothed(OPPOSED, 0.5), alpha=1.0)
    with pytest.raises(ConfigurationError, match="n must be"):
        Smoothed(OPPOSED, 0.5).certify(inputs, 10, 1)
    with pytest.raises(InputError, match="no samples"):
        Smoothed(OPPOSED, 0.5).certify(inputs[:0], 10, 100)
    with pytest.raises(InputError, match="labels"):
        Smoothed(OPPOSED, 0.5).certify((inputs, torch.tensor([0, 2])), 10, 100)


def test_one_output_counts_as_two_scores() -> None:
    single = half_space((1.0, 0.0))
    inputs = torch.tensor([[0.3, 2.0], [-0.6, 0.0]], dtype=torch.float64)
    for name in ("softmax", "sparsemax", "margin"):
        smoothed = Smoothed(single, SIGMA, map=name, temperature=0.4, lipschitz=1.0)
        found = smoothed.certify(inputs, 20, 20_000, 1e-3, "lipschitz")
        # The scores are (-f, f).
        assert found.predictions.tolist() == [1, 0]
        assert bool((found.radii <= inputs[:, 0].abs()).all())
        steepest = 0.4 * 2.0 / (4.0 if name == "softmax" else 2.0)
        assert found.slope == pytest.approx(steepest)


def test_a_network_of_a_smaller_stated_constant_certifies_more_and_mutants_of_slopes_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = torch.tensor([[0.3, 2.0], [-0.6, 0.0]], dtype=torch.float64)

    def radii() -> Tensor:
        smoothed = Smoothed(OPPOSED, SIGMA, map="margin", temperature=0.4, lipschitz=JOINT)
        return smoothed.certify(inputs, 20, 20_000, 1e-3, "lipschitz").radii

    assert bool((radii() <= inputs[:, 0].abs()).all())
    for mutant in (
        Mutant("ramp width 2/L", ramps, "radii", "middle = 0.5 / lipschitz", "middle = 1.0 / lipschitz"),
        Mutant("half the slope of margins", maps, "slope", "else 2.0", "else 4.0"),
    ):
        with monkeypatch.context() as patch:
            mutant.apply(patch)
            if mutant.owner is maps:
                patch.setattr("clipless_dp.robustness.smoothing.slope", maps.slope)
            assert bool((radii() > inputs[:, 0].abs()).any()), mutant.name


def test_smoothing_leaves_the_model_as_it_was() -> None:
    model = seeded(NETWORKS["convolutions"])
    model.train()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}  # type: ignore[union-attr]
    Smoothed(model, 0.1, map="margin").certify(points(2, 1, 4, 4).float(), 5, 40, 0.1, "lipschitz")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())  # type: ignore[union-attr]
    assert isinstance(model.net[1], layers.MaxMin)  # type: ignore[index, union-attr]
