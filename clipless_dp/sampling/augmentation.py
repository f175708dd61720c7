"""Random views of samples, each made from that sample alone."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import CellType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.errors import ConfigurationError
from clipless_dp.noise.randomness import Randomness, current_generator
from clipless_dp.noise.randomness import shared as shared_randomness


class RowAugmentation(ABC):
    """Views of a whole batch at once, for speed; each row's view must come from that row and fresh randomness alone.

    A view that sees other rows (mixup, statistics of the batch) puts one sample into several gradients, which no bound
    covers. Where that cannot be vouched for, give a function of one sample instead.
    """

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """One view of each row.

        Args:
            inputs: ``(rows, *input_shape)``; rows of padding hold no numbers, and their views do not count.

        Returns:
            A tensor of the same shape, dtype and device; the argument is left as it is.
        """


Augmentation = RowAugmentation | Callable[[Tensor], Tensor]


class ShiftAndFlip(RowAugmentation):
    """Shifts each image by up to ``shift`` pixels along each axis, zeros entering, and mirrors half of the images.

    The crops with padding and reflections of De et al. 2022, "Unlocking high-accuracy differentially private image
    classification through scale", §3.

    Args:
        shift: the largest shift in pixels, at least 0.
        flip: whether to mirror left and right.

    Shape:
        ``(rows, C, H, W)``.
    """

    def __init__(self, shift: int = 4, *, flip: bool = True) -> None:
        if not (isinstance(shift, int) and shift >= 0):
            raise ConfigurationError(f"shift must be an integer of at least 0, got {shift!r}")
        self.shift = shift
        self.flip = flip

    def __call__(self, inputs: Tensor) -> Tensor:
        """See :class:`RowAugmentation`."""
        if inputs.dim() != 4:
            raise ConfigurationError(f"ShiftAndFlip takes images (rows, C, H, W), got {tuple(inputs.shape)}")
        count, channels, height, width = inputs.shape
        device = inputs.device
        generator = current_generator(device)
        padded = functional.pad(inputs, (self.shift,) * 4)
        down, right = torch.randint(2 * self.shift + 1, (2, count, 1), generator=generator, device=device)
        rows = torch.arange(height, device=device) + down
        columns = torch.arange(width, device=device).expand(count, -1)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = columns + right
        return padded[
            torch.arange(count, device=device).view(-1, 1, 1, 1),
            torch.arange(channels, device=device).view(1, -1, 1, 1),
            rows.view(count, 1, height, 1),
            columns.view(count, 1, 1, width),
        ]


@torch.no_grad()
def views(augment: Augmentation, inputs: Tensor, mask: Tensor, source: Randomness | None = None) -> Tensor:
    """One view of each sample.

    The global generators of torch, numpy and Python are seeded from the source before, and restored afterwards: what a
    user seeds reaches no view.

    Args:
        augment: a function of one sample, called once for each, so that it cannot see two of them; or a
            :class:`RowAugmentation`.
        inputs: ``(rows, *input_shape)``.
        mask: boolean ``(rows,)``; padding is not shown to a function of one sample.
        source: of the random numbers; by default one that the operating system seeds.

    Raises:
        ConfigurationError: a view has another shape than its sample, or is no tensor.
    """
    with (source or shared_randomness).visit(inputs.device):
        return _views(augment, inputs, mask)


def _views(augment: Augmentation, inputs: Tensor, mask: Tensor) -> Tensor:
    if isinstance(augment, RowAugmentation):
        made = augment(inputs)
        if not isinstance(made, Tensor) or made.shape != inputs.shape:
            raise _misshapen(augment, made, inputs.shape)
        return made
    rows = []
    for row, counts in zip(inputs, mask.tolist(), strict=True):
        # A copy, since what is changed in place would change the sample's other views.
        view = augment(row.clone()) if counts else row
        if not isinstance(view, Tensor) or view.shape != row.shape:
            raise _misshapen(augment, view, row.shape)
        rows.append(view)
    return torch.stack(rows) if rows else inputs


def refuse_own_generators(augment: Augmentation) -> None:
    """Refuses an augmentation that holds a generator of random numbers of its own.

    Its draws would follow from a seed and a sample's place in the batch, so that one more sample changes the views of
    all others.

    Raises:
        ConfigurationError: it is an attribute, in a closure, or an argument of a ``partial``.
    """
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    function = getattr(augment, "__func__", augment)
    held: list[object] = [*getattr(augment, "__dict__", {}).values(), getattr(augment, "__self__", None)]
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    held += [*getattr(augment, "args", ()), *getattr(augment, "keywords", {}).values()]
    held += [
        *(getattr(function, "__defaults__", None) or ()),
        *(getattr(function, "__kwdefaults__", None) or {}).values(),
    ]
    for value in [*held, *(part for own in held for part in getattr(own, "__dict__", {}).values())]:
        if isinstance(value, kinds):
            raise ConfigurationError(
                f"augment={augment!r} draws from a generator of its own ({type(value).__name__}), so that one more "
                "sample changes the views of all others: draw from torch's, numpy's or Python's global generators, "
                "which follow the model's own source of randomness while views are made"
            )


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _misshapen(augment: object, made: object, wanted: torch.Size) -> ConfigurationError:
    found = f"one of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
    return ConfigurationError(
        f"augment={augment!r} must return a tensor of the shape {tuple(wanted)} that it was given, got {found}"
    )
