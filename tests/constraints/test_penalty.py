"""`LipschitzPenalty`: its gradient is that of the norms, comes after the noise, and changes no bound and no ledger."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, ConfigurationError, DPLipModel, ReproducibleNoise, constraints, layers, losses
from clipless_dp.constraints import LipschitzPenalty
from clipless_dp.optim.optimizer import CliplessDPOptimizer
from tests.support import SETTINGS

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(7, 5), (7,)),
    "kernel": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 9, 9)),
    "strided kernel in groups": (lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), (4, 9, 9)),
    "transposed signal": (lambda: nn.ConvTranspose1d(3, 2, 4, stride=2), (3, 9)),
    "circulant": (lambda: layers.StructuredLinear(6, 6), (6,)),
    "skew": (lambda: layers.StructuredLinear(6, 4, "skew"), (6,)),
    "blocks": (lambda: layers.StructuredLinear(6, 9, "block-circulant", 3), (6,)),
    "hankel": (lambda: layers.StructuredLinear(6, 4, "hankel"), (6,)),
}


def model_of(name: str, constraint: Any = None) -> DPLipModel:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    net = nn.Sequential(build(), nn.Flatten())
    with torch.no_grad():
        nn.init.normal_(net[0].weight)
    return DPLipModel(
        net.double(), input_shape=shape, input_norm=1.0, loss=losses.MeanAbsoluteError(), constraint=constraint
    )


def stepped(name: str, constraint: Any, *, steps: int = 1) -> tuple[Tensor, Tensor, CliplessDPSGD]:
    """The weight before and after, at a rate of one."""
    model = model_of(name, constraint)
    optimizer = CliplessDPSGD(
        model,
        lr=1.0,
        noise=ReproducibleNoise(3),
        **{**SETTINGS, "noise_multiplier": 2.0, "sample_rate": 0.5, "dataset_size": 8},
    )
    before = model.net[0].weight.detach().clone()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(4, *model.input_shape, generator=generator, dtype=torch.float64)
        output = model(inputs)
        model.loss(output, torch.zeros_like(output)).backward()
        optimizer.step()
    return before, model.net[0].weight.detach(), optimizer


def reference(name: str, weight: Tensor) -> tuple[float, Tensor]:
    """Norm and its gradient by the certificates' finite differences."""
    model = model_of(name)
    (operator,) = model.operators("0.weight")

    def norm(values: Tensor) -> float:
        if name in ("dense",):
            return float(torch.linalg.matrix_norm(values, 2))
        return operator.norm(values)

    gradient = torch.zeros_like(weight)
    for place in range(weight.numel()):
        step = torch.zeros(weight.numel(), dtype=torch.float64)
        step[place] = 1e-4
        step = step.reshape(weight.shape)
        gradient.view(-1)[place] = (norm(weight + step) - norm(weight - step)) / 2e-4
    return norm(weight), gradient


@pytest.mark.parametrize("name", ["dense", "circulant", "skew", "hankel"])
def test_what_is_added_is_the_gradient_of_the_logarithm_of_the_norm(name: str) -> None:
    weight = model_of(name).net[0].weight.detach().clone()
    size, expected = reference(name, weight)
    found = torch.zeros_like(weight)
    LipschitzPenalty(0.3).project_gradient_(found, weight, model_of(name).operators("0.weight"))
    # Of a Hankel matrix the certificate is the smaller one of two circles, the penalty pulls at one of them.
    tolerance = 0.5 if name == "hankel" else 1e-2
    assert float((found - 0.3 * expected / size).norm()) <= tolerance * float(found.norm())


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_it_is_finite_for_weights_of_any_size(size: float) -> None:
    model = model_of("dense")
    weight = size * torch.randn(model.net[0].weight.shape, dtype=torch.float64, generator=torch.manual_seed(0))
    found = torch.zeros_like(weight)
    LipschitzPenalty(1.0, kind="hinge", threshold=1e-8).project_gradient_(found, weight, model.operators("0.weight"))
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_against_it_lowers_the_certified_norm(name: str) -> None:
    model = model_of(name)
    (operator,) = operators = model.operators("0.weight")
    weight = model.net[0].weight.detach().clone()
    norms = [operator.norm(weight)]
    for _ in range(40):
        gradient = torch.zeros_like(weight)
        LipschitzPenalty(0.02 * norms[0] ** 2).project_gradient_(gradient, weight, operators)
        weight -= gradient
        norms.append(operator.norm(weight))
    assert min(norms) < 0.9 * norms[0]


