"""Gradient gates: layers that cap each sample's gradient of their own parameters, inside their own backward.

The cotangent that flows on to earlier layers is the ordinary one. Weight and bias are gated one by one, because the
tracker and the noise account for one parameter at a time: a joint cap would be charged to both.

A weight that meets one vector of each sample has the gradient ``g xᵀ``, of norm ``‖g‖‖x‖`` in closed form. A weight
that meets several (tokens, pixels) has ``Σ_t g_t x_tᵀ``, whose norm is computed for a chunk of samples at a time: from
the samples' gradients themselves, or, where a sample has few positions, from ``Σ_ts ⟨g_t, g_s⟩⟨x_t, x_s⟩``. The chunk's
scaled sum is all that is kept of it.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.signal import (
    _LARGEST_NORM,
    _LARGEST_RATIO,
    _LIFT,
    GateMode,
    _can_look,
    _checked_cap,
    _is_dense,
    _is_interleaved,
    sample_norms,
)

_CANCELLED = 1e-3
"""A sum over positions that is smaller than this share of ``‖g‖‖x‖`` counts as this large: the rest is mostly rounding,
which depends on the rest of the batch and must not be scaled to the size of a signal."""

_UNDERFLOW = 1e-16
"""Above the norm that squares can lose to underflow, ``√n·1.1e-19``, for the rows that are summed in float32."""

_CHUNK_ENTRIES = {"cpu": 1 << 20}
_CHUNK_ENTRIES_ELSEWHERE = 1 << 26
"""Entries of windows and per-sample gradients at once: 4 MiB on a CPU, elsewhere 256 MiB."""

_GRAM_GAIN = 8.0
"""Products of matrices that take as long as an entry of a per-sample gradient takes to be written and read twice."""


def _zeroed(values: Tensor, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of norm above 1e18, or without one, become zero; and the norms of the result."""
    norms = sample_norms(values) if norms is None else norms
    usable = norms <= _LARGEST_NORM
    if _can_look(values) and _is_dense(values) and bool(usable.all()):
        # What follows would return the same values, in the same order in memory.
        return values, norms
    rows = usable.reshape(-1, *([1] * (values.dim() - 1)))
    return torch.where(rows, values, torch.zeros_like(values)), torch.where(usable, norms, torch.zeros_like(norms))


def _factors(norms: Tensor, limit: float, least: float) -> Tensor:
    """``limit/max(norm, least)``; zero where the norm is not finite, or so large that the factor would lose digits."""
    factors = limit / norms.clamp(min=least)
    return torch.where(norms <= min(_LARGEST_RATIO * limit, 3e38), factors, torch.zeros_like(factors))


def _vector_weight_gradient(values: Tensor, cotangents: Tensor, sizes: Tensor, limit: float, least: float) -> Tensor:
    """The gated sum for one vector a sample: ``(B, K)`` and ``(B, O)`` of norms ``(B,)`` to ``(O, K)``."""
    values, lengths = _zeroed(values)
    factors = _factors((lengths + _UNDERFLOW) * (sizes + _UNDERFLOW), limit, least)
    return (cotangents * factors.unsqueeze(1)).t() @ values


def _bias_gradient(cotangents: Tensor, sizes: Tensor, limit: float, least: float) -> Tensor:
    """The gated sum of a bias: ``(B, O, T)`` of norms ``(B,)``, or ``(B, O)``, to ``(O,)``."""
    if cotangents.dim() == 2:
        return _factors(sizes, limit, least) @ cotangents
    gradients = cotangents.sum(2)
    return _factors(torch.maximum(sample_norms(gradients), _CANCELLED * sizes), limit, least) @ gradients


