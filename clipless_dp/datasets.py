"""Named data sets and NPZ files, split into training and test data."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError

NAMES = ("digits", "mnist", "cifar10")
_CLASSES = 10
"""Of each of these."""

_SPLIT_SEED = 20240507
"""Fixes the held-out fifth of the digits, which are public."""

_SPLIT_KEY = b"clipless_dp.datasets: held-out fifth"
"""Public key of the hash that decides by itself about each row of a file whether it is held out."""

_WHOLE = 2.0**53
"""Whole numbers up to this one are told apart where they are ids; of others as many digits as float32 has."""

_FLOAT32_WHOLE = 2**24
"""Whole numbers up to this one are told apart by float32."""

_FLOAT32 = struct.Struct("<f")

_TRUTH = {"true": 1, "false": 0}
"""As a library of frames, a spreadsheet and Parquet write truth values, each in its own way."""

_BLOCK = 1 << 22
"""Numbers that are hashed at once."""


@dataclass(frozen=True)
class Split:
    """A data set for classification.

    Attributes:
        inputs: ``(N, ...)`` float32.
        targets: ``(N,)`` int64.
        test_inputs: held out.
        test_targets: held out.
        classes: number of classes.
        groups: ``(N,)``, whose each row of ``inputs`` is, where an array of a file was named; else ``None``.
        test_groups: the same of ``test_inputs``, where these were held out of the file; else ``None``.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    groups: np.ndarray[Any, Any] | None = None
    test_groups: np.ndarray[Any, Any] | None = None

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets to train on."""
        return self.inputs, self.targets

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets to evaluate on."""
        return self.test_inputs, self.test_targets


