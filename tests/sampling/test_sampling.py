from __future__ import annotations

import copy
import inspect
import math
import os
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyError,
    poisson_collate,
)
from clipless_dp.sampling import as_tensors, fingerprints, loaders
from clipless_dp.sampling import draws as draws_module
from tests.support import drawn_on_both_sides_of_a_fork, gated_model, samples


def draws(count, rate, steps, **options):
    return [np.asarray(d) for d in PoissonBatchSampler(count, sample_rate=rate, steps=steps, **options).draws()]


@pytest.mark.parametrize(("count", "rate"), [(200, 0.1), (50, 0.9), (1000, 0.003)])
def test_batch_sizes_are_binomial(count, rate):
    sizes = [len(d) for d in draws(count, rate, 4000)]
    edges = np.unique(stats.binom.ppf(np.linspace(0.02, 0.98, 12), count, rate)).astype(int)
    observed = np.histogram(sizes, [-1, *(edges + 0.5), count + 1])[0]
    expected = 4000 * np.diff([0.0, *stats.binom.cdf(edges, count, rate), 1.0])
    # Fails by chance once in 10⁶ runs.
    assert stats.chisquare(observed, expected).pvalue > 1e-6


def test_every_sample_is_drawn_equally_often_and_pairs_independently():
    count, rate, steps = 30, 0.3, 20_000
    hits = np.zeros((steps, count))
    for row, drawn in zip(hits, draws(count, rate, steps), strict=True):
        row[drawn] = 1.0
    deviation = math.sqrt(rate * (1 - rate) / steps)
    # Six standard deviations over 30 samples and 435 pairs: below 1e-6 by chance.
    assert np.abs(hits.mean(0) - rate).max() < 6 * deviation
    correlations = np.corrcoef(hits.T)[np.triu_indices(count, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(steps)


def test_no_sample_is_drawn_twice_in_one_batch():
    assert all(len(np.unique(d)) == len(d) for d in draws(50, 0.8, 200))


def test_a_rate_of_one_draws_everything():
    assert all(np.array_equal(d, np.arange(9)) for d in draws(9, 1.0, 3))


def test_seeded_draws_resume_at_any_step():
    whole = draws(100, 0.2, 10, seed=4)
    resumed = draws(100, 0.2, 10, seed=4, start=6)
    assert all(np.array_equal(a, b) for a, b in zip(whole[6:], resumed, strict=True))


def test_seeded_draws_differ_between_steps_and_seeds():
    first, second = draws(1000, 0.5, 2, seed=4)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, draws(1000, 0.5, 1, seed=5)[0])


def test_unseeded_draws_differ_whatever_is_seeded():
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    first = draws(1000, 0.5, 1)[0]
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    assert not np.array_equal(first, draws(1000, 0.5, 1)[0])


def test_batches_have_one_static_shape_and_lose_nothing():
    inputs = torch.arange(500.0).unsqueeze(1)
    batches = PoissonBatches((inputs, torch.arange(500)), sample_rate=0.1, steps=200)
    shapes = set()
    for values, targets, mask in batches:
        shapes.add(tuple(values.shape))
        drawn = values[mask, 0].long()
        assert torch.equal(drawn, targets[mask])
        assert len(torch.unique(drawn)) == len(drawn) == int(mask.sum())
    assert len(batches) == 200
    # A second shape needs a draw four deviations above the mean: expected 0.006 times in 200 draws.
    assert len(shapes) <= 2


def test_an_over_full_draw_takes_a_multiple_of_rows_and_is_never_truncated():
    data = (torch.arange(100.0).unsqueeze(1), torch.arange(100))
    for values, _, mask in PoissonBatches(data, sample_rate=1.0, steps=2, physical_batch_size=32):
        assert len(values) == 128
        assert torch.equal(values[mask, 0], torch.arange(100.0))


def test_pieces_of_a_batch_cover_it():
    data = (torch.arange(100.0).unsqueeze(1), torch.arange(100))
    (batch,) = PoissonBatches(data, sample_rate=1.0, steps=1, physical_batch_size=32)
    pieces = list(batch.split(32))
    assert [len(piece.inputs) for piece in pieces] == [32] * 4
    assert torch.equal(torch.cat([piece.inputs[piece.mask, 0] for piece in pieces]), torch.arange(100.0))


def test_empty_draws_are_yielded():
    batches = PoissonBatches(samples(5), sample_rate=1e-6, steps=20)
    assert [int(mask.sum()) for _, _, mask in batches] == [0] * 20


def test_padding_contributes_nothing_even_when_the_mask_is_forgotten():
    gradients = []
    for size in (8, 64):
        model = gated_model()
        (batch,) = PoissonBatches(samples(8), sample_rate=1.0, steps=1, physical_batch_size=size)
        model.loss(model(batch.inputs), batch.targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.net.parameters()]))
    # Sums over 8 and 64 rows round differently in float32.
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_data_loader_with_the_sampler_also_yields_empty_batches():
    dataset = TensorDataset(*samples(10))
    sampler = PoissonBatchSampler(len(dataset), sample_rate=0.1, steps=60)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=poisson_collate(dataset))
    model = gated_model()
    sizes = []
    for inputs, targets in loader:
        assert inputs.shape[1:] == (6,)
        model.loss(model(inputs), targets).backward()
        sizes.append(len(inputs))
    # An empty batch has probability 0.35: 60 draws without one, 1e-11.
    assert len(sizes) == len(loader) == 60
    assert 0 in sizes


