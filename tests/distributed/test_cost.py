"""What a step costs is what the formulas of ``benchmarks/cost.py`` and of docs/cost.md say, at two sizes."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.ranks import Failure, Ranks

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(getattr(fsdp, "FSDPModule", None), "set_force_sum_reduction_for_comms"):
    pytest.skip("this torch cannot sum sharded gradients", allow_module_level=True)


def _loaded() -> ModuleType:
    script = Path(__file__).parent.parent.parent / "benchmarks" / "cost.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_cost", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up annotations, and counts are found that another process sends.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cost: Any = _loaded()
STACKS = [cost.Stack(64, 3, 8), cost.Stack(128, 2, 12)]


@pytest.mark.parametrize("route", [cost.PLAIN, *cost.GATED])
@pytest.mark.parametrize("tokens", [0, 8, 48], ids=["one vector", "few tokens", "many tokens"])
def test_flops_of_a_step_behind_gates_are_those_of_the_formula(route: str, tokens: int) -> None:
    for stack in STACKS:
        case = route, "replicated", stack._replace(tokens=tokens)
        assert cost.differences(case, [cost.count(*case)]) == []
        assert cost.prefers_gram(48, stack.width, stack.width, cost._TOKEN_GRAM_GAIN) is False, "both ways are taken"


def _counts(cases: list[Any]) -> list[Any]:
    return [cost.count(*case) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("route", cost.ROUTES)
@pytest.mark.parametrize("layout", cost.LAYOUTS)
def test_ranks_send_and_draw_what_the_formulas_say(ranks: Ranks, route: str, layout: str) -> None:
    cases = [(route, layout, stack) for stack in STACKS]
    found = ranks.run(_counts, cases)
    assert not any(isinstance(answer, Failure) for answer in found), found
    for case, counts in zip(cases, zip(*found, strict=True), strict=True):
        assert cost.differences(case, counts) == []


def test_another_count_is_told_from_the_formula() -> None:
    case = "gated", "replicated", STACKS[0]
    (right,) = [cost.count(*case)]
    for change in ({"flops": right.flops + 2}, {"drawn": 2 * right.drawn}, {"carried": {"broadcast": 4}}):
        assert len(cost.differences(case, [dataclasses.replace(right, **change)])) == 1


@pytest.mark.parametrize("width", [256, 512])
def test_projections_and_certificates_cost_a_few_products_of_a_weight_s_size_whatever_the_batch(width: int) -> None:
    for route in cost.WHOLE:
        for rows in (64, 128) if width == 256 else (64,):
            stack = cost.Stack(width, 2, rows)
            added = cost.count(route, "replicated", stack).flops - cost.flops("gated", "replicated", stack, 1)
            if route == "orthogonal":
                # Half of a Gram matrix in blocks of 128 rows, the product of one iteration, and the sums of two stamps.
                assert added == 2 * (3 * width**3 + 132 * width**2)
            else:
                # The same half, a factorisation or two, and products with vectors.
                assert 2 * width**3 < added < 6 * width**3
