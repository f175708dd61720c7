"""How a traced network moves with single coordinates of its input, and how its float arithmetic rounds."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from clipless_dp.bounds.sweep import named_parameters
from clipless_dp.distributed.placement import Placement
from clipless_dp.errors import Unsupported, UnsupportedModuleError
from clipless_dp.gates import GradientGatedLinear
from clipless_dp.graph.tracing import TracedNet, function_name, place
from clipless_dp.layers.coordinates import INCREASING, OVERWRITES, Slopes, pulled_back, reason_against, shared
from clipless_dp.layers.monotone import BoxProjection, MonotoneLift
from clipless_dp.layers.sorting import FullSort, GroupSort
from clipless_dp.modules import kind_of
from clipless_dp.norms.rounding import exact_float64, gamma

_LINEAR = (nn.Linear, GradientGatedLinear)
_SLOPES: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((torch.relu, functional.relu, "relu", torch.tanh, functional.tanh, "tanh"), (0.0, 1.0)),
    **dict.fromkeys((torch.abs, "abs"), (-1.0, 1.0)),
    **dict.fromkeys((torch.neg, operator.neg, "neg"), (-1.0, -1.0)),
    **dict.fromkeys((torch.flatten, "flatten", "reshape", "view", torch.reshape, "contiguous", "clone"), (1.0, 1.0)),
}
_SUMS = (operator.add, torch.add, "add")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_FLAT = "monotone networks read rows (batch, columns), and no value in them has other axes"


def coordinate_slopes(traced: TracedNet, weights: Placement) -> Slopes:
    """``J`` with ``f(y) - f(x) = J(y - x)``: bounds of its entries that hold for all ``x`` and ``y``.

    Values go back from the output, those of all consumers added up. Scalar functions at the end are taken last: they
    multiply ``J``'s rows by slopes of one sign, whatever ways lead from the input to there.

    Args:
        traced: the network.
        weights: where its weights are.

    Raises:
        UnsupportedModuleError: lists every part whose slopes by coordinate are not known, with the reason.
    """
    refuse(traced)
    node, head = traced.output, []
    while (slopes := _scalar(traced, node)) is not None:
        head.append(slopes)
        (node,) = traced.operands(node)
    found = _swept(traced, node, weights)
    for least, largest in reversed(head):
        found = found.scaled(least, largest)
    return found


def _scalar(traced: TracedNet, node: fx.Node) -> tuple[float, float] | None:
    """The slopes of a scalar function of one value; ``None`` for everything else."""
    if node.op == "call_module":
        leaf = traced.leaf(node)
        return INCREASING.get(kind_of(leaf))
    if node.op == "placeholder":
        return None
    if node.target in _PRODUCTS and len(traced.operands(node)) == 1:
        factor = next(float(one) for one in (*node.args, *node.kwargs.values()) if isinstance(one, (int, float)))
        return factor, factor
    return _SLOPES.get(node.target)


def _swept(traced: TracedNet, output: fx.Node, weights: Placement) -> Slopes:
    """From one node back to the input."""
    known: dict[fx.Node, Slopes] = {output: Slopes.identity(math.prod(traced.shapes[output]))}
    for node in reversed(list(traced.tensor_nodes())):
        slopes = known.get(node)
        if slopes is None:
            continue
        if node.op == "placeholder":
            return slopes
        for source, back in _ways(traced, node, slopes, weights):
            known[source] = known[source].plus(back) if source in known else back
    outputs, columns = math.prod(traced.shapes[output]), math.prod(_source(traced))
    zeros = torch.zeros(outputs, columns, dtype=torch.float64)
    return Slopes(zeros, zeros, zeros.sum(1))


def _source(traced: TracedNet) -> tuple[int, ...]:
    return next(traced.shapes[node] for node in traced.tensor_nodes() if node.op == "placeholder")


def _ways(traced: TracedNet, node: fx.Node, slopes: Slopes, weights: Placement) -> list[tuple[fx.Node, Slopes]]:
    sources = traced.operands(node)
    if (scalar := _scalar(traced, node)) is not None:
        return [(sources[0], slopes.scaled(*scalar))]
    if node.op != "call_module":
        sign, read = 1.0 if node.target in _SUMS else -1.0, traced.arguments(node)
        return [(read["input"], slopes), (read["other"], slopes.scaled(sign, sign))]
    leaf = traced.leaf(node)
    if isinstance(leaf, MonotoneLift):
        return [(sources[0], slopes.linear(leaf.matrix()))]
    weight = weights.whole(named_parameters(leaf)["weight"]) if kind_of(leaf) in _LINEAR else None
    return [(sources[0], pulled_back(leaf, slopes, weight))]


def refuse(traced: TracedNet) -> None:
    """Refuses a network with a part whose slopes by coordinate are not known.

    Raises:
        UnsupportedModuleError: lists every such part, with the reason.
    """
    refused = []
    for node in traced.tensor_nodes():
        reason = None if node.op == "placeholder" else _against(traced, node)
        if reason is None and len(traced.shapes[node]) > 1:
            reason = _FLAT
        if reason is not None:
            name = type(traced.leaf(node)).__name__ if node.op == "call_module" else function_name(node)
            refused.append(Unsupported(place(node), name, reason))
    if refused:
        raise UnsupportedModuleError(refused, monotone=True)


def _against(traced: TracedNet, node: fx.Node) -> str | None:
    if node.op == "call_module":
        leaf = traced.leaf(node)
        return None if isinstance(leaf, MonotoneLift) else reason_against(leaf)
    if traced.overwrites(node):
        return OVERWRITES
    if _scalar(traced, node) is not None:
        return None
    if node.target in (*_SUMS, operator.sub, torch.sub, "sub"):
        return None if _is_plain_sum(traced, node) else "only sums and differences of two values of one shape are known"
    return "how its outputs move with single coordinates is not known: use layers that are modules, and sums"


def _is_plain_sum(traced: TracedNet, node: fx.Node) -> bool:
    read = traced.arguments(node)
    shapes = [traced.shapes.get(read.get(name)) for name in ("input", "other")]  # type: ignore[arg-type]
    return read.get("alpha") == 1 and shapes[0] is not None and shapes[0] == shapes[1]


def has_lift(traced: TracedNet) -> bool:
    """Whether a network means to be monotone."""
    return any(
        isinstance(traced.leaf(node), MonotoneLift) for node in traced.tensor_nodes() if node.op == "call_module"
    )


def boxes(traced: TracedNet) -> list[BoxProjection]:
    """The boxes that all of a network's input goes through first; none where something else reads it too."""
    source = next(node for node in traced.tensor_nodes() if node.op == "placeholder")
    found = [traced.leaf(user) if user.op == "call_module" else None for user in source.users]
    kept = [leaf for leaf in found if isinstance(leaf, BoxProjection)]
    return kept if len(kept) == len(found) else []


