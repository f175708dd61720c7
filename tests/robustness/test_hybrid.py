"""Smoothing of numbers and categories: published values, a linear program, and answers that stay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import norm
from torch import nn

from clipless_dp import ConfigurationError, InputError
from clipless_dp.robustness import certified_accuracy, hybrid
from tests.soundness.mutation import Mutant


def test_values_that_were_computed_elsewhere() -> None:
    assert hybrid.lower_bound(0.9, 0.4, sigma=0.5, beta=0.25, sizes=[5]) == pytest.approx(0.15913, abs=5e-6)
    assert hybrid.lower_bound(0.99, 0.2, sigma=0.5, beta=0.25, sizes=[10, 10]) == pytest.approx(0.15186, abs=5e-6)


def test_without_changed_categories_it_is_cohens_bound() -> None:
    for mean in (0.6, 0.9, 0.999):
        found = hybrid.lower_bound(mean, 0.3, sigma=0.5, beta=0.25, sizes=())
        assert found == pytest.approx(norm.cdf(norm.ppf(mean) - 0.6), abs=1e-9)
        assert hybrid.radius(mean, sigma=0.5, beta=0.25, sizes=()) == pytest.approx(0.5 * norm.ppf(mean), rel=1e-8)
        assert hybrid.radius(mean, sigma=0.5, beta=0.25, sizes=()) <= 0.5 * norm.ppf(mean)


def by_linear_program(mean: float, radius: float, sigma: float, beta: float, sizes: list[int]) -> float:
    """The least mean after the change of any function of all values of the categories, and of the number in bins."""
    edges = np.concatenate([[-np.inf], np.linspace(-5.0 * sigma, 5.0 * sigma + radius, 300), [np.inf]])
    number, moved = np.diff(norm.cdf(edges / sigma)), np.diff(norm.cdf((edges - radius) / sigma))
    before, after = [], []
    # Each category is at value 0, and becomes 1.
    for values in itertools.product(*(range(size) for size in sizes)):
        chances = [
            [1.0 - beta if value == at else beta / (size - 1) for value, size in zip(values, sizes, strict=True)]
            for at in (0, 1)
        ]
        before.append(np.prod(chances[0]) * number)
        after.append(np.prod(chances[1]) * moved)
    found = linprog(np.concatenate(after), A_eq=[np.concatenate(before)], b_eq=[mean], bounds=(0.0, 1.0))
    assert found.status == 0
    return float(found.fun)


@pytest.mark.parametrize(
    ("mean", "radius", "beta", "sizes"),
    [
        (0.9, 0.4, 0.25, [5]),
        (0.99, 0.2, 0.25, [3, 4]),
        (0.8, 0.3, 0.6, [3]),
        (0.95, 0.0, 0.7, [2]),
        (0.95, 0.3, 0.0, [4]),
        (0.7, 0.5, 0.5, [2, 2]),
    ],
    ids=["one", "two sizes", "mostly replaced", "numbers stay", "never replaced", "binary"],
)
def test_it_is_the_optimum_of_a_linear_program(mean: float, radius: float, beta: float, sizes: list[int]) -> None:
    found = hybrid.lower_bound(mean, radius, sigma=0.5, beta=beta, sizes=sizes)
    optimum = by_linear_program(mean, radius, 0.5, beta, sizes)
    # Functions that are constant in each bin are no worse than all functions, and almost as bad.
    assert found <= optimum + 1e-7
    assert found == pytest.approx(optimum, abs=2e-3)


@given(st.floats(0.01, 0.999), st.floats(0.0, 2.0), st.floats(0.0, 0.95), st.lists(st.integers(2, 9), max_size=3))
@settings(max_examples=40)
def test_a_larger_move_and_one_more_changed_category_are_never_better(
    mean: float, radius: float, beta: float, sizes: list[int]
) -> None:
    found = hybrid.lower_bound(mean, radius, sigma=0.5, beta=beta, sizes=sizes)
    assert 0.0 <= found <= mean
    # Bounds are off by less than 2e-12 in all.
    assert hybrid.lower_bound(mean, radius + 0.1, sigma=0.5, beta=beta, sizes=sizes) <= found + 1e-9
    assert hybrid.lower_bound(mean, radius, sigma=0.5, beta=beta, sizes=[*sizes, 3]) <= found + 1e-9


def test_half_is_left_at_the_radius_and_not_beyond() -> None:
    for sizes in ([3], [2, 4]):
        found = hybrid.radius(0.995, sigma=0.5, beta=0.6, sizes=sizes)
        assert found > 0.1
        assert hybrid.lower_bound(0.995, found, sigma=0.5, beta=0.6, sizes=sizes) > 0.5
        assert hybrid.lower_bound(0.995, 1.001 * found, sigma=0.5, beta=0.6, sizes=sizes) < 0.5


def table() -> tuple[nn.Module, torch.Tensor]:
    """A linear classifier of two numbers, a category of three values and one of two; and rows."""
    net = nn.Linear(7, 2, bias=False).double()
    with torch.no_grad():
        row = torch.tensor([2.0, 0.0, 0.3, 0.0, -0.3, 0.2, -0.2])
        net.weight.copy_(torch.stack([row, -row]))
    numbers = torch.tensor([[1.5, 0.3], [-1.4, 1.0], [0.02, 0.0]])
    first = nn.functional.one_hot(torch.tensor([0, 2, 1]), 3)
    second = nn.functional.one_hot(torch.tensor([1, 0, 0]), 2)
    return net, torch.cat((numbers, first, second), 1).double()


FIELDS = [[2, 3, 4], [5, 6]]


def test_answers_of_a_table_stay_when_numbers_move_and_categories_change() -> None:
    net, rows = table()
    common = {"beta": 0.6, "fields": FIELDS, "n": 4000, "n0": 50}
    found = [hybrid.certify(net, rows, 0.5, changed=changed, **common) for changed in (0, 1, 2)]  # type: ignore[arg-type]
    assert found[1].predictions.tolist()[:2] == [0, 1]
    assert all(bool((after.radii <= before.radii).all()) for before, after in itertools.pairwise(found))
    radius = float(found[1].radii[0])
    assert radius > 0.2
    # The numbers go straight towards the boundary, and the categories change to what speaks for the other class.
    moved = rows[:1].clone()
    moved[0, 0] -= 0.99 * radius
    moved[0, 2:5] = torch.tensor([0.0, 0.0, 1.0])
    smoothed = hybrid.certify(net, moved, 0.5, changed=0, **common)  # type: ignore[arg-type]
    assert smoothed.predictions.tolist() == [0]
    labelled = hybrid.certify(net, (rows, torch.tensor([0, 1, 0])), 0.5, changed=1, **common)  # type: ignore[arg-type]
    assert certified_accuracy(labelled, 0.2) == pytest.approx(2.0 / 3.0)
    assert "adversary changes up to 1" in labelled.claim


def test_replaced_categories_are_others_and_as_frequent_as_stated() -> None:
    net, rows = table()
    mixed = hybrid._Mixed(net, 0.5, 0.3, FIELDS)
    noisy = mixed._noisy(rows[:1].expand(20_000, -1), torch.Generator().manual_seed(0))
    assert bool((noisy[:, 2:5].sum(1) == 1).all())
    shares = noisy[:, 2:].mean(0)
    # Five deviations of a share of 20 000.
    assert shares.tolist() == pytest.approx([0.7, 0.15, 0.15, 0.3, 0.7], abs=5.0 * (0.21 / 20_000) ** 0.5)
    assert float((noisy[:, :2] - rows[:1, :2]).std()) == pytest.approx(0.5, rel=0.03)
    assert torch.equal(rows, table()[1])


def test_mutants_of_the_bound_are_caught_by_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_linear_program(0.9, 0.4, 0.5, 0.25, [5])
    for mutant in (
        Mutant("a changed category only seen as it was or is", hybrid, "_atoms", "(size - 2) * other", "0.0 * other"),
        Mutant("replaced by any value", hybrid, "_atoms", "beta / (size - 1)", "beta / size"),
        Mutant("no shift after the change", hybrid, "lower_bound", "/ ratio - 0.5 * ratio", "/ ratio + 0.5 * ratio"),
    ):
        with monkeypatch.context() as patch:
            mutant.apply(patch)
            found = hybrid.lower_bound(0.9, 0.4, sigma=0.5, beta=0.25, sizes=[5])
            assert abs(found - expected) > 5e-3, mutant.name


def test_what_does_not_fit_is_refused() -> None:
    net, rows = table()
    common = {"beta": 0.3, "changed": 1}
    for fields, changes in ((FIELDS, {"changed": 3}), ([[2, 3], [3, 4]], {}), ([[2]], {}), (FIELDS, {"beta": 1.0})):
        with pytest.raises(ConfigurationError):
            hybrid.certify(net, rows, 0.5, fields=fields, **{**common, **changes})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one must be 1"):
        hybrid.certify(net, rows, 0.5, fields=[[0, 1]], **common)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rows"):
        hybrid.certify(net, rows[:, None], 0.5, fields=FIELDS, **common)  # type: ignore[arg-type]
    for arguments in ({"mean": 1.5}, {"radius": -1.0}, {"sigma": 0.0}, {"sizes": [1]}):
        known = {"mean": 0.9, "radius": 0.1, "sigma": 0.5, "beta": 0.1, "sizes": [3], **arguments}
        with pytest.raises(ConfigurationError):
            hybrid.lower_bound(known.pop("mean"), known.pop("radius"), **known)  # type: ignore[arg-type]
