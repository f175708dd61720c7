"""Convolutions on signals, maps and volumes, and transposed ones on the former two."""

from __future__ import annotations

import math

from torch import nn

from clipless_dp.norms import coverage, padded_copies
from clipless_dp.norms.operators import ConvOperator, CopyPaddedConvOperator, Sides
from clipless_dp.rules import linear
from clipless_dp.rules.base import LayerBounds, RuleContext, RuleError, register_rule

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d


def _sides(module: Convolution | TransposedConvolution) -> Sides:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        spans = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)
    assert not isinstance(module.padding, str)
    return tuple((side, side) for side in module.padding)


def _input_size(module: Convolution | TransposedConvolution, context: RuleContext) -> tuple[int, ...]:
    axes = len(module.kernel_size)
    if len(context.input_shape) != axes + 1:
        names = ("length", "height, width", "depth, height, width")[axes - 1]
        raise RuleError(f"needs inputs (batch, channels, {names}), got {context.input_shape} per sample")
    return context.input_shape[1:]


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution_rule(module: Convolution, context: RuleContext) -> LayerBounds:
    """``Y = ‖conv‖X + √P‖b‖``, ``K = ‖conv‖``, ``Δ_W = √N·GX``, ``Δ_b = √P·G``, P output positions, coverage N.

    Circular padding: the slice of the gradient at offset τ is ``Σ_p g(p) x(sp+τ)ᵀ`` with indices on the torus, and
    N counts each pixel as often as a window or a copy of the pixel in the padding reads it.

    Reflecting and replicating padding: the same N. The layer is ``conv∘pad``, and padding, a matrix of one 1 in each
    row, has the norm ``√M`` for the most places M that a pixel has: ``‖conv‖ ≤ √M·‖conv on the padded map‖``.
    """
    input_size, padding = _input_size(module, context), _sides(module)
    if module.padding_mode == "circular" and len(input_size) == 3:
        raise RuleError("padding_mode='circular' has no certified norm over volumes; use 'zeros' or 'replicate'")
    # Lists, which torch takes as well, could not be looked up.
    stride, dilation = tuple(module.stride), tuple(module.dilation)
    windows = coverage(
        input_size,
        module.kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=module.padding_mode,
    )
    if module.padding_mode == "reflect" or module.padding_mode == "replicate":
        padded = tuple(size + low + high for size, (low, high) in zip(input_size, padding, strict=True))
        none = ((0, 0),) * len(padded)
        copies = padded_copies(input_size, padding, module.padding_mode)
        copied = CopyPaddedConvOperator(padded, stride, none, dilation, module.groups, windows, copies=copies)
        return _bounds(module, context, copied)
    mode = module.padding_mode
    operator = ConvOperator(input_size, stride, padding, dilation, module.groups, windows, padding_mode=mode)
    return _bounds(module, context, operator)


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d)
def transposed_convolution_rule(module: TransposedConvolution, context: RuleContext) -> LayerBounds:
    """``Y = ‖conv‖X + √P‖b‖``, ``K = ‖conv‖``, ``Δ_W = √N·GX``, ``Δ_b = √P·G``, coverage N of the *output*'s pixels.

    The norm is the adjoint's.

    Input and cotangent change places: the gradient's slice at offset τ is ``Σ_p x(p) g(sp+τ)ᵀ``, of norm at most
    ``‖x‖‖g_τ‖``, and ``Σ_τ‖g_τ‖²`` counts each output pixel as often as a window reaches it, at most N times.
    Windows that start in ``output_padding`` are counted too, which can only enlarge N.
    """
    input_size, padding = _input_size(module, context), _sides(module)
    # Lists, which torch takes as well, could not be looked up.
    stride, dilation = tuple(module.stride), tuple(module.dilation)
    output_size = context.output_shape[1:]
    windows = coverage(output_size, module.kernel_size, stride=stride, padding=padding, dilation=dilation)
    # From the shapes and not from the module, because `output_size` may be given at the call.
    extra = tuple(
        made - ((size - 1) * step - low - high + spread * (taps - 1) + 1)
        for made, size, step, (low, high), spread, taps in zip(
            output_size, input_size, stride, padding, dilation, module.kernel_size, strict=True
        )
    )
    operator = ConvOperator(
        input_size,
        stride,
        padding,
        dilation,
        module.groups,
        windows,
        transposed=True,
        output_padding=extra,
    )
    return _bounds(module, context, operator)


def _bounds(module: Convolution | TransposedConvolution, context: RuleContext, weight: ConvOperator) -> LayerBounds:
    positions = math.prod(context.output_shape[1:])
    return linear.affine_bounds(context, weight, positions, bias=module.bias is not None, coverage=weight.coverage)
