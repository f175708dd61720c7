"""Whitening by what features are on synthetic images, and features joined: vectors of unit norm for a linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.arguments import positive, share, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features import leaves
from clipless_dp.features.frozen import Composed, FrozenFeatures, in_batches
from clipless_dp.features.leaves import dead_leaves
from clipless_dp.features.recipes import Recipe

VERSION: Final = f"whitening 1, {leaves.VERSION}"
"""Of how the directions are found and used."""

_MORE = 100
"""Directions that are iterated beyond those that are kept, which makes these precise."""

_PASSES = 4
_LEAST = 1e-6
"""Of the largest variance: smaller ones are rounding."""

_ROWS = 256
_SHORT = 1e-6


class SyntheticWhitening(Recipe, Composed):
    """Features less their synthetic mean, shrunk along the directions in which synthetic images differ most.

    With the mean ``s̄`` of a module's features over :func:`dead_leaves` images, and the second moments of their
    directions ``(f - s̄)/‖f - s̄‖``, of eigenvalues ``λ₁ ≥ λ₂ ≥ …`` and eigenvectors ``vᵢ``, a sample's features become::

        u = (f - s̄)/‖f - s̄‖,    w = u + Σᵢ ((λᵢ/λₙ)^(-p) - 1)·⟨vᵢ, u⟩·vᵢ  for i < n,    w/‖w‖

    Exponent 0 is no whitening, ½ a full one of ``n`` directions; between, directions in which all images vary keep more
    than others do. A linear layer behind it learns the directions of small variance sooner, with the same noise. What
    images have in common does not depend on the data, so that no data need enter: the images are drawn here, and none
    can be given. Features of a sample cost no privacy, and depend on no other sample.

    Args:
        features: module that takes images ``(B, C, H, W)`` with pixels in [0, 1] and returns ``(B, ...)``; it is put
            into evaluation mode and its parameters are frozen. No private data may have entered it.
        image_size: height and width.
        channels: 3 or 1.
        exponent: ``p`` in [0, ½].
        directions: ``n``, at most; fewer where features or images have fewer.
        images: how many are drawn, at least 3.
        seed: of the images, and of the start of the iteration that finds the directions; public.
        state: ``state_dict()`` of one that was made with the same arguments, its module's included: nothing is drawn.
        progress: whether bars are shown at a terminal.

    Shape:
        ``(B, C, H, W)`` to ``(B, D)`` for ``D`` numbers of a sample, of unit norm, or 0 where ``f = s̄``.

    Raises:
        ConfigurationError: an argument is out of range, or the features of all synthetic images are alike.
        InputError: the features are of another length.
        PrivacyError: see :meth:`clipless_dp.features.FrozenFeatures.compute`.
        CheckpointError: the state is of another recipe or of other arguments, has numbers that are not finite, or does
            not fit.

    Certificates:
        Between the two divisions, the map is linear and expands nothing: its singular values are 1 and
        ``(λᵢ/λₙ)^(-p) ≤ 1``. The divisions by norms have no Lipschitz constant: around ``s̄`` every direction is near.
        So ``lipschitz`` is infinite, and no radius is certified through them.
    """

    mean: Tensor
    axes: Tensor
    gains: Tensor

    def __init__(
        self,
        features: nn.Module,
        image_size: tuple[int, int],
        channels: int = 3,
        *,
        exponent: float = 0.2,
        directions: int = 500,
        images: int = 4000,
        seed: int = 0,
        state: Mapping[str, Tensor] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(VERSION)
        self.exponent = share("exponent", exponent, "[0, 1]")
        if self.exponent > 0.5:
            raise ConfigurationError(f"exponent must be at most 0.5, which whitens fully, got {exponent!r}")
        self.directions, self.images = whole("directions", directions), whole("images", images, 3)
        self.seed = whole("seed", seed, 0)
        self.features = features
        self._made_of(
            image_size=tuple(whole("image_size", size) for size in image_size), channels=int(channels),
            exponent=self.exponent, directions=self.directions, images=self.images, seed=self.seed, features=features,
        )  # fmt: skip
        frozen = FrozenFeatures(features, batch_size=64, progress=progress)
        if state is None:
            drawn = dead_leaves(self.images, image_size, channels, seed=self.seed, progress=progress)
            mean, axes, gains = self._directions(frozen.compute(drawn.float().div_(255.0)).flatten(1).float())
        else:
            nothing = torch.empty(0)
            mean, axes, gains = (torch.empty_like(state.get(name, nothing)) for name in ("mean", "axes", "gains"))
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)
        self.register_buffer("gains", gains)
        if state is not None:
            self._filled(state)

    def _directions(self, synthetic: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``(D,)``, eigenvectors ``(D, n)`` and factors ``(n,)`` from features ``(N, D)``."""
        mean = synthetic.mean(0)
        rows = functional.normalize(synthetic - mean, eps=_SHORT)
        count, width = rows.shape
        wanted = min(self.directions + 1, count - 1, width)
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(count, min(wanted + _MORE, count, width), generator=generator)
        # Subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).
        basis = torch.linalg.qr(rows.T @ start).Q
        for _ in range(_PASSES):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        seen = (rows @ basis).double()
        values, vectors = torch.linalg.eigh(seen.T @ seen / count)
        values, vectors = values.flip(0)[:wanted], vectors.flip(1)[:, :wanted]
        kept = int((values > _LEAST * values[0]).sum()) - 1 if values[0] > 0 else 0
        if kept < 1:
            raise ConfigurationError("the features of synthetic images are alike: there is nothing to whiten")
        axes = (basis.double() @ vectors[:, :kept]).float()
        return mean, axes, (values[:kept] / values[kept]).pow(-self.exponent).float()

    def forward(self, images: Tensor) -> Tensor:
        """Features of images, whitened."""
        features: Tensor = self.features(images)
        return self.whitened(features)

    def whitened(self, features: Tensor) -> Tensor:
        """Whitens features ``(B, ...)`` of the module.

        Raises:
            InputError: they have another length.
        """
        rows = features.flatten(1)
        if rows.shape[1] != len(self.mean):
            raise InputError(f"expected features of {len(self.mean)} numbers, got {tuple(features.shape)}")
        mean, axes, gains = (part.to(rows.dtype) for part in (self.mean, self.axes, self.gains))
        directions = functional.normalize(rows - mean, eps=_SHORT)
        return functional.normalize(directions + ((directions @ axes) * (gains - 1.0)) @ axes.T, eps=_SHORT)

    def composed(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """See :class:`Composed`: features are kept, and whitened when they are read."""
        return in_batches(self.whitened, compute(self.features), _ROWS, self.mean.device)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"exponent={self.exponent:g}, directions={self.directions}, images={self.images}, seed={self.seed}, "
            f"recipe={self.version!r}"
        )