def test_a_hinge_pulls_above_its_threshold_only() -> None:
    model = model_of("dense")
    operators, weight = model.operators("0.weight"), model.net[0].weight.detach()
    norm = float(torch.linalg.matrix_norm(weight, 2))
    above, below = torch.zeros_like(weight), torch.zeros_like(weight)
    LipschitzPenalty(0.3, "hinge", 0.9 * norm).project_gradient_(above, weight, operators)
    LipschitzPenalty(0.3, "hinge", 1.1 * norm).project_gradient_(below, weight, operators)
    assert float(above.norm()) == pytest.approx(0.3, rel=1e-6)
    assert not bool(below.any())
    nothing = torch.zeros_like(weight)
    LipschitzPenalty(0.3).project_gradient_(nothing, torch.zeros_like(weight), operators)
    assert not bool(nothing.any())


def check_it_comes_after_the_noise(name: str) -> None:
    penalty = LipschitzPenalty(0.3)
    before, plain, bare = stepped(name, None)
    _, pulled, held = stepped(name, penalty)
    expected = torch.zeros_like(before)
    penalty.project_gradient_(expected, before, held.model.operators("0.weight"))
    torch.testing.assert_close(plain - pulled, expected, atol=1e-9, rtol=0.0)
    assert held.accountant.ledger.entries == bare.accountant.ledger.entries


@pytest.mark.parametrize("name", ["dense", "kernel", "circulant"])
def test_it_comes_after_the_noise_undivided_and_the_ledger_is_the_same(name: str) -> None:
    check_it_comes_after_the_noise(name)


def test_a_penalty_before_the_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: it joins the sums."""
    release = CliplessDPOptimizer._release

    def early(self: CliplessDPOptimizer) -> None:
        self.model.project_gradients_()
        monkeypatch.setattr(type(self.model), "project_gradients_", lambda model: None)
        release(self)

    monkeypatch.setattr(CliplessDPOptimizer, "_release", early)
    with pytest.raises(AssertionError):
        check_it_comes_after_the_noise("dense")


@pytest.mark.parametrize("name", ["dense", "kernel", "circulant"])
def test_no_limit_is_claimed_and_bounds_are_those_of_the_weights(name: str) -> None:
    bare, held = model_of(name), model_of(name, LipschitzPenalty(0.3))
    assert torch.equal(bare.net[0].weight, held.net[0].weight)
    assert held.sensitivity().per_parameter == bare.sensitivity().per_parameter
    assert held.lipschitz_constant() == bare.lipschitz_constant()
    held.project_()
    assert math.isfinite(held.lipschitz_constant())
    assert held.lipschitz_constant() == bare.lipschitz_constant()


def test_given_for_all_weights_it_leaves_slopes_and_biases_alone_and_named_for_them_it_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), layers.Diagonal(4))
    settings: dict[str, Any] = {"input_shape": (4,), "input_norm": 1.0, "loss": losses.MeanAbsoluteError()}
    assert set(DPLipModel(net, constraint=LipschitzPenalty(1.0), **settings).constraints) == {"0.weight"}
    for place in ("0.bias", "1"):
        with pytest.raises(ConfigurationError, match="LipschitzPenalty"):
            DPLipModel(net, constraint={place: LipschitzPenalty(1.0)}, **settings)
    mixed = DPLipModel(net, constraint={"0": LipschitzPenalty(1.0), "2": constraints.Spectral()}, **settings)
    assert set(mixed.constraints) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("wrong", [(0.0,), (math.nan,), (1.0, "square"), (1.0, "hinge", -1.0), ("1",)])
def test_bad_arguments_are_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigurationError):
        LipschitzPenalty(*wrong)
