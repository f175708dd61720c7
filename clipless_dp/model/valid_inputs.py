"""Samples that a network can read, drawn at random: for audits, and for whatever asks how a pass computes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.graph.tracing import TracedNet
from clipless_dp.packing import Field, Packing

UNKNOWN = 2
"""How many values an integer takes that is looked up in no table: it is a mask, as a rule."""


def fields_of(traced: TracedNet, packing: Packing | None, shape: tuple[int, ...]) -> tuple[Field, ...]:
    """What a row of a model consists of."""
    return (Field(None, shape, traced.reads),) if packing is None else packing.fields


def limits_of(traced: TracedNet, entries: int) -> Tensor:
    """For each entry of a row how many tokens the tables know that it is looked up in; 0 where it is in none."""
    if traced.vocabulary is not None:
        return torch.full((entries,), traced.vocabulary)
    return torch.tensor(traced.limits or [0] * entries)


def random_rows(
    traced: TracedNet, packing: Packing | None, shape: tuple[int, ...], count: int, generator: torch.Generator
) -> Tensor:
    """Rows ``(count, *shape)`` on the CPU: int64 where they are integers, else float64.

    Numbers are normal, tokens uniform among those that are known; of other integers each is 0 or 1, and the first 1, so
    that no mask leaves out all of a sample.
    """
    fields = fields_of(traced, packing, shape)
    limits = limits_of(traced, math.prod(shape)).split([field.entries for field in fields])
    drawn = []
    for field, known in zip(fields, limits, strict=True):
        if field.dtype.is_floating_point:
            drawn.append(torch.randn(count, field.entries, generator=generator, dtype=torch.float64))
            continue
        most = torch.where(known > 0, known, UNKNOWN)
        values = (torch.rand(count, field.entries, generator=generator, dtype=torch.float64) * most).long()
        if not bool(known.any()):
            values[:, :1] = 1
        drawn.append(values.minimum(most - 1))
    kind = torch.float64 if traced.reads.is_floating_point else torch.int64
    return torch.cat([part.to(kind) for part in drawn], 1).reshape(count, *shape)
