"""``predict``: predictions and probabilities of rows, as CSV.

Writes a line for each row, in order: its number or file, the prediction, and the probability of each class as the loss
has it, not calibrated. Labels are not read.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

import torch

from clipless_dp.checkpoint import write_text
from clipless_dp.commands import options as shared
from clipless_dp.commands.held_out import file_beside
from clipless_dp.commands.results import Opened, opened
from clipless_dp.commands.sources import Part, read_rows
from clipless_dp.errors import ConfigurationError


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    shared.add_result(parser)
    shared.add_data(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="(default: standard output)")
    parser.add_argument(
        "--threshold", type=float, help="of two classes, the probability above which the second is predicted"
    )


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Writes the predictions.

    Raises:
        CheckpointError: the file of the model, or that to write, does not do.
        ConfigurationError: the data is not like what the model was trained on.
        InputError: rows are not what they should be; or one has no scores.
    """
    shared.require_writable([options.out], [options.dataset, options.result, file_beside(options.result)])
    found = opened(options.result)
    part = read_rows(options, found.known, labelled=False)
    text = _written(found, part, options.threshold)
    if options.out is None:
        sys.stdout.write(text)
        return
    write_text(options.out, text)
    print(f"{len(part)} predictions   {options.out}")
    print(f"model     {found.privacy}; predictions of private rows are as private as these rows")


def _written(found: Opened, part: Part, threshold: float | None) -> str:
    predictor = found.predictor
    classes = found.known.classes
    columns: list[list[Any]]
    if classes is None:
        if threshold is not None:
            raise ConfigurationError("--threshold is of two classes, and the model predicts numbers")
        header, columns = ["prediction"], [torch.as_tensor(predictor.predict(part.rows)).flatten().tolist()]
    else:
        chosen = predictor.predict(part.rows)
        chosen = chosen.tolist() if isinstance(chosen, torch.Tensor) else list(chosen)
        header, columns = ["prediction"], [chosen]
        if predictor.link.kind != "largest":
            shares = predictor.predict_proba(part.rows).double()
            header += [f"p({label})" for label in classes]
            columns += [[f"{share:.6g}" for share in column] for column in shares.T.tolist()]
            if threshold is not None:
                columns[0] = _by_threshold(shares, classes, threshold)
        elif threshold is not None:
            raise ConfigurationError("--threshold is of a probability, and the model's loss says none")
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["row", *header])
    lines.writerows(zip(part.names, *columns, strict=True))
    return file.getvalue()


def _by_threshold(shares: torch.Tensor, classes: tuple[Any, ...], threshold: float) -> list[Any]:
    if len(classes) != 2 or not 0.0 <= threshold <= 1.0:
        raise ConfigurationError("--threshold is of the probability of the second of two classes, from 0 to 1")
    return [classes[int(share > threshold)] for share in shares[:, 1].tolist()]
