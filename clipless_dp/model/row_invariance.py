"""Passes in which no sample's values depend on how many others there are, nor on its place among them, to the last bit.

Libraries choose the kernel of a product by its number of rows, and finish the last rows with another one. That changes
the last bits of all samples' activations. Where an activation is exactly zero in real arithmetic, its sign decides the
derivative of a ReLU, and one more sample would then change what all others contribute.

Which sizes yield the same bits is a property of library, processor and shapes, so it is asked of them: a copy of the
network with random weights runs public random samples, at every place, and what differs by a bit from a reference of
fixed size is not run. The sizes of passes are then chosen among those that agree.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipless_dp.gates import weighing, weights_of

_REFERENCES = (64, 48, 96, 72, 32, 24, 16)
"""Rows of the pass that others must agree with, if nothing is said of how many are expected; the first in which all
places agree. Never of a draw's size, which is private."""

_EXPECTED = 512
"""At most so many rows of the reference are of the expected number: larger ones are computed alike, and take longer."""

_OWN = 64
"""So many different sizes are asked about as they are, each at the cost of a step or so."""

_STEP = 8
"""All others are multiples of it: few to ask about, and few rows of padding."""

_LARGER = 1 / 16
"""Share of rows that may be added to meet a size that agrees, before a pass is cut."""

_SAMPLES = 61
"""Different samples to ask with: a prime, so that each meets every place of a kernel's block; and so many numbers that
two orders of summation do not round alike in all of them."""


_ALIGNMENT = 64
"""Bytes: torch aligns new tensors so, and a kernel may treat what lies otherwise differently."""

_Kind = tuple[int, torch.memory_format]
"""What the choice of kernels depends on besides the network and the number of rows: threads, and the input's layout."""


class Values(NamedTuple):
    """What the network makes of some rows.

    Attributes:
        outputs: ``(B, *output_shape)``.
        finite: which rows the input gate let pass, ``(B,)``.
        whole: whether it is known to be all of them.
    """

    outputs: Tensor
    finite: Tensor
    whole: bool


Run = Callable[[Tensor], Values]


_ROUNDED = ("mm", "convolution", "linear", "norm")
"""In the names of operations that sum in an order of their own."""


