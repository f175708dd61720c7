"""Turns a network into a graph of supported parts, with every value's shape, or says what stands in the way."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from clipless_dp.errors import CliplessError, ConfigurationError, Unsupported, UnsupportedModuleError
from clipless_dp.graph.apart import Apart
from clipless_dp.graph.dropout import DrawnDropout
from clipless_dp.graph.layouts import TRANSPOSED
from clipless_dp.graph.shapes import WRITTEN_IN_PLACE, record
from clipless_dp.isolation import Isolated
from clipless_dp.modules import is_hooked, modules_of, parameters_of
from clipless_dp.noise.randomness import left_alone
from clipless_dp.rules import find_function_rule, find_rule, named_arguments, unsupported_module
from clipless_dp.rules.embedding import TABLES, refusal
from clipless_dp.rules.graph import piece
from clipless_dp.tensor_types import refuse_coded

_BATCH_SIZES = (2, 3)
_SHAPE_METHODS = {"size", "dim", "numel"}
_SPLITS = {torch.chunk: "chunk", torch.split: "split", torch.unbind: "unbind"} | {
    name: name for name in ("chunk", "split", "unbind")
}
_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.setitem),
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class TracedNet:
    """A network as a graph.

    Attributes:
        module: executes the graph; shares every submodule with the network.
        shapes: the shape of each tensor-valued node, without the batch axis.
        names: canonical parameter name (as in ``net.named_parameters()``) by ``id``.
        vocabulary: where the network reads tokens, how many of them every embedding knows; else ``None``.
        reads: the dtype of what it reads.
        isolated: the networks in it of which nothing is known.
        limits: where these read it, for each entry of a sample the length of the table that it is looked up in, or 0.
        reads_beyond: whether it has a convolution of :class:`FreshLayouts`.
    """

    module: fx.GraphModule
    shapes: dict[fx.Node, tuple[int, ...]]
    names: dict[int, str] = field(repr=False)
    vocabulary: int | None = None
    reads: torch.dtype = torch.float32
    isolated: tuple[Isolated, ...] = ()
    limits: tuple[int, ...] = ()
    reads_beyond: bool = False

    @cached_property
    def output(self) -> fx.Node:
        """The node whose value the network returns."""
        node = next(node for node in self.module.graph.nodes if node.op == "output").args[0]
        assert isinstance(node, fx.Node)
        return node

    def rename(self, net: nn.Module) -> None:
        """Knows the parameters of the network by the tensors that they are now.

        Raises:
            ConfigurationError: they are others.
        """
        named = {id(parameter): name for name, parameter in net.named_parameters()}
        if sorted(named.values()) != sorted(self.names.values()):
            raise ConfigurationError(
                "a parameter that two layers share was split apart: call fully_shard on a module that holds both"
            )
        self.names.clear()
        self.names.update(named)

    def tensor_nodes(self) -> Iterator[fx.Node]:
        """Nodes with a tensor value, in the order of execution."""
        return (node for node in self.module.graph.nodes if node in self.shapes)

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The tensor-valued arguments of a node, in order, repeated where an argument is."""
        known = self._operands.get(node)
        if known is None:
            found: list[fx.Node] = []
            fx.node.map_arg((node.args, node.kwargs), lambda arg: found.append(arg) if arg in self.shapes else None)
            self._operands[node] = known = tuple(found)
        return known

    @cached_property
    def _operands(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        # The graph stays as it was traced; bounds are asked for in each step.
        return {}

    @cached_property
    def consumers(self) -> dict[fx.Node, list[tuple[fx.Node, int]]]:
        """Which nodes read a value, and at which place."""
        found: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        for node in self.tensor_nodes():
            for position, source in enumerate(self.operands(node)):
                found.setdefault(source, []).append((node, position))
        return found

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of a function's or a method's call by their names, whatever order they are written in.

        Empty where its rule knows no such call.
        """
        return named_arguments(node.target, node.args, node.kwargs) or {}

    def overwrites(self, node: fx.Node) -> bool:
        """Whether a node works in place: the value that it reads, which others may hold, is another one behind it."""
        if node.op == "call_module":
            return bool(getattr(self.leaf(node), "inplace", False))
        if node.op not in ("call_function", "call_method"):
            return False
        read = {**node.kwargs, **self.arguments(node)}
        of_operator = node.target in _IN_PLACE or function_name(node).endswith("_")
        return of_operator or bool(read.get("inplace")) or read.get("out") is not None

    def leaf(self, node: fx.Node) -> nn.Module:
        """The network's module that a ``call_module`` node calls."""
        run = self.executed(node)
        return run.layer if isinstance(run, (DrawnDropout, Apart)) else run

    def executed(self, node: fx.Node) -> nn.Module:
        """What runs there: the same, but for what draws its random numbers elsewhere, or runs in a graph of its own."""
        return self.module.get_submodule(str(node.target))

    def trains_in_layers(self, wanted: Callable[[nn.Module], bool]) -> bool:
        """Whether all parameters that train are held, and read, by layers that are wanted alone, none within others."""
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                layer = self.leaf(node)
                trains = any(parameter.requires_grad for parameter in parameters_of(layer))
                if not wanted(layer) and (trains or any(map(wanted, modules_of(layer)))):
                    return False
            elif node.op == "get_attr":
                held = attrgetter(str(node.target))(self.module)
                if isinstance(held, nn.Parameter) and held.requires_grad:
                    return False
        return True

    def copied(self) -> fx.GraphModule:
        """A copy of the network as the graph runs it, with layers of its own, and torch's dropout."""
        graph = copy.deepcopy(self.module.graph)
        held: dict[str, Any] = {}
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                held[str(node.target)] = self.leaf(node)
            elif node.op == "get_attr":
                held[str(node.target)] = attrgetter(str(node.target))(self.module)
        for node in graph.nodes:
            # What runs a function apart closes over the model.
            node.target = getattr(node.target, "stands_for", node.target)
        # At once, so that what is shared stays shared.
        return fx.GraphModule(copy.deepcopy(held), graph)


class _Proxy(fx.Proxy):
    """Marks what is written in place (``h += t``): the graph, which makes a new value of it, is another function."""

    def _marked(self, value: Any) -> Any:
        value.node.meta[WRITTEN_IN_PLACE] = True
        return value

    def __iadd__(self, other: Any) -> Any:
        return self._marked(self + other)

    def __isub__(self, other: Any) -> Any:
        return self._marked(self - other)

    def __imul__(self, other: Any) -> Any:
        return self._marked(self * other)

    def __itruediv__(self, other: Any) -> Any:
        return self._marked(self / other)


_tracing = threading.RLock()
"""Held while a network is traced: torch puts wrappers around all modules meanwhile, and takes them off in order."""


class _Tracer(fx.Tracer):
    """Leaves what other threads do with modules meanwhile as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is bounded as one piece rather than traced through."""
    if find_rule(module) is not None or parametrize.is_parametrized(module):
        return True
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, _CONTAINERS)


