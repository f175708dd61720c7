"""How a bound is attacked: per-sample gradients one sample at a time, structured signals, gradient ascent.

Every attack goes through the real forward, loss and backward of :class:`clipless_dp.DPLipModel`, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from clipless_dp.model import DPLipModel
from clipless_dp.model.passes import unwitnessed
from clipless_dp.model.valid_inputs import UNKNOWN, fields_of, limits_of
from clipless_dp.packing import Field
from clipless_dp.testing.probes import Case, Fill, Probe, own_parameters
from clipless_dp.testing.signals import sequences, sized_signals

TOLERANCE = 1e-9
"""Relative rounding allowed to the observation: float64 sums of under 10^4 products err by at most 10^4·2^-53 ≈ 1e-12
relative to their absolute sum, and three orders of magnitude are left for cancellation in the attacks' own norms."""

SCALES = (1.0, 1e-6, 1e6)
"""Factors a user might multiply the loss by: the cotangent gate has to make them harmless."""


class BoundBroken(AssertionError):
    """An observation above its bound."""


def per_sample_gradients(
    model: DPLipModel, sample: Tensor, target: Tensor, *, scale: float = 1.0, differentiable: bool = False
) -> dict[str, Tensor]:
    """The gradient of one sample, as a batch of one, for each trainable parameter that it reaches."""
    named = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    with unwitnessed():
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


def whole_gradient(model: DPLipModel, sample: Tensor, target: Tensor) -> float:
    """The norm of one sample's gradient with respect to all trainable parameters together."""
    return math.hypot(*(float(g.norm()) for g in per_sample_gradients(model, sample, target).values()))


def bounds_of(model: DPLipModel) -> dict[str, float]:
    """What the tracker says, under the keys of :func:`observed`."""
    sensitivity = model.sensitivity()
    activations = {f"{layer.path}.input": layer.input_norm for layer in sensitivity.layers if layer.kind == "Probe"}
    return {**sensitivity.per_parameter, **activations}


def singular_pair(model: DPLipModel, point: Tensor) -> tuple[Tensor, Tensor]:
    """Top singular vectors of the network's Jacobian at a point: the input and the cotangent it stretches most."""

    def run(values: Tensor) -> Tensor:
        output: Tensor = model.graph.module(values.unsqueeze(0))
        return output.squeeze(0)

    jacobian = torch.autograd.functional.jacobian(run, point)
    left, _, right = torch.linalg.svd(jacobian.reshape(math.prod(model.output_shape), -1), full_matrices=False)
    return right[0].reshape(point.shape), left[:, 0].reshape(model.output_shape)


class Record:
    """Worst ratios observed/bound, and the signals that reached them.

    Args:
        model: a wrapped network; its probes tell about activations.
        tolerance: relative rounding that an observation may have above its bound.
    """

    def __init__(self, model: DPLipModel, tolerance: float = TOLERANCE) -> None:
        self.model = model
        self.tolerance = tolerance
        self.bounds = bounds_of(model)
        self.worst: dict[str, float] = {}
        self.signals: dict[str, tuple[Tensor, Tensor]] = {}

    def try_(self, sample: Tensor, target: Tensor, *, scale: float = 1.0) -> float:
        """Adds one attempt.

        Returns:
            The norm of the whole gradient.

        Raises:
            BoundBroken: an observation is above its bound.
        """
        norms = observed(self.model, sample, target, scale=scale)
        for key, norm in norms.items():
            bound, value = self.bounds[key], float(norm.detach())
            ratio = value / bound if bound > 0 else (0.0 if value == 0 else math.inf)
            if not ratio <= 1.0 + self.tolerance:
                raise BoundBroken(
                    f"{_described(key)}: observed {value:.6g} above the bound {bound:.6g} (ratio {ratio:.4f})"
                )
            if ratio >= self.worst.get(key, -1.0):
                self.worst[key] = ratio
                self.signals[key] = sample.detach(), target.detach()
        return math.hypot(*(float(norm.detach()) for key, norm in norms.items() if not key.endswith(".input")))


def _described(key: str) -> str:
    meanings = {"after.input": "the norm of the output, Y", "before.shift": "the cotangent that is passed back, K·G"}
    return f"{meanings[key]} ({key})" if key in meanings else key


