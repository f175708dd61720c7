"""Functions that join, scale and reshape values.

The tracker has already checked that every value keeps the batch as its leading axis, at two batch sizes. A
row-major reshape that keeps it therefore keeps each sample's entries together.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from clipless_dp.layers import PadChannels
from clipless_dp.rules.base import LayerBounds, RuleContext, RuleError, register_function_rule, register_rule


def piece(values: Tensor, function: str, index: int, *settings: Any, **named: Any) -> Tensor:
    """One of the pieces that a method of tensors makes, so that every value in a graph is a tensor.

    Args:
        values: ``(B, ...)``.
        function: name of the method.
        index: of the piece.
        settings: arguments of the method.
        named: the same by name.
    """
    found: Tensor = getattr(values, function)(*settings, **named)[index]
    return found


def _rearranged(context: RuleContext) -> LayerBounds:
    return LayerBounds(
        output_norm=lambda: context.input_norm,
        lipschitz_inf=1.0,
        output_norm_inf=lambda: context.input_norm_inf,
    )


@register_rule(nn.Flatten, nn.Unflatten)
def reshape_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``."""
    return _rearranged(context)


@register_rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
def permutation_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``: each output is one input, and each input one output."""
    if len(context.input_shape) < 3:
        raise RuleError(f"needs inputs (batch, channels, height, width), got {context.input_shape} per sample")
    return _rearranged(context)


@register_rule(PadChannels)
def pad_channels_rule(module: PadChannels, context: RuleContext) -> LayerBounds:
    """``Y = X``, ``K = 1``: each output is one input, or zero, and each input one output."""
    return _rearranged(context)


_SIZES = (lambda input, *sizes: None, lambda input, shape: None, lambda input, size: None)


@register_function_rule(torch.flatten, "flatten", call=lambda input, start_dim=0, end_dim=-1: None)
@register_function_rule(torch.reshape, "reshape", "view", call=_SIZES)
@register_function_rule(torch.unflatten, "unflatten", call=lambda input, dim, sizes: None)
@register_function_rule(torch.permute, "permute", call=(lambda input, *axes: None, lambda input, dims: None))
@register_function_rule(torch.transpose, "transpose", call=lambda input, dim0, dim1: None)
@register_function_rule(torch.swapaxes, "swapaxes", call=lambda input, axis0, axis1: None)
@register_function_rule(torch.unsqueeze, "unsqueeze", call=lambda input, dim: None)
@register_function_rule(torch.neg, operator.neg, "neg", call=lambda input: None)
def rearrangement_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """``Y = X``, ``K = 1``: reshapes, permutations of axes, sign changes."""
    if any(isinstance(value, torch.dtype) for value in kwargs.get("sizes", ())):
        raise RuleError("reading the bits of a value as another dtype has no bound")
    return _rearranged(context)


@register_function_rule(
    operator.add, operator.sub, torch.add, torch.sub, "add", "sub", call=lambda input, other, *, alpha=1: None
)
def sum_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """``a ± b``: ``Y = A + B``, ``G`` to each."""
    if kwargs["alpha"] != 1:
        raise RuleError("alpha is not supported: scale one operand instead")
    shapes = context.input_shapes
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        raise RuleError(f"needs two values of one shape, got {shapes}: broadcasting and constants have no bound")
    return LayerBounds(output_norm=lambda: sum(context.input_norms()), lipschitz=(1.0, 1.0), lipschitz_inf=(1.0, 1.0))


@register_function_rule(
    operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div", call=lambda input, other: None
)
def scale_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """``c·a`` and ``a/c`` for a number ``c`` written in the code: ``Y = |c|A``, ``K = |c|``."""
    numbers = [value for value in kwargs.values() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(context.input_shapes) != 1 or len(numbers) != 1:
        raise RuleError("only a product with a number has a bound, not one of two values")
    factor = abs(float(numbers[0]))
    if "div" in context.kind:
        if not isinstance(kwargs["input"], fx.Node):
            raise RuleError("a number divided by a value has no bound")
        factor = math.inf if factor == 0 else 1.0 / factor
    if not math.isfinite(factor):
        raise RuleError("the factor is not finite")
    return LayerBounds(output_norm=lambda: factor * context.input_norm, lipschitz=factor, lipschitz_inf=factor)


@register_function_rule(torch.cat, torch.concat, torch.concatenate, torch.stack, call=lambda tensors, dim=0: None)
def concatenation_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """``Y = (Σ X_i²)^½``, ``G`` to each; the batch axis is excluded by the tracker's shape check."""
    each = (1.0,) * len(context.input_shapes)
    return LayerBounds(
        output_norm=lambda: math.hypot(*context.input_norms()),
        lipschitz=each,
        lipschitz_inf=each,
        output_norm_inf=lambda: context.input_norm_inf,
    )


