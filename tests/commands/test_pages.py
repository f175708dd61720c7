"""What pages show is what the command line takes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clipless_dp.cli import COMMANDS, _parser, main

from .conftest import READ

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(?:    |\$ )python -m clipless_dp (.+)$", re.MULTILINE)


def shown():
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    return [(page.name, line) for page in pages for line in LINE.findall(page.read_text("utf-8"))]


def test_commands_on_pages_are_those_that_there_are():
    lines = shown()
    assert {line.split()[0] for page, line in lines if page == "commands.md"} >= {"plan", "train", "evaluate", "report"}
    for page, line in lines:
        asked = shlex.split(line.replace("…", "").split("#")[0])
        assert _parser().parse_args(asked).command == asked[0], page


def test_the_page_names_every_command():
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    for module in COMMANDS:
        assert f"| `{module.__name__.rpartition('.')[2]}` |" in text


@pytest.mark.slow
def test_a_life_from_a_terminal(table, tmp_path):
    def run(*arguments, status=0):
        command = [sys.executable, "-m", "clipless_dp", *map(str, arguments)]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert finished.returncode == status, finished.stderr
        assert "Traceback" not in finished.stderr
        return finished.stdout + finished.stderr

    assert "preset tables" in run("plan", "--data", table, *READ, "--epsilon", "8")
    printed = run("train", "--data", table, *READ, "--epsilon", "8", "--delta", "1e-3", "--out", "model.pt")
    assert re.search(r"test AUROC +[\d.]+ %", printed)
    assert "all 300 samples" in run("evaluate", "model.pt", "--data", table)
    assert run("predict", "model.pt", "--data", table).count("\n") == 301
    assert "certified" in run("certify", "model.pt", "--data", table, "--sigma", "0.5", "--draws", "50")
    assert "worst ratio" in run("audit", "model.pt")
    run("report", "model.pt", "--out", "statement", "--organisation", "Clinic")
    run("export", "model.pt", "--out", "model", "--formats", "pt2")
    assert "error:" in run("train", "--data", "none.csv", "--epsilon", "8", "--delta", "1e-3", status=2)
    run("train", status=2)


def test_what_is_read_from_sys_argv_is_what_is_given(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["clipless-dp", "presets", "tables"])
    assert main() == 0
    assert "eight public tables" in capsys.readouterr().out
