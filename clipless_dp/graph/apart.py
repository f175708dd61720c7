"""Layers of a user's own run apart from the model's graph, so that what they keep leads to no parameter.

A layer may keep what passes through it, in an attribute or anywhere else, and a loss on that goes back into the network
from the middle, around the gate at the output. So such a layer runs on copies of its inputs and aliases of its
parameters that belong to a graph of their own. One operation of the model's graph stands for it, and goes through the
layer's own graph on the way back. All else that comes to the beginning of that graph is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.gates import counts_of
from clipless_dp.graph.numbers import moving
from clipless_dp.graph.unwritten import buffers_unwritten
from clipless_dp.isolation import Isolated
from clipless_dp.modules import kind_of
from clipless_dp.rules.base import find_function_rule


class _Sealed(Protocol):
    """What others may look at, in later hooks too, and not change."""

    def close(self, together: Any) -> None:
        """Called by a backward pass before it gets to the layer's own graph, with all that is sealed of this run."""
        ...

    def require(self) -> None:
        """Raises where something is not what it was; called behind the layer's own graph."""
        ...


class _Sealing(Protocol):
    """Seals what a layer was given, has returned, and is set to."""

    def value(self, value: Tensor) -> _Sealed:
        """A tensor."""
        ...

    def settings(self, layer: nn.Module) -> _Sealed:
        """Numbers in attributes, as the layer has left them."""
        ...


def is_known(module: nn.Module) -> bool:
    """Whether a module and its parts are torch's or this package's own, which keep nothing that passes through.

    Networks of which nothing else is known are none of these, though all of their layers be torch's.
    """
    return not isinstance(module, Isolated) and all(_is_known(kind_of(part).__module__) for part in module.modules())


def is_own(called: object) -> bool:
    """Whether a module or a function is a user's own, with a rule."""
    if isinstance(called, nn.Module):
        return not (isinstance(called, Isolated) or is_known(called))
    return callable(called) and not _is_known(_origin(called))


def _is_known(origin: str | None) -> bool:
    package, *rest = (origin or "").split(".")
    return package in ("torch", "clipless_dp") and "testing" not in rest


def _origin(function: Any) -> str | None:
    origin = getattr(function, "__module__", None)
    # Of Python's own operators nothing is kept either.
    return "torch" if origin in ("_operator", "operator", "builtins", "math", None) else origin


def set_apart_(
    graph: fx.GraphModule,
    wanted: Callable[[], bool],
    resting: Callable[[], AbstractContextManager[None]],
    sealing: _Sealing,
) -> bool:
    """Lets a traced graph, not the network that it shares its layers with, run layers of a user's own apart.

    Args:
        graph: the graph.
        wanted: asked at each pass whether they are to run apart.
        resting: within, all other layers hold their parameters, and not what stands for these in a pass: what a layer
            of a user's own reads of them, by a reference of its own, leads around the pass and shows.
        sealing: is given what such a layer was given, has returned, and is set to.

    Returns:
        Whether there are such layers, or functions.

    Raises:
        ConfigurationError: a part of such a layer is used outside of it too.
    """
    found = is_rewritten = False
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            above, _, name = str(node.target).rpartition(".")
            leaf = graph.get_submodule(str(node.target))
            if not isinstance(leaf, Apart) and not is_known(leaf):
                within = next((other for other in called if other.startswith(f"{node.target}.")), None)
                if within is not None:
                    raise ConfigurationError(
                        f"the layer {within!r} is used outside of {node.target!r} too, which runs apart from the "
                        "network's graph: gate the whole network at once, or give either place a layer of its own"
                    )
                setattr(graph.get_submodule(above), name, Apart(leaf, wanted, resting, sealing))
                found = True
        elif node.op == "call_function" and not _is_known(_origin(node.target)) and find_function_rule(node.target):
            node.target = _apart(node.target, wanted, resting, sealing)
            found = is_rewritten = True
    if is_rewritten:
        # Layers are found by their names; functions are in what was compiled.
        graph.recompile()
    return found


def join_(graph: fx.GraphModule) -> None:
    """Undoes :func:`set_apart_` for modules."""
    for path, part in list(graph.named_modules()):
        if isinstance(part, Apart):
            above, _, name = path.rpartition(".")
            setattr(graph.get_submodule(above), name, part.layer)


