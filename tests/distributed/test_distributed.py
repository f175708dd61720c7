from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import nn
from torch.utils.data import Dataset

from accounting import RDPAccountant
from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyError,
    PrivacyWarning,
    RankError,
    ReproducibleNoise,
    SystemNoise,
    constraints,
    distributed,
    fit,
    layers,
    losses,
)
from clipless_dp.distributed import World, placement, replicated
from clipless_dp.sampling import draws, persons
from clipless_dp.statistics import private_moments
from tests.ranks import (
    SETTINGS,
    Failure,
    Ranks,
    has_the_planned_noise,
    noise_of_steps,
    refusal_to_build,
    same_weights,
    sgd,
    square_model,
    torchrun,
    weights,
)
from tests.support import before_steps, gated_model, samples

RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}


def orthogonal_model(seed: int = 0) -> DPLipModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), layers.GroupSort(2), nn.Linear(8, 3))
    return DPLipModel(
        net, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(4.0), constraint=constraints.Orthogonal()
    )


# What runs on the ranks. Seeds are fixed, so that one process can do the same.


def trained(steps: int = 4, mutant: str = "", through_ddp: bool = False):
    apply_mutant(mutant)
    rank = distributed.world().rank
    # A seed for each rank: the weights must become those of rank 0.
    model = orthogonal_model(seed=rank)
    optimizer = sgd(model, noise=ReproducibleNoise(7))
    forward = nn.parallel.DistributedDataParallel(model) if through_ddp else model
    for inputs, targets, mask in PoissonBatches(samples(90), sample_rate=0.25, steps=steps, seed=5):
        optimizer.zero_grad()
        model.loss(forward(inputs), targets, mask).backward()
        optimizer.step()
    return weights(model), optimizer.get_epsilon(1e-3), optimizer.accountant.history


class Noting(Dataset):  # type: ignore[type-arg]
    """Samples one by one, noting which were asked for."""

    def __init__(self) -> None:
        self.inputs, self.targets = samples(300)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.asked.append(index)
        return self.inputs[index], int(self.targets[index])


def read_and_fitted(**options: object):
    model, data = gated_model(), Noting()
    result = fit(model, data, reproducible_seed=1, **{**RUN, **options})
    return weights(model), result.optimizer.accountant.history, set(data.asked[1:]), result.micro_batch_size


def fitted_in_pieces():
    return read_and_fitted(batch_size=90, stream=False, memory_budget=8_000)


def measured_deviation(rounds: int = 12, mutant: str = "", noise: str = "system"):
    """Standard deviation of the noise of steps without gradients, relative to the planned one, on this rank."""
    apply_mutant(mutant)
    model = square_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **{**SETTINGS, "sampling": "poisson", "noise": noise})
    return float(noise_of_steps(model, optimizer, rounds).std())


def noise_once_per_rank(sums, add_noise_):
    add_noise_(sums)
    for part in sums:
        dist.all_reduce(part)


def mean_in_place_of_the_sum(sums, add_noise_):
    for part in sums:
        dist.all_reduce(part)
        part.div_(dist.get_world_size())
    if dist.get_rank() == 0:
        add_noise_(sums)
    distributed.copy_from_(sums)


def averaged_with_the_noise(sums, add_noise_):
    mean_in_place_of_the_sum(sums, lambda parts: add_noise_(parts))
    for part in sums:
        part.div_(dist.get_world_size())


def forgotten_reduction(sums, add_noise_):
    if dist.get_rank() == 0:
        add_noise_(sums)
    distributed.copy_from_(sums)


def noise_shared_among_ranks_and_one_forgotten(sums, add_noise_):
    exact = [part.clone() for part in sums]
    add_noise_(sums)
    for part, was in zip(sums, exact, strict=True):
        noise = (part - was) / math.sqrt(dist.get_world_size())
        dist.broadcast(noise, src=0)
        dist.all_reduce(was)
        part.copy_(was + noise)


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        noise_once_per_rank,
        mean_in_place_of_the_sum,
        averaged_with_the_noise,
        forgotten_reduction,
        noise_shared_among_ranks_and_one_forgotten,
    )
}
release_ = replicated.release_


def apply_mutant(name: str) -> None:
    replicated.release_ = MUTANTS.get(name, release_)


def as_one_process(steps: int = 4):
    assert distributed.world() == World(0, 1)
    return trained(steps)


def test_two_ranks_train_as_one_process_on_the_union_of_their_batches(ranks):
    alone, epsilon, history = as_one_process()
    (first, *spent), (second, *also_spent) = ranks.run(trained)
    assert torch.equal(first, second)
    assert spent == also_spent == [epsilon, history]
    assert same_weights(first, alone)