class RowInvariance:
    """Runs passes at sizes that agree with each other to the last bit.

    Args:
        backward: whether the cotangents that arrive at the network's input must agree as well, not only its outputs.

    Guarantee:
        At sizes that agree, each sample's activations, and with them every sign, maximum and order that they decide,
        are the same numbers whatever other samples there are, if kernels are chosen by shapes, strides and the number
        of threads, not by values.
    """

    def __init__(self, *, backward: bool) -> None:
        self._backward = backward
        self._references: tuple[int, ...] = _REFERENCES
        self._agreeing: dict[tuple[_Kind, int], bool] = {}
        # A pass that is computed again, under activation checkpointing, takes what it took first.
        self._chosen: dict[tuple[_Kind, int], list[int]] = {}
        self._reference: dict[_Kind, tuple[int, tuple[Tensor, ...]] | None] = {}

    def __reduce__(self) -> tuple[Callable[[bool], RowInvariance], tuple[bool]]:
        return _made, (self._backward,)

    def expect(self, count: float) -> None:
        """Passes will have about so many rows, which is public: sizes are chosen to agree with passes of that size.

        Before the first pass; later it says nothing.
        """
        if not self._reference:
            likely = min(_EXPECTED, _STEP * math.ceil(count / _STEP))
            self._references = (likely, *_REFERENCES)

    @property
    def found(self) -> bool | None:
        """Whether sizes that agree were found for all passes so far; ``None`` before the first."""
        return all(known is not None for known in self._reference.values()) if self._reference else None

    def run(self, run: Run, inputs: Tensor, twin: Callable[[], Twin]) -> Values:
        """The values of all rows, at sizes that agree; at their own where none do.

        Args:
            run: the network.
            inputs: ``(B, *input_shape)``, ``B`` at least 1.
            twin: makes a copy of the network to ask.
        """
        count = len(inputs)
        spatial = inputs.dim() == 4 and not inputs.is_contiguous()
        last = spatial and inputs.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        weights = weights_of(inputs)
        with weighing(None):
            sizes = self._sizes(count, (torch.get_num_threads(), layout), twin)
        missing = sum(sizes) - count
        if missing:
            weights = None if weights is None else torch.cat((weights, weights.new_zeros(missing)))
            # Zeros, whose outputs are dropped: nothing flows back to them.
            inputs = torch.cat((inputs, inputs.new_zeros(missing, *inputs.shape[1:])))
        inputs = inputs.contiguous(memory_format=layout)
        if inputs.data_ptr() % _ALIGNMENT:
            inputs = inputs.clone()
        if sizes == [count]:
            return run(inputs)
        parts = []
        weighed = repeat(None, len(sizes)) if weights is None else weights.split(sizes)
        for part, own in zip(inputs.split(sizes), weighed, strict=True):
            with weighing(own):
                parts.append(run(part))
        outputs = torch.cat([part.outputs for part in parts]) if len(parts) > 1 else parts[0].outputs
        finite = torch.cat([part.finite for part in parts]) if len(parts) > 1 else parts[0].finite
        return Values(outputs[:count], finite[:count], all(part.whole for part in parts))

    def _sizes(self, count: int, kind: _Kind, twin: Callable[[], Twin]) -> list[int]:
        """Sizes that agree and hold so many rows, which are all of one size but for the last."""
        if (kind, count) not in self._chosen:
            ask = _Once(twin)
            try:
                self._chosen[kind, count] = self._choose(count, kind, ask)
            except Exception:
                # A layer that cannot be copied, or takes no samples but real ones: nothing is known.
                self._chosen[kind, count], self._reference[kind] = [count], None
            finally:
                ask.release()
        return self._chosen[kind, count]

    def _choose(self, count: int, kind: _Kind, ask: _Once) -> list[int]:
        least = self._least(kind, ask)
        if least is None or (len(self._chosen) < _OWN and self._agrees(count, kind, ask)):
            return [count]
        size = _STEP * math.ceil(count / _STEP)
        largest = max(size + size * _LARGER, least)
        larger = next((some for some in range(size, int(largest) + 1, _STEP) if self._agrees(some, kind, ask)), None)
        if larger is not None:
            return [larger]
        for parts in range(2, math.ceil(size / least)):
            smaller = _STEP * math.ceil(size / parts / _STEP)
            for some in range(smaller, int(smaller + smaller * _LARGER) + 1, _STEP):
                if some < size and self._agrees(some, kind, ask):
                    return [some] * math.ceil(count / some)
        return [least] * math.ceil(count / least)

    def _least(self, kind: _Kind, ask: _Once) -> int | None:
        """The size of the reference, or ``None`` where there is none."""
        if kind not in self._reference:
            found = None
            for size in self._references:
                starts = range(0, _SAMPLES, size)
                passes = [ask().values(size, start, kind, self._backward) for start in starts]
                first = tuple(torch.cat(parts)[:_SAMPLES] for parts in zip(*passes, strict=True))
                if self._equal(size, kind, first, ask):
                    found = size, first
                    self._agreeing[kind, size] = True
                    break
            self._reference[kind] = found
        known = self._reference[kind]
        return None if known is None else known[0]

    def _agrees(self, size: int, kind: _Kind, ask: _Once) -> bool:
        key = kind, size
        if key not in self._agreeing:
            reference = self._reference[kind]
            self._agreeing[key] = reference is not None and self._equal(size, kind, reference[1], ask)
        return self._agreeing[key]

    def _equal(self, size: int, kind: _Kind, reference: tuple[Tensor, ...], ask: _Once) -> bool:
        # Larger passes have each sample at several places already.
        for shift in (0, 17, 40)[: 3 if size < 2 * _SAMPLES else 2]:
            places = (torch.arange(size) + shift) % _SAMPLES
            values = ask().values(size, shift, kind, self._backward)
            if len(values) != len(reference):
                return False
            for found, expected in zip(values, reference, strict=True):
                if not torch.equal(_bits(found), _bits(expected[places.to(expected.device)])):
                    return False
        return True


