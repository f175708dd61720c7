from __future__ import annotations

import os
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from accounting import create_accountant
from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    InputError,
    PoissonBatches,
    PrivacyError,
    PrivacyWarning,
    StreamedBatches,
    evaluate,
    fit,
)
from clipless_dp.sampling import Samples
from clipless_dp.training import plan
from tests.support import gated_model, keyboard_interrupt, power_cut, samples

RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 3, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}
DRAWS = {"sample_rate": 0.2, "steps": 6}


class Listed(Dataset):  # type: ignore[type-arg]
    """Samples one by one, noting which were asked for, and by which thread."""

    def __init__(self, count: int = 300, fails_at: int | None = None) -> None:
        self.inputs, self.targets = samples(count)
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.fails_at = fails_at

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if len(self.asked) == self.fails_at:
            raise FileNotFoundError(f"sample {index} has gone")
        return self.inputs[index], int(self.targets[index])


def weights(model: DPLipModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.net.parameters()])


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "clipless_dp data"]


@pytest.fixture(autouse=True)
def no_thread_outlives_the_test():
    yield
    assert readers() == []


@pytest.mark.parametrize("build", [Listed, lambda: TensorDataset(*samples(300)), lambda: samples(300)])
def test_streamed_batches_are_those_of_data_on_the_device(build) -> None:
    streamed = StreamedBatches(build(), seed=3, physical_batch_size=16, **DRAWS)
    held = PoissonBatches(samples(300), seed=3, physical_batch_size=16, **DRAWS)
    assert len(streamed) == len(held) == 6
    for mine, other in zip(streamed, held, strict=True):
        for part, its in zip(mine, other, strict=True):
            assert torch.equal(part.nan_to_num(nan=7.0), its.nan_to_num(nan=7.0))


def test_the_rows_are_those_of_poisson_batches_by_default() -> None:
    (mine,) = StreamedBatches(samples(300), sample_rate=0.2, steps=1, seed=3)
    (other,) = PoissonBatches(samples(300), sample_rate=0.2, steps=1, seed=3)
    assert len(mine.mask) == len(other.mask)


def test_empty_draws_are_handed_over() -> None:
    batches = StreamedBatches(Listed(5), sample_rate=1e-6, steps=20, physical_batch_size=8)
    assert [(len(mask), int(mask.sum())) for _, _, mask in batches] == [(8, 0)] * 20


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(300))], ids=["items", "batches"])
def test_a_streamed_fit_equals_one_on_the_device_bit_by_bit(wrap) -> None:
    streamed, held, stacked = gated_model(), gated_model(), gated_model()
    data = Listed()
    results = [
        fit(streamed, wrap(data), reproducible_seed=2, **RUN),
        fit(held, samples(300), reproducible_seed=2, **RUN),
        fit(stacked, wrap(Listed()), stream=False, reproducible_seed=2, **RUN),
    ]
    assert data.threads == {"MainThread", "clipless_dp data"}
    assert torch.equal(weights(streamed), weights(held))
    assert torch.equal(weights(stacked), weights(held))
    assert len({str(result.optimizer.accountant.history) for result in results}) == 1
    assert results[0].history == results[1].history


def test_only_drawn_samples_are_read() -> None:
    data = Listed()
    fit(gated_model(), data, **{**RUN, "epochs": 0.1, "batch_size": 10})
    # The first one for its shape, then three draws of ten on average: above 90 once in 10⁹ runs or less.
    assert data.asked[0] == 0
    assert len(data.asked) < 90


def test_a_split_streamed_fit_counts_the_draws_that_wait_for_their_turn() -> None:
    sizes = [
        fit(gated_model(), samples(300), stream=s, memory_budget=16_000, **RUN).micro_batch_size for s in (False, True)
    ]
    assert 1 <= sizes[1] < sizes[0]


def test_reading_ahead_is_bounded() -> None:
    data = Listed()
    batches = iter(StreamedBatches(data, sample_rate=1.0, steps=50))
    for used in range(1, 4):
        next(batches)
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline and len(data.asked) <= 1 + 300 * (used + 2):
            time.sleep(0.01)
        # One waits, one may wait for room.
        assert len(data.asked) <= 1 + 300 * (used + 2)
    batches.close()


def test_a_draw_that_was_read_ahead_amplifies_no_step_until_it_is_handed_over() -> None:
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.2, dataset_size=300, accountant="rdp")
    data = Listed()
    batches = iter(StreamedBatches(data, **DRAWS))
    inputs, targets, mask = next(batches)
    deadline = time.monotonic() + 10
    while len(data.asked) < 2 * int(mask.sum()) and time.monotonic() < deadline:
        time.sleep(0.01)
    model.loss(model(inputs), targets, mask).backward()
    optimizer.step()
    with pytest.warns(PrivacyWarning, match="no Poisson draw"):
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.2, 1), (1.0, 1.0, 1)]
    batches.close()


def test_two_draws_handed_over_for_one_step_are_refused() -> None:
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.2, dataset_size=300, accountant="rdp")
    batches = iter(StreamedBatches(samples(300), **DRAWS))
    for inputs, targets, mask in (next(batches), next(batches)):
        model.loss(model(inputs), targets, mask).backward()
    with pytest.raises(PrivacyError, match="2 Poisson draws"):
        optimizer.step()
    batches.close()


