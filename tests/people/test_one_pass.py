"""Behind gradient gates people's rows of all weights come in one pass, whose sum is that of a pass for each weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import (
    AdaptiveLimit,
    CliplessDPSGD,
    DPLipModel,
    LayerBounds,
    PoissonBatches,
    PrivacyError,
    constraints,
    gradient_gated,
    register_rule,
)
from clipless_dp.fusion import backward
from clipless_dp.gates import (
    GradientGated,
    convolutions,
    gradient,
    gradient_layers,
    row_weights,
    weighing,
    weights_from,
)
from clipless_dp.model.row_invariance import RowInvariance, Values
from clipless_dp.rules import RuleContext
from tests.people.test_company import CAP, ROUTES, TOLERANCE, Route, dense, maps, model_of, ratio, summed
from tests.soundness.attack import wrap
from tests.soundness.mutation import Mutant

SIZES = (1, 2, 4, 3, 4, 1, 7)
"""With a cap of 4: weights of one, a half and a quarter."""

IN_ONE_PASS = [
    "clipping gradient gates",
    "normalising gradient gates",
    "gradient gates on maps",
    "gradient gates around a tanh",
    "gradient gates on tokens",
    "gradient gates on long sequences",
    "gradient gates on transposed maps",
    "gradient gates behind signal gates",
    "micro-batches",
    "views in micro-batches",
]


def tied() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 3))


IN_CLASSES = {
    "signal gates": ROUTES["signal gates"],
    "some layers behind constraints": Route(
        lambda: gradient_gated(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3)), limit=0.3, layers=["1"]),
        constraint=constraints.Spectral(),
    ),
    "an isolated network": ROUTES["an isolated network"],
    "compiled": ROUTES["compiled"],
    "joint caps": Route(lambda: gradient_gated(dense(), limit=0.3, joint="layer")),
    "adaptive caps": Route(lambda: gradient_gated(dense(), limit=AdaptiveLimit(start=0.3))),
}


def rows_of(route: Route, sizes: tuple[int, ...], scale: float, seed: int = 1) -> tuple[Tensor, Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [person for person, size in enumerate(sizes) for _ in range(size)]
    rows = scale * torch.randn(len(ids), *route.shape, generator=generator, dtype=torch.float64)
    return rows, scale * torch.randn(len(ids), 3, generator=generator, dtype=torch.float64), ids


def passes_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each pass from here on."""
    made: list[int] = []
    forward = DPLipModel.forward

    def noted(self: DPLipModel, inputs: Any = None, **named: Any) -> Tensor:
        made.append(len(inputs))
        return forward(self, inputs, **named)

    monkeypatch.setattr(DPLipModel, "forward", noted)
    return made


