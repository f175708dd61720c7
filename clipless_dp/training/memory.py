"""How many bytes a computation holds at its peak, and how many rows a budget of them allows at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.autograd.profiler import profile

from clipless_dp.errors import ConfigurationError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Traffic(Generic[Result]):
    """What a function did to the memory of a device.

    Attributes:
        result: what it returned.
        kept: bytes of tensors that it left allocated; below zero if it freed more than it took.
        peak: the most bytes that tensors held at once while it ran, above those that they held before.
    """

    result: Result
    kept: int
    peak: int


def traffic(run: Callable[[], Result], device: torch.device) -> Traffic[Result]:
    """Runs a function and measures what its tensors take, those inside of operations and compiled graphs included.

    Args:
        run: called once.
        device: a CPU, whose blocks the profiler sees come and go since its allocator keeps no count, or a device whose
            allocator does.

    Raises:
        ConfigurationError: the device's allocator does not tell.
    """
    if device.type == "cpu":
        with _quietly(), profile(profile_memory=True) as profiled:
            result = run()
        blocks = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
        level = peak = 0
        for block in sorted(blocks, key=lambda block: block.start_ns()):
            level += block.nbytes()
            peak = max(peak, level)
        return Traffic(result, level, peak)
    allocator: Any = getattr(torch, device.type, None)
    if not hasattr(allocator, "max_memory_allocated"):
        raise ConfigurationError(f"the memory that tensors take on {device} cannot be measured")
    before = allocator.memory_allocated(device)
    allocator.reset_peak_memory_stats(device)
    result = run()
    return Traffic(result, allocator.memory_allocated(device) - before, allocator.max_memory_allocated(device) - before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Some versions of the profiler announce each start and stop on standard error."""
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = level or "99"
    try:
        yield
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]


def rows_within(budget: float, peak: Callable[[int], float], most: int) -> int:
    """The most rows, to within a sixteenth, whose peak is within a budget.

    Tries 8 rows, then 16, then what a straight line through the last two peaks predicts, so that hardly more than the
    budget is ever taken; halves the gap where the line is wrong.

    Args:
        budget: bytes.
        peak: measures the bytes that so many rows take, infinite where they cannot be had; it should not fall as rows
            are added.
        most: rows beyond which there is nothing to gain, at least 1.

    Returns:
        A number of rows that was tried and found to fit; 0 if one row does not.
    """
    fits, excess, rows = 0, most + 1, min(8, most)
    tried: dict[int, float] = {}
    while fits < rows < excess:
        tried[rows] = peak(rows)
        if tried[rows] <= budget:
            fits = rows
        else:
            excess = rows
        if fits == 0:
            rows = excess // 2
        elif len(tried) == 1:
            rows = min(2 * fits, most)
        else:
            other = min((known for known in tried if known != fits), key=lambda known: abs(known - fits))
            slope = (tried[other] - tried[fits]) / (other - fits)
            line = fits + (budget - tried[fits]) / slope if 0.0 < slope < math.inf else math.inf
            bound = (fits + excess) // 2 if excess in tried else min(8 * fits, most)
            rows = int(min(line, bound))
            if rows < fits + max(1, fits // 16):
                break
    return fits