def test_what_the_data_set_raises_surfaces_as_it_is_and_only_steps_that_were_taken_are_charged() -> None:
    accountant = create_accountant("rdp")
    data = Listed(fails_at=1 + 4 * 50)
    with pytest.raises(FileNotFoundError, match="has gone") as caught:
        fit(gated_model(), data, **{**RUN, "accountant": accountant})
    assert readers() == []
    assert "__getitem__" in "".join(traceback.format_tb(caught.value.__traceback__)), "points at the data set's code"
    # About four draws of fifty were read, whole ones only were stepped on; none more than six times in 10⁹.
    assert 0 < len(accountant) <= 6


def test_samples_of_another_shape_later_on_are_refused_in_words() -> None:
    data = Listed()
    ragged = [(row if number != 7 else row[:5], label) for number, (row, label) in enumerate(data)]  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="pairs"):
        fit(gated_model(), ragged, **{**RUN, "batch_size": 250})


def test_an_error_of_a_step_ends_the_thread() -> None:
    with power_cut(0) as caught:
        fit(gated_model(), Listed(), **RUN)
    assert readers() == []
    del caught


def test_an_iteration_that_is_left_ends_its_thread() -> None:
    for count in (0, 1, 3):
        batches = iter(StreamedBatches(Listed(), **DRAWS))
        for _ in range(count):
            next(batches)
        batches.close()
        assert readers() == []


def test_an_interrupted_streamed_run_resumes_bit_by_bit(tmp_path) -> None:
    settings = {**RUN, "reproducible_seed": 7}
    whole, resumed = gated_model(), gated_model()
    expected = fit(whole, Listed(), **settings)
    with keyboard_interrupt(7):
        fit(gated_model(), Listed(), checkpoint=tmp_path / "run.pt", **settings)
    assert readers() == []
    result = fit(resumed, Listed(), checkpoint=tmp_path / "run.pt", **settings)
    assert torch.equal(weights(whole), weights(resumed))
    assert result.optimizer.accountant.history == expected.optimizer.accountant.history


def test_a_draw_is_never_handed_out_again() -> None:
    stream = StreamedBatches(samples(1000), sample_rate=0.5, steps=4)
    seen = set()
    for _ in range(3):
        batches = iter(stream)
        for batch, _ in zip(batches, range(2), strict=False):
            seen.add(batch.inputs[batch.mask].numpy().tobytes())
        batches.close()
    assert len(seen) == 6


def test_a_second_pass_of_a_seeded_stream_is_refused() -> None:
    stream = StreamedBatches(samples(100), seed=1, **DRAWS)
    assert len(list(stream)) == 6
    with pytest.raises(ConfigurationError, match="second pass"):
        list(stream)


def test_a_file_larger_than_memory_is_not_read_whole(tmp_path: Path) -> None:
    count = 2**32
    # 128 GiB that take no room on the disk: holes, which read as zeros.
    shape = {"inputs": (count, 6), "targets": (count,)}
    arrays = []
    for name, dtype in (("inputs", np.float32), ("targets", np.int64)):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(int(np.prod(shape[name])) * np.dtype(dtype).itemsize)
        arrays.append(np.memmap(path, dtype, mode="r", shape=shape[name]))
    settings = {**RUN, "delta": 1e-11, "epochs": 8 / count, "batch_size": 8, "dataset_size": count}
    fit(gated_model(), samples(300), **RUN)
    before = _resident()
    for stream in (False, True):
        assert fit(gated_model(), tuple(arrays), stream=stream, **settings).steps == 1  # type: ignore[arg-type]
    # Some twenty rows and labels, a megabyte of pages read ahead for each at most.
    assert _resident() - before < 100e6


def _resident() -> int:
    """Bytes of this process that are in memory, those of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_validation_data_streams_too() -> None:
    model = gated_model()
    data = Listed()
    accuracy, loss = evaluate(model, data, batch_size=64)
    assert sorted(data.asked) == [0, *range(300)], "the first one for its shape"
    expected = evaluate(model, samples(300))
    assert accuracy == expected[0]
    assert loss == pytest.approx(expected[1], rel=1e-6)
    result = fit(model, samples(300), validation=Listed(), **RUN)
    assert result.history[-1].accuracy is not None


@pytest.mark.parametrize("data", [[], {"inputs": torch.zeros(2)}, 5, [(torch.zeros(6), 0, 0)]])
def test_data_that_cannot_be_streamed_is_refused(data) -> None:
    with pytest.raises(ConfigurationError):
        StreamedBatches(data, **DRAWS)


def test_samples_that_do_not_fit_the_model_are_refused_before_calibration(monkeypatch) -> None:
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", None)
    data = Listed()
    data.inputs = data.inputs[:, :5]
    with pytest.raises(InputError, match="batch, 6"):
        fit(gated_model(), data, **RUN)
    assert data.asked == [0]


def test_samples_are_read_one_by_one_or_several_at_once() -> None:
    inputs, targets = samples(10)
    for data in (samples(10), Listed(10), Subset(TensorDataset(*samples(10)), range(10))):
        read = Samples(data).read([3, 1])
        assert torch.equal(read[0], inputs[[3, 1]])
        assert torch.equal(read[1], targets[[3, 1]])
        assert [len(part) for part, _ in Samples(data).parts(4)] == [4, 4, 2]
