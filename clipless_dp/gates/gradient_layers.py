"""Layers that cap each sample's gradient of their own parameters, inside their own backward.

The cotangent that flows on to earlier layers is the ordinary one. Weight and bias are gated one by one, or together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.gates.adaptive import Adapting, AdaptiveLimit, adapting, set_adapting
from clipless_dp.gates.arithmetic import FLOOR_SHARE, checked_cap, zeroed_rows
from clipless_dp.gates.convolutions import Kernel, convolution_operator, convolution_weight_gradient
from clipless_dp.gates.gradient import (
    bias_gradient,
    token_operator,
    token_weight_gradient,
    vector_weight_gradient,
)
from clipless_dp.gates.parts import Part, Rows, gated_pair, linear_parts
from clipless_dp.gates.row_weights import weights_of
from clipless_dp.gates.signal import GateMode

Gate = tuple[float, float]
"""The cap ``c``, and the norm ``n`` below which a gradient is scaled by ``c/n`` only (``n = c``: clipping)."""


def _gates_of(ctx: Any) -> tuple[Gate, Gate]:
    return ctx.gate, ctx.bias_gate


class _GatedLinear(torch.autograd.Function):
    """A linear layer whose parameters' gradients are gated; the input's is the ordinary one."""

    @staticmethod
    def forward(
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate,
        bias_gate: Gate,
        chunk: int,
        joint: bool,
        weights: Tensor | None,
        *counters: Tensor | None,
    ) -> Tensor:
        return functional.linear(values, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weight, _, ctx.gate, ctx.bias_gate, ctx.chunk, ctx.joint, ctx.weights, *_ = inputs
        ctx.save_for_backward(values, weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        values, weight = ctx.saved_tensors
        gate, bias_gate = _gates_of(ctx)
        passed = cotangents @ weight if ctx.needs_input_grad[0] else None
        of_weight, of_bias = None, None
        counted = ctx.needs_input_grad[8:]
        if ctx.joint or any(counted):
            parts = linear_parts(
                values if ctx.needs_input_grad[1] else None, cotangents, bias=ctx.needs_input_grad[2], chunk=ctx.chunk
            )
            sums, counts = gated_pair(parts, (gate, bias_gate), joint=ctx.joint, counted=counted)
            return passed, *sums, *([None] * 5), *counts
        if values.dim() == 2:
            arrived, sizes = zeroed_rows(cotangents)
            if ctx.needs_input_grad[1]:
                met, lengths = zeroed_rows(values)
                of_weight = vector_weight_gradient(met, arrived, lengths, sizes, *gate, weights=ctx.weights)
            if ctx.needs_input_grad[2]:
                of_bias = bias_gradient(arrived, sizes, *bias_gate, weights=ctx.weights)
        else:
            tokens, arrived = values.flatten(1, -2), cotangents.flatten(1, -2)
            if ctx.needs_input_grad[1]:
                if torch.compiler.is_compiling():
                    of_weight = token_operator(tokens, arrived, *gate, ctx.chunk)
                else:
                    of_weight = token_weight_gradient(tokens, arrived, *gate, chunk=ctx.chunk, weights=ctx.weights)
            if ctx.needs_input_grad[2]:
                of_bias = bias_gradient(*zeroed_rows(arrived.mT), *bias_gate, weights=ctx.weights)
        return passed, of_weight, of_bias, *([None] * 7)


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
        joint: bool,
        weights: Tensor | None,
        *counters: Tensor | None,
    ) -> Tensor:
        return torch.ops.aten.convolution(  # type: ignore[no-any-return]
            values, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weight, _, *ctx.geometry, ctx.gate, ctx.bias_gate, ctx.chunk, ctx.joint, ctx.weights, _, _ = inputs
        ctx.save_for_backward(values, weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        values, weight = ctx.saved_tensors
        gate, bias_gate = _gates_of(ctx)
        stride, padding, dilation, transposed, _, groups = ctx.geometry
        passed, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[0]:
            passed = torch.ops.aten.convolution_backward(
                cotangents, values, weight, None, *ctx.geometry, [True, False, False]
            )[0]
        counted = ctx.needs_input_grad[14:]
        if ctx.joint or any(counted):
            parts = _convolution_parts(ctx, values, weight, cotangents)
            sums, counts = gated_pair(parts, (gate, bias_gate), joint=ctx.joint, counted=counted)
            return passed, *sums, *([None] * 11), *counts
        if ctx.needs_input_grad[1]:
            # In a transposed convolution the windows are the output's, and the input says what they are multiplied by.
            seen, met = (cotangents, values) if transposed else (values, cotangents)
            flat = values.dim() == 3
            compiled = torch.compiler.is_compiling()
            gated: Any = convolution_operator if compiled else convolution_weight_gradient
            of_weight = gated(
                seen.unsqueeze(2) if flat else seen,
                met.unsqueeze(2) if flat else met,
                [1] * flat + list(weight.shape[2:]),
                [1] * flat + list(stride),
                [0] * flat + list(padding),
                [1] * flat + list(dilation),
                groups,
                *gate,
                ctx.chunk,
                *([] if compiled else [ctx.weights]),
            ).reshape(weight.shape)
        if ctx.needs_input_grad[2]:
            of_bias = bias_gradient(*zeroed_rows(cotangents.flatten(2)), *bias_gate, weights=ctx.weights)
        return passed, of_weight, of_bias, *([None] * 13)


def applied(function: Any, *given: Any) -> Tensor:
    """What a function with gates makes; a compiler traces none of those that no gradient comes back through.

    Args:
        function: of autograd.
        given: all that it takes, none left to a default.
    """
    output: Tensor
    if torch.compiler.is_compiling():
        trains = any(isinstance(value, Tensor) and value.requires_grad for value in given)
        output = (function.apply if trains and torch.is_grad_enabled() else function.forward)(*given)
    elif torch._C._are_functorch_transforms_active():
        output = function.apply(*given)
    else:
        # torch's own would bind what is given to a signature first, at each call.
        output = super(torch.autograd.Function, function).apply(*given)
    return output


def _of_rows(layer: GradientGated, rows: Tensor) -> tuple[Tensor | None, ...]:
    """The weights of rows that a layer meets, and what its gates leave their counts in."""
    weights = None if torch.compiler.is_compiling() else weights_of(rows)
    if weights is not None and not takes_row_weights(cast(nn.Module, layer)):
        raise PrivacyError("the gates of this layer take no weights of rows, which a person has whose rows come in")
    return weights, *layer.counters()


def takes_row_weights(layer: nn.Module) -> bool:
    """Whether all gradients of a layer's parameters are multiplied by the weights of rows, see :mod:`.row_weights`."""
    return type(layer) in _WEIGHING and not (layer.joint or layer.adaptive)


