"""Ways in which private training leaks more than it is accounted for, each as it would be written by mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from clipless_dp import CliplessDPSGD, PoissonBatches, SystemNoise
from clipless_dp.audit.release import BatchesFactory, OptimizerFactory
from clipless_dp.model import DPLipModel
from clipless_dp.model.outermost import outermost_gate
from clipless_dp.noise import NoiseSource
from clipless_dp.noise.box_muller import seeded_words
from clipless_dp.noise.sources import normal_numbers


@dataclass(frozen=True)
class Scenario:
    """A short training run: the real optimizer on real Poisson batches."""

    noise_multiplier: float = 2.0
    sample_rate: float = 0.25
    steps: int = 4
    dataset_size: int = 20_000
    noise: Callable[[], NoiseSource] = SystemNoise
    kind: type[CliplessDPSGD] = CliplessDPSGD
    sampling: str = "announced"

    def optimizer(self, model: DPLipModel) -> CliplessDPSGD:
        return self.kind(
            model,
            lr=0.1,
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            dataset_size=self.dataset_size,
            sampling=self.sampling,  # type: ignore[arg-type]
            noise=self.noise(),
        )

    def batches(self, data: tuple[Tensor, Tensor]) -> Iterable[Sequence[Tensor]]:
        return PoissonBatches(data, sample_rate=self.sample_rate, steps=self.steps)


Mutant = Callable[..., Iterator[tuple[OptimizerFactory, BatchesFactory]]]


class ScaledNoise(SystemNoise):
    factor = 0.0

    def standard_normal_(self, out: Tensor) -> Tensor:
        return super().standard_normal_(out).mul_(self.factor)


class QuarterNoise(ScaledNoise):
    factor = 0.25


class RepeatedNoise(SystemNoise):
    """Starts its generator anew for each step: secret, random, and the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = torch.seed()

    def begin_step(self, step: int) -> None:
        self._numbers = normal_numbers(seeded_words(self.seed), None)

    def standard_normal_(self, out: torch.Tensor) -> torch.Tensor:
        return self._numbers.fill_(out)


@contextmanager
def with_noise(noise: type[NoiseSource], **changes):
    scenario = Scenario(noise=noise, **changes)
    yield scenario.optimizer, scenario.batches


no_noise = partial(with_noise, ScaledNoise)


@contextmanager
def sensitivity_over_the_batch_size(**changes):
    class Divided(CliplessDPSGD):
        def _deviations(self, sensitivity, named):
            bounds = {name: bound / self.expected_batch_size for name, bound in sensitivity.per_parameter.items()}
            total = sensitivity.total / self.expected_batch_size
            return super()._deviations(replace(sensitivity, per_parameter=bounds, total=total), named)

    scenario = Scenario(kind=Divided, **changes)
    yield scenario.optimizer, scenario.batches


@contextmanager
def gates_off(**changes):
    scenario = Scenario(**changes)
    witnessed = outermost_gate

    def open_input_gate(inputs, radius):
        return inputs.nan_to_num(), torch.isfinite(inputs).flatten(1).all(1)

    with (
        mock.patch("clipless_dp.model.network.input_gate", open_input_gate),
        mock.patch(
            "clipless_dp.model.wrapped.outermost_gate",
            lambda values, limit, opened, own: witnessed(values, 1e30, opened, own),
        ),
    ):
        yield scenario.optimizer, scenario.batches


@contextmanager
def mean_over_the_actual_batch(**changes):
    rows = 1.0

    def rescale(optimizer, args, kwargs) -> None:
        for parameter in optimizer.model.net.parameters():
            parameter.grad *= optimizer.expected_batch_size / rows
        # Else the step is refused.
        optimizer.model.register.noted.note_all(optimizer.model.register.parameters)

    def averaging(model: DPLipModel) -> CliplessDPSGD:
        optimizer = scenario.optimizer(model)
        optimizer.register_step_pre_hook(rescale)
        return optimizer

    scenario = Scenario(**changes)

    def counted(data):
        nonlocal rows
        for batch in scenario.batches(data):
            rows = max(1.0, float(batch.mask.sum()))
            yield batch

    yield averaging, counted


@contextmanager
def shuffled_batches(**changes):
    # Little noise: what Poisson sampling gives beyond a shuffle is a chance of never being drawn.
    scenario = Scenario(sampling="poisson", **{"noise_multiplier": 0.3, **changes})

    def shuffled(data):
        inputs, targets = data
        order = torch.randperm(len(inputs))
        for rows in order.tensor_split(scenario.steps):
            yield inputs[rows], targets[rows]

    yield scenario.optimizer, shuffled


@contextmanager
def whole_data_in_each_batch(**changes):
    scenario = Scenario(sampling="poisson", **changes)
    yield scenario.optimizer, lambda data: [data] * scenario.steps


MUTANTS: dict[str, Mutant] = {
    "no noise": no_noise,
    "a quarter of the noise": partial(with_noise, QuarterNoise),
    "sensitivity over the batch size": sensitivity_over_the_batch_size,
    "gates off": gates_off,
    "noise used again in each step": partial(with_noise, RepeatedNoise),
    "mean over the actual batch": mean_over_the_actual_batch,
    "whole data in each batch": whole_data_in_each_batch,
    "shuffled batches": shuffled_batches,
}
