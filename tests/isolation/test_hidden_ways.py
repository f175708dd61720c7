"""Samples, parameters and what all samples share meet in no other way than through gates, whatever code they run in."""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import _remove_batch_dim, _unwrap_batched, get_unwrapped
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clipless_dp import DPLipModel, gradient_gated, losses
from clipless_dp.errors import CliplessError, ConfigurationError, PrivacyError, UnsupportedModuleError
from clipless_dp.isolation.seen import Memory
from tests.isolation.test_refusals import Centred
from tests.isolation.test_soundness import gradients
from tests.support import HeldApart

Run = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Layers, a weight, a buffer, and a function of them and the input."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.first, self.second, self.embed = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(4, 6)
        self.weight = nn.Parameter(0.4 * torch.randn(11))
        self.shift = nn.Parameter(torch.zeros(1, 6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("scale", torch.ones(6))
        self.register_buffer("calls", torch.zeros(()))
        self.run = run

    def forward(self, values: Tensor) -> Tensor:
        return self.run(self, values)


def model_of(run: Run, **gates: Any) -> DPLipModel:
    torch.manual_seed(0)
    net = gradient_gated(Net(run).double(), isolation="vmap", **gates)
    return DPLipModel(net, input_shape=(6,), loss=losses.TauCrossEntropy(1.0))


def most_moved(model: DPLipModel) -> float:
    """The largest change of a sum by one sample, as a share of its bound."""
    torch.manual_seed(1)
    values, targets = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    values[0] *= 40
    whole, without = gradients(model, values, targets), gradients(model, values[1:], targets[1:])
    bounds = {name: bound for name, bound in model.sensitivity().per_parameter.items() if bound > 0}
    return max(float((whole[name] - without[name]).norm()) / bound for name, bound in bounds.items())


def plain(net: Net, values: Tensor) -> Tensor:
    return net.second(net.first(values).tanh())


def temporaries(net: Net, values: Tensor) -> Tensor:
    """So many tensors are made and lost that new ones come to lie where they were."""
    hidden = net.first(values).tanh()
    lost = [hidden * float(factor) for factor in range(200)]
    return hidden + 0 * sum(lost)


GRID = torch.linspace(-1, 1, 80, dtype=torch.float64).reshape(20, 4)


def mapped(net: Net, values: Tensor) -> Tensor:
    hidden = temporaries(net, values)
    return net.second(hidden * torch.func.vmap(net.embed)(GRID).tanh().sum(0))


@torch.jit.script
def scripted(values: Tensor) -> Tensor:
    return values * 2.0


class Difference:
    """What can be called, and is no function."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return Centred.apply(first - second).sum(-1)


class Foreign(Centred):
    """Says that it is torch's."""


Foreign.__module__ = "torch.nn.functional"


class Meddling(Tensor):
    """A tensor with code of its own behind each function of torch."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return Centred.apply(found)


class Quiet(Tensor):
    """A tensor type of a user's own, without code."""


class Dispatching(Tensor):
    """A tensor with code of its own behind each operation, where values of all samples are."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            found = func(*args, **(kwargs or {}))
        several = isinstance(found, Tensor) and found.dim() > 2 and len(found) > 1
        return found - found.mean(0, keepdim=True) if several else found


class Rounding(HeldApart):
    """Holds its values apart, and rounds what it meets by the largest entry of that."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Rounding(args[0].held)
        met = [
            one.held if isinstance(one, Rounding) else (one / one.abs().max()).round() * one.abs().max()
            for one in args
            if isinstance(one, Tensor)
        ]
        return func(*met)


class Rounded(TorchDispatchMode):
    """Rounds what operations return by the largest entry of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return (found / found.abs().max()).round() if isinstance(found, Tensor) else found


def dispatched(net: Net, values: Tensor) -> Tensor:
    shift = torch.zeros(6, dtype=values.dtype).as_subclass(Dispatching)
    return net.second((net.first(values) + shift).sin())


def within(mode: Callable[[], Any]) -> Run:
    def run(net: Net, values: Tensor) -> Tensor:
        with mode():
            return plain(net, values)

    return run


class Passing(TorchFunctionMode):
    """Sees functions as the network calls them, of one sample."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Iterated(list[Any]):
    """A list that runs code of its own where it is read."""

    def __init__(self, entries: Sequence[Any], written: Tensor) -> None:
        super().__init__(entries)
        self.written = written

    def __iter__(self) -> Any:
        self.written.copy_(Centred.apply(self.written.clone()))
        return super().__iter__()


class Named(list[Any]):
    """A list of one's own, without code."""


Both = namedtuple("Both", ["first", "second"])


def iterated(net: Net, values: Tensor) -> Tensor:
    hidden = net.first(values)
    written = hidden.detach().clone()
    torch.einsum("bi->b", Iterated([values], written))  # type: ignore[no-untyped-call]
    return net.second((hidden + written).sin())


def unwrapped_by(reads: Callable[[Tensor], Tensor]) -> Run:
    def run(net: Net, values: Tensor) -> Tensor:
        hidden = net.first(values)
        found = reads(hidden.detach())
        return net.second((hidden - found.reshape(-1, 6).mean(0)).sin())

    return run


def in_thread(reads: Callable[[Tensor], Tensor]) -> Run:
    def run(values: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(reads, values).result()

    return unwrapped_by(run)


def copied_within(sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Copies a value within nested transforms."""

    def reads(values: Tensor) -> Tensor:
        def nested(left: Sequence[int]) -> Tensor:
            if not left:
                return values * 1.0
            return torch.func.vmap(lambda _: nested(left[1:]))(torch.zeros(left[0]))

        return nested(sizes)

    return reads


def renumbered(net: Net, values: Tensor) -> Tensor:
    """Constants come by ways that no mode sees, some into memory that values of samples lay in."""
    hidden = net.first(values)
    for _ in range(40):
        lost = hidden.detach() * 2.0
        del lost
        constant = torch.from_numpy(np.full((8, 6), 0.5))
        hidden = hidden * constant.sum(0) / constant.sum(0)
    return net.second((hidden + torch.arange(6).to(hidden) * GRID[:6, 0]).sin())


def unseen(net: Net, values: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return plain(net, values)


MEDDLING, QUIET = (torch.ones(6, dtype=torch.float64).as_subclass(kind) for kind in (Meddling, Quiet))


class Centring:
    """A type that makes no tensor type."""

    def __new__(cls, first: Tensor, second: Tensor) -> Any:
        return Centred.apply(first - second).sum(-1)


def distances(distance: Any) -> Run:
    def run(net: Net, values: Tensor) -> Tensor:
        found = functional.triplet_margin_with_distance_loss(
            net.first(values), values, 2 * values, margin=500.0, distance_function=distance, reduction="none"
        )
        return plain(net, values) + 5 * found.unsqueeze(-1).sin()

    return run


def statistics(net: Net, values: Tensor) -> Tensor:
    hidden = net.first(values)
    torch.batch_norm_update_stats(hidden.detach().unsqueeze(-1), net.mean, net.scale, 0.1)
    return net.second((hidden - net.mean).sin())


def aliased_statistics(net: Net, values: Tensor) -> Tensor:
    hidden = net.first(values)
    torch.batch_norm_update_stats(hidden.detach().unsqueeze(-1), net.mean.data, net.scale.data, 0.1)
    return net.second((hidden - net.mean).sin())


def clamped(net: Net, values: Tensor) -> Tensor:
    with torch.no_grad():
        net.second.weight.clamp_(-1, 1)
    return plain(net, values)


def clamped_view(net: Net, values: Tensor) -> Tensor:
    with torch.no_grad():
        net.second.weight[0].clamp_(-1, 1)
    return plain(net, values)


def into(net: Net, values: Tensor) -> Tensor:
    with torch.no_grad():
        torch.tanh(net.shift, out=net.shift)
    return plain(net, values)


REFUSED: dict[str, tuple[Run, str]] = {
    "a transform within, after temporaries": (mapped, "not of this pass and sample"),
    "a derivative within": (
        lambda net, values: plain(net, torch.func.grad(lambda value: net.first(value).sin().sum())(values)),
        "not of this pass and sample",
    ),
    "a scripted function": (lambda net, values: net.second(scripted(net.first(values))), "torch.jit"),
    "the batch, unwrapped": (
        lambda net, values: net.second(values - torch.func.debug_unwrap(net.first(values).detach()).mean(0)),
        "debug_unwrap",
    ),
    "statistics in a buffer": (statistics, "batch_norm_update_stats writes values of a sample"),
    "statistics in an alias": (aliased_statistics, "batch_norm_update_stats writes values of a sample"),
    "an object that is called": (distances(Difference()), "handed code to call"),
    "a type that is called": (distances(Centring), "Centring runs code of its own"),
    "a function that says it is torch's": (
        lambda net, values: net.second(Foreign.apply(net.first(values)).sin()),
        "Foreign runs code of its own",
    ),
    "a tensor type of one's own": (
        lambda net, values: net.second((net.first(values) * MEDDLING).sin()),
        "Meddling runs code of its own",
    ),
    "a tensor type with operations of its own": (dispatched, "Dispatching runs code of its own"),
    "a mode of operations": (within(Rounded), "Rounded"),
    "a list with code of its own": (iterated, "handed a Iterated"),
    "the batch, unwrapped by a name of one's own": (unwrapped_by(get_unwrapped), "debug_unwrap"),
    "the batch, unwrapped at its level": (unwrapped_by(lambda values: _unwrap_batched(values, 1)[0]), "debug_unwrap"),
    "the batch, as a transform ends": (
        unwrapped_by(lambda values: _remove_batch_dim(values, 1, 8, 0)),
        "debug_unwrap",
    ),
    "the batch, unwrapped by a thread": (in_thread(torch.func.debug_unwrap), "debug_unwrap"),
    "the batch, unwrapped and summed up by a thread": (
        in_thread(lambda values: torch.tensor(6 * [float(torch.func.debug_unwrap(values).sum())])),
        "debug_unwrap",
    ),
    "the batch, copied by a thread": (in_thread(copied_within([1])), "not of this pass and sample"),
    "the batch, copied by a thread in nested transforms": (
        in_thread(copied_within([8, 3])),
        "not of this pass and sample",
    ),
    "functions that no mode sees": (unseen, "DisableTorchFunction"),
    "a branch on a value": (
        lambda net, values: torch.cond(values.sum() > 0, torch.sin, torch.cos, (net.second(values),)),
        r"torch\.cond",
    ),
    "a weight overwritten": (clamped, "writes into a trainable parameter"),
    "a row of a weight overwritten": (clamped_view, "writes into a trainable parameter"),
    "a weight as the place for a result": (into, "writes into a trainable parameter"),
}


SLOWER = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
"""What has no rule of ``vmap`` runs for one sample after the other."""


@SLOWER
@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_around_the_gates_is_refused_at_wrapping(name: str) -> None:
    run, words = REFUSED[name]
    with pytest.raises(PrivacyError, match=words) as refused:
        model_of(run)
    assert "tlparse" not in str(refused.value)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_frozen_tensor_of_a_type_with_operations_of_its_own_is_refused_by_its_name(kind: str) -> None:
    net = Net(lambda net, values: net.second(net.first(values) * net.scale)).double()
    rounding = Rounding(torch.ones(6, dtype=torch.float64))
    if kind == "buffer":
        net.scale = rounding
    else:
        del net.scale
        net.register_parameter("scale", nn.Parameter(rounding, requires_grad=False))
    with pytest.raises(UnsupportedModuleError, match=r"scale .*__torch_dispatch__"):
        gradient_gated(net, isolation="vmap")


def counting(net: Net, values: Tensor) -> Tensor:
    net.calls.add_(1)
    return plain(net, values)


def clamped_copy(net: Net, values: Tensor) -> Tensor:
    return functional.linear(net.first(values), net.second.weight.clone().clamp_(-1, 1)) + net.shift[:, :3]


ACCEPTED: dict[str, Run] = {
    "windows of a weight": lambda net, values: net.second(values @ net.weight.as_strided((6, 6), (1, 1))),
    "windows of a weight, copied": lambda net, values: net.second(
        values @ torch.as_strided_copy(net.weight, (6, 6), (1, 1))
    ),
    "temporaries": lambda net, values: net.second(temporaries(net, values)),
    "a plain function": lambda net, values: net.second(2.0 * net.first(values)),
    "a constant, unwrapped": lambda net, values: net.second(values - torch.func.debug_unwrap(GRID[0, :1]).mean(0)),
    "a buffer that is read": lambda net, values: net.second(
        functional.batch_norm(net.first(values), net.mean, net.scale, training=False)
    ),
    "a buffer with no number in it": lambda net, values: net.second(
        torch.nan_to_num(torch.fmax(net.first(values), net.mean.new_full((6,), torch.nan)))
    ),
    "a buffer that counts calls": counting,
    "a tensor type without code": lambda net, values: net.second((net.first(values) * QUIET).sin()),
    "constants of other libraries": renumbered,
    "a thread that maps constants": in_thread(
        lambda _: torch.func.vmap(lambda row: row + 0 * torch.rand(1), randomness="different")(GRID[:3, :2])
    ),
    "a mode that counts operations": within(lambda: FlopCounterMode(display=False)),
    "a mode of functions": within(Passing),
    "lists and tuples of one's own": lambda net, values: net.second(
        torch.cat(Both(net.first(values)[:, :3], values[:, :3]), 1) + torch.stack(Named([values])).sum(0)
    ),
    "another type of numbers": lambda net, values: net.second(net.first(values).to(float)),
    "a copy of a weight overwritten": clamped_copy,
}


@SLOWER
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_looks_alike_and_keeps_samples_apart_is_accepted_within_its_bound(name: str) -> None:
    assert most_moved(model_of(ACCEPTED[name])) <= 1 + 1e-9


@pytest.mark.parametrize("rows", [1, 4])
def test_an_evaluation_writes_into_no_weight(rows: int) -> None:
    on: list[bool] = []

    def average(net: Net, values: Tensor) -> Tensor:
        hidden = net.first(values)
        if on and not torch.is_grad_enabled():
            net.shift.lerp_(hidden, 0.5)
        return net.second((hidden - net.shift).tanh())

    model = model_of(average)
    on.append(True)
    with pytest.raises(PrivacyError, match="writes into a trainable parameter"), torch.no_grad():
        model(torch.randn(rows, 6, dtype=torch.float64))
    assert not model.net.get_parameter("shift").any()


def test_what_a_run_is_refused_other_threads_and_later_code_may_do() -> None:
    found: list[Tensor] = []

    def run(net: Net, values: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(scripted(torch.ones(1))))
        thread.start()
        thread.join()
        return plain(net, values)

    model_of(run)
    assert found
    with pytest.raises(PrivacyError, match=r"torch\.jit"):
        model_of(lambda net, values: net.second(scripted(net.first(values))))
    assert float(scripted(torch.ones(1))) == 2.0
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)
    leaf = torch.ones(1, requires_grad=True)
    torch.utils.checkpoint.checkpoint(scripted, leaf, use_reentrant=False).backward()
    assert float(leaf.grad) == 2.0


def test_memory_that_is_told_apart_is_freed_as_ever() -> None:
    memory, values = Memory(), torch.randn(3)
    memory.add(values)
    assert memory.holds(values[1:])
    assert not memory.holds(values.clone())
    known = StorageWeakRef(values.untyped_storage())
    del values
    assert known.expired()


def test_rows_are_chosen_so_that_what_gates_normalise_agrees() -> None:
    model = model_of(plain)
    assert model._network.rows._backward


class Unrolled(nn.Module):
    """The state is found without gradients, and one more step taken with them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.second = nn.GRUCell(6, 6), nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            state = self.cell(values, torch.zeros_like(values))
        return self.second(self.cell(values, state))


def test_a_weight_that_is_first_read_without_gradients_has_its_gradient() -> None:
    torch.manual_seed(0)
    net = Unrolled().double()
    values, targets = torch.randn(4, 6, dtype=torch.float64), torch.randint(3, (4,))
    loss = losses.TauCrossEntropy(1.0)
    expected = torch.autograd.grad(loss.per_sample(net(values), targets).sum(), [*net.parameters()])
    model = DPLipModel(gradient_gated(net, isolation="vmap", limit=1e6, mode="clip"), input_shape=(6,), loss=loss)
    for found, wanted in zip(gradients(model, values, targets).values(), expected, strict=True):
        # Float64 sums of a few terms.
        assert float((found - wanted).norm()) <= 1e-9 * float(wanted.norm())


def test_tables_that_are_not_trained_are_not_renormed_by_what_samples_look_up() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.second = nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 3)
            self.table.requires_grad_(False)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.second(self.table(tokens).mean(1))

    with pytest.raises(CliplessError, match="max_norm"):
        DPLipModel(
            gradient_gated(Frozen(), isolation="vmap"),
            input_shape=(5,),
            loss=losses.TauCrossEntropy(1.0),
        )


def test_a_part_of_a_graph_before_an_isolated_one_needs_no_norm_of_inputs() -> None:
    torch.manual_seed(0)
    known = gradient_gated(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    apart = gradient_gated(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), isolation="vmap")
    net = nn.Sequential(known, apart)
    model = DPLipModel(net, input_shape=(6,), loss=losses.TauCrossEntropy(1.0))
    values = torch.randn(8, 6)
    assert torch.allclose(model(values), net(values))
    # A row that is no sample is none here either.
    values[0, 0] = torch.nan
    assert model(values)[1:].isfinite().all()


@pytest.mark.parametrize("second", ["embed", "head"])
def test_a_tied_weight_has_the_cap_that_is_set_by_either_of_its_names(second: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.embed(tokens)).mean(1))

    net = gradient_gated(Tied(), isolation="vmap")
    model = DPLipModel(net, input_shape=(5,), loss=losses.TauCrossEntropy(1.0))
    before = model.sensitivity().per_parameter["embed.weight"]
    net.set_gates(0.25, layers=[second])
    assert model.sensitivity().per_parameter["embed.weight"] == pytest.approx(0.25 * before)


class Keys(nn.Module):
    """Attention whose keys have a bias: it shifts all scores of a row alike, so that its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(128, 128), nn.Linear(128, 128, bias=False)
        self.bias, self.second = nn.Parameter(torch.zeros(128)), nn.Linear(128, 3)

    def forward(self, values: Tensor) -> Tensor:
        scores = self.queries(values) @ (self.keys(values) + self.bias).mT
        return self.second((scores.softmax(-1) @ values).mean(1))


@pytest.mark.parametrize("joint", [None, "layer"])
def test_rounding_of_what_cancels_is_not_lifted_to_the_cap(joint: Any) -> None:
    torch.manual_seed(0)
    net = gradient_gated(Keys(), isolation="vmap", floor=1e-8, joint=joint)
    model = DPLipModel(net, input_shape=(6, 128), loss=losses.TauCrossEntropy(1.0), row_invariant=False)
    values, targets = 3 * torch.randn(9, 6, 128), torch.randint(3, (9,))
    found = gradients(model, values, targets)["bias"]
    # Nine samples, each lifted to its cap of 1, would sum to about 3.
    assert float(found.norm()) <= 0.1
    whole, less = gradients(model, values, targets), gradients(model, values[1:], targets[1:])
    assert float((whole["bias"] - less["bias"]).norm()) <= 0.1


def test_a_weight_in_another_shape_has_the_gradient_of_plain_arithmetic() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.shift, self.norm = (
                nn.Parameter(torch.rand(6)),
                nn.Parameter(torch.rand(4, 1)),
                nn.GroupNorm(2, 4),
            )
            self.second = nn.Linear(6, 3)

        def forward(self, values: Tensor) -> Tensor:
            hidden = values * self.gain[None, None] / (1 + self.gain.view(1, 6)) - self.shift
            return self.second(self.norm((2 - self.shift) - hidden).mean(1))

    torch.manual_seed(0)
    net = Scaled().double()
    values, targets = torch.randn(5, 4, 6, dtype=torch.float64), torch.randint(3, (5,))
    loss = losses.TauCrossEntropy(1.0)
    named = dict(net.named_parameters())
    expected = torch.autograd.grad(loss.per_sample(net(values), targets).sum(), [*named.values()])
    model = DPLipModel(gradient_gated(net, isolation="vmap", limit=1e6, mode="clip"), input_shape=(4, 6), loss=loss)
    found = gradients(model, values, targets)
    for name, wanted in zip(named, expected, strict=True):
        # Float64 sums of a few terms.
        assert float((found[name] - wanted).norm()) <= 1e-9 * float(wanted.norm())


class Shared(nn.Module):
    """A layer in an isolated part, and outside of it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.apart = gradient_gated(nn.Sequential(layer, nn.LayerNorm(6)), isolation="vmap")
        self.layer, self.second = layer, nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.apart(self.layer(values)))


class Late(nn.Module):
    """A network that gets a layer after it was put behind gates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.first(values))


def late() -> nn.Module:
    net = Late()
    gated = gradient_gated(net)
    net.first = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))
    return gated


def in_autocast(net: Net, values: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain(net, values)


UNFIT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer inside and outside": (Shared, "'apart.0' is used outside of 'apart' too"),
    "a layer that came late": (late, "'first.0.weight' was added after"),
    "an isolated part of an isolated network": (
        lambda: gradient_gated(
            nn.Sequential(gradient_gated(nn.Sequential(nn.LayerNorm(6)), isolation="vmap"), nn.Linear(6, 3)),
            isolation="vmap",
        ),
        "sample by sample already",
    ),
    "a fault of its own": (
        lambda: gradient_gated(Net(lambda net, values: torch.cat([values, values[:, :3]], 0)), isolation="vmap"),
        r"raised RuntimeError where it was run on zeros \(Sizes of tensors must match.*if it runs by itself",
    ),
    "autocast": (lambda: gradient_gated(Net(in_autocast), isolation="vmap"), "opens torch.autocast"),
    "no gradients for what is computed": (
        lambda: gradient_gated(Net(lambda net, values: net.second(net.first(values).requires_grad_(False)))),
        "requires_grad_",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_run_says_in_words_why(name: str) -> None:
    make, words = UNFIT[name]
    with pytest.raises(CliplessError, match=words):
        DPLipModel(make(), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))


def recorded(net: Net, values: Tensor) -> Tensor:
    with torch.profiler.record_function("hidden"), torch.autocast("cpu", enabled=False):
        return plain(net, values)


def asked(net: Net, values: Tensor) -> Tensor:
    shift = torch.zeros(6, dtype=values.dtype)
    shift.requires_grad = True
    return net.second(net.first(values.clone().requires_grad_() + shift).requires_grad_(True).tanh())


FIT: dict[str, Run] = {
    "a name for the profiler, and no autocast": recorded,
    "another layout in memory": lambda net, values: (
        plain(net, values.reshape(-1, 3, 2, 1).to(memory_format=torch.channels_last).flatten(1))
        * (1 + values[:, :3].contiguous().is_contiguous(memory_format=torch.channels_last))
    ),
    "gradients for what has them, and for what has none": asked,
    "no positions": lambda net, values: plain(net, values + net.first(values.unsqueeze(1)[:, :0]).sum(1)),
}


@pytest.mark.parametrize("name", FIT)
def test_what_looks_alike_is_accepted(name: str) -> None:
    assert most_moved(model_of(FIT[name])) <= 1 + 1e-9


def test_a_profiler_that_records_stacks_and_asks_layers_for_gradients_meets_no_gate() -> None:
    model = model_of(plain)
    values, targets = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    expected = gradients(model, values, targets)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True):
        found = gradients(model, values, targets)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.complex64])
def test_inputs_of_dtypes_that_rows_do_not_hold_are_refused_by_name(dtype: torch.dtype) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(6, 3)

        def forward(self, first: Tensor, other: Tensor) -> Tensor:
            return self.second(first + other)

    with pytest.raises(ConfigurationError, match=f"'other' is {dtype}"):
        DPLipModel(
            gradient_gated(Two(), isolation="vmap"),
            input_shape={"first": (6,), "other": ((6,), dtype)},
            loss=losses.TauCrossEntropy(1.0),
        )
