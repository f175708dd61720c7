"""What in training data lies on one another in memory: one person's numbers in several samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clipless_dp.errors import PrivacyError
from clipless_dp.packing import LABELS
from clipless_dp.sampling import memory
from clipless_dp.sampling.people import People
from clipless_dp.sampling.windows import is_plain, lags, overlapping, placed, shared_parts, shared_rows

AT_ONCE = 4
"""Samples that are held at once to see whether a data set reads into memory that it uses again."""

INSTEAD = (
    "each person may be one row, once: a person's rows, windows or views together (fit's augment= and multiplicity= "
    "average views), rare classes by class_weights of the loss"
)


def lying_together(which: str) -> PrivacyError:
    """What lies on one another, in words."""
    return PrivacyError(
        f"{which} lie on one another in memory (an expanded tensor, windows that overlap, a series beside the same "
        "series one step later), so that what is one "
        f"person's enters a batch more than once: {INSTEAD}; or say whose the rows are, groups=, where all that "
        "overlap are one person's. Of a constant that few samples share give each a copy, .clone()"
    )


def refuse_overlapping_columns(
    inputs: Sequence[Tensor], beside: Sequence[Tensor] = (), people: People | None = None
) -> None:
    """Refuses tensors of which a row lies on a row of another number, of the same or of another one.

    Args:
        inputs: ``(N, ...)`` each. One may hold one row for all samples (types of tokens that are all zero, expanded),
            if not all of them do.
        beside: targets, which may be one row for all.
        people: whose rows are, if the unit is a person: one person's may overlap.

    Raises:
        PrivacyError: one does.
    """
    varying = [values for values in inputs if not _is_expanded(values)]
    if inputs and not varying:
        raise lying_together("rows of the inputs")
    columns = [
        values
        for values in (*varying, *(target for target in beside if not _is_expanded(target)))
        if is_plain(values) and len(values) > 1 and values.numel() and len(values) == len(inputs[0])
    ]
    codes = None if people is None else people.codes
    steps = [values.stride(0) * values.element_size() for values in columns]
    for step in {*steps}:
        for lag in lags([values for values, own in zip(columns, steps, strict=True) if own == step]):
            if codes is None or bool((codes[lag:] != codes[:-lag]).any()):
                raise lying_together(
                    "rows of the inputs" if len(columns) == 1 else "rows of the inputs, or of targets,"
                )
    for (one, first), (other, second) in combinations(zip(columns, steps, strict=True), 2):
        if first != second:
            rows = shared_rows(one, other)
            if rows.size and (codes is None or bool((codes[rows[0]] != codes[rows[1]]).any())):
                raise lying_together("rows of the inputs, or of targets,")


def _is_expanded(values: Tensor) -> bool:
    return is_plain(values) and len(values) > 1 and values.numel() > 0 and values.stride(0) == 0


def refuse_overlap(samples: Sequence[Any], count: int, owners: Any = None, read: str = "") -> None:
    """Refuses samples of which one lies on another.

    Args:
        samples: some of a data set.
        count: how many the data set has.
        owners: whose they are.
        read: how they were come by, for the message.
    """
    parts = placed([*map(_parts, samples)])
    pair = overlapping(parts, owners) or shared_parts(parts, len(samples), count, owners)
    if pair is not None:
        raise lying_together(f"samples {pair[0]} and {pair[1]}{read}")


class Beside:
    """The first samples that a data set returns, held at once to see whether they lie on one another.

    Args:
        count: samples of the data set.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._owners: list[int] | None = []
        self._samples: list[Any] = []
        self._first: memory.State | None = None

    def add(self, sample: Any, owner: int | None = None) -> None:
        """Holds a sample, if few are.

        Args:
            sample: what was read.
            owner: whose it is, if the unit is a person.
        """
        if len(self._samples) < AT_ONCE:
            self._samples.append(sample)
            self._owners = None if owner is None or self._owners is None else [*self._owners, owner]
            self._first = self._first or memory.State(_arrays(sample))

    def refuse_overlap(self) -> None:
        """Refuses windows of what the data set holds.

        Raises:
            PrivacyError: two samples overlap, and reading the second has left the first one as it was: what is read
                into memory that is used again lies on nothing.
        """
        try:
            refuse_overlap(self._samples, self._count, self._owners, " of those that were read")
        except PrivacyError:
            if memory.State(_arrays(self._samples[0])) == self._first:
                raise


def _arrays(sample: Any) -> list[Any]:
    """Tensors and arrays of a sample's inputs."""
    return [part for name, part in _parts(sample) if name >= 0]


def _leaves(value: Any) -> list[Any]:
    return [value] if isinstance(value, (Tensor, np.ndarray, int, float)) else tree_leaves(value)


def _parts(sample: Any) -> list[tuple[int, Any]]:
    """Tensors and arrays of a sample, by their places in it: those of targets are negative."""
    targets: Any = ()
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        sample, targets = sample
    if isinstance(sample, Mapping):
        targets = [targets, *(part for name, part in sample.items() if name in LABELS)]
        sample = [part for name, part in sample.items() if name not in LABELS]
    named = [*enumerate(_leaves(sample)), *((-1 - place, part) for place, part in enumerate(_leaves(targets)))]
    return [(name, part) for name, part in named if isinstance(part, (Tensor, np.ndarray))]
