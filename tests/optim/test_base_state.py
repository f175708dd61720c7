"""Ways in which a base optimizer may keep what it saw between a backward pass and a step, and honest ones beside."""

from __future__ import annotations

import copy
import functools
import weakref
from collections import ChainMap, UserDict, UserList, deque
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

from clipless_dp import CliplessDPOptimizer, ConfigurationError, PrivacyError
from tests.support import EIGHT_ROWS, OwnSGD, gated_model, samples


def private(base_of=OwnSGD):
    model = gated_model()
    return model, CliplessDPOptimizer(model, base_of(list(model.net.parameters())), **EIGHT_ROWS)


def pass_rows(model):
    inputs, targets = samples(8)
    model.loss(model(inputs), targets).backward()


def step(model, optimizer):
    pass_rows(model)
    optimizer.step()
    optimizer.zero_grad()


def largest(base):
    return max((one for group in base.param_groups for one in group["params"]), key=torch.Tensor.numel)


def buffer_of(gradient):
    module = nn.Module()
    module.register_buffer("kept", gradient)
    return nn.Sequential(module)


def attribute_of(gradient):
    module = nn.Module()
    module.kept = [gradient]
    return module


def beside(gradient, name):
    other = torch.zeros_like(gradient)
    setattr(other, name, gradient)
    return other


def objects(gradient):
    array = np.empty(2, dtype=object)
    array[0] = gradient
    return array


NUMPY = {
    "complex": lambda gradient: np.fft.fft(gradient.numpy().ravel()),
    "structured": lambda gradient: gradient.numpy().ravel().view([("of", "f4")]).copy(),
    "times": lambda gradient: gradient.numpy().ravel().astype("f8").view("M8[s]"),
    "of bytes": lambda gradient: gradient.numpy().ravel().view("S4").copy(),
    "one record": lambda gradient: gradient.numpy().ravel().view(f"V{4 * gradient.numel()}")[0],
    "objects": objects,
}
BYTES = {
    "bytes": lambda gradient: gradient.numpy().tobytes(),
    "a bytearray": lambda gradient: bytearray(gradient.numpy().tobytes()),
    "a view of memory": lambda gradient: memoryview(gradient.numpy().tobytes()),
}
PYTHON = {
    "numbers": lambda gradient: gradient.tolist(),
    "complex numbers": lambda gradient: [complex(one) for one in gradient.flatten()],
    "numbers of torch": lambda gradient: list(gradient.flatten().unbind()),
    "a mapping of numbers": lambda gradient: {str(place): float(one) for place, one in enumerate(gradient.flatten())},
    "values of a mapping": lambda gradient: {"of": gradient}.values(),
    "items of a mapping": lambda gradient: {"of": gradient}.items(),
    "keys of a mapping": lambda gradient: {gradient: 1},
    "a list of one's own": lambda gradient: UserList([gradient]),
    "a mapping of one's own": lambda gradient: UserDict(of=gradient),
    "a mapping of mappings": lambda gradient: ChainMap({"of": gradient}),
    "a view of a mapping": lambda gradient: MappingProxyType({"of": gradient}),
    "a bound method": lambda gradient: gradient.clone,
    "a method of a list": lambda gradient: [gradient].pop,
    "a special method of a list": lambda gradient: [gradient].__iter__,
    "an argument": lambda gradient: functools.partial(torch.add, other=gradient),
    "all of these": lambda gradient: [{"of": (deque([UserList([gradient.numpy().tobytes()])]),)}],
}
TORCH = {
    "complex": lambda gradient: torch.complex(gradient, gradient),
    "sparse": torch.Tensor.to_sparse,
    "compressed": torch.Tensor.to_sparse_csr,
    "quantised": lambda gradient: torch.quantize_per_tensor(gradient, 0.01, 0, torch.qint8),
    "nested": lambda gradient: torch.nested.nested_tensor([gradient[:1], gradient[1:]]),
    "a buffer": buffer_of,
    "an attribute of a module": attribute_of,
    "a gradient": lambda gradient: beside(gradient, "grad"),
    "an attribute of a tensor": lambda gradient: beside(gradient, "of"),
}
WAYS = {
    f"{kind}: {name}": keep
    for kind, ways in (("numpy", NUMPY), ("bytes", BYTES), ("python", PYTHON), ("torch", TORCH))
    for name, keep in ways.items()
}


