"""Training WITHOUT privacy: an ordinary optimizer, and projections, for data that needs no protection.

A function of its own and no setting of :func:`clipless_dp.fit`, so that no argument that is left out, mistyped or
computed can take the protection off a run that should have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from clipless_dp.arguments import learning_rate, seed, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import input_gate
from clipless_dp.model import DPLipModel, lineage, passes
from clipless_dp.model.surroundings import refuse_interference
from clipless_dp.model.wrapped import require_wrapped
from clipless_dp.sampling import Samples
from clipless_dp.training.evaluation import Data, evaluate
from clipless_dp.training.schedules import SchedulerFactory, linear_decay


@dataclass(frozen=True)
class UnprotectedResult:
    """What :func:`fit_without_privacy` has done.

    Attributes:
        steps: optimizer steps taken.
        losses: mean training loss of each epoch.
        accuracies: on the validation data after each epoch; ``None`` without.
    """

    steps: int
    losses: tuple[float, ...]
    accuracies: tuple[float | None, ...]

    @property
    def epsilon(self) -> float:
        """Infinite: nothing is promised."""
        return math.inf

    def __str__(self) -> str:
        accuracy = self.accuracies[-1] if self.accuracies else None
        shown = "" if accuracy is None else f"accuracy {100 * accuracy:.2f} %, "
        return f"NOT PRIVATE (ε = ∞): {shown}{self.steps} steps without noise"


def fit_without_privacy(
    model: DPLipModel,
    dataset: Data,
    *,
    epochs: int,
    batch_size: int,
    lr: float = 1e-3,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    scheduler: SchedulerFactory = linear_decay,
    validation: Data | None = None,
    rng_seed: int | None = None,
    progress: bool = True,
) -> UnprotectedResult:
    """Trains a model WITHOUT differential privacy: no noise, no ledger, no ε. The weights tell about the data.

    For public data, and for networks that are wanted for their Lipschitz constant alone. Shuffled batches, the mean of
    the loss, an ordinary optimizer, and the model's constraints projected after each step; neither input nor loss is
    other than in :func:`clipless_dp.fit`. What is trained is the traced graph, ``model.graph``, which the model runs
    and whose bounds it knows. The gate at the output is left out; gates within the network are part of it, and stay.
    ``docs/robustness.md`` has the same as a loop of ten lines.

    Args:
        model: the wrapped model, trained in place.
        dataset: as for :func:`clipless_dp.fit`.
        epochs: passes over the data.
        batch_size: rows of a step; the last one of an epoch may have fewer.
        lr: learning rate of Adam.
        optimizer: makes another one from the parameters that train.
        scheduler: builds a scheduler from the optimizer and the number of steps, called once a step.
        validation: samples whose accuracy is shown after each epoch.
        rng_seed: of the order of the samples; ``None``: another one each time.
        progress: show a progress bar.

    Raises:
        ConfigurationError: an argument is out of range, the model is not wrapped, or its weights are split among ranks.
        InputError: the data, or the validation data, does not fit the model: before the first step.
        PrivacyError: a layer was replaced or hooked, or a global module hook is registered.

    Guarantee:
        None of privacy. A private run that goes on from here protects what *it* reads. Its statement says that
        something else had changed the weights, this call having come to its end or not, where the run is of this model
        or this network, of the same parameters in another one, or of a copy or a file of the whole model. Values alone
        tell nothing of it: a state dict that is loaded into another network, a copy of ``model.net``.
    """
    require_wrapped(model)
    epochs, batch_size = whole("epochs", epochs), whole("batch_size", batch_size)
    rate = learning_rate("lr", lr)
    if not model.placement.is_whole or model.vocabulary is not None or model.packing is not None:
        raise ConfigurationError(
            "fit_without_privacy trains whole models of one input of numbers: train others by a loop of your own"
        )
    parameters = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigurationError("the network has no parameters to train")
    samples = Samples.of(dataset, model.packing)
    evaluate(model, samples.first)
    held_out = None if validation is None else Samples.of(validation, model.packing)
    if held_out is not None:
        # All of it: what does not fit is found here, and not behind an epoch.
        evaluate(model, held_out)
    # Traces anew where settings were changed, and refuses what is not bounded.
    model.lipschitz_constant()
    base = torch.optim.Adam(parameters, rate) if optimizer is None else optimizer(parameters)
    steps = epochs * -(-len(samples) // batch_size)
    schedule = scheduler(base, steps)
    generator = torch.Generator()
    chosen = seed("rng_seed", rng_seed)
    if chosen is None:
        generator.seed()
    else:
        generator.manual_seed(chosen % 2**63)
    device, _ = model.device_and_dtype()
    means: list[float] = []
    accuracies: list[float | None] = []
    model.train()
    # A private run that starts here says that something else has trained these weights: before the first step, which
    # may be the last one.
    lineage.of(model).changed += 1
    with tqdm(total=steps, disable=not progress, unit="step", desc="NOT PRIVATE", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(samples), generator=generator).split(batch_size):
                inputs, targets = samples.read(rows.tolist())
                total += ordinary_step(model, base, parameters, inputs.to(device), targets.to(device)) * len(rows)
                schedule.step()
                bar.update()
            means.append(total / len(samples))
            accuracies.append(None if held_out is None else evaluate(model, held_out)[0])
    return UnprotectedResult(steps, tuple(means), tuple(accuracies))


def ordinary_step(
    model: DPLipModel, base: Optimizer, parameters: list[nn.Parameter], inputs: Tensor, targets: Tensor
) -> float:
    """One ordinary step; gradients are handed to the optimizer and taken away again, so that none is left behind."""
    refuse_interference()
    model.check_inputs(inputs)
    gated, finite = input_gate(inputs, model.input_norm) if math.isfinite(model.input_norm) else (inputs, None)
    # Nobody's pass: layers of a user's own run within the graph, and a private step refuses what would be left here.
    with passes.unwitnessed():
        losses = model.loss_function.per_sample(model.graph.module(gated), targets)
        usable = losses.detach().isfinite() if finite is None else losses.detach().isfinite() & finite
        loss = torch.where(usable, losses, 0.0).sum() / max(1, len(losses))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        base.step()
    finally:
        for parameter, held in zip(parameters, before, strict=True):
            parameter.grad = held
    model.project_()
    return float(loss.detach())
