"""Arguments of ``fit`` in four groups: what it promises, how it learns, how it computes, and what is kept of it.

Command line, search, tables and presets take the names of arguments, and their defaults, from here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.optim import Optimizer

from accounting import Accountant
from clipless_dp.errors import ConfigurationError
from clipless_dp.noise import Allocation, NoiseSource
from clipless_dp.sampling import Augmentation
from clipless_dp.training.evaluation import Data
from clipless_dp.training.schedules import NoiseSchedule, SchedulerFactory, linear_decay

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS = ("sgd", "adam")

Group = TypeVar("Group")


@dataclass(frozen=True, kw_only=True)
class Privacy:
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
    """

    epsilon: float
    delta: float
    accountant: str | Accountant = "prv"
    dataset_size: int | None = None
    reproducible_seed: int | None = None
    noise: NoiseSource | str | None = None
    noise_multiplier: float | None = None
    audit: bool | str = "quick"

    @property
    def audit_form(self) -> str:
        """``"off"``, ``"quick"`` or ``"full"``.

        Raises:
            ConfigurationError: it is anything else.
        """
        if isinstance(self.audit, bool):
            return "full" if self.audit else "off"
        if self.audit not in ("quick", "full"):
            raise ConfigurationError(f"audit must be 'quick', 'full' (or True) or False, got {self.audit!r}")
        return self.audit


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What a run learns by: what is tuned, and what a search may choose among. ε is the same for all of it.

    Attributes:
        epochs: passes over the data in expectation.
        batch_size: *expected* batch size; draws vary around it.
        lr: peak learning rate of SGD or Adam.
        momentum: of SGD.
        optimizer: ``"sgd"``, ``"adam"``, or a function that builds another base optimizer from the parameters, e.g.
            ``lambda p: torch.optim.AdamW(p, 1e-3)``.
        scheduler: builds a scheduler from the optimizer and the number of steps, called once a step.
        allocation: how noise is shared among parameters, see ``clipless_dp.noise.allocate``.
        augment: makes random views of training samples: a function of one sample, or a
            :class:`clipless_dp.RowAugmentation`; see :meth:`clipless_dp.CliplessDPOptimizer.accumulate`.
        multiplicity: views of each sample in each step, averaged in its own gradient: ε is the same for any number,
            time is proportional. Counts of rejected samples then count views.
        ema: decay of an exponential moving average of the weights (:class:`clipless_dp.WeightAverage`), free of privacy
            cost. The average, projected on the constraints, is what is evaluated, saved as the checkpoint's model, and
            left in ``model`` at the end.
        noise_schedule: maps a step's number, from 0, and the number of steps to a positive factor of its ``σ``. It must
            not look at data. One ``σ`` is calibrated for all; few different factors keep the accounting fast.
    """

    epochs: float
    batch_size: int
    lr: float = 1.0
    momentum: float = 0.9
    optimizer: OptimizerFactory | str = "sgd"
    scheduler: SchedulerFactory = linear_decay
    allocation: Allocation = "min-variance"
    augment: Augmentation | None = None
    multiplicity: int = 1
    ema: float | None = None
    noise_schedule: NoiseSchedule | None = None


@dataclass(frozen=True, kw_only=True)
class Execution:
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
            ``True`` compiles where that pays (:attr:`clipless_dp.DPLipModel.compiling_pays`); a name always does.
    """

    micro_batch_size: int | None = None
    memory_budget: float | None = None
    stream: bool | None = None
    compile: bool | str = False


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What is kept and shown of a run.

    Attributes:
        validation: public or held-out data whose accuracy (or loss) enters the history.
        checkpoint: file to write to, and to resume from; it holds no training losses, which nothing protects.
        checkpoint_every: epochs between checkpoints.
        progress: show a progress bar.
    """

    validation: Data | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int = 1
    progress: bool = True

    @property
    def path(self) -> Path | None:
        """The checkpoint's."""
        return None if self.checkpoint is None else Path(self.checkpoint)


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
        """Checks numbers, given the public number of samples.

        Raises:
            ConfigurationError: one is out of range, or two contradict each other.
        """
        privacy, learning, execution, keeping = self
        if not (math.isfinite(privacy.epsilon) and privacy.epsilon > 0):
            raise ConfigurationError(f"epsilon must be finite and positive, got {privacy.epsilon!r}")
        if not 0.0 < privacy.delta < 1.0:
            raise ConfigurationError(f"delta must lie in (0, 1), got {privacy.delta!r}")
        if not (math.isfinite(learning.epochs) and learning.epochs > 0):
            raise ConfigurationError(f"epochs must be finite and positive, got {learning.epochs!r}")
        if not (isinstance(learning.batch_size, int) and 1 <= learning.batch_size <= size):
            raise ConfigurationError(
                f"batch_size must be an integer from 1 to the {size} samples of the data set, "
                f"got {learning.batch_size!r}"
            )
        rows, budget = execution.micro_batch_size, execution.memory_budget
        if keeping.checkpoint_every < 1 or (rows is not None and rows < 1):
            raise ConfigurationError("checkpoint_every and micro_batch_size must be positive")
        if budget is not None:
            if rows is not None:
                raise ConfigurationError("memory_budget chooses micro_batch_size: give one of them")
            if not (isinstance(budget, (int, float)) and math.isfinite(budget) and budget > 0):
                raise ConfigurationError(f"memory_budget must be a finite number of bytes, got {budget!r}")


def _group(kind: type[Group], given: Mapping[str, Any]) -> Group:
    return kind(**{name: given[name] for name in names(kind) if name in given})


def names(*groups: type[Any]) -> tuple[str, ...]:
    """Names of the arguments of some groups, by default of all."""
    return tuple(field.name for group in groups or (Privacy, Learning, Execution, Keeping) for field in fields(group))


def require_known(given: Iterable[str]) -> None:
    """Refuses what is no argument of ``fit``, before anything is released that it was meant for.

    Raises:
        ConfigurationError: some names are unknown.
    """
    unknown = sorted(set(given) - set(names()))
    if unknown:
        raise ConfigurationError(f"fit has no arguments {unknown}")
