"""Whose each row is, where the unit of privacy is a person: people are drawn, and a person's rows averaged.

A person's contribution to a step is ``Σ_i w_i g_i`` over the rows of theirs that entered, with ``w_i ≥ 0`` and
``Σ_i w_i ≤ 1``. Each ``‖g_i‖ ≤ Δ``, so ``‖Σ w_i g_i‖ ≤ Δ`` by the triangle inequality: adding or removing a person
moves the sum of all by no more than adding or removing one row does, and people are drawn as rows are (docs/groups.md).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accounting import Ledger
from accounting.errors import warn_caller
from clipless_dp.arguments import whole
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.sampling.cells import cells_of, is_missing

Unit = Literal["row", "person"]
"""What a guarantee is about: one row of the data, or all rows of one person."""

Indices = npt.NDArray[np.int64]
GroupWeights = Literal["mean", "cap"]
"""``"mean"``: a person's rows that enter weigh 1 together, see :meth:`People.choose`; ``"cap"``: ``1/rows_per_group``
each."""

Classes = tuple[tuple[int, int], ...]
"""Of rows in order: up to which of them (exclusively), from the end of the class before, weights are one over what."""

ROWS_PER_GROUP = 8
"""Default of ``rows_per_group``."""

_SHARED = (
    "a row that several people share counts against each of them: keep rows of which nobody has more than k with "
    "clipless_dp.sampling.bound_contributions, and charge groups of k rows (docs/groups.md)"
)


class Chosen(NamedTuple):
    """Rows of the people of one draw.

    Attributes:
        rows: their numbers in the data set, one class after the other.
        classes: where classes end, and what the gradients of their rows are divided by.
    """

    rows: Indices
    classes: Classes


class People:
    """Whose each row of a data set is.

    Args:
        groups: an id for each row: integers or strings, in a list, an array, a column or a tensor.
        rows: how many rows the data set has; ``None``: as many as there are ids.
        rows_per_group: ``m``: at most so many rows of a person enter a draw, chosen anew in each. A public number.
        weights: see :data:`GroupWeights`.

    Raises:
        InputError: ids are missing (``None``, NaN, an empty string), floating-point or of several types, or several a
            row; or there are more or fewer of them than rows.
        ConfigurationError: ``rows_per_group`` is no positive integer, or the weights are unknown.
        RankError: the ranks' ids differ.

    Attributes:
        count: number of people.
        rows: number of rows.
        rows_per_group: ``m``.
        weights: as given.
        codes: ``(rows,)``, a number of each row's person, from 0.
    """

    def __init__(
        self,
        groups: Any,
        rows: int | None,
        *,
        rows_per_group: int = ROWS_PER_GROUP,
        weights: GroupWeights = "mean",
    ) -> None:
        self.rows_per_group, self.weights = checked_cap(rows_per_group), checked_weights(weights)
        self.codes = _codes(groups, rows)
        self.rows = len(self.codes)
        if not self.rows:
            raise InputError("groups= names whose each row is, and there are no rows")
        self._sizes = np.bincount(self.codes).astype(np.int64)
        self.count = len(self._sizes)
        self._order = np.argsort(self.codes, kind="stable").astype(np.int64, copy=False)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._warn_of_one()
        if placement.world().size > 1:
            placement.agree(
                {"the ids of groups": hashlib.sha256(self.codes.tobytes()).hexdigest()},
                remedy="All ranks need the ids of the whole data set, in one order",
            )

    def _warn_of_one(self) -> None:
        largest = int(self._sizes.max())
        if self.count == 1 and self.rows > 1:
            raise InputError(
                f"all {self.rows} rows have one id, so that nothing would be learnt but from one person: groups must "
                "name whose each row is"
            )
        if 2 * largest > self.rows > 2:
            warn_caller(
                f"one person has {largest} of the {self.rows} rows, of which at most {self.rows_per_group} enter a "
                "draw: is the column of ids the right one, or one id a stand-in for unknown people? (This number is "
                "for the data's owner only.)",
                UserWarning,
            )

    @cached_property
    def grouping(self) -> bytes:
        """Digest of which rows are one person's, whatever the ids are; as private as they are."""
        _, first, inverse = np.unique(self.codes, return_index=True, return_inverse=True)
        return hashlib.sha256(first[inverse].astype(np.int64).tobytes()).digest()

    def warn_of_size(self, dataset_size: int) -> None:
        """Warns of a public size that seems to count rows: private all the same, at more noise than is needed.

        It is no refusal, which would tell how many rows there are; and said once, before anything is released.
        """
        if self.count < self.rows == dataset_size:
            warn_caller(
                f"dataset_size={dataset_size} is the number of rows; with groups= it is the public number of people, "
                "of which there are fewer, and batch_size counts people too",
                UserWarning,
            )

    def require_size(self, dataset_size: int) -> None:
        """Refuses the size of a sampler, which is the number of people, where it counts rows.

        Raises:
            ConfigurationError: it is at least the number of rows, and people are fewer.
        """
        if self.count < self.rows <= dataset_size:
            raise ConfigurationError(
                f"dataset_size={dataset_size} counts rows; with groups= it is the public number of people, of which "
                "there are fewer, and so does batch_size count people"
            )

    def rows_of(self, rank: int, ranks: int) -> Indices:
        """The rows, ascending, of the people that one of several ranks draws from: those of number ``rank, rank + W,
        …``; so nobody is on two ranks."""
        return np.flatnonzero(self.codes % ranks == rank).astype(np.int64)

    def choose(
        self, people: Indices, generator: np.random.Generator, kept: npt.NDArray[np.bool_] | None = None
    ) -> Chosen:
        """At most ``m`` rows of each of some people, uniformly, independently of one another.

        With weights of ``"mean"``, ``k = min(n, m)`` of a person's ``n`` rows enter, and weigh ``1/m`` each if
        ``k = m``. Else, with ``p ≤ k < 2p`` for a power of two ``p``, ``2p - k`` of them weigh ``1/p`` and the other
        ``2k - 2p`` half as much, which is ``1`` together. Which ones is as random as which rows enter, so that the
        expectation is the mean of all ``n``. There are few classes, each of which may be a pass by itself.

        Args:
            people: their numbers, each once.
            generator: of the choice.
            kept: which of these people's rows are returned, by default all; what is chosen for one does not depend on
                it.
        """
        sizes = self._sizes[people]
        owners = np.repeat(np.arange(len(people)), sizes)
        places = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = self._order[np.repeat(self._starts[people], sizes) + places]
        entering = self._entering(sizes)
        divisors = self._divisors(entering[owners], places)
        if bool((entering < sizes).any() or (divisors != entering[owners]).any()):
            # Within each person a random order, of which the first ones are taken, and the first of these weigh most.
            rows = rows[np.lexsort((generator.random(len(rows)), owners))]
            taken = places < entering[owners]
            rows, owners, divisors = rows[taken], owners[taken], divisors[taken]
        if kept is not None:
            rows, divisors = rows[kept[owners]], divisors[kept[owners]]
        if self.weights == "cap":
            return Chosen(np.sort(rows), ((len(rows), self.rows_per_group),))
        order = np.lexsort((rows, divisors))
        found, counts = np.unique(divisors, return_counts=True)
        ends = np.cumsum(counts)
        return Chosen(rows[order], tuple(zip(ends.tolist(), found.tolist(), strict=True)))

    def _entering(self, sizes: Indices) -> Indices:
        """How many rows enter of people who have so many."""
        return np.minimum(sizes, self.rows_per_group)

    def _divisors(self, entering: Indices, places: Indices) -> Indices:
        """One over the weight of a row, of whose person so many enter, and which is at such a place among them."""
        cap = np.int64(self.rows_per_group)
        if self.weights == "cap":
            return np.full_like(entering, cap)
        power = np.int64(1) << (np.frexp(entering)[1].astype(np.int64) - 1)
        split = np.where(places < 2 * power - entering, power, 2 * power)
        return np.where(entering == cap, cap, split)

    @cached_property
    def divisors(self) -> tuple[int, ...]:
        """What the gradients of a row may be divided by, ascending: one for each class of any draw, on any rank."""
        entering = np.unique(self._entering(self._sizes))
        first, last = (self._divisors(entering, places) for places in (np.zeros_like(entering), entering - 1))
        return tuple(np.unique(np.concatenate([first, last])).tolist())

    def with_strangers(self, others: People) -> Indices:
        """An id for each row, and behind them those of other people's rows, none of whom is one of these."""
        return np.concatenate([self.codes, self.count + others.codes])

    def sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``(people,)``: of one number for each row the sum over each person's."""
        total = np.zeros(self.count)
        np.add.at(total, self.codes, values)
        return total

    def spread(self, values: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """``(rows,)``: of one truth value for each person that of each row's."""
        return values[self.codes]

    def shares(self, device: torch.device | str = "cpu") -> Tensor:
        """``(rows,)``, float64: one over the number of rows of each row's person, so that all of one's add up to 1."""
        return torch.from_numpy(1.0 / self._sizes[self.codes]).to(device)


def spans_of(classes: Classes) -> list[tuple[int, int]]:
    """From where to where the rows of each class are."""
    return list(itertools.pairwise([0, *(end for end, _ in classes)]))


def checked_cap(rows_per_group: object) -> int:
    """``rows_per_group``, once it is known to be a positive integer."""
    return whole("rows_per_group", rows_per_group)


def checked_weights(weights: object) -> GroupWeights:
    """``group_weights``, once they are known.

    Raises:
        ConfigurationError: they are not.
    """
    if not isinstance(weights, str) or weights not in ("mean", "cap"):
        raise ConfigurationError(f"group_weights must be 'mean' or 'cap', got {weights!r}")
    return cast(GroupWeights, weights)


def refuse_without_groups(rows_per_group: object, weights: object) -> None:
    """Refuses a cap or weights of people's rows where nothing says whose rows are.

    Raises:
        ConfigurationError: one of them is none, or is not its default.
    """
    if (checked_cap(rows_per_group), checked_weights(weights)) != (ROWS_PER_GROUP, "mean"):
        raise ConfigurationError("rows_per_group and group_weights are about groups: give an id for each row")


def number_of(groups: Any, rows: int) -> int:
    """The number of people.

    Raises:
        InputError: as :class:`People`.
    """
    return len(np.unique(_codes(groups, rows)))


def _codes(groups: Any, rows: int | None) -> Indices:
    """A number for each id, from 0, the ids in their own order."""
    ids = _as_ids(groups)
    if rows is not None and len(ids) != rows:
        raise InputError(f"{len(ids)} ids in groups for {rows} rows: need one for each")
    if ids.dtype.kind == "U" and bool((ids == "").any()):
        raise _missing(np.flatnonzero(ids == ""))
    _, codes = np.unique(ids, return_inverse=True)
    return codes.reshape(-1).astype(np.int64)


def _as_ids(groups: Any) -> npt.NDArray[Any]:
    # Neither a mapping nor a set has an order that rows could be told by.
    unordered = isinstance(groups, (Mapping, Set))
    if unordered or isinstance(groups, (str, bytes)) or not hasattr(groups, "__len__"):
        raise InputError(f"groups must be an id for each row, got a {type(groups).__name__}")
    shape = getattr(groups, "shape", (None,))
    if len(shape) != 1:
        raise InputError(f"groups must be one id for each row, (rows,), got {tuple(shape)}: {_SHARED}")
    ids = cells_of(groups, "groups")
    kind = ids.dtype.kind
    if kind == "f":
        remedy = "one person's may differ by rounding: give integers or strings"
        if bool(np.isnan(ids).any()):
            remedy = "missing ids make a column of integers one of floats: give every row an id"
        raise InputError(f"the ids in groups are floating-point numbers ({ids.dtype}): {remedy}")
    if kind in "iuU":
        return ids
    if kind in "OTS":
        return _of_objects(ids)
    raise InputError(f"the ids in groups are {ids.dtype}: give integers or strings")


def _of_objects(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Ids of Python's own types, once they are known to be of one."""
    listed = ids.tolist()
    if not listed:
        raise InputError("groups must be an id for each row, and there are none")
    missing = [place for place, one in enumerate(listed) if _is_no_id(one)]
    if missing:
        raise _missing(missing)
    kinds = {next((kind for kind in (str, bytes) if isinstance(one, kind)), type(one)) for one in listed}
    if any(issubclass(kind, (list, tuple, set, frozenset, np.ndarray)) for kind in kinds):
        raise InputError(f"groups names several people for one row: {_SHARED}")
    whole_numbers = all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds)
    if not (whole_numbers or kinds in ({str}, {bytes})):
        named = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"the ids in groups are of type {named}: give integers, or strings, all of one type")
    if whole_numbers:
        # Of numbers of several types, or beyond 64 bits, numpy would make floats, in which two people may be one.
        numbers = [int(one) for one in listed]
        return np.array(numbers, dtype=np.int64 if max(map(abs, numbers)) < 1 << 63 else object)
    # numpy's own strings lose the NULs at their end.
    kept = any(one.endswith("\0" if isinstance(one, str) else b"\0") for one in listed)
    return np.array(listed, dtype=object if kept else None)


