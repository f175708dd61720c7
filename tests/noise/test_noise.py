from __future__ import annotations

import copy
import math
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clipless_dp import ConfigurationError, ReproducibleNoise, SecureNoise, SystemNoise
from clipless_dp.noise import (
    add_normal_,
    adding,
    allocate,
    box_muller,
    effective_noise_multiplier,
    noise_source,
    source_name,
    system_generator,
)
from tests.support import every_copy, noise_on_both_sides_of_a_fork

SCHEMES = ("global", "per-layer", "min-variance")
shares = st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 10**6)), min_size=1, max_size=8)


@given(shares, st.floats(0.1, 50.0), st.sampled_from(SCHEMES))
def test_every_allocation_amounts_to_the_planned_noise_multiplier(parts, sigma, scheme):
    deltas, sizes = zip(*parts, strict=True)
    deviations = allocate(deltas, sizes, sigma, scheme)
    # A few float64 operations for each parameter.
    assert effective_noise_multiplier(deltas, deviations) == pytest.approx(sigma, rel=1e-12)


@given(shares, st.sampled_from(["global", "per-layer"]), st.lists(st.floats(0.5, 2.0), min_size=8, max_size=8))
def test_min_variance_allocation_is_never_beaten(parts, other, factors):
    deltas, sizes = zip(*parts, strict=True)

    def energy(deviations):
        return sum(p * s**2 for p, s in zip(sizes, deviations, strict=True))

    best = energy(allocate(deltas, sizes, 1.0, "min-variance"))
    assert best <= energy(allocate(deltas, sizes, 1.0, other)) * (1 + 1e-9)  # float64 rounding of the sums
    perturbed = [s * f for s, f in zip(allocate(deltas, sizes, 1.0, "min-variance"), factors, strict=False)]
    rescaled = [s / effective_noise_multiplier(deltas, perturbed) for s in perturbed]
    assert best <= energy(rescaled) * (1 + 1e-9)


def test_global_allocation_gives_every_parameter_the_same_deviation():
    assert allocate([3.0, 4.0], [10, 1000], 2.0, "global") == [10.0, 10.0]


def test_a_parameter_of_zero_sensitivity_gets_no_noise():
    for scheme in SCHEMES:
        assert allocate([1.0, 0.0], [5, 5], 1.0, scheme)[1] == 0.0


def test_an_unknown_allocation_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="'average'"):
        allocate([1.0], [1], 1.0, "average")  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [SystemNoise(), ReproducibleNoise(3)], ids=["system", "reproducible"])
def test_noise_is_standard_normal(source):
    source.begin_step(0)
    drawn = source.standard_normal_(torch.empty(200_000)).numpy()
    # Rejects a wrong scale of 1 % and a shift of 0.01 with near certainty; fails by chance once in 10⁶ runs.
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    assert stats.kstest(drawn / 1.05, "norm").pvalue < 1e-6


def test_system_noise_does_not_depend_on_torch_seeds():
    torch.manual_seed(0)
    first = SystemNoise().standard_normal_(torch.empty(64))
    torch.manual_seed(0)
    second = SystemNoise().standard_normal_(torch.empty(64))
    assert not torch.equal(first, second)


def test_system_generators_differ_in_far_more_than_a_32_bit_seed():
    states = [system_generator().get_state() for _ in range(2)]
    differing = int((states[0] != states[1]).sum())
    assert differing > 2000, f"only {differing} bytes of state differ"


def test_system_noise_is_independent_between_calls():
    source = SystemNoise()
    first, second = (source.standard_normal_(torch.empty(100_000)).numpy() for _ in range(2))
    # The correlation of independent draws has deviation 1/√n.
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(100_000)


def test_reproducible_noise_is_a_function_of_seed_and_step_and_differs_between_steps():
    def draw(seed, step):
        source = ReproducibleNoise(seed)
        source.begin_step(step)
        return source.standard_normal_(torch.empty(32))

    assert torch.equal(draw(1, 5), draw(1, 5))
    assert not torch.equal(draw(1, 5), draw(1, 6))
    assert not torch.equal(draw(1, 5), draw(2, 5))


