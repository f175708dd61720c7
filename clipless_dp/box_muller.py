"""Standard normal numbers from random words, in operations that torch vectorises and shares among its threads.

torch's own generator of the CPU draws one number after the other, whatever the number of threads, and the draw is most
of its time. Here the words come from a faster source, and all that follows is element by element.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Words = Callable[[int], Tensor]
"""Draws a number of 64-bit words: int32, twice as many entries, on the CPU."""

_HALF_STEP = torch.tensor(2.0**-33, dtype=torch.float32, device="cpu")
_ZEROS = bytes(1 << 16)
_TAIL = 4
"""Entries behind the words: a cipher wants room for a block more than it writes."""


def can_fill(out: Tensor) -> bool:
    """Whether :func:`fill_normal_` is for this tensor: float32 on the CPU, without gaps."""
    return out.device.type == "cpu" and out.dtype == torch.float32 and out.is_contiguous()


def fill_normal_(out: Tensor, words: Words) -> Tensor:
    """Fills a tensor with independent standard normal numbers, two for each word.

    They are ``√(-2 ln u)·cos θ`` and ``√(-2 ln u)·sin θ``, with ``u = (k + ½)/2³²`` and ``θ = πm/2³¹`` for two
    independent 32-bit integers, in float32. None exceeds ``√(66 ln 2)`` = 6.76 in absolute value, which an ideal one
    does with probability 1.4e-11. The numbers do not depend on how many threads compute them.

    Args:
        out: float32 on the CPU, contiguous.
        words: where the integers come from.

    Source:
        Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    flat = out.view(-1)
    count = len(flat)
    if count % 2:
        flat.copy_(fill_normal_(flat.new_empty(count + 1), words)[:count])
        return out
    sines, cosines = flat.view(2, count // 2)
    integers = words(count // 2).view(2, count // 2)
    radius = sines.copy_(integers[0].view(torch.uint32))
    torch.add(_HALF_STEP, radius, alpha=2.0**-32, out=radius).log_().mul_(-2.0).sqrt_()
    angle = torch.empty_like(radius).copy_(integers[1]).mul_(math.pi * 2.0**-31)
    torch.cos(angle, out=cosines).mul_(radius)
    radius.mul_(angle.sin_())
    return out


def system_words() -> Words:
    """Words that only the operating system's entropy determines.

    AES-128 in counter mode with key and counter from the operating system, where the package ``cryptography`` is
    installed: no feasible computation tells more of them from some. Else numpy's SFC64 from 256 bits of entropy, which
    is statistically sound.
    """
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        return _words_of(np.random.SeedSequence(int.from_bytes(os.urandom(32), "big"), pool_size=8))
    encryptor = Cipher(algorithms.AES128(os.urandom(16)), modes.CTR(os.urandom(16))).encryptor()

    def words(count: int) -> Tensor:
        drawn = torch.empty(2 * count + _TAIL, dtype=torch.int32, device="cpu")
        room = drawn.numpy().data.cast("B")
        for start in range(0, 8 * count, len(_ZEROS)):
            encryptor.update_into(_ZEROS[: 8 * count - start], room[start:])
        return drawn[: 2 * count]

    return words


def seeded_words(seed: int) -> Words:
    """Words that are a function of a seed, the same on every machine, by numpy's SFC64."""
    return _words_of(np.random.SeedSequence(seed))


def _words_of(seed: np.random.SeedSequence) -> Words:
    generator = np.random.Generator(np.random.SFC64(seed))

    def words(count: int) -> Tensor:
        drawn = generator.integers(0, (1 << 64) - 1, size=count, dtype=np.uint64, endpoint=True)
        return torch.from_numpy(drawn.view(np.int32))

    return words
