"""Checkpointed parts of a network that runs sample by sample: the same gates, the same masks, less memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from clipless_dp import ConfigurationError, DPLipModel, fit, gradient_gated, losses, passes
from clipless_dp.errors import CliplessError, PrivacyError
from clipless_dp.isolation import Isolated
from clipless_dp.losses.base import InnerProduct
from clipless_dp.training.memory import traffic
from tests.isolation.test_hidden_ways import Net, model_of, most_moved
from tests.isolation.test_soundness import called, gradients, made, own_gradients, rows_of
from tests.isolation.zoo import ROWS, TOKENS

if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
    pytest.skip("this torch cannot tell hooks on what is saved apart", allow_module_level=True)

LIMIT = 0.05


def wrapped(net: nn.Module, shape: Any, **options: Any) -> DPLipModel:
    loss = InnerProduct(1e6)
    gated = gradient_gated(net, isolation="vmap", limit=LIMIT, mode="clip", **options)
    return DPLipModel(gated, input_shape=shape, loss=loss)


def drawn(model: DPLipModel, inputs: Any, targets: Tensor, seed: int = 0) -> dict[str, Tensor]:
    with model.randomness.seeded(seed):
        return gradients(model, inputs, targets)


PARTS = {
    "transformer encoder": "encoder.layers.*",
    "norms first": "encoder.layers.*",
    "attention by hand": "encoder",
    "GRU": "encoder",
    "tied head": "body",
}
USUAL = {("transformer encoder", None), ("attention by hand", "layer"), ("norms first", "network"), ("GRU", None)}
CASES = [
    pytest.param(name, joint, id=f"{name}, joint {joint}", marks=() if (name, joint) in USUAL else pytest.mark.slow)
    for name in PARTS
    for joint in (None, "layer", "network")
]


@pytest.mark.parametrize(("name", "joint"), CASES)
def test_gradients_are_those_without_checkpointing_and_within_their_bounds(name: str, joint: Any) -> None:
    case = made(name)
    for part in case.net.modules():
        # Masks of the second time must be those of the first.
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    shape = tuple(case.inputs.shape[1:])
    # As many words as there are.
    targets = torch.randn(ROWS, 23 if name == "tied head" else 3, dtype=torch.float64)
    plain = wrapped(copy.deepcopy(case.net), shape, joint=joint)
    model = wrapped(case.net, shape, joint=joint, checkpoint=PARTS[name])
    expected, found = drawn(plain, case.inputs, targets), drawn(model, case.inputs, targets)
    assert found.keys() == expected.keys()
    # The very same operations on the very same numbers.
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert plain.sensitivity().per_parameter == model.sensitivity().per_parameter
    model.eval()
    targets *= 1e4
    whole = gradients(model, case.inputs, targets)
    rest = list(range(1, ROWS))
    without = gradients(model, rows_of(case, rest), targets[rest])
    moved = {key: float((whole[key] - without[key]).norm()) for key in whole}
    if joint is None:
        ratios = [moved[key] / bound for key, bound in model.sensitivity().per_parameter.items()]
    else:
        ratios = [sum(one**2 for one in moved.values()) ** 0.5 / model.sensitivity().total]
    assert 0.3 <= max(ratios) <= 1 + 1e-6


def test_gradients_of_one_sample_are_its_own_each_capped() -> None:
    case = made("transformer encoder")
    model = wrapped(case.net, (TOKENS,), checkpoint="encoder.layers.*")
    targets = torch.randn(ROWS, 3, dtype=torch.float64)
    found = gradients(model, case.inputs, targets)
    for key, value in found.items():
        expected = torch.zeros_like(value)
        for row in range(ROWS):
            own = own_gradients(case, row, targets[row : row + 1])[key]
            expected += own * min(1.0, LIMIT / max(float(own.norm()), 1e-300))
        # Of float64 sums.
        assert float((value - expected).norm()) <= 1e-9 * max(float(expected.norm()), 1e-6), key


class Blocks(nn.Module):
    """Residual blocks that count their calls, in a way of calling them."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], width: int = 6, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.call = call

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = self.call(block, values)
        return self.head(values)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.drop = nn.Dropout(0.4)
        self.calls = 0

    def forward(self, values: Tensor, shift: Tensor | None = None, *, scale: Any = 1.0) -> Tensor:
        self.calls += 1
        hidden = self.first(self.norm(values))
        made = values + scale * self.second(self.drop(functional.gelu(hidden)))
        return made if shift is None else made + shift


