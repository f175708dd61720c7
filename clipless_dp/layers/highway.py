"""Residual blocks in a row, whose backward pass leaves out the paths that go through many of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from clipless_dp.arguments import shown, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import CotangentGate
from clipless_dp.gates.plain import plain_form
from clipless_dp.layers.noise import NoiseInjection
from clipless_dp.modules import Unscripted

_RANDOM = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    NoiseInjection,
)


class StopGradient(CotangentGate):
    """Identity forwards; backwards nothing comes through: a cotangent gate of limit 0.

    Shape:
        ``(B, ...)`` to the same shape.
    """

    def __init__(self) -> None:
        super().__init__(1e-8)

    def forward(self, values: Tensor) -> Tensor:
        """A copy of the values, which what works in place may overwrite."""
        return values.detach().clone()

    def extra_repr(self) -> str:
        """Nothing."""
        return ""


@plain_form(StopGradient)
def _plain(gate: StopGradient) -> nn.Module:
    return nn.Identity()


class Highway(Unscripted, nn.Module):
    """Residual blocks ``x + f_l(x)``, ``l = 1 … L``, with gradients along paths through at most ``k`` of them.

    The Jacobian of the whole is ``Π(1 + J_l)``: the sum, over all sets of blocks, of the products of their Jacobians
    (Veit, Wilber and Belongie, "Residual networks behave like ensembles of relatively shallow networks", NeurIPS 2016).
    Backwards only products of at most ``k`` are kept (highway back-propagation: Fagnou et al. 2025, without its speed).
    The cotangent that arrives behind block ``l`` is then at most ``G·Σ_{m≤k} C(L-l, m)K^m`` for blocks of constant
    ``K``, where all paths have ``G·(1 + K)^(L-l)``: 11 in place of 1024 for ten blocks, ``K = 1`` and ``k = 1``. Δ
    falls by as much. With ``alpha``, ``(1-α)x + α·f_l(x)``: ``G·Σ_{m≤k} C(L-l, m)(1-α)^(L-l-m)(αK)^m``.

    What is left out is a *bias* of the gradients of all blocks but the last ``k + 1``, and of what is in front of them:
    of cotangents at most ``G·Σ_{m>k} C(L-l, m)K^m``, at any noise, and largest where blocks are far from zero. What is
    computed forwards, and certified of it, is that of all paths.

    It is made of copies of each value, which are equal and through which gradients may go ``0 … k`` more times: nothing
    but sums and stops, that the tracker bounds as it does any graph (docs/bounds.md, "Truncated paths").

    Args:
        blocks: ``f_l``, each of which keeps its input's shape, draws no random numbers and leaves its input as it is.
        paths: ``k``, at least 0; from the number of blocks on nothing is left out.
        alpha: the weight of each block in a convex combination; ``None``: sums.

    Shape:
        ``(B, ...)`` to the same shape.

    Raises:
        ConfigurationError: there is no block, one draws random numbers, or a number is out of range.

    Cost:
        Each block runs up to ``k + 1`` times forwards and backwards. Behind gradient gates each run has a cap of its
        own: ``(k + 1)c``.
    """

    def __init__(self, blocks: Iterable[nn.Module], paths: int = 1, alpha: float | None = None) -> None:
        super().__init__()
        given = [*blocks] if isinstance(blocks, Iterable) else None
        if given is None or not all(isinstance(one, nn.Module) for one in given):
            got = shown(blocks if given is None else given)
            raise ConfigurationError(f"blocks must be a list of modules, got {got}")
        self.blocks = nn.ModuleList(given)
        self.paths = whole("paths", paths, 0)
        if not len(self.blocks):
            raise ConfigurationError("there must be a block at least")
        if alpha is not None and not (isinstance(alpha, (int, float)) and 0.0 <= alpha <= 1.0):
            raise ConfigurationError(f"alpha must lie in [0, 1], got {shown(alpha)}")
        random = [part for part in self.blocks.modules() if isinstance(part, _RANDOM)]
        if random:
            raise ConfigurationError(
                f"a block holds {type(random[0]).__name__}, which would draw other numbers in each copy: put it in "
                "front of the blocks or behind them"
            )
        self.alpha = None if alpha is None else float(alpha)
        self.stop = StopGradient()

    def forward(self, values: Tensor) -> Tensor:
        """Goes through all blocks."""
        count = len(self.blocks)
        # Behind l blocks, copies through whose past gradients may go 0 … k more times; None of those that none needs.
        copies: list[Tensor | None] = [values] * (min(self.paths, count) + 1)
        for index, block in enumerate(self.blocks):
            left = count - 1 - index
            stopped = self.stop(copies[0]) if left >= len(copies) - 1 else None
            entering = [stopped, *copies[:-1]]
            # Copies through whose past no gradient could go more often are one and the same.
            made: dict[tuple[int, int], Tensor] = {}
            following: list[Tensor | None] = []
            for place, (carried, met) in enumerate(zip(copies, entering, strict=True)):
                if carried is None or met is None or place < len(copies) - 1 - left:
                    following.append(None)
                    continue
                pair = id(carried), id(met)
                if pair not in made:
                    made[pair] = self._joined(carried, block(met))
                following.append(made[pair])
            copies = following
        output = copies[-1]
        assert output is not None
        return output

    def _joined(self, carried: Tensor, made: Tensor) -> Tensor:
        if self.alpha is None:
            return carried + made
        return (1.0 - self.alpha) * carried + self.alpha * made

    def extra_repr(self) -> str:
        """Paths and weight."""
        return f"paths={self.paths}" + ("" if self.alpha is None else f", alpha={self.alpha:g}")