def _entries(context: RuleContext, kwargs: dict[str, Any]) -> float:
    """How many entries each one of a mean, or of a sum, is of."""
    if kwargs["dtype"] is not None:
        raise RuleError("dtype is not supported: the bounds do not cover a coarser rounding")
    return math.prod(context.input_shape) / math.prod(context.output_shape)


@register_function_rule(torch.mean, "mean", call=lambda input, dim=None, keepdim=False, *, dtype=None: None)
def mean_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Mean over ``n`` entries: ``Y = X/√n``, ``K = 1/√n``."""
    ratio = 1.0 / _entries(context, kwargs)
    constant = math.sqrt(ratio) * (1.0 + 1e-12)
    return LayerBounds(output_norm=lambda: constant * context.input_norm, lipschitz=constant, lipschitz_inf=1.0)


@register_function_rule(torch.sum, "sum", call=lambda input, dim=None, keepdim=False, *, dtype=None: None)
def entries_sum_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Sum over ``n`` entries: ``Y = √n·X``, ``K = √n``."""
    entries = _entries(context, kwargs)
    constant = math.sqrt(entries) * (1.0 + 1e-12)
    return LayerBounds(
        output_norm=lambda: constant * context.input_norm, lipschitz=constant, lipschitz_inf=entries * (1.0 + 1e-12)
    )


@register_function_rule(operator.getitem, call=lambda input, index: None)
def slice_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """Slices ``x[:, 1:3]``, ``x[..., 0]``, ``x[:, None]``: ``Y = X``, ``K = 1``: no entry is taken twice."""
    if len(context.input_shapes) != 1:
        raise RuleError("it takes a part of what is no tensor, or at a place that is computed: neither has a bound")
    index = kwargs["index"]
    parts = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_basic, parts)):
        raise RuleError("only numbers and slices written in the code have a bound: lists and masks may repeat entries")
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    # The batch is the ellipsis' own, or a slice that leaves it as it is.
    kept = taken <= len(context.input_shape) if parts[:1] == (Ellipsis,) else parts[:1] == (slice(None),)
    if not kept:
        raise RuleError("it cuts the batch axis; begin with a full slice, x[:, ...]")
    return _rearranged(context)


def _is_basic(part: object) -> bool:
    if isinstance(part, slice):
        return all(end is None or isinstance(end, int) for end in (part.start, part.stop, part.step))
    return part is None or part is Ellipsis or (isinstance(part, int) and not isinstance(part, bool))


@register_function_rule(torch.narrow, "narrow", call=lambda input, dim, start, length: None)
@register_function_rule(torch.select, "select", call=lambda input, dim, index: None)
def narrow_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """A part of a value along an axis that is not the batch's: ``Y = X``, ``K = 1``."""
    if not all(isinstance(value, int) for name, value in kwargs.items() if name != "input"):
        raise RuleError("its place is computed; write numbers")
    _require_other_axis(context, kwargs["dim"])
    return _rearranged(context)


@register_function_rule(
    piece,
    call=lambda input, function, index, *settings, dim=0, split_size_or_sections=None, split_size=None, chunks=None: (
        None
    ),
)
def piece_function_rule(context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
    """One of the pieces that ``chunk``, ``split`` or ``unbind`` make along an axis: ``Y = X``, ``K = 1``."""
    settings = kwargs.get("settings", ())
    _require_other_axis(context, settings[-1] if len(settings) == _AXIS_AT[kwargs["function"]] else kwargs["dim"])
    return _rearranged(context)


_AXIS_AT = {"chunk": 2, "split": 2, "unbind": 1}


def _require_other_axis(context: RuleContext, dim: object) -> None:
    if not isinstance(dim, int) or dim % (len(context.input_shape) + 1) == 0:
        raise RuleError("it cuts the batch axis; give another one by a number, e.g. dim=1")
