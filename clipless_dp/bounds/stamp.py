"""Stamps of weights: whether one has changed since, by whatever way."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

Stamp = tuple[int, tuple[int, ...], bytes]

_BLOCK = 2048
"""Entries of a parameter that are summed up in one number of a stamp."""


def stamp(parameter: Tensor) -> Stamp:
    """Tells whether a parameter has changed: its version, its place in memory, and a digest of its numbers.

    Of a parameter that is split among processes, each stamps the part that it holds.

    The digest is for changes through ``.data``, of which autograd's version counter knows nothing. It is of the sums
    of bit patterns over blocks of 2048 entries, in the order of memory, as integers modulo 2⁶⁴ (of float32, pairs as
    one), without rounding; of weighted sums ``Σ_i r_i w_{in+k}`` of every n-th entry, for n blocks, with fixed
    pseudo-random ``r``; and of the patterns of what these blocks leave, or of all entries where they are fewer than
    4096. Up to collisions of a 128-bit hash:

    * a change of one pattern is always noticed, and so is any change, exchange or shuffle after which some block's
      patterns have another sum: in particular what moves different patterns between two blocks;
    * so is any change of what is not in blocks;
    * what keeps all these sums, a shuffle within blocks or an even number of sign changes, say, is noticed where it
      moves some weighted sum by more than that sum's rounding. For a change ``d`` of the 2048 entries of one sum, and
      weights uniform in an interval of length 1, ``Σ r_i d_i`` has a density of at most ``1/max|d_i|``: to stay within
      a rounding ``e`` has a probability of at most ``2e/max|d_i|``, for each of the n sums.
    """
    values = parameter.detach()
    place = values.data_ptr(), *values.stride()
    # Of the parameter itself: within an opaque operator what is detached from it has a counter of its own.
    version = parameter._version
    flat = _in_memory(values)
    size = flat.numel()
    if flat.dtype == torch.float64 or (size % 2 == 0 and flat.storage_offset() % 2 == 0):
        # Several times faster than sums over half-width integers, which torch converts one by one.
        patterns = flat.view(torch.int64)
    else:
        patterns = flat.view(torch.int32)
    if size < 2 * _BLOCK:
        return version, place, _digest(patterns)
    blocks, length = size // _BLOCK, _BLOCK * patterns.numel() // size
    with torch.autocast(flat.device.type, enabled=False) if torch.is_autocast_enabled(flat.device.type) else _NOTHING:
        sums = patterns[: blocks * length].view(blocks, length).sum(1)
        rows = flat[: blocks * _BLOCK].view(_BLOCK, blocks)
        weighted = torch.mv(rows.t(), _weights(flat.dtype, flat.device))
    return version, place, _digest(sums, weighted, patterns[blocks * length :])


_NOTHING: AbstractContextManager[None] = nullcontext()


def _in_memory(values: Tensor) -> Tensor:
    """All entries in one row, in the order in which they lie in memory where they lie without gaps."""
    if values.is_contiguous():
        return values.view(-1)
    axes = sorted(range(values.dim()), key=lambda axis: values.stride(axis), reverse=True)
    return values.permute(axes).reshape(-1).contiguous()


def _digest(*parts: Tensor) -> bytes:
    return hashlib.blake2b(b"".join([part.cpu().numpy().tobytes() for part in parts]), digest_size=16).digest()


@lru_cache(maxsize=16)
def _weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed numbers, uniform in [0.5, 1.5)."""
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.rand(_BLOCK, generator=generator, dtype=torch.float64, device="cpu")
    return (drawn + 0.5).to(device, dtype)
