"""What training data must be: nobody in it twice, and the same on all ranks.

Noise is calibrated to one row, of one rank. A person whose row is in the data twice, or at another place on each rank,
enters a batch several times. Rows that are equal by value may be two persons' and pass; refused is what is one row for
certain.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from accounting.errors import warn_caller
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError, PrivacyError, RankError
from clipless_dp.sampling import memory, overlaps
from clipless_dp.sampling.overlaps import INSTEAD, Beside, lying_together, refuse_overlap, refuse_overlapping_columns
from clipless_dp.sampling.people import People

Indices = npt.NDArray[np.int64]
Rows = range | Indices

HASHED = 1 << 30
"""Bytes of tensors up to which the ranks compare all rows: about a second."""

ROWS, READS = 4096, 32
"""Rows that are compared of larger tensors, and samples of data sets that are read one by one."""

_LISTED = 1 << 16
"""Samples of a list that are held against each other."""

_CHUNK = 1 << 26

_SMALL_TARGET = 16
"""Numbers of a target up to which targets of one value are one."""


def refuse_repeats(dataset: Any, people: People | None = None) -> None:
    """Refuses a data set in which a row is there more than once, for certain.

    ``Subset`` (``random_split`` too), ``ConcatDataset`` and ``StackDataset``, nested in each other, are followed to
    what they choose from, the last by its first part; there a row is known by its number, in tensors by its place in
    memory, and in a list of samples by the sample, or by the memory of its inputs together with its target. Tensors
    are looked at by their inputs: targets may be shared. A row must not lie on a row of another number, in no column.
    Parts of listed samples must not overlap in memory, nor be parts of others, but for constants
    (:func:`clipless_dp.sampling.windows.shared_parts`); those that other data sets return are looked at where they are
    read (:class:`clipless_dp.sampling.overlaps.Beside`).

    Args:
        dataset: a map-style data set, or a pair of tensors, inputs first.
        people: whose samples are, if the unit is a person: one person's may overlap.

    Raises:
        PrivacyError: it has.
    """
    if isinstance(dataset, (tuple, list)) and len(dataset) == 2 and all(isinstance(part, Tensor) for part in dataset):
        dataset = TensorDataset(*dataset[: 1 + (len(dataset[0]) == len(dataset[1]))])
    pieces = list(_pieces(dataset, range(len(dataset)), range(len(dataset)), by_memory=True))
    whole = isinstance(dataset, TensorDataset)
    # Of a part of a table it is not known whose its rows are.
    for inputs, *beside in _tables(dataset):
        refuse_overlapping_columns([inputs], beside, people if whole else None)
    listed = range(min(len(dataset), _LISTED)) if _is_listed(dataset) else ()
    if listed:
        refuse_overlap([dataset[index] for index in listed], len(dataset), None if people is None else people.codes)
    for owner in {piece.owner for piece in pieces}:
        own = [piece for piece in pieces if piece.owner == owner]
        if len(own) == 1 and isinstance(own[0].place, range):
            continue
        place = np.concatenate([np.asarray(piece.place, dtype=np.int64) for piece in own])
        order = np.argsort(place, kind="stable")
        steps = np.diff(place[order])
        widths = np.concatenate([np.full(len(piece.rows), piece.width) for piece in own])[order]
        if bool(((steps > 0) & (steps < widths[:-1])).any()):
            raise lying_together("rows of the inputs")
        twice = steps == 0
        if twice.any():
            rows = np.concatenate([np.asarray(piece.rows) for piece in own])[order]
            at = int(twice.argmax())
            first, second = sorted((int(rows[at]), int(rows[at + 1])))
            raise PrivacyError(
                f"samples {first} and {second} of the data set are one and the same, and {int(twice.sum())} in all are "
                "repeated (a Subset with an index twice, as sampling with replacement gives; a data set twice in a "
                f"ConcatDataset), so that a person would enter a batch more than once: {INSTEAD}"
            )


def refuse_repeated_columns(columns: Sequence[Any], targets: Any, people: People | None = None) -> None:
    """The same of lists of tensors or arrays, one for each input, of which each sample has an entry.

    Args:
        columns: of the inputs, those that are tensors, too.
        targets: one for each sample.
        people: as of :func:`refuse_repeats`.

    Raises:
        PrivacyError: a sample's inputs lie where those of another lie, with one target, or overlap with them.
    """
    if any(isinstance(part, (list, tuple)) and part and isinstance(part[0], (Tensor, np.ndarray)) for part in columns):
        inputs = columns[0] if len(columns) == 1 else [*zip(*columns, strict=True)]
        refuse_repeats([*zip(inputs, targets, strict=True)], people)


def refuse_same(samples: Sequence[Any]) -> None:
    """Refuses samples that a data set returned for several indices if one is there more than once.

    Raises:
        PrivacyError: it is.
    """
    marks = [_mark(sample) for sample in samples if _holds(sample)]
    if len({*marks}) < len(marks):
        raise PrivacyError(
            "the data set returned one and the same sample for several indices, so that a person would enter a batch "
            f"more than once: {INSTEAD}"
        )


def refuse_reused_memory(dataset: Any) -> None:
    """Refuses a data set that reads samples into memory of other samples, which all become the last one read.

    The first samples are read: reading others must leave them as they are. What a data set raises is left to who
    reads all.

    Raises:
        ConfigurationError: they changed.
        PrivacyError: they lie on one another, and did not change.
    """
    several = getattr(dataset, "__getitems__", None)
    beside = Beside(len(dataset))
    kept: list[tuple[Any, memory.State]] = []
    for index in range(min(len(dataset), overlaps.AT_ONCE)):
        try:
            sample = dataset[index] if several is None else several([index])
        except Exception:
            return
        if any(memory.State(tree_leaves(other)) != before for other, before in kept):
            raise ConfigurationError(
                f"{type(dataset).__name__} reads sample {index} into the memory of another one, so that all samples of "
                "a batch would become the last one: let it return new tensors, as by .clone()"
            )
        kept.append((sample, memory.State(tree_leaves(sample))))
        beside.add(sample if several is None else sample[0])
    beside.refuse_overlap()


def _tables(dataset: Any) -> Iterator[list[Tensor]]:
    """The tensors of which a row each is a sample, inputs first."""
    if isinstance(dataset, Tensor):
        yield [dataset]
    elif isinstance(dataset, TensorDataset):
        yield [*dataset.tensors]
    elif isinstance(dataset, Subset):
        yield from _tables(dataset.dataset)
    elif isinstance(dataset, StackDataset):
        parts = dataset.datasets
        of_parts = [[*_tables(part)] for part in (parts.values() if isinstance(parts, dict) else parts)]
        if of_parts[0]:
            # Of several tables rows are numbered otherwise.
            yield [column for tables in of_parts if len(tables) == 1 for column in tables[0]]
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _tables(part)


def _is_listed(dataset: Any) -> bool:
    """Whether samples lie in a list, and nothing is read."""
    if isinstance(dataset, Subset):
        return _is_listed(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(_is_listed, dataset.datasets))
    return getattr(type(dataset), "__getitem__", None) in (list.__getitem__, tuple.__getitem__)


def _first_of(dataset: StackDataset[Any]) -> Any:
    """What the first part of each sample is taken from."""
    parts = dataset.datasets
    first = next(iter(parts.values())) if isinstance(parts, dict) else parts[0]
    return TensorDataset(first) if isinstance(first, Tensor) else first


class _Piece(NamedTuple):
    """Rows of a data set that are taken from one thing: what it is, where they are there, their own numbers, and over
    how many places one reaches without gaps."""

    owner: Any
    place: Rows
    rows: Rows
    width: int = 1


def _pieces(dataset: Any, chosen: Rows, rows: Rows, *, by_memory: bool) -> Iterator[_Piece]:
    """Where some samples come from; ranges stay ranges, since data sets may be larger than memory."""
    if isinstance(dataset, Subset) and (listed := _integers(dataset.indices)) is not None:
        if (listed < 0).any():
            listed = np.where(listed < 0, listed + len(dataset.dataset), listed)  # type: ignore[arg-type]
        yield from _pieces(dataset.dataset, listed[np.asarray(chosen, dtype=np.int64)], rows, by_memory=by_memory)
    elif isinstance(dataset, StackDataset):
        yield from _pieces(_first_of(dataset), chosen, rows, by_memory=by_memory)
    elif isinstance(dataset, ConcatDataset):
        ends = [0, *dataset.cumulative_sizes]
        if isinstance(chosen, range):
            for part, start, end in zip(dataset.datasets, ends, ends[1:], strict=False):
                yield from _pieces(part, range(end - start), rows[start:end], by_memory=by_memory)
            return
        which = np.searchsorted(ends[1:], chosen, side="right")
        order = np.argsort(which, kind="stable")
        groups = np.split(order, np.searchsorted(which[order], np.arange(1, len(ends) - 1)))
        for part, start, some in zip(dataset.datasets, ends, groups, strict=False):
            yield from _pieces(part, chosen[some] - start, np.asarray(rows)[some], by_memory=by_memory)
    elif by_memory and isinstance(dataset, TensorDataset) and _has_address(inputs := dataset.tensors[0]):
        start, step = inputs.data_ptr(), inputs.stride(0) * inputs.element_size()
        if isinstance(chosen, range) and step:
            place: Rows = range(start, start + step * len(chosen), step)
        else:
            place = start + step * np.asarray(chosen)
        width = inputs[0].numel() * inputs.element_size() if inputs[0].is_contiguous() else 1
        yield _Piece(inputs.untyped_storage().data_ptr(), place, rows, width)
    else:
        yield _Piece(id(dataset), chosen, rows)
        if by_memory and getattr(type(dataset), "__getitem__", None) in (list.__getitem__, tuple.__getitem__):
            # Samples of plain numbers are left out: equal constants are one object in Python.
            same = [
                (_mark(dataset[index]), row) for index, row in zip(chosen, rows, strict=True) if _holds(dataset[index])
            ]
            if same:
                numbers = np.asarray(same)
                yield _Piece("objects", numbers[:, 0], numbers[:, 1])


def _has_address(values: Tensor) -> bool:
    return values.layout == torch.strided and bool(values.numel()) and bool(values.data_ptr())


def _holds(sample: Any) -> bool:
    """Whether a sample, or a part of it, is a tensor or an array."""
    if isinstance(sample, Mapping):
        return True
    parts = sample if isinstance(sample, (tuple, list)) else [sample]
    return any(isinstance(part, (Tensor, np.ndarray, Mapping)) for part in parts) or (
        len(parts) > 0 and isinstance(parts[0], (tuple, list)) and _place(parts[0]) is not None
    )


def _mark(sample: Any) -> int:
    """A number that is the same for one and the same sample: its inputs' memory and its target, in whatever tuple."""
    if not isinstance(sample, (tuple, list)):
        return _place(sample) or id(sample)
    place = _place(sample[0])
    return id(sample) if place is None else hash((place, *map(_content, sample[1:])))


