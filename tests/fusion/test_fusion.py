"""What a CPU runs in place of the traced graph: the same numbers, from one pass over each activation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from clipless_dp import DPLipModel, PrivacyError, fusion, gated, gradient_gated, layers
from clipless_dp.gates import convolutions, sample_norms
from clipless_dp.model.passes import unwitnessed
from clipless_dp.training.memory import traffic
from tests.soundness.attack import bounds_of, per_sample_gradients, wrap
from tests.soundness.mutation import Mutant, with_each
from tests.support import one_in_two


class Branches(nn.Module):
    """A value with two consumers, and functional ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, values: Tensor) -> Tensor:
        stem = functional.relu(self.stem(values))
        return self.right(torch.relu(self.left(stem)) + stem)  # type: ignore[no-any-return]


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)
    )


def bare() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 20, bias=False), nn.ReLU(), nn.Linear(20, 18), nn.Linear(18, 16, bias=False), nn.ReLU()
    )


def convolutional() -> nn.Module:
    # No maximum: where two entries tie up to rounding, the gradient may go to either.
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3, bias=False),
    )


def pooled() -> nn.Module:
    """Maxima of distinct numbers, or of a ReLU's zeros, which pass nothing back."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 6, 2, stride=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def tiled() -> nn.Module:
    """Poolings that run in one with the layers before and behind them, ReLUs on either side of them, rows left over."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.MaxPool2d((1, 3)),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.MaxPool2d(2, 2, 0),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5), nn.Flatten(), nn.Linear(15, 3))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 16), nn.ReLU(), nn.Linear(16, 3))


def capped() -> nn.Module:
    """Gradient gates and signal gates, alone and together."""
    net = nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 18, bias=False), nn.ReLU(), nn.Linear(18, 16), nn.Linear(16, 3)
    )
    return gradient_gated(gated(net, layers=["2", "4"], cotangent_norm=0.5), layers=["0", "2", "5"], limit=0.3)


def clipped() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3, bias=False))
    return gradient_gated(net, limit=0.1, bias_limit=0.05, mode="clip")


