"""Which function of torch runs as which gated one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.errors import InputError
from clipless_dp.gates.steps import convex_step
from clipless_dp.isolation.dispatch import applied
from clipless_dp.isolation.functions import (
    Attention,
    GatedConvolution,
    GatedEmbedding,
    GatedLinear,
    GatedStep,
)
from clipless_dp.isolation.gating import Gating, handles
from clipless_dp.isolation.normalisations import GatedGroupNorm, GatedLayerNorm


def _differs(value: Any) -> bool:
    """Whether a weight is not the same for all samples."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


@handles(cast(Any, Tensor.grad).__get__)
def gradient(run: Gating, parameter: Tensor) -> None:
    """None: what stands for a parameter in a pass has no gradient yet. Profilers that record stacks ask each layer."""


@handles(functional.linear)
def linear(run: Gating, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Any:
    """``x Wᵀ + b``, or ``x W + b``."""
    if input.dim() == 0 or weight.dim() != 2 or _differs(weight) or _differs(bias):
        return NotImplemented
    input = run.expanded(input)
    of_weight, of_bias = run.name_of(weight), run.name_of(bias)
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    if bias is not None and bias.shape != (outputs,):
        # Broadcast, it would be summed once more behind its cap.
        return NotImplemented
    positions = math.prod(input.shape[:-1])
    gates = run.gates(
        "linear", (of_weight, positions * max(inputs, outputs)), (of_bias, positions * outputs), (transposed,)
    )
    counters = run.counter(of_weight), run.counter(of_bias)
    return applied(GatedLinear, run.sample, input, run.source(weight), run.source(bias), gates, *counters)


@handles(torch.addmm, Tensor.addmm)
def addmm(run: Gating, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Any:
    """``b + x W``, as some linear layers write it."""
    return NotImplemented if scales else linear(run, mat1, mat2, input, transposed=True)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(run: Gating, input: Tensor, other: Tensor, **options: Any) -> Any:
    """``x W``."""
    if options or run.name_of(other) is None:
        return NotImplemented
    return linear(run, input, other, transposed=True)


@handles(torch.mm, Tensor.mm)
def mm(run: Gating, input: Tensor, mat2: Tensor, **options: Any) -> Any:
    """``x W``."""
    return matmul(run, input, mat2, **options)


@handles(functional.embedding, always=True)
def embedding(
    run: Gating,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of a table."""
    if _differs(input):
        run.looked_up(input, weight.shape[0])
    name = run.name_of(weight)
    told = run.told_of(weight)
    if (max_norm is not None and _differs(input)) or (name is not None and (scale_grad_by_freq or sparse or max_norm)):
        raise InputError(
            f"the table {told!r} is read with max_norm, scale_grad_by_freq or sparse gradients, which let samples see "
            "each other: leave these out"
        )
    if name is None:
        with _told_of(told, weight):
            return functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    width = weight.shape[1]
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else weight.shape[0] + padding_idx
    gates = run.gates("embedding", (name, input.numel() * width), settings=(padding,))
    with _told_of(name, weight):
        return applied(GatedEmbedding, run.sample, input, run.source(weight), gates, run.counter(name))


@contextmanager
def _told_of(table: str, weight: Tensor) -> Iterator[None]:
    """Tokens that a table does not know are refused by its name, where the processor notices them anyway."""
    try:
        yield
    except IndexError as error:
        raise InputError(
            f"a sample holds a number that the table {table} does not know, which has {weight.shape[0]} rows: tokens "
            f"must lie in [0, {weight.shape[0]}). What pads a sample needs a token of its own, and a mask"
        ) from error


@handles(functional.layer_norm)
def layer_norm(
    run: Gating,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Layer normalisation with an affine map."""
    if _differs(weight) or _differs(bias):
        return NotImplemented
    input = run.expanded(input)
    entries = input.numel()
    names = run.name_of(weight), run.name_of(bias)
    gates = run.gates("norm", (names[0], entries), (names[1], entries), (tuple(normalized_shape), eps))
    counters = map(run.counter, names)
    return applied(GatedLayerNorm, run.sample, input, run.source(weight), run.source(bias), gates, *counters)


@handles(functional.group_norm)
def group_norm(
    run: Gating,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Group normalisation and an affine map; of several maps in one sample, a copy of it."""
    if weight is None and bias is None:
        return NotImplemented
    if input.dim() > 1 and input.shape[0] == 1 and not (_differs(weight) or _differs(bias)):
        input = run.expanded(input)
        names = run.name_of(weight), run.name_of(bias)
        gates = run.gates("norm", (names[0], input.numel()), (names[1], input.numel()), (num_groups, eps))
        sources = run.source(weight), run.source(bias)
        made = applied(GatedGroupNorm, run.sample, input.squeeze(0), *sources, gates, *map(run.counter, names))
        return made.unsqueeze(0)
    shape = (1, -1, *[1] * (input.dim() - 2))
    with run:
        # Each operation as by itself.
        values = functional.group_norm(input, num_groups, None, None, eps)
        if weight is not None:
            values = values * weight.reshape(shape)
        return values if bias is None else values + bias.reshape(shape)


def _convolution(
    run: Gating,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    input = run.expanded(input)
    axes = weight.dim() - 2
    if _differs(weight) or _differs(bias) or input.dim() not in (axes + 1, axes + 2):
        return NotImplemented
    alone = input.dim() == axes + 1
    if not alone and input.shape[0] != 1:
        return NotImplemented
    values = input if alone else input.squeeze(0)

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))

    dilation = each(dilation)
    if isinstance(padding, str):
        spans = [step * (taps - 1) for step, taps in zip(dilation, weight.shape[2:], strict=True)]
        if padding == "same":
            values = functional.pad(
                values, [side for span in reversed(spans) for side in (span // 2, span - span // 2)]
            )
        padding = 0
    sizes = [
        (size + 2 * side - step * (taps - 1) - 1) // move + 1
        for size, side, step, taps, move in zip(
            values.shape[1:], each(padding), dilation, weight.shape[2:], each(stride), strict=True
        )
    ]
    positions = math.prod(sizes)
    met = positions * max(weight.shape[0], math.prod(weight.shape[1:]) * groups)
    names = run.name_of(weight), run.name_of(bias)
    gates = run.gates(
        "convolution",
        (names[0], met),
        (names[1], positions * weight.shape[0]),
        (each(stride), each(padding), dilation, groups),
    )
    counters = map(run.counter, names)
    made = applied(GatedConvolution, run.sample, values, run.source(weight), run.source(bias), gates, *counters)
    return made if alone else made.unsqueeze(0)


handles(torch.conv1d, torch.conv2d, torch.conv3d)(_convolution)


@handles(convex_step, always=True)
def step(run: Gating, values: Tensor, weight: Tensor, bias: Tensor | None, windows: tuple[int, int] | None) -> Any:
    """``x - 2Wᵀ relu(Wx + b)``, at several positions or on one map."""
    if _differs(weight) or _differs(bias):
        return NotImplemented
    values = run.expanded(values)
    alone = windows is None or values.dim() == 3
    if not alone and values.shape[0] != 1:
        return NotImplemented
    of_weight, of_bias = run.name_of(weight), run.name_of(bias)
    sizes = values.shape[:-1] if windows is None else [size + 2 * windows[0] for size in values.shape[-2:]]
    positions = math.prod(sizes)
    # The weight meets what enters and what comes back.
    met = 2 * positions * max(weight.shape[0], math.prod(weight.shape[1:]))
    gates = run.gates("step", (of_weight, met), (of_bias, positions * weight.shape[0]), (windows,))
    counters = run.counter(of_weight), run.counter(of_bias)
    operands = run.source(weight), run.source(bias), gates, *counters
    made = applied(GatedStep, run.sample, values if alone else values.squeeze(0), *operands)
    return made if alone else made.unsqueeze(0)


@handles(functional.scaled_dot_product_attention, always=True)
def attention(
    run: Gating,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of one sample."""
    if query.dim() < 3:
        return NotImplemented
    query, key, value, attn_mask = (run.expanded(one) for one in (query, key, value, attn_mask))
    settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        settings["enable_gqa"] = True
    return applied(Attention, run.sample, query, key, value, attn_mask, tuple(settings.items()))


def _looked_into(function: Any) -> Callable[..., Any]:
    """A function of torch written in Python, which asks no mode for leave, so that its parts are seen one by one."""
    asks = {"has_torch_function": lambda *_: False}
    told = FunctionType(function.__code__, {**function.__globals__, **asks}, function.__name__, function.__defaults__)
    told.__kwdefaults__ = function.__kwdefaults__
    return cast("Callable[..., Any]", told)


_attend = _looked_into(functional.multi_head_attention_forward)


@handles(functional.multi_head_attention_forward, always=True)
def multi_head_attention(run: Gating, *args: Any, **kwargs: Any) -> Any:
    """Projections and attention of ``nn.MultiheadAttention``, each as by itself."""
    with run:
        return _attend(*args, **kwargs)


@handles(torch._weight_norm)
def weight_norm(run: Gating, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """``g·v/‖v‖``, of which torch's own kernel has no rule for ``vmap``."""
    direction = run.expanded(v)
    axes = [axis for axis in range(v.dim()) if axis != dim]
    return direction * (run.expanded(g) / torch.linalg.vector_norm(direction, dim=axes, keepdim=True))


@handles(functional.bilinear)
def bilinear(run: Gating, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``x₁ W x₂ + b``, of which torch's own kernel has no rule for ``vmap``."""
    made = torch.einsum("...i,oij,...j->...o", run.expanded(input1), run.expanded(weight), run.expanded(input2))
    return made if bias is None else made + run.expanded(bias)
