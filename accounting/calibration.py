"""Noise, steps and sample rates for a privacy target, on its safe side."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from . import _validation as check
from .accountants import Accountant, create_accountant
from .errors import AccountingError, InvalidParameterError, UnreachableTargetError
from .events import ADD_OR_REMOVE_ONE, Relation
from .ledger import Ledger
from .terms import collect

__all__ = [
    "calibrate_ledger",
    "calibrate_noise_multiplier",
    "calibrate_sample_rate",
    "calibrate_steps",
]

_MAX_NOISE = 1e9
_MIN_NOISE = 1e-3
_MAX_STEPS = 10**9
_RELATIVE = 1e-4
_MANY_LINES = 48
_FEW_PHASES = 32
_NEAR_GUESS = 5e-4


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
    relation: Relation = ADD_OR_REMOVE_ONE,
    spent: Accountant | None = None,
    group_size: int = 1,
) -> float:
    """Returns the smallest σ, to 0.01 %, whose ε does not exceed the target.

    Args:
        target_epsilon: Positive, finite.
        delta: In (0, 1).
        sample_rate: q in [0, 1].
        steps: Whole number of steps, at least 1.
        accountant: Name of the engine, as in `create_accountant`; ignored when `spent` is given.
        relation: Neighbouring relation of the guarantee; ignored when `spent` is given.
        spent: An accountant with what has been spent already, which counts too; it is left as it is.
        group_size: k, where the target is for a person with up to k rows.

    Raises:
        UnreachableTargetError: When even very large noise misses the target, or it is spent already.

    Guarantee:
        The accountant, asked about the returned σ and what was spent before, answers at most `target_epsilon`.
    """
    target = check.target_epsilon(target_epsilon)
    delta = check.delta(delta)
    q = check.sample_rate(sample_rate)
    n = check.count(steps, minimum=1)

    before = _unspent(
        create_accountant(accountant, relation=relation) if spent is None else spent, target, delta, group_size
    )

    def epsilon(sigma: float) -> float:
        probe = _after(before)
        probe.step(noise_multiplier=sigma, sample_rate=q, steps=n)
        return _upper(probe, delta, group_size)

    return _smallest_sufficient(epsilon, target)


def calibrate_ledger(
    ledger: Ledger,
    *,
    target_epsilon: float,
    delta: float,
    accountant: str = "auto",
    spent: Accountant | None = None,
    group_size: int = 1,
) -> tuple[float, Ledger]:
    """Scales all noise multipliers of a planned ledger by one factor to meet the target.

    Args:
        ledger: The plan, with the noise multipliers in the wanted proportion.
        target_epsilon: Positive, finite.
        delta: In (0, 1).
        accountant: Name of the engine, as in `create_accountant`; ignored when `spent` is given.
        spent: An accountant with what has been spent already, which counts too, unscaled; it is left as it is.
        group_size: k, where the target is for a person with up to k rows.

    Returns:
        (factor, the scaled ledger): the smallest factor, to 0.01 %, that meets the target.

    Raises:
        UnreachableTargetError: When even very large noise misses the target, or it is spent already.

    Guarantee:
        The accountant, asked about the returned ledger and what was spent before, answers at most `target_epsilon`.
    """
    target = check.target_epsilon(target_epsilon)
    delta = check.delta(delta)

    before = _unspent(
        create_accountant(accountant, relation=ledger.relation) if spent is None else spent, target, delta, group_size
    )

    def epsilon(factor: float, *, rough: bool = False) -> float:
        probe = _after(before)
        probe.ledger = probe.ledger.merge(_of_any_unit(ledger.scaled(factor)))
        return _upper(probe, delta, group_size, rough=rough)

    guess = None
    if len(ledger.entries) > _MANY_LINES:
        # Many distinct steps take long to compose: where to look is found by a few that are about the same.
        with suppress(AccountingError):
            guess = _smallest_sufficient(partial(epsilon, rough=True), target)
    factor = _smallest_sufficient(epsilon, target, guess)
    return factor, ledger.scaled(factor)


def calibrate_steps(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    accountant: str = "prv",
    relation: Relation = ADD_OR_REMOVE_ONE,
    spent: Accountant | None = None,
    group_size: int = 1,
) -> int:
    """Returns the largest number of steps whose ε does not exceed the target.

    Args:
        target_epsilon: Positive, finite.
        delta: In (0, 1).
        noise_multiplier: σ of each step.
        sample_rate: q of each step.
        accountant: Name of the engine; ignored when `spent` is given.
        relation: Neighbouring relation; ignored when `spent` is given.
        spent: An accountant with what has been spent already; it is left as it is.
        group_size: k, where the target is for a person with up to k rows.

    Raises:
        UnreachableTargetError: When not even one step fits, or a billion do.
    """
    target = check.target_epsilon(target_epsilon)
    delta = check.delta(delta)
    sigma = check.noise_multiplier(noise_multiplier)
    q = check.sample_rate(sample_rate)

    def fits(steps: int) -> bool:
        probe = create_accountant(accountant, relation=relation) if spent is None else _after(spent)
        probe.step(noise_multiplier=sigma, sample_rate=q, steps=steps)
        return float(probe.get_epsilon(delta, group_size=group_size)) <= target

    if not fits(1):
        raise UnreachableTargetError(
            f"not one step with noise_multiplier={sigma!r}, sample_rate={q!r} fits epsilon={target!r}: "
            "use more noise or a smaller sample_rate"
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > _MAX_STEPS:
            raise UnreachableTargetError(f"more than {_MAX_STEPS} steps fit epsilon={target!r}: use less noise")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def calibrate_sample_rate(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int,
    accountant: str = "prv",
    relation: Relation = ADD_OR_REMOVE_ONE,
    group_size: int = 1,
) -> float:
    """Returns the largest q, to 0.01 %, whose ε does not exceed the target; 1 if every q does.

    Arguments are those of `calibrate_noise_multiplier`, with σ given.

    Raises:
        UnreachableTargetError: When only a q below 1e-9 would.
    """
    target = check.target_epsilon(target_epsilon)
    delta = check.delta(delta)
    sigma = check.noise_multiplier(noise_multiplier)
    n = check.count(steps, minimum=1)

    def fits(q: float) -> bool:
        probe = create_accountant(accountant, relation=relation)
        probe.step(noise_multiplier=sigma, sample_rate=q, steps=n)
        return float(probe.get_epsilon(delta, group_size=group_size)) <= target

    if fits(1.0):
        return 1.0
    low, high = 1e-9, 1.0
    if not fits(low):
        raise UnreachableTargetError(
            f"epsilon={target!r} is not reached with sample_rate={low!r}: use more noise or fewer steps"
        )
    while high - low > _RELATIVE * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _unspent(spent: Accountant, target: float, delta: float, group_size: int) -> Accountant:
    """The accountant, once it is known to leave something of the target."""
    if not (already := _upper(_after(spent), delta, group_size)) < target:
        raise UnreachableTargetError(
            f"what was spent before amounts to epsilon={already!r} at this delta, which leaves nothing of {target!r}"
        )
    return spent


def _after(spent: Accountant) -> Accountant:
    """Another accountant that goes on from where this one is; its ledger does not say what it is about."""
    probe = create_accountant(spent.mechanism, relation=spent.relation)
    probe.ledger = _of_any_unit(spent.ledger)
    return probe


def _of_any_unit(ledger: Ledger) -> Ledger:
    """A plan is about what the ledger that it is to be added to is about."""
    return ledger.about("") if len(ledger.units) < 2 else ledger.copy()


def _upper(probe: Accountant, delta: float, group_size: int, *, rough: bool = False) -> float:
    """What the accountant would answer, without the lower bound that would come with it; or, if rough, about that."""
    probe.ledger.require_one_unit()
    terms = collect(probe.ledger, probe.relation, check.count(group_size, "group_size", 1))
    if terms.empty:
        return 0.0
    return probe._upper_epsilon(terms.rough(_FEW_PHASES) if rough else terms, delta)


def _smallest_sufficient(epsilon: Callable[[float], float], target: float, guess: float | None = None) -> float:
    """Returns the smallest x, to a relative 1e-4, with epsilon(x) ≤ target, for a decreasing epsilon.

    Args:
        epsilon: The function.
        target: Positive.
        guess: About where it is.
    """
    low, high = 0.0, 1.0 if guess is None else guess * (1.0 + _NEAR_GUESS)
    value_low, value_high = math.inf, epsilon(high)
    # From a guess in steps that grow, until they double.
    width = 1.0 if guess is None else 2.0 * _NEAR_GUESS
    while value_high > target:
        low, value_low, high = high, value_high, high * (1.0 + width)
        if high > _MAX_NOISE:
            raise UnreachableTargetError(
                f"epsilon={target!r} is not reached with noise times {high!r}: "
                "take fewer steps, a smaller sample_rate, or a larger delta"
            )
        value_high, width = epsilon(high), min(4.0 * width, 1.0)
    while low == 0.0:
        middle = high / (1.0 + width)
        if middle < _MIN_NOISE:
            return high
        value, width = epsilon(middle), min(4.0 * width, 1.0)
        if value > target:
            low, value_low = middle, value
        else:
            high, value_high = middle, value
    # ε is close to a power of σ: secant steps in the logarithms, kept inside the bracket.
    for iteration in range(100):
        if high - low <= _RELATIVE * high:
            break
        middle = math.sqrt(low * high)
        if iteration % 3 != 2 and value_high > 0.0 and math.isfinite(value_low) and value_low > value_high:
            share = math.log(value_low / target) / math.log(value_low / value_high)
            near = math.exp(math.log(low) + share * math.log(high / low))
            nudge = 0.4 * _RELATIVE * (1.0 if iteration % 2 == 0 else -1.0)
            near *= 1.0 + nudge
            if low < near < high:
                middle = near
        value = epsilon(middle)
        if value <= target:
            high, value_high = middle, value
        else:
            low, value_low = middle, value
    if not epsilon(high) <= target:
        raise InvalidParameterError("epsilon is not decreasing in the noise; please report this ledger")
    return high
