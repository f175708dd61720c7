"""Which samples are in which batch: each with probability ``q``, independently of everything else."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset, TensorDataset, default_collate, default_convert

from clipless_dp import arguments
from clipless_dp.arguments import share, whole
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.noise import derived_seed
from clipless_dp.sampling import collation, loaders, persons, trained_on
from clipless_dp.sampling.draws import DRAWN_AGAIN
from clipless_dp.sampling.people import (
    ROWS_PER_GROUP,
    Chosen,
    Classes,
    GroupWeights,
    Indices,
    people_of,
)
from clipless_dp.sampling.series import Draw, Series, Source


def refuse_draws(sample_rate: float, steps: int, seed: int | None, start: int) -> tuple[float, int, int | None, int]:
    """Sample rate, steps, seed and start, once they are known to be some; asked before data is read.

    Raises:
        ConfigurationError: one is out of range.
    """
    rate = share("sample_rate", sample_rate, "(0, 1]")
    steps, start = whole("steps", steps, 0), whole("start", start, 0)
    if start > steps:
        raise ConfigurationError(f"steps and start must be integers with 0 ≤ start ≤ steps, got {steps!r}, {start!r}")
    return rate, steps, arguments.seed("seed", seed), start


class PoissonBatchSampler(Sampler[list[int]]):
    """Poisson batches of indices, for ``DataLoader(dataset, batch_sampler=…, collate_fn=poisson_collate(dataset))``.

    Args:
        dataset_size: number of samples.
        sample_rate: ``q`` in (0, 1].
        steps: number of batches.
        seed: ``None`` draws from the operating system's entropy, which a release needs: the amplification relies
            on the batches being secret. An integer makes draw ``i`` a function of the seed and ``i``, whatever the
            number of processes; such a sampler serves one pass, since a second one would draw the same batches again.
        start: number of the first draw, to resume a seeded run.
        groups: whose each row of the data set is: people are drawn then, of whom there are ``dataset_size``, and the
            batches are of their rows (:class:`clipless_dp.sampling.people.People`, docs/groups.md). A step passes them
            by :meth:`clipless_dp.CliplessDPOptimizer.accumulate`, of an optimizer with ``unit="person"``.
        rows_per_group: at most so many rows of a person enter a draw, chosen anew in each.
        group_weights: ``"mean"``: a person's rows that enter weigh 1 together, and each about as much as another
            (docs/groups.md); ``"cap"``: one over ``rows_per_group`` each.

    Of several processes (:mod:`clipless_dp.distributed`), rank ``r`` of ``W`` draws from the samples ``r, r + W, …``
    only, each with probability ``q``: together they draw a Poisson sample of the whole data set, which each is told
    the size of.

    Raises:
        ConfigurationError: an argument is out of range, or there are more processes than samples.
        InputError: ids are missing or floating-point, see :class:`clipless_dp.sampling.people.People`.
    """

    def __init__(
        self,
        dataset_size: int,
        *,
        sample_rate: float,
        steps: int,
        seed: int | None = None,
        start: int = 0,
        groups: Any = None,
        rows_per_group: int = ROWS_PER_GROUP,
        group_weights: GroupWeights = "mean",
    ) -> None:
        self.sample_rate, self.steps, self.seed, self.start = refuse_draws(sample_rate, steps, seed, start)
        self.dataset_size = whole("dataset_size", dataset_size)
        self.people = people_of(groups, None, rows_per_group, group_weights)
        if self.people is not None:
            self.people.require_size(self.dataset_size)
            if self.dataset_size != self.people.count:
                raise ConfigurationError(
                    f"dataset_size={self.dataset_size}, and groups= names {self.people.count} people: with groups= "
                    "dataset_size of a sampler is their number"
                )
        self._passed = False
        self._source = Source()
        self.world = placement.world()
        if self.world.size > self.dataset_size:
            raise ConfigurationError(
                f"{self.world.size} processes for {self.dataset_size} samples: start fewer of them"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Of a version that did not tell draws of one sampler from those of another.
        self.__dict__.setdefault("_source", Source())
        self.__dict__.setdefault("people", None)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        made = self.numbered()
        for rows, classes in self.chosen():
            yield loaders.upcoming(self.next_of(made, classes), rows.tolist())
        loaders.ended()

    def next_of(self, made: Iterator[Draw], classes: Classes) -> Draw:
        """What the next batch is delivered as, if of people with these classes of rows."""
        draw = next(made)
        draw.classes = classes
        return draw

    def numbered(self) -> Iterator[Draw]:
        """What the batches of one iteration are delivered as, see :func:`clipless_dp.sampling.draws.deliver`."""
        series = Series(self._source)
        try:
            for place in itertools.count():
                seeded = self.seed is not None
                # At another rate, or of a row more, most of a draw's rows are the same.
                follows = (self.seed, self.start + place) if seeded else None
                yield Draw(self.sample_rate, seeded, follows, series=series, place=place, people=self.people)
        finally:
            series.ended = True

    def draws(self) -> Iterator[Indices]:
        """The drawn rows of each batch, ascending; of people, one class of weights after the other."""
        for rows, _ in self.chosen():
            yield rows

    def chosen(self) -> Iterator[Chosen]:
        """The drawn rows of each batch, and where they are of people, what the gradients of which are divided by.

        The size is binomial and, given the size, the subset uniform: the same law as one coin for each sample.

        Raises:
            ConfigurationError: this is a second pass of a seeded sampler, or the process group has changed.
        """
        if placement.world() != self.world:
            raise ConfigurationError("the process group has changed since this sampler was made: make it afterwards")
        if self.seed is not None and self._passed:
            raise ConfigurationError(DRAWN_AGAIN)
        self._passed = True
        rank, ranks = self.world
        system, process = np.random.Generator(np.random.PCG64DXSM()), os.getpid()
        for step in range(self.start, self.steps):
            if os.getpid() != process:
                # Forked within this loop: parent and child would draw the same batches.
                system, process = np.random.Generator(np.random.PCG64DXSM()), os.getpid()
            if self.seed is None:
                generator = system
                indices = self._draw(system, len(range(rank, self.dataset_size, ranks))) * ranks + rank
            else:
                # All ranks draw the same for the whole data set, and each keeps its own part.
                generator = np.random.Generator(np.random.PCG64DXSM(derived_seed(self.seed, "batch", step)))
                indices = self._draw(generator, self.dataset_size)
            indices = np.sort(indices).astype(np.int64, copy=False)
            own = indices % ranks == rank
            if self.people is None:
                yield Chosen(indices[own], ())
            else:
                yield self.people.choose(indices, generator, own)

    def _draw(self, generator: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        size = int(generator.binomial(count, self.sample_rate))
        return generator.choice(count, size=size, replace=False, shuffle=False)


def poisson_collate(
    dataset: Dataset[Any] | Sequence[Any], collate: Callable[[list[Any]], Any] = default_collate
) -> Callable[[list[Any]], Any]:
    """A ``collate_fn`` that also handles the empty batch, which Poisson sampling does draw.

    Args:
        dataset: its first sample shows the shapes. Of several processes all call this, after the process group was
            made: they compare what they hold, see :func:`clipless_dp.sampling.persons.require_alike`.
        collate: makes a batch of a list of samples: torch's own, or a data collator of Hugging Face. Any other than
            torch's is called on each sample alone, and what it returns is joined
            (:class:`clipless_dp.sampling.collation.RowByRow`), so that no row is made of two samples: it must pad all
            to one length, which a public number says. What it draws from the global generators of torch, numpy and
            Python is independent of company and of a user's seeds; generators of its own are refused, and so is a state
            that changes while it makes rows.

    Returns:
        A function that collates so, and returns zero-length tensors for an empty list. Mappings of other types become
        a ``dict``.

    Raises:
        ConfigurationError: ``collate`` returns other things than tensors of one row for each sample, or draws from a
            generator of its own; or the data set reads samples into memory of others.
        PrivacyError: a sample is there more than once, see :func:`clipless_dp.sampling.persons.refuse_repeats`; or
            ``collate`` remembers something of a sample, or reaches the data; a method of the data set may.
        RankError: the data of the ranks differs.
    """
    first = dataset[0]
    if collation.sees_single_rows(collate):
        try:
            empty = _emptied(_plain(collate([first])))
        except TypeError as error:
            raise ConfigurationError(
                f"the first sample cannot be collated ({str(error).splitlines()[0]}): let each sample be tensors, "
                "arrays or numbers, in tuples, lists or mappings, and its target a number; leave out what is None, or "
                "give a collate function that does"
            ) from error
    else:
        alone = collate = collation.RowByRow(collate, first)
        empty = alone.empty
    if hasattr(dataset, "__len__"):
        persons.refuse_repeats(dataset)
        persons.refuse_reused_memory(dataset)
        tensors = dataset.tensors if isinstance(dataset, TensorDataset) else None
        persons.require_alike(dataset, tensors, lambda index: list(_leaves(dataset[index])))
        trained_on.note(dataset, sample=first)
        if isinstance(collate, collation.RowByRow):
            collate.refuse_data(dataset)
    return _Collate(empty, collate, by_memory=_is_made_of_tensors(dataset))


def _is_made_of_tensors(dataset: Any) -> bool:
    """Whether each sample is a view of a row of its own."""
    if type(dataset) is Subset:
        return _is_made_of_tensors(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_is_made_of_tensors, dataset.datasets))
    return type(dataset) is TensorDataset and bool(dataset.tensors[0].numel())


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    else:
        yield torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value


def _plain(batch: Any) -> Any:
    """A batch whose tensors are found in it: of mappings, torch looks into its own and Python's."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def _emptied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:0]
    if isinstance(value, Mapping):
        return {key: _emptied(item) for key, item in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*map(_emptied, value))
    return type(value)(_emptied(item) for item in value)


