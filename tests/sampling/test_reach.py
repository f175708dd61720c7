"""What a user's function can remember, by whichever way it reaches it."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import logging
import mmap
import operator
import queue
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipless_dp import poisson_collate
from clipless_dp.errors import PrivacyError
from clipless_dp.sampling import Samples, caches, memory, reach
from clipless_dp.sampling.augmentation import views
from clipless_dp.sampling.windows import components, extent

ROWS = torch.arange(12.0).reshape(3, 4)
COUNT = torch.ones(3, dtype=torch.bool)

STATE = "BANK = []\nCOUNTS = [0]\n"
VIEWS = """
def kept(x, bank):
    bank.append(x.clone())
    return x + bank[0]

def relative(x):
    from .state import BANK
    return kept(x, BANK)

def of_package(x):
    from . import state
    return kept(x, state.BANK)

def renamed(x):
    from reached_project.data import state as other
    return kept(x, other.BANK)

def dotted(x):
    import reached_project.data.state
    return kept(x, reached_project.data.state.BANK)
"""


@pytest.fixture(params=["", "/usr/lib/site-packages/"], ids=["of a folder", "installed"])
def project(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """A package of a user's: ``data`` with the modules ``state`` and ``views``."""
    made = {}
    reach.is_installed.cache_clear()
    for name, source in (("", ""), (".data", ""), (".data.state", STATE), (".data.views", VIEWS)):
        module = ModuleType(f"reached_project{name}")
        is_package = name in ("", ".data")
        module.__package__ = module.__name__ if is_package else module.__name__.rpartition(".")[0]
        if is_package:
            module.__path__ = [request.param + module.__name__.replace(".", "/")]
        sys.modules[module.__name__] = made[name] = module
        exec(source, vars(module))
    made[""].data = made[".data"]  # type: ignore[attr-defined]
    made[".data"].state, made[".data"].views = made[".data.state"], made[".data.views"]  # type: ignore[attr-defined]
    yield made[""]
    for module in made.values():
        del sys.modules[module.__name__]


class OfModule:
    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        self.module.state.BANK.append(x)
        return x + self.module.state.BANK[0]


