"""Hooks of torch.optim and of noise sources, which see a step from part to part."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import deque
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from clipless_dp import (
    CliplessDPOptimizer,
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PrivacyError,
    PrivacyWarning,
    gradient_gated,
    losses,
)
from clipless_dp.noise import ReproducibleNoise, SystemNoise
from tests.support import EIGHT_ROWS, OwnSGD, gated_model, samples


class Fault(Exception):
    pass


class Source(SystemNoise):
    """Calls a function where a step begins to draw noise."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def begin_step(self, step):
        self.call()
        super().begin_step(step)


def with_gradients(hooks):
    """An optimizer whose gradients are those of a few samples, and functions that it calls by the names of places."""

    def call(place):
        return lambda *_: hooks.get(place, lambda: None)()

    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=0.1, noise=Source(call("noise")), **EIGHT_ROWS)
    optimizer.register_step_pre_hook(call("before"))
    optimizer.base_optimizer.register_step_pre_hook(call("update"))
    optimizer.base_optimizer.register_step_post_hook(call("projection"))
    optimizer.register_step_post_hook(call("after"))
    pass_rows(model)
    return optimizer


def pass_rows(model):
    inputs, targets = samples(8)
    model.loss(model(inputs), targets).backward()


def gradient(optimizer):
    return torch.cat([parameter.grad.flatten() for parameter in optimizer.model.net.parameters()])


def test_places_come_in_their_order_around_the_charge_and_the_noise():
    seen = []

    def note(place):
        return lambda: seen.append((place, len(optimizer.accountant), torch.equal(gradient(optimizer), exact)))

    optimizer = with_gradients({place: note(place) for place in ("before", "noise", "update", "projection", "after")})
    exact = gradient(optimizer).clone()
    optimizer.step()
    assert seen == [
        ("before", 0, True),
        ("noise", 1, True),
        ("update", 1, False),
        ("projection", 1, False),
        ("after", 1, False),
    ]


@pytest.mark.parametrize(
    ("place", "charged"), [("before", 0), ("noise", 1), ("update", 1), ("projection", 1), ("after", 1)]
)
def test_an_error_at_a_place_leaves_no_exact_gradient_behind_a_charge_and_all_weights_counted(place, charged):
    def fail():
        raise Fault

    hooks = {place: fail}
    optimizer = with_gradients(hooks)
    exact = gradient(optimizer).clone()
    with pytest.raises(Fault):
        optimizer.step()
    assert len(optimizer.accountant) == charged
    assert optimizer.weights_are_counted()
    if place == "noise":
        assert all(parameter.grad is None for parameter in optimizer.model.net.parameters())
    elif charged:
        assert not torch.equal(gradient(optimizer), exact)
    hooks.clear()
    optimizer.zero_grad()
    pass_rows(optimizer.model)
    if place in ("before", "noise"):
        # Gradients that were computed and not released are owed, until it is said that they are left out.
        optimizer.skip_draw()
        pass_rows(optimizer.model)
    optimizer.step()
    assert len(optimizer.accountant) == charged + 1
    assert optimizer.uncounted_changes == 0


def test_a_base_optimizer_steps_inside_of_private_steps_alone_however_many_are_around_it():
    model = gated_model()
    base = torch.optim.SGD(model.net.parameters(), lr=0.1)
    settings = {"noise_multiplier": 1.0, "sample_rate": 1.0, "dataset_size": 8, "accountant": "rdp", "sampling": "none"}
    with pytest.raises(ConfigurationError):
        CliplessDPOptimizer(model, base, **{**settings, "unit": "nobody"})
    base.step()
    first = CliplessDPOptimizer(model, base, **settings)
    second = CliplessDPOptimizer(model, base, **{**settings, "accountant": first.accountant})
    # A schedule wraps step(), and loaded states renew what pickles lack.
    torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    base.load_state_dict(base.state_dict())
    for optimizer in (first, second):
        pass_rows(model)
        with pytest.raises(PrivacyError, match="base optimizer of a private one"):
            base.step()
        optimizer.step()
    base.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(Fault))
    pass_rows(model)
    with pytest.raises(Fault):
        second.step()
    with pytest.raises(PrivacyError, match="base optimizer of a private one"):
        base.step()


