"""Poisson batches of data that is held on the device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipless_dp import arguments
from clipless_dp.arguments import whole
from clipless_dp.packing import Packing, Structure
from clipless_dp.sampling import draws, trained_on
from clipless_dp.sampling.people import ROWS_PER_GROUP, GroupWeights, People, column_of, people_of
from clipless_dp.sampling.sampler import PoissonBatchSampler, refuse_draws
from clipless_dp.sampling.samples import Samples
from clipless_dp.sampling.samples import count as samples_in


class Batch(NamedTuple):
    """One Poisson draw.

    Attributes:
        inputs: ``(rows, ...)``; rows beyond the draw are NaN, or -1 for signed integers: no number and no token, which
            contribute nothing. (Zero for unsigned integers, where only the mask tells.)
        targets: ``(rows, ...)``, zero beyond the draw.
        mask: boolean ``(rows,)``, true for the samples drawn.

    Several inputs of a sample are packed into one row, which the model takes as it is; :meth:`fields` shows them.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor

    def fields(self, packing: Packing) -> Structure:
        """The inputs by name or in order, padding included, as ``model.packing`` tells them apart."""
        return packing.structured(self.inputs)

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of this draw, for gradient accumulation: one ``backward()`` each, one ``step()`` for all."""
        rows = whole("rows", rows)
        for inputs, targets, mask in zip(
            self.inputs.split(rows), self.targets.split(rows), self.mask.split(rows), strict=True
        ):
            yield Batch(inputs, targets, mask)


def usual_rows(count: int, sample_rate: float) -> int:
    """Rows that hold all but one in 10⁴ draws from so many samples: four standard deviations above the mean."""
    mean = count * sample_rate
    return min(8 * math.ceil((mean + 4.0 * math.sqrt(mean * (1 - sample_rate))) / 8), count)


def checked_rows(rows: int | None, count: int, sample_rate: float) -> int:
    """A positive number of rows for draws from so many samples, by default the usual one."""
    return usual_rows(count, sample_rate) if rows is None else whole("physical_batch_size", rows)


class Batches(ABC):
    """Poisson batches of a data set, wherever that is: arguments and errors as :class:`PoissonBatches`."""

    sampler: PoissonBatchSampler
    packing: Packing | None

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any] | Mapping[str, Any] | Samples,
        *,
        sample_rate: float,
        steps: int,
        device: torch.device | str | None = None,
        physical_batch_size: int | None = None,
        seed: int | None = None,
        start: int = 0,
        groups: Any = None,
        rows_per_group: int = ROWS_PER_GROUP,
        group_weights: GroupWeights = "mean",
    ) -> None:
        if physical_batch_size is not None:
            physical_batch_size = whole("physical_batch_size", physical_batch_size)
        self._device = arguments.device("device", device)
        refuse_draws(sample_rate, steps, seed, start)
        dataset, groups = column_of(dataset, groups)
        people = people_of(groups, samples_in(dataset), rows_per_group, group_weights)
        samples = self._taken(dataset, people)
        self.packing = samples.packing
        units = len(samples) if people is None else people.count
        self.sampler = PoissonBatchSampler(
            units, sample_rate=sample_rate, steps=steps, seed=seed, start=start, groups=people
        )
        self.physical_batch_size = checked_rows(physical_batch_size, self._part(samples), self.sampler.sample_rate)

    @abstractmethod
    def _taken(self, dataset: Any, people: People | None) -> Samples:
        """The samples, once they are known to be some that may be trained on."""

    @abstractmethod
    def _part(self, samples: Samples) -> int:
        """Takes this process's own part of the samples, and says of how many."""

    @abstractmethod
    def __iter__(self) -> Generator[Batch, None, None]: ...

    def __len__(self) -> int:
        return len(self.sampler)


