"""What makes views of all rows of a batch at once, each from its own row."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import positive, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.noise.randomness import current_generator


class OfRows:
    """What is shown all rows at once, and is held to make each view of its own.

    It and the next are no abstract classes: those remember what they are asked about, where a state is looked for.
    """


class OfLabels(OfRows):
    """What is given targets and slopes as well."""


class RowAugmentation(OfRows, ABC):
    """Views of a whole batch at once, for speed; each row's view must come from that row and fresh randomness alone.

    A view that sees other rows (mixup, statistics of the batch) puts one sample into several gradients, which no bound
    covers: where one is seen, it is refused (:func:`views`). A function of one sample sees no other.
    """

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """One view of each row.

        Args:
            inputs: ``(rows, *input_shape)``; rows of padding hold no numbers, and their views do not count.

        Returns:
            A tensor of the same shape, dtype and device; the argument is left as it is.
        """


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
        self.shift = whole("shift", shift, 0)
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


class GaussianNoise(RowAugmentation):
    """Adds Gaussian noise to every entry: networks that are smoothed are trained on what they will see.

    The augmentation of Cohen et al. 2019, "Certified adversarial robustness via randomized smoothing", §3.3. As any
    view it costs no privacy, and several views of a sample share its one gradient. It is no protection of the sample:
    that is the noise of the optimizer.

    Args:
        sigma: deviation, in units of the input.

    Shape:
        ``(rows, ...)`` of floating-point numbers.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = positive("sigma", sigma)

    def __call__(self, inputs: Tensor) -> Tensor:
        """See :class:`RowAugmentation`."""
        if not inputs.is_floating_point():
            raise ConfigurationError(f"GaussianNoise takes floating-point inputs, got {inputs.dtype}")
        generator = current_generator(inputs.device)
        noise = torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
        return inputs + self.sigma * noise
