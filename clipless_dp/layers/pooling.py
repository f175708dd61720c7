"""L2-norm pooling and scaled average pooling."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.errors import ConfigurationError


class L2NormPool2d(nn.Module):
    """The Euclidean norm of each window and channel (Boureau, Ponce and LeCun 2010).

    ``sqrt(Σ x² + ε²) - ε`` with ``ε = 1e-6``, so that the gradient exists at zero; never above the norm itself.

    Args:
        kernel_size: window, an int or a pair.
        stride: defaults to the window.
        padding: zeros on each side.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, H', W')``.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        if min(self.kernel_size) < 1:
            raise ConfigurationError(f"kernel_size must be positive, got {kernel_size}")
        stride = self.kernel_size if stride is None else stride
        self.stride = stride if isinstance(stride, tuple) else (stride, stride)
        self.padding = padding if isinstance(padding, tuple) else (padding, padding)

    def forward(self, values: Tensor) -> Tensor:
        """Pools each channel."""
        squares = functional.avg_pool2d(
            values.square(), self.kernel_size, self.stride, self.padding, divisor_override=1
        )
        return (squares + 1e-12).sqrt() - 1e-6

    def extra_repr(self) -> str:
        """Window, stride and padding."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class ScaledAvgPool2d(nn.AvgPool2d):
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
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)

    def forward(self, values: Tensor) -> Tensor:
        """Pools each channel."""
        window = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size, self.kernel_size)
        return math.sqrt(math.prod(window)) * super().forward(values)
