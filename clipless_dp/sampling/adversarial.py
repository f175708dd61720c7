"""Views that each sample's own label decides on: adversarial ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clipless_dp.arguments import choice, positive, shown, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.arithmetic import per_sample, sample_norms
from clipless_dp.noise.randomness import current_generator
from clipless_dp.sampling.transforms import OfLabels

Slopes = Callable[[Tensor], Tensor]
"""Of inputs ``(rows, *input_shape)``, each row's gradient of its own loss with respect to itself, of the same shape."""

_UNDERFLOW = 1e-30


class Beside(NamedTuple):
    """What labelled views are made by, beside their samples.

    Attributes:
        targets: of the rows.
        slopes: maps inputs, targets and mask to the gradient of each row's loss with respect to itself, at the weights
            that are released.
    """

    targets: Tensor
    slopes: Callable[[Tensor, Tensor, Tensor], Tensor]


class LabelledAugmentation(OfLabels, ABC):
    """Views of a whole batch at once, each from its row, its row's target, released weights and fresh randomness alone.

    As for :class:`clipless_dp.RowAugmentation`, what sees other rows (a norm, a maximum or a mean over the batch, a
    perturbation that all share), or the targets of others, or remembers, puts one sample into several gradients: where
    that is seen, it is refused. Nothing may be kept from one call to the next.
    """

    @abstractmethod
    def __call__(self, inputs: Tensor, targets: Tensor, slopes: Slopes) -> Tensor:
        """One view of each row.

        Args:
            inputs: ``(rows, *input_shape)``; rows of padding hold no numbers, and their views do not count.
            targets: ``(rows, ...)``.
            slopes: of perturbed inputs of all rows, in the same order, each row's gradient of its own loss.

        Returns:
            A tensor of the inputs' shape, dtype and device; the arguments are left as they are.
        """


class Adversarial(LabelledAugmentation):
    """Moves each sample, within a radius, to where its own loss is larger: projected gradient ascent.

    Adversarial training of Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards deep learning models resistant to
    adversarial attacks", ICLR 2018, §2.1. The view of a sample is a function of the sample, its label, weights that
    earlier steps have released, and fresh randomness: as any view it costs no privacy, and the input gate stays behind
    it. The ascent begins at a random point of the ball; several views (``multiplicity``) begin at several.

    Steps are ``η·g/max(‖g‖, floor)``, in the maximum norm ``η·clamp(√n·g/floor, -1, 1)`` entry by entry, in place of
    unit vectors and signs: where a slope is nearly zero it is mostly rounding, which differs from batch to batch and
    must not decide on a whole step.

    Args:
        radius: the largest norm of a perturbation, in units of the model's input.
        norm: 2 or ``"inf"``.
        steps: of the ascent.
        step: ``η``, relative to the radius; by default ``2.5/steps``.
        box: limits of all entries of a view, such as ``(0.0, 1.0)``; samples outside of it are moved into it first,
            which is not counted as perturbation.
        floor: Euclidean norm of a slope from which on steps have their full length.

    Shape:
        ``(rows, ...)`` of floating-point numbers.

    Raises:
        ConfigurationError: an argument is out of range.

    Cost:
        One pass forth and back for each step, besides the one that is trained on.
    """

    def __init__(
        self,
        radius: float,
        norm: Literal[2, "inf"] = 2,
        steps: int = 4,
        *,
        step: float | None = None,
        box: tuple[float, float] | None = None,
        floor: float = 1e-2,
    ) -> None:
        self.radius = positive("radius", radius)
        self.norm: Literal[2, "inf"] = 2 if norm == 2 else choice("norm", norm, "inf")
        self.steps = whole("steps", steps)
        self.step = 2.5 / self.steps if step is None else positive("step", step)
        self.floor = positive("floor", floor)
        self.box = None if box is None else _checked_box(box)

    def __call__(self, inputs: Tensor, targets: Tensor, slopes: Slopes) -> Tensor:
        """See :class:`LabelledAugmentation`."""
        if not inputs.is_floating_point():
            raise ConfigurationError(f"adversarial views are of floating-point inputs, got {inputs.dtype}")
        centre = inputs if self.box is None else inputs.clamp(*self.box)
        moved = self._cut(self._start(centre), centre)
        for _ in range(self.steps):
            way = self._direction(slopes(centre + moved).nan_to_num(0.0, 0.0, 0.0))
            moved = self._cut(moved + self.step * self.radius * way, centre)
        return centre + moved

    def _start(self, inputs: Tensor) -> Tensor:
        """A uniform point of the ball."""
        generator = current_generator(inputs.device)
        kind: dict[str, Any] = {"generator": generator, "device": inputs.device, "dtype": inputs.dtype}
        if self.norm == "inf":
            return (2.0 * torch.rand(inputs.shape, **kind) - 1.0) * self.radius
        drawn = torch.randn(inputs.shape, **kind)
        lengths = torch.rand(len(inputs), **kind) ** (1.0 / max(1, math.prod(inputs.shape[1:])))
        return drawn * per_sample(self.radius * lengths / sample_norms(drawn).clamp(min=_UNDERFLOW), drawn)

    def _direction(self, slope: Tensor) -> Tensor:
        """Of each row the way on which its loss rises, of norm 1 at most."""
        if self.norm == "inf":
            return (slope * (math.sqrt(math.prod(slope.shape[1:])) / self.floor)).clamp(-1.0, 1.0)
        return slope / per_sample(sample_norms(slope).clamp(min=self.floor), slope)

    def _cut(self, moved: Tensor, inputs: Tensor) -> Tensor:
        """The nearest perturbations of the ball, then of the box, which a sample in it shares with the way there."""
        if self.norm == "inf":
            moved = moved.clamp(-self.radius, self.radius)
        else:
            moved = moved * per_sample(self.radius / sample_norms(moved).clamp(min=self.radius), moved)
        return moved if self.box is None else (inputs + moved).clamp(*self.box) - inputs

    def __repr__(self) -> str:
        return f"Adversarial(radius={self.radius:g}, norm={self.norm!r}, steps={self.steps})"


def _checked_box(box: Any) -> tuple[float, float]:
    try:
        least, most = (float(one) for one in box)
        if least < most:
            return least, most
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ConfigurationError(f"box must be two numbers, the lower one first, got {shown(box)}")
