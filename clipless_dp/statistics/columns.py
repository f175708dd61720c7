"""What brings the columns of a table to one scale."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accounting import Accountant, GaussianRelease
from clipless_dp.arguments import positive
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.noise import NoiseSource, noisy
from clipless_dp.sampling.people import people_of
from clipless_dp.statistics.moments import MOMENTS_SENSITIVITY, Moments, moment_sums, moments_of
from clipless_dp.statistics.release import Charge, checked_size, chunks, require_tensor, shares_of


class Standardisation(nn.Module):
    """``(clip(x, ±c)/c - μ)/s`` of each column of a table, cut at ±4: a public function once its numbers are released.

    A missing cell (NaN) becomes zero, which is the mean; an infinite one is cut like any other.

    Args:
        caps: ``c``, ``(C,)``, positive.
        moments: ``μ`` and ``s²`` of ``clip(x, ±c)/c``.

    Shape:
        ``(B, C)`` to ``(B, C)``, float32.

    Raises:
        InputError: the rows are not floating-point numbers, or have other columns.

    Attributes:
        release: the event that paid for the numbers; ``None`` of those that were read from a file.
    """

    caps: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, caps: Tensor, moments: Moments) -> None:
        super().__init__()
        self.release: GaussianRelease | None = moments.release
        self.register_buffer("caps", caps)
        self.register_buffer("mean", moments.mean)
        self.register_buffer("deviation", moments.variance.sqrt())

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], prefix: str = "") -> Standardisation:
        """One of the buffers in a state dict, whose release is in the ledger beside it.

        Args:
            state: buffers by name.
            prefix: of the names.

        Raises:
            KeyError: one is missing.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.release = None
        for name in ("caps", "mean", "deviation"):
            made.register_buffer(name, state[prefix + name].clone())
        return made

    def forward(self, rows: Tensor) -> Tensor:
        """Standardises rows."""
        if rows.dim() != 2 or rows.shape[1] != len(self.caps) or not rows.is_floating_point():
            raise InputError(
                f"expected floating-point rows (batch, {len(self.caps)}), got {rows.dtype} {tuple(rows.shape)}"
            )
        standardised = (_capped(rows.to(self.caps.dtype), self.caps) - self.mean) / self.deviation
        standardised = torch.where(torch.isnan(rows), torch.zeros_like(standardised), standardised)
        return standardised.clamp(-_LARGEST_STANDARDISED, _LARGEST_STANDARDISED).float()


_LARGEST_STANDARDISED = 4.0