def capped_maps() -> nn.Module:
    """Gradient gates on maps that are pooled: from whole gradients, and from products of positions."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 48, 4, stride=3, padding=1, groups=2),
        nn.MaxPool2d(2, 1),
        nn.ReLU(),
        nn.Conv2d(48, 4, 1),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return gradient_gated(net, layers=["0", "3", "9"], limit=0.3)


def sequences() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 2, dilation=2), nn.Flatten(), nn.Linear(15, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "dense": (dense, (3, 4), [3]),
    "bare": (bare, (6,), [3]),
    "convolutional": (convolutional, (2, 14, 14), [1, 2, 1]),
    "pooled": (pooled, (1, 9, 9), [1, 1, 1]),
    "tiled": (tiled, (2, 9, 13), [3, 1]),
    "tokens": (tokens, (3, 4), [2, 1]),
    "sequences": (sequences, (2, 9), [2, 1]),
    "branches": (Branches, (5,), [1, 1, 1]),
}
UNGATED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "plain": (plain, (1, 5, 5), [1, 2]),
    "capped": (capped, (6,), [4]),
    "clipped": (clipped, (6,), [2]),
    "capped maps": (capped_maps, (1, 11, 11), [1]),
}
ALL = {**NETWORKS, **UNGATED}
GATES: dict[str, dict[str, Any]] = {
    "sphere": {},
    "ball": {"input_mode": "ball"},
    "normalising": {"cotangent_mode": "normalize", "cotangent_norm": 0.05},
    "wide": {"input_norm": 50.0, "cotangent_norm": 1e12},
}


def model_of(name: str, gates: str = "sphere", dtype: torch.dtype = torch.float64, scale: float = 1.0) -> DPLipModel:
    build, shape, _ = ALL[name]
    torch.manual_seed(0)
    net = build().to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(scale * (torch.randn_like(parameter) if parameter.dim() < 2 else 2.0 * parameter))
    return wrap(gated(net, **GATES[gates]) if name in NETWORKS else net, shape, input_norm=3.0)


def batch_of(model: DPLipModel, rows: int, bad: str = "tail", scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = model.device_and_dtype()[1]
    inputs = scale * torch.randn(rows, *model.input_shape, generator=generator, dtype=dtype)
    inputs[0] = 1e-4 * inputs[0]
    if not any(isinstance(module, nn.MaxPool2d) for module in model.net.modules()):
        # All places of a map of zeros are equal but for rounding, which then decides what is the largest.
        inputs[1] = 0.0
    if bad == "tail":
        inputs[-2:] = math.nan
    elif bad == "middle":
        inputs[2], inputs[-1] = math.inf, math.nan
    return inputs, torch.randn(rows, *model.output_shape, generator=generator, dtype=dtype)


def results(model: DPLipModel, inputs: Tensor, targets: Tensor, *, fused: bool) -> dict[str, Tensor]:
    wanted = {name: p for name, p in model.net.named_parameters() if p.requires_grad}
    wanted |= {"inputs": inputs} if inputs.requires_grad else {}
    output = model(inputs) if fused else model._run(inputs, model.graph.module)
    found = torch.autograd.grad(model.loss(output, targets), list(wanted.values()), materialize_grads=True)
    return {"output": output.detach(), **dict(zip(wanted, found, strict=True))}


def check_agreement(model: DPLipModel, inputs: Tensor, targets: Tensor, tolerance: float, least: float = 0.0) -> None:
    left, right = (results(model, inputs, targets, fused=fused) for fused in (True, False))
    for name, value in left.items():
        expected = right[name]
        assert torch.equal(value.isnan(), expected.isnan()), name
        value, expected = value.nan_to_num(), expected.nan_to_num()
        # By samples where there are samples: a small one must not hide behind a large one, unless it has cancelled.
        rows = (value, expected) if name in ("output", "inputs") else (value.unsqueeze(0), expected.unsqueeze(0))
        difference, size = ((rows[0] - rows[1]).flatten(1).norm(dim=1), rows[1].flatten(1).norm(dim=1))
        assert bool((difference <= tolerance * (size + 1e-2 * size.max()) + least).all()), (name, difference, size)


@pytest.mark.parametrize("name", ALL)
def test_layers_between_gates_run_as_chains_as_long_as_values_have_one_consumer(name: str) -> None:
    model = model_of(name)
    chains = [module for module in model._network.fused.module.children() if isinstance(module, fusion.Chain)]
    assert [len(chain.stages) for chain in chains] == ALL[name][2]
    assert model._network.fused.takes_entry == (name != "capped maps")


@pytest.mark.parametrize(("name", "count"), [("pooled", 2), ("tiled", 3), ("capped maps", 3)])
def test_maps_that_are_pooled_lie_channels_last_and_parameters_as_before(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, dtype=torch.float32)
    pools: list[Tensor] = []

    class Recorder(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            if isinstance(self.fetch_attr(str(target)), nn.MaxPool2d):
                pools.append(args[0])
            return super().call_module(target, args, kwargs)

    def recorded(self: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        pools.append(maps)
        return in_one(self, maps)

    in_one = fusion.stages.Stage.pooled
    monkeypatch.setattr(fusion.stages.Stage, "pooled", recorded)
    inputs, targets = batch_of(model, 4, "none")
    Recorder(model._network.fused.module).run(inputs)
    assert len(pools) == count
    assert all(pool.is_contiguous(memory_format=torch.channels_last) for pool in pools)
    model.loss(model(inputs), targets).backward()
    for parameter in model.net.parameters():
        assert parameter.is_contiguous()
        assert parameter.grad is not None
        assert parameter.grad.is_contiguous()


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_are_those_of_the_traced_graph(name: str, gates: str) -> None:
    # Rounding of some hundred products, times what gates lift small signals by.
    if name not in NETWORKS and gates != "sphere":
        pytest.skip("it has gates of its own, or none")
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-2 if gates == "normalising" else 5e-4)):
        model = model_of(name, gates, dtype)
        for rows, bad in ((5, "none"), (7, "tail"), (6, "middle"), (600, "tail")):
            for differentiated in (False, True):
                inputs, targets = batch_of(model, rows, bad)
                check_agreement(model, inputs.requires_grad_(differentiated), targets, tolerance)


WEIGHTED = (nn.Conv2d, nn.Linear)
TILES = [nn.ReLU(), nn.MaxPool2d(2)]


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolutions with and without pooling, dense layers, gates of all kinds around and inside some of them."""
    parts: list[nn.Module] = []
    channels, size = draw(st.integers(1, 3)), draw(st.integers(5, 9))
    shape = (channels, size, size)
    for _ in range(draw(st.integers(0, 2))):
        width, kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
        parts += [nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=draw(st.booleans()))]
        parts += draw(
            st.sampled_from(([], [nn.ReLU()], [nn.ReLU(), nn.MaxPool2d(2, 1)], [nn.MaxPool2d(2), nn.ReLU()], TILES))
        )
        channels = width
        if nn.Sequential(*parts)(torch.zeros(1, *shape)).shape[-1] < 4:
            break
    parts.append(nn.Flatten())
    entries = nn.Sequential(*parts)(torch.zeros(1, *shape)).shape[1]
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 9))
        parts += [nn.Linear(entries, width, bias=draw(st.booleans())), nn.ReLU()]
        entries = width
    net: nn.Module = nn.Sequential(*parts, nn.Linear(entries, 3))
    kinds = {path: draw(st.integers(0, 3)) for path, part in net.named_modules() if isinstance(part, WEIGHTED)}
    signal = [path for path, kind in kinds.items() if kind & 1]
    gradient = [path for path, kind in kinds.items() if kind & 2]
    net = gated(net, layers=signal, **GATES[draw(st.sampled_from(sorted(GATES)))]) if signal else net
    return gradient_gated(net, layers=gradient, limit=0.3) if gradient else net, shape