def _place(inputs: Any) -> int | None:
    """Where inputs are in memory, one or several; ``None`` if they have no place."""
    if not isinstance(inputs, (Mapping, tuple, list)):
        return _address(inputs)
    parts = [*inputs.values()] if isinstance(inputs, Mapping) else [*inputs]
    places = [_address(part) for part in parts]
    if all(place is None for place in places):
        return id(inputs) if isinstance(inputs, Mapping) else None
    return hash(tuple(_content(part) if place is None else place for place, part in zip(places, parts, strict=True)))


def _address(values: Any) -> int | None:
    """Where the numbers of a tensor or an array begin in memory; ``None`` if they have no place."""
    if isinstance(values, Tensor):
        return values.data_ptr() if _has_address(values) else None
    return int(values.__array_interface__["data"][0]) if isinstance(values, np.ndarray) and values.size else None


def _content(target: Any) -> Any:
    """A target by its value where that is small, else by its place."""
    if isinstance(target, Tensor) and target.device.type == "cpu" and target.numel() <= _SMALL_TARGET:
        return tuple(target.detach().reshape(-1).tolist())
    if isinstance(target, np.ndarray) and target.size <= _SMALL_TARGET:
        return tuple(target.reshape(-1).tolist())
    if isinstance(target, (bool, int, float, str, np.generic)):
        return target
    return _address(target) or id(target)


