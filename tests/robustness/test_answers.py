"""Digests follow what a network answers, whatever it is in Python that makes it answer so."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, LayerBounds, register_rule, report
from clipless_dp.model.functions import answers_of, answers_of_graph
from clipless_dp.robustness import Certificate, Curve, Smoothed, certificates, certify, hybrid, pareto
from tests.robustness.nets import dense, points, wrapped
from tests.soundness.mutation import Mutant
from tests.support import samples

SIGN = 1.0
INPUTS = points(6, 4)


class Act(nn.Module):
    """What it computes hangs on a class attribute, a helper and a global."""

    sign = 1.0

    def helper(self, values: Tensor) -> Tensor:
        return values * self.sign

    def forward(self, values: Tensor) -> Tensor:
        return self.helper(values) * SIGN


@register_rule(Act)
def _bounds(module: nn.Module, context) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=lambda: 1.0, gradients={})


class Factor:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def times(self, values: Tensor) -> Tensor:
        return values * self.factor


class Slotted:
    __slots__ = ("factor",)


class Holder(nn.Module):
    """A linear layer, and something beside it that no hash of code and settings tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.listed = [nn.Linear(4, 4)]
        object.__setattr__(self, "hidden", nn.Linear(4, 4))
        self.times = Factor(1.0).times
        self.slotted = Slotted()
        self.slotted.factor = 1.0

    def forward(self, values: Tensor) -> Tensor:
        values = self.hidden.to(values.dtype)(self.listed[0].to(values.dtype)(values))
        return self.layer(self.times(values) * self.slotted.factor)


def negated(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.neg_()


class Other(Act):
    def helper(self, values: Tensor) -> Tensor:
        return -values


Other.__qualname__, Other.__name__ = "Act", "Act"


def taken(net: nn.Module, name: str, value: object) -> None:
    setattr(net, name, value)


CHANGES: dict[str, Callable[[Holder], object]] = {
    "weights of a module in a list": lambda net: negated(net.listed[0]),
    "weights of a module that is not registered": lambda net: negated(net.hidden),
    "whose method it is": lambda net: taken(net, "times", Factor(-1.0).times),
    "an attribute in a slot": lambda net: taken(net.slotted, "factor", -1.0),
    "a hook": lambda net: net.layer.register_forward_hook(lambda module, inputs, found: -found),
    "forward of the instance": lambda net: taken(net.layer, "forward", lambda values: values[:, :3]),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("place", ["model", "front"])
def test_digests_of_modules_follow_what_they_answer(what: str, place: str) -> None:
    torch.manual_seed(0)
    net, head = Holder(), nn.Linear(3, 3)

    def digest() -> str:
        if place == "model":
            return certify(net, INPUTS, lipschitz=1.0).digest
        return certify(head, INPUTS, lipschitz=1.0, front=net, front_lipschitz=1.0).digest

    before = digest()
    assert digest() == before
    CHANGES[what](net)
    assert digest() != before


def changed_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Act, "sign", -1.0)


def changed_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Act, "helper", lambda self, values: -values)


