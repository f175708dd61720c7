"""Whatever stands where an argument should, the answer is a typed error: no row is read, nothing is charged."""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import sys
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

import clipless_dp
from accounting import Accountant, AccountingError, InvalidParameterError, create_accountant
from clipless_dp import CliplessError, constraints, losses
from clipless_dp.errors import ConfigurationError, UnsupportedModuleError
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.model import DPLipModel, WeightAverage
from clipless_dp.optim import CliplessDPOptimizer, CliplessDPSGD
from clipless_dp.sampling import PoissonBatches, PoissonBatchSampler, StreamedBatches
from clipless_dp.sampling.people import ROWS_PER_GROUP
from clipless_dp.training import evaluate, fit
from tests.support import gated_model, samples

Fits = Callable[[Any], bool]


class Counted(Dataset[Any]):
    """Samples that count how often one is read."""

    def __init__(self) -> None:
        self.inputs, self.targets = samples(40)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return self.inputs[index], self.targets[index]


# What an argument may be: junk is everything else.


def number(low: float = 0.0, high: float = math.inf, *, low_too: bool = False, high_too: bool = False) -> Fits:
    def fits(value: Any) -> bool:
        if not isinstance(value, Real) or isinstance(value, bool):
            return False
        try:
            found = float(value)
        except OverflowError:
            return False
        return low < found < high or (low_too and found == low) or (high_too and found == high)

    return fits


def whole(least: float = 1, most: float = 10**15) -> Fits:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def word(*words: str) -> Fits:
    return lambda value: isinstance(value, str) and value in words


def either(*alternatives: Fits) -> Fits:
    return lambda value: any(fits(value) for fits in alternatives)


def nothing(value: Any) -> bool:
    return value is None


def never(value: Any) -> bool:
    return False


def text(value: Any) -> bool:
    return isinstance(value, str)


