"""Each loss keeps the bound that it states, and says which samples it cannot judge."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from clipless_dp import ConfigurationError, InputError, losses
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model.rowwise import is_proved

CLASSES = 5


def labels(generator: torch.Generator) -> Tensor:
    return torch.randint(0, CLASSES, (8,), generator=generator)


def real_targets(generator: torch.Generator) -> Tensor:
    return 3.0 * torch.randn(8, CLASSES, generator=generator, dtype=torch.float64)


def fractions(generator: torch.Generator) -> Tensor:
    return torch.rand(8, CLASSES, generator=generator, dtype=torch.float64).round(decimals=1)


WEIGHTS = (0.1, 3.0, 1.0, 0.5, 2.0)
PRIORS = (0.5, 0.05, 0.2, 0.1, 0.15)
Targets = Callable[[torch.Generator], Tensor]
LOSSES: tuple[tuple[losses.Loss, Targets], ...] = (
    (losses.TauCrossEntropy(), labels),
    (losses.TauCrossEntropy(0.01), labels),
    (losses.TauCrossEntropy(256.0), labels),
    (losses.BinaryCrossEntropy(), fractions),
    (losses.BinaryCrossEntropy(50.0), fractions),
    (losses.MulticlassHinge(), labels),
    (losses.MulticlassHinge(1e-3), labels),
    (losses.TauCrossEntropy(3.0, label_smoothing=0.3), labels),
    (losses.TauCrossEntropy(3.0, label_smoothing=0.1, class_weights=WEIGHTS), labels),
    (losses.BinaryCrossEntropy(2.0, label_smoothing=0.2), fractions),
    (losses.BinaryCrossEntropy(2.0, label_smoothing=0.2, class_weights=(0.2, 5.0)), fractions),
    (losses.MulticlassHinge(0.5, class_weights=WEIGHTS), labels),
    (losses.HingeKR(PRIORS), labels),
    (losses.HingeKR(PRIORS, margin=0.1, alpha=20.0), labels),
    (losses.CosineSimilarity(), labels),
    (losses.CosineSimilarity(0.1), real_targets),
    (losses.MeanAbsoluteError(), real_targets),
    (losses.Huber(), real_targets),
    (losses.Huber(0.01), real_targets),
)


def named(value: object) -> str:
    return str(getattr(value, "__name__", repr(value)[:45]))


every_loss = pytest.mark.parametrize(("loss", "targets"), LOSSES, ids=named)


def gradient_norms(loss: losses.Loss, output: Tensor, target: Tensor) -> Tensor:
    output = output.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss.per_sample(output, target).sum(), output)
    return torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1)


@every_loss
def test_the_gradient_stays_below_the_stated_bound_for_outputs_of_any_size(loss: losses.Loss, targets: Targets) -> None:
    generator = torch.Generator().manual_seed(0)
    bound = loss.gradient_bound((CLASSES,))
    for size in (0.0, 1e-8, 1e-3, 0.1, 1.0, 30.0, 1e4, 1e8):
        output = size * torch.randn(8, CLASSES, generator=generator, dtype=torch.float64)
        # Sums of 5 float64 terms of size one.
        assert float(gradient_norms(loss, output, targets(generator)).max()) <= bound * (1.0 + 1e-12)


ATTAINED: tuple[tuple[losses.Loss, Tensor, Tensor], ...] = (
    (losses.TauCrossEntropy(8.0), torch.tensor([[9.0, 0.0, 0.0, 0.0, 0.0]]), torch.tensor([1])),
    (losses.BinaryCrossEntropy(8.0), torch.full((1, CLASSES), 9.0), torch.zeros(1, CLASSES)),
    (losses.MulticlassHinge(), torch.zeros(1, CLASSES), torch.tensor([2])),
    (losses.CosineSimilarity(0.5), torch.zeros(1, CLASSES), torch.tensor([2])),
    (losses.MeanAbsoluteError(), torch.ones(1, CLASSES), torch.zeros(1, CLASSES)),
    (losses.Huber(2.0), torch.full((1, CLASSES), 9.0), torch.zeros(1, CLASSES)),
)


@pytest.mark.parametrize(("loss", "output", "target"), ATTAINED, ids=named)
def test_the_stated_bound_is_attained(loss: losses.Loss, output: Tensor, target: Tensor) -> None:
    found = float(gradient_norms(loss, output.double(), target))
    # sigmoid(72) and softmax(72) differ from one by e^-72.
    assert found == pytest.approx(loss.gradient_bound((CLASSES,)), rel=1e-6)


def worst(loss: losses.Loss, classes: int, target: Callable[[int], Tensor]) -> float:
    """The largest gradient norm where those of convex and piecewise linear losses are largest: at corners, and at 0."""
    corners = torch.cat((torch.eye(classes), -torch.eye(classes), torch.ones(1, classes), -torch.ones(1, classes)))
    outputs = torch.cat((1e6 * corners, torch.zeros(1, classes))).double()
    return max(
        float(gradient_norms(loss, outputs, target(label).expand(len(outputs))).max()) for label in range(classes)
    )


@given(st.integers(0, 2**16), st.integers(2, 7), st.floats(0.0, 0.9), st.floats(1e-2, 1e2))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_bounds_of_weighted_smoothed_and_hinge_kr_losses_are_attained_and_never_passed(
    seed: int, classes: int, smoothing: float, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.softmax(2.0 * torch.randn(classes, generator=generator, dtype=torch.float64), 0).tolist()
    weights = [1.0 / share for share in shares]
    for loss in (
        losses.TauCrossEntropy(0.5, label_smoothing=smoothing, class_weights=weights),
        losses.MulticlassHinge(class_weights=weights),
        losses.HingeKR(shares, alpha=alpha),
    ):
        found = worst(loss, classes, lambda label: torch.tensor([label]))
        # A dozen float64 roundings in either; e^-500000 is zero.
        assert found == pytest.approx(loss.gradient_bound((classes,)), rel=1e-12)


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("weights", [(0.2, 5.0), (5.0, 0.2), None])
def test_the_bound_of_a_weighted_smoothed_binary_loss_is_attained(
    outputs: int, weights: tuple[float, float] | None
) -> None:
    loss = losses.BinaryCrossEntropy(3.0, label_smoothing=0.3, class_weights=weights)
    scores = torch.tensor([[1e6], [-1e6]], dtype=torch.float64).expand(2, outputs)
    truth = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, outputs)
    # A few float64 roundings.
    assert float(gradient_norms(loss, scores, truth).max()) == pytest.approx(loss.gradient_bound((outputs,)), rel=1e-12)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_hinge_kr_of_one_output_attains_its_bound_and_is_that_of_two(shape: tuple[int, ...]) -> None:
    loss = losses.HingeKR((0.1, 0.9), margin=0.5, alpha=2.0)
    output = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    for label in (0, 1):
        target = torch.full((9,), label)
        both = loss.per_sample(torch.stack((-output, output), 1), target)
        assert torch.allclose(loss.per_sample(output.reshape(9, *shape), target), both, rtol=1e-12)
    worst_of_one = gradient_norms(loss, torch.zeros(1, *shape, dtype=torch.float64), torch.tensor([0]))
    # A few float64 roundings.
    assert float(worst_of_one) == pytest.approx(loss.gradient_bound(shape), rel=1e-12)
    assert loss.gradient_bound(shape) == pytest.approx(1 / 0.1 + 2.0, rel=1e-12)


def test_mutants_caught_bounds_without_weights_smoothing_or_signs() -> None:
    weights = (0.1, 3.0, 1.0)
    weighted = losses.TauCrossEntropy(class_weights=weights)
    assert worst(weighted, 3, lambda label: torch.tensor([label])) > 1.01 * math.sqrt(2.0)
    kr = losses.HingeKR((0.5, 0.3, 0.2))
    balanced = math.sqrt(3.0**2 + 2 * 1.5**2) / 3 + 1 / math.sqrt(3)
    assert worst(kr, 3, lambda label: torch.tensor([label])) > 1.01 * balanced
    opposed = math.sqrt((1 / 0.2 - 1.0) ** 2 + (2.0 - 1.0) ** 2 + (1 / 0.7 - 1.0) ** 2) / 3
    assert worst(kr, 3, lambda label: torch.tensor([label])) > 1.01 * opposed
    parts = math.sqrt((1 / 0.2) ** 2 + 2.0**2 + (1 / 0.7) ** 2) / 3 + 1 / math.sqrt(3)
    assert kr.gradient_bound((3,)) <= parts, "the sum of the parts' bounds is a bound too"


def test_the_kr_term_is_the_distance_of_the_classes_means() -> None:
    generator = torch.Generator().manual_seed(3)
    output = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    # A margin that all samples keep, so that the hinge is zero, and the shares of these very samples.
    loss = losses.HingeKR((0.5, 0.3, 0.2), margin=1e-30)
    offset = torch.where(functional.one_hot(target, 3).bool(), 10.0, -10.0)
    found = loss.per_sample(output + offset, target).mean()
    scores = output + offset
    gaps = [scores[target == c, c].mean() - scores[target != c, c].mean() for c in range(3)]
    # Means of ten float64 numbers.
    assert float(found) == pytest.approx(-float(sum(gaps)) / 3, rel=1e-12)


@pytest.mark.parametrize(
    "taken",
    [
        torch.tensor([0.5, 0.5]),
        [torch.tensor(0.5), torch.tensor(0.5)],
        lambda target: target.double().mean(),
        torch.tensor([0.5, 0.5]).numpy(),
        "batch",
        None,
        0.5,
    ],
    ids=["tensor", "tensors", "function", "array", "name", "none", "number"],
)
def test_priors_and_weights_taken_from_a_batch_are_refused(taken: object) -> None:
    with pytest.raises(ConfigurationError, match="public numbers"):
        losses.HingeKR(taken)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="public numbers"):
        losses.balanced_weights(taken)  # type: ignore[arg-type]
    if taken is not None:
        for loss in (losses.TauCrossEntropy, losses.MulticlassHinge, losses.BinaryCrossEntropy):
            with pytest.raises(ConfigurationError, match="public numbers"):
                loss(class_weights=taken)  # type: ignore[arg-type]


def test_priors_weights_and_smoothing_out_of_range_are_refused() -> None:
    for priors in ((0.5, 0.4), (1.0, 0.0), (1.5, -0.5), (1.0,), (math.nan, 1.0)):
        with pytest.raises(ConfigurationError):
            losses.HingeKR(priors)
    for smoothing in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigurationError, match="label_smoothing"):
            losses.TauCrossEntropy(label_smoothing=smoothing)
    with pytest.raises(ConfigurationError, match="power"):
        losses.balanced_weights((0.5, 0.5), power=2.0)
    with pytest.raises(ConfigurationError, match="3 class_weights were given for 2 classes"):
        losses.BinaryCrossEntropy(class_weights=(1.0, 1.0, 1.0))
    for loss in (losses.TauCrossEntropy(class_weights=(1.0, 2.0)), losses.HingeKR((0.5, 0.5))):
        with pytest.raises(ConfigurationError, match=r"2 \w+ were given for 3 classes"):
            loss.gradient_bound((3,))


def test_balanced_weights_have_mean_one_and_undo_the_imbalance() -> None:
    priors = (0.9, 0.09, 0.01)
    for power in (0.0, 0.5, 1.0):
        weights = losses.balanced_weights(priors, power)
        # A few float64 roundings.
        assert sum(p * w for p, w in zip(priors, weights, strict=True)) == pytest.approx(1.0, rel=1e-12)
    assert losses.balanced_weights(priors) == pytest.approx([1 / (3 * prior) for prior in priors], rel=1e-12)
    assert losses.balanced_weights(priors, 0.0) == pytest.approx([1.0] * 3, rel=1e-12)


def test_stated_bounds_are_those_of_the_documentation() -> None:
    assert losses.TauCrossEntropy(3.0).gradient_bound((4,)) == math.sqrt(2.0)
    assert losses.BinaryCrossEntropy().gradient_bound(()) == 1.0
    assert losses.BinaryCrossEntropy().gradient_bound((4,)) == 0.5
    assert losses.MulticlassHinge().gradient_bound((4,)) == math.sqrt(0.75)
    assert losses.CosineSimilarity(0.25).gradient_bound((4,)) == 4.0
    assert losses.MeanAbsoluteError().gradient_bound((2, 2)) == 0.5
    assert losses.Huber(3.0).gradient_bound((9,)) == 1.0
    assert losses.BoundedLoss(lambda output, target: output.sum(1), bound=7.0).gradient_bound((3,)) == 7.0


def test_values_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(8, CLASSES, generator=generator, dtype=torch.float64)
    target, real = labels(generator), real_targets(generator)
    pairs = (
        (
            losses.TauCrossEntropy(4.0).per_sample(output, target),
            functional.cross_entropy(4.0 * output, target, reduction="none") / 4.0,
        ),
        (
            losses.TauCrossEntropy(4.0, label_smoothing=0.2, class_weights=WEIGHTS).per_sample(output, target),
            functional.cross_entropy(4.0 * output, target, reduction="none", label_smoothing=0.2)
            * torch.tensor(WEIGHTS, dtype=torch.float64)[target]
            / 4.0,
        ),
        (
            losses.BinaryCrossEntropy(class_weights=(0.5, 3.0)).per_sample(output, real.sigmoid()),
            0.5
            * functional.binary_cross_entropy_with_logits(
                output, real.sigmoid(), reduction="none", pos_weight=torch.tensor(6.0, dtype=torch.float64)
            ).mean(1),
        ),
        (
            losses.MulticlassHinge(2.0).per_sample(output, target),
            functional.multi_margin_loss(output, target, margin=2.0, reduction="none"),
        ),
        (
            losses.MeanAbsoluteError().per_sample(output, real),
            functional.l1_loss(output, real, reduction="none").mean(1),
        ),
        (
            losses.Huber(0.5).per_sample(output, real),
            functional.huber_loss(output, real, delta=0.5, reduction="none").mean(1),
        ),
        (
            losses.CosineSimilarity(1e-6).per_sample(output, real),
            -functional.cosine_similarity(output, real),
        ),
        (
            losses.BinaryCrossEntropy().per_sample(output, real.sigmoid()),
            functional.binary_cross_entropy_with_logits(output, real.sigmoid(), reduction="none").mean(1),
        ),
    )
    for ours, theirs in pairs:
        # The same float64 formula in another order of a few operations.
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_cosine_similarity_with_labels_is_that_with_unit_vectors() -> None:
    output = torch.randn(3, CLASSES, dtype=torch.float64)
    loss = losses.CosineSimilarity(0.5)
    index = torch.tensor([0, 4, 2])
    directions = 7.0 * functional.one_hot(index, CLASSES).double()
    assert torch.allclose(loss.per_sample(output, index), loss.per_sample(output, directions), rtol=1e-12)


@every_loss
def test_a_samples_loss_depends_on_that_sample_alone(loss: losses.Loss, targets: Targets) -> None:
    generator = torch.Generator().manual_seed(2)
    output = torch.randn(8, CLASSES, generator=generator, dtype=torch.float64)
    target = targets(generator)
    whole = loss.per_sample(output, target)
    assert whole.shape == (8,)
    for index in range(8):
        alone = loss.per_sample(output[index : index + 1], target[index : index + 1])
        # The same formula; vectorised float64 loops may round differently.
        assert torch.allclose(alone, whole[index : index + 1], rtol=1e-12, atol=1e-14)


@every_loss
def test_no_samples_have_no_losses(loss: losses.Loss, targets: Targets) -> None:
    output = torch.randn(0, CLASSES, dtype=torch.float64)
    assert loss.per_sample(output, targets(torch.Generator())[:0]).shape == (0,)


def test_the_loss_of_attacks_has_each_samples_own_target_as_its_cotangent_and_is_not_looked_at() -> None:
    loss = InnerProduct(2.0)
    output, target = torch.randn(3, 2, 4, requires_grad=True), 1e3 * torch.randn(3, 2, 4)
    found = loss.per_sample(output, target)
    assert torch.equal(torch.autograd.grad(found.sum(), output)[0], target)
    assert torch.allclose(found, torch.stack([(one * other).sum() for one, other in zip(output, target, strict=True)]))
    assert loss.gradient_bound((2, 4)) == 2.0
    assert is_proved(loss)


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (losses.TauCrossEntropy(), torch.tensor([-1, 0, CLASSES])),
        (losses.MulticlassHinge(), torch.tensor([-100, 1, 2**40])),
        (losses.HingeKR(PRIORS), torch.tensor([-1, 2, CLASSES])),
        (losses.TauCrossEntropy(class_weights=WEIGHTS), torch.tensor([-1, 2, CLASSES])),
        (losses.CosineSimilarity(), torch.tensor([-1, 2, CLASSES])),
        (losses.CosineSimilarity(), torch.tensor([[0.0] * CLASSES, [1.0] * CLASSES, [math.nan] * CLASSES])),
        (losses.BinaryCrossEntropy(), torch.tensor([[1.5] * CLASSES, [1.0] * CLASSES, [-0.1] * CLASSES])),
        (losses.MeanAbsoluteError(), torch.tensor([[math.nan] * CLASSES, [1.0] * CLASSES, [math.inf] * CLASSES])),
    ],
    ids=named,
)
def test_targets_out_of_range_make_their_own_loss_not_finite_and_no_other(loss: losses.Loss, target: Tensor) -> None:
    found = loss.per_sample(torch.randn(3, CLASSES), target)
    assert found.isfinite().tolist() == [False, True, False]


@pytest.mark.parametrize("loss", [losses.TauCrossEntropy(), losses.MulticlassHinge(), losses.HingeKR(PRIORS)])
def test_labels_of_another_shape_or_kind_are_refused(loss: losses.Loss) -> None:
    output = torch.zeros(3, CLASSES)
    for target in (torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(InputError, match="integer labels"):
            loss.per_sample(output, target)
    with pytest.raises(InputError, match="class scores"):
        loss.per_sample(torch.zeros(3, CLASSES, 2), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "loss", [losses.BinaryCrossEntropy(), losses.MeanAbsoluteError(), losses.Huber(), InnerProduct(1.0)]
)
def test_real_targets_of_another_size_are_refused(loss: losses.Loss) -> None:
    for target in (torch.zeros(3, CLASSES + 1), torch.zeros(4, CLASSES), torch.zeros(3)):
        with pytest.raises(InputError, match="one size"):
            loss.per_sample(torch.zeros(3, CLASSES), target)


def test_a_loss_function_that_reduces_the_batch_is_refused() -> None:
    loss = losses.BoundedLoss(lambda output, target: (output - target).abs().mean(), bound=1.0)
    with pytest.raises(InputError, match="reduction='none'"):
        loss.per_sample(torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_margins_and_bounds_out_of_range_are_refused(value: float) -> None:
    for build in (
        losses.TauCrossEntropy,
        losses.BinaryCrossEntropy,
        losses.MulticlassHinge,
        losses.CosineSimilarity,
        losses.Huber,
        lambda bound: losses.BoundedLoss(lambda output, target: output.sum(1), bound=bound),
    ):
        with pytest.raises(ConfigurationError, match="finite and positive"):
            build(value)


@given(st.integers(0, 2**16), st.floats(1e-3, 1e3), st.floats(1e-3, 100.0))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_no_random_output_breaks_the_bound_of_cosine_similarity_near_its_floor(
    seed: int, size: float, floor: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    output = size * torch.randn(4, CLASSES, generator=generator, dtype=torch.float64)
    loss = losses.CosineSimilarity(floor)
    target = torch.randn(4, CLASSES, generator=generator, dtype=torch.float64)
    # Quotients of float64 sums of 5 terms.
    assert float(gradient_norms(loss, output, target).max()) <= loss.gradient_bound((CLASSES,)) * (1.0 + 1e-12)


SCORES = [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]]
RIGHT = [True, False, True, False]
"""For the labels 0, 0, 1, and 3, which is none of the classes."""


@pytest.mark.parametrize(
    ("loss", "output", "target", "right"),
    [
        (losses.TauCrossEntropy(2.0), SCORES, [0, 0, 1, 3], RIGHT),
        (losses.MulticlassHinge(), SCORES, [0, 0, 1, 3], RIGHT),
        (losses.HingeKR((0.2, 0.3, 0.5)), SCORES, [0, 0, 1, 3], RIGHT),
        (losses.CosineSimilarity(), SCORES, [0, 0, 1, 3], RIGHT),
        (losses.HingeKR((0.2, 0.8)), [[1.0], [-1.0], [1.0]], [1, 1, 0], [True, False, False]),
        (losses.HingeKR((0.2, 0.8)), [-1.0, 1.0], [0, 1], [True, True]),
        (losses.BinaryCrossEntropy(), [1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, 0.9], [True, True, False, False]),
        (losses.BinaryCrossEntropy(), [[1.0], [-1.0]], [1, 1], [True, False]),
        (losses.BinaryCrossEntropy(), [[1.0, -1.0]], [[1.0, 0.0]], None),
        (losses.CosineSimilarity(), SCORES, SCORES, None),
        (losses.MeanAbsoluteError(), SCORES, SCORES, None),
        (losses.Huber(), SCORES, SCORES, None),
        (losses.BoundedLoss(lambda output, target: output.sum(1), bound=1.0), SCORES, [0, 0, 1, 1], None),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, losses.Loss) else "",
)
def test_each_loss_says_which_predictions_are_right_or_that_it_does_not_know(
    loss: losses.Loss, output: list[object], target: list[object], right: list[bool] | None
) -> None:
    found = loss.correct(torch.tensor(output), torch.tensor(target))
    assert (None if found is None else found.tolist()) == right


@pytest.mark.parametrize("returned", [None, 1.0, (1.0,), "no tensor"])
def test_loss_functions_that_return_no_tensor_are_told_what_to_return(returned: object) -> None:
    loss = losses.BoundedLoss(lambda output, target: returned, bound=1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(InputError, match=r"tensor with one value a sample, shape \(3,\)"):
        loss.per_sample(torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("entries", [1, 3])
def test_quantisation_keeps_its_bound_and_attains_it(weight: float, entries: int) -> None:
    loss = losses.Quantization(4, 0.5, weight)
    outputs = 4 * entries + (4 if weight else 0)
    bound = loss.gradient_bound((outputs,))
    assert bound == pytest.approx(math.sqrt(0.25 / entries + 2.0 * weight**2))
    generator = torch.Generator().manual_seed(0)
    output = 30.0 * torch.randn(500, outputs, generator=generator, dtype=torch.float64)
    output.requires_grad_()
    target = 30.0 * torch.randn(500, entries, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss.per_sample(output, target).sum(), output)
    norms = gradient.norm(dim=1)
    assert float(norms.max()) <= bound * (1.0 + 1e-12)
    assert float(norms.max()) >= 0.99 * bound
    # One point only.
    moved = gradient[:, : 4 * entries].unflatten(1, (4, entries)).abs().amax(2) > 0.0
    assert bool((moved.sum(1) == 1).all())


def test_points_at_one_place_are_one_winner_and_not_many() -> None:
    """A mutant's minimum that shares the gradient, or gives each all of it, is seen here."""
    output = torch.ones(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.Quantization(4, 0.5).per_sample(output, torch.zeros(1)).sum(), output)
    assert sorted(gradient.flatten().tolist()) == [0.0, 0.0, 0.0, 0.5]


