"""Layers that cap each sample's gradient of their own parameters, inside their own backward.

The cotangent that flows on to earlier layers is the ordinary one. Weight and bias are gated one by one, because the
tracker and the noise account for one parameter at a time: a joint cap would be charged to both.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.arithmetic import FLOOR_SHARE, checked_cap, zeroed_rows
from clipless_dp.gates.gradient import (
    bias_gradient,
    convolution_operator,
    convolution_weight_gradient,
    token_operator,
    token_weight_gradient,
    vector_weight_gradient,
)
from clipless_dp.gates.signal import GateMode

Gate = tuple[float, float]
"""The cap ``c``, and the norm ``n`` below which a gradient is scaled by ``c/n`` only (``n = c``: clipping)."""


class _GatedLinear(torch.autograd.Function):
    """A linear layer whose parameters' gradients are gated; the input's is the ordinary one."""

    @staticmethod
    def forward(values: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate, bias_gate: Gate, chunk: int) -> Tensor:
        return functional.linear(values, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weight, _, ctx.gate, ctx.bias_gate, ctx.chunk = inputs
        ctx.save_for_backward(values, weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        values, weight = ctx.saved_tensors
        passed = cotangents @ weight if ctx.needs_input_grad[0] else None
        of_weight, of_bias = None, None
        if values.dim() == 2:
            arrived, sizes = zeroed_rows(cotangents)
            if ctx.needs_input_grad[1]:
                met, lengths = zeroed_rows(values)
                of_weight = vector_weight_gradient(met, arrived, lengths, sizes, *ctx.gate)
            if ctx.needs_input_grad[2]:
                of_bias = bias_gradient(arrived, sizes, *ctx.bias_gate)
        else:
            tokens, arrived = values.flatten(1, -2), cotangents.flatten(1, -2)
            if ctx.needs_input_grad[1]:
                gated: Any = token_operator if torch.compiler.is_compiling() else token_weight_gradient
                of_weight = gated(tokens, arrived, *ctx.gate, ctx.chunk)
            if ctx.needs_input_grad[2]:
                of_bias = bias_gradient(*zeroed_rows(arrived.mT), *ctx.bias_gate)
        return passed, of_weight, of_bias, None, None, None


class _GatedConvolution(torch.autograd.Function):
    """A convolution, or a transposed one, whose parameters' gradients are gated; the input's is the ordinary one."""

    @staticmethod
    def forward(
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        transposed: bool,
        output_padding: tuple[int, ...],
        groups: int,
        gate: Gate,
        bias_gate: Gate,
        chunk: int,
    ) -> Tensor:
        return torch.ops.aten.convolution(  # type: ignore[no-any-return]
            values, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weight, _, *ctx.geometry, ctx.gate, ctx.bias_gate, ctx.chunk = inputs
        ctx.save_for_backward(values, weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        values, weight = ctx.saved_tensors
        stride, padding, dilation, transposed, _, groups = ctx.geometry
        passed, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            passed = torch.ops.aten.convolution_backward(
                cotangents, values, weight, None, *ctx.geometry, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            # In a transposed convolution the windows are the output's, and the input says what they are multiplied by.
            seen, met = (cotangents, values) if transposed else (values, cotangents)
            flat = values.dim() == 3
            gated: Any = convolution_operator if torch.compiler.is_compiling() else convolution_weight_gradient
            of_weight = gated(
                seen.unsqueeze(2) if flat else seen,
                met.unsqueeze(2) if flat else met,
                [1] * flat + list(weight.shape[2:]),
                [1] * flat + list(stride),
                [0] * flat + list(padding),
                [1] * flat + list(dilation),
                groups,
                *ctx.gate,
                ctx.chunk,
            ).reshape(weight.shape)
        if ctx.needs_input_grad[2]:
            of_bias = bias_gradient(*zeroed_rows(cotangents.flatten(2)), *ctx.bias_gate)
        return passed, of_weight, of_bias, *([None] * 9)


class GradientGated:
    """What the gated layers have in common: the gate's settings.

    Attributes:
        limit: the cap ``c`` of the weight's per-sample gradient.
        bias_limit: the cap of the bias's.
        mode: ``"clip"``: ``G·min(1, c/‖G‖)``; ``"normalize"``: ``G·c/max(‖G‖, floor)``.
        floor: for ``"normalize"``, as a share of the cap.
        chunk: samples whose gradients of this layer's weight are formed at once; 0: as many as fit a small memory.
    """

    limit: float
    bias_limit: float
    mode: GateMode
    floor: float
    chunk: int

    def set_gate(
        self,
        limit: float,
        *,
        bias_limit: float | None = None,
        mode: GateMode = "normalize",
        floor: float = FLOOR_SHARE,
        chunk: int | None = None,
    ) -> None:
        """Sets and checks the gate.

        Args:
            limit: the cap of the weight's per-sample gradient, at least 1e-8.
            bias_limit: the cap of the bias's; by default the same.
            mode: ``"clip"`` or ``"normalize"``.
            floor: for ``"normalize"``, the share of the cap below which a gradient is scaled by ``1/floor`` only.
            chunk: samples at once, at least 1; by default as many as fit into a few megabytes.

        Raises:
            ConfigurationError: a value is out of range.
        """
        if mode not in ("clip", "normalize"):
            raise ConfigurationError(f"mode must be 'clip' or 'normalize', got {mode!r}")
        if not (isinstance(floor, (int, float)) and 1e-8 <= floor <= 1.0):
            raise ConfigurationError(f"floor is a share of the cap, from 1e-8 to 1, got {floor!r}")
        if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
            raise ConfigurationError(f"chunk must be a positive number of samples, got {chunk!r}")
        self.limit = checked_cap("limit", limit)
        self.bias_limit = self.limit if bias_limit is None else checked_cap("bias_limit", bias_limit)
        self.mode = mode
        self.floor = float(floor)
        self.chunk = chunk or 0

    def gates(self) -> tuple[Gate, Gate]:
        """Weight's and bias's cap, each with the norm below which nothing is scaled further up."""
        share = self.floor if self.mode == "normalize" else 1.0
        return (self.limit, max(share * self.limit, 1e-8)), (self.bias_limit, max(share * self.bias_limit, 1e-8))

    def gate_repr(self) -> str:
        """The gate's settings."""
        return f"limit={self.limit:g}, bias_limit={self.bias_limit:g}, mode={self.mode!r}"


