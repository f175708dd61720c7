"""What whoever signs a statement reads first: who states what about which model, and the verdict in words."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from accounting import REPLACE_ONE
from accounting.stated import UNITS
from clipless_dp.errors import ConfigurationError
from clipless_dp.statement.facts import shown
from clipless_dp.statement.section import Section

ABOUT = {
    "organisation": "Stated by",
    "contact": "Contact",
    "purpose": "Purpose of the model",
    "data_set": "Data set",
}
"""What may be said of who states it, and how it is called."""

_NOT_STATED = "not stated"
_CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"
"""Which words of some scripts, and pictures of several signs, are written with."""


def about_of(former: Mapping[str, str], about: Mapping[str, str | None]) -> dict[str, str]:
    """What is said of who states it, beside what was said before.

    Raises:
        ConfigurationError: it is none of :data:`ABOUT`, or no text of one line.
    """
    told = dict(former)
    for name, text in about.items():
        if name not in ABOUT:
            raise ConfigurationError(f"a statement says {', '.join(ABOUT)} of who states it, not {name}")
        if text is None:
            continue
        if not isinstance(text, str) or not text.strip() or any(map(is_control, text)):
            raise ConfigurationError(f"{name} must be a text of one line, without control characters, got {text!r}")
        told[name] = text.strip()
    return told


def is_control(character: str) -> bool:
    """Whether it ends a line, is no text, is not seen, or turns what stands behind it round."""
    return unicodedata.category(character) in _CONTROLS and character not in _JOINERS


def brief_sections(facts: Mapping[str, Any]) -> Iterator[Section]:
    """The box on top, and what weakens the promise, in it."""
    summary = facts["epsilon"]
    about = facts.get("about", {})
    size = f"{facts['dataset_size']:,} {'people' if facts.get('counted') == 'person' else 'samples'}"
    promised = summary["epsilon"] is not None
    yield Section(
        "In short",
        rows=(
            ("Verdict", verdict(facts)),
            *((("What it means", _meaning(facts)),) if promised else ()),
            *_about_rows(about, "organisation", "contact"),
            *((("Model", _model(facts["model"])),) if "model" in facts else ()),
            *_about_rows(about, "purpose"),
            (ABOUT["data_set"], f"{about.get('data_set', _NOT_STATED)} ({size})"),
            ("Who or what is protected", protected(facts)),
            ("Written", written(facts)),
            *(_parameters(facts) if promised else ()),
        ),
        figure="guesses" if promised else "",
        place="box",
    )
    yield Section(
        "Findings",
        () if facts["findings"] else ("None: nothing in the records weakens the promise above.",),
        tuple(facts["findings"]),
        place="box",
    )


def protected(facts: Mapping[str, Any]) -> str:
    """The unit, as it is stated, and what the ledger knows of it where that is in others' words."""
    counted = facts.get("counted", "row")
    if facts["unit"] == UNITS[counted]:
        return UNITS[counted]
    noun = "people, each with all their rows" if counted == "person" else "single rows"
    return f"{facts['unit']} (in the words of whoever states this; what is counted are {noun})"


def _about_rows(about: Mapping[str, str], *names: str) -> Iterator[tuple[str, str]]:
    return ((ABOUT[name], about.get(name, _NOT_STATED)) for name in names)


