"""One rule per layer type: its ``Y``, ``K`` and ``Δ_θ``; users extend them with :func:`register_rule`."""

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from clipless_dp.rules import (
    activations,
    causal,
    conv,
    distance,
    embedding,
    forward_only,
    gates,
    graph,
    linear,
    pooling,
    residual,
    structured,
)
from clipless_dp.rules.base import (
    Deferred,
    LayerBounds,
    RuleContext,
    RuleError,
    find_function_rule,
    find_rule,
    is_builtin,
    named_arguments,
    register_function_rule,
    register_remedy,
    register_rule,
    unsupported_module,
    value_of,
)

_ANY = "; behind gradient gates, clipless_dp.gradient_gated(net), it runs as it is"
"""What replacements are named for is a certified Lipschitz network; who wants none keeps the layer."""

_MIXES = (
    "it mixes samples through batch statistics; clipless_dp.recipes.convert_batchnorm(net) replaces it by group norms, "
    "for networks behind gradient gates (clipless_dp.gradient_gated(net)); in a certified Lipschitz network use "
    "clipless_dp.layers.LayerCentering and BallProjection; with frozen statistics it is affine, and "
    "torch.nn.utils.fuse_conv_bn_eval or fuse_linear_bn_eval folds it into the layer before"
)
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
    "it has no global Lipschitz constant; in a certified Lipschitz network use clipless_dp.layers.LayerCentering "
    f"followed by BallProjection{_ANY}",
    nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm,
)  # fmt: skip
register_remedy(
    "it has no global Lipschitz constant; in a certified Lipschitz network use clipless_dp.layers.SampleGroupNorm, "
    f"with a floor{_ANY}",
    nn.GroupNorm,
)
register_remedy(
    "attention has no global Lipschitz constant; in a certified Lipschitz network mix tokens by linear maps (nn.Linear "
    f"on the transposed axes){_ANY}",
    nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Transformer,
)  # fmt: skip
register_remedy(
    "put a last softmax into the loss, e.g. clipless_dp.losses.TauCrossEntropy; in a certified Lipschitz network leave "
    f"others out{_ANY}",
    nn.Softmax, nn.LogSoftmax,
)  # fmt: skip
register_remedy(
    f"in a certified Lipschitz network use nn.ReLU, nn.Tanh or clipless_dp.layers.GroupSort{_ANY}",
    nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish, nn.GLU, nn.Threshold, nn.Hardshrink, nn.Softmin, nn.Softmax2d,
)  # fmt: skip
register_remedy(
    "it does not know its parameters yet: run the network once on a batch of zeros, net(torch.zeros(2, ...)), before "
    "it is wrapped; it is then an ordinary layer",
    LazyModuleMixin,
)
register_remedy(
    "its norm is not certified in three dimensions; in a certified Lipschitz network fold one axis into the channels "
    f"(flatten(1, 2)) and use nn.ConvTranspose2d{_ANY}",
    nn.ConvTranspose3d,
)  # fmt: skip
register_remedy(
    f"it reads the places of maxima from another layer; use nn.ConvTranspose2d, or nn.PixelShuffle{_ANY}",
    nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d,
)  # fmt: skip
register_remedy(
    f"use clipless_dp.layers.L2NormPool2d (L2NormPool1d for signals), which is the same with norm_type=2{_ANY}",
    nn.LPPool1d, nn.LPPool2d, nn.LPPool3d,
)  # fmt: skip
register_remedy(
    f"use nn.MaxPool1d or nn.MaxPool2d with numbers for its windows{_ANY}",
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip
register_remedy(
    "it draws from torch's own generator; use nn.Dropout, whose masks come from the model's",
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
register_remedy(
    "it draws its slopes from torch's own generator; use nn.LeakyReLU, or nn.PReLU, which learns them",
    nn.RReLU,
)  # fmt: skip
register_remedy(
    f"use nn.ConvTranspose2d with a stride, or nn.PixelShuffle{_ANY}",
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
register_remedy(
    "recurrent layers have no rule; a certified Lipschitz network reads sequences by nn.Conv1d or linear maps"
    f"{_ANY}",
    nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip

__all__ = [
    "Deferred",
    "LayerBounds",
    "RuleContext",
    "RuleError",
    "activations",
    "causal",
    "conv",
    "distance",
    "embedding",
    "find_function_rule",
    "find_rule",
    "forward_only",
    "gates",
    "graph",
    "is_builtin",
    "linear",
    "named_arguments",
    "pooling",
    "register_function_rule",
    "register_remedy",
    "register_rule",
    "residual",
    "structured",
    "unsupported_module",
    "value_of",
]
