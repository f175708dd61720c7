"""Which tensors are Poisson draws, so that amplification is charged only for rows that came in as they were drawn.

A shuffled loader gives no amplification by subsampling, and nothing in a batch says how it was drawn. The samplers of
this package therefore deliver each draw here, when its batch arrives in the hands of whoever asked for it. What counts
is the batch itself: a pass asks whether its rows are those of a draw, unchanged (:func:`find`), and an optimizer uses a
draw up (:func:`use`), so that it amplifies one step.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import get_worker_info
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.weak import WeakIdKeyDictionary


class Source:
    """A sampler, as its draws know it.

    Attributes:
        user: the optimizer that used a draw of it last, as long as it lives.
    """

    user: weakref.ref[object] | None = None

    def __reduce__(self) -> tuple[type[Source], tuple[()]]:
        return Source, ()

    def is_for(self, user: object) -> bool:
        """Whether nobody else has used a draw of it."""
        known = None if self.user is None else self.user()
        return known is None or known is user


class Series:
    """One iteration of a sampler: which of its draws have been used or skipped.

    Args:
        source: the sampler.

    Attributes:
        started: when its first draw was made, on the clock of all draws.
        ended: whether the iteration is over, or was left.
    """

    def __init__(self, source: Source | None = None) -> None:
        self.source = source or Source()
        self.started = next(_clock)
        self.ended = False
        self._reached = 0
        self._closed: set[int] = set()

    def close(self, place: int) -> None:
        """The draw at a place was used or skipped, or nothing is to be said of it."""
        if place >= self._reached:
            self._closed.add(place)
        while self._reached in self._closed:
            self._closed.discard(self._reached)
            self._reached += 1

    def is_closed(self, place: int) -> bool:
        """Whether that was said of the draw at a place."""
        return place < self._reached or place in self._closed

    def close_before(self, place: int) -> int:
        """The same for all draws before one; returns how many of them had not been."""
        count = self.open_before(place)
        self._reached = max(self._reached, place)
        self._closed = {other for other in self._closed if other >= self._reached}
        return count

    def open_before(self, place: int) -> int:
        """How many draws before one were neither used nor skipped, handed out or not."""
        return max(0, place - self._reached - sum(other < place for other in self._closed))


_clock = itertools.count(1)


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
        delivered: when it was handed out, in turns of a clock that all draws share.
        thread: in which thread.
        reached: whether a loop is known to have it: a loader's workers may be ahead.
        tensors: its batch, while it is in hand.
        matched: behind which of its rows copies of others are sought first.
    """

    sample_rate: float
    seeded: bool = False
    series: Series = field(default_factory=lambda: Series())
    place: int = 0
    rows: int = 0
    amplifies: bool = True
    used: bool = False
    delivered: int = 0
    thread: int = 0
    reached: bool = True
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)
    matched: int = field(default=0, repr=False)


class Rows(NamedTuple):
    """Rows of a tensor in memory.

    Attributes:
        base: names the tensor that they are a part of, also when it is gone.
        start: the first one.
        stop: the one behind the last.
        size: how many the tensor has.
        draw: what ``base`` is a draw of, if it is one.
    """

    base: int
    start: int
    stop: int
    size: int
    draw: Draw | None = None


class _Delivered(NamedTuple):
    draw: Draw
    version: int
    fingerprint: object

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is as it was handed out."""
        return tensor._version == self.version and fingerprint(tensor) == self.fingerprint


_MOST_HELD = 64
"""Draws in hand whose batches are kept, to know copies of them by what they hold: a loader's threads copy ahead."""


@dataclass(eq=False)
class _Drawn:
    """A draw whose indices a sampler has handed out.

    Attributes:
        draw: what its batch is delivered as.
        key: digest of its indices, whatever their order.
        count: how many they are.
        loader: the iterator of a ``DataLoader`` that asked for it, if one did.
        arrived: whether a batch was made of it.
    """

    draw: Draw
    key: bytes
    count: int
    loader: weakref.ref[Any] | None = None
    arrived: bool = False


