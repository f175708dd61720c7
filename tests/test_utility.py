"""The comparison of accuracies: what is done is kept, and a clipped run spends what it was told."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "utility.py"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    out = tmp_path / "utility.json"

    def compare(*methods):
        arguments = ["--data", "digits", "--epsilons", "3", "--seeds", "0", "--share", "0.05", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--methods", *methods])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads(out.read_text("utf-8"))["runs"]

    (first,) = compare("gradient gates")
    runs = compare("gradient gates", "DP-SGD (Opacus)")
    assert len(runs) == 2
    assert first in runs, "what is there is not run again"
    clipped = next(run for run in runs if run != first)
    # Calibrated to 0.01 %, on one ledger of as many steps.
    assert (clipped["steps"], clipped["noise_multiplier"]) == (first["steps"], first["noise_multiplier"])
    assert 2.9 < clipped["spent"] <= 3.0
    table = out.with_suffix(".md").read_text("utf-8")
    assert "| DP-SGD (Opacus) |" in table
    assert "| gradient gates |" in table
    assert f"{100 * first['accuracy']:.2f} (1)" in table
    assert "gradient gates" in capsys.readouterr().out
