"""What comes out of :func:`clipless_dp.one_class.fit_one_class`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.arguments import share, shown, whole
from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.modules import kept_modes
from clipless_dp.noise import NoiseSource
from clipless_dp.one_class.box import BoxProjection, require_rows
from clipless_dp.one_class.front import FixedFeatures, rebuilt_front, settings_of
from clipless_dp.one_class.networks import convolutional_distance, dense_distance, linear_distance
from clipless_dp.one_class.sampler import BoundarySampler, newton_walk
from clipless_dp.prediction import ODD, Content, Predictor, Predicts, Probe, content_of, rebuilt
from clipless_dp.robustness import Certificate, certify
from clipless_dp.robustness.networks import generator_of
from clipless_dp.statement import PrivacyStatement, report
from clipless_dp.statistics import private_quantile
from clipless_dp.training import FitResult
from clipless_dp.training.result import PROBES, predictor_of

NETWORKS: dict[str, Callable[[tuple[int, ...]], nn.Sequential]] = {
    "dense": dense_distance,
    "linear": linear_distance,
    "convolutional": convolutional_distance,
}
"""By the names that :func:`clipless_dp.one_class.fit_one_class` takes and files hold."""


class Above(nn.Module):
    """``f - t``, ``(B, 1)`` to ``(B,)``; 1-Lipschitz.

    Args:
        threshold: ``t``.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, values: Tensor) -> Tensor:
        """By how much values pass the threshold."""
        return values.reshape(len(values)) - self.threshold


