from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pytest

import accounting
from clipless_dp import (
    CheckpointError,
    CliplessDPSGD,
    ConfigurationError,
    PoissonBatches,
    PrivacyWarning,
    ReproducibleNoise,
    report,
)
from clipless_dp.cli import main
from clipless_dp.noise import SystemNoise
from clipless_dp.statement import statement_files
from clipless_dp.statement.facts import shown as shown_number
from tests.support import gated_model, samples


def trained(steps=5, *, model=None, **options):
    data = samples(500)
    settings = {"noise_multiplier": 1.5, "sample_rate": 0.1, "dataset_size": 500, "accountant": "rdp", **options}
    optimizer = CliplessDPSGD(model or gated_model(), lr=0.1, **settings)
    for inputs, targets, mask in PoissonBatches(data, sample_rate=0.1, steps=steps):
        optimizer.zero_grad()
        optimizer.model.loss(optimizer.model(inputs), targets, mask).backward()
        optimizer.step()
    return optimizer


class Page(HTMLParser):
    """Collects text, and fails on tags that do not close what was opened last."""

    VOID = frozenset({"meta", "line", "polyline", "path", "rect", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.words, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parsed(page):
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_json_suffices_to_compute_epsilon_again():
    optimizer = trained(accountant="prv")
    facts = json.loads(report(optimizer, delta=1e-4).to_json())
    again = accounting.create_accountant("prv")
    again.load_state_dict(facts["ledger"])
    assert float(again.get_epsilon(1e-4)) == facts["epsilon"]["epsilon"] == optimizer.get_epsilon(1e-4)
    curve = facts["epsilon"]["curve"]
    assert [point["delta"] for point in curve] == [1e-4 * 10.0**-index for index in range(7)]
    assert all(0.9 * point["epsilon"] < point["lower"] <= point["epsilon"] for point in curve)
    assert curve == sorted(curve, key=lambda point: point["epsilon"])
    assert facts["steps"]["recorded"] == 5
    assert facts["sampling"] == {
        "declared": "announced",
        "sample_rate": 0.1,
        "expected_batch_size": 50.0,
        "drawn": {"announced": 5},
    }


def test_bounds_and_noise_of_every_parameter_are_stated_and_amount_to_the_noise_multiplier():
    optimizer = trained(allocation="min-variance")
    facts = report(optimizer).facts
    deltas, sigmas = facts["bounds"]["per_parameter"], facts["noise"]["deviations"]
    assert set(deltas) == set(sigmas) == {name for name, _ in optimizer.model.net.named_parameters()}
    joint = sum((deltas[name] / sigmas[name]) ** 2 for name in deltas) ** -0.5
    # Noise is drawn a millionth larger than planned.
    assert joint == pytest.approx(1.5, rel=2e-6)
    assert joint >= 1.5


def test_the_three_forms_say_the_same_and_the_page_needs_nothing_else(tmp_path):
    statement = report(trained(), tmp_path / "out" / "statement.html", unit="one patient", notes=["<b>Read & me</b>"])
    assert [file.name for file in statement.files] == ["statement.md", "statement.json", "statement.html"]
    markdown, text, page = (file.read_text(encoding="utf-8") for file in statement.files)
    assert json.loads(text) == json.loads(statement.to_json())
    parser = parsed(page)
    words = "".join(parser.words)
    shown = f"ε = {shown_number(statement.facts['epsilon']['epsilon'])} at δ = 0.001"
    for form in (markdown, words):
        assert shown in form
        assert "one patient" in form
        assert "<b>Read & me</b>" in form.replace("\\", "")
        assert "hyper-parameters" in form
        assert "Poisson" in form
        assert "adding or removing one unit" in form
        assert "RDPAccountant" in form
        for layer in statement.facts["bounds"]["layers"]:
            assert layer["path"] in form
    assert not [a for a in parser.attributes if a[1] in {"src", "href", "srcset", "onload"} or a[0] == "script"]


def test_no_name_or_note_writes_a_heading_of_its_own() -> None:
    sly = "fine\n\n## Certified by nobody\r# twice\u2028* and more"
    made = [report(trained(), notes=[one]) for one in ("fine", sly)]
    # Files may say anything.
    files = zip(made, ("fine", sly), strict=True)
    plain, text = (replace(one, facts={**one.facts, "unit": unit}).to_markdown() for one, unit in files)
    headings = [[line for line in some.splitlines() if line.startswith(("#", "*"))] for some in (plain, text)]
    assert len(headings[0]) == len(headings[1])
    assert r"* fine  ## Certified by nobody # twice \* and more" in headings[1]


def test_tables_in_markdown_have_as_many_cells_in_every_row():
    stated = report(trained())
    lines = replace(stated, facts={**stated.facts, "unit": "a | b\nc"}).to_markdown().splitlines()
    tables = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    widths = [{len(re.findall(r"(?<!\\)\|", row)) for row in table.split("\n") if row} for table in tables]
    assert len([width for width in widths if width]) >= 6
    assert all(len(width) == 1 for width in widths if width)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.23401, "1.235"), (0.1, "0.1"), (2.0, "2"), (0.0, "0"), (1e-9, "1e-09"), (12345.0, "1.235e+04")],
)
def test_shown_numbers_are_rounded_up(value, shown):
    assert shown_number(value) == shown
    assert float(shown) >= value


