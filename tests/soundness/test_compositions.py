"""Networks composed at random of supported parts: the total sensitivity against per-sample gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import DPLipModel, layers
from clipless_dp.gates import gradient_gated_layer
from tests.soundness.attack import Record, add_or_remove_one, wrap

Step = tuple[str, int, int]

SHAPES: dict[str, tuple[int, ...]] = {"vector": (4,), "tokens": (3, 4), "map": (4, 5, 5)}


def _channel_axis(family: str) -> int:
    return 1 if family == "map" else -1


def _mixer(family: str, channels: int, *, bias: bool = True) -> nn.Module:
    if family == "map":
        return nn.Conv2d(channels, 4, 3, padding=1, bias=bias)
    return nn.Linear(channels, 4, bias=bias)


UNARY: dict[str, Callable[[str], nn.Module]] = {
    "mix": lambda family: _mixer(family, 4),
    "mix without bias": lambda family: _mixer(family, 4, bias=False),
    "mix behind gradient gates": lambda family: gradient_gated_layer(
        _mixer(family, 4), 0.3, bias_limit=0.2, mode="clip"
    ),
    "relu": lambda family: nn.ReLU(),
    "tanh": lambda family: nn.Tanh(),
    "leaky": lambda family: nn.LeakyReLU(-1.5),
    "group sort": lambda family: layers.GroupSort(4, dim=_channel_axis(family)),
    "prelu": lambda family: nn.PReLU(),
    "spline": lambda family: layers.LinearSpline(4, 4, 2.0, dim=_channel_axis(family)),
    "full sort": lambda family: layers.FullSort(dim=_channel_axis(family)),
    "gated residual": lambda family: layers.GatedResidual(_mixer(family, 4)),
    "convex potential": lambda family: (
        layers.ConvexPotentialConv2d(4, hidden=2) if family == "map" else layers.ConvexPotential(4, 2)
    ),
    "householder": lambda family: layers.Householder(4, dim=_channel_axis(family)),
    "householder twice": lambda family: layers.Householder(4, _channel_axis(family), order=2, pairing="halves"),
    "absolute": lambda family: layers.AbsoluteValue(),
    "centering": lambda family: layers.LayerCentering(),
    "ball": lambda family: layers.BallProjection(0.7),
    "sphere": lambda family: layers.SphereScaling(1.3, floor=0.4),
    "clip": lambda family: layers.CotangentGate(0.6),
    "normalize": lambda family: layers.CotangentGate(0.4, mode="normalize", floor=0.2),
    "residual": lambda family: layers.Residual(nn.Sequential(_mixer(family, 4), nn.ReLU())),
    "convex": lambda family: layers.ConvexResidual(_mixer(family, 4), alpha=0.7),
}
POOLING: dict[str, Callable[[str], nn.Module]] = {
    "max": lambda family: nn.MaxPool2d(3, 1, 1),
    "average": lambda family: nn.AvgPool2d(3, 1, 1),
    "norm": lambda family: layers.L2NormPool2d(3, 1, 1),
    "scaled": lambda family: layers.ScaledAvgPool2d(3, 1, 1),
    "transposed": lambda family: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "circular": lambda family: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
}
BINARY = ("add", "subtract", "average of two", "concatenate", "shared")


class Composed(nn.Module):
    """Runs a list of steps, each on earlier values, and joins the last two."""

    def __init__(self, family: str, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.family = family
        self.steps = steps
        self.shared = _mixer(family, 4)
        kinds = {**UNARY, **POOLING, "concatenate": lambda kind: _mixer(kind, 8)}
        self.parts = nn.ModuleList([kinds.get(name, lambda kind: nn.Identity())(family) for name, _, _ in steps])

    def forward(self, values: Tensor) -> Tensor:
        known = [self.shared(values)]
        for (name, first, second), part in zip(self.steps, self.parts, strict=True):
            left, right = known[first % len(known)], known[second % len(known)]
            if name == "add":
                made = left + right
            elif name == "subtract":
                made = left - right
            elif name == "average of two":
                made = 0.5 * left + right / 2
            elif name == "concatenate":
                made = part(torch.cat([left, right], dim=_channel_axis(self.family)))
            elif name == "shared":
                made = self.shared(left)
            else:
                made = part(left)
            known.append(made)
        return torch.cat([known[-1].flatten(1), known[-2].flatten(1)], dim=1)


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, tuple[Step, ...], int]:
    family = draw(st.sampled_from(sorted(SHAPES)))
    names = sorted([*UNARY, *BINARY, *(POOLING if family == "map" else ())])
    step = st.tuples(st.sampled_from(names), st.integers(0, 7), st.integers(0, 7))
    return family, tuple(draw(st.lists(step, min_size=1, max_size=7))), draw(st.integers(0, 2**16))


def check(family: str, steps: tuple[Step, ...], seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Composed(family, steps).double()
        shape = SHAPES[family]
        inputs = torch.randn(5, *shape, dtype=torch.float64)
        model = wrap(net, shape, input_norm=1.5, cotangent_norm=0.8)
        targets = torch.randn(5, *model.output_shape, dtype=torch.float64)
        inputs[1], targets[1] = -1e6 * inputs[0], 1e6 * targets[0]
        inputs[2], targets[2] = 1.0, -1.0
        inputs[3] *= 1e-3
        record = Record(model)
        for sample, target in zip(inputs, targets, strict=True):
            record.try_(sample, target)
        add_or_remove_one(model, inputs, targets)
        check_lipschitz(model)


def check_lipschitz(model: DPLipModel) -> None:
    """No two points, near or far, move apart by more than the network's constant."""
    points = torch.randn(6, *model.input_shape, dtype=torch.float64)
    points[3:] = points[:3] + 1e-4 * points[3:]
    values = model(points).detach().flatten(1)
    constant = model.lipschitz_constant()
    for first, second in itertools.combinations(range(6), 2):
        moved, apart = (float((pair[first] - pair[second]).norm()) for pair in (values, points))
        # float64 differences of size 1e-4 between values of size 10³ at most.
        assert moved <= constant * apart + 1e-10


@given(networks())
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_random_composition_keeps_every_bound_and_its_total(network: tuple[str, tuple[Step, ...], int]) -> None:
    check(*network)


@pytest.mark.slow
@given(networks())
@settings(max_examples=600, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_many_random_compositions_keep_every_bound_and_their_totals(
    network: tuple[str, tuple[Step, ...], int],
) -> None:
    check(*network)
