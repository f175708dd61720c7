"""Recipes that choose what trains among the parameters that are there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import modules_of, parameters_of
from clipless_dp.recipes.naming import Patterns, checked_module, head_parameters, listed, named_parameters, train


def freeze(net: nn.Module) -> nn.Module:
    """Nothing trains. Batch norms in training mode go on collecting statistics: see :func:`convert_batchnorm`.

    Raises:
        ConfigurationError: ``net`` is not a module.
    """
    return train(net, ())


def full(net: nn.Module) -> nn.Module:
    """Everything trains, but what torch cannot differentiate: integer and quantised parameters.

    Raises:
        ConfigurationError: ``net`` is not a module.
    """
    return train(net, parameters_of(checked_module(net)))


def only(net: nn.Module, names: Patterns) -> nn.Module:
    """The modules and parameters of these names train.

    Raises:
        ConfigurationError: ``net`` is not a module, there are no names, or a pattern matches nothing.
    """
    named = named_parameters(checked_module(net), names, "names")
    if not named:
        raise ConfigurationError("names must be at least one; recipes.freeze(net) lets nothing train")
    return train(net, named)


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
    parameters = dict(checked_module(net).named_parameters())
    blocks = _blocks(net, parameters)
    if count > len(blocks):
        raise ConfigurationError(
            f"the network has {len(blocks)} blocks, not {count}: {listed(blocks)}; "
            "ask for fewer, or name what should train: recipes.only(net, names)"
        )
    if not blocks:
        raise ConfigurationError("the network has no layer with a matrix; name what should train: recipes.only")
    spans = list(blocks.values())
    start = spans[-count].start if count else spans[-1].stop
    if start == len(parameters):
        raise ConfigurationError("nothing is registered behind the last block, or only what is tied; use count=1")
    return train(net, list(parameters.values())[start:])


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
        for name, parameter in checked_module(net).named_parameters()
        if parameter.dim() < 2 and "bias" in name.rpartition(".")[2].split("_")
    ]
    if not biases:
        raise ConfigurationError("the network has no biases; name what should train: recipes.only(net, names)")
    return train(net, [*biases, *head_parameters(net, also)])


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
