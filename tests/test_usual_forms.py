"""Forms in which data and models usually come: they are taken, or refused in words that say what to do."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    PoissonBatches,
    PoissonBatchSampler,
    StreamedBatches,
    fit,
    gradient_gated,
    losses,
    poisson_collate,
)
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError

from .support import gated_model, samples

RUN: dict[str, Any] = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 12, "lr": 0.5, "progress": False}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.table(ids) * mask[..., None]).mean(1))  # type: ignore[no-any-return]


def two_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (24, 5), generator=generator)
    return ids, (ids > 2).long(), torch.arange(24) % 2


def model_of_two(*, named: bool) -> DPLipModel:
    ids, mask, _ = two_inputs()
    shape: Any = {"ids": ids, "mask": mask} if named else (ids, mask)
    return DPLipModel(
        gradient_gated(TwoInputs(), isolation="vmap"), input_shape=shape, loss=losses.TauCrossEntropy(1.0)
    )


def people_of_a_loader() -> tuple[CliplessDPSGD, DataLoader[Any]]:
    data = TensorDataset(*samples(24))
    sampler = PoissonBatchSampler(8, sample_rate=0.5, steps=3, groups=[i // 3 for i in range(24)], rows_per_group=2)
    loader: DataLoader[Any] = DataLoader(data, batch_sampler=sampler, collate_fn=poisson_collate(data))
    optimizer = CliplessDPSGD(
        gated_model(), lr=0.1, sample_rate=0.5, dataset_size=8, noise_multiplier=1.0, unit="person"
    )
    return optimizer, loader


def test_a_loaders_batches_of_people_are_accumulated_without_a_mask() -> None:
    optimizer, loader = people_of_a_loader()
    for inputs, targets in loader:
        optimizer.zero_grad()
        optimizer.accumulate((inputs, targets))
        of_pair = [parameter.grad.clone() for parameter in optimizer.model.parameters() if parameter.grad is not None]
        optimizer.model.register.forget()
        optimizer.zero_grad()
        optimizer.accumulate((inputs, targets, torch.ones(len(inputs), dtype=torch.bool)))
        held = [parameter.grad for parameter in optimizer.model.parameters() if parameter.grad is not None]
        assert all(torch.equal(*pair) for pair in zip(of_pair, held, strict=True))
        optimizer.step()


@pytest.mark.parametrize("batch", [(torch.zeros(2, 6),), {"x": 1}, torch.zeros(3, 6)], ids=["one", "mapping", "tensor"])
def test_what_is_no_batch_is_refused_in_words(batch: Any) -> None:
    optimizer = CliplessDPSGD(gated_model(), lr=0.1, sample_rate=0.5, dataset_size=24, noise_multiplier=1.0)
    with pytest.raises(ConfigurationError, match="a batch is inputs, targets and a mask"):
        optimizer.accumulate(batch)


def test_a_tensor_data_set_of_several_inputs_has_its_targets_last() -> None:
    data = TensorDataset(*two_inputs())
    assert fit(model_of_two(named=False), data, **RUN).steps == 2
    for batches in (PoissonBatches, StreamedBatches):
        batch = next(iter(batches(data, sample_rate=1.0, steps=1)))  # type: ignore[operator]
        assert set(batch.targets[batch.mask].tolist()) == {0, 1}
    with pytest.raises(InputError, match="by name, in a mapping"):
        fit(model_of_two(named=True), data, **RUN)
    inputs, targets = samples(24)
    with pytest.raises(InputError):
        fit(gated_model(), TensorDataset(inputs, torch.ones(24), targets), **RUN)


def test_a_column_of_a_list_of_mappings_tells_whose_the_rows_are() -> None:
    ids, mask, labels = two_inputs()
    rows = [{"ids": ids[i], "mask": mask[i], "labels": labels[i], "user": f"u{i // 3}"} for i in range(24)]
    settings = {**RUN, "batch_size": 4, "groups": "user", "rows_per_group": 2}
    result = fit(model_of_two(named=True), rows, **settings)
    assert result.optimizer.unit == "person"
    columns = {"ids": ids, "mask": mask, "labels": labels, "user": [row["user"] for row in rows]}
    assert fit(model_of_two(named=True), columns, **settings).epsilon == result.epsilon
    with pytest.raises(PrivacyError, match="more than once"):
        fit(model_of_two(named=True), [*rows, rows[0]], **settings)
    with pytest.raises(ConfigurationError, match="no column 'person'"):
        fit(model_of_two(named=True), rows, **{**settings, "groups": "person"})


class NoTargets(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(6), None


def test_a_target_that_is_none_is_refused_in_words() -> None:
    with pytest.raises(ConfigurationError, match=r"first sample cannot be collated \(.*NoneType"):
        poisson_collate(NoTargets())


class Database(Dataset):  # type: ignore[type-arg]
    """Opens its database when the first sample is read, in whichever thread that is."""

    handle: Any = None

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        if self.handle is None:
            self.handle = sqlite3.connect(":memory:")
        return torch.full((6,), float(self.handle.execute("select ?", (index,)).fetchone()[0])), index % 3


def test_a_handle_of_the_thread_that_opened_it_is_refused_in_words_where_another_thread_reads() -> None:
    assert len([*PoissonBatches(Database(), sample_rate=0.5, steps=2)]) == 2
    with pytest.raises(ConfigurationError, match=r"threading\.local\(\), or use PoissonBatches"):
        next(iter(StreamedBatches(Database(), sample_rate=0.5, steps=2)))
