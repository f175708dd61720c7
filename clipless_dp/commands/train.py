"""``train``: train a classifier or a regression privately.

Trains on data with nothing but ε and δ: columns by charged statistics and one layer, images by features without a
privacy cost. A preset or a network of your own may be named in its place. About a fifth of the rows is held out where
the file does not say which, to show what was reached.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from clipless_dp import architectures, presets
from clipless_dp.checkpoint import save_checkpoint
from clipless_dp.commands import options as shared
from clipless_dp.commands.choosing import TABLES, Choice, choose, settings_of
from clipless_dp.commands.held_out import SUFFIX, HeldOut, file_beside
from clipless_dp.commands.networks import built_from, model_of
from clipless_dp.commands.results import MADE
from clipless_dp.commands.scores import scores_of
from clipless_dp.commands.sources import Material, read_to_train
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import DPLipModel
from clipless_dp.noise import Allocation
from clipless_dp.precision import full_precision
from clipless_dp.sampling.augmentation import ShiftAndFlip
from clipless_dp.sampling.people import GroupWeights
from clipless_dp.statement import report, statement_files
from clipless_dp.tables import TableModel, fit_table
from clipless_dp.tables.kept import files_beside
from clipless_dp.training import (
    OPTIMIZERS,
    Execution,
    FitResult,
    Keeping,
    Learning,
    Privacy,
    constant,
    fit,
    linear_decay,
    noise_stages,
)
from clipless_dp.training.fit import require_trainable
from clipless_dp.training.groups import Asked, names

SCHEDULES = {"linear": linear_decay, "constant": constant}
_OF_PRESETS = ("route", "network", "tau", "input_norm")
"""What a preset decides, and is not changed beside it; of these alone a network is built."""

_SCHEDULE = "lr_schedule"
"""The option that names a ``scheduler``."""

_TUNED = (*(_SCHEDULE if name == "scheduler" else name for name in names(Learning)), "flip")
"""What a preset proposes, and an option replaces."""

_Trained = FitResult | presets.Trained | TableModel

_CHOSEN = "(default: from public numbers: rows, ε, δ, shapes)"


def _factors(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, two factors such as 1.5:0.7") from None


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    shared.add_data(parser)
    for part in (_add_people, _add_privacy, _add_model, _add_learning, _add_execution, _add_keeping):
        part(parser)
    parser.set_defaults(parser=parser)


def _add_people(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--dataset-size",
        type=int,
        help="public number of training samples, with --groups of people (default: their number, taken to be public)",
    )
    train.add_argument(
        "--groups",
        metavar="NAME",
        help="column, or array of an NPZ file, that says whose each row is: ε is about people then",
    )
    train.add_argument(
        "--rows-per-group", type=int, default=Privacy.rows_per_group, help="rows of a person in a step, at most"
    )
    train.add_argument(
        "--group-weights",
        choices=get_args(GroupWeights),
        default=Privacy.group_weights,
        help="mean: of a person's rows that enter; cap: each weighs one over --rows-per-group",
    )


def _add_privacy(train: argparse.ArgumentParser) -> None:
    train.add_argument("--epsilon", type=float, required=True, help="target ε")
    train.add_argument("--delta", type=float, required=True, help="target δ, below one over the number of samples")
    train.add_argument("--accountant", choices=("prv", "rdp", "auto"), default=Privacy.accountant, help="engine")
    train.add_argument(
        "--audit",
        choices=("off", "quick", "full"),
        nargs="?",
        const="full",
        default=Privacy.audit,
        help="attacks on the bounds: quick, before training; full, which --audit alone means, at checkpoints too",
    )
    train.add_argument("--noise", choices=("system", "secure"), help="generator of the noise (default: system)")
    train.add_argument(
        "--reproducible-seed",
        type=int,
        help="makes noise and batches predictable: for experiments, not for releases",
    )


def _add_model(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--preset",
        choices=(*presets.PRESETS, TABLES),
        help="front-end, network, bounds and settings; options change these (default: by the kind of data)",
    )
    train.add_argument("--cache-dir", type=Path, help="folder for the features of a preset; it holds private data then")
    shared.add_network(train)
    train.add_argument("--init-seed", type=int, help="seed of the initial weights, which no data enters")


def _add_learning(train: argparse.ArgumentParser) -> None:
    train.add_argument("--epochs", type=float, help=f"passes over the data, in expectation {_CHOSEN}")
    train.add_argument("--batch-size", type=int, help=f"expected batch size {_CHOSEN}")
    train.add_argument("--optimizer", choices=OPTIMIZERS, help=f"what takes the noisy gradients {_CHOSEN}")
    train.add_argument("--lr", type=float, help=f"peak learning rate {_CHOSEN}")
    train.add_argument(
        "--lr-schedule", choices=tuple(SCHEDULES), default="linear", help="linear: rises briefly, then falls to zero"
    )
    train.add_argument("--momentum", type=float, help=f"momentum of SGD {_CHOSEN}")
    train.add_argument(
        "--noise-schedule",
        type=_factors,
        metavar="FIRST:LAST",
        help="factors between which the noise goes in ten stages; ε stays the same",
    )
    train.add_argument(
        "--allocation",
        choices=get_args(Allocation),
        default=Learning.allocation,
        help="how noise is shared among the parameters",
    )
    train.add_argument("--ema", type=float, metavar="DECAY", help="moving average of the weights, 0.99 say")
    train.add_argument("--augment", type=int, metavar="PIXELS", help="views shifted by up to so many pixels")
    train.add_argument("--flip", action="store_true", default=None, help="views mirrored left and right, every other")
    train.add_argument(
        "--multiplicity", type=int, default=Learning.multiplicity, help="views of a sample averaged in its own gradient"
    )


def _add_execution(train: argparse.ArgumentParser) -> None:
    train.add_argument("--micro-batch-size", type=int, help="rows processed at once")
    train.add_argument(
        "--memory-budget", type=float, metavar="BYTES", help="chooses --micro-batch-size: memory of a step's gradients"
    )
    shared.add_device(train)


def _add_keeping(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--out", type=Path, metavar="FILE", help="write what predicts, for evaluate, predict, certify, …"
    )
    train.add_argument("--checkpoint", type=Path, help="file to write to and to resume from")
    train.add_argument("--report", type=Path, metavar="PATH", help="write the privacy statement: PATH.md, .json, .html")
    train.add_argument("--quiet", action="store_true", help="no progress bar, no table")


def given_of_networks(only: argparse.Namespace) -> list[str]:
    """Which options of a network were given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in _OF_PRESETS if getattr(only, name) is not None]


