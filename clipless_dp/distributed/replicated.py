"""Several processes that each hold all weights: one noisy sum for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipless_dp.distributed.ranks import movable, together, world
from clipless_dp.errors import ConfigurationError


def release_(sums: Sequence[Tensor], add_noise_: Callable[[Sequence[Tensor]], None]) -> None:
    """Replaces each rank's own sums by the noisy sums over all ranks, the same bits on each.

    Rank 0 alone receives the exact sums; it adds the noise, once, and sends what is private then to the others. So
    whatever a rank that fails leaves behind, none of the others has an exact sum to go on with.

    Args:
        sums: this rank's summed gradients, of one device and dtype, in the same order on all ranks.
        add_noise_: adds the noise in place; called on rank 0.

    Raises:
        RankError: another rank is gone.
    """
    here = world()
    with together("the sum over the ranks"):
        flat = movable(torch.cat([part.reshape(-1) for part in sums]))
        dist.reduce(flat, dst=0)
    parts = [part.view(own.shape) for part, own in zip(flat.split([own.numel() for own in sums]), sums, strict=True)]
    if here.rank == 0:
        add_noise_(parts)
    else:
        # What a reduction leaves here is not private, and must not survive a broadcast that fails.
        flat.fill_(torch.nan)
    with together("the noisy sum"):
        dist.broadcast(flat, src=0)
        for own, part in zip(sums, parts, strict=True):
            own.copy_(part)


def refuse_averages(module: nn.Module) -> None:
    """Refuses what averages gradients by itself.

    Raises:
        ConfigurationError: a module is wrapped for data parallelism.
    """
    for path, part in module.named_modules():
        if isinstance(part, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ConfigurationError(
                f"{path or 'the model'} is wrapped in {type(part).__name__}: pass the module inside. The optimizer "
                "sums the ranks' gradients by itself, and its noise is calibrated to the sum, not to an average"
            )
