"""Signal gates around every parametrised layer: the route to a bound that asks nothing of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import fx, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import BallProjection, CotangentGate, GateMode, SphereScaling
from clipless_dp.tracing import symbolic_trace


def gated(
    net: nn.Module,
    *,
    input_norm: float = 1.0,
    cotangent_norm: float = 1.0,
    input_mode: Literal["sphere", "ball"] = "sphere",
    cotangent_mode: GateMode = "clip",
    layers: Sequence[str] = ("*",),
) -> fx.GraphModule:
    """Puts a gate before and a cotangent gate behind each parametrised layer.

    A layer between its gates has ``X ≤ input_norm`` and ``G ≤ cotangent_norm``, so its sensitivity is a constant
    that no weight enters. Gates change what flows: activations are rescaled, and cotangents of earlier layers are
    clipped or normalised (a bias of the gradient, never of the guarantee).

    Args:
        net: the network; its modules and parameters are shared with the result, under the same names.
        input_norm: radius of the gate before each layer.
        cotangent_norm: cap of the gate behind each layer.
        input_mode: ``"sphere"`` scales each sample to the radius, ``"ball"`` only projects larger ones.
        cotangent_mode: ``"clip"`` or ``"normalize"``.
        layers: ``fnmatch`` patterns of the paths of the layers to gate.

    Returns:
        A traced network with the gates in place, to be wrapped by ``DPLipModel``.

    Raises:
        UnsupportedModuleError: the network cannot be traced.
        ConfigurationError: no layer matches, or a value is out of range.
    """
    traced = symbolic_trace(net)
    chosen = [
        node
        for node in traced.graph.nodes
        if node.op == "call_module"
        and any(True for _ in traced.get_submodule(str(node.target)).parameters())
        and any(fnmatchcase(str(node.target), pattern) for pattern in layers)
    ]
    if not chosen:
        raise ConfigurationError(f"no parametrised layer matches {list(layers)}")
    for index, node in enumerate(chosen):
        before: nn.Module = SphereScaling(input_norm) if input_mode == "sphere" else BallProjection(input_norm)
        label = f"{index}_{str(node.target).replace('.', '_')}"
        traced.add_submodule(f"gates.{label}_input", before)
        traced.add_submodule(f"gates.{label}_cotangent", CotangentGate(cotangent_norm, cotangent_mode))
        with traced.graph.inserting_before(node):
            entry = traced.graph.call_module(f"gates.{label}_input", (node.args[0],))
        node.update_arg(0, entry)
        with traced.graph.inserting_after(node):
            leaving = traced.graph.call_module(f"gates.{label}_cotangent", (node,))
        node.replace_all_uses_with(leaving, delete_user_cb=lambda user, gate=leaving: user is not gate)
    traced.recompile()
    for path, module in net.named_modules():
        if path and not list(module.children()) and not _has(traced, path):
            traced.add_submodule(path, module)
    return traced


def _has(net: nn.Module, path: str) -> bool:
    try:
        net.get_submodule(path)
    except AttributeError:
        return False
    return True
