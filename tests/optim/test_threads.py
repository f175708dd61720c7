"""Threads that share one model and one optimizer: a step releases what it has looked at, and nothing else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from clipless_dp import CliplessDPOptimizer, DPLipModel, PrivacyError, ReproducibleNoise, losses
from tests.support import gated_model, samples

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
