from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from clipless_dp import SystemNoise, box_muller
from clipless_dp.box_muller import fill_normal_, seeded_words, system_words

from .support import looks_standard_normal, uncorrelated

MANY = 400_000
CIPHERS = "cryptography.hazmat.primitives.ciphers"


def filled(words, count=MANY):
    return fill_normal_(torch.empty(count), words).double().numpy()


def is_sound(words) -> bool:
    """What a sampler that re-uses a part of its words, or mixes them up, fails: two calls, each of two halves."""
    first, second = filled(words), filled(words)
    half = MANY // 2
    pairs = [(first[:half], first[half:]), (first, second), (first[1:], first[:-1]), (first[half:], second[:half])]
    return looks_standard_normal(first) and all(uncorrelated(*pair) for pair in pairs)


@pytest.fixture(params=["cipher", "numpy", "seeded"])
def words(request, monkeypatch):
    if request.param == "seeded":
        return seeded_words(5)
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, CIPHERS, None)
    else:
        pytest.importorskip("cryptography")
    return system_words()


def test_numbers_are_standard_normal_and_independent(words):
    assert is_sound(words)


def drawn(words, count):
    out = torch.zeros(count, dtype=torch.int32)
    words(out)
    return out


def reused(words, change):
    def mutant(out):
        words(out)
        out.copy_(change(out.clone().view(2, -1)).reshape(-1))

    return mutant


@pytest.mark.parametrize(
    "change",
    [
        lambda integers: integers[[0, 0]],
        lambda integers: integers[:, torch.arange(integers.shape[1]) // 2 * 2],
        lambda integers: torch.stack([integers[0], integers[1].abs()]),
        lambda integers: torch.stack([integers[0] & 0x7FFFFFFF, integers[1]]),
        lambda integers: torch.stack([integers[0], integers[1] & ~0xFFFFFFF]),
    ],
    ids=["radius and angle of one word", "words twice", "half of the circle", "half of the radii", "sixteen angles"],
)
def test_words_that_are_used_wrongly_are_noticed(change):
    assert not is_sound(reused(seeded_words(5), change))


def test_words_that_come_again_at_the_next_call_are_noticed():
    assert not is_sound(lambda out: seeded_words(5)(out))


def test_the_numbers_are_those_of_the_formula():
    integers = drawn(seeded_words(1), 100_000)
    radii, angles = integers.view(2, -1).numpy()
    radius = np.sqrt(-2.0 * np.log((radii.view(np.uint32) + 0.5) / 2.0**32))
    exact = np.concatenate([radius * np.cos(angles * (np.pi / 2**31)), radius * np.sin(angles * (np.pi / 2**31))])
    numbers = fill_normal_(torch.empty(100_000), lambda out: out.copy_(integers)).numpy()
    # ln u loses half a unit of u, 6e-8, near u = 1, which is 2e-4 of a radius of 3e-4, and the angle 2e-7 of a radius.
    assert np.abs(numbers - exact).max() < 2e-4
    assert np.sqrt(np.square(numbers - exact).mean()) < 1e-6


@pytest.mark.parametrize("radius", [0, 1, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("angle", [0, 1, -1, 2**31 - 1, -(2**31), 2**30])
def test_every_word_gives_finite_numbers(radius, angle):
    words = torch.tensor([radius, angle], dtype=torch.int32)
    numbers = fill_normal_(torch.empty(2), lambda out: out.copy_(words))
    assert float(numbers.norm()) <= math.sqrt(66 * math.log(2)) * (1 + 1e-6)  # float32 rounding
    assert torch.isfinite(numbers).all()
    if radius == 0:
        assert float(numbers.norm()) == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)


def test_any_shape_and_count_is_filled_to_the_last_entry(words):
    for shape in [(), (0,), (1,), (2,), (3,), (5, 7), (1 << 13,), ((1 << 15) + 1,)]:
        out = torch.full(shape, math.nan)
        assert fill_normal_(out, words) is out
        assert torch.isfinite(out).all()
    rows = torch.stack([fill_normal_(torch.empty(33), words) for _ in range(4000)])
    # Variances of 33 entries, each within 5.5 of their deviations; and neighbours are uncorrelated.
    assert float((rows.var(0) - 1.0).abs().max()) < 5.5 * math.sqrt(2 / 4000)
    assert float((torch.corrcoef(rows.t()) - torch.eye(33)).abs().max()) < 5.5 / math.sqrt(4000)


def test_seeded_numbers_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    numbers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            numbers.append([fill_normal_(torch.empty(count), seeded_words(3)) for count in (1 << 18, 150_001, 65_542)])
    finally:
        torch.set_num_threads(before)
    for others in numbers[1:]:
        assert all(torch.equal(first, other) for first, other in zip(numbers[0], others, strict=True))


def test_words_of_a_seed_are_the_same_on_every_machine():
    assert drawn(seeded_words(0), 4).tolist() == [-1184210126, -1852465569, 1518247713, 1008588962]


def test_words_never_come_again(words):
    parts = [drawn(words, 2 * count) for count in (1, 2, 3, 8191, 32_768, 32_770, 70_000)]
    numbers = torch.cat(parts).view(-1, 2)
    # 140,000 words of 64 bits: two are alike by chance once in 10⁹ runs.
    assert len(torch.unique(numbers, dim=0)) == len(numbers)
    # Each bit is set in half of the words, within six deviations.
    bits = np.unpackbits(numbers.numpy().view(np.uint8), axis=1).mean(0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / math.sqrt(len(numbers))


def test_two_sources_of_the_system_draw_different_words(monkeypatch):
    assert not torch.equal(drawn(system_words(), 8), drawn(system_words(), 8))
    monkeypatch.setitem(sys.modules, CIPHERS, None)
    assert not torch.equal(drawn(system_words(), 8), drawn(system_words(), 8))


def test_without_the_cipher_noise_comes_from_numpy(monkeypatch):
    seeds = []
    honest = box_muller._words_of
    monkeypatch.setattr(box_muller, "_words_of", lambda seed: seeds.append(seed) or honest(seed))
    monkeypatch.setitem(sys.modules, CIPHERS, None)
    assert looks_standard_normal(SystemNoise().standard_normal_(torch.empty(MANY)).double().numpy())
    (seed,) = seeds
    # 256 bits, of which the leading ones are zero by chance only.
    assert seed.entropy >> 216
    assert len(seed.pool) == 8


def test_a_source_that_fails_lets_the_draw_fail():
    def failing(out):
        raise OSError("no entropy")

    with pytest.raises(OSError, match="no entropy"):
        fill_normal_(torch.empty(8), failing)
