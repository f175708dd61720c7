"""A row never decides what becomes of others: where code looks at a batch, the row that flips the look changes none.

Each row has columns of the first weight to itself, since it is zero elsewhere: there a gradient is that row's own, and
is compared bit for bit between batches of one size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, fusion, gated, gradient_gated, layers, losses, model
from clipless_dp.gates import gradient_layers, signal
from tests.soundness.attack import bounds_of, wrap
from tests.soundness.mutation import Mutant, with_each

ROWS, OWN = 5, 3
EXACTLY: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
INPUT_NORM, COTANGENT_NORM = 10.0, 4.0
WIDTH = ROWS * OWN


def dense(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 8, bias=bias), nn.ReLU(), nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3)
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 4), nn.Flatten(), nn.Linear(8, 3))


def maps() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(WIDTH, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(WIDTH, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one layer": (lambda: gated(nn.Sequential(nn.Linear(WIDTH, 3)), cotangent_norm=0.6), (WIDTH,)),
    "clipping signal gates": (lambda: gated(dense(), cotangent_norm=0.6), (WIDTH,)),
    "clipping signal gates, no bias": (
        lambda: gated(dense(bias=False), input_mode="ball", cotangent_norm=0.6),
        (WIDTH,),
    ),
    "normalising signal gates": (
        lambda: gated(dense(), cotangent_norm=0.6, cotangent_mode="normalize"),
        (WIDTH,),
    ),
    "cotangent gates alone": (
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 8),
            layers.CotangentGate(0.6),
            nn.ReLU(),
            nn.Linear(8, 3),
            layers.CotangentGate(0.6),
            nn.Tanh(),
        ),
        (WIDTH,),
    ),
    "a cotangent gate in the graph": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), layers.CotangentGate(0.3), nn.Linear(8, 3)),
        (WIDTH,),
    ),
    "signal gates on maps": (lambda: gated(maps(), cotangent_norm=0.6), (WIDTH, 4, 4)),
    "signal gates on tokens": (lambda: gated(tokens(), cotangent_norm=0.6), (2, WIDTH)),
    "normalising gradient gates": (lambda: gradient_gated(dense(), limit=0.6), (WIDTH,)),
    "clipping gradient gates": (lambda: gradient_gated(dense(), limit=0.6, mode="clip"), (WIDTH,)),
    "gradient gates on tokens": (lambda: gradient_gated(tokens(), limit=0.6, mode="clip"), (2, WIDTH)),
    "gradient gates on maps": (lambda: gradient_gated(maps(), limit=0.6, mode="clip", chunk=2), (WIDTH, 4, 4)),
    "gradient gates, transposed": (lambda: gradient_gated(transposed(), limit=0.6), (WIDTH, 4, 4)),
    "both kinds": (lambda: gradient_gated(gated(dense(), cotangent_norm=0.6), layers=["0", "2"], limit=0.3), (WIDTH,)),
    "no gates": (dense, (WIDTH,)),
}

# What a row is scaled by, and its cotangent: what gates leave, clip, lose, what underflows, what has no norm at all.
INPUTS = (1.0, 1e4, 1e19, 1e28, 5e37, math.nan, math.inf)
COTANGENTS = (0.05, 50.0, 1e19, math.nan)
COMPANIES = {"below every cap": (1.0, 0.05), "above the caps": (1.0, 1.0), "nearly too large": (5e37, 0.5)}


def built(name: str, dtype: torch.dtype) -> DPLipModel:
    build, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build().to(dtype)
    return wrap(net, shape, input_norm=INPUT_NORM, cotangent_norm=COTANGENT_NORM)


def batch_of(model_: DPLipModel, company: str, place: int, size: float, cotangent: float) -> tuple[Tensor, Tensor]:
    """Rows with columns of their own, all but one of them the company's."""
    generator = torch.Generator().manual_seed(3)
    shape, dtype = model_.input_shape, model_.device_and_dtype()[1]
    inputs = torch.zeros(ROWS, *shape, dtype=dtype)
    columns = inputs if shape[-1] == WIDTH else inputs.movedim(1, -1)
    targets = torch.randn(ROWS, *model_.output_shape, generator=generator, dtype=dtype)
    targets /= targets.norm(dim=1, keepdim=True)
    for row in range(ROWS):
        own = columns[row, ..., row * OWN : (row + 1) * OWN]
        scale, weight = (size, cotangent) if row == place else COMPANIES[company]
        entries = torch.rand(own.shape, generator=generator, dtype=dtype) + 0.5
        own.copy_(scale * entries / entries.norm())
        targets[row] *= weight
    return inputs, targets


