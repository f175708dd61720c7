"""Rehearsals on rows that count for nothing: what is compiled, how many rows fit, and the batches that follow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from accounting.errors import warn_caller
from clipless_dp.errors import CliplessError, ConfigurationError
from clipless_dp.model.compiled import BatchLoss, compiled_loss
from clipless_dp.modules import kept_modes
from clipless_dp.optim import accumulation
from clipless_dp.sampling import Batch, PoissonBatches, Samples, StreamedBatches
from clipless_dp.sampling.batches import usual_rows
from clipless_dp.sampling.streaming import AHEAD
from clipless_dp.training.memory import rows_within, traffic
from clipless_dp.training.run import Run

_FEWEST_TURNS, _MOST_TURNS, _SECONDS = 5, 31, 2.0
"""Passes of which the faster kind is kept: not fewer, not more, and none begun later."""


def rehearse(run: Run, samples: Samples) -> PoissonBatches | StreamedBatches:
    """Compiles, and chooses how many rows are processed at once, by passes over zeros; then prepares the draws.

    Args:
        run: which is given its compiled loss and its ``micro_batch_size``.
        samples: to draw from.

    Returns:
        The draws of the steps that are left.

    Raises:
        ConfigurationError: the model cannot be compiled, or one row exceeds the memory budget.
    """
    device, _ = run.model.device_and_dtype()
    execution, plan = run.asked.execution, run.plan
    compile = execution.compile
    if compile is True and (reason := run.model.why_eager):
        compile = False
        _say(run, f"compile=True is left out: {reason}")
    # Other devices capture and tune graphs for one shape; compiled for the CPU, a graph takes any number of rows. Of
    # people's rows each class of weights is a pass, of as many rows as were drawn.
    one_shape = bool(compile) and device.type != "cpu" and run.people is None
    stream = not _fits(samples, device, run.here.world.size) if execution.stream is None else execution.stream
    # Of the public size: the exact number of samples is not to show in the result.
    usual = usual_rows(math.ceil(plan.dataset_size / run.here.world.size), plan.sample_rate)
    usual *= 1 if run.people is None else run.people.rows_per_group
    padding = usual if one_shape else max(8, math.isqrt(plan.batch_size) // 2)
    rows = execution.micro_batch_size
    if compile:
        compiled = _compile(run, "inductor" if compile is True else compile, _blank(run.shown, rows or padding, device))
        if compile is True and device.type == "cpu":
            # Of a memory that is bounded, no more is taken before it is known how many rows fit.
            _keep_faster(run, compiled, rows or (usual if execution.memory_budget is None else padding))
    if execution.memory_budget is not None:
        rows = _micro_batch_size(run, execution.memory_budget, usual, AHEAD if stream else 1)
    if one_shape:
        rows = rows or usual
    if rows is not None and (one_shape or rows < usual):
        padding = rows
    run.micro_batch_size = rows
    draws = StreamedBatches if stream else PoissonBatches
    return draws(
        samples,
        sample_rate=plan.sample_rate,
        steps=plan.steps,
        seed=run.asked.privacy.reproducible_seed,
        start=run.step,
        physical_batch_size=padding,
        device=device,
        groups=run.people,
    )


def _blank(shown: tuple[Tensor, Tensor], rows: int, device: torch.device) -> Batch:
    """Rows of zeros in the shapes and types of those shown, none of which counts: no draw, nothing to announce."""
    inputs, targets = (part.new_zeros(rows, *part.shape[1:], device=device) for part in shown)
    return Batch(inputs, targets, torch.zeros(rows, dtype=torch.bool, device=device))


@contextmanager
def _rehearsal(run: Run) -> Iterator[None]:
    """Forward and backward passes within leave nothing behind: no gradients, no mode, no state of random numbers."""
    device, _ = run.model.device_and_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), run.model.register.rehearsing(), kept_modes(run.model):
        run.model.train()
        yield


def _compile(run: Run, backend: str, blank: Batch) -> BatchLoss:
    """Compiles, and runs on rows that count for nothing, so that what fails does so before anything is spent.

    Raises:
        ConfigurationError: the backend is unknown, or lacks a compiler, or cannot compile the model.
    """
    try:
        with _rehearsal(run):
            run.loss = compiled = compiled_loss(run.model, backend)
            compiled(*blank).backward()
            return compiled
    except CliplessError:
        raise
    except Exception as error:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigurationError(
            f"the model could not be compiled ({type(error).__name__}: {summary}); the default backend needs a C++ "
            "compiler on the CPU. Train with compile=False, or name another backend"
        ) from error


def _keep_faster(run: Run, compiled: BatchLoss, rows: int) -> None:
    """Goes back to eager passes where compiled ones take longer on rows that count for nothing, and says so.

    A run with a ``reproducible_seed`` stays compiled: a clock is not to decide what its numbers are.
    """
    device, _ = run.model.device_and_dtype()
    blank, model = _blank(run.shown, rows, device), run.model

    def eager(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return model.loss(model(inputs), targets, mask)

    with _rehearsal(run):
        share = run.here.from_first(lambda: _share(compiled, eager, blank))
    if share <= 1.0:
        return
    measured = (
        f"compiled passes take {share:.3f} times as long as eager ones here, by the median of passes in turns over "
        f"{rows} rows of zeros"
    )
    if run.asked.privacy.reproducible_seed is not None:
        _say(run, f"{measured}. They are kept, as reproducible_seed asks for the same numbers on every machine")
        return
    run.loss = None
    _say(run, f"compile=True is left out: {measured}. The name of a backend, compile='inductor', compiles nevertheless")


def _share(compiled: BatchLoss, eager: BatchLoss, blank: Batch) -> float:
    """How many times as long compiled passes take as eager ones: the median of several, in turns."""

    def seconds(loss: BatchLoss) -> float:
        start = time.perf_counter()
        loss(*blank).backward()
        return time.perf_counter() - start

    # What is set up at the first pass of a size is no part of it.
    seconds(compiled), seconds(eager)
    shares: list[float] = []
    start = time.perf_counter()
    while len(shares) < _FEWEST_TURNS or (len(shares) < _MOST_TURNS and time.perf_counter() - start < _SECONDS):
        shares.append(seconds(compiled) / seconds(eager))
    return statistics.median(shares)


def _say(run: Run, message: str) -> None:
    if run.here.world.rank == 0:
        warn_caller(message, UserWarning)


def _fits(samples: Samples, device: torch.device, ranks: int) -> bool:
    """Whether the data is in memory and half of what the device has left holds this rank's part of it."""
    if samples.tensors is None or device.type != "cuda":
        return samples.tensors is not None
    own = sum(part.element_size() * part.numel() for part in samples.tensors) / ranks
    return samples.tensors[0].device == device or own <= 0.5 * torch.cuda.mem_get_info(device)[0]


