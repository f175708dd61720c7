"""Tables in which more of a column is never less of the answer: which columns, and the network that keeps to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipless_dp.arguments import shown
from clipless_dp.constraints import EntryBound
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features import TableEncoding
from clipless_dp.graph import gradient_gated
from clipless_dp.layers import BoxProjection, MonotoneResidual
from clipless_dp.layers.monotone import MonotoneLift
from clipless_dp.losses import Loss
from clipless_dp.model import DPLipModel
from clipless_dp.monotone import MonotoneCertificate, certificate
from clipless_dp.statistics import Standardisation
from clipless_dp.tables.tasks import Classes, Task

UNITS = 256
"""Hidden units, most of them of 1 to 4 columns."""

_SIDE = 4.0
"""Of the box: where standardised columns are cut, and up to which places of categories are scaled."""

_SCALE = 2.0
"""Of a hidden unit's slopes: in columns of deviation one."""

_LARGEST_WEIGHT = 10.0

_CAP = 1.0
"""Of a row's gradient."""


def signs_of(monotone: Any, encoding: TableEncoding | None, columns: int, task: Task) -> tuple[int, ...]:
    """1, -1 or 0 for each number of an encoded row.

    Args:
        monotone: what was asked for, ``{column: 1 or -1}``.
        encoding: of data frames, whose columns have names.
        columns: numbers in a row.
        task: what is learnt.

    Raises:
        ConfigurationError: a column is not there, or one of categories, a sign is none, or there are several classes.
    """
    if not isinstance(monotone, Mapping) or not monotone:
        raise ConfigurationError(f"monotone must name columns and signs, {{column: 1 or -1}}, got {shown(monotone)}")
    if isinstance(task, Classes) and len(task.classes) != 2:
        raise ConfigurationError(
            f"monotone is of two classes, or of a regression: of {len(task.classes)} classes none is more than another"
        )
    signs = [0] * columns
    for column, sign in monotone.items():
        if isinstance(sign, bool) or sign not in (1, -1):
            raise ConfigurationError(f"the sign of column {column!r} must be 1 or -1, got {shown(sign)}")
        place = _place(column, encoding, columns)
        if signs[place]:
            raise ConfigurationError(f"monotone names column {column!r} twice, by name and by place")
        signs[place] = int(sign)
    return tuple(signs)


def _place(column: Any, encoding: TableEncoding | None, columns: int) -> int:
    if encoding is not None and column in encoding.categories:
        raise ConfigurationError(
            f"the column {column!r} holds categories, of which none is more than another: if they have an order, give "
            "the column as numbers"
        )
    if encoding is not None and column in encoding.numbers:
        return encoding.numbers.index(column)
    known = columns if encoding is None else encoding.measured
    if isinstance(column, Integral) and not isinstance(column, bool) and 0 <= int(column) < known:
        return int(column)
    there = f"columns 0 to {known - 1}" if encoding is None else f"the numbers {', '.join(encoding.numbers)}"
    raise ConfigurationError(f"monotone names {shown(column)}, which is none of {there}")


def chain(signs: tuple[int, ...], *, seed: int = 0) -> nn.Sequential:
    """Hidden units that no data entered and that increase where ``signs`` say so, and a layer to be trained.

    A unit is ``tanh(⟨w, x⟩ + b)`` of random ``w`` and ``b``, a quarter of them of all columns, others of 1 to 4.
    Weights of columns with a sign have it. Of columns without one alone there are units and their opposites, so that
    weights above them need no sign. The layer above starts from zero.
    """
    columns, generator = len(signs), torch.Generator().manual_seed(seed)
    wanted = torch.tensor(signs)
    free = wanted == 0
    few = torch.randint(1, 5, (UNITS,), generator=generator)
    few[::4] = columns
    weight = _sparse(few, columns, generator)
    weight = torch.where(free, weight, weight.abs() * wanted)
    bias = _SCALE * torch.randn(UNITS, generator=generator)
    if bool(free.any()):
        # A quarter of the units are of columns without a sign alone, a quarter their opposites.
        quarter = UNITS // 4
        alone = torch.zeros(quarter, columns)
        alone[:, free] = _sparse(few[:quarter], int(free.sum()), generator)
        weight[:quarter], weight[quarter : 2 * quarter] = alone, -alone
        bias[quarter : 2 * quarter] = -bias[:quarter]
    hidden, last = nn.Linear(columns, UNITS), nn.Linear(UNITS, 1)
    with torch.no_grad():
        hidden.weight.copy_(weight)
        hidden.bias.copy_(bias)
        last.weight.zero_()
        last.bias.zero_()
    hidden.requires_grad_(False)
    last.bias.requires_grad_(False)
    return nn.Sequential(hidden, nn.Tanh(), last)


