"""Training data holds nobody twice, and is the same on all ranks."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from clipless_dp import (
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyError,
    StreamedBatches,
    distributed,
    fit,
    poisson_collate,
)
from clipless_dp.sampling import Samples, persons
from clipless_dp.sampling import people as people_module
from clipless_dp.sampling.persons import refuse_repeats
from clipless_dp.sampling.windows import lags, rows_overlap, shared_rows
from tests.support import gated_model, samples

RUN: dict[str, Any] = {
    "epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 10, "progress": False, "accountant": "rdp"
}  # fmt: skip


class Listed(Dataset):  # type: ignore[type-arg]
    """Samples one by one; what is done to an input may differ at each read."""

    def __init__(self, data: tuple[Tensor, Tensor], change: Callable[[Tensor], Tensor] = lambda row: row) -> None:
        self.inputs, self.targets = data
        self.change = change

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(self.inputs[index]), int(self.targets[index])


class Unmeasured(Dataset):  # type: ignore[type-arg]
    """Samples on demand, without end."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((6,), float(index)), 0


class Windows(Dataset):  # type: ignore[type-arg]
    """Views of one series, a few steps apart; or its numbers in a buffer that is filled anew."""

    def __init__(self, step: int, buffer: bool = False) -> None:
        self.series, self.step = torch.randn(300), step
        self.buffer = torch.zeros(9) if buffer else None

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        window = self.series[self.step * index : self.step * index + 6]
        if self.buffer is None:
            return window, 0
        self.buffer.normal_()
        return self.buffer[index % 3 : index % 3 + 6].copy_(window), 0


def tiles(step: int) -> list[Any]:
    """Cuts of one picture, as views."""
    picture = torch.randn(3, 24, 24)
    return [(picture[:, y : y + 6, x : x + 6], 0) for y in range(0, 18, step) for x in range(0, 18, step)]


def split() -> list[Subset[Any]]:
    return random_split(Listed(samples(40)), [20, 20], generator=torch.Generator().manual_seed(0))


INPUTS, TARGETS = samples(40)
LISTED, OTHER = Listed(samples(40)), Listed(samples(40))
TENSORS = TensorDataset(INPUTS, TARGETS)
SPLIT = split()
SAMPLES = [(row, 0) for row in INPUTS]
WINDOWS = torch.randn(60)
SERIES, OTHERS = torch.randn(41, 6), torch.randn(20, 6)
PROTOTYPES, ONES = torch.randn(5, 6), torch.eye(3)

