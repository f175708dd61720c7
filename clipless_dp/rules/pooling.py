"""Pooling over windows, overlapping or not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from clipless_dp.layers import L2NormPool2d, ScaledAvgPool2d
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


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second


def _require_maps(context: RuleContext) -> tuple[int, int]:
    if len(context.input_shape) != 3:
        raise RuleError(f"needs inputs (batch, channels, height, width), got {context.input_shape} per sample")
    return context.input_shape[1], context.input_shape[2]


def _stretched(context: RuleContext, constant: float, windows: int | None) -> LayerBounds:
    return LayerBounds(output_norm=lambda: constant * context.input_norm, lipschitz=constant, coverage=windows)


def _window_bounds(
    context: RuleContext, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> LayerBounds:
    windows = coverage(
        _require_maps(context),
        _pair(kernel),
        stride=_pair(kernel if stride is None else stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        ceil_mode=ceil_mode,
    )
    return _stretched(context, math.sqrt(windows), windows)


def _max_bounds(
    context: RuleContext, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> LayerBounds:
    bounds = _window_bounds(context, kernel, stride, padding, dilation, ceil_mode)
    empty = torch.zeros(1, 1, *_require_maps(context))
    if not functional.max_pool2d(empty, kernel, stride, padding, dilation, ceil_mode).isfinite().all():
        raise RuleError("a window that reads nothing but padding returns -inf; use less padding or dilation")
    # Each output is one of its window's entries.
    return replace(bounds, lipschitz_inf=1.0, output_norm_inf=lambda: context.input_norm_inf)


def _require_numbers(given: dict[str, Any]) -> None:
    """Refuses windows that the code computes from a shape, such as ``avg_pool2d(x, x.shape[2])``."""
    computed: list[fx.Node] = []
    fx.node.map_arg({name: value for name, value in given.items() if name != "input"}, computed.append)
    if computed:
        raise RuleError("its window is computed from a shape; write numbers, or adaptive_avg_pool2d(x, 1) for all")


def _average_bounds(context: RuleContext, pool: Any) -> LayerBounds:
    """Schur's test: for a matrix A of non-negative weights ``‖A‖² ≤ max_j (AᵀA1)_j``.

    In the maximum norm it is ``max_i (A1)_i``. For full windows the first is the ``√N/√n_w`` of ``bounds.md``, and near
    borders it stays exact about divisors.
    """
    height, width = _require_maps(context)
    with torch.enable_grad():
        ones = torch.ones(1, 1, height, width, dtype=torch.float64, requires_grad=True)
        rows = pool(ones)
        (columns,) = torch.autograd.grad(rows, ones, rows.detach())
    constant, largest = (math.sqrt(float(columns.max())) * (1.0 + 1e-12), float(rows.detach().max()) * (1.0 + 1e-12))
    return replace(
        _stretched(context, constant, None),
        lipschitz_inf=largest,
        output_norm_inf=lambda: largest * context.input_norm_inf,
    )


@register_rule(nn.MaxPool2d)
def max_pool_rule(module: nn.MaxPool2d, context: RuleContext) -> LayerBounds:
    """``K = √N``: each output is one of its window's entries, and an entry lies in at most N windows."""
    if module.return_indices:
        raise RuleError("return_indices=True is not supported: use return_indices=False")
    return _max_bounds(context, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)


@register_rule(L2NormPool2d)
def l2_norm_pool_rule(module: L2NormPool2d, context: RuleContext) -> LayerBounds:
    """``K = √N``: each window's norm is 1-Lipschitz in the window. Squares must not overflow."""
    bounds = _window_bounds(context, module.kernel_size, module.stride, module.padding, 1, False)

    def output_norm() -> float:
        bound = value_of(bounds.output_norm)
        return bound if bound < math.sqrt(LARGEST) else math.inf

    return replace(bounds, output_norm=output_norm)


@register_rule(nn.AvgPool2d, nn.AdaptiveAvgPool2d, ScaledAvgPool2d)
def average_pool_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    """``K = √N/√n_w``, by Schur's test on the layer itself: it is linear with weights of one sign."""
    return _average_bounds(context, module)


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


@register_function_rule(functional.avg_pool2d, call=_average_call)
@register_function_rule(functional.adaptive_avg_pool2d, call=lambda input, output_size: None)
def average_pool_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional average pooling."""
    _require_numbers(kwargs)
    adaptive = context.kind == "adaptive_avg_pool2d"
    pool: Any = functional.adaptive_avg_pool2d if adaptive else functional.avg_pool2d
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return _average_bounds(context, lambda ones: pool(ones, **rest))
