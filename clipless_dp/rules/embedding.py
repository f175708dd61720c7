"""Tables that embed tokens. A sequence of T tokens is T one-hot rows: a signal of norm ``√T``."""

from __future__ import annotations

import math

from torch import nn

from clipless_dp.norms.operators import TableOperator
from clipless_dp.rules.base import LayerBounds, RuleContext, register_rule

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Modules that read tokens, i.e. integers, in place of signals."""

Table = nn.Embedding | nn.EmbeddingBag


def refusal(module: Table) -> str | None:
    """What a table's settings would leak or mix, and what to use instead; before the table is run even once."""
    if module.max_norm is not None:
        return (
            "max_norm rescales rows of the weight in forward, and so releases which tokens were looked up: use "
            "max_norm=None and constraints.RowNorm"
        )
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by counts over the batch, which mixes samples: use False"
    if module.sparse:
        return "a sparse gradient shows which tokens were looked up, since noise must reach every row: use sparse=False"
    if isinstance(module, nn.EmbeddingBag) and module.include_last_offset:
        return "include_last_offset is for bags cut by offsets, which need not end with samples: use False"
    return None


@register_rule(nn.Embedding)
def embedding_rule(module: nn.Embedding, context: RuleContext) -> LayerBounds:
    """``Y = √T·R``, ``Δ_W = √T·G`` at T tokens, rows of norm at most ``R``.

    Row v has the gradient ``Σ_{t: x_t = v} g_t``. With ``n_v`` terms its squared norm is at most ``n_v Σ‖g_t‖²``, and
    ``n_v ≤ T``: summed over rows, ``‖∂W‖² ≤ T‖g‖²``. One token T times over, with T equal cotangents, attains it. A
    ``padding_idx`` only takes terms away (its row gets noise like any other).
    """
    return _bounds(math.sqrt(math.prod(context.input_shape)), math.sqrt(math.prod(context.input_shape)), context)


@register_rule(nn.EmbeddingBag)
def embedding_bag_rule(module: nn.EmbeddingBag, context: RuleContext) -> LayerBounds:
    """Mean: ``Y = R``, ``Δ_W = G``. Sum: ``Y = T·R``, ``Δ_W = T·G``. Max: ``Y = √min(T, d)·R``, ``Δ_W = G``.

    Row v of a sum has the gradient ``n_v·g``, and ``(Σ n_v²)^½ ≤ Σ n_v ≤ T``; a mean divides it by the number m of
    tokens that count, ``Σ n_v = m``. A maximum sends each coordinate of ``g`` to one row: its gradient
    has the norm of ``g``. Each of its d coordinates is a row's own: ``y_j² ≤ max_t w_tj²``, which is at most ``R²``,
    and sums over j to at most ``Σ_t‖w_t‖² ≤ T·R²``. Tokens left out (``padding_idx``) lower T; a bag without any
    is zero.
    """
    (tokens,) = context.input_shape
    if module.mode == "sum":
        return _bounds(float(tokens), float(tokens), context)
    stretch = math.sqrt(min(tokens, module.embedding_dim)) if module.mode == "max" else 1.0
    return _bounds(stretch, 1.0, context)


def _bounds(stretch: float, gradient: float, context: RuleContext) -> LayerBounds:
    weight = TableOperator()
    return LayerBounds(
        output_norm=lambda: stretch * context.norm("weight", weight),
        gradients={"weight": gradient},
        operators={"weight": weight},
    )
