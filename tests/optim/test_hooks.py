"""Hooks of torch.optim and of noise sources, which see a step from part to part."""

from __future__ import annotations

import pytest
import torch

from clipless_dp import CliplessDPOptimizer, CliplessDPSGD, ConfigurationError, PrivacyError
from clipless_dp.noise import SystemNoise
from tests.support import gated_model, samples


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
    optimizer = CliplessDPSGD(
        model,
        lr=0.1,
        noise_multiplier=1.0,
        sample_rate=1.0,
        dataset_size=8,
        accountant="rdp",
        sampling="none",
        noise=Source(call("noise")),
    )
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
