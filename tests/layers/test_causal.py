"""Causal mixing of tokens: what is computed, its bounds and their mutant, limits, gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    UnsupportedModuleError,
    constraints,
    gradient_gated,
    losses,
)
from clipless_dp.layers import CausalMixing
from clipless_dp.testing import LipschitzLayerTestCase

PATTERNS: tuple[Any, ...] = ("powers", "squares", "full")


def made(tokens: int, pattern: Any = "powers", *, limit: float = 0.5, seed: int = 0) -> CausalMixing:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CausalMixing(tokens, pattern, feedback_limit=limit).double()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(layer: CausalMixing) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``."""
    return layer.operator().dense(layer.weight), layer.feedback_operator().dense(layer.feedback)


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def wrapped(layer: nn.Module, channels: int = 3, constraint: Any = None) -> DPLipModel:
    tokens = layer.tokens if isinstance(layer, CausalMixing) else 6
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(tokens * channels, 2)).double()
    return DPLipModel(
        net, input_shape=(tokens, channels), input_norm=1.0, loss=losses.TauCrossEntropy(), constraint=constraint
    )


@given(tokens=st.integers(2, 19), pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_outputs_solve_the_recurrence_token_by_token(tokens: int, pattern: Any, seed: int) -> None:
    layer, values = made(tokens, pattern, seed=seed), drawn(2, tokens, 3, seed=seed)
    (ahead, back), outputs = both(layer), []
    for place in range(tokens):
        own = torch.einsum("j,bjc->bc", ahead[place], values)
        outputs.append(own + sum((back[place, j] * outputs[j] for j in range(place)), torch.zeros(())))
    torch.testing.assert_close(layer(values), torch.stack(outputs, 1))


@pytest.mark.parametrize(("pattern", "steps"), [("powers", {1, 2, 4, 8}), ("squares", {1, 2, 5, 10})])
def test_entries_lie_on_the_steps_of_the_pattern_and_nowhere_else(pattern: Any, steps: set[int]) -> None:
    layer = made(12, pattern)
    ahead, back = both(layer)
    for i in range(12):
        for j in range(12):
            assert (ahead[i, j] != 0.0) == (i - j in steps | {0})
            assert (back[i, j] != 0.0) == (i - j in steps)
    assert layer.weight.numel() == int((ahead != 0).sum())
    assert layer.feedback.numel() == int((back != 0).sum())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_token_hears_all_tokens_before_it_and_none_behind_it(pattern: Any) -> None:
    """Although its own row has few entries."""
    heard = made(16, pattern).matrix().detach()
    assert bool((heard.tril() != 0.0).sum() == 16 * 17 // 2)
    assert torch.equal(heard.triu(1), torch.zeros_like(heard))


class TestPowers(LipschitzLayerTestCase):
    shapes = ((5, 2), (2, 1))
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return CausalMixing(shape[0])


class TestSquares(LipschitzLayerTestCase):
    shapes = ((7, 1),)
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return CausalMixing(shape[0], "squares", feedback_limit=0.9)


class TestFull(LipschitzLayerTestCase):
    shapes = ((4, 2),)
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return CausalMixing(shape[0], "full")


def steepest(tokens: int, pattern: Any, beta: float) -> float:
    """Ascent on ``B`` of norm ``β``, input and cotangent: the norm of the gradient of ``B`` where A = I."""
    operator = made(tokens, pattern).feedback_operator()
    mask = operator.dense(torch.ones(operator.entries, dtype=torch.float64))
    entries, values, cotangent = (
        drawn(size, seed=seed).requires_grad_() for seed, size in enumerate((operator.entries, tokens, tokens))
    )
    steps = torch.optim.Adam([entries, values, cotangent], lr=0.03)
    reached = 0.0
    for _ in range(250):
        matrix = operator.dense(entries)
        matrix = beta * matrix / torch.linalg.matrix_norm(matrix, 2)
        inverse = torch.linalg.inv(torch.eye(tokens, dtype=torch.float64) - matrix)
        output, returned = inverse @ (values / values.norm()), inverse.mT @ (cotangent / cotangent.norm())
        found = (torch.outer(returned, output) * mask).norm()
        steps.zero_grad()
        (-found).backward()
        steps.step()
        reached = max(reached, float(found.detach()))
    return reached


@pytest.mark.parametrize("pattern", ["powers", "full"])
def test_one_power_of_the_feedback_is_no_bound_and_two_are(pattern: Any) -> None:
    """The mutant: ``Δ_B = αGX/(1-β)``."""
    beta = 0.6
    reached = steepest(8, pattern, beta)
    total = sum(beta**power for power in range(8))
    assert reached > 1.1 * total
    assert reached <= total**2


def test_the_bound_of_the_reading_matrix_is_all_but_attained() -> None:
    """By a first token that is heard at each step, and feedback to the next one."""
    layer = made(32, "full")
    operator = layer.feedback_operator()
    shift = 0.5 * torch.diag_embed(torch.ones(31, dtype=torch.float64), -1)
    inverse = torch.linalg.inv(torch.eye(32, dtype=torch.float64) - shift)
    left = torch.linalg.svd(inverse)[0][:, 0]
    with torch.no_grad():
        layer.feedback.copy_(torch.cat([shift.diagonal(-step) for step in operator.steps]))
    values = torch.zeros(1, 32, 1, dtype=torch.float64)
    values[0, 0] = 1.0
    (found,) = torch.autograd.grad(layer(values), layer.weight, left.reshape(1, 32, 1))
    assert 0.97 < float(found.norm()) / 2.0 <= 1.0


def test_bounds_are_those_of_the_formulas() -> None:
    layer = made(8)
    model = wrapped(layer, constraint={"0": constraints.Spectral(0.8), "0.feedback": constraints.Spectral()})
    share, inverse = model.sensitivity().per_parameter, sum(0.5**power for power in range(8))
    cotangent = float(torch.linalg.matrix_norm(model.net[2].weight.detach(), 2)) * model.cotangent_norm
    assert share["0.weight"] == pytest.approx(inverse * cotangent, rel=1e-2)
    assert share["0.feedback"] == pytest.approx(0.8 * inverse**2 * cotangent, rel=1e-2)
    assert inverse < 1.0 / (1.0 - 0.5)


def test_the_unit_limit_holds_the_feedback_at_beta_and_a_step_does_not_leave_it() -> None:
    layer = made(9, limit=0.7)
    with torch.no_grad():
        layer.feedback.mul_(40.0)
        layer.weight.mul_(40.0)
    model = wrapped(layer, constraint=constraints.Spectral())
    steps = CliplessDPSGD(model, lr=5.0, noise_multiplier=1.0, sample_rate=0.5, dataset_size=8, sampling="poisson")
    for _ in range(2):
        model.loss(model(drawn(4, 9, 3)), torch.tensor([0, 1, 0, 1])).backward()
        steps.step()
        ahead, back = both(layer)
        assert 0.9 < spectral(ahead) <= 1.0
        assert 0.63 < spectral(back) <= 0.7
    assert model.lipschitz_constant() < 1.01 / (1.0 - 0.7) * spectral(model.net[2].weight)


@pytest.mark.parametrize("kind", [constraints.Spectral, constraints.Frobenius, constraints.RowNorm])
@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_every_constraint_that_applies_holds_its_limit_times_the_unit(kind: Any, limit: float) -> None:
    layer = made(10, "squares", limit=0.6)
    operators = layer.operator(), layer.feedback_operator()
    for values, operator, unit in zip((layer.weight, layer.feedback), operators, (1.0, 0.6), strict=True):
        with torch.no_grad():
            values.mul_(7.0)
        kind(limit).project_(values.data, (operator,))
        assert spectral(operator.dense(values)) <= limit * unit
        assert kind(limit).holds(values.data, (operator,))


@pytest.mark.parametrize("kind", [constraints.Orthogonal, constraints.AlmostOrthogonal])
def test_constraints_that_have_no_such_matrix_are_refused_with_the_one_that_has(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match="Spectral"):
        wrapped(made(6), constraint=kind())


def test_a_penalty_pulls_both_norms_down() -> None:
    layer = made(8)
    for values, operator in ((layer.weight, layer.operator()), (layer.feedback, layer.feedback_operator())):
        gradient = torch.zeros_like(values)
        constraints.LipschitzPenalty(1.0, "hinge", 0.1).project_gradient_(gradient, values.detach(), (operator,))
        before = operator.norm(values)
        assert operator.norm(values - 0.01 * gradient) < before - 1e-3


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_that_mix_nothing_are_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match="tokens"):
        CausalMixing(size)


def test_feedback_that_does_not_die_away_is_refused() -> None:
    for wrong in (1.0, 1.5):
        with pytest.raises(ConfigurationError, match="below 1"):
            CausalMixing(4, feedback_limit=wrong)
    with pytest.raises(ConfigurationError, match="pattern"):
        CausalMixing(4, "all")  # type: ignore[arg-type]


def test_samples_of_another_number_of_tokens_are_refused_before_training() -> None:
    net = nn.Sequential(CausalMixing(5), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises((UnsupportedModuleError, ConfigurationError), match="5"):
        DPLipModel(net, input_shape=(6, 2), input_norm=1.0, loss=losses.TauCrossEntropy())
    with pytest.raises(ConfigurationError, match=r"\(B, 5, C\)"):
        CausalMixing(5)(torch.zeros(2, 4, 3))


@pytest.mark.parametrize("normalise", [False, True])
def test_gradient_gates_cap_both_matrices_of_each_sample(normalise: bool) -> None:
    """By way of isolation: no certificate is asked for, whatever is fed back."""
    layer = made(6)
    with torch.no_grad():
        layer.feedback.mul_(8.0)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(18, 2)).double()
    gated = gradient_gated(net, limit=0.01, mode="normalize" if normalise else "clip")
    model = DPLipModel(gated, input_shape=(6, 3), input_norm=1.0, loss=losses.TauCrossEntropy())
    inputs, targets = drawn(5, 6, 3), torch.tensor([0, 1, 1, 0, 1])
    caps = model.sensitivity().per_parameter
    total: dict[str, Tensor] = {}
    for row in range(5):
        model.zero_grad()
        model.loss(model(inputs[row : row + 1]), targets[row : row + 1]).backward()
        for name, parameter in model.net.named_parameters():
            assert parameter.grad is not None
            assert 0.0 < float(parameter.grad.norm()) <= caps[name] * (1.0 + 1e-9)
            total[name] = total.get(name, torch.zeros(())) + parameter.grad
        model.register.drop()
        model.register.forget()
    model.loss(model(inputs), targets).backward()
    for name, parameter in model.net.named_parameters():
        torch.testing.assert_close(parameter.grad, total[name])
