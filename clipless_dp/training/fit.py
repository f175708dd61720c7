"""``fit``: calibration, training, progress, history and checkpoints in one call."""

from __future__ import annotations

import os
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from accounting import Accountant
from clipless_dp.checkpoint import check_writable
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import DPLipModel
from clipless_dp.model.averaging import WeightAverage
from clipless_dp.model.description import settings_of
from clipless_dp.model.slopes import beside
from clipless_dp.model.wrapped import require_wrapped
from clipless_dp.noise import Allocation, NoiseSource, ReproducibleNoise
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.precision import full_precision
from clipless_dp.sampling import Samples
from clipless_dp.sampling.augmentation import Augmentation, refuse_own_generators, views
from clipless_dp.sampling.people import ROWS_PER_GROUP, GroupWeights, People, column_of, people_of
from clipless_dp.sampling.samples import count, public_size
from clipless_dp.training.evaluation import Data, evaluate
from clipless_dp.training.groups import Asked, Learning, OptimizerFactory
from clipless_dp.training.loop import train
from clipless_dp.training.plan import Plan
from clipless_dp.training.result import FitResult
from clipless_dp.training.run import Run, ledger_handed_on
from clipless_dp.training.schedules import NoiseSchedule, SchedulerFactory, linear_decay
from clipless_dp.training.settings import SuggestedSettings, resolved, suggest, warn_of_noise
from clipless_dp.training.sizing import rehearse