def symbolic_trace(net: nn.Module) -> fx.GraphModule:
    """Traces a network down to the modules that have a rule (and torch's own).

    Raises:
        UnsupportedModuleError: control flow that depends on data, or another construct that cannot be traced.
    """
    root = nn.Sequential(net) if is_leaf(net) else net
    try:
        with _tracing:
            graph = _Tracer().trace(root)
    except Exception as error:
        parts = [
            unsupported_module(path, module)
            for path, module in root.named_modules()
            if is_leaf(module) and find_rule(module) is None
        ]
        parts.append(
            Unsupported(
                "forward",
                type(net).__name__,
                f"could not be traced ({type(error).__name__}: {error}); avoid control flow that depends on values, "
                "or register a rule for the module that contains it",
            )
        )
        raise UnsupportedModuleError(parts) from error
    _take_pieces_apart(graph)
    return fx.GraphModule(root, graph)


def _take_pieces_apart(graph: fx.Graph) -> None:
    """Replaces tuples of pieces, of which each is taken by its number, by the pieces: other values are tensors."""
    for node in list(graph.nodes):
        name = _SPLITS.get(node.target)
        users = list(node.users)
        taken = [user.target is getitem and isinstance(user.args[1], int) for user in users]
        if name is None or not users or not all(taken) or not node.args:
            continue
        for user in users:
            with graph.inserting_before(user):
                settings = (node.args[0], name, user.args[1], *node.args[1:])
                made = graph.call_function(piece, settings, dict(node.kwargs))
            made.meta.update(node.meta)
            user.replace_all_uses_with(made)
            graph.erase_node(user)
        graph.erase_node(node)


