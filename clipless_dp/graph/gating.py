"""Gates for whole networks: signal gates around layers, gradient gates inside them; neither rests on weights."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import fx, nn

from clipless_dp.arguments import cap, choice, patterns, shown, whole
from clipless_dp.errors import ConfigurationError, UnsupportedModuleError
from clipless_dp.gates import (
    AdaptiveLimit,
    BallProjection,
    CotangentGate,
    GateMode,
    SphereScaling,
    can_be_gradient_gated,
    gradient_gated_layer,
)
from clipless_dp.gates.arithmetic import FLOOR_SHARE
from clipless_dp.graph.tracing import is_leaf, symbolic_trace, without_rule
from clipless_dp.isolation import Isolated, Joint, Select, is_named
from clipless_dp.rules import find_rule
from clipless_dp.rules.embedding import TABLES


def gated(
    net: nn.Module,
    *,
    input_norm: float = 1.0,
    cotangent_norm: float = 1.0,
    input_mode: Literal["sphere", "ball"] = "sphere",
    cotangent_mode: GateMode = "clip",
    layers: str | Sequence[str] = ("*",),
) -> fx.GraphModule:
    """Puts a gate before and a cotangent gate behind each parametrised layer.

    A layer between its gates has ``X ≤ input_norm`` and ``G ≤ cotangent_norm``, so its sensitivity is a constant
    that no weight enters. Gates change what flows: activations are rescaled, and cotangents of earlier layers are
    clipped or normalised (a bias of the gradient, never of the guarantee). Embeddings read tokens, whose number bounds
    ``X`` already: they get the cotangent gate only.

    Args:
        net: the network; its modules and parameters are shared with the result, under the same names.
        input_norm: radius of the gate before each layer.
        cotangent_norm: cap of the gate behind each layer.
        input_mode: ``"sphere"`` scales each sample to the radius, ``"ball"`` only projects larger ones.
        cotangent_mode: ``"clip"`` or ``"normalize"``.
        layers: ``fnmatch`` patterns of the paths of the layers to gate, or a single one.

    Returns:
        A traced network with the gates in place, to be wrapped by ``DPLipModel``.

    Raises:
        UnsupportedModuleError: the network cannot be traced.
        ConfigurationError: no layer matches, or a value is out of range.
    """
    if isinstance(net, Isolated):
        raise ConfigurationError("a network that runs sample by sample is behind gradient gates, and needs no others")
    _refuse_other_than_modules(net)
    choice("input_mode", input_mode, "sphere", "ball")
    choice("cotangent_mode", cotangent_mode, "clip", "normalize")
    input_norm, cotangent_norm = cap("input_norm", input_norm), cap("cotangent_norm", cotangent_norm)
    layers = patterns("layers", layers)
    if is_leaf(net):
        raise ConfigurationError(f"net is a single {type(net).__name__}: put it into nn.Sequential first")
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
        label = f"{index}_{str(node.target).replace('.', '_')}"
        traced.add_submodule(f"gates.{label}_cotangent", CotangentGate(cotangent_norm, cotangent_mode))
        if len(node.all_input_nodes) != 1:
            raise ConfigurationError(f"the layer {node.target!r} takes several values: put its gates by hand")
        if not isinstance(traced.get_submodule(str(node.target)), TABLES):
            before: nn.Module = SphereScaling(input_norm) if input_mode == "sphere" else BallProjection(input_norm)
            traced.add_submodule(f"gates.{label}_input", before)
            (source,) = node.all_input_nodes
            with traced.graph.inserting_before(node):
                entry = traced.graph.call_module(f"gates.{label}_input", (source,))
            node.replace_input_with(source, entry)
        with traced.graph.inserting_after(node):
            leaving = traced.graph.call_module(f"gates.{label}_cotangent", (node,))
        node.replace_all_uses_with(leaving, delete_user_cb=lambda user, gate=leaving: user is not gate)
        for user in list(leaving.users):
            if user.op == "call_module" and getattr(traced.get_submodule(str(user.target)), "inplace", False):
                # Autograd refuses to overwrite what a gate returns.
                with traced.graph.inserting_before(user):
                    user.replace_input_with(leaving, traced.graph.call_method("clone", (leaving,)))
    traced.recompile()
    _keep_unused(net, traced)
    return traced


def gradient_gated(
    net: nn.Module,
    *,
    limit: float | AdaptiveLimit | Literal["adaptive"] = 1.0,
    bias_limit: float | None = None,
    mode: GateMode = "normalize",
    floor: float = FLOOR_SHARE,
    layers: str | Sequence[str] = ("*",),
    chunk: int | None = None,
    isolation: Literal["auto", "graph", "vmap"] = "auto",
    select: Select = None,
    joint: Joint = None,
    checkpoint: str | Sequence[str] = (),
) -> fx.GraphModule | Isolated:
    """Puts a network's trainable parameters behind gradient gates, which cap their per-sample gradients.

    Any network will do. Where all of it has rules, its linear layers, convolutions and convex potentials are gated, and
    the rest is bounded as ever (``isolation="graph"``). Where a part has none, such as attention, normalisation or a
    recurrent layer, all of it runs sample by sample, under ``torch.func.vmap``, and each trainable parameter is behind
    gates (:class:`clipless_dp.isolation.Isolated`); nothing else is claimed of it then, no Lipschitz constant either.

    Nothing that flows is changed: activations and cotangents are the network's own, so no layer's gradient is biased
    by another's gate. Only each sample's share of the gated parameter's own gradient is scaled. The layer's
    sensitivity is then its caps, whatever weights and neighbours are, and no certificate is computed for it.

    Linear layers on vectors cost two norms. Convolutions and linear layers at several positions form the samples'
    gradients of their weight, in chunks of bounded memory, in place of their sum.

    Args:
        net: the network; its parameters are shared with the result, under the same names. Call again with other
            ``layers`` for other caps, and combine with :func:`gated` as you like.
        limit: cap ``c`` of each weight's per-sample gradient. An :class:`clipless_dp.AdaptiveLimit`, or ``"adaptive"``
            for one by default: caps that follow a private quantile of the norms.
        bias_limit: cap of each bias's; by default the same. Of caps that adapt, the first one.
        mode: ``"clip"``: ``G·min(1, c/‖G‖)``; ``"normalize"``: ``G·c/max(‖G‖, floor·c)``, so that samples which the
            network already fits still contribute.
        floor: for ``"normalize"``, the share of the cap below which a gradient is scaled by ``1/floor`` only: what
            is nearly zero is mostly rounding, which differs from batch to batch.
        layers: ``fnmatch`` patterns of the paths of the layers to gate, or a single one; other parametrised layers are
            left alone.
        chunk: samples whose gradients of one weight exist at once; by default as many as fit into a few megabytes.
        isolation: what keeps samples apart: ``"graph"``, the traced graph, each part of which has a rule; ``"vmap"``;
            ``"auto"``: the graph where it can be had.
        select: which of its outputs is the network's, where it returns several: a key, an index, or a function of what
            it returns for a batch of one sample. By default ``logits``, where there are some.
        joint: ``"layer"``: the cap is for the gradients of a weight and of the bias that it is used with, together;
            ``"network"``: for all gradients of a sample, so that the network's ``Δ`` is the cap: that of per-sample
            clipping (Abadi et al. 2016). It needs samples run one by one, which ``"auto"`` does then, and memory for
            what comes back to each layer. ``None``: for each parameter by itself, ``Δ`` is ``c·√(their number)``.
        checkpoint: ``fnmatch`` patterns of the paths of modules, or a single one, whose activations are let go and
            computed again on the way back (Chen et al. 2016), such as the blocks of a transformer. It needs samples run
            one by one, which ``"auto"`` does then, and changes no gradient and no bound.

    Returns:
        A network to be wrapped by ``DPLipModel``: traced, with the gated layers in place, or isolated.

    Raises:
        UnsupportedModuleError: ``isolation`` is ``"graph"`` and the network cannot be traced; or a part of it keeps
            statistics of batches, or hooks on backward passes.
        ConfigurationError: a pattern matches no linear layer or convolution (under ``vmap``: no parameter, or leaves
            out a trainable one), one of ``checkpoint`` no module, or a value is out of range.

    Guarantee:
        Each sample's gradient of a gated weight has norm at most ``limit``, up to rounding that the rule includes,
        and that of a gated bias at most ``bias_limit``; samples whose gradient is not finite contribute zero. A
        layer that is used twice has both caps.
    """
    _refuse_other_than_modules(net)
    choice("isolation", isolation, "auto", "graph", "vmap")
    choice("mode", mode, "clip", "normalize")
    joint = None if joint is None else choice("joint", joint, "layer", "network")
    limit, floor = _checked_limit(limit), cap("floor", floor)
    bias_limit = None if bias_limit is None else cap("bias_limit", bias_limit)
    layers = patterns("layers", layers)
    checkpoint = patterns("checkpoint", checkpoint)
    chunk = None if chunk is None else whole("chunk", chunk)
    if isinstance(select, bool) or not (select is None or isinstance(select, (str, int)) or callable(select)):
        raise ConfigurationError(f"select must be a key, an index, a function or None, got {shown(select)}")
    gates: dict[str, Any] = {"limit": limit, "bias_limit": bias_limit, "mode": mode, "floor": floor}
    if isinstance(net, Isolated):
        if joint not in (None, net.joint):
            raise ConfigurationError(f"the network was isolated with joint={net.joint!r}, which stays: got {joint!r}")
        if checkpoint not in ((), net.checkpoint):
            raise ConfigurationError(f"the network was isolated with checkpoint={net.checkpoint}, which stays")
        net.set_gates(**gates, layers=layers)
        return net
    apart = "joint='network'" if joint == "network" else "checkpoint" if checkpoint else ""
    if apart and isolation == "graph":
        raise ConfigurationError(f"{apart} needs samples run one by one: isolation='vmap', or 'auto'")
    if isolation == "vmap" or (isolation == "auto" and (apart or select is not None or not _has_rules(net))):
        return _isolated(net, {**gates, "joint": joint, "checkpoint": checkpoint}, layers, select)
    return _traced(net, {**gates, "chunk": chunk, "joint": joint}, layers)


def _traced(net: nn.Module, gates: dict[str, Any], layers: Sequence[str]) -> fx.GraphModule:
    if is_leaf(net):
        raise ConfigurationError(f"net is a single {type(net).__name__}: put it into nn.Sequential first")
    traced = symbolic_trace(net)
    candidates = {
        str(node.target): traced.get_submodule(str(node.target))
        for node in traced.graph.nodes
        if node.op == "call_module" and can_be_gradient_gated(traced.get_submodule(str(node.target)))
    }
    for pattern in layers:
        if not any(fnmatchcase(path, pattern) for path in candidates):
            raise ConfigurationError(f"no linear layer or convolution matches {pattern!r}; there are {[*candidates]}")
    _keep_unused(net, traced)
    for path, layer in candidates.items():
        if any(fnmatchcase(path, pattern) for pattern in layers):
            gate = gradient_gated_layer(layer, **gates)
            for place, module in list(traced.named_modules(remove_duplicate=False)):
                if module is layer:
                    traced.set_submodule(place, gate)
    return traced


def _checked_limit(limit: object) -> float | AdaptiveLimit:
    if isinstance(limit, AdaptiveLimit):
        return limit
    return AdaptiveLimit() if isinstance(limit, str) and limit == "adaptive" else cap("limit", limit)


def _refuse_other_than_modules(net: object) -> None:
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"net must be a torch.nn.Module, got {shown(net)}")


def _has_rules(net: nn.Module) -> bool:
    """Whether each part of a network has a rule, or might have one: what is a single layer is not traced."""
    if any(isinstance(part, nn.Conv3d) for part in net.modules()):
        # They have a rule and no gates of their own: sample by sample their gradients are capped.
        return False
    if is_leaf(net):
        return find_rule(net) is not None
    try:
        return not any(True for _ in without_rule(symbolic_trace(net)))
    except UnsupportedModuleError:
        return False


def _isolated(net: nn.Module, gates: dict[str, Any], layers: Sequence[str], select: Select) -> Isolated:
    found = Isolated(net, select=select, **gates)
    if tuple(layers) != ("*",):
        gates = {name: value for name, value in gates.items() if name not in ("joint", "checkpoint")}
        found.set_gates(**gates, layers=layers)
        named = [(name, value) for name, value in net.named_parameters(remove_duplicate=False) if value.requires_grad]
        meant = {id(value) for name, value in named if any(is_named(name, pattern) for pattern in layers)}
        left = [name for name, value in named if id(value) not in meant]
        if left:
            raise ConfigurationError(
                f"{left[0]!r} and {len(left) - 1} other trainable parameter(s) match none of {list(layers)}: the "
                "network runs sample by sample, where each needs a gate. Freeze them by requires_grad_(False), or "
                "leave layers out and set other caps by calling gradient_gated again"
            )
    return found


def _keep_unused(net: nn.Module, traced: fx.GraphModule) -> None:
    """Brings over what the graph does not call, so that the state dict keeps every name."""
    for path, module in net.named_modules(remove_duplicate=False):
        if path and not list(module.children()) and not _has(traced, path):
            traced.add_submodule(path, module)
    saved = net.state_dict().keys()
    for path, module in net.named_modules(remove_duplicate=False):
        held = [*module._parameters.items(), *module._buffers.items()]
        if not held:
            continue
        if not _has(traced, path):
            traced.add_submodule(path, nn.Module())
        owner = traced.get_submodule(path)
        for name, tensor in held:
            if isinstance(tensor, nn.Parameter) and name not in owner._parameters:
                owner.register_parameter(name, tensor)
            elif tensor is not None and name not in owner._buffers and name not in owner._parameters:
                owner.register_buffer(name, tensor, persistent=f"{path}.{name}".lstrip(".") in saved)


def _has(net: nn.Module, path: str) -> bool:
    try:
        net.get_submodule(path)
    except AttributeError:
        return False
    return True
