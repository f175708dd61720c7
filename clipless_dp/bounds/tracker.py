"""The sensitivity tracker: a network, its caps and the norms of its weights, for as many sweeps as are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, fx

from clipless_dp.bounds import coordinates, margins
from clipless_dp.bounds.maximum_norm import carries_l1
from clipless_dp.bounds.sensitivity import RELATIONS, Relation, Sensitivity
from clipless_dp.bounds.stamp import Stamp, stamp
from clipless_dp.bounds.sweep import (
    FLOAT64_ROUNDING,
    NeedsWeights,
    Sweep,
    deep_recursion,
    named_parameters,
)
from clipless_dp.distributed.placement import OneProcess, Placement
from clipless_dp.errors import ConfigurationError, PrivacyError, Unsupported, UnsupportedModuleError
from clipless_dp.graph.tracing import TracedNet, function_name, place
from clipless_dp.layers.coordinates import Slopes
from clipless_dp.norms.operators import Operator
from clipless_dp.rules import RuleError

_NOT_IN_MAXIMUM_NORM = (
    "no Lipschitz constant of it is known in the maximum norm (a rotation stretches it, and so does a projection onto "
    "a Euclidean ball): between layers of distances use nn.ReLU, GroupSort, MaxMin or nn.Linear, or give "
    "lipschitz_inf in the layer's rule"
)


@dataclass(eq=False, repr=False)
class SensitivityTracker:
    """Composes the layers' bounds over a traced network.

    Args:
        traced: the network's graph.
        input_norm: ``X₀``, the cap of the input gate, rounding included.
        cotangent_norm: ``G``, the cap of the cotangent gate at the output, rounding included.
        weights: where the weights are; by default whole, in this process.
        cotangent_norm_l1: the cap of the cotangent's ℓ1 norm at the output, rounding included; ``None`` without one.

    Raises:
        UnsupportedModuleError: a rule refuses a layer's configuration, or leaves out one of its parameters.
    """

    traced: TracedNet
    _: KW_ONLY
    input_norm: float
    cotangent_norm: float
    weights: Placement = field(default_factory=OneProcess)
    cotangent_norm_l1: float | None = None

    def __post_init__(self) -> None:
        self._carries_l1 = carries_l1(self.traced)
        self._certificates: dict[tuple[int, Operator], tuple[Stamp, float]] = {}
        self.operators: dict[str, tuple[Operator, ...]] = {}
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
        if relation not in RELATIONS:
            raise ConfigurationError(f"relation must be one of {sorted(RELATIONS)}, got {relation!r}")
        sweep = self._sweep(limits, whole=whole)
        try:
            with deep_recursion(len(self.traced.shapes)):
                return sweep.sensitivity(relation), sweep.reads
        except NeedsWeights:
            raise PrivacyError(
                "a rule of your own may read weights, of which each rank holds a part only: put a gradient gate inside "
                "its layer or signal gates around it that bound what it does without them, or keep the model whole"
            ) from None

    def lipschitz_constant(self, limits: Mapping[str, float]) -> float:
        """Bound on how far the output moves per unit of the input, in Euclidean norms; infinite where none is known."""
        sweep = self._sweep(limits)
        with deep_recursion(len(self.traced.shapes)):
            source = next(node for node in self.traced.tensor_nodes() if node.op == "placeholder")
            return (
                math.inf
                if self.traced.vocabulary is not None or self.traced.isolated
                else sweep.slope(source) * FLOAT64_ROUNDING
            )

    def lipschitz_constant_inf(self, limits: Mapping[str, float]) -> float:
        """As :meth:`lipschitz_constant`, in maximum norms of input and output.

        Raises:
            UnsupportedModuleError: a layer has no constant there that is known.
        """
        sweep = self._sweep(limits)
        with deep_recursion(len(self.traced.shapes)):
            if self.traced.vocabulary is not None or self.traced.isolated:
                return math.inf
            unknown = sweep.unknown_inf()
            if unknown:
                raise UnsupportedModuleError(
                    [Unsupported(place(node), self._kind(node), _NOT_IN_MAXIMUM_NORM) for node in unknown]
                )
            source = next(node for node in self.traced.tensor_nodes() if node.op == "placeholder")
            return sweep.slope_inf(source) * FLOAT64_ROUNDING

    def forward_error_inf(self, limits: Mapping[str, float]) -> float:
        """As :meth:`forward_error`, of each score by itself."""
        if self.traced.vocabulary is not None or self.traced.isolated:
            return math.inf
        with deep_recursion(len(self.traced.shapes)):
            return margins.forward_error_inf(self._sweep(limits))

    def _kind(self, node: fx.Node) -> str:
        return type(self.traced.leaf(node)).__name__ if node.op == "call_module" else function_name(node)

    def coordinate_slopes(self) -> Slopes:
        """How outputs move with single coordinates of the input; see :mod:`clipless_dp.bounds.coordinates`.

        Raises:
            UnsupportedModuleError: of a part of the network that is not known.
        """
        with deep_recursion(len(self.traced.shapes)):
            return coordinates.coordinate_slopes(self.traced, self.weights)

    def rounding(self, dtype: torch.dtype) -> float:
        """How far outputs computed in a dtype may lie from those of real arithmetic; infinite without a box."""
        with deep_recursion(len(self.traced.shapes)):
            return coordinates.rounding(self.traced, self.weights, dtype)

    def margin_constants(self, limits: Mapping[str, float]) -> Tensor:
        """Lipschitz constants of differences of scores, ``(C, C)``; see :func:`clipless_dp.bounds.margins`."""
        sweep = self._sweep(limits)
        with deep_recursion(len(self.traced.shapes)):
            found = margins.margin_constants(sweep, self.weights)
        if self.traced.vocabulary is None and not self.traced.isolated:
            return found
        return torch.full_like(found, math.inf).fill_diagonal_(0.0)

    def forward_error(self, limits: Mapping[str, float]) -> float:
        """How far a float64 forward pass may lie from the network in real arithmetic; infinite where it is unknown."""
        if self.traced.vocabulary is not None or self.traced.isolated:
            return math.inf
        with deep_recursion(len(self.traced.shapes)):
            return margins.forward_error(self._sweep(limits))

    def certify(self, parameter: Tensor, operator: Operator) -> float:
        """Certified norm of a parameter; a frozen one is certified once for each of its versions."""
        if parameter.requires_grad:
            return operator.norm(self.weights.whole(parameter))
        key, version = (id(parameter), operator), stamp(self.weights.held(parameter))
        known = self._certificates.get(key)
        if known is None or any(self.weights.on_any_part([known[0] != version])):
            known = version, operator.norm(self.weights.whole(parameter))
            self._certificates[key] = known
        return known[1]

    def _sweep(self, limits: Mapping[str, float], *, whole: bool = True) -> Sweep:
        return Sweep(
            self.traced,
            input_norm=self.input_norm,
            cotangent_norm=self.cotangent_norm,
            limits=limits,
            operators=self.operators,
            certify=self.certify,
            whole=whole,
            cotangent_norm_l1=self.cotangent_norm_l1,
            carries_l1=self._carries_l1,
        )

    def _collect_operators(self) -> dict[str, tuple[Operator, ...]]:
        sweep = self._sweep({})
        found: dict[str, tuple[Operator, ...]] = {}
        parts: list[Unsupported] = []
        with deep_recursion(len(self.traced.shapes)):
            for node in self.traced.tensor_nodes():
                try:
                    bounds = sweep.bounds(node)
                except RuleError as refusal:
                    called = node.op == "call_module"
                    kind = type(self.traced.leaf(node)).__name__ if called else function_name(node)
                    parts.append(Unsupported(place(node), kind, str(refusal)))
                    continue
                if bounds is None or node.op != "call_module":
                    continue
                leaf = self.traced.leaf(node)
                own = named_parameters(leaf)
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
