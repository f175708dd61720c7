"""Layer centering."""

from __future__ import annotations

from torch import Tensor, nn


class LayerCentering(nn.Module):
    """Subtracts each sample's own mean over the given axes: an orthogonal projection, hence 1-Lipschitz.

    Args:
        dims: axes of the mean, none of them the batch; ``None`` means all of them. ``(-2, -1)`` centers each
            channel of a map by itself.

    Shape:
        ``(B, ...)`` to the same shape.
    """

    def __init__(self, dims: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, values: Tensor) -> Tensor:
        """Subtracts the mean."""
        dims = tuple(range(1, values.dim())) if self.dims is None else self.dims
        return values - values.mean(dims, keepdim=True)

    def extra_repr(self) -> str:
        """The axes."""
        return f"dims={self.dims}"
