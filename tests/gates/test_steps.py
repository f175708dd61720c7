"""Gradient gates of convex potentials: a weight that is read twice, gated by the exact norm of what both uses make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, DPLipModel, constraints, gradient_gated, layers, losses
from clipless_dp.gates import gradient_gated_layer, steps
from clipless_dp.gates.plain import plain_copy
from clipless_dp.layers import convex_potential
from clipless_dp.losses.base import InnerProduct
from tests.gates.test_gradient_gates import (
    BIAS_LIMIT,
    LIMIT,
    SETTINGS,
    any_modes,
    any_sizes,
    assert_close,
    assert_float32_below_the_cap,
    assert_gated_one_by_one,
    backward,
    one_by_one,
    signals,
)
from tests.soundness.attack import Record, add_or_remove_one, wrap
from tests.soundness.mutation import Mutant

STEPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vector": (lambda: layers.ConvexPotential(5), (5,)),
    "vector, narrow, no bias": (lambda: layers.ConvexPotential(6, 2, bias=False), (6,)),
    "one token": (lambda: layers.ConvexPotential(4, 7), (1, 4)),
    "few tokens": (lambda: layers.ConvexPotential(6, 8), (3, 6)),
    "many tokens": (lambda: layers.ConvexPotential(3), (4, 5, 3)),
    "map": (lambda: layers.ConvexPotentialConv2d(2, 3, 4), (2, 5, 6)),
    "map, even kernel, no bias": (lambda: layers.ConvexPotentialConv2d(3, 4, 2, padding=0, bias=False), (3, 5, 7)),
    "map, single pixels, wide padding": (lambda: layers.ConvexPotentialConv2d(2, 1, 3, padding=2), (2, 4, 3)),
    "map, strided": (lambda: layers.ConvexPotentialConv2d(2, 3, 4, stride=2), (2, 6, 7)),
    "map, windows that do not overlap": (lambda: layers.ConvexPotentialConv2d(2, 2, 3, padding=0, stride=2), (2, 5, 4)),
    "map, gaps between windows": (lambda: layers.ConvexPotentialConv2d(2, 2, 3, padding=1, stride=3), (2, 7, 5)),
    "map smaller than its kernel": (lambda: layers.ConvexPotentialConv2d(2, 5), (2, 2, 2)),
}
every_step = pytest.mark.parametrize("name", STEPS)
both_modes = pytest.mark.parametrize("mode", ["clip", "normalize"])


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape = STEPS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = build().double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layer, shape


@every_step
@both_modes
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_sum_is_that_of_gradients_gated_one_by_one_and_the_cotangent_is_untouched(
    name: str, mode: Any, chunk: int | None
) -> None:
    gate, values, cotangents = assert_gated_one_by_one(*built(name), mode, chunk)
    assert all(not bool(value.any()) for value in backward(gate, values[:0], cotangents[:0])[1].values())


@every_step
@both_modes
@pytest.mark.parametrize("joint", [None, "layer", "network"])
def test_run_sample_by_sample_it_is_one_use_behind_one_gate_with_the_same_sums(
    name: str, mode: Any, joint: Any
) -> None:
    layer, shape = built(name)
    values, cotangents = signals(layer, shape)
    net = gradient_gated(nn.Sequential(layer), limit=LIMIT, mode=mode, floor=0.01, isolation="vmap", joint=joint)
    loss = InnerProduct(1e9)
    model = DPLipModel(net, input_shape=shape, loss=loss)
    model.loss(model(values), cotangents).backward()
    found = {key.rpartition(".")[2]: value.grad for key, value in net.named_parameters()}
    total = {key: torch.zeros_like(value) for key, value in layer.named_parameters()}
    for row in range(len(values)):
        own = backward(layer, values[[row]], cotangents[[row]])[1]
        sizes = {key: float(one.norm()) for key, one in own.items()}
        if joint is not None:
            sizes = dict.fromkeys(sizes, math.hypot(*sizes.values()))
        for key, one in own.items():
            total[key] += one * LIMIT / max(sizes[key], LIMIT * (0.01 if mode == "normalize" else 1.0))
    assert_close(found, total, 1e-10)
    # Two uses would have two gates, and twice the cap.
    # The rule's rounding is that of float32.
    assert all(bound <= LIMIT * (1.0 + 1e-3) for bound in model.sensitivity().per_parameter.values())


@given(
    features=st.integers(1, 7),
    hidden=st.integers(1, 7),
    positions=st.lists(st.integers(1, 4), max_size=2),
    aligned=st.sampled_from([0.0, 1.0, -1.0]),
    mode=st.sampled_from(["clip", "normalize"]),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_any_sizes_gate_each_sample_however_both_uses_add_up_or_cancel(
    features: int, hidden: int, positions: list[int], aligned: float, mode: Any, batch: int, seed: int
) -> None:
    layer = layers.ConvexPotential(features, hidden).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    values, cotangents = signals(layer, (*positions, features), batch, seed)
    # Along the input both uses are nearly parallel, or opposite.
    cotangents = cotangents + aligned * values * float(cotangents.norm())
    gate = gradient_gated_layer(layer, mode=mode, **SETTINGS)
    assert_close(backward(gate, values, cotangents)[1], one_by_one(layer, values, cotangents, mode), 1e-10)
    for row in range(batch):
        for key, one in backward(gate, values[[row]], cotangents[[row]])[1].items():
            assert float(one.norm()) <= (BIAS_LIMIT if key == "bias" else LIMIT) * (1.0 + 1e-12)


@given(
    name=st.sampled_from(sorted(STEPS)),
    mode=any_modes,
    size=any_sizes,
    other=any_sizes,
    cancelling=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_float32_gradients_of_any_size_stay_below_the_cap_and_its_slack(
    name: str, mode: Any, size: float, other: float, cancelling: bool, seed: int
) -> None:
    plain, shape = built(name)
    values, cotangents = signals(plain, shape, 1, seed)
    if cancelling:
        cotangents = -values
    assert_float32_below_the_cap(plain, mode, values * size, cotangents / cotangents.norm() * other)


def test_what_cancels_is_lifted_no_further_than_its_floor() -> None:
    """With ``x = -g`` and ``s = u`` both uses cancel exactly: what is left is rounding of products of size 1e6."""
    gate = gradient_gated_layer(layers.ConvexPotential(4, 3, bias=False), 1.0)
    with torch.no_grad():
        gate.weight.copy_(torch.rand(3, 4))
    values = 1e3 * torch.rand(1, 4)
    # s = Wx and u = Wg: the same vectors, of opposite signs.
    found = backward(gate, values, -values)[1]["weight"]
    assert float(found.norm()) <= 1.0
    gate.set_gate(1.0, mode="clip")
    part = steps.OuterPair((values, values[:, :3]), (-values, values[:, :3]))
    scale = float(values.norm() * values[:, :3].norm())
    assert float(part.norms()) >= 2e-3 * scale
    assert float(part.total(1e-3 / part.norms()).norm()) <= 1e-6


@every_step
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_samples_that_are_not_finite_disturb_no_other(name: str, bad: float) -> None:
    layer, shape = built(name)
    gate = gradient_gated_layer(layer, chunk=4, **SETTINGS)
    values, cotangents = signals(layer, shape)
    expected = backward(gate, values[2:], cotangents[2:])[1]
    values[0].flatten()[1] = bad
    cotangents[1].flatten()[0] = bad
    found = backward(gate, values, cotangents)[1]
    first = backward(gate, values[:1], cotangents[:1])[1]
    for key, value in found.items():
        # A bias may see a finite part of the sample; whatever enters is capped.
        assert bool(value.isfinite().all())
        assert float((value - expected[key]).norm()) <= 2.0 * (BIAS_LIMIT if key == "bias" else LIMIT)
        assert float(first[key].norm()) <= (BIAS_LIMIT if key == "bias" else LIMIT) * (1.0 + 1e-12)
    assert_close({"weight": found["weight"]}, {"weight": expected["weight"] + first["weight"]})


def deep(shape: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    if len(shape) == 1:
        return nn.Sequential(*(layers.ConvexPotential(shape[0], 5) for _ in range(3)), nn.Linear(shape[0], 3)).double()
    parts = [layers.ConvexPotentialConv2d(shape[0], hidden=3) for _ in range(2)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(math.prod(shape), 3)).double()


@both_modes
@pytest.mark.parametrize("shape", [(4,), (2, 4, 3)])
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_no_sample_passes_the_bounds_of_deep_steps_and_one_comes_to_them(
    mode: Any, shape: tuple[int, ...], size: float
) -> None:
    net = deep(shape)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(size * torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    model = wrap(gradient_gated(net, mode=mode, **SETTINGS), shape, input_norm=3.0)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, *shape, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    inputs[1], targets[1] = -1e6 * inputs[0], 1e6 * targets[0]
    record = Record(model)
    for sample, target in zip(inputs, targets, strict=True):
        record.try_(sample, target)
    worst = max(value for key, value in record.worst.items() if "weight" in str(key))
    assert worst <= 1.0 + 1e-6
    assert worst > 0.99
    add_or_remove_one(model, inputs, targets)


def test_depth_costs_four_times_the_input_without_gates_and_its_caps_behind_them() -> None:
    """At norm 1 each of d layers has Δ = 4GX, whatever its neighbours are: 4GX√d in all, against c√d."""
    net = nn.Sequential(*(layers.ConvexPotential(4, bias=False) for _ in range(4)))
    options: dict[str, Any] = {"input_shape": (4,), "input_norm": 1.0, "constraint": constraints.Spectral()}
    loss = InnerProduct(1.0)
    plain = DPLipModel(net, loss=loss, **options).sensitivity()
    assert plain.total == pytest.approx(4.0 * math.sqrt(4.0), rel=1e-3)
    caps = DPLipModel(gradient_gated(net, limit=0.1), loss=loss, **options).sensitivity()
    assert caps.total == pytest.approx(0.1 * math.sqrt(4.0), rel=1e-3)


MUTANTS = {
    "the cross term dropped": ("vector", Mutant("", steps.OuterPair, "norms", " + 2.0 * along * across", "")),
    "one of the two uses": ("vector", Mutant("", steps.OuterPair, "total", " + (self._c * column).t() @ self._d", "")),
    "the slopes of the ReLU": ("vector", Mutant("", steps, "returned", "hidden > 0.0", "hidden >= 0.0")),
    "positions of one use only": (
        "few tokens",
        Mutant("", steps, "_weight_part", "zip(first, second", "zip(first, first"),
    ),
    "windows in both maps": ("map", Mutant("", steps, "one_below_the_other", "new_zeros", "new_ones")),
    "sizes on one side only": (
        "few tokens",
        Mutant("", steps, "balanced", "cotangents * per_sample", "cotangents + 0.0 * per_sample"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, mutant = MUTANTS[name]
    layer, shape = built(case)
    gate = gradient_gated_layer(layer, mode="normalize", **SETTINGS)
    values, cotangents = signals(layer, shape)
    expected = one_by_one(layer, values, cotangents, "normalize")
    assert_close(backward(gate, values, cotangents)[1], expected)
    mutant.apply(monkeypatch)
    # The layer has it by its own name.
    monkeypatch.setattr(convex_potential, "returned", steps.returned)
    with pytest.raises(AssertionError):
        assert_close(backward(gate, values, cotangents)[1], expected)


def test_without_the_cross_term_a_gradient_passes_its_cap_by_the_root_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``s ∥ u`` and ``g ∥ x`` the norm is the sum of both terms, and not the root of their squares."""
    layer = layers.ConvexPotential(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    gate = gradient_gated_layer(layer, 0.5, mode="clip")
    values = torch.ones(1, 3)
    assert float(backward(gate, values, values)[1]["weight"].norm()) == pytest.approx(0.5, rel=1e-4)
    Mutant("", steps.OuterPair, "norms", " + 2.0 * along * across", "").apply(monkeypatch)
    assert float(backward(gate, values, values)[1]["weight"].norm()) == pytest.approx(0.5 * math.sqrt(2.0), rel=1e-4)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 3)])
