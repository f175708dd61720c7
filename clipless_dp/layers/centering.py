"""Layer centering, and biases of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.modules import Unscripted


class LayerCentering(Unscripted, nn.Module):
    """Subtracts each sample's own mean over the given axes: an orthogonal projection, hence 1-Lipschitz.

    Args:
        dims: axes of the mean, none of them the batch; ``None`` means all of them. ``(-2, -1)`` centers each
            channel of a map by itself.

    Shape:
        ``(B, ...)`` to the same shape.
    """

    def __init__(self, dims: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, values: Tensor) -> Tensor:
        """Subtracts the mean."""
        dims = tuple(range(1, values.dim())) if self.dims is None else self.dims
        return values - values.mean(dims, keepdim=True)

    def extra_repr(self) -> str:
        """The axes."""
        return f"dims={self.dims}"


class ChannelBias(Unscripted, nn.Module):
    """Adds one learnable number to each channel.

    Args:
        channels: length of ``bias``, which starts at zero.
        dim: the channels' axis; -1 for tokens ``(B, T, C)``.

    Shape:
        ``(B, C, ...)`` to the same shape.

    Raises:
        ConfigurationError: ``channels`` is not positive, or ``dim`` is the batch axis.
        InputError: the input has another number of channels.
    """

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigurationError(f"channels must be positive, got {channels}")
        if dim == 0:
            raise ConfigurationError("dim=0 is the batch axis; channels are on another")
        self.dim = dim
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, values: Tensor) -> Tensor:
        """Adds the biases."""
        axis = self.dim % values.dim()
        if axis == 0 or values.shape[axis] != self.bias.shape[0]:
            raise InputError(f"axis {self.dim} of {tuple(values.shape)} does not hold {self.bias.shape[0]} channels")
        return values + self.bias.reshape(-1, *[1] * (values.dim() - axis - 1))

    def extra_repr(self) -> str:
        """Channels and their axis."""
        return f"channels={self.bias.shape[0]}, dim={self.dim}"


class BiasedCentering(nn.Sequential):
    """:class:`LayerCentering` followed by :class:`ChannelBias`: a norm layer without its division.

    Args:
        channels: length of the bias.
        dims: axes of the mean; ``None`` means all but the batch, ``(-2, -1)`` each channel of a map by itself.

    Shape:
        ``(B, C, ...)`` to the same shape.
    """

    def __init__(self, channels: int, dims: tuple[int, ...] | None = None) -> None:
        super().__init__(LayerCentering(dims), ChannelBias(channels))
