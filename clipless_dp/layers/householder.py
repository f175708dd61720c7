"""The Householder activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError


class Householder(nn.Module):
    """Reflects each pair of adjacent channels across a learnable line where it lies on its far side.

    For a pair ``z = (z₁, z₂)`` and its angle ``θ``, with ``v = (sin θ/2, -cos θ/2)``: ``z`` itself where
    ``z·v > 0``, else ``(I - 2vvᵀ)z = (z₁cos θ + z₂sin θ, z₁sin θ - z₂cos θ)`` (Singla, Singla and Feizi 2022, §5).
    Continuous, piecewise orthogonal, hence norm-preserving and 1-Lipschitz; ``θ = π/2`` is MaxMin.

    Args:
        channels: size of the channel axis, even; there is one angle for each pair.
        dim: the channel axis, as in :class:`GroupSort`.

    Shape:
        ``(B, ...)`` to the same shape; ``theta`` is ``(channels/2,)``.

    Raises:
        ConfigurationError: ``channels`` is odd, or the input's channel axis has another size or is the batch axis.
    """

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ConfigurationError(f"channels must be even, got {channels}")
        if dim == 0:
            raise ConfigurationError("dim=0 is the batch axis: pairing along it would mix samples")
        self.channels = channels
        self.dim = dim
        self.theta = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, values: Tensor) -> Tensor:
        """Reflects pair by pair."""
        dim = self.dim % values.dim()
        if dim == 0 or values.shape[dim] != self.channels:
            raise ConfigurationError(
                f"expected {self.channels} channels on a non-batch axis, got axis {dim} of shape {tuple(values.shape)}"
            )
        first, second = values.unflatten(dim, (self.channels // 2, 2)).unbind(dim + 1)
        theta = self.theta.reshape(-1, *([1] * (first.dim() - dim - 1)))
        near = first * torch.sin(theta / 2) > second * torch.cos(theta / 2)
        cos, sin = torch.cos(theta), torch.sin(theta)
        reflected = torch.stack((first * cos + second * sin, first * sin - second * cos), dim + 1)
        kept = torch.stack((first, second), dim + 1)
        return torch.where(near.unsqueeze(dim + 1), kept, reflected).flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        """Channels and axis."""
        return f"channels={self.channels}, dim={self.dim}"
