"""Which parts of a traced graph run as chains."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from clipless_dp.fusion.chain import Chain
from clipless_dp.fusion.stages import Interleaved, Stage, pools_tiles
from clipless_dp.gates import BallProjection, CotangentGate, GradientGatedConv2d, GradientGatedLinear, SphereScaling
from clipless_dp.graph.tracing import TracedNet


class FusedNet:
    """A traced network whose gated layers run as chains.

    Args:
        traced: the network.

    Attributes:
        module: executes the graph; takes the input and an :data:`Entry` or ``None``.
        takes_entry: whether the input reaches a chain first, so that this can do the work of the input gate.
        beats_compiled: whether it does what a compiled graph is slower at: signal gates, and maxima of maps.
    """

    def __init__(self, traced: TracedNet) -> None:
        found = _chains(traced)
        chains = {nodes[-1]: (nodes[0], stages) for nodes, stages in found}
        fused = {node for nodes, _ in found for node in nodes}
        graph = fx.Graph()
        modules: dict[str, nn.Module] = {}
        copies: dict[fx.Node, fx.Node] = {}
        entry: fx.Node | None = None
        late = _late(traced, fused)
        self.takes_entry = False
        every = [stage for _, stages in found for stage in stages]
        self.beats_compiled = any(stage.before or stage.behind or stage.interleaved for stage in every)
        for node in traced.module.graph.nodes:
            if node in chains:
                first, stages = chains[node]
                (source,) = first.all_input_nodes
                heading = _is_input(traced, source)
                self.takes_entry |= heading
                name = f"chain_{len(modules)}"
                modules[name] = Chain(stages)
                copies[node] = graph.call_module(name, (copies[source], entry) if heading else (copies[source],))
            elif node in fused:
                continue
            elif node in late:
                copies[node] = copies[node.all_input_nodes[0]]
            elif type(_leaf(traced, node)) in (nn.Conv2d, GradientGatedConv2d) and _pooled(traced, node):
                name = f"interleaved_{len(modules)}"
                modules[name] = Interleaved(cast(nn.Conv2d, traced.leaf(node)))
                self.beats_compiled = True
                copies[node] = graph.call_module(name, (copies[node.all_input_nodes[0]],))
            else:
                copies[node] = graph.node_copy(node, lambda given: copies[given])
                if node.op == "placeholder":
                    entry = graph.placeholder("entry", default_value=None)
                elif node.op == "call_module":
                    modules[str(node.target)] = traced.executed(node)
                if any(source in late for source in node.all_input_nodes):
                    copies[node] = graph.call_function(torch.relu, (copies[node],))
        self.module = fx.GraphModule(modules, graph)

    @staticmethod
    def can_run(values: Tensor) -> bool:
        """Whether the chains are for this device and this way of running."""
        return (
            values.device.type == "cpu"
            and values.dtype in (torch.float32, torch.float64)
            and not torch.compiler.is_compiling()
        )


def _is_input(traced: TracedNet, node: fx.Node) -> bool:
    """Whether a value is the network's input or a reshaped view of it, and used once."""
    while len(node.users) == 1:
        if node.op == "placeholder":
            return True
        reshapes = node.op == "call_module" and type(traced.leaf(node)) in (nn.Flatten, nn.Unflatten, nn.Identity)
        if not reshapes and node.target not in (torch.flatten, torch.reshape, "flatten", "reshape", "view"):
            return False
        if len(node.all_input_nodes) != 1:
            return False
        (node,) = node.all_input_nodes
    return False


def _late(traced: TracedNet, fused: set[fx.Node]) -> set[fx.Node]:
    """ReLUs, and the copies that they may overwrite, that a max pooling follows: it leaves them less to do.

    The largest entry of a window is the same before and after, and where it is negative nothing is passed back.
    """
    found: set[fx.Node] = set()
    for node in traced.module.graph.nodes:
        relu = _rectified(traced, node)
        after = _only_user(relu[-1]) if relu else None
        if after is not None and type(_leaf(traced, after)) is nn.MaxPool2d and not fused.intersection([*relu, after]):
            found.update(relu)
    return found


