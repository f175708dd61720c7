"""Means and variances of channels."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accounting import Accountant, GaussianRelease
from clipless_dp.arguments import positive
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates import sample_norms
from clipless_dp.noise import NoiseSource, noisy
from clipless_dp.sampling.people import people_of
from clipless_dp.statistics.release import Charge, checked_size, chunks, require_tensor, shares_of

MOMENTS_SENSITIVITY = math.sqrt(2.0)


@dataclass(frozen=True)
class Moments:
    """Released means and variances of channels; what is computed from them is post-processing.

    Attributes:
        mean: ``(C,)``, float64.
        variance: ``(C,)``, float64, at least the square of ``floor``.
        floor: the least deviation that is told from noise.
        release: the event that paid for them.
    """

    mean: Tensor
    variance: Tensor
    floor: float
    release: GaussianRelease

    def standardise(self, values: Tensor) -> Tensor:
        """``(x - mean)/deviation`` of each channel.

        Args:
            values: ``(B, C, ...)``.

        Raises:
            InputError: the channels are not as many.
        """
        if values.dim() < 2 or values.shape[1] != len(self.mean):
            raise InputError(f"expected values (batch, {len(self.mean)}, ...), got {tuple(values.shape)}")
        shape = (-1, *([1] * (values.dim() - 2)))
        mean, deviation = (
            part.to(values.device, values.dtype).reshape(shape) for part in (self.mean, self.variance.sqrt())
        )
        return (values - mean) / deviation


def private_moments(
    values: Tensor,
    *,
    norm: float,
    noise_multiplier: float,
    accountant: Accountant,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
    groups: Any = None,
) -> Moments:
    """Mean and variance of each channel, by one Gaussian release of first and second moments.

    Each record is projected on the ball of radius ``R = norm``; one that is not finite becomes zero. With ``P`` entries
    in a channel of a record, what is summed over records is ``(s/(R√P), v/R²)``, where ``s`` and ``v`` hold the sum
    and the sum of squares of each channel. A record of norm ``tR``, ``t ≤ 1``, adds a vector of norm at most
    ``√(t² + t⁴) ≤ √2``: by Cauchy and Schwarz ``‖s‖² ≤ P·Σ v = P‖x‖²``, and ``‖v‖ ≤ Σ v = ‖x‖²`` because squares are
    not negative. Both are attained, by a record with all of its norm spread evenly over one channel.

    Args:
        values: ``(N, C)`` or ``(N, C, ...)``: records, channels, and places that share their channel's moments.
        norm: ``R``; a public choice, or one of :func:`private_quantile`.
        noise_multiplier: ``σ``: the sums get noise of standard deviation ``√2·σ``.
        accountant: records the release, under its own neighbouring relation.
        dataset_size: public number of records; by default ``N``, which is then taken to be public.
        noise: ``"system"``, the default, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        file: keeps what was released. If it exists, it is read in place of a new release, and the same release is
            recorded: a run that goes on from a checkpoint pays once. What is public is compared (arguments, shape of a
            record, type of the numbers), not the data: for other data choose another file.
        groups: whose each record is, an id for each: then the release is about people, as is ``dataset_size``. A
            person's records weigh one over their number, so that all of them together count as one record.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the values are not floating-point numbers of shape ``(N, C, ...)``, or hold no record.
        PrivacyError: a record lies on another person's in memory: an expanded tensor, windows that overlap.
        CheckpointError: the file belongs to other settings, is damaged or cannot be written.

    Returns:
        The moments. Variances are lifted to that of their own noise where they are below it, ``R²√2σ/(NP)``.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record, or with
        ``groups`` one person: the mean of vectors of norm at most ``√2`` is one.
    """
    people = people_of(groups, len(values) if require_tensor(values).dim() else 0)
    size = checked_size(values, dataset_size, people)
    noise_multiplier, norm = positive("noise_multiplier", noise_multiplier), positive("norm", norm)
    if not 1e-8 <= norm <= 1e18:
        raise ConfigurationError(f"norm must lie in [1e-8, 1e18], got {norm!r}")
    settings = {
        "statistic": "moments",
        "norm": norm,
        "dataset_size": size,
        "dtype": str(values.dtype),
        "shape": list(values.shape[1:]),
    }
    sums, release = Charge(noise_multiplier, accountant, noise, file, people).released(
        lambda: moment_sums(values, norm, shares_of(values, people)),
        lambda exact, source: noisy(exact, noise_multiplier * MOMENTS_SENSITIVITY, source),
        settings,
    )
    return moments_of(sums.cpu(), norm, size, values[0, 0].numel(), noise_multiplier, release)


def moments_of(
    sums: Tensor, norm: float, size: int, places: int, noise_multiplier: float, release: GaussianRelease
) -> Moments:
    """Means and variances from the noisy sums ``(2, C)``."""
    first, second = sums / size
    mean = first * norm / math.sqrt(places)
    # The deviation of the second moment's own noise: a smaller variance is not told from none.
    floor = norm * math.sqrt(MOMENTS_SENSITIVITY * noise_multiplier / (size * places))
    variance = (second * norm**2 / places - mean.square()).clamp(min=floor**2)
    return Moments(mean, variance, floor, release)


def moment_sums(values: Tensor, norm: float, shares: Tensor | None = None) -> Tensor:
    """``(2, C)``: the sums of :func:`private_moments` over the records, weighed by shares ``(N,)``, without noise."""
    channels = values.shape[1]
    sums = torch.zeros(2, channels, dtype=torch.float64, device=values.device)
    for some, *weights in chunks(values, shares):
        rows = some.double().flatten(2) if some.dim() > 2 else some.double().unsqueeze(2)
        lengths = sample_norms(rows)
        usable = torch.isfinite(lengths)
        shrunk = rows[usable] / lengths[usable].clamp(min=norm)[:, None, None]
        squares = shrunk.square()
        for weight in weights:
            shrunk, squares = (part * weight[usable, None, None] for part in (shrunk, squares))
        sums[0] += shrunk.sum((0, 2)) / math.sqrt(rows.shape[2])
        sums[1] += squares.sum((0, 2))
    return sums
