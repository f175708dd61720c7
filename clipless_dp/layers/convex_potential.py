"""Residual layers that step down the gradient of a convex function: 1-Lipschitz where their weight has norm 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.errors import ConfigurationError


class ConvexPotential(nn.Module):
    """``x - 2·Wᵀ relu(Wx + b)``: a gradient step on the convex function ``‖relu(Wx + b)‖²``.

    The Jacobian is ``I - 2WᵀDW`` with a diagonal ``D`` of zeros and ones, symmetric, with eigenvalues in
    ``[1 - 2‖W‖², 1]``: 1-Lipschitz for ``‖W‖ ≤ 1``, which any constraint with a limit of 1 provides. A layer
    ``x - 2VT⁻¹relu(Vᵀx + b)`` with a positive diagonal ``T`` is this one with ``W = T^-½Vᵀ``, as ReLU commutes with
    ``T^-½`` (Araujo, Havens, Delattre, Allauzen and Hu, "A unified algebraic perspective on Lipschitz neural
    networks", ICLR 2023, §4); with ``T = ‖V‖²`` it is Meunier, Delattre, Araujo and Allauzen, "A dynamical system
    perspective for Lipschitz neural networks", ICML 2022, §4.

    Args:
        features: size of the last axis.
        hidden: rows of ``W``; ``features`` by default.
        bias: whether there is a ``b``.

    Shape:
        ``(B, ..., features)`` to the same shape; ``weight`` is ``(hidden, features)``, ``bias`` ``(hidden,)``.

    Raises:
        ConfigurationError: a size is not positive.
    """

    def __init__(self, features: int, hidden: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.features = features
        self.hidden = features if hidden is None else hidden
        if min(self.features, self.hidden) < 1:
            raise ConfigurationError(f"features and hidden must be positive, got {features} and {hidden}")
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(self.hidden, features)))
        self.bias = nn.Parameter(torch.zeros(self.hidden)) if bias else None

    def forward(self, values: Tensor) -> Tensor:
        """Takes the step."""
        hidden = functional.relu(functional.linear(values, self.weight, self.bias))
        return values - 2.0 * functional.linear(hidden, self.weight.t())

    def extra_repr(self) -> str:
        """Sizes."""
        return f"features={self.features}, hidden={self.hidden}, bias={self.bias is not None}"


class ConvexPotentialConv2d(nn.Module):
    """:class:`ConvexPotential` whose ``W`` is a convolution of stride 1.

    Args:
        channels: of the input and the output.
        kernel_size: of the convolution.
        hidden: channels between; ``channels`` by default.
        padding: zeros on each side; half the kernel by default.
        bias: whether there is a ``b``, one entry for each hidden channel.

    Shape:
        ``(B, channels, H, W)`` to the same shape; ``weight`` is ``(hidden, channels, k, k)``, ``bias`` ``(hidden,)``.

    Raises:
        ConfigurationError: a size is not positive, or the padding is negative.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        hidden: int | None = None,
        *,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = channels if hidden is None else hidden
        self.kernel_size = kernel_size
        self.padding = kernel_size // 2 if padding is None else padding
        if min(self.channels, self.hidden, kernel_size) < 1 or self.padding < 0:
            raise ConfigurationError(
                f"sizes must be positive and padding at least 0, got channels={channels}, hidden={hidden}, "
                f"kernel_size={kernel_size}, padding={padding}"
            )
        self.weight = nn.Parameter(torch.empty(self.hidden, channels, kernel_size, kernel_size))
        # A Gaussian matrix of these sizes and this deviation has norm about 1; constraints see to the rest.
        deviation = 1.0 / (kernel_size * (math.sqrt(channels) + math.sqrt(self.hidden)))
        nn.init.normal_(self.weight, std=deviation)
        self.bias = nn.Parameter(torch.zeros(self.hidden)) if bias else None

    def forward(self, values: Tensor) -> Tensor:
        """Takes the step."""
        hidden = functional.relu(functional.conv2d(values, self.weight, self.bias, padding=self.padding))
        return values - 2.0 * functional.conv_transpose2d(hidden, self.weight, padding=self.padding)

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"channels={self.channels}, kernel_size={self.kernel_size}, hidden={self.hidden}, "
            f"padding={self.padding}, bias={self.bias is not None}"
        )
