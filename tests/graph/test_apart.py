"""What a layer of a user's own keeps leads to no parameter."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    PoissonBatches,
    PrivacyError,
    PrivacyWarning,
    fit,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp.graph import unwritten
from clipless_dp.graph.apart import join_
from clipless_dp.rules import LayerBounds, RuleContext, register_function_rule, register_rule

ROWS, RATE = 64, 0.5
STORE: list[Tensor] = []


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    yield
    STORE.clear()


class Own(nn.Module):
    """A layer of a user's own: twice the input."""

    def forward(self, values: Tensor) -> Tensor:
        return values * 2.0


class InAttribute(Own):
    def forward(self, values: Tensor) -> Tensor:
        self.__dict__["kept"] = values
        return super().forward(values)


class InBuffer(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        self.kept = super().forward(values)
        return self.kept


class InGlobal(Own):
    def forward(self, values: Tensor) -> Tensor:
        STORE.append(values)
        return super().forward(values)


class Itself(Own):
    def forward(self, values: Tensor) -> Tensor:
        return values


class View(Own):
    def forward(self, values: Tensor) -> Tensor:
        return values.view(len(values), -1)


class InPlace(Own):
    def forward(self, values: Tensor) -> Tensor:
        return values.mul_(2.0)


class Scaled(Own):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, values: Tensor) -> Tensor:
        return torch.sigmoid(values) * self.scale


class WithHead(Own):
    """An auxiliary head beside the layer's value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, values: Tensor) -> Tensor:
        made = super().forward(values)
        self.__dict__["kept"] = self.head(made)
        return made


for _kind in (Own, InAttribute, InBuffer, InGlobal, Itself, View, InPlace, WithHead):

    @register_rule(_kind)
    def _own_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
        unused = {name: 0.0 for name, _ in module.named_parameters()}
        return LayerBounds(output_norm=lambda: 2.0 * context.input_norm, lipschitz=2.0, gradients=unused)


@register_rule(Scaled)
def _scaled_rule(module: Scaled, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=10.0, lipschitz=1.0, gradients={"scale": 10.0})


@fx.wrap
def joined_by_own_function(first: Tensor, second: Tensor) -> Tensor:
    STORE.append(first)
    return first + second


@register_function_rule(joined_by_own_function, call=lambda first, second: None)
def _joined_rule(context: RuleContext, args: object, kwargs: object) -> LayerBounds:
    return LayerBounds(output_norm=lambda: sum(context.input_norms()), lipschitz=(1.0, 1.0))


class Keeping:
    """A function of a user's own that is an object, and keeps what it sees."""

    __name__ = "keeping"

    def __call__(self, values: Tensor) -> Tensor:
        STORE.append(values)
        return 1.0 * values


keeping = Keeping()
fx.wrap("keeping")


@register_function_rule(keeping, call=lambda values: None)
def _keeping_rule(context: RuleContext, args: object, kwargs: object) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm)


class ByObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        return self.last(keeping(self.layer(values)))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.layer(values)
        return self.last(joined_by_own_function(hidden, torch.relu(hidden)))


def net_of(layer: nn.Module, activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), layer, activation or nn.ReLU(), nn.Linear(8, 3))


def model_of(net: nn.Module) -> DPLipModel:
    return DPLipModel(net, input_shape=(8,), input_norm=1.0, loss=losses.TauCrossEntropy())


def sgd(model: DPLipModel) -> CliplessDPSGD:
    return CliplessDPSGD(model, 0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=ROWS)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 8), torch.randint(3, (ROWS,))


def last_kept(model: DPLipModel) -> Tensor:
    return STORE[-1] if STORE else model.net[1].kept


NETS: dict[str, Callable[[], nn.Module]] = {
    "an attribute": lambda: net_of(InAttribute()),
    "a buffer": lambda: net_of(InBuffer()),
    "a global": lambda: net_of(InGlobal()),
    "an auxiliary head": lambda: net_of(WithHead()),
    "a function's global": Branches,
    "an object's": ByObject,
}


