"""Noise drawn ahead: each number in one step only, of the scale of that step, in no copy, file or other process."""

from __future__ import annotations

import copy
import math
import os
import pickle
import threading

import pytest
import torch
from torch import nn

from clipless_dp import CliplessDPSGD, DPLipModel, ReproducibleNoise, SecureNoise, SystemNoise, gated, losses
from clipless_dp.noise import add_normal_, ahead, draw_ahead

COUNT = 1 << 17


@pytest.fixture(autouse=True)
def _a_core_is_left(monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: torch.get_num_threads() + 1)


def begun(count=COUNT, dtype=torch.float32):
    source = SystemNoise()
    source.ahead.begin(source.standard_normal_, count, dtype)
    assert source.ahead._drawn
    return source


def wide_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 3))
    return DPLipModel(gated(net), input_shape=(256,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


def sgd(model, **changes):
    settings = {"lr": 1.0, "noise_multiplier": 1.3, "sample_rate": 0.25, "dataset_size": 40, "sampling": "poisson"}
    return CliplessDPSGD(model, **{**settings, **changes})


def noise_of_a_step(model, optimizer):
    """What a step on zero gradients adds to the sums."""
    optimizer.zero_grad()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.net.parameters()]) * optimizer.expected_batch_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_drawn_ahead_are_standard_normal_and_handed_out_once(dtype):
    source = begun(dtype=dtype)
    drawn = source.ahead.take(COUNT, dtype)
    assert drawn.dtype == dtype
    assert abs(float(drawn.mean())) < 5.0 / math.sqrt(COUNT)
    assert abs(float(drawn.double().std()) - 1.0) < 5.0 / math.sqrt(2 * COUNT)
    # Fourth moment 3, of variance 96; blocks are not repetitions of one another.
    assert abs(float(drawn.double().pow(4).mean()) - 3.0) < 5.0 * math.sqrt(96.0 / COUNT)
    assert len(drawn.unique()) > 0.99 * COUNT
    assert source.ahead.take(COUNT, dtype) is None
    source.ahead.begin(source.standard_normal_, COUNT, dtype)
    again = source.ahead.take(COUNT, dtype)
    assert abs(float((drawn.double() * again.double()).mean())) < 5.0 / math.sqrt(COUNT)
    assert not torch.equal(drawn, again)


def test_of_threads_that_take_at_once_one_gets_the_numbers():
    for _ in range(20):
        source, found = begun(ahead._FEWEST), []
        barrier = threading.Barrier(4)

        def take(source=source, found=found, barrier=barrier):
            barrier.wait()
            found.append(source.ahead.take(ahead._FEWEST, torch.float32))

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(one is not None for one in found) == 1


def test_what_was_drawn_ahead_enters_the_sums_with_the_deviation_of_the_step_that_takes_it():
    """Between drawing and taking the deviations and the factor change."""
    source = begun()
    expected = source.ahead._drawn[COUNT, torch.float32]
    expected.thread.join()
    numbers = expected.numbers.clone()
    tensors = [torch.zeros(300, 400), torch.zeros(COUNT - 300 * 400 - 7), torch.zeros(7)]
    deviations = [2.0, 0.5, 3.0]
    add_normal_(tensors, deviations, source, 0.25)
    found = torch.cat([t.flatten() / (0.25 * d) for t, d in zip(tensors, deviations, strict=True)])
    # Small tensors are gathered behind large ones: each number once, in whichever place.
    torch.testing.assert_close(found.sort().values, numbers.sort().values)
    torch.testing.assert_close(found[: 300 * 400], numbers[: 300 * 400])
    add_normal_(again := [torch.zeros_like(t) for t in tensors], deviations, source, 0.25)
    assert not any(torch.equal(a, b) for a, b in zip(again, tensors, strict=True))