@full_precision()
def fit(
    model: DPLipModel,
    dataset: Data,
    *,
    epsilon: float,
    delta: float,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    optimizer: OptimizerFactory | str | None = None,
    scheduler: SchedulerFactory = linear_decay,
    accountant: str | Accountant = "prv",
    allocation: Allocation = "min-variance",
    validation: Data | None = None,
    dataset_size: int | None = None,
    micro_batch_size: int | None = None,
    memory_budget: float | None = None,
    stream: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    reproducible_seed: int | None = None,
    noise: NoiseSource | str | None = None,
    noise_multiplier: float | None = None,
    compile: bool | str = False,
    audit: bool | str = "quick",
    groups: Any = None,
    rows_per_group: int = ROWS_PER_GROUP,
    group_weights: GroupWeights = "mean",
    augment: Augmentation | None = None,
    multiplicity: int = 1,
    ema: float | None = None,
    noise_schedule: NoiseSchedule | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains a wrapped model to a target ε with Poisson-sampled batches.

    What is not given of epochs, batch size, optimizer, learning rate and momentum follows from public numbers
    (:func:`clipless_dp.suggest_settings`): the size of the data, ε, δ, shapes, gates and constraints.
    The noise multiplier is calibrated so that ``ceil(epochs/q)`` steps at ``q = batch_size/dataset_size`` spend at
    most ``epsilon`` at ``delta``. With a checkpoint that exists already, the run goes on from it.

    Args:
        model: the wrapped model, on the device to train on.
        dataset: inputs and targets: a pair of tensors, or a data set of pairs; several inputs by name or in order; see
            :class:`clipless_dp.sampling.Samples`.
        epsilon, delta, accountant, dataset_size, noise, noise_multiplier, reproducible_seed, audit: what is promised,
            see :class:`clipless_dp.training.Privacy`.
        groups, rows_per_group, group_weights: to people with several rows, see the same.
        epochs, batch_size, lr, momentum, optimizer, scheduler, allocation: how to learn, see
            :class:`clipless_dp.training.Learning`.
        augment, multiplicity, ema, noise_schedule: what ε does not notice, see the same.
        micro_batch_size, memory_budget, stream, compile: how to compute, :class:`clipless_dp.training.Execution`.
        validation, checkpoint, checkpoint_every, progress: what is kept, :class:`clipless_dp.training.Keeping`.

    Raises:
        AuditError: an attack passed a bound, or showed that samples of a batch interact. Before training, no step was
            taken or charged; later, no more is released.
        ConfigurationError: an argument is out of range, the batch is larger than the data set, or not even one row fits
            the memory budget.
        InputError: the data does not fit the model, or an id of ``groups`` is missing or floating-point.
        PrivacyError: a sample is in the data more than once (:func:`clipless_dp.sampling.persons.refuse_repeats`), or
            samples meet in the loss (:class:`clipless_dp.model.rowwise.RowLosses`).
        RankError: the data of the ranks differs (:func:`clipless_dp.sampling.persons.require_alike`).
        CheckpointError: the checkpoint is unreadable or belongs to another run, or none can be written there. One that
            cannot be written later, on a full disk say, is a warning: training goes on.

    Whatever interrupts training once steps were taken, or read from the checkpoint (what the data set raises, Ctrl-C,
    ...), leaves weights in ``model`` that only the latest ledger counts. It is raised as it is; before that, a
    checkpoint with that ledger is written, if there is a path, and the exception is given the optimizer as
    ``private_optimizer``: pass ``accountant=error.private_optimizer.accountant`` to what goes on from these weights,
    or uses the same data.

    Guarantee:
        The weights released by every step together are (``epsilon``, ``delta``)-differentially private with
        respect to adding or removing one sample of ``dataset`` (replacing one, if ``accountant`` is about that); with
        ``groups``, one person with all of their samples.
        History and progress show training losses, which are not. Every call starts a ledger of its own, unless it
        resumes a checkpoint or is given an accountant: calls on the same data compose, and a second one on the same
        model warns.
    """
    asked = Asked.of(locals())
    checked = _check(model, dataset, asked)
    settings = suggest(model, checked.size, asked.privacy, asked.learning)
    asked = asked._replace(learning=resolved(asked.learning, settings))
    warn_of_noise(settings)
    plan, sigma = _plan(asked, settings)
    run = _build(model, asked, checked, plan, sigma)
    with ledger_handed_on(run):
        run.begin()
        return train(run, rehearse(run, checked.samples), checked.held_out)


def require_trainable(model: DPLipModel, dataset: Data, **arguments: Any) -> None:
    """Refuses what :func:`fit` would refuse of its arguments, and raises what their functions raise, without a step.

    For arguments that are given before something is released which the training data is computed by: a model and rows
    like those to come are tried in their place, with noise of any size.

    Args:
        model: one like that which is to be trained.
        dataset: some made-up rows; ``dataset_size`` is among the arguments.
        arguments: of :func:`fit`, without ``groups``, ``noise``, ``checkpoint`` and ``validation``.

    Raises:
        ConfigurationError: as :func:`fit`.
        InputError: as :func:`fit`.
    """
    asked = Asked.of({**arguments, "noise_multiplier": arguments.get("noise_multiplier") or 1.0})
    checked = _check(model, dataset, asked)
    settings = suggest(model, checked.size, asked.privacy, asked.learning)
    asked = asked._replace(learning=resolved(asked.learning, settings))
    _build(model, asked, checked, *_plan(asked, settings))


class _Checked(NamedTuple):
    """What was seen to fit before anything is computed."""

    samples: Samples
    held_out: Samples | None
    size: int
    people: People | None
    average: WeightAverage | None


def _check(model: DPLipModel, dataset: Data, asked: Asked) -> _Checked:
    """Refuses what cannot be trained, or written, before the noise is calibrated."""
    privacy, learning, execution, keeping = asked
    form = privacy.audit_form
    require_wrapped(model)
    if not any(parameter.requires_grad for parameter in model.net.parameters()):
        raise ConfigurationError(
            "the network has no parameters to train: there are none, or all are frozen, and requires_grad_() thaws them"
        )
    here = model.place()
    if not here.is_whole and (execution.compile or form == "full" or execution.memory_budget is not None):
        raise ConfigurationError(
            "fit neither compiles nor audits a model of which each rank holds a part, nor measures what fits a "
            "memory_budget: leave these out, audit before fully_shard, and give micro_batch_size"
        )
    dataset, groups = column_of(dataset, privacy.groups)
    rows = count(dataset)
    people = people_of(groups, rows, privacy.rows_per_group, privacy.group_weights)
    size = public_size(privacy.dataset_size, rows, people)
    if people is not None:
        people.warn_of_size(size)
    asked.require_in_range(size)
    held_out = None if keeping.validation is None else Samples.of(keeping.validation, model.packing)
    samples = Samples.to_train_on(dataset, model.packing, people)
    for some in filter(None, (samples, held_out)):
        # What does not fit shows on one sample, before anything is spent.
        evaluate(model, some.first)
    if learning.augment is not None:
        refuse_own_generators(learning.augment)
        device, _ = model.device_and_dtype()
        shown, target = (part.to(device) for part in samples.first)
        one = torch.ones(1, dtype=torch.bool, device=device)
        model.check_inputs(views(learning.augment, shown, one, beside=beside(model, target)))
    average = None if learning.ema is None else WeightAverage(model, learning.ema)
    path = keeping.path
    if path is not None:
        here.from_first(lambda: check_writable(path))
    return _Checked(samples, held_out, size, people, average)


def _plan(asked: Asked, settings: SuggestedSettings) -> tuple[Plan, float]:
    """The steps, and the noise multiplier that was given, or is the smallest that meets the target."""
    privacy, schedule = asked.privacy, asked.learning.noise_schedule
    plan = Plan.of(settings.epochs, settings.batch_size, settings.dataset_size, schedule)
    if privacy.noise_multiplier is not None:
        return plan, privacy.noise_multiplier
    return plan, plan.noise_multiplier(privacy.epsilon, privacy.delta, privacy.accountant)


def _build(model: DPLipModel, asked: Asked, checked: _Checked, plan: Plan, sigma: float) -> Run:
    """Optimizer, schedule and run, before anything is loaded."""
    privacy, learning = asked.privacy, asked.learning
    noise, seed = privacy.noise, privacy.reproducible_seed
    if seed is not None:
        if isinstance(noise, str):
            raise ConfigurationError(f"noise={noise!r} cannot be reproduced: leave out reproducible_seed, or noise")
        noise = ReproducibleNoise(seed) if noise is None else noise
    model.placement.reshard_()
    base = _base(learning, list(model.net.parameters()))
    optimizer = CliplessDPOptimizer(
        model,
        base,
        noise_multiplier=sigma,
        sample_rate=plan.sample_rate,
        dataset_size=plan.dataset_size,
        accountant=privacy.accountant,
        allocation=learning.allocation,
        noise=noise,
        budget=(privacy.epsilon, privacy.delta),
        unit="row" if checked.people is None else "person",
    )
    if checked.people is not None:
        model.expect_rows(plan.batch_size * privacy.rows_per_group)
    optimizer.declare_seeded_masks(seed is not None)
    settings = _settings(asked, plan, sigma, optimizer)
    scheduler = learning.scheduler(optimizer, plan.steps)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigurationError(
            "ReduceLROnPlateau follows the training loss, which is not private: use a schedule that depends on the "
            "step alone"
        )
    return Run(
        optimizer, scheduler, asked, plan, settings, checked.samples.first, checked.average, people=checked.people
    )


def _base(learning: Learning, parameters: list[nn.Parameter]) -> Optimizer:
    if callable(learning.optimizer):
        return learning.optimizer(parameters)
    assert learning.lr is not None
    assert learning.momentum is not None
    if learning.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=learning.lr)
    return torch.optim.SGD(parameters, learning.lr, learning.momentum)


def _settings(asked: Asked, plan: Plan, sigma: float, optimizer: CliplessDPOptimizer) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from; called before a schedule changes the learning rate."""
    learning, privacy = asked.learning, asked.privacy
    augment, factors = learning.augment, plan.factors
    return {
        "epsilon": float(asked.privacy.epsilon),
        "delta": float(asked.privacy.delta),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "dataset_size": plan.dataset_size,
        "noise_multiplier": sigma,
        "allocation": learning.allocation,
        "optimizer": type(optimizer.base_optimizer).__name__,
        "lr and momentum": [(float(group["lr"]), group.get("momentum")) for group in optimizer.param_groups],
        "reproducible": optimizer.noise.reproducible,
        "augment": None if augment is None else getattr(augment, "__qualname__", type(augment).__qualname__),
        "multiplicity": None if learning.multiplicity == 1 else learning.multiplicity,
        "ema": learning.ema,
        "noise_schedule": factors and [(factor, len(list(alike))) for factor, alike in groupby(factors)],
        "groups": None if optimizer.unit == "row" else [privacy.rows_per_group, privacy.group_weights],
        "relation": optimizer.accountant.relation,
        "model": settings_of(optimizer.model),
    }
