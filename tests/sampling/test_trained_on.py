"""Augmentations and collate functions that hold the data that is trained on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate, random_split

from clipless_dp import (
    CliplessDPSGD,
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyError,
    StreamedBatches,
    fit,
    poisson_collate,
)
from clipless_dp.datasets import Split
from clipless_dp.sampling import Samples, trained_on
from tests.support import gated_model

N = 40
MESSAGE = "reaches the data that is trained on"


def rows_of(count: int = N) -> tuple[Tensor, Tensor]:
    """Rows of which no other test knows."""
    return torch.randn(count, 6), torch.arange(count) % 3


class Mixed:
    """Mixes a row of what it holds into each view."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        row = self.rows[int(torch.randint(len(self.rows), ()))]
        row = row[0] if isinstance(row, tuple) else row
        return 0.5 * x + 0.5 * torch.as_tensor(row).to(x)


class OfRows(Dataset):  # type: ignore[type-arg]
    """A data set of a user's."""

    def __init__(self, rows: Any, targets: Tensor) -> None:
        self.rows, self.targets = rows, targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.rows[index]).clone(), self.targets[index]


class Computed(Dataset):  # type: ignore[type-arg]
    """A data set that holds no row."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((6,), float(index)), index % 3


def _tensors() -> tuple[Any, Any]:
    data = rows_of()
    return data, data[0]


def _part_of_it() -> tuple[Any, Any]:
    data = rows_of()
    return data, data[0][7:9]


def _list_of_rows() -> tuple[Any, Any]:
    data = rows_of()
    return data, [*data[0]]


def _rows_of_list() -> tuple[Any, Any]:
    samples = [(x.clone(), int(y)) for x, y in zip(*rows_of(), strict=True)]
    return samples, [x for x, _ in samples]


def _arrays() -> tuple[Any, Any]:
    inputs, targets = (part.numpy() for part in rows_of())
    return (inputs, targets), inputs[3:5]


def _tensor_dataset() -> tuple[Any, Any]:
    data = TensorDataset(*rows_of())
    return data, data


def _subset() -> tuple[Any, Any]:
    data = OfRows(*rows_of())
    return Subset(data, range(0, N, 2)), data


def _inner_rows() -> tuple[Any, Any]:
    data = OfRows([*rows_of()[0].numpy().copy()], rows_of()[1])
    return data, data.rows


def _computed() -> tuple[Any, Any]:
    data = Computed()
    return data, data


def _loader() -> tuple[Any, Any]:
    data = Computed()
    return data, DataLoader(data).dataset


def _row_of_a_table_and_views() -> tuple[Any, Any]:
    inputs, targets = rows_of()
    data = OfRows(inputs, targets)
    data.some = [*inputs[:20], *inputs[:20, :3]]  # type: ignore[attr-defined]
    return data, inputs[30:32]


class Of(Dataset):  # type: ignore[type-arg]
    """A data set of whatever attributes, and a way to read a sample."""

    def __init__(self, read: Callable[[Any, int], Any], count: int = N, **held: Any) -> None:
        vars(self).update(held, read=read, count=count)

    def __len__(self) -> int:
        return int(self.count)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.as_tensor(self.read(self, index)).clone(), index % 3


def _short_index() -> tuple[Any, Any]:
    inputs = rows_of()[0]
    return Of(lambda self, at: self.x[self.index[at]], 30, x=inputs, index=torch.randperm(N)[:30]), inputs


def _mapping_of_columns() -> tuple[Any, Any]:
    inputs = rows_of()[0]
    return Of(lambda self, at: self.encodings["ids"][at], encodings={"ids": inputs}), inputs


def _split_of_a_list() -> tuple[Any, Any]:
    samples = [(x.clone(), int(y)) for x, y in zip(*rows_of(), strict=True)]
    return random_split(samples, [30, 10])[0], samples  # type: ignore[arg-type]


def _shards() -> tuple[Any, Any]:
    shards = [*rows_of()[0].split(10)]
    return Of(lambda self, at: self.shards[at // 10][at % 10], shards=shards), shards[0]


def _two_names_of_one_list() -> tuple[Any, Any]:
    samples = [(x.clone(), int(y)) for x, y in zip(*rows_of(), strict=True)]
    return Of(lambda self, at: self.samples[at][0], samples=samples, images=samples), samples


def _one_tensor_under_two_names() -> tuple[Any, Any]:
    pairs = [{"anchor": x, "positive": x} for x in rows_of()[0].clone().unbind()]
    return Of(lambda self, at: self.pairs[at]["anchor"], pairs=pairs), [pair["anchor"] for pair in pairs]


def _wave() -> tuple[Any, Any]:
    wave = torch.randn(6 * N)
    return Of(lambda self, at: self.wave[6 * at : 6 * at + 6], wave=wave), wave.view(N, 6)


class Slotted(Dataset):  # type: ignore[type-arg]
    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index].clone(), index % 3


def _slots() -> tuple[Any, Any]:
    inputs = rows_of()[0]
    return Slotted(inputs), inputs


def _closure_of_the_class() -> tuple[Any, Any]:
    inputs = rows_of()[0]
    return Of(lambda self, at: inputs[at]), inputs


def _frame() -> tuple[Any, Any]:
    frame = pytest.importorskip("pandas").DataFrame(rows_of()[0].numpy().copy())
    return Of(lambda self, at: self.frame.iloc[at].to_numpy().copy(), frame=frame), frame.values


def _deep() -> tuple[Any, Any]:
    inputs = rows_of()[0]
    data: Any = TensorDataset(inputs)
    for _ in range(6):
        data = Of(lambda self, at: self.inner[at][0], inner=Subset(data, range(N)))
    return data, inputs


def _viewed_labels() -> tuple[Any, Any]:
    inputs, targets = rows_of()
    return [(x.clone(), y) for x, y in zip(inputs, targets, strict=True)], targets.view(N, 1).expand(N, 6)


def _behind_lists(other: Any) -> tuple[Any, Any]:
    inputs = rows_of(1100)[0]
    return Of(lambda self, at: self.x[at], 1100, other=other, x=inputs), inputs


def _behind_columns_of_numbers() -> tuple[Any, Any]:
    return _behind_lists({f"c{column}": [*map(float, range(1100))] for column in range(70)})


def _behind_a_list_of_mappings() -> tuple[Any, Any]:
    return _behind_lists([{f"k{place}": [place + 0.5, [row]] for place in range(20)} for row in range(1100)])


def _deep_beside_lists() -> tuple[Any, Any]:
    inputs = rows_of()[0]
    data: Any = TensorDataset(inputs)
    for _ in range(6):
        other = [{"a": [0.5, [1]], "b": [row]} for row in range(300)]
        data = Of(lambda self, at: self.inner[at][0], other=other, inner=data)
    return data, inputs


def _classes_beside_their_rows() -> tuple[Any, Any]:
    inputs, targets = rows_of(210)
    pools = {kind: inputs[targets == kind].clone() for kind in range(3)}
    return Of(lambda self, at: self.x[at], 210, x=inputs, pools=pools), pools[1]


def _rare_rows_copied() -> tuple[Any, Any]:
    inputs = rows_of(200)[0]
    rare = inputs[torch.tensor([3, 50, 7, 120])].clone()
    return Of(lambda self, at: self.x[at], 200, x=inputs, rare=rare), rare


def _numbers_by_their_places() -> tuple[Any, Any]:
    numbers, places = torch.randn(60), torch.randint(60, (200, 6))
    return Of(lambda self, at: self.numbers[self.places[at]], 200, numbers=numbers, places=places), numbers.view(10, 6)


def _embedding(bank: Callable[[Tensor, nn.Embedding], Any], padding: int = 0) -> tuple[Any, Any]:
    inputs = torch.cat([torch.zeros(padding, 6), rows_of()[0]])
    table = nn.Embedding.from_pretrained(inputs)
    return Of(lambda self, at: self.table.weight[at + padding], table=table), bank(inputs, table)


class Looked(Mixed):
    """Looks a row up in a module."""

    def __call__(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * self.rows(torch.tensor(3)).detach()


def _columns_in_a_parameter() -> tuple[Any, Any]:
    layer = nn.Linear(N, 6, bias=False)
    return Of(lambda self, at: self.layer.weight[:, at].detach(), layer=layer), layer.weight.detach().T


def _parameters(count: int, extra: int = 0) -> tuple[Any, Any]:
    listed = nn.ParameterList([nn.Parameter(row.clone(), requires_grad=False) for row in rows_of(count)[0]])
    return Of(lambda self, at: self.rows[at].detach(), count - extra, rows=listed), [*listed][:7]


def _modules_by_sample() -> tuple[Any, Any]:
    modules = [nn.Linear(6, 1, bias=False) for _ in range(N)]
    return Of(lambda self, at: self.modules[at].weight[0].detach(), modules=modules), [modules[5].weight.detach()[0]]


def _few_people(as_mapping: bool) -> tuple[Any, Any]:
    by_person = {person: [row.clone() for row in rows_of(5)[0]] for person in range(12)}
    data = Of(lambda self, at: self.by_person[at // 5][at % 5], 60, by_person=by_person)
    return data, by_person[3] if as_mapping else [by_person[3][2]]


def _neighbours_of_many() -> tuple[Any, Any]:
    rows = [row.clone() for row in rows_of(64)[0]]
    near = [[rows[at * step % 8] for step in range(3)] for at in range(64)]
    return Of(lambda self, at: self.rows[at], 64, rows=rows, near=near), rows[:8]


HELD: dict[str, Callable[[], tuple[Any, Any]]] = {
    "rows of which an embedding was made": lambda: _embedding(lambda inputs, table: inputs),
    "weights of an embedding": lambda: _embedding(lambda inputs, table: table.weight.detach()),
    "an embedding's own row": lambda: _embedding(lambda inputs, table: table.weight.detach()[3:4]),
    "an embedding with a row for padding": lambda: _embedding(lambda inputs, table: inputs, 1),
    "columns of a parameter": _columns_in_a_parameter,
    "a list of parameters": lambda: _parameters(N),
    "a list of parameters that has more than there are samples": lambda: _parameters(70, 5),
    "modules of which each holds a sample": _modules_by_sample,
    "few rows of few people": lambda: _few_people(True),
    "one row of few people": lambda: _few_people(False),
    "rows that are neighbours of many": _neighbours_of_many,
    "tensors": _tensors,
    "two rows": _part_of_it,
    "views of rows": _list_of_rows,
    "rows of a list": _rows_of_list,
    "arrays": _arrays,
    "TensorDataset": _tensor_dataset,
    "what a Subset chooses from": _subset,
    "list in a data set": _inner_rows,
    "row of a table of which there are views": _row_of_a_table_and_views,
    "data set whose index is shorter than its table": _short_index,
    "mapping of columns": _mapping_of_columns,
    "split of a list": _split_of_a_list,
    "shards": _shards,
    "two names of one list": _two_names_of_one_list,
    "one tensor under two names": _one_tensor_under_two_names,
    "one wave": _wave,
    "slots": _slots,
    "closure of the class": _closure_of_the_class,
    "frame": _frame,
    "data set behind six others": _deep,
    "labels of which samples are views": _viewed_labels,
    "data set without rows": _computed,
    "data set of a loader": _loader,
    "tensor behind columns of numbers": _behind_columns_of_numbers,
    "tensor behind a list of mappings": _behind_a_list_of_mappings,
    "data set behind six others beside lists": _deep_beside_lists,
    "classes beside their rows": _classes_beside_their_rows,
    "a few rows, copied, beside all": _rare_rows_copied,
    "numbers that are read by their places": _numbers_by_their_places,
}


def trained(draws: Any, augment: Any) -> None:
    optimizer = CliplessDPSGD(gated_model(), lr=1.0, noise_multiplier=1.3, sample_rate=0.5, dataset_size=N)
    for batch in draws:
        optimizer.accumulate(batch, augment=augment)
        optimizer.step()


@pytest.mark.parametrize("name", HELD)
def test_an_augmentation_that_reaches_the_data_is_refused(name: str) -> None:
    data, held = HELD[name]()
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained(PoissonBatches(data, sample_rate=0.5, steps=1), Mixed(held))


@pytest.mark.parametrize("name", ["tensors", "rows of a list", "data set without rows"])
def test_streams_and_fit_refuse_an_augmentation_that_reaches_the_data(name: str) -> None:
    data, held = HELD[name]()
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained(StreamedBatches(data, sample_rate=0.5, steps=1), Mixed(held))
    with pytest.raises(PrivacyError, match=MESSAGE):
        fit(gated_model(), data, epsilon=4.0, delta=1e-3, epochs=1, batch_size=20, progress=False, augment=Mixed(held))


def test_the_data_of_a_loader_is_known_by_its_memory_and_as_an_object() -> None:
    data = OfRows(*rows_of())
    poisson_collate(data)
    assert trained_on.holds(data.rows[3])
    assert trained_on.holds(data)


def test_public_rows_may_be_mixed_in_and_rows_beside_the_data_in_memory() -> None:
    everything = torch.randn(2 * N, 6)
    public = rows_of()[0]
    draws = PoissonBatches((everything[:N], rows_of()[1]), sample_rate=0.5, steps=2)
    trained(draws, Mixed(everything[N:]))
    trained(PoissonBatches(rows_of(), sample_rate=0.5, steps=1), Mixed(public.numpy()))


def test_a_constant_that_the_samples_of_a_list_share_may_be_held() -> None:
    constant = torch.ones(6)
    samples = [({"x": x.clone(), "bias": constant}, int(y)) for x, y in zip(*rows_of(), strict=True)]
    trained_on.note(samples)
    assert not trained_on.holds(constant)
    assert trained_on.holds(samples[0][0]["x"])


def test_nothing_is_kept_alive_and_memory_that_was_freed_is_nobodys() -> None:
    inputs, targets = rows_of(1000)
    array = np.zeros((1000, 6))
    trained_on.note((inputs, targets))
    trained_on.note((array, targets))
    ours = len(trained_on._known)
    place = inputs.data_ptr(), array.__array_interface__["data"][0]
    del inputs, targets, array
    gc.collect()
    for _ in range(20):
        again = torch.zeros(1000, 6)
        assert not trained_on.holds(again), place
    trained_on.note(Computed())
    assert len(trained_on._known) < ours


def test_a_collate_function_that_reaches_the_data_is_refused_and_a_method_of_the_data_set_is_not() -> None:
    class Own(OfRows):
        def collated(self, samples: list[Any]) -> Any:
            return default_collate(samples)

    data = Own(*rows_of())

    def mixed(samples: list[Any]) -> Any:
        inputs, targets = default_collate(samples)
        return inputs + data.rows[0], targets

    with pytest.raises(PrivacyError, match=MESSAGE):
        poisson_collate(data, mixed)
    poisson_collate(data, data.collated)


def test_statistics_and_parameters_that_a_data_set_shares_with_an_augmentation_may_be_held() -> None:
    mean, scale, layer = torch.zeros(6), torch.ones(3, 1), nn.Linear(6, 60)
    data = Of(lambda self, at: self.x[at] - self.mean, x=rows_of()[0], mean=mean, scale=scale, layer=layer)
    trained_on.note(data, sample=data[0])
    assert not any(map(trained_on.holds, (mean, scale, layer.weight)))
    assert trained_on.holds(data.x[:1])


def test_an_embedding_of_the_data_set_is_the_data_as_a_module() -> None:
    data, table = _embedding(lambda inputs, table: table)
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained(PoissonBatches(data, sample_rate=0.5, steps=1), Looked(table))
    trained(PoissonBatches(data, sample_rate=0.5, steps=1), Looked(nn.Embedding(N, 6)))


FROZEN: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "an embedding of words": (lambda: nn.Embedding(500, 6), lambda held: held.weight),
    "a layer as wide as a sample": (lambda: nn.Linear(6, 6), lambda held: held.weight),
    "many blocks": (
        lambda: nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(70)]),
        lambda held: held[30][0].weight,
    ),
    "a list of layers": (lambda: [nn.Linear(6, 6) for _ in range(12)], lambda held: held[3].weight),
    "means of ten classes": (lambda: {kind: torch.randn(6) for kind in range(10)}, lambda held: held[3]),
    "a mean and deviations": (lambda: [torch.randn(6), torch.rand(6)], lambda held: held[0]),
    "one layer that each sample holds": (
        lambda: [{"place": at, "layer": layer} for layer in [nn.Linear(6, 6)] for at in range(N)],
        lambda held: held[3]["layer"].weight,
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_public_modules_and_few_constants_that_a_data_set_holds_may_be_shared(name: str) -> None:
    make, part = FROZEN[name]
    held = make()
    data = Of(lambda self, at: self.x[at], x=rows_of()[0], held=held)
    trained_on.note(data, sample=data[0])
    assert not trained_on.holds(part(held))
    assert trained_on.holds(data.x[3])


def test_a_prototype_that_an_eighth_of_samples_share_is_none_of_a_row() -> None:
    rows, shared = rows_of()[0], [torch.randn(6) for _ in range(4)]
    samples = [{"x": row.clone(), "prototype": shared[at % 4]} for at, row in enumerate(rows)]
    data = Of(lambda self, at: self.samples[at]["x"], samples=samples, again=[*samples])
    trained_on.note(data, sample=data[0])
    assert not any(map(trained_on.holds, shared))
    assert trained_on.holds(samples[7]["x"])


@pytest.mark.parametrize("kind", ["split", "samples", "pairs", "batches"])
def test_data_that_an_object_of_this_package_holds_is_the_data(kind: str) -> None:
    inputs, targets = rows_of()
    split, samples = Split(inputs, targets, inputs[:0], targets[:0], 3), Samples((inputs, targets))
    draws = PoissonBatches(samples, sample_rate=0.5, steps=1)
    held: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
        "split": (split, lambda held: held.train[0][3]),
        "samples": (samples, lambda held: held.read([3])[0][0]),
        "pairs": (samples.as_pairs(), lambda held: held[3][0]),
        "batches": (draws, lambda held: held._inputs[3]),
    }
    one, read = held[kind]
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained(draws, lambda x: x + read(one))


def test_each_function_of_one_code_is_looked_at_by_what_it_holds() -> None:
    public = [(row, 0) for row in rows_of(300)[0]]
    samples = [(x.clone(), int(y)) for x, y in zip(*rows_of(300), strict=True)]

    def mixed(pool: list[Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: x + pool[int(torch.randint(len(pool), ()))][0]

    def of_object(pool: Mixed) -> Callable[[Tensor], Tensor]:
        return lambda x: x + pool.rows[7][0]

    optimizer = CliplessDPSGD(gated_model(), lr=1.0, noise_multiplier=1.3, sample_rate=1.0, dataset_size=300)
    (batch,) = PoissonBatches(rows_of(300), sample_rate=1.0, steps=1)
    for augment in (mixed(public), of_object(Mixed(public))):
        optimizer.accumulate(batch, augment=augment)
        optimizer.skip_draw()
        (batch,) = PoissonBatches(rows_of(300), sample_rate=1.0, steps=1)
    for made in (mixed, lambda pool: of_object(Mixed(pool))):
        for _ in range(3):
            with pytest.raises(PrivacyError, match=MESSAGE):
                trained(PoissonBatches(samples, sample_rate=0.5, steps=1), made(samples))


def test_an_augmentation_that_was_looked_at_is_looked_at_again_once_its_rows_are_trained_on() -> None:
    samples = [(x.clone(), int(y)) for x, y in zip(*rows_of(300), strict=True)]
    augment = Mixed(Mixed(samples))
    augment.__class__ = type("Deep", (Mixed,), {"__call__": lambda self, x: x + self.rows.rows[3][0]})
    trained(PoissonBatches(rows_of(), sample_rate=0.5, steps=1), augment)
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained(PoissonBatches(samples, sample_rate=0.5, steps=1), augment)


def test_the_data_of_a_loader_with_the_usual_collate_function_is_known_and_so_is_what_a_batch_is_a_view_of() -> None:
    data = Of(lambda self, at: self.x[at], x=rows_of()[0])
    loader = DataLoader(data, batch_sampler=PoissonBatchSampler(N, sample_rate=0.5, steps=1))
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained(loader, Mixed(data.x))
    inputs, targets = rows_of()
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained([(inputs[:10], targets[:10])], Mixed(inputs))


def test_a_long_list_is_read_in_part_and_a_large_table_at_once() -> None:
    samples = [(torch.zeros(2), 0) for _ in range(20_000)]
    trained_on.note(samples, sample=samples[0])
    assert 1000 < len(trained_on._known[-1].blocks) < 2100
    assert trained_on._known[-1].furthest[-1] == trained_on._known[-1].stops.max()


CONSTANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "whitening": ((1, 8, 8), (64, 64)),
    "principal axes": ((1, 8, 8), (64, 10)),
    "prototypes": ((1, 8, 8), (5, 1, 8, 8)),
    "random directions": ((4,), (16, 4)),
    "covariances": ((4,), (4, 4)),
    "quantiles": ((4,), (7,)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_a_transform_that_data_set_and_augmentation_share_are_refused_and_a_copy_of_them_is_not(
    name: str,
) -> None:
    shape, size = CONSTANTS[name]
    constant, inputs = torch.randn(size), torch.randn(200, *shape)
    data = Of(lambda self, at: self.x[at], 200, x=inputs, transform=Mixed([constant]))
    trained_on.note(data, sample=data[0])
    assert trained_on.holds(inputs[7])
    with pytest.raises(
        PrivacyError, match=r"Constants that a transform of the data set holds, too, need a copy, \.clo"
    ):
        trained_on.refuse(abs, "augment", [constant])
    trained_on.refuse(abs, "augment", [constant.clone()])


def _bytes_of(rows: Tensor) -> Tensor:
    return (255 * rows.sigmoid()).to(torch.uint8)


BANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda rows: rows[:20].clone(),
    "standardised": lambda rows: (rows[:20] - rows.mean(0)) / rows.std(0),
    "halved": lambda rows: rows[:20] / 2,
    "mirrored": lambda rows: rows[:20].flip(-1),
    "of half the bytes": lambda rows: rows[:20].half(),
    "of twice the bytes": lambda rows: rows[:20].double(),
    "images of bytes, scaled": lambda rows: _bytes_of(rows[:40]).float() / 255,
    "means of classes": lambda rows: torch.stack([rows[kind::3].mean(0) for kind in range(3)]),
    "a square": lambda rows: rows[:16].clone(),
    "a square, halved": lambda rows: rows[:16] / 2,
    "one among public ones": lambda rows: torch.cat([torch.randn(30, 16), rows[7:8], torch.randn(8, 16)]),
    "flat, with three numbers more": lambda rows: torch.cat([rows[:20].flatten(), torch.zeros(3)]),
}


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("name", BANKS)
def test_a_bank_that_was_made_of_training_rows_is_data_in_whatever_unit_it_is(name: str, is_read: bool) -> None:
    # Of a loader no sample is at hand, and the rows of the table tell what a sample has.
    inputs = torch.randn(400, 16)
    bank = BANKS[name](inputs)
    held = _bytes_of(inputs) if "bytes, scaled" in name else inputs
    for others in ({}, {"public": torch.randn(50, 16)}):
        data = Of(lambda self, at: self.x[at].float(), 400, x=held, bank=bank, **others)
        trained_on.note(data, sample=data[0] if is_read else ())
        assert trained_on.holds(bank)
        assert not trained_on.holds(bank.clone())


def test_a_bank_that_a_transform_of_the_data_set_holds_reaches_no_step() -> None:
    data = Of(lambda self, at: self.x[at] / 255, 400, x=_bytes_of(rows_of(400)[0]))
    data.bank = data.x[:40].float() / 255
    with pytest.raises(PrivacyError, match=MESSAGE):
        trained(PoissonBatches(data, sample_rate=0.5, steps=1), Mixed(data.bank))


def test_what_a_data_set_reaches_beyond_what_is_looked_at_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    many = [[[[row] for _ in range(9)] for _ in range(9)] for row in range(1024)]
    data = Of(lambda self, at: self.x[at], 1024, x=rows_of(1024)[0], many=many)
    trained_on.note(data, sample=data[0])
    assert trained_on.holds(data.x[3])
    for _ in range(2):
        trained_on.refuse(abs, "augment", [])
    told = [one for one in recwarn if "of which that many were looked at" in str(one.message)]
    assert len(told) == 1
