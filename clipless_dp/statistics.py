"""Private statistics of the data, for choices that come before training: moments, quantiles, and columns of tables.

Each is one release of all records: it goes into the ledger of an accountant before any noise is drawn, and ``fit`` with
that accountant calibrates training so that both together keep to the target.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accounting import Accountant, GaussianRelease, Provenance, new_run
from clipless_dp import distributed
from clipless_dp.arguments import require_accountant
from clipless_dp.checkpoint import check_writable, load_checkpoint, save_checkpoint
from clipless_dp.errors import CheckpointError, ConfigurationError, InputError
from clipless_dp.gates import sample_norms
from clipless_dp.noise import NoiseSource, ReproducibleNoise, derived_seed, noise_source, noisy, source_name

_CHUNK = 1 << 24
"""Entries that are converted to float64 at once."""

_MOMENTS_SENSITIVITY = math.sqrt(2.0)


@dataclass(frozen=True)
class Releases:
    """How the statistics before one training are charged and drawn: arguments of the functions of this module.

    Attributes:
        accountant: to which training will be added.
        dataset_size: public number of samples.
        checkpoint: of training; what is released is kept beside it, so that a run that goes on pays once.
        seed: of a reproducible run, or ``None``.
        noise: a source's name or a source, where there is no seed.
    """

    accountant: Accountant
    dataset_size: int
    checkpoint: str | os.PathLike[str] | None = None
    seed: int | None = None
    noise: NoiseSource | str | None = None

    def arguments(self, name: str) -> dict[str, Any]:
        """``accountant``, ``dataset_size``, ``noise`` and ``file`` of the release of this name."""
        seed = None if self.seed is None else derived_seed(self.seed, name)
        return {
            "accountant": self.accountant,
            "dataset_size": self.dataset_size,
            "noise": noise_source(self.noise) if seed is None else ReproducibleNoise(seed),
            "file": None if self.checkpoint is None else Path(f"{os.fspath(self.checkpoint)}.{name}"),
        }


@dataclass(frozen=True)
class Moments:
    """Released means and variances of channels; what is computed from them is post-processing.

    Attributes:
        mean: ``(C,)``, float64.
        variance: ``(C,)``, float64, at least the square of ``floor``.
        floor: the least deviation that is told from noise.
        release: the event that paid for them.
    """

    mean: Tensor
    variance: Tensor
    floor: float
    release: GaussianRelease

    def standardise(self, values: Tensor) -> Tensor:
        """``(x - mean)/deviation`` of each channel.

        Args:
            values: ``(B, C, ...)``.

        Raises:
            InputError: the channels are not as many.
        """
        if values.dim() < 2 or values.shape[1] != len(self.mean):
            raise InputError(f"expected values (batch, {len(self.mean)}, ...), got {tuple(values.shape)}")
        shape = (-1, *([1] * (values.dim() - 2)))
        mean, deviation = (
            part.to(values.device, values.dtype).reshape(shape) for part in (self.mean, self.variance.sqrt())
        )
        return (values - mean) / deviation


def private_moments(
    values: Tensor,
    *,
    norm: float,
    noise_multiplier: float,
    accountant: Accountant,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> Moments:
    """Mean and variance of each channel, by one Gaussian release of first and second moments.

    Each record is projected on the ball of radius ``R = norm``; one that is not finite becomes zero. With ``P`` entries
    in a channel of a record, what is summed over records is ``(s/(R√P), v/R²)``, where ``s`` and ``v`` hold the sum
    and the sum of squares of each channel. A record of norm ``tR``, ``t ≤ 1``, adds a vector of norm at most
    ``√(t² + t⁴) ≤ √2``: by Cauchy and Schwarz ``‖s‖² ≤ P·Σ v = P‖x‖²``, and ``‖v‖ ≤ Σ v = ‖x‖²`` because squares are
    not negative. Both are attained, by a record with all of its norm spread evenly over one channel.

    Args:
        values: ``(N, C)`` or ``(N, C, ...)``: records, channels, and places that share their channel's moments.
        norm: ``R``; a public choice, or one of :func:`private_quantile`.
        noise_multiplier: ``σ``: the sums get noise of standard deviation ``√2·σ``.
        accountant: records the release, under its own neighbouring relation.
        dataset_size: public number of records; by default ``N``, which is then taken to be public.
        noise: ``"system"``, the default, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        file: keeps what was released. If it exists, it is read in place of a new release, and the same release is
            recorded: a run that goes on from a checkpoint pays once. What is public is compared (arguments, shape of a
            record, type of the numbers), not the data: for other data choose another file.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the values are not floating-point numbers of shape ``(N, C, ...)``, or hold no record.
        CheckpointError: the file belongs to other settings, is damaged or cannot be written.

    Returns:
        The moments. Variances are lifted to that of their own noise where they are below it, ``R²√2σ/(NP)``.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record.
    """
    size = _checked_values(values, dataset_size, noise_multiplier)
    if not (math.isfinite(norm) and 1e-8 <= norm <= 1e18):
        raise ConfigurationError(f"norm must lie in [1e-8, 1e18], got {norm!r}")
    settings: dict[str, object] = {
        "statistic": "moments",
        "norm": float(norm),
        "noise_multiplier": float(noise_multiplier),
        "dataset_size": size,
        "dtype": str(values.dtype),
        "shape": list(values.shape[1:]),
    }
    released, release = _released(
        lambda: _moment_sums(values, norm), _MOMENTS_SENSITIVITY, noise_multiplier, accountant, noise, file, settings
    )
    return _moments(released.cpu(), norm, size, values[0, 0].numel(), noise_multiplier, release)


def _moments(
    sums: Tensor, norm: float, size: int, places: int, noise_multiplier: float, release: GaussianRelease
) -> Moments:
    """Means and variances from the noisy sums ``(2, C)``."""
    first, second = sums / size
    mean = first * norm / math.sqrt(places)
    # The deviation of the second moment's own noise: a smaller variance is not told from none.
    floor = norm * math.sqrt(_MOMENTS_SENSITIVITY * noise_multiplier / (size * places))
    variance = (second * norm**2 / places - mean.square()).clamp(min=floor**2)
    return Moments(mean, variance, floor, release)


def private_quantile(
    values: Tensor,
    quantile: float,
    *,
    lower: float,
    upper: float,
    noise_multiplier: float,
    accountant: Accountant,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> float:
    """A quantile of one positive number for each record, norms say, by bisection with noisy counts.

    Twenty times the range is halved on a logarithmic scale, by counting the values up to its middle with noise of
    standard deviation ``σ√20``, and comparing with the share ``quantile`` of the public number of records. One record
    changes each count by at most 1, and releases that are chosen in view of earlier ones compose like one of
    multiplier ``σ`` (Dong, Roth and Su 2022, Corollary 2). It chooses a cap: ``norm`` of :func:`private_moments`,
    ``input_norm`` of a model, or a gate's value, as in Andrew et al. 2021.

    Args:
        values: ``(N,)``; one that is not a number counts as large.
        quantile: share of the records, in (0, 1).
        lower: public lower end of the range, positive.
        upper: public upper end, above ``lower``.
        noise_multiplier: ``σ`` of all counts together.
        accountant: records the release.
        dataset_size: public number of records; by default ``N``, which is then taken to be public.
        noise: ``"system"``, the default, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        file: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the values are not ``(N,)`` floating-point numbers, or there are none.
        CheckpointError: as for :func:`private_moments`.

    Returns:
        The quantile to a relative ``(upper/lower)^(2⁻²⁰)``, but for the noise of the counts: a record or so in
        ``σ√20``.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record.
    """
    if values.dim() != 1:
        raise InputError(f"expected one number for each record, (N,), got {tuple(values.shape)}")
    size = _checked_values(values[:, None], dataset_size, noise_multiplier)
    if not 0.0 < quantile < 1.0:
        raise ConfigurationError(f"quantile must lie in (0, 1), got {quantile!r}")
    if not (0.0 < lower < upper < math.inf):
        raise ConfigurationError(f"the range must have 0 < lower < upper, got {lower!r} and {upper!r}")
    settings: dict[str, object] = {
        "statistic": "quantile",
        "quantile": quantile,
        "range": [float(lower), float(upper)],
        "noise_multiplier": float(noise_multiplier),
        "dataset_size": size,
        "dtype": str(values.dtype),
    }
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        return float(_reread(path, settings, accountant)[0])
    source = _started(noise)
    release = _recorded(noise_multiplier, accountant, path, source)
    deviation = noise_multiplier * math.sqrt(_HALVINGS)
    low, high = math.log(lower), math.log(upper)
    exact = values.detach().double()
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        count = float(noisy((exact <= math.exp(middle)).sum(), deviation, source))
        low, high = (middle, high) if count < quantile * size else (low, middle)
    result = torch.tensor(math.exp(0.5 * (low + high)), dtype=torch.float64)
    _keep(path, result, release, settings, source)
    return float(result)


_HALVINGS = 20


def private_fraction(
    flags: Tensor,
    *,
    noise_multiplier: float,
    accountant: Accountant,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> float:
    """The share of records that have a property, a positive label say, by one noisy count.

    Args:
        flags: ``(N,)``, ``True`` or 1 where a record has it, ``False`` or 0 where not.
        noise_multiplier: ``σ``: the count gets noise of standard deviation ``σ``; a record changes it by at most 1.
        accountant: records the release, under its own neighbouring relation.
        dataset_size: public number of records; by default ``N``, which is then taken to be public.
        noise: ``"system"``, the default, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        file: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the flags are not ``(N,)`` zeros and ones, or there are none.
        CheckpointError: as for :func:`private_moments`.

    Returns:
        The noisy count over ``dataset_size``, moved into ``[s, 1-s]`` with ``s = min(½, σ/N)``: nearer to 0 or 1 it is
        not told from noise.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record.
    """
    if flags.dim() != 1 or flags.is_complex() or not bool(((flags == 0) | (flags == 1)).all()):
        raise InputError(f"expected zeros and ones, (N,), got {flags.dtype} {tuple(flags.shape)}")
    exact = flags.detach().double()
    size = _checked_values(exact[:, None], dataset_size, noise_multiplier)
    settings: dict[str, object] = {
        "statistic": "fraction",
        "noise_multiplier": float(noise_multiplier),
        "dataset_size": size,
        "dtype": str(flags.dtype),
    }
    count, _ = _released(exact.sum, 1.0, noise_multiplier, accountant, noise, file, settings)
    least = min(0.5, noise_multiplier / size)
    return min(max(float(count) / size, least), 1.0 - least)


class Standardisation(nn.Module):
    """``(clip(x, ±c)/c - μ)/s`` of each column of a table, cut at ±4: a public function once its numbers are released.

    A missing cell (NaN) becomes zero, which is the mean; an infinite one is cut like any other.

    Args:
        caps: ``c``, ``(C,)``, positive.
        moments: ``μ`` and ``s²`` of ``clip(x, ±c)/c``.

    Shape:
        ``(B, C)`` to ``(B, C)``, float32.

    Raises:
        InputError: the rows are not floating-point numbers, or have other columns.

    Attributes:
        release: the event that paid for the numbers.
    """

    caps: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, caps: Tensor, moments: Moments) -> None:
        super().__init__()
        self.release = moments.release
        self.register_buffer("caps", caps)
        self.register_buffer("mean", moments.mean)
        self.register_buffer("deviation", moments.variance.sqrt())

    def forward(self, rows: Tensor) -> Tensor:
        """Standardises rows."""
        if rows.dim() != 2 or rows.shape[1] != len(self.caps) or not rows.is_floating_point():
            raise InputError(
                f"expected floating-point rows (batch, {len(self.caps)}), got {rows.dtype} {tuple(rows.shape)}"
            )
        standardised = (_capped(rows.to(self.caps.dtype), self.caps) - self.mean) / self.deviation
        standardised = torch.where(torch.isnan(rows), torch.zeros_like(standardised), standardised)
        return standardised.clamp(-_LARGEST_STANDARDISED, _LARGEST_STANDARDISED).float()


_LARGEST_STANDARDISED = 4.0


def private_standardisation(
    values: Tensor,
    *,
    noise_multiplier: float,
    accountant: Accountant,
    lower: float = 1e-6,
    upper: float = 1e6,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
) -> Standardisation:
    """What brings the columns of a table to one scale, whatever theirs are: caps, means and deviations, in one release.

    First, a high quantile of each column's magnitudes, for all columns at once: ``h`` times the range is halved on a
    logarithmic scale, to an eighth, by noisy counts as in :func:`private_quantile`. A record changes each column's
    count by at most 1, so ``C`` counts by at most ``√C`` in norm. The quantile is the highest that the counts' noise
    lets one tell from the largest value: of rank ``1 - 3·noise/N``, between 0.7 and 0.98. Twice it is the cap ``c``.

    Second, mean and variance of the columns of ``clip(x, ±c)/c`` as in :func:`private_moments`, with ``R = √C/2``:
    most magnitudes are below half the cap, so that few records are projected. Each part gets noise of multiplier
    ``σ√2``, which compose to ``σ``.

    A column that is zero in nearly all records becomes an indicator of what is not: its cap is the range's lower end.

    Args:
        values: ``(N, C)``, floating-point; missing cells (NaN) count as zero.
        noise_multiplier: ``σ`` of both parts together.
        accountant: records the release, under its own neighbouring relation.
        lower: public lower end of the range of magnitudes, positive.
        upper: public upper end, above ``lower``. A wide range costs little: ``h`` grows with the logarithm of the
            number of octaves.
        dataset_size: public number of records; by default ``N``, which is then taken to be public.
        noise: ``"system"``, the default, ``"secure"`` or a source, see :class:`clipless_dp.CliplessDPOptimizer`.
        file: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the values are not floating-point numbers of shape ``(N, C)``, or there are none.
        CheckpointError: as for :func:`private_moments`.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record: the second part
        is chosen in view of the first, and adaptive Gaussian releases compose like one (Dong, Roth and Su 2022,
        Corollary 2).
    """
    if values.dim() != 2:
        raise InputError(f"expected rows and columns, (N, C), got {tuple(values.shape)}")
    size = _checked_values(values, dataset_size, noise_multiplier)
    if not (1e-8 <= lower < upper <= 1e18):
        raise ConfigurationError(f"the range must have 1e-8 <= lower < upper <= 1e18, got {lower!r} and {upper!r}")
    columns = values.shape[1]
    settings: dict[str, object] = {
        "statistic": "standardisation",
        "range": [float(lower), float(upper)],
        "noise_multiplier": float(noise_multiplier),
        "dataset_size": size,
        "dtype": str(values.dtype),
        "columns": columns,
    }
    path = None if file is None else Path(file)
    part = noise_multiplier * math.sqrt(2.0)
    norm = math.sqrt(columns) / 2.0
    if path is not None and path.exists():
        released, release = _reread(path, settings, accountant)
    else:
        source = _started(noise)
        release = _recorded(noise_multiplier, accountant, path, source)
        caps = 2.0 * _noisy_magnitudes(values, size, lower, upper, part, source)
        sums = torch.zeros(2, columns, dtype=torch.float64, device=values.device)
        for rows in values.detach().split(max(1, _CHUNK // columns)):
            sums += _moment_sums(_capped(rows.double(), caps).nan_to_num(0.0), norm)
        released = torch.cat([caps[None], noisy(sums, part * _MOMENTS_SENSITIVITY, source)])
        _keep(path, released, release, settings, source)
    caps, sums = released[0].cpu(), released[1:].cpu()
    return Standardisation(caps, _moments(sums, norm, size, 1, part, release)).to(values.device)


def _capped(rows: Tensor, caps: Tensor) -> Tensor:
    return rows.clamp(-caps, caps) / caps


def _noisy_magnitudes(
    values: Tensor, size: int, lower: float, upper: float, noise_multiplier: float, source: NoiseSource
) -> Tensor:
    """``(C,)``: a high quantile of each column's magnitudes, by bisection of all columns at once."""
    columns = values.shape[1]
    low = torch.full((columns,), math.log(lower), dtype=torch.float64, device=values.device)
    high = torch.full_like(low, math.log(upper))
    halvings = max(1, math.ceil(math.log2(math.log(upper / lower) / _RESOLUTION)))
    deviation = noise_multiplier * math.sqrt(halvings) * _counts_sensitivity(columns)
    rank = size * (1.0 - min(0.3, max(0.02, 3.0 * deviation / size)))
    for _ in range(halvings):
        middle = 0.5 * (low + high)
        above = noisy(_counts(values, middle.exp()), deviation, source) < rank
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high.exp()


