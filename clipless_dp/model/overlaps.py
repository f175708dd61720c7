"""Parameters that share memory: what changes one would change the other, behind its projection and its certificate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError


class _Held(NamedTuple):
    name: str
    tensor: Tensor
    trained: bool

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        sizes = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return self.start + self.tensor.element_size() * (1 + sum((size - 1) * step for size, step in sizes))


def refuse_overlaps(net: nn.Module) -> None:
    """Refuses parameters that overlap with each other, with a buffer, or with themselves (by ``expand``).

    The same parameter in several places is none of these: it is one parameter, whose uses are counted.

    Raises:
        ConfigurationError: names the first two that overlap.
    """
    named = [_Held(name, parameter, True) for name, parameter in net.named_parameters()]
    named += [_Held(name, buffer, False) for name, buffer in net.named_buffers()]
    held = [one for one in named if _has_memory(one.tensor)]
    for one in held:
        if one.trained and _repeats(one.tensor):
            raise ConfigurationError(
                f"entries of the parameter {one.name!r} share memory with one another, as expand() makes them: a "
                "change of one changes others. Give it memory of its own: nn.Parameter(weight.clone())"
            )
    for device in {one.tensor.device for one in held}:
        open_: list[_Held] = []
        for one in sorted((one for one in held if one.tensor.device == device), key=lambda one: one.start):
            open_ = [other for other in open_ if other.end > one.start]
            for other in open_:
                if (one.trained or other.trained) and _meet(one, other):
                    first, second = sorted((one.name, other.name))
                    raise ConfigurationError(
                        f"{first!r} and {second!r} share memory without being one parameter: what is done to one "
                        "after a step undoes what is known of the other. Use the same nn.Parameter in both places, or "
                        "nn.Parameter(weight.clone())"
                    )
            open_.append(one)


def places(parameters: list[nn.Parameter]) -> list[tuple[int, tuple[int, ...]]]:
    """Where parameters lie in memory: as long as it is the same, they overlap no more than before."""
    return [(parameter.data_ptr(), parameter.stride()) for parameter in parameters]


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel() > 0


def _repeats(tensor: Tensor) -> bool:
    reach = 0
    for step, size in sorted(
        (step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    ):
        if step <= reach:
            # Either entries meet, or they interlock: only a look at all of them tells.
            offsets = _offsets(tensor)
            return len(offsets.unique()) < len(offsets)
        reach += (size - 1) * step
    return False


def _offsets(tensor: Tensor) -> Tensor:
    """Places of all entries, in entries from the first."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + step * torch.arange(size)
    return offsets.flatten()


def _meet(one: _Held, other: _Held) -> bool:
    """Whether two tensors whose spans of memory meet have bytes in common: columns of one matrix, say, have none."""
    unit = math.gcd(one.tensor.element_size(), other.tensor.element_size(), one.start - other.start)
    start = min(one.start, other.start)
    taken = torch.zeros((max(one.end, other.end) - start) // unit, dtype=torch.bool)
    found = []
    for held in (one, other):
        width = held.tensor.element_size() // unit
        first = (held.start - start) // unit
        found.append((first + width * _offsets(held.tensor).unsqueeze(1) + torch.arange(width)).flatten())
    taken[found[0]] = True
    return bool(taken[found[1]].any())
