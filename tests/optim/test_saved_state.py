"""States that something else than private steps has written to are saved by nobody and vouched for by no load."""

from __future__ import annotations

import copy
import io
import warnings
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipless_dp import (
    CliplessDPOptimizer,
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    PrivacyError,
    PrivacyWarning,
    gated,
    losses,
)
from clipless_dp.constraints import Spectral
from clipless_dp.optim import AdamBC, SharpnessAwareAdam, SharpnessAwareSGD, base_state
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
def test_a_state_that_is_loaded_between_passes_and_step_holds_no_raw_gradients(when: str) -> None:
    model, base, optimizer = begun()
    for parameter in model.net.parameters():
        base.state[parameter]["hessian"] = torch.zeros_like(parameter)
    step(optimizer)
    saved = optimizer.state_dict()

    def between() -> None:
        base.update_hessian()
        optimizer.load_state_dict(saved if when == "before" else optimizer.state_dict())

    if when == "before":
        # A copy, in which they are not; statements tell that a state was loaded behind a pass.
        step(optimizer, between)
        assert optimizer.uncounted_changes == 1
    else:
        # All of it was left out, and what is cleared behind a pass may be a choice by what came in.
        with pytest.raises(PrivacyError, match="cleared between a pass and its step"):
            step(optimizer, between)
    assert base.held() == 0.0


@pytest.mark.parametrize("clear", ["momentum", "all", "parameters"])
def test_what_is_cleared_behind_a_pass_is_refused_and_what_is_cleared_before_it_is_not(clear: str) -> None:
    _, base, optimizer = begun()

    def change() -> None:
        if clear == "all":
            base.state.clear()
        elif clear == "momentum":
            for state in base.state.values():
                state["momentum_buffer"].zero_()
        else:
            group = base.param_groups[0]
            group["params"] = group["params"][:-1]

    with pytest.raises(PrivacyError, match="between a pass and its step"):
        step(optimizer, change)
    _, base, optimizer = begun()
    change()
    step(optimizer)
    step(optimizer)
    assert optimizer.steps_taken == 3


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


def hold_hessians(base: Sophia) -> None:
    """As after a step that has kept them, without raw gradients."""
    for parameter in base.param_groups[0]["params"]:
        base.state[parameter]["hessian"] = torch.zeros_like(parameter)


@pytest.mark.parametrize("way", ["saved late", "loaded into a new one", "loaded after a clear"])
def test_a_state_that_was_taken_before_raw_gradients_came_in_stays_as_it_was(way: str) -> None:
    model = gated_model()
    base = Sophia(model.net.parameters(), lr=0.1, momentum=0.9)
    hold_hessians(base)
    optimizer = private(model, base)
    step(optimizer)
    taken = optimizer.state_dict()
    for batch in PoissonBatches(DATA, sample_rate=0.2, steps=1):
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        base.update_hessian()
    assert base.held() > 0.0
    if way == "loaded after a clear":
        base.state.clear()
        optimizer.load_state_dict(taken)
        assert base.held() == 0.0
        return
    if way == "saved late":
        file = io.BytesIO()
        torch.save(taken, file)
        file.seek(0)
        taken = torch.load(file, weights_only=True)
    other = gated_model()
    again = Sophia(other.net.parameters(), lr=0.1, momentum=0.9)
    private(other, again).load_state_dict(taken)
    assert again.held() == 0.0


def test_numbers_in_a_group_that_are_no_few_are_not_saved_where_the_state_is_left_out() -> None:
    _, base, optimizer = begun()
    for batch in PoissonBatches(DATA, sample_rate=0.2, steps=1):
        optimizer.model.loss(optimizer.model(batch.inputs), batch.targets, batch.mask).backward()
    base.param_groups[0]["kept"] = [parameter.grad.flatten().tolist() for parameter in base.param_groups[0]["params"]]
    with pytest.warns(PrivacyWarning, match="left out"):
        group = optimizer.state_dict()["param_groups"][0]
    assert "kept" not in group
    assert group["lr"] == 0.1
    assert group["params"]


