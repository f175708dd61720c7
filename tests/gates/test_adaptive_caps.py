"""Caps that adapt: their counts are released in the step's own mechanism, and charged with it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from accounting import create_accountant
from clipless_dp import (
    AdaptiveLimit,
    CliplessDPOptimizer,
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    PrivacyError,
    ReproducibleNoise,
    fit,
    gradient_gated,
    losses,
    report,
)
from clipless_dp.gates import adapting_in, adaptive
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model.compiled import compiled_loss
from clipless_dp.noise import allocation
from clipless_dp.optim import plan
from tests.gates.test_joint_caps import NETS

LIMIT = 0.5
DYNAMIC = AdaptiveLimit(start=LIMIT, share=0.3)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name}, each": (name, {"isolation": "vmap"}) for name in NETS},
    **{
        f"{name}, {joint}": (name, {"joint": joint, "isolation": "vmap"})
        for name in NETS
        for joint in ("layer", "network")
    },
    "traced vectors": ("plain", {"isolation": "graph"}),
    "traced vectors, layer": ("plain", {"isolation": "graph", "joint": "layer"}),
    "traced maps": ("plain maps", {"isolation": "graph"}),
    "traced maps, layer": ("plain maps", {"isolation": "graph", "joint": "layer"}),
}
PLAIN: dict[str, tuple[Any, tuple[int, ...]]] = {
    **NETS,
    "plain": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "plain maps": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(2), nn.Linear(9, 2),
            nn.Flatten(), nn.Linear(4, 3),
        ),
        (2, 6, 6),
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def wrapped(case: str, limit: AdaptiveLimit = DYNAMIC, **options: Any) -> DPLipModel:
    name, asked = CASES[case]
    build, shape = PLAIN[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = build().double()
    norm = {"input_norm": 100.0} if asked["isolation"] == "graph" else {}
    gated = gradient_gated(net, limit=limit, **{**asked, **options})
    return DPLipModel(gated, input_shape=shape, loss=InnerProduct(1e6), **norm)


def samples(case: str, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = PLAIN[CASES[case][0]][1]
    inputs = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    targets = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    # On both sides of every cap.
    return inputs, targets * (10.0 ** torch.linspace(-3.0, 4.0, count, dtype=torch.float64))[:, None]


def counts(model: DPLipModel) -> Tensor:
    found = [caps.counts for caps in adapting_in(model.net).values()]
    return torch.cat(
        [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in found if one is not None]
    )


def summed(model: DPLipModel, inputs: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    model.register.drop()
    model.loss(model(inputs), targets).backward()
    named = model.net.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}, counts(model)
    model.register.drop()
    return found


def optimizer(model: DPLipModel, **options: Any) -> CliplessDPSGD:
    asked: dict[str, Any] = {
        "lr": 0.1, "noise_multiplier": 0.8, "sample_rate": 1.0, "dataset_size": 50, "sampling": "none",
        "noise": ReproducibleNoise(1), **options,
    }  # fmt: skip
    return CliplessDPSGD(model, **asked)


@every_case
def test_a_sample_changes_each_count_by_a_half_at_most_for_each_use_of_its_gate(case: str) -> None:
    model = wrapped(case)
    inputs, targets = samples(case)
    sensitivity = model.sensitivity()
    gates = [f"{place}.{gate}".lstrip(".") for place, caps in adapting_in(model.net).items() for gate in caps.caps]
    assert gates
    assert set(gates) == sensitivity.counted.keys()
    times = torch.tensor([sensitivity.counted[gate] for gate in gates], dtype=torch.float64)
    _, whole = summed(model, inputs, targets)
    assert len(whole) == len(times)
    largest = 0.0
    for index in range(len(inputs)):
        kept = [other for other in range(len(inputs)) if other != index]
        _, without = summed(model, inputs[kept], targets[kept])
        moved = (whole - without).abs()
        assert bool((moved <= 0.5 * times + 1e-9).all())  # sums of six halves round by 1e-15
        largest = max(largest, float(moved.norm()) / sensitivity.of_counts)
    assert largest == pytest.approx(1.0, abs=1e-9)


def moves(case: str, **options: Any) -> float:
    """The most that one sample moves all that is released, over the noise of each coordinate; times ``σ``."""
    model = wrapped(case)
    steps = optimizer(model, noise_multiplier=0.8, **options)
    deviations, of_counts = steps.noise_deviations(), steps.count_deviation()
    inputs, targets = samples(case)
    worst = 0.0
    for index in range(len(inputs)):
        gradients, counted = summed(model, inputs[index : index + 1], targets[index : index + 1])
        assert gradients.keys() == deviations.keys()
        parts = [float(gradient.norm()) / deviations[name] for name, gradient in gradients.items()]
        worst = max(worst, 0.8 * math.hypot(*parts, float(counted.norm()) / of_counts))
    return worst


@pytest.mark.parametrize(
    ("case", "allocation"),
    [
        *((case, "global") for case in CASES),
        *((case, way) for case in ("traced maps, layer", "tied, layer") for way in ("per-layer", "min-variance")),
    ],
)
def test_the_whole_release_moves_by_one_noise_multiplier_at_most_and_reaches_it(case: str, allocation: str) -> None:
    reached = moves(case, allocation=allocation)
    # Noise is drawn a millionth larger; the slack of rounding is below 1e-3 of each cap for these sizes.
    assert reached <= 1.0 + 1e-9
    assert reached >= (0.7 if case.startswith("traced maps") else 0.9)


def forgets_the_counts(
    sensitivities: Any, sizes: Any, noise_multiplier: float, scheme: Any = "global", *, counts: float, share: float
) -> tuple[list[float], float]:
    """Charges the gradients alone."""
    drawn, spent = allocation.drawn_deviations(sensitivities, sizes, noise_multiplier, scheme)
    return [*drawn, noise_multiplier * counts / math.sqrt(share)], spent


def halves_the_counts(*args: Any, counts: float, share: float) -> tuple[list[float], float]:
    return allocation.drawn_deviations(*args, counts=counts / 2, share=share)


@pytest.mark.parametrize("wrong", [forgets_the_counts, halves_the_counts])
@pytest.mark.parametrize("case", ["traced vectors", "attention, network", "attention, each"])
def test_a_charge_that_forgets_counts_or_half_of_them_is_caught(
    wrong: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "drawn_deviations", wrong)
    assert moves(case) > 1.05


def test_the_epsilon_is_that_of_the_noise_multiplier_which_gradients_and_counts_share() -> None:
    model = wrapped("traced vectors")
    steps = optimizer(model, sample_rate=0.1, dataset_size=1000, sampling="poisson", noise_multiplier=1.3)
    inputs, targets = samples("traced vectors")
    for _ in range(5):
        steps.zero_grad()
        model.loss(model(inputs), targets).backward()
        sensitivity = model.sensitivity()
        deviations, of_counts = steps.noise_deviations(), steps.count_deviation()
        ratios = [sensitivity.per_parameter[name] / deviation for name, deviation in deviations.items()]
        gates = 4
        effective = (sum(ratio**2 for ratio in ratios) + gates * (0.5 / of_counts) ** 2) ** -0.5
        assert effective == pytest.approx(1.3, rel=2e-6)  # the margin of the noise
        assert of_counts == pytest.approx(1.3 * 0.5 * math.sqrt(gates / 0.3), rel=2e-6)
        alone = sum(ratio**2 for ratio in ratios) ** -0.5
        assert alone == pytest.approx(1.3 / math.sqrt(0.7), rel=2e-6)
        steps.step()
    expected = create_accountant("prv")
    expected.step(noise_multiplier=1.3, sample_rate=0.1, steps=5)
    assert steps.get_epsilon(1e-5) == expected.get_epsilon(1e-5)
    # Caps have moved, and the charge has not.
    assert len(steps.accountant.ledger.lines) == 1
    assert len({tuple(record.caps.values()) for record in steps.cap_history}) == 5


def test_counts_have_noise_of_the_stated_deviation() -> None:
    model = wrapped("traced vectors", AdaptiveLimit(share=0.1))
    steps = optimizer(model, noise=ReproducibleNoise(7))
    found = []
    for _ in range(250):
        deviation = steps.count_deviation()
        steps.step()
        found += [(0.5 - share) * 50 / deviation for share in steps.cap_history[-1].below.values()]
    # Empty batches release noise alone. Kolmogorov–Smirnov; a thousand numbers tell 20 % more or less.
    assert stats.kstest(found, "norm").pvalue > 1e-4
    assert stats.kstest([1.25 * one for one in found], "norm").pvalue < 1e-4
    assert stats.kstest([0.8 * one for one in found], "norm").pvalue < 1e-4


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("isolation", ["graph", "vmap"])
def test_caps_come_to_the_quantile_of_the_norms(quantile: float, isolation: Any) -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 2, bias=False)).double()
    limit = AdaptiveLimit(start=8.0, quantile=quantile, rate=0.3)
    model = DPLipModel(
        gradient_gated(net, limit=limit, isolation=isolation),
        input_shape=(3,),
        loss=InnerProduct(1e6),
        **({"input_norm": 10.0} if isolation == "graph" else {}),
    )
    generator = torch.Generator().manual_seed(0)
    inputs = torch.nn.functional.normalize(torch.randn(400, 3, generator=generator, dtype=torch.float64), dim=1)
    sizes = torch.randn(400, generator=generator, dtype=torch.float64).exp()
    targets = torch.nn.functional.normalize(torch.ones(400, 2, dtype=torch.float64), dim=1) * sizes[:, None]
    steps = optimizer(model, dataset_size=400, noise_multiplier=0.05)
    for _ in range(70):
        steps.zero_grad()
        model.loss(model(inputs), targets).backward()
        steps.step()
    caps = [record.caps["1.weight"] for record in steps.cap_history[-20:]]
    # Gradients are g xᵀ of norm ‖g‖. The ramp is a tenth of the cap wide, and moves the quantile by less.
    assert sum(caps) / 20 == pytest.approx(float(sizes.quantile(quantile)), rel=0.1)


def test_padding_and_masked_rows_count_for_nothing_and_micro_batches_count_each_sample_once() -> None:
    model = wrapped("vectors, each")
    inputs, targets = samples("vectors, each")
    _, once = summed(model, inputs, targets)
    padded = torch.cat((inputs, torch.full_like(inputs[:3], math.nan)))
    more = torch.cat((targets, torch.zeros_like(targets[:3])))
    mask = torch.tensor([True] * 6 + [False] * 3)
    model.register.drop()
    model.loss(model(padded), more, mask).backward()
    torch.testing.assert_close(counts(model), once)
    steps = optimizer(model)
    steps.zero_grad()
    everything = inputs, targets, torch.ones(6, dtype=torch.bool)
    steps.accumulate(everything, micro_batch_size=2)
    torch.testing.assert_close(counts(model), once)
    steps.skip_draw()
    steps.accumulate(everything, micro_batch_size=4, multiplicity=3, augment=lambda sample: sample)
    torch.testing.assert_close(counts(model), once)


@pytest.mark.parametrize("isolation", ["graph", "vmap"])
def test_counts_go_with_gradients_that_are_dropped(isolation: str) -> None:
    case = "traced vectors" if isolation == "graph" else "vectors, each"
    model = wrapped(case)
    inputs, targets = samples(case)
    _, once = summed(model, inputs, targets)
    steps = optimizer(model)
    for drop in (
        steps.zero_grad,
        lambda: steps.zero_grad(set_to_none=False),
        lambda: model.zero_grad(),
        steps.skip_draw,
        steps.base_optimizer.zero_grad,
    ):
        model.register.drop()
        model.loss(model(inputs), targets).backward()
        assert bool(counts(model).any())
        drop()
        if drop is steps.skip_draw or drop is steps.zero_grad:
            assert not bool(counts(model).any())
        model.register.forget()
        model.loss(model(inputs), targets).backward()
        torch.testing.assert_close(counts(model), once)


def test_counts_that_something_else_has_changed_are_refused() -> None:
    model = wrapped("traced vectors")
    inputs, targets = samples("traced vectors")
    steps = optimizer(model)
    model.loss(model(inputs), targets).backward()
    (caps, *_) = adapting_in(model.net).values()
    assert caps.counts is not None
    assert caps.counts.grad is not None
    caps.counts.grad.mul_(2.0)
    with pytest.raises(Exception, match="changed"):
        steps.step()
    assert not bool(counts(model).any())


def trained(case: str, steps_taken: int, state: Any = None) -> tuple[CliplessDPOptimizer, DPLipModel]:
    model = wrapped(case)
    steps = optimizer(model, noise=ReproducibleNoise(5))
    if state is not None:
        model.net.load_state_dict(state["weights"])
        steps.load_state_dict(state["optimizer"])
    inputs, targets = samples(case)
    for _ in range(steps_taken):
        steps.zero_grad()
        model.loss(model(inputs), targets).backward()
        steps.step()
    return steps, model


@pytest.mark.parametrize("case", ["traced maps", "attention, layer", "vectors, network"])
@pytest.mark.filterwarnings("ignore:another optimizer")
def test_a_resumed_run_has_the_caps_and_the_history_of_one_that_went_on(case: str) -> None:
    whole, model = trained(case, 6)
    first, half = trained(case, 3)
    state = copy.deepcopy({"weights": half.net.state_dict(), "optimizer": first.state_dict()})
    second, resumed = trained(case, 3, state)
    assert second.caps == whole.caps
    assert second.cap_history == whole.cap_history
    for one, other in zip(model.net.parameters(), resumed.net.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert second.get_epsilon(1e-5) == whole.get_epsilon(1e-5)


def test_a_state_of_other_gates_is_refused_before_anything_is_taken_from_it() -> None:
    state = trained("traced vectors", 1)[0].state_dict()
    steps, _ = trained("traced vectors, layer", 0)
    with pytest.raises(ConfigurationError, match="adapt in other layers"):
        steps.load_state_dict(state)
    assert len(steps.accountant) == 0
    assert steps.steps_taken == 0
    fixed = DPLipModel(
        gradient_gated(PLAIN["plain"][0]().double()), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0)
    )
    with pytest.raises(ConfigurationError, match="adapt in other layers"):
        optimizer(fixed).load_state_dict(state)


def test_caps_move_between_steps_only_and_no_bound_lags_behind() -> None:
    model = wrapped("traced vectors")
    steps = optimizer(model, noise_multiplier=0.05)
    inputs, targets = samples("traced vectors")
    for _ in range(4):
        before = dict(steps.caps)
        model.loss(model(inputs), targets).backward()
        assert steps.caps == before
        bounds = model.sensitivity().per_parameter
        for name, cap in before.items():
            assert bounds[name] == pytest.approx(cap, rel=1e-4)
        alone, _ = summed(copy.deepcopy(model), inputs[-1:], targets[-1:])
        largest = [alone[name].norm() for name in before]
        for found, cap in zip(largest, before.values(), strict=True):
            assert float(found) == pytest.approx(cap, rel=1e-4)
        steps.step()
        assert steps.caps != before
    assert model.changes == 0  # nothing was traced anew


def test_fit_reports_caps_and_resumes_them(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 6, generator=generator)
    labels = inputs[:, :3].argmax(1)

    def model() -> DPLipModel:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
        return DPLipModel(gradient_gated(net, limit="adaptive"), input_shape=(6,), loss=losses.TauCrossEntropy(1.0))

    path = tmp_path / "run.ckpt"
    asked: dict[str, Any] = {"batch_size": 40, "lr": 0.1, "epsilon": 4.0, "delta": 1e-3, "checkpoint": path}
    result = fit(model(), (inputs, labels), epochs=2, audit=False, **asked)
    assert result.epsilon <= 4.0
    assert result.history[-1].caps == result.optimizer.caps
    assert len(result.optimizer.cap_history) == result.steps
    assert result.optimizer.caps.keys() == dict(model().net.named_parameters()).keys()
    again = fit(model(), (inputs, labels), epochs=2, audit=False, **asked)
    assert again.optimizer.caps == result.optimizer.caps
    assert again.optimizer.cap_history == result.optimizer.cap_history


def test_the_statement_tells_what_the_counts_take() -> None:
    model = wrapped("traced vectors")
    steps = optimizer(model)
    inputs, targets = samples("traced vectors")
    model.loss(model(inputs), targets).backward()
    steps.step()
    statement = report(steps, delta=1e-3)
    told = statement.facts["adaptive_caps"]
    assert {name: gate["cap"] for name, gate in told["gates"].items()} == steps.caps
    assert told["count_deviation"] == steps.count_deviation()
    assert told["settings"]["0"]["share"] == 0.3
    assert "counts take 0.3 of each step's σ⁻²" in " ".join(str(statement).split())
    fixed = DPLipModel(gradient_gated(PLAIN["plain"][0]()), input_shape=(6,), input_norm=1.0, loss=model.loss_function)
    plain = CliplessDPSGD(fixed, lr=0.1, noise_multiplier=1.0, sample_rate=0.1, dataset_size=10)
    assert "adaptive_caps" not in report(plain, delta=1e-3).facts


def test_gates_of_frozen_parameters_neither_count_nor_move() -> None:
    model = wrapped("vectors, each")
    dict(model.net.named_parameters())["0.weight"].requires_grad_(False)
    steps = optimizer(model)
    inputs, targets = samples("vectors, each")
    model.loss(model(inputs), targets).backward()
    steps.step()
    assert "0.weight" not in model.sensitivity().counted
    assert steps.caps["0.weight"] == LIMIT
    assert steps.caps["0.bias"] != LIMIT
    assert "0.weight" not in steps.cap_history[0].below


def test_adaptive_and_fixed_caps_go_together_and_new_gates_count_at_once() -> None:
    net = PLAIN["vectors"][0]().double()
    gated = gradient_gated(net, limit=2.0, isolation="vmap")
    gradient_gated(gated, limit=AdaptiveLimit(), layers=["0"])
    model = DPLipModel(gated, input_shape=(6,), loss=InnerProduct(1e6))
    assert set(model.sensitivity().counted) == {"0.weight", "0.bias"}
    with pytest.raises(ConfigurationError, match="adapt alike"):
        gradient_gated(gated, limit=AdaptiveLimit(quantile=0.9), layers=["3"])
    gradient_gated(gated, limit=AdaptiveLimit(), layers=["*"])
    inputs, targets = samples("vectors, each")
    _, counted = summed(model, inputs[-1:], targets[-1:])
    assert counted.tolist() == [0.5] * 6
    gradient_gated(gated, limit=1.0)
    assert not model.sensitivity().counted
    assert not adapting_in(model.net)


def test_graph_and_copies_of_a_model_count_by_themselves() -> None:
    model = wrapped("traced vectors")
    twin = copy.deepcopy(model)
    steps = optimizer(model)
    inputs, targets = samples("traced vectors")
    model.loss(model(inputs), targets).backward()
    assert bool(counts(model).any())
    assert not bool(counts(twin).any())
    steps.step()
    assert adapting_in(twin.net)["0"].caps == {"weight": LIMIT, "bias": LIMIT}
    _, own = summed(twin, inputs, targets)
    assert bool(own.any())
    single = model.float()
    assert all(
        caps.counts is not None and caps.counts.dtype == torch.float32 for caps in adapting_in(single.net).values()
    )


def test_what_cannot_adapt_is_refused() -> None:
    for wrong in ({"quantile": 0.0}, {"quantile": 1.0}, {"share": 1.0}, {"share": 0.0}, {"rate": 0.0}, {"start": 0.0}):
        with pytest.raises(ConfigurationError):
            AdaptiveLimit(**wrong)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    gated = gradient_gated(gradient_gated(net, limit="adaptive"), limit=AdaptiveLimit(share=0.2), layers=["1"])
    model = DPLipModel(gated, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
    with pytest.raises(ConfigurationError, match="one share"):
        CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.1, dataset_size=10)
    with pytest.raises(ConfigurationError, match="compile"):
        compiled_loss(wrapped("traced vectors"))


def test_a_ramp_keeps_rounding_from_turning_samples_over(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = torch.full((1000,), 1.0)
    nudged = norms * (1.0 + 1e-6)

    def moved() -> float:
        return float(adaptive.count(nudged, norms, 1.0) - adaptive.count(norms, norms, 1.0))

    assert moved() <= 1000 * 1e-5
    monkeypatch.setattr(adaptive, "RAMP", 1e-9)
    assert moved() > 400.0


def test_poisson_batches_of_all_sizes_are_released_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    model = wrapped("vectors, network")
    steps = optimizer(model, sample_rate=0.02, dataset_size=60, sampling="announced")
    for batch in PoissonBatches((inputs, targets), sample_rate=0.02, steps=12):
        steps.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        steps.step()
    assert len(steps.cap_history) == 12
    assert len(steps.accountant.ledger.lines) == 1


@pytest.mark.parametrize("cap", [0.5, AdaptiveLimit()], ids=["fixed", "adaptive again"])
def test_caps_that_are_set_anew_between_a_pass_and_its_step_are_refused_before_the_charge(cap) -> None:
    net = gradient_gated(nn.Sequential(nn.Linear(6, 3)), limit=DYNAMIC)
    model = DPLipModel(net, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy())
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.5, dataset_size=20)
    data = torch.randn(20, 6), torch.arange(20) % 3
    for step, batch in enumerate(PoissonBatches(data, sample_rate=0.5, steps=3)):
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        if step == 1:
            model.net.get_submodule("0").set_gate(cap)
            with pytest.raises(PrivacyError, match="set anew between a pass and its step"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.steps_taken == len(optimizer.accountant) == 2
