"""Copies of rows, known by what they hold: where in a batch they are, and whether that says how they weigh."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clipless_dp.sampling.fingerprints import of_rows
from clipless_dp.sampling.series import Draw

_MOST_TRIED = 16
"""Places at which a piece of a draw is tried: more rows that begin alike are of one kind, and not told apart."""


def place_of(inputs: Tensor, batch: Tensor, draw: Draw) -> int | None:
    """Where a batch holds these rows, behind those that were found last if they are there as well."""
    if batch.dim() == 4 and batch.shape[1:] != inputs.shape[1:]:
        # Images whose channels come first, or last, in the copy.
        turned = (batch.permute(0, 3, 1, 2), batch.permute(0, 2, 3, 1))
        batch = next((some for some in turned if some.shape[1:] == inputs.shape[1:]), batch)
    last = len(batch) - len(inputs)
    firsts = [0]
    if last:
        column = batch[: last + 1].reshape(last + 1, -1)[:, 0].to(inputs.device, inputs.dtype)
        first = inputs.reshape(len(inputs), -1)[0, 0]
        alike = (column == first) | (column.isnan() & first.isnan())
        # What pads a draw may have been zeroed.
        alike[draw.rows :] |= first == 0
        firsts = alike.nonzero().flatten().tolist()
        firsts.sort(key=lambda start: (start != draw.matched, start))
    for start in firsts[:_MOST_TRIED]:
        copy = batch[start : start + len(inputs)].to(inputs.device, inputs.dtype).reshape(inputs.shape)
        alike = (copy == inputs) | (copy.isnan() & inputs.isnan())
        alike[max(0, draw.rows - start) :] |= inputs[max(0, draw.rows - start) :] == 0
        if bool(alike.all()):
            return int(start)
    return None


def weighs_alike(pairs: Sequence[tuple[Tensor, Tensor]], start: int, draw: Draw) -> bool:
    """Whether what rows hold says how they weigh: of a draw of people equal rows may be of several classes.

    Copies of these are not told apart, and one that was put in the place of another would bring its weight with it.

    Args:
        pairs: copies of rows, and the tensors of the draw that they are copies of.
        start: the first of the rows.
        draw: whose they are.
    """
    if len(draw.classes) < 2:
        return True
    stop = min(start + len(pairs[0][0]), draw.rows)
    # As the copies hold them, whose numbers may be shorter.
    digests = [of_rows(tensor[: draw.rows].to(copy.dtype)) for copy, tensor in pairs]
    whole = [b"".join(parts) for parts in zip(*digests, strict=True)]
    weights: dict[bytes, set[int]] = {}
    for first, last, divisor in draw.divisors(0, draw.rows):
        for one in whole[first:last]:
            weights.setdefault(one, set()).add(divisor)
    return all(len(weights[one]) == 1 for one in whole[start:stop])
