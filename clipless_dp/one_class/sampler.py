"""Negatives: points of a public box that walk towards the boundary of a released network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clipless_dp.arguments import positive, whole
from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.model import DPLipModel
from clipless_dp.one_class.box import BoxProjection
from clipless_dp.one_class.front import FixedFeatures
from clipless_dp.robustness.networks import plain_network, value_and_gradient

_TINY = 1e-8


def newton_walk(
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    *,
    level: float,
    inside: Callable[[Tensor], Tensor],
    steps: int,
    damping: float,
    lengths: Tensor,
) -> Tensor:
    """``z ← Π_B(z - (η·c/T)(f(z) - level)∇f/(‖∇f‖² + 1e-8))``, ``T`` times, while ``f`` is below the level.

    Newton's step for ``f(z) = level``, in ``T`` parts (Béthune et al., "Robust one-class classification with signed
    distance function using 1-Lipschitz neural networks", ICML 2023, algorithm 1). With ``η ~ U(0, 1)`` points end
    anywhere between where they began and the boundary. Of a signed distance, or of any 1-Lipschitz function whose
    gradient has norm 1 along the way, none passes the level: each part is at most the whole of what is left, where
    ``c ≤ T``. What is left in the end is ``(1 - η·c/T)^T`` of the way: at ``c = 1`` most points stay far from the
    boundary, at ``c = T`` most come close to it. A point that ends a part above the level goes no further.

    Args:
        function: of points ``(B, ...)`` to numbers ``(B,)``.
        points: ``z₀``.
        level: where to.
        inside: ``Π_B``.
        steps: ``T``.
        damping: ``c``.
        lengths: ``η``, ``(B,)``.
    """
    share_of_way = lengths * (damping / steps)
    for _ in range(steps):
        values, gradient = value_and_gradient(function, points)
        below = (level - values).clamp(min=0.0)
        slope = gradient.flatten(1).square().sum(1) + _TINY
        # (f - level) is negative below the level: minus it goes up.
        points = inside(points + gradient * per_sample(share_of_way * below / slope, points))
    return points.detach()


class BoundarySampler:
    """Draws negatives for the training of one model: uniform in its box, then :func:`newton_walk` towards a level.

    The slope is that of the values (:func:`clipless_dp.robustness.plain_network`), without gates on gradients. The
    weights that it reads are those that the last step has released; everything else that it reads is public.

    Args:
        model: that is trained; its inputs are seen from the centre of the box.
        box: that points lie in.
        steps: ``T``.
        damping: ``c`` in (0, T].
        seed: of the public randomness; ``None``: another one each time.
        features: what runs between the box and the model; ``None``: nothing does.

    Raises:
        ConfigurationError: an argument is out of range, or the model cannot be copied.
    """

    def __init__(
        self,
        model: DPLipModel,
        box: BoxProjection,
        *,
        steps: int = 8,
        damping: float = 1.0,
        seed: int | None = None,
        features: FixedFeatures | None = None,
    ) -> None:
        self._steps, self._damping = whole("walk_steps", steps), positive("walk_damping", damping)
        if self._damping > self._steps:
            raise ConfigurationError(
                f"walk_damping={self._damping:g} is above walk_steps={self._steps}: a part of the walk would be more "
                "than Newton's step, and pass the boundary"
            )
        self._model, self._box = model, box
        self._plain = plain_network(model, dtype=None)
        self._pairs = self._paired()
        self._features = features
        self._generator = _generator(seed)

    def _paired(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors of the copy, and those of the model that they follow."""
        ours = [*self._plain.net.parameters(), *self._plain.net.buffers()]
        theirs = [*self._model.graph.module.parameters(), *self._model.graph.module.buffers()]
        if [value.shape for value in ours] != [value.shape for value in theirs]:
            raise PrivacyError("the copy that negatives are drawn by has other weights than the model")
        return list(zip(ours, theirs, strict=True))

    def scores(self, points: Tensor) -> Tensor:
        """``f`` of points that are seen from the centre of the box, ``(B,)``."""
        return self._plain.outputs(self.seen(points)).reshape(len(points))

    def seen(self, points: Tensor) -> Tensor:
        """What the model sees of such points."""
        return points if self._features is None else self._features(points)

    def follow(self) -> None:
        """Takes over the weights that the model has now."""
        with torch.no_grad():
            for ours, theirs in self._pairs:
                ours.copy_(theirs)

    def draw(self, count: int, *, level: float) -> Tensor:
        """So many points, from the centre of the box, at the model's weights of now."""
        self.follow()
        points = self._box.uniform(count, self._generator)
        lengths = torch.rand(count, generator=self._generator).to(points)
        return newton_walk(
            self.scores,
            points,
            level=level,
            inside=self._box.inside,
            steps=self._steps,
            damping=self._damping,
            lengths=lengths,
        )

    def negatives(self, count: int, *, level: float) -> Tensor:
        """The same as the model sees them."""
        with torch.no_grad():
            return self.seen(self.draw(count, level=level))


class PublicNegatives:
    """Draws negatives for the training of one model uniformly from public rows, with replacement.

    Args:
        rows: as the model sees them, ``(M, ...)``.
        seed: of the public randomness; ``None``: another one each time.
    """

    def __init__(self, rows: Tensor, *, seed: int | None = None) -> None:
        self._rows, self._generator = rows, _generator(seed)

    def negatives(self, count: int, *, level: float) -> Tensor:
        """So many rows; the level counts for nothing."""
        return self._rows[torch.randint(len(self._rows), (count,), generator=self._generator)]


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed % 2**63)
