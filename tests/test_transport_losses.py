"""Losses of optimal transport: bounds attained and never passed, formulas by hand, and the distance that they find."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import ConfigurationError, DPLipModel, InputError, constraints, fit_without_privacy, layers, losses
from clipless_dp.model.rowwise import RowLosses

PRIORS = (0.5, 0.3, 0.2)
LOSSES: tuple[losses.Loss, ...] = (
    losses.KantorovichRubinstein(PRIORS),
    losses.HingeMargin(0.7),
    losses.HingeMargin(0.7, balanced=True),
    losses.ConvexHingeKR(PRIORS, alpha=0.9, margin=0.5),
    losses.ConvexHingeKR(PRIORS, alpha=0.0),
    losses.LogSumExpHKR(alpha=0.9, temperature=3.0),
    losses.SoftHKR(alpha=0.9, temperature=0.5),
    losses.OffsetCrossEntropy(4.0, offset=0.5),
    losses.OffsetCrossEntropy(4.0, offset=0.5, label_smoothing=0.2, class_weights=(1.0, 2.0, 3.0)),
)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def norms(loss: losses.Loss, output: Tensor, target: Tensor) -> Tensor:
    output = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.per_sample(output, target).sum(), output)
    return gradient.reshape(len(gradient), -1).norm(dim=1)


def worst(loss: losses.Loss, classes: int) -> float:
    """Over all labels, where one score is far above all others: margins are missed, and softmaxes at a corner."""
    scores = torch.cat((1e6 * torch.eye(classes), torch.zeros(1, classes), torch.full((1, classes), 1e-9))).double()
    # All wrong scores up, the true one down, and one of the wrong ones above the rest.
    found = 0.0
    for label in range(classes):
        missed = torch.where(torch.arange(classes) == label, -1e6, 1e3).double() + 1e3 * torch.eye(classes).double()
        outputs = torch.cat((scores, missed))
        found = max(found, float(norms(loss, outputs, torch.full((len(outputs),), label)).max()))
    return found


@every_loss
def test_the_stated_bound_is_attained_and_never_passed(loss: losses.Loss) -> None:
    bound = loss.gradient_bound((3,))
    # A dozen float64 roundings.
    assert worst(loss, 3) == pytest.approx(bound, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-6, 0.1, 1.0, 30.0, 1e6):
        outputs = size * torch.randn(50, 3, generator=generator, dtype=torch.float64)
        found = norms(loss, outputs, torch.randint(3, (50,), generator=generator))
        assert float(found.max()) <= bound * (1.0 + 1e-12)


@given(st.integers(0, 2**16), st.integers(2, 7), st.floats(0.0, 1.0), st.floats(1e-2, 1e2))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_bounds_are_attained_for_any_number_of_classes(seed: int, classes: int, alpha: float, size: float) -> None:
    drawn = torch.randn(classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    priors = torch.softmax(drawn, 0).tolist()
    for loss in (
        losses.KantorovichRubinstein(priors),
        losses.HingeMargin(size),
        losses.HingeMargin(size, balanced=True),
        losses.ConvexHingeKR(priors, alpha=alpha, margin=size),
        losses.LogSumExpHKR(alpha=alpha, margin=size, temperature=size),
        losses.SoftHKR(alpha=alpha, margin=size, temperature=size),
        losses.OffsetCrossEntropy(size, offset=size),
    ):
        assert worst(loss, classes) == pytest.approx(loss.gradient_bound((classes,)), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES[:5], ids=repr)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_output_counts_as_two_opposed_scores(loss: losses.Loss, shape: tuple[int, ...]) -> None:
    loss = type(loss)(**{**vars(loss), **({"priors": (0.2, 0.8)} if hasattr(loss, "priors") else {})})
    output = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    for label in (0, 1):
        target = torch.full((9,), label)
        both = loss.per_sample(torch.stack((-output, output), 1), target)
        assert torch.allclose(loss.per_sample(output.reshape(9, *shape), target), both, rtol=1e-12)
    missed = torch.tensor([9.0, -9.0], dtype=torch.float64).reshape(2, *shape)
    found = float(norms(loss, missed, torch.tensor([0, 1])).max())
    assert found == pytest.approx(loss.gradient_bound(shape), rel=1e-12)


def test_mutants_caught_bounds_of_one_part_alone() -> None:
    lse, soft = LOSSES[5], LOSSES[6]
    assert worst(lse, 3) > 1.3 * 3.0, "the temperature, and only one of two parts"
    assert worst(soft, 3) > 1.3
    balanced = losses.HingeMargin(balanced=True)
    assert worst(balanced, 6) > 1.01 * losses.HingeMargin().gradient_bound((6,))
    convex = LOSSES[3]
    assert worst(convex, 3) > 1.01 * max(0.9 / math.sqrt(3), 0.1 * LOSSES[0].gradient_bound((3,)))


def test_formulas_by_hand() -> None:
    scores, label = torch.tensor([[0.2, -0.1, 0.4]], dtype=torch.float64), torch.tensor([0])
    distance = (-0.2 / 0.5 - 0.1 / 0.7 + 0.4 / 0.8) / 3
    hinge = (0.5 - 0.2 + (0.5 - 0.1) + (0.5 + 0.4)) / 3
    assert float(losses.KantorovichRubinstein(PRIORS).per_sample(scores, label)) == pytest.approx(distance)
    assert float(losses.HingeMargin(0.5).per_sample(scores, label)) == pytest.approx(hinge)
    balanced = (2 * (0.5 - 0.2) + (0.5 - 0.1) + (0.5 + 0.4)) / 3
    assert float(losses.HingeMargin(0.5, balanced=True).per_sample(scores, label)) == pytest.approx(balanced)
    convex = losses.ConvexHingeKR(PRIORS, alpha=0.9, margin=0.5)
    assert float(convex.per_sample(scores, label)) == pytest.approx(0.9 * hinge + 0.1 * distance)
    rate = math.log(2) / (0.5 * 1.0 / 2)
    most = math.log(math.exp(-2 * 0.1 * rate) + math.exp(2 * 0.4 * rate)) / rate
    expected = 0.9 * (0.5 - 0.4 + 0.5 + most) - 0.1 * (0.4 - most)
    loss = losses.LogSumExpHKR(alpha=0.9, margin=1.0, penalty=0.5, temperature=2.0)
    assert float(loss.per_sample(scores, label)) == pytest.approx(expected)
    weights = [math.exp(-0.1 / 0.5), math.exp(0.4 / 0.5)]
    first, second = (weight / sum(weights) for weight in weights)
    expected = 0.9 * (0.5 - 0.2 + first * 0.4 + second * 0.9) - 0.1 * (0.2 - (-0.1 * first + 0.4 * second))
    found = losses.SoftHKR(alpha=0.9, margin=1.0, temperature=0.5).per_sample(scores, label)
    assert float(found) == pytest.approx(expected)
    lifted = torch.tensor([[0.2 - 0.3, -0.1, 0.4]], dtype=torch.float64)
    expected = float(functional.cross_entropy(4.0 * lifted, label)) / 4.0
    assert float(losses.OffsetCrossEntropy(4.0, offset=0.3).per_sample(scores, label)) == pytest.approx(expected)


def test_the_smooth_maximum_of_two_classes_is_the_other_score_and_of_more_within_half_a_margin_share() -> None:
    loss = losses.LogSumExpHKR(alpha=0.0, margin=2.0, penalty=0.5)
    two = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    assert float(loss.per_sample(two, torch.tensor([0]))) == pytest.approx(-0.7)
    tied = torch.zeros(1, 11, dtype=torch.float64)
    # Ten equal scores: log(10)/t = penalty·margin/2.
    assert float(loss.per_sample(tied, torch.tensor([3]))) == pytest.approx(0.5 * 2.0 / 2)


@every_loss
def test_rows_do_not_meet_and_bad_labels_are_nan(loss: losses.Loss) -> None:
    outputs, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1, -1, 3])
    together = loss.per_sample(outputs, labels)
    assert together[4:].isnan().all()
    alone = torch.cat([loss.per_sample(outputs[i : i + 1], labels[i : i + 1]) for i in range(4)])
    # Float32, in another order.
    assert torch.allclose(together[:4], alone, rtol=1e-5, atol=1e-6)
    RowLosses()(loss, outputs.requires_grad_(), labels, None, bound=loss.gradient_bound((3,)))
    right = loss.correct(torch.eye(3), torch.tensor([0, 1, 1]))
    assert right is not None
    assert right.tolist() == [True, True, False]


def test_arguments_out_of_range_are_refused() -> None:
    for build in (
        lambda: losses.KantorovichRubinstein((0.5, 0.6)),
        lambda: losses.KantorovichRubinstein(torch.tensor([0.5, 0.5])),  # type: ignore[arg-type]
        lambda: losses.HingeMargin(0.0),
        lambda: losses.HingeMargin(balanced=1),  # type: ignore[arg-type]
        lambda: losses.ConvexHingeKR((0.5, 0.5), alpha=1.5),
        lambda: losses.LogSumExpHKR(penalty=0.0),
        lambda: losses.LogSumExpHKR(temperature=torch.tensor(1.0)),  # type: ignore[arg-type]
        lambda: losses.SoftHKR(temperature=-1.0),
        lambda: losses.OffsetCrossEntropy(offset=-0.1),
        lambda: losses.ConvexHingeKR((0.5, 0.5)).gradient_bound((3,)),
    ):
        with pytest.raises(ConfigurationError):
            build()
    with pytest.raises(InputError, match="two or more"):
        losses.SoftHKR().per_sample(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))


def wasserstein(first: Tensor, second: Tensor) -> float:
    """The distance of two clouds of equally weighted points, by its linear program."""
    costs = torch.cdist(first, second)
    rows, columns = costs.shape
    sums = torch.zeros(rows + columns, rows * columns, dtype=torch.float64)
    for row in range(rows):
        sums[row, row * columns : (row + 1) * columns] = 1.0
    for column in range(columns):
        sums[rows + column, column::columns] = 1.0
    shares = torch.cat((torch.full((rows,), 1.0 / rows), torch.full((columns,), 1.0 / columns)))
    return float(linprog(costs.flatten().numpy(), A_eq=sums.numpy(), b_eq=shares.numpy()).fun)


def test_a_network_trained_on_the_kr_term_alone_finds_the_distance_of_a_linear_program() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(24, 2, generator=generator, dtype=torch.float64)
    second = 0.5 * torch.randn(16, 2, generator=generator, dtype=torch.float64) + torch.tensor([1.0, -2.0]).double()
    distance = wasserstein(first, second)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(2, 32), layers.GroupSort(2), nn.Linear(32, 32), layers.GroupSort(2), nn.Linear(32, 1)
        ).double()
    model = DPLipModel(
        net,
        input_shape=(2,),
        input_norm=20.0,
        loss=losses.KantorovichRubinstein((24 / 40, 16 / 40)),
        constraint=constraints.Orthogonal(),
    )
    data = torch.cat((first, second)), torch.tensor([0] * 24 + [1] * 16)
    fit_without_privacy(model, data, epochs=80, batch_size=40, lr=4e-2, rng_seed=0, progress=False)
    with torch.no_grad():
        found = float(net(second).mean() - net(first).mean())
    # No 1-Lipschitz function passes the distance; a network of this size comes within some percent of it.
    assert 0.93 * distance <= found <= distance * (1.0 + 1e-9)


@pytest.mark.parametrize("rare", [1e-6, 3e-8, 1e-9])
def test_rare_classes_keep_the_bound_in_float32(rare: float) -> None:
    for priors in ((1.0 - rare, rare), (rare, rare, 1.0 - 2.0 * rare)):
        for loss in (losses.KantorovichRubinstein(priors), losses.ConvexHingeKR(priors, alpha=0.5)):
            labels = torch.arange(len(priors))
            found = norms(loss, torch.zeros(len(priors), len(priors)), labels)
            # Float32 sums of a few products.
            assert float(found.max()) == pytest.approx(loss.gradient_bound((len(priors),)), rel=1e-6)


def test_priors_without_an_inverse_are_refused() -> None:
    for priors in ((1e-30, 1.0), (1.0 - 1e-17, 1e-17), (1e-46, 0.4, 0.6)):
        for build in (losses.KantorovichRubinstein, losses.ConvexHingeKR):
            with pytest.raises(ConfigurationError, match="priors must lie"):
                build(priors)
