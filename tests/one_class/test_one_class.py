"""One-class networks: distances, negatives that never come inside, and what is charged for what."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
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
    UnsupportedModuleError,
    load,
)
from clipless_dp.constraints import Orthogonal
from clipless_dp.one_class import (
    BoundarySampler,
    BoxProjection,
    OneClassModel,
    convolutional_distance,
    dense_distance,
    fit_one_class,
    newton_walk,
    one_class_loss,
)
from clipless_dp.one_class.fitting import add_negatives
from clipless_dp.robustness import certified_auroc
from clipless_dp.sampling import PoissonBatches

DOMAIN = (-2.0, 2.0)
MARGIN = 0.2


def disk(count: int, seed: int = 0) -> Tensor:
    """Uniform in the unit disk."""
    drawn = torch.rand(2, count, generator=torch.Generator().manual_seed(seed))
    angle, radius = 2.0 * math.pi * drawn[0], drawn[1].sqrt()
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1)


def everywhere(count: int, seed: int = 1) -> Tensor:
    return 4.0 * torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) - 2.0


def trained(epsilon: float | None = None, **changes: Any) -> OneClassModel:
    torch.manual_seed(0)
    private = {} if epsilon is None else {"delta": 1e-4, "batch_size": 100, "epochs": 2.0, "accountant": "rdp"}
    settings = {
        "margin": MARGIN,
        "network": dense_distance((2,), widths=(16, 16)),
        "walk_steps": 2,
        "reproducible_seed": 0,
        "progress": False,
        "domain": DOMAIN,
        **private,
        **changes,
    }
    return fit_one_class(settings.pop("rows", disk(500)), epsilon=epsilon, **settings)


@pytest.fixture(scope="module")
def plain() -> OneClassModel:
    return trained(network=dense_distance((2,), widths=(32, 32)), epochs=100.0, walk_steps=4, lr=3e-3)


@pytest.fixture(scope="module")
def private() -> OneClassModel:
    return trained(3.0, network="dense")


# Geometry.


def test_scores_are_the_signed_distance_of_a_disk(plain: OneClassModel) -> None:
    points = everywhere(2000)
    distance = 1.0 - points.norm(dim=1)
    scores = plain.scores(points)
    # Between the levels m and -m; inside of the set f goes on to grow, and beyond -m nothing pulls it.
    ribbon = (distance < 0.0) & (distance > -2.0 * MARGIN)
    assert float((scores - MARGIN - distance)[ribbon].abs().mean()) < 0.08
    assert bool((scores[distance > 0.1] > 0.0).all())
    assert bool((scores[distance < -0.5] < 0.0).all())


def test_scores_move_no_faster_than_rows(plain: OneClassModel) -> None:
    first, second = 3.0 * everywhere(2000, 2), 3.0 * everywhere(2000, 3)
    apart = (first - second).norm(dim=1).double()
    moved = (plain.scores(first) - plain.scores(second)).abs().double()
    assert plain.lipschitz <= 1.0 + 1e-6
    assert bool((moved <= plain.lipschitz * apart + 1e-5).all())


def test_points_of_the_boundary_lie_on_it(plain: OneClassModel) -> None:
    points = plain.sample_boundary(200, rng_seed=0, steps=100)
    assert float((plain.scores(points) - plain.offset).abs().median()) < 1e-3
    assert float((points.norm(dim=1) - (1.0 + MARGIN)).abs().median()) < 0.1
    assert bool(((points >= DOMAIN[0]) & (points <= DOMAIN[1])).all())
    other = plain.sample_boundary(50, level=-0.1, rng_seed=0, steps=100)
    assert float((plain.scores(other) + 0.1).abs().median()) < 1e-3


def distance_to_disk(points: Tensor) -> Tensor:
    return MARGIN + 1.0 - points.norm(dim=1)


def walked(function: Any = distance_to_disk, **changes: Any) -> tuple[Tensor, Tensor]:
    start = everywhere(4000, 4)
    settings = {
        "level": -MARGIN,
        "inside": lambda some: some.clamp(-2.0, 2.0),
        "steps": 4,
        "damping": 1.0,
        "lengths": torch.rand(4000, generator=torch.Generator().manual_seed(5)),
        **changes,
    }
    return start, newton_walk(function, start, **settings)


def goes_inside(function: Any = distance_to_disk, **changes: Any) -> bool:
    """Whether a point that began below the level of a signed distance has passed it."""
    start, end = walked(function, **changes)
    outside = distance_to_disk(start) < -MARGIN
    return bool((distance_to_disk(end)[outside] > -MARGIN + 1e-5).any())


def test_the_sampler_never_comes_inside() -> None:
    assert not goes_inside()
    assert not goes_inside(lengths=torch.ones(4000))
    assert not goes_inside(damping=4.0)
    start, end = walked()
    outside = distance_to_disk(start) < -MARGIN
    # Those that began inside stay, the others come nearer, anywhere on the way.
    assert torch.equal(start[~outside], end[~outside])
    assert bool((distance_to_disk(end)[outside] >= distance_to_disk(start)[outside]).all())
    done = (distance_to_disk(end) - distance_to_disk(start))[outside] / (-MARGIN - distance_to_disk(start))[outside]
    assert float(done.min()) < 0.1
    assert float(done.max()) > 0.6


WALKS = {
    "the parts not divided by their number": {"lengths": 4.0 * 1.5 * torch.ones(4000)},
    "a level on the other side": {"level": MARGIN, "lengths": 4.0 * torch.ones(4000)},
    "no stop at the level": {"function": lambda some: distance_to_disk(some) - 1.0, "lengths": torch.ones(4000)},
}


@pytest.mark.parametrize("mutant", WALKS)
def test_a_mutant_of_the_sampler_comes_inside(mutant: str) -> None:
    assert goes_inside(**WALKS[mutant])


def test_the_sampler_follows_the_weights_and_differentiates_values_alone(plain: OneClassModel) -> None:
    sampler = BoundarySampler(plain.model, plain.box, steps=2, seed=0)
    before = sampler.draw(64, level=-MARGIN)
    assert bool(plain.box.inside(before).eq(before).all())
    again = BoundarySampler(plain.model, plain.box, steps=2, seed=0)
    assert torch.equal(again.draw(64, level=-MARGIN), before)
    assert all(parameter.grad is None for parameter in plain.model.parameters())
    weight = plain.model.net[0].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.neg_()
    other = BoundarySampler(plain.model, plain.box, steps=2, seed=0).draw(64, level=-MARGIN)
    late = BoundarySampler(plain.model, plain.box, steps=2, seed=0)
    with torch.no_grad():
        weight.copy_(kept)
    assert not torch.equal(other, before)
    assert torch.equal(late.draw(64, level=-MARGIN), before)


# The box.


@pytest.mark.parametrize("shape", [(2,), (5,), (1, 4, 4), (3, 2, 2)])
def test_no_row_lies_further_from_the_centre_than_the_radius(shape: tuple[int, ...]) -> None:
    lows = [-1.0 - index for index in range(shape[0])]
    for low, high in ((-1.0, 3.0), (lows, 4.0), (lows, [5.0] * shape[0])):
        box = BoxProjection(low, high, shape)
        corner = box(torch.full((1, *shape), 1e9))
        assert float(corner.norm()) <= box.radius <= float(corner.norm()) * (1.0 + 1e-4)
        points = box.uniform(500, torch.Generator().manual_seed(0))
        assert points.shape == (500, *shape)
        assert torch.equal(box.inside(points), points)
        assert float((points / box.reach).abs().max()) > 0.95


def test_the_projection_moves_no_two_points_apart() -> None:
    box = BoxProjection([-1.0, -3.0], [1.0, 2.0], (2,))
    first, second = 4.0 * everywhere(2000, 7), 4.0 * everywhere(2000, 8)
    assert bool(((box(first) - box(second)).norm(dim=1) <= (first - second).norm(dim=1) + 1e-5).all())


# Privacy.


def linear_model() -> tuple[DPLipModel, BoxProjection]:
    torch.manual_seed(0)
    box = BoxProjection(-1.0, 1.0, (2,))
    net = nn.Linear(2, 1)
    loss = one_class_loss(10.0, 100.0)
    return DPLipModel(net, input_shape=(2,), input_norm=box.radius, loss=loss, constraint=Orthogonal()), box


def private_optimizer(model: DPLipModel, size: int, rate: float = 1.0) -> CliplessDPOptimizer:
    base = torch.optim.SGD(model.net.parameters(), 0.1)
    return CliplessDPOptimizer(model, base, noise_multiplier=1.0, sample_rate=rate, dataset_size=size)


def summed(rows: Tensor, size: int, *, negatives: int = 64) -> tuple[dict[str, Tensor], Any, float]:
    """The sum that a step of one seed would release, negatives in it; the bounds; and how many positives came in."""
    model, box = linear_model()
    optimizer = private_optimizer(model, size)
    sampler = BoundarySampler(model, box, steps=2, seed=3)
    (batch,) = PoissonBatches((rows, torch.ones(len(rows)).long()), sample_rate=1.0, steps=1, seed=0)
    optimizer.accumulate(batch)
    add_negatives(
        optimizer, (sampler.draw(negatives, level=-1.0), torch.zeros(negatives).long()), optimizer.expected_batch_size
    )
    grads = {name: parameter.grad.clone() for name, parameter in model.net.named_parameters()}
    found = model.sensitivity()
    optimizer.skip_draw()
    return grads, found, float(batch.mask.sum())


def neighbours() -> tuple[Tensor, Tensor]:
    """Rows in one corner, and the same with one in the opposite one."""
    # One by one, as no row may be there twice.
    same = torch.ones(20, 2) - 1e-3 * torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    return same, torch.cat((same, -torch.ones(1, 2)))


def moved(divide: bool) -> tuple[float, float]:
    """How far the sum of neighbouring data moves, and Δ; ``divide``: by the realised count, times the expected one."""
    without, together = neighbours()
    first, bounds, few = summed(without, 20)
    second, _, many = summed(together, 20)
    scale = {True: (20.0 / few, 20.0 / many), False: (1.0, 1.0)}[divide]
    change = [scale[1] * second[name] - scale[0] * first[name] for name in first]
    return math.sqrt(sum(float(part.square().sum()) for part in change)), bounds.total


def test_neighbouring_data_of_one_seed_move_the_sum_by_at_most_its_bound() -> None:
    change, bound = moved(divide=False)
    assert 0.5 * bound < change <= bound * (1.0 + 1e-5)


def test_the_mutant_that_divides_by_the_realised_count_is_caught() -> None:
    change, bound = moved(divide=True)
    assert change > 1.5 * bound


def test_negatives_are_the_mean_of_their_own_in_a_step() -> None:
    model, _ = linear_model()
    rows, points = neighbours()[0], torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    optimizer = private_optimizer(model, 20)
    (batch,) = PoissonBatches((rows, torch.ones(20).long()), sample_rate=1.0, steps=1)
    optimizer.accumulate(batch)
    alone = model.net.weight.grad.clone()
    add_negatives(optimizer, (points, torch.zeros(40).long()), 20.0)
    found = (model.net.weight.grad - alone) / optimizer.expected_batch_size
    # The hinge is missed by all: the slope is that of the loss, upwards.
    expected = one_class_loss(10.0, 100.0).gradient_bound((1,)) * points.mean(0)
    assert torch.allclose(found.flatten(), expected, atol=1e-5)
    with pytest.raises(PrivacyError, match="do not balance"):
        add_negatives(optimizer, (points[:5], torch.zeros(5).long()), 20.0)


def test_only_positives_are_charged(private: OneClassModel) -> None:
    assert private.result is not None
    optimizer = private.result.optimizer
    steps, rate = 10, 0.2
    assert optimizer.accountant.history == [(private.result.noise_multiplier, rate, steps)]
    alone = create_accountant("rdp")
    alone.step(noise_multiplier=private.result.noise_multiplier, sample_rate=rate, steps=steps)
    assert private.epsilon == pytest.approx(alone.get_epsilon(1e-4))
    assert private.epsilon <= 3.0
    many = trained(3.0, negatives=300)
    assert many.result is not None
    assert many.result.noise_multiplier == private.result.noise_multiplier


def test_rows_outside_of_the_domain_count_as_its_nearest_points() -> None:
    rows = torch.cat((disk(300), 3.0 * everywhere(200)))
    first, second = trained(3.0, rows=rows), trained(3.0, rows=rows.clamp(*DOMAIN))
    points = everywhere(100)
    assert torch.equal(first.scores(points), second.scores(points))


def test_a_threshold_within_the_budget_is_charged_to_the_same_ledger() -> None:
    found = trained(3.0, rate=0.05)
    assert found.result is not None
    assert len(found.result.optimizer.accountant.ledger.entries) == 2
    assert found.epsilon <= 3.0
    assert found.result.spent < found.epsilon
    # Noise of some records in 500 leaves it near the share that was asked for.
    assert float((found.scores(disk(500)) < found.offset).float().mean()) < 0.3


def test_a_threshold_of_private_rows_is_charged_or_refused(private: OneClassModel) -> None:
    before = private.epsilon
    with pytest.raises(ConfigurationError, match="has not paid for"):
        private.threshold(0.05, disk(500))
    assert (private.epsilon, private.offset) == (before, 0.0)
    found = private.threshold(0.5, disk(500), noise_multiplier=2.0)
    try:
        assert private.epsilon > before
        exact = float(private.scores(disk(500)).double().quantile(0.5))
        assert abs(float((private.scores(disk(500)) < found).float().mean()) - 0.5) < 0.2
        assert found != exact
    finally:
        private.set_threshold(0.0)


def test_a_row_more_moves_no_other_rows_score_in_a_threshold(private: OneClassModel) -> None:
    rows = disk(40)
    alone = private.scores(rows[1:], batch_size=1)
    assert torch.equal(private.scores(rows, batch_size=1)[1:], alone)
    with mock.patch.object(OneClassModel, "_scores", autospec=True, side_effect=OneClassModel._scores) as asked:
        private.threshold(0.5, rows, noise_multiplier=50.0)
    private.set_threshold(0.0)
    assert [call.kwargs for call in asked.call_args_list] == [{"batch_size": 1}]


def test_several_processes_are_refused_before_anything_is_charged() -> None:
    ledger = create_accountant("rdp")
    world = type("World", (), {"size": 2, "rank": 0})()
    with (
        mock.patch("clipless_dp.one_class.fitting.placement.world", return_value=world),
        pytest.raises(ConfigurationError, match="one process"),
    ):
        trained(3.0, accountant=ledger)
    assert len(ledger) == 0


def test_a_threshold_without_privacy_is_the_quantile(plain: OneClassModel) -> None:
    with pytest.raises(ConfigurationError, match="without privacy"):
        plain.threshold(0.1, disk(500), noise_multiplier=1.0)
    try:
        found = plain.threshold(0.1, disk(500))
        assert float((plain.scores(disk(500)) < found).float().mean()) == pytest.approx(0.1, abs=0.01)
    finally:
        plain.set_threshold(0.0)


def beyond_float32() -> Tensor:
    rows = disk(40).double()
    rows[0, 0] = 1e39
    return rows


def test_a_row_beyond_float32_trains_and_has_a_threshold_as_the_nearest_point_of_the_box() -> None:
    """Finite before the cast and infinite after it: the threshold refused it when the training was paid for."""
    ledger, same = create_accountant("rdp"), beyond_float32()
    same[0, 0] = 2.0
    kept = {"batch_size": 20, "rate": 0.1}
    found = trained(8.0, rows=beyond_float32(), accountant=ledger, **kept)
    assert found.offset == trained(8.0, rows=same.float(), **kept).offset
    assert torch.equal(found.scores(beyond_float32()), found.scores(same))
    assert found.epsilon <= 8.0
    assert len(ledger.ledger.entries) == 2


def test_a_threshold_cannot_be_assigned_and_a_public_one_is_told_in_the_statement(tmp_path: Path) -> None:
    found = trained(3.0, network="dense")
    raw = float(found.scores(disk(500)).quantile(0.1))
    with pytest.raises(ConfigurationError, match="part of what is released"):
        found.offset = raw
    for computed in (torch.tensor(raw), np.float64(raw), True, math.nan, "0"):
        with pytest.raises(ConfigurationError, match="threshold must be"):
            found.set_threshold(computed)  # type: ignore[arg-type]
    assert found.offset == 0.0
    assert "half way between" in found.report().to_markdown()
    before = found.epsilon
    found.set_threshold(-0.25)
    assert (found.offset, found.epsilon) == (-0.25, before)
    assert "stated to be public" in found.report().to_markdown()
    found.save(tmp_path / "model.bin")
    assert "-0.25, stated to be public" in load(tmp_path / "model.bin").statement.to_markdown()
    found.threshold(0.5, disk(500), noise_multiplier=2.0)
    assert "released with noise multiplier 2" in found.report().to_markdown()
    assert "stated to be public, and charged" not in found.report().to_markdown()


def test_the_share_of_a_threshold_is_that_of_the_rows_it_is_taken_from() -> None:
    found, rows = trained(50.0), disk(100, seed=5)
    found.threshold(0.2, rows, noise_multiplier=0.01)
    assert float((found.scores(rows) < found.offset).float().mean()) == pytest.approx(0.2, abs=0.03)
    found = trained(50.0, dataset_size=600)
    before = found.epsilon
    with pytest.raises(ConfigurationError, match="give dataset_size"):
        found.threshold(0.2, rows, noise_multiplier=0.01)
    assert found.epsilon == before
    found.threshold(0.2, rows, noise_multiplier=0.01, dataset_size=100)
    assert float((found.scores(rows) < found.offset).float().mean()) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("size", [300, 2000])
def test_a_stated_size_that_differs_refuses_nothing_behind_the_training(size: int) -> None:
    assert trained(8.0, rate=0.1, dataset_size=size).offset != 0.0


class Frame:
    """A data frame, made where a test runs."""

    def __new__(cls, values: Any) -> Any:
        return pytest.importorskip("pandas").DataFrame(values)


def test_frames_arrays_and_lists_of_the_same_rows_are_the_same() -> None:
    rows = disk(40)
    expected = trained(rows=rows, epochs=1.0, rate=0.1)
    again = expected.offset
    array = rows.double().numpy()
    array.setflags(write=False)
    for given in (Frame(rows.numpy()), Frame(array), array, array.astype(">f8"), rows.tolist(), list(rows)):
        assert torch.equal(expected.scores(given), expected.scores(rows))
        assert expected.threshold(0.1, given) == expected.offset
        assert trained(rows=given, epochs=1.0, rate=0.1).offset == again


UNREADABLE: dict[str, Callable[[], Any]] = {
    "text": lambda: "abc",
    "nothing": lambda: None,
    "a list of texts": lambda: [["a", "b"]] * 9,
    "objects": lambda: disk(40).numpy().astype(object),
    "ragged lists": lambda: [[1.0, 2.0], [1.0]],
    "a sparse tensor": lambda: disk(40).to_sparse(),
    "a mapping": lambda: {"a": [1.0], "b": [2.0]},
    "a frame of texts": lambda: Frame({"a": ["x", "y"], "b": [1.0, 2.0]}),
    "a frame with a missing cell": lambda: Frame({"a": [1.0, None], "b": [1.0, 2.0]}),
    "an array with a mask": lambda: np.ma.masked_array(disk(40).numpy(), mask=disk(40).numpy() > 0.0),
    "numbers that are no reals": lambda: disk(40).numpy().astype(complex),
    "a set": lambda: {1.0, 2.0},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_table_is_refused_by_type_by_every_door(private: OneClassModel, name: str) -> None:
    rows, before, ledger = UNREADABLE[name](), private.epsilon, create_accountant("rdp")
    with pytest.raises(InputError):
        trained(3.0, rows=rows, accountant=ledger)
    for door in (private.scores, private.certify, lambda rows: private.threshold(0.1, rows, noise_multiplier=1.0)):
        with pytest.raises(InputError):
            door(rows)
    assert private.epsilon == before
    assert len(ledger) == 0
    if name not in ("a frame of texts", "a sparse tensor"):
        with pytest.raises(InputError):
            certified_auroc(rows, [0.0], 1.0, 0.0)


REFUSED: dict[str, tuple[dict[str, Any], type[CliplessError], str]] = {
    "no domain": ({"domain": None}, ConfigurationError, "must be public"),
    "a box of the data, as tensors": (
        {"domain": (disk(500).amin(0), disk(500).amax(0))},
        ConfigurationError,
        "not computed",
    ),
    "a box of the data, as arrays": (
        {"domain": (disk(500).numpy().min(0), disk(500).numpy().max(0))},
        ConfigurationError,
        "not computed",
    ),
    "a box of the data, as a number of numpy": (
        {"domain": (np.float64(-2.0), 2.0)},
        ConfigurationError,
        "not computed",
    ),
    "an empty box": ({"domain": (1.0, 1.0)}, ConfigurationError, "lo < hi"),
    "an infinite box": ({"domain": (-math.inf, 1.0)}, ConfigurationError, "plain finite"),
    "an end that is no float": ({"domain": (0, 10**400)}, ConfigurationError, "plain finite"),
    "a box that is empty in float32": ({"domain": (1e8, 1e8 + 1.0)}, ConfigurationError, "domain .* float32"),
    "a box that is a point in float32": ({"domain": (0.0, 1e-50)}, ConfigurationError, "domain .* float32"),
    "a box beyond float32": ({"domain": (0.0, 1e39)}, ConfigurationError, "domain .* float32"),
    "a box of other columns": ({"domain": ([0.0] * 3, 1.0)}, ConfigurationError, "3 numbers for 2"),
    "no rows": ({"rows": torch.zeros(0, 2)}, InputError, "floating-point rows"),
    "a missing cell": ({"rows": torch.tensor([[0.0, math.nan]])}, InputError, "Nothing was charged"),
    "an infinite cell": ({"rows": torch.tensor([[0.0, math.inf]])}, InputError, "Nothing was charged"),
    "whole numbers": ({"rows": torch.ones(5, 2).long()}, InputError, "floating-point rows"),
    "no delta": ({"delta": None}, ConfigurationError, "delta is missing"),
    "a negative epsilon": ({"epsilon": -1.0}, ConfigurationError, "epsilon"),
    "no margin": ({"margin": 0.0}, ConfigurationError, "margin"),
    "no weight": ({"weight": 0.0}, ConfigurationError, "weight"),
    "fewer negatives than positives": ({"negatives": 99}, ConfigurationError, "at least as many"),
    "a batch larger than the data": ({"batch_size": 501}, ConfigurationError, "larger than the data set"),
    "an unknown network": ({"network": "wide"}, ConfigurationError, "dense"),
    "two outputs": ({"network": nn.Linear(2, 2)}, ConfigurationError, "one output"),
    "batch statistics": (
        {"network": nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))},
        UnsupportedModuleError,
        "BatchNorm",
    ),
    "a walk beyond the boundary": ({"walk_damping": 2.5}, ConfigurationError, "walk_damping"),
    "a level within the set": ({"level": MARGIN}, ConfigurationError, "level"),
    "a level beyond the margin": ({"level": -2.0 * MARGIN}, ConfigurationError, "level"),
    "a rate of all": ({"rate": 1.0}, ConfigurationError, "rate"),
    "a share of nothing": ({"rate": 0.1, "threshold_share": 0.0}, ConfigurationError, "threshold_share"),
    "noise and a seed": ({"noise": "secure"}, ConfigurationError, "reproduced"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_anything_is_charged(case: str) -> None:
    changes, error, told = REFUSED[case]
    ledger = create_accountant("rdp")
    with pytest.raises(error, match=told):
        trained(**{"epsilon": 3.0, "accountant": ledger, **changes})
    assert len(ledger) == 0


def test_without_privacy_must_be_written_down() -> None:
    with pytest.raises(TypeError, match="epsilon"):
        fit_one_class(disk(10), domain=DOMAIN)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="without privacy"):
        trained(None, delta=1e-5)


def test_what_interrupts_a_training_knows_what_was_spent() -> None:
    calls = []

    def failing(optimizer: Any, steps: int) -> Any:
        def step() -> None:
            calls.append(1)
            if len(calls) == 3:
                raise OSError("a disk is full")

        return type("Schedule", (), {"step": staticmethod(step)})()

    with pytest.raises(OSError, match="disk") as told:
        trained(3.0, scheduler=failing)
    assert told.value.private_optimizer.steps_taken == 3  # type: ignore[attr-defined]


# What is certified.


def test_a_row_within_its_radius_stays_on_its_side(plain: OneClassModel) -> None:
    rows = everywhere(300, 11)
    weights = [part.weight.detach().double() for part in plain.model.net if isinstance(part, nn.Linear)]
    # That of the exact weights, below which no certified constant lies.
    least = math.prod(float(torch.linalg.matrix_norm(weight, 2)) for weight in weights)
    assert least <= plain.lipschitz
    for threshold in (0.0, 0.1):
        found = plain.certify(rows, threshold=threshold)
        gap = plain.scores(rows).double() - threshold
        assert torch.allclose(found.radii, gap.abs() / plain.lipschitz, atol=1e-4)
        assert bool((found.radii <= gap.abs() / least + 1e-6).all())
        assert torch.equal(found.predictions == 1, gap > 0.0)
        for seed in range(5):
            way = torch.nn.functional.normalize(
                torch.randn(300, 2, generator=torch.Generator().manual_seed(seed)), dim=1
            )
            there = rows + (0.999 * found.radii[:, None]).float() * way
            assert torch.equal(plain.scores(there) > threshold, gap > 0.0)


def test_certified_auroc_is_below_that_of_an_attack(plain: OneClassModel) -> None:
    normal, other = 1.1 * disk(200, 5), everywhere(400, 6)
    other = other[other.norm(dim=1) > 1.0]
    scores = [plain.scores(rows) for rows in (normal, other)]
    radius = 0.1
    # The way straight out, and straight in, which is that of the steepest slope here.
    away = [normal + radius * torch.nn.functional.normalize(normal, dim=1)]
    away.append(other - radius * torch.nn.functional.normalize(other, dim=1))
    attacked = certified_auroc(*(plain.scores(rows) for rows in away), plain.lipschitz, 0.0)
    sure = certified_auroc(*scores, plain.lipschitz, radius)
    assert sure <= attacked < certified_auroc(*scores, plain.lipschitz, 0.0)
    # The network's slope is nearly 1.
    assert attacked - sure < 0.1


# Images, files.


def test_images_go_through_convolutions() -> None:
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found = fit_one_class(
        images,
        domain=(0.0, 1.0),
        epsilon=2.0,
        delta=1e-3,
        network="convolutional",
        epochs=2.0,
        batch_size=30,
        accountant="rdp",
        progress=False,
    )
    assert found.scores(images).shape == (60,)
    assert found.lipschitz <= 1.0 + 1e-6
    assert found.sample_boundary(3, rng_seed=0).shape == (3, 1, 8, 8)
    with pytest.raises(InputError, match="1, 8, 8"):
        found.scores(images[:, :, :4])
    with pytest.raises(ConfigurationError, match="divisible"):
        convolutional_distance((1, 7, 8))


def test_a_file_holds_what_predicts_and_what_was_promised(private: OneClassModel, tmp_path: Path) -> None:
    private.save(tmp_path / "model.bin")
    known = load(tmp_path / "model.bin")
    points = everywhere(50)
    assert torch.allclose(known.scores(points), private.scores(points) - private.offset, atol=1e-6)
    assert known.epsilon == private.epsilon
    assert "stated to be public" in known.statement.to_markdown()
    with pytest.raises(ConfigurationError, match="leave net out"):
        load(tmp_path / "model.bin", net=nn.Linear(2, 1))


def test_a_file_of_a_network_of_ones_own_needs_it(tmp_path: Path) -> None:
    made = dense_distance((2,), widths=(8,))
    found = trained(3.0, network=made)
    found.save(tmp_path / "model.bin")
    with pytest.raises(ConfigurationError, match="net=net"):
        load(tmp_path / "model.bin")
    known = load(tmp_path / "model.bin", net=dense_distance((2,), widths=(8,)))
    points = everywhere(50)
    assert torch.allclose(known.scores(points), found.scores(points), atol=1e-6)


def test_without_privacy_there_is_no_statement(plain: OneClassModel) -> None:
    assert plain.epsilon == math.inf
    with pytest.raises(ConfigurationError, match="without privacy"):
        plain.report()
    with pytest.raises(ConfigurationError, match="without privacy"):
        plain.predictor()


def test_the_loss_is_a_hinge_and_a_distance() -> None:
    margin, weight = 0.3, 50.0
    loss = one_class_loss(margin, weight)
    scores = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64).requires_grad_()
    factor = 2.0 * weight / (2.0 * weight + 1.0)
    steepest = 0.0
    for label, sign in ((1, 1.0), (0, -1.0)):
        found = loss.per_sample(scores[:, None], torch.full((41,), label))
        signed = sign * scores
        expected = factor * ((margin - signed).clamp(min=0.0) - signed / weight)
        assert torch.allclose(found, expected)
        (slopes,) = torch.autograd.grad(found.sum(), scores)
        steepest = max(steepest, float(slopes.abs().max()))
    assert loss.gradient_bound((1,)) == pytest.approx((2.0 * weight + 2.0) / (2.0 * weight + 1.0))
    assert steepest == pytest.approx(loss.gradient_bound((1,)))
