"""Attacks of Euclidean norm on a network's predictions, batched, on inputs of any shape; the worst of several counts.

Each attack proposes perturbed inputs. What is proposed is judged, and shortened, in one place (:func:`attack`): a
proposal counts where the true score is below another one, and the line from the sample to it is then bisected.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipless_dp.arguments import members, not_negative, positive, shown, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates.arithmetic import flat_rows, per_sample, sample_norms
from clipless_dp.robustness.networks import (
    PlainNetwork,
    Units,
    generator_of,
    read,
    refuse_other_labels,
    scale_of,
    value_and_gradient,
)
from clipless_dp.training import Data

Box = tuple[float, float] | None
"""Limits of all entries of an input, in the units of the data."""

_SMALLEST = 1e-30
"""Gradients of smaller norm have no direction."""


class Victim(NamedTuple):
    """What an attack sees of some samples, in the units in which perturbations are measured.

    Attributes:
        scores: maps inputs ``(B, ...)`` to scores ``(B, C)``, differentiably.
        inputs: the samples.
        labels: their classes ``(B,)``.
        lowest: of each entry of an input, broadcast; ``-inf`` without a box.
        highest: likewise.
        generator: draws on the CPU.
    """

    scores: Callable[[Tensor], Tensor]
    inputs: Tensor
    labels: Tensor
    lowest: Tensor
    highest: Tensor
    generator: torch.Generator

    def margins(self, inputs: Tensor) -> Tensor:
        """The true score less the largest other one, ``(B,)``: below zero where the prediction is wrong."""
        return margins_of(self.scores(inputs), self.labels)

    def slope(self, inputs: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Values and gradients, with respect to each sample, of the margin or of another function of the scores."""
        chosen = partial(margins_of, labels=self.labels) if function is None else function
        return value_and_gradient(lambda values: chosen(self.scores(values)), inputs)

    def random_directions(self) -> Tensor:
        """Unit vectors, uniform, of the samples' shape."""
        drawn = torch.randn(self.inputs.shape, generator=self.generator, dtype=torch.float64).to(self.inputs)
        return drawn / per_sample(sample_norms(drawn), drawn)

    def directions(self, gradient: Tensor) -> Tensor:
        """Unit vectors along gradients; random ones where there is none."""
        lengths = sample_norms(gradient)
        known = per_sample(lengths > _SMALLEST, gradient)
        unit = gradient / per_sample(lengths.clamp(min=_SMALLEST), gradient)
        return unit if bool(known.all()) else torch.where(known, unit, self.random_directions())

    def within(self, inputs: Tensor, radius: float = math.inf) -> Tensor:
        """Inputs in the box, and at most ``radius`` away from the samples.

        The way from a sample to a point of the box lies in the box, so that shortening it leaves neither.
        """
        moved = torch.minimum(torch.maximum(inputs, self.lowest), self.highest) - self.inputs
        if math.isfinite(radius):
            moved = moved * per_sample((radius / sample_norms(moved).clamp(min=_SMALLEST)).clamp(max=1.0), moved)
        return self.inputs + moved


class Attack(ABC):
    """Proposes perturbed inputs."""

    @abstractmethod
    def proposals(self, victim: Victim, budgets: Sequence[float]) -> Iterator[Tensor]:
        """Perturbed inputs ``(B, ...)``, in the box; as many as the attack likes.

        Args:
            victim: what is attacked.
            budgets: norms at which the attacks that need one are to try; others look for the nearest flip.
        """

    @property
    def name(self) -> str:
        """What it is called in results."""
        return type(self).__name__


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(("steps", "restarts", "candidates", "searches"), whole),
    **dict.fromkeys(("t", "lr", "first"), positive),
    "step": lambda name, value: value if value is None else positive(name, value),
    "overshoot": not_negative,
}


