"""Where the noise comes from."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from clipless_dp.arguments import shown, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.noise.box_muller import NormalNumbers, Words, generator_words, seeded_words, system_words
from clipless_dp.noise.secure import SecureNoise


class NoiseSource(Protocol):
    """Fills tensors with independent standard normal numbers."""

    reproducible: bool

    def begin_step(self, step: int) -> None:
        """Called once before the noise of each optimizer step, with its number."""
        ...

    def standard_normal_(self, out: Tensor) -> object:
        """Fills ``out`` in place, of whatever shape; what it returns is not looked at."""
        ...


def noise_source(noise: NoiseSource | str | None) -> NoiseSource:
    """The source of a name: ``"system"`` (also ``None``) or ``"secure"``; a source is returned as it is.

    One of the user's is tried: it fills a few numbers, of step 0.

    Raises:
        ConfigurationError: it is none of these, a source that lacks a part of :class:`NoiseSource` or does not fill
            what it is given, or a package is missing.
    """
    noise = refuse_no_source(noise)
    if noise is None or isinstance(noise, str):
        return SecureNoise() if noise == "secure" else SystemNoise()
    if getattr(type(noise), "standard_normal_", None) not in _OWN_NUMBERS:
        _try(noise)
    return noise


def refuse_no_source(noise: Any) -> NoiseSource | str | None:
    """What was given for a source, once it is the name of one, or has the parts of one.

    Raises:
        ConfigurationError: it is neither.
    """
    if noise is None or (isinstance(noise, str) and noise in ("system", "secure")):
        return noise
    if isinstance(noise, (str, type)):
        raise ConfigurationError(f"noise must be 'system', 'secure' or a NoiseSource, got {shown(noise)}")
    lacking = [part for part in ("reproducible", "begin_step", "standard_normal_") if not hasattr(noise, part)]
    if lacking:
        raise ConfigurationError(
            f"noise must be 'system', 'secure' or a NoiseSource, got {shown(noise)}, which has no "
            f"{', no '.join(lacking)}"
        )
    source: NoiseSource = noise
    return source


def _try(source: NoiseSource) -> None:
    tried = torch.full((6,), math.nan)
    try:
        source.begin_step(0)
        source.standard_normal_(tried)
    except (AttributeError, TypeError) as error:
        raise ConfigurationError(f"{source!r} cannot be asked for noise as a NoiseSource is: {error}") from error
    except Exception:
        # It may draw on another device only; what it raises in a step passes.
        return
    if tried.shape != (6,) or not bool(torch.isfinite(tried).all()):
        raise ConfigurationError(
            f"standard_normal_(out) of {source!r} must fill out in place, with finite numbers: what it returns is not "
            "looked at"
        )


def source_name(kind: type[NoiseSource]) -> str:
    """The name under which a kind of source enters ledgers and statements: of this package's own, one that stays."""
    return _RECORDED_NAMES.get(kind) or f"{kind.__module__}.{kind.__qualname__}"


def is_own(source: NoiseSource) -> bool:
    """Whether a source is one of this package's own, which runs no code of others."""
    return type(source) in _RECORDED_NAMES and not any(map(callable, vars(source).values()))


class SystemNoise:
    """Private generators seeded by the operating system; nothing that user code seeds can make them predictable.

    On the CPU the words come from :func:`clipless_dp.noise.box_muller.system_words`; elsewhere from the counter-based
    generator of the device, whose 64-bit seed the operating system draws. Numbers are made of them by
    :class:`clipless_dp.noise.box_muller.NormalNumbers`. No state is ever saved: it would let a reader of a checkpoint
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
                numbers = known.numbers[out.device] = normal_numbers(system_words(), own)
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
        self.seed = whole("seed", seed, None, None)
        self.begin_step(0)

    def __getstate__(self) -> dict[str, Any]:
        # Copies start the step again: generators of words are of their process.
        return {**self.__dict__, "_numbers": {}}

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
            numbers = self._numbers[out.device] = normal_numbers(seeded_words(seed), own)
        return numbers.fill_(out)


_OWN_NUMBERS = {kind.standard_normal_ for kind in (SystemNoise, ReproducibleNoise, SecureNoise)}

_RECORDED_NAMES: dict[type, str] = {
    SystemNoise: "clipless_dp.noise.SystemNoise",
    ReproducibleNoise: "clipless_dp.noise.ReproducibleNoise",
    SecureNoise: "clipless_dp.secure_noise.SecureNoise",
}


def normal_numbers(words: Words, own: torch.Generator | None) -> NormalNumbers:
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
