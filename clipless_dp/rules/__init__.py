"""One rule per layer type: its ``Y``, ``K`` and ``Δ_θ``; users extend them with :func:`register_rule`."""

from torch import nn

from clipless_dp.rules import activations, conv, embedding, gates, graph, linear, pooling, residual
from clipless_dp.rules.base import (
    Deferred,
    LayerBounds,
    RuleContext,
    RuleError,
    find_function_rule,
    find_rule,
    is_builtin,
    register_function_rule,
    register_remedy,
    register_rule,
    unsupported_module,
    value_of,
)

_MIXES = "it mixes samples through batch statistics; use clipless_dp.layers.LayerCentering and BallProjection"
register_remedy(
    _MIXES,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
)
register_remedy(
    "it has no global Lipschitz constant; use clipless_dp.layers.LayerCentering followed by BallProjection",
    nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm,
)  # fmt: skip
register_remedy(
    "it has no global Lipschitz constant; use clipless_dp.layers.SampleGroupNorm, with a floor", nn.GroupNorm
)
register_remedy(
    "attention has no global Lipschitz constant; mix tokens by linear maps (nn.Linear on the transposed axes)",
    nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer,
)  # fmt: skip
register_remedy("put the softmax into the loss, e.g. clipless_dp.losses.TauCrossEntropy", nn.Softmax, nn.LogSoftmax)
register_remedy("use nn.ReLU, nn.Tanh or clipless_dp.layers.GroupSort", nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.ELU)

__all__ = [
    "Deferred",
    "LayerBounds",
    "RuleContext",
    "RuleError",
    "activations",
    "conv",
    "embedding",
    "find_function_rule",
    "find_rule",
    "gates",
    "graph",
    "is_builtin",
    "linear",
    "pooling",
    "register_function_rule",
    "register_remedy",
    "register_rule",
    "residual",
    "unsupported_module",
    "value_of",
]