def _order(dataset: Any) -> str:
    """A digest of the indices of ``Subset`` and the parts of ``ConcatDataset``, whatever they are taken from."""
    owners: dict[Any, int] = {}
    content = hashlib.sha256()
    for piece in _pieces(dataset, range(len(dataset)), range(len(dataset)), by_memory=False):
        content.update(repr(owners.setdefault(piece.owner, len(owners))).encode())
        for numbers in (piece.place, piece.rows):
            content.update(repr(numbers).encode() if isinstance(numbers, range) else numbers.tobytes())
    return content.hexdigest()


def _integers(indices: Any) -> Indices | None:
    try:
        found = np.asarray(indices)
    except (TypeError, ValueError, RuntimeError):
        return None
    if found.size == 0:
        return np.zeros(0, dtype=np.int64)
    return found.astype(np.int64) if found.ndim == 1 and found.dtype.kind in "iu" else None


def require_alike(dataset: Any, tensors: Sequence[Tensor] | None, read: Callable[[int], Sequence[Any]]) -> None:
    """Compares the data of the ranks, which each train on rows of other numbers: of one and the same list.

    Of tensors all rows are compared up to :data:`HASHED` bytes, else 4096, chosen by a public seed. Of other data sets,
    types, sizes and the indices of ``Subset`` are compared, and 32 samples, chosen so, are read on each rank. Where two
    copies differ by a shuffle or by a row more, that misses it with a probability of about one over the number of
    samples to the 32nd; two exchanged rows among many, that it does not read, it misses. Reads are seeded, so that
    random transforms do alike on all ranks; parts that differ at each read nonetheless are left out, with a warning.

    Args:
        dataset: the data set.
        tensors: what it consists of, if it is tensors.
        read: returns the parts of a sample, by its number.

    Raises:
        RankError: the data differs.
    """
    if placement.world().size == 1:
        return
    count = len(dataset) if tensors is None else len(tensors[0])
    parts = tensors if tensors is not None else read(0)
    placement.agree(
        {
            "the data set's type": type(dataset).__qualname__,
            "the number of samples": count,
            "shape and type of its samples": [_form(part if tensors is None else part[:0]) for part in parts],
            "the indices of its subsets": None if tensors is not None else _order(dataset),
        },
        remedy=_REMEDY,
    )
    if tensors is not None:
        own = torch.tensor([[_hash_of_rows(part, count) for part in tensors]])
        random_parts = torch.zeros(len(tensors), dtype=torch.bool)
        differing = _differing(own)[0]
    else:
        numbers = positions(count, READS)
        own = _read(read, numbers, len(parts))
        differing = _differing(own)
        random_parts = torch.zeros(len(parts), dtype=torch.bool)
        if bool(differing.any()):
            again = torch.stack([_read(read, numbers, len(parts)) for _ in range(3)])
            random_parts = placement.total((again != own).any(0).any(0).long()).bool()
        differing = differing.any(0)
    if bool((differing & ~random_parts).any()):
        raise RankError(f"the ranks hold different data, or the same in another order; nothing was released. {_REMEDY}")
    if bool((differing & random_parts).any()):
        warn_caller(
            "samples differ at each read, so that the ranks could not compare all of them: only the number of samples, "
            "their form and what does not change. See to it that sample i is the same person's on all ranks",
            UserWarning,
        )


