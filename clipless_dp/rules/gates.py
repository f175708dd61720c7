"""Gates inside the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from clipless_dp import gates
from clipless_dp.gates import BallProjection, CotangentGate, SphereScaling, adapting, rounding_slack
from clipless_dp.isolation import Cap, Isolated
from clipless_dp.layers import SampleGroupNorm, StopGradient
from clipless_dp.rules.base import LayerBounds, RuleContext, register_rule
from clipless_dp.rules.conv import convolution_rule, transposed_convolution_rule
from clipless_dp.rules.linear import linear_rule


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


@register_rule(SampleGroupNorm)
def sample_group_norm_rule(module: SampleGroupNorm, context: RuleContext) -> LayerBounds:
    """``Y = min(√n, X/c)``, ``K = 1/c``: centering does not expand, and each group has a sphere of its own."""
    entries = math.prod(context.input_shape)
    cap = math.sqrt(entries) * rounding_slack(entries)
    stretch = 1.0 / module.floor
    return LayerBounds(output_norm=lambda: min(context.free_input_norm * stretch, cap), lipschitz=stretch)


@register_rule(CotangentGate)
def cotangent_gate_rule(module: CotangentGate, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1`` (normalising ``K = c/floor``).

    The cotangent becomes ``min(G, c)`` when clipping, and ``c·min(1, G/floor)`` when normalising.
    """
    cap = module.limit * rounding_slack(math.prod(context.input_shape))
    if module.mode == "normalize":
        return LayerBounds(
            output_norm=lambda: context.input_norm,
            lipschitz=module.limit / module.floor,
            cotangent_cap=cap,
            lipschitz_inf=module.limit / module.floor,
            output_norm_inf=lambda: context.input_norm_inf,
        )
    return LayerBounds(
        output_norm=lambda: context.input_norm,
        cotangent_cap=cap,
        lipschitz_inf=1.0,
        output_norm_inf=lambda: context.input_norm_inf,
    )


