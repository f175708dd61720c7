"""Private statistics of the data, for choices that come before training: moments to standardise by, and quantiles.

Each is one release of all records: it goes into the ledger of an accountant before any noise is drawn, and ``fit`` with
that accountant calibrates training so that both together keep to the target.
"""

from __future__ import annotations

import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accounting import Accountant, GaussianRelease
from clipless_dp.checkpoint import check_writable, load_checkpoint, save_checkpoint
from clipless_dp.errors import CheckpointError, ConfigurationError, InputError
from clipless_dp.gates import sample_norms
from clipless_dp.noise import NoiseSource, SystemNoise

_MARGIN = 1.0 + 1e-6
"""Noise is drawn this much larger, so that rounding of sums and factors never makes it smaller than recorded."""

_CHUNK = 1 << 24
"""Entries that are converted to float64 at once."""

_MOMENTS_SENSITIVITY = math.sqrt(2.0)


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
    noise: NoiseSource | None = None,
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
        noise: source of the noise; by default the operating system seeds it.
        file: keeps what was released. If it exists, it is read in place of a new release, and the same release is
            recorded: a run that goes on from a checkpoint pays once.

    Raises:
        ConfigurationError: an argument is out of range.
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
        "shape": list(values.shape[1:]),
    }
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        released, release = _reread(path, settings, accountant)
    else:
        sums = _moment_sums(values, norm)
        released, release = _release(sums, _MOMENTS_SENSITIVITY, noise_multiplier, accountant, noise, path, settings)
    places = values[0, 0].numel()
    first, second = released.cpu() / size
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
    noise: NoiseSource | None = None,
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
        noise: source of the noise; by default the operating system seeds it.
        file: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range.
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
    }
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        return float(_reread(path, settings, accountant)[0])
    release = _recorded(noise_multiplier, accountant, path)
    source = _started(noise)
    draws = source.standard_normal_(torch.empty(_HALVINGS, dtype=torch.float64))
    low, high = math.log(lower), math.log(upper)
    exact = values.detach().double()
    for draw in draws.tolist():
        middle = 0.5 * (low + high)
        count = int((exact <= math.exp(middle)).sum()) + noise_multiplier * math.sqrt(_HALVINGS) * _MARGIN * draw
        low, high = (middle, high) if count < quantile * size else (low, middle)
    result = torch.tensor(math.exp(0.5 * (low + high)), dtype=torch.float64)
    _keep(path, result, release, settings)
    return float(result)


_HALVINGS = 20


def _checked_values(values: Tensor, dataset_size: int | None, noise_multiplier: float) -> int:
    if values.dim() < 2 or not values.is_floating_point() or values.numel() == 0:
        raise InputError(
            f"expected floating-point values (records, channels, ...), got {values.dtype} {tuple(values.shape)}"
        )
    size = len(values) if dataset_size is None else dataset_size
    if not (isinstance(size, int) and size >= 1):
        raise ConfigurationError(f"dataset_size must be a positive integer, got {dataset_size!r}")
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
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


def _recorded(noise_multiplier: float, accountant: Accountant, path: Path | None) -> GaussianRelease:
    """The event of a new release, in the ledger before there is anything to release."""
    if path is not None:
        check_writable(path)
    release = GaussianRelease(noise_multiplier, identity=uuid.uuid4().hex)
    accountant.record(release)
    return release


def _started(noise: NoiseSource | None) -> NoiseSource:
    source = SystemNoise() if noise is None else noise
    source.begin_step(0)
    return source


def _release(
    sums: Tensor,
    sensitivity: float,
    noise_multiplier: float,
    accountant: Accountant,
    noise: NoiseSource | None,
    path: Path | None,
    settings: dict[str, object],
) -> tuple[Tensor, GaussianRelease]:
    release = _recorded(noise_multiplier, accountant, path)
    drawn = _started(noise).standard_normal_(torch.empty_like(sums))
    released = sums + noise_multiplier * sensitivity * _MARGIN * drawn
    _keep(path, released, release, settings)
    return released, release


def _keep(path: Path | None, released: Tensor, release: GaussianRelease, settings: dict[str, object]) -> None:
    if path is not None:
        save_checkpoint(path, {"settings": settings, "released": released.cpu(), "identity": release.identity})


def _reread(path: Path, settings: dict[str, object], accountant: Accountant) -> tuple[Tensor, GaussianRelease]:
    content = load_checkpoint(path)
    kept = content.get("settings")
    if kept != settings or not isinstance(content.get("released"), Tensor) or not content.get("identity"):
        raise CheckpointError(f"{path} does not hold this statistic: {kept!r} there, {settings!r} here; choose another")
    release = GaussianRelease(float(kept["noise_multiplier"]), identity=str(content["identity"]))
    if all(event != release for event, _ in accountant.ledger):
        accountant.record(release)
    return content["released"], release