class _Checked(Attack):
    """A dataclass whose fields are checked by their names."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in _CHECKS:
                _CHECKS[name](name, value)


@dataclass(frozen=True)
class FGM(Attack):
    """One step against the margin's gradient, of each budget's length (Goodfellow et al. 2015, in Euclidean norm)."""

    def proposals(self, victim: Victim, budgets: Sequence[float]) -> Iterator[Tensor]:
        """See :meth:`Attack.proposals`."""
        _, gradient = victim.slope(victim.inputs)
        step = victim.directions(gradient)
        for budget in budgets:
            yield victim.within(victim.inputs - budget * step, budget)


@dataclass(frozen=True)
class PGD(_Checked):
    """Normalised steps against the margin's gradient, projected on each budget's ball (Madry et al. 2018, §2).

    Attributes:
        steps: of each start.
        restarts: starts: the sample itself, then random points of the ball.
        step: length of a step, relative to the budget; by default ``2.5/steps``.
    """

    steps: int = 40
    restarts: int = 2
    step: float | None = None

    def proposals(self, victim: Victim, budgets: Sequence[float]) -> Iterator[Tensor]:
        """See :meth:`Attack.proposals`; the lowest margin on each way."""
        for budget in budgets:
            for start in range(self.restarts):
                yield self._descend(victim, budget, random=start > 0)

    def _descend(self, victim: Victim, budget: float, *, random: bool) -> Tensor:
        current = victim.inputs
        if random:
            share = torch.rand(len(current), generator=victim.generator, dtype=torch.float64).to(current)
            current = victim.within(current + budget * per_sample(share, current) * victim.random_directions(), budget)
        length = budget * (2.5 / self.steps if self.step is None else self.step)
        best, lowest = current, torch.full((len(current),), math.inf, dtype=current.dtype, device=current.device)
        for _ in range(self.steps + 1):
            margins, gradient = victim.slope(current)
            better = margins < lowest
            best = torch.where(per_sample(better, best), current, best)
            lowest = torch.where(better, margins, lowest)
            current = victim.within(current - length * victim.directions(gradient), budget)
        return best


def _first_flips(victim: Victim, ways: Iterator[Tensor], overshoot: float) -> Tensor:
    """Of each sample the first point on its way that, passed by a share of the way, flips; else the last one."""
    found, held = torch.zeros_like(victim.labels, dtype=torch.bool), victim.inputs
    for current in ways:
        beyond = victim.within(victim.inputs + (1.0 + overshoot) * (current - victim.inputs))
        held = torch.where(per_sample(found, held), held, beyond)
        with torch.no_grad():
            found = found | (victim.margins(beyond) < 0.0)
        if bool(found.all()):
            break
    return held


class _Walk(_Checked):
    """Walks from each sample towards the boundary, and goes a little further."""

    overshoot: float

    def proposals(self, victim: Victim, budgets: Sequence[float]) -> Iterator[Tensor]:
        """See :meth:`Attack.proposals`; the first flip on each way."""
        yield _first_flips(victim, self._ways(victim), self.overshoot)

    @abstractmethod
    def _ways(self, victim: Victim) -> Iterator[Tensor]:
        """Where each sample is after each step."""


@dataclass(frozen=True)
class DeepFool(_Walk):
    """Steps to the nearest class boundary of the linearised scores (Moosavi-Dezfooli et al. 2016, alg. 2).

    Attributes:
        steps: at most.
        candidates: classes of the largest scores whose boundaries are looked at.
        overshoot: by how much of the way the boundary is passed.
    """

    steps: int = 20
    candidates: int = 10
    overshoot: float = 0.02

    def _ways(self, victim: Victim) -> Iterator[Tensor]:
        own = victim.labels[:, None]
        with torch.no_grad():
            scores = victim.scores(victim.inputs)
        others = scores.scatter(1, own, -math.inf).topk(min(self.candidates, scores.shape[1] - 1), 1).indices
        current = victim.inputs
        for _ in range(self.steps):
            best, shortest = torch.zeros_like(current), torch.full_like(current.flatten(1)[:, 0], math.inf)
            for other in others.unbind(1):
                gap, gradient = victim.slope(current, partial(_gaps, own=own, other=other[:, None]))
                lengths = sample_norms(gradient)
                away = gap.clamp(min=0.0) / lengths.clamp(min=_SMALLEST)
                nearer = (lengths > _SMALLEST) & (away < shortest)
                step = gradient * per_sample(-away / lengths.clamp(min=_SMALLEST), gradient)
                best = torch.where(per_sample(nearer, best), step, best)
                shortest = torch.where(nearer, away, shortest)
            current = victim.within(current + best)
            yield current


def _gaps(scores: Tensor, own: Tensor, other: Tensor) -> Tensor:
    return (scores.gather(1, own) - scores.gather(1, other)).squeeze(1)


@dataclass(frozen=True)
class HKRStep(_Walk):
    """Newton's step ``x - t·f∇f/‖∇f‖²`` on the margin ``f``, repeated: at an optimum of the hinge-KR loss, where
    ``‖∇f‖ = 1``, one step reaches the boundary (Serrurier et al. 2021, §3.3).

    Attributes:
        steps: at most.
        t: share of the step.
        overshoot: by how much of the way the boundary is passed.
    """

    steps: int = 10
    t: float = 1.0
    overshoot: float = 0.02

    def _ways(self, victim: Victim) -> Iterator[Tensor]:
        current = victim.inputs
        for _ in range(self.steps):
            margins, gradient = victim.slope(current)
            squares = sample_norms(gradient).square().clamp(min=_SMALLEST)
            current = victim.within(
                current - gradient * per_sample(self.t * margins.clamp(min=0.0) / squares, gradient)
            )
            yield current


@dataclass(frozen=True)
class CarliniWagner(_Checked):
    """Least ``‖δ‖² + c·max(0, margin)`` by Adam, with a binary search over ``c`` (Carlini and Wagner 2017, §V and VI).

    In place of a change of variables, steps are cut at the box.

    Attributes:
        steps: of Adam, for each ``c``.
        searches: values of ``c`` that are tried.
        lr: of Adam, relative to the first step that would reach the linearised boundary.
        first: the first ``c``.
    """

    steps: int = 60
    searches: int = 5
    lr: float = 0.1
    first: float = 1.0

    def proposals(self, victim: Victim, budgets: Sequence[float]) -> Iterator[Tensor]:
        """See :meth:`Attack.proposals`; the nearest flip, or else the lowest margin, for each ``c``."""
        margins, gradient = victim.slope(victim.inputs)
        away = margins.clamp(min=0.0) / sample_norms(gradient).clamp(min=_SMALLEST)
        entries = math.sqrt(max(1, victim.inputs[0].numel()))
        rate = per_sample(self.lr * away.clamp(1e-6, 1e3) / entries, victim.inputs)
        weight = torch.full_like(margins, self.first)
        low, high = torch.zeros_like(weight), torch.full_like(weight, math.inf)
        for _ in range(self.searches):
            best, flipped = self._minimise(victim, weight, rate)
            yield best
            low, high = torch.where(flipped, low, weight), torch.where(flipped, weight, high)
            weight = torch.where(high.isfinite(), (low + high) / 2.0, weight * 10.0)

    def _minimise(self, victim: Victim, weight: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        current, best = victim.inputs, victim.inputs
        first, second = torch.zeros_like(current), torch.zeros_like(current)
        shortest = torch.full_like(weight, math.inf)
        for step in range(1, self.steps + 1):
            margins, gradient = victim.slope(current)
            moved = current - victim.inputs
            lengths = sample_norms(moved)
            nearer = (margins < 0.0) & (lengths < shortest)
            best = torch.where(per_sample(nearer, best), current, best)
            shortest = torch.where(nearer, lengths, shortest)
            pull = gradient * per_sample(weight * (margins > 0.0), gradient) + 2.0 * moved
            first, second = 0.9 * first + 0.1 * pull, 0.999 * second + 0.001 * pull.square()
            update = (first / (1.0 - 0.9**step)) / ((second / (1.0 - 0.999**step)).sqrt() + 1e-12)
            current = victim.within(current - rate * update)
        found = shortest.isfinite()
        return torch.where(per_sample(found, best), best, current), found


DEFAULT: tuple[Attack, ...] = (FGM(), PGD(), DeepFool(), HKRStep(), CarliniWagner())
"""All attacks, as they are by default."""


@dataclass(frozen=True)
class Attacked:
    """What attacks have found.

    Attributes:
        distances: ``(N,)`` float64: the norm of the shortest perturbation found that makes a prediction wrong: 0 where
            it is wrong at once, infinite where none was found. An upper bound of the true distance.
        examples: ``(N, ...)`` the perturbed inputs, in the model's units; the samples themselves where there is none.
        attacks: ``(N,)`` names of the attacks that found them, ``"none"`` or ``"wrong at once"``.
        labels: ``(N,)``.
        tried: what was tried, as it prints itself.
    """

    distances: Tensor
    examples: Tensor
    attacks: tuple[str, ...]
    labels: Tensor
    tried: tuple[str, ...] = ()

    def accuracy(self, radius: float) -> float:
        """Share of samples that no attack has turned within a radius: an upper bound of what any attack leaves."""
        return float((self.distances > not_negative("radius", radius)).double().mean())


def attack(
    model: nn.Module,
    data: Data | Tensor,
    attacks: Sequence[Attack] = DEFAULT,
    *,
    radii: Sequence[float] = (36 / 255, 72 / 255, 108 / 255, 1.0),
    box: Box = None,
    front: nn.Module | None = None,
    units: Units = None,
    rng_seed: int = 0,
    bisections: int = 30,
    batch_size: int = 256,
    dtype: torch.dtype | None = torch.float64,
) -> Attacked:
    """Attacks each sample with all attacks, and keeps the shortest perturbation that makes the prediction wrong.

    The deployed forward pass is what is attacked and differentiated (:func:`plain_network`), whatever gates the model
    has for training.

    Args:
        model: a wrapped model, or any module.
        data: pairs of inputs and labels, as for :func:`clipless_dp.fit`. Of inputs alone, a tensor, the network's own
            predictions are what is attacked.
        attacks: which ones.
        radii: budgets for those that need one, above 0.
        box: limits of the entries of inputs: ``(0, 1)`` for pixels; samples must lie within. ``None``: anywhere.
        front: what runs before the model, and is attacked through.
        units: see :func:`certify`: perturbations are measured in these units.
        rng_seed: of what attacks draw.
        bisections: how often the way to a flip is halved.
        batch_size: samples at once.
        dtype: in which is computed; ``None``: as the model is.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: the data does not fit, or lies outside of the box.
    """
    attacks = members("attacks", attacks, "attacks")
    for one in attacks:
        if not isinstance(one, Attack):
            raise ConfigurationError(f"attacks must be objects such as attacks.PGD(), got {one!r:.80}")
    budgets = sorted(positive("radii", radius) for radius in members("radii", radii, "numbers"))
    whole("bisections", bisections)
    rows = whole("batch_size", batch_size)
    generator = generator_of(rng_seed)
    inputs, labels = read(data)
    plain = PlainNetwork(model, dtype=dtype, front=front)
    scale = scale_of(units, inputs).to(plain.device, plain.dtype)
    if not len(inputs):
        raise InputError("there are no samples to attack")
    classes = plain.classes(inputs)
    if labels is not None:
        refuse_other_labels(labels, classes)
    parts: list[Attacked] = []
    for _, some, truth in plain.parts(inputs, labels, rows):
        lowest, highest = limits_of(box, some)
        victim = Victim(
            lambda values: plain(values / scale), some * scale, truth, lowest * scale, highest * scale, generator
        )
        parts.append(_worst(victim, attacks, budgets, bisections, scale))
    return Attacked(
        torch.cat([part.distances for part in parts]),
        torch.cat([part.examples for part in parts]),
        tuple(name for part in parts for name in part.attacks),
        torch.cat([part.labels for part in parts]),
        tuple(map(repr, attacks)),
    )


def limits_of(box: Box, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and highest entries of inputs in a box, which they must lie in; infinite without one."""
    lowest, highest = (-math.inf, math.inf) if box is None else ends_of(box)
    if bool(((inputs < lowest) | (inputs > highest)).any()):
        raise InputError(f"samples lie outside of the box {box!r}: give the limits of the data that the model reads")
    return inputs.new_tensor(lowest), inputs.new_tensor(highest)


