"""A certificate is of one network: what changes a model later, or between two calls, cannot come into half of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp.robustness import Certificate, Smoothed, certify, draw_together, hybrid, several
from tests.robustness.nets import wrapped

AT = torch.tensor([[1.0, 0.0]])
OPPOSED = torch.tensor([[0.5, 0.0], [-0.5, 0.0]])


def opposed(net: nn.Module | None = None) -> nn.Module:
    net = nn.Linear(2, 2, bias=False) if net is None else net
    with torch.no_grad():
        net.weight.copy_(OPPOSED)
    return net


class Doubled(nn.Module):
    """Computes in place, on what it is given."""

    def forward(self, values: Tensor) -> Tensor:
        return values.mul_(2.0)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "answers the other class": lambda net: net.load_state_dict({"weight": -OPPOSED}),
    "is a hundred times flatter": lambda net: net.load_state_dict({"weight": OPPOSED / 100.0}),
}

CALLS: dict[str, Callable[[Smoothed, Smoothed], Certificate]] = {
    "cohen": lambda one, _: one.certify(AT, 20, 1000),
    "predict": lambda one, _: Certificate(torch.zeros(1), one.predict(AT)),
    "several": lambda one, other: several.certify([one, other], AT, 20, 500),
    "together": lambda one, _: draw_together([one], AT, 20, 1000)[0].certify(1e-3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("is_wrapped", [True, False], ids=["wrapped", "a module"])
def test_a_classifier_that_was_kept_certifies_the_model_as_it_is_at_the_call(
    change: str, call: str, is_wrapped: bool
) -> None:
    net = opposed()
    model = wrapped(net, (2,), input_norm=100.0) if is_wrapped else net
    kept = Smoothed(model, 0.5)
    CHANGES[change](net)
    found = CALLS[call](kept, Smoothed(model, 0.6))
    fresh = CALLS[call](Smoothed(model, 0.5), Smoothed(model, 0.6))
    assert found.predictions.tolist() == [int(model(AT).argmax(1))]
    assert torch.equal(found.radii, fresh.radii)
    assert found.digest == fresh.digest


def test_a_kept_classifier_never_certifies_more_than_the_distance_by_the_constant_of_other_weights() -> None:
    net = opposed()
    kept = Smoothed(wrapped(net, (2,), input_norm=100.0), 0.5, map="margin")
    CHANGES["is a hundred times flatter"](net)
    # The boundary is where the first entry changes its sign.
    assert 0.5 < float(kept.certify(AT, method="lipschitz", n=20_000).radii) <= 1.0


def test_a_kept_front_and_a_changed_setting_are_those_of_the_call() -> None:
    front, act = nn.Linear(2, 2, bias=False), nn.LeakyReLU(0.1)
    head = opposed()
    kept = Smoothed(nn.Sequential(act, head), 0.5, front=front)
    with torch.no_grad():
        front.weight.copy_(-torch.eye(2))
    act.negative_slope = -1.0
    fresh = Smoothed(kept.model, 0.5, front=front)
    found, again = kept.certify(AT, 20, 1000), fresh.certify(AT, 20, 1000)
    assert found.predictions.tolist() == [int(head(act(front(AT))).argmax(1))]
    assert torch.equal(found.lower, again.lower)
    assert found.digest == again.digest


def test_draws_keep_the_digest_of_what_was_drawn_from() -> None:
    net = opposed()
    smoothed = Smoothed(net, 0.5)
    before, drawn = smoothed.certify(AT, 20, 500), smoothed.draw(AT, 20, 500)
    CHANGES["answers the other class"](net)
    later = drawn.certify(1e-3)
    assert later.digest == before.digest
    assert torch.equal(later.radii, before.radii)
    assert smoothed.certify(AT, 20, 500).digest != before.digest


def test_code_that_computes_in_place_does_not_change_the_samples_that_are_certified() -> None:
    inputs = torch.tensor([[0.5, 0.0], [0.25, 0.0]], dtype=torch.float64)
    given = inputs.clone()
    model = nn.Sequential(Doubled(), opposed())
    found = certify(model, given, lipschitz=2.0 * 2.0**-0.5)
    assert torch.equal(given, inputs)
    # The difference of scores is twice the first entry.
    assert found.radii.tolist() == pytest.approx([0.5, 0.25], rel=1e-9)
    assert found.samples == certify(opposed(), inputs, lipschitz=1.0).samples


def test_rows_with_categories_are_certified_by_the_network_of_the_call() -> None:
    rows, net = torch.tensor([[1.0, 0.0, 3.0]]), nn.Linear(3, 2)
    found = [hybrid.certify(net, rows, 0.3, beta=0.1, fields=[[0, 1]], changed=0, n0=20, n=200)]
    with torch.no_grad():
        net.weight.neg_()
        net.bias.neg_()
    found.append(hybrid.certify(net, rows, 0.3, beta=0.1, fields=[[0, 1]], changed=0, n0=20, n=200))
    assert found[0].predictions.tolist() != found[1].predictions.tolist()
    assert found[0].digest != found[1].digest
