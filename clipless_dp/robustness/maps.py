"""From scores to numbers within [0, 1] for each class, and their slopes: for any two classes they add up to at most 1.

But for ``pairs``, where there is a number for each pair of classes, and those of a pair and of its reverse add up to 1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from clipless_dp.robustness.constants import ROUNDING, Constants

Map = Literal["argmax", "softmax", "sparsemax", "margin", "pairs"]
MAPS = ("argmax", "softmax", "sparsemax", "margin", "pairs")


def mapped(scores: Tensor, name: Map, temperature: float, chosen: Tensor | None = None) -> Tensor:
    """What is averaged over noise, ``(B, C)``.

    ``argmax``: 1 for the largest score (the first of several), 0 for the others. ``softmax``: of ``τz``.
    ``sparsemax``: the point of the simplex nearest to ``τz`` (Martins & Astudillo 2016). ``margin``: ``½(1 + τ(z_c -
    max_{j ≠ c} z_j))``, at least 0 and at most 1. ``pairs``: of a class ``A``, ``½(1 + τ(z_A - z_c))``, likewise, for
    each ``c``, and 1 for ``A`` itself; as ``margin`` as long as there is no ``A``.

    Args:
        scores: ``(B, C)``, finite, at least two classes.
        name: of the map.
        temperature: ``τ``, which multiplies the scores.
        chosen: ``(B,)``, for ``pairs``: ``A`` of each row.
    """
    if name == "pairs" and chosen is not None:
        ahead = scores.gather(1, chosen[:, None]) - scores
        return (0.5 + 0.5 * temperature * ahead).clamp(0.0, 1.0).scatter(1, chosen[:, None], 1.0)
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
    ``τL√((C - 1)/C)`` for sparsemax, ``τK/2`` for margins and, at most, pairs. docs/robustness.md has the proof.
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


def slopes_of_pairs(temperature: float, constants: Constants) -> Tensor:
    """The constant of ``½(1 + τ(z_i - z_j))`` for every pair of classes, ``τK_ij/2``: ``(C, C)``, float64."""
    return constants.pairs.double().cpu() * (0.5 * temperature * ROUNDING)
