"""Checks of arguments, made before anything is touched or charged."""

from __future__ import annotations

import math
from numbers import Integral, Real

from accounting import Accountant
from clipless_dp.errors import ConfigurationError


def positive(name: str, value: object) -> float:
    """A finite positive number, plain or of numpy, as a float.

    Truth values, strings and tensors are refused: they are slips of the pen, or may hold what was computed from data.

    Raises:
        ConfigurationError: it is anything else.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and number > 0.0:
            return number
    raise ConfigurationError(f"{name} must be a finite and positive number, got {value!r}")


def whole(name: str, value: object, least: int = 1) -> int:
    """A whole number from ``least`` on, plain or of numpy, as an int.

    Raises:
        ConfigurationError: it is anything else, truth values and floats among it.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    raise ConfigurationError(f"{name} must be a whole number, at least {least}, got {value!r}")


def flag(name: str, value: object) -> bool:
    """``True`` or ``False``.

    Raises:
        ConfigurationError: it is anything else, numbers among it.
    """
    if isinstance(value, bool):
        return value
    raise ConfigurationError(f"{name} must be True or False, got {value!r}")


def require_accountant(accountant: object, *, or_name: bool = False) -> Accountant:
    """The accountant, once it is known to be one.

    Args:
        accountant: what was given.
        or_name: whether the name of one would have done.

    Raises:
        ConfigurationError: it is none.
    """
    if not isinstance(accountant, Accountant):
        raise ConfigurationError(
            f"accountant must be {'a name, or ' if or_name else ''}an object such as create_accountant('prv') makes, "
            f"got {accountant!r:.80}"
        )
    return accountant