class Apart(nn.Module):
    """A layer as the executed graph runs it, apart from its graph.

    Args:
        layer: the layer.
        wanted: asked at each call whether it is to run apart.
        resting: see :func:`set_apart_`.
        sealing: see :func:`set_apart_`.

    Shape:
        As the layer's.
    """

    def __init__(
        self,
        layer: nn.Module,
        wanted: Callable[[], bool],
        resting: Callable[[], AbstractContextManager[None]],
        sealing: _Sealing,
    ) -> None:
        super().__init__()
        self.layer = layer
        self._wanted = wanted
        self._resting = resting
        self._sealing = sealing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's value; in a compiled graph the layer itself."""
        if torch.compiler.is_compiling():
            return self.layer(*args, **kwargs)
        if not self._wanted():
            with moving(self.layer):
                return _on_copies(self.layer, args, kwargs)
        return _run_apart(self.layer, self.layer, self._resting, self._sealing, args, kwargs)


def _apart(
    function: Callable[..., Any],
    wanted: Callable[[], bool],
    resting: Callable[[], AbstractContextManager[None]],
    sealing: _Sealing,
) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not wanted():
            return _on_copies(function, args, kwargs)
        return _run_apart(function, None, resting, sealing, args, kwargs)

    # Rules are found by it.
    run.stands_for = function  # type: ignore[attr-defined]
    return run


def _on_copies(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What it makes of copies: in the graph, of which the bounds are, nothing overwrites what others read."""
    copies, named = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    return call(*copies, **named)


def _run_apart(
    call: Callable[..., Any],
    layer: nn.Module | None,
    resting: Callable[[], AbstractContextManager[None]],
    sealing: _Sealing,
    args: Any,
    kwargs: Any,
) -> Any:
    given, structure = pytree.tree_flatten((args, kwargs))
    places = [index for index, value in enumerate(given) if isinstance(value, Tensor)]
    inputs = [cast(Tensor, given[index]) for index in places]
    held = _held(layer)
    parameters = list({id(value): value for _, _, value in held}.values())
    if not any(value.requires_grad for value in (*inputs, *parameters)):
        with resting():
            # It may keep what it has returned, which the layers behind it differentiate by.
            return pytree.tree_map_only(Tensor, torch.clone, _on_copies(call, args, kwargs))
    returned: list[Any] = []

    def run(inner: tuple[Tensor, ...]) -> list[Tensor]:
        values = list(given)
        for index, value in zip(places, inner, strict=False):
            values[index] = value
        own = {id(old): new for old, new in zip(parameters, inner[len(inputs) :], strict=True)}
        arguments, named = pytree.tree_unflatten(values, structure)
        with resting(), _holding(held, own):
            flat, spec = pytree.tree_flatten(call(*arguments, **named))
        returned[:] = [flat, spec]
        return [value for value in flat if isinstance(value, Tensor)]

    outputs = iter(_Apart.apply(run, layer, sealing, len(inputs), *inputs, *parameters))  # type: ignore[no-untyped-call]
    flat, spec = returned
    return pytree.tree_unflatten([next(outputs) if isinstance(value, Tensor) else value for value in flat], spec)


_Places = list[tuple[dict[str, Any], str, Tensor]]


def _held(layer: nn.Module | None) -> _Places:
    """Where a layer holds parameters, which within a pass are aliases of them, and what its gates count in."""
    parts = () if layer is None else tuple(layer.modules())
    counts = [(cast("dict[str, Any]", held), name) for held, name in filter(None, map(counts_of, parts))]
    return [(held, name, held[name]) for held, name in counts] + [
        (cast("dict[str, Any]", part._parameters), name, value)
        for part in parts
        for name, value in part._parameters.items()
        if value is not None
    ]


@contextmanager
def _holding(held: _Places, own: dict[int, Tensor]) -> Iterator[None]:
    try:
        for where, name, value in held:
            where[name] = own[id(value)]
        yield
    finally:
        for where, name, value in held:
            where[name] = value


class _Visit:
    """One run of a layer.

    Attributes:
        task: the backward pass through the layer's own graph that the model's graph asked for.
        sealed: what the layer was given, has returned, and is set to.
    """

    task: int | None = None
    sealed: Sequence[_Sealed] = ()


class _Apart(torch.autograd.Function):
    """Stands in the model's graph for a layer whose own graph is apart from it."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[tuple[Tensor, ...]], list[Tensor]],
        layer: nn.Module | None,
        sealing: _Sealing,
        count: int,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        visit = _Visit()
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_(value.requires_grad) for value in values]
            inner: tuple[Tensor, ...] = _Wall.apply(visit, count, *leaves)  # type: ignore[no-untyped-call]
            # Of a network that is run sample by sample they are taken for public constants, as schedules are.
            numbered = None if isinstance(layer, Isolated) else layer
            with nullcontext() if numbered is None else moving(numbered):
                outputs = run(inner)
            tracked = [index for index, value in enumerate(outputs) if value.requires_grad]
            ends = [outputs[index] for index in tracked]
            kept = {id(value): value for value in (*outputs, *inner[:count])}
            visit.sealed = [
                *(sealing.value(value) for value in kept.values()),
                *(() if numbered is None else (sealing.settings(numbered),)),
            ]
            sealed = _Seal.apply(visit, *ends) if ends else ()  # type: ignore[no-untyped-call]
        edge = torch.autograd.graph.get_gradient_edge
        # Edges, not tensors: what is not needed for the way back is freed.
        ctx.visit = visit
        ctx.graph = (
            tracked,
            [edge(value) for value in sealed],
            [(index, edge(leaf)) for index, leaf in enumerate(leaves) if leaf.requires_grad],
        )
        # What it has kept is no memory that the layers behind it read, or write to.
        made = tuple(value.detach().clone() for value in outputs)
        ctx.mark_non_differentiable(*(value for index, value in enumerate(made) if index not in tracked))
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tracked, ends, leaves = ctx.graph
        arrived = [(end, cotangents[index]) for index, end in zip(tracked, ends, strict=True)]
        arrived = [(end, cotangent) for end, cotangent in arrived if cotangent is not None]
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if arrived and leaves:
            with nullcontext() if ctx.layer is None else buffers_unwritten(ctx.layer):
                found = torch.autograd.grad(
                    [end for end, _ in arrived],
                    [leaf for _, leaf in leaves],
                    [cotangent for _, cotangent in arrived],
                    retain_graph=torch._C._autograd._get_current_graph_task_keep_graph(),
                    allow_unused=True,
                )
            for sealed in ctx.visit.sealed:
                sealed.require()
            ctx.visit.sealed = ()
            for (index, _), gradient in zip(leaves, found, strict=True):
                gradients[4 + index] = gradient
        return tuple(gradients)


