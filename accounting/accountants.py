"""Accountants: a ledger, and an engine that turns it into (ε, δ)."""

from __future__ import annotations

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from . import _validation as check
from .answers import Answers
from .bounds import PrivacyBound, rounded_up
from .errors import (
    EngineRangeError,
    FallbackWarning,
    InvalidParameterError,
    LargeDeltaWarning,
    UnsupportedEventError,
    warn_caller,
)
from .events import ADD_OR_REMOVE_ONE, Event, GaussianStep, NoSampling, PoissonSampling, Relation
from .gaussian import gaussian_delta, gaussian_epsilon
from .growing import Limit
from .laplace import laplace_delta, laplace_epsilon
from .ledger import Ledger
from .provenance import Provenance, new_run
from .prv import compose_delta, compose_deltas, compose_epsilon
from .rdp import rdp_to_delta, rdp_to_epsilon
from .states import FORMAT, VERSION, read_ledger
from .terms import Terms, collect

__all__ = ["Accountant", "AutoAccountant", "PRVAccountant", "RDPAccountant", "create_accountant"]

_OF_THE_LEDGER = ("ledger", "_ledger", "_by_hand", "_process", "_answers")
_RDP_PHASES = 1024
_PRV_PHASES = 256
_CLOSE = 2e-4
"""As near as composition brings an upper and a lower bound."""


