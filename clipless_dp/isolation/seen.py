"""Which values are of a run of a network, and which come from elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, maybe_get_level
from torch.nn import Parameter

from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.hidden import UNWRAPPED, acts, runs_own_code

_PLAIN = {type(None), bool, int, float, str, slice, type(...), torch.dtype, torch.device, torch.Size}
_CODED = (
    "{} runs code of its own behind torch.func.vmap, which may see all samples at once: write it in functions of "
    "torch; of a tensor type (__torch_dispatch__) take its values as a plain tensor"
)


class Memory:
    """The memory that values of all samples lie in, while a run lasts.

    Whoever unwraps a value, by whatever name, gets a tensor in its memory, so that the first function that is given it
    tells. Told apart by their storages, not by addresses: weak references keep the former from being used again, while
    the memory itself is freed as ever.
    """

    def __init__(self) -> None:
        self._held: set[int] = set()

    def add(self, value: Tensor) -> None:
        """Notes the memory of a value of all samples."""
        storage = _storage(value)
        if storage is not None and storage._cdata not in self._held:
            self._held.add(cast(Any, storage)._weak_ref())

    def holds(self, value: Tensor) -> bool:
        """Whether a tensor lies in memory that was noted."""
        storage = _storage(value)
        return storage is not None and storage._cdata in self._held

    def __del__(self) -> None:
        for held in self._held:
            torch.UntypedStorage._free_weak_ref(held)


def _storage(value: Tensor) -> torch.UntypedStorage | None:
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value.untyped_storage() if value.layout == torch.strided else None


def _share(first: Tensor, second: Tensor) -> bool:
    one, other = _storage(first), _storage(second)
    return one is not None and other is not None and one._cdata == other._cdata


class Seen:
    """The values of one run on one sample, by what the run is given and what its functions return.

    Args:
        sample: differs from sample to sample.
        called: the names of parameters, and of what stands for them, by ``id``.
        shared: what samples share: copies of it for each of them lie in its memory.
    """

    def __init__(self, sample: Tensor, called: Mapping[int, str], shared: Collection[Tensor]) -> None:
        self._called, self._shared = called, shared
        self._level = maybe_get_level(sample)
        # Not by id alone: another tensor may come to lie where one was.
        self._values: dict[int, ref[Tensor]] = {}
        self._constants: dict[int, ref[Tensor]] = {}
        self._memory = Memory()
        self.admit([sample])

    def admit(self, values: Iterable[Tensor]) -> None:
        """These may be read in this run, as all that comes of them may."""
        for value in values:
            self._values[id(value)] = ref(value)
            self._memory.add(value)

    def note(self, result: Any) -> None:
        """Admits what a function has returned: values of this sample, and constants that are made in the run."""
        if isinstance(result, Tensor):
            kind = type(result)
            if kind is not Tensor and kind is not Parameter and runs_own_code(kind):
                raise PrivacyError(_CODED.format(kind.__name__))
            if is_batchedtensor(result):
                if maybe_get_level(result) == self._level:
                    self._values[id(result)] = ref(result)
                    self._memory.add(result)
            else:
                self._constants[id(result)] = ref(result)
        elif isinstance(result, (list, tuple)):
            for value in result:
                self.note(value)

    def knows(self, value: Tensor) -> bool:
        """Whether a value, no parameter, is of this run, or was read in it."""
        known = [held[id(value)]() for held in (self._values, self._constants) if id(value) in held]
        return id(value) not in self._called and any(found is value for found in known)

    def refuse_strangers(self, values: Iterable[Any]) -> None:
        """Refuses arguments that are not of this run, or that see more than one sample of it.

        Raises:
            PrivacyError: they are.
        """
        for value in values:
            if type(value) in _PLAIN:
                continue
            if isinstance(value, Tensor):
                known = self._values.get(id(value))
                if known is None or known() is not value:
                    self._refuse_stranger(value)
            elif type(value) in (list, tuple):
                self.refuse_strangers(value)
            elif isinstance(value, torch.Generator):
                raise PrivacyError(
                    "the network draws from a generator of its own, whose numbers a sample gets by its place in the "
                    "batch: leave generator= out"
                )
            elif isinstance(value, type):
                if runs_own_code(value):
                    raise PrivacyError(_CODED.format(value.__name__))
            elif callable(value):
                raise PrivacyError(
                    f"a function of torch is handed code to call ({value!r}), which runs unseen: call it directly"
                )
            elif acts(type(value)):  # type: ignore[arg-type]
                raise PrivacyError(
                    f"a function of torch is handed a {type(value).__name__}, whose own code it runs unseen: hand it "
                    "plain numbers, lists and tuples"
                )
            elif isinstance(value, (list, tuple)):
                self.refuse_strangers(value)

    def _refuse_stranger(self, value: Tensor) -> None:
        known = self._constants.get(id(value))
        if known is not None and known() is value:
            return
        kind = type(value)
        if kind is not Tensor and kind is not Parameter and runs_own_code(kind):
            raise PrivacyError(_CODED.format(kind.__name__))
        if id(value) in self._called:
            return
        if is_functorch_wrapped_tensor(value):
            raise PrivacyError(
                "the network reads a value that is not of this pass and sample: one that it kept of an earlier pass, "
                "or one within a transform (torch.func.vmap, grad). Keep nothing, and use functions of torch"
            )
        if self._memory.holds(value) and not any(_share(value, one) for one in self._shared):
            raise PrivacyError(UNWRAPPED)
        self._constants[id(value)] = ref(value)

    def alive_besides(self, ids: Collection[int]) -> bool:
        """Whether a value of the run is held by anything, but these."""
        return any((value := made()) is not None and id(value) not in ids for made in self._values.values())
