"""``fit``: calibration, training, progress, history and checkpoints in one call."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from accounting import Accountant, calibrate_ledger, calibrate_noise_multiplier, create_accountant
from accounting.errors import warn_caller
from clipless_dp import distributed
from clipless_dp.arguments import require_accountant
from clipless_dp.audit.gradients import SensitivityAudit, sensitivity
from clipless_dp.checkpoint import check_writable, discard_partial, identity, load_checkpoint, save_checkpoint
from clipless_dp.distributed import shards as sharding
from clipless_dp.errors import (
    AuditError,
    BudgetExhaustedError,
    CheckpointError,
    CliplessError,
    ConfigurationError,
    InputError,
    PrivacyError,
)
from clipless_dp.losses import Loss, described
from clipless_dp.memory import rows_within, traffic
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.model.averaging import WeightAverage
from clipless_dp.noise import Allocation, NoiseSource, ReproducibleNoise, derived_seed
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.precision import full_precision
from clipless_dp.sampling import Batch, PoissonBatches, Samples, StreamedBatches
from clipless_dp.sampling.augmentation import Augmentation, refuse_own_generators, views
from clipless_dp.sampling.batches import usual_rows
from clipless_dp.sampling.streaming import AHEAD

Data = Dataset[Any] | tuple[Tensor, Tensor]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS = ("sgd", "adam")

_FEWEST_ATTEMPTS, _MOST_ATTEMPTS = 5, 48
"""Passes of a quick audit."""

_LARGEST_COPY = 1 << 27
"""Parameters of which a quick audit makes a copy: a gibibyte in float64."""

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
NoiseSchedule = Callable[[int, int], float]
BatchLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class EpochRecord:
    """One line of a history.

    Attributes:
        step: optimizer steps taken so far.
        epsilon: spent so far, at the run's δ.
        loss: mean training loss of the last step's batch. It is *not* private: for the data's owner only, so no file,
            pickles among them, holds it, and it is not shown. ``None`` for epochs that a checkpoint was read of.
        accuracy: share of correct predictions on the validation data, or ``None``. Nothing protects validation data.
        validation_loss: mean loss on the validation data, or ``None``.
    """

    step: int
    epsilon: float
    loss: float | None = field(repr=False)
    accuracy: float | None = None
    validation_loss: float | None = None

    def __reduce__(self) -> tuple[type[EpochRecord], tuple[float | None, ...]]:
        return type(self), (self.step, self.epsilon, None, self.accuracy, self.validation_loss)

    def __copy__(self) -> EpochRecord:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EpochRecord:
        return self


@dataclass
class FitResult:
    """What :func:`fit` has done.

    Attributes:
        epsilon: spent, an upper bound, under the accountant's neighbouring relation: by default adding or removing one.
        delta: the δ it holds for.
        noise_multiplier: ``σ``; with a noise schedule, what its factors multiply.
        sample_rate: ``q``.
        steps: optimizer steps in all.
        history: a record for each epoch.
        audits: what attacks on the bounds reached, before training and, if that was asked for, at each checkpoint.
        optimizer: with its accountant.
        checkpoint: the checkpoint file, or ``None`` if there is none or the last one could not be written.
        micro_batch_size: rows that were processed at once, as given or chosen for the memory budget, or ``None``.
        last_weights: with ``ema``, the weights of the last step, by name, which the average has replaced in the model:
            ``model.net.load_state_dict(result.last_weights, strict=False)`` puts them back.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    optimizer: CliplessDPOptimizer
    history: list[EpochRecord] = field(default_factory=list)
    audits: list[SensitivityAudit] = field(default_factory=list)
    checkpoint: Path | None = None
    micro_batch_size: int | None = None
    last_weights: dict[str, Tensor] | None = None

    def __str__(self) -> str:
        accuracy = self.history[-1].accuracy if self.history else None
        shown = "" if accuracy is None else f"accuracy {100 * accuracy:.2f} %, "
        saved = "" if self.checkpoint is None else f", checkpoint {self.checkpoint}"
        relation = self.optimizer.accountant.relation.replace("_", "-")
        return (
            f"{shown}ε = {self.epsilon:.4f} at δ = {self.delta:g} ({relation}), "
            f"σ = {self.noise_multiplier:.4f}, q = {self.sample_rate:.6g}, {self.steps} steps{saved}"
        )


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
        count: stages, at least 2; few keep the accounting fast.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    if not (0.0 < first < math.inf and 0.0 < last < math.inf and isinstance(count, int) and count >= 2):
        raise ConfigurationError(
            f"noise_stages needs positive factors and at least 2 stages, got {first!r}, {last!r}, {count!r}"
        )

    def factor(step: int, steps: int) -> float:
        stages = min(count, steps)
        return first * math.pow(last / first, step * stages // steps / max(1, stages - 1))

    return factor


@full_precision()
def fit(
    model: DPLipModel,
    dataset: Data,
    *,
    epsilon: float,
    delta: float,
    epochs: float,
    batch_size: int,
    lr: float = 1.0,
    momentum: float = 0.9,
    optimizer: OptimizerFactory | str = "sgd",
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
    augment: Augmentation | None = None,
    multiplicity: int = 1,
    ema: float | None = None,
    noise_schedule: NoiseSchedule | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains a wrapped model to a target ε with Poisson-sampled batches.

    The noise multiplier is calibrated so that ``ceil(epochs/q)`` steps at ``q = batch_size/dataset_size`` spend at
    most ``epsilon`` at ``delta``. With a checkpoint that exists already, the run goes on from it.

    Under ``torchrun``, after ``torch.distributed.init_process_group()``, every rank calls it alike with the whole data
    set, trains on its own part, and returns the same; rank 0 writes the checkpoint, which any number of ranks resumes.
    Of a model that ``fully_shard`` has split, each rank trains and keeps its part; the checkpoint holds it whole.

    Args:
        model: the wrapped model, on the device to train on.
        dataset: inputs and targets: a pair of tensors, or a data set of pairs.
        epsilon: target ε > 0.
        delta: target δ in (0, 1), below one over the number of samples (else there is a warning).
        epochs: passes over the data in expectation.
        batch_size: *expected* batch size; draws vary around it.
        lr: peak learning rate of SGD or Adam.
        momentum: of SGD.
        optimizer: ``"sgd"``, ``"adam"``, or a function that builds another base optimizer from the parameters, e.g.
            ``lambda p: torch.optim.AdamW(p, 1e-3)``.
        scheduler: builds a scheduler from the optimizer and the number of steps, called once a step.
        accountant: ``"prv"``, ``"rdp"`` or ``"auto"``, or an accountant whose ledger holds what was released from the
            data before, by ``clipless_dp.statistics`` say: that counts towards ``epsilon``; the steps are added to it.
            Its neighbouring relation is that of ``epsilon``: about replacing one sample, the same noise costs more.
        allocation: how noise is shared among parameters, see ``clipless_dp.noise.allocate``.
        validation: public or held-out data whose accuracy (or loss) enters the history.
        dataset_size: public size that fixes ``q`` and the divisor; by default the number of samples, which is
            then taken to be public.
        micro_batch_size: rows that are processed at once; bounds the memory.
        memory_budget: bytes that computing a step's gradients may take on the model's device: the draw, activations and
            gradients, on top of weights, optimizer state and data set. Chooses ``micro_batch_size``, of equal parts of
            a usual draw, by measuring passes over zeros.
        stream: whether the data stays where it is, and a thread reads each draw ahead
            (:class:`clipless_dp.StreamedBatches`), or is held on the model's device as a whole. By default data sets
            stream, and pairs of tensors or arrays do where they would fill more than half of a device's free memory.
        checkpoint: file to write to, and to resume from; it holds no training losses, which nothing protects.
        checkpoint_every: epochs between checkpoints.
        reproducible_seed: makes batches, noise, dropout and views a function of this number, so that a resumed run
            equals an uninterrupted one bit by bit. Whoever knows it can remove the noise. Nothing else makes any of
            them predictable: what ``torch.manual_seed`` sets reaches the initial weights only.
        noise: ``"system"``, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        noise_multiplier: ``σ`` that was calibrated elsewhere, in place of the smallest that meets the target; the step
            that would exceed the target is refused still.
        compile: runs forward pass, loss and backward pass as one compiled graph, see :func:`compiled_loss`: ``True``,
            or the name of a backend of ``torch.compile``. Noise, update and projections stay as they are: few large
            operations, which draw from generators of their own. ``True`` compiles where that pays
            (:attr:`DPLipModel.compiling_pays`); a name always does.
        audit: attacks on the bounds (:func:`clipless_dp.audit.sensitivity`). ``"quick"``: 5 to 48 passes before
            training, one for each thousand samples that it will see, on a copy in float64 on the CPU, none of them
            begun after two seconds; left out for models of more than 2^27 parameters or of which each rank holds a
            part, and, with a warning, for those that a CPU cannot run. ``"full"`` or ``True``: all of them, before
            training and at the weights of each ``checkpoint_every`` epochs, with or without a checkpoint file.
            ``False``: none.
        augment: makes random views of training samples: a function of one sample, or a
            :class:`clipless_dp.RowAugmentation`; see :meth:`clipless_dp.CliplessDPOptimizer.accumulate`.
        multiplicity: views of each sample in each step, averaged in its own gradient: ε is the same for any number,
            time is proportional. Counts of rejected samples then count views.
        ema: decay of an exponential moving average of the weights (:class:`clipless_dp.WeightAverage`), free of privacy
            cost. The average, projected on the constraints, is what is evaluated, saved as the checkpoint's model, and
            left in ``model`` at the end.
        noise_schedule: maps a step's number, from 0, and the number of steps to a positive factor of its ``σ``. It must
            not look at data. One ``σ`` is calibrated for all; few different factors keep the accounting fast.
        progress: show a progress bar.

    Raises:
        AuditError: an attack passed a bound, or showed that samples of a batch interact. Before training, no step was
            taken or charged; later, no more is released.
        ConfigurationError: an argument is out of range, the batch is larger than the data set, or not even one row fits
            the memory budget.
        InputError: the data does not fit the model.
        PrivacyError: a sample is in the data more than once (:func:`clipless_dp.sampling.persons.refuse_repeats`), or
            samples meet in the loss (:class:`clipless_dp.model.rowwise.RowLosses`).
        RankError: the data of the ranks differs (:func:`clipless_dp.sampling.persons.require_alike`).
        CheckpointError: the checkpoint is unreadable or belongs to another run, or none can be written there. One that
            cannot be written later, on a full disk say, is a warning: training goes on.
        Whatever interrupts training after a step (what the data set raises, Ctrl-C, ...) leaves weights in ``model``
        that only the latest ledger counts. It is raised as it is; before that, a checkpoint with that ledger is
        written, if there is a path, and the exception is given the optimizer as ``private_optimizer``: pass
        ``accountant=error.private_optimizer.accountant`` to what goes on from these weights, or uses the same data.

    Guarantee:
        The weights released by every step together are (``epsilon``, ``delta``)-differentially private with
        respect to adding or removing one sample of ``dataset`` (replacing one, if ``accountant`` is about that).
        History and progress show training losses, which are not. Every call starts a ledger of its own, unless it
        resumes a checkpoint or is given an accountant: calls on the same data compose, and a second one on the same
        model warns.
    """
    audit = _audit_form(audit)
    if not any(parameter.requires_grad for parameter in model.net.parameters()):
        raise ConfigurationError(
            "the network has no parameters to train: there are none, or all are frozen, and requires_grad_() thaws them"
        )
    if not isinstance(accountant, str):
        require_accountant(accountant, or_name=True)
    if sharding.has_shards(model):
        sharding.check_shards(model, model.net.parameters())
        if compile or audit == "full" or memory_budget is not None:
            raise ConfigurationError(
                "fit neither compiles nor audits a model of which each rank holds a part, nor measures what fits a "
                "memory_budget: leave these out, audit before fully_shard, and give micro_batch_size"
            )
    samples = Samples.to_train_on(dataset)
    held_out = None if validation is None else Samples(validation)
    device, _ = model.device_and_dtype()
    for some in filter(None, (samples, held_out)):
        # What does not fit shows on one sample, before anything is spent.
        evaluate(model, some.first)
    size = len(samples) if dataset_size is None else dataset_size
    _check(epsilon, delta, epochs, batch_size, size, checkpoint_every, micro_batch_size, memory_budget)
    if not callable(optimizer) and optimizer not in OPTIMIZERS:
        raise ConfigurationError(
            f"optimizer must be one of {OPTIMIZERS}, or a function of the parameters, got {optimizer!r}"
        )
    if augment is not None:
        refuse_own_generators(augment)
        model.check_inputs(views(augment, samples.first[0].to(device), torch.ones(1, dtype=torch.bool, device=device)))
    average = None if ema is None else WeightAverage(model, ema)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        distributed.from_first(lambda: check_writable(path))
    sample_rate = batch_size / size
    steps = math.ceil(epochs / sample_rate - 1e-9)
    target: dict[str, Any] = {"target_epsilon": epsilon, "delta": delta}
    spent: dict[str, Any] = {"accountant": accountant} if isinstance(accountant, str) else {"spent": accountant}
    factors = noise_factors(noise_schedule, steps)
    if noise_multiplier is not None:
        pass
    elif factors is None:
        noise_multiplier = calibrate_noise_multiplier(sample_rate=sample_rate, steps=steps, **target, **spent)
    else:
        planned = create_accountant("rdp")
        for factor in factors:
            planned.step(noise_multiplier=factor, sample_rate=sample_rate)
        noise_multiplier, _ = calibrate_ledger(planned.ledger, **target, **spent)
    if reproducible_seed is not None:
        if isinstance(noise, str):
            raise ConfigurationError(f"noise={noise!r} cannot be reproduced: leave out reproducible_seed, or noise")
        noise = ReproducibleNoise(reproducible_seed) if noise is None else noise
    sharding.part_(model)
    parameters = list(model.net.parameters())
    base = _base(optimizer, parameters, lr, momentum)
    private = CliplessDPOptimizer(
        model,
        base,
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        dataset_size=size,
        accountant=accountant,
        allocation=allocation,
        noise=noise,
        budget=(epsilon, delta),
    )
    private.declare_seeded_masks(reproducible_seed is not None)
    peak = [(float(group["lr"]), group.get("momentum")) for group in private.param_groups]
    schedule = scheduler(private, steps)
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigurationError(
            "ReduceLROnPlateau follows the training loss, which is not private: use a schedule that depends on the "
            "step alone"
        )
    run = _Run(
        model=model,
        optimizer=private,
        scheduler=schedule,
        delta=delta,
        seed=reproducible_seed,
        settings={
            "epsilon": float(epsilon),
            "delta": float(delta),
            "steps": steps,
            "batch_size": batch_size,
            "dataset_size": size,
            "noise_multiplier": noise_multiplier,
            "allocation": allocation,
            "optimizer": type(base).__name__,
            "lr and momentum": peak,
            "reproducible": private.noise.reproducible,
            "augment": None if augment is None else getattr(augment, "__qualname__", type(augment).__qualname__),
            "multiplicity": None if multiplicity == 1 else multiplicity,
            "ema": ema,
            "noise_schedule": factors and [(factor, len(list(run))) for factor, run in groupby(factors)],
            "relation": private.accountant.relation,
            "model": lineage.settings_of(model),
        },
        audit=audit,
        shown=samples.first,
        augment=augment,
        multiplicity=multiplicity,
        average=average,
        factors=factors,
    )
    compile = compile if isinstance(compile, str) or model.compiling_pays else False
    # Other devices capture and tune graphs for one shape; compiled for the CPU, a graph takes any number of rows.
    one_shape = bool(compile) and device.type != "cpu"
    if distributed.world().size > 1:
        distributed.agree(run.settings)
    with _ledger_handed_on(run):
        if path is not None and distributed.from_first(lambda: _found(path)):
            run.load(path)
            if run.saved_events < 0:
                run.save(path)
        run.attack(at_start=True)
        # One question for the whole run; where the ledger holds more than this run's steps, each step asks.
        if run.step < steps and factors is None:
            private.allows(steps - run.step)
        if stream is None:
            stream = not _fits(samples, device)
        # Of the public size: the exact number of samples is not to show in the result.
        usual = usual_rows(math.ceil(size / distributed.world().size), sample_rate)
        padding = usual if one_shape else max(8, math.isqrt(batch_size) // 2)
        if compile:
            blank = _blank(samples.first, micro_batch_size or padding, device)
            _compile(run, "inductor" if compile is True else compile, blank)
        if memory_budget is not None:
            micro_batch_size = _micro_batch_size(run, memory_budget, samples.first, usual, AHEAD if stream else 1)
        if one_shape:
            micro_batch_size = micro_batch_size or usual
        if micro_batch_size is not None and (one_shape or micro_batch_size < usual):
            padding = micro_batch_size
        shape: dict[str, Any] = {"steps": steps, "start": run.step, "physical_batch_size": padding, "device": device}
        batches = (
            StreamedBatches(samples, sample_rate=sample_rate, seed=reproducible_seed, **shape)
            if stream
            else PoissonBatches(samples, sample_rate=sample_rate, seed=reproducible_seed, **shape)
        )
    dropped = int(model.nonfinite_samples)
    with _interruptions_counted(run, path):
        _train(run, batches, held_out, path, checkpoint_every, micro_batch_size, progress, epochs)
        dropped = int(distributed.total(model.nonfinite_samples - dropped))
        if dropped and distributed.world().rank == 0:
            warn_caller(
                f"{dropped} samples in batches contributed nothing: input, target or loss was not finite or out of "
                "range, as a label beyond the last class is (this count is for the data's owner only)",
                UserWarning,
            )
        last_weights = None if average is None else average.apply_()
        return FitResult(
            epsilon=private.get_epsilon(delta),
            delta=delta,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=private.steps_taken,
            optimizer=private,
            history=run.history,
            audits=run.audits,
            checkpoint=path if distributed.from_first(lambda: run.saved) else None,
            micro_batch_size=micro_batch_size,
            last_weights=last_weights,
        )


def _audit_form(audit: bool | str) -> str:
    if isinstance(audit, bool):
        return "full" if audit else "off"
    if audit not in ("quick", "full"):
        raise ConfigurationError(f"audit must be 'quick', 'full' (or True) or False, got {audit!r}")
    return audit


def _base(optimizer: OptimizerFactory | str, parameters: list[nn.Parameter], lr: float, momentum: float) -> Optimizer:
    if callable(optimizer):
        return optimizer(parameters)
    return torch.optim.Adam(parameters, lr=lr) if optimizer == "adam" else torch.optim.SGD(parameters, lr, momentum)


def noise_factors(schedule: NoiseSchedule | None, steps: int) -> list[float] | None:
    """The factor of each step's noise, or ``None`` where all are alike.

    Raises:
        ConfigurationError: one is not finite and positive.
    """
    if schedule is None:
        return None
    factors = [float(schedule(step, steps)) for step in range(steps)]
    for step, factor in enumerate(factors):
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigurationError(
                f"noise_schedule must return finite positive factors, got {factor!r} at step {step}"
            )
    return factors


def _check(
    epsilon: float,
    delta: float,
    epochs: float,
    batch_size: int,
    dataset_size: int,
    checkpoint_every: int,
    micro_batch_size: int | None,
    memory_budget: float | None,
) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigurationError(f"epsilon must be finite and positive, got {epsilon!r}")
    if not 0.0 < delta < 1.0:
        raise ConfigurationError(f"delta must lie in (0, 1), got {delta!r}")
    if not (math.isfinite(epochs) and epochs > 0):
        raise ConfigurationError(f"epochs must be finite and positive, got {epochs!r}")
    if not (isinstance(batch_size, int) and 1 <= batch_size <= dataset_size):
        raise ConfigurationError(
            f"batch_size must be an integer from 1 to the {dataset_size} samples of the data set, got {batch_size!r}"
        )
    if checkpoint_every < 1 or (micro_batch_size is not None and micro_batch_size < 1):
        raise ConfigurationError("checkpoint_every and micro_batch_size must be positive")
    if memory_budget is not None:
        if micro_batch_size is not None:
            raise ConfigurationError("memory_budget chooses micro_batch_size: give one of them")
        if not (isinstance(memory_budget, (int, float)) and math.isfinite(memory_budget) and memory_budget > 0):
            raise ConfigurationError(f"memory_budget must be a finite number of bytes, got {memory_budget!r}")


def _found(path: Path) -> bool:
    discard_partial(path)
    return path.exists()


_FORMAT_WITH_MODEL = 3
"""The first format of checkpoints that tells by which caps, loss and layers the run was bounded."""

_SHOWN_DIFFERENCES = 6


@dataclass
class _Run:
    """Everything that a checkpoint must hold to go on."""

    model: DPLipModel
    optimizer: CliplessDPOptimizer
    scheduler: LRScheduler
    delta: float
    seed: int | None
    settings: dict[str, Any]
    audit: str
    shown: tuple[Tensor, Tensor]
    augment: Augmentation | None = None
    multiplicity: int = 1
    average: WeightAverage | None = None
    factors: Sequence[float] | None = None
    factor: float | None = None
    history: list[EpochRecord] = field(default_factory=list)
    audits: list[SensitivityAudit] = field(default_factory=list)
    saved: bool = False
    saved_step: int = -1
    saved_events: int = -1
    seen: tuple[int, ...] | None = None
    loss: BatchLoss = field(init=False)

    def __post_init__(self) -> None:
        self.loss = lambda inputs, targets, mask: self.model.loss(self.model(inputs), targets, mask)

    @property
    def step(self) -> int:
        return self.optimizer.steps_taken

    def attack(self, *, at_start: bool = False) -> None:
        """Attacks the bounds at the current weights, as far as that was asked for."""
        model, attempts = self.model, None
        if self.audit != "full":
            if self.audit == "off" or not at_start or sharding.has_shards(model):
                return
            if sum(parameter.numel() for parameter in model.net.parameters()) > _LARGEST_COPY:
                return
            seen = self.settings["steps"] * self.settings["batch_size"]
            attempts = min(max(seen // 1000, _FEWEST_ATTEMPTS), _MOST_ATTEMPTS)
        failure: AuditError | None = None
        try:
            self.audits.append(sensitivity(model, attempts=attempts, like=self.shown[1][0]))
        except AuditError as error:
            failure = error
        except Exception as error:
            # What nobody asked for must not stop what works: layers of one device only, or that cannot be copied.
            if attempts is None:
                raise
            warn_caller(
                f"the bounds were not attacked before training: the quick audit, on a float64 copy on the CPU, failed "
                f"with {type(error).__name__}: {error}. audit=False leaves it out",
                UserWarning,
            )
        # Ranks may have got through different numbers of attempts: they stop together.
        if distributed.on_any(failure is not None):
            raise failure or AuditError("an attack on another rank's copy of the model passed a bound: see its error")

    def follow_noise_schedule(self) -> None:
        """Sets the noise of the step to come, and asks for the budget of all that have the same."""
        if self.factors is None:
            return
        before, self.factor = self.factor, self.factors[self.step]
        if self.factor != before:
            self.optimizer.noise_multiplier = self.settings["noise_multiplier"] * self.factor
            _, alike = next(groupby(self.factors[self.step :]))
            self.optimizer.allows(len(list(alike)))

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds the average of its weights within, where one is kept."""
        return nullcontext() if self.average is None else self.average.applied()

    def save(self, path: Path) -> None:
        if distributed.world().rank > 0 and not sharding.has_shards(self.model):
            return
        sharding.part_(self.model)
        with self.averaged():
            weights = sharding.gathered({name: value.clone() for name, value in self.model.net.state_dict().items()})
        tensors = {"optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            tensors |= {"average": self.average.state_dict(), "last": self.model.net.state_dict()}
        tensors = sharding.gathered(tensors)
        if distributed.world().rank > 0:
            return
        content = {
            "settings": self.settings,
            "model": weights,
            "scheduler": self.scheduler.state_dict(),
            # A checkpoint is what a released model is read from: an exact loss of private samples must not be in it.
            "history": [{**vars(record), "loss": None} for record in self.history],
            **tensors,
        }
        there = identity(path)
        if there is not None and there != self.seen:
            raise PrivacyError(
                f"{path} was written by another process since this run read or wrote it: two runs that go on from one "
                "checkpoint release more than either ledger counts. This run stops and leaves the file alone"
            )
        try:
            save_checkpoint(path, content)
            self.saved, self.saved_step, self.seen = True, self.step, identity(path)
            self.saved_events = len(self.optimizer.accountant)
        except CheckpointError as error:
            # What was learned and paid for is in memory still.
            self.saved = False
            warn_caller(
                f"training goes on without a checkpoint of step {self.step} (the ledger of an older one lacks these "
                f"steps: do not publish these weights and then go on from it): {error}",
                UserWarning,
            )

    def load(self, path: Path) -> None:
        device, _ = self.model.device_and_dtype()
        self.seen = identity(path)
        if sharding.has_shards(self.model):
            content = sharding.scattered(lambda: load_checkpoint(path), self._parameter_of)
        else:
            content = distributed.from_first(lambda: load_checkpoint(path, device), device)
        settings = content.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        if content["format"] < _FORMAT_WITH_MODEL:
            settings = {**{name: self.settings[name] for name in ("relation", "model")}, **settings}
        differing = lineage.differences({name: settings.get(name) for name in self.settings}, self.settings)
        if differing:
            more = len(differing) - _SHOWN_DIFFERENCES
            listed = ", ".join(differing[:_SHOWN_DIFFERENCES]) + (f", and {more} more" if more > 0 else "")
            raise CheckpointError(
                f"{path} belongs to a run with other settings ({listed}); choose another file"
                f"{self._handed_twice(content)}"
            )
        there = -1
        try:
            there = len(self.optimizer.accountant.ledger_of(content["optimizer"]["clipless_dp"]["accountant"]))
            # The ledger first: weights without it would be free to train on.
            self.optimizer.load_state_dict(content["optimizer"])
            self.history = [EpochRecord(**{**record, "loss": None}) for record in content["history"]]
            self.scheduler.load_state_dict(content["scheduler"])
            if self.average is not None:
                self.average.load_state_dict(content["average"])
            self.model.net.load_state_dict(content["model" if self.average is None else "last"])
        except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} does not fit this model: {error}") from error
        self.model.settle_()
        self.optimizer.weights_were_loaded()
        self.saved, self.saved_step = True, self.step
        # Of a ledger that was handed on, the file lacks what is not its own.
        self.saved_events = len(self.optimizer.accountant) if len(self.optimizer.accountant) == there else -1

    def _handed_twice(self, content: dict[str, Any]) -> str:
        """What to do where the accountant holds the steps of the checkpoint already, for which noise is calibrated."""
        try:
            theirs = self.optimizer.accountant.ledger_of(content["optimizer"]["clipless_dp"]["accountant"]).runs
        except (AttributeError, KeyError, TypeError, ValueError):
            return ""
        if not theirs.keys() & self.optimizer.accountant.ledger.runs.keys():
            return ""
        return (
            ". The accountant holds steps of this checkpoint already. To go on with its run, give the checkpoint, and "
            "the accountant as at its start: its ledger is in the file. For a new run on the same data, give the "
            "accountant, and another file"
        )

    def _parameter_of(self, place: tuple[Any, ...]) -> Tensor | None:
        """The parameter that a tensor of a checkpoint belongs to, given the keys that lead to it."""
        kind, *keys = place
        if kind == "optimizer" and keys[0] == "state":
            held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            return held[keys[1]] if isinstance(keys[1], int) and keys[1] < len(held) else None
        named = dict(self.model.net.named_parameters(remove_duplicate=False))
        return named.get(str(keys[-1])) if kind in ("model", "last", "average") else None


def compiled_loss(model: DPLipModel, backend: str = "inductor") -> BatchLoss:
    """``model.loss(model(inputs), targets, mask)`` as one graph, gates included, which ``backward()`` follows.

    It is compiled at the first call, once for batches of all sizes: the number of rows stays free. A layer's settings
    that change later compile it anew.

    Args:
        model: the wrapped model.
        backend: of ``torch.compile``; the default generates C++ or Triton, and needs their compiler.

    Returns:
        A function of inputs, targets and mask. It raises ConfigurationError for a loss that cannot be mapped over rows,
        see :meth:`clipless_dp.model.rowwise.RowLosses.rehearse`.
    """

    def loss(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return model.loss(model(inputs), targets, mask)

    # Compiled variants are counted, and limited, per code object, which all models would otherwise share.
    own = FunctionType(loss.__code__.replace(), loss.__globals__, closure=loss.__closure__)
    compiled: BatchLoss = torch.compile(own, fullgraph=True, backend=backend)

    def with_free_rows(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        outputs = inputs.new_zeros(len(inputs), *model.output_shape, dtype=model.device_and_dtype()[1])
        model.row_losses.rehearse(model.loss_function, outputs, targets, mask, bound=model.cotangent_norm)
        for part in (inputs, targets, mask):
            torch._dynamo.maybe_mark_dynamic(part, 0)
        # A compiled graph draws from torch's own generator for layers that are not known.
        with model.randomness.visit(inputs.device) if model.may_draw else nullcontext():
            return compiled(inputs, targets, mask)

    return with_free_rows


def _blank(shown: tuple[Tensor, Tensor], rows: int, device: torch.device) -> Batch:
    """Rows of zeros in the shapes and types of those shown, none of which counts: no draw, nothing to announce."""
    inputs, targets = (part.new_zeros(rows, *part.shape[1:], device=device) for part in shown)
    return Batch(inputs, targets, torch.zeros(rows, dtype=torch.bool, device=device))


@contextmanager
def _rehearsal(run: _Run) -> Iterator[None]:
    """Forward and backward passes within leave nothing behind: no gradients, no mode, no state of random numbers."""
    training = run.model.training
    device, _ = run.model.device_and_dtype()
    try:
        run.model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        # What was passed is no one's.
        run.model.register.drop()
        run.model.train(training)


def _compile(run: _Run, backend: str, blank: Batch) -> None:
    """Compiles, and runs on rows that count for nothing, so that what fails does so before anything is spent.

    Raises:
        ConfigurationError: the backend is unknown, or lacks a compiler, or cannot compile the model.
    """
    try:
        with _rehearsal(run):
            run.loss = compiled_loss(run.model, backend)
            run.loss(*blank).backward()
    except CliplessError:
        raise
    except Exception as error:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigurationError(
            f"the model could not be compiled ({type(error).__name__}: {summary}); the default backend needs a C++ "
            "compiler on the CPU. Train with compile=False, or name another backend"
        ) from error


def _fits(samples: Samples, device: torch.device) -> bool:
    """Whether the data is in memory and half of what the device has left holds this rank's part of it."""
    if samples.tensors is None or device.type != "cuda":
        return samples.tensors is not None
    own = sum(part.element_size() * part.numel() for part in samples.tensors) / distributed.world().size
    return samples.tensors[0].device == device or own <= 0.5 * torch.cuda.mem_get_info(device)[0]


def _micro_batch_size(run: _Run, budget: float, shown: tuple[Tensor, Tensor], usual: int, held: int) -> int:
    """Equal parts of a usual draw, the fewest whose peak is within the budget.

    The peak is measured with two micro-batches (or views), since the second finds the gradients of the first in memory;
    the rest of the draw, which waits there for its turn, is added, and so are the other draws held there.

    Raises:
        ConfigurationError: one row does not fit, or the device does not tell.
    """
    device, _ = run.model.device_and_dtype()
    row = sum(part.element_size() * part[0].numel() for part in _blank(shown, 1, device))
    peaks: dict[int, float] = {}

    def gradients(rows: int) -> None:
        run.optimizer.accumulate(
            _blank(shown, min(2 * rows, usual), device),
            augment=run.augment,
            multiplicity=min(2, run.multiplicity),
            micro_batch_size=rows,
            loss=run.loss,
        )
        run.optimizer.zero_grad()

    def peak(rows: int) -> float:
        try:
            measured: float = traffic(lambda: gradients(rows), device).peak
        except torch.cuda.OutOfMemoryError:
            run.optimizer.zero_grad()
            measured = math.inf
        peaks[rows] = measured + row * (max(0, usual - 2 * rows) + (held - 1) * usual)
        return peaks[rows]

    with _rehearsal(run):
        # What is set up once, by libraries and by layers, is no part of a step.
        gradients(min(2, usual))
        fits = rows_within(budget, peak, usual)
    if fits == 0:
        raise ConfigurationError(
            f"one row at a time takes {peaks[1]:.4g} bytes, {row * usual * held:.4g} of them for {held} usual draw(s) "
            f"of {usual} rows, and memory_budget is {budget:.4g}: raise it, or choose a smaller batch_size or network"
        )
    return math.ceil(usual / math.ceil(usual / fits))


@contextmanager
def _ledger_handed_on(run: _Run) -> Iterator[None]:
    """Gives exceptions the optimizer once a ledger was loaded: the weights of its steps may be in the model."""
    before = len(run.optimizer.accountant)
    try:
        yield
    except BaseException as error:
        if len(run.optimizer.accountant) != before:
            error.private_optimizer = run.optimizer  # type: ignore[attr-defined]
        raise


@contextmanager
def _interruptions_counted(run: _Run, path: Path | None) -> Iterator[None]:
    """Lets no exception leave steps behind that no ledger in reach counts, and never hides it."""
    before = len(run.optimizer.accountant)
    try:
        yield
    except BaseException as error:
        events = len(run.optimizer.accountant)
        if events == before:
            raise
        with _deferred_interrupt():
            saved = run.saved_events == events
            # Ranks that hold parts write together, and others may be gone.
            if path is not None and not saved and not sharding.has_shards(run.model):
                # Warnings may be errors too.
                with suppress(BaseException):
                    run.save(path)
                saved = run.saved_events == events
                if not saved and distributed.world().rank == 0:
                    with suppress(Warning):
                        warn_caller(
                            f"training was interrupted at step {run.step}, and {path} could not be written: its ledger "
                            "lacks steps that the model's weights have taken",
                            UserWarning,
                        )
            error.private_optimizer = run.optimizer  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(
                    f"clipless_dp: {run.step} private steps were taken. "
                    + (f"{path} counts them. " if path is not None and saved else "No file counts all of them. ")
                    + "The ledger is this exception's private_optimizer.accountant: what goes on from these weights, "
                    "or uses the same data, composes with it"
                )
        raise


def _train(
    run: _Run,
    batches: PoissonBatches | StreamedBatches,
    validation: Samples | None,
    path: Path | None,
    checkpoint_every: int,
    micro_batch_size: int | None,
    progress: bool,
    epochs: float,
) -> None:
    total = run.settings["steps"]
    per_epoch = max(1, math.ceil(total / epochs - 1e-9))
    shown = progress and distributed.world().rank == 0
    bar = tqdm(total=total, initial=run.step, disable=not shown, unit="step", dynamic_ncols=True)
    run.model.train()
    with bar, closing(iter(batches)) as drawn, _deferred_interrupt() as interrupted:
        for batch in drawn:
            try:
                with _drawing(run):
                    loss = _step(run, batch, micro_batch_size)
            except BudgetExhaustedError as error:
                warn_caller(f"training stops after {run.step} of {total} steps: {error}", UserWarning)
                run.optimizer.zero_grad()
                if path is not None:
                    run.save(path)
                break
            bar.update()
            if run.step % per_epoch == 0 or run.step == total:
                record = _record(run, loss, batch, validation, min(1024, micro_batch_size or 1024))
                run.history.append(record)
                if path is not None and (len(run.history) % checkpoint_every == 0 or run.step == total):
                    run.save(path)
                if path is None or run.saved_step == run.step:
                    # What is shown is released: a run that is killed now goes on from a ledger that counts it.
                    bar.set_postfix_str(_shown(record))
                if len(run.history) % checkpoint_every == 0 or run.step == total:
                    # After the checkpoint, whose ledger counts the steps that an error would tell about.
                    run.attack()
            if distributed.on_any(interrupted()):
                if path is not None:
                    run.save(path)
                raise KeyboardInterrupt


def _drawing(run: _Run) -> AbstractContextManager[None]:
    """Of a reproducible run, makes what the next step's passes draw a function of its seed."""
    if run.seed is None:
        return nullcontext()
    return run.model.randomness.seeded(derived_seed(run.seed, "passes", run.step, distributed.world().rank))


def _step(run: _Run, batch: Batch, micro_batch_size: int | None) -> Tensor:
    run.optimizer.zero_grad()
    total = run.optimizer.accumulate(
        batch,
        augment=run.augment,
        multiplicity=run.multiplicity,
        micro_batch_size=micro_batch_size,
        loss=run.loss,
    )
    run.follow_noise_schedule()
    run.optimizer.step()
    run.scheduler.step()
    if run.average is not None:
        run.average.update()
    return total


def _record(run: _Run, loss: Tensor, batch: Batch, validation: Samples | None, rows: int) -> EpochRecord:
    local = torch.tensor([float(loss), float(batch.mask.sum())], dtype=torch.float64)
    summed, count = distributed.total(local).tolist()
    mean = summed / max(1.0, count)
    epsilon = run.optimizer.get_epsilon(run.delta)
    if validation is None:
        return EpochRecord(run.step, epsilon, mean)
    with run.averaged():
        accuracy, validation_loss = evaluate(run.model, validation, rows)
    return EpochRecord(run.step, epsilon, mean, accuracy, validation_loss)


def _shown(record: EpochRecord) -> str:
    parts = [f"ε={record.epsilon:.3f}"]
    if record.loss is not None:
        parts.append(f"loss={record.loss:.4f}")
    if record.accuracy is not None:
        parts.append(f"accuracy={100 * record.accuracy:.2f}%")
    return ", ".join(parts)


@torch.no_grad()
def evaluate(model: DPLipModel, dataset: Data | Samples, batch_size: int = 1024) -> tuple[float | None, float]:
    """Accuracy and mean loss on data that is not part of the training set.

    Args:
        model: the wrapped model; evaluated in ``eval`` mode, put back afterwards.
        dataset: as for :func:`fit`.
        batch_size: rows at once.

    Returns:
        The share of correct predictions, by the loss's own :meth:`~clipless_dp.losses.Loss.correct` (``None`` where it
        has no notion of it), and the mean loss.

    Raises:
        InputError: the data does not fit the model, or what ``correct`` returns does not fit the rows.
    """
    samples = Samples.of(dataset)
    device, _ = model.device_and_dtype()
    training = model.training
    model.eval()
    correct, total_loss = 0.0, 0.0
    known = True
    try:
        for some_inputs, some_targets in samples.parts(batch_size):
            truth = some_targets.to(device)
            output = model(some_inputs.to(device))
            total_loss += float(model.loss(output, truth))
            hits = _hits(model.loss_function, output, truth)
            known = known and hits is not None
            correct += hits or 0.0
    finally:
        model.train(training)
    return (correct / len(samples) if known else None), total_loss / len(samples)


def _hits(loss: Loss, output: Tensor, truth: Tensor) -> float | None:
    """How many predictions are right by the loss's own notion; ``None`` where it has none."""
    right = loss.correct(output, truth)
    if right is None:
        return None
    said = described(right)
    fits = isinstance(right, Tensor) and right.shape == output.shape[:1]
    if fits and (right.dtype == torch.bool or right.is_floating_point()):
        # Asked this way around, since a NaN is no share.
        if bool(((right >= 0) & (right <= 1)).all()):
            return float(right.sum(dtype=torch.float64))
        said = "numbers outside of [0, 1]"
    raise InputError(
        f"correct() of {loss!r} must return None, or for each row a truth value or a number in [0, 1], shape "
        f"{tuple(output.shape[:1])}; got {said}"
    )


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Lets the current step finish when the user presses Ctrl-C, so that a checkpoint is never half a step."""
    pending = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pending.is_set
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.set())
    try:
        yield pending.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
