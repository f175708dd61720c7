"""The sensitivity tracker: one sweep forwards for activation norms, one backwards for cotangents."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from clipless_dp import sharding
from clipless_dp.errors import (
    ConfigurationError,
    NormError,
    PrivacyError,
    Unsupported,
    UnsupportedModuleError,
)
from clipless_dp.gates import CotangentGate
from clipless_dp.norms.operators import Operator
from clipless_dp.rules import LayerBounds, RuleError, find_function_rule, find_rule, is_builtin, value_of
from clipless_dp.rules.base import LARGEST, kind_of
from clipless_dp.tracing import TracedNet, parameters_of, place

Relation = Literal["add-or-remove-one", "replace-one"]

_RELATIONS: dict[str, float] = {"add-or-remove-one": 1.0, "replace-one": 2.0}
_FLOAT64_ROUNDING = 1.0 + 1e-10
"""Covers the rounding of the sweeps' own float64 arithmetic: a relative 2^-52 for each of under 10^5 operations."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One parametrised layer's line in the report.

    Attributes:
        path: where the layer is in the network.
        kind: its type.
        input_norm: ``X``; of T tokens ``√T``, the norm of their one-hot rows. Infinite where gradient gates bound all
            that is trained and ``X`` would need weights.
        cotangent_norm: ``G`` at its output; infinite in the same cases.
        coverage: ``N`` for windows, else ``None``.
        certified_norm: of its weight, where the sweeps needed it, else ``None``.
        sensitivity: ``Δ`` over the layer's trainable parameters, under the report's relation.
    """

    path: str
    kind: str
    input_norm: float
    cotangent_norm: float
    coverage: int | None
    certified_norm: float | None
    sensitivity: float


@dataclass(frozen=True)
class Sensitivity:
    """How much one sample can change the summed gradient.

    Attributes:
        per_parameter: ``Δ_θ`` for each trainable parameter, by its name in ``model.net``.
        total: ``(Σ Δ_θ²)^½``.
        relation: the neighbouring relation that the numbers hold for.
        layers: the report, a line for each parametrised layer.

    Guarantee:
        For two batches that differ as the relation says, the summed gradient of each parameter θ differs by at
        most ``per_parameter[θ]`` in Euclidean norm, whatever the samples, targets, loss values and scales.
    """

    per_parameter: Mapping[str, float]
    total: float
    relation: Relation
    layers: tuple[LayerSensitivity, ...]

    def joined(self, *others: Sensitivity) -> Sensitivity:
        """The bounds that hold for rows of any of several passes: for each parameter the largest."""
        bounds = dict(self.per_parameter)
        for other in others:
            for name, bound in other.per_parameter.items():
                bounds[name] = max(bound, bounds.get(name, 0.0))
        return replace(self, per_parameter=bounds, total=math.hypot(*bounds.values()))

    def __str__(self) -> str:
        def shown(value: float | None) -> str:
            return "–" if value is None or math.isinf(value) else f"{value:.4g}"

        rows = [
            (
                layer.path,
                layer.kind,
                shown(layer.input_norm),
                shown(layer.cotangent_norm),
                shown(layer.coverage),
                shown(layer.certified_norm),
                shown(layer.sensitivity),
            )
            for layer in self.layers
        ]
        table = tabulate(
            rows,
            headers=["layer", "type", "X", "G", "coverage", "norm", "Δ"],
            disable_numparse=True,
            colalign=("left", "left", "right", "right", "right", "right", "right"),
        )
        return f"{table}\ntotal Δ = {self.total:.6g} ({self.relation})"


Stamp = tuple[int, tuple[int, ...], bytes, bytes]

_BLOCK = 2048
"""Entries of a parameter that are summed up in one number of a stamp."""


def stamp(parameter: Tensor) -> Stamp:
    """Tells whether a parameter has changed: its version, its place in memory, and two digests of its numbers.

    The digests are for changes through ``.data``, of which autograd's version counter knows nothing. One is of the sums
    of bit patterns over blocks of 2048 entries, in the order of memory, as integers modulo 2⁶⁴ (of float32, pairs as
    one), without rounding. The other is of weighted sums ``Σ_i r_i w_{in+k}`` of every n-th entry, for n blocks, with
    fixed pseudo-random ``r``. Up to collisions of a 128-bit hash:

    * a change of one pattern is always noticed, and so is any change, exchange or shuffle after which some block's
      patterns have another sum: in particular what moves different patterns between two blocks;
    * what keeps all these sums, a shuffle within blocks or an even number of sign changes, say, is noticed where it
      moves some weighted sum by more than that sum's rounding. For a change ``d`` of the 2048 entries of one sum, and
      weights uniform in an interval of length 1, ``Σ r_i d_i`` has a density of at most ``1/max|d_i|``: to stay within
      a rounding ``e`` has a probability of at most ``2e/max|d_i|``, for each of the n sums.
    """
    values = sharding.local(parameter.detach())
    place = values.data_ptr(), *values.stride()
    # Of the parameter itself: within an opaque operator what is detached from it has a counter of its own.
    version = (values if hasattr(parameter, "placements") else parameter)._version
    flat = _in_memory(values)
    size = flat.numel()
    if flat.dtype == torch.float64 or (size % 2 == 0 and flat.storage_offset() % 2 == 0):
        # Several times faster than sums over half-width integers, which torch converts one by one.
        patterns = flat.view(torch.int64)
    else:
        patterns = flat.view(torch.int32)
    with torch.autocast(flat.device.type, enabled=False) if torch.is_autocast_enabled(flat.device.type) else _NOTHING:
        weights = _weights(flat.dtype, flat.device)
        if size < _BLOCK:
            sums, weighted = patterns.sum(), torch.dot(flat, weights[:size])
            return version, place, sums.cpu().numpy().tobytes(), weighted.cpu().numpy().tobytes()
        blocks, length = size // _BLOCK, _BLOCK * patterns.numel() // size
        sums = patterns[: blocks * length].view(blocks, length).sum(1)
        weighted = torch.mv(flat[: blocks * _BLOCK].view(_BLOCK, blocks).t(), weights)
        if size % _BLOCK:
            left = flat[blocks * _BLOCK :]
            sums = torch.cat((sums, patterns[blocks * length :].sum().reshape(1)))
            weighted = torch.cat((weighted, torch.dot(left, weights[: len(left)]).reshape(1)))
        return version, place, _digest(sums), _digest(weighted)


_NOTHING: AbstractContextManager[None] = nullcontext()


def _in_memory(values: Tensor) -> Tensor:
    """All entries in one row, in the order in which they lie in memory where they lie without gaps."""
    if values.is_contiguous():
        return values.view(-1)
    axes = sorted(range(values.dim()), key=lambda axis: values.stride(axis), reverse=True)
    return values.permute(axes).reshape(-1).contiguous()


def _digest(sums: Tensor) -> bytes:
    return hashlib.blake2b(sums.cpu().numpy().tobytes(), digest_size=16).digest()


@lru_cache(maxsize=16)
def _weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed numbers, uniform in [0.5, 1.5)."""
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.rand(_BLOCK, generator=generator, dtype=torch.float64, device="cpu")
    return (drawn + 0.5).to(device, dtype)