def _is_no_id(one: Any) -> bool:
    return is_missing(one) or (isinstance(one, (str, bytes)) and not one)


def _missing(places: Sequence[int] | Indices) -> InputError:
    return InputError(
        f"{len(places)} rows have no id in groups, row {int(places[0])} the first: rows of unknown people may all be "
        "one person's. Leave them out, or give each an id, if each is known to be of a person of its own"
    )


def bound_contributions(owners: Iterable[Any], rows_per_group: int, *, seed: int | None = None) -> Indices:
    """Rows of which nobody has more than ``k``, chosen greedily in a random order: of shared rows too.

    A row that several people share (a message with two authors) counts against all of them: it is kept if each of
    them has fewer than ``k`` rows that are kept. Steps on a Poisson sample of what is kept then are about groups of
    ``k`` rows. Which rows are kept depends on *who has which rows*, so that the guarantee is about the contents of all
    rows of a person, with whose they are taken as fixed: DP of a fixed graph (Ganesh et al. 2025, "It's My Data Too:
    Private ML for Datasets with Multi-User Training Examples", §3). Where each row is one person's, it holds for adding
    and removing people, too.

    Args:
        owners: for each row an id, or several in a list, tuple or set.
        rows_per_group: ``k``, public.
        seed: of the order; by default of the operating system.

    Returns:
        The numbers of the rows that are kept, ascending.

    Raises:
        InputError: a row has no id, or ids are no integers or strings.
        ConfigurationError: ``k`` is no positive integer, or the seed none that is not negative.
    """
    most = checked_cap(rows_per_group)
    generator = np.random.default_rng(None if seed is None else whole("seed", seed, 0))
    if isinstance(owners, (Mapping, Set, str, bytes)):
        raise InputError(f"owners must be an id, or several, for each row in order, got a {type(owners).__name__}")
    if isinstance(owners, np.ma.MaskedArray):
        owners = owners.tolist()
    named = [_named(one) for one in (owners.tolist() if isinstance(owners, Tensor) else owners)]
    empty = [place for place, some in enumerate(named) if not some or any(map(_is_no_id, some))]
    if empty:
        raise _missing(empty)
    ids = _as_ids([one for some in named for one in some]).tolist() if named else []
    numbered, start = [], 0
    for some in named:
        numbered.append(set(ids[start : start + len(some)]))
        start += len(some)
    held: dict[Any, int] = {}
    kept = []
    for row in generator.permutation(len(numbered)):
        if all(held.get(one, 0) < most for one in numbered[row]):
            kept.append(row)
            for one in numbered[row]:
                held[one] = held.get(one, 0) + 1
    return np.sort(np.array(kept, dtype=np.int64))


