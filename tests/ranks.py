"""Processes that form a process group and run functions together, for tests of distributed training."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


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


def _serve(rank: int, count: int, store: str, end: Connection) -> None:
    import torch
    import torch.distributed as dist

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
