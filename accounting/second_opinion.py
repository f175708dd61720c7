"""What other accountants say of the same ledger: opacus and prv-accountant, each with what it is known to lack."""

from __future__ import annotations

import importlib.metadata
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tabulate import tabulate

from . import _validation as check
from . import events
from .accountants import AutoAccountant, RDPAccountant
from .events import ADD_OR_REMOVE_ONE, Event, flatten
from .ledger import Ledger

_ERROR = 0.01
"""Of ε, that numerical accountants are asked for: the default of both."""

_MOST_PHASES = 30
"""Different events up to which others are asked: each takes them some tenths of a second."""

_MOST_PLACES = 2e6
"""On the grids of numerical accountants, of all phases together: some 50 seconds, and 2 GiB."""

_ORDERS = [1.0 + x / 10.0 for x in range(1, 100)] + [float(x) for x in range(12, 257)]
"""Of Rényi divergences, to which opacus' own default list of up to 63 adds nothing."""

Bounds = tuple[float | None, float]
"""What ε is at least, if that is said, and at most."""

Steps = Mapping[tuple[float, float], int]
"""How many steps of each noise multiplier and sample rate."""


@dataclass(frozen=True)
class Opinion:
    """What one accountant says.

    Attributes:
        by: package, version and method.
        lower: what ε is at least; ``None`` where it says nothing of that.
        upper: what ε is at most, as far as it is right; ``None`` where it says nothing.
        note: what it is known to lack, or why it says nothing.
    """

    by: str
    lower: float | None
    upper: float | None
    note: str


@dataclass(frozen=True)
class SecondOpinion:
    """ε by this library beside what others say; prints as a table.

    Attributes:
        epsilon: by this library, an upper bound.
        delta: δ.
        opinions: of others.
        lower: what this library certifies ε to be at least, 0 where it does not.
    """

    epsilon: float
    delta: float
    opinions: tuple[Opinion, ...]
    lower: float = 0.0

    @property
    def contradicted(self) -> bool:
        """Whether somebody's lower bound is above this library's upper bound, or an upper bound below its lower one, so
        that one of the two is wrong."""
        return any(
            (opinion.lower is not None and opinion.lower > self.epsilon)
            or (opinion.upper is not None and opinion.upper < self.lower)
            for opinion in self.opinions
        )

    @property
    def checked(self) -> bool:
        """Whether somebody gave a lower bound, so that an ε of this library that is too small could be noticed."""
        return any(opinion.lower is not None for opinion in self.opinions)

    def __str__(self) -> str:
        own = "an upper bound" if self.lower == 0.0 else f"bounds: at least {self.lower:.4f}"
        rows = [("this library", f"{self.epsilon:.4f}", own)]
        for opinion in self.opinions:
            said = "–" if opinion.upper is None else f"{opinion.upper:.4f}"
            if opinion.lower is not None:
                said = f"{opinion.lower:.4f} to {said}"
            rows.append((opinion.by, said, opinion.note))
        table = tabulate(rows, headers=["by", f"epsilon at delta = {self.delta:g}", ""], disable_numparse=True)
        if self.contradicted:
            table += "\nThe answers contradict each other: report it, with the ledger."
        elif not self.checked and self.epsilon > 0.0:
            table += "\nWhether this epsilon is large enough could not be checked: nobody else gave a lower bound."
        return table


def second_opinion(ledger: Ledger, delta: float) -> SecondOpinion:
    """Asks opacus (Rényi and PRV accountants) and prv-accountant (Gopi, Lee & Wutschitz 2021) about a ledger.

    They know Gaussian steps on Poisson samples, prv-accountant Laplace noise too, under add-or-remove-one; what else a
    ledger holds (private selection, samples of a fixed size, events about groups) they are not asked about. Each is a
    number by code that shares nothing with this library's; none is a proof. More than 30 different events, or so many
    steps at so large an ε that their grids would take minutes or gigabytes, they are not asked about either.

    Args:
        ledger: what was released.
        delta: δ in (0, 1).

    Returns:
        All answers. A package that is not installed, fails or does not know an event says nothing, with the reason.

    Raises:
        InvalidParameterError: δ is out of range.
    """
    delta = check.delta(delta)
    accountant = AutoAccountant(relation=ledger.relation)
    accountant.ledger = ledger
    steps, scales, unknown = _known(ledger)
    bound = accountant.get_epsilon(delta)
    phases = len(steps) + len(scales)
    if not phases and not unknown:
        too_long = "nothing was released"
    else:
        too_long = "" if unknown else _too_long(ledger, delta, phases)
    asked: list[tuple[str, str, Callable[[], Bounds], str]] = [
        (
            "opacus",
            "Rényi",
            lambda: _opacus_renyi(steps, delta),
            "an upper bound, loose by a few to dozens of per cent",
        ),
        ("opacus", "PRV", lambda: _opacus_prv(steps, delta), "bounds, to within 0.01; one direction of two"),
        (
            "prv-accountant",
            "PRV",
            lambda: _prv_accountant(steps, scales, delta),
            "bounds, in exact arithmetic; one direction of two",
        ),
    ]
    opinions = []
    for package, method, ask, note in asked:
        missing = unknown or ([f"Laplace noise of scale {scale:g}" for scale in scales] if package == "opacus" else [])
        silent = f"does not know {', '.join(missing)}" if missing else too_long
        if method == "Rényi" and not missing and 0 < phases <= _MOST_PHASES:
            # It has no grid.
            silent = ""
        opinions.append(_opinion(package, method, ask, note, silent))
    return SecondOpinion(bound, delta, tuple(opinions), getattr(bound, "lower", 0.0))