class Accountant(ABC):
    """Keeps a ledger of releases and bounds their joint privacy loss.

    Args:
        relation: Neighbouring relation of the guarantee.
        dataset_size: Number of records, if it may be used to warn about a δ above one over it.

    Guarantee:
        `get_epsilon` and `get_delta` never lie below the tight value for the ledger, provided that
        its events describe what was done: in particular that Poisson-sampled steps drew every record
        independently with probability `sample_rate`, and added Gaussian noise of standard deviation
        `noise_multiplier` times the L2 sensitivity of what they released.
    """

    mechanism: str

    def __init__(self, *, relation: Relation = ADD_OR_REMOVE_ONE, dataset_size: int | None = None) -> None:
        self.ledger = Ledger(relation)
        self.dataset_size = None if dataset_size is None else check.count(dataset_size, "dataset_size", 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy goes on by itself, under an identity of its own. Older pickles name the ledger without the underscore.
        self.ledger = state["ledger"] if "ledger" in state else state["_ledger"]
        vars(self).update({name: value for name, value in state.items() if name not in _OF_THE_LEDGER})

    @property
    def ledger(self) -> Ledger:
        """Everything recorded. A ledger that is assigned is gone on from, under an identity of its own."""
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._by_hand: Provenance | None = None
        self._process = os.getpid()
        self._answers = Answers(ledger)
        self._fallbacks = 0

    def _provenance(self, given: Provenance | None) -> Provenance:
        """The provenance of an event: what nobody else takes is this accountant's, of this process."""
        if given is not None and given.run:
            return given
        # Another thread may assign a ledger meanwhile.
        own = self._by_hand
        if own is None or self._process != os.getpid():
            own = self._by_hand = Provenance(new_run())
            self._process = os.getpid()
        return own if given is None else replace(given, run=own.run)

    @property
    def relation(self) -> Relation:
        """The neighbouring relation of the guarantee."""
        return self.ledger.relation

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """The steps so far, run-length compressed: (noise_multiplier, sample_rate, steps).

        Raises:
            MixedUnitsError: When the ledger is about people, which such steps do not say: see `Ledger.history`.
            UnsupportedEventError: When the ledger holds other events than plain steps.
        """
        return self.ledger.history()

    def __len__(self) -> int:
        return len(self.ledger)

    def step(
        self, *, noise_multiplier: float, sample_rate: float, steps: int = 1, provenance: Provenance | None = None
    ) -> None:
        """Records steps of DP-SGD.

        Args:
            noise_multiplier: σ, noise standard deviation over sensitivity; positive and finite.
            sample_rate: q, the probability with which each record joins the batch, in [0, 1]; 1 for
                batches that were formed in any other way than by Poisson sampling.
            steps: How many such steps, a whole number.
            provenance: Whose they are; without a run, this accountant's own.

        Raises:
            InvalidParameterError: When a value lies outside its range.
            MixedUnitsError: When the ledger is about another unit than the provenance names, which is rows by default.
        """
        q = check.sample_rate(sample_rate)
        sampling = NoSampling() if q == 1.0 else PoissonSampling(q)
        self.ledger.append(GaussianStep(noise_multiplier, sampling), check.count(steps), self._provenance(provenance))

    def record(self, event: Event, count: int = 1, *, provenance: Provenance | None = None) -> None:
        """Records `count` further events; `provenance` as for `step`.

        Raises:
            MixedUnitsError: As `step`.
            UnsupportedEventError: When the event is not understood under this relation.
        """
        collect([(event, 1)], self.relation)
        self.ledger.append(event, count, self._provenance(provenance))

    def get_epsilon(self, delta: float, *, group_size: int = 1) -> PrivacyBound:
        """Returns the ε of everything recorded, at δ; the same question again is answered from memory.

        Args:
            delta: In (0, 1), best well below one over the number of records.
            group_size: k: for a person with up to k rows, all of them added, removed or replaced together; of a ledger
                that is about people, for k people together. It may lie above k times the ε of one at the same δ, which
                is no bound; see `accounting.groups`.

        Returns:
            A float (the certified upper bound) with its lower bound and provenance.

        Raises:
            InvalidParameterError: When δ lies outside (0, 1), or k is no whole number from 1.
            MixedUnitsError: When some lines are about rows and others about people.
            UnsupportedEventError: When this accountant does not cover an event of the ledger, for groups of this size.
        """
        delta = self._checked(delta)
        return self._kept("epsilon", delta, check.count(group_size, "group_size", 1), self._epsilon)

    def upper_epsilon(self, delta: float) -> float:
        """Returns the certified upper bound alone, the number that `get_epsilon` is: in half its time or less."""
        if not self._is_own:
            return float(self.get_epsilon(delta))
        delta = self._checked(delta)
        if (whole := self._answers.bound((self._answers.state(), type(self), "epsilon", delta, 1))) is not None:
            return float(whole)

        def upper(terms: Terms, delta: float) -> PrivacyBound:
            return self._bound(terms, self._upper_epsilon(terms, delta), 0.0, delta, "upper")

        return float(self._kept("upper epsilon", delta, 1, upper))

    def fits(
        self, *, target_epsilon: float, delta: float, noise_multiplier: float, sample_rate: float, steps: int = 1
    ) -> bool:
        """Whether everything recorded and so many further steps keep within ε, at δ. Nothing is recorded.

        Asked after every step of a schedule whose noise changes it composes only the new step with what it kept of the
        question before, which takes milliseconds (`accounting.growing`): a certified upper bound too, which says yes
        where ε is 0.2 % below the target. Nearer to it, and where that bound says nothing, `upper_epsilon` decides.

        Args:
            target_epsilon: Positive and finite.
            delta: In (0, 1).
            noise_multiplier: σ of each further step.
            sample_rate: q of each further step.
            steps: How many, perhaps 0.

        Raises:
            InvalidParameterError: When a value lies outside its range.
            MixedUnitsError: When some lines are about rows and others about people.

        Guarantee:
            Yes is said only where the tight ε of all of it does not exceed the target.
        """
        limit = Limit(check.target_epsilon(target_epsilon), self._checked(delta))
        sigma, q = check.noise_multiplier(noise_multiplier), check.sample_rate(sample_rate)
        n = check.count(steps, "steps")
        if self._is_own:
            trial: list[tuple[Event, int]] = (
                [(GaussianStep(sigma, NoSampling() if q == 1.0 else PoissonSampling(q)), n)] if n else []
            )
            return self._answers.fits(limit, trial, self._upper_epsilon, renyi=isinstance(self, RDPAccountant))
        probe = copy.deepcopy(self)
        if n:
            provenance = Provenance(unit=min(self.ledger.units, default=""))
            probe.step(noise_multiplier=sigma, sample_rate=q, steps=n, provenance=provenance)
        return float(probe.get_epsilon(limit.delta)) <= limit.epsilon

    @property
    def _is_own(self) -> bool:
        """Whether it is no class that others derive from these, which may answer otherwise."""
        return type(self) in (RDPAccountant, PRVAccountant, AutoAccountant)

    def _checked(self, delta: float) -> float:
        """δ, once it is one, of a ledger that is about one unit."""
        delta = check.delta(delta)
        self.ledger.require_one_unit()
        if self.dataset_size is not None and delta > 1.0 / self.dataset_size:
            warn_caller(
                f"delta={delta:g} exceeds 1/{self.dataset_size}: publishing one record at random would "
                "satisfy it; choose it well below one over the number of records",
                LargeDeltaWarning,
            )
        return delta

    def _kept(
        self, question: str, at: float, group_size: int, answer: Callable[[Terms, float], PrivacyBound]
    ) -> PrivacyBound:
        """The answer given already for the same ledger, or a new one: always for others' classes, which know more."""
        answers, fallbacks = self._answers, self._fallbacks
        # The state first: what others record meanwhile may be in the answer, and is not lacking.
        key = (answers.state(), type(self), question, at, group_size)
        bound = answers.bound(key) if self._is_own else None
        if bound is None:
            terms = answers.collection(group_size).terms()
            nothing = terms.empty or (question == "delta" and at == math.inf)
            bound = self._bound(terms, 0.0, 0.0, at, "exact") if nothing else answer(terms, at)
            if self._fallbacks == fallbacks and self._is_own:
                # What is warned of is warned of again.
                answers.keep(key, bound)
        return bound

    def get_delta(self, epsilon: float, *, group_size: int = 1) -> PrivacyBound:
        """Returns the δ of everything recorded, at ε ≥ 0; `group_size` and attributes as for `get_epsilon`."""
        epsilon = check.epsilon(epsilon)
        self.ledger.require_one_unit()
        return self._kept("delta", epsilon, check.count(group_size, "group_size", 1), self._delta)

    def epsilon_curve(self, deltas: Iterable[float], *, group_size: int = 1) -> list[PrivacyBound]:
        """Returns ε at each δ; `group_size` as for `get_epsilon`."""
        return [self.get_epsilon(delta, group_size=group_size) for delta in deltas]

    def delta_curve(self, epsilons: Iterable[float], *, group_size: int = 1) -> list[PrivacyBound]:
        """Returns δ at each ε ≥ 0; `group_size` as for `get_epsilon`.

        Upper bounds only. One composition answers for all of them, so that they take no longer than a few `get_delta`;
        each may be looser, in particular below 1e-12.
        """
        points = [check.epsilon(epsilon) for epsilon in epsilons]
        self.ledger.require_one_unit()
        terms = collect(self.ledger, self.relation, check.count(group_size, "group_size", 1))
        if terms.empty:
            return [self._bound(terms, 0.0, 0.0, epsilon, "exact") for epsilon in points]
        return self._deltas(terms, points)

    def line_for_a_person(self, delta: float, *, rows: int) -> str:
        """Returns a statement's line: what a person with up to so many rows is promised at δ; see `get_epsilon`.

        Of a ledger that is about people, whose rows do not count: what so many people are promised together.
        """
        bound = self.get_epsilon(delta, group_size=rows)
        return f"for {bound.whom}: ε = {rounded_up(bound.upper)} at δ = {bound.delta:g} ({bound.relation})"

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists, fit for JSON and for weights-only checkpoints."""
        return {"format": FORMAT, "version": VERSION, "mechanism": self.mechanism, "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the ledger by that of a `state_dict`; to keep both, merge it with `ledger_of`.

        Opacus' state dicts, {"history": [(σ, q, steps), …], "mechanism": …}, are understood too: they
        are about adding or removing one record of Poisson-sampled batches.

        Raises:
            LedgerFormatError: When the state is incomplete, of an unknown version, no state at all, or
                about another neighbouring relation than this accountant.
        """
        self.ledger = self.ledger_of(state)

    def ledger_of(self, state: Mapping[str, Any]) -> Ledger:
        """Returns the ledger of a `state_dict`, and leaves this accountant as it is.

        Raises:
            LedgerFormatError: As `load_state_dict` does.
        """
        return read_ledger(state, self.relation)

    def to_opacus(self) -> dict[str, Any]:
        """Returns the state dict of Opacus' accountant of the same kind, which is about rows.

        Raises:
            MixedUnitsError: When the ledger is about people, which the state would not say.
            UnsupportedEventError: When the ledger holds more than Poisson-sampled or unsampled steps, or
                is about replacing records.
        """
        if self.relation != ADD_OR_REMOVE_ONE:
            raise UnsupportedEventError("Opacus accounts for adding or removing one record only")
        return {"history": self.history, "mechanism": "rdp" if self.mechanism == "rdp" else "prv"}

    def _bound(self, terms: Terms, upper: float, lower: float, delta: float, engine: str) -> PrivacyBound:
        if terms.grouping:
            # The lower bound belongs to the rounded phases, not to the recorded ones.
            lower, engine = 0.0, f"{engine} (phases rounded by {terms.grouping:.1e})"
        return PrivacyBound(
            upper,
            lower=lower,
            delta=delta,
            relation=self.relation,
            sampling=terms.sampling,
            engine=engine,
            group_size=terms.group_size,
            unit=next(iter(self.ledger.units), ""),
        )

    def _fallback(self, reason: str) -> None:
        self._fallbacks += 1
        warn_caller(
            f"the {self.mechanism} engine has no certified answer ({reason}); the Rényi bound is returned",
            FallbackWarning,
        )

    def _upper_epsilon(self, terms: Terms, delta: float) -> float:
        """The upper end of `_epsilon`, which may come at less cost."""
        return float(self._epsilon(terms, delta))

    @abstractmethod
    def _epsilon(self, terms: Terms, delta: float) -> PrivacyBound: ...

    @abstractmethod
    def _delta(self, terms: Terms, epsilon: float) -> PrivacyBound: ...

    def _deltas(self, terms: Terms, epsilons: list[float]) -> list[PrivacyBound]:
        return [self._delta(terms, epsilon) for epsilon in epsilons]


def _rdp_epsilon(self: Accountant, terms: Terms, delta: float) -> PrivacyBound:
    terms = terms.grouped(_RDP_PHASES)
    epsilon, _ = rdp_to_epsilon(terms.cumulant(), delta, max_order=terms.max_order)
    return self._bound(terms, epsilon, 0.0, delta, "rdp")


def _rdp_delta(self: Accountant, terms: Terms, epsilon: float) -> PrivacyBound:
    terms = terms.grouped(_RDP_PHASES)
    delta, _ = rdp_to_delta(terms.cumulant(), epsilon, max_order=terms.max_order)
    return self._bound(terms, delta, 0.0, epsilon, "rdp")


class RDPAccountant(Accountant):
    """Rényi accounting: fast and valid for every number of steps, not tight.

    Source:
        See `accounting.rdp`.
    """

    mechanism = "rdp"

    def _epsilon(self, terms: Terms, delta: float) -> PrivacyBound:
        return _rdp_epsilon(self, terms, delta)

    def _delta(self, terms: Terms, epsilon: float) -> PrivacyBound:
        return _rdp_delta(self, terms, epsilon)


class _Question(NamedTuple):
    """What answers a question, for ε or for δ; `nothing` is the answer that promises nothing."""

    gaussian: Callable[..., float]
    laplace: Callable[..., tuple[float, float]]
    rdp: Callable[..., tuple[float, float]]
    compose: Callable[..., tuple[float, float]]
    nothing: float = math.inf


class PRVAccountant(Accountant):
    """Numerical composition of privacy losses: tight, with certified bounds on both sides.

    Ledgers without sampling are answered by the analytic Gaussian mechanism, exactly; Laplace releases alone by their
    closed form, where ε is near the one that holds with certainty (`accounting.laplace`). Where the
    numerical engine cannot certify an answer, or the Rényi bound is smaller, that bound is returned;
    the `engine` of the result says which one answered.

    Source:
        See `accounting.privacy_loss` and `accounting.gaussian`.
    """

    mechanism = "prv"

    def _epsilon(self, terms: Terms, delta: float) -> PrivacyBound:
        return self._composed_epsilon(terms, delta)

    def _upper_epsilon(self, terms: Terms, delta: float) -> float:
        return float(self._composed_epsilon(terms, delta, bracket=False))

    def _composed_epsilon(self, terms: Terms, delta: float, *, bracket: bool = True) -> PrivacyBound:
        compose = partial(compose_epsilon, bracket=bracket)
        return self._composed(terms, delta, _Question(gaussian_epsilon, laplace_epsilon, rdp_to_epsilon, compose))

    def _delta(self, terms: Terms, epsilon: float) -> PrivacyBound:
        question = _Question(gaussian_delta, laplace_delta, rdp_to_delta, compose_delta, nothing=1.0)
        return self._composed(terms, epsilon, question)

    def _composed(self, terms: Terms, at: float, question: _Question) -> PrivacyBound:
        """ε at a δ, or δ at an ε."""
        if terms.gaussian_only:
            lower = question.gaussian(terms.mu, at, lower=True)
            return self._bound(terms, question.gaussian(terms.mu, at), lower, at, "analytic-gaussian")
        known = question.laplace(terms.laplace, at) if terms.laplace_only else (0.0, math.inf)
        if known[1] - known[0] <= _CLOSE * known[1] < math.inf:
            return self._bound(terms, known[1], known[0], at, "analytic-laplace")
        terms = terms.grouped(_PRV_PHASES)
        directions = terms.directions()
        guess, order = question.rdp(terms.cumulant(fixed_as_guess=True), at, max_order=terms.max_order)
        # Fixed-size steps have no certified Rényi bound; there the number only guides the composition.
        rdp = question.nothing if terms.fixed else guess
        if rdp == 0.0:
            return self._bound(terms, 0.0, 0.0, at, "rdp")
        try:
            lower, upper = question.compose(directions, at, guess=(guess, order - 1.0))
            lower, upper = max(lower, known[0]), min(upper, known[1])
        except EngineRangeError as error:
            if terms.fixed:
                raise
            self._fallback(str(error))
            return self._bound(terms, rdp, 0.0, at, "rdp")
        if upper >= rdp:
            return self._bound(terms, rdp, lower, at, "rdp")
        return self._bound(terms, upper, lower, at, "prv")

    def _deltas(self, terms: Terms, epsilons: list[float]) -> list[PrivacyBound]:
        if terms.gaussian_only or terms.renyi_only:
            return super()._deltas(terms, epsilons)
        terms = terms.grouped(_PRV_PHASES)
        try:
            uppers = compose_deltas(terms.directions(), epsilons)
        except EngineRangeError as error:
            if terms.fixed:
                raise
            self._fallback(str(error))
            uppers = [1.0] * len(epsilons)
        bounds = [self._bound(terms, upper, 0.0, at, "prv") for upper, at in zip(uppers, epsilons, strict=True)]
        # Fixed-size steps have no certified Rényi bound.
        return bounds if terms.fixed else [min(bound, _rdp_delta(self, terms, bound.delta)) for bound in bounds]


class AutoAccountant(PRVAccountant):
    """The smallest certified bound among the engines that are valid for the ledger.

    The analytic Gaussian mechanism where nothing is sampled; else the smaller of numerical composition
    and Rényi accounting; Rényi accounting alone for private selection and choices.
    """

    mechanism = "auto"

    def _epsilon(self, terms: Terms, delta: float) -> PrivacyBound:
        return _rdp_epsilon(self, terms, delta) if terms.renyi_only else super()._epsilon(terms, delta)

    def _upper_epsilon(self, terms: Terms, delta: float) -> float:
        return float(self._epsilon(terms, delta)) if terms.renyi_only else super()._upper_epsilon(terms, delta)

    def _delta(self, terms: Terms, epsilon: float) -> PrivacyBound:
        return _rdp_delta(self, terms, epsilon) if terms.renyi_only else super()._delta(terms, epsilon)


def create_accountant(
    mechanism: Literal["rdp", "prv", "auto"] | str,
    *,
    relation: Relation = ADD_OR_REMOVE_ONE,
    dataset_size: int | None = None,
) -> Accountant:
    """Returns a fresh accountant by name.

    Raises:
        InvalidParameterError: When the name is unknown. The central-limit accountant ("gdp") of other
            toolkits is not among them: it is below the truth for many ledgers.
    """
    kinds: dict[str, type[Accountant]] = {
        kind.mechanism: kind for kind in (RDPAccountant, PRVAccountant, AutoAccountant)
    }
    if mechanism not in kinds:
        raise InvalidParameterError(f"unknown accountant {mechanism!r}: choose one of {sorted(kinds)}")
    return kinds[mechanism](relation=relation, dataset_size=dataset_size)
