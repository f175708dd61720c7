"""Networks that are trained by two forward passes: errors come back as modulated inputs, not by back-propagation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from clipless_dp.arguments import cap, positive
from clipless_dp.errors import ConfigurationError, Unsupported, UnsupportedModuleError
from clipless_dp.gates.arithmetic import per_sample, sample_norms, zeroed_rows
from clipless_dp.gates.gradient import bias_gradient, vector_weight_gradient
from clipless_dp.gates.plain import plain_form
from clipless_dp.layers.absolute import AbsoluteValue
from clipless_dp.layers.sorting import FullSort, GroupSort, MaxMin
from clipless_dp.modules import Unscripted

ACTIVATIONS = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Tanh,
    nn.Sigmoid,
    AbsoluteValue,
    GroupSort,
    MaxMin,
    FullSort,
    nn.Dropout,
)
"""What may stand between linear layers: without parameters, of the shape that comes in, Lipschitz everywhere."""


Masks = Sequence[Sequence[Tensor]]
"""Of each block, what each of its dropout layers multiplies by."""


class Block(NamedTuple):
    """A linear layer and what follows it, up to the next.

    Attributes:
        name: of the linear layer in the network.
        linear: the layer.
        rest: what follows.
    """

    name: str
    linear: nn.Linear
    rest: list[nn.Module]


class _ForwardOnly(Unscripted, nn.Module):
    """What both rules share.

    Args:
        net: ``nn.Sequential`` of linear layers, on vectors, with activations between them and ``nn.Dropout``; the last
            one is linear. ``nn.Flatten`` may come first. It is shared with the result.
        limit: ``c``: each sample's gradient of a weight is clipped to this norm, whatever the weights are; ``None``:
            its bound follows from certified norms.
        bias_limit: the same of biases; by default ``limit``.

    Raises:
        UnsupportedModuleError: names each layer that is none of these.
        ConfigurationError: a value is out of range, or two layers share parameters.
    """

    def __init__(self, net: nn.Sequential, limit: float | None = None, bias_limit: float | None = None) -> None:
        super().__init__()
        if bias_limit is not None and limit is None:
            raise ConfigurationError("bias_limit goes with limit, which clips the gradients of weights")
        self.limit = None if limit is None else cap("limit", limit)
        self.bias_limit = self.limit if bias_limit is None else cap("bias_limit", bias_limit)
        _refuse_others(net)
        self.net = net

    @property
    def blocks(self) -> list[Block]:
        """The linear layers, in order, each with what follows it."""
        found: list[Block] = []
        for name, layer in _layers_of(self.net):
            if isinstance(layer, nn.Linear):
                found.append(Block(name, layer, []))
            elif found:
                found[-1].rest.append(layer)
        return found

    @abstractmethod
    def modulation(self, errors: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """``Fe``: what the error at the output moves the input by, ``(B, classes)`` to ``(B, entries)``."""

    modulates_presynaptic = False

    def forward(self, values: Tensor) -> Tensor:
        """The network's output; its backward pass is a forward one."""
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(values):
            raise ConfigurationError(
                f"{type(self).__name__} runs as it is: it is neither compiled nor run by torch.func, as its backward "
                "pass is another forward one. Leave out compile, and isolation='vmap'"
            )
        blocks = self.blocks
        masks = [
            [_mask(layer, len(values), block.linear) for layer in block.rest if isinstance(layer, nn.Dropout)]
            for block in blocks
        ]
        parameters = [part for block in blocks for part in (block.linear.weight, block.linear.bias)]
        if not torch.is_grad_enabled():
            return _passed(blocks, parameters, masks, values.flatten(1))
        made: Tensor = _TwoPasses.apply(self, masks, values.flatten(1), *parameters)  # type: ignore[no-untyped-call]
        return made

    def extra_repr(self) -> str:
        """The caps."""
        return "" if self.limit is None else f"limit={self.limit:g}, bias_limit={self.bias_limit:g}"