def around(base_of):
    """A private optimizer around what a function makes of the parameters, with the gradients of a few samples."""
    model = gated_model()
    optimizer = CliplessDPOptimizer(model, base_of(list(model.net.parameters())), **EIGHT_ROWS)
    pass_rows(model)
    return model, optimizer


def weights(model):
    return [parameter.detach().clone() for parameter in model.net.parameters()]


def plain(model):
    inputs, targets = samples(8)
    return torch.nn.functional.cross_entropy(model.net(inputs), targets)


@pytest.mark.parametrize("of", ["net", "model", "copy", "before", "grad"])
@pytest.mark.parametrize("place", ["step", "before", "after"])
def test_a_base_optimizer_that_passes_batches_within_its_step_is_refused_before_they_reach_a_weight(of, place):
    """As GSAM does, which calls a closure of its own: its steps were those of the raw gradients."""

    def passes(*_):
        with torch.enable_grad():
            if of == "net":
                plain(model).backward()
            elif of == "model":
                pass_rows(model)
            elif of == "before":
                computed.backward()
            elif of == "grad":
                torch.autograd.grad(computed, list(model.net.parameters()))
            else:
                copies = {name: p.detach().clone().requires_grad_() for name, p in model.net.named_parameters()}
                inputs, targets = samples(8)
                outputs = torch.func.functional_call(model.net, copies, (inputs,))
                torch.nn.functional.cross_entropy(outputs, targets).backward()

    model, optimizer = around(lambda parameters: OwnSGD(parameters, passes if place == "step" else lambda base: None))
    if place == "before":
        optimizer.base_optimizer.register_step_pre_hook(passes)
    elif place == "after":
        optimizer.base_optimizer.register_step_post_hook(passes)
    # A graph that the update does not spoil.
    computed = sum((parameter * torch.full_like(parameter, 3.0)).sum() for parameter in model.net.parameters())
    released = []
    optimizer.base_optimizer.register_step_pre_hook(
        lambda *_: released.append([p.grad.clone() for p in model.net.parameters()])
    )
    start = weights(model)
    with pytest.raises(PrivacyError, match="computes gradients within its step"):
        optimizer.step()
    for old, new, parameter in zip(start, weights(model), model.net.parameters(), strict=True):
        assert torch.equal(old, new) == (place != "after")
        assert not parameter._backward_hooks
    if released:
        # No gradient has arrived at any parameter.
        found = [parameter.grad for parameter in model.net.parameters()]
        assert all(map(torch.equal, released[0], found))
    # Outside of the step gradients are computed as ever.
    optimizer.skip_draw()
    plain(model).backward()
    assert all(parameter.grad is not None for parameter in model.net.parameters())


def slope(model):
    """Of two passes without gradients, as MeZO's."""
    with torch.no_grad():
        return float(plain(model))


def slope_of_a_layer(model):
    with torch.no_grad():
        return float(
            next(part for part in model.net.modules() if isinstance(part, torch.nn.Linear))(torch.ones(6)).sum()
        )


def slope_along(model):
    """Of a pass in forward mode."""
    held = {name: parameter.detach() for name, parameter in model.net.named_parameters()}
    inputs, targets = samples(8)

    def loss(some):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model.net, some, (inputs,)), targets)

    return float(torch.func.jvp(loss, (held,), (held,))[1])


def slope_of_functions(model):
    held = {name: parameter.detach() for name, parameter in model.net.named_parameters()}
    return torch.func.grad(lambda some: sum(one.square().sum() for one in some.values()))(held)


@pytest.mark.parametrize("look", [slope, slope_of_a_layer, slope_along, slope_of_functions])
def test_a_base_optimizer_that_calls_the_network_without_gradients_is_refused_too(look):
    """A slope along one direction is a part of the gradient, and so is what a line search sees."""
    model, optimizer = around(lambda parameters: OwnSGD(parameters, lambda base: look(model)))
    start = weights(model)
    with pytest.raises(PrivacyError, match="calls the network or computes gradients within its step"):
        optimizer.step()
    assert all(map(torch.equal, start, weights(model)))
    # Outside of the step, and of other networks and threads, calls are free.
    optimizer.skip_draw()
    slope(model)
    pass_rows(model)


