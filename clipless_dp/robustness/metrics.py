"""How good maps are: whether what they point at matters to the network, how steady and how simple they are.

A *map* gives each pixel of a sample a number: ``(N, H, W)`` of images ``(N, C, H, W)``, whose channels count as one
pixel; of rows ``(N, n)`` the same shape. Numbers of a map may have signs where that is said. Results are of each
sample, ``(N,)`` in float64 on the CPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.stats import entropy, spearmanr
from torch import Tensor, nn

from clipless_dp.arguments import positive, share, shown, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.robustness.explanations import (
    Reduce,
    Score,
    Target,
    pixelwise,
    prepared,
    saliency,
    score_values,
    smooth_grad,
)
from clipless_dp.robustness.networks import PlainNetwork, generator_of

Explain = Callable[[Tensor], Tensor]
"""Maps of inputs. What it explains must stay the same where inputs move: bind the target to it."""

Baseline = str | float | Tensor
"""What stands for a pixel that is taken away: ``"zero"``, ``"uniform"`` (drawn anew from the box each time), a number,
or inputs that broadcast to a sample's shape."""

Box = tuple[float, float]


class Removal(NamedTuple):
    """A score while pixels go or come.

    Attributes:
        areas: ``(N,)`` under the curves over the share of pixels, by the trapezoid rule.
        scores: ``(N, steps + 1)``.
        shares: ``(steps + 1,)`` of pixels, from 0 to 1.
    """

    areas: Tensor
    scores: Tensor
    shares: Tensor


class Steadiness(NamedTuple):
    """How far two maps of the same sample are apart.

    Attributes:
        rank: ``(N,)`` ``1 - ρ`` with Spearman's correlation ρ: 0 for the same order of pixels, 1 for unrelated ones.
        relative: ``(N,)`` ``‖a - b‖/‖a‖``.
    """

    rank: Tensor
    relative: Tensor


def deletion(
    model: nn.Module,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    score: Score = "probability",
    steps: int = 28,
    baseline: Baseline = "zero",
    box: Box = (0.0, 1.0),
    rng_seed: int = 0,
    batch_size: int = 1024,
) -> Removal:
    """The score while the pixels that a map gives most are replaced, the largest first (Petsiuk et al. 2018, §3.2).

    A small area is good. All channels of a pixel go together; counts are ``steps + 1`` equally spaced ones from none to
    all, rounded to whole pixels.

    Args:
        model: see :func:`clipless_dp.robustness.saliency`, with ``target`` (by default what is predicted of the whole
            sample), ``score`` and ``batch_size``.
        inputs: ``(N, ...)``.
        maps: of these inputs.
        steps: of the curve.
        baseline: what replaces a pixel.
        box: of ``"uniform"``.
        rng_seed: of ``"uniform"``.

    Raises:
        ConfigurationError: an argument is out of range.
        InputError: inputs or maps do not fit.
    """
    return _removal(model, inputs, maps, target, score, steps, baseline, box, rng_seed, batch_size, insert=False)


def insertion(
    model: nn.Module,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    score: Score = "probability",
    steps: int = 28,
    baseline: Baseline = "zero",
    box: Box = (0.0, 1.0),
    rng_seed: int = 0,
    batch_size: int = 1024,
) -> Removal:
    """The score while pixels come back to the baseline, those that a map gives most first. A large area is good.

    Arguments and errors as :func:`deletion`.
    """
    return _removal(model, inputs, maps, target, score, steps, baseline, box, rng_seed, batch_size, insert=True)


def _removal(
    model: nn.Module, inputs: Tensor, maps: Tensor, target: Target, score: Score, steps: int, baseline: Baseline,
    box: Box, rng_seed: int, batch_size: int, *, insert: bool,
) -> Removal:  # fmt: skip
    steps = whole("steps", steps)
    plain, inputs, targets = prepared(model, inputs, target, score)
    values = pixelwise(maps, inputs)
    fill = _filling(baseline, box, inputs, rng_seed)()
    ranks = _ranks(values)
    counts = torch.linspace(0.0, float(values.shape[1]), steps + 1, dtype=torch.float64).round()
    columns = []
    for count in counts.tolist():
        chosen = _as_pixels(ranks < count, inputs)
        shown_pixels = chosen if insert else ~chosen
        columns.append(_scores(plain, torch.where(shown_pixels, inputs, fill), targets, score, batch_size))
    scores = torch.stack(columns, 1)
    shares = counts / values.shape[1]
    return Removal(torch.from_numpy(trapezoid(scores.numpy(), shares.numpy(), axis=1)), scores, shares)


