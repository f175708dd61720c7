"""The presets by name: front-ends, networks, bounds and settings, with where these were chosen."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from types import MappingProxyType

from torch import Tensor, nn

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
from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.features import (
    GroupedScattering,
    JoinedFeatures,
    MirroredScattering,
    OpponentColours,
    PatchDictionary,
    SyntheticWhitening,
    patches,
    whitening,
)
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.prediction import ODD, Content, Predictor, Whole, rebuilt
from clipless_dp.presets.preset import FRONT, Preset, WithoutMean, directions_of
from clipless_dp.statistics import Releases, private_moments
from clipless_dp.training.result import require_same_norm


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
    return WithoutMean(_without_mean(directions_of(features), releases).mean, directions=True)


def _mirrored(shape: Shape) -> MirroredScattering:
    """With three scales if the places of these are whole, and the image has four of them across: they sum up more."""
    height, width = shape[1:]
    return MirroredScattering((height, width), 3 if width % 8 == 0 and min(height, width) >= 32 else 2)


_SYNTHETIC = 4000
"""Synthetic images that patches and whitening come from."""

_EXPONENT, _DIRECTIONS = 0.3, 1000
"""Of the whitening: what varies little is learned sooner than with its defaults, in as few steps."""


def _whitened(shape: Shape, state: Mapping[str, Tensor] | None = None) -> JoinedFeatures:
    """Scattering and patches, each whitened and of the same norm. It takes a minute or two to make, once a size.

    Args:
        shape: of a sample.
        state: of one that was made before.
    """
    if shape[0] not in (1, 3) or min(shape[1:]) < 8:
        raise ConfigurationError(
            f"preset 'photographs-linear' takes images of 1 or 3 channels and at least 8×8 pixels, got {shape}: use "
            "preset 'photographs-scattering'"
        )
    if state is not None:
        return _joined(shape, _SYNTHETIC, state)
    # Whoever changes one changes no other's.
    return copy.deepcopy(_made_once(shape, _SYNTHETIC))


@lru_cache(maxsize=2)
def _made_once(shape: Shape, images: int) -> JoinedFeatures:
    return _joined(shape, images, None)


def _joined(shape: Shape, images: int, state: Mapping[str, Tensor] | None) -> JoinedFeatures:
    def of(prefix: str) -> dict[str, Tensor] | None:
        if state is None:
            return None
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    channels, size = shape[0], (shape[1], shape[2])
    # Refuses sizes that it does not take before anything is drawn.
    scattering = _mirrored(shape)
    dictionary = PatchDictionary(size, channels, images=images, state=of("blocks.1.features."))
    blocks = [
        SyntheticWhitening(
            block,
            size,
            channels,
            exponent=_EXPONENT,
            directions=_DIRECTIONS,
            images=images,
            state=of(f"blocks.{index}."),
        )
        for index, block in enumerate((scattering, dictionary))
    ]
    return JoinedFeatures(blocks)


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

_CIFAR = (
    "CIFAR-10 at ε = 1, 3 and 8: on 10 000 held-out training images, never on the test set. Trained on CIFAR-10 "
    "itself, that search is not accounted."
)

_FORMER = {"photographs-linear": "photographs-scattering"}
"""What a preset was before it had a recipe."""

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
                summary="photographs: scattering features and a dictionary of patches, whitened by synthetic images, "
                "of image and mirror image, less their mean (charged), and a gated linear layer",
                network=linear_from_zero,
                bound=partial(_normalised_gradients, floor=0.1),
                settings={"epochs": 30, "sample_rate": 0.2, "lr": {1.0: 10.0, 3.0: 28.0, 8.0: 70.0}, "momentum": 0.0},
                provenance=_CIFAR,
                front=_whitened,
                statistics=_without_mean,
                recipe=f"{whitening.VERSION}, {patches.VERSION}, {_SYNTHETIC} images, "
                f"{_DIRECTIONS} directions to {_EXPONENT}",
            ),
            Preset(
                name="photographs-scattering",
                summary="photographs, in less time: scattering features of image and mirror image, less their mean "
                "(charged), and a gated linear layer",
                network=linear_from_zero,
                bound=partial(_normalised_gradients, floor=0.1),
                settings={"epochs": 30, "batch_size": 4096, "lr": {1.0: 1.0, 3.0: 4.0, 8.0: 8.0}},
                provenance=_CIFAR,
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
        shape = tuple(map(int, settings["shape"]))
        held = dict(content.state)
        front = {name.removeprefix(FRONT): held.pop(name) for name in list(held) if name.startswith(FRONT)}
        state = held
        change = None if directions is None else WithoutMean(state.pop("mean"), directions=bool(directions))
    except ODD as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error
    if preset is None and name not in PRESETS:
        raise CheckpointError(
            f"{content.name} was trained by preset {name!r}, which is none of this package: give preset="
        )
    known = PRESETS[name] if preset is None else preset
    if settings.get("recipe") != known.recipe:
        former = name in _FORMER and settings.get("recipe") is None
        other = f"give preset=presets.get({_FORMER[name]!r})" if former else "train anew, or load it with that version"
        raise CheckpointError(
            f"{content.name} was trained on features of the recipe {settings.get('recipe')!r}, and preset "
            f"{known.name!r} makes those of {known.recipe!r}: {other}"
        )

    try:
        module = None if known.recipe is None else known.front_of(shape, state=front)
        before = known.before(shape, change, module)
    except ODD as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error

    def prepare(samples: Tensor) -> Tensor:
        features = known.features(samples, front=module)
        return features if change is None else change(features)

    model = known.model(behind, outputs)
    state = {key.removeprefix("model."): value for key, value in state.items()}
    if "input_norm" in settings:
        require_same_norm(content, model)
    whole = Whole(prepare, model, before)
    found = rebuilt(replace(content, state=state), whole, model.net, dtype=model.device_and_dtype()[1])
    if change is not None:
        lineage.of(whole).goes_with(change)
    return found