@every_copy
def test_copies_of_system_noise_draw_other_noise(copied):
    source = SystemNoise()
    source.standard_normal_(torch.empty(1))
    other = copied(source)
    assert not torch.equal(source.standard_normal_(torch.empty(64)), other.standard_normal_(torch.empty(64)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_draws_other_noise():
    assert all(theirs != ours for theirs, ours in noise_on_both_sides_of_a_fork("SystemNoise"))


class Counting:
    """1, 2, 3, … so that it shows which number went where."""

    reproducible = True

    def __init__(self):
        self.drawn = 0

    def begin_step(self, step):
        self.drawn = 0

    def standard_normal_(self, out):
        out.copy_(torch.arange(self.drawn + 1, self.drawn + 1 + out.numel()).view(out.shape))
        self.drawn += out.numel()
        return out


@pytest.mark.parametrize("block", [1, 4, 7, 64, 1000])
def test_every_number_drawn_enters_one_place_scaled_by_its_tensors_deviation(block, monkeypatch):
    monkeypatch.setattr(adding, "_BLOCK", block)
    shapes = [(3, 5), (), (2,), (4, 4), (0,), (1, 2, 3), (30,)]
    tensors = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    tensors[3] = tensors[3].t()
    tensors[5] = torch.zeros(3, 2, 1, dtype=torch.float64).permute(2, 1, 0)
    deviations = [10.0**index for index in range(len(shapes))]
    source = Counting()
    add_normal_(tensors, deviations, source)
    numbers = torch.cat([(t / d).flatten() for t, d in zip(tensors, deviations, strict=True)]).round().long()
    assert source.drawn == len(numbers)
    assert sorted(numbers.tolist()) == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("source", [SystemNoise(), ReproducibleNoise(1), "secure"], ids=["system", "seeded", "secure"])
def test_sums_are_scaled_once_noise_and_all(source, monkeypatch):
    if source == "secure":
        pytest.importorskip("cryptography")
    source = noise_source(source)
    monkeypatch.setattr(adding, "_BLOCK", 256)
    # Cut, whole and gathered ones; noise that hardly shows beside the sums, or all there is.
    shapes = [(40, 50), (15, 15), (3, 3), (2,)]
    for sums, deviation, tolerance in ((8.0, 1e-6, 1e-5), (0.0, 4.0, None)):
        tensors = [torch.full(shape, sums) for shape in shapes]
        source.begin_step(0)
        add_normal_(tensors, [deviation] * 4, source, 0.25)
        entries = torch.cat([tensor.flatten() for tensor in tensors])
        if tolerance is not None:
            assert float((entries - 2.0).abs().max()) < tolerance
        else:
            # Five deviations of a variance of so many numbers.
            assert float(entries.square().mean()) == pytest.approx(1.0, rel=5 * math.sqrt(2 / len(entries)))


def test_noise_of_a_parameter_longer_than_a_block_is_white():
    (tensor,) = tensors = [torch.zeros(3 * adding._BLOCK + 5)]
    add_normal_(tensors, [2.0], SystemNoise())
    blocks = tensor[: 3 * adding._BLOCK].view(3, -1)
    # Five deviations of a variance and of a correlation of that many numbers.
    assert float(tensor.square().mean()) == pytest.approx(4.0, rel=5 * math.sqrt(2 / len(tensor)))
    assert float((torch.corrcoef(blocks) - torch.eye(3)).abs().max()) < 5 / math.sqrt(adding._BLOCK)


def test_threads_that_share_a_source_draw_one_after_the_other(monkeypatch):
    source, together, inside, most = SystemNoise(), Barrier(4), [], []
    honest = box_muller.NormalNumbers.fill_

    def watched(self, out):
        inside.append(self)
        most.append(len(inside))
        time.sleep(1e-3)
        inside.pop()
        return honest(self, out)

    monkeypatch.setattr(box_muller.NormalNumbers, "fill_", watched)

    def draw(_):
        together.wait()
        return [source.standard_normal_(torch.empty(101, dtype=torch.float64)) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        drawn = torch.stack([some for of_thread in pool.map(draw, range(4)) for some in of_thread])
    assert max(most) == 1
    # Two of 2020 numbers of 53 bits are equal with a probability below 1e-9.
    assert len(drawn.unique()) == drawn.numel()


def test_a_source_that_threads_share_is_copied_and_pickled_as_before():
    source = SystemNoise()
    source.standard_normal_(torch.empty(4))
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert bool(torch.isfinite(other.standard_normal_(torch.empty(4))).all())


def test_sources_keep_the_names_that_ledgers_and_statements_carry():
    class Derived(SystemNoise):
        pass

    names = [
        f"clipless_dp.{name}" for name in ("noise.SystemNoise", "noise.ReproducibleNoise", "secure_noise.SecureNoise")
    ]
    assert [source_name(kind) for kind in (SystemNoise, ReproducibleNoise, SecureNoise)] == names
    assert source_name(Derived) == f"{__name__}.{Derived.__qualname__}", "what is derived is not the package's own"
