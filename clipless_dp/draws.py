"""Which tensors are Poisson draws, so that amplification is charged only for rows that came in as they were drawn.

A shuffled loader gives no amplification by subsampling, and nothing in a batch says how it was drawn. The samplers of
this package therefore deliver each draw here, when its batch arrives in the hands of whoever asked for it. What counts
is the batch itself: a pass asks whether its rows are those of a draw, unchanged (:func:`find`), and an optimizer uses a
draw up (:func:`use`), so that it amplifies one step.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
        rows: how many rows of its batch are samples; they come first.
        amplifies: whether it was handed out where gradients are on. What is only looked at amplifies nothing.
        used: whether a step has used it up.
    """

    sample_rate: float
    seeded: bool = False
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
    tensors = tuple(part for part in tree_leaves(batch) if isinstance(part, Tensor) and part.dim() > 0)
    with _lock:
        for tensor in tensors:
            _delivered[tensor] = _Delivered(draw, tensor._version)
        if draw.amplifies:
            for earlier in _in_hand:
                earlier.tensors = ()
            draw.tensors = tensors
            _in_hand.append(draw)


def in_hand() -> Draw | None:
    """The latest draw that was handed out for training and is neither used nor skipped."""
    with _lock:
        return _in_hand[-1] if _in_hand else None


def use(draw: Draw) -> None:
    """Uses up a draw, and skips those that were handed out before it."""
    draw.used, draw.tensors = True, ()
    with _lock:
        if draw in _in_hand:
            del _in_hand[: _in_hand.index(draw) + 1]


def skip(*, latest: bool = True) -> None:
    """Forgets the draws in hand: what they drew is not trained on.

    Args:
        latest: the latest one, too.
    """
    with _lock:
        for draw in _in_hand if latest else _in_hand[:-1]:
            draw.tensors = ()
        del _in_hand[: len(_in_hand) - (not latest and bool(_in_hand))]


def find(inputs: Tensor) -> Rows:
    """Which rows of memory a batch is, and of which draw, if they are rows of it as they were handed out.

    A batch is rows of a tensor where axis 0 steps from one row of that to the next, and all other axes stay within a
    row: slices, ``split``, and views that reshape or permute the other axes. Any other view counts as the whole tensor.
    """
    # A batch that was handed out as a view of something larger is known by itself.
    base = inputs if inputs._base is None or inputs in _delivered else inputs._base
    known = _delivered.get(base)
    span = _span(inputs, base)
    if span is None:
        return Rows(WeakIdRef(base), 0, len(base) if base.dim() else 1)
    return Rows(WeakIdRef(base), *span, None if known is None or base._version != known.version else known.draw)


def matching(inputs: Tensor) -> Rows | None:
    """The draw in hand if a batch holds its first rows, entry by entry, in another place, dtype or shape.

    That is so of a copy on another device, or of the drawn rows without their padding.
    """
    draw = in_hand()
    if draw is None or len(inputs) not in (draw.rows, *(len(tensor) for tensor in draw.tensors[:1])):
        return None
    for tensor in draw.tensors:
        known = _delivered.get(tensor)
        rows = tensor[: len(inputs)]
        if known is None or known.version != tensor._version or rows.numel() != inputs.numel():
            continue
        copy = rows.to(inputs.device, inputs.dtype).reshape(inputs.shape)
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
    if draw is None or count != _current.count:
        return batch
    if isinstance(draw, Draw):
        deliver(draw, batch, count)
        return batch
    return batch if get_worker_info() is None else _Sent(batch, draw, count)


class _Sent:
    """A batch on its way from a worker, which becomes itself where it is unpickled."""

    def __init__(self, batch: Any, number: int, count: int) -> None:
        self._arguments = batch, number, count

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _unpacked, self._arguments


def _unpacked(batch: Any, number: int, count: int) -> Any:
    draw = _travelling.pop(number, None)
    if draw is not None:
        deliver(draw, batch, count)
    return batch


def overlapping(passed: list[Rows]) -> bool:
    """Whether a row is in two of these."""
    kept: dict[WeakIdRef, list[tuple[int, int]]] = {}
    for rows in passed:
        kept.setdefault(rows.base, []).append((rows.start, rows.stop))
    return any(first[1] > second[0] for spans in kept.values() for first, second in itertools.pairwise(sorted(spans)))


def covered(passed: list[Rows], rows: int) -> bool:
    """Whether these, of one batch and apart, hold its first rows without a gap."""
    reached = 0
    for start, stop in sorted((some.start, some.stop) for some in passed):
        if start > reached:
            return reached >= rows
        reached = max(reached, stop)
    return reached >= rows
