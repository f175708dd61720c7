from __future__ import annotations

import copy
import math
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from scipy import stats

from clipless_dp import CliplessDPSGD, ConfigurationError, PoissonBatches, SecureNoise, fit, report
from clipless_dp.cli import main
from clipless_dp.noise import add_normal_
from clipless_dp.noise import secure as module
from tests.support import gated_model, looks_standard_normal, noise_on_both_sides_of_a_fork, samples, uncorrelated

pytest.importorskip("cryptography")

MANY = 400_000


def drawn(source=None, count=MANY):
    return (source or SecureNoise()).standard_normal_(torch.empty(count, dtype=torch.float64)).numpy()


def test_secure_noise_is_standard_normal():
    assert looks_standard_normal(drawn())


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("scale", lambda noise: noise * 1.02),
        ("shift", lambda noise: noise + 0.02),
        ("tails", lambda noise: np.clip(noise, -2.5, 2.5)),
        ("uniform", lambda noise: math.sqrt(12) * (stats.norm.cdf(noise) - 0.5)),
    ],
)
def test_the_quality_test_rejects_noise_that_is_slightly_off(name, mutant):
    assert not looks_standard_normal(mutant(drawn()))


def test_odd_counts_and_small_counts_are_filled():
    for count in (0, 1, 2, 3, 7):
        numbers = drawn(count=count)
        assert len(numbers) == count
        assert np.isfinite(numbers).all()
    # Each call fills both halves of a pair: neither is left at zero.
    assert looks_standard_normal(np.array([drawn(source, 1)[0] for source in [SecureNoise()] for _ in range(5000)]))


