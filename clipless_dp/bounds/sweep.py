"""The two sweeps over a traced network: forwards for activation norms, backwards for cotangents."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor, fx, nn

from clipless_dp.bounds.maximum_norm import OF_DISTANCES, MaximumNorms, factor_of
from clipless_dp.bounds.sensitivity import RELATIONS, LayerSensitivity, Relation, Sensitivity
from clipless_dp.bounds.stated import required_sizes
from clipless_dp.errors import NormError, PrivacyError
from clipless_dp.gates import adapting
from clipless_dp.graph.tracing import TracedNet, function_name
from clipless_dp.isolation import Isolated
from clipless_dp.modules import kind_of
from clipless_dp.norms.operators import Operator
from clipless_dp.rules import LayerBounds, find_function_rule, find_rule, is_builtin, value_of
from clipless_dp.rules.base import LARGEST

FLOAT64_ROUNDING = 1.0 + 1e-10
"""Covers the rounding of the sweeps' own float64 arithmetic: a relative 2^-52 for each of under 10^5 operations."""


class NeedsWeights(Exception):
    """A bound cannot be had without reading a weight."""


class Sweep(MaximumNorms):
    """One evaluation; memoises what it has computed and remembers which weights it read.

    Args:
        traced: the network's graph.
        input_norm: ``X₀``, the cap of what enters, rounding included.
        cotangent_norm: ``G``, the cap of the cotangent at the output, rounding included.
        limits: norms that constraints guarantee, by parameter name.
        operators: of each parameter the operators that its limit speaks for.
        certify: the certified norm of a parameter as an operator, from its value.
        whole: whether a user's rule may read the weights.
        cotangent_norm_l1: the cap of the cotangent's ℓ1 norm at the output, rounding included; ``None`` where nothing
            caps it but the Euclidean norm.
        carries_l1: whether it is carried, see :func:`~clipless_dp.bounds.maximum_norm.carries_l1`.

    Attributes:
        reads: what was read besides the limits: names of parameters, and rules of the user's own.
    """

    def __init__(
        self,
        traced: TracedNet,
        *,
        input_norm: float,
        cotangent_norm: float,
        limits: Mapping[str, float],
        operators: Mapping[str, tuple[Operator, ...]],
        certify: Callable[[Tensor, Operator], float],
        whole: bool = True,
        cotangent_norm_l1: float | None = None,
        carries_l1: bool = False,
    ) -> None:
        self.traced = traced
        self.input_norm = input_norm
        self.cotangent_norm = cotangent_norm
        self.limits = limits
        self.reads: set[str] = set()
        self._operators = operators
        self._certify = certify
        self._whole = whole
        self._free_only = False
        self._bounds: dict[fx.Node, LayerBounds | None] = {}
        self._norms: dict[fx.Node, float] = {}
        self._cotangents: dict[fx.Node, float] = {}
        super().__init__(cotangent_norm_l1)
        self._carries_l1 = carries_l1
        self._slopes: dict[fx.Node, float] = {}
        self._reaches: dict[fx.Node, float] = {}
        self._certified: dict[tuple[str, Operator], float] = {}
        self._leaves: dict[fx.Node, tuple[nn.Module, dict[str, nn.Parameter]]] = {}

    def leaf(self, node: fx.Node) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The module that a node calls, and its parameters by name."""
        if node not in self._leaves:
            leaf = self.traced.leaf(node)
            self._leaves[node] = leaf, named_parameters(leaf)
        return self._leaves[node]

    def bounds(self, node: fx.Node) -> LayerBounds | None:
        """The rule's answer for a node; ``None`` for the network's input."""
        if node not in self._bounds:
            self._bounds[node] = self._apply_rule(node)
        return self._bounds[node]

    def _apply_rule(self, node: fx.Node) -> LayerBounds | None:
        if node.op == "placeholder":
            return None
        context = _Context(self, node)
        operands = len(self.traced.operands(node))
        if node.op == "call_module":
            leaf, _ = self.leaf(node)
            rule = find_rule(leaf)
            assert rule is not None
            if not is_builtin(rule) or getattr(leaf, "reads_weights", False):
                self._count_as_read(leaf, context.path)
            return required_sizes(
                rule(leaf, context), context.path, context.kind, operands=operands, own=is_builtin(rule)
            )
        function_rule = find_function_rule(node.target)
        assert function_rule is not None
        if not is_builtin(function_rule):
            self._count_as_read(None, context.path)
        found = function_rule(context, node.args, dict(node.kwargs))
        return required_sizes(found, context.path, context.kind, operands=operands, own=is_builtin(function_rule))

    def _count_as_read(self, leaf: nn.Module | None, path: str) -> None:
        """A user's rule may read whatever changes, so nothing that it says is kept for later steps.

        Not even where no bound rests on it, as behind gates: what is computed without weights would be kept for good.
        """
        own = set() if leaf is None else {self.traced.names[id(parameter)] for parameter in leaf.parameters()}
        if own and (self._free_only or not self._whole):
            raise NeedsWeights
        self.reads |= {*own, f"the rule of {path}"}

    def norm(self, node: fx.Node) -> float:
        """``Y``: bound on the norm of a node's value."""
        if node not in self._norms:
            bounds = self.bounds(node)
            self._norms[node] = self.input_norm if bounds is None else value_of(bounds.output_norm)
        return self._norms[node]

    def consumers(self, node: fx.Node) -> Sequence[tuple[fx.Node, int]]:
        """Which nodes read a value, and at which place."""
        return self.traced.consumers.get(node, ())

    def cotangent(self, node: fx.Node) -> float:
        """``G``: bound on the norm of the cotangent that arrives at a node's value: its consumers' bounds add."""
        if self._carries_l1:
            return self.cotangents(node)[0]
        if node not in self._cotangents:
            total = self.cotangent_norm if node is self.traced.output else 0.0
            for consumer, position in self.consumers(node):
                total += self._passed_back(consumer, position)
            self._cotangents[node] = total
        return self._cotangents[node]

    def _passed_back(self, consumer: fx.Node, position: int) -> float:
        bounds = self.bounds(consumer)
        assert bounds is not None

        def stretched() -> float:
            return factor_of(bounds, position) * self.cotangent(consumer)

        if math.isinf(bounds.cotangent_cap):
            return stretched()
        return min(self.free(stretched), bounds.cotangent_cap)

    def slope(self, node: fx.Node) -> float:
        """Bound on how far the output moves per unit of a node's value: its consumers' bounds add.

        It differs from the cotangent's way back where a gate acts on cotangents alone.
        """
        return self._summed(node, self._slopes, self._forward_factor)

    def reach(self, node: fx.Node) -> float:
        """Bound on how far a node's value moves per unit of the network's input: what its operands' ways add up to."""
        if node not in self._reaches:
            total = 1.0 if node.op == "placeholder" else 0.0
            for position, source in enumerate(self.traced.operands(node)):
                total += self._forward_factor(node, position) * self.reach(source)
            self._reaches[node] = total
        return self._reaches[node]

    def _forward_factor(self, node: fx.Node, position: int) -> float:
        return self._forward(node, position, factor_of)

    def free(self, evaluate: Callable[[], float]) -> float:
        """A bound if it follows without reading weights, else infinity."""
        previous, self._free_only = self._free_only, True
        try:
            return evaluate()
        except NeedsWeights:
            return math.inf
        finally:
            self._free_only = previous

    def certified(self, node: fx.Node, path: str, name: str, operator: Operator) -> float:
        """Norm of a layer's parameter as an operator: its constraint's limit, or certified from its value."""
        parameter = self.leaf(node)[1][name]
        key = self.traced.names[id(parameter)]
        # A limit speaks for the operators that the constraint knew of, not for whatever else a rule may ask about.
        if key in self.limits and operator in self._operators.get(key, ()):
            return self.limits[key]
        if (key, operator) not in self._certified:
            if self._free_only:
                raise NeedsWeights
            self.reads.add(key)
            try:
                self._certified[key, operator] = self._certify(parameter, operator)
            except NormError as error:
                raise NormError(f"{path}.{name}: {error}") from error
        return self._certified[key, operator]

    def sensitivity(self, relation: Relation) -> Sensitivity:
        """Both sweeps, for each trainable parameter.

        Raises:
            NeedsWeights: a user's rule may read weights, and they are not whole.
            NormError: a weight has no certified norm.
            PrivacyError: a bound is not finite or so large that activations may overflow.
        """
        scale = RELATIONS[relation] * FLOAT64_ROUNDING
        per_parameter: dict[str, float] = {}
        layers: list[LayerSensitivity] = []
        owners: dict[int, tuple[fx.Node, LayerBounds]] = {}
        together: list[tuple[frozenset[str], float]] = []
        capped_together = False
        counted: dict[str, int] = {}
        for node in self.traced.tensor_nodes():
            bounds = self.bounds(node)
            if bounds is None or node.op != "call_module":
                continue
            leaf, held = self.leaf(node)
            trainable = {name: p for name, p in held.items() if p.requires_grad}
            if not trainable:
                continue
            # Where caps bound every gradient, norms are asked for only as far as they cost no certificate.
            capped = trainable.keys() <= bounds.gradient_limits.keys()
            sources = self.traced.operands(node)
            known = self.free if capped else value_of
            arriving = known(partial(self.cotangent, node))
            # Layers of distances have bounds without one, which no certificate is computed for.
            unread = self.free if isinstance(leaf, OF_DISTANCES) else known
            entering = unread(partial(self._largest_norm, sources))
            own: dict[str, float] = {}
            for name, parameter in trainable.items():
                own[name] = scale * self._gradient(bounds, name, arriving)
                key = self.traced.names[id(parameter)]
                per_parameter[key] = per_parameter.get(key, 0.0) + own[name]
            keys = {name: self.traced.names[id(parameter)] for name, parameter in trainable.items()}
            together += _contributions(bounds, keys, own, scale)
            capped_together |= bool(bounds.joint_limits)
            for gate, count in bounds.counted.items():
                caps = adapting(leaf)
                path = gate if caps is None or not caps.place else f"{caps.place}.{gate}"
                counted[path] = counted.get(path, 0) + count
            if bounds.kinds:
                layers += [
                    LayerSensitivity(
                        self.traced.names[id(trainable[name])], kind, math.inf, math.inf, None, None, own[name]
                    )
                    for name, kind in bounds.kinds.items()
                    if name in own
                ]
                continue
            layers.append(
                LayerSensitivity(
                    path=str(node.target),
                    kind=kind_of(leaf).__name__,
                    input_norm=entering,
                    cotangent_norm=arriving,
                    coverage=bounds.coverage,
                    certified_norm=None,
                    sensitivity=math.hypot(
                        *(bound for _, bound in _contributions(bounds, {name: name for name in own}, own, scale))
                    ),
                )
            )
            owners[len(layers) - 1] = node, bounds
        for name, bound in per_parameter.items():
            if not 0.0 <= bound < LARGEST:
                raise PrivacyError(
                    f"the gradient bound of {name!r} is {bound:.3g}: activations may overflow, and then no finite "
                    f"noise protects them; constrain the weights or put gates around the layers{self._isolated_parts()}"
                )
        report = (
            replace(layer, certified_norm=self._known_norm(*owners[index])) if index in owners else layer
            for index, layer in enumerate(layers)
        )
        joint = _joint_(per_parameter, _merged(together)) if capped_together else ()
        found = Sensitivity(per_parameter, 0.0, relation, tuple(report), joint, counted)
        return replace(found, total=math.hypot(*(bound for _, bound in found.blocks(per_parameter))))

    def _isolated_parts(self) -> str:
        """Why no bound comes from behind a part that runs sample by sample, if there is one."""
        calls = (node for node in self.traced.tensor_nodes() if node.op == "call_module")
        names = [repr(str(node.target)) for node in calls if isinstance(self.traced.leaf(node), Isolated)]
        if not names:
            return ""
        return (
            f". The part {names[0]} runs sample by sample and has no Lipschitz constant, so that what is trained in "
            "front of it needs gradient gates too: call gradient_gated for the whole network"
        )

    def _largest_norm(self, sources: tuple[fx.Node, ...]) -> float:
        return max(self.norm(source) for source in sources)

    def _gradient(self, bounds: LayerBounds, name: str, arriving: float) -> float:
        """``Δ_θ``: per unit of cotangent times the cotangent; behind a gradient gate ``min(c, Δ_θ·stretch)``."""
        unit, cap = bounds.gradients[name], bounds.gradient_limits.get(name)
        if cap is None:
            return value_of(unit) * arriving
        stretch = bounds.gradient_stretches.get(name)
        if stretch is None or not math.isfinite(arriving):
            return cap
        return min(cap, self.free(lambda: value_of(unit) * arriving * stretch))

    def _known_norm(self, node: fx.Node, bounds: LayerBounds) -> float | None:
        for name, operator in bounds.operators.items():
            if name == "weight":
                key = self.traced.names[id(self.leaf(node)[1][name])]
                return self.limits.get(key, self._certified.get((key, operator)))
        return None


