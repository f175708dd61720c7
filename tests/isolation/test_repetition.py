"""What a checkpointed part computes the second time is what it computed the first time, or is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipless_dp import gradient_gated
from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.checkpointing import repeating
from clipless_dp.isolation.repetition import _bits, _sums
from tests.isolation.test_checkpointing import Blocks, wrapped
from tests.isolation.test_soundness import gradients

ROWS, WIDTH = 6, 8


class Block(nn.Module):
    """Reads what others may write."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH).eval()
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.register_buffer("centre", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.shift, self.scale, self.either, self.array = torch.zeros(WIDTH), 1.0, False, np.ones(3)
        self.cache: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        if self.cache is None:
            self.cache = torch.arange(float(WIDTH)).sin()
        other = values.sin()
        read = values if self.either else other
        hidden = self.frozen * (self.layer(read + self.cache) - self.centre - self.shift) * self.scale
        return (self.norm(hidden.tanh()) * torch.as_tensor(self.array).float().sum()).sin()


class Net(nn.Module):
    def __init__(self, *, again: bool = True) -> None:
        super().__init__()
        self.block, self.head, self.again = Block(), nn.Linear(WIDTH, 3), again

    def forward(self, values: Tensor) -> Tensor:
        made = checkpoint(self.block, values, use_reentrant=False) if self.again else self.block(values)
        return self.head(made)


def _written(name: str) -> Callable[[Block, Tensor], None]:
    def write(block: Block, told: Tensor) -> None:
        with torch.no_grad():
            block.get_parameter(name).copy_(told) if name == "frozen" else block.get_buffer(name).copy_(told)

    return write


def _array(block: Block, told: Tensor) -> None:
    block.array[:] = float(told[0])


def _past_versions(block: Block, told: Tensor) -> None:
    block.centre.data.copy_(told)


CHANGES: dict[str, Callable[[Block, Tensor], None]] = {
    "a buffer": _written("centre"),
    "a buffer, past its version": _past_versions,
    "statistics of a frozen batch norm": _written("norm.running_mean"),
    "a frozen parameter": _written("frozen"),
    "a tensor in an attribute": lambda block, told: setattr(block, "shift", told),
    "a number": lambda block, told: setattr(block, "scale", float(told[0])),
    "a branch": lambda block, told: setattr(block, "either", True),
    "an array of numpy": _array,
    "another frozen parameter": lambda block, told: setattr(block, "frozen", nn.Parameter(told, requires_grad=False)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_loop_takes_from_a_batch_between_a_pass_and_its_way_back_comes_to_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 3)
    model = wrapped(Net(), (WIDTH,))
    output = model(inputs)
    CHANGES[name](model.net.block, inputs.sum(0))
    with pytest.raises(PrivacyError, match="does not do the same as the first time: it calls"):
        model.loss(output, targets).backward()
    assert all(value.grad is None for value in model.net.block.parameters())


def test_what_a_hook_on_the_outputs_gradient_writes_comes_to_no_gradient() -> None:
    torch.manual_seed(0)
    model = wrapped(Net(), (WIDTH,))
    output = model(torch.randn(ROWS, WIDTH))

    def write(arriving: Tensor) -> None:
        model.net.block.centre.fill_(arriving.sum())

    output.register_hook(write)
    with pytest.raises(PrivacyError, match="otherwise"):
        model.loss(output, torch.randn(ROWS, 3)).backward()


@pytest.mark.parametrize("name", ["frozen", "centre", "norm.running_mean"])
def test_what_is_changed_between_steps_counts_as_without_checkpointing(name: str) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 3)
    net = Net()
    plain, model = wrapped(copy.deepcopy(net), (WIDTH,)), wrapped(net, (WIDTH,))
    plain.net.net.again = False
    for step in range(3):
        found = []
        for each in (plain, model):
            _written(name)(each.net.block, torch.full((WIDTH,), 0.5 + step))
            # It is made anew, in the first run or in the second.
            each.net.block.cache = None
            found.append(gradients(each, inputs, targets))
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_weight_that_another_one_has_replaced_is_still_that_of_the_pass() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 3)
    gated = gradient_gated(Net(), isolation="vmap", limit=0.05)
    gated(inputs)
    weights = gated.net.block.layer.weight, gated.net.block.layer.bias
    expected = torch.autograd.grad((gated(inputs) * targets).sum(), weights)
    output = gated(inputs)
    gated.net.block.layer.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    found = torch.autograd.grad((output * targets).sum(), weights)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 10_000, 70_001, 200_003])
