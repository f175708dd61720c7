"""The networks that benchmarks time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class MeanOfTokens(nn.Module):
    """``(B, T, K)`` to ``(B, K)``."""

    def forward(self, values: Tensor) -> Tensor:
        """The mean."""
        return values.mean(1)


def network(kind: str) -> nn.Sequential:
    """A network for 28×28 images in ten classes, with the same weights at each call.

    Args:
        kind: ``"mlp"``: 784-512-512-10; ``"wide"``: 784-2048-2048-10; ``"cnn"``: the convolutional one of
            ``benchmarks/accuracy.py``; ``"cnn5"``: convolutions of 5×5 in steps of one, 1→16 at 28×28 and 16→32
            at 14×14; ``"vgg"``: of 3×3, 1→64→64 at 28×28 and 64→128→128 at 14×14; ``"mlp-256x3"``: three hidden
            layers of 256; ``"cnn-16x3"``: three convolutions of 16 channels, at 14×14; ``"tokens-256x3x16"``: three
            layers of 256 on each of 16 tokens, which are the image's pixels in turn, and one on their mean.
    """
    torch.manual_seed(0)
    if kind in ("cnn5", "vgg"):
        blocks, taps, width = (([16], [32]), 5, 32) if kind == "cnn5" else (([64, 64], [128, 128]), 3, 256)
        layers: list[nn.Module] = []
        channels = 1
        for block in blocks:
            for outputs in block:
                layers += [nn.Conv2d(channels, outputs, taps, padding=taps // 2, bias=False), nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        head = [nn.Flatten(), nn.Linear(49 * channels, width), nn.ReLU(), nn.Linear(width, 10)]
        return nn.Sequential(*layers, *head)
    family, _, size = ("mlp-2048x2" if kind == "wide" else kind).partition("-")
    if family == "mlp":
        width, depth = map(int, (size or "512x2").split("x"))
        widths = [784, *[width] * depth]
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
    if family == "tokens":
        width, depth, tokens = map(int, size.split("x"))
        widths = [784 // tokens, *[width] * depth]
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        cut = nn.Flatten(), nn.Unflatten(1, (tokens, 784 // tokens))
        return nn.Sequential(*cut, *hidden, MeanOfTokens(), nn.Linear(width, 10))
    if size:
        width, depth = map(int, size.split("x"))
        maps = [nn.Conv2d(1, width, 5, stride=2, padding=2, bias=False), nn.ReLU()]
        for _ in range(depth - 1):
            maps += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU()]
        return nn.Sequential(
            *maps, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(49 * width, 32), nn.ReLU(), nn.Linear(32, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(32 * 16, 32, bias=False),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
