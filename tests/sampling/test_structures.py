"""Data sets whose samples have several inputs, in all forms that users have them."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.packing import Packing
from clipless_dp.sampling import PoissonBatches, Samples, StreamedBatches, as_tensors

COUNT = 12
IDS = torch.arange(COUNT * 3).reshape(COUNT, 3) + 1
MASK = (IDS % 4 > 0).long()
TARGETS = torch.arange(COUNT) % 3
INPUTS = {"ids": IDS, "mask": MASK}
ROWS = torch.cat([IDS, MASK], 1)


class Columns(Dataset[Any]):
    """As a data set of Hugging Face: rows are mappings of lists, several are had at once."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"mask": MASK[index].tolist(), "ids": IDS[index].tolist(), "label": int(TARGETS[index])}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.asked.append(indices)
        return [self[index] for index in indices]


def _items() -> list[Any]:
    return [{"ids": IDS[i], "mask": MASK[i]} for i in range(COUNT)]


FORMS: dict[str, Any] = {
    "a pair of mapping and targets": lambda: (INPUTS, TARGETS),
    "a pair of mapping and targets, as arrays": lambda: ({k: v.numpy() for k, v in INPUTS.items()}, TARGETS.numpy()),
    "a pair of sequence and targets": lambda: ((IDS, MASK), TARGETS),
    "a mapping with labels inside": lambda: {**INPUTS, "labels": TARGETS},
    "an encoding with labels inside": lambda: UserDict(label=TARGETS.tolist(), mask=MASK.tolist(), ids=IDS.tolist()),
    "pairs of mapping and target": lambda: list(zip(_items(), TARGETS, strict=True)),
    "pairs of sequence and target": lambda: [((IDS[i], MASK[i]), TARGETS[i]) for i in range(COUNT)],
    "mappings with labels inside": lambda: [{**item, "labels": y} for item, y in zip(_items(), TARGETS, strict=True)],
    "encodings of arrays": lambda: [
        UserDict(ids=np.asarray(item["ids"]), mask=np.asarray(item["mask"]), labels=int(y))
        for item, y in zip(_items(), TARGETS, strict=True)
    ],
    "a data set of columns": Columns,
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_rows_and_targets(form: str) -> None:
    inputs, targets = as_tensors(FORMS[form]())
    assert torch.equal(inputs, ROWS)
    assert torch.equal(targets, TARGETS)
    samples = Samples(FORMS[form]())
    some, _ = samples.read([7, 2])
    assert torch.equal(some, ROWS[[7, 2]])
    assert samples.first[0].tolist() == ROWS[:1].tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [PoissonBatches, StreamedBatches])
def test_draws_of_each_form_are_rows_with_their_targets_padded_as_ever(form: str, kind: Any) -> None:
    (batch,) = kind(FORMS[form](), sample_rate=0.5, steps=1, seed=3, physical_batch_size=16)
    count = int(batch.mask.sum())
    assert 0 < count < 16
    drawn = (batch.inputs[:count, 0] - 1) // 3
    assert torch.equal(batch.inputs[:count], ROWS[drawn])
    assert torch.equal(batch.targets[:count], TARGETS[drawn])
    assert bool((batch.inputs[count:] == -1).all())


def test_a_batch_shows_its_fields() -> None:
    batches = PoissonBatches((INPUTS, TARGETS), sample_rate=1.0, steps=1)
    assert batches.packing is not None
    (batch,) = batches
    fields = batch.fields(batches.packing)
    assert isinstance(fields, dict)
    assert torch.equal(fields["ids"][:COUNT], IDS)
    assert torch.equal(fields["mask"][:COUNT], MASK)


def test_rows_are_packed_as_the_model_takes_them() -> None:
    packing = Packing.of({"mask": ((3,), torch.bool), "ids": ((3,), torch.int32)})
    samples = Samples.of(Samples((INPUTS, TARGETS)), packing)
    assert samples.packing == packing
    assert torch.equal(samples.all()[0], ROWS)
    with pytest.raises(InputError, match="'mask' is no input"):
        Samples((INPUTS, TARGETS), Packing.of({"ids": ((3,), torch.int64)}))


def test_an_only_input_stays_as_it_is() -> None:
    images = torch.randn(4, 3, 2, 2)
    inputs, _ = as_tensors({"pixel_values": images, "labels": torch.zeros(4)})
    assert torch.equal(inputs, images)


def test_targets_may_have_any_name() -> None:
    inputs, targets = Samples({**INPUTS, "sentiment": TARGETS}, labels="sentiment").all()
    assert torch.equal(inputs, ROWS)
    assert torch.equal(targets, TARGETS)


def test_data_sets_are_asked_for_several_samples_at_once() -> None:
    columns = Columns()
    Samples(columns).read([5, 1, 3])
    assert columns.asked == [[0], [5, 1, 3]]


