"""Bounds of earlier steps are recorded as numbers: no setting need be described for a smaller one to be found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    LayerBounds,
    PoissonBatches,
    constraints,
    fit,
    gradient_gated,
    layers,
    losses,
    register_rule,
    report,
)
from clipless_dp.errors import CheckpointError
from clipless_dp.model import bounds_taken
from clipless_dp.optim import books

from ..support import gated_model, samples


class Scaling(nn.Module):
    """A layer of a user's own, whose setting lies where no description reaches."""

    def __init__(self, place: str, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.read: Callable[[], Any] = lambda: scale
        if place == "a mapping":
            self.held = {"scale": scale}
        elif place == "an object":
            self.held = SimpleNamespace(scale=scale)
        elif place == "an array":
            self.held = np.array(scale)
        elif place == "a buffer":
            self.register_buffer("held", torch.tensor(scale), persistent=False)
        elif place == "a child":
            self.child = nn.Module()
            self.child.held = {"scale": scale}  # type: ignore[assignment]

    @property
    def scale(self) -> float:
        return float(self.read())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight * self.scale


@register_rule(Scaling)
def bounds_of_scaling(module: Any, context: Any) -> LayerBounds:
    norm = module.scale * float(module.weight.detach().abs().max())
    return LayerBounds(
        output_norm=lambda: norm * context.input_norm,
        lipschitz=lambda: norm,
        gradients={"weight": lambda: module.scale * context.input_norm},
    )


class Weighted(losses.Loss):
    """A loss whose scale is in a closure."""

    def __init__(self, scale: float) -> None:
        self.read = lambda: scale

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        return self.read() * output.sum(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        return self.read() * math.sqrt(output_shape[-1])


def model_of(place: str, scale: float) -> DPLipModel:
    torch.manual_seed(0)
    first: list[nn.Module] = [] if place == "a loss's closure" else [Scaling(place, scale)]
    loss = losses.TauCrossEntropy(2.0) if first else Weighted(scale)
    net = nn.Sequential(*first, nn.Linear(6, 3, bias=False))
    return DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=loss)


PLACES = ["a closure", "a mapping", "an object", "an array", "a buffer", "a child", "a loss's closure"]


def private(model: DPLipModel, accountant: Any = "rdp", lr: float = 0.01) -> CliplessDPSGD:
    return CliplessDPSGD(model, lr=lr, sample_rate=0.5, dataset_size=24, noise_multiplier=1.0, accountant=accountant)


def train(optimizer: CliplessDPSGD, steps: int = 2) -> None:
    for batch in PoissonBatches(samples(24), sample_rate=0.5, steps=steps):
        optimizer.zero_grad()
        optimizer.accumulate(batch)
        optimizer.step()


def found(optimizer: CliplessDPSGD) -> bool:
    return bool(optimizer.changed_bounds())


def resumed(there: CliplessDPSGD, here: DPLipModel, *, former: bool = False) -> CliplessDPSGD:
    optimizer = private(here)
    state = copy.deepcopy(there.state_dict())
    if former:
        # As states of before bounds were recorded.
        del state["clipless_dp"]["bounds"], state["clipless_dp"]["bounds_taken"]
    here.load_state_dict(there.model.state_dict())
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("place", PLACES)
def test_smaller_bounds_at_the_weights_of_a_loaded_state_are_found_wherever_the_setting_lies(place: str) -> None:
    there = private(model_of(place, 50.0))
    train(there)
    assert not found(there)
    assert not found(resumed(there, model_of(place, 50.0)))
    assert found(resumed(there, model_of(place, 1.0)))
    # Also where steps come first, and the state is saved again.
    after = resumed(there, model_of(place, 1.0))
    train(after, 1)
    assert found(after)
    assert found(resumed(after, model_of(place, 1.0)))


def test_a_statement_tells_of_larger_bounds_in_earlier_steps() -> None:
    there = private(model_of("a mapping", 50.0))
    train(there)
    assert not report(there).findings
    (finding,) = report(resumed(there, model_of("a mapping", 1.0))).findings
    assert finding.startswith("Earlier steps had larger bounds than those shown here")


def test_states_of_former_versions_load_and_tell_nothing() -> None:
    there = private(model_of("a mapping", 2.0))
    train(there)
    assert not found(resumed(there, model_of("a mapping", 2.0), former=True))
    assert not found(resumed(there, model_of("a mapping", 1.0), former=True))


def test_a_checkpoint_of_other_bounds_is_not_gone_on_from(tmp_path: Any) -> None:
    run: dict[str, Any] = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 12, "lr": 0.1, "progress": False}
    run |= {"checkpoint": tmp_path / "run.pt", "audit": False}
    fit(model_of("a mapping", 50.0), samples(24), **run)
    assert fit(model_of("a mapping", 50.0), samples(24), **run).steps == 2
    with pytest.raises(CheckpointError, match="other bounds at the same weights"):
        fit(model_of("a mapping", 1.0), samples(24), **run)