def truth(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def scalar_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() and 0 <= value < math.inf


def names(value: Any) -> bool:
    return text(value) or (isinstance(value, (tuple, list)) and all(isinstance(part, str) for part in value))


def large_shape(value: Any) -> bool:
    """Of more memory than a test should take: not junk, but not tried either."""
    return isinstance(value, (tuple, list)) and all(map(whole(), value)) and 10**6 < math.prod(value) <= 2**40


any_seed = either(nothing, whole(-math.inf, math.inf))
rate = number(0.0, 1.0, high_too=True)
cap = number(1e-8, low_too=True)
decay = number(0.0, 1.0, low_too=True)
a_device = either(nothing, word("cpu", "meta"), lambda value: whole(0)(value) and torch.accelerator.is_available())
learning_rate = either(number(low_too=True), scalar_tensor)
multiplier = number(1e-100, 1e100, low_too=True, high_too=True)

# Without an id for each row, the others say nothing.
GROUPS: dict[str, Fits] = {
    # Several ids may be those of as many rows.
    "groups": either(nothing, lambda value: isinstance(value, (tuple, list)) and len(value) > 1),
    "rows_per_group": lambda value: whole()(value) and value == ROWS_PER_GROUP,
    "group_weights": word("mean"),
}

FIT: dict[str, Fits] = {
    "model": never,
    "dataset": never,
    "epsilon": number(),
    "delta": number(0.0, 1.0),
    "epochs": either(nothing, number()),
    "batch_size": either(nothing, whole(1, 40)),
    "lr": either(nothing, learning_rate),
    "momentum": either(nothing, decay),
    "optimizer": either(nothing, callable, word("sgd", "adam")),
    "scheduler": callable,
    "accountant": word("prv", "rdp", "auto"),
    "allocation": word("global", "per-layer", "min-variance"),
    "validation": nothing,
    "dataset_size": either(nothing, whole()),
    "micro_batch_size": either(nothing, whole()),
    "memory_budget": either(nothing, number()),
    "stream": either(nothing, truth),
    "checkpoint": either(nothing, text),
    "checkpoint_every": whole(),
    "reproducible_seed": any_seed,
    "noise": either(nothing, word("system", "secure")),
    "noise_multiplier": either(nothing, multiplier),
    "compile": either(truth, text),
    "audit": either(truth, word("quick", "full")),
    "augment": either(nothing, callable),
    "multiplicity": whole(1, 1),
    "ema": either(nothing, decay),
    "noise_schedule": either(nothing, callable),
    "progress": truth,
    **GROUPS,
}

SGD: dict[str, Fits] = {
    "model": never,
    "lr": learning_rate,
    "momentum": decay,
    "dampening": number(low_too=True),
    "weight_decay": number(low_too=True),
    "nesterov": truth,
    "noise_multiplier": multiplier,
    "sample_rate": rate,
    "dataset_size": whole(),
    "accountant": word("prv", "rdp", "auto"),
    "allocation": word("global", "per-layer", "min-variance"),
    "sampling": word("announced", "poisson", "none"),
    "noise": either(nothing, word("system", "secure")),
    "budget": either(
        nothing,
        lambda value: (
            isinstance(value, (tuple, list)) and len(value) == 2 and number()(value[0]) and number(0.0, 1.0)(value[1])
        ),
    ),
    "unit": word("row", "person"),
}

MODEL: dict[str, Fits] = {
    "net": lambda value: isinstance(value, nn.Linear),
    "input_shape": either(lambda value: isinstance(value, (tuple, list)) and [*value] == [6], large_shape),
    "input_norm": cap,
    "loss": never,
    "constraint": either(nothing, lambda value: isinstance(value, Mapping) and not value),
    "row_invariant": either(nothing, truth),
    "rescale": truth,
}

GATED: dict[str, Fits] = {
    "net": never,
    "input_norm": cap,
    "cotangent_norm": cap,
    "input_mode": word("sphere", "ball"),
    "cotangent_mode": word("clip", "normalize"),
    "layers": lambda value: names(value) and bool({"*", "0", "2"} & {*([value] if text(value) else value)}),
}

GRADIENT_GATED: dict[str, Fits] = {
    "net": never,
    "limit": either(cap, word("adaptive")),
    "bias_limit": either(nothing, cap),
    "mode": word("clip", "normalize"),
    "floor": cap,
    "layers": names,
    "chunk": either(nothing, whole()),
    "isolation": word("auto", "graph", "vmap"),
    "select": either(nothing, text, whole(-math.inf, math.inf), callable),
    "joint": either(nothing, word("layer", "network")),
    "checkpoint": names,
}

BATCHES: dict[str, Fits] = {
    "dataset": never,
    "sample_rate": rate,
    "steps": whole(0),
    "device": a_device,
    "physical_batch_size": either(nothing, whole()),
    "seed": any_seed,
    "start": whole(0, 3),
    **GROUPS,
}

SAMPLER: dict[str, Fits] = {
    "dataset_size": whole(),
    **{name: BATCHES[name] for name in ("sample_rate", "steps", "seed", "start", *GROUPS)},
}

limit = number(1e-8, 1e18, low_too=True, high_too=True)
CONSTRAINT: dict[str, Fits] = {
    "limit": limit,
    "iterations": whole(),
    "tangent": truth,
    "signed": truth,
    "strength": number(),
    "kind": word("log", "hinge"),
    "threshold": number(),
    "rounds": whole(1, 6),
    "scales": word("unit", "norm", "perron"),
    "side": word("smaller", "outputs"),
}
KINDS = [getattr(constraints, name) for name in constraints.__all__ if inspect.isclass(getattr(constraints, name))]
KINDS.remove(constraints.Constraint)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _fit(data: Counted, accountant: Accountant) -> tuple[Callable[..., Any], dict[str, Any]]:
    promised = {"epsilon": 5.0, "delta": 1e-4, "epochs": 1, "batch_size": 8, "progress": False, "audit": False}
    return fit, {"model": MODEL_IN_USE, "dataset": data, "accountant": accountant, **promised}


def _sgd(data: Counted, accountant: Accountant) -> tuple[Callable[..., Any], dict[str, Any]]:
    public = {"noise_multiplier": 1.0, "sample_rate": 0.2, "dataset_size": 40}
    return CliplessDPSGD, {"model": MODEL_IN_USE, "lr": 0.1, "accountant": accountant, **public}


def _model(data: Counted, accountant: Accountant) -> tuple[Callable[..., Any], dict[str, Any]]:
    return DPLipModel, {"net": net(), "input_shape": (6,), "input_norm": 1.0, "loss": losses.TauCrossEntropy()}


def _batches(kind: Callable[..., Any]) -> Any:
    return lambda data, accountant: (kind, {"dataset": data, "sample_rate": 0.2, "steps": 3})


MODEL_IN_USE = gated_model()
TABLES: dict[str, tuple[Any, dict[str, Fits]]] = {
    "fit": (_fit, FIT),
    "CliplessDPSGD": (_sgd, SGD),
    "DPLipModel": (_model, MODEL),
    "gated": (lambda data, accountant: (gated, {"net": net()}), GATED),
    "gradient_gated": (lambda data, accountant: (gradient_gated, {"net": net()}), GRADIENT_GATED),
    "PoissonBatches": (_batches(PoissonBatches), BATCHES),
    "StreamedBatches": (_batches(StreamedBatches), BATCHES),
    "PoissonBatchSampler": (
        lambda data, accountant: (PoissonBatchSampler, {"dataset_size": 40, "sample_rate": 0.2, "steps": 3}),
        SAMPLER,
    ),
    "WeightAverage": (
        lambda data, accountant: (WeightAverage, {"model": MODEL_IN_USE, "decay": 0.5}),
        {"model": never, "decay": decay},
    ),
    **{
        kind.__name__: (
            lambda data, accountant, kind=kind: (
                kind,
                {"strength": 1.0} if "strength" in inspect.signature(kind.__init__).parameters else {},
            ),
            {name: CONSTRAINT[name] for name in inspect.signature(kind.__init__).parameters if name != "self"},
        )
        for kind in KINDS
    },
}

# fmt: off
JUNK = [
    None, True, False, 0, -1, 1.5, 10**30, 10**400, -(10**400), math.nan, math.inf, -math.inf, -0.0, 1e-320,
    "", "3", b"x", 1j, (), [], {}, [1], (1, 2), {"a": 1}, {3: None}, object, object(), Ellipsis,
    np.int64(2), np.float32(2.0), np.float64(math.nan), np.bool_(True), np.zeros(2), np.zeros(()),
    torch.tensor(2.0), torch.tensor(2), torch.zeros(3), torch.tensor(math.nan), torch.float32,
    nn.Linear(6, 3), lambda *arguments: None,
]
# fmt: on
MORE = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@pytest.mark.parametrize("name", TABLES)
def test_the_table_has_each_argument(name: str) -> None:
    make, table = TABLES[name]
    function, _ = make(Counted(), create_accountant("rdp"))
    signature = inspect.signature(function.__init__ if inspect.isclass(function) else function)
    assert {*signature.parameters} - {"self"} == {*table}


ARGUMENTS = [(name, one) for name, (_, table) in TABLES.items() for one in table]


def refuse(name: str, argument: str, junk: Any) -> None:
    """Whether junk is refused as it should be."""
    make, _ = TABLES[name]
    rows, accountant = Counted(), create_accountant("rdp")
    before = [parameter.clone() for parameter in MODEL_IN_USE.parameters()]
    function, arguments = make(rows, accountant)
    with pytest.raises(CliplessError) as refusal:
        function(**{**arguments, argument: junk})
    assert 0 < len(str(refusal.value)) < 1000
    assert rows.reads == 0
    assert len(accountant) == 0
    assert all(map(torch.equal, before, MODEL_IN_USE.parameters()))


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_junk_is_refused_in_a_typed_error_before_a_row_is_read_or_anything_charged(name: str, argument: str) -> None:
    for junk in JUNK:
        if not TABLES[name][1][argument](junk):
            refuse(name, argument, junk)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@given(data=st.data())
def test_any_junk_is(name: str, argument: str, data: st.DataObject) -> None:
    refuse(name, argument, data.draw(MORE.filter(lambda value: not TABLES[name][1][argument](value))))


@pytest.mark.parametrize("name", TABLES)
def test_numbers_of_numpy_are_numbers(name: str) -> None:
    make, table = TABLES[name]
    given_: dict[str, Any] = {
        "batch_size": np.int64(8),
        "micro_batch_size": np.int32(3),
        "multiplicity": np.int64(1),
        "checkpoint_every": np.int64(2),
        "reproducible_seed": np.int64(3),
        "seed": np.uint8(3),
        "start": np.int64(1),
        "steps": np.int64(3),
        "physical_batch_size": np.int16(8),
        "dataset_size": np.int64(40),
        "sample_rate": np.float32(0.25),
        "epsilon": np.float32(4.0),
        "epochs": np.float64(0.5),
        "lr": np.float32(0.5),
        "momentum": np.float64(0.5),
        "noise_multiplier": np.int64(2),
        "input_norm": np.float32(2.0),
        "cotangent_norm": np.int64(2),
        "limit": np.float32(2.0),
        "iterations": np.int64(2),
        "chunk": np.int64(2),
        "stream": np.bool_(False),
        "ema": np.float32(0.5),
        "decay": np.float32(0.5),
    }
    function, arguments = make(Counted(), create_accountant("rdp"))
    if name == "fit":
        arguments["model"] = gated_model()
    function(**{**arguments, **{one: value for one, value in given_.items() if one in table}})


def test_a_seed_of_numpy_is_the_plain_one() -> None:
    plain, numpys = ([*PoissonBatchSampler(40, sample_rate=0.3, steps=5, seed=seed)] for seed in (3, np.int64(3)))
    assert plain == numpys


# What a schedule, or a user's own optimizer, sets.


def _trained(lr: Any, *, base: Any = None, **changes: Any) -> tuple[CliplessDPOptimizer, Callable[[], None]]:
    model, (inputs, targets) = gated_model(), samples(40)
    base = base or (lambda parameters: torch.optim.SGD(parameters, lr=lr))
    optimizer = CliplessDPOptimizer(
        model, base(model.net.parameters()), noise_multiplier=1.0, sample_rate=0.2, dataset_size=40,
        accountant="rdp", sampling="none", **changes,
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        model.loss(model(inputs), targets).backward()
        optimizer.step()

    return optimizer, step


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "dampening"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, 10**400, torch.tensor(math.nan)], ids=repr)
def test_a_step_whose_settings_are_no_finite_numbers_is_refused_before_it_is_charged(name: str, value: Any) -> None:
    optimizer, step = _trained(0.1)
    step()
    before = [parameter.clone() for parameter in optimizer.model.parameters()]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ConfigurationError, match=f"{name} of parameter group 0.*Nothing was charged"):
        step()
    assert len(optimizer.accountant) == optimizer.steps_taken == 1
    assert all(map(torch.equal, before, optimizer.model.parameters()))
    optimizer.param_groups[0][name] = 0.1
    # What the refused step did not release is left out by word.
    optimizer.skip_draw()
    step()
    assert len(optimizer.accountant) == 2


