"""A user's collate function sees one sample at a time, and random numbers that follow from nothing a user seeds."""

from __future__ import annotations

import ctypes
import functools
import io
import itertools
import multiprocessing
import os
import random
import sqlite3
import zipfile
from collections import UserDict
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from clipless_dp import PoissonBatches, PoissonBatchSampler, poisson_collate
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.sampling import StreamedBatches, collation

COUNT = 9


def samples(count: int = COUNT) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(i)} for i in range(count)]


def mixed(rows: list[Any]) -> Any:
    batch = default_collate(rows)
    batch["x"] = 0.5 * (batch["x"] + batch["x"].roll(1, 0))
    return batch


def centred(rows: list[Any]) -> Any:
    batch = default_collate(rows)
    batch["x"] = batch["x"] - batch["x"].mean(0)
    return batch


def relabelled(rows: list[Any]) -> Any:
    batch = default_collate(rows)
    batch["labels"] = batch["labels"].roll(1, 0)
    return batch


def ordered(rows: list[Any]) -> Any:
    return default_collate(sorted(rows, key=lambda row: float(row["x"][0])))


def masked(rows: list[Any]) -> Any:
    batch = default_collate(rows)
    batch["x"] = torch.bernoulli(torch.full_like(batch["x"], 0.5))
    return batch


ACROSS = {"mixup": mixed, "centred by the batch": centred, "labels rolled": relabelled, "sorted": ordered}


@pytest.mark.parametrize("name", ACROSS)
def test_a_row_is_made_of_its_sample_alone_whatever_the_collate_function_mixes(name: str) -> None:
    data = samples()
    collate = poisson_collate(data, ACROSS[name])
    whole, fewer = collate(data), collate(data[3:])
    assert not all(torch.equal(ACROSS[name](data)[key][3:], ACROSS[name](data[3:])[key]) for key in whole)
    for key, rows in whole.items():
        assert torch.equal(rows[3:], fewer[key])
        assert torch.equal(rows, torch.cat([ACROSS[name]([sample])[key] for sample in data]))


def _with_numpy(rows: list[Any]) -> Any:
    return {"x": torch.from_numpy(np.random.rand(len(rows), 4))}  # noqa: NPY002


def _with_python(rows: list[Any]) -> Any:
    return {"x": torch.tensor([[random.random() for _ in range(4)] for _ in rows])}


@pytest.mark.parametrize("collate", [masked, _with_numpy, _with_python], ids=["torch", "numpy", "python"])
def test_masks_follow_no_seed_of_a_user_and_leave_the_users_generators_alone(collate: Callable[..., Any]) -> None:
    data = samples(40)
    own = poisson_collate(data, collate)

    def seeded(made: Callable[..., Any], count: int) -> tuple[Tensor, tuple[float, ...]]:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        rows = made(data[:count])["x"]
        return rows, (float(torch.rand(())), float(np.random.rand()), random.random())  # noqa: NPY002

    assert torch.equal(seeded(collate, 40)[0], seeded(collate, 40)[0])
    (one, after), (other, later) = seeded(own, 40), seeded(own, 7)
    # 28 fair coins or more: alike once in 2²⁸.
    assert not torch.equal(one[:7], other)
    # What comes afterwards does not tell how many samples a draw held.
    assert after == later


def test_each_sample_has_random_numbers_of_its_own_even_if_the_function_seeds_itself_once() -> None:
    def seeds(rows: list[Any]) -> Any:
        if rows[0]["labels"] == 1:
            torch.manual_seed(0)
        return {"x": torch.rand(len(rows), 4), "labels": default_collate(rows)["labels"]}

    data = samples()
    one, other = (poisson_collate(data, seeds)(data)["x"] for _ in range(2))
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[2:], other[2:])


class Remembers:
    """Mixes each sample with the one before."""

    def __init__(self) -> None:
        self.last: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        batch = default_collate(rows)
        last, self.last = self.last, batch["x"]
        return batch if last is None else {**batch, "x": batch["x"] + last}


def _from_the_system(rows: list[Any]) -> Any:
    return {"x": torch.from_numpy(np.random.default_rng().random((len(rows), 4)))}


@pytest.mark.parametrize("collate", [Remembers(), _from_the_system], ids=["state", "own entropy"])
def test_what_is_remembered_from_other_samples_is_refused(collate: Callable[..., Any]) -> None:
    data = samples()
    with pytest.raises(PrivacyError, match="keeps a state"):
        poisson_collate(data, collate)(data)


