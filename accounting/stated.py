"""What a privacy statement states, against the ledger in its file."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from .accountants import Accountant
from .bounds import PrivacyBound, rounded_down, rounded_up
from .errors import AccountingError, EngineRangeError, LedgerFormatError, UnsupportedEventError
from .ledger import Ledger
from .risk import TradeOff, trade_off
from .shape import require_statement

_MOVED = 1e-9
"""As far, relatively, as floating point on another machine moves a bound."""

_SHARES_MOVED = 1e-6
"""The same of rates and of δ, which are sums of many terms."""

_CLOSE = 1e-6
"""The same of settings, which are quotients and sums of few."""

_LOST = 8.0 * float(np.finfo(float).eps)
_STEPS = ("gaussian_step", "gaussian_vector_step")

UNITS = {
    "row": "one sample: one row of the training data, its target included",
    "person": "one person: all rows of the training data that carry their id, targets included",
}
"""What a statement calls the unit where whoever states it has no words of their own."""

UNTOLD = (
    "Whoever states this answers for the rest, which no ledger tells: for whom or what one unit stands, the size of "
    "the data set, bounds, the noise by parameter, the accountant's name, learning rates, weights, audits and notes."
)
"""Of which facts a ledger decides nothing."""

_LOOKED_AT = 9
"""ε at which a lower bound of δ is computed."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What came of it where nothing contradicts the ledger.

    Attributes:
        text: whether ε follows, in a sentence.
        open: what neither follows from the ledger nor contradicts it, a sentence each; ε is the first where it is one.
    """

    text: str
    open: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(dict.fromkeys([self.text, *self.open]))


@dataclass(frozen=True)
class _Claim:
    """An upper bound that is stated, and what the ledger gives: at least, for certain, and what is certified."""

    said: str
    stated: float
    lower: float
    upper: float
    engine: str
    moved: float = _MOVED

    @property
    def is_contradicted(self) -> bool:
        return self.stated < self.lower * (1.0 - self.moved)

    @property
    def follows(self) -> bool:
        return self.stated >= self.upper * (1.0 - self.moved) - (self.moved > _MOVED) * 1e-12


def facts_stated(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """What a privacy statement says, whose file was read as a ledger; ``None``: a ledger by itself, which says nothing.

    Raises:
        LedgerFormatError: it cannot be read, or is none of a known version.
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LedgerFormatError(f"{os.fspath(path)} is no privacy statement: {error}") from error
    if not isinstance(facts, dict):
        return None
    is_one = "epsilon" in facts or str(facts.get("format", "")).startswith("clipless_dp.")
    if not is_one:
        return None
    require_statement(os.fspath(path), facts)
    return facts


@dataclass(frozen=True)
class Recorded:
    """What a ledger tells of the facts that a statement repeats.

    Attributes:
        entries: of each line its event, what it rests on and whose it is.
        steps: how many there are.
        drawn: how many steps' batches were drawn in which way.
        sources: where noise came from, as far as that is recorded.
        counted: the units of privacy, ``"row"`` and ``"person"``.
    """

    entries: list[dict[str, Any]]
    steps: int
    drawn: dict[str, int]
    sources: list[str]
    counted: list[str]


def recorded(ledger: Ledger) -> Recorded:
    """What a ledger tells of the facts that a statement repeats."""
    entries: list[dict[str, Any]] = [
        {
            "event": line.event.kind,
            "noise_multiplier": getattr(line.event, "noise_multiplier", None),
            "sample_rate": (rate := getattr(getattr(line.event, "sampling", None), "sample_rate", 1.0)),
            "count": line.count,
            # Whoever claims nothing need not be believed.
            "drawn": "none" if line.event.kind in _STEPS and rate == 1.0 else line.provenance.sampling or "unknown",
            "seeded_masks": line.provenance.seeded_masks,
            "noise": line.provenance.noise or None,
            "unit": line.provenance.unit or "row",
            "run": line.provenance.run or None,
        }
        for line in ledger.lines
    ]
    drawn: Counter[str] = Counter()
    for entry in entries:
        if entry["event"] in _STEPS:
            drawn[entry["drawn"]] += entry["count"]
    sources = sorted({entry["noise"] for entry in entries if entry["noise"]})
    counted = ["person" if unit == "person" else "row" for unit in sorted(ledger.units)]
    return Recorded(entries, sum(drawn.values()), dict(drawn), sources, counted)


