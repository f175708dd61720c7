"""Weights brought within their constraints so that the network stays the same function, up to one factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from clipless_dp import layers
from clipless_dp.bounds.tracker import SensitivityTracker
from clipless_dp.constraints import Constraint, ConstraintSpec, assign
from clipless_dp.distributed.placement import OneProcess
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.gradient_layers import (
    GradientGatedConv1d,
    GradientGatedConv2d,
    GradientGatedConvTranspose1d,
    GradientGatedConvTranspose2d,
    GradientGatedLinear,
)
from clipless_dp.graph.tracing import TracedNet, place, trace
from clipless_dp.model.valid_inputs import random_rows
from clipless_dp.modules import kept_modes, kind_of, parameter_device_and_dtype
from clipless_dp.norms.operators import Operator
from clipless_dp.rules import find_function_rule, is_builtin
from clipless_dp.rules.pooling import AVERAGE_POOLS

_SAMPLES = 4

_SCALES = tuple(10.0**power for power in range(-8, 9, 2))
"""Of inputs: next to biases of any size each layer's values are small, alike, and large at some of them."""

_ROUNDINGS = 64.0
"""Units of rounding, of the type of the weights, that each of them may be off by."""

_AFFINE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.Embedding,
        nn.EmbeddingBag,
        GradientGatedLinear,
        GradientGatedConv1d,
        GradientGatedConv2d,
        GradientGatedConvTranspose1d,
        GradientGatedConvTranspose2d,
    }
)
"""Linear in the weight, and in input and bias together: ``(W/a)(x/c) + b/(ac) = (Wx + b)/(ac)``."""

_HOMOGENEOUS: frozenset[type[nn.Module]] = _AFFINE | {
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    layers.AbsoluteValue,
    layers.GroupSort,
    layers.MaxMin,
    layers.FullSort,
    layers.Householder,
    layers.LayerCentering,
    layers.SigmoidMix,
    layers.ConvexPotential,
    layers.ConvexPotentialConv2d,
    layers.GradientGatedConvexPotential,
    layers.GradientGatedConvexPotentialConv2d,
    layers.CotangentGate,
    layers.ScaledAvgPool2d,
    layers.ConcatReLU,
    layers.PadChannels,
    layers.SymmetricPad1d,
    layers.SymmetricPad2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    *AVERAGE_POOLS,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
}
"""``φ(cx, cb) = cφ(x, b)`` for ``c > 0``: in inputs and biases together, at any size of the input.

Piecewise linear without thresholds (ReLU, sorting, reflections, maxima), or linear. A spline has knots, a ball a
radius, an L2-norm pooling its ``ε``, a norm its floor: each at a size of its own.
"""

