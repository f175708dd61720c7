"""Low-rank adapters beside linear layers, and their merging."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp.arguments import positive, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import kind_of, modules_of
from clipless_dp.recipes.naming import (
    Patterns,
    checked_module,
    checked_patterns,
    head_parameters,
    listed,
    matches,
    replaced,
    train,
)


class LoRALinear(nn.Module):
    """``y = base(x) + (alpha/rank)·B·A·x``: a linear layer, frozen as a rule, beside a product of low rank.

    Hu et al. 2022, *LoRA*, section 4.1. ``A`` is ``lora_A.weight``, ``(rank, in)``, drawn from torch's generator as
    ``nn.Linear`` draws (Kaiming, uniform); ``B`` is ``lora_B.weight``, ``(out, rank)``, zero, so that at first nothing
    changes. Both are of the device and dtype of the layer.

    Args:
        base: an ``nn.Linear``, or a ``Conv1D`` of transformers.
        rank: at most the smaller side of the weight.
        scale: ``alpha/rank``.

    Shape:
        ``(..., in)`` to ``(..., out)``.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.transposed = _is_conv1d(base)
        weight = _weight(base)
        self.out_features, self.in_features = weight.mT.shape if self.transposed else weight.shape
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies by, for code that reads it in place of calling the layer."""
        return _weight(self.base) + self.change()

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, if it has one."""
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None

    def change(self) -> Tensor:
        """``(alpha/rank)·B·A``, of the shape of the layer's weight."""
        change = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        return change.mT if self.transposed else change

    def forward(self, values: Tensor) -> Tensor:
        """The layer's output and the adapters'."""
        output: Tensor = self.base(values) + self.lora_B(self.scale * self.lora_A(values))
        return output

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.lora_A.out_features}, scale={self.scale:g}"


def lora(
    net: nn.Module, rank: int = 8, *, alpha: float | None = None, layers: Patterns = "*", also: Patterns | None = None
) -> nn.Module:
    """Low-rank adapters train beside frozen linear layers (:class:`LoRALinear`), and what ``also`` names; no more.

    Adapted are ``nn.Linear`` and transformers' ``Conv1D`` themselves, not classes derived from these. Left out are
    layers that ``also`` names and those whose weight another module shares, such as a head that is tied to the token
    embedding. ``nn.MultiheadAttention`` keeps its projections as they are: it has no linear layers that it calls.

    In the state dict a layer's own values are under ``base.``, the adapters ``lora_A.weight`` and ``lora_B.weight``:
    load the pretrained ones before. :func:`merge_lora` gives the old names back. Models of the package ``peft`` need no
    recipe: they are frozen but for their adapters.

    Args:
        net: the network; it is changed in place.
        rank: of the product.
        alpha: the product is scaled by ``alpha/rank``; ``None``: by 1.
        layers: names of the layers that are adapted.
        also: what trains whole; ``None``: a head by any of its usual names (:data:`HEADS`); ``()``: nothing.

    Returns:
        The network, or the adapted layer if the network is one linear layer.

    Raises:
        ConfigurationError: before anything is changed: ``net`` is not a module or has adapters, a pattern matches
            nothing that can be adapted, or ``rank`` or ``alpha`` is outside its range.
    """
    rank = whole("rank", rank)
    scale = 1.0 if alpha is None else positive("alpha", alpha) / rank
    if any(isinstance(module, LoRALinear) for module in modules_of(checked_module(net))):
        raise ConfigurationError("the network has adapters; fold them into its weights first: recipes.merge_lora(net)")
    head = head_parameters(net, also)
    targets = _adapted(net, checked_patterns("layers", layers), {id(parameter) for parameter in head})
    small = [name for name, layer in targets.items() if min(_weight(layer).shape) < rank]
    if small:
        raise ConfigurationError(
            f"rank {rank} is larger than a side of the weight of {listed(small)}; "
            "lower it, train these whole (also=), or name other layers (layers=)"
        )
    train(net, head)
    return replaced(net, {layer: LoRALinear(layer, rank, scale) for layer in targets.values()})


def merge_lora(net: nn.Module) -> nn.Module:
    """Folds the adapters of :func:`lora` into the layers beside them: the same function up to rounding, the old names.

    The layers stay frozen, what ``also`` named goes on training; choose another recipe to train on.

    Returns:
        The network, or the layer if the network is one adapted layer.

    Raises:
        ConfigurationError: ``net`` is not a module, or has no adapters.
    """
    adapted = [module for module in modules_of(checked_module(net)) if isinstance(module, LoRALinear)]
    if not adapted:
        raise ConfigurationError("the network has no adapters of recipes.lora; those of peft are merged by peft")
    with torch.no_grad():
        for module in adapted:
            _weight(module.base).add_(module.change())
    return replaced(net, {module: module.base.train(module.training) for module in adapted})


def _is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers takes seconds.
    kind = kind_of(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _adapted(net: nn.Module, patterns: tuple[str, ...], head: set[int]) -> dict[str, nn.Module]:
    """Linear layers that these patterns name, by their names."""
    held = [id(parameter) for module in modules_of(net) for parameter in module._parameters.values()]
    # A weight that a hook computes anew at each call is no parameter, and nothing could be folded into it.
    linear = {
        name: module
        for name, module in net.named_modules()
        if (kind_of(module) is nn.Linear or _is_conv1d(module)) and "weight" in module._parameters
    }
    left_out = {
        name: "also= trains it whole" if id(layer.weight) in head else "another module shares its weight"
        for name, layer in linear.items()
        if id(layer.weight) in head or held.count(id(layer.weight)) > 1
    }
    named: dict[str, nn.Module] = {}
    for pattern in patterns:
        found = {name: layer for name, layer in linear.items() if matches(name, pattern)}
        usable = {name: layer for name, layer in found.items() if name not in left_out}
        if not usable:
            reasons = "; ".join(f"{name} is left out: {left_out[name]}" for name in list(found)[:5])
            raise ConfigurationError(
                f"layers: no linear layer that can be adapted matches {pattern!r}; "
                f"{reasons or 'there are ' + listed(linear)}"
            )
        named |= usable
    if not named:
        raise ConfigurationError("layers names nothing; name the layers that are adapted, such as 'query'")
    return named
