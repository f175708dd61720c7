"""Maps and counterfactuals of some samples in one call: as a table of how good they are, and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.arguments import positive, shown
from clipless_dp.display import Table, Tabular
from clipless_dp.errors import InputError
from clipless_dp.robustness import metrics
from clipless_dp.robustness.attacks import Box, ends_of
from clipless_dp.robustness.constants import Lipschitz
from clipless_dp.robustness.counterfactuals import Form, counterfactual
from clipless_dp.robustness.curves import new_figure
from clipless_dp.robustness.explanations import (
    Reduce,
    Score,
    Target,
    prepared,
    probabilities,
    saliency,
    score_gradients,
)
from clipless_dp.robustness.networks import plain_network

MEANING = {
    "deletion": "area under the probability, most important pixels first: low is good",
    "insertion": "area under the probability as pixels come back: high is good",
    "mu-fidelity, zero": "rank correlation of importance and drop, up to 1",
    "mu-fidelity, uniform": "the same where random pixels replace what is taken",
    "stability, rank": "1 - rank correlation under small noise: low is good",
    "stability, relative": "relative distance under small noise: low is good",
    "SmoothGrad, rank": "1 - rank correlation with the averaged map",
    "SmoothGrad, relative": "relative distance to the averaged map",
    "complexity": "entropy in nats: low is simple",
    "sparseness": "Gini's index: high is sparse",
    "randomisation": "|rank correlation| with the map of shuffled weights: low is good",
}
"""Metrics of :func:`quality`, and what they say."""


@dataclass(frozen=True)
class Quality(Tabular):
    """How good the maps of N samples are; prints as a table.

    Attributes:
        values: of each metric in ``MEANING``, ``(N,)`` in float64.
    """

    values: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """Of each metric over the samples that have it."""
        return {name: float(found.nanmean()) for name, found in self.values.items()}

    def _table(self) -> Table:
        rows = [(name, f"{mean:.4g}", MEANING[name]) for name, mean in self.means().items()]
        return Table(("metric", "mean", ""), rows, ("left", "right", "left"))


def quality(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    score: Score = "margin",
    reduce: Reduce = "max",
    radius: float = 0.1,
    deviation: float = 0.15,
    box: tuple[float, float] = (0.0, 1.0),
    temperature: float = 1.0,
    rng_seed: int = 0,
) -> Quality:
    """Every metric of the map ``|∂s/∂x|`` of each sample, and of its attribution ``x·∂s/∂x`` for μ-fidelity.

    μ-fidelity sums what pixels give, which a map without signs does not say: the attribution of a pixel that is taken
    away to zero is ``x·∂s/∂x``, and of one that becomes a uniform pixel ``(x - c)·∂s/∂x`` with the box's middle ``c``.

    Args:
        model: see :func:`saliency`, with ``target``, ``score`` and ``reduce``.
        inputs: ``(N, ...)``.
        radius: of the noise of stability.
        deviation: of SmoothGrad's.
        box: limits of entries, of pixels that are drawn.
        temperature: scores are multiplied by it before the softmax (of one output, the sigmoid) of deletion and
            insertion: the loss's ``τ``.
        rng_seed: of all that is drawn.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: inputs are not finite numbers that the model reads, or a target is no class.
    """
    plain, inputs, targets = prepared(model, inputs, target, score)
    box, heat = ends_of(box), positive("temperature", temperature)

    def chance(scores: Tensor, own: Tensor) -> Tensor:
        return probabilities(plain, scores, heat).gather(1, own[:, None]).squeeze(1)

    def explain(moved: Tensor) -> Tensor:
        return saliency(plain, moved, targets, score=score, reduce=reduce)

    maps = explain(inputs)
    _, gradients = score_gradients(plain, inputs, targets, score=score)
    held = inputs.cpu()
    fidelity = {
        name: metrics.mu_fidelity(
            plain, inputs, (held - middle) * gradients, targets, score=score, baseline=name, box=box, rng_seed=rng_seed
        )
        for name, middle in (("zero", 0.0), ("uniform", sum(box) / 2.0))
    }
    steady = metrics.stability(explain, inputs, radius=radius, rng_seed=rng_seed)
    smooth = metrics.smooth_distance(
        plain, inputs, targets, deviation=deviation, score=score, reduce=reduce, rng_seed=rng_seed
    )
    curves = [remove(plain, inputs, maps, targets, score=chance) for remove in (metrics.deletion, metrics.insertion)]
    *_, shuffled = metrics.randomisation(plain, inputs, targets, score=score, reduce=reduce, rng_seed=rng_seed).values()
    values = (
        *(curve.areas for curve in curves),
        *(fidelity["zero"], fidelity["uniform"]),
        *(steady.rank, steady.relative, smooth.rank, smooth.relative),
        *(metrics.complexity(maps), metrics.sparseness(maps), shuffled.abs()),
    )
    return Quality(dict(zip(MEANING, values, strict=True)))


def picture(
    model: nn.Module,
    inputs: Tensor,
    path: str | os.PathLike[str] | None = None,
    target: Target = None,
    *,
    names: Sequence[str] | None = None,
    form: Form = "newton",
    t: float = 1.0,
    steps: int | None = None,
    box: Box = None,
    lipschitz: Lipschitz = None,
    front: nn.Module | None = None,
    front_lipschitz: float | None = None,
) -> Any:
    """Draws each image, the map of its margin, and its counterfactual, side by side.

    Args:
        model: see :func:`counterfactual`, with ``target`` (the class to become), ``form``, ``t``, ``steps``, ``box``,
            ``lipschitz``, ``front`` and ``front_lipschitz``.
        inputs: images ``(N, 1 or 3, H, W)``, a row of the picture each.
        path: file to write, in a format that matplotlib knows by its ending; ``None``: none.
        names: of the classes; by default their numbers.

    Returns:
        The figure.

    Raises:
        ConfigurationError: matplotlib is missing, or an argument is out of range.
        InputError: inputs are not images that the model reads.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
        raise InputError(f"a picture needs images (N, 1 or 3, H, W), got {shown(inputs)}")
    figure = new_figure(figsize=(6.0, 2.2 * len(inputs)), layout="constrained")
    found = counterfactual(
        model, inputs, target, form=form, t=t, steps=steps, box=box,
        lipschitz=lipschitz, front=front, front_lipschitz=front_lipschitz,
    )  # fmt: skip
    maps = saliency(plain_network(model, front=front), inputs)
    called = [str(index) for index in range(int(found.rivals.max()) + 1)] if names is None else list(names)
    axes = figure.subplots(len(inputs), 3, squeeze=False)
    for index, (before, middle, after) in enumerate(axes):
        image, moved = inputs[index].detach().double().cpu(), found.inputs[index].double()
        both = torch.stack((image, moved))
        low, high = (float(both.min()), float(both.max())) if box is None else box
        for place, shown_image in ((before, image), (after, moved)):
            scaled = ((shown_image - low) / max(high - low, 1e-12)).clamp(0.0, 1.0).movedim(0, -1)
            place.imshow(scaled.expand(*scaled.shape[:2], 3).numpy())
        middle.imshow(maps[index].numpy(), cmap="magma")
        own, rival = (_name(called, int(one[index])) for one in (found.predictions, found.rivals))
        reached = f"{float(found.distances[index]):.3g}" if bool(found.reached[index]) else "not reached"
        before.set_title(f"predicted {own}", fontsize=9)
        middle.set_title(f"certified radius {float(found.radii[index]):.3g}", fontsize=9)
        after.set_title(f"towards {rival}, flip at {reached}", fontsize=9)
    for place in axes.flat:
        place.set_axis_off()
    if path is not None:
        figure.savefig(path)
    return figure


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)