def _convolution_parts(ctx: Any, values: Tensor, weight: Tensor, cotangents: Tensor) -> tuple[Part | None, Part | None]:
    stride, padding, dilation, transposed, _, groups = ctx.geometry
    of_weight: Part | None = None
    of_bias: Part | None = None
    if ctx.needs_input_grad[1]:
        seen, met = (cotangents, values) if transposed else (values, cotangents)
        of_weight = Kernel(seen, met, weight.shape[2:], stride, padding, dilation, groups, ctx.chunk)
        # Nothing came back where no cotangent did, whatever the values are.
        of_weight.present = zeroed_rows(cotangents)[1]
    if ctx.needs_input_grad[2]:
        arrived, sizes = zeroed_rows(cotangents.flatten(2))
        of_bias = Rows(arrived.sum(2), (arrived.shape[1],), sizes)
    return of_weight, of_bias


class GradientGated:
    """What the gated layers have in common: the gate's settings.

    Attributes:
        limit: the cap ``c`` of the weight's per-sample gradient.
        bias_limit: the cap of the bias's.
        mode: ``"clip"``: ``G·min(1, c/‖G‖)``; ``"normalize"``: ``G·c/max(‖G‖, floor)``.
        floor: for ``"normalize"``, as a share of the cap.
        chunk: samples whose gradients of this layer's weight are formed at once; 0: as many as fit a small memory.
        joint: whether one cap, ``limit``, holds for the gradients of weight and bias together.
        adaptive: how the caps adapt, as :class:`AdaptiveLimit` has it; empty where they do not.
    """

    joint: bool = False
    adaptive: tuple[float, ...] = ()
    limit: float
    bias_limit: float
    mode: GateMode
    floor: float
    chunk: int

    def set_gate(
        self,
        limit: float | AdaptiveLimit,
        *,
        bias_limit: float | None = None,
        mode: GateMode = "normalize",
        floor: float = FLOOR_SHARE,
        chunk: int | None = None,
        joint: Literal["layer"] | None = None,
    ) -> None:
        """Sets and checks the gate.

        Args:
            limit: the cap of the weight's per-sample gradient, at least 1e-8; or how it adapts.
            bias_limit: the cap of the bias's; by default the same. Of caps that adapt, the first one.
            mode: ``"clip"`` or ``"normalize"``.
            floor: for ``"normalize"``, the share of the cap below which a gradient is scaled by ``1/floor`` only.
            chunk: samples at once, at least 1; by default as many as fit into a few megabytes.
            joint: ``"layer"``: one cap for both together.

        Raises:
            ConfigurationError: a value is out of range.
        """
        if mode not in ("clip", "normalize"):
            raise ConfigurationError(f"mode must be 'clip' or 'normalize', got {mode!r}")
        if not (isinstance(floor, (int, float)) and 1e-8 <= floor <= 1.0):
            raise ConfigurationError(f"floor is a share of the cap, from 1e-8 to 1, got {floor!r}")
        if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
            raise ConfigurationError(f"chunk must be a positive number of samples, got {chunk!r}")
        if joint not in (None, "layer") or (joint is not None and bias_limit is not None):
            raise ConfigurationError(
                "a layer's joint is 'layer' or None, and 'layer' takes no bias_limit: one cap is for weight and bias"
            )
        adaptive = limit if isinstance(limit, AdaptiveLimit) else None
        self.limit = checked_cap("limit", limit if adaptive is None else adaptive.start)  # type: ignore[arg-type]
        self.bias_limit = self.limit if bias_limit is None else checked_cap("bias_limit", bias_limit)
        self.joint = joint is not None
        layer = cast(nn.Module, self)
        starts = {"layer": self.limit} if self.joint else {"weight": self.limit, "bias": self.bias_limit}
        if not self.joint and getattr(layer, "bias", None) is None:
            del starts["bias"]
        caps = None if adaptive is None else Adapting(adaptive, starts)
        self.adaptive = () if caps is None else caps.settings
        set_adapting(layer, caps)
        self.mode = mode
        self.floor = float(floor)
        self.chunk = chunk or 0

    def gates(self) -> tuple[Gate, Gate]:
        """Weight's and bias's cap, each with the norm below which nothing is scaled further up."""
        share = self.floor if self.mode == "normalize" else 1.0
        limit, bias_limit = self.caps()
        return (limit, max(share * limit, 1e-8)), (bias_limit, max(share * bias_limit, 1e-8))

    def caps(self) -> tuple[float, float]:
        """Weight's and bias's cap as they are now; of a joint one it is twice the same."""
        found = adapting(cast(nn.Module, self))
        if found is None:
            return self.limit, self.limit if self.joint else self.bias_limit
        if self.joint:
            return found.caps["layer"], found.caps["layer"]
        return found.caps["weight"], found.caps.get("bias", self.bias_limit)

    def counters(self) -> Sequence[Tensor | None]:
        """What the gates of weight and bias leave their counts in, where they count."""
        found = adapting(cast(nn.Module, self))
        known = {} if found is None else found.counters()
        if "layer" in known:
            return known["layer"], known["layer"]
        return known.get("weight"), known.get("bias")

    def gate_repr(self) -> str:
        """The gate's settings."""
        limit, bias_limit = self.caps()
        how = ("joint, " if self.joint else "") + ("adaptive, " if self.adaptive else "")
        return f"{how}limit={limit:g}, bias_limit={bias_limit:g}, mode={self.mode!r}"


