"""Tables: one call from rows of any scale to a private binary classifier, with one set of hyper-parameters for all."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accounting import calibrate_noise_multiplier, create_accountant
from clipless_dp.arguments import positive, whole
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features.cosines import RandomCosines
from clipless_dp.graph import gated
from clipless_dp.losses import BinaryCrossEntropy
from clipless_dp.model import DPLipModel
from clipless_dp.noise import NoiseSource
from clipless_dp.precision import full_precision
from clipless_dp.sampling import Samples, as_tensors
from clipless_dp.sampling.people import ROWS_PER_GROUP, people_of
from clipless_dp.sampling.samples import public_size
from clipless_dp.statistics import Releases, Standardisation, private_fraction, private_standardisation
from clipless_dp.statistics.release import require_tensor
from clipless_dp.training import FitResult, constant, fit
from clipless_dp.training.groups import require_known
from clipless_dp.training.plan import epochs_of

LARGEST_BATCH = 4096
"""Expected batch size, or the whole table. At ε = 1 the mean's noise is 4 % above that of full batches for 30 000 rows,
17 % for 200 000."""

STATISTICS_SHARE = 0.1
"""Of the budget, counted as the inverse squared noise multipliers that Gaussian mechanisms compose by."""

LABELS_SHARE = 0.01
"""For the count of positive labels: at ε = 1, noise of some 32 to 45 rows."""

_GATE = 0.5
"""Of a gradient that is at most 1: rows that are far off count no more than those of even odds."""


@dataclass(frozen=True)
class TableClassifier:
    """What :func:`fit_table` returns.

    Attributes:
        net: maps rows ``(B, columns)`` as they are to scores ``(B,)``, the log-odds of label 1: standardisation, random
            cosines, and the trained layer. Releasing it with everything in it is what ε pays for.
        result: of :func:`clipless_dp.fit`; its optimizer holds the ledger, statistics included.
    """

    net: nn.Module
    result: FitResult

    @torch.no_grad()
    def scores(self, rows: Tensor, *, batch_size: int = 65_536) -> Tensor:
        """Log-odds ``(N,)`` of label 1, for rows ``(N, columns)`` as they are."""
        return torch.cat([self.net(some) for some in rows.split(batch_size)])


def learning_rate(rows: int, epsilon: float) -> float:
    """``min(60, ε·N/1000)``, with momentum 0.9: the mean gradient's noise is in proportion to ``1/(εN)``."""
    return min(60.0, epsilon * rows / 1000.0)


def number_of_steps(rows: int, epsilon: float) -> int:
    """100, and where the learning rate is at its largest in proportion to ``ε·N``, up to 300."""
    return min(300, max(100, round(epsilon * rows / 600.0)))