def _contributions(
    bounds: LayerBounds, keys: Mapping[str, str], own: Mapping[str, float], scale: float
) -> list[tuple[frozenset[str], float]]:
    """What one use of a layer adds to the gradients: sets of parameters, and how much to all of a set together.

    Args:
        bounds: the rule's.
        keys: the names of what is trained, by those that the layer has for it.
        own: the bound of each alone.
        scale: of the neighbouring relation.
    """
    joint = [
        (tuple(name for name in names if name in keys), cap * scale)
        for names, cap in bounds.joint_limits
        if any(name in keys for name in names)
    ]
    within = [name for names, _ in joint for name in names]
    if len(within) == len(set(within)):
        # Each alone is in one use only, so that its own bound speaks for it too.
        joint = [(names, min(cap, math.hypot(*(own[name] for name in names)))) for names, cap in joint]
    alone = [((name,), own[name]) for name in keys if name not in within]
    return [(frozenset(keys[name] for name in names), bound) for names, bound in (*joint, *alone)]


def _joint_(
    per_parameter: dict[str, float], together: Iterable[tuple[frozenset[str], float]]
) -> tuple[tuple[tuple[str, ...], float], ...]:
    """The sets of several parameters, named in order; each parameter's own bound is at most that of its set."""
    joint = []
    for members, bound in together:
        if len(members) > 1:
            joint.append((tuple(name for name in per_parameter if name in members), bound))
        for name in members:
            per_parameter[name] = min(per_parameter[name], bound)
    return tuple(joint)


