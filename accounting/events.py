"""What was released: frozen events, apart from how they are accounted for.

An event states a mechanism and how its records were chosen. All noise multipliers are relative to
the add-or-remove-one sensitivity: the most that one record's presence can change what is released.
Replacing a record removes one and adds another, so it can change it twice as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol

from . import _validation as check
from .errors import InvalidParameterError, LedgerFormatError

__all__ = [
    "ADD_OR_REMOVE_ONE",
    "CHANGE_OF_A_SUM",
    "REPLACE_ONE",
    "Event",
    "FixedSizeSampling",
    "GaussianRelease",
    "GaussianStep",
    "GaussianVectorStep",
    "LaplaceRelease",
    "NoSampling",
    "PoissonSampling",
    "Relation",
    "Repeat",
    "Sampling",
    "ShuffledEpoch",
    "repeat",
]

Relation = Literal["add_or_remove_one", "replace_one"]
ADD_OR_REMOVE_ONE: Relation = "add_or_remove_one"
REPLACE_ONE: Relation = "replace_one"
CHANGE_OF_A_SUM: Mapping[Relation, float] = {ADD_OR_REMOVE_ONE: 1.0, REPLACE_ONE: 2.0}
"""By how many records' bounds neighbours differ in a sum: a replaced record is once out and once in."""


class Event(Protocol):
    """Anything that a ledger holds: a frozen dataclass with a `kind` to store it by."""

    kind: ClassVar[str]


