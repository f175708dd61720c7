"""Dropout of an executed graph, with masks from a model's own source in place of torch's generator."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from clipless_dp.isolation import Isolated
from clipless_dp.layers import Foton, NoiseInjection, Pepita
from clipless_dp.modules import kind_of
from clipless_dp.noise.randomness import BY_CHANNEL, BY_SAMPLE, EVERY_ENTRY, Randomness, empty_noise, live
from clipless_dp.rules import find_function_rule, find_rule
from clipless_dp.rules.base import is_builtin

# Opaque to compilers: they would run torch's own dropout from torch's own generator, and might fold a draw into a
# constant or draw once for two layers, were it not for the tag.
_library = torch.library.Library("clipless_dp_randomness", "DEF")
_library.define(
    "dropout_noise(Tensor values, int kind, float p, int handle) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)


def _drawn(values: Tensor, kind: int, p: float, handle: int) -> Tensor:
    return live[handle].dropout_noise(values, kind, p)


def _faked(values: Tensor, kind: int, p: float, handle: int) -> Tensor:
    return empty_noise(values, kind)


_library.impl("dropout_noise", _drawn, "CompositeExplicitAutograd")
torch.library.register_fake("clipless_dp_randomness::dropout_noise", _faked, lib=_library)

_Dropout = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class DrawnDropout(nn.Module):
    """A dropout layer as the executed graph runs it: with masks from a :class:`Randomness`.

    Args:
        layer: torch's layer, whose rate and mode are followed.
        source: draws the masks.

    Shape:
        ``(B, ...)`` to the same shape.
    """

    def __init__(self, layer: _Dropout, source: Randomness) -> None:
        super().__init__()
        self.layer = layer
        self._source = source
        self._handle = source.handle

    def forward(self, values: Tensor) -> Tensor:
        """Drops entries (channels of the layers that say so) while the layer is in training mode."""
        layer = self.layer
        if not layer.training or layer.p == 0.0:
            return values
        kind = EVERY_ENTRY if isinstance(layer, nn.Dropout) else BY_CHANNEL
        if values.dim() == {nn.Dropout1d: 2, nn.Dropout3d: 4}.get(type(layer)):
            # Torch takes these for one sample without a batch axis, whose channels they are.
            kind = BY_SAMPLE
        if torch.compiler.is_compiling():
            drawn = torch.ops.clipless_dp_randomness.dropout_noise
            noise: Tensor = drawn(values.detach(), kind, float(layer.p), self._handle)
        else:
            with torch.no_grad():
                noise = self._source.dropout_noise(values, kind, layer.p)
        return values * noise


def replace_dropout_(graph: fx.GraphModule, source: Randomness) -> None:
    """Lets a traced graph, not the network that it shares its layers with, run dropout from a source."""
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        leaf = graph.get_submodule(str(node.target))
        if type(leaf) in _DROPOUTS:
            above, _, name = str(node.target).rpartition(".")
            setattr(graph.get_submodule(above), name, DrawnDropout(cast(_Dropout, leaf), source))


def may_draw(graph: fx.GraphModule) -> bool:
    """Whether a part of a traced graph draws random numbers itself: noise, and what is not torch's or ours."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            leaf = graph.get_submodule(str(node.target))
            rule = None if isinstance(leaf, DrawnDropout) else find_rule(leaf)
            package = kind_of(leaf).__module__.partition(".")[0]
            if (
                isinstance(leaf, (Isolated, NoiseInjection, Foton, Pepita))
                or package not in ("torch", "clipless_dp")
                or not (rule is None or is_builtin(rule))
            ):
                return True
        elif node.op in ("call_function", "call_method"):
            rule_of_function = find_function_rule(node.target)
            if rule_of_function is not None and rule_of_function.__module__.partition(".")[0] != "clipless_dp":
                return True
    return False