def only_given() -> dict[str, Any]:
    """Defaults of a second reading, which tells what was given from what is a default."""
    return dict.fromkeys((*_OF_PRESETS, *_TUNED))


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Trains, prints what was reached and spent, and writes what was asked for.

    Args:
        options: as they were read.
        only: the same, ``None`` where a default stands.

    Raises:
        CliplessError: something does not fit; before ε is spent.
    """
    shared.require_device(options.device)
    statement = [] if options.report is None else [*statement_files(options.report)]
    beside = files_beside(options.checkpoint)
    private = [file_beside(options.out), file_beside(options.checkpoint)]
    shared.require_writable([options.out, options.checkpoint, *beside, *private, *statement], [options.dataset])
    built = given_of_networks(only)
    if options.preset is not None and built:
        raise ConfigurationError(
            f"--preset {options.preset} decides what {', '.join(built)} would: leave out one or the other"
        )
    # The command line has an option for most arguments: some go by another name, or in other words.
    known = names(Privacy, Execution, Keeping)
    given = {name: value for name, value in vars(options).items() if name in known and name != "groups"}
    given |= {"audit": options.audit != "off" and options.audit, "progress": not options.quiet}
    people = ("rows_per_group", "group_weights") if options.groups is not None else ()
    # Before the data is read; what is about people is looked at with whose rows are.
    Asked.of({name: value for name, value in {**given, **_tuned(options)}.items() if name not in people})
    data = read_to_train(options)
    # Views are of images, which a network that is trained whole reads.
    whole = bool(built) or (options.preset is None and (only.augment, only.flip) != (None, None))
    choice = choose(data.shape, columns=data.encoding is not None, preset=options.preset, network=whole)
    if options.init_seed is not None:
        torch.manual_seed(options.init_seed)
    if not options.quiet and choice.told:
        print(*choice.told, sep="\n", end="\n\n")
    arguments: dict[str, Any] = {**given, "groups": data.groups, **_tuned(options if choice.name is None else only)}
    with _held_out(options.checkpoint, data) as held_out:
        trained, made = _fitted(options, data, choice, arguments)
    result = trained if isinstance(trained, FitResult) else trained.result
    if choice.name is not None:
        _show(result.optimizer.model, options)
    classes = data.classes if trained.predictor().link.is_of_classes else None
    # A table knows its labels.
    labels: dict[str, Any] = {} if choice.name == TABLES else {"classes": classes}
    if options.out is not None:
        content = trained.content(**labels, notes=_notes(choice))
        content["settings"] = {**content["settings"], MADE: {**made, "label": data.label}}
        save_checkpoint(options.out, content)
        _keep(options.out, held_out, of_model=True)
    reached = scores_of(trained.predictor(**labels), data.test, classes).lines
    if isinstance(trained, presets.Trained) and classes is None and data.split is not None:
        reached.insert(0, f"loss      {trained.evaluate(data.split.test)[1]:.6f} on {data.test.told}")
    _tell(options, result, [f"test {line}" for line in reached], _notes(choice))


@contextmanager
def _held_out(checkpoint: Path | None, data: Material) -> Iterator[HeldOut | None]:
    """Which rows nothing of a run is computed from, kept beside its checkpoint from before it begins.

    Yields:
        What is held out; ``None``: the data has a test part, or nothing says what the run began with.

    Raises:
        ConfigurationError: the checkpoint's training began with others held out.
        CheckpointError: what is kept beside it cannot be read.
    """
    if checkpoint is None:
        yield data.held_out
        return
    if not _has_begun(checkpoint):
        _keep(checkpoint, data.held_out)
        try:
            yield data.held_out
        finally:
            if not _has_begun(checkpoint):
                _keep(checkpoint, None)
        return
    kept = HeldOut.of_checkpoint(checkpoint)
    if kept is not None and data.held_out is not None and kept != data.held_out:
        raise ConfigurationError(
            f"other rows of {data.name} are held out than when the training of {checkpoint} began, so that figures of "
            "these would be of rows that it was trained on: give the same file, as it was, or choose another checkpoint"
        )
    yield None if kept is None else data.held_out


def _has_begun(checkpoint: Path) -> bool:
    """Whether anything was released, or trained, under a checkpoint."""
    return any(file.exists() for file in (checkpoint, *files_beside(checkpoint)))


def _keep(path: Path, held_out: HeldOut | None, *, of_model: bool = False) -> None:
    """Writes beside a file which rows were held out; what is there of another training goes."""
    private = Path(f"{path}{SUFFIX}")
    if held_out is None:
        private.unlink(missing_ok=True)
    else:
        held_out.write(private, path if of_model else None)


def _fitted(
    options: argparse.Namespace, data: Material, choice: Choice, arguments: dict[str, Any]
) -> tuple[_Trained, dict[str, Any]]:
    """What was trained, and what its file needs besides."""
    if choice.name is None:
        assert data.classes is not None
        model = model_of(options, data.shape, len(data.classes)).to(options.device)
        _show(model, options)
        result = fit(model, (data.train.rows, data.train.labels), **arguments)
        return result, built_from(options, data.shape, len(data.classes))
    if choice.name == TABLES:
        return _table(options, data, arguments), {}
    assert data.split is not None
    preset = presets.get(choice.name)
    size = _public_size(options, data)
    batch = preset.arguments(size, **arguments).get("batch_size")
    if arguments.get("batch_size") is None and batch is not None:
        # Presets are made for large data sets; of a small one a draw has all rows in expectation.
        arguments["batch_size"] = min(size, batch)
    _require_trainable(preset, data, size, arguments)
    split = data.split
    more = {"outputs": split.classes, "cache_dir": options.cache_dir, "device": options.device}
    return preset.fit(split.train, **more, **arguments), {}


def _public_size(options: argparse.Namespace, data: Material) -> int:
    """The public number of rows, or people."""
    if options.dataset_size is not None:
        return int(options.dataset_size)
    return len(data.train) if data.groups is None else len({*data.groups.tolist()})


def _table(options: argparse.Namespace, data: Material, arguments: dict[str, Any]) -> TableModel:
    rows, labels = data.train.rows, data.train.labels
    if isinstance(rows, Tensor):
        rows, labels = rows.to(options.device), labels.to(options.device)
    more: dict[str, Any] = {"encoding": data.encoding, "target_range": data.target_range}
    if data.target_range is None and data.classes != (0, 1):
        more["classes"] = data.classes
    elif data.encoding is not None and data.target_range is None:
        labels = torch.tensor(labels)
    trained: TableModel = fit_table(rows, labels, **more, **arguments)
    return trained


def _require_trainable(preset: presets.Preset, data: Material, size: int, arguments: dict[str, Any]) -> None:
    """Refuses arguments before a statistic is released for them, on made-up rows."""
    with torch.random.fork_rng(devices=[]):
        shape = tuple(preset.features(torch.zeros(1, *data.shape)).shape[1:])
        assert data.split is not None
        model = preset.model(shape, data.split.classes)
        rows = model.random_inputs(2, torch.Generator().manual_seed(0))
        targets = torch.zeros(2) if preset.name == "regression" else torch.zeros(2, dtype=torch.long)
        people = () if data.groups is None else ("rows_per_group", "group_weights")
        left_out = ("groups", "noise", "checkpoint", "validation", "device", *people)
        tried = {name: value for name, value in arguments.items() if name not in left_out}
        tried = preset.arguments(size, **{**tried, "dataset_size": size, "accountant": "rdp", "audit": False})
        require_trainable(model, (rows, targets), **tried)


def _notes(choice: Choice) -> list[str]:
    return [] if choice.provenance is None else [f"Hyper-parameters, of the preset {choice.name}: {choice.provenance}"]


def _tell(options: argparse.Namespace, result: FitResult, reached: list[str], notes: list[str]) -> None:
    """Prints what was reached and spent, and writes the statement."""
    print(*reached, sep="\n")
    one = "add-or-remove-one" + (" person" if result.optimizer.unit == "person" else "")
    print(f"epsilon        {result.epsilon:.4f} ({one}, {options.accountant} accountant)")
    print(f"delta          {result.delta:g}")
    print(
        f"mechanism      {result.steps} Poisson steps, q = {result.sample_rate:.6g}, σ = {result.noise_multiplier:.4f}"
    )
    if (told := settings_of(result)) is not None:
        print(f"settings       {told}")
    missing = "none (pass --checkpoint FILE)" if options.checkpoint is None else "none: the last one was not written"
    print(f"checkpoint     {result.checkpoint if result.checkpoint is not None else missing}")
    print(f"result         {options.out if options.out is not None else 'none (pass --out FILE)'}")
    if (private := file_beside(options.out)) is not None and private.exists():
        print(f"held out       {private} (private: it stays with the data)")
    if result.audits:
        print(f"audit          {str(result.audits[-1]).splitlines()[-1]}")
    if options.report is not None:
        statement = report(result.optimizer, options.report, delta=result.delta, audit=result.audits[-1:], notes=notes)
        print(f"statement      {', '.join(map(str, statement.files))}")


def _show(model: DPLipModel, options: argparse.Namespace) -> None:
    if not options.quiet:
        with full_precision():
            print(model.sensitivity(), architectures.summary(model), sep="\n")


def _tuned(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``fit`` that were given, or have a default."""
    tuned = {name: value for name in _TUNED if (value := getattr(options, name)) is not None}
    if (schedule := tuned.pop(_SCHEDULE, None)) is not None:
        tuned["scheduler"] = SCHEDULES[schedule]
    if (factors := tuned.pop("noise_schedule", None)) is not None:
        tuned["noise_schedule"] = noise_stages(*factors)
    flip = tuned.pop("flip", False)
    if flip or "augment" in tuned:
        tuned["augment"] = ShiftAndFlip(tuned.get("augment", 0), flip=flip)
    return tuned