def compared(path: str | os.PathLike[str], facts: Mapping[str, Any], accountant: Accountant) -> Comparison:
    """Whether what a statement promises follows from its own ledger: ε at each δ, risk, relation, unit and steps.

    Args:
        path: the statement's file.
        facts: what it states.
        accountant: of its ledger.

    Raises:
        AccountingError: its ledger gives more for certain, or is about something else.
        LedgerFormatError: what it states is no number where one must be, or is missing.
        MixedUnitsError: it states an ε of a ledger about rows and people.
    """
    name = os.fspath(path)
    try:
        _require_same(name, facts, accountant.ledger)
        claims = [*_epsilons(facts["epsilon"], accountant), *_risks(facts.get("risk"), accountant)]
    except (AttributeError, KeyError, TypeError) as error:
        raise LedgerFormatError(f"{name} is an incomplete privacy statement, or was altered: {error!r}") from error
    for claim in claims:
        if claim.is_contradicted:
            raise AccountingError(
                f"{name} states {claim.said}, and its ledger gives at least {rounded_down(claim.lower)}: "
                "one was altered"
            )
    left = tuple(
        f"{name} states {claim.said}: this neither follows from its ledger nor contradicts it, by the engine "
        f"{claim.engine}, which knows {rounded_up(claim.upper)}"
        for claim in claims
        if not claim.follows
    )
    own = _own_words(facts)
    if facts["epsilon"]["epsilon"] is None:
        return Comparison(f"{name} states no epsilon{own}", left)
    follows = f"{name} states {claims[0].said}: this follows from its ledger{own}"
    return Comparison(follows if claims[0].follows else left[0], left)


def settings_beside(facts: Mapping[str, Any]) -> Iterator[str]:
    """Where settings that a statement of a result shows are not those of its steps.

    Args:
        facts: what it states, by :func:`accounting.shape.require_statement`.
    """
    sampling, noise, bounds = facts["sampling"], facts["noise"], facts["bounds"]
    recorded_steps, taken = facts["steps"]["recorded"], facts["steps"]["taken"]
    steps = [entry for entry in facts["steps"]["entries"] if entry["event"] in _STEPS]
    rate, size = sampling["sample_rate"], sampling["expected_batch_size"]
    if taken > recorded_steps:
        yield f"{taken} steps were taken and {recorded_steps} are recorded: the ε shown is not of all of them."
    unsampled = sum(entry["count"] for entry in steps if entry["sample_rate"] == 1.0)
    if unsampled and rate < 1.0:
        yield (
            f"{unsampled} of {recorded_steps} steps were charged without amplification by sampling (q = 1), as full "
            "batches, or since no Poisson draw was announced for them, where the ε shown is larger than it need be."
        )
    charged = {entry["sample_rate"] for entry in steps}
    # Any may be charged at one.
    charged -= {1.0} if rate < 1.0 else set()
    if charged and not any(math.isclose(rate, one, rel_tol=_CLOSE) for one in charged):
        yield f"The sample rate shown, {rate:.6g}, is that of no step in the ledger: each was charged by its own."
    if not math.isclose(size, rate * facts["dataset_size"], rel_tol=_CLOSE):
        yield f"The expected batch size shown, {size:.6g}, is not the sample rate times the size of the data set."
    largest = max(bounds["per_parameter"].values(), default=0.0)
    if bounds["total"] < largest * (1.0 - _CLOSE):
        yield f"The bound of all layers together, {bounds['total']:.4g}, is below that of one of them, {largest:.4g}."
    deviations = noise["deviations"]
    if unbounded := sorted(deviations.keys() - bounds["per_parameter"].keys()):
        yield f"Noise is shown for parameters of which no bound is: {', '.join(unbounded)}."
    # Batches of no draw are charged at half of the noise that they had. Of what a step releases, counts of caps that
    # adapt take a share, so that gradients have more noise than σ says.
    strongest = max(
        ((entry["noise_multiplier"] or 0.0) * (2.0 if entry["sample_rate"] == 1.0 else 1.0) for entry in steps),
        default=math.inf,
    )
    shares = [
        bounds["per_parameter"].get(name, 0.0) / deviation for name, deviation in deviations.items() if deviation > 0.0
    ]
    if "adaptive_caps" not in facts and shares and math.hypot(*shares) * strongest * 1.01 < 1.0:
        yield (
            "The noise shown by parameter is more than that of any step in the ledger, whose noise multipliers are at "
            f"most {strongest:.4g}: ε is that of the ledger."
        )
    engine, accountant = facts["epsilon"].get("engine"), facts.get("accountant")
    named = accountant.get("engine") if isinstance(accountant, Mapping) else None
    if engine is not None and named != engine:
        yield f"The engine shown beside the accountant's name, {named}, is not that of ε, {engine}."


