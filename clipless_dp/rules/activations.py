"""Activations and other layers that act on the norm alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from clipless_dp.layers import (
    AbsoluteValue,
    FullSort,
    GroupSort,
    Householder,
    LayerCentering,
    LinearSpline,
    MaxMin,
)
from clipless_dp.layers.monotone import BoxProjection, MonotoneLift
from clipless_dp.norms.operators import DiagonalOperator, SegmentsOperator
from clipless_dp.rules.base import LARGEST, LayerBounds, RuleContext, RuleError, register_function_rule, register_rule


def _non_expansive(context: RuleContext) -> LayerBounds:
    return LayerBounds(
        output_norm=lambda: context.input_norm,
        lipschitz_inf=1.0,
        output_norm_inf=lambda: context.input_norm_inf,
    )


def _tanh(context: RuleContext) -> LayerBounds:
    cap = math.sqrt(math.prod(context.input_shape))

    def output_norm() -> float:
        arriving = context.input_norm
        # Where the input may overflow it may be NaN, which no saturation caps.
        return min(arriving, cap) if arriving < LARGEST else math.inf

    return LayerBounds(output_norm=output_norm, lipschitz_inf=1.0)


@register_rule(nn.Identity, nn.ReLU, AbsoluteValue, GroupSort, MaxMin, FullSort, LayerCentering)
def non_expansive_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    """``‖f(x)‖ ≤ ‖x‖`` and 1-Lipschitz: coordinatewise contractions, permutations, orthogonal projections.

    In the maximum norm too, but for centering, which moves an entry by what it moves and by what the mean does.
    """
    if isinstance(module, LayerCentering) and module.dims is not None:
        rank = len(context.input_shape) + 1
        if not module.dims:
            raise RuleError("dims=() means every axis, the batch too: the mean would mix samples; use dims=None")
        if 0 in {dim % rank for dim in module.dims}:
            raise RuleError("dims include the batch axis: the mean would mix samples; leave axis 0 out")
    if isinstance(module, LayerCentering):
        return LayerBounds(
            output_norm=lambda: context.input_norm,
            lipschitz_inf=2.0,
            output_norm_inf=lambda: 2.0 * context.input_norm_inf,
        )
    return _non_expansive(context)


@register_rule(nn.LeakyReLU)
def leaky_relu_rule(module: nn.LeakyReLU, context: RuleContext) -> LayerBounds:
    """``Y = max(1, |a|)·X``, ``K = max(1, |a|)`` for the negative slope a."""
    slope = max(1.0, abs(module.negative_slope))
    if module.inplace and slope > 1.0:
        raise RuleError("inplace=True with a slope above 1 may stretch a value that others hold: use inplace=False")
    return LayerBounds(output_norm=lambda: slope * context.input_norm, lipschitz=slope, lipschitz_inf=slope)


@register_rule(nn.PReLU)
def prelu_rule(module: nn.PReLU, context: RuleContext) -> LayerBounds:
    """``Y = max(1, |a|)·X``, ``K = max(1, |a|)``, ``Δ_a = GX``, for the largest slope ``a`` of any channel.

    The slope of a channel has the gradient ``Σ_p g_p·min(0, x_p)``, of size at most ``‖g_c‖‖x_c‖`` over the
    channel's entries; over channels, ``Σ_c ‖g_c‖²‖x_c‖² ≤ ‖g‖²‖x‖²``. One slope for all entries is one channel.
    """
    slopes = DiagonalOperator()

    def stretch() -> float:
        return max(1.0, context.norm("weight", slopes))

    return LayerBounds(
        output_norm=lambda: stretch() * context.input_norm,
        lipschitz=stretch,
        gradients={"weight": lambda: context.input_norm},
        operators={"weight": slopes},
    )


@register_rule(LinearSpline)
def linear_spline_rule(module: LinearSpline, context: RuleContext) -> LayerBounds:
    """``Y = max|s|·X``, ``K = max|s|``, ``Δ_s = GX``.

    ``f(0) = 0`` and ``|f'| ≤ max|s|``. ``∂f/∂s_i = φ_i(x)``, the lengths into which the segments cut ``[0, x]``:
    ``(Σφ_i²)^½ ≤ Σ|φ_i| = |x|``, so the gradient of a channel's slopes is at most ``Σ_p |g_p||x_p|``, and so on as for
    PReLU. Neither the number of segments nor their width enters.
    """
    slopes = SegmentsOperator()
    return LayerBounds(
        output_norm=lambda: context.norm("slopes", slopes) * context.input_norm,
        lipschitz=lambda: context.norm("slopes", slopes),
        gradients={"slopes": lambda: context.input_norm},
        operators={"slopes": slopes},
    )


@register_rule(nn.Tanh)
def tanh_rule(module: nn.Tanh, context: RuleContext) -> LayerBounds:
    """``Y = min(X, √n)``, ``K = 1``."""
    return _tanh(context)


@register_rule(BoxProjection)
def box_projection_rule(module: BoxProjection, context: RuleContext) -> LayerBounds:
    """``Y`` is the norm of the box's farthest corner, or ``X`` if that is less and zero is in the box; ``K = 1``."""
    columns = math.prod(context.input_shape)
    if module.columns is not None and context.input_shape != (module.columns,):
        raise RuleError(f"the box has {module.columns} columns, and its input is {context.input_shape} per sample")
    cap = module.norm(columns)
    return LayerBounds(output_norm=lambda: min(context.free_input_norm, cap) if module.holds_zero else cap)