class GradientGatedLinear(GradientGated, nn.Linear):
    """``nn.Linear`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return applied(
            _GatedLinear, input, self.weight, self.bias, *self.gates(), self.chunk, self.joint, *_of_rows(self, input)
        )

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"


class _GradientGatedConvolution(GradientGated):
    def forward(self, input: Tensor) -> Tensor:
        """As torch's own layer."""
        return self.with_weight(input, cast(nn.Conv2d, self).weight)

    def with_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        """The same with a weight in place of the layer's own, in another order in memory for one."""
        layer = cast(nn.Conv2d, self)
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            input = functional.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(layer.kernel_size)
        return _convolve(layer, input, weight, padding, layer.output_padding)

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"  # type: ignore[misc]


class _GradientGatedTransposed(GradientGated):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As torch's own layer."""
        layer = cast(nn.ConvTranspose2d, self)
        settings = layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation
        extra = layer._output_padding(input, output_size, *settings)  # type: ignore[arg-type]
        return _convolve(layer, input, layer.weight, cast("tuple[int, ...]", layer.padding), tuple(extra))

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"  # type: ignore[misc]


def _convolve(
    layer: Any, values: Tensor, weight: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...]
) -> Tensor:
    geometry = layer.stride, padding, layer.dilation, layer.transposed, output_padding, layer.groups
    gates = *layer.gates(), layer.chunk, layer.joint, *_of_rows(layer, values)
    return applied(_GatedConvolution, values, weight, layer.bias, *geometry, *gates)