def gradients(model_: DPLipModel, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    named = dict(model_.net.named_parameters())
    output = model_(inputs)
    found = torch.autograd.grad(model_.loss(output, targets), list(named.values()), materialize_grads=True)
    return {"output": output.detach(), **dict(zip(named, found, strict=True))}


def columns_of_others(model_: DPLipModel, found: dict[str, Tensor], place: int) -> Tensor:
    """The first weight's gradient, by columns, without those of one row."""
    name, weight = next((n, p) for n, p in model_.net.named_parameters() if p.dim() > 1)
    axis = list(weight.shape).index(WIDTH)
    kept = [column for column in range(WIDTH) if column // OWN != place]
    return found[name].movedim(axis, 0)[kept]


def strangers() -> Iterator[tuple[float, float]]:
    yield from ((size, 0.05) for size in INPUTS)
    yield from ((1.0, cotangent) for cotangent in COTANGENTS[1:])
    yield 5e37, 50.0


def check_bits(name: str, dtype: torch.dtype) -> None:
    model_ = built(name, dtype)
    for company, place in itertools.product(COMPANIES, (ROWS - 1, 1)):
        others = [row for row in range(ROWS) if row != place]
        first = gradients(model_, *batch_of(model_, company, place, 1.0, 0.05))
        expected = columns_of_others(model_, first, place)
        assert company == "nearly too large" or bool(expected.any()), "nothing is compared"
        for size, cotangent in strangers():
            found = gradients(model_, *batch_of(model_, company, place, size, cotangent))
            case = name, company, place, size, cotangent
            torch.testing.assert_close(found["output"][others], first["output"][others], **EXACTLY, msg=str(case))
            torch.testing.assert_close(columns_of_others(model_, found, place), expected, **EXACTLY, msg=str(case))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_row_changes_a_bit_of_what_others_return_or_add_to_the_gradient(name: str, dtype: torch.dtype) -> None:
    check_bits(name, dtype)


def check_shares(name: str) -> None:
    model_ = built(name, torch.float64)
    bounds = bounds_of(model_)
    for place, company in enumerate(COMPANIES):
        others = [row for row in range(ROWS) if row != place]
        for size, cotangent in strangers():
            inputs, targets = batch_of(model_, company, place, size, cotangent)
            whole, rest = gradients(model_, inputs, targets), gradients(model_, inputs[others], targets[others])
            own = gradients(model_, inputs[[place]], targets[[place]])
            for key, bound in bounds.items():
                change = whole[key] - rest[key]
                # Sums of five float64 rows, each at most its bound, in another order.
                assert float((change - own[key]).norm()) <= 1e-12 * ROWS * bound, (name, company, size, cotangent, key)
                assert float(change.norm()) <= bound * (1.0 + 1e-9), (name, company, size, cotangent, key)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_adds_to_a_batch_what_it_adds_to_nothing(name: str) -> None:
    check_shares(name)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda values: values.flatten(1).contiguous(),
    "maps": lambda values: values,
    "maps, channels last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "positions last": lambda values: values.flatten(2).mT.contiguous().mT,
    "a part of each row": lambda values: values.flatten(1)[:, ::2],
    "one number for all": lambda values: values[:, :1, :1, :1].expand_as(values),
    "one pixel": lambda values: values[:, :, :1, :1],
}


def looks() -> dict[str, Callable[[Tensor], Tensor]]:
    """The looks at a batch of values, each as a function of those."""

    class Settings:
        limit, normalize, floor = 100.0, False, 1.0

    def clipped(cotangents: Tensor) -> Tensor:
        return signal._CotangentGateFunction.backward(Settings, cotangents)[0]

    return {
        "cotangent gate": clipped,
        "dropped rows": lambda values: signal.drop_rows_(values * 1.0, signal.sample_norms(values), 100.0),
        "rows of a gradient gate": lambda values: gradient_layers.zeroed_rows(values)[0],
        "norms of a gradient gate": lambda values: gradient_layers.zeroed_rows(values)[1],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("look", looks())
def test_both_sides_of_a_look_return_the_same_bits_in_the_same_places_of_memory(look: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4, 3, 2, 5, generator=generator) + 0.1
    found = {}
    for last in (1.0, 1e3, 1e20, math.nan):
        some = values.clone()
        some[-1] *= last
        found[last] = looks()[look](LAYOUTS[layout](some))
    for last, result in found.items():
        assert torch.equal(result[:-1], found[1.0][:-1]), last
        assert result.stride() == found[1.0].stride(), last


@pytest.mark.parametrize(
    "loss",
    [losses.TauCrossEntropy(4.0), losses.MulticlassHinge(), losses.CosineSimilarity(), losses.HingeKR((0.2, 0.3, 0.5))],
)
def test_a_label_out_of_range_or_a_loss_that_is_not_finite_changes_no_bit_of_other_rows(loss: losses.Loss) -> None:
    torch.manual_seed(0)
    wrapped = DPLipModel(nn.Sequential(nn.Linear(WIDTH, 3)), input_shape=(WIDTH,), input_norm=10.0, loss=loss)
    inputs = torch.block_diag(*[torch.rand(1, OWN) + 0.5 for _ in range(ROWS)])
    labels = torch.tensor([0, 1, 2, 1, 0])

    def found(last: int, value: float = 1.0, mask: Tensor | None = None) -> Tensor:
        some = inputs.clone()
        some[-1] *= value
        targets = labels.clone()
        targets[-1] = last
        total = wrapped.loss(wrapped(some), targets, mask)
        (gradient,) = torch.autograd.grad(total, [wrapped.net.get_parameter("0.weight")])
        return gradient[:, : WIDTH - OWN]

    expected = found(0)
    assert bool(expected.any())
    every = torch.ones(ROWS, dtype=torch.bool)
    for last, value, mask in [
        (-1, 1.0, None),
        (3, 1.0, None),
        (0, math.nan, None),
        (0, 1.0, every),
        (7, math.inf, every),
    ]:
        assert torch.equal(found(last, value, mask), expected), (last, value, mask)


MUTANTS = (
    Mutant(
        "a looser look in chains", fusion.backward, "_arrived", "not most <= gate.limit", "not most <= 2.0 * gate.limit"
    ),
    Mutant(
        "a looser look in cotangent gates",
        signal._CotangentGateFunction,
        "backward",
        "<= ctx.limit",
        "<= 3.0 * ctx.limit",
    ),
    Mutant(
        "every row dropped", signal, "drop_rows_", "~(norms.detach() <= largest)", "norms.detach() == norms.detach()"
    ),
    Mutant("lost rows at the end of the batch assumed", fusion.chain, "_entered", "or int(lost[0]) < rows", ""),
    Mutant(
        "every row lost where one is",
        fusion.chain,
        "_entered",
        "(norms <= limit) & (scales >= _SMALLEST_SCALE)",
        "norms.isnan()",
    ),
    Mutant(
        "every row without a gradient",
        gradient_layers,
        "zeroed_rows",
        "torch.where(rows, values,",
        "torch.where(rows.all(), values,",
    ),
    Mutant(
        "the batch's output lost",
        model.DPLipModel,
        "_gated",
        "~finite.reshape(",
        "~finite.all().expand(len(finite)).reshape(",
    ),
)


def check_all() -> None:
    for layout, look in itertools.product(LAYOUTS, looks()):
        test_both_sides_of_a_look_return_the_same_bits_in_the_same_places_of_memory(look, layout)
    for name, dtype in itertools.product(NETWORKS, (torch.float64, torch.float32)):
        check_bits(name, dtype)


@with_each(*MUTANTS)
def test_looks_that_decide_for_others_are_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_all()


def test_underflow_that_is_dropped_only_where_some_row_is_clipped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion.chain, "_SMALLEST_SCALE", 0.0)
    with pytest.raises(AssertionError):
        check_bits("one layer", torch.float64)