class GradientGatedLinear(GradientGated, nn.Linear):
    """``nn.Linear`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        output: Tensor = _GatedLinear.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, *self.gates(), self.chunk
        )
        return output

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"


class _GradientGatedConvolution(GradientGated):
    def forward(self, input: Tensor) -> Tensor:
        """As torch's own layer."""
        layer = cast(nn.Conv2d, self)
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            input = functional.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(layer.kernel_size)
        return _convolve(layer, input, padding, layer.output_padding)

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"  # type: ignore[misc]


class _GradientGatedTransposed(GradientGated):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As torch's own layer."""
        layer = cast(nn.ConvTranspose2d, self)
        settings = layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation
        extra = layer._output_padding(input, output_size, *settings)  # type: ignore[arg-type]
        return _convolve(layer, input, cast("tuple[int, ...]", layer.padding), tuple(extra))

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"  # type: ignore[misc]


def _convolve(layer: Any, values: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...]) -> Tensor:
    geometry = layer.stride, padding, layer.dilation, layer.transposed, output_padding, layer.groups
    output: Tensor = _GatedConvolution.apply(  # type: ignore[no-untyped-call]
        values, layer.weight, layer.bias, *geometry, *layer.gates(), layer.chunk
    )
    return output


class GradientGatedConv1d(_GradientGatedConvolution, nn.Conv1d):
    """``nn.Conv1d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


class GradientGatedConv2d(_GradientGatedConvolution, nn.Conv2d):
    """``nn.Conv2d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


class GradientGatedConvTranspose1d(_GradientGatedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


class GradientGatedConvTranspose2d(_GradientGatedTransposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


_GATED: dict[type[nn.Module], type[GradientGated]] = {
    nn.Linear: GradientGatedLinear,
    nn.Conv1d: GradientGatedConv1d,
    nn.Conv2d: GradientGatedConv2d,
    nn.ConvTranspose1d: GradientGatedConvTranspose1d,
    nn.ConvTranspose2d: GradientGatedConvTranspose2d,
}
_GATED.update({kind: kind for kind in list(_GATED.values())})  # type: ignore[misc]


def can_be_gradient_gated(layer: nn.Module) -> bool:
    """Whether there is a gated form of a layer's exact type."""
    return type(layer) in _GATED


def gradient_gated_layer(layer: nn.Module, limit: float, **settings: Any) -> nn.Module:
    """The gated form of a layer, with the very same parameters.

    Args:
        layer: a linear layer, a convolution or a transposed one.
        limit: and ``settings``: as for :meth:`GradientGated.set_gate`.

    Raises:
        ConfigurationError: there is no gated form, or a value is out of range.
    """
    if not can_be_gradient_gated(layer):
        raise ConfigurationError(f"{type(layer).__name__} has no gated form: only linear layers and convolutions do")
    kind = _GATED[type(layer)]
    gated = cast(Any, kind).__new__(kind)
    gated.__dict__.update(layer.__dict__)
    gated.set_gate(limit, **settings)
    return cast(nn.Module, gated)
