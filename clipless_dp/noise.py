"""Where the noise comes from, and how it is shared among the parameters."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from threading import Lock
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from clipless_dp.box_muller import NormalNumbers, Words, generator_words, seeded_words, system_words
from clipless_dp.errors import ConfigurationError
from clipless_dp.secure_noise import SecureNoise

Allocation = Literal["global", "per-layer", "min-variance"]


def allocate(
    sensitivities: Sequence[float],
    sizes: Sequence[int],
    noise_multiplier: float,
    scheme: Allocation = "global",
) -> list[float]:
    """Standard deviation of each parameter's noise, all schemes having the same effective noise multiplier.

    * ``"global"``: ``σ_θ = σ·Δ`` with ``Δ² = Σ Δ_θ²``.
    * ``"per-layer"``: ``σ_θ = σ·√D·Δ_θ`` over the ``D`` parameters.
    * ``"min-variance"``: ``σ_θ² ∝ Δ_θ/√p_θ``, which minimises the total variance ``Σ p_θσ_θ²`` (Lagrange) at the
      given effective noise multiplier.

    Args:
        sensitivities: ``Δ_θ``; a parameter of zero sensitivity needs no noise and gets none.
        sizes: ``p_θ``, entries of each parameter.
        noise_multiplier: ``σ``.
        scheme: as above.

    Raises:
        ConfigurationError: the scheme is unknown.
    """
    active = [(delta, size) for delta, size in zip(sensitivities, sizes, strict=True) if delta > 0]
    if scheme == "global":
        total = math.hypot(*(delta for delta, _ in active))
        return [noise_multiplier * total if delta > 0 else 0.0 for delta in sensitivities]
    if scheme == "per-layer":
        return [noise_multiplier * math.sqrt(len(active)) * delta for delta in sensitivities]
    if scheme == "min-variance":
        scale = noise_multiplier * math.sqrt(sum(delta * math.sqrt(size) for delta, size in active))
        return [
            scale * math.sqrt(delta / math.sqrt(size)) if delta > 0 else 0.0
            for delta, size in zip(sensitivities, sizes, strict=True)
        ]
    raise ConfigurationError(f"allocation must be 'global', 'per-layer' or 'min-variance', got {scheme!r}")


def effective_noise_multiplier(sensitivities: Sequence[float], deviations: Sequence[float]) -> float:
    """``σ_eff = (Σ (Δ_θ/σ_θ)²)^(-½)``: the joint Gaussian mechanism's noise multiplier.

    The parts are independent Gaussian mechanisms on one sample's joint contribution, so rescaling each part by
    ``1/σ_θ`` makes them one mechanism of unit noise and sensitivity ``(Σ (Δ_θ/σ_θ)²)^½``.
    """
    ratio = math.hypot(*(d / s for d, s in zip(sensitivities, deviations, strict=True) if d > 0))
    return math.inf if ratio == 0 else 1.0 / ratio


class NoiseSource(Protocol):
    """Fills tensors with independent standard normal numbers."""

    reproducible: bool

    def begin_step(self, step: int) -> None:
        """Called once before the noise of each optimizer step, with its number."""
        ...

    def standard_normal_(self, out: Tensor) -> Tensor:
        """Fills ``out`` in place."""
        ...


def noise_source(noise: NoiseSource | str | None) -> NoiseSource:
    """The source of a name: ``"system"`` (also ``None``) or ``"secure"``; a source is returned as it is.

    Raises:
        ConfigurationError: it is none of these, a source that lacks a part of :class:`NoiseSource`, or a package is
            missing.
    """
    if noise is None or noise == "system":
        return SystemNoise()
    if noise == "secure":
        return SecureNoise()
    if isinstance(noise, (str, type)):
        raise ConfigurationError(f"noise must be 'system', 'secure' or a NoiseSource, got {noise!r}")
    lacking = [part for part in ("reproducible", "begin_step", "standard_normal_") if not hasattr(noise, part)]
    if lacking:
        raise ConfigurationError(
            f"noise must be 'system', 'secure' or a NoiseSource, got {noise!r}, which has no {', no '.join(lacking)}"
        )
    return noise


def source_name(kind: type[NoiseSource]) -> str:
    """The name under which a kind of source enters ledgers and statements."""
    return f"{kind.__module__}.{kind.__qualname__}"


_BLOCK = 1 << 17
"""Numbers drawn at once on the CPU: enough for two threads in each operation, few enough to stay in their caches and
not to add to the peak of memory, which lies in the backward pass. Where there are many more, a sixteenth of them."""

_DEVICE_BLOCK = 1 << 26
"""Numbers drawn at once elsewhere, where each launch of a kernel costs more than what it reads."""

MARGIN = 1.0 + 1e-6
"""Noise is drawn this much larger than recorded, so that the rounding of sums, scales and factors never makes it
smaller."""


def noisy(exact: Tensor | float, deviation: float, source: NoiseSource) -> Tensor:
    """Exact sums of a release with the noise that was recorded for it: ``exact + N(0, (MARGIN·deviation)²)``.

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
    add_normal_([sums], [deviation * MARGIN], source)
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
    buffer = tensors[0].new_empty(0)
    gathered: list[tuple[Tensor, float, int]] = []
    waiting = 0
    for tensor, deviation, size in zip(tensors, deviations, sizes, strict=True):
        if 8 * size <= block or not tensor.is_contiguous():
            if waiting + size > block:
                _add_gathered_(gathered, source, factor)
                gathered, waiting = [], 0
            gathered.append((tensor, deviation, size))
            waiting += size
            continue
        flat = tensor.view(-1)
        # Even, as numbers come in pairs.
        length = 2 * math.ceil(size / max(1, round(size / block)) / 2)
        for part in flat.split(length) if length < size else (flat,):
            room = len(part)
            buffer = buffer if len(buffer) >= room else buffer.new_empty(room)
            drawn = source.standard_normal_(buffer if len(buffer) == room else buffer[:room])
            part.add_(drawn, alpha=deviation).mul_(factor)
    _add_gathered_(gathered, source, factor)


