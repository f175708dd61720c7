"""Where a gradient gate would pay, and what it would cost in time."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipless_dp.bounds.tightness import TIGHT, rounded_up
from clipless_dp.display import Table, Tabular
from clipless_dp.gates import GradientGated, can_be_gradient_gated, gradient_gated_layer
from clipless_dp.gates.arithmetic import FLOOR_SHARE
from clipless_dp.model import passes
from clipless_dp.model.wrapped import DPLipModel
from clipless_dp.packing import Structure

_ROUNDS = 5
"""Passes of which the median is taken."""


@dataclass(frozen=True)
class GateSuggestion:
    """One layer that could have a gradient gate.

    Attributes:
        path: where the layer is in the network.
        bound: ``Δ`` over its trainable parameters, now.
        observed: the same of the largest gradients that were seen.
        limit: a cap for the weight's gradient that touches none of the samples seen.
        bias_limit: one for the bias's, or ``None``.
        pays: whether the bound falls to half or less.
        seconds: what the gate adds to a step on the batch.
        share: the same, in steps as they are now.
    """

    path: str
    bound: float
    observed: float
    limit: float
    bias_limit: float | None
    pays: bool
    seconds: float
    share: float


@dataclass(frozen=True)
class GateSuggestions(Tabular):
    """What gradient gates would do to a network; prints as a table.

    Like the report on tightness it describes the samples that it was measured on and is *not* private: measure on
    public or synthetic data, or keep it, and every limit chosen from it, to the data's owner.

    Attributes:
        layers: a line for each linear layer or convolution without a gate, in the order of execution.
        total: ``Δ`` of the network, now.
        suggested_total: ``Δ`` with the gates that pay.
    """

    layers: tuple[GateSuggestion, ...]
    total: float
    suggested_total: float

    def _table(self) -> Table:
        rows = [
            (
                layer.path,
                f"{layer.bound:.4g}",
                f"{layer.observed:.4g}",
                f"{1e3 * layer.seconds:.2f} ms ({100 * layer.share:+.1f} %)",
                _call(layer) if layer.pays else "–",
            )
            for layer in self.layers
        ]
        headers = ("layer", "Δ", "observed", "time of a step", "gate that pays")
        last = f"total Δ = {self.total:.4g}, with these gates {self.suggested_total:.4g}; not private"
        return Table(headers, rows, ("left", "right", "right", "right", "left"), [last])


def _call(layer: GateSuggestion) -> str:
    bias = "" if layer.bias_limit is None else f", bias_limit={layer.bias_limit:g}"
    return f"gradient_gated(net, layers=[{layer.path!r}], limit={layer.limit:g}{bias})"


def suggest_gates(model: DPLipModel, batch: tuple[Tensor | Structure, Tensor]) -> GateSuggestions:
    """Says for each linear layer and convolution whether a gradient gate would pay, and measures its cost in time.

    A gate pays where the largest gradient of a sample is half the layer's bound or less: see ``model.tightness``. The
    time is that of the layer's own forward and backward pass with the gate, less that without, on signals of the
    shape that it sees, next to the time of a step of the whole network. Layers with a gate, and those whose parameters
    are used at several places, are left out.

    Args:
        model: the wrapped model; nothing of it is changed.
        batch: inputs ``(B, *input_shape)``, or several of them, and targets ``(B, ...)``; public or synthetic, as for
            ``model.tightness``.

    Raises:
        InputError: the batch is empty, or does not fit the model.
        PrivacyError: an observation is above its bound: the rule of a layer is wrong.
    """
    inputs, targets = model.rows(batch[0]), batch[1]
    report = model.tightness((inputs, targets))
    sensitivity = model.sensitivity()
    parameters = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
    counted = model.nonfinite_samples.clone()

    def step() -> None:
        with passes.unwitnessed():
            torch.autograd.grad(model.loss(model(inputs), targets), parameters, allow_unused=True)

    traced = model.graph
    called = [traced.leaf(node) for node in traced.tensor_nodes() if node.op == "call_module"]
    uses = Counter(id(parameter) for leaf in called for parameter in leaf.parameters())
    suggested = dict(sensitivity.per_parameter)
    lines: dict[str, GateSuggestion] = {}
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        (whole,) = _seconds([step], inputs.device)
        for node in traced.tensor_nodes():
            path = str(node.target)
            if node.op != "call_module" or path in lines or not can_be_gradient_gated(traced.leaf(node)):
                continue
            layer = traced.leaf(node)
            names = {name: traced.names[id(p)] for name, p in layer.named_parameters() if p.requires_grad}
            # Of a parameter that is used twice only the sum of its gradients was seen.
            once = all(uses[id(parameter)] == 1 for parameter in layer.parameters())
            if not names or not once or isinstance(layer, GradientGated):
                continue
            seen = next(line for line in report.layers if line.path == path).largest_gradients
            caps = {name: float(rounded_up(norm)) for name, norm in seen.items()}
            bound = math.hypot(*(sensitivity.per_parameter[key] for key in names.values()))
            pays = math.hypot(*caps.values()) <= TIGHT * bound
            if pays:
                # As the tracker bounds a gate that normalises, which is what the call that is suggested makes.
                suggested |= {key: min(suggested[key] / FLOOR_SHARE, caps[name]) for name, key in names.items()}
            extra = _extra_seconds(layer, len(inputs), traced.shapes[traced.operands(node)[0]])
            lines[path] = GateSuggestion(
                path=path,
                bound=bound,
                observed=math.hypot(*seen.values()),
                limit=caps.get("weight", caps.get("bias", 1.0)),
                bias_limit=caps.get("bias"),
                pays=pays,
                seconds=extra,
                share=extra / whole,
            )
    model.nonfinite_samples.copy_(counted)
    return GateSuggestions(tuple(lines.values()), sensitivity.total, math.hypot(*suggested.values()))


def _extra_seconds(layer: nn.Module, batch: int, shape: tuple[int, ...]) -> float:
    """What a gate adds to a layer's forward and backward pass on signals of one shape."""
    parameters = list(layer.parameters())
    values = torch.randn(batch, *shape, dtype=parameters[0].dtype, device=parameters[0].device)
    cotangents = torch.randn_like(layer(values))

    def passes(of: nn.Module) -> None:
        trained = [p for p in parameters if p.requires_grad]
        torch.autograd.grad(of(values), trained, cotangents)

    gated = gradient_gated_layer(layer, 1.0)
    plain, with_gate = _seconds([lambda: passes(layer), lambda: passes(gated)], values.device)
    return with_gate - plain


def _seconds(runs: list[Callable[[], None]], device: torch.device) -> list[float]:
    """Median time of each of some functions, which take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(_ROUNDS + 1):
        for run, own in zip(runs, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # The first pays for what is set up once.
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]