def rounding(traced: TracedNet, weights: Placement, dtype: torch.dtype) -> float:
    """How far an output, computed in a floating-point type, may lie from that of real arithmetic, at most.

    Forwards from the boxes, entry by entry: ``|x|`` is at most ``m``, and what is computed is off by at most ``e``. A
    linear map of ``n`` inputs makes ``|W|m + |b|`` and ``|W|e + γ_{n+2}(|W|(m + e) + |b|)`` of these (Higham 2002,
    §3.5), sorts the largest of their group, scalar functions round three times, sums once.

    Args:
        traced: a network that :func:`refuse` has nothing against.
        weights: where its weights are.
        dtype: of the pass.

    Returns:
        The bound; infinite without a box, and where a value may leave what the type holds.
    """
    if not boxes(traced):
        return math.inf
    unit = torch.finfo(dtype).eps / 2
    largest = 0.0
    known: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    for node in traced.tensor_nodes():
        if node.op == "placeholder":
            continue
        size, error = known[node] = _rounded(traced, node, known, weights, unit)
        largest = max(largest, float((size.abs() + error).max()))
    if not largest <= torch.finfo(dtype).max / 2.0:
        return math.inf
    return float(known[traced.output][1].max()) * (1.0 + 1e-6)


def _rounded(
    traced: TracedNet, node: fx.Node, known: dict[fx.Node, tuple[Tensor, Tensor]], weights: Placement, unit: float
) -> tuple[Tensor, Tensor]:
    sources = traced.operands(node)
    leaf = traced.leaf(node) if node.op == "call_module" else None
    if isinstance(leaf, BoxProjection):
        limits = torch.tensor(leaf.limits(math.prod(traced.shapes[node])), dtype=torch.float64)
        limits = limits.expand(math.prod(traced.shapes[node]))
        # The same cut for all rows, so that a corner's own rounding moves none against another.
        before = known.get(sources[0])
        return limits, torch.zeros_like(limits) if before is None else before[1]
    if len(sources) == 2:
        (first, one), (second, other) = known[sources[0]], known[sources[1]]
        size = first + second
        return size, one + other + unit * (size + one + other)
    size, error = known[sources[0]]
    if isinstance(leaf, MonotoneLift):
        return _linear(leaf.matrix(), None, size, error, max(unit, gamma(len(leaf.signs))))
    if leaf is not None and kind_of(leaf) in _LINEAR:
        own = {name: exact_float64(weights.whole(one)).cpu() for name, one in named_parameters(leaf).items()}
        return _linear(own["weight"], own.get("bias"), size, error, _product_error(own["weight"].shape[1] + 2, unit))
    if isinstance(leaf, (GroupSort, FullSort)):
        groups = leaf.groups(len(size))
        size, error = (shared(part[groups].amax(1, keepdim=True), groups) for part in (size, error))
        return size, error
    least, largest = _scalar(traced, node) or sorted((float(getattr(leaf, "negative_slope", 1.0)), 1.0))
    factor = max(abs(least), abs(largest))
    # A sigmoid has ½ at zero.
    offset = 0.5 if isinstance(leaf, nn.Sigmoid) else 0.0
    return factor * size + offset, factor * error + 3.0 * unit * (factor * (size + error) + offset)


def _product_error(terms: int, unit: float) -> float:
    share = terms * unit
    return share / (1.0 - share) if share < 0.5 else math.inf


def _linear(weight: Tensor, bias: Tensor | None, size: Tensor, error: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    shift = 0.0 if bias is None else bias.abs()
    made = weight.abs() @ size + shift
    missed = weight.abs() @ error
    return made, missed + relative * (made + missed)