@pytest.mark.parametrize(
    ("dataset", "error", "told"),
    [
        (INPUTS, ConfigurationError, "'labels' or 'label' is not among"),
        ({**INPUTS, "labels": TARGETS[:3]}, ConfigurationError, "need as many of each"),
        ({**INPUTS, "mask": MASK[:3], "labels": TARGETS}, ConfigurationError, "3 of the input 'mask'"),
        ({"ids": [[1, 2], [3]], "labels": [0, 1]}, InputError, "'ids' holds what is no tensor"),
        ({"text": ["a", "b"], "labels": [0, 1]}, InputError, "'text' holds what is no tensor"),
        ([{"ids": [1], "labels": 0}, {"ids": [1, 2], "labels": 0}], InputError, "'ids' has the shapes"),
        ([{"ids": [1], "labels": 0}, {"labels": 0}], InputError, "'ids' is there in some samples"),
        ([{"ids": [1], "labels": 0}, {"ids": [1]}], ConfigurationError, "'labels' or 'label' is not among"),
        ([], ConfigurationError, "empty"),
        ({0: "a"}, ConfigurationError, "not pairs"),
    ],
)
def test_what_are_no_samples_is_refused_by_name(dataset: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        as_tensors(dataset)


def _repeated() -> dict[str, Any]:
    stream = torch.arange(40)
    row = torch.ones(1, 3, dtype=torch.int64)
    items = [{"ids": IDS[i], "labels": TARGETS[i]} for i in range(4)]
    inputs = {"ids": IDS[0]}
    return {
        "windows that overlap": ({"ids": stream.unfold(0, 3, 1)[:COUNT], "mask": MASK}, TARGETS),
        "one row for all": ({"ids": row.expand(COUNT, 3), "mask": row.expand(COUNT, 3)}, TARGETS),
        "an item twice": [*items, items[1]],
        "inputs in two pairs": [(inputs, 0), (inputs, 0)],
        "one row in two mappings": [{"ids": IDS[0], "labels": 0}, {"ids": IDS[0], "labels": 0}],
        "one row in two sequences": [((IDS[0], MASK[0]), 0), ((IDS[0], MASK[0]), 0)],
        "an index twice": Subset(Columns(), [0, 3, 3]),
    }


@pytest.mark.parametrize("form", _repeated())
def test_a_sample_that_is_there_twice_is_refused_whatever_its_form(form: str) -> None:
    with pytest.raises(PrivacyError, match="more than once"):
        PoissonBatches(_repeated()[form], sample_rate=0.5, steps=1)


def test_equal_samples_of_two_persons_are_no_repetition() -> None:
    ones = torch.ones(4, 3, dtype=torch.int64)
    forms: list[Any] = [
        ({"ids": ones, "mask": ones.clone()}, torch.zeros(4)),
        [{"ids": ones[i], "labels": 0} for i in range(4)],
        [({"ids": ones[i], "types": ones[0]}, 0) for i in range(4)],
        [((ones[i], ones[0]), 0) for i in range(4)],
        [{"ids": [1, 1, 1], "labels": 0} for _ in range(4)],
    ]
    for form in forms:
        assert len(Samples.to_train_on(form)) == 4


def test_an_input_that_is_one_row_for_all_is_no_repetition() -> None:
    same = torch.zeros(1, 3, dtype=torch.int64).expand(COUNT, 3)
    inputs, _ = Samples.to_train_on(({"ids": IDS, "types": same}, TARGETS)).all()
    assert torch.equal(inputs[:, :3], IDS)


def test_arrays_in_files_are_read_row_by_row(tmp_path: Any) -> None:
    held: dict[str, Any] = {}
    for name, values in INPUTS.items():
        held[name] = np.memmap(tmp_path / name, np.int64, mode="w+", shape=tuple(values.shape))
        held[name][:] = values.numpy()
    samples = Samples((held, TARGETS))
    assert samples.tensors is not None
    tensor: Tensor = samples.tensors[0]
    # The memory of the file itself: nothing of it was copied.
    assert tensor.data_ptr() == held["ids"].ctypes.data
    assert torch.equal(samples.read([5])[0], ROWS[5:6])


@pytest.mark.parametrize("nested", [False, True])
def test_lists_of_numbers_are_one_input(nested: bool) -> None:
    rows = torch.arange(12.0).reshape((3, 2, 2) if nested else (3, 4)) / 8.0
    dataset = list(zip(rows.tolist(), [0, 1, 2], strict=True))
    inputs, targets = as_tensors(dataset)
    assert torch.equal(inputs, rows)
    assert torch.equal(targets, torch.arange(3))
    assert Samples(dataset).first[0].shape == (1, *rows.shape[1:])


def test_lists_of_numbers_of_different_lengths_are_refused_in_words() -> None:
    with pytest.raises(InputError, match="different samples"):
        as_tensors([([0.1, 0.2], 0), ([0.3], 1), ([0.4, 0.5], 1)])
