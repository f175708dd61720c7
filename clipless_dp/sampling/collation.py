"""Batches of samples that a collate function sees one at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.noise.randomness import shared as shared_randomness
from clipless_dp.sampling import memory, trained_on
from clipless_dp.sampling.augmentation import EVERY, refuse_own_generators
from clipless_dp.sampling.generators import random_states, set_random_states
from clipless_dp.sampling.reach import reachable
from clipless_dp.tensor_types import refuse_code

_CPU = torch.device("cpu")

SMALL = 1 << 16
"""Bytes of what a function reaches up to which it is compared around each batch: some milliseconds."""

_COMPARED = 8
"""Samples of the first batches that copies of a function are called on first, where it makes something in its first
call."""


def sees_single_rows(collate: object) -> bool:
    """Whether this is torch's own function, with no functions of a user's in it: it stacks, and mixes nothing."""
    own = default_collate.__module__
    return collate is default_collate and all(used.__module__ == own for used in default_collate_fn_map.values())


class RowByRow:
    """Calls a collate function on each sample alone, and joins the batches of one that it returns.

    What it returns for a sample is made of that sample and of fresh randomness, whatever the company: masks, padding
    and statistics too. The global generators of torch, numpy and Python are seeded from
    :mod:`clipless_dp.noise.randomness` for each sample that draws, and restored afterwards: what a user seeds reaches
    no sample.

    Each call is given a copy of its sample, and must leave behind nothing that the next could read: what the function
    reaches (:func:`clipless_dp.sampling.reach.reachable`) is the same after a batch as before, whether or not rows
    show it. In the first batch, and in one of :data:`EVERY` later ones, one sample is also collated again under the
    same random numbers: what differs has been remembered elsewhere, or drawn from elsewhere. Where much is within reach
    (a tokenizer's vocabulary in Python), it is compared in these batches only.

    What a function makes when it is called first (a value in place of ``None``, a flag that is set, contents of an
    empty mapping) may stay if a second call leaves it as it is, and it is the same whichever sample comes first: copies
    of the function that were never called are called on samples of the first
    batch, and on one in each later one that is looked at, and must become what the first sample made of them, and
    return the same row, to the bit.

    Args:
        collate: from a list of samples to a batch.
        first: a sample, whose batch of one shows structure, shapes and dtypes.

    Attributes:
        empty: a batch of no samples.

    Raises:
        ConfigurationError: what it returns holds something other than tensors of one row for the sample, or the
            function draws from a generator of its own.
        PrivacyError: the function remembers something of the sample.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], first: Any) -> None:
        self.collate = collate
        self._looked = False
        # Collators of transformers show all of a tokenizer in their representation.
        named = getattr(collate, "data_collator", collate)
        self._called = getattr(named, "__qualname__", type(named).__qualname__).rpartition(">.")[2]
        self._name = f"collate={getattr(named, '__qualname__', type(named).__qualname__)}"
        refuse_own_generators(collate, "collate")
        memory.refuse_refused(collate, self._name)
        before = memory.State(collate)
        self._is_small = before.size <= SMALL
        self._fresh: Any = None
        self._left = _COMPARED
        # What a first call makes of a sample must not stay before other samples were seen to make the same.
        own = memory.pristine(collate) if self._is_small else None
        called = collate if own is None else own
        its_own = memory.State(called)
        with torch.random.fork_rng([]):
            made = self._alone(first, collate=called)
        # Some make their generator when they are called first.
        refuse_own_generators(called, "collate")
        self.empty = _emptied(made, "the batch")
        self._refuse_memory(before)
        after = memory.State(called)
        self._made_once = its_own.changes(after) if after != its_own else []
        if self._made_once:
            with torch.random.fork_rng([]):
                self._alone(first, collate=called)
            # What moves again moves forth and back.
            again = memory.State(called) != after
            if own is None or again or not memory.is_made_once(self._made_once):
                raise self._remembers(self._made_once)
            self._fresh, self._made_state = memory.pristine(collate), memory.State(called, by_content=True)

    def __call__(self, samples: Sequence[Any]) -> Any:
        """A batch of samples, in their order.

        Raises:
            InputError: a sample's tensors have other shapes or dtypes than the first one's.
            ConfigurationError: as when this was made.
            PrivacyError: the function remembers something of its samples, or one of them gives two batches under the
                same random numbers.
        """
        due = len(samples) > 0 and (not self._looked or secrets.randbelow(EVERY) == 0)
        before = memory.State(self.collate) if due or self._is_small else None
        chosen = secrets.randbelow(len(samples)) if due else -1
        # Else the global generator would tell how many samples a draw held.
        with torch.random.fork_rng([]):
            rows, states = self._rows(samples, chosen)
            if before is not None:
                self._refuse_memory(before, but=[] if self._looked else self._made_once)
            again = self._alone(samples[chosen], states) if due else None
            if self._fresh is not None:
                self._compare_with_fresh(samples, rows, chosen, states)
        batch = _joined(self.empty, rows, "the batch")
        if due:
            if not self._are_same_rows(rows[chosen], again):
                raise PrivacyError(
                    f"{self._name} gives two batches of the same sample under the same random numbers: it "
                    "keeps a state, through which samples may meet, or draws from elsewhere. Make each row of its "
                    "sample alone, and draw from torch's, numpy's or Python's global generators"
                )
            self._looked = True
        return batch

    def refuse_data(self, dataset: Any) -> None:
        """Refuses a function that reaches data which is trained on, but for a method of the data set itself.

        Raises:
            PrivacyError: it does.
        """
        if getattr(self.collate, "__self__", None) is not dataset:
            trained_on.refuse(self.collate, "collate", (value for value, *_ in reachable(self.collate)))

    def _rows(self, samples: Sequence[Any], chosen: int) -> tuple[list[Any], Any]:
        """Batches of one sample each, and the states of the generators ahead of the chosen one."""
        rows: list[Any] = []
        kept: Any = None
        while len(rows) < len(samples):
            with shared_randomness.visit(_CPU):
                states = random_states(_CPU)
                moved = False
                # Seeding takes longer than most functions: numbers that nobody took serve the next sample.
                while len(rows) < len(samples) and not moved:
                    kept = states if len(rows) == chosen else kept
                    rows.append(self._made(samples[len(rows)]))
                    moved = not _are_same_states(states, random_states(_CPU))
        return rows, kept

    def _alone(self, sample: Any, states: Any = None, collate: Any = None) -> Any:
        """The batch of one sample, under fresh random numbers or from given states of the generators on."""
        with shared_randomness.visit(_CPU):
            if states is not None:
                set_random_states(states, _CPU)
            return self._made(sample, collate)

    def _made(self, sample: Any, collate: Any = None) -> Any:
        # A copy, since what a function writes into it, other samples may share, and a later draw reads.
        return _held((self.collate if collate is None else collate)([memory.copied(sample)]))

    def _are_same_rows(self, one: Any, other: Any) -> bool:
        """Two batches of one sample each, bit by bit."""
        leaves = (tree_leaves(_joined(self.empty, [row], "the batch")) for row in (one, other))
        return all(_is_same(*pair) for pair in zip(*leaves, strict=True))

    def _compare_with_fresh(self, samples: Sequence[Any], rows: Sequence[Any], chosen: int, states: Any) -> None:
        """Calls functions that were never called on some samples."""
        others = torch.randperm(len(samples))[: self._left].tolist()
        self._left -= len(others)
        for place in (*([chosen] if chosen >= 0 else []), *others):
            given = states if place == chosen else None
            found = memory.state_of_copy(
                self.collate,
                self._fresh,
                self._made_once,
                lambda own, place=place, given=given: self._alone(samples[place], given, own),  # type: ignore[misc]
            )
            is_same = found is not None and found[0] == self._made_state
            if found is None or not is_same or (place == chosen and not self._are_same_rows(rows[place], found[1])):
                raise self._remembers(self._made_once)

    def _refuse_memory(self, before: memory.State, but: Sequence[memory.Change] = ()) -> None:
        after = memory.State(self.collate)
        if after != before and (changes := before.changes(after)) != [*but]:
            raise self._remembers(changes)

    def _remembers(self, changes: list[memory.Change]) -> PrivacyError:
        memory.note_refused(self.collate)
        return PrivacyError(
            f"{self._name} keeps a state that changed while it made rows ({memory.told(self._called, changes)}), "
            "through which samples may meet: an attribute, a global, what a closure or a default holds. Settle "
            "vocabularies and labels before training from what is public, make in its constructor what it needs, take "
            "new tensors in each call, leave out counters, timers and progress bars, and cache by functools.lru_cache "
            "functions of a value alone"
        )