class GradientGatedConv1d(_GradientGatedConvolution, nn.Conv1d):
    """``nn.Conv1d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


class GradientGatedConv2d(_GradientGatedConvolution, nn.Conv2d):
    """``nn.Conv2d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


class GradientGatedConvTranspose1d(_GradientGatedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


class GradientGatedConvTranspose2d(_GradientGatedTransposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""


_WEIGHING = (
    GradientGatedLinear,
    GradientGatedConv1d,
    GradientGatedConv2d,
    GradientGatedConvTranspose1d,
    GradientGatedConvTranspose2d,
)

_GATED: dict[type[nn.Module], type[GradientGated]] = {}
UNGATED: dict[type[nn.Module], type[nn.Module]] = {}
"""The layer's own type of each gated form."""


def register_gated_form(kind: type[nn.Module], gated: type[GradientGated]) -> None:
    """Says which type is the gated form of a layer's type: the same parameters, attributes and values.

    Args:
        kind: the layer's own type, exactly.
        gated: a subclass of it, and of :class:`GradientGated`.
    """
    _GATED[kind] = gated
    _GATED[gated] = gated  # type: ignore[index]
    UNGATED[gated] = kind  # type: ignore[index]


register_gated_form(nn.Linear, GradientGatedLinear)
register_gated_form(nn.Conv1d, GradientGatedConv1d)
register_gated_form(nn.Conv2d, GradientGatedConv2d)
register_gated_form(nn.ConvTranspose1d, GradientGatedConvTranspose1d)
register_gated_form(nn.ConvTranspose2d, GradientGatedConvTranspose2d)


def can_be_gradient_gated(layer: nn.Module) -> bool:
    """Whether there is a gated form of a layer's exact type."""
    return type(layer) in _GATED


def gradient_gated_layer(layer: nn.Module, limit: float | AdaptiveLimit, **settings: Any) -> nn.Module:
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
    # Of the layer without gates.
    gated.__dict__.pop("_compiled_call_impl", None)
    gated.set_gate(limit, **settings)
    return cast(nn.Module, gated)
