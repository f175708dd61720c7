"""Files of trained models, as ``train --out`` and ``save`` of a result write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.commands.networks import rebuilt_model
from clipless_dp.commands.sources import Known
from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.features import TableEncoding
from clipless_dp.loading import rebuilt
from clipless_dp.model import DPLipModel
from clipless_dp.prediction import Content, Predictor, read_result

MADE = "made"
"""What of a file's settings ``train`` has added: how the network is built, and what the data is called."""


@dataclass(frozen=True)
class Opened:
    """A trained model.

    Attributes:
        path: of its file.
        content: of it.
        predictor: what predicts.
        model: the wrapped model in it, behind front-end and statistics; ``None`` of a table.
    """

    path: Path
    content: Content
    predictor: Predictor
    model: DPLipModel | None

    @property
    def known(self) -> Known:
        """What the model says of the data that it reads."""
        made = self.made
        encoding = self.predictor.encode
        classes = self.predictor.classes
        is_regression = self.predictor.link.kind == "number"
        if classes is None and not is_regression:
            classes = tuple(range(2 if self.predictor.outputs == 1 else self.predictor.outputs))
        return Known(
            classes,
            None if encoding is not None else tuple(self.content.values["probe"]["inputs"].shape[1:]),
            encoding if isinstance(encoding, TableEncoding) else None,
            made.get("label"),
            is_regression,
            self.path,
        )

    @property
    def made(self) -> Mapping[str, Any]:
        """What ``train`` has added."""
        found = self.content.settings.get(MADE)
        return found if isinstance(found, Mapping) else {}

    @property
    def privacy(self) -> str:
        """What was promised, in a line."""
        return f"ε = {self.predictor.epsilon:.4f} at δ = {self.predictor.delta:g}"


def is_result(path: Path) -> bool:
    """Whether a file is that of a result, and no checkpoint of training.

    Raises:
        CheckpointError: it is neither.
        FileNotFoundError: there is none.
    """
    return "result" in load_checkpoint(path)


def opened(path: Path) -> Opened:
    """The trained model of a file.

    Raises:
        CheckpointError: the file is damaged, foreign, newer, or a checkpoint of training.
        ConfigurationError: it holds weights of a network that was built in Python, which no file holds.
        FileNotFoundError: there is none.
    """
    content = read_result(path)
    if content.made_by != "fit":
        predictor = rebuilt(content)
        model = getattr(predictor.net, "model", None)
        return Opened(path, content, predictor, model if isinstance(model, DPLipModel) else None)
    made = content.settings.get(MADE)
    if not isinstance(made, Mapping) or "network" not in made:
        raise ConfigurationError(
            f"{path} holds weights of a network that was built in Python, and no code: read it there, by "
            "clipless_dp.load(path, net=net)"
        )
    model = rebuilt_model(made, str(path))
    return Opened(path, content, rebuilt(content, model), model)


def require_model(found: Opened, command: str) -> DPLipModel:
    """The wrapped model of a file.

    Raises:
        CheckpointError: it is of a table.
    """
    if found.model is None:
        raise CheckpointError(f"{command} does not read {found.path}, which is of a table")
    return found.model
