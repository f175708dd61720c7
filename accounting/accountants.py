"""Accountants: a history of steps, and an engine that turns it into (ε, δ)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from . import _validation as check
from .bounds import PrivacyBound
from .errors import EngineRangeError, InvalidParameterError, LedgerFormatError
from .gaussian import gaussian_delta, gaussian_epsilon
from .pairs import DominatingPair, GaussianPair
from .prv import compose_delta, compose_epsilon, poisson_parts
from .rdp import largest_useful_order, phases_cumulant, rdp_to_delta, rdp_to_epsilon

__all__ = ["Accountant", "AutoAccountant", "PRVAccountant", "RDPAccountant", "create_accountant"]

_FORMAT = "accounting.state"
_VERSION = 1

Phases = dict[tuple[float, float], int]


class Accountant(ABC):
    """Records steps of DP-SGD and bounds their joint privacy loss under add-or-remove-one.

    Guarantee:
        `get_epsilon` and `get_delta` never lie below the tight value for the recorded steps,
        provided that each step sampled records independently with probability `sample_rate`
        (1 if it did not sample) and added Gaussian noise of standard deviation
        `noise_multiplier` times the L2 sensitivity of what it released.
    """

    mechanism: str

    def __init__(self) -> None:
        self._history: list[tuple[float, float, int]] = []

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """The steps so far, run-length compressed: (noise_multiplier, sample_rate, steps)."""
        return list(self._history)

    def __len__(self) -> int:
        return sum(n for _, _, n in self._history)

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Records steps.

        Args:
            noise_multiplier: σ, noise standard deviation over sensitivity; positive and finite.
            sample_rate: q, the probability with which each record joins the batch, in [0, 1].
            steps: How many such steps, a whole number.

        Raises:
            InvalidParameterError: When a value lies outside its range.
        """
        sigma = check.noise_multiplier(noise_multiplier)
        q = check.sample_rate(sample_rate)
        n = check.count(steps)
        if n == 0:
            return
        if self._history and self._history[-1][:2] == (sigma, q):
            n += self._history.pop()[2]
        self._history.append((sigma, q, n))

    def get_epsilon(self, delta: float) -> PrivacyBound:
        """Returns the ε of everything recorded, at δ.

        Args:
            delta: In (0, 1), best well below one over the number of records.

        Returns:
            A float (the certified upper bound) with its lower bound and provenance.
        """
        delta = check.delta(delta)
        phases = self._phases()
        if not phases:
            return self._bound(0.0, 0.0, delta, "exact")
        return self._epsilon(phases, delta)

    def get_delta(self, epsilon: float) -> PrivacyBound:
        """Returns the δ of everything recorded, at ε ≥ 0."""
        epsilon = check.epsilon(epsilon)
        phases = self._phases()
        if not phases or epsilon == math.inf:
            return self._bound(0.0, 0.0, epsilon, "exact")
        return self._delta(phases, epsilon)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists, fit for JSON and for weights-only checkpoints."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "mechanism": self.mechanism,
            "history": [[sigma, q, n] for sigma, q, n in self._history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the history by that of a `state_dict`; Opacus' state dicts are understood too.

        Raises:
            LedgerFormatError: When the state is of an unknown version, incomplete or no state at all.
        """
        if not isinstance(state, Mapping) or "history" not in state:
            raise LedgerFormatError("not an accountant state: it has no 'history'")
        if "format" in state and state["format"] != _FORMAT:
            raise LedgerFormatError(f"unknown format {state['format']!r}, expected {_FORMAT!r}")
        if "format" in state and state.get("version") != _VERSION:
            raise LedgerFormatError(
                f"unknown format version {state.get('version')!r}: this release reads version {_VERSION}; "
                "update the package that reads it"
            )
        fresh = type(self)()
        for entry in state["history"]:
            if not isinstance(entry, (list, tuple)) or len(entry) != 3:
                raise LedgerFormatError(f"history entry {entry!r} is not (noise_multiplier, sample_rate, steps)")
            fresh.step(noise_multiplier=entry[0], sample_rate=entry[1], steps=entry[2])
        self._history = fresh._history

    def _phases(self) -> Phases:
        phases: Phases = {}
        for sigma, q, n in self._history:
            if q > 0.0:
                phases[sigma, q] = phases.get((sigma, q), 0) + n
        return phases

    def _bound(self, upper: float, lower: float, delta: float, engine: str) -> PrivacyBound:
        rates = {q for _, q, _ in self._history}
        sampling = "none" if rates <= {1.0} else "poisson"
        return PrivacyBound(upper, lower=lower, delta=delta, sampling=sampling, engine=engine)

    @abstractmethod
    def _epsilon(self, phases: Phases, delta: float) -> PrivacyBound: ...

    @abstractmethod
    def _delta(self, phases: Phases, epsilon: float) -> PrivacyBound: ...


def _gaussian_only(phases: Phases) -> float | None:
    if all(q == 1.0 for _, q in phases):
        return math.sqrt(math.fsum(n / sigma**2 for (sigma, _), n in phases.items()))
    return None


def _max_order(phases: Phases) -> float:
    return max(largest_useful_order(sigma, q) for sigma, q in phases)


class RDPAccountant(Accountant):
    """Rényi accounting: fast, valid everywhere, not tight.

    Source:
        See `accounting.rdp`.
    """

    mechanism = "rdp"

    def _epsilon(self, phases: Phases, delta: float) -> PrivacyBound:
        epsilon, _ = rdp_to_epsilon(phases_cumulant(phases), delta, max_order=_max_order(phases))
        return self._bound(epsilon, 0.0, delta, "rdp")

    def _delta(self, phases: Phases, epsilon: float) -> PrivacyBound:
        delta, _ = rdp_to_delta(phases_cumulant(phases), epsilon, max_order=_max_order(phases))
        return self._bound(delta, 0.0, epsilon, "rdp")


class PRVAccountant(Accountant):
    """Numerical composition of privacy losses: tight, with certified bounds on both sides.

    Ledgers without sampling are answered by the analytic Gaussian mechanism, exactly.

    Source:
        See `accounting.privacy_loss` and `accounting.gaussian`.
    """

    mechanism = "prv"

    def _epsilon(self, phases: Phases, delta: float) -> PrivacyBound:
        mu = _gaussian_only(phases)
        if mu is not None:
            lower = gaussian_epsilon(mu, delta, lower=True)
            return self._bound(gaussian_epsilon(mu, delta), lower, delta, "analytic-gaussian")
        epsilon, order = rdp_to_epsilon(phases_cumulant(phases), delta, max_order=_max_order(phases))
        guess = (epsilon, order - 1.0)
        try:
            lower, upper = compose_epsilon(_directions(phases), delta, guess=guess)
        except EngineRangeError:
            return self._bound(epsilon, 0.0, delta, "rdp")
        if upper >= epsilon:
            return self._bound(epsilon, 0.0, delta, "rdp")
        return self._bound(upper, lower, delta, "prv")

    def _delta(self, phases: Phases, epsilon: float) -> PrivacyBound:
        mu = _gaussian_only(phases)
        if mu is not None:
            return self._bound(gaussian_delta(mu, epsilon), 0.0, epsilon, "analytic-gaussian")
        delta, order = rdp_to_delta(phases_cumulant(phases), epsilon, max_order=_max_order(phases))
        guess = (delta, order - 1.0)
        try:
            lower, upper = compose_delta(_directions(phases), epsilon, guess=guess)
        except EngineRangeError:
            return self._bound(delta, 0.0, epsilon, "rdp")
        if upper >= delta:
            return self._bound(delta, 0.0, epsilon, "rdp")
        return self._bound(upper, lower, epsilon, "prv")


def _directions(phases: Phases) -> list[list[tuple[DominatingPair, int]]]:
    subsampled = {key: n for key, n in phases.items() if key[1] < 1.0}
    mu = _gaussian_only({key: n for key, n in phases.items() if key[1] == 1.0})
    rest: list[tuple[DominatingPair, int]] = [(GaussianPair(mu), 1)] if mu else []
    return [poisson_parts(subsampled, adding) + rest for adding in (False, True)]


class AutoAccountant(PRVAccountant):
    """The smallest certified bound among the engines that are valid for the ledger."""

    mechanism = "auto"


def create_accountant(mechanism: Literal["rdp", "prv", "auto"] | str) -> Accountant:
    """Returns a fresh accountant by name.

    Raises:
        InvalidParameterError: When the name is unknown.
    """
    kinds: dict[str, type[Accountant]] = {
        kind.mechanism: kind for kind in (RDPAccountant, PRVAccountant, AutoAccountant)
    }
    if mechanism not in kinds:
        raise InvalidParameterError(f"unknown accountant {mechanism!r}: choose one of {sorted(kinds)}")
    return kinds[mechanism]()
