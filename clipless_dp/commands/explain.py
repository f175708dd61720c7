"""``explain``: what predictions look at, and what would change them."""

from __future__ import annotations

import argparse
from typing import Any

from clipless_dp.commands import options as shared
from clipless_dp.commands.held_out import file_beside
from clipless_dp.commands.reading import add_options, of_checkpoint
from clipless_dp.commands.results import is_result, opened, require_model
from clipless_dp.commands.sources import read_rows
from clipless_dp.errors import ConfigurationError
from clipless_dp.prediction import Whole
from clipless_dp.robustness import command


def add(commands: Any) -> None:
    """Adds the command to a parser."""
    explain = commands.add_parser(
        "explain",
        help="what predictions look at, and what would change them",
        description="Prints how far predictions on held-out samples are from changing, for certain and along the "
        "gradient, and how good maps of gradients are. With a checkpoint of training, name data and network as they "
        "were in train.",
        formatter_class=shared.Formatter,
    )
    command.add_explain_options(explain)
    add_options(explain)
    explain.set_defaults(run=run)


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints and writes what was found.

    Raises:
        CheckpointError: the file of the model, or one to write, does not do.
        ConfigurationError: an option is out of range, or the model reads features.
        InputError: the data does not fit.
    """
    shared.require_device(options.device)
    command.check_files(options.out, options.plot)
    shared.require_writable(
        [options.out, options.plot], [options.dataset, options.checkpoint, file_beside(options.checkpoint)]
    )
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
