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

Words = Callable[[Tensor], None]
"""Fills an int32 tensor on the CPU, without gaps, with random bits."""

Streams = Callable[[int], Words]
"""Independent words for each number of at least 0: the same ones for the same number."""

_HALF_STEP = torch.tensor(2.0**-33, dtype=torch.float32, device="cpu")
_ZEROS = bytes(1 << 18)
_CIPHER_BLOCK = 16


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
    # All in the memory of the result, but for the cosines: the integers become floats where they are.
    words(flat.view(torch.int32))
    radius, angle = flat.view(2, count // 2)
    radius.copy_(radius.view(torch.uint32))
    torch.add(_HALF_STEP, radius, alpha=2.0**-32, out=radius).log_().mul_(-2.0).sqrt_()
    cosine = torch.cos(angle.copy_(angle.view(torch.int32)).mul_(math.pi * 2.0**-31))
    angle.sin_().mul_(radius)
    radius.mul_(cosine)
    return out


def system_words() -> Words:
    """Words that only the operating system's entropy determines.

    AES-128 in counter mode with key and counter from the operating system, where the package ``cryptography`` is
    installed: no feasible computation tells more of them from some. Else numpy's SFC64 from 256 bits of entropy, which
    is statistically sound.
    """
    return system_streams()(0)


def system_streams() -> Streams:
    """The same for any number of streams, which share one key, or one pool of entropy."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        return seeded_streams(int.from_bytes(os.urandom(32), "big"))
    key = algorithms.AES128(os.urandom(16))

    def stream(number: int) -> Words:
        # The lower half of the counter is the stream's own, which it does not come to the end of.
        encryptor = Cipher(key, modes.CTR(number.to_bytes(8, "big") + bytes(8))).encryptor()

        def words(out: Tensor) -> None:
            room = out.numpy().data.cast("B")
            size = len(room)
            # The cipher wants room for a block beyond what it writes, so the last ones are copied.
            whole = max(0, size - _CIPHER_BLOCK) // _CIPHER_BLOCK * _CIPHER_BLOCK
            for start in range(0, whole, len(_ZEROS)):
                encryptor.update_into(_ZEROS[: whole - start], room[start:])
            room[whole:] = encryptor.update(_ZEROS[: size - whole])

        return words

    return stream


def seeded_words(seed: int) -> Words:
    """Words that are a function of a seed and of how many were drawn, on every machine, by numpy's SFC64."""
    return _words_of(np.random.SeedSequence(seed))


def seeded_streams(seed: int) -> Streams:
    """Streams that are a function of a seed, as :func:`seeded_words`."""
    return lambda number: _words_of(np.random.SeedSequence(seed, spawn_key=(number,), pool_size=8))


def _words_of(seed: np.random.SeedSequence) -> Words:
    generator = np.random.Generator(np.random.SFC64(seed))

    def words(out: Tensor) -> None:
        count = len(out)
        drawn = generator.integers(0, (1 << 64) - 1, size=(count + 1) // 2, dtype=np.uint64, endpoint=True)
        out.numpy()[:] = drawn.view(np.int32)[:count]

    return words
