"""Distances and weighted order statistics: bounded by the cotangent alone, whatever weights and inputs are."""

from __future__ import annotations

import math

from clipless_dp.errors import ConfigurationError
from clipless_dp.layers import DistanceLinear, SortLinear
from clipless_dp.layers.distance import exponent
from clipless_dp.norms.operators import DiagonalOperator, VectorOperator
from clipless_dp.rules.base import Deferred, LayerBounds, RuleContext, RuleError, register_rule

_ROUNDING = 1.0 + 1e-12
"""Covers the few roundings of a root and a power."""


@register_rule(DistanceLinear)
def distance_rule(module: DistanceLinear, context: RuleContext) -> LayerBounds:
    """``Y = s√out·X + s‖W‖_F + ‖b‖``, ``K = s√out``, ``Δ_W = sG``, ``Δ_b = G``.

    ``K_∞ = s·n^{1/p}``, with ``s = n^{-1/p}`` of means, else 1.

    ``v = s·∇‖d‖_p`` has ``‖v‖_{p/(p-1)} = s``: so ``‖v‖₂ ≤ s``, as ``p ≥ 2``, and ``‖v‖₁ ≤ s·n^{1/p}``. Row ``j`` of
    the weight's gradient is ``-g_j v_jᵀ``. Proofs: ``docs/bounds.md``.
    """
    try:
        p = exponent(module.p)
    except ConfigurationError as error:
        raise RuleError(str(error)) from error
    entries = float(context.input_shape[-1])
    growth = 1.0 if math.isinf(p) else entries ** (1.0 / p) * _ROUNDING
    scale = 1.0 if math.isinf(p) or not module.mean else entries ** (-1.0 / p) * _ROUNDING
    # A mean's root, of any p, grows no entry: without the rounding of a product of two inverses.
    return _bounds(module, context, least=scale, most=1.0 if module.mean else growth)


@register_rule(SortLinear)
def sort_rule(module: SortLinear, context: RuleContext) -> LayerBounds:
    """``Y = c√out·X + c‖W‖_F + ‖b‖``, ``K = c√out``, ``Δ_W = cG``, ``Δ_b = G``.

    ``K_∞ = c``, with ``c = Σ|c_k| = 1`` as the layer computes with.
    """
    total = math.fsum(map(abs, module.coefficients))
    return _bounds(module, context, least=total, most=total)


def _bounds(module: DistanceLinear | SortLinear, context: RuleContext, *, least: float, most: float) -> LayerBounds:
    """The bounds of outputs with ``‖v‖₂ ≤ least`` and ``‖v‖₁ ≤ most`` that are zero where ``x = w_j``, plus a bias.

    ``Y``: ``|y_j| ≤ least·(‖x‖ + ‖w_j‖) + |b_j|``, and in the maximum norm ``most`` in place of ``least``.
    """
    root = math.sqrt(module.out_features) * _ROUNDING
    gradients: dict[str, Deferred] = {"weight": least}
    if module.bias is not None:
        gradients["bias"] = 1.0

    def output_norm() -> float:
        shift = 0.0 if module.bias is None else context.norm("bias", VectorOperator())
        return least * (root * context.input_norm + context.norm("weight", VectorOperator())) + shift

    def output_norm_inf() -> float:
        shift = 0.0 if module.bias is None else context.norm("bias", DiagonalOperator())
        return most * (context.input_norm_inf + context.norm("weight", DiagonalOperator())) + shift

    return LayerBounds(
        output_norm=output_norm,
        lipschitz=least * root,
        gradients=gradients,
        lipschitz_inf=most,
        output_norm_inf=output_norm_inf,
    )
