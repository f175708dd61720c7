"""Layers that are 1-Lipschitz in the maximum norm whatever their weights: distances, and weighted order statistics.

Each output is a number about ``d = |x - w_j|``, so that its gradients with respect to ``x`` and ``w_j`` are ``v`` and
``-v``, and ``‖v‖₁ ≤ 1``. So the cotangent's ℓ1 norm does not grow on its way back, and it bounds the gradient of every
layer at any depth, whatever weights, widths and inputs are. Proofs: ``docs/bounds.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.arguments import flag, share, shown, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.plain import plain_form
from clipless_dp.modules import Unscripted

_CHUNK = 1 << 18
"""Differences ``B·out·in`` that are held at once: what fits into a core's cache."""

_ROWS = 1 << 16
"""Outputs of as many rows whose largest differences are found at once."""

_FEW = 1 << 12
"""Outputs below which finding them row by row is as fast."""

_GRID = 2.0**-24
"""Coefficients are multiples of it that add to one exactly, in float32 too."""

_INITIAL_SIZE = 0.3
"""Standard deviation of fresh weights: as large as entries of inputs in [-½, ½], which they are held against."""

_INITIAL_ROWS = 64
"""Random inputs by which biases start."""


def _pieces(inputs: Tensor, weight: Tensor, chunk: int | None = None) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of outputs, of at most ``chunk`` differences each (:data:`_CHUNK`), or of one neuron's."""
    columns, most = max(1, weight.shape[1]), _CHUNK if chunk is None else chunk
    outputs = min(max(1, most // columns), len(weight))
    rows = max(1, most // (columns * outputs))
    for start in range(0, len(inputs), rows):
        for first in range(0, len(weight), outputs):
            yield slice(start, start + rows), slice(first, first + outputs)


def _joined(parts: list[tuple[slice, slice, Tensor]]) -> Tensor:
    """``(B, out, ...)`` of its pieces."""
    rows: dict[int, list[Tensor]] = {}
    for some, _, part in parts:
        rows.setdefault(some.start, []).append(part)
    return torch.cat([torch.cat(several, 1) for several in rows.values()])


def p_norms(sizes: Tensor, p: float) -> Tensor:
    """``top·‖sizes/top‖_p`` over the last axis, of its largest entry: powers of entries themselves would underflow.

    Args:
        sizes: not negative.
        p: finite or infinite.
    """
    top = sizes.amax(-1, keepdim=True)
    if math.isinf(p):
        return top.squeeze(-1)
    top = top.clamp_(min=torch.finfo(sizes.dtype).tiny)
    return (sizes / top).pow_(p).sum(-1).pow_(1.0 / p) * top.squeeze(-1)


class _Distances(torch.autograd.Function):
    """``‖x - w_j‖_p``, or the mean's root of it, with its gradient taken in pieces.

    Entries of ``v`` that are no number, of differences that overflowed, become 0: what flows back stays bounded.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, p: float, scale: float) -> Tensor:
        ctx.p, ctx.scale = p, scale
        ctx.save_for_backward(inputs, weight)
        if not len(inputs):
            return inputs.new_zeros(0, len(weight))
        if math.isinf(p):
            return torch.cdist(inputs, weight, p=math.inf)
        parts = []
        for rows, outputs in _pieces(inputs, weight):
            parts.append((rows, outputs, p_norms((inputs[rows, None, :] - weight[outputs]).abs_(), p) * scale))
        return _joined(parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (cotangent,) = cotangents
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight = cotangent.new_zeros(inputs.shape), cotangent.new_zeros(weight.shape)
        for rows, outputs in _pieces(inputs, weight):
            differences, arriving = inputs[rows, None, :] - weight[outputs], cotangent[rows, outputs]
            if math.isinf(ctx.p):
                _add_largest_(of_inputs[rows], of_weight[outputs], differences, arriving)
                continue
            slopes = _slopes(differences, ctx.p, ctx.scale)
            of_inputs[rows] += torch.bmm(arriving.unsqueeze(1), slopes).squeeze(1)
            of_weight[outputs] -= (arriving.unsqueeze(2) * slopes).sum(0)
        return of_inputs, of_weight, None, None


def _add_largest_(of_inputs: Tensor, of_weight: Tensor, differences: Tensor, arriving: Tensor) -> None:
    """Adds what flows back through the largest differences, of which there are few; those that tie share evenly."""
    sizes = differences.abs()
    largest = sizes == sizes.amax(-1, keepdim=True)
    rows, outputs, entries = largest.nonzero(as_tuple=True)
    shares = arriving / largest.sum(-1).clamp(min=1)
    flowing = shares[rows, outputs] * differences[rows, outputs, entries].sign()
    of_inputs.index_put_((rows, entries), flowing, accumulate=True)
    of_weight.index_put_((outputs, entries), -flowing, accumulate=True)


def _slopes(differences: Tensor, p: float, scale: float) -> Tensor:
    """``v``, the gradient of a p-norm with respect to ``x``, ``(B, out, in)``."""
    sizes = differences.abs()
    shares = sizes / sizes.amax(-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    total = shares.pow(p).sum(-1, keepdim=True).clamp(min=1.0)
    slopes = differences.sign() * (shares.pow(p - 1.0) / total.pow((p - 1.0) / p)) * scale
    return slopes.nan_to_num(0.0, 0.0, 0.0)


class _Ordered(torch.autograd.Function):
    """``Σ_k c_k·|x - w_j|_(k)`` over the largest differences, which the way back finds again by their sizes.

    Where sizes tie, the entries share what their places have evenly. Rows whose differences are no numbers pass nothing
    back.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, coefficients: tuple[float, ...]) -> Tensor:
        ctx.coefficients = coefficients
        pieces = _pieces(inputs, weight, _ROWS * weight.shape[1])
        found = [
            (rows, outputs, _largest(inputs[rows], weight[outputs], len(coefficients))) for rows, outputs in pieces
        ]
        ordered = _joined(found) if found else inputs.new_zeros(0, len(weight), len(coefficients))
        ctx.save_for_backward(inputs, weight, ordered)
        return (ordered * inputs.new_tensor(coefficients)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor, None]:
        (cotangent,) = cotangents
        inputs, weight, ordered = ctx.saved_tensors
        shares, terms = cotangent.new_tensor(ctx.coefficients), len(ctx.coefficients)
        of_inputs, of_weight = cotangent.new_zeros(inputs.shape), cotangent.new_zeros(weight.shape)
        for some, several in _pieces(inputs, weight):
            differences, sizes = inputs[some, None, :] - weight[several], ordered[some, several]
            least = sizes[..., -1:]
            counted = differences.abs() >= least
            rows, outputs, entries = counted.nonzero(as_tuple=True)
            moving = differences[rows, outputs, entries]
            own = sizes[rows, outputs]
            alike = own == moving.abs().unsqueeze(-1)
            # Of those that tie with the last place some may be past it: they share with the others.
            past = (counted.sum(-1) - terms)[rows, outputs] * alike[:, -1]
            slopes = (alike * shares).sum(-1) / (alike.sum(-1) + past).clamp(min=1) * moving.sign()
            flowing = cotangent[some, several][rows, outputs] * slopes
            of_inputs[some].index_put_((rows, entries), flowing, accumulate=True)
            of_weight[several].index_put_((outputs, entries), -flowing, accumulate=True)
        return of_inputs, of_weight, None


def _largest(inputs: Tensor, weight: Tensor, terms: int) -> Tensor:
    """The largest sizes ``|x - w_j|``, falling, ``(B, out, terms)``.

    On a CPU they are inserted entry by entry into places that are kept in order, for many rows at once: torch's search
    of each row takes several times as long.
    """
    if inputs.device.type != "cpu" or len(inputs) * len(weight) < _FEW or torch.compiler.is_compiling():
        return (inputs[:, None, :] - weight).abs().topk(terms, -1).values
    places = inputs.new_zeros(terms, len(inputs), len(weight))
    spare = torch.empty_like(places[0])
    for entry in range(inputs.shape[1]):
        moving = (inputs[:, entry, None] - weight[:, entry]).abs_()
        for place in places[: entry + 1]:
            torch.minimum(place, moving, out=spare)
            torch.maximum(place, moving, out=place)
            moving, spare = spare, moving
    return places.permute(1, 2, 0)


class _MaximumNorm(Unscripted, nn.Module):
    """What both layers share: sizes, a weight ``(out, in)`` and a bias in place of a mean over the batch."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = whole("in_features", in_features), whole("out_features", out_features)
        self.weight = nn.Parameter(_INITIAL_SIZE * torch.randn(self.out_features, self.in_features))
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if flag("bias", bias) else None

    @torch.no_grad()
    def _centre_(self) -> None:
        """Starts the bias at what brings outputs of random inputs, uniform in [-½, ½], to zero: no data is seen."""
        if self.bias is not None:
            self.bias.sub_(self(torch.rand(_INITIAL_ROWS, self.in_features) - 0.5).mean(0))

    def _refuse_others(self, inputs: Tensor) -> None:
        if inputs.dim() != 2 or inputs.shape[1] != self.in_features:
            raise ConfigurationError(
                f"expected inputs (batch, {self.in_features}), got {tuple(inputs.shape)}: flatten images first"
            )
        if inputs.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(f"distances are taken in float32 or float64, not in {inputs.dtype}")

    def _biased(self, values: Tensor) -> Tensor:
        return values if self.bias is None else values + self.bias


class DistanceLinear(_MaximumNorm):
    """``y_j = ‖x - w_j‖_∞ + b_j`` (Zhang, Cai, Lu, He and Wang, "Towards certifying ℓ∞ robustness using neural networks
    with ℓ∞-dist neurons", ICML 2021, §3).

    1-Lipschitz in the maximum norm, and so is every stack of such layers. In training the maximum, whose gradient is
    that of one entry, is approached through ``‖x - w_j‖_p`` with a growing ``p``, a *public* number that is set between
    steps (:func:`set_exponent_`). In place of the published shift by the batch's mean, which mixes samples, there is a
    bias.

    Args:
        in_features: entries of an input.
        out_features: neurons.
        p: at least 2; infinity is the layer that is deployed and certified.
        mean: for finite ``p`` take ``(Σ|x - w_j|^p/n)^{1/p}``: ``n^{-1/p}`` times the norm, 1-Lipschitz in the maximum
            norm as well, so that bounds are the same at every ``p``.
        bias: whether there is ``b``.

    Shape:
        ``(B, in_features)`` to ``(B, out_features)``.

    Raises:
        ConfigurationError: a size is not positive or ``p`` is below 2; inputs of another shape, or of half precision.

    Guarantee:
        With ``v = ∂y_j/∂x = -∂y_j/∂w_j``: ``‖v‖₂ ≤ 1`` and ``‖v‖₁ ≤ n^{1/p}``, for every subgradient that is taken
        where maxima tie (they share evenly). With ``mean`` both are ``n^{1/p}`` times smaller.
    """

    def __init__(
        self, in_features: int, out_features: int, *, p: float = math.inf, mean: bool = False, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.p = exponent(p)
        self.mean = flag("mean", mean)
        self._centre_()

    @property
    def scale(self) -> float:
        """``n^{-1/p}`` where means are taken, else 1: what the p-norm is multiplied by."""
        return self.in_features ** (-1.0 / self.p) if self.mean else 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        """The distances."""
        self._refuse_others(inputs)
        distances: Tensor = _Distances.apply(inputs, self.weight, self.p, self.scale)  # type: ignore[no-untyped-call]
        return self._biased(distances)

    def extra_repr(self) -> str:
        """Sizes and exponent."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, p={self.p:g}, mean={self.mean}, "
            f"bias={self.bias is not None}"
        )


class SortLinear(_MaximumNorm):
    """``y_j = Σ_k c_k·|x - w_j|_(k) + b_j`` over the largest differences, ``c_k ∝ q(1-q)^{k-1}`` (Zhang, Jiang, He and
    Wang, "Rethinking Lipschitz neural networks and certified robustness: a Boolean function perspective", NeurIPS
    2022, §4).

    1-Lipschitz in the maximum norm. ``q = 1`` is :class:`DistanceLinear`. A smaller one lets more entries speak, so
    that it trains without a relaxation.

    Args:
        in_features: ``n``, entries of an input.
        out_features: neurons.
        quantile: ``q`` in (0, 1].
        terms: how many of the largest differences count, at most ``n``; the coefficients of these add to one.
        bias: whether there is ``b``.

    Shape:
        ``(B, in_features)`` to ``(B, out_features)``.

    Raises:
        ConfigurationError: a size is not positive, or ``q`` is out of range; inputs of another shape, or of half
            precision.

    Guarantee:
        With ``v = ∂y_j/∂x = -∂y_j/∂w_j``: ``‖v‖₂ ≤ ‖v‖₁ ≤ 1``, whichever entries that tie are taken.
    """

    def __init__(
        self, in_features: int, out_features: int, quantile: float = 0.3, *, terms: int = 10, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.quantile = share("quantile", quantile, "(0, 1]")
        self.terms = min(whole("terms", terms), self.in_features)
        self._centre_()

    @property
    def coefficients(self) -> tuple[float, ...]:
        """``c_1, …, c_terms``: multiples of 2^-24 that add to one exactly, in float32 and float64."""
        return order_weights(self.quantile, self.terms)

    def forward(self, inputs: Tensor) -> Tensor:
        """The sums."""
        self._refuse_others(inputs)
        sums: Tensor = _Ordered.apply(inputs, self.weight, self.coefficients)  # type: ignore[no-untyped-call]
        return self._biased(sums)

    def extra_repr(self) -> str:
        """Sizes and coefficients."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, quantile={self.quantile:g}, "
            f"terms={self.terms}, bias={self.bias is not None}"
        )


def order_weights(quantile: float, terms: int) -> tuple[float, ...]:
    """``c_k ∝ q(1-q)^{k-1}``, rounded down to multiples of 2^-24, of which the first takes what is left of one."""
    shares = [(1.0 - quantile) ** k for k in range(terms)]
    total = math.fsum(shares)
    later = [math.floor(one / total / _GRID) * _GRID for one in shares[1:]]
    return (1.0 - math.fsum(later), *later)


def exponent(p: object) -> float:
    """``p``, at least 2 or infinite.

    Raises:
        ConfigurationError: it is not; below 2 the Euclidean norm of the gradient is not bounded by 1.
    """
    if isinstance(p, bool) or not isinstance(p, Real) or not float(p) >= 2.0:
        raise ConfigurationError(f"p must be a number of at least 2, or infinity, got {shown(p)}")
    return float(p)


def set_exponent_(net: nn.Module, p: float) -> None:
    """Sets the exponent of all :class:`DistanceLinear` of a network: a public number, between steps.

    A wrapped network follows at its next pass; a change between a forward pass and its backward pass is refused there.

    Args:
        net: the network, or the wrapping model.
        p: at least 2, or infinity.

    Raises:
        ConfigurationError: ``p`` is below 2.
    """
    value = exponent(p)
    for layer in net.modules():
        if isinstance(layer, DistanceLinear):
            layer.p = value


_ENTRIES = 1 << 20
"""Differences of one row that its plain form holds at once."""


class _Plain(Unscripted, nn.Module):
    """Either layer by ordinary operations, in pieces that the number of rows does not decide."""

    def __init__(self, layer: DistanceLinear | SortLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.coefficients: tuple[float, ...] = ()
        self.p, self.scale = math.inf, 1.0
        if isinstance(layer, SortLinear):
            self.coefficients = layer.coefficients
        else:
            self.p, self.scale = layer.p, layer.scale

    def forward(self, inputs: Tensor) -> Tensor:
        step = max(1, _ENTRIES // self.weight.shape[1])
        values = torch.cat(
            [self._of(inputs, self.weight[low : low + step]) for low in range(0, len(self.weight), step)], 1
        )
        return values if self.bias is None else values + self.bias

    def _of(self, inputs: Tensor, weight: Tensor) -> Tensor:
        sizes = (inputs.unsqueeze(1) - weight).abs()
        if self.coefficients:
            largest = sizes.topk(len(self.coefficients), -1).values
            return (largest * torch.tensor(self.coefficients, dtype=inputs.dtype, device=inputs.device)).sum(-1)
        top = sizes.amax(-1, keepdim=True)
        if math.isinf(self.p):
            return top.squeeze(-1)
        top = top.clamp(min=torch.finfo(sizes.dtype).tiny)
        return (sizes / top).pow(self.p).sum(-1).pow(1.0 / self.p) * top.squeeze(-1) * self.scale


@plain_form(DistanceLinear)
@plain_form(SortLinear)
def _of_layer(layer: DistanceLinear | SortLinear) -> nn.Module:
    return _Plain(layer)