def in_closure(block: nn.Module, values: Tensor) -> Tensor:
    shift = 0.1 * values.square()
    return checkpoint(lambda hidden: block(hidden, shift), values, use_reentrant=False)


def in_default(block: nn.Module, values: Tensor) -> Tensor:
    shift = values.square()
    return checkpoint(lambda hidden, shift=shift: block(hidden, shift), values, use_reentrant=False)


def with_parameter(block: Any, values: Tensor) -> Tensor:
    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return block(hidden) @ weight.mT @ weight

    return checkpoint(run, values, block.first.weight, use_reentrant=False)


def nested(block: nn.Module, values: Tensor) -> Tensor:
    return checkpoint(lambda hidden: checkpoint(block, hidden, use_reentrant=False), values, use_reentrant=False)


def in_parts(block: nn.Module, values: Tensor) -> Tensor:
    return checkpoint_sequential([block, torch.tanh], 2, values, use_reentrant=False)


CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "not reentrant": lambda block, values: checkpoint(block, values, use_reentrant=False),
    "reentrant": lambda block, values: checkpoint(block, values, use_reentrant=True),
    "a partial function": lambda block, values: checkpoint(
        partial(block, shift=values * 2, scale=values), values, use_reentrant=False
    ),
    "by name": lambda block, values: checkpoint(block, values, scale=values.tanh(), use_reentrant=False),
    "a value around it": in_closure,
    "a value in its defaults": in_default,
    "a parameter among its arguments": with_parameter,
    "one within another": nested,
    "one after another": in_parts,
    "no gradients behind it": lambda block, values: checkpoint(block, values.detach(), use_reentrant=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_way_of_calling_gives_the_gradients_of_a_plain_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Blocks(CALLS[name]).double()
    inputs, targets = torch.randn(ROWS, 6, dtype=torch.float64), torch.randn(ROWS, 3, dtype=torch.float64)
    model = wrapped(net, (6,))
    before = net.blocks[-1].calls
    found = drawn(model, inputs, targets)
    assert net.blocks[-1].calls == before + 2
    other = wrapped(copy.deepcopy(net), (6,))
    # What is called within a checkpoint is called as it is.
    monkeypatch.setattr("clipless_dp.isolation.checkpointing.hooked", not_hooked)
    expected = drawn(other, inputs, targets)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert net.blocks[-1].calls == before + 2


class not_hooked:
    def __init__(self, *hooks: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_less_memory_is_held_and_each_part_is_computed_once_more() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 16), torch.randn(64, 3)
    net = Blocks(lambda block, values: block(values), 16, 8)
    peaks = []
    for options in ({}, {"checkpoint": "blocks.*"}):
        model = wrapped(copy.deepcopy(net), (16,), **options)
        gradients(model, inputs, targets)
        calls = model.net.blocks[-1].calls
        peaks.append(traffic(partial(gradients, model, inputs, targets), torch.device("cpu")).peak)
        assert model.net.blocks[-1].calls - calls == 1 + len(options)
    # Seven of eight blocks hold their input alone, which is a tenth of what they save.
    assert peaks[1] < 0.6 * peaks[0]


def test_a_step_with_checkpointing_is_the_step_without() -> None:
    torch.manual_seed(0)
    data = torch.randn(40, 6), torch.arange(40) % 3
    settings = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 20, "lr": 0.5, "reproducible_seed": 0}
    net = Blocks(lambda block, values: block(values))
    weights = []
    for options in ({}, {"checkpoint": "blocks.*"}):
        for pieces in ({}, {"micro_batch_size": 4}):
            gated = gradient_gated(copy.deepcopy(net), isolation="vmap", limit="adaptive", **options)
            model = DPLipModel(gated, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(1.0))
            result = fit(model, data, audit=False, progress=False, accountant="rdp", **settings, **pieces)
            assert result.epsilon <= 4.0
            weights.append(torch.cat([value.detach().flatten() for value in model.net.parameters()]))
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])


def test_a_run_goes_on_with_checkpointing_turned_on_or_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.randn(24, 6), torch.arange(24) % 3
    run: dict[str, Any] = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 12, "lr": 0.5, "progress": False}
    net = Blocks(lambda block, values: block(values))
    for options in ({}, {"checkpoint": "blocks.*"}, {"checkpoint": "blocks.1"}, {}):
        gated = gradient_gated(copy.deepcopy(net), isolation="vmap", **options)
        model = DPLipModel(gated, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(1.0))
        result = fit(model, data, checkpoint=tmp_path / "run.pt", audit=False, accountant="rdp", **run)
        assert result.steps == 2