def test_both_sums_of_one_draw_are_independent():
    numbers = drawn()
    assert uncorrelated(numbers[: MANY // 2], numbers[MANY // 2 :])
    assert uncorrelated(numbers[:-1], numbers[1:])


def test_steps_runs_copies_and_processes_draw_independent_noise():
    source = SecureNoise()
    first = drawn(source, 50_000)
    source.begin_step(0)
    others = [drawn(source, 50_000), drawn(None, 50_000), drawn(copy.deepcopy(source), 50_000)]
    others.append(drawn(pickle.loads(pickle.dumps(source)), 50_000))
    assert all(uncorrelated(first, other) for other in others)
    assert not uncorrelated(first, first)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_draws_other_noise():
    assert all(theirs != ours for theirs, ours in noise_on_both_sides_of_a_fork("SecureNoise"))


def test_every_step_has_a_key_of_its_own_from_the_operating_system(monkeypatch):
    taken = []
    honest = os.urandom
    monkeypatch.setattr(module.os, "urandom", lambda size: taken.append(size) or honest(size))
    source = SecureNoise()
    for step in range(3):
        source.begin_step(step)
    assert sum(taken) == 4 * 48


def test_the_sum_is_rounded_once_to_a_grid_that_the_gradient_does_not_move(monkeypatch):
    """Against the formula, in numpy, for known bits."""
    bits = torch.randint(0, 1 << 53, (8 * 5,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(SecureNoise, "_integers", lambda self, count: bits[:count].clone())
    u = (bits.numpy().reshape(2, 4, 5) + np.array([1.0, 0.0]).reshape(2, 1, 1)) * 2.0**-53
    radius = np.sqrt(-2 * np.log(u[0]))
    normal = np.concatenate([(radius * t(2 * np.pi * u[1])).sum(0) for t in (np.cos, np.sin)]) / 2
    gradient = torch.randn(10, generator=torch.Generator().manual_seed(1))
    target = gradient.clone()
    SecureNoise().add_(target, 0.3)
    grid = 2.0**-22  # 0.3 lies in [2⁻², 2⁻¹)
    expected = np.round((gradient.double().numpy() + 0.3 * normal) / grid) * grid
    # Elementary functions of two libraries may differ in the last bit: at most one step of the grid, and rarely.
    np.testing.assert_allclose(target.double().numpy(), expected, atol=grid)
    assert (target.double().numpy() == expected).mean() >= 0.9


def test_no_number_is_beyond_seventeen_deviations_and_the_least_integers_get_there(monkeypatch):
    def largest(radius, angle):
        monkeypatch.setattr(
            SecureNoise, "_integers", lambda self, count: torch.tensor([radius] * (count // 2) + [angle] * (count // 2))
        )
        numbers = SecureNoise()._normal(2)
        assert torch.isfinite(numbers).all()
        return float(numbers.abs().max())

    top = (1 << 53) - 1
    # Four Gaussians of √(106 ln 2) each, over 2.
    assert largest(0, 0) == pytest.approx(2.0 * math.sqrt(106.0 * math.log(2.0)), rel=1e-12)
    assert 17.0 < largest(0, 0) < 17.2
    assert largest(top, 0) == 0.0
    # Radii fall as the integers grow, and each is the quantile of its integer: (k+1)/2⁵³ of all are beyond.
    radii = [largest(k, 0) for k in (0, 1, 7, 1 << 10, 1 << 30, 1 << 50, top)]
    assert radii == sorted(radii, reverse=True)
    for k, radius in zip((0, 1, 7, 1 << 10, 1 << 30, 1 << 50), radii, strict=False):
        assert math.exp(-0.5 * (radius / 2.0) ** 2) == pytest.approx((k + 1) / 2.0**53, rel=1e-9)
    for angle in (1, top, 1 << 52, 1 << 51):
        assert largest(0, angle) <= largest(0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deviation", [1e-6, 0.7, 1.0, 3e4])
def test_the_least_significant_bits_do_not_depend_on_the_gradient(dtype, deviation):
    """Mironov's attack asks which numbers can occur; here the answer is the same for every gradient."""
    grid = 2.0 ** (math.floor(math.log2(deviation)) - 20)

    def off_grid(gradient, noise):
        target = torch.full((4000,), gradient * deviation, dtype=dtype)
        noise(target)
        steps = target.double() / grid
        return float((steps != steps.round()).double().mean())

    secure = SecureNoise()
    for gradient in (0.0, 1.0, -math.pi, 1e-7, 1e3):
        assert off_grid(gradient, lambda target: secure.add_(target, deviation)) == 0.0
    # The plain sum does not pass: the test sees what it looks for.
    assert off_grid(math.pi, lambda target: target.add_(secure.standard_normal_(target.clone()), alpha=deviation)) > 0.1


def test_noise_that_add_normal_adds_has_its_deviation_and_fills_every_tensor():
    shapes, deviations = [(300, 300), (), (70_001,)], [0.5, 2.0, 30.0]
    tensors = [torch.zeros(shape) for shape in shapes]
    tensors[0] = tensors[0].t()
    add_normal_(tensors, deviations, SecureNoise())
    for tensor, deviation in zip(tensors, deviations, strict=True):
        if tensor.dim():
            assert looks_standard_normal(tensor.double().flatten().numpy() / deviation)
        else:
            assert float(tensor) != 0.0


def train(**options):
    data, model = samples(200), gated_model()
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.2, dataset_size=200, **options)
    for inputs, targets, mask in PoissonBatches(data, sample_rate=0.2, steps=2):
        optimizer.zero_grad()
        model.loss(model(inputs), targets, mask).backward()
        optimizer.step()
    return optimizer


def test_noise_is_chosen_by_name_and_named_in_the_statement():
    secure = train(noise="secure", accountant="rdp")
    assert isinstance(secure.noise, SecureNoise)
    assert "cryptographic" in report(secure).to_markdown()
    assert report(secure).findings == []


@pytest.mark.parametrize("noise", ["Secure", "none", 3, object()])
def test_an_unknown_source_of_noise_is_refused(noise):
    with pytest.raises(ConfigurationError, match="noise must be"):
        train(noise=noise)


def test_secure_noise_cannot_be_reproducible():
    run = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 50, "progress": False, "accountant": "rdp"}
    with pytest.raises(ConfigurationError, match="reproducible_seed"):
        fit(gated_model(), samples(200), noise="secure", reproducible_seed=1, **run)
    assert fit(gated_model(), samples(200), noise="secure", **run).optimizer.noise_sources == (
        "clipless_dp.secure_noise.SecureNoise",
    )


def test_the_command_line_takes_the_noise_by_name(tmp_path, capsys):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "table.npz", X=generator.normal(size=(100, 3)), y=generator.integers(0, 2, 100))
    arguments = ["train", "--dataset", str(tmp_path / "table.npz"), "--epsilon", "3", "--delta", "1e-3", "--quiet"]
    arguments += ["--classes", "2", "--epochs", "1", "--batch-size", "40", "--accountant", "rdp", "--noise", "secure"]
    assert main([*arguments, "--report", str(tmp_path / "statement")]) == 0
    assert "SecureNoise" in (tmp_path / "statement.md").read_text(encoding="utf-8")
    assert main([*arguments, "--reproducible-seed", "1"]) == 2
    assert "reproducible_seed" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ConfigurationError, match=r"clipless-dp\[secure\]"):
        train(noise="secure")


def test_threads_may_share_a_cipher():
    source, together = SecureNoise(), Barrier(8)

    def draw(_):
        together.wait()
        return [source.standard_normal_(torch.empty(20_001, dtype=torch.float64)) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        drawn = torch.stack([some for of_thread in pool.map(draw, range(8)) for some in of_thread])
    # Two of 8e5 numbers of about 50 bits are equal with a probability of 3e-4 at most; a repeated stream repeats 2e4.
    assert drawn.numel() - len(drawn.unique()) < 10
