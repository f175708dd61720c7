"""Token mixing by linear maps, in place of attention, which has no global Lipschitz constant."""

from __future__ import annotations

from torch import Tensor, nn

from clipless_dp.layers.residual import ConvexResidual
from clipless_dp.layers.sorting import GroupSort


class TokenMixing(nn.Module):
    """Applies a block along the tokens: transposes, applies, transposes back; as Lipschitz as the block.

    It is traced through, so the graph rules bound it.

    Args:
        block: takes ``(B, C, T)``, e.g. ``nn.Linear(T, T)``.

    Shape:
        ``(B, T, C)`` to ``(B, T', C')``, if the block makes ``(B, C', T')``.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, values: Tensor) -> Tensor:
        """Mixes the tokens."""
        mixed: Tensor = self.block(values.transpose(1, 2))
        return mixed.transpose(1, 2)


class Tokens(nn.Module):
    """Pixels as tokens: ``(B, C, H, W)`` to ``(B, H·W, C)``. It is traced through."""

    def forward(self, values: Tensor) -> Tensor:
        """Rearranges the map."""
        return values.flatten(2).transpose(1, 2)


class MixerBlock(nn.Module):
    """An MLP-Mixer block with Lipschitz parts (Tolstikhin et al., "MLP-Mixer", NeurIPS 2021, §2).

    A residual token-mixing MLP, then a residual channel-mixing MLP; GroupSort in place of GELU, convex residuals in
    place of sums, and no LayerNorm: 1-Lipschitz as soon as its four weights have norm at most 1.

    Args:
        tokens: ``T``.
        channels: ``C``.
        hidden_tokens: width of the token-mixing MLP, even; ``2T`` by default.
        hidden_channels: width of the channel-mixing MLP, even; ``2C`` by default.
        alpha: weight of the MLPs in :class:`ConvexResidual`.
        bias: whether the dense layers have biases: their gradients' bound grows with the root of ``T`` and ``C``.

    Shape:
        ``(B, T, C)`` to the same shape.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        hidden_tokens: int | None = None,
        hidden_channels: int | None = None,
        *,
        alpha: float = 0.5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = ConvexResidual(TokenMixing(_mlp(tokens, hidden_tokens, bias)), alpha)
        self.channels = ConvexResidual(_mlp(channels, hidden_channels, bias), alpha)

    def forward(self, values: Tensor) -> Tensor:
        """Mixes tokens, then channels."""
        output: Tensor = self.channels(self.tokens(values))
        return output


def _mlp(features: int, hidden: int | None, bias: bool) -> nn.Sequential:
    width = 2 * features if hidden is None else hidden
    return nn.Sequential(
        nn.Linear(features, width, bias=bias), GroupSort(2, dim=-1), nn.Linear(width, features, bias=bias)
    )
