"""How far a model's predictions are right by its loss's own notion, each row by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from clipless_dp.errors import InputError
from clipless_dp.losses import Loss, described
from clipless_dp.model import keeping, rowwise

_TOLERANCE = 1e-3
"""What a share may differ by between a row alone and a batch: rounding in another order of operations."""

_FEW = 0.01
"""Share of the rows of a batch of which rounding may decide whether they are right."""


class Scores:
    """Asks a loss which predictions are right and which rows ask for one, so that no row's answer depends on another.

    A loss of this package is asked about whole batches. Of a user's own nothing is known: its ``correct`` and
    ``counts`` are called on rows alone, one by one or mapped over them, and what they return for the whole batch is
    held against that.

    Args:
        loss: the loss.
        mapped: whether a user's own may be mapped over rows by ``torch.func.vmap``, which is faster, and in which an
            operation may have a rule that lets rows meet.

    Guarantee:
        What is right of a row, times whether it counts, lies in [0, 1]. It depends on that row alone where the loss is
        not mapped, nor keeps anything.
    """

    def __init__(self, loss: Loss, *, mapped: bool) -> None:
        self._loss = loss
        self._mapped = mapped

    def of(self, output: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor]:
        """What is right, and what counts.

        Args:
            output: ``(B, *output_shape)``.
            target: ``(B, ...)``.

        Returns:
            Shares ``(B,)`` in float64, ``None`` where the loss has no notion of it; and truth values ``(B,)``.

        Raises:
            InputError: what the loss returns is none of these, or another for a row alone than in the batch.
            PrivacyError: it keeps something of rows.
        """
        right = self._of_rows("correct", _correct, output, target)
        counts = self._of_rows("counts", _counts, output, target)
        if counts is None:
            counts = torch.ones(len(output), dtype=torch.bool, device=output.device)
        return None if right is None else right.double(), counts

    def _of_rows(
        self, name: str, call: Callable[[Loss, Tensor, Tensor], Tensor | None], output: Tensor, target: Tensor
    ) -> Tensor | None:
        loss = self._loss
        if not len(output) or _is_known(loss, name):
            return call(loss, output, target)
        keeping.refuse_memory(loss, call, output, target)
        first = call(loss, output[:1].clone(), target[:1].clone())
        together = call(loss, output.clone(), target.clone())
        if first is None or together is None:
            if (first is None) is (together is None):
                return None
            raise _meeting(loss, name)
        alone = self._alone(call, output, target)
        differing = (together.double() - alone.double()).abs() > _TOLERANCE
        if int(differing.sum()) > max(1, _FEW * len(output)) or not bool(((alone >= 0) & (alone <= 1)).all()):
            raise _meeting(loss, name)
        return alone

    def _alone(self, call: Callable[[Loss, Tensor, Tensor], Any], output: Tensor, target: Tensor) -> Tensor:
        """What is returned for batches of one row each, ``(B,)``."""

        def of_row(row: Tensor, label: Tensor) -> Tensor:
            found: Tensor = call(self._loss, row.unsqueeze(0).clone(), label.unsqueeze(0).clone())
            return found.squeeze(0)

        if self._mapped:
            # Not where control flow depends on numbers, or an operation has no rule.
            with suppress(Exception):
                found: Tensor = torch.func.vmap(of_row)(output, target)
                return found
        return torch.stack([of_row(row, label) for row, label in zip(output, target, strict=True)])


def _is_known(loss: Loss, name: str) -> bool:
    """Whether the method is that of a loss of this package, exactly, or what all losses have where nothing is said."""
    if name in vars(loss):
        return False
    return rowwise.is_proved(loss) or getattr(type(loss), name) is getattr(Loss, name)


def _correct(loss: Loss, output: Tensor, target: Tensor) -> Tensor | None:
    right: Any = loss.correct(output, target)
    if right is None:
        return None
    said = described(right)
    if (
        isinstance(right, Tensor)
        and right.shape == output.shape[:1]
        and (right.dtype == torch.bool or right.is_floating_point())
    ):
        # Asked this way around, since a NaN is no share. Rows that are mapped over are looked at in the batch.
        if torch._C._functorch.is_batchedtensor(right) or bool(((right >= 0) & (right <= 1)).all()):
            return right
        said = "numbers outside of [0, 1]"
    raise InputError(
        f"correct() of {loss!r} must return None, or for each row a truth value or a number in [0, 1], shape "
        f"{tuple(output.shape[:1])}; got {said}"
    )


def _counts(loss: Loss, output: Tensor, target: Tensor) -> Tensor | None:
    counts: Any = loss.counts(target)
    if counts is None:
        return None
    if isinstance(counts, Tensor) and counts.shape == output.shape[:1] and counts.dtype == torch.bool:
        return counts
    raise InputError(
        f"counts() of {loss!r} must return None, or for each row whether it asks for a prediction, truth values of "
        f"shape {tuple(output.shape[:1])}; got {described(counts)}: a row of several tokens counts once, if any of "
        "them does (any(1), no sum), and what it weighs is no matter of counts"
    )


def _meeting(loss: Loss, name: str) -> InputError:
    return InputError(
        f"{name}() of {loss!r} returns another answer for a row alone than in its batch: rows meet in it, as in a "
        "mean, a median, a count of classes or all() over the batch, so that one sample would move the answers of "
        "others. Make each entry of its own row alone"
    )
