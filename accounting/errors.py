"""What the accounting refuses, and what it warns about."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = [
    "AccountingError",
    "AccountingWarning",
    "CliplessError",
    "EngineRangeError",
    "FallbackWarning",
    "InvalidParameterError",
    "LargeDeltaWarning",
    "LedgerFormatError",
    "MixedUnitsError",
    "UnreachableTargetError",
    "UnsupportedEventError",
    "warn_caller",
]

_INSIDE = frozenset({"", "accelerate", "accounting", "clipless_dp", "contextlib", "functools", "torch"})
"""Packages whose lines are nobody's own: this one, and what calls it in between; code without a name was generated."""


class CliplessError(Exception):
    """Base of every error that `accounting`, or what stands on it, raises on purpose."""


class AccountingError(CliplessError, ValueError):
    """Base of every error raised by `accounting`."""


class InvalidParameterError(AccountingError):
    """A parameter lies outside its range; the message holds its value and the remedy."""


class MixedUnitsError(InvalidParameterError):
    """Releases about rows and about people would be in one ledger, or are: their ε add up to none of either."""


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


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the line of the user's code that led here, however many calls of these packages lie in between.

    Args:
        message: What is wrong, and what to do about it.
        category: The kind of warning.
    """
    frame: FrameType = sys._getframe(1)
    while _package(frame) in _INSIDE and frame.f_back is not None:
        frame = frame.f_back
    place = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=place.get("__name__", "<unknown>"),
        registry=place.setdefault("__warningregistry__", {}),
    )


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__") or "").partition(".")[0]