@settings(max_examples=25, deadline=None)
@given(built=networks(), rows=st.integers(2, 9), bad=st.sampled_from(["none", "tail", "middle"]), seen=st.booleans())
def test_any_network_gives_the_numbers_of_its_traced_graph(built: Any, rows: int, bad: str, seen: bool) -> None:
    net, shape = built
    model = wrap(net.double(), shape, input_norm=3.0)
    inputs, targets = batch_of(model, max(rows, 3), bad)
    # Float64 rounding, where single entries are projected, is lifted a hundredfold by each of up to four gates.
    check_agreement(model, inputs.requires_grad_(seen), targets, 1e-7, least=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_blocks_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion.stages, "_BLOCK_ENTRIES", 40)
    monkeypatch.setattr(fusion.backward, "_CONVOLUTION_ENTRIES", 800)
    # Spheres make what precedes them free of its scale; balls do not.
    for gates in ("sphere", "ball"):
        model = model_of(name, gates)
        for bad in ("tail", "middle"):
            inputs, targets = batch_of(model, 7, bad)
            check_agreement(model, inputs, targets, 1e-10)
            check_agreement(model, inputs.requires_grad_(True), targets, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_frozen_parameters_other_strides_and_expanded_cotangents_give_the_same(name: str) -> None:
    model = model_of(name)
    inputs, targets = batch_of(model, 6)
    strided = inputs.transpose(0, -1).contiguous().transpose(0, -1)
    check_agreement(model, strided, targets, 1e-10)
    check_agreement(model, inputs[:1].expand_as(inputs), targets[:1].expand_as(targets), 1e-12)
    if inputs.dim() == 4:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        check_agreement(model, inputs.contiguous(memory_format=torch.channels_last), targets, 1e-10)
    for index, parameter in enumerate(model.net.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    check_agreement(model, inputs, targets, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_gradients_can_be_differentiated_again(name: str) -> None:
    # Gates that never bite: what a gate does to a second derivative depends on where flows are added up.
    model = model_of(name, "wide")
    found = []
    for run in (model, lambda values: model._run(values, model.graph.module)):
        inputs, targets = batch_of(model, 4, "none")
        inputs.requires_grad_(True)
        wanted = [inputs, *model.net.parameters()]
        with unwitnessed():
            loss = model.loss(run(inputs), targets)
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        total = sum((value.square().sum() for value in first), start=torch.zeros(()).double())
        found.append(torch.autograd.grad(total, wanted, materialize_grads=True))
    for one, other in zip(*found, strict=True):
        # Two runs of the same float64 operations up to the order of sums.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*NETWORKS, "capped", "clipped"])
def test_the_bounds_hold_at_extreme_scales_of_inputs_weights_and_losses(name: str) -> None:
    for gates in ("sphere", "normalising"):
        for weights in (1e-30, 1.0, 1e30):
            model = model_of(name, gates, torch.float32, weights)
            bounds = bounds_of(model)
            for scale in (1e-30, 1.0, 1e18, 1e30):
                inputs, targets = batch_of(model, 4, "none", scale)
                for row, factor in enumerate((1.0, 1e-20, 1e20, 1e35)):
                    for key, value in per_sample_gradients(model, inputs[row], targets[row], scale=factor).items():
                        norm = float(torch.linalg.vector_norm(value.double()))
                        # Float32 rounding of the products themselves: sums of under 100 of them.
                        assert norm <= bounds[key] * (1.0 + 1e-5), (key, weights, scale, factor)


@pytest.mark.parametrize(
    ("name", "first", "second"), [("dense", "1", "3"), ("clipped", "0", "2"), ("capped", "0", "2")]
)
def test_samples_that_overflow_within_a_chain_add_exactly_nothing_to_others(name: str, first: str, second: str) -> None:
    model = model_of(name, dtype=torch.float32)
    with torch.no_grad():
        model.net.get_parameter(f"{first}.weight").mul_(1e30)
        model.net.get_parameter(f"{first}.bias").fill_(1.0)
    inputs, targets = batch_of(model, 6, "none")
    inputs = inputs * torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]).reshape(-1, *[1] * len(model.input_shape))
    check_agreement(model, inputs, targets, 5e-4)
    overflown = inputs.flatten(1).any(1)
    assert 0 < int(overflown.sum()) < 6
    found = results(model, inputs, targets, fused=True)[f"{second}.weight"]
    only = results(model, inputs[~overflown], targets[~overflown], fused=True)[f"{second}.weight"]
    # Two sums of float32 products, in two orders.
    torch.testing.assert_close(found, only, rtol=1e-5, atol=1e-7)
    assert bool(found.any())


def test_cotangents_that_overflow_within_a_chain_are_dropped_by_gradient_gates() -> None:
    for bad in (math.nan, math.inf, 1e30):
        model = model_of("clipped", dtype=torch.float32)
        inputs, _ = batch_of(model, 5, "none")
        found = []
        for run in (model._network.fused.module, model.graph.module):
            output = run(inputs)
            cotangent = torch.ones_like(output)
            cotangent[2] = bad
            found.append(torch.autograd.grad(output, list(model.net.parameters()), cotangent))
        for one, other in zip(*found, strict=True):
            assert bool(one.isfinite().all())
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_cotangents_without_a_norm_become_zero(bad: float) -> None:
    for name in ("bare", "convolutional", "tokens", "sequences", "branches"):
        model = model_of(name)
        inputs, _ = batch_of(model, 4, "none")
        chains = [chain for chain in model._network.fused.module.children() if isinstance(chain, fusion.Chain)]
        seen = inputs.clone().requires_grad_(True)
        output = chains[0](seen)
        cotangent = torch.ones_like(output)
        cotangent[2] = bad
        found = torch.autograd.grad(output, [seen, chains[0].stages[0].layer.weight], cotangent)
        assert all(bool(value.isfinite().all()) for value in found)
        assert not found[0][2].any()


def test_padding_leaves_a_chain_as_zero_samples_do() -> None:
    for name in ("bare", "convolutional", "tokens"):
        model = model_of(name)
        chain = next(chain for chain in model._network.fused.module.children() if isinstance(chain, fusion.Chain))
        inputs, _ = batch_of(model, 5, "tail")
        found = chain(inputs, fusion.Entry(sample_norms(inputs), 3.0, False))
        expected = chain(inputs.nan_to_num(), fusion.Entry(sample_norms(inputs.nan_to_num()), 3.0, True))
        assert torch.equal(found, expected)


def test_what_a_chain_keeps_is_its_input_and_the_relus() -> None:
    model = wrap(
        gated(nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 60), nn.ReLU(), nn.Linear(60, 3))), (40,)
    )
    inputs, targets = torch.randn(96, 40), torch.randn(96, 3)
    forward = traffic(lambda: model.loss(model(inputs), targets), torch.device("cpu"))
    # Besides: some numbers for each of 96 samples, and the loss's own (96, 3).
    assert 4 * 96 * (50 + 60) <= forward.kept <= 4 * 96 * (50 + 60 + 40)


