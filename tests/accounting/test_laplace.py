"""Releases with Laplace noise alone: the closed form, against brute force, and what it saves."""

import numpy as np
import pytest
from scipy.stats import laplace

from accounting import LaplaceRelease, Ledger, create_accountant, prv
from accounting.laplace import laplace_delta, laplace_epsilon
from accounting.pairs import LaplacePair

DELTAS = (1e-3, 1e-5, 1e-9, 1e-15)
RELEASES = {
    "one": {2.0: 1},
    "three": {2.0: 3},
    "much noise": {1e7: 3},
    "little noise": {0.01: 3},
    "of two scales": {2.0: 2, 5.0: 1},
    "a tiny one beside": {2.0: 3, 1e4: 1},
    "many": {5.0: 60},
}


def brute_force(scales, epsilon, cells=4096):
    """(lower, upper) bounds of δ(ε): losses rounded down and up to a grid, by the distribution of the noise itself."""
    width = max(1.0 / scale for scale in scales) * 2.0 / cells
    found = []
    for up in (False, True):
        total, low = np.ones(1), 0
        for scale, count in scales.items():
            end = 1.0 / scale
            index = np.arange(np.floor(-end / width), np.ceil(end / width) + 1)

            # The loss at x in (0, 1) is (1 − 2x)/b; P(loss ≤ s) is that of x ≥ (1 − s b)/2.
            def below(s, scale=scale, end=end):
                return np.where(
                    s >= end, 1.0, np.where(s < -end, 0.0, laplace.sf((1.0 - s * scale) / 2.0, scale=scale))
                )

            mass = np.diff(below(index * width), prepend=0.0)
            for _ in range(count):
                total, low = np.convolve(total, mass), low + int(index[0]) - (0 if up else 1)
        loss = (low + np.arange(len(total))) * width
        found.append(float(total @ np.maximum(-np.expm1(epsilon - loss), 0.0)))
    return found[0], found[1]


@pytest.mark.parametrize("share", [0.99, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("scales", [{2.0: 1}, {2.0: 3}, {0.5: 2}, {2.0: 2, 5.0: 1}, {3.0: 2, 50.0: 2}])
def test_delta_lies_where_the_noise_itself_puts_it(scales, share):
    epsilon = share * sum(n / scale for scale, n in scales.items())
    lower, upper = laplace_delta(scales, epsilon)
    least, most = brute_force(scales, epsilon)
    assert lower <= most * (1.0 + 1e-9)
    assert least * (1.0 - 1e-9) <= upper


def test_one_release_is_what_is_known_of_it():
    for epsilon in (0.0, 0.2, 0.49):
        lower, upper = laplace_delta({2.0: 1}, epsilon)
        assert lower <= -np.expm1(0.5 * (epsilon - 0.5)) <= upper <= lower * (1.0 + 1e-8)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("case", RELEASES)
def test_epsilon_and_delta_belong_together(case, delta):
    scales = RELEASES[case]
    lower, upper = laplace_epsilon(scales, delta)
    assert 0.0 <= lower <= upper
    assert laplace_delta(scales, upper)[0] <= delta
    if lower > 0.0:
        assert laplace_delta(scales, lower * (1.0 - 1e-9))[1] >= delta
    # Without any of the closed form: what it rests on is that no outcome tells more than this.
    assert upper <= sum(n / scale for scale, n in scales.items()) * (1.0 + 1e-12)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("case", RELEASES)
def test_an_answer_lays_out_few_cells_and_is_certified(case, relation, monkeypatch):
    cells = []
    laid_out = prv.loss_edges

    def counted(*arguments):
        cells.append(len(index := laid_out(*arguments)))
        assert sum(cells) < 2_000_000
        return index

    monkeypatch.setattr(prv, "loss_edges", counted)
    prv._discrete.cache_clear()
    accountant = create_accountant("auto", relation=relation)
    ledger = Ledger(relation)
    for scale, n in RELEASES[case].items():
        ledger.append(LaplaceRelease(scale), n)
    accountant.ledger = ledger
    change = 2.0 if relation == "replace_one" else 1.0
    scales = {scale / change: n for scale, n in RELEASES[case].items()}
    for delta in DELTAS:
        bound = accountant.get_epsilon(delta)
        lower, upper = laplace_epsilon(scales, delta)
        assert lower <= bound.upper
        assert bound.lower <= upper
        assert bound.lower >= 0.95 * bound.upper or bound.upper < 1e-6


def test_composition_says_the_same_as_the_closed_form():
    for scales, epsilon in (({5.0: 30}, 5.8), ({2.0: 4}, 1.9)):
        pairs = [[(LaplacePair(scale), n) for scale, n in scales.items()]]
        exact = laplace_delta(scales, epsilon)
        lower, upper = prv.compose_delta(pairs, epsilon, guess=(exact[1], 30.0))
        assert lower <= exact[1]
        assert exact[0] <= upper <= 1.05 * exact[1]


def test_no_mass_that_is_none_is_put_at_infinity():
    # It would be δ that no ε takes away: tilts would be sought for it in vain, on ever finer grids.
    bins = LaplacePair(5.0).masses(np.linspace(-0.2, 0.2, 9))
    assert bins.p[-1] == bins.p_error[-1] == 0.0
    assert bins.p[-2] >= 0.5
