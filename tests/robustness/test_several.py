"""Several noises: bounds are below what is true of classifiers that are known exactly, and above Cohen's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import chi2, multivariate_normal, ncx2, norm
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError
from clipless_dp.robustness import Smoothed, several
from tests.robustness.nets import points
from tests.soundness.mutation import Mutant, with_each

REPETITIONS = 10_000
ALPHA = 0.05
ALLOWED = ALPHA + 4.0 * math.sqrt(ALPHA * (1.0 - ALPHA) / REPETITIONS)
"""Four deviations of a share of so many repetitions."""
SIGMAS = (0.5, 0.6)


class Shells:
    """The function that is 1 between pairs of distances from the centre: its means are chi-square probabilities."""

    def __init__(self, dimension: int, *ends: float) -> None:
        self.dimension, self.ends = dimension, np.array(ends)

    def mean(self, sigma: float, distance: float = 0.0) -> float:
        at = (self.ends / sigma) ** 2
        if distance == 0.0:
            shares = chi2.cdf(at, self.dimension)
        else:
            shares = ncx2.cdf(at, self.dimension, (distance / sigma) ** 2)
        return float((shares[1::2] - shares[::2]).sum())

    def radius(self, sigma: float) -> float:
        return float(brentq(lambda distance: self.mean(sigma, distance) - 0.5, 1e-3, 20.0))


def ball(dimension: int, mean: float, sigma: float = SIGMAS[0]) -> Shells:
    return Shells(dimension, 0.0, sigma * math.sqrt(float(chi2.ppf(mean, dimension))))


def bound(function: Shells, distance: float, sigmas: tuple[float, ...] = SIGMAS, gap: float = 0.0) -> float:
    """From the exact means, of the others those below by a gap."""
    means = [function.mean(sigma) for sigma in sigmas]
    lower = [mean - gap * (i > 0) for i, mean in enumerate(means)]
    return several.lower_bound(lower, means, distance, sigmas=sigmas, dimension=function.dimension)


def radius(lower: list[float], upper: list[float], sigmas: tuple[float, ...], dimension: int) -> float:
    return several._Search(np.array(lower), np.array(upper), sigmas, dimension).radius()


def brute_force(multipliers: tuple[float, ...], sigmas: tuple[float, ...], dimension: int, distance: float) -> float:
    """The integral over a grid of all coordinates."""
    count = {2: 800, 3: 100}[dimension]
    side = np.linspace(-6.0, 6.0, count + 1)
    side = 0.5 * (side[1:] + side[:-1])
    at = np.stack(np.meshgrid(*[side] * dimension, indexing="ij"), -1)
    centre = np.zeros(dimension)
    centre[0] = distance
    excess = -multivariate_normal(centre, sigmas[0] ** 2).pdf(at)
    for k, sigma in zip(multipliers, sigmas, strict=True):
        excess += k * multivariate_normal(np.zeros(dimension), sigma**2).pdf(at)
    return float(excess.clip(min=0.0).sum()) * (12.0 / count) ** dimension


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_integral_is_bounded_from_above_and_by_little(dimension: int) -> None:
    sigmas = (0.7, 0.9)
    for multipliers, distance in (((2.0, 0.0), 0.5), ((4.0, -1.5), 0.9), ((-0.5, 3.0), 0.7), ((0.8, 1.2), 1.5)):
        found = several._Cells(sigmas, dimension, distance).integral(np.array(multipliers))
        true = brute_force(multipliers, sigmas, dimension, distance)
        # Cells of the grid err by the square of their side where the integrand has its edge.
        assert found >= true - 2e-4
        assert found <= true + 1e-3 * (1.0 + sum(map(abs, multipliers)))


def test_one_noise_alone_is_neyman_and_pearsons_bound() -> None:
    for dimension in (1, 2, 50, 3072):
        for mean, distance in ((0.9, 0.3), (0.99, 1.0), (0.7, 0.1)):
            found = several.lower_bound([mean], [1.0], distance, sigmas=[0.5], dimension=dimension)
            true = norm.cdf(norm.ppf(mean) - distance / 0.5)
            assert true - 1e-3 <= found <= true


@pytest.mark.parametrize("dimension", [1, 2, 10, 784])
def test_half_spaces_are_certified_to_their_distance_and_no_further(dimension: int) -> None:
    for distance in (0.3, 1.1):
        means = [float(norm.cdf(distance / sigma)) for sigma in SIGMAS]
        found = radius(means, means, SIGMAS, dimension)
        assert found <= distance
        # Cohen's radius is exact for them.
        assert found >= distance * (1.0 - 1e-9)


def test_balls_are_certified_further_than_by_cohen_and_not_beyond_their_own_radius() -> None:
    for dimension, mean, least in ((2, 0.9, 1.4), (10, 0.9, 1.8), (10, 0.99, 1.4), (100, 0.9, 2.2)):
        function = ball(dimension, mean)
        means = [function.mean(sigma) for sigma in SIGMAS]
        found = radius(means, means, SIGMAS, dimension)
        assert found <= function.radius(SIGMAS[0])
        assert found >= least * SIGMAS[0] * norm.ppf(mean)


@given(
    st.sampled_from([1, 2, 3, 10, 200]),
    st.lists(st.floats(0.2, 1.8), min_size=2, max_size=4, unique=True),
    st.floats(0.3, 2.0),
    st.floats(0.01, 2.0),
    st.floats(0.0, 0.1),
)
@settings(max_examples=12, deadline=None)
def test_no_set_of_shells_falls_below_the_bound(
    dimension: int, ends: list[float], other: float, distance: float, gap: float
) -> None:
    scale = SIGMAS[0] * math.sqrt(dimension)
    function = Shells(dimension, *(scale * np.sort(ends[: 2 * (len(ends) // 2)])))
    sigmas = (SIGMAS[0], SIGMAS[0] * other) if abs(other - 1.0) > 0.02 else SIGMAS
    means = [function.mean(sigma) for sigma in sigmas]
    lower, upper = [max(one - gap, 0.0) for one in means], [min(one + gap, 1.0) for one in means]
    found = several.lower_bound(lower, upper, distance, sigmas=sigmas, dimension=dimension)
    # What scipy's noncentral distribution errs by.
    assert found <= function.mean(sigmas[0], distance) + 1e-9


@given(st.lists(st.floats(-30.0, 30.0), min_size=3, max_size=3), st.floats(0.0, 1.5))
@settings(max_examples=12, deadline=None)
def test_whatever_the_multipliers_the_bound_holds(multipliers: list[float], distance: float) -> None:
    sigmas = (0.5, 0.6, 0.4)
    function = ball(6, 0.9)
    means = [function.mean(sigma) for sigma in sigmas]
    found = several.lower_bound(means, means, distance, sigmas=sigmas, dimension=6, multipliers=multipliers)
    assert found <= function.mean(sigmas[0], distance) + 1e-9


def test_a_search_never_ends_below_cohen_and_wider_bounds_certify_less() -> None:
    function = ball(5, 0.9)
    first, second = (function.mean(sigma) for sigma in SIGMAS)
    cohen = SIGMAS[0] * norm.ppf(first)
    exact = radius([first, second], [1.0, second], SIGMAS, 5)
    near = radius([first, second - 0.02], [1.0, second + 0.02], SIGMAS, 5)
    nothing = radius([first, 0.0], [1.0, 1.0], SIGMAS, 5)
    assert exact > near > nothing >= cohen * (1.0 - 1e-9)
    assert nothing == pytest.approx(cohen, rel=1e-6)
    # Bounds that no function meets, which the multipliers show: nothing breaks.
    found = several.lower_bound([first, 0.0], [1.0, 0.001], cohen, sigmas=SIGMAS, dimension=5)
    assert 0.5 - 1e-3 <= found <= 1.0
    assert radius([0.5, 0.0], [1.0, 1.0], SIGMAS, 5) == 0.0


def wrong_bounds(means: tuple[float, ...], draws: int) -> float:
    counts = np.random.default_rng(0).binomial(draws, means, (REPETITIONS, len(means))).astype(float)
    lower, upper = several._bounds(counts, draws, ALPHA)
    return float(((lower > means) | (upper < means)).any(1).mean())


def test_all_bounds_hold_together_as_often_as_alpha_says_and_unsplit_ones_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for draws in (50, 2000):
        assert wrong_bounds((0.9, 0.7), draws) <= ALLOWED
        assert wrong_bounds((0.9, 0.7, 0.8), draws) <= ALLOWED
    split = "confidence.split(alpha, 2 * counts.shape[1] - 1)"
    Mutant("α not split over noises", several, "_bounds", split, "alpha").apply(monkeypatch)
    assert wrong_bounds((0.9, 0.7), 2000) > ALLOWED + 0.01


def broken() -> bool:
    """Whether some bound is above what is true."""
    function = ball(4, 0.9)
    for sigmas, distance, gap in itertools.product((SIGMAS, SIGMAS[::-1]), (0.2, 0.6), (0.0, 0.2)):
        means = [function.mean(sigma) for sigma in sigmas]
        for multipliers in (None, (8.0, -4.0), (-1.0, 2.0)):
            found = several.lower_bound(
                [means[0], means[1] - gap],
                means,
                distance,
                sigmas=sigmas,
                dimension=4,
                multipliers=multipliers,
            )
            if found > function.mean(sigmas[0], distance):
                return True
    return False


MUTANTS = [
    Mutant("sign of k⁻u", several, "_dual", "multipliers * upper)", "-multipliers * upper)"),
    Mutant("k⁻ with the lower bound", several, "_dual", "multipliers * upper)", "multipliers * lower)"),
    Mutant(
        "masses of the wrong noise",
        several._Cells,
        "__init__",
        "_masses(along / sigma, across / sigma**2, dimension)",
        "_masses(along / first, across / first**2, dimension)",
    ),
    Mutant(
        "ratios of the wrong noise",
        several._Cells,
        "__init__",
        "0.5 * (1.0 / first**2 - 1.0 / sigma**2), dimension * math.log(first / sigma)",
        "0.5 * (1.0 / first**2 - 1.0 / first**2), dimension * math.log(first / first)",
    ),
]


def test_without_a_mutant_no_bound_is_above_what_is_true() -> None:
    assert not broken()


@with_each(*MUTANTS)
def test_mutants_of_the_dual_are_caught_by_name(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    assert broken(), mutant.name


class Ball(nn.Module):
    """Class 0 within a distance of the origin, 1 outside."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, inputs: Tensor) -> Tensor:
        inside = self.size - inputs.flatten(1).norm(dim=1)
        return torch.stack([inside, -inside], 1)