def _chains(traced: TracedNet) -> list[tuple[list[fx.Node], tuple[Stage, ...]]]:
    """The longest runs of stages in which each value is used by the next one only."""
    found: list[tuple[list[fx.Node], tuple[Stage, ...]]] = []
    for node in traced.module.graph.nodes:
        stage = _stage(traced, node)
        if stage is None:
            continue
        nodes, made = stage
        (source,) = nodes[0].all_input_nodes
        if found and found[-1][0][-1] is source and len(source.users) == 1:
            found[-1] = [*found[-1][0], *nodes], (*found[-1][1], made)
        elif len(nodes) > 1 or isinstance(made.layer, GradientGatedLinear):
            found.append((nodes, (made,)))
    return found


def _stage(traced: TracedNet, node: fx.Node) -> tuple[list[fx.Node], Stage] | None:
    """The stage around a layer's node, if it is one that can be fused; a dense one may stand alone behind another."""
    layer = _leaf(traced, node)
    if type(layer) not in (nn.Linear, GradientGatedLinear, nn.Conv1d, nn.Conv2d) or len(node.all_input_nodes) != 1:
        return None
    if isinstance(layer, GradientGatedLinear) and (len(traced.shapes[node]) != 1 or layer.joint or layer.adaptive):
        # Joint caps, and those that count, are in the layer's own backward.
        return None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return None
    nodes = [node]
    before, behind = _leaf(traced, node.all_input_nodes[0]), None
    if type(before) in (BallProjection, SphereScaling) and len(node.all_input_nodes[0].users) == 1:
        nodes.insert(0, node.all_input_nodes[0])
    else:
        before = None
    following = _only_user(nodes[-1])
    if following is not None and type(_leaf(traced, following)) is CotangentGate:
        behind = _leaf(traced, following)
        nodes.append(following)
        following = _only_user(following)
    relu = _rectified(traced, following)
    nodes += relu
    following = _only_user(nodes[-1])
    pool = None if following is None else _leaf(traced, following)
    if following is not None and isinstance(layer, nn.Conv2d) and pools_tiles(pool):
        nodes.append(following)
        behind_pool = [] if relu else _rectified(traced, _only_user(following))
        nodes += behind_pool
        relu = relu or behind_pool
    else:
        pool = None
    interleaved = isinstance(layer, nn.Conv2d) and _pooled(traced, node)
    if len(nodes) == 1 and isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return None
    gates = cast(Any, before), cast(Any, behind)
    return nodes, Stage(cast(Any, layer), *gates, bool(relu), interleaved, cast("nn.MaxPool2d | None", pool))


def _rectified(traced: TracedNet, node: fx.Node | None) -> list[fx.Node]:
    """A ReLU and the copy that it may overwrite, from the first of both on; empty where there is none."""
    copied: list[fx.Node] = []
    if node is not None and node.op == "call_method" and node.target == "clone":
        copied, node = [node], _only_user(node)
    return [*copied, node] if node is not None and _rectifies(traced, node) else []


def _leaf(traced: TracedNet, node: fx.Node) -> nn.Module | None:
    return traced.leaf(node) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


_KEEP_ORDER = (CotangentGate, BallProjection, SphereScaling, nn.Conv2d, GradientGatedConv2d)


def _pooled(traced: TracedNet, node: fx.Node) -> bool:
    """Whether a max pooling follows, with nothing but convolutions, gates and ReLUs between.

    In no network with a convolution that torch's kernel for maps channels last gets wrong.
    """
    following = None if traced.reads_beyond else _only_user(node)
    while following is not None and (
        type(_leaf(traced, following)) in _KEEP_ORDER or _rectifies(traced, following) or following.target == "clone"
    ):
        following = _only_user(following)
    return following is not None and type(_leaf(traced, following)) is nn.MaxPool2d


def _rectifies(traced: TracedNet, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.leaf(node)) is nn.ReLU
    return node.target in (torch.relu, functional.relu, "relu")
