"""``python -m clipless_dp train``: private training from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from clipless_dp import architectures, constraints, layers, losses
from clipless_dp.checkpoint import check_writable
from clipless_dp.datasets import NAMES, load_dataset
from clipless_dp.errors import CliplessError, ConfigurationError
from clipless_dp.gating import gated
from clipless_dp.model import DPLipModel
from clipless_dp.precision import full_precision
from clipless_dp.report import report, statement_files
from clipless_dp.training import evaluate, fit

ROUTES = ("gated", "spectral", "orthogonal")
NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": architectures.mlp,
    "residual-mlp": architectures.residual_mlp,
    "lipvgg": architectures.lipvgg,
    "lipresnet": architectures.lipresnet,
    "mixer": architectures.mixer,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, or 2 after a refusal on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return _train(options)
    except (CliplessError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = options.checkpoint is not None and options.checkpoint.exists()
        hint = "the same command goes on from the checkpoint" if saved else "nothing was saved: pass --checkpoint FILE"
        print(f"interrupted; {hint}", file=sys.stderr)
        return 130


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
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
    train.add_argument("--dataset", required=True, metavar="|".join((*NAMES, "PATH.npz")), help="data to train on")
    train.add_argument("--data-dir", type=Path, help="folder with local copies; otherwise named sets are downloaded")
    train.add_argument("--epsilon", type=float, required=True, help="target ε")
    train.add_argument("--delta", type=float, required=True, help="target δ, below one over the number of samples")
    train.add_argument("--route", choices=ROUTES, default="gated", help="what bounds the gradients")
    train.add_argument(
        "--network", choices=("small", *NETWORKS), default="small", help="architecture; small: few layers"
    )
    train.add_argument("--epochs", type=float, default=20, help="passes over the data, in expectation")
    train.add_argument("--batch-size", type=int, default=1024, help="expected batch size")
    train.add_argument("--micro-batch-size", type=int, help="rows processed at once")
    train.add_argument("--lr", type=float, default=0.5, help="peak learning rate")
    train.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD")
    train.add_argument("--tau", type=float, default=8.0, help="temperature of the cross-entropy")
    train.add_argument("--input-norm", type=float, help="cap of a sample's norm (default: √entries)")
    train.add_argument("--accountant", choices=("prv", "rdp", "auto"), default="prv", help="engine")
    train.add_argument(
        "--allocation",
        choices=("global", "per-layer", "min-variance"),
        default="min-variance",
        help="how noise is shared among the parameters",
    )
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to train on")
    train.add_argument("--checkpoint", type=Path, help="file to write to and to resume from")
    train.add_argument("--report", type=Path, metavar="PATH", help="write the privacy statement: PATH.md, .json, .html")
    train.add_argument("--audit", action="store_true", help="attack the bounds before training and at checkpoints")
    train.add_argument("--init-seed", type=int, help="seed of the initial weights, which no data enters")
    train.add_argument("--noise", choices=("system", "secure"), help="generator of the noise (default: system)")
    train.add_argument(
        "--reproducible-seed",
        type=int,
        help="makes noise and batches predictable: for experiments, not for releases",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    return parser


def _train(options: argparse.Namespace) -> int:
    _require_device(options.device)
    for file in () if options.report is None else statement_files(options.report):
        check_writable(file)
    data = load_dataset(options.dataset, options.data_dir)
    if options.init_seed is not None:
        torch.manual_seed(options.init_seed)
    shape = tuple(data.inputs.shape[1:])
    if len(shape) not in (1, 3):
        raise ConfigurationError(
            f"no network here takes samples of shape {shape}: give columns (N, columns), or images as uint8 (N, H, W) "
            "or (N, H, W, 3), or as numbers (N, channels, H, W)"
        )
    small = image_classifier if len(shape) == 3 else table_classifier
    net: nn.Module = NETWORKS.get(options.network, small)(shape, data.classes)
    constraint: constraints.Constraint | None = None
    if options.route == "gated":
        net = gated(net, cotangent_mode="normalize")
    else:
        constraint = constraints.Spectral() if options.route == "spectral" else constraints.Orthogonal()
    model = DPLipModel(
        net,
        input_shape=shape,
        input_norm=options.input_norm if options.input_norm is not None else float(data.inputs[0].numel()) ** 0.5,
        loss=losses.TauCrossEntropy(options.tau),
        constraint=constraint,
    ).to(options.device)
    if not options.quiet:
        with full_precision():
            print(model.sensitivity(), architectures.summary(model), sep="\n")
    result = fit(
        model,
        data.train,
        epsilon=options.epsilon,
        delta=options.delta,
        epochs=options.epochs,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        lr=options.lr,
        momentum=options.momentum,
        accountant=options.accountant,
        allocation=options.allocation,
        checkpoint=options.checkpoint,
        reproducible_seed=options.reproducible_seed,
        noise=options.noise,
        audit=options.audit,
        progress=not options.quiet,
    )
    accuracy, _ = evaluate(model, data.test)
    assert accuracy is not None
    print(f"test accuracy  {100 * accuracy:.2f} % of {len(data.test_targets)} held-out samples")
    print(f"epsilon        {result.epsilon:.4f} (add-or-remove-one, {options.accountant} accountant)")
    print(f"delta          {result.delta:g}")
    print(
        f"mechanism      {result.steps} Poisson steps, q = {result.sample_rate:.6g}, σ = {result.noise_multiplier:.4f}"
    )
    missing = "none (pass --checkpoint FILE)" if options.checkpoint is None else "none: the last one was not written"
    print(f"checkpoint     {result.checkpoint if result.checkpoint is not None else missing}")
    if result.audits:
        print(f"audit          {str(result.audits[-1]).splitlines()[-1]}")
    if options.report is not None:
        statement = report(result.optimizer, options.report, delta=result.delta, audit=result.audits[-1:])
        print(f"statement      {', '.join(map(str, statement.files))}")
    return 0


def _require_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()  # A meta device has no numbers to read.
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {name}: {str(error).splitlines()[0]}") from error


def image_classifier(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Two convolutions and two dense layers, for images of 8×8 to 64×64.

    No layer has a bias on a map: its sensitivity grows with the root of the number of positions.
    """
    channels, height, width = shape
    kernel = 8 if min(height, width) >= 16 else 3
    features = nn.Sequential(
        nn.Conv2d(channels, 16, kernel, stride=2, padding=kernel // 2 - (kernel % 2 == 0), bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4 if kernel == 8 else 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
    )
    with torch.no_grad():
        width_out = features(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(*features, nn.Linear(width_out, 32, bias=False), nn.ReLU(), nn.Linear(32, classes, bias=False))


def table_classifier(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Two hidden layers of 64."""
    (columns,) = shape
    return nn.Sequential(
        nn.Linear(columns, 64),
        layers.GroupSort(2),
        nn.Linear(64, 64),
        layers.GroupSort(2),
        nn.Linear(64, classes),
    )
