"""What a privacy statement states, against the ledger in its file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .accountants import Accountant
from .bounds import rounded_down, rounded_up
from .errors import AccountingError


def stated_epsilon(path: str | os.PathLike[str]) -> tuple[float, float] | None:
    """ε and δ of a privacy statement, whose file was read as a ledger; a ledger by itself states none."""
    stated = json.loads(Path(path).read_text(encoding="utf-8")).get("epsilon")
    if not isinstance(stated, dict):
        return None
    epsilon, delta = stated.get("epsilon"), stated.get("delta")
    if not isinstance(epsilon, (int, float)) or not isinstance(delta, (int, float)):
        return None
    # JSON knows integers that no float holds.
    return float(min(epsilon, 1e300)), float(min(delta, 1e300))


def compared(path: str | os.PathLike[str], epsilon: float, delta: float, accountant: Accountant) -> str:
    """Whether a statement's ε follows from its own ledger, in a sentence.

    Args:
        path: the statement's file.
        epsilon: as it states.
        delta: its δ.
        accountant: of its ledger.

    Raises:
        AccountingError: When its ledger gives more for certain.
    """
    bound = accountant.get_epsilon(delta)
    states = f"{os.fspath(path)} states epsilon = {rounded_up(epsilon)} at delta = {delta:g}"
    # As far as floating point on another machine moves it.
    if epsilon >= bound.upper * (1.0 - 1e-9):
        return f"{states}: this follows from its ledger"
    if epsilon >= bound.lower * (1.0 - 1e-9):
        return (
            f"{states}: this neither follows from its ledger nor contradicts it, by the engine {bound.engine}, which "
            f"knows epsilon = {rounded_up(bound.upper)}"
        )
    raise AccountingError(f"{states}, and its ledger gives at least {rounded_down(bound.lower)}: one was altered")