@pytest.mark.parametrize(
    "mutant", ["noise_once_per_rank", "mean_in_place_of_the_sum", "averaged_with_the_noise", "forgotten_reduction"]
)
def test_a_wrong_sum_or_noise_would_show_in_the_weights(ranks, mutant):
    alone, _, _ = as_one_process()
    assert not any(same_weights(result[0], alone) for result in ranks.run(trained, 4, mutant))


@pytest.mark.parametrize("noise", ["system", "secure"])
def test_noise_of_the_planned_variance_enters_once(ranks, noise):
    if noise == "secure":
        pytest.importorskip("cryptography")
    first, second = ranks.run(measured_deviation, 12, "", noise)
    assert has_the_planned_noise(first)
    # The weights are the same bits, and so are their changes.
    assert first == second


@pytest.mark.parametrize(
    ("mutant", "ratio"),
    [
        ("noise_once_per_rank", math.sqrt(2.0)),
        ("averaged_with_the_noise", 0.5),
        ("noise_shared_among_ranks_and_one_forgotten", math.sqrt(0.5)),
    ],
)
def test_noise_of_another_variance_would_show(ranks, mutant, ratio):
    for measured in ranks.run(measured_deviation, 12, mutant):
        assert not has_the_planned_noise(measured)
        assert measured == pytest.approx(ratio, rel=0.02)


def test_without_a_seed_the_ranks_share_one_noise_and_runs_do_not(ranks):
    (first, second), (again, _) = ranks.run(unseeded_noise), ranks.run(unseeded_noise)
    assert torch.equal(first, second)
    assert not torch.equal(first, again)


def unseeded_noise():
    apply_mutant("")
    torch.manual_seed(0)
    model = gated_model()
    before = weights(model)
    sgd(model, sampling="poisson").step()
    return weights(model) - before


def test_a_rank_without_samples_or_gradients_steps_like_the_others(ranks):
    first, second = ranks.run(lopsided)
    assert torch.equal(first, second)
    model = gated_model()
    optimizer = sgd(model, noise=ReproducibleNoise(1), sampling="poisson")
    inputs, targets = samples(8)
    model.loss(model(inputs), targets).backward()
    optimizer.step()
    # One step on the same sums, in another order of float32 operations at most.
    torch.testing.assert_close(first, weights(model), atol=1e-6, rtol=0)


def lopsided():
    apply_mutant("")
    model = gated_model()
    optimizer = sgd(model, noise=ReproducibleNoise(1), sampling="poisson")
    if distributed.world().rank == 1:
        inputs, targets = samples(8)
        model.loss(model(inputs), targets).backward()
    optimizer.step()
    return weights(model)


def test_a_forward_pass_through_ddp_is_refused(ranks):
    for failure in ranks.run(trained, 4, "", True):
        assert failure.kind == "PrivacyError"
        assert "call the wrapped model itself" in failure.message


# Ranks that differ.


@pytest.mark.parametrize(
    "argument", ["noise_multiplier", "sample_rate", "dataset_size", "allocation", "sampling", "noise"]
)
def test_ranks_with_different_arguments_are_refused_by_name(ranks, argument):
    for failure in ranks.run(built_differently, argument):
        assert failure.kind == "RankError"
        assert argument in failure.message


def built_differently(argument):
    changed = {
        "noise_multiplier": 1.1,
        "sample_rate": 0.2,
        "dataset_size": 91,
        "allocation": "per-layer",
        "sampling": "none",
        "noise": ReproducibleNoise(0),
    }
    sgd(gated_model(), **({argument: changed[argument]} if distributed.world().rank == 1 else {}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("weights", "weights"),
        ("noise", "bounds or noise"),
        ("allocation", "bounds or noise"),
        ("ledger", "ledger"),
        ("steps", "steps taken"),
    ],
)
def test_ranks_that_drift_apart_stop_before_an_update(ranks, change, named):
    for failure, unchanged, counted, retried, held in ranks.run(drifted, change):
        assert named in failure
        assert unchanged
        assert counted == 2
        assert "start all ranks again" in retried
        assert not held


