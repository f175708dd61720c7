"""Activations and other layers that act on the norm alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from clipless_dp.gates import rounding_slack
from clipless_dp.layers import (
    AbsoluteValue,
    ChannelBias,
    ConcatReLU,
    FullSort,
    GroupSort,
    Householder,
    LayerCentering,
    LinearSpline,
    MaxMin,
    NoiseInjection,
)
from clipless_dp.layers.monotone import BoxProjection, MonotoneLift
from clipless_dp.norms.operators import DiagonalOperator, SegmentsOperator, VectorOperator
from clipless_dp.rules.base import LARGEST, LayerBounds, RuleContext, RuleError, register_function_rule, register_rule

_ROUNDING = 1.0 + 1e-12
"""Covers the few roundings of a bound, and torch's own of exponentials."""


def _non_expansive(context: RuleContext) -> LayerBounds:
    return LayerBounds(
        output_norm=lambda: context.input_norm,
        lipschitz_inf=1.0,
        output_norm_inf=lambda: context.input_norm_inf,
    )


def _bounded_slope(context: RuleContext, slope: float = 1.0, start: float = 0.0, cap: float = math.inf) -> LayerBounds:
    """Of a function applied to each entry, from its largest slope, ``|f(0)|`` and the largest ``|f|``.

    ``|f(x)| ≤ |f(0)| + slope·|x|`` at each entry, and Minkowski over the ``n`` entries:
    ``Y = min(slope·X + |f(0)|√n, cap·√n)``.
    """
    root = math.sqrt(math.prod(context.input_shape))

    def output_norm() -> float:
        arriving = context.input_norm
        # Where the input may overflow it may be NaN, which no saturation caps.
        return min(slope * arriving + start * root, cap * root) * _ROUNDING if arriving < LARGEST else math.inf

    def largest() -> float:
        arriving = context.input_norm_inf
        return min(slope * arriving + start, cap) * _ROUNDING if arriving < LARGEST else math.inf

    return LayerBounds(output_norm=output_norm, lipschitz=slope, lipschitz_inf=slope, output_norm_inf=largest)


def _tanh(context: RuleContext) -> LayerBounds:
    return _bounded_slope(context, cap=1.0)


def _clamp(context: RuleContext, low: float, high: float, *, inplace: bool = False) -> LayerBounds:
    if not low <= high:
        raise RuleError(f"its range from {low} to {high} is empty")
    start = max(low, -high, 0.0)
    if inplace and start > 0.0:
        raise RuleError("inplace=True moves a zero that others may hold: use inplace=False")
    return _bounded_slope(context, 1.0, start, max(abs(low), abs(high)))


def _shrink(context: RuleContext, threshold: float) -> LayerBounds:
    if not threshold >= 0.0:
        raise RuleError(f"lambd={threshold} is negative, which jumps at zero: use one of at least 0")
    return _non_expansive(context)


def _exponential(context: RuleContext, alpha: float, scale: float = 1.0, *, inplace: bool = False) -> LayerBounds:
    """``scale·x`` above zero and ``scale·alpha·(exp(x) - 1)`` below."""
    slope = scale * max(1.0, abs(alpha))
    if inplace and slope > 1.0:
        raise RuleError("inplace=True with a slope above 1 may stretch a value that others hold: use inplace=False")
    return _bounded_slope(context, slope)


@register_rule(nn.Identity, nn.ReLU, nn.Tanhshrink, AbsoluteValue, GroupSort, MaxMin, FullSort, LayerCentering)
def non_expansive_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``: coordinatewise contractions with ``f(0) = 0``, permutations, orthogonal projections.

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
    """``Y = min(X, R)`` with zero in the box, else ``Y = R``, the norm of its farthest corner; ``K = 1``."""
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


@register_rule(nn.ReLU6, nn.Hardtanh)
def hardtanh_rule(module: nn.Hardtanh, context: RuleContext) -> LayerBounds:
    """``Y = min(X + |f(0)|√n, max(|low|, |high|)·√n)``, ``K = 1``."""
    return _clamp(context, float(module.min_val), float(module.max_val), inplace=module.inplace)


@register_rule(nn.Softsign)
def softsign_rule(module: nn.Softsign, context: RuleContext) -> LayerBounds:
    """``x/(1 + |x|)``, of slope ``1/(1 + |x|)²``: ``Y = min(X, √n)``, ``K = 1``."""
    return _bounded_slope(context, cap=1.0)


@register_rule(nn.Softshrink)
def softshrink_rule(module: nn.Softshrink, context: RuleContext) -> LayerBounds:
    """``sign(x)·max(|x| - λ, 0)``: ``Y = X``, ``K = 1``."""
    return _shrink(context, float(module.lambd))


@register_rule(nn.Sigmoid)
def sigmoid_rule(module: nn.Sigmoid, context: RuleContext) -> LayerBounds:
    """``σ' = σ(1 - σ) ≤ 1/4``: ``Y = min(X/4 + √n/2, √n)``, ``K = 1/4``."""
    return _bounded_slope(context, 0.25, 0.5, 1.0)


@register_rule(nn.Hardsigmoid)
def hardsigmoid_rule(module: nn.Hardsigmoid, context: RuleContext) -> LayerBounds:
    """``min(max(x/6 + 1/2, 0), 1)``: ``Y = min(X/6 + √n/2, √n)``, ``K = 1/6``."""
    if module.inplace:
        raise RuleError("inplace=True moves a zero that others may hold: use inplace=False")
    # Torch holds the sixth in float32, even for gradients in float64: 3e-8 above it.
    return _bounded_slope(context, (1.0 + 5e-8) / 6.0, 0.5, 1.0)