@pytest.mark.slow
def test_a_memory_budget_holds_more_rows() -> None:
    torch.manual_seed(0)
    data = torch.randn(128, 16), torch.arange(128) % 3
    net, rows = Blocks(lambda block, values: block(values), 16, 8), []
    for options in ({}, {"checkpoint": "blocks.*"}):
        gated = gradient_gated(copy.deepcopy(net), isolation="vmap", **options)
        model = DPLipModel(gated, input_shape=(16,), input_norm=3.0, loss=losses.TauCrossEntropy(1.0))
        result = fit(
            model, data, epsilon=4.0, delta=1e-3, epochs=1, batch_size=64, lr=0.1, memory_budget=400_000,
            audit=False, progress=False, accountant="rdp",
        )  # fmt: skip
        rows.append(result.micro_batch_size)
    assert 1 <= rows[0] < rows[1]


def test_a_second_backward_pass_through_a_kept_graph_is_refused_and_repeats_where_nothing_witnesses() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(ROWS, 6), torch.randn(ROWS, 3)
    model = wrapped(Blocks(CALLS["not reentrant"]), (6,))
    loss = model.loss(model(inputs), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="back-propagated twice"):
        loss.backward()
    with passes.unwitnessed():
        loss = model.loss(model(inputs), targets)
    model.zero_grad()
    loss.backward(retain_graph=True)
    once = [value.grad.clone() for value in model.net.parameters()]
    loss.backward()
    for value, first in zip(model.net.parameters(), once, strict=True):
        torch.testing.assert_close(value.grad, 2 * first, rtol=0, atol=0)


@pytest.mark.parametrize(
    "moved", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_checkpointed_as_well(moved: Callable[[nn.Module], nn.Module]) -> None:
    gated = gradient_gated(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)), checkpoint=["0", "1"])
    assert isinstance(gated, Isolated)
    assert moved(gated).checkpoint == ("0", "1")


def test_patterns_that_match_nothing_and_other_ways_of_isolation_are_refused() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ConfigurationError, match=r"no module matches 'layer\*'"):
        gradient_gated(net, checkpoint="layer*")
    with pytest.raises(ConfigurationError, match="checkpoint must be patterns"):
        gradient_gated(net, checkpoint=3)
    with pytest.raises(ConfigurationError, match="needs samples run one by one"):
        gradient_gated(net, isolation="graph", checkpoint="0")
    gated = gradient_gated(net, checkpoint="0")
    assert gradient_gated(gated, limit=2.0) is gated
    with pytest.raises(ConfigurationError, match="which stays"):
        gradient_gated(gated, checkpoint="2")