def test_a_classifier_is_certified_further_than_by_counts_under_one_noise() -> None:
    function = ball(8, 0.95)
    model = Ball(float(function.ends[1]))
    smoothed = [Smoothed(model, sigma) for sigma in SIGMAS]
    inputs = torch.zeros(2, 8, dtype=torch.float64)
    inputs[1, 0] = function.radius(SIGMAS[0])
    labels = torch.tensor([0, 0])
    found = several.certify(smoothed, (inputs, labels), 20, 20_000)
    cohen = smoothed[0].certify((inputs, labels), 20, 20_000)
    assert float(cohen.radii[0]) * 1.1 < float(found.radii[0]) <= function.radius(SIGMAS[0])
    # On the boundary nothing holds.
    assert (int(found.predictions[1]), float(found.radii[1])) == (-1, 0.0)
    assert found.predictions[0] == 0
    assert found.alpha == 1e-3
    assert "0.5, 0.6" in found.claim
    scaled = several.certify([Smoothed(model, s, units=0.5) for s in SIGMAS], inputs, 20, 20_000)
    assert scaled.radii.tolist() == pytest.approx((0.5 * found.radii).tolist())
    inputs[0, 3] = math.nan
    dropped = several.certify(smoothed, inputs, 5, 50)
    assert (dropped.dropped, float(dropped.radii[0]), int(dropped.predictions[0])) == (1, 0.0, -1)


