"""One sample more changes no bit of what the network makes of the others."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, PoissonBatches, gated, gradient_gated, losses, register_rule
from clipless_dp.model import row_invariance as row_invariance_module
from clipless_dp.model.row_invariance import RowInvariance, Twin, Values
from clipless_dp.rules import base

WRAPS = {"signal gates": gated, "gradient gates": gradient_gated}
SIZES = {torch.float32: 15, torch.float64: 191}
"""One row more is where the kernels of a common library change."""


@functools.cache
def first_layer(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight as torch initialises it, and directions ``(272, 784)`` that it maps to zero."""
    torch.manual_seed(0)
    weight = nn.Linear(784, 512, bias=False).to(dtype).weight.detach()
    return weight, torch.linalg.svd(weight.double())[2][512:]


def on_the_edge(wrap, dtype: torch.dtype, **options) -> tuple[DPLipModel, Tensor]:
    """A ReLU network, and samples that its first layer maps to zero, so that rounding decides; and one other."""
    weight, directions = first_layer(dtype)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 512, bias=False), nn.ReLU(), nn.Linear(512, 10, bias=False)).to(dtype)
    net[0].weight.data.copy_(weight)
    options = {"row_invariant": None, **options}
    model = DPLipModel(wrap(net), input_shape=(784,), input_norm=1.0, loss=losses.TauCrossEntropy(), **options)
    inputs = (torch.randn(SIZES[dtype] + 1, len(directions), dtype=torch.float64) @ directions).to(dtype)
    inputs = inputs / inputs.norm(dim=1, keepdim=True)
    inputs[-1] = torch.randn(784, dtype=dtype)
    return model, inputs


def moved(model: DPLipModel, inputs: Tensor, rows: int) -> float:
    """How far the last sample moves the sum that a step releases, over the stated sensitivity."""
    targets = torch.zeros(len(inputs), dtype=torch.long)

    def summed(count: int) -> Tensor:
        model.zero_grad()
        data = inputs[:count], targets[:count]
        for batch in PoissonBatches(data, sample_rate=1.0, steps=1, physical_batch_size=rows):
            model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        return torch.cat([p.grad.double().flatten() for p in model.net.parameters()])

    return float((summed(len(inputs)) - summed(len(inputs) - 1)).norm()) / model.sensitivity().total


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_one_sample_more_moves_the_sum_by_no_more_than_its_bound(wrap, dtype, rows):
    model, inputs = on_the_edge(wrap, dtype)
    # The sums of other samples' gradients are rounded: a few hundred terms in float32.
    assert moved(model, inputs, rows) <= 1.0 + 1e-4
    assert model.row_invariant


def test_mutant_caught_passes_at_the_sizes_of_draws():
    """Only where this machine's library has kernels that differ; elsewhere there is nothing to catch."""
    model, inputs = on_the_edge(gated, torch.float32, row_invariant=False)
    differ = not torch.equal(model(inputs[:15])[:15], model(inputs)[:15])
    if not differ:
        pytest.skip("this library computes 15 and 16 rows alike")
    assert moved(model, inputs, 1) > 1.5
    assert model.row_invariant is False


# Rows of 64 bytes or more at places that are multiples of them: of others some processors' libraries compute products
# with few columns by kernels that depend on where a row lies, at every number of rows but one.
NETS = {
    "dense": (
        lambda: nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 32), nn.Tanh(), nn.Linear(32, 3)),
        (48,),
    ),
    "maps": (
        lambda: nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 3)),
        (2, 8, 8),
    ),
    "sequences": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Flatten(), nn.Linear(160, 3)), (5, 16)),
    "tokens": (lambda: nn.Sequential(nn.Embedding(11, 16), nn.Flatten(), nn.Linear(80, 16), nn.ReLU()), (5,)),
}
UNEVEN = {
    "uneven dense": (
        lambda: nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 30), nn.Tanh(), nn.Linear(30, 3)),
        (40,),
    ),
    "uneven sequences": (lambda: nn.Sequential(nn.Linear(9, 20), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)), (5, 9)),
}