def _merged(together: Iterable[tuple[frozenset[str], float]]) -> list[tuple[frozenset[str], float]]:
    """Sets that share a parameter become one, to which all of them add."""
    found: list[tuple[frozenset[str], float]] = []
    for members, bound in together:
        apart = []
        for others, more in found:
            if members & others:
                members, bound = members | others, bound + more
            else:
                apart.append((others, more))
        found = [*apart, (members, bound)]
    return found


def named_parameters(leaf: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters, one that is held under two names under both: each use counts."""
    return dict(leaf.named_parameters(remove_duplicate=False))


class _Context:
    """What a rule sees of the sweep."""

    def __init__(self, sweep: Sweep, node: fx.Node) -> None:
        self._sweep = sweep
        self._node = node
        traced = sweep.traced
        self._operands = traced.operands(node)
        self.path = str(node.target) if node.op == "call_module" else node.name
        if node.op == "call_module":
            self.kind = kind_of(sweep.leaf(node)[0]).__name__
        else:
            self.kind = function_name(node)
        self.input_shapes = tuple(traced.shapes[source] for source in self._operands)
        self.output_shape = traced.shapes[node]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.input_shapes[0]

    @property
    def input_norm(self) -> float:
        return self._sweep.norm(self._operands[0])

    def input_norms(self) -> tuple[float, ...]:
        return tuple(self._sweep.norm(source) for source in self._operands)

    @property
    def input_norm_inf(self) -> float:
        return max(self._sweep.norm_inf(source) for source in self._operands)

    @property
    def free_input_norm(self) -> float:
        return self._sweep.free(lambda: self.input_norm)

    def norm(self, parameter: str, operator: Operator) -> float:
        return self._sweep.certified(self._node, self.path, parameter, operator)


@contextmanager
def deep_recursion(nodes: int) -> Iterator[None]:
    """The sweeps recurse through the graph, a few frames a node."""
    previous = sys.getrecursionlimit()
    sys.setrecursionlimit(max(previous, 1000 + 20 * nodes))
    try:
        yield
    finally:
        sys.setrecursionlimit(previous)
