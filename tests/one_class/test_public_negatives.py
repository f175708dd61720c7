"""Negatives that are public rows, and fixed features before the network: what is charged, and certified of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accounting import create_accountant
from clipless_dp import (
    CliplessDPOptimizer,
    CliplessError,
    ConfigurationError,
    DPLipModel,
    InputError,
    PrivacyError,
    load,
)
from clipless_dp.constraints import Orthogonal
from clipless_dp.features import FrozenFeatures, Scattering2d, strokes
from clipless_dp.one_class import (
    FixedFeatures,
    OneClassModel,
    PublicNegatives,
    fit_one_class,
    linear_distance,
    one_class_loss,
)
from clipless_dp.one_class.fitting import add_negatives
from clipless_dp.robustness import certified_auroc
from clipless_dp.sampling import PoissonBatches

SIDE = 12


def rings(count: int, seed: int = 0) -> Tensor:
    """Images of a ring of random size and place: rows of a kind, in [0, 1]."""
    drawn = torch.rand(3, count, 1, 1, generator=torch.Generator().manual_seed(seed))
    axis = torch.arange(SIDE) - SIDE / 2 + 0.5
    away = torch.hypot(axis[:, None] - 2 * drawn[0] + 1, axis[None] - 2 * drawn[1] + 1)
    return (-((away - 2.5 - 1.5 * drawn[2]) ** 2)).exp()[:, None]


def public(count: int = 200) -> Tensor:
    return strokes(count, (SIDE, SIDE), progress=False).float() / 255.0


def scattering() -> Scattering2d:
    return Scattering2d((SIDE, SIDE), 1, 4)


def trained(epsilon: float | None = None, **changes: Any) -> OneClassModel:
    torch.manual_seed(0)
    private = {} if epsilon is None else {"delta": 1e-4, "accountant": "rdp"}
    settings = {
        "domain": (0.0, 1.0),
        "network": "linear",
        "features": scattering(),
        "public_negatives": public(),
        "margin": 0.2,
        "epochs": 10.0,
        "batch_size": 100,
        "lr": 0.03,
        "reproducible_seed": 0,
        "progress": False,
        **private,
        **changes,
    }
    return fit_one_class(settings.pop("rows", rings(300)), epsilon=epsilon, **settings)


@pytest.fixture(scope="module")
def plain() -> OneClassModel:
    return trained()


@pytest.fixture(scope="module")
def private() -> OneClassModel:
    return trained(3.0)


# What is charged.


def summed(rows: Tensor, negatives: Tensor) -> tuple[dict[str, Tensor], float]:
    """The sum that a step of one seed would release, behind features, and its bound."""
    torch.manual_seed(0)
    features = scattering()
    middle = features(negatives).mean(0)
    radius = float((features(negatives) - middle).flatten(1).norm(dim=1).max())
    front = FixedFeatures(features, torch.zeros(1, SIDE, SIDE), middle, radius)
    net = linear_distance(front.feature_shape)
    model = DPLipModel(
        net,
        input_shape=front.feature_shape,
        input_norm=radius,
        loss=one_class_loss(10.0, 100.0),
        constraint=Orthogonal(),
    )
    base = torch.optim.SGD(net.parameters(), 0.1)
    optimizer = CliplessDPOptimizer(model, base, noise_multiplier=1.0, sample_rate=1.0, dataset_size=20)
    (batch,) = PoissonBatches((front(rows), torch.ones(len(rows)).long()), sample_rate=1.0, steps=1, seed=0)
    optimizer.accumulate(batch)
    drawn = PublicNegatives(front(negatives), seed=3).negatives(40, level=0.0)
    add_negatives(optimizer, (drawn, torch.zeros(40).long()), optimizer.expected_batch_size)
    grads = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    bound = model.sensitivity().total
    optimizer.skip_draw()
    return grads, bound


def change(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((second[name] - first[name]).square().sum()) for name in first))


@pytest.mark.parametrize(
    "added",
    [torch.zeros(1, 1, SIDE, SIDE), torch.ones(1, 1, SIDE, SIDE), rings(1, seed=9)],
    ids=["black", "white", "a ring"],
)
def test_a_row_more_moves_the_sum_by_at_most_its_bound_with_public_negatives(added: Tensor) -> None:
    without, bound = summed(rings(20), public())
    together, same = summed(torch.cat((rings(20), added)), public())
    assert bound == same
    assert 0.2 * bound < change(without, together) <= bound * (1.0 + 1e-5)


def test_negatives_that_read_the_rows_would_move_it_further() -> None:
    """The mutant that takes its public rows from private ones: the bound must not hold for it by accident."""
    white = torch.ones(1, 1, SIDE, SIDE)
    without, bound = summed(rings(20), public())
    together, _ = summed(torch.cat((rings(20), white)), 1.0 - public())
    assert change(without, together) > bound


def test_only_positives_are_charged(private: OneClassModel) -> None:
    assert private.result is not None
    sigma, steps = private.result.noise_multiplier, private.result.steps
    assert private.result.optimizer.accountant.history == [(sigma, 1 / 3, steps)]
    assert private.epsilon <= 3.0
    more = trained(3.0, public_negatives=public(400), negatives=300)
    assert more.result is not None
    assert more.result.noise_multiplier == sigma


def test_negatives_are_drawn_uniformly_and_by_public_randomness() -> None:
    rows = torch.arange(10.0)[:, None]
    drawn = PublicNegatives(rows, seed=0).negatives(20_000, level=0.0)
    counts = torch.bincount(drawn.flatten().long(), minlength=10)
    # χ² of 9 degrees of freedom: beyond 27.9 once in a thousand.
    assert float((counts - 2000).square().sum() / 2000) < 27.9
    assert torch.equal(PublicNegatives(rows, seed=0).negatives(20_000, level=0.0), drawn)
    assert not torch.equal(PublicNegatives(rows, seed=1).negatives(20_000, level=0.0), drawn)


def test_the_front_is_a_function_of_public_numbers_alone() -> None:
    first, second = trained(3.0), trained(3.0, rows=1.0 - rings(250, seed=5))
    assert first.features is not None
    assert second.features is not None
    assert torch.equal(first.features.middle, second.features.middle)
    assert first.features.radius == second.features.radius


def test_it_tells_rings_from_strokes_it_never_saw_with_and_without_privacy(
    plain: OneClassModel, private: OneClassModel
) -> None:
    normal, other = rings(200, seed=7), strokes(200, (SIDE, SIDE), seed=7).float() / 255.0
    for model in (plain, private):
        assert certified_auroc(model.scores(normal), model.scores(other), model.lipschitz, 0.0) > 0.9


def test_rows_as_they_are_do_with_public_negatives_too() -> None:
    found = trained(features=None, network="dense", epochs=20.0, lr=3e-3)
    normal, other = rings(200, seed=7), strokes(200, (SIDE, SIDE), seed=7).float() / 255.0
    assert certified_auroc(found.scores(normal), found.scores(other), found.lipschitz, 0.0) > 0.9
    assert found.features is None


# What is certified of pixels.


def steps_against(model: OneClassModel, images: Tensor, radius: float, sign: float) -> Tensor:
    """Images after an attack that follows the score's slope through the features, each moved by at most the radius."""
    front, net = model.front, model.model.net
    moved = images.clone()
    for _ in range(8):
        moved.requires_grad_()
        (slope,) = torch.autograd.grad(net(front(moved)).sum(), moved)
        lengths = slope.flatten(1).norm(dim=1).clamp(min=1e-9)[:, None, None, None]
        moved = moved.detach() + sign * radius / 3 * slope / lengths
        gap = moved - images
        far = gap.flatten(1).norm(dim=1).clamp(min=radius)[:, None, None, None]
        moved = images + gap * (radius / far)
    return moved.detach()


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_no_attack_on_pixels_comes_below_the_certificate(padding: Any) -> None:
    features = Scattering2d((SIDE, SIDE), 1, 4, padding)
    scale = features.lipschitz
    assert (scale > 1.0) == (padding == "reflect")
    model = trained(features=features)
    assert model.lipschitz == pytest.approx(scale * model.model.lipschitz_constant())
    images = torch.cat((rings(40, seed=8), public(240)[200:]))
    gaps = model.scores(images) - model.offset
    found = model.certify(images)
    # That of the exact weights, below which no certified constant lies.
    least = scale * float(model.model.net[-1].weight.detach().double().norm())
    assert least <= model.lipschitz
    assert bool((found.radii <= gaps.abs().double() / least + 1e-5).all())
    assert bool((found.radii >= gaps.abs().double() / model.lipschitz - 1e-4).all())
    radius = float(found.radii.median())
    for sign in (-1.0, 1.0):
        moved = steps_against(model, images, radius, sign)
        assert bool(((moved - images).flatten(1).norm(dim=1) <= radius * (1 + 1e-5)).all())
        after = model.scores(moved)
        assert bool(((after - gaps - model.offset).abs() <= model.lipschitz * radius * (1.0 + 1e-4) + 1e-6).all())
        sure = found.radii > radius * (1.0 + 1e-4)
        assert bool(sure.any())
        assert torch.equal((after > model.offset)[sure], (gaps > 0.0)[sure])
    normal, other = images[:40], images[40:]
    attacked = [
        model.scores(steps_against(model, some, 0.1 / scale, way)) for some, way in ((normal, -1.0), (other, 1.0))
    ]
    sure_auroc = certified_auroc(model.scores(normal), model.scores(other), model.lipschitz, 0.1 / scale)
    assert sure_auroc <= certified_auroc(*attacked, model.lipschitz, 0.0)