def ends_of(box: object) -> tuple[float, float]:
    """The two ends of a box.

    Raises:
        ConfigurationError: they are no two numbers, the first below the second.
    """
    if isinstance(box, (tuple, list)) and len(box) == 2 and all(isinstance(end, Real) for end in box):
        lowest, highest = map(float, box)
        if lowest < highest:
            return lowest, highest
    raise ConfigurationError(f"box must be (lowest, highest), got {shown(box)}")


def _worst(
    victim: Victim, attacks: Sequence[Attack], budgets: Sequence[float], bisections: int, scale: Tensor
) -> Attacked:
    """The worst over attacks, sample by sample; what is wrong at once, or dropped, is not attacked."""
    count = len(victim.inputs)
    with torch.no_grad():
        margins = victim.margins(victim.inputs)
    right = margins > 0.0
    distances = torch.zeros(count, dtype=torch.float64, device=margins.device)
    distances[right] = math.inf
    examples = victim.inputs.clone()
    names = ["none" if hit else "wrong at once" for hit in right.tolist()]
    rows = right.nonzero().flatten()
    if len(rows):
        held = victim._replace(inputs=victim.inputs[rows], labels=victim.labels[rows])
        for one in attacks:
            for proposed in one.proposals(held, budgets):
                shortened = bisected(held, proposed.detach(), bisections)
                found = flip_distances(held, shortened)
                nearer = found < distances[rows]
                distances[rows] = torch.where(nearer, found, distances[rows])
                examples[rows] = torch.where(per_sample(nearer, shortened), shortened, examples[rows])
                for row in rows[nearer].tolist():
                    names[row] = one.name
    return Attacked(distances.cpu(), (examples / scale).cpu(), tuple(names), victim.labels.cpu())


