"""Presets: a network, how it is bounded, and the settings of ``fit`` that go with it, under one name.

Each says on which data its hyper-parameters were chosen. What was chosen on public data, or on other data than yours,
costs no privacy; what you choose by looking at results on your own data does (``docs/search.md``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from accounting import create_accountant
from clipless_dp import constraints, losses
from clipless_dp.architectures.small import (
    Shape,
    linear_from_zero,
    pooled_convolutions,
    pooled_dense,
    scaled_convolutions,
    small_convolutions,
    two_hidden_layers,
)
from clipless_dp.arguments import share
from clipless_dp.errors import CheckpointError, CliplessError, ConfigurationError
from clipless_dp.features import FrozenFeatures, GroupedScattering, MirroredScattering, OpponentColours
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.modules import state_of
from clipless_dp.prediction import ODD, Content, Predictor, Predicts, Probe, Whole, content_of, rebuilt
from clipless_dp.sampling import Samples, as_tensors
from clipless_dp.sampling.people import ROWS_PER_GROUP, column_of, people_of
from clipless_dp.sampling.samples import count as samples_in
from clipless_dp.sampling.samples import public_size
from clipless_dp.statistics import Releases, private_moments
from clipless_dp.training import Data, FitResult, evaluate, fit
from clipless_dp.training.groups import require_known
from clipless_dp.training.result import PROBES, bounded, predictor_of, require_same_norm


@dataclass(frozen=True)
class Trained(Predicts):
    """What :meth:`Preset.fit` returns.

    Attributes:
        model: the trained model, behind the front-end.
        result: of :func:`clipless_dp.fit`; its ledger holds the statistics too.
        prepare: front-end and statistics: maps samples ``(B, ...)`` to what the model takes.
        preset: that it was trained by.
        shape: of a sample as it is.
        change: what the statistics do to samples behind the front-end; ``None``: nothing.
    """

    model: DPLipModel
    result: FitResult
    prepare: Callable[[Tensor], Tensor]
    preset: Preset
    shape: Shape
    change: Callable[[Tensor], Tensor] | None = None

    def predictor(self, *, classes: Sequence[Any] | None = None, threshold: float | None = None) -> Predictor:
        """See :meth:`clipless_dp.prediction.Predicts.predictor`."""
        return predictor_of(self.result, self._whole(), classes=classes, threshold=threshold)

    def _whole(self) -> Whole:
        return Whole(self.prepare, self.model, self.preset.before(self.shape, self.change))

    def content(
        self, *, classes: Sequence[Any] | None = None, threshold: float | None = None, notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """See :meth:`clipless_dp.prediction.Predicts.content`."""
        if not (self.change is None or isinstance(self.change, WithoutMean)):
            raise ConfigurationError(
                f"statistics of preset {self.preset.name!r} return a {type(self.change).__name__}, which no file "
                "holds: return a presets.WithoutMean"
            )
        predictor = predictor_of(self.result, self._whole(), notes=notes, classes=classes, threshold=threshold)
        state = {f"model.{name}": value for name, value in state_of(self.model.net).items()}
        change = self.change
        if change is not None:
            state["mean"] = change.mean
        settings = {
            "preset": self.preset.name,
            "shape": list(self.shape),
            "behind": list(self.model.input_shape),
            "outputs": math.prod(self.model.output_shape),
            "input_norm": bounded(self.model.input_norm),
            "directions": None if change is None else change.directions,
        }
        made_up = torch.rand(PROBES, *self.shape, generator=torch.Generator().manual_seed(0))
        return content_of(predictor, "preset", state, settings, Probe.of(predictor, made_up))

    def evaluate(self, dataset: Data) -> tuple[float | None, float]:
        """Accuracy and mean loss on data that was not trained on, as :func:`clipless_dp.evaluate`."""
        inputs, targets = as_tensors(dataset)
        return evaluate(self.model, (self.prepare(inputs), targets))


class WithoutMean(nn.Module):
    """Vectors less a released mean, scaled to unit norm again: what all share only takes from what differs.

    Args:
        mean: ``(C,)``, released.
        directions: whether samples are flattened and scaled to unit norm first.

    Shape:
        ``(B, C)`` to the same shape; with ``directions`` ``(B, ...)`` to ``(B, C)``.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, *, directions: bool = False) -> None:
        super().__init__()
        self.directions = directions
        self.register_buffer("mean", mean)

    def forward(self, some: Tensor) -> Tensor:
        """Centres samples."""
        some = _directions(some) if self.directions else some
        differences = some - self.mean.to(some.device, some.dtype)
        return differences.div_(differences.norm(dim=1, keepdim=True).clamp(min=1e-6))