@pytest.mark.parametrize(
    "altered",
    [
        "buffer",
        "constant",
        "hook",
        "another",
        "forward",
        "method",
        "front hook",
        "front forward",
        "seen",
        "class",
        "ball",
    ],
)
def test_altered_features_are_certified_and_saved_by_nobody(altered: str, tmp_path: Path) -> None:
    model = trained(8.0, epochs=1.0)
    front = model.features
    assert front is not None
    if altered == "buffer":
        with torch.no_grad():
            next(iter(front.features.buffers())).mul_(5.0)
    elif altered == "constant":
        front.features.lipschitz = 1e-3
    elif altered == "hook":
        front.features.register_forward_hook(lambda module, inputs, output: 5.0 * output)
    elif altered == "another":
        front.features = Scattering2d((SIDE, SIDE), 1, 4, "reflect")
    elif altered == "forward":
        front.features.forward = lambda images: 5.0 * images  # type: ignore[method-assign]
    elif altered == "method":
        vars(front.features)["_averaged"] = lambda *values: 5.0 * values[0]
    elif altered == "front hook":
        front.register_forward_hook(lambda module, inputs, output: 5.0 * output)
    elif altered == "front forward":
        front.forward = lambda points: 5.0 * points  # type: ignore[method-assign]
    elif altered == "seen":
        front.seen = lambda features: 5.0 * features  # type: ignore[method-assign]
    elif altered == "class":
        front.__class__ = type("Other", (FixedFeatures,), {"seen": lambda self, features: 5.0 * features})
    else:
        front.radius = -1.0
    with pytest.raises(CliplessError):
        model.save(tmp_path / "model.bin")
    with pytest.raises(PrivacyError, match="not as they were made"):
        _ = model.lipschitz
    with pytest.raises(PrivacyError, match="not as they were made"):
        model.certify(rings(3))


