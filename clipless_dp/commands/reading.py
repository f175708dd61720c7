"""What ``certify`` and ``explain`` share: the model of a result file, or of a checkpoint and the options beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from clipless_dp import presets
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.commands import options as shared
from clipless_dp.commands.held_out import HeldOut, file_beside
from clipless_dp.commands.networks import model_of
from clipless_dp.commands.sources import Material, read_to_train
from clipless_dp.datasets import Split
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import DPLipModel
from clipless_dp.robustness import command


def add_options(reader: argparse.ArgumentParser) -> None:
    """Data, and what a checkpoint of training does not hold."""
    shared.add_data(reader)
    reader.add_argument(
        "--all-rows", action="store_true", help="read all rows of the file, in place of those that train leaves out"
    )
    beside = reader.add_argument_group("of a checkpoint of training, which does not hold its network")
    shared.add_network(beside)
    beside.add_argument("--groups", metavar="NAME", help="array that said whose each row is: people were held out")
    beside.add_argument("--preset", choices=tuple(presets.PRESETS), help="network and bounds of a preset")
    shared.add_device(reader)


def refuse_early(options: argparse.Namespace) -> None:
    """Refuses a device that does not compute and files that cannot be written, before anything is read.

    Raises:
        CheckpointError: a file to write does not do.
        ConfigurationError: the device does not compute, or a file to write is one that is read.
    """
    shared.require_device(options.device)
    command.check_files(options.out, options.plot)
    shared.require_writable(
        [options.out, options.plot], [options.dataset, options.checkpoint, file_beside(options.checkpoint)]
    )


def of_checkpoint(options: argparse.Namespace) -> tuple[DPLipModel, Split]:
    """The network that options name, without its weights, and the data.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigurationError: the preset reads features, or the data is no samples, or people were held out, or rows, and
            options say otherwise; or others than in training would be held out.
    """
    preset = None if options.preset is None else presets.get(options.preset)
    if preset is not None:
        command.refuse_front(preset)
    settings = load_checkpoint(options.checkpoint).get("settings")
    if (isinstance(settings, dict) and settings.get("groups") is not None) != (options.groups is not None):
        raise ConfigurationError(
            "rows that the checkpoint was trained on would be taken for held-out ones: give --groups as in train, the "
            "same array or none"
        )
    data = read_to_train(options)
    if data.split is None:
        raise ConfigurationError(
            "a checkpoint of columns does not hold how they are read: give the file of train --out"
        )
    if data.held_out is not None:
        _require_same(options.checkpoint, data)
    shape, classes = data.shape, data.split.classes
    model = model_of(options, shape, classes) if preset is None else preset.model(shape, classes)
    return model.to(options.device), data.split


def _require_same(checkpoint: Path, data: Material) -> None:
    """Refuses data of which others are held out than when the checkpoint's training began."""
    kept = HeldOut.of_checkpoint(checkpoint)
    if kept is None:
        raise ConfigurationError(
            f"which rows of {data.name} were held out is kept in {file_beside(checkpoint)}, and there is none: train "
            "--checkpoint writes it (of this version on), and it stays with the data, since it is private; put it "
            "there, or give a file with a test part, x_test and y_test"
        )
    if kept != data.held_out:
        raise ConfigurationError(
            f"other rows of {data.name} would be held out than when training began, among them some that were trained "
            "on: give the same file, as it was, and --groups as in train, or a file with a test part, x_test and y_test"
        )


def promised(privacy: Any) -> dict[str, Any]:
    """What was promised of a result, by the names that a checkpoint has."""
    facts = privacy.statement.facts
    return {"epsilon": privacy.epsilon, "delta": privacy.delta, "relation": facts.get("relation")}
