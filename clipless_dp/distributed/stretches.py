"""Stretches of the traced graph that run as one call of the unit that they were traced from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from clipless_dp.distributed.units import units_of
from clipless_dp.errors import ConfigurationError


def gathering(traced: fx.GraphModule, model: nn.Module) -> fx.GraphModule | None:
    """The traced graph with the nodes of each unit run as one call of it, so that its hooks gather its parameters.

    A unit that the graph calls gathers by itself. One that was traced through is a stretch of the graph, from the first
    node that reads its parameters to the last.

    Args:
        traced: what runs otherwise.
        model: its units are in it.

    Returns:
        ``None`` where the model is the only unit, whose caller gathers everything.

    Raises:
        ConfigurationError: two units are used in turn.
    """
    units = [(path, unit) for path, unit in units_of(model) if unit is not model]
    if not units:
        return None
    graph = fx.Graph()
    output = graph.graph_copy(traced.graph, {})
    graph.output(output)
    modules: dict[str, nn.Module] = dict(traced.named_modules())
    reading = {
        node: modules[str(node.target)]
        for node in graph.nodes
        if node.op == "call_module" and any(True for _ in modules[str(node.target)].parameters())
    }
    order = {node: index for index, node in enumerate(graph.nodes)}
    stretches: list[tuple[str, nn.Module, list[fx.Node]]] = []
    for path, unit in units:
        inside = set(unit.modules())
        own = [order[node] for node, leaf in reading.items() if leaf in inside and leaf is not unit]
        if own:
            stretches.append((path, unit, list(graph.nodes)[min(own) : max(own) + 1]))
    # The shortest first, and of equal ones the innermost: the longer hold it as one node then.
    stretches.sort(key=lambda stretch: (len(stretch[2]), len(list(stretch[1].modules()))))
    for index, (path, unit, nodes) in enumerate(stretches):
        name = f"unit_{index}"
        made = _fold(graph, nodes, name, unit, modules)
        for other_path, _, others in stretches[index + 1 :]:
            shared = [node for node in nodes if node in others]
            if shared and len(shared) < len(nodes):
                raise ConfigurationError(
                    f"{path} and {other_path} are sharded by themselves, but used in turn: call fully_shard on a "
                    "module that holds both"
                )
            if shared:
                first = others.index(shared[0])
                others[first : first + len(shared)] = made
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return fx.GraphModule({path: module for path, module in modules.items() if path in called}, graph)


def _fold(
    graph: fx.Graph, nodes: list[fx.Node], name: str, unit: nn.Module, modules: dict[str, nn.Module]
) -> list[fx.Node]:
    """Replaces nodes of a graph by a call of a unit, which runs them; returns the new nodes."""
    within = set(nodes)
    sources = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in within))
    results = [node for node in nodes if any(user not in within for user in node.users)]
    part = fx.Graph()
    copies = {source: part.placeholder(source.name) for source in sources}
    for node in nodes:
        copies[node] = part.node_copy(node, lambda given: copies[given])
    part.output(copies[results[0]] if len(results) == 1 else tuple(copies[result] for result in results))
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    modules[name] = _Stretch(unit, fx.GraphModule({path: modules[path] for path in called}, part))
    made = []
    with graph.inserting_after(nodes[-1]):
        made.append(graph.call_module(name, tuple(sources)))
    for index, result in enumerate(results):
        if len(results) == 1:
            replacement = made[0]
        else:
            with graph.inserting_after(made[-1]):
                replacement = graph.call_function(_item, (made[0], index))
            made.append(replacement)
        result.replace_all_uses_with(replacement, delete_user_cb=lambda user: user not in within)
    for node in reversed(nodes):
        graph.erase_node(node)
    return made


def _item(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


class _Stretch(nn.Module):
    """A stretch of the traced graph, run between the hooks of the unit it was traced from, in place of its own code."""

    def __init__(self, unit: nn.Module, part: fx.GraphModule) -> None:
        super().__init__()
        # In a tuple: not registered, so that the unit keeps its one place in the model.
        self._held = unit, part

    def forward(self, *values: Any) -> Any:
        unit, part = self._held
        unit.forward = part.forward
        try:
            return unit(*values)
        finally:
            del unit.forward