def drifted(change):
    apply_mutant("")
    model = gated_model()
    optimizer = sgd(model, sampling="poisson")
    optimizer.step()
    if distributed.world().rank == 1:
        if change == "weights":
            # Beneath autograd's version counter.
            model.net.get_parameter(next(iter(dict(model.net.named_parameters())))).data.view(-1)[3] += 1e-6
        elif change == "noise":
            optimizer.noise_multiplier = 1.2
        elif change == "allocation":
            optimizer.allocation = "per-layer"
        elif change == "ledger":
            optimizer.sampling = "none"
        else:
            optimizer.steps_taken = 7
    inputs, targets = samples(8)
    model.loss(model(inputs), targets).backward()
    before = weights(model)
    failure = refusal(optimizer)
    unchanged = torch.equal(before, weights(model))
    held = any(parameter.grad is not None for parameter in model.net.parameters())
    counted = sum(count for *_, count in optimizer.accountant.history)
    return failure, unchanged, counted, refusal(optimizer), held


def refusal(optimizer: CliplessDPSGD) -> str:
    try:
        optimizer.step()
    except RankError as error:
        return str(error)
    return "no error"


def test_batches_that_no_sampler_announced_are_refused(ranks):
    for failure in ranks.run(unannounced, 0.25) + ranks.run(unannounced, 1.0):
        assert failure.kind == "PrivacyError"
        assert "several ranks" in failure.message


def unannounced(rate):
    apply_mutant("")
    draws.skip()
    model = gated_model()
    optimizer = sgd(model, sample_rate=rate)
    inputs, targets = samples(8)
    model.loss(model(inputs), targets).backward()
    optimizer.step()


def test_what_fails_on_rank_0_stops_the_others(ranks):
    first, second = ranks.run(failing_first)
    assert first.kind == "ZeroDivisionError"
    assert (second.kind, "rank 0 failed" in second.message) == ("RankError", True)
    for made in ranks.run(made_by_first):
        assert made["rank"] == 0
        assert torch.equal(made["values"], torch.arange(3))


