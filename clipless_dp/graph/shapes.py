"""The shape of every value in a graph, from a run on zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from clipless_dp.errors import CliplessError, ConfigurationError
from clipless_dp.gates import BallProjection, SphereScaling, weighing
from clipless_dp.graph.apart import is_own
from clipless_dp.graph.layouts import FreshLayouts
from clipless_dp.isolation import Isolated
from clipless_dp.isolation.refusals import ON_ZEROS
from clipless_dp.layers import SampleGroupNorm

WRITTEN_IN_PLACE = "written in place"
"""Marks nodes, in their ``meta``, that work in place where a module runs by itself, not as a graph."""

_IN_PLACE = (
    "overwrites before, written in place as h += t: the network by itself, and what is exported, would be another "
    "function than the graph, of which the bounds are"
)
_OVERWRITTEN = "a gate's value cannot be overwritten, use inplace=False"


_KINDS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda uniform: uniform - 0.5,
    lambda uniform: uniform,
    lambda uniform: (uniform > 0.5).to(uniform.dtype),
    lambda uniform: 1e3 * (uniform - 0.5),
)
"""Of uniform numbers: of both signs, positive ones, zeros and ones, and large ones."""


class ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps what each node returns: a tensor's shape, or a value that is public.

    Attributes:
        shapes: of each tensor-valued node, the batch axis included.
        public: what other calls return, sizes say.
        layouts: notes convolutions that layouts in memory matter to.

    Raises:
        ConfigurationError: a node does not take what it is given, or overwrites a gate's value; or it reads what
            ``h += t``, or a layer of a user's own, has overwritten where the network runs by itself, while the graph
            made a new value of it, or handed it a copy.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        # Errors say where they arose themselves.
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.public: dict[fx.Node, Any] = {}
        self.layouts = FreshLayouts()
        self._gated: list[tuple[Tensor, int]] = []
        self._overwritten: list[tuple[Tensor, fx.Node]] = []
        self._stale: dict[fx.Node, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node."""
        self._refuse_overwritten(n)
        read = [(value, value._version) for value in self._operands(n)]
        try:
            value = super().run_node(n)
        except Exception as error:
            if isinstance(error, CliplessError) and isinstance(self._leaf(n), Isolated):
                raise
            summary = str(error).splitlines()[0] if str(error) else type(error).__name__
            if isinstance(self._leaf(n), Isolated):
                known = [remedy for said, remedy in ON_ZEROS if said in summary]
                otherwise = "if it runs by itself, then on other inputs than these of input_shape, or not under "
                raise ConfigurationError(
                    f"the network raised {type(error).__name__} where it was run on zeros ({summary}): "
                    f"{known[0] if known else otherwise + 'torch.func.vmap'}"
                ) from error
            reason = _OVERWRITTEN if "modified inplace" in summary else "input_shape does not fit the network"
            raise ConfigurationError(f"{reason} at {n.target} ({n.name}): {summary}") from error
        if is_own(self._leaf(n) or n.target):
            unseen = self._overwritten_unseen(n)
            changed = [one for one, version in read if one._version != version or any(one is own for own in unseen)]
            for held in (one.untyped_storage()._cdata for one in changed):
                # Nodes, not memory: what it returns may lie there.
                self._stale.update({
                    node: n for node, one in self.env.items()
                    if isinstance(one, Tensor) and one.untyped_storage()._cdata == held
                })  # fmt: skip
        if any(gated._version != version for gated, version in self._gated):
            raise ConfigurationError(f"{_OVERWRITTEN} at {n.target} ({n.name})")
        if isinstance(self._leaf(n), (BallProjection, SphereScaling, SampleGroupNorm)):
            # Its backward rests on what it returned.
            self._gated.append((value, value._version))
        if n.meta.get(WRITTEN_IN_PLACE):
            written = n.args[0]
            assert isinstance(written, fx.Node)
            self._overwritten.append((self.env[written], n))
        if isinstance(value, Tensor) and n.op != "output":
            self.shapes[n] = tuple(value.shape)
        elif n.op.startswith("call_"):
            self.public[n] = value
        return value

    def _refuse_overwritten(self, node: fx.Node) -> None:
        for value, writer in self._overwritten:
            held = value.untyped_storage()._cdata
            if any(one.untyped_storage()._cdata == held for one in self._operands(node)):
                raise ConfigurationError(f"{node.name} reads a value that {writer.name} {_IN_PLACE}; write h = h + t")
        for source in node.all_input_nodes:
            if source in self._stale:
                raise ConfigurationError(
                    f"{node.name} reads a value that {self._stale[source].name}, of your own, {_IN_PLACE}; write "
                    "x = 3 * x for x.mul_(3)"
                )

    def _overwritten_unseen(self, node: fx.Node) -> list[Tensor]:
        """What a call of a user's own overwrites where no counter of versions tells: by ``.data``, ``out=``, or NumPy.

        On zeros, multiplied say, it would not show either: a copy of it is called on random numbers of several kinds.
        (Passes of the model hand it copies; the network by itself, and what is exported, does not.)
        """
        return [value for kind in _KINDS for value in self._overwritten_of(node, kind)]

    def _overwritten_of(self, node: fx.Node, kind: Callable[[Tensor], Tensor]) -> list[Tensor]:
        copies: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if id(value) not in copies:
                numbers = kind(torch.rand_like(value, requires_grad=False))
                copies[id(value)] = value, numbers, numbers.clone()
            return copies[id(value)][1]

        args, kwargs = fx.node.map_aggregate(self.fetch_args_kwargs_from_env(node), copied)
        # Where it takes no such numbers, what it has overwritten before counts.
        with suppress(Exception):
            called = self._leaf(node)
            if called is None:
                getattr(self, node.op)(node.target, args, kwargs)
            else:
                copy.deepcopy(called)(*args, **kwargs)
        return [value for value, numbers, before in copies.values() if not torch.equal(numbers, before)]

    def _operands(self, node: fx.Node) -> list[Tensor]:
        return [value for source in node.all_input_nodes if isinstance(value := self.env[source], Tensor)]

    def _leaf(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def record(module: fx.GraphModule, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> ShapeRecorder:
    """Runs a graph on zeros; draws no random number of the caller's."""
    recorder = ShapeRecorder(module)
    devices = [device] if device.type == "cuda" else []
    # With gradients enabled, because autograd is what refuses in-place changes of gated values.
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), recorder.layouts, weighing(None):
        recorder.run(torch.zeros(shape, device=device, dtype=dtype))
    return recorder
