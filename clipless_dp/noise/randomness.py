"""What dropout masks, random views and layers of a user's own draw from: never a generator that a user's seed sets.

A mask decides what a sample contributes. If all masks of a batch are a known function of a seed and of the place in the
batch, one more sample shifts those of all others, and moves their sum by far more than its own contribution. A sample's
bound holds where masks are independent of the data: drawn from a secret of this process, of more bits than a search
can exhaust.
"""
# ruff: noqa: NPY002 (what code of a user's draws from is numpy's global generator)

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from clipless_dp.errors import PrivacyError
from clipless_dp.noise.box_muller import Streams, Words, seeded_streams, system_streams
from clipless_dp.noise.sources import random_state

Origin = Literal["system", "reproducible"]

_BLOCK = 1 << 16
"""Words of a mask drawn at once: few enough to stay in a core's cache."""

_MOST_REMEMBERED = 1 << 16
"""Draws that are remembered for a recomputation; a step that makes more of them is not checkpointed, or not ended."""

EVERY_ENTRY, BY_CHANNEL, BY_SAMPLE = 0, 1, 2

_global = threading.RLock()
"""Held while the generators that all code of a process shares are in use for one pass."""


@dataclass
class _State:
    """Where draws come from, and how far they are.

    Attributes:
        origin: of the secret.
        streams: independent streams of random words by number.
        process: which began it.
        numbers: of the streams to come.
        known: the number of the stream that was used while torch's own generator was in a state; two where that has
            happened twice.
    """

    origin: Origin
    streams: Streams
    process: int = field(default_factory=os.getpid)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    known: dict[bytes, tuple[int, ...]] = field(default_factory=dict)


class Randomness:
    """The source of what a model draws in its passes: a key of the operating system, or a declared seed.

    Each draw has a stream of its own: of AES-128 in counter mode under a key that never leaves the process, or of what
    :func:`clipless_dp.noise.box_muller.system_streams` takes where the cipher is not installed; on accelerators it
    seeds torch's generator with 63 bits. Copies and forked processes start afresh.

    A forward pass that activation checkpointing repeats within the backward pass takes the stream that it took first:
    it is known by the state of torch's own generator, which checkpointing restores. (The state is only compared: no
    number of that generator enters a mask.)

    Attributes:
        draws: how many draws were made, by origin: ``"system"``, or ``"reproducible"`` for those of :meth:`seeded`.
        handle: names this object in compiled graphs of this process.
    """

    def __init__(self) -> None:
        self.draws: Counter[Origin] = Counter()
        self.handle = next(_handles)
        self._state = _State("system", system_streams())
        self._visitor: int | None = None
        live[self.handle] = self

    def __reduce__(self) -> tuple[type[Randomness], tuple[()]]:
        return type(self), ()

    @property
    def origin(self) -> Origin:
        """Where the next draw comes from."""
        return self._state.origin

    @property
    def visiting(self) -> bool:
        """Whether the generators that all code of the process shares follow this source, for this thread."""
        if torch.compiler.is_compiling():
            return self._visitor is not None
        return self._visitor == threading.get_ident()

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Within, draws are a function of the seed and of their order: for tests and research, never for a release.

        Args:
            seed: any integer of at least 0.
        """
        kept, self._state = self._state, _State("reproducible", seeded_streams(seed))
        try:
            yield
        finally:
            self._state = kept

    def forget(self) -> None:
        """Ends a step: no pass of it will be computed again."""
        self._state.known.clear()

    def dropout_noise(self, values: Tensor, kind: int, p: float) -> Tensor:
        """What dropout multiplies by: ``1/(1-p)`` with probability ``1-p``, else zero, independently.

        Args:
            values: ``(B, ...)``.
            kind: one number for each entry, for each channel of each sample, or for each sample.
            p: in (0, 1).

        Returns:
            Of the values' dtype and device, and of a shape that broadcasts to theirs.

        Raises:
            PrivacyError: as :meth:`words`.
        """
        words = self.words(values.device)
        noise = empty_noise(values, kind)
        if noise.device.type != "cpu":
            return noise.bernoulli_(1.0 - p, generator=_seeded_generator(words, noise.device)).div_(1.0 - p)
        flat = noise.as_strided((noise.numel(),), (1,))
        drawn = torch.empty(min(_BLOCK, len(flat)), dtype=torch.int32)
        # Uniform in [-2³¹, 2³¹): a share p of them lies below.
        least = min(round(p * 2.0**32), 2**32 - 1) - 2**31
        for part in flat.split(_BLOCK) if len(flat) else ():
            some = drawn[: len(part)]
            words(some)
            part.copy_(some >= least)
        return noise.div_(1.0 - p)

    def words(self, device: torch.device) -> Words:
        """A stream of random words that no other draw shares, but for a recomputation of the same pass.

        Args:
            device: of the pass.

        Raises:
            PrivacyError: a pass is computed again within a backward pass, and is not known.
        """
        state = self._state
        if state.origin == "system" and state.process != os.getpid():
            state = self._state = _State("system", system_streams())
        module = _own_generators(device)
        current = torch.get_rng_state() if module is None else module.get_rng_state(device)
        mark = hashlib.blake2b(current.numpy().tobytes(), digest_size=16).digest()
        if torch._C._current_graph_task_id() != -1:
            known = state.known.get(mark, ())
            if len(known) != 1:
                raise PrivacyError(
                    "a pass with dropout or random layers is computed again within a backward pass, and what it drew "
                    "first is not known: use torch.utils.checkpoint with preserve_rng_state=True, pass the model no "
                    "second time within a backward pass, and do not seed torch between two passes of one step"
                )
            number = known[0]
        else:
            if len(state.known) >= _MOST_REMEMBERED:
                state.known.clear()
            number = next(state.numbers)
            state.known[mark] = (*state.known.get(mark, ())[:1], number)
        # So that the next pass finds another state, as behind torch's own dropout.
        torch.empty((), dtype=torch.int64, device="cpu" if module is None else device).random_()
        self.draws[state.origin] += 1
        return state.streams(number)

    @contextmanager
    def visit(self, device: torch.device) -> Iterator[None]:
        """Within, the global generators of torch, numpy and Python follow this source; afterwards they are as before.

        For code that draws from them and that a user's seed must not reach: views of samples, layers of a user's own.

        Args:
            device: of the pass.

        Raises:
            PrivacyError: as :meth:`words`.
        """
        words = self.words(device)
        module = _own_generators(device)
        kind = {} if module is None else {"device_type": device.type}
        with _global, torch.random.fork_rng([] if module is None else [device], **kind):
            before = random.getstate(), np.random.get_state(), self._visitor
            self._visitor = threading.get_ident()
            _visits.depth += 1
            try:
                torch.set_rng_state(random_state(words))
                if module is not None:
                    module.set_rng_state(_seeded_generator(words, device).get_state(), device)
                bits = torch.empty(16, dtype=torch.int32)
                words(bits)
                random.seed(int.from_bytes(bits[:8].numpy().tobytes(), "little"))
                np.random.seed(bits[8:].numpy().view(np.uint32))
                yield
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])
                self._visitor = before[2]
                _visits.depth -= 1

    @_disable_dynamo  # Not torch.compiler.disable, which imports the compiler along with this module.
    def run(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """A function's value in a :meth:`visit`."""
        with self.visit(inputs.device):
            return function(inputs)


