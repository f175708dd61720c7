"""Truncated paths: gradients are sums over small sets of blocks, and their bounds the binomial sums, attained."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, ConfigurationError, DPLipModel, constraints, gradient_gated, layers, losses
from clipless_dp.layers import Highway
from tests.soundness.attack import Record, add_or_remove_one, wrap

SIZE = 3


def stack(count: int, paths: int, alpha: float | None = None, seed: int = 0) -> Highway:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = [nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()) for _ in range(count)]
    return Highway(blocks, paths, alpha).double()


def forwards(net: Highway, values: Tensor) -> list[Tensor]:
    """Values before each block and behind the last one, all paths taken."""
    found = [values]
    keep, share = (1.0, 1.0) if net.alpha is None else (1.0 - net.alpha, net.alpha)
    for block in net.blocks:
        found.append(keep * found[-1] + share * block(found[-1]))
    return found


def over_sets_of_blocks(net: Highway, sample: Tensor, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the input and of each block's weight, path by path, for each set of at most so many blocks."""
    values = [one.detach() for one in forwards(net, sample)]
    keep, share = (1.0, 1.0) if net.alpha is None else (1.0 - net.alpha, net.alpha)
    jacobians = [
        torch.autograd.functional.jacobian(block, value) for block, value in zip(net.blocks, values, strict=False)
    ]
    count = len(jacobians)

    def arriving(behind: int) -> Tensor:
        total = torch.zeros_like(cotangent)
        for size in range(net.paths + 1):
            for chosen in itertools.combinations(range(behind, count), size):
                one = cotangent
                for index in reversed(range(behind, count)):
                    one = share * jacobians[index].mT @ one if index in chosen else keep * one
                total = total + one
        return total

    weights = []
    for index, block in enumerate(net.blocks):
        (found,) = torch.autograd.grad(block(values[index]), [block[0].weight], share * arriving(index + 1))  # type: ignore[index]
        weights.append(found)
    return arriving(0), weights