def _micro_batch_size(run: Run, budget: float, usual: int, held: int) -> int:
    """Equal parts of a usual draw, the fewest whose peak is within the budget.

    The peak is measured with two micro-batches (or views), since the second finds the gradients of the first in memory;
    the rest of the draw, which waits there for its turn, is added, and so are the other draws held there.

    Raises:
        ConfigurationError: one row does not fit, or the device does not tell.
    """
    device, _ = run.model.device_and_dtype()
    row = sum(part.element_size() * part[0].numel() for part in _blank(run.shown, 1, device))
    peaks: dict[int, float] = {}

    def gradients(rows: int) -> None:
        # Nobody's rows, which are of no draw of people.
        accumulation.accumulate(
            run.model,
            run.optimizer.placement,
            _blank(run.shown, min(2 * rows, usual), device),
            augment=run.asked.learning.augment,
            multiplicity=min(2, run.asked.learning.multiplicity),
            micro_batch_size=rows,
            loss=run.loss,
        )
        run.optimizer.zero_grad()

    def peak(rows: int) -> float:
        try:
            measured: float = traffic(lambda: gradients(rows), device).peak
        except torch.cuda.OutOfMemoryError:
            run.optimizer.zero_grad()
            measured = math.inf
        peaks[rows] = measured + row * (max(0, usual - 2 * rows) + (held - 1) * usual)
        return peaks[rows]

    with _rehearsal(run):
        # What is set up once, by libraries and by layers, is no part of a step.
        gradients(min(2, usual))
        fits = rows_within(budget, peak, usual)
    if fits == 0:
        raise ConfigurationError(
            f"one row at a time takes {peaks[1]:.4g} bytes, {row * usual * held:.4g} of them for {held} usual draw(s) "
            f"of {usual} rows, and memory_budget is {budget:.4g}: raise it, or choose a smaller batch_size or network"
        )
    return math.ceil(usual / math.ceil(usual / fits))