def test_a_chain_lets_go_of_each_activation_once_it_is_used() -> None:
    # Eight activations and eight gradients of weights, all of one size.
    size = 4 * 256 * 256
    model = wrap(gated(nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(256, 256), nn.ReLU())))), (256,))
    inputs, targets = torch.randn(2, 256, 256)
    # On its first batch a loss is looked at more closely.
    model.loss(model(inputs), targets)
    peak = traffic(lambda: model.loss(model(inputs), targets).backward(), torch.device("cpu")).peak
    # Kept to the end, the activations would make 16, and more with two cotangents and what is computed by blocks.
    assert 8 * size < peak <= 14 * size


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    ceil=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_relu_and_a_max_pooling_in_either_order_pass_back_the_same_to_the_bit(
    kernel: int, stride: int, dilation: int, padding: int, ceil: bool, seed: int
) -> None:
    pool = nn.MaxPool2d(kernel, stride, min(padding, kernel // 2), dilation, ceil_mode=ceil)
    generator = torch.Generator().manual_seed(seed)
    # Of few numbers, so that many tie, zeros of both signs among them.
    maps = torch.randint(-2, 3, (3, 2, 9, 8), generator=generator).double() * torch.tensor([1.0, -1.0]).reshape(2, 1, 1)
    maps[2, 0, 4, 4] = math.nan
    found = []
    for run in (lambda values: pool(torch.relu(values)), lambda values: torch.relu(pool(values))):
        values = maps.clone().requires_grad_(True)
        output = run(values)
        cotangents = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found.append((output.detach(), *torch.autograd.grad(output, values, cotangents)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("name", ALL)
def test_a_graph_that_is_passed_twice_gives_the_same_gradients_twice(name: str) -> None:
    model = model_of(name)
    inputs, targets = batch_of(model, 5)
    inputs.requires_grad_(True)
    wanted = [inputs, *model.net.parameters()]
    with unwitnessed():
        loss = model.loss(model(inputs), targets)
    first, second = (
        torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True)
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        # The second time by the modules' own operations, in float64.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)
    loss.backward()
    assert all(p.grad is not None for p in model.net.parameters())


def test_neither_compiled_models_nor_other_dtypes_and_devices_run_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fusion.FusedNet.can_run(torch.zeros(1, device="meta"))
    assert not fusion.FusedNet.can_run(torch.zeros(1, dtype=torch.float16))
    assert fusion.FusedNet.can_run(torch.zeros(1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not fusion.FusedNet.can_run(torch.zeros(1))


def test_a_backward_pass_under_autocast_is_refused() -> None:
    chain = next(
        m for m in model_of("bare", dtype=torch.float32)._network.fused.module.children() if isinstance(m, fusion.Chain)
    )
    output = chain(torch.randn(2, 6, requires_grad=True)).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(PrivacyError, match="autocast"):
        output.backward()


def test_weights_that_changed_since_the_forward_pass_are_refused() -> None:
    model = model_of("dense")
    inputs, targets = batch_of(model, 4)
    loss = model.loss(model(inputs), targets)
    with torch.no_grad():
        model.net.get_parameter("3.weight").mul_(2.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|modified inplace|was changed between"):
        loss.backward()


def test_settings_of_gates_that_are_changed_after_wrapping_are_followed() -> None:
    model = model_of("dense")
    inputs, targets = batch_of(model, 4)
    for module in model.net.modules():
        if isinstance(module, layers.SphereScaling):
            module.radius *= 3.0
        elif isinstance(module, layers.CotangentGate):
            module.limit *= 0.1
    check_agreement(model, inputs, targets, 1e-10)


MUTANTS = (
    Mutant(
        "no factor of the gate in the gradient",
        fusion.backward,
        "_arrived",
        "torch.mul(cotangents, per_sample(factors, into), out=into)",
        "into.copy_(cotangents)",
    ),
    Mutant("a larger cap", fusion.backward, "_arrived", "cap=gate.limit", "cap=2.0 * gate.limit"),
    Mutant("normalised instead of clipped", fusion.backward, "_arrived", "else gate.limit", "else gate.floor"),
    Mutant("no ReLU on the way back", fusion.backward, "_arrived", "if stage.rectified:", "if False:"),
    Mutant("the wrong floor", fusion.backward, "_shares", "norms > stage.floor", "norms > 0.0"),
    Mutant("no factor of the gate before", fusion.backward, "_arrived", "factors = shares * scales", "pass"),
    Mutant("a bias that is not capped", fusion.backward, "_arrived", "shares @ totals", "totals.sum(0)"),
    Mutant("a looser look", fusion.backward, "_arrived", "not most <= gate.limit", "not most <= 2.0 * gate.limit"),
    Mutant("products scaled", fusion.backward, "_arrived", "products / scales", "products"),
    Mutant("nothing projected", fusion.backward, "tangent_part", "value=-1", "value=0"),
    Mutant("projected twice", fusion.backward, "tangent_part", "value=-1", "value=-2"),
    Mutant("the input gate forgotten", fusion.chain, "_entered", "scales.mul_(ball)", "scales"),
    Mutant("the input gate's norm forgotten", fusion.chain, "_entered", "raw * ball, torch.nan", "raw, torch.nan"),
    Mutant(
        "dropped rows left in the input", fusion.chain, "_entered", "values = values.index_fill(0, lost, 0.0)", "pass"
    ),
    Mutant(
        "bias scaled",
        fusion.chain,
        "_left",
        "torch.addcmul(stage.broadcast(bias), block, scales, out=block)",
        "block.add_(stage.broadcast(bias)).mul_(scales)",
    ),
    Mutant(
        "rows of another block",
        fusion.chain,
        "passed_linear",
        "rows_of(kept.scales, rows)",
        "kept.scales[: len(arriving)]",
    ),
    Mutant(
        "products of another block",
        fusion.chain,
        "passed_convolution",
        "kept.norms)[rows]",
        "kept.norms)[: len(leaving)]",
    ),
    Mutant("lengths before the gate", fusion.backward, "_lengths", "if stage.before is None:", "if True:"),
    Mutant(
        "weights not capped",
        fusion.backward,
        "vector_weight_gradient",
        "torch.mul(cotangents, factors.unsqueeze(1), out=into)",
        "cotangents",
    ),
    Mutant("the bias's gate for the weight", fusion.backward, "_passed_gated", "*gate.gates()[0]", "*gate.gates()[1]"),
    Mutant(
        "cotangents that go on scaled",
        fusion.backward,
        "_passed_gated",
        "passed = cotangents @ weight",
        "passed = (0.5 * cotangents) @ weight",
    ),
    Mutant("positions in another order", convolutions, "_positions_last", "(0, 2, 3, 1)", "(0, 3, 2, 1)"),
    Mutant(
        "tiles of another block",
        fusion.chain,
        "passed_convolution",
        "kept.largest[counted]",
        "kept.largest[: len(arrived)]",
    ),
    Mutant("windows that overlap", fusion.plan, "pools_tiles", "_pair(pool.kernel_size) == _pair(pool.stride)", "True"),
    Mutant("only the last block's bias", fusion.backward, "_total", "parts[0].add_(part)", "parts[0].copy_(part)"),
)


def check_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL:
        test_blocks_of_any_size_give_the_same(name, monkeypatch)
    for gates in GATES:
        for name in NETWORKS:
            test_values_and_gradients_are_those_of_the_traced_graph(name, gates)


@with_each(*one_in_two(MUTANTS))
def test_mistakes_are_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(monkeypatch)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (
            Mutant(
                "cotangents",
                fusion.backward,
                "_passed_gated",
                "drop_rows_(cotangents, norms, LARGEST_NORM)",
                "cotangents",
            ),
            test_cotangents_that_overflow_within_a_chain_are_dropped_by_gradient_gates,
        ),
        (
            Mutant("outputs", fusion.chain, "_left", "output.index_fill_(0, kept.lost, 0.0)", "pass"),
            test_padding_leaves_a_chain_as_zero_samples_do,
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_left_of_dropped_samples_is_noticed(
    mutant: Mutant, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("gate", [gated, gradient_gated])
def test_maps_of_one_channel_that_torch_reads_beyond_are_not_laid_channels_last(gate: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, (1, 3), (1, 2)),
        nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    model = wrap(gate(net), (4, 12, 8))
    assert not any(isinstance(part, fusion.Interleaved) for part in model._network.fused.module.modules())
    bounds = model.sensitivity().per_parameter
    for turn in range(8):
        rows, cotangents = torch.randn(17, 4, 12, 8), torch.randn(17, 4)
        kept = torch.arange(17) != turn

        def gradients(which: Tensor, rows: Tensor = rows, cotangents: Tensor = cotangents) -> dict[str, Tensor]:
            model.zero_grad()
            model(rows[which]).backward(nn.functional.normalize(cotangents[which], dim=1))
            return {name: one.grad.clone() for name, one in model.net.named_parameters() if one.grad is not None}

        whole, without = gradients(torch.ones(17, dtype=torch.bool)), gradients(kept)
        for name, gradient in whole.items():
            assert float((gradient - without[name]).norm()) <= bounds[name] * (1.0 + 1e-4)
