"""Which entries of an input a prediction hangs on: gradients of the deployed forward pass, as maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from clipless_dp.arguments import choice, positive, shown, whole
from clipless_dp.errors import InputError
from clipless_dp.robustness.attacks import margins_of
from clipless_dp.robustness.networks import (
    PlainNetwork,
    generator_of,
    plain_network,
    refuse_other_labels,
    value_and_gradient,
)

Score = Literal["class", "margin", "probability"] | Callable[[Tensor, Tensor], Tensor]
"""What is explained, as a word, or as a function of scores ``(B, C)`` and classes ``(B,)`` to values ``(B,)``."""

Target = int | Tensor | None
"""Whose score it is: one class, one for each sample ``(N,)``, or ``None``: what the network predicts of the sample."""

Reduce = Literal["max", "mean"] | None
"""How a map's channels become one: their largest, their mean, or not at all."""


def score_values(plain: PlainNetwork, inputs: Tensor, targets: Tensor, score: Score) -> Tensor:
    """What is explained, of each sample, differentiably.

    Args:
        plain: the deployed forward pass.
        inputs: ``(B, ...)``.
        targets: classes ``l``, ``(B,)``.
        score: ``"class"``: ``f_l``; ``"margin"``: ``f_l - max_{j ≠ l} f_j``, and of one output ``f``, whose scores are
            ``(-f, f)``, half of that: ``f_l`` itself; ``"probability"``: ``softmax(f)_l``, and of one output
            ``sigmoid(±f)``, which is that of the binary cross-entropy; or a function.

    Raises:
        InputError: a function does not return one number for each sample.
    """
    scores: Tensor = plain(inputs)
    if score == "margin":
        return margins_of(scores, targets) / (2.0 if plain.is_single else 1.0)
    if not callable(score):
        scores = probabilities(plain, scores) if score == "probability" else scores
        return scores.gather(1, targets[:, None]).squeeze(1)
    values = score(scores, targets)
    if not isinstance(values, Tensor) or values.shape != targets.shape:
        raise InputError(f"score must return one number for each of {len(targets)} samples, got {shown(values)}")
    return values


def probabilities(plain: PlainNetwork, scores: Tensor, temperature: float = 1.0) -> Tensor:
    """``softmax(τf)``, ``(B, C)``; of one output ``f``, whose scores are ``(-f, f)``, ``sigmoid(∓τf)``."""
    return (scores * (temperature / 2.0 if plain.is_single else temperature)).softmax(1)


