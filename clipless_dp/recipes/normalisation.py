"""Batch norms, which let samples meet, replaced by what does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import has_hooks, kind_of, parameters_of, runs_hooks
from clipless_dp.recipes.naming import checked_module, replaced


class FrozenBatchNorm(nn.Module):
    """A batch norm in ``eval`` mode for good: ``y = weight·(x - running_mean)/√(running_var + eps) + bias``.

    An affine map of each sample by itself. The statistics are buffers that never change; ``weight`` and ``bias``, where
    the batch norm has them, are its own parameters, frozen or trained as any others. Names in the state dict stay.

    Args:
        norm: a batch norm with running statistics.

    Shape:
        ``(B, C, ...)`` to the same shape.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", norm.bias)
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer.clone())
        self.train(norm.training)

    def forward(self, values: Tensor) -> Tensor:
        """The affine map."""
        return functional.batch_norm(values, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """Channels and eps."""
        return f"{len(self.running_mean)}, eps={self.eps:g}"


def convert_batchnorm(
    net: nn.Module, to: Literal["group", "frozen"] = "group", *, groups: int | None = None
) -> nn.Module:
    """Replaces batch norms, which let samples meet, by group norms, or by what they are in ``eval`` mode.

    ``"group"``: ``nn.GroupNorm`` with the weight and bias of the batch norm (Wu and He 2018, *Group Normalization*).
    The function changes: what was trained before fits it no more, so that most of the network has to train again.
    ``"frozen"``: :class:`FrozenBatchNorm`, whose outputs are those in ``eval`` mode, to the bit. The running statistics
    must come from public data: nothing protects them.

    Args:
        net: the network; it is changed in place. Without batch norms it stays as it is.
        to: ``"group"`` or ``"frozen"``.
        groups: groups of each group norm; ``None``: the largest divisor of its channels up to 32, for ``BatchNorm1d``
            with at least 16 channels a group, since its samples may be vectors, of which a group of one entry is
            nothing but zeros.

    Returns:
        The network, or the replacement if the network is one batch norm.

    Raises:
        ConfigurationError: before anything is changed: ``net`` is not a module, ``to`` is unknown, ``groups`` does not
            divide the channels, a batch norm is synchronised, hooked or of a class derived from torch's, or has no
            running statistics that could be frozen.
    """
    if to not in ("group", "frozen"):
        raise ConfigurationError(f"to must be 'group' or 'frozen', got {to!r}")
    if groups is not None:
        groups = whole("groups", groups)
        if to == "frozen":
            raise ConfigurationError("groups are those of group norms; leave them out with to='frozen'")
    found = {name: module for name, module in checked_module(net).named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in found.items():
        _require_convertible(name, norm, to, groups)
    return replaced(
        net, {norm: FrozenBatchNorm(norm) if to == "frozen" else _group_norm(norm, groups) for norm in found.values()}
    )


def _require_convertible(name: str, norm: _BatchNorm, to: str, groups: int | None) -> None:
    kind = kind_of(norm)
    where = f"{name or 'the network'} ({kind.__name__})"
    if kind is nn.SyncBatchNorm:
        raise ConfigurationError(
            f"{where} takes statistics over processes; convert the network before its batch norms become such"
        )
    if kind not in _SPATIAL:
        raise ConfigurationError(
            f"{where} may do more than torch's batch norms, which are converted; "
            "build the network with nn.GroupNorm (norm_layer= in timm and torchvision)"
        )
    if runs_hooks(norm) or any(map(has_hooks, parameters_of(norm))):
        raise ConfigurationError(f"{where} has hooks, which its replacement would lose; remove them before")
    if to == "frozen" and (norm.running_mean is None or norm.running_var is None):
        raise ConfigurationError(f"{where} has no running statistics to freeze; use to='group'")
    if groups is not None and norm.num_features % groups:
        raise ConfigurationError(f"{where} has {norm.num_features} channels, which {groups} groups do not divide")


_SPATIAL: Mapping[type[nn.Module], bool] = {nn.BatchNorm1d: False, nn.BatchNorm2d: True, nn.BatchNorm3d: True}
"""Batch norms that are converted, and whether a channel surely holds more than one value."""


def _group_norm(norm: _BatchNorm, groups: int | None) -> nn.GroupNorm:
    channels = norm.num_features
    if groups is None:
        most = min(32, channels if _SPATIAL[kind_of(norm)] else max(1, channels // 16))
        groups = next(number for number in range(most, 0, -1) if channels % number == 0)
    group_norm = nn.GroupNorm(groups, channels, norm.eps, affine=False)
    if norm.affine:
        group_norm.affine = True
        group_norm.weight, group_norm.bias = norm.weight, norm.bias
    return group_norm.train(norm.training)
