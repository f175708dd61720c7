"""Which sampling protects people with less noise: by person, or by row with a cap. From public numbers alone."""

from __future__ import annotations

from accounting import SamplingComparison, compare_samplings
from clipless_dp.arguments import positive
from clipless_dp.errors import ConfigurationError
from clipless_dp.sampling.people import ROWS_PER_GROUP, checked_cap
from clipless_dp.training.settings import SuggestedSettings


def suggest_sampling(
    settings: SuggestedSettings,
    epsilon: float,
    delta: float,
    *,
    rows_per_group: int = ROWS_PER_GROUP,
    mean_rows: float | None = None,
    accountant: str = "prv",
) -> SamplingComparison:
    """Says whether to sample people (``groups=``) or rows of which everybody has at most so many, at one ε of a person.

    By person, ``fit(..., groups=ids)``: ``dataset_size`` and ``batch_size`` count people. By row, keep
    ``bound_contributions(ids, rows_per_group=k)`` of the rows and train on rows, with the noise that
    :func:`accounting.calibrate_noise_multiplier` finds for ``group_size=k``. Both read as many rows; the better one has
    less noise relative to the sum of gradients that a step expects (:func:`accounting.compare_samplings`).

    Args:
        settings: of :func:`clipless_dp.suggest_settings`, whose ``dataset_size`` and ``batch_size`` count people.
        epsilon: target ε of a person.
        delta: target δ of a person.
        rows_per_group: ``k``, a public cap.
        mean_rows: rows of a person on average once capped, a public number; ``k`` where it is left out.
        accountant: ``"prv"``, ``"rdp"`` or ``"auto"``.

    Returns:
        The figures of both, ``better`` and ``ratio``; ``print`` shows them.

    Raises:
        ConfigurationError: ``rows_per_group`` is no whole number from 1, or the mean lies above it, or another argument
            is out of range.
        UnreachableTargetError: no noise meets the target.

    Guarantee:
        No data is looked at.
    """
    cap = checked_cap(rows_per_group)
    mean = None if mean_rows is None else positive("mean_rows", mean_rows)
    if mean is not None and mean < 1.0:
        raise ConfigurationError(f"mean_rows is {mean:g}, and nobody who is in the data has less than one row")
    if mean is not None and mean > cap:
        raise ConfigurationError(f"mean_rows is {mean:g}, above rows_per_group, {cap}, the most that anybody keeps")
    return compare_samplings(
        people=settings.dataset_size,
        rows_per_person=cap,
        sample_rate=settings.batch_size / settings.dataset_size,
        steps=settings.steps,
        delta=positive("delta", delta),
        target_epsilon=positive("epsilon", epsilon),
        mean_rows=mean,
        accountant=accountant,
    )
