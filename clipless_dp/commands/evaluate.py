"""``evaluate``: accuracy, AUROC and a table of the classes on rows with labels.

Prints how right a trained model is on rows that it was not trained on. Of a named data set, or a file or folder with a
test part, that part is read; of other files all rows, or --held-out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clipless_dp.checkpoint import write_text
from clipless_dp.commands import options as shared
from clipless_dp.commands.held_out import file_beside
from clipless_dp.commands.results import opened
from clipless_dp.commands.scores import scores_of
from clipless_dp.commands.sources import read_rows

NOT_PRIVATE = "exact figures of these rows, which no ε covers: to be published where the rows are public"


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    shared.add_result(parser)
    shared.add_data(parser)
    parser.add_argument("--held-out", action="store_true", help="only the fifth of the same file that train left out")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures")


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints the figures.

    Raises:
        CheckpointError: the file of the model, or of what was held out, or that to write, does not do.
        ConfigurationError: the data is not like what the model was trained on.
        InputError: rows or labels are not what they should be.
    """
    shared.require_writable([options.out], [options.dataset, options.result, file_beside(options.result)])
    found = opened(options.result)
    known = found.known
    part = read_rows(options, known, labelled=True, held_out=options.held_out)
    scores = scores_of(found.predictor, part, known.classes)
    print(scores if scores.classes else "\n".join(scores.lines))
    print(f"{NOT_PRIVATE}\nmodel     {found.privacy}")
    if options.out is not None:
        promised = {"epsilon": found.predictor.epsilon, "delta": found.predictor.delta}
        facts = {**scores.described(), "note": NOT_PRIVATE, "privacy_of_the_model": promised}
        write_text(options.out, json.dumps(facts, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        print(f"figures   {options.out}")