def inner_ends(node: Any) -> list[Any]:
    """Where a backward pass that comes to a node of the model's graph enters the layer's own; none of other nodes."""
    return [end.node for end in node.graph[1]] if isinstance(node, cast(Any, _Apart)._backward_cls) else []


class _Seal(torch.autograd.Function):
    """The end of a layer's own graph: notes by which backward pass the model's graph goes through it."""

    @staticmethod
    def forward(ctx: Any, visit: _Visit, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.visit = visit
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.visit.task = torch._C._current_graph_task_id()
        for sealed in ctx.visit.sealed:
            sealed.close(ctx.visit.sealed)
        return None, *cotangents


class _Wall(torch.autograd.Function):
    """The beginning of a layer's own graph: lets through what the model's graph sent, and nothing else."""

    @staticmethod
    def forward(ctx: Any, visit: _Visit, count: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.visit = visit
        ctx.set_materialize_grads(False)
        # Inputs are copied: what the layer overwrites is its own.
        made = tuple(leaf.clone() if index < count else leaf.view_as(leaf) for index, leaf in enumerate(leaves))
        ctx.mark_non_differentiable(*(new for leaf, new in zip(leaves, made, strict=True) if not leaf.requires_grad))
        return made

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.visit.task != torch._C._current_graph_task_id():
            raise PrivacyError(
                "a gradient came back from within the network, around the gate at its output: from a value that a "
                "layer has kept, say, as penalties on activations and auxiliary heads do, and no bound holds for it. "
                "Nothing of it was added to a gradient. Let all that is trained on be a loss of the model's output: "
                "what is to enter it belongs to what the network returns"
            )
        return None, None, *cotangents
