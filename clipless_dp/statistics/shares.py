"""Shares of classes, from one noisy histogram."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from accounting import Accountant
from clipless_dp.arguments import positive, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.noise import NoiseSource, noisy
from clipless_dp.sampling.people import people_of
from clipless_dp.statistics.release import Charge, checked_size, require_tensor, shares_of


def private_shares(
    labels: Tensor,
    classes: int,
    *,
    noise_multiplier: float,
    accountant: Accountant,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    file: str | os.PathLike[str] | None = None,
    groups: Any = None,
) -> tuple[float, ...]:
    """The shares of all classes among the records, by one noisy histogram.

    A record adds 1 to the count of its class, so that it changes the vector of counts by 1 in norm, however many
    classes there are. The classes must be public; :func:`private_fraction` is the same for a single property.

    Args:
        labels: ``(N,)``, whole numbers in ``[0, classes)``.
        classes: how many classes, a public number, two or more.
        noise_multiplier: ``σ``: each count gets noise of standard deviation ``σ``.
        accountant: records the release, under its own neighbouring relation.
        dataset_size, noise, file, groups: as for :func:`private_moments`.

    Raises:
        ConfigurationError: an argument is out of range, or several processes train together and there is no file yet.
        InputError: the labels are not ``(N,)`` whole numbers in ``[0, classes)``, or there are none.
        CheckpointError: as for :func:`private_moments`.

    Returns:
        Positive shares that add to one: noisy counts, lifted to ``min(σ, N/classes)``, below which they are not told
        from noise, over their sum.

    Guarantee:
        One Gaussian mechanism of noise multiplier ``σ`` with respect to adding or removing one record, or with
        ``groups`` one person: the mean of unit vectors of the axes has norm at most 1.
    """
    classes = whole("classes", classes)
    if classes < 2:
        raise ConfigurationError(f"classes must be two or more, got {classes}")
    if require_tensor(labels).dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"expected whole numbers (N,), got {labels.dtype} {tuple(labels.shape)}")
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise InputError(f"labels must lie in [0, {classes})")
    exact = labels.detach().long()
    people = people_of(groups, len(exact))
    size = checked_size(exact[:, None].double(), dataset_size, people)
    noise_multiplier = positive("noise_multiplier", noise_multiplier)
    settings = {
        "statistic": "shares",
        "classes": classes,
        "dataset_size": size,
        "dtype": str(labels.dtype),
    }

    def counted() -> Tensor:
        weights = shares_of(exact, people)
        counts = torch.zeros(classes, dtype=torch.float64, device=exact.device)
        return counts.index_add_(0, exact, torch.ones_like(exact, dtype=torch.float64) if weights is None else weights)

    counts, _ = Charge(noise_multiplier, accountant, noise, file, people).released(
        counted,
        lambda counts, source: noisy(counts, noise_multiplier, source),
        settings,
    )
    lifted = counts.cpu().clamp(min=min(noise_multiplier, size / classes))
    return tuple((lifted / lifted.sum()).tolist())
