"""Certificates and attacks in the maximum norm: every entry of an input moves by less than a radius."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from clipless_dp.arguments import not_negative, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates.arithmetic import flat_rows, per_sample, sample_norms
from clipless_dp.robustness.attacks import Box, ends_of, limits_of, margins_of
from clipless_dp.robustness.intervals import output_interval
from clipless_dp.robustness.networks import (
    PlainNetwork,
    generator_of,
    read,
    refuse_other_labels,
    value_and_gradient,
)
from clipless_dp.training import Data

Norm = Literal[2, "inf"]

_DOWN = 1.0 - 2.0**-50
"""Covers the few float64 roundings of a sum and a quotient."""

_BISECTIONS = 20
"""Halvings of what interval bounds may add to a radius."""


def refuse_other_norm(norm: object, front: nn.Module | None, box: Box) -> None:
    """Refuses a norm other than 2 and ``"inf"``, and what is of no use to it.

    Raises:
        ConfigurationError: see above.
    """
    if norm not in (2, "inf"):
        raise ConfigurationError(f'norm must be 2 or "inf", got {norm!r}')
    if norm == 2 and box is not None:
        raise ConfigurationError('box narrows certificates in the maximum norm only: give norm="inf" too')
    if norm == "inf" and front is not None:
        raise ConfigurationError(
            "constants of what runs before a model are Euclidean: certify in the maximum norm without a front, on what "
            "it returns"
        )
    if box is not None:
        ends_of(box)


def gate_caps(inputs: Tensor, input_norm: float, box: Box) -> Tensor:
    """How far each sample may move, in the maximum norm, until the input gate may change it: ``(B,)`` float64.

    A projection onto a Euclidean ball is not non-expansive in the maximum norm. It leaves alone what lies within the
    ball, ``‖x'‖ ≤ ‖x‖ + √n·‖x' - x‖_∞``, and a box that lies within.

    Args:
        inputs: ``(B, ...)``.
        input_norm: of the gate; infinite without one.
        box: limits of perturbed inputs.
    """
    rows = flat_rows(inputs.double().cpu())
    root = math.sqrt(max(1, rows.shape[1])) * (1.0 + 2.0**-50)
    caps = torch.full((len(rows),), math.inf, dtype=torch.float64)
    if math.isinf(input_norm):
        return caps
    lengths = rows.norm(dim=1) * (1.0 + rows.shape[1] * 2.0**-52)
    if box is not None and root * max(map(abs, ends_of(box))) <= input_norm:
        return caps
    found: Tensor = ((input_norm - lengths) * _DOWN / root * _DOWN).clamp(min=0.0).nan_to_num(0.0)
    return found


@dataclass(frozen=True)
class Within:
    """Radii that interval bounds certify, within a box.

    Attributes:
        plain: the network in float64, wrapped.
        box: limits of perturbed inputs.
        slack: what a difference of two scores may be off by.
    """

    plain: PlainNetwork
    box: tuple[float, float]
    slack: float

    def radii(self, inputs: Tensor, classes: Tensor, known: Tensor, caps: Tensor) -> Tensor:
        """The largest radii found by bisection, ``(B,)``, at least the known ones.

        Boxes of larger radius hold those of smaller, and so do the intervals: what is certified at one is below it.

        Args:
            inputs: ``(B, ...)``.
            classes: what is predicted, ``(B,)``.
            known: radii that are certified otherwise.
            caps: of :func:`gate_caps`.
        """
        some = inputs.to(self.plain.device, torch.float64)
        width = self.box[1] - self.box[0]
        free = caps >= width
        top = torch.where(free, torch.full_like(caps, width), caps)
        whole_box = self._holds(some, classes, top)
        low, high = torch.where(whole_box, top, torch.minimum(known, top)), top
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            holds = self._holds(some, classes, middle)
            low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
        found = torch.where(whole_box & free, torch.full_like(low, math.inf), low * _DOWN)
        return torch.maximum(found, known)

    def _holds(self, inputs: Tensor, classes: Tensor, radii: Tensor) -> Tensor:
        reach = per_sample(radii.to(inputs.device), inputs)
        lowest, highest = (inputs - reach).clamp(min=self.box[0]), (inputs + reach).clamp(max=self.box[1])
        graph = self.plain.net[0]  # type: ignore[index]
        assert isinstance(graph, fx.GraphModule)
        low, high = (end.cpu() for end in output_interval(graph, lowest, highest))
        if low.numel() == len(low):
            low, high = low.reshape(-1, 1), high.reshape(-1, 1)
            low, high = torch.cat((-high, low), 1), torch.cat((-low, high), 1)
        own = classes[:, None]
        others = high.scatter(1, own, -math.inf).amax(1)
        return low.gather(1, own).squeeze(1) - others > self.slack + 2.0**-50 * others.abs()


@dataclass(frozen=True)
class AttackedInf:
    """What an attack in the maximum norm has found.

    Attributes:
        flipped: ``(N,)`` whose prediction is wrong, at once or after the attack.
        examples: ``(N, ...)`` the perturbed inputs of lowest margin, in float64.
        distances: ``(N,)`` by how much they differ from the samples, in the maximum norm.
    """

    flipped: Tensor
    examples: Tensor
    distances: Tensor


def attack_inf(
    model: nn.Module,
    data: Data | Tensor,
    radii: float | Tensor,
    *,
    steps: int = 40,
    restarts: int = 3,
    box: Box = None,
    rng_seed: int = 0,
    batch_size: int = 256,
) -> AttackedInf:
    """Projected gradient descent on the margin in the maximum norm (Madry et al. 2018, §2), with signs of gradients.

    Steps shrink along each way; where a gradient is zero, as between few entries it is, signs are random.

    Args:
        model: a wrapped model, or any module.
        data: pairs of inputs and labels, as for :func:`clipless_dp.fit`. Of inputs alone, a tensor, the network's own
            predictions are what is attacked.
        radii: how far each entry may move: one number, or one for each sample, ``(N,)``.
        steps: of each start.
        restarts: starts: the sample itself, then random points.
        box: limits of the entries of inputs.
        rng_seed: of what the attack draws.
        batch_size: samples at once.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: the data does not fit, or lies outside of the box.
    """
    steps, restarts, rows = whole("steps", steps), whole("restarts", restarts), whole("batch_size", batch_size)
    generator = generator_of(rng_seed)
    inputs, labels = read(data)
    if not len(inputs):
        raise InputError("there are no samples to attack")
    plain = PlainNetwork(model)
    classes = plain.classes(inputs)
    if labels is not None:
        refuse_other_labels(labels, classes)
    reach = _reaches(radii, len(inputs))
    parts: list[AttackedInf] = []
    for part, some, truth in plain.parts(inputs, labels, rows):
        limits = limits_of(box, some)
        own = per_sample(reach[part].to(some), some)
        parts.append(_descended(plain, some, truth, own, limits, steps, restarts, generator))
    return AttackedInf(*(torch.cat([getattr(found, name) for found in parts]) for name in _FOUND))


def _reaches(radii: float | Tensor, count: int) -> Tensor:
    if not isinstance(radii, Tensor):
        return torch.tensor(not_negative("radii", radii), dtype=torch.float64).expand(count)
    if radii.is_complex() or radii.dtype is torch.bool or tuple(radii.shape) not in ((), (count,)):
        raise ConfigurationError(
            f"radii must be one number, or one for each of {count} samples, ({count},), got {radii.dtype} "
            f"{tuple(radii.shape)}"
        )
    reach = radii.detach().double().cpu().expand(count)
    if not bool((reach >= 0.0).all()):
        raise ConfigurationError("some radii are negative or NaN: leave these samples out, or give 0")
    return reach


_FOUND = ("flipped", "examples", "distances")


def _descended(
    plain: PlainNetwork,
    inputs: Tensor,
    labels: Tensor,
    reach: Tensor,
    limits: tuple[Tensor, Tensor],
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> AttackedInf:
    lowest, highest = torch.maximum(inputs - reach, limits[0]), torch.minimum(inputs + reach, limits[1])
    best, least = inputs, torch.full((len(inputs),), math.inf, dtype=inputs.dtype, device=inputs.device)
    for start in range(restarts):
        current = inputs
        if start:
            drawn = torch.rand(inputs.shape, generator=generator, dtype=torch.float64).to(inputs)
            current = lowest + drawn * (highest - lowest)
        for step in range(steps + 1):
            margins, slope = value_and_gradient(lambda values: margins_of(plain(values), labels), current)
            lower = margins < least
            best = torch.where(per_sample(lower, best), current, best)
            least = torch.where(lower, margins, least)
            drawn = torch.rand(inputs.shape, generator=generator, dtype=torch.float64).to(inputs) - 0.5
            flat = slope.abs() <= 1e-6 * per_sample(sample_norms(slope), slope)
            signs = torch.where(flat, drawn, slope).sign()
            length = reach * (2.0 if step % 2 else 0.5) * (1.0 - step / (steps + 1))
            current = torch.minimum(torch.maximum(current - length * signs, lowest), highest)
    away = flat_rows((best - inputs).abs()).amax(1)
    return AttackedInf((least <= 0.0).cpu(), best.cpu(), away.double().cpu())
