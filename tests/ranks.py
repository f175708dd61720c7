"""Processes that form a process group and run functions together, for tests of distributed training."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from clipless_dp import CliplessDPSGD, DPLipModel, gated, losses
from clipless_dp.errors import CliplessError
from clipless_dp.training import EpochRecord

SETTINGS = {"noise_multiplier": 1.3, "sample_rate": 0.25, "dataset_size": 90, "accountant": "rdp"}


class Failure(NamedTuple):
    """An exception of a rank, or the end of its process."""

    kind: str
    message: str


class Ranks(AbstractContextManager["Ranks"]):
    """Processes that wait for functions to run; starting them costs a second, so that tests share them."""

    def __init__(self, count: int = 2) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        # One import for all processes of all tests.
        context.set_forkserver_preload(["clipless_dp", "torch._dynamo", "opacus", "pytest", "scipy.stats"])
        store = str(Path(self._folder.name) / "store")
        self._ends = []
        self._processes = []
        for rank in range(count):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, store, other), daemon=True)
            process.start()
            other.close()
            self._ends.append(own)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; a :class:`Failure` where it raised or the process ended."""
        for end in self._ends:
            end.send((function, arguments))
        return [self._answer(end) for end in self._ends]

    def _answer(self, end: Connection) -> Any:
        try:
            return end.recv()
        except EOFError:
            return Failure("EOFError", "the process ended")

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def plain(history: Sequence[EpochRecord]) -> list[SimpleNamespace]:
    """Epoch records with their losses, which a record itself leaves behind when it is pickled."""
    return [SimpleNamespace(**vars(record)) for record in history]


def _serve(rank: int, count: int, store: str, end: Connection) -> None:
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send(function(*arguments))
        except Exception as error:
            end.send(Failure(type(error).__name__, str(error) + "\n" + traceback.format_exc()))


def torchrun(script: Path, count: int, *arguments: object) -> str:
    """Runs a script on so many ranks as ``torchrun`` starts them, and returns what it printed."""
    root = Path(__file__).parent.parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, str(script), *map(str, arguments)],
        cwd=root, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip


# What tests run on the ranks.


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def weights(model: DPLipModel) -> torch.Tensor:
    return torch.cat([whole(parameter).flatten() for parameter in model.net.parameters()])


def sgd(model: DPLipModel, **changes: object) -> CliplessDPSGD:
    return CliplessDPSGD(model, lr=0.5, momentum=0.5, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def square_model() -> DPLipModel:
    return DPLipModel(
        gated(nn.Sequential(nn.Linear(64, 64, bias=False))),
        input_shape=(64,),
        input_norm=1.0,
        loss=losses.TauCrossEntropy(2.0),
    )


def noise_of_steps(model: DPLipModel, optimizer: CliplessDPSGD, rounds: int) -> torch.Tensor:
    """What steps without gradients added to all weights, ``(rounds, weights)``, in planned deviations."""
    changes = []
    for _ in range(rounds):
        before = weights(model)
        optimizer.step()
        changes.append(weights(model) - before)
    planned = SETTINGS["noise_multiplier"] * model.sensitivity().total / (0.25 * 90)
    return torch.stack(changes).double() / planned


def same_weights(one, other) -> bool:
    # Only the order of float32 sums differs, amplified by four steps of lr 0.5; updates are of order 1.
    return torch.allclose(one, other, atol=1e-4, rtol=0)


def has_the_planned_noise(ratio: float) -> bool:
    # 12 rounds of 4096 numbers: one standard deviation is 0.32 %, so that 2 % is passed once in 10⁹ runs.
    return abs(ratio - 1.0) < 0.02


def refusal_to_build(attempt):
    try:
        attempt()
    except CliplessError as error:
        return str(error)
    return "no error"
