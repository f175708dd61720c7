"""Standard normal numbers from random words, whose tail does not end where those of usual samplers do.

torch's own samplers take one word for a radius: of 32 bits on CUDA devices, which ends at 6.8 standard deviations, or
of 53 in float64, which ends at 8.6. An output beyond the end tells a sample from its absence whatever ε says: the
missing mass belongs to δ. Here the tail is drawn apart, with as many bits as it needs. On the CPU, torch also draws one
number after the other, whatever the number of threads; here all but the words is element by element.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

Words = Callable[[Tensor], None]
"""Fills an int32 tensor of one dimension, without gaps, with random bits."""

_TAIL = 2.0**-24
"""Share of the pairs whose radius is drawn apart: those beyond 5.77. Few, as each costs some operations; and enough for
the 2⁸ radii of 32 bits next to them to be as good as a continuum."""
_TAIL_WORDS = 4
"""For the place of a radius in the tail."""
Streams = Callable[[int], Words]
"""Independent words for each number of at least 0: the same ones for the same number."""

_ZEROS = bytes(1 << 18)
_CIPHER_BLOCK = 16


class NormalNumbers:
    """Independent standard normal numbers: ``√(-2 ln u)·cos θ`` and ``√(-2 ln u)·sin θ`` for pairs of words.

    With probability ``p = 2⁻²⁴`` a pair is one of the tail: ``u = pv``, where ``v`` has 128 bits. Else
    ``u = p + (1-p)(k+½)/2ᵇ`` for a word ``k``, of 32 bits for float32 on the CPU, 31 on other devices, 63 for float64.
    How many pairs come before the next one of the tail is a geometric number, drawn in advance: no number is ever
    looked at, which would cost a pass over the memory, and on devices a wait.

    No number exceeds 14.6 in absolute value, which an ideal one does with probability 10⁻⁴⁷. Below that, the mass
    beyond any ``t`` is a Gaussian's to one part in 500. The numbers do not depend on how many threads compute them.

    Args:
        words: where the bits of usual pairs come from, on the device of the tensors to fill.
        tail_words: where those of the tail come from, on the CPU; by default ``words``.

    Source:
        Box and Muller 1958, "A note on the generation of random normal deviates".
    """

    def __init__(self, words: Words, tail_words: Words | None = None) -> None:
        self._words = words
        self._tail_words = words if tail_words is None else tail_words
        self._ahead = self._pairs_between()

    def fill_(self, out: Tensor) -> Tensor:
        """Fills a tensor of any floating-point dtype; where that has fewer bits than float32, numbers are rounded."""
        if not (out.is_contiguous() and out.dtype in (torch.float32, torch.float64)):
            dtype = out.dtype if out.dtype == torch.float64 else torch.float32
            return out.copy_(self.fill_(torch.empty(out.shape, dtype=dtype, device=out.device)))
        flat = out.view(-1)
        count = flat.shape[0]
        if count % 2:
            flat.copy_(self.fill_(flat.new_empty(count + 1))[:count])
            return out
        # All in the memory of the result, but for the cosines: the integers become floats where they are.
        self._words(flat.view(torch.int32))
        pairs = count // 2
        radius, angle = flat.view(2, pairs).unbind()
        if out.dtype == torch.float32 and _has_unsigned_integers(out.device):
            step, _, offset = _scale(32, _TAIL)
            radius.copy_(radius.view(torch.uint32))
            torch.add(offset, radius, alpha=step, out=radius)
        else:
            _uniform_(radius)
        _apply("log", radius)
        _apply("sqrt", radius.mul_(-2.0))
        while self._ahead < pairs:
            radius[self._ahead] = math.sqrt(-2.0 * math.log(_TAIL * self._uniform(_TAIL_WORDS)))
            self._ahead += 1 + self._pairs_between()
        self._ahead -= pairs
        integers, turn = (torch.int64, 2.0**-63) if out.dtype == torch.float64 else (torch.int32, 2.0**-31)
        angle.copy_(angle.view(integers)).mul_(math.pi * turn)
        cosine = _apply("cos", angle, into=torch.empty_like(angle))
        _apply("sin", angle).mul_(radius)
        radius.mul_(cosine)
        return out

    def _pairs_between(self) -> int:
        """How many pairs come before the next one of the tail: ``P(n) = p(1-p)ⁿ``, by inversion."""
        return int(math.log1p(-min(self._uniform(2), 1.0 - 2.0**-53)) / math.log1p(-_TAIL))

    def _uniform(self, count: int) -> float:
        """``(k + ½)/2³²ⁿ`` for an integer of ``n`` words, the first one of which is the most significant."""
        drawn = torch.empty(count, dtype=torch.int32)
        self._tail_words(drawn)
        value = 0.5
        for word in reversed(drawn.tolist()):
            value = (value + word % 2**32) * 2.0**-32
        return value


def _apply(name: str, values: Tensor, into: Tensor | None = None) -> Tensor:
    """A function of each number, in place or into another tensor. NumPy's, of float32 with AVX-512, take 40 % of
    torch's time (65 % for the root), to 4 units in the last place; with AVX2 they take 1.1 times it. Which of the two
    it is depends on the machine alone, and not on the number of threads."""
    result = values if into is None else into
    if not (_HAS_AVX512 and values.is_cpu and values.dtype == torch.float32):
        return cast(Tensor, getattr(torch, name)(values, out=result))
    function, array, results = getattr(np, name), values.numpy(), result.numpy()
    threads = torch.get_num_threads() if array.size >= _SHARED else 1
    if threads == 1:
        function(array, out=results)
        return result
    parts = list(zip(np.array_split(array, threads), np.array_split(results, threads), strict=True))
    done: list[int] = []

    def take(place: int) -> None:
        function(parts[place][0], out=parts[place][1])
        done.append(place)

    started: list[threading.Thread] = []
    with suppress(RuntimeError):
        # No further thread, or the interpreter ends: what is left is done here, and none twice.
        for place in range(1, threads):
            thread = threading.Thread(target=take, args=(place,), name="clipless-dp noise")
            thread.start()
            started.append(thread)
    for place in (0, *range(1 + len(started), threads)):
        take(place)
    for thread in started:
        thread.join()
    if len(done) != threads:
        raise RuntimeError("a thread that draws noise has failed: its numbers are not used")
    return result


_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_SHARED = 1 << 19
"""Numbers that are shared among threads, which have to be started for it."""


@lru_cache
def _scale(bits: int, tail: float) -> tuple[float, float, Tensor]:
    """``(1-p)/2ᵇ`` and ``p + ½(1-p)/2ᵇ``; the second also as a tensor, which takes 12 µs to make."""
    step = (1.0 - tail) * 2.0**-bits
    offset = tail + 0.5 * step
    return step, offset, torch.tensor(offset, dtype=torch.float32, device="cpu")


def _has_unsigned_integers(device: torch.device) -> bool:
    return device.type == "cpu"


def _uniform_(radius: Tensor) -> None:
    """Turns words ``k`` into ``u`` in place, without unsigned integers and tensors of another device."""
    bits, integers = (63, torch.int64) if radius.dtype == torch.float64 else (31, torch.int32)
    step, least, _ = _scale(bits, _TAIL)
    radius.copy_(radius.view(integers).bitwise_and_((1 << bits) - 1)).mul_(step).add_(least)


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


def generator_words(generator: torch.Generator) -> Words:
    """Words of a torch generator, on its device."""

    def words(out: Tensor) -> None:
        count = len(out)
        if count % 2 or out.storage_offset() % 2:
            room = out.new_empty(count + count % 2)
            words(room)
            out.copy_(room[:count])
        else:
            # From and to None: all of the 64 bits.
            out.view(torch.int64).random_(-(1 << 63), None, generator=generator)

    return words


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
