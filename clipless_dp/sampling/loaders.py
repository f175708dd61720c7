"""Draws on their way through a ``DataLoader``, to be delivered where their batches arrive.

A loader hands its ``collate_fn`` samples, and not the indices that it fetched them by; and its workers make batches in
other processes. What was fetched is read from the loader, and held against what the sampler has handed out.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Subset, get_worker_info
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _BaseDataLoaderIter

from clipless_dp.errors import ConfigurationError
from clipless_dp.sampling import trained_on
from clipless_dp.sampling.draws import deliver, is_batch
from clipless_dp.sampling.fingerprints import fingerprint
from clipless_dp.sampling.people import Classes, spans_of
from clipless_dp.sampling.series import Draw


@dataclass(eq=False)
class _Drawn:
    """A draw whose indices a sampler has handed out.

    Attributes:
        draw: what its batch is delivered as.
        key: digest of its indices, see :func:`_key`.
        count: how many they are.
        loader: the iterator of a ``DataLoader`` that asked for it, if one did.
        arrived: whether a batch was made of it.
    """

    draw: Draw
    key: bytes
    count: int
    loader: weakref.ref[Any] | None = None
    arrived: bool = False

    @property
    def by_place(self) -> bool:
        """Whether its rows are of people, and weigh by their place; in all draws of a sampler or in none."""
        people = self.draw.people
        return people is not None and people.weights == "mean" and people.rows_per_group > 1


_travelling: dict[int, _Drawn] = {}
_handed_out: deque[_Drawn] = deque(maxlen=256)
"""Draws whose batches have not arrived, the latest ones: lists that are copies of their indices are known by them."""

_numbers = itertools.count()
_lock = threading.Lock()


class _Current(threading.local):
    """The draw that a sampler of this thread has handed out last, until its batch arrives or the sampler ends."""

    drawn: _Drawn | None = None


_current = _Current()


def upcoming(draw: Draw, indices: list[int]) -> list[int]:
    """The indices of a draw, for a ``DataLoader``, whose ``collate_fn`` is to hand its batch to :func:`arrived`."""
    asking = _frame(_NEXT_INDEX)
    loader = None
    if asking is not None:
        trained_on.note_of(asking.f_locals["self"])
        loader = weakref.ref(asking.f_locals["self"])
    drawn = _Drawn(draw, b"", len(indices), loader)
    drawn.key = _key(indices, drawn.by_place) or b""
    _current.drawn = drawn
    with _lock:
        _handed_out.append(drawn)
    return Indices(indices, drawn)


def ended() -> None:
    """Notes that a sampler of this thread has handed out its last draw, and was asked for another."""
    _current.drawn = None


def _key(indices: Any, by_place: bool = False) -> bytes | None:
    """Digest of indices, whatever their order, unless they weigh by their place; ``None`` for no natural numbers."""
    try:
        numbers = np.asarray(list(indices), dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    if numbers.ndim != 1 or (numbers.size and numbers.min() < 0):
        return None
    if not by_place:
        numbers = np.sort(numbers)
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
        return _in_worker, (list(self), number, self.classes, self.by_place)

    @property
    def classes(self) -> Classes:
        """Where these are of people, which of them weigh what."""
        return self.drawn.draw.classes

    @property
    def by_place(self) -> bool:
        """Whether they weigh by their place."""
        return self.drawn.by_place

    def __copy__(self) -> list[int]:
        return list(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[int]:
        return list(self)


class _Numbered(list[int]):
    """The same in a worker, where the draw is a number."""

    number: int | None = None
    classes: Classes = ()
    by_place = False


def _in_worker(indices: list[int], number: int, classes: Classes, by_place: bool) -> list[int]:
    numbered = _Numbered(indices)
    numbered.number, numbered.classes, numbered.by_place = number, classes, by_place
    return numbered


class Fetch(NamedTuple):
    """What a ``DataLoader`` is making a batch of.

    Attributes:
        indices: what its sampler gave it.
        samples: what the data set gave for them.
        whole: whether that is one batch (``batch_size=None``), and not a list of samples.
        loader: its iterator, where no worker fetches.
        dataset: what was asked for them.
    """

    indices: Any
    samples: Any
    whole: bool
    loader: Any
    dataset: Any

    @property
    def classes(self) -> Classes:
        """Where the samples are of people, which of them weigh what; of a list that is a copy nothing is known."""
        found: Classes = getattr(self.indices, "classes", ())
        return found

    @property
    def by_place(self) -> bool:
        """Whether samples weigh by their place."""
        return bool(getattr(self.indices, "by_place", False))

    def apart(self, samples: Sequence[Any]) -> list[list[Any]]:
        """Samples that weigh by their place, each class of weights by itself.

        A data set that is asked for several samples at once may return them in another order, ascending say, as files
        are read. Where that cannot be excluded each class is read again by a call of its own.

        Args:
            samples: as they were fetched.

        Raises:
            ConfigurationError: there are more or fewer samples than were asked for.
        """
        spans = spans_of(self.classes)
        if len(spans) < 2:
            return [list(samples)]
        if not may_reorder(self.dataset):
            return [list(samples[start:stop]) for start, stop in spans]
        read = []
        for start, stop in spans:
            some = self.dataset.__getitems__(list(self.indices[start:stop]))
            refuse_other_count(some, stop - start)
            read.append(list(some))
        return read

    def refuse_other_count(self) -> None:
        """Refuses samples that are not as many as were asked for.

        Raises:
            ConfigurationError: they are more, or fewer.
        """
        if not self.whole:
            refuse_other_count(self.samples, len(self.indices))

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
            return all(len(leaf) == len(self.indices) for leaf in tree_leaves(samples) if is_batch(leaf))
        fetched = sorted(map(id, self.samples))
        given = sorted(map(id, samples))
        once = len(set(given)) == len(given) or len(set(fetched)) < len(fetched)
        if self.by_place and list(map(id, samples)) != list(map(id, self.samples)):
            # Each weighs by its place.
            return False
        return len(given) == len(fetched) and (given == fetched or (once and not set(given) <= set(fetched)))


def refuse_other_count(samples: Any, asked: int) -> None:
    """Refuses what a data set returned for several indices if it is not one sample for each.

    Raises:
        ConfigurationError: there are more, or fewer: one that is there twice counts twice in a step, and where some are
            missing nothing tells which.
    """
    found = len(samples) if isinstance(samples, Sized) else None
    if found != asked:
        told = f"a {type(samples).__name__}" if found is None else f"{found} samples"
        raise ConfigurationError(
            f"the data set returned {told} where {asked} were asked for, so that nothing tells which or whose they "
            "are: its __getitems__ must return a list of one sample for each index"
        )


def may_reorder(dataset: Any) -> bool:
    """Whether several samples are asked for at once, of code that is not torch's."""
    if type(dataset) is Subset:
        return may_reorder(dataset.dataset)
    return bool(getattr(dataset, "__getitems__", None))


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
    return Fetch(
        known["possibly_batched_index"], known["data"], not known["self"].auto_collation, loader, known["self"].dataset
    )


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
            _arrive(drawn, batch if len(samples) == drawn.count and not drawn.by_place else ())
        return batch
    key = _key(fetch.indices, fetch.by_place)
    drawn = _drawn_as(fetch.indices.drawn if isinstance(fetch.indices, Indices) else None, key)
    if drawn is None and _current.drawn is not None and _current.drawn.loader is not None:
        # What this loader has just asked for, whatever became of it on the way; a loader beside it asked for nothing.
        drawn = _current.drawn if _current.drawn.loader() is fetch.loader else None
    if drawn is not None:
        # Where indices or samples were changed on the way there is a draw, and this is not it.
        weighed = not drawn.by_place or (fetch.by_place and fetch.classes == drawn.draw.classes and not fetch.whole)
        _arrive(drawn, batch if drawn.key == key and weighed and fetch.made_of(samples) else ())
    return batch


def _drawn_as(own: _Drawn | None, key: bytes | None) -> _Drawn | None:
    """The draw that a list of indices is by itself, or else by what it holds."""
    if own is not None:
        return own
    with _lock:
        # Rows of people weigh by their place in the list, which a copy may have changed.
        return next((drawn for drawn in _handed_out if drawn.key == key and not drawn.by_place), None)


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
    tensors = [leaf for leaf in tree_leaves(batch) if type(leaf) is Tensor and is_batch(leaf)]
    key = _key(fetch.indices, fetch.by_place)
    made = _Made(tensors, getattr(fetch.indices, "number", None), key, whole and not (fetch.whole and fetch.by_place))
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
        loader = None if drawn.loader is None else drawn.loader()
        # What comes before its turn waits in the loader, which a loop may leave.
        drawn.draw.reached = getattr(loader, "_rcvd_idx", drawn.draw.place) >= drawn.draw.place
        _arrive(drawn, tensors if whole and drawn.key == key else ())
    return tensors


def _one_of(tensors: list[Tensor], place: int) -> Tensor:
    return tensors[place]
