"""One certificate: the statement says radii beside ε, and the command line certifies what it has trained."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    constraints,
    fit,
    gradient_gated,
    layers,
    losses,
    report,
)
from clipless_dp.cli import main
from clipless_dp.gates import BallProjection
from clipless_dp.model.functions import function_of
from clipless_dp.robustness import Certificate, Curve, attacks, certify, curve
from tests.support import samples

QUICK = (attacks.PGD(steps=5, restarts=1),)


def trained(constraint: constraints.Constraint | None = None):
    torch.manual_seed(0)
    model = DPLipModel(
        nn.Sequential(nn.Linear(6, 8), layers.GroupSort(2), nn.Linear(8, 3)),
        input_shape=(6,),
        input_norm=4.0,
        loss=losses.TauCrossEntropy(8.0),
        constraint=constraint,
    )
    return fit(model, samples(60), epsilon=3.0, delta=1e-3, epochs=1, batch_size=20, progress=False, audit=False)


def test_the_statement_gains_a_section_of_what_is_certified_on_public_data(tmp_path: Path) -> None:
    optimizer = trained(constraints.Orthogonal()).optimizer
    found = curve(optimizer.model, samples(50, 3), (0.0, 0.1, 0.5), QUICK)
    described = found.described("fifty public samples | of a generator")
    statement = report(optimizer, tmp_path / "statement", robustness=described)
    facts = json.loads((tmp_path / "statement.json").read_text("utf-8"))
    assert facts["robustness"]["lipschitz"] == pytest.approx(1.0)
    assert [point["radius"] for point in facts["robustness"]["points"]] == [0.0, 0.1, 0.5]
    assert facts["robustness"]["attacks"] == [repr(QUICK[0])]
    text = statement.to_markdown()
    assert "## Robustness" in text
    assert "fifty public samples" in text
    certified = found.points[1].certified.value
    assert f"| 0.1 | {math.floor(round(1e4 * certified, 6)) / 100:.2f} % |" in text
    assert "<h2>Robustness</h2>" in (tmp_path / "statement.html").read_text("utf-8")
    # The promise itself stands as before, and the certificate adds no finding.
    assert "(ε, δ)-differentially private" in text
    assert not any("certificate" in finding for finding in statement.findings)
    assert "Robustness" not in report(optimizer).to_markdown()


def test_a_certificate_of_other_weights_is_a_finding() -> None:
    optimizer = trained(constraints.Orthogonal()).optimizer
    described = curve(optimizer.model, samples(20, 3), (0.0, 0.1), ()).described("public samples")
    with torch.no_grad():
        optimizer.model.net[0].weight.mul_(0.5)
    findings = report(optimizer, robustness=described).findings
    assert any("certificate is of other weights" in finding for finding in findings)


def test_a_certificate_of_another_input_norm_is_a_finding() -> None:
    optimizer = trained(constraints.Orthogonal()).optimizer
    other = DPLipModel(optimizer.model.net, input_shape=(6,), input_norm=8.0, loss=losses.TauCrossEntropy(8.0))
    described = curve(other, samples(20, 3), (0.0, 0.1), ()).described("public samples")
    findings = report(optimizer, robustness=described).findings
    assert any("another input norm" in finding for finding in findings)
    assert not any("other weights" in finding for finding in findings)


class Scaled(nn.Module):
    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.factor * self.net(values)


def net_of(between: nn.Module, factor: float = 1.0) -> nn.Module:
    return Scaled(nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 3)), factor)


OTHERS = {
    "another slope": lambda: net_of(nn.LeakyReLU(-3.0)),
    "another activation": lambda: net_of(nn.Tanh()),
    "another ball": lambda: net_of(BallProjection(10.0)),
    "a constant in forward": lambda: net_of(nn.LeakyReLU(0.01), -1.0),
}

THE_SAME = {
    "itself": lambda: net_of(nn.LeakyReLU(0.01)),
    "with gates of gradients": lambda: gradient_gated(net_of(nn.LeakyReLU(0.01)), isolation="graph"),
    "with gates of other caps": lambda: gradient_gated(net_of(nn.LeakyReLU(0.01)), limit=3.0, isolation="graph"),
    "in place": lambda: net_of(nn.LeakyReLU(0.01, inplace=True)),
}


STEPS: dict[str, Callable[[], nn.Module]] = {
    "convex potential": lambda: layers.ConvexPotential(6, 4),
    "circulant": lambda: layers.StructuredLinear(6, 6),
    "diagonal": lambda: layers.Diagonal(6),
}


@pytest.mark.parametrize("name", STEPS)
def test_layers_behind_gates_of_gradients_are_the_same_function_as_without_and_no_other(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(STEPS[name](), nn.Linear(6, 3))
    found = {
        function_of(gradient_gated(net, limit=limit, isolation="graph").get_submodule("0")) for limit in (1.0, 3.0)
    }
    assert found == {function_of(net[0])}
    others = (layers.ConvexPotential(6, 5), layers.ConvexPotentialConv2d(6), layers.StructuredLinear(6, 6, "skew"))
    assert not any(function_of(other) in found for other in others)
    strided = layers.ConvexPotentialConv2d(6, 2, padding=0, stride=2)
    assert function_of(strided) != function_of(layers.ConvexPotentialConv2d(6, 2, padding=0))


def certified_with(network: nn.Module, weights: nn.Module) -> tuple[DPLipModel, Curve]:
    network.load_state_dict(weights.state_dict())
    model = DPLipModel(network, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy(8.0))
    return model, curve(model, samples(20, 3), (0.0, 0.1), ())


@pytest.mark.parametrize("name", [*OTHERS, *THE_SAME])
def test_a_certificate_of_another_function_of_the_same_weights_is_a_finding_and_of_the_same_is_none(name: str) -> None:
    torch.manual_seed(0)
    net = net_of(BallProjection(0.1) if name == "another ball" else nn.LeakyReLU(0.01))
    model, own = certified_with(net, net)
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.1, dataset_size=60)
    _, other = certified_with({**OTHERS, **THE_SAME}[name](), net)
    assert own.certificate.weights == other.certificate.weights
    assert (own.certificate.digest == other.certificate.digest) is (name in THE_SAME)
    findings = report(optimizer, delta=1e-5, robustness=other.described("public samples")).findings
    assert any("another function" in finding for finding in findings) is (name in OTHERS)


def test_a_setting_that_changed_since_the_certificate_is_a_finding() -> None:
    torch.manual_seed(0)
    net = net_of(nn.LeakyReLU(0.01))
    model, own = certified_with(net, net)
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.1, dataset_size=60)
    described = own.described("public samples")
    assert not any("another function" in one for one in report(optimizer, delta=1e-5, robustness=described).findings)
    net.net[1].negative_slope = 0.9
    assert any("another function" in one for one in report(optimizer, delta=1e-5, robustness=described).findings)


def test_a_certificate_of_the_network_by_itself_with_a_stated_constant_is_of_the_same_function() -> None:
    optimizer = trained(constraints.Orthogonal()).optimizer
    alone = curve(optimizer.model.net, samples(20, 3), (0.0, 0.1), (), lipschitz=1.0).described("public samples")
    assert not any("another function" in finding for finding in report(optimizer, robustness=alone).findings)


def test_modules_that_are_not_wrapped_and_fronts_are_told_apart_by_settings_and_code() -> None:
    layer = nn.Linear(6, 6)

    class Doubled(nn.Linear):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(values)

    doubled = Doubled(6, 6)
    doubled.load_state_dict(layer.state_dict())
    nets = [
        layer,
        doubled,
        nn.Sequential(layer, nn.LeakyReLU(0.1)),
        nn.Sequential(layer, nn.LeakyReLU(0.2)),
        nn.Sequential(layer, BallProjection(1.0)),
        nn.Sequential(layer, BallProjection(2.0)),
    ]
    assert len({function_of(net) for net in nets}) == len(nets)
    assert function_of(copy.deepcopy(nets[-1]).double()) == function_of(nets[-1])
    assert function_of(nn.Sequential(nn.Linear(6, 6), BallProjection(2.0))) == function_of(nets[-1])
    inputs, last = torch.randn(4, 6), nn.Linear(6, 3)
    found = {certify(last, inputs, lipschitz=1.0, front=net, front_lipschitz=9.0).digest for net in nets}
    assert len(found) == len(nets)


def test_what_is_not_certified_says_why_in_the_statement() -> None:
    certificate = Certificate(
        torch.zeros(2).double(), torch.zeros(2), torch.zeros(2), reason="no constant is known", method="none"
    )
    described = Curve.of(certificate, None).described("public samples")
    text = report(trained().optimizer, robustness=described).to_markdown()
    assert "Nothing is certified: no constant is known." in text
    infinite = Certificate(torch.full((2,), math.inf).double(), torch.zeros(2), torch.zeros(2))
    json.dumps(Curve.of(infinite, None).described("public samples"), allow_nan=False)
    for wrong in ("curve", {"lipschitz": 1.0}, certificate):
        with pytest.raises(ConfigurationError, match="described"):
            report(trained().optimizer, robustness=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="which public samples"):
        Curve.of(certificate, None).described(" ")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("run") / "digits.pt"
    arguments = (
        "train --dataset digits --epsilon 3 --delta 1e-4 --route orthogonal --network mlp --tau 16 --input-norm 8 "
        "--epochs 5 --batch-size 256 --audit off --quiet --checkpoint"
    )
    assert main([*arguments.split(), str(path)]) == 0
    return path


NETWORK = ["--data", "digits", "--route", "orthogonal", "--network", "mlp", "--input-norm", "8"]


def test_the_command_line_certifies_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "certificate.json"
    options = ["--radii", "36/255", "0.5", "--box", "0", "1", "--attacked-samples", "40", "--out", str(out)]
    capsys.readouterr()
    assert main(["certify", str(checkpoint), *NETWORK, *options]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"0\.1412\s+\d", printed)
    # Two dense layers and orthogonal weights: certified as one, up to their own rounding.
    assert float(re.search(r"Lipschitz\s+([\d.]+)", printed)[1]) == pytest.approx(1.0, abs=0.01)
    assert "ε = 3 at δ = 0.0001" in printed
    facts = json.loads(out.read_text("utf-8"))
    assert facts["privacy"] == {"epsilon": 3.0, "delta": 1e-4, "relation": "add_or_remove_one"}
    for point in facts["points"]:
        assert point["certified"]["low"] <= point["certified"]["value"]
    assert facts["points"][0]["certified"]["value"] > facts["points"][2]["certified"]["value"]
    assert main(["certify", str(checkpoint), *NETWORK, "--attacks", "none", "--samples", "20"]) == 0
    assert "20 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "digits", "--route", "gated"], "options that it was trained with"),
        ([*NETWORK[:-1], "9"], "input_norm"),
        (["--data", "digits", "--preset", "features-linear"], "reads features"),
        ([*NETWORK, "--samples", "0"], "--samples"),
    ],
    ids=["network", "input norm", "features", "samples"],
)
def test_the_command_line_refuses_what_it_cannot_certify(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["certify", str(checkpoint), *options]) == 2
    assert said in capsys.readouterr().err


def test_the_command_line_refuses_radii_and_files_that_are_none(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for radius in ("-1", "1/0", "inf", "far"):
        with pytest.raises(SystemExit):
            main(["certify", str(checkpoint), *NETWORK, "--radii", radius])
    assert main(["certify", str(tmp_path / "none.pt"), *NETWORK]) == 2
    assert "none.pt" in capsys.readouterr().err


def test_the_command_line_explains_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "explanations.json", tmp_path / "explanations.png"
    options = ["--samples", "3", "--measured", "10", "--box", "0", "1", "--out", str(out), "--plot", str(plot)]
    capsys.readouterr()
    assert main(["explain", str(checkpoint), *NETWORK, *options]) == 0
    printed = capsys.readouterr().out
    assert "tightness" in printed
    assert re.search(r"mu-fidelity, zero\s+-?[\d.]+", printed)
    facts = json.loads(out.read_text("utf-8"))
    assert len(facts["counterfactuals"]["radii"]) == 3
    for radius, distance in zip(*(facts["counterfactuals"][name] for name in ("radii", "distances")), strict=True):
        assert distance is None or radius <= distance
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["explain", str(checkpoint), *NETWORK, "--samples", "2", "--measured", "0"]) == 0
    assert "fidelity" not in capsys.readouterr().out


def test_the_command_line_explains_what_would_become_a_class_of_samples_that_are_not_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "explanations.json", [*NETWORK, "--samples", "4", "--measured", "0"]
    assert main(["explain", str(checkpoint), *options, "--out", str(out)]) == 0
    first = json.loads(out.read_text("utf-8"))
    assert first["rows"] == [0, 1, 2, 3]
    target = int(first["counterfactuals"]["predictions"][0])
    capsys.readouterr()
    assert main(["explain", str(checkpoint), *options, "--target", str(target), "--out", str(out)]) == 0
    facts = json.loads(out.read_text("utf-8"))
    assert len(facts["rows"]) == 4
    assert 0 not in facts["rows"]
    assert all(one != target for one in facts["counterfactuals"]["predictions"])
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "digits", "--route", "gated"], "options that it was trained with"),
        (["--data", "digits", "--preset", "features-linear"], "reads features"),
        ([*NETWORK, "--samples", "0"], "--samples"),
        ([*NETWORK, "--measured", "-1"], "--measured"),
        ([*NETWORK, "--target", "10"], "below 10"),
        ([*NETWORK, "--t", "0"], "t must be"),
        ([*NETWORK, "--box", "0.4", "0.6"], "outside of the box"),
    ],
    ids=["network", "features", "samples", "measured", "target", "step", "box"],
)
def test_the_command_line_refuses_what_it_cannot_explain(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["explain", str(checkpoint), *options]) == 2
    assert said in capsys.readouterr().err
