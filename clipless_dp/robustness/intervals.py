"""Bounds of a network's outputs over boxes of inputs, by interval arithmetic from layer to layer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from clipless_dp.errors import Unsupported, UnsupportedModuleError
from clipless_dp.gates import CotangentGate
from clipless_dp.layers import AbsoluteValue, DistanceLinear, FullSort, GroupSort, MaxMin, ScaledAvgPool2d, SortLinear
from clipless_dp.layers.distance import p_norms
from clipless_dp.modules import kind_of


class Interval(NamedTuple):
    """The lowest and the highest values of each entry."""

    low: Tensor
    high: Tensor


_MONOTONE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.Tanh, nn.Flatten, nn.Unflatten, nn.Dropout, GroupSort, MaxMin, FullSort),
    *(nn.MaxPool2d, CotangentGate),
)
_AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, ScaledAvgPool2d)
_FUNCTIONS: tuple[Any, ...] = (
    *(torch.flatten, torch.reshape, torch.relu, torch.tanh, functional.relu, functional.tanh),
    *(operator.add, torch.add, torch.cat, torch.concat, torch.concatenate, torch.stack),
    *("flatten", "reshape", "view", "relu", "tanh", "contiguous", "clone", "add"),
    *(torch.unflatten, "unflatten", torch.mean, "mean", functional.max_pool2d),
)
"""Which rise with every entry of every operand."""
_EITHER_WAY: tuple[Any, ...] = (
    *(operator.mul, torch.mul, "mul", operator.truediv, torch.div, "div"),
    *(operator.neg, torch.neg, "neg", functional.avg_pool2d, functional.adaptive_avg_pool2d),
)
"""Of one value, whose ends they keep in order or turn around: weights of one sign, and of either."""
_DIFFERENCES: tuple[Any, ...] = (operator.sub, torch.sub, "sub")
_SIZES: tuple[Any, ...] = (torch.abs, "abs")
_SHAPES: tuple[Any, ...] = (getattr, "size")
_CHUNK = 1 << 20


def _through_distances(layer: DistanceLinear | SortLinear, interval: Interval) -> Interval:
    """A distance rises with each ``|x_i - w_i|``, whose least and largest values over an interval are known."""
    lowest, highest = interval
    rows = max(1, _CHUNK // layer.weight.numel())
    ends: tuple[list[Tensor], list[Tensor]] = ([], [])
    for low, high in zip(lowest.split(rows), highest.split(rows), strict=True):
        above, below = low[:, None, :] - layer.weight, layer.weight - high[:, None, :]
        nearest = torch.maximum(above, below).clamp(min=0.0)
        farthest = torch.maximum(-above, -below)
        for kept, sizes in zip(ends, (nearest, farthest), strict=True):
            kept.append(_of_sizes(layer, sizes))
    low, high = (torch.cat(parts) for parts in ends)
    return Interval(low, high) if layer.bias is None else Interval(low + layer.bias, high + layer.bias)


def _of_sizes(layer: DistanceLinear | SortLinear, sizes: Tensor) -> Tensor:
    """What a layer makes of differences' sizes ``(B, out, in)``, without its bias."""
    if isinstance(layer, SortLinear):
        ordered: Tensor = sizes.topk(layer.terms, -1).values * sizes.new_tensor(layer.coefficients)
        return ordered.sum(-1)
    return p_norms(sizes, layer.p) * layer.scale


def _through_linear(layer: nn.Linear, interval: Interval) -> Interval:
    lowest, highest = interval
    rising, falling = layer.weight.clamp(min=0.0), layer.weight.clamp(max=0.0)
    low = functional.linear(lowest, rising) + functional.linear(highest, falling, layer.bias)
    high = functional.linear(highest, rising) + functional.linear(lowest, falling, layer.bias)
    return Interval(low, high)


def _in_order(one: Tensor, other: Tensor) -> Interval:
    return Interval(torch.minimum(one, other), torch.maximum(one, other))


def _sizes(interval: Interval) -> Interval:
    low, high = interval
    return Interval(torch.maximum(low, -high).clamp(min=0.0), torch.maximum(-low, high))


def _at(value: Any, end: int) -> Any:
    """Arguments of a call with each interval's one end in its place."""
    if isinstance(value, Interval):
        return value[end]
    if isinstance(value, (tuple, list)):
        return [_at(one, end) for one in value]
    return {name: _at(one, end) for name, one in value.items()} if isinstance(value, dict) else value


def _intervals(value: Any) -> list[Interval]:
    if isinstance(value, Interval):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for one in value for found in _intervals(one)] if isinstance(value, (tuple, list)) else []


class _Intervals(fx.Interpreter):
    """Runs a graph on intervals."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        kind = kind_of(layer)
        (value,) = (*args, *kwargs.values())
        if kind in (DistanceLinear, SortLinear):
            return _through_distances(layer, value)
        if kind is nn.Linear:
            return _through_linear(layer, value)
        if kind is AbsoluteValue:
            return _sizes(value)
        if kind in _MONOTONE:
            return Interval(layer(value.low), layer(value.high))
        if kind in _AVERAGES:
            # A divisor may be negative.
            return _in_order(layer(value.low), layer(value.high))
        raise _unknown(str(target), kind.__name__)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._called(
            target, getattr(target, "__name__", str(target)), "function", super().call_function, args, kwargs
        )

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._called(target, str(target), "method", super().call_method, args, kwargs)

    def _called(
        self, target: Any, name: str, kind: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        operands = _intervals((args, kwargs))
        if not operands:
            return run(target, args, kwargs)
        known = getattr(target, "stands_for", target)
        if known in _SHAPES:
            # Which are alike at both ends.
            return run(target, tuple(_at(args, 0)), _at(kwargs, 0))
        first = args[0] if args else kwargs.get("input")
        if kwargs.get("alpha", 1) == 1:
            if known in _FUNCTIONS or (known in _EITHER_WAY and len(operands) == 1 and not _divides(known, first)):
                low, high = (run(target, tuple(_at(args, end)), _at(kwargs, end)) for end in (0, 1))
                return Interval(low, high) if known in _FUNCTIONS else _in_order(low, high)
            if known in _DIFFERENCES and len(operands) == 2 and isinstance(first, Interval):
                other = args[1] if len(args) > 1 else kwargs["other"]
                return Interval(first.low - other.high, first.high - other.low)
            if known in _SIZES and len(operands) == 1:
                return _sizes(operands[0])
        raise _unknown(name, kind)


def _divides(function: Any, first: Any) -> bool:
    """Whether a number is divided by a value, which turns signs around at zero."""
    return function in (operator.truediv, torch.div, "div") and not isinstance(first, Interval)


def _unknown(place: str, kind: str) -> UnsupportedModuleError:
    remedy = (
        "it has no interval rule: use layers of distances, nn.Linear, nn.ReLU and sorting, or certify without a box"
    )
    return UnsupportedModuleError([Unsupported(place, kind, remedy)])


@torch.no_grad()
def output_interval(graph: fx.GraphModule, lowest: Tensor, highest: Tensor) -> Interval:
    """Between which values each output lies, for all inputs between two; float64 is not rounded outwards here.

    Args:
        graph: a traced network.
        lowest: ``(B, ...)``.
        highest: likewise, nowhere below.

    Raises:
        UnsupportedModuleError: a layer has no interval rule.
    """
    found: Interval = _Intervals(graph).run(Interval(lowest, highest))
    return found
