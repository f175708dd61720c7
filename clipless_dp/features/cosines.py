"""Random cosines of a table's columns: what a linear layer needs in order to be no longer linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipless_dp.arguments import whole
from clipless_dp.errors import InputError
from clipless_dp.gates.arithmetic import LARGEST_NORM
from clipless_dp.gates.plain import plain_form, scaled
from clipless_dp.gates.signal import scale_samples

_LARGEST_SET = 4
"""Columns that a cosine of few columns looks at, at most."""

_LINEAR_SHARE = 0.2
"""Of the squared norm, what the columns themselves have."""

_SMALLEST = 1e-3
"""Norm below which a part is stretched by one factor."""

_CHUNK = 1 << 22
"""Entries that are computed at once."""


class RandomCosines(nn.Module):
    """``cos(⟨w, x⟩ + b)`` for random ``w`` and ``b``, and the columns themselves: unit vectors for a linear layer.

    Random Fourier features (Rahimi and Recht, "Random features for large-scale kernel machines", 2007): their inner
    products approximate a Gaussian kernel, of width ``√d/4`` for each of the ``d`` columns of deviation one. Half of
    the cosines look at all columns, half at 1 to 4 of them, drawn at random: functions of few columns, which tables are
    full of, are learnt from fewer records. Of each cosine ``cos(b)·exp(-‖w‖²/2)`` is subtracted, its mean over standard
    normal columns: what all rows share tells none of them apart, and would use up the norm.

    Columns and cosines are scaled to the sphere apart, to squared norms of 0.2 and 0.8. No data enters: the features
    of a row cost no privacy, and the same seed makes the same ones.

    Args:
        columns: ``d``, of rows of about mean zero and deviation one.
        cosines: how many.
        seed: fixes the random numbers; public.

    Shape:
        ``(B, d)`` to ``(B, d + cosines)``.

    Raises:
        ConfigurationError: a count is not a positive integer.
        InputError: the rows have another number of columns.
    """

    frequencies: Tensor
    phases: Tensor
    means: Tensor

    def __init__(self, columns: int, cosines: int = 512, *, seed: int = 0) -> None:
        super().__init__()
        columns, cosines = whole("columns", columns), whole("cosines", cosines)
        self.columns, self.cosines, self.seed = columns, cosines, int(seed)
        generator = torch.Generator().manual_seed(self.seed)
        frequencies = torch.randn(columns, cosines, generator=generator)
        few = torch.randint(1, _LARGEST_SET + 1, (cosines,), generator=generator).clamp(max=columns)
        looked_at = torch.where(torch.arange(cosines) % 2 == 0, few, columns)
        order = torch.rand(columns, cosines, generator=generator).argsort(0)
        width = math.sqrt(columns) / 4.0 * looked_at.sqrt()
        frequencies = torch.where(order < looked_at, frequencies, torch.zeros_like(frequencies)) / width
        phases = 2.0 * math.pi * torch.rand(cosines, generator=generator)
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", phases)
        self.register_buffer("means", phases.cos() * (-0.5 * frequencies.square().sum(0)).exp())

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Features of rows: of norm at most one, or NaN where a cell is."""
        if rows.dim() != 2 or rows.shape[1] != self.columns or not rows.is_floating_point():
            raise InputError(
                f"expected floating-point rows of {self.columns} columns, got {rows.dtype} {tuple(rows.shape)}"
            )
        features = rows.new_empty(len(rows), self.columns + self.cosines)
        size = max(1, _CHUNK // features.shape[1])
        for some, out in zip(rows.split(size), features.split(size), strict=True):
            waves = torch.addmm(self.phases.to(rows.dtype), some, self.frequencies.to(rows.dtype)).cos_()
            waves -= self.means.to(rows.dtype)
            out[:, : self.columns] = scale_samples(some, math.sqrt(_LINEAR_SHARE), _SMALLEST)[0]
            out[:, self.columns :] = scale_samples(waves, math.sqrt(1.0 - _LINEAR_SHARE), _SMALLEST)[0]
        return features

    def extra_repr(self) -> str:
        """The arguments."""
        return f"columns={self.columns}, cosines={self.cosines}, seed={self.seed}"


class _Plain(nn.Module):
    """The same by ordinary operations, all rows at once."""

    frequencies: Tensor
    phases: Tensor
    means: Tensor

    def __init__(self, cosines: RandomCosines) -> None:
        super().__init__()
        for name in ("frequencies", "phases", "means"):
            self.register_buffer(name, getattr(cosines, name).clone())

    def forward(self, rows: Tensor) -> Tensor:
        waves = torch.cos(rows @ self.frequencies.to(rows.dtype) + self.phases.to(rows.dtype))
        waves = waves - self.means.to(rows.dtype)
        parts = (rows, math.sqrt(_LINEAR_SHARE)), (waves, math.sqrt(1.0 - _LINEAR_SHARE))
        return torch.cat([scaled(part, radius, _SMALLEST, LARGEST_NORM)[0] for part, radius in parts], 1)


@plain_form(RandomCosines)
def _of_cosines(cosines: RandomCosines) -> nn.Module:
    return _Plain(cosines)
