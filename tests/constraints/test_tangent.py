"""The tangent option of `Orthogonal`: which part of gradient and noise it keeps, and that it costs no privacy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, DPLipModel, ReproducibleNoise, losses
from clipless_dp.constraints import LipschitzPenalty, Orthogonal, OrthogonalConvolution, Spectral, orthogonal
from clipless_dp.noise import SystemNoise
from tests.soundness.attack import per_sample_gradients, wrap
from tests.soundness.mutation import Mutant, with_each
from tests.support import NoNoise

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "square": (lambda: nn.Linear(12, 12, bias=False), (12,)),
    "wide": (lambda: nn.Linear(15, 6, bias=False), (15,)),
    "tall": (lambda: nn.Linear(5, 14, bias=False), (5,)),
    "row": (lambda: nn.Linear(20, 1, bias=False), (20,)),
    "conv": (lambda: nn.Conv2d(2, 6, 3, padding=1, bias=False), (2, 5, 5)),
    "grouped conv": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), (4, 4, 4)),
    "channels-last conv": (
        lambda: nn.Conv2d(2, 6, 3, padding=1, bias=False).to(memory_format=torch.channels_last),
        (2, 5, 5),
    ),
}


def model_of(name: str, *, tangent: bool = True, limit: float = 1.0) -> DPLipModel:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    constraint = Orthogonal(limit=limit, tangent=tangent)
    net = nn.Sequential(build(), nn.Flatten())
    return DPLipModel(
        net, input_shape=shape, input_norm=1.0, loss=losses.MeanAbsoluteError(), constraint={"0": constraint}
    )


def optimizer_of(model: DPLipModel, noise: SystemNoise | ReproducibleNoise, *, lr: float = 1.0) -> CliplessDPSGD:
    return CliplessDPSGD(
        model,
        lr=lr,
        noise_multiplier=1.5,
        sample_rate=0.5,
        dataset_size=2,
        accountant="rdp",
        sampling="poisson",
        noise=noise,
    )


def frame_and(model: DPLipModel, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The weight with orthonormal rows, by polar decomposition in float64, and another tensor of its shape alike."""
    operator = model.operators("0.weight")[0]
    weight = operator.matrix(model.net.get_parameter("0.weight").detach().double())
    other = operator.matrix(tensor.double())
    if weight.shape[1] > weight.shape[2]:
        weight, other = weight.mT, other.mT
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return left @ right, other


def normal_part(model: DPLipModel, tensor: Tensor) -> float:
    """Size of what is orthogonal to the tangent space, relative to the whole."""
    frame, other = frame_and(model, tensor)
    inner = other @ frame.mT
    return float(torch.linalg.vector_norm(inner + inner.mT)) / 2.0 / float(torch.linalg.vector_norm(tensor.double()))


def applied_noise(model: DPLipModel, rounds: int) -> tuple[Tensor, CliplessDPSGD]:
    """Noise of steps on no data at all, in units of the planned deviation, at weights that do not move."""
    optimizer = optimizer_of(model, ReproducibleNoise(3), lr=0.0)
    drawn = []
    for _ in range(rounds):
        optimizer.zero_grad()
        optimizer.step()
        drawn.append(model.net.get_parameter("0.weight").grad.clone())  # type: ignore[union-attr]
    scale = optimizer.expected_batch_size / (1.5 * model.sensitivity().total)
    return torch.stack(drawn) * scale, optimizer