def test_each_entry_of_a_tensor_tells(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    # Not at the beginning of its memory.
    value = torch.randint(2, (size + 1,)).to(dtype)[1:]
    told = _bits(value)
    assert told == _bits(value.clone())
    for place in {0, size // 2, size - 1}:
        other = value.clone()
        other[place] = ~other[place] if dtype == torch.bool else other[place] + 1
        assert _bits(other) != told
    if size > 2 and dtype != torch.bool:
        value[0], value[-1] = 2, 3
        swapped = value.clone()
        swapped[0], swapped[-1] = 3, 2
        assert _bits(swapped) != _bits(value)


class Same(nn.Module):
    """Asks whether two of its arguments are one."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.one, self.two, self.again = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3), again

    def part(self, first: Tensor, second: Tensor) -> Tensor:
        return self.one(first).sin() if first is second else self.two(first).tanh()

    def forward(self, values: Tensor) -> Any:
        hidden = values.tanh()
        return checkpoint(self.part, hidden, hidden, use_reentrant=False) if self.again else self.part(hidden, hidden)


def test_a_tensor_that_is_handed_over_twice_is_one_tensor_the_second_time() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 3)
    found = []
    for again in (False, True):
        torch.manual_seed(1)
        found.append(gradients(wrapped(Same(again=again), (WIDTH,)), inputs, targets))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_attention_to_itself_may_be_checkpointed() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 3)

        def forward(self, values: Tensor) -> Tensor:
            return self.head(self.attend(values, values, values)[0].mean(1))

    torch.manual_seed(0)
    assert _as_without_checkpointing(Attending(), "attend", torch.randn(ROWS, 5, WIDTH))


class Positions(nn.Module):
    """Has a part that is handed nothing of a sample, and one that is given a parameter in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tokens = nn.Embedding(5, WIDTH), Token()
        self.gain, self.shift = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(5, WIDTH))
        self.body, self.head = Shaped(), nn.Linear(WIDTH, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = values + self.table(torch.arange(5)) + self.tokens()
        return self.head(self.body(hidden, self.gain.view(1, 1, WIDTH), self.shift.unsqueeze(0)).mean(1))


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self) -> Tensor:
        return self.weight.sin()


class Shaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return (self.layer(values) * gain + shift).tanh()


def _as_without_checkpointing(net: nn.Module, part: str, inputs: Tensor, **options: Any) -> bool:
    targets = torch.randn(ROWS, 3)
    plain, model = (
        wrapped(copy.deepcopy(net), tuple(inputs.shape[1:]), checkpoint=chosen, **options) for chosen in ((), part)
    )
    expected, found = gradients(plain, inputs, targets), gradients(model, inputs, targets)
    return all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("part", ["table", "tokens"])
def test_a_part_that_is_handed_nothing_of_a_sample_may_be_checkpointed(part: str) -> None:
    torch.manual_seed(0)
    assert _as_without_checkpointing(Positions(), part, torch.randn(ROWS, 5, WIDTH))


@pytest.mark.parametrize("joint", [None, "layer", "network"])
def test_a_parameter_that_is_handed_to_a_part_in_another_shape_meets_the_same_arithmetic(joint: Any) -> None:
    torch.manual_seed(0)
    assert _as_without_checkpointing(Positions(), "body", torch.randn(ROWS, 5, WIDTH), joint=joint)


@pytest.mark.parametrize("again", [False, True])
def test_a_constant_that_takes_no_gradients_may_be_asked_to_take_none(again: bool) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, 3)
            self.register_buffer("positions", torch.rand(9, WIDTH))

        def part(self, values: Tensor) -> Tensor:
            mask = torch.ones(5, 1)
            mask.requires_grad = False
            return (values * mask + self.positions[:5].requires_grad_(False)).sin()

        def forward(self, values: Tensor) -> Tensor:
            made = checkpoint(self.part, values, use_reentrant=False) if again else self.part(values)
            return self.head(made.mean(1))

    model = wrapped(Fixed(), (5, WIDTH))
    found = gradients(model, torch.randn(ROWS, 5, WIDTH), torch.randn(ROWS, 3))
    assert float(found["head.weight"].norm()) > 0