class _NeedsWeights(Exception):
    """A bound cannot be had without reading a weight."""


class SensitivityTracker:
    """Composes the layers' bounds over a traced network.

    Args:
        traced: the network's graph.
        input_norm: ``X₀``, the cap of the input gate, rounding included.
        cotangent_norm: ``G``, the cap of the cotangent gate at the output, rounding included.

    Raises:
        UnsupportedModuleError: a rule refuses a layer's configuration, or leaves out one of its parameters.
    """

    def __init__(self, traced: TracedNet, *, input_norm: float, cotangent_norm: float) -> None:
        self.traced = traced
        self.input_norm = input_norm
        self.cotangent_norm = cotangent_norm
        self._certificates: dict[tuple[int, Operator], tuple[Stamp, float]] = {}
        self.operators = self._collect_operators()

    def sensitivity(
        self,
        *,
        limits: Mapping[str, float] | None = None,
        relation: Relation = "add-or-remove-one",
    ) -> Sensitivity:
        """Runs the two sweeps.

        Args:
            limits: norms that constraints guarantee, by parameter name; other norms are certified from values.
            relation: the neighbouring relation.

        Raises:
            ConfigurationError: the relation is unknown.
            PrivacyError: a bound is not finite or so large that activations may overflow.
        """
        return self.evaluate(limits or {}, relation)[0]

    def evaluate(
        self, limits: Mapping[str, float], relation: Relation, *, whole: bool = True
    ) -> tuple[Sensitivity, set[str]]:
        """The sensitivity, and what it was read from besides the limits: if nothing, it holds for any weights.

        Raises:
            PrivacyError: as :meth:`sensitivity`; or the weights are not whole here, and a user's rule may read them.
        """
        if relation not in _RELATIONS:
            raise ConfigurationError(f"relation must be one of {sorted(_RELATIONS)}, got {relation!r}")
        sweep = _Sweep(self, limits)
        sweep.whole = whole
        try:
            with _deep_recursion(len(self.traced.shapes)):
                return sweep.sensitivity(relation), sweep.reads
        except _NeedsWeights:
            raise PrivacyError(
                "a rule of your own may read weights, of which each rank holds a part only: put a gradient gate inside "
                "its layer or signal gates around it that bound what it does without them, or keep the model whole"
            ) from None

    def lipschitz_constant(self, limits: Mapping[str, float]) -> float:
        """Bound on how far the output moves per unit of the input, in Euclidean norms; infinite where none is known."""
        sweep = _Sweep(self, limits)
        with _deep_recursion(len(self.traced.shapes)):
            source = next(node for node in self.traced.tensor_nodes() if node.op == "placeholder")
            return math.inf if self.traced.vocabulary is not None else sweep.slope(source) * _FLOAT64_ROUNDING

    def certify(self, parameter: Tensor, operator: Operator) -> float:
        """Certified norm of a parameter; a frozen one is certified once for each of its versions."""
        if parameter.requires_grad:
            return operator.norm(sharding.whole(parameter))
        key, version = (id(parameter), operator), stamp(parameter)
        known = self._certificates.get(key)
        if known is None or sharding.on_any_part(parameter, known[0] != version):
            known = version, operator.norm(sharding.whole(parameter))
            self._certificates[key] = known
        return known[1]

    def _collect_operators(self) -> dict[str, tuple[Operator, ...]]:
        sweep = _Sweep(self, {})
        found: dict[str, tuple[Operator, ...]] = {}
        parts: list[Unsupported] = []
        with _deep_recursion(len(self.traced.shapes)):
            for node in self.traced.tensor_nodes():
                try:
                    bounds = sweep.bounds(node)
                except RuleError as refusal:
                    called = node.op == "call_module"
                    kind = type(self.traced.leaf(node)).__name__ if called else _function_name(node)
                    parts.append(Unsupported(place(node), kind, str(refusal)))
                    continue
                if bounds is None or node.op != "call_module":
                    continue
                leaf = self.traced.leaf(node)
                own = _parameters(leaf)
                for absent in sorted((bounds.gradients.keys() | bounds.operators.keys()) - own.keys()):
                    remedy = f"its {absent!r} is not a parameter; make it one, frozen if it is not to be trained"
                    parts.append(Unsupported(str(node.target), type(leaf).__name__, remedy))
                for missing in sorted(own.keys() - bounds.gradients.keys()):
                    remedy = f"its rule gives no gradient bound for the parameter {missing!r}; add it to `gradients`"
                    parts.append(Unsupported(str(node.target), type(leaf).__name__, remedy))
                for name in bounds.operators.keys() & own.keys():
                    key = self.traced.names[id(own[name])]
                    found[key] = (*found.get(key, ()), bounds.operators[name])
        if parts:
            raise UnsupportedModuleError(parts)
        return found


