"""Accuracy over radii: certified below, attacked above; fronts of several models; predictions that abstain."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from clipless_dp.arguments import members, not_negative, share, shown, whole
from clipless_dp.display import Table, Tabular
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.robustness.attacks import DEFAULT, Attack, Attacked, Box, attack
from clipless_dp.robustness.certificates import Certificate, average_certified_radius, certified_accuracy, certify
from clipless_dp.robustness.constants import Lipschitz
from clipless_dp.robustness.networks import Units, read
from clipless_dp.training import Data

RADII = (0.0, 36 / 255, 72 / 255, 108 / 255, 1.0)
"""Where the literature on images of pixels in [0, 1] reads curves; 0 is where nothing moves."""


class Share(NamedTuple):
    """A share of samples, with a Clopper-Pearson interval of it in the population that they were drawn from."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, count: int, level: float) -> Share:
        """So many of so many samples, at a level of confidence."""
        interval = binomtest(hits, count).proportion_ci(level, method="exact")
        return cls(hits / count, float(interval.low), float(interval.high))


class Point(NamedTuple):
    """One radius of a curve.

    Attributes:
        radius: in the certificate's units.
        certified: samples that are right whatever moves them by that much: no attack leaves fewer.
        attacked: samples that no attack that was tried has turned within it; ``None`` where none was tried.
    """

    radius: float
    certified: Share
    attacked: Share | None


