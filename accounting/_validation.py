"""Checks of the numbers that enter a privacy computation."""

from __future__ import annotations

import math
import numbers
from typing import SupportsFloat

from .errors import InvalidParameterError


def _as_float(name: str, value: SupportsFloat) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise InvalidParameterError(f"{name} must be a real number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(f"{name} must be a real number, got {value!r}") from error
    except OverflowError as error:
        raise InvalidParameterError(f"{name} must be a number within the range of floats, got a larger one") from error


def noise_multiplier(value: SupportsFloat, name: str = "noise_multiplier") -> float:
    """Returns σ as a float, or raises if it is not positive and finite, or if σ² would leave the range of floats."""
    sigma = _as_float(name, value)
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise InvalidParameterError(
            f"{name} must be positive and finite, got {value!r}: without noise there is no guarantee"
        )
    if not 1e-100 <= sigma <= 1e100:
        raise InvalidParameterError(
            f"{name} must lie in [1e-100, 1e100], got {value!r}: it is relative to the sensitivity, usually 0.3 to 100"
        )
    return sigma


def sample_rate(value: SupportsFloat, name: str = "sample_rate") -> float:
    """Returns q as a float, or raises if it lies outside [0, 1]."""
    q = _as_float(name, value)
    if not 0.0 <= q <= 1.0:
        raise InvalidParameterError(
            f"{name} must lie in [0, 1], got {value!r}: it is the probability that a record joins a batch"
        )
    return q


def delta(value: SupportsFloat, name: str = "delta") -> float:
    """Returns δ as a float, or raises if it lies outside (0, 1)."""
    d = _as_float(name, value)
    if not 0.0 < d < 1.0:
        raise InvalidParameterError(
            f"{name} must lie strictly between 0 and 1, got {value!r}: choose it well below 1 / dataset_size"
        )
    return d


def epsilon(value: SupportsFloat, name: str = "epsilon") -> float:
    """Returns ε as a float, or raises if it is negative or NaN."""
    e = _as_float(name, value)
    if not e >= 0.0:
        raise InvalidParameterError(f"{name} must be at least 0, got {value!r}")
    return e


def target_epsilon(value: SupportsFloat, name: str = "target_epsilon") -> float:
    """Returns a target ε as a float, or raises if it is not positive and finite."""
    e = _as_float(name, value)
    if not (math.isfinite(e) and e > 0.0):
        raise InvalidParameterError(f"{name} must be positive and finite, got {value!r}")
    return e


_LARGEST_COUNT = 10**15
"""Whole numbers up to here are exact in float64, and thousands of them add up to what `len` can return."""


def count(value: object, name: str = "steps", minimum: int = 0) -> int:
    """Returns a whole number as an int, or raises if it is fractional, below `minimum` or beyond 10¹⁵."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidParameterError(f"{name} must be a whole number, got {value!r}")
    number = _as_float(name, value)
    if not (math.isfinite(number) and number.is_integer()):
        raise InvalidParameterError(
            f"{name} must be a whole number, got {value!r}: round up (math.ceil), a lost step is lost privacy"
        )
    if number < minimum:
        raise InvalidParameterError(f"{name} must be at least {minimum}, got {value!r}")
    if number > _LARGEST_COUNT:
        raise InvalidParameterError(f"{name} must be at most 10**15, got {value!r}")
    return int(number)
