from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / script), run_name="__main__")
    return capsys.readouterr().out


def test_the_demo_prints_accuracy_what_was_spent_and_the_checkpoint(tmp_path, monkeypatch, capsys):
    path = tmp_path / "digits.pt"
    printed = run("examples/digits.py", "--checkpoint", str(path), monkeypatch=monkeypatch, capsys=capsys)
    # 93 % as a rule, and 10 % by chance.
    assert float(re.search(r"accuracy\s+([\d.]+) %", printed)[1]) > 80
    assert 2.9 < float(re.search(r"epsilon\s+([\d.]+)", printed)[1]) <= 3.0
    assert str(path) in printed
    assert path.exists()


def test_the_loop_of_ones_own_learns(monkeypatch, capsys):
    printed = run("examples/own_loop.py", monkeypatch=monkeypatch, capsys=capsys)
    # Chance is 10 %.
    assert float(re.search(r"accuracy ([\d.]+) %", printed)[1]) > 60
    assert "Linear" in printed


def test_the_accelerate_loop_learns(monkeypatch, capsys):
    pytest.importorskip("accelerate")
    printed = run("examples/accelerate_loop.py", "--epochs", "10", monkeypatch=monkeypatch, capsys=capsys)
    # Chance is 10 %.
    assert float(re.search(r"accuracy ([\d.]+) %", printed)[1]) > 60


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {"__name__": "readme"})
    assert (tmp_path / "runs" / "model.pt").exists()