@pytest.mark.parametrize(
    "base",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=math.nan),
        lambda parameters: _adam(parameters),
    ],
)
def test_an_optimizer_whose_settings_are_no_finite_numbers_is_refused_when_it_is_wrapped(base: Any) -> None:
    with pytest.raises(ConfigurationError, match="of parameter group 0 is nan"):
        _trained(0.1, base=base)


def _adam(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(parameters)
    optimizer.param_groups[0]["betas"] = (0.9, math.nan)
    return optimizer


@pytest.mark.parametrize(
    "base",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(0.1)),
        torch.optim.Adam, torch.optim.AdamW, torch.optim.Adadelta, torch.optim.Rprop, torch.optim.RMSprop,
        torch.optim.ASGD,
    ],
)  # fmt: skip
def test_optimizers_with_settings_of_their_own_are_taken(base: Any) -> None:
    optimizer, step = _trained(0.1, base=base)
    optimizer.param_groups[0]["anything"] = math.inf
    step()
    assert optimizer.steps_taken == 1


def test_fit_refuses_the_step_at_which_a_schedule_returns_nan() -> None:
    accountant, model = create_accountant("rdp"), gated_model()

    def schedule(optimizer: Any, steps: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.nan if step == 2 else 1.0)

    promised = {"epsilon": 5.0, "delta": 1e-4, "epochs": 1, "batch_size": 8, "progress": False, "audit": False}
    with pytest.raises(ConfigurationError, match="lr of parameter group 0 is nan"):
        fit(model, samples(40), accountant=accountant, scheduler=schedule, **promised)
    assert len(accountant) == 2
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize("allocation", ["per-layer", "min-variance"])
def test_the_noise_follows_an_allocation_that_is_assigned(allocation: Any) -> None:
    (optimizer, step), (built, _) = _trained(0.1), _trained(0.1, allocation=allocation)
    step()
    assert optimizer.noise_deviations() != built.noise_deviations()
    optimizer.allocation = allocation
    step()
    assert optimizer.noise_deviations() == built.noise_deviations()
    with pytest.raises(ConfigurationError, match="allocation"):
        optimizer.allocation = "equal"
    assert optimizer.allocation == allocation