def _gated_sum(rows: Tensor, cotangents: Tensor, scales: Tensor, limit: float, least: float) -> Tensor:
    """``Σ_b factor_b·G_b`` for one chunk.

    Args:
        rows: ``(b, groups, T, K)``, what the weight meets.
        cotangents: ``(b, groups, O, T)``.
        scales: ``(b,)``, ``‖x‖‖g‖``.
        limit: the cap.
        least: the norm below which samples are not scaled further up.

    Returns:
        ``(groups, O, K)``.
    """
    batch, groups, positions, inputs = rows.shape
    outputs = cotangents.shape[2]
    if _prefers_gram(positions, inputs, outputs):
        grams = rows @ rows.mT, cotangents.mT @ cotangents
        first, second = (gram.diagonal(dim1=-2, dim2=-1).sum((1, 2)) for gram in grams)
        # What the sums of products may have lost is added: the root is then at least the true norm.
        rounding = 1.01 * (inputs + outputs + groups * positions**2 + 8) * torch.finfo(rows.dtype).eps / 2
        lost = rounding * (first + 1e-28) * (second + 1e-28)
        norms = ((grams[0] * grams[1]).sum((1, 2, 3)).clamp(min=0.0) + lost).sqrt()
        factors = _factors(torch.maximum(norms, _CANCELLED * scales), limit, least)
        scaled = (cotangents * factors.reshape(-1, 1, 1, 1)).permute(1, 2, 0, 3).reshape(groups, outputs, -1)
        return scaled @ rows.permute(1, 0, 2, 3).reshape(groups, -1, inputs)
    gradients = torch.bmm(cotangents.flatten(0, 1), rows.flatten(0, 1)).reshape(batch, groups * outputs * inputs)
    norms = torch.maximum(sample_norms(gradients), _CANCELLED * scales)
    return (_factors(norms, limit, least) @ gradients).reshape(groups, outputs, inputs)


def _prefers_gram(positions: int, inputs: int, outputs: int) -> bool:
    return 2 * positions**2 * (inputs + outputs) <= _GRAM_GAIN * inputs * outputs


