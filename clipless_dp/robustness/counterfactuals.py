"""Steps along the gradient to where a prediction changes, beside the radius within which it cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipless_dp.arguments import choice, not_negative, positive, whole
from clipless_dp.display import Table, Tabular
from clipless_dp.errors import InputError
from clipless_dp.gates.arithmetic import per_sample, sample_norms
from clipless_dp.robustness.attacks import Box, Victim, bisected, flip_distances, limits_of
from clipless_dp.robustness.certificates import Certificate, certify
from clipless_dp.robustness.constants import Lipschitz
from clipless_dp.robustness.explanations import Target, prepared
from clipless_dp.robustness.networks import PlainNetwork, generator_of, plain_network, value_and_gradient

Form = Literal["gradient", "newton"]

_SHARES = 16
"""Points of a way at which the first flip is looked for, before the way to it is halved."""

_SMALLEST = 1e-30
"""Squared slopes are taken to be at least this."""


@dataclass(frozen=True)
class Counterfactuals(Tabular):
    """Where steps along the gradient lead N samples; prints as a table.

    Attributes:
        inputs: ``(N, ...)`` ends ``x'`` of the formula; a repeated one ends where the prediction changes.
        flips: ``(N, ...)`` the nearest inputs on the way, which goes past ``x'`` by the overshoot, with another
            prediction (the target's, if one is stated); the samples themselves where there is none.
        reached: ``(N,)`` whether there is one.
        distances: ``(N,)`` float64: ``‖flip - x‖``, found by bisection; infinite where there is none. An upper bound of
            the distance to the boundary.
        radii: ``(N,)`` float64: certified lower bound of that distance.
        slopes: ``(N,)`` ``‖∇s‖`` at the samples.
        scores: ``(N,)`` ``s`` at the samples.
        predictions: ``(N,)`` classes ``l`` at the samples.
        rivals: ``(N,)`` classes ``j`` that the formula goes to.
        found: ``(N,)`` classes at ``flips``.
        certificate: which the radii are from.
    """

    inputs: Tensor
    flips: Tensor
    reached: Tensor
    distances: Tensor
    radii: Tensor
    slopes: Tensor
    scores: Tensor
    predictions: Tensor
    rivals: Tensor
    found: Tensor
    certificate: Certificate

    @property
    def tightness(self) -> Tensor:
        """``(N,)``: certificate over flip distance, at most 1; NaN where no flip was reached."""
        return torch.where(self.reached, self.radii / self.distances, math.nan)

    def __len__(self) -> int:
        return len(self.reached)

    def _table(self) -> Table:
        columns = (
            *(self.predictions, self.found, self.scores, self.slopes),
            *(self.radii, self.distances, self.tightness),
        )
        rows = [
            (index, label, new if hit else "–", *(f"{number:.4g}" for number in numbers))
            for index, (hit, label, new, *numbers) in enumerate(
                zip(self.reached.tolist(), *(column.tolist() for column in columns), strict=True)
            )
        ]
        headers = ["sample", "predicted", "becomes", "score", "slope", "certified", "flip distance", "tightness"]
        return Table(headers, rows, ("right",) * len(headers))


def counterfactual(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    form: Form = "newton",
    t: float = 1.0,
    steps: int | None = None,
    overshoot: float = 0.02,
    box: Box = None,
    lipschitz: Lipschitz = None,
    front: nn.Module | None = None,
    front_lipschitz: float | None = None,
    bisections: int = 40,
    batch_size: int = 256,
) -> Counterfactuals:
    """Walks from each sample towards another class, along the gradient of the deployed forward pass.

    ``s = f_l - f_j`` with the predicted class ``l``; of a network of one output ``f``, ``s = ±f`` is that of the
    predicted side. One step is ``x - t·s·∇s`` (``form="gradient"``), which at ``t = 1`` ends on the boundary where
    ``‖∇s‖ = 1``, as at an optimum of the hinge-KR loss (Serrurier et al. 2023, *On the explainable properties of
    1-Lipschitz neural networks*); or ``x - t·s·∇s/‖∇s‖²`` (``"newton"``), which does so wherever ``s`` is linear, and
    is repeated. It costs no privacy.

    Args:
        model: a wrapped model, or any module.
        inputs: ``(N, ...)``.
        target: the class ``j`` to become, which must not be the predicted one. ``None``: the nearest by the
            certificate, or the second best where nothing is certified.
        form: of a step.
        t: length of a step, relative to the formula. Larger ones exaggerate what changes.
        steps: at most; by default 1 of the gradient's form and 10 of Newton's.
        overshoot: by which share of the way the end is passed, to look for the flip: ends on the boundary itself have
            no other prediction.
        box: limits of the entries of inputs: ``(0, 1)`` for pixels; ``None``: anywhere.
        lipschitz: of a module that is not wrapped, see :func:`certify`, with ``front`` and ``front_lipschitz``.
        bisections: how often the way to a flip is halved.
        batch_size: samples at once.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: inputs are not finite numbers that the model reads, lie outside of the box, or a target is no class
            or the predicted one.

    Guarantee:
        ``radii`` are those of :func:`certify`: no input nearer has another prediction, so that every distance is at
        least as large, up to the rounding of the float64 pass at the flip.
    """
    walk, rows = _checked(form, t, steps, overshoot, bisections), whole("batch_size", batch_size)
    plain = plain_network(model, front=front)
    _, values, own = prepared(plain, inputs, None)
    certificate = certify(
        model, inputs.detach(), lipschitz=lipschitz, front=front, front_lipschitz=front_lipschitz, batch_size=rows
    )
    rivals = _rivals(plain, values, own, target, certificate)
    parts = []
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        some, labels, others = values[part], own[part], rivals[part]
        lowest, highest = limits_of(box, some)
        # Of a stated target: it above all others, as a network of two scores has it.
        scores = plain if target is None else partial(_against, plain, others)
        decided = labels if target is None else torch.zeros_like(labels)
        victim = Victim(scores, some, decided, lowest, highest, generator_of(0))
        gap = partial(_gap, plain, labels[:, None], others[:, None])
        parts.append(_walked(victim, plain, gap, walk))
    ends, flips, distances, slopes, scores_at, found = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Counterfactuals(
        inputs=ends,
        flips=flips,
        reached=distances.isfinite(),
        distances=distances,
        radii=certificate.radii,
        slopes=slopes,
        scores=scores_at,
        predictions=own.cpu(),
        rivals=rivals.cpu(),
        found=found,
        certificate=certificate,
    )


class _Walk(NamedTuple):
    form: Form
    t: float
    steps: int
    overshoot: float
    bisections: int


def _checked(form: Form, t: float, steps: int | None, overshoot: float, bisections: int) -> _Walk:
    choice("form", form, "gradient", "newton")
    most = (10 if form == "newton" else 1) if steps is None else whole("steps", steps)
    return _Walk(form, positive("t", t), most, not_negative("overshoot", overshoot), whole("bisections", bisections))


def _rivals(plain: PlainNetwork, inputs: Tensor, own: Tensor, target: Target, certificate: Certificate) -> Tensor:
    """The class ``j`` that each sample goes to."""
    if target is not None:
        _, _, rivals = prepared(plain, inputs, target)
        if bool((rivals == own).any()):
            rows = (rivals == own).nonzero().flatten().tolist()
            raise InputError(f"samples {rows[:5]} are predicted as their target already: leave them out")
        return rivals
    with torch.no_grad():
        scores = torch.cat([plain(some) for some in inputs.split(1024)])
    second = scores.scatter(1, own[:, None], -math.inf).argmax(1)
    nearest = certificate.nearest
    if certificate.reason is not None or nearest is None:
        return second
    # Where the deployed dtype sees another class than float64, the certificate is of that one.
    nearest = nearest.to(second)
    return torch.where((nearest >= 0) & (nearest != own), nearest, second)


def _against(plain: PlainNetwork, rivals: Tensor, inputs: Tensor) -> Tensor:
    """Two scores ``(B, 2)``: the largest of all classes but the rival, and the rival's."""
    scores, theirs = plain(inputs), rivals[:, None]
    return torch.stack((scores.scatter(1, theirs, -math.inf).amax(1), scores.gather(1, theirs).squeeze(1)), 1)


def _gap(plain: PlainNetwork, own: Tensor, other: Tensor, inputs: Tensor) -> Tensor:
    """``f_l - f_j``; of one output, whose scores are ``(-f, f)``, half of that."""
    scores = plain(inputs)
    apart: Tensor = (scores.gather(1, own) - scores.gather(1, other)).squeeze(1)
    return apart / 2.0 if plain.is_single else apart


def _step(values: Tensor, gradients: Tensor, form: Form) -> Tensor:
    """``s·∇s``, over ``‖∇s‖²`` in Newton's form, at which a linear ``s`` is zero."""
    if form == "newton":
        values = values / sample_norms(gradients).square().clamp(min=_SMALLEST)
    return per_sample(values, gradients) * gradients


def _walked(victim: Victim, plain: PlainNetwork, gap: partial[Tensor], walk: _Walk) -> tuple[Tensor, ...]:
    """Ends, flips, distances, slopes, scores and classes at flips, of some samples."""
    current, ends = victim.inputs, victim.inputs
    nearest = torch.full((len(current),), math.inf, dtype=torch.float64, device=current.device)
    flips = victim.inputs
    first_values, first_gradients = value_and_gradient(gap, current)
    values, gradients = first_values, first_gradients
    for step in range(walk.steps):
        if step:
            values, gradients = value_and_gradient(gap, current)
        current = victim.within(current - walk.t * _step(values.nan_to_num(0.0), gradients, walk.form))
        going = ~nearest.isfinite()
        ends = torch.where(per_sample(going, ends), current, ends)
        proposed = bisected(victim, _first_flip(victim, ends, walk.overshoot), walk.bisections)
        distances = torch.where(going, flip_distances(victim, proposed), math.inf)
        hit = distances.isfinite()
        flips = torch.where(per_sample(hit, flips), proposed, flips)
        nearest = torch.where(hit, distances, nearest)
        if bool(nearest.isfinite().all()):
            break
    with torch.no_grad():
        found = plain(flips).argmax(1)
    return ends, flips, nearest, sample_norms(first_gradients), first_values, found


@torch.no_grad()
def _first_flip(victim: Victim, ends: Tensor, overshoot: float) -> Tensor:
    """Of points on the ways to the ends and past them, the first that flips; else the last one."""
    way = (1.0 + overshoot) * (ends - victim.inputs)
    found = torch.zeros_like(victim.labels, dtype=torch.bool)
    held = victim.inputs
    for share in torch.linspace(0.0, 1.0, _SHARES + 1).tolist()[1:]:
        point = victim.within(victim.inputs + share * way)
        held = torch.where(per_sample(found, held), held, point)
        found = found | (victim.margins(point) < 0.0)
    return held
