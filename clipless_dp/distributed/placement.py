"""Where a model is: in how many processes, and which part of it each of them holds.

Model, optimizer, bounds and training loop ask one :class:`Placement` and go on alike, whatever it answers. With one
process all answers are trivial: all weights are here, there is nobody to compare with, and noise is added in place.

A model has a placement when it is wrapped (:func:`of`) and another one once ``fully_shard`` was called on it. An
optimizer finds it anew (:func:`joined`), together with the processes that are there by then; these may not change
behind it. What has no model (samplers, statistics) asks for the processes alone: :func:`world`, :func:`agree` and
others, which are as trivial in one process.
"""

# Methods are documented in the base, not again in each of its subclasses.
# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn

from clipless_dp.distributed import ranks, replicated, shards, stretches
from clipless_dp.distributed.ranks import World, agree, from_first, gathered, on_any, total, world
from clipless_dp.distributed.replicated import refuse_averages
from clipless_dp.distributed.shards import local
from clipless_dp.distributed.units import has_shards, hooks_of_sharding, is_sharded, refuse_shards, reshard_
from clipless_dp.errors import PrivacyError, RankError
from clipless_dp.noise.adding import add_normal_
from clipless_dp.noise.sources import NoiseSource

__all__ = [
    "Change",
    "OneProcess",
    "Placement",
    "Replicated",
    "Sharded",
    "World",
    "agree",
    "from_first",
    "gathered",
    "hooks_of_sharding",
    "joined",
    "local",
    "of",
    "on_any",
    "refuse_averages",
    "refuse_shards",
    "total",
    "world",
]

Value = TypeVar("Value")


class Change(NamedTuple):
    """A function with the tensors that it takes, of which it changes the first in place; and a parameter's name."""

    name: str
    function: Callable[..., object]
    tensors: Sequence[Tensor]


