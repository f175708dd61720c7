"""What is given wrongly is refused by a typed error that says so; what a module keeps of a pass is no hindrance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError, report
from clipless_dp.cli import main
from clipless_dp.errors import CliplessError
from clipless_dp.robustness import (
    Curve,
    Smoothed,
    attack,
    attacks,
    certify,
    curve,
    draw_together,
    hybrid,
    maps,
    pareto,
    plain_network,
    quality,
    read_radii,
    saliency,
    several,
)
from tests.robustness.nets import dense, points, wrapped
from tests.robustness.test_statement import NETWORK, checkpoint, trained  # noqa: F401
from tests.support import samples, with_each_of

NET = nn.Linear(4, 3)
DATA = points(4, 4), torch.zeros(4, dtype=torch.long)
ROW = torch.tensor([[1.0, 0.0, 0.3, 0.2]])


class Kept(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        self.last = super().forward(values)
        return self.last


class Listed(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        self.seen = [super().forward(values)]
        return self.seen[0]


class Whole(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values).round().long()


KEEPING = {
    "a weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "a spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "the last activation": lambda: Kept(4, 3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", KEEPING)
def test_modules_that_keep_what_a_pass_has_made_are_certified_after_one(name: str) -> None:
    torch.manual_seed(0)
    net = KEEPING[name]().eval()
    expected = certify(copy.deepcopy(net), DATA, lipschitz=9.0) if name == "the last activation" else None
    net(DATA[0].float())
    found = certify(net, DATA, lipschitz=9.0)
    assert torch.equal(found.predictions, net(DATA[0].float()).argmax(1))
    assert bool((found.radii > 0.0).all())
    assert expected is None or torch.equal(found.radii, expected.radii)
    assert bool(
        certify(NET, points(4, 4), lipschitz=1.0, front=nn.Sequential(net, nn.Linear(3, 4)), front_lipschitz=9.0)
    )


def listing() -> nn.Module:
    net = Listed(4, 3)
    net(DATA[0].float())
    return net


def with_fields(fields: list[object]) -> object:
    return hybrid.certify(NET, ROW, 0.3, beta=0.1, fields=fields, changed=1)  # type: ignore[arg-type]


class Itself(nn.Linear):
    """Copies of it are the layer itself."""

    def __deepcopy__(self, memo: object) -> Itself:
        return self


WRONG = {
    "a network that is its own copy": (lambda: certify(Itself(4, 3), DATA, lipschitz=1.0), "deepcopy returns"),
    "a part that is its own copy": (lambda: Smoothed(nn.Sequential(Itself(4, 3)), 0.5), "deepcopy returns"),
    "a list of activations": (lambda: certify(listing(), DATA, lipschitz=1.0), "cannot be copied"),
    "a traced network": (
        lambda: certify(torch.jit.trace(nn.Linear(4, 3), torch.ones(1, 4)), DATA, lipschitz=1.0),
        "scripted or traced",
    ),
    "a lazy network": (lambda: certify(nn.LazyLinear(3), DATA, lipschitz=1.0), "without values"),
    "a network without values": (
        lambda: certify(nn.Linear(4, 3, device="meta"), DATA, lipschitz=1.0),
        "without values",
    ),
    "a front that is a function": (
        lambda: certify(NET, DATA, lipschitz=1.0, front=torch.relu),
        "must be a torch module",
    ),  # type: ignore[arg-type]
    "whole scores": (lambda: certify(Whole(4, 3), DATA, lipschitz=1.0), "floating-point"),
    "no classifier": (lambda: several.certify([NET, NET], DATA[0]), "two smoothed classifiers"),
    "no classifiers": (lambda: several.certify(3, DATA[0]), "several must be a list"),  # type: ignore[arg-type]
    "no maps": (lambda: draw_together([NET], DATA[0]), "one smoothed classifier"),  # type: ignore[list-item]
    "flat fields": (lambda: hybrid.certify(NET, ROW, 0.3, beta=0.1, fields=[0, 1], changed=1), "lists of columns"),
    "sliced fields": (
        lambda: hybrid.certify(NET, ROW, 0.3, beta=0.1, fields=[slice(2)], changed=1),
        "lists of columns",
    ),
    "no box": (lambda: quality(NET, DATA[0], box=None), "box must be"),  # type: ignore[arg-type]
    "a box of three": (lambda: curve(NET, DATA, box=(0, 1, 2)), "box must be"),  # type: ignore[arg-type]
    "a box of letters": (lambda: attack(NET, DATA, box="01"), "box must be"),  # type: ignore[arg-type]
    "one radius": (lambda: curve(NET, DATA, radii=0.1), "radii must be a list"),  # type: ignore[arg-type]
    "one attack": (lambda: curve(NET, DATA, attacks=attacks.PGD()), "attacks must be a list"),  # type: ignore[arg-type]
    "one attack alone": (lambda: attack(NET, DATA, attacks.PGD()), "attacks must be a list"),  # type: ignore[arg-type]
    "a list": (lambda: pareto([certify(NET, DATA, lipschitz=1.0)], 0.1), "names to certificates"),  # type: ignore[arg-type]
    "a ragged matrix": (lambda: certify(NET, DATA, lipschitz=[[1.0], [1.0, 2.0]]), "lipschitz must hold numbers"),  # type: ignore[list-item]
    "a folder": (lambda: read_radii("."), "cannot be read"),
}


@with_each_of("call, said", WRONG)
def test_what_is_given_wrongly_is_refused_in_words(call: Callable[[], object], said: str) -> None:
    with pytest.raises(CliplessError, match=said):
        call()


def test_classifiers_may_come_from_a_generator() -> None:
    made = (Smoothed(NET, sigma) for sigma in (0.3, 0.4))
    assert len(several.certify(made, DATA[0][:1], 5, 20)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e300, 1e308])
@pytest.mark.parametrize("name", ["softmax", "sparsemax", "margin"])
def test_maps_of_large_temperatures_are_those_of_predictions(name: maps.Map, temperature: float) -> None:
    scores = torch.tensor([[3.0, 1e9, -2.0], [-5.0, -7.0, -6.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    assert torch.equal(maps.mapped(scores, name, temperature), expected)
    ordinary = maps.mapped(scores[1:], "softmax", 0.7)
    assert torch.allclose(ordinary, torch.softmax(0.7 * scores[1:], 1), rtol=1e-14)


ALTERED = {
    "points": [[], 3, [{}], [{"radius": -1.0}]],
    "assumptions": ["abc", [], [3]],
    "clean": [None, {"low": 0.9, "value": 0.2, "high": 1.0}, {"low": 0.0, "value": 3.0, "high": 4.0}],
    "level": ["x", 1.0],
    "lipschitz": ["a", -1.0, float("nan")],
    "samples": [0, 1.5, True],
    "attacks": ["PGD"],
    "data": [None],
    "method": [3],
    "average_radius": ["far"],
    "input_norm": [0.0, "one"],
    "answers": [3],
}


def test_a_statement_takes_what_a_curve_says_and_refuses_altered_values() -> None:
    optimizer = trained().optimizer
    described = curve(optimizer.model, samples(20, 3), (0.0, 0.1), ()).described("public samples")
    assert "public samples" in report(optimizer, robustness=described).to_markdown()
    for name, values in ALTERED.items():
        for value in values:
            with pytest.raises(ConfigurationError, match=f"{name} cannot be"):
                report(optimizer, robustness={**described, name: value})
    for name in ("level", "assumptions"):
        with pytest.raises(ConfigurationError, match=f"{name} is missing"):
            report(optimizer, robustness={key: value for key, value in described.items() if key != name})


def test_a_copy_that_holds_an_input_gate_says_so() -> None:
    plain = plain_network(wrapped(dense(4, 8), (4,), input_norm=5.0))
    found = Curve.of(certify(plain, DATA, lipschitz=1.0), None).described("public samples")
    assert "The input gate, at norm 5, is part of what is certified." in found["assumptions"]
    assert saliency(plain, DATA[0]).shape == (4, 4)


@pytest.mark.parametrize("command", ["certify", "explain"])
def test_a_picture_of_an_unknown_ending_is_refused_before_anything_is_computed(
    checkpoint: Path,  # noqa: F811
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    capsys.readouterr()
    assert main([command, str(checkpoint), *NETWORK, "--samples", "2", "--plot", str(tmp_path / "x.weird")]) == 2
    printed = capsys.readouterr()
    assert "pictures end in one of" in printed.err
    assert "samples" not in printed.out
    with pytest.raises(SystemExit):
        main(["certify", str(checkpoint), *NETWORK, "--radii", "1e400"])


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "radii").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_radii(tmp_path / "radii")


def test_a_network_that_cannot_be_copied_stays_as_it_is() -> None:
    net = Itself(4, 3).train()
    with pytest.raises(CliplessError):
        certify(net, DATA, lipschitz=1.0)
    assert (net.weight.dtype, net.weight.requires_grad, net.training) == (torch.float32, True, True)


@pytest.mark.parametrize("coarser", [torch.float32, torch.bfloat16])
def test_scores_in_a_coarser_type_than_the_pass_are_refused(coarser: torch.dtype) -> None:
    class Cast(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs + 1000.0).to(coarser)

    inputs = torch.randn(4, 3, dtype=torch.float64)
    calls: list[Callable[[], Any]] = [
        lambda: certify(Cast(), inputs, lipschitz=1.0),
        lambda: Smoothed(Cast(), 0.5).certify(inputs, 5, 20),
        lambda: Smoothed(Cast(), 0.5, map="pairs", lipschitz=1.0).certify(inputs, 5, 20, method="lipschitz"),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match="leave out what casts them"):
            call()