def _chunk_rows(chunk: int, entries: int, device: torch.device) -> int:
    """Samples at once: as asked for, or as many as the default memory holds."""
    return chunk if chunk > 0 else max(1, _CHUNK_ENTRIES.get(device.type, _CHUNK_ENTRIES_ELSEWHERE) // entries)


def _token_weight_gradient(values: Tensor, cotangents: Tensor, limit: float, least: float, chunk: int) -> Tensor:
    """The gated sum for several vectors a sample: ``(B, T, K)`` and ``(B, T, O)`` to ``(O, K)``."""
    _, positions, inputs = values.shape
    outputs = cotangents.shape[2]
    gram = _prefers_gram(positions, inputs, outputs)
    held = 2 * positions**2 + positions * outputs if gram else inputs * outputs
    rows = _chunk_rows(chunk, held, values.device)
    values, lengths = _zeroed(values)
    cotangents, sizes = _zeroed(cotangents)
    total = values.new_zeros(1, outputs, inputs)
    for some, arriving, scales in zip(
        values.split(rows), cotangents.split(rows), (lengths * sizes).split(rows), strict=True
    ):
        total = total + _gated_sum(some.unsqueeze(1), arriving.mT.unsqueeze(1), scales, limit, least)
    return total.squeeze(0)


def _positions_last(maps: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C, H·W)``, without a copy where the maps lie in memory channels last."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2).mT if _is_interleaved(maps) else maps.flatten(2)


def _convolution_weight_gradient(
    values: Tensor,
    cotangents: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    limit: float,
    least: float,
    chunk: int,
) -> Tensor:
    """The gated sum for a convolution of maps: ``(B, C, H, W)`` and ``(B, O, h, w)`` to ``(O, C/groups, *kernel)``."""
    channels, outputs = values.shape[1], cotangents.shape[1]
    height, width = cotangents.shape[2:]
    positions, inputs = height * width, channels // groups * math.prod(kernel)
    gram = _prefers_gram(positions, inputs, outputs // groups)
    held = groups * positions * inputs + (2 * groups * positions**2 if gram else outputs * inputs)
    rows = _chunk_rows(chunk, held, values.device)
    spans = [step * (taps - 1) + 1 for step, taps in zip(dilation, kernel, strict=True)]
    values, lengths = _zeroed(values)
    cotangents, sizes = _zeroed(cotangents)
    total = values.new_zeros(groups, outputs // groups, inputs)
    for some, arriving, scales in zip(
        values.split(rows), cotangents.split(rows), (lengths * sizes).split(rows), strict=True
    ):
        # Channels last: what one row of a window reads lies together, and is copied at once.
        some = functional.pad(some.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
        windows = some.contiguous().unfold(1, spans[0], stride[0]).unfold(2, spans[1], stride[1])
        windows = windows[:, :height, :width, :, :: dilation[0], :: dilation[1]]
        # (b, h, w, C, k, k) to (b, groups, h·w, k·k·C/groups).
        windows = windows.unflatten(3, (groups, channels // groups)).permute(0, 3, 1, 2, 5, 6, 4)
        total = total + _gated_sum(
            windows.reshape(len(some), groups, positions, inputs),
            _positions_last(arriving).unflatten(1, (groups, outputs // groups)),
            scales,
            limit,
            least,
        )
    return total.reshape(outputs, *kernel, channels // groups).permute(0, 3, 1, 2).contiguous()


# Loops over chunks depend on the batch size: compiled graphs hold them as one opaque operator.
_token_operator = torch.library.custom_op(
    "clipless_dp::token_weight_gradient",
    _token_weight_gradient,
    mutates_args=(),
    schema="(Tensor values, Tensor cotangents, float limit, float least, int chunk) -> Tensor",
)
_convolution_operator = torch.library.custom_op(
    "clipless_dp::convolution_weight_gradient",
    _convolution_weight_gradient,
    mutates_args=(),
    schema=(
        "(Tensor values, Tensor cotangents, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
        "float limit, float least, int chunk) -> Tensor"
    ),
)


@_token_operator.register_fake
def _(values: Tensor, cotangents: Tensor, limit: float, least: float, chunk: int) -> Tensor:
    return values.new_empty(cotangents.shape[2], values.shape[2])


@_convolution_operator.register_fake
def _(values: Tensor, cotangents: Tensor, kernel: list[int], *settings: Any) -> Tensor:
    groups = settings[3]
    return values.new_empty(cotangents.shape[1], values.shape[1] // groups, *kernel)


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
        weight_gradient, bias_gradient = None, None
        if values.dim() == 2:
            arrived, sizes = _zeroed(cotangents)
            if ctx.needs_input_grad[1]:
                weight_gradient = _vector_weight_gradient(values, arrived, sizes, *ctx.gate)
            if ctx.needs_input_grad[2]:
                bias_gradient = _bias_gradient(arrived, sizes, *ctx.bias_gate)
        else:
            tokens, arrived = values.flatten(1, -2), cotangents.flatten(1, -2)
            if ctx.needs_input_grad[1]:
                gated: Any = _token_operator if torch.compiler.is_compiling() else _token_weight_gradient
                weight_gradient = gated(tokens, arrived, *ctx.gate, ctx.chunk)
            if ctx.needs_input_grad[2]:
                bias_gradient = _bias_gradient(*_zeroed(arrived.mT), *ctx.bias_gate)
        return passed, weight_gradient, bias_gradient, None, None, None


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
        passed, weight_gradient, bias_gradient = None, None, None
        if ctx.needs_input_grad[0]:
            passed = torch.ops.aten.convolution_backward(
                cotangents, values, weight, None, *ctx.geometry, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            # In a transposed convolution the windows are the output's, and the input says what they are multiplied by.
            seen, met = (cotangents, values) if transposed else (values, cotangents)
            flat = values.dim() == 3
            gated: Any = _convolution_operator if torch.compiler.is_compiling() else _convolution_weight_gradient
            weight_gradient = gated(
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
            bias_gradient = _bias_gradient(*_zeroed(cotangents.flatten(2)), *ctx.bias_gate)
        return passed, weight_gradient, bias_gradient, *([None] * 9)


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
        floor: float = _LIFT,
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
        self.limit = _checked_cap("limit", limit)
        self.bias_limit = self.limit if bias_limit is None else _checked_cap("bias_limit", bias_limit)
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
