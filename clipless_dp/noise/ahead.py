"""Numbers of the next step's noise, drawn by a thread on a core that the passes leave idle.

They are standard normal numbers of the same generator, drawn earlier: of no step, no scale and no data. So a step that
is skipped, refused or of another noise multiplier leaves them as they are, for the next one. Each is handed out once:
who takes them takes them out of where they were, in one operation, before anything is done with them; what is
interrupted then loses them. They are in no checkpoint, copy or pickle, and a forked process does not take its parent's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

_BLOCK = 1 << 16
"""Numbers drawn at once: operations on so few are not shared with the threads of the passes."""
_FEWEST, _MOST = 1 << 16, 1 << 20
"""Numbers that are drawn ahead. Fewer take no longer than a thread's start; each adds its bytes to the peak of memory,
which lies in the passes."""
_KINDS = 4


@dataclass
class _Drawn:
    """Numbers that a thread fills in.

    Attributes:
        numbers: one dimension, on the CPU.
        process: which began to draw them.
        complete: whether all are there.
        thread: that draws them.
    """

    numbers: Tensor
    process: int
    complete: bool = False
    thread: threading.Thread | None = None


_every: WeakSet[Ahead] = WeakSet()


def _forget_in_child() -> None:
    for one in [*_every]:
        one.forget()


if hasattr(os, "register_at_fork"):
    # Numbers of processes may be given again.
    os.register_at_fork(after_in_child=_forget_in_child)


class Ahead:
    """Numbers that were drawn ahead, by how many and of which type."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, torch.dtype], _Drawn] = {}
        _every.add(self)

    def forget(self) -> None:
        """Lets go of all numbers: in a forked process they are its parent's."""
        self._drawn = {}

    def begin(self, fill: Callable[[Tensor], object], count: int, dtype: torch.dtype) -> None:
        """Has a thread draw so many numbers, unless they are there, are too many, or no core is left for it.

        Args:
            fill: fills a tensor of one dimension on the CPU; several threads may call it.
            count: how many.
            dtype: float32 or float64.
        """
        known = self._drawn.get((count, dtype))
        if known is not None and known.process == os.getpid():
            return
        if not _FEWEST <= count <= _MOST or torch.get_num_threads() >= cores():
            return
        drawn = _Drawn(torch.empty(count, dtype=dtype, device="cpu"), os.getpid())

        def draw() -> None:
            for part in drawn.numbers.split(_BLOCK):
                fill(part)
            drawn.complete = True

        drawn.thread = threading.Thread(target=_quietly, args=(draw,), name="clipless-dp noise")
        try:
            drawn.thread.start()
        except RuntimeError:
            # No further thread, or the interpreter ends: they are drawn when they are needed.
            return
        if len(self._drawn) >= _KINDS:
            self._drawn = {}
        self._drawn[count, dtype] = drawn

    def take(self, count: int, dtype: torch.dtype) -> Tensor | None:
        """So many numbers that nobody else gets, where they were drawn ahead."""
        # Out of reach before anything else: an exception from here on loses them.
        drawn = self._drawn.pop((count, dtype), None)
        if drawn is None or drawn.process != os.getpid() or drawn.thread is None:
            return None
        drawn.thread.join()
        return drawn.numbers if drawn.complete else None


def _quietly(draw: Callable[[], None]) -> None:
    try:
        draw()
    except Exception:
        # Whoever needs the numbers draws them, and meets the error.
        return


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