@pytest.mark.parametrize("value", [0, True, "3", 1.5, None, math.nan])
def test_accumulate_refuses_what_is_no_number_of_views(value: Any) -> None:
    optimizer, _ = _trained(0.1)
    (batch,) = PoissonBatches(samples(40), sample_rate=0.2, steps=1)
    with pytest.raises(ConfigurationError, match="multiplicity"):
        optimizer.accumulate(batch, augment=lambda row: row, multiplicity=value)
    optimizer.accumulate(batch, augment=lambda row: row, multiplicity=np.int64(2), micro_batch_size=np.int64(3))
    optimizer.step()


def test_views_without_augmentation_are_refused_before_a_row_is_read() -> None:
    rows, accountant = Counted(), create_accountant("rdp")
    function, arguments = _fit(rows, accountant)
    with pytest.raises(ConfigurationError, match="multiplicity=2 without augment"):
        function(**arguments, multiplicity=2)
    assert rows.reads == 0


@pytest.mark.parametrize("put", [gated, gradient_gated])
def test_a_bare_string_is_one_pattern_of_layers(put: Any) -> None:
    whole_, one = put(net(), layers=("2",)), put(net(), layers="2")
    assert [*map(str, one.modules())] == [*map(str, whole_.modules())]


def test_a_compiled_model_is_a_wrapped_one() -> None:
    WeightAverage(torch.compile(gated_model(), backend="eager"), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="DPLipModel"):
        WeightAverage(net(), 0.5)  # type: ignore[arg-type]


