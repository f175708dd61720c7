"""What whoever signs reads first: a box, what is not covered, pictures; and that a statement can be checked."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import accounting
from accounting.cli import main
from clipless_dp import CheckpointError, ConfigurationError, ReproducibleNoise, report
from clipless_dp.commands.report import statement_of
from clipless_dp.modules import digest_of
from clipless_dp.statement import PrivacyStatement
from clipless_dp.statement.brief import best_guess, of_thousand, tier, verdict
from clipless_dp.statement.figures import found_figure, guesses_figure
from tests.statement.test_report import parsed, trained

FORMER = Path(__file__).parents[1] / "data" / "format-1-statement.json"
ABOUT = {
    "organisation": "A <script>alert(1)</script> | & Sons",
    "purpose": "sorts [letters](javascript:alert(1)) `fast`",
    "data_set": 'visits" onload="x',
    "contact": "dpo@clinic.example",
}


@pytest.fixture(scope="module")
def optimizer():
    return trained(steps=20, accountant="prv")


@pytest.fixture(scope="module")
def statement(optimizer):
    return report(optimizer, delta=1e-3, **ABOUT)


def test_the_box_comes_first_then_what_is_not_covered_and_the_technical_part_is_folded(statement):
    page, text = statement.to_html(), statement.to_markdown()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:3] == ["In short", "Findings", "What is not covered"]
    assert re.findall("^###? (.*)$", text, re.MULTILINE) == [
        *headings[: headings.index("Terms")],
        html.unescape(re.search("<summary>(.*)</summary>", page)[1]),
        *headings[headings.index("Terms") :],
    ]
    box = page[page.index('<div class="box">') : page.index("What is not covered")]
    for words in (
        "Verdict",
        "Stated by",
        "Contact",
        "Model",
        "Purpose of the model",
        "Data set",
        "Written",
        "δ = 0.001",
    ):
        assert f'<th scope="row">{words}</th>' in box
    folded = page[page.index("<details>") : page.index("</details>")]
    for title in ("Terms", "Risk", "Ledger", "Bounds by layer", "Noise by parameter"):
        assert f"<h2>{title}</h2>" in folded
        assert f"<h2>{title}</h2>" not in page.replace(folded, "")


def test_who_states_it_stands_in_each_form_and_writes_no_markup_of_its_own(statement):
    parser = parsed(statement.to_html())
    shown = "".join(parser.words)
    for text in ABOUT.values():
        assert text in shown
    assert not [some for some in parser.attributes if some[0] == "script" or some[1] in {"href", "src", "onload"}]
    rows = [line for line in statement.to_markdown().splitlines() if line.startswith(("| Stated by", "| Purpose"))]
    assert rows == [
        r"| Stated by | A \<script>alert(1)\</script> \| & Sons |",
        r"| Purpose of the model | sorts \[letters](javascript:alert(1)) \`fast\` |",
    ]
    assert json.loads(statement.to_json())["about"] == ABOUT


def test_a_statement_is_signed_later_and_says_nothing_else_for_it(optimizer, statement):
    plain = report(optimizer, delta=1e-3)
    assert "about" not in plain.facts
    assert plain.to_markdown().count("not stated") == len(ABOUT)
    signed = plain.signed(**ABOUT)
    assert {**signed.facts, "created": 0} == {**statement.facts, "created": 0}
    assert {name: part for name, part in signed.facts.items() if name != "about"} == plain.facts
    again = signed.signed(contact=" other@clinic.example ", purpose=None)
    assert again.facts["about"] == {**ABOUT, "contact": "other@clinic.example"}


MARKUP = [
    r"\<img src=x onerror=alert(1)>", r"\[x](https://evil)", "[a [b] c](https://evil)", "![x](http://evil/x.png)",
    r"\\`code`", r"\| new cell |", "**strong**", "__strong__", "_a_", "~~gone~~", "&lt;b&gt;", "&#106;", "a\\",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKUP)
def test_no_mark_of_a_name_is_markup_and_all_of_it_is_read(optimizer, text):
    lines = report(optimizer, delta=1e-3, organisation=text).to_markdown().splitlines()
    cell = next(line for line in lines if line.startswith("| Stated by"))[len("| Stated by | ") : -len(" |")]
    # Whoever renders it reads an escaped mark as the mark, and what is left by itself is none.
    left, read = re.sub(r"\\([!-/:-@[-`{-~])", "", cell), re.sub(r"\\([!-/:-@[-`{-~])", r"\1", cell)
    assert read == text
    assert not re.search(r"[\\|<`\[*~]|&#?\w+;|\b_|_\b", left)


@pytest.mark.parametrize(
    "text", [*MARKUP, "# Verdict: strong", "> said", "- one", "+ one", "3. three", "3) three", "--- "]
)
def test_no_mark_of_a_title_a_unit_or_a_note_is_markup(optimizer, text):
    lines = report(optimizer, delta=1e-3, title=text, notes=[text], unit=text).to_markdown().splitlines()
    notes = lines[lines.index("## What is not covered") :]
    shown = [
        lines[0].removeprefix("# "),
        next(one for one in reversed(notes[: notes.index("## What is promised")]) if one),
    ]
    unescaped = [re.sub(r"\\([!-/:-@[-`{-~])", r"\1", one) for one in (shown[0], shown[1].removeprefix("* "))]
    assert [one.strip() for one in unescaped] == [text.strip()] * 2
    (unit,) = [line for line in lines if "The unit of privacy is" in line]
    for line in (shown[0], shown[1].removeprefix("* "), unit):
        left = re.sub(r"\\([!-/:-@[-`{-~])", "x", line)
        assert not re.search(r"[\\|<`\[*~]|&#?\w+;|\b_|_\b", left)
        # A heading's words are not the start of a line.
        assert line is shown[0] or not re.match(r"[#>]|[-+]\s|---|\d+[.)]\s", left)


def test_names_with_lines_within_them_stay_as_they_are(optimizer):
    text = "clinic_of_a & b! (1 > 0)"
    assert f"| Stated by | {text} |" in report(optimizer, delta=1e-3, organisation=text).to_markdown()


@pytest.mark.parametrize(
    "text", ["a\u200bb", "a\u200eb", "a\u200fb", "a\u061cb", "a\u00adb", "\ufeffa", "a\U000e0041b", "a\u2060b"]
)
def test_letters_that_are_not_seen_are_refused(optimizer, text):
    with pytest.raises(ConfigurationError, match=r"^organisation must be a text of one line"):
        report(optimizer, delta=1e-3, organisation=text)


@pytest.mark.parametrize(
    "text", ["", " ", 3, b"a", "a\nb", "a\u2028b", "a\0b", "a\x1b[2Jb", "a\u202eb", "a\u2066b", "\ud800"]
)
@pytest.mark.parametrize("name", list(ABOUT))
def test_what_is_no_text_of_one_line_is_refused_by_name(optimizer, name, text):
    with pytest.raises(ConfigurationError, match=f"^{name} must be a text of one line"):
        report(optimizer, delta=1e-3, **{name: text})


def test_letters_of_all_scripts_are_taken_and_other_names_refused(optimizer):
    texts = ["Klinik für Kinder\u00a0e. V.", "می\u200cخواهم", "东京医院", "👩\u200d⚕️"]
    for text in texts:
        assert report(optimizer, delta=1e-3).signed(organisation=text).facts["about"] == {"organisation": text}
    with pytest.raises(ConfigurationError, match=r"organisation, contact, purpose, data_set .*not officer"):
        report(optimizer, delta=1e-3).signed(officer="a")


def test_the_model_is_told_by_a_fingerprint_of_its_weights(optimizer, statement):
    net = optimizer.model.net
    digest = digest_of(net)
    assert statement.facts["model"] == {
        "kind": type(net).__name__,
        "trained": sum(parameter.numel() for parameter in net.parameters()),
        "frozen": 0,
        "weights": digest,
    }
    for form in (statement.to_markdown(), statement.to_html()):
        assert digest in form
        assert f"fingerprint of the weights {digest[:16]}" in form


def squares(svg, kind):
    found = re.search(rf'<path class="{kind}" d="([^"]*)"/>', svg)
    ends = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)", found[1] if found else "")
    return {(round(float(y) / 7.5 - 0.5), column) for x, y, end in ends for column in range(*cells(x, end))}


def cells(first, last):
    assert float(first) % 7.5 == float(last) % 7.5 == 0.0
    return round(float(first) / 7.5), round(float(last) / 7.5)


@given(st.integers(500, 1000))
def test_the_picture_has_a_square_for_each_of_a_thousand_guesses(right):
    svg = guesses_figure(right)
    chance, helped, wrong = (squares(svg, kind) for kind in ("chance", "helped", "wrong"))
    assert (len(chance), len(helped), len(wrong)) == (500, right - 500, 1000 - right)
    assert chance | helped | wrong == {(row, column) for row in range(20) for column in range(50)}


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=1, max_size=4))
def test_bars_are_as_long_as_what_they_show_and_stay_in_the_picture(rates):
    svg = found_figure(rates)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    shown = [count for wrong, found in rates for count in (found, wrong)]
    assert widths == [pytest.approx(max(1.0, 0.34 * count), abs=0.051) for count in shown]
    assert max(widths) <= 380.0


def test_the_picture_shows_what_the_words_and_the_ledger_say(statement):
    right = of_thousand(statement.facts["risk"]["success_at_even_odds"])
    bound = statement.facts["risk"]["success_at_even_odds"]
    assert bound <= right / 1000 < bound + 1e-3
    page = statement.to_html()
    assert len(squares(page, "helped")) == right - 500
    assert f"in at most {right} of 1000 guesses on average" in page
    assert f"at most {right - 500} more with the model" in page
    for one in statement.facts["risk"]["true_positive_rates"]:
        found = of_thousand(one["true_positive"])
        assert one["true_positive"] <= found / 1000 < one["true_positive"] + 1e-3
        assert f"at most {found} found" in page
        assert f"at most {found} of 1000 are found" in statement.to_markdown()


@given(st.floats(0.0, 20.0), st.floats(1e-12, 0.5))
def test_one_epsilon_and_delta_bound_the_guess_as_their_trade_off_curve_does(epsilon, delta):
    # Of the region that one (ε, δ) allows: where both error rates are equal they are smallest together.
    error = (1.0 - delta) / (1.0 + math.exp(epsilon))
    facts = {"epsilon": {"epsilon": epsilon, "delta": delta}}
    assert best_guess(facts) == pytest.approx(1.0 - error, rel=1e-12)
    assert best_guess({**facts, "risk": {"success_at_even_odds": 0.5}}) == 0.5


@pytest.mark.parametrize(
    ("epsilon", "findings", "words"),
    [
        (1.0, 0, "A strong formal guarantee .* Nothing in the records weakens it"),
        (1.001, 0, "A reasonable guarantee .* Nothing"),
        (10.0, 1, "A reasonable guarantee .* But 1 finding weakens it.* sign when all is explained"),
        (10.5, 2, "Weak as a formal guarantee .* But 2 findings weaken it"),
        (None, 1, "No promise.* Do not rely"),
    ],
)
def test_the_verdict_says_in_words_what_the_promise_is_worth(epsilon, findings, words):
    told = verdict({"epsilon": {"epsilon": epsilon}, "findings": ["one"] * findings})
    assert re.search(words, told)
    assert ("Nothing in the records" in told) == (not findings)
    if epsilon is not None:
        assert told.lower().startswith(tier(epsilon))


def test_findings_stand_in_the_box():
    page = report(trained(noise=ReproducibleNoise(1))).to_html()
    box = page[page.index('<div class="box warning">') : page.index("What is not covered")]
    assert "The noise was reproducible" in box
    assert "But 1 finding weakens it" in box


def test_a_statement_of_the_former_format_is_read_and_shown_in_the_new_order():
    former = PrivacyStatement.read(FORMER)
    page = former.signed(organisation="A clinic").to_html()
    assert parsed(page).words
    assert "A clinic" in page
    assert "ε = 0.8134" in former.to_markdown()
    # It holds no curve, so that one (ε, δ) bounds the guess.
    assert "694 of 1000 guesses" in former.to_markdown()


@pytest.fixture
def written(statement, tmp_path):
    return statement.save(tmp_path / "statement").files[1]


def test_accounting_explains_a_statement_and_finds_its_epsilon_in_its_ledger(written, capsys):
    assert main(["explain", str(written)]) == 0
    out = capsys.readouterr().out
    stated = json.loads(written.read_text("utf-8"))["epsilon"]["epsilon"]
    first, *others = re.findall(r"^epsilon = ([\d.]+) at delta = (\S+)", out, re.MULTILINE)
    assert float(first[0]) == pytest.approx(stated, rel=1e-5)
    assert [first[1], *(delta for _, delta in others)] == ["0.001", "1e-05", "1e-06", "1e-08"]
    assert "at delta = 0.001: this follows from its ledger" in out
    assert main(["explain", str(FORMER)]) == 0
    assert "at delta = 0.001: this follows from its ledger" in capsys.readouterr().out
    assert accounting.Ledger.load(written) == accounting.Ledger.from_state_dict(
        json.loads(written.read_text("utf-8"))["ledger"]["ledger"]
    )


def test_a_statement_whose_epsilon_was_made_smaller_is_refused(written, capsys):
    facts = json.loads(written.read_text("utf-8"))
    stated = facts["epsilon"]["epsilon"]
    for altered in (0.99 * stated, 0.0, -1.0):
        facts["epsilon"]["epsilon"] = altered
        written.write_text(json.dumps(facts), "utf-8")
        assert main(["explain", str(written)]) == 2
        assert "one was altered" in capsys.readouterr().err
    # A looser engine can tell neither way, and a larger ε is true as well.
    for factor, options, words in ((1.0, ["--accountant", "rdp"], "neither follows"), (1.5, [], "follows from its")):
        facts["epsilon"]["epsilon"] = factor * stated
        written.write_text(json.dumps(facts), "utf-8")
        assert main(["explain", str(written), *options]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("epsilon", [None, "3", [], {}, {"epsilon": "3", "delta": 0.1}, {"epsilon": 10**400}])
def test_a_statement_whose_epsilon_is_none_that_can_be_compared_is_refused(written, capsys, epsilon):
    written.write_text(json.dumps({**json.loads(written.read_text("utf-8")), "epsilon": epsilon}), "utf-8")
    assert main(["explain", str(written)]) == 2
    assert "altered" in capsys.readouterr().err


def test_a_statement_that_promises_nothing_is_explained_by_its_ledger_alone(written, capsys):
    facts = {**json.loads(written.read_text("utf-8")), "epsilon": {"epsilon": None, "delta": 0.1, "curve": []}}
    written.write_text(json.dumps(facts), "utf-8")
    assert main(["explain", str(written)]) == 0
    assert "states no epsilon" in capsys.readouterr().out


EDITED = {
    "success": lambda facts: facts["risk"].update(success_at_even_odds=0.5),
    "rates": lambda facts: [one.update(true_positive=one["false_positive"]) for one in facts["risk"]["curve"]],
    "relation": lambda facts: facts.update(relation="replace_one"),
    "curve": lambda facts: [one.update(epsilon=0.01) for one in facts["epsilon"]["curve"]],
    "steps": lambda facts: [one.update(noise_multiplier=100.0) for one in facts["steps"]["entries"]],
    "ledger's steps": lambda facts: facts["ledger"]["ledger"].update(entries=[]),
}


@pytest.mark.parametrize("case", EDITED)
def test_edited_numbers_are_refused_by_report_and_by_explain(written, case, capsys):
    facts = json.loads(written.read_text("utf-8"))
    EDITED[case](facts)
    written.write_text(json.dumps(facts), "utf-8")
    assert main(["explain", str(written)]) == 2
    assert "was altered" in capsys.readouterr().err
    with pytest.raises(accounting.errors.AccountingError, match="was altered"):
        statement_of(written, None)


@pytest.mark.parametrize("ledger", [None, {}, "gone", {"format": "accounting.ledger", "version": 99}])
def test_a_statement_without_its_ledger_is_shown_with_a_warning(written, ledger):
    facts = json.loads(written.read_text("utf-8"))
    facts["epsilon"]["epsilon"] = 0.03
    if ledger == "gone":
        del facts["ledger"]
    else:
        facts["ledger"] = ledger
    written.write_text(json.dumps(facts), "utf-8")
    shown = statement_of(written, None)
    (finding,) = [one for one in shown.findings if "without a ledger" in one]
    assert finding in shown.to_markdown()
    assert "Nothing in the records weakens it" not in shown.to_markdown()
    assert '<div class="box warning">' in shown.to_html()
    # Written and read again it is told once.
    again = shown.save(written)
    assert statement_of(again.files[1], None).findings == shown.findings


def test_findings_that_were_taken_out_are_told_again(tmp_path):
    file = report(trained(noise=ReproducibleNoise(1)), tmp_path / "statement").files[1]
    facts = json.loads(file.read_text("utf-8"))
    assert facts["findings"]
    found = {*facts["findings"]}
    file.write_text(json.dumps({**facts, "findings": []}), "utf-8")
    assert {*statement_of(file, None).findings} == found


@pytest.mark.parametrize(
    "edit",
    [
        lambda facts: facts["epsilon"].update(epsilon=True),
        lambda facts: facts["epsilon"]["curve"][1].update(epsilon=True),
        lambda facts: facts.update(findings="abc"),
        lambda facts: facts["risk"]["curve"][0].update(false_positive=0.0),
    ],
)
def test_values_that_are_none_are_refused_in_words(written, edit):
    facts = json.loads(written.read_text("utf-8"))
    edit(facts)
    written.write_text(json.dumps(facts), "utf-8")
    with pytest.raises(CheckpointError, match="no privacy statement"):
        statement_of(written, None)


def test_deep_json_is_refused_in_words(tmp_path, capsys):
    file = tmp_path / "deep.json"
    file.write_text("[" * 10**5, "utf-8")
    for refuse in (lambda path: statement_of(path, None), PrivacyStatement.read):
        with pytest.raises(CheckpointError):
            refuse(file)
    assert main(["explain", str(file)]) == 2
    assert "deep.json is no ledger" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"ledger": {}}', '{"ledger": {"ledger": {"ledger": 3}}}', '{"ledger": "a"}']
)
def test_what_holds_no_ledger_is_named(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text, "utf-8")
    assert main(["explain", str(tmp_path / "a.json")]) == 2
    assert "a.json is no ledger" in capsys.readouterr().err
