"""Padding that torch lacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.modules import Unscripted


class _SymmetricPad(Unscripted, nn.Module):
    """Mirrors signals at their edges, the edge included.

    Args:
        sides: entries added before and behind, from the last axis to the first, as ``nn.ReflectionPad2d`` takes them.
    """

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__()
        if min(sides) < 0:
            raise ConfigurationError(f"padding must not be negative, got {tuple(sides)}")
        self.padding = tuple(sides)

    def forward(self, values: Tensor) -> Tensor:
        """Pads each channel."""
        axes = len(self.padding) // 2
        if values.dim() != axes + 2:
            names = "length" if axes == 1 else "height, width"
            raise InputError(f"needs inputs (batch, channels, {names}), got {tuple(values.shape)}")
        for index in range(axes):
            low, high = self.padding[2 * index : 2 * index + 2]
            axis = values.dim() - 1 - index
            size = values.shape[axis]
            if max(low, high) > size:
                raise InputError(f"padding {self.padding} is wider than the signal, of {size} entries on axis {axis}")
            before = values.narrow(axis, 0, low).flip(axis)
            behind = values.narrow(axis, size - high, high).flip(axis)
            values = torch.cat([before, values, behind], axis)
        return values

    def extra_repr(self) -> str:
        """The sides."""
        return f"padding={self.padding}"


class SymmetricPad1d(_SymmetricPad):
    """Mirrors a signal at its edges, the edge included: ``cba|abc|cba``. In front of a convolution without padding.

    ``nn.ReflectionPad1d`` leaves the edge out: ``cb|abc|ba``.

    Args:
        padding: entries on each side, or (before, behind); at most the signal's length.

    Shape:
        ``(B, C, L)`` to ``(B, C, L + before + behind)``.
    """

    def __init__(self, padding: int | tuple[int, int]) -> None:
        super().__init__(padding if isinstance(padding, tuple) else (padding, padding))


class SymmetricPad2d(_SymmetricPad):
    """Mirrors a map at its edges, the edges included. In front of a convolution without padding.

    Args:
        padding: entries on each side, or (left, right, top, bottom); at most the map's size.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, H + top + bottom, W + left + right)``.
    """

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(padding if isinstance(padding, tuple) else (padding,) * 4)


class PadChannels(Unscripted, nn.Module):
    """Adds channels of zeros behind those that there are: an isometry, by which residual layers start wide.

    The entry of the networks of Araujo, Havens, Delattre, Allauzen and Hu, "A unified algebraic perspective on
    Lipschitz neural networks", ICLR 2023, §5: it has no weights, so that nothing in front of the first residual layer
    is charged.

    Args:
        channels: of the output, at least those of the input.

    Shape:
        ``(B, C, ...)`` to ``(B, channels, ...)``.

    Raises:
        ConfigurationError: the number is not positive.
        InputError: the input has more channels, or none.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = whole("channels", channels)

    def forward(self, values: Tensor) -> Tensor:
        """Adds the channels."""
        if values.dim() < 2 or values.shape[1] > self.channels:
            raise InputError(
                f"needs inputs (batch, channels, ...) of at most {self.channels} channels, got {tuple(values.shape)}"
            )
        return functional.pad(values, (0, 0) * (values.dim() - 2) + (0, self.channels - values.shape[1]))

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"channels={self.channels}"