@left_alone()
def trace(net: nn.Module, input_shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> TracedNet:
    """Traces a network and checks that each part is supported and keeps samples apart.

    Args:
        net: the network; it takes one tensor and returns one. If it has embeddings, the tensor holds tokens.
        input_shape: shape of one sample, without the batch axis.
        device: where the network's parameters are.
        dtype: their dtype.

    Generators that all code shares are behind it where they were.

    Raises:
        UnsupportedModuleError: lists every part without a rule, or that mixes samples.
        ConfigurationError: the network does not accept inputs of this shape, or holds tensors of a type with code of
            its own.
    """
    refuse_coded(net)
    module = symbolic_trace(net)
    _refuse([*without_rule(module), *_misused_tokens(module)])
    vocabulary = min((leaf.weight.shape[0] for _, leaf in _tables(module)), default=None)
    isolated = [leaf for leaf in _leaves(module) if isinstance(leaf, Isolated)]
    kind = _kind_of_inputs(module, isolated, input_shape, device, dtype) if vocabulary is None else torch.int64
    recorders = [record(module, (size, *input_shape), device, kind) for size in _BATCH_SIZES]
    limits = _limits(module)
    if kind == torch.int64 and vocabulary is None and not _packs(isolated) and len({*limits}) == 1:
        vocabulary = limits[0] or None
    runs = [recorder.shapes for recorder in recorders]
    public = [recorder.public for recorder in recorders]
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    mixing: list[Unsupported] = []
    for node in module.graph.nodes:
        if isinstance(public[0].get(node), (int, float)) and node.op == "call_function" and node.target is not getitem:
            if any(public[0].get(source) != public[1].get(source) for source in node.all_input_nodes):
                remedy = "arithmetic on the batch size may regroup samples; use x.shape[0] as it is, or -1"
                mixing.append(Unsupported(place(node), function_name(node), remedy))
            continue
        if node not in runs[0]:
            continue
        first, second = runs[0][node], runs[1][node]
        if node.op in ("call_function", "call_method") and find_function_rule(node.target) is None:
            mixing.append(
                Unsupported(
                    place(node),
                    function_name(node),
                    "a tensor made inside forward has no bound; hold it in a module that has a rule",
                )
            )
        elif first[:1] + second[:1] != _BATCH_SIZES or first[1:] != second[1:]:
            mixing.append(
                Unsupported(
                    place(node),
                    str(node.target),
                    "it moves or merges the batch axis, which mixes samples; keep axis 0",
                )
            )
        shapes[node] = first[1:]
    _refuse(mixing)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    layouts = recorders[0].layouts
    if layouts.transposed:
        raise ConfigurationError(f"the network has {TRANSPOSED}")
    traced = TracedNet(module, shapes, names, vocabulary, kind, tuple(isolated), limits, layouts.met)
    if not isinstance(_output_value(module), fx.Node) or traced.output not in shapes:
        raise ConfigurationError("the network must return one tensor")
    return traced


def _leaves(module: fx.GraphModule) -> Iterator[nn.Module]:
    for node in module.graph.nodes:
        if node.op == "call_module":
            yield module.get_submodule(str(node.target))


def _packs(isolated: Sequence[Isolated]) -> bool:
    return any(leaf.packing is not None for leaf in isolated)


def _limits(module: fx.GraphModule) -> tuple[int, ...]:
    """The tables that entries of a sample are looked up in, by the isolated networks that read it."""
    found: tuple[int, ...] = ()
    for node in module.graph.nodes:
        if node.op == "call_module" and node.args and getattr(node.args[0], "op", None) == "placeholder":
            leaf = module.get_submodule(str(node.target))
            if isinstance(leaf, Isolated):
                pairs = zip(found or leaf.limits, leaf.limits, strict=True)
                found = tuple(min(one, other) or max(one, other) for one, other in pairs)
    return found if any(found) else ()


def _kind_of_inputs(
    module: fx.GraphModule,
    isolated: Sequence[Isolated],
    input_shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.dtype:
    """The dtype that the network reads: where nothing is known of it, it is tried."""
    for leaf in isolated:
        leaf.forget()
        if leaf.packing is not None:
            return torch.int64 if leaf.packing.is_integral else dtype
    if not isolated:
        return dtype
    try:
        record(module, (2, *input_shape), device, dtype)
    except (CliplessError, RuntimeError) as error:
        for leaf in isolated:
            leaf.forget()
        try:
            record(module, (2, *input_shape), device, torch.int64)
        except (CliplessError, RuntimeError):
            raise error from None
        return torch.int64
    return dtype


def place(node: fx.Node) -> str:
    """A traced node's name, after the path of the module whose ``forward`` it is in."""
    if node.op == "call_module":
        return str(node.target)
    around = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return f"{around[-1]}.{node.name}" if around else node.name


def function_name(node: fx.Node) -> str:
    """What a node calls, as its own name says."""
    return getattr(node.target, "__name__", str(node.target))


def _output_value(module: fx.GraphModule) -> Any:
    return next(node for node in module.graph.nodes if node.op == "output").args[0]


def _refuse(parts: list[Unsupported]) -> None:
    if parts:
        raise UnsupportedModuleError(parts)


def without_rule(module: fx.GraphModule) -> Iterator[Unsupported]:
    """The parts of a traced network of which no bound is known."""
    inputs = 0
    for node in module.graph.nodes:
        if node.op == "placeholder":
            inputs += 1
            if inputs > 1:
                yield Unsupported(node.name, "argument", "the network must take exactly one tensor")
        elif node.op == "get_attr":
            yield Unsupported(
                str(node.target),
                "parameter or buffer used in forward",
                "hold it in a torch module such as nn.Linear, or register a rule for the module that owns it",
            )
        elif node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            if parametrize.is_parametrized(leaf):
                yield Unsupported(
                    str(node.target),
                    type(leaf).__name__,
                    "a parametrisation amplifies gradients without a bound; remove it and pass a constraint instead",
                )
            elif find_rule(leaf) is None:
                yield unsupported_module(str(node.target), leaf)
            elif is_hooked(leaf):
                remedy = "its hooks, or a forward of its own, may change values or gradients; remove them"
                yield Unsupported(str(node.target), type(leaf).__name__, remedy)
        elif node.op in ("call_function", "call_method"):
            if _about_shapes(node) or find_function_rule(node.target) is not None:
                continue
            yield Unsupported(
                place(node),
                function_name(node),
                "no bound is known for this function; use a module or function that has one",
            )


def _tables(module: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Embedding | nn.EmbeddingBag]]:
    for node in module.graph.nodes:
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(leaf, TABLES):
            yield node, leaf


def _misused_tokens(module: fx.GraphModule) -> Iterator[Unsupported]:
    """Embeddings whose settings leak, embeddings of anything but the input, and other uses of an input of tokens."""
    tables = dict(_tables(module))
    for node, leaf in tables.items():
        remedy = refusal(leaf)
        if node.kwargs or len(node.args) != 1 or getattr(node.args[0], "op", None) != "placeholder":
            remedy = "it must be called with the network's input as it is, and nothing else (no offsets, no weights)"
        if remedy is not None:
            yield Unsupported(str(node.target), type(leaf).__name__, remedy)
    if not tables:
        return
    for node in module.graph.nodes:
        if node.op == "placeholder":
            for user in node.users:
                if user not in tables and user.op != "output" and not _about_shapes(user):
                    remedy = "the network's input holds tokens, since an embedding reads it: embed it everywhere"
                    yield Unsupported(user.name, str(user.target), remedy)


def _about_shapes(node: fx.Node) -> bool:
    """Whether a node computes with shapes only: its value is public and the same for every sample."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return bool(node.all_input_nodes) and all(
        _about_shapes(source) if source.op.startswith("call_") and source.op != "call_module" else False
        for source in node.all_input_nodes
    )
