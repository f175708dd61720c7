"""Linear layers, on vectors and at any number of leading positions."""

from __future__ import annotations

import math

from torch import nn

from clipless_dp.norms.operators import DenseOperator, Operator, VectorOperator
from clipless_dp.rules.base import Deferred, LayerBounds, RuleContext, register_rule


@register_rule(nn.Linear)
def linear_rule(module: nn.Linear, context: RuleContext) -> LayerBounds:
    """``Y = ‖W‖X + √T‖b‖``, ``K = ‖W‖``, ``Δ_W = GX``, ``Δ_b = √T·G`` at T positions.

    The weight's gradient is ``Σ_t g_t x_tᵀ``, of Frobenius norm at most ``Σ‖g_t‖‖x_t‖ ≤ ‖g‖‖x‖``.
    """
    positions = math.prod(context.input_shape[:-1])
    weight, bias = DenseOperator(), VectorOperator()
    operators: dict[str, Operator] = {"weight": weight}
    gradients: dict[str, Deferred] = {"weight": lambda: context.input_norm}
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
    )
