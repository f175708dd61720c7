"""The samples of a data set, whatever form it has: the one place where data is parsed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, TensorDataset, default_collate

from clipless_dp.arguments import whole
from clipless_dp.errors import CliplessError, ConfigurationError, InputError
from clipless_dp.packing import LABELS, Packing, Structure
from clipless_dp.sampling import memory, overlaps, persons, trained_on
from clipless_dp.sampling.loaders import may_reorder, refuse_other_count
from clipless_dp.sampling.people import Classes, People, spans_of
from clipless_dp.tensor_types import plain, refuse_code


def as_tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a data set, stacked.

    Args:
        dataset: see :class:`Samples`.

    Raises:
        ConfigurationError: it is empty, or the two lengths differ, its samples differ in shape, or it is none of
            these.
    """
    return Samples.of(dataset).all()


def public_size(dataset_size: int | None, rows: int, people: People | None = None) -> int:
    """The public number of samples, or of people: as it was stated, or of the data, which is then taken to be public.

    Raises:
        ConfigurationError: it is not a positive integer.
    """
    if dataset_size is None:
        dataset_size = rows if people is None else people.count
    return whole("dataset_size", dataset_size)


def count(dataset: Any) -> int:
    """The number of samples of a data set, none of which is read.

    Raises:
        ConfigurationError: it is empty, or two lengths differ, or it is no data set.
    """
    if isinstance(dataset, Samples):
        return len(dataset)
    try:
        parts = _parts(dataset)
        if parts is not None:
            lengths = [len(part) for part in parts]
            if len(set(lengths)) > 1 or lengths[0] == 0:
                raise ConfigurationError(
                    f"{lengths[0]} inputs and {lengths[-1]} targets: need as many of each, and some"
                )
            return lengths[0]
        if isinstance(dataset, (tuple, list)) and len(dataset) == 2 and all(_is_column(part) for part in dataset):
            raise ConfigurationError(
                "a pair of which at least one is no tensor or array: convert both, "
                "by torch.as_tensor or numpy.asarray, labels to whole numbers from 0"
            )
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


def _is_column(part: Any) -> bool:
    """Whether it is longer than a sample, which is a pair or a mapping: of two such, a data set of two is not meant."""
    return hasattr(part, "__len__") and not isinstance(part, Mapping) and len(part) > 3


def _parts(dataset: Any) -> list[Any] | None:
    """All inputs, and the targets, of a data set that is made of tensors; ``None`` of a map-style one."""
    if isinstance(dataset, TensorDataset):
        dataset = dataset.tensors
    if isinstance(dataset, Mapping):
        return [*dataset.values()] or None
    if not (isinstance(dataset, (tuple, list)) and len(dataset) == 2):
        return None
    inputs, targets = dataset
    if hasattr(inputs, "shape"):
        return [inputs, targets] if hasattr(targets, "shape") else None
    if isinstance(inputs, Mapping) and (hasattr(targets, "shape") or isinstance(targets, (list, tuple))):
        return [*inputs.values(), targets]
    several = isinstance(inputs, (tuple, list)) and bool(inputs) and all(hasattr(part, "shape") for part in inputs)
    return [*inputs, targets] if several and hasattr(targets, "shape") else None