@pytest.mark.parametrize("kept_in", NETS)
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_side_loss_on_what_a_layer_keeps_is_refused_and_adds_nothing(kept_in: str, accumulated: bool) -> None:
    model = model_of(NETS[kept_in]())
    optimizer = sgd(model)
    if kept_in == "a buffer":
        # What a pass writes there is taken back: nothing is left to make a loss of.
        before = last_kept(model).detach().clone()
        with pytest.warns(PrivacyWarning, match="as it was again"):
            model(data()[0])
        assert not last_kept(model).requires_grad
        assert torch.equal(last_kept(model), before)
        return

    def loss(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        value = model.loss(model(inputs), targets, mask)
        return value + 100.0 * last_kept(model).square().sum()

    for batch in PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=ROWS):
        if accumulated:
            with pytest.raises(PrivacyError, match="around the gate"):
                optimizer.accumulate(batch, loss=loss)
            continue
        total = loss(*batch)
        with pytest.raises(PrivacyError, match="around the gate"):
            total.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_without_layers_apart_a_side_loss_would_enter_with_the_main_loss() -> None:
    model = model_of(net_of(InAttribute()))
    join_(model.graph.module)
    join_(model._network.fused.module)
    inputs, targets = data()
    (model.loss(model(inputs), targets) + 100.0 * last_kept(model).square().sum()).backward()
    total = torch.stack([p.grad.norm() for p in model.net.parameters() if p.grad is not None]).norm()
    assert total > ROWS * model.sensitivity().total


@pytest.mark.parametrize("first", ["main", "side"])
def test_a_side_loss_in_a_backward_pass_of_its_own_is_refused(first: str) -> None:
    model = model_of(net_of(WithHead()))
    inputs, targets = data()
    main = model.loss(model(inputs), targets)
    side = last_kept(model).square().sum()
    if first == "main":
        main.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="around the gate"):
        side.backward(retain_graph=True)
    assert torch.autograd.grad(side, model.net[0].weight, allow_unused=True) == (None,)


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module] | None]] = {
    "without parameters": (Own, None),
    "with parameters": (Scaled, None),
    "returns its input": (Itself, None),
    "returns a view": (View, None),
    "overwrites its input": (InPlace, None),
    "its output is overwritten": (Own, lambda: nn.ReLU(inplace=True)),
    "its input returned is overwritten": (Itself, lambda: nn.ReLU(inplace=True)),
    "a view returned is overwritten": (View, lambda: nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_gradients_of_a_layer_apart_are_those_of_the_network(kind: str) -> None:
    layer, activation = PLAIN[kind]
    net = net_of(layer(), activation and activation())
    model = model_of(deepcopy(net))
    optimizer = sgd(model)
    for inputs, targets, mask in PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=ROWS):
        model.loss(model(inputs), targets, mask).backward()
        rows = inputs[mask]
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1.0)
        out = net(rows)
        model.loss_function.per_sample(out, targets[mask]).sum().backward()
        for (name, ours), theirs in zip(model.net.named_parameters(), net.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None, name
            else:
                # The same float32 sums in other orders.
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        optimizer.step()
    with torch.no_grad():
        assert model(inputs).grad_fn is None
    model.eval()
    assert model.tightness((inputs[mask][:2], targets[mask][:2])).samples == 2


def test_a_function_of_a_users_own_takes_several_inputs_apart() -> None:
    torch.manual_seed(0)
    net = Branches()
    model = model_of(deepcopy(net))
    inputs, targets = data()
    inputs = inputs / inputs.norm(dim=1, keepdim=True)
    model.loss(model(inputs), targets).backward()
    model.loss_function.per_sample(net(inputs), targets).sum().backward()
    for ours, theirs in zip(model.net.parameters(), net.parameters(), strict=True):
        # The same float32 sums in other orders.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_layers_apart_can_be_checkpointed() -> None:
    model = model_of(net_of(Scaled()))
    optimizer = sgd(model)
    for inputs, targets, mask in PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=ROWS):
        with model.register.rehearsing():
            model.loss(checkpoint(model, inputs, use_reentrant=False), targets, mask).backward()
            found = [None if p.grad is None else p.grad.clone() for p in model.net.parameters()]
        model.loss(model(inputs), targets, mask).backward()
        for gradient, parameter in zip(found, model.net.parameters(), strict=True):
            assert (gradient is None) == (parameter.grad is None)
            assert gradient is None or torch.equal(gradient, parameter.grad)
        optimizer.step()


