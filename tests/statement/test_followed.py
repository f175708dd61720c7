"""What a statement says that its own ledger tells is compared with it, whoever edited the file; honest ones stay."""

import json
import re
from itertools import pairwise

import pytest

from accounting import GaussianRelease, LaplaceRelease, Ledger, Provenance
from accounting.cli import main
from accounting.errors import AccountingError
from accounting.events import FixedSizeSampling, GaussianStep, GaussianVectorStep, PoissonSampling, ShuffledEpoch
from accounting.stated import UNITS, UNTOLD
from clipless_dp import CheckpointError, PrivacyWarning, ReproducibleNoise, report
from clipless_dp.commands.report import statement_of
from clipless_dp.statement import PrivacyStatement, report_ledger
from tests.statement.test_report import trained
from tests.support import samples

RUNS = ({"run": "a", "sampling": "announced", "noise": "clipless_dp.noise.SystemNoise"}, {"run": "b"})
POISSON = GaussianStep(1.2, PoissonSampling(0.05))


def ledger_of(*events, relation="add_or_remove_one", **provenance):
    ledger = Ledger(relation)
    for event, count in events:
        ledger.append(event, count, Provenance(**provenance))
    return ledger


def merged():
    mine, theirs = (ledger_of((POISSON, 20), (GaussianRelease(5.0), 1), **run) for run in RUNS)
    return mine.merge(theirs)


def mixed():
    ledger = Ledger()
    for unit in ("", "person"):
        ledger._put(POISSON, 3, Provenance(unit=unit))
    return ledger


LEDGERS = {
    "nothing": Ledger,
    "poisson": lambda: ledger_of((POISSON, 50)),
    "poisson, replace-one": lambda: ledger_of((POISSON, 50), relation="replace_one"),
    "fixed-size": lambda: ledger_of((GaussianStep(1.2, FixedSizeSampling(10, 1000)), 30), relation="replace_one"),
    "releases": lambda: ledger_of((GaussianRelease(3.0), 2), (ShuffledEpoch(2.0), 3)),
    "laplace": lambda: ledger_of((LaplaceRelease(2.0), 3)),
    "laplace, replace-one": lambda: ledger_of((LaplaceRelease(2.0), 3), relation="replace_one"),
    "laplace and steps": lambda: ledger_of((LaplaceRelease(2.0), 3), (POISSON, 20)),
    "vectors": lambda: ledger_of((GaussianVectorStep((2.0, 3.0), PoissonSampling(0.02)), 20)),
    "a schedule": lambda: ledger_of(*((GaussianStep(1.0 + 0.2 * k, PoissonSampling(0.05)), 5) for k in range(4))),
    "people": lambda: ledger_of((POISSON, 20), unit="person"),
    "merged": merged,
    "rows and people": mixed,
}


def followed_again(statement, tmp_path):
    file = statement.save(tmp_path / "statement").files[1]
    assert statement_of(file, None).findings == statement.findings
    return file


@pytest.mark.parametrize("case", LEDGERS)
def test_what_a_ledger_states_of_itself_is_not_contradicted(case, tmp_path, capsys):
    file = followed_again(report_ledger(LEDGERS[case](), delta=1e-4), tmp_path)
    if case != "rows and people":
        assert main(["explain", str(file)]) == 0
        assert "neither follows" not in capsys.readouterr().out


def of_a_schedule():
    optimizer = trained(2)
    ledger = optimizer.accountant.ledger
    for sigma in (1.2, 1.7):
        ledger.append(
            GaussianStep(sigma, PoissonSampling(0.1)), 2, Provenance("a", sampling="announced", noise="x.Own")
        )
    return optimizer


def of_merged_ledgers():
    optimizer = trained(3, accountant="prv")
    optimizer.accountant.ledger = optimizer.accountant.ledger.merge(merged())
    return optimizer


def of_no_draw():
    optimizer = trained(0)
    inputs, targets = samples(50)
    optimizer.model.loss(optimizer.model(inputs), targets).backward()
    with pytest.warns(PrivacyWarning, match="q = 1"):
        optimizer.step()
    return optimizer


