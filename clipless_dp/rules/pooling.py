"""Pooling over windows, overlapping or not, and padding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from clipless_dp.layers import (
    AdaptiveL2NormPool1d,
    AdaptiveL2NormPool2d,
    L2NormPool1d,
    L2NormPool2d,
    ScaledAvgPool2d,
    SymmetricPad1d,
    SymmetricPad2d,
)
from clipless_dp.layers.pooling import adaptive_windows
from clipless_dp.norms import coverage
from clipless_dp.rules.base import (
    LARGEST,
    LayerBounds,
    RuleContext,
    RuleError,
    register_function_rule,
    register_rule,
    value_of,
)

_NAMES = {1: "length", 2: "height, width", 3: "depth, height, width"}
_MAXIMA = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def _require_maps(context: RuleContext, axes: int) -> tuple[int, ...]:
    if len(context.input_shape) != axes + 1:
        raise RuleError(f"needs inputs (batch, channels, {_NAMES[axes]}), got {context.input_shape} per sample")
    return context.input_shape[1:]


def _stretched(context: RuleContext, constant: float, windows: int | None) -> LayerBounds:
    return LayerBounds(output_norm=lambda: constant * context.input_norm, lipschitz=constant, coverage=windows)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """One number for each axis; torch takes a tuple of one for all."""
    entries = (value,) if isinstance(value, int) else tuple(value)
    return entries * axes if len(entries) == 1 else entries


def _window_bounds(
    context: RuleContext, axes: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> LayerBounds:
    windows = coverage(
        _require_maps(context, axes),
        _each(kernel, axes),
        stride=_each(stride or kernel, axes),
        padding=_each(padding, axes),
        dilation=_each(dilation, axes),
        ceil_mode=ceil_mode,
    )
    return _stretched(context, math.sqrt(windows), windows)


def _max_bounds(
    context: RuleContext, axes: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> LayerBounds:
    bounds = _window_bounds(context, axes, kernel, stride, padding, dilation, ceil_mode)
    empty = torch.zeros(1, 1, *_require_maps(context, axes))
    if not _MAXIMA[axes](empty, kernel, stride, padding, dilation, ceil_mode).isfinite().all():
        raise RuleError("a window that reads nothing but padding returns -inf; use less padding or dilation")
    # Each output is one of its window's entries.
    return replace(bounds, lipschitz_inf=1.0, output_norm_inf=lambda: context.input_norm_inf)


def _require_numbers(given: dict[str, Any]) -> None:
    """Refuses windows that the code computes from a shape, such as ``avg_pool2d(x, x.shape[2])``."""
    computed: list[fx.Node] = []
    fx.node.map_arg({name: value for name, value in given.items() if name != "input"}, computed.append)
    if computed:
        raise RuleError("its window is computed from a shape; write numbers, or adaptive_avg_pool2d(x, 1) for all")


def _linear_bounds(context: RuleContext, pool: Any, axes: int) -> LayerBounds:
    """Schur's test: for a matrix A of non-negative weights ``‖A‖² ≤ max_j (AᵀA1)_j``.

    In the maximum norm it is ``max_i (A1)_i``. A negative divisor gives all weights the other sign, of which ``AᵀA``
    keeps nothing, and ``|A1| = |A|1``. For full windows the first is the ``√N/√n_w`` of ``bounds.md``, and near
    borders it stays exact about divisors.
    """
    with torch.enable_grad():
        ones = torch.ones(1, 1, *_require_maps(context, axes), dtype=torch.float64, requires_grad=True)
        rows = pool(ones)
        (columns,) = torch.autograd.grad(rows, ones, rows.detach())
    constant = math.sqrt(float(columns.max())) * (1.0 + 1e-12)
    largest = float(rows.detach().abs().max()) * (1.0 + 1e-12)
    return replace(
        _stretched(context, constant, None),
        lipschitz_inf=largest,
        output_norm_inf=lambda: largest * context.input_norm_inf,
    )


def _axes(module: nn.Module) -> int:
    """Of torch's own names and ours: the digit at their end."""
    return int(type(module).__name__[-2])


