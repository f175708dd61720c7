"""A privacy statement is compared with its own ledger, and refused where that contradicts it for certain."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting import (
    FALSE_POSITIVE_RATES,
    GaussianRelease,
    Ledger,
    PrivacyBound,
    Provenance,
    TradeOff,
    create_accountant,
    trade_off,
)
from accounting.errors import AccountingError, LedgerFormatError, MixedUnitsError
from accounting.stated import _certain, _found_at_least, _mu_at_least, compared


def accountant_of(name="auto", **kinds):
    accountant = create_accountant(name)
    if kinds.get("released", True):
        accountant.record(GaussianRelease(2.0))
    for _ in range(kinds.get("sampled", 0)):
        accountant.step(noise_multiplier=1.1, sample_rate=0.1)
    return accountant


def facts_of(accountant, **changed):
    """As statements state it."""
    curve = trade_off(accountant)
    places = [
        {"delta": delta, "epsilon": float(bound), "lower": bound.lower}
        for delta in (1e-3, 1e-5, 1e-7)
        for bound in [accountant.get_epsilon(delta)]
    ]

    def rates(at):
        return [{"false_positive": one, "true_positive": float(curve.true_positive_rate(one))} for one in at]

    entries = [
        {
            "event": line.event.kind,
            "noise_multiplier": line.event.noise_multiplier,
            "sample_rate": getattr(getattr(line.event, "sampling", None), "sample_rate", 1.0),
            "count": line.count,
        }
        for line in accountant.ledger.lines
    ]
    return {
        "format": "clipless_dp.privacy_statement",
        "relation": accountant.relation,
        "counted": "row",
        "epsilon": {**places[0], "curve": places},
        "risk": {
            "success_at_even_odds": curve.success,
            "advantage": curve.advantage,
            "true_positive_rates": rates(FALSE_POSITIVE_RATES),
            "gaussian_mu": curve.gaussian_mu(1e-5),
            "gaussian_mu_from": 1e-5,
            "curve": rates(np.geomspace(1e-5, 1.0, 9).tolist()),
            "profile": [{"epsilon": bound.delta, "delta": bound.upper} for bound in curve.bounds],
        },
        "steps": {"entries": entries},
        **changed,
    }


LEDGERS = {"a release": {}, "sampled steps": {"sampled": 5}, "sampled steps alone": {"sampled": 5, "released": False}}


@pytest.mark.parametrize("name", ["auto", "prv", "rdp"])
@pytest.mark.parametrize("case", LEDGERS)
def test_what_an_engine_states_follows_from_its_ledger_and_more_than_that_as_well(name, case):
    facts = facts_of(accountant_of(name, **LEDGERS[case]))
    found = compared("s.json", facts, accountant_of(**LEDGERS[case]))
    assert found.text.endswith("this follows from its ledger")
    assert not found.open
    facts["epsilon"]["epsilon"] *= 1.5
    facts["risk"]["success_at_even_odds"] = 1.0
    assert not compared("s.json", facts, accountant_of(**LEDGERS[case])).open


def put(path, value):
    def edit(facts):
        *before, last = path
        for key in before:
            facts = facts[key]
        facts[last] = value(facts[last]) if callable(value) else value

    return edit


CONTRADICTED = {
    "epsilon": put(["epsilon", "epsilon"], lambda old: 0.98 * old),
    "epsilon of a point": put(["epsilon", "curve", 2, "epsilon"], 0.0),
    "delta": put(["epsilon", "delta"], 1e-12),
    "relation": put(["relation"], "replace_one"),
    "people": put(["counted"], "person"),
    "people of a ledger": put(["counted"], ["person"]),
    "success": put(["risk", "success_at_even_odds"], 0.5),
    "advantage": put(["risk", "advantage"], 0.0),
    "rates": put(["risk", "true_positive_rates", 0, "true_positive"], 0.1),
    "rare rates": put(["risk", "true_positive_rates", 2, "true_positive"], 0.001),
    "curve": put(["risk", "curve", 4, "true_positive"], lambda old: 0.1 * old),
    "mu": put(["risk", "gaussian_mu"], 0.0),
    "profile": put(["risk", "profile", 20, "delta"], 0.0),
    "noise of a step": put(["steps", "entries", 0, "noise_multiplier"], 200.0),
    "number of steps": put(["steps", "entries", 0, "count"], 1000),
    "steps left out": put(["steps", "entries"], []),
}


@pytest.mark.parametrize("case", CONTRADICTED)
@pytest.mark.parametrize("ledger", LEDGERS)
def test_what_contradicts_the_ledger_for_certain_is_refused(ledger, case):
    facts = facts_of(accountant_of(**LEDGERS[ledger]))
    CONTRADICTED[case](facts)
    with pytest.raises(AccountingError, match="was altered"):
        compared("s.json", facts, accountant_of(**LEDGERS[ledger]))


PLACES = [
    "epsilon",
    "epsilon.epsilon",
    "epsilon.delta",
    "epsilon.curve.1.epsilon",
    "risk.advantage",
    "risk.curve.0.false_positive",
    "risk.profile.0.epsilon",
    "risk.gaussian_mu_from",
    "steps.entries",
]


@pytest.mark.parametrize("value", [True, "3", math.nan, -1.0])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_number_or_none_that_can_be_is_refused_in_words(place, value):
    facts = facts_of(accountant_of())
    put([int(part) if part.isdecimal() else part for part in place.split(".")], value)(facts)
    with pytest.raises(AccountingError):
        compared("s.json", facts, accountant_of())


def test_integers_that_no_float_holds_are_bounds_that_hold():
    facts = facts_of(accountant_of())
    for place in ("epsilon.curve.1.epsilon", "risk.advantage", "risk.profile.0.epsilon"):
        put([int(part) if part.isdecimal() else part for part in place.split(".")], 10**400)(facts)
    assert not compared("s.json", facts, accountant_of()).open


def test_a_statement_of_no_epsilon_promises_nothing_and_one_without_the_name_is_incomplete():
    facts = facts_of(accountant_of())
    for place in (facts["epsilon"], *facts["epsilon"]["curve"]):
        place["epsilon"] = None
    assert compared("s.json", facts, accountant_of()).text == "s.json states no epsilon"
    del facts["epsilon"]
    with pytest.raises(LedgerFormatError, match="incomplete"):
        compared("s.json", facts, accountant_of())


def test_a_ledger_of_rows_and_people_has_no_epsilon_to_state():
    ledger = Ledger()
    for unit in ("", "person"):
        ledger._put(GaussianRelease(2.0), provenance=Provenance(unit=unit))
    mixed = create_accountant("auto")
    mixed.ledger = ledger
    facts = facts_of(accountant_of())
    del facts["steps"]
    with pytest.raises(MixedUnitsError):
        compared("s.json", facts, mixed)


def test_what_a_looser_engine_cannot_decide_is_told_and_not_refused():
    loose = accountant_of("rdp", sampled=5)
    found = compared("s.json", facts_of(accountant_of(sampled=5)), loose)
    assert "neither follows" in found.text
    assert len(found.open) > 3
    assert str(found).startswith(found.text)


@given(
    st.lists(st.tuples(st.floats(1e-3, 1.0), st.floats(0.0, 1.0)), min_size=2, max_size=6),
    st.lists(st.floats(0.0, 6.0), min_size=1, max_size=4),
    st.floats(0.0, 1.0),
)
def test_some_attacker_of_any_mechanism_finds_what_is_said_to_be_found_at_least(masses, epsilons, rate):
    """By brute force over both directions: δ is the larger one's, and attackers are the best of either."""
    with_one, without = (np.array(column) / max(sum(column), 1e-9) for column in zip(*masses, strict=True))
    if without.sum() < 0.5:
        without = np.full(len(masses), 1.0 / len(masses))
    grid = np.array(sorted({0.0, *epsilons}))

    def delta(p, q, epsilon):
        return np.clip(p - math.exp(epsilon) * q, 0.0, None).sum()

    def best(p, q):
        order = np.argsort(np.where(p > 0.0, q / np.maximum(p, 1e-300), math.inf), kind="stable")
        false, true = (np.concatenate(([0.0], np.cumsum(part[order]))) for part in (q, p))
        # What costs no false positive is taken first; np.interp takes the last of equal places.
        start = true[false <= 0.0].max()
        return 1.0 if rate >= 1.0 else max(start, float(np.interp(rate, false, true)))

    certain = (grid, np.array([max(delta(with_one, without, at), delta(without, with_one, at)) for at in grid]))
    found = float(_found_at_least(certain, np.array(rate)))
    assert found <= max(best(with_one, without), best(without, with_one)) + 1e-9


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_no_gaussian_mechanism_is_said_to_be_one_of_a_larger_mu(sigma):
    accountant = create_accountant("auto")
    accountant.record(GaussianRelease(sigma))
    curve = trade_off(accountant)
    least = _mu_at_least(_certain(accountant, curve), curve, 1e-5)
    assert 0.5 / sigma < least <= 1.0 / sigma
    everything = TradeOff((PrivacyBound(1.0, lower=1.0),))
    assert _mu_at_least((np.zeros(1), np.ones(1)), everything, 1e-5) == 0.0


def test_success_is_compared_where_a_curve_has_no_lower_bounds_of_its_own():
    facts = facts_of(accountant_of(sampled=5))
    assert {bound.lower for bound in trade_off(accountant_of(sampled=5)).bounds} == {0.0}
    facts["risk"]["success_at_even_odds"] = 0.5
    with pytest.raises(AccountingError, match="success at even odds"):
        compared("s.json", facts, accountant_of(sampled=5))
