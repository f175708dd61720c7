"""States that something else than private steps has written to are saved by nobody and vouched for by no load."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from clipless_dp import CliplessDPOptimizer, DPLipModel, PoissonBatches, PrivacyError, PrivacyWarning, losses
from clipless_dp.constraints import Spectral
from tests.support import gated_model, samples

DATA = samples(200)


class Sophia(torch.optim.SGD):
    """SGD with a curvature that is made of gradients as they are."""

    @torch.no_grad()
    def update_hessian(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    held = self.state[parameter].setdefault("hessian", torch.zeros_like(parameter))
                    held.mul_(0.9).addcmul_(parameter.grad, parameter.grad)

    def held(self) -> float:
        return sum(float(state["hessian"].abs().sum()) for state in self.state.values() if "hessian" in state)


def private(model: DPLipModel, base: torch.optim.Optimizer) -> CliplessDPOptimizer:
    return CliplessDPOptimizer(model, base, noise_multiplier=1.0, sample_rate=0.2, dataset_size=200, accountant="rdp")


def step(optimizer: CliplessDPOptimizer, between: Any = None) -> None:
    for batch in PoissonBatches(DATA, sample_rate=0.2, steps=1):
        optimizer.zero_grad()
        optimizer.model.loss(optimizer.model(batch.inputs), batch.targets, batch.mask).backward()
        if between is not None:
            between()
        optimizer.step()


def begun() -> tuple[DPLipModel, Sophia, CliplessDPOptimizer]:
    model = gated_model()
    base = Sophia(model.net.parameters(), lr=0.1, momentum=0.9)
    optimizer = private(model, base)
    step(optimizer)
    return model, base, optimizer


@pytest.mark.parametrize("when", ["after the step is refused", "between"])
def test_a_checkpoint_of_a_state_that_raw_gradients_made_holds_its_ledger_and_not_the_state(when: str) -> None:
    model, base, optimizer = begun()
    saved: dict[str, Any] = {}

    def between() -> None:
        base.update_hessian()
        if when == "between":
            with pytest.warns(PrivacyWarning, match="left out of what is saved"):
                saved.update(copy.deepcopy(optimizer.state_dict()))

    with pytest.raises(PrivacyError, match="hessian"):
        step(optimizer, between)
    if when != "between":
        with pytest.warns(PrivacyWarning, match="left out of what is saved"):
            saved.update(copy.deepcopy(optimizer.state_dict()))
    fresh = gated_model()
    fresh.net.load_state_dict(model.net.state_dict())
    base = Sophia(fresh.net.parameters(), lr=1.0)
    resumed = private(fresh, base)
    resumed.load_state_dict(saved)
    assert (base.held(), base.param_groups[0]["lr"], base.param_groups[0]["momentum"]) == (0.0, 0.1, 0.9)
    assert resumed.steps_taken == len(resumed.accountant) == 1
    step(resumed)
    assert base.held() == 0.0


@pytest.mark.filterwarnings("ignore:the state of the base optimizer:clipless_dp.PrivacyWarning")
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_state_that_shares_its_tensors_with_the_optimizer_vouches_for_nothing(when: str) -> None:
    model, base, optimizer = begun()
    for parameter in model.net.parameters():
        base.state[parameter]["hessian"] = torch.zeros_like(parameter)
    step(optimizer)
    saved = optimizer.state_dict()

    def between() -> None:
        base.update_hessian()
        optimizer.load_state_dict(saved if when == "before" else optimizer.state_dict())

    if when == "before":
        with pytest.raises(PrivacyError, match="hessian"):
            step(optimizer, between)
    else:
        step(optimizer, between)
        assert base.held() == 0.0


def test_momentum_of_a_parameter_of_one_entry_is_no_beginning() -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    model = DPLipModel(net, input_shape=(1,), input_norm=2.0, loss=losses.BinaryCrossEntropy(), constraint=Spectral())
    base = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    (100.0 * net(DATA[0][:, :1]).sum()).backward()
    base.step()
    base.zero_grad()
    with pytest.raises(PrivacyError, match="momentum_buffer"):
        private(model, base)


def test_a_state_of_private_steps_is_saved_whole_and_goes_on() -> None:
    model, base, optimizer = begun()
    saved = copy.deepcopy(optimizer.state_dict())
    other = private(model, Sophia(model.net.parameters(), lr=0.1, momentum=0.9))
    other.load_state_dict(saved)
    for parameter in model.net.parameters():
        momentum = other.base_optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, base.state[parameter]["momentum_buffer"])
    step(other)
