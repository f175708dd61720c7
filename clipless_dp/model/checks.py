"""What a wrapped model asks of its arguments, and of what it is called with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from clipless_dp.arguments import cap, flag, shown, whole
from clipless_dp.bounds import coordinates
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError, InputError, LossBoundError, PrivacyError
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.isolation import Isolated
from clipless_dp.layers.monotone import BoxProjection
from clipless_dp.losses import Loss
from clipless_dp.model.passes import is_unwitnessed
from clipless_dp.packing import Packing
from clipless_dp.precision import refuse_autocast

_LARGEST_SAMPLE = 1 << 40
"""Numbers of one sample: terabytes."""


def refuse_arguments(net: object, input_norm: object, loss: object, row_invariant: object) -> None:
    """Refuses arguments that are no network that can be trained here, no cap, no loss with a bound or no choice."""
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if not isinstance(loss, Loss):
        raise LossBoundError(
            f"{loss!r} does not state the bound of its gradient; use one of clipless_dp.losses, or "
            "losses.BoundedLoss(function, bound=...) around a per-sample function"
        )
    if input_norm is not None:
        cap("input_norm", input_norm)
    if row_invariant is not None:
        flag("row_invariant", row_invariant)
    placement.refuse_averages(net)
    placement.refuse_shards(net)
    _refuse_valueless(net)


def refuse_norm(input_norm: float | None, traced: TracedNet, packing: Packing | None) -> None:
    """Refuses a cap where the network reads tokens or several inputs, and none where bounds rest on it."""
    numbers = traced.reads.is_floating_point
    if coordinates.has_lift(traced):
        coordinates.refuse(traced)
    if input_norm is None and numbers and not traced.isolated and not coordinates.boxes(traced):
        leaves = [traced.leaf(node) for node in traced.tensor_nodes() if node.op == "call_module"]
        late = any(isinstance(leaf, BoxProjection) for leaf in leaves)
        raise ConfigurationError(
            "input_norm must be given: a finite number, the cap of a sample's norm"
            + ("; or put BoxProjection first, before Flatten and all else that reads the input" if late else "")
        )
    if input_norm is not None and not (numbers and packing is None):
        raise ConfigurationError(
            "input_norm must be None: the network reads tokens, which have no norm, or several inputs at once"
        )


def checked_norm(norm: object) -> object:
    """The norm that a Lipschitz constant is asked for: 2, ``"inf"``, ``(1, inf)`` or ``(inf, inf)``."""
    if isinstance(norm, tuple) and norm == (2, 2):
        return 2
    pair = isinstance(norm, tuple) and norm in {(1, math.inf), (math.inf, math.inf)}
    if not (pair or (isinstance(norm, str) and norm == "inf") or (isinstance(norm, (int, float)) and norm == 2)):
        raise ConfigurationError(f'norm must be 2, "inf", (1, inf) or (inf, inf), got {shown(norm)}')
    return norm


def packing_of(net: nn.Module, shape: object) -> Packing | None:
    """How several inputs lie in a row; ``None`` of one."""
    several = isinstance(shape, (tuple, list)) and any(isinstance(entry, (tuple, list, Tensor)) for entry in shape)
    if not (several or isinstance(shape, Mapping)):
        return None
    if not isinstance(net, Isolated):
        raise ConfigurationError(
            "several inputs need a network that runs sample by sample: gradient_gated(net, isolation='vmap')"
        )
    packing = Packing.of(shape)
    net.take(packing)
    return packing


def checked_bound(loss: Loss, shape: tuple[int, ...]) -> float:
    """The bound that a loss states for the gradient at an output of this shape."""
    bound: Any = loss.gradient_bound(shape)
    if not (isinstance(bound, Real) and math.isfinite(bound) and float(bound) >= 1e-8):
        raise LossBoundError(
            f"{loss!r} states the gradient bound {bound!r}; gradient_bound must return a finite number, at least 1e-8"
        )
    return float(bound)


def checked_bound_l1(loss: Loss, shape: tuple[int, ...], bound: float) -> float | None:
    """The bound of the gradient's ℓ1 norm that a loss states, where it says more than the Euclidean one."""
    stated: Any = loss.gradient_bound_l1(shape)
    if not (isinstance(stated, Real) and float(stated) >= 1e-8):
        raise LossBoundError(
            f"{loss!r} states the ℓ1 gradient bound {stated!r}; gradient_bound_l1 must return a number, at least 1e-8, "
            "or infinity where none is known"
        )
    return float(stated) if float(stated) < math.sqrt(math.prod(shape)) * bound * (1.0 - 1e-12) else None