def test_the_summary_bounds_what_a_guess_can_reach():
    optimizer = trained(steps=40, accountant="prv")
    statement = report(optimizer, delta=1e-3)
    stated = float(re.search(r"at most ([\d.]+) %", statement.to_markdown())[1]) / 100
    variation = optimizer.accountant.get_delta(0.0)
    # Rounded up to hundredths of a per cent.
    assert 0.5 * (1.0 + variation.lower) <= stated <= 0.5 * (1.0 + variation.upper) + 1e-4


def test_the_risk_in_the_json_is_that_of_its_ledger_and_stands_in_the_readable_forms():
    statement = report(trained(steps=40, accountant="prv"), delta=1e-3)
    risk = json.loads(statement.to_json())["risk"]
    again = accounting.create_accountant("prv")
    again.load_state_dict(statement.facts["ledger"])
    curve = accounting.trade_off(again)
    assert [(one["epsilon"], one["delta"]) for one in risk["profile"]] == [
        (one.delta, one.upper) for one in curve.bounds
    ]
    assert risk["gaussian_mu"] == curve.gaussian_mu(1e-5)
    text, page = statement.to_markdown(), statement.to_html()
    for one in risk["true_positive_rates"]:
        false, true = one["false_positive"], one["true_positive"]
        assert true == curve.true_positive_rate(false) > false
        (cell,) = re.findall(rf"^\| {100 * false:g} % \| ([\d.]+) %", text, re.MULTILINE)
        assert true <= float(cell) / 100 <= true + 1e-4
        assert f"<td>{cell} %</td>" in page
    # A thousand guesses, who is found, the curve.
    assert len(re.findall("<svg", page)) == 3


def test_a_statement_without_one_unit_has_no_risk():
    optimizer = trained(steps=2)
    optimizer.accountant.ledger._put(accounting.GaussianRelease(5.0), provenance=accounting.Provenance(unit="person"))
    statement = report(optimizer)
    assert statement.facts["risk"] is None
    assert "## Risk" not in statement.to_markdown()


class Foreign(SystemNoise):
    pass


@dataclass
class Verdict:
    passed: bool


def test_a_sound_run_has_no_findings():
    statement = report(trained(), audit=Verdict(True))
    assert statement.findings == []
    # As it prints itself: a table stays one.
    assert f"<pre>Verdict\n\n{Verdict(True)}</pre>" in html.unescape(statement.to_html())


@pytest.mark.parametrize(
    ("build", "options", "finding"),
    [
        (lambda: trained(noise=ReproducibleNoise(1)), {}, "reproducible"),
        (lambda: trained(noise=Foreign()), {}, r"Foreign.*not checked"),
        (lambda: trained(0), {}, "No step"),
        (lambda: trained(noise_multiplier=0.05), {}, "above 10"),
        (lambda: trained(sampling="none"), {}, "5 of 5 steps were charged without amplification"),
        (lambda: trained(sampling="poisson"), {}, "vouches"),
        (trained, {"delta": 0.01}, "exceeds 1/500"),
        (trained, {"audit": [Verdict(True), Verdict(False)]}, r"audit failed \(Verdict\)"),
    ],
    ids=["reproducible", "foreign noise", "empty", "weak", "unsampled", "vouched", "delta", "audit"],
)
@pytest.mark.filterwarnings("ignore::accounting.AccountingWarning")
def test_what_weakens_the_promise_is_a_finding(build, options, finding):
    statement = report(build(), **options)
    assert [text for text in statement.findings if re.search(finding, text)], statement.findings
    assert re.search(finding, statement.to_markdown())


