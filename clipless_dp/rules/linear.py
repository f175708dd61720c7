"""Linear layers, on vectors and at any number of leading positions; and what every affine layer has in common."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from clipless_dp.norms.operators import DenseOperator, DiagonalOperator, Operator, RowSumOperator, VectorOperator
from clipless_dp.rules.base import Deferred, LayerBounds, RuleContext, register_rule


@register_rule(nn.Linear)
def linear_rule(module: nn.Linear, context: RuleContext) -> LayerBounds:
    """``Y = ‖W‖X + √T‖b‖``, ``K = ‖W‖``, ``Δ_W = GX``, ``Δ_b = √T·G`` at T positions.

    The weight's gradient is ``Σ_t g_t x_tᵀ``, of Frobenius norm at most ``Σ‖g_t‖‖x_t‖ ≤ ‖g‖‖x‖``: ``N = 1``. In the
    maximum norm ``‖W‖`` is the largest ℓ1 norm of a row: the column-sum norm of ``Wᵀ``, which cotangents meet.
    """
    bounds = affine_bounds(context, DenseOperator(), math.prod(context.input_shape[:-1]), bias=module.bias is not None)

    def stretch() -> float:
        return context.norm("weight", RowSumOperator())

    def largest() -> float:
        return stretch() * context.input_norm_inf + (context.norm("bias", DiagonalOperator()) if has_bias else 0.0)

    has_bias = module.bias is not None
    return replace(bounds, lipschitz_inf=stretch, output_norm_inf=largest)


def affine_bounds(
    context: RuleContext, weight: Operator, positions: int, *, bias: bool, coverage: int | None = None
) -> LayerBounds:
    """``Y = ‖W‖X + √P‖b‖``, ``K = ‖W‖``, ``Δ_W = √N·GX``, ``Δ_b = √P·G``.

    Args:
        context: the tracker's.
        weight: what the layer's ``weight`` acts as.
        positions: ``P``: how many outputs the bias is added to; its gradient is the sum of their cotangents.
        bias: whether there is one.
        coverage: ``N``; ``None`` for a layer without windows, which counts as 1.
    """
    windows = 1 if coverage is None else coverage
    shift = VectorOperator()
    operators: dict[str, Operator] = {"weight": weight}
    gradients: dict[str, Deferred] = {"weight": lambda: math.sqrt(windows) * context.input_norm}
    if bias:
        operators["bias"] = shift
        gradients["bias"] = math.sqrt(positions)

    def output_norm() -> float:
        shifted = math.sqrt(positions) * context.norm("bias", shift) if bias else 0.0
        return context.norm("weight", weight) * context.input_norm + shifted

    return LayerBounds(
        output_norm=output_norm,
        lipschitz=lambda: context.norm("weight", weight),
        gradients=gradients,
        operators=operators,
        coverage=coverage,
    )