def in_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPLipModel, "takes_row_weights", False)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 30.0])
@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_the_sum_is_that_of_a_pass_for_each_weight(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    route = ROUTES[name]
    rows, targets, ids = rows_of(route, SIZES, scale)
    found = summed(route, rows, targets, ids, seed=3)
    in_classes(monkeypatch)
    torch.testing.assert_close(found, summed(route, rows, targets, ids, seed=3), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", ["normalising gradient gates", "gradient gates on maps"])
def test_rows_of_all_weights_are_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    route = ROUTES[name]
    made = passes_made(monkeypatch)
    summed(route, *rows_of(route, SIZES, 1.0), seed=3)
    assert made == [sum(min(size, 4) for size in SIZES)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "compiled" else name for name in IN_CLASSES]
)
def test_other_networks_are_passed_weight_by_weight(name: str) -> None:
    route = IN_CLASSES[name]
    model = model_of(route)
    assert route.compiled or not model.takes_row_weights
    if name != "adaptive caps":
        assert ratio(route, hostile=10.0, sizes=(1, 2, 4, 3, 4, 1)) <= 1.0 + TOLERANCE


def test_what_a_parameter_is_read_by_besides_its_layer_decides_too() -> None:
    assert model_of(Route(lambda: gradient_gated(tied(), limit=0.3))).takes_row_weights
    frozen = model_of(
        Route(lambda: nn.Sequential(nn.Linear(6, 6).requires_grad_(False), *gradient_gated(dense()).children()))
    )
    assert frozen.takes_row_weights
    model = model_of(ROUTES["normalising gradient gates"])
    model.compile(backend="eager")
    assert not model.takes_row_weights


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=9).filter(lambda sizes: 2 * max(sizes) <= sum(sizes)),
    scale=st.floats(-4, 4),
    limit=st.floats(-3, 2),
    mode=st.sampled_from(["clip", "normalize"]),
    floor=st.floats(1e-4, 1.0),
    kind=st.sampled_from([dense, maps, tied]),
    pieces=st.one_of(st.none(), st.integers(1, 5)),
)
def test_at_any_caps_and_sizes_the_sum_is_that_of_a_pass_for_each_weight(
    sizes: list[int], scale: float, limit: float, mode: Any, floor: float, kind: Any, pieces: int | None
) -> None:
    route = Route(
        lambda: gradient_gated(kind(), limit=10.0**limit, mode=mode, floor=floor),
        shape=(1, 3, 3) if kind is maps else (6,),
        accumulate={"micro_batch_size": pieces},
    )
    rows, targets, ids = rows_of(route, tuple(sizes), 10.0**scale, seed=len(sizes))
    found = summed(route, rows, targets, ids, seed=3)
    with pytest.MonkeyPatch.context() as patched:
        in_classes(patched)
        expected = summed(route, rows, targets, ids, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * 10.0**limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_at_most_one_over_their_divisor_behind_a_rounded_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(4096, generator=generator, dtype=dtype) * 2.0
    for divisor in range(1, 300):
        weight = weights_from([(1, divisor)], dtype)
        products = (factors * weight).double()
        # Exactly, in integers of float64's own for float32, and in steps of its last place for float64.
        exact = [float(one).as_integer_ratio() for one in factors[:64]]
        for (above, below), product in zip(exact, products[:64].tolist(), strict=True):
            numerator, denominator = product.as_integer_ratio()
            assert numerator * below * divisor <= above * denominator
        assert float(weight) * divisor >= 1.0 - 8 * torch.finfo(dtype).eps


UNFUSED = {
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (5, 3)),
    "maps": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.ConvTranspose2d(2, 1, 2)), (1, 4, 4)),
    "series": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 2, stride=2)), (2, 6)),
}


