"""What a preset is, and what its training returns."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accounting import create_accountant
from accounting.errors import warn_caller
from clipless_dp.architectures.small import Shape
from clipless_dp.arguments import positive, share
from clipless_dp.checkpoint import load_checkpoint, save_checkpoint
from clipless_dp.errors import CheckpointError, CliplessError, ConfigurationError
from clipless_dp.features import FrozenFeatures
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.modules import state_of
from clipless_dp.prediction import Predictor, Predicts, Probe, Whole, content_of
from clipless_dp.sampling import Samples, as_tensors
from clipless_dp.sampling.people import ROWS_PER_GROUP, column_of, people_of
from clipless_dp.sampling.samples import count as samples_in
from clipless_dp.sampling.samples import public_size
from clipless_dp.statistics import Releases
from clipless_dp.training import Data, FitResult, evaluate, fit
from clipless_dp.training.groups import require_known
from clipless_dp.training.result import PROBES, bounded, predictor_of

FRONT = "front."
"""What tensors of a front-end are called by in a file, before their own names."""


@dataclass(frozen=True, repr=False)
class Trained(Predicts):
    """What :meth:`Preset.fit` returns.

    Attributes:
        model: the trained model, behind the front-end.
        result: of :func:`clipless_dp.fit`; its ledger holds the statistics too.
        prepare: front-end and statistics: maps samples ``(B, ...)`` to what the model takes.
        preset: that it was trained by.
        shape: of a sample as it is.
        change: what the statistics do to samples behind the front-end; ``None``: nothing.
        front: the front-end, where its preset has a recipe.
    """

    model: DPLipModel
    result: FitResult
    prepare: Callable[[Tensor], Tensor]
    preset: Preset
    shape: Shape
    change: Callable[[Tensor], Tensor] | None = None
    front: nn.Module | None = None

    def __str__(self) -> str:
        return f"{self.preset.name}: {self.result}"

    def predictor(self, *, classes: Sequence[Any] | None = None, threshold: float | None = None) -> Predictor:
        """See :meth:`clipless_dp.prediction.Predicts.predictor`."""
        return predictor_of(self.result, self._whole(), classes=classes, threshold=threshold)

    def _whole(self) -> Whole:
        return Whole(self.prepare, self.model, self.preset.before(self.shape, self.change, self.front))

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
        if self.front is not None:
            # It takes long to make, and would be made anew where it is loaded.
            state |= {f"{FRONT}{name}": value for name, value in self.front.state_dict().items()}
        settings = {
            "preset": self.preset.name,
            "shape": list(self.shape),
            "behind": list(self.model.input_shape),
            "outputs": math.prod(self.model.output_shape),
            "input_norm": bounded(self.model.input_norm),
            "directions": None if change is None else change.directions,
            "recipe": self.preset.recipe,
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
        some = directions_of(some) if self.directions else some
        differences = some - self.mean.to(some.device, some.dtype)
        return differences.div_(differences.norm(dim=1, keepdim=True).clamp(min=1e-6))


def directions_of(some: Tensor) -> Tensor:
    """Samples of any size and shape as vectors of unit norm."""
    return nn.functional.normalize(some.flatten(1))


@dataclass(frozen=True)
class Preset:
    """A named way to train.

    Attributes:
        name: what :func:`get` knows it by.
        summary: what it is for, in a sentence.
        network: makes the network from the shape of a sample, behind the front-end, and the number of outputs.
        bound: wraps it for samples of that shape, by gates or constraints, with a loss.
        settings: keyword arguments of :func:`clipless_dp.fit`; ``sample_rate`` may stand for ``batch_size``, and ``lr``
            may be a mapping from ε to the rate there: see :func:`rate_at`.
        provenance: on which data these were chosen, and how.
        front: makes the front-end from the shape of a sample: a module that no private data entered, run once on each
            sample by itself (:class:`clipless_dp.features.FrozenFeatures`). ``None``: the model takes samples as they
            are.
        statistics: releases statistics of the training data behind the front-end, charged to the accountant that it is
            given, and returns what they do to samples: standardise them, say. ``None``: nothing.
        recipe: version of what the front-end is made by, if that takes long: files keep it with what was made, and
            another version refuses them. ``front(shape, state)`` then takes the ``state_dict()`` of an earlier one.
    """

    name: str
    summary: str
    network: Callable[[Shape, int], nn.Module]
    bound: Callable[[nn.Module, Shape], DPLipModel]
    settings: Mapping[str, Any]
    provenance: str
    front: Callable[..., nn.Module] | None = None
    statistics: Callable[[Tensor, Releases], Callable[[Tensor], Tensor]] | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        settings = {
            name: MappingProxyType(dict(value)) if isinstance(value, Mapping) else value
            for name, value in self.settings.items()
        }
        object.__setattr__(self, "settings", MappingProxyType(settings))

    def model(self, shape: Shape, outputs: int) -> DPLipModel:
        """The wrapped model, its weights drawn anew.

        Args:
            shape: of a sample behind the front-end.
            outputs: classes, or numbers to predict.

        Raises:
            ConfigurationError: the network does not take this shape.
        """
        with self._taking(shape):
            return self.bound(self.network(shape, outputs), shape)

    @contextmanager
    def _taking(self, shape: Shape) -> Iterator[None]:
        """What fails within for a reason that is not ours does not take samples of this shape."""
        try:
            yield
        except CliplessError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigurationError(f"preset {self.name!r} takes no samples of shape {shape}: {error}") from error

    def front_of(
        self,
        shape: Shape,
        *,
        state: Mapping[str, Tensor] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> nn.Module:
        """The front-end for samples of a shape.

        Args:
            shape: of a sample.
            state: of one that was made before, where there is a ``recipe``.
            cache_dir: folder that keeps what takes long to make, where there is a ``recipe``; no data is in that.

        Raises:
            ConfigurationError: there is none, or it does not take this shape.
            CheckpointError: the state does not fit.
        """
        if self.front is None:
            raise ConfigurationError(f"preset {self.name!r} has no front-end")
        with self._taking(shape):
            if self.recipe is None:
                return self.front(shape)
            if state is not None or cache_dir is None:
                return self.front(shape, state)
            told = hashlib.sha256(repr((self.name, self.recipe, shape)).encode()).hexdigest()
            path = Path(cache_dir) / f"front-{told[:32]}.pt"
            try:
                return self.front(shape, load_checkpoint(path)["front"])
            except FileNotFoundError:
                pass
            except (CheckpointError, KeyError, AttributeError):
                warn_caller(f"{path} is damaged; the front-end is made again", UserWarning)
            made = self.front(shape, None)
            save_checkpoint(path, {"front": dict(made.state_dict())})
            return made

    def features(
        self,
        inputs: Tensor,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        front: nn.Module | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples ``(B, ...)`` behind the front-end, from ``cache_dir`` if they are there.

        Args:
            inputs: as they are.
            cache_dir: folder for features; it then holds private data.
            front: of :meth:`front_of`, if it was made already.
            progress: whether bars are shown at a terminal.

        Raises:
            ConfigurationError: the front-end does not take this shape.
        """
        if self.front is None:
            return inputs
        module = self.front_of(tuple(inputs.shape[1:]), cache_dir=cache_dir) if front is None else front
        return FrozenFeatures(module, cache_dir=cache_dir, batch_size=64, progress=progress).compute(inputs)

    def before(
        self, shape: Shape, change: Callable[[Tensor], Tensor] | None, front: nn.Module | None = None
    ) -> nn.Module | None:
        """Front-end, made for this or ``front``, and statistics as one module.

        ``None`` where there are none, or the latter are no module.
        """
        if front is None and self.front is not None:
            front = self.front_of(shape)
        parts = [part for part in (front, change) if part is not None]
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
        if isinstance(asked.get("lr"), Mapping):
            asked["lr"] = rate_at(asked["lr"], epsilon)
        require_known(asked)
        dataset, groups = column_of(dataset, changes.get("groups"))
        people = people_of(groups, samples_in(dataset), asked.get("rows_per_group", ROWS_PER_GROUP))
        inputs, targets = Samples.to_train_on(dataset, people=people).all()
        size = public_size(changes.get("dataset_size"), len(inputs), people)
        if people is not None:
            changes["groups"] = groups
        shape = tuple(inputs.shape[1:])
        front = None if self.recipe is None else self.front_of(shape, cache_dir=cache_dir)
        progress = bool(changes.get("progress", True))
        features = self.features(inputs, cache_dir=cache_dir, front=front, progress=progress)
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
            behind = self.features(samples, cache_dir=cache_dir, front=front)
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
            delta=delta,
            validation=held_out,
            **self.arguments(size, **{**changes, "epsilon": epsilon}),
        )
        if isinstance(change, nn.Module):
            lineage.of(model).goes_with(change)
        return Trained(model, result, prepare, self, shape, change, front)

    def arguments(self, dataset_size: int, /, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of :func:`clipless_dp.fit` for so many samples.

        Args:
            dataset_size: public number of samples, to which a sample rate refers.
            changes: take the place of the preset's; ``epsilon`` is needed where the learning rate depends on it.

        Raises:
            ConfigurationError: it is needed and missing, or not positive.
        """
        arguments = {**self.settings, **changes}
        if isinstance(arguments.get("lr"), Mapping):
            if "epsilon" not in changes:
                raise ConfigurationError(
                    f"the learning rate of preset {self.name!r} depends on ε: give arguments(..., epsilon=…), or lr"
                )
            arguments["lr"] = rate_at(arguments["lr"], changes["epsilon"])
        rate = arguments.pop("sample_rate", None)
        if "batch_size" not in arguments and rate is not None:
            arguments["batch_size"] = max(1, round(rate * dataset_size))
        return arguments


def rate_at(rates: Mapping[float, float], epsilon: float) -> float:
    """The learning rate at an ε, from those at some: straight lines between their logarithms, constant beyond.

    Args:
        rates: from ε, at least one, to the rate there; all positive.
        epsilon: where it is asked for.

    Raises:
        ConfigurationError: ``epsilon`` is not a finite positive number.
    """
    epsilon = positive("epsilon", epsilon)
    if epsilon in rates:
        # As it is, to the last bit: figures of a rate stay those of that rate.
        return rates[epsilon]
    known = sorted(rates)
    logarithms = [math.log(rates[there]) for there in known]
    return math.exp(float(np.interp(math.log(epsilon), [math.log(there) for there in known], logarithms)))
