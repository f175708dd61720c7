"""Attacks reach the boundary where it is known, keep their box and seed, and follow the slope of the values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError, constraints, gated, layers
from clipless_dp.robustness import attack, attacks, certify, lipschitz_lower_bound, networks, plain_network
from tests.robustness.nets import NETWORKS, dense, points, seeded, wrapped
from tests.soundness.mutation import Mutant

EACH = (
    attacks.FGM(),
    attacks.PGD(steps=20),
    attacks.DeepFool(),
    attacks.HKRStep(),
    attacks.CarliniWagner(steps=60, searches=4),
)


def linear_model() -> nn.Module:
    layer = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
    return wrapped(layer, (3,), input_norm=100.0)


@pytest.mark.parametrize("one", EACH, ids=lambda one: one.name)
def test_each_attack_finds_the_boundary_of_a_linear_network(one: attacks.Attack) -> None:
    inputs = points(12, 3)
    true = (3.0 * inputs[:, 0] - 4.0 * inputs[:, 1]).abs() / 5.0
    found = attack(linear_model(), inputs, (one,), radii=(5.0,))
    # Adam goes around by some percent; the others step straight against the gradient, or project onto it.
    slack = 0.1 if isinstance(one, attacks.CarliniWagner) else 1e-3 if not isinstance(one, attacks.PGD) else 0.02
    assert bool((found.distances >= true * (1.0 - 1e-9)).all())
    assert bool((found.distances <= true * (1.0 + slack) + 1e-9).all())
    assert set(found.attacks) == {one.name}


def test_found_examples_are_wrong_and_as_near_as_is_said() -> None:
    model = seeded(NETWORKS["orthogonal"]).double()
    inputs = points(16, 5)
    labels = certify(model, inputs).predictions
    labels[:3] = (labels[:3] + 1) % 3
    found = attack(model, (inputs, labels), radii=(0.5, 2.0))
    assert found.distances[:3].tolist() == [0.0] * 3
    assert found.attacks[:3] == ("wrong at once",) * 3
    hit = found.distances.isfinite()
    assert float(hit.double().mean()) > 0.8
    predicted = plain_network(model)(found.examples).argmax(1)
    assert bool((predicted != labels)[hit].all())
    moved = (found.examples - inputs).norm(dim=1)
    assert torch.allclose(moved[hit], found.distances[hit], rtol=1e-12)
    assert found.accuracy(0.0) == 13 / 16
    assert found.accuracy(1e9) == float((~hit).double().mean())


def test_a_seed_decides_and_no_sample_depends_on_its_company_but_for_what_is_drawn() -> None:
    model, inputs = seeded(NETWORKS["residual"]).double(), points(9, 5)
    first, again = (attack(model, inputs, radii=(0.3,), rng_seed=1) for _ in range(2))
    assert torch.equal(first.distances, again.distances)
    drawn = (attacks.DeepFool(), attacks.HKRStep(), attacks.FGM())
    together, apart = (attack(model, inputs, drawn, batch_size=size).distances for size in (9, 2))
    # Products of other sizes round in another order.
    assert torch.allclose(together, apart, rtol=1e-6)


@pytest.mark.parametrize("one", EACH, ids=lambda one: one.name)
def test_nothing_leaves_the_box(one: attacks.Attack) -> None:
    model = seeded(NETWORKS["convolutions"]).double()
    inputs = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen: list[Tensor] = []
    plain = networks.PlainNetwork.outputs

    def watched(self: networks.PlainNetwork, values: Tensor) -> Tensor:
        seen.append(values.detach())
        return plain(self, values)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(networks.PlainNetwork, "outputs", watched)
        found = attack(model, inputs, (one,), radii=(0.5, 4.0), box=(0.0, 1.0))
    assert len(seen) > 2
    # Shortening a way to a point of the box rounds once.
    assert all(float(values.min()) >= -1e-12 and float(values.max()) <= 1.0 + 1e-12 for values in seen)
    assert float(found.examples.min()) >= -1e-12
    with pytest.raises(InputError, match="outside of the box"):
        attack(model, inputs, (one,), box=(0.0, 0.5))


def test_a_budget_is_kept() -> None:
    model, inputs = seeded(NETWORKS["wide"]).double(), points(12, 5)
    victim = attacks.Victim(
        plain_network(model),
        inputs,
        certify(model, inputs).predictions,
        *inputs.new_tensor([-9.0, 9.0]),
        torch.Generator(),
    )
    for one in (attacks.FGM(), attacks.PGD(steps=7, restarts=3)):
        for proposed in one.proposals(victim, (0.25,)):
            assert bool(((proposed - inputs).norm(dim=1) <= 0.25 * (1.0 + 1e-12)).all())


def test_a_flat_network_is_attacked_in_random_directions_and_not_with_nan() -> None:
    flat = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        flat[0].weight.copy_(torch.eye(4, 3))
        flat[0].bias.fill_(-0.05)
        flat[2].weight.copy_(torch.tensor([[-1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
        flat[2].bias.copy_(torch.tensor([0.01, 0.0]))
    inputs = torch.zeros(8, 3, dtype=torch.float64)
    found = attack(flat, inputs, (attacks.PGD(steps=30, restarts=2),), radii=(0.5,))
    # Half of all directions lead uphill; a way that starts in one of them may stay there.
    assert float(found.distances.isfinite().double().mean()) > 0.5
    for one in EACH:
        assert bool(attack(flat, inputs, (one,), radii=(0.5,)).examples.isfinite().all())


def test_the_strongest_of_all_counts() -> None:
    model, inputs = seeded(NETWORKS["residual"]).double(), points(10, 5)
    each = torch.stack([attack(model, inputs, (one,), radii=(0.3, 1.0)).distances for one in EACH[2:4]])
    both = attack(model, inputs, EACH[2:4], radii=(0.3, 1.0))
    # Deterministic attacks, of the same rows.
    assert torch.allclose(both.distances, each.amin(0), rtol=1e-12)


def test_a_mutant_that_differentiates_through_gates_misses_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        body = nn.Sequential(nn.Linear(3, 4), layers.FullSort(), nn.Linear(4, 3))
        return wrapped(gated(body, cotangent_norm=50.0, cotangent_mode="normalize"), (3,))

    model = seeded(build, 1).double()
    inputs = points(16, 3)
    # A gate that lifts what it lets through makes Newton's step too short.
    one = (attacks.HKRStep(steps=2, overshoot=0.1), attacks.DeepFool(steps=2, overshoot=0.1))
    free = attack(model, inputs, one)
    mutant = Mutant("gates stay", networks, "_without_gates", "isinstance(child, CotangentGate)", "False")
    mutant.apply(monkeypatch)
    through = attack(model, inputs, one)
    assert float(free.distances.isfinite().double().mean()) > 0.8
    assert float(through.distances.isfinite().double().mean()) < 0.3


def test_the_gradient_of_the_plain_network_is_that_of_finite_differences() -> None:
    model = seeded(NETWORKS["signal gates"]).double()
    plain = plain_network(model)
    inputs = points(4, 5, size=2.0).requires_grad_()
    (slope,) = torch.autograd.grad(plain(inputs)[:, 0].sum(), inputs)
    step = 1e-6 * points(4, 5, seed=9)
    with torch.no_grad():
        moved = plain(inputs + step)[:, 0] - plain(inputs - step)[:, 0]
        # Fused layers round in another order.
        assert torch.allclose(plain(inputs), model(inputs), rtol=1e-12)
    # Second-order terms vanish but at kinks; differences of 1e-6 keep ten digits.
    assert torch.allclose(moved, 2.0 * (slope * step).sum(1), rtol=1e-5, atol=1e-12)
    assert plain_network(plain) is plain


@pytest.mark.parametrize("name", NETWORKS)
def test_the_lower_bound_stays_below_the_certified_constant(name: str) -> None:
    model = seeded(NETWORKS[name])
    assert 0.0 < lipschitz_lower_bound(model, points(8, *model.input_shape).float()) <= model.lipschitz_constant()


def test_the_lower_bound_stays_below_the_constant_where_scores_cancel() -> None:
    layer = nn.Linear(2, 2).double()
    with torch.no_grad():
        layer.weight.copy_(1e-3 * torch.eye(2))
        layer.bias.fill_(1e6)
    for model in (layer, wrapped(layer, (2,), input_norm=9.0)):
        assert lipschitz_lower_bound(model, points(50, 2)) <= 1e-3


def test_the_lower_bound_is_the_constant_of_a_linear_and_of_an_orthogonal_network() -> None:
    layer = nn.Linear(6, 4).double()
    norm = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    # Power iteration over 20 steps.
    assert lipschitz_lower_bound(layer, points(5, 6)) == pytest.approx(norm, rel=1e-3)
    assert lipschitz_lower_bound(layer, points(5, 6)) <= norm
    model = seeded(lambda: wrapped(dense(4, 8, 8), (4,), constraint=constraints.Orthogonal())).double()
    # Wide orthogonal layers preserve lengths until the last one projects on three of eight directions.
    assert lipschitz_lower_bound(model, points(40, 4)) > 0.9 * model.lipschitz_constant()


def test_what_does_not_fit_is_refused() -> None:
    model, inputs = linear_model(), points(2, 3)
    for wrong in ({"radii": (0.0,)}, {"radii": (-1.0,)}, {"box": (1.0, 0.0)}, {"batch_size": 0}, {"bisections": 0}):
        with pytest.raises(ConfigurationError):
            attack(model, inputs, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="below 2"):
        attack(model, (inputs, torch.tensor([0, 2])))
    with pytest.raises(ConfigurationError, match=r"attacks\.PGD"):
        attack(model, inputs, ("pgd",))  # type: ignore[arg-type]
    for build in (
        lambda: attacks.PGD(steps=0),
        lambda: attacks.DeepFool(overshoot=-1.0),
        lambda: attacks.HKRStep(t=math.nan),
        lambda: attacks.CarliniWagner(searches=0),
    ):
        with pytest.raises(ConfigurationError):
            build()
    with pytest.raises(InputError):
        lipschitz_lower_bound(model, inputs[:0])
