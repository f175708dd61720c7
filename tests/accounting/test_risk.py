"""Error rates of attackers: closed forms, attackers by simulation, and mutants that either catches."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr, ndtri
from scipy.stats import binom, laplace, norm

import accounting.terms
from accounting import (
    REPLACE_ONE,
    GaussianRelease,
    InvalidParameterError,
    LaplaceRelease,
    MixedUnitsError,
    PrivacyBound,
    PrivateSelection,
    Provenance,
    TradeOff,
    create_accountant,
    risk,
    trade_off,
)
from accounting.cli import main
from accounting.pairs import PoissonGaussianPair

Array = NDArray[np.float64]

RATES = np.array([1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])


def curve_of(*events: object, mechanism: str = "auto", relation: str = "add_or_remove_one", **options: int) -> TradeOff:
    accountant = create_accountant(mechanism, relation=relation)  # type: ignore[arg-type]
    for event in events:
        accountant.record(event)  # type: ignore[arg-type]
    return trade_off(accountant, **options)


def sampled(sigma: float, q: float, steps: int, **options: int) -> TradeOff:
    accountant = create_accountant("prv")
    accountant.step(noise_multiplier=sigma, sample_rate=q, steps=steps)
    return trade_off(accountant, **options)


@pytest.mark.parametrize("mu", [0.01, 0.1, 0.5, 1.0, 2.0, 3.0])
def test_of_one_gaussian_release_it_is_the_gaussian_curve_from_below(mu: float) -> None:
    curve = curve_of(GaussianRelease(1.0 / mu))
    exact = ndtr(-ndtri(RATES) - mu)
    assert (curve.false_negative_rate(RATES) <= exact).all()
    # The envelope of 65 tangents: the docstring's 1 %.
    assert (curve.true_positive_rate(RATES) <= 1.01 * (1.0 - exact)).all()
    variation = 2.0 * ndtr(0.5 * mu) - 1.0
    assert variation <= curve.advantage <= variation + 1e-10
    assert curve.success == 0.5 * (1.0 + curve.advantage)
    assert mu <= curve.gaussian_mu() <= 1.01 * mu


@settings(max_examples=40, deadline=None)
@given(mu=st.floats(0.02, 4.0), points=st.integers(2, 40), rate=st.floats(0.0, 1.0))
def test_no_grid_puts_it_above_the_gaussian_curve(mu: float, points: int, rate: float) -> None:
    curve = curve_of(GaussianRelease(1.0 / mu), points=points)
    assert float(curve.false_negative_rate(rate)) <= ndtr(-ndtri(rate) - mu)
    assert curve.gaussian_mu() >= mu


def test_several_releases_and_people_of_several_rows_add_up_as_gaussians_do() -> None:
    accountant = create_accountant("prv")
    accountant.step(noise_multiplier=5.0, sample_rate=1.0, steps=9)
    # μ = 3 · 2 / 5.
    exact = ndtr(-ndtri(RATES) - 1.2)
    curve = trade_off(accountant, group_size=2)
    assert (curve.false_negative_rate(RATES) <= exact).all()
    assert curve.gaussian_mu() == pytest.approx(1.2, rel=0.01)
    assert "a person with up to 2 rows" in str(curve)


def test_of_a_laplace_release_it_is_the_curve_of_shifted_laplace_noise() -> None:
    curve = curve_of(LaplaceRelease(1.5))
    threshold = laplace.isf(RATES, scale=1.5)
    exact = laplace.cdf(threshold, loc=1.0, scale=1.5)
    assert (curve.false_negative_rate(RATES) <= exact + 1e-12).all()
    # In the middle it is curved; at both ends it is the line of slope e^(1/1.5), up to the grid's 2e-4.
    assert curve.false_negative_rate(RATES) == pytest.approx(exact, rel=5e-3, abs=1e-4)


def test_replacing_a_row_shows_twice_as_much_of_a_gaussian_release() -> None:
    curve = curve_of(GaussianRelease(2.0), relation=REPLACE_ONE)
    assert curve.gaussian_mu() == pytest.approx(1.0, rel=0.01)
    assert "which of two it was" in str(curve)


def mixture(x: Array, sigma: float, q: float) -> Array:
    """P(output > x) with the row, of one Poisson-sampled step."""
    value: Array = (1.0 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1.0) / sigma)
    return value


@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.01), (1.0, 0.1), (0.3, 0.3)])
def test_of_one_sampled_step_neither_direction_is_attacked_better_than_it_says(sigma: float, q: float) -> None:
    curve = sampled(sigma, q, 1)
    threshold = np.linspace(-6.0 * sigma, 1.0 + 6.0 * sigma, 400)
    present, absent = mixture(threshold, sigma, q), norm.sf(threshold / sigma)
    # Who says "in" above the threshold; and with the roles exchanged, who says "out" below it.
    assert (present <= curve.true_positive_rate(absent)).all()
    assert (1.0 - absent <= curve.true_positive_rate(1.0 - present)).all()
    # Rare false alarms are the first direction's: there it is tight, but for the grid's width.
    rare = (absent > 1e-6) & (absent < 1e-3)
    assert (curve.true_positive_rate(absent)[rare] <= 1.02 * present[rare]).all()


def only_adding(terms: accounting.terms.Terms) -> object:
    return [
        [
            (PoissonGaussianPair(sigma, q, True), count)  # The other direction is missing.
            for (sigma, q), count in terms.poisson.items()
        ]
    ]


def test_the_attack_on_one_step_catches_a_delta_of_the_wrong_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting.terms.Terms, "directions", only_adding)
    curve = sampled(0.5, 0.01, 1)
    absent = 1e-3
    present = float(mixture(norm.isf(np.array(absent)) * 0.5, 0.5, 0.01))
    assert present > 1.1 * float(curve.true_positive_rate(absent))


def losses(sigma: float, q: float, steps: int, group: int, runs: int, *, present: bool) -> Array:
    """Likelihood ratios that the strongest attacker sees: each run's releases, the row in them or not."""
    random = np.random.default_rng(7 + present)
    rows = np.arange(group + 1.0)
    weights = binom.logpmf(rows, group, q)
    total = np.zeros(runs)
    for _ in range(steps):
        drawn = random.binomial(group, q, runs) if present else 0.0
        x = drawn + sigma * random.standard_normal(runs)
        total += logsumexp(weights + (np.multiply.outer(x, rows) - 0.5 * rows**2) / sigma**2, axis=-1)
    return total


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "group"), [(0.7, 0.1, 10, 1), (1.0, 0.1, 8, 3)], ids=["a row", "three rows"]
)
def test_an_attacker_by_likelihood_ratios_never_beats_it_comes_close_and_beats_that_of_more_noise(
    sigma: float, q: float, steps: int, group: int
) -> None:
    runs = 40_000
    curve = sampled(sigma, q, steps, group_size=group)
    absent = losses(sigma, q, steps, group, runs, present=False)
    present = losses(sigma, q, steps, group, runs, present=True)
    # As if the noise were 1.5 times what it is.
    weaker = sampled(1.5 * sigma, q, steps, group_size=group)
    for rate in (0.001, 0.01, 0.1, 0.5):
        threshold = np.quantile(absent, 1.0 - rate)
        found = float((present > threshold).mean())
        limit = float(curve.true_positive_rate(rate))
        # The share of 4e4 runs, and that of the threshold, are off by at most five deviations of each.
        off = 5.0 * math.sqrt(found / runs) + 5.0 * math.sqrt(rate / runs) * found / rate
        assert found <= limit + off
        assert found >= 0.9 * limit - off
        assert rate not in (0.01, 0.1) or found > float(weaker.true_positive_rate(rate)) + off
    best = max(float((present > t).mean() - (absent > t).mean()) for t in np.quantile(absent, np.linspace(0, 1, 101)))
    # Two shares of 4e4 runs.
    assert 0.95 * curve.advantage - 0.01 <= best <= curve.advantage + 0.01


