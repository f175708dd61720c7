"""How well scores rank the normal above the anomalous, whatever an attacker does to them within a radius."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clipless_dp.arguments import choice, not_negative, unmasked
from clipless_dp.errors import ConfigurationError, InputError

Sides = Literal["both", "one"]


def certified_auroc(
    positive_scores: Any,
    negative_scores: Any,
    lipschitz: float,
    radius: float,
    *,
    sides: Sides = "both",
) -> float:
    """The share of pairs that stay in order: a lower bound of the AUROC after any attack within ``radius``.

    Scores are L-Lipschitz: a sample that is moved by ``r`` changes its own by at most ``Lr``. An attacker who moves
    both samples of a pair closes a gap of ``2Lr``, one who moves the positive, or the negative ones, ``Lr``.
    So ``P(s⁺ - s⁻ > 2Lr)``, or ``> Lr``, over pairs is certified. At ``r = 0`` it is the AUROC, where ties count half;
    else a pair that could be tied counts for nothing. Found by sorting, in ``O((P + N) log N)``.

    Args:
        positive_scores: ``(P,)``, of what should rank high.
        negative_scores: ``(N,)``.
        lipschitz: ``L`` of the scores, of the whole way from inputs to them; infinite: nothing is certified.
        radius: ``r``, in units of the inputs.
        sides: ``"both"``: all samples are attacked. ``"one"``: either the positive or the negative ones.

    Returns:
        A number in [0, 1]: of these samples. Rounding is against the claim: what is that near to a tie is one.

    Raises:
        ConfigurationError: an argument is out of range.
        InputError: scores are not ``(N,)`` numbers, there are none of a side, or some are NaN.
    """
    above, below = _scores("positive_scores", positive_scores), _scores("negative_scores", negative_scores)
    moved = 1.0 if choice("sides", sides, "both", "one") == "one" else 2.0
    size = not_negative("radius", radius)
    slope = math.inf if lipschitz == math.inf else not_negative("lipschitz", lipschitz)
    below = np.sort(below)
    pairs = float(len(above)) * float(len(below))
    if size == 0.0:
        lower = np.searchsorted(below, above, "left").sum(dtype=np.float64)
        ties = np.searchsorted(below, above, "right").sum(dtype=np.float64) - lower
        return float((lower + 0.5 * ties) / pairs)
    gap = moved * slope * size
    if math.isnan(gap):
        raise ConfigurationError(f"lipschitz·radius is no number, of {lipschitz!r} and {radius!r}")
    if gap == math.inf:
        return 0.0
    if gap > 0.0:
        gap = math.nextafter(math.nextafter(gap, math.inf), math.inf)
        above = np.nextafter(above - gap, -math.inf)
    return float(np.searchsorted(below, above, "left").sum(dtype=np.float64) / pairs)


def _scores(name: str, values: Any) -> NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        found = np.asarray(unmasked(name, values))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} must be numbers (N,), one at least, got a {type(values).__name__}: {error}"
        ) from error
    if found.ndim != 1 or found.dtype.kind not in "iuf" or not len(found):
        raise InputError(f"{name} must be numbers (N,), one at least, got {found.dtype} {found.shape}")
    found = found.astype(np.float64)
    if np.isnan(found).any():
        raise InputError(f"some {name} are NaN, which rank nowhere: leave these samples out, and say how many")
    return found
