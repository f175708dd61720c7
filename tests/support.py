"""Small models and data that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, gated, losses, training


def gated_model(*, bias: bool = True, seed: int = 0) -> DPLipModel:
    """Two gated linear layers, 6 inputs and 3 classes: constant sensitivity."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias))
    return DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian inputs with labels that a linear classifier can learn."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


@contextmanager
def power_cut(step: int) -> Iterator[None]:
    """Lets ``fit`` fail before a step, and expects that it does."""

    def cut() -> None:
        raise RuntimeError("power cut")

    with _happening_at(step, cut), pytest.raises(RuntimeError, match="power cut"):
        yield


@contextmanager
def keyboard_interrupt(step: int) -> Iterator[None]:
    """Interrupts ``fit`` before a step, as the keyboard does, and expects that it ends so."""
    with _happening_at(step, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        yield


@contextmanager
def _happening_at(step: int, event: Callable[[], None]) -> Iterator[None]:
    honest = training._step

    def watching(run: Any, batch: Any, size: Any) -> Tensor:
        if run.step == step:
            event()
        return honest(run, batch, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", watching)
        yield
