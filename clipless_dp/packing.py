"""Several tensors of a sample as one row: so that whatever handles samples, handles one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.tensor_types import plain

Structure = Mapping[str, Tensor] | Sequence[Tensor]
"""The inputs of a network: by name, or in order; each ``(B, ...)``."""

LABELS = ("labels", "label")
"""What targets are called among the inputs, if nothing else is said."""

_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


@dataclass(frozen=True)
class Field:
    """One tensor of a sample.

    Attributes:
        name: how the network calls it; ``None`` of inputs in order.
        shape: without the batch axis.
        dtype: its own; a floating one stands for the network's.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Packing:
    """How the tensors of a sample lie in one row, ``(B, entries)``.

    Rows are ``int64`` where all tensors hold integers or truth values; else of the floating dtype, in which integers
    are exact up to ``2^24`` (``2^53`` in float64). Tensors with names lie in the order of these.

    Attributes:
        fields: the tensors.
    """

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, shapes: Any) -> Packing:
        """The packing of a structure of shapes.

        Args:
            shapes: a mapping from names, or a sequence; each entry a shape, a pair of shape and dtype, or a tensor
                ``(B, ...)`` of which shape and dtype are read. Without a dtype it is that of the network.

        Raises:
            ConfigurationError: an entry is none of these, or of a dtype that rows do not hold.
        """
        pairs = sorted(shapes.items()) if isinstance(shapes, Mapping) else [(None, entry) for entry in shapes]
        if not pairs or not all(name is None or isinstance(name, str) for name, _ in pairs):
            raise ConfigurationError(f"expected the shapes of a network's inputs, by name or in order, got {shapes!r}")
        return cls(tuple(_field(name, entry) for name, entry in pairs))

    @property
    def entries(self) -> int:
        """The length of a row."""
        return sum(field.entries for field in self.fields)

    @property
    def is_named(self) -> bool:
        """Whether the network is called with names."""
        return self.fields[0].name is not None

    @property
    def is_integral(self) -> bool:
        """Whether rows are integers."""
        return not any(field.dtype.is_floating_point for field in self.fields)

    def has(self, name: str) -> bool:
        """Whether an input is called so."""
        return any(field.name == name for field in self.fields)

    def is_single(self, values: Tensor) -> bool:
        """Whether these are the batch of the only input, in its own shape, which is no row."""
        shape = tuple(values.shape[1:])
        return len(self.fields) == 1 and values.dim() != 2 and shape == self.fields[0].shape

    def pack(self, batch: Structure) -> Tensor:
        """The rows of a batch, ``(B, entries)``.

        Raises:
            InputError: a tensor is missing or unknown, its shape or dtype is another one, the batch axes or devices
                differ, or an integer is too large to be exact.
        """
        return self.packed(self.ordered(batch))

    def packed(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows of the tensors of a batch in the order of :attr:`fields`; as :meth:`pack`."""
        size = tensors[0].shape[:1]
        floating = next((value.dtype for value in tensors if value.is_floating_point()), torch.int64)
        rows = []
        for index, (field, value) in enumerate(zip(self.fields, tensors, strict=True)):
            label = f"the input {index if field.name is None else repr(field.name)}"
            if value.shape[1:] != field.shape or value.shape[:1] != size:
                raise InputError(
                    f"{label} is {tuple(value.shape)}, expected {(*size, *field.shape)}: all samples, and all batches, "
                    "must have the shape that the model was wrapped for. Pad sequences to one length"
                )
            if value.is_floating_point() != field.dtype.is_floating_point or value.is_complex():
                raise InputError(f"{label} is {value.dtype}, expected {field.dtype}: convert it in the data set")
            if value.is_floating_point() and value.dtype != floating:
                raise InputError(f"{label} is {value.dtype}, and another one {floating}: convert them to one dtype")
            if value.device != tensors[0].device:
                raise InputError(f"{label} is on {value.device}, and another one on {tensors[0].device}")
            if floating.is_floating_point and not value.is_floating_point():
                self._refuse_inexact(label, value, floating)
            rows.append(value.reshape(len(value), field.entries).to(floating))
        return torch.cat(rows, 1)

    @staticmethod
    def _refuse_inexact(label: str, value: Tensor, floating: torch.dtype) -> None:
        exact = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11}.get(floating, 2**8)
        if value.numel() and value.dtype != torch.bool and int(value.abs().max()) > exact:
            raise InputError(f"{label} holds integers above {exact}, which {floating} does not hold exactly")

    def without_labels(self, batch: Structure) -> Structure:
        """A batch without its targets, where these have one of the usual names and are no input."""
        if not isinstance(batch, Mapping):
            return batch
        inputs = {field.name for field in self.fields}
        return {name: value for name, value in batch.items() if name in inputs or name not in LABELS}

    def ordered(self, batch: Structure) -> list[Tensor]:
        """The tensors of a batch in the order of :attr:`fields`.

        Raises:
            InputError: one is missing or unknown, or is no tensor with a batch axis.
        """
        if isinstance(batch, Mapping) != self.is_named or isinstance(batch, (str, Tensor)):
            how = "by name, in a mapping" if self.is_named else "in order, in a tuple or a list"
            raise InputError(f"expected the inputs {self.described()}, {how}, got {type(batch).__name__}")
        if isinstance(batch, Mapping):
            names = [cast(str, field.name) for field in self.fields]
            missing = [name for name in names if name not in batch]
            unknown = [name for name in batch if name not in names]
            if missing:
                raise InputError(f"the input {missing[0]!r} is missing: expected {self.described()}, got {[*batch]}")
            if unknown:
                raise InputError(
                    f"{unknown[0]!r} is no input of the model, which takes {self.described()}: leave it out of the "
                    "batch, or name it in input_shape"
                )
            found: list[Any] = [batch[name] for name in names]
        else:
            found = list(batch)
            if len(found) != len(self.fields):
                raise InputError(f"expected {len(self.fields)} inputs, {self.described()}, got {len(found)}")
        tensors = []
        for field, value in zip(self.fields, found, strict=True):
            label = "an input" if field.name is None else f"the input {field.name!r}"
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise InputError(f"{label} must be a tensor with a batch axis, got {type(value).__name__}")
            tensors.append(plain(value, label))
        return tensors

    def unpack(self, rows: Tensor) -> list[Tensor]:
        """The tensors of some rows, ``(..., entries)``, in the order of :attr:`fields`."""
        parts = rows.split([field.entries for field in self.fields], -1)
        return [
            part.reshape(*rows.shape[:-1], *field.shape).to(
                rows.dtype if field.dtype.is_floating_point else field.dtype
            )
            for field, part in zip(self.fields, parts, strict=True)
        ]

    def structured(self, rows: Tensor) -> Structure:
        """Some rows as the network's inputs, by name or in order: what :meth:`pack` made them of."""
        places, names = self.call(self.unpack(rows))
        return names if self.is_named else places

    def call(self, values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The arguments that a network is called with, by place and by name."""
        if not self.is_named:
            return tuple(values), {}
        return (), {cast(str, field.name): value for field, value in zip(self.fields, values, strict=True)}

    def described(self) -> str:
        """For messages."""
        return ", ".join(
            f"{field.name or index}: {field.dtype} (batch, {', '.join(map(str, field.shape))})"
            for index, field in enumerate(self.fields)
        )


def _field(name: str | None, entry: Any) -> Field:
    dtype = torch.get_default_dtype()
    shape = entry
    if isinstance(entry, Tensor) and entry.dim() > 0:
        shape, dtype = tuple(entry.shape[1:]), entry.dtype
    elif isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[1], torch.dtype):
        shape, dtype = entry
    if not (isinstance(shape, (tuple, list)) and all(type(size) is int and size > 0 for size in shape)):
        raise ConfigurationError(
            f"the input {name or ''} needs a shape without the batch axis, such as (128,), a pair ((128,), "
            f"torch.int64), or an example tensor, got {entry!r}"
        )
    if not (dtype.is_floating_point or dtype in _INTEGERS):
        raise ConfigurationError(
            f"the input {name!r} is {dtype}, which rows do not hold: convert it, unsigned integers to torch.int64, "
            "complex numbers by torch.view_as_real"
        )
    return Field(name, tuple(shape), dtype)