def flip_distances(victim: Victim, proposed: Tensor) -> Tensor:
    """Norms of what flips the prediction, ``(B,)`` in float64; infinite where it does not."""
    with torch.no_grad():
        flipped = victim.margins(proposed) < 0.0
    lengths = torch.linalg.vector_norm(flat_rows(proposed - victim.inputs).double(), dim=1)
    return torch.where(flipped, lengths, math.inf)


@torch.no_grad()
def bisected(victim: Victim, proposed: Tensor, bisections: int) -> Tensor:
    """The nearest flip on the way to each proposal that flips, to within ``2^-bisections`` of the way."""
    flipped = victim.margins(proposed) < 0.0
    if not bool(flipped.any()):
        return proposed
    way = proposed - victim.inputs
    low = torch.zeros(len(way), dtype=way.dtype, device=way.device)
    high = torch.ones_like(low)
    for _ in range(bisections):
        middle = (low + high) / 2.0
        hit = victim.margins(victim.inputs + per_sample(middle, way) * way) < 0.0
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    shortened = victim.inputs + per_sample(high, way) * way
    # The same point as the last hit, bit by bit, except where nothing was hit but the proposal itself.
    return torch.where(per_sample(flipped & (high < 1.0), way), shortened, proposed)


def margins_of(scores: Tensor, labels: Tensor) -> Tensor:
    """The true score less the largest other one, ``(B,)``."""
    own = labels[:, None]
    others = scores.scatter(1, own, -math.inf).amax(1)
    return scores.gather(1, own).squeeze(1) - others