def test_what_hangs_on_the_module_that_is_given_is_not_in_the_model() -> None:
    seen: list[Tensor] = []
    given = scattering()
    given.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    given.kept = torch.ones(3)  # type: ignore[assignment]
    with torch.no_grad():
        next(iter(given.buffers())).mul_(5.0)
    found = trained(features=given)
    assert not seen
    assert found.features is not None
    assert not hasattr(found.features.features, "kept")
    assert torch.equal(found.scores(rings(5)), trained().scores(rings(5)))


def test_a_threshold_other_than_zero_is_certified_in_pixels_too(plain: OneClassModel) -> None:
    images = rings(30, seed=8)
    found = plain.certify(images, threshold=0.05)
    assert torch.allclose(found.radii, (plain.scores(images).double() - 0.05).abs() / plain.lipschitz, atol=1e-3)


def test_the_front_moves_no_two_images_further_apart_than_they_are(plain: OneClassModel) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (2.0 * torch.rand(100, 1, SIDE, SIDE, generator=generator) - 0.5 for _ in range(2))
    second = torch.where(torch.rand(100, 1, 1, 1, generator=generator) < 0.5, first + 0.01 * second, second)
    apart = (first - second).flatten(1).norm(dim=1)
    seen = (plain.front(first) - plain.front(second)).flatten(1).norm(dim=1)
    assert bool((seen <= apart * (1.0 + 1e-5) + 1e-5).all())
    assert plain.features is not None
    assert bool((plain.front(first).flatten(1).norm(dim=1) <= plain.features.radius * (1.0 + 1e-5)).all())


def test_no_row_of_the_company_changes_a_score(plain: OneClassModel) -> None:
    images = torch.cat((rings(5), 1e4 * torch.ones(3, 1, SIDE, SIDE)))
    alone = torch.cat([plain.scores(image[None]) for image in images])
    assert torch.allclose(plain.scores(images), alone, atol=1e-5)


# Without public negatives features do as well: points of the box walk through them.


def test_negatives_walk_through_features_to_the_level() -> None:
    found = trained(public_negatives=None, network="linear", walk_steps=4, walk_damping=4.0, level=0.0, epochs=2.0)
    assert found.features is not None
    assert found.features.radius == pytest.approx(0.5 * SIDE, rel=1e-4)
    points = found.sample_boundary(5, rng_seed=0)
    assert points.shape == (5, 1, SIDE, SIDE)
    assert bool(((points >= 0.0) & (points <= 1.0)).all())


# Refusals, files.