def _ranks(values: Tensor) -> Tensor:
    """Places of pixels, the largest value first; ties in order of pixels."""
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _as_pixels(chosen: Tensor, inputs: Tensor) -> Tensor:
    """A mask of pixels ``(N or 1, P)``, as one of entries: every channel alike."""
    places = inputs.shape[2 if inputs.dim() > 2 else 1 :]
    mask = chosen.reshape(-1, *places).to(inputs.device)
    return mask.unsqueeze(1) if inputs.dim() > 2 else mask


@torch.no_grad()
def _scores(plain: PlainNetwork, inputs: Tensor, targets: Tensor, score: Score, batch_size: int) -> Tensor:
    rows = whole("batch_size", batch_size)
    pieces = zip(inputs.split(rows), targets.split(rows), strict=True)
    return torch.cat([score_values(plain, some, own, score) for some, own in pieces]).double().cpu()


def _filling(baseline: Baseline, box: Box, inputs: Tensor, rng_seed: int) -> Callable[[], Tensor]:
    """What gives the baseline, of all samples alike, each time that it is called."""
    low, high = box
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigurationError(f"box must be (lowest, highest), got {box!r}")
    if isinstance(baseline, str) and baseline == "uniform":
        generator = generator_of(rng_seed)
        return lambda: (low + (high - low) * torch.rand(inputs[:1].shape, generator=generator)).to(inputs)
    if isinstance(baseline, bool) or not (isinstance(baseline, (int, float, Tensor)) or baseline == "zero"):
        raise ConfigurationError(f"baseline must be 'zero', 'uniform', a number or inputs, got {shown(baseline)}")
    held = torch.as_tensor(0.0 if isinstance(baseline, str) else baseline).to(inputs)
    try:
        held = held.expand_as(inputs)
    except RuntimeError as error:
        raise InputError(f"baseline {tuple(held.shape)} does not broadcast to inputs {tuple(inputs.shape)}") from error
    return lambda: held


def mu_fidelity(
    model: nn.Module,
    inputs: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    score: Score = "margin",
    subsets: int = 200,
    fraction: float = 0.2,
    grid: int = 9,
    baseline: Baseline = "zero",
    box: Box = (0.0, 1.0),
    rng_seed: int = 0,
    batch_size: int = 1024,
) -> Tensor:
    """Spearman's correlation of what a map gives to random subsets of pixels, and of how far the score drops without.

    Of each subset the map is summed, with its signs, and its pixels are replaced (Bhatt et al. 2020, §3.1). The image
    is cut into ``grid × grid`` cells, and each subset holds exactly the rounded ``fraction`` of them; rows are cut into
    their entries. Subsets are the same for all samples, so that no result depends on its company. 0 where either does
    not vary, which leaves the correlation undefined. Without signs, a map cannot tell what raises the score from what
    lowers it.

    Args:
        model: see :func:`deletion`, with ``target``, ``score``, ``baseline``, ``box`` and ``batch_size``.
        inputs: ``(N, ...)``.
        maps: of these inputs.
        subsets: how many.
        fraction: of cells in each.
        grid: cells of an image's height and width; at most its pixels.
        rng_seed: of subsets and the baseline.

    Raises:
        ConfigurationError: an argument is out of range.
        InputError: inputs or maps do not fit.
    """
    subsets, grid, fraction = whole("subsets", subsets, 2), whole("grid", grid), share("fraction", fraction, "(0, 1)")
    plain, inputs, targets = prepared(model, inputs, target, score)
    values = pixelwise(maps, inputs)
    filling = _filling(baseline, box, inputs, rng_seed)
    generator = generator_of(rng_seed)
    cells = _cells(inputs, grid)
    count = int(cells.max()) + 1
    size = max(1, round(fraction * count))
    whole_scores = _scores(plain, inputs, targets, score, batch_size)
    sums, drops = [], []
    for _ in range(subsets):
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.randperm(count, generator=generator)[:size]] = True
        pixels = chosen[cells]
        without = torch.where(_as_pixels(pixels[None], inputs), filling(), inputs)
        sums.append(values[:, pixels].sum(1))
        drops.append(whole_scores - _scores(plain, without, targets, score, batch_size))
    return _correlations(torch.stack(sums, 1), torch.stack(drops, 1))