def about_rows(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Who states it, by rows of a table."""
    return tuple(_about_rows(facts.get("about", {}), *ABOUT))


def written(facts: Mapping[str, Any]) -> str:
    """When, as people write it."""
    try:
        return datetime.fromisoformat(facts["created"]).strftime("%Y-%m-%d, %H:%M %Z").strip(" ,")
    except ValueError:
        return str(facts["created"])


def tier(epsilon: float) -> str:
    """What an ε is worth as a formal guarantee, for a model's weights.

    Source:
        Ponomareva et al. 2023, "How to DP-fy ML", section 5.2.1.
    """
    if epsilon <= 1.0:
        return "a strong formal guarantee"
    return "a reasonable guarantee" if epsilon <= 10.0 else "weak as a formal guarantee"


def verdict(facts: Mapping[str, Any]) -> str:
    """The promise and what weakens it, in a sentence or two."""
    epsilon, findings = facts["epsilon"]["epsilon"], len(facts["findings"])
    if epsilon is None:
        return "No promise: no finite ε is certified. Do not rely on this training for privacy."
    judged = tier(epsilon)
    judged = f"{judged[0].upper()}{judged[1:]} (ε ≤ 1 is strong, ε ≤ 10 reasonable)."
    if not findings:
        return f"{judged} Nothing in the records weakens it."
    noun = "finding weakens" if findings == 1 else "findings weaken"
    return f"{judged} But {findings} {noun} it, or must be known before relying on it: sign when all is explained."


def best_guess(facts: Mapping[str, Any]) -> float:
    """How often whoever asks whether a unit was in the data is right at even odds, at most, by all that is known.

    Source:
        Kairouz, Oh, Viswanath 2015, "The composition theorem for differential privacy", section 2.1, for one (ε, δ).
    """
    epsilon, delta = facts["epsilon"]["epsilon"], facts["epsilon"]["delta"]
    best = (1.0 + delta * math.exp(-epsilon)) / (1.0 + math.exp(-epsilon))
    if (risk := facts.get("risk")) is not None:
        # Read from all (ε, δ) that hold, and not from this one alone.
        best = min(best, risk["success_at_even_odds"])
    return float(best)


def of_thousand(share: float) -> int:
    """A bound as a number of 1000, rounded up."""
    return min(1000, math.ceil(round(1000.0 * share, 6)))


def question(facts: Mapping[str, Any]) -> str:
    """What an attacker wants to know."""
    return "which of two units it was" if facts["relation"] == REPLACE_ONE else "whether one unit was in the data"


def found_section(facts: Mapping[str, Any]) -> Iterator[Section]:
    """How many an attacker finds who rarely errs, where that is certified."""
    if facts.get("risk") is None:
        return
    found = (
        f"Where {of_thousand(rates['false_positive'])} of 1000 are suspected wrongly, at most "
        f"{of_thousand(rates['true_positive'])} of 1000 are found; by guessing {of_thousand(rates['false_positive'])}."
        for rates in facts["risk"]["true_positive_rates"]
    )
    yield Section(
        "What an attacker can find",
        (
            "Attackers who want to be sure suspect few. Someone sees all that was released, knows all other data, and "
            "suspects units of having been in the data: of 1000 that were not, some wrongly, so that of 1000 that were "
            "they find some. However they go about it, they find no more than this on average:",
        ),
        tuple(found),
        figure="found",
    )


def _meaning(facts: Mapping[str, Any]) -> str:
    right = of_thousand(best_guess(facts))
    return (
        f"Someone who has the model, knows all other data and asks {question(facts)} is right, at even odds "
        f"beforehand, in at most {right} of 1000 guesses on average. Guessing alone: 500."
    )


def _model(model: Mapping[str, Any]) -> str:
    held = f"A network with {model['trained']:,} trained numbers"
    held += f" and {model['frozen']:,} that were not trained here" if model["frozen"] else ""
    return held + (f"; fingerprint of the weights {model['weights'][:16]}" if model["weights"] else "")


def _parameters(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    epsilon, delta = facts["epsilon"]["epsilon"], facts["epsilon"]["delta"]
    factor = "an astronomical one" if epsilon > 20.0 else shown(math.exp(epsilon))
    yield (
        f"ε = {shown(epsilon)}",
        "The probability of whatever anybody concludes from the model changes, with one unit's data in the training or "
        f"not, by a factor of at most {factor}, but for δ.",
    )
    yield (
        f"δ = {delta:g}",
        f"A rest of probability that the factor leaves out: at most 1 in {math.floor(round(1.0 / delta, 3)):,}. It "
        f"should be well below 1 in {facts['dataset_size']:,}, the size of the data set.",
    )