class Observing(nn.Module):
    """What keeps something of the rows that it sees."""

    lipschitz = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.largest = torch.maximum(self.largest, images.max())
        return images


class Scattered(Scattering2d):
    """Another class."""


def with_nan() -> Tensor:
    return torch.where(torch.arange(200)[:, None, None, None] == 5, math.nan, public())


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[CliplessError], str]] = {
    "rows of another shape": (
        lambda: {"public_negatives": public()[:, :, 1:]},
        InputError,
        "public_negatives: expected",
    ),
    "rows that are no numbers": (lambda: {"public_negatives": "strokes"}, InputError, "public_negatives"),
    "bytes": (lambda: {"public_negatives": (255 * public()).byte()}, InputError, "public_negatives: expected"),
    "no rows": (lambda: {"public_negatives": public()[:0]}, InputError, "public_negatives"),
    "NaN": (lambda: {"public_negatives": with_nan()}, InputError, "public_negatives: some"),
    "the rows themselves": (
        lambda: {"rows": (one := rings(300)), "public_negatives": one},
        InputError,
        "in the memory",
    ),
    "a view of the rows": (
        lambda: {"rows": (one := rings(300)), "public_negatives": one[100:]},
        InputError,
        "in the memory",
    ),
    "fewer of a step than positives": (lambda: {"negatives": 99}, ConfigurationError, "at least as many"),
    "a walk": (lambda: {"walk_steps": 4}, ConfigurationError, "leave one or the other out"),
    "a level": (lambda: {"level": 0.0}, ConfigurationError, "leave one or the other out"),
    "all the same": (lambda: {"public_negatives": torch.zeros(5, 1, SIDE, SIDE)}, InputError, "nothing to tell apart"),
    "features that are no module": (lambda: {"features": torch.flatten}, ConfigurationError, "Scattering2d"),
    "features of ones own": (lambda: {"features": nn.Flatten()}, ConfigurationError, "which you compute first"),
    "features that keep something": (lambda: {"features": Observing()}, ConfigurationError, "which you compute first"),
    "a frozen module": (lambda: {"features": FrozenFeatures(Observing())}, ConfigurationError, "compute first"),
    "features of a class made of it": (
        lambda: {"features": Scattered((SIDE, SIDE), 1, 4)},
        ConfigurationError,
        "compute first",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_anything_is_charged(case: str) -> None:
    changes, error, told = REFUSED[case]
    ledger = create_accountant("rdp")
    with pytest.raises(error, match=told):
        trained(3.0, accountant=ledger, **changes())
    assert len(ledger) == 0


@pytest.mark.parametrize("features", [True, False])
def test_public_rows_that_are_like_private_ones_are_no_reason_to_stop(features: bool) -> None:
    """Whether one is is private: at a corner of the box, as tables of counts have many, or a blank image."""
    rows = rings(200)
    rows[:40], rows[40:60] = 1.0, 0.0
    negatives = torch.cat((public(), torch.ones(40, 1, SIDE, SIDE), torch.zeros(20, 1, SIDE, SIDE), rings(20)))
    changes = {} if features else {"features": None, "network": "dense"}
    found = trained(3.0, rows=rows, public_negatives=negatives, **changes)
    assert found.epsilon <= 3.0


def test_points_that_walk_to_where_rows_are_are_no_reason_to_stop() -> None:
    rows = torch.where(torch.arange(200) % 2 == 0, 0.0, 1.0)[:, None]
    found = fit_one_class(
        rows, domain=(0.0, 1.0), epsilon=2.0, delta=1e-4, accountant="rdp", epochs=5.0, batch_size=50, progress=False
    )
    assert found.epsilon <= 2.0


def test_features_of_a_cache_are_the_same(plain: OneClassModel, tmp_path: Path) -> None:
    for _ in range(2):
        found = trained(features=FrozenFeatures(scattering(), cache_dir=tmp_path))
        assert torch.equal(found.scores(rings(5)), plain.scores(rings(5)))
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_a_file_scores_images_and_tells_of_features_and_public_rows(private: OneClassModel, tmp_path: Path) -> None:
    private.save(tmp_path / "model.bin")
    known = load(tmp_path / "model.bin")
    images = torch.cat((rings(20, seed=8), 3.0 * public(20)))
    assert torch.allclose(known.scores(images), private.scores(images) - private.offset, atol=1e-6)
    assert known.epsilon == private.epsilon
    told = known.statement.to_markdown()
    assert "200 rows that were stated to be public" in told
    assert "Scattering2d" in told


def test_a_threshold_within_the_budget_goes_through_the_features() -> None:
    found = trained(4.0, rate=0.1)
    assert found.epsilon <= 4.0
    assert float((found.scores(rings(300)) < found.offset).float().mean()) < 0.4
