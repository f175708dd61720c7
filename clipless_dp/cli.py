"""``python -m clipless_dp train``, ``certify``, ``explain``: private training, and what it gives, from a terminal."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from clipless_dp import architectures, constraints, losses, presets
from clipless_dp.architectures.small import image_classifier, two_hidden_layers
from clipless_dp.checkpoint import check_writable
from clipless_dp.datasets import NAMES, load_dataset
from clipless_dp.errors import CliplessError, ConfigurationError
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.model import DPLipModel
from clipless_dp.noise import Allocation
from clipless_dp.precision import full_precision
from clipless_dp.robustness import command
from clipless_dp.sampling.augmentation import ShiftAndFlip
from clipless_dp.sampling.people import GroupWeights
from clipless_dp.statement import report, statement_files
from clipless_dp.tables import fit_table
from clipless_dp.training import (
    OPTIMIZERS,
    Execution,
    FitResult,
    Keeping,
    Learning,
    Privacy,
    constant,
    evaluate,
    fit,
    linear_decay,
    noise_stages,
)
from clipless_dp.training.groups import names

ROUTES = ("gradient_gated", "gated", "spectral", "orthogonal")
NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": architectures.mlp,
    "residual-mlp": architectures.residual_mlp,
    "lipvgg": architectures.lipvgg,
    "lipresnet": architectures.lipresnet,
    "mixer": architectures.mixer,
}


TABLES = "tables"
"""The preset whose settings follow from the number of rows and ε: :func:`clipless_dp.tables.fit_table`."""

_TABLES_PROVENANCE = "held-out training rows of eight public tables, once for all of them (benchmarks/tables.py)"

SCHEDULES = {"linear": linear_decay, "constant": constant}
_OF_PRESETS = ("route", "network", "tau", "input_norm")
"""What a preset decides, and is not changed beside it."""

_SCHEDULE = "lr_schedule"
"""The option that names a ``scheduler``."""

_TUNED = (*(_SCHEDULE if name == "scheduler" else name for name in names(Learning)), "flip")
"""What a preset proposes, and an option replaces."""


_GRADIENT_FLOOR = 0.3
"""Share of a gradient's bound from which gates normalise it, as presets of networks that are trained whole have it."""

