"""Operations whose parameters' gradients are gated sample by sample, each with a rule for ``torch.func.vmap``.

Within ``vmap`` an operation sees one sample. Its rule moves the axis of samples to the front and runs it once for all
of them: only so can its backward form each sample's gradient, cap it, and add up. ``sample`` is a value that differs
from sample to sample and is otherwise unused: it lets the rule be asked also where all samples read the same values.
"""

# ruff: noqa: D102 (the methods are those of torch.autograd.Function)

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.errors import PrivacyError
from clipless_dp.gates.arithmetic import sample_norms, scale_factors, zeroed_rows
from clipless_dp.gates.convolutions import Kernel, convolution_weight_gradient
from clipless_dp.gates.gradient import (
    CANCELLED,
    bias_gradient,
    table_gradient,
    token_weight_gradient,
    vector_weight_gradient,
)
from clipless_dp.gates.parts import Part, Rows, Table, Transposed, gated_pair, linear_parts
from clipless_dp.gates.steps import returned, taken
from clipless_dp.isolation.joint import Together


@dataclass(frozen=True)
class Cap:
    """A gradient gate of one parameter: the cap, and the norm below which nothing is scaled further up."""

    limit: float
    least: float


class Sizes:
    """``(B,)``, of what one backward pass has summed up to the gradient of a copy: the roots of the sums of squares."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        self._task = -1

    def add(self, norms: Tensor) -> None:
        """Adds the norms of what is about to be summed."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            # What a backward pass has left that did not come to its end.
            self._squares, self._task = None, task
        squares = norms.square()
        self._squares = squares if self._squares is None else self._squares + squares

    def take(self) -> Tensor | None:
        """Of the backward pass that asks."""
        squares, self._squares = self._squares, None
        return None if squares is None or self._task != torch._C._current_graph_task_id() else squares.sqrt()


@dataclass(frozen=True)
class Affine:
    """The gates of a weight and a bias, and what else an operation is called with.

    Attributes:
        weight: the gate of the weight, or of both.
        bias: the gate of the bias.
        settings: of the operation.
        joint: whether one cap holds for both together.
        names: of both parameters.
        together: where all of a network's gradients are gated together, what waits for that.
        sizes: of a copy, what its gradient is summed up of.
    """

    weight: Cap | None
    bias: Cap | None
    settings: tuple[Any, ...] = ()
    joint: bool = False
    names: tuple[str | None, str | None] = (None, None)
    together: Together | None = None
    sizes: Sizes | None = None

    def by_parts(self, counted: tuple[bool, ...]) -> bool:
        """Whether norms are needed apart from sums, given which gates count."""
        return self.joint or self.together is not None or any(counted)

    def sums(self, parts: tuple[Part | None, Part | None], counted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of weight and bias, and their counts; nothing yet where all are gated together."""
        if self.together is not None:
            for name, part in zip(self.names, parts, strict=True):
                if part is not None and name is not None:
                    self.together.keep(name, part)
            return None, None, None, None
        caps = tuple(None if cap is None else (cap.limit, cap.least) for cap in (self.weight, self.bias))
        weight_counts, bias_counts = (*counted, False, False)[:2]
        gradients, counts = gated_pair(
            parts,
            cast(Any, caps),
            joint=self.joint,
            counted=(weight_counts, bias_counts),
            same=self.names[0] == self.names[1],
        )
        return *gradients, *counts


def summed(rows: Tensor, cap: Cap, sizes: Tensor | None = None) -> Tensor:
    """The gated sum of the samples' own gradients, ``(B, n)`` to ``(n,)``.

    Args:
        rows: the gradients.
        cap: the gate.
        sizes: ``(B,)``, of what was summed up to these: a sum that is a small part of it is mostly rounding.
    """
    rows, norms = zeroed_rows(rows)
    if sizes is not None:
        norms = torch.maximum(norms, CANCELLED * torch.where(sizes.isfinite(), sizes, 0.0))
    return scale_factors(norms, cap=cap.limit, floor=cap.least).to(rows.dtype) @ rows


def token_gradients(
    gates: Affine, met: Tensor | None, arrived: Tensor, sizes: Tensor, *, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a weight that meets several vectors of a sample, and of its bias.

    Args:
        gates: theirs.
        met: ``(B, T, K)``; ``None`` where the weight gets no gradient.
        arrived: the cotangents, ``(B, T, O)``.
        sizes: their norms, ``(B,)``.
        bias: whether the bias gets one.
    """
    of_weight, of_bias = None, None
    if met is not None and gates.weight is not None:
        of_weight = token_weight_gradient(met, arrived, gates.weight.limit, gates.weight.least, 0, sizes)
    if bias and gates.bias is not None:
        of_bias = summed(arrived.sum(1), gates.bias, sizes)
    return of_weight, of_bias


def _positions(values: Tensor) -> Tensor:
    """``(B, ..., K)`` to ``(B, T, K)``."""
    return values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2)