def brute_force(case: Case, *, singular: bool = True) -> Record:
    """Every structured input against every structured cotangent, at several loss scales.

    Args:
        case: what is attacked.
        singular: whether the top singular vectors of the Jacobian join in.

    Raises:
        BoundBroken: one passes a bound.
    """
    record = Record(case.model())
    try_all(record, case, singular=singular)
    return record


def try_all(record: Record, case: Case, *, singular: bool = True, every: int = 1) -> None:
    """:func:`brute_force` on a model of the case that is at hand, with one structured signal in ``every``."""
    for sample, target, scale in structured_pairs(record.model, case, singular=singular, every=every):
        record.try_(sample, target, scale=scale)


def structured_pairs(
    model: DPLipModel, case: Case, *, singular: bool = False, every: int = 1
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Every structured input with every structured cotangent, and a factor of the loss."""
    _, dtype = model.device_and_dtype()
    generator = torch.Generator().manual_seed(11)
    inputs = list(structured_inputs(model, generator))
    if is_capped(model):
        inputs = inputs[::every]
    targets = list(sized_signals(model.output_shape, case.cotangent_norm, generator))[::every]
    if singular and is_capped(model):
        for point in (inputs[0], torch.randn(case.shape, generator=generator, dtype=torch.float64)):
            first, last = singular_pair(model, point)
            inputs.append(first * case.input_norm)
            targets.append(last * case.cotangent_norm)
    for i, sample in enumerate(inputs):
        for j, target in enumerate(targets):
            yield sample, target.to(dtype), SCALES[(i + j) % len(SCALES)]


def is_capped(model: DPLipModel) -> bool:
    """Whether samples are signals of a norm that a gate caps: their directions are all that matters."""
    return model.graph.reads.is_floating_point and math.isfinite(model.input_norm)


def structured_inputs(model: DPLipModel, generator: torch.Generator) -> Iterator[Tensor]:
    """Structured samples ``(*input_shape,)`` that a model can read, of ordinary size where nothing caps it."""
    _, dtype = model.device_and_dtype()
    if model.vocabulary is not None:
        yield from sequences(model.input_shape, model.vocabulary, generator)
    elif model.packing is None and model.graph.reads.is_floating_point:
        size = model.input_norm if is_capped(model) else math.sqrt(math.prod(model.input_shape))
        for signal in sized_signals(model.input_shape, size, generator):
            yield signal.to(dtype)
    else:
        fields = fields_of(model.graph, model.packing, model.input_shape)
        limits = limits_of(model.graph, math.prod(model.input_shape)).split([field.entries for field in fields])
        kinds = [_of_field(field, known, generator) for field, known in zip(fields, limits, strict=True)]
        random = model.random_inputs(1, generator).cpu()
        for number in range(max(map(len, kinds))):
            parts = [kind[number % len(kind)].flatten().to(random.dtype) for kind in kinds]
            yield torch.cat(parts).reshape(model.input_shape)
        yield random[0]


def _of_field(field: Field, limits: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Structured values of one input: signals; tokens, one repeated, the last ones, each the next; masks."""
    if field.dtype.is_floating_point:
        return list(sized_signals(field.shape, math.sqrt(field.entries), generator))
    places, most = torch.arange(field.entries), torch.where(limits > 0, limits, UNKNOWN)
    if bool((limits > 0).any()):
        return [torch.zeros_like(places), most - 1, most // 2, places % most]
    return [torch.ones_like(places), (places == 0).long(), 1 - places % 2]


def ascend(record: Record, case: Case, key: str, *, steps: int) -> None:
    """Climbs one ratio from the best signals known, by the power method on input and cotangent in turn.

    For a ratio that is convex in each of the two (every linear layer's) each step can only climb: the new signal
    is the gradient's direction, which maximises the linear minorant on the ball.
    """
    sample, target = record.signals[key]
    for step in range(steps):
        movable = is_capped(record.model), True
        pair = [values.clone().requires_grad_(moves) for values, moves in zip((sample, target), movable, strict=True)]
        norm = observed(record.model, *pair, differentiable=True).get(key)
        if norm is None or not norm.requires_grad:
            return
        moved = []
        slopes = iter(_slopes(norm, [values for values in pair if values.requires_grad]))
        for values, size in zip(pair, (case.input_norm, case.cotangent_norm), strict=True):
            slope = next(slopes) if values.requires_grad else torch.zeros(())
            length = float(torch.linalg.vector_norm(slope))
            if length == 0.0 or not math.isfinite(length):
                moved.append(values.detach())
                continue
            here = values.detach() / max(float(torch.linalg.vector_norm(values.detach())), 1e-12)
            there = here * (0.0 if step % 3 else 1.0) + slope / length
            moved.append(there * (size / max(float(torch.linalg.vector_norm(there)), 1e-12)))
        sample, target = moved
        record.try_(sample, target)


def attack(case: Case, *, steps: int = 8, singular: bool = True) -> dict[str, float]:
    """Brute force, then gradient ascent on each quantity.

    Args:
        case: what is attacked.
        steps: of the ascent, for each quantity.
        singular: as for :func:`brute_force`.

    Returns:
        The worst ratio of each quantity.

    Raises:
        BoundBroken: one is above 1.
    """
    record = brute_force(case, singular=singular)
    for key in list(record.worst):
        ascend(record, case, key, steps=steps)
    return record.worst


def _rank_one(parameter: Tensor) -> object:
    rows = nn.init.normal_(torch.empty(len(parameter), 1, dtype=parameter.dtype))
    columns = nn.init.normal_(torch.empty(1, parameter[0].numel(), dtype=parameter.dtype))
    return parameter.copy_((rows * columns).reshape(parameter.shape))


FILLS: tuple[Fill, ...] = (
    nn.init.zeros_,
    nn.init.ones_,
    lambda parameter: parameter.zero_().view(-1)[0].fill_(-2.0),
    lambda parameter: parameter.view(-1).copy_(1.0 - 2.0 * (torch.arange(parameter.numel()) % 2)),
    lambda parameter: _rank_one(parameter) if parameter.dim() > 1 else parameter.fill_(-0.5),
    lambda parameter: nn.init.normal_(parameter, std=30.0),
)
"""Parameters that random ones do not stand for: zero, equal, sparse, signs, rank one, large."""


def attack_parameters(case: Case, *, steps: int = 4) -> dict[str, float]:
    """Structured parameters, then gradient ascent on parameters and signals in turn, each keeping its own norm.

    Bounds are evaluated anew for each value of the parameters.

    Args:
        case: what is attacked; nothing is done where it has no parameters of its own.
        steps: of the ascent, for each quantity.

    Returns:
        The worst ratio of each quantity.

    Raises:
        BoundBroken: one is above 1.
    """
    model = case.model()
    if not any(True for _ in own_parameters(model.net)):
        return {}
    records = [Record(case.model(fill)) for fill in FILLS]
    first = Record(model)
    for record in (*records, first):
        try_all(record, case, singular=False, every=3)
        for key in list(record.worst):
            ascend(record, case, key, steps=2)
    records += [_climb(case, key, first, steps) for key in first.worst]
    return {key: max(record.worst.get(key, 0.0) for record in records) for key in first.worst}


def _climb(case: Case, key: str, start: Record, steps: int) -> Record:
    record = Record(case.model())
    record.try_(*start.signals[key])
    for _ in range(steps):
        parameters = [parameter for _, parameter in own_parameters(record.model.net)]
        norm = observed(record.model, *record.signals[key], differentiable=True).get(key)
        slopes = _slopes(norm, parameters)
        with torch.no_grad():
            for parameter, slope in zip(parameters, slopes, strict=True):
                size, length = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(slope)
                if length > 0.0 and torch.isfinite(length):
                    parameter.add_(slope * (size / length))
                    parameter.mul_(size / torch.linalg.vector_norm(parameter).clamp(min=1e-12))
        moved = Record(record.model)
        moved.try_(*record.signals[key])
        ascend(moved, case, key, steps=2)
        record = moved
    return record


def _slopes(norm: Tensor | None, of: Sequence[Tensor]) -> list[Tensor]:
    """The norm's gradient; zeros, or a random direction where the layer cannot be differentiated twice."""
    if norm is None or not norm.requires_grad:
        return [torch.zeros_like(values) for values in of]
    try:
        found = torch.autograd.grad(norm, of, allow_unused=True)
    except RuntimeError:
        return [torch.randn_like(values) for values in of]
    return [torch.zeros_like(v) if slope is None else slope for v, slope in zip(of, found, strict=True)]


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