class JoinedFeatures(Composed):
    """Several features of a sample side by side, each scaled to a norm of its own; the whole to unit norm.

    Args:
        blocks: modules that take the same samples and return ``(B, ...)``; they are put into evaluation mode and their
            parameters are frozen.
        weights: norm of each block before the whole is scaled; ``None``: 1 each.

    Shape:
        ``(B, ...)`` to ``(B, D)``, ``D`` the sum of the blocks' numbers. A block of zeros stays one.

    Raises:
        ConfigurationError: there is no block, one is no module, or a weight is not positive or not of a block.

    Certificates:
        Norms are divided by: there is no Lipschitz constant, ``lipschitz`` is infinite.
    """

    lipschitz: float = math.inf

    def __init__(self, blocks: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not blocks or not all(isinstance(block, nn.Module) for block in blocks):
            raise ConfigurationError(f"blocks must be one module or more, got {blocks!r:.200}")
        weights = [1.0] * len(blocks) if weights is None else list(weights)
        if len(weights) != len(blocks):
            raise ConfigurationError(f"need a weight for each of {len(blocks)} blocks, got {len(weights)}")
        self.blocks = nn.ModuleList(blocks).requires_grad_(False).eval()
        self.weights = tuple(positive("weights", weight) for weight in weights)

    def forward(self, samples: Tensor) -> Tensor:
        """Features of samples."""
        return self._joined([block(samples) for block in self.blocks])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        scaled = [
            weight * functional.normalize(part.flatten(1), eps=_SHORT)
            for weight, part in zip(self.weights, parts, strict=True)
        ]
        return functional.normalize(torch.cat(scaled, 1), eps=_SHORT)

    def composed(self, compute: Callable[[nn.Module], Tensor]) -> Tensor:
        """See :class:`Composed`: each block is kept by itself."""
        parts = [compute(block).flatten(1) for block in self.blocks]
        widths = [part.shape[1] for part in parts]
        joined = torch.cat(parts, 1)
        parts.clear()
        return in_batches(lambda rows: self._joined(rows.split(widths, 1)), joined, _ROWS, joined.device)

    def extra_repr(self) -> str:
        """The weights."""
        return f"weights={self.weights}"
