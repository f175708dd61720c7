"""How a bound is attacked: per-sample gradients one sample at a time, structured signals, gradient ascent.

Every attack goes through the real forward, loss and backward of :class:`clipless_dp.DPLipModel`, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, LayerBounds, RuleContext, losses, register_rule
from clipless_dp.constraints import ConstraintSpec

TOLERANCE = 1e-9
"""Relative rounding allowed to the observation: float64 sums of under 10^4 products err by at most 10^4·2^-53 ≈ 1e-12
relative to their absolute sum, and three orders of magnitude are left for cancellation in the attacks' own norms."""

SCALES = (1.0, 1e-6, 1e6)
"""Factors a user might multiply the loss by: the cotangent gate has to make them harmless."""


class BoundBroken(AssertionError):
    """An observation above its bound."""


class Probe(nn.Module):
    """The identity, with a parameter whose per-sample gradient *is* the cotangent; it also keeps what it saw."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))
        self.seen: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        self.seen = values
        return values + self.shift


@register_rule(Probe)
def probe_rule(module: Probe, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, gradients={"shift": 1.0})


# A user's rule might read weights, and bounds behind a gate then fall back to the gate's cap. This one reads none.
probe_rule.__module__ = "clipless_dp.rules.probe"


class Probed(nn.Module):
    """A network between two probes, which turn its Y and K into observable numbers."""

    def __init__(self, layer: nn.Module, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before = Probe(input_shape)
        self.layer = layer
        self.after = Probe(output_shape)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.after(self.layer(self.before(values)))
        return output


class Traced(nn.Module):
    """Applies a plain function, so that its functional calls are what is traced."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)


@dataclass(frozen=True)
class Case:
    """One configuration under attack.

    Attributes:
        name: the line's label in the report.
        build: makes the layer or network; called under a fixed seed.
        shape: of one sample.
        input_norm: ``X₀``.
        cotangent_norm: ``G``.
        attained: parameters of the layer whose bound is at least 0.7 attained, and by how much.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    input_norm: float = 1.0
    cotangent_norm: float = 1.0
    attained: tuple[tuple[str, float], ...] = ()

    def model(self) -> DPLipModel:
        """The probed, wrapped layer with weights of an ordinary size."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            layer = self.build()
            with torch.no_grad():
                output = layer.eval()(torch.zeros(2, *self.shape))
            net = Probed(layer.train(), self.shape, tuple(output.shape[1:])).double()
            for name, parameter in net.named_parameters():
                if "shift" not in name:
                    nn.init.normal_(parameter, std=0.7)
        return wrap(net, self.shape, input_norm=self.input_norm, cotangent_norm=self.cotangent_norm)


