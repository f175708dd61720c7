"""What of a network trains, by name: last layers, biases, low-rank adapters, all of it; and batch norms replaced.

Surgery on any ``nn.Module``, done before it is wrapped. Frozen parts need no bound and no noise, so that fewer trained
parameters can mean a better model at the same ε. Each recipe sets ``requires_grad`` of *every* parameter, whatever it
was before, and returns the network.

A pattern names modules or parameters as :mod:`fnmatch` does, ``*`` being anything, dots included. It matches a dotted
name or the end of one behind a dot: ``"query"`` is each ``….attention.self.query``. Who names a module means all that
is in it. A pattern that matches nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from clipless_dp.arguments import positive, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import has_hooks, kind_of, modules_of, parameters_of, runs_hooks

HEADS = ("classifier", "pre_classifier", "classification_head", "qa_outputs", "score", "fc", "head", "heads")
"""Usual names of the head that a task adds to a network: in transformers, timm and torchvision.

A module of such a name within a numbered element of a list is no head: blocks have parts of these names, too.
"""

Patterns = str | Iterable[str]
"""A pattern, or several."""


def freeze(net: nn.Module) -> nn.Module:
    """Nothing trains. Batch norms in training mode go on collecting statistics: see :func:`convert_batchnorm`.

    Raises:
        ConfigurationError: ``net`` is not a module.
    """
    return _train(net, ())


def full(net: nn.Module) -> nn.Module:
    """Everything trains, but what torch cannot differentiate: integer and quantised parameters.

    Raises:
        ConfigurationError: ``net`` is not a module.
    """
    return _train(net, parameters_of(_checked(net)))


def only(net: nn.Module, names: Patterns) -> nn.Module:
    """The modules and parameters of these names train.

    Raises:
        ConfigurationError: ``net`` is not a module, there are no names, or a pattern matches nothing.
    """
    named = _named(_checked(net), names, "names")
    if not named:
        raise ConfigurationError("names must be at least one; recipes.freeze(net) lets nothing train")
    return _train(net, named)


def last_layers(net: nn.Module, count: int = 1) -> nn.Module:
    """The last ``count`` blocks train, and all that is registered behind the first of these: the head, as a rule.

    *Blocks* are the elements of the network's lists (``nn.Sequential``, ``nn.ModuleList``), in order of registration:
    encoder layers of a BERT, blocks of a ViT, residual blocks of a resnet, layers of a perceptron. Of lists within
    lists the outermost counts. Lists of plain layers only, such as a stem or a head, count where no list has larger
    elements. Without any list each layer is a block. An element without a parameter of two axes, a normalisation
    say, is none, and trains with the block before it.

    So ``last_layers(bert, 2)`` trains two encoder layers, pooler and classifier, ``last_layers(resnet)`` the last
    residual block and ``fc``, ``last_layers(perceptron)`` its last linear layer. ``count=0`` trains what follows the
    last block: the head alone. A shared parameter is where it is registered first: a head that is tied to the token
    embedding stays frozen. Name what should train (:func:`only`) where this is not what you want.

    Raises:
        ConfigurationError: ``net`` is not a module, ``count`` is not a whole number, there are fewer blocks, or
            nothing would train.
    """
    count = whole("count", count, least=0)
    parameters = dict(_checked(net).named_parameters())
    blocks = _blocks(net, parameters)
    if count > len(blocks):
        raise ConfigurationError(
            f"the network has {len(blocks)} blocks, not {count}: {_listed(blocks)}; "
            "ask for fewer, or name what should train: recipes.only(net, names)"
        )
    if not blocks:
        raise ConfigurationError("the network has no layer with a matrix; name what should train: recipes.only")
    spans = list(blocks.values())
    start = spans[-count].start if count else spans[-1].stop
    if start == len(parameters):
        raise ConfigurationError("nothing is registered behind the last block, or only what is tied; use count=1")
    return _train(net, list(parameters.values())[start:])


def biases_only(net: nn.Module, also: Patterns | None = None) -> nn.Module:
    """The biases train, those of normalisations included, and what ``also`` names.

    A bias is a parameter of one axis with the word in its name: ``bias``, ``in_proj_bias``, ``bias_hh_l0``.
    Ben Zaken et al. 2022, *BitFit*, section 3, where the task's head trains, too; under differential privacy
    Bu et al. 2022, *Differentially private bias-term fine-tuning*.

    Args:
        net: the network.
        also: what trains as well; ``None``: a head by any of its usual names (:data:`HEADS`); ``()``: nothing.

    Raises:
        ConfigurationError: ``net`` is not a module, it has no biases, or a pattern matches nothing.
    """
    biases = [
        parameter
        for name, parameter in _checked(net).named_parameters()
        if parameter.dim() < 2 and "bias" in name.rpartition(".")[2].split("_")
    ]
    if not biases:
        raise ConfigurationError("the network has no biases; name what should train: recipes.only(net, names)")
    return _train(net, [*biases, *_head(net, also)])


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
    if any(isinstance(module, LoRALinear) for module in modules_of(_checked(net))):
        raise ConfigurationError("the network has adapters; fold them into its weights first: recipes.merge_lora(net)")
    head = _head(net, also)
    targets = _adapted(net, _patterns("layers", layers), {id(parameter) for parameter in head})
    small = [name for name, layer in targets.items() if min(_weight(layer).shape) < rank]
    if small:
        raise ConfigurationError(
            f"rank {rank} is larger than a side of the weight of {_listed(small)}; "
            "lower it, train these whole (also=), or name other layers (layers=)"
        )
    _train(net, head)
    return _replaced(net, {layer: LoRALinear(layer, rank, scale) for layer in targets.values()})


def merge_lora(net: nn.Module) -> nn.Module:
    """Folds the adapters of :func:`lora` into the layers beside them: the same function up to rounding, the old names.

    The layers stay frozen, what ``also`` named goes on training; choose another recipe to train on.

    Returns:
        The network, or the layer if the network is one adapted layer.

    Raises:
        ConfigurationError: ``net`` is not a module, or has no adapters.
    """
    adapted = [module for module in modules_of(_checked(net)) if isinstance(module, LoRALinear)]
    if not adapted:
        raise ConfigurationError("the network has no adapters of recipes.lora; those of peft are merged by peft")
    with torch.no_grad():
        for module in adapted:
            _weight(module.base).add_(module.change())
    return _replaced(net, {module: module.base.train(module.training) for module in adapted})


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
    found = {name: module for name, module in _checked(net).named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in found.items():
        _require_convertible(name, norm, to, groups)
    return _replaced(
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


def _checked(net: object) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"net must be an nn.Module, got {type(net).__name__}")
    if any(isinstance(module, LazyModuleMixin) for module in modules_of(net)):
        raise ConfigurationError("lazy modules do not know their parameters yet; run the network once before")
    return net


def _train(net: nn.Module, trained: Iterable[nn.Parameter]) -> nn.Module:
    """Lets these parameters train and no others. What is left in ``.grad`` of a frozen one would move it: dropped."""
    chosen = {id(parameter) for parameter in trained}
    for parameter in parameters_of(_checked(net)):
        differentiable = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(id(parameter) in chosen and differentiable)
        if not parameter.requires_grad:
            parameter.grad = None
    return net


def _replaced(net: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts new modules in the places of old ones, in all of them; returns the root."""
    for module in modules_of(net):
        for name, child in module._modules.items():
            if child is not None and child in new:
                module._modules[name] = new[child]
    return new.get(net, net)