def test_what_is_remembered_later_is_seen_in_one_batch_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples()
    own = poisson_collate(data, held := Later())
    own(data)
    held.begun = True
    monkeypatch.setattr(collation.secrets, "randbelow", lambda below: 0)
    with pytest.raises(PrivacyError, match="keeps a state"):
        own(data)


class Later(Remembers):
    begun = False

    def __call__(self, rows: list[Any]) -> Any:
        return super().__call__(rows) if self.begun else default_collate(rows)


class Lazy:
    """As collators of Hugging Face with ``seed``: the generator is made by the first call."""

    generator: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        self.generator = self.generator or torch.Generator().manual_seed(0)
        return {"x": torch.rand(len(rows), 4, generator=self.generator)}


def test_generators_of_its_own_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"collate=.*generator of its own"):
        poisson_collate(samples(), Lazy())


def test_a_tensor_that_is_filled_in_each_call_is_refused_and_a_new_one_is_not() -> None:
    held = torch.empty(1, 4)
    data = samples()
    with pytest.raises(PrivacyError, match="take new tensors"):
        poisson_collate(data, lambda rows: held.copy_(rows[0]["x"]))
    made = poisson_collate(data, lambda rows: torch.empty(1, 4).copy_(rows[0]["x"]))(data)
    assert torch.equal(made, default_collate(data)["x"])


def test_labels_may_be_taken_out_of_the_samples_mapping() -> None:
    def pops(rows: list[Any]) -> Any:
        labels = torch.stack([row.pop("labels") for row in rows])
        return UserDict(default_collate(rows)), labels

    data = samples()
    inputs, labels = poisson_collate(data, pops)(data)
    assert torch.equal(inputs["x"], default_collate(data)["x"])
    assert labels.tolist() == list(range(COUNT))


class Pair(NamedTuple):
    x: Tensor
    labels: Tensor


def test_structures_are_kept_and_empty_draws_have_them() -> None:
    def pairs(rows: list[Any]) -> Any:
        batch = default_collate(rows)
        return [Pair(batch["x"], batch["labels"])]

    data = samples()
    own = poisson_collate(data, pairs)
    for count in (COUNT, 0):
        (made,) = own(data[:count])
        assert type(made) is Pair
        assert made.x.shape == (count, 4)
        assert (made.labels.shape, made.labels.dtype) == ((count,), torch.int64)


def padded(rows: list[Any]) -> Any:
    return {"x": torch.nn.utils.rnn.pad_sequence([row["x"] for row in rows], batch_first=True)}


