"""The processes that train together: which is which, what they compare, and what one sends to the others.

Everything goes through the default process group of ``torch.distributed``, as ``torchrun`` and
``torch.distributed.init_process_group`` start it. With one process nothing here communicates.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clipless_dp.errors import ConfigurationError, RankError

if dist.is_available():
    # Its functions hold on to the process group that is there when they are first imported (optimizers of torch import
    # them), past destroy_process_group(): threads of gloo then meet the end of the interpreter, which may abort.
    import torch.distributed.nn.functional

Value = TypeVar("Value")


class World(NamedTuple):
    """This process among those that train together.

    Attributes:
        rank: its number; rank 0 draws the noise and writes the checkpoints.
        size: how many there are. Rank ``r`` holds the samples ``r, r + size, r + 2·size, …``.
    """

    rank: int
    size: int


def world() -> World:
    """Where this process stands; ``World(0, 1)`` without a process group.

    Raises:
        ConfigurationError: ``torchrun`` started several processes that do not know of one another yet.
    """
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, which would each train and spend on their own: "
            "call torch.distributed.init_process_group() first"
        )
    return World(0, 1)


_ALIKE = "Build model, optimizer and data alike on all of them, and load the same state on all or none"


def agree(fields: Mapping[str, object], remedy: str = _ALIKE) -> None:
    """Compares values, by digests of their ``repr``, before anything rests on their being the same on all ranks.

    Raises:
        RankError: they differ; the message names which, and the remedy.
    """
    if world().size == 1:
        return
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in fields.values()]
    everyone = gathered(torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests]))
    same = (everyone == everyone[0]).all(0).tolist()
    differing = [name for name, equal in zip(fields, same, strict=True) if not equal]
    if differing:
        raise RankError(f"the ranks differ in {', '.join(differing)}; nothing was released. {remedy}")


def gathered(numbers: Tensor) -> Tensor:
    """The numbers of all ranks, ``(W, ...)``.

    Raises:
        RankError: another rank is gone.
    """
    if world().size == 1:
        return numbers[None].cpu()
    with together("the comparison of the ranks"):
        own = movable(numbers.contiguous())
        everyone = [torch.empty_like(own) for _ in range(world().size)]
        dist.all_gather(everyone, own)
        return torch.stack(everyone).cpu()


def copy_from_(tensors: Iterable[Tensor], rank: int = 0) -> None:
    """Overwrites tensors by those of one rank, in place.

    Raises:
        RankError: another rank is gone.
    """
    with together(f"the weights of rank {rank}"), torch.no_grad():
        for tensor in tensors:
            sent = movable(tensor.detach().clone(memory_format=torch.contiguous_format))
            dist.broadcast(sent, src=rank)
            tensor.copy_(sent)


def from_first(make: Callable[[], Value], device: torch.device | str = "cpu") -> Value:
    """What rank 0 makes, on all ranks.

    Args:
        make: called on rank 0 only; returns tensors and plain values.
        device: where the tensors go.

    Raises:
        RankError: it failed on rank 0, whose own error says why, or another rank is gone.
    """
    here = world()
    if here.size == 1:
        return make()
    buffer = io.BytesIO()
    failure: Exception | None = None
    if here.rank == 0:
        try:
            made = make()
            torch.save(made, buffer)
        except Exception as error:
            failure, buffer = error, io.BytesIO()
    with together("a message of rank 0"):
        size = movable(torch.tensor(len(buffer.getvalue())))
        dist.broadcast(size, src=0)
        content = torch.frombuffer(bytearray(buffer.getvalue() or bytes(int(size) or 1)), dtype=torch.uint8)
        content = movable(content)
        dist.broadcast(content, src=0)
    if failure is not None:
        raise failure
    if here.rank == 0:
        return made
    if not size:
        raise RankError("rank 0 failed, and its own error says why; nothing was released")
    received: Value = torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location=device, weights_only=True)
    return received


def total(values: Tensor) -> Tensor:
    """The sum over the ranks, without noise: for the data's owner only.

    Raises:
        RankError: another rank is gone.
    """
    if world().size == 1:
        return values
    return _reduced(values, dist.ReduceOp.SUM, "a sum over the ranks").to(values.device)


def largest(count: int) -> int:
    """The largest of the ranks' numbers.

    Raises:
        RankError: another rank is gone.
    """
    if world().size == 1:
        return count
    return int(_reduced(torch.tensor(count), dist.ReduceOp.MAX, "a comparison of the ranks"))


def on_any(condition: bool) -> bool:
    """Whether a condition holds on any rank, so that all can act on it at the same step."""
    return bool(total(torch.tensor(int(condition))))


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType, what: str) -> Tensor:
    with together(what):
        found = movable(values.detach().clone())
        dist.all_reduce(found, op=operation)
    return found


def movable(tensor: Tensor) -> Tensor:
    """The tensor where the process group can move it: gloo through main memory, NCCL on the current device."""
    backend = dist.get_backend()
    if backend == "gloo":
        return tensor.cpu()
    return tensor.cuda() if backend == "nccl" else tensor


@contextmanager
def together(what: str) -> Iterator[None]:
    """Says what did not arrive where the ranks cannot communicate.

    Raises:
        RankError: another rank is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"{what} did not arrive, because another rank failed, stopped or lags behind the timeout ({error}). No "
            "update was applied without noise: start all ranks again from the last checkpoint"
        ) from error