def score_gradients(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    score: Score = "margin",
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Values ``s`` and gradients ``∂s/∂x``, with their signs, of the forward pass that is deployed.

    Gates on cotangents and gradients, which change what flows back in training, are left out (:func:`plain_network`).

    Args:
        model: a wrapped model, any module, or what :func:`plain_network` made of one, with a front or in another dtype.
        inputs: ``(N, ...)``.
        target: whose score it is.
        score: what is explained, see :func:`score_values`.
        batch_size: samples at once.

    Returns:
        ``(N,)`` and ``(N, ...)``, on the CPU.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: inputs are not finite numbers that the model reads, or a target is no class.
    """
    plain, inputs, targets = prepared(model, inputs, target, score)
    rows = whole("batch_size", batch_size)
    found = [
        value_and_gradient(partial(score_values, plain, targets=own, score=score), some)
        for some, own in zip(inputs.split(rows), targets.split(rows), strict=True)
    ]
    values, gradients = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return values, gradients


def saliency(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    score: Score = "margin",
    reduce: Reduce = "max",
    batch_size: int = 256,
) -> Tensor:
    """The map ``|∂s/∂x|`` of each sample (Simonyan et al. 2014, §3).

    Args:
        model: see :func:`score_gradients`, with ``target``, ``score`` and ``batch_size``.
        inputs: ``(N, ...)``; the second dimension of three or more counts channels.
        reduce: what becomes of the channels.

    Returns:
        ``(N, H, W)`` of images ``(N, C, H, W)``; of the inputs' own shape for rows ``(N, n)``, or ``reduce=None``.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: inputs are not finite numbers that the model reads, or a target is no class.
    """
    _check_reduce(reduce)
    _, gradients = score_gradients(model, inputs, target, score=score, batch_size=batch_size)
    return reduced(gradients.abs(), reduce)


def smooth_grad(
    model: nn.Module,
    inputs: Tensor,
    target: Target = None,
    *,
    deviation: float = 0.15,
    draws: int = 50,
    rng_seed: int = 0,
    score: Score = "margin",
    reduce: Reduce = "max",
    batch_size: int = 256,
) -> Tensor:
    """``|E ∂s/∂x(x + n)|`` with Gaussian ``n`` (Smilkov et al. 2017, §3): the map, averaged over the neighbourhood.

    The mean is of gradients with their signs. All samples get the same draws, so that no map depends on its company.

    Args:
        model: see :func:`saliency`, with ``score``, ``reduce`` and ``batch_size``.
        inputs: ``(N, ...)``.
        target: whose score it is; by default what is predicted of the sample without noise.
        deviation: of each entry of the noise, in the input's units.
        draws: how many.
        rng_seed: of the noise.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: inputs are not finite numbers that the model reads, or a target is no class.
    """
    _check_reduce(reduce)
    deviation, draws = positive("deviation", deviation), whole("draws", draws)
    generator = generator_of(rng_seed)
    plain, inputs, targets = prepared(model, inputs, target, score)
    total = torch.zeros_like(inputs, device="cpu")
    for _ in range(draws):
        noise = deviation * torch.randn(inputs.shape[1:], generator=generator, dtype=torch.float64)
        _, gradients = score_gradients(plain, inputs + noise.to(inputs), targets, score=score, batch_size=batch_size)
        total += gradients
    return reduced((total / draws).abs(), reduce)


def reduced(maps: Tensor, reduce: Reduce) -> Tensor:
    """Maps without their channels, the second dimension of three or more."""
    if reduce is None or maps.dim() < 3:
        return maps
    return maps.amax(1) if reduce == "max" else maps.mean(1)


def prepared(
    model: nn.Module, inputs: Tensor, target: Target, score: Score = "class"
) -> tuple[PlainNetwork, Tensor, Tensor]:
    """The deployed forward pass, inputs in its dtype, and their classes ``(N,)``, on its device.

    Raises:
        ConfigurationError: the score is unknown, or the model reads tokens.
        InputError: inputs are not finite numbers that the model reads, or a target is no class.
    """
    if not callable(score):
        choice("score", score, "class", "margin", "probability")
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or not inputs.is_floating_point():
        raise InputError(f"inputs must be a tensor (samples, ...) of floating-point numbers, got {shown(inputs)}")
    if not len(inputs):
        raise InputError("there are no samples to explain")
    if not bool(inputs.isfinite().all()):
        raise InputError("inputs hold numbers that are not finite: leave out these samples, of which nothing is known")
    plain = plain_network(model)
    inputs = inputs.detach().to(plain.device, plain.dtype)
    classes = plain.classes(inputs)
    if target is None:
        with torch.no_grad():
            return plain, inputs, torch.cat([plain(some).argmax(1) for some in inputs.split(1024)])
    targets = torch.as_tensor(whole("target", target, 0) if not isinstance(target, Tensor) else target)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise InputError(f"target must be a class or a tensor of classes, got {targets.dtype}")
    if targets.dim() > 1 or (targets.dim() == 1 and len(targets) != len(inputs)):
        raise InputError(f"target must be one class, or one for each of {len(inputs)} samples, got {targets.shape}")
    refuse_other_labels(targets, classes)
    return plain, inputs, targets.long().to(plain.device).expand(len(inputs))


def _check_reduce(reduce: Reduce) -> None:
    if reduce is not None:
        choice("reduce", reduce, "max", "mean")


def pixelwise(maps: Tensor, inputs: Tensor) -> Tensor:
    """What a map gives to each pixel, ``(N, P)``: summed over channels, where it has any.

    Args:
        maps: ``(N, H, W)`` or ``(N, C, H, W)`` of inputs ``(N, C, H, W)``; of rows ``(N, n)`` the same.
        inputs: ``(N, ...)``.

    Raises:
        InputError: the map is not of these inputs, or not finite.
    """
    if not isinstance(maps, Tensor):
        raise InputError(f"expected maps as a tensor, got {shown(maps)}")
    places = inputs.shape[:1] + inputs.shape[2 if inputs.dim() > 2 else 1 :]
    if maps.shape not in (inputs.shape, places):
        raise InputError(
            f"maps of inputs {tuple(inputs.shape)} must be of shape {tuple(places)}, or of theirs, got "
            f"{tuple(maps.shape)}"
        )
    if not bool(maps.isfinite().all()):
        raise InputError("maps hold numbers that are not finite")
    summed = maps.sum(1) if maps.dim() > 2 and maps.shape == inputs.shape else maps
    return summed.detach().double().cpu().flatten(1)
