"""Linear layers of few parameters: circulant, Toeplitz and Hankel matrices, circulant blocks, diagonals."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.arguments import choice, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.arithmetic import zeroed_rows
from clipless_dp.gates.gradient_layers import Gate, GradientGated, applied, register_gated_form
from clipless_dp.gates.parts import Part, Rows, gated_pair
from clipless_dp.modules import Unscripted
from clipless_dp.norms.operators import CirculantOperator, Operator, ToeplitzOperator, diagonal_counts

Structure = Literal["circulant", "skew", "toeplitz", "hankel", "block-circulant"]


class StructuredLinear(Unscripted, nn.Module):
    """``Wx + b`` with a structured ``W = Σ θ_m B_m``, the ``B_m`` orthonormal in the Frobenius inner product.

    ``B_m`` is one over the root of the number of its entries on one diagonal, and 0 elsewhere, where the diagonal is

    * ``"circulant"``: ``i - j ≡ m`` modulo ``n = max(in, out)``; ``n`` coefficients;
    * ``"skew"``: the same, negative above the main diagonal;
    * ``"toeplitz"``: ``i - j = m - (in - 1)``; ``in + out - 1`` coefficients;
    * ``"hankel"``: ``i + j = m``; as many;
    * ``"block-circulant"``: wrapped diagonals of ``(out/block) × (in/block)`` blocks of size ``block``;
      ``in·out/block`` coefficients.

    (Araujo, Negrevergne, Chevaleyre and Atif, "Understanding and training deep diagonal circulant neural networks",
    ECAI 2020; Ding et al., "CirCNN", MICRO 2017, for the blocks.) So the gradient with respect to ``θ`` is the
    orthogonal projection of ``Σ g xᵀ`` on the structure, of norm at most that of a dense layer's, ``Δ_θ = GX``, but
    there are ``n`` numbers in it in place of ``n²``, and the noise is less by as much: on raw coefficients it would be
    ``√n·GX``.

    Args:
        in_features: size of the last axis of the input.
        out_features: and of the output.
        structure: see above.
        block: size of the blocks of ``"block-circulant"``, which divides both; of no other structure.
        bias: whether there is a ``b``.

    Attributes:
        weight: ``θ``: circulants start orthogonal, with random phases, others at norm 1.

    Shape:
        ``(B, ..., in_features)`` to ``(B, ..., out_features)``; ``weight`` is ``(n,)``, of blocks
        ``(out/block, in/block, block)``.

    Raises:
        ConfigurationError: a size is not positive, there is no such structure, or the block does not divide the sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        structure: Structure = "circulant",
        block: int | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        structure = choice("structure", structure, *get_args(Structure))
        in_features, out_features = whole("in_features", in_features), whole("out_features", out_features)
        if (block is not None) != (structure == "block-circulant"):
            raise ConfigurationError(
                f"block is the size of the blocks of structure='block-circulant': got {structure!r} and block={block!r}"
            )
        if block is not None and math.gcd(in_features, out_features) % whole("block", block):
            raise ConfigurationError(f"block must divide {in_features} and {out_features}, got {block!r}")
        self.in_features, self.out_features = in_features, out_features
        self.structure: Structure = structure
        self.block = block
        shape: tuple[int, ...] = (max(in_features, out_features),)
        if structure in ("toeplitz", "hankel"):
            shape = (in_features + out_features - 1,)
        elif block is not None:
            shape = (out_features // block, in_features // block, block)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the coefficients anew; the bias becomes zero."""
        nn.init.normal_(self.weight)
        if self.structure in ("circulant", "skew"):
            # White noise has uniform phases.
            whole, turn = self.weight.double(), _turn(len(self.weight), skew=self.structure == "skew")
            found = torch.fft.fft(whole * turn)
            phases = torch.where(found.abs() > 0.0, found / found.abs(), torch.ones_like(found))
            root = math.sqrt(min(self.in_features, self.out_features))
            self.weight.copy_((torch.fft.ifft(phases) * turn.conj()).real * root)
        else:
            self.weight.div_(self.operator().norm(self.weight))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def operator(self) -> Operator:
        """What the weight acts as, for certificates and constraints."""
        if self.structure in ("toeplitz", "hankel"):
            return ToeplitzOperator(self.out_features, self.in_features)
        points = self.block or max(self.in_features, self.out_features)
        filled = self.block or min(self.in_features, self.out_features)
        return CirculantOperator(points, filled, self.structure == "skew")

    def matrix(self) -> Tensor:
        """``W``, ``(out, in)``: entries of one diagonal are one number."""
        windows = self._diagonals(self.weight).unfold(-1, self.block or self.in_features, 1)
        if self.structure != "hankel":
            windows = windows.flip(-1)
        if self.block is not None:
            windows = windows.transpose(1, 2).reshape(self.out_features, self.in_features)
        return windows

    def forward(self, values: Tensor) -> Tensor:
        """Multiplies by the matrix."""
        return functional.linear(values, self.matrix(), self.bias)

    def _diagonals(self, weight: Tensor) -> Tensor:
        """The entry of each diagonal, from the upper right corner (Hankel: upper left): ``(..., rows+columns-1)``."""
        if self.structure in ("toeplitz", "hankel"):
            return weight * self._scale(weight)
        rows, columns = (self.block, self.block) if self.block is not None else (self.out_features, self.in_features)
        wrapped = weight[..., weight.shape[-1] - (columns - 1) :]
        wrapped = -wrapped if self.structure == "skew" else wrapped
        return torch.cat((wrapped, weight[..., :rows]), -1) * self._scale(weight)

    def _scale(self, weight: Tensor) -> Tensor | float:
        if self.structure in ("toeplitz", "hankel"):
            counts = diagonal_counts(self.out_features, self.in_features)
            return counts.to(weight.device, weight.dtype).rsqrt()
        return 1.0 / math.sqrt(self.block or min(self.in_features, self.out_features))

    def coefficients(self, values: Tensor, cotangents: Tensor) -> Tensor:
        """Each sample's gradient of the weight, without the samples' matrices: correlations, by Fourier transforms.

        Args:
            values: inputs ``(B, T, in)``.
            cotangents: ``(B, T, out)``.

        Returns:
            ``(B, *weight.shape)``.
        """
        if self.block is not None:
            points = self.block
            waves = torch.fft.rfft(values.unflatten(-1, (-1, points)))
            arrived = torch.fft.rfft(cotangents.unflatten(-1, (-1, points)))
            products = torch.einsum("btrf,btcf->brcf", arrived, waves.conj())
            of_blocks: Tensor = torch.fft.irfft(products, points)
            return of_blocks / math.sqrt(points)
        length = self.in_features + self.out_features - 1
        met = values if self.structure == "hankel" else values.flip(-1)
        products = (torch.fft.rfft(cotangents, length) * torch.fft.rfft(met, length)).sum(1)
        sums: Tensor = torch.fft.irfft(products, length) * self._scale(values)
        if self.structure in ("toeplitz", "hankel"):
            return sums
        size, wrapped = max(self.in_features, self.out_features), self.in_features - 1
        above, below = sums[:, :wrapped], sums[:, wrapped:]
        above = -above if self.structure == "skew" else above
        return functional.pad(below, (0, size - below.shape[1])) + functional.pad(above, (size - wrapped, 0))

    def extra_repr(self) -> str:
        """Sizes and structure."""
        block = "" if self.block is None else f", block={self.block}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, structure={self.structure!r}{block}, bias={self.bias is not None}"


class Diagonal(Unscripted, nn.Module):
    """``d ⊙ x + b``: a factor for each entry of the last axis, the same at all positions; ``K = max|d|``, ``Δ_d = GX``.

    Between circulant layers it makes what they cannot: products of ``2n - 1`` of both kinds are dense in all matrices
    (Huhtanen and Perämäki, "Factoring matrices into the product of circulant and diagonal matrices", 2015).

    Args:
        features: size of the last axis.
        bias: whether there is a ``b``.

    Attributes:
        weight: ``d``, random signs at first.

    Shape:
        ``(B, ..., features)`` to the same shape; ``weight`` and ``bias`` are ``(features,)``.

    Raises:
        ConfigurationError: the size is not positive.
    """

    def __init__(self, features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.features = features = whole("features", features)
        self.weight = nn.Parameter(1.0 - 2.0 * torch.randint(2, (features,)).to(torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, values: Tensor) -> Tensor:
        """Multiplies entry by entry."""
        if values.shape[-1] != self.features:
            raise ConfigurationError(f"expected {self.features} entries on the last axis, got {tuple(values.shape)}")
        scaled = values * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def coefficients(self, values: Tensor, cotangents: Tensor) -> Tensor:
        """Each sample's gradient of the weight: ``(B, T, n)`` twice to ``(B, n)``."""
        return (values * cotangents).sum(1)

    def extra_repr(self) -> str:
        """Size."""
        return f"features={self.features}, bias={self.bias is not None}"


def _turn(points: int, *, skew: bool) -> Tensor:
    angles = torch.arange(points, dtype=torch.float64) * (-math.pi / points if skew else 0.0)
    return torch.polar(torch.ones_like(angles), angles)


class _Gated(torch.autograd.Function):
    """A layer whose few parameters' gradients are formed for each sample, and gated; the input's is the usual one."""

    @staticmethod
    def forward(
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Any,
        gate: Gate,
        bias_gate: Gate,
        joint: bool,
        *counters: Tensor | None,
    ) -> Tensor:
        return cast(Tensor, layer.plain(values))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weight, _, ctx.layer, ctx.gate, ctx.bias_gate, ctx.joint, *_ = inputs
        ctx.save_for_backward(values, weight)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        values, weight = ctx.saved_tensors
        passed = ctx.layer.returned(cotangents) if ctx.needs_input_grad[0] else None
        arrived = cotangents.unsqueeze(1) if cotangents.dim() == 2 else cotangents.flatten(1, -2)
        arrived, sizes = zeroed_rows(arrived)
        of_weight: Part | None = None
        of_bias: Part | None = None
        if ctx.needs_input_grad[1]:
            met, lengths = zeroed_rows(values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2))
            rows = ctx.layer.coefficients(met, arrived)
            of_weight = Rows(rows.flatten(1), weight.shape, lengths * sizes)
            # Nothing came back where no cotangent did, whatever the values are.
            of_weight.present = sizes
        if ctx.needs_input_grad[2]:
            of_bias = Rows(arrived.sum(1), (arrived.shape[2],), sizes if arrived.shape[1] > 1 else None)
        gates = ctx.gate, ctx.bias_gate
        sums, counts = gated_pair((of_weight, of_bias), gates, joint=ctx.joint, counted=ctx.needs_input_grad[7:])
        return passed, *sums, *([None] * 4), *counts


class GradientGatedStructuredLinear(GradientGated, StructuredLinear):
    """:class:`StructuredLinear` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""

    def plain(self, values: Tensor) -> Tensor:
        """As the plain layer, without the gates."""
        return StructuredLinear.forward(self, values)

    def returned(self, cotangents: Tensor) -> Tensor:
        """What goes back to the input."""
        return cotangents @ self.matrix()

    def forward(self, values: Tensor) -> Tensor:
        """As the plain layer."""
        return applied(_Gated, values, self.weight, self.bias, self, *self.gates(), self.joint, *self.counters())

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"


class GradientGatedDiagonal(GradientGated, Diagonal):
    """:class:`Diagonal` behind gradient gates; made by :func:`clipless_dp.gradient_gated`."""

    def plain(self, values: Tensor) -> Tensor:
        """As the plain layer, without the gates."""
        return Diagonal.forward(self, values)

    def returned(self, cotangents: Tensor) -> Tensor:
        """What goes back to the input."""
        return cotangents * self.weight

    def forward(self, values: Tensor) -> Tensor:
        """As the plain layer."""
        return applied(_Gated, values, self.weight, self.bias, self, *self.gates(), self.joint, *self.counters())

    def extra_repr(self) -> str:
        """The layer's and the gate's settings."""
        return f"{super().extra_repr()}, {self.gate_repr()}"


register_gated_form(StructuredLinear, GradientGatedStructuredLinear)
register_gated_form(Diagonal, GradientGatedDiagonal)
