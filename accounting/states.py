"""The states that accountants save, and those of others that they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import LedgerFormatError
from .events import GaussianStep, NoSampling, PoissonSampling, Relation
from .ledger import FORMAT as LEDGER_FORMAT
from .ledger import Ledger

__all__ = ["FORMAT", "VERSION", "read_ledger"]

FORMAT = "accounting.state"
VERSION = 1


def read_ledger(state: Mapping[str, Any], relation: Relation) -> Ledger:
    """Returns the ledger of a state, of a ledger's own state, or of a history as Opacus saves it.

    Raises:
        LedgerFormatError: When the state is incomplete, of an unknown version, no state at all, or about another
            neighbouring relation.
    """
    if not isinstance(state, Mapping):
        raise LedgerFormatError(f"not an accountant state but {type(state).__name__}")
    if state.get("format") == FORMAT:
        if state.get("version") != VERSION:
            raise LedgerFormatError(
                f"unknown state version {state.get('version')!r}: this release reads version {VERSION}; "
                "update the package that reads it"
            )
        ledger = Ledger.from_state_dict(state.get("ledger", {}))
    elif state.get("format") == LEDGER_FORMAT:
        ledger = Ledger.from_state_dict(state)
    elif "format" not in state and "history" in state:
        ledger = _from_history(state["history"])
    else:
        raise LedgerFormatError(f"not an accountant state: format {state.get('format')!r}")
    if ledger.relation != relation:
        raise LedgerFormatError(
            f"the state is about {ledger.relation!r}, this accountant about {relation!r}: "
            f"create it with relation={ledger.relation!r}"
        )
    return ledger


def _from_history(history: Any) -> Ledger:
    ledger = Ledger()
    if not isinstance(history, (list, tuple)):
        raise LedgerFormatError(f"history is no list of (noise_multiplier, sample_rate, steps) but {history!r}")
    for entry in history:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise LedgerFormatError(f"history entry {entry!r} is not (noise_multiplier, sample_rate, steps)")
        sigma, q, n = entry
        sampling = NoSampling() if q == 1.0 else PoissonSampling(q)
        ledger.append(GaussianStep(sigma, sampling), n)
    return ledger
