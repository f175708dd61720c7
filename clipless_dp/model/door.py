"""The network runs on aliases of its parameters, by which what comes back to them passes through one door."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn

from clipless_dp.errors import PrivacyError
from clipless_dp.gates import counts_of
from clipless_dp.interrupts import UnderWay, completed

Deliver = Callable[[Sequence[Tensor | None], Sequence[Any]], list[Tensor | None]]
"""Takes gradients, and the nodes through which autograd would add them; returns those that somebody else asked for."""

Turn = Callable[[], AbstractContextManager[None]]
"""Within what it returns gradients may be delivered: a step gets none but those that it has looked at."""


class Aliases:
    """Where the parameters of a network are held, and what is there in their place for the time of a pass.

    Args:
        net: the network.

    Attributes:
        parameters: each of them once, and what gates leave their counts in.
        counts: the latter.
    """

    def __init__(self, net: nn.Module) -> None:
        found: dict[int, int] = {}
        self.parameters: list[nn.Parameter] = []
        self.counts: list[nn.Parameter] = []
        self._places: list[tuple[dict[str, Tensor | None], str, int]] = []
        for part in net.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in found:
                    found[id(parameter)] = len(self.parameters)
                    self.parameters.append(parameter)
                self._places.append((cast(Any, part._parameters), name, found[id(parameter)]))
        for held, name in filter(None, map(counts_of, net.modules())):
            self._places.append((cast(Any, held), name, len(self.parameters)))
            self.parameters.append(held[name])
            self.counts.append(held[name])
        self._swapped = False
        self._under_way: WeakSet[UnderWay] = WeakSet()
        self._aliases: list[ReferenceType[Tensor]] = []

    def running(self, deliver: Deliver, turn: Turn) -> AbstractContextManager[None]:
        """The network reads aliases within, whose gradients are delivered in turn.

        Raises:
            PrivacyError: a parameter is not where it was.
        """
        parameters = self.parameters
        if any(held.get(name) is not parameters[index] for held, name, index in self._places):
            raise PrivacyError("a parameter of model.net was removed or replaced after wrapping: wrap the network anew")
        aliases = _Door.apply(deliver, turn, *parameters) if parameters else ()  # type: ignore[no-untyped-call]
        # What is frozen stays where it is: another model may share it, and run in another thread.
        return self._holding([a if p.requires_grad else p for a, p in zip(aliases, parameters, strict=True)])

    def resting(self) -> AbstractContextManager[None]:
        """The network holds its parameters within, in the middle of a pass too."""
        return self._holding(self.parameters)

    def mend(self) -> None:
        """Puts the parameters back where a pass that was interrupted at its end has left aliases."""
        if not self._swapped or self._under_way:
            return
        aliases = {id(alias) for one in self._aliases if (alias := one()) is not None}
        for held, name, index in self._places:
            if id(held.get(name)) in aliases:
                held[name] = self.parameters[index]
        self._swapped = False

    @contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        kept, swapped, one = [held.get(name) for held, name, _ in self._places], self._swapped, UnderWay()

        def put_back() -> None:
            for (held, name, _), value in zip(self._places, kept, strict=True):
                held[name] = value
            self._swapped = swapped
            self._under_way.discard(one)

        try:
            self._under_way.add(one)
            self._aliases, self._swapped = [*map(ref, values)], True
            for held, name, index in self._places:
                held[name] = values[index]
            yield
        finally:
            completed(put_back)


class _Door(torch.autograd.Function):
    """The parameters as the network sees them; what comes back is delivered."""

    @staticmethod
    def forward(ctx: Any, deliver: Deliver, turn: Turn, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.deliver, ctx.turn = deliver, turn
        ctx.set_materialize_grads(False)
        made = tuple(parameter if parameter.requires_grad else parameter.detach() for parameter in parameters)
        # Else all that is frozen would be differentiated for nothing.
        ctx.mark_non_differentiable(*(one for one in made if not one.requires_grad))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        nodes = [node for node, _ in ctx.next_functions]
        with ctx.turn():
            return None, None, *ctx.deliver(gradients, nodes[-len(gradients) :])