# Errors have one base.


def test_errors_of_the_accounting_are_errors_of_the_package_under_all_their_names() -> None:
    assert issubclass(AccountingError, CliplessError)
    assert issubclass(AccountingError, ValueError)
    error = pickle.loads(pickle.dumps(InvalidParameterError("out of range")))
    assert (type(error), str(error)) == (InvalidParameterError, "out of range")
    # Pickles of before the base was shared name it by the module that it was in.
    assert pickle.loads(b"cclipless_dp.errors\nCliplessError\n.") is CliplessError
    with pytest.raises(CliplessError, match="accountant"):
        CliplessDPSGD(gated_model(), 0.1, noise_multiplier=1.0, sample_rate=0.2, dataset_size=40, accountant="3")


# Predictions that are none.


NAN = math.nan


@pytest.mark.parametrize(
    ("loss", "output", "target", "right"),
    [
        (losses.TauCrossEntropy(), [[1.0, 0.0], [NAN, NAN], [NAN, 0.0]], [0, 0, 0], [True, False, False]),
        (losses.MulticlassHinge(), [[1.0, 0.0], [NAN, NAN]], [0, 0], [True, False]),
        (losses.CosineSimilarity(), [[1.0, 0.0], [NAN, NAN]], [0, 0], [True, False]),
        (losses.BinaryCrossEntropy(), [[-1.0], [NAN], [1.0]], [0.0, 0.0, 1.0], [True, False, True]),
        (losses.TokenCrossEntropy(), [[[1.0, 0.0], [NAN, NAN]], [[NAN, NAN]] * 2], [[0, 0]] * 2, [0.5, 0.0]),
    ],
)
def test_scores_that_are_nan_are_no_right_predictions(loss: losses.Loss, output: Any, target: Any, right: Any) -> None:
    found = loss.correct(torch.tensor(output), torch.tensor(target))
    assert found is not None
    assert found.tolist() == right


