"""What noisy passes of a network returned, and the radii that follow from it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clipless_dp.arguments import choice
from clipless_dp.errors import ConfigurationError
from clipless_dp.robustness import confidence, ramps
from clipless_dp.robustness.certificates import Certificate
from clipless_dp.robustness.confidence import Array
from clipless_dp.robustness.maps import Map

Method = Literal["cohen", "lipschitz", "bernstein", "partition"]
Against = Literal["rest", "each"]


@dataclass(frozen=True)
class SmoothedCertificate(Certificate):
    """What is certified of a smoothed classifier; radii, curves and averages as of any :class:`Certificate`.

    ``predictions`` are -1, and radii 0, where it abstains. ``lipschitz`` is of the scores without noise.

    Attributes:
        kind: the method, by its name.
        lower: ``(N,)`` bound of the smoothed mean of the class that was selected.
        upper: ``(N,)`` bound of that of every other class.
        alpha: with which probability each sample's radius may be wrong, over the draws.
        n0: draws that selected the class.
        n: draws that the bounds are from.
        sigma: deviation of the noise, in the model's input units.
        map: what was averaged.
        temperature: of the map.
        slope: Lipschitz constant of what was averaged, in the model's input units; infinite where none is used.
        noise: what else the noise does, in words; ``None``: nothing.

    Guarantee:
        Let ``h_c`` be what the map makes of score ``c``, and ``h̃_c(x)`` its mean under the noise. For each sample ``x``
        by itself, with probability at least ``1 - α`` over the draws: for every ``x'`` with ``‖x' - x‖ < radii``,
        ``h̃_c(x')`` is largest at ``predictions`` alone; of ``pairs``, ``h̃_Ac(x') > ½`` for ``predictions`` ``A`` and
        every other ``c``, which holds for no other class. The noise is taken to be that of real numbers.
    """

    kind: str = ""
    lower: Tensor | None = None
    upper: Tensor | None = None
    alpha: float = math.nan
    n0: int = 0
    n: int = 0
    sigma: float = math.nan
    map: str = "argmax"
    temperature: float = 1.0
    slope: float = math.inf
    noise: str | None = None

    @property
    def digest(self) -> str:
        """A hash of what was certified: the network with its surroundings, the noise and the map."""
        told = f"{super().digest} {self.sigma!r} {self.map} {self.temperature!r} {self.noise}"
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def claim(self) -> str:
        """See :attr:`Certificate.claim`."""
        noise = f"Gaussian noise of deviation {self.sigma:g}" + ("" if self.noise is None else f" and {self.noise}")
        answer = (
            "the class of the largest mean of" if self.map != "pairs" else "the class that is ahead in the means of"
        )
        return (
            f"Radii are of the smoothed classifier: {answer} {self.map} (temperature "
            f"{self.temperature:g}) under {noise}. Each holds with probability {1.0 - self.alpha:g} or more over "
            f"{self.n} pseudo-random draws, after {self.n0} others that selected the class; the method is {self.kind}. "
            "Where it abstains it counts as wrong."
        )


@dataclass(frozen=True)
class Draws:
    """Sums over noisy passes, kept: any of the certificates can be made of them.

    Each certificate holds at its own ``1 - α``. The best of several, chosen after they were seen, does not: choose the
    method, the map and its temperature before, or give each of ``k`` of them ``α/k``.

    Attributes:
        selection: ``(N, C)`` float64: sums of what was averaged, over the draws that select a class.
        sums: ``(N, C)`` float64: over the others; counts, for ``argmax``.
        squares: ``(N, C)`` float64, of the same.
        n0: number of draws that select.
        n: number of the others.
        errors: ``(N,)`` what a mean may be off by because scores are computed in float64.
        dropped: ``(N,)`` samples for which some score was not finite.
        slope: Lipschitz constant of what was averaged, the largest; infinite where none is known.
        slopes: ``(C, C)`` for ``pairs``: of each pair.
        unknown: why none is known, in words.
        scale: by which a radius is multiplied: of raw units.
        origin: a certificate without radii, which says what was drawn from.
    """

    selection: Tensor
    sums: Tensor
    squares: Tensor
    n0: int
    n: int
    errors: Tensor
    dropped: Tensor
    slope: float
    unknown: str | None
    scale: float
    origin: SmoothedCertificate
    slopes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sums)

    def certify(self, alpha: float, method: Method = "cohen", against: Against = "rest") -> SmoothedCertificate:
        """The radius around each sample within which the smoothed prediction stays; see :meth:`Smoothed.certify`.

        Raises:
            ConfigurationError: an argument is out of range, or the method does not go with the map.
        """
        alpha = confidence.confidence_of(alpha)
        check_method(method, against, self.origin.map, self.slope, self.unknown)
        chosen = self.selection.argmax(1)
        slope = self.slope if method == "lipschitz" else math.inf
        if self.origin.map == "pairs":
            lower, upper, reached = self._against_each(chosen.numpy(), alpha, method)
        else:
            lower, upper = self._bounds(chosen.numpy(), alpha, method, against)
            if method == "lipschitz":
                lower = lower - self.errors.numpy()
                upper = None if upper is None else upper + self.errors.numpy()
            lower = np.where(self.dropped.numpy(), 0.0, lower).clip(0.0, 1.0)
            # The difference is exact where it matters, from ½ on.
            upper = None if upper is None else np.minimum(upper, 1.0 - lower)
            reached = ramps.radii(lower, upper, self.origin.sigma, slope)
        rest = 1.0 - lower
        found = torch.from_numpy(reached)
        # A product is off by one rounding.
        radii = found if self.scale == 1.0 else found * self.scale * (1.0 - 2.0**-52)
        radii = radii.masked_fill(self.dropped, 0.0)
        known = {name: getattr(self.origin, name) for name in self.origin.__dataclass_fields__}
        known |= {
            "radii": radii,
            "predictions": chosen.masked_fill(radii == 0.0, -1),
            "kind": method,
            "lower": torch.from_numpy(lower),
            "upper": torch.from_numpy(rest if upper is None else upper),
            "alpha": alpha,
            "slope": slope,
        }
        return SmoothedCertificate(**known)

    def _bounds(self, chosen: Array, alpha: float, method: Method, against: Against) -> tuple[Array, Array | None]:
        """Lower bounds of the chosen class, and upper ones of every other class where they are bounded apart."""
        sums, squares = self.sums.numpy(), self.squares.numpy()
        count, classes = sums.shape
        rows = np.arange(count)
        if method == "partition":
            return self._partitioned(alpha)
        counted = self.origin.map == "argmax" and method != "bernstein"
        both = method == "lipschitz"
        # Of other noise than normal numbers nothing of the kind is known.
        spread = self.slope * self.origin.sigma if self.origin.noise is None else math.inf
        apart = against == "each" and classes > 2
        # Of the others only the bound of the class whose mean is largest in truth has to hold.
        each = confidence.split(alpha, 2) if apart else alpha
        if counted:
            lower = confidence.clopper_pearson_lower(sums[rows, chosen], self.n, each)
        else:
            bound = partial(confidence.bounded_lower, spread=spread) if both else confidence.bernstein_lower
            lower = bound(sums[rows, chosen], squares[rows, chosen], self.n, each)
        if not apart:
            return lower, None
        if counted:
            others = confidence.clopper_pearson_upper(sums, self.n, each)
        else:
            bound = partial(confidence.bounded_upper, spread=spread) if both else confidence.bernstein_upper
            others = bound(sums, squares, self.n, each)
        others[rows, chosen] = 0.0
        return lower, others.max(1)

    def _against_each(self, chosen: Array, alpha: float, method: Method) -> tuple[Array, None, Array]:
        """The least mean of the chosen class against another one, and how far all of them stay above ½.

        Each bound may fail at ``α`` by itself: of a least of several, that of the one which is least in truth counts.
        """
        sums, squares, classes = self.sums.numpy(), self.squares.numpy(), self.sums.shape[1]
        least, reached = np.ones(len(sums)), np.full(len(sums), math.inf)
        for other in range(classes):
            for best in sorted({*chosen.tolist()} - {other}):
                rows = np.flatnonzero(chosen == best)
                slope = math.inf
                if method == "lipschitz":
                    assert self.slopes is not None
                    slope = float(self.slopes[best, other])
                    spread = slope * self.origin.sigma if self.origin.noise is None else math.inf
                    lower = confidence.bounded_lower(sums[rows, other], squares[rows, other], self.n, alpha, spread)
                    lower = lower - self.errors.numpy()[rows]
                else:
                    lower = confidence.bernstein_lower(sums[rows, other], squares[rows, other], self.n, alpha)
                lower = np.where(self.dropped.numpy()[rows], 0.0, lower).clip(0.0, 1.0)
                least[rows] = np.minimum(least[rows], lower)
                reached[rows] = np.minimum(reached[rows], ramps.radii(lower, None, self.origin.sigma, slope))
        return least, None, reached

    def _partitioned(self, alpha: float) -> tuple[Array, Array]:
        sums = self.sums.numpy()
        groups = [confidence.buckets(counts) for counts in self.selection.numpy()]
        first = np.array([row[group[0]].sum() for row, group in zip(sums, groups, strict=True)])
        largest = np.array([max(row[one].sum() for one in group[1:]) for row, group in zip(sums, groups, strict=True)])
        # Two groups are each other's complement: one bound holds for both. Of more, that of the first and that of the
        # largest in truth have to hold.
        bounds = np.array([1 if len(group) == 2 else 2 for group in groups])
        each = confidence.split(alpha, bounds)
        lower = confidence.clopper_pearson_lower(first, self.n, each)
        upper = confidence.clopper_pearson_upper(largest, self.n, each)
        return lower, np.where(bounds == 1, 1.0 - lower, upper)


def check_method(method: object, against: object, name: Map | str, slope: float, unknown: str | None) -> None:
    """Refuses a method that does not go with a map.

    Raises:
        ConfigurationError: it does not, or is none.
    """
    choice("method", method, "cohen", "lipschitz", "bernstein", "partition")
    choice("against", against, "rest", "each")
    if method == "partition" and against != "rest":
        raise ConfigurationError("method='partition' groups the other classes itself: leave against out")
    if name == "pairs" and against != "rest":
        raise ConfigurationError("map='pairs' bounds the mean against each class already: leave against out")
    if method in ("cohen", "partition") and name != "argmax":
        raise ConfigurationError(
            f"method={method!r} bounds shares of predictions, which are counts: use map='argmax', or "
            "method='bernstein' for means of a soft map"
        )
    if method == "lipschitz" and name == "argmax":
        raise ConfigurationError(
            "method='lipschitz' needs a map with a Lipschitz constant, and argmax jumps: use map='pairs', 'margin', "
            "'softmax' or 'sparsemax', or method='cohen'"
        )
    if method == "lipschitz" and not math.isfinite(slope):
        raise ConfigurationError(
            f"method='lipschitz' needs finite Lipschitz constants of the scores, and not all are: "
            f"{unknown or 'one is stated to be infinite'}. Use method='bernstein', which needs none"
        )
