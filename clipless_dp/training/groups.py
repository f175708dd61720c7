"""Arguments of ``fit`` in four groups: what it promises, how it learns, how it computes, and what is kept of it.

Command line, search, tables and presets take the names of arguments, and their defaults, from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.optim import Optimizer

from accounting import Accountant, create_accountant
from clipless_dp.arguments import (
    flag,
    function,
    learning_rate,
    multiplier,
    positive,
    require_accountant,
    seed,
    share,
    shown,
    whole,
)
from clipless_dp.errors import ConfigurationError
from clipless_dp.noise import Allocation, NoiseSource, checked_allocation, refuse_no_source
from clipless_dp.sampling import Augmentation
from clipless_dp.sampling.people import (
    ROWS_PER_GROUP,
    GroupWeights,
    checked_cap,
    checked_weights,
    refuse_without_groups,
)
from clipless_dp.training.evaluation import Data
from clipless_dp.training.schedules import NoiseSchedule, SchedulerFactory, linear_decay

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS = ("sgd", "adam")

Group = TypeVar("Group")


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Arguments that are what they should be: numbers of numpy become plain ones.

    Raises:
        ConfigurationError: one is out of range or of another type, before any data is read.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _CHECKS[one.name](one.name, getattr(self, one.name)))


@dataclass(frozen=True, kw_only=True)
class Privacy(_Checked):
    """What a run promises, and by which means.

    Attributes:
        epsilon: target ε > 0.
        delta: target δ in (0, 1), below one over the number of samples (else there is a warning).
        accountant: ``"prv"``, ``"rdp"`` or ``"auto"``, or an accountant whose ledger holds what was released from the
            data before, by ``clipless_dp.statistics`` say: that counts towards ``epsilon``; the steps are added to it.
            Its neighbouring relation is that of ``epsilon``: about replacing one sample, the same noise costs more.
        dataset_size: public size that fixes ``q`` and the divisor; by default the number of samples, which is
            then taken to be public.
        reproducible_seed: makes batches, noise, dropout and views a function of this number, so that a resumed run
            equals an uninterrupted one bit by bit. Whoever knows it can remove the noise. Nothing else makes any of
            them predictable: what ``torch.manual_seed`` sets reaches the initial weights only.
        noise: ``"system"``, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        noise_multiplier: ``σ`` that was calibrated elsewhere, in place of the smallest that meets the target; the step
            that would exceed the target is refused still.
        audit: attacks on the bounds (:func:`clipless_dp.audit.sensitivity`). ``"quick"``: 5 to 48 passes before
            training, one for each thousand samples that it will see, on a copy in float64 on the CPU, none of them
            begun after two seconds; left out for models of more than 2^27 parameters or of which each rank holds a
            part, and, with a warning, for those that a CPU cannot run. ``"full"`` or ``True``: all of them, before
            training and at the weights of each ``checkpoint_every`` epochs, with or without a checkpoint file.
            ``False``: none.
        groups: whose each row is, an id for each, integers or strings, or the name of a column of them, which is no
            input then: the promise is about people, each with all of their rows, who are drawn and whose rows are
            averaged (docs/groups.md). ``dataset_size``, ``batch_size`` and ``epochs`` count people then. What is public
            of the ids is their being there; a run that goes on from a checkpoint is given the same ones.
        rows_per_group: with ``groups``, how many rows of a person enter a step at most, chosen anew in each: a public
            number, whose ε is the same for any.
        group_weights: with ``groups``, ``"mean"``: a person's rows that enter weigh 1 together, and each about as much
            as another (docs/groups.md); ``"cap"``: one over ``rows_per_group`` each, in one pass, so that people with
            fewer rows count less.
    """

    epsilon: float
    delta: float
    accountant: str | Accountant = "prv"
    dataset_size: int | None = None
    reproducible_seed: int | None = None
    noise: NoiseSource | str | None = None
    noise_multiplier: float | None = None
    audit: bool | str = "quick"
    groups: Any = None
    rows_per_group: int = ROWS_PER_GROUP
    group_weights: GroupWeights = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups is None:
            refuse_without_groups(self.rows_per_group, self.group_weights)

    @property
    def audit_form(self) -> str:
        """``"off"``, ``"quick"`` or ``"full"``."""
        if isinstance(self.audit, bool):
            return "full" if self.audit else "off"
        return self.audit


@dataclass(frozen=True, kw_only=True)
class Learning(_Checked):
    """What a run learns by: what is tuned, and what a search may choose among. ε is the same for all of it.

    Attributes:
        epochs: passes over the data in expectation. This and the next four, where they are ``None``, are chosen from
            public numbers by :func:`clipless_dp.suggest_settings`.
        batch_size: *expected* batch size; draws vary around it.
        lr: peak learning rate of SGD or Adam, finite; one that is given without an optimizer is SGD's.
        momentum: of SGD, in [0, 1).
        optimizer: ``"sgd"``, ``"adam"``, or a function that builds another base optimizer from the parameters, e.g.
            ``lambda p: torch.optim.AdamW(p, 1e-3)``.
        scheduler: builds a scheduler from the optimizer and the number of steps, called once a step.
        allocation: how noise is shared among parameters, see ``clipless_dp.noise.allocate``.
        augment: makes random views of training samples: a function of one sample, or a
            :class:`clipless_dp.RowAugmentation`, such as :class:`clipless_dp.ShiftAndFlip`; or a
            :class:`clipless_dp.sampling.LabelledAugmentation`, which is given labels and slopes, too, such as
            :class:`clipless_dp.sampling.Adversarial`; see :meth:`clipless_dp.CliplessDPOptimizer.accumulate`.
        multiplicity: views of each sample in each step, averaged in its own gradient: ε is the same for any number,
            time is proportional. Counts of rejected samples then count views.
        ema: decay of an exponential moving average of the weights (:class:`clipless_dp.WeightAverage`), free of privacy
            cost. The average, projected on the constraints, is what is evaluated, saved as the checkpoint's model, and
            left in ``model`` at the end.
        noise_schedule: maps a step's number, from 0, and the number of steps to a positive factor of its ``σ``. It must
            not look at data. One ``σ`` is calibrated for all; few different factors keep the accounting fast.
    """

    epochs: float | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float | None = None
    optimizer: OptimizerFactory | str | None = None
    scheduler: SchedulerFactory = linear_decay
    allocation: Allocation = "min-variance"
    augment: Augmentation | None = None
    multiplicity: int = 1
    ema: float | None = None
    noise_schedule: NoiseSchedule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiplicity > 1 and self.augment is None:
            raise ConfigurationError(
                f"multiplicity={self.multiplicity} without augment would repeat one view: give augment"
            )


@dataclass(frozen=True, kw_only=True)
class Execution(_Checked):
    """How a run computes: its memory and its speed. The steps are the same, to within rounding.

    Under ``torchrun``, after ``torch.distributed.init_process_group()``, every rank calls ``fit`` alike with the whole
    data set, trains on its own part, and returns the same; rank 0 writes the checkpoint, which any number of ranks
    resumes. Of a model that ``fully_shard`` has split, each rank trains and keeps its part; the checkpoint holds it
    whole.

    Attributes:
        micro_batch_size: rows that are processed at once; bounds the memory.
        memory_budget: bytes that computing a step's gradients may take on the model's device: the draw, activations and
            gradients, on top of weights, optimizer state and data set. Chooses ``micro_batch_size``, of equal parts of
            a usual draw, by measuring passes over zeros.
        stream: whether the data stays where it is, and a thread reads each draw ahead
            (:class:`clipless_dp.StreamedBatches`), or is held on the model's device as a whole. By default data sets
            stream, and pairs of tensors or arrays do where they would fill more than half of a device's free memory.
        compile: runs forward pass, loss and backward pass as one compiled graph, see
            :func:`clipless_dp.training.compiled_loss`: ``True``, or the name of a backend of ``torch.compile``. Noise,
            update and projections stay as they are: few large operations, which draw from generators of their own.
            ``True`` compiles where that may pay (:attr:`clipless_dp.DPLipModel.compiling_pays`), and on a CPU keeps
            what is faster on rows of zeros, which tell nothing of the data; what is left out is warned of, with the
            reason. A name always compiles.
    """

    micro_batch_size: int | None = None
    memory_budget: float | None = None
    stream: bool | None = None
    compile: bool | str = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_budget is not None and self.micro_batch_size is not None:
            raise ConfigurationError("memory_budget chooses micro_batch_size: give one of them")


@dataclass(frozen=True, kw_only=True)
class Keeping(_Checked):
    """What is kept and shown of a run.

    Attributes:
        validation: public or held-out data whose accuracy (or loss) enters the history.
        checkpoint: file to write to, and to resume from; it holds no training losses, which nothing protects.
        checkpoint_every: epochs between checkpoints.
        progress: show a progress bar; where standard error is no terminal, a line for each epoch, without the
            training loss.
    """

    validation: Data | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 1
    progress: bool = True

    @property
    def path(self) -> Path | None:
        """The checkpoint's."""
        return None if self.checkpoint is None else Path(self.checkpoint)