def test_gated_steps_train_are_described_and_exported_as_the_plain_ones(shape: tuple[int, ...]) -> None:
    net = deep(shape).float()
    caps = gradient_gated(net, limit=0.1, bias_limit=0.2)
    model = DPLipModel(caps, input_shape=shape, input_norm=1.0, loss=losses.TauCrossEntropy(3.0))
    assert "limit=0.1, bias_limit=0.2, mode='normalize'" in repr(caps)
    inputs = torch.randn(4, *shape)
    torch.testing.assert_close(plain_copy(caps)(inputs), net(inputs))
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=4, sampling="none")
    model.loss(model(inputs), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in net.named_parameters())


def test_no_sample_s_gradient_of_a_vector_is_ever_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gates.test_gradient_gates import Largest

    gate = gradient_gated_layer(layers.ConvexPotential(30, 20), 1.0)
    output = gate(torch.randn(16, 30))
    with Largest() as largest:
        torch.autograd.grad(output, gate.weight, torch.randn_like(output))
    # The batch is 16 × 30, the weight 20 × 30, and all samples' gradients would be 16 × 20 × 30.
    assert largest.entries == 20 * 30


@pytest.mark.slow
def test_compiled_steps_gate_as_they_do_uncompiled() -> None:
    for name in ("vector", "few tokens", "map"):
        layer, shape = built(name)
        gate = gradient_gated_layer(layer, **SETTINGS)
        values, cotangents = signals(layer, shape, 3)
        expected = backward(gate, values, cotangents)[1]
        run: Any = torch.compile(gate, backend="aot_eager")
        found: tuple[Tensor, ...] = torch.autograd.grad(run(values), list(gate.parameters()), cotangents)
        assert_close(dict(zip(expected, found, strict=True)), expected)


