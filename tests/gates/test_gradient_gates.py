"""Gradient gates cap each sample's own gradient of one parameter, exactly, and leave everything else alone."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipless_dp import ConfigurationError, DPLipModel, gated, gradient_gated, losses
from clipless_dp.gates import (
    GateMode,
    GradientGated,
    GradientGatedConv2d,
    GradientGatedLinear,
    gradient_gated_layer,
    gradient_layers,
    rounding_slack,
)
from clipless_dp.gates import convolutions as gated_kernels
from clipless_dp.gates import gradient as gated_sums
from tests.soundness.attack import Record, add_or_remove_one, per_sample_gradients, wrap
from tests.support import no_certificates

LIMIT, BIAS_LIMIT, FLOOR = 0.5, 0.3, 0.01
SETTINGS: dict[str, Any] = {"limit": LIMIT, "bias_limit": BIAS_LIMIT, "floor": FLOOR}

# Layers and the shape of one sample: both ways of computing a norm, groups, strides, dilation and every padding.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vector": (lambda: nn.Linear(4, 3), (4,)),
    "vector, no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "few tokens": (lambda: nn.Linear(8, 9), (2, 8)),
    "many tokens": (lambda: nn.Linear(3, 4), (2, 5, 3)),
    "map": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    "map of one pixel": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 1, 1)),
    "strides, dilation": (lambda: nn.Conv2d(1, 2, (2, 3), stride=(2, 1), padding=(1, 2), dilation=2), (1, 7, 6)),
    "few positions": (lambda: nn.Conv2d(4, 6, 3), (4, 4, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "groups, few positions": (lambda: nn.Conv2d(8, 12, 3, groups=2), (8, 4, 3)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (3, 4, 4)),
    "whole vectors": (lambda: nn.Conv2d(8, 16, 3, padding=1), (8, 5, 6)),
    "whole vectors, groups, dilation": (
        lambda: nn.Conv2d(16, 16, (2, 3), groups=2, dilation=2, bias=False),
        (16, 6, 8),
    ),
    "same": (lambda: nn.Conv2d(2, 2, (4, 3), padding="same"), (2, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", stride=2), (2, 6, 6)),
    "signal": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 4)),
    "transposed, wide steps": (lambda: nn.ConvTranspose2d(2, 4, 2, dilation=3, output_padding=2, groups=2), (2, 3, 3)),
    "transposed signal": (lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, bias=False), (3, 5)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
every_layer = pytest.mark.parametrize("name", LAYERS)
both_modes = pytest.mark.parametrize("mode", ["clip", "normalize"])


def built(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double(), shape


def signals(layer: nn.Module, shape: tuple[int, ...], batch: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and cotangents whose gradients lie below the floor, between, and far above the caps."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        made = layer(values)
    cotangents = torch.randn(made.shape, generator=generator, dtype=torch.float64)
    sizes = 10.0 ** torch.linspace(-6.0, 3.0, batch, dtype=torch.float64)
    return values, cotangents * sizes.reshape(-1, *[1] * (made.dim() - 1))


def backward(layer: nn.Module, values: Tensor, cotangents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    values = values.detach().requires_grad_(True)
    names = [name for name, _ in layer.named_parameters()]
    passed, *found = torch.autograd.grad(layer(values), [values, *layer.parameters()], cotangents)
    return passed, dict(zip(names, found, strict=True))


def scaled(gradient: Tensor, limit: float, mode: str, floor: float = FLOOR) -> Tensor:
    norm = float(gradient.norm())
    return gradient * (min(1.0, limit / norm) if mode == "clip" else limit / max(norm, floor * limit))


def one_by_one(layer: nn.Module, values: Tensor, cotangents: Tensor, mode: str) -> dict[str, Tensor]:
    """What per-sample clipping or normalising of torch's own gradients gives."""
    total = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    for index in range(len(values)):
        _, alone = backward(layer, values[index : index + 1], cotangents[index : index + 1])
        for name, gradient in alone.items():
            total[name] += scaled(gradient, BIAS_LIMIT if name == "bias" else LIMIT, mode)
    return total


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    """float64 sums of under 10^3 products round by 10^3·2^-53 ≈ 1e-13 of their terms; the Gram form adds 1e-12."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert float((value - expected[name]).norm()) <= tolerance * max(1.0, float(expected[name].norm())), name


def assert_gated_one_by_one(
    layer: nn.Module, shape: tuple[int, ...], mode: Any, chunk: int | None
) -> tuple[nn.Module, Tensor, Tensor]:
    """The gate with its signals, once sums are those of gradients gated one by one, and cotangents pass untouched."""
    gate = gradient_gated_layer(layer, mode=mode, chunk=chunk, **SETTINGS)
    values, cotangents = signals(layer, shape)
    assert torch.equal(gate(values), layer(values))
    passed, found = backward(gate, values, cotangents)
    expected, _ = backward(layer, values, cotangents)
    # The same matrix products; torch may order them differently for the input's gradient alone.
    assert torch.allclose(passed, expected, rtol=1e-13, atol=1e-13)
    assert_close(found, one_by_one(layer, values, cotangents, mode))
    return gate, values, cotangents


@every_layer
@both_modes
@pytest.mark.parametrize("chunk", [None, 3])
def test_the_sum_is_that_of_gradients_gated_one_by_one_and_the_cotangent_is_untouched(
    name: str, mode: str, chunk: int | None
) -> None:
    assert_gated_one_by_one(*built(name), mode, chunk)


def test_both_ways_of_computing_a_norm_are_among_the_layers_under_test(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: set[tuple[str, bool]] = set()
    prefers_gram = gated_sums.prefers_gram

    def noted(positions: int, inputs: int, outputs: int, gain: float) -> bool:
        answer = prefers_gram(positions, inputs, outputs, gain)
        tokens = gain == gated_sums._TOKEN_GRAM_GAIN
        ways.add(("tokens" if tokens else "groups" if "groups" in name else "map", answer))
        return answer

    for place in (gated_sums, gated_kernels):
        monkeypatch.setattr(place, "prefers_gram", noted)
    for name in LAYERS:
        layer, shape = built(name)
        backward(gradient_gated_layer(layer, 1.0), *signals(layer, shape))
    assert ways == {(kind, answer) for kind in ("tokens", "groups", "map") for answer in (False, True)}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    axes, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 1, 2]))
    transposed = draw(st.booleans())
    kernel, stride, dilation, padding = (
        tuple(draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 3), (1, 3), (1, 2), (0, 2))
    )
    size = [draw(st.integers(max(1, d * (k - 1) + 1), 7)) for k, d in zip(kernel, dilation, strict=True)]
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        kind: Any = nn.ConvTranspose1d if axes == 1 else nn.ConvTranspose2d
        return kind(inputs, outputs, kernel, output_padding=extra, **options).double(), (inputs, *size)
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    return kind(inputs, outputs, kernel, padding=padding, **options).double(), (inputs, *size)


@st.composite
def linear_layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    leading = draw(st.lists(st.integers(1, 4), max_size=2))
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return nn.Linear(inputs, outputs, bias=draw(st.booleans())).double(), (*leading, inputs)


@given(
    layer=st.one_of(convolutions(), linear_layers()),
    mode=st.sampled_from(["clip", "normalize"]),
    batch=st.integers(0, 5),
    chunk=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_any_geometry_gates_each_sample_and_no_single_gradient_passes_its_cap(
    layer: tuple[nn.Module, tuple[int, ...]], mode: str, batch: int, chunk: int | None, seed: int
) -> None:
    plain, shape = layer
    gate = gradient_gated_layer(plain, mode=mode, chunk=chunk, **SETTINGS)
    values, cotangents = signals(plain, shape, batch, seed)
    _, found = backward(gate, values, cotangents)
    assert_close(found, one_by_one(plain, values, cotangents, mode))
    for index in range(batch):
        _, alone = backward(gate, values[index : index + 1], cotangents[index : index + 1])
        for name, gradient in alone.items():
            # Float64 products on top of what the norms certify.
            assert float(gradient.norm()) <= (BIAS_LIMIT if name == "bias" else LIMIT) * (1.0 + 1e-12)


def assert_float32_below_the_cap(plain: nn.Module, mode: Any, values: Tensor, cotangents: Tensor) -> None:
    """For gradients of one sample, of float64 signals, in float32."""
    gate = gradient_gated_layer(plain.float(), mode=mode, **SETTINGS)
    _, found = backward(gate.float(), values.float(), cotangents.float())
    for parameter, gradient in found.items():
        cap = BIAS_LIMIT if parameter == "bias" else LIMIT
        # The rule's slack, and float32 products of under 100 terms: γ_100 ≈ 6e-6.
        slack = rounding_slack(values.numel()) * rounding_slack(cotangents.numel()) * rounding_slack(gradient.numel())
        assert float(gradient.double().norm()) <= cap * slack * (1.0 + 1e-5)


any_modes = st.sampled_from(["clip", "normalize"])
any_sizes = st.sampled_from([1e-30, 1e-19, 1e-9, 1.0, 1e9, 1e17])


@given(name=st.sampled_from(sorted(LAYERS)), mode=any_modes, size=any_sizes, other=any_sizes, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_float32_gradients_of_any_size_stay_below_the_cap_and_its_slack(
    name: str, mode: str, size: float, other: float, seed: int
) -> None:
    plain, shape = built(name)
    values, cotangents = signals(plain, shape, 1, seed)
    assert_float32_below_the_cap(plain, mode, values * size, cotangents / cotangents.norm() * other)


def test_factors_too_small_for_float32_drop_the_sample_rather_than_round_it_above_the_cap() -> None:
    for size in (2.1e17, 5e17, 9e17):
        gate = gradient_gated_layer(nn.Linear(1, 1, bias=False), 1e-8)
        values = torch.full((1, 1), size)
        found = float(backward(gate, values, values)[1]["weight"])
        assert found == 0.0  # 1e-8/4e34 and below are subnormal
        gate.set_gate(1.0)
        # Three roundings of float32.
        assert float(backward(gate, values, values)[1]["weight"]) == pytest.approx(1.0, rel=1e-6)


def gated_net(**options: Any) -> tuple[nn.Module, DPLipModel]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(9, 6),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    return net, wrap(gradient_gated(net, **{**SETTINGS, **options}), (1, 8, 8), input_norm=3.0)


def net_samples(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(count, 3, generator=generator, dtype=torch.float64)


@both_modes
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_no_weight_breaks_the_bounds_of_a_gradient_gated_network(mode: str, size: float) -> None:
    net, model = gated_net(mode=mode)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(size * torch.randn_like(parameter))
    inputs, targets = net_samples()
    inputs[1], targets[1] = -1e6 * inputs[0], 1e6 * targets[0]
    record = Record(model)
    for sample, target in zip(inputs, targets, strict=True):
        record.try_(sample, target)
    if size >= 1.0 or mode == "normalize":
        assert max(record.worst.values()) > 0.5
    add_or_remove_one(model, inputs, targets)


@contextmanager
def mutant(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> Iterator[None]:
    with monkeypatch.context() as patched:
        for place in (gated_sums, gated_kernels, gradient_layers):
            if hasattr(place, name):
                patched.setattr(place, name, value)
        yield


def of_the_batch(norms: Tensor, *, cap: float, floor: float, weights: None = None) -> Tensor:
    """Clips the batch, not its samples."""
    return (cap / norms.norm().clamp(min=floor)).expand_as(norms)


def plain_bias(cotangents: Tensor, sizes: Tensor, limit: float, least: float, weights: None = None) -> Tensor:
    return cotangents.sum(0)


def of_cotangent_alone(
    values: Tensor, cotangents: Tensor, lengths: Tensor, sizes: Tensor, limit: float, least: float, weights: None = None
) -> Tensor:
    factors = limit / sizes.clamp(min=least)
    return (cotangents * factors[:, None]).t() @ values


def summed_by(norms_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor | float, list[Tensor]]]:
    """Sums of gradients with other norms: a function of inputs and cotangents, which broadcasts to their product."""

    def gated_sum(
        chunks: Any, shape: tuple[int, ...], limit: float, least: float, weights: None = None
    ) -> tuple[Any, list[Tensor]]:
        total: Tensor | float = 0.0
        scales = []
        for rows, cotangents, own in chunks:
            scales.append(own)
            factors = limit / norms_of(rows, cotangents).clamp(min=least)
            total = total + (cotangents @ rows * factors).sum(0)
        return total, scales

    return gated_sum


each_group_by_itself = summed_by(lambda rows, cotangents: (cotangents @ rows).flatten(2).norm(dim=2)[..., None, None])


@summed_by
def positions_by_themselves(rows: Tensor, cotangents: Tensor) -> Tensor:
    """Squares are summed over positions, as if no two of them shared a direction."""
    return (rows.norm(dim=3) * cotangents.norm(dim=2)).square().sum((1, 2)).sqrt()[:, None, None, None]


def tokens_by_themselves(values: Tensor, cotangents: Tensor, *rest: Any) -> Tensor:
    return (values.norm(dim=2) * cotangents.norm(dim=2)).norm(dim=1)


def drops_the_rest(
    values: Tensor, cotangents: Tensor, limit: float, least: float, chunk: int, weights: None = None
) -> Tensor:
    whole = len(values) // chunk * chunk
    return TOKENS(values[:whole], cotangents[:whole], limit, least, chunk)


TOKENS = gated_sums.token_weight_gradient

MUTANTS = [
    ("scale_factors", of_the_batch, "map"),
    ("bias_gradient", plain_bias, "vector"),
    ("vector_weight_gradient", of_cotangent_alone, "vector"),
    ("gated_sum", each_group_by_itself, "groups"),
    ("gated_sum", positions_by_themselves, "map"),
    ("gated_sum", positions_by_themselves, "many tokens"),
    ("_token_norms", tokens_by_themselves, "few tokens"),
    ("token_weight_gradient", drops_the_rest, "many tokens"),
]


@both_modes
@pytest.mark.parametrize(("place", "wrong", "name"), MUTANTS)
def test_a_wrong_gate_is_caught(
    place: str, wrong: Callable[..., Any], name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, shape = built(name)
    gate = gradient_gated_layer(layer, mode=mode, chunk=3, **SETTINGS)
    values, cotangents = signals(layer, shape)
    expected = one_by_one(layer, values, cotangents, mode)
    assert_close(backward(gate, values, cotangents)[1], expected)
    with mutant(monkeypatch, place, wrong), pytest.raises(AssertionError):
        assert_close(backward(gate, values, cotangents)[1], expected)


@pytest.mark.parametrize(("place", "wrong"), [("bias_gradient", plain_bias), ("scale_factors", of_the_batch)])
def test_removing_an_outlier_exposes_a_wrong_gate(
    place: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gradient_gated_layer(built("vector")[0], mode="clip", **SETTINGS)
    values = torch.ones(10, 4, dtype=torch.float64)
    cotangents = torch.ones(10, 3, dtype=torch.float64)
    cotangents[-1] *= -1e6

    def largest_excess() -> float:
        full, without = backward(gate, values, cotangents)[1], backward(gate, values[:-1], cotangents[:-1])[1]
        caps = {"weight": LIMIT, "bias": BIAS_LIMIT}
        return max(float((full[name] - without[name]).norm()) / cap for name, cap in caps.items())

    assert largest_excess() == pytest.approx(1.0, rel=1e-9)  # both caps are attained
    with mutant(monkeypatch, place, wrong):
        assert largest_excess() > 1.1


@every_layer
def test_samples_that_are_not_finite_contribute_zero_and_disturb_no_other(name: str) -> None:
    layer, shape = built(name)
    gate = gradient_gated_layer(layer, chunk=4, **SETTINGS)
    values, cotangents = signals(layer, shape)
    expected = backward(gate, values[2:], cotangents[2:])[1]
    if "bias" in expected:
        # The gradient of a bias does not see the input.
        first = backward(gate, values[:1], cotangents[:1])[1]["bias"]
        expected["bias"] = expected["bias"] + first
    for bad in (math.nan, math.inf, 1e200):
        values[0].flatten()[1] = bad
        cotangents[1].flatten()[0] = bad
        assert_close(backward(gate, values, cotangents)[1], expected)


def test_masked_rows_and_rows_of_nan_leave_a_models_gradient_as_it_is() -> None:
    net, model = gated_net()
    inputs, targets = net_samples()
    model.loss(model(inputs[:4]), targets[:4]).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    model.zero_grad()
    inputs[5] = math.nan
    mask = torch.tensor([True, True, True, True, False, True])
    model.loss(model(inputs), targets, mask).backward()
    assert_close({name: p.grad for name, p in net.named_parameters() if p.grad is not None}, expected)


def test_an_empty_batch_and_accumulated_halves_sum_to_the_whole() -> None:
    net, model = gated_net()
    inputs, targets = net_samples()
    model.loss(model(inputs), targets).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 2), slice(2, 6)):
        model.loss(model(inputs[part]), targets[part]).backward()
    assert_close({name: p.grad for name, p in net.named_parameters() if p.grad is not None}, expected)


@every_layer
def test_the_layout_of_memory_does_not_matter(name: str) -> None:
    layer, shape = built(name)
    gate = gradient_gated_layer(layer, **SETTINGS)
    values, cotangents = signals(layer, shape)
    expected = backward(gate, values, cotangents)[1]
    if values.dim() == 4 and isinstance(layer, nn.Conv2d):
        last = backward(gate, *(t.to(memory_format=torch.channels_last) for t in (values, cotangents)))
        assert_close(last[1], expected)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (values, cotangents)]
    assert_close(backward(gate, *strided)[1], expected)


def test_a_layer_that_is_used_twice_has_the_sum_of_both_caps_and_needs_it() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.Identity(), shared).double()
    with torch.no_grad():
        shared.weight.copy_(torch.eye(4))
        shared.bias.zero_()
    model = wrap(gradient_gated(net, **SETTINGS), (4,))
    assert model.sensitivity().per_parameter["0.weight"] == pytest.approx(2.0 * LIMIT, rel=1e-4)
    found = per_sample_gradients(model, torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    assert float(found["0.weight"].norm()) == pytest.approx(2.0 * LIMIT, rel=1e-9)


class Largest(TorchDispatchMode):
    """The largest number of entries of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(40, 50), (20, 40)), (nn.Conv2d(8, 40, 3, padding=1), (8, 8, 8))]
)
def test_no_more_per_sample_gradients_exist_at_once_than_the_chunk_allows(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    values = torch.randn(16, *shape)
    weight = next(layer.parameters())
    for chunk in (1, 3):
        output = gradient_gated_layer(layer, 1.0, chunk=chunk)(values)
        cotangents = torch.randn_like(output)
        with Largest() as largest:
            torch.autograd.grad(output, weight, cotangents)
        # Windows of a chunk are larger than its gradients in the convolution: 72·64 against 72·40.
        of_chunk = chunk * max(weight.numel(), 72 * 64 if weight.dim() == 4 else 0)
        assert largest.entries == max(of_chunk, output.numel(), values.numel())


def test_gates_lift_small_gradients_and_those_that_cancel_no_further_than_their_floor() -> None:
    layer = gradient_gated_layer(nn.Linear(3, 2), 1.0)
    values = torch.ones(1, 4, 3)
    tiny = torch.full((1, 4, 2), 1e-9)
    assert float(backward(layer, values, tiny)[1]["weight"].norm()) <= 1e-6  # 100 · 1e-9·√(3·2)·4
    # The sum over positions vanishes; what is left is rounding of products of size 1e6.
    cotangents = 1e6 * torch.tensor([0.1, 0.7, -0.3, -0.5]).reshape(1, 4, 1).expand(1, 4, 2)
    found = backward(layer, values, cotangents)[1]
    # Float32 products round by 2^-24·1e6·√6·4 ≈ 0.6, the factor is at most 1/(1e-3·‖x‖‖g‖) ≈ 2e-4.
    assert float(found["weight"].norm()) <= 2e-4
    assert float(found["bias"].norm()) <= 2e-4


def test_the_bound_is_the_smaller_of_cap_and_what_is_known_without_a_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_certificates(monkeypatch)
    _, model = gated_net()
    sensitivity = model.sensitivity()
    for name, bound in sensitivity.per_parameter.items():
        # Float32 slack of three norms of under 300 entries.
        assert bound == pytest.approx(BIAS_LIMIT if "bias" in name else LIMIT, rel=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e3)
    assert model.sensitivity() is sensitivity
    assert "inf" not in str(sensitivity)
    net = nn.Sequential(nn.Linear(4, 3))
    # Of gradients of norm 1 and 0.5, against a cap of 100: a gate that clips leaves them, one that normalises lifts
    # them, at most by 1/floor and at most to the cap.
    for settings_, expected in (
        ({"mode": "clip"}, {"0.weight": 1.0, "0.bias": 0.5}),
        ({"floor": 0.5}, {"0.weight": 2.0, "0.bias": 1.0}),
        ({"floor": 0.015}, {"0.weight": 1.0 / 0.015, "0.bias": 0.5 / 0.015}),
        ({"floor": 0.008}, {"0.weight": 100.0, "0.bias": 0.5 / 0.008}),
        ({"floor": 1e-8}, {"0.weight": 100.0, "0.bias": 100.0}),
    ):
        single = wrap(gradient_gated(net, limit=100.0, **settings_), (4,), input_norm=2.0, cotangent_norm=0.5)
        # Float32 slack as above.
        assert single.sensitivity().per_parameter == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mode", ["clip", "normalize"])
@pytest.mark.parametrize("name", LAYERS)
def test_below_its_cap_a_gate_stretches_a_gradient_as_far_as_the_bound_says_and_no_further(
    name: str, mode: GateMode
) -> None:
    """Of one entry and one cotangent, whose gradient norms are the layer's own bounds where nothing overlaps."""
    layer, shape = built(name)
    net = nn.Sequential(layer)
    limit, floor, radius, cotangent_norm = 10.0, 0.05, 0.4, 0.3
    model = wrap(
        gradient_gated(net, limit=limit, mode=mode, floor=floor),
        shape,
        input_norm=radius,
        cotangent_norm=cotangent_norm,
    )
    plain = wrap(nn.Sequential(layer), shape, input_norm=radius, cotangent_norm=cotangent_norm)
    free = plain.sensitivity().per_parameter
    stated = model.sensitivity().per_parameter
    stretch = 1.0 / floor if mode == "normalize" else 1.0
    # Two slacks of float32, of a few hundred entries.
    assert stated == pytest.approx({key: min(limit, stretch * bound) for key, bound in free.items()}, rel=1e-4)
    values = torch.zeros(shape, dtype=torch.float64)
    values.view(-1)[values.numel() // 2] = radius
    size = model.output_shape
    worst = dict.fromkeys(stated, 0.0)
    for place in range(math.prod(size)):
        cotangent = torch.zeros(size, dtype=torch.float64)
        cotangent.view(-1)[place] = cotangent_norm
        for key, gradient in per_sample_gradients(model, values, cotangent).items():
            worst[key] = max(worst[key], float(gradient.norm()) / stated[key])
    # A single entry and a single cotangent reach 1/√N of a bound over windows, 1/√P of one over positions.
    assert all(0.99 / math.sqrt(max(9, math.prod(size))) <= ratio <= 1.0 for ratio in worst.values()), worst


def test_layers_outside_the_pattern_keep_their_own_bounds() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    plain = wrap(net, (4,)).sensitivity()
    partly = wrap(gradient_gated(net, limit=1e-3, layers=["0"]), (4,)).sensitivity()
    for name in ("2.weight", "2.bias"):
        assert partly.per_parameter[name] == plain.per_parameter[name]
    assert partly.per_parameter["0.weight"] == pytest.approx(1e-3, rel=1e-4)


def test_frozen_parameters_get_no_gradient_and_leave_the_sensitivity() -> None:
    net, _ = gated_net()
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    model = wrap(gradient_gated(net, **SETTINGS), (1, 8, 8))
    inputs, targets = net_samples()
    model.loss(model(inputs), targets).backward()
    assert model.sensitivity().per_parameter.keys() == {n for n, p in net.named_parameters() if p.grad is not None}
    assert net[0].weight.grad is None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_a_gradient_gated_network_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    net, model = gated_net(chunk=2)
    inputs, targets = net_samples()
    inputs[2] = math.nan
    model.loss(model(inputs), targets).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(
        lambda inputs, targets: model.loss(model(inputs), targets), fullgraph=True, backend=backend
    )
    compiled(inputs, targets).backward()
    assert len(expected) == 8
    assert_close({name: p.grad for name, p in net.named_parameters() if p.grad is not None}, expected)


class Branches(nn.Module):
    """Tied layers, an unused one and a keyword call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.alias = self.stem
        self.head = nn.Sequential(nn.PReLU(), nn.Linear(4, 3))
        self.unused = nn.Linear(2, 2)

    def forward(self, values: Tensor) -> Tensor:
        stem = self.stem(input=values)
        return self.head(stem + self.alias(stem))  # type: ignore[no-any-return]


def test_names_and_storage_are_the_networks_own_and_the_network_is_left_as_it_was() -> None:
    net = Branches()
    kinds = [type(module) for module in net.modules()]
    result = gradient_gated(net)
    assert [type(module) for module in net.modules()] == kinds
    assert set(result.state_dict()) == set(net.state_dict())
    for name, parameter in net.named_parameters():
        assert result.get_parameter(name) is parameter
    result.load_state_dict(net.state_dict())
    assert isinstance(result.get_submodule("stem"), GradientGatedLinear)
    assert result.get_submodule("alias") is result.get_submodule("stem")
    assert not isinstance(result.get_submodule("unused"), GradientGated)
    wrap(result, (4,)).sensitivity()


def test_gradient_gates_go_with_signal_gates_in_either_order_and_with_later_calls() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    inner = gradient_gated(gradient_gated(net, limit=0.2, layers=["0"]), limit=0.1, layers=["2"], mode="clip")
    for both in (gated(inner), gradient_gated(gated(inner), limit=0.1, layers=["2"])):
        bounds = wrap(both, (4,)).sensitivity().per_parameter
        assert bounds["0.weight"] == pytest.approx(0.2, rel=1e-4)
        assert bounds["2.weight"] == pytest.approx(0.1, rel=1e-4)
    assert [m.limit for m in inner.modules() if isinstance(m, GradientGated)] == [0.2, 0.1]


def test_a_limit_that_is_changed_after_wrapping_changes_the_bound() -> None:
    net, _ = gated_net()
    result = gradient_gated(net, **SETTINGS)
    model = wrap(result, (1, 8, 8))
    before = model.sensitivity().per_parameter["0.weight"]
    result.get_submodule("0").limit = 2.0 * LIMIT  # type: ignore[assignment]
    assert model.sensitivity().per_parameter["0.weight"] == pytest.approx(2.0 * before)


def test_models_with_gradient_gates_are_copied_and_pickled() -> None:
    _, model = gated_net()
    inputs, targets = net_samples()
    model.loss(model(inputs), targets).backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.zero_grad()
        twin.loss(twin(inputs), targets).backward()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)


def test_what_cannot_be_gated_and_values_out_of_range_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    with pytest.raises(ConfigurationError, match=r"matches 'conv\*'"):
        gradient_gated(net, layers=["*", "conv*"])
    with pytest.raises(ConfigurationError, match="matches '1'"):
        gradient_gated(net, layers=["1"])
    with pytest.raises(ConfigurationError, match=r"nn\.Sequential"):
        gradient_gated(nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match="only linear layers"):
        gradient_gated_layer(nn.PReLU(), 1.0)
    for wrong in (
        {"limit": 0.0},
        {"limit": math.inf},
        {"bias_limit": 1e-9},
        {"mode": "scale"},
        {"floor": 0.0},
        {"floor": 2.0},
        {"chunk": 0},
        {"chunk": 1.5},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            gradient_gated(net, **wrong)  # type: ignore[arg-type]


def test_the_loss_of_a_classifier_trains_through_the_gates() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model = DPLipModel(gradient_gated(net), input_shape=(1, 4, 4), input_norm=5.0, loss=losses.TauCrossEntropy(4.0))
    assert isinstance(model.net.get_submodule("0"), GradientGatedConv2d)
    inputs = torch.randn(64, 1, 4, 4)
    targets = (inputs.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(model(inputs), targets).backward()
        for parameter in net.parameters():
            parameter.grad /= 64  # type: ignore[operator]
        optimizer.step()
    assert float((model(inputs).argmax(1) == targets).float().mean()) > 0.9


COMPILED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 3)), (2, 4, 4)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 2), nn.Flatten(), nn.Linear(10, 3)), (2, 4)),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_computes_without_gradients_what_it_does_with_them(name: str, backend: str) -> None:
    make, shape = COMPILED[name]
    torch._dynamo.reset()
    model = DPLipModel(
        gradient_gated(make()), input_shape=shape, input_norm=4.0, loss=losses.TauCrossEntropy(8.0)
    )  # fmt: skip
    inputs, targets = torch.randn(5, *shape), torch.arange(5) % 3
    compiled = torch.compile(model, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(inputs), model(inputs))
    # Passes with gradients have their gates afterwards.
    found = []
    for run in (compiled, model):
        model.loss(run(inputs), targets).backward()
        found.append([parameter.grad.clone() for parameter in model.net.parameters() if parameter.grad is not None])
        model.zero_grad()
    assert len(found[0]) == len([*model.net.parameters()])
    torch.testing.assert_close(*found)
    torch._dynamo.reset()