def private_standardisation(
    values: Tensor,
    *,
    noise_multiplier: float,
    accountant: Accountant,
    lower: float = 1e-6,
    upper: float = 1e6,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
    groups: Any = None,
) -> Standardisation:
    """What brings the columns of a table to one scale, whatever theirs are: caps, means and deviations, in one release.

    First, a high quantile of each column's magnitudes, for all columns at once: ``h`` times the range is halved on a
    logarithmic scale, to an eighth, by noisy counts as in :func:`private_quantile`. A record changes each column's
    count by at most 1, so ``C`` counts by at most ``√C`` in norm. The quantile is the highest that the counts' noise
    lets one tell from the largest value: of rank ``1 - 3·noise/N``, between 0.7 and 0.98. Twice it is the cap ``c``.

    Second, mean and variance of the columns of ``clip(x, ±c)/c`` as in :func:`private_moments`, with ``R = √C/2``:
    most magnitudes are below half the cap, so that few records are projected. Each part gets noise of multiplier
    ``σ√2``, which compose to ``σ``.

    A column that is zero in nearly all records becomes an indicator of what is not: its cap is the range's lower end.

    Args:
        values: ``(N, C)``, floating-point; missing cells (NaN) count as zero.
        noise_multiplier: ``σ`` of both parts together.
        accountant: records the release, under its own neighbouring relation.
        lower: public lower end of the range of magnitudes, positive.
        upper: public upper end, above ``lower``. A wide range costs little: ``h`` grows with the logarithm of the
            number of octaves.
        dataset_size, noise, file, groups: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the values are not floating-point numbers of shape ``(N, C)``, or there are none.
        PrivacyError: a record lies on another person's in memory: an expanded tensor, windows that overlap.
        CheckpointError: as for :func:`private_moments`.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record, or with
        ``groups`` one person: the second part is chosen in view of the first, and adaptive Gaussian releases compose
        like one (Dong, Roth and Su 2022, Corollary 2).
    """
    if require_tensor(values).dim() != 2:
        raise InputError(f"expected rows and columns, (N, C), got {tuple(values.shape)}")
    people = people_of(groups, len(values))
    size = checked_size(values, dataset_size, people)
    noise_multiplier = positive("noise_multiplier", noise_multiplier)
    lower, upper = positive("lower", lower), positive("upper", upper)
    if not (1e-8 <= lower < upper <= 1e18):
        raise ConfigurationError(f"the range must have 1e-8 <= lower < upper <= 1e18, got {lower!r} and {upper!r}")
    columns = values.shape[1]
    settings = {
        "statistic": "standardisation",
        "range": [lower, upper],
        "dataset_size": size,
        "dtype": str(values.dtype),
        "columns": columns,
    }
    part = noise_multiplier * math.sqrt(2.0)
    norm = math.sqrt(columns) / 2.0

    def drawn(exact: tuple[Tensor, Tensor | None], source: NoiseSource) -> Tensor:
        caps = 2.0 * _noisy_magnitudes(*exact, size, lower, upper, part, source)
        sums = torch.zeros(2, columns, dtype=torch.float64, device=caps.device)
        for rows, *shares in chunks(*exact):
            sums += moment_sums(_capped(rows.double(), caps).nan_to_num(0.0), norm, *shares)
        return torch.cat([caps[None], noisy(sums, part * MOMENTS_SENSITIVITY, source)])

    numbers, release = Charge(noise_multiplier, accountant, noise, file, people).released(
        lambda: (values.detach(), shares_of(values, people)),
        drawn,
        settings,
    )
    caps, sums = numbers[0].cpu(), numbers[1:].cpu()
    return Standardisation(caps, moments_of(sums, norm, size, 1, part, release)).to(values.device)


def _capped(rows: Tensor, caps: Tensor) -> Tensor:
    return rows.clamp(-caps, caps) / caps


def _noisy_magnitudes(
    values: Tensor,
    shares: Tensor | None,
    size: int,
    lower: float,
    upper: float,
    noise_multiplier: float,
    source: NoiseSource,
) -> Tensor:
    """``(C,)``: a high quantile of each column's magnitudes, by bisection of all columns at once."""
    columns = values.shape[1]
    low = torch.full((columns,), math.log(lower), dtype=torch.float64, device=values.device)
    high = torch.full_like(low, math.log(upper))
    halvings = max(1, math.ceil(math.log2(math.log(upper / lower) / _RESOLUTION)))
    deviation = noise_multiplier * math.sqrt(halvings) * _counts_sensitivity(columns)
    rank = size * (1.0 - min(0.3, max(0.02, 3.0 * deviation / size)))
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        above = noisy(_counts(values, middle.exp(), shares), deviation, source) < rank
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high.exp()


_RESOLUTION = 0.125


def _counts_sensitivity(columns: int) -> float:
    return math.sqrt(columns)


def _counts(values: Tensor, thresholds: Tensor, shares: Tensor | None = None) -> Tensor:
    """``(C,)``: how many magnitudes of each column are at most its threshold, each as much as its record weighs."""
    counts = torch.zeros_like(thresholds)
    for rows, *weights in chunks(values, shares):
        below = rows.double().nan_to_num(0.0, math.inf, -math.inf).abs() <= thresholds
        counts += weights[0] @ below.double() if weights else below.sum(0)
    return counts