@both_modes
@pytest.mark.parametrize("joint", [None, "layer"])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6])
def test_neighbouring_tokens_that_are_nearly_alike_pass_no_cap_whatever_the_size_of_values(
    mode: Any, joint: Any, size: float
) -> None:
    # Their gradient is what products of norms have lost, which is in proportion to what arrives, not to ‖g‖.
    torch.manual_seed(0)
    layer = layers.ConvexPotential(128)
    with torch.no_grad():
        layer.weight.mul_(10.0 / torch.linalg.matrix_norm(layer.weight, 2))
    net = gradient_gated(nn.Sequential(layer), limit=0.01, mode=mode, joint=joint)
    model = wrap(net, (2, 128), input_norm=size)
    bounds = model.sensitivity()
    for apart in (1e-2, 1e-3, 1e-4):
        token, cotangent = nn.functional.normalize(torch.randn(2, 1, 128), dim=2)
        values = torch.cat([token, token * (1.0 + apart)]).unsqueeze(0).reshape(1, 2, 128) * size / 1.5
        cotangents = torch.cat([cotangent, -cotangent]).reshape(1, 2, 128) / 1.5
        model.zero_grad()
        model(values).backward(cotangents)
        squares = sum(float(one.grad.double().square().sum()) for one in model.net.parameters() if one.grad is not None)
        assert math.sqrt(squares) <= bounds.total * (1.0 + 1e-5)


@pytest.mark.parametrize("joint", [None, "layer"])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_transposed_convolution_releases_its_whole_cap_however_large_cotangents_are(joint: Any, size: float) -> None:
    torch.manual_seed(0)
    net = gradient_gated(nn.Sequential(nn.ConvTranspose2d(3, 2, 3, stride=2, bias=False)), limit=1e-4, joint=joint)
    model = wrap(net.double(), (3, 4, 4), input_norm=1e5, cotangent_norm=1e5)
    outputs = model(torch.randn(1, 3, 4, 4, dtype=torch.float64))
    outputs.backward(torch.randn_like(outputs) * size)
    (gradient,) = (one.grad for one in model.net.parameters())
    assert gradient is not None
    assert float(gradient.norm()) == pytest.approx(1e-4, rel=1e-6)
