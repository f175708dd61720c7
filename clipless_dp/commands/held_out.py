"""Which rows ``train`` has held out, told exactly by a file that stays with whoever owns the data.

The file of a model cannot say it: a count does not tell a file from one that was saved again in another type, and a
digest of rows tells whoever knows all others whether one was among them. What is private lies in a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipless_dp.checkpoint import replacing
from clipless_dp.datasets import alone
from clipless_dp.errors import CheckpointError, ConfigurationError

SUFFIX = ".held-out.private"
_FORMAT = "clipless_dp.held_out/1"
_NOTE = "PRIVATE: tells about single rows, and no ε covers it. Keep it with the data; never publish it with the model."
_DIGEST = 16
"""Bytes of a row's."""

_UNTRAINED = (
    "leave --held-out out (with certify and explain: --all-rows) for a file of rows that the model was not trained on"
)


def file_beside(path: str | os.PathLike[str] | None) -> Path | None:
    """Where it is kept which rows a model, or a checkpoint of training, was not trained on."""
    return None if path is None else Path(f"{os.fspath(path)}{SUFFIX}")


def digests_of(contents: Iterable[bytes], names: Sequence[str] = ()) -> list[str]:
    """A digest of each row by itself, and of what its columns are called."""
    head = json.dumps([*names]).encode()
    return [hashlib.blake2b(head + content, digest_size=_DIGEST).hexdigest() for content in contents]


def digests_of_samples(inputs: Tensor, targets: Tensor, ids: Sequence[Any] | None = None) -> list[str]:
    """A digest of each sample as it is read, with its target and whose it is.

    Args:
        inputs: ``(N, ...)`` float32.
        targets: ``(N,)``.
        ids: ``(N,)``.
    """
    rows, labels = inputs.numpy() + np.float32(0.0), targets.double().numpy()  # Of two zeros one.
    whose = [b""] * len(rows) if ids is None else map(alone, ids)
    return digests_of(
        np.where(np.isnan(row), np.float32(np.nan), row).tobytes() + label.tobytes() + one
        for row, label, one in zip(rows, labels, whose, strict=True)
    )


@dataclass(frozen=True)
class HeldOut:
    """The rows of a file that are not trained on.

    Attributes:
        rows: digest of each, and how often it is there. Private.
        groups: of an NPZ file, the array that says whose each row is, which the digests are of as well.
    """

    rows: Counter[str]
    groups: str | None = None

    def chosen(self, digests: Sequence[str], name: str) -> np.ndarray[Any, Any]:
        """Which rows of a file these are.

        Args:
            digests: of all its rows.
            name: of the file.

        Returns:
            ``(N,)``, truth values: as many rows of each content as were held out, and all of these.

        Raises:
            ConfigurationError: it lacks some, or others have become like them.
        """
        found = Counter(one for one in digests if one in self.rows)
        if found != self.rows:
            lacking, more = (self.rows - found).total(), (found - self.rows).total()
            raise ConfigurationError(
                f"{name} is not as it was when the model was trained: of {self.rows.total()} rows that were held out "
                f"{lacking} are not in it, and {more} others are like one of them; its columns, their order or their "
                "types are others, or numbers were rounded, or rows edited, so that rows that were trained on could be "
                f"taken for held-out ones: give the file that train read, or {_UNTRAINED}"
            )
        return np.fromiter((one in self.rows for one in digests), np.bool_, len(digests))

    def write(self, path: Path, model: Path | None = None) -> None:
        """Writes the private file.

        Args:
            path: of it.
            model: the file that was trained, which it is of.

        Raises:
            CheckpointError: it cannot be written.
        """
        content = {
            "format": _FORMAT,
            "note": _NOTE,
            "model": None if model is None else _digest_of_file(model),
            "groups": self.groups,
            # In no order of the rows.
            "rows": dict(sorted(self.rows.items())),
        }
        with replacing(path) as beside:
            # Its owner's alone, from the first byte on.
            beside.touch(mode=0o600)
            beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @staticmethod
    def of_model(model: Path, name: str) -> HeldOut:
        """Those of the model of a file.

        Args:
            model: its file.
            name: of the data.

        Raises:
            ConfigurationError: nothing is kept beside it, or of another model.
            CheckpointError: what is kept cannot be read.
        """
        path = Path(f"{model}{SUFFIX}")
        if not path.exists():
            raise ConfigurationError(
                f"which rows of {name} were held out is kept in {path}, and there is none: train --out writes it "
                "beside the model (of this version on, for data without a test part), and it stays with the data, "
                f"since it is private; put it there, or {_UNTRAINED}"
            )
        found, of = _read(path)
        if of != _digest_of_file(model):
            raise ConfigurationError(
                f"{path} is of another model than {model}: put the one there that train wrote with it, or {_UNTRAINED}"
            )
        return found

    @staticmethod
    def of_checkpoint(checkpoint: Path) -> HeldOut | None:
        """Those of a run of training; ``None``: nothing is kept.

        Raises:
            CheckpointError: what is kept cannot be read.
        """
        path = Path(f"{checkpoint}{SUFFIX}")
        return _read(path)[0] if path.exists() else None


def refuse_test_part(model: Path | None, name: str) -> None:
    """Refuses data with a test part, where the model was trained on data that has none, and rows of it held out.

    Raises:
        ConfigurationError: rows of that part may have been trained on.
    """
    if model is not None and Path(f"{model}{SUFFIX}").exists():
        raise ConfigurationError(
            f"{name} says itself which of its rows are for testing, and the model was trained on data that does not: "
            f"these may be rows that it was trained on. Give the file that train read, or {_UNTRAINED}"
        )


def _digest_of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
            return found.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read(path: Path) -> tuple[HeldOut, str | None]:
    """What is kept, and the digest of the model that it is of."""
    try:
        content = json.loads(path.read_text("utf-8"))
        rows, groups, model = content["rows"], content["groups"], content["model"]
        is_right = (
            content["format"] == _FORMAT
            and all(len(bytes.fromhex(one)) == _DIGEST for one in rows)
            and all(type(count) is int and count > 0 for count in rows.values())
            and isinstance(groups, str | None)
            and isinstance(model, str | None)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not is_right or not rows:
        raise CheckpointError(f"{path} does not say which rows were held out, or a later version wrote it")
    return HeldOut(Counter(rows), groups), model