def _too_long(ledger: Ledger, delta: float, phases: int) -> str:
    """Why numerical accountants would take too long, or an empty string.

    Theirs is one grid for each phase, over ``[-L, L]`` by steps of ``error/√(T·ln(12/δ')/2)``, ``T`` the number of all
    releases and ``δ' = δ/1000``; ``L`` is 3 more than ε by Rényi accounting at ``δ'/4``, or of one release at
    ``δ'/(8T)`` (Gopi, Lee & Wutschitz 2021, Remark 5.6).
    """
    if phases > _MOST_PHASES:
        return f"{phases} different events, of which {_MOST_PHASES} are as many as it takes in reasonable time"
    entries = list(flatten(ledger.entries))
    total = sum(count for _, count in entries)
    farthest = max(
        _renyi(entries, delta / 4000.0), *(_renyi([(event, 1)], delta / (8000.0 * total)) for event, _ in entries)
    )
    places = phases * 2.0 * (farthest + 3.0) / _ERROR * math.sqrt(0.5 * total * math.log(12e3 / delta))
    if places > _MOST_PLACES:
        return f"{total} releases of up to epsilon = {farthest:.0f}: too long for it, on a grid of {places:.1g} places"
    return ""


def _renyi(entries: list[tuple[Event, int]], delta: float) -> float:
    accountant = RDPAccountant()
    for event, count in entries:
        accountant.record(event, count)
    return float(accountant.get_epsilon(max(delta, sys.float_info.min)))


def _known(ledger: Ledger) -> tuple[dict[tuple[float, float], int], dict[float, int], list[str]]:
    """Gaussian steps, scales of Laplace noise, and what is neither, in words."""
    steps: dict[tuple[float, float], int] = {}
    scales: dict[float, int] = {}
    unknown = [] if ledger.relation == ADD_OR_REMOVE_ONE else [f"neighbours by {ledger.relation}"]
    for event, count in flatten(ledger.entries):
        sampling = event.sampling if isinstance(event, (events.GaussianStep, events.GaussianVectorStep)) else None
        if isinstance(event, events.LaplaceRelease):
            scales[event.noise_multiplier] = scales.get(event.noise_multiplier, 0) + count
        elif isinstance(sampling, events.PoissonSampling):
            key = event.noise_multiplier, sampling.sample_rate
            steps[key] = steps.get(key, 0) + count
        elif isinstance(sampling, events.NoSampling) or isinstance(
            event, (events.GaussianRelease, events.ShuffledEpoch)
        ):
            key = event.noise_multiplier, 1.0
            steps[key] = steps.get(key, 0) + count
        else:
            unknown.append(type(event).__name__)
    return steps, scales, sorted(set(unknown))


def _opinion(package: str, method: str, ask: Callable[[], Bounds], note: str, silent: str) -> Opinion:
    try:
        by = f"{package} {importlib.metadata.version(package)}, {method}"
    except importlib.metadata.PackageNotFoundError:
        return Opinion(f"{package}, {method}", None, None, f"not installed: pip install {package}")
    if silent:
        return Opinion(by, None, None, silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lower, upper = ask()
    except Exception as error:
        return Opinion(by, None, None, f"fails: {type(error).__name__}: {error}")
    if not math.isfinite(upper):
        return Opinion(by, None, None, f"answers {upper}")
    # Beyond some delta everything is private, and extrapolations are negative.
    return Opinion(by, None if lower is None else max(lower, 0.0), max(upper, 0.0), note)


def _opacus_renyi(steps: Steps, delta: float) -> Bounds:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    total = [0.0] * len(_ORDERS)
    for (sigma, rate), count in steps.items():
        some = compute_rdp(q=rate, noise_multiplier=sigma, steps=count, orders=_ORDERS)
        total = [one + float(other) for one, other in zip(total, some, strict=True)]
    return None, float(get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)[0])


def _opacus_prv(steps: Steps, delta: float) -> Bounds:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, count) for (sigma, rate), count in steps.items()]
    slack = delta / 1000.0
    upper = float(accountant.get_epsilon(delta, eps_error=_ERROR, delta_error=slack))
    # It returns its estimate at delta - slack plus the error; what it computes as lower bound, and drops, is the one at
    # delta + slack minus the error, on the same grid.
    above = float(accountant.get_epsilon(delta + 2.0 * slack, eps_error=_ERROR, delta_error=slack))
    return above - 2.0 * _ERROR, upper


def _prv_accountant(steps: Steps, scales: Mapping[float, int], delta: float) -> Bounds:
    from prv_accountant import GaussianMechanism, LaplaceMechanism, PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanisms = [
        GaussianMechanism(noise_multiplier=sigma)
        if rate == 1.0
        else PoissonSubsampledGaussianMechanism(noise_multiplier=sigma, sampling_probability=rate)
        for sigma, rate in steps
    ]
    mechanisms += [LaplaceMechanism(mu=1.0 / scale) for scale in scales]
    counts = [*steps.values(), *scales.values()]
    accountant = PRVAccountant(
        prvs=mechanisms, max_self_compositions=counts, eps_error=_ERROR, delta_error=delta / 1000.0
    )
    lower, _, upper = accountant.compute_epsilon(delta=delta, num_self_compositions=counts)
    return float(lower), float(upper)
