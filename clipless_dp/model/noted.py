"""Gradients as they were left, so that whatever else adds to one, or changes it, shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast
from weakref import ref

from torch import Tensor, nn

from clipless_dp import tensor_types
from clipless_dp.distributed import placement
from clipless_dp.errors import PrivacyError
from clipless_dp.model.turns import IN_STEP
from clipless_dp.sampling import fingerprints


class _Held(NamedTuple):
    """A gradient as the register left it."""

    gradient: ref[Tensor]
    version: int
    sample: object

    def has_values_of(self, gradient: Tensor) -> bool:
        return self.sample == fingerprints.sample(gradient, self.sample)


def is_coded(gradient: Tensor) -> bool:
    """Whether a gradient is of a type with code of its own, which would add what it likes in place of noise."""
    return type(gradient) is not Tensor and tensor_types.is_coded(type(gradient))


class Noted:
    """The gradients of parameters, each as it was noted last.

    Attributes:
        sharded: whether each process holds a part of each gradient.
    """

    def __init__(self) -> None:
        self.sharded = False
        # By the parameters' identities: what is held knows its gradient itself.
        self._held: dict[int, _Held] = {}
        self._buffers: dict[int, int] = {}

    def note(self, parameter: nn.Parameter) -> None:
        """Takes a gradient as it is."""
        gradient = parameter.grad
        assert gradient is not None
        self._held[id(parameter)] = _Held(ref(gradient), gradient._version, fingerprints.sample(gradient))
        if self.sharded:
            # Parts that were summed together lie in one buffer, and have one counter.
            part = placement.local(gradient)
            self._buffers[part.untyped_storage().data_ptr()] = part._version

    def note_all(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes the gradients of these as they are, and knows of no others."""
        self._held.clear()
        self._buffers.clear()
        for parameter in parameters:
            if parameter.grad is not None:
                self.note(parameter)

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether a gradient is the tensor that was noted, and none of torch's operations has changed it."""
        return self._is(self._held.get(id(parameter)), cast(Tensor, parameter.grad))

    def _is(self, known: _Held | None, gradient: Tensor) -> bool:
        if is_coded(gradient) or known is None or known.gradient() is not gradient:
            return False
        if known.version != gradient._version:
            return False
        if not self.sharded:
            return True
        part = placement.local(gradient)
        return self._buffers.get(part.untyped_storage().data_ptr()) == part._version

    def has_values(self, parameter: nn.Parameter) -> bool:
        """Of a gradient that is known: whether its values are those that were sampled."""
        return self._held[id(parameter)].has_values_of(cast(Tensor, parameter.grad))

    def was_added_to(self, parameter: nn.Parameter) -> bool:
        """Whether a gradient is as it was noted but for one operation, or new."""
        known, gradient = self._held.get(id(parameter)), cast(Tensor, parameter.grad)
        if known is None or known.gradient() is None:
            return True
        if self.sharded:
            part = placement.local(gradient)
            before = self._buffers.get(part.untyped_storage().data_ptr())
            return known.version == gradient._version and before in (None, part._version - 1)
        return known.version == gradient._version - 1

    def require(self, parameters: Iterable[nn.Parameter], *, values: bool) -> None:
        """Refuses gradients that are not those that were noted last, or have changed since.

        Args:
            parameters: whose gradients they are.
            values: whether code of others has run since, which may have written beneath autograd's counters.

        Raises:
            PrivacyError: one is.
        """
        if any(
            one.grad is not None and not (self.knows(one) and (not values or self.has_values(one)))
            for one in parameters
        ):
            raise PrivacyError(f"gradients were changed while a step was under way: {IN_STEP}")

    def forget(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is gone."""
        self._held.pop(id(parameter), None)

    def clear(self) -> None:
        """All are gone, or no longer known."""
        self._held.clear()

    def put_aside(self) -> dict[int, _Held]:
        """Begins anew; returns what is known, for :meth:`put_back`."""
        before, self._held = self._held, {}
        return before

    def are_as(self, before: dict[int, _Held], gradients: Mapping[int, Tensor]) -> bool:
        """Whether gradients that were put aside, by the parameters' identities, are what is known of them."""
        return all(
            self._is(before.get(key), gradient) and before[key].has_values_of(gradient)
            for key, gradient in gradients.items()
        )

    def put_back(self, before: dict[int, _Held]) -> None:
        """Knows what was put aside, and nothing else."""
        self._held = before
