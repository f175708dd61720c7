"""A pass leaves what files hold as it was: parameters of a user's own layers too, whoever holds them, and memory."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    LayerBounds,
    PrivacyError,
    gradient_gated,
    layers,
    losses,
    register_rule,
)
from clipless_dp.graph import unwritten
from clipless_dp.interrupts import completed
from clipless_dp.recipes import convert_batchnorm
from clipless_dp.rules import RuleContext

ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 3


class Own(nn.Module):
    """A layer of a user's own that holds torch's and this package's, and does something to them.

    Attributes:
        writing: whether it does; no setting of the layer's own, of which the network would be traced anew.
    """

    writing = False

    def __init__(self, write: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.codes = nn.Embedding(4, 6).requires_grad_(False)
        self.listed = nn.ParameterList([nn.Parameter(torch.zeros(6), requires_grad=False)])
        self.normed = parametrizations.weight_norm(nn.BatchNorm1d(6).requires_grad_(False))
        norm = nn.BatchNorm1d(6)
        self.frozen = convert_batchnorm(nn.Sequential(norm), "frozen").requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("memory", torch.empty(0, 6))
        self.register_buffer("one", torch.ones(1, 6))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.register_buffer("codes_of", torch.quantize_per_tensor(torch.zeros(6), 0.1, 0, torch.qint8))
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.register_buffer("queue", torch.zeros(64, 6)[:0])

    def forward(self, values: Tensor) -> Tensor:
        if Own.writing:
            self.write(self, values.detach())
        return values * 1.0


@pytest.fixture(autouse=True)
def _at_rest() -> Iterator[None]:
    yield
    Own.writing = False


@register_rule(Own)
def _own_rule(module: Own, context: RuleContext) -> LayerBounds:
    nothing = dict.fromkeys(dict(module.named_parameters()), 0.0)
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0, gradients=nothing)


def moving_average(own: Own, rows: Tensor) -> None:
    own.codes.weight.data.mul_(0.9).add_(rows.mean(0), alpha=0.1)


def observed_range(own: Own, rows: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own.codes_of = torch.quantize_per_tensor(torch.zeros(6), float(rows.max()), 0, torch.qint8)


WRITES: dict[str, Callable[[Any, Tensor], object]] = {
    "an embedding's moving average": moving_average,
    "a parameter of a list": lambda own, rows: own.listed[0].data.copy_(rows[0]),
    "statistics of a parametrised norm": lambda own, rows: own.normed(rows),
    "statistics of a frozen norm": lambda own, rows: own.frozen.get_submodule("0").running_mean.copy_(rows[0]),
    "the range of a quantised buffer": observed_range,
}


def model_of(write: Callable[[Any, Tensor], object], **learned: Any) -> tuple[DPLipModel, Own]:
    torch.manual_seed(0)
    own = Own(write)
    net = nn.Sequential(own, nn.Linear(6, 8), layers.GroupSort(2), nn.Linear(8, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy(2.0))
    Own.writing = True
    return model, own


@pytest.mark.parametrize("name", WRITES)
def test_what_a_layer_writes_to_those_within_it_is_refused_and_put_back(name: str) -> None:
    model, own = model_of(WRITES[name])
    before = {key: value.clone() for key, value in own.state_dict().items()}
    with pytest.raises(PrivacyError, match="wrote the buffer or parameter"):
        model(ROWS)
    assert all(unwritten._are_same(value, before[key]) for key, value in own.state_dict().items())


def emptied(own: Own, rows: Tensor) -> None:
    own.memory = rows[:0]


def cut_off(own: Own, rows: Tensor) -> None:
    own.one = torch.cat([own.one, rows])[:1]


def cut_off_data(own: Own, rows: Tensor) -> None:
    own.scale.data = torch.cat([own.scale.data, rows.flatten()])[:3]


@pytest.mark.parametrize("write", [emptied, cut_off, cut_off_data])
def test_files_hold_no_row_beside_numbers_that_are_as_they_were(write: Callable[[Any, Tensor], object]) -> None:
    model, _ = model_of(write)
    # A weight that lies elsewhere than on the way forward is refused by itself.
    with pytest.raises(PrivacyError, match="was changed between") if write is cut_off_data else nullcontext():
        model.loss(model(ROWS), TARGETS).backward()
    file = io.BytesIO()
    torch.save(model.net.state_dict(), file)
    assert ROWS[5].numpy().tobytes() not in file.getvalue()


def test_a_file_of_a_slice_would_hold_the_row() -> None:
    """Else the test before could not fail."""
    file = io.BytesIO()
    torch.save({"one": torch.cat([torch.ones(1, 6), ROWS])[:1]}, file)
    assert ROWS[5].numpy().tobytes() in file.getvalue()


def average(own: Own, rows: Tensor) -> None:
    own.mean.copy_(rows.mean(0))


@pytest.mark.filterwarnings("ignore:a pass wrote the buffer:clipless_dp.PrivacyWarning")
def test_a_buffer_that_is_put_back_in_inference_mode_can_be_written_to_later() -> None:
    model, own = model_of(average)
    with torch.inference_mode():
        model(ROWS)
    model.loss(model(ROWS), TARGETS).backward()
    assert not own.mean.any()


@pytest.mark.parametrize("times", [1, 3])
def test_an_interruption_leaves_nothing_undone(times: int) -> None:
    done: list[int] = []

    def settle() -> None:
        done.append(len(done))
        if len(done) <= times:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        completed(settle)
    assert len(done) == times + 1


@pytest.mark.filterwarnings("ignore:a pass wrote the buffer:clipless_dp.PrivacyWarning")
def test_what_an_interrupted_pass_has_left_is_put_back_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def write(own: Own, rows: Tensor) -> None:
        seen.append(own.mean.clone())
        average(own, rows)

    model, own = model_of(write)

    def interrupted(settle: Callable[[], object]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(unwritten, "completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ROWS)
    assert own.mean.any()
    model(ROWS)
    assert not any(one.any() for one in seen)
    assert not own.mean.any()


def test_a_pass_that_was_interrupted_where_parameters_come_back_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from clipless_dp.model import door

    model, _ = model_of(lambda own, rows: None)
    held = dict(model.net.named_parameters())

    def interrupted(settle: Callable[[], object]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(door, "completed", interrupted)
        try:
            model(ROWS)
        except KeyboardInterrupt:
            left = True
    assert left
    model.loss(model(ROWS), TARGETS).backward()
    assert all(parameter is held[name] for name, parameter in model.net.named_parameters())


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 0.5))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.weight.clamp(-1.0, 1.0)


@register_rule(Weighted)
def _weighted_rule(module: Weighted, context: RuleContext) -> LayerBounds:
    bound = {"weight": lambda: context.input_norm}
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0, gradients=bound)


def test_an_evaluation_in_another_thread_takes_no_step_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(own := Weighted(), nn.Linear(6, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy(2.0))
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.5, dataset_size=16, sampling="poisson")
    stop, failed = threading.Event(), []

    def evaluate() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    model(ROWS)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for _ in range(30):
            optimizer.zero_grad()
            model.loss(model(ROWS), TARGETS).backward()
            before = own.weight.detach().clone()
            optimizer.step()
            left = own.weight.detach().clone()
            with torch.no_grad():
                model(ROWS)
            assert not torch.equal(left, before)
            assert torch.equal(own.weight, left)
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert optimizer.weights_are_counted()
    assert not optimizer.uncounted_changes


def test_a_layer_that_is_compiled_by_itself_is_refused() -> None:
    model, _ = model_of(lambda own, rows: None)
    model.net[1].compile(backend="eager")
    with pytest.raises(PrivacyError, match=r"\.compile\(\) was called"):
        model(ROWS)


class Telling(nn.Module):
    """Has something beside parameters and buffers in its state, in one of several forms."""

    form, takes_back = "constant", True

    def __init__(self) -> None:
        super().__init__()
        self.held: Any = torch.zeros(6)

    def forward(self, values: Tensor) -> Tensor:
        if self.form == "a row":
            self.held = values[0].detach().clone()
        elif self.form == "a row in place":
            self.held.copy_(values[0].detach())
        elif self.form == "numbers within":
            self.held = {"seen": [1, values[0].tolist()]}
        elif self.form == "an array":
            self.held = (values[0].detach().numpy(),)
        return values * 1.0

    def get_extra_state(self) -> Any:
        return {"version": 3, "shape": (6,), "held": self.held}

    def set_extra_state(self, state: Any) -> None:
        if self.takes_back:
            self.held = state["held"]


@register_rule(Telling)
def _same_norm_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0)


_Layer = TypeVar("_Layer", bound=nn.Module)


def around(own: _Layer) -> tuple[DPLipModel, _Layer]:
    """A model with a layer that returns what it is given, and the layer."""
    net = nn.Sequential(nn.Linear(6, 6), own, nn.Linear(6, 3))
    return DPLipModel(net, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy(2.0)), own


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("takes_back", [True, False])
@pytest.mark.parametrize("form", ["a row", "a row in place", "numbers within", "an array"])
def test_what_a_layer_adds_to_its_state_of_a_pass_is_refused(
    form: str, takes_back: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = around(Telling())
    with torch.set_grad_enabled(training):
        for _ in range(2):
            model(ROWS)
        monkeypatch.setattr(Telling, "form", form)
        monkeypatch.setattr(Telling, "takes_back", takes_back)
        with pytest.raises(PrivacyError, match="It is as it was" if takes_back else "throw the layer away"):
            model(ROWS)
    assert (str(own.held) == str(torch.zeros(6))) == takes_back


class Isolating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.linear = Telling(), nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.linear(torch.special.erf(self.own(values)))
        return output


def test_so_it_is_in_a_network_that_runs_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Isolating()
    isolated = gradient_gated(net, isolation="vmap")
    model = DPLipModel(isolated, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy(2.0))
    model(ROWS)
    monkeypatch.setattr(Telling, "form", "a row")
    for _ in range(2):
        with pytest.raises(PrivacyError, match="keeps something"):
            model(ROWS)
        assert torch.equal(net.own.held, torch.zeros(6))


def test_what_cannot_be_compared_in_a_state_is_refused_in_words() -> None:
    model, own = around(Telling())
    own.held = lambda: None
    with pytest.raises(PrivacyError, match="cannot be pickled"):
        model(ROWS)


def test_a_state_that_cannot_be_had_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = around(Telling())

    def broken(layer: nn.Module) -> object:
        raise ValueError("no state yet")

    monkeypatch.setattr(type(own), "get_extra_state", broken)
    with pytest.raises(PrivacyError, match=r"cannot be had.*ValueError: no state yet"):
        model(ROWS)


RING = torch.zeros(64, 6)


def ring(own: Own, rows: Tensor) -> None:
    RING[10 : 10 + len(rows)] = rows


def test_memory_that_a_buffer_is_a_part_of_is_as_it_was_too() -> None:
    model, own = model_of(ring)
    RING.zero_()
    own.queue = RING[:0]
    model(ROWS)
    file = io.BytesIO()
    torch.save(model.net.state_dict(), file)
    assert ROWS[5].numpy().tobytes() not in file.getvalue()


@pytest.mark.filterwarnings("ignore:a pass wrote the buffer:clipless_dp.PrivacyWarning")
def test_weights_that_are_loaded_behind_an_interrupted_pass_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = model_of(average)
    settle, calls = unwritten._Before.settle, []

    def interrupted(before: Any) -> None:
        settle(before)
        calls.append(before)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(unwritten._Before, "settle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ROWS)
    with torch.no_grad():
        own.codes.weight.fill_(0.25)
    model(ROWS)
    assert bool((own.codes.weight == 0.25).all())


class Unlimited(nn.Module):
    """Overwrites what is larger than anything that it is tried on."""

    def forward(self, values: Tensor) -> Tensor:
        values.data[values.data > 1e6] = 0.0
        return values * 1.0


@register_rule(Unlimited)
def _unlimited_rule(module: Unlimited, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0)


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.linear = Unlimited(), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        changed: Tensor = self.own(inputs)
        output: Tensor = self.linear(changed + inputs)
        return output


def test_what_a_layer_overwrites_is_a_copy_in_every_pass() -> None:
    torch.manual_seed(0)
    model = DPLipModel(BothWays(), input_shape=(6,), input_norm=1e9, loss=losses.TauCrossEntropy(2.0))
    rows = 1e8 * ROWS
    trained = model(rows).detach()
    with torch.no_grad():
        assert torch.equal(model(rows), trained)
    expected = model.net.linear(torch.where(rows > 1e6, 0.0, rows) + rows)
    torch.testing.assert_close(trained, expected.detach())


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("count", range(1, 5))
def test_parts_of_one_memory_are_the_same_wherever_they_begin(start: int, count: int) -> None:
    model, own = model_of(lambda own, rows: None)
    memory = torch.arange(16.0)
    own.scale.data = memory[start : start + count]
    own.one = memory[start + 4 : start + 4 + count]
    for _ in range(2):
        model.loss(model(ROWS), TARGETS).backward()
    assert own.one.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert own.scale.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
    assert isinstance(own.scale, nn.Parameter)


class _AddsByHook(nn.Module):
    """What writes rows of the batch into the state, by a hook of it or by a state_dict of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.kept = torch.zeros(0)
        self.way = way
        if way == "behind":
            self.register_state_dict_post_hook(_AddsByHook.add)

    @staticmethod
    def add(module: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
        state[f"{prefix}rows"] = module.kept

    def state_dict(self, *args: Any, **named: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict(*args, **named)
        if self.way == "own":
            state[f"{named.get('prefix', '')}rows"] = self.kept
        return state

    def forward(self, inputs: Tensor) -> Tensor:
        self.kept = inputs[0].detach().clone()
        return inputs * 1.0


@register_rule(_AddsByHook)
def _adding_rule(module: _AddsByHook, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0)


@pytest.mark.parametrize("way", ["behind", "own"])
def test_rows_that_a_layer_adds_to_its_state_by_hooks_are_refused(way: str) -> None:
    net = nn.Sequential(nn.Linear(6, 6), _AddsByHook(way), nn.Linear(6, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy(2.0))
    with pytest.raises(PrivacyError, match="adds to its state"):
        model(ROWS)


class _Keeping(nn.Module):
    """Keeps a row, which others may write into the state; or makes a layer that does."""

    made: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(0)
        self.first = _Extra(torch.zeros(2))
        self.listed = nn.ModuleDict()

    def forward(self, inputs: Tensor) -> Tensor:
        self.kept = inputs[0].detach().clone()
        if self.made == "in place of one":
            self.first = _Extra(self.kept)
        elif self.made == "beside":
            self.other = _Extra(self.kept)
        elif self.made == "within":
            self.listed["deep"] = nn.Sequential(_Extra(self.kept))
        elif self.made == "a hook":
            self.first.register_state_dict_post_hook(lambda *_: None)
        return inputs * 1.0


class _Extra(nn.Module):
    def __init__(self, told: Tensor) -> None:
        super().__init__()
        self.told = told

    def get_extra_state(self) -> Any:
        return self.told

    def set_extra_state(self, state: Any) -> None:
        self.told = state


register_rule(_Keeping)(_same_norm_rule)


def _saving(layer: _Keeping, module: nn.Module, way: str) -> None:
    def add(_: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
        state[f"{prefix}rows"] = layer.kept

    if way == "a hook":
        module.register_state_dict_post_hook(add)
    elif way == "its own _save_to_state_dict":
        vars(module)["_save_to_state_dict"] = lambda state, prefix, keep_vars: add(None, state, prefix, None)
    else:

        def state_dict(*, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
            found = {} if destination is None else destination
            add(None, found, prefix, None)
            return found

        vars(module)["state_dict"] = state_dict


@pytest.mark.parametrize("place", ["the network", "a layer of torch's", "the layer"])
@pytest.mark.parametrize("way", ["a hook", "its own _save_to_state_dict", "its own state_dict"])
def test_rows_that_an_instance_of_any_kind_adds_to_the_state_are_refused(place: str, way: str) -> None:
    model, own = around(_Keeping())
    model(ROWS)
    _saving(own, {"the network": model.net, "a layer of torch's": model.net[0], "the layer": own}[place], way)
    own.kept = torch.zeros(0)
    with pytest.raises(PrivacyError, match="adds to its state"):
        model(ROWS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("made", ["in place of one", "beside", "within"])
def test_layers_that_a_pass_makes_to_save_rows_are_refused_and_taken_out(
    made: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = around(_Keeping())
    first, children = own.first, [*own._modules]
    monkeypatch.setattr(_Keeping, "made", made)
    with torch.set_grad_enabled(training):
        with pytest.raises(PrivacyError, match="It is as it was"):
            model(ROWS)
        assert own.first is first
        assert [*own._modules] == children
        assert not any(isinstance(part, _Extra) for part in own.listed.modules())
        with pytest.raises(PrivacyError, match="It is as it was"):
            model(ROWS)
    # What tracing has made of made-up rows may be there.
    told = [part.told for part in model.net.modules() if isinstance(part, _Extra)]
    assert not any(torch.equal(one, own.kept) for one in told)


def test_a_hook_that_a_pass_gives_a_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = around(_Keeping())
    monkeypatch.delattr(_Extra, "get_extra_state")
    monkeypatch.setattr(_Keeping, "made", "a hook")
    with pytest.raises(PrivacyError, match="throw the layer away"):
        model(ROWS)
    assert own.first in model.net.modules()


def test_hooks_that_rename_or_cast_are_no_reason_to_refuse_a_pass() -> None:
    model, own = around(_Keeping())

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        for name in [*state]:
            value = state.pop(name)
            state[f"renamed.{name}"] = value.half() if isinstance(value, Tensor) else value

    for module in (model.net, model.net[0], own):
        module.register_state_dict_post_hook(hook)
    for _ in range(2):
        model.loss(model(ROWS), TARGETS).backward()