def case(name: str, wrap, dtype: torch.dtype, **options) -> tuple[DPLipModel, Tensor]:
    torch.manual_seed(0)
    build, shape = {**NETS, **UNEVEN}[name]
    model = DPLipModel(
        wrap(build().to(dtype)),
        input_shape=shape,
        input_norm=None if name == "tokens" else 2.0,
        loss=losses.TauCrossEntropy(),
        **{"row_invariant": None, **options},
    )
    return model, torch.randint(11, (70, 5)) if name == "tokens" else torch.randn(70, *shape, dtype=dtype)


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("wrap", [lambda net: net, *WRAPS.values()], ids=["plain", *WRAPS])
@pytest.mark.parametrize("name", NETS)
def test_a_sample_has_the_same_outputs_at_every_place_and_in_every_company(name, wrap, dtype):
    model, inputs = case(name, wrap, dtype)
    check_company(name, model, inputs)
    assert model.row_invariant


@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("name", UNEVEN)
def test_rows_of_any_width_are_the_same_in_every_company_or_the_model_says_that_they_are_not(name, dtype):
    model, inputs = case(name, gated, dtype)
    model(inputs)
    if model.row_invariant:
        check_company(name, model, inputs)
    else:
        # Nothing is dropped or cut for what cannot be had.
        assert model(inputs).shape == (70, 3)


def check_company(name: str, model: DPLipModel, inputs: Tensor) -> None:
    expected = model(inputs)
    for count in (1, 2, 7, 15, 16, 33, 64):
        assert torch.equal(model(inputs[:count]), expected[:count]), count
        assert torch.equal(model(inputs[5:][:count]), expected[5:][:count]), count
    assert torch.equal(model(inputs.flip(0)), expected.flip(0))
    strided = inputs.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(model(strided[:33]), expected[:33])
    if name == "maps":
        turned = inputs.contiguous(memory_format=torch.channels_last)
        assert torch.equal(model(turned[:33]), model(turned)[:33])
    others = inputs.clone()
    others[1:] = inputs[:-1]
    assert torch.equal(model(others)[0], expected[0])


@pytest.mark.parametrize("dtype", SIZES, ids=str)
def test_on_request_cotangents_are_the_same_too(dtype):
    model, inputs = case("dense", gated, dtype, row_invariant=True)
    cotangents = torch.randn(70, 3, dtype=dtype)

    def arriving(count: int, start: int = 0) -> Tensor:
        some = inputs[start:][:count].clone().requires_grad_()
        (found,) = torch.autograd.grad(model(some), some, cotangents[start:][:count])
        return found

    expected = arriving(70)
    for count in (1, 7, 16, 33):
        assert torch.equal(arriving(count), expected[:count])
        assert torch.equal(arriving(count, 5), expected[5:][:count])


def test_rows_that_are_added_leave_no_trace():
    models = [case("dense", gated, torch.float64, row_invariant=chosen)[0] for chosen in (False, None)]
    _, inputs = case("dense", gated, torch.float64)
    inputs[2] = torch.nan
    gradients = []
    for model in models:
        output = model(inputs[:5])
        assert output.shape == (5, 3)
        assert output.isnan().any(dim=1).tolist() == [False, False, True, False, False]
        model.loss(output, torch.zeros(5, dtype=torch.long)).backward()
        gradients.append([p.grad for p in model.net.parameters()])
        assert int(model.nonfinite_samples) == 1
    for one, other in zip(*gradients, strict=True):
        # float64 products of a few dozen terms in another order.
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class Kernels:
    """A library whose results depend on the number of rows, and on the place in the last block of eight if so told."""

    def __init__(self, classes, places: int | None = None) -> None:
        self.classes, self.places = classes, places
        self.calls: list[int] = []

    def __call__(self, inputs: Tensor) -> Values:
        self.calls.append(len(inputs))
        outputs = inputs * (1.0 + 2.0**-20 * self.classes(len(inputs)))
        if self.places is not None and len(inputs) % self.places:
            outputs = torch.cat(
                (outputs[: -(len(inputs) % self.places)], outputs[-(len(inputs) % self.places) :] * 3.0)
            )
        return Values(outputs, torch.ones(len(inputs), dtype=torch.bool), True)

    def twin(self) -> Twin:
        def samples(count: int, generator: torch.Generator) -> Tensor:
            return torch.randn(count, 2, generator=generator)

        return Twin(Kernels(self.classes, self.places), nn.Linear(1, 1), samples, torch.device("cpu"))


