from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from clipless_dp import (
    CliplessDPOptimizer,
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    PrivacyError,
    constraints,
    losses,
)
from clipless_dp.layers import GroupSort
from clipless_dp.optim import AdamBC, SharpnessAwareAdam, SharpnessAwareSGD
from tests.support import gated_model, samples

PAIRS = [(SharpnessAwareSGD, torch.optim.SGD, {"momentum": 0.5}), (SharpnessAwareAdam, torch.optim.Adam, {})]


def quadratic(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> list[torch.Tensor]:
    """Weights at which passes are made, with the gradients ``Hw`` of a loss of known curvature."""
    seen = []
    for _ in range(steps):
        seen.append(parameter.detach().clone())
        parameter.grad = torch.tensor([1.0, 10.0], dtype=torch.float64) * parameter.detach()
        optimizer.step()
    return seen


@pytest.mark.parametrize(("ours", "base", "settings"), PAIRS)
def test_of_radius_zero_it_is_the_optimizer_of_torch(ours: Any, base: Any, settings: dict[str, float]) -> None:
    mine, theirs = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    quadratic(ours([mine], lr=0.05, radius=0.0, **settings), mine, 20)
    quadratic(base([theirs], lr=0.05, **settings), theirs, 20)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("ours", "base", "settings"), PAIRS)
def test_passes_run_a_radius_along_the_last_gradient_from_where_torch_would_be(
    ours: Any, base: Any, settings: dict[str, float]
) -> None:
    shifted, plain = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer, reference = ours([shifted], lr=0.05, radius=0.2, **settings), base([plain], lr=0.05, **settings)
    for _ in range(10):
        gradient = torch.tensor([1.0, 10.0], dtype=torch.float64) * shifted.detach()
        shifted.grad, plain.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(shifted - plain, 0.2 * gradient / gradient.norm())


def test_shifts_are_of_all_weights_together_and_fall_with_the_learning_rate() -> None:
    first, second = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = SharpnessAwareSGD([{"params": [first]}, {"params": [second]}], lr=0.0, radius=0.5)
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = 1e-9, 0.25e-9
    first.grad, second.grad = torch.ones_like(first), 2.0 * torch.ones_like(second)
    optimizer.step()
    assert torch.cat((first, second)).norm().item() == pytest.approx(0.125)
    torch.testing.assert_close(second, 2.0 * first)


def test_a_gradient_of_zero_shifts_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = SharpnessAwareSGD([parameter], lr=0.1, radius=0.5)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize(("ours", "base", "settings"), PAIRS)
def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(
    ours: Any, base: Any, settings: dict[str, float]
) -> None:
    through, stopped = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    quadratic(ours([through], lr=0.05, radius=0.2, **settings), through, 6)
    first = ours([stopped], lr=0.05, radius=0.2, **settings)
    quadratic(first, stopped, 3)
    second = ours([stopped], lr=1.0, radius=0.0)
    second.load_state_dict(first.state_dict())
    quadratic(second, stopped, 3)
    assert torch.equal(through, stopped)


@pytest.mark.parametrize("kind", [SharpnessAwareSGD, SharpnessAwareAdam])
@pytest.mark.parametrize("constraint", [None, constraints.Orthogonal()], ids=["gates", "orthogonal"])
def test_private_steps_take_it_as_any_base_optimizer(kind: Any, constraint: constraints.Constraint | None) -> None:
    model, data = gated_model(), samples(200)
    if constraint is not None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), GroupSort(2), nn.Linear(8, 3))
        loss = losses.TauCrossEntropy(2.0)
        model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=loss, constraint=constraint)
    # Torch's class has stepped before: its step carries hooks of its own then.
    kind.__bases__[1]([nn.Parameter(torch.ones(1))], lr=0.1).step()
    base = kind(model.net.parameters(), lr=0.05, radius=0.1)
    optimizer = CliplessDPOptimizer(
        model, base, noise_multiplier=1.0, sample_rate=0.2, dataset_size=200, accountant="rdp"
    )
    for batch in PoissonBatches(data, sample_rate=0.2, steps=4):
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        optimizer.step()
    assert optimizer.steps_taken == 4
    assert optimizer.weights_are_counted()
    shifts = [base.state[parameter]["shift"] for parameter in model.net.parameters()]
    assert torch.cat([shift.flatten() for shift in shifts]).norm().item() == pytest.approx(0.1, rel=1e-4)
    if constraint is not None:
        assert model.lipschitz_constant() <= 1.0 + 1e-6


