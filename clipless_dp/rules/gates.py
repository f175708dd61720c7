"""Gates inside the network."""

from __future__ import annotations

import math

from clipless_dp.gates import BallProjection, CotangentGate, SphereScaling, rounding_slack
from clipless_dp.rules.base import LayerBounds, RuleContext, register_rule


@register_rule(BallProjection)
def ball_projection_rule(module: BallProjection, context: RuleContext) -> LayerBounds:
    """``Y = min(X, r)``, ``K = 1``; ``X`` is asked for only where it costs no certificate."""
    cap = module.radius * rounding_slack(math.prod(context.input_shape))
    return LayerBounds(output_norm=lambda: min(context.free_input_norm, cap))


@register_rule(SphereScaling)
def sphere_scaling_rule(module: SphereScaling, context: RuleContext) -> LayerBounds:
    """``Y = min(r, X·r/c)``, ``K = r/c``."""
    cap = module.radius * rounding_slack(math.prod(context.input_shape))
    stretch = module.radius / module.floor
    return LayerBounds(output_norm=lambda: min(context.free_input_norm * stretch, cap), lipschitz=stretch)


@register_rule(CotangentGate)
def cotangent_gate_rule(module: CotangentGate, context: RuleContext) -> LayerBounds:
    """The cotangent becomes ``min(G, c)`` when clipping, and ``c·min(1, G/floor)`` when normalising."""
    cap = module.limit * rounding_slack(math.prod(context.input_shape))
    if module.mode == "normalize":
        return LayerBounds(
            output_norm=lambda: context.input_norm, lipschitz=module.limit / module.floor, cotangent_cap=cap
        )
    return LayerBounds(output_norm=lambda: context.input_norm, cotangent_cap=cap)