def _made(backward: bool) -> RowInvariance:
    return RowInvariance(backward=backward)


class _Once:
    """A twin that is made when it is first needed, and no longer kept than one question."""

    def __init__(self, make: Callable[[], Twin]) -> None:
        self._make = make
        self._twin: Twin | None = None

    def __call__(self) -> Twin:
        if self._twin is None:
            self._twin = self._make()
        return self._twin

    def release(self) -> None:
        if self._twin is not None:
            self._twin.release()


class Twin:
    """A network to ask: the same layers with random weights, and samples that depend on nothing private.

    Args:
        run: the copy.
        net: holds its parameters, which are overwritten, and is set to evaluation: masks would differ by place.
        samples: makes so many of them from a generator.
        device: where they go.
    """

    def __init__(
        self, run: Run, net: nn.Module, samples: Callable[[int, torch.Generator], Tensor], device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        net.eval()
        with torch.no_grad():
            for parameter in net.parameters():
                spread = 1.0 / math.sqrt(max(1, parameter[0].numel())) if parameter.dim() > 1 else 0.1
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
                parameter.copy_(drawn.to(parameter.dtype))
        self._run = run
        self._net = net
        self._samples = samples(_SAMPLES, generator).to(device)

    def release(self) -> None:
        """Frees the weights now: graphs hold themselves until garbage is collected."""
        for parameter in self._net.parameters():
            parameter.data = parameter.data.new_empty(0)

    def values(self, size: int, shift: int, kind: _Kind, backward: bool) -> tuple[Tensor, ...]:
        """Outputs, and the cotangents at the input if they are wanted, of the samples in a cycle that begins at one."""
        places = ((torch.arange(size) + shift) % _SAMPLES).to(self._samples.device)
        inputs = self._samples[places].contiguous(memory_format=kind[1])
        backward = backward and inputs.is_floating_point()
        # Nothing is kept for a way back but here: hooks of activation checkpointing would count what they see.
        own = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
        with own, torch.set_grad_enabled(backward):
            with _Digests(size) as digests:
                outputs = self._run(inputs.requires_grad_(backward)).outputs
            seen = (outputs.detach(), *digests.found)
            if not backward:
                return seen
            cotangents = torch.randn(
                (_SAMPLES, *outputs.shape[1:]), generator=torch.Generator().manual_seed(1), dtype=torch.float64
            ).to(outputs)
            return *seen, *torch.autograd.grad(outputs, inputs, cotangents[places])


class _Digests(TorchDispatchMode):
    """Sums up what products and norms return for each sample, since a last bit may not show in the outputs.

    Args:
        rows: samples in the pass.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []
        self._rows = rows
        self._parts: dict[str, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not any(name in str(func) for name in _ROUNDED):
            return result
        if result.dim() > 0 and result.numel() > 0:
            if len(result) % self._rows == 0:
                self.found.append(self._digest(result))
            elif len(result) < self._rows:
                self._gather(f"{func} {tuple(result.shape[1:])}", result)
        return result

    def _gather(self, kind: str, part: Tensor) -> None:
        """Of what is computed by blocks of rows, one after the other, the rows together."""
        parts = self._parts.setdefault(kind, [])
        parts.append(part.clone())
        count = sum(map(len, parts))
        if count >= self._rows:
            del self._parts[kind]
        if count == self._rows:
            self.found.append(self._digest(torch.cat(parts)))

    def _digest(self, values: Tensor) -> Tensor:
        bits = _bits(values).reshape(self._rows, -1).long()
        # Different odd factors, modulo 2⁶⁴: a change of one number always shows.
        factors = torch.arange(bits.shape[1], device=bits.device) * 0x9E3779B97F4A7C2 + 1
        return (bits * factors).sum(1)


def copied(*modules: nn.Module) -> tuple[nn.Module, ...]:
    """Copies of modules that share layers, as they do."""
    return copy.deepcopy(modules)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int64)
