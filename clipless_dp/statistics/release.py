"""How a statistic is charged, drawn and kept: in the ledger before there is anything to release."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from accounting import Accountant, GaussianRelease, Provenance, new_run
from clipless_dp.arguments import require_accountant, unmasked
from clipless_dp.checkpoint import check_writable, load_checkpoint, save_checkpoint
from clipless_dp.distributed import placement
from clipless_dp.errors import CheckpointError, ConfigurationError, InputError
from clipless_dp.noise import NoiseSource, ReproducibleNoise, derived_seed, noise_source, source_name
from clipless_dp.sampling.overlaps import refuse_overlapping_columns
from clipless_dp.sampling.people import People, Unit, refuse_other_units
from clipless_dp.sampling.samples import public_size
from clipless_dp.tensor_types import refuse_code

Exact = TypeVar("Exact")
"""What is computed of the data before noise is added."""

CHUNK = 1 << 24
"""Entries that are converted to float64 at once."""


@dataclass(frozen=True)
class Releases:
    """How the statistics before one training are charged and drawn: arguments of the functions that release them.

    Attributes:
        accountant: to which training will be added.
        dataset_size: public number of samples.
        checkpoint: of training; what is released is kept beside it, so that a run that goes on pays once.
        seed: of a reproducible run, or ``None``.
        noise: a source's name or a source, where there is no seed.
        people: whose the rows are, where the promise is about people.
    """

    accountant: Accountant
    dataset_size: int
    checkpoint: str | os.PathLike[str] | None = None
    seed: int | None = None
    noise: NoiseSource | str | None = None
    people: People | None = None

    def arguments(self, name: str) -> dict[str, Any]:
        """``accountant``, ``dataset_size``, ``noise``, ``file`` and ``groups`` of the release of this name."""
        seed = None if self.seed is None else derived_seed(self.seed, name)
        return {
            "accountant": self.accountant,
            "dataset_size": self.dataset_size,
            "noise": noise_source(self.noise) if seed is None else ReproducibleNoise(seed),
            "file": None if self.checkpoint is None else Path(f"{os.fspath(self.checkpoint)}.{name}"),
            "groups": self.people,
        }


def require_tensor(values: object) -> Tensor:
    """The values, once they are known to be a tensor whose entries all lie in memory.

    Raises:
        InputError: they are not.
    """
    if not isinstance(values, Tensor):
        raise InputError(f"expected a tensor, got {type(values).__name__}: convert it by torch.as_tensor")
    refuse_code(values, "what a statistic is of")
    if values.layout is not torch.strided or values.is_quantized or values.is_meta:
        raise InputError(f"expected a dense tensor, got {values.dtype} of {values.layout} on {values.device}")
    return values


def tensor_of(values: object) -> Tensor:
    """A tensor, or a numpy array of numbers as one.

    Raises:
        InputError: it is neither, or a mask covers some of it.
    """
    unmasked("rows", values)
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        if values.dtype.kind == "f" and values.dtype.itemsize > 8:
            raise InputError(f"{values.dtype} is wider than tensors are: give float64, rows.astype('float64')")
        plain = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        # Of an array that is read-only torch warns.
        values = torch.from_numpy(plain if plain.flags.writeable else plain.copy())
    return require_tensor(values)


def checked_size(values: Tensor, dataset_size: int | None, people: People | None = None) -> int:
    """The public number of records, or of people.

    Raises:
        InputError: the values are not floating-point numbers of shape ``(N, C, ...)``, or hold no record.
        PrivacyError: a record lies on another person's in memory.
        ConfigurationError: the number of records is out of range.
    """
    if values.dim() < 2 or not values.is_floating_point() or values.numel() == 0:
        raise InputError(
            f"expected floating-point values (records, channels, ...), got {values.dtype} {tuple(values.shape)}"
        )
    refuse_overlapping_columns([values.detach()], people=people)
    if people is None:
        return public_size(dataset_size, len(values))
    size = public_size(dataset_size, people.count)
    people.warn_of_size(size)
    return size


def shares_of(values: Tensor, people: People | None) -> Tensor | None:
    """What each record weighs, ``(N,)``, where people are the unit; ``None``: one each."""
    return None if people is None else people.shares(values.device)


def chunks(values: Tensor, shares: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """Some records at a time, and what they weigh, if that is told."""
    parts = (values.detach(),) if shares is None else (values.detach(), shares)
    rows = max(1, CHUNK // max(1, values[0].numel()))
    return zip(*(part.split(rows) for part in parts), strict=True)


@dataclass(frozen=True)
class Charge:
    """What pays for one statistic, and where it is kept.

    Attributes:
        noise_multiplier: ``σ`` of all that is released.
        accountant: records the release.
        noise: as for :func:`clipless_dp.statistics.private_moments`.
        file: as there.
        people: whose the records are, where the release is about people.
    """

    noise_multiplier: float
    accountant: Accountant
    noise: NoiseSource | str | None
    file: str | os.PathLike[str] | None
    people: People | None = None

    def released(
        self, exact: Callable[[], Exact], draw: Callable[[Exact, NoiseSource], Tensor], settings: Mapping[str, object]
    ) -> tuple[Tensor, GaussianRelease]:
        """What a statistic releases, and the event that paid for it: from the file if there is one, else a new release.

        Args:
            exact: what is computed of the data beforehand: where that fails, nothing has been charged.
            draw: makes what is released of it, with noise of a source, once the release is in the ledger.
            settings: what the file must agree with, beside ``noise_multiplier`` and the unit.

        Raises:
            ConfigurationError: the noise is no source, or several processes train together and there is no file yet,
                or the accountant's ledger is about another unit.
            CheckpointError: the file belongs to other settings, is damaged or cannot be written.
        """
        unit: Unit = "row" if self.people is None else "person"
        refuse_other_units(require_accountant(self.accountant).ledger, unit)
        settings = {**settings, "noise_multiplier": self.noise_multiplier}
        if self.people is not None:
            settings["unit"] = unit
        path = None if self.file is None else Path(self.file)
        if path is not None and path.exists():
            return _reread(path, settings, self.accountant, unit)
        source = noise_source(self.noise)
        source.begin_step(0)
        if placement.world().size > 1:
            raise ConfigurationError(
                "each of several processes would release a statistic of its own, and each ledger count one: release it "
                "in one process with file=..., which all ranks then read"
            )
        if path is not None:
            check_writable(path)
        prepared = exact()
        name = source_name(type(source))
        release = GaussianRelease(self.noise_multiplier, identity=new_run())
        self.accountant.record(release, provenance=_provenance(release, name, unit))
        drawn = draw(prepared, source)
        if path is not None:
            kept = {"settings": settings, "released": drawn.cpu(), "identity": release.identity, "noise": name}
            save_checkpoint(path, kept)
        return drawn, release


def _reread(
    path: Path, settings: dict[str, object], accountant: Accountant, unit: Unit
) -> tuple[Tensor, GaussianRelease]:
    """What a file holds, and the event that paid for it, recorded unless it is in the ledger."""
    content = load_checkpoint(path)
    kept = content.get("settings")
    # The data itself is not compared, as a digest of it would be a release. Files of before hold no type of numbers.
    if isinstance(kept, dict):
        kept = {"dtype": settings["dtype"], **kept}
    if kept != settings or not isinstance(content.get("released"), Tensor) or not content.get("identity"):
        raise CheckpointError(f"{path} does not hold this statistic: {kept!r} there, {settings!r} here; choose another")
    release = GaussianRelease(float(kept["noise_multiplier"]), identity=str(content["identity"]))
    if all(event != release for event, _ in accountant.ledger):
        # Files of before sources were kept tell none.
        accountant.record(release, provenance=_provenance(release, str(content.get("noise", "")), unit))
    return content["released"], release


def _provenance(release: GaussianRelease, source: str, unit: Unit) -> Provenance:
    return Provenance(release.identity, sampling="none", noise=source, unit="" if unit == "row" else unit)
