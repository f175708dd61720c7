"""Families of matrices that make norm estimates fail: clustered, decaying, degenerate, badly scaled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _orthogonal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64))[0]


def _with_spectrum(rows: int, columns: int, values: Tensor) -> Tensor:
    rank = min(rows, columns)
    left, right = _orthogonal(rows, rank), _orthogonal(columns, rank)
    return left @ torch.diag(values) @ right.T


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64)


def orthogonal(rows: int, columns: int) -> Tensor:
    matrix = _orthogonal(rows, columns)
    return matrix if rows >= columns else matrix.T


def rank_one(rows: int, columns: int) -> Tensor:
    return torch.outer(torch.randn(rows, dtype=torch.float64), torch.randn(columns, dtype=torch.float64))


def constant(rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns), 0.1, dtype=torch.float64)


def checkerboard(rows: int, columns: int) -> Tensor:
    signs = (torch.arange(rows)[:, None] + torch.arange(columns)[None, :]) % 2
    return (1.0 - 2.0 * signs).to(torch.float64)


def one_entry(rows: int, columns: int) -> Tensor:
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    matrix[rows // 2, columns // 3] = -3.7
    return matrix


def decaying(rows: int, columns: int) -> Tensor:
    rank = min(rows, columns)
    return _with_spectrum(rows, columns, 0.5 ** torch.arange(rank, dtype=torch.float64))


def clustered(rows: int, columns: int) -> Tensor:
    rank = min(rows, columns)
    return _with_spectrum(rows, columns, 1.0 - 1e-7 * torch.arange(rank, dtype=torch.float64) / rank)


def hidden_top(rows: int, columns: int) -> Tensor:
    """One direction slightly above a flat rest, orthogonal to the fixed start of the Lanczos guide."""
    rank = min(rows, columns)
    values = torch.ones(rank, dtype=torch.float64)
    values[0] = 1.3
    matrix = _with_spectrum(rows, columns, values)
    if rows > columns:
        return matrix
    index = torch.arange(rows, dtype=torch.float64)
    start = torch.cos(index * index)
    start /= start.norm()
    matrix -= torch.outer(start, start @ matrix)
    return matrix


def hilbert(rows: int, columns: int) -> Tensor:
    return 1.0 / (1.0 + torch.arange(rows, dtype=torch.float64)[:, None] + torch.arange(columns)[None, :])


def wide_range(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64) * 10.0 ** torch.randint(-12, 13, (rows, columns))


def zero(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64)


FAMILIES: dict[str, Callable[[int, int], Tensor]] = {
    family.__name__: family
    for family in (
        gaussian,
        orthogonal,
        rank_one,
        constant,
        checkerboard,
        one_entry,
        decaying,
        clustered,
        hidden_top,
        hilbert,
        wide_range,
        zero,
    )
}