def kept_dimensions(model: DPLipModel) -> int:
    """Dimension of the tangent space: ``pn - p(p+1)/2`` for each group of ``p ≤ n`` rows and columns."""
    weight = model.net.get_parameter("0.weight")
    groups, rows, columns = model.operators("0.weight")[0].matrix(weight).shape
    fewer = min(rows, columns)
    return groups * (rows * columns - fewer * (fewer + 1) // 2)


def energy_is_that_of(noise: Tensor, dimensions: int) -> bool:
    """A sum of ``k`` squared standard normal numbers has deviation ``√(2k)``; five of them is 6 in 10⁷."""
    count = dimensions * len(noise)
    return abs(float(noise.double().square().sum()) - count) < 5.0 * math.sqrt(2 * count)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_noise_keeps_the_energy_of_the_tangent_space_and_nothing_normal_to_it(name: str, limit: float) -> None:
    model = model_of(name, limit=limit)
    noise, _ = applied_noise(model, 60)
    assert energy_is_that_of(noise, kept_dimensions(model))
    # float32 products of at most 20 terms, and singular values that are equal to 1e-6.
    assert max(normal_part(model, drawn) for drawn in noise) < 2e-6


def test_half_of_the_noise_of_a_square_weight_goes() -> None:
    model = model_of("square")
    noise, _ = applied_noise(model, 60)
    whole, _ = applied_noise(model_of("square", tangent=False), 60)
    assert energy_is_that_of(whole, 144)
    # 66 of 144 dimensions are left: (n-1)/2n, within five deviations of the quotient.
    assert float(noise.square().sum() / whole.square().sum()) == pytest.approx(66 / 144, abs=0.03)


def test_the_ledger_and_the_deviations_stay_as_they_are_without_it() -> None:
    plain, tangent = (applied_noise(model_of("square", tangent=tangent), 3) for tangent in (False, True))
    assert plain[1].accountant.history == tangent[1].accountant.history == [(1.5, 0.5, 3)]
    # The same draws, projected: what is added to the tangent directions is as large as planned.
    model = model_of("square")
    frame, drawn = frame_and(model, plain[0][0])
    inner = drawn @ frame.mT
    expected = drawn - 0.5 * (inner + inner.mT) @ frame
    assert torch.allclose(tangent[0][0].double(), expected[0], atol=1e-5)  # float32 products of 12 terms


def summed(model: DPLipModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(3, *model.input_shape, generator=generator)
    model.loss(model(inputs), torch.randn(3, *model.output_shape, generator=generator)).backward()
    return model.net.get_parameter("0.weight").grad.detach().clone()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LAYERS)
def test_without_noise_a_step_is_the_projected_sum(name: str) -> None:
    model = model_of(name)
    optimizer = optimizer_of(model, NoNoise(), lr=0.0)
    before = summed(model)
    optimizer.step()
    after = model.net.get_parameter("0.weight").grad
    assert after is not None
    frame, whole = frame_and(model, before)
    inner = whole @ frame.mT
    expected = whole - 0.5 * (inner + inner.mT) @ frame
    assert torch.allclose(frame_and(model, after)[1], expected, atol=1e-6)  # float32 products of at most 20 terms
    assert float(torch.linalg.vector_norm(after)) <= float(torch.linalg.vector_norm(before)) * (1.0 + 1e-6)


def test_by_default_the_gradient_is_left_alone() -> None:
    model = model_of("square", tangent=False)
    optimizer = optimizer_of(model, NoNoise(), lr=0.0)
    before = summed(model)
    optimizer.step()
    assert torch.equal(model.net.get_parameter("0.weight").grad, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["square", "wide", "tall"])
def test_the_projection_after_the_step_undoes_the_dropped_part_to_first_order(name: str) -> None:
    build, shape = LAYERS[name]
    gaps = []
    for size in (1e-2, 1e-3):
        results = []
        for tangent in (False, True):
            torch.manual_seed(0)
            layer = build().double()
            model = wrap(layer, shape, constraint=Orthogonal(iterations=8, tangent=tangent))
            weight = model.net.get_parameter("weight")
            weight.grad = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            model.project_gradients_()
            with torch.no_grad():
                weight.sub_(size * weight.grad)
            model.project_()
            results.append(weight.detach().clone())
        gaps.append(float(torch.linalg.vector_norm(results[0] - results[1])))
    # A tenth of the step leaves a hundredth of the difference (of first order: a tenth); rounding of certificates,
    # and what the iteration leaves, of second order too, add to it.
    assert gaps[1] < gaps[0] / 20.0


@pytest.mark.parametrize("tangent", [True, False])
def test_a_zero_weight_or_a_frozen_one_is_no_trouble(tangent: bool) -> None:
    model = model_of("square", tangent=tangent)
    weight = model.net.get_parameter("0.weight")
    with torch.no_grad():
        weight.zero_()
    weight.grad = torch.ones_like(weight)
    model.project_gradients_()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    weight.requires_grad_(False)
    model.project_gradients_()


def adversary(model: DPLipModel) -> float:
    """Largest projected per-sample gradient over its bound: random, tangent and normal directions, then ascent."""
    bound = model.sensitivity().per_parameter["0.weight"]
    operators = model.operators("0.weight")
    weight = model.net.get_parameter("0.weight")
    constraint = model.constraints["0.weight"]
    generator = torch.Generator().manual_seed(4)
    worst = 0.0
    for attempt in range(20):
        sample = torch.randn(model.input_shape, generator=generator, dtype=torch.float64)
        target = torch.randn(model.output_shape, generator=generator, dtype=torch.float64)
        if attempt % 2:
            # The cotangent that is the output itself: wholly normal to the tangent space.
            target = model.net(sample[None])[0].detach()
        for _ in range(6):
            gradient = per_sample_gradients(model, sample, target)["0.weight"].detach()
            constraint.project_gradient_(gradient, weight.detach(), operators)
            worst = max(worst, float(torch.linalg.vector_norm(gradient)) / bound)
            # Power method on the bilinear map of input and cotangent: the projected gradient as cotangent of both.
            sample.requires_grad_(True)
            product = torch.func.functional_call(model.net, {"0.weight": gradient}, (sample[None],))[0]
            (slope,) = torch.autograd.grad((product * target).sum(), sample)
            target, sample = product.detach(), slope.detach()
            if not float(torch.linalg.vector_norm(sample)) > 0.0 or not float(torch.linalg.vector_norm(target)) > 0.0:
                break
    return worst


def attacked(name: str, limit: float) -> DPLipModel:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    net = nn.Sequential(build(), nn.Flatten()).double()
    return wrap(net, shape, constraint={"0": Orthogonal(iterations=8, limit=limit, tangent=True)})


@pytest.mark.parametrize("name", ["square", "wide", "tall", "conv"])
@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_no_projected_gradient_of_a_sample_exceeds_its_bound(name: str, limit: float) -> None:
    # Rounding of float64 products of at most 20 terms.
    assert adversary(attacked(name, limit)) <= 1.0 + 1e-12


NOT_NORMALISED = Mutant(
    "projector not normalised", Orthogonal, "project_gradient_", "frame / typical_size(frame)", "frame"
)
TWICE = Mutant("the normal part subtracted twice", orthogonal, "tangent_step", "0.5 * (inner", "1.0 * (inner")
HALF = Mutant("half of the normal part left", orthogonal, "tangent_step", "0.5 * (inner", "0.25 * (inner")
ONE_SIDED = Mutant("one of the two terms forgotten", orthogonal, "tangent_step", "(inner + inner.mH)", "(2.0 * inner)")


@with_each(NOT_NORMALISED, TWICE, HALF, ONE_SIDED)
def test_the_noises_energy_catches(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    model = model_of("square", limit=2.0)
    assert not energy_is_that_of(applied_noise(model, 60)[0], kept_dimensions(model))


def test_the_adversary_catches_a_projector_that_is_not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attacked("square", 3.0)
    NOT_NORMALISED.apply(monkeypatch)
    assert adversary(model) > 1.1


class _Own(Orthogonal):
    """Sees gradients though it asks for no tangent space."""

    def project_gradient_(self, gradient: Tensor, weight: Tensor, operators: Any) -> None:
        gradient.zero_()


@pytest.mark.parametrize("name", ["square", "conv"])
@pytest.mark.parametrize("constraint", [Orthogonal(), OrthogonalConvolution()])
def test_a_constraint_that_leaves_gradients_alone_says_so(constraint: Orthogonal, name: str) -> None:
    assert not constraint.changes_gradients()
    build, shape = LAYERS[name]
    model = wrap(nn.Sequential(build()), shape, constraint=constraint)
    weight = model.net.get_parameter("0.weight")
    gradient = torch.randn_like(weight)
    before = gradient.clone()
    constraint.project_gradient_(gradient, weight, model.operators("0.weight"))
    assert torch.equal(gradient, before)
    assert type(constraint)(tangent=True).changes_gradients()
    assert LipschitzPenalty(0.1).changes_gradients()
    assert not Spectral().changes_gradients()


def test_a_constraint_of_a_users_own_meets_gradients_whatever_it_inherits() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4, bias=False)), (4,), constraint=_Own())
    weight = model.net.get_parameter("0.weight")
    weight.grad = torch.ones_like(weight)
    model.project_gradients_()
    assert not bool(weight.grad.any())
