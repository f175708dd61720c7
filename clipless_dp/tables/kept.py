"""What the files beside a checkpoint were made for: statistics of one task are not those of another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clipless_dp.checkpoint import load_checkpoint, save_checkpoint
from clipless_dp.errors import CheckpointError
from clipless_dp.features import TableEncoding
from clipless_dp.model.description import differences
from clipless_dp.tables.tasks import Task

RELEASES = ("statistics", "labels")
"""Names of what is released before training, each in a file beside the checkpoint."""


def files_beside(checkpoint: str | os.PathLike[str] | None) -> tuple[Path, ...]:
    """What is kept beside a checkpoint of training: statistics that were released for it, and their task."""
    if checkpoint is None:
        return ()
    return tuple(Path(f"{os.fspath(checkpoint)}.{name}") for name in (*RELEASES, "task"))


def require_same_task(
    checkpoint: str | os.PathLike[str] | None,
    encoding: TableEncoding | None,
    columns: int,
    task: Task,
    signs: tuple[int, ...] | None = None,
    **named: Any,
) -> None:
    """Refuses a checkpoint, or statistics beside it, of other columns, classes or ranges; then keeps what this task is.

    All that is compared is public. It is a file of its own, since a checkpoint knows the model alone, and a statistic
    the number of columns.

    Args:
        checkpoint: path of the training's, or ``None``.
        encoding: of data frames.
        columns: how many numbers a row has.
        task: what is learnt.
        signs: of the columns that the answer is monotone in.
        named: columns of labels and ids; what is no name is not compared.

    Raises:
        CheckpointError: the files are of another task, or nothing tells of which one; or none can be written.
    """
    if checkpoint is None:
        return
    base = os.fspath(checkpoint)
    path = Path(f"{base}.task")
    settings = {"columns": columns, "encoding": None if encoding is None else _plain(encoding), **task.settings}
    settings |= {name: column if isinstance(column, str) else None for name, column in named.items()}
    if signs is not None:
        settings["monotone"] = list(signs)
    if path.exists():
        differing = differences(load_checkpoint(path).get("settings"), settings)
        if differing:
            raise CheckpointError(f"{path} tells of another task ({', '.join(differing)}): choose another checkpoint")
        return
    there = [one for one in (base, *(f"{base}.{name}" for name in RELEASES)) if Path(one).exists()]
    if there:
        raise CheckpointError(
            f"{there[0]} is there, and no {path} that tells what it was made for: choose another checkpoint"
        )
    save_checkpoint(path, {"settings": settings})


def _plain(encoding: TableEncoding) -> dict[str, Any]:
    """In lists, whose order counts."""
    return {
        "numbers": [*encoding.numbers],
        "categories": [[name, *values] for name, values in encoding.categories.items()],
        "missing": [[name, None if fill is None else float(fill)] for name, fill in encoding.missing.items()],
    }
