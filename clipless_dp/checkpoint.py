"""Checkpoints: written atomically, read without executing anything, versioned."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from clipless_dp.errors import CheckpointError

CHECKPOINT_FORMAT = 1


def check_writable(path: str | os.PathLike[str]) -> None:
    """Creates the folder of a checkpoint and tries to write there, so that a run does not end without one.

    Raises:
        CheckpointError: nothing can be written there.
    """
    target = Path(path)
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes a checkpoint so that a reader sees the old one or the new one, never a part.

    Args:
        path: the file; its folder is created.
        content: tensors and plain values only.

    Raises:
        CheckpointError: the folder is not writable or the disk is full; an existing file is left as it was.
    """
    check_writable(path)
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{target} could not be written, what was there is left as it was: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint with ``weights_only=True``.

    Raises:
        CheckpointError: the file is damaged, foreign, or of an unknown format; it is named.
        FileNotFoundError: there is no such file.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise CheckpointError(f"{os.fspath(path)} is not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{os.fspath(path)} is not a checkpoint of clipless_dp")
    if content["format"] != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{os.fspath(path)} has checkpoint format {content['format']!r}, this version reads {CHECKPOINT_FORMAT}"
        )
    return content
