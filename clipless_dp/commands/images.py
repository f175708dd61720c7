"""Folders of images: a folder for each class, or images alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError, InputError

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "P", "YCbCr", "CMYK")


def folders_in(folder: Path) -> list[Path]:
    """Folders right below one, in the order of their names, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def parts_of(folder: Path) -> tuple[Path, Path | None]:
    """The folders with training and test images: ``train`` and ``test`` in it, or itself.

    Raises:
        ConfigurationError: one of the two is there alone.
    """
    train, test = folder / "train", folder / "test"
    if train.is_dir() and test.is_dir():
        return train, test
    if train.is_dir() or test.is_dir():
        raise ConfigurationError(f"{folder} has one of the folders 'train' and 'test': it needs both, or neither")
    return folder, None


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the classes: of the folders in a folder, which are public, whether images are in them or not.

    Raises:
        ConfigurationError: there are fewer than two.
    """
    names = tuple(path.name for path in folders_in(folder))
    if len(names) < 2:
        raise ConfigurationError(f"{folder} needs a folder of images for each class, two or more; it has {list(names)}")
    return names


def labelled_files(folder: Path, classes: Sequence[Any]) -> tuple[list[Path], list[int]]:
    """Images of the classes, in the order of their names, and the place of each one's class.

    Raises:
        ConfigurationError: a folder is none of the classes.
        InputError: there is no image.
    """
    place = {str(name): index for index, name in enumerate(classes)}
    files, labels = [], []
    for inner in folders_in(folder):
        if inner.name not in place:
            raise ConfigurationError(f"{inner} is none of the classes {', '.join(place)}")
        found = files_in(inner, may_be_empty=True)
        files += found
        labels += [place[inner.name]] * len(found)
    if not files:
        raise InputError(f"there is no image in the folders of {folder}")
    return files, labels


def files_in(folder: Path, *, may_be_empty: bool = False) -> list[Path]:
    """Images right in a folder, in the order of their names.

    Raises:
        ConfigurationError: something else is there, and not hidden.
        InputError: there is none.
    """
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if strangers := [path for path in found if path.suffix.lower() not in _ENDINGS]:
        raise ConfigurationError(f"{strangers[0]} is no image: images end in {', '.join(_ENDINGS)}")
    if not found and not may_be_empty:
        raise InputError(f"there is no image in {folder}")
    return found


def read_images(
    files: Sequence[Path], options: argparse.Namespace, shape: tuple[int, ...] | None = None
) -> np.ndarray[Any, Any]:
    """Images as uint8 ``(N, H, W)``, or ``(N, H, W, 3)``; each is read by itself.

    Args:
        files: of the images.
        options: image size and channels.
        shape: ``(channels, height, width)`` of a model that is to read them.

    Raises:
        ConfigurationError: Pillow is missing, or an option is out of range.
        InputError: a file is no image, or of another size or kind than the others.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigurationError("images are read by Pillow: pip install 'clipless-dp[images]'") from error
    size = None if options.image_size is None else tuple(whole("--image-size", side) for side in options.image_size)
    channels = options.channels or (None if shape is None else shape[0])
    wanted = size if shape is None else tuple(shape[1:])
    found = []
    for file in files:
        try:
            with Image.open(file) as image:
                own = 1 if image.mode in _GREY else 3 if image.mode in _COLOUR else 0
                if not own:
                    raise InputError(f"{file} has pixels of kind {image.mode}, of which 8 bits would lose some")
                channels = channels or own
                if channels != own and options.channels is None:
                    kinds = {1: "grey", 3: "colour"}
                    raise InputError(
                        f"{file} is {kinds[own]}, and others, or the model, are {kinds[channels]}: say "
                        "--channels 1 or 3"
                    )
                pixels = image.convert("L" if channels == 1 else "RGB")
                if size is not None:
                    pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
                found.append(np.asarray(pixels))
        except (OSError, ValueError, SyntaxError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} cannot be read as an image: {error}") from error
        wanted = wanted or found[-1].shape[:2]
        if found[-1].shape[:2] != wanted:
            raise InputError(
                f"{file} is of {'×'.join(map(str, found[-1].shape[:2]))} pixels, and others, or the model, are of "
                f"{'×'.join(map(str, wanted))}: say --image-size HEIGHT WIDTH"
            )
    return np.stack(found)
