"""``python -m clipless_dp``: a life of a private model from a terminal, from a plan to what is released."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clipless_dp.commands import audit, certify, evaluate, explain, export, plan, predict, presets, report, train
from clipless_dp.commands.options import Formatter
from clipless_dp.errors import AuditError, CliplessError

COMMANDS = (presets, plan, train, evaluate, predict, certify, explain, audit, report, export)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0; 1 of an audit that found something; 2 after a refusal."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        only = options
        if hasattr(options, "parser"):
            # Read again, so that what was given is told from what is a default.
            options.parser.set_defaults(**train.only_given())
            only = parser.parse_args(arguments)
        options.run(options, only)
    except AuditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (CliplessError, ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(_interrupted(options), file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clipless_dp",
        description="Differentially private training without per-sample clipping: docs/commands.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        # What a command says of itself on top of its module is what --help shows.
        title, _, description = (command.__doc__ or "").partition("\n\n")
        own = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=title.partition(": ")[2].rstrip("."),
            description=description.strip() or None,
            formatter_class=Formatter,
        )
        command.add(own)
        own.set_defaults(run=command.run)
    return parser


def _interrupted(options: argparse.Namespace) -> str:
    if options.command != "train":
        return "interrupted"
    saved = options.checkpoint is not None and options.checkpoint.exists()
    hint = "the same command goes on from the checkpoint" if saved else "nothing was saved: pass --checkpoint FILE"
    return f"interrupted; {hint}"
