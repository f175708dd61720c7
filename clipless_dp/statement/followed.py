"""A statement that was read, against the ledger in its file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from accounting import Ledger, create_accountant
from accounting.errors import AccountingError, LedgerFormatError
from accounting.stated import compared, recorded
from clipless_dp.errors import CheckpointError
from clipless_dp.statement.facts import DRAWN, findings_of
from clipless_dp.statement.ledgers import LEDGER_KIND, ONLY
from clipless_dp.statement.report import PrivacyStatement

_SHOWN = 3
"""Of what is not decided by the ledger, how much is told."""

_OTHER_TABLE = "The table shown is not that of the ledger in the file: another version wrote it, or it was altered."


def followed(statement: PrivacyStatement, name: str) -> PrivacyStatement:
    """A statement with what its file itself says against it, as further findings; others stay as they are.

    Args:
        statement: as it was read.
        name: of its file.

    Raises:
        AccountingError: ε, what attackers achieve, the relation, the unit or the steps contradict its ledger.
        CheckpointError: it cannot be compared.
    """
    facts = statement.facts
    try:
        told: list[str]
        try:
            ledger = Ledger.from_json(json.dumps(facts))
        except LedgerFormatError as error:
            told = [
                f"ε is stated without a ledger from which it follows, so that nothing here can be checked: {error}."
            ]
        else:
            told = list(_compared(facts, name, ledger))
            facts = facts if facts["format"] == LEDGER_KIND else _completed(facts, ledger)
        own = [ONLY] if facts["format"] == LEDGER_KIND else findings_of(facts)
        findings = dict.fromkeys([*facts["findings"], *own, *told])
    except AccountingError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} is no privacy statement of this version: {error!r}") from error
    return replace(statement, facts={**facts, "findings": list(findings)})


def _compared(facts: Mapping[str, Any], name: str, ledger: Ledger) -> Iterator[str]:
    accountant = create_accountant("auto", relation=ledger.relation)
    accountant.ledger = ledger
    left = compared(name, facts, accountant).open
    yield from left[:_SHOWN]
    if len(left) > _SHOWN:
        yield f"{len(left) - _SHOWN} more numbers that are stated neither follow from the ledger nor contradict it."
    if facts["format"] == LEDGER_KIND and facts["table"] != ledger.table():
        yield _OTHER_TABLE


def _completed(facts: Mapping[str, Any], ledger: Ledger) -> dict[str, Any]:
    """With what the ledger tells of its own lines, of which a statement may leave some out, and former ones do."""
    held = recorded(ledger)
    return {
        **facts,
        "sampling": {**facts["sampling"], "drawn": {kind: held.drawn[kind] for kind in DRAWN if kind in held.drawn}},
        "steps": {**facts["steps"], "entries": held.entries},
    }
