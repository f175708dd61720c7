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
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from clipless_dp.sampling.fingerprints import fingerprint, of_rows
from clipless_dp.sampling.people import Classes, People


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

    def open_before(self, place: int, start: int = 0) -> int:
        """How many draws before one, from another on, were neither used nor skipped, handed out or not."""
        start = max(start, self._reached)
        return max(0, place - start - sum(start <= other < place for other in self._closed))


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
        left_by: the models, by the names that their parameters go by, that have left it out for good.
        original: makes its samples again, where that can be asked for.
        people: whose its rows are, where people were drawn, and the rate is theirs; else ``None``.
        classes: of rows of people, what their gradients are divided by.
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
    left_by: frozenset[int] = frozenset()
    original: Callable[[], Tensor] | None = field(default=None, repr=False)
    people: People | None = field(default=None, repr=False)
    classes: Classes = ()

    def divisors(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Of some rows of its batch: from where to where gradients are divided by what; padding is of the last class.

        Args:
            start: the first row.
            stop: the one behind the last.
        """
        found, reached = [], 0
        for place, (end, divisor) in enumerate(self.classes):
            end = max(end, stop) if place == len(self.classes) - 1 else end
            if max(start, reached) < min(stop, end):
                found.append((max(start, reached), min(stop, end), divisor))
            reached = end
        return found or [(start, stop, self.classes[-1][1] if self.classes else 1)]


class Rows(NamedTuple):
    """Rows of a tensor in memory.

    Attributes:
        base: names the tensor that they are a part of, also when it is gone.
        start: the first one.
        stop: the one behind the last.
        draw: what ``base`` is a draw of, if it is one.
    """

    base: int
    start: int
    stop: int
    draw: Draw | None = None

    def part(self, start: int, stop: int) -> Rows:
        """Some of these."""
        return Rows(self.base, self.start + start, self.start + stop, self.draw)


class _Packed(NamedTuple):
    """Rows that were made of several tensors."""

    rows: Rows
    version: int
    fingerprint: object

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is as it was made."""
        return tensor._version == self.version and fingerprint(tensor) == self.fingerprint


class _Delivered(NamedTuple):
    draw: Draw
    version: int
    fingerprint: object

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is as it was handed out."""
        return tensor._version == self.version and fingerprint(tensor) == self.fingerprint


_MOST_HELD = 64
"""Draws in hand whose batches are kept, to know copies of them by what they hold: a loader's threads copy ahead."""

_MOST_LEFT_OUT = 8
"""The same of draws that were left out, copies of which are left out as well."""


_delivered: WeakIdKeyDictionary = WeakIdKeyDictionary()
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()
_in_hand: list[Draw] = []
_left_out: list[Draw] = []
_numbers = itertools.count()
_lock = threading.Lock()


def deliver(draw: Draw, batch: Any, rows: int, original: Callable[[], Tensor] | None = None) -> None:
    """Notes that a batch holds the samples of a draw, in its first rows, and nothing else.

    Args:
        draw: not delivered before.
        batch: tensors, in any nesting, whose axis 0 is that of the samples.
        rows: how many of them count; further ones are padding.
        original: makes those of the batch's only tensor again.
    """
    draw.original = original
    draw.rows, draw.amplifies, draw.delivered = rows, torch.is_grad_enabled(), next(_clock)
    draw.thread = threading.get_ident()
    parts = (batch,) if isinstance(batch, Tensor) else tree_leaves(batch)
    tensors = tuple(part for part in parts if is_batch(part))
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


def is_batch(part: Any) -> bool:
    """Whether a part of a batch holds rows that may be trained on."""
    # What inference mode makes cannot be trained on.
    return isinstance(part, Tensor) and part.dim() > 0 and not part.is_inference()


def in_hand() -> Draw | None:
    """The latest draw that was handed out for training and is neither used nor skipped."""
    with _lock:
        return _in_hand[-1] if _in_hand else None


def now() -> int:
    """The time on the clock of all draws."""
    return next(_clock)


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
    draw.used, draw.tensors, draw.original = True, (), None
    draw.series.close(draw.place)
    if user is not None:
        draw.series.source.user = weakref.ref(user)
    with _lock:
        _in_hand[:] = [other for other in _in_hand if other is not draw]


def passed_over(draw: Draw, user: object | None = None, since: int = 0) -> int:
    """How many draws before this one were neither used nor skipped: of its iteration, and of those that were left for
    it.

    Iterations of other optimizers' samplers, and of other threads, are none that were left for it.

    Args:
        draw: the draw that is to be used.
        user: the optimizer.
        since: when it was made: what was handed out before, and is not used, is not its concern.
    """
    series, here = draw.series, threading.get_ident()

    def is_left(other: Draw) -> bool:
        earlier = other.series is not series and since < other.delivered < series.started and other.reached
        if not earlier or other.series.is_closed(other.place):
            return False
        source = other.series.source
        if source is series.source:
            return True
        return source.is_for(user) and other.series.ended and (source.user is not None or other.thread == here)

    with _lock:
        before = [other.place + 1 for other in _in_hand if other.series is series and other.delivered <= since]
        return series.open_before(draw.place, max(before, default=0)) + sum(map(is_left, _in_hand))


def skip(
    user: object | None = None,
    *,
    until: float = math.inf,
    computed: Sequence[Draw] = (),
    left_by: frozenset[int] = frozenset(),
) -> int:
    """Forgets draws in hand, and those before them: they are not trained on. Returns how many there were.

    Args:
        user: the optimizer, whose draws they are, unless another one uses their sampler.
        until: those that were delivered by then.
        computed: others, whose gradients were looked at.
        left_by: who leaves out for good what was computed, and what came with it.
    """
    with _lock:
        skipped = [draw for draw in _in_hand if draw.series.source.is_for(user) and draw.delivered <= until]
        count = 0
        for draw in skipped:
            count += draw.series.close_before(draw.place) + (not draw.series.is_closed(draw.place))
            draw.series.close(draw.place)
        _in_hand[:] = [draw for draw in _in_hand if draw not in skipped]
        sources = {id(draw.series.source) for draw in computed}
        last = max((draw.delivered for draw in computed), default=0)
        for draw in computed:
            if draw not in skipped and not draw.left_by & left_by:
                count += 1
                draw.series.close(draw.place)
        for draw in {*skipped, *computed}:
            # Others that wait behind them may be ahead of a loop, which goes on with them.
            if draw.delivered <= last and id(draw.series.source) in sources:
                draw.left_by |= left_by
        _in_hand[:] = [draw for draw in _in_hand if draw not in computed]
        kept = [draw for draw in skipped if draw.left_by]
        for draw in skipped:
            if not draw.left_by:
                draw.tensors, draw.original = (), None
        _left_out.extend(kept)
        _forget([*_left_out[:-_MOST_LEFT_OUT]])
    return count


def forget_left_out(left_by: frozenset[int]) -> None:
    """Copies of what these left out are rows like others from now on."""
    if _left_out:
        with _lock:
            _forget([draw for draw in _left_out if draw.left_by & left_by])


def _forget(these: Sequence[Draw]) -> None:
    for draw in these:
        draw.tensors, draw.original = (), None
    _left_out[:] = [draw for draw in _left_out if draw not in these]


def fingerprint_of(rows: Rows, inputs: Tensor) -> object:
    """The same of a batch of which :func:`find` has just said what it is."""
    known = _delivered.get(inputs)
    if known is not None and rows.draw is known.draw and rows.base == _names.get(inputs):
        return known.fingerprint
    return fingerprint(inputs)


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
    packed: _Packed | None = _packed.get(base)
    if packed is not None and packed.holds(base):
        span = _span(inputs, base)
        return packed.rows.part(*span) if span is not None else packed.rows._replace(draw=None)
    span = _span(inputs, base)
    known = _as_delivered(base)
    draw = known.draw if known is not None else None
    if draw is not None:
        draw.reached = True
    if span is None:
        return _matching(inputs) or Rows(_name(base), 0, len(base) if base.dim() else 1)
    if draw is None and base.dim() and base is not inputs:
        copy = _matching(base)
        if copy is not None and copy.start == 0:
            # Its other pieces are known at once: they are in the same places.
            _delivered[base] = _Delivered(cast(Draw, copy.draw), base._version, fingerprint(base))
            draw = copy.draw
    return Rows(_name(base), *span, draw) if draw is not None else _matching(inputs) or Rows(_name(base), *span)


def note_packed(packed: Tensor, parts: Sequence[Tensor]) -> None:
    """Notes that rows were made of others, one by one: they are a draw's if all parts are, as they were handed out.

    Args:
        packed: ``(B, ...)``, whose row ``i`` is made of the parts' rows ``i``.
        parts: ``(B, ...)`` each.
    """
    if not len(packed) or not is_batch(packed):
        return
    found = [_held(part) for part in parts]
    first = found[0]
    if first.draw is None or any(some.draw is not first.draw or some[1:3] != first[1:3] for some in found):
        first = _matching_together(parts) or _together(found, len(packed))
    if first.draw is not None:
        first.draw.reached = True
    _packed[packed] = _Packed(first, packed._version, fingerprint(packed))


def _held(part: Tensor) -> Rows:
    """Rows of a tensor, by their place in memory alone."""
    base = part if part._base is None or part in _delivered else part._base
    known, span = _delivered.get(base), _span(part, base)
    if span is None:
        return Rows(_name(base), 0, len(base) if base.dim() else 1)
    return Rows(_name(base), *span, known.draw if known is not None and known.holds(base) else None)


def _together(found: Sequence[Rows], count: int) -> Rows:
    """Rows of no draw: those of as many tensors at once, so that the same ones show when they come again."""
    # Tensors themselves have natural numbers for names. One that is a single row for all samples starts nowhere.
    name = -1 - abs(hash(tuple(some.base for some in found)))
    start = max(some.start for some in found)
    return Rows(name, start, start + count)


def _matching_together(parts: Sequence[Tensor]) -> Rows | None:
    """The rows of a draw in hand of which all parts are copies, on another device say; the oldest first."""
    with _lock:
        held = [draw for draw in _in_hand if draw.tensors]
    for draw in held:
        fitting = [[tensor for tensor in draw.tensors if _may_hold(part, tensor)] for part in parts]
        if not all(fitting):
            continue
        places = [
            place
            for part, tensors in zip(parts, fitting, strict=True)
            for tensor in tensors
            if (place := _place_of(part.detach(), tensor.detach(), draw)) is not None
        ]
        for place in dict.fromkeys(places):
            held_there = [
                next((t for t in tensors if _place_of(part.detach(), t.detach()[place:][: len(part)], draw) == 0), None)
                for part, tensors in zip(parts, fitting, strict=True)
            ]
            pairs = [(part, tensor) for part, tensor in zip(parts, held_there, strict=True) if tensor is not None]
            if len(pairs) == len(parts) and _weighs_alike(pairs, place, draw):
                draw.matched = place + len(parts[0])
                return Rows(_name(draw.tensors[0]), place, place + len(parts[0]), draw)
    return None


def _may_hold(part: Tensor, tensor: Tensor) -> bool:
    """Whether a draw's tensor is as it was handed out, and large enough to hold these rows."""
    known = _delivered.get(tensor)
    if known is None or not known.holds(tensor) or not len(tensor):
        return False
    return len(part) <= len(tensor) and part[0].numel() == tensor[0].numel()


def _name(base: Tensor) -> int:
    """A number of its own for each tensor."""
    with _lock:
        if base not in _names:
            _names[base] = next(_numbers)
        return cast(int, _names[base])


def _as_delivered(tensor: Tensor) -> _Delivered | None:
    """What a tensor was handed out as, if it is as it was, but for padding that was zeroed."""
    known: _Delivered | None = _delivered.get(tensor)
    if known is None or known.holds(tensor):
        return known
    rows, original = known.draw.rows, known.draw.original
    if original is None or rows == len(tensor) or bool(tensor[rows:].any()):
        return None
    samples, now = original(), tensor.detach()[:rows]
    if samples.shape != now.shape or not bool(((samples == now) | (samples.isnan() & now.isnan())).all()):
        return None
    _delivered[tensor] = filled = _Delivered(known.draw, tensor._version, fingerprint(tensor))
    return filled


def left_out(inputs: Tensor, left_by: frozenset[int]) -> Rows | None:
    """As :func:`find`, of copies of draws that these have left out."""
    return _matching(inputs, [draw for draw in _left_out if draw.left_by & left_by]) if _left_out else None


def _matching(inputs: Tensor, among: Sequence[Draw] | None = None) -> Rows | None:
    """Rows of a draw in hand that a batch holds, entry by entry, in another place, dtype or shape; the oldest first."""
    if not inputs.dim() or not len(inputs):
        return None
    with _lock:
        held = [draw for draw in (_in_hand if among is None else among) if draw.tensors]
    padding: tuple[Draw, Rows] | None = None
    for draw in held:
        for tensor in draw.tensors:
            fits = len(inputs) <= len(tensor) and inputs[0].numel() == (tensor[0].numel() if len(tensor) else -1)
            if not fits or _as_delivered(tensor) is None:
                continue
            start = _place_of(inputs.detach(), tensor.detach(), draw)
            if start is None or (among is None and not _weighs_alike([(inputs, tensor)], start, draw)):
                continue
            found = draw, Rows(_name(tensor), start, start + len(inputs), draw)
            if start < draw.rows or start == draw.matched:
                return _met(*found)
            # Zeros are the padding of any draw, first of the one whose other pieces were found.
            padding = padding or found
    return None if padding is None else _met(*padding)


def _weighs_alike(pairs: Sequence[tuple[Tensor, Tensor]], start: int, draw: Draw) -> bool:
    """Whether what rows hold says how they weigh: of a draw of people equal rows may be of several classes.

    Copies of these are not told apart, and one that was put in the place of another would bring its weight with it.

    Args:
        pairs: copies of rows, and the tensors of the draw that they are copies of.
        start: the first of the rows.
        draw: whose they are.
    """
    if len(draw.classes) < 2:
        return True
    stop = min(start + len(pairs[0][0]), draw.rows)
    # As the copies hold them, whose numbers may be shorter.
    digests = [of_rows(tensor[: draw.rows].to(copy.dtype)) for copy, tensor in pairs]
    whole = [b"".join(parts) for parts in zip(*digests, strict=True)]
    weights: dict[bytes, set[int]] = {}
    for first, last, divisor in draw.divisors(0, draw.rows):
        for one in whole[first:last]:
            weights.setdefault(one, set()).add(divisor)
    return all(len(weights[one]) == 1 for one in whole[start:stop])


def _met(draw: Draw, rows: Rows) -> Rows:
    draw.reached, draw.matched = True, rows.stop
    return rows


_MOST_TRIED = 16
"""Places at which a piece of a draw is tried: more rows that begin alike are of one kind, and not told apart."""


def _place_of(inputs: Tensor, batch: Tensor, draw: Draw) -> int | None:
    """Where a batch holds these rows, behind those that were found last if they are there as well."""
    if batch.dim() == 4 and batch.shape[1:] != inputs.shape[1:]:
        # Images whose channels come first, or last, in the copy.
        turned = (batch.permute(0, 3, 1, 2), batch.permute(0, 2, 3, 1))
        batch = next((some for some in turned if some.shape[1:] == inputs.shape[1:]), batch)
    last = len(batch) - len(inputs)
    firsts = [0]
    if last:
        column = batch[: last + 1].reshape(last + 1, -1)[:, 0].to(inputs.device, inputs.dtype)
        first = inputs.reshape(len(inputs), -1)[0, 0]
        alike = (column == first) | (column.isnan() & first.isnan())
        # What pads a draw may have been zeroed.
        alike[draw.rows :] |= first == 0
        firsts = alike.nonzero().flatten().tolist()
        firsts.sort(key=lambda start: (start != draw.matched, start))
    for start in firsts[:_MOST_TRIED]:
        copy = batch[start : start + len(inputs)].to(inputs.device, inputs.dtype).reshape(inputs.shape)
        alike = (copy == inputs) | (copy.isnan() & inputs.isnan())
        alike[max(0, draw.rows - start) :] |= inputs[max(0, draw.rows - start) :] == 0
        if bool(alike.all()):
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