@pytest.mark.parametrize("curve", [curve_of(GaussianRelease(1.0)), sampled(1.0, 0.05, 30)], ids=["gaussian", "sampled"])
def test_it_is_its_own_inverse_as_a_symmetric_curve_is(curve: TradeOff) -> None:
    # Without the second branch f(f(α)) falls short of α.
    again = curve.false_negative_rate(curve.false_negative_rate(RATES))
    assert again == pytest.approx(RATES, rel=1e-9, abs=1e-13)


def test_a_curve_without_its_second_branch_is_not_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = curve_of(GaussianRelease(1.0))
    first_only = tuple(part[: len(part) // 2] for part in curve._lines())
    monkeypatch.setattr(TradeOff, "_lines", lambda self: first_only)
    assert float(curve.false_negative_rate(0.99)) < 0.5 * float(ndtr(-ndtri(0.99) - 1.0))


def test_people_are_the_unit_where_the_ledger_is_about_them() -> None:
    accountant = create_accountant("prv")
    person = Provenance(unit="person")
    accountant.step(noise_multiplier=1.0, sample_rate=0.1, steps=5, provenance=person)
    assert trade_off(accountant).whom == "a person"
    rows = sampled(1.0, 0.1, 5)
    assert trade_off(accountant).true_positive_rate(RATES).tolist() == rows.true_positive_rate(RATES).tolist()
    accountant.ledger._put(GaussianRelease(9.0))
    with pytest.raises(MixedUnitsError):
        trade_off(accountant)


def test_a_curve_of_deltas_holds_the_tight_ones_and_is_near_those_asked_one_by_one() -> None:
    accountant = create_accountant("prv")
    accountant.step(noise_multiplier=1.0, sample_rate=0.05, steps=100)
    accountant.record(LaplaceRelease(4.0), 3)
    epsilons = [0.0, 0.5, 1.0, 2.0, 3.0, 50.0]
    for group_size in (1, 3):
        for bound in accountant.delta_curve(epsilons, group_size=group_size):
            alone = accountant.get_delta(bound.delta, group_size=group_size)
            assert (bound.group_size, bound.relation) == (group_size, alone.relation)
            # Grids laid out for another point: a relative 2 % of δ.
            assert alone.lower <= bound.upper <= 1.02 * alone.upper + 1e-12
    with pytest.raises(InvalidParameterError):
        accountant.delta_curve([1.0, -1.0])


def test_what_only_renyi_accounting_covers_has_a_looser_curve() -> None:
    trial = ((GaussianRelease(4.0), 1),)
    search = curve_of(PrivateSelection(trial, 5.0, 0.0))
    once = curve_of(GaussianRelease(4.0))
    assert (search.true_positive_rate(RATES) >= once.true_positive_rate(RATES)).all()
    assert float(search.true_positive_rate(0.01)) < 0.5
    renyi = curve_of(GaussianRelease(1.0), mechanism="rdp")
    assert (renyi.false_negative_rate(RATES) <= ndtr(-ndtri(RATES) - 1.0)).all()


def test_nothing_released_leaves_guessing() -> None:
    curve = curve_of()
    assert (curve.true_positive_rate(RATES) == RATES).all()
    assert curve.advantage == curve.gaussian_mu() == 0.0
    # Exactly, since rounded up to hundredths of a per cent anything more would show.
    assert "right at even odds     50.00 %" in str(curve)
    assert "0.1 %                0.10 %" in str(curve)
    with pytest.raises(InvalidParameterError):
        curve.true_positive_rate(2.0)


def test_hardly_any_noise_leaves_nothing_hidden_and_no_gaussian() -> None:
    curve = curve_of(GaussianRelease(0.01))
    assert curve.advantage == 1.0
    assert curve.true_positive_rate(RATES).tolist() == [1.0] * len(RATES)
    assert curve.gaussian_mu() == math.inf
    assert "no μ-GDP" in str(curve)


def test_the_mu_is_one_for_every_rate_in_its_range() -> None:
    # Rare large losses: the tail is far from Gaussian.
    curve = sampled(0.5, 0.01, 1)
    rates = np.geomspace(1e-4, 1.0, 5001)[:-1]
    below = curve.false_negative_rate(rates)
    within = below >= 1e-4
    for rarest, holds in ((1e-4, True), (1e-2, False)):
        gaussian = ndtr(-ndtri(rates) - curve.gaussian_mu(rarest))
        # The rounding of the normal distribution.
        assert bool((gaussian[within] <= below[within] + 1e-12).all()) is holds


@pytest.mark.parametrize("rate", [-0.1, 1.5, math.nan], ids=str)
def test_rates_outside_of_0_to_1_are_refused(rate: float) -> None:
    with pytest.raises(InvalidParameterError, match="false-positive rates"):
        curve_of(GaussianRelease(1.0)).true_positive_rate(rate)


def test_a_public_number_of_records_brings_no_warning_about_delta() -> None:
    accountant = create_accountant("prv", dataset_size=10**9)
    accountant.record(GaussianRelease(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trade_off(accountant).advantage < 0.4


def test_the_command_line_prints_what_the_curve_says_and_draws_it(
    tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = f"{tmp_path}/risk.png"
    schedule = ["--noise-multiplier", "1", "--sample-rate", "0.1", "--steps", "5", "--group-size", "2"]
    assert main(["risk", *schedule, "--false-positive-rates", "0.05", "--plot", picture]) == 0
    printed = capsys.readouterr().out
    curve = sampled(1.0, 0.1, 5, group_size=2)
    assert printed == curve.table([0.05]) + "\n"
    assert f"5 %                  {risk.percent(float(curve.true_positive_rate(0.05)))}" in printed
    with open(picture, "rb") as file:
        assert file.read(4) == b"\x89PNG"
    assert main(["risk", *schedule, "--false-positive-rates", "2"]) == 2
    assert "false-positive rates" in capsys.readouterr().err


def test_a_stored_ledger_answers_as_its_accountant(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    accountant = create_accountant("auto")
    accountant.step(noise_multiplier=1.0, sample_rate=0.1, steps=5)
    accountant.ledger.save(f"{tmp_path}/ledger.json")
    assert main(["risk", "--ledger", f"{tmp_path}/ledger.json"]) == 0
    assert capsys.readouterr().out == f"{trade_off(accountant)}\n"


@pytest.mark.parametrize(
    "option",
    [("--relation", "add_or_remove_one"), ("--noise-multiplier", "1"), ("--sample-rate", "1"), ("--steps", "3")],
    ids=["relation", "noise", "rate", "steps"],
)
def test_what_a_stored_ledger_tells_is_not_asked_besides(
    option: tuple[str, str], tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    create_accountant("auto").ledger.save(f"{tmp_path}/ledger.json")
    for command in ("risk", "curve"):
        assert main([command, "--ledger", f"{tmp_path}/ledger.json", *option]) == 2
        assert f"leave out {option[0]}" in capsys.readouterr().err


def test_printed_rates_are_rounded_up() -> None:
    curve = TradeOff((PrivacyBound(0.123401, delta=0.0),))
    assert "membership advantage   12.35 %" in str(curve)
