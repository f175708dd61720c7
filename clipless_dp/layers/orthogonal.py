"""Orthogonal convolutions as plain torch modules: an explicit kernel, and nothing that gradients flow through."""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError

ConvolutionT = TypeVar("ConvolutionT", nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_IMPORTED = (nn.Linear, *_CONVOLUTIONS)


@torch.no_grad()
def orthogonal_(convolution: ConvolutionT, generator: torch.Generator | None = None) -> ConvolutionT:
    """Gives a convolution a random orthogonal kernel, in place.

    A matrix with orthonormal rows or columns follows ``k - 1`` two-tap convolutions ``[P, I - P]`` for each axis, ``P``
    a random projector of half the rank: each is orthogonal, hence their composition, a ``k``-tap kernel (Xiao et al.,
    "Dynamical isometry and a mean field theory of CNNs", ICML 2018; Li et al., "Preventing gradient attenuation in
    Lipschitz constrained convolutional networks", NeurIPS 2019). At stride ``s`` it is composed of a ``k - s + 1``-tap
    kernel at stride 1 and an orthogonal matrix on windows of ``s`` (Boissin et al., "An adaptive orthogonal convolution
    scheme for efficient and flexible CNN architectures", 2025). Groups get kernels of their own.

    All its singular values on a circle of at least the kernel's reach are 1, to the rounding of the weight's dtype,
    where either the outputs are no more than the inputs times ``s²``, or that many divide them, or windows do not
    overlap; so are those of the zero-padded layer, but where windows reach over the border. Keep it so by
    :class:`clipless_dp.constraints.OrthogonalConvolution`.

    Args:
        convolution: of one or two axes, transposed or not, of any stride, dilation and groups.
        generator: source of the random numbers; torch's own by default.

    Returns:
        The same module; its bias is left alone.

    Raises:
        ConfigurationError: it is no such convolution.
    """
    if type(convolution) not in _CONVOLUTIONS:
        raise ConfigurationError(
            f"orthogonal_ takes an nn.Conv1d, nn.Conv2d or one of their transposes, got {type(convolution).__name__}"
        )
    weight, groups = convolution.weight, convolution.groups
    rows, columns, taps = weight.shape[0] // groups, weight.shape[1], list(weight.shape[2:])
    strides = [
        step // math.gcd(step, apart) for step, apart in zip(convolution.stride, convolution.dilation, strict=True)
    ]
    kernels = [_orthogonal_kernel(rows, columns, taps, strides, generator) for _ in range(groups)]
    weight.copy_(torch.cat(kernels))
    return convolution


def _orthogonal_kernel(
    rows: int, columns: int, taps: list[int], strides: list[int], generator: torch.Generator | None
) -> Tensor:
    """``(rows, columns, *taps)`` in float64: windows without overlap after a kernel of stride 1."""
    outer = [min(count, step) for count, step in zip(taps, strides, strict=True)]
    between = max(columns, rows // math.prod(outer))
    kernel = _semi_orthogonal(between, between, generator)[:, :columns].reshape(between, columns, *[1] * len(taps))
    for axis, (count, last) in enumerate(zip(taps, outer, strict=True), start=2):
        for index in range(count - last):
            basis = _semi_orthogonal(between, (between + index % 2) // 2, generator)
            near = torch.tensordot(basis @ basis.mT, kernel, 1)
            nothing = torch.zeros_like(kernel.narrow(axis, 0, 1))
            kernel = torch.cat((near, nothing), axis) + torch.cat((nothing, kernel - near), axis)
    windows = _semi_orthogonal(rows, between * math.prod(outer), generator).reshape(rows, between, *outer)
    # The composition's taps: Σ_a windows[a]·kernel[t - a].
    composed = torch.zeros(rows, columns, *taps, dtype=torch.float64)
    for place in torch.cartesian_prod(*[torch.arange(size) for size in outer]).reshape(-1, len(outer)).tolist():
        spot: tuple[Any, ...] = (..., *place)
        span: tuple[Any, ...] = (..., *[slice(at, at + size) for at, size in zip(place, kernel.shape[2:], strict=True)])
        composed[span] += torch.tensordot(windows[spot], kernel, 1)
    return composed


def _semi_orthogonal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A random matrix with orthonormal rows, or columns where these are fewer."""
    matrix = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator)
    basis, triangle = torch.linalg.qr(matrix)
    # Uniform only with the signs of a unique decomposition.
    basis = torch.mul(basis, triangle.diagonal().sign())
    return basis if rows >= columns else basis.mT


def from_orthogonium(module: nn.Module) -> nn.Module:
    """A copy of a network in which layers of the ``orthogonium`` package are plain torch layers.

    Each linear layer or convolution keeps its settings and bias, and gets as its weight the explicit kernel that its
    parametrisation has produced. The gradient no longer flows through that parametrisation, which would amplify it
    without a bound; a constraint keeps the kernel orthogonal in its place.

    Args:
        module: a layer, or a network that holds some.

    Raises:
        ConfigurationError: no such layer is in it.
    """
    found = 0

    def plain(layer: nn.Module) -> nn.Module:
        nonlocal found
        if any(kind.__module__.partition(".")[0] == "orthogonium" for kind in type(layer).__mro__):
            base = next((kind for kind in type(layer).__mro__ if kind in _IMPORTED), None)
            if base is not None:
                found += 1
                return _explicit(layer, base)
        for name, child in layer.named_children():
            setattr(layer, name, plain(child))
        return layer

    network = plain(copy.deepcopy(module))
    if not found:
        raise ConfigurationError(
            "no convolution or linear layer of orthogonium was found; pass what AdaptiveOrthoConv2d(...) returns"
        )
    return network


def _explicit(layer: Any, base: type[Any]) -> nn.Module:
    names = ["in_features", "out_features"]
    if base is not nn.Linear:
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
        names += ["padding_mode", "output_padding"][: 2 if "Transpose" in base.__name__ else 1]
    weight = layer.weight.detach()
    settings = {name: getattr(layer, name) for name in names}
    made: nn.Module = base(**settings, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.get_parameter("weight").copy_(weight)
        if layer.bias is not None:
            made.get_parameter("bias").copy_(layer.bias)
    return made.train(layer.training)


def adaptive_orthogonal_conv2d(in_channels: int, out_channels: int, kernel_size: int, **settings: Any) -> nn.Conv2d:
    """A plain convolution that starts as ``orthogonium``'s adaptive orthogonal convolution (AOC).

    Args:
        in_channels: as in ``nn.Conv2d``.
        out_channels: as in ``nn.Conv2d``.
        kernel_size: one integer.
        settings: the other arguments of ``AdaptiveOrthoConv2d``: stride, padding, dilation, groups, bias, padding_mode.

    Raises:
        ConfigurationError: the package is not installed, or no such convolution exists.
    """
    try:
        from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
    except ImportError as error:
        raise ConfigurationError(
            "orthogonium is not installed: pip install 'clipless-dp[orthogonal]', or use layers.orthogonal_ on a plain "
            "convolution"
        ) from error
    try:
        layer = AdaptiveOrthoConv2d(in_channels, out_channels, kernel_size, **settings)
    except ValueError as error:
        raise ConfigurationError(f"orthogonium refuses this convolution: {error}") from error
    made = from_orthogonium(layer)
    assert isinstance(made, nn.Conv2d)
    return made
