"""The steps of a run: how many, of which batches, and with how much noise. All follows from public numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from accounting import Accountant, Ledger, calibrate_ledger, calibrate_noise_multiplier, create_accountant
from clipless_dp.training.schedules import NoiseSchedule, noise_factors


@dataclass(frozen=True)
class Plan:
    """Poisson steps that pass over the data so many times in expectation: ``T = ceil(epochs/q)``, ``q = B/N``.

    Attributes:
        epochs: passes in expectation.
        batch_size: ``B``, expected.
        dataset_size: ``N``, public.
        steps: ``T``.
        factors: of the noise of each step, or ``None`` where all are alike.
    """

    epochs: float
    batch_size: int
    dataset_size: int
    steps: int
    factors: list[float] | None

    @classmethod
    def of(cls, epochs: float, batch_size: int, dataset_size: int, noise_schedule: NoiseSchedule | None = None) -> Plan:
        """The plan of a run.

        Raises:
            ConfigurationError: a factor of the schedule is not finite and positive.
        """
        # Rounding must not make a step more of what is a whole number.
        steps = math.ceil(epochs / (batch_size / dataset_size) - 1e-9)
        return cls(epochs, batch_size, dataset_size, steps, noise_factors(noise_schedule, steps))

    @property
    def sample_rate(self) -> float:
        """``q``."""
        return self.batch_size / self.dataset_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps from one record of the history to the next."""
        return max(1, math.ceil(self.steps / self.epochs - 1e-9))

    @property
    def ledger(self) -> Ledger:
        """What the steps are where ``σ`` is 1: calibration scales it."""
        planned = create_accountant("rdp")
        for factor in self.factors or [1.0] * self.steps:
            planned.step(noise_multiplier=factor, sample_rate=self.sample_rate)
        return planned.ledger

    def noise_multiplier(self, epsilon: float, delta: float, accountant: str | Accountant) -> float:
        """The smallest ``σ`` that keeps all steps, and what an accountant holds already, within ``epsilon``.

        Raises:
            UnreachableTargetError: there is none.
        """
        # A name: counted by its engine. An accountant: by its own, on top of what it holds.
        counted: dict[str, Any] = {"accountant": accountant} if isinstance(accountant, str) else {"spent": accountant}
        target: dict[str, Any] = {"target_epsilon": epsilon, "delta": delta}
        if self.factors is None:
            multiplier: float = calibrate_noise_multiplier(
                sample_rate=self.sample_rate, steps=self.steps, **target, **counted
            )
            return multiplier
        multiplier, _ = calibrate_ledger(self.ledger, **target, **counted)
        return multiplier


def epochs_of(steps: int, batch_size: int, dataset_size: int) -> float:
    """Passes over the data, in expectation, of so many steps: :meth:`Plan.of` plans these then."""
    return steps * batch_size / dataset_size
