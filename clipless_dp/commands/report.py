"""``report``: the privacy statement as Markdown, JSON and HTML.

Writes the statement of a result, with who states it; of a statement's JSON file again; of a checkpoint of training, or
a stored ledger, what was spent, by which mechanisms.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from accounting import Ledger
from accounting.errors import LedgerFormatError
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.commands import options as shared
from clipless_dp.errors import CheckpointError
from clipless_dp.prediction import Content
from clipless_dp.statement import PrivacyStatement, report_ledger, statement_files
from clipless_dp.statement.followed import followed


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "source", type=Path, help="file of train --out or --checkpoint, a statement or a ledger (.json)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="write PATH.md, .json, .html (default: print Markdown)"
    )
    parser.add_argument("--organisation", help="who states it")
    parser.add_argument("--purpose", help="what the model is for")
    parser.add_argument("--data-set", help="what it was trained on")
    parser.add_argument("--contact", help="whom to ask")
    parser.add_argument("--delta", type=float, help="δ of a checkpoint's or a ledger's ε (default: 1e-5)")


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints or writes the statement.

    Raises:
        CheckpointError: the source, or a file to write, does not do.
        ConfigurationError: a text does not do.
    """
    shared.require_writable(() if options.out is None else statement_files(options.out))
    about = {name: getattr(options, name) for name in ("organisation", "purpose", "data_set", "contact")}
    made = statement_of(options.source, options.delta).signed(**about)
    if options.out is None:
        print(made.to_markdown(), end="")
        return
    saved = made.save(options.out)
    print(f"statement {', '.join(map(str, saved.files))}")
    for finding in made.facts["findings"]:
        print(f"finding   {finding}")


def statement_of(source: Path, delta: float | None) -> PrivacyStatement:
    """The statement that a file holds, with what its own ledger says against it, or of the ledger that it holds.

    Raises:
        AccountingError: what it states contradicts its ledger.
        CheckpointError: it holds none.
        FileNotFoundError: there is none.
    """
    if source.suffix.lower() == ".json":
        return _of_json(source, delta)
    content = load_checkpoint(source)
    if "result" in content:
        values = Content.of(content, str(source)).values
        try:
            statement = PrivacyStatement.of_json(values["statement"], str(source))
        except CheckpointError as error:
            raise CheckpointError(f"{source} is altered: its statement cannot be read: {error}") from error
        return followed(statement, str(source))
    try:
        state = content["optimizer"]["clipless_dp"]["accountant"]["ledger"]
        ledger = Ledger.from_state_dict(state)
    except (KeyError, TypeError, LedgerFormatError) as error:
        raise CheckpointError(f"{source} holds no ledger that can be read: {error!r}") from error
    return report_ledger(ledger, delta=1e-5 if delta is None else delta, source=source.name)


def _of_json(source: Path, delta: float | None) -> PrivacyStatement:
    try:
        facts = json.loads(source.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} cannot be read as JSON: {error}") from error
    if isinstance(facts, dict) and str(facts.get("format", "")).startswith("clipless_dp."):
        return followed(PrivacyStatement.read(source), str(source))
    try:
        ledger = Ledger.from_json(source.read_text("utf-8"))
    except LedgerFormatError as error:
        raise CheckpointError(f"{source} is neither a privacy statement nor a ledger: {error}") from error
    return report_ledger(ledger, delta=1e-5 if delta is None else delta, source=source.name)
