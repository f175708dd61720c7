"""Synthetic handwriting that nobody wrote: random strokes of a pen, on black."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clipless_dp.arguments import shown, whole
from clipless_dp.errors import ConfigurationError

_BLOCK = 50
"""Images from one generator: so the first ones are the same, however many are asked for."""

_MOST: Final = 3
"""Strokes of an image."""

_ALONG = 80
"""Points of a stroke, at which the pen is set down."""

_DISTANCES = 1 << 24
"""From pixels to points of strokes, at once."""

_BOX, _THINNEST, _THICKEST = 20.0 / 28.0, 0.8 / 28.0, 1.6 / 28.0
"""Of the image's shorter side: what is drawn lies in a square of so much, and the pen's width is between these."""


def strokes(count: int, image_size: tuple[int, int], *, seed: int = 0, progress: bool = True) -> Tensor:
    """Draws random pen strokes: what handwritten characters are compared with where those of others are private.

    One to three cubic Bézier curves whose four control points are uniform in a square; one in five is closed, and a
    further one starts with probability 0.6 where the last has ended. As digits of MNIST are, a drawing is scaled to a
    square of 20/28 of the shorter side, its proportions kept, and centred by its mass. A pen of width ``w`` between 0.8
    and 1.6 (where that side is 28) leaves ``min(1, 1.5·exp(-d²/2w²))`` at a distance ``d``. No data enters.

    The same arguments make the same images on one version of torch, up to rounding; the first ``n`` of more are those
    of ``count=n``.

    Args:
        count: how many, ``N``.
        image_size: height and width.
        seed: of the generators, at least 0.
        progress: whether a bar is shown at a terminal.

    Returns:
        ``(N, 1, H, W)``, uint8: ink is 255.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    count, seed = whole("count", count), whole("seed", seed, 0, 1 << 38)
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise ConfigurationError(f"image_size must be (height, width), got {shown(image_size)}")
    height, width = (whole("image_size", size) for size in image_size)
    blocks = []
    with tqdm(total=count, disable=None if progress else True, unit="image", desc="strokes") as bar:
        for block in range(-(-count // _BLOCK)):
            generator = torch.Generator("cpu").manual_seed((seed << 24) + block)
            blocks.append(_drawn(height, width, generator))
            bar.update(min(_BLOCK, count - block * _BLOCK))
    return torch.cat(blocks)[:count]


def _drawn(height: int, width: int, generator: torch.Generator) -> Tensor:
    """One block of images."""
    points, drawn, pen = _curves(generator)
    side = float(min(height, width))
    points = points * side + points.new_tensor([0.5 * height, 0.5 * width])
    pixels = torch.cartesian_prod(*(_axis(size) + 0.5 for size in (height, width)))
    # What is not drawn is far away.
    points = torch.where(drawn[:, :, None, None], points, -1e4).flatten(1, 2)
    # A few images at once: of each, the distances of all pixels from all points.
    some = max(1, _DISTANCES // (pixels.shape[0] * points.shape[1]))
    nearest = [torch.cdist(pixels.expand(len(part), -1, -1), part).amin(2) for part in points.split(some)]
    distance = torch.cat(nearest) / (pen * side)[:, None]
    ink = (1.5 * (-0.5 * distance.square()).exp()).clamp(max=1.0)
    return ink.mul(255.0).round().byte().reshape(_BLOCK, 1, height, width)


def _axis(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float32, device="cpu")


def _curves(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points ``(B, strokes, P, 2)`` in units of the side, from the middle; which strokes are drawn; widths ``(B,)``."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(_BLOCK, *shape, generator=generator, dtype=torch.float32, device="cpu")

    drawn = _axis(_MOST) <= (_MOST * uniform(1)).floor()
    pen = _THINNEST + (_THICKEST - _THINNEST) * uniform()
    ends = uniform(_MOST, 4, 2)
    joined, closed = uniform(_MOST) < 0.6, uniform(_MOST) < 0.2
    for stroke in range(_MOST):
        if stroke:
            ends[:, stroke, 0] = torch.where(joined[:, stroke, None], ends[:, stroke - 1, 3], ends[:, stroke, 0])
        ends[:, stroke, 3] = torch.where(closed[:, stroke, None], ends[:, stroke, 0], ends[:, stroke, 3])
    t = torch.linspace(0.0, 1.0, _ALONG, dtype=torch.float32, device="cpu")
    shares = torch.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    points = torch.einsum("kp,bskc->bspc", shares, ends)
    seen = drawn[:, :, None, None]
    low = torch.where(seen, points, torch.inf).amin((1, 2), keepdim=True)
    high = torch.where(seen, points, -torch.inf).amax((1, 2), keepdim=True)
    points = (points - low) * (_BOX / (high - low).amax(3, keepdim=True))
    # The pen leaves as much on a way as it is long: each point stands for the way to the next.
    steps = points.diff(dim=2).norm(dim=3, keepdim=True) * seen
    middles = 0.5 * (points[:, :, 1:] + points[:, :, :-1])
    mass = (steps * middles).sum((1, 2), keepdim=True) / steps.sum((1, 2), keepdim=True)
    return points - mass, drawn, pen
