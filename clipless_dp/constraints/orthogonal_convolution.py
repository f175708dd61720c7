"""The orthogonality constraint of convolutions as operators."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from clipless_dp.constraints.base import scale_to_limit_
from clipless_dp.constraints.orthogonal import Orthogonal, frobenius, overshoot, tangent_step
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.conv import polyphase
from clipless_dp.norms.operators import ConvOperator, Operator
from clipless_dp.norms.rounding import exact_float64

_FRESH_ITERATIONS = 50

_ENOUGH = 2.5e-3
"""Root mean square of the eigenvalues of ``KᴴK - I`` at one frequency that one step takes care of."""

_LENGTHS = 1.0, 1.5, 3.0
"""How much longer than Björck's the steps near orthogonality are, in turn. Of a change of ``KᴴK`` the kernel's taps can
follow some share in [0, 1]: a plain step takes care of whole ones, these of ⅔ and ⅓ too, and three of them of as much
as five plain ones."""


class OrthogonalConvolution(Orthogonal):
    """Moves a kernel towards one whose *convolution* is orthogonal, then divides by the certified norm that is left.

    :class:`Orthogonal` orthogonalises the kernel as a matrix, of which the convolution keeps only the certified part:
    where windows overlap, most of its singular values end far below the limit. Here Björck's step is taken on the
    convolution itself and cut back to the kernel's own taps:
    ``K ← K - ½·cut(K∗(Kᵀ∗K - δ))``, or with ``K∗Kᵀ`` where there are fewer outputs. It is the gradient step ½ on
    ``‖Kᵀ∗K - δ‖²/4`` (Wang, Chen, Chakraborty and Yu, "Orthogonal convolutional neural networks", CVPR 2020) and
    converges from kernels that are nearly orthogonal, as they are after a small step; then steps of ½, ¾ and 3/2 in
    turn leave less behind than four of ½. Start from :func:`clipless_dp.layers.orthogonal_` or
    :func:`clipless_dp.layers.from_orthogonium`: from any other kernel wrapping takes fifty of these steps, which
    usually leave a few singular values behind. Weights of linear layers are treated as by :class:`Orthogonal`.

    Args:
        limit: the largest operator norm, 1 by default.
        iterations: most steps for each projection.
        tangent: as in :class:`Orthogonal`. The noise's normal part, most of a kernel's, is not dropped at once but
            shrunk in ``iterations`` linearised steps.

    Guarantee:
        As for :class:`Orthogonal`: the operator norm is at most ``limit`` by the last division, and no bound relies
        on orthogonality.

    Raises:
        ConfigurationError: on projecting, a kernel is neither float32 nor float64, or is over volumes.

    What stays norm-preserving:
        Nothing exactly: after a noisy step the singular values lie within a small interval below the limit. The
        iteration aims at all circles of at least ``2k - 1`` pixels at once. Of zero-padded layers, isometries (no
        fewer outputs than inputs, a strided layer's ``s²`` pixels counted as channels) lose what windows over the
        border would have read, unless padding is ``k - 1``.

    Cost:
        For a ``k × k`` kernel of ``c`` channels, ``iterations`` times, at most, two products of ``c × c`` matrices at
        each of about ``2k²`` frequencies, one of each conjugate pair, and one certificate, per weight and step.
    """

    @torch.no_grad()
    def initialize_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Keeps an orthogonal kernel as it is, and takes another as far as the iteration goes."""
        operator = operators[0]
        if isinstance(operator, ConvOperator):
            exact = exact_float64(weight)
            _Symbol(operator, exact).orthogonalize_(exact, self.limit, _FRESH_ITERATIONS)
            weight.copy_(exact)
            scale_to_limit_(weight, operators, self.limit)
        else:
            super().initialize_(weight, operators)

    @torch.no_grad()
    def project_gradient_(self, gradient: Tensor, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Shrinks the normal part of a noisy gradient, where ``tangent`` asks for it: post-processing."""
        operator = operators[0]
        if not isinstance(operator, ConvOperator):
            super().project_gradient_(gradient, weight, operators)
        elif self.tangent:
            _Symbol(operator, weight).project_(gradient, weight, self.iterations)

    def changes_gradients(self) -> bool:
        """Where ``tangent`` asks for it, or a subclass's :meth:`project_gradient_` is its own."""
        return self.tangent or type(self).project_gradient_ is not OrthogonalConvolution.project_gradient_

    def _orthogonalize_(self, weight: Tensor, operator: Operator) -> None:
        if isinstance(operator, ConvOperator):
            _Symbol(operator, weight).orthogonalize_(weight, self.limit, self.iterations)
        else:
            super()._orthogonalize_(weight, operator)


def _left(matrices: Tensor) -> Tensor:
    """``KᴴK - I``, or ``KKᴴ - I`` where that is smaller."""
    is_wide = matrices.shape[-2] < matrices.shape[-1]
    left = matrices @ matrices.mH if is_wide else matrices.mH @ matrices
    left.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return left


class _Symbol:
    """A kernel as matrices, one for each frequency, and back.

    Strides become channels (:func:`~clipless_dp.norms.conv.polyphase`). On ``2t - 1`` points an axis of ``t`` taps
    holds the ``t`` first taps of a product ``K∗Kᵀ∗K`` without aliasing: it reaches from ``1 - t`` to ``2t - 2``.
    """

    def __init__(self, operator: ConvOperator, weight: Tensor) -> None:
        if weight.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"kernels are orthogonalised in float32 or float64, got {weight.dtype}: convert the kernel first"
            )
        if len(operator.stride) > 2:
            raise ConfigurationError(
                "kernels over volumes are not orthogonalised: use constraints.Spectral() or AlmostOrthogonal()"
            )
        shape = weight.shape
        missing = 2 - len(operator.stride)
        self._operator = operator
        self._shape = (*shape[:2], *[1] * missing, *shape[2:])
        self._steps = (1,) * missing + operator.stride, (1,) * missing + operator.dilation
        numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(self._shape)
        self._places = self._phases(numbers).long()

    def orthogonalize_(self, weight: Tensor, limit: float, iterations: int) -> None:
        """Takes truncated Björck steps, in place: so many at most."""
        smaller = min(self._places.shape[1:3])
        # Nothing is cut off a single tap: plain steps converge at once.
        lengths = _LENGTHS if self._places[0, 0, 0].numel() > 1 else (1.0,)
        for step in range(iterations):
            matrices = self._of(weight / limit)
            left = _left(matrices)
            most = float(frobenius(left).amax())
            if step == 0 and not most <= 1.0:
                # Else no singular value lies outside of where steps converge.
                matrices = matrices / overshoot(matrices).amax(1, keepdim=True)
                left = _left(matrices)
                most = float(frobenius(left).amax())
            # Longer steps move no singular value by more than half of it.
            length = min(lengths[step % len(lengths)], max(1.0, 1.0 / max(most, 1e-3)))
            first, second = (left, matrices) if matrices.shape[-2] < matrices.shape[-1] else (matrices, left)
            stepped = torch.baddbmm(
                matrices.flatten(0, 1), first.flatten(0, 1), second.flatten(0, 1), alpha=-length / 2.0
            )
            self._write(stepped.reshape(matrices.shape), weight)
            weight *= limit
            # Little is left at every frequency: of singular values, not of what this step has moved, which is little
            # of tiny ones too.
            if most <= _ENOUGH * math.sqrt(smaller):
                break

    def project_(self, gradient: Tensor, weight: Tensor, iterations: int) -> None:
        """Takes truncated linearised steps on the gradient, in place."""
        frames = self._of(weight)
        smaller = min(frames.shape[-2:])
        counts = _counts(_waves(self._places.shape[-2:], weight.dtype, weight.device)[0])
        size = (frames.abs().square().sum((-2, -1)) @ counts / (counts.sum() * max(1, smaller))).sqrt()
        frames = frames / size.clamp(min=torch.finfo(size.dtype).tiny)[:, :, None, None]
        for _ in range(iterations):
            self._write(tangent_step(frames, self._of(gradient)), gradient)

    def _phases(self, weight: Tensor) -> Tensor:
        """``(groups, rows, columns·phases, taps, taps)``, with zeros where a phase has fewer taps than another."""
        return polyphase(self._operator.kernel(weight.reshape(self._shape)), *self._steps)

    def _of(self, weight: Tensor) -> Tensor:
        """``(groups, half of the frequencies, rows, columns)``: the others are conjugates of these."""
        taps = self._phases(weight).flatten(3)
        cosine, sine = _waves(self._places.shape[-2:], taps.dtype, taps.device)
        # Frequencies first: products of a few dozen numbers, which cost less than as many small transforms.
        flat = taps.movedim(-1, 1).flatten(2)
        symbol = torch.complex(cosine @ flat, -(sine @ flat))
        return symbol.reshape(*symbol.shape[:2], *taps.shape[1:3])

    def _write(self, matrices: Tensor, weight: Tensor) -> None:
        """Keeps the taps that the kernel has."""
        cosine, sine = _waves(self._places.shape[-2:], weight.dtype, weight.device)
        counts = _counts(cosine)
        flat = matrices.flatten(2)
        # Real parts of sums over all frequencies.
        taps = (counts * cosine).mT @ flat.real - (counts * sine).mT @ flat.imag
        phases = (taps / counts.sum()).unflatten(2, matrices.shape[2:]).movedim(1, -1)
        places = self._places.to(weight.device).flatten()
        flat = weight.new_zeros(weight.numel() + 1).index_copy_(0, places, phases.flatten().to(weight.dtype))
        weight.copy_(flat[1:].reshape(weight.shape))


@functools.lru_cache(maxsize=32)
def _waves(taps: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos(ω·t) and sin(ω·t), shape (frequencies, taps): one of each pair ±ω of a grid of ``2t - 1`` points an axis."""
    high, wide = (2 * count - 1 for count in taps)
    numbers = torch.arange(high * wide, device="cpu")
    whole = torch.stack((numbers // wide, numbers % wide), 1)
    mirrored = (-whole[:, 0] % high) * wide + -whole[:, 1] % wide
    half = whole[numbers <= mirrored]
    numbers = torch.arange(taps[0] * taps[1], device="cpu")
    places = torch.stack((numbers // taps[1], numbers % taps[1]), 1)
    turns = half[:, :1] * places[:, 0] * wide + half[:, 1:] * places[:, 1] * high
    angles = (turns % (high * wide)).double() * (2.0 * math.pi / (high * wide))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _counts(waves: Tensor) -> Tensor:
    """How many frequencies of the whole grid each of half of them stands for: zero for itself, all others for two."""
    counts = torch.full_like(waves[:, :1], 2.0)
    counts[0] = 1.0
    return counts