def _of_closure(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module.views.kept(x, module.state.BANK)


def _of_container(module: Any) -> Callable[[Tensor], Tensor]:
    modules = {"data": module}
    return lambda x: modules["data"].views.kept(x, modules["data"].state.BANK)


def _of_helper(module: Any) -> Callable[[Tensor], Tensor]:
    def bank(of: Any) -> Any:
        return of.state.BANK

    return lambda x, module=module: (bank(module).append(x), x)[1]


THROUGH_MODULES = {
    "a module's attribute of a module": _of_closure,
    "an object's attribute": OfModule,
    "a container": _of_container,
    "a helper's names": _of_helper,
    "a relative import": lambda module: module.views.relative,
    "an import of a package's module": lambda module: module.views.of_package,
    "an import by another name": lambda module: module.views.renamed,
    "an import by a path": lambda module: module.views.dotted,
}


@pytest.mark.parametrize("name", THROUGH_MODULES)
def test_memory_that_is_reached_through_modules_is_refused(project: Any, name: str) -> None:
    augment = THROUGH_MODULES[name](project.data)
    with pytest.raises(PrivacyError, match=r"BANK: list of 0 → list of 3"):
        views(augment, ROWS, COUNT)


def test_what_an_installed_package_imports_is_not_read_unless_code_that_is_looked_at_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = {name: ModuleType(name) for name in ("reached_near", "reached_far")}
    for name, module in made.items():
        module.__path__ = [f"/usr/lib/site-packages/{name}"]
        monkeypatch.setitem(sys.modules, name, module)
    reach.is_installed.cache_clear()
    near, far = made.values()
    near.far, far.BANK, near.BANK = far, ["of far"], ["of near"]  # type: ignore[attr-defined]

    def of_near(x: Tensor) -> Any:
        return x, near.BANK, near.far  # type: ignore[attr-defined]

    def of_both(x: Tensor) -> Any:
        return of_near(x), far

    def met(root: object) -> list[object]:
        return [value for value, *_ in reach.reachable(root)]

    assert "of near" in met(of_near)
    assert "of far" not in met(of_near)
    assert "of far" in met(of_both)


def test_what_modules_hold_and_no_code_names_may_change(project: Any) -> None:
    state, shared = project.data.state, project.data.views

    def augment(x: Tensor) -> Tensor:
        return x + 0.0 * len(state.BANK) * len(vars(shared))

    for number in range(3):
        state.COUNTS[0] = number
        views(augment, ROWS, COUNT)
    assert not any(value is state.COUNTS for value, *_ in memory.reachable(augment))


def _cached_list() -> Callable[[Tensor], Tensor]:
    @functools.cache
    def bank() -> list[Tensor]:
        return []

    def augment(x: Tensor) -> Tensor:
        bank().append(x)
        return x + bank()[0]

    return augment


def _cached_first() -> Callable[[Tensor], Tensor]:
    """A cached number, made of the first sample."""
    current: list[Tensor] = []

    @functools.lru_cache
    def scale() -> float:
        return float(current[0].sum())

    def augment(x: Tensor) -> Tensor:
        current.append(x)
        scaled = x * scale()
        current.clear()
        return scaled

    return augment


def _cached_of_label() -> Callable[[Tensor], Tensor]:
    @functools.lru_cache(maxsize=4)
    def of_kind(kind: int, *, size: int) -> dict[str, Any]:
        return {"sum": np.zeros(size)}

    def augment(x: Tensor) -> Tensor:
        held = of_kind(0, size=4)
        held["sum"] = held["sum"] + x.numpy()
        return x + torch.as_tensor(held["sum"]).to(x)

    return augment


def _cached_generator() -> Callable[[Tensor], Tensor]:
    @functools.cache
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    return lambda x: x + torch.randn(x.shape, generator=generator())


def _gradient() -> Callable[[Tensor], Tensor]:
    weight = torch.zeros(4, requires_grad=True)

    def augment(x: Tensor) -> Tensor:
        with torch.enable_grad():
            (weight * x).sum().backward()
        return x + weight.grad  # type: ignore[operator]

    return augment


def _queue() -> Callable[[Tensor], Tensor]:
    waiting: queue.SimpleQueue[Tensor] = queue.SimpleQueue()

    def augment(x: Tensor) -> Tensor:
        waiting.put(x.clone())
        return x + waiting.qsize()

    return augment


def _mapped() -> Callable[[Tensor], Tensor]:
    pages = mmap.mmap(-1, 16)

    def augment(x: Tensor) -> Tensor:
        pages[0] = min(255, pages[0] + int(x[1]))
        return x + pages[0]

    return augment


HIDDEN = {
    "cached list": (_cached_list, r"bank"),
    "cached number of the first sample": (_cached_first, r"scale: a result → another one when made again"),
    "cached statistics of a kind": (_cached_of_label, r"of_kind: a result → another one when made again"),
    "cached generator": (_cached_generator, r"generator: a result → another one when made again"),
    "gradient of a tensor": (_gradient, r"weight\.grad: absent → Tensor"),
    "queue": (_queue, r"waiting"),
    "mapped memory": (_mapped, r"pages"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_memory_behind_types_that_are_written_in_c_is_refused(name: str) -> None:
    make, told = HIDDEN[name]
    with pytest.raises(PrivacyError, match=told):
        views(make(), ROWS, COUNT)


def test_a_vocabulary_behind_a_cache_is_refused_where_rows_are_collated() -> None:
    @functools.cache
    def vocabulary() -> dict[int, int]:
        return {}

    def collate(samples: list[Any]) -> Any:
        known = vocabulary()
        return torch.tensor([known.setdefault(int(label), len(known)) for _, label in samples])

    data = [(torch.zeros(2), 3), (torch.zeros(2), 5)]
    with pytest.raises(PrivacyError, match=r"vocabulary"):
        poisson_collate(data, collate)


def _grid(size: int) -> Tensor:
    return torch.linspace(0.0, 1.0, size)


def _words(text: str, low: bool = False) -> list[str]:
    return (text.lower() if low else text).split()


def test_caches_of_functions_of_a_value_may_fill_and_forget() -> None:
    grid, words = functools.cache(_grid), functools.lru_cache(maxsize=2, typed=True)(_words)
    sums = functools.lru_cache(maxsize=None)(lambda number: [number])

    def augment(x: Tensor) -> Tensor:
        number = int(x[0])
        words(f"a {number}", low=True), words(f"B {number}"), sums(-1), sums(-2)
        return x * grid(len(x)) + sums(number)[0]

    for shift in range(4):
        views(augment, ROWS + shift, COUNT)
    assert sums.cache_info().currsize > 4


def test_results_of_caches_are_found_by_key_with_their_arguments() -> None:
    def function(*given: Any, **named: Any) -> Any:
        return [given, named]

    for size in (None, 16):
        for typed in (False, True):
            cached = functools.lru_cache(maxsize=size, typed=typed)(function)
            calls = [
                ((), {}),
                ((1,), {}),
                (("a", 2.0), {}),
                ((1,), {"b": 2, "c": "d"}),
                ((), {"b": -1}),
                ((-1, -2), {}),
            ]
            for given, named in calls:
                cached(*given, **named)
            cached(1)
            found = caches.results(cached)
            assert [result for _, result in found] == [[given, named] for given, named in calls]
            assert [caches.arguments(cached, key) for key, _ in found] == calls
            assert len({caches.entry(key) for key, _ in found}) == len(calls)


def test_a_result_that_a_cache_lost_and_made_otherwise_is_a_change() -> None:
    held = [1.0]
    cached = functools.cache(lambda: held[0])

    def augment(x: Tensor) -> Tensor:
        return x * cached()

    cached()
    before = memory.State(augment)
    cached.cache_clear()
    assert memory.State(augment) == before
    held[0] = 2.0
    cached()
    assert memory.State(augment) != before


POOL = torch.arange(8.0)

HOLDERS: dict[str, Callable[[], Any]] = {
    "a methodcaller": lambda: operator.methodcaller("lerp", POOL, 0.5),
    "a methodcaller by name": lambda: operator.methodcaller("lerp", end=POOL, weight=0.5),
    "a context variable's default": lambda: contextvars.ContextVar("pool", default=POOL),
    "a function of numpy": lambda: np.frompyfunc(lambda place: float(POOL[place]), 1, 1),
    "a storage": lambda: POOL.untyped_storage(),
    "a typed storage": lambda: POOL.storage(),
    "values of a sparse tensor": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 4, 8]), torch.arange(4).repeat(2), POOL, check_invariants=True
    ),
    "a logger's attribute": lambda: _logger_with(POOL),
    "a nested tensor": lambda: torch.nested.nested_tensor_from_jagged(POOL, torch.tensor([0, 3, 8])),
    "samples": lambda: Samples((POOL.view(4, 2), torch.zeros(4))),
}