_CHOSEN = "(default: from public numbers: rows, ε, δ, shapes)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 after a refusal on standard error."""
    parser, train = _parser()
    options = parser.parse_args(arguments)
    if options.command == "train" and options.preset is not None:
        # Read again, so that what was given is told from what is a default.
        train.set_defaults(**dict.fromkeys((*_OF_PRESETS, *_TUNED)))
        options = parser.parse_args(arguments)
    try:
        return _train(options) if options.command == "train" else _read(options)
    except (CliplessError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if options.command != "train":
            print("interrupted", file=sys.stderr)
            return 130
        saved = options.checkpoint is not None and options.checkpoint.exists()
        hint = "the same command goes on from the checkpoint" if saved else "nothing was saved: pass --checkpoint FILE"
        print(f"interrupted; {hint}", file=sys.stderr)
        return 130


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _factors(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        return float(first), float(last)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, two factors such as 1.5:0.7") from None


def _parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m clipless_dp",
        description="Differentially private training without per-sample clipping.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a classifier privately",
        formatter_class=_Formatter,
    )
    for add in (_add_data, _add_privacy, _add_model, _add_learning, _add_execution, _add_keeping):
        add(train)
    certify = commands.add_parser(
        "certify",
        help="what a checkpoint's predictions withstand, for certain and under attack",
        description="Prints certified and attacked accuracy of a checkpoint on held-out samples. Name data and network "
        "as they were in train.",
        formatter_class=_Formatter,
    )
    command.add_options(certify)
    explain = commands.add_parser(
        "explain",
        help="what a checkpoint's predictions look at, and what would change them",
        description="Prints how far predictions on held-out samples are from changing, for certain and along the "
        "gradient, and how good maps of gradients are. Name data and network as they were in train.",
        formatter_class=_Formatter,
    )
    command.add_explain_options(explain)
    for reader in (certify, explain):
        _add_named_data(reader, "--data", "--dataset")
        _add_network(reader)
        reader.add_argument("--preset", choices=tuple(presets.PRESETS), help="network and bounds of a preset")
        reader.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to run on")
    return parser, train


def _add_data(train: argparse.ArgumentParser) -> None:
    _add_named_data(train, "--dataset")
    train.add_argument(
        "--dataset-size",
        type=int,
        help="public number of training samples, with --groups of people (default: their number, taken to be public)",
    )
    train.add_argument(
        "--groups", metavar="ARRAY", help="array of an NPZ file that says whose each row is: ε is about people then"
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


def _add_named_data(train: argparse.ArgumentParser, *flags: str) -> None:
    named = "|".join((*NAMES, "PATH.npz"))
    train.add_argument(*flags, dest="dataset", required=True, metavar=named, help="named data, or a file")
    train.add_argument("--data-dir", type=Path, help="folder with local copies; otherwise named sets are downloaded")
    train.add_argument(
        "--classes", type=int, help="number of classes of an NPZ file, which must be public (--preset tables: 2)"
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
        help="front-end, network, bounds and settings; options change these",
    )
    train.add_argument("--cache-dir", type=Path, help="folder for the features of a preset; it holds private data then")
    _add_network(train)
    train.add_argument("--init-seed", type=int, help="seed of the initial weights, which no data enters")


def _add_network(train: argparse.ArgumentParser) -> None:
    train.add_argument("--route", choices=ROUTES, default="gradient_gated", help="what bounds the gradients")
    train.add_argument(
        "--network", choices=("small", *NETWORKS), default="small", help="architecture; small: few layers"
    )
    train.add_argument("--tau", type=float, default=8.0, help="temperature of the cross-entropy")
    train.add_argument("--input-norm", type=float, help="cap of a sample's norm (default: √entries)")


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
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to train on")


def _add_keeping(train: argparse.ArgumentParser) -> None:
    train.add_argument("--checkpoint", type=Path, help="file to write to and to resume from")
    train.add_argument("--report", type=Path, metavar="PATH", help="write the privacy statement: PATH.md, .json, .html")
    train.add_argument("--quiet", action="store_true", help="no progress bar, no table")


def _train(options: argparse.Namespace) -> int:
    _require_device(options.device)
    for file in () if options.report is None else statement_files(options.report):
        check_writable(file)
    classes = options.classes
    if classes is None and options.preset == TABLES and options.dataset not in NAMES:
        classes = 2
    data = load_dataset(options.dataset, options.data_dir, classes=classes, groups=options.groups)
    if options.init_seed is not None:
        torch.manual_seed(options.init_seed)
    # The command line has an option for most arguments: some go by another name, or in other words.
    known = names(Privacy, Execution, Keeping)
    given = {name: value for name, value in vars(options).items() if name in known}
    given |= {"groups": data.groups, "audit": options.audit != "off" and options.audit, "progress": not options.quiet}
    arguments: dict[str, Any] = {**given, **_tuned(options)}
    provenance: str | None = None
    if options.preset is None:
        model = _model(options, tuple(data.inputs.shape[1:]), data.classes).to(options.device)
        _show(model, options)
        result = fit(model, data.train, **arguments)
        reached = _reached(*evaluate(model, data.test))
    else:
        fixed = [f"--{name.replace('_', '-')}" for name in _OF_PRESETS if getattr(options, name) is not None]
        if fixed:
            raise ConfigurationError(
                f"--preset {options.preset} decides what {', '.join(fixed)} would: leave out one or the other"
            )
        if options.preset == TABLES:
            provenance, summary = _TABLES_PROVENANCE, "rows of any scale, labels 0 and 1: charged statistics, one layer"
            classifier = fit_table(data.inputs.to(options.device), data.targets.to(options.device), **arguments)
            result = classifier.result
            scores = classifier.scores(data.test_inputs.to(options.device)).cpu()
            reached = f"AUROC     {100 * _auroc(scores, data.test_targets):.2f} % on"
        else:
            preset = presets.get(options.preset)
            provenance, summary = preset.provenance, preset.summary
            trained = preset.fit(
                data.train, outputs=data.classes, cache_dir=options.cache_dir, device=options.device, **arguments
            )
            result = trained.result
            reached = _reached(*trained.evaluate(data.test))
        if not options.quiet:
            print(f"preset {options.preset}: {summary}", f"chosen on: {provenance}", sep="\n", end="\n\n")
        _show(result.optimizer.model, options)
    _tell(options, result, f"test {reached} {len(data.test_targets)} held-out samples", provenance)
    return 0


def _read(options: argparse.Namespace) -> int:
    """Runs what reads a checkpoint: ``certify`` and ``explain``."""
    _require_device(options.device)
    preset = None if options.preset is None else presets.get(options.preset)
    if preset is not None:
        command.refuse_front(preset)
    data = load_dataset(options.dataset, options.data_dir, classes=options.classes)
    shape = tuple(data.inputs.shape[1:])
    model = _model(options, shape, data.classes) if preset is None else preset.model(shape, data.classes)
    act = command.certify_checkpoint if options.command == "certify" else command.explain_checkpoint
    act(model.to(options.device), data, options)
    return 0


def _tell(options: argparse.Namespace, result: FitResult, reached: str, provenance: str | None) -> None:
    """Prints what was reached and spent, and writes the statement."""
    print(reached)
    one = "add-or-remove-one" + (" person" if result.optimizer.unit == "person" else "")
    print(f"epsilon        {result.epsilon:.4f} ({one}, {options.accountant} accountant)")
    print(f"delta          {result.delta:g}")
    print(
        f"mechanism      {result.steps} Poisson steps, q = {result.sample_rate:.6g}, σ = {result.noise_multiplier:.4f}"
    )
    if (learning := result.learning) is not None and isinstance(learning.optimizer, str):
        momentum = f", momentum {learning.momentum:g}" if learning.optimizer == "sgd" else ""
        print(
            f"settings       {learning.epochs:.4g} epochs, batches of {learning.batch_size}, {learning.optimizer}, "
            f"learning rate {learning.lr:.4g}{momentum}"
        )
    missing = "none (pass --checkpoint FILE)" if options.checkpoint is None else "none: the last one was not written"
    print(f"checkpoint     {result.checkpoint if result.checkpoint is not None else missing}")
    if result.audits:
        print(f"audit          {str(result.audits[-1]).splitlines()[-1]}")
    if options.report is not None:
        statement = report(
            result.optimizer,
            options.report,
            delta=result.delta,
            audit=result.audits[-1:],
            notes=() if provenance is None else (f"Hyper-parameters, of the preset {options.preset}: {provenance}",),
        )
        print(f"statement      {', '.join(map(str, statement.files))}")


def _reached(accuracy: float | None, loss: float) -> str:
    return f"loss      {loss:.6f} on" if accuracy is None else f"accuracy  {100 * accuracy:.2f} % of"


def _auroc(scores: Tensor, labels: Tensor) -> float:
    """Share of pairs of a positive and a negative row that the scores order rightly, ties counting half."""
    positive = labels == 1
    pairs = int(positive.sum()) * int((~positive).sum())
    ranks = torch.from_numpy(rankdata(scores.double().numpy()))
    above = float(ranks[positive].sum()) - int(positive.sum()) * (int(positive.sum()) + 1) / 2
    return above / pairs if pairs else math.nan


def _show(model: DPLipModel, options: argparse.Namespace) -> None:
    if not options.quiet:
        with full_precision():
            print(model.sensitivity(), architectures.summary(model), sep="\n")


def _model(options: argparse.Namespace, shape: tuple[int, ...], classes: int) -> DPLipModel:
    if len(shape) not in (1, 3):
        raise ConfigurationError(
            f"no network here takes samples of shape {shape}: give columns (N, columns), or images as uint8 (N, H, W) "
            "or (N, H, W, 3), or as numbers (N, channels, H, W)"
        )
    small = image_classifier if len(shape) == 3 else two_hidden_layers
    net: nn.Module = NETWORKS.get(options.network, small)(shape, classes)
    constraint: constraints.Constraint | None = None
    if options.route == "gradient_gated":
        net = gradient_gated(net, floor=_GRADIENT_FLOOR)
    elif options.route == "gated":
        net = gated(net, cotangent_mode="normalize")
    else:
        constraint = constraints.Spectral() if options.route == "spectral" else constraints.Orthogonal()
    return DPLipModel(
        net,
        input_shape=shape,
        input_norm=options.input_norm if options.input_norm is not None else math.sqrt(math.prod(shape)),
        loss=losses.TauCrossEntropy(options.tau),
        constraint=constraint,
    )


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


def _require_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()  # A meta device has no numbers to read.
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {name}: {str(error).splitlines()[0]}") from error