class _Checked:
    """A dataclass whose fields are checked, and made plain numbers, by their names."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in _CHECKS:
                object.__setattr__(self, name, _CHECKS[name](value))


@dataclass(frozen=True)
class PoissonSampling(_Checked):
    """Every record joins the batch independently with probability `sample_rate`, and none is dropped.

    A batch that is cut when it grows too long, a shuffled loader and a fixed batch size are *not*
    Poisson sampling, and their guarantee is weaker.
    """

    kind: ClassVar[str] = "poisson"
    sample_rate: float


@dataclass(frozen=True)
class NoSampling:
    """Every record takes part."""

    kind: ClassVar[str] = "none"


@dataclass(frozen=True)
class FixedSizeSampling:
    """A uniform subset of `batch_size` out of `dataset_size` records, drawn anew at every step."""

    kind: ClassVar[str] = "fixed_size"
    batch_size: int
    dataset_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_size", check.count(self.dataset_size, "dataset_size", 1))
        object.__setattr__(self, "batch_size", check.count(self.batch_size, "batch_size", 0))
        if self.batch_size > self.dataset_size:
            raise InvalidParameterError(f"batch_size {self.batch_size} exceeds dataset_size {self.dataset_size}")

    @property
    def sample_rate(self) -> float:
        """Probability that a given record is drawn."""
        return self.batch_size / self.dataset_size


Sampling = PoissonSampling | NoSampling | FixedSizeSampling


def _known_sampling(sampling: object) -> object:
    if not isinstance(sampling, Sampling):
        raise InvalidParameterError(f"sampling must be one of the classes of accounting.events, got {sampling!r}")
    return sampling


_CHECKS: dict[str, Callable[[Any], object]] = {
    "noise_multiplier": check.noise_multiplier,
    "sample_rate": check.sample_rate,
    "count": lambda count: check.count(count, "count"),
    "sampling": _known_sampling,
}


@dataclass(frozen=True)
class GaussianStep(_Checked):
    """A sum over the drawn records, plus Gaussian noise: one step of DP-SGD.

    Attributes:
        noise_multiplier: Noise standard deviation over the L2 sensitivity of the sum.
        sampling: How the records were drawn.
    """

    kind: ClassVar[str] = "gaussian_step"
    noise_multiplier: float
    sampling: Sampling = field(default_factory=NoSampling)


@dataclass(frozen=True)
class GaussianVectorStep(_Checked):
    """Several Gaussian releases computed on *one* draw of records, as the layers of one step.

    The parts are composed before amplification: sampling hides the record from all of them at once
    or from none, so that amplifying each part by itself would underestimate the loss.

    Attributes:
        noise_multipliers: σᵢ of each part, relative to the sensitivity of that part.
        sampling: How the records were drawn.
    """

    kind: ClassVar[str] = "gaussian_vector_step"
    noise_multipliers: tuple[float, ...]
    sampling: Sampling = field(default_factory=NoSampling)

    def __post_init__(self) -> None:
        parts = tuple(check.noise_multiplier(s, "noise_multipliers") for s in self.noise_multipliers)
        if not parts:
            raise InvalidParameterError("noise_multipliers must not be empty")
        object.__setattr__(self, "noise_multipliers", parts)
        super().__post_init__()

    @property
    def noise_multiplier(self) -> float:
        """σ of the single Gaussian release that is equivalent, (Σ σᵢ⁻²)^−½."""
        return 1.0 / math.sqrt(math.fsum(s**-2.0 for s in self.noise_multipliers))


@dataclass(frozen=True)
class GaussianRelease(_Checked):
    """A statistic of all records, released once with Gaussian noise.

    Attributes:
        noise_multiplier: Noise standard deviation over the L2 sensitivity of the statistic.
        identity: Tells this draw of noise from every other, so that a release which two ledgers hold is known to be
            one; empty where nobody can tell.
    """

    kind: ClassVar[str] = "gaussian_release"
    noise_multiplier: float
    identity: str = ""


@dataclass(frozen=True)
class LaplaceRelease(_Checked):
    """A statistic of all records, released once with Laplace noise.

    Attributes:
        noise_multiplier: Scale b of the noise over the L1 sensitivity; one release is 1/b-DP.
    """

    kind: ClassVar[str] = "laplace_release"
    noise_multiplier: float


@dataclass(frozen=True)
class ShuffledEpoch(_Checked):
    """One pass over shuffled data in batches, with the same noise on each.

    Every record takes part in exactly one batch of the pass, so the pass costs as much as one
    Gaussian release without sampling; no amplification is claimed. A started pass counts as a whole.
    For add-or-remove-one, a removed record leaves the other batches as they are (its contribution
    is zero); where removing one would move records between batches, use replace-one.
    """

    kind: ClassVar[str] = "shuffled_epoch"
    noise_multiplier: float


@dataclass(frozen=True)
class Repeat(_Checked):
    """An event that happened `count` times."""

    kind: ClassVar[str] = "repeat"
    event: Event
    count: int


def repeat(event: Event, count: int) -> Repeat:
    """Returns an event that stands for `count` equal ones."""
    return Repeat(event, count)


_SAMPLINGS: dict[str, type[Any]] = {kind.kind: kind for kind in (PoissonSampling, NoSampling, FixedSizeSampling)}
_EVENTS: dict[str, type[Any]] = {
    kind.kind: kind
    for kind in (GaussianStep, GaussianVectorStep, GaussianRelease, LaplaceRelease, ShuffledEpoch, Repeat)
}


def register(kind: type[Any]) -> type[Any]:
    """Lets ledgers store and read a further frozen dataclass of events, by its `kind`."""
    _EVENTS[kind.kind] = kind
    return kind


def to_dict(value: Any) -> Any:
    """Returns an event as plain dicts, lists, numbers and strings."""
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    if hasattr(value, "kind"):
        return {"kind": value.kind, **{f.name: to_dict(getattr(value, f.name)) for f in fields(value)}}
    return value


def from_dict(data: Any) -> Any:
    """Returns the event that `to_dict` wrote.

    Raises:
        LedgerFormatError: When its kind is unknown or a field is missing.
    """
    if isinstance(data, list):
        return tuple(from_dict(item) for item in data)
    if not isinstance(data, Mapping):
        return data
    known = {**_SAMPLINGS, **_EVENTS}
    kind = data.get("kind")
    if kind not in known:
        raise LedgerFormatError(f"unknown event kind {kind!r}: known are {sorted(known)}")
    values = {name: from_dict(value) for name, value in data.items() if name != "kind"}
    try:
        return known[kind](**values)
    except TypeError as error:
        raise LedgerFormatError(f"event {kind!r} is incomplete or has unknown fields: {error}") from error


def flatten(events: Iterable[tuple[Any, int]]) -> Iterable[tuple[Any, int]]:
    """Unfolds `Repeat`s into (event, count)."""
    for outer, times in events:
        event: Any = outer
        count = times
        while isinstance(event, Repeat):
            event, count = event.event, count * event.count
        yield event, count