class Samples:
    """The samples of a data set, by number; nothing but the first one is read until it is asked for.

    A sample is a pair of inputs and target. Its inputs are one tensor; or several, by name or in order, which are
    packed into one row (:class:`clipless_dp.packing.Packing`), as a model of several inputs takes them.

    Args:
        dataset: one of

            * a pair of inputs and targets: tensors or arrays, the inputs also a mapping or a sequence of them;
            * a mapping of tensors, arrays or lists of numbers with the targets among them, as tokenizers return it;
            * a ``TensorDataset`` of inputs, one or several in order, and of targets, which come last;
            * a map-style data set, a list say, of pairs of input and target, whose inputs may be mappings or sequences,
              or of mappings with the target among them, as data sets of Hugging Face are.

            Arrays may be memory-mapped files, of which no more is read than the rows asked for. A map-style data set is
            asked for several samples at once, by ``__getitems__``, where it can.
        packing: how several inputs lie in a row: ``model.packing``. ``None``: as they come, names in order; an only one
            stays as it is.
        labels: what the targets are called among the inputs; by default ``labels`` or ``label``.

    Raises:
        ConfigurationError: it is empty, or no data set, or its first sample is not a pair.
        InputError: the inputs are not those of the packing.

    Attributes:
        tensors: inputs, one or several, and targets, where the data set is made of tensors, else ``None``.
        packing: how inputs lie in a row; ``None`` of one.
        first: input and target of the first sample, with a batch axis of length one.
    """

    def __init__(self, dataset: Any, packing: Packing | None = None, *, labels: str | None = None) -> None:
        self.tensors: tuple[Tensor, ...] | None = None
        self.packing = packing
        self._labels = labels
        self._names: tuple[str, ...] | None = None
        self._checked = False
        self._people: People | None = None
        self._dataset = dataset
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
            dataset = self._dataset = dataset.tensors
        elif isinstance(dataset, TensorDataset) and len(dataset.tensors) > 2:
            dataset = self._dataset = [*dataset.tensors[:-1]], dataset.tensors[-1]
        given = self._held_by(dataset)
        if given is not None:
            self._take(*given)
        else:
            count(dataset)
        try:
            self.first = self.read(range(1))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise error if isinstance(error, CliplessError) else self._refused(error) from error

    @classmethod
    def of(cls, dataset: Any, packing: Packing | None = None) -> Samples:
        """The samples of a data set, or these themselves, packed for a model.

        Args:
            dataset: see the constructor.
            packing: ``model.packing``.
        """
        if not isinstance(dataset, Samples):
            return cls(dataset, packing)
        if packing is None or packing == dataset.packing or not dataset.is_structured:
            return dataset
        packed = cls(dataset._dataset, packing, labels=dataset._labels)
        packed._checked, packed._people = dataset._checked, dataset._people
        return packed

    @classmethod
    def to_train_on(cls, dataset: Any, packing: Packing | None = None, people: People | None = None) -> Samples:
        """The samples of a data set in which each is there once, and that all ranks hold alike.

        Args:
            dataset: see the constructor.
            packing: ``model.packing``.
            people: whose samples are, if the unit is a person: what is one person's may overlap.

        Raises:
            ConfigurationError: as the constructor does.
            InputError: as the constructor does.
            PrivacyError: a sample is there more than once, see :func:`clipless_dp.sampling.persons.refuse_repeats`.
            RankError: the data of the ranks differs, see :func:`clipless_dp.sampling.persons.require_alike`.
        """
        samples = cls.of(dataset, packing)
        if not samples._checked or (samples._people is not None and samples._people is not people):
            if samples.tensors is None:
                persons.refuse_repeats(samples._dataset, people)
            else:
                persons.refuse_repeated_columns(*samples._columns(), people)
                overlaps.refuse_overlapping_columns(samples.tensors[:-1], samples.tensors[-1:], people)
            persons.require_alike(samples._dataset, samples.tensors, lambda index: samples.read([index]))
            samples._checked, samples._people = True, people
            trained_on.note(samples._dataset, samples.tensors or (), samples.first)
        return samples

    @property
    def is_structured(self) -> bool:
        """Whether the data set has mappings or sequences for inputs."""
        return self._structured

    def all(self, *, in_order: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all samples, stacked.

        Args:
            in_order: whether it matters which row is which sample: where rows have ids beside them. Then a map-style
                data set whose own ``__getitems__`` may return another order is read one sample at a time.
        """
        return self.read(range(len(self)), in_order=in_order)

    def __len__(self) -> int:
        return len(self._dataset if self.tensors is None else self.tensors[-1])

    def read(self, indices: Sequence[int], *, in_order: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, stacked; a range of rows of a tensor is not copied.

        Args:
            indices: which ones.
            in_order: as of :meth:`all`.

        Raises:
            ConfigurationError: they are not pairs, or differ in shape, or are more or fewer than were asked for. What
                the data set itself raises passes.
            InputError: their inputs are not those that they are packed for.
        """
        if not len(indices):
            return self.first[0][:0], self.first[1][:0]
        if self.tensors is not None:
            rows = slice(indices.start, indices.stop) if isinstance(indices, range) else torch.as_tensor(indices)
            *inputs, targets = (part[rows] for part in self.tensors)
            if not self._structured:
                return inputs[0], targets
            return self._packed(inputs if self._names is None else dict(zip(self._names, inputs, strict=True))), targets
        at_once = getattr(self._dataset, "__getitems__", None) is not None
        # Copies, since a data set may read each sample into the memory of the one before.
        if not at_once or (in_order and may_reorder(self._dataset)):
            samples = self._read_alone(indices)
        else:
            samples = self._fetched(indices)
            if memory.lie_together(samples):
                samples = [memory.copied(sample) for index in indices for sample in self._fetched([index])]
            elif self._checked:
                beside = overlaps.Beside(len(self))
                for index, sample in zip(indices, islice(samples, overlaps.AT_ONCE), strict=False):
                    beside.add(sample, self._owner(index))
                beside.refuse_overlap()
        try:
            inputs, targets = self._collated(samples)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise error if isinstance(error, CliplessError) else self._refused(error) from error
        return (self._packed(inputs) if self._structured else torch.as_tensor(inputs)), torch.as_tensor(targets)

    def _read_alone(self, indices: Sequence[int]) -> list[Any]:
        """Copies of samples, read one by one, the first of which are seen not to lie on one another."""
        beside, samples = overlaps.Beside(len(self)), []
        for index in indices:
            sample = self._dataset[index]
            beside.add(sample, self._owner(index))
            samples.append(memory.copied(sample))
        if self._checked:
            beside.refuse_overlap()
        return samples

    def _owner(self, index: int) -> int | None:
        return None if self._people is None else int(self._people.codes[index])

    def _fetched(self, indices: Sequence[int]) -> Any:
        """What the data set returns for several indices at once, one sample for each."""
        samples = self._dataset.__getitems__(list(indices))
        refuse_other_count(samples, len(indices))
        return samples

    def read_apart(self, indices: Sequence[int], classes: Classes) -> tuple[Tensor, Tensor]:
        """As :meth:`read`, each class of weights by a call of its own: in whatever order a data set's ``__getitems__``
        returns the samples of one call, each weighs what it was drawn with.

        Raises:
            ConfigurationError: as :meth:`read`, or there are more or fewer samples than were asked for.
        """
        if self.tensors is not None or len(classes) < 2:
            return self.read(indices)
        inputs, targets = zip(*(self.read(indices[start:stop]) for start, stop in spans_of(classes)), strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def parts(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order, so many at a time."""
        for start in range(0, len(self), rows):
            yield self.read(range(start, min(start + rows, len(self))))

    def as_pairs(self) -> Dataset[Any]:
        """The samples as a map-style data set of pairs of tensors, packed."""
        return _Pairs(self)

    def _held_by(self, dataset: Any) -> tuple[Any, Any] | None:
        """Inputs and targets of a data set that is made of tensors; ``None`` of a map-style one."""
        self._structured = False
        if isinstance(dataset, Mapping) and all(isinstance(name, str) for name in dataset):
            self._structured = True
            return self._apart(dataset)
        if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
            return None
        inputs, targets = dataset
        if hasattr(inputs, "shape"):
            return (inputs, targets) if hasattr(targets, "shape") else None
        if isinstance(inputs, Mapping):
            fits = hasattr(targets, "shape") or isinstance(targets, (list, tuple))
        else:
            several = isinstance(inputs, (tuple, list)) and all(hasattr(part, "shape") for part in inputs)
            fits = several and bool(inputs) and hasattr(targets, "shape") and len(targets.shape) > 0
        self._structured = fits
        return (inputs, targets) if fits else None

    def _take(self, inputs: Any, targets: Any) -> None:
        """Keeps the data as tensors, which share the memory of arrays."""
        parts = inputs if self._structured else [inputs]
        if isinstance(parts, Mapping):
            self._names = tuple(map(str, parts))
            parts = [*parts.values()]
        with warnings.catch_warnings():
            # A file that is mapped for reading only: nothing here writes to it.
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            names = self._names or range(len(parts))
            tensors = [_as_tensor(name, part) for name, part in zip(names, parts, strict=True)]
            self.tensors = (*tensors, _as_tensor("targets", targets))
        counts = [len(part) if part.dim() else 0 for part in self.tensors]
        if len({*counts}) > 1 or counts[0] == 0:
            if len(counts) == 2:
                counted = f"{counts[0]} inputs"
            else:
                listed = zip(names, counts, strict=False)
                counted = ", ".join(f"{count} of the input {name!r}" for name, count in listed)
            raise ConfigurationError(f"{counted} and {counts[-1]} targets: need as many of each, and some")

    def _columns(self) -> tuple[list[Any], Any]:
        """Inputs and targets of a data set that is made of tensors, as they were given."""
        inputs, targets = self._apart(self._dataset) if isinstance(self._dataset, Mapping) else self._dataset
        columns = [*inputs.values()] if isinstance(inputs, Mapping) else [*inputs] if self._structured else [inputs]
        return columns, targets

    def _apart(self, sample: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The inputs in a mapping, and the targets among them."""
        names = (self._labels,) if self._labels is not None else LABELS
        label = next((name for name in names if name in sample), None)
        if label is None:
            raise ConfigurationError(
                f"{' or '.join(map(repr, names))} is not among {[*sample]}: name the targets by "
                "Samples(dataset, labels='...'), or give pairs of inputs and targets"
            )
        return {name: value for name, value in sample.items() if name != label}, sample[label]

    def _collated(self, samples: Any) -> tuple[Any, Any]:
        """Inputs and targets of some samples of a map-style data set, each stacked."""
        first = samples[0]
        if isinstance(first, Mapping):
            self._structured = True
            inputs, targets = zip(*(self._apart(sample) for sample in samples), strict=True)
            return _stacked(inputs), _column("targets", targets)
        if isinstance(first, (tuple, list)) and len(first) == 2 and isinstance(first[0], (Mapping, tuple, list)):
            numbers = isinstance(first[0], (tuple, list)) and not any(hasattr(part, "shape") for part in first[0])
            inputs, targets = zip(*samples, strict=True)
            if numbers:
                return _column("inputs", inputs), _column("targets", targets)
            self._structured = True
            return _stacked(inputs), _column("targets", targets)
        for part in tree_leaves(samples):
            if isinstance(part, Tensor):
                refuse_code(part, "a tensor of a sample")
        inputs, targets = default_collate(samples)
        return inputs, targets

    def _packed(self, inputs: Structure) -> Tensor:
        if self.packing is None:
            values = [*inputs.values()] if isinstance(inputs, Mapping) else [*inputs]
            if len(values) == 1:
                return values[0]
            self.packing = Packing.of(inputs)
        return self.packing.pack(inputs)

    def _refused(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"the samples of {type(self._dataset).__name__} are not pairs (input, target) of one shape and type: "
            f"{error}"
        )


class _Pairs(Dataset[Any]):
    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        (pair,) = self.__getitems__([index])
        return pair

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*self._samples.read(indices), strict=True))


def _stacked(samples: Sequence[Any]) -> Structure:
    """Mappings or sequences of values as one of stacked values."""
    first = samples[0]
    if isinstance(first, Mapping):
        other = next((sample for sample in samples if {*sample} != {*first}), None)
        if other is not None:
            differing = sorted(map(str, {*other} ^ {*first}))
            raise InputError(f"the input {differing[0]!r} is there in some samples, and missing in others")
        return {name: _column(name, [sample[name] for sample in samples]) for name in first}
    return [_column(place, column) for place, column in enumerate(zip(*samples, strict=True))]


def _column(name: object, values: Sequence[Any]) -> Tensor:
    """One value of each sample, stacked."""
    tensors = [_as_tensor(name, value) for value in values]
    shapes = {tuple(value.shape) for value in tensors}
    if len(shapes) > 1:
        raise InputError(
            f"{name!r} has the shapes {', '.join(map(str, sorted(shapes)))} in different samples: give all samples one "
            "shape; pad sequences to one length, with a mask"
        )
    return torch.stack(tensors)


def _as_tensor(name: object, value: Any) -> Tensor:
    """A tensor, an array or numbers as a tensor."""
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise InputError(f"{name!r} is masked, and a tensor would hold what is under the mask: fill it")
        value = value.data
    if isinstance(value, Tensor):
        return plain(value, "the target" if name == "targets" else f"the input {name!r}")
    try:
        if isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape"):
            return torch.stack([_as_tensor(name, part) for part in value])
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name!r} holds what is no tensor of numbers ({type(value).__name__}: {error}): leave it out of the data "
            "set, e.g. by remove_columns, or pad its sequences to one length"
        ) from error