def _accountant(name: str, value: object) -> str | Accountant:
    if isinstance(value, str):
        # Refuses a name that it does not know.
        create_accountant(value)
        return value
    return require_accountant(value, or_name=True)


def _base(name: str, value: object) -> OptimizerFactory | str:
    if callable(value) or (isinstance(value, str) and value in OPTIMIZERS):
        return value
    raise ConfigurationError(f"{name} must be one of {OPTIMIZERS}, or a function of the parameters, got {shown(value)}")


def _path(name: str, value: object) -> str | os.PathLike[str]:
    if isinstance(value, (str, os.PathLike)) and value and isinstance(os.fspath(value), str):
        return value
    raise ConfigurationError(f"{name} must be the path of a file, or None, got {shown(value)}")


def _audit(name: str, value: object) -> bool | str:
    if isinstance(value, bool) or (isinstance(value, str) and value in ("quick", "full")):
        return value
    raise ConfigurationError(f"{name} must be 'quick', 'full' (or True) or False, got {shown(value)}")


def _compile(name: str, value: object) -> bool | str:
    if isinstance(value, (bool, str)):
        return value
    raise ConfigurationError(f"{name} must be True, False or the name of a backend, got {shown(value)}")


def _as_given(name: str, value: Any) -> Any:
    return value


