"""A network of patches that are mixed by dense layers."""

from __future__ import annotations

from torch import nn

from clipless_dp.architectures.parts import image_size, isometric_, patch_of, patches, require_positive
from clipless_dp.layers import MixerBlock, Tokens


def mixer(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    channels: int = 64,
    depth: int = 2,
    patch_size: int | None = None,
    alpha: float = 0.5,
) -> nn.Sequential:
    """Patches, mixer blocks, and a dense layer (Tolstikhin et al., "MLP-Mixer", NeurIPS 2021, with
    :class:`~clipless_dp.layers.MixerBlock`).

    Every weight's Δ is at most ``GX``, within a block ``α·GX``: patches do not overlap, and dense weights share their
    bound among tokens. No layer but the last has a bias, whose Δ would grow with the number of tokens.

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of outputs.
        channels: entries of each token.
        depth: number of blocks.
        patch_size: side of a patch; by default such that there are at most 8 in a row.
        alpha: weight of the mixing in each block.

    Raises:
        ConfigurationError: a size or ``alpha`` is out of range.
    """
    colours, height, width = image_size(input_shape)
    patch = patch_of(height, width) if patch_size is None else patch_size
    require_positive(classes=classes, channels=channels, depth=depth, patch_size=patch)
    entry, (rows, columns) = patches(colours, channels, (height, width), patch)
    tokens = rows * columns
    blocks = [MixerBlock(tokens, channels, alpha=alpha, bias=False) for _ in range(depth)]
    return isometric_(nn.Sequential(entry, Tokens(), *blocks, nn.Flatten(), nn.Linear(tokens * channels, classes)))