OPTIMIZERS = {
    "rdp": trained,
    "prv": lambda: trained(accountant="prv"),
    "seeded": lambda: trained(noise=ReproducibleNoise(1)),
    "shares": lambda: trained(allocation="min-variance"),
    "nothing": lambda: trained(0),
    "a schedule": of_a_schedule,
    "merged": of_merged_ledgers,
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_what_an_optimizer_states_is_not_contradicted_and_no_finding_is_added(case, tmp_path):
    followed_again(report(OPTIMIZERS[case](), delta=1e-3), tmp_path)


def test_the_noise_of_batches_of_no_draw_which_are_charged_at_half_of_it_is_no_finding():
    findings = report(of_no_draw(), delta=1e-3).findings
    assert any("q = 1" in one for one in findings)
    assert not any("The noise shown" in one for one in findings)


@pytest.fixture(scope="module")
def stated():
    made = {"seeded": report(trained(noise=ReproducibleNoise(1)), delta=1e-3), "plain": report(trained(), delta=1e-3)}
    return {name: one.to_json() for name, one in made.items()}


def hidden(facts):
    facts["findings"] = []
    facts["noise"]["sources"] = ["clipless_dp.noise.SystemNoise"]
    facts["sampling"]["drawn"] = {"announced": 5}
    for entry in facts["steps"]["entries"]:
        entry.update(drawn="announced", seeded_masks=False, noise="clipless_dp.noise.SystemNoise")


def only(path, value):
    def edit(facts):
        *before, last = path
        for name in before:
            facts = facts[name]
        facts[last] = value

    return edit


REFUSED = {
    "a seeded run told as one of the system's noise": hidden,
    "sources": only(["noise", "sources"], []),
    "how batches were drawn": only(["sampling", "drawn"], {"vouched": 5}),
    "a line's batches": only(["steps", "entries", 0, "drawn"], "vouched"),
    "a line's masks": only(["steps", "entries", 0, "seeded_masks"], True),
    "a line's noise": only(["steps", "entries", 0, "noise"], "clipless_dp.noise.SecureNoise"),
    "a line's unit": only(["steps", "entries", 0, "unit"], "person"),
    "a line's run": only(["steps", "entries", 0, "run"], "0" * 32),
    "recorded": only(["steps", "recorded"], 1),
    "at least more than at most": only(["epsilon", "curve", 1, "lower"], 99.0),
    "the text of the other unit": only(["unit"], UNITS["person"]),
    "the text of the other unit, a space behind": only(["unit"], UNITS["person"].upper() + ". "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_ledger_tells_otherwise_is_refused(case, stated, tmp_path, capsys):
    facts = json.loads(stated["seeded"])
    REFUSED[case](facts)
    (tmp_path / "s.json").write_text(json.dumps(facts), "utf-8")
    with pytest.raises(AccountingError, match="was altered"):
        statement_of(tmp_path / "s.json", None)
    assert main(["explain", str(tmp_path / "s.json")]) == 2
    assert "was altered" in capsys.readouterr().err


def test_a_unit_in_words_of_ones_own_is_told_with_what_is_counted(stated, tmp_path, capsys):
    facts = json.loads(stated["seeded"])
    facts["unit"] = "one person, with all of their rows"
    (tmp_path / "s.json").write_text(json.dumps(facts), "utf-8")
    assert main(["explain", str(tmp_path / "s.json")]) == 0
    assert "What is counted are rows, of which it calls one 'one person, with all of their rows'" in (
        capsys.readouterr().out
    )


def test_more_steps_taken_than_recorded_are_a_finding(stated, tmp_path):
    facts = json.loads(stated["seeded"])
    facts["steps"]["taken"] = facts["steps"]["recorded"] + 1
    (tmp_path / "s.json").write_text(json.dumps(facts), "utf-8")
    assert any("the ε shown is not of all of them" in one for one in statement_of(tmp_path / "s.json", None).findings)


def test_a_delta_of_which_no_engine_computes_is_refused_by_both_commands(stated, tmp_path, capsys):
    facts = json.loads(stated["seeded"])
    facts["epsilon"]["delta"] = 1e-320
    (tmp_path / "s.json").write_text(json.dumps(facts), "utf-8")
    with pytest.raises(CheckpointError, match=r"epsilon\.delta"):
        statement_of(tmp_path / "s.json", None)
    assert main(["explain", str(tmp_path / "s.json")]) == 2
    assert "epsilon.delta cannot be" in capsys.readouterr().err


def test_findings_do_not_go_away_with_the_facts_they_are_of(stated, tmp_path):
    facts = json.loads(stated["seeded"])
    found = set(facts["findings"])
    facts["findings"] = []
    del facts["sampling"]["drawn"]
    for entry in facts["steps"]["entries"]:
        for name in ("drawn", "seeded_masks", "noise", "unit", "run"):
            del entry[name]
    (tmp_path / "s.json").write_text(json.dumps(facts), "utf-8")
    told = statement_of(tmp_path / "s.json", None)
    assert found <= set(told.findings)
    for name in ("sampling", "steps"):
        assert told.facts[name] == json.loads(stated["seeded"])[name]


FOUND = {
    "sample rate": (only(["sampling", "sample_rate"], 0.001), "is that of no step in the ledger"),
    "batch": (only(["sampling", "expected_batch_size"], 0.3), "is not the sample rate times"),
    "size": (only(["dataset_size"], 10**9), "is not the sample rate times"),
    "deviations": (
        lambda facts: facts["noise"].update(deviations=dict.fromkeys(facts["noise"]["deviations"], 1e9)),
        "more than that of any step",
    ),
    "total": (only(["bounds", "total"], 1e-9), "is below that of one of them"),
    "steps taken": (only(["steps", "taken"], 6), "6 steps were taken and 5 are recorded"),
    "engine": (only(["accountant", "engine"], "prv"), "is not that of ε"),
}
NO_PAGE = {"bounds": (only(["bounds", "per_parameter"], {}), "of which no bound is")}
OTHERS = {
    "weights": (only(["weights"], None), "not said whether the model's weights"),
    "weights gone": (lambda facts: facts.pop("weights"), "not said whether the model's weights"),
    "an audit": (only(["audits"], [{"kind": "A", "passed": False, "text": "x"}]), "An audit failed"),
}


@pytest.mark.parametrize("case", FOUND | NO_PAGE)
def test_settings_that_are_not_those_of_the_steps_are_told_beside_an_epsilon_that_follows(
    case, stated, tmp_path, capsys
):
    edit, words = (FOUND | NO_PAGE)[case]
    for edited in (False, True):
        facts = json.loads(stated["plain"])
        if edited:
            edit(facts)
        (tmp_path / "s.json").write_text(json.dumps(facts), "utf-8")
        assert main(["explain", str(tmp_path / "s.json")]) == 0
        told = capsys.readouterr().out
        assert "this follows from its ledger" in told
        assert UNTOLD in told
        assert (words in told) == edited


@pytest.mark.parametrize("case", FOUND | OTHERS)
def test_what_does_not_agree_with_itself_is_a_finding(case, stated, tmp_path):
    facts = json.loads(stated["plain"])
    assert facts["findings"] == []
    edit, words = (FOUND | OTHERS)[case]
    edit(facts)
    (tmp_path / "s.json").write_text(json.dumps(facts), "utf-8")
    assert any(words in finding for finding in statement_of(tmp_path / "s.json", None).findings)


NONE = {
    "size zero": only(["dataset_size"], 0),
    "size too large": only(["dataset_size"], 10**400),
    "half a row": only(["dataset_size"], 300.5),
    "less than a row": only(["dataset_size"], 1e-9),
    "lone surrogate": only(["title"], "\ud800"),
    "another format": only(["format"], "clipless_dp.other"),
    "no steps": lambda facts: facts.pop("steps"),
    "version": only(["version"], float("nan")),
    "former version": only(["version"], -1),
    "no version": lambda facts: facts.pop("version"),
    "nothing uncovered": only(["not_covered"], []),
    "passed no": only(["audits"], [{"kind": "A", "passed": "no", "text": "x"}]),
    "passed 0": only(["audits"], [{"kind": "A", "passed": 0, "text": "x"}]),
    "weights of a list": only(["weights"], []),
    "counted": only(["counted"], "people"),
    "relation of bounds": only(["bounds", "relation"], "replace_one"),
    "a line of no event": only(["steps", "entries", 0, "count"], 0),
    "rates": only(["learning_rates"], [{"rates": ["x"], "count": 1}]),
    "no curve of risk": only(["risk", "curve"], []),
    "infinity": lambda facts: facts["epsilon"].update(epsilon=float("inf")),
}


@pytest.mark.parametrize("case", NONE)
def test_values_that_are_none_are_refused_in_words_by_report_and_by_explain(case, stated, tmp_path, capsys):
    facts = json.loads(stated["plain"])
    NONE[case](facts)
    # As an editor writes it: a number too large for any float.
    text = json.dumps(facts).replace("Infinity", "1e999")
    (tmp_path / "s.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError, match="no privacy statement"):
        statement_of(tmp_path / "s.json", None)
    assert main(["explain", str(tmp_path / "s.json")]) == 2
    assert "no privacy statement" in capsys.readouterr().err


def test_a_text_that_no_file_holds_is_refused_before_anything_is_written(stated, tmp_path):
    statement = PrivacyStatement({**json.loads(stated["plain"]), "title": "\ud800"})
    with pytest.raises(CheckpointError, match="could not be written"):
        statement.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ticks", [0, 3, 4, 7])
def test_nothing_that_an_audit_prints_leaves_its_fence(ticks, stated):
    markdown_it = pytest.importorskip("markdown_it")
    text = f"x\n{'`' * ticks}\n# OUT\n<img src=x>\n~~~\n> q"
    facts = {**json.loads(stated["plain"]), "audits": [{"kind": "```\n# OUT", "passed": True, "text": text}]}
    tokens = markdown_it.MarkdownIt().parse(PrivacyStatement(facts).to_markdown())
    (fence,) = [token for token in tokens if token.type == "fence"]
    assert fence.content == f"```\n# OUT\n\n{text}\n"
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert "OUT" not in headings
    assert "How to check this" in headings
    assert not [token for token in tokens if token.type == "html_block"]


def test_a_unit_in_others_words_stands_beside_what_is_counted(stated):
    facts = json.loads(stated["plain"])
    assert "in the words of" not in PrivacyStatement(facts).to_markdown()
    words = PrivacyStatement({**facts, "unit": "one person: all rows"}).to_markdown()
    assert len(re.findall(r"one person: all rows \(in the words of [^)]*single rows\)", words)) == 3
    assert "which no ledger tells" in words