class _Gated(torch.autograd.Function):
    """What the operations have in common: ``apply(sample, values, ..., gates)`` in and outside of ``vmap``.

    Attributes:
        ungated: how many of its first tensors have no gate: what it reads, or what tells samples apart.
    """

    ungated = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Torch asks for it at each call.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    @classmethod
    def batched(cls, values: Tensor, rest: tuple[Any, ...]) -> Tensor:
        """The operation for values with the axis of samples in front; what else it returns is for its own way back."""
        made: Any = cls.apply(None, values, *rest)  # type: ignore[no-untyped-call]
        return cast(Tensor, made[0] if isinstance(made, tuple) else made)

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, sample: Tensor, values: Tensor, *rest: Any) -> Any:
        """The rule: all samples at once, with their axis in front."""
        if any(isinstance(dim, int) for dim in in_dims[2:]):
            raise PrivacyError("a parameter behind a gradient gate must be the same for all samples")
        dim = in_dims[1]
        moved = values.unsqueeze(0).expand(info.batch_size, *values.shape) if dim is None else values.movedim(dim, 0)
        return cls.batched(moved, rest), 0


class GatedLinear(_Gated):
    """``x Wᵀ + b``, or ``x W + b``: ``values`` is ``(B, ..., K)``."""

    @staticmethod
    def forward(
        sample: Any, values: Tensor, weight: Tensor, bias: Tensor | None, gates: Affine, *counters: Tensor | None
    ) -> Tensor:
        (transposed,) = gates.settings
        flat = values.reshape(-1, values.shape[-1])
        if not transposed:
            made = functional.linear(flat, weight, bias)
        else:
            made = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        # No view of what was made, so that it may be overwritten.
        return torch.ops.aten._unsafe_view(made, [*values.shape[:-1], made.shape[-1]])  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, weight, _, ctx.gates, *_ = inputs
        ctx.save_for_backward(values if ctx.needs_input_grad[2] else None, weight if ctx.needs_input_grad[1] else None)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        values, weight = ctx.saved_tensors
        gates: Affine = ctx.gates
        (transposed,) = gates.settings
        passed, of_weight, of_bias = None, None, None
        if weight is not None:
            flat = cotangents.reshape(-1, cotangents.shape[-1])
            passed = (flat @ (weight.mT if transposed else weight)).reshape(*cotangents.shape[:-1], -1)
        wants = gates.weight is not None and values is not None, gates.bias is not None and ctx.needs_input_grad[3]
        counted = ctx.needs_input_grad[5:]
        if gates.by_parts(counted):
            of_both = linear_parts(values if wants[0] else None, cotangents, bias=wants[1])
            if transposed and of_both[0] is not None:
                of_both = Transposed(of_both[0]), of_both[1]
            of_weight, of_bias, *counts = gates.sums(of_both, counted)
            return None, passed, of_weight, of_bias, None, *counts
        arrived = _positions(cotangents)
        if arrived.shape[1] == 1:
            gated, sizes = zeroed_rows(arrived.squeeze(1))
            if gates.weight is not None and values is not None:
                met, lengths = zeroed_rows(_positions(values).squeeze(1))
                of_weight = vector_weight_gradient(met, gated, lengths, sizes, gates.weight.limit, gates.weight.least)
            if gates.bias is not None and ctx.needs_input_grad[3]:
                of_bias = bias_gradient(gated, sizes, gates.bias.limit, gates.bias.least)
        else:
            several = _positions(values) if wants[0] else None
            of_weight, of_bias = token_gradients(gates, several, arrived, sample_norms(arrived), bias=wants[1])
        of_weight = of_weight.mT if transposed and of_weight is not None else of_weight
        return None, passed, of_weight, of_bias, None, None, None


