"""How much of each bound a batch uses: where noise is spent on signals that never come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from clipless_dp.bounds.sensitivity import LayerSensitivity, Sensitivity
from clipless_dp.display import Table, Tabular
from clipless_dp.errors import InputError, PrivacyError
from clipless_dp.gates import GradientGated, can_be_gradient_gated
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.isolation import Isolated

TIGHT = 0.5
"""A bound that is half used costs at most twice the noise it has to: no gate is advised."""

_ROUNDING = 1e-3
"""float32 products of a forward and a backward pass round by less; anything above refutes a bound."""

Forward = Callable[[Tensor], Tensor]
SampleLoss = Callable[[Forward, int], Tensor]


@dataclass(frozen=True)
class LayerTightness:
    """One parametrised layer's line in the report; ratios are worst observed over bound.

    Attributes:
        path: where the layer is in the network.
        kind: its type.
        activation: of its input's norm; 0 where gradient gates make its bound needless.
        cotangent: of the norm of the cotangent at its output; 0 in the same cases.
        gradients: of each parameter's per-sample gradient, over all uses of that parameter.
        largest_activation: the largest norm of an input: what a gate before the layer should let pass.
        largest_cotangent: the largest norm of a cotangent: what a gate behind the layer should let pass.
        largest_gradients: of each parameter, the largest norm of a sample's gradient.
        advice: which gate or constraint would make its bound smaller.
    """

    path: str
    kind: str
    activation: float
    cotangent: float
    gradients: Mapping[str, float]
    largest_activation: float
    largest_cotangent: float
    largest_gradients: Mapping[str, float]
    advice: str


@dataclass(frozen=True)
class TightnessReport(Tabular):
    """How much of each bound one batch uses; prints as a table.

    It describes the samples it was measured on and is *not* private: measure on public or synthetic data, or keep
    the report, and every setting chosen from it, to the data's owner.

    Attributes:
        samples: how many samples were looked at.
        total: largest norm of a sample's whole gradient, over ``sensitivity().total``.
        layers: a line for each use of a parametrised layer, in the order of execution.
    """

    samples: int
    total: float
    layers: tuple[LayerTightness, ...]

    def _table(self) -> Table:
        rows = [
            (
                layer.path,
                layer.kind,
                f"{layer.activation:.3f}",
                f"{layer.cotangent:.3f}",
                ", ".join(f"{name} {ratio:.3f}" for name, ratio in layer.gradients.items()),
                layer.advice,
            )
            for layer in self.layers
        ]
        headers = ("layer", "type", "activations", "cotangents", "gradients", "what would help")
        last = f"observed/bound over {self.samples} samples, not private; whole gradient {self.total:.3f}"
        return Table(headers, rows, ("left", "left", "right", "right", "left", "left"), [last])


def measure(
    traced: TracedNet, sensitivity: Sensitivity, samples: int, loss: SampleLoss, parameters: Mapping[str, Tensor]
) -> TightnessReport:
    """Runs the samples one at a time and compares what is seen with the bounds; no generator's state changes.

    Args:
        traced: the network's graph.
        sensitivity: its bounds, for adding or removing one sample.
        samples: their number.
        loss: given a stand-in for the network and a sample's index, that sample's loss.
        parameters: by their names in the network.

    Raises:
        InputError: there is no sample.
        PrivacyError: an observation is above its bound: a rule is wrong.
    """
    if samples < 1:
        raise InputError("tightness needs at least one sample")
    parameters = {name: parameter for name, parameter in parameters.items() if name in sensitivity.per_parameter}
    if not parameters:
        return TightnessReport(samples, 0.0, ())
    recorder = _Recorder(traced)
    largest_gradients = dict.fromkeys(parameters, 0.0)
    largest_total = 0.0
    for index in range(samples):
        value = loss(recorder.run, index)
        wanted = [*parameters.values(), *recorder.outputs.values()]
        found = torch.autograd.grad(value, wanted, allow_unused=True)
        norms = [0.0 if cotangent is None else _norm(cotangent) for cotangent in found]
        for name, norm in zip(parameters, norms, strict=False):
            largest_gradients[name] = max(largest_gradients[name], norm)
        largest_total = max(largest_total, math.hypot(*norms[: len(parameters)]))
        for node, norm in zip(recorder.outputs, norms[len(parameters) :], strict=True):
            recorder.cotangents[node] = max(recorder.cotangents[node], norm)
    lines: list[LayerTightness] = []
    told = iter(sensitivity.layers)
    for node in recorder.watched:
        leaf = traced.leaf(node)
        if isinstance(leaf, Isolated):
            own = sum(parameter.requires_grad for parameter in leaf.parameters())
            lines += [_isolated_line(layer, sensitivity, largest_gradients) for layer in islice(told, own)]
        else:
            lines.append(_line(traced, node, next(told), recorder, sensitivity, largest_gradients))
    total = _ratio(largest_total, sensitivity.total, "the whole gradient")
    return TightnessReport(samples, total, tuple(lines))


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach().double()))


def _one_hot(values: Tensor) -> Tensor:
    """Tokens are T one-hot rows, of norm ``√T``."""
    return values if values.is_floating_point() else torch.ones_like(values)


def _ratio(observed: float, bound: float, what: str) -> float:
    ratio = observed / bound if bound > 0.0 else (0.0 if observed == 0.0 else math.inf)
    if not ratio <= 1.0 + _ROUNDING:
        raise PrivacyError(
            f"{what}: observed {observed:.6g}, above its bound {bound:.6g}; the rule of this layer or of one around "
            "it is wrong. Do not train with it"
        )
    return ratio


def _line(
    traced: TracedNet,
    node: fx.Node,
    layer: LayerSensitivity,
    recorder: _Recorder,
    sensitivity: Sensitivity,
    largest_gradients: Mapping[str, float],
) -> LayerTightness:
    activation, cotangent = recorder.activations[node], recorder.cotangents[node]
    first = _ratio(activation, layer.input_norm, f"the input of {layer.path}")
    second = _ratio(cotangent, layer.cotangent_norm, f"the cotangent of {layer.path}")
    leaf = traced.leaf(node)
    gradients, largest = {}, {}
    for name, parameter in leaf.named_parameters():
        if parameter.requires_grad:
            key = traced.names[id(parameter)]
            largest[name] = largest_gradients[key]
            gradients[name] = _ratio(largest_gradients[key], sensitivity.per_parameter[key], f"the gradient of {key}")
    # Parameters whose bound is larger cost more noise: they decide.
    weights = {name: sensitivity.per_parameter[_key(traced, node, name)] for name in gradients}
    used = math.hypot(*(weights[name] * ratio for name, ratio in gradients.items()))
    whole = math.hypot(*weights.values())
    share = used / whole if whole > 0.0 else 0.0
    if isinstance(leaf, GradientGated):
        advice = "–" if share >= TIGHT else f"gradient gates of a smaller limit ({_listed(largest)})"
    else:
        advice = _advice(layer, activation, cotangent, first, second, share, gateable=can_be_gradient_gated(leaf))
    return LayerTightness(layer.path, layer.kind, first, second, gradients, activation, cotangent, largest, advice)


def _isolated_line(
    layer: LayerSensitivity, sensitivity: Sensitivity, largest_gradients: Mapping[str, float]
) -> LayerTightness:
    """A parameter of a network of which nothing is known but its gates."""
    name = layer.path
    largest = {name: largest_gradients[name]}
    ratio = _ratio(largest[name], sensitivity.per_parameter[name], f"the gradient of {name}")
    advice = "–" if ratio >= TIGHT else f"gradient gates of a smaller limit ({_listed(largest)})"
    return LayerTightness(name, layer.kind, 0.0, 0.0, {name: ratio}, 0.0, 0.0, largest, advice)


def _listed(norms: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {rounded_up(norm)}" for name, norm in norms.items())


def _key(traced: TracedNet, node: fx.Node, name: str) -> str:
    return traced.names[id(traced.leaf(node).get_parameter(name))]


def _advice(
    layer: LayerSensitivity,
    activation: float,
    cotangent: float,
    first: float,
    second: float,
    used: float,
    *,
    gateable: bool,
) -> str:
    if used >= TIGHT:
        return "–"
    rest = used / (first * second) if first * second > 0.0 else 1.0
    if first <= min(second, rest):
        return (
            f"BallProjection({rounded_up(activation)}) before it, smaller biases, or Orthogonal weights in the layers "
            "before it"
        )
    if second <= rest:
        return f"CotangentGate({rounded_up(cotangent)}) behind it, or Orthogonal weights in the layers behind it"
    gate = f"gradient_gated(net, layers=[{layer.path!r}])" if gateable else None
    if layer.coverage is not None and layer.coverage > 1:
        fewer = f"windows that overlap less (coverage {layer.coverage}): a larger stride or a smaller kernel"
        return fewer if gate is None else f"{gate}, or {fewer}"
    return gate or "nothing simple: its worst case needs signals that these samples do not align to"


def rounded_up(norm: float) -> str:
    """Two digits, so that the advised gate touches none of the samples seen."""
    if norm <= 0.0:
        return "1e-8"
    digit = 10.0 ** (math.floor(math.log10(norm)) - 1)
    return f"{max(math.ceil(norm / digit * (1.0 + _ROUNDING)) * digit, 1e-8):.3g}"


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps what enters and leaves each parametrised layer."""

    def __init__(self, traced: TracedNet) -> None:
        super().__init__(traced.module)
        # Errors say where they arose themselves.
        self.extra_traceback = False
        self.traced = traced
        self.watched = [
            node
            for node in traced.tensor_nodes()
            if node.op == "call_module" and any(p.requires_grad for p in traced.leaf(node).parameters())
        ]
        self.activations = dict.fromkeys(self.watched, 0.0)
        self.cotangents = dict.fromkeys(self.watched, 0.0)
        self.outputs: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.activations:
            return super().run_node(n)
        arriving = max(_norm(_one_hot(self.env[source])) for source in self.traced.operands(n))
        self.activations[n] = max(self.activations[n], arriving)
        value = super().run_node(n)
        self.outputs[n] = value
        # A copy goes on: autograd would give an overwritten value's cotangent behind the overwriting.
        return value.clone()