def _sparse(few: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Normal weights of that many columns for each unit, of a norm that does not grow with how many."""
    looked_at = few.clamp(max=columns)
    weight = torch.randn(len(few), columns, generator=generator)
    order = torch.rand(len(few), columns, generator=generator).argsort(1)
    kept = torch.where(order < looked_at[:, None], weight, torch.zeros_like(weight))
    return kept * (_SCALE / looked_at.sqrt()[:, None])


def monotone_net(signs: tuple[int, ...]) -> nn.Module:
    """Box, units, and the slope that outweighs what they might lose, behind gradient gates."""
    net = nn.Sequential(BoxProjection(-_SIDE, _SIDE), MonotoneResidual(chain(signs), signs))
    return gradient_gated(net, limit=_CAP, mode="clip")


def monotone_model(signs: tuple[int, ...], loss: Loss, bias: Tensor) -> DPLipModel:
    """The network wrapped for its training.

    Args:
        signs: of each column.
        loss: of one output.
        bias: of the output, ``(1,)``, which does not train.
    """
    net = monotone_net(signs)
    with torch.no_grad():
        net.get_parameter("1.net.2.bias").copy_(bias)
    limit = EntryBound(_LARGEST_WEIGHT, signed=False)
    return DPLipModel(net, input_shape=(len(signs),), loss=loss, constraint={"1.net.2.weight": limit})


def learning_rate(rows: int, epsilon: float) -> float:
    """``min(3, ε·N/4000)``, with momentum 0.9."""
    return min(3.0, epsilon * rows / 4000.0)


def raw_certificate(net: nn.Module, names: tuple[str, ...] | None) -> MonotoneCertificate:
    """Slopes in the units of the columns and of the answer as they are, and the rounding of all that is computed.

    Between its cuts a column ``x`` is ``(x/c - μ)/s``, of slope ``1/(c·s)``, beyond them constant.

    Args:
        net: of a table: standardisation, features, the trained layer, and what makes its output the answer.
        names: of the columns.

    Raises:
        ConfigurationError: the table was not trained to be monotone.
    """
    standardise, _, layer, head = net.children()
    if not any(isinstance(part, MonotoneLift) for part in layer.modules()):
        raise ConfigurationError("the table was not trained to be monotone: give fit_table monotone={column: 1}")
    affine = cast(Any, head)[1] if isinstance(head, nn.Sequential) else None
    scale = 1.0 if affine is None else float(affine.scale)
    found = certificate(layer, names=names)
    factors = torch.ones(len(found.features), dtype=torch.float64)
    # Rows are rounded to the type of the layer, in the box.
    unit = torch.finfo(getattr(torch, found.dtype)).eps / 2
    errors = torch.full_like(factors, _SIDE * unit)
    of_numbers = cast(Any, standardise).of_numbers
    if isinstance(of_numbers, Standardisation):
        measured = cast(Any, standardise).measured
        caps, mean, deviation = (
            part.double().cpu() for part in (of_numbers.caps, of_numbers.mean, of_numbers.deviation)
        )
        if not (bool((caps > 0.0).all()) and bool((deviation > 0.0).all()) and scale > 0.0):
            raise InputError("a scale of the standardisation is not positive: the file was altered")
        factors[:measured] = (1.0 + 1e-12) / (caps * deviation)
        # A quotient of size 1, a difference, a quotient: each rounds once.
        own = torch.finfo(of_numbers.caps.dtype).eps / 2
        errors[:measured] += own * ((2.0 + mean.abs()) / deviation + _SIDE) * 1.01
    before = torch.tensor([one.slope for one in found.features], dtype=torch.float64)
    rounding = found.rounding + 2.0 * float(before @ errors)
    features = tuple(
        replace(one, low=one.low * by, high=one.high * by)
        for one, by in zip(found.features, (factors * scale).tolist(), strict=True)
    )
    rounding *= scale
    if affine is not None:
        # Of the scale, of the product, and of the sum, at both of the outputs that are compared.
        size = _largest_output(layer, found)
        rounding += 2.0 * unit * (3.0 * scale * size + abs(float(affine.shift))) * 1.01
    total = sum(one.slope for one in features)
    return replace(found, features=features, rounding=rounding, total=total)


@torch.no_grad()
def _largest_output(layer: nn.Module, found: MonotoneCertificate) -> float:
    """The largest size of an output: it is within reach of that of the middle of the box."""
    weight = next(layer.parameters())
    middle = layer(torch.zeros(1, len(found.features), dtype=weight.dtype, device=weight.device))
    return float(middle.abs().max()) + found.rounding + _SIDE * sum(one.slope for one in found.features)
