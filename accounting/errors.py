"""What the accounting refuses, and what it warns about."""

from __future__ import annotations

__all__ = [
    "AccountingError",
    "AccountingWarning",
    "EngineRangeError",
    "FallbackWarning",
    "InvalidParameterError",
    "LargeDeltaWarning",
    "LedgerFormatError",
    "UnreachableTargetError",
    "UnsupportedEventError",
]


class AccountingError(ValueError):
    """Base of every error raised by `accounting`."""


class InvalidParameterError(AccountingError):
    """A parameter lies outside its range; the message holds its value and the remedy."""


class UnsupportedEventError(AccountingError):
    """An engine does not understand an event, or an event under this neighbouring relation."""


class UnreachableTargetError(AccountingError):
    """No admissible parameter reaches the privacy target."""


class LedgerFormatError(AccountingError):
    """A stored ledger or state is truncated, of an unknown version, or not a ledger at all."""


class EngineRangeError(AccountingError):
    """An engine cannot certify an answer here; another engine has to be asked."""


class AccountingWarning(UserWarning):
    """Base of every warning issued by `accounting`."""


class FallbackWarning(AccountingWarning):
    """Another engine answered than the one that was asked; the bound is valid but may be looser."""


class LargeDeltaWarning(AccountingWarning):
    """δ exceeds one over the number of records: the guarantee would allow publishing a record."""
