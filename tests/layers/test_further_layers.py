"""Layers of neighbouring libraries: no attack passes their bounds, and they compute what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import ConfigurationError, InputError, UnsupportedModuleError, layers
from clipless_dp.constraints import OrthogonalConvolution, Spectral
from clipless_dp.norms import coverage, padded_copies
from clipless_dp.rules import activations, conv, graph, pooling
from clipless_dp.testing import BoundBroken
from tests.rules.test_rules import numbers, numbers_are_those_of
from tests.soundness.attack import Case, Traced, attack, wrap
from tests.soundness.cases import OneCase
from tests.soundness.mutation import Mutant


def _function(name: str, function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (4,), **options: Any) -> Case:
    return Case(name, lambda: Traced(function), shape, **options)


CASES = (
    Case("ReLU6 that saturates", nn.ReLU6, (4,), input_norm=20.0),
    Case("hard tanh", nn.Hardtanh, (4,), input_norm=3.0),
    Case("hard tanh away from zero", lambda: nn.Hardtanh(1.0, 2.0), (4,)),
    Case("softsign", nn.Softsign, (4,), input_norm=3.0),
    Case("soft shrinkage", lambda: nn.Softshrink(0.1), (4,)),
    Case("tanh shrinkage", nn.Tanhshrink, (4,), input_norm=9.0),
    Case("sigmoid", nn.Sigmoid, (4,), input_norm=3.0),
    Case("hard sigmoid", nn.Hardsigmoid, (4,)),
    Case("log-sigmoid", nn.LogSigmoid, (4,), input_norm=3.0),
    Case("ELU", nn.ELU, (4,)),
    Case("ELU, alpha 3", lambda: nn.ELU(-3.0), (4,)),
    Case("CELU", lambda: nn.CELU(0.5), (4,)),
    Case("SELU", nn.SELU, (4,)),
    Case("concatenated ReLU", layers.ConcatReLU, (3, 2)),
    Case("concatenated ReLU of tokens", lambda: layers.ConcatReLU(-1), (3, 2)),
    Case("concatenated residual", lambda: layers.ConcatResidual(nn.Linear(4, 3)), (4,)),
    Case("biases of channels", lambda: layers.ChannelBias(3), (3, 2, 2), attained=(("layer.bias", 0.999),)),
    Case("biases of tokens' channels", lambda: layers.ChannelBias(3, -1), (2, 3), attained=(("layer.bias", 0.999),)),
    Case("centering with biases", lambda: layers.BiasedCentering(2, (-2, -1)), (2, 3, 3)),
    Case("L2-norm pooling of signals", lambda: layers.L2NormPool1d(3, 2, 1), (2, 7)),
    Case("adaptive L2-norm pooling of signals", lambda: layers.AdaptiveL2NormPool1d(3), (1, 7)),
    Case("global L2-norm pooling", layers.AdaptiveL2NormPool2d, (2, 3, 3)),
    Case("adaptive L2-norm pooling upwards", lambda: layers.AdaptiveL2NormPool2d((5, 2)), (1, 3, 5)),
    Case("max pooling of signals", lambda: nn.MaxPool1d(3, 1), (2, 6)),
    Case("max pooling of volumes", lambda: nn.MaxPool3d(2, (1, 2, 2)), (1, 3, 4, 4)),
    Case("average pooling of signals", lambda: nn.AvgPool1d(3, 2, 1), (2, 7)),
    Case("adaptive average pooling of signals", lambda: nn.AdaptiveAvgPool1d(3), (1, 7)),
    Case("average pooling of volumes", lambda: nn.AvgPool3d(2), (1, 2, 4, 4)),
    Case("symmetric padding", lambda: layers.SymmetricPad2d((2, 0, 1, 1)), (1, 3, 3)),
    Case("symmetric padding of signals", lambda: layers.SymmetricPad1d(2), (2, 2)),
    Case("reflection", lambda: nn.ReflectionPad2d(2), (1, 3, 4)),
    Case("replication", lambda: nn.ReplicationPad1d((0, 3)), (1, 3)),
    Case("circular padding", lambda: nn.CircularPad2d(1), (1, 3, 3)),
    Case("zero padding", lambda: nn.ZeroPad2d((1, 0, 2, 1)), (1, 3, 3)),
    Case("reflecting conv 3×3", lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 6, 6)),
    Case("reflecting conv 5×5, 3×3 map", lambda: nn.Conv2d(1, 1, 5, padding=2, padding_mode="reflect"), (1, 3, 3)),
    Case("replicating conv 3×3", lambda: nn.Conv2d(1, 2, 3, 2, padding=1, padding_mode="replicate"), (1, 5, 5)),
    Case("replicating conv, one pixel", lambda: nn.Conv1d(1, 1, 5, padding="same", padding_mode="replicate"), (1, 1)),
    _function("functional activations", lambda x: functional.relu6(torch.sigmoid(x)) - functional.softsign(x)),
    _function("functional ranges", lambda x: functional.hardtanh(x, 0.1, 0.4) + x.clamp(max=0.2) + torch.clamp(x, 0.3)),
    _function("functional shrinkage", lambda x: functional.softshrink(x, 0.1) + functional.tanhshrink(x)),
    _function("functional log-sigmoid", functional.logsigmoid),
    _function("sum over an axis", lambda x: x.sum(1) + torch.sum(x, (1,)), (4, 2)),
    _function("slices", lambda x: x[:, 1:3, None] - x[..., :2, None] + x[:, ::2, None], (4,)),
    _function("a column", lambda x: x[..., 1] + torch.select(x, 2, 0), (3, 2)),
    _function("narrow", lambda x: x.narrow(1, 1, 2) + torch.narrow(x, -1, 0, 2)),
    _function("chunks", lambda x: torch.relu(x.chunk(2, 1)[0]) - x.chunk(2, dim=1)[1]),
    _function("pieces", lambda x: torch.cat([torch.split(x, [1, 3], 1)[1], x.unbind(1)[0].unsqueeze(1)], 1)),
    _function("functional padding", lambda x: functional.pad(x, (1, 1), mode="replicate"), (1, 3)),
    _function("functional zero padding", lambda x: functional.pad(x, (1, 0)), (2, 3)),
)


def _one_in_four() -> list[Any]:
    """One in four by default: what follows speaks of all of them in numbers."""
    return [pytest.param(case, marks=[pytest.mark.slow] * bool(place % 4)) for place, case in enumerate(CASES)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("case", _one_in_four(), ids=lambda case: case.name)
class TestEveryFurtherLayer(OneCase):
    steps = 2

    @pytest.mark.slow
    def test_the_bounds_hold_for_signals_of_other_sizes(self) -> None:
        super().test_the_bounds_hold_for_signals_of_other_sizes()


R2, R3 = math.sqrt(2.0), math.sqrt(3.0)

# (layer, shape, Y for X = 3, K), by hand.
TABLE: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], float, float], ...] = (
    ("sigmoid of 4", nn.Sigmoid, (4,), 1.75, 0.25),
    ("sigmoid of 1", nn.Sigmoid, (1,), 1.0, 0.25),
    ("hard sigmoid of 4", nn.Hardsigmoid, (4,), 1.5, 1.0 / 6.0),
    ("softsign of 4", nn.Softsign, (4,), 2.0, 1.0),
    ("hard tanh of 4", nn.Hardtanh, (4,), 2.0, 1.0),
    ("hard tanh off zero", lambda: nn.Hardtanh(1.0, 9.0), (4,), 5.0, 1.0),
    ("hard tanh below zero", lambda: nn.Hardtanh(-9.0, -1.0), (4,), 5.0, 1.0),
    ("ReLU6", nn.ReLU6, (4,), 3.0, 1.0),
    ("soft shrinkage", nn.Softshrink, (4,), 3.0, 1.0),
    ("tanh shrinkage", nn.Tanhshrink, (4,), 3.0, 1.0),
    ("log-sigmoid of 4", nn.LogSigmoid, (4,), 3.0 + 2.0 * math.log(2.0), 1.0),
    ("ELU", lambda: nn.ELU(0.5), (4,), 3.0, 1.0),
    ("steep ELU", lambda: nn.ELU(-2.0), (4,), 6.0, 2.0),
    ("CELU", lambda: nn.CELU(9.0), (4,), 3.0 + 3.6e-7, 1.0 + 1.2e-7),
    ("SELU", nn.SELU, (4,), 3.0 * 1.7580993, 1.7580993),
    ("concatenated ReLU", layers.ConcatReLU, (4,), 3.0, 1.0),
    ("concatenated residual", lambda: layers.ConcatResidual(nn.LeakyReLU(3.0)), (4,), 3.0 * math.sqrt(10.0), 4.0),
    ("global norm pooling", layers.AdaptiveL2NormPool2d, (2, 5, 5), 3.0, 1.0),
    ("norm pooling 7 to 3", lambda: layers.AdaptiveL2NormPool1d(3), (2, 7), 3.0 * R2, R2),
    ("norm pooling 2 to 5", lambda: layers.AdaptiveL2NormPool1d(5), (2, 2), 3.0 * R3, R3),
    ("global average of 25", lambda: nn.AdaptiveAvgPool1d(1), (2, 25), 0.6, 0.2),
    ("max pooling of signals", lambda: nn.MaxPool1d(4, 1), (1, 9), 6.0, 2.0),
    ("replication by 3", lambda: nn.ReplicationPad1d(3), (1, 5), 6.0, 2.0),
    ("reflection", lambda: nn.ReflectionPad2d(1), (1, 5, 5), 6.0, 2.0),
    ("symmetric", lambda: layers.SymmetricPad1d(1), (1, 5), 3.0 * R2, R2),
    ("zeros", lambda: nn.ZeroPad2d(1), (1, 5, 5), 3.0, 1.0),
    ("sum of 4", lambda: Traced(lambda x: x.sum(-1)), (3, 4), 6.0, 2.0),
    ("slice", lambda: Traced(lambda x: x[:, 1:]), (4,), 3.0, 1.0),
)


@pytest.mark.parametrize("alpha", [1e-2, 1.0, 9.0, 1e-30, 1e30])
def test_the_slope_of_celu_holds_as_torch_rounds_it(alpha: float) -> None:
    layer = nn.CELU(alpha)
    values = (-alpha * torch.logspace(-12, 1, 200, dtype=torch.float64)).requires_grad_()
    (slopes,) = torch.autograd.grad(layer(values).sum(), values)
    assert float(slopes.max()) <= 2.0 * numbers(layer, (200,))[1]
    for far in (1e-44, 1e38):
        with pytest.raises(UnsupportedModuleError, match="alpha"):
            numbers(nn.CELU(far), (4,))


test_the_rules_numbers_are_those_by_hand = numbers_are_those_of(TABLE, below=1e-7, above=1e-7)


def test_a_bias_of_channels_adds_the_root_of_its_positions() -> None:
    layer = layers.ChannelBias(2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([3.0, 4.0]))
    reached, passed = numbers(layer, (2, 3, 3))
    assert reached == pytest.approx(3.0 + 3.0 * 5.0, rel=1e-8)
    assert passed == pytest.approx(0.5, rel=1e-8)
    model = wrap(layers.ChannelBias(2).double(), (2, 3, 3), input_norm=3.0, cotangent_norm=0.5)
    assert model.sensitivity().per_parameter == pytest.approx({"bias": 1.5}, rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    mode=st.sampled_from(["reflect", "replicate", "circular"]),
)
def test_coverage_and_copies_are_counts_of_what_torch_reads(
    size: tuple[int, int], kernel: int, stride: int, padding: int, mode: str
) -> None:
    padding = min(padding, min(size) - 1)
    if kernel > min(size) + 2 * padding:
        return
    values = torch.ones(1, 1, *size, dtype=torch.float64, requires_grad=True)
    padded = functional.pad(values, (padding,) * 4, mode=mode)
    (copies,) = torch.autograd.grad(padded.sum(), values, retain_graph=True)
    (reads,) = torch.autograd.grad(functional.unfold(padded, kernel, stride=stride).sum(), values)
    assert padded_copies(size, ((padding, padding),) * 2, mode) == int(copies.max())
    assert coverage(size, (kernel, kernel), stride=stride, padding=padding, padding_mode=mode) == int(reads.max())


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, 2])
def test_the_norm_of_a_copying_convolution_is_above_the_truth_and_within_the_padding_s_own(
    mode: str, padding: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3, padding=padding, padding_mode=mode, bias=False).double()
    matrix = torch.func.jacrev(layer)(torch.zeros(1, 1, 4, 4, dtype=torch.float64)).detach()
    truth = float(torch.linalg.svdvals(matrix.reshape(-1, 16))[0])
    passed = numbers(layer, (1, 4, 4))[1] / 0.5
    copies = padded_copies((4, 4), ((padding, padding),) * 2, mode)
    assert truth <= passed <= math.sqrt(copies) * 1.5 * truth


@pytest.mark.parametrize("constraint", [Spectral(0.9), OrthogonalConvolution(0.9)], ids=["spectral", "orthogonal"])
def test_a_constraint_limits_a_reflecting_convolution_as_a_whole(constraint: Spectral) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", bias=False).double()
    nn.init.normal_(layer.weight, std=3.0)
    wrap(nn.Sequential(layer), (2, 4, 4), constraint=constraint)
    matrix = torch.func.jacrev(layer)(torch.zeros(1, 2, 4, 4, dtype=torch.float64)).detach().reshape(-1, 32)
    assert 0.2 < float(torch.linalg.svdvals(matrix)[0]) <= 0.9 * (1.0 + 1e-9)


def test_adaptive_norm_pooling_is_the_norm_of_the_windows_of_torchs_average() -> None:
    values = torch.randn(3, 2, 7, 5, dtype=torch.float64)
    for size in (1, 2, 3, (9, 4)):
        found = layers.AdaptiveL2NormPool2d(size)(values)
        made = (size, size) if isinstance(size, int) else size
        counts = [[-(-(i + 1) * n // m) - i * n // m for i in range(m)] for n, m in zip((7, 5), made, strict=True)]
        windows = torch.tensor(counts[0])[:, None] * torch.tensor(counts[1])[None, :]
        expected = (functional.adaptive_avg_pool2d(values.square(), size) * windows).sqrt()
        assert torch.allclose(found, expected, atol=1e-6)  # the module's own ε
        assert bool((found <= expected).all())


def test_symmetric_padding_is_numpys() -> None:
    values = torch.arange(12.0).reshape(1, 1, 3, 4)
    found = layers.SymmetricPad2d((1, 2, 3, 0))(values)
    expected = np.pad(values[0, 0].numpy(), ((3, 0), (1, 2)), mode="symmetric")
    assert found[0, 0].tolist() == expected.tolist()


def test_concatenated_halves_keep_the_norm_and_differences_never_grow() -> None:
    first, second = torch.randn(2, 50, 4, dtype=torch.float64)
    left, right = layers.ConcatReLU()(first), layers.ConcatReLU()(second)
    assert torch.allclose(left.norm(dim=1), first.norm(dim=1), rtol=1e-13)  # 8 squares
    assert bool(((left - right).norm(dim=1) <= (first - second).norm(dim=1) * (1.0 + 1e-12)).all())


REFUSED: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...], str], ...] = (
    ("an offset in place", lambda: nn.Hardtanh(1.0, 2.0, inplace=True), (4,), "inplace=False"),
    ("a steep ELU in place", lambda: nn.ELU(2.0, inplace=True), (4,), "inplace=False"),
    ("SELU in place", lambda: nn.SELU(inplace=True), (4,), "inplace=False"),
    ("a CELU that grows", lambda: nn.CELU(-1.0), (4,), "no positive number"),
    ("padding by ones", lambda: nn.ConstantPad2d(1, 1.0), (1, 3, 3), "pad by 0"),
    ("padding by ones, functional", lambda: Traced(lambda x: functional.pad(x, (1, 1), value=1.0)), (1, 3), "pad by 0"),
    ("padding of channels", lambda: Traced(lambda x: functional.pad(x, (0, 0, 1, 1))), (2, 3), "pad module"),
    ("joining samples", lambda: layers.ConcatReLU(-2), (4,), "batch axis"),
    ("a slice of the batch", lambda: Traced(lambda x: x[:5]), (4,), "full slice"),
    ("a slice of the batch, ellipsis", lambda: Traced(lambda x: x.sum(1)[..., :5]), (4,), "full slice"),
    ("a sample", lambda: Traced(lambda x: x[0]), (4,), "batch"),
    ("an entry that is taken twice", lambda: Traced(lambda x: x[:, [0, 0]]), (4,), "repeat"),
    ("a mask", lambda: Traced(lambda x: x[:, True]), (4,), "repeat"),
    ("a narrow batch", lambda: Traced(lambda x: x.narrow(-2, 0, 2)), (4,), "batch axis"),
    ("chunks of the batch", lambda: Traced(lambda x: x.chunk(1)[0]), (4,), "batch axis"),
    ("a tuple of pieces", lambda: Traced(lambda x: torch.cat(x.chunk(2, 1), 1)), (4,), "chunk"),
    ("a sum of another dtype", lambda: Traced(lambda x: x.sum(1, dtype=torch.float64)), (4,), "dtype"),
    ("a range of values", lambda: Traced(lambda x: torch.clamp(x, x - 1.0)), (4,), "numbers"),
    ("an empty range", lambda: Traced(lambda x: x.clamp(1.0, 0.0)), (4,), "empty"),
)


@pytest.mark.parametrize(("name", "build", "shape", "message"), REFUSED, ids=[line[0] for line in REFUSED])
def test_what_has_no_bound_is_refused(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UnsupportedModuleError, match=message):
        wrap(nn.Sequential(nn.Identity(), build()).double(), shape)


def test_layers_refuse_what_they_cannot_take_before_they_compute() -> None:
    for build in (lambda: layers.ConcatReLU(0), lambda: layers.ChannelBias(3, 0), lambda: layers.ChannelBias(0)):
        with pytest.raises(ConfigurationError):
            build()
    for wrong in (lambda: layers.AdaptiveL2NormPool1d(0), lambda: layers.SymmetricPad1d(-1)):
        with pytest.raises(ConfigurationError):
            wrong()
    with pytest.raises(ConfigurationError, match="batch axis"):
        layers.ConcatResidual(nn.Identity(), 0)
    with pytest.raises(InputError, match="channels"):
        layers.ChannelBias(3)(torch.zeros(2, 4))
    with pytest.raises(InputError, match="wider"):
        layers.SymmetricPad1d(3)(torch.zeros(1, 1, 2))
    with pytest.raises(InputError, match="height, width"):
        layers.AdaptiveL2NormPool2d()(torch.zeros(2, 4, 4))


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


MUTANTS: tuple[tuple[Mutant, str], ...] = (
    (Mutant("a sigmoid of slope 1/5", activations, "sigmoid_rule", "0.25,", "0.2,"), "sigmoid"),
    (Mutant("a start at zero", activations, "log_sigmoid_rule", "math.log(2.0)", "0.0"), "log-sigmoid"),
    (Mutant("a negative alpha", activations, "elu_rule", "float(module.alpha)", "1.0"), "ELU, alpha 3"),
    (
        Mutant("√P forgotten", activations, "channel_bias_rule", '{"bias": math.sqrt(positions)}', '{"bias": 1.0}'),
        "biases of channels",
    ),
    (Mutant("copies forgotten", conv, "convolution_rule", "copies=copies", "copies=1"), "replicating conv, one pixel"),
    (
        Mutant("√n forgotten", graph, "entries_sum_function_rule", "math.sqrt(entries)", "entries**0.25"),
        "sum over an axis",
    ),
    (
        Mutant("overlaps forgotten", pooling, "adaptive_l2_norm_pool_rule", "max(map(reads.count, set(reads)))", "1"),
        "adaptive L2-norm pooling upwards",
    ),
)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("mutant", "name"), MUTANTS, ids=[mutant.name for mutant, _ in MUTANTS])
def test_mutant_caught_by_the_attack(mutant: Mutant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises(BoundBroken):
        attack(case_named(name), steps=8)