LIBRARIES = {
    "one kernel": Kernels(lambda rows: 0),
    "few rows differ": Kernels(lambda rows: rows < 13),
    "many rows differ": Kernels(lambda rows: rows >= 192),
    "blocks of twelve": Kernels(lambda rows: 0, places=12),
    "all sizes differ": Kernels(lambda rows: rows),
}


@pytest.mark.parametrize("kernels", LIBRARIES.values(), ids=LIBRARIES)
def test_sizes_are_chosen_by_what_a_library_returns(kernels):
    rows = RowInvariance(backward=False)
    inputs = torch.randn(700, 2)
    expected = rows.run(kernels, inputs, kernels.twin).outputs
    for count in (*range(1, 40), 100, 191, 192, 193, 256, 500):
        for _ in range(3):
            found = rows.run(kernels, inputs[:count], kernels.twin)
            assert torch.equal(found.outputs, expected[:count])
            assert found.finite.shape == (count,)
    assert rows.found
    kernels.calls.clear()
    rows.run(kernels, inputs[:256], kernels.twin)
    if kernels is LIBRARIES["one kernel"]:
        assert kernels.calls == [256], "nothing is cut, added or asked again"


def test_where_no_size_agrees_passes_run_as_they_are_and_the_model_says_so(monkeypatch):
    calls = 0

    def differing(self, size, shift, kind, backward):
        nonlocal calls
        calls += 1
        return (torch.full((size, 1), float(calls)),)

    monkeypatch.setattr(row_invariance_module.Twin, "values", differing)
    model, inputs = case("dense", gated, torch.float32)
    assert model.row_invariant is None
    assert torch.equal(model(inputs[:5]), case("dense", gated, torch.float32, row_invariant=False)[0](inputs[:5]))
    assert model.row_invariant is False


def test_a_network_that_cannot_be_copied_runs_as_it_is_and_the_model_says_so():
    class Copied(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("not copied")

    register_rule(Copied)(base.find_rule(nn.Linear(1, 1)))
    try:
        net = nn.Sequential(Copied(4, 3))
        model = DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy(), row_invariant=None)
        assert model(torch.randn(5, 4)).shape == (5, 3)
        assert model.row_invariant is False
    finally:
        del base._RULES[Copied]


def test_the_reference_does_not_depend_on_the_first_draw():
    kernels = LIBRARIES["many rows differ"]
    results = []
    for first in (191, 192):
        rows = RowInvariance(backward=False)
        inputs = torch.ones(300, 2)
        rows.run(kernels, inputs[:first], kernels.twin)
        results.append(rows.run(kernels, inputs, kernels.twin).outputs)
    assert torch.equal(*results)


def test_asking_changes_neither_weights_nor_modes_nor_random_numbers_and_copies_ask_again():
    model, inputs = case("dense", gated, torch.float32)
    model.train()
    before = copy.deepcopy(model.net.state_dict())
    state = torch.get_rng_state()
    model(inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
    assert pickle.loads(pickle.dumps(model)).row_invariant is None


def test_evaluation_runs_as_it_is():
    model, inputs = case("dense", gated, torch.float32)
    model.eval()
    with torch.no_grad():
        model(inputs[:3])
    assert model.row_invariant is None
