"""Models and batches in channels-last order: the same numbers as in torch's usual order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import constraints, layers, losses
from clipless_dp.gates import BallProjection, CotangentGate, SphereScaling, input_gate, sample_norms
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.model import DPLipModel
from clipless_dp.noise import ReproducibleNoise
from clipless_dp.optim import CliplessDPSGD
from clipless_dp.sampling import PoissonBatches, ShiftAndFlip
from clipless_dp.training import fit
from tests.support import SETTINGS

LAST = torch.channels_last
RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}
PARTS: dict[str, Callable[[], nn.Module]] = {
    "ball": lambda: BallProjection(2.0),
    "sphere": lambda: SphereScaling(2.0),
    "cotangents clipped": lambda: CotangentGate(0.5),
    "cotangents normalised": lambda: CotangentGate(0.5, mode="normalize"),
    "convolution, gated": lambda: gated(nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())),
    "convolution, gradient gate": lambda: gradient_gated(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2))),
    "transposed, gated": lambda: gated(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2))),
    "group sort": lambda: layers.GroupSort(2),
    "full sort": layers.FullSort,
    "Householder": lambda: layers.Householder(4),
    "Householder of halves, order 2": lambda: layers.Householder(4, order=2, pairing="halves"),
    "MaxMin of halves": lambda: layers.MaxMin(pairing="halves"),
    "absolute value": layers.AbsoluteValue,
    "centering": layers.LayerCentering,
    "group norm": lambda: layers.SampleGroupNorm(2, floor=0.1),
    "L2-norm pooling": lambda: layers.L2NormPool2d(2),
    "scaled pooling": lambda: layers.ScaledAvgPool2d(2),
    "convex potential": lambda: layers.ConvexPotentialConv2d(4),
    "shuffle": lambda: nn.PixelUnshuffle(2),
    "spline": lambda: layers.LinearSpline(4),
}
ROUTES: dict[str, tuple[Callable[[nn.Module], nn.Module], constraints.Constraint | None]] = {
    "gates": (gated, None),
    "normalising gates": (partial(gated, cotangent_mode="normalize"), None),
    "gradient gates": (gradient_gated, None),
    "spectral": (lambda net: net, constraints.Spectral()),
    "orthogonal": (lambda net: net, constraints.Orthogonal()),
    "tangent": (lambda net: net, constraints.Orthogonal(tangent=True)),
    "Frobenius": (lambda net: net, constraints.Frobenius()),
}


def passed(part: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    """Output, the cotangent of the input, and the gradients of the parameters."""
    inputs = inputs.detach().requires_grad_()
    output = part(inputs)
    weight = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weight).sum().backward()
    assert inputs.grad is not None
    return output.detach(), inputs.grad, *(parameter.grad for parameter in part.parameters())


@pytest.mark.parametrize("name", PARTS)
def test_gates_and_layers_compute_the_same(name) -> None:
    torch.manual_seed(0)
    inputs = 3.0 * torch.randn(5, 4, 6, 6, dtype=torch.float64)
    part = PARTS[name]().double()
    expected = passed(part, inputs)
    part.zero_grad()
    part.to(memory_format=LAST)
    for found, usual in zip(passed(part, inputs.to(memory_format=LAST)), expected, strict=True):
        # Float64 sums in another order.
        torch.testing.assert_close(found, usual, rtol=1e-12, atol=1e-13)


def test_norms_and_the_input_gate_are_those_of_each_sample() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(7, 3, 5, 4, dtype=torch.float64)
    inputs[2, 1, 3, 2] = float("nan")
    turned = inputs.to(memory_format=LAST)
    assert not turned.is_contiguous()
    torch.testing.assert_close(sample_norms(turned), sample_norms(inputs), rtol=1e-14, atol=0, equal_nan=True)
    for found, usual in zip(input_gate(turned, 2.0), input_gate(inputs, 2.0), strict=True):
        torch.testing.assert_close(found, usual, rtol=1e-14, atol=0)


def model_of(route: str, dtype: torch.dtype) -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, groups=2),
        layers.GroupSort(2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).to(dtype)
    gate, constraint = ROUTES[route]
    loss = losses.TauCrossEntropy(4.0)
    return DPLipModel(gate(net), input_shape=(3, 16, 16), input_norm=20.0, loss=loss, constraint=constraint)


def images(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(100, 3, 16, 16, generator=generator).to(dtype), torch.arange(100) % 5


@pytest.mark.parametrize("route", ROUTES)
def test_steps_bounds_and_certificates_are_the_same(route) -> None:
    found = []
    for order in (torch.contiguous_format, LAST):
        model = model_of(route, torch.float64).to(memory_format=order)
        told = {**SETTINGS, "sample_rate": 0.3, "dataset_size": 100}
        optimizer = CliplessDPSGD(model, lr=0.5, momentum=0.9, noise=ReproducibleNoise(3), **told)
        totals = []
        for batch in PoissonBatches(images(torch.float64), sample_rate=0.3, steps=3, seed=4):
            optimizer.zero_grad()
            turned = batch._replace(inputs=batch.inputs.to(memory_format=order))
            optimizer.accumulate(turned, augment=ShiftAndFlip(0, flip=False), micro_batch_size=24)
            optimizer.step()
            totals.append(model.sensitivity().total)
        kept = [p.is_contiguous(memory_format=order) for p in model.parameters() if p.dim() == 4]
        assert all(kept), "the order of the weights survives noise, update and projection"
        found.append((torch.cat([parameter.detach().flatten() for parameter in model.net.parameters()]), totals))
    (usual, bounds), (last, its_bounds) = found
    # Three steps of float64 sums in another order, iterations of projections included.
    torch.testing.assert_close(last, usual, rtol=1e-9, atol=1e-11)
    assert its_bounds == pytest.approx(bounds, rel=1e-9)


@pytest.mark.parametrize("route", ["gates", "gradient gates", "spectral"])
def test_fit_trains_a_model_in_this_order_and_spends_the_same(route) -> None:
    results, trained = [], []
    for order in (torch.contiguous_format, LAST):
        model = model_of(route, torch.float32).to(memory_format=order)
        results.append(fit(model, images(torch.float32), reproducible_seed=2, **RUN))
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.net.parameters()]))
    assert results[0].optimizer.accountant.history == results[1].optimizer.accountant.history
    # Four steps of float32 sums in another order.
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)
