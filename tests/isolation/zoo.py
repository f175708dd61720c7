"""Small networks of the kinds that practitioners bring, with inputs for them; no two samples of a batch are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import layers

ROWS = 5
TOKENS = 7
WORDS = 23
WIDTH = 8


class Case(NamedTuple):
    """A network, and a batch of inputs for it."""

    net: nn.Module
    inputs: Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]


class Mean(nn.Module):
    """What an encoder of tokens makes of its input, averaged."""

    def __init__(self, encoder: nn.Module, first: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.encoder = encoder
        self.head = nn.Linear(WIDTH, 3)
        self.first = first

    def forward(self, tokens: Tensor) -> Tensor:
        made = self.encoder(self.table(tokens))
        return self.head((made[0] if self.first else made).mean(1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        made, _ = self.attention(values, values, values, need_weights=False)
        return values + made


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=WIDTH, vdim=WIDTH)
        self.asks = nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, values: Tensor) -> Tensor:
        made, _ = self.attention(self.asks.expand(len(values), -1, -1), values, values)
        return made


class ByHand(nn.Module):
    """Attention, positions, a class token and a temperature, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(1, TOKENS + 1, WIDTH))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.mix = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / WIDTH**0.5)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, values: Tensor) -> Tensor:
        values = torch.cat((self.token.expand(values.shape[0], -1, -1), values), 1) + self.positions
        query, key, value = (values @ self.mix).chunk(3, -1)
        return torch.softmax(query @ key.mT * self.temperature, -1) @ value


class Tied(nn.Module):
    """A language model whose head is its table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.RMSNorm(WIDTH))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.table(tokens)).mean(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.Conv2d(4, 2, 3, padding="same")
        self.out = nn.ConvTranspose2d(4, 1, 2)

    def forward(self, maps: Tensor) -> Tensor:
        below = functional.silu(self.norm(self.down(maps)))
        above = self.up(functional.interpolate(below, scale_factor=2, mode="bilinear"))
        return self.out(torch.cat((maps, above), 1)).flatten(1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = Mean(SelfAttention())
        self.numbers = nn.Sequential(nn.Linear(4, 3), nn.Softplus())

    def forward(self, tokens: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        return {"logits": self.words(tokens) * self.numbers(numbers), "other": tokens}


class Masked(nn.Module):
    """Tokens with a mask, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, int]:
        made = self.layer(self.table(input_ids), src_key_padding_mask=attention_mask == 0)
        shares = attention_mask.unsqueeze(-1).to(made.dtype)
        return self.head((made * shares).sum(1) / shares.sum(1)), 0


class Gaps(nn.Module):
    """Layers called more than once, recurrent cells, and weights that are made of others."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.head = nn.Bilinear(WIDTH, WIDTH, 3)

    def forward(self, values: Tensor) -> Tensor:
        state = values.new_zeros(values.shape[0], WIDTH)
        for step in range(3):
            state = self.cell(self.layer(values[:, step]), state)
        return self.head(state, values[:, -1])


class Groups(nn.Module):
    """Group norms of a vector, of one map, and of several maps in one sample, whose affine map is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.GroupNorm(2, WIDTH)
        self.map = nn.GroupNorm(1, 4)
        self.several = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * WIDTH, 3)

    def forward(self, values: Tensor) -> Tensor:
        maps = self.vector(values[:, 0]).unsqueeze(1) + values
        maps = self.map(maps.tanh())
        several = self.several(maps.reshape(-1, 4, WIDTH // 2)).reshape(maps.shape)
        return self.head((several * maps).flatten(1))


def tokens() -> Tensor:
    return torch.randint(WORDS, (ROWS, TOKENS))


def signals(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, dtype=torch.float64)


def masks() -> Tensor:
    lengths = torch.tensor([TOKENS, 3, 5, 1, TOKENS])
    return (torch.arange(TOKENS) < lengths.unsqueeze(1)).long()


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ZOO: dict[str, Callable[[], Case]] = {
    "layer norm, GELU": lambda: Case(
        nn.Sequential(nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, 3)), signals(6)
    ),
    "convex potentials": lambda: Case(
        nn.Sequential(layers.ConvexPotential(6, 4), nn.LayerNorm(6), layers.ConvexPotential(6), nn.Linear(6, 3)),
        signals(6),
    ),
    "convex potentials of tokens": lambda: Case(Mean(layers.ConvexPotential(WIDTH, 5)), tokens()),
    "transformer encoder": lambda: Case(Mean(encoder()), tokens()),
    "norms first": lambda: Case(Mean(encoder(norm_first=True, activation="gelu")), tokens()),
    "self-attention": lambda: Case(Mean(SelfAttention()), tokens()),
    "cross-attention": lambda: Case(Mean(CrossAttention()), tokens()),
    "attention by hand": lambda: Case(Mean(ByHand()), tokens()),
    "tied head": lambda: Case(Tied(), tokens()),
    "LSTM": lambda: Case(Mean(nn.LSTM(WIDTH, WIDTH // 2, 2, batch_first=True, bidirectional=True), True), tokens()),
    "LSTM with projections": lambda: Case(Mean(nn.LSTM(WIDTH, 11, batch_first=True, proj_size=WIDTH), True), tokens()),
    "GRU": lambda: Case(Mean(nn.GRU(WIDTH, WIDTH, batch_first=True), True), tokens()),
    "RNN": lambda: Case(Mean(nn.RNN(WIDTH, WIDTH, 2, batch_first=True, nonlinearity="relu"), True), tokens()),
    "cells, weight norm, bilinear": lambda: Case(Gaps(), signals(TOKENS, WIDTH)),
    "UNet": lambda: Case(UNet(), signals(2, 6, 6)),
    "group norms": lambda: Case(Groups(), 3.0 + signals(4, WIDTH)),
    "Conv1d": lambda: Case(
        nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2, groups=2), nn.Mish(), nn.Flatten(), nn.Linear(12, 3)),
        signals(2, 7),
    ),
    "Conv3d": lambda: Case(
        nn.Sequential(nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 18, 3)),
        signals(1, 6, 4, 5),
    ),
    "frozen batch norm": lambda: Case(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.ELU(), nn.Flatten(), nn.Linear(16, 3)),
        signals(2, 4, 4),
    ),
    "instance norm": lambda: Case(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(36, 3)),
        signals(2, 5, 5),
    ),
    "two inputs": lambda: Case(TwoInputs(), (tokens(), signals(4))),
    "a mask by name": lambda: Case(Masked(), {"input_ids": tokens(), "attention_mask": masks()}),
}
"""Made under a seed of the caller's."""
