"""Function rules see the whole call: every argument that torch takes is named by the rule, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from clipless_dp import UnsupportedModuleError
from clipless_dp.rules import RuleError, base, is_builtin
from tests.soundness.attack import Traced, add_or_remove_one, wrap

Call = Callable[[Tensor, Tensor], Tensor]
SHAPE = (2, 4, 4)


class Two(nn.Module):
    """A function of two values that weights have made."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.first, self.second = call, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        return self.call(self.first(values), self.second(values))


ACCEPTED: dict[str, Call] = {
    "torch.add": lambda a, b: torch.add(a, b),
    "torch.add by names": lambda a, b: torch.add(input=a, other=b, alpha=1),
    "torch.add by numpy's names": lambda a, b: torch.add(x1=a, x2=b),
    "add": lambda a, b: a.add(b),
    "add by name": lambda a, b: a.add(other=b),
    "sub": lambda a, b: a.sub(b, alpha=1),
    "torch.sub": lambda a, b: torch.sub(a, b),
    "operators": lambda a, b: -(a - b) + 2 * a + b / 3.0,
    "mul": lambda a, b: a.mul(3) + b.mul(other=0.5),
    "torch.mul": lambda a, b: torch.mul(2.0, a) + torch.mul(b, other=0.5),
    "torch.div": lambda a, b: torch.div(a, 2) + b.div(other=4),
    "cat": lambda a, b: torch.cat([a, b], 2) + torch.cat(tensors=(b, a), dim=2),
    "concatenate by numpy's name": lambda a, b: torch.concatenate([a, b], axis=1),
    "stack": lambda a, b: torch.stack([a, b], dim=-1),
    "mean": lambda a, b: a.mean(1) + torch.mean(b, dim=1),
    "mean, keepdim": lambda a, b: a.mean(1, True) + torch.mean(b, (1,), keepdim=True),
    "mean by numpy's names": lambda a, b: a.mean(axis=1, keepdims=True) + torch.mean(b, axis=1, keepdims=True),
    "flatten": lambda a, b: a.flatten(1) + torch.flatten(b, start_dim=1, end_dim=-1),
    "reshape": lambda a, b: a.reshape(-1, 32) + torch.reshape(b, shape=(-1, 32)) + a.reshape((-1, 32)),
    "view": lambda a, b: a.view(a.shape[0], -1) + b.view(size=(-1, 32)),
    "unflatten": lambda a, b: a.unflatten(3, (2, 2)) + torch.unflatten(b, dim=3, sizes=(2, 2)),
    "permute": lambda a, b: a.permute(0, 2, 1, 3) + torch.permute(b, (0, 2, 1, 3)) + a.permute(dims=(0, 2, 1, 3)),
    "transpose": lambda a, b: a.transpose(1, 2) + torch.transpose(b, dim0=1, dim1=2),
    "swapaxes": lambda a, b: a.swapaxes(1, 2) + torch.swapaxes(b, axis0=1, axis1=2),
    "unsqueeze": lambda a, b: a.unsqueeze(1) + torch.unsqueeze(b, dim=1),
    "neg": lambda a, b: a.neg() + torch.neg(b),
    "relu": lambda a, b: functional.relu(a, True) + torch.relu(b) + b.relu() + functional.relu(a, inplace=False),
    "tanh": lambda a, b: a.tanh() + torch.tanh(input=b) + functional.tanh(a),
    "abs": lambda a, b: a.abs() + torch.abs(b),
    "copies": lambda a, b: a.clone(memory_format=torch.preserve_format) + b.contiguous(),
    "max_pool2d": lambda a, b: functional.max_pool2d(a, 2, 1, 0, 1, False) + functional.max_pool2d(b, 2, stride=1),
    "avg_pool2d": lambda a, b: (
        functional.avg_pool2d(a, 2, 1, 0, False, True, 3) + functional.avg_pool2d(b, 2, 1, divisor_override=3)
    ),
    "adaptive_avg_pool2d": lambda a, b: (
        functional.adaptive_avg_pool2d(a, 2) + functional.adaptive_avg_pool2d(b, (2, 2))
    ),
}