class _Sweep:
    """One evaluation; memoises what it has computed and remembers which weights it read."""

    def __init__(self, tracker: SensitivityTracker, limits: Mapping[str, float]) -> None:
        self.tracker = tracker
        self.traced = tracker.traced
        self.limits = limits
        self.reads: set[str] = set()
        self.free_only = False
        self.whole = True
        self._bounds: dict[fx.Node, LayerBounds | None] = {}
        self._norms: dict[fx.Node, float] = {}
        self._cotangents: dict[fx.Node, float] = {}
        self._slopes: dict[fx.Node, float] = {}
        self._certified: dict[tuple[str, Operator], float] = {}
        self._consumers: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        for node in self.traced.tensor_nodes():
            for position, source in enumerate(self.traced.operands(node)):
                self._consumers.setdefault(source, []).append((node, position))

    def bounds(self, node: fx.Node) -> LayerBounds | None:
        """The rule's answer for a node; ``None`` for the network's input."""
        if node not in self._bounds:
            self._bounds[node] = self._apply_rule(node)
        return self._bounds[node]

    def _apply_rule(self, node: fx.Node) -> LayerBounds | None:
        if node.op == "placeholder":
            return None
        context = _Context(self, node)
        if node.op == "call_module":
            leaf = self.traced.leaf(node)
            rule = find_rule(leaf)
            assert rule is not None
            if not is_builtin(rule):
                self._count_as_read(leaf, context.path)
            return rule(leaf, context)
        function_rule = find_function_rule(node.target)
        assert function_rule is not None
        if not is_builtin(function_rule):
            self._count_as_read(None, context.path)
        return function_rule(context, node.args, dict(node.kwargs))

    def _count_as_read(self, leaf: nn.Module | None, path: str) -> None:
        """A user's rule may read whatever changes, so nothing that it says is kept for later steps.

        Not even where no bound rests on it, as behind gates: what is computed without weights would be kept for good.
        """
        own = set() if leaf is None else {self.traced.names[id(parameter)] for parameter in leaf.parameters()}
        if own and (self.free_only or not self.whole):
            raise _NeedsWeights
        self.reads |= {*own, f"the rule of {path}"}

    def norm(self, node: fx.Node) -> float:
        """``Y``: bound on the norm of a node's value."""
        if node not in self._norms:
            bounds = self.bounds(node)
            self._norms[node] = self.tracker.input_norm if bounds is None else value_of(bounds.output_norm)
        return self._norms[node]

    def cotangent(self, node: fx.Node) -> float:
        """``G``: bound on the norm of the cotangent that arrives at a node's value: its consumers' bounds add."""
        if node not in self._cotangents:
            total = self.tracker.cotangent_norm if node is self.traced.output else 0.0
            for consumer, position in self._consumers.get(node, ()):
                total += self._passed_back(consumer, position)
            self._cotangents[node] = total
        return self._cotangents[node]

    def _passed_back(self, consumer: fx.Node, position: int) -> float:
        bounds = self.bounds(consumer)
        assert bounds is not None

        def stretched() -> float:
            return _factor(bounds, position) * self.cotangent(consumer)

        if math.isinf(bounds.cotangent_cap):
            return stretched()
        return min(self.free(stretched), bounds.cotangent_cap)

    def slope(self, node: fx.Node) -> float:
        """Bound on how far the output moves per unit of a node's value: its consumers' bounds add.

        It differs from the cotangent's way back where a gate acts on cotangents alone.
        """
        if node not in self._slopes:
            total = 1.0 if node is self.traced.output else 0.0
            for consumer, position in self._consumers.get(node, ()):
                beyond = self.slope(consumer)
                if beyond > 0.0:
                    total += self._forward_factor(consumer, position) * beyond
            self._slopes[node] = total
        return self._slopes[node]

    def _forward_factor(self, node: fx.Node, position: int) -> float:
        bounds = self.bounds(node)
        assert bounds is not None
        if node.op == "call_module" and isinstance(self.traced.leaf(node), CotangentGate):
            return 1.0
        # Any other rule that caps cotangents says nothing of the values that its layer returns.
        return _factor(bounds, position) if math.isinf(bounds.cotangent_cap) else math.inf

    def free(self, evaluate: Callable[[], float]) -> float:
        """A bound if it follows without reading weights, else infinity."""
        previous, self.free_only = self.free_only, True
        try:
            return evaluate()
        except _NeedsWeights:
            return math.inf
        finally:
            self.free_only = previous

    def certified(self, leaf: nn.Module, path: str, name: str, operator: Operator) -> float:
        """Norm of a parameter as an operator: its constraint's limit, or certified from its value."""
        parameter = _parameters(leaf)[name]
        key = self.traced.names[id(parameter)]
        # A limit speaks for the operators that the constraint knew of, not for whatever else a rule may ask about.
        if key in self.limits and operator in self.tracker.operators.get(key, ()):
            return self.limits[key]
        if (key, operator) not in self._certified:
            if self.free_only:
                raise _NeedsWeights
            self.reads.add(key)
            try:
                self._certified[key, operator] = self.tracker.certify(parameter, operator)
            except NormError as error:
                raise NormError(f"{path}.{name}: {error}") from error
        return self._certified[key, operator]

    def sensitivity(self, relation: Relation) -> Sensitivity:
        scale = _RELATIONS[relation] * _FLOAT64_ROUNDING
        per_parameter: dict[str, float] = {}
        layers: list[LayerSensitivity] = []
        owners: list[tuple[nn.Module, LayerBounds]] = []
        for node in self.traced.tensor_nodes():
            bounds = self.bounds(node)
            if bounds is None or node.op != "call_module":
                continue
            leaf = self.traced.leaf(node)
            trainable = {name: p for name, p in _parameters(leaf).items() if p.requires_grad}
            if not trainable:
                continue
            # Where caps bound every gradient, norms are asked for only as far as they cost no certificate.
            capped = trainable.keys() <= bounds.gradient_limits.keys()
            sources = self.traced.operands(node)
            known = self.free if capped else value_of
            arriving = known(partial(self.cotangent, node))
            entering = known(partial(self._largest_norm, sources))
            own: list[float] = []
            for name, parameter in trainable.items():
                own.append(scale * self._gradient(bounds, name, arriving))
                key = self.traced.names[id(parameter)]
                per_parameter[key] = per_parameter.get(key, 0.0) + own[-1]
            layers.append(
                LayerSensitivity(
                    path=str(node.target),
                    kind=kind_of(leaf).__name__,
                    input_norm=entering,
                    cotangent_norm=arriving,
                    coverage=bounds.coverage,
                    certified_norm=None,
                    sensitivity=math.hypot(*own),
                )
            )
            owners.append((leaf, bounds))
        for name, bound in per_parameter.items():
            if not bound < LARGEST:
                raise PrivacyError(
                    f"the gradient bound of {name!r} is {bound:.3g}: activations may overflow, and then no finite "
                    "noise protects them; constrain the weights or put gates around the layers"
                )
        report = (
            replace(layer, certified_norm=self._known_norm(*owner)) for layer, owner in zip(layers, owners, strict=True)
        )
        return Sensitivity(per_parameter, math.hypot(*per_parameter.values()), relation, tuple(report))

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

    def _known_norm(self, leaf: nn.Module, bounds: LayerBounds) -> float | None:
        for name, operator in bounds.operators.items():
            if name == "weight":
                key = self.traced.names[id(_parameters(leaf)[name])]
                return self.limits.get(key, self._certified.get((key, operator)))
        return None


