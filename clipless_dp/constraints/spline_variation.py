"""The proximal step of the second-order total variation of splines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.arguments import positive
from clipless_dp.constraints.base import Constraint
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import Operator, SegmentsOperator
from clipless_dp.norms.rounding import exact_float64


class SplineVariation(Constraint):
    """The proximal step of ``strength·TV⁽²⁾`` on learnt splines, with slopes kept in ``[-limit, limit]``.

    The second-order total variation of a continuous piecewise linear function is the sum of the sizes of its changes
    of slope, ``TV⁽²⁾(f) = Σ_i |s_{i+1} - s_i|``, whatever the knots' distance (the penalty of Bohra et al. 2020 and of
    Ducotterd et al. 2024). Each function's slopes become the one minimiser of ``½‖s' - s‖² + strength·TV⁽²⁾(s')``
    within the limit: changes that do not pay for the penalty vanish exactly, and neighbouring segments become one
    piece (:func:`clipless_dp.layers.effective_regions` counts them). The proof is in docs/bounds.md.

    It runs after the noise, as the projection does, and reads nothing but the released slopes: post-processing, which
    neither sensitivity nor ledger notice. Slopes are projected onto the limit at wrapping, without the proximal step.
    Unlike a projection it moves what it has made before: each call is one step.

    Name the slopes: ``constraint={"*.slopes": SplineVariation(1e-3), "*.weight": Spectral()}``.

    Args:
        strength: ``λ`` of one step: a penalty ``p·TV⁽²⁾`` on the loss stands for ``p`` times the learning rate. A local
            extremum of the slopes moves by ``2·strength`` divided by its segments, until it is none.
        limit: the largest size of a slope, 1 by default.

    Raises:
        ConfigurationError: a strength that is not positive and finite; where the model is wrapped, for a parameter that
            holds no slopes of splines.

    Guarantee:
        Every ``|s_i| ≤ limit``, exactly: the limit is that of :class:`Frobenius`, and the proximal step adds none.

    Cost:
        As many passes over the slopes as the function with most pieces has, in float64.
    """

    def __init__(self, strength: float, *, limit: float = 1.0) -> None:
        super().__init__(limit)
        self.strength = positive("the strength of a proximal step", strength)

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Takes the proximal step in place."""
        _require_slopes(weight, operators)
        self._store_(weight, _taut(exact_float64(weight), self.strength))

    @torch.no_grad()
    def initialize_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Keeps fresh slopes within the limit, and else as they are."""
        _require_slopes(weight, operators)
        self._store_(weight, exact_float64(weight))

    def _store_(self, weight: Tensor, slopes: Tensor) -> None:
        """Clips the minimiser without the limit: it is the one within, since equal neighbours stay equal and others in
        order, so that the same subgradient of the variation serves, and what is cut off is normal to the interval."""
        weight.copy_(slopes)
        bound = float(torch.tensor(self.limit, dtype=weight.dtype))
        if bound > self.limit:
            bound = float(torch.nextafter(torch.tensor(bound, dtype=weight.dtype), torch.zeros((), dtype=weight.dtype)))
        weight.clamp_(-bound, bound)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(strength={self.strength:g}, limit={self.limit:g})"


def _require_slopes(weight: Tensor, operators: tuple[Operator, ...]) -> None:
    if not all(isinstance(operator, SegmentsOperator) for operator in operators):
        raise ConfigurationError(
            f"SplineVariation is for slopes of clipless_dp.layers.LinearSpline, and not for a parameter of shape "
            f"{tuple(weight.shape)}: name them, constraint={{'*.slopes': SplineVariation(...), '*.weight': Spectral()}}"
        )


def _taut(slopes: Tensor, strength: float) -> Tensor:
    """``argmin_u ½‖u - s‖² + strength·Σ|u_{i+1} - u_i|`` for each row ``s`` of ``(channels, segments)``, exactly.

    Its partial sums are the shortest path through a tube of half the width ``strength`` around those of ``s`` that is
    pinched at both ends (Davies and Kovac, "Local extremes, runs, strings and multiresolution", Ann. Statist. 2001):
    the taut string. From each vertex it goes straight as far as some line stays in the tube, and bends where it last
    touched the side that stops it. All rows go from vertex to vertex together.
    """
    channels, size = slopes.shape
    sums = torch.nn.functional.pad(slopes.cumsum(1), (1, 0))
    low, high = sums - strength, sums + strength
    for side in (low, high):
        side[:, 0], side[:, -1] = sums[:, 0], sums[:, -1]
    places = torch.arange(size + 1, device=slopes.device)
    start, value = torch.zeros(channels, 1, dtype=torch.long, device=slopes.device), sums[:, :1]
    found = torch.zeros_like(slopes)
    while bool((start < size).any()):
        ahead = places > start
        steps = (places - start).clamp(min=1)
        # The flattest line that some place ahead allows from below, the steepest from above, up to each place.
        least, at_least = torch.where(ahead, (high - value) / steps, math.inf).cummin(1)
        most, at_most = torch.where(ahead, (low - value) / steps, -math.inf).cummax(1)
        blocked = most > least
        stop = torch.where(blocked.any(1), blocked.long().argmax(1), size + 1).unsqueeze(1)
        before = (stop - 1).clamp(max=size)
        rises = torch.where(stop <= size, most.gather(1, stop.clamp(max=size)) > most.gather(1, before), False)
        end = torch.where(rises, at_least.gather(1, before), at_most.gather(1, before))
        end = torch.where(stop > size, size, end).clamp(max=size)
        reached = torch.where(rises, high.gather(1, end), low.gather(1, end))
        slope = (reached - value) / (end - start).clamp(min=1)
        found = torch.where((places[:-1] >= start) & (places[:-1] < end), slope, found)
        start, value = torch.where(start < size, end, start), reached
    return found
