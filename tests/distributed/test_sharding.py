from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clipless_dp import (
    CliplessDPOptimizer,
    CliplessDPSGD,
    DPLipModel,
    PoissonBatches,
    ReproducibleNoise,
    SystemNoise,
    audit,
    constraints,
    distributed,
    fit,
    gated,
    gates,
    gradient_gated,
    layers,
    losses,
    register_rule,
)
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.distributed import placement
from clipless_dp.distributed import shards as sharding
from clipless_dp.rules.linear import linear_rule
from clipless_dp.training.memory import traffic
from tests.ranks import (
    SETTINGS,
    Failure,
    Ranks,
    noise_of_steps,
    refusal_to_build,
    same_weights,
    sgd,
    torchrun,
    weights,
)
from tests.support import before_steps, gated_model, samples

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"):
    pytest.skip("this torch cannot sum sharded gradients", allow_module_level=True)


def fully_shard(module: nn.Module, **options: object) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return shard(module, **{"mesh": mesh, **options})  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two layers around a slope, whose only entry is on one rank, and a way past them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.slope = nn.PReLU()
        self.second = nn.Linear(width, width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.second(self.slope(self.first(values)))


class TwoPaths(nn.Module):
    """Blocks whose layers are called by what holds them, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.entry = nn.Linear(6, 8)
        self.exit = nn.Linear(8, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.entry(values)
        for block in self.blocks:
            values = block(values)
        return self.exit(torch.relu(self.blocks[0](values)))


def nets(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    own = nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
        nn.Sequential(gates.SphereScaling(1.0), nn.Linear(8, 8, bias=False), gates.CotangentGate(1.0), nn.ReLU()),
        nn.Linear(8, 3),
    )
    constrained = nn.Sequential(
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), layers.GroupSort(2), nn.Flatten()),
        nn.Sequential(nn.Linear(24, 8), layers.GroupSort(2), nn.Linear(8, 8)),
        nn.Linear(8, 3),
    )
    constrained[2].bias.requires_grad_(False)
    deep = nn.Sequential(nn.Linear(6, 8), Block(8), nn.Sequential(Block(8), nn.ReLU()), nn.Linear(8, 3))
    return {
        "signal gates": gated(deep),
        "gradient gates": gradient_gated(nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))),
        "gates by hand": gated(own, layers=("0.*", "2")),
        "blocks used twice": gated(TwoPaths()),
        "constraints": constrained,
    }


CONSTRAINTS = {
    "constraints": {
        "0.*.weight": constraints.Spectral(),
        "1.*.weight": constraints.Orthogonal(tangent=True),
        "*.bias": constraints.Ball(2.0),
        "1.2.bias": None,
        "2.*": None,
    }
}


RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 100, "lr": 0.5, "progress": False, "accountant": "rdp"}


UNITS = {
    "the model": lambda net: [],
    "layers": lambda net: [part for part in net.modules() if part._parameters],
    "blocks": lambda net: list(net.children()),
    "blocks, their layers and the net": lambda net: [*reversed(list(net.modules()))],
}
"""Which parts of a network are sharded by themselves, inner ones first."""


def model_of(net: str, units: str | None, seed: int = 0) -> DPLipModel:
    model = DPLipModel(
        nets(seed)[net],
        input_shape=(6,),
        input_norm=3.0,
        loss=losses.TauCrossEntropy(4.0),
        constraint=CONSTRAINTS.get(net),
    )
    if units is not None:
        for part in UNITS[units](model.net):
            fully_shard(part)
        fully_shard(model)
    return model


def trained(net: str, units: str | None, mutant: str = ""):
    """Four steps without noise, which no two runs would share: what is left is the arithmetic."""

    def scale_(tensors, deviations, source, factor=1.0):
        torch._foreach_mul_(tensors, factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "add_normal_", scale_)
        if mutant == "mean in place of the sum":
            patch.setattr(sharding, "sum_shards_", lambda _: None)
        elif mutant == "sums in the model's own unit only":
            patch.setattr(sharding, "sum_shards_", lambda model: model.set_gradient_divide_factor(1.0))
        elif mutant == "each part projected by itself":

            def apart(changes):
                for change, parts in changes:
                    change(*map(sharding.local, parts))

            patch.setattr(sharding, "change_wholes_", apart)
        model = model_of(net, units)
        optimizer = sgd(model)
        if net == "gradient gates":
            base = torch.optim.Adam(model.net.parameters(), lr=0.05)
            optimizer = CliplessDPOptimizer(model, base, **SETTINGS)  # type: ignore[arg-type,assignment]
        for step, batch in enumerate(PoissonBatches(samples(90), sample_rate=0.25, steps=4, seed=5)):
            optimizer.zero_grad()
            if step == 1 and units is not None and not mutant:
                # What loops that accumulate do: it would keep this step's gradients for the next one.
                model.set_requires_gradient_sync(False)  # type: ignore[operator]
            if step == 3:
                # A pass without gradients leaves whole weights.
                with torch.no_grad():
                    model(batch.inputs)
            if step == 2:
                # Ranks that pass different numbers of pieces would wait for one another.
                rows = 16 - 9 * distributed.world().rank
                optimizer.accumulate(batch, multiplicity=2, augment=lambda sample: sample, micro_batch_size=rows)
            else:
                model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
            optimizer.step()
        held = sum(sharding.local(parameter).numel() for parameter in model.net.parameters())
        return weights(model), optimizer.get_epsilon(1e-3), model.sensitivity().total, held


def succeeded(results):
    for result in results:
        assert not isinstance(result, Failure), result.message
    return results


WAYS = [
    *(("signal gates", units) for units in UNITS),
    *(("constraints", units) for units in UNITS),
    ("gradient gates", "layers"),
    ("gates by hand", "blocks"),
    ("blocks used twice", "blocks, their layers and the net"),
]


def trained_in_all_ways():
    return {way: trained(*way) for way in WAYS}


@pytest.mark.slow
def test_ranks_that_hold_parts_train_as_one_process_that_holds_all(ranks):
    first, second = succeeded(ranks.run(trained_in_all_ways))
    alone = {net: trained(net, None) for net in nets()}
    for net, units in WAYS:
        expected, epsilon, total, size = alone[net]
        (one, *spent, held), (other, *also_spent, rest) = first[net, units], second[net, units]
        assert same_weights(one, expected), (net, units)
        assert torch.equal(one, other)
        # Norms that follow from weights follow from rounded ones.
        assert spent == also_spent == [epsilon, pytest.approx(total, rel=1e-6)]
        assert held + rest == size


MUTANTS = [
    ("signal gates", "the model", "mean in place of the sum"),
    ("signal gates", "layers", "mean in place of the sum"),
    ("signal gates", "layers", "sums in the model's own unit only"),
    ("constraints", "layers", "each part projected by itself"),
]


def trained_by_mutants():
    return {mutant: trained(*mutant)[0] for mutant in MUTANTS}


@pytest.mark.slow
def test_means_over_the_ranks_and_projections_of_parts_would_show(ranks):
    alone = {net: trained(net, None)[0] for net, *_ in MUTANTS}
    for wrong in succeeded(ranks.run(trained_by_mutants)):
        assert not any(same_weights(changed, alone[net]) for (net, *_), changed in wrong.items())


def peaks():
    """Bytes of a step's passes beyond what was held before, as one unit and as one for each layer; and of all weights.

    The least of three: what gloo's threads still hold varies.
    """
    found = []
    for by_layer in (False, True):
        torch.manual_seed(0)
        net = gated(nn.Sequential(*(nn.Linear(256, 256) for _ in range(10))))
        model = DPLipModel(net, input_shape=(256,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
        size = sum(4 * parameter.numel() for parameter in net.parameters())
        for part in net.children() if by_layer else ():
            fully_shard(part)
        fully_shard(model)
        optimizer = sgd(model)
        inputs, targets = torch.randn(4, 256), torch.zeros(4, dtype=torch.int64)

        def passes(model=model, inputs=inputs, targets=targets):
            model.loss(model(inputs), targets).backward()

        tried = []
        for _ in range(4):
            optimizer.zero_grad()
            tried.append(traffic(passes, torch.device("cpu")).peak)
        found.append(min(tried[1:]))
    return *found, size


def test_layers_that_are_units_take_less_memory_than_a_model_that_is_one(ranks):
    for as_one, by_layer, size in succeeded(ranks.run(peaks)):
        # All weights whole, and all their gradients; then half of the gradients, and a few layers whole.
        assert as_one > 2 * size
        assert by_layer < 1.5 * size


def noise_in_parts(units: str, mutant: str = "", rounds: int = 12):
    """Noise of steps without samples, relative to the planned one: its deviation in each rank's part of each layer."""
    net = gated(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))))
    model = DPLipModel(net, input_shape=(64,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    for part in UNITS[units](net):
        fully_shard(part)
    fully_shard(model)
    optimizer = CliplessDPSGD(model, lr=1.0, **{**SETTINGS, "sampling": "poisson"})  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        honest = placement.add_normal_
        if mutant == "on one rank only" and distributed.world().rank == 1:
            patch.setattr(placement, "add_normal_", lambda *_: None)
        elif mutant == "twice":
            patch.setattr(placement, "add_normal_", lambda *given: (honest(*given), honest(*given)))
        elif mutant == "the same on all ranks":
            optimizer.noise = ReproducibleNoise(3)
            optimizer.noise.reproducible = False
        parts = noise_of_steps(model, optimizer, rounds).reshape(rounds, 6, -1).transpose(0, 1).flatten(1)
    return parts.std(1), torch.corrcoef(parts) - torch.eye(6)


def noise_in_all_ways():
    honest = [noise_in_parts(units) for units in UNITS]
    mutants = ("on one rank only", "twice", "the same on all ranks")
    return honest, {mutant: noise_in_parts("layers", mutant) for mutant in mutants}


def test_each_part_gets_noise_of_its_own_and_of_the_planned_variance(ranks):
    def as_planned(deviations: torch.Tensor) -> bool:
        # 24576 numbers each: one standard deviation is 0.45 %, so that 3 % is passed once in 10¹⁰ parts.
        return bool(((deviations - 1.0).abs() < 0.03).all())

    def unrelated(correlations: torch.Tensor) -> bool:
        # One standard deviation is 0.0064.
        return bool((correlations.abs() < 0.045).all())

    for honest, mutants in succeeded(ranks.run(noise_in_all_ways)):
        assert all(as_planned(deviations) and unrelated(correlations) for deviations, correlations in honest)
        assert not as_planned(mutants["on one rank only"][0])
        assert not as_planned(mutants["twice"][0])
        assert not unrelated(mutants["the same on all ranks"][1])


def refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.fsdp import fully_shard as shard
    from torch.distributed.tensor import Shard

    def units(change):
        model = gated_model()
        change(model.net.get_submodule("0"))
        return fully_shard(model)

    def halves(parameter):
        # The first rank holds rows of a weight and the second columns: as many entries as there are, but some twice.
        return Shard(distributed.world().rank * (parameter.dim() - 1))

    def hooked(layer):
        fully_shard(layer).register_forward_hook(lambda *_: None)

    own = init_device_mesh("cpu", (2, 1), mesh_dim_names=("rows", "columns"))["columns"]
    lowered = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    left_out, changed, together, sums, scaled = (gated_model() for _ in range(5))
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    tied = DPLipModel(
        gated(nn.Sequential(first, nn.ReLU(), second)),
        input_shape=(6,),
        input_norm=1.0,
        loss=losses.TauCrossEntropy(2.0),
    )
    return {
        "wrap the whole network first": refusal_to_build(
            lambda: DPLipModel(fully_shard(nn.Linear(6, 3)), input_shape=(6,), loss=losses.TauCrossEntropy(2.0))
        ),
        "last, on the whole": refusal_to_build(lambda: (fully_shard(changed.net), sgd(changed))),
        "the model without an mp_policy": refusal_to_build(lambda: sgd(fully_shard(gated_model(), mp_policy=lowered))),
        "net.0 without an mp_policy": refusal_to_build(
            lambda: sgd(units(lambda layer: fully_shard(layer, mp_policy=lowered)))
        ),
        "an offload_policy": refusal_to_build(
            lambda: sgd(units(lambda layer: fully_shard(layer, offload_policy=CPUOffloadPolicy(pin_memory=False))))
        ),
        "mesh of all ranks": refusal_to_build(lambda: sgd(units(lambda layer: shard(layer, mesh=own)))),
        "ignored_params": refusal_to_build(
            lambda: sgd(fully_shard(left_out, ignored_params={next(iter(left_out.net.parameters()))}))
        ),
        "split apart": refusal_to_build(
            lambda: (fully_shard(first), fully_shard(second), fully_shard(tied), sgd(tied))  # type: ignore[arg-type]
        ),
        "hooks": refusal_to_build(lambda: sgd(units(hooked))),
        "together with other": refusal_to_build(
            lambda: (
                fully_shard([together.net.get_submodule("0"), together.net.get_submodule("2")]),  # type: ignore[arg-type]
                sgd(fully_shard(together)),
            )
        ),
        "before fully_shard": refusal_to_build(lambda: fully_shard(gated_model()).to(torch.float64)),
        "of which each rank holds a part": refusal_to_build(
            lambda: fully_shard(gated_model()).tightness(samples(4))  # type: ignore[operator]
        ),
        "a rule of your own": refusal_to_build(lambda: sgd(fully_shard(with_own_rule()))),
        "not summed": refusal_to_build(lambda: altered(sums, lambda: sums.set_requires_gradient_sync(False))),
        "or scaled": refusal_to_build(lambda: altered(scaled, lambda: scaled.set_gradient_divide_factor(0.5))),
        "an audit attacks whole weights": refusal_to_build(
            lambda: audit.sensitivity(fully_shard(gated_model()))  # type: ignore[arg-type]
        ),
        "audit before fully_shard": refusal_to_build(
            lambda: fit(fully_shard(gated_model()), samples(300), **RUN, audit=True)  # type: ignore[arg-type]
        ),
        "ranks differ in parts": refusal_to_build(lambda: sgd(fully_shard(gated_model(), shard_placement_fn=halves))),
        "used in turn": refusal_to_build(used_in_turn),
    }


def altered(model: DPLipModel, alter: Callable[[], None]) -> None:
    """Gradients that ranks keep for themselves, for a later step to find, or scale, once the forward pass is done."""
    fully_shard(model.net.get_submodule("0"))
    fully_shard(model)
    optimizer = sgd(model, sampling="poisson")
    inputs, targets = samples(8)
    loss = model.loss(model(inputs), targets)
    alter()
    loss.backward()
    before = weights(model)
    try:
        optimizer.step()
    finally:
        assert torch.equal(before, weights(model))
        assert all(parameter.grad is None for parameter in model.net.parameters())
        optimizer.skip_draw()
        model.loss(model(inputs), targets).backward()
        optimizer.step()


class Own(nn.Linear):
    """A layer with a rule of the user's, which may read what it likes."""


def with_own_rule() -> DPLipModel:
    @register_rule(Own)
    def rule(module, context):
        return linear_rule(module, context)

    net = nn.Sequential(Own(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


class InTurn(nn.Module):
    """Two holders whose layers are used in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.odd = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for even, odd in zip(self.even, self.odd, strict=True):
            values = odd(even(values))
        return values


def used_in_turn() -> None:
    model = DPLipModel(gated(InTurn()), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    fully_shard(model.net.get_submodule("even"))
    fully_shard(model.net.get_submodule("odd"))
    fully_shard(model)
    model(samples(8)[0])


def test_what_the_bounds_or_the_noise_do_not_cover_is_refused_in_words(ranks):
    for refusals in succeeded(ranks.run(refused)):
        for words, refusal in refusals.items():
            assert words in refusal


def started_apart():
    """Weights that differ between ranks, of which each takes its part; then one of them loses a number."""
    rank = distributed.world().rank
    model = model_of("constraints", "layers", seed=rank)
    sgd(model)
    named = {name: sharding.whole(model.net.get_parameter(name)) for name in model.constraints}
    hold = [constraint.holds(named[name], model.operators(name)) for name, constraint in model.constraints.items()]
    bounds = model.sensitivity().total, model.lipschitz_constant()
    alone = model_of("constraints", None)
    alone.net.load_state_dict({name: sharding.whole(values) for name, values in model.net.state_dict().items()})
    alone.settle_()
    same = bounds == (alone.sensitivity().total, alone.lipschitz_constant())
    if rank == 0:
        with torch.no_grad():
            sharding.local(model.net.get_parameter("1.0.weight")).fill_(float("nan"))
    return hold, same, refusal_to_build(model.project_)


def test_constraints_hold_whatever_the_ranks_start_from_and_a_weight_that_is_lost_is_named(ranks):
    results = succeeded(ranks.run(started_apart))
    for hold, same, _ in results:
        assert len(hold) >= 4
        assert all(hold)
        assert same
    refusals = sorted(refusal for *_, refusal in results)
    assert refusals[0].startswith("1.0.weight: ")
    assert "another rank could not project" in refusals[1]


def sharpness_aware(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    passed(model, 0)
    slopes = [parameter.grad.clone() for parameter in model.net.parameters()]
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, slope in zip(model.net.parameters(), slopes, strict=True):
            parameter.add_(slope)
    passed(model, 0)
    with torch.no_grad():
        for parameter, slope in zip(model.net.parameters(), slopes, strict=True):
            parameter.sub_(slope)


def scaled(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    passed(model, 0)
    for parameter in model.net.parameters():
        parameter.grad.mul_(10.0)


def scaled_through_data(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    passed(model, 0)
    for parameter in model.net.parameters():
        sharding.local(parameter.grad).data.mul_(10.0)


def replaced(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    passed(model, 0)
    for parameter in model.net.parameters():
        parameter.grad = 10.0 * parameter.grad


def clipped(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    passed(model, 0)
    nn.utils.clip_grad_norm_(model.net.parameters(), 1e-3)


def partly_dropped(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    passed(model, 0)
    next(model.net.parameters()).grad = None


def at_other_weights(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.mul_(8.0)
    passed(model, 0)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.div_(8.0)


def passed(model: DPLipModel, start: int) -> None:
    inputs, targets = samples(16)
    model.loss(model(inputs[start : start + 8]), targets[start : start + 8]).backward()


ALTERATIONS = {
    sharpness_aware: "dropped or read",
    scaled: "something else than passes",
    scaled_through_data: "something else than passes",
    replaced: "something else than passes",
    clipped: "something else than passes",
    partly_dropped: "were dropped",
    at_other_weights: "between a pass and its step",
}


def altered_after_the_pass(units: str):
    model = model_of("signal gates", units)
    optimizer = sgd(model, sampling="none")
    refusals = {}
    for alter, words in ALTERATIONS.items():
        alter(model, optimizer)
        refusals[alter.__name__] = words, refusal_to_build(optimizer.step)
        optimizer.skip_draw()
        # A right loop beside it: two passes in one step.
        passed(model, 0)
        passed(model, 8)
        optimizer.step()
    return refusals, optimizer.steps_taken


@pytest.mark.parametrize("units", ["the model", "layers"])
def test_gradients_and_weights_of_parts_are_those_of_the_passes(ranks, units):
    for refusals, taken in succeeded(ranks.run(altered_after_the_pass, units)):
        for words, refusal in refusals.values():
            assert words in refusal
        assert taken == len(ALTERATIONS)


def killed():
    """The second rank dies after its forward pass of the second step."""
    model = model_of("signal gates", "layers")
    optimizer = sgd(model, sampling="poisson")
    inputs, targets = samples(8)
    for step in range(2):
        loss = model.loss(model(inputs), targets)
        before = [sharding.local(parameter).clone() for parameter in model.net.parameters()]
        if step == 1 and distributed.world().rank == 1:
            os._exit(1)
        try:
            loss.backward()
            optimizer.step()
        except RuntimeError:
            # A part of the gradients may have been there.
            optimizer.skip_draw()
            break
    failures = [refusal_to_build(optimizer.step), refusal_to_build(optimizer.step)]
    after = [sharding.local(parameter) for parameter in model.net.parameters()]
    held = any(parameter.grad is not None for parameter in model.net.parameters())
    counted = sum(count for *_, count in optimizer.accountant.history)
    return failures, all(map(torch.equal, before, after)), held, counted


def test_when_a_rank_dies_in_a_pass_no_update_is_applied_and_the_ledger_counts_what_was_tried():
    with Ranks() as both:
        result, lost = both.run(killed)
    assert lost == Failure("EOFError", "the process ended")
    failures, unchanged, held, counted = succeeded([result])[0]
    assert "did not arrive" in failures[0]
    assert "start all ranks again" in failures[1]
    assert unchanged
    assert not held
    assert counted == 2


# fit.


def fitted(
    units: str | None,
    path: str | None = None,
    stop_after: int | None = None,
    net: str = "signal gates",
    **options: object,
):
    """Weights, ε, history and steps; a step beyond ``stop_after`` fails."""

    def failing(run):
        if run.step == stop_after:
            raise InterruptedError("power cut")

    with before_steps(failing):
        settings: dict[str, object] = {
            "reproducible_seed": 3,
            "micro_batch_size": 32,
            "checkpoint": path,
            **RUN,
            **options,
        }
        model = model_of(net, units)
        try:
            result = fit(model, samples(300), validation=samples(60, 1), **settings)  # type: ignore[arg-type]
        except InterruptedError:
            return None
        # Records on their way to another process lose their losses.
        history = [SimpleNamespace(**vars(record)) for record in result.history]
        return weights(model), result.epsilon, history, result.steps


AVERAGED = {"net": "constraints", "optimizer": "adam", "lr": 0.05, "ema": 0.8}


def fitted_and_resumed(folder: str):
    """Runs without and with a power cut in the second epoch, gone on with in different ways."""
    for name, units, options in (
        ("parts", "layers", {}),
        ("other parts", "blocks", {}),
        ("averaged", "the model", AVERAGED),
    ):
        assert fitted(units, f"{folder}/{name}", stop_after=4, **options) is None
    return {
        "whole": fitted("layers"),
        "parts": fitted("layers", f"{folder}/parts"),
        "other parts": fitted("the model", f"{folder}/other parts"),
        "from one process": fitted("layers", f"{folder}/from one process"),
        "from replicas": fitted(None, f"{folder}/whole on each rank", stop_after=4)
        or fitted("layers", f"{folder}/whole on each rank"),
        "averaged, whole": fitted("the model", **AVERAGED),
        "averaged": fitted("the model", f"{folder}/averaged", **AVERAGED),
        "left for one process": fitted("blocks", f"{folder}/for one process", stop_after=4),
    }


@pytest.mark.slow
def test_fit_goes_on_from_parts_in_parts_and_in_one_process_as_if_nothing_had_happened(ranks, tmp_path):
    assert fitted(None, str(tmp_path / "from one process"), stop_after=4) is None
    alone, averaged = fitted(None), fitted(None, **AVERAGED)
    first, second = succeeded(ranks.run(fitted_and_resumed, str(tmp_path)))
    assert first.pop("left for one process") is second.pop("left for one process") is None
    first["to one process"] = second["to one process"] = fitted(None, str(tmp_path / "for one process"))
    for way, (changed, epsilon, history, steps) in first.items():
        expected = averaged if way.startswith("averaged") else alone
        assert same_weights(changed, expected[0]), way
        assert (epsilon, steps) == (expected[1], expected[3]), way
        assert [record.step for record in history] == [record.step for record in expected[2]]
        # Losses of the same batches at nearly the same weights, added up in another order; no checkpoint keeps one.
        for record, other in zip(history, expected[2], strict=True):
            assert record.loss is None or record.loss == pytest.approx(other.loss, rel=1e-3)
        assert history[-1].loss is not None
        assert torch.equal(changed, second[way][0]), way
    # The same parts: the same bits, momentum and averages included.
    assert torch.equal(first["parts"][0], first["whole"][0])
    assert torch.equal(first["averaged"][0], first["averaged, whole"][0])


class Deadly(SystemNoise):
    """Ends the second rank's process where noise is drawn in the fifth step."""

    step = 0

    def begin_step(self, step):
        self.step = step

    def standard_normal_(self, out):
        return os._exit(1) if self.step == 4 and distributed.world().rank == 1 else super().standard_normal_(out)


def killed_in_fit(path: str):
    fitted("layers", path, reproducible_seed=None, noise=Deadly())


def test_when_a_rank_dies_in_fit_the_run_stops_and_goes_on_from_its_checkpoint(tmp_path):
    path = str(tmp_path / "model.pt")
    with Ranks() as both:
        result, lost = both.run(killed_in_fit, path)
    assert lost == Failure("EOFError", "the process ended")
    assert (result.kind, "did not arrive" in result.message) == ("RankError", True)
    saved = load_checkpoint(path)["optimizer"]["clipless_dp"]
    assert saved["steps_taken"] == 3
    _, epsilon, history, steps = fitted(None, path, reproducible_seed=None, noise=Deadly())
    assert (steps, [record.step for record in history]) == (6, [3, 6])
    assert epsilon <= 4.0


@pytest.mark.slow
def test_torchrun_trains_uneven_parts_on_three_ranks_as_one_process_does(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, torch, torch.distributed as dist\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "from tests.distributed import test_sharding as shared\n"
        "dist.init_process_group('gloo')\n"
        # Without a mesh: torch's default one.
        "shared.fully_shard = fully_shard\n"
        "changed, epsilon, *_ = shared.fitted('layers')\n"
        "torch.save((changed, epsilon), f'{sys.argv[1]}/{dist.get_rank()}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    torchrun(script, 3, tmp_path)
    alone, epsilon, *_ = fitted(None)
    for rank in range(3):
        changed, spent = torch.load(tmp_path / f"{rank}.pt")
        assert same_weights(changed, alone)
        assert spent == epsilon
