"""What a stored ledger alone says: how much was spent, by which mechanisms. Of the model it knows nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from accounting import Ledger, create_accountant
from accounting.errors import MixedUnitsError
from clipless_dp.statement.brief import about_rows, found_section, written
from clipless_dp.statement.facts import shown
from clipless_dp.statement.risk import risk_of
from clipless_dp.statement.section import Section
from clipless_dp.version import __version__

LEDGER_KIND = "clipless_dp.ledger_statement"
LEDGER_FORMAT = 1
ONLY = "Only a ledger was read: nothing is known of the model that it belongs to."

_UNCOVERED = (
    "What the ledger does not hold: other uses of the same data, choices made by looking at results on it.",
    "The model: whether its gradients are bounded as each step was charged, and whether these are its weights, is in "
    "the statement of a result, not in a ledger.",
    "The size of the data set, which is treated as public.",
)


def facts_of_ledger(ledger: Ledger, delta: float, title: str, source: str) -> dict[str, Any]:
    """Plain values of a ledger, its own included.

    Args:
        ledger: what was recorded.
        delta: δ of the summary, in (0, 1).
        title: heading.
        source: where the ledger is from.
    """
    accountant = create_accountant("auto", relation=ledger.relation)
    accountant.ledger = ledger
    findings = [ONLY]
    curve: list[dict[str, Any]] = []
    try:
        for exponent in range(7):
            bound = accountant.get_epsilon(delta * 10.0**-exponent)
            curve.append(
                {
                    "delta": delta * 10.0**-exponent,
                    "epsilon": float(bound),
                    "lower": bound.lower,
                    "engine": bound.engine,
                }
            )
    except MixedUnitsError:
        findings.append("The ledger is about rows and about people: no single ε holds for both.")
        curve = [{"delta": delta, "epsilon": None, "lower": None, "engine": None}]
    units = sorted(ledger.units)
    return {
        "format": LEDGER_KIND,
        "version": LEDGER_FORMAT,
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": source,
        "relation": str(ledger.relation),
        "counted": ["person" if unit == "person" else "row" for unit in units],
        "epsilon": {**curve[0], "curve": curve},
        "risk": risk_of(accountant),
        "table": ledger.table(),
        "ledger": ledger.state_dict(),
        "not_covered": list(_UNCOVERED),
        "findings": findings,
        "versions": {"clipless_dp": __version__},
    }


def ledger_sections(facts: Mapping[str, Any]) -> Iterator[Section]:
    """The parts of a readable statement of a ledger."""
    spent = facts["epsilon"]
    one = " and ".join(facts["counted"]) or "row"
    amount = "no single ε" if spent["epsilon"] is None else f"ε = {shown(spent['epsilon'])} at δ = {spent['delta']:g}"
    yield Section(
        "What was spent",
        (
            f"All that the ledger holds is differentially private with {amount}, for one {one} ("
            f"{facts['relation'].replace('_', ' ')}), if each step and release was as it says.",
        ),
        rows=(*about_rows(facts), ("Written", written(facts))),
        figure="guesses" if spent["epsilon"] is not None else "",
        place="box",
    )
    yield Section("Findings", items=tuple(facts["findings"]), place="box")
    yield Section("What is not covered", items=tuple(facts["not_covered"]))
    yield from found_section(facts)
    yield Section("Ledger", printed=(facts["table"],))
    yield Section(
        "ε for other δ",
        header=("δ", "ε at most"),
        rows=tuple((f"{at['delta']:g}", shown(at["epsilon"])) for at in spent["curve"] if at["epsilon"] is not None),
    )
    yield Section(
        "How to check this",
        ("The JSON file holds the ledger: anyone can compute ε from it again, with the package accounting.",),
        rows=(("read from", facts["source"]), *facts["versions"].items(), ("written", facts["created"])),
    )
