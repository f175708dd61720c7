"""Private hyper-parameter search: a random, secret number of runs, of which the best one is released."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from accounting import (
    ADD_OR_REMOVE_ONE,
    Accountant,
    AnyOf,
    GaussianRelease,
    GaussianStep,
    Ledger,
    PrivateSelection,
    Provenance,
    calibrate_ledger,
    create_accountant,
    new_run,
)
from clipless_dp.arguments import require_accountant
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.model import DPLipModel, lineage, register
from clipless_dp.noise import NoiseSource, noise_source, noisy, randomness, source_name
from clipless_dp.sampling import Samples
from clipless_dp.sampling.people import (
    ROWS_PER_GROUP,
    GroupWeights,
    People,
    column_of,
    people_of,
    refuse_other_units,
)
from clipless_dp.sampling.samples import public_size
from clipless_dp.training import Data, Execution, Learning, Plan, evaluate, fit
from clipless_dp.training.evaluation import right_by_row
from clipless_dp.training.groups import names

SETTINGS = frozenset(names(Learning, Execution)) - {"stream", "compile"}
"""Arguments of ``fit`` in which candidates may differ: not by where data lies, which all share, or what is compiled."""

_random = secrets.SystemRandom()


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        build: makes a new wrapped model on its device, without looking at the data or at what was trained before.
        settings: arguments of :func:`clipless_dp.fit`, among them ``epochs`` and ``batch_size``.
    """

    build: Callable[[], DPLipModel]
    settings: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class SearchResult:
    """What :func:`private_search` releases. The number of runs is not in it, and neither are the other runs.

    Attributes:
        model: of the best run.
        candidate: how it was trained.
        score: by which it was the best; minus infinity where, with the Poisson distribution, nothing was run.
        epsilon: spent by the whole search and what the accountant held before, an upper bound.
        delta: the δ it holds for.
        accountant: whose ledger holds the search as one event. The ledgers of single runs say too little.
    """

    model: DPLipModel
    candidate: Candidate
    score: float
    epsilon: float
    delta: float
    accountant: Accountant

    def __str__(self) -> str:
        return f"ε = {self.epsilon:.4f} at δ = {self.delta:g}, score {self.score:.4g}, {dict(self.candidate.settings)}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"


def private_search(
    candidates: Sequence[Candidate],
    dataset: Data,
    *,
    epsilon: float,
    delta: float,
    mean_runs: float,
    shape: float | str = 1.0,
    validation: Data | None = None,
    score_noise_multiplier: float | None = None,
    accountant: Accountant | None = None,
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    groups: Any = None,
    rows_per_group: int = ROWS_PER_GROUP,
    group_weights: GroupWeights = "mean",
) -> SearchResult:
    """Trains a random number of randomly drawn candidates, and returns the best one, within one budget.

    The number K of runs follows :class:`accounting.PrivateSelection`, each run draws a candidate uniformly, and the
    noise of all candidates is scaled by one factor so that the search as a whole spends at most ``epsilon``. Time is
    that of K runs. ``docs/search.md`` says what it costs, and when it is not worth it.

    Args:
        candidates: to draw from.
        dataset: as for :func:`clipless_dp.fit`.
        epsilon: target ε of everything together.
        delta: target δ.
        mean_runs: E[K], at least 1 (positive for Poisson): ``m`` candidates are tried with a chance of about
            ``1 - exp(-mean_runs/m)`` each.
        shape: ``η`` of the truncated negative binomial distribution, 1 for the geometric one, 0 for the logarithmic
            one, which costs least and varies most; or ``"poisson"``.
        validation: *public* data, or data that is protected by nothing, by whose accuracy (or loss) runs are compared.
        score_noise_multiplier: in place of ``validation``: runs are compared by the number of training samples they
            classify correctly, with noise of at least this standard deviation, which is charged; with ``groups`` by the
            sum over people of the shares of their rows that are right. A sample, or a person, moves it by at most 1.
        accountant: ``"rdp"`` or ``"auto"``, made by :func:`accounting.create_accountant`, whose ledger holds what was
            released before; the search is recorded there.
        dataset_size: public number of samples.
        noise: ``"system"``, ``"secure"`` or a source of your own that is not reproducible.
        groups, rows_per_group, group_weights: as for :func:`clipless_dp.fit`: the search is about people then.

    Raises:
        ConfigurationError: an argument is out of range, or a candidate has settings that are not :data:`SETTINGS`, or
            the noise is reproducible.
        PrivacyError: a run has spent otherwise than planned: nothing is returned.
        UnreachableTargetError: no noise meets the target.
        What interrupts a run is raised as it is, with the search's ``accountant`` as its ``private_accountant``: the
        whole search is paid for.

    Guarantee:
        Model, candidate and score are together (``epsilon``, ``delta``)-differentially private under adding or removing
        one sample of ``dataset``, or with ``groups`` one person, which ``validation`` is no part of. Nothing else may
        be released: not K, which the search's duration tells, not what a run prints, and no checkpoint.

    Source:
        Papernot and Steinke 2022, *Hyperparameter tuning with Rényi differential privacy*, Theorems 2 and 6.
    """
    source, accountant = _check_search(validation, score_noise_multiplier, accountant, noise)
    dataset, groups = column_of(dataset, groups)
    inputs, targets = Samples.to_train_on(dataset).all()
    people = people_of(groups, len(inputs), rows_per_group, group_weights)
    size = public_size(dataset_size, len(inputs), people)
    refuse_other_units(accountant.ledger, "row" if people is None else "person")
    if people is not None:
        people.warn_of_size(size)
    if not candidates:
        raise ConfigurationError("there are no candidates to draw from")
    multipliers, trials = [], []
    for candidate in candidates:
        _rehearse(candidate, (inputs[:1], targets[:1]), scored=validation is None)
        multiplier, trial = _trial(_plan(candidate.settings, size), epsilon, delta, score_noise_multiplier)
        multipliers.append(multiplier)
        trials.append(trial)
    planned = Ledger()
    planned.append(PrivateSelection(((AnyOf(tuple(trials)), 1),), mean_runs, shape))
    factor, planned = calibrate_ledger(planned, target_epsilon=epsilon, delta=delta, spent=accountant)
    ((event, _),) = planned.entries
    assert isinstance(event, PrivateSelection)
    # Before the first run: what fails later has been paid for.
    run = new_run()
    known = Provenance(
        run, sampling="announced", noise=source_name(type(source)), unit="" if people is None else "person"
    )
    accountant.record(event, provenance=known)
    search = _Search(candidates, (inputs, targets), size, validation, source, event, multipliers, factor, people)
    # How often something warns, or what a run says of its batches, would tell about the number of runs.
    with warnings.catch_warnings(), _paid(accountant):
        warnings.simplefilter("ignore")
        score, index, model = search.best(epsilon, delta)
    # The ledger of the search holds what the model's own run released, as one event.
    lineage.of(model).restart({run: 1})
    return SearchResult(model, candidates[index], score, float(accountant.get_epsilon(delta)), delta, accountant)


