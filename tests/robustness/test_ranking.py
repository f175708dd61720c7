"""Certified AUROC: all pairs by brute force, attacks, and mutants that must be caught."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError
from clipless_dp.robustness import certified_auroc

Found = Callable[[np.ndarray, np.ndarray, float, float], float]

# Eighths are exact, so that ties are ties in any arithmetic.
SCORES = st.lists(st.integers(-24, 24).map(lambda whole: whole / 8.0), min_size=1, max_size=12).map(np.array)
RADII = st.integers(0, 8).map(lambda whole: whole / 8.0)


def brute(above: np.ndarray, below: np.ndarray, gap: float) -> float:
    apart = above[:, None] - below[None, :]
    if gap == 0.0:
        return float(((apart > 0.0) + 0.5 * (apart == 0.0)).mean())
    return float((apart > gap).mean())


@settings(max_examples=80, deadline=None)
@given(SCORES, SCORES, RADII, st.sampled_from([0.5, 1.0, 2.0]))
def test_it_is_the_share_of_pairs_by_brute_force(above: np.ndarray, below: np.ndarray, r: float, slope: float) -> None:
    assert certified_auroc(above, below, slope, r) == pytest.approx(brute(above, below, 2.0 * slope * r), abs=1e-12)
    one = certified_auroc(torch.tensor(above), torch.tensor(below), slope, r, sides="one")
    assert one == pytest.approx(brute(above, below, slope * r), abs=1e-12)


def after_attack(above: np.ndarray, below: np.ndarray, moved: float) -> float:
    """The AUROC of the score ``f(x) = x``, L = 1, where each positive went down and each negative up by the radius."""
    return brute(above - moved, below + moved, 0.0)


def caught(found: Found) -> bool:
    """Whether a claim is above what the attack leaves, or is not the AUROC at radius 0."""
    above, below = np.array([0.5, 1.0, 1.0, 2.0]), np.array([0.0, 0.5, 1.0])
    unsound = any(found(above, below, 1.0, r) > after_attack(above, below, r) + 1e-12 for r in (0.25, 0.5, 0.75))
    return unsound or found(above, below, 1.0, 0.0) != brute(above, below, 0.0)


MUTANTS: dict[str, Found] = {
    "r once for two sides": lambda above, below, slope, r: brute(above, below, slope * r),
    "ties counted": lambda above, below, slope, r: float((above[:, None] - below >= 2.0 * slope * r).mean()),
    "ties lost at radius zero": lambda above, below, slope, r: float((above[:, None] - below > 2.0 * slope * r).mean()),
    "the constant left out": lambda above, below, slope, r: brute(above, below, r),
    "sides exchanged": lambda above, below, slope, r: brute(below, above, 2.0 * slope * r),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant: str) -> None:
    assert caught(MUTANTS[mutant])


def test_what_is_shipped_passes_where_mutants_are_caught() -> None:
    assert not caught(certified_auroc)


def test_an_attack_on_both_sides_never_gets_below() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    slope = math.prod(float(torch.linalg.matrix_norm(net[i].weight.detach(), 2)) for i in (0, 2))
    points = {"above": torch.randn(60, 3).double() + 1.0, "below": torch.randn(50, 3).double() - 1.0}
    scores = {name: net(rows).flatten().detach() for name, rows in points.items()}
    sign = 1.0 if scores["above"].mean() > scores["below"].mean() else -1.0

    def attacked(rows: Tensor, way: float, radius: float) -> Tensor:
        moved = rows.clone()
        for _ in range(30):
            moved = moved.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(way * sign * net(moved).sum(), moved)
            step = moved + 0.2 * radius * torch.nn.functional.normalize(slopes, dim=1)
            away = step - rows
            moved = rows + away * (radius / away.norm(dim=1, keepdim=True).clamp(min=radius))
        return (sign * net(moved).flatten()).detach()

    plain = certified_auroc(sign * scores["above"], sign * scores["below"], slope, 0.0)
    for radius in (0.05, 0.2, 0.5):
        worst = certified_auroc(
            attacked(points["above"], -1.0, radius), attacked(points["below"], 1.0, radius), slope, 0.0
        )
        sure = certified_auroc(sign * scores["above"], sign * scores["below"], slope, radius)
        one = certified_auroc(sign * scores["above"], sign * scores["below"], slope, radius, sides="one")
        assert sure <= worst < plain
        assert sure <= one <= plain


def test_the_ends_of_the_range() -> None:
    high, low = np.array([3.0, 4.0]), np.array([0.0, 1.0])
    assert certified_auroc(high, low, 1.0, 0.999) == 1.0
    # The nearest pair is apart by 2: at r = 1 it may be tied.
    assert certified_auroc(high, low, 1.0, 1.0) == 0.75
    assert certified_auroc(high, low, math.inf, 0.1) == 0.0
    assert certified_auroc(high, low, math.inf, 0.0) == 1.0
    assert certified_auroc(high, low, 0.0, 5.0) == 1.0
    assert certified_auroc(high, high, 0.0, 5.0) == 0.25


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"radius": -1.0}, ConfigurationError, "radius"),
        ({"radius": math.inf}, ConfigurationError, "radius"),
        ({"lipschitz": -1.0}, ConfigurationError, "lipschitz"),
        ({"lipschitz": math.nan}, ConfigurationError, "lipschitz"),
        ({"sides": "three"}, ConfigurationError, "sides"),
        ({"positive_scores": [1.0, math.nan]}, InputError, "NaN"),
        ({"negative_scores": []}, InputError, "one at least"),
        ({"negative_scores": [[1.0]]}, InputError, "numbers"),
        ({"negative_scores": ["a"]}, InputError, "numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict, error: type, told: str) -> None:
    arguments = {"positive_scores": [1.0], "negative_scores": [0.0], "lipschitz": 1.0, "radius": 0.1, **changed}
    with pytest.raises(error, match=told):
        certified_auroc(**arguments)