def _logger_with(pool: Tensor) -> logging.Logger:
    logger = logging.Logger("of a test")
    logger.pool = pool  # type: ignore[attr-defined]
    return logger


@pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated:UserWarning", "ignore:.*prototype.*", "ignore:.*beta state"
)
@pytest.mark.parametrize("name", HOLDERS)
def test_memory_is_reached_behind_what_is_written_in_c(name: str) -> None:
    holder = HOLDERS[name]()
    places = [extent(value) for value, *_ in reach.reachable(holder)]
    assert any(place is not None and place[0] <= POOL.data_ptr() < place[1] for place in places)


@dataclasses.dataclass(slots=True)
class Scaled:
    factor: Any = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * 2.0


ODD: dict[str, Callable[[], Any]] = {
    "slots": Scaled,
    "a methodcaller": lambda: operator.methodcaller("mul", 2.0),
    "a method of a type": lambda: Tensor.abs,
    "a sparse tensor": lambda: Scaled(
        torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (4,), check_invariants=True)
    ),
    "a tensor of compressed rows": lambda: Scaled(
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([2]), torch.ones(1), (1, 4), check_invariants=True)
    ),
    "a nested tensor": lambda: Scaled(torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])),
    "a jagged tensor": lambda: Scaled(torch.nested.nested_tensor([torch.ones(3), torch.ones(4)], layout=torch.jagged)),
    "a conjugate view": lambda: Scaled((torch.ones(4) * 1j).conj()),
    "an imaginary part": lambda: Scaled((torch.ones(4) * 1j).conj().imag),
}


@pytest.mark.filterwarnings("ignore:.*prototype.*", "ignore:.*beta state")
@pytest.mark.parametrize("name", ODD)
def test_what_has_no_weak_references_and_tensors_of_all_layouts_may_be_held(name: str) -> None:
    augment = ODD[name]()
    for _ in range(3):
        assert views(augment, ROWS, COUNT).shape == ROWS.shape


@pytest.mark.filterwarnings("ignore:.*prototype.*", "ignore:.*beta state")
@pytest.mark.parametrize(
    "name", ["a sparse tensor", "a tensor of compressed rows", "a nested tensor", "a jagged tensor"]
)
def test_what_is_written_into_parts_of_a_tensor_shows(name: str) -> None:
    augment = ODD[name]()
    before = memory.State(augment)
    assert memory.State(augment) == before
    (part,) = (part for part in components(augment.factor) if part.is_floating_point())
    part.data.add_(1.0)
    assert memory.State(augment) != before