REPEATED: dict[str, Any] = {
    "a subset with an index twice": Subset(LISTED, [0, 1, 2, 1]),
    "an index and its negative": Subset(LISTED, [39, -1]),
    "indices in a tensor": Subset(LISTED, torch.tensor([3, 3])),  # type: ignore[arg-type]
    "sampling with replacement": Subset(TENSORS, list(WeightedRandomSampler([1.0] * 40, 80, replacement=True))),
    "a data set twice": ConcatDataset([LISTED, LISTED]),
    "a data set and a part of it": ConcatDataset([Subset(LISTED, [7]), LISTED]),
    "subsets that share an index": ConcatDataset([Subset(LISTED, [1, 2]), Subset(LISTED, [2, 3])]),
    "a split and its source": ConcatDataset([SPLIT[0], SPLIT[0].dataset]),
    "nested": Subset(ConcatDataset([OTHER, ConcatDataset([LISTED, Subset(LISTED, [5])])]), [0, 45, 80]),
    "two tensor data sets of the same tensors": ConcatDataset([TensorDataset(INPUTS, TARGETS), TENSORS]),
    "tensors that share rows": ConcatDataset(
        [TensorDataset(INPUTS[:30], TARGETS[:30]), TensorDataset(INPUTS[20:], TARGETS[20:])]
    ),
    "other targets": ConcatDataset([TENSORS, TensorDataset(INPUTS, 1 - TARGETS)]),
    "an expanded tensor": (torch.randn(1, 6).expand(40, 6), TARGETS),
    "an expanded tensor in a data set": TensorDataset(torch.randn(1, 6).expand(40, 6), TARGETS),
    "an expanded array": (np.broadcast_to(np.zeros((1, 6), dtype=np.float32), (40, 6)), TARGETS.numpy()),
    "windows that overlap": (torch.randn(45).unfold(0, 6, 1), TARGETS),
    "windows that overlap in a subset": Subset(TensorDataset(torch.randn(45).unfold(0, 6, 1), TARGETS), [0, 1]),
    "a list of samples twice": SAMPLES + SAMPLES,
    "a list of samples twice, in tuples of their own": [(row, 0) for row in INPUTS] + [(row, 0) for row in INPUTS],
    "rows of one tensor by index": [(INPUTS[k], TARGETS[k]) for k in (0, 3, 0)],
    "rows of one array by index": [(INPUTS.numpy()[k], int(TARGETS[k])) for k in (0, 3, 0)],
    "dilated windows, which meet a row further off": (torch.randn(52).as_strided((40, 6), (1, 2)), TARGETS),
    "two stacks of one data set": ConcatDataset(
        [StackDataset(LISTED, OTHER), StackDataset(LISTED, Subset(OTHER, range(40)))]
    ),
    "two stacks of one tensor": ConcatDataset([StackDataset(INPUTS, TARGETS), StackDataset(INPUTS, 1 - TARGETS)]),
    "a stack of a subset with an index twice": StackDataset(Subset(LISTED, [1, 1]), TARGETS[:2]),
    "a stack by names": StackDataset(inputs=Subset(LISTED, [1, 1]), targets=TARGETS[:2]),
    "a stack of windows that overlap": StackDataset(torch.randn(45).unfold(0, 6, 1), TARGETS),
    "an index twice of a data set of unknown length": Subset(Unmeasured(), [4, 4]),
    "a list of windows that overlap": [(WINDOWS[k : k + 6], k % 2) for k in range(0, 40, 4)],
    "a list of arrays that overlap": [(WINDOWS.numpy()[k : k + 6], k % 2) for k in range(0, 40, 4)],
    "a list of mappings of windows": [{"x": WINDOWS[k : k + 6], "labels": 0} for k in range(9)],
    "a part of another sample": [(WINDOWS[:6], 0), (WINDOWS[20:26], 0), (WINDOWS[2:4], 1)],
    "cuts of a picture that overlap": tiles(4),
    "a subset of a list of windows": Subset([(WINDOWS[k : k + 6], 0) for k in range(40)], [0, 12, 8, 3]),  # type: ignore[arg-type]
    "a series and its next rows": (SERIES[:-1], SERIES[1:]),
    "a series and a number of its next rows": (SERIES[:-1], SERIES[1:, 0]),
    "a series, its next rows, and targets": TensorDataset(SERIES[:-1], SERIES[1:], TARGETS),
    "a stack of a series and its next rows": StackDataset(TensorDataset(SERIES[:-1]), TensorDataset(SERIES[1:])),
    "rows of a series and every other one": (SERIES[:20], SERIES[::2][:20]),
    "tensors half a row apart": ConcatDataset(
        [TensorDataset(SERIES[:20], TARGETS[:20]), TensorDataset(SERIES.view(-1)[3:123].view(20, 6), TARGETS[:20])]
    ),
    "a list of a series and its next rows": [((SERIES[k], SERIES[k + 1]), 0) for k in range(40)],
    "a list of rows and next ones as targets": [(SERIES[k], SERIES[k + 1]) for k in range(40)],
    "a list of mappings of lags": [
        {f"lag {lag}": SERIES[k + lag] for lag in range(9)} | {"labels": 0} for k in range(30)
    ],
    "a list of pairs of which some share one": [((row, OTHERS[k // 3]), 0) for k, row in enumerate(INPUTS)],
    "a list with an index twice": Subset([(0.0, 1), (1.0, 0)], [1, 1]),  # type: ignore[arg-type]
}

DISTINCT: dict[str, Any] = {
    "equal rows": (torch.zeros(40, 6), TARGETS),
    "equal data sets": ConcatDataset([LISTED, OTHER]),
    "a split put together": ConcatDataset(random_split(LISTED, [30, 10])),
    "nested": Subset(ConcatDataset([Subset(LISTED, [3, 1]), ConcatDataset([OTHER, Subset(LISTED, [5])])]), [42, 0, 1]),
    "halves of tensors": ConcatDataset(
        [TensorDataset(INPUTS[:30], TARGETS[:30]), TensorDataset(INPUTS[30:], TARGETS[30:])]
    ),
    "shared targets": ConcatDataset([TensorDataset(part, TARGETS) for part in (INPUTS, INPUTS.clone())]),
    "expanded targets": (INPUTS, torch.zeros(1, dtype=torch.int64).expand(40)),
    "expanded columns": (torch.randn(40, 1).expand(40, 6), TARGETS),
    "transposed": (torch.randn(6, 40).t(), TARGETS),
    "every other row": TensorDataset(samples(80)[0][::2], TARGETS),
    "windows side by side": (torch.randn(240).unfold(0, 6, 6), TARGETS),
    "channels last": (torch.randn(40, 3, 4, 4).to(memory_format=torch.channels_last), TARGETS),
    "stacks of two data sets": ConcatDataset([StackDataset(LISTED, TARGETS), StackDataset(OTHER, TARGETS)]),
    "a data set of unknown length": Subset(Unmeasured(), [4, 5]),
    "one input under two targets, equal for two persons": [(INPUTS[0], 0), (INPUTS[0], 1)],
    "tuples of equal rows": [(row.clone(), 0) for row in (INPUTS[0], INPUTS[0])],
    "equal constants": [(0.0, 1), (0.0, 1)],
    "a list of samples": SAMPLES,
    "a list of windows side by side": [(WINDOWS[k : k + 6], k % 2) for k in range(0, 40, 6)],
    "a list of columns": [(column, 0) for column in INPUTS.t()],
    "a list of cuts of a picture side by side": tiles(6),
    "a subset of windows that are apart": Subset([(WINDOWS[k : k + 6], 0) for k in range(40)], [0, 6, 12, 30]),  # type: ignore[arg-type]
    "an input that samples share": [({"x": row, "bias": WINDOWS}, 0) for row in INPUTS],
    "columns of one table": ((TABLE := torch.randn(40, 9))[:, :6], TABLE[:, 6:]),
    "a column beside a table that has it": TensorDataset(TABLE, TABLE[:, 2:5], TABLE[:, 8]),
    "the same tensor as input and target": (INPUTS, INPUTS),
    "the same rows as input and target of a list": [(row, row) for row in INPUTS],
    "one for all beside rows": TensorDataset(INPUTS, torch.zeros(1, 3).expand(40, 3), TARGETS),
    "prototypes of classes": [((row, PROTOTYPES[k % 5]), 0) for k, row in enumerate(INPUTS)],
    "prototypes of classes, one of which is rare": [
        ((row, PROTOTYPES[0 if k == 7 or k == 8 else 1 + k % 3]), 0) for k, row in enumerate(INPUTS)
    ],
    "codes of classes as inputs and targets": [((row, ONES[k % 3]), ONES[k // 14]) for k, row in enumerate(INPUTS)],
    "a list of labels that are views": [(row.clone(), label) for row, label in zip(INPUTS, TARGETS, strict=True)],
    "one row": (torch.randn(1, 6).expand(1, 6), TARGETS[:1]),
    "no row": Subset(LISTED, []),
}


def tensors_of(data: Any) -> Any:
    return tuple(map(torch.as_tensor, data)) if isinstance(data, tuple) else data


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_one_row_twice_is_refused(name: str) -> None:
    with pytest.raises(PrivacyError, match=r"one and the same|lie on one another"):
        refuse_repeats(tensors_of(REPEATED[name]))


@pytest.mark.parametrize("name", DISTINCT)
def test_rows_that_are_only_equal_or_only_interleaved_pass(name: str) -> None:
    refuse_repeats(tensors_of(DISTINCT[name]))


@pytest.mark.parametrize("name", ["sampling with replacement", "a data set twice", "an expanded array"])
def test_whatever_draws_from_data_refuses_one_row_twice(name: str) -> None:
    data = REPEATED[name]
    for draw in (PoissonBatches, StreamedBatches):
        with pytest.raises(PrivacyError, match="one row, once"):
            draw(data, sample_rate=0.5, steps=2)
    with pytest.raises(PrivacyError, match="one row, once"):
        fit(gated_model(), data, **RUN)
    if not isinstance(data, tuple):
        with pytest.raises(PrivacyError, match="one row, once"):
            poisson_collate(data)


@pytest.mark.parametrize("data", [Windows(4), Subset(Windows(1), [30, 9, 7])], ids=["windows", "subset"])
def test_views_that_a_data_set_cuts_of_one_series_are_refused_where_they_overlap(data: Any) -> None:
    with pytest.raises(PrivacyError, match="of those that were read lie on one another"):
        PoissonBatches(data, sample_rate=0.5, steps=1)
    with pytest.raises(PrivacyError, match="of those that were read lie on one another"):
        poisson_collate(data)


def test_views_of_a_data_set_may_lie_side_by_side_and_in_a_buffer_that_is_filled_anew() -> None:
    poisson_collate(Windows(6))
    for data in (Windows(6), Windows(1, buffer=True)):
        PoissonBatches(data, sample_rate=0.5, steps=1)


class Pairs(Dataset):  # type: ignore[type-arg]
    """Rows of one table, two a sample."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return [*self.pairs[index]], index % 3


def test_rows_of_two_samples_that_a_data_set_returns_as_views_are_refused_and_codes_of_classes_are_not() -> None:
    lagged = Pairs([(SERIES[k], SERIES[k + 1]) for k in range(40)])
    with pytest.raises(PrivacyError, match="of those that were read lie on one another"):
        PoissonBatches(lagged, sample_rate=0.5, steps=1)
    with pytest.raises(PrivacyError, match="of those that were read lie on one another"):
        poisson_collate(lagged)
    PoissonBatches(Pairs([(ONES[k % 3], ONES[(k + 1) % 3]) for k in range(40)]), sample_rate=0.5, steps=1)


class OfWindows(Dataset):  # type: ignore[type-arg]
    def __init__(self, windows: list[Any]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Any:
        return self.windows[index]


@pytest.mark.parametrize("kind", ["list", "data set", "tensor", "series and next rows"])
def test_windows_may_overlap_within_a_person_and_not_between_people(kind: str) -> None:
    series = torch.randn(4, 15)
    windows = [(series[person, k : k + 6], k % 3) for person in range(4) for k in range(10)]
    own, other = [row // 10 for row in range(40)], [row // 8 for row in range(40)]
    data: Any = {"list": windows, "data set": OfWindows(windows), "tensor": None, "series and next rows": None}[kind]
    if kind == "tensor":
        data = torch.randn(45).unfold(0, 6, 1), TARGETS
        own, other = [0] * 40, [0] * 20 + [1] * 20
    elif kind == "series and next rows":
        data, own, other = TensorDataset(SERIES[:-1], SERIES[1:], TARGETS), [0] * 40, [0] * 20 + [1] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, theirs = (people_module.People([*ids, 9], None) for ids in (own, other))
    for people in (mine, theirs):
        people.codes = people.codes[:-1]
    samples_ = Samples.to_train_on(data, people=mine)
    samples_.read(range(4))
    for refused in (theirs, None) if kind != "data set" else (None,):
        with pytest.raises(PrivacyError, match="lie on one another"):
            Samples.to_train_on(data, people=refused).read(range(4))
        # What was looked at for people was not looked at for rows.
        with pytest.raises(PrivacyError, match="lie on one another"):
            Samples.to_train_on(samples_, people=refused).read(range(4))


ROWS = [row.clone() for row in INPUTS]
COLUMNS: dict[str, tuple[Any, bool]] = {
    "a list twice": ({"x": ROWS * 2, "labels": [0] * 80}, False),
    "a list twice, and its targets": ({"x": ROWS * 2, "labels": [*TARGETS] * 2}, False),
    "arrays twice": ({"x": [row.numpy() for row in ROWS] * 2, "labels": [0] * 80}, False),
    "two lists twice": ({"x": ROWS * 2, "z": [row + 1 for row in ROWS] * 2, "labels": [0] * 80}, False),
    "beside a pair": (({"x": ROWS * 2}, TARGETS.repeat(2)), False),
    "a series and its next rows": ({"x": [*SERIES[:-1]], "z": [*SERIES[1:]], "labels": TARGETS}, False),
    "windows": ({"x": [WINDOWS[k : k + 6] for k in range(40)], "labels": TARGETS}, False),
    "once": ({"x": ROWS, "labels": [*TARGETS]}, True),
    "a constant beside rows": ({"x": ROWS, "bias": [WINDOWS] * 40, "labels": TARGETS}, True),
    "lists of numbers": ({"x": INPUTS.tolist(), "labels": TARGETS.tolist()}, True),
    "a tensor": ({"x": INPUTS, "labels": [*TARGETS]}, True),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_are_lists_hold_each_row_once(name: str) -> None:
    data, passes = COLUMNS[name]
    if passes:
        PoissonBatches(data, sample_rate=0.5, steps=1)
        return
    with pytest.raises(PrivacyError, match=r"one and the same|lie on one another"):
        PoissonBatches(data, sample_rate=0.5, steps=1)


class AtOnce(Listed):
    """Returns as many samples as it is asked for, the first of them in place of all."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[indices[0]]] * len(indices)


def test_one_sample_that_is_returned_for_several_indices_is_refused() -> None:
    data = AtOnce(samples(40))
    sampler = PoissonBatchSampler(40, sample_rate=0.5, steps=1)
    with pytest.raises(PrivacyError, match="one and the same sample for several indices"):
        list(DataLoader(data, batch_sampler=sampler, collate_fn=poisson_collate(data)))
    (batch,) = PoissonBatches(data, sample_rate=1.0, steps=1)
    assert torch.equal(batch.inputs[batch.mask].sort(0).values, data.inputs.sort(0).values)


def test_public_data_may_repeat_its_rows() -> None:
    result = fit(gated_model(), samples(40), validation=REPEATED["a data set twice"], **RUN)
    assert result.history[0].accuracy is not None


def test_millions_of_rows_are_followed_as_arrays() -> None:
    count = 1_000_000
    whole = TensorDataset(torch.arange(count).unsqueeze(1), torch.zeros(count))
    order = np.random.default_rng(0).permutation(count)
    parts = ConcatDataset([Subset(whole, order[: count // 2]), Subset(whole, order[count // 2 :])])  # type: ignore[arg-type]
    refuse_repeats(parts)
    order[-1] = order[0]
    with pytest.raises(PrivacyError, match=f"samples 0 and {count - 1} "):
        refuse_repeats(parts)


def test_data_beyond_memory_is_not_listed() -> None:
    class Endless(Listed):
        def __len__(self) -> int:
            return 1 << 40

    refuse_repeats(ConcatDataset([Endless(samples(1)), Endless(samples(1))]))


@pytest.mark.parametrize("seed", range(80))
def test_overlap_of_rows_is_that_of_their_elements(seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(1, 4, size=3).tolist())
    strides = tuple(generator.integers(0, 8, size=3).tolist())
    values = torch.zeros(64).as_strided(shape, strides)
    places = torch.arange(64).as_strided(shape, strides)
    rows = [set(row.flatten().tolist()) for row in places]
    meet = any(first & second for first, second in combinations(rows, 2))
    assert rows_overlap(values) == meet


def _strided(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An array of entries of four bytes that lie at any bytes, and the bytes at which they begin."""
    shape = tuple(generator.integers(1, 4, size=3).tolist())
    strides = tuple((generator.integers(-10, 11, size=3) * generator.choice([1, 4], size=3)).tolist())
    start = -sum(min(0, step * (length - 1)) for step, length in zip(strides, shape, strict=True))
    values = np.ndarray(shape, dtype="<f4", buffer=np.zeros(600, dtype=np.uint8), offset=start, strides=strides)
    return values, start + np.tensordot(strides, np.indices(shape), 1)


@pytest.mark.parametrize("seed", range(200))
def test_overlap_of_rows_of_an_array_is_that_of_their_bytes(seed: int) -> None:
    values, places = _strided(np.random.default_rng(seed))
    rows = [{int(place) + byte for place in row.flatten() for byte in range(4)} for row in places]
    assert rows_overlap(values) == any(first & second for first, second in combinations(rows, 2))


@pytest.mark.parametrize("seed", range(80))
def test_rows_of_two_columns_that_share_memory_are_those_of_which_elements_do(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = int(generator.integers(2, 5))
    places = torch.arange(200)
    columns, of_rows = [], []
    same = bool(generator.integers(2))
    step = int(generator.integers(1, 7))
    for _ in range(2):
        shape = (rows, *generator.integers(1, 4, size=2).tolist())
        first = step if same else int(generator.integers(1, 7))
        strides = (first, *generator.integers(0, 8, size=2).tolist())
        start = int(generator.integers(0, 30))
        columns.append(places.as_strided(shape, strides, start))
        of_rows.append([set(row.flatten().tolist()) for row in columns[-1]])
    across = {
        (i, j) for i, one in enumerate(of_rows[0]) for j, other in enumerate(of_rows[1]) if i != j and one & other
    }
    if columns[0].stride(0) != columns[1].stride(0):
        assert {(int(i), int(j)) for i, j in shared_rows(*columns).T} == across
    whole = [one | other for one, other in zip(*of_rows, strict=True)]
    linked = np.eye(rows, dtype=bool)
    if columns[0].stride(0) == columns[1].stride(0):
        for lag in lags(columns):
            linked |= np.eye(rows, k=lag, dtype=bool) | np.eye(rows, k=-lag, dtype=bool)
        for _ in range(rows):
            linked = linked @ linked
        met = {(i, j) for i in range(rows) for j in range(rows) if i != j and whole[i] & whole[j]}
        assert bool(lags(columns)) == bool(met)
        assert all(linked[pair] for pair in met)


class Twice(PoissonBatchSampler):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return (indices + indices for indices in super().__iter__())


def test_a_sampler_that_repeats_what_was_drawn_is_refused_where_rows_are_in_memory() -> None:
    data = Subset(TENSORS, list(range(30)))
    loader = DataLoader(data, batch_sampler=Twice(30, sample_rate=0.9, steps=1), collate_fn=poisson_collate(data))
    with pytest.raises(PrivacyError, match="more than once"):
        list(loader)


# What runs on the ranks.


def outcome(attempt: Callable[[], Any]) -> str:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            attempt()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "".join(str(warning.message) for warning in told) or "taken"


def rolled(data: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.roll(part, distributed.world().rank, 0) for part in data)


def own_order(count: int = 40) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(distributed.world().rank)).tolist()


def on_ranks(kind: str) -> Any:
    rank = distributed.world().rank
    data = samples(40)
    inputs, targets = data
    if kind == "swapped":
        inputs = inputs.clone()
        if rank:
            inputs[[3, 4]] = inputs[[4, 3]]
    if kind == "another sample":
        targets = targets.clone()
        targets[-1] += rank
    made: dict[str, Callable[[], Any]] = {
        "tensors": lambda: data,
        "shuffled tensors": lambda: rolled(data),
        "swapped": lambda: (inputs, targets),
        "another sample": lambda: (inputs, targets),
        "parts": lambda: (inputs[rank::2], targets[rank::2]) if rank else (inputs[:21], targets[:21]),
        "another type": lambda: (inputs.double() if rank else inputs, targets),
        "listed": lambda: Listed(data),
        "shuffled samples": lambda: Listed(rolled(data)),  # type: ignore[arg-type]
        "a shuffled subset": lambda: Subset(TENSORS, own_order()),
        "a shuffled subset of equal rows": lambda: Subset(
            TensorDataset(torch.zeros(40, 6), torch.zeros(40)), own_order()
        ),
        "a seeded split": lambda: split()[0],
        "parts in another order": lambda: ConcatDataset(split()[:: -1 if rank else 1]),
        "augmented by global numbers": lambda: Listed(
            data,
            lambda row: row + torch.randn(6) + random.random() + np.random.rand(),  # noqa: NPY002
        ),
        "augmented by numbers of its own": lambda: Listed(data, Own()),
        "augmented and shuffled": lambda: Listed(rolled(data), Own()),  # type: ignore[arg-type]
        "own part only": lambda: Unreadable(data),
        "own part only, shuffled": lambda: Unreadable(rolled(data)),  # type: ignore[arg-type]
    }
    return made[kind]()


class Own:
    """A generator that nobody seeds."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def __call__(self, row: Tensor) -> Tensor:
        return row * float(self.generator.normal())


class Unreadable(Listed):
    """Samples of which a rank can read its own, and the first and last few."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if 4 < index < 36 and index % 2 != distributed.world().rank:
            raise FileNotFoundError(index)
        return super().__getitem__(index)


def drawn(kind: str, how: str) -> str:
    data = on_ranks(kind)
    if how == "collate":
        data = TensorDataset(*data) if isinstance(data, tuple) else data
        return outcome(lambda: poisson_collate(data))
    if how == "fit":
        return outcome(lambda: fit(gated_model(), data, **RUN))
    draw = PoissonBatches if how == "held" else StreamedBatches
    return outcome(lambda: draw(data, sample_rate=0.5, steps=1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tensors", "taken"),
        ("shuffled tensors", "another order"),
        ("swapped", "another order"),
        ("another sample", "another order"),
        ("parts", "the number of samples"),
        ("another type", "shape and type"),
        ("listed", "taken"),
        ("shuffled samples", "another order"),
        ("a shuffled subset", "indices of its subsets"),
        ("a shuffled subset of equal rows", "indices of its subsets"),
        ("a seeded split", "taken"),
        ("parts in another order", "indices of its subsets"),
        ("augmented by global numbers", "taken"),
        ("augmented by numbers of its own", "differ at each read"),
        ("augmented and shuffled", "another order"),
        ("own part only", "taken"),
        ("own part only, shuffled", "another order"),
    ],
)
def test_ranks_that_hold_other_data_are_refused(ranks, kind: str, expected: str) -> None:
    for how in ("collate", "streamed"):
        for said in ranks.run(drawn, kind, how):
            assert expected in said
            assert ("RankError" in said) == (expected not in ("taken", "differ at each read"))
            assert ("os.listdir" in said) == ("RankError" in said)


@pytest.mark.parametrize("how", ["held", "fit"])
def test_everything_that_draws_compares_the_ranks(ranks, how: str) -> None:
    assert all("os.listdir" in said for said in ranks.run(drawn, "shuffled tensors", how))
    assert ranks.run(drawn, "tensors", how) == ["taken", "taken"]


def beyond_what_is_hashed(kind: str, how: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(persons, "HASHED", 100)
        patch.setattr(persons, "ROWS", 8)
        return drawn(kind, how)


def test_of_large_tensors_the_ranks_compare_some_rows(ranks) -> None:
    assert all("os.listdir" in said for said in ranks.run(beyond_what_is_hashed, "shuffled tensors", "held"))
    assert ranks.run(beyond_what_is_hashed, "tensors", "held") == ["taken", "taken"]


def test_reading_for_the_comparison_leaves_global_generators_as_they_are(ranks) -> None:
    # The first sample is read for its shape before, as ever, by generators as they are.
    assert ranks.run(unchanged_by_reads) == [True, True]


def unchanged_by_reads() -> bool:
    data = on_ranks("augmented by global numbers")
    state = torch.get_rng_state()
    persons._read(lambda index: data[index], np.arange(3), 2)
    return torch.equal(state, torch.get_rng_state())


def test_a_sample_twice_in_a_list_of_a_class_of_its_own_is_refused():
    class Samples(list):
        pass

    rows = [(torch.tensor([float(index)]), index) for index in range(5)]
    refuse_repeats(Samples(rows))
    with pytest.raises(PrivacyError):
        refuse_repeats(Samples([*rows, rows[0]]))