def test_classifiers_and_bounds_that_do_not_fit_are_refused() -> None:
    model = Ball(1.0)
    inputs = points(2, 3)
    one = Smoothed(model, 0.5)
    for words, other in (
        ("two smoothed", []),
        ("two smoothed", [one]),
        ("same sigma", [one, Smoothed(model, 0.5)]),
        ("one model", [one, Smoothed(Ball(1.0), 0.6)]),
        ("argmax", [one, Smoothed(model, 0.6, map="margin")]),
        ("units", [one, Smoothed(model, 0.6, units=0.5)]),
    ):
        with pytest.raises(ConfigurationError, match=words):
            several.certify(other, inputs)
    with pytest.raises(ConfigurationError, match="alpha"):
        several.certify([one, Smoothed(model, 0.6)], inputs, alpha=0.0)
    with pytest.raises(InputError, match="no samples"):
        several.certify([one, Smoothed(model, 0.6)], inputs[:0])
    for words, lower, upper, radius, multipliers in (
        ("for each of sigmas", [0.5], [1.0, 1.0], 0.1, None),
        ("for each of sigmas", [0.5, 0.5], [1.0, 1.0], 0.1, [1.0]),
        ("at most upper", [0.5, 0.5], [1.0, 0.4], 0.1, None),
        ("in size", [0.5, 0.5], [1.0, 0.6], 0.1, [math.inf, 0.0]),
        ("lower must", [1.5, 0.5], [1.0, 0.6], 0.1, None),
        ("radius", [0.5, 0.5], [1.0, 0.6], -0.1, None),
    ):
        with pytest.raises(ConfigurationError, match=words):
            several.lower_bound(lower, upper, radius, sigmas=SIGMAS, dimension=2, multipliers=multipliers)
