"""Which tensors are Poisson draws, so that amplification is charged only for rows that came in as they were drawn.

A shuffled loader gives no amplification by subsampling, and nothing in a batch says how it was drawn. The samplers of
this package therefore deliver each draw here, when its batch arrives in the hands of whoever asked for it. What counts
is the batch itself: a pass asks whether its rows are those of a draw, unchanged (:func:`find`), and an optimizer uses a
draw up (:func:`use`), so that it amplifies one step.
"""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import get_worker_info
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef


@dataclass(eq=False)
class Draw:
    """One Poisson draw: every sample is in it with the same probability, independently.

    Attributes:
        sample_rate: the probability.
        seeded: whether a seed determines it.
        series: the iteration of a sampler that it comes from.
        place: its number there.
        rows: how many rows of its batch are samples; they come first.
        amplifies: whether it was handed out where gradients are on. What is only looked at amplifies nothing.
        used: whether a step has used it up.
    """

    sample_rate: float
    seeded: bool = False
    series: object = None
    place: int = 0
    rows: int = 0
    amplifies: bool = True
    used: bool = False
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)


class Rows(NamedTuple):
    """Rows of a tensor in memory.

    Attributes:
        base: the tensor that they are a part of.
        start: the first one.
        stop: the one behind the last.
        draw: what ``base`` is a draw of, if it is one.
    """

    base: WeakIdRef
    start: int
    stop: int
    draw: Draw | None = None


