"""``audit``: attacks on the bounds that ε rests on.

Tries to break the bounds of a trained model: its own layers, gates, loss and weights, on made-up samples; no data is
read. Exit status 1 where an attack passes a bound.
"""

from __future__ import annotations

import argparse

from clipless_dp import audit
from clipless_dp.arguments import whole
from clipless_dp.commands import options as shared
from clipless_dp.commands.results import opened
from clipless_dp.tables import bounded_table

_QUICK = 200
"""Passes of the quick form."""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    shared.add_result(parser)
    parser.add_argument("--attempts", type=int, default=_QUICK, help="about so many passes, begun within two seconds")
    parser.add_argument(
        "--full", action="store_true", help="all attacks, gradient ascents too, in place of the quick form"
    )


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints what the attacks reached.

    Raises:
        AuditError: one passed a bound.
        CheckpointError: the file of the model does not do.
    """
    attempts = None if options.full else whole("--attempts", options.attempts)
    found = opened(options.result)
    model = found.model if found.model is not None else bounded_table(found.content, found.predictor)
    print(audit.sensitivity(model, attempts=attempts))
    print(f"model     {found.privacy}")
