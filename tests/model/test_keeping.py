"""A loss keeps nothing of the rows that it is called on, wherever it would lie; what it makes for itself may stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatches, PrivacyError, losses
from clipless_dp.model import keeping, rowwise

CLASSES = 3


class Standardised:
    """As scalers of scikit-learn: fitted to what comes first."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None

    def __call__(self, output: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = output.detach().mean(0)
        return output - self.mean


class Centre(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, output: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = output.detach().mean(0)
        return output - self.mean


SCALER, CENTRE, SPACE = Standardised(), Centre(), SimpleNamespace(mean=None)


class Holder:
    mean: Tensor | None = None


def by_a_helpers_default(output: Tensor, memo: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006
    if "mean" not in memo:
        memo["mean"] = output.detach().mean(0)
    return output - memo["mean"]


@functools.cache
def bank() -> dict[str, Tensor]:
    return {}


@functools.lru_cache(maxsize=4)
def bounded_bank() -> dict[str, Tensor]:
    return {}


def by_an_attribute_of(holder: Any) -> Callable[[Tensor], Tensor]:
    """Of something that is found by its name in this module, and in no closure."""

    def centred(output: Tensor) -> Tensor:
        if holder().mean is None:
            holder().mean = output.detach().mean(0)
        return output - holder().mean

    return centred


def of_the_space() -> Any:
    return SPACE


def of_the_class() -> Any:
    return Holder


def of_a_function() -> Any:
    return of_a_function


class OfItsClass(losses.Loss):
    """A loss with its state in its own class."""

    mean: Tensor | None = None

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        kind = type(self)
        if kind.mean is None:
            kind.mean = output.detach().mean(0)
        return (output - kind.mean).square().sum(1)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        return 1.0


class Inner(losses.Loss):
    """A loss of a user's own around one of this package."""

    def __init__(self, inner: losses.Loss) -> None:
        self.inner = inner

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        return self.inner.per_sample(output, target)

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        return 1.0


def squared(centred: Callable[[Tensor], Tensor]) -> losses.Loss:
    return losses.BoundedLoss(lambda output, target: centred(output).square().sum(1), bound=1.0)


def with_a_memo(memo: Callable[[], dict[str, Tensor]]) -> losses.Loss:
    def of_the_first(output: Tensor) -> Tensor:
        if "mean" not in memo():
            memo()["mean"] = output.detach().mean(0)
        return output - memo()["mean"]

    return squared(of_the_first)


SHARED: dict[str, Callable[[], losses.Loss]] = {
    "an object in a global": lambda: squared(lambda output: SCALER(output)),
    "a module in a global": lambda: squared(lambda output: CENTRE(output)),
    "a namespace": lambda: squared(by_an_attribute_of(of_the_space)),
    "a class": lambda: squared(by_an_attribute_of(of_the_class)),
    "a function's attribute": lambda: squared(by_an_attribute_of(of_a_function)),
    "a helper's default": lambda: squared(lambda output: by_a_helpers_default(output)),
    "a cached function": lambda: with_a_memo(bank),
    "a cached function of bounded size": lambda: with_a_memo(bounded_bank),
    "the class of the loss": OfItsClass,
    "a global of an inner loss": lambda: Inner(squared(lambda output: SCALER(output))),
}


@pytest.fixture(autouse=True)
def as_at_first() -> None:
    SCALER.mean = CENTRE.mean = SPACE.mean = Holder.mean = OfItsClass.mean = of_a_function.mean = None  # type: ignore[attr-defined]
    by_a_helpers_default.__defaults__[0].clear()  # type: ignore[index]
    bank.cache_clear()
    bounded_bank.cache_clear()


def batch(loss: losses.Loss, rows: int = 12) -> tuple[DPLipModel, Tensor, Tensor]:
    torch.manual_seed(0)
    model = DPLipModel(nn.Linear(4, CLASSES), input_shape=(4,), input_norm=1.0, loss=loss)
    return model, model(torch.randn(rows, 4)), torch.arange(rows) % CLASSES


@pytest.mark.parametrize("place", SHARED)
def test_a_state_of_the_first_batch_is_refused_wherever_it_lies(place: str) -> None:
    model, output, target = batch(SHARED[place]())
    with pytest.raises(PrivacyError, match="keeps a state that depends on the rows"):
        model.loss(output, target)
    # It holds rows still, though nothing changes any more.
    with pytest.raises(PrivacyError, match="refused"):
        model.loss(output, target)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_state_of_a_batch_of_few_rows_is_refused(rows: int) -> None:
    class OfTargets:
        seen: float | None = None

        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            if self.seen is None:
                self.seen = float(target.double().mean())
            return output.square().sum(1)

    model, output, target = batch(losses.BoundedLoss(OfTargets(), bound=1.0), rows)
    with pytest.raises(PrivacyError, match="keeps a state"):
        model.loss(output, target)


def test_a_state_of_the_first_number_of_rows_is_refused() -> None:
    class Averaged:
        rows: int | None = None

        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            self.rows = self.rows or len(output)
            return output.square().sum(1) / self.rows

    model, output, target = batch(losses.BoundedLoss(Averaged(), bound=1.0))
    with pytest.raises(PrivacyError, match="keeps a state"):
        model.loss(output, target)


def test_a_log_of_losses_that_begins_later_is_found_at_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "EVERY", 1)
    logs, log = False, []

    def logging(output: Tensor, target: Tensor) -> Tensor:
        values = output.square().sum(1)
        if logs:
            log.append(values.detach())
        return values

    model, output, target = batch(losses.BoundedLoss(logging, bound=1.0))
    model.loss(output, target).backward()
    logs = True
    with pytest.raises(PrivacyError, match="keeps a state"):
        model.loss(output.detach().requires_grad_(), target)


class Counting(losses.TauCrossEntropy):
    calls = 0

    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return super().per_sample(output, target)


class LazyWeights:
    """Weights of classes, made at the first call."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if self.weights is None:
            self.weights = torch.linspace(1.0, 2.0, output.shape[1])
        return (output.square() * self.weights).sum(1)


class Grids:
    """A cache by shape, in which the number of rows is."""

    def __init__(self) -> None:
        self.known: dict[torch.Size, Tensor] = {}

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape not in self.known:
            self.known[output.shape] = torch.ones(output.shape)
        return (output * self.known[output.shape]).square().sum(1)


@functools.cache
def window(size: int) -> Tensor:
    return torch.linspace(0.0, 1.0, size)


@functools.lru_cache(maxsize=8)
def bounded_window(size: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.0, 1.0, size, dtype=dtype)


FITTED = Standardised()
FITTED(torch.ones(5, CLASSES))

HONEST: dict[str, Callable[[], losses.Loss]] = {
    "a number of calls": lambda: Counting(2.0),
    "weights that are made at first": lambda: losses.BoundedLoss(LazyWeights(), bound=1.0),
    "a cache by shape": lambda: losses.BoundedLoss(Grids(), bound=1.0),
    "a cached function": lambda: losses.BoundedLoss(lambda o, t: (o * window(o.shape[1])).square().sum(1), 1.0),
    "a cached function of bounded size": lambda: losses.BoundedLoss(
        lambda o, t: (o * bounded_window(o.shape[1], o.dtype)).square().sum(1), 1.0
    ),
    "a teacher": lambda: losses.BoundedLoss(TEACHER, 1.0),
    "what was fitted to public rows": lambda: squared(lambda output: FITTED(output)),
}


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(CLASSES, 8), nn.ReLU(), nn.Linear(8, CLASSES)).requires_grad_(False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - self.net(nn.functional.one_hot(target, CLASSES).float())).square().sum(1)


TEACHER = Teacher().eval()


@pytest.mark.parametrize("what", HONEST)
def test_what_a_loss_makes_for_itself_may_stay(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "EVERY", 1)
    window.cache_clear()
    bounded_window.cache_clear()
    torch.manual_seed(0)
    model = DPLipModel(nn.Linear(4, CLASSES), input_shape=(4,), input_norm=1.0, loss=HONEST[what]())
    optimizer = CliplessDPSGD(model, lr=0.1, sample_rate=0.5, dataset_size=24, noise_multiplier=1.0)
    for drawn in PoissonBatches((torch.randn(24, 4), torch.arange(24) % CLASSES), sample_rate=0.5, steps=3):
        optimizer.zero_grad()
        optimizer.accumulate(drawn)
        optimizer.step()


def test_a_cache_by_samples_is_refused() -> None:
    @functools.cache
    def centre(first: float) -> float:
        return first

    model, output, target = batch(
        losses.BoundedLoss(lambda o, t: o.square().sum(1) + centre(float(o.detach()[0, 0])), 1.0)
    )
    with pytest.raises(PrivacyError):
        model.loss(output, target)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [("_is_the_same_for_all", lambda *given: True), ("refuse_memory", lambda *given: 0)],
    ids=["copies are not compared", "nothing is looked at"],
)
def test_without_the_comparison_a_log_passes(name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, name, mutant)
    log: list[float] = []

    def logging(output: Tensor, target: Tensor) -> Tensor:
        log.append(float(output.detach().mean()))
        return output.square().sum(1)

    model, output, target = batch(losses.BoundedLoss(logging, bound=1.0))
    model.loss(output, target)
    monkeypatch.undo()
    with pytest.raises(PrivacyError, match="keeps a state"):
        batch(losses.BoundedLoss(logging, bound=1.0))[0].loss(output.detach().requires_grad_(), target)