def gap_from_rows_alone(name: str) -> float:
    """How far the layers' own sum, without what fuses them, is from that of rows passed one by one, then weighed."""
    make, shape = UNFUSED[name]
    torch.manual_seed(0)
    net = gradient_gated(make().double(), limit=0.1)
    rows, weights = torch.randn(7, *shape, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    with weighing(weights):
        outputs = net(rows)
    found = torch.autograd.grad(outputs.square().sum(), list(net.parameters()))
    alone = [torch.autograd.grad(net(row[None]).square().sum(), list(net.parameters())) for row in rows]
    gaps = (
        (gradient - sum(weight * one for weight, one in zip(weights, each, strict=True))).abs().max()
        for gradient, *each in zip(found, *alone, strict=True)
    )
    return float(max(gaps))


@pytest.mark.parametrize("name", UNFUSED)
def test_layers_weigh_what_they_return_of_each_row(name: str) -> None:
    assert gap_from_rows_alone(name) < 1e-12


@pytest.mark.parametrize(("name", "function"), [("vectors", "vector_weight_gradient"), ("vectors", "bias_gradient")])
def test_a_layer_that_forgets_weights_is_seen(name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Mutant("at full scale", gradient_layers, function, WEIGHED, WHOLE).apply(monkeypatch)
    assert gap_from_rows_alone(name) > 1e-3


def test_weights_of_other_rows_are_refused() -> None:
    layer = gradient_gated(nn.Sequential(nn.Linear(2, 2)))
    with weighing(weights_from([(3, 2)], torch.float32)), pytest.raises(PrivacyError, match="3 rows of people"):
        layer(torch.ones(4, 2))
    layer(torch.ones(4, 2))


def test_pieces_of_a_pass_have_the_weights_of_their_rows() -> None:
    met: list[list[float]] = []

    def run(part: Tensor) -> Any:
        weights = row_weights.weights_of(part)
        assert weights is not None
        met.append(weights.tolist())
        return Values(part, torch.ones(len(part), dtype=torch.bool), True)

    rows = RowInvariance(backward=False)
    rows._chosen[(torch.get_num_threads(), torch.contiguous_format), 5] = [4, 4]
    with weighing(torch.arange(1.0, 6.0)):
        rows.run(run, torch.zeros(5, 2), lambda: pytest.fail("nothing is asked"))
    assert met == [[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 0.0, 0.0]]


VECTORS, MAPS = "normalising gradient gates", "gradient gates on maps"
TOKENS, LONG = "gradient gates on tokens", "gradient gates on long sequences"
WEIGHED, WHOLE = "weights=weights", "weights=None"

MUTANTS = [
    (VECTORS, Mutant("all weigh one", row_weights, "_one_over", "/ divisor", "/ 1")),
    (VECTORS, Mutant("a vector's weight at full scale", backward, "vector_weight_gradient", WEIGHED, WHOLE)),
    (VECTORS, Mutant("a bias at full scale", backward, "bias_gradient", WEIGHED, WHOLE)),
    (MAPS, Mutant("a kernel at full scale", convolutions, "gated_sum", "weights=own", WHOLE)),
    (TOKENS, Mutant("a weight by products of positions at full scale", gradient.Tokens, "gated", WEIGHED, WHOLE)),
    (LONG, Mutant("a weight by gradients at full scale", gradient, "gated_sum", "weights=own", WHOLE)),
]


@pytest.mark.parametrize("case", MUTANTS, ids=lambda case: case[1].name)
def test_mutants_of_the_weights_in_one_pass_are_seen(case: tuple[str, Mutant], monkeypatch: pytest.MonkeyPatch) -> None:
    road, mutant = case
    mutant.apply(monkeypatch)
    assert ratio(ROUTES[road], hostile=10.0) > 1.0 + TOLERANCE


def test_a_chunk_of_rows_has_their_weights_and_not_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that form samples' gradients some at a time; in one chunk the mistake would be none."""
    route = Route(lambda: gradient_gated(maps(), limit=0.3, chunk=2), shape=(1, 3, 3))
    rows, targets, ids = rows_of(route, SIZES, 1.0)
    found = summed(route, rows, targets, ids, seed=3)
    mistake = Mutant(
        "the first rows' weights", convolutions, "gated_sum", "[done : done + len(norms)]", "[: len(norms)]"
    )
    with pytest.MonkeyPatch.context() as patched:
        mistake.apply(patched)
        assert not torch.allclose(found, summed(route, rows, targets, ids, seed=3), rtol=1e-3)
    in_classes(monkeypatch)
    torch.testing.assert_close(found, summed(route, rows, targets, ids, seed=3), rtol=1e-10, atol=1e-15)


class Compiled(DPLipModel):
    """Whose pass runs as a graph."""

    def forward(self, inputs: Any = None, **named: Tensor) -> Tensor:
        return super().forward(inputs, **named)


def compiled(model: DPLipModel, how: str) -> Any:
    if how == "in place":
        model.compile(backend="eager")
    elif how == "its forward":
        model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    elif how == "a subclass":
        model.__class__ = Compiled
    return torch.compile(model, backend="eager") if how == "around" else model


@pytest.mark.parametrize("how", ["in place", "its forward", "around", "a subclass"])
def test_a_model_whose_pass_is_another_one_is_passed_weight_by_weight(how: str) -> None:
    route = ROUTES["normalising gradient gates"]
    rows, targets, ids = rows_of(route, SIZES, 3.0)
    expected = summed(route, rows, targets, ids, seed=3)
    called = compiled(model := model_of(route), how)
    optimizer = CliplessDPSGD(
        called, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=len(SIZES), unit="person"
    )
    (batch,) = PoissonBatches(
        (rows, targets), sample_rate=1.0, steps=1, groups=ids, rows_per_group=CAP, group_weights="mean", seed=3
    )
    optimizer.accumulate(batch)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)


def test_a_pass_that_leaves_the_weights_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever made it so: what gates were to multiply by is not inferred, but witnessed by the pass."""
    route = ROUTES["normalising gradient gates"]
    monkeypatch.setattr(DPLipModel, "takes_row_weights", True)
    model = model_of(route)
    model.compile(backend="eager")
    monkeypatch.setattr("tests.people.test_company.model_of", lambda route: model)
    with pytest.raises(PrivacyError, match="at full weight"):
        summed(route, *rows_of(route, SIZES, 3.0), seed=3)


def test_settings_may_change_between_draws_of_people() -> None:
    route = ROUTES["normalising gradient gates"]
    rows, targets, ids = rows_of(route, SIZES, 3.0)
    model = model_of(route)
    optimizer = CliplessDPSGD(
        model, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=len(SIZES), unit="person"
    )
    for step, batch in enumerate(PoissonBatches((rows, targets), sample_rate=1.0, steps=2, groups=ids)):
        for layer in model.net.modules():
            if isinstance(layer, GradientGated):
                layer.set_gate(0.1 + step)
        optimizer.accumulate(batch)
        optimizer.step()
    assert optimizer.steps_taken == 2


def test_layers_that_were_compiled_are_gated_all_the_same() -> None:
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for layer in plain:
        layer.compile(backend="eager")
    model = wrap(gradient_gated(plain, limit=1e-3).double(), (6,), input_norm=4.0, cotangent_norm=1.0)
    rows = torch.full((1, 6), 2.0, dtype=torch.float64)
    model.loss(model(rows), torch.ones(1, 3, dtype=torch.float64)).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert float(found.norm()) <= model.sensitivity().total * (1.0 + TOLERANCE)


class Pooling(nn.Module):
    """A frozen layer of a user's own, in which a gated network meets tokens as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.within = gradient_gated(nn.Sequential(nn.Linear(2, 2))).requires_grad_(False)

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.within(values.reshape(-1, 2)).reshape(values.shape)
        return found


@register_rule(Pooling)
def _pooling_rule(module: Pooling, context: RuleContext) -> LayerBounds:
    nothing = dict.fromkeys(dict(module.named_parameters()), 0.0)
    return LayerBounds(output_norm=lambda: 10.0 * context.input_norm, lipschitz=10.0, gradients=nothing)


def test_gates_within_a_layer_of_a_users_own_meet_whole_rows() -> None:
    route = Route(lambda: nn.Sequential(Pooling(), gradient_gated(dense(), limit=0.3)))
    assert not model_of(route).takes_row_weights
    assert math.isfinite(float(summed(route, *rows_of(route, SIZES, 1.0), seed=3).norm()))


def test_what_an_interrupted_pass_leaves_weighs_no_later_one() -> None:
    route = ROUTES["normalising gradient gates"]
    rows, targets, _ = rows_of(route, SIZES, 3.0)

    def gradient() -> Tensor:
        model = model_of(route)
        model.loss(model(rows), targets).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient()
    weighing(weights_from([(len(rows), 2)], torch.float64)).__enter__()
    try:
        assert torch.equal(gradient(), expected)
    finally:
        row_weights._now.weights = None
