"""A budget that a ledger is never to exceed, and the steps that are known to fit it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accounting import Accountant, Ledger
from clipless_dp.arguments import positive, share, shown
from clipless_dp.errors import BudgetExhaustedError, ConfigurationError


class Budget:
    """``(ε, δ)`` for all that a ledger holds.

    Args:
        limit: the pair; ``None`` where there is no limit.

    Raises:
        ConfigurationError: it is no pair of a finite ``ε > 0`` and a ``δ`` in (0, 1).
    """

    def __init__(self, limit: tuple[float, float] | None) -> None:
        self.limit = _checked(limit)
        self._allowance = _Allowance()

    def allows(self, accountant: Accountant, noise_multiplier: float, sample_rate: float, steps: int) -> bool:
        """Asks the accountant whether so many further steps fit, and remembers a yes: so many need not ask again."""
        if self.limit is None:
            return True
        epsilon, delta = self.limit
        fits = accountant.fits(
            target_epsilon=epsilon,
            delta=delta,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            steps=steps,
        )
        if fits:
            self._allowance = _Allowance((noise_multiplier, sample_rate), steps, _recorded(accountant), steps)
        return fits

    def require(self, accountant: Accountant, noise_multiplier: float, sample_rate: float) -> None:
        """Counts on one further step, which the caller is to record next.

        Asked for one step, then two, four, …, and by halves where that is too many: an accountant answers some
        2·log₂(steps) times in all, not once for each step.

        Raises:
            BudgetExhaustedError: it is one too many.
        """
        if self.limit is None:
            return
        kept, recorded = self._allowance, _recorded(accountant)
        if kept.kind != (noise_multiplier, sample_rate) or kept.recorded != recorded:
            kept = _Allowance()
        if kept.steps == 0:
            ahead = max(1, 2 * kept.granted)
            while not self.allows(accountant, noise_multiplier, sample_rate, ahead):
                ahead //= 2
                if ahead == 0:
                    epsilon, delta = self.limit
                    raise BudgetExhaustedError(
                        f"one more step would exceed the budget of ε = {epsilon:g} at δ = {delta:g}: "
                        f"{accountant.upper_epsilon(delta):.6g} is spent. Nothing of this step was "
                        "released; stop here"
                    )
            kept = self._allowance
        self._allowance = replace(kept, steps=kept.steps - 1, recorded=_recorded(accountant, 1))


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A state of a ledger: the same object, as long as it was; it only grows."""

    accountant: Accountant
    ledger: Ledger
    events: int

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Recorded)
            and self.accountant is other.accountant
            and self.ledger is other.ledger
            and self.events == other.events
        )


def _recorded(accountant: Accountant, more: int = 0) -> _Recorded:
    return _Recorded(accountant, accountant.ledger, len(accountant) + more)


@dataclass(frozen=True)
class _Allowance:
    """Steps that are known to fit the budget.

    Attributes:
        kind: noise multiplier and sample rate that they were asked for.
        steps: how many are left.
        recorded: the ledger for which this is true.
        granted: how many were asked for at once.
    """

    kind: tuple[float, float] | None = None
    steps: int = 0
    recorded: _Recorded | None = None
    granted: int = 0


def _checked(limit: tuple[float, float] | None) -> tuple[float, float] | None:
    if limit is None:
        return None
    if not (isinstance(limit, (tuple, list)) and len(limit) == 2):
        raise ConfigurationError(f"budget must be a pair (epsilon, delta) or None, got {shown(limit)}")
    return positive("epsilon of budget", limit[0]), share("delta of budget", limit[1], "(0, 1)")