def test_padding_to_the_longest_of_the_batch_is_refused_in_words() -> None:
    data = [{"x": torch.ones(4)}, {"x": torch.ones(3)}]
    assert padded(data)["x"].shape == (2, 4)
    with pytest.raises(InputError, match=r"pad all samples to one length.*max_length"):
        poisson_collate(data, padded)(data)


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        (lambda rows: {"x": default_collate(rows + rows)["x"]}, r"\(2, 4\)"),
        (lambda rows: {"x": torch.tensor(3)}, "shape \\(\\)"),
        (lambda rows: {"x": ["text"]}, "a str"),
    ],
    ids=["two rows", "no row", "no tensor"],
)
def test_what_is_not_one_row_for_each_sample_is_refused(returns: Callable[..., Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        poisson_collate(samples(), returns)


@pytest.mark.parametrize(
    "other",
    [{"x": torch.ones(4).double()}, {"x": torch.ones(4), "more": torch.ones(1)}],
    ids=["dtype", "fields"],
)
def test_samples_unlike_the_first_are_refused(other: Any) -> None:
    data = [{"x": torch.ones(4)}, other]
    with pytest.raises(InputError, match="first one"):
        poisson_collate(data, lambda rows: default_collate(rows))(data)


def test_torchs_own_function_is_called_once_for_all_unless_it_calls_a_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert collation.sees_single_rows(default_collate)
    assert not collation.sees_single_rows(lambda rows: default_collate(rows))
    monkeypatch.setitem(default_collate_fn_map, UserDict, lambda rows, *, collate_fn_map=None: rows)
    assert not collation.sees_single_rows(default_collate)


@pytest.mark.parametrize("workers", [0, 1])
def test_draws_of_a_loader_arrive_in_order(workers: int) -> None:
    data = samples()
    sampler = PoissonBatchSampler(COUNT, sample_rate=1.0, steps=2)
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=poisson_collate(data, relabelled),
        num_workers=workers,  # type: ignore[arg-type]
    )
    for batch in loader:
        assert batch["labels"].tolist() == list(range(COUNT))
        assert torch.equal(batch["x"], default_collate(data)["x"])


GLOBAL: dict[int, int] = {}
GENERATORS = {"of coins": [np.random.default_rng(0)]}


def _numbered(ids: Any, rows: list[Any]) -> Any:
    return {"labels": torch.tensor([ids.setdefault(int(row["labels"]) % 3, len(ids)) for row in rows])}


def _in_a_global(rows: list[Any]) -> Any:
    return {"labels": torch.tensor([[_number(int(row["labels"]) % 3) for row in rows]])}


def _number(label: int) -> int:
    return GLOBAL.setdefault(label, len(GLOBAL))


class OfItsClass:
    ids: ClassVar[dict[int, int]] = {}

    def __call__(self, rows: list[Any]) -> Any:
        return self._made(rows)

    def _made(self, rows: list[Any]) -> Any:
        return _numbered(self.ids, rows)


class Slotted:
    __slots__ = ("__ids",)

    def __init__(self) -> None:
        self.__ids: Any = {}

    def __call__(self, rows: list[Any]) -> Any:
        return _numbered(self.__ids, rows)


def _with_a_closure() -> Any:
    ids: dict[int, int] = {}
    return lambda rows: _numbered(ids, rows)


def _with_a_counter() -> Any:
    counted = itertools.count()

    def collate(rows: list[Any]) -> Any:
        return {"labels": torch.tensor([int(next(counted) == 50)])}

    return collate


def _with_a_default(rows: list[Any], ids: Any = {}) -> Any:  # noqa: B006
    return _numbered(ids, rows)


def _with_prototypes() -> Any:
    first: dict[int, Tensor] = {}

    def collate(rows: list[Any]) -> Any:
        x = rows[0]["x"]
        return {"x": (x - first.setdefault(int(rows[0]["labels"]) % 3, x))[None]}

    return collate


REMEMBERING: dict[str, Callable[[], Any]] = {
    "closure": _with_a_closure,
    "partial": lambda: partial(_numbered, {}),
    "default": lambda: _with_a_default,
    "global of a function that is called": lambda: _in_a_global,
    "attribute of the class": OfItsClass,
    "slot": Slotted,
    "prototypes": _with_prototypes,
    "iterator": _with_a_counter,
    "nested function": lambda: lambda rows: next(_in_a_global([row]) for row in rows),
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_state_that_repetition_does_not_show_is_refused(name: str) -> None:
    GLOBAL.clear()
    with pytest.raises(PrivacyError, match="keeps a state that changed"):
        poisson_collate(data := samples(), REMEMBERING[name]())(data)


def _rows_of(number: Callable[[int], int]) -> Any:
    """Gives each label the number that a function has for it."""
    return lambda rows: {"labels": torch.tensor([number(int(row["labels"]) % 3) for row in rows])}


def _in_a_series() -> Any:
    table = pytest.importorskip("pandas").Series(dtype="int64")

    def number(label: int) -> int:
        if label not in table.index:
            table.loc[label] = len(table)
        return int(table.loc[label])

    return _rows_of(number)


def _in_a_frame() -> Any:
    table = pytest.importorskip("pandas").DataFrame({"number": np.zeros(3)})

    def number(label: int) -> int:
        if table.at[label, "number"] == 0:
            table.loc[label, "number"] = (table["number"] > 0).sum() + 1
        return int(table.at[label, "number"])

    return _rows_of(number)


def _in_an_array(table: Any) -> Any:
    def number(label: int) -> int:
        if table[label] == 0:
            table[3] += 1
            table[label] = table[3]
        return int(table[label])

    return _rows_of(number)


def _in_a_large_array() -> Any:
    table = np.zeros(5_000_001)

    def number(label: int) -> int:
        place = 2 * label + 1
        table[place] = table[place] or (table[:100] > 0).sum() + 1
        return int(table[place])

    return _rows_of(number)


def _in_a_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))

    def number(label: int) -> int:
        tokenizer.add_tokens([str(label)])
        return int(tokenizer.token_to_id(str(label)))

    return _rows_of(number)


def _in_a_text() -> Any:
    text = io.StringIO()

    def number(label: int) -> int:
        words = text.getvalue().split()
        if str(label) not in words:
            text.write(f"{label} ")
        return (*words, str(label)).index(str(label))

    return _rows_of(number)