def inner_product(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose cotangent is the target itself."""
    return (output * target).flatten(1).sum(1)


def wrap(
    net: nn.Module,
    shape: tuple[int, ...],
    *,
    input_norm: float = 1.0,
    cotangent_norm: float = 1.0,
    constraint: ConstraintSpec = None,
) -> DPLipModel:
    """A model whose target is the cotangent, of any size."""
    loss = losses.BoundedLoss(inner_product, bound=cotangent_norm)
    return DPLipModel(net, input_shape=shape, input_norm=input_norm, loss=loss, constraint=constraint)


def per_sample_gradients(
    model: DPLipModel, sample: Tensor, target: Tensor, *, scale: float = 1.0, differentiable: bool = False
) -> dict[str, Tensor]:
    """The gradient of one sample, as a batch of one, for each trainable parameter that it reaches."""
    named = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    loss = scale * model.loss(model(sample.unsqueeze(0)), target.unsqueeze(0))
    found = torch.autograd.grad(loss, list(named.values()), create_graph=differentiable, allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def observed(
    model: DPLipModel, sample: Tensor, target: Tensor, *, scale: float = 1.0, differentiable: bool = False
) -> dict[str, Tensor]:
    """Per-sample gradient norms, by parameter; and the activation norm that each probe saw, by ``path.input``."""
    gradients = per_sample_gradients(model, sample, target, scale=scale, differentiable=differentiable)
    norms = {name: torch.linalg.vector_norm(gradient) for name, gradient in gradients.items()}
    for path, module in model.net.named_modules():
        if isinstance(module, Probe) and module.seen is not None:
            norms[f"{path}.input"] = torch.linalg.vector_norm(module.seen)
    return norms


def bounds_of(model: DPLipModel) -> dict[str, float]:
    """What the tracker says, under the keys of :func:`observed`."""
    sensitivity = model.sensitivity()
    activations = {f"{layer.path}.input": layer.input_norm for layer in sensitivity.layers if layer.kind == "Probe"}
    return {**sensitivity.per_parameter, **activations}


def signals(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    """Structured signals of any rank, of unit norm but for the last two: the channel axis is the first of a map."""
    count = math.prod(shape)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) for size in shape], indexing="ij")).sum(0) if shape else None
    yield torch.ones(shape)
    for place in sorted({0, count // 2, count - 1}):
        yield torch.zeros(count).index_fill_(0, torch.tensor([place]), 1.0).reshape(shape)
    if grid is not None:
        yield 1.0 - 2.0 * (grid % 2)
    if len(shape) > 1:
        yield torch.randn(shape[-1], generator=generator).expand(shape)
        yield torch.randn(shape[0], generator=generator).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        centre, corner = torch.zeros(shape), torch.zeros(shape)
        centre[(slice(None), *[size // 2 for size in shape[1:]])] = 1.0
        corner[(slice(None), *[0 for _ in shape[1:]])] = 1.0
        yield centre
        yield corner
        if min(shape[1:]) > 8:
            yield comb(shape, 4)
        yield torch.cat([torch.ones(1, *shape[1:]), torch.zeros(shape[0] - 1, *shape[1:])])
    yield torch.randn(shape, generator=generator)
    yield 1e6 * torch.randn(shape, generator=generator)
    yield 1e-6 * torch.randn(shape, generator=generator)


def comb(shape: tuple[int, ...], period: int) -> Tensor:
    """One bright pixel each period, borders left out: where windows of that stride overlap."""
    grid = torch.ones(shape)
    for axis, size in enumerate(shape[1:], start=1):
        bright = (torch.arange(size) % period == 0) & (torch.arange(size) > 0) & (torch.arange(size) < size - 1)
        grid = grid * bright.reshape(-1, *[1] * (len(shape) - 1 - axis))
    return grid


def sized_signals(shape: tuple[int, ...], size: float, generator: torch.Generator) -> Iterator[Tensor]:
    """:func:`signals` in float64, the unit ones scaled to the gate's own radius."""
    for signal in signals(shape, generator):
        values = signal.double()
        norm = float(torch.linalg.vector_norm(values))
        yield values if norm > 1e3 or norm < 1e-3 else values * (size / norm)


def singular_pair(model: DPLipModel, point: Tensor) -> tuple[Tensor, Tensor]:
    """Top singular vectors of the network's Jacobian at a point: the input and the cotangent it stretches most."""

    def run(values: Tensor) -> Tensor:
        output: Tensor = model._graph[0](values.unsqueeze(0))
        return output.squeeze(0)

    jacobian = torch.autograd.functional.jacobian(run, point)
    left, _, right = torch.linalg.svd(jacobian.reshape(math.prod(model.output_shape), -1), full_matrices=False)
    return right[0].reshape(point.shape), left[:, 0].reshape(model.output_shape)


class Record:
    """Worst ratios observed/bound, and the signals that reached them."""

    def __init__(self, model: DPLipModel) -> None:
        self.model = model
        self.bounds = bounds_of(model)
        self.worst: dict[str, float] = {}
        self.signals: dict[str, tuple[Tensor, Tensor]] = {}

    def try_(self, sample: Tensor, target: Tensor, *, scale: float = 1.0) -> None:
        """Adds one attempt.

        Raises:
            BoundBroken: an observation is above its bound.
        """
        for key, norm in observed(self.model, sample, target, scale=scale).items():
            bound, value = self.bounds[key], float(norm.detach())
            ratio = value / bound if bound > 0 else (0.0 if value == 0 else math.inf)
            if not ratio <= 1.0 + TOLERANCE:
                raise BoundBroken(f"{key}: observed {value:.6g} above the bound {bound:.6g} (ratio {ratio:.4f})")
            if ratio >= self.worst.get(key, -1.0):
                self.worst[key] = ratio
                self.signals[key] = sample.detach(), target.detach()


def brute_force(case: Case, *, singular: bool = True) -> Record:
    """Every structured input against every structured cotangent, at several loss scales."""
    model = case.model()
    generator = torch.Generator().manual_seed(11)
    inputs = list(sized_signals(case.shape, case.input_norm, generator))
    targets = list(sized_signals(model.output_shape, case.cotangent_norm, generator))
    if singular:
        for point in (inputs[0], torch.randn(case.shape, generator=generator, dtype=torch.float64)):
            first, last = singular_pair(model, point)
            inputs.append(first * case.input_norm)
            targets.append(last * case.cotangent_norm)
    record = Record(model)
    for i, sample in enumerate(inputs):
        for j, target in enumerate(targets):
            record.try_(sample, target, scale=SCALES[(i + j) % len(SCALES)])
    return record


def ascend(record: Record, case: Case, key: str, *, steps: int) -> None:
    """Climbs one ratio from the best signals known, by the power method on input and cotangent in turn.

    For a ratio that is convex in each of the two (every linear layer's) each step can only climb: the new signal
    is the gradient's direction, which maximises the linear minorant on the ball.
    """
    sample, target = record.signals[key]
    for step in range(steps):
        sample = sample.clone().requires_grad_(True)
        target = target.clone().requires_grad_(True)
        norm = observed(record.model, sample, target, differentiable=True).get(key)
        if norm is None or not norm.requires_grad:
            return
        slopes = torch.autograd.grad(norm, (sample, target), allow_unused=True)
        moved = []
        for values, slope, size in zip((sample, target), slopes, (case.input_norm, case.cotangent_norm), strict=True):
            length = 0.0 if slope is None else float(torch.linalg.vector_norm(slope))
            if slope is None or length == 0.0 or not math.isfinite(length):
                moved.append(values.detach())
                continue
            here = values.detach() / max(float(torch.linalg.vector_norm(values.detach())), 1e-12)
            there = here * (0.0 if step % 3 else 1.0) + slope / length
            moved.append(there * (size / max(float(torch.linalg.vector_norm(there)), 1e-12)))
        sample, target = moved
        record.try_(sample, target)


def attack(case: Case, *, steps: int = 8, singular: bool = True) -> dict[str, float]:
    """Brute force, then gradient ascent on each quantity.

    Returns:
        The worst ratio of each quantity.

    Raises:
        BoundBroken: one is above 1.
    """
    record = brute_force(case, singular=singular)
    for key in list(record.worst):
        ascend(record, case, key, steps=steps)
    return record.worst


def summed_gradients(model: DPLipModel, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What the optimizer sees after one backward pass; zeros where no gradient arrived."""
    model.zero_grad(set_to_none=True)
    model.loss(model(inputs), targets).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.net.named_parameters()
        if p.requires_grad
    }


def add_or_remove_one(model: DPLipModel, inputs: Tensor, targets: Tensor) -> float:
    """Removes each sample from a batch in turn and compares the change of the summed gradient with its bounds.

    Returns:
        The worst ratio over parameters and their total.

    Raises:
        BoundBroken: one is above 1.
    """
    sensitivity = model.sensitivity()
    full = summed_gradients(model, inputs, targets)
    # Each sum over the batch rounds by at most (batch + 10^3)·2^-53 of its terms' norms, which the bounds cap.
    slack = TOLERANCE * len(inputs)
    worst = 0.0
    for index in range(len(inputs)):
        rest = torch.arange(len(inputs)) != index
        without = summed_gradients(model, inputs[rest], targets[rest])
        changes = {name: float(torch.linalg.vector_norm(full[name] - without[name])) for name in full}
        pairs = {name: (change, sensitivity.per_parameter.get(name, 0.0)) for name, change in changes.items()}
        pairs["total"] = math.hypot(*changes.values()), sensitivity.total
        for name, (change, bound) in pairs.items():
            if not change <= bound * (1.0 + slack):
                raise BoundBroken(f"{name}: removing sample {index} changes {change:.6g}, the bound is {bound:.6g}")
            worst = max(worst, change / bound if bound > 0 else 0.0)
    return worst