class Reaching(Own):
    """Reads the weight of another layer by a reference that no module shows."""

    def __init__(self, other: nn.Linear, hooked: bool) -> None:
        super().__init__()
        self.other, self.hooked = [other], hooked

    def forward(self, values: Tensor) -> Tensor:
        weight = self.other[0].weight
        if self.hooked and weight.requires_grad:
            weight.register_hook(lambda gradient: 1000.0 * gradient)
        STORE.append(nn.functional.linear(values.detach(), weight))
        return values


@register_rule(Reaching)
def _reaching_rule(module: Reaching, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=context.input_norm, lipschitz=1.0)


@pytest.mark.parametrize("hooked", [False, True])
def test_what_a_layer_does_with_the_weights_of_others_is_refused(hooked: bool) -> None:
    other = nn.Linear(8, 8)
    model = model_of(nn.Sequential(Reaching(other, hooked), other, nn.ReLU(), nn.Linear(8, 3)))

    def train() -> None:
        optimizer = sgd(model)
        (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=ROWS)
        value = model.loss(model(batch.inputs), batch.targets, batch.mask)
        (value if hooked else value + 100.0 * STORE[-1].nan_to_num().sum()).backward()
        optimizer.step()

    with pytest.raises(PrivacyError, match="given hooks" if hooked else "something else than passes"):
        train()


class Watching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        saved = values * 1.0
        STORE.append(weakref.ref(saved))
        ctx.save_for_backward(saved)
        return values * 2.0

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return 2.0 * cotangent


class Saving(Own):
    def forward(self, values: Tensor) -> Tensor:
        return Watching.apply(values)


register_rule(Saving)(_own_rule)


def test_what_a_layer_apart_saved_is_freed_by_the_backward_pass() -> None:
    model = model_of(net_of(Saving()))
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)
    saved = STORE[-1]
    assert saved() is not None
    loss.backward()
    assert saved() is None


class Written(Own):
    """Keeps what it saw in buffers, as a running scale does."""

    # Of the class: a setting of the layer would have it traced anew, which writes what it sees of made-up rows.
    how = "not at all"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(8))
        self.register_buffer("rows", torch.zeros(()))
        self.register_buffer("later", None)
        self.register_buffer("sparse", torch.zeros(8).to_sparse())
        self.frozen = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        if self.how == "sparse" and len(values):
            self.sparse = values[0].detach().to_sparse()
        elif self.how == "a frozen parameter" and len(values):
            self.frozen.data.copy_(values[0].detach())
        elif self.how == "in place" and len(values):
            self.last.copy_(values[0].detach())
        elif self.how == "behind autograd's back":
            self.rows.data.add_(len(values))
        elif self.how == "in place of none":
            self.later = values.detach()
        elif self.how == "at the first rows that are none of zeros" and bool(values.any()):
            self.register_buffer("first", values[0].detach().clone())
        elif self.how == "before an error":
            self.last.copy_(values[0].detach())
            raise KeyboardInterrupt
        elif self.how == "on the way back":
            values = Noting.apply(values, self)
        return super().forward(values)


class Noting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, layer):
        ctx.layer = layer
        return values.clone()

    @staticmethod
    def backward(ctx, cotangent):
        ctx.layer.last.copy_(cotangent[0])
        return cotangent, None


@register_rule(Written)
def _written_rule(module: Written, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: 10.0, lipschitz=10.0, gradients={"frozen": 0.0})


def numbers(value: Tensor) -> Tensor:
    return value.to_dense() if value.is_sparse else value


@pytest.mark.parametrize("wrap", [gated, gradient_gated])
@pytest.mark.parametrize(
    "how",
    [
        "in place",
        "behind autograd's back",
        "in place of none",
        "on the way back",
        "at the first rows that are none of zeros",
    ],
)
def test_a_pass_that_writes_a_buffer_is_refused_and_nothing_of_it_stays(how, wrap, monkeypatch):
    layer = Written()
    model = model_of(wrap(net_of(layer)))
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    inputs, targets = data()
    model.loss(model(inputs), targets).backward()
    monkeypatch.setattr(Written, "how", how)
    with pytest.raises(PrivacyError, match="wrote the buffer"):
        model.loss(model(inputs), targets).backward()
    after = model.net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(numbers(before[name]), numbers(after[name])) for name in before)
    # Code outside of passes may set it, as a schedule does.
    monkeypatch.setattr(Written, "how", "not at all")
    layer.last.fill_(0.5)
    model(inputs)


