"""The inherited checks pass on a right layer, and each classic mistake fails the one that is meant for it."""

from __future__ import annotations

import ast
import math
import re
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import LayerBounds, RuleContext, gates, register_rule
from clipless_dp.model import outermost
from clipless_dp.norms.operators import ConvOperator
from clipless_dp.rules import base
from clipless_dp.testing import BoundBroken, BoundTooLoose, Inconsistent, LipschitzLayerTestCase

ROOT = Path(__file__).parent.parent.parent
LENGTH = 9


class Blur(nn.Module):
    """Three taps along the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 3))

    def forward(self, values: Tensor) -> Tensor:
        rows = values.reshape(-1, 1, values.shape[-1])
        return functional.conv1d(rows, self.weight, padding=1).reshape(values.shape)


def blur_bounds(context: RuleContext, *, output: float = 1.0, slope: float = 1.0, gradient: float = 1.0) -> LayerBounds:
    """The right bounds, times factors."""
    operator = ConvOperator(context.input_shape[-1:], (1,), ((1, 1),), (1,), 1, 3)
    return LayerBounds(
        output_norm=lambda: output * context.norm("weight", operator) * context.input_norm,
        lipschitz=lambda: slope * context.norm("weight", operator),
        gradients={"weight": lambda: gradient * math.sqrt(3.0) * context.input_norm},
    )


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))


def case_of(
    forward: Callable[[Any, Tensor], Tensor] = Blur.forward,
    rule: Callable[[Any, RuleContext], LayerBounds] | None = None,
    *,
    shape: tuple[int, ...] = (LENGTH,),
    **attributes: Any,
) -> LipschitzLayerTestCase:
    """The test case of a :class:`Blur` with another forward or rule."""
    kind = type("Layer", (Blur,), {"forward": forward})
    register_rule(kind)(rule or (lambda module, context: blur_bounds(context)))
    members = {"shapes": (shape,), "build": lambda self, shape: kind(), "steps": 4, **attributes}
    return type("TestLayer", (LipschitzLayerTestCase,), members)()  # type: ignore[no-any-return]


def checks(case: LipschitzLayerTestCase) -> Iterator[Callable[[], None]]:
    return (getattr(case, name) for name in dir(case) if name.startswith("test_"))


@pytest.mark.slow
def test_a_right_layer_passes_every_check_on_vectors_and_on_maps() -> None:
    for case in (case_of(attained={"weight": 0.7}), case_of(shape=(2, 3, 4))):
        for check in checks(case):
            check()


@pytest.mark.slow
def test_the_class_runs_under_unittest_too() -> None:
    right = case_of()
    kind = type("TestUnderUnittest", (type(right), unittest.TestCase), {})
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
    assert result.testsRun == 9
    assert result.wasSuccessful(), result.failures + result.errors


def scaled(**factors: float) -> Callable[[Any, RuleContext], LayerBounds]:
    return lambda module, context: blur_bounds(context, **factors)


WRONG_RULES: tuple[tuple[str, Callable[[Any, RuleContext], LayerBounds], str, str], ...] = (
    ("K too small", scaled(slope=0.8), "test_no_signal_at_any_loss_scale_passes_a_bound", "K·G"),
    ("Y too small", scaled(output=0.8), "test_no_signal_at_any_loss_scale_passes_a_bound", "Y"),
    ("√N missing", scaled(gradient=3.0**-0.5), "test_no_signal_at_any_loss_scale_passes_a_bound", "layer.weight"),
    (
        "X missing",
        lambda module, context: LayerBounds(
            output_norm=blur_bounds(context).output_norm,
            lipschitz=blur_bounds(context).lipschitz,
            gradients={"weight": math.sqrt(3.0)},
        ),
        "test_the_bounds_hold_for_signals_of_other_sizes",
        "layer.weight",
    ),
    (
        "enough for ordinary weights only",
        lambda module, context: LayerBounds(
            output_norm=lambda: 9.0 * context.input_norm,
            lipschitz=9.0,
            gradients={"weight": lambda: math.sqrt(3.0) * context.input_norm},
        ),
        "test_no_parameters_pass_a_bound",
        "Y|K",
    ),
    (
        "enough for Gaussian taps only",
        lambda module, context: LayerBounds(
            output_norm=lambda: 1.5 * float(module.weight.detach().norm()) * context.input_norm,
            lipschitz=lambda: 1.5 * float(module.weight.detach().norm()),
            gradients={"weight": lambda: math.sqrt(3.0) * context.input_norm},
        ),
        "test_no_parameters_pass_a_bound",
        "Y|K",
    ),
    (
        "other in eval()",
        lambda module, context: blur_bounds(context, output=1.0 if module.training else 0.3),
        "test_the_bounds_hold_in_eval_mode",
        "Y",
    ),
)


@pytest.mark.parametrize(
    ("rule", "check", "message"), [line[1:] for line in WRONG_RULES], ids=[x[0] for x in WRONG_RULES]
)
def test_a_wrong_rule_fails(rule: Callable[[Any, RuleContext], LayerBounds], check: str, message: str) -> None:
    with pytest.raises(BoundBroken, match=message):
        getattr(case_of(rule=rule), check)()


def in_eval(self: Any, values: Tensor) -> Tensor:
    return Blur.forward(self, values) if self.training else 2.0 * Blur.forward(self, values)


def centred(self: Any, values: Tensor) -> Tensor:
    return Blur.forward(self, values - values.mean(0))


def scaled_by_the_batch(self: Any, values: Tensor) -> Tensor:
    return Blur.forward(self, values / values.detach().norm().clamp(min=values.norm(dim=-1).max().item()))


def averaged(self: Any, values: Tensor) -> Tensor:
    return Blur.forward(self, values) / len(values)


class _MixedCotangents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] / cotangents[0].norm().clamp(min=1.0)


def clipped_together(self: Any, values: Tensor) -> Tensor:
    return _MixedCotangents.apply(Blur.forward(self, values))  # type: ignore[no-any-return]


def in_bfloat16(self: Any, values: Tensor) -> Tensor:
    return Blur.forward(self, values.bfloat16().to(values.dtype))


def in_float32(self: Any, values: Tensor) -> Tensor:
    return Blur.forward(self, values).float()


def under_its_own_autocast(self: Any, values: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return Blur.forward(self, values).to(values.dtype)


def from_memory(self: Any, values: Tensor) -> Tensor:
    shape = values.shape
    return Blur.forward(self, torch.as_strided(values, shape, torch.empty(shape, device="meta").stride()))


WRONG_MODULES: tuple[tuple[str, Callable[[Any, Tensor], Tensor], str, type[Exception], str], ...] = (
    ("twice as much in eval()", in_eval, "test_the_bounds_hold_in_eval_mode", BoundBroken, "Y|K"),
    ("batch mean subtracted", centred, "test_samples_do_not_mix", Inconsistent, "reach"),
    ("batch norm, detached", scaled_by_the_batch, "test_samples_do_not_mix", Inconsistent, "inputs of others"),
    ("divided by the batch's size", averaged, "test_samples_do_not_mix", Inconsistent, "in a batch"),
    ("cotangents clipped together", clipped_together, "test_samples_do_not_mix", Inconsistent, "cotangents of others"),
    ("rounded to bfloat16", in_bfloat16, "test_float32_and_float64_agree", Inconsistent, "bfloat16"),
    ("returned as float32", in_float32, "test_float32_and_float64_agree", Inconsistent, "float32"),
    ("its own autocast", under_its_own_autocast, "test_float32_and_float64_agree", Inconsistent, "bfloat16"),
    ("memory read as it lies", from_memory, "test_memory_layouts_agree", Inconsistent, "other strides"),
)


@pytest.mark.parametrize(
    ("forward", "check", "error", "message"), [line[1:] for line in WRONG_MODULES], ids=[x[0] for x in WRONG_MODULES]
)
def test_a_wrong_module_fails(
    forward: Callable[[Any, Tensor], Tensor], check: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(case_of(forward, shape=(2, 3, 5)), check)()


class Moody(nn.Module):
    """Traced through, so that what it does while training is what the graph does for ever."""

    def forward(self, values: Tensor) -> Tensor:
        return torch.relu(values) if self.training else values + values


def test_a_branch_that_tracing_froze_fails() -> None:
    case = case_of(build=lambda self, shape: Moody())
    with pytest.raises(Inconsistent, match=r"in eval\(\) the traced graph and the module differ"):
        case.test_the_traced_graph_computes_what_the_module_does()


def test_a_gate_that_lets_autocast_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of()
    case.test_autocast_is_refused()
    for module in (gates.signal, outermost):
        monkeypatch.setattr(module, "outside_autocast", lambda values: values)
    with pytest.raises(Inconsistent, match="backward"):
        case.test_autocast_is_refused()


def test_a_loose_rule_fails_where_the_share_that_it_should_reach_is_stated() -> None:
    case = case_of(rule=scaled(gradient=2.0), attained={"weight": 0.7})
    with pytest.raises(BoundTooLoose, match=r"layer\.weight reaches only"):
        case.test_no_signal_at_any_loss_scale_passes_a_bound()


def test_a_layer_that_cannot_be_differentiated_twice_is_attacked_all_the_same() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            return cotangents[0].clone()

    def forward(self: Any, values: Tensor) -> Tensor:
        return Once.apply(Blur.forward(self, values))  # type: ignore[no-any-return]

    case_of(forward).test_no_signal_at_any_loss_scale_passes_a_bound()
    case_of(forward).test_no_parameters_pass_a_bound()
    with pytest.raises(BoundBroken, match="K·G"):
        case_of(forward, scaled(slope=0.5)).test_no_signal_at_any_loss_scale_passes_a_bound()


@pytest.mark.parametrize("missing", ["shapes", "build"])
def test_what_a_subclass_must_supply_is_said(missing: str) -> None:
    members = {"shapes": ((4,),), "build": lambda self, shape: nn.ReLU()}
    del members[missing]
    case = type("TestNothing", (LipschitzLayerTestCase,), members)()
    with pytest.raises(NotImplementedError, match=f"TestNothing must say.*{missing}"):
        case.test_samples_do_not_mix()


def test_the_toolkit_needs_no_test_framework() -> None:
    for path in (ROOT / "clipless_dp" / "testing").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(re.match("pytest|unittest|hypothesis", name) for name in names), path


@pytest.mark.slow
def test_the_code_of_the_page_on_extending_runs_and_its_test_case_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    monkeypatch.setattr(base, "_FUNCTION_RULES", dict(base._FUNCTION_RULES))
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "extending"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    for check in checks(names["TestChannelScale"]()):
        check()