def within(run: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Runs code in a checkpointed part."""
    return lambda net, values: net.second(checkpoint(run, net, net.first(values).tanh(), use_reentrant=False))


class Twice:
    """Code that is other code the second time it runs after the network was wrapped."""

    def __init__(self, first: Callable[[Any, Tensor], Tensor], second: Callable[[Any, Tensor], Tensor]) -> None:
        self.codes: Sequence[Any] = first, second

    def __call__(self, net: Any, values: Tensor) -> Tensor:
        again = torch._C._current_graph_task_id() != -1
        return self.codes[again](net, values)


def kept(net: Any, values: Tensor) -> Tensor:
    net.kept = values.sin()
    return net.kept


def with_hooks(net: Any, values: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value.mean(0, keepdim=True), lambda value: value):
        return values.sin()


def overwritten(net: Any, values: Tensor) -> Tensor:
    return values.sin_()


def seeded(net: Any, values: Tensor) -> Tensor:
    torch.manual_seed(0)
    return values * torch.rand_like(values)


def more(net: Any, values: Tensor) -> Tensor:
    return values.sin().sin()


def chosen(net: Any, values: Tensor) -> Tensor:
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    return net.second(checkpoint(torch.sin, net.first(values), use_reentrant=False, context_fn=contexts))


def simple(net: Any, values: Tensor) -> Tensor:
    return values.sin()


def passed_back(net: Any, values: Tensor) -> Tensor:
    made = values.sin()
    made.sum().backward()
    return made


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "an activation that is kept": (within(kept), "keeps something"),
    "kept the second time": (within(Twice(simple, kept)), "keeps something"),
    "hooks": (within(with_hooks), "is packed"),
    "hooks the second time": (within(Twice(simple, with_hooks)), "is packed"),
    "an argument that is overwritten": (within(overwritten), "writes into a tensor that it has handed"),
    "a seed": (within(seeded), "seeds torch's generator"),
    "a seed the second time": (within(Twice(lambda net, values: values * torch.rand_like(values), seeded)), "seeds"),
    "other code the second time": (within(Twice(simple, more)), "calls more functions, sin"),
    "less code the second time": (within(Twice(more, simple)), "calls fewer functions, not sin"),
    "another dtype the second time": (
        within(Twice(simple, lambda net, values: values.float().sin().double())),
        "calls float instead of sin",
    ),
    "gradients that are off the second time": (within(Twice(simple, torch.no_grad()(simple))), "calls sin otherwise"),
    "a number that differs the second time": (
        within(lambda net, values: (values * torch._C._current_graph_task_id()).sin()), "calls mul otherwise",
    ),
    "a backward pass within the second time": (within(Twice(simple, passed_back)), "calls more functions, sum"),
    "selective checkpointing": (chosen, "context_fn"),
    "a batch that is unwrapped the second time": (
        within(Twice(simple, lambda net, values: values.sin() + torch._C._functorch.get_unwrapped(values).mean(0))),
        "debug_unwrap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_leave_a_checkpointed_part_is_refused_in_words(name: str) -> None:
    run, words = REFUSED[name]
    with pytest.raises(CliplessError, match=words):
        most_moved(model_of(run))
    assert torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None


@pytest.mark.parametrize(
    "run",
    [
        lambda net, values: values - values.mean(0),
        lambda net, values: values.roll(1, 0),
        lambda net, values: values + values.detach().mean(0),
    ],
    ids=["batch mean", "roll", "detached mean"],
)
def test_samples_do_not_meet_in_a_checkpointed_part(run: Callable[[Any, Tensor], Tensor]) -> None:
    assert most_moved(model_of(within(run))) <= 1 + 1e-9


def test_weights_that_change_before_the_way_back_are_refused() -> None:
    model = wrapped(Blocks(CALLS["not reentrant"]), (6,))
    with passes.unwitnessed():
        loss = model.loss(model(torch.randn(ROWS, 6)), torch.randn(ROWS, 3))
    with torch.no_grad():
        model.net.blocks[0].norm.bias.add_(1.0)
    with pytest.raises(PrivacyError, match="between a forward pass and its backward pass"):
        loss.backward()


def test_a_refused_way_back_leaves_no_gradients() -> None:
    torch.manual_seed(0)
    model = model_of(within(Twice(simple, more)))
    loss = model.loss(model(torch.randn(4, 6, dtype=torch.float64)), torch.arange(4) % 3)
    with pytest.raises(PrivacyError, match="calls more functions"):
        loss.backward()
    assert all(value.grad is None for value in model.net.parameters())


def test_a_checkpoint_around_the_whole_model_says_what_to_do() -> None:
    model = wrapped(Net(lambda net, values: net.second(net.first(values))), (6,))
    with pytest.raises(PrivacyError, match=r"gradient_gated\(net, checkpoint=...\)"):
        checkpoint(model, torch.randn(3, 6), use_reentrant=False)


def test_what_is_saved_is_computed_again_for_a_way_back_alone() -> None:
    torch.manual_seed(0)
    gated = gradient_gated(
        Net(
            lambda net, values: checkpoint(
                lambda hidden: net.second(net.first(hidden)).sin(), values, use_reentrant=False
            )
        ),
        isolation="vmap",
    )
    node = gated(torch.randn(ROWS, 6)).grad_fn
    while "Sin" not in node.name():
        node = node.next_functions[0][0]
    with pytest.raises(PrivacyError, match="by its way back alone"):
        node._saved_self  # noqa: B018


def test_a_torch_that_cannot_tell_hooks_apart_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    with pytest.raises(PrivacyError, match=r"needs torch 2\.8"):
        model_of(within(simple))


def test_checkpointing_may_be_turned_on_after_wrapping() -> None:
    case = made("layer norm, GELU")
    model = wrapped(case.net, tuple(case.inputs.shape[1:]))
    with torch.no_grad():
        targets = torch.randn_like(called(case.net, case.inputs))
    expected = gradients(model, case.inputs, targets)
    isolated = model.net
    assert isinstance(isolated, Isolated)
    isolated.__dict__["__checkpoint__"] = ("*",)
    found = gradients(model, case.inputs, targets)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