def _named(owner: Any) -> list[Any]:
    """Who is named for one row."""
    if isinstance(owner, Mapping):
        raise InputError("a mapping names nobody: give an id, or several in a list, tuple or set, for each row")
    if isinstance(owner, Tensor):
        owner = owner.tolist()
    return [owner] if isinstance(owner, (str, bytes)) or not hasattr(owner, "__iter__") else [*owner]


def refuse_other_units(ledger: Ledger, unit: Unit) -> None:
    """Refuses a ledger about rows where people are the unit, and the other way round: their ε do not add up.

    Raises:
        ConfigurationError: it has lines about the other unit.
    """
    others = ledger.units - {"" if unit == "row" else unit}
    if others:
        other = "people" if "person" in others else "rows"
        raise ConfigurationError(
            f"the accountant's ledger is about {other}, and unit={unit!r} is not: their ε do not add up. Release all "
            "of it about people (groups= of statistics and fit), or, where each person has one row only, say so: "
            f"accountant.ledger = accountant.ledger.about({'person' if unit == 'person' else ''!r})"
        )


def column_of(dataset: Any, groups: Any) -> tuple[Any, Any]:
    """The data set without a column, and the column, where ``groups`` is its name; else both as they are.

    Args:
        dataset: a mapping of columns, a pair whose inputs are one, a list of mappings, or a table that tells of its
            ``column_names``.
        groups: ids, or a name.

    Raises:
        ConfigurationError: there is no such column.
    """
    if not isinstance(groups, str):
        return dataset, groups
    if (
        isinstance(dataset, (tuple, list))
        and len(dataset) == 2
        and isinstance(dataset[0], Mapping)
        and groups in dataset[0]
    ):
        rest, ids = column_of(dataset[0], groups)
        return (rest, dataset[1]), ids
    if isinstance(dataset, Mapping) and groups in dataset:
        return {name: values for name, values in dataset.items() if name != groups}, dataset[groups]
    if groups in getattr(dataset, "column_names", ()):
        return dataset.remove_columns(groups), list(dataset[groups])
    if (
        isinstance(dataset, (tuple, list))
        and dataset
        and all(isinstance(row, Mapping) and groups in row for row in dataset)
    ):
        # A sample that is there twice stays one, which is refused.
        rows = {id(row): {name: value for name, value in row.items() if name != groups} for row in dataset}
        return [rows[id(row)] for row in dataset], [row[groups] for row in dataset]
    raise ConfigurationError(
        f"there is no column {groups!r} in the data set ({type(dataset).__name__}): give the ids themselves, one a row"
    )


def people_of(
    groups: Any, rows: int | None, rows_per_group: int = ROWS_PER_GROUP, weights: GroupWeights = "mean"
) -> People | None:
    """Whose rows are, if groups are given; ``People`` as they are.

    Raises:
        PrivacyError: the people are of another data set.
        ConfigurationError: a cap or weights are given without groups.
    """
    if groups is None:
        refuse_without_groups(rows_per_group, weights)
        return None
    if isinstance(groups, People):
        if rows is not None and groups.rows != rows:
            raise PrivacyError(f"groups are of {groups.rows} rows, and the data set has {rows}")
        return groups
    return People(groups, rows, rows_per_group=rows_per_group, weights=weights)
