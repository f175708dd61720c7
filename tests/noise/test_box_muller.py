from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from clipless_dp import SystemNoise
from clipless_dp.noise import box_muller
from clipless_dp.noise.box_muller import NormalNumbers, generator_words, seeded_words, system_words
from tests.support import looks_standard_normal, uncorrelated

MANY = 400_000
CIPHERS = "cryptography.hazmat.primitives.ciphers"


@pytest.fixture(params=["cpu", "other device", "float64"])
def kind(request, monkeypatch):
    """Each way in which words become numbers; that of other devices runs here, too."""
    if request.param == "other device":
        monkeypatch.setattr(box_muller, "_has_unsigned_integers", lambda device: False)
    return torch.float64 if request.param == "float64" else torch.float32


def filled(words, count=MANY, dtype=torch.float32):
    return NormalNumbers(words).fill_(torch.empty(count, dtype=dtype)).double().numpy()


def is_sound(words, dtype=torch.float32) -> bool:
    """What a sampler that re-uses a part of its words, or mixes them up, fails: two calls, each of two halves."""
    first, second = filled(words, MANY, dtype), filled(words, MANY, dtype)
    half = MANY // 2
    pairs = [(first[:half], first[half:]), (first, second), (first[1:], first[:-1]), (first[half:], second[:half])]
    return looks_standard_normal(first) and all(uncorrelated(*pair) for pair in pairs)


@pytest.fixture(params=["cipher", "numpy", "seeded", "device"])
def words(request, monkeypatch):
    if request.param == "seeded":
        return seeded_words(5)
    if request.param == "device":
        return generator_words(torch.Generator().manual_seed(5))
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, CIPHERS, None)
    else:
        pytest.importorskip("cryptography")
    return system_words()


def test_numbers_are_standard_normal_and_independent(words, kind):
    assert is_sound(words, kind)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda noise: 1.02 * noise,
        lambda noise: noise / 1.02,
        lambda noise: noise + 0.02,
        lambda noise: noise.clip(-3, 3),
    ],
    ids=["σ too large", "σ too small", "shifted", "cut at 3 deviations"],
)
def test_noise_that_is_slightly_off_is_noticed(kind, mutant):
    numbers = filled(seeded_words(5), MANY, kind)
    assert looks_standard_normal(numbers)
    assert not looks_standard_normal(mutant(numbers))


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
    radius = np.sqrt(-2.0 * np.log(2.0**-24 + (1.0 - 2.0**-24) * (radii.view(np.uint32) + 0.5) / 2.0**32))
    exact = np.concatenate([radius * np.cos(angles * (np.pi / 2**31)), radius * np.sin(angles * (np.pi / 2**31))])
    numbers = NormalNumbers(lambda out: out.copy_(integers), seeded_words(0)).fill_(torch.empty(100_000)).numpy()
    # ln u loses half a unit of u, 6e-8, near u = 1, which is 2e-4 of a radius of 3e-4, and the angle 2e-7 of a radius.
    assert np.abs(numbers - exact).max() < 2e-4
    assert np.sqrt(np.square(numbers - exact).mean()) < 1e-6


def signed(number, size):
    return number - (1 << size) if number >> (size - 1) else number


def usual_radius(dtype, first, angle=0):
    """Of a pair that is none of the tail."""
    size = 64 if dtype == torch.float64 else 32

    def words(out):
        pair = torch.tensor([signed(first, size), signed(angle % (1 << size), size)], dtype=torch.int64)
        out.copy_(pair.view(torch.int32) if dtype == torch.float64 else pair.int())

    pair = NormalNumbers(words, lambda out: out.fill_(-1)).fill_(torch.empty(2, dtype=dtype))
    assert torch.isfinite(pair).all()
    return float(pair.double().norm())


def tail_radius(dtype, number, angle=0):
    """Of a pair of the tail, whose place there has these 128 bits."""
    asked = []

    def tail_words(out):
        asked.append(len(out))
        if len(out) == 4:
            out.copy_(torch.tensor([signed(number >> shift & (1 << 32) - 1, 32) for shift in (96, 64, 32, 0)]).int())
        else:
            # The very next pair is one of the tail, the one after it is not.
            out.fill_(0 if len(asked) == 1 else -1)

    pair = NormalNumbers(lambda out: out.fill_(angle), tail_words).fill_(torch.empty(2, dtype=dtype))
    assert asked == [2, 4, 2]
    assert torch.isfinite(pair).all()
    return float(pair.double().norm())