class _Delivered(NamedTuple):
    draw: Draw
    version: int
    sample: int | None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is as it was handed out."""
        return tensor._version == self.version and sample(tensor) == self.sample


_MOST_HELD = 4
"""Draws in hand whose batches are kept, to know copies of them by what they hold."""

_SAMPLED = 128
"""Entries that are looked at: each is a miss of the cache."""


@lru_cache(maxsize=256)
def _step(size: int) -> int:
    """Steps from one entry to the next that is looked at: without a common factor with any axis, so as to meet all rows
    and columns."""
    step = max(1, size // _SAMPLED)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def sample(values: Tensor) -> int | None:
    """The sum of the bits of some entries, where no device is waited for: what is written through ``.data`` or an array
    that shares memory counts no versions."""
    values = values.detach()
    if values.device.type != "cpu" or values.layout != torch.strided or not values.numel():
        return None
    if hasattr(values, "placements"):
        part: Any = values
        return sample(part.to_local())
    if not values.is_contiguous():
        if not (values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)):
            return None
        values = values.permute(0, 2, 3, 1)
    if values.dtype in _UNKNOWN_TO_NUMPY:
        values = values.view(torch.int16)
    flat = values.numpy().reshape(-1)
    bits = flat if flat.dtype.kind in "iub" else flat.view(_BITS.get(flat.dtype.itemsize, np.uint8))
    return int(bits[:: _step(len(bits))].sum(dtype=np.uint64))


_UNKNOWN_TO_NUMPY = (torch.bfloat16,)
_BITS: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


_delivered: WeakIdKeyDictionary = WeakIdKeyDictionary()
_in_hand: list[Draw] = []
_travelling: dict[int, Draw] = {}
_numbers = itertools.count()
_lock = threading.Lock()


class _Current(threading.local):
    """The draw whose samples are read next in this thread, and how many there are; in a worker its number."""

    draw: Draw | int | None = None
    count = 0


_current = _Current()


def deliver(draw: Draw, batch: Any, rows: int) -> None:
    """Notes that a batch holds the samples of a draw, in its first rows, and nothing else.

    Args:
        draw: not delivered before.
        batch: tensors, in any nesting, whose axis 0 is that of the samples.
        rows: how many of them count; further ones are padding.
    """
    draw.rows, draw.amplifies = rows, torch.is_grad_enabled()
    tensors = tuple(part for part in tree_leaves(batch) if _is_batch(part))
    with _lock:
        for tensor in tensors:
            _delivered[tensor] = _Delivered(draw, tensor._version, sample(tensor))
        if draw.amplifies:
            draw.tensors = tensors
            _in_hand.append(draw)
            for earlier in _in_hand[:-_MOST_HELD]:
                earlier.tensors = ()


def _is_batch(part: Any) -> bool:
    # What inference mode makes cannot be trained on.
    return isinstance(part, Tensor) and part.dim() > 0 and not part.is_inference()


def in_hand() -> Draw | None:
    """The latest draw that was handed out for training and is neither used nor skipped."""
    with _lock:
        return _in_hand[-1] if _in_hand else None


def use(draw: Draw) -> None:
    """Uses up a draw."""
    draw.used, draw.tensors = True, ()
    with _lock:
        _in_hand[:] = [other for other in _in_hand if other is not draw]


def passed_over(draw: Draw) -> int:
    """How many draws of the same iteration were handed out before this one, and neither used nor skipped."""
    with _lock:
        return sum(other.series is draw.series and other.place < draw.place for other in _in_hand)


def skip() -> int:
    """Forgets the draws in hand: what they drew is not trained on. Returns how many there were."""
    with _lock:
        count = len(_in_hand)
        for draw in _in_hand:
            draw.tensors = ()
        _in_hand.clear()
    return count


def find(inputs: Tensor) -> Rows:
    """Which rows of memory a batch is, and of which draw, if they are rows of it as they were handed out.

    A batch is rows of a tensor where axis 0 steps from one row of that to the next, and all other axes stay within a
    row: slices, ``split``, and views that reshape or permute the other axes. Any other view counts as the whole tensor.
    A copy, on another device say, is known by what it holds, if its draw is one of the latest in hand.
    """
    # A batch that was handed out as a view of something larger is known by itself.
    base = inputs if inputs._base is None or inputs in _delivered else inputs._base
    span = _span(inputs, base)
    known = _delivered.get(base)
    draw = known.draw if known is not None and known.holds(base) else None
    if span is None:
        return _matching(inputs) or Rows(WeakIdRef(base), 0, len(base) if base.dim() else 1)
    if draw is None and known is None:
        copy = _matching(base) if base.dim() else None
        if copy is not None:
            # Its other pieces are known at once.
            _delivered[base] = _Delivered(copy.draw, base._version, sample(base))  # type: ignore[arg-type]
            draw = copy.draw
    return Rows(WeakIdRef(base), *span, draw) if draw is not None else _matching(inputs) or Rows(WeakIdRef(base), *span)


def _matching(inputs: Tensor) -> Rows | None:
    """A draw in hand if a batch holds its first rows, entry by entry, in another place, dtype or shape."""
    with _lock:
        held = _in_hand[: -_MOST_HELD - 1 : -1]
    for draw in held:
        if len(inputs) not in (draw.rows, *(len(tensor) for tensor in draw.tensors[:1])):
            continue
        for tensor in draw.tensors:
            known = _delivered.get(tensor)
            rows = tensor[: len(inputs)]
            if known is None or not known.holds(tensor) or rows.numel() != inputs.numel():
                continue
            copy = rows.detach().to(inputs.device, inputs.dtype).reshape(inputs.shape)
            if bool(((copy == inputs.detach()) | (copy.isnan() & inputs.detach().isnan())).all()):
                return Rows(WeakIdRef(tensor), 0, len(inputs), draw)
    return None


def _span(inputs: Tensor, base: Tensor) -> tuple[int, int] | None:
    """Which rows of ``base`` these are, by their place in memory."""
    rows = len(inputs)
    if inputs is base:
        return 0, rows
    if base.dim() == 0 or len(base) == 0 or rows == 0:
        return 0, 0
    size = base[0].numel()
    if len(base) > 1 and base.stride(0) != size:
        return None
    step = inputs.storage_offset() - base.storage_offset()
    within = sum((length - 1) * stride for length, stride in zip(inputs.shape[1:], inputs.stride()[1:], strict=True))
    if rows > 1 and inputs.stride(0) != size:
        return None
    if size == 0 or step % size or inputs[0].numel() != size or within >= size:
        return None
    return step // size, step // size + rows


def upcoming(draw: Draw, indices: list[int]) -> list[int]:
    """The indices of a draw, for a ``DataLoader``, whose ``collate_fn`` is to hand its batch to :func:`arrived`."""
    _current.draw, _current.count = draw, len(indices)
    return Indices(indices, draw)


class Indices(list[int]):
    """Indices that tell a worker of a ``DataLoader`` which draw they are."""

    def __init__(self, indices: list[int], draw: Draw) -> None:
        super().__init__(indices)
        self._draw = draw

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # Pickled by a loader that sends them to a worker: the draw itself stays here.
        number = next(_numbers)
        _travelling[number] = self._draw
        return _read_in_worker, (list(self), number)


def _read_in_worker(indices: list[int], number: int) -> list[int]:
    _current.draw, _current.count = number, len(indices)
    return indices


def arrived(batch: Any, count: int) -> Any:
    """Delivers a batch that a ``collate_fn`` has made of so many samples: here, or once a worker has sent it here."""
    draw, _current.draw = _current.draw, None
    if draw is None:
        return batch
    # Samples were left out or added on the way here: there is a draw, and this is not it.
    whole = count == _current.count
    if isinstance(draw, Draw):
        deliver(draw, batch if whole else (), _current.count)
        return batch
    kind = _SENT.get(type(batch))
    if get_worker_info() is None or kind is None:
        return batch
    sent = kind(batch)
    sent.arrival = draw, _current.count, whole
    return sent


class _SentList(list[Any]):
    """A batch on its way from a worker, which is delivered where it is unpickled."""

    arrival: tuple[int, int, bool]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _unpacked, (list(self), *self.arrival)


class _SentDict(dict[Any, Any]):
    """The same for a dictionary."""

    arrival: tuple[int, int, bool]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _unpacked, (dict(self), *self.arrival)


_SENT: dict[type, Any] = {list: _SentList, dict: _SentDict}


def _unpacked(batch: Any, number: int, count: int, whole: bool) -> Any:
    draw = _travelling.pop(number, None)
    if draw is not None:
        deliver(draw, batch if whole else (), count)
    return batch


def overlapping(passed: list[Rows]) -> bool:
    """Whether a row is in two of these."""
    # Copies of a draw are the draw.
    kept: dict[Draw | WeakIdRef, list[tuple[int, int]]] = {}
    for rows in passed:
        kept.setdefault(rows.draw or rows.base, []).append((rows.start, rows.stop))
    return any(first[1] > second[0] for spans in kept.values() for first, second in itertools.pairwise(sorted(spans)))


def covered(passed: list[Rows], rows: int) -> bool:
    """Whether these, of one batch and apart, hold its first rows without a gap."""
    reached = 0
    for start, stop in sorted((some.start, some.stop) for some in passed):
        if start > reached:
            return reached >= rows
        reached = max(reached, stop)
    return reached >= rows
