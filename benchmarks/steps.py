"""The private step that benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from clipless_dp import CliplessDPSGD, DPLipModel
from clipless_dp.sampling import Batch


def private_step(model: DPLipModel, optimizer: CliplessDPSGD, batches: Iterator[Batch]) -> Callable[[], None]:
    """What takes one, on the next draw."""

    def step() -> None:
        inputs, targets, mask = next(batches)
        optimizer.zero_grad()
        model.loss(model(inputs), targets, mask).backward()
        optimizer.step()

    return step
