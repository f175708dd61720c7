"""Synthetic images that no photograph entered: opaque shapes of all sizes that hide each other."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from clipless_dp.arguments import whole
from clipless_dp.errors import ConfigurationError

VERSION: Final = "dead leaves 1"
"""Of what is drawn: another recipe has another one, and refuses what was made with this one."""

_BLOCK = 50
"""Images from one generator: so the first ones are the same, however many are asked for."""

_MOST_SHAPES = 40
_COLOURS = 5


def dead_leaves(
    count: int, image_size: tuple[int, int], channels: int = 3, *, seed: int = 0, progress: bool = True
) -> Tensor:
    """Draws images of the dead leaves model, for what photographs would be used for if they cost no privacy.

    Opaque shapes of random places, angles, outlines and colours hide each other (Matheron 1968); with areas that make
    all scales alike their statistics are much as those of natural images (Lee, Mumford and Huang 2001, "Occlusion
    models for natural images"), and networks trained on them learn features of use (Baradad et al. 2021, "Learning to
    see by looking at noise"). Here: 3 to 39 ellipses, rectangles, waved outlines and bars with radii of density
    ``r⁻²`` between 0.04 and 0.6 of the image; five colours an image, whose hues are alike; on each shape a gradient,
    ``1/f`` noise, and sometimes stripes; edges and images of random sharpness. Drawn at twice the size and averaged.

    The same arguments make the same images on one version of torch, up to rounding; the first ``n`` of more are those
    of ``count=n``.

    Args:
        count: how many, ``N``.
        image_size: height and width; of images that are not square the middle of a square one.
        channels: 3 for red, green and blue; 1 for their mean.
        seed: of the generators, at least 0.
        progress: whether a bar is shown at a terminal.

    Returns:
        ``(N, channels, H, W)``, uint8.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    count, seed = whole("count", count), whole("seed", seed, 0)
    height, width = (whole("image_size", size) for size in image_size)
    if channels not in (1, 3):
        raise ConfigurationError(f"synthetic images have 1 channel or 3, got channels={channels!r}")
    side = max(height, width)
    images = _drawn(count, side, seed, bool(progress))
    top, left = (side - height) // 2, (side - width) // 2
    images = images[:, :, top : top + height, left : left + width]
    return images.clone() if channels == 3 else images.float().mean(1, keepdim=True).round().byte()


@lru_cache(maxsize=2)
def _drawn(count: int, side: int, seed: int, progress: bool) -> Tensor:
    """Square colour images ``(N, 3, side, side)``."""
    blocks = []
    with tqdm(total=count, disable=None if progress else True, unit="image", desc="dead leaves") as bar:
        for block in range(-(-count // _BLOCK)):
            generator = torch.Generator().manual_seed((seed << 24) + block)
            blocks.append(_Painter(2 * side, generator).images().mul(255.0).round().byte())
            bar.update(min(_BLOCK, count - block * _BLOCK))
    return torch.cat(blocks)[:count]


class _Painter:
    """Draws a block of images ``(B, 3, n/2, n/2)`` in [0, 1].

    Numbers are drawn for all images of the block, shapes and textures for those that have them only.
    """

    def __init__(self, side: int, generator: torch.Generator) -> None:
        self.side, self.generator = side, generator
        axis = (torch.arange(side) + 0.5) / side
        self.down, self.right = axis[:, None], axis[None, :]
        down, right = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)
        # The constant part gets the amplitude of the longest wave.
        self.amplitudes = torch.hypot(down, right).clamp(min=1.0 / side).reciprocal()
        self.palettes = self._palettes()

    def images(self) -> Tensor:
        """The block."""
        everywhere = torch.arange(_BLOCK)
        images = self._surfaces(everywhere)
        shapes = (3 + self._uniform() * (_MOST_SHAPES - 3)).long()
        for number in range(int(shapes.max())):
            painted = everywhere[shapes > number]
            covered = self._outlines(painted)
            surfaces = self._surfaces(painted)
            images[painted] = torch.lerp(images[painted], surfaces, covered[:, None])
        images = functional.avg_pool2d(images, 2)
        blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return torch.lerp(images, blurred, 0.7 * self._uniform()[:, None, None, None]).clamp(0.0, 1.0)

    def _uniform(self, *more: int) -> Tensor:
        return torch.rand(_BLOCK, *more, generator=self.generator)

    def _normal(self, *more: int) -> Tensor:
        return torch.randn(_BLOCK, *more, generator=self.generator)

    def _palettes(self) -> Tensor:
        """Colours ``(B, 5, 3)``: any lightness, and hues about one of the image's own."""
        lightness = self._uniform(_COLOURS)
        first, second = (
            0.08 * self._normal(1, 2) + 0.2 * self._normal(_COLOURS, 2) * self._uniform(1, 1)
        ).unbind(-1)  # fmt: skip
        across, along = first / math.sqrt(2.0), second / math.sqrt(6.0)
        return torch.stack([lightness + across + along, lightness - 2.0 * along, lightness - across + along], -1)

    def _surfaces(self, painted: Tensor) -> Tensor:
        """A colour with a gradient, noise and stripes on it, ``(b, 3, n, n)``."""

        def each(values: Tensor) -> Tensor:
            return values[painted, None, None]

        chosen = (_COLOURS * self._uniform()).long()
        colours = self.palettes[torch.arange(_BLOCK), chosen] + 0.05 * self._normal(3)
        turn = 2.0 * math.pi * self._uniform()
        slope = 0.35 * self._normal()
        surface = each(turn.cos() * slope) * (self.right - 0.5) + each(turn.sin() * slope) * (self.down - 0.5)
        noise = torch.randn(len(painted), self.side, self.side, generator=self.generator)
        pink = torch.fft.irfft2(torch.fft.rfft2(noise) * self.amplitudes, s=(self.side, self.side))
        surface += pink * (each(0.15 * self._uniform().square()) / pink.std((1, 2), keepdim=True))
        wave, phase, turn = (2.0 + 14.0 * self._uniform()) * 2.0 * math.pi, self._uniform(), math.pi * self._uniform()
        contrast = 0.15 * self._uniform() * (self._uniform() < 0.2)
        striped = contrast[painted] > 0
        some = painted[striped]
        if len(some):
            angles = (wave * turn.cos())[some, None, None] * self.right + (wave * turn.sin())[
                some, None, None
            ] * self.down
            surface[striped] += (angles + 2.0 * math.pi * phase[some, None, None]).sin_() * contrast[some, None, None]
        return colours[painted, :, None, None] + surface[:, None]

    def _outlines(self, painted: Tensor) -> Tensor:
        """How much of each pixel one shape covers, ``(b, n, n)``."""

        def each(values: Tensor) -> Tensor:
            return values[painted, None, None]

        smallest, largest = 0.04, 0.6
        radius = 1.0 / (1.0 / smallest + (1.0 / largest - 1.0 / smallest) * self._uniform())
        across, down = (each(1.2 * self._uniform() - 0.1) for _ in range(2))
        turn, stretch = 2.0 * math.pi * self._uniform(), (0.25 * self._normal()).exp()
        kind, waves = self._uniform(), 2.0 + (5.0 * self._uniform()).floor()
        depth, phase = 0.3 * self._uniform(), 2.0 * math.pi * self._uniform()
        softness = 0.004 + 0.04 * self._uniform() ** 3
        right, below = self.right - across, self.down - down
        along = (each(turn.cos()) * right + each(turn.sin()) * below) / each(stretch)
        beside = (each(turn.cos()) * below - each(turn.sin()) * right) * each(stretch)
        distance = torch.hypot(along, beside)
        kind = kind[painted]
        box, waved, bar = (kind >= 0.35) & (kind < 0.6), (kind >= 0.6) & (kind < 0.85), kind >= 0.85
        distance[box] = torch.maximum(along[box].abs(), beside[box].abs())
        angle = torch.atan2(beside[waved], along[waved])
        outline = (each(waves)[waved] * angle + each(phase)[waved]).cos_() * each(depth)[waved] + 1.0
        distance[waved] /= outline
        distance[bar] = torch.maximum(0.3 * along[bar].abs(), 2.5 * beside[bar].abs())
        return ((each(radius) - distance) / each(softness) + 0.5).clamp_(0.0, 1.0)
