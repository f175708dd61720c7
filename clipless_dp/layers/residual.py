"""Residual blocks around any module that keeps its input's shape.

They are traced through, so the graph rules bound them; only :class:`SigmoidMix` holds a parameter and has its own rule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError


class Residual(nn.Module):
    """``x + f(x)``; Lipschitz constant ``1 + K_f``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, values: Tensor) -> Tensor:
        """Adds the block's output to its input."""
        output: Tensor = values + self.block(values)
        return output


class ConcatResidual(nn.Module):
    """``x`` and ``f(x)`` one after the other along an axis; ``Y = (X² + Y_f²)^½``, and ``1 + K_f`` bounds its constant.

    Args:
        block: ``f``; what it returns fits to its input on all other axes.
        dim: the axis, not the batch's; 1 is that of channels.

    Shape:
        ``(B, C, ...)`` to ``(B, C + C', ...)``.
    """

    def __init__(self, block: nn.Module, dim: int = 1) -> None:
        super().__init__()
        if dim == 0:
            raise ConfigurationError("dim=0 is the batch axis, along which samples would be joined; use dim=1")
        self.block = block
        self.dim = dim

    def forward(self, values: Tensor) -> Tensor:
        """Joins the input and the block's output."""
        return torch.cat([values, self.block(values)], self.dim)

    def extra_repr(self) -> str:
        """The axis."""
        return f"dim={self.dim}"


class ConvexResidual(nn.Module):
    """``(1-α)·x + α·f(x)`` with a fixed ``α`` in [0, 1]; 1-Lipschitz when ``f`` is.

    Args:
        block: ``f``.
        alpha: the weight of the block.

    Raises:
        ConfigurationError: ``alpha`` is outside [0, 1].
    """

    def __init__(self, block: nn.Module, alpha: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"alpha must lie in [0, 1], got {alpha}")
        self.block = block
        self.alpha = float(alpha)

    def forward(self, values: Tensor) -> Tensor:
        """The convex combination."""
        output: Tensor = (1.0 - self.alpha) * values + self.alpha * self.block(values)
        return output

    def extra_repr(self) -> str:
        """The weight of the block."""
        return f"alpha={self.alpha:g}"


class SigmoidMix(nn.Module):
    """``(1-α)·a + α·b`` with a learnable ``α = sigmoid(logit)``.

    Args:
        logit: where ``logit`` starts.

    Shape:
        Two tensors ``(B, ...)`` of one shape to the same shape; ``logit`` is a scalar.
    """

    def __init__(self, logit: float = 0.0) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(float(logit)))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Mixes the two."""
        # Not 1 - α, which cancels where α is nearly 1 and would then exceed what the rule says of it.
        return torch.sigmoid(-self.logit) * first + torch.sigmoid(self.logit) * second


class GatedResidual(nn.Module):
    """``(1-α)·x + α·f(x)`` with a learnable ``α = sigmoid(logit)``; 1-Lipschitz when ``f`` is.

    Args:
        block: ``f``.
        logit: where ``logit`` starts; 0 weighs both parts alike, -2 makes it nearly the identity.
    """

    def __init__(self, block: nn.Module, logit: float = 0.0) -> None:
        super().__init__()
        self.block = block
        self.mix = SigmoidMix(logit)

    def forward(self, values: Tensor) -> Tensor:
        """The convex combination."""
        output: Tensor = self.mix(values, self.block(values))
        return output
