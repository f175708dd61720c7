"""Bounds of a network's outputs over boxes of inputs, by interval arithmetic from layer to layer."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from clipless_dp.errors import Unsupported, UnsupportedModuleError
from clipless_dp.gates import CotangentGate
from clipless_dp.layers import DistanceLinear, FullSort, GroupSort, MaxMin, ScaledAvgPool2d, SortLinear
from clipless_dp.modules import kind_of

Interval = tuple[Tensor, Tensor]
"""The lowest and the highest values of each entry."""

_MONOTONE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.Tanh, nn.Flatten, nn.Unflatten, nn.Dropout, GroupSort, MaxMin, FullSort),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, ScaledAvgPool2d, CotangentGate),
)
_FUNCTIONS: tuple[Any, ...] = (torch.flatten, torch.relu, torch.tanh, functional.relu, operator.add, torch.add)
_METHODS = ("flatten", "reshape", "view", "relu", "tanh", "contiguous", "clone")
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
    return (low, high) if layer.bias is None else (low + layer.bias, high + layer.bias)


def _of_sizes(layer: DistanceLinear | SortLinear, sizes: Tensor) -> Tensor:
    """What a layer makes of differences' sizes ``(B, out, in)``, without its bias."""
    if isinstance(layer, SortLinear):
        ordered: Tensor = sizes.topk(layer.terms, -1).values * sizes.new_tensor(layer.coefficients)
        return ordered.sum(-1)
    lengths: Tensor = torch.linalg.vector_norm(sizes, ord=layer.p, dim=-1) * layer.scale
    return lengths


def _through_linear(layer: nn.Linear, interval: Interval) -> Interval:
    lowest, highest = interval
    rising, falling = layer.weight.clamp(min=0.0), layer.weight.clamp(max=0.0)
    low = functional.linear(lowest, rising) + functional.linear(highest, falling, layer.bias)
    high = functional.linear(highest, rising) + functional.linear(lowest, falling, layer.bias)
    return low, high


class _Intervals(fx.Interpreter):
    """Runs a graph on intervals."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        kind = kind_of(layer)
        if kind in (DistanceLinear, SortLinear):
            return _through_distances(layer, args[0])
        if kind is nn.Linear:
            return _through_linear(layer, args[0])
        if kind in _MONOTONE and not kwargs:
            return layer(args[0][0]), layer(args[0][1])
        raise _unknown(str(target), kind.__name__)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in _FUNCTIONS or kwargs.get("alpha", 1) != 1:
            raise _unknown(getattr(target, "__name__", str(target)), "function")
        return self._ends(lambda chosen: super(_Intervals, self).call_function(target, chosen, kwargs), args)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in _METHODS:
            raise _unknown(str(target), "method")
        return self._ends(lambda chosen: super(_Intervals, self).call_method(target, chosen, kwargs), args)

    def _ends(self, run: Callable[[tuple[Any, ...]], Tensor], args: tuple[Any, ...]) -> Interval:
        def chosen(end: int) -> tuple[Any, ...]:
            return tuple(one[end] if isinstance(one, tuple) and isinstance(one[0], Tensor) else one for one in args)

        return run(chosen(0)), run(chosen(1))


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
    found: Interval = _Intervals(graph).run((lowest, highest))
    return found
