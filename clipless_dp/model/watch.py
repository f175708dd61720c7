"""Whether the modules whose bounds a model knows are still those, as they were, and run nothing else."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from clipless_dp.distributed import placement
from clipless_dp.errors import PrivacyError
from clipless_dp.graph.tracing import TracedNet, is_leaf
from clipless_dp.isolation import Isolated
from clipless_dp.model.overlaps import places, refuse_overlaps
from clipless_dp.model.settings import AllSettings, Settings
from clipless_dp.modules import (
    has_hooks,
    is_hooked,
    kind_of,
    modules_of,
    parameter_device_and_dtype,
    parameters_of,
    runs_hooks,
)
from clipless_dp.precision import coarse_products
from clipless_dp.tensor_types import refuse_coded

_Held = list[tuple[dict[str, nn.Module | None], tuple[tuple[str, nn.Module | None], ...]]]
"""Of each of some modules its children, and what these were."""


class Leaf:
    """A bounded module, where it was found, and the settings that its bounds rest on.

    Attributes:
        settings: those of the module, and of what is within it.
        within: the layers within it, of which the bounds of this package's own follow.
        held: which modules they hold.
        kinds: what they are.
    """

    def __init__(self, path: tuple[str, ...], module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.kind = kind_of(module)
        self._parts = _watched(module)
        self._parameters = parameters_of(module)
        origin = self.kind.__module__
        self.is_ours = origin.partition(".")[0] in ("torch", "clipless_dp") and "testing" not in origin
        self.within = self._parts[1:] if self.is_ours else []
        self.settings = [Settings(part) for part in (module, *self.within)]
        holding = [part for part in (module, *self.within) if part._modules and self.within]
        self.held = [(part._modules, tuple(part._modules.items())) for part in holding]
        self.kinds = [(part, type(part)) for part in self.within]

    def is_altered(self, net: nn.Module, whole: bool) -> bool:
        """Whether the module was replaced, or anything in it hooked, but by what gathers weights that are not whole."""
        found: nn.Module | None = net
        for name in self.path:
            found = None if found is None else found._modules.get(name)
        module = self.module
        if found is not module:
            return True
        if not whole:
            known = placement.hooks_of_sharding(module)
            inside = any(is_hooked(part) for part in modules_of(module)[1:])
            return kind_of(module) is not self.kind or is_hooked(module, besides=known) or inside
        if type(module) is not self.kind or any(runs_hooks(part) for part in self._parts):
            return True
        if not (_are_held(self.held) and _are_kinds(self.kinds)):
            return True
        return any(has_hooks(parameter) for parameter in self._parameters)


def _are_held(held: _Held) -> bool:
    return all(tuple(now.items()) == then for now, then in held)


def _are_kinds(kinds: list[tuple[nn.Module, type[nn.Module]]]) -> bool:
    return all(type(module) is kind for module, kind in kinds)


def _watched(leaf: nn.Module) -> list[nn.Module]:
    """The parts of a layer that hooks may not be on; what runs within an isolated network sees one sample."""
    return [leaf] if isinstance(leaf, Isolated) else modules_of(leaf)


class Watch:
    """Looks at all leaves at once, as each pass does twice: faster than one by one where nothing was altered.

    Args:
        net: the network.
        traced: the graph of it.
        device: where its parameters are.
        dtype: that they have.

    Attributes:
        leaves: its bounded modules.

    Raises:
        ConfigurationError: parameters share memory.
    """

    def __init__(self, net: nn.Module, traced: TracedNet, device: torch.device, dtype: torch.dtype) -> None:
        self._net, self._device, self._dtype = net, device, dtype
        refuse_overlaps(net)
        self._places = places(parameters_of(net))
        self._types = {type(parameter) for parameter in parameters_of(net)}
        self.leaves = leaves = [
            Leaf(() if is_leaf(net) else tuple(str(node.target).split(".")), traced.leaf(node))
            for node in traced.tensor_nodes()
            if node.op == "call_module"
        ]
        edges: dict[tuple[int, str], tuple[dict[str, nn.Module | None], str, nn.Module]] = {}
        for leaf in leaves:
            above = net
            for name in leaf.path:
                below = cast(nn.Module, above._modules[name])
                edges[id(above), name] = above._modules, name, below
                above = below
        parts = list(dict.fromkeys(part for leaf in leaves for part in _watched(leaf.module)))
        self._edges = list(edges.values())
        self._kinds = [(leaf.module, leaf.kind) for leaf in leaves]
        self._kinds += [one for leaf in leaves for one in leaf.kinds]
        self._held = [one for leaf in leaves for one in leaf.held]
        kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        self._hooks = [getattr(part, kind) for part in parts for kind in kinds]
        self._attributes = [vars(part) for part in parts]
        self._settings = AllSettings(one for leaf in leaves for one in leaf.settings)
        self._settings_of_ours = AllSettings(one for leaf in leaves if leaf.is_ours for one in leaf.settings)
        self._parameters = list(dict.fromkeys(p for leaf in leaves for p in parameters_of(leaf.module)))

    def refuse_interference(self, whole: bool) -> None:
        """Refuses layers that were replaced or hooked, and settings under which products round more coarsely."""
        if not (whole and self._is_quiet()):
            for leaf in self.leaves:
                if leaf.is_altered(self._net, whole):
                    raise PrivacyError(
                        f"the module {'.'.join(('model.net', *leaf.path))!r} was replaced or given hooks, or a "
                        "parameter of it was (register_hook, also one that only looks; spectral_norm, weight_norm and "
                        "prune of torch.nn.utils, where those of torch.nn.utils.parametrizations have none), or "
                        "compiled by itself, where its .compile() was called: the "
                        "bounds are not its own. Wrap the changed network in a new DPLipModel"
                    )
        remedy = coarse_products(self._device)
        if remedy is not None:
            raise PrivacyError(f"float32 products are set to round more coarsely than the bounds cover: {remedy}")

    def refuse_moved(self, held: list[nn.Parameter]) -> None:
        """Refuses parameters on another device, of another dtype, or of a type with code of its own."""
        if not self._types.issuperset(map(type, held)):
            refuse_coded(self._net)
        if any(parameter.device != self._device or parameter.dtype != self._dtype for parameter in held):
            parameter_device_and_dtype(self._net)
            raise PrivacyError(
                "model.net was cast or moved by itself after wrapping, which the bounds do not cover: call the "
                "wrapping model's own .to()"
            )

    def refuse_overlaps(self, held: list[nn.Parameter]) -> None:
        """Refuses parameters that share memory, where they have moved."""
        now = places(held)
        if now != self._places:
            refuse_overlaps(self._net)
            self._places = now

    def settings_hold(self) -> bool:
        """Whether all layers are set as they were."""
        return self._settings.hold()

    def refuse_other_settings(self) -> None:
        """Refuses settings that changed while a pass was under way; a layer of a user's own may keep what it saw."""
        if not self._settings_of_ours.hold():
            raise PrivacyError(
                "the settings of a layer or a gate were changed between a forward pass and its backward pass, so that "
                "no one bound holds for it: change them between steps"
            )

    def _is_quiet(self) -> bool:
        """Whether all modules are where they were, of their kinds, and nothing is hooked."""
        return not (
            any(self._hooks)
            or any("forward" in own or own.get("_compiled_call_impl") is not None for own in self._attributes)
            or not _are_kinds(self._kinds)
            or not _are_held(self._held)
            or any(held.get(name) is not below for held, name, below in self._edges)
            or any(has_hooks(parameter) for parameter in self._parameters)
        )
