"""What an attacker can achieve: error rates instead of (ε, δ), by the trade-off curve of f-DP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from . import _validation as check
from .accountants import Accountant, create_accountant
from .bounds import PrivacyBound, rounded_up
from .errors import InvalidParameterError, UnsupportedEventError
from .events import REPLACE_ONE

__all__ = ["FALSE_POSITIVE_RATES", "TradeOff", "trade_off"]

Array = NDArray[np.float64]

FALSE_POSITIVE_RATES = (0.1, 0.01, 0.001)
"""At which true-positive rates are reported by default."""

_POINTS = 65
_SMALLEST_DELTAS = (1e-8, 1e-4, 1e-2, 0.5)
"""δ of the largest ε on the grid; the next one where no ε is certified at it."""

_RARE = 1e-5
_ROUNDING = 8.0 * float(np.finfo(float).eps)


@dataclass(frozen=True)
class TradeOff:
    """The trade-off curve of a ledger: how seldom an attacker can err one way, given how often the other.

    The attacker sees everything that was released and decides between two neighbouring data sets, such as one with a
    person's row and one without. With false-positive rate α (says "in" of who is not) their false-negative rate (says
    "out" of who is) is at least

        f(α) = max over ε ≥ 0 of max(0, 1 − δ(ε) − e^ε α, e^−ε (1 − δ(ε) − α)).

    Attributes:
        bounds: Certified upper bounds of δ at increasing ε (their attribute `delta`), the first at ε = 0.

    Guarantee:
        No attacker has a smaller false-negative rate, whichever of the two data sets is called "in", since each δ(ε) is
        an upper bound of the hockey-stick divergences in both directions. Let A be the outputs upon which the attacker
        says "in", P with the row and Q without: P(A) ≤ e^ε Q(A) + δ(ε) is the first branch. Q(Aᶜ) ≤ e^ε P(Aᶜ) + δ(ε) is
        the second. Fewer ε make the curve lower, and leave it valid. Randomised decisions are averages of such.

    Source:
        Wasserman and Zhou 2010, *A statistical framework for differential privacy*, Theorem 2.4. Dong, Roth, Su 2022,
        *Gaussian differential privacy*, Propositions 2.5 and 2.13.
    """

    bounds: tuple[PrivacyBound, ...]

    @property
    def epsilons(self) -> Array:
        """The grid of ε, shape (points,)."""
        return np.array([bound.delta for bound in self.bounds])

    @property
    def deltas(self) -> Array:
        """Upper bounds of δ at each ε, shape (points,)."""
        return np.array([bound.upper for bound in self.bounds])

    @property
    def whom(self) -> str:
        """Who is promised this, in words."""
        return self.bounds[0].whom

    def false_negative_rate(self, false_positive_rate: ArrayLike) -> Array:
        """Returns f(α), a certified lower bound of any attacker's false-negative rate, of the shape of `α`.

        Args:
            false_positive_rate: α in [0, 1], of any shape.

        Raises:
            InvalidParameterError: When a rate lies outside [0, 1].
        """
        alpha = self._rates(false_positive_rate)
        slopes, intercepts = self._lines()
        with np.errstate(invalid="ignore"):
            # 0 · ∞ where e^ε overflows: such a line passes through its intercept.
            fallen = np.where(alpha[..., None] > 0.0, slopes * alpha[..., None], 0.0)
        value: Array = np.clip((intercepts - fallen).max(axis=-1) - _ROUNDING, 0.0, 1.0)
        return value

    def true_positive_rate(self, false_positive_rate: ArrayLike) -> Array:
        """Returns 1 − f(α), a certified upper bound; arguments as for `false_negative_rate`."""
        if self._guessing:
            # Without the margin for rounding, which printed would be a hundredth of a per cent.
            return self._rates(false_positive_rate)
        value: Array = 1.0 - self.false_negative_rate(false_positive_rate)
        return value

    @property
    def advantage(self) -> float:
        """Certified upper bound of the membership advantage, true- minus false-positive rate, of any attacker.

        The smallest (e^ε − 1 + 2δ(ε)) / (e^ε + 1), where both branches of one ε meet; δ(0), the total variation, is
        one of them.

        Source:
            Kairouz, Oh, Viswanath 2015, *The composition theorem for differential privacy*, equation 3.
        """
        if self._guessing:
            return 0.0
        half = np.tanh(0.5 * self.epsilons)
        share = 0.5 * (1.0 - half)  # 1 / (e^ε + 1), for any ε.
        return float(min(np.min(half + 2.0 * self.deltas * share) + _ROUNDING, 1.0))

    @property
    def success(self) -> float:
        """Certified upper bound of how often an attacker is right, with even odds beforehand: (1 + advantage) / 2."""
        return 0.5 * (1.0 + self.advantage)

    def gaussian_mu(self, rarest: float = _RARE) -> float:
        """Returns a μ such that, but for very rare errors, attackers do no better than against μ-GDP.

        G_μ(α) = Φ(Φ⁻¹(1 − α) − μ) ≤ f(α) wherever α and f(α) are both at least `rarest`; ∞ where there is no such α.

        Args:
            rarest: In (0, 0.5). The smaller it is, the larger is μ for ledgers whose tails are not Gaussian.

        Guarantee:
            μ sums up the curve within that range, rounded up. It is no μ-GDP guarantee by itself: beyond the range the
            curve may lie below G_μ. f is piecewise linear and G_μ convex, so that f − G_μ is smallest at a kink of f or
            at an end of the range; all of these are looked at.

        Source:
            Dong, Roth, Su 2022, Definition 2.6. Gomez et al. 2025, *(ε, δ) considered harmful*, on reporting μ.
        """
        rarest = check.delta(rarest, "rarest")
        if self._guessing:
            return 0.0
        slopes, intercepts = self._lines()
        # The level of the rarest error crosses the curve at the other end of the range.
        slopes, intercepts = np.append(slopes, 0.0), np.append(intercepts, rarest)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            crossings = np.subtract.outer(intercepts, intercepts) / np.subtract.outer(slopes, slopes)
        alpha = np.unique(np.append(crossings[(crossings > rarest) & (crossings < 1.0)], rarest))
        beta = self.false_negative_rate(alpha)
        counted = beta >= rarest * (1.0 - 1e-9)
        if not counted.any():
            return math.inf
        return max(float(np.max(-ndtri(alpha[counted]) - ndtri(beta[counted]))) * (1.0 + 1e-9), 0.0)

    def table(self, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> str:
        """Returns the risk in words: advantage, success at even odds, and true-positive rates at some others."""
        start = self.bounds[0]
        question = "which of two it was" if start.relation == REPLACE_ONE else "in the data or not"
        mu = self.gaussian_mu()
        gaussian = "no μ-GDP comes near it" if mu == math.inf else f"as under μ-GDP with μ = {rounded_up(mu)}"
        header = ("false-positive rate", "true-positive rate at most")
        rows = [(f"{100 * rate:g} %", percent(float(self.true_positive_rate(rate)))) for rate in rates]
        return "\n".join(
            [
                f"for {self.whom} ({start.relation}, sampling {start.sampling}, engine {start.engine}):",
                f"who sees all that was released and knows all other data, asked {question}, achieves at most",
                f"right at even odds     {percent(self.success)} (guessing: 50 %)",
                f"membership advantage   {percent(self.advantage)} (true- minus false-positive rate)",
                "",
                *("  ".join((first.ljust(len(header[0])), second)) for first, second in [header, *rows]),
                "",
                f"{gaussian} (certified where both error rates are at least {_RARE:g}; not beyond)",
            ]
        )

    def __str__(self) -> str:
        return self.table()

    @property
    def _guessing(self) -> bool:
        """Whether nothing was released that depends on the data: the total variation is 0."""
        return self.bounds[0].upper == 0.0

    @staticmethod
    def _rates(false_positive_rate: ArrayLike) -> Array:
        alpha = np.asarray(false_positive_rate, dtype=float)
        if not bool(((alpha >= 0.0) & (alpha <= 1.0)).all()):
            raise InvalidParameterError(f"false-positive rates must lie in [0, 1], got {false_positive_rate!r}")
        return alpha

    def _lines(self) -> tuple[Array, Array]:
        """Slopes and intercepts (2·points,) of α ↦ intercept − slope·α, both branches of each ε."""
        with np.errstate(over="ignore"):
            steep = np.exp(self.epsilons)
        flat = np.exp(-self.epsilons)
        kept = 1.0 - self.deltas
        return np.concatenate((steep, flat)), np.concatenate((kept, flat * kept))


def trade_off(accountant: Accountant, *, group_size: int = 1, points: int = _POINTS) -> TradeOff:
    """Computes the trade-off curve of everything that an accountant has recorded.

    Args:
        accountant: Its ledger and engine; any events that its `delta_curve` covers.
        group_size: For a person with up to so many rows, or so many people, as for `Accountant.get_epsilon`.
        points: Number of ε at which δ is computed, from 0 to where δ is about 1e-8. With 65, true-positive rates of a
            Gaussian mechanism are within 1 % of the tight ones.

    Raises:
        InvalidParameterError: When an argument lies outside its range.
        MixedUnitsError: When some lines are about rows and others about people.
        UnsupportedEventError: When the accountant does not cover an event of the ledger, for groups of this size.
    """
    points = check.count(points, "points", 2)
    largest = _largest(accountant, group_size)
    epsilons = np.linspace(0.0, largest, points) if largest > 0.0 else np.zeros(1)
    return TradeOff(tuple(accountant.delta_curve(epsilons.tolist(), group_size=group_size)))


def _largest(accountant: Accountant, group_size: int) -> float:
    """Where the grid ends. Any end is valid; Rényi accounting finds one that is near enough within a millisecond."""
    renyi = create_accountant("rdp", relation=accountant.relation)
    renyi.ledger = accountant.ledger.copy()
    try:
        ends = [float(renyi.get_epsilon(delta, group_size=group_size)) for delta in _SMALLEST_DELTAS]
    except UnsupportedEventError:
        # Fixed-size batches.
        ends = [float(accountant.get_epsilon(_SMALLEST_DELTAS[0], group_size=group_size))]
    return next((epsilon for epsilon in ends if math.isfinite(epsilon)), 0.0)


def percent(share: float) -> str:
    """Rounded up to hundredths of a per cent, as every bound is."""
    return f"{min(100.0, math.ceil(1e4 * share) / 100):.2f} %"
