"""Accuracy and loss on data that was not trained on."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipless_dp.arguments import whole
from clipless_dp.model import DPLipModel
from clipless_dp.model.scores import Scores
from clipless_dp.model.wrapped import require_wrapped
from clipless_dp.modules import kept_modes
from clipless_dp.sampling import Samples

Data = Dataset[Any] | tuple[Any, Any] | Mapping[str, Any] | Sequence[Any] | Samples
"""See :class:`clipless_dp.sampling.Samples`."""


@torch.no_grad()
def evaluate(model: DPLipModel, dataset: Data, batch_size: int = 1024) -> tuple[float | None, float]:
    """Accuracy and mean loss on data that is not part of the training set.

    Args:
        model: the wrapped model; evaluated in ``eval`` mode, put back afterwards.
        dataset: as for :func:`clipless_dp.fit`.
        batch_size: rows at once, at least 1.

    Returns:
        The share of correct predictions, by the loss's own :meth:`~clipless_dp.losses.Loss.correct` (``None`` where it
        has no notion of it), and the mean loss. Both are over the samples that ask for a prediction, by the loss's
        own :meth:`~clipless_dp.losses.Loss.counts`: sequences of which no token counts change neither, and without any
        sample that counts there is neither, ``(None, nan)``. A sample that training drops (input, target or loss is not
        finite, or out of range) is no correct prediction, and adds nothing to the sum that the mean loss is of.

    Raises:
        ConfigurationError: the model is not wrapped, or ``batch_size`` is no positive number.
        InputError: the data does not fit the model, or what ``correct`` or ``counts`` returns does not fit the rows, or
            is another for a row alone.
        PrivacyError: they keep something of rows.
    """
    correct, total_loss, counted = 0.0, 0.0, 0
    known = True
    scores = Scores(model.loss_function, mapped=True)
    with closing(_outputs(model, dataset, batch_size)) as parts:
        for output, truth in parts:
            total_loss += float(model.loss(output, truth))
            right, counts = scores.of(output, truth)
            known = known and right is not None
            correct += 0.0 if right is None else float(right.sum())
            counted += int(counts.sum())
    if counted == 0:
        return None, math.nan
    return (correct / counted if known else None), total_loss / counted


@torch.no_grad()
def right_by_row(model: DPLipModel, dataset: Data, batch_size: int = 1024) -> Tensor | None:
    """How far the prediction of each row is right, each a function of its own row alone.

    Unlike an accuracy, which divides by how many rows ask for a prediction, a sum of these moves by at most 1 with a
    row, and one that weighs a person's rows by one over their number by at most 1 with a person: a user's own notion of
    what is right is asked about rows alone (:class:`clipless_dp.model.scores.Scores`).

    Args:
        model: as for :func:`evaluate`.
        dataset: as there.
        batch_size: rows at once, at least 1.

    Returns:
        ``(N,)``, float64 on the CPU, in [0, 1], 0 where no prediction is asked for; ``None`` where the loss has no
        notion of what is right.

    Raises:
        As :func:`evaluate`.
    """
    found = []
    scores = Scores(model.loss_function, mapped=False)
    with closing(_outputs(model, dataset, batch_size)) as parts:
        for output, truth in parts:
            right, counts = scores.of(output, truth)
            if right is None:
                return None
            found.append((right * counts).cpu())
    return torch.cat(found)


def _outputs(model: DPLipModel, dataset: Data, batch_size: int) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Outputs in ``eval`` mode and targets, so many rows at once; the model is put back at the end."""
    require_wrapped(model)
    batch_size = whole("batch_size", batch_size)
    samples = Samples.of(dataset, model.packing)
    device, _ = model.device_and_dtype()
    with kept_modes(model):
        model.eval()
        for inputs, targets in samples.parts(batch_size):
            yield model(inputs.to(device)), targets.to(device)
