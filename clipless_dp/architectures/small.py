"""Networks of few layers, made from the shape of a sample and the number of outputs: what presets and ``train`` use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipless_dp import layers

Shape = tuple[int, ...]
"""Of one sample, without the batch axis."""


def _width(features: nn.Sequential, shape: Shape) -> int:
    with torch.no_grad():
        output: Tensor = features(torch.zeros(1, *shape))
    return output.numel()


def _standardised(*modules: nn.Module) -> tuple[nn.Module, ...]:
    """Modules behind what takes each sample's mean and norm away."""
    return layers.LayerCentering(), layers.SphereScaling(), *modules


def scaled_convolutions(shape: Shape, outputs: int) -> nn.Sequential:
    """Two convolutions, each on samples of no mean and one norm, and a linear layer."""
    features = nn.Sequential(
        *_standardised(nn.Conv2d(shape[0], 16, 8, stride=2, padding=3, bias=False), nn.ReLU()),
        *_standardised(nn.Conv2d(16, 32, 4, stride=2, bias=False), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()),
        *_standardised(),
    )
    return nn.Sequential(*features, nn.Linear(_width(features, shape), outputs))


def pooled_convolutions(shape: Shape, outputs: int) -> nn.Sequential:
    """Two wider convolutions with a max pooling behind each, on samples of no mean and one norm, and a linear layer."""
    first = nn.Conv2d(shape[0], 32, 6, stride=2, padding=2, bias=False)
    second = nn.Conv2d(32, 64, 4, stride=2, padding=1, bias=False)
    features = nn.Sequential(
        *_standardised(first, nn.ReLU(), nn.MaxPool2d(2, 1)),
        *_standardised(second, nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()),
        *_standardised(),
    )
    return nn.Sequential(*features, nn.Linear(_width(features, shape), outputs))


def small_convolutions(shape: Shape, outputs: int) -> nn.Sequential:
    """Small coverage and few weights: Δ√p, summed over layers, is what the noise of signal gates costs.

    Centering takes away what all samples share, so that more of each layer's unit norm tells them apart.
    """
    features = nn.Sequential(
        layers.LayerCentering(),
        nn.Conv2d(shape[0], 16, 6, stride=2, padding=2, bias=False),
        nn.ReLU(),
        layers.LayerCentering(),
        nn.Conv2d(16, 64, 2, stride=2, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        layers.LayerCentering(),
    )
    return nn.Sequential(*features, nn.Linear(_width(features, shape), outputs))


def pooled_dense(shape: Shape, outputs: int) -> nn.Sequential:
    """Averages over squares of four pixels, one hidden layer, and a gate that caps the loss's gradient."""
    features = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), layers.LayerCentering(), layers.SphereScaling(4.0))
    # The loss's gradient, at most √2, is far smaller for most samples: capped at 0.1, it takes a 14th of the noise.
    return nn.Sequential(
        *features,
        nn.Linear(_width(features, shape), 64, bias=False),
        layers.GroupSort(2),
        nn.Linear(64, outputs, bias=False),
        layers.CotangentGate(0.1),
    )


def linear_from_zero(shape: Shape, outputs: int) -> nn.Sequential:
    """A linear layer whose weights start at zero."""
    linear = nn.Linear(math.prod(shape), outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(nn.Flatten(), linear)


def image_classifier(shape: Shape, classes: int) -> nn.Sequential:
    """Two convolutions and two dense layers, for images of 8×8 to 64×64.

    No layer has a bias on a map: its sensitivity grows with the root of the number of positions.
    """
    channels, height, width = shape
    kernel = 8 if min(height, width) >= 16 else 3
    features = nn.Sequential(
        nn.Conv2d(channels, 16, kernel, stride=2, padding=kernel // 2 - (kernel % 2 == 0), bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4 if kernel == 8 else 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
    )
    return nn.Sequential(
        *features, nn.Linear(_width(features, shape), 32, bias=False), nn.ReLU(), nn.Linear(32, classes, bias=False)
    )


def two_hidden_layers(shape: Shape, outputs: int) -> nn.Sequential:
    """Two hidden layers of 64, sorted in pairs, for rows of a table or vectors of features."""
    return nn.Sequential(
        nn.Linear(math.prod(shape), 64),
        layers.GroupSort(2),
        nn.Linear(64, 64),
        layers.GroupSort(2),
        nn.Linear(64, outputs),
    )