def test_quantisation_finds_both_modes_and_how_likely_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(400, generator=generator) < 0.7).double()
    target = (2.0 * first - 1.0) + 0.05 * torch.randn(400, generator=generator, dtype=torch.float64)
    output = torch.tensor([0.1, -0.1, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = losses.Quantization(2, 1.0, 0.5)
    optimizer = torch.optim.Adam([output], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss.per_sample(output.expand(400, 4), target).mean().backward()
        optimizer.step()
    assert output[:2].tolist() == pytest.approx([1.0, -1.0], abs=0.05)
    assert float(output[2:].softmax(0)[0].detach()) == pytest.approx(float(first.mean()), abs=0.03)


def test_quantisation_refuses_other_sizes() -> None:
    for wrong in ((0,), (2, 0.0), (2, 1.0, -1.0), (2, 1.0, math.nan)):
        with pytest.raises(ConfigurationError):
            losses.Quantization(*wrong)
    for outputs, weight in ((5, 0.0), (2, 1.0)):
        with pytest.raises(ConfigurationError, match="points"):
            losses.Quantization(2, 1.0, weight).gradient_bound((outputs,))
    with pytest.raises(InputError, match="targets"):
        losses.Quantization(2).per_sample(torch.zeros(3, 4), torch.zeros(3))