def test_a_shift_that_raw_gradients_made_is_refused() -> None:
    model, data = gated_model(), samples(200)
    base = SharpnessAwareSGD(model.net.parameters(), lr=0.05, radius=0.1)
    model.loss(model(data[0]), data[1], None).backward()
    base.step()
    base.zero_grad()
    with pytest.raises(PrivacyError):
        CliplessDPOptimizer(model, base, noise_multiplier=1.0, sample_rate=0.2, dataset_size=200, accountant="rdp")


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf"), "large", True])
def test_a_radius_that_is_no_length_is_refused(radius: Any) -> None:
    with pytest.raises(ConfigurationError, match="radius"):
        SharpnessAwareSGD([nn.Parameter(torch.ones(2))], lr=0.1, radius=radius)
    optimizer = SharpnessAwareSGD([nn.Parameter(torch.ones(2))], lr=0.1, radius=0.1)
    with pytest.raises(ConfigurationError, match="radius"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "radius": radius})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (SharpnessAwareSGD, "radius", -1.0),
        (SharpnessAwareAdam, "radius", "large"),
        (SharpnessAwareAdam, "radius", None),
        (SharpnessAwareSGD, "maximize", None),
        (AdamBC, "floor", 0.0),
        (AdamBC, "betas", None),
    ],
)
def test_a_setting_of_a_group_that_is_none_by_now_is_refused_before_the_charge(
    kind: Any, name: str, value: Any
) -> None:
    model, data = gated_model(), samples(200)
    base = kind(model.net.parameters(), lr=0.05, **({} if kind is AdamBC else {"radius": 0.1}))
    optimizer = CliplessDPOptimizer(
        model, base, noise_multiplier=1.0, sample_rate=0.2, dataset_size=200, accountant="rdp"
    )
    if value is None:
        del base.param_groups[0][name]
    else:
        base.param_groups[0][name] = value
    (batch,) = PoissonBatches(data, sample_rate=0.2, steps=1)
    model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
    with pytest.raises(ConfigurationError, match=name):
        optimizer.step()
    assert optimizer.steps_taken == 0
    assert not optimizer.accountant.ledger


def test_a_closure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="closure"):
        SharpnessAwareSGD([nn.Parameter(torch.ones(2))], lr=0.1, radius=0.1).step(lambda: 0.0)


SCHEDULES = {
    "rises to a peak": lambda base: lr_scheduler.OneCycleLR(base, max_lr=0.1, total_steps=10),
    "in cycles": lambda base: lr_scheduler.CyclicLR(base, base_lr=1e-3, max_lr=0.1, step_size_up=3),
    "without end": lambda base: lr_scheduler.LambdaLR(base, lambda step: 10.0**step),
    "to a rate of averages": lambda base: SWALR(base, swa_lr=1.0),
    "warms up": lambda base: lr_scheduler.LinearLR(base, 0.1, 1.0, 4),
    "falls": lambda base: lr_scheduler.CosineAnnealingLR(base, 10),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("ours", "base", "settings"), PAIRS)
def test_no_schedule_takes_the_shift_beyond_the_radius_in_one_run_or_two(
    ours: Any, base: Any, settings: dict[str, float], schedule: Any
) -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = ours([parameter], lr=0.1, radius=0.2, **settings)
    scheduler, shifts = schedule(optimizer), []
    for step in range(9):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        shifts.append(optimizer.state[parameter]["shift"].norm().item())
        if step == 4:
            kept = optimizer.state_dict()
            optimizer = ours([parameter], lr=0.1, radius=0.2, **settings)
            optimizer.load_state_dict(kept)
            scheduler.optimizer = optimizer
    assert max(shifts) <= 0.2 * (1.0 + 1e-12)
    assert max(shifts) > 0.05