_REMEDY = (
    "All ranks need the whole data set in one order, since rank r trains on the samples r, r + W, r + 2W, …: else a "
    "person is on several ranks, or on none. Usual causes: a shuffle or random_split without a seed that all ranks "
    "share, file names in the order of os.listdir or glob (sort them), a part of the data for each rank (the sampler "
    "divides it), features that each rank computed for itself (compute them once, and load them)"
)


def _form(part: Any) -> tuple[Any, ...]:
    return (str(part.dtype), tuple(part.shape)) if isinstance(part, Tensor) else (type(part).__name__,)


def _differing(own: Tensor) -> Tensor:
    """Which numbers are not the same on all ranks, among those that none of them lacks (as zero)."""
    everyone = placement.gathered(own)
    return (everyone != everyone[0]).any(0) & (everyone != 0).all(0)


def positions(count: int, some: int) -> Indices:
    """Numbers of samples that do not depend on rank or run, the first and the last among them."""
    chosen = np.random.Generator(np.random.PCG64(20240507)).choice(count, min(some, count), replace=False)
    return np.unique([0, count - 1, *chosen])


def _digest(content: Any) -> int:
    """A number for each content, which is not zero."""
    return int.from_bytes(content.digest()[:8], "big", signed=True) or 1


def _hash_of_rows(values: Tensor, count: int) -> int:
    content = hashlib.sha256()
    row = values.element_size() * values[0].numel()
    if row * count <= HASHED:
        chunk = max(1, _CHUNK // max(1, row))
        for start in range(0, count, chunk):
            content.update(_bytes(values[start : start + chunk]))
    else:
        for some in np.array_split(positions(count, ROWS), 16):
            content.update(_bytes(values[torch.from_numpy(some).to(values.device)]))
    return _digest(content)


def _bytes(values: Tensor) -> bytes:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _read(read: Callable[[int], Sequence[Any]], numbers: Indices, parts: int) -> Tensor:
    """A number for each part of some samples; zeros where one cannot be read, since each rank may hold its own only."""
    found = torch.zeros(len(numbers), parts, dtype=torch.int64)
    for k, index in enumerate(numbers.tolist()):
        try:
            with _seeded(index):
                sample = read(index)
            digests = []
            for part in sample:
                content = hashlib.sha256(repr(_form(part) if isinstance(part, Tensor) else part).encode())
                content.update(_bytes(part) if isinstance(part, Tensor) else b"")
                digests.append(_digest(content))
            found[k] = torch.tensor(digests)
        except Exception:
            continue
    return found


@contextmanager
def _seeded(number: int) -> Iterator[None]:
    """The same global random numbers within on all ranks, and those that come next as if nothing had been drawn."""
    kept = torch.default_generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        torch.default_generator.set_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])  # noqa: NPY002
