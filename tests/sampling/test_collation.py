"""A user's collate function sees one sample at a time, and random numbers that follow from nothing a user seeds."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from clipless_dp import PoissonBatchSampler, poisson_collate
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.sampling import collation

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
    class Seeds:
        calls = 0

        def __call__(self, rows: list[Any]) -> Any:
            self.calls += 1
            if self.calls == 2:
                torch.manual_seed(0)
            return {"x": torch.rand(len(rows), 4), "labels": default_collate(rows)["labels"]}

    data = samples()
    made = []
    for _ in range(2):
        # Whether it is found out depends on which sample is looked at; if it is not, one row follows the seed alone.
        try:
            made.append(poisson_collate(data, Seeds())(data)["x"][1:])
        except PrivacyError:
            continue
    assert len(made) < 2 or not torch.equal(made[0], made[1])


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


def test_a_function_that_fills_one_tensor_again_and_again_gives_each_sample_its_row() -> None:
    held = torch.empty(1, 4)

    def fills(rows: list[Any]) -> Any:
        return held.copy_(rows[0]["x"])

    data = samples()
    assert torch.equal(poisson_collate(data, fills)(data), default_collate(data)["x"])


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
