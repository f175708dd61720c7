"""Augmentations and collate functions that hold the data that is trained on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from clipless_dp import CliplessDPSGD, PoissonBatches, PrivacyError, StreamedBatches, fit, poisson_collate
from clipless_dp.sampling import trained_on
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


HELD: dict[str, Callable[[], tuple[Any, Any]]] = {
    "tensors": _tensors,
    "two rows": _part_of_it,
    "views of rows": _list_of_rows,
    "rows of a list": _rows_of_list,
    "arrays": _arrays,
    "TensorDataset": _tensor_dataset,
    "what a Subset chooses from": _subset,
    "list in a data set": _inner_rows,
    "row of a table of which there are views": _row_of_a_table_and_views,
    "data set without rows": _computed,
    "data set of a loader": _loader,
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
