"""What other accountants say of the same ledger: opacus and prv-accountant, each with what it is known to lack."""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tabulate import tabulate

from . import _validation as check
from .accountants import AutoAccountant
from .events import (
    ADD_OR_REMOVE_ONE,
    GaussianRelease,
    GaussianStep,
    GaussianVectorStep,
    LaplaceRelease,
    NoSampling,
    PoissonSampling,
    ShuffledEpoch,
    flatten,
)
from .ledger import Ledger

_ERROR = 0.01
"""Of ε, that numerical accountants are asked for: the default of both."""

_ORDERS = [1.0 + x / 10.0 for x in range(1, 100)] + [float(x) for x in range(12, 257)]
"""Of Rényi divergences, to which opacus' own default list of up to 63 adds nothing."""

Steps = Mapping[tuple[float, float], int]
"""How many steps of each noise multiplier and sample rate."""


@dataclass(frozen=True)
class Opinion:
    """What one accountant says.

    Attributes:
        by: package, version and method.
        lower: what ε is at least, where it says so, else 0.
        upper: what ε is at most, as far as it is right; ``None`` where it says nothing.
        note: what it is known to lack, or why it says nothing.
    """

    by: str
    lower: float
    upper: float | None
    note: str


@dataclass(frozen=True)
class SecondOpinion:
    """ε by this library beside what others say; prints as a table.

    Attributes:
        epsilon: by this library, an upper bound.
        delta: δ.
        opinions: of others.
    """

    epsilon: float
    delta: float
    opinions: tuple[Opinion, ...]

    @property
    def contradicted(self) -> bool:
        """Whether somebody's lower bound is above this library's upper bound, so that one of the two is wrong."""
        return any(opinion.lower > self.epsilon for opinion in self.opinions)

    def __str__(self) -> str:
        rows = [("this library", f"{self.epsilon:.4f}", "an upper bound")]
        for opinion in self.opinions:
            said = "–" if opinion.upper is None else f"{opinion.upper:.4f}"
            if opinion.lower > 0.0:
                said = f"{opinion.lower:.4f} to {said}"
            rows.append((opinion.by, said, opinion.note))
        table = tabulate(rows, headers=["by", f"epsilon at delta = {self.delta:g}", ""], disable_numparse=True)
        if self.contradicted:
            table += "\nThe answers contradict each other: report it, with the ledger."
        return table


def second_opinion(ledger: Ledger, delta: float) -> SecondOpinion:
    """Asks opacus (Rényi and PRV accountants) and prv-accountant (Gopi, Lee & Wutschitz 2021) about a ledger.

    They know Gaussian steps on Poisson samples, prv-accountant Laplace noise too, under add-or-remove-one; what else a
    ledger holds (private selection, samples of a fixed size, events about groups) they are not asked about. Each is a
    number by code that shares nothing with this library's; none is a proof.

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
    asked: list[tuple[str, str, Callable[[], tuple[float, float]], str]] = [
        (
            "opacus",
            "Rényi",
            lambda: _opacus_renyi(steps, delta),
            "an upper bound, loose by a few to dozens of per cent",
        ),
        ("opacus", "PRV", lambda: _opacus_prv(steps, delta), "to within 0.01; one direction of two"),
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
        opinions.append(_opinion(package, method, ask, note, missing))
    return SecondOpinion(accountant.get_epsilon(delta), delta, tuple(opinions))


def _known(ledger: Ledger) -> tuple[dict[tuple[float, float], int], dict[float, int], list[str]]:
    """Gaussian steps, scales of Laplace noise, and what is neither, in words."""
    steps: dict[tuple[float, float], int] = {}
    scales: dict[float, int] = {}
    unknown = [] if ledger.relation == ADD_OR_REMOVE_ONE else [f"neighbours by {ledger.relation}"]
    for event, count in flatten(ledger.entries):
        sampling = event.sampling if isinstance(event, (GaussianStep, GaussianVectorStep)) else None
        if isinstance(event, LaplaceRelease):
            scales[event.noise_multiplier] = scales.get(event.noise_multiplier, 0) + count
        elif isinstance(sampling, PoissonSampling):
            key = event.noise_multiplier, sampling.sample_rate
            steps[key] = steps.get(key, 0) + count
        elif isinstance(sampling, NoSampling) or isinstance(event, (GaussianRelease, ShuffledEpoch)):
            key = event.noise_multiplier, 1.0
            steps[key] = steps.get(key, 0) + count
        else:
            unknown.append(type(event).__name__)
    return steps, scales, sorted(set(unknown))


def _opinion(
    package: str, method: str, ask: Callable[[], tuple[float, float]], note: str, missing: list[str]
) -> Opinion:
    try:
        by = f"{package} {importlib.metadata.version(package)}, {method}"
    except importlib.metadata.PackageNotFoundError:
        return Opinion(f"{package}, {method}", 0.0, None, f"not installed: pip install {package}")
    if missing:
        return Opinion(by, 0.0, None, f"does not know {', '.join(missing)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lower, upper = ask()
    except Exception as error:
        return Opinion(by, 0.0, None, f"fails: {type(error).__name__}: {error}")
    if not math.isfinite(upper):
        return Opinion(by, 0.0, None, f"answers {upper}")
    return Opinion(by, max(lower, 0.0), upper, note)


def _opacus_renyi(steps: Steps, delta: float) -> tuple[float, float]:
    from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

    total = [0.0] * len(_ORDERS)
    for (sigma, rate), count in steps.items():
        some = compute_rdp(q=rate, noise_multiplier=sigma, steps=count, orders=_ORDERS)
        total = [one + float(other) for one, other in zip(total, some, strict=True)]
    return 0.0, float(get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)[0])


def _opacus_prv(steps: Steps, delta: float) -> tuple[float, float]:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, count) for (sigma, rate), count in steps.items()]
    return 0.0, float(accountant.get_epsilon(delta, eps_error=_ERROR))


def _prv_accountant(steps: Steps, scales: Mapping[float, int], delta: float) -> tuple[float, float]:
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
