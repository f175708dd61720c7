"""What the sweeps carry in the maximum norm and in its dual: sizes of entries, slopes, and the cotangent's ℓ1 norm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import fx

from clipless_dp.gates import CotangentGate
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.layers import DistanceLinear, SortLinear
from clipless_dp.rules import LayerBounds, value_of

OF_DISTANCES = (DistanceLinear, SortLinear)


def carries_l1(traced: TracedNet) -> bool:
    """Whether the cotangent's ℓ1 norm is carried beside its Euclidean one: in networks with layers that keep it."""
    calls = (node for node in traced.tensor_nodes() if node.op == "call_module")
    return any(isinstance(traced.leaf(node), OF_DISTANCES) for node in calls)


class MaximumNorms(ABC):
    """The part of a sweep that is about maximum norms, and what slopes in these and in Euclidean norms share.

    Args:
        cotangent_norm_l1: the cap of the cotangent's ℓ1 norm at the output; ``None`` without one.
    """

    traced: TracedNet
    cotangent_norm: float

    def __init__(self, cotangent_norm_l1: float | None) -> None:
        self._l1 = math.inf if cotangent_norm_l1 is None else cotangent_norm_l1
        self._pairs: dict[fx.Node, tuple[float, float]] = {}
        self._norms_inf: dict[fx.Node, float] = {}
        self._slopes_inf: dict[fx.Node, float] = {}

    @abstractmethod
    def bounds(self, node: fx.Node) -> LayerBounds | None:
        """The rule's answer for a node."""

    @abstractmethod
    def norm(self, node: fx.Node) -> float:
        """Bound on the Euclidean norm of a node's value."""

    @abstractmethod
    def free(self, evaluate: Callable[[], float]) -> float:
        """A bound if it follows without reading weights, else infinity."""

    @abstractmethod
    def consumers(self, node: fx.Node) -> Sequence[tuple[fx.Node, int]]:
        """Which nodes read a value, and at which place."""

    def cotangents(self, node: fx.Node) -> tuple[float, float]:
        """Bounds on the Euclidean and the ℓ1 norm of the cotangent at a node's value, each of use to the other.

        ``‖g‖₂ ≤ ‖g‖₁ ≤ √n·‖g‖₂``. A layer stretches the one by ``K``, the other by ``K_∞``, where that is known.
        """
        if node not in self._pairs:
            at_output = node is self.traced.output
            second, first = (self.cotangent_norm, self._l1) if at_output else (0.0, 0.0)
            for consumer, position in self.consumers(node):
                found = self._pair_passed_back(consumer, position)
                second, first = second + found[0], first + found[1]
            first = min(first, math.sqrt(math.prod(self.traced.shapes[node])) * second)
            self._pairs[node] = min(second, first), first
        return self._pairs[node]

    def _pair_passed_back(self, consumer: fx.Node, position: int) -> tuple[float, float]:
        bounds = self.bounds(consumer)
        assert bounds is not None
        source = self.traced.operands(consumer)[position]
        root = math.sqrt(math.prod(self.traced.shapes[source]))

        def stretched() -> tuple[float, float]:
            second, first = self.cotangents(consumer)
            if second == 0.0:
                return 0.0, 0.0
            least = factor_of(bounds, position) * second
            factor = _factor_inf(bounds, position)
            return (least, math.inf) if factor is None else (least, factor * first)

        if math.isinf(bounds.cotangent_cap):
            second, first = stretched()
        else:
            second = min(self.free(lambda: stretched()[0]), bounds.cotangent_cap)
            first = self.free(lambda: stretched()[1])
        return min(second, first), min(first, root * second)

    def norm_inf(self, node: fx.Node) -> float:
        """Bound on the size of the largest entry of a node's value."""
        if node not in self._norms_inf:
            bounds = self.bounds(node)
            known = None if bounds is None else bounds.output_norm_inf
            self._norms_inf[node] = self.norm(node) if known is None else value_of(known)
        return self._norms_inf[node]

    def slope_inf(self, node: fx.Node) -> float:
        """As :meth:`slope`, in maximum norms; infinite where a layer on the way has no constant there."""
        return self._summed(node, self._slopes_inf, self.factor_inf)

    def _summed(self, node: fx.Node, known: dict[fx.Node, float], factor: Callable[[fx.Node, int], float]) -> float:
        """What a slope is in either norm, by that of a node in one of its operands: the consumers' bounds add."""
        if node not in known:
            total = 1.0 if node is self.traced.output else 0.0
            for consumer, position in self.consumers(node):
                beyond = self._summed(consumer, known, factor)
                if beyond > 0.0:
                    total += factor(consumer, position) * beyond
            known[node] = total
        return known[node]

    def factor_inf(self, node: fx.Node, position: int) -> float:
        """``K_∞`` of a node in one of its operands, infinite where it is not known."""
        return self._forward(node, position, _factor_inf)

    def _forward(self, node: fx.Node, position: int, factor: Callable[[LayerBounds, int], float | None]) -> float:
        """What a node's value moves by, of what one of its operands does; infinite where nothing is known of it."""
        bounds = self.bounds(node)
        assert bounds is not None
        if node.op == "call_module" and isinstance(self.traced.leaf(node), CotangentGate):
            return 1.0
        # Any other rule that caps cotangents says nothing of the values that its layer returns.
        found = factor(bounds, position) if math.isinf(bounds.cotangent_cap) else None
        return math.inf if found is None else found

    def unknown_inf(self) -> list[fx.Node]:
        """Nodes without a Lipschitz constant in the maximum norm."""
        return [
            node
            for node in self.traced.tensor_nodes()
            if any(math.isinf(self.factor_inf(node, i)) for i in range(len(self.traced.operands(node))))
        ]


def factor_of(bounds: LayerBounds, position: int) -> float:
    """``K`` of one of a layer's inputs."""
    lipschitz = bounds.lipschitz
    factor = lipschitz[position] if isinstance(lipschitz, (tuple, list)) else lipschitz
    return value_of(factor)  # type: ignore[arg-type]


def _factor_inf(bounds: LayerBounds, position: int) -> float | None:
    lipschitz = bounds.lipschitz_inf
    factor = lipschitz[position] if isinstance(lipschitz, (tuple, list)) else lipschitz
    return None if factor is None else value_of(factor)  # type: ignore[arg-type]
