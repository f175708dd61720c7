"""``explain``: what predictions look at, and what would change them.

Prints how far predictions on held-out samples are from changing, for certain and along the gradient, and how good maps
of gradients are. With a checkpoint of training, name data and network as they were in train.
"""

from __future__ import annotations

import argparse

from clipless_dp.commands.reading import add_options, of_checkpoint, refuse_early
from clipless_dp.commands.results import is_result, opened, require_model
from clipless_dp.commands.sources import read_rows
from clipless_dp.errors import ConfigurationError
from clipless_dp.prediction import Whole
from clipless_dp.robustness import command


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_explain_options(parser)
    add_options(parser)


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints and writes what was found.

    Raises:
        CheckpointError: the file of the model, or one to write, does not do.
        ConfigurationError: an option is out of range, or the model reads features.
        InputError: the data does not fit.
    """
    refuse_early(options)
    if not is_result(options.checkpoint):
        command.explain_checkpoint(*of_checkpoint(options), options)
        return
    found = opened(options.checkpoint)
    model = require_model(found, "explain")
    if isinstance(found.predictor.net, Whole) and found.predictor.net.front is not None:
        raise ConfigurationError(
            f"{found.path}: the model reads features, and maps of their gradients say nothing of samples: train with "
            "--route, or a preset without a front-end"
        )
    part = read_rows(options, found.known, labelled=True, held_out=not options.all_rows)
    command.explain_model(model.to(options.device), part.rows, part.of, options)