@dataclass(frozen=True)
class Curve(Tabular):
    """Accuracy over radii; prints as a table. The truth lies between the two columns.

    Attributes:
        points: one for each radius.
        clean: accuracy where nothing moves, ties counted as the model answers them.
        average_radius: :func:`average_certified_radius`.
        certificate: what it was computed from.
        attacked: what attacks found, or ``None``.
        level: of confidence of each interval by itself.
        attacks: what was tried, by name.
    """

    points: tuple[Point, ...]
    clean: Share
    average_radius: float
    certificate: Certificate
    attacked: Attacked | None
    level: float
    attacks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, certificate: Certificate, attacked: Attacked | None, radii: Sequence[float] = RADII, level: float = 0.95
    ) -> Curve:
        """The curve of results that are there.

        Args:
            certificate: of labelled samples.
            attacked: of these, or of some of them; or ``None``.
            radii: at least 0.
            level: of confidence, in (0, 1).

        Raises:
            ConfigurationError: a radius or the level is out of range.
            InputError: there are no samples, or no labels.
        """
        level = share("level", level, "(0, 1)")
        count, right = len(certificate), certificate.correct
        if not count:
            raise InputError("there are no samples")
        points = []
        for radius in (not_negative("radii", radius) for radius in radii):
            certified = Share.of(round(count * certified_accuracy(certificate, radius)), count, level)
            broken = None
            if attacked is not None:
                tried = len(attacked.distances)
                broken = Share.of(round(tried * attacked.accuracy(radius)), tried, level)
            points.append(Point(radius, certified, broken))
        clean = Share.of(int(right.sum()), count, level)
        names = () if attacked is None else attacked.tried
        return cls(tuple(points), clean, average_certified_radius(certificate), certificate, attacked, level, names)

    def _table(self) -> Table:
        def shown(value: Share | None) -> tuple[str, str]:
            if value is None:
                return "–", ""
            return f"{100 * value.value:.2f}", f"{100 * value.low:.2f} to {100 * value.high:.2f}"

        rows = [(f"{point.radius:.4g}", *shown(point.certified), *shown(point.attacked)) for point in self.points]
        interval = f"{100 * self.level:g} % interval"
        notes = [
            f"{len(self.certificate)} samples, clean {100 * self.clean.value:.2f} %, average certified radius "
            f"{self.average_radius:.4g}"
        ]
        if self.certificate.reason is not None:
            notes.append(f"nothing is certified: {self.certificate.reason}")
        headers = ("radius", "certified %", interval, "attacked %", interval)
        return Table(headers, rows, ("right",) * 5, notes)

    def described(self, data: str) -> dict[str, Any]:
        """What a statement says of it, as plain values: :func:`clipless_dp.report` takes it as ``robustness``.

        Args:
            data: which samples these are, in words. They must be public: accuracy on private data is not covered by ε.

        Raises:
            ConfigurationError: nothing is said of the data.
        """
        if not isinstance(data, str) or not data.strip():
            raise ConfigurationError(f"say which public samples were certified, in words, got {data!r}")
        certificate, tried = self.certificate, self.attacked
        assumptions = [
            *_surroundings(certificate),
            "A perturbation of the input as the model reads it, before it is rounded to pixels, say.",
            certificate.claim,
            "Accuracies are of these samples, intervals (Clopper-Pearson) of the population that they were drawn from.",
        ]
        if certificate.reason is not None:
            assumptions.insert(0, f"Nothing is certified: {certificate.reason}.")
        return {
            "data": data,
            "samples": len(certificate),
            "dropped": certificate.dropped,
            "lipschitz": certificate.lipschitz if math.isfinite(certificate.lipschitz) else None,
            "method": certificate.method,
            "clean": self.clean._asdict(),
            "average_radius": self.average_radius if math.isfinite(self.average_radius) else None,
            "level": self.level,
            "points": [
                {
                    "radius": point.radius,
                    "certified": point.certified._asdict(),
                    "attacked": None if point.attacked is None else point.attacked._asdict(),
                }
                for point in self.points
            ],
            "attacks": list(self.attacks),
            "attacked_samples": 0 if tried is None else len(tried.distances),
            "assumptions": assumptions,
            "units": None if certificate.units is None else list(certificate.units),
            "score_error": certificate.score_error,
            "input_norm": certificate.input_norm if math.isfinite(certificate.input_norm) else None,
            "front": certificate.front,
            "weights": certificate.weights,
            "function": certificate.function,
            "answers": certificate.answers,
            "digest": certificate.digest,
        }

    def plot(self, path: str | os.PathLike[str] | None = None, axes: Any = None) -> Any:
        """Draws both curves, with their intervals.

        Args:
            path: file to write, in a format that matplotlib knows by its ending; ``None``: none.
            axes: of matplotlib, to draw on; by default new ones.

        Returns:
            The axes.

        Raises:
            ConfigurationError: matplotlib is missing.
        """
        axes = new_figure().add_subplot() if axes is None else axes
        radii = [point.radius for point in self.points]
        lines: list[tuple[str, list[Share]]] = [("certified", [point.certified for point in self.points])]
        if self.attacked is not None:
            lines.append(("attacked", [point.attacked for point in self.points if point.attacked is not None]))
        for label, shares in lines:
            (line,) = axes.plot(radii, [100 * one.value for one in shares], marker="o", label=label)
            low, high = [100 * one.low for one in shares], [100 * one.high for one in shares]
            axes.fill_between(radii, low, high, color=line.get_color(), alpha=0.2)
        axes.set_xlabel("radius (Euclidean norm)")
        axes.set_ylabel("accuracy (%)")
        axes.legend()
        if path is not None:
            axes.figure.savefig(path)
        return axes


def _surroundings(certificate: Certificate) -> list[str]:
    """What was certified beside the weights, in words."""
    norm, units = certificate.input_norm, certificate.units
    said = [
        f"The input gate, at norm {norm:g}, is part of what is certified."
        if math.isfinite(norm)
        else "No input gate is part of what is certified."
    ]
    if certificate.front is not None:
        said.append(
            "What runs before the model is part of what is certified: radii are of its inputs. Its hash is "
            f"{certificate.front[:16]}…"
        )
    if units is not None:
        told = f"{units[0]:g}" if len(units) == 1 else f"{len(units)} channels from {min(units):g} to {max(units):g}"
        said.append(f"Radii are in raw units, of which the model's input has one for each {told}.")
    if certificate.score_error > 0.0:
        said.append(f"Where the model is deployed each score is off by at most {certificate.score_error:g}.")
    return said