def _cells(inputs: Tensor, grid: int) -> Tensor:
    """The cell that each pixel is in, ``(P,)``."""
    if inputs.dim() != 4:
        return torch.arange(math.prod(inputs.shape[2 if inputs.dim() > 2 else 1 :]))
    height, width = inputs.shape[2:]
    rows, columns = (torch.arange(size) * min(grid, size) // size for size in (height, width))
    return (rows[:, None] * min(grid, width) + columns).flatten()


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's ρ of each row of two matrices, 0 where a row is constant."""
    found = [
        0.0 if np.ptp(one) == 0.0 or np.ptp(other) == 0.0 else spearmanr(one, other).statistic
        for one, other in zip(first.numpy(), second.numpy(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def stability(
    explain: Explain, inputs: Tensor, *, radius: float = 0.1, pairs: int = 8, rng_seed: int = 0
) -> Steadiness:
    """How far maps move where inputs do: a mean over perturbations, uniform in ``[-radius, radius]`` in each entry.

    They come in pairs ``x + δ``, ``x - δ``, the same for all samples. Steady maps have small numbers (Alvarez-Melis and
    Jaakkola 2018; with ranks Serrurier et al. 2023).

    Args:
        explain: maps of inputs: ``lambda moved: saliency(model, moved, labels)``.
        inputs: ``(N, ...)``.
        radius: in the input's units.
        pairs: of perturbations.
        rng_seed: of these.

    Raises:
        ConfigurationError: an argument is out of range.
        InputError: what is explained are no maps of the inputs.
    """
    radius, pairs = positive("radius", radius), whole("pairs", pairs)
    generator = generator_of(rng_seed)
    still = pixelwise(explain(inputs), inputs)
    found = []
    for _ in range(pairs):
        moved = radius * (2.0 * torch.rand(inputs.shape[1:], generator=generator, dtype=torch.float64) - 1.0)
        maps = (pixelwise(explain(inputs + step.to(inputs)), inputs) for step in (moved, -moved))
        found += [apart(still, other) for other in maps]
    return Steadiness(*(torch.stack(column).mean(0) for column in zip(*found, strict=True)))


def apart(first: Tensor, second: Tensor) -> Steadiness:
    """How far the second of two maps ``(N, ...)`` of each sample is from the first: equal maps by 0.

    Raises:
        InputError: they are of different shapes.
    """
    if first.shape != second.shape:
        raise InputError(f"maps of the same samples are expected, got {tuple(first.shape)} and {tuple(second.shape)}")
    first, second = (one.detach().double().cpu().flatten(1) for one in (first, second))
    rank = 1.0 - _correlations(first, second)
    distance, length = (second - first).norm(dim=1), first.norm(dim=1)
    relative = torch.where(distance > 0.0, distance / length, 0.0)
    return Steadiness(rank.masked_fill((first == second).all(1), 0.0), relative)


def smooth_distance(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    deviation: float = 0.15,
    draws: int = 50,
    rng_seed: int = 0,
    score: Score = "margin",
    reduce: Reduce = "max",
) -> Steadiness:
    """How far SmoothGrad's map is from the map itself: small where one gradient says what averaging would.

    Arguments and errors as :func:`clipless_dp.robustness.smooth_grad`.
    """
    plain, inputs, targets = prepared(model, inputs, target, score)
    smooth = smooth_grad(
        plain, inputs, targets, deviation=deviation, draws=draws, rng_seed=rng_seed, score=score, reduce=reduce
    )
    return apart(saliency(plain, inputs, targets, score=score, reduce=reduce), smooth)


def complexity(maps: Tensor) -> Tensor:
    """Entropy of the shares ``|a_i|/Σ|a|`` in nats (Bhatt et al. 2020, §3.3): ``log P`` where all P pixels count alike.

    Args:
        maps: ``(N, ...)``; all zeros have no shares, and NaN.

    Raises:
        InputError: they are no finite maps.
    """
    sizes = _sizes(maps)
    total = sizes.sum(1, keepdim=True)
    return torch.from_numpy(entropy((sizes / total.where(total > 0.0, math.nan)).numpy(), axis=1))


def sparseness(maps: Tensor) -> Tensor:
    """Gini's index of ``|a|`` (Chalasani et al. 2020, §3): 0 where all pixels count alike, ``1 - 1/P`` for one alone.

    ``1 - 2·Σ_k (a_(k)/Σ|a|)·(P - k + ½)/P`` over sizes in ascending order, ``k = 1 … P``.

    Args:
        maps: ``(N, ...)``; all zeros have no index, and NaN.

    Raises:
        InputError: they are no finite maps.
    """
    sizes = _sizes(maps).sort(1).values
    count = sizes.shape[1]
    total = sizes.sum(1, keepdim=True)
    weights = (count - torch.arange(1, count + 1, dtype=torch.float64) + 0.5) / count
    found: Tensor = 1.0 - 2.0 * (sizes / total.where(total > 0.0, math.nan) * weights).sum(1)
    return found


def _sizes(maps: Tensor) -> Tensor:
    if not isinstance(maps, Tensor) or maps.dim() < 2 or not bool(maps.isfinite().all()):
        raise InputError(f"expected finite maps (samples, ...), got {shown(maps)}")
    return maps.detach().double().cpu().flatten(1).abs()


def block_images(informative: Tensor, other: Tensor, *, rng_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of two blocks, one above the other, of which the upper one alone says anything of the label.

    The lower block is an image drawn with replacement, whatever the upper one is: what a map gives to it is wrong
    (blocks of digits: Shah et al. 2021).

    Args:
        informative: ``(N, C, H, W)``, whose labels the task keeps.
        other: ``(M, C, H', W)`` to draw from: other digits, say.
        rng_seed: of the draws.

    Returns:
        Images ``(N, C, H + H', W)``, and the mask ``(H + H', W)`` of the block without information.

    Raises:
        InputError: they are not images of the same channels and width.
    """
    fits = informative.dim() == other.dim() == 4 and len(other) > 0
    if not fits or informative.shape[1] != other.shape[1] or informative.shape[3] != other.shape[3]:
        raise InputError(
            "expected images (N, C, H, W) of the same channels and width, got "
            f"{tuple(informative.shape)} and {tuple(other.shape)}"
        )
    drawn = torch.randint(len(other), (len(informative),), generator=generator_of(rng_seed)).to(other.device)
    images = torch.cat((informative, other[drawn].to(informative)), 2)
    mask = torch.zeros(images.shape[2:], dtype=torch.bool)
    mask[informative.shape[2] :] = True
    return images, mask


def block_share(maps: Tensor, mask: Tensor, *, fraction: float = 0.1) -> Tensor:
    """Which share of the top ``fraction`` of a map's pixels lies where there is no information: 0 is best.

    Args:
        maps: ``(N, H, W)``.
        mask: ``(H, W)``, or ``(N, H, W)``: pixels without information.
        fraction: of pixels that are looked at, rounded up to at least one.

    Raises:
        ConfigurationError: the fraction is out of range.
        InputError: the mask is no truth values of the maps' pixels.
    """
    fraction = share("fraction", fraction, "(0, 1]")
    sizes = _sizes(maps)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in (maps.shape, maps.shape[1:]):
        raise InputError(f"mask must hold truth values of the pixels {tuple(maps.shape[1:])}, got {shown(mask)}")
    top = _ranks(sizes) < max(1, math.ceil(fraction * sizes.shape[1] - 1e-9))
    hidden = mask.expand_as(maps).flatten(1).cpu()
    return (top & hidden).sum(1).double() / top.sum(1)


def randomisation(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    score: Score = "margin",
    reduce: Reduce = "max",
    rng_seed: int = 0,
) -> dict[str, Tensor]:
    """Spearman's ρ of maps before and after weights are shuffled, the last layers first (Adebayo et al. 2018, §3.1).

    Layers come in the order in which a pass ends them, whatever that of their registration. Entries of each parameter
    and weight of a layer change places, which keeps their sizes and loses what was learned;
    layers stay shuffled while earlier ones follow. A map that stays alike does not show what was learned.

    Args:
        model: see :func:`clipless_dp.robustness.saliency`, with ``target`` (what the model itself predicts, by
            default), ``score`` and ``reduce``.
        inputs: ``(N, ...)``.
        rng_seed: of the order of entries.

    Returns:
        For each layer, from the last one on: ``(N,)`` after it and all behind it are shuffled.

    Raises:
        ConfigurationError: an argument is out of range, or the model has no parameters.
        InputError: inputs do not fit.
    """
    plain, inputs, targets = prepared(model, inputs, target, score)
    before = saliency(plain, inputs, targets, score=score, reduce=reduce).flatten(1)
    generator = generator_of(rng_seed)
    shuffled = copy.deepcopy(plain)
    layers = {
        name: own
        for name, part in shuffled.net.named_modules()
        if (own := [parameter for parameter in part.parameters(recurse=False) if parameter.numel() > 1])
    }
    if not layers:
        raise ConfigurationError("the model has no parameters to shuffle")
    found = {}
    ends = _ends(shuffled, inputs[:1])
    for name in sorted(layers, key=lambda name: ends.get(name, -1), reverse=True):
        for parameter in layers[name]:
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.data = parameter.data.flatten()[order].reshape(parameter.shape)
        after = saliency(shuffled, inputs, targets, score=score, reduce=reduce).flatten(1)
        found[name.removeprefix("0.")] = _correlations(before.double(), after.double())
    return found


@torch.no_grad()
def _ends(plain: PlainNetwork, inputs: Tensor) -> dict[str, int]:
    """When a pass ends each module of the network, the last time; of a module that is not called, what holds it."""
    order: list[nn.Module] = []
    modules = dict(plain.net.named_modules())
    hooks = [part.register_forward_hook(lambda module, _, __: order.append(module)) for part in modules.values()]
    try:
        plain.outputs(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    ended = {id(module): place for place, module in enumerate(order)}
    found: dict[str, int] = {}
    for name, part in modules.items():
        found[name] = ended.get(id(part), found.get(name.rpartition(".")[0], -1))
    return found