class Foton(_ForwardOnly):
    """An orthogonal network trained without a backward pass (FOTON).

    The first pass computes ``h_l = σ_l(W_l h_{l-1} + b_l)`` from ``h_0 = x``. The error ``e`` at the output, the loss's
    gradient there, moves the input to ``x̃ = x - W_1ᵀ⋯W_Lᵀ e``, from which a second pass, with the same dropout masks,
    computes ``h̃_l``. Gradients are ``(h_l - h̃_l) h_{l-1}ᵀ`` of ``W_l``, and ``e h_{L-1}ᵀ`` of the last one; of biases
    ``h_l - h̃_l`` and ``e``. (Caillon, Fagnou, Delattre and Allauzen 2025, with the matrix ``F = W_1ᵀ⋯W_Lᵀ`` of each
    step's weights: it is applied to ``e`` and not formed.) What is passed on are the differences ``h_l - h̃_l``.

    On linear networks of square orthogonal weights it is back-propagation. On others it is a rule of its own, which
    :class:`clipless_dp.constraints.Orthogonal` suits: no accuracy route, but one whose errors go nowhere back.

    Wrap it by :class:`clipless_dp.DPLipModel` as any network: each draw is one pass and one charged step. Evaluation,
    export and attacks see the network itself, and its true slopes.

    Guarantee:
        ``‖h_l - h̃_l‖ ≤ L_l‖Fe‖``, ``L_l`` the product of the layers' Lipschitz constants up to there: of weights
        ``Δ = L_l φG·X_{l-1}`` and of biases ``L_l φG``, ``φ = Π‖W_l‖``; of the last layer ``GX_{L-1}`` and ``G``. With
        ``limit``, no more than that. Proof: docs/bounds.md, "Forward-only training".

    Shape:
        ``(B, ...)`` to ``(B, classes)``.
    """

    def modulation(self, errors: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """``W_1ᵀ⋯W_Lᵀ e``."""
        for weight in reversed(weights):
            errors = errors @ weight
        return errors


class Pepita(_ForwardOnly):
    """A network trained by two forward passes, the second with the error added to the input (PEPITA).

    As :class:`Foton` with a fixed random ``F`` and gradients ``(h_l - h̃_l) h̃_{l-1}ᵀ``, of the last layer ``e h̃_{L-1}ᵀ``
    (Dellaferrera and Kreiman, "Error-driven input modulation", ICML 2022). Its gradients are bounded by ``limit``
    alone.

    Args:
        net: as there; the sizes of its first and last layer are those of ``F``.
        limit: as there, needed.
        bias_limit: as there.
        scale: the norm of ``F``, whose columns (its rows, if these are fewer) are orthonormal up to it.

    Attributes:
        feedback: ``F``, ``(entries, classes)``, drawn from torch's generator; it is not trained.

    Shape:
        ``(B, ...)`` to ``(B, classes)``.
    """

    modulates_presynaptic = True

    def __init__(
        self, net: nn.Sequential, limit: float, bias_limit: float | None = None, *, scale: float = 1.0
    ) -> None:
        super().__init__(net, cap("limit", limit), bias_limit)
        first, last = self.blocks[0].linear, self.blocks[-1].linear
        drawn = torch.empty(first.in_features, last.out_features)
        nn.init.orthogonal_(drawn, positive("scale", scale))
        self.feedback = nn.Parameter(drawn.to(first.weight), requires_grad=False)

    def modulation(self, errors: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """``Fe``."""
        return errors @ self.feedback.detach().mT


class _TwoPasses(torch.autograd.Function):
    """One pass forth; on the way back another, and a sum of gradients, capped one by one, for each parameter."""

    @staticmethod
    def forward(ctx: Any, module: _ForwardOnly, masks: Masks, values: Tensor, *parameters: Any) -> Tensor:
        ctx.module, ctx.masks = module, masks
        met, sums = values, []
        for place, block in enumerate(module.blocks):
            sums.append(functional.linear(met, parameters[2 * place], parameters[2 * place + 1]))
            met = _behind(block, masks[place], sums[-1])
        ctx.save_for_backward(values, *parameters, *sums[:-1])
        return met

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        (errors,) = cotangents
        module, masks, blocks = ctx.module, ctx.masks, ctx.module.blocks
        values, *saved = ctx.saved_tensors
        parameters, sums = saved[: 2 * len(blocks)], saved[2 * len(blocks) :]
        passed = _back_propagated(blocks, parameters, masks, values, errors) if ctx.needs_input_grad[2] else None
        met, moved = values, module.modulation(errors, parameters[::2])
        gradients: list[Tensor | None] = []
        for place, block in enumerate(blocks):
            entered = met - moved if module.modulates_presynaptic else met
            if place == len(blocks) - 1:
                arriving = errors
            else:
                moved = moved @ parameters[2 * place].mT
                met, moved = _moved(block, masks[place], sums[place], moved)
                arriving = moved
            asked, asked_bias = ctx.needs_input_grad[3 + 2 * place : 5 + 2 * place]
            gradients.append(_weight_gradient(entered, arriving, module.limit) if asked else None)
            gradients.append(_bias_gradient(arriving, module.bias_limit) if asked_bias else None)
        return None, None, passed, *gradients


def _moved(block: Block, masks: Sequence[Tensor], values: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """What a block's activations make of values, and by how much it falls where the values fall by ``moved``.

    A difference of two nearly equal numbers is rounding, which does not shrink with ``moved`` as the bound does. So it
    is shortened to what an activation can stretch ``moved`` by: its Lipschitz constant.
    """
    drawn = iter(masks)
    for layer in block.rest:
        if isinstance(layer, nn.Dropout):
            mask = next(drawn)
            values, moved = values * mask, moved * mask
            continue
        ahead = _applied(layer, values)
        fallen = ahead - _applied(layer, values - moved)
        most = slope_of(layer) * sample_norms(moved)
        fallen = fallen * per_sample((most / sample_norms(fallen).clamp(min=1e-30)).clamp(max=1.0), fallen)
        values, moved = ahead, fallen
    return values, moved


def slope_of(layer: nn.Module) -> float:
    """The Lipschitz constant of an activation."""
    return max(1.0, abs(layer.negative_slope)) if isinstance(layer, nn.LeakyReLU) else 1.0


def _applied(layer: nn.Module, values: Tensor) -> Tensor:
    # What works in place would change what was saved.
    made: Tensor = layer(values.clone() if getattr(layer, "inplace", False) else values)
    return made


def _behind(block: Block, masks: Sequence[Tensor], values: Tensor) -> Tensor:
    drawn = iter(masks)
    for layer in block.rest:
        values = values * next(drawn) if isinstance(layer, nn.Dropout) else _applied(layer, values)
    return values


def _weight_gradient(met: Tensor, arriving: Tensor, limit: float | None) -> Tensor:
    if limit is None:
        return arriving.mT @ met
    arrived, sizes = zeroed_rows(arriving)
    values, lengths = zeroed_rows(met)
    return vector_weight_gradient(values, arrived, lengths, sizes, limit, limit)


def _bias_gradient(arriving: Tensor, limit: float | None) -> Tensor:
    return arriving.sum(0) if limit is None else bias_gradient(*zeroed_rows(arriving), limit, limit)


def _passed(blocks: Sequence[Block], parameters: Sequence[Any], masks: Masks, values: Tensor) -> Tensor:
    """The network's output."""
    for place, block in enumerate(blocks):
        values = functional.linear(values, parameters[2 * place], parameters[2 * place + 1])
        values = _behind(block, masks[place], values)
    return values


def _back_propagated(
    blocks: Sequence[Block], parameters: Sequence[Any], masks: Masks, values: Tensor, errors: Tensor
) -> Tensor:
    """What goes on to what is before: the network's true slope, for attacks and for layers that are trained by it."""
    with torch.enable_grad():
        inputs = values.detach().requires_grad_()
        outputs = _passed(blocks, [None if p is None else p.detach() for p in parameters], masks, inputs)
        (found,) = torch.autograd.grad(outputs, inputs, errors)
    return found


def _mask(layer: nn.Dropout, rows: int, before: nn.Linear) -> Tensor:
    """What dropout multiplies by, in both passes, drawn from torch's generator, which follows the model's source."""
    if not layer.training or layer.p == 0.0:
        return before.weight.new_ones(())
    kept = torch.rand(rows, before.out_features, device=before.weight.device) >= layer.p
    return kept.to(before.weight.dtype) / (1.0 - layer.p)


def _refuse_others(net: nn.Module) -> None:
    if not isinstance(net, nn.Sequential):
        raise ConfigurationError(
            f"forward-only rules are of an nn.Sequential of nn.Linear and activations, got a {type(net).__name__}: "
            "which layer's input an error modulates is known of a sequence alone"
        )
    parts: list[Unsupported] = []
    begun = False
    layers = _layers_of(net)
    for name, layer in layers:
        if type(layer) is nn.Linear:
            begun = True
        elif type(layer) is nn.Flatten and not begun and (layer.start_dim, layer.end_dim) == (1, -1):
            continue
        elif type(layer) not in ACTIVATIONS or not begun:
            what = ", ".join(kind.__name__ for kind in ACTIVATIONS)
            remedy = f"forward-only rules know nn.Linear on vectors, behind it {what}, and one nn.Flatten in front"
            parts.append(Unsupported(name, type(layer).__name__, remedy))
        elif getattr(layer, "p", 0.0) == 1.0 and type(layer) is nn.Dropout:
            parts.append(Unsupported(name, "Dropout", "p=1 leaves nothing: use a smaller rate"))
    if parts:
        raise UnsupportedModuleError(parts)
    if not layers or type(layers[-1][1]) is not nn.Linear:
        raise ConfigurationError("the last layer must be nn.Linear, whose error is the loss's own gradient")
    linear = [layer for _, layer in layers if type(layer) is nn.Linear]
    held = [id(parameter) for layer in linear for parameter in layer.parameters()]
    if len(held) != len(set(held)):
        raise ConfigurationError("two linear layers share parameters, of which a forward-only rule has one error each")


def _layers_of(net: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """Its layers by name, one that stands at two places at both."""
    return [(name, layer) for name, layer in net._modules.items() if layer is not None]


@plain_form(Foton)
@plain_form(Pepita)
def _plain(module: _ForwardOnly) -> nn.Module:
    return nn.Sequential(nn.Flatten(), module.net)