class Once(type):
    """Makes one object of a class."""

    made: ClassVar[dict[type, Any]] = {}

    def __call__(cls, *args: Any) -> Any:
        if cls not in Once.made:
            Once.made[cls] = super().__call__(*args)
        return Once.made[cls]


class Numbers(metaclass=Once):
    def __init__(self) -> None:
        self.ids: dict[int, int] = {}


def _in_a_singleton() -> Any:
    Once.made.clear()
    return lambda rows: _numbered(Numbers().ids, rows)


CONTEXT: ContextVar[dict[int, int]] = ContextVar("CONTEXT")


def _in_a_context() -> Any:
    CONTEXT.set({})
    return lambda rows: _numbered(CONTEXT.get(), rows)


def _in_the_environment() -> Any:
    names = ["CLIPLESS_DP_TEST_0", "CLIPLESS_DP_TEST_1", "CLIPLESS_DP_TEST_2"]
    for name in names:
        os.environ.pop(name, None)

    def number(label: int) -> int:
        return int(os.environ.setdefault(names[label], str(sum(name in os.environ for name in names))))

    return _rows_of(number)


def _in_a_cache_that_is_counted() -> Any:
    @functools.lru_cache
    def number(label: int) -> int:
        return number.cache_info().currsize  # type: ignore[no-any-return]

    return _rows_of(number)


def _in_a_database() -> Any:
    table = sqlite3.connect(":memory:")
    table.execute("create table numbers (number integer primary key, label integer unique)")

    def number(label: int) -> int:
        table.execute("insert or ignore into numbers (label) values (?)", (label,))
        return int(table.execute("select number from numbers where label = ?", (label,)).fetchone()[0])

    return _rows_of(number)


