"""Parts that no run of one sample at a time can have, each with what to use in its place."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from clipless_dp.errors import Unsupported, UnsupportedModuleError

STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)
"""Layers that keep statistics of batches."""

FROZEN = (*STATISTICS, parametrizations._SpectralNorm)
"""Layers that write into buffers unless they are frozen by ``eval()``, which they stay."""

_IN_HOOKS = (
    (
        WeightNorm,
        "it forms its weight in a hook and keeps it in an attribute: use "
        "torch.nn.utils.parametrizations.weight_norm in place of torch.nn.utils.weight_norm",
    ),
    (
        SpectralNorm,
        "it forms its weight in a hook and writes its power iteration into buffers: remove it by "
        "torch.nn.utils.remove_spectral_norm(layer); behind gradient gates no norm of a weight is needed",
    ),
    (
        prune.BasePruningMethod,
        "it forms its weight in a hook and keeps it in an attribute: make it permanent by "
        "torch.nn.utils.prune.remove(layer, name)",
    ),
)

ON_ZEROS = (
    (
        "Length of all samples has to be greater than 0",
        "pack_padded_sequence needs lengths that are known beforehand, and no run for many samples has them: run the "
        "recurrent layer on padded samples, and take the output of the last token that counts by gather, at "
        "(lengths - 1).clamp(min=0)",
    ),
    (
        "index -1 is out of bounds",
        "a place that is counted from a sample is -1 where all of it is padding, as zeros may be: write "
        "(lengths - 1).clamp(min=0)",
    ),
    (
        "Batching rule not implemented",
        "an operation writes into memory that is given (out=, buffers): use one that returns what it makes",
    ),
)
"""What torch says where a network is run on zeros, and what to do."""


def refuse_parts(net: nn.Module) -> None:
    """Refuses layers that see batches, or that keep what they compute.

    Raises:
        UnsupportedModuleError: names them, each with its replacement.
    """
    parts = [
        Unsupported(path or "net", type(part).__name__, remedy)
        for path, part in net.named_modules()
        if (remedy := _remedy(part)) is not None
    ]
    if parts:
        raise UnsupportedModuleError(parts, isolated=True)


def _is_reset(part: nn.modules.batchnorm._BatchNorm) -> bool:
    mean = part.running_mean
    return part.momentum is None and mean is not None and not mean.is_meta and not bool(mean.any())


def _remedy(part: nn.Module) -> str | None:
    if isinstance(part, STATISTICS) and (part.training or part.running_mean is None):
        return (
            "its statistics are of a batch, in which samples meet: clipless_dp.recipes.convert_batchnorm(net) "
            "makes group normalisation of it, or freezes them; statistics frozen by eval() stay as they are"
        )
    if isinstance(part, STATISTICS) and _is_reset(part):
        return (
            "it has no statistics yet and is set to average those of all batches (momentum=None), as "
            "torch.optim.swa_utils.update_bn leaves it before its first batch, while statistics are frozen here and "
            "learn nothing, in copies and averages neither: load the former ones (load_state_dict) and leave update_bn "
            "out; of a new one set momentum to a number"
        )
    if isinstance(part, parametrizations._SpectralNorm) and part.training:
        return (
            "its power iteration writes into buffers in each pass: freeze it by eval() on this module, which stays so, "
            "or remove it by torch.nn.utils.parametrize.remove_parametrizations; behind gradient gates no norm of a "
            "weight is needed"
        )
    # Not by its type, whose module takes seconds to import.
    if type(part).__name__ == "OptimizedModule" and type(part).__module__.startswith("torch._dynamo"):
        return "it was compiled, whose operations run unseen: use what torch.compile was given, its _orig_mod"
    for hook in part._forward_pre_hooks.values():
        for kind, remedy in _IN_HOOKS:
            if isinstance(hook, kind):
                return remedy
    if part._backward_hooks or part._backward_pre_hooks:
        return "a hook on its backward pass sees the gradients of all samples at once; remove it"
    return None
