"""Radii within which no perturbation changes a prediction, and what a set of them says."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipless_dp.arguments import not_negative, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.robustness.attacks import Box, ends_of, limits_of
from clipless_dp.robustness.constants import Lipschitz
from clipless_dp.robustness.frozen import Frozen, unchecked_rounding
from clipless_dp.robustness.maximum_norm import Norm, Within, gate_caps, refuse_other_norm
from clipless_dp.robustness.networks import PlainNetwork, Units, read, refuse_other_labels, scale_of
from clipless_dp.training import Data

_DOWN = 1.0 - 2.0**-50
"""Covers the four roundings of a difference and a quotient in float64."""

_LARGEST = torch.finfo(torch.float64).max
"""A radius that is too large for a number is rounded down too."""


@dataclass(frozen=True)
class Certificate:
    """What is certified of each of N samples.

    Attributes:
        radii: ``(N,)`` float64: every input nearer than this has the same prediction. 0 where nothing is certified.
        predictions: ``(N,)`` the class that the deployed model predicts; -1 for samples that it drops.
        labels: ``(N,)`` true classes, or ``None``.
        margins: ``(N,)`` float64, the predicted score less the largest other one.
        nearest: ``(N,)`` the class to which the radius is the distance, not always the second best; -1 for none.
        lipschitz: of the scores together, in the input's units; NaN where constants of scores or pairs were stated.
        method: how the constants are known.
        reason: why no radius is above 0; ``None`` where some may be.
        dropped: samples without a finite norm, or with scores that are not, of the deployed model too: their radius
            is 0, and their prediction never right.
        weights: a hash of the weights that were certified.
        function: a hash of what computes with them, its graph, layers and settings: see
            :func:`clipless_dp.model.functions.function_of`.
        answers: a hash of what the network, behind its front, answers to fixed inputs: see
            :func:`clipless_dp.model.functions.answers_of`; ``None`` in certificates of former versions.
        input_norm: of the input gate, which is part of what was certified; infinite without one.
        front: a hash of what runs before the model, its weights, their settings and what it answers to fixed inputs;
            ``None`` without.
        units: as they were stated, one number or one for each channel; ``None``: those of the input.
        score_error: what each score was taken to be off by where the model is deployed.
        samples: a hash of the inputs, and their shape.
        norm: of perturbations: 2, or ``"inf"``, where every entry moves by less than the radius.
        box: in which perturbed inputs are taken to lie; ``None``: anywhere.

    Raises:
        InputError: labels are not one for each sample, or below 0.

    Guarantee:
        Let ``f`` be the network in real arithmetic, with the weights as they are stored. For each sample ``x`` and
        every ``x'`` (of the box) with ``‖x' - x‖ < radii``, ``f`` at ``x'`` has its largest score at ``predictions``
        alone. The rounding of margins and radii is inside: they are computed in float64 and rounded down. A forward
        pass of coarser arithmetic at ``x'`` is at a distance of its own from ``f``; see ``score_error`` of
        :func:`certify`.
    """

    radii: Tensor
    predictions: Tensor
    labels: Tensor | None = None
    margins: Tensor | None = None
    nearest: Tensor | None = None
    lipschitz: float = math.nan
    method: str = ""
    reason: str | None = None
    dropped: int = 0
    weights: str | None = None
    input_norm: float = math.inf
    front: str | None = None
    units: tuple[float, ...] | None = None
    score_error: float = 0.0
    samples: str | None = None
    function: str | None = None
    answers: str | None = None
    norm: Norm = 2
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None:
            if len(self.labels) != len(self.radii):
                raise InputError(f"there are {len(self.labels)} labels of {len(self.radii)} samples")
            refuse_other_labels(self.labels)

    def __len__(self) -> int:
        return len(self.radii)

    @property
    def correct(self) -> Tensor:
        """``(N,)``: which predictions are right.

        Raises:
            InputError: there are no labels.
        """
        if self.labels is None:
            raise InputError("accuracy needs labels: certify pairs of inputs and labels")
        return (self.predictions == self.labels) & (self.predictions >= 0)

    @property
    def digest(self) -> str:
        """A hash of what was certified: the weights, the function, the input norm, and what runs before the model.

        The function is told by its code and settings, and by what it answers to fixed inputs. Equal digests do not
        prove that two networks compute the same everywhere; different ones may come of the same function.
        """
        told = f"{self.weights} {self.function} {self.input_norm!r} {self.front}"
        if self.answers is not None:
            told = f"{told} {self.answers}"
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def claim(self) -> str:
        """What radii hold for, in words."""
        return (
            ("" if self.norm == 2 else "Radii are in the maximum norm. ")
            + "Radii hold for the network in real arithmetic with the released weights, and are rounded down; a "
            "forward pass in float32 may differ from it by its own rounding next to a boundary."
        )

    def signed(self) -> Tensor:
        """Radii of right predictions, and less than zero those of wrong ones, ``(N,)``."""
        return torch.where(self.correct, self.radii, -self.radii)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"nothing is certified: {self.reason}"
        middle = float(self.radii.median()) if len(self) else math.nan
        shown = "" if self.labels is None else f", accuracy {100 * certified_accuracy(self, 0.0):.2f} %"
        return f"{len(self)} samples{shown}, median radius {middle:.4g}, L = {self.lipschitz:.4g}"


def certify(
    model: nn.Module,
    data: Data | Tensor,
    *,
    lipschitz: Lipschitz = None,
    front: nn.Module | None = None,
    front_lipschitz: float | None = None,
    units: Units = None,
    score_error: float = 0.0,
    batch_size: int = 1024,
    norm: Norm = 2,
    box: Box = None,
) -> Certificate:
    """The radius around each sample within which no perturbation of Euclidean norm changes the prediction.

    With ``norm="inf"`` it is of the maximum norm, in which the scores' constant is ``L`` and the radius ``(f_l -
    f_j)/(2L)`` (Zhang et al. 2021, prop. 3), as far as the input gate leaves alone what moves. With a ``box`` interval
    bounds are taken too, and the larger radius holds.

    With the predicted class ``l`` and constants ``K`` of the differences of scores, the radius is ``min_{j ≠ l} (f_l -
    f_j)/K_lj``: over all other classes, for with unequal constants the second best need not be the nearest. For scores
    that are together L-Lipschitz that is ``(f_l - f_j)/(√2·L)`` (Tsuzuku et al. 2018, *Lipschitz-Margin Training*,
    prop. 1); for one output ``|f|/L`` (Serrurier et al. 2021). It costs no privacy: weights that were trained privately
    are public. What is read off *private* data, its accuracy say, is not.

    Args:
        model: a wrapped model, which certifies its own constant; or any module, with one that is stated.
        data: pairs of inputs and labels, as for :func:`clipless_dp.fit`; or inputs alone, a tensor ``(N, ...)``.
        lipschitz: of a module that is not wrapped, see :func:`margin_constants`. Missing or infinite: all radii are 0,
            and ``reason`` says so.
        front: what runs before the model, from the inputs that radii are about: features, say.
        front_lipschitz: its constant; by default its attribute ``lipschitz``.
        units: by how many raw units a channel moves when the input moves by one: a number, or the standard deviations
            of channels that were divided by them. Radii are multiplied by the smallest: a raw perturbation is at most
            its norm over that in the model's input.
        score_error: bound of what each score may be off by where the model is deployed: of float32, or of a quantised
            one. Twice this is taken off the margins.
        batch_size: rows at once.
        norm: of perturbations, 2 or ``"inf"``.
        box: limits of all entries of inputs, in which perturbed ones lie too, for ``norm="inf"`` and a wrapped model.

    Returns:
        Radii in units of the input, or of ``units``, rounded down.

    Raises:
        ConfigurationError: an argument is out of range, or the model reads tokens.
        InputError: the data does not fit, or a label is no class, or samples lie outside of the box.
        PrivacyError: a layer of the model was replaced or hooked, or a global module hook is registered.
        UnsupportedModuleError: in the maximum norm: a layer has no constant there, or with a box no interval rule.
    """
    refuse_other_norm(norm, front, box)
    error = not_negative("score_error", score_error)
    rows = whole("batch_size", batch_size)
    inputs, labels = read(data)
    if not len(inputs):
        raise InputError("there are no samples to certify")
    scale = scale_of(units, inputs)
    frozen = Frozen(model, front, deployed=True, norm=norm)
    plain, deployed, known = frozen.plain, frozen.deployed, frozen.known_error
    classes = plain.classes(inputs)
    if labels is not None:
        refuse_other_labels(labels, classes)
    constants = frozen.constants(lipschitz, front_lipschitz, classes)
    if box is not None:
        limits_of(box, inputs)
        if known is None:
            raise ConfigurationError("interval bounds need the graph of a wrapped model: leave box out")
    parts: list[_Part] = []
    with torch.no_grad():
        for some in inputs.split(rows):
            scores = plain(some).cpu()
            predicted = scores if deployed.dtype == torch.float64 else deployed(some).cpu()
            slack: Tensor | float = unchecked_rounding(some, scores, constants.pairs)
            if known is not None:
                slack = known + (0.0 if front is None else slack)
            part = _certified(scores, constants.pairs, 2.0 * (slack + error), _predictions(predicted))
            if norm == "inf":
                part = _in_maximum_norm(part, plain, some, box, 2.0 * ((known or 0.0) + error))
            parts.append(part)
    radii, predictions, margins, nearest, dropped = (torch.cat(column) for column in zip(*parts, strict=True))
    smallest = float(scale.min())
    return Certificate(
        # A product is off by one rounding.
        radii if units is None else radii * smallest * _DOWN,
        predictions,
        labels,
        margins,
        nearest,
        lipschitz=constants.joint / smallest,
        method=constants.method,
        reason=constants.reason or _reason_of_gate(radii, margins, plain, norm),
        dropped=int(dropped.sum()),
        units=None if units is None else tuple(scale.flatten().tolist()),
        score_error=error,
        samples=digest_of_samples(inputs.split(rows)),
        norm=norm,
        box=None if box is None else ends_of(box),
        **frozen.identity(inputs),
    )


class _Part(NamedTuple):
    radii: Tensor
    predictions: Tensor
    margins: Tensor
    nearest: Tensor
    dropped: Tensor


def _certified(scores: Tensor, pairs: Tensor, slack: Tensor | float, deployed: Tensor) -> _Part:
    """Radii of some samples.

    Args:
        scores: ``(B, C)`` float64.
        pairs: ``K``.
        slack: ``(B,)``, or one number: what a difference of two scores may be off by.
        deployed: ``(B,)`` what the deployed model predicts, -1 where its scores are not finite; where float64 sees
            another class nothing is certified.
    """
    dropped = ~scores.isfinite().all(1) | (deployed < 0)
    scores = scores.masked_fill(dropped[:, None], 0.0)
    best = scores.argmax(1)
    gaps = scores.gather(1, best[:, None]) - scores
    sure = (gaps * _DOWN - torch.as_tensor(slack).reshape(-1, 1)).clamp(min=0.0)
    constants = pairs[best]
    # A difference that never moves keeps its sign for good.
    finite = (sure / constants * _DOWN).clamp(max=_LARGEST)
    radii = torch.where(constants > 0.0, finite, torch.where(sure > 0.0, math.inf, 0.0))
    own = torch.nn.functional.one_hot(best, scores.shape[1]).bool()
    radii, nearest = radii.masked_fill(own, math.inf).min(1)
    margins = gaps.masked_fill(own, math.inf).amin(1)
    void = dropped | (best != deployed)
    return _Part(
        radii.masked_fill(void, 0.0).nan_to_num(0.0, posinf=math.inf),
        deployed.masked_fill(dropped, -1),
        margins.masked_fill(dropped, math.nan),
        nearest.masked_fill(dropped, -1),
        dropped,
    )


def _in_maximum_norm(part: _Part, plain: PlainNetwork, inputs: Tensor, box: Box, slack: float) -> _Part:
    """Radii as far as the input gate leaves alone what moves, and as interval bounds over a box enlarge them."""
    caps = gate_caps(inputs, plain.input_norm, box)
    radii = torch.minimum(part.radii, caps)
    if box is None:
        return part._replace(radii=radii)
    sure = radii > 0.0
    if bool(sure.any()):
        within = Within(plain, ends_of(box), slack)
        found = within.radii(inputs[sure.to(inputs.device)], part.predictions[sure], radii[sure], caps[sure])
        radii = radii.masked_scatter(sure, found)
    return part._replace(radii=radii)


def _reason_of_gate(radii: Tensor, margins: Tensor, plain: PlainNetwork, norm: Norm) -> str | None:
    if norm == 2 or math.isinf(plain.input_norm) or bool((radii > 0.0).any()) or not bool((margins > 0.0).any()):
        return None
    return (
        f"samples lie at or beyond the input gate, a ball of radius {plain.input_norm:g}, whose projection is not "
        "non-expansive in the maximum norm: wrap with a larger input_norm (layers of distances cost no more noise "
        "for it), or give the box"
    )


def _predictions(scores: Tensor) -> Tensor:
    return scores.nan_to_num(0.0).argmax(1).masked_fill(~scores.isfinite().all(1), -1)


def digest_of_samples(parts: Iterable[Tensor]) -> str:
    """A hash of samples, in parts, and behind a dash the shape of one, which former versions left out."""
    seen, shape = hashlib.sha256(), ""
    for some in parts:
        shape = "x".join(map(str, some.shape[1:]))
        # In float64, so that it is the same of models of any dtype.
        seen.update(some.detach().cpu().double().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{seen.hexdigest()}-{shape}"


def certified_accuracy(certificate: Certificate, radius: float) -> float:
    """Share of samples that are predicted right, whatever moves them by at most ``radius``: ``R > radius``, strictly.

    At radius 0 a tie, which is nobody's prediction, counts as wrong.

    Args:
        certificate: of labelled samples.
        radius: in the certificate's units, at least 0.

    Raises:
        ConfigurationError: the radius is negative.
        InputError: there are no labels.
    """
    radius = not_negative("radius", radius)
    return float((certificate.correct & (certificate.radii > radius)).double().mean())


def average_certified_radius(certificate: Certificate, *, signed: bool = False) -> float:
    """Mean over samples of the radius where the prediction is right, and of 0, or its negative, where it is wrong.

    Args:
        certificate: of labelled samples.
        signed: whether wrong predictions count by their radii too, which is how far errors are from being undone.

    Raises:
        InputError: there are no labels; or signed radii are infinite of both signs, which have no mean.
    """
    radii = certificate.signed() if signed else torch.where(certificate.correct, certificate.radii, 0.0)
    mean = float(radii.mean())
    if signed and math.isnan(mean):
        raise InputError("radii of right and of wrong predictions are infinite: signed, they have no mean")
    return mean