def test_a_ledger_that_lacks_another_optimizers_steps_is_a_finding():
    model = gated_model()
    trained(model=model)
    with pytest.warns(PrivacyWarning, match="another optimizer"):
        second = trained(model=model)
    third = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.5, sample_rate=0.1, dataset_size=500)
    for optimizer in (second, third):
        assert any("too small" in text for text in report(optimizer).findings)


def test_reproducible_noise_stays_in_the_statement_of_a_run_that_went_on_without():
    first = trained(noise=ReproducibleNoise(1))
    model = gated_model()
    second = CliplessDPSGD(
        model, lr=0.1, noise_multiplier=1.5, sample_rate=0.1, dataset_size=500, accountant=first.accountant
    )
    second.load_state_dict(first.state_dict())
    assert any("reproducible" in text for text in report(second).findings)


def test_the_delta_of_the_summary_is_the_budgets_or_a_power_of_ten_below_one_over_the_size():
    assert report(trained()).facts["epsilon"]["delta"] == 1e-3
    assert report(trained(budget=(100.0, 2e-4))).facts["epsilon"]["delta"] == 2e-4


def test_one_off_releases_in_the_ledger_are_listed_beside_the_steps():
    optimizer = trained()
    optimizer.accountant.record(accounting.GaussianRelease(5.0))
    statement = report(optimizer)
    assert statement.facts["steps"]["recorded"] == 5
    assert "| gaussian release | 5 | 1 | 1 |" in statement.to_markdown()
    assert "| gaussian step | 1.5 | 0.1 | 5 | announced | SystemNoise |" in statement.to_markdown()
    (finding,) = statement.findings
    assert "1 of 6 entries do not say where their noise came from" in finding


def test_a_delta_out_of_range_is_refused():
    with pytest.raises(ConfigurationError, match="delta"):
        report(trained(0), delta=0.0)


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="statement"):
        report(trained(0), tmp_path / "file" / "statement")


@pytest.mark.parametrize("name", ["a", "a.md", "a.html", "a.v2", "a.v2.json"])
def test_only_its_own_endings_are_replaced(tmp_path, name):
    base = "a.v2" if "v2" in name else "a"
    assert [file.name for file in statement_files(tmp_path / name)] == [f"{base}.md", f"{base}.json", f"{base}.html"]


def test_the_command_line_writes_the_statement_and_refuses_a_bad_path_first(tmp_path, capsys):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "table.npz", X=generator.normal(size=(100, 3)), y=generator.integers(0, 2, 100))
    arguments = ["train", "--dataset", str(tmp_path / "table.npz"), "--epsilon", "3", "--delta", "1e-3"]
    arguments += ["--classes", "2", "--epochs", "1", "--batch-size", "40", "--accountant", "rdp", "--quiet", "--report"]
    assert main([*arguments, str(tmp_path / "statement")]) == 0
    printed = capsys.readouterr().out
    epsilon = re.search(r"epsilon\s+([\d.]+)", printed)[1]
    facts = json.loads((tmp_path / "statement.json").read_text(encoding="utf-8"))
    assert f"{facts['epsilon']['epsilon']:.4f}" == epsilon
    assert "statement.html" in printed
    (tmp_path / "file").touch()
    assert main([*arguments, str(tmp_path / "file" / "statement")]) == 2
    assert "epsilon" not in capsys.readouterr().out


def test_learning_rates_are_stated_in_full_and_in_brief():
    optimizer = trained(steps=0, sampling="poisson")
    for rate in (0.05, 0.2, 0.2, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    statement = report(optimizer)
    assert statement.facts["learning_rates"] == [
        {"rates": [0.05], "count": 1},
        {"rates": [0.2], "count": 2},
        {"rates": [0.1], "count": 1},
    ]
    shown = statement.to_markdown()
    assert "| Steps whose rate is recorded | 4 of 4 |" in shown
    assert [re.search(rf"\| {name} \| (.*) \|", shown)[1] for name in ("First", "Largest", "Last")] == [
        "0.05",
        "0.2",
        "0.1",
    ]


@pytest.mark.parametrize("name", ["unit", "title"])
@pytest.mark.parametrize("text", ["", "  ", "one row\nEpsilon: 0.1", "one\u202eelpoep", "a\u200bb", 3])
def test_a_text_that_would_not_read_as_it_is_written_is_refused(name, text):
    with pytest.raises(ConfigurationError, match=name):
        report(trained(), **{name: text})
