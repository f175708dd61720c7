"""Small models and data that several test files share."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from clipless_dp import DPLipModel, constraints, gated, losses, training
from clipless_dp.noise import SystemNoise
from clipless_dp.norms import operators


def one_in_two(values: Iterable[Any]) -> list[Any]:
    """Values to parametrize with, every other one among the slow tests: where neighbours check one thing."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[pytest.mark.slow] * (place % 2))
        for place, value in enumerate(values)
    ]


def with_each_of(names: str, table: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Runs a test with each entry of a table as these arguments, under its key."""
    return pytest.mark.parametrize(names, [*table.values()], ids=[*table])


def run_in_threads(call: Callable[..., None], arguments: Iterable[Sequence[Any]], *, patience: float = 60.0) -> None:
    """Calls a function in a thread for each of some arguments, and fails with what the first one of them raises."""
    failed: list[BaseException] = []

    def run(*given: Any) -> None:
        try:
            call(*given)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=tuple(given), daemon=True) for given in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
    assert not failed, failed
    assert not any(thread.is_alive() for thread in threads)


class HeldApart(Tensor):
    """A tensor of a type that holds its values in another one, and computes with them by ``__torch_dispatch__``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]
        made.held = held
        return made


every_copy = pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))],
    ids=["copy", "deepcopy", "pickle"],
)
"""Runs a test with each way to copy an object as ``copied``."""

SETTINGS: dict[str, Any] = {
    "noise_multiplier": 1.3,
    "sample_rate": 0.25,
    "dataset_size": 40,
    "accountant": "rdp",
    "sampling": "poisson",
}
"""Of an optimizer for 40 samples."""


EIGHT_ROWS: dict[str, Any] = {
    **SETTINGS,
    "noise_multiplier": 1.0,
    "sample_rate": 1.0,
    "dataset_size": 8,
    "sampling": "none",
}
"""Of an optimizer for 8 samples, all of which are in each step."""

QUICK = {"epsilon": 3.0, "delta": 1e-3, "epochs": 1, "batch_size": 20, "accountant": "rdp", "progress": False}
"""Of a training on some tens of samples."""


class NoNoise(SystemNoise):
    """Shows the sums that are released."""

    def standard_normal_(self, out: Tensor) -> Tensor:
        return out.zero_()


class OwnSGD(torch.optim.Optimizer):
    """SGD whose code is one's own: it calls a function, given the optimizer, within its step."""

    def __init__(self, parameters: Any, call: Callable[[Any], object] = lambda base: None) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.call = call

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.call(self)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=float(group["lr"]))


def no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the test fail that asks for the certified norm of a layer or of a convolution."""

    def refuse(*_: object, **__: object) -> float:
        pytest.fail("a certificate was computed")

    monkeypatch.setattr(operators, "dense_norm", refuse)
    monkeypatch.setattr(operators, "conv2d_norm", refuse)


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


def assert_projected(constraint: constraints.Constraint, weight: Tensor, operators: Any) -> None:
    """The constraint holds for a matrix, bounds its norm as it says, and projects it on itself."""
    assert constraint.holds(weight, operators)
    assert float(torch.linalg.matrix_norm(weight.double(), 2)) <= constraint.implied(*weight.shape)
    again = weight.clone()
    constraint.project_(again, operators)
    assert torch.equal(again, weight)


def protected(history: list[training.EpochRecord]) -> list[training.EpochRecord]:
    """The records without training losses, which no checkpoint holds."""
    return [replace(record, loss=None) for record in history]


@contextmanager
def before_steps(event: Callable[[Any], object]) -> Iterator[None]:
    """Lets something happen before each step of ``fit``, given its run."""

    class Before(training.Watcher):
        def before_step(self, run: Any, batch: Any) -> None:
            event(run)

    with training.watched_by(Before()):
        yield


@contextmanager
def power_cut(step: int) -> Iterator[pytest.ExceptionInfo[RuntimeError]]:
    """Lets ``fit`` fail before a step, and expects that it does."""

    def cut() -> None:
        raise RuntimeError("power cut")

    with _happening_at(step, cut), pytest.raises(RuntimeError, match="power cut") as failure:
        yield failure


@contextmanager
def keyboard_interrupt(step: int) -> Iterator[None]:
    """Interrupts ``fit`` before a step, as the keyboard does, and expects that it ends so."""
    with _happening_at(step, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        yield


@contextmanager
def _happening_at(step: int, event: Callable[[], None]) -> Iterator[None]:
    with before_steps(lambda run: event() if run.step == step else None):
        yield


def looks_standard_normal(numbers: Any) -> bool:
    """Kolmogorov–Smirnov at 10⁻⁶, and four moments within five and a half of their standard errors (4·10⁻⁸ each)."""
    n = len(numbers)
    errors = {1: 1.0, 2: math.sqrt(2), 3: math.sqrt(15), 4: math.sqrt(96)}
    moments = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    near = all(abs((numbers**k).mean() - moments[k]) < 5.5 * errors[k] / math.sqrt(n) for k in errors)
    return near and stats.kstest(numbers, "norm").pvalue > 1e-6


def uncorrelated(first: Any, second: Any) -> bool:
    """Neither the numbers nor their squares, within five and a half standard errors."""
    n = min(len(first), len(second))
    squares = np.corrcoef(first[:n] ** 2, second[:n] ** 2)[0, 1]
    return max(abs(np.corrcoef(first[:n], second[:n])[0, 1]), abs(squares)) < 5.5 / math.sqrt(n)


_FORK = """
import os, torch
import numpy as np
from clipless_dp import PoissonBatches, PoissonBatchSampler, SecureNoise, SystemNoise

{draw}
draw()
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, draw())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(reading, 1 << 12).hex(), draw().hex())
"""


def drawn_on_both_sides_of_a_fork(draw: str) -> tuple[bytes, bytes]:
    """What a function ``draw()``, of bytes, returns in a forked process, and in the one that it came from.

    In a new interpreter: a fork copies one thread only, and would wait forever for others that computed before.

    Args:
        draw: source code that defines it.
    """
    run = subprocess.run(
        [sys.executable, "-c", _FORK.format(draw=draw)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    theirs, ours = (bytes.fromhex(part) for part in run.stdout.split())
    return theirs, ours


def noise_on_both_sides_of_a_fork(source: str) -> list[tuple[bytes, bytes]]:
    """What a source of this class draws there, in float32 and in float64."""
    draw = (
        "source = {source}()\n"
        "def draw():\n"
        "    kinds = (torch.float32, torch.float64)\n"
        "    return b''.join(source.standard_normal_(torch.empty(32, dtype=k)).numpy().tobytes() for k in kinds)\n"
    )
    theirs, ours = drawn_on_both_sides_of_a_fork(draw.format(source=source))
    assert len(theirs) == len(ours) == 32 * 12
    return [(theirs[:128], ours[:128]), (theirs[128:], ours[128:])]
