"""What a step does together with the other ranks, and what is different where each holds a part of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from accounting import Ledger
from clipless_dp import distributed
from clipless_dp.bounds.stamp import stamp
from clipless_dp.distributed import shards as sharding
from clipless_dp.errors import PrivacyError, RankError
from clipless_dp.model import DPLipModel
from clipless_dp.noise import NoiseSource, add_normal_


class Ranks:
    """The processes that train one model, as one of them sees them; there may be one only.

    Args:
        model: the wrapped model.

    Attributes:
        several: whether there are others.
        whole: whether each rank holds all of the model.

    Raises:
        ConfigurationError: a module averages gradients by itself, or ``fully_shard`` splits the model in another way
            than the noise needs.
    """

    def __init__(self, model: DPLipModel) -> None:
        distributed.refuse_averages(model)
        self._model = model
        self._world = distributed.world()
        self.several = self._world.size > 1
        self.whole = not sharding.has_shards(model)
        self._stopped = False
        self._lines_compared = 0
        self.reshard_()
        if not self.whole:
            sharding.check_shards(model, model.net.parameters())

    def reshard_(self) -> None:
        """Gives back whole weights that a pass without a backward pass has left here."""
        sharding.part_(self._model)

    def join(self, settings: Callable[[], Mapping[str, object]], run: str) -> str:
        """Makes sure that all ranks train the same model in the same way, from the weights of rank 0.

        Args:
            settings: makes what must be the same on all ranks.
            run: the run that a rank's steps are of, alone.

        Returns:
            The run that all ranks' steps are of: they are counted once, whichever rank writes the checkpoint.
        """
        if not self.several:
            return run
        named = self._model.net.named_parameters()
        parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in named]
        distributed.agree({"parameters": parameters, "parts": sharding.layout(self._model), **settings()})
        if self.whole:
            distributed.copy_from_([*self._model.net.parameters(), *self._model.net.buffers()])
            self._model.settle_()
        return distributed.from_first(lambda: run)

    def most(self, count: int) -> int:
        """How many micro-batches each rank passes where this one has so many: those that gather parts pass together."""
        return count if self.whole else distributed.largest(count)

    def passing(self) -> AbstractContextManager[None]:
        """Passes within may gather and sum parts of the model."""
        return nullcontext() if self.whole else sharding.passing()

    def require_same(self) -> None:
        """Makes sure that the ranks are those that the optimizer was made with, and none has failed."""
        if distributed.world() != self._world:
            raise PrivacyError("the process group has changed since the optimizer was made: make it afterwards")
        if self._stopped:
            raise RankError("a step of this run has failed: start all ranks again from the last checkpoint")

    def require_sums(self) -> None:
        """Makes sure that gradients are sums over the ranks where each holds a part of them."""
        if not self.whole:
            sharding.require_sums(self._model)

    def compare_anew(self) -> None:
        """Another ledger was joined: the next comparison is of all of it."""
        self._lines_compared = 0

    def release_(
        self,
        gradients: list[Tensor],
        scales: Sequence[float],
        noise: NoiseSource,
        factor: float,
        *,
        steps_taken: int,
        ledger: Ledger,
    ) -> None:
        """Replaces the gradients by the noisy sums over all ranks, times a factor, once the ranks were compared."""
        if not self.several:
            self._add_noise_(gradients, scales, noise, factor)
            return
        lines = ledger.entries
        self._stopped = True
        try:
            distributed.agree(
                {
                    "steps taken": steps_taken,
                    "ledger": (len(lines), lines[self._lines_compared :]),
                    "bounds or noise": scales,
                    "weights": not self.whole or [stamp(parameter)[2:] for parameter in self._model.net.parameters()],
                }
            )
            if self.whole:
                distributed.release_(gradients, lambda sums: add_normal_(sums, scales, noise))
            else:
                self._add_noise_(gradients, scales, noise)
        except BaseException:
            for parameter in self._model.net.parameters():
                parameter.grad = None
            raise
        self._lines_compared = max(0, len(lines) - 1)
        self._stopped = False
        torch._foreach_mul_(gradients, factor)

    def _add_noise_(
        self, gradients: Sequence[Tensor], scales: Sequence[float], noise: NoiseSource, factor: float = 1.0
    ) -> None:
        """Adds the noise to the sums, or to this rank's part of them, which no other rank holds, and scales them."""
        if not self.whole and noise.reproducible:
            # All ranks draw the same numbers, for the whole, and each takes those of its part.
            drawn = [torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in gradients]
            add_normal_(drawn, scales, noise)
            for gradient, whole in zip(gradients, drawn, strict=True):
                sharding.local(gradient).add_(sharding.local(sharding.split(whole, gradient))).mul_(factor)
            return
        add_normal_([sharding.local(gradient) for gradient in gradients], scales, noise, factor)


def own_parameters(model: DPLipModel) -> list[nn.Parameter]:
    """The network's parameters, of which this rank may hold parts."""
    distributed.refuse_averages(model)
    sharding.part_(model)
    return list(model.net.parameters())