def test_collate_handles_nested_samples():
    dataset = [{"image": torch.zeros(2), "pair": (1, torch.ones(3))}]
    empty = poisson_collate(dataset)([])  # type: ignore[arg-type]
    assert empty["image"].shape == (0, 2)
    assert [part.shape for part in empty["pair"]] == [(0,), (0, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.01}, "sample_rate"),
        ({"steps": -1}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"start": 9}, "start"),
        ({"dataset_size": 0}, "dataset_size"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    arguments = {"dataset_size": 10, "sample_rate": 0.5, "steps": 3, **changes}
    with pytest.raises(ConfigurationError, match=message):
        PoissonBatchSampler(arguments.pop("dataset_size"), **arguments)


@pytest.mark.parametrize("data", [(torch.zeros(0, 3), torch.zeros(0)), (torch.zeros(3, 3), torch.zeros(2)), [], 5])
def test_data_that_is_empty_or_does_not_match_is_refused(data):
    with pytest.raises(ConfigurationError):
        as_tensors(data)


def test_a_map_style_data_set_is_stacked():
    dataset = TensorDataset(*samples(4))
    inputs, targets = as_tensors([dataset[index] for index in range(4)])
    assert torch.equal(inputs, dataset.tensors[0])
    assert torch.equal(targets, dataset.tensors[1])


def test_integer_inputs_are_padded_with_zeros():
    data = (torch.ones(3, 2, dtype=torch.uint8), torch.ones(3, dtype=torch.int64))
    (batch,) = PoissonBatches(data, sample_rate=1.0, steps=1, physical_batch_size=4)
    assert batch.inputs[3].tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["sampler", "batches"])
def test_a_second_pass_of_a_seeded_sampler_is_refused_since_it_would_repeat_the_batches(kind):
    if kind == "sampler":
        batches = PoissonBatchSampler(10, sample_rate=0.5, steps=2, seed=1)
    else:
        batches = PoissonBatches(samples(10), sample_rate=0.5, steps=2, seed=1)
    assert len(list(batches)) == 2
    with pytest.raises(ConfigurationError, match="second pass"):
        list(batches)


def test_passes_of_an_unseeded_sampler_draw_anew():
    sampler = PoissonBatchSampler(1000, sample_rate=0.5, steps=1)
    assert list(sampler) != list(sampler)