class Placement:
    """Where a model is, and what follows from that: here, of one process that holds all weights.

    Attributes:
        world: this process among those that train the model together.
        is_whole: whether each of them holds all weights.
    """

    world = World(0, 1)
    is_whole = True

    # Weights.

    def held(self, parameter: Tensor, /) -> Tensor:
        """What this process holds of a parameter."""
        return parameter

    def whole(self, tensor: Tensor, /) -> Tensor:
        """All of a tensor. Processes that hold parts call it together."""
        return tensor

    def on_any_part(self, conditions: Sequence[bool], /) -> Sequence[bool]:
        """Of each condition, whether it holds in any process that holds a part of the weights."""
        return conditions

    def change_(self, changes: Sequence[Change], changed: Callable[[str], None] | None = None) -> None:
        """Changes tensors as wholes; ``changed`` is told the name of each before another is touched, if that may be.

        Raises:
            RankError: a function failed in another process, whose own error says why, or another process is gone.
        """
        for name, function, tensors in changes:
            function(*tensors)
            if changed is not None:
                changed(name)

    # Passes.

    def check(self, net: nn.Module, unknown: bool) -> bool:
        """Makes sure that the weights are where this says.

        Args:
            net: the network.
            unknown: whether it has other parameters than those that it was wrapped with.

        Returns:
            Whether these are the ones that it was wrapped with, in parts, and are to be known by them.

        Raises:
            ConfigurationError: they are not where they may be.
        """
        if unknown and has_shards(net):
            shards.refuse_partly_sharded()
        return False

    def reshard_(self) -> None:
        """Gives back what passes without a backward pass have left of the weights of others."""

    def opened(self, graph: fx.GraphModule) -> nn.Module | None:
        """What a pass that begins runs in place of the graph as the model has prepared it; ``None``: the latter.

        Raises:
            ConfigurationError: the weights are split in a way that the graph cannot follow.
        """
        return None

    def passing(self, count: int) -> AbstractContextManager[int]:
        """For so many forward and backward passes: yields how many are to be made, the last of them over no rows.

        Raises:
            RankError: another process is gone.
        """
        return nullcontext(count)

    # Steps.

    def join(self, fields: Mapping[str, object], settle: Callable[[], None]) -> None:
        """Makes sure that the processes train one model in one way, from the weights of the first.

        Args:
            fields: what must be the same in all of them.
            settle: called where weights were overwritten.

        Raises:
            RankError: something differs, or another process is gone.
        """

    def require_ready(self) -> None:
        """Makes sure that a step may be taken.

        Raises:
            PrivacyError: there are other processes than before, or gradients are not the sums that noise is for.
            RankError: a step has failed.
        """
        require_same(self.world)

    def release_(
        self,
        gradients: Sequence[Tensor],
        deviations: Sequence[float],
        source: NoiseSource,
        factor: float,
        *,
        step: int,
        ledger: Callable[[], Sequence[object]],
        weights: Callable[[], object],
    ) -> None:
        """Replaces summed gradients by the noisy sums over all processes, times a factor; the same bits in each.

        Args:
            gradients: of this process; of split ones its part of the sums.
            deviations: of the noise, one for each gradient.
            source: where noise comes from.
            factor: public.
            step: its number.
            ledger: the lines of the ledger, which holds the step.
            weights: a fingerprint of the weights that the deviations are for.

        Raises:
            RankError: something differs, which is found before anything is released, or another process is gone. The
                gradients are dropped then, and there is no further step.
        """
        fields = {"steps taken": step, "bounds or noise": deviations}
        with self._agreed(fields, ledger, weights):
            self._noisy_(gradients, deviations, source, factor)

    def _agreed(
        self, fields: Mapping[str, object], ledger: Callable[[], Sequence[object]], weights: Callable[[], object]
    ) -> AbstractContextManager[None]:
        """Compares what a release depends on; within, it is made."""
        return nullcontext()

    def _noisy_(
        self, gradients: Sequence[Tensor], deviations: Sequence[float], source: NoiseSource, factor: float
    ) -> None:
        add_normal_(gradients, deviations, source, factor)

    # Everything else.

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, without noise: for the data's owner only."""
        return values

    def on_any(self, condition: bool) -> bool:
        """Whether a condition holds in any process, so that all can act on it at the same step."""
        return condition

    def from_first(
        self,
        make: Callable[[], Value],
        device: torch.device | str = "cpu",
        like: Callable[[tuple[Any, ...]], Tensor | None] | None = None,
    ) -> Value:
        """What the first process makes, in all of them.

        Args:
            make: called there only; returns nested dictionaries and lists of tensors and plain values.
            device: where the others' tensors go.
            like: given the keys of a tensor, the parameter that it is placed like, or ``None``.

        Raises:
            RankError: it failed there, and the error there says why, or another process is gone.
        """
        if like is not None and not self.is_whole:
            return shards.scattered(make, like)
        return make() if self.world.size == 1 else from_first(make, device)

    def collected(self, make: Callable[[], Value]) -> Value | None:
        """A state with whole tensors, in the first process, which writes it; ``None`` in the others.

        Raises:
            RankError: another process is gone.
        """
        return make()


class OneProcess(Placement):
    """One process, which holds all weights."""


class Replicated(Placement):
    """Several processes that each hold all weights, and sum their gradients in the first, which adds the noise.

    Args:
        model: the wrapped model, or its network.
        here: this process among them.
    """

    def __init__(self, model: nn.Module, here: World) -> None:
        self.world = here
        self._model = model
        self._stopped = False
        self._compared: Sequence[object] = ()

    def join(self, fields: Mapping[str, object], settle: Callable[[], None]) -> None:
        agree({**fields, "parts": shards.layout(self._model)})
        self._share(settle)

    def _share(self, settle: Callable[[], None]) -> None:
        ranks.copy_from_([*self._model.parameters(), *self._model.buffers()])
        settle()

    def require_ready(self) -> None:
        require_same(self.world)
        if self._stopped:
            raise RankError("a step of this run has failed: start all ranks again from the last checkpoint")

    @contextmanager
    def _agreed(
        self, fields: Mapping[str, object], ledger: Callable[[], Sequence[object]], weights: Callable[[], object]
    ) -> Iterator[None]:
        lines = ledger()
        # Lines are compared once, but for the last, which grows; all of them once another ledger was loaded.
        known = len(self._compared) if lines[: len(self._compared)] == self._compared else 0
        self._stopped = True
        try:
            agree(
                {
                    **fields,
                    "ledger": (len(lines), lines[known:]),
                    "weights": not self.is_whole or weights(),
                }
            )
            yield
        except BaseException:
            for parameter in self._model.parameters():
                parameter.grad = None
            raise
        self._compared = lines[:-1]
        self._stopped = False

    def _noisy_(
        self, gradients: Sequence[Tensor], deviations: Sequence[float], source: NoiseSource, factor: float
    ) -> None:
        self._sum(gradients, deviations, source)
        torch._foreach_mul_(list(gradients), factor)

    def _sum(self, gradients: Sequence[Tensor], deviations: Sequence[float], source: NoiseSource) -> None:
        replicated.release_(gradients, lambda sums: add_normal_(sums, deviations, source))

    def total(self, values: Tensor) -> Tensor:
        return total(values)

    def on_any(self, condition: bool) -> bool:
        return on_any(condition)

    def collected(self, make: Callable[[], Value]) -> Value | None:
        return make() if self.world.rank == 0 else None


