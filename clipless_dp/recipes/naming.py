"""Which modules and parameters names and patterns mean; what then trains, and what replaces them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import modules_of, parameters_of

HEADS = ("classifier", "pre_classifier", "classification_head", "qa_outputs", "score", "fc", "head", "heads")
"""Usual names of the head that a task adds to a network: in transformers, timm and torchvision.

A module of such a name within a numbered element of a list is no head: blocks have parts of these names, too.
"""

Patterns = str | Iterable[str]
"""A pattern, or several."""


def checked_module(net: object) -> nn.Module:
    """The network, once it is known to be a module whose parameters are there."""
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"net must be an nn.Module, got {type(net).__name__}")
    if any(isinstance(module, LazyModuleMixin) for module in modules_of(net)):
        raise ConfigurationError("lazy modules do not know their parameters yet; run the network once before")
    return net


def train(net: nn.Module, trained: Iterable[nn.Parameter]) -> nn.Module:
    """Lets these parameters train and no others. What is left in ``.grad`` of a frozen one would move it: dropped."""
    chosen = {id(parameter) for parameter in trained}
    for parameter in parameters_of(checked_module(net)):
        differentiable = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(id(parameter) in chosen and differentiable)
        if not parameter.requires_grad:
            parameter.grad = None
    return net


def replaced(net: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts new modules in the places of old ones, in all of them; returns the root."""
    for module in modules_of(net):
        for name, child in module._modules.items():
            if child is not None and child in new:
                module._modules[name] = new[child]
    return new.get(net, net)


def checked_patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    """The patterns of an argument, one or several, once they are known to be strings."""
    found = (patterns,) if isinstance(patterns, str) or not isinstance(patterns, Iterable) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in found):
        raise ConfigurationError(f"{argument} must be names or patterns of names, got {patterns!r:.80}")
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name, or the end of it behind a dot, matches a pattern."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def listed(names: Iterable[str]) -> str:
    """Names; where they are many, those of numbered elements once, as a pattern that matches them all."""
    several = [name or "the network itself" for name in names]
    if len(several) > 12:
        several = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in several))
    return (", ".join(several[:30]) or "none") + (f" and {len(several) - 30} more" if len(several) > 30 else "")


def named_parameters(net: nn.Module, patterns: Patterns, argument: str) -> list[nn.Parameter]:
    """Parameters that are named themselves, or whose module or one around it is."""
    held = {name: parameters_of(module) for name, module in net.named_modules(remove_duplicate=False) if name}
    held |= {name: [parameter] for name, parameter in net.named_parameters(remove_duplicate=False)}
    named: list[nn.Parameter] = []
    for pattern in checked_patterns(argument, patterns):
        found = [parameter for name, inside in held.items() if matches(name, pattern) for parameter in inside]
        if not found:
            raise ConfigurationError(
                f"{argument}: no module with parameters matches {pattern!r}; there are "
                f"{listed(name for name, inside in held.items() if inside)}"
            )
        named += found
    return named


def head_parameters(net: nn.Module, also: Patterns | None) -> list[nn.Parameter]:
    """The parameters that ``also`` names, or those of a head by any of its usual names."""
    if also is not None:
        return named_parameters(net, also, "also")
    heads = [module for name, module in net.named_modules() if _is_head(name.split("."))]
    return [parameter for head in heads for parameter in parameters_of(head)]


def _is_head(path: list[str]) -> bool:
    return path[-1] in HEADS and not any(part.isdigit() for part in path)