def test_workers_that_fetch_ahead_keep_the_amplification():
    dataset = TensorDataset(*samples(40))
    sampler = PoissonBatchSampler(40, sample_rate=0.25, steps=5)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=poisson_collate(dataset),
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.25, dataset_size=40, accountant="rdp")
    for _ in range(2):
        for inputs, targets in loader:
            optimizer.zero_grad()
            model.loss(model(inputs), targets).backward()
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.25, 10)]


@pytest.mark.parametrize(
    "data",
    [
        [(torch.zeros(2), 0, 0)],
        [(torch.zeros(2), 0), (torch.zeros(3), 0)],
        [(torch.zeros(2), "cat")],
        {"inputs": torch.zeros(2), "targets": torch.zeros(2)},
    ],
    ids=["triples", "ragged", "strings", "dict"],
)
def test_samples_that_are_not_pairs_of_one_shape_are_refused_in_words(data):
    with pytest.raises(ConfigurationError, match="pairs"):
        as_tensors(data)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_within_a_samplers_loop_leaves_two_processes_that_draw_other_batches():
    """The announcing iterator and the batches of tensors draw from the same generator."""
    theirs, ours = drawn_on_both_sides_of_a_fork(
        "batches = iter(PoissonBatchSampler(1000, sample_rate=0.1, steps=3))\n"
        "rows = iter(PoissonBatches((torch.arange(1000)[:, None], torch.zeros(1000)), sample_rate=0.1, steps=3))\n"
        "def draw():\n"
        "    whole = next(rows)\n"
        "    parts = np.array(next(batches)[:40]), whole.inputs[whole.mask][:40, 0].numpy()\n"
        "    return b''.join(part.astype(np.int64).tobytes() for part in parts)\n"
    )
    # 40 of some 100 numbers of each: never fewer by chance.
    assert len(theirs) == len(ours) == 2 * 40 * 8
    assert theirs[:320] != ours[:320]
    assert theirs[320:] != ours[320:]


RATE, COUNT = 0.25, 64
Pair = namedtuple("Pair", "inputs targets")


class Rows(Dataset):
    """Samples that are made when they are asked for."""

    def __init__(self, form="tuple"):
        self.rows = samples(COUNT)
        self.form = form

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        row, target = (part[index].clone() for part in self.rows)
        if self.form == "tensor":
            return row
        return {"tuple": (row, target), "named": Pair(row, target), "mapping": {"in": row, "out": target}}[self.form]


class Between:
    """A sampler around another, which changes each of its lists."""

    def __init__(self, change, steps=3):
        self.change, self.sampler = change, PoissonBatchSampler(COUNT, sample_rate=RATE, steps=steps)

    def __iter__(self):
        return map(self.change, self.sampler)

    def __len__(self):
        return len(self.sampler)


class Around:
    """A ``collate_fn`` around another, which changes what goes in or comes out."""

    def __init__(self, collate, before=None, after=None):
        self.collate, self.before, self.after = collate, before, after

    def __call__(self, rows):
        batch = self.collate(rows if self.before is None else self.before(rows))
        return batch if self.after is None else self.after(batch)


def charged(batches, steps_of=lambda batch: batch):
    """The ledger of one step for each batch."""
    draws_module.skip()
    model = gated_model()
    optimizer = CliplessDPSGD(
        model, lr=0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=COUNT, accountant="rdp"
    )
    for batch in batches:
        inputs, targets = steps_of(batch)
        optimizer.zero_grad()
        model.loss(model(inputs), targets).backward()
        optimizer.step()
    return optimizer.accountant.history


def loader(sampler, workers, *, form="tuple", before=None, after=None, **options):
    rows = Rows(form)
    collate = Around(poisson_collate(rows), before, after)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers, **options)


def dropped(indices):
    del indices[-2:]
    return indices


def exchanged(indices):
    indices[-1] = next(index for index in range(COUNT) if index not in indices)
    return indices


def exchanged_in_a_copy(indices):
    return exchanged(list(indices))


def doubled(indices):
    indices += indices
    return indices


def tripled_in_a_copy(indices):
    return list(indices) * 3