@contextmanager
def left_alone() -> Iterator[None]:
    """Behind it the generators of torch (of the CPU), numpy and Python are where they were, whatever was drawn within.

    For runs on made-up rows. Not while another thread's pass has these generators follow a source of its own.
    """
    if not _global.acquire(blocking=False):
        yield
        return
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        _global.release()


class _Visits(threading.local):
    """How many visits this thread is in."""

    depth = 0


_visits = _Visits()


class Moment:
    """How far the generators are that all code of a process shares: code that runs again draws the same numbers.

    Args:
        device: of the pass.
    """

    def __init__(self, device: torch.device) -> None:
        module = _own_generators(device)
        self._device = device
        self._states = torch.get_rng_state(), None if module is None else module.get_rng_state(device)
        self._others = random.getstate(), np.random.get_state()
        self._visited = _visits.depth > 0

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, they are there once more; afterwards as before."""
        own, module = self._states[1], _own_generators(self._device)
        kind = {} if own is None else {"device_type": self._device.type}
        with _global, torch.random.fork_rng([] if own is None else [self._device], **kind):
            before = random.getstate(), np.random.get_state()
            _visits.depth += self._visited
            try:
                torch.set_rng_state(self._states[0])
                if own is not None:
                    module.set_rng_state(own, self._device)
                random.setstate(self._others[0])
                np.random.set_state(self._others[1])
                yield
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])
                _visits.depth -= self._visited


_handles = itertools.count()


def count_from(start: int) -> None:
    """Objects to come are numbered from here on, so that no number tells how many there were."""
    global _handles
    _handles = itertools.count(start)


live: WeakValueDictionary[int, Randomness] = WeakValueDictionary()
"""The sources of this process by their handles."""
shared = Randomness()
"""For what is drawn outside of any model's passes."""


def _own_generators(device: torch.device) -> Any:
    """The module of an accelerator with random numbers of its own, or ``None``."""
    return None if device.type in ("cpu", "meta") else torch.get_device_module(device)


def _seeded_generator(words: Words, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if device.type == "cpu":
        generator.set_state(random_state(words))
        return generator
    bits = torch.empty(2, dtype=torch.int32)
    words(bits)
    return generator.manual_seed(int(bits.view(torch.int64)) & (2**63 - 1))


def current_generator(device: torch.device) -> torch.Generator | None:
    """The generator for a draw of the package's own: the global one within a visit, else a fresh one of the system."""
    if _visits.depth:
        return None
    return _seeded_generator(shared.words(device), device)


def empty_noise(values: Tensor, kind: int) -> Tensor:
    """Room for what :meth:`Randomness.dropout_noise` draws."""
    if kind == EVERY_ENTRY:
        return torch.empty_like(values)
    kept = 2 if kind == BY_CHANNEL else 1
    return values.new_empty((*values.shape[:kept], *[1] * (values.dim() - kept)))
