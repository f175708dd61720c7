"""Causal mixing of tokens."""

from __future__ import annotations

from clipless_dp.layers import CausalMixing
from clipless_dp.rules.base import LayerBounds, RuleContext, RuleError, register_rule


@register_rule(CausalMixing)
def causal_mixing_rule(module: CausalMixing, context: RuleContext) -> LayerBounds:
    """``Y = αsX``, ``K = αs``, ``Δ_A = sGX``, ``Δ_B = αs²GX``; ``s = Σ_{k<T} β^k < 1/(1-β)``, ``α = ‖A‖``, ``β = ‖B‖``.

    ``B`` is strictly lower triangular, so that ``B^T = 0``, ``(I-B)⁻¹ = Σ_{k<T} B^k`` and ``‖(I-B)⁻¹‖ ≤ s``, which is
    finite for every ``β``. With ``u = (I-B)⁻ᵀg``, ``‖u‖ ≤ sG``, the gradients are ``uxᵀ`` and ``uyᵀ``, summed over
    channels and cut to the pattern: at most ``‖u‖‖x‖`` and ``‖u‖‖y‖ ≤ sG·αsX``.
    """
    if len(context.input_shape) != 2 or context.input_shape[0] != module.tokens:
        raise RuleError(f"mixes {module.tokens} tokens, (tokens, channels) per sample, got {context.input_shape}")
    weight, feedback = module.operator(), module.feedback_operator()

    def inverse() -> float:
        beta = module.feedback_limit * context.norm("feedback", feedback)
        total, power = 0.0, 1.0
        for _ in range(module.tokens):
            total += power
            power *= beta
            if power == 0.0:
                break
        return total

    def stretch() -> float:
        return context.norm("weight", weight) * inverse()

    return LayerBounds(
        output_norm=lambda: stretch() * context.input_norm,
        lipschitz=stretch,
        gradients={
            "weight": lambda: inverse() * context.input_norm,
            "feedback": lambda: inverse() * stretch() * context.input_norm,
        },
        operators={"weight": weight, "feedback": feedback},
    )