REFUSED: dict[str, Call] = {
    "torch.add with a positional factor": lambda a, b: torch.add(a, 30, b),
    "torch.sub with a positional factor": lambda a, b: torch.sub(a, 30, b),
    "add with a positional factor": lambda a, b: a.add(30, b),
    "sub with a positional factor": lambda a, b: a.sub(30, b),
    "a factor by name": lambda a, b: torch.add(a, b, alpha=30),
    "a factor by name, method": lambda a, b: a.sub(other=b, alpha=0.5),
    "a factor computed from a shape": lambda a, b: torch.add(a, b, alpha=a.shape[1]),
    "rounding by name": lambda a, b: a.div(2, rounding_mode="floor") + b,
    "rounding by name, function": lambda a, b: torch.div(a, 2, rounding_mode="trunc") + b,
    "a mean of another dtype": lambda a, b: a.mean(1, dtype=torch.float64) + b.mean(1),
    "bits as another dtype": lambda a, b: a.view(torch.int64) + b,
    "bits as another dtype, by name": lambda a, b: a.view(dtype=torch.int64) + b,
    "a product of two values": lambda a, b: torch.mul(a, other=b),
    "indices": lambda a, b: functional.max_pool2d(a, 2, 1, 0, 1, False, True)[0] + b,
}


@pytest.mark.filterwarnings("ignore:This overload of:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_no_rule_covers_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModuleError):
        wrap(Two(REFUSED[name]).double(), SHAPE)


@pytest.mark.parametrize("function", [torch.neg, torch.abs, torch.tanh], ids=lambda function: function.__name__)
def test_a_result_that_is_written_over_a_value_is_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(UnsupportedModuleError, match="does not cover"):
        wrap(Traced(lambda x: function(x, out=x)), (3,))


@pytest.mark.parametrize("name", ACCEPTED)
def test_arguments_are_understood_by_place_and_by_name_and_the_bounds_hold(name: str) -> None:
    torch.manual_seed(0)
    model = wrap(Two(ACCEPTED[name]).double(), SHAPE)
    inputs, targets = torch.randn(6, *SHAPE).double(), 1e3 * torch.randn(6, *model.output_shape).double()
    add_or_remove_one(model, inputs, targets)


def test_every_function_rule_of_the_library_names_the_arguments_that_it_covers() -> None:
    for target, rule in base._FUNCTION_RULES.items():
        if is_builtin(rule):
            assert isinstance(rule, base._Called), target


UNBOUNDED = {"reshape", "view", "permute", "piece"}


@pytest.mark.parametrize("target", [t for t, rule in base._FUNCTION_RULES.items() if is_builtin(rule)])
def test_a_function_rule_refuses_an_argument_more_and_one_of_a_name_that_it_does_not_know(target: Any) -> None:
    rule = base.find_function_rule(target)
    assert rule is not None
    node = fx.Graph().placeholder("values")
    for surprise in ("out", "inplace_", "scale", "generator"):
        with pytest.raises(RuleError, match="does not cover"):
            rule(None, (node,), {surprise: node})
    if getattr(target, "__name__", target) not in UNBOUNDED:
        with pytest.raises(RuleError, match="does not cover"):
            rule(None, (node,) * 9, {})


def test_a_users_rule_may_name_its_arguments_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FUNCTION_RULES", dict(base._FUNCTION_RULES))
    seen = []

    @base.register_function_rule(torch.sin, "sin", call=lambda input: None)
    def sine_rule(context: base.RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> base.LayerBounds:
        seen.append((args, sorted(kwargs)))
        return base.LayerBounds(output_norm=lambda: context.input_norm)

    wrap(Traced(lambda x: torch.sin(x).sin()), (3,))
    assert set(map(str, seen)) == {"((), ['input'])"}
    assert not is_builtin(base._FUNCTION_RULES[torch.sin])
    with pytest.raises(UnsupportedModuleError, match=r"only \(input\) has one"):
        wrap(Traced(lambda x: torch.sin(x, out=x)), (3,))


def test_a_rule_that_takes_calls_as_they_come_is_caught_by_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        base._Called, "__call__", lambda self, context, args, kwargs: self.rule(context, args, {"alpha": 1})
    )
    torch.manual_seed(0)
    model = wrap(Two(lambda a, b: torch.add(a, 30, b)).double(), SHAPE)
    inputs, targets = torch.randn(6, *SHAPE).double(), 1e3 * torch.randn(6, *model.output_shape).double()
    with pytest.raises(AssertionError):
        add_or_remove_one(model, inputs, targets)
