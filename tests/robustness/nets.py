"""Networks and samples that the tests of robustness share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, constraints, gated, gradient_gated, layers, losses

Build = Callable[[], nn.Module]


def wrapped(
    net: nn.Module, shape: tuple[int, ...], *, input_norm: float = 3.0, constraint: constraints.ConstraintSpec = None
) -> DPLipModel:
    return DPLipModel(
        net, input_shape=shape, input_norm=input_norm, loss=losses.TauCrossEntropy(4.0), constraint=constraint
    )


def dense(*widths: int, outputs: int = 3) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [nn.Linear(before, after), layers.GroupSort(2)]
    return nn.Sequential(*parts, nn.Linear(widths[-1], outputs))


def seeded(build: Build, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def points(count: int, *shape: int, size: float = 1.0, seed: int = 0) -> Tensor:
    return size * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NETWORKS: dict[str, Callable[[], DPLipModel]] = {
    "orthogonal": lambda: wrapped(dense(5, 8, 6), (5,), constraint=constraints.Orthogonal()),
    "spectral, one output": lambda: wrapped(dense(5, 8, outputs=1), (5,), constraint=constraints.Spectral()),
    "wide": lambda: wrapped(dense(5, 256), (5,), constraint=constraints.Spectral()),
    "residual": lambda: wrapped(
        nn.Sequential(
            layers.Residual(nn.Sequential(nn.Linear(5, 5), nn.ReLU())), layers.ConvexPotential(5), nn.Linear(5, 4)
        ),
        (5,),
        constraint=constraints.Spectral(),
    ),
    "convolutions": lambda: wrapped(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), layers.MaxMin(), layers.ScaledAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        (1, 4, 4),
        constraint=constraints.Spectral(),
    ),
    "signal gates": lambda: wrapped(gated(dense(5, 8), cotangent_mode="normalize"), (5,)),
    "gradient gates": lambda: wrapped(gradient_gated(dense(5, 8)), (5,)),
    "loose weights, a small ball": lambda: wrapped(dense(5, 8), (5,), input_norm=0.5),
}
