"""Quantiles and shares, from noisy counts."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from accounting import Accountant
from clipless_dp.arguments import positive
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.noise import NoiseSource, noisy
from clipless_dp.sampling.people import people_of
from clipless_dp.statistics.release import Charge, checked_size, require_tensor, shares_of

_HALVINGS = 20


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
    groups: Any = None,
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
        dataset_size, noise, file, groups: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the values are not ``(N,)`` floating-point numbers, or there are none.
        PrivacyError: a record lies on another person's in memory: an expanded tensor, windows that overlap.
        CheckpointError: as for :func:`private_moments`.

    Returns:
        The quantile to a relative ``(upper/lower)^(2⁻²⁰)``, but for the noise of the counts: a record or so in
        ``σ√20``.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record, or with
        ``groups`` one person.
    """
    if require_tensor(values).dim() != 1:
        raise InputError(f"expected one number for each record, (N,), got {tuple(values.shape)}")
    people = people_of(groups, len(values))
    size = checked_size(values[:, None], dataset_size, people)
    noise_multiplier, quantile = positive("noise_multiplier", noise_multiplier), positive("quantile", quantile)
    lower, upper = positive("lower", lower), positive("upper", upper)
    if not quantile < 1.0:
        raise ConfigurationError(f"quantile must lie in (0, 1), got {quantile!r}")
    if not lower < upper:
        raise ConfigurationError(f"the range must have 0 < lower < upper, got {lower!r} and {upper!r}")
    settings = {
        "statistic": "quantile",
        "quantile": quantile,
        "range": [lower, upper],
        "dataset_size": size,
        "dtype": str(values.dtype),
    }
    deviation = noise_multiplier * math.sqrt(_HALVINGS)

    def bisected(exact: tuple[Tensor, Tensor | None], source: NoiseSource) -> Tensor:
        numbers, shares = exact
        low, high = math.log(lower), math.log(upper)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            below = numbers <= math.exp(middle)
            count = float(noisy(below.sum() if shares is None else shares[below].sum(), deviation, source))
            low, high = (middle, high) if count < quantile * size else (low, middle)
        return torch.tensor(math.exp(0.5 * (low + high)), dtype=torch.float64)

    found, _ = Charge(noise_multiplier, accountant, noise, file, people).released(
        lambda: (values.detach().double(), shares_of(values, people)),
        bisected,
        settings,
    )
    return float(found)


def private_fraction(
    flags: Tensor,
    *,
    noise_multiplier: float,
    accountant: Accountant,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
    groups: Any = None,
) -> float:
    """The share of records that have a property, a positive label say, by one noisy count.

    Args:
        flags: ``(N,)``, ``True`` or 1 where a record has it, ``False`` or 0 where not.
        noise_multiplier: ``σ``: the count gets noise of standard deviation ``σ``; a record changes it by at most 1.
        accountant: records the release, under its own neighbouring relation.
        dataset_size, noise, file, groups: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the flags are not ``(N,)`` zeros and ones, or there are none.
        CheckpointError: as for :func:`private_moments`.

    Returns:
        The noisy count over ``dataset_size``, moved into ``[s, 1-s]`` with ``s = min(½, σ/N)``: nearer to 0 or 1 it is
        not told from noise.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record, or with
        ``groups`` one person.
    """
    if require_tensor(flags).dim() != 1 or flags.is_complex() or not bool(((flags == 0) | (flags == 1)).all()):
        raise InputError(f"expected zeros and ones, (N,), got {flags.dtype} {tuple(flags.shape)}")
    # One flag for all, expanded, is a constant.
    exact = flags.detach().double().contiguous()
    people = people_of(groups, len(exact))
    size = checked_size(exact[:, None], dataset_size, people)
    noise_multiplier = positive("noise_multiplier", noise_multiplier)
    settings = {
        "statistic": "fraction",
        "dataset_size": size,
        "dtype": str(flags.dtype),
    }
    count, _ = Charge(noise_multiplier, accountant, noise, file, people).released(
        lambda: exact.sum() if people is None else exact @ people.shares(exact.device),
        lambda count, source: noisy(count, noise_multiplier, source),
        settings,
    )
    least = min(0.5, noise_multiplier / size)
    return min(max(float(count) / size, least), 1.0 - least)