def test_calls_of_other_networks_and_of_other_threads_are_free_while_a_base_optimizer_steps():
    other = gated_model()

    def meanwhile(base):
        torch.nn.Linear(2, 2)(torch.ones(2))
        found = []
        thread = Thread(target=lambda: (pass_rows(other), found.append(slope(model))))
        thread.start()
        thread.join()
        assert found

    model, optimizer = around(lambda parameters: OwnSGD(parameters, meanwhile))
    optimizer.step()
    assert optimizer.steps_taken == 1
    assert other.register.passes


class Outer(torch.optim.Optimizer):
    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)

    def step(self, closure=None):
        self.inner.step()


def added_after_loading(base, group):
    base.load_state_dict(base.state_dict())
    base.add_param_group(group)


def assigned(base, group):
    base.param_groups = [*base.param_groups, {**base.param_groups[0], **group}]


@pytest.mark.parametrize(
    "add",
    [
        added_after_loading,
        assigned,
        lambda base, group: base.param_groups[0]["params"].extend(group["params"]),
        lambda base, group: base.register_step_pre_hook(lambda *_: base.add_param_group(group)),
    ],
    ids=["loaded", "assigned", "extended", "hook"],
)
def test_a_parameter_beside_the_network_that_the_base_optimizer_holds_by_now_is_not_stepped_on(add):
    model, optimizer = around(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    beside = torch.nn.Parameter(torch.ones(1))
    add(optimizer.base_optimizer, {"params": [beside]})
    beside.grad, start = torch.ones(1), weights(model)
    with pytest.raises(PrivacyError, match=r"not of model\.net"):
        optimizer.step()
    assert float(beside.detach()) == 1.0
    assert all(map(torch.equal, start, weights(model)))


def test_an_optimizer_within_the_base_one_steps_on_protected_parameters_within_private_steps_alone():
    model, optimizer = around(lambda parameters: Outer(torch.optim.SGD(parameters, lr=0.1)))
    inner = optimizer.base_optimizer.inner
    with pytest.raises(PrivacyError, match="base optimizer of a private one"):
        inner.step()
    optimizer.step()
    assert optimizer.steps_taken == 1
    beside = torch.nn.Parameter(torch.ones(1))
    inner.add_param_group({"params": [beside]})
    beside.grad = torch.ones(1)
    pass_rows(model)
    with pytest.raises(PrivacyError, match=r"not of model\.net"):
        optimizer.step()
    assert float(beside.detach()) == 1.0


def test_groups_and_state_are_those_of_the_base_optimizer_at_any_time():
    model, optimizer = around(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    base = optimizer.base_optimizer
    base.load_state_dict(base.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    start = weights(model)
    optimizer.step()
    assert all(map(torch.equal, start, weights(model)))
    assert optimizer.learning_rates == [((0.0,), 1)]
    assert optimizer.state is base.state
    assert optimizer.param_groups is base.param_groups
    optimizer.param_groups = [base.param_groups[0]]
    assert optimizer.param_groups is base.param_groups


@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_state_that_a_hook_of_the_base_step_asks_for_is_refused_with_where_to_ask_instead(place):
    model, optimizer = around(lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    register = getattr(optimizer.base_optimizer, f"register_step_{place}_hook")
    handle = register(lambda *_: optimizer.state_dict())
    with pytest.raises(PrivacyError, match="register_step_post_hook"):
        optimizer.step()
    # Its gradients had their noise by then.
    assert len(optimizer.accountant) == 1
    handle.remove()
    saved = []
    optimizer.register_step_post_hook(lambda *_: saved.append(optimizer.state_dict()))
    optimizer.zero_grad()
    pass_rows(model)
    optimizer.step()
    assert saved[0]["clipless_dp"]["steps_taken"] == optimizer.steps_taken == 2


class Curved(OwnSGD):
    """Keeps squares of gradients by a method of its own, as Sophia does."""

    def __init__(self, parameters):
        super().__init__(parameters, lambda base: None)

    @torch.no_grad()
    def update_hessian(self):
        for parameter in self.param_groups[0]["params"]:
            held = self.state[parameter]
            held["hessian"] = held.get("hessian", 0.0) + parameter.grad.square()


class CountsClearings(OwnSGD):
    """Writes to its state where gradients are cleared, of them too."""

    def __init__(self, parameters, keeps=False):
        super().__init__(parameters, lambda base: None)
        self.keeps = keeps

    def zero_grad(self, set_to_none=True):
        for parameter in self.param_groups[0]["params"]:
            held = self.state[parameter]
            held["cleared"] = held.get("cleared", 0) + 1
            if self.keeps and parameter.grad is not None:
                held["before"] = parameter.grad.clone()
        super().zero_grad(set_to_none)


class LooksWhereItClears(CountsClearings):
    """Computes gradients where it clears them, and keeps them."""

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        if self.look is not None:
            for parameter, gradient in zip(self.param_groups[0]["params"], self.look(), strict=True):
                self.state[parameter]["before"] = gradient


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_what_the_base_writes_where_gradients_are_cleared_is_refused(keeps, set_to_none):
    """Nothing tells whether these were private: a closure within may have computed others."""
    model, optimizer = around(lambda parameters: CountsClearings(parameters, keeps))
    optimizer.step()
    optimizer.zero_grad(set_to_none)
    pass_rows(model)
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()


def test_gradients_that_the_base_computes_where_it_clears_them_are_in_no_state_that_is_released():
    model, optimizer = around(LooksWhereItClears)
    base = optimizer.base_optimizer
    base.look = None
    optimizer.step()
    rows = torch.randn(4, *model.input_shape)
    base.look = lambda: torch.autograd.grad(model.net(rows).sum(), list(model.net.parameters()))
    optimizer.zero_grad()
    optimizer.skip_draw()
    base.look = None
    with pytest.warns(PrivacyWarning, match="left out of what is saved"):
        assert not optimizer.state_dict()["state"]
    pass_rows(model)
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()


def assign_momentum(base):
    for parameter in base.param_groups[0]["params"]:
        base.state[parameter]["momentum_buffer"] = parameter.grad.clone()


def add_to_momentum(base):
    for parameter in base.param_groups[0]["params"]:
        base.state[parameter]["momentum_buffer"].data.add_(parameter.grad)


def load_momentum(base):
    other = torch.optim.SGD([p for group in base.param_groups for p in group["params"]], lr=0.1, momentum=0.9)
    assign_momentum(other)
    base.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        (Curved, Curved.update_hessian),
        (None, assign_momentum),
        (None, add_to_momentum),
        (None, load_momentum),
    ],
    ids=["method", "assigned", "added", "loaded"],
)
def test_what_anything_but_a_private_step_has_written_to_the_state_of_the_base_optimizer_is_refused(kind, write):
    model, optimizer = around(kind or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)))
    optimizer.step()
    optimizer.zero_grad()
    pass_rows(model)
    write(optimizer.base_optimizer)
    start = weights(model)
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()
    assert all(map(torch.equal, start, weights(model)))
    assert len(optimizer.accountant) == 1
    # Another optimizer made around it does not forget.
    with pytest.raises(PrivacyError, match="not left by a private step"):
        CliplessDPOptimizer(model, optimizer.base_optimizer, **EIGHT_ROWS)
    optimizer.base_optimizer.state.clear()
    optimizer.skip_draw()
    pass_rows(model)
    optimizer.step()
    assert optimizer.steps_taken == 2


