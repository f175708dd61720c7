"""``load``: what ``save`` of a result has written, in another process."""

from __future__ import annotations

import os

from torch import nn

from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.one_class import loaded_one_class
from clipless_dp.prediction import Content, Predictor, read_result
from clipless_dp.presets import Preset, loaded_preset
from clipless_dp.tables import loaded_table
from clipless_dp.training.result import loaded_fit


def load(path: str | os.PathLike[str], *, net: nn.Module | None = None, preset: Preset | None = None) -> Predictor:
    """What predicts, from the file that ``save`` of a result has written: of ``fit``, ``fit_table``, ...

    The file is read with ``weights_only=True``, so that nothing in it is run, once its digest has been checked: that
    finds damage, not forgery. Networks are built by this package, or by you, and are compared by what they say of some
    made-up rows that the file holds: one without its gates is refused.

    Args:
        path: of the file.
        net: of a result of :func:`clipless_dp.fit`, the network as it was for training, gates included, with any
            weights: a :class:`clipless_dp.DPLipModel`, or what was in one. It is given the weights of the file.
        preset: of a preset of your own, that one.

    Returns:
        A :class:`clipless_dp.prediction.Predictor`: ``predict``, ``predict_proba`` and ``scores`` of samples as they
        are, on the CPU; ``epsilon``, ``delta``, and ``statement``, with the ledger.

    Raises:
        CheckpointError: the file is damaged, foreign, newer, or a checkpoint of training; or it is of another network.
        ConfigurationError: ``net`` or ``preset`` is missing, or does not belong to this kind of file.
        FileNotFoundError: there is no such file.
    """
    return rebuilt(read_result(path), net, preset)


def rebuilt(content: Content, net: nn.Module | None = None, preset: Preset | None = None) -> Predictor:
    """As :func:`load`, of what a file holds."""
    if content.made_by == "fit":
        if net is None:
            raise ConfigurationError(
                f"{content.name} is of fit, with weights and no code: load(path, net=net), with the network as it was "
                "for training"
            )
        if preset is not None:
            raise ConfigurationError(f"{content.name} is of fit: leave preset out")
        return loaded_fit(content, net)
    if content.made_by == "one class":
        if preset is not None:
            raise ConfigurationError(f"{content.name} is of a one-class model: leave preset out")
        return loaded_one_class(content, net)
    if net is not None:
        raise ConfigurationError(f"{content.name} is of a {content.made_by}, whose network is known: leave net out")
    if content.made_by == "preset":
        return loaded_preset(content, preset)
    if preset is not None:
        raise ConfigurationError(f"{content.name} is of a table: leave preset out")
    if content.made_by != "table":
        raise CheckpointError(f"{content.name} is of {content.made_by!r}, which this version does not know")
    return loaded_table(content)