def failing_first():
    return distributed.from_first(lambda: 1 // 0)


def made_by_first():
    return distributed.from_first(lambda: {"rank": distributed.world().rank, "values": torch.arange(3)})


def test_wrappers_that_average_are_refused_with_the_remedy(ranks):
    for averaged in ranks.run(wrapped):
        assert "DistributedDataParallel: pass the module inside" in averaged


def wrapped():
    model = nn.parallel.DistributedDataParallel(gated_model())
    return refusal_to_build(lambda: sgd(model))  # type: ignore[arg-type]


def test_statistics_that_each_rank_would_release_are_refused_and_read_from_one_file(ranks, tmp_path):
    for failure in ranks.run(statistics_of, None):
        assert (failure.kind, "file=" in failure.message) == ("ConfigurationError", True)
    mean = statistics_of(tmp_path / "moments")[0]
    for read, releases in ranks.run(statistics_of, tmp_path / "moments"):
        assert torch.equal(read, mean)
        assert releases == 1


def statistics_of(path: Path | None):
    accountant = RDPAccountant()
    moments = private_moments(samples(90)[0], norm=3.0, noise_multiplier=5.0, accountant=accountant, file=path)
    return moments.mean, len(accountant)


# A rank that dies.


def test_when_a_rank_dies_no_rank_applies_an_update_and_the_ledger_has_counted_it():
    with Ranks() as both:
        result, lost = both.run(killed, 1)
    assert lost == Failure("EOFError", "the process ended")
    assert_nothing_released(result)


def test_when_rank_0_dies_between_the_sum_and_the_noise_nobody_has_the_sum():
    with Ranks() as both:
        lost, result = both.run(killed, 0)
    assert lost == Failure("EOFError", "the process ended")
    assert_nothing_released(result)


def assert_nothing_released(result):
    failure, unchanged, counted, held = result
    assert "did not arrive" in failure
    assert unchanged
    assert counted == 2
    assert not held


class Deadly(SystemNoise):
    """Ends the process where noise is drawn in the second step."""

    step = 0

    def begin_step(self, step):
        self.step = step

    def standard_normal_(self, out):
        return os._exit(1) if self.step == 1 else super().standard_normal_(out)


def killed(rank):
    model = gated_model()
    optimizer = sgd(model, sampling="poisson", noise=Deadly() if rank == 0 else SystemNoise())
    optimizer.step()
    inputs, targets = samples(8)
    model.loss(model(inputs), targets).backward()
    before = weights(model)
    if distributed.world().rank == rank == 1:
        os._exit(1)
    failure = refusal(optimizer)
    held = any(parameter.grad is not None for parameter in model.net.parameters())
    counted = sum(count for *_, count in optimizer.accountant.history)
    return failure, torch.equal(before, weights(model)), counted, held


# Sampling. No processes needed: each rank's sampler is made as it would be there.


def drawn(monkeypatch, size: int, count: int, rate: float, steps: int, seed: int | None = None) -> np.ndarray:
    """How often each rank drew each sample at each step: ``(ranks, steps, samples)``."""
    hits = np.zeros((size, steps, count), dtype=np.int64)
    for rank in range(size):
        monkeypatch.setattr(placement, "world", lambda rank=rank: World(rank, size))
        sampler = PoissonBatchSampler(count, sample_rate=rate, steps=steps, seed=seed)
        for step, indices in enumerate(sampler.draws()):
            np.add.at(hits[rank, step], indices, 1)
    return hits


def is_poisson_sample(hits: np.ndarray, rate: float) -> bool:
    union = hits.sum(0)
    steps, count = union.shape
    sizes = union.sum(1)
    edges = np.unique(stats.binom.ppf(np.linspace(0.02, 0.98, 12), count, rate)).astype(int)
    observed = np.histogram(sizes, [-1, *(edges + 0.5), 2 * count + 1])[0]
    expected = steps * np.diff([0.0, *stats.binom.cdf(edges, count, rate), 1.0])
    # Each fails by chance once in 10⁶ runs: six standard deviations over samples and pairs.
    frequencies = np.abs(union.mean(0) - rate).max() < 6 * math.sqrt(rate * (1 - rate) / steps)
    correlations = np.corrcoef(union.T)[np.triu_indices(count, 1)]
    return bool(
        union.max() == 1
        and stats.chisquare(observed, expected).pvalue > 1e-6
        and frequencies
        and np.abs(correlations).max() < 6 / math.sqrt(steps)
    )


@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_together_draw_a_poisson_sample(monkeypatch, size, seed):
    assert is_poisson_sample(drawn(monkeypatch, size, 20, 0.3, 2500, seed), 0.3)


def test_other_ways_to_draw_would_show(monkeypatch):
    shards = drawn(monkeypatch, 2, 20, 0.3, 2500)
    # The rate divided by the number of ranks, as for a batch size that is split.
    assert not is_poisson_sample(drawn(monkeypatch, 2, 20, 0.15, 2500), 0.3)
    # Every rank draws from the whole data set.
    whole = np.stack([drawn(monkeypatch, 1, 20, 0.3, 2500)[0] for _ in range(2)])
    assert not is_poisson_sample(whole, 0.3)
    # All ranks draw with one seed: the second rank's samples follow the first one's.
    twins = shards.copy()
    twins[1] = np.roll(shards[0], 1, axis=1)
    assert not is_poisson_sample(twins, 0.3)


def test_seeded_draws_are_the_same_for_any_number_of_ranks(monkeypatch):
    unions = [drawn(monkeypatch, size, 31, 0.4, 6, seed=3).sum(0) for size in (1, 2, 5)]
    assert all(np.array_equal(unions[0], union) for union in unions)


def test_each_rank_holds_its_own_part_of_the_data_only(monkeypatch):
    monkeypatch.setattr(placement, "world", lambda: World(1, 3))
    monkeypatch.setattr(persons, "require_alike", lambda *data: None)
    batches = PoissonBatches((torch.arange(20.0).unsqueeze(1), torch.arange(20)), sample_rate=0.5, steps=40)
    seen = set()
    for inputs, targets, mask in batches:
        assert torch.equal(inputs[mask, 0].long(), targets[mask])
        seen |= set(targets[mask].tolist())
    assert seen == set(range(1, 20, 3))
    assert len(batches._inputs) == 7


def test_more_ranks_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(placement, "world", lambda: World(0, 8))
    with pytest.raises(ConfigurationError, match="8 processes for 7 samples"):
        PoissonBatchSampler(7, sample_rate=0.5, steps=1)


def test_a_process_group_that_starts_too_late_is_noticed(monkeypatch):
    sampler = PoissonBatchSampler(20, sample_rate=0.5, steps=1)
    optimizer = sgd(gated_model(), sampling="poisson")
    monkeypatch.setattr(placement, "world", lambda: World(0, 2))
    with pytest.raises(ConfigurationError, match="process group"):
        next(sampler.draws())
    with pytest.raises(PrivacyError, match="process group"):
        optimizer.step()


def test_torchrun_without_a_process_group_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="init_process_group"):
        PoissonBatchSampler(20, sample_rate=0.5, steps=1)
    with pytest.raises(ConfigurationError, match="init_process_group"):
        sgd(gated_model())


# fit.