def _patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    found = (patterns,) if isinstance(patterns, str) or not isinstance(patterns, Iterable) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ConfigurationError(f"{argument} must be names or patterns of names, got {patterns!r:.80}")
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _listed(names: Iterable[str]) -> str:
    """Names; where they are many, those of numbered elements once, as a pattern that matches them all."""
    several = [name or "the network itself" for name in names]
    if len(several) > 12:
        several = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in several))
    return (", ".join(several[:30]) or "none") + (f" and {len(several) - 30} more" if len(several) > 30 else "")


def _named(net: nn.Module, patterns: Patterns, argument: str) -> list[nn.Parameter]:
    """Parameters that are named themselves, or whose module or one around it is."""
    held = {name: parameters_of(module) for name, module in net.named_modules(remove_duplicate=False) if name}
    held |= {name: [parameter] for name, parameter in net.named_parameters(remove_duplicate=False)}
    named: list[nn.Parameter] = []
    for pattern in _patterns(argument, patterns):
        found = [parameter for name, inside in held.items() if _matches(name, pattern) for parameter in inside]
        if not found:
            raise ConfigurationError(
                f"{argument}: no module with parameters matches {pattern!r}; there are "
                f"{_listed(name for name, inside in held.items() if inside)}"
            )
        named += found
    return named


def _head(net: nn.Module, also: Patterns | None) -> list[nn.Parameter]:
    if also is not None:
        return _named(net, also, "also")
    heads = [module for name, module in net.named_modules() if _is_head(name.split("."))]
    return [parameter for head in heads for parameter in parameters_of(head)]


def _is_head(path: list[str]) -> bool:
    return path[-1] in HEADS and not any(part.isdigit() for part in path)


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
        found = {name: layer for name, layer in linear.items() if _matches(name, pattern)}
        usable = {name: layer for name, layer in found.items() if name not in left_out}
        if not usable:
            reasons = "; ".join(f"{name} is left out: {left_out[name]}" for name in list(found)[:5])
            raise ConfigurationError(
                f"layers: no linear layer that can be adapted matches {pattern!r}; "
                f"{reasons or 'there are ' + _listed(linear)}"
            )
        named |= usable
    if not named:
        raise ConfigurationError("layers names nothing; name the layers that are adapted, such as 'query'")
    return named


def _blocks(net: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, range]:
    """Names of the blocks, in order of registration, with the places of their parameters among all."""
    lists = [[(name, child) for name, child in listed if _span(name, parameters)] for listed in _lists("", net)]
    larger = [listed for listed in lists if any(_is_larger(child) for _, child in listed)]
    chosen = [name for listed in larger or lists for name, _ in listed] or [
        name for name, module in net.named_modules() if not _is_larger(module) and _span(name, parameters)
    ]
    return {name: _span(name, parameters) for name in chosen}


def _span(block: str, parameters: Mapping[str, nn.Parameter]) -> range:
    """Places of the parameters that are registered first in this module; none if all of these have one axis."""
    inside = f"{block}." if block else ""
    own = [(place, name) for place, name in enumerate(parameters) if name.startswith(inside)]
    if not any(parameters[name].dim() >= 2 for _, name in own):
        return range(0)
    return range(own[0][0], own[-1][0] + 1)


def _lists(name: str, module: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The outermost lists in a module, as names and elements."""
    children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [children]
    return [found for path, child in children for found in _lists(path, child)]


def _is_larger(module: nn.Module) -> bool:
    """Whether a module is more than a plain layer: it has modules with parameters."""
    return any(child._parameters for child in modules_of(module)[1:])
