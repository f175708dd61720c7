"""Weights of rows in one pass: what the gradients of each are multiplied by, behind the gates of their parameters.

A person's rows weigh one together. A weight ahead of a gate, in the loss or in a cotangent, would be undone by one that
normalises; so gates multiply their own factors by it: ``Σ_b w_b·factor_b·G_b``. The way back is the ordinary one. Which
weights hold is said around the forward pass, and each layer keeps those of its rows for the way back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from clipless_dp.errors import PrivacyError


class _Now(threading.local):
    weights: Tensor | None = None


_now = _Now()


class weighing(AbstractContextManager[None]):
    """Forward passes of this thread within are of rows of these weights, ``(B,)``; ``None``: of whole ones.

    No generator, which might end at any time, within another pass, where it was interrupted before it began.
    """

    def __init__(self, weights: Tensor | None) -> None:
        self._weights = weights

    def __enter__(self) -> None:
        self._before, _now.weights = _now.weights, self._weights

    def __exit__(self, *_: object) -> None:
        _now.weights = self._before


def weights_of(rows: Tensor) -> Tensor | None:
    """The weights of the rows ``(B, ...)`` that a forward pass has in hand, ``(B,)``; ``None`` where all are whole.

    Raises:
        PrivacyError: the pass is of another number of rows than the weights are for.
    """
    weights = _now.weights
    if weights is not None and len(weights) != len(rows):
        raise PrivacyError(
            f"{len(weights)} rows of people are passed, and a layer met {len(rows)}: let nothing else run within the "
            "model's pass, in a hook, say"
        )
    return weights


def weights_from(divisors: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
    """One weight for each row, at most one over its divisor also once a factor was multiplied by it and rounded.

    Args:
        divisors: of consecutive rows how many, and what they are divided by.
        dtype: of the gates' factors.
    """
    return torch.cat([torch.full((count,), _one_over(divisor, dtype), dtype=dtype) for count, divisor in divisors])


def _one_over(divisor: int, dtype: torch.dtype) -> float:
    """``1/d``, exactly for powers of two; else two numbers below the nearest, so at most ``(1-u)/d``."""
    found = torch.tensor(1.0, dtype=dtype) / divisor
    if divisor & (divisor - 1):
        for _ in range(2):
            found = torch.nextafter(found, torch.tensor(-math.inf, dtype=dtype))
    return float(found)