def test_a_state_that_private_steps_have_left_may_be_kept_reset_copied_and_loaded():
    model, optimizer = around(lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    base = optimizer.base_optimizer

    def step(some=optimizer):
        pass_rows(model)
        some.step()
        some.zero_grad()

    optimizer.step()
    optimizer.zero_grad()
    step(CliplessDPOptimizer(model, base, **{**EIGHT_ROWS, "accountant": optimizer.accountant}))
    optimizer.load_state_dict(optimizer.state_dict())
    step()
    base.load_state_dict(base.state_dict())
    step()
    kept = []
    for held in base.state.values():
        before = held["exp_avg"]
        held["exp_avg"] = before.clone()
        kept.append(before)
        held["exp_avg_sq"].zero_()
    step()
    base.state.clear()
    step()
    assert len(optimizer.accountant) == 6


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam]
)
def test_a_base_optimizer_that_has_stepped_before_is_refused_and_a_new_one_is_not(kind):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model = gated_model()
    base = kind(model.net.parameters(), lr=0.1, **options)
    CliplessDPOptimizer(model, base, **EIGHT_ROWS)
    base = kind(model.net.parameters(), lr=0.1, **options)
    plain(model).backward()
    base.step()
    with pytest.raises(PrivacyError, match="not left by a private step"):
        CliplessDPOptimizer(model, base, **EIGHT_ROWS)