class Sharded(Replicated):
    """Several processes that each hold, sum, add noise to and update a part of each weight.

    Args:
        model: the wrapped model, split by ``fully_shard``.
        here: this process among them.
    """

    is_whole = False

    def __init__(self, model: nn.Module, here: World) -> None:
        super().__init__(model, here)
        self._runs: tuple[nn.Module] | None = None

    def held(self, parameter: Tensor, /) -> Tensor:
        return shards.held(parameter)

    def whole(self, tensor: Tensor, /) -> Tensor:
        return shards.whole(tensor)

    def on_any_part(self, conditions: Sequence[bool], /) -> Sequence[bool]:
        found: list[bool] = total(torch.tensor(conditions).long()).bool().tolist() if conditions else []
        return found

    def change_(self, changes: Sequence[Change], changed: Callable[[str], None] | None = None) -> None:
        shards.change_wholes_([(function, tensors) for _, function, tensors in changes])
        if changed is not None:
            for name, *_ in changes:
                changed(name)

    def check(self, net: nn.Module, unknown: bool) -> bool:
        shards.check_shards(self._model, net.parameters())
        return unknown

    def reshard_(self) -> None:
        reshard_(self._model)

    def opened(self, graph: fx.GraphModule) -> nn.Module | None:
        shards.sum_shards_(self._model)
        if self._runs is None:
            self._runs = (stretches.gathering(graph, self._model) or graph,)
        return self._runs[0]

    @contextmanager
    def passing(self, count: int) -> Iterator[int]:
        # Each gathers what the others hold.
        together = ranks.largest(count)
        with shards.passing():
            yield together

    def _share(self, settle: Callable[[], None]) -> None:
        pass

    def require_ready(self) -> None:
        super().require_ready()
        shards.require_sums(self._model)

    def _sum(self, gradients: Sequence[Tensor], deviations: Sequence[float], source: NoiseSource) -> None:
        # Each adds noise to its own part, which no other holds.
        if not source.reproducible:
            add_normal_([local(gradient) for gradient in gradients], deviations, source)
            return
        # All draw the same numbers, for the whole, and each takes those of its part.
        drawn = [torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in gradients]
        add_normal_(drawn, deviations, source)
        for gradient, noise in zip(gradients, drawn, strict=True):
            local(gradient).add_(local(shards.split(noise, gradient)))

    def collected(self, make: Callable[[], Value]) -> Value | None:
        state = shards.gathered(make())
        return state if self.world.rank == 0 else None


def of(model: nn.Module) -> Placement:
    """Where the weights of a model are. What it answers of other processes holds of :func:`joined` only."""
    return Sharded(model, world()) if is_sharded(model) else OneProcess()


def joined(model: nn.Module, net: nn.Module) -> Placement:
    """Where a model is, among the processes that are there now.

    Args:
        model: the wrapped model.
        net: its network.

    Raises:
        ConfigurationError: ``torchrun`` started several processes that do not know of one another yet, or weights are
            split in a way that has no guarantee.
    """
    here = world()
    if has_shards(model):
        shards.check_shards(model, net.parameters())
        return Sharded(model, here)
    return OneProcess() if here.size == 1 else Replicated(net, here)


def require_same(known: World) -> None:
    """Makes sure that the processes are those that were there.

    Raises:
        PrivacyError: they are not.
    """
    if world() != known:
        raise PrivacyError("the process group has changed since the optimizer was made: make it afterwards")
