"""Checkpoints: written atomically, sealed by a digest, read without executing anything, versioned.

A file is what ``torch.save`` writes, followed by its SHA-256: torch does not verify the checksums in its own files, so
that a flipped bit in a ledger would go unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipless_dp.errors import CheckpointError

CHECKPOINT_FORMAT = 3
_READ_FORMATS = (2, CHECKPOINT_FORMAT)
_SEAL = b"clipless_dp sha256 "
_SEAL_LENGTH = len(_SEAL) + 64
_PARTIAL = ".partial"


def check_writable(path: str | os.PathLike[str]) -> None:
    """Creates the folder of a checkpoint and tries to write there, so that a run does not end without one.

    Raises:
        CheckpointError: nothing can be written there.
    """
    target = Path(path)
    if os.path.isdir(target):  # Unlike pathlib's, no error in a folder that may not be read.
        raise CheckpointError(f"{target} is a folder; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def discard_partial(path: str | os.PathLike[str]) -> None:
    """Removes what writers that were killed have left beside a checkpoint."""
    target = Path(path)
    for left in target.parent.glob(f".{_escaped(target.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError):
            left.unlink()


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
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **_plain(content)}, buffer)
    buffer.write(_seal(buffer.getvalue()))
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written, what was there is left as it was: {error}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written, what was there is left as it was: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(target.parent)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file beside another, whose place it takes once all within is done; what raises leaves none.

    Args:
        path: the file; its folder is created.

    Raises:
        CheckpointError: the folder is not writable or the disk is full; an existing file is left as it was.
    """
    check_writable(path)
    target = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent) as folder:
            beside = Path(folder) / target.name
            yield beside
            for further in sorted(Path(folder).iterdir()):
                os.replace(further, target.with_name(further.name))
    except OSError as error:
        raise CheckpointError(f"{target} could not be written, what was there is left as it was: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text so that a reader sees the old file or the new one, never a part.

    Raises:
        CheckpointError: as :func:`replacing`.
    """
    with replacing(path) as beside:
        beside.write_text(text, "utf-8")


def _plain(value: Any) -> Any:
    """The same with plain numbers in place of numpy's, which a reader that executes nothing refuses."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint with ``weights_only=True``, once its digest has been checked.

    Raises:
        CheckpointError: the file is damaged, foreign, or of an unknown format; it is named.
        FileNotFoundError: there is no such file.
    """
    name = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error
    payload, seal = data[:-_SEAL_LENGTH], data[-_SEAL_LENGTH:]
    if not seal.startswith(_SEAL):
        raise CheckpointError(
            f"{name} is not a checkpoint of clipless_dp, or its end is missing: no digest of format "
            f"{CHECKPOINT_FORMAT} is there"
        )
    if seal != _seal(payload):
        raise CheckpointError(f"{name} is damaged: its content does not fit its digest. Use an older copy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except Exception as error:  # Whatever the reader trips over: the file is at fault.
        raise CheckpointError(f"{name} is not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{name} is not a checkpoint of clipless_dp")
    if content["format"] not in _READ_FORMATS:
        raise CheckpointError(
            f"{name} has checkpoint format {content['format']!r}, this version reads up to {CHECKPOINT_FORMAT}"
        )
    return content


def identity(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Tells whether a file is the one that was there before; ``None`` where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _seal(payload: bytes) -> bytes:
    return _SEAL + hashlib.sha256(payload).hexdigest().encode()


def _escaped(name: str) -> str:
    """A file name as a pattern that matches itself only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _sync_folder(folder: Path) -> None:
    """Makes the new name outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