def as_attribute(base, kept):
    base.kept = kept


def in_state(base, kept):
    base.state[largest(base)]["h"] = kept


def of_parameter(base, kept):
    largest(base).kept = kept


def in_group(base, kept):
    base.param_groups[0]["kept"] = kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [as_attribute, in_state, of_parameter, in_group])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_gradient_that_is_kept_before_a_step_is_refused_in_whatever_it_is_kept(place, way):
    model, optimizer = private()
    step(model, optimizer)
    pass_rows(model)
    base = optimizer.base_optimizer
    place(base, way(largest(base).grad.clone()))
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()
    assert len(optimizer.accountant) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", [as_attribute, in_state, of_parameter, in_group])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_a_step_keeps_goes_on_in_whatever_it_is_kept(place, way):
    model, optimizer = private(
        lambda parameters: OwnSGD(parameters, lambda base: place(base, way(largest(base).grad.clone())))
    )
    for _ in range(3):
        step(model, optimizer)
    assert optimizer.steps_taken == 3


@pytest.mark.parametrize("way", TORCH.values(), ids=TORCH)
@pytest.mark.filterwarnings("ignore")
def test_a_state_of_any_tensors_is_loaded_or_refused_by_a_reason(way):
    model, optimizer = private(
        lambda parameters: OwnSGD(parameters, lambda base: in_state(base, way(largest(base).grad.clone())))
    )
    step(model, optimizer)
    kept = optimizer.state_dict()
    again, other = private()
    try:
        other.load_state_dict(kept)
    except ConfigurationError as error:
        assert "Keep dense tensors in the state" in str(error)  # noqa: PT017
    other.base_optimizer.state.clear()
    step(again, other)
    assert other.steps_taken >= 1


def write(base, betas, info, seen):
    base.param_groups[0]["betas"] = betas
    base.info = info
    base.seen = seen


def test_a_few_numbers_in_groups_and_attributes_are_settings_that_may_change():
    model, optimizer = private()
    for count in range(3):
        write(optimizer.base_optimizer, (0.1 * count, 0.2, 0.3), {"epoch": count, "of": 3}, [count] * count)
        optimizer.base_optimizer.flags = [True, "a name", None, torch.tensor(count)]
        step(model, optimizer)
    assert optimizer.steps_taken == 3


def test_a_base_optimizer_may_know_the_network_its_schedule_and_the_private_optimizer_around_it():
    model, optimizer = private()
    base = optimizer.base_optimizer
    model.net.register_buffer("count", torch.zeros(2))
    base.net, base.wrapped, base.of = model.net, [model], {"private": optimizer, "again": weakref.ref(optimizer)}
    base.schedule = StepLR(optimizer, 1)
    for _ in range(3):
        model.net.get_buffer("count").add_(1.0)
        step(model, optimizer)
        base.schedule.step()
    assert optimizer.steps_taken == 3


INNER = {
    "values": lambda inner: {0: inner}.values(),
    "a list of one's own": lambda inner: UserList([inner]),
    "an array": objects,
    "a schedule": lambda inner: StepLR(inner, 3),
    "a schedule in a list": lambda inner: [StepLR(inner, 3)],
    "a method": lambda inner: inner.step,
    "methods": lambda inner: [inner.step],
    "an argument": lambda inner: functools.partial(Optimizer.zero_grad, inner),
    "a reference": weakref.ref,
    "a view": lambda inner: MappingProxyType({"of": inner}),
}


@pytest.mark.parametrize("keep", INNER.values(), ids=INNER)
def test_an_optimizer_within_another_is_guarded_in_whatever_it_is_kept(keep):
    inner = []

    class Outer(OwnSGD):
        def __init__(self, parameters):
            super().__init__(parameters)
            inner.append(SGD(parameters, lr=0.1, momentum=0.9))
            self.held = keep(inner[0])

        def step(self, closure=None):
            inner[0].step()

    model, optimizer = private(Outer)
    pass_rows(model)
    with pytest.raises(PrivacyError, match="base optimizer of a private one"):
        inner[0].step()
    optimizer.step()
    optimizer.zero_grad()
    pass_rows(model)
    inner[0].state[largest(inner[0])]["momentum_buffer"] = largest(inner[0]).grad.clone()
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()


