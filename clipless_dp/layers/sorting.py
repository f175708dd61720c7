"""Sorting activations: permutations of the coordinates, hence exactly norm-preserving."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.layers.pairing import Paired, Pairing


def _refuse_batch(dim: int) -> None:
    if dim == 0:
        raise ConfigurationError("dim is the batch axis, along which samples would mix; use dim=1")


class GroupSort(Paired):
    """Sorts each group of adjacent channels in ascending order (Anil, Lucas and Grosse 2019, §4).

    Args:
        group_size: entries per group, at least 2; it must divide the number of channels.
        dim: the channel axis; 1 for vectors and maps, -1 for token sequences ``(B, T, C)``. Never 0, the batch.
        pairing: ``"adjacent"``, or for groups of two ``"halves"``: channels ``i`` and ``i + C/2`` are a pair, and the
            smaller one stays in the first half.

    Shape:
        ``(B, ...)`` to the same shape.

    Raises:
        ConfigurationError: the group size is below 2 or does not divide the channels, ``dim`` is the batch axis, or
            ``pairing`` is another, or ``"halves"`` for larger groups.
    """

    def __init__(self, group_size: int = 2, dim: int = 1, *, pairing: Pairing = "adjacent") -> None:
        super().__init__(pairing)
        if pairing != "adjacent" and group_size != 2:
            raise ConfigurationError(f"pairing={pairing!r} makes groups of two, got group_size={group_size}")
        if group_size < 2:
            raise ConfigurationError(f"group_size must be at least 2, got {group_size}")
        _refuse_batch(dim)
        self.group_size = group_size
        self.dim = dim

    def forward(self, values: Tensor) -> Tensor:
        """Sorts within groups."""
        dim = self.dim % values.dim()
        channels = values.shape[dim]
        _refuse_batch(dim)
        if channels % self.group_size:
            raise ConfigurationError(
                f"group_size={self.group_size} does not divide the {channels} channels of axis {dim}"
            )
        if self.group_size == 2:
            first, second = self._pairs(values, dim)
            return self._joined(torch.minimum(first, second), torch.maximum(first, second), dim)
        ordered: Tensor = self._larger(values, dim).sort(dim=dim + 1).values
        return ordered.flatten(dim, dim + 1)

    def groups(self, channels: int) -> Tensor:
        """Which channels are sorted together: indices, ``(groups, group_size)``."""
        return super().groups(channels) if self.group_size == 2 else self._larger(torch.arange(channels), 0)

    def _larger(self, values: Tensor, dim: int) -> Tensor:
        """Groups of more than two, along an axis of their own."""
        groups: Tensor = values.unflatten(dim, (values.shape[dim] // self.group_size, self.group_size))
        return groups

    def extra_repr(self) -> str:
        """Group size, axis, and the pairing where it is not of neighbours."""
        pairing = "" if self.pairing == "adjacent" else f", pairing={self.pairing!r}"
        return f"group_size={self.group_size}, dim={self.dim}{pairing}"


class MaxMin(GroupSort):
    """:class:`GroupSort` with groups of two."""

    def __init__(self, dim: int = 1, *, pairing: Pairing = "adjacent") -> None:
        super().__init__(2, dim, pairing=pairing)


class _Channels(nn.Module):
    """What is done along one axis of channels."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        _refuse_batch(dim)
        self.dim = dim

    def extra_repr(self) -> str:
        """The axis."""
        return f"dim={self.dim}"


class FullSort(_Channels):
    """Sorts all channels in ascending order: :class:`GroupSort` with a single group.

    Args:
        dim: the channel axis, as in :class:`GroupSort`.

    Shape:
        ``(B, ...)`` to the same shape.

    Raises:
        ConfigurationError: ``dim`` is the batch axis.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Sorts the channels."""
        _refuse_batch(self.dim % values.dim())
        return values.sort(dim=self.dim).values

    def groups(self, channels: int) -> Tensor:
        """Which channels are sorted together: indices, ``(1, channels)``."""
        return torch.arange(channels)[None]


class ConcatReLU(_Channels):
    """``relu(x)`` and ``relu(-x)``, one after the other along an axis (Shang et al. 2016): norm-preserving.

    Args:
        dim: the axis, not the batch's, whose length doubles.

    Shape:
        ``(B, C, ...)`` to ``(B, 2C, ...)``.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Joins both halves."""
        return torch.cat([values.relu(), (-values).relu()], self.dim)