def shuffled(indices):
    random.shuffle(indices)
    return indices


@pytest.mark.parametrize(
    ("change", "workers", "message"),
    [
        (dropped, 0, "not those of the draw"),
        (exchanged, 0, "not those of the draw"),
        (exchanged_in_a_copy, 0, "not those of the draw"),
        (doubled, 0, "more than once"),
        (tripled_in_a_copy, 0, "more than once"),
        (dropped, 1, "not those of the draw"),
        (exchanged, 1, "not those of the draw"),
        (doubled, 1, "more than once"),
    ],
)
def test_indices_that_are_changed_between_sampler_and_loader_are_refused(change, workers, message):
    with pytest.raises(PrivacyError, match=message):
        charged(loader(Between(change), workers))


@pytest.mark.slow
def test_a_draw_whose_indices_a_copy_exchanges_amplifies_no_step_behind_a_worker():
    with pytest.warns(UserWarning, match="Poisson"):
        assert charged(loader(Between(exchanged_in_a_copy), 1)) == [(0.5, 1.0, 3)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", [shuffled, sorted, list, copy.copy, copy.deepcopy])
def test_indices_that_are_copied_or_reordered_are_the_draw(change, workers):
    assert charged(loader(Between(change), workers)) == [(1.0, RATE, 3)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_list_of_draws_is_the_draws_in_one_epoch_and_none_in_the_next(workers):
    listed = list(PoissonBatchSampler(COUNT, sample_rate=RATE, steps=4))
    assert charged(loader(listed, workers)) == [(1.0, RATE, 4)]
    with pytest.warns(UserWarning, match="Poisson"):
        assert charged(loader(listed, workers)) == [(0.5, 1.0, 4)]


def test_a_list_of_draws_leaves_none_to_a_shuffled_loader():
    list(PoissonBatchSampler(COUNT, sample_rate=RATE, steps=4))
    rows = Rows()
    shuffling = DataLoader(rows, batch_size=32, shuffle=True, collate_fn=poisson_collate(rows))
    with pytest.warns(UserWarning, match="Poisson"):
        assert charged(shuffling) == [(0.5, 1.0, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_for_evaluation_beside_it_takes_no_draw_away(workers):
    rows = Rows()
    beside = DataLoader(rows, batch_size=32, collate_fn=poisson_collate(rows))

    def evaluated(batches):
        for batch in batches:
            yield batch
            with torch.no_grad():
                list(beside)

    assert charged(evaluated(loader(PoissonBatchSampler(COUNT, sample_rate=RATE, steps=6), workers))) == [
        (1.0, RATE, 6)
    ]


def test_a_draw_that_is_collated_by_hand_keeps_the_amplification():
    rows = Rows()
    collate = poisson_collate(rows)
    sampler = PoissonBatchSampler(COUNT, sample_rate=RATE, steps=3)
    assert charged(collate([rows[index] for index in indices]) for indices in sampler) == [(1.0, RATE, 3)]


def resampled(rows):
    return [rows[0], *rows[:-1]] if rows else rows


def centred(batch):
    batch[0] = batch[0] - batch[0].mean(0)
    return batch


def centred_in_place(batch):
    batch[0].sub_(batch[0].mean(0))
    return batch


def first_row_repeated(batch):
    batch[0].data[1:] = batch[0].data[:1]
    return batch


def copies(batch):
    return [batch[0] * 1.0, batch[1].clone()]


def one_copy(batch):
    return batch[0].clone(), batch[1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "change",
    [{"before": resampled}, {"after": centred}, {"after": centred_in_place}, {"after": first_row_repeated}],
    ids=lambda change: next(iter(change.values())).__name__,
)
def test_batches_that_are_changed_around_the_collate_function_are_refused(change, workers):
    with pytest.raises(PrivacyError, match="not those of the draw"):
        charged(loader(PoissonBatchSampler(COUNT, sample_rate=RATE, steps=3), workers, **change))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("after", [tuple, one_copy])
def test_batches_that_are_packed_anew_or_copied_in_part_are_the_draw(after, workers):
    assert charged(loader(PoissonBatchSampler(COUNT, sample_rate=RATE, steps=3), workers, after=after)) == [
        (1.0, RATE, 3)
    ]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("form", ["tensor", "named", "mapping"])
def test_samples_of_any_form_keep_the_amplification(form, workers):
    def parts(batch):
        if form == "mapping":
            return batch["in"], batch["out"]
        return (batch, torch.zeros(len(batch), dtype=torch.int64)) if form == "tensor" else (batch.inputs, batch[1])

    sampler = PoissonBatchSampler(COUNT, sample_rate=RATE, steps=3)
    assert charged(loader(sampler, workers, form=form), parts) == [(1.0, RATE, 3)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_is_asked_for_a_whole_draw_keeps_the_amplification(workers):
    rows = TensorDataset(*samples(COUNT))
    sampler = PoissonBatchSampler(COUNT, sample_rate=RATE, steps=3)
    whole = DataLoader(rows, batch_size=None, sampler=sampler, collate_fn=poisson_collate(rows), num_workers=workers)
    assert charged(whole) == [(1.0, RATE, 3)]


@pytest.mark.parametrize(
    ("name", "there", "instead", "script"),
    [
        ("arrived", "drawn.key == key and ", "", lambda: loader(Between(exchanged), 0)),
        ("_unpacked", "whole and drawn.key == key", "whole", lambda: loader(Between(exchanged), 1)),
        ("arrived", " and fetch.made_of(samples)", "", lambda: loader(Between(list), 0, before=resampled)),
    ],
    ids=["other indices", "other indices in a worker", "other samples"],
)
def test_a_weakened_look_at_what_was_fetched_is_caught(monkeypatch, name, there, instead, script):
    source = inspect.getsource(getattr(loaders, name))
    assert source.count(there) == 1
    weakened = {}
    exec(source.replace(there, instead), loaders.__dict__, weakened)
    monkeypatch.setattr(loaders, name, weakened[name])
    assert charged(script()) == [(1.0, RATE, 3)]


def test_a_fingerprint_that_is_compared_with_another_is_what_it_is_alone():
    torch.manual_seed(0)
    dense = torch.randn(64, 200)
    sparse, repeated = dense * (torch.rand(64, 200) < 0.05), dense.round()
    for values in (dense, sparse, repeated):
        alone = fingerprints.fingerprint(values)
        for other in (dense, dense + 1.0, sparse, repeated, torch.zeros(64, 200)):
            assert fingerprints.fingerprint(values, fingerprints.fingerprint(other)) == alone
    assert len({fingerprints.fingerprint(values) for values in (dense, sparse, repeated)}) == 3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_entries_of_short_floats_are_looked_at(dtype):
    values = torch.ones(64).to(dtype)
    before = fingerprints.sample(values)
    values.view(torch.int8)[0] += 1
    assert fingerprints.sample(values) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "laid",
    [
        lambda values: values,
        lambda values: values.mT,
        lambda values: values[1:],
        lambda values: values[:, ::2],
        lambda values: values[:1].expand(6, -1),
        lambda values: values.flatten()[5],
    ],
    ids=["whole", "transposed", "rows", "gaps", "repeated", "a number"],
)
def test_the_entries_that_are_looked_at_do_not_depend_on_the_way_to_them(laid, dtype):
    values = laid(torch.arange(60).view(6, 10).to(dtype))
    at_once, slowly = fingerprints._array_of(values), fingerprints._as_array(fingerprints._in_memory(values))
    assert at_once.dtype == slowly.dtype
    assert np.array_equal(at_once, slowly)


def test_numbers_whose_sign_is_changed_lazily_are_looked_at():
    values = torch.randn(64, 2)
    lazy = torch.view_as_complex(values).conj().imag
    assert lazy.is_neg()
    before = fingerprints.sample(lazy)
    assert fingerprints.sample(lazy) == before
    values[:, 1] += 1
    assert fingerprints.sample(lazy) != before
