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
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from clipless_dp.errors import ConfigurationError
from clipless_dp.sampling.copies import place_of, weighs_alike
from clipless_dp.sampling.fingerprints import fingerprint
from clipless_dp.sampling.series import Draw, Rows, clock, span_of
from clipless_dp.tensor_types import refuse_code


class _State(NamedTuple):
    """What tells whether a tensor is as it was."""

    version: int
    fingerprint: object

    @staticmethod
    def of(tensor: Tensor) -> _State:
        """As it is now."""
        return _State(tensor._version, fingerprint(tensor))

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is as it was."""
        return tensor._version == self.version and fingerprint(tensor, self.fingerprint) == self.fingerprint


class _Packed(NamedTuple):
    """Rows that were made of several tensors, and the tensor as it was made."""

    rows: Rows
    state: _State


class _Delivered(NamedTuple):
    """A draw, and a tensor of its batch as it was handed out."""

    draw: Draw
    state: _State


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

    Raises:
        InputError: a tensor is of a type with code of its own.
    """
    parts = (batch,) if isinstance(batch, Tensor) else tree_leaves(batch)
    tensors = tuple(part for part in parts if is_batch(part))
    for tensor in tensors:
        refuse_code(tensor, "a tensor of a batch")
    draw.original = original
    draw.rows, draw.amplifies, draw.delivered = rows, torch.is_grad_enabled(), next(clock)
    draw.thread = threading.get_ident()
    with _lock:
        for tensor in tensors:
            _delivered[tensor] = _Delivered(draw, _State.of(tensor))
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
    return next(clock)


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


DRAWN_AGAIN = (
    "this sampler is seeded, so a second pass would draw the same batches again, which amplification does not cover: "
    "make one sampler with the steps of all passes, or begin behind its draws (start=), those that were left out among "
    "them, or leave out the seed. To go back to a checkpoint, load it into a new optimizer"
)
_followed: WeakKeyDictionary[object, set[tuple[object, ...]]] = WeakKeyDictionary()


def refuse_again(draw: Draw | None, user: object) -> None:
    """Refuses a draw that follows from the same seed as one that an optimizer has used or left out, of a sampler made
    anew say.

    Raises:
        ConfigurationError: it does.
    """
    if draw is not None and draw.identity is not None and draw.identity in _followed.get(user, ()):
        raise ConfigurationError(DRAWN_AGAIN)


def _follow(draw: Draw, user: object | None) -> None:
    if user is not None and draw.identity is not None:
        _followed.setdefault(user, set()).add(draw.identity)


def use(draw: Draw, user: object | None = None) -> None:
    """Uses up a draw, for an optimizer."""
    _follow(draw, user)
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
    since: int = 0,
    until: float = math.inf,
    computed: Sequence[Draw] = (),
    left_by: frozenset[int] = frozenset(),
) -> int:
    """Forgets draws in hand, and those before them: they are not trained on. Returns how many there were.

    Args:
        user: the optimizer, whose draws they are, unless another one uses their sampler.
        since: when it was made: draws that a loop had left by then are forgotten, and not counted.
        until: those that were delivered by then.
        computed: others, whose gradients were looked at.
        left_by: who leaves out for good what was computed, and what came with it.
    """
    with _lock:
        skipped = [draw for draw in _in_hand if draw.series.source.is_for(user) and draw.delivered <= until]
        count = 0
        for draw in skipped:
            closed = draw.series.close_before(draw.place) + (not draw.series.is_closed(draw.place))
            count += 0 if draw.series.ended and draw.delivered <= since else closed
            draw.series.close(draw.place)
        _in_hand[:] = [draw for draw in _in_hand if draw not in skipped]
        sources = {id(draw.series.source) for draw in computed}
        last = max((draw.delivered for draw in computed), default=0)
        for draw in computed:
            _follow(draw, user)
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
        return known.state.fingerprint
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
    if packed is not None and packed.state.holds(base):
        span = span_of(inputs, base)
        return packed.rows.part(*span) if span is not None else packed.rows._replace(draw=None)
    span = span_of(inputs, base)
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
            _delivered[base] = _Delivered(cast(Draw, copy.draw), _State.of(base))
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
    _packed[packed] = _Packed(first, _State.of(packed))