def load_dataset(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    classes: int | None = None,
    groups: str | None = None,
) -> Split:
    """Loads ``"digits"``, ``"mnist"``, ``"cifar10"``, or an NPZ file.

    Args:
        name: one of the names, or the path of an NPZ file with ``x_train``, ``y_train``, ``x_test``, ``y_test``, or
            with ``X`` and ``y``, of which about a fifth is held out: a keyed hash of a row and its target decides about
            that row alone, so that one row more changes no other's part, and equal rows fall together, in whatever type
            they are stored. Images are uint8
            ``(N, H, W)`` or ``(N, H, W, 3)`` and are divided by 255; anything else is taken as it is.
        data_dir: folder that holds ``mnist.npz`` and ``cifar10_jpeg.npz``; without it scikit-learn downloads the
            data set from OpenML.
        classes: number of classes, 10 in the named data sets. Of a file it must be said: the largest target is that of
            one row, and would tell about it.
        groups: of a file, the array that says whose each row of ``x_train``, or of ``X``, is: integers or strings. What
            is held out of ``X`` are whole people then, each by a hash of their id.

    Raises:
        ConfigurationError: the name is unknown, or groups are named of a named data set, or a file or one of its
            arrays is missing, or ``classes`` is missing or no number that all targets lie below.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise ConfigurationError(f"name must be one of {', '.join(NAMES)}, or the path of an NPZ file, got {name!r}")
    name = str(os.fspath(name))
    if name in NAMES and classes not in (None, _CLASSES):
        raise ConfigurationError(f"{name} has {_CLASSES} classes, got classes={classes!r}")
    if groups is not None and name in NAMES:
        raise ConfigurationError(f"{name} does not say whose its rows are: groups name an array of an NPZ file")
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 16.0
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
        test, train = order[: len(images) // 5], order[len(images) // 5 :]
        return _split(images[train], labels[train], images[test], labels[test])
    if name == "mnist":
        return _mnist(data_dir)
    if name == "cifar10":
        return _cifar10(data_dir)
    if name.endswith(".npz"):
        return _file(name, classes, groups)
    raise ConfigurationError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}, or a path ending in .npz")


def _file(name: str, classes: int | None, groups: str | None) -> Split:
    if classes is None:
        raise ConfigurationError(
            f"say how many classes {name} has (classes=…, --classes): read from the targets, it would tell about one "
            "row"
        )
    classes = whole("classes", classes)
    arrays = read_npz(Path(name))
    ids = None if groups is None else _required(arrays, groups, name)
    if "x_train" in arrays:
        return replace(_split(*_parts(arrays, name), classes), groups=ids)
    inputs, targets = _required(arrays, "X", name), _required(arrays, "y", name)
    _require_pairs(inputs, targets)
    if ids is None:
        held_out = rows_held_out(inputs, targets)
    elif ids.shape != targets.shape:
        raise ConfigurationError(f"need as many ids {groups!r} as targets, got {ids.shape} and {targets.shape}")
    else:
        held_out = held_out_of(map(alone, ids.tolist()))
    split = _split(inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out], classes)
    return split if ids is None else replace(split, groups=ids[~held_out], test_groups=ids[held_out])


def split_of(inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], classes: int) -> Split:
    """Samples of one file, of which about a fifth is held out, as of an NPZ file with ``X`` and ``y``.

    Args:
        inputs: ``(N, ...)``; images as uint8 ``(N, H, W)`` or ``(N, H, W, 3)``.
        targets: ``(N,)`` class indices.
        classes: number of classes, which is public.

    Raises:
        ConfigurationError: they do not fit each other, or none is held out.
    """
    _require_pairs(inputs, targets)
    held_out = rows_held_out(inputs, targets)
    return _split(inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out], classes)


def _parts(
    arrays: dict[str, np.ndarray[Any, Any]], name: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    x_train, y_train, x_test, y_test = (
        _required(arrays, key, name) for key in ("x_train", "y_train", "x_test", "y_test")
    )
    return x_train, y_train, x_test, y_test


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an NPZ file, by name; nothing in it is run.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, and no archive of named ones")
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error


def _required(arrays: dict[str, np.ndarray[Any, Any]], key: str, name: str) -> np.ndarray[Any, Any]:
    if key not in arrays:
        raise ConfigurationError(f"{name} has no array {key!r}; it holds {sorted(arrays)}")
    return arrays[key]


def _mnist(data_dir: str | os.PathLike[str] | None) -> Split:
    if data_dir is not None:
        path = Path(data_dir) / "mnist.npz"
        arrays = read_npz(path)
        return _split(*_parts(arrays, str(path)))
    images, labels = _openml("mnist_784")
    images = images.reshape(-1, 28, 28).astype(np.uint8)
    return _split(images[:60_000], labels[:60_000], images[60_000:], labels[60_000:])


def _cifar10(data_dir: str | os.PathLike[str] | None) -> Split:
    if data_dir is None:
        pixels, labels = _openml("CIFAR_10")
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(np.uint8)
        return _split(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:])
    path = Path(data_dir) / "cifar10_jpeg.npz"
    arrays = read_npz(path)

    def part(key: str) -> np.ndarray[Any, Any]:
        return _decode_jpegs(
            _required(arrays, f"{key}_jpeg", str(path)), _required(arrays, f"{key}_offsets", str(path))
        )

    return _split(part("train"), arrays["y_train"], part("test"), arrays["y_test"])


def _decode_jpegs(data: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from PIL import Image

    raw = data.tobytes()
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(raw[start:end])).convert("RGB")) for start, end in pairwise(offsets)]
    )


def _openml(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from sklearn.datasets import fetch_openml

    values, labels = fetch_openml(name, version=1, return_X_y=True, as_frame=False, parser="liac-arff")
    return values, labels.astype(np.int64)


def held_out_of(contents: Iterable[bytes]) -> np.ndarray[Any, Any]:
    """Which of some rows, or people, are held out, about a fifth: each by a coin of its own, which its content tosses.

    Args:
        contents: of each by itself.

    Returns:
        ``(N,)``, truth values.
    """
    return np.fromiter(map(_tossed, contents), np.bool_)


def rows_held_out(inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which rows are held out, about a fifth: each by a coin of its own, which its numbers and its target toss.

    Equal numbers are equal bytes, in whatever type, byte order or layout they are stored.

    Args:
        inputs: ``(N, ...)``, numbers.
        targets: ``(N,)`` class indices.

    Returns:
        ``(N,)``, truth values.
    """
    labels = targets.astype("<i8")
    size = max(1, _BLOCK // max(1, inputs[0].size))
    blocks = (_numbers(inputs[start : start + size]) for start in range(0, len(inputs), size))
    rows = (row.tobytes() for block in blocks for row in block)
    return held_out_of(row + label.tobytes() for row, label in zip(rows, labels, strict=True))


def _numbers(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers as float32 tells them: those of a file that was saved in it, or in a wider type, are the same."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = values.astype(np.float32).astype("<f8") + 0.0  # Of two zeros one.
    return np.where(np.isnan(found), np.nan, found).astype("<f8")


def alone(cell: Any, *, is_id: bool = True) -> bytes:
    """A cell, or an id, by what it says, whatever it is stored as: ``7``, ``7.0`` and ``"7"`` are one.

    What toss a coin are these; whatever falls together here has one coin, and is told apart everywhere else.

    Args:
        cell: of any type.
        is_id: whether whole numbers are told apart to their last digit; else as far as float32 does.
    """
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "replace")
    number = _read_number(cell.strip()) if isinstance(cell, str) else cell
    if isinstance(number, int):
        if is_id or abs(number) <= _FLOAT32_WHOLE:
            return b"%d" % number
        try:
            number = float(number)
        except OverflowError:
            number = math.inf if number > 0 else -math.inf
    if not isinstance(number, float):
        if cell is None:
            return b""
        return (cell.strip() if isinstance(cell, str) else repr(cell)).encode("utf-8", "surrogatepass")
    if math.isnan(number):
        return b""
    if not number.is_integer() or abs(number) > (_WHOLE if is_id else _FLOAT32_WHOLE):
        try:
            (number,) = _FLOAT32.unpack(_FLOAT32.pack(number))
        except OverflowError:
            number = math.copysign(math.inf, number)
    return b"%d" % int(number) if number.is_integer() else repr(number).encode()


def _read_number(text: str) -> int | float | None:
    """What a text says as a number, or ``None`` for what says none; a truth value in any case is one as well."""
    if (truth := _TRUTH.get(text.lower())) is not None:
        return truth
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _tossed(content: bytes) -> bool:
    """A coin that comes up for a fifth of all contents."""
    digest = hashlib.blake2b(content, digest_size=8, key=_SPLIT_KEY).digest()
    return int.from_bytes(digest, "little") < (1 << 64) // 5


def _split(
    inputs: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    test_inputs: np.ndarray[Any, Any],
    test_targets: np.ndarray[Any, Any],
    classes: int = _CLASSES,
) -> Split:
    _require_pairs(inputs, targets)
    _require_pairs(test_inputs, test_targets)
    if max(targets.max(), test_targets.max()) >= classes:
        raise ConfigurationError(
            f"targets must be class indices below {classes}, the number of classes (classes=…, --classes)"
        )
    if inputs.shape[1:] != test_inputs.shape[1:]:
        raise ConfigurationError(f"training inputs {inputs.shape} and test inputs {test_inputs.shape} differ in shape")
    return Split(
        as_inputs(inputs),
        torch.from_numpy(targets.astype(np.int64)),
        as_inputs(test_inputs),
        torch.from_numpy(test_targets.astype(np.int64)),
        classes,
    )


def as_inputs(values: np.ndarray[Any, Any]) -> Tensor:
    """Inputs ``(N, ...)`` as float32: images in uint8 divided by 255, channels first; anything else as it is."""
    if values.dtype == np.uint8 and values.ndim in (3, 4):
        images = values[:, None] if values.ndim == 3 else values.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(images)).float() / 255.0
    return torch.from_numpy(values.astype(np.float32))


def _require_pairs(inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> None:
    if inputs.ndim < 2 or targets.shape != inputs.shape[:1] or not len(inputs):
        raise ConfigurationError(
            f"need inputs (N, ...) and as many targets (N,), for training and for testing; got shapes {inputs.shape} "
            f"and {targets.shape}"
        )
    if not np.issubdtype(targets.dtype, np.integer) or targets.min() < 0:
        raise ConfigurationError(
            f"targets must be class indices, integers from 0; got {targets.dtype} from {targets.min()}"
        )
    if inputs.dtype.kind not in "biuf":
        raise ConfigurationError(f"inputs must be real numbers, got {inputs.dtype}")
