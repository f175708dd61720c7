"""Poisson sampling: each sample enters each batch with probability ``q``, independently of everything else."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset, TensorDataset, default_collate

from clipless_dp import distributed
from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.noise import derived_seed
from clipless_dp.sampling import draws, persons


class Batch(NamedTuple):
    """One Poisson draw.

    Attributes:
        inputs: ``(rows, ...)``; rows beyond the draw are NaN, or -1 for signed integers: no number and no token, which
            contribute nothing. (Zero for unsigned integers, where only the mask tells.)
        targets: ``(rows, ...)``, zero beyond the draw.
        mask: boolean ``(rows,)``, true for the samples drawn.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor

    def split(self, rows: int) -> Iterator[Batch]:
        """Micro-batches of this draw, for gradient accumulation: one ``backward()`` each, one ``step()`` for all."""
        for inputs, targets, mask in zip(
            self.inputs.split(rows), self.targets.split(rows), self.mask.split(rows), strict=True
        ):
            yield Batch(inputs, targets, mask)


def _checked(sample_rate: float, steps: int, start: int) -> None:
    if not 0.0 < sample_rate <= 1.0:
        raise ConfigurationError(
            f"sample_rate must lie in (0, 1], got {sample_rate!r}: the expected batch cannot exceed the data set"
        )
    if not (isinstance(steps, int) and steps >= 0 and 0 <= start <= steps):
        raise ConfigurationError(f"steps and start must be integers with 0 ≤ start ≤ steps, got {steps!r}, {start!r}")


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

    Of several processes (:mod:`clipless_dp.distributed`), rank ``r`` of ``W`` draws from the samples ``r, r + W, …``
    only, each with probability ``q``: together they draw a Poisson sample of the whole data set, which each is told
    the size of.

    Raises:
        ConfigurationError: an argument is out of range, or there are more processes than samples.
    """

    def __init__(
        self, dataset_size: int, *, sample_rate: float, steps: int, seed: int | None = None, start: int = 0
    ) -> None:
        _checked(sample_rate, steps, start)
        if not (isinstance(dataset_size, int) and dataset_size >= 1):
            raise ConfigurationError(f"dataset_size must be a positive integer, got {dataset_size!r}")
        self.dataset_size = dataset_size
        self.sample_rate = float(sample_rate)
        self.steps = steps
        self.seed = seed
        self.start = start
        self._passed = False
        self.world = distributed.world()
        if self.world.size > dataset_size:
            raise ConfigurationError(f"{self.world.size} processes for {dataset_size} samples: start fewer of them")

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        made = self.numbered()
        return (draws.upcoming(next(made), indices.tolist()) for indices in self.draws())

    def numbered(self) -> Iterator[draws.Draw]:
        """What the batches of one iteration are delivered as, see :func:`clipless_dp.sampling.draws.deliver`."""
        series = object()
        for place in itertools.count():
            yield draws.Draw(self.sample_rate, seeded=self.seed is not None, series=series, place=place)

    def draws(self) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        """The drawn indices of each batch, ascending.

        The size is binomial and, given the size, the subset uniform: the same law as one coin for each sample.

        Raises:
            ConfigurationError: this is a second pass of a seeded sampler, or the process group has changed.
        """
        if distributed.world() != self.world:
            raise ConfigurationError("the process group has changed since this sampler was made: make it afterwards")
        if self.seed is not None and self._passed:
            raise ConfigurationError(
                "this sampler is seeded, so a second pass would draw the same batches again, which amplification "
                "does not cover: make one sampler with the steps of all passes, or one without a seed"
            )
        self._passed = True
        rank, ranks = self.world
        system, process = np.random.Generator(np.random.PCG64DXSM()), os.getpid()
        for step in range(self.start, self.steps):
            if os.getpid() != process:
                # Forked within this loop: parent and child would draw the same batches.
                system, process = np.random.Generator(np.random.PCG64DXSM()), os.getpid()
            if self.seed is None:
                indices = self._draw(system, len(range(rank, self.dataset_size, ranks))) * ranks + rank
            else:
                # All ranks draw the same for the whole data set, and each keeps its own part.
                seeded = np.random.Generator(np.random.PCG64DXSM(derived_seed(self.seed, "batch", step)))
                indices = self._draw(seeded, self.dataset_size)
                indices = indices[indices % ranks == rank]
            yield np.sort(indices).astype(np.int64, copy=False)

    def _draw(self, generator: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        size = int(generator.binomial(count, self.sample_rate))
        return generator.choice(count, size=size, replace=False, shuffle=False)


def poisson_collate(dataset: Dataset[Any]) -> Callable[[list[Any]], Any]:
    """A ``collate_fn`` that also handles the empty batch, which Poisson sampling does draw.

    Args:
        dataset: its first sample shows the shapes. Of several processes all call this, after the process group was
            made: they compare what they hold, see :func:`clipless_dp.sampling.persons.require_alike`.

    Returns:
        A function that collates as torch does, and returns zero-length tensors for an empty list.

    Raises:
        PrivacyError: a sample is there more than once, see :func:`clipless_dp.sampling.persons.refuse_repeats`.
        RankError: the data of the ranks differs.
    """
    empty = _emptied(default_collate([dataset[0]]))
    if hasattr(dataset, "__len__"):
        persons.refuse_repeats(dataset)
        tensors = dataset.tensors if isinstance(dataset, TensorDataset) else None
        persons.require_alike(dataset, tensors, lambda index: list(_leaves(dataset[index])))
    return _Collate(empty, by_memory=_is_made_of_tensors(dataset))


def _is_made_of_tensors(dataset: Any) -> bool:
    """Whether each sample is a view of a row of its own."""
    if type(dataset) is Subset:
        return _is_made_of_tensors(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_is_made_of_tensors, dataset.datasets))
    return type(dataset) is TensorDataset and bool(dataset.tensors[0].numel())


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    else:
        yield torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value


def _emptied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:0]
    if isinstance(value, dict):
        return {key: _emptied(item) for key, item in value.items()}
    return type(value)(_emptied(item) for item in value)


class _Collate:
    """A class, since a ``DataLoader`` that spawns its workers pickles it."""

    def __init__(self, empty: Any, by_memory: bool) -> None:
        self.empty = empty
        self.by_memory = by_memory

    def __call__(self, samples: list[Any]) -> Any:
        if self.by_memory and len({sample[0].data_ptr() for sample in samples}) < len(samples):
            raise PrivacyError(
                "a batch holds a sample more than once: the indices of a Poisson draw were repeated on their way, by a "
                "sampler around it say. Hand them to the DataLoader as they are, as batch_sampler"
            )
        return draws.arrived(default_collate(samples) if samples else _emptied(self.empty), len(samples))


def as_tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a data set, stacked.

    Args:
        dataset: a pair of tensors or arrays, a ``TensorDataset``, or any map-style data set of (input, target).

    Raises:
        ConfigurationError: it is empty, or the two lengths differ, its samples differ in shape, or it is none of
            these.
    """
    return Samples.of(dataset).all()


