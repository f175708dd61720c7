"""The loop of steps: what is shown, saved, and counted whatever interrupts it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from accounting.errors import warn_caller
from clipless_dp.errors import BudgetExhaustedError
from clipless_dp.noise import derived_seed
from clipless_dp.sampling import Batch, PoissonBatches, Samples, StreamedBatches
from clipless_dp.training.evaluation import evaluate
from clipless_dp.training.result import EpochRecord, FitResult
from clipless_dp.training.run import Run
from clipless_dp.training.watching import watchers


def train(run: Run, batches: PoissonBatches | StreamedBatches, held_out: Samples | None) -> FitResult:
    """Takes the steps of a run, and leaves the average of the weights, if one is kept, in the model.

    Args:
        run: that has begun.
        batches: a draw for each step that is left.
        held_out: samples whose accuracy and loss enter the history.

    Raises:
        Whatever interrupts it, with the ledger: see :func:`clipless_dp.fit`.
    """
    before = int(run.model.nonfinite_samples)
    path = run.asked.keeping.path
    delta = run.asked.privacy.delta
    with _interruptions_counted(run, path):
        _take_steps(run, batches, held_out)
        dropped = int(run.here.total(run.model.nonfinite_samples - before))
        if dropped and run.here.world.rank == 0:
            warn_caller(
                f"{dropped} samples in batches contributed nothing: input, target or loss was not finite or out of "
                "range, as a label beyond the last class is (this count is for the data's owner only)",
                UserWarning,
            )
        last_weights = None if run.average is None else run.average.apply_()
        return FitResult(
            spent=run.optimizer.get_epsilon(delta),
            delta=delta,
            noise_multiplier=run.settings["noise_multiplier"],
            sample_rate=run.plan.sample_rate,
            steps=run.optimizer.steps_taken,
            optimizer=run.optimizer,
            history=run.history,
            audits=run.audits,
            checkpoint=path if run.here.from_first(lambda: run.saved) else None,
            micro_batch_size=run.micro_batch_size,
            last_weights=last_weights,
            learning=run.asked.learning,
        )


@contextmanager
def _interruptions_counted(run: Run, path: Path | None) -> Iterator[None]:
    """Lets no exception leave steps behind that no file counts, if there is a path, and never hides it."""
    try:
        yield
    except BaseException as error:
        if not run.charged:
            raise
        events = len(run.optimizer.accountant)
        with _deferred_interrupt():
            saved = run.saved_events == events
            # Ranks that hold parts write together, and others may be gone.
            if path is not None and not saved and run.here.is_whole:
                # Warnings may be errors too.
                with suppress(BaseException):
                    run.save(path)
                saved = run.saved_events == events
                if not saved and run.here.world.rank == 0:
                    with suppress(Warning):
                        warn_caller(
                            f"training was interrupted at step {run.step}, and {path} could not be written: its ledger "
                            "lacks steps that the model's weights have taken",
                            UserWarning,
                        )
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(
                    f"clipless_dp: {run.step} private steps were taken. "
                    + (f"{path} counts them. " if path is not None and saved else "No file counts all of them. ")
                    + "The ledger is this exception's private_optimizer.accountant: what goes on from these weights, "
                    "or uses the same data, composes with it"
                )
        raise


def _take_steps(run: Run, batches: PoissonBatches | StreamedBatches, held_out: Samples | None) -> None:
    keeping, plan, path = run.asked.keeping, run.plan, run.asked.keeping.path
    total = plan.steps
    shown = keeping.progress and run.here.world.rank == 0
    # No bar where no terminal is: a file of carriage returns is no log.
    bar = tqdm(total=total, initial=run.step, disable=None if shown else True, unit="step", dynamic_ncols=True)
    run.model.train()
    with bar, closing(iter(batches)) as drawn, _deferred_interrupt() as interrupted:
        for batch in drawn:
            try:
                with _drawing(run):
                    loss = _step(run, batch)
            except BudgetExhaustedError as error:
                warn_caller(f"training stops after {run.step} of {total} steps: {error}", UserWarning)
                run.optimizer.zero_grad()
                if path is not None:
                    run.save(path)
                break
            bar.update()
            if run.step % plan.steps_per_epoch == 0 or run.step == total:
                record = _record(run, loss, batch, held_out)
                run.history.append(record)
                if path is not None and (len(run.history) % keeping.checkpoint_every == 0 or run.step == total):
                    run.save(path)
                if path is None or run.saved_step == run.step:
                    # What is shown is released: a run that is killed now goes on from a ledger that counts it.
                    for watcher in watchers():
                        watcher.before_showing(run)
                    bar.set_postfix_str(_shown(record))
                    if shown and bar.disable:
                        # Without the training loss, which is not private: logs are kept and passed on.
                        line = f"step {run.step} of {total}: {_shown(replace(record, loss=None))}"
                        print(line, file=sys.stderr, flush=True)
                if len(run.history) % keeping.checkpoint_every == 0 or run.step == total:
                    # After the checkpoint, whose ledger counts the steps that an error would tell about.
                    run.attack()
            if run.here.on_any(interrupted()):
                if path is not None:
                    run.save(path)
                raise KeyboardInterrupt


def _drawing(run: Run) -> AbstractContextManager[None]:
    """Of a reproducible run, makes what the next step's passes draw a function of its seed."""
    seed = run.asked.privacy.reproducible_seed
    if seed is None:
        return nullcontext()
    return run.model.randomness.seeded(derived_seed(seed, "passes", run.step, run.here.world.rank))


def _step(run: Run, batch: Batch) -> Tensor:
    for watcher in watchers():
        watcher.before_step(run, batch)
    run.optimizer.zero_grad()
    total = run.optimizer.accumulate(
        batch,
        augment=run.asked.learning.augment,
        multiplicity=run.asked.learning.multiplicity,
        micro_batch_size=run.micro_batch_size,
        loss=run.loss,
    )
    run.follow_noise_schedule()
    run.optimizer.step()
    run.signal_to_noise.after_step()
    run.scheduler.step()
    if run.average is not None:
        run.average.update()
    for watcher in watchers():
        watcher.after_step(run)
    return total


def _record(run: Run, loss: Tensor, batch: Batch, held_out: Samples | None) -> EpochRecord:
    local = torch.tensor([float(loss), float(batch.mask.sum())], dtype=torch.float64)
    summed, count = run.here.total(local).tolist()
    mean = summed / max(1.0, count)
    epsilon = run.optimizer.get_epsilon(run.asked.privacy.delta)
    caps = run.optimizer.caps or None
    ratios = run.signal_to_noise.read()
    if held_out is None:
        return EpochRecord(run.step, epsilon, mean, caps=caps, signal_to_noise=ratios)
    with run.averaged():
        accuracy, validation_loss = evaluate(run.model, held_out, min(1024, run.micro_batch_size or 1024))
    return EpochRecord(run.step, epsilon, mean, accuracy, validation_loss, caps, ratios)


def _shown(record: EpochRecord) -> str:
    parts = [f"ε={record.epsilon:.3f}"]
    if record.loss is not None:
        parts.append(f"loss={record.loss:.4f}")
    if record.accuracy is not None:
        parts.append(f"accuracy={100 * record.accuracy:.2f}%")
    return ", ".join(parts)


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