def checked_shape(shape: object) -> tuple[int, ...]:
    """The shape of one sample."""
    try:
        if not isinstance(shape, (tuple, list)):
            raise ConfigurationError("no tuple")
        sizes = tuple(whole("a size", size) for size in shape)
    except ConfigurationError:
        raise ConfigurationError(
            "input_shape must be a tuple of positive integers, the shape of one sample without the batch axis, such as "
            f"(3, 32, 32) or (8,), got {shown(shape)}"
        ) from None
    if math.prod(sizes) > _LARGEST_SAMPLE:
        raise ConfigurationError(
            f"input_shape must be the shape of one sample, which fits into memory, got {shown(shape)}"
        )
    return sizes


def _refuse_valueless(net: nn.Module) -> None:
    """Refuses parameters without values to certify, or that autograd cannot follow, and nested tensors."""
    for name, held in (*net.named_parameters(), *net.named_buffers()):
        if held.is_nested:
            raise ConfigurationError(
                f"{name!r} is a nested tensor, whose memory cannot be compared: hold its parts in tensors of their "
                "own, or padded ones and their lengths"
            )
    for name, parameter in net.named_parameters():
        if nn.parameter.is_lazy(parameter):
            # Its module is refused by name.
            continue
        if parameter.is_meta:
            raise ConfigurationError(
                f"the parameter {name!r} is on the meta device, without values: give the network memory and weights "
                "first, e.g. net.to_empty(device='cpu') and an initialisation"
            )
        if parameter.is_inference():
            raise ConfigurationError(
                f"the parameter {name!r} was made in torch.inference_mode(), which cannot be trained: build the "
                "network outside of it"
            )
    if torch.is_inference_mode_enabled():
        raise ConfigurationError("wrap the network outside of torch.inference_mode(), in which nothing can be trained")


def check_inputs(
    inputs: Tensor, shape: tuple[int, ...], numbers: bool, device: torch.device, dtype: torch.dtype
) -> None:
    """See :meth:`clipless_dp.DPLipModel.check_inputs`."""
    if not torch.compiler.is_compiling():
        _refuse_transforms(inputs)
    if tuple(inputs.shape[1:]) != shape or inputs.dim() == 0:
        raise InputError(f"expected inputs of shape (batch, {', '.join(map(str, shape))}), got {tuple(inputs.shape)}")
    if inputs.layout != torch.strided:
        raise InputError(f"inputs are {inputs.layout}; make them dense first, with inputs.to_dense()")
    if not numbers:
        if inputs.dtype not in (torch.int32, torch.int64):
            raise InputError(f"tokens are {inputs.dtype}; convert the data set first, with tokens.long()")
        dtype = inputs.dtype
    elif not inputs.is_floating_point():
        raise InputError(f"inputs are {inputs.dtype}; convert the data set first, e.g. images.float() / 255")
    if inputs.dtype != dtype or inputs.device != device:
        raise InputError(f"inputs are {inputs.dtype} on {inputs.device}, the model is {dtype} on {device}")
    refuse_autocast(device)


def _refuse_transforms(inputs: Tensor) -> None:
    """Refuses what runs a model in another way than a pass."""
    if torch._C._is_tracing():
        raise ConfigurationError(
            "torch.jit.trace records one pass of a wrapped model, with its checks as constants: trace "
            "model.export_net(), or use torch.export"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(inputs) and not is_unwitnessed():
        raise ConfigurationError(
            "torch.func (vmap, jvp, grad) cannot run a wrapped model, whose gates are for one pass of a batch: "
            "transform model.net, whose gradients no step releases"
        )
    if inputs.is_inference() and torch.is_grad_enabled():
        raise InputError(
            "inputs were made in torch.inference_mode(), which cannot be trained on: make them outside of it, or "
            "clone() them there"
        )


def refuse_trained_targets() -> NoReturn:
    """Refuses targets that require gradients.

    Raises:
        PrivacyError: always.
    """
    raise PrivacyError(
        "the target that model.loss is given requires gradients (centres that are learned, a teacher, outputs of other "
        "rows): what it would get is a sum over samples that has no bound and gets no noise. Let what is learned be a "
        "part of the network, and detach targets (target.detach()). Nothing was released"
    )


def check_targets(output: Tensor, target: Tensor, mask: Tensor | None) -> None:
    """Refuses a target and a mask that do not fit the output, and autocast."""
    refuse_autocast(output.device)
    if mask is not None and (mask.shape != output.shape[:1] or mask.dtype != torch.bool):
        raise InputError(
            f"mask must be boolean of shape {tuple(output.shape[:1])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if target.shape[:1] != output.shape[:1] or target.device != output.device:
        raise InputError(
            f"target {tuple(target.shape)} on {target.device} does not fit output {tuple(output.shape)} "
            f"on {output.device}"
        )