def gradient_model() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return DPLipModel(gradient_gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after more steps"])
def test_parameters_that_are_frozen_for_a_second_phase_are_found(again: bool) -> None:
    model = gradient_model()
    first = private(model)
    train(first)
    for parameter in [*model.net.parameters()][:2]:
        parameter.requires_grad_(False)
    second = private(model, first.accountant)
    if again:
        train(second)
    assert found(second)
    assert any("0.weight" in line for line in second.changed_bounds())


@pytest.mark.parametrize(
    "make", [gated_model, gradient_model, lambda: model_of("a mapping", 2.0)], ids=["gated", "gradients", "free"]
)
def test_steps_that_change_weights_alone_are_no_finding(make: Callable[[], DPLipModel]) -> None:
    optimizer = private(make(), lr=0.05)
    for _ in range(4):
        train(optimizer, 1)
        assert not optimizer.changed_bounds()
    assert not found(resumed(optimizer, make()))


def test_a_setting_that_shrinks_bounds_between_steps_is_found() -> None:
    box = [50.0]
    model = model_of("a closure", 1.0)
    layer: Any = model.net.get_submodule("0")
    layer.read = lambda: box[0]
    optimizer = private(model)
    train(optimizer)
    box[0] = 1.0
    train(optimizer, 1)
    assert found(optimizer)


@pytest.mark.parametrize(
    ("name", "value"), [("_ROUNDING", 1.0), ("different", lambda *given: [])], ids=["any is rounding", "not compared"]
)
def test_without_the_comparison_smaller_bounds_pass(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = private(model_of("a mapping", 50.0))
    train(there)
    honest = bounds_taken.different
    mutant = value if callable(value) else (lambda one, other: honest(one, other, value))
    monkeypatch.setattr(books, "different", mutant)
    monkeypatch.setattr(bounds_taken, "different", lambda *given: [])
    assert not found(resumed(there, model_of("a mapping", 1.0)))


def test_what_is_not_a_number_is_no_other_setting_than_itself() -> None:
    class Filled(losses.TauCrossEntropy):
        def __init__(self, fill: float) -> None:
            super().__init__(2.0)
            self.fill, self.several = fill, (fill, [fill], {"fill": fill})

    def made(fill: float) -> DPLipModel:
        torch.manual_seed(0)
        return DPLipModel(nn.Linear(6, 3), input_shape=(6,), input_norm=1.0, loss=Filled(fill))

    optimizer = private(made(math.nan))
    train(optimizer)
    assert not report(optimizer).findings
    assert not report(resumed(optimizer, made(math.nan))).findings
    assert report(resumed(optimizer, made(0.0))).findings


class Counting(nn.Module):
    """A layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.calls, self.width = 0, 6

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs * self.weight


@register_rule(Counting)
def bounds_of_counting(module: Any, context: Any) -> LayerBounds:
    norm = float(module.weight.detach().abs().max())
    return LayerBounds(
        output_norm=lambda: norm * context.input_norm,
        lipschitz=lambda: norm,
        gradients={"weight": lambda: context.input_norm},
    )


class CountingLoss(losses.TauCrossEntropy):
    def __init__(self) -> None:
        super().__init__(2.0)
        self.calls, self.level = 0, 3

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return super().per_sample(output, target)


def counting() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(Counting(), nn.Linear(6, 3))
    return DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=CountingLoss())


def test_a_number_of_calls_is_no_setting_and_other_whole_numbers_are(tmp_path: Any) -> None:
    optimizer = private(counting())
    train(optimizer)
    assert not optimizer.changed_settings()
    after = resumed(optimizer, counting())
    train(after, 1)
    assert not after.changed_settings()
    run: dict[str, Any] = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 12, "lr": 0.1, "progress": False}
    run |= {"checkpoint": tmp_path / "run.pt", "audit": False}
    fit(counting(), samples(24), **run)
    assert fit(counting(), samples(24), **run).steps == 2
    for owner, name in ((optimizer.model.net.get_submodule("0"), "width"), (optimizer.model.loss_function, "level")):
        setattr(owner, name, 9)
    assert len(optimizer.changed_settings()) == 2


def by_hand(before: constraints.Constraint, *behind: constraints.Constraint, steps: bool = True) -> CliplessDPSGD:
    """Weights and state of one run, put by hand into a network and an optimizer of others, which save them again."""

    def made(constraint: constraints.Constraint) -> tuple[DPLipModel, CliplessDPSGD]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), layers.GroupSort(2), nn.Linear(8, 3))
        model = DPLipModel(
            net, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(4.0), constraint=constraint
        )
        return model, CliplessDPSGD(
            model, lr=0.1, noise_multiplier=1.0, sample_rate=0.25, dataset_size=256, sampling="poisson"
        )

    def step(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
        optimizer.zero_grad()
        model.loss(model(torch.randn(8, 6)), torch.arange(8) % 3).backward()
        optimizer.step()

    model, optimizer = made(before)
    step(model, optimizer)
    for constraint in behind:
        again, other = made(constraint)
        again.net.load_state_dict(model.net.state_dict())
        other.load_state_dict(optimizer.state_dict())
        model, optimizer = again, other
    if steps:
        step(model, optimizer)
    return optimizer


@pytest.mark.parametrize("kind", [constraints.Spectral, constraints.Orthogonal, constraints.Frobenius])
def test_weights_that_are_loaded_by_hand_under_their_constraint_are_no_finding(
    kind: Callable[[], constraints.Constraint],
) -> None:
    assert not by_hand(kind(), kind()).changed_bounds()
    assert not by_hand(kind(), kind(), kind()).changed_bounds()


def test_weights_that_were_trained_under_a_larger_limit_are_a_finding() -> None:
    (line,) = by_hand(constraints.Spectral(1.5), constraints.Spectral(1.4)).changed_bounds()
    assert "there" in line


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_so_they_are_where_their_state_was_loaded_and_saved_again_before_any_step(times: int, steps: bool) -> None:
    limits = [1.5] * (1 + times) + [1.4]
    (line,) = by_hand(*map(constraints.Spectral, limits), steps=steps).changed_bounds()
    assert "there" in line
