"""Residual layers with parameters of their own."""

from __future__ import annotations

import math

from clipless_dp.layers import (
    ConvexPotential,
    ConvexPotentialConv2d,
    GradientGatedConvexPotential,
    GradientGatedConvexPotentialConv2d,
    SigmoidMix,
)
from clipless_dp.norms import coverage, output_size
from clipless_dp.norms.operators import (
    ConvOperator,
    DenseOperator,
    Operator,
    SigmoidOperator,
    VectorOperator,
)
from clipless_dp.rules.base import Deferred, LayerBounds, RuleContext, RuleError, register_rule
from clipless_dp.rules.gates import capped

_ROUNDING = 1.0 + 1e-12
"""Covers the few roundings of a polynomial of certified norms."""


@register_rule(SigmoidMix)
def sigmoid_mix_rule(module: SigmoidMix, context: RuleContext) -> LayerBounds:
    """``Y = (1-α)A + αB``, ``K = 1-α`` and ``α``, ``Δ_logit = G(A+B)/4``.

    The logit's gradient is ``σ'(logit)·⟨g, b - a⟩``, and ``σ' = σ(1-σ) ≤ 1/4``.
    """
    shapes = context.input_shapes
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        raise RuleError(f"needs two values of one shape, got {shapes}")

    def of_first() -> float:
        return context.norm("logit", SigmoidOperator(-1))

    def of_second() -> float:
        return context.norm("logit", SigmoidOperator(1))

    def output_norm() -> float:
        first, second = context.input_norms()
        return of_first() * first + of_second() * second

    return LayerBounds(
        output_norm=output_norm,
        lipschitz=(of_first, of_second),
        gradients={"logit": lambda: 0.25 * sum(context.input_norms())},
    )


@register_rule(ConvexPotential)
def convex_potential_rule(module: ConvexPotential, context: RuleContext) -> LayerBounds:
    """``Y = KX + 2w√T‖b‖``, ``K = max(1, 2w² - 1)``, ``Δ_W = 2G(2wX + √T‖b‖)``, ``Δ_b = 2√T·wG``.

    :func:`_step_bounds` with the weight as a matrix at T positions: windows of one entry.
    """
    return _step_bounds(module, context, DenseOperator(), math.prod(context.input_shape[:-1]), None)


@register_rule(ConvexPotentialConv2d)
def convex_potential_conv2d_rule(module: ConvexPotentialConv2d, context: RuleContext) -> LayerBounds:
    """``Y = KX + 2w√P‖b‖``, ``K = max(1, 2w² - 1)``, ``Δ_W = 2√N·G(2wX + √P‖b‖)``, ``Δ_b = 2√P·wG``.

    :func:`_step_bounds` with the weight as a convolution with P outputs and coverage N.
    """
    if len(context.input_shape) != 3:
        raise RuleError(f"needs inputs (batch, channels, height, width), got {context.input_shape} per sample")
    input_size, padding = context.input_shape[1:], ((module.padding, module.padding),) * 2
    windows = coverage(input_size, module.kernel_size, stride=module.stride, padding=padding)
    weight = ConvOperator(input_size, (module.stride,) * 2, padding, (1, 1), 1, windows)
    positions = math.prod(output_size(input_size, module.kernel_size, stride=module.stride, padding=padding))
    return _step_bounds(module, context, weight, positions, windows)


@register_rule(GradientGatedConvexPotential)
def gradient_gated_convex_potential_rule(module: GradientGatedConvexPotential, context: RuleContext) -> LayerBounds:
    """``Y = KX + 2w√T‖b‖``, ``K = max(1, 2w² - 1)``, ``Δ = c``.

    As the plain layer; the gradients themselves have the gates' caps.
    """
    return capped(convex_potential_rule(module, context), module, module.weight, module.bias, context)


@register_rule(GradientGatedConvexPotentialConv2d)
def gradient_gated_convex_potential_conv2d_rule(
    module: GradientGatedConvexPotentialConv2d, context: RuleContext
) -> LayerBounds:
    """``Y = KX + 2w√P‖b‖``, ``K = max(1, 2w² - 1)``, ``Δ = c``.

    As the plain layer; the gradients themselves have the gates' caps.
    """
    return capped(convex_potential_conv2d_rule(module, context), module, module.weight, module.bias, context)


def _step_bounds(
    module: ConvexPotential | ConvexPotentialConv2d,
    context: RuleContext,
    weight: Operator,
    positions: int,
    windows: int | None,
) -> LayerBounds:
    """Bounds of ``h(x) = x - 2Wᵀσ(z)``, ``z = Wx + b``, with ``σ`` the ReLU; ``w ≥ ‖W‖``, ``β = √P‖b‖``.

    *K.* The Jacobian ``I - 2WᵀDW``, ``0 ≤ D ≤ 1``, is symmetric with eigenvalues in ``[1 - 2w², 1]``:
    ``K = max(1, 2w² - 1)``.

    *Y.* ``‖h(x) - h(0)‖ ≤ KX``, and ``h(0) = -2Wᵀσ(b)``: ``Y = KX + 2wβ``.

    *Δ.* With ``dz = dW x + db``, ``⟨g, dh⟩ = -2⟨dW g, σ(z)⟩ - 2⟨DWg, dW x⟩ - 2⟨DWg, db⟩``. As for a convolution with
    input ``g`` and cotangent ``σ(z)``, or input ``x`` and cotangent ``DWg``, the first two are at most
    ``√N‖dW‖(‖g‖‖σ(z)‖ + ‖x‖‖DWg‖)``; ``‖σ(z)‖ ≤ wX + β`` and ``‖DWg‖ ≤ wG``. So ``Δ_W = 2√N·G(2wX + β)`` and
    ``Δ_b = 2√P·wG``.
    """
    bias = VectorOperator()

    def norm() -> float:
        return context.norm("weight", weight)

    def shift() -> float:
        return math.sqrt(positions) * context.norm("bias", bias) if module.bias is not None else 0.0

    def stretch() -> float:
        return max(1.0, (2.0 * norm() ** 2 - 1.0) * _ROUNDING)

    def weight_gradient() -> float:
        return 2.0 * math.sqrt(windows or 1) * (2.0 * norm() * context.input_norm + shift()) * _ROUNDING

    operators: dict[str, Operator] = {"weight": weight}
    gradients: dict[str, Deferred] = {"weight": weight_gradient}
    if module.bias is not None:
        operators["bias"] = bias
        gradients["bias"] = lambda: 2.0 * math.sqrt(positions) * norm() * _ROUNDING
    return LayerBounds(
        output_norm=lambda: (stretch() * context.input_norm + 2.0 * norm() * shift()) * _ROUNDING,
        lipschitz=stretch,
        gradients=gradients,
        operators=operators,
        coverage=windows,
    )
