"""Convolutions over volumes: never below the truth, which is the matrix written out, and near it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import (
    ConfigurationError,
    DPLipModel,
    NormError,
    UnsupportedModuleError,
    constraints,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp.norms import conv3d_norm, volumes
from clipless_dp.testing import LipschitzLayerTestCase

AXIS = st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))


def truth(weight: Tensor, size: tuple[int, ...], **geometry: Any) -> float:
    channels = weight.shape[1] * geometry.get("groups", 1)
    basis = torch.eye(channels * size[0] * size[1] * size[2], dtype=torch.float64).reshape(-1, channels, *size)
    return float(torch.linalg.matrix_norm(functional.conv3d(basis, weight.double(), **geometry).flatten(1), 2))


@settings(max_examples=60, deadline=None)
@given(
    axes=st.tuples(AXIS, AXIS, AXIS), channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2), exponent=st.integers(-150, 150), seed=st.integers(0, 99), written=st.booleans(),
)  # fmt: skip
def test_the_bound_is_never_below_the_norm_of_the_matrix(
    axes: Any, channels: tuple[int, int], groups: int, exponent: int, seed: int, written: bool
) -> None:
    size, taps, stride, padding, dilation = (tuple(one) for one in zip(*axes, strict=True))
    if any(s + 2 * p < d * (k - 1) + 1 for s, k, _, p, d in axes):
        return
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels[0] * groups, channels[1], *taps, generator=generator, dtype=torch.float64)
    known = truth(weight, size, **geometry)
    weight = weight * 2.0**exponent
    with pytest.MonkeyPatch.context() as patch:
        if not written:
            patch.setattr(volumes, "_WRITTEN_OUT", 0)
        bound = conv3d_norm(weight, input_size=size, **geometry) / 2.0**exponent
    assert known * (1.0 - 1e-12) <= bound <= (1.002 if written else 3.0) * known + 1e-9


@pytest.mark.parametrize(("depth", "excess"), [(6, 1.2), (40, 1.06), (200, 1.01)])
def test_the_longer_a_volume_the_nearer_the_bound(depth: int, excess: float) -> None:
    # Of one place on each map the convolution is one of signals, whose norm is known otherwise.
    weight = torch.randn(4, 3, 5, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = truth(weight, (depth, 1, 1), padding=(2, 0, 0))
    bound = conv3d_norm(weight.expand(4, 3, 5, 1, 1), input_size=(depth, 40, 40), padding=(2, 0, 0))
    assert known <= bound <= excess * known


def test_frequencies_that_are_left_out_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its largest symbol lies between two of the places, at an angle of π/8.
    taps = torch.arange(8, dtype=torch.float64)
    weight = torch.stack([torch.cos(torch.pi / 8 * taps), torch.sin(torch.pi / 8 * taps)])[:, None, :, None, None]
    monkeypatch.setattr(volumes, "_WRITTEN_OUT", 0)
    for most in (1, 8, 64):
        monkeypatch.setattr(volumes, "_FREQUENCIES", most)
        assert conv3d_norm(weight, input_size=(60, 1, 1), padding=(4, 0, 0)) >= truth(
            weight, (60, 1, 1), padding=(4, 0, 0)
        )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"padding_mode": "circular"}, "over volumes"),
        ({"groups": 2}, "does not divide"),
        ({"input_size": (2, 2, 2)}, "no window fits"),
        ({"weight": torch.full((3, 2, 3, 3, 3), torch.nan)}, "NaN"),
        ({"weight": torch.ones(3, 2, 3, 3)}, "5 dimensions"),
        ({"input_size": (4, 4)}, "input_size"),
    ],
)
def test_other_kernels_and_paddings_are_refused(given: dict[str, Any], words: str) -> None:
    asked = {"weight": torch.ones(3, 2, 3, 3, 3), "input_size": (4, 4, 4), **given}
    with pytest.raises(NormError, match=words):
        conv3d_norm(asked.pop("weight"), **asked)


def volume_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2),
        nn.Conv3d(4, 4, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2, padding_mode="replicate"),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2 * 2 * 4, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "constraint"),
    [
        (None, constraints.Spectral()), (None, constraints.AlmostOrthogonal()), (None, constraints.Orthogonal()),
        (None, constraints.Frobenius()), (gated, None), (gradient_gated, None),
    ],
    ids=["spectral", "almost orthogonal", "orthogonal", "Frobenius", "gates", "gradient gates"],
)  # fmt: skip
def test_gradients_of_single_volumes_are_within_their_bounds(gate: Any, constraint: Any) -> None:
    net = volume_net() if gate is None else gate(volume_net())
    model = DPLipModel(
        net, input_shape=(2, 4, 6, 8), input_norm=5.0, loss=losses.TauCrossEntropy(), constraint=constraint
    ).double()
    bounds, largest = model.sensitivity().per_parameter, 0.0
    for seed in range(8):
        rows = torch.randn(1, 2, 4, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows *= 5.0 / float(rows.norm())
        model.loss(model(rows), torch.tensor([seed % 3])).backward()
        for name, parameter in model.net.named_parameters():
            if parameter.grad is not None and bounds.get(name, 0.0) > 0.0:
                largest = max(largest, float(parameter.grad.norm()) / bounds[name])
        model.register.drop()
    assert 0.3 < largest <= 1.0 + 1e-9
    if constraint is not None:
        assert model.lipschitz_constant() <= 1.0


def test_what_is_orthogonalised_as_an_operator_and_what_wraps_around_is_refused_over_volumes() -> None:
    settings: dict[str, Any] = {"input_shape": (2, 4, 6, 8), "input_norm": 5.0, "loss": losses.TauCrossEntropy()}
    with pytest.raises(ConfigurationError, match="over volumes are not orthogonalised"):
        DPLipModel(volume_net(), constraint=constraints.OrthogonalConvolution(), **settings)
    net = volume_net()
    net[0] = nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular")
    with pytest.raises(UnsupportedModuleError, match="over volumes"):
        DPLipModel(net, constraint=constraints.Spectral(), **settings)


class TestConvolutionOverVolumes(LipschitzLayerTestCase):
    """The rule of ``nn.Conv3d``."""

    shapes = ((2, 3, 4, 5),)

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        """With everything that a convolution may have."""
        return nn.Conv3d(2, 4, (2, 3, 3), stride=(1, 2, 1), padding=1, dilation=(2, 1, 1), groups=2)