class Unmade(torch.optim.Optimizer):
    """An optimizer whose class leaves out what torch's sets up, as a well-known Lookahead does."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state = inner, inner.param_groups, {}

    def step(self, closure=None):
        self.inner.step()


def test_an_optimizer_that_nothing_can_guard_is_refused_as_a_base_and_goes_around_a_private_one():
    model = gated_model()
    base = torch.optim.SGD(model.net.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="put it around the private one"):
        CliplessDPOptimizer(model, Unmade(base), **EIGHT_ROWS)
    private = CliplessDPOptimizer(model, base, **EIGHT_ROWS)
    pass_rows(model)
    Unmade(private).step()
    assert private.steps_taken == 1
    assert private.weights_are_counted()


class Free(OwnSGD):
    """Changes weights between those to train and those to predict with, as schedule-free optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, lambda base: None)
        self.reads = False

    @torch.no_grad()
    def train(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(2.0)

    @torch.no_grad()
    def eval(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.5)


def test_weights_that_a_base_optimizer_changes_for_predictions_are_counted():
    model, optimizer = around(Free)
    with pytest.raises(PrivacyError, match="between backward"):
        optimizer.train()
    optimizer.step()
    optimizer.zero_grad()
    for switch in (optimizer.eval, optimizer.train, optimizer.eval):
        switch()
        assert optimizer.weights_are_counted()
    pass_rows(model)
    optimizer.step()
    assert optimizer.uncounted_changes == 0
    assert not hasattr(around(lambda parameters: torch.optim.SGD(parameters, lr=0.1))[1], "train")


def attribute(base, parameter):
    base.held = {parameter: parameter.grad.clone()}


def of_parameter(base, parameter):
    parameter.hess = parameter.grad.clone()


def of_group(base, parameter):
    base.param_groups[0]["h"] = [parameter.grad.clone()]


def in_a_queue(base, parameter):
    base.state[parameter]["h"] = deque([parameter.grad.clone()])


def as_an_array(base, parameter):
    base.state[parameter]["h"] = parameter.grad.numpy().copy()


def in_an_object(base, parameter):
    base.state[parameter]["h"] = SimpleNamespace(of=parameter.grad.clone())


def of_the_inner(base, parameter):
    base.inner.state[parameter]["momentum_buffer"] = parameter.grad.clone()


@pytest.mark.parametrize(
    "write", [attribute, of_parameter, of_group, in_a_queue, as_an_array, in_an_object, of_the_inner]
)
def test_gradients_that_are_kept_beside_the_state_are_refused_too(write):
    inner = []

    def nested(parameters):
        inner.append(torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        return Outer(inner[0])

    model, optimizer = around(nested)
    optimizer.step()
    optimizer.zero_grad()
    pass_rows(model)
    base = optimizer.base_optimizer
    write(base, next(parameter for parameter in base.param_groups[0]["params"] if parameter.numel() > 1))
    start = weights(model)
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()
    assert all(map(torch.equal, start, weights(model)))
    assert len(optimizer.accountant) == 1


def test_an_optimizer_within_the_base_one_that_has_stepped_before_is_refused():
    model = gated_model()
    inner = torch.optim.SGD(model.net.parameters(), lr=0.1, momentum=0.9)
    plain(model).backward()
    inner.step()
    with pytest.raises(PrivacyError, match="not left by a private step"):
        CliplessDPOptimizer(model, Outer(inner), **EIGHT_ROWS)


class Keeping(OwnSGD):
    """Keeps tensors of its own in attributes, groups and parameters, and changes them in its step."""

    def __init__(self, parameters):
        super().__init__(parameters, Keeping.keep)
        self.directions = torch.randn(5, 5)

    def keep(self):
        for group in self.param_groups:
            group["mean"] = [parameter.grad.clone() for parameter in group["params"]]
            for parameter in group["params"]:
                parameter.before = parameter.grad.clone()
        self.everything = (deque([self.directions.mul_(0.9)]), np.ones(3) * self.directions[0, 0].item())


def test_what_a_step_leaves_beside_the_state_and_settings_of_schedules_are_free():
    model, optimizer = around(Keeping)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1 / optimizer.steps_taken)
        pass_rows(model)
    optimizer.step()
    assert optimizer.steps_taken == 4


@pytest.mark.parametrize("moved", ["moved", "loaded", "swapped"])
def test_a_state_that_is_moved_or_loaded_past_the_private_optimizer_is_refused_and_through_it_goes_on(moved):
    model, optimizer = around(lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    base = optimizer.base_optimizer
    optimizer.step()
    optimizer.zero_grad()
    kept = copy.deepcopy(optimizer.state_dict())
    if moved == "moved":
        for held in base.state.values():
            held.update({name: value.clone() for name, value in held.items()})
    elif moved == "swapped":
        for held in base.state.values():
            before = held["exp_avg"].clone()
            held["exp_avg"].zero_().add_(1.0)
            held["exp_avg"].copy_(before)
    else:
        base.load_state_dict(pickle.loads(pickle.dumps(base.state_dict())))
    pass_rows(model)
    # To compare all numbers at each step would cost a tenth of it.
    with pytest.raises(PrivacyError, match="load states into the private optimizer"):
        optimizer.step()
    optimizer.skip_draw()
    optimizer.zero_grad()
    optimizer.load_state_dict(kept)
    pass_rows(model)
    optimizer.step()
    assert optimizer.steps_taken == 2


def test_of_a_compiled_step_the_private_part_runs_as_it_is():
    model, optimizer = around(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    start = weights(model)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    step()
    assert optimizer.steps_taken == len(optimizer.accountant) == 1
    assert not all(map(torch.equal, start, weights(model)))


def way_of_training(make, backend, entries):
    """Weights and ledger behind two draws, of a loop whose every step is one function."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = gated_model()
    if make == "gradient-gated":
        net = gradient_gated(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)))
        model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    optimizer = CliplessDPSGD(model, lr=0.1, noise=ReproducibleNoise(1), **EIGHT_ROWS)

    def step(inputs, targets):
        optimizer.zero_grad()
        if entries == "accumulate":
            optimizer.accumulate((inputs, targets))
        else:
            model.loss(model(inputs), targets).backward()
        optimizer.step()

    run = step if backend is None else torch.compile(step, backend=backend)
    with warnings.catch_warnings():
        # Of torch's, about graphs that break.
        warnings.simplefilter("ignore")
        for seed in range(2):
            run(*samples(8, seed=seed))
    torch._dynamo.reset()
    return weights(model), optimizer.accountant.ledger.lines


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("entries", ["backward", "accumulate"])
@pytest.mark.parametrize("make", ["gated", pytest.param("gradient-gated", marks=pytest.mark.slow)])
def test_a_loop_that_is_compiled_as_a_whole_trains_and_charges_as_it_does_by_itself(make, entries, backend):
    (expected, of_itself), (found, charged) = (way_of_training(make, one, entries) for one in (None, backend))
    assert all(map(torch.allclose, expected, found))
    assert [(line.event, line.count) for line in charged] == [(line.event, line.count) for line in of_itself]


@pytest.mark.parametrize("name", ["zero_grad", "accumulate", "skip_draw"])
def test_no_graph_is_made_of_what_keeps_the_books_and_the_error_says_what_to_compile(name):
    torch._dynamo.reset()
    _, optimizer = around(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    given = (samples(8),) if name == "accumulate" else ()
    with pytest.raises(Exception, match="compile the model, or a function of the model and its loss"):
        torch.compile(lambda: getattr(optimizer, name)(*given), backend="eager", fullgraph=True)()


class Several(torch.optim.Optimizer):
    """Steps one optimizer for each layer, which it keeps in some container."""

    def __init__(self, parameters, keep, momentum=0.9):
        halves = parameters[:2], parameters[2:]
        self.parts = [torch.optim.SGD(half, lr=0.1, momentum=momentum) for half in halves if half]
        self.optimizers = keep(self.parts)
        del self.parts
        super().__init__(parameters, {})

    def step(self, closure=None):
        for one in parts_of(self):
            one.step()

    def load_state_dict(self, state_dict):
        for one, state in zip(parts_of(self), state_dict.pop("parts"), strict=True):
            one.load_state_dict(state)
        super().load_state_dict(state_dict)

    def state_dict(self):
        return {**super().state_dict(), "parts": [one.state_dict() for one in parts_of(self)]}


def parts_of(base):
    found, left = [], [base.optimizers]
    while left:
        one = left.pop(0)
        if isinstance(one, torch.optim.Optimizer):
            found.append(one)
        else:
            left += one.values() if isinstance(one, dict) else one
    return found


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "queue": deque,
    "mapping": lambda parts: {str(index): one for index, one in enumerate(parts)},
    "lists of mappings": lambda parts: [{"of": (one,)} for one in parts],
    "sets": frozenset,
}


@pytest.mark.parametrize("keep", CONTAINERS.values(), ids=CONTAINERS)
def test_optimizers_in_containers_of_the_base_one_are_guarded_as_it_is_itself(keep):
    model, optimizer = around(lambda parameters: Several(parameters, keep))
    base = optimizer.base_optimizer
    first, *_ = parts_of(base)
    with pytest.raises(PrivacyError, match="base optimizer of a private one"):
        first.step()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.weights_are_counted()
    pass_rows(model)
    assign_momentum(first)
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()
    first.state.clear()
    optimizer.skip_draw()
    pass_rows(model)
    beside = torch.nn.Parameter(torch.ones(1))
    first.add_param_group({"params": [beside]})
    beside.grad = torch.ones(1)
    with pytest.raises(PrivacyError, match=r"not of model\.net"):
        optimizer.step()
    assert float(beside.detach()) == 1.0


def test_optimizers_in_a_list_that_have_stepped_before_or_are_put_there_later_are_no_way_around():
    model = gated_model()
    base = Several(list(model.net.parameters()), list)
    plain(model).backward()
    base.optimizers[0].step()
    with pytest.raises(PrivacyError, match="not left by a private step"):
        CliplessDPOptimizer(model, base, **EIGHT_ROWS)
    model, optimizer = around(lambda parameters: Several(parameters, list))
    late = torch.optim.SGD(model.net.parameters(), lr=0.1, momentum=0.9)
    optimizer.base_optimizer.optimizers.append(late)
    optimizer.step()
    pass_rows(model)
    with pytest.raises(PrivacyError, match="base optimizer of a private one"):
        late.step()


def test_a_base_optimizer_that_loads_those_within_it_goes_on_from_a_state_and_a_ring_of_them_ends():
    model, optimizer = around(lambda parameters: Several(parameters, list))
    optimizer.base_optimizer.optimizers[0].around = optimizer.base_optimizer.optimizers
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        pass_rows(model)
    optimizer.step()
    assert optimizer.steps_taken == 3


def in_a_parameter_list(base, parameter):
    base.held = torch.nn.ParameterList([parameter.grad.clone()])


def in_a_parameter_dict(base, parameter):
    base.held = torch.nn.ParameterDict({"a": parameter.grad.clone()})


def momentum_of_the_inner(base, parameter):
    assign_momentum(base.inner)


BESIDE = [attribute, of_parameter, in_a_parameter_list, in_a_parameter_dict, momentum_of_the_inner]


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("write", BESIDE)
def test_a_state_that_is_loaded_behind_a_pass_vouches_for_nothing_beside_it(write, loaded):
    model, optimizer = around(lambda parameters: Outer(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)))
    optimizer.step()
    optimizer.zero_grad()
    kept = copy.deepcopy(optimizer.state_dict())
    pass_rows(model)
    base = optimizer.base_optimizer
    write(base, next(parameter for parameter in base.param_groups[0]["params"] if parameter.numel() > 1))
    if loaded:
        # Twice: the first one makes it no part of what was there before.
        optimizer.load_state_dict(copy.deepcopy(kept))
        optimizer.load_state_dict(copy.deepcopy(kept))
    start = weights(model)
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()
    assert all(map(torch.equal, start, weights(model)))
    # Nor when the gradients are gone by then.
    optimizer.skip_draw()
    optimizer.zero_grad()
    optimizer.load_state_dict(kept)
    pass_rows(model)
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()


def test_what_is_called_while_a_state_is_loaded_sees_no_gradients_and_leaves_them():
    model, optimizer = around(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    kept, seen = optimizer.state_dict(), []
    optimizer.base_optimizer.register_load_state_dict_post_hook(
        lambda base: seen.extend(parameter.grad for group in base.param_groups for parameter in group["params"])
    )
    before = gradient(optimizer).clone()
    optimizer.load_state_dict(kept)
    assert seen == [None] * len(list(model.net.parameters()))
    assert torch.equal(gradient(optimizer), before)
    optimizer.step()
    assert optimizer.steps_taken == 1


def number_of_numpy(base, parameter):
    base.state[parameter]["h"] = np.float32(parameter.grad.norm())


@pytest.mark.parametrize("write", [number_of_numpy, in_a_parameter_list, in_a_parameter_dict])
def test_numbers_of_numpy_in_the_state_and_lists_of_parameters_are_looked_at(write):
    _model, optimizer = around(Curved)
    base = optimizer.base_optimizer
    write(base, next(parameter for parameter in base.param_groups[0]["params"] if parameter.numel() > 1))
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()


FLIPS = {
    "a hook": lambda base: base.register_step_post_hook(lambda *_: None),
    "a hook of all": lambda base: register_optimizer_step_post_hook(lambda *_: None),
    "a schedule": lambda base: torch.optim.lr_scheduler.StepLR(base, 5),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("flip", FLIPS)
def test_tensors_from_before_are_free_when_code_comes_into_steps_later_and_later_ones_are_not(flip, late):
    model = gated_model()
    for parameter in model.net.parameters():
        parameter.start = parameter.detach().clone()
    groups = [{"params": list(model.net.parameters()), "mask": torch.rand(5)}]
    base = torch.optim.SGD(groups, lr=0.1)
    base.anchors = [parameter.detach().clone() for parameter in model.net.parameters()]
    optimizer = CliplessDPOptimizer(model, base, **EIGHT_ROWS)

    def step():
        pass_rows(model)
        optimizer.step()
        optimizer.zero_grad()

    step()
    if late:
        # A plain step, and a state that is loaded, do not make it theirs.
        pass_rows(model)
        of_parameter(base, max(model.net.parameters(), key=torch.Tensor.numel))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    handle = FLIPS[flip](base)
    try:
        if late:
            with pytest.raises(PrivacyError, match="not left by a private step"):
                step()
        else:
            step()
            step()
    finally:
        if handle is not None and hasattr(handle, "remove"):
            handle.remove()
    if not late:
        step()
        assert optimizer.steps_taken == 4


SETTINGS_OF_TORCH = [
    (torch.optim.SGD, "lr"),
    (torch.optim.Adam, "lr"),
    (torch.optim.Adam, "betas"),
    (torch.optim.AdamW, "weight_decay"),
    (torch.optim.RMSprop, "eps"),
]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("kind", "name"), SETTINGS_OF_TORCH)
def test_a_setting_of_several_numbers_is_refused_before_anything_is_charged(kind, name, inner):
    model, optimizer = around(
        lambda parameters: Outer(kind(parameters, lr=0.1)) if inner else kind(parameters, lr=0.1, foreach=False)
    )
    group = optimizer.param_groups[0]
    before, several = group[name], group["params"][0].grad.abs().clone()
    group[name] = (0.9, several) if name == "betas" else several
    start = weights(model)
    with pytest.raises(ConfigurationError, match=f"{name} of parameter group 0 is not one number"):
        optimizer.step()
    with pytest.raises(ConfigurationError, match=f"{name} of parameter group 0 is not one number"):
        CliplessDPOptimizer(model, optimizer.base_optimizer, **EIGHT_ROWS)
    assert len(optimizer.accountant) == 0
    assert all(map(torch.equal, start, weights(model)))
    group[name] = before
    group["mask"] = None
    optimizer.skip_draw()
    pass_rows(model)
    optimizer.step()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
@pytest.mark.parametrize("inner", [False, True])
def test_what_a_grad_scaler_leaves_on_the_base_optimizer_is_refused_before_anything_is_charged(name, inner):
    """Fused optimizers of torch's skip their step by it, or divide gradients."""
    model, optimizer = around(
        lambda parameters: (lambda one: Outer(one) if inner else one)(torch.optim.Adam(parameters, fused=True))
    )
    base = optimizer.base_optimizer
    base = base.inner if inner else base
    setattr(base, name, torch.tensor(1.0))
    start = weights(model)
    with pytest.raises(PrivacyError, match=f"{name} is set on the base optimizer"):
        optimizer.step()
    assert len(optimizer.accountant) == 0
    assert all(map(torch.equal, start, weights(model)))
    setattr(base, name, None)
    optimizer.skip_draw()
    pass_rows(model)
    optimizer.step()
    assert not all(map(torch.equal, start, weights(model)))
