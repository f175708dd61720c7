"""The optimizer around plain SGD."""

from __future__ import annotations

import torch
from torch import Tensor

from accounting import Accountant
from clipless_dp.arguments import flag, learning_rate, not_negative, share
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import DPLipModel
from clipless_dp.model.wrapped import require_wrapped
from clipless_dp.noise import Allocation, NoiseSource
from clipless_dp.optim.charging import Sampling
from clipless_dp.optim.optimizer import CliplessDPOptimizer
from clipless_dp.sampling.people import Unit


class CliplessDPSGD(CliplessDPOptimizer):
    """:class:`CliplessDPOptimizer` around ``torch.optim.SGD``.

    Args:
        model: the wrapped model; all its trainable parameters are optimised.
        lr: learning rate, finite.
        momentum: as in ``torch.optim.SGD``, in [0, 1).
        dampening: as in ``torch.optim.SGD``.
        weight_decay: as in ``torch.optim.SGD``.
        nesterov: as in ``torch.optim.SGD``.
        noise_multiplier: see :class:`CliplessDPOptimizer`, as are the rest.
        sample_rate: ``q``.
        dataset_size: public number of samples.
        accountant: its name or the object.
        allocation: how noise is shared.
        sampling: how batches are drawn.
        noise: source of the noise.
        budget: ``(ε, δ)``.
        unit: ``"row"`` or ``"person"``.
    """

    def __init__(
        self,
        model: DPLipModel,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        noise_multiplier: float,
        sample_rate: float,
        dataset_size: int,
        accountant: str | Accountant = "prv",
        allocation: Allocation = "global",
        sampling: Sampling = "announced",
        noise: NoiseSource | str | None = None,
        budget: tuple[float, float] | None = None,
        unit: Unit = "row",
    ) -> None:
        require_wrapped(model)
        placement.refuse_averages(model)
        model.placement.reshard_()
        parameters = list(model.net.parameters())
        if not parameters:
            raise ConfigurationError("the network has no parameters to train")
        rate = learning_rate("lr", lr)
        try:
            base = torch.optim.SGD(
                parameters,
                lr=lr if isinstance(lr, Tensor) else rate,
                momentum=share("momentum", momentum, "[0, 1)"),
                dampening=not_negative("dampening", dampening),
                weight_decay=not_negative("weight_decay", weight_decay),
                nesterov=flag("nesterov", nesterov),
            )
        except ConfigurationError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(f"torch.optim.SGD refuses its arguments: {error}") from error
        super().__init__(
            model,
            base,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            dataset_size=dataset_size,
            accountant=accountant,
            allocation=allocation,
            sampling=sampling,
            noise=noise,
            budget=budget,
            unit=unit,
        )