def new_figure(**arguments: Any) -> Any:
    """A figure of matplotlib's, which needs no display.

    Raises:
        ConfigurationError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("plots need matplotlib: pip install 'clipless-dp[plot]'") from error
    figure = Figure(**arguments)
    FigureCanvasAgg(figure)
    return figure


def curve(
    model: nn.Module,
    data: Data,
    radii: Sequence[float] = RADII,
    attacks: Sequence[Attack] = DEFAULT,
    *,
    lipschitz: Lipschitz = None,
    front: nn.Module | None = None,
    front_lipschitz: float | None = None,
    units: Units = None,
    score_error: float = 0.0,
    box: Box = None,
    attacked_samples: int | None = None,
    level: float = 0.95,
    rng_seed: int = 0,
) -> Curve:
    """Certified accuracy, and what attacks leave of accuracy, at each radius.

    Args:
        model: see :func:`certify`, with ``lipschitz``, ``front``, ``front_lipschitz``, ``units``, ``score_error``.
        data: pairs of inputs and labels: public or held out. Accuracy on *private* data is not covered by any ε.
        radii: at least 0; those above 0 are the budgets of attacks.
        attacks: see :func:`attack`, with ``box`` and ``rng_seed``; none of them, ``()``: the certificate only.
        attacked_samples: attack so many samples, the first ones; by default all.
        level: of confidence of the intervals.

    Raises:
        ConfigurationError: an argument is out of range.
        InputError: the data does not fit.
    """
    levels = [not_negative("radii", radius) for radius in members("radii", radii, "numbers")]
    attacks = members("attacks", attacks, "attacks")
    share("level", level, "(0, 1)")
    inputs, labels = read(data)
    if labels is None:
        raise InputError("accuracy needs labels: give pairs of inputs and labels")
    count = len(inputs) if attacked_samples is None else whole("attacked_samples", attacked_samples)
    certificate = certify(
        model,
        (inputs, labels),
        lipschitz=lipschitz,
        front=front,
        front_lipschitz=front_lipschitz,
        units=units,
        score_error=score_error,
    )
    attacked = None
    if attacks:
        attacked = attack(
            model,
            (inputs[:count], labels[:count]),
            attacks,
            radii=[radius for radius in levels if radius > 0.0],
            box=box,
            front=front,
            units=units,
            rng_seed=rng_seed,
        )
    return Curve.of(certificate, attacked, levels, level)


class FrontPoint(NamedTuple):
    """One model of a front.

    Attributes:
        name: its name.
        clean: accuracy where nothing moves.
        certified: accuracy that is certified at the front's radius.
        average_radius: :func:`average_certified_radius`.
        efficient: whether no other model is at least as good in clean and certified accuracy, and better in one.
    """

    name: str
    clean: float
    certified: float
    average_radius: float
    efficient: bool


@dataclass(frozen=True)
class Front(Tabular):
    """Clean against certified accuracy of several models; prints as a table.

    Attributes:
        radius: at which accuracy is certified.
        points: the models, by falling clean accuracy.
    """

    radius: float
    points: tuple[FrontPoint, ...]

    def _table(self) -> Table:
        rows = [
            (
                point.name,
                f"{100 * point.clean:.2f}",
                f"{100 * point.certified:.2f}",
                f"{point.average_radius:.4g}",
                "yes" if point.efficient else "",
            )
            for point in self.points
        ]
        headers = ["model", "clean %", f"certified % at {self.radius:.4g}", "average radius", "efficient"]
        return Table(headers, rows, ("left", *("right",) * 3, "left"))

    def plot(self, path: str | os.PathLike[str] | None = None, axes: Any = None) -> Any:
        """Draws the models, and a line through the efficient ones; arguments as :meth:`Curve.plot`."""
        axes = new_figure().add_subplot() if axes is None else axes
        best = [point for point in self.points if point.efficient]
        axes.plot([100 * point.clean for point in best], [100 * point.certified for point in best])
        axes.scatter([100 * point.clean for point in self.points], [100 * point.certified for point in self.points])
        for point in self.points:
            axes.annotate(point.name, (100 * point.clean, 100 * point.certified))
        axes.set_xlabel("clean accuracy (%)")
        axes.set_ylabel(f"certified accuracy at {self.radius:.4g} (%)")
        if path is not None:
            axes.figure.savefig(path)
        return axes


def pareto(certificates: Mapping[str, Certificate], radius: float) -> Front:
    """Which of several models trade clean against certified accuracy best.

    A temperature moves a network along this front: a small ``τ`` is robust, a large one accurate (Béthune et al. 2022,
    *Pay attention to your loss*). Each private run costs the same ε whatever its ``τ`` is; several runs on the same
    data add up, and choosing among them by *private* data is one more use of it.

    Args:
        certificates: by name, of the same labelled samples.
        radius: at least 0.

    Raises:
        ConfigurationError: there is none, or the radius is out of range.
        InputError: there are no labels, or the certificates are of different samples, labels or units.
    """
    if not isinstance(certificates, Mapping) or not all(isinstance(one, Certificate) for one in certificates.values()):
        raise ConfigurationError(f"certificates must be a mapping of names to certificates, got {shown(certificates)}")
    if not certificates:
        raise ConfigurationError("give one certificate or more, by name")
    first, *others = certificates.values()
    if not all(_comparable(first, other) for other in others):
        raise InputError(
            "the certificates are of different samples, labels or units: certify the same data in the same"
        )
    found = {
        name: (float(one.correct.double().mean()), certified_accuracy(one, radius))
        for name, one in certificates.items()
    }

    def is_beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in found.values())

    points = [
        FrontPoint(name, *pair, average_certified_radius(certificates[name]), not is_beaten(pair))
        for name, pair in found.items()
    ]
    return Front(float(radius), tuple(sorted(points, key=lambda point: (-point.clean, -point.certified, point.name))))


def _comparable(one: Certificate, other: Certificate) -> bool:
    """Whether two certificates are of the same samples, as far as they tell, with radii in the same units."""
    if one.labels is None or other.labels is None:
        return one.labels is other.labels
    return (
        torch.equal(one.labels, other.labels)
        and one.units == other.units
        and _may_be_the_same(one.samples, other.samples)
    )


def _may_be_the_same(one: str | None, other: str | None) -> bool:
    """Of hashes of samples: of former versions they say nothing of shapes."""
    if one is None or other is None:
        return True
    content, _, shape = one.partition("-")
    theirs, _, their_shape = other.partition("-")
    return content == theirs and (not shape or not their_shape or shape == their_shape)


class Selective(NamedTuple):
    """What a classifier that abstains does on some samples.

    Attributes:
        answered: share of samples that it answers.
        accuracy: share of right answers among these; NaN where there are none.
        correct: share of all samples that it answers rightly.
    """

    answered: float
    accuracy: float
    correct: float


@dataclass(frozen=True)
class Abstaining:
    """A classifier that answers where its prediction is certified within a radius, and else abstains.

    Attributes:
        model: the classifier.
        radius: ``r``.
        arguments: of :func:`certify`, for each call.

    Guarantee:
        Whoever moves an input that is answered by at most ``r`` gets the same answer or none. Two inputs that are
        answered differently lie more than ``2r`` apart: the balls within which their predictions stay do not meet.
    """

    model: nn.Module
    radius: float
    arguments: Mapping[str, Any]

    def predict(self, inputs: Tensor) -> Tensor:
        """Classes ``(N,)``, -1 where it abstains.

        Args:
            inputs: ``(N, ...)``.
        """
        return self._answers(certify(self.model, inputs, **self.arguments))

    def evaluate(self, data: Data) -> Selective:
        """How often it answers, and how often it is right, on labelled samples."""
        certificate = certify(self.model, data, **self.arguments)
        answers = self._answers(certificate)
        answered, right = answers >= 0, (answers >= 0) & certificate.correct
        accuracy = float(right.sum() / answered.sum()) if bool(answered.any()) else float("nan")
        return Selective(float(answered.double().mean()), accuracy, float(right.double().mean()))

    def _answers(self, certificate: Certificate) -> Tensor:
        return torch.where(certificate.radii > self.radius, certificate.predictions, -1)


def abstain(model: nn.Module, radius: float, **arguments: Any) -> Abstaining:
    """A classifier that abstains within a radius of where its prediction changes.

    Args:
        model: see :func:`certify`.
        radius: at least 0. Chosen on *private* data, it is not free.
        arguments: further ones of :func:`certify`.

    Raises:
        ConfigurationError: the radius is out of range, or :func:`certify` has no such argument.
    """
    known = [name for name, one in inspect.signature(certify).parameters.items() if one.kind is one.KEYWORD_ONLY]
    for name in arguments:
        if name not in known:
            raise ConfigurationError(f"certify has no argument {name!r}: it takes {', '.join(known)}")
    return Abstaining(model, not_negative("radius", radius), arguments)