def _check_search(
    validation: Data | None,
    score_noise_multiplier: float | None,
    accountant: Accountant | None,
    noise: NoiseSource | str | None,
) -> tuple[NoiseSource, Accountant]:
    """The noise and the accountant of a search, once they are known to cover it."""
    if placement.world().size > 1:
        raise ConfigurationError("a search draws secret numbers, which several ranks would draw differently: run one")
    if (validation is None) == (score_noise_multiplier is None):
        raise ConfigurationError("give either validation, public data, or score_noise_multiplier")
    accountant = create_accountant("rdp") if accountant is None else require_accountant(accountant)
    if accountant.mechanism == "prv" or accountant.relation != ADD_OR_REMOVE_ONE:
        raise ConfigurationError(
            "a search is covered by Rényi accounting of adding or removing one sample: make the accountant by "
            "create_accountant('rdp') or ('auto')"
        )
    source = noise_source(noise)
    if source.reproducible:
        raise ConfigurationError(
            "reproducible noise is a function of the step, so all runs of a search would share it, and it cancels "
            "between them: use noise='system' or 'secure'"
        )
    return source, accountant


@dataclass(frozen=True)
class _Search:
    """Runs that are planned and paid for.

    Attributes:
        event: what the ledger holds of them all.
        multipliers: of each candidate, times ``factor`` the noise of its runs.
    """

    candidates: Sequence[Candidate]
    data: tuple[Tensor, Tensor]
    size: int
    validation: Data | None
    source: NoiseSource
    event: PrivateSelection
    multipliers: Sequence[float]
    factor: float
    people: People | None = None

    def best(self, epsilon: float, delta: float) -> tuple[float, int, DPLipModel]:
        """Score, candidate and model of the best run, untrained where there was none."""
        best: tuple[float, int, DPLipModel] | None = None
        trained: list[ReferenceType[Tensor]] = []
        for _ in range(self.event.quantile(_random.random())):
            index = _random.randrange(len(self.candidates))
            _count_from_anywhere()
            model = _require_new(self.candidates[index].build(), trained)
            result = fit(
                model,
                self.data,
                epsilon=epsilon,
                delta=delta,
                noise_multiplier=self.multipliers[index] * self.factor,
                accountant="rdp",
                dataset_size=self.size,
                noise=self.source,
                progress=False,
                **self._about_people(),
                **self.candidates[index].settings,
            )
            score = self._score(model, index, result.optimizer.accountant.ledger)
            if best is None or score > best[0]:
                best = score, index, model
        _count_from_anywhere()
        if best is None:
            index = _random.randrange(len(self.candidates))
            best = -math.inf, index, self.candidates[index].build()
        return best

    def _about_people(self) -> dict[str, Any]:
        people = self.people
        if people is None:
            return {}
        return {"groups": people, "rows_per_group": people.rows_per_group, "group_weights": people.weights}

    def _score(self, model: DPLipModel, index: int, spent: Ledger) -> float:
        """By what a run is compared, once it is seen that it has spent what was planned."""
        # An exact count of the data: what is released is the model.
        model.nonfinite_samples.zero_()
        ((choice, _),) = self.event.trial
        *steps, last = choice.alternatives[index]
        if self.validation is not None:
            steps.append(last)
        _require_as_planned(spent, steps, source_name(type(self.source)))
        if self.validation is not None:
            accuracy, loss = evaluate(model, self.validation)
            score = -loss if accuracy is None else accuracy
        else:
            score = float(noisy(self._hits(model), last[0].noise_multiplier, self.source)) / self.size
        return -math.inf if math.isnan(score) else score

    def _hits(self, model: DPLipModel) -> float:
        """What the noise of scores hides: a sum to which each row, or each person, adds between 0 and 1.

        A person adds the mean over all of their rows, of which ``rows_per_group`` is no limit: a mean needs none.
        """
        right = right_by_row(model, self.data)
        assert right is not None
        return float(right.sum() if self.people is None else right @ self.people.shares())