def _add_gathered_(parts: Sequence[tuple[Tensor, float, int]], source: NoiseSource, factor: float) -> None:
    """The same for tensors with their deviations and sizes, from one draw."""
    if not parts:
        return
    targets, deviations, sizes = zip(*parts, strict=True)
    drawn = source.standard_normal_(targets[0].new_empty(sum(sizes))).split_with_sizes(sizes)
    shaped = [
        part if target.dim() == 1 else part.view(target.shape) for part, target in zip(drawn, targets, strict=True)
    ]
    if len(set(deviations)) == 1:
        torch._foreach_add_(targets, shaped, alpha=deviations[0])
    else:
        torch._foreach_mul_(shaped, deviations)
        torch._foreach_add_(targets, shaped)
    torch._foreach_mul_(targets, factor)


class SystemNoise:
    """Private generators seeded by the operating system; nothing that user code seeds can make them predictable.

    On the CPU the words come from :func:`clipless_dp.box_muller.system_words`; elsewhere from the counter-based
    generator of the device, whose 64-bit seed the operating system draws. Numbers are made of them by
    :class:`clipless_dp.box_muller.NormalNumbers`. No state is ever saved: it would let a reader of a checkpoint
    subtract the noise. Nor is it copied: copies and forked processes start afresh, since noise that two runs share
    cancels between them. Threads that share a source draw one after the other.
    """

    reproducible = False

    def __init__(self) -> None:
        self._start_afresh()

    def __reduce__(self) -> tuple[type[SystemNoise], tuple[()]]:
        return type(self), ()

    def _start_afresh(self) -> _Generators:
        # Lock and generators in one object: after a fork, no thread meets those of one with the lock of another.
        self._generators = _Generators(os.getpid(), Lock(), {})
        return self._generators

    def begin_step(self, step: int) -> None:
        """Nothing to do: the generators run on."""

    def standard_normal_(self, out: Tensor) -> Tensor:
        """See :class:`NoiseSource`."""
        known = self._generators
        if os.getpid() != known.process:
            known = self._start_afresh()
        # Numbers are drawn into buffers of their generator's own, which two threads would fill with one another's.
        with known.lock:
            numbers = known.numbers.get(out.device)
            if numbers is None:
                own = None if out.device.type == "cpu" else system_generator(out.device)
                numbers = known.numbers[out.device] = _numbers(system_words(), own)
            return numbers.fill_(out)


class _Generators(NamedTuple):
    """The generators of a process, by device, and the lock that is held while one of them draws."""

    process: int
    lock: Lock
    numbers: dict[torch.device, NormalNumbers]


class ReproducibleNoise:
    """Noise that is a function of a seed and the step number: for tests and research, never for a release.

    Whoever knows the seed can remove the noise, so the guarantee holds only while the seed is secret.

    Args:
        seed: any integer.
    """

    reproducible = True

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Restarts the generators from the seed and the step."""
        self._seed_of_step = derived_seed(self.seed, "noise", step)
        self._numbers: dict[torch.device, NormalNumbers] = {}

    def standard_normal_(self, out: Tensor) -> Tensor:
        """See :class:`NoiseSource`."""
        numbers = self._numbers.get(out.device)
        if numbers is None:
            seed = self._seed_of_step
            own = None if out.device.type == "cpu" else torch.Generator(out.device).manual_seed(seed)
            numbers = self._numbers[out.device] = _numbers(seeded_words(seed), own)
        return numbers.fill_(out)


def _numbers(words: Words, own: torch.Generator | None) -> NormalNumbers:
    """Of words on the CPU; on another device of its own generator, and the words for the tail."""
    return NormalNumbers(words) if own is None else NormalNumbers(generator_words(own), words)


def derived_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for one purpose and step, by hashing."""
    text = ":".join(map(str, (seed, *labels))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def system_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that starts from the operating system's entropy.

    The bytes of a CPU generator's state that depend on the seed are found by comparing differently seeded states,
    so no layout is assumed, and all of them are replaced.
    """
    device = torch.device(device)
    generator = torch.Generator(device)
    if device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)
    generator.set_state(random_state(system_words()))
    # A few outputs mix the fresh state through the recurrence before any is used.
    torch.empty(4096).normal_(generator=generator)
    return generator


def random_state(words: Words) -> Tensor:
    """A state for a generator of the CPU, as ``set_state`` takes it, that random words determine alone."""
    state, varying = _set_by_seeds()
    entropy = torch.empty(math.ceil(state.numel() / 4), dtype=torch.int32)
    words(entropy)
    return torch.where(varying, state ^ entropy.view(torch.uint8)[: state.numel()], state)


@functools.cache
def _set_by_seeds() -> tuple[Tensor, Tensor]:
    """A seeded state, and which of its bytes depend on the seed."""
    generator = torch.Generator()
    state = generator.manual_seed(0).get_state()
    varying = torch.zeros_like(state, dtype=torch.bool)
    for seed in range(1, 17):
        varying |= generator.manual_seed(seed).get_state() != state
    return state, varying
