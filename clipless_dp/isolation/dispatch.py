"""Applies operations with a rule for ``vmap`` without the detour over torch's dispatcher for all of its transforms.

That one flattens all arguments several times and binds signatures, which for small networks takes longer than their
products do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

try:
    from torch._C._functorch import (
        TransformType,
        _add_batch_dim,
        _unwrap_batched,
        maybe_get_level,
        peek_interpreter_stack,
        pop_dynamic_layer_stack,
        push_dynamic_layer_stack,
    )
except ImportError:
    # Private names, which torch may change: its own way remains.
    _SHORT = False
else:
    _SHORT = True


class Info(NamedTuple):
    """What a rule is told: as torch's own."""

    batch_size: int
    randomness: str


def applied(kind: Any, sample: Tensor, *operands: Any) -> Any:
    """``kind.apply(sample, *operands)``, by the function's own rule where ``sample`` is of the transform in force.

    Args:
        kind: an autograd function with a rule for ``vmap``, whose results have the axis of samples in front.
        sample: differs from sample to sample.
        operands: the function's other arguments; no tensors in lists.
    """
    if not _SHORT:
        return kind.apply(sample, *operands)
    top = peek_interpreter_stack()
    if top is None or top.key() != TransformType.Vmap or top.level() != maybe_get_level(sample):
        # Within a transform of the network's own.
        return kind.apply(sample, *operands)
    level = top.level()
    values: list[Any] = []
    dims: list[int | None] = []
    for operand in (sample, *operands):
        value, dim = _unwrap_batched(operand, level) if isinstance(operand, Tensor) else (operand, None)
        values.append(value)
        dims.append(dim)
    layer = pop_dynamic_layer_stack()
    try:
        made, _ = kind.vmap(Info(len(values[0]), "different"), tuple(dims), *values)
    finally:
        push_dynamic_layer_stack(layer)
    if isinstance(made, tuple):
        return tuple(_add_batch_dim(one, 0, level) for one in made)
    return _add_batch_dim(made, 0, level)
