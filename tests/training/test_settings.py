"""Settings follow from public numbers alone, and what noise does to weights is said before the budget is spent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from accounting import UnreachableTargetError, calibrate_noise_multiplier
from clipless_dp import DPLipModel, constraints, fit, gated, gradient_gated, layers, losses, suggest_settings
from clipless_dp.errors import ConfigurationError
from clipless_dp.training import settings as module
from tests.support import samples

ROUTES = ("spectral", "orthogonal", "gated", "gradient_gated", "free")


def wrapped(route: str, width: int = 16, limit: float = 1.0, seed: int = 0) -> DPLipModel:
    torch.manual_seed(seed)
    net: nn.Module = nn.Sequential(nn.Linear(6, width), layers.GroupSort(2), nn.Linear(width, 3))
    if route == "gated":
        net = gated(net)
    elif route == "gradient_gated":
        net = gradient_gated(net)
    constraint = {"spectral": constraints.Spectral(limit), "orthogonal": constraints.Orthogonal(limit)}.get(route)
    return DPLipModel(net, input_shape=(6,), input_norm=2.0, loss=losses.TauCrossEntropy(4.0), constraint=constraint)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [1, 300, 60_000, 10_000_000])
def test_settings_are_complete_and_within_range_and_do_not_rest_on_the_seed(route: str, size: int) -> None:
    plan = suggest_settings(wrapped(route), size, 2.0, 1e-8)
    assert 1 <= plan.batch_size <= size
    assert 3.0 <= plan.epochs <= 100.0
    # The least number of epochs of the largest data set takes its time.
    assert 100 <= plan.steps <= 401
    assert plan.optimizer == "adam"
    assert 0.0 < plan.lr < 1.0
    assert plan.arguments == suggest_settings(wrapped(route, seed=1), size, 2.0, 1e-8).arguments
    shown = str(plan)
    assert all(name in shown for name in plan.arguments)


def test_the_noise_of_a_constrained_run_adds_up_to_the_share_of_its_limit_that_is_said() -> None:
    model = wrapped("spectral", width=64, limit=2.0)
    plan = suggest_settings(model, 5000, 3.0, 1e-5)
    rates = [plan.lr * (plan.steps - step) / plan.steps for step in range(plan.steps)]
    walk = math.sqrt(sum(rate**2 for rate in rates))
    generator = torch.Generator().manual_seed(0)
    reached = [
        float(torch.linalg.matrix_norm(walk * torch.randn(*shape, generator=generator), 2)) / 2.0
        for shape in ((64, 6), (3, 64))
    ]
    # Operator norms of random matrices this small deviate by a tenth.
    assert math.exp(sum(map(math.log, reached)) / 2) == pytest.approx(1.7, rel=0.15)


def test_the_chosen_batch_is_as_small_as_its_noise_allows() -> None:
    size, epsilon, delta = 60_000, 3.0, 1e-5
    plan = suggest_settings(wrapped("gated"), size, epsilon, delta)

    def noise(batch_size: int) -> float:
        rate, steps = batch_size / size, math.ceil(plan.epochs * size / batch_size)
        sigma = calibrate_noise_multiplier(
            target_epsilon=epsilon, delta=delta, sample_rate=rate, steps=steps, accountant="rdp"
        )
        return sigma / (rate * math.sqrt(steps))

    least = noise(round(plan.epochs * size / 100))
    assert noise(plan.batch_size) <= 1.1001 * least
    assert plan.steps >= 399 or noise(plan.batch_size // 2) > 1.1 * least


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 7},
        {"batch_size": 50},
        {"lr": 0.3},
        {"momentum": 0.5},
        {"optimizer": "sgd"},
        {"optimizer": "adam", "lr": 0.2},
        {"optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-3)},
        {"epochs": 3, "batch_size": 100, "lr": 1.0, "momentum": 0.0, "optimizer": "sgd"},
    ],
    ids=["epochs", "batch size", "rate", "momentum", "sgd", "adam", "own", "all"],
)
def test_what_is_given_is_kept(given: dict[str, Any]) -> None:
    plan = suggest_settings(wrapped("spectral"), 300, 4.0, 1e-3, **given)
    assert {name: plan.arguments[name] for name in given} == given
    assert not given.keys() & plan.reasons.keys()


def test_a_budget_that_renyi_bounds_do_not_reach_is_left_to_the_engine_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length: dict[str, Any] = {"epochs": 1, "batch_size": 100}
    reached = suggest_settings(wrapped("gated"), 1000, 2.0, 1e-4, **length).noise_multiplier

    def unreachable(**asked: Any) -> float:
        raise UnreachableTargetError("none")

    monkeypatch.setattr(module, "calibrate_noise_multiplier", unreachable)
    plan = suggest_settings(wrapped("gated"), 1000, 2.0, 1e-4, **length)
    # The tight engine needs less noise.
    assert 0.7 * reached < plan.noise_multiplier <= reached


def test_a_rate_without_an_optimizer_is_that_of_sgd_with_momentum() -> None:
    plan = suggest_settings(wrapped("gated"), 300, 4.0, 1e-3, lr=0.5)
    assert (plan.optimizer, plan.momentum) == ("sgd", 0.9)


def test_sgd_takes_momentum_for_many_steps_only() -> None:
    few, many = (
        suggest_settings(wrapped("gated"), 60_000, 3.0, 1e-5, optimizer="sgd", epochs=10, batch_size=batch_size)
        for batch_size in (6000, 600)
    )
    assert (few.momentum, many.momentum) == (0.0, 0.9)


def test_rates_of_sgd_fall_as_the_noise_grows_and_those_of_adam_do_not() -> None:
    model = wrapped("spectral")
    length = {"epochs": 20, "batch_size": 100}
    for optimizer in ("sgd", "adam"):
        strict, loose = (
            suggest_settings(model, 1000, epsilon, 1e-4, optimizer=optimizer, **length) for epsilon in (0.5, 8.0)
        )
        assert (strict.lr < 0.7 * loose.lr) == (optimizer == "sgd")


@pytest.mark.parametrize("route", ROUTES)
def test_fit_takes_what_is_suggested(route: str) -> None:
    model, data = wrapped(route), samples(300)
    plan = suggest_settings(model, 300, 4.0, 1e-3, epochs=4)
    result = fit(model, data, epsilon=4.0, delta=1e-3, epochs=4, progress=False, accountant="rdp", audit=False)
    learning = result.learning
    assert learning is not None
    assert {name: getattr(learning, name) for name in plan.arguments} == plan.arguments
    (group,) = result.optimizer.param_groups
    assert group["initial_lr"] == plan.lr
    assert isinstance(result.optimizer.base_optimizer, torch.optim.Adam)
    assert 3.9 < result.epsilon <= 4.0


def test_a_time_that_is_given_bounds_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_seconds", lambda work: 0.001)
    few = suggest_settings(wrapped("gated"), 60_000, 3.0, 1e-5, minutes=0.01)
    many = suggest_settings(wrapped("gated"), 60_000, 3.0, 1e-5, minutes=1.0)
    # (0.6 s - 300 projections of 0.001 s) at 64 rows in 0.001 s.
    assert few.epochs * 60_000 == pytest.approx(19_200)
    assert many.epochs * 60_000 == pytest.approx(3_820_800)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = wrapped("orthogonal")
    before = [value.clone() for value in model.net.parameters()]
    state = torch.random.get_rng_state()
    suggest_settings(model, 1000, 3.0, 1e-4, minutes=0.1)
    assert all(torch.equal(*pair) for pair in zip(before, model.net.parameters(), strict=True))
    assert all(value.grad is None for value in model.net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    fit(model, samples(100), epsilon=4.0, delta=1e-3, epochs=1, batch_size=20, progress=False, audit=False)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_noise_of_a_step_is_about_what_is_said(optimizer: str) -> None:
    model = wrapped("spectral", width=64)
    length: dict[str, Any] = {"epochs": 2, "batch_size": 30, "optimizer": optimizer, "lr": 0.05, "momentum": 0.0}
    plan = suggest_settings(model, 300, 1.0, 1e-3, **length)
    (first, _) = plan.noise
    assert first.name == "0.weight"
    if optimizer == "sgd":
        deviation = plan.noise_multiplier * model.sensitivity().total / 30
        assert first.norm > 0.05 * deviation
    else:
        assert first.norm == pytest.approx(0.05 * math.sqrt(0.1 / 1.9) * (math.sqrt(64) + math.sqrt(6)))


def test_noise_above_a_quarter_of_a_limit_is_warned_about_before_anything_is_charged() -> None:
    model, data = wrapped("orthogonal"), samples(300)
    before = [value.clone() for value in model.net.parameters()]
    # A warning that is an error here stops the call where it is given.
    with pytest.raises(UserWarning, match=r"the noise of one step.*Leave out lr"), errors():
        fit(model, data, epsilon=1.0, delta=1e-3, epochs=4, batch_size=30, lr=5.0, progress=False, audit=False)
    assert all(torch.equal(*pair) for pair in zip(before, model.net.parameters(), strict=True))
    with errors():
        fit(model, data, epsilon=8.0, delta=1e-3, progress=False, audit=False, epochs=2)


@contextmanager
def errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ((0, 1.0, 1e-3), {}),
        ((10, 0.0, 1e-3), {}),
        ((10, 1.0, 2.0), {}),
        ((10, 1.0, 1e-3), {"minutes": -1.0}),
        ((10, 1.0, 1e-3), {"epoch": 3}),
        ((10, 1.0, 1e-3), {"batch_size": 11}),
    ],
    ids=["no samples", "no budget", "delta", "minutes", "unknown", "too large a batch"],
)
def test_arguments_out_of_range_are_refused(arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        suggest_settings(wrapped("gated"), *arguments, **given)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["spectral", "orthogonal", "gated", "gradient_gated"])
def test_no_route_ends_at_chance_without_settings(route: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1200, 6, generator=generator)
    labels = inputs[:, :3].argmax(1)
    model = wrapped(route, width=32)
    fit(model, (inputs[:1000], labels[:1000]), epsilon=8.0, delta=1e-4, progress=False, audit=False)
    found = (model(inputs[1000:]).argmax(1) == labels[1000:]).double().mean()
    assert float(found) > 0.75
