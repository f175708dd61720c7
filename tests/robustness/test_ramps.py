"""The exact certificate: its values and limits, and that no Lipschitz function has a smaller radius."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ncx2, norm

from clipless_dp.robustness import ramps
from clipless_dp.robustness.confidence import Array

GRID = np.linspace(-9.0, 9.0, 3601)
"""Of the noise, in deviations: sums over it err by less than 1e-5 for functions of slope 20."""
DENSITY = norm.pdf(GRID) / norm.pdf(GRID).sum()


def radius_of(p: float, sigma: float, lipschitz: float = math.inf) -> float:
    return float(ramps.radii(np.array([p]), None, sigma, lipschitz)[0])


def test_values_that_were_computed_elsewhere() -> None:
    for lipschitz, expected in ((0.2, 2.406), (1.0, 0.950), (math.inf, 0.822)):
        assert radius_of(0.95, 0.5, lipschitz) == pytest.approx(expected, abs=5e-4)


@given(st.floats(0.5001, 0.9999), st.floats(1e-2, 10.0), st.floats(1e-3, 1e3))
def test_it_certifies_no_less_than_cohen_and_than_the_constant_alone(p: float, sigma: float, slope: float) -> None:
    found = radius_of(p, sigma, slope)
    # Roundings downwards, of the size of σ and of the ramp's width.
    allowed = 1e-9 * (sigma + 1.0 / slope)
    assert found >= sigma * norm.ppf(p) - allowed
    assert found >= (p - 0.5) / slope - allowed
    assert radius_of(p, sigma, 2.0 * slope) <= found + allowed


def test_its_limits_are_cohens_radius_and_that_of_the_constant_alone() -> None:
    for p in (0.6, 0.9, 0.999):
        assert radius_of(p, 0.5, 1e4) == pytest.approx(0.5 * norm.ppf(p), rel=1e-6)
        assert radius_of(p, 1e-7, 3.0) == pytest.approx((p - 0.5) / 3.0, abs=1e-6)
    assert radius_of(0.6, 0.5, 0.0) == math.inf
    assert radius_of(0.5, 0.5, 0.0) == 0.0


@given(st.floats(0.501, 0.99999), st.floats(0.05, 5.0), st.floats(0.01, 40.0))
@settings(max_examples=40)
def test_radii_are_rounded_down_and_by_little(p: float, sigma: float, slope: float) -> None:
    if slope * sigma > 60.0:
        return
    with mpmath.workdps(40):

        def psi(z: mpmath.mpf) -> mpmath.mpf:
            return z * mpmath.ncdf(z) + mpmath.npdf(z)

        width = 1 / mpmath.mpf(slope)
        found = mpmath.mpf(radius_of(p, sigma, slope))
        start = found - width / 2
        mean = (psi((start + width) / sigma) - psi(start / sigma)) * slope * sigma
        # The mean of the ramp whose radius it is: below p, and above what a slightly larger radius would have.
        assert mean <= p
        assert p - mean < 1e-10


def test_the_ramp_itself_has_exactly_this_radius() -> None:
    for slope, start, sigma in ((2.0, 0.3, 0.5), (0.3, -0.5, 1.0), (20.0, 0.9, 0.5)):
        p = ramps.ramp_mean(start, slope, sigma)
        true = start + 0.5 / slope
        assert radius_of(p, sigma, slope) == pytest.approx(true, rel=1e-9)
        assert radius_of(p, sigma, slope) <= true


def random_functions(count: int, slope: float, seed: int) -> tuple[Array, Array]:
    """Points 1/50 apart, and values there of functions with slopes of at most so much and values in [0, 1]."""
    random = np.random.default_rng(seed)
    points = np.arange(-15.0, 15.01, 0.02)
    steps = random.uniform(-1.0, 1.0, (count, len(points)))
    # Of long pieces, of short ones, and of extreme slopes.
    pieces = random.integers(1, 60, count)
    for row, piece in enumerate(pieces):
        steps[row] = np.repeat(steps[row, ::piece], piece)[: len(points)]
    steps[::3] = np.sign(steps[::3])
    values = random.uniform(-0.5, 1.5, (count, 1)) + 0.02 * slope * steps.cumsum(1)
    middle = values[:, [len(points) // 2]]
    return points, (values - middle + random.uniform(0.3, 1.3, (count, 1))).clip(0.0, 1.0)


def smoothed_at(points: Array, values: Array, sigma: float, where: float) -> Array:
    return np.array([np.interp(where + sigma * GRID, points, row) @ DENSITY for row in values])


@pytest.mark.parametrize("slope", [0.3, 1.0, 5.0])
def test_no_random_function_of_one_variable_falls_below_the_bound(slope: float) -> None:
    sigma = 0.5
    points, values = random_functions(400, slope, int(10 * slope))
    at_zero = smoothed_at(points, values, sigma, 0.0)
    kept = (at_zero > 0.51) & (at_zero < 0.999)
    assert kept.sum() > 40
    values, at_zero = values[kept], at_zero[kept]
    found = ramps.radii(at_zero, None, sigma, slope)
    for row, p, radius in zip(values, at_zero, found, strict=True):
        start = ramps.ramp_start(float(p), slope, sigma)
        for share in (0.3, 0.7, 1.0):
            for sign in (1.0, -1.0):
                there = float(smoothed_at(points, row[None], sigma, sign * share * radius)[0])
                # What the sum over the grid errs by.
                assert there >= ramps.ramp_mean(start - share * radius, slope, sigma) - 1e-5
                assert there >= 0.5 - 1e-5


def test_no_random_function_of_two_variables_falls_below_one_half_within_its_radius() -> None:
    sigma, slope = 0.6, 1.5
    side = np.linspace(-5.0, 5.0, 61)
    noise = sigma * np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    weight = np.exp(-0.5 * (noise / sigma) ** 2).prod(1)
    weight /= weight.sum()
    angles = np.linspace(0.0, 2.0 * math.pi, 12, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    random = np.random.default_rng(0)
    tightest = math.inf
    for _ in range(150):
        # Largest of cones less the largest of others: each slope is ½·slope at most.
        centres = random.normal(0.0, 1.5, (2, 6, 2))
        tops = random.uniform(0.0, 1.5, (2, 6))

        def function(at: Array, centres: Array = centres, tops: Array = tops) -> Array:
            apart = np.abs((at[:, 0] + 1j * at[:, 1])[:, None, None] - (centres[..., 0] + 1j * centres[..., 1]))
            up, down = (tops - 0.5 * slope * apart).max(-1).T
            return (0.6 + up - down).clip(0.0, 1.0)

        p = float(function(noise) @ weight)
        if not 0.51 < p < 0.999:
            continue
        radius = radius_of(p, sigma, slope)
        lowest = min(float(function(noise + radius * one) @ weight) for one in directions)
        tightest = min(tightest, lowest)
        # What the sum over the grid errs by: its points are σ/6 apart.
        assert lowest >= 0.5 - 1e-3
    assert tightest < 0.7


def test_two_classes_that_meet_have_exactly_half_the_distance_of_their_ramps() -> None:
    sigma, slope = 0.5, 1.0
    first, second = 0.8, -0.7
    lower, upper = ramps.ramp_mean(first, slope, sigma), ramps.ramp_mean(second, slope, sigma)
    found = ramps.radii(np.array([lower]), np.array([upper]), sigma, slope)[0]
    assert found <= 0.75
    assert found == pytest.approx(0.75, rel=1e-9)
    # Where they meet: the one falls along the direction, the other rises.
    assert ramps.ramp_mean(first - 0.75, slope, sigma) == pytest.approx(ramps.ramp_mean(second + 0.75, slope, sigma))
    halves = ramps.radii(np.array([lower]), np.array([1.0 - lower]), sigma, slope)[0]
    assert halves == pytest.approx(radius_of(lower, sigma, slope), rel=1e-9)


def test_cohens_radius_of_a_ball_is_below_the_true_one() -> None:
    sigma, size = 0.5, 2.0
    for dimension in (2, 10):

        def inside(distance: float, dimension: int = dimension) -> float:
            return float(ncx2.cdf((size / sigma) ** 2, dimension, (distance / sigma) ** 2 + 1e-12))

        p = inside(0.3)
        if p <= 0.5:
            continue
        radius = radius_of(p, sigma)
        assert radius > 0.0
        # Straight outwards is the worst direction.
        assert inside(0.3 + radius) > 0.5


def test_a_ramp_of_width_two_over_l_is_caught() -> None:
    sigma, slope, start = 0.5, 1.0, 0.4
    p = ramps.ramp_mean(start, slope, sigma)
    assert radius_of(p, sigma, slope) <= start + 0.5 / slope
    assert radius_of(p, sigma, slope / 2.0) > 1.1 * (start + 0.5 / slope)
