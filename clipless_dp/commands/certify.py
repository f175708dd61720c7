"""``certify``: what predictions withstand, for certain and under attack.

Prints certified and attacked accuracy of a trained model on held-out samples: by its Lipschitz constant, or with
--sigma by randomized smoothing, which any model has. With a checkpoint of training, name data and network as they were
in train.
"""

from __future__ import annotations

import argparse
import math

from torch import Tensor, nn

from clipless_dp.arguments import positive, share, whole
from clipless_dp.commands.reading import add_options, of_checkpoint, promised, refuse_early
from clipless_dp.commands.results import Opened, is_result, opened
from clipless_dp.commands.sources import Part, read_rows
from clipless_dp.errors import ConfigurationError
from clipless_dp.prediction import Whole
from clipless_dp.robustness import Curve, Smoothed, command
from clipless_dp.robustness.curves import RADII

_SMOOTHED_ROWS = 100


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_options(parser)
    parser.add_argument(
        "--sigma",
        type=float,
        help="smooth by noise of this deviation, in units of the inputs; of columns in standard deviations",
    )
    parser.add_argument("--draws", type=int, default=1000, help="noisy copies of each sample, with --sigma")
    parser.add_argument(
        "--alpha", type=float, default=1e-3, help="with which probability each smoothed radius may be wrong"
    )
    add_options(parser)


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints and writes the certificate.

    Raises:
        CheckpointError: the file of the model, or one to write, does not do.
        ConfigurationError: an option is out of range, or no constant is known of the model.
        InputError: the data does not fit.
    """
    refuse_early(options)
    if not is_result(options.checkpoint):
        if options.sigma is not None:
            raise ConfigurationError("--sigma smooths the model of a result: give the file of train --out")
        command.certify_checkpoint(*of_checkpoint(options), options)
        return
    found = opened(options.checkpoint)
    if found.known.classes is None:
        raise ConfigurationError("radii are of predictions of classes, and the model predicts numbers")
    if options.sigma is None:
        _refuse_unknown(found)
    part = read_rows(options, found.known, labelled=True, held_out=not options.all_rows)
    run = promised(found.predictor.promised)
    if options.sigma is None:
        assert found.model is not None
        command.certify_model(found.model.to(options.device), (part.rows, part.labels), part.of, run, options)
        return
    command.show_curve(_smoothed(found, part, options), part.of, run, options)


def _refuse_unknown(found: Opened) -> None:
    """Refuses a model of which nothing is certified but by smoothing."""
    before = found.model is None or (isinstance(found.predictor.net, Whole) and found.predictor.net.front is not None)
    if before or not math.isfinite(found.model.lipschitz_constant() if found.model is not None else math.inf):
        what = "statistics and features" if before else "gates, which bound gradients alone,"
        raise ConfigurationError(
            f"{found.path}: no Lipschitz constant is known through {what}: certify it by randomized smoothing, --sigma "
            "0.25 say, or train with --route orthogonal or spectral"
        )


def _smoothed(found: Opened, part: Part, options: argparse.Namespace) -> Curve:
    sigma, draws = positive("--sigma", options.sigma), whole("--draws", options.draws, 2)
    alpha = share("--alpha", options.alpha, "(0, 1)")
    if options.box is not None:
        raise ConfigurationError("--box is of attacks, which are not tried on smoothed models: leave it out")
    count = whole("--samples", options.samples or _SMOOTHED_ROWS)
    net, rows, front = _parts(found, part)
    rows, labels = rows[:count], _indices(found, part)[:count]
    smoothed = Smoothed(net.to(options.device), sigma, lipschitz=None, front=front)
    certificate = smoothed.certify(
        (rows.to(options.device), labels), min(100, draws), draws, alpha, progress=len(rows) * draws > 10**6
    )
    radii = RADII if options.radii is None else (0.0, *options.radii)
    return Curve.of(certificate, None, radii, options.level)


def _indices(found: Opened, part: Part) -> Tensor:
    if isinstance(part.labels, Tensor):
        return part.labels
    place = {label: index for index, label in enumerate(found.known.classes or ())}
    return Tensor([place[label] for label in part.labels]).long()


def _parts(found: Opened, part: Part) -> tuple[nn.Module, Tensor, nn.Module | None]:
    """What noise runs through: the network, the rows that it is added to, and what runs before the network."""
    predictor = found.predictor
    if found.model is not None:
        return found.model, part.rows, predictor.net.front if isinstance(predictor.net, Whole) else None
    rows = part.rows if predictor.encode is None else predictor.encode(part.rows)
    standardise, *behind = predictor.net.children()
    return nn.Sequential(*behind), standardise(rows), None