BEHIND: dict[str, tuple[Callable[[], Any], str]] = {
    "series": (_in_a_series, r"number\.table"),
    "frame": (_in_a_frame, r"number\.table"),
    "ctypes": (lambda: _in_an_array((ctypes.c_int * 4)()), r"number\.table changed"),
    "shared memory": (lambda: _in_an_array(multiprocessing.Array("i", 4)), r"number\.table\._obj changed"),
    "large array": (_in_a_large_array, r"number\.table changed"),
    "tokenizer": (_in_a_tokenizer, r"number\.tokenizer changed"),
    "text": (_in_a_text, r"number\.text changed"),
    "metaclass": (_in_a_singleton, r"Numbers\.__class__\.made: dict of 0 → dict of 1"),
    "context": (_in_a_context, r"CONTEXT\.value: dict of 0 → dict of 1"),
    "environment": (_in_the_environment, r"os\.environ: dict of \d+ → dict of \d+"),
    "counted cache": (_in_a_cache_that_is_counted, r"number.*changed"),
    "database": (_in_a_database, r"number\.table"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_state_that_is_held_in_c_is_refused_by_the_name_of_what_moved(name: str) -> None:
    make, told = BEHIND[name]
    with pytest.raises(PrivacyError, match=told):
        poisson_collate(samples(), make())


class OfVocabulary:
    """Makes its vocabulary when it is called first."""

    ids: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        if self.ids is None:
            self.ids = {0: 5, 1: 6, 2: 7}
        return _rows_of(self.ids.__getitem__)(rows)


class OfProperty:
    @functools.cached_property
    def ids(self) -> dict[int, int]:
        return {0: 5, 1: 6, 2: 7}

    def __call__(self, rows: list[Any]) -> Any:
        return _rows_of(self.ids.__getitem__)(rows)


class WarnsOnce(OfProperty):
    warned = False

    def __call__(self, rows: list[Any]) -> Any:
        self.warned = True
        return super().__call__(rows)


class OfArchive:
    """Opens a file when it is called first, as each worker must by itself."""

    def __init__(self, path: Any) -> None:
        self.path, self.archive = path, None

    def __call__(self, rows: list[Any]) -> Any:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
        return _rows_of(lambda label: int(cast(Any, self.archive).read(str(label))))(rows)


@pytest.mark.parametrize("name", ["vocabulary", "property", "flag", "archive", "partial", "by shape"])
def test_what_a_function_makes_in_its_first_call_may_stay_if_any_sample_makes_the_same(
    name: str, tmp_path: Any
) -> None:
    with zipfile.ZipFile(tmp_path / "numbers.zip", "w") as archive:
        for label, number in enumerate("567"):
            archive.writestr(str(label), number)
    collate: Any = {
        "vocabulary": OfVocabulary,
        "property": OfProperty,
        "flag": WarnsOnce,
        "archive": lambda: OfArchive(tmp_path / "numbers.zip"),
        "partial": lambda: OfVocabulary().__call__,
        "by shape": ByShape,
    }[name]()
    own = poisson_collate(data := samples(), collate)
    for _ in range(3):
        assert own(data)["labels"].tolist() == [5, 6, 7] * 3


class ByShape(OfVocabulary):
    """Makes a table for each number of fields, when it comes first."""

    def __init__(self) -> None:
        self.tables: dict[int, Any] = {}

    def __call__(self, rows: list[Any]) -> Any:
        size = len(rows[0])
        if size not in self.tables:
            self.tables[size] = torch.arange(size) + 5
        return _rows_of(lambda label: int(self.tables[size][0]) + label)(rows)


class Turning:
    """Two states, of which an even number of calls leaves the first."""

    flip = False

    def __call__(self, rows: list[Any]) -> Any:
        self.flip = not self.flip
        return _rows_of(lambda label: label + self.flip)(rows)


def test_states_that_calls_move_forth_and_back_are_refused_at_once() -> None:
    with pytest.raises(PrivacyError, match=r"Turning\.flip: absent → True"):
        poisson_collate(samples(), Turning())


class OfFirst:
    """Numbers from the first label on that it was called on."""

    first: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        if self.first is None:
            self.first = {"label": int(rows[0]["labels"])}
        return _rows_of(lambda label: label - self.first["label"])(rows)


class OfRare:
    """A flag that one sample sets, and all later ones read."""

    seen = False

    def __call__(self, rows: list[Any]) -> Any:
        self.seen = self.seen or int(rows[0]["labels"]) == 0
        return _rows_of(lambda label: label + 3 * self.seen)(rows)


class Parts:
    """Makes the same whatever it is called on, but another row in that call."""

    ids: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        first, self.ids = self.ids is None, (0, 1, 2)
        return _rows_of(lambda label: label + first)(rows)


class OfAll:
    """Makes something of the class when it is called first, which copies share."""

    ids: Any = None

    def __call__(self, rows: list[Any]) -> Any:
        if OfAll.ids is None:
            OfAll.ids = {0: 5, 1: 6, 2: 7}
        return _rows_of(OfAll.ids.__getitem__)(rows)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (OfFirst, "OfFirst.first: "),
        (OfRare, "OfRare.seen: "),
        (Parts, "Parts.ids: |gives two batches"),
        (OfAll, "OfAll.*ids: None → dict"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_a_first_call_makes_of_its_sample_is_refused(kind: Any, told: str) -> None:
    OfAll.ids = None
    data = samples()
    with pytest.raises(PrivacyError, match=told):
        poisson_collate(data, kind())(data)


def test_what_a_first_call_makes_is_compared_however_often_a_function_is_wrapped() -> None:
    data = samples()
    collate = OfFirst()
    poisson_collate(data, collate)
    own = poisson_collate(data, collate)
    assert collate.first is None
    with pytest.raises(PrivacyError, match=r"OfFirst\.first"):
        own(data)
    with pytest.raises(PrivacyError, match="holds it still"):
        poisson_collate(data, collate)
    with pytest.raises(PrivacyError, match="holds it still"):
        poisson_collate(data, collate.__call__)


def test_batches_of_one_sample_are_compared_until_some_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collation.secrets, "randbelow", lambda below: below - 1)
    data = samples()
    own = poisson_collate(data, OfFirst())
    own(data[:1])
    with pytest.raises(PrivacyError, match=r"OfFirst\.first"):
        own(data[1:2])


def test_mutant_caught_states_of_the_first_sample_pass_where_copies_are_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collation.RowByRow, "_compare_with_fresh", lambda *_: None)
    data = samples()
    one, other = (poisson_collate(some, OfFirst())(some)["labels"].tolist() for some in (data, data[1:]))
    assert one[1:] != other


def test_labels_that_are_new_in_a_later_batch_are_refused_in_each_that_has_one() -> None:
    data = samples()
    ids = {0: 0}
    own = poisson_collate(data, partial(_numbered, ids))
    for _ in range(3):
        own([data[0], data[3]])
    with pytest.raises(PrivacyError, match="keeps a state that changed"):
        own([data[0], data[1]])


@pytest.mark.slow
def test_a_large_state_is_compared_in_the_first_batch_and_in_some(monkeypatch: pytest.MonkeyPatch) -> None:
    data = samples()
    ids = {-index: 0 for index in range(20_000)}
    own = poisson_collate(data, partial(_numbered, ids))
    with pytest.raises(PrivacyError, match="keeps a state that changed"):
        own(data)
    with pytest.raises(PrivacyError, match="holds it still"):
        poisson_collate(data, own.collate.collate)  # type: ignore[attr-defined]
    own(data)
    ids.pop(2)
    monkeypatch.setattr(collation.secrets, "randbelow", lambda below: 0)
    with pytest.raises(PrivacyError, match="keeps a state that changed"):
        own(data)


@functools.lru_cache
def _looked_up(label: int) -> int:
    return label % 3


def test_vocabularies_that_stay_as_they_are_and_functions_of_a_value_that_are_cached_are_accepted() -> None:
    data = samples()
    ids = {0: 5, 1: 6, 2: 7}
    assert poisson_collate(data, partial(_numbered, ids))(data)["labels"].tolist() == [5, 6, 7] * 3
    own = poisson_collate(data, lambda rows: torch.tensor([_looked_up(int(row["labels"])) for row in rows]))
    assert own(data).tolist() == [0, 1, 2] * 3


def test_what_samples_share_and_a_function_fills_or_edits_reaches_no_other_sample() -> None:
    shared, context = {}, torch.zeros(4)  # type: ignore[var-annotated]
    data = [{**row, "shared": shared, "context": context} for row in samples()]

    def fills(rows: list[Any]) -> Any:
        (row,) = rows
        row["x"] *= 0.5
        row["context"] += row["x"]
        return {"x": row["x"][None], "context": row["context"][None], **_numbered(row["shared"], rows)}

    made = poisson_collate(data, fills)(data)
    assert made["labels"].tolist() == [0] * COUNT
    assert torch.equal(made["x"], 0.5 * default_collate(samples())["x"])
    assert torch.equal(made["context"], made["x"])
    assert not shared
    assert not context.any()


def _with_a_held_generator(rows: list[Any]) -> Any:
    return default_collate(rows) if GENERATORS["of coins"][0].random() < 2 else None


def test_generators_in_containers_of_globals_are_refused_and_the_global_ones_are_not() -> None:
    with pytest.raises(ConfigurationError, match="generator of its own"):
        poisson_collate(samples(), _with_a_held_generator)

    def draws(rows: list[Any]) -> Any:
        return {"x": torch.tensor([[_uniform(), _python()]])}

    assert poisson_collate(samples(), draws)(samples())["x"].shape == (COUNT, 2)


_uniform, _python = np.random.rand, random.random


class OneBuffer(Dataset):  # type: ignore[type-arg]
    """Reads each sample into the same memory."""

    def __init__(self, held: Any, anew: bool = False) -> None:
        self.rows, self.held, self.anew = torch.arange(12.0).view(6, 2), held, anew

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        made = self.held.copy() if self.anew and isinstance(self.held, (list, np.ndarray)) else self.held
        made = made.clone() if self.anew and isinstance(made, Tensor) else made
        row = self.rows[index]
        made[:] = row.tolist() if isinstance(made, list) else row if isinstance(made, Tensor) else row.numpy()
        return made, index


BUFFERS = {"tensor": torch.zeros(2), "array": np.zeros(2, dtype=np.float32), "list": [0.0, 0.0]}


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
@pytest.mark.parametrize("batches", [PoissonBatches, StreamedBatches])
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_a_data_set_that_reads_into_one_buffer_gives_each_sample_its_row(
    kind: str, batches: Any, at_once: bool
) -> None:
    data = OneBuffer(BUFFERS[kind])
    whole = batches(Subset(data, range(6)) if at_once else data, sample_rate=1.0, steps=1)
    for batch in whole:
        assert torch.equal(batch.inputs[batch.mask], data.rows)


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_loader_refuses_a_data_set_that_reads_into_one_buffer(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="into the memory of another"):
        poisson_collate(OneBuffer(BUFFERS[kind]))
    assert poisson_collate(OneBuffer(BUFFERS[kind], anew=True))
    rows = OneBuffer(BUFFERS[kind]).rows
    assert poisson_collate(Subset(TensorDataset(rows, rows), range(6)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_tensors_that_are_no_rows_of_numbers_are_refused_in_words(kind: str) -> None:
    def collate(rows: list[Any]) -> Any:
        x = torch.stack([row["x"] for row in rows])
        return {"x": x.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([*x])}

    with pytest.raises(ConfigurationError, match=f"a {kind} tensor"):
        poisson_collate(samples(), collate)