def _count_from_anywhere() -> None:
    """Numbers that a process counts on would tell how many runs there were, and which of them was the best."""
    register.count_from(secrets.randbits(48))
    randomness.count_from(secrets.randbits(48))


@contextmanager
def _paid(accountant: Accountant) -> Iterator[None]:
    """Hands the ledger of the search on with an exception, in place of that of the run which it came from."""
    try:
        yield
    except BaseException as error:
        # The ledger of one run says too little, and how long it was tells of how many there were.
        for name in ("private_optimizer", "__notes__"):
            if hasattr(error, name):
                delattr(error, name)
        error.private_accountant = accountant  # type: ignore[attr-defined]
        raise


def _check(candidate: Candidate) -> None:
    unknown = sorted(set(candidate.settings) - SETTINGS)
    if unknown:
        raise ConfigurationError(f"candidates cannot set {', '.join(unknown)}: only {', '.join(sorted(SETTINGS))}")
    missing = sorted({"epochs", "batch_size"} - set(candidate.settings))
    if missing:
        raise ConfigurationError(f"candidates need {' and '.join(missing)}: no results may choose them later")
    for group in (Learning, Execution):
        # Refuses what is out of range.
        group(**{name: candidate.settings[name] for name in names(group) if name in candidate.settings})


def _require_new(model: DPLipModel, before: list[ReferenceType[Tensor]]) -> DPLipModel:
    """The model, once it is seen that it shares no weight with earlier ones: runs must not learn from each other."""
    parameters = list(model.parameters())
    if any(reference() is parameter for reference in before for parameter in parameters):
        raise ConfigurationError("build() must make a new model each time: runs of a search must not share weights")
    before += [ref(parameter) for parameter in parameters]
    return model


def _rehearse(candidate: Candidate, sample: tuple[Tensor, Tensor], *, scored: bool) -> None:
    """Builds two models, so that what they share, or what does not fit the data, shows before anything is paid for."""
    _check(candidate)
    built: list[ReferenceType[Tensor]] = []
    _require_new(candidate.build(), built)
    second = _require_new(candidate.build(), built)
    evaluate(second, sample)
    if scored and right_by_row(second, sample) is None:
        raise ConfigurationError("score_noise_multiplier counts correct predictions: the loss is of no classifier")


def _plan(settings: Mapping[str, Any], size: int) -> Plan:
    batch_size, epochs = settings["batch_size"], settings["epochs"]
    if batch_size > size:
        raise ConfigurationError(f"a candidate needs a batch_size from 1 to {size}, got {batch_size!r}")
    return Plan.of(epochs, batch_size, size, settings.get("noise_schedule"))


def _trial(plan: Plan, epsilon: float, delta: float, score: float | None) -> tuple[float, tuple[Any, ...]]:
    """The noise by which one run alone meets the target, and the events of that run, of its score among them."""
    multiplier, planned = calibrate_ledger(plan.ledger, target_epsilon=epsilon, delta=delta, accountant="rdp")
    if score is not None:
        planned.append(GaussianRelease(score))
    return multiplier, tuple(planned.entries)


def _require_as_planned(spent: Ledger, planned: Sequence[tuple[Any, int]], source: str) -> None:
    as_planned = len(spent.entries) == len(planned) and all(
        count == wanted_count
        and isinstance(event, GaussianStep)
        and event.sampling == wanted.sampling
        # Factors of a schedule are multiplied in another order here and there.
        and event.noise_multiplier >= wanted.noise_multiplier * (1.0 - 1e-12)
        for (event, count), (wanted, wanted_count) in zip(spent.entries, planned, strict=True)
    )
    of_this_source = all(
        line.provenance.noise == source and line.provenance.sampling in ("announced", "none") for line in spent.lines
    )
    if not (as_planned and of_this_source):
        raise PrivacyError("a run of the search has spent otherwise than planned: what it learned is not released")
