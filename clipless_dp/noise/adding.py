"""The one way to add noise to what is released."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipless_dp.noise.secure import SecureNoise
from clipless_dp.noise.sources import NoiseSource, SystemNoise

_BLOCK = 1 << 17
"""Numbers drawn at once on the CPU: enough for two threads in each operation, few enough to stay in their caches and
not to add to the peak of memory, which lies in the backward pass. Where there are many more, a sixteenth of them."""

_AT_ONCE = 1 << 19
"""So many of the operating system's are drawn at once, where that is all: each draw costs as much as ten thousand."""

_DEVICE_BLOCK = 1 << 26
"""Numbers drawn at once elsewhere, where each launch of a kernel costs more than what it reads."""

RELEASE_MARGIN = 1.0 + 1e-6
"""Noise is drawn this much larger than recorded, so that no rounding, of numbers, sums, scales and factors, makes it
smaller: of the numbers of float32 a radius is within 2e-7 of itself, a sine within 3e-7."""


def noisy(exact: Tensor | float, deviation: float, source: NoiseSource) -> Tensor:
    """Exact sums of a release with the noise that was recorded for it: ``exact + N(0, (RELEASE_MARGIN·deviation)²)``.

    Statistics and scores are released through this function; steps, whose deviations have the margin already, through
    :func:`add_normal_`, which it calls.

    Args:
        exact: any shape; counts and other numbers become float64.
        deviation: recorded standard deviation, positive.
        source: draws the numbers.

    Returns:
        A new tensor of the same shape and device, float64.
    """
    sums = torch.as_tensor(exact).detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    add_normal_([sums], [deviation * RELEASE_MARGIN], source)
    return sums


def add_normal_(
    tensors: Sequence[Tensor], deviations: Sequence[float], source: NoiseSource, factor: float = 1.0
) -> None:
    """Adds independent Gaussian noise of its own standard deviation to each tensor, then scales the sums, in place.

    All that is released goes through here. The numbers are drawn in blocks, which cut large tensors and gather small
    ones: never a second tensor of a large parameter's size on the CPU. Secure noise forms its sums itself, on a grid.

    Args:
        tensors: any shapes, of one device and dtype.
        deviations: the standard deviation for each.
        source: draws the numbers.
        factor: of all sums.
    """
    if isinstance(source, SecureNoise):
        for tensor, deviation in zip(tensors, deviations, strict=True):
            source.add_(tensor, deviation)
        torch._foreach_mul_(list(tensors), factor)
        return
    sizes = [tensor.numel() for tensor in tensors]
    block = max(_BLOCK, sum(sizes) // 16) if tensors[0].device.type == "cpu" else _DEVICE_BLOCK
    draw = _Drawing(tensors[0], source, sum(sizes))
    gathered: list[tuple[Tensor, float, int]] = []
    waiting = 0
    for tensor, deviation, size in zip(tensors, deviations, sizes, strict=True):
        if 8 * size <= block or not tensor.is_contiguous():
            if waiting + size > block:
                _add_gathered_(gathered, draw, factor)
                gathered, waiting = [], 0
            gathered.append((tensor, deviation, size))
            waiting += size
            continue
        flat = tensor.view(-1)
        # Even, as numbers come in pairs.
        length = 2 * math.ceil(size / max(1, round(size / block)) / 2)
        for part in flat.split(length) if length < size else (flat,):
            part.add_(draw(part.numel()), alpha=deviation).mul_(factor)
    _add_gathered_(gathered, draw, factor)


class _Drawing:
    """Blocks of standard normal numbers; each is valid until the next one.

    Args:
        like: a tensor of the device and type.
        source: draws the numbers.
        total: how many are asked for in all.
    """

    def __init__(self, like: Tensor, source: NoiseSource, total: int) -> None:
        self._source, self._used = source, 0
        self._ready = None
        at_once = total <= _AT_ONCE and like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
        if type(source) is SystemNoise and at_once:
            self._ready = source.standard_normal_(like.new_empty(total + total % 2))
        self._buffer = like.new_empty(0)

    def __call__(self, count: int) -> Tensor:
        if self._ready is not None:
            self._used += count
            return self._ready[self._used - count : self._used]
        if len(self._buffer) < count:
            self._buffer = self._buffer.new_empty(count)
        drawn = self._buffer if len(self._buffer) == count else self._buffer[:count]
        self._source.standard_normal_(drawn)
        return drawn


def _add_gathered_(parts: Sequence[tuple[Tensor, float, int]], draw: _Drawing, factor: float) -> None:
    """The same for tensors with their deviations and sizes, from one draw."""
    if not parts:
        return
    targets, deviations, sizes = zip(*parts, strict=True)
    drawn = draw(sum(sizes))
    shaped = [
        part if target.dim() == 1 else part.view(target.shape)
        for part, target in zip(drawn.split_with_sizes(sizes), targets, strict=True)
    ]
    if len(set(deviations)) == 1:
        torch._foreach_add_(targets, shaped, alpha=deviations[0])
    else:
        torch._foreach_mul_(shaped, deviations)
        torch._foreach_add_(targets, shaped)
    torch._foreach_mul_(targets, factor)