@register_rule(MonotoneLift)
def monotone_lift_rule(module: MonotoneLift, context: RuleContext) -> LayerBounds:
    """``Y = √k‖λ‖·X``, ``K = √k‖λ‖``, of ``k`` outputs; float32 rounds each of them once, which ``1e-6`` covers."""
    if context.input_shape != (len(module.signs),):
        raise RuleError(f"it has a sign for each of {len(module.signs)} columns, and rows are {context.input_shape}")

    def stretch() -> float:
        return math.sqrt(module.outputs) * float(torch.linalg.vector_norm(module.slopes())) * (1.0 + 1e-6)

    return LayerBounds(output_norm=lambda: stretch() * context.input_norm, lipschitz=stretch)


@register_rule(Householder)
def householder_rule(module: Householder, context: RuleContext) -> LayerBounds:
    """Norm-preserving; ``Δ_θ = GX``: ``∂y/∂θ`` is orthogonal on each pair: Cauchy–Schwarz over pairs and positions.

    Of the three angles of order 2 the map of each sector depends on one at most, so that a position adds to one entry
    of the gradient, by at most ``|g_p||z_p|``: a pair's part is at most ``Σ_p |g_p||z_p|``, as for order 1.
    """
    return LayerBounds(output_norm=lambda: context.input_norm, gradients={"theta": lambda: context.input_norm})


@register_rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def dropout_rule(module: nn.Dropout, context: RuleContext) -> LayerBounds:
    """``Y = X/(1-p)``, ``K = 1/(1-p)``: the bound while training, whatever the mode."""
    if not module.p < 1.0:
        raise RuleError("p must be below 1")
    if module.inplace:
        raise RuleError("inplace=True stretches a value that others may hold: use inplace=False")
    stretch = 1.0 / (1.0 - module.p)
    return LayerBounds(output_norm=lambda: stretch * context.input_norm, lipschitz=stretch, lipschitz_inf=stretch)


@register_function_rule(torch.relu, torch.relu_, torch.abs, "relu", "relu_", "abs", call=lambda input: None)
@register_function_rule(functional.relu, call=lambda input, inplace=False: None)
@register_function_rule("contiguous", "clone", call=lambda input, *, memory_format=None: None)
def contraction_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional ReLU, absolute value, copies and layout changes."""
    return _non_expansive(context)


@register_function_rule(torch.tanh, functional.tanh, "tanh", call=lambda input: None)
def tanh_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional tanh."""
    return _tanh(context)
