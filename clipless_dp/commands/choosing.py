"""Which route a kind of data takes where none is named: by its public shape alone."""

from __future__ import annotations

from dataclasses import dataclass

from clipless_dp import presets
from clipless_dp.errors import ConfigurationError
from clipless_dp.training import FitResult

TABLES = "tables"
"""The preset whose settings follow from the number of rows and ε: :func:`clipless_dp.tables.fit_table`."""

TABLES_PROVENANCE = "held-out training rows of eight public tables, once for all of them (benchmarks/tables.py)"
TABLES_SUMMARY = "rows of any scale: charged statistics, random cosines, one layer"


_REFLECTED, _POOLED = 8, 16
"""Pixels that features of photographs, and pooled convolutions, need on a side."""


@dataclass(frozen=True)
class Choice:
    """A route.

    Attributes:
        name: of a preset; ``None``: a network of options.
        told: what is printed of it.
        provenance: where its settings come from; ``None`` of a network.
    """

    name: str | None
    told: tuple[str, ...] = ()
    provenance: str | None = None


def choose(shape: tuple[int, ...], *, columns: bool, preset: str | None, network: bool) -> Choice:
    """The route of data: what is named, or what its shape has.

    Args:
        shape: of a sample, public.
        columns: whether it is of a CSV or Parquet file.
        preset: that was named.
        network: whether a network was.

    Raises:
        ConfigurationError: what was named does not go with columns.
    """
    if columns and (network or preset not in (None, TABLES)):
        raise ConfigurationError(
            "columns of CSV and Parquet files are of any scale, which --preset tables measures, charged: leave other "
            "presets and --route, --network, --tau and --input-norm out, or bring the columns to a public scale in an "
            "NPZ file"
        )
    if network:
        return Choice(None)
    if preset is not None:
        return _of(preset, f"preset {preset}")
    if len(shape) == 1:
        return _of(TABLES, "rows of columns: preset tables")
    name = _of_images(shape) if len(shape) == 3 else None
    if name is not None:
        return _of(name, f"{'grey' if shape[0] == 1 else 'colour'} images: preset {name}")
    return Choice(None, (f"samples of shape {shape}: a small network behind gradient gates",))


def _of_images(shape: tuple[int, ...]) -> str | None:
    """The preset of images that these are large enough for."""
    channels, height, width = shape
    if channels == 1:
        return "features-linear"
    if channels == 3 and min(height, width) >= _REFLECTED and width % 4 == 0:
        return "photographs-linear"
    # Else mirror images would fall between the places of its features.
    return "photographs-gradient" if channels == 3 and min(height, width) >= _POOLED else None


def _of(name: str, why: str) -> Choice:
    if name == TABLES:
        summary, provenance = TABLES_SUMMARY, TABLES_PROVENANCE
    else:
        summary, provenance = presets.get(name).summary, presets.get(name).provenance
    return Choice(name, (f"{why}: {summary}", f"chosen on: {provenance}"), provenance)


def settings_of(result: FitResult) -> str | None:
    """The settings of a run in a line; ``None`` of an optimizer of a user's own."""
    learning = result.learning
    if learning is None or not isinstance(learning.optimizer, str):
        return None
    momentum = f", momentum {learning.momentum:g}" if learning.optimizer == "sgd" else ""
    return (
        f"{learning.epochs:.4g} epochs, batches of {learning.batch_size}, {learning.optimizer}, "
        f"learning rate {learning.lr:.4g}{momentum}"
    )