_SAMPLED = 128
"""Entries that are looked at: each is a miss of the cache."""

_SPARSE = 0.5
"""Where so large a share of the entries that are looked at is zero, all are summed up."""


@lru_cache(maxsize=512)
def _step(size: int) -> int:
    """Steps from one entry to the next that is looked at: without a common factor with any axis, so as to meet all rows
    and columns."""
    step = max(1, size // _SAMPLED)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def fingerprint(values: Tensor) -> object:
    """Tells tensors apart by entries of each row, where no device is waited for; by all bits where many are zero.

    What is written through ``.data``, or an array that shares memory, counts no versions. ``None`` on other devices.
    """
    flat = _in_memory(values)
    if flat is None:
        return None
    if values.dim() < 2 or flat.numel() <= 8 * _PRIME:
        return _sums_of_bits(flat)
    some = _as_array(flat)[_places(len(values), flat.numel())]
    # Padding is not zero, whatever the samples are.
    sparse = np.count_nonzero(some) < 0.9 * some.size
    return _sums_of_bits(flat) if sparse else some.tobytes()


def fingerprint_of(rows: Rows, inputs: Tensor) -> object:
    """The same of a batch of which :func:`find` has just said what it is."""
    known = _delivered.get(inputs)
    if known is not None and rows.draw is known.draw and rows.base == _names.get(inputs):
        return known.fingerprint
    return fingerprint(inputs)


def sample(values: Tensor) -> object:
    """As :func:`fingerprint`, by some of the entries, where few of them are zero."""
    flat = _in_memory(values)
    if flat is None:
        return None
    some = _some(flat)
    sparse = np.count_nonzero(some) < (1.0 - _SPARSE) * some.size
    return _sums_of_bits(flat) if sparse else some.tobytes()


def sampled(values: Tensor) -> np.ndarray[Any, Any] | None:
    """The entries that :func:`sample` looks at, in the memory that they are in; ``None`` where that has gaps."""
    flat = _in_memory(values)
    if flat is None or flat.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
        return None
    return _some(flat)


_OF_EACH_ROW = 4
"""Entries that are looked at: of another row, whose numbers are bits, all of them agree in one case of sixteen."""


@lru_cache(maxsize=64)
def _places(rows: int, size: int) -> np.ndarray[Any, Any]:
    """Places of some entries of each row, as many as there are rows in the order of memory; others in each process."""
    drawn = np.random.default_rng().random((rows, _OF_EACH_ROW))
    places: np.ndarray[Any, Any] = ((np.arange(rows)[:, None] + drawn) * (size / rows)).astype(np.int64)
    found: np.ndarray[Any, Any] = np.minimum(places, size - 1).ravel()
    return found


def _some(flat: Tensor) -> np.ndarray[Any, Any]:
    entries = _as_array(flat)
    return entries[:: _step(entries.size)]


def _as_array(flat: Tensor) -> np.ndarray[Any, Any]:
    entries: np.ndarray[Any, Any] = (
        flat.view(_INTEGERS[flat.element_size()]) if flat.dtype in _UNKNOWN_TO_NUMPY else flat
    ).numpy()
    return entries


def _in_memory(values: Tensor) -> Tensor | None:
    """All entries in the order in which they lie in memory, if that is the processor's; copied if there are gaps."""
    if not values.is_cpu or values.layout is not torch.strided:
        return None
    values = values.detach()
    if hasattr(values, "to_local"):
        return _in_memory(values.to_local())
    if not values.is_contiguous():
        values = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    return values.reshape(-1)


def _sums_of_bits(flat: Tensor) -> bytes:
    size = flat.element_size()
    patterns = flat.view(_INTEGERS[size])
    if flat.numel() * size <= 8 * _PRIME:
        short: bytes = patterns.numpy().tobytes()
        return short
    if size in (1, 2, 4) and not (flat.numel() * size % 8 or flat.storage_offset() * size % 8):
        # torch converts narrower integers one by one.
        patterns = flat.view(torch.int64)
    whole = len(patterns) // _PRIME * _PRIME
    sums = patterns[:whole].view(-1, _PRIME).sum(0, dtype=torch.int64)
    rest: bytes = patterns[whole:].numpy().tobytes()
    return sums.numpy().tobytes() + rest


_PRIME = 509
"""Places at which entries are summed up apart: without a common factor with the rows' lengths, as a rule."""

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_UNKNOWN_TO_NUMPY = (
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)


_delivered: WeakIdKeyDictionary = WeakIdKeyDictionary()
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()
_in_hand: list[Draw] = []
_travelling: dict[int, _Drawn] = {}
_handed_out: deque[_Drawn] = deque(maxlen=256)
"""Draws whose batches have not arrived, the latest ones: lists that are copies of their indices are known by them."""

_numbers = itertools.count()
_lock = threading.Lock()


class _Current(threading.local):
    """The draw that a sampler of this thread has handed out last, until its batch arrives or the sampler ends."""

    drawn: _Drawn | None = None


_current = _Current()


def deliver(draw: Draw, batch: Any, rows: int) -> None:
    """Notes that a batch holds the samples of a draw, in its first rows, and nothing else.

    Args:
        draw: not delivered before.
        batch: tensors, in any nesting, whose axis 0 is that of the samples.
        rows: how many of them count; further ones are padding.
    """
    draw.rows, draw.amplifies, draw.delivered = rows, torch.is_grad_enabled(), next(_clock)
    draw.thread = threading.get_ident()
    parts = (batch,) if isinstance(batch, Tensor) else tree_leaves(batch)
    tensors = tuple(part for part in parts if _is_batch(part))
    with _lock:
        for tensor in tensors:
            _delivered[tensor] = _Delivered(draw, tensor._version, fingerprint(tensor))
        if not draw.amplifies:
            draw.series.close(draw.place)
        else:
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


def now() -> int:
    """The time on the clock of all draws."""
    return next(_clock)


def disregard() -> None:
    """Nothing is to be said of the draws that were handed out up to now, though they may still be used."""
    with _lock:
        for draw in _in_hand:
            draw.series.close_before(draw.place)
            draw.series.close(draw.place)


def batches_in_hand() -> list[tuple[Tensor, int]]:
    """The first tensors of the draws in hand, as far as they are kept, and how many of their rows are samples."""
    with _lock:
        return [(draw.tensors[0], draw.rows) for draw in _in_hand if draw.tensors]


def next_for(user: object, since: int) -> Draw | None:
    """The draw that is an optimizer's next one: the first of the iteration that it uses, or else of the latest in this
    thread.

    Args:
        user: the optimizer.
        since: when it was made.
    """
    with _lock:
        own = [draw for draw in _in_hand if draw.delivered > since and draw.series.source.is_for(user)]
        begun = [draw for draw in own if draw.series.source.user is not None]
        candidates = begun or [draw for draw in own if draw.thread == threading.get_ident()]
        return min(candidates, key=lambda draw: (-draw.series.started, draw.place), default=None)


def use(draw: Draw, user: object | None = None) -> None:
    """Uses up a draw, for an optimizer."""
    draw.used, draw.tensors = True, ()
    draw.series.close(draw.place)
    if user is not None:
        draw.series.source.user = weakref.ref(user)
    with _lock:
        _in_hand[:] = [other for other in _in_hand if other is not draw]


def passed_over(draw: Draw, user: object | None = None) -> int:
    """How many draws before this one were neither used nor skipped: of its iteration, and of those that were left for
    it.

    Iterations of other optimizers' samplers, and of other threads, are none that were left for it.

    Args:
        draw: the draw that is to be used.
        user: the optimizer.
    """
    series, here = draw.series, threading.get_ident()

    def is_left(other: Draw) -> bool:
        earlier = other.series is not series and other.delivered < series.started and other.reached
        if not earlier or other.series.is_closed(other.place):
            return False
        source = other.series.source
        return source is series.source or (source.is_for(user) and other.series.ended and other.thread == here)

    with _lock:
        return series.open_before(draw.place) + sum(map(is_left, _in_hand))


def skip(user: object | None = None) -> int:
    """Forgets the draws in hand, and those before them: they are not trained on. Returns how many there were.

    Args:
        user: the optimizer, whose draws they are, unless another one uses their sampler.
    """
    with _lock:
        skipped = [draw for draw in _in_hand if draw.series.source.is_for(user)]
        count = 0
        for draw in skipped:
            count += draw.series.close_before(draw.place) + (not draw.series.is_closed(draw.place))
            draw.series.close(draw.place)
            draw.tensors = ()
        _in_hand[:] = [draw for draw in _in_hand if draw not in skipped]
    return count


def is_delivered(tensor: Tensor) -> bool:
    """Whether a tensor is a batch that was handed out, or a view of one."""
    return tensor in _delivered or (tensor._base is not None and tensor._base in _delivered)


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
    if draw is not None:
        draw.reached = True
    size = len(base) if base.dim() else 1
    if span is None:
        return _matching(inputs) or Rows(_name(base), 0, size, size)
    if draw is None and base.dim() and base is not inputs:
        copy = _matching(base)
        if copy is not None:
            # Its other pieces are known at once.
            _delivered[base] = _Delivered(cast(Draw, copy.draw), base._version, fingerprint(base))
            draw = copy.draw
    return (
        Rows(_name(base), *span, size, draw)
        if draw is not None
        else _matching(inputs) or Rows(_name(base), *span, size)
    )


def _name(base: Tensor) -> int:
    """A number of its own for each tensor."""
    with _lock:
        if base not in _names:
            _names[base] = next(_numbers)
        return cast(int, _names[base])


def _matching(inputs: Tensor) -> Rows | None:
    """Rows of a draw in hand that a batch holds, entry by entry, in another place, dtype or shape; the oldest first."""
    if not inputs.dim() or not len(inputs):
        return None
    with _lock:
        held = [draw for draw in _in_hand if draw.tensors]
    for draw in held:
        for tensor in draw.tensors:
            fits = len(inputs) <= len(tensor) and inputs[0].numel() == (tensor[0].numel() if len(tensor) else -1)
            known = _delivered.get(tensor)
            if not fits or known is None or not known.holds(tensor):
                continue
            start = _place_of(inputs.detach(), tensor.detach(), draw)
            if start is not None:
                draw.reached = True
                draw.matched = start + len(inputs)
                return Rows(_name(tensor), start, start + len(inputs), len(tensor), draw)
    return None


_MOST_TRIED = 16
"""Places at which a piece of a draw is tried: more rows that begin alike are of one kind, and not told apart."""


def _place_of(inputs: Tensor, batch: Tensor, draw: Draw) -> int | None:
    """Where a batch holds these rows, behind those that were found last if they are there as well."""
    last = len(batch) - len(inputs)
    firsts = [0]
    if last:
        column = batch[: last + 1].reshape(last + 1, -1)[:, 0].to(inputs.device, inputs.dtype)
        first = inputs.reshape(len(inputs), -1)[0, 0]
        firsts = ((column == first) | (column.isnan() & first.isnan())).nonzero().flatten().tolist()
        firsts.sort(key=lambda start: (start != draw.matched, start))
    for start in firsts[:_MOST_TRIED]:
        # What pads a draw may have been filled: it does not count.
        count = min(len(inputs), draw.rows - start) if start < draw.rows else len(inputs)
        copy = batch[start : start + count].to(inputs.device, inputs.dtype).reshape(count, *inputs.shape[1:])
        if bool(((copy == inputs[:count]) | (copy.isnan() & inputs[:count].isnan())).all()):
            return int(start)
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
    if size == 0 or step < 0 or step % size + within >= size:
        return None
    return step // size, step // size + rows


def upcoming(draw: Draw, indices: list[int]) -> list[int]:
    """The indices of a draw, for a ``DataLoader``, whose ``collate_fn`` is to hand its batch to :func:`arrived`."""
    asking = _frame(_NEXT_INDEX)
    loader = None if asking is None else weakref.ref(asking.f_locals["self"])
    drawn = _Drawn(draw, _key(indices) or b"", len(indices), loader)
    _current.drawn = drawn
    with _lock:
        _handed_out.append(drawn)
    return Indices(indices, drawn)


def ended() -> None:
    """Notes that a sampler of this thread has handed out its last draw, and was asked for another."""
    _current.drawn = None


def _key(indices: Any) -> bytes | None:
    """Digest of indices, whatever their order; ``None`` for what are no natural numbers."""
    try:
        numbers = np.sort(np.asarray(list(indices), dtype=np.int64))
    except (TypeError, ValueError, OverflowError):
        return None
    if numbers.ndim != 1 or (numbers.size and numbers[0] < 0):
        return None
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()


class Indices(list[int]):
    """Indices that say which draw they were when a sampler handed them out."""

    def __init__(self, indices: list[int], drawn: _Drawn) -> None:
        super().__init__(indices)
        self.drawn = drawn

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # Pickled by a loader that sends them to a worker: the draw itself stays here.
        number = next(_numbers)
        _travelling[number] = self.drawn
        return _in_worker, (list(self), number)

    def __copy__(self) -> list[int]:
        return list(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[int]:
        return list(self)


class _Numbered(list[int]):
    """The same in a worker, where the draw is a number."""

    number: int | None = None


def _in_worker(indices: list[int], number: int) -> list[int]:
    numbered = _Numbered(indices)
    numbered.number = number
    return numbered


class Fetch(NamedTuple):
    """What a ``DataLoader`` is making a batch of.

    Attributes:
        indices: what its sampler gave it.
        samples: what the data set gave for them.
        whole: whether that is one batch (``batch_size=None``), and not a list of samples.
        loader: its iterator, where no worker fetches.
    """

    indices: Any
    samples: Any
    whole: bool
    loader: Any

    def repeats(self) -> bool:
        """Whether an index is there more than once."""
        try:
            return len(self.indices) > len(set(self.indices))
        except TypeError:
            return False

    def made_of(self, samples: Any) -> bool:
        """Whether a ``collate_fn`` got as many samples as were fetched, and none of them twice.

        Samples that were made anew on the way, augmented say, are taken for those that they were made of.
        """
        if self.whole:
            return all(len(leaf) == len(self.indices) for leaf in tree_leaves(samples) if _is_batch(leaf))
        fetched = sorted(map(id, self.samples))
        given = sorted(map(id, samples))
        once = len(set(given)) == len(given) or len(set(fetched)) < len(fetched)
        return len(given) == len(fetched) and (given == fetched or (once and not set(given) <= set(fetched)))


_FETCH = _MapDatasetFetcher.fetch.__code__
_NEXT_INDEX = _BaseDataLoaderIter._next_index.__code__


def _frame(code: CodeType) -> FrameType | None:
    """The innermost call of a function that this is called within."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def fetching() -> Fetch | None:
    """What the ``DataLoader`` within whose ``collate_fn`` this is called has fetched; ``None`` outside of one.

    A loader hands its ``collate_fn`` samples and not their indices, so those are read from the frame of its call: what
    a sampler handed out tells nothing about what was fetched.
    """
    frame = _frame(_FETCH)
    if frame is None:
        return None
    known, caller = frame.f_locals, frame.f_back
    loader = None if caller is None else caller.f_locals.get("self")
    return Fetch(known["possibly_batched_index"], known["data"], not known["self"].auto_collation, loader)


def arrived(batch: Any, samples: Any) -> Any:
    """Delivers a batch that a ``collate_fn`` has made of samples: here, or once a worker has sent it here.

    It is a draw if the indices that were fetched are those of one that a sampler has handed out, in any order. Where no
    loader is at work, it is taken for the latest one in this thread, if as many samples are there.

    Returns:
        The batch; in a worker its tensors say, when they are unpickled, what they are.
    """
    fetch = fetching()
    if get_worker_info() is not None:
        return batch if fetch is None else _marked(batch, fetch, fetch.made_of(samples))
    if fetch is None:
        drawn = _current.drawn
        if drawn is not None and drawn.loader is None:
            _arrive(drawn, batch if len(samples) == drawn.count else ())
        return batch
    key = _key(fetch.indices)
    drawn = _drawn_as(fetch.indices.drawn if isinstance(fetch.indices, Indices) else None, key)
    if drawn is None and _current.drawn is not None and _current.drawn.loader is not None:
        # What this loader has just asked for, whatever became of it on the way; a loader beside it asked for nothing.
        drawn = _current.drawn if _current.drawn.loader() is fetch.loader else None
    if drawn is not None:
        # Where indices or samples were changed on the way there is a draw, and this is not it.
        _arrive(drawn, batch if drawn.key == key and fetch.made_of(samples) else ())
    return batch


def _drawn_as(own: _Drawn | None, key: bytes | None) -> _Drawn | None:
    """The draw that a list of indices is by itself, or else by what it holds."""
    if own is not None:
        return own
    with _lock:
        return next((drawn for drawn in _handed_out if drawn.key == key), None)


def _arrive(drawn: _Drawn, batch: Any) -> None:
    """Delivers the batch of a draw, unless it is one already."""
    with _lock:
        again, drawn.arrived = drawn.arrived, True
        if drawn in _handed_out:
            _handed_out.remove(drawn)
    if _current.drawn is drawn:
        _current.drawn = None
    if not again:
        deliver(drawn.draw, batch, drawn.count)


class _Marked(Tensor):
    """A tensor of a batch that a worker has made, as any other but for how it is pickled."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    made: _Made
    place: int

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, tuple[Any, ...]]:
        return _one_of, (self.made, self.place)


class _Made:
    """All tensors of such a batch, which is delivered where one of them is unpickled.

    What else is done to the batch in the worker shows there as it would here: in other tensors, or, where these were
    written to, in what is noted about them.
    """

    def __init__(self, tensors: Sequence[Tensor], number: int | None, key: bytes | None, whole: bool) -> None:
        self.tensors = list(tensors)
        self.number = number
        self.key = key
        self.whole = whole
        self.noted = [(tensor._version, fingerprint(tensor)) for tensor in tensors]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        unchanged = self.noted == [(tensor._version, fingerprint(tensor)) for tensor in self.tensors]
        return _unpacked, (self.tensors, self.number, self.key, self.whole and unchanged)


def _marked(batch: Any, fetch: Fetch, whole: bool) -> Any:
    """A batch of a worker whose tensors know what it is."""
    tensors = [leaf for leaf in tree_leaves(batch) if type(leaf) is Tensor and _is_batch(leaf)]
    made = _Made(tensors, getattr(fetch.indices, "number", None), _key(fetch.indices), whole)
    places = {id(tensor): place for place, tensor in enumerate(tensors)}

    def marked(leaf: Any) -> Any:
        if id(leaf) not in places:
            return leaf
        known = leaf.as_subclass(_Marked)
        known.made, known.place = made, places[id(leaf)]
        return known

    return tree_map(marked, batch)


def _unpacked(tensors: list[Tensor], number: int | None, key: bytes | None, whole: bool) -> list[Tensor]:
    own = None if number is None else _travelling.pop(number, None)
    drawn = _drawn_as(own, key) if get_worker_info() is None else None
    if drawn is not None:
        drawn.draw.reached = False
        _arrive(drawn, tensors if whole and drawn.key == key else ())
    return tensors


def _one_of(tensors: list[Tensor], place: int) -> Tensor:
    return tensors[place]


def overlapping(passed: list[Rows]) -> bool:
    """Whether a row is in two of these."""
    # Copies of a draw are the draw.
    kept: dict[Draw | int, list[tuple[int, int]]] = {}
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
