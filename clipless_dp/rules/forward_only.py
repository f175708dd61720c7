"""Networks that are trained by two forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from clipless_dp.gates import rounding_slack
from clipless_dp.layers import Foton, Pepita
from clipless_dp.norms.operators import DenseOperator, Operator
from clipless_dp.rules.base import LARGEST, Deferred, LayerBounds, RuleContext, find_rule, register_rule, value_of


@register_rule(Foton)
def foton_rule(module: Foton, context: RuleContext) -> LayerBounds:
    """``Y = X_L``, ``K = ΠK_l``, ``Δ_W = L_l·φ·GX``, ``Δ_b = L_l·φ·G``, of the last layer ``GX`` and ``G``.

    ``h_l - h̃_l`` is at most ``L_l‖x - x̃‖`` with ``L_l = Π_{j≤l}K_j``, and ``‖x - x̃‖ ≤ φ‖e‖``, ``φ = Π‖W_l‖``. A
    gradient is the outer product of that with ``h_{l-1}``, ``X_{l-1}`` at most; a cap clips it.
    """
    return _bounds(module, context, bounded=True)


@register_rule(Pepita)
def pepita_rule(module: Pepita, context: RuleContext) -> LayerBounds:
    """``Y = X_L``, ``K = ΠK_l``, ``Δ = c``.

    Gradients have their caps alone: the inputs of the second pass, which are in them, grow with the error.
    """
    return _bounds(module, context, bounded=False)


def _bounds(module: Foton | Pepita, context: RuleContext, *, bounded: bool) -> LayerBounds:
    blocks = module.blocks
    shape: tuple[int, ...] = (math.prod(context.input_shape),)
    norm: Deferred = lambda: context.input_norm  # noqa: E731
    stretches: list[Deferred] = []
    ends: list[int] = []
    gradients: dict[str, Deferred] = {} if bounded else {"feedback": 0.0}
    operators: dict[str, Operator] = {}
    limits: dict[str, float] = {}

    def stretched(layers: int) -> float:
        return math.prod(map(value_of, stretches[:layers]))

    def arriving(place: int) -> float:
        """The norm of what stands for the cotangent of a linear layer, per unit of the error's."""
        if place == len(blocks) - 1:
            return 1.0
        weights = (context.norm(f"net.{block.name}.weight", DenseOperator()) for block in blocks)
        return _finite(stretched(ends[place]) * math.prod(weights))

    for place, block in enumerate(blocks):
        for layer in (block.linear, *block.rest):
            inner = _Inner(context, f"net.{block.name}", (shape,), _output_shape(layer, shape), norm)
            rule = find_rule(layer)
            assert rule is not None
            found = rule(layer, inner)
            assert not isinstance(found.lipschitz, Sequence)
            norm = partial(_finite, found.output_norm)
            stretches.append(found.lipschitz)
            operators |= {f"{inner.path}.{name}": operator for name, operator in found.operators.items()}
            for name, unit in found.gradients.items():
                key = f"{inner.path}.{name}"
                gradients[key] = partial(_product, unit, partial(arriving, place)) if bounded else math.inf
                sizes = (*inner.input_shape, *inner.output_shape) if name == "weight" else inner.output_shape
                cap = module.limit if name == "weight" else module.bias_limit
                if cap is not None:
                    limits[key] = cap * math.prod(map(rounding_slack, sizes)) * rounding_slack(math.prod(sizes))
            shape = inner.output_shape
        ends.append(len(stretches))
    return LayerBounds(
        output_norm=norm,
        lipschitz=lambda: stretched(len(stretches)),
        gradients=gradients,
        operators=operators,
        gradient_limits=limits,
        gradient_stretches=dict.fromkeys(limits, rounding_slack(1)) if bounded else {},
        kinds={name: f"linear, {type(module).__name__}" for name in operators},
    )


def _finite(bound: Deferred) -> float:
    """A bound; infinite where float32 might overflow."""
    found = value_of(bound)
    return found if found < LARGEST else math.inf


def _product(first: Deferred, second: Deferred) -> float:
    return value_of(first) * value_of(second)


def _output_shape(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (layer.out_features,) if isinstance(layer, nn.Linear) else shape


@dataclass
class _Inner:
    """What a layer of the sequence asks, answered by what came before it."""

    context: RuleContext
    path: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    arriving: Deferred
    kind: str = "layer of a sequence"

    @property
    def free_input_norm(self) -> float:
        return math.inf

    @property
    def input_norm_inf(self) -> float:
        return math.inf

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.input_shapes[0]

    @property
    def input_norm(self) -> float:
        return value_of(self.arriving)

    def input_norms(self) -> tuple[float, ...]:
        return (self.input_norm,)

    def norm(self, parameter: str, operator: Operator) -> float:
        return self.context.norm(f"{self.path}.{parameter}", operator)