def test_of_a_pass_that_ends_in_an_error_no_buffer_keeps_anything(monkeypatch):
    model = model_of(gated(net_of(layer := Written())))
    monkeypatch.setattr(Written, "how", "before an error")
    with pytest.raises(KeyboardInterrupt):
        model(data()[0])
    assert not bool(layer.last.any())


def test_evaluation_writes_no_buffer_either(monkeypatch):
    model = model_of(gated(net_of(Written())))
    monkeypatch.setattr(Written, "how", "in place")
    with torch.no_grad(), pytest.raises(PrivacyError, match="wrote the buffer"):
        model.eval()(data()[0])


class Extra(Own):
    def get_extra_state(self):
        return torch.ones(3)

    def set_extra_state(self, state):
        pass


@register_rule(Extra)
def _extra_rule(module: Extra, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: 10.0, lipschitz=10.0)


def test_no_file_is_written_of_what_a_layer_adds_to_the_state(tmp_path):
    run = {"epsilon": 3.0, "delta": 1e-3, "epochs": 1, "batch_size": 10, "accountant": "rdp", "progress": False}
    result = fit(model_of(gated(net_of(Extra()))), data(), **run)
    with pytest.raises(PrivacyError, match="_extra_state"):
        result.save(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


class Remembering(Own):
    """True to its rule whatever the buffer holds; what it holds is of the batch before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()), persistent=False)
        self.register_buffer("made", None, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        sign = torch.sign(self.seen)
        self.seen.copy_(1.0 - values.detach().norm())
        self.made = torch.ones_like(values)
        return super().forward(values) * sign * self.made


@register_rule(Remembering)
def _remembering_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: 2.0 * context.input_norm, lipschitz=2.0)


def test_what_a_layer_has_seen_in_a_batch_does_not_reach_the_next_one() -> None:
    model = model_of(net_of(Remembering()))
    inputs, targets = data()
    before = model.net[1].seen.clone()
    with pytest.warns(PrivacyWarning, match=r"'1\.seen'.*as it was again"):
        first = model(inputs)
    model.loss(first, targets).backward()
    gradients = [parameter.grad.clone() for parameter in model.net.parameters() if parameter.grad is not None]
    assert gradients
    assert torch.equal(model.net[1].seen, before)
    model.register.drop()
    with pytest.warns(PrivacyWarning, match="as it was again"):
        assert torch.equal(model(inputs), first)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    QUANTISED = torch.quantize_per_tensor(torch.zeros(8), 0.1, 0, torch.qint8)
    COMPRESSED = torch.zeros(2, 4).to_sparse_csr()
with torch.inference_mode():
    INFERRED = torch.zeros(8)
KINDS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.zeros(8),
    "quantised": QUANTISED.clone,
    "sparse": lambda: torch.zeros(8).to_sparse(),
    "compressed": COMPRESSED.clone,
    "expanded": lambda: torch.zeros(1).expand(8),
    "conjugated": lambda: torch.zeros(8, dtype=torch.complex64).conj(),
    "made in inference mode": lambda: INFERRED,
    "complex": lambda: torch.zeros(8, dtype=torch.complex64),
    "none": lambda: torch.zeros(0),
}


class OfAnyKind(Own):
    """With a buffer of some kind, to which it does something."""

    write: Callable[[dict[str, Any], Tensor], None] | None = None

    def __init__(self, kind: str, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("kept", KINDS[kind](), persistent=persistent)

    def forward(self, values: Tensor) -> Tensor:
        if OfAnyKind.write is not None:
            OfAnyKind.write(self._buffers, values.detach())
        return super().forward(values)


@register_rule(OfAnyKind)
def _of_any_kind_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: 10.0, lipschitz=10.0)


def put(held: dict[str, Any], values: Tensor) -> None:
    held["kept"] = values[0].clone()


def resize(held: dict[str, Any], values: Tensor) -> None:
    held["kept"].resize_(5).fill_(float(values.sum()))


def behind(held: dict[str, Any], values: Tensor) -> None:
    held["kept"].data.copy_(values[0])


WRITES = {
    "put": (put, [*KINDS]),
    "resize": (resize, ["dense", "complex"]),
    "behind": (behind, ["dense", "quantised", "complex", "conjugated"]),
}


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_every_kind_that_nothing_writes_pass(kind: str, persistent: bool) -> None:
    model = model_of(gated(net_of(OfAnyKind(kind, persistent))))
    inputs, targets = data()
    model.loss(model(inputs), targets).backward()


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("how", "kind"), [(how, kind) for how, (_, kinds) in WRITES.items() for kind in kinds])
@pytest.mark.filterwarnings("ignore:a pass wrote the buffer:clipless_dp.PrivacyWarning")
def test_buffers_of_every_kind_are_as_they_were_behind_a_pass_that_writes_them(
    how: str, kind: str, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(gated(net_of(layer := OfAnyKind(kind, persistent))))
    before = layer.kept.detach().clone()
    monkeypatch.setattr(OfAnyKind, "write", staticmethod(WRITES[how][0]))
    with pytest.raises(PrivacyError, match="wrote the buffer") if persistent else nullcontext():
        model(data()[0])
    assert unwritten._are_same(before, layer.kept)


def test_functions_run_on_copies_in_the_graph_that_is_not_fused_too() -> None:
    model = DPLipModel(gated(ByObject()), input_shape=(8,), input_norm=1.0, loss=losses.TauCrossEntropy())
    seen: list[Tensor] = []
    layer = next(part for part in model.net.modules() if isinstance(part, nn.Linear))
    layer.register_forward_hook(lambda part, given, value: seen.append(value))
    STORE.clear()
    with torch.no_grad():
        model.graph.module(torch.ones(2, 8))
    assert len(STORE) == 1
    assert all(STORE[0].data_ptr() != value.data_ptr() for value in seen)


class HooksItself(InAttribute):
    """Its rule is of what its own hook makes of cotangents."""

    def forward(self, values: Tensor) -> Tensor:
        made = super().forward(values)
        if made.requires_grad:
            made.register_hook(lambda cotangent: 0.5 * cotangent)
        self.__dict__["kept"] = made
        return made


register_rule(HooksItself)(_own_rule)


class Larger(Tensor):
    """Multiplies in another way than torch does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return 100.0 * found if func in (torch.mul, torch.matmul, Tensor.mul, Tensor.matmul) else found


HOOKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "has code of its own": lambda cotangent: cotangent.as_subclass(Larger),
    "scales": lambda cotangent: 100.0 * cotangent,
    "scales in place": lambda cotangent: [cotangent.mul_(100.0), None][1],
    "scales beneath the counter": lambda cotangent: [cotangent.data.mul_(100.0), None][1],
    "normalises": lambda cotangent: cotangent / cotangent.norm(),
}
LOOKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "looks": lambda cotangent: None,
    "copies": lambda cotangent: cotangent.clone(),
}
KEPT = {
    "an input": lambda: net_of(InAttribute()),
    "an output with hooks": lambda: net_of(HooksItself()),
    "what an object returns": ByObject,
    "what a function was given": Branches,
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("dead", [False, True])
def test_a_hook_of_the_loop_on_what_a_layer_keeps_changes_nothing(kept: str, hook: str, dead: bool) -> None:
    model = model_of(KEPT[kept]())
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)
    last_kept(model).register_hook(HOOKS[hook])
    if dead:
        STORE.clear()
        vars(model.net[1] if isinstance(model.net, nn.Sequential) else model.net).pop("kept", None)
    with pytest.raises(PrivacyError, match="a layer has kept"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("hook", [*LOOKS, "retains"])
def test_it_may_look_and_layers_may_have_hooks_of_their_own(kept: str, hook: str) -> None:
    gradients = []
    for hooked in (False, True):
        torch.manual_seed(1)
        model = model_of(KEPT[kept]())
        inputs, targets = data()
        loss = model.loss(model(inputs), targets)
        if hooked and hook == "retains":
            last_kept(model).retain_grad()
        elif hooked:
            last_kept(model).register_hook(LOOKS[hook])
        loss.backward()
        gradients.append([cast(Tensor, parameter.grad) for parameter in model.net.parameters()])
    assert all(map(torch.equal, *gradients))


class Featured(Own):
    """Keeps what it was given and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, values: Tensor) -> Tensor:
        self.__dict__["given"] = values
        self.__dict__["returned"] = made = torch.sigmoid(values) * self.scale
        return made


class Wide(Own):
    """Makes many features of what it is given."""

    def forward(self, values: Tensor) -> Tensor:
        self.__dict__["returned"] = made = values.repeat(1, 300)
        return made


@register_rule(Wide)
def _wide_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: 300.0**0.5 * context.input_norm, lipschitz=300.0**0.5)


class Bare(Own):
    """The same of a first layer, without parameters."""

    def forward(self, values: Tensor) -> Tensor:
        self.__dict__["given"] = values
        self.__dict__["returned"] = made = values * 1.0
        return made


@register_rule(Featured)
def _featured_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=2.0, lipschitz=0.7, gradients={"scale": 3.0})


@register_rule(Bare)
def _bare_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0)


def standardised(kept: Tensor) -> None:
    """As for a plot."""
    features = kept.detach().numpy()
    features -= features.mean(0)
    features /= features.std(0)


def by_data(kept: Tensor) -> None:
    kept.data *= 255.0


def elsewhere(kept: Tensor) -> None:
    kept.data = (kept.data - kept.data.mean(0)) / kept.data.std(0)


def a_column(kept: Tensor) -> None:
    kept.detach().numpy()[:, 3] *= 255.0


@pytest.mark.parametrize("wrap", [gated, gradient_gated, nn.Identity])
@pytest.mark.parametrize("write", [standardised, by_data, elsewhere, a_column])
@pytest.mark.parametrize(("kept", "place"), [("given", 1), ("returned", 1), ("given", 0)])
def test_what_a_layer_keeps_may_not_be_written_over_between_the_ways(kept, place, write, wrap):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    net.insert(place, Featured())
    model = model_of(net if wrap is nn.Identity else wrap(net))
    layer = next(part for part in model.net.modules() if isinstance(part, Featured))
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)
    write(getattr(layer, kept))
    with pytest.raises(PrivacyError, match="has kept, was written to"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_a_column_of_many_features_may_not_be_written_over():
    net = nn.Sequential(nn.Linear(8, 8), Wide(), nn.Linear(2400, 3))
    model = model_of(net)
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)
    a_column(net[1].returned)
    with pytest.raises(PrivacyError, match="has kept, was written to"):
        loss.backward()


@pytest.mark.parametrize("kept", ["given", "returned"])
def test_a_hook_on_what_a_layer_keeps_may_not_write_over_it(kept):
    net = nn.Sequential(nn.Linear(8, 8), Featured(), nn.Linear(8, 3))
    model = model_of(net)
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)

    def write(_: Tensor) -> None:
        getattr(net[1], kept).data.mul_(1000.0)

    net[1].returned.register_hook(write)
    with pytest.raises(PrivacyError, match="has kept, was written to"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_buffers_that_a_rule_may_have_read_may_not_change_between_the_ways():
    layer = Featured()
    layer.register_buffer("centre", torch.zeros(8))
    model = model_of(nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 3)))
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)
    layer.centre.data.add_(1.0)
    with pytest.raises(PrivacyError, match=r"'1\.centre' was changed between"):
        loss.backward()


@pytest.mark.parametrize("kept", ["given", "returned"])
def test_what_a_layer_without_gradients_keeps_is_nothing_that_others_differentiate_by(kept):
    gradients = []
    for writes in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(Bare(), nn.Linear(8, 3))
        model = model_of(net)
        inputs, targets = data()
        loss = model.loss(model(inputs), targets)
        if writes:
            by_data(getattr(net[0], kept))
        loss.backward()
        gradients.append(net[1].weight.grad)
    assert torch.equal(*gradients)


def test_a_hook_on_what_a_layer_keeps_may_not_write_weights_of_layers_before_it():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Featured(), nn.Linear(8, 3))
    model = model_of(net)
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)

    def write(_: Tensor) -> None:
        net[1].weight.data.mul_(1000.0)

    net[2].returned.register_hook(write)
    with pytest.raises(PrivacyError, match=r"'1\.weight' was changed between"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_weights_behind_a_layer_whose_rule_may_read_any_may_not_change_between_the_ways():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Featured(), nn.Linear(8, 3))
    model = model_of(net)
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)
    net[1].weight.data.mul_(1000.0)
    with pytest.raises(PrivacyError, match=r"'1\.weight' was changed between"):
        loss.backward()