class GatedEmbedding(_Gated):
    """Rows of a table by their numbers, ``(B, ...)`` integers; the row ``padding`` takes no gradient."""

    @staticmethod
    def forward(sample: Any, values: Tensor, weight: Tensor, gates: Affine, counter: Tensor | None) -> Tensor:
        return functional.embedding(values, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, weight, ctx.gates, _ = inputs
        ctx.rows = weight.shape[0]
        ctx.save_for_backward(values)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        (tokens,) = ctx.saved_tensors
        gates: Affine = ctx.gates
        (padding,) = gates.settings
        cap = cast(Cap, gates.weight)
        flat = tokens.reshape(len(tokens), -1)
        arrived = cotangents.reshape(*flat.shape, cotangents.shape[-1])
        if padding is not None:
            arrived = arrived.masked_fill((flat == padding).unsqueeze(-1), 0.0)
        counted = ctx.needs_input_grad[4:]
        if gates.by_parts(counted):
            found, _, counts, _ = gates.sums((Table(flat, arrived, ctx.rows), None), counted)
            return None, None, found, None, counts
        return None, None, table_gradient(flat, arrived, ctx.rows, cap.limit, cap.least), None, None


class GatedConvolution(_Gated):
    """A convolution of ``(B, C, *size)`` with one to three axes; settings: stride, padding, dilation, groups."""

    @staticmethod
    def forward(
        sample: Any, values: Tensor, weight: Tensor, bias: Tensor | None, gates: Affine, *counters: Tensor | None
    ) -> Tensor:
        stride, padding, dilation, groups = gates.settings
        still = (0,) * len(stride)
        return cast(
            Tensor, torch.ops.aten.convolution(values, weight, bias, stride, padding, dilation, False, still, groups)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, weight, _, ctx.gates, *_ = inputs
        ctx.save_for_backward(values, weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        values, weight = ctx.saved_tensors
        gates: Affine = ctx.gates
        stride, padding, dilation, groups = gates.settings
        passed, of_weight, of_bias = None, None, None
        if ctx.needs_input_grad[1]:
            passed = torch.ops.aten.convolution_backward(
                cotangents, values, weight, None, stride, padding, dilation, False, [0] * len(stride), groups,
                [True, False, False],
            )[0]  # fmt: skip
        counted = ctx.needs_input_grad[5:]
        if gates.by_parts(counted):
            first: Part | None = None
            second: Part | None = None
            if gates.weight is not None and ctx.needs_input_grad[2]:
                first = Kernel(values, cotangents, weight.shape[2:], stride, padding, dilation, groups, 0)
            if gates.bias is not None and ctx.needs_input_grad[3]:
                maps, sizes = zeroed_rows(cotangents.flatten(2))
                second = Rows(maps.sum(2), (maps.shape[1],), sizes)
            of_weight, of_bias, *counts = gates.sums((first, second), counted)
            return None, passed, of_weight, of_bias, None, *counts
        if gates.weight is not None and ctx.needs_input_grad[2]:
            flat = values.dim() == 3
            of_weight = convolution_weight_gradient(
                values.unsqueeze(2) if flat else values,
                cotangents.unsqueeze(2) if flat else cotangents,
                [1] * flat + list(weight.shape[2:]),
                [1] * flat + list(stride),
                [0] * flat + list(padding),
                [1] * flat + list(dilation),
                groups,
                gates.weight.limit,
                gates.weight.least,
                0,
            ).reshape(weight.shape)
        if gates.bias is not None and ctx.needs_input_grad[3]:
            of_bias = bias_gradient(*zeroed_rows(cotangents.flatten(2)), gates.bias.limit, gates.bias.least)
        return None, passed, of_weight, of_bias, None, None, None


class GatedStep(_Gated):
    """``x - 2Wᵀ relu(Wx + b)`` of ``(B, ..., features)``, or of maps: one gate for both places where ``W`` is read."""

    @staticmethod
    def forward(
        sample: Any, values: Tensor, weight: Tensor, bias: Tensor | None, gates: Affine, *counters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return taken(values, weight, bias, *gates.settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, values, weight, bias, ctx.gates, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(values, weight, bias, output[1])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangents = arriving[0]
        if cotangents is None:
            return (None,) * 7
        gates: Affine = ctx.gates
        needed = ctx.needs_input_grad
        wants = needed[1], gates.weight is not None and needed[2], gates.bias is not None and needed[3]
        values, weight, bias, hidden = ctx.saved_tensors
        (windows,) = gates.settings
        passed, *parts = returned(values, weight, bias, hidden, cotangents, windows, 0, wants)
        of_weight, of_bias, *counts = gates.sums((parts[0], parts[1]), needed[5:])
        return None, passed, of_weight, of_bias, None, *counts


class Expanded(_Gated):
    """A copy of a parameter for each sample, whose gradients are capped and summed: for whatever is done with it."""

    @staticmethod
    def forward(sample: Tensor, parameter: Tensor, gates: Affine, counter: Tensor | None) -> Tensor:
        return parameter.unsqueeze(0).expand(len(sample), *parameter.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gates = inputs[2]

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        gates: Affine = ctx.gates
        flat, shape = cotangents.reshape(len(cotangents), -1), cotangents.shape[1:]
        sizes = None if gates.sizes is None else gates.sizes.take()
        counted = ctx.needs_input_grad[3:]
        if gates.by_parts(counted):
            found, _, counts, _ = gates.sums((Rows(flat, shape, sizes), None), counted)
            return None, found, None, counts
        return None, summed(flat, cast(Cap, gates.weight), sizes).reshape(shape), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, sample: Tensor, parameter: Tensor, gates: Affine, counter: Tensor | None
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            raise PrivacyError("a parameter behind a gradient gate must be the same for all samples")
        return cast(Tensor, Expanded.apply(sample.movedim(in_dims[0], 0), parameter, gates, counter)), 0  # type: ignore[no-untyped-call]


class Spread(torch.autograd.Function):
    """A copy of a parameter in the shape of what it meets: on the way back, what is summed up to it is told of."""

    @staticmethod
    def forward(values: Tensor, shape: tuple[int, ...], sizes: Sizes) -> Tensor:
        own = values.reshape(len(values), *[1] * (len(shape) - values.dim() + 1), *values.shape[1:])
        return own.expand(len(values), *shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, _, ctx.sizes = inputs
        ctx.shape = values.shape

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        ctx.sizes.add(sample_norms(cotangents))
        own = (ctx.shape[0], *[1] * (cotangents.dim() - len(ctx.shape)), *ctx.shape[1:])
        return cotangents.sum_to_size(own).reshape(ctx.shape), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, values: Tensor, shape: tuple[int, ...], sizes: Sizes) -> tuple[Tensor, int]:
        return cast(Tensor, Spread.apply(values.movedim(in_dims[0], 0), shape, sizes)), 0  # type: ignore[no-untyped-call]


class Attention(torch.autograd.Function):
    """Scaled dot-product attention within ``vmap``, for which torch has no rule: samples join the heads' batch axis."""

    @staticmethod
    def forward(sample: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: Any) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        raise NotImplementedError

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        sample: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        settings: Any,
    ) -> tuple[Tensor, int]:
        size = info.batch_size

        def moved(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        def folded(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, *tensor.shape[-3:])

        query, key, value = (moved(*pair) for pair in zip((query, key, value), in_dims[1:4], strict=True))
        leading = query.shape[:-3]
        key, value = (tensor.expand(*leading, *tensor.shape[-3:]) for tensor in (key, value))
        if mask is not None:
            if in_dims[4] is not None:
                # Its own axes are the last ones of the scores'.
                own = mask.movedim(in_dims[4], 0)
                mask = own.reshape(size, *[1] * (query.dim() - own.dim()), *own.shape[1:])
            if mask.dim() > 2:
                mask = folded(mask.expand(*leading, *mask.shape[-3:]))
        out = functional.scaled_dot_product_attention(folded(query), folded(key), folded(value), mask, **dict(settings))
        return out.reshape(*leading, *out.shape[-3:]), 0


GATES = (GatedLinear, GatedEmbedding, GatedConvolution, GatedStep, Expanded)
"""Those through which a gradient may come to a parameter."""