def _directions(some: Tensor) -> Tensor:
    return nn.functional.normalize(some.flatten(1))


@dataclass(frozen=True)
class Preset:
    """A named way to train.

    Attributes:
        name: what :func:`get` knows it by.
        summary: what it is for, in a sentence.
        network: makes the network from the shape of a sample, behind the front-end, and the number of outputs.
        bound: wraps it for samples of that shape, by gates or constraints, with a loss.
        settings: keyword arguments of :func:`clipless_dp.fit`; ``sample_rate`` may stand for ``batch_size``.
        provenance: on which data these were chosen, and how.
        front: makes the front-end from the shape of a sample: a module that no private data entered, run once on each
            sample by itself (:class:`clipless_dp.features.FrozenFeatures`). ``None``: the model takes samples as they
            are.
        statistics: releases statistics of the training data behind the front-end, charged to the accountant that it is
            given, and returns what they do to samples: standardise them, say. ``None``: nothing.
    """

    name: str
    summary: str
    network: Callable[[Shape, int], nn.Module]
    bound: Callable[[nn.Module, Shape], DPLipModel]
    settings: Mapping[str, Any]
    provenance: str
    front: Callable[[Shape], nn.Module] | None = None
    statistics: Callable[[Tensor, Releases], Callable[[Tensor], Tensor]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def model(self, shape: Shape, outputs: int) -> DPLipModel:
        """The wrapped model, its weights drawn anew.

        Args:
            shape: of a sample behind the front-end.
            outputs: classes, or numbers to predict.

        Raises:
            ConfigurationError: the network does not take this shape.
        """
        try:
            return self.bound(self.network(shape, outputs), shape)
        except CliplessError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigurationError(f"preset {self.name!r} takes no samples of shape {shape}: {error}") from error

    def features(self, inputs: Tensor, *, cache_dir: str | os.PathLike[str] | None = None) -> Tensor:
        """Samples ``(B, ...)`` behind the front-end, from ``cache_dir`` if they are there.

        Raises:
            ConfigurationError: the front-end does not take this shape.
        """
        if self.front is None:
            return inputs
        try:
            module = self.front(tuple(inputs.shape[1:]))
        except CliplessError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigurationError(
                f"preset {self.name!r} takes no samples of shape {tuple(inputs.shape[1:])}: {error}"
            ) from error
        return FrozenFeatures(module, cache_dir=cache_dir, batch_size=64).compute(inputs)

    def before(self, shape: Shape, change: Callable[[Tensor], Tensor] | None) -> nn.Module | None:
        """Front-end and statistics as one module; ``None`` where there are none, or the latter are no module."""
        parts = [part for part in (None if self.front is None else self.front(shape), change) if part is not None]
        modules = [part for part in parts if isinstance(part, nn.Module)]
        return nn.Sequential(*modules) if modules and len(modules) == len(parts) else None

    def fit(
        self,
        dataset: Data,
        *,
        epsilon: float,
        delta: float,
        outputs: int,
        validation: Data | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        **changes: Any,
    ) -> Trained:
        """Runs the front-end, releases statistics, builds the model, and trains it with these settings.

        Args:
            dataset: inputs as they are before the front-end, and targets.
            epsilon: target ε.
            delta: target δ.
            outputs: classes, or numbers to predict: public.
            validation: public or held-out data, as for :func:`clipless_dp.fit`.
            cache_dir: folder for features; it then holds private data.
            device: to train on.
            changes: further arguments of :func:`clipless_dp.fit`, in place of the preset's.

        Raises:
            ConfigurationError: the preset does not take this data, or an argument is out of range.

        Guarantee:
            That of :func:`clipless_dp.fit`, whose arguments these are: the front-end sees each sample by itself, and
            the noise of training is calibrated on top of what the statistics cost.
        """
        asked = {**self.settings, **changes, "epsilon": epsilon, "delta": delta}
        rate = asked.pop("sample_rate", None)
        if rate is not None:
            share("sample_rate", rate, "(0, 1]")
        require_known(asked)
        dataset, groups = column_of(dataset, changes.get("groups"))
        people = people_of(groups, samples_in(dataset), asked.get("rows_per_group", ROWS_PER_GROUP))
        inputs, targets = Samples.to_train_on(dataset, people=people).all()
        size = public_size(changes.get("dataset_size"), len(inputs), people)
        if people is not None:
            changes["groups"] = groups
        features = self.features(inputs, cache_dir=cache_dir)
        change: Callable[[Tensor], Tensor] | None = None
        if self.statistics is not None:
            accountant = changes.get("accountant", self.settings.get("accountant", "prv"))
            if isinstance(accountant, str):
                accountant = create_accountant(accountant, dataset_size=size)
            changes["accountant"] = accountant
            releases = Releases(
                accountant,
                size,
                changes.get("checkpoint"),
                changes.get("reproducible_seed"),
                changes.get("noise"),
                people,
            )
            change = self.statistics(features, releases)

        def prepare(samples: Tensor) -> Tensor:
            behind = self.features(samples, cache_dir=cache_dir)
            return behind if change is None else change(behind)

        prepared = features if change is None else change(features)
        held_out = None
        if validation is not None:
            held_inputs, held_targets = as_tensors(validation)
            held_out = prepare(held_inputs), held_targets
        model = self.model(tuple(prepared.shape[1:]), outputs).to(device)
        result = fit(
            model,
            (prepared, targets),
            epsilon=epsilon,
            delta=delta,
            validation=held_out,
            **self.arguments(size, **changes),
        )
        if isinstance(change, nn.Module):
            lineage.of(model).goes_with(change)
        return Trained(model, result, prepare, self, tuple(inputs.shape[1:]), change)

    def arguments(self, dataset_size: int, /, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of :func:`clipless_dp.fit` for so many samples.

        Args:
            dataset_size: public number of samples, to which a sample rate refers.
            changes: take the place of the preset's.
        """
        arguments = {**self.settings, **changes}
        rate = arguments.pop("sample_rate", None)
        if "batch_size" not in arguments and rate is not None:
            arguments["batch_size"] = max(1, round(rate * dataset_size))
        return arguments


def get(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigurationError: there is none; those that there are are listed.
    """
    if name not in PRESETS:
        tables = "; tables of columns are what clipless_dp.tables.fit_table trains on" * ("table" in str(name))
        raise ConfigurationError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}{tables}")
    return PRESETS[name]


def loaded_preset(content: Content, preset: Preset | None = None) -> Predictor:
    """What predicts, of the file of a :class:`Trained`.

    Args:
        content: of the file.
        preset: that it was trained by; by default the one of its name.

    Raises:
        CheckpointError: there is none of the name, or it builds another network.
    """
    settings = content.settings
    try:
        name, directions = str(settings["preset"]), settings["directions"]
        behind, outputs = tuple(map(int, settings["behind"])), int(settings["outputs"])
        state = dict(content.state)
        change = None if directions is None else WithoutMean(state.pop("mean"), directions=bool(directions))
    except ODD as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error
    if preset is None and name not in PRESETS:
        raise CheckpointError(
            f"{content.name} was trained by preset {name!r}, which is none of this package: give preset="
        )
    known = PRESETS[name] if preset is None else preset

    def prepare(samples: Tensor) -> Tensor:
        features = known.features(samples)
        return features if change is None else change(features)

    model = known.model(behind, outputs)
    state = {key.removeprefix("model."): value for key, value in state.items()}
    if "input_norm" in settings:
        require_same_norm(content, model)
    try:
        front = known.before(tuple(map(int, settings["shape"])), change)
    except ODD as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error
    whole = Whole(prepare, model, front)
    found = rebuilt(replace(content, state=state), whole, model.net, dtype=model.device_and_dtype()[1])
    if change is not None:
        lineage.of(whole).goes_with(change)
    return found


def _root_of_entries(shape: Shape) -> float:
    """The largest norm of a sample with entries in [-1, 1], as pixels are."""
    return math.sqrt(math.prod(shape))


def _wrapped(
    net: nn.Module, shape: Shape, *, constraint: constraints.Constraint | None = None, largest_entry: float = 1.0
) -> DPLipModel:
    return DPLipModel(
        net,
        input_shape=shape,
        input_norm=largest_entry * _root_of_entries(shape),
        loss=losses.TauCrossEntropy(8.0),
        constraint=constraint,
    )


def _without_mean(features: Tensor, releases: Releases) -> WithoutMean:
    """The mean of vectors of unit norm, charged."""
    moments = private_moments(features, norm=1.0, noise_multiplier=20.0, **releases.arguments("mean"))
    return WithoutMean(moments.mean)


def _directions_without_mean(features: Tensor, releases: Releases) -> WithoutMean:
    """The same for features of any size and shape, of which only the direction is kept."""
    return WithoutMean(_without_mean(_directions(features), releases).mean, directions=True)


def _mirrored(shape: Shape) -> MirroredScattering:
    """With three scales if the places of these are whole, and the image has four of them across: they sum up more."""
    height, width = shape[1:]
    return MirroredScattering((height, width), 3 if width % 8 == 0 and min(height, width) >= 32 else 2)


def _gradient_gated_regression(net: nn.Module, shape: Shape) -> DPLipModel:
    return DPLipModel(
        gradient_gated(net, floor=0.3), input_shape=shape, input_norm=_root_of_entries(shape), loss=losses.Huber(1.0)
    )


def _normalised_gradients(net: nn.Module, shape: Shape, floor: float) -> DPLipModel:
    return DPLipModel(
        gradient_gated(net, floor=floor), input_shape=shape, input_norm=1.01, loss=losses.TauCrossEntropy(10.0)
    )


_MNIST = (
    "MNIST at ε = 3: on 10 000 held-out training images (benchmarks/accuracy.py --validate), never on the test set. "
    "Trained on MNIST itself, that search is not accounted."
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                name="mnist-gradient",
                summary="small grey images end to end: two convolutions and a dense layer behind gradient gates",
                network=scaled_convolutions,
                bound=lambda net, shape: _wrapped(gradient_gated(net, floor=0.3), shape),
                settings={"epochs": 20, "batch_size": 2048, "lr": 0.01, "optimizer": "adam"},
                provenance=_MNIST,
            ),
            Preset(
                name="mnist-gated",
                summary="small grey images end to end: two convolutions and a dense layer behind signal gates",
                network=small_convolutions,
                bound=lambda net, shape: _wrapped(gated(net, cotangent_norm=0.3), shape),
                settings={"epochs": 30, "batch_size": 4096, "lr": 0.02, "optimizer": "adam"},
                provenance=_MNIST,
            ),
            Preset(
                name="mnist-orthogonal",
                summary="small grey images: two orthogonal dense layers, no gates between them, certificates follow",
                network=pooled_dense,
                bound=lambda net, shape: _wrapped(net, shape, constraint=constraints.Orthogonal()),
                settings={"epochs": 30, "batch_size": 2048, "lr": 2.0},
                provenance=_MNIST,
            ),
            Preset(
                name="features-linear",
                summary="digits and the like: scattering features, less their mean (charged), and a gated linear layer",
                network=linear_from_zero,
                bound=partial(_normalised_gradients, floor=0.05),
                settings={"epochs": 40, "batch_size": 1024, "lr": 0.8},
                provenance=_MNIST,
                front=lambda shape: GroupedScattering((shape[1], shape[2]), 27 * shape[0]),
                statistics=_without_mean,
            ),
            Preset(
                name="photographs-linear",
                summary="photographs: scattering features of image and mirror image, less their mean (charged), and a "
                "gated linear layer",
                network=linear_from_zero,
                bound=partial(_normalised_gradients, floor=0.1),
                settings={"epochs": 30, "batch_size": 4096, "lr": 4.0},
                provenance="CIFAR-10 at ε = 3: on 10 000 held-out training images, never on the test set. Trained on "
                "CIFAR-10 itself, that search is not accounted.",
                front=_mirrored,
                statistics=_without_mean,
            ),
            Preset(
                name="photographs-gradient",
                summary="small photographs end to end, as lightness and colour differences: two convolutions and a "
                "dense layer behind gradient gates",
                network=pooled_convolutions,
                # Colour differences of contrast 3 lie within 4.
                bound=lambda net, shape: _wrapped(gradient_gated(net, floor=0.3), shape, largest_entry=4.0),
                settings={"epochs": 15, "batch_size": 2048, "lr": 0.01, "optimizer": "adam"},
                provenance="CIFAR-10 at ε = 8: on 5 000 held-out training images, never on the test set. Trained on "
                "CIFAR-10 itself, that search is not accounted.",
                front=lambda shape: OpponentColours(),
            ),
            Preset(
                name="transfer",
                summary="features of a frozen backbone of yours: directions, less their mean (charged), and a gated "
                "linear layer",
                network=linear_from_zero,
                bound=partial(_normalised_gradients, floor=0.1),
                settings={"epochs": 20, "sample_rate": 0.07, "lr": 0.6},
                provenance="Two backbones at ε = 1 and 3, on a fifth of the training data: of MNIST for the digits of "
                "scikit-learn, of five classes of CIFAR-10 for the other five.",
                statistics=_directions_without_mean,
            ),
            Preset(
                name="regression",
                summary="columns scaled to [-1, 1] and targets to about as much: two hidden layers, Huber's loss",
                network=two_hidden_layers,
                bound=_gradient_gated_regression,
                settings={"epochs": 30, "sample_rate": 0.05, "lr": 0.01, "optimizer": "adam"},
                provenance="Made-up data (examples/regression.py), 20 000 samples at ε = 1: free for any other.",
            ),
        )
    }
)
"""All presets, by name."""
