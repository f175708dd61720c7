"""A run: what a checkpoint holds to go on with, and how it is written and read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from accounting.errors import warn_caller
from clipless_dp.audit.gradients import SensitivityAudit, sensitivity
from clipless_dp.checkpoint import discard_partial, identity, load_checkpoint, save_checkpoint
from clipless_dp.distributed.placement import Placement, agree
from clipless_dp.errors import AuditError, CheckpointError, PrivacyError
from clipless_dp.model import DPLipModel
from clipless_dp.model.averaging import WeightAverage
from clipless_dp.model.compiled import BatchLoss
from clipless_dp.model.description import differences, without_counts, without_untold
from clipless_dp.modules import state_of
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.sampling import People
from clipless_dp.training.groups import Asked
from clipless_dp.training.plan import Plan
from clipless_dp.training.progress import SignalToNoise
from clipless_dp.training.result import EpochRecord

_FEWEST_ATTEMPTS, _MOST_ATTEMPTS = 5, 48
"""Passes of a quick audit."""

_LARGEST_COPY = 1 << 27
"""Parameters of which a quick audit makes a copy: a gibibyte in float64."""

_FORMAT_WITH_MODEL = 3
"""The first format of checkpoints that tells by which caps, loss and layers the run was bounded."""

_SHOWN_DIFFERENCES = 6


@dataclass
class Run:
    """Everything that a checkpoint must hold to go on, and what was asked for.

    Attributes:
        settings: what a checkpoint that is gone on from must agree with.
        shown: one sample, which may be seen before anything is spent.
        micro_batch_size: rows at once, as given or chosen.
        given: events of the ledger ahead of this run.
        saved: whether the latest checkpoint could be written.
        seen: the identity of the file that this run read or wrote last.
        people: whose the rows are, where the promise is about people.
        loss: of a batch, where it is compiled.
        signal_to_noise: what moved the weights since the last record.
    """

    optimizer: CliplessDPOptimizer
    scheduler: LRScheduler
    asked: Asked
    plan: Plan
    settings: dict[str, Any]
    shown: tuple[Tensor, Tensor]
    average: WeightAverage | None = None
    micro_batch_size: int | None = None
    factor: float | None = None
    people: People | None = None
    history: list[EpochRecord] = field(default_factory=list)
    audits: list[SensitivityAudit] = field(default_factory=list)
    saved: bool = False
    saved_step: int = -1
    saved_events: int = -1
    seen: tuple[int, ...] | None = None
    given: int = field(init=False)
    loss: BatchLoss | None = None
    signal_to_noise: SignalToNoise = field(init=False)

    def __post_init__(self) -> None:
        self.given = len(self.optimizer.accountant)
        self.signal_to_noise = SignalToNoise(self.optimizer)

    @property
    def model(self) -> DPLipModel:
        """The one that is trained."""
        return self.optimizer.model

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.optimizer.steps_taken

    @property
    def here(self) -> Placement:
        """Where the model is."""
        return self.model.placement

    @property
    def charged(self) -> bool:
        """Whether this run has steps, taken, loaded or charged only, whose weights the model may hold."""
        return self.step > 0 or len(self.optimizer.accountant) != self.given

    def begin(self) -> None:
        """Goes on from the checkpoint, if there is one, attacks the bounds, and asks whether the budget suffices.

        Raises:
            AuditError: an attack passed a bound.
            CheckpointError: the checkpoint is unreadable, or of another run.
            RankError: the settings of the ranks differ.
        """
        agree(self.settings)
        path = self.asked.keeping.path
        if path is not None and self.here.from_first(lambda: _found(path)):
            self.load(path)
            if self.saved_events < 0:
                self.save(path)
        self.attack(at_start=True)
        # One question for the whole run; where the ledger holds more than this run's steps, each step asks.
        if self.step < self.plan.steps and self.plan.factors is None:
            self.optimizer.allows(self.plan.steps - self.step)

    def attack(self, *, at_start: bool = False) -> None:
        """Attacks the bounds at the current weights, as far as that was asked for."""
        model, attempts = self.model, None
        form = self.asked.privacy.audit_form
        if form != "full":
            if form == "off" or not at_start or not self.here.is_whole:
                return
            if sum(parameter.numel() for parameter in model.net.parameters()) > _LARGEST_COPY:
                return
            seen = self.plan.steps * self.plan.batch_size
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
        if self.here.on_any(failure is not None):
            raise failure or AuditError("an attack on another rank's copy of the model passed a bound: see its error")

    def follow_noise_schedule(self) -> None:
        """Sets the noise of the step to come, and asks for the budget of all that have the same."""
        factors = self.plan.factors
        if factors is None:
            return
        before, self.factor = self.factor, factors[self.step]
        if self.factor != before:
            self.optimizer.noise_multiplier = self.settings["noise_multiplier"] * self.factor
            _, alike = next(groupby(factors[self.step :]))
            self.optimizer.allows(len(list(alike)))

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds the average of its weights within, where one is kept."""
        return nullcontext() if self.average is None else self.average.applied()

    def save(self, path: Path) -> None:
        """Writes a checkpoint; where that fails, warns, since what was learned and paid for is in memory still.

        Raises:
            PrivacyError: another process has written the file meanwhile.
        """
        tensors = self.here.collected(self._tensors)
        if tensors is None:
            return
        content = {
            "settings": self.settings,
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
            self.saved = False
            warn_caller(
                f"training goes on without a checkpoint of step {self.step} (the ledger of an older one lacks these "
                f"steps: do not publish these weights and then go on from it): {error}",
                UserWarning,
            )

    def _tensors(self) -> dict[str, Any]:
        """What a checkpoint holds that each process may hold a part of."""
        self.here.reshard_()
        with self.averaged():
            weights = {name: value.clone() for name, value in state_of(self.model.net).items()}
        tensors = {"model": weights, "optimizer": self.optimizer.state_dict()}
        if self.signal_to_noise.known:
            tensors["signal_to_noise"] = self.signal_to_noise.state_dict()
        if self.average is not None:
            tensors |= {"average": self.average.state_dict(), "last": state_of(self.model.net)}
        return tensors

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: it is unreadable, or of a run with other settings.
        """
        # A model in parts may be too large for one device.
        device = self.model.device_and_dtype()[0] if self.here.is_whole else torch.device("cpu")
        self.seen = identity(path)
        content = self.here.from_first(lambda: load_checkpoint(path, device), device, like=self._parameter_of)
        settings = content.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        if content["format"] < _FORMAT_WITH_MODEL:
            settings = {**{name: self.settings[name] for name in ("relation", "model")}, **settings}
        differing = differences({name: settings.get(name) for name in self.settings}, self.settings)
        differing = without_untold(without_counts(differing, self.model.counted))
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
            self.signal_to_noise.load_state_dict(content.get("signal_to_noise"))
        except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} does not fit this model: {error}") from error
        self.model.settle_()
        self.optimizer.weights_were_loaded()
        known = {str(line) for line in content["optimizer"]["clipless_dp"].get("bounds_taken", {}).get("changes", ())}
        if changed := [line for line in self.optimizer.changed_bounds() if line not in known]:
            raise CheckpointError(
                f"{path} belongs to a run with other bounds at the same weights ({', '.join(changed)}): a layer or a "
                "loss is set otherwise; choose another file"
            )
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


@contextmanager
def ledger_handed_on(run: Run) -> Iterator[None]:
    """Gives exceptions the optimizer once steps were loaded or taken: their weights may be in the model."""
    try:
        yield
    except BaseException as error:
        if run.charged:
            error.private_optimizer = run.optimizer  # type: ignore[attr-defined]
        raise


def _found(path: Path) -> bool:
    discard_partial(path)
    return path.exists()
