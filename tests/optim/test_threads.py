"""Threads that share one model and one optimizer: a step releases what it has looked at, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from clipless_dp import (
    CliplessDPOptimizer,
    DPLipModel,
    LayerBounds,
    PrivacyError,
    ReproducibleNoise,
    constraints,
    losses,
    register_rule,
)
from clipless_dp.model import turns
from tests.support import OwnSGD, gated_model, samples

INPUTS, TARGETS = samples(40)


class Waiting(ReproducibleNoise):
    """Noise that calls something between the charge of a step and what is added to the gradients."""

    call: Callable[[], None] = staticmethod(lambda: None)

    def begin_step(self, step: int) -> None:
        self.call()
        super().begin_step(step)


def begun() -> tuple[DPLipModel, CliplessDPOptimizer, Waiting]:
    model, noise = gated_model(), Waiting(0)
    base = torch.optim.SGD(model.net.parameters(), lr=1.0)
    settings: dict[str, Any] = {"sample_rate": 1.0, "dataset_size": 40, "sampling": "none", "accountant": "rdp"}
    settings["allocation"] = "global"
    return model, CliplessDPOptimizer(model, base, noise_multiplier=1.0, noise=noise, **settings), noise


def passed(model: DPLipModel, inputs: torch.Tensor) -> None:
    model.loss(model(inputs), TARGETS).backward()


def weights(model: DPLipModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.net.parameters()])


@pytest.mark.parametrize("wrapper", ["the same", "another of the same network"])
def test_a_pass_of_another_thread_waits_until_the_step_is_over(wrapper: str) -> None:
    found = []
    for other in (False, True):
        model, optimizer, noise = begun()
        rows, came = 2.0 * INPUTS.flip(0), threading.Event()
        passing = model
        if wrapper != "the same":
            passing = DPLipModel(
                model.net, input_shape=model.input_shape, input_norm=model.input_norm, loss=losses.TauCrossEntropy(2.0)
            )
        value = passing.loss(passing(rows), TARGETS)

        def come_back(value: torch.Tensor = value, came: threading.Event = came) -> None:
            value.backward()
            came.set()

        thread = threading.Thread(target=come_back)

        def call(thread: threading.Thread = thread, came: threading.Event = came) -> None:
            thread.start()
            # It would be there long before.
            assert not came.wait(0.5)

        noise.call = call if other else lambda: None
        passed(model, INPUTS)
        optimizer.step()
        found.append(weights(model))
        if other:
            thread.join()
            assert came.is_set()
            # What has waited is in the gradients now, as a pass that comes between two steps.
            assert any(bool(parameter.grad.any()) for parameter in model.net.parameters() if parameter.grad is not None)
    assert torch.equal(*found)


def test_a_pass_in_a_hook_of_the_step_is_refused_and_the_noisy_gradients_are_as_they_were() -> None:
    model, optimizer, _ = begun()
    before = weights(model)
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: passed(model, 2.0 * INPUTS))
    passed(model, INPUTS)
    with pytest.raises(PrivacyError):
        optimizer.step()
    assert torch.equal(weights(model), before)


def test_threads_that_pass_and_step_as_they_like_release_nothing_without_noise() -> None:
    model, optimizer, noise = begun()
    noise.call = lambda: None
    optimizer.noise_multiplier = 1e-6
    stop, largest = threading.Event(), 0.0

    def pass_on() -> None:
        while not stop.is_set():
            # A step may have changed weights that the way back reads.
            with contextlib.suppress(Exception):
                passed(model, INPUTS.clone())

    thread = threading.Thread(target=pass_on)
    thread.start()
    try:
        for _ in range(60):
            try:
                optimizer.zero_grad()
                passed(model, INPUTS.clone())
                before = weights(model)
                optimizer.step()
                # Of forty rows, over the forty that are expected; some passes may come together, as micro-batches do.
                bound = max(optimizer.step_noise.values()) / 1e-6 * 40.0
                largest = max(largest, float((weights(model) - before).norm()) / bound)
            except (PrivacyError, RuntimeError):
                optimizer.skip_draw()
    finally:
        stop.set()
        thread.join()
    # What is released neither noised nor divided is forty times as much as one.
    assert 0.0 < largest <= 10.0


def wrapped_again(model: DPLipModel) -> DPLipModel:
    return DPLipModel(
        model.net, input_shape=model.input_shape, input_norm=model.input_norm, loss=losses.TauCrossEntropy(2.0)
    )


LOOKS: dict[str, Callable[[DPLipModel, CliplessDPOptimizer], object]] = {
    "lipschitz_constant": lambda model, _: model.lipschitz_constant(),
    "margin_constants": lambda model, _: model.margin_constants(),
    "sensitivity": lambda model, _: model.sensitivity(),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "state_dict": lambda _, optimizer: optimizer.state_dict(),
    "what a statement asks": lambda _, optimizer: (optimizer.weights_are_counted(), optimizer.noise_deviations()),
}


@pytest.mark.parametrize("wrapper", ["the same", "another of the same network"])
@pytest.mark.parametrize("look", LOOKS)
def test_looks_at_the_weights_in_a_thread_beside_training_are_answered_and_disturb_nothing(
    look: str, wrapper: str
) -> None:
    model, optimizer, noise = begun()
    noise.call = lambda: None
    looked_at = model if wrapper == "the same" else wrapped_again(model)
    stop, failed, answers = threading.Event(), [], []

    def ask() -> None:
        try:
            while not stop.is_set():
                answers.append(LOOKS[look](looked_at, optimizer) is not None)
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        steps = 0
        while steps < 12 or (len(answers) < 12 and not failed):
            optimizer.zero_grad()
            passed(model, INPUTS)
            optimizer.step()
            steps += 1
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not failed
    assert all(answers)
    assert optimizer.steps_taken == steps
    assert optimizer.weights_are_counted()
    assert not optimizer.uncounted_changes


def test_what_other_threads_run_while_a_network_is_traced_is_run_as_it_is() -> None:
    """Torch puts wrappers around all modules of the process meanwhile."""
    entered, go_on, found = threading.Event(), threading.Event(), []
    layer = torch.nn.Linear(6, 6)

    class Slow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            entered.set()
            assert go_on.wait(10.0)
            output: torch.Tensor = self.second(self.first(inputs))
            return output

    def wrap() -> None:
        found.append(DPLipModel(Slow(), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0)))

    thread = threading.Thread(target=wrap)
    thread.start()
    try:
        assert entered.wait(10.0)
        expected = torch.nn.functional.linear(INPUTS, layer.weight, layer.bias)
        assert torch.equal(layer(INPUTS), expected)
        # A second trace waits for the first to take its wrappers off.
        second = threading.Thread(target=lambda: found.append(gated_model()))
        second.start()
    finally:
        go_on.set()
        thread.join()
    second.join()
    assert len(found) == 2
    assert all(bool(torch.isfinite(one(INPUTS)).all()) for one in found)


@pytest.mark.filterwarnings("ignore::clipless_dp.PrivacyWarning")
@pytest.mark.parametrize("asked", ["lipschitz_constant", "state_dict", "a step"])
def test_two_wrappers_whose_steps_and_looks_cross_do_not_wait_for_each_other(asked: str) -> None:
    """A hook of one wrapper's step asks what a thread is asking of the other one, who waits for the step."""
    (first, other, _), settings = begun(), {"sample_rate": 1.0, "dataset_size": 40, "sampling": "none"}
    second = DPLipModel(first.net, input_shape=first.input_shape, input_norm=1.0, loss=losses.TauCrossEntropy())
    base = OwnSGD(list(second.net.parameters()))
    optimizer = CliplessDPOptimizer(second, base, noise_multiplier=1.0, accountant="rdp", **settings)
    look = first.lipschitz_constant if asked == "lipschitz_constant" else other.state_dict
    inside, done = threading.Event(), threading.Event()

    def hook(*_: object) -> None:
        inside.set()
        time.sleep(0.05)
        # Weights in the middle of a step are shown to nobody.
        with contextlib.suppress(PrivacyError):
            look()

    base.register_step_post_hook(hook)

    def train() -> None:
        optimizer.step()
        done.set()

    def ask() -> None:
        inside.wait(20.0)
        if asked == "a step":
            # It finds gradients that are another one's.
            with contextlib.suppress(PrivacyError):
                other.step()
        while not done.is_set():
            look()

    threads = [threading.Thread(target=train, daemon=True), threading.Thread(target=ask, daemon=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert not any(thread.is_alive() for thread in threads)
    assert optimizer.steps_taken == 1


def test_a_hook_that_waits_for_a_look_of_another_thread_waits_no_longer_than_its_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "_PATIENCE", 0.2)
    model, optimizer, noise = begun()
    found: list[BaseException | None] = []
    with ThreadPoolExecutor(1) as pool:
        noise.call = lambda: found.append(pool.submit(model.lipschitz_constant).exception(timeout=20.0))
        passed(model, INPUTS)
        optimizer.step()
        assert isinstance(found[0], PrivacyError)
        assert "another thread" in str(found[0])
        assert pool.submit(model.lipschitz_constant).result(timeout=20.0) > 0.0
    assert optimizer.steps_taken == 1


class Own(torch.nn.Module):
    """A layer of one's own, whose passes take turns with steps, as it may write to what it reads."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * 1.0


register_rule(Own)(lambda _, context: LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0))

SETTINGS: dict[str, Any] = {"sample_rate": 1.0, "dataset_size": 40, "sampling": "none", "accountant": "rdp"}


def private(net: torch.nn.Module) -> tuple[DPLipModel, OwnSGD, CliplessDPOptimizer]:
    constraint = constraints.Spectral(1.0)
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0), constraint=constraint)
    base = OwnSGD(list(model.net.parameters()))
    return model, base, CliplessDPOptimizer(model, base, noise_multiplier=1.0, **SETTINGS)


def with_layer(layer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(layer, torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layer", [torch.nn.Identity, Own])
@pytest.mark.parametrize("goes_on", ["a step", "an evaluation"])
def test_two_wrappers_of_which_one_asks_the_other_in_its_step_do_not_wait_for_each_other(
    goes_on: str, layer: type[torch.nn.Module]
) -> None:
    net = with_layer(layer())
    (_, base, first), (asked, _, second) = private(net), private(net)
    inside, done = threading.Event(), threading.Event()

    def hook(*_: object) -> None:
        inside.set()
        time.sleep(0.05)
        asked.lipschitz_constant()

    base.register_step_post_hook(hook)

    def train() -> None:
        for _ in range(3):
            # Weights in the middle of a step are shown to nobody, and steps of others leave gradients.
            with contextlib.suppress(PrivacyError):
                first.step()
        done.set()

    def go_on() -> None:
        inside.wait(20.0)
        while not done.is_set():
            with contextlib.suppress(PrivacyError), torch.no_grad():
                if goes_on == "a step":
                    second.step()
                else:
                    asked(INPUTS)

    threads = [threading.Thread(target=train, daemon=True), threading.Thread(target=go_on, daemon=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert inside.is_set()
    assert not any(thread.is_alive() for thread in threads)