_FUNCTIONS = frozenset(
    {
        *("abs", "neg", "relu", "relu_", "clone", "contiguous", "mul", "div", "truediv", "add", "sub", "mean"),
        *("cat", "concat", "concatenate", "stack", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d"),
        *("flatten", "unflatten", "reshape", "view", "permute", "transpose", "swapaxes", "unsqueeze"),
        *("sum", "getitem", "narrow", "select", "piece"),
    }
)
"""The same of functions, as their rules take them: sums of two values, and products with a number."""


def rescale_(net: nn.Module, input_shape: tuple[int, ...], constraint: ConstraintSpec) -> float:
    """Divides weights by what a constraint would shrink them by, and biases by the product of that so far.

    Where every part between the layers is positively homogeneous, ``φ(cx) = cφ(x)`` for ``c > 0`` (ReLU, LeakyReLU,
    PReLU, sorting, reflections, maxima, averages, centering, sums, concatenations; not tanh, splines, balls, norms with
    a floor, L2-norm pooling with its ``ε``, or parts with rules of a user's), the network computes ``f/c`` afterwards:
    with ``W ← W/c_l`` in layer ``l`` and ``b ← b/(c_1⋯c_l)`` the values behind it are those of before over
    ``c_1⋯c_l``. What is predicted stays the same; the loss sees scores that are smaller by the factor, which its
    temperature or a last multiplication makes up for.

    Args:
        net: the network, changed in place.
        input_shape: of one sample.
        constraint: as of :class:`clipless_dp.DPLipModel`; one that scales weights and leaves their directions alone, as
            :class:`clipless_dp.constraints.Spectral` does.

    Returns:
        ``c``, at least 1 where no weight grows.

    Raises:
        ConfigurationError: a part, which is named, is not known to be positively homogeneous, or outputs of random rows
            are not those of before; paths of different factors meet (as in a residual), a weight is read twice, or the
            constraint changes directions. Nothing is changed then.
    """
    device, dtype = parameter_device_and_dtype(net)
    traced = trace(net, tuple(input_shape), device=device, dtype=dtype)
    tracker = SensitivityTracker(traced, input_norm=1.0, cotangent_norm=1.0, weights=OneProcess())
    return rescaled(net, traced, tracker.operators, assign(constraint, tracker.operators), tuple(input_shape))


@torch.no_grad()
def rescaled(
    net: nn.Module,
    traced: TracedNet,
    operators: Mapping[str, tuple[Operator, ...]],
    constraints: Mapping[str, Constraint],
    input_shape: tuple[int, ...],
) -> float:
    """As :func:`rescale_`, of a network that is traced already."""
    before = {name: value.clone() for name, value in net.named_parameters()}
    device, dtype = parameter_device_and_dtype(net)
    drawn = random_rows(traced, None, input_shape, _SAMPLES, torch.Generator().manual_seed(0)).to(device)
    rows = [scale * drawn for scale in _SCALES] if drawn.is_floating_point() else [drawn]
    expected = _outputs(net, rows, before)
    broken = [name for name, value in before.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ConfigurationError(f"{broken[0]!r} holds a NaN or an infinity: no rescaling keeps what it computes")
    # What each weight's rounding makes of the outputs, whose sums may cancel.
    rounded = _outputs(net, rows, _rounded(before, torch.finfo(dtype).eps))
    try:
        factor = _divide_(net, traced, operators, constraints)
        found = [factor * some for some in _outputs(net, rows, dict(net.named_parameters()))]
        if not all(map(_alike, expected, rounded, found)):
            raise ConfigurationError(
                "rescaled weights give another function: some part of the network is not positively homogeneous "
                "(φ(cx) = cφ(x) for c > 0), as tanh is not. Leave out rescale, or use ReLU, GroupSort and the like"
            )
    except BaseException:
        for name, value in net.named_parameters():
            value.copy_(before[name])
        raise
    return factor


def _outputs(net: nn.Module, rows: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs in evaluation mode, in float64: where a weight's own rounding is what differs."""
    held = {**dict(net.named_buffers()), **weights}
    exact = {name: value.double() if value.is_floating_point() else value for name, value in held.items()}
    with kept_modes(net):
        net.eval()
        return [functional_call(net, exact, (some,)).flatten(1) for some in rows]


def _rounded(weights: Mapping[str, Tensor], unit: float) -> dict[str, Tensor]:
    """Weights in float64, each entry a unit larger or smaller, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    moved = {}
    for name, value in weights.items():
        signs = torch.randint(2, value.shape, generator=generator, dtype=torch.float64).mul_(2.0).sub_(1.0)
        moved[name] = value.double() * (1.0 + unit * signs.to(value.device))
    return moved


def _alike(expected: Tensor, rounded: Tensor, found: Tensor) -> bool:
    """Whether outputs ``(B, n)`` are the same up to rounding: themselves, and what each sample has of its own.

    A large last bias is most of each output, and none of what tells samples apart.
    """
    parts = expected, rounded - expected, found - expected
    for some in (parts, tuple(values - values.mean(0) for values in parts)):
        size, noise, distance = (float(torch.linalg.vector_norm(values, dim=1).max()) for values in some)
        # Of float64 itself; a last bias is part of every sum.
        least = torch.finfo(torch.float64).eps * (size + float(expected.abs().max()))
        if not distance <= _ROUNDINGS * (noise + least):
            return False
    return True


def _divide_(
    net: nn.Module,
    traced: TracedNet,
    operators: Mapping[str, tuple[Operator, ...]],
    constraints: Mapping[str, Constraint],
) -> float:
    factors: dict[fx.Node, float] = {}
    seen: set[str] = set()
    for node in traced.tensor_nodes():
        entering = {factors[operand] for operand in traced.operands(node)} or {1.0}
        if max(entering) - min(entering) > 1e-9 * max(entering):
            raise ConfigurationError(
                f"paths meet at {node.name} whose weights were divided by different factors ({sorted(entering)}), so "
                "that rescaling changes the function: leave out rescale, or give weights of both the same norm"
            )
        factor = max(entering)
        _require_homogeneous(traced, node)
        if node.op == "call_module":
            leaf = traced.leaf(node)
            held = {traced.names[id(value)]: (local, value) for local, value in leaf.named_parameters()}
            if seen & held.keys():
                raise ConfigurationError(f"{sorted(seen & held.keys())} are read twice, which rescaling cannot follow")
            seen |= held.keys()
            for name in held.keys() & constraints.keys():
                shrunk = _shrink_(name, held[name][1], constraints[name], operators[name])
                if kind_of(leaf) in _AFFINE:
                    factor *= shrunk
                elif abs(shrunk - 1.0) > _ROUNDINGS * torch.finfo(held[name][1].dtype).eps:
                    raise ConfigurationError(
                        f"{name!r} is of a {type(leaf).__name__}, which is not linear in it, and its norm is above the "
                        "limit, so that rescaling changes the function: scale it before, or leave out rescale"
                    )
            for local, value in held.values():
                # Slopes, angles and shares of a mix are no values.
                if local == "bias":
                    value.div_(factor)
        factors[node] = factor
    return factors[traced.output]


def _require_homogeneous(traced: TracedNet, node: fx.Node) -> None:
    if node.op == "call_module":
        kind = kind_of(traced.leaf(node))
        known, name = kind in _HOMOGENEOUS, kind.__name__
    elif node.op in ("call_function", "call_method"):
        target = getattr(node.target, "stands_for", node.target)
        name = getattr(target, "__name__", str(target))
        rule = find_function_rule(target)
        known = name in _FUNCTIONS and rule is not None and is_builtin(rule)
    else:
        return
    if not known:
        raise ConfigurationError(
            f"{place(node)} is a {name}, of which it is not known that it is positively homogeneous (φ(cx) = cφ(x) for "
            "c > 0, at any size of x), so that rescaling may change the function: use ReLU, LeakyReLU, GroupSort, "
            "Householder, maxima or averages there, or leave out rescale, and train on from the weights as the "
            "constraint shrinks them"
        )


def _shrink_(name: str, weight: Tensor, constraint: Constraint, operators: tuple[Operator, ...]) -> float:
    """Projects a weight, and returns what it was divided by."""
    before = weight.detach().to(torch.float64, copy=True)
    constraint.project_(weight.detach(), operators)
    factor = shrinkage(before, weight)
    allowed = _ROUNDINGS * torch.finfo(weight.dtype).eps
    if float((weight.double() * factor - before).norm()) > allowed * float(before.norm()):
        raise ConfigurationError(
            f"{constraint!r} changes directions of {name!r}, and not its scale alone, so that rescaling cannot keep "
            "the function: use constraints.Spectral() on layers whose whole weight it scales, and leave tables of "
            "embeddings, whose rows it scales one by one, unconstrained or rescale out"
        )
    return factor


def shrinkage(before: Tensor, after: Tensor) -> float:
    """By which factor the Euclidean norm of a weight fell; 1 for zeros."""
    sizes = [float(torch.linalg.vector_norm(one, dtype=torch.float64)) for one in (before, after)]
    return sizes[0] / sizes[1] if min(sizes) > 0.0 else 1.0