def _held(part: Tensor) -> Rows:
    """Rows of a tensor, by their place in memory alone."""
    base = part if part._base is None or part in _delivered else part._base
    known, span = _delivered.get(base), span_of(part, base)
    if span is None:
        return Rows(_name(base), 0, len(base) if base.dim() else 1)
    return Rows(_name(base), *span, known.draw if known is not None and known.state.holds(base) else None)


def _together(found: Sequence[Rows], count: int) -> Rows:
    """Rows of no draw: those of as many tensors at once, so that the same ones show when they come again."""
    # Tensors themselves have natural numbers for names. One that is a single row for all samples starts nowhere.
    name = -1 - abs(hash(tuple(some.base for some in found)))
    start = max(some.start for some in found)
    return Rows(name, start, start + count)


def _matching_together(parts: Sequence[Tensor]) -> Rows | None:
    """The rows of a draw in hand of which all parts are copies, on another device say."""
    held = _with_tensors(_in_hand)
    for draw in held:
        fitting = [[tensor for tensor in draw.tensors if _may_hold(part, tensor)] for part in parts]
        if not all(fitting):
            continue
        places = [
            place
            for part, tensors in zip(parts, fitting, strict=True)
            for tensor in tensors
            if (place := place_of(part.detach(), tensor.detach(), draw)) is not None
        ]
        for place in dict.fromkeys(places):
            held_there = [
                next((t for t in tensors if place_of(part.detach(), t.detach()[place:][: len(part)], draw) == 0), None)
                for part, tensors in zip(parts, fitting, strict=True)
            ]
            pairs = [(part, tensor) for part, tensor in zip(parts, held_there, strict=True) if tensor is not None]
            if len(pairs) == len(parts) and weighs_alike(pairs, place, draw):
                draw.matched = place + len(parts[0])
                return Rows(_name(draw.tensors[0]), place, place + len(parts[0]), draw)
    return None


def _with_tensors(draws: Sequence[Draw]) -> list[Draw]:
    """Those that copies are known by: the oldest first, but of loops that go on, before those that were left."""
    with _lock:
        return sorted((draw for draw in draws if draw.tensors), key=lambda draw: draw.series.ended)


def _may_hold(part: Tensor, tensor: Tensor) -> bool:
    """Whether a draw's tensor is as it was handed out, and large enough to hold these rows."""
    known = _delivered.get(tensor)
    if known is None or not known.state.holds(tensor) or not len(tensor):
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
    if known is None or known.state.holds(tensor):
        return known
    rows, original = known.draw.rows, known.draw.original
    if original is None or rows == len(tensor) or bool(tensor[rows:].any()):
        return None
    samples, now = original(), tensor.detach()[:rows]
    if samples.shape != now.shape or not bool(((samples == now) | (samples.isnan() & now.isnan())).all()):
        return None
    _delivered[tensor] = filled = _Delivered(known.draw, _State.of(tensor))
    return filled


def left_out(inputs: Tensor, left_by: frozenset[int]) -> Rows | None:
    """As :func:`find`, of copies of draws that these have left out."""
    return _matching(inputs, [draw for draw in _left_out if draw.left_by & left_by]) if _left_out else None


def _matching(inputs: Tensor, among: Sequence[Draw] | None = None) -> Rows | None:
    """Rows of a draw in hand that a batch holds, entry by entry, in another place, dtype or shape."""
    if not inputs.dim() or not len(inputs):
        return None
    held = _with_tensors(_in_hand if among is None else among)
    padding: tuple[Draw, Rows] | None = None
    for draw in held:
        for tensor in draw.tensors:
            fits = len(inputs) <= len(tensor) and inputs[0].numel() == (tensor[0].numel() if len(tensor) else -1)
            if not fits or _as_delivered(tensor) is None:
                continue
            start = place_of(inputs.detach(), tensor.detach(), draw)
            if start is None or (among is None and not weighs_alike([(inputs, tensor)], start, draw)):
                continue
            found = draw, Rows(_name(tensor), start, start + len(inputs), draw)
            if start < draw.rows or start == draw.matched:
                return _met(*found)
            # Zeros are the padding of any draw, first of the one whose other pieces were found.
            padding = padding or found
    return None if padding is None else _met(*padding)


def _met(draw: Draw, rows: Rows) -> Rows:
    draw.reached, draw.matched = True, rows.stop
    return rows