@full_precision()
def fit_table(
    rows: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    delta: float,
    dataset_size: int | None = None,
    cosines: int = 512,
    accountant: str = "prv",
    checkpoint: str | os.PathLike[str] | None = None,
    noise: NoiseSource | str | None = None,
    reproducible_seed: int | None = None,
    groups: Any = None,
    **changes: Any,
) -> TableClassifier:
    """Trains a classifier on a table of any scales: private statistics, random cosines, one linear layer.

    A tenth of the budget goes into :func:`clipless_dp.statistics.private_standardisation`, a hundredth into the share
    of positive labels (:func:`clipless_dp.statistics.private_fraction`), the rest into 100 to 300 steps on a gated
    linear layer over :class:`clipless_dp.features.RandomCosines`. It starts from zero weights and the log-odds of that
    share, so that no step is spent on learning that one label is rare. All are in one ledger.
    Settings follow from ``dataset_size``, ``epsilon`` and nothing else; batches have up to 4096 rows.

    They were chosen on held-out fifths of the training data of the eight tables of ``benchmarks/tables.py``, once for
    all of them, never on test data. For a table of yours they cost no privacy.

    Args:
        rows: ``(N, columns)``, floating-point; cells may be missing (NaN).
        labels: ``(N,)``, 0 or 1.
        epsilon: target ε of statistics and training together.
        delta: target δ.
        dataset_size: public number of rows; by default ``N``, which is then taken to be public.
        cosines: number of random cosines; memory is ``4N(columns + cosines)`` bytes.
        accountant: ``"prv"``, ``"rdp"`` or ``"auto"``.
        checkpoint: file of the training; the statistics are kept beside it, so that a run that goes on pays once.
        noise: ``"system"``, ``"secure"`` or a source, for statistics and training.
        reproducible_seed: as for :func:`clipless_dp.fit`; it covers the statistics, too.
        groups: whose each row is, an id for each: then statistics, training and ``dataset_size`` are about people, as
            in :func:`clipless_dp.fit`, whose ``rows_per_group`` and ``group_weights`` are among ``changes``.
        changes: further arguments of :func:`clipless_dp.fit`, in place of these settings; ``validation`` is rows as
            they are, with labels.

    Raises:
        InputError: rows or labels have another shape or type, or a label is neither 0 nor 1, or an id is missing.
        ConfigurationError: an argument is out of range, or several processes train together: each would release
            statistics of its own. Nothing was released then.

    Guarantee:
        The classifier, statistics included, is (``epsilon``, ``delta``)-differentially private with respect to adding
        or removing one row with its label; with ``groups``, one person with all of their rows.
    """
    given = {"epsilon": epsilon, "delta": delta, "dataset_size": dataset_size, "accountant": accountant, "noise": noise}
    require_known({**changes, **given, "checkpoint": checkpoint, "reproducible_seed": reproducible_seed})
    _check(rows, labels, noise, reproducible_seed)
    people = people_of(groups, len(rows), changes.get("rows_per_group", ROWS_PER_GROUP))
    size = public_size(dataset_size, len(rows), people)
    epsilon, delta, cosines = positive("epsilon", epsilon), positive("delta", delta), whole("cosines", cosines)
    expand = RandomCosines(rows.shape[1], cosines).to(rows.device)
    ledger = create_accountant(accountant, dataset_size=size)
    unit = calibrate_noise_multiplier(target_epsilon=epsilon, delta=delta, sample_rate=1.0, steps=1)
    releases = Releases(ledger, size, checkpoint, reproducible_seed, noise, people)
    standardise: Standardisation = private_standardisation(
        rows, noise_multiplier=unit / math.sqrt(STATISTICS_SHARE), **releases.arguments("statistics")
    )
    share = private_fraction(labels, noise_multiplier=unit / math.sqrt(LABELS_SHARE), **releases.arguments("labels"))
    model = _model(rows.shape[1] + cosines, share).to(rows.device)
    settings: dict[str, Any] = {
        **_learning(size, epsilon),
        "checkpoint": checkpoint,
        "noise": noise,
        "reproducible_seed": reproducible_seed,
        "dataset_size": size,
        "groups": groups,
    }
    if changes.get("validation") is not None:
        held_rows, held_labels = as_tensors(changes["validation"])
        changes["validation"] = expand(standardise(held_rows)), held_labels.float()
    features = expand(standardise(rows))
    result = fit(
        model, (features, labels.float()), epsilon=epsilon, delta=delta, accountant=ledger, **{**settings, **changes}
    )
    return TableClassifier(nn.Sequential(standardise, expand, model.net, nn.Flatten(0)), result)


def _check(
    rows: Tensor,
    labels: Tensor,
    noise: NoiseSource | str | None,
    reproducible_seed: int | None,
) -> None:
    """Refuses what cannot be trained on, before a statistic is released."""
    if require_tensor(rows).dim() != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise InputError(f"expected floating-point rows (N, columns), got {rows.dtype} {tuple(rows.shape)}")
    if require_tensor(labels).shape != rows.shape[:1] or labels.is_complex():
        raise InputError(f"expected {len(rows)} labels 0 or 1, got {labels.dtype} {tuple(labels.shape)}")
    Samples.to_train_on((rows, labels))
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise InputError("labels must be 0 or 1; others would contribute nothing")
    if placement.world().size > 1:
        raise ConfigurationError(
            "fit_table runs in one process: release the statistics once, and call fit on all ranks"
        )
    if noise is not None and reproducible_seed is not None:
        raise ConfigurationError(f"noise={noise!r} cannot be reproduced: leave out reproducible_seed, or noise")


def _learning(size: int, epsilon: float) -> dict[str, Any]:
    """Arguments of ``fit`` that follow from the public number of rows and ε."""
    batch_size = min(size, LARGEST_BATCH)
    return {
        "epochs": epochs_of(number_of_steps(size, epsilon), batch_size, size),
        "batch_size": batch_size,
        "lr": learning_rate(size, epsilon),
        "momentum": 0.9,
        "scheduler": constant,
        "ema": 0.97,
    }


def _model(inputs: int, positive: float) -> DPLipModel:
    """One gated layer that starts from zero weights, and from the log-odds of a share of positive labels."""
    linear = nn.Linear(inputs, 1)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias.requires_grad_(False), math.log(positive / (1.0 - positive)))
    return DPLipModel(
        gated(nn.Sequential(linear), cotangent_norm=_GATE),
        input_shape=(inputs,),
        input_norm=1.0,
        loss=BinaryCrossEntropy(),
    )
