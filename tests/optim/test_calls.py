"""Calls of a private optimizer that go on to the base one: what is computed there is in nothing that is released."""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPOptimizer,
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    PrivacyError,
    gated,
    losses,
    passes,
)
from clipless_dp.optim.around import is_plain
from tests.support import EIGHT_ROWS, OwnSGD, gated_model, samples

ROWS, TARGETS = samples(8)
DATA = samples(200)


class Doors(OwnSGD):
    """Calls a function in each call that goes on to it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.looks: Callable[[], object] | None = None

    def _look(self) -> None:
        if self.looks is not None:
            self.looks()

    def train(self) -> None:
        self._look()

    def eval(self) -> None:
        self._look()

    def note_noise(self, deviations: object) -> None:
        self._look()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        # What is refused within a step drops them.
        if all(one.grad is not None for one in self.param_groups[0]["params"]):
            super().step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "looks"):
            self._look()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._look()

    def state_dict(self) -> dict[str, Any]:
        self._look()
        return super().state_dict()


class Hooked(Doors):
    """The same by a hook of what loads a state."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.register_load_state_dict_post_hook(lambda _: Doors._look(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        torch.optim.Optimizer.load_state_dict(self, state_dict)


def begun(kind: type[Doors] = Doors) -> tuple[DPLipModel, CliplessDPOptimizer, Any]:
    model = gated_model()
    base = kind(list(model.net.parameters()))
    return model, CliplessDPOptimizer(model, base, **EIGHT_ROWS), base


def value(model: DPLipModel) -> Tensor:
    return model.loss(model(ROWS), TARGETS)


def loss_of_net(model: DPLipModel) -> Tensor:
    return nn.functional.cross_entropy(model.net(ROWS), TARGETS)


def load(optimizer: CliplessDPOptimizer, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved)


def add(optimizer: CliplessDPOptimizer, saved: object) -> None:
    taken = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [taken]})


def step(optimizer: CliplessDPOptimizer, saved: object) -> None:
    value(optimizer.model).backward()
    optimizer.step()


CALLS: dict[str, tuple[type[Doors], Callable[[CliplessDPOptimizer, Any], object]]] = {
    "load_state_dict": (Doors, load),
    "a hook of load_state_dict": (Hooked, load),
    "train": (Doors, lambda optimizer, _: optimizer.train()),  # type: ignore[operator]
    "eval": (Doors, lambda optimizer, _: optimizer.eval()),  # type: ignore[operator]
    "add_param_group": (Doors, add),
    "state_dict": (Doors, lambda optimizer, _: optimizer.state_dict()),
    "note_noise": (Doors, step),
}


