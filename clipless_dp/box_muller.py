"""Standard normal numbers from random words, whose tail does not end where those of usual samplers do.

torch's own samplers take one word for a radius: of 32 bits on CUDA devices, which ends at 6.7 standard deviations, or of
53 in float64, which ends at 8.6. An output beyond the end tells a sample from its absence whatever ε says: the missing
mass belongs to δ. Here a radius has further words where the first one leaves the tail open. On the CPU, torch also draws
one number after the other, whatever the number of threads; here all but the words is element by element.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Words = Callable[[Tensor], None]
"""Fills an int32 tensor of one dimension, without gaps, with random bits."""

_HALF_STEP = torch.tensor(2.0**-33, dtype=torch.float32, device="cpu")
_REFINED = 256
"""First words below this, of the tail beyond 5.8 standard deviations, get further ones: one draw in 2²⁴."""
_FURTHER = 4
"""Words that refine a first one."""
_POSITIVE = (1 << 63) - 1
_SMALLEST = 2.0**-126
"""The least normal number of float32: some devices take smaller ones for zero, whose logarithm is not finite."""
_ZEROS = bytes(1 << 18)
_CIPHER_BLOCK = 16


def fill_normal_(out: Tensor, words: Words) -> Tensor:
    """Fills a tensor with independent standard normal numbers, by pairs.

    They are ``√(-2 ln u)·cos θ`` and ``√(-2 ln u)·sin θ`` for independent ``u`` in (0, 1) and ``θ``. Float32 numbers on
    the CPU take 32 bits for each: ``u = (k + v)/2³²``, where ``v`` is ½ for ``k ≥ 256``, and else has 128 further bits:
    none exceeds 14.9 in absolute value, which an ideal one does with probability 10⁻⁵⁰. Others take 126 bits for ``u``,
    63 for ``θ``, and never look at a number: none exceeds 13.2 (float64: 13.2 too), ideally 10⁻³⁹. Beyond any ``t`` below
    12 lies the mass of a Gaussian's tail to one part in 250. The numbers do not depend on how many threads compute them.

    Args:
        out: floating-point numbers of any shape, dtype and device; of fewer bits than float32's they are rounded.
        words: where the random bits come from, on the tensor's device.

    Source:
        Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    if not out.is_contiguous() or out.dtype not in (torch.float32, torch.float64):
        dtype = out.dtype if out.dtype == torch.float64 else torch.float32
        return out.copy_(fill_normal_(torch.empty(out.shape, dtype=dtype, device=out.device), words))
    flat = out.view(-1)
    count = len(flat)
    if count % 2:
        flat.copy_(fill_normal_(flat.new_empty(count + 1), words)[:count])
        return out
    if out.device.type == "cpu" and out.dtype == torch.float32:
        _fill_looking_(flat, words)
    elif count:
        _fill_blindly_(flat, words)
    return out


def _fill_looking_(flat: Tensor, words: Words) -> None:
    """A word for each number; the rare ones that end in the tail draw further ones."""
    # All in the memory of the result, but for the cosines: the integers become floats where they are.
    words(flat.view(torch.int32))
    radius, angle = flat.view(2, -1)
    radius.copy_(radius.view(torch.uint32))
    tail = None
    if len(radius) and radius.numpy().min() < _REFINED:
        (rare,) = torch.nonzero(radius < _REFINED, as_tuple=True)
        tail = rare, _refined_radii(radius[rare], words)
    torch.add(_HALF_STEP, radius, alpha=2.0**-32, out=radius).log_().mul_(-2.0).sqrt_()
    if tail is not None:
        radius[tail[0]] = tail[1]
    cosine = torch.cos(angle.copy_(angle.view(torch.int32)).mul_(math.pi * 2.0**-31))
    angle.sin_().mul_(radius)
    radius.mul_(cosine)


def _refined_radii(first: Tensor, words: Words) -> Tensor:
    """``√(-2 ln u)`` with ``u = (k + v)/2³²`` for first words ``k``, and further ones for ``v``."""
    further = torch.empty(_FURTHER * len(first), dtype=torch.int32)
    words(further)
    fraction = torch.full((len(first),), 0.5, dtype=torch.float64)
    for word in further.view(_FURTHER, -1):
        fraction.add_(word.view(torch.uint32)).mul_(2.0**-32)
    # In float64, as float32 ends before.
    return fraction.add_(first).mul_(2.0**-32).log_().mul_(-2.0).sqrt_().float()


def _fill_blindly_(flat: Tensor, words: Words) -> None:
    """Three words of 63 bits for each pair, whatever they are: on other devices, to look means to wait."""
    pairs = len(flat) // 2
    bits = torch.empty(3, pairs, dtype=torch.int64, device=flat.device)
    words(bits.view(-1).view(torch.int32))
    first, second = bits[:2].bitwise_and_(_POSITIVE)
    radius, angle = flat.view(2, pairs)
    radius.copy_(second).add_(0.5).mul_(2.0**-63).add_(first).mul_(2.0**-63)
    radius.clamp_(min=_SMALLEST).log_().mul_(-2.0).sqrt_()
    cosine = torch.cos(angle.copy_(bits[2]).mul_(math.pi * 2.0**-63))
    angle.sin_().mul_(radius)
    radius.mul_(cosine)


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

    def words(out: Tensor) -> None:
        room = out.numpy().data.cast("B")
        size = len(room)
        # The cipher wants room for a block beyond what it writes, so the last ones are copied.
        whole = max(0, size - _CIPHER_BLOCK) // _CIPHER_BLOCK * _CIPHER_BLOCK
        for start in range(0, whole, len(_ZEROS)):
            encryptor.update_into(_ZEROS[: whole - start], room[start:])
        room[whole:] = encryptor.update(_ZEROS[: size - whole])

    return words


def seeded_words(seed: int) -> Words:
    """Words that are a function of a seed and of how many were drawn, on every machine, by numpy's SFC64."""
    return _words_of(np.random.SeedSequence(seed))


def generator_words(generator: torch.Generator) -> Words:
    """Words of a torch generator, on its device."""

    def words(out: Tensor) -> None:
        count = len(out)
        drawn = torch.empty((count + 1) // 2, dtype=torch.int64, device=out.device)
        out.copy_(drawn.random_(-(1 << 63), None, generator=generator).view(torch.int32)[:count])

    return words


def _words_of(seed: np.random.SeedSequence) -> Words:
    generator = np.random.Generator(np.random.SFC64(seed))

    def words(out: Tensor) -> None:
        count = len(out)
        drawn = generator.integers(0, (1 << 64) - 1, size=(count + 1) // 2, dtype=np.uint64, endpoint=True)
        out.numpy()[:] = drawn.view(np.int32)[:count]

    return words
