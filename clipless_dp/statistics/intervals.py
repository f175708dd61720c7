"""Intervals around predictions that hold new rows with a stated share and confidence, from noisy counts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.stats import binom
from torch import Tensor

from accounting import Accountant
from clipless_dp.arguments import positive, share, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.modules import kept_modes
from clipless_dp.noise import NoiseSource, noisy
from clipless_dp.sampling.overlaps import refuse_overlapping_columns
from clipless_dp.statistics.release import Charge, checked_size, require_tensor

_ROUNDING = 1.0 + 1e-5
"""Noise is drawn a millionth larger than planned."""


@dataclass(frozen=True)
class PrivateInterval:
    """``f(x) ± width``, which holds a new row's target with probability ``content`` at least, with ``confidence``.

    Attributes:
        width: half of the interval; infinite where no width of the grid was known to do.
        content: the share of rows.
        confidence: probability, over held-out rows and noise, that the share is what is said.
    """

    width: float
    content: float
    confidence: float

    def around(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, in the predictions' shape."""
        return predictions - self.width, predictions + self.width


def private_interval(
    model: Callable[[Tensor], Tensor],
    held_out: tuple[Tensor, Tensor],
    content: float,
    confidence: float,
    *,
    upper: float,
    noise_multiplier: float,
    accountant: Accountant,
    points: int = 63,
    lower: float | None = None,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> PrivateInterval:
    """How far predictions lie from targets, as a tolerance interval: the smallest width that noisy counts vouch for.

    On a public grid of widths ``t`` (geometric, from ``lower`` to ``upper``) rows with ``|y - f(x)| ≤ t`` are counted,
    with noise of deviation ``σ√L``, by bisection in ``L = ⌈log₂(points + 1)⌉`` counts. A width does where its count is
    at least ``k - 1 + m``: ``k`` is the smallest number with ``P(Bin(N, content) ≥ k) ≤ α/2``, ``α = 1 - confidence``,
    and ``m = σ√L·Φ⁻¹(1 - α/2L)`` covers the noise. (A private form of distribution-free tolerance limits, S. Wilks,
    "Determination of sample sizes for setting tolerance limits", 1941; proof in docs/bounds.md.)

    Args:
        model: makes predictions of inputs ``(1, ...)``: each row runs by itself, since its place among others rounds
            it otherwise, and counts of ties would move with every row; a module is in ``eval`` mode meanwhile. It must
            not have been trained on these rows.
        held_out: inputs ``(N, ...)`` and targets ``(N,)`` or ``(N, k)``: independent rows of the distribution that the
            interval is for. Of several outputs the farthest counts; a row that has no finite distance is outside.
        content: share of new rows that the interval is to hold, in (0, 1).
        confidence: with what probability it does, in (0, 1).
        upper: the largest width, public.
        noise_multiplier: ``σ``; a row changes each count by at most 1.
        accountant: records the release. Where rows are also trained on, privately, both add up there.
        points: widths in the grid.
        lower: the smallest width, public; a thousandth of ``upper`` by default.
        dataset_size: public number of held-out rows; by default ``N``, which is then taken to be public. The interval
            is right where it is at least ``N``.
        noise: ``"system"``, the default, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        file: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or so few rows could vouch for no width, whatever they are.
        InputError: predictions and targets do not have one size.
        PrivacyError: a row, or a target, lies on another one's in memory.
        CheckpointError: as for :func:`private_moments`.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one row, for the model and
        ``dataset_size`` given. Nothing is charged where the predictions fail.
    """
    content, confidence = share("content", content, "(0, 1)"), share("confidence", confidence, "(0, 1)")
    upper, noise_multiplier = positive("upper", upper), positive("noise_multiplier", noise_multiplier)
    lower = upper / 1000.0 if lower is None else positive("lower", lower)
    points = whole("points", points)
    if not lower < upper:
        raise ConfigurationError(f"the grid must have 0 < lower < upper, got {lower!r} and {upper!r}")
    inputs, targets = held_out
    inputs, targets = require_tensor(inputs), require_tensor(targets)
    if len(inputs) != len(targets):
        raise InputError(f"inputs and targets must be of the same rows, got {len(inputs)} and {len(targets)}")
    if len(targets) == 0 or targets.is_complex():
        raise InputError(f"expected one row or more of real targets, got {tuple(targets.shape)}, {targets.dtype}")
    refuse_overlapping_columns([inputs.detach()], beside=[targets.detach()])
    size = checked_size(targets.detach().reshape(len(targets), -1).double(), dataset_size)
    halvings = math.ceil(math.log2(points + 1))
    deviation = noise_multiplier * math.sqrt(halvings)
    least = needed_count(size, content, confidence, deviation, halvings)
    if least > size:
        raise ConfigurationError(
            f"no width could be known to hold {content:g} of the rows with confidence {confidence:g}: that takes a "
            f"count of {least:.0f} of {size} rows. Give more rows, or a smaller content, confidence or noise_multiplier"
        )
    settings = {
        "statistic": "interval",
        "content": content,
        "confidence": confidence,
        "range": [lower, upper],
        "points": points,
        "dataset_size": size,
        "dtype": str(targets.dtype),
    }
    widths = grid(lower, upper, points)

    def bisected(distances: Tensor, source: NoiseSource) -> Tensor:
        below, above = -1, points
        while above - below > 1:
            middle = (below + above) // 2
            count = float(noisy((distances <= widths[middle]).sum(), deviation, source))
            below, above = (middle, above) if count < least else (below, middle)
        return torch.tensor(widths[above] if above < points else math.inf, dtype=torch.float64)

    found, _ = Charge(noise_multiplier, accountant, noise, file).released(
        lambda: _distances(model, inputs, targets),
        bisected,
        settings,
    )
    return PrivateInterval(float(found), content, confidence)


def grid(lower: float, upper: float, points: int) -> list[float]:
    """Widths from ``lower`` to ``upper``, each the same factor above the one before; one point is ``upper``."""
    if points == 1:
        return [upper]
    return [*(lower * (upper / lower) ** (index / (points - 1)) for index in range(points - 1)), upper]


def needed_count(rows: int, content: float, confidence: float, deviation: float, counts: int) -> float:
    """The noisy count from which a width does.

    Args:
        rows: ``N``.
        content: of the interval.
        confidence: of the interval.
        deviation: of the noise on each count.
        counts: how many are taken at most.
    """
    miss = 0.5 * (1.0 - confidence)
    # The largest number that is exceeded with a probability of more than `miss` is one below.
    exceeded = float(binom.isf(miss, rows, content))
    return exceeded + _ROUNDING * deviation * NormalDist().inv_cdf(1.0 - miss / counts)


@torch.no_grad()
def _distances(model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """``max_j |y_j - f(x)_j|`` of each row, ``(N,)``; infinite where it is no number."""
    parts: list[Tensor] = []
    with kept_modes(model) as modules:
        for part in modules:
            part.training = False
        for some, truth in zip(inputs.split(1), targets.split(1), strict=True):
            predicted = model(some)
            if not isinstance(predicted, Tensor) or len(predicted) != len(truth) or predicted.numel() != truth.numel():
                shape = tuple(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
                raise InputError(f"predictions {shape} and targets {tuple(truth.shape)} must have one size")
            apart = predicted.double().reshape(len(truth), -1) - truth.to(predicted.device).double().reshape(
                len(truth), -1
            )
            parts.append(apart.abs().amax(1).cpu())
    found = torch.cat(parts)
    return torch.where(found.isfinite(), found, torch.full_like(found, math.inf))
