"""Learnable activations: continuous piecewise linear functions given by their slopes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError


class LinearSpline(nn.Module):
    """A continuous piecewise linear function of each channel, zero at zero, with learnable slopes.

    ``f(x) = Σ_i s_i·φ_i(x)`` where ``φ_i(x)`` is the signed length of ``[0, x]`` within segment ``i``; the first and
    last segments extend to infinity. It is Lipschitz with the largest ``|s_i|``, so a limit of 1 on the slopes
    makes it 1-Lipschitz: any function of that kind on this grid (Bohra, Campos, Gupta, Aziznejad and Unser,
    "Learning activation functions in deep (spline) neural networks", IEEE OJSP 2020; slopes are projected here,
    not re-parametrised). Fresh slopes make a ReLU.

    Args:
        channels: size of the channel axis; 1 shares one function among all entries.
        segments: number of slopes, even, so that 0 is a knot.
        reach: each segment is ``2·reach/segments`` wide.
        dim: the channel axis.

    Shape:
        ``(B, ...)`` to the same shape; ``slopes`` is ``(channels, segments)``.

    Raises:
        ConfigurationError: ``segments`` is odd or below 2, a size is not positive, or the channel axis has another
            size or is the batch axis.
    """

    def __init__(self, channels: int = 1, segments: int = 8, reach: float = 1.0, dim: int = 1) -> None:
        super().__init__()
        if channels < 1 or segments < 2 or segments % 2:
            raise ConfigurationError(
                f"channels must be positive and segments even, got channels={channels}, segments={segments}"
            )
        if not 0.0 < reach < float("inf"):
            raise ConfigurationError(f"reach must be finite and positive, got {reach}")
        if dim == 0:
            raise ConfigurationError("dim=0 is the batch axis: each channel has a function, not each sample")
        self.channels = channels
        self.segments = segments
        self.reach = float(reach)
        self.dim = dim
        slopes = torch.zeros(channels, segments)
        slopes[:, segments // 2 :] = 1.0
        self.slopes = nn.Parameter(slopes)

    def forward(self, values: Tensor) -> Tensor:
        """Applies each channel's function."""
        dim = self.dim % values.dim()
        if dim == 0 or (self.channels > 1 and values.shape[dim] != self.channels):
            raise ConfigurationError(
                f"expected {self.channels} channels on a non-batch axis, got axis {dim} of shape {tuple(values.shape)}"
            )
        step = 2.0 * self.reach / self.segments
        half = self.segments // 2
        position = values.detach() / step
        # NaN stays NaN in the product below, wherever the index puts it.
        segment = torch.nan_to_num(position).clamp(-half, half - 1).floor().long()
        # The end of the segment that is nearer to zero, and the function's value there.
        start = torch.where(segment >= 0, segment, segment + 1)
        right = torch.cumsum(self.slopes[:, half:], 1) * step
        left = torch.cumsum(self.slopes[:, :half].flip(1), 1) * -step
        knots = torch.cat((left.flip(1), torch.zeros_like(left[:, :1]), right), 1)
        if self.channels == 1:
            # No tensor as an index of the one channel, whose value a compiler would ask for.
            slope, value = self.slopes[0][segment + half], knots[0][start + half]
        else:
            channel = torch.arange(self.channels, device=values.device)
            channel = channel.reshape(-1, *([1] * (values.dim() - dim - 1)))
            slope, value = self.slopes[channel, segment + half], knots[channel, start + half]
        return value + slope * (values - step * start.to(values.dtype))

    def extra_repr(self) -> str:
        """Grid and axis."""
        return f"channels={self.channels}, segments={self.segments}, reach={self.reach:g}, dim={self.dim}"