@pytest.mark.parametrize("angle", [0, 1, -1, 2**31 - 1, -(2**31), 2**30])
def test_every_word_gives_finite_numbers_of_the_radius_that_it_stands_for(kind, angle):
    size = 64 if kind == torch.float64 else 32
    bits = 63 if kind == torch.float64 else 32 if box_muller._has_unsigned_integers(torch.device("cpu")) else 31
    for first in (0, 1, 255, 1 << (bits // 2), (1 << bits) - 1, (1 << size) - 1, 1 << (size - 1)):
        u = 2.0**-24 + (1.0 - 2.0**-24) * (first % (1 << bits) + 0.5) / 2.0**bits
        # Near u = 1 a logarithm in float32 has an error of half a unit of u, 6e-8, and a radius of its root.
        assert usual_radius(kind, first, angle) == pytest.approx(math.sqrt(-2.0 * math.log(u)), rel=1e-6, abs=3e-4)
    for number in (0, 1, 1 << 31, 1 << 32, 1 << 64, 1 << 96, 1 << 127, (1 << 128) - 1):
        u = 2.0**-24 * (number + 0.5) / 2.0**128
        assert tail_radius(kind, number, angle) == pytest.approx(math.sqrt(-2.0 * math.log(u)), rel=1e-6)


def mass_beyond(dtype, bits, t):
    """The probability of a radius above ``t``, by bisection over all bits: radii fall as the integers grow."""

    def share(radius, size):
        low, high = -1, 1 << size
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if radius(dtype, middle) > t else (low, middle)
        return math.ldexp(high, -size)

    tail = box_muller._TAIL
    return tail * share(tail_radius, 128) + (1.0 - tail) * share(usual_radius, bits)


def check_the_tail(dtype):
    bits = 63 if dtype == torch.float64 else 32 if box_muller._has_unsigned_integers(torch.device("cpu")) else 31
    for t in (0.5, 1.0, 3.0, 5.0, 5.7, 5.76, 5.77, 5.8, 6.0, 6.6, 6.7, 7.0, 8.5, 9.0, 10.0, 11.0, 12.0, 13.0):
        # Next to the tail half an integer in 128 is decided at once; float32 radii are off by 6e-8·t² of the mass.
        assert mass_beyond(dtype, bits, t) == pytest.approx(math.exp(-0.5 * t * t), rel=4e-3), t


def test_the_mass_beyond_any_number_of_deviations_is_the_gaussians(kind):
    check_the_tail(kind)
    assert tail_radius(kind, 0) > 14.5


@pytest.mark.parametrize("mutant", ["no tail", "tail of 8 bits", "tail too often"])
def test_a_tail_that_ends_where_32_bits_do_or_has_another_mass_is_noticed(monkeypatch, mutant):
    if mutant == "no tail":
        monkeypatch.setattr(box_muller, "_TAIL", 1e-300)
    elif mutant == "tail of 8 bits":
        honest = NormalNumbers._uniform
        monkeypatch.setattr(
            NormalNumbers,
            "_uniform",
            lambda self, count: (int(honest(self, count) * 256) + 0.5) / 256 if count == 4 else honest(self, count),
        )
    else:
        usual = box_muller._scale
        monkeypatch.setattr(box_muller, "_scale", lambda bits, tail: usual(bits, 0.0))
    with pytest.raises(AssertionError):
        check_the_tail(torch.float32)


def test_pairs_of_the_tail_come_as_often_as_they_should_and_independently_of_the_calls(monkeypatch):
    monkeypatch.setattr(box_muller, "_TAIL", 2.0**-7)
    limit = math.sqrt(-2.0 * math.log(2.0**-7))
    numbers = NormalNumbers(seeded_words(8))
    calls = [torch.empty(2 * pairs) for pairs in (1, 2, 3, 100, 5000, 1, 60_000, 0, 30_000)]
    radii = np.concatenate([numbers.fill_(out).view(2, -1).double().norm(dim=0).numpy() for out in calls])
    places = np.flatnonzero(radii > limit)
    gaps = np.diff(places) - 1
    count = len(radii)
    # Five deviations of a binomial count, and of the mean of so many geometric numbers.
    assert abs(len(places) - count / 128) < 5 * math.sqrt(count / 128)
    assert abs(gaps.mean() - 127) < 5 * 128 / math.sqrt(len(gaps))
    assert stats.kstest((gaps + 0.5) / 127.5, "expon").pvalue > 1e-4
    beyond = np.exp(-0.5 * (radii[places] ** 2 - limit**2))
    assert stats.kstest(beyond, "uniform").pvalue > 1e-4
    assert looks_standard_normal(torch.cat(calls).double().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_layouts_are_filled_like_contiguous_float32(dtype):
    out = torch.full((300, 500), math.nan, dtype=dtype).t()
    assert NormalNumbers(seeded_words(2)).fill_(out) is out
    numbers = out.double().numpy().ravel()
    # A number of 8 significant bits is off by 2⁻⁹ of itself: variances by less than 1e-5 of themselves.
    assert abs(numbers.std() - 1.0) < 5.5 / math.sqrt(2 * len(numbers)) + 1e-5
    assert abs(numbers.mean()) < 5.5 / math.sqrt(len(numbers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_number_is_looked_at_on_other_devices_for_which_the_host_would_wait(dtype):
    numbers = NormalNumbers(lambda out: None, seeded_words(0))
    numbers._ahead = 3
    assert numbers.fill_(torch.empty(7, 9, dtype=dtype, device="meta")).shape == (7, 9)
    assert numbers._ahead != 3


def test_any_shape_and_count_is_filled_to_the_last_entry(words):
    for shape in [(), (0,), (1,), (2,), (3,), (5, 7), (1 << 13,), ((1 << 15) + 1,)]:
        out = torch.full(shape, math.nan)
        assert NormalNumbers(words).fill_(out) is out
        assert torch.isfinite(out).all()
    numbers = NormalNumbers(words)
    rows = torch.stack([numbers.fill_(torch.empty(33)) for _ in range(4000)])
    # Variances of 33 entries, each within 5.5 of their deviations; and neighbours are uncorrelated.
    assert float((rows.var(0) - 1.0).abs().max()) < 5.5 * math.sqrt(2 / 4000)
    assert float((torch.corrcoef(rows.t()) - torch.eye(33)).abs().max()) < 5.5 / math.sqrt(4000)


def test_seeded_numbers_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    numbers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            one = NormalNumbers(seeded_words(3))
            numbers.append([one.fill_(torch.empty(count)) for count in (1 << 18, 150_001, 65_542)])
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
        NormalNumbers(failing, seeded_words(0)).fill_(torch.empty(8))


def all_words(step: int) -> np.ndarray:
    """Words of the radii's whole range, and the ends of it one by one."""
    ends = np.arange(200_000, dtype=np.uint64)
    return np.concatenate([ends, np.arange(0, 2**32, step, dtype=np.uint64), 2**32 - 1 - ends]).astype(np.uint32)


def test_no_word_gives_a_radius_without_a_number_and_every_function_is_good_to_four_units():
    step, _, offset = box_muller._scale(32, box_muller._TAIL)
    uniform = torch.from_numpy(all_words(4001)).float().mul(step).add(offset)
    assert uniform.min() > 0
    assert uniform.max() <= 1
    logarithm = box_muller._apply("log", uniform.clone())
    assert (logarithm <= 0).all()
    assert torch.isfinite((-2.0 * logarithm).sqrt()).all()
    inside = uniform < 1
    exact = uniform.double().log()
    assert ((logarithm.double() - exact).abs() <= 3e-7 * exact.abs())[inside].all()
    angle = torch.from_numpy(all_words(4001).view(np.int32)).float().mul(math.pi * 2.0**-31)
    for name in ("sin", "cos"):
        found = box_muller._apply(name, angle.clone())
        assert (found.abs() <= 1).all()
        assert (found.double() - getattr(angle.double(), name)()).abs().max() <= 2.0**-23


@pytest.mark.parametrize("name", ["log", "sin", "cos"])
@pytest.mark.parametrize("count", [1, 7, 1000, 4097])
def test_the_numbers_of_a_part_are_those_of_the_whole_however_many_threads_there_are(name, count, monkeypatch):
    monkeypatch.setattr(box_muller, "_HAS_AVX512", True)
    values = torch.rand(count, generator=torch.Generator().manual_seed(count))
    whole = box_muller._apply(name, values.clone())
    parts = torch.cat([box_muller._apply(name, part.clone()) for part in values.split(3)])
    assert torch.equal(whole, parts)
    monkeypatch.setattr(box_muller, "_SHARED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(box_muller._apply(name, values.clone()), whole)


def test_machines_on_which_numpy_is_slower_have_the_same_numbers_up_to_rounding(monkeypatch):
    here = filled(seeded_words(5))
    monkeypatch.setattr(box_muller, "_HAS_AVX512", not box_muller._HAS_AVX512)
    there = filled(seeded_words(5))
    assert np.abs(there - here).max() <= 4e-6
    assert looks_standard_normal(there)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_numbers_are_the_same_where_threads_cannot_be_started(left, monkeypatch):
    monkeypatch.setattr(box_muller, "_HAS_AVX512", True)
    values = torch.rand(1001, generator=torch.Generator().manual_seed(0))
    once = box_muller._apply("log", values.clone())
    monkeypatch.setattr(box_muller, "_SHARED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    honest, started = box_muller.threading.Thread.start, []

    def start(thread):
        if len(started) == left:
            raise RuntimeError("can't create new thread at interpreter shutdown")
        started.append(thread)
        honest(thread)

    monkeypatch.setattr(box_muller.threading.Thread, "start", start)
    assert torch.equal(box_muller._apply("log", values.clone()), once)
    assert len(started) == left


def test_numbers_of_a_thread_that_failed_are_not_used(monkeypatch):
    monkeypatch.setattr(box_muller, "_HAS_AVX512", True)
    monkeypatch.setattr(box_muller, "_SHARED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(box_muller.threading.Thread, "run", lambda thread: None)
    with pytest.raises(RuntimeError, match="thread that draws noise"):
        box_muller._apply("log", torch.rand(100))