_RESOLUTION = 0.125


def _counts_sensitivity(columns: int) -> float:
    return math.sqrt(columns)


def _counts(values: Tensor, thresholds: Tensor) -> Tensor:
    """``(C,)``: how many magnitudes of each column are at most its threshold."""
    counts = torch.zeros_like(thresholds)
    for rows in values.detach().split(max(1, _CHUNK // values.shape[1])):
        counts += (rows.double().nan_to_num(0.0, math.inf, -math.inf).abs() <= thresholds).sum(0)
    return counts


def _checked_values(values: Tensor, dataset_size: int | None, noise_multiplier: float) -> int:
    if values.dim() < 2 or not values.is_floating_point() or values.numel() == 0:
        raise InputError(
            f"expected floating-point values (records, channels, ...), got {values.dtype} {tuple(values.shape)}"
        )
    size = len(values) if dataset_size is None else dataset_size
    if not (isinstance(size, int) and size >= 1):
        raise ConfigurationError(f"dataset_size must be a positive integer, got {dataset_size!r}")
    if not (isinstance(noise_multiplier, Real) and math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ConfigurationError(f"noise_multiplier must be finite and positive, got {noise_multiplier!r}")
    return size


def _moment_sums(values: Tensor, norm: float) -> Tensor:
    """``(2, C)``: the sums of :func:`private_moments` over the records, without noise."""
    channels = values.shape[1]
    sums = torch.zeros(2, channels, dtype=torch.float64, device=values.device)
    for some in values.detach().split(max(1, _CHUNK // values[0].numel())):
        rows = some.double().flatten(2) if some.dim() > 2 else some.double().unsqueeze(2)
        lengths = sample_norms(rows)
        usable = torch.isfinite(lengths)
        shrunk = rows[usable] / lengths[usable].clamp(min=norm)[:, None, None]
        sums[0] += shrunk.sum((0, 2)) / math.sqrt(rows.shape[2])
        sums[1] += shrunk.square().sum((0, 2))
    return sums


def _recorded(
    noise_multiplier: float, accountant: Accountant, path: Path | None, source: NoiseSource
) -> GaussianRelease:
    """The event of a new release, in the ledger before there is anything to release."""
    require_accountant(accountant)
    if distributed.world().size > 1:
        raise ConfigurationError(
            "each of several processes would release a statistic of its own, and each ledger count one: release it in "
            "one process with file=..., which all ranks then read"
        )
    if path is not None:
        check_writable(path)
    release = GaussianRelease(noise_multiplier, identity=new_run())
    accountant.record(release, provenance=_provenance(release, source_name(type(source))))
    return release


def _provenance(release: GaussianRelease, source: str) -> Provenance:
    return Provenance(release.identity, sampling="none", noise=source)


def _started(noise: NoiseSource | str | None) -> NoiseSource:
    source = noise_source(noise)
    source.begin_step(0)
    return source


def _released(
    exact: Callable[[], Tensor],
    sensitivity: float,
    noise_multiplier: float,
    accountant: Accountant,
    noise: NoiseSource | str | None,
    file: str | os.PathLike[str] | None,
    settings: dict[str, object],
) -> tuple[Tensor, GaussianRelease]:
    """Sums with noise, and the event that paid for them: from the file if it is there, else in a new release."""
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        return _reread(path, settings, accountant)
    source = _started(noise)
    sums = exact()
    release = _recorded(noise_multiplier, accountant, path, source)
    released = noisy(sums, noise_multiplier * sensitivity, source)
    _keep(path, released, release, settings, source)
    return released, release


def _keep(
    path: Path | None, released: Tensor, release: GaussianRelease, settings: dict[str, object], source: NoiseSource
) -> None:
    if path is not None:
        kept = {"identity": release.identity, "noise": source_name(type(source))}
        save_checkpoint(path, {"settings": settings, "released": released.cpu(), **kept})


def _reread(path: Path, settings: dict[str, object], accountant: Accountant) -> tuple[Tensor, GaussianRelease]:
    require_accountant(accountant)
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
        accountant.record(release, provenance=_provenance(release, str(content.get("noise", ""))))
    return content["released"], release
