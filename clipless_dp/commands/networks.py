"""Networks that commands build, from options or from what a result file says."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from clipless_dp import architectures, constraints, losses
from clipless_dp.architectures.small import image_classifier, two_hidden_layers
from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.model import DPLipModel

ROUTES = ("gradient_gated", "gated", "spectral", "orthogonal")
NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": architectures.mlp,
    "residual-mlp": architectures.residual_mlp,
    "lipvgg": architectures.lipvgg,
    "lipresnet": architectures.lipresnet,
    "mixer": architectures.mixer,
}

_GRADIENT_FLOOR = 0.3
"""Share of a gradient's bound from which gates normalise it, as presets of networks that are trained whole have it."""


def model_of(options: argparse.Namespace, shape: tuple[int, ...], classes: int) -> DPLipModel:
    """The network that options name, wrapped.

    Args:
        options: route, network, tau, input_norm.
        shape: of a sample.
        classes: how many.

    Raises:
        ConfigurationError: no network takes samples of this shape, or an option is out of range.
    """
    if len(shape) not in (1, 3):
        raise ConfigurationError(
            f"no network here takes samples of shape {shape}: give columns (N, columns), or images as uint8 (N, H, W) "
            "or (N, H, W, 3), or as numbers (N, channels, H, W)"
        )
    small = image_classifier if len(shape) == 3 else two_hidden_layers
    net: nn.Module = NETWORKS.get(options.network, small)(shape, classes)
    constraint: constraints.Constraint | None = None
    if options.route == "gradient_gated":
        net = gradient_gated(net, floor=_GRADIENT_FLOOR)
    elif options.route == "gated":
        net = gated(net, cotangent_mode="normalize")
    else:
        constraint = constraints.Spectral() if options.route == "spectral" else constraints.Orthogonal()
    return DPLipModel(
        net,
        input_shape=shape,
        input_norm=options.input_norm if options.input_norm is not None else math.sqrt(math.prod(shape)),
        loss=losses.TauCrossEntropy(options.tau),
        constraint=constraint,
    )


def built_from(options: argparse.Namespace, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """What :func:`rebuilt_model` needs, plain values for a file."""
    names = ("route", "network", "tau", "input_norm")
    return {**{name: getattr(options, name) for name in names}, "shape": list(shape), "outputs": classes}


def rebuilt_model(built: Mapping[str, Any], name: str) -> DPLipModel:
    """The network that a result file was trained with, its weights drawn anew.

    Args:
        built: of :func:`built_from`.
        name: of the file, for messages.

    Raises:
        CheckpointError: the file was altered, or is of another version.
    """
    try:
        route, network = str(built["route"]), str(built["network"])
        if route not in ROUTES or network not in ("small", *NETWORKS):
            raise ValueError(f"{route!r} and {network!r} are no route and network of this version")
        norm = None if built["input_norm"] is None else float(built["input_norm"])
        options = argparse.Namespace(route=route, network=network, tau=float(built["tau"]), input_norm=norm)
        return model_of(options, tuple(map(int, built["shape"])), int(built["outputs"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name} is incomplete or altered: {error!r}") from error
