"""Noise on signals: a regulariser and a defence, bounded so that bounds stay finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp.arguments import cap
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.arithmetic import per_sample, sample_norms, scale_factors
from clipless_dp.modules import Unscripted

_MOST = 1e18


class NoiseInjection(Unscripted, nn.Module):
    """``x + n`` in training mode, ``n`` Gaussian, cut to a ball for each sample; ``Y = X + r``, ``K = 1``.

    Noise of deviation ``std`` on each entry, of norm about ``std·√n`` for ``n`` entries, scaled down to norm ``r``
    where it is longer (Pinot et al., "Theoretical evidence for adversarial robustness through randomization", NeurIPS
    2019, inject it uncut, whose norm has no bound). It is no privacy noise and is not accounted: it is drawn anew for
    each sample and pass and does not depend on any sample, so that bounds of gradients hold for every draw.

    Args:
        std: deviation of each entry.
        radius: ``r``, the largest norm of a sample's noise.

    Shape:
        ``(B, ...)`` to the same shape.

    Raises:
        ConfigurationError: a number is not between 1e-8 and 1e18: squares of others leave float32.
    """

    def __init__(self, std: float, radius: float) -> None:
        super().__init__()
        self.std, self.radius = cap("std", std), cap("radius", radius)
        if max(self.std, self.radius) > _MOST:
            raise ConfigurationError(f"std and radius must be at most {_MOST:g}, got {self.std:g} and {self.radius:g}")

    def forward(self, values: Tensor) -> Tensor:
        """Adds noise while training."""
        if not self.training:
            return values
        noise = torch.randn_like(values) * self.std
        factors = scale_factors(sample_norms(noise), cap=self.radius, floor=self.radius)
        return values + noise * per_sample(factors, noise).to(noise.dtype)

    def extra_repr(self) -> str:
        """Deviation and radius."""
        return f"std={self.std:g}, radius={self.radius:g}"