def _own_words(facts: Mapping[str, Any]) -> str:
    """What is counted, where that has a name of somebody's own, which nothing here can check."""
    unit = facts.get("unit", "")
    if not unit or any(_words(unit) == _words(text) for text in UNITS.values()):
        return ""
    counted = "people" if facts.get("counted", "row") == "person" else "rows"
    return f". What is counted are {counted}, of which it calls one {unit!r}"


def _require_same(name: str, facts: Mapping[str, Any], ledger: Ledger) -> None:
    """Refuses what is about another promise, or other steps, than the ledger."""
    if facts["relation"] != ledger.relation:
        raise AccountingError(
            f"{name} is about neighbours by {facts['relation']!r}, and its ledger by {ledger.relation!r}: "
            "one was altered"
        )
    held = recorded(ledger)
    counted = facts.get("counted", "row")
    promised = counted if isinstance(counted, list) else [counted]
    if promised == ["person"] and "row" in held.counted:
        raise AccountingError(f"{name} promises something to people, and its ledger is about rows: one was altered")
    if isinstance(counted, list) and counted != held.counted:
        raise AccountingError(f"{name} is about {counted}, and its ledger about {held.counted}: one was altered")
    if any(_words(facts.get("unit", "")) == _words(text) for other, text in UNITS.items() if other not in promised):
        raise AccountingError(f"{name} names another unit than the one that it counts, {promised}: one was altered")
    for what, stated, kept in _repeated(facts, held):
        if stated != kept:
            raise AccountingError(f"{name} lists other {what} than its ledger holds: one was altered")


def _words(text: str) -> list[str]:
    """What it says, whatever its capitals, spaces and stops."""
    return re.findall(r"\w+", text.casefold())


def _repeated(facts: Mapping[str, Any], held: Recorded) -> Iterator[tuple[str, Any, Any]]:
    """What a statement repeats of its ledger, as stated and as held; former ones repeat less."""
    if "steps" in facts:
        steps = facts["steps"]
        # Of what each of them names; what some leave out, all do.
        named = [name for name in _REPEATED if all(name in entry for entry in steps["entries"])]
        yield "steps and releases", _tally(steps["entries"], named), _tally(held.entries, named)
        if "recorded" in steps:
            yield "numbers of steps", steps["recorded"], held.steps
    if "drawn" in facts.get("sampling", {}):
        yield "ways in which batches were drawn", dict(facts["sampling"]["drawn"]), held.drawn
    if "noise" in facts:
        # Others are of steps of which nothing is recorded, or of noise that is yet to come.
        sources = facts["noise"]["sources"]
        yield "sources of noise", [one for one in held.sources if one in sources], held.sources


_REPEATED = ("event", "noise_multiplier", "sample_rate", "drawn", "seeded_masks", "noise", "unit", "run")


def _tally(entries: list[dict[str, Any]], names: list[str]) -> Counter[tuple[Any, ...]]:
    found: Counter[tuple[Any, ...]] = Counter()
    for entry in entries:
        found[tuple(entry[name] for name in names)] += entry["count"]
    return found


def _epsilons(summary: Mapping[str, Any], accountant: Accountant) -> Iterator[_Claim]:
    """ε of the summary, and of the curve."""
    bounds: dict[float, PrivacyBound] = {}
    for place in (summary, *summary.get("curve", ())):
        if place["epsilon"] is None:
            continue
        epsilon, delta = _number(place["epsilon"], "epsilon"), _number(place["delta"], "delta")
        if delta not in bounds:
            bounds[delta] = accountant.get_epsilon(delta)
        bound = bounds[delta]
        least = place.get("lower")
        most = min(epsilon, bound.upper)
        if least is not None and _number(least, "what epsilon is at least") > most * (1.0 + _MOVED):
            raise AccountingError(
                f"epsilon is stated to be at least {rounded_up(_number(least, 'epsilon'))} at delta = {delta:g}, and "
                f"is at most {rounded_up(most)} there: one was altered"
            )
        said = f"epsilon = {rounded_up(epsilon)} at delta = {delta:g}"
        yield _Claim(said, epsilon, bound.lower, bound.upper, bound.engine)