class Held:
    """An object that holds a value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _in_an_object(layer: nn.Module, values: Tensor) -> Tensor:
    return checkpoint(lambda held: layer(held.value).sin(), Held(values.tanh()), use_reentrant=False)


def _in_a_function_within(layer: nn.Module, values: Tensor) -> Tensor:
    scale = values.tanh()

    def inner(hidden: Tensor) -> Tensor:
        return layer(hidden * scale).sin()

    return checkpoint(lambda hidden: inner(hidden), values, use_reentrant=False)


@pytest.mark.parametrize("call", [_in_an_object, _in_a_function_within], ids=["object", "function"])
def test_a_value_from_elsewhere_than_a_parts_arguments_is_refused_by_what_to_do(call: Any) -> None:
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 3)

        def forward(self, values: Tensor) -> Tensor:
            return call(self.layer, values)

    with pytest.raises(PrivacyError, match="hand it over as an argument"):
        wrapped(Elsewhere(), (WIDTH,))


def test_threads_that_run_one_network_leave_its_parts_as_they_were() -> None:
    torch.manual_seed(0)
    entered, left = threading.Event(), threading.Event()

    def call(block: nn.Module, values: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            left.wait(60)
        return block(values)

    net = Blocks(lambda block, values: block(values))
    gated = gradient_gated(net, isolation="vmap", checkpoint="blocks.*")
    gated(torch.randn(ROWS, 6))
    net.call = call
    other = threading.Thread(target=gated, args=(torch.randn(ROWS, 6),))
    with repeating(net.blocks):
        other.start()
        # It enters after us, and leaves after us.
        assert entered.wait(60)
    left.set()
    other.join(60)
    assert not other.is_alive()
    assert not any("forward" in vars(part) for part in net.modules())


def test_a_checkpointed_module_has_arguments_of_any_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, values: Tensor, debug: bool = False, context_fn: Any = None) -> Tensor:
            assert debug
            return context_fn(self.layer(values))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = Named()

        def forward(self, values: Tensor) -> Tensor:
            return self.two(values, debug=True, context_fn=torch.sin)

    # By the second name of one module, too.
    model = wrapped(Outer(), (6,), checkpoint="two")
    assert gradients(model, torch.randn(ROWS, 6), torch.randn(ROWS, 3))


def _moved_in_pairs(values: Tensor) -> Tensor:
    """As many of each in every row and every column as before."""
    return values[torch.arange(len(values)).view(-1, 2).flip(1).reshape(-1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bool])
def test_a_permutation_of_a_large_constant_is_another_constant(dtype: torch.dtype) -> None:
    values = torch.eye(1024).to(dtype)
    assert _bits(values) == _bits(values.clone())
    assert _bits(values) != _bits(_moved_in_pairs(values))

    # As on an accelerator, where a table of the bytes is summed up.
    def told(some: Tensor) -> list[list[int]]:
        return [part.tolist() for part in _sums(some.reshape(-1).view(torch.uint8))]

    assert told(values) == told(values.clone())
    others = [_moved_in_pairs(values), values.roll(1, 0), values.flip(1)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        place = torch.arange(1024)
        first, second = torch.randperm(1024, generator=generator)[:2].tolist()
        place[[first, second]] = place[[second, first]]
        others.append(values[place])
    assert all(told(values) != told(other) for other in others)


SPARSE = {
    "coordinates": lambda values: values.to_sparse(),
    "rows": lambda values: values.to_sparse_csr(),
    "columns": lambda values: values.to_sparse_csc(),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_constants_are_told_apart_by_what_they_hold(layout: str) -> None:
    of = SPARSE[layout]
    assert _bits(of(torch.eye(5))) == _bits(of(torch.eye(5)))
    others = [torch.eye(5).flip(0), 2.0 * torch.eye(5), torch.eye(5)[:4], torch.zeros(5, 5)]
    assert len({_bits(of(one)) for one in [torch.eye(5), *others]}) == 5
    known = of(torch.eye(5))
    before = _bits(known)
    known.values().data.mul_(2.0) if layout != "coordinates" else known._values().mul_(2.0)
    assert _bits(known) != before
