"""The ℓ1 bounds of losses, and the margin's loss of the maximum norm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipless_dp import ConfigurationError, InputError, losses
from tests.soundness.mutation import Mutant

PRIORS = (0.5, 0.05, 0.2, 0.25)
WEIGHTS = (0.1, 3.0, 1.0, 0.5)
CLASSES = 4

ATTAINED: dict[str, losses.Loss] = {
    "cross-entropy": losses.TauCrossEntropy(3.0),
    "cross-entropy, smoothed and weighted": losses.TauCrossEntropy(3.0, label_smoothing=0.2, class_weights=WEIGHTS),
    "offset": losses.OffsetCrossEntropy(2.0, offset=1.0),
    "hinge": losses.MulticlassHinge(0.5, class_weights=WEIGHTS),
    "hinge-KR": losses.HingeKR(PRIORS, margin=0.5, alpha=3.0),
    "KR": losses.KantorovichRubinstein(PRIORS),
    "hinge margin": losses.HingeMargin(0.5, balanced=True),
    "convex hinge-KR": losses.ConvexHingeKR(PRIORS),
    "log-sum-exp": losses.LogSumExpHKR(temperature=2.0),
    "soft": losses.SoftHKR(temperature=0.1),
    "absolute error": losses.MeanAbsoluteError(),
    "huber": losses.Huber(0.1),
    "margin": losses.LInfMargin(0.3),
    "margin alone": losses.LInfMargin(0.3, cross_entropy=0.0),
    "margin, mostly cross-entropy": losses.LInfMargin(20.0, cross_entropy=1.5, tau=4.0),
}


def gradients(loss: losses.Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    outputs = outputs.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss.per_sample(outputs, targets).sum(), outputs)
    return found


def tried(loss: losses.Loss) -> Tensor:
    """Gradients at outputs of many sizes, at corners of the simplex, and where all scores are nearly alike."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in (1e-9, 1e-3, 0.1, 1.0, 10.0, 1e3):
        outputs = size * torch.randn(400, CLASSES, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (400,), generator=generator)
        # Also with the true score just above all others, which are alike.
        ahead = torch.zeros_like(outputs).scatter(1, labels[:, None], 1e-9)
        pairs = torch.where(torch.arange(400)[:, None] % 2 == 0, ahead, outputs)
        lonely = -1e3 * torch.ones_like(outputs)
        lonely = lonely.scatter(1, labels[:, None], size).scatter(1, (labels[:, None] + 1) % CLASSES, size - 1e-9)
        targets = outputs.roll(1, 0) if isinstance(loss, (losses.MeanAbsoluteError, losses.Huber)) else labels
        found += [gradients(loss, values, targets) for values in (outputs, pairs, lonely, -lonely)]
    return torch.cat(found)


@pytest.mark.parametrize("name", ATTAINED)
def test_stated_l1_bounds_are_attained_and_never_passed(name: str) -> None:
    loss = ATTAINED[name]
    found = tried(loss).abs().sum(1)
    bound = loss.gradient_bound_l1((CLASSES,))
    assert 0.98 * bound <= float(found.max()) <= bound * (1.0 + 1e-9)


@pytest.mark.parametrize("name", [name for name in ATTAINED if name.startswith("margin")])
def test_the_margins_euclidean_bound_is_attained_and_never_passed(name: str) -> None:
    loss = ATTAINED[name]
    bound = loss.gradient_bound((CLASSES,))
    assert 0.99 * bound <= float(tried(loss).norm(dim=1).max()) <= bound * (1.0 + 1e-9)


def test_binary_cross_entropy_and_the_default_state_what_holds() -> None:
    loss = losses.BinaryCrossEntropy(3.0, label_smoothing=0.2, class_weights=(0.5, 2.0))
    outputs = 50.0 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = (outputs < 0).double()
    found = float(gradients(loss, outputs, targets).abs().sum(1).max())
    assert 0.98 * loss.gradient_bound_l1((3,)) <= found <= loss.gradient_bound_l1((3,)) * (1.0 + 1e-9)
    plain = losses.BoundedLoss(lambda output, target: output.sum(1), bound=2.0)
    assert plain.gradient_bound_l1((9,)) == 6.0


def test_values_of_the_margin_are_those_of_its_definition() -> None:
    scores = torch.tensor([[1.0, 0.9, 0.0], [1.0, 0.9, 0.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    found = losses.LInfMargin(0.25, cross_entropy=0.0).per_sample(scores, labels)
    # (0.9 - 1 + 0.5)/0.5; wrong: 1; a margin above 2r: 0.
    assert found.tolist() == pytest.approx([0.8, 1.0, 0.0])
    both = losses.LInfMargin(0.25, cross_entropy=2.0, tau=3.0)
    both.set_decay(0.5)
    entropy = torch.nn.functional.cross_entropy(3.0 * scores, labels, reduction="none") / 3.0
    assert torch.allclose(both.per_sample(scores, labels), found + entropy)


def test_decay_never_raises_a_gradient_above_the_bounds_of_the_start() -> None:
    loss = losses.LInfMargin(0.3, cross_entropy=5.0)
    most = loss.gradient_bound((CLASSES,)), loss.gradient_bound_l1((CLASSES,))
    for decay in (0.5, 0.1, 0.0):
        loss.set_decay(decay)
        found = tried(loss)
        assert float(found.norm(dim=1).max()) <= most[0]
        assert float(found.abs().sum(1).max()) <= most[1]
        assert (loss.gradient_bound((CLASSES,)), loss.gradient_bound_l1((CLASSES,))) == most


def test_mutants_caught_r_for_2r_in_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = losses.LInfMargin
    Mutant("r in place of 2r", owner, "per_sample", "/ (2.0 * self.radius)", "/ self.radius").apply(monkeypatch)
    loss = losses.LInfMargin(0.3, cross_entropy=0.0)
    assert float(tried(loss).abs().sum(1).max()) > 1.5 * loss.gradient_bound_l1((CLASSES,))


def test_what_is_no_margin_is_refused() -> None:
    for options in ({"radius": 0.0}, {"radius": 1.0, "cross_entropy": -1.0}, {"radius": 1.0, "tau": math.inf}):
        with pytest.raises(ConfigurationError):
            losses.LInfMargin(**options)
    with pytest.raises(ConfigurationError, match="decay"):
        losses.LInfMargin(0.1).set_decay(1.5)
    with pytest.raises(InputError, match="two or more"):
        losses.LInfMargin(0.1).per_sample(torch.zeros(2, 1), torch.zeros(2).long())
    found = losses.LInfMargin(0.1).per_sample(torch.zeros(2, 3), torch.tensor([0, 7]))
    assert found.isnan().tolist() == [False, True]