def _risks(risk: Mapping[str, Any] | None, accountant: Accountant) -> Iterator[_Claim]:
    """What attackers achieve at most."""
    if risk is None:
        return
    try:
        curve = trade_off(accountant)
    except (UnsupportedEventError, EngineRangeError):
        yield _Claim("what attackers achieve", 0.0, 0.0, math.inf, accountant.mechanism)
        return
    engine = curve.bounds[0].engine

    def claim(what: str, value: Any, lower: float, upper: float) -> _Claim:
        number = _number(value, what)
        return _Claim(f"{what} = {rounded_up(number)}", number, lower, upper, engine, _SHARES_MOVED)

    certain = _certain(accountant, curve)
    # δ at ε = 0 is the total variation, which the best attacker's advantage is.
    apart = float(certain[1][0])
    yield claim("advantage", risk["advantage"], apart, curve.advantage)
    yield claim("success at even odds", risk["success_at_even_odds"], 0.5 * (1.0 + apart), curve.success)
    for place in (*risk["true_positive_rates"], *risk["curve"]):
        false = _number(place["false_positive"], "a false-positive rate")
        upper = float(curve.true_positive_rate(false))
        what = f"at the false-positive rate {false:g} a true-positive rate"
        yield claim(what, place["true_positive"], float(_found_at_least(certain, np.array(false))), upper)
    if risk["gaussian_mu"] is not None:
        rarest = _number(risk["gaussian_mu_from"], "the rarest error")
        upper = curve.gaussian_mu(rarest)
        yield claim("Gaussian mu", risk["gaussian_mu"], _mu_at_least(certain, curve, rarest), upper)
    profile = risk["profile"]
    epsilons = [min(_number(place["epsilon"], "epsilon of the profile"), 1e100) for place in profile]
    for place, bound in zip(profile, accountant.delta_curve(epsilons), strict=True):
        # δ falls as ε grows: what holds at a larger ε holds here.
        lower = max([bound.lower, *certain[1][certain[0] >= bound.delta].tolist()])
        yield claim(f"at epsilon = {bound.delta:g} delta", place["delta"], lower, bound.upper)


def _certain(accountant: Accountant, curve: TradeOff) -> tuple[Array, Array]:
    """Some ε of a curve, and lower bounds of δ at each, shapes ``(points,)``: its own points may have none."""
    last = len(curve.bounds) - 1
    places = sorted({round(last * share) for share in np.linspace(0.0, 1.0, _LOOKED_AT).tolist()})
    bounds = [accountant.get_delta(curve.bounds[place].delta) for place in places]
    return np.array([bound.delta for bound in bounds]), np.array([bound.lower for bound in bounds])


def _found_at_least(certain: tuple[Array, Array], rates: Array) -> Array:
    """A true-positive rate ``(...)`` that some attacker reaches at false-positive rates ``(...)``, for certain.

    For each lower bound δ of δ(ε) some set has P(A) ≥ e^ε Q(A) + δ, at a Q(A) that is not known, but is at most
    (1 − δ) e^−ε. Attackers who toss a coin between it, nothing and everything reach the lines between (0, 0),
    (Q(A), P(A)) and (1, 1): at the rate α at least α e^ε / (1 − δ) where Q(A) is above α, and δ + (1 − δ) α where not.
    """
    epsilons, least = certain
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        above = np.nan_to_num(rates[..., None] * np.exp(epsilons) / (1.0 - least), nan=0.0, posinf=math.inf)
        below = least + (1.0 - least) * rates[..., None]
    found: Array = np.clip(np.minimum(above, below).max(axis=-1), rates, 1.0)
    return found


def _mu_at_least(certain: tuple[Array, Array], curve: TradeOff, rarest: float) -> float:
    """A μ that no smaller one sums up the curve, between error rates that are at least ``rarest``."""
    rates = np.geomspace(rarest, 0.5, 33)
    counted = curve.false_negative_rate(rates) >= rarest
    if not counted.any():
        return 0.0
    # Rather more by what floating point loses of it: near 1 that is all there is.
    missed = np.minimum(1.0 - _found_at_least(certain, rates[counted]) + _LOST, 1.0)
    return max(0.0, float(np.max(-ndtri(rates[counted]) - ndtri(missed))))


def _number(value: Any, what: str) -> float:
    """A number that JSON holds; it knows integers that no float does."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise LedgerFormatError(f"{what} is stated as {value!r}, which is no number: the statement was altered")
    return float(min(max(value, -1e300), 1e300))