def _factor(bounds: LayerBounds, position: int) -> float:
    lipschitz = bounds.lipschitz
    factor = lipschitz[position] if isinstance(lipschitz, (tuple, list)) else lipschitz
    return value_of(factor)  # type: ignore[arg-type]


def _function_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _parameters(leaf: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters, one that is held under two names under both: each use counts."""
    return dict(leaf.named_parameters(remove_duplicate=False))


class _Context:
    """What a rule sees of the sweep."""

    def __init__(self, sweep: _Sweep, node: fx.Node) -> None:
        self._sweep = sweep
        self._node = node
        traced = sweep.traced
        self._operands = traced.operands(node)
        self.path = str(node.target) if node.op == "call_module" else node.name
        if node.op == "call_module":
            self.kind = kind_of(traced.leaf(node)).__name__
        else:
            self.kind = _function_name(node)
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
    def free_input_norm(self) -> float:
        return self._sweep.free(lambda: self.input_norm)

    def norm(self, parameter: str, operator: Operator) -> float:
        return self._sweep.certified(self._sweep.traced.leaf(self._node), self.path, parameter, operator)


@contextmanager
def _deep_recursion(nodes: int) -> Iterator[None]:
    """The sweeps recurse through the graph, a few frames a node."""
    previous = sys.getrecursionlimit()
    sys.setrecursionlimit(max(previous, 1000 + 20 * nodes))
    try:
        yield
    finally:
        sys.setrecursionlimit(previous)


def parameter_device_and_dtype(net: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a network's parameters.

    Raises:
        ConfigurationError: they are spread over several, or the dtype is neither float32 nor float64.
    """
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters_of(net)} or {
        (torch.device("cpu"), torch.float32)
    }
    if len(kinds) != 1:
        listed = ", ".join(sorted(f"{device}/{dtype}" for device, dtype in kinds))
        raise ConfigurationError(f"the network's parameters must share one device and one dtype, found {listed}")
    ((device, dtype),) = kinds
    if dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(
            f"parameters must be float32 or float64, got {dtype}: the bounds do not cover coarser rounding"
        )
    return device, dtype