def test_a_rate_that_fell_by_hand_shifts_less_and_the_peak_is_kept() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SharpnessAwareSGD([parameter], lr=0.1, radius=0.5)
    lengths = []
    for rate in (0.1, 0.05, 0.025, 0.1, 0.2, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        lengths.append(optimizer.state[parameter]["shift"].norm().item())
    assert lengths == pytest.approx([0.5, 0.25, 0.125, 0.5, 0.5, 0.25])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradients_whose_squares_are_no_numbers_shift_by_the_radius(scale: float) -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = SharpnessAwareSGD([parameter], lr=0.0, radius=0.5)
    parameter.grad = torch.full((1000,), scale)
    parameter.grad[0] *= 10.0
    optimizer.step()
    assert optimizer.state[parameter]["shift"].norm().item() == pytest.approx(0.5, rel=1e-4)


def test_what_is_maximised_is_shifted_to_where_it_is_smaller() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = SharpnessAwareSGD([parameter], lr=0.0, radius=0.5, maximize=True)
    parameter.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, 0.0]))


@pytest.mark.parametrize(("ours", "base", "settings"), PAIRS)
def test_the_state_of_the_optimizer_of_torch_is_refused_before_any_charge(
    ours: Any, base: Any, settings: dict[str, float]
) -> None:
    def private(kind: Any, **more: Any) -> CliplessDPOptimizer:
        model = gated_model()
        return CliplessDPOptimizer(
            model,
            kind(model.net.parameters(), lr=0.1, **settings, **more),
            noise_multiplier=1.0,
            sample_rate=1.0,
            dataset_size=200,
            accountant="rdp",
        )

    optimizer = private(ours, radius=0.1)
    with pytest.raises(ConfigurationError, match="state of another optimizer"):
        optimizer.load_state_dict(private(base).state_dict())
    assert len(optimizer.accountant) == 0
    optimizer.load_state_dict(private(ours, radius=0.2).state_dict())
    assert optimizer.param_groups[0]["radius"] == 0.2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("kind", [SharpnessAwareSGD, SharpnessAwareAdam])
def test_copies_take_further_groups_with_the_radius_of_the_first(kind: Any, copied: Any) -> None:
    optimizer = copied(kind([nn.Parameter(torch.ones(2))], lr=0.1, radius=0.3))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "radius": 0.1})
    assert [group["radius"] for group in optimizer.param_groups] == [0.3, 0.3, 0.1]


def test_a_loop_may_keep_its_notes_on_it_as_on_optimizers_of_torch() -> None:
    model, data = gated_model(), samples(200)
    base = SharpnessAwareSGD(model.net.parameters(), lr=0.05, radius=0.1)
    base.timings = [0.0] * 6  # type: ignore[attr-defined]
    optimizer = CliplessDPOptimizer(
        model, base, noise_multiplier=1.0, sample_rate=0.2, dataset_size=200, accountant="rdp"
    )
    for number, batch in enumerate(PoissonBatches(data, sample_rate=0.2, steps=3)):
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        optimizer.step()
        base.timings.append(float(number))  # type: ignore[attr-defined]
    assert optimizer.steps_taken == 3


@pytest.mark.parametrize(("ours", "base", "settings"), PAIRS)
def test_parameters_that_are_frozen_later_have_no_shift_and_the_others_no_more_than_the_radius(
    ours: Any, base: Any, settings: dict[str, float]
) -> None:
    shifted = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(4)]
    optimizer = ours(shifted, lr=0.0, radius=0.5, **settings)
    for trained in shifted:
        for parameter in shifted:
            parameter.grad = torch.ones_like(parameter) if parameter is trained else None
        optimizer.step()
        assert torch.cat(shifted).norm().item() == pytest.approx(0.5)
        assert trained.norm().item() == pytest.approx(0.5)


def test_a_rate_below_zero_shifts_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = SharpnessAwareSGD([parameter], lr=0.1, radius=0.5)
    optimizer.param_groups[0].update(lr=-1.0, initial_lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize("kinds", [(SharpnessAwareAdam, SharpnessAwareSGD), (SharpnessAwareSGD, SharpnessAwareAdam)])
def test_the_state_of_the_other_class_is_refused_when_it_is_loaded(kinds: Any) -> None:
    one, other = (kind([nn.Parameter(torch.ones(2))], lr=0.1, radius=0.1) for kind in kinds)
    with pytest.raises(ConfigurationError, match="other settings"):
        other.load_state_dict(one.state_dict())