@register_rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def max_pool_rule(module: nn.MaxPool2d, context: RuleContext) -> LayerBounds:
    """``Y = √N·X``, ``K = √N``: each output is one of its window's entries, and an entry lies in at most N windows."""
    if module.return_indices:
        raise RuleError("return_indices=True is not supported: use return_indices=False")
    settings = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
    return _max_bounds(context, _axes(module), *settings)


@register_rule(L2NormPool1d, L2NormPool2d)
def l2_norm_pool_rule(module: L2NormPool1d | L2NormPool2d, context: RuleContext) -> LayerBounds:
    """``Y = √N·X``, ``K = √N``: each window's norm is 1-Lipschitz in the window. Squares must not overflow."""
    settings = module.kernel_size, module.stride, module.padding
    return _norm_bounds(context, _window_bounds(context, _axes(module), *settings, 1, False))


@register_rule(AdaptiveL2NormPool1d, AdaptiveL2NormPool2d)
def adaptive_l2_norm_pool_rule(
    module: AdaptiveL2NormPool1d | AdaptiveL2NormPool2d, context: RuleContext
) -> LayerBounds:
    """``Y = √N·X``, ``K = √N`` with the true windows, which overlap where their number does not divide the size."""
    most = 1
    for size, made in zip(_require_maps(context, _axes(module)), module.output_size, strict=True):
        reads = [index for low, high in adaptive_windows(size, made) for index in range(low, high)]
        most *= max(map(reads.count, set(reads)))
    return _norm_bounds(context, _stretched(context, math.sqrt(most), most))


def _norm_bounds(context: RuleContext, bounds: LayerBounds) -> LayerBounds:
    def output_norm() -> float:
        bound = value_of(bounds.output_norm)
        return bound if bound < math.sqrt(LARGEST) else math.inf

    return replace(bounds, output_norm=output_norm)


AVERAGE_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
"""Torch's layers that average windows."""


@register_rule(*AVERAGE_POOLS, ScaledAvgPool2d)
def average_pool_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    """``Y = KX``, ``K = √N/√n_w``, by Schur's test on the layer itself: it is linear with weights of one sign."""
    return _linear_bounds(context, module, _axes(module))


@register_rule(
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    SymmetricPad1d,
    SymmetricPad2d,
)
def padding_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    """``Y = √M·X``, ``K = √M``, where an entry has at most M places in the padded signal: ``AᵀA`` is diagonal."""
    if getattr(module, "value", 0) != 0:
        raise RuleError("padding by another number than 0 moves every sample; pad by 0")
    return _linear_bounds(context, module, _axes(module))


@register_function_rule(
    functional.max_pool2d,
    call=lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: None,
)
def max_pool_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional max pooling."""
    _require_numbers(kwargs)
    if kwargs["return_indices"]:
        raise RuleError("return_indices=True is not supported: use return_indices=False")
    return _max_bounds(
        context,
        2,
        kwargs["kernel_size"],
        kwargs["stride"],
        kwargs["padding"],
        kwargs["dilation"],
        kwargs["ceil_mode"],
    )


def _average_call(
    input: object,
    kernel_size: object,
    stride: object = None,
    padding: object = 0,
    ceil_mode: object = False,
    count_include_pad: object = True,
    divisor_override: object = None,
) -> None:
    """What torch's function takes."""


@register_function_rule(functional.pad, call=lambda input, pad, mode="constant", value=None: None)
def padding_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional padding of signals and maps on axes that hold neither samples nor channels."""
    _require_numbers(kwargs)
    if kwargs["value"] not in (None, 0):
        raise RuleError("padding by another number than 0 moves every sample; pad by 0")
    axes = len(context.input_shape) - 1
    if axes not in _NAMES or len(kwargs["pad"]) > 2 * axes:
        raise RuleError("it pads the batch or the channels, or an input that is no signal and no map: use a pad module")
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return _linear_bounds(context, lambda ones: functional.pad(ones, **rest), axes)


@register_function_rule(functional.avg_pool2d, call=_average_call)
@register_function_rule(functional.adaptive_avg_pool2d, call=lambda input, output_size: None)
def average_pool_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional average pooling."""
    _require_numbers(kwargs)
    adaptive = context.kind == "adaptive_avg_pool2d"
    pool: Any = functional.adaptive_avg_pool2d if adaptive else functional.avg_pool2d
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return _linear_bounds(context, lambda ones: pool(ones, **rest), 2)
