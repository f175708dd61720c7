"""Structured signals: what a bound that was checked on random inputs only tends to forget."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def signals(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    """Constant, one bright entry, checkerboard, aligned rows and channels, one bright pixel or corner, a comb, noise.

    Args:
        shape: of one sample, of any rank; the first axis of a map is its channels.
        generator: draws what is random.
    """
    count = math.prod(shape)
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) for size in shape], indexing="ij")).sum(0) if shape else None
    yield torch.ones(shape)
    for place in sorted({0, count // 2, count - 1}):
        yield torch.zeros(count).index_fill_(0, torch.tensor([place]), 1.0).reshape(shape)
    if grid is not None:
        yield 1.0 - 2.0 * (grid % 2)
    if len(shape) > 1:
        yield torch.randn(shape[-1], generator=generator).expand(shape)
        yield torch.randn(shape[0], generator=generator).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        centre, corner = torch.zeros(shape), torch.zeros(shape)
        centre.flatten(1)[:, _centre(shape[1:])] = 1.0
        corner.flatten(1)[:, 0] = 1.0
        yield centre
        yield corner
        if min(shape[1:]) > 8:
            yield comb(shape, 4)
        yield torch.cat([torch.ones(1, *shape[1:]), torch.zeros(shape[0] - 1, *shape[1:])])
    yield torch.randn(shape, generator=generator)
    yield 1e6 * torch.randn(shape, generator=generator)
    yield 1e-6 * torch.randn(shape, generator=generator)


def _centre(sizes: tuple[int, ...]) -> int:
    place = 0
    for size in sizes:
        place = place * size + size // 2
    return place


def comb(shape: tuple[int, ...], period: int) -> Tensor:
    """One bright pixel each period, borders left out: where windows of that stride overlap."""
    grid = torch.ones(shape)
    for axis, size in enumerate(shape[1:], start=1):
        bright = (torch.arange(size) % period == 0) & (torch.arange(size) > 0) & (torch.arange(size) < size - 1)
        grid = grid * bright.reshape(-1, *[1] * (len(shape) - 1 - axis))
    return grid


def sequences(shape: tuple[int, ...], vocabulary: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Tokens: one repeated, each the next, and random ones."""
    count = math.prod(shape)
    for token in sorted({0, vocabulary // 2, vocabulary - 1}):
        yield torch.full(shape, token)
    yield (torch.arange(count) % vocabulary).reshape(shape)
    yield torch.randint(vocabulary, shape, generator=generator)


def sized_signals(shape: tuple[int, ...], size: float, generator: torch.Generator) -> Iterator[Tensor]:
    """:func:`signals` in float64, those of an ordinary norm scaled to the gate's own radius."""
    for signal in signals(shape, generator):
        values = signal.double()
        norm = float(torch.linalg.vector_norm(values))
        yield values if norm > 1e3 or norm < 1e-3 else values * (size / norm)
