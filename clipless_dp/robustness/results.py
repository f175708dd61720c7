"""Radii that another program has written: what is computed of certificates is computed of them."""

from __future__ import annotations

import csv
import math
import os

import torch

from clipless_dp.errors import InputError
from clipless_dp.robustness.certificates import Certificate

_COLUMNS = ("label", "predict", "radius", "correct")


def read_radii(path: str | os.PathLike[str]) -> Certificate:
    """A certificate of a file as Cohen et al. 2019 publish them with *Certified adversarial robustness*.

    Columns are separated by tabs and named in the first line: ``idx``, ``label``, ``predict`` (-1: abstains),
    ``radius``, ``correct`` (0 or 1) and ``time``; the first and the last may be left out. Radii are taken as they are:
    nothing of them is checked.

    Args:
        path: of the file.

    Raises:
        InputError: it is no table, a column is missing, a value is no number of its kind, or ``correct`` is not whether
            ``predict`` is ``label``; the message names the line.
        FileNotFoundError: there is none.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                known = ", ".join(_COLUMNS)
                raise InputError(f"{path} has no column {', '.join(missing)}: expected {known}, between tabs")
            rows = [_row(path, reader.line_num, row) for row in reader]
    except (IsADirectoryError, PermissionError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    if not rows:
        raise InputError(f"{path} holds no samples")
    labels, predictions, radii = zip(*rows, strict=True)
    return Certificate(
        torch.tensor(radii, dtype=torch.float64),
        torch.tensor(predictions),
        torch.tensor(labels),
        method="read from a file, not checked",
    )


def _row(path: str | os.PathLike[str], line: int, row: dict[str, str]) -> tuple[int, int, float]:
    try:
        label, predicted, correct = (int(row[name]) for name in ("label", "predict", "correct"))
        radius = float(row["radius"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}, line {line}: {error}") from error
    if not radius >= 0.0 or math.isnan(radius) or label < 0 or predicted < -1:
        raise InputError(f"{path}, line {line}: radii and labels must be at least 0, predictions at least -1")
    if correct != int(label == predicted):
        raise InputError(f"{path}, line {line}: correct={correct}, but predict={predicted} and label={label}")
    return label, predicted, radius
