"""The samples of a data set, whatever form it has: the one place where data is parsed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.sampling import persons


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
    return whole("dataset_size", rows if dataset_size is None else dataset_size)


def count(dataset: Any) -> int:
    """The number of samples of a data set, none of which is read.

    Raises:
        ConfigurationError: it is empty, or two lengths differ, or it is no data set.
    """
    if isinstance(dataset, Samples):
        return len(dataset)
    try:
        pair = _pair(dataset)
        if pair is not None:
            lengths = [len(part) for part in pair]
            if len(set(lengths)) > 1 or lengths[0] == 0:
                raise ConfigurationError(
                    f"{lengths[0]} inputs and {lengths[1]} targets: need as many of each, and some"
                )
            return lengths[0]
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, (str, bytes)):
            length = len(dataset)
            if length == 0:
                raise ConfigurationError("the data set is empty")
            return length
    except TypeError as error:
        raise ConfigurationError(
            f"the data set has no length: {error}; give a pair of tensors, one row for each sample"
        ) from error
    raise ConfigurationError(
        f"expected a pair of tensors, a TensorDataset or a map-style data set, got {type(dataset).__name__}"
    )


def _pair(dataset: Any) -> Any:
    """Inputs and targets as they are held, where a data set is a pair of them."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        dataset = dataset.tensors
    if isinstance(dataset, (tuple, list)) and len(dataset) == 2 and all(hasattr(part, "shape") for part in dataset):
        return dataset
    return None


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
        count(dataset)
        pair = _pair(dataset)
        if pair is not None:
            with warnings.catch_warnings():
                # A file that is mapped for reading only: nothing here writes to it.
                warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
                inputs, targets = (torch.as_tensor(part) for part in pair)
            self.tensors = inputs, targets
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
