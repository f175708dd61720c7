"""L2-norm pooling over windows, fixed or adaptive, and scaled average pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates.plain import plain_form
from clipless_dp.modules import Unscripted
from clipless_dp.norms.geometry import Axis

Pair: TypeAlias = int | tuple[int, int]
"""Of both axes, or of each."""


def _pair(value: Pair) -> tuple[int, int]:
    first, second = value if isinstance(value, Sequence) else (value, value)
    return first, second


def _root(squares: Tensor) -> Tensor:
    return (squares + 1e-12).sqrt() - 1e-6


class L2NormPool1d(nn.Module):
    """:class:`L2NormPool2d` on signals.

    Args:
        kernel_size: window.
        stride: defaults to the window.
        padding: zeros on each side.

    Shape:
        ``(B, C, L)`` to ``(B, C, L')``.
    """

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ConfigurationError(f"kernel_size must be positive, got {kernel_size}")
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding

    def forward(self, values: Tensor) -> Tensor:
        """Pools each channel."""
        squares = functional.avg_pool1d(values.square(), self.kernel_size, self.stride, self.padding)
        return _root(squares * self.kernel_size)

    def extra_repr(self) -> str:
        """Window, stride and padding."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class _AdaptiveL2NormPool(Unscripted, nn.Module):
    """The norm of each of a fixed number of windows.

    Args:
        output_size: windows on each axis.
    """

    def __init__(self, output_size: tuple[int, ...]) -> None:
        super().__init__()
        if min(output_size) < 1:
            raise ConfigurationError(f"output_size must be positive, got {output_size}")
        self.output_size = output_size

    def forward(self, values: Tensor) -> Tensor:
        """Pools each channel."""
        axes = len(self.output_size)
        if values.dim() != axes + 2:
            names = "length" if axes == 1 else "height, width"
            raise InputError(f"needs inputs (batch, channels, {names}), got {tuple(values.shape)}")
        squares = values.square()
        for axis, made in enumerate(self.output_size, start=2):
            squares = _window_sums(squares, axis, made)
        return _root(squares)

    def extra_repr(self) -> str:
        """Windows on each axis."""
        return f"output_size={self.output_size}"


def _window_sums(values: Tensor, axis: int, made: int) -> Tensor:
    """Sums over the windows that adaptive pooling has along one axis: entries ``⌊in/m⌋`` to ``⌈(i+1)n/m⌉``."""
    windows = adaptive_windows(values.shape[axis], made)
    if made == 1:
        return values.sum(axis, keepdim=True)
    return torch.cat([values.narrow(axis, low, high - low).sum(axis, keepdim=True) for low, high in windows], axis)


def adaptive_windows(size: int, made: int) -> Sequence[tuple[int, int]]:
    """First entry and end of each window that adaptive pooling makes of an axis of so many entries.

    Args:
        size: entries.
        made: windows.
    """
    return [(index * size // made, -(-(index + 1) * size // made)) for index in range(made)]


class AdaptiveL2NormPool1d(_AdaptiveL2NormPool):
    """The Euclidean norm of each of a fixed number of windows of a signal; 1: of each channel as a whole.

    Windows are those of ``nn.AdaptiveAvgPool1d``; they overlap where their number does not divide the length.
    ``sqrt(Σ x² + ε²) - ε`` as in :class:`L2NormPool2d`.

    Args:
        output_size: windows.

    Shape:
        ``(B, C, L)`` to ``(B, C, output_size)``.
    """

    def __init__(self, output_size: int = 1) -> None:
        super().__init__((output_size,))


class AdaptiveL2NormPool2d(_AdaptiveL2NormPool):
    """The Euclidean norm of each of a fixed number of windows of a map; 1: of each channel as a whole.

    Windows are those of ``nn.AdaptiveAvgPool2d``; they overlap where their number does not divide the size.
    ``sqrt(Σ x² + ε²) - ε`` as in :class:`L2NormPool2d`.

    Args:
        output_size: windows, an int or a pair.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, *output_size)``.
    """

    def __init__(self, output_size: Pair = 1) -> None:
        super().__init__(_pair(output_size))


class L2NormPool2d(Unscripted, nn.Module):
    """The Euclidean norm of each window and channel (Boureau, Ponce and LeCun 2010).

    ``sqrt(Σ x² + ε²) - ε`` with ``ε = 1e-6``, so that the gradient exists at zero; never above the norm itself.

    Args:
        kernel_size: window, an int or a pair.
        stride: defaults to the window.
        padding: zeros on each side.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, H', W')``.
    """

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        super().__init__()
        self.kernel_size = _pair(kernel_size)
        if min(self.kernel_size) < 1:
            raise ConfigurationError(f"kernel_size must be positive, got {kernel_size}")
        stride = self.kernel_size if stride is None else stride
        self.stride = _pair(stride)
        self.padding = _pair(padding)

    def forward(self, values: Tensor) -> Tensor:
        """Pools each channel."""
        # Not by divisor_override, which exporters drop without a word.
        squares = functional.avg_pool2d(values.square(), self.kernel_size, self.stride, self.padding)
        return _root(squares * math.prod(self.kernel_size))

    def extra_repr(self) -> str:
        """Window, stride and padding."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class ScaledAvgPool2d(Unscripted, nn.AvgPool2d):
    """Average pooling times ``√n_w``, ``n_w`` entries in a window: 1-Lipschitz where windows do not overlap.

    A plain average shrinks even a constant map by ``√n_w``; this one keeps its norm.

    Args:
        kernel_size: window, an int or a pair.
        stride: defaults to the window.
        padding: zeros on each side, counted in the average.
        ceil_mode: adds the windows that overhang.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, H', W')``.
    """

    def __init__(
        self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, ceil_mode: bool = False
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)

    def forward(self, values: Tensor) -> Tensor:
        """Pools each channel."""
        window = _pair(self.kernel_size)
        return math.sqrt(math.prod(window)) * super().forward(values)


class _WindowSums(Unscripted, nn.Module):
    """Average pooling with a divisor of its own, without torch's argument for it, which ONNX exports drop silently."""

    def __init__(self, pool: nn.AvgPool2d) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = map(_pair, (pool.kernel_size, pool.stride, pool.padding))
        self.ceil_mode, self.divisor = pool.ceil_mode, pool.divisor_override

    def forward(self, values: Tensor) -> Tensor:
        sides: list[int] = []
        for axis in (1, 0):
            size, pad = values.shape[axis - 2], self.padding[axis]
            geometry = Axis(size, self.kernel[axis], self.stride[axis], 1, pad, pad)
            windows = geometry.outputs(ceil_mode=self.ceil_mode)
            missing = (windows - 1) * self.stride[axis] + self.kernel[axis] - size - 2 * pad
            sides += [pad, pad + max(missing, 0)]
        averages = functional.avg_pool2d(functional.pad(values, sides), self.kernel, self.stride)
        return averages * (math.prod(self.kernel) / cast(int, self.divisor))


@plain_form(nn.AvgPool2d)
def _of_averages(pool: nn.AvgPool2d) -> nn.Module:
    return pool if pool.divisor_override is None else _WindowSums(pool)
