"""How the learning rate and the noise change from step to step, by the number of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from clipless_dp.arguments import positive, share, shown, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.layers import DistanceLinear, set_exponent_
from clipless_dp.layers.distance import exponent
from clipless_dp.losses import LInfMargin

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
NoiseSchedule = Callable[[int, int], float]


def linear_decay(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Learning rate that rises over the first twentieth of the steps and falls linearly to zero."""
    rise = max(1, steps // 20)
    return LambdaLR(optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise), 1.0))


def constant(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Learning rate that stays as it is."""
    return LambdaLR(optimizer, lambda step: 1.0)


def noise_stages(first: float, last: float, count: int = 10) -> NoiseSchedule:
    """Factors of the noise that go from one value to another in equal stages, each the same multiple of the one before.

    ``fit(noise_schedule=noise_stages(1.5, 0.7))`` learns roughly first and finely at the end, at the same ε in all.

    Args:
        first: positive factor of the first stage.
        last: positive factor of the last stage.
        count: stages, at least 2; the accounting of hundreds takes some seconds in all.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    first = positive("the first factor of noise_stages", first)
    last = positive("the last factor of noise_stages", last)
    count = whole("the count of noise_stages", count, 2)

    def factor(step: int, steps: int) -> float:
        stages = min(count, steps)
        return first * math.pow(last / first, step * stages // steps / max(1, stages - 1))

    return factor


class _Relaxing(LRScheduler):
    """Another scheduler of learning rates, which calls a function of the number of the step besides."""

    def __init__(self, inner: LRScheduler, apply: Callable[[int], None]) -> None:
        self.inner, self.apply, self.optimizer = inner, apply, inner.optimizer
        self._follow()

    def _follow(self) -> None:
        self.last_epoch = self.inner.last_epoch
        self.apply(self.last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """One step of the other one, and the next number."""
        self.inner.step()
        self._follow()

    def get_last_lr(self) -> Any:
        """Of the other one."""
        return self.inner.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Of the other one: what is applied follows from the number of the step."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the other one."""
        self.inner.load_state_dict(state_dict)
        self._follow()


def relaxation(
    net: nn.Module,
    *,
    first: float = 8.0,
    last: float = 1000.0,
    until: float = 0.8,
    stages: int = 16,
    loss: LInfMargin | None = None,
    lr: SchedulerFactory = linear_decay,
) -> SchedulerFactory:
    """A ``scheduler=`` of :func:`fit` that lets distances harden: ``p`` grows geometrically, and then is infinite.

    Between steps, by the number of the step alone: a public schedule (Zhang et al. 2021, §4.2). Each stage traces the
    network anew. With a loss, the weight of its cross-entropy decays alongside, geometrically to a thousandth and then
    to 0.

    Args:
        net: the network, or the wrapping model: all its :class:`clipless_dp.layers.DistanceLinear` are set.
        first: ``p`` of the first stage, at least 2.
        last: of the last finite one.
        until: share of the steps after which ``p`` is infinite.
        stages: of finite ``p``.
        loss: the model's, whose cross-entropy decays.
        lr: of learning rates.

    Raises:
        ConfigurationError: an argument is out of range, no layer of the network relaxes, or no part of the loss decays.
    """
    low, high = positive("first", exponent(first)), positive("last", exponent(last))
    if not isinstance(net, nn.Module) or not any(isinstance(layer, DistanceLinear) for layer in net.modules()):
        raise ConfigurationError(f"net must be a network with DistanceLinear layers, which relax, got {shown(net)}")
    if loss is not None and not isinstance(loss, LInfMargin):
        raise ConfigurationError(f"loss must be LInfMargin, whose cross-entropy decays, or None, got {shown(loss)}")
    until, stages = share("until", until, "(0, 1]"), whole("stages", stages, 2)

    def factory(optimizer: Optimizer, steps: int) -> LRScheduler:
        def apply(step: int) -> None:
            stage = int(step * stages / max(1.0, until * steps))
            progress = stage / (stages - 1)
            set_exponent_(net, low * (high / low) ** progress if stage < stages else math.inf)
            if loss is not None:
                loss.set_decay(10.0 ** (-3.0 * progress) if stage < stages else 0.0)

        return _Relaxing(lr(optimizer, steps), apply)

    return factory


def noise_factors(schedule: NoiseSchedule | None, steps: int) -> list[float] | None:
    """The factor of each step's noise, or ``None`` where all are alike.

    Raises:
        ConfigurationError: one is not finite and positive.
    """
    if schedule is None:
        return None
    return [positive(f"what noise_schedule returns at step {step}", schedule(step, steps)) for step in range(steps)]
