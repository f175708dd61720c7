"""Whether code that runs a second time does what it did the first time, call by call."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from clipless_dp.errors import PrivacyError
from clipless_dp.modules import parts_of

ELSEWHERE = (
    "a part of the network that is computed again (torch.utils.checkpoint) reads a value of the sample from elsewhere "
    "than its arguments, an object or a function within a function say: hand it over as an argument, by itself or in a "
    "tuple, list or dict"
)
_CHANGED = (
    "a part of the network that torch.utils.checkpoint computes again does not do the same as the first time: {}. What "
    "it reads (buffers, attributes, counters, other tensors and numbers) must stay as it is between a forward pass and "
    "its backward pass: change it between steps, or leave checkpointing out there"
)
_EXACT, _COLUMNS, _ODD = 1 << 16, 1 << 10, -7046029254386353131


def changed(how: str) -> PrivacyError:
    """The error of a part that does something else the second time, given what."""
    return PrivacyError(_CHANGED.format(how))


class Calls:
    """The calls of one run that are handed values of a sample or parameters, or make such values, in their order.

    Of a call are noted the function, whether gradients are on, and of its arguments the numbers; of values of the
    sample, which input or which result of an earlier call they are; of parameters their names; of other tensors the
    bits. So a second run whose calls are the same computes the same of the same inputs, wherever its code got the rest
    from.

    Args:
        name_of: the parameter that a tensor stands for, or ``None``.
        inputs: the values of the sample that the code is given.
        first: the calls that these must repeat, if it is the second run.
    """

    def __init__(self, name_of: Callable[[Any], str | None], inputs: Iterable[Tensor], first: Calls | None) -> None:
        self._name_of, self._first = name_of, first
        self._calls: list[tuple[Any, Any]] = []
        # Not by id alone: another tensor may come to lie where one was.
        self._places: dict[int, tuple[ref[Tensor], int]] = {}
        self._count = 0
        self._number(inputs)

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Notes a call, once it has returned.

        Raises:
            PrivacyError: it is handed a value of a sample that is not of this run, or is not the call of the first run.
        """
        made = [value for value in _tensors(result) if is_functorch_wrapped_tensor(value)]
        read = [*_tensors(args), *_tensors(kwargs)]
        if made or any(is_functorch_wrapped_tensor(value) or self._name_of(value) is not None for value in read):
            self._add((func, (self._described(args), self._described(kwargs), torch.is_grad_enabled())))
        self._number(made)

    def finish(self) -> None:
        """Ends a second run.

        Raises:
            PrivacyError: the first one went on.
        """
        if self._first is not None and len(self._calls) < len(self._first._calls):
            raise changed(f"it calls fewer functions, not {_told(self._first._calls[len(self._calls)][0])}")

    def _add(self, call: tuple[Any, Any]) -> None:
        place = len(self._calls)
        self._calls.append(call)
        if self._first is None:
            return
        if place >= len(self._first._calls):
            raise changed(f"it calls more functions, {_told(call[0])}")
        function, given = self._first._calls[place]
        if function != call[0]:
            raise changed(f"it calls {_told(call[0])} instead of {_told(function)}")
        if given != call[1]:
            raise changed(f"it calls {_told(function)} otherwise (other numbers or tensors, or without gradients)")

    def _number(self, values: Iterable[Tensor]) -> None:
        for value in values:
            self._places[id(value)] = ref(value), self._count
            self._count += 1

    def _described(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            name = self._name_of(value)
            if name is not None:
                return "parameter", name
            if not is_functorch_wrapped_tensor(value):
                return "constant", _bits(value)
            known = self._places.get(id(value))
            if known is None or known[0]() is not value:
                raise PrivacyError(ELSEWHERE)
            return "value", known[1]
        if isinstance(value, (list, tuple)):
            return kind, tuple(map(self._described, value))
        if isinstance(value, Mapping):
            return kind, tuple((name, self._described(entry)) for name, entry in value.items())
        if isinstance(value, slice):
            return kind, tuple(map(self._described, (value.start, value.stop, value.step)))
        # Of numpy's arrays and numbers all bits; a float's text is exact, and NaN is itself in it.
        return kind, value.tobytes() if hasattr(kind, "tobytes") else repr(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _bits(value: Tensor) -> Any:
    """Tells a tensor that all samples share from others, by what it holds: a hash of 128 bits.

    Of all bytes on a CPU, and up to 64 KiB elsewhere. Above, of sums over the rows and the columns of a table of the
    bytes, 8 of them as an integer, modulo 2⁶⁴, so that no more than these is read from an accelerator: in each row bits
    are mixed, and columns weighed by odd numbers, so that the order shows. Of a sparse tensor those that it is made of.
    """
    about = value.dtype, value.device, value.layout, tuple(value.shape)
    if value.device.type == "meta":
        return about
    with torch.no_grad():
        told = [part for one in parts_of(value.detach()) for part in _summary(one)]
    return *about, hashlib.blake2b(b"".join(part.cpu().numpy().tobytes() for part in told), digest_size=16).digest()


def _summary(value: Tensor) -> list[Tensor]:
    flat = value.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.device.type == "cpu" or flat.element_size() * flat.numel() <= _EXACT:
        return [flat.view(torch.uint8)]
    if flat.element_size() * flat.storage_offset() % 8:
        flat = flat.clone()
    return _sums(flat.view(torch.uint8))


def _sums(octets: Tensor) -> list[Tensor]:
    size = 8 * _COLUMNS
    whole = len(octets) - len(octets) % size
    table = octets[:whole].view(torch.int64).view(-1, _COLUMNS)
    # Numbers such as 1.0 have zeros below, which a product would leave there.
    mixed = (table ^ (table >> 32)) * _ODD
    mixed = (mixed ^ (mixed >> 29)) * ((2 * torch.arange(_COLUMNS, device=octets.device) + 1) * _ODD)
    return [table.sum(0), mixed.sum(1), octets[whole:]]


def _told(function: Any) -> str:
    return str(getattr(function, "__name__", function))