def test_a_dropped_sample_is_no_right_prediction() -> None:
    inputs, _ = samples(4)
    inputs[1:] = NAN
    model = gated_model()
    label = int(model(inputs)[0].argmax())
    model.loss_function = losses.TauCrossEntropy()
    accuracy, _ = evaluate(model, (inputs, torch.tensor([label, 0, 0, 0])))
    assert accuracy == 0.25


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


@pytest.mark.parametrize("loss", [losses.TokenCrossEntropy(), losses.CausalCrossEntropy()])
def test_sequences_in_which_nothing_counts_change_neither_accuracy_nor_mean_loss(loss: losses.Loss) -> None:
    torch.manual_seed(0)
    model = DPLipModel(gated(nn.Sequential(nn.Linear(2, 3))), input_shape=(4, 2), input_norm=2.0, loss=loss)
    inputs, targets = torch.randn(6, 4, 2), torch.randint(3, (6, 4))
    targets[3:] = -100
    # For a causal loss the first target is not looked at.
    targets[3, 0] = 0 if isinstance(loss, losses.CausalCrossEntropy) else -100
    alone, together = evaluate(model, (inputs[:3], targets[:3])), evaluate(model, (inputs, targets))
    assert together == pytest.approx(alone)
    accuracy, mean = evaluate(model, (inputs[4:], targets[4:]))
    assert accuracy is None
    assert math.isnan(mean)


# Names of before.


@pytest.mark.parametrize("former", sorted(importlib.import_module("clipless_dp.former")._MOVED))
def test_a_former_module_is_an_attribute_too_unless_the_package_has_another(former: str) -> None:
    module = importlib.import_module(f"clipless_dp.{former}")
    found = getattr(clipless_dp, former)
    assert found is module or former in clipless_dp.__all__


def test_former_public_names_are_found() -> None:
    import clipless_dp.draws

    fusion, noise = clipless_dp.fusion, clipless_dp.noise
    assert clipless_dp.draws.find is sys.modules["clipless_dp.sampling.draws"].find
    assert sys.modules["clipless_dp.report"].STATEMENT_FORMAT == 2
    assert noise.MARGIN == noise.RELEASE_MARGIN
    assert {"Passed", "Needed"} <= {*vars(fusion)}
    assert callable(clipless_dp.report)


# What has no rule, and what to do about it.


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.GELU(), nn.SiLU(), nn.Softmax(1), nn.MultiheadAttention(6, 1),
        nn.LSTM(6, 6), nn.GRU(6, 6), nn.LocalResponseNorm(2), nn.Bilinear(6, 6, 6), nn.BatchNorm1d(6),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_the_remedy_of_a_layer_without_a_rule_names_gradient_gates(layer: nn.Module) -> None:
    remedy = clipless_dp.rules.unsupported_module("0", layer).remedy
    assert "clipless_dp.gradient_gated(net)" in remedy
    if isinstance(layer, nn.BatchNorm1d):
        assert "clipless_dp.recipes.convert_batchnorm(net)" in remedy


def test_the_refusal_of_a_network_ends_with_gradient_gates() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"clipless_dp\.gradient_gated\(net\).*apart\.$"):
        DPLipModel(
            nn.Sequential(nn.Linear(6, 6), nn.GELU()), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy()
        )