def changed_global(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.robustness.test_answers.SIGN", -1.0)


READ = {"class attribute": changed_class, "helper": changed_helper, "global": changed_global}


@pytest.mark.parametrize("what", READ)
def test_a_layer_with_a_rule_that_answers_otherwise_is_of_another_digest_and_a_finding(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = wrapped(nn.Sequential(nn.Linear(6, 6), Act(), nn.Linear(6, 3)), (6,))
    data = samples(20, 3)
    found = Curve.of(certify(model, data), None)
    smoothed = Smoothed(model, 0.3)
    drawn = smoothed.certify(data[0][:1], 5, 20).digest
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.1, dataset_size=60)
    described = found.described("public samples")
    assert not any("another function" in one for one in report(optimizer, delta=1e-5, robustness=described).findings)
    READ[what](monkeypatch)
    assert any("another function" in one for one in report(optimizer, delta=1e-5, robustness=described).findings)
    assert certify(model, data).digest != found.certificate.digest
    assert smoothed.certify(data[0][:1], 5, 20).digest != drawn


def test_a_subclass_of_the_same_name_is_another_function() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    nets = [nn.Sequential(layer, Act()), nn.Sequential(layer, Other())]
    found = [certify(net, INPUTS, lipschitz=1.0) for net in nets]
    assert found[0].function == found[1].function
    assert found[0].digest != found[1].digest


def test_a_certificate_of_a_model_and_a_statement_about_it_tell_the_same_answers() -> None:
    torch.manual_seed(0)
    for model in (wrapped(dense(4, 8), (4,)), wrapped(dense(4, 8, outputs=1), (4,), input_norm=0.5)):
        assert certify(model, INPUTS).answers == answers_of_graph(model.graph, (4,), model.input_norm)


def test_answers_are_the_same_in_another_order_of_summation_and_differ_by_a_thousandth() -> None:
    torch.manual_seed(0)
    weight, order = torch.randn(5, 400, dtype=torch.float64), torch.randperm(400)
    device = torch.device("cpu")

    def told(factor: float) -> str:
        return answers_of(lambda inputs: factor * (inputs @ weight.T), (400,), device)

    assert answers_of(lambda inputs: inputs[:, order] @ weight[:, order].T, (400,), device) == told(1.0)
    assert len({told(factor) for factor in (1.0, 1.001, 0.999, 2.0, -1.0)}) == 5
    # Whole numbers and powers of two, of which rounding might fall to either side.
    for value in (0.0, 1.0, 0.5, 3.0, 2.0**-9):
        near = [
            answers_of(lambda inputs, to=to: torch.full((len(inputs), 2), to), (3,), device)
            for to in (value, value * (1.0 + 2.0**-40), value * (1.0 - 2.0**-40))
        ]
        assert len(set(near)) == 1


def test_what_fails_on_fixed_inputs_is_certified_all_the_same() -> None:
    class Pixels(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            assert bool((values >= 0.0).all())
            return super().forward(values)

    found = certify(Pixels(4, 3), INPUTS.abs(), lipschitz=1.0)
    assert found.answers == "none, AssertionError"
    assert bool((found.radii > 0.0).all())
    behind = certify(nn.Linear(4, 3), INPUTS.abs(), lipschitz=1.0, front=Pixels(4, 4), front_lipschitz=1.0)
    assert bool((behind.radii > 0.0).all())


def test_digests_and_hashes_of_samples_of_former_versions_are_read() -> None:
    found = certify(nn.Linear(4, 3), (INPUTS, torch.zeros(6, dtype=torch.long)), lipschitz=1.0)
    assert found.samples is not None
    former = replace(found, answers=None, samples=found.samples.partition("-")[0])
    assert former.digest == Certificate(**{**vars(former), "answers": None}).digest != found.digest
    state = vars(former).copy()
    del state["answers"]
    old = Certificate.__new__(Certificate)
    old.__dict__.update(state)
    assert pickle.loads(pickle.dumps(old)).digest == former.digest
    assert len(pareto({"former": former, "present": found}, 0.1).points) == 2
    assert report_is_quiet(former)


def report_is_quiet(former: Certificate) -> bool:
    model = wrapped(dense(6, 8), (6,))
    data = samples(20, 3)
    described = Curve.of(certify(model, data), None).described("public samples")
    del described["answers"]
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.1, dataset_size=60)
    return not any("ertificate" in one for one in report(optimizer, delta=1e-5, robustness=described).findings)


def test_samples_of_another_shape_are_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashes() -> set[str]:
        return {certificates.digest_of_samples([INPUTS.reshape(6, *shape)]) for shape in ((4,), (2, 2), (1, 4))}

    assert len(hashes()) == 3
    Mutant("no shape", certificates, "digest_of_samples", "-{shape}", "").apply(monkeypatch)
    assert len(hashes()) == 1


def test_other_columns_or_chances_of_replacement_are_another_digest() -> None:
    rows, net = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.3], [0.0, 1.0, 1.0, 0.0, 0.2]]), nn.Linear(5, 2)

    def digest(beta: float, field: list[int]) -> str:
        return hybrid.certify(net, rows, 0.3, beta=beta, fields=[field], changed=1, n0=5, n=20).digest

    assert digest(0.3, [0, 1]) == digest(0.3, [0, 1])
    assert len({digest(0.3, [0, 1]), digest(0.3, [2, 3]), digest(0.30000001, [0, 1])}) == 3
