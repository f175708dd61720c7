"""Which function a network computes, as hashes: of its graph, layers and settings, and of what it answers."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence, Set
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from clipless_dp.gates import CotangentGate, input_gate
from clipless_dp.gates.gradient_layers import GradientGated
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.isolation import Isolated
from clipless_dp.model.surroundings import is_out_of_memory
from clipless_dp.modules import kind_of

_DEPTH = 8
"""How far objects within objects are followed."""

_PASSED = (CotangentGate, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
"""What returns its input in ``eval`` mode."""

_GATES = frozenset({"limit", "bias_limit", "mode", "floor", "chunk", "joint", "adaptive"})
"""What a gradient gate adds to its layer, and no value depends on."""

_UNUSED = frozenset({*vars(nn.Module()), "inplace"})
"""What is told apart elsewhere (weights, children), or changes no value."""


def function_of(network: nn.Module | TracedNet) -> str:
    """A hash of what a network computes with its weights in ``eval`` mode, the same on every device.

    Of a traced network it covers the nodes of its graph with their arguments, and kinds and settings of its layers; of
    another module kinds and settings of all modules in it, and the code of those that are neither torch's nor this
    package's. Gates of gradients, and dropout, change no value and are left out: a gated layer is as torch's own.
    Weights and buffers that are saved with them are not covered, see :func:`clipless_dp.modules.digest_of`.

    It is of what the code says, and does not follow all that code may read: attributes of classes, other methods than
    ``forward``, globals, hooks, modules in plain lists, objects without attributes. :func:`answers_of` stands beside
    it, for these. Networks of different hashes may compute the same.
    """
    told = _graph(network) if isinstance(network, TracedNet) else _module(network, ())
    return hashlib.sha256(repr(told).encode()).hexdigest()


@torch.no_grad()
def answers_of(forward: Callable[[Tensor], Any], shape: Sequence[int], device: torch.device) -> str:
    """A hash of what a function returns for eight fixed inputs, whatever code computes it.

    Answers count in steps of ``2⁻¹⁶`` of the largest, so that it is the same on devices and libraries that sum in
    another order. Functions that differ by less, or at other inputs alone, have the same hash: two of one
    :func:`function_of` and weights that differ by a threshold's position, say.

    Args:
        forward: maps float64 inputs ``(8, *shape)`` to a tensor of any shape. What it raises is its answer.
        shape: of one input.
        device: where inputs are put.
    """
    inputs = _fixed_inputs(shape).to(device)
    try:
        found = forward(inputs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"none, {type(error).__name__}"
    if not isinstance(found, Tensor) or found.is_complex():
        return f"none, {type(found).__name__}"
    values = found.detach().double().cpu()
    largest = float(values[values.isfinite()].abs().amax()) if bool(values.isfinite().any()) else 0.0
    # Steps of a power of two, and borders away from fractions with few digits, so that rounding crosses none.
    exponent = math.frexp(largest * (1.0 + 2.0**-20))[1]
    steps = torch.floor(torch.ldexp(values, torch.tensor(16 - exponent)) + 0.38)
    told = tuple(values.shape), exponent, _numbers(steps + 0.0)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def answers_of_graph(traced: TracedNet, shape: Sequence[int], input_norm: float) -> str:
    """The same of a traced network in ``eval`` mode and float64, behind an input gate where its norm is finite."""
    net = traced.copied().eval()
    held = next(net.parameters(), torch.empty(0)).device
    device = torch.device("cpu") if held.type == "mps" else held
    net = net.to(device, torch.float64)

    def forward(inputs: Tensor) -> Any:
        return net(input_gate(inputs, input_norm)[0] if math.isfinite(input_norm) else inputs)

    return answers_of(forward, shape, device)


def _fixed_inputs(shape: Sequence[int]) -> Tensor:
    """Of both signs and several sizes, and within [0, 1]: ``(8, *shape)`` in float64, the same everywhere."""
    size = 8 * math.prod(shape)
    drawn = np.frombuffer(hashlib.shake_256(b"clipless_dp answers").digest(8 * size), dtype="<u8")
    values = torch.from_numpy((drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(8, *shape)
    sizes = torch.tensor([0.125, 1.0, 4.0, 16.0], dtype=torch.float64).reshape(-1, *([1] * len(shape)))
    return torch.cat(((2.0 * values[:4] - 1.0) * sizes, values[4:]))


def _graph(traced: TracedNet) -> list[Any]:
    places: dict[fx.Node, int] = {}
    told: list[Any] = []
    for node in traced.module.graph.nodes:
        if node.op == "call_module":
            leaf = traced.leaf(node)
            if isinstance(leaf, _PASSED):
                places[node] = places[node.all_input_nodes[0]]
                continue
            # Layers without weights are known by what they are, wherever they are.
            path = str(node.target) if next(leaf.parameters(), None) is not None else ""
            what: Any = path, _module(leaf, ())
        elif node.op == "get_attr":
            held = functools.reduce(getattr, str(node.target).split("."), traced.module)
            what = str(node.target) if isinstance(held, nn.Parameter) else _told(held, ())
        elif node.op == "call_function":
            what = _name(getattr(node.target, "stands_for", node.target))
        else:
            # A method's name; the names of what comes in and goes out say nothing.
            what = node.target if node.op == "call_method" else ""
        arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda one: _Place(places[one]))
        places[node] = len(told)
        told.append((node.op, what, _told(arguments, ())))
    return told


class _Place(int):
    """A node among an argument's values, by its number."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _module(module: nn.Module, above: tuple[int, ...]) -> list[Any]:
    """Kinds and settings of a module and of what is in it."""
    if isinstance(module, Isolated):
        return [("isolated", _told(module.select, above)), *_module(module.net, above)]
    told: list[Any] = []
    for name, part in module.named_modules():
        if isinstance(part, _PASSED):
            continue
        kind = kind_of(part)
        if isinstance(part, GradientGated):
            # The layer that it is the gated form of.
            kind = next(
                base for base in kind.__mro__ if issubclass(base, nn.Module) and not issubclass(base, GradientGated)
            )
        own = vars(part)
        if kind.__module__.startswith("torch.nn.modules") and issubclass(kind, (nn.Linear, nn.modules.conv._ConvNd)):
            settings: Mapping[str, Any] = {key: getattr(part, key, None) for key in kind.__constants__}
        else:
            unused = _UNUSED | _GATES if isinstance(part, GradientGated) else _UNUSED
            settings = {key: own[key] for key in own if key not in unused and not key.startswith("__")}
        unsaved = {
            key: part._buffers[key] for key in part._non_persistent_buffers_set if not isinstance(part, GradientGated)
        }
        known = kind.__module__.partition(".")[0] in ("torch", "clipless_dp")
        code = () if known else _told(kind.forward, above)
        inside = (*above, id(part))
        told.append((name, _name(kind), _told(settings, inside), _told(unsaved, inside), code))
    return told


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _told(value: Any, above: tuple[int, ...]) -> Any:
    """A value in strings, numbers and tuples whose ``repr`` is the same in every process.

    Args:
        value: anything.
        above: what it is held by, which is not told again.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, range, slice)):
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _numbers(torch.as_tensor(value))
    if isinstance(value, type):
        return _name(value)
    if id(value) in above or len(above) >= _DEPTH:
        return _name(type(value))
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return "mapping", tuple((_told(key, above), _told(one, above)) for key, one in value.items())
    if isinstance(value, Set):
        return "set", tuple(sorted(repr(_told(one, above)) for one in value))
    if isinstance(value, Sequence):
        return tuple(_told(one, above) for one in value)
    if isinstance(value, nn.Module):
        return tuple(_module(value, above))
    return _code(value, above)


def _code(value: Any, above: tuple[int, ...]) -> Any:
    """The same of functions, and of objects by their attributes."""
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, _told(value.co_consts, above)
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return _name(value), *(_told(one, above) for one in (value.__code__, value.__defaults__, cells))
    if isinstance(value, MethodType):
        return _told(value.__func__, above)
    if isinstance(value, functools.partial):
        return tuple(_told(one, above) for one in (value.func, value.args, value.keywords))
    if isinstance(value, (BuiltinFunctionType, torch.device, torch.Generator)):
        return _name(value)
    return _name(type(value)), _told(getattr(value, "__dict__", None), above)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _numbers(values: Tensor) -> tuple[Any, ...]:
    held = values.detach().cpu().contiguous()
    content = hashlib.sha256(held.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return str(held.dtype), tuple(held.shape), content