@register_rule(nn.LogSigmoid)
def log_sigmoid_rule(module: nn.LogSigmoid, context: RuleContext) -> LayerBounds:
    """``log σ(x)``, of slope ``σ(-x)``: ``Y = X + √n·log 2``, ``K = 1``."""
    return _bounded_slope(context, start=math.log(2.0))


@register_rule(nn.ELU)
def elu_rule(module: nn.ELU, context: RuleContext) -> LayerBounds:
    """``α(exp(x) - 1)`` below zero, of slope ``α·exp(x)``: ``Y = max(1, |α|)·X``, ``K = max(1, |α|)``."""
    return _exponential(context, float(module.alpha), inplace=module.inplace)


@register_rule(nn.CELU)
def celu_rule(module: nn.CELU, context: RuleContext) -> LayerBounds:
    """``α(exp(x/α) - 1)`` below zero, of slope ``exp(x/α)``: ``Y = X``, ``K = 1``, but for rounding."""
    if not 1e-30 <= module.alpha <= 1e30:
        raise RuleError(f"alpha={module.alpha} is no positive number from 1e-30 to 1e30: its slope has no bound")
    # Torch holds 1/α in float32.
    return _exponential(context, 1.0 + 1.2e-7)


@register_rule(nn.SELU)
def selu_rule(module: nn.SELU, context: RuleContext) -> LayerBounds:
    """``Y = KX``, ``K = 1.7581``, the product of its two constants: 1.0507 times an ELU of ``α = 1.6733``."""
    return _exponential(context, 1.6732632423543773, 1.0507009873554806, inplace=module.inplace)


@register_rule(ConcatReLU)
def concat_relu_rule(module: ConcatReLU, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``.

    Of each entry one of ``relu(x)``, ``relu(-x)`` is ``|x|`` and the other zero, so the norm is kept, and the Jacobian
    has orthonormal columns (or zero ones, where ``x = 0``).
    """
    if module.dim % (len(context.input_shape) + 1) == 0:
        raise RuleError("dim is the batch axis, along which samples would be joined; use another")
    return _non_expansive(context)


@register_rule(ChannelBias)
def channel_bias_rule(module: ChannelBias, context: RuleContext) -> LayerBounds:
    """``Y = X + √P‖b‖``, ``K = 1``, ``Δ_b = √P·G``, for the P positions that a channel has.

    A channel's gradient is the sum of its positions' cotangents: ``Σ_c (Σ_p g_cp)² ≤ P‖g‖²``.
    """
    positions = math.prod(context.input_shape) // module.bias.numel()
    shift, entries = VectorOperator(), DiagonalOperator()

    def output_norm() -> float:
        return (context.input_norm + math.sqrt(positions) * context.norm("bias", shift)) * _ROUNDING

    return LayerBounds(
        output_norm=output_norm,
        lipschitz_inf=1.0,
        output_norm_inf=lambda: (context.input_norm_inf + context.norm("bias", entries)) * _ROUNDING,
        gradients={"bias": math.sqrt(positions)},
        operators={"bias": shift},
    )


@register_rule(Householder)
def householder_rule(module: Householder, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``, ``Δ_θ = GX``: ``∂y/∂θ`` is orthogonal on each pair; then Cauchy–Schwarz.

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


@register_rule(NoiseInjection)
def noise_injection_rule(module: NoiseInjection, context: RuleContext) -> LayerBounds:
    """``Y = X + r``, ``K = 1``: a constant of norm at most ``r`` is added, whatever the sample; none in ``eval()``."""
    radius = module.radius * rounding_slack(math.prod(context.input_shape))
    return LayerBounds(
        output_norm=lambda: context.input_norm + radius,
        lipschitz_inf=1.0,
        output_norm_inf=lambda: context.input_norm_inf + radius,
    )


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


@register_function_rule(functional.softsign, call=lambda input: None)
def softsign_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional softsign."""
    return _bounded_slope(context, cap=1.0)


@register_function_rule(functional.tanhshrink, call=lambda input: None)
def tanhshrink_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional tanhshrink: ``x - tanh(x)``, of slope ``tanh²``."""
    return _non_expansive(context)


@register_function_rule(torch.sigmoid, functional.sigmoid, "sigmoid", call=lambda input: None)
def sigmoid_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional sigmoid."""
    return _bounded_slope(context, 0.25, 0.5, 1.0)


@register_function_rule(functional.logsigmoid, call=lambda input: None)
def log_sigmoid_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional log-sigmoid."""
    return _bounded_slope(context, start=math.log(2.0))


@register_function_rule(functional.relu6, call=lambda input, inplace=False: None)
def relu6_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional ReLU6."""
    return _clamp(context, 0.0, 6.0)


@register_function_rule(functional.hardtanh, call=lambda input, min_val=-1.0, max_val=1.0, inplace=False: None)
def hardtanh_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional hard tanh."""
    low, high = _numbers(kwargs["min_val"], kwargs["max_val"])
    return _clamp(context, low, high, inplace=bool(kwargs["inplace"]))


@register_function_rule(functional.softshrink, call=lambda input, lambd=0.5: None)
def softshrink_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Functional soft shrinkage."""
    return _shrink(context, *_numbers(kwargs["lambd"]))


@register_function_rule(torch.clamp, torch.clip, "clamp", "clip", call=lambda input, min=None, max=None: None)
def clamp_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Values cut to a range of numbers: as a hard tanh."""
    low, high = kwargs["min"], kwargs["max"]
    (low,) = (-math.inf,) if low is None else _numbers(low)
    (high,) = (math.inf,) if high is None else _numbers(high)
    return _clamp(context, low, high)


def _numbers(*values: object) -> tuple[float, ...]:
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise RuleError("its limits must be numbers written in the code, not values that are computed")
    return tuple(float(value) for value in values)  # type: ignore[arg-type]
