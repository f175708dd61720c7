"""A statement that was read, against the ledger in its file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from accounting import Ledger, create_accountant
from accounting.errors import LedgerFormatError
from accounting.stated import compared
from clipless_dp.errors import CheckpointError
from clipless_dp.statement.facts import findings_of
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
    try:
        findings = dict.fromkeys([*statement.facts["findings"], *_found(statement.facts, name)])
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise CheckpointError(f"{name} is no privacy statement of this version: {error!r}") from error
    return replace(statement, facts={**statement.facts, "findings": list(findings)})


def _found(facts: Any, name: str) -> Iterator[str]:
    is_of_ledger = facts["format"] == LEDGER_KIND
    yield from (ONLY,) if is_of_ledger else findings_of(facts)
    try:
        ledger = Ledger.from_json(json.dumps(facts))
    except LedgerFormatError as error:
        yield f"ε is stated without a ledger from which it follows, so that nothing here can be checked: {error}."
        return
    accountant = create_accountant("auto", relation=ledger.relation)
    accountant.ledger = ledger
    left = compared(name, facts, accountant).open
    yield from left[:_SHOWN]
    if len(left) > _SHOWN:
        yield f"{len(left) - _SHOWN} more numbers that are stated neither follow from the ledger nor contradict it."
    if is_of_ledger and facts["table"] != ledger.table():
        yield _OTHER_TABLE
