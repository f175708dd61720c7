"""A two-dimensional scattering transform: fixed wavelet filters, moduli and averages, with nothing to learn."""

from __future__ import annotations

import itertools
import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError, InputError

Padding = Literal["zeros", "reflect"]

_MARGIN = 1.0 + 1e-6
"""The filters are shrunk this much further, so that rounding them to float32 never lifts the bank above 1."""


class Scattering2d(nn.Module):
    """Windowed scattering coefficients of orders 0 to 2 (Bruna and Mallat 2013, §2), of each channel by itself.

    With a Gaussian average ``φ`` of width ``2^J`` and Morlet wavelets ``ψ`` at ``J`` scales and ``L`` angles::

        S₀ = x * φ,    S₁ = |x * ψ₁| * φ,    S₂ = ||x * ψ₁| * ψ₂| * φ    with a coarser scale in ψ₂ than in ψ₁,

    sampled at the centre of each block of ``2^J`` pixels. Convolutions are circular, on an image with ``2^J`` pixels or
    more around it, and intermediate results are sampled as coarsely as their scale. Where blocks fill the image, its
    mirror image has the mirrored features, up to aliasing, with the angle ``-l`` in place of ``l``. There are no
    parameters, and no data enters: the features of a sample cost no privacy.

    Args:
        image_size: height and width.
        scales: ``J``.
        angles: ``L``.
        padding: what surrounds the image: ``"zeros"``, or ``"reflect"``: its mirror image, which has no edge at the
            border but counts pixels near it several times.

    Shape:
        ``(B, C, H, W)`` to ``(B, C·K, ⌈H/2^J⌉, ⌈W/2^J⌉)`` with ``K = 1 + JL + L²J(J-1)/2``: the channel ``cK + k``
        is coefficient ``k`` of channel ``c``, where 0 is ``S₀``, then come the ``S₁``, then the ``S₂``.

    Raises:
        ConfigurationError: an argument is out of range, or the image is too small to be reflected.

    Attributes:
        coefficients: ``K``.
        output_size: height and width of what comes out.
        lipschitz: ``c`` with ``‖S(x) - S(y)‖ ≤ c·‖x - y‖`` and ``‖S(x)‖ ≤ c·‖x‖``: 1 with zeros around the image,
            else the root of how often a pixel enters the padded image.

    Why ``c`` bounds it:
        On each grid the bank's Littlewood-Paley sum ``|φ̂(ω)|² + ½Σ(|ψ̂(ω)|² + |ψ̂(-ω)|²)`` is at most 1, because the
        filters are divided by the root of its largest value over all grids. For the real difference ``d`` of two
        images Parseval's identity then gives ``‖d*φ‖² + Σ‖d*ψ‖² ≤ ‖d‖²``. Sampling and moduli expand no distance,
        so the same holds for the differences of the moduli on their own grids; substituting, second order into first
        order, ``‖S(x) - S(y)‖² ≤ ‖d*φ‖² + Σ‖d*ψ‖² ≤ ‖d‖²``. Zeros around the image keep ``‖d‖``.
    """

    def __init__(
        self, image_size: tuple[int, int], scales: int = 2, angles: int = 8, padding: Padding = "zeros"
    ) -> None:
        super().__init__()
        height, width = image_size
        if min(height, width, scales, angles) < 1:
            raise ConfigurationError(
                f"image_size, scales and angles must be positive, got {image_size}, {scales} and {angles}"
            )
        if padding not in ("zeros", "reflect"):
            raise ConfigurationError(f"padding must be 'zeros' or 'reflect', got {padding!r}")
        step = 1 << scales
        self.image_size = (height, width)
        self.scales = scales
        self.angles = angles
        self.padding: Padding = padding
        self.output_size = (-(-height // step), -(-width // step))
        self.coefficients = 1 + scales * angles + angles**2 * scales * (scales - 1) // 2
        # The image starts at pixel 2^J, hence in block 1 of what is sampled.
        self._frame = tuple(side for size in (width, height) for side in self._sides(size))
        if padding == "reflect" and max(self._frame) >= min(height, width):
            raise ConfigurationError(
                f"an image of {height}×{width} is too small to be reflected at {scales} scales: use padding='zeros'"
            )
        self.lipschitz = math.sqrt(math.prod(self._copies(size) for size in image_size))
        grid = (height + sum(self._frame[2:]), width + sum(self._frame[:2]))
        for level, (averages, wavelets) in enumerate(_filter_bank(grid, scales, angles)):
            for name, spectrum, size in zip(("rows", "columns"), averages, self.output_size, strict=True):
                matrix = _sampled_convolution(spectrum, step >> level, 0.5 * (step - 1) / (1 << level))[1 : 1 + size]
                self.register_buffer(f"{name}_{level}", matrix.float(), persistent=False)
            self.register_buffer(f"wavelets_{level}", wavelets.float(), persistent=False)

    def _sides(self, size: int) -> tuple[int, int]:
        """Pixels before and behind an axis: at least ``2^J`` each, and a multiple of it in all."""
        step = 1 << self.scales
        return step, step * (1 - -size // step) - size

    def _copies(self, size: int) -> int:
        """How often the padded image repeats a pixel along an axis of this size, at most."""
        if self.padding == "zeros":
            return 1
        pixels = functional.pad(torch.arange(size, dtype=torch.float64)[None], self._sides(size), mode="reflect")
        return int(torch.bincount(pixels.long().flatten()).max())

    def forward(self, images: Tensor) -> Tensor:
        """Computes the coefficients.

        Raises:
            InputError: the images have another size, or are not of float32 or float64.
        """
        if images.dim() != 4 or tuple(images.shape[2:]) != self.image_size or not images.is_floating_point():
            raise InputError(
                f"expected floating-point images (batch, channels, {self.image_size[0]}, {self.image_size[1]}), got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        if images.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"got images of {images.dtype}, in which torch has no Fourier transform: hand in images.float(), and "
                "round the features afterwards if you want them smaller"
            )
        batch, channels = images.shape[:2]
        if batch * channels == 0:
            return images.new_zeros(batch, channels * self.coefficients, *self.output_size)
        padded = functional.pad(images, self._frame, mode="constant" if self.padding == "zeros" else "reflect")
        pixels = padded.flatten(0, 1)
        orders: list[list[Tensor]] = [[self._averaged(pixels, 0)], [], []]
        for first in range(self.scales):
            moduli = self._moduli(pixels, 0, first)
            orders[1].append(self._averaged(moduli, first))
            for second in range(first + 1, self.scales):
                orders[2].append(self._averaged(self._moduli(moduli, first, second), second))
        rows = [part.reshape(batch, channels, -1, *self.output_size) for order in orders for part in order]
        return torch.cat(rows, 2).flatten(1, 2)

    def mirrored(self, features: Tensor) -> Tensor:
        """Features of the images' mirror images (left and right), from those of the images, up to aliasing.

        Their mean is what both have in common: half as many numbers for data whose labels no mirror changes.

        Args:
            features: ``(B, C·K, h, w)``, as :meth:`forward` returns them, for a width that ``2^J`` divides.

        Raises:
            InputError: the features have another shape.
        """
        if features.dim() != 4 or features.shape[1] % self.coefficients or features.shape[2:] != self.output_size:
            raise InputError(
                f"expected features (batch, channels·{self.coefficients}, {self.output_size[0]}, "
                f"{self.output_size[1]}), got {tuple(features.shape)}"
            )
        scales, angles = self.scales, self.angles
        turned = -torch.arange(angles) % angles
        first = 1 + angles * torch.arange(scales)[:, None] + turned
        pairs = 1 + angles * scales + angles**2 * torch.arange(scales * (scales - 1) // 2)[:, None, None]
        second = pairs + angles * turned[:, None] + turned
        order = torch.cat([torch.zeros(1, dtype=torch.int64), first.flatten(), second.flatten()])
        channels = self.coefficients * torch.arange(features.shape[1] // self.coefficients)
        return features[:, (channels[:, None] + order).flatten()].flip(-1)

    def _moduli(self, pixels: Tensor, level: int, scale: int) -> Tensor:
        """``|u * ψ|`` for the wavelets of one scale, sampled at it: ``(..., m, n)`` to ``(..., L, m', n')``."""
        wavelets = self._filter(f"wavelets_{level}", pixels)[scale - level]
        spectrum = torch.fft.fft2(pixels).unsqueeze(-3)
        moduli: Tensor = torch.fft.ifft2(_filtered(spectrum, wavelets, 1 << (scale - level))).abs()
        return moduli

    def _averaged(self, pixels: Tensor, level: int) -> Tensor:
        """``u * φ`` at the output's positions: the average is a product of one along each axis."""
        rows, columns = (self._filter(f"{axis}_{level}", pixels) for axis in ("rows", "columns"))
        averaged: Tensor = rows @ pixels @ columns.T
        return averaged

    def _filter(self, name: str, like: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, name)).to(like.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"image_size={self.image_size}, scales={self.scales}, angles={self.angles}, padding={self.padding!r}"


class NaturalStandardisation(nn.Module):
    """Standardises scattering coefficients by what they are on random images with the spectrum of natural ones.

    Amplitudes of natural images fall as ``1/f`` (Field 1987). Means and deviations of a transform's coefficients over
    such Gaussian images, of mean ½ and deviation ¼, depend on no data: each is one number for a coefficient, alike for
    all places and channels. Without it the averages of order 0 outweigh all others by far.

    Args:
        transform: whose coefficients are standardised.
        images: how many are drawn.
        seed: of their generator.
        offset: ``c > 0`` takes ``ln(c + u)`` of the averaged moduli ``u``, orders 1 and 2, in place of ``u``: contrast
            then adds to them instead of multiplying them, and strong edges outweigh others less.

    Shape:
        ``(B, C·K, h, w)`` to the same shape.

    Raises:
        ConfigurationError: fewer than two images, or an offset that is not positive.
        InputError: the channels are no multiple of the transform's coefficients.
    """

    def __init__(
        self, transform: Scattering2d, *, images: int = 256, seed: int = 0, offset: float | None = None
    ) -> None:
        super().__init__()
        images = whole("images", images, 2)
        if offset is not None and not 0 < offset < math.inf:
            raise ConfigurationError(f"offset must be a positive number, got {offset!r}")
        self.coefficients = transform.coefficients
        self.offset = offset
        height, width = transform.image_size
        noise = torch.randn(images, 1, height, width, generator=torch.Generator().manual_seed(seed))
        down, right = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
        # The constant part gets the amplitude of the longest wave.
        frequencies = torch.hypot(down, right).clamp(min=1.0 / max(height, width))
        pink = torch.fft.ifft2(torch.fft.fft2(noise) / frequencies).real
        drawn = torch.cat([self._scaled(transform(some)) for some in (0.5 + 0.25 * pink / pink.std()).split(32)])
        deviations, means = torch.std_mean(drawn, dim=(0, 1, 3, 4))
        self.register_buffer("means", means[:, None, None])
        self.register_buffer("deviations", deviations[:, None, None])

    def forward(self, features: Tensor) -> Tensor:
        """Takes logarithms if there is an offset, subtracts the means, divides by the deviations."""
        if features.dim() != 4 or features.shape[1] % self.coefficients:
            raise InputError(
                f"expected features (batch, channels·{self.coefficients}, h, w), got {tuple(features.shape)}"
            )
        means, deviations = (cast(Tensor, part).to(features.dtype) for part in (self.means, self.deviations))
        standardised: Tensor = (self._scaled(features) - means) / deviations
        return standardised.flatten(1, 2)

    def _scaled(self, features: Tensor) -> Tensor:
        """``(B, C·K, h, w)`` to ``(B, C, K, h, w)``, with logarithms of the moduli."""
        coefficients: Tensor = features.unflatten(1, (-1, self.coefficients))
        if self.offset is None:
            return coefficients
        # Averages of moduli are not negative but for rounding and the tails of the average's filter.
        moduli = coefficients[:, :, 1:].clamp(min=0.0).add(self.offset).log()
        return torch.cat([coefficients[:, :, :1], moduli], 2)

    def extra_repr(self) -> str:
        """The number of coefficients, and the offset."""
        return f"coefficients={self.coefficients}, offset={self.offset}"


def littlewood_paley(averages: tuple[Tensor, Tensor], wavelets: Tensor) -> Tensor:
    """``|φ̂(ω)|² + ½Σ(|ψ̂(ω)|² + |ψ̂(-ω)|²)`` of filters with real spectra.

    Args:
        averages: spectra ``(M,)`` and ``(N,)`` of the average along each axis.
        wavelets: ``(..., M, N)``.

    Returns:
        ``(M, N)``; the filters together expand no real image exactly if it is nowhere above 1.
    """
    energy = wavelets.square().flatten(0, -3).sum(0)
    mirrored = energy.flip(0, 1).roll((1, 1), (0, 1))
    return torch.outer(*averages).square() + 0.5 * (energy + mirrored)


def _filter_bank(grid: tuple[int, int], scales: int, angles: int) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Spectra of the filters, which are real, on each grid where they are used.

    Returns:
        For each level ``l ≤ J``: those of the average along each axis, ``(M/2^l,)`` and ``(N/2^l,)``, and those of
        the wavelets of the scales from ``l`` on, ``(J-l, L, M/2^l, N/2^l)``.
    """
    step = 2.0 ** (scales - 1)
    rows, columns = (torch.exp(-0.5 * (0.8 * step * _frequencies(size)) ** 2).sum(1) for size in grid)
    turns = [math.pi * angle / angles for angle in range(angles)]
    wavelets = torch.stack(
        [torch.stack([_morlet(grid, 2.0**scale, turn, 4.0 / angles) for turn in turns]) for scale in range(scales)]
    )
    bank = []
    for level in range(scales + 1):
        averages = (_low_frequencies(rows, level, -1), _low_frequencies(columns, level, -1))
        bank.append((averages, _low_frequencies(_low_frequencies(wavelets[level:], level, -2), level, -1)))
    largest = max(float(littlewood_paley(*filters).max()) for filters in bank[:-1]) * _MARGIN**2
    # Each axis takes half of the average's share.
    return [((rows / largest**0.25, columns / largest**0.25), bands / largest**0.5) for (rows, columns), bands in bank]


def _morlet(grid: tuple[int, int], scale: float, turn: float, slant: float) -> Tensor:
    """Spectrum of ``exp(iξ·u)`` under a Gaussian window, less the window's share that makes the mean zero."""
    centre = (math.cos(turn) * 0.75 * math.pi / scale, math.sin(turn) * 0.75 * math.pi / scale)
    wave = _gaussian(grid, 0.8 * scale, turn, slant, centre)
    window = _gaussian(grid, 0.8 * scale, turn, slant)
    return wave - wave[0, 0] / window[0, 0] * window


def _gaussian(
    grid: tuple[int, int], width: float, turn: float, slant: float, centre: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Spectrum ``(M, N)`` of a sampled Gaussian window of unit integral, moved to a centre frequency.

    Args:
        grid: ``(M, N)``.
        width: standard deviation along the direction ``turn``; across it is ``width/slant``.
        turn: angle.
        slant: as above.
        centre: frequency in radians for each pixel.
    """
    down, right = (_frequencies(size) - part for size, part in zip(grid, centre, strict=True))
    down, right = down[:, None, :, None], right[:, None, :]
    along = math.cos(turn) * down + math.sin(turn) * right
    across = math.cos(turn) * right - math.sin(turn) * down
    return torch.exp(-0.5 * width**2 * (along.square() + (across / slant).square())).sum((-2, -1))


def _frequencies(size: int) -> Tensor:
    """Angular frequencies ``(size, 5)`` that sampling makes one: it repeats a spectrum with period 2π."""
    shifts = torch.arange(-2, 3, dtype=torch.float64)
    frequencies: Tensor = torch.fft.fftfreq(size, dtype=torch.float64)[:, None] + shifts
    return 2.0 * math.pi * frequencies


def _low_frequencies(spectra: Tensor, level: int, axis: int) -> Tensor:
    """The part of spectra that a grid coarser by ``2^level`` along an axis can hold."""
    size = spectra.shape[axis] >> level
    return spectra.index_select(axis, torch.fft.fftfreq(size, 1.0 / size).long() % spectra.shape[axis])


def _sampled_convolution(spectrum: Tensor, step: int, offset: float) -> Tensor:
    """Matrix ``(m/step, m)`` of the circular convolution with an even filter ``(m,)``, at ``offset`` and every
    ``step`` places behind it."""
    size = len(spectrum)
    phases = torch.exp(2j * math.pi * offset * torch.fft.fftfreq(size, dtype=torch.float64))
    kernel: Tensor = torch.fft.ifft(spectrum * phases).real
    positions = torch.arange(size)
    return kernel[(positions[::step, None] - positions) % size]


def _filtered(spectra: Tensor, filters: Tensor, step: int) -> Tensor:
    """Spectra of the convolutions at every ``step``-th pixel: frequencies that these confuse are averaged."""
    height, width = (size // step for size in filters.shape[-2:])
    tiles = itertools.product(
        (slice(height * tile, height * (tile + 1)) for tile in range(step)),
        [slice(width * tile, width * (tile + 1)) for tile in range(step)],
    )
    filters = filters / step**2
    first, *others = tiles
    total = spectra[..., first[0], first[1]] * filters[..., first[0], first[1]]
    for rows, columns in others:
        total.addcmul_(spectra[..., rows, columns], filters[..., rows, columns].to(spectra.dtype))
    return total