def public_size(dataset_size: int | None, rows: int) -> int:
    """The public number of samples: as it was stated, or of the data, which is then taken to be public.

    Raises:
        ConfigurationError: it is not a positive integer.
    """
    size = rows if dataset_size is None else dataset_size
    if not (isinstance(size, int) and size >= 1):
        raise ConfigurationError(f"dataset_size must be a positive integer, got {dataset_size!r}")
    return size


class Samples:
    """The samples of a data set, by number; nothing but the first one is read until it is asked for.

    Args:
        dataset: see :func:`as_tensors`. Arrays may be memory-mapped files, of which no more is read than the rows asked
            for. A map-style data set is asked for several samples at once, by ``__getitems__``, where it can.

    Raises:
        ConfigurationError: it is empty, or no data set, or its first sample is not a pair.

    Attributes:
        tensors: inputs and targets where the data set is a pair of them, else ``None``.
        first: input and target of the first sample, with a batch axis of length one.
    """

    def __init__(self, dataset: Any) -> None:
        self.tensors: tuple[Tensor, Tensor] | None = None
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
            dataset = dataset.tensors
        if isinstance(dataset, (tuple, list)) and len(dataset) == 2 and all(hasattr(part, "shape") for part in dataset):
            with warnings.catch_warnings():
                # A file that is mapped for reading only: nothing here writes to it.
                warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
                inputs, targets = (torch.as_tensor(part) for part in dataset)
            if len(inputs) != len(targets) or len(inputs) == 0:
                raise ConfigurationError(
                    f"{len(inputs)} inputs and {len(targets)} targets: need as many of each, and some"
                )
            self.tensors = inputs, targets
        elif not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ConfigurationError(
                f"expected a pair of tensors, a TensorDataset or a map-style data set, got {type(dataset).__name__}"
            )
        elif len(dataset) == 0:
            raise ConfigurationError("the data set is empty")
        self._dataset = dataset
        self._checked = False
        try:
            self.first = self.read(range(1))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise error if isinstance(error, ConfigurationError) else self._refused(error) from error

    @classmethod
    def of(cls, dataset: Any) -> Samples:
        """The samples of a data set, or these themselves."""
        return dataset if isinstance(dataset, Samples) else cls(dataset)

    @classmethod
    def to_train_on(cls, dataset: Any) -> Samples:
        """The samples of a data set in which each is there once, and that all ranks hold alike.

        Raises:
            ConfigurationError: as the constructor does.
            PrivacyError: a sample is there more than once, see :func:`clipless_dp.sampling.persons.refuse_repeats`.
            RankError: the data of the ranks differs, see :func:`clipless_dp.sampling.persons.require_alike`.
        """
        samples = cls.of(dataset)
        if not samples._checked:
            persons.refuse_repeats(samples._dataset if samples.tensors is None else samples.tensors)
            persons.require_alike(samples._dataset, samples.tensors, lambda index: samples.read([index]))
            samples._checked = True
        return samples

    def all(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all samples, stacked."""
        return self.read(range(len(self)))

    def __len__(self) -> int:
        return len(self._dataset if self.tensors is None else self.tensors[0])

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, stacked; a range of rows of a tensor is not copied.

        Raises:
            ConfigurationError: they are not pairs, or differ in shape. What the data set itself raises passes.
        """
        if not len(indices):
            return self.first[0][:0], self.first[1][:0]
        if self.tensors is not None:
            inputs, targets = self.tensors
            rows = slice(indices.start, indices.stop) if isinstance(indices, range) else torch.as_tensor(indices)
            return inputs[rows], targets[rows]
        several = getattr(self._dataset, "__getitems__", None)
        samples = [self._dataset[index] for index in indices] if several is None else several(list(indices))
        try:
            inputs, targets = default_collate(samples)
            return torch.as_tensor(inputs), torch.as_tensor(targets)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"the samples of {type(self._dataset).__name__} are not pairs (input, target) of one shape and type: "
            f"{error}"
        )

    def parts(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order, so many at a time."""
        for start in range(0, len(self), rows):
            yield self.read(range(start, min(start + rows, len(self))))


def usual_rows(count: int, sample_rate: float) -> int:
    """Rows that hold all but one in 10⁴ draws from so many samples: four standard deviations above the mean."""
    mean = count * sample_rate
    return min(8 * math.ceil((mean + 4.0 * math.sqrt(mean * (1 - sample_rate))) / 8), count)


def checked_rows(rows: int | None, count: int, sample_rate: float) -> int:
    """A positive number of rows for draws from so many samples, by default the usual one."""
    rows = usual_rows(count, sample_rate) if rows is None else rows
    if rows < 1:
        raise ConfigurationError(f"physical_batch_size must be positive, got {rows}")
    return rows


class PoissonBatches:
    """Poisson batches of a data set held on the device, in static shapes.

    Each iteration yields one whole draw, never a part and never truncated. It is padded to
    ``physical_batch_size`` rows, so that shapes stay static for compiled steps; a draw that does not fit takes the
    next multiple (:meth:`Batch.split` cuts it into equal pieces). Empty draws are yielded like any other.

    Args:
        dataset: the whole data set, see :func:`as_tensors`; moved to the device once, of several processes each one's
            own part. They compare it, so that all of them make this together.
        sample_rate: ``q`` in (0, 1].
        steps: number of batches.
        device: where to hold the data; by default where it is.
        physical_batch_size: rows of a batch; by default four standard deviations above the mean, so that fewer
            than 1 in 10⁴ draws need a second multiple.
        seed: as in :class:`PoissonBatchSampler`.
        start: as in :class:`PoissonBatchSampler`.

    Raises:
        ConfigurationError: an argument is out of range, or the data set is empty.
        PrivacyError: a sample is in the data set more than once, see
            :func:`clipless_dp.sampling.persons.refuse_repeats`.
        RankError: the data of the ranks differs, see :func:`clipless_dp.sampling.persons.require_alike`.

    Guarantee:
        Every sample is in every batch with probability ``q``, independently; each draw is announced to the
        optimizers of this process, which charge amplification only for announced draws.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Tensor] | Samples,
        *,
        sample_rate: float,
        steps: int,
        device: torch.device | str | None = None,
        physical_batch_size: int | None = None,
        seed: int | None = None,
        start: int = 0,
    ) -> None:
        inputs, targets = Samples.to_train_on(dataset).all()
        self.sampler = PoissonBatchSampler(len(inputs), sample_rate=sample_rate, steps=steps, seed=seed, start=start)
        rank, ranks = self.sampler.world
        self._inputs = inputs[rank::ranks].to(device)
        self._targets = targets[rank::ranks].to(device)
        self.physical_batch_size = checked_rows(physical_batch_size, len(self._inputs), sample_rate)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Generator[Batch, None, None]:
        made = self.sampler.numbered()
        for indices in self.sampler.draws():
            chosen = torch.from_numpy(indices // self.sampler.world.size)
            batch = padded_batch(self._inputs, self._targets, chosen, self.physical_batch_size)
            draws.deliver(next(made), batch, len(indices))
            yield batch


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