class PoissonBatches(Batches):
    """Poisson batches of a data set held on the device, in static shapes.

    Each iteration yields one whole draw, never a part and never truncated. It is padded to
    ``physical_batch_size`` rows, so that shapes stay static for compiled steps; a draw that does not fit takes the
    next multiple (:meth:`Batch.split` cuts it into equal pieces). Empty draws are yielded like any other.

    Args:
        dataset: the whole data set, see :class:`clipless_dp.sampling.Samples`; moved to the device once, of several
            processes each one's own part. They compare it, so that all of them make this together.
            ``Samples(data, model.packing)`` are packed for a model of several inputs, and held against what it takes.
        sample_rate: ``q`` in (0, 1].
        steps: number of batches.
        device: where to hold the data; by default where it is.
        physical_batch_size: rows of a batch; by default four standard deviations above the mean, so that fewer
            than 1 in 10⁴ draws need a second multiple.
        seed: as in :class:`PoissonBatchSampler`.
        start: as in :class:`PoissonBatchSampler`.
        groups: whose each row is, an id for each, or the name of a column of them, which is no input then: people are
            drawn, each with probability ``sample_rate``, and their rows averaged (docs/groups.md).
        rows_per_group, group_weights: as in :class:`PoissonBatchSampler`.

    Raises:
        ConfigurationError: an argument is out of range, or the data set is empty, or returns more or fewer samples than
            it is asked for.
        PrivacyError: a sample is in the data set more than once, see
            :func:`clipless_dp.sampling.persons.refuse_repeats`.
        RankError: the data of the ranks differs, see :func:`clipless_dp.sampling.persons.require_alike`.

    Attributes:
        packing: how several inputs of a sample lie in a row; ``None`` of one.
        physical_batch_size: as given or chosen.

    Guarantee:
        Every sample is in every batch with probability ``q``, independently; each draw is announced to the
        optimizers of this process, which charge amplification only for announced draws.
    """

    def _taken(self, dataset: Any, people: People | None) -> Samples:
        return Samples.to_train_on(dataset, people=people)

    def _part(self, samples: Samples) -> int:
        people = self.sampler.people
        inputs, targets = samples.all(in_order=people is not None)
        rank, ranks = self.sampler.world
        self._own = None if people is None else people.rows_of(rank, ranks)
        own = slice(rank, None, ranks) if self._own is None else self._own
        self._inputs = inputs[own].to(self._device)
        self._targets = targets[own].to(self._device)
        # On another device, or of several processes, these are copies.
        trained_on.note(None, (self._inputs, self._targets))
        return len(self._inputs)

    def __iter__(self) -> Generator[Batch, None, None]:
        made = self.sampler.numbered()
        for rows, classes in self.sampler.chosen():
            places = rows // self.sampler.world.size if self._own is None else np.searchsorted(self._own, rows)
            chosen = torch.from_numpy(places)
            batch = padded_batch(self._inputs, self._targets, chosen, self.physical_batch_size)
            draw = self.sampler.next_of(made, classes)
            draws.deliver(draw, batch.inputs, len(rows), partial(_rows, self._inputs, chosen))
            yield batch


def _rows(inputs: Tensor, indices: Tensor) -> Tensor:
    return inputs.index_select(0, indices.to(inputs.device))


def padded_batch(inputs: Tensor, targets: Tensor, indices: Tensor, multiple: int) -> Batch:
    """The rows of some indices, on the device of the data, padded to the next multiple of so many rows."""
    count = len(indices)
    rows = multiple * max(1, math.ceil(count / multiple))
    if inputs.device.type == "cuda":
        # From pageable memory the copy would wait for the device.
        indices = indices.pin_memory()
    indices = indices.to(inputs.device, non_blocking=True)
    padding = math.nan if inputs.is_floating_point() else -int(inputs.dtype.is_signed)
    mask = torch.arange(rows, device=inputs.device) < count
    return Batch(_padded(inputs, indices, rows, padding), _padded(targets, indices, rows, 0), mask)


def _padded(values: Tensor, indices: Tensor, rows: int, padding: float) -> Tensor:
    batch = values.new_empty((rows, *values.shape[1:]))
    torch.index_select(values, 0, indices, out=batch[: len(indices)])
    batch[len(indices) :] = padding
    return batch
