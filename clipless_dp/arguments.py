"""Checks of arguments, made before anything is touched or charged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from accounting import Accountant
from clipless_dp.errors import ConfigurationError, InputError

LARGEST_COUNT = 10**15
"""Whole numbers up to here are exact in float64, which counts of samples, rows and steps are computed in."""


def _number(value: object) -> float:
    """A plain number, or one of numpy, as a float; NaN for everything else, infinity for what is no float.

    Truth values, strings and tensors are none: they are slips of the pen, or may hold what was computed from data.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _finite(name: str, value: object, fits: Callable[[float], bool], wanted: str) -> float:
    number = _number(value)
    if math.isfinite(number) and fits(number):
        return number
    raise ConfigurationError(f"{name} must be {wanted}, got {shown(value)}")


def shown(value: object) -> str:
    """A value for a message: what it looks like, or its type where that is long or cannot be had."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:80]}... ({type(value).__name__})"


def positive(name: str, value: object) -> float:
    """A finite positive number, plain or of numpy, as a float.

    Truth values, strings and tensors are refused: they are slips of the pen, or may hold what was computed from data.

    Raises:
        ConfigurationError: it is anything else.
    """
    return _finite(name, value, lambda number: number > 0.0, "a finite and positive number")


def number(name: str, value: object) -> float:
    """A finite number of either sign, plain or of numpy, as a float.

    Raises:
        ConfigurationError: it is anything else, as in :func:`positive`.
    """
    return _finite(name, value, lambda found: True, "a finite number")


def cap(name: str, value: object) -> float:
    """A finite number of at least 1e-8, plain or of numpy, as a float.

    Raises:
        ConfigurationError: it is anything else.
    """
    return _finite(name, value, lambda number: number >= 1e-8, "a finite number of at least 1e-8")


def not_negative(name: str, value: object) -> float:
    """A finite number of at least 0, plain or of numpy, as a float.

    Raises:
        ConfigurationError: it is anything else.
    """
    return _finite(name, value, lambda number: number >= 0.0, "a finite number, 0 or positive")


def learning_rate(name: str, value: object) -> float:
    """A finite number of at least 0, plain, of numpy or, as torch takes them, in a tensor of one number, as a float.

    Raises:
        ConfigurationError: it is anything else.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        value = float(value.detach())
    return not_negative(name, value)


def share(name: str, value: object, interval: Literal["(0, 1)", "(0, 1]", "[0, 1)", "[0, 1]"]) -> float:
    """A number between 0 and 1, plain or of numpy, as a float.

    Args:
        name: of the argument.
        value: what was given.
        interval: round brackets leave an end out.

    Raises:
        ConfigurationError: it is anything else.
    """
    number = _number(value)
    if 0.0 < number < 1.0 or (number == 0.0 and interval[0] == "[") or (number == 1.0 and interval[-1] == "]"):
        return number
    raise ConfigurationError(f"{name} must lie in {interval}, got {shown(value)}")


def multiplier(name: str, value: object) -> float:
    """A noise multiplier, plain or of numpy, as a float; the accounting squares it.

    Raises:
        ConfigurationError: it is no number in [1e-100, 1e100].
    """
    number = positive(name, value)
    if 1e-100 <= number <= 1e100:
        return number
    raise ConfigurationError(f"{name} must lie in [1e-100, 1e100], usually 0.3 to 100, got {shown(value)}")


def whole(name: str, value: object, least: int | None = 1, most: int | None = LARGEST_COUNT) -> int:
    """A whole number, plain or of numpy, as an int.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest that will do; ``None``: any.
        most: the largest that will do; ``None``: any.

    Raises:
        ConfigurationError: it is anything else, truth values and floats among it.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if (least is None or number >= least) and (most is None or number <= most):
            return number
    limits = "" if least is None else f", at least {least}"
    if most is not None and isinstance(value, Integral) and int(value) > most:
        limits = f", at most {most}"
    raise ConfigurationError(f"{name} must be a whole number{limits}, got {shown(value)}")


def seed(name: str, value: object) -> int | None:
    """A whole number, of any size and sign, or ``None``.

    Raises:
        ConfigurationError: it is anything else.
    """
    return None if value is None else whole(name, value, None, None)


def unmasked(name: str, value: Any) -> Any:
    """An array, or a list of such, that numpy's masks cover nothing of: what is under a mask is no number of anybody's.

    Raises:
        InputError: a mask covers some of it.
    """
    listed = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(one, np.ma.MaskedArray) and np.ma.is_masked(one) for one in listed):
        raise InputError(
            f"some {name} are masked, and what is under the mask would be read: fill them (rows.filled(np.nan) where "
            "cells may be missing), or leave them out"
        )
    return value


def flag(name: str, value: object) -> bool:
    """``True`` or ``False``, plain or of numpy.

    Raises:
        ConfigurationError: it is anything else, numbers among it.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ConfigurationError(f"{name} must be True or False, got {shown(value)}")


def choice(name: str, value: object, *choices: str) -> Any:
    """One of some words.

    Raises:
        ConfigurationError: it is none of them.
    """
    if isinstance(value, str) and value in choices:
        return value
    raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def function(name: str, value: object, of: str) -> Any:
    """Something that can be called.

    Args:
        name: of the argument.
        value: what was given.
        of: what it is called with, in words.

    Raises:
        ConfigurationError: it cannot be called.
    """
    if callable(value):
        return value
    raise ConfigurationError(f"{name} must be a function of {of}, got {shown(value)}")


def patterns(name: str, value: object) -> tuple[str, ...]:
    """Patterns of names; a single string is a single pattern.

    Raises:
        ConfigurationError: it is neither a string nor some of them.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable) and not isinstance(value, (Mapping, Tensor, bytes, type)):
        try:
            found = tuple(value)
        except TypeError:
            # An array of no dimension says that it can be gone through.
            found = (value,)
        if all(isinstance(pattern, str) for pattern in found):
            return found
    raise ConfigurationError(f"{name} must be patterns of names, such as ('*',) or 'encoder.*', got {shown(value)}")


def members(name: str, value: object, of: str) -> tuple[Any, ...]:
    """What is in a list, a tuple or whatever else can be gone through.

    Args:
        name: of the argument.
        value: what was given.
        of: what it should hold, in words.

    Raises:
        ConfigurationError: it is one thing, text or a mapping.
    """
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, type)):
        try:
            return tuple(value)
        except TypeError:
            pass
    raise ConfigurationError(f"{name} must be a list of {of}, got {shown(value)}")


def device(name: str, value: object) -> torch.device | None:
    """A device that is there, or ``None``.

    Raises:
        ConfigurationError: it is neither, or the machine has no such device.
    """
    if value is None:
        return None
    try:
        if isinstance(value, (str, torch.device)) or (isinstance(value, Integral) and not isinstance(value, bool)):
            found = torch.device(value if isinstance(value, (str, torch.device)) else int(value))
            torch.empty(0, device=found)
            return found
    except (AssertionError, NotImplementedError, OverflowError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"{name}={shown(value)} is no device of this machine ({reason}): name one, such as 'cpu' or 'cuda:0'"
        ) from error
    raise ConfigurationError(f"{name} must be a torch.device, its name or None, got {shown(value)}")


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