class _Collate:
    """A class, since a ``DataLoader`` that spawns its workers pickles it."""

    def __init__(self, empty: Any, collate: Callable[[list[Any]], Any], by_memory: bool) -> None:
        self.empty = empty
        self.collate = collate
        self.by_memory = by_memory

    def __call__(self, samples: Any) -> Any:
        fetch = loaders.fetching()
        if fetch is not None:
            fetch.refuse_other_count()
        whole = fetch is not None and fetch.whole
        rows = self.by_memory and not whole and [sample[0].data_ptr() for sample in samples]
        if (fetch is not None and fetch.repeats()) or (rows and len(set(rows)) < len(rows)):
            raise PrivacyError(
                "a batch holds a sample more than once: the indices of a Poisson draw were repeated on their way, by a "
                "sampler around it say. Hand them to the DataLoader as they are, as batch_sampler"
            )
        if fetch is not None and not whole:
            persons.refuse_same(fetch.samples)
        if whole:
            # The data set was asked for a draw at once.
            samples = default_convert(samples)
            return loaders.arrived(samples, samples)
        if not samples:
            return loaders.arrived(_emptied(self.empty), samples)
        ordered = list(samples)
        if fetch is not None and len(fetch.classes) > 1 and fetch.made_of(samples):
            # Of people too the order of samples is that by which they weigh.
            ordered = [sample for some in fetch.apart(samples) for sample in some]
        return loaders.arrived(_plain(self.collate(ordered)), samples)