@dataclass(repr=False)
class OneClassModel(Predicts):
    """What :func:`clipless_dp.one_class.fit_one_class` has trained.

    Attributes:
        model: the network ``f``, from rows that are seen from the centre of the box.
        box: what rows go through before it.
        margin: ``m``: ``f`` is about ``m`` on the set, and ``-m`` at a distance of ``2m`` from it.
        weight: ``λ`` of the loss.
        network: its name, or ``None`` of a module that was given.
        result: of a private training, with the optimizer and its ledger; ``None`` without privacy.
        stated_size: whether the number of rows was stated for the training; else that of rows counts as public.
        features: what runs between the box and the network; ``None``: nothing does.
        public_negatives: of how many public rows negatives were drawn; ``None``: they were made up.
    """

    model: DPLipModel
    box: BoxProjection
    margin: float
    weight: float
    network: str | None = None
    result: FitResult | None = None
    stated_size: bool = False
    features: FixedFeatures | None = None
    public_negatives: int | None = None
    _offset: float = field(default=0.0, init=False, repr=False)
    _origin: str = field(default="by default, half way between the levels", init=False, repr=False)

    def __str__(self) -> str:
        trained = "trained without privacy" if self.result is None else str(self.result)
        return f"scores below {self._offset:g} are anomalies ({self._origin}): {trained}"

    @property
    def offset(self) -> float:
        """Rows of a lower score are anomalies: 0, what :meth:`threshold` released, or :meth:`set_threshold` was told.

        Raises:
            ConfigurationError: something is assigned to it.
        """
        return self._offset

    @offset.setter
    def offset(self, value: object) -> None:
        raise ConfigurationError(
            "a threshold is part of what is released: threshold(rate, rows, noise_multiplier=...) takes one from "
            "private rows and charges it, set_threshold(value) takes a public number, which is told in the statement"
        )

    def set_threshold(self, value: float) -> None:
        """Takes a *public* number as the threshold: nothing is charged, and the statement says so.

        A quantile of the scores of private rows is no public number: :meth:`threshold` releases one.

        Args:
            value: a plain finite number: what comes out of an array or a tensor was computed from something.

        Raises:
            ConfigurationError: it is anything else.
        """
        if type(value) not in (int, float):
            raise ConfigurationError(
                f"the threshold must be a plain number, written down and not computed, got {shown(value)}: "
                "threshold(rate, rows, noise_multiplier=...) releases one of private rows"
            )
        self._offset, self._origin = _finite("threshold", value), "stated to be public, and charged to nobody"

    @property
    def epsilon(self) -> float:
        """ε spent by now, thresholds included; infinite without privacy."""
        return math.inf if self.result is None else self.result.epsilon

    @property
    def lipschitz(self) -> float:
        """``L`` of the scores, certified, in the units of the rows: at most about 1, times that of the features."""
        return self.model.lipschitz_constant() * (1.0 if self.features is None else self.features.lipschitz)

    @property
    def front(self) -> nn.Module:
        """What rows go through before the network: the box, and the features."""
        return self.box if self.features is None else _Front(self.box, self.features)

    def scores(self, rows: Any, *, batch_size: int = 1024) -> Tensor:
        """``f`` of rows ``(N, *input_shape)``, ``(N,)``: large where normal.

        Raises:
            InputError: the rows are not like those that were trained on, or not finite.
        """
        size = whole("batch_size", batch_size)
        return self._scores(require_rows(rows, self.box.input_shape), batch_size=size)

    @torch.no_grad()
    def _scores(self, table: Tensor, *, batch_size: int = 4096) -> Tensor:
        with kept_modes(self.model):
            self.model.eval()
            front = self.front
            return torch.cat([self.model(front(some)).reshape(-1) for some in table.split(batch_size)])

    def threshold(
        self,
        rate: float,
        rows: Any,
        *,
        noise_multiplier: float | None = None,
        dataset_size: int | None = None,
        noise: NoiseSource | str | None = None,
    ) -> float:
        """The score that a share of normal rows lies below, which :attr:`offset` becomes: by noisy counts, within some.

        With privacy it is a release of its own, :func:`clipless_dp.statistics.private_quantile` of ``exp(f/R)`` with
        the public bound ``R = |f(0)| + L·radius`` of scores, and goes into the ledger of the training: :attr:`epsilon`
        grows by it. ``fit_one_class(..., rate=...)`` leaves room for one within its ε instead.

        Args:
            rate: share in (0, 1).
            rows: normal ones, those of the training say. The result does not keep them.
            noise_multiplier: ``σ`` of the release.
            dataset_size: public number of *these* rows, of which the share is taken. By default theirs, which then is
                taken to be public as that of the training was; where one was stated for the training, it must be here.
            noise: ``"system"``, ``"secure"`` or a source.

        Raises:
            ConfigurationError: a private model is asked for a threshold without noise, or an argument is out of range.
            InputError: the rows do not fit.
        """
        return self._threshold(
            share("rate", rate, "(0, 1)"),
            require_rows(rows, self.box.input_shape),
            noise_multiplier,
            dataset_size,
            noise,
        )

    def _threshold(
        self,
        quota: float,
        table: Tensor,
        noise_multiplier: float | None,
        dataset_size: int | None,
        noise: NoiseSource | str | None,
    ) -> float:
        """Of rows that were looked at: behind a training nothing about them refuses any more."""
        if self.result is None:
            if noise_multiplier is not None:
                raise ConfigurationError("the model was trained without privacy: leave noise_multiplier out")
            self._offset = float(torch.quantile(self._scores(table).double(), quota))
            self._origin = "a quantile of rows' scores, without privacy"
            return self._offset
        if noise_multiplier is None:
            raise ConfigurationError(
                "a threshold of private rows' scores is a statistic of them, which the training has not paid for: give "
                "noise_multiplier, or fit_one_class(..., rate=...), or stay with a public one, such as 0"
            )
        if dataset_size is None and self.stated_size:
            raise ConfigurationError(
                "the training was told its number of rows, so that the true one may be private: give dataset_size, the "
                "public number of these rows"
            )
        optimizer = self.result.optimizer
        bound = self._bound()
        # Row by row: among other numbers of rows a row's score may be rounded otherwise, and a count then moves by more
        # than the row that was added.
        found = private_quantile(
            (self._scores(table, batch_size=1).double() / bound).exp(),
            quota,
            lower=math.exp(-1.0),
            upper=math.exp(1.0),
            noise_multiplier=noise_multiplier,
            accountant=optimizer.accountant,
            dataset_size=len(table) if dataset_size is None else dataset_size,
            noise=noise,
        )
        self._offset = bound * math.log(found)
        self._origin = (
            f"a quantile at {quota:.6g} of rows' scores, released with noise multiplier {noise_multiplier:.6g}: an "
            "entry of its own in the ledger"
        )
        return self._offset

    def _bound(self) -> float:
        """Of ``|f|`` on the box: of the weights alone."""
        centre = self.model.random_inputs(1, torch.Generator().manual_seed(0)).cpu() * 0.0
        radius = self.box.radius if self.features is None else self.features.radius
        with torch.no_grad():
            return abs(float(self.model(centre))) + self.model.lipschitz_constant() * radius + 1e-6

    def certify(self, rows: Any, *, threshold: float | None = None, batch_size: int = 1024) -> Certificate:
        """How far each row may be moved before its side of the threshold can change: ``|f - t|/L``, rounded down.

        Predictions are 1 where the score is above, else 0. See :func:`clipless_dp.robustness.certify`.

        Args:
            rows: as for :meth:`scores`.
            threshold: ``t``; by default :attr:`offset`.
            batch_size: rows at once.
        """
        table = require_rows(rows, self.box.input_shape)
        cut = self.offset if threshold is None else _finite("threshold", threshold)
        if cut == 0.0:
            return certify(self.model, table, front=self.front, batch_size=batch_size)
        net = nn.Sequential(self.model.net, Above(cut))
        own = self.model.lipschitz_constant()
        return certify(net, table, front=self.front, lipschitz=own, batch_size=batch_size)

    def sample_boundary(
        self, count: int, *, level: float | None = None, steps: int = 16, rng_seed: int | None = None
    ) -> Tensor:
        """Points of the box that Newton's method has brought to a level of ``f`` from uniform ones: what it looks like.

        Args:
            count: how many, ``(count, *input_shape)`` in the rows' units.
            level: of ``f``; by default :attr:`offset`.
            steps: of Newton's method, upwards and then downwards.
            rng_seed: of the uniform points; ``None``: other ones each time.
        """
        number, times = whole("count", count), whole("steps", steps)
        cut = self.offset if level is None else _finite("level", level)
        sampler = BoundarySampler(self.model, self.box, features=self.features)
        generator = torch.Generator()
        if rng_seed is None:
            generator.seed()
        else:
            generator = generator_of(rng_seed)
        points = self.box.uniform(number, generator)
        # Whole steps: their shares of the way are 1 each.
        lengths = torch.full((number,), float(times))
        for sign in (1.0, -1.0):
            points = newton_walk(
                lambda some, sign=sign: sign * sampler.scores(some),  # type: ignore[misc]
                points,
                level=sign * cut,
                inside=self.box.inside,
                steps=times,
                damping=1.0,
                lengths=lengths,
            )
        return points + self.box.centre

    def net(self) -> nn.Sequential:
        """From rows as they are to ``f - offset``, ``(B,)``: below zero are anomalies. It shares the weights."""
        before = [self.box] if self.features is None else [self.box, self.features]
        return nn.Sequential(*before, self.model.net, Above(self.offset))

    def report(self, path: str | os.PathLike[str] | None = None, **options: Any) -> PrivacyStatement:
        """:func:`clipless_dp.report` of the training, with what was public among its notes.

        Raises:
            ConfigurationError: there was no privacy.
        """
        result = self._private()
        return report(result.optimizer, path, **{**options, "notes": [*self.notes, *options.get("notes", ())]})

    @property
    def notes(self) -> tuple[str, ...]:
        """What was public, for a statement."""
        negatives = (
            "made up from released weights, public randomness and a box that was stated to be public"
            if self.public_negatives is None
            else f"drawn by public randomness from {self.public_negatives} rows that were stated to be public, as was "
            "the box"
        )
        features = (
            ()
            if self.features is None
            else (
                f"Rows were seen through {type(self.features.features).__name__}, a fixed transform, whose Lipschitz "
                f"constant is {self.features.lipschitz:.6g}.",
            )
        )
        return (
            f"One class: rows are positives. Negatives were {negatives}, and were charged to nobody; margin "
            f"{self.margin:.6g}, weight {self.weight:.6g}.",
            *features,
            f"Threshold of scores: {self.offset:.6g}, {self._origin}.",
        )

    def _private(self) -> FitResult:
        if self.result is None:
            raise ConfigurationError(
                "the model was trained without privacy: there is nothing to state. Keep its weights by "
                "torch.save(model.net().state_dict(), path)"
            )
        return self.result

    def predictor(self, *, classes: Sequence[Any] | None = None, threshold: float | None = None) -> Predictor:
        """See :meth:`clipless_dp.prediction.Predicts.predictor`: scores are ``f - offset``.

        Raises:
            ConfigurationError: there was no privacy, or classes or a threshold are given, which are known.
        """
        result = self._private()
        if classes is not None or threshold is not None:
            raise ConfigurationError("a one-class model knows its threshold, and has no classes: leave them out")
        lineage.of(self.model).goes_with(self.box)
        if self.features is not None:
            lineage.of(self.model).goes_with(self.features)
        return predictor_of(result, self.net(), notes=self.notes)

    def content(
        self, *, classes: Sequence[Any] | None = None, threshold: float | None = None, notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """See :meth:`clipless_dp.prediction.Predicts.content`."""
        result = self._private()
        self.predictor(classes=classes, threshold=threshold)
        predictor = predictor_of(result, self.net(), notes=[*self.notes, *notes])
        made_up = self.box.uniform(PROBES, torch.Generator().manual_seed(0)) + self.box.centre
        settings = {
            "low": self.box.low.flatten().tolist(),
            "high": self.box.high.flatten().tolist(),
            "shape": list(self.box.input_shape),
            "network": self.network,
            "features": settings_of(self.features),
            "offset": self.offset,
            "margin": self.margin,
            "weight": self.weight,
        }
        return content_of(predictor, "one class", self.net().state_dict(), settings, Probe.of(predictor, made_up))


def _finite(name: str, value: object) -> float:
    number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    if not math.isfinite(number):
        raise ConfigurationError(f"{name} must be a finite number, got {shown(value)}")
    return number


class _Front(nn.Module):
    """Box and features, with their constant."""

    def __init__(self, box: BoxProjection, features: FixedFeatures) -> None:
        super().__init__()
        self.box, self.features = box, features
        self.lipschitz = features.lipschitz

    def forward(self, rows: Tensor) -> Tensor:
        seen: Tensor = self.features(self.box(rows))
        return seen


def loaded_one_class(content: Content, net: nn.Module | None = None) -> Predictor:
    """What predicts, of the file of a :class:`OneClassModel`: scores are ``f - offset``.

    Args:
        content: of the file.
        net: the network as it was for training, where a module was given then.

    Raises:
        ConfigurationError: it is missing, or there must be none.
        CheckpointError: the file is of another version, or was altered.
    """
    settings = content.settings
    try:
        shape = tuple(int(size) for size in settings["shape"])
        low, high = ([float(end) for end in settings[name]] for name in ("low", "high"))
        name, offset = settings["network"], float(settings["offset"])
        box = BoxProjection(low, high, shape)
        of_features = settings.get("features")
        front = None if of_features is None else rebuilt_front(of_features, box)
    except ODD as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error
    if (name is None) != (net is not None):
        raise ConfigurationError(
            f"{content.name} is of a one-class model, whose network is known: leave net out"
            if net is not None
            else f"{content.name} holds weights and no code: load(path, net=net), with the network as it was"
        )
    if net is None:
        if name not in NETWORKS:
            raise CheckpointError(f"{content.name} is of the network {name!r:.99}, which this version does not know")
        net = NETWORKS[name](shape if front is None else front.feature_shape)
    inner = net.net if isinstance(net, DPLipModel) else net
    before = [box] if front is None else [box, front]
    return rebuilt(content, nn.Sequential(*before, inner, Above(offset)))
