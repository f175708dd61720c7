"""From scores to numbers within [0, 1] for each class, whose sum is at most 1 for any two of them, and their slopes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from clipless_dp.robustness.constants import ROUNDING, Constants

Map = Literal["argmax", "softmax", "sparsemax", "margin"]
MAPS = ("argmax", "softmax", "sparsemax", "margin")


def mapped(scores: Tensor, name: Map, temperature: float) -> Tensor:
    """What is averaged over noise, ``(B, C)``.

    ``argmax``: 1 for the largest score (the first of several), 0 for the others. ``softmax``: of ``τz``.
    ``sparsemax``: the point of the simplex nearest to ``τz`` (Martins & Astudillo 2016). ``margin``: ``½(1 + τ(z_c -
    max_{j ≠ c} z_j))``, at least 0 and at most 1.

    Args:
        scores: ``(B, C)``, finite, at least two classes.
        name: of the map.
        temperature: ``τ``, which multiplies the scores.
    """
    if name == "argmax":
        return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).to(scores)
    if name in ("softmax", "sparsemax"):
        # Neither sees what all scores have in common, without which products with a large temperature stay numbers.
        lower = temperature * (scores - scores.amax(1, keepdim=True))
        return torch.softmax(lower, 1) if name == "softmax" else _sparsemax(lower)
    top = scores.topk(2, 1).values
    largest = torch.where(scores == top[:, :1], top[:, 1:], top[:, :1])
    return (0.5 + 0.5 * temperature * (scores - largest)).clamp(0.0, 1.0)


def _sparsemax(scores: Tensor) -> Tensor:
    ordered = scores.sort(1, descending=True).values
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    excess = ordered.cumsum(1) - 1.0
    support = (ordered * ranks > excess).sum(1, keepdim=True)
    return (scores - excess.gather(1, support - 1) / support).clamp(min=0.0)


def slope(name: Map, temperature: float, constants: Constants) -> float:
    """A Lipschitz constant of each class's function, from those of the scores; infinite for ``argmax``.

    With ``K`` the largest of the ``K_ij`` of differences of scores: ``τK/4`` for softmax, ``τK(C - 1)/C`` or
    ``τL√((C - 1)/C)`` for sparsemax, ``τK/2`` for margins. docs/robustness.md has the proof.
    """
    pairs = float(constants.pairs.max())
    if name == "argmax" or not math.isfinite(pairs):
        return math.inf
    if name == "sparsemax":
        rest = 1.0 - 1.0 / len(constants.pairs)
        found = rest * pairs
        # Of one output f the constant is that of f, and not of the scores (-f, f).
        if len(constants.pairs) > 2 and math.isfinite(constants.joint):
            found = min(found, math.sqrt(rest) * constants.joint)
    else:
        found = pairs / (4.0 if name == "softmax" else 2.0)
    return temperature * found * ROUNDING