def test_a_state_that_was_put_beside_another_ledger_is_refused_and_nothing_is_loaded() -> None:
    _, base, optimizer = begun()
    saved = copy.deepcopy(optimizer.state_dict())
    step(optimizer)
    other = private(model := gated_model(), Sophia(model.net.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(ConfigurationError, match="not what was saved beside its ledger"):
        other.load_state_dict({**base.state_dict(), "clipless_dp": saved["clipless_dp"]})
    assert not other.accountant.ledger
    # Settings of groups may change, and a former version tells no digest.
    saved["param_groups"][0]["lr"] = 0.01
    del saved["clipless_dp"]["state"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.01


CLASSES = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
    "Adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=0.1),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
    "Adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.1),
    "RAdam": lambda parameters: torch.optim.RAdam(parameters, lr=0.1),
}
ALIKE = [("Adam", "AdamW"), ("AdamW", "Adam"), ("Adam", "RAdam"), ("AdamW", "RAdam")]
"""Of the first of which the second reads all that it needs."""


@pytest.mark.parametrize("loading", CLASSES)
@pytest.mark.parametrize("saving", CLASSES)
def test_the_state_of_another_class_is_refused_before_anything_is_loaded_or_runs(saving: str, loading: str) -> None:
    first, second = gated_model(), gated_model()
    optimizer = private(first, CLASSES[saving](first.net.parameters()))
    step(optimizer)
    other = private(second, CLASSES[loading](second.net.parameters()))
    if saving != loading and (saving, loading) not in ALIKE:
        with pytest.raises(ConfigurationError, match="state of another optimizer"):
            other.load_state_dict(optimizer.state_dict())
        assert not other.accountant.ledger
        return
    other.load_state_dict(optimizer.state_dict())
    assert other.steps_taken == 1
    step(other)
    assert other.steps_taken == 2


class Curvature:
    """What no pytree opens."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Objects(Sophia):
    """Keeps its curvature in objects, or in arrays."""

    make: Any = Curvature

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["curvature"] = self.make(parameter.grad.clone())

    def update_hessian(self) -> None:
        for parameter, state in self.state.items():
            held = state["curvature"]
            (held.value if isinstance(held, Curvature) else torch.from_numpy(held)).copy_(parameter.grad)


def found_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [one for part in value.values() for one in found_in(part)]
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in found_in(part)]
    if isinstance(value, Curvature):
        return found_in(value.value)
    array = isinstance(value, np.ndarray)
    return [torch.from_numpy(value)] if array else [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("make", [Curvature, lambda value: value.numpy()], ids=["objects", "arrays"])
def test_what_is_written_after_a_state_was_handed_out_is_not_in_it(make: Any) -> None:
    model = gated_model()
    base = Objects(model.net.parameters(), lr=0.1)
    base.make = make
    optimizer = private(model, base)
    step(optimizer)
    saved, raw = optimizer.state_dict(), []
    assert len(found_in(saved["state"])) == 4

    def between() -> None:
        base.update_hessian()
        raw.extend(parameter.grad.clone() for parameter in model.net.parameters())

    with pytest.raises(PrivacyError, match="curvature"):
        step(optimizer, between)
    kept = found_in(saved["state"])
    assert not any(one.shape == other.shape and torch.equal(one, other) for one in kept for other in raw)
    # Nor is what was altered vouched for.
    kept[0].add_(1.0)
    with pytest.raises(ConfigurationError, match="not what was saved beside its ledger"):
        optimizer.load_state_dict(saved)


class Previous(torch.optim.SGD):
    """Keeps the gradients of its last step, which are private, as they are."""

    where: str = "group"

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            last = [parameter.grad for parameter in group["params"]]
            if self.where == "group":
                group["last"] = last
            elif self.where == "attribute":
                self.last = last
            else:
                for parameter in group["params"]:
                    parameter.last = parameter.grad


@pytest.mark.parametrize("where", ["group", "attribute", "attribute of a parameter"])
@pytest.mark.parametrize("to_none", [True, False])
def test_they_may_be_kept_where_gradients_are_cleared_between_forward_and_backward(where: str, to_none: bool) -> None:
    model = gated_model()
    base = Previous(model.net.parameters(), lr=0.1)
    base.where = where
    optimizer = private(model, base)
    for batch in PoissonBatches(DATA, sample_rate=0.2, steps=4):
        value = model.loss(model(batch.inputs), batch.targets, batch.mask)
        optimizer.zero_grad(set_to_none=to_none)
        value.backward()
        optimizer.step()
    assert optimizer.steps_taken == 4


@pytest.mark.parametrize("where", ["group", "attribute", "attribute of a parameter"])
def test_gradients_of_the_last_step_may_be_kept_and_those_of_a_pass_are_not_saved(where: str) -> None:
    model = gated_model()
    base = Previous(model.net.parameters(), lr=0.1)
    base.where = where
    optimizer = private(model, base)
    for _ in range(3):
        step(optimizer)
    assert optimizer.steps_taken == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        honest = optimizer.state_dict()
    assert ("last" in honest["param_groups"][0]) == (where == "group")
    batch = next(iter(PoissonBatches(DATA, sample_rate=0.2, steps=1)))
    # What is kept is the very tensor that the next pass fills.
    optimizer.zero_grad(set_to_none=False)
    model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
    raw = [parameter.grad.clone() for parameter in model.net.parameters()]
    with pytest.warns(PrivacyWarning, match="left out of what is saved"):
        saved = optimizer.state_dict()
    assert not any(torch.equal(one, other) for one in found_in(saved) for other in raw if one.shape == other.shape)


OF_TORCH = (
    "SGD", "ASGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adadelta", "Adagrad", "RMSprop", "Rprop", "Adafactor",
)  # fmt: skip
KNOWN = {
    **{name: partial(getattr(torch.optim, name), lr=0.01) for name in OF_TORCH if hasattr(torch.optim, name)},
    "AdamBC": partial(AdamBC, lr=0.01),
    "SharpnessAwareSGD": partial(SharpnessAwareSGD, lr=0.01, radius=0.05),
    "SharpnessAwareAdam": partial(SharpnessAwareAdam, lr=0.01, radius=0.05),
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_optimizer_that_is_known_goes_on_from_its_own_state(name: str) -> None:
    model, again = gated_model(), gated_model()
    optimizer = private(model, KNOWN[name](model.net.parameters()))
    step(optimizer)
    again.net.load_state_dict(model.net.state_dict())
    resumed = private(again, KNOWN[name](again.net.parameters()))
    resumed.load_state_dict(optimizer.state_dict())
    step(resumed)
    assert resumed.steps_taken == 2


def assert_refused_before_the_ledger(name: str, other: DPLipModel, loading: str, message: str) -> None:
    """Of one optimizer's state, when another one that is around another model loads it."""
    model = gated_model()
    optimizer = private(model, KNOWN[name](model.net.parameters()))
    step(optimizer)
    fresh = private(other, KNOWN[loading](other.net.parameters()))
    with pytest.raises(ConfigurationError, match=message):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.accountant.ledger


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "SGD"])
def test_states_of_other_shapes_are_refused_before_the_ledger_is_known(name: str) -> None:
    narrow = gated(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    other = DPLipModel(narrow, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    assert_refused_before_the_ledger(name, other, name, "of another network")


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD"])
@pytest.mark.parametrize("loading", ["AdamBC", "Adafactor"])
def test_ours_and_adafactor_refuse_other_states_before_the_ledger_is_known(name: str, loading: str) -> None:
    if loading not in KNOWN:
        pytest.skip("this torch has no Adafactor")
    assert_refused_before_the_ledger(name, gated_model(), loading, "state of another optimizer")


@pytest.mark.parametrize("where", ["an attribute", "an inner optimizer"])
def test_what_is_cleared_beside_the_state_behind_a_pass_is_refused(where: str) -> None:
    class Beside(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.slow = [torch.ones(3)]
            self.inner = torch.optim.Adam([parameter for group in self.param_groups for parameter in group["params"]])

        def step(self, closure: Any = None) -> None:
            self.inner.step()
            self.slow = [one + 1.0 for one in self.slow]

    model = gated_model()
    base = Beside(model.net.parameters())
    optimizer = private(model, base)
    step(optimizer)

    def clear() -> None:
        if where == "an attribute":
            base.slow[0].zero_()
        else:
            base.inner.state.clear()

    with pytest.raises(PrivacyError, match="between a pass and its step"):
        step(optimizer, clear)


def test_what_is_cleared_between_micro_batches_is_refused() -> None:
    _, base, optimizer = begun()
    for batch in PoissonBatches(DATA, sample_rate=0.2, steps=1):
        first, *others = batch.split(7)
        optimizer.zero_grad()
        optimizer.accumulate(first)
        for state in base.state.values():
            state["momentum_buffer"].zero_()
        for other in others:
            optimizer.accumulate(other)
        with pytest.raises(PrivacyError, match="between a pass and its step"):
            optimizer.step()


class MadeOfAdam(torch.optim.Adam):
    """As one with a schedule or a log of its own."""


@pytest.mark.parametrize("made", [CLASSES["Adam"], MadeOfAdam])
def test_a_state_of_another_width_is_refused_before_anything_is_loaded(made: Any) -> None:
    first = gated_model()
    narrow = gated(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    second = DPLipModel(narrow, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    optimizer = private(first, made(first.net.parameters()))
    step(optimizer)
    other = private(second, made(second.net.parameters()))
    with pytest.raises(ConfigurationError, match="of another network"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.accountant.ledger


@pytest.mark.parametrize("setting", ["differentiable", "capturable"])
def test_a_setting_that_fails_within_a_step_of_torchs_is_refused_before_the_charge(setting: str) -> None:
    model = gated_model()
    with pytest.raises(ConfigurationError, match=setting):
        private(model, torch.optim.Adam(model.net.parameters(), lr=0.1, **{setting: True}))


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("SGD", "lr", None),
        ("Adam", "eps", None),
        ("Adam", "betas", (None, 0.999)),
        ("Adam", "betas", (Fraction(9, 10), 0.999)),
        ("RMSprop", "momentum", None),
        ("Adam", "weight_decay", Decimal("0.1")),
    ],
)
def test_a_setting_that_torch_cannot_compute_with_is_refused_before_the_charge(
    kind: str, setting: str, value: object
) -> None:
    model = gated_model()
    optimizer = private(model, getattr(torch.optim, kind)(model.net.parameters(), lr=0.1))
    step(optimizer)
    optimizer.param_groups[0][setting] = value
    charged = len(optimizer.accountant.ledger)
    with pytest.raises(ConfigurationError, match=setting):
        step(optimizer)
    assert len(optimizer.accountant.ledger) == charged


@pytest.mark.parametrize(("setting", "value"), [("foreach", None), ("maximize", None), ("eps", (None, 1e-3))])
def test_a_setting_that_is_nothing_by_default_may_be_nothing(setting: str, value: object) -> None:
    model = gated_model()
    kind = torch.optim.Adafactor if setting == "eps" else torch.optim.SGD
    optimizer = private(model, kind(model.net.parameters(), lr=0.1))
    optimizer.param_groups[0][setting] = value
    step(optimizer)
    assert optimizer.steps_taken == 1


def test_an_accumulator_that_begins_from_a_setting_is_new_also_for_parameters_of_one_entry() -> None:
    net = nn.Sequential(nn.Linear(6, 1))
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.BinaryCrossEntropy(), constraint=Spectral())
    base = torch.optim.Adagrad(net.parameters(), lr=0.1, initial_accumulator_value=0.1)
    assert not base_state.has_stepped(base)
    private(model, base)
    other = torch.optim.Adagrad(net.parameters(), lr=0.1, initial_accumulator_value=0.1)
    other.state[net[0].bias]["sum"].fill_(0.2)
    assert base_state.has_stepped(other)
    with pytest.raises(PrivacyError, match="sum"):
        private(model, other)


def test_momentum_of_one_number_throughout_from_raw_steps_is_no_beginning() -> None:
    net = nn.Sequential(nn.Linear(6, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0), constraint=Spectral())
    base = torch.optim.SGD([net[0].bias], lr=0.0, momentum=0.9)
    (100.0 * net(DATA[0]).sum()).backward()
    base.step()
    net.zero_grad()
    with pytest.raises(PrivacyError, match="momentum_buffer"):
        private(model, base)


def test_behind_a_refused_step_and_a_skipped_draw_momentum_may_be_cleared() -> None:
    model, base, optimizer = begun()
    for step_number, batch in enumerate(PoissonBatches(DATA, sample_rate=0.2, steps=3)):
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        if step_number == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            with pytest.raises(PrivacyError):
                optimizer.step()
            optimizer.skip_draw()
            base.state.clear()
        else:
            optimizer.step()
    assert optimizer.skipped_draws == 1