@given(
    count=st.integers(1, 5),
    paths=st.integers(0, 6),
    alpha=st.sampled_from([None, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_gradients_are_those_of_all_sets_of_at_most_so_many_blocks(
    count: int, paths: int, alpha: float | None, seed: int
) -> None:
    net = stack(count, paths, alpha, seed)
    generator = torch.Generator().manual_seed(seed)
    sample, cotangent = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    inputs = sample.clone().requires_grad_()
    output = net(inputs)
    torch.testing.assert_close(output, forwards(net, sample)[-1], rtol=1e-12, atol=1e-12)
    expected, weights = over_sets_of_blocks(net, sample, cotangent)
    wanted = [inputs, *(block[0].weight for block in net.blocks)]  # type: ignore[index]
    found = torch.autograd.grad(output, wanted, cotangent)
    for one, right in zip(found, [expected, *weights], strict=True):
        torch.testing.assert_close(one, right, rtol=1e-10, atol=1e-12)


def test_from_as_many_paths_as_blocks_on_gradients_are_those_of_the_residual_network() -> None:
    for paths in (4, 9):
        net = stack(4, paths)
        plain = nn.Sequential(*(layers.Residual(block) for block in net.blocks))
        runs: list[int] = []
        for block in net.blocks:
            block.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        sample = torch.randn(5, SIZE, dtype=torch.float64)
        parameters = list(net.parameters())
        found = torch.autograd.grad(net(sample).sin().sum(), parameters)
        # Equal copies are one: nothing runs twice.
        assert len(runs) == 4
        for one, right in zip(found, torch.autograd.grad(plain(sample).sin().sum(), parameters), strict=True):
            torch.testing.assert_close(one, right)


def linear(count: int, paths: int, alpha: float | None = None, scale: float = 1.0) -> tuple[Highway, DPLipModel]:
    """Blocks that are ``scale`` times the identity: each path is as large as it can be, and all add up."""
    net = Highway([nn.Linear(2, 2, bias=False) for _ in range(count)], paths, alpha).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(scale * torch.eye(2))
    model = wrap(nn.Sequential(net), (2,), input_norm=1.0, constraint=constraints.Spectral(scale))
    return net, model


@pytest.mark.parametrize("paths", [0, 1, 2, 5])
@pytest.mark.parametrize(("scale", "alpha"), [(1.0, None), (0.5, None), (1.0, 0.25)])
def test_bounds_are_the_binomial_sums_and_aligned_samples_attain_them(
    paths: int, scale: float, alpha: float | None
) -> None:
    count = 5
    _, model = linear(count, paths, alpha, scale)
    keep, share = (1.0, 1.0) if alpha is None else (1.0 - alpha, alpha)
    grown = keep + share * scale
    bounds = model.sensitivity().per_parameter
    signal = torch.tensor([1.0, 0.0], dtype=torch.float64)
    record = Record(model)
    record.try_(signal, signal)
    for index in range(count):
        left = count - 1 - index
        terms = [math.comb(left, m) * keep ** (left - m) * (share * scale) ** m for m in range(min(paths, left) + 1)]
        expected = model.cotangent_norm * share * sum(terms) * grown**index
        assert bounds[f"0.blocks.{index}.weight"] == pytest.approx(expected, rel=1e-5)
    worst = {key: value for key, value in record.worst.items() if "weight" in str(key)}
    assert all(value <= 1.0 + 1e-6 for value in worst.values())
    assert max(worst.values()) > 0.999


def test_ten_blocks_and_one_path_have_eleven_in_place_of_a_thousand() -> None:
    net, _ = linear(10, 1)
    entry = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        entry.weight.copy_(torch.eye(2))
    options: dict[str, Any] = {"input_norm": 1.0, "constraint": constraints.Spectral()}
    model = wrap(nn.Sequential(entry, net), (2,), **options)
    assert model.sensitivity().per_parameter["0.weight"] == pytest.approx(11.0 * model.cotangent_norm, rel=1e-5)
    plain = wrap(nn.Sequential(entry, *(layers.Residual(block) for block in net.blocks)), (2,), **options)
    assert plain.sensitivity().per_parameter["0.weight"] == pytest.approx(1024.0 * model.cotangent_norm, rel=1e-5)
    # What is computed forwards has all paths, and so has its certificate.
    assert model.lipschitz_constant() == pytest.approx(1024.0, rel=1e-5)
    inputs = torch.tensor([[1e-3, 0.0]], dtype=torch.float64)
    assert float(model.net(inputs)[0, 0].detach()) == pytest.approx(1.024)
    pairs = model.margin_constants()
    assert float(pairs[0, 1]) >= 1024.0 * (1.0 - 1e-9)


@pytest.mark.parametrize("mode", ["clip", "normalize"])
@pytest.mark.parametrize("route", ["constraint", "free", "gates"])
def test_no_sample_of_random_truncated_networks_passes_a_bound(mode: Any, route: str) -> None:
    worst = 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        alpha = (None, 0.4)[seed % 2]
        net: nn.Module = nn.Sequential(
            nn.Linear(4, SIZE), stack(4, seed % 4, alpha, seed), layers.StopGradient() if seed == 5 else nn.Identity(),
            nn.Linear(SIZE, 2),
        ).double()  # fmt: skip
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn_like(parameter))
        if route == "gates":
            net = gradient_gated(net, limit=0.3, mode=mode)
        constraint = constraints.Spectral() if route == "constraint" else None
        model = wrap(net, (4,), input_norm=2.0, constraint=constraint)
        generator = torch.Generator().manual_seed(seed)
        inputs = 3.0 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
        targets = 10.0 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
        record = Record(model)
        for sample, target in zip(inputs, targets, strict=True):
            record.try_(sample, target)
        add_or_remove_one(model, inputs, targets)
        worst = max(worst, *(value for key, value in record.worst.items()))
    assert worst <= 1.0 + 1e-6
    assert worst > 0.2


def test_the_mutant_a_stop_that_lets_gradients_through_passes_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    net, model = linear(4, 1)
    bound = model.sensitivity().per_parameter["0.blocks.0.weight"]
    signal = torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    def largest() -> float:
        model.zero_grad()
        model.loss(model(signal), signal).backward()
        found = net.blocks[0].weight.grad
        assert isinstance(found, Tensor)
        return float(found.norm())

    assert largest() <= bound * (1.0 + 1e-9)
    monkeypatch.setattr(layers.StopGradient, "forward", lambda self, values: values * 1.0)
    assert largest() > bound * 1.5


def test_truncated_networks_train_and_say_what_they_are() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, SIZE), stack(3, 1).float(), nn.Linear(SIZE, 2))
    model = DPLipModel(
        net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0), constraint=constraints.Spectral()
    )
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=4, sampling="none")
    model.loss(model(torch.randn(4, 4)), torch.tensor([0, 1, 1, 0])).backward()
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in net.named_parameters())
    assert "paths=1" in repr(net)
    assert "alpha=0.5" in repr(Highway([nn.Linear(2, 2)], 0, 0.5))


@pytest.mark.parametrize(
    ("blocks", "options", "words"),
    [
        ([], {}, "a block at least"),
        ([3], {}, "list of modules"),
        (nn.Linear(2, 2), {}, "list of modules"),
        ([nn.Linear(2, 2)], {"alpha": "x"}, "alpha"),
        ([nn.Linear(2, 2)], {"paths": -1}, "paths"),
        ([nn.Linear(2, 2)], {"paths": 1.0}, "paths"),
        ([nn.Linear(2, 2)], {"alpha": 1.5}, "alpha"),
        ([nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))], {}, "Dropout"),
        ([layers.NoiseInjection(0.1, 1.0)], {}, "NoiseInjection"),
    ],
)
def test_bad_blocks_and_numbers_are_refused(blocks: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Highway(blocks, **options)
