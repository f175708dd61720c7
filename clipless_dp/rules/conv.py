"""Convolutions."""

from __future__ import annotations

import math

from torch import nn

from clipless_dp.norms import coverage
from clipless_dp.norms.operators import Conv2dOperator, Operator, Sides, VectorOperator
from clipless_dp.rules.base import Deferred, LayerBounds, RuleContext, RuleError, register_rule


def _sides(module: nn.Conv2d) -> Sides:
    if module.padding == "valid":
        return ((0, 0), (0, 0))
    if module.padding == "same":
        spans = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
        return ((spans[0] // 2, spans[0] - spans[0] // 2), (spans[1] // 2, spans[1] - spans[1] // 2))
    assert not isinstance(module.padding, str)
    rows, columns = module.padding
    return ((rows, rows), (columns, columns))


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    first, second = values
    return first, second


@register_rule(nn.Conv2d)
def conv2d_rule(module: nn.Conv2d, context: RuleContext) -> LayerBounds:
    """``Y = ‖conv‖X + √P‖b‖``, ``K = ‖conv‖``, ``Δ_W = √N·GX``, ``Δ_b = √P·G``, P output positions, coverage N."""
    if module.padding_mode != "zeros":
        raise RuleError(f"padding_mode={module.padding_mode!r} is not supported: use padding_mode='zeros'")
    if len(context.input_shape) != 3:
        raise RuleError(f"needs inputs (batch, channels, height, width), got {context.input_shape} per sample")
    input_size = _pair(context.input_shape[1:])
    kernel_size, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
    padding = _sides(module)
    windows = coverage(input_size, kernel_size, stride=stride, padding=padding, dilation=dilation)
    positions = math.prod(context.output_shape[1:])
    weight = Conv2dOperator(input_size, stride, padding, dilation, module.groups, windows)
    bias = VectorOperator()
    operators: dict[str, Operator] = {"weight": weight}
    gradients: dict[str, Deferred] = {"weight": lambda: math.sqrt(windows) * context.input_norm}
    if module.bias is not None:
        operators["bias"] = bias
        gradients["bias"] = math.sqrt(positions)

    def output_norm() -> float:
        shift = math.sqrt(positions) * context.norm("bias", bias) if module.bias is not None else 0.0
        return context.norm("weight", weight) * context.input_norm + shift

    return LayerBounds(
        output_norm=output_norm,
        lipschitz=lambda: context.norm("weight", weight),
        gradients=gradients,
        operators=operators,
        coverage=windows,
    )
