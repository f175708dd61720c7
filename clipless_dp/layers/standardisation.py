"""Standardisation of each sample by itself."""

from __future__ import annotations

import math

from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates.arithmetic import LARGEST_NORM, checked_cap
from clipless_dp.gates.plain import plain_form, scaled
from clipless_dp.gates.signal import scale_samples
from clipless_dp.modules import Unscripted


class SampleGroupNorm(Unscripted, nn.Module):
    """``(x - μ)/max(σ, c)`` with the mean and deviation of each group of channels of each sample; (1/c)-Lipschitz.

    ``nn.GroupNorm`` with a floor under the deviation, without which no Lipschitz constant exists, and without
    weights. On features of each sample it costs no privacy.

    Args:
        groups: number of groups; it divides the channels.
        floor: ``c``, at least 1e-8: a group of smaller deviation is divided by ``c`` only.

    Shape:
        ``(B, C, ...)`` to the same shape.

    Raises:
        ConfigurationError: ``groups`` is not a positive integer, or the floor is not a finite number of at least 1e-8.
        InputError: the channels cannot be divided into as many groups.

    Guarantee:
        ``‖y‖ ≤ √entries·rounding_slack(entries)`` whatever the input. A group of deviation above 1e18, or without a
        finite one, becomes zero.
    """

    def __init__(self, groups: int, *, floor: float) -> None:
        super().__init__()
        if not (isinstance(groups, int) and groups >= 1):
            raise ConfigurationError(f"groups must be a positive integer, got {groups!r}")
        self.groups = groups
        self.floor = checked_cap("floor", floor)

    def forward(self, values: Tensor) -> Tensor:
        """Standardises each group of each sample."""
        if values.dim() < 2 or values.shape[1] % self.groups:
            raise InputError(f"channels of {tuple(values.shape)} cannot be divided into {self.groups} groups")
        grouped = values.reshape(values.shape[0] * self.groups, -1)
        radius = math.sqrt(grouped.shape[1])
        scaled, _ = scale_samples(grouped - grouped.mean(1, keepdim=True), radius, radius * self.floor)
        return scaled.reshape(values.shape)

    def extra_repr(self) -> str:
        """Groups and floor."""
        return f"groups={self.groups}, floor={self.floor:g}"


class _Plain(Unscripted, nn.Module):
    """The same by ordinary operations."""

    def __init__(self, groups: int, floor: float) -> None:
        super().__init__()
        self.groups, self.floor = groups, floor

    def forward(self, values: Tensor) -> Tensor:
        grouped = values.reshape(values.shape[0] * self.groups, -1)
        radius = math.sqrt(grouped.shape[1])
        found, _ = scaled(grouped - grouped.mean(1, keepdim=True), radius, radius * self.floor, LARGEST_NORM)
        return found.reshape(values.shape)


@plain_form(SampleGroupNorm)
def _of_groups(layer: SampleGroupNorm) -> nn.Module:
    return _Plain(layer.groups, layer.floor)