def _or_none(check: Callable[[str, object], Any]) -> Callable[[str, object], Any]:
    return lambda name, value: None if value is None else check(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "epsilon": positive,
    "delta": lambda name, value: share(name, value, "(0, 1)"),
    "accountant": _accountant,
    "dataset_size": _or_none(whole),
    "reproducible_seed": seed,
    "noise": lambda name, value: refuse_no_source(value),
    "noise_multiplier": _or_none(multiplier),
    "audit": _audit,
    "epochs": _or_none(positive),
    "batch_size": _or_none(whole),
    "lr": _or_none(learning_rate),
    "momentum": _or_none(lambda name, value: share(name, value, "[0, 1)")),
    "optimizer": _or_none(_base),
    "scheduler": lambda name, value: function(name, value, "the optimizer and the number of steps"),
    "allocation": lambda name, value: checked_allocation(value),
    "augment": _or_none(lambda name, value: function(name, value, "one sample, or a RowAugmentation")),
    "multiplicity": whole,
    "ema": _or_none(lambda name, value: share(f"{name}, the decay of an average,", value, "[0, 1)")),
    "noise_schedule": _or_none(lambda name, value: function(name, value, "a step's number and the number of steps")),
    "micro_batch_size": _or_none(whole),
    "memory_budget": _or_none(lambda name, value: positive(f"{name}, a number of bytes,", value)),
    "stream": _or_none(flag),
    "compile": _compile,
    # Data, which is parsed where it is read.
    "validation": _as_given,
    "groups": _as_given,
    "rows_per_group": lambda name, value: checked_cap(value),
    "group_weights": lambda name, value: checked_weights(value),
    "checkpoint": _or_none(_path),
    "checkpoint_every": whole,
    "progress": flag,
}
"""What each argument must be; a group checks, and keeps, what these return."""


class Asked(NamedTuple):
    """All arguments of a run."""

    privacy: Privacy
    learning: Learning
    execution: Execution
    keeping: Keeping

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Asked:
        """The groups, of arguments by name; what is no argument of a group is left out."""
        return cls(_group(Privacy, given), _group(Learning, given), _group(Execution, given), _group(Keeping, given))

    def require_in_range(self, size: int) -> None:
        """Checks the batch size against the public number of samples, or people.

        Raises:
            ConfigurationError: it is larger.
        """
        if (self.learning.batch_size or 0) > size:
            raise ConfigurationError(
                f"batch_size must be an integer from 1 to the {size} "
                f"{'samples' if self.privacy.groups is None else 'people'} of the data set, "
                f"got {self.learning.batch_size!r}"
            )


def _group(kind: type[Group], given: Mapping[str, Any]) -> Group:
    return kind(**{name: given[name] for name in names(kind) if name in given})


def names(*groups: type[Any]) -> tuple[str, ...]:
    """Names of the arguments of some groups, by default of all."""
    return tuple(field.name for group in groups or (Privacy, Learning, Execution, Keeping) for field in fields(group))


def require_known(given: Mapping[str, Any]) -> None:
    """Refuses what ``fit`` would refuse of arguments, before anything is released that they were meant for.

    Raises:
        ConfigurationError: some names are unknown, or a value is out of range.
    """
    unknown = sorted(set(given) - set(names()))
    if unknown:
        raise ConfigurationError(f"fit has no arguments {unknown}")
    for name, value in given.items():
        _CHECKS[name](name, value)
