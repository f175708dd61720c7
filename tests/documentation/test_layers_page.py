"""docs/layers.md is what the rules say today."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from clipless_dp import layers

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "layers.py"), run_name="layers")


def test_the_page_is_what_the_rules_say(script: dict[str, Any]) -> None:
    assert (DOCS / "layers.md").read_text("utf-8") == script["page"](), "run python docs/layers.py"


def test_every_rule_states_its_bounds_in_its_docstring(script: dict[str, Any]) -> None:
    for rule, kinds in script["rules"]().items():
        assert script["formulas"](rule, "Y"), rule
        assert script["formulas"](rule, "K") or kinds in ([nn.Embedding], [nn.EmbeddingBag]), rule


def test_every_rule_that_bounds_gradients_says_so_and_no_other_does(script: dict[str, Any]) -> None:
    for rule, kinds in script["rules"]().items():
        trained = script["example"](kinds) is not None or any(kind in script["HAVE_GATES"] for kind in kinds)
        assert bool(script["formulas"](rule, "Δ")) == trained, rule
        made = script["example"](kinds)
        assert made is None or any(True for _ in made[0].parameters()), rule


def test_every_layer_of_the_library_is_on_the_page(script: dict[str, Any]) -> None:
    text = (DOCS / "layers.md").read_text("utf-8")
    for name in layers.__all__:
        if script["is_layer"](getattr(layers, name)):
            assert f".{name}`" in text, name
