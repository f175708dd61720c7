"""Residual layers that step down the gradient of a convex function: 1-Lipschitz where their weight has norm 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.gradient_layers import Gate, GradientGated, applied, register_gated_form
from clipless_dp.gates.parts import gated_pair
from clipless_dp.gates.steps import Windows, convex_step, returned, taken


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
        return convex_step(values, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"features={self.features}, hidden={self.hidden}, bias={self.bias is not None}"


class ConvexPotentialConv2d(nn.Module):
    """:class:`ConvexPotential` whose ``W`` is a convolution.

    With a stride the map keeps its size, and there are fewer hidden positions: windows that do not overlap, ``stride =
    kernel_size``, have a Δ of ``4GX`` at norm 1, where ``k × k`` windows at every pixel have ``4k·GX``. Followed by
    ``nn.PixelUnshuffle`` or :class:`ScaledAvgPool2d`, it is a strided block.

    Args:
        channels: of the input and the output.
        kernel_size: of the convolution.
        hidden: channels between; ``channels`` by default.
        padding: zeros on each side; half the kernel by default, with a stride ``(kernel_size - 1) // 2``.
        bias: whether there is a ``b``, one entry for each hidden channel.
        stride: of the convolution.

    Shape:
        ``(B, channels, H, W)`` to the same shape; ``weight`` is ``(hidden, channels, k, k)``, ``bias`` ``(hidden,)``.

    Raises:
        ConfigurationError: a size is not positive, or the padding is negative.
    """

    # Of the class, so that pickles of former versions have it, and are told as what is made now.
    stride = 1
    __constants__ = ("stride",)

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        hidden: int | None = None,
        *,
        padding: int | None = None,
        bias: bool = True,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = channels if hidden is None else hidden
        self.kernel_size = kernel_size
        if stride != 1:
            self.stride = stride
        default = kernel_size // 2 if stride == 1 else (kernel_size - 1) // 2
        self.padding = default if padding is None else padding
        if min(self.channels, self.hidden, kernel_size, stride) < 1 or self.padding < 0:
            raise ConfigurationError(
                f"sizes must be positive and padding at least 0, got channels={channels}, hidden={hidden}, "
                f"kernel_size={kernel_size}, padding={padding}, stride={stride}"
            )
        self.weight = nn.Parameter(torch.empty(self.hidden, channels, kernel_size, kernel_size))
        # A Gaussian matrix of these sizes and this deviation has norm about 1; constraints see to the rest.
        deviation = 1.0 / (kernel_size * (math.sqrt(channels) + math.sqrt(self.hidden)))
        nn.init.normal_(self.weight, std=deviation)
        self.bias = nn.Parameter(torch.zeros(self.hidden)) if bias else None

    def forward(self, values: Tensor) -> Tensor:
        """Takes the step."""
        return convex_step(values, self.weight, self.bias, (self.padding, self.stride))

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"channels={self.channels}, kernel_size={self.kernel_size}, hidden={self.hidden}, "
            f"padding={self.padding}, bias={self.bias is not None}"
            + (f", stride={self.stride}" if self.stride > 1 else "")
        )


class _GatedStep(torch.autograd.Function):
    """A step whose weight's and bias's gradients are gated; the input's is the ordinary one."""

    @staticmethod
    def forward(
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        windows: Windows | None,
        gate: Gate,
        bias_gate: Gate,
        chunk: int,
        joint: bool,
        *counters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return taken(values, weight, bias, windows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values, weight, bias, ctx.windows, ctx.gate, ctx.bias_gate, ctx.chunk, ctx.joint, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(values, weight, bias, output[1])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangents = arriving[0]
        if cotangents is None:
            return (None,) * 10
        wants = ctx.needs_input_grad[:3]
        values, weight, bias, hidden = ctx.saved_tensors
        passed, *parts = returned(values, weight, bias, hidden, cotangents, ctx.windows, ctx.chunk, wants)
        gates = ctx.gate, ctx.bias_gate
        sums, counts = gated_pair((parts[0], parts[1]), gates, joint=ctx.joint, counted=ctx.needs_input_grad[8:])
        return passed, *sums, *([None] * 5), *counts


def _gated_step(layer: Any, values: Tensor, windows: Windows | None) -> Tensor:
    gates = *layer.gates(), layer.chunk, layer.joint, *layer.counters()
    made: Any = applied(_GatedStep, values, layer.weight, layer.bias, windows, *gates)
    output: Tensor = made[0]
    return output


class GradientGatedConvexPotential(GradientGated, ConvexPotential):
    """:class:`ConvexPotential` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""

    def forward(self, values: Tensor) -> Tensor:
        """As the plain layer."""
        return _gated_step(self, values, None)

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"


class GradientGatedConvexPotentialConv2d(GradientGated, ConvexPotentialConv2d):
    """:class:`ConvexPotentialConv2d` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""

    def forward(self, values: Tensor) -> Tensor:
        """As the plain layer."""
        return _gated_step(self, values, (self.padding, self.stride))

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"


register_gated_form(ConvexPotential, GradientGatedConvexPotential)
register_gated_form(ConvexPotentialConv2d, GradientGatedConvexPotentialConv2d)
