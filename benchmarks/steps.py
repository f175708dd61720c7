"""The private step that benchmarks time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from clipless_dp import CliplessDPSGD, DPLipModel
from clipless_dp.sampling import Batch
from clipless_dp.training import compiled_loss


def private_step(
    model: DPLipModel, optimizer: CliplessDPSGD, batches: Iterator[Batch], *, compiled: bool = False
) -> Callable[[], None]:
    """What takes one, on the next draw."""

    def plain(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return model.loss(model(inputs), targets, mask)

    loss = compiled_loss(model) if compiled else plain

    def step() -> None:
        inputs, targets, mask = next(batches)
        optimizer.zero_grad()
        loss(inputs, targets, mask).backward()
        optimizer.step()

    return step
