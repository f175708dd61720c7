"""Gaussian noise from a cryptographic generator, added so that floating point tells nothing about what it hides."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError

_DRAWS = 4
"""Gaussians in each sum: 2n of them for n = 2 in the cited recipe."""
_BITS = 53
"""Of a uniform number: what a float64 holds."""
_GRID_BITS = 20
"""log₂ of the steps of the grid in the power of two below ``σ``: rounding adds less than 10⁻¹³ of the variance."""
_CHUNK = 1 << 14
"""Numbers drawn at once: their uniforms, four for each, are half a MiB and stay in a core's cache."""


class SecureNoise:
    """Noise that neither computing power nor the gaps between floating-point numbers remove.

    *Generator.* AES-256 in counter mode. Key and counter come from the operating system anew for every step, so that
    steps, ranks, copies, forked processes and resumed runs are independent, and what is in memory after a step tells
    nothing about the noise of earlier ones. Nothing of it is ever saved.

    *Floating point.* Textbook samplers leave gaps: which of the neighbouring numbers can occur depends on what the
    noise was added to, and that gives the hidden value away (Mironov 2012; Jin et al. 2022). Three things close them:

    * each Gaussian is a sum of four, from eight uniform numbers of 53 bits for each two sums, so that inverting the
      sampler would take a search over about 2¹⁵⁹ states (Holohan and Braghin 2021, with n = 2);
    * the sum with the gradient is formed in float64, whose rounding is a function of the exact sum alone;
    * it is then rounded to a grid that depends on ``σ_θ`` only: multiples of ``2^(⌊log₂ σ_θ⌋ - 20)``. Every multiple is
      reached from about 2³² float64 numbers, whatever the gradient is, so the gaps are never seen. Rounding is
      post-processing, hence free.

    The Gaussians are those of Box and Müller in float64: none exceeds 17 standard deviations, which an ideal one does
    with probability 10⁻⁶⁴. Noise is generated on the host and added on CUDA devices or the host.

    Raises:
        ConfigurationError: the package ``cryptography`` is missing.

    Source:
        Mironov 2012, "On significance of the least significant bits for differential privacy"; Holohan and Braghin
        2021, "Secure random sampling in differential privacy", sections 4 and 5.
    """

    reproducible = False

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise ConfigurationError(
                "noise='secure' needs the package cryptography: pip install 'clipless-dp[secure]'"
            ) from error

        def stream() -> Any:
            return Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

        self._new_stream: Callable[[], Any] = stream
        self.begin_step(0)

    def __reduce__(self) -> tuple[type[SecureNoise], tuple[()]]:
        return type(self), ()

    def begin_step(self, step: int) -> None:
        """Forgets the key and takes a new one from the operating system."""
        self._stream = _Stream(os.getpid(), Lock(), self._new_stream())

    def standard_normal_(self, out: Tensor) -> Tensor:
        """Fills ``out`` with independent standard normal numbers, rounded to its dtype; :meth:`add_` leaves no gaps."""
        return out.copy_(self._normal(out.numel()).view(out.shape))

    def add_(self, target: Tensor, deviation: float) -> None:
        """Adds noise to a tensor in place, rounding the sum to the grid of its standard deviation.

        Args:
            target: any shape, dtype and device.
            deviation: ``σ_θ > 0``.
        """
        home = target.device if target.device.type == "cuda" else torch.device("cpu")
        grid = 2.0 ** (math.frexp(deviation)[1] - 1 - _GRID_BITS)
        if not target.is_contiguous():
            flat = target.contiguous()
            self.add_(flat, deviation)
            target.copy_(flat)
            return
        for part in target.view(-1).split(_CHUNK):
            total = self._normal(part.numel()).to(home).mul_(deviation).add_(part.to(home, torch.float64))
            part.copy_(total.div_(grid).round_().mul_(grid))

    def _normal(self, count: int) -> Tensor:
        """``(count,)`` float64 on the host: each the half of a sum of four Gaussians."""
        pairs = max(1, (count + 1) // 2)
        uniform = self._integers(2 * _DRAWS * pairs).to(torch.float64).view(2, _DRAWS, pairs)
        # (k+1)/2⁵³ lies in (0, 1]: its logarithm is finite.
        radius = uniform[0].add_(1.0).mul_(2.0**-_BITS).log_().mul_(-2.0).sqrt_()
        angle = uniform[1].mul_(2.0 * math.pi * 2.0**-_BITS)
        sums = torch.cat([(radius * angle.cos()).sum(0), (radius * angle.sin()).sum(0)])
        return sums.mul_(1.0 / math.sqrt(_DRAWS))[:count]

    def _integers(self, count: int) -> Tensor:
        """``(count,)`` int64, uniform on 0 … 2⁵³-1."""
        if os.getpid() != self._stream.process:
            self.begin_step(0)
        known = self._stream
        # A cipher serves one thread at a time.
        with known.lock:
            stream: bytes = known.cipher.update(bytes(8 * count))
        return torch.frombuffer(bytearray(stream), dtype=torch.int64) & ((1 << _BITS) - 1)


class _Stream(NamedTuple):
    """The cipher of a process, and the lock that is held while it is drawn from."""

    process: int
    lock: Lock
    cipher: Any