@register_rule(StopGradient)
def stop_gradient_rule(module: StopGradient, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``, and the cotangent becomes 0."""
    return LayerBounds(
        output_norm=lambda: context.input_norm,
        cotangent_cap=0.0,
        lipschitz_inf=1.0,
        output_norm_inf=lambda: context.input_norm_inf,
    )


@register_rule(gates.GradientGatedLinear)
def gradient_gated_linear_rule(module: gates.GradientGatedLinear, context: RuleContext) -> LayerBounds:
    """``Y = ‖W‖X + √T‖b‖``, ``K = ‖W‖``, ``Δ = c``.

    As the linear layer; the gradients themselves have the gates' caps.
    """
    return capped(linear_rule(module, context), module, module.weight, module.bias, context)


@register_rule(gates.GradientGatedConv1d, gates.GradientGatedConv2d)
def gradient_gated_convolution_rule(
    module: gates.GradientGatedConv1d | gates.GradientGatedConv2d, context: RuleContext
) -> LayerBounds:
    """``Y = ‖conv‖X + √P‖b‖``, ``K = ‖conv‖``, ``Δ = c``.

    As the convolution; the gradients themselves have the gates' caps.
    """
    return capped(convolution_rule(module, context), module, module.weight, module.bias, context)


@register_rule(gates.GradientGatedConvTranspose1d, gates.GradientGatedConvTranspose2d)
def gradient_gated_transposed_convolution_rule(
    module: gates.GradientGatedConvTranspose1d | gates.GradientGatedConvTranspose2d, context: RuleContext
) -> LayerBounds:
    """``Y = ‖conv‖X + √P‖b‖``, ``K = ‖conv‖``, ``Δ = c``.

    As the transposed convolution; the gradients themselves have the gates' caps.
    """
    return capped(transposed_convolution_rule(module, context), module, module.weight, module.bias, context)


def capped(
    bounds: LayerBounds, module: gates.GradientGated, weight: Tensor, bias: Tensor | None, context: RuleContext
) -> LayerBounds:
    """Adds the caps, each times what rounding can hide from it: of the product of two norms, or of one.

    And how far the gates stretch: ``G`` becomes ``G·c/max(n, least)`` with some number ``n ≥ 0``, so its norm is at
    most ``‖G‖·c/least`` whatever ``n`` is: a norm, one that rounding made too small, or the share of ``‖g‖‖x‖`` that a
    sum over positions counts as. A factor's own rounding is within the slack of one entry.
    """
    lengths = rounding_slack(math.prod(context.input_shape)) * rounding_slack(math.prod(context.output_shape))
    both = module.gates()
    stretches = [limit / least * rounding_slack(1) for limit, least in both]
    limits = {"weight": both[0][0] * lengths * rounding_slack(weight.numel())}
    if bias is not None:
        limits["bias"] = both[1][0] * rounding_slack(bias.numel())
    counted = {} if (caps := adapting(cast(nn.Module, module))) is None else dict.fromkeys(caps.caps, 1)
    trained = {name for name, part in (("weight", weight), ("bias", bias)) if part is not None and part.requires_grad}
    return replace(
        bounds,
        gradient_limits=limits,
        gradient_stretches=dict(zip(("weight", "bias"), stretches, strict=True)),
        joint_limits=[(tuple(limits), max(limits.values()) * rounding_slack(len(limits)))] if module.joint else (),
        counted={gate: count for gate, count in counted.items() if gate in trained or (gate == "layer" and trained)},
    )


@register_rule(Isolated)
def isolated_rule(module: Isolated, context: RuleContext) -> LayerBounds:
    """``Y = ∞``, ``K = ∞``, ``Δ = c``.

    Nothing is known of the network but the gates: each parameter's cap, for each gate that it goes through.

    What rounding can hide from a cap is that of the norms of what meets the parameter and of what arrives, and of the
    gradient itself.
    """
    uses, caps = dict(module.uses or ()), module.caps
    limits: dict[str, float] = {}
    kinds: dict[str, str] = {}
    slacks: dict[str, float] = {}
    seen: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            # A second name of the same parameter, all of whose uses are told of under the first.
            limits[name] = 0.0
            continue
        seen.add(id(parameter))
        slack = rounding_slack(parameter.numel())
        own = uses.get(name, ())
        each = [rounding_slack(entries) ** 2 * slack for _, entries in own]
        slacks[name] = max(each, default=1.0)
        limits[name] = sum(caps[name].limit * one for one in each)
        how = "" if module.joint is None else f", cap of the {module.joint}"
        kinds[name] = f"{' + '.join(kind for kind, _ in own) or 'unused'} gate, {module.isolation}{how}"
    together = _joint_limits(module, caps, slacks)
    if module.joint is not None:
        limits = {name: sum(bound for names, bound in together if name in names) for name in limits}
    return LayerBounds(
        output_norm=math.inf,
        lipschitz=math.inf,
        gradients=dict.fromkeys(limits, math.inf),
        gradient_limits=limits,
        joint_limits=together,
        counted=module.counted(),
        kinds=kinds,
    )


def _joint_limits(
    module: Isolated, caps: Mapping[str, Cap], slacks: Mapping[str, float]
) -> list[tuple[tuple[str, ...], float]]:
    """What is capped together, and the caps.

    A factor is the cap over a norm that is at least the true one over the largest of the slacks, and over what summing
    the squares of so many norms loses. Of ``u`` uses of one parameter the squares count ``u`` times, by Cauchy–Schwarz.
    """
    if module.joint is None:
        return []
    groups: list[tuple[str, ...]] = list(module.groups)
    if module.joint == "network":
        groups = [tuple(dict.fromkeys(name for group in groups for name in group))]
    parts = len(module.groups) * 2
    return [
        (
            names,
            max(caps[name].limit for name in names) * max(slacks[name] for name in names) * rounding_slack(parts),
        )
        for names in groups
        if names
    ]
