"""Where an entry of a ledger comes from: whose it is, and what its guarantee rests on besides the numbers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .errors import InvalidParameterError, LedgerFormatError

__all__ = ["Provenance", "Unit", "new_run"]

Drawn = Literal["", "announced", "vouched", "seeded", "none"]
DRAWN = ("", "announced", "vouched", "seeded", "none")
Unit = Literal["", "person"]
UNITS = ("", "person")


@dataclass(frozen=True)
class Provenance:
    """Says of a line of a ledger what its event does not; no number that is computed from the ledger depends on it.

    Attributes:
        run: Identity of who took these events one after the other: one optimizer of one process, say. A ledger holds
            a run's events from the first one on, so that of two ledgers' one is the beginning of the other. Empty where
            nobody can tell.
        sampling: How the records were drawn: `"announced"` by a sampler that the optimizer knows, `"vouched"` for by
            the user, `"seeded"`: from a seed, which must stay secret, `"none"`: nothing is claimed. Empty: not known.
        noise: Name of the noise's source. Empty: not known.
        seeded_masks: Whether other randomness that a record meets, masks of dropout and random views, came from a seed.
        unit: What the neighbouring relation adds, removes or replaces: `"person"`, all records of one person; empty: a
            record. Ledgers of different units do not compose (`Ledger.merge`).
    """

    run: str = ""
    sampling: Drawn = ""
    noise: str = ""
    seeded_masks: bool = False
    unit: Unit = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.run, str) and isinstance(self.noise, str) and isinstance(self.seeded_masks, bool)):
            raise InvalidParameterError(f"a provenance has a run and a noise source by name, got {self!r}")
        if self.sampling not in DRAWN:
            raise InvalidParameterError(f"sampling must be one of {DRAWN}, got {self.sampling!r}")
        if self.unit not in UNITS:
            raise InvalidParameterError(f"unit must be one of {UNITS}, got {self.unit!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns what is known, as plain values."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Provenance:
        """Returns the provenance that `to_dict` described.

        Raises:
            LedgerFormatError: When it is none.
        """
        if not isinstance(data, Mapping):
            raise LedgerFormatError(f"not a provenance: {data!r}")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise LedgerFormatError(f"not a provenance: {error}") from error


def new_run() -> str:
    """Returns an identity that no other run has, forked processes included."""
    return uuid.uuid4().hex
