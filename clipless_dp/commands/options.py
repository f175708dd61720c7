"""Options that several commands take, read in one place."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from clipless_dp.checkpoint import check_writable
from clipless_dp.commands.networks import NETWORKS, ROUTES
from clipless_dp.datasets import NAMES
from clipless_dp.errors import ConfigurationError


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which data is read, and how its columns and images are."""
    named = "|".join((*NAMES, "FILE.csv", "FILE.parquet", "FILE.npz", "FOLDER"))
    parser.add_argument(
        "--data", "--dataset", dest="dataset", required=required, metavar=named, help="named data, a file, or a folder"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with local copies; otherwise named sets are downloaded")
    parser.add_argument(
        "--classes",
        type=int,
        help="number of classes 0, 1, … of a file, which must be public (default: 2; a folder has one for each folder)",
    )
    columns = parser.add_argument_group("columns of CSV and Parquet files, which must be public")
    columns.add_argument(
        "--label",
        metavar="COLUMN",
        help="what is learnt (default: the column called label, target, class or y, or else the last one)",
    )
    columns.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="all labels that there can be, as they are written"
    )
    columns.add_argument(
        "--target-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="labels are numbers, which are cut to this range: a regression",
    )
    columns.add_argument(
        "--categories",
        action="append",
        default=[],
        metavar="COLUMN=A,B,C",
        help="a column of categories, with all of them; may be given several times. Other columns are numbers",
    )
    columns.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        metavar="A,B,C",
        help="names of all columns of a CSV file, in order (default: its first line)",
    )
    columns.add_argument(
        "--header", action="store_true", help="the first line holds names, which are public, whatever it looks like"
    )
    columns.add_argument("--no-header", action="store_true", help="the first line is a row: --columns has the names")
    columns.add_argument("--drop", nargs="+", default=[], metavar="COLUMN", help="columns that are not read")
    columns.add_argument(
        "--missing", nargs="+", default=[], metavar="COLUMN", help="columns of which the model sees what is missing"
    )
    images = parser.add_argument_group("folders of images")
    images.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="resize to (default: all are of one size)"
    )
    images.add_argument("--channels", type=int, choices=(1, 3), help="grey or colour (default: as all of them are)")


def add_network(parser: argparse._ActionsContainer) -> None:
    """A network of one's own, in place of a preset."""
    parser.add_argument("--route", choices=ROUTES, default="gradient_gated", help="what bounds the gradients")
    parser.add_argument(
        "--network", choices=("small", *NETWORKS), default="small", help="architecture; small: few layers"
    )
    parser.add_argument("--tau", type=float, default=8.0, help="temperature of the cross-entropy")
    parser.add_argument("--input-norm", type=float, help="cap of a sample's norm (default: √entries)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to run on")


def add_result(parser: argparse.ArgumentParser) -> None:
    """The file of a trained model."""
    parser.add_argument("result", type=Path, help="file that train --out wrote, or save of a result")


def require_device(name: str) -> None:
    """Refuses a device that does not compute.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        torch.zeros(1, device=name).item()  # A meta device has no numbers to read.
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"--device {name}: {str(error).splitlines()[0]}") from error


def require_writable(written: Iterable[Path | None], read: Iterable[Path | str | None] = ()) -> None:
    """Refuses files that cannot be written, and one for two things, of which the last would be all that is left.

    Args:
        written: files to write; ``None`` is none.
        read: files that are read, which nothing is written to.

    Raises:
        CheckpointError: one cannot be written.
        ConfigurationError: two of the written are one, or one of them is read.
    """
    known = {Path(file).resolve() for file in read if file is not None}
    for file in written:
        if file is None:
            continue
        if file.resolve() in known:
            raise ConfigurationError(f"{file} would be written over: give each thing a file of its own")
        known.add(file.resolve())
        check_writable(file)
