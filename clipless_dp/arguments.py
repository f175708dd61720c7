"""Checks of arguments that several functions take."""

from __future__ import annotations

from accounting import Accountant
from clipless_dp.errors import ConfigurationError


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