def fitted(path: str | None, stop_after: int | None = None):
    """Weights, ε, steps, history and whether there is a checkpoint; a step beyond ``stop_after`` fails."""
    apply_mutant("")

    def failing(run):
        if run.step == stop_after:
            raise InterruptedError("power cut")

    model = orthogonal_model(seed=distributed.world().rank)
    try:
        with before_steps(failing):
            result = fit(model, samples(300), checkpoint=path, reproducible_seed=3, validation=samples(60, 1), **RUN)
    except InterruptedError:
        return None
    # Records on their way to another process lose their losses.
    history = [SimpleNamespace(**vars(record)) for record in result.history]
    return weights(model), result.epsilon, result.steps, history, result.checkpoint


def test_fit_goes_on_with_another_number_of_ranks_as_if_nothing_had_happened(ranks, tmp_path):
    uninterrupted, epsilon, steps, history, _ = fitted(None)
    path = tmp_path / "two.pt"
    assert ranks.run(fitted, str(path), 8) == [None, None]
    resumed = fitted(str(path))
    other = tmp_path / "one.pt"
    assert fitted(str(other), 8) is None
    for result in [resumed, *ranks.run(fitted, str(other))]:
        assert same_weights(result[0], uninterrupted)
        assert result[1:3] == (epsilon, steps)
        assert [record.step for record in result[3]] == [record.step for record in history]
        # Losses of the same batches at nearly the same weights, added up in another order; no checkpoint keeps one.
        assert result[3][0].loss is None
        assert [r.loss for r in result[3][1:]] == pytest.approx([r.loss for r in history[1:]], rel=1e-3)
        assert result[4] is not None


def test_fit_on_ranks_with_other_settings_is_refused(ranks):
    for failure in ranks.run(fitted_differently):
        assert failure.kind == "RankError"
        assert "lr and momentum" in failure.message


def fitted_differently():
    fit(gated_model(), samples(100), **{**RUN, "lr": 0.1 + distributed.world().rank})


def test_dropped_samples_are_counted_over_all_ranks_and_told_once(ranks):
    told, silent = ranks.run(fitted_with_holes)
    assert "samples in batches contributed nothing" in told
    assert silent == ""


def fitted_with_holes():
    import warnings

    inputs, targets = samples(100)
    # Of rank 1's samples only.
    inputs[1::2] = math.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", PrivacyWarning)
        warnings.filterwarnings("always", "", UserWarning, "")
        fit(gated_model(), (inputs, targets), **RUN)
    return "".join(str(warning.message) for warning in caught)


@pytest.mark.slow
def test_torchrun_starts_a_run_that_ends_alike_on_all_ranks_and_leaves_no_group_behind(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from clipless_dp import fit\n"
        "from tests.support import gated_model, samples\n"
        "dist.init_process_group('gloo')\n"
        "model = gated_model(seed=dist.get_rank())\n"
        "result = fit(model, samples(200), epsilon=4.0, delta=1e-3, epochs=2, batch_size=50, accountant='rdp')\n"
        "total = float(sum(p.detach().double().sum() for p in model.net.parameters()))\n"
        # One write each, or two lines may mix.
        "os.write(1, f'{dist.get_rank()}: {result.epsilon!r} {total!r}\\n'.encode())\n"
        "dist.destroy_process_group()\n"
        # What is left of the group meets the end of the interpreter, which may abort.
        "threads = [open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')]\n"
        "assert not any('gloo' in thread for thread in threads), threads\n"
    )
    printed = torchrun(script, 2)
    lines = sorted(line for line in printed.splitlines() if line[:2] in ("0:", "1:"))
    assert len(lines) == 2
    assert lines[0][2:] == lines[1][2:]


def test_ranks_stream_their_own_samples_only_and_those_that_they_compare(ranks) -> None:
    (first, history, even, _), (second, _, odd, _) = ranks.run(read_and_fitted)
    alone, expected, _, _ = read_and_fitted(stream=False)
    assert torch.equal(first, second)
    assert history == expected
    # Float32 sums in another order, over twelve steps.
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    compared = set(persons.positions(300, persons.READS).tolist())
    even, odd = even - compared, odd - compared
    assert even <= set(range(0, 300, 2))
    assert odd <= set(range(1, 300, 2))
    assert min(len(even), len(odd)) > 80, "missing half of them in twelve draws has probability below 1e-9"


def test_ranks_split_their_parts_within_a_budget_and_account_one_step(ranks) -> None:
    (first, history, _, size), (second, *_) = ranks.run(fitted_in_pieces)
    alone, expected, _, _ = read_and_fitted(batch_size=90, stream=False)
    assert torch.equal(first, second)
    assert history == expected
    assert 1 <= size <= 36, "at least two pieces of a usual draw of 72 rows on a rank"
    # Float32 sums in another order, over seven steps.
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