def test_an_interruption_behind_the_taking_loses_the_numbers():
    source = begun()
    first = source.ahead._drawn[COUNT, torch.float32]
    first.thread.join()

    class Interrupted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.add_:
                raise KeyboardInterrupt
            return super().__torch_function__(func, types, args, kwargs or {})

    with pytest.raises(KeyboardInterrupt):
        add_normal_([torch.zeros(COUNT).as_subclass(Interrupted)], [1.0], source)
    assert source.ahead.take(COUNT, torch.float32) is None
    add_normal_([later := torch.zeros(COUNT)], [1.0], source)
    assert not torch.equal(later, first.numbers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_takes_nothing_of_its_parents_and_draws_other_noise():
    source = begun()
    source.ahead._drawn[COUNT, torch.float32].thread.join()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            taken = source.ahead.take(COUNT, torch.float32)
            own = torch.zeros(4)
            source.standard_normal_(own)
            os.write(write, pickle.dumps((taken is None, own.tolist())))
        finally:
            os._exit(0)
    os.close(write)
    nothing, theirs = pickle.loads(os.read(read, 4096))
    os.waitpid(child, 0)
    ours = source.ahead.take(COUNT, torch.float32)
    assert nothing
    assert ours is not None
    assert theirs != ours[:4].tolist()
    assert not torch.isin(torch.tensor(theirs), ours).all()


def test_copies_and_pickles_hold_none_of_it():
    source = begun()
    for twin in (copy.copy(source), copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert not twin.ahead._drawn
        assert twin.ahead.take(COUNT, torch.float32) is None
    assert len(pickle.dumps(source)) < 1000


def test_only_the_systems_noise_is_drawn_ahead_and_only_where_a_core_is_left(monkeypatch):
    asked = []

    class Own(SystemNoise):
        def standard_normal_(self, out):
            asked.append(len(out))
            return super().standard_normal_(out)

    tensors = [torch.zeros(COUNT)]
    for source in (Own(), ReproducibleNoise(3), SecureNoise()):
        draw_ahead(tensors, source)
        assert not asked
        assert not getattr(source, "ahead", ahead.Ahead())._drawn
    source = SystemNoise()
    for few in (torch.zeros(ahead._FEWEST - 1), torch.zeros(ahead._MOST + 1)):
        draw_ahead([few], source)
    monkeypatch.setattr(ahead, "cores", torch.get_num_threads)
    draw_ahead(tensors, source)
    assert not source.ahead._drawn


def test_a_generator_that_fails_ahead_fails_where_its_numbers_are_needed():
    source = SystemNoise()

    def failing(out):
        raise OSError("no entropy")

    source.ahead.begin(failing, COUNT, torch.float32)
    assert source.ahead.take(COUNT, torch.float32) is None
    add_normal_([sums := torch.zeros(COUNT)], [1.0], source)
    assert abs(float(sums.std()) - 1.0) < 0.02


def test_steps_take_other_noise_each_of_their_own_noise_multiplier():
    model = wide_model()
    optimizer = sgd(model)
    noises = []
    for sigma in (1.3, 1.3, 5.0, 0.7):
        optimizer.noise_multiplier = sigma
        noises.append((sigma, noise_of_a_step(model, optimizer)))
        assert optimizer.noise.ahead._drawn, "the next step's numbers are being drawn"
    count = len(noises[0][1])
    unit = float(noises[0][1].std()) / 1.3
    for sigma, noise in noises:
        assert abs(float(noise.std()) / (sigma * unit) - 1.0) < 10.0 / math.sqrt(2 * count)
        assert not abs(float(noise.std()) / (1.1 * sigma * unit) - 1.0) < 10.0 / math.sqrt(2 * count)
    for place, (first, noise) in enumerate(noises):
        for second, other in noises[place + 1 :]:
            product = float((noise * other).mean()) / (first * second * unit**2)
            assert abs(product) < 5.0 / math.sqrt(count)


def test_a_skipped_draw_and_a_saved_state_use_up_and_hold_no_noise():
    model = wide_model()
    optimizer = sgd(model)
    noise_of_a_step(model, optimizer)
    (waiting,) = optimizer.noise.ahead._drawn.values()
    waiting.thread.join()
    numbers = waiting.numbers.clone()
    optimizer.skip_draw()

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for part in value.values():
                yield from tensors(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from tensors(part)

    assert all(tensor.numel() != len(numbers) for tensor in tensors(optimizer.state_dict()))
    next_noise = noise_of_a_step(model, optimizer)
    deviation = float(next_noise.std())
    torch.testing.assert_close((next_noise / deviation).sort().values, numbers.sort().values, rtol=0.02, atol=0.02)


def test_a_reproducible_run_is_the_same_whether_a_core_is_left_or_not(monkeypatch):
    found = []
    for spare in (0, 1):
        monkeypatch.setattr(ahead, "cores", lambda spare=spare: torch.get_num_threads() + spare)
        model = wide_model()
        optimizer = sgd(model, noise=ReproducibleNoise(3))
        for _ in range(2):
            noise_of_a_step(model, optimizer)
        found.append(torch.cat([p.detach().flatten() for p in model.net.parameters()]))
    assert torch.equal(*found)