def _are_same_states(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Of the generators of torch, Python and numpy, as :func:`random_states` returns them."""
    of_numpy = zip(one[3], other[3], strict=True)
    return (
        torch.equal(one[0], other[0])
        and one[2] == other[2]
        and all(np.array_equal(first, second) for first, second in of_numpy)
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Entry by entry; a NaN is the same as another."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _held(value: Any) -> Any:
    """A batch of its own memory: a function that fills the same tensor each time would overwrite earlier rows."""
    if isinstance(value, Tensor):
        refuse_code(value, "what the collate function returns")
        return value.detach().clone()
    return _mapped(_held, value, lambda other: other)


def _emptied(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        if not _is_row(value):
            raise _no_row(where, _told(value))
        return value[:0]
    if isinstance(value, Mapping):
        return {key: _emptied(part, repr(key)) for key, part in value.items()}

    def refuse(other: Any) -> Any:
        raise _no_row(where, _told(other))

    return _mapped(lambda part: _emptied(part, where), value, refuse)


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.layout is torch.strided
        and value.dim() > 0
        and len(value) == 1
    )


def _told(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r}" if value is None or isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"
    if value.is_nested or value.layout is not torch.strided:
        return f"a {'nested' if value.is_nested else 'sparse'} tensor, which is no row of numbers,"
    return f"a tensor of shape {tuple(value.shape)}"


def _mapped(function: Callable[[Any], Any], value: Any, otherwise: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return _like(value, list(map(function, value)))
    return otherwise(value)


def _like(value: Any, parts: list[Any]) -> Any:
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _joined(empty: Any, rows: list[Any], where: str) -> Any:
    """Batches of one sample each, behind one another; ``empty`` says what they are."""
    if isinstance(empty, Tensor):
        for row in rows:
            if not _is_row(row):
                raise _no_row(where, _told(row))
            if row.shape[1:] != empty.shape[1:] or row.dtype != empty.dtype:
                raise InputError(
                    f"{where} of a sample has shape {tuple(row.shape[1:])} and is {row.dtype}, of the first one "
                    f"{tuple(empty.shape[1:])} and {empty.dtype}: a collate function sees each sample alone, so let "
                    'data or function pad all samples to one length, which a public number says (padding="max_length" '
                    "and max_length)"
                )
        return torch.cat([empty, *rows])
    if isinstance(empty, dict):
        if not all(isinstance(row, dict) and row.keys() == empty.keys() for row in rows):
            raise InputError(f"{where} of some samples has other fields than {[*empty]}, those of the first one")
        return {key: _joined(part, [row[key] for row in rows], repr(key)) for key, part in empty.items()}
    if not all(isinstance(row, (tuple, list)) and len(row) == len(empty) for row in rows):
        raise InputError(f"{where} of some samples has not {len(empty)} parts, as that of the first one")
    return _like(empty, [_joined(part, [row[place] for row in rows], where) for place, part in enumerate(empty)])


def _no_row(where: str, found: str) -> ConfigurationError:
    return ConfigurationError(
        f"the collate function gives {found} for {where} of one sample: it must return tensors of one row for each "
        "sample (mappings, tuples and lists of them), and is called on each alone; leave out what is none (a flag say, "
        "which the model can be given as a default)"
    )
