"""Structured linear layers and diagonals."""

from __future__ import annotations

import math

from clipless_dp.layers import Diagonal, GradientGatedDiagonal, GradientGatedStructuredLinear, StructuredLinear
from clipless_dp.norms.operators import DiagonalOperator
from clipless_dp.rules.base import LayerBounds, RuleContext, RuleError, register_rule
from clipless_dp.rules.gates import capped
from clipless_dp.rules.linear import affine_bounds


@register_rule(StructuredLinear)
def structured_linear_rule(module: StructuredLinear, context: RuleContext) -> LayerBounds:
    """``Y = ‖W‖X + √T‖b‖``, ``K = ‖W‖``, ``Δ_W = GX``, ``Δ_b = √T·G`` at T positions, ``‖W‖`` of the structure.

    ``W = Σ θ_m B_m`` with orthonormal ``B_m``: ``∂/∂θ_m = ⟨B_m, M⟩`` with ``M = Σ_t g_t x_tᵀ`` are the coordinates of
    ``M``'s orthogonal projection on the span of the ``B_m``, so their norm is at most ``‖M‖_F ≤ Σ‖g_t‖‖x_t‖ ≤ GX``.
    """
    positions = math.prod(context.input_shape[:-1])
    return affine_bounds(context, module.operator(), positions, bias=module.bias is not None)


@register_rule(Diagonal)
def diagonal_rule(module: Diagonal, context: RuleContext) -> LayerBounds:
    """``Y = max|d|·X + √T‖b‖``, ``K = max|d|``, ``Δ_d = GX``, ``Δ_b = √T·G``.

    As a structured layer: matrices of a single entry on the diagonal are orthonormal.
    """
    if context.input_shape[-1:] != (module.features,):
        raise RuleError(f"needs {module.features} entries on the last axis, got {context.input_shape} per sample")
    positions = math.prod(context.input_shape[:-1])
    return affine_bounds(context, DiagonalOperator(), positions, bias=module.bias is not None)


@register_rule(GradientGatedStructuredLinear)
def gradient_gated_structured_rule(module: GradientGatedStructuredLinear, context: RuleContext) -> LayerBounds:
    """``Y = ‖W‖X + √T‖b‖``, ``K = ‖W‖``, ``Δ = c``.

    As the plain layer; the gradients themselves have the gates' caps.
    """
    return capped(structured_linear_rule(module, context), module, module.weight, module.bias, context)


@register_rule(GradientGatedDiagonal)
def gradient_gated_diagonal_rule(module: GradientGatedDiagonal, context: RuleContext) -> LayerBounds:
    """``Y = max|d|·X + √T‖b‖``, ``K = max|d|``, ``Δ = c``.

    As the plain layer; the gradients themselves have the gates' caps.
    """
    return capped(diagonal_rule(module, context), module, module.weight, module.bias, context)