def by_values(model: DPLipModel, earlier: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [torch.full_like(one, float(loss_of_net(model))) for one in model.net.parameters()]


def by_autograd(model: DPLipModel, earlier: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        return list(torch.autograd.grad(loss_of_net(model), list(model.net.parameters())))


def by_a_pass(model: DPLipModel, earlier: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        value(model).backward()  # type: ignore[no-untyped-call]
    return [one.grad.clone() for one in model.net.parameters() if one.grad is not None]


def by_an_earlier_graph(model: DPLipModel, earlier: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(earlier, list(model.net.parameters())))


def by_an_earlier_graph_into_grad(model: DPLipModel, earlier: Tensor) -> list[Tensor]:
    earlier.backward()  # type: ignore[no-untyped-call]
    return [one.grad.clone() for one in model.net.parameters() if one.grad is not None]


def by_an_earlier_pass(model: DPLipModel, earlier: Tensor) -> list[Tensor]:
    return by_an_earlier_graph_into_grad(model, earlier)


WAYS = [by_values, by_autograd, by_a_pass, by_an_earlier_graph, by_an_earlier_graph_into_grad, by_an_earlier_pass]


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_what_a_base_optimizer_computes_of_batches_in_any_call_is_refused_and_kept_by_nothing(
    call: str, way: Callable[[DPLipModel, Tensor], list[Tensor]], caught: bool
) -> None:
    kind, go = CALLS[call]
    model, optimizer, base = begun(kind)
    saved, kept = copy.deepcopy(optimizer.state_dict()), []
    with contextlib.nullcontext() if way is by_an_earlier_pass else passes.unwitnessed():
        earlier = loss_of_net(model) if way is by_an_earlier_graph else value(model)

    def looks() -> None:
        with contextlib.suppress(PrivacyError) if caught else contextlib.nullcontext():
            kept.extend(way(model, earlier))

    base.looks = looks
    with contextlib.nullcontext() if caught else pytest.raises(PrivacyError, match=r"computes gradients|under way"):
        go(optimizer, saved)
    assert not kept
    assert all(one.grad is None for one in model.net.parameters()) or call == "note_noise"


def of_net(model: DPLipModel) -> None:
    loss_of_net(model).backward()  # type: ignore[no-untyped-call]


def of_another_wrapper(model: DPLipModel) -> None:
    other = DPLipModel(model.net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    value(other).backward()  # type: ignore[no-untyped-call]


def of_nobody(model: DPLipModel) -> None:
    with passes.unwitnessed():
        outputs = value(model)
    outputs.backward()  # type: ignore[no-untyped-call]


def compiled(model: DPLipModel) -> None:
    torch._dynamo.reset()
    made = torch.compile(model, backend="eager")
    model.loss(made(ROWS), TARGETS).backward()  # type: ignore[no-untyped-call]


def of_a_pass(model: DPLipModel) -> None:
    value(model).backward()  # type: ignore[no-untyped-call]


LEFT = [of_net, of_another_wrapper, of_nobody, compiled, of_a_pass]


@pytest.mark.parametrize(
    ("call", "left"),
    [
        (call, left)
        for call in CALLS
        for left in LEFT
        # Noise is noted of gradients that have theirs, and compilers take their time.
        if call != "note_noise" and (left is not compiled or call in ("load_state_dict", "train"))
    ],
)
def test_gradients_that_anybody_has_left_are_seen_by_no_call_and_are_there_behind_it(
    call: str, left: Callable[[DPLipModel], None]
) -> None:
    kind, go = CALLS[call]
    model, optimizer, base = begun(kind)
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    parameters = list(model.net.parameters())
    left(model)
    before = [one.grad for one in parameters]
    assert any(one is not None for one in before)
    base.looks = lambda: seen.extend(one.grad for one in parameters)
    if call in ("train", "eval") and left in (of_a_pass, compiled):
        # Weights of the pass and of its step would be two.
        with pytest.raises(PrivacyError, match="between backward"):
            go(optimizer, saved)
        assert not seen
    else:
        go(optimizer, saved)
        assert seen == [None] * len(parameters)
    # The one that came into a group anew is dropped.
    after = [one.grad for one in (parameters[:-1] if call == "add_param_group" else parameters)]
    assert all(one is other for one, other in zip(after, before, strict=call != "add_param_group"))


@pytest.mark.parametrize("call", ["load_state_dict", "a hook of load_state_dict", "train"])
def test_of_a_call_that_fails_nothing_is_noted_as_private(call: str) -> None:
    kind, go = CALLS[call]
    model, optimizer, base = begun(kind)
    saved = copy.deepcopy(optimizer.state_dict())

    def looks() -> None:
        for one in base.param_groups[0]["params"]:
            base.state[one]["kept"] = torch.randn_like(one)
        raise RuntimeError("half-way")

    base.looks = looks
    with pytest.raises((RuntimeError, ConfigurationError), match="half-way"):
        go(optimizer, saved)
    base.looks = None
    value(model).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(PrivacyError, match="not left by a private step"):
        optimizer.step()
    # A load that succeeds is the remedy.
    optimizer.skip_draw()
    optimizer.load_state_dict(saved)
    value(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("moment", ["before", "between a pass and its step", "after"])
def test_the_base_optimizer_is_not_exchanged_and_the_remedy_that_is_named_goes_on_with_the_ledger(moment: str) -> None:
    model, optimizer, base = begun()
    if moment == "after":
        step(optimizer, None)
    elif moment != "before":
        value(model).backward()  # type: ignore[no-untyped-call]
    other = torch.optim.Adam(model.net.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"accountant=optimizer\.accountant"):
        optimizer.base_optimizer = other
    assert optimizer.base_optimizer is base
    taken = len(optimizer.accountant)
    if moment == "between a pass and its step":
        optimizer.skip_draw()
    optimizer.zero_grad()
    settings = {name: setting for name, setting in EIGHT_ROWS.items() if name != "accountant"}
    after = CliplessDPOptimizer(model, other, accountant=optimizer.accountant, **settings)
    step(after, None)
    assert len(after.accountant) == taken + 1
    with pytest.raises(PrivacyError, match="is the base optimizer of a private one"):
        other.step()


def drawn() -> tuple[DPLipModel, CliplessDPOptimizer, PoissonBatches]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    base = torch.optim.SGD(model.net.parameters(), lr=0.1, momentum=0.9)
    optimizer = CliplessDPOptimizer(
        model, base, noise_multiplier=1.0, sample_rate=0.2, dataset_size=200, accountant="rdp"
    )
    return model, optimizer, PoissonBatches(DATA, sample_rate=0.2, steps=2)


def clear(optimizer: CliplessDPOptimizer) -> None:
    optimizer.state.clear()


def take_out(optimizer: CliplessDPOptimizer) -> None:
    group = optimizer.param_groups[0]
    group["params"] = group["params"][2:]


def freeze(optimizer: CliplessDPOptimizer) -> None:
    optimizer.param_groups[0]["params"][0].requires_grad_(False)


def by_a_loss(model: DPLipModel, batch: Any) -> Tensor:
    return model.loss(model(batch.inputs), batch.targets, batch.mask)


def by_slopes(model: DPLipModel, batch: Any) -> Tensor:
    inputs = batch.inputs.clone().requires_grad_()
    outputs = model.loss(model(inputs), batch.targets, batch.mask)
    (slopes,) = torch.autograd.grad(outputs, inputs)
    return slopes


def by_some_rows(model: DPLipModel, batch: Any) -> Tensor:
    part, *_ = batch.split(4)
    return by_a_loss(model, part)


def beside_public_rows(model: DPLipModel, batch: Any) -> Tensor:
    return by_a_loss(model, batch)


CHOICES = [clear, take_out, freeze]


@pytest.mark.parametrize("look", [by_a_loss, by_slopes, by_some_rows, beside_public_rows])
@pytest.mark.parametrize("choose", CHOICES)
def test_a_choice_between_two_passes_of_a_draw_is_one_by_the_draw_and_refused(
    choose: Callable[[CliplessDPOptimizer], None], look: Callable[[DPLipModel, Any], Tensor]
) -> None:
    model, optimizer, batches = drawn()
    for number, batch in enumerate(batches):
        if number:
            look(model, batch)
            choose(optimizer)
            if look is beside_public_rows:
                with passes.public():
                    model(torch.ones(3, 6))
        by_a_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        if number:
            with pytest.raises(PrivacyError, match="between a pass and its step"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("when", ["before its first pass", "behind its step", "behind a look without gradients"])
@pytest.mark.parametrize("choose", CHOICES)
def test_a_choice_that_is_not_between_passes_of_a_draw_is_free(
    choose: Callable[[CliplessDPOptimizer], None], when: str
) -> None:
    model, optimizer, batches = drawn()
    for number, batch in enumerate(batches):
        if number and when == "before its first pass":
            choose(optimizer)
        if number and when == "behind a look without gradients":
            # Which decides as a learning rate does.
            with torch.no_grad():
                by_a_loss(model, batch)
            choose(optimizer)
        by_a_loss(model, batch)
        by_a_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        by_a_loss(model, batch)
        if not number and when == "behind its step":
            choose(optimizer)
    assert optimizer.steps_taken == 2


def test_slopes_of_a_frozen_network_may_be_asked_for_before_it_trains_on_the_same_draw() -> None:
    model, optimizer, batches = drawn()
    for batch in batches:
        model.net.requires_grad_(False)
        by_slopes(model, batch)
        model.net.requires_grad_(True)
        by_a_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps_taken == 2


def test_behind_a_skipped_draw_and_in_the_next_one_choices_are_free_again() -> None:
    model, optimizer, _ = drawn()
    for number, batch in enumerate(PoissonBatches(DATA, sample_rate=0.2, steps=3)):
        by_a_loss(model, batch)
        if number == 1:
            optimizer.skip_draw()
            optimizer.state.clear()
            continue
        by_a_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps_taken == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("skipped", [False, True])
def test_behind_a_look_at_a_draw_that_is_used_or_skipped_choices_are_free_for_rows_of_no_draw(skipped: bool) -> None:
    model, optimizer, batches = drawn()
    for number, batch in enumerate(batches):
        by_a_loss(model, batch).backward()  # type: ignore[no-untyped-call]
        if number and skipped:
            optimizer.skip_draw()
        else:
            optimizer.step()
            by_a_loss(model, batch)
        optimizer.zero_grad()
    optimizer.state.clear()
    model.loss(model(ROWS), TARGETS).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert optimizer.steps_taken == 3 - skipped


class Code(torch.Tensor):
    """Calls a function once, where a step computes with it."""

    look: Callable[[], object] | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if cls.look is not None and func.__name__ in ("neg", "__neg__", "mul_"):
            look, cls.look = cls.look, None
            look()
        return super().__torch_function__(func, types, args, kwargs or {})


class Rate(float):
    """Does so where it is negated."""

    look: Callable[[], object] | None = None

    def __neg__(self) -> float:
        look, Rate.look = Rate.look, None
        if look is not None:
            look()
        return -float(self)


def _code_in_rate(base: torch.optim.SGD) -> None:
    base.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(Code)


def _code_in_number(base: torch.optim.SGD) -> None:
    base.param_groups[0]["lr"] = Rate(0.1)


def _code_in_momentum(base: torch.optim.SGD) -> None:
    for kept in base.state.values():
        kept["momentum_buffer"] = kept["momentum_buffer"].as_subclass(Code)


def _code_in_method(base: Any) -> None:
    ordinary = base._init_group

    def ask(*args: Any) -> Any:
        Rate(1.0).__neg__()
        return ordinary(*args)

    base._init_group = ask


@pytest.mark.parametrize(
    "put",
    [_code_in_rate, _code_in_number, _code_in_momentum, _code_in_method],
)
def test_settings_and_state_with_code_of_their_own_make_a_base_optimizer_no_plain_one(
    put: Callable[[Any], None],
) -> None:
    model = gated_model()
    base = torch.optim.SGD(model.net.parameters(), lr=0.1, momentum=0.9, foreach=False)
    optimizer = CliplessDPOptimizer(model, base, noise_multiplier=1.0, sample_rate=0.1, dataset_size=200)
    first, second = PoissonBatches(DATA, sample_rate=0.1, steps=2)
    model.loss(model(first.inputs), first.targets, first.mask).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.loss(model(second.inputs), second.targets, second.mask).backward()
    asked: list[Tensor] = []

    def look() -> None:
        with torch.enable_grad():
            asked.append(model.net(ROWS).sum())

    put(base)
    Code.look = Rate.look = look
    with pytest.raises(PrivacyError, match="calls the network or computes gradients within its step"):
        optimizer.step()
    assert not asked
    Code.look = Rate.look = None


def test_what_makes_states_and_holds_groups_by_code_of_its_own_makes_no_plain_optimizer() -> None:
    class Groups(list[Any]):
        pass

    base = torch.optim.SGD(gated_model().net.parameters(), lr=0.1)
    assert is_plain(base)
    base.state = collections.defaultdict(lambda: {}, base.state)
    assert not is_plain(base)
    base.state = collections.defaultdict(dict, base.state)
    assert is_plain(base)
    base.param_groups = Groups(base.param_groups)
    assert not is_plain(base)


@pytest.mark.parametrize("where", ["around", "closure"])
def test_a_mode_of_others_around_a_step_is_refused_and_the_step_can_be_taken_without_it(where: str) -> None:
    class Silent(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func is torch._foreach_add_ else func(*args, **(kwargs or {}))

    model = gated_model()
    base = torch.optim.SGD(model.net.parameters(), lr=0.1)
    optimizer = CliplessDPOptimizer(model, base, noise_multiplier=1.0, sample_rate=0.1, dataset_size=200)
    (batch,) = PoissonBatches(DATA, sample_rate=0.1, steps=1)
    model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
    with contextlib.ExitStack() as modes:

        def closure() -> float:
            modes.enter_context(Silent())
            return 0.0

        if where == "around":
            modes.enter_context(Silent())
        with pytest.raises(PrivacyError, match=r"the mode .*Silent is in force"):
            optimizer.step(closure if where == "closure" else None)
    assert len(optimizer.accountant) == 0
    optimizer.step()
    assert len(optimizer.accountant) == 1