class Keeping(OwnSGD):
    """Whose load keeps entries of its own that the file does not have, as they are or as copies."""

    copies = False

    def load_state_dict(self, state_dict):
        old = {key: dict(held) for key, held in self.state.items()}
        groups = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for key, held in old.items():
            for name, value in held.items():
                self.state[key].setdefault(name, value.clone() if self.copies else value)
        for group, before in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in before.items() if name not in group})


class Copying(Keeping):
    copies = True


class Moving(OwnSGD):
    """Whose load moves an attribute into the state."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if hasattr(self, "kept"):
            self.state[largest(self)]["h"] = self.__dict__.pop("kept")


@pytest.mark.parametrize(
    ("kind", "place"),
    [(Keeping, in_state), (Copying, in_state), (Keeping, in_group), (Moving, as_attribute)],
    ids=["kept", "copied", "in a group", "moved"],
)
def test_a_load_behind_a_pass_vouches_for_what_was_loaded_and_for_nothing_that_it_left(kind, place):
    def momentum(base):
        for parameter in base.param_groups[0]["params"]:
            base.state[parameter]["m"] = parameter.grad.clone()

    model, optimizer = private(lambda parameters: kind(parameters, momentum))
    step(model, optimizer)
    kept = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(kept))
    pass_rows(model)
    base = optimizer.base_optimizer
    place(base, largest(base).grad.clone())
    for _ in range(1 if kind is Moving else 2):
        optimizer.load_state_dict(copy.deepcopy(kept))
    with pytest.raises(PrivacyError, match=r"'(h|kept)' in (the state|a group)"):
        optimizer.step()
    # Without it, the rest is as it was loaded.
    base.state[largest(base)].pop("h", None)
    base.param_groups[0].pop("kept", None)
    optimizer.skip_draw()
    optimizer.zero_grad()
    step(model, optimizer)
    assert optimizer.steps_taken == 2


def test_averages_beside_the_optimizer_or_in_a_hook_of_the_base_one_are_the_remedy_that_is_named():
    def average(base, *_):
        for parameter in base.param_groups[0]["params"]:
            held = base.state[parameter]
            held.setdefault("average", parameter.detach().clone()).lerp_(parameter.detach(), 0.1)

    model, optimizer = private()
    for _ in range(2):
        step(model, optimizer)
        average(optimizer.base_optimizer)
    pass_rows(model)
    with pytest.raises(PrivacyError, match=r"beside the optimizer .*WeightAverage.*register_step_post_hook"):
        optimizer.step()
    model, optimizer = private()
    optimizer.base_optimizer.register_step_post_hook(average)
    for _ in range(3):
        step(model, optimizer)
    assert optimizer.steps_taken == 3


class Scaled(OwnSGD):
    grad_scale = 1.0
    found_inf = False


class Method(OwnSGD):
    def grad_scale(self):
        return 1.0


@pytest.mark.parametrize("kind", [Scaled, Method])
def test_settings_of_ones_own_that_no_grad_scaler_has_left_are_free(kind):
    model, optimizer = private(kind)
    step(model, optimizer)
    assert optimizer.steps_taken == 1
    optimizer.base_optimizer.grad_scale = torch.ones(())
    pass_rows(model)
    with pytest.raises(PrivacyError, match="grad_scale is set"):
        optimizer.step()


def test_of_optimizers_of_torch_a_scale_is_refused_before_the_charge_since_their_step_fails():
    model, optimizer = private(lambda parameters: SGD(parameters, lr=0.1))
    optimizer.base_optimizer.grad_scale = 1.0
    pass_rows(model)
    with pytest.raises(PrivacyError, match="another name"):
        optimizer.step()
    assert len(optimizer.accountant) == 0
