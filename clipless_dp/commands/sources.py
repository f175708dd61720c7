"""Data that commands read: named sets, NPZ, CSV and Parquet files, folders of images."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipless_dp.commands import columns, images
from clipless_dp.commands.held_out import HeldOut, digests_of, digests_of_samples, refuse_test_part
from clipless_dp.datasets import NAMES, Split, as_inputs, held_out_of, load_dataset, read_npz, split_of
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features import TableEncoding

_TEXTS = (".txt", ".text", ".json", ".jsonl", ".md")


@dataclass(frozen=True)
class Part:
    """Some rows.

    Attributes:
        rows: a tensor ``(N, ...)``, or columns by name, as an encoding reads them.
        labels: class indices ``(N,)``; of columns their labels in a list, or numbers; ``None``: not read.
        names: of the rows, in order.
        of: what they are: "held-out samples of", "samples of" and the name of the data, say.
    """

    rows: Any
    labels: Any
    names: list[str]
    of: str

    def __len__(self) -> int:
        return len(self.names)

    @property
    def told(self) -> str:
        """How many, and what they are."""
        return f"{'all ' if self.of.startswith('samples') else ''}{len(self)} {self.of}"


@dataclass(frozen=True)
class Material:
    """What is trained on, and what is known of it in public.

    Attributes:
        name: as it was given.
        train: to train on.
        test: held out.
        classes: all labels, in order; ``None`` of a regression.
        shape: of a sample.
        encoding: of columns; else ``None``.
        label: the column that is learnt.
        target_range: of a regression.
        groups: whose each row of ``train`` is.
        held_out: which rows were held out, where the data has no test part. Private.
        split: of samples, as :func:`clipless_dp.datasets.load_dataset` returns them; ``None`` of columns.
    """

    name: str
    train: Part
    test: Part
    classes: tuple[Any, ...] | None
    shape: tuple[int, ...]
    encoding: TableEncoding | None = None
    label: str | None = None
    target_range: tuple[float, float] | None = None
    groups: Any = None
    held_out: HeldOut | None = None
    split: Split | None = None


@dataclass(frozen=True)
class Known:
    """What a trained model says of the data that it reads.

    Attributes:
        classes: labels; ``None``: not said.
        shape: of a sample; ``None`` of columns.
        encoding: of columns.
        label: the column that was learnt.
        is_regression: whether labels are numbers.
        result: its file, beside which it is kept which rows it was not trained on.
    """

    classes: tuple[Any, ...] | None = None
    shape: tuple[int, ...] | None = None
    encoding: TableEncoding | None = None
    label: str | None = None
    is_regression: bool = False
    result: Path | None = None


def kind_of(name: str) -> str:
    """What a name of data is: ``"named"``, ``"npz"``, ``"columns"`` or ``"folder"``.

    Raises:
        ConfigurationError: none of these, or there is no such file.
    """
    if name in NAMES:
        return "named"
    path = Path(name)
    if path.is_dir():
        return "folder"
    suffix = path.suffix.lower()
    if suffix in _TEXTS:
        raise ConfigurationError(
            f"{name}: commands read no texts. Networks of texts are fine-tuned in Python (docs/texts.md and "
            "docs/integrations.md); features of texts, of a public model, are an NPZ file for --preset transfer"
        )
    if suffix != ".npz" and suffix not in columns.SUFFIXES:
        raise ConfigurationError(
            f"unknown data set {name!r}: choose one of {', '.join(NAMES)}, a file that ends in .npz, "
            f"{', '.join(columns.SUFFIXES)}, or a folder of images"
        )
    if not path.exists():
        raise ConfigurationError(f"there is no file {name}")
    return "npz" if suffix == ".npz" else "columns"


def read_to_train(options: argparse.Namespace) -> Material:
    """Training and held-out rows, a fifth where a file does not say, by a hash of each.

    Raises:
        ConfigurationError: there is no such data, or options do not fit it.
        InputError: rows are not what they should be.
    """
    name, kind = str(options.dataset), kind_of(str(options.dataset))
    groups = getattr(options, "groups", None)
    if kind == "columns":
        return _columns_to_train(name, groups, options)
    _refuse_column_options(options, kind)
    labels: tuple[Any, ...]
    if kind == "folder":
        if groups is not None:
            raise ConfigurationError(f"{name} does not say whose its images are: --groups names a column or an array")
        split, labels = _folder_to_train(Path(name), options)
    else:
        classes = options.classes if kind == "named" else options.classes or 2
        split = load_dataset(name, options.data_dir, classes=classes, groups=groups)
        labels = tuple(range(split.classes))
    count = len(split.test_targets)
    return Material(
        name,
        Part(split.inputs, split.targets, _numbered(len(split.targets)), f"rows of {name}"),
        Part(split.test_inputs, split.test_targets, _numbered(count), f"held-out samples of {name}"),
        labels,
        tuple(split.inputs.shape[1:]),
        groups=split.groups,
        held_out=None if _is_split(name, kind) else _samples_held_out(split, groups),
        split=split,
    )


def read_rows(options: argparse.Namespace, known: Known, *, labelled: bool, held_out: bool = False) -> Part:
    """Rows for a trained model, in the order of the file.

    Args:
        options: what to read.
        known: of the model.
        labelled: whether labels are read.
        held_out: only the rows that training on the same file leaves out.

    Raises:
        ConfigurationError: there is no such data, or it is not like what the model was trained on.
        InputError: rows or labels are not what they should be.
    """
    name, kind = str(options.dataset), kind_of(str(options.dataset))
    if (kind == "columns") != (known.encoding is not None):
        there = "columns of a CSV or Parquet file" if known.encoding is not None else f"samples of shape {known.shape}"
        raise ConfigurationError(f"the model reads {there}, and {name} holds something else")
    if known.encoding is not None:
        return _columns(name, known, options, labelled, held_out)
    if held_out and has_test(name, kind):
        refuse_test_part(known.result, name)
    if kind == "folder":
        rows, labels, names = _folder(Path(name), known, options, labelled, held_out)
    else:
        rows, labels, names = _samples(name, kind, known, options, labelled, held_out)
    if known.shape is not None and tuple(rows.shape[1:]) != known.shape:
        raise ConfigurationError(
            f"the model reads samples of shape {known.shape}, and {name} holds {tuple(rows.shape[1:])}"
        )
    if labels is not None and known.classes is not None and int(labels.max()) >= len(known.classes):
        raise InputError(f"labels of {name} must be class indices below {len(known.classes)}, got {int(labels.max())}")
    return Part(rows, labels, names, f"{'test ' if has_test(name, kind) else _HELD_OUT * held_out}samples of {name}")


_HELD_OUT = "held-out "


def _is_split(name: str, kind: str) -> bool:
    """Whether data says itself which rows are not trained on."""
    if kind != "npz":
        return has_test(name, kind)
    with np.load(name, allow_pickle=False) as archive:
        return "x_train" in archive.files


def _kept(known: Known, name: str) -> HeldOut:
    """Which rows were held out in training.

    Raises:
        ConfigurationError: nothing says it.
        CheckpointError: what says it cannot be read.
    """
    if known.result is None:
        raise ConfigurationError(f"nothing says which rows of {name} were held out")
    return HeldOut.of_model(known.result, name)


def _samples_held_out(split: Split, groups: str | None) -> HeldOut:
    ids = None if split.test_groups is None else split.test_groups.tolist()
    return HeldOut(Counter(digests_of_samples(split.test_inputs, split.test_targets, ids)), groups)


def has_test(name: str, kind: str) -> bool:
    """Whether data says itself which rows are for testing."""
    if kind == "folder":
        return images.parts_of(Path(name))[1] is not None
    return kind == "named" or "x_test" in read_npz(Path(name))


def _numbered(count: int) -> list[str]:
    return list(map(str, range(count)))


def _refuse_column_options(options: argparse.Namespace, kind: str) -> None:
    lists = [f"--{name}" for name in ("categories", "drop", "missing") if getattr(options, name)]
    named = ("label", "labels", "target_range", "columns", "header", "no_header")
    lists += [f"--{name.replace('_', '-')}" for name in named if getattr(options, name)]
    if lists:
        raise ConfigurationError(f"{', '.join(lists)}: of CSV and Parquet files, and {options.dataset} is {kind}")


def _columns_to_train(name: str, groups: str | None, options: argparse.Namespace) -> Material:
    classes = columns.classes_of(options)
    table = columns.read_table(name, options)
    label = columns.label_of(table, options)
    encoding = columns.encoding_of(table, label, groups, options)
    held_out = held_out_of(table.contents(groups))
    if not held_out.any() or held_out.all():
        raise InputError(f"{name} has too few rows to hold a fifth of them out")
    parts = []
    for chosen, told in ((~held_out, "rows"), (held_out, "held-out samples")):
        some = table.part(chosen)
        labels = columns.labels_from(some, label, classes)
        names = _numbered(some.rows)
        parts.append(Part(some.frame(encoding), labels, names, f"{told} of {name}"))
    return Material(
        name,
        parts[0],
        parts[1],
        classes,
        (encoding.width,),
        encoding=encoding,
        label=label,
        target_range=None if options.target_range is None else tuple(options.target_range),
        groups=None if groups is None else table.part(~held_out).cells[groups],
        held_out=HeldOut(Counter(digests_of(table.part(held_out).contents(), table.names))),
    )


def _columns(name: str, known: Known, options: argparse.Namespace, labelled: bool, held_out: bool) -> Part:
    assert known.encoding is not None
    table = columns.read_table(name, options)
    names = _numbered(table.rows)
    if held_out:
        chosen = _kept(known, name).chosen(digests_of(table.contents(), table.names), name)
        table, names = table.part(chosen), [str(place) for place in chosen.nonzero()[0].tolist()]
    labels = None
    if labelled:
        label = options.label or known.label or columns.label_of(table, options)
        table.require([label], "--label")
        labels = columns.labels_from(table, label, None if known.is_regression else known.classes)
    return Part(table.frame(known.encoding), labels, names, f"{_HELD_OUT * held_out}samples of {name}")


def _folder_to_train(folder: Path, options: argparse.Namespace) -> tuple[Split, tuple[Any, ...]]:
    if options.classes is not None:
        raise ConfigurationError(f"{folder} has a class for each of its folders: leave --classes out")
    train, test = images.parts_of(folder)
    names = images.class_names(train)
    files, labels = images.labelled_files(train, names)
    pixels, targets = images.read_images(files, options), np.asarray(labels)
    if test is None:
        return split_of(pixels, targets, len(names)), names
    inputs = as_inputs(pixels)
    files, labels = images.labelled_files(test, names)
    held_out = as_inputs(images.read_images(files, options, tuple(inputs.shape[1:])))
    return Split(inputs, torch.from_numpy(targets), held_out, torch.tensor(labels), len(names)), names


def _folder(
    folder: Path, known: Known, options: argparse.Namespace, labelled: bool, held_out: bool
) -> tuple[Tensor, Tensor | None, list[str]]:
    train, test = images.parts_of(folder)
    inner = (test or train) if labelled or test is not None else train
    targets = None
    if labelled or images.folders_in(inner):
        files, labels = images.labelled_files(inner, known.classes or images.class_names(inner))
        targets = np.asarray(labels)
    else:
        files = images.files_in(inner)
    pixels = images.read_images(files, options, known.shape)
    names = [str(file.relative_to(inner)) for file in files]
    if held_out and test is None and targets is not None:
        digests = digests_of_samples(as_inputs(pixels), torch.from_numpy(targets))
        chosen = _kept(known, str(folder)).chosen(digests, str(folder))
        pixels, targets = pixels[chosen], targets[chosen]
        names = [name for name, is_held in zip(names, chosen.tolist(), strict=True) if is_held]
    return as_inputs(pixels), torch.from_numpy(targets) if labelled and targets is not None else None, names


def _samples(
    name: str, kind: str, known: Known, options: argparse.Namespace, labelled: bool, held_out: bool
) -> tuple[Tensor, Tensor | None, list[str]]:
    classes = options.classes or (None if known.classes is None else len(known.classes))
    if kind == "named" or (held_out and _is_split(name, kind)):
        split = load_dataset(name, options.data_dir, classes=None if kind == "named" else classes or 2)
        return split.test_inputs, split.test_targets if labelled else None, _numbered(len(split.test_targets))
    arrays = read_npz(Path(name))
    inputs_name, labels_name = ("x_test", "y_test") if "x_test" in arrays else ("X", "y")
    for wanted in (inputs_name, labels_name)[: 1 + labelled]:
        if wanted not in arrays:
            raise ConfigurationError(f"{name} has no array {wanted!r}; it holds {sorted(arrays)}")
    inputs = arrays[inputs_name]
    if inputs.ndim < 2 or not len(inputs) or inputs.dtype.kind not in "biuf":
        raise InputError(f"{inputs_name} of {name} must be numbers (N, ...), got {inputs.dtype} {inputs.shape}")
    targets = None
    if labelled:
        found = arrays[labels_name]
        if found.shape != inputs.shape[:1] or (not known.is_regression and found.dtype.kind not in "iu"):
            raise InputError(f"{labels_name} of {name} must be a label for each row, got {found.dtype} {found.shape}")
        if not known.is_regression and int(found.min()) < 0:
            raise InputError(f"{labels_name} of {name} must be class indices from 0, got {int(found.min())}")
        targets = torch.from_numpy(found if known.is_regression else found.astype(np.int64))
    rows, names = as_inputs(inputs), _numbered(len(inputs))
    if not held_out:
        return rows, targets, names
    kept = _kept(known, name)
    assert targets is not None
    ids = None if kept.groups is None else arrays.get(kept.groups)
    if kept.groups is not None and (ids is None or ids.shape != targets.shape):
        raise ConfigurationError(f"{name} has no array {kept.groups!r}, which said in training whose each row is")
    chosen = kept.chosen(digests_of_samples(rows, targets, None if ids is None else ids.tolist()), name)
    return rows[chosen], targets[chosen], [names[place] for place in chosen.nonzero()[0].tolist()]


def size_of(options: argparse.Namespace, kind: str) -> tuple[int, tuple[int, ...]]:
    """How many rows a named set or an NPZ file has to train on, with those to hold out, and the shape of one.

    Raises:
        ConfigurationError: it cannot be read, or has no rows.
    """
    name = str(options.dataset)
    if kind == "named":
        split = load_dataset(name, options.data_dir)
        return len(split.targets), tuple(split.inputs.shape[1:])
    arrays = read_npz(Path(name))
    known = next((key for key in ("x_train", "X") if key in arrays), None)
    if known is None or arrays[known].ndim < 2 or not len(arrays[known]):
        raise ConfigurationError(f"{name} has no array 'X' or 'x_train' (N, ...); it holds {sorted(arrays)}")
    inputs = arrays[known]
    return len(inputs), tuple(as_inputs(inputs[:1]).shape[1:])
