"""Gates as ordinary operations: what a network computes, without what training does to gradients, for other runtimes.

A gate's own forward pass looks at numbers where it can and has a backward pass of its own. Exporters record one of its
ways (``torch.jit.trace``), or find operations that other runtimes lack. The forms here compute the same values by
norms, quotients and choices of elements alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from clipless_dp.gates.arithmetic import LARGEST_NORM, largest_norm, per_sample
from clipless_dp.gates.gradient_layers import UNGATED
from clipless_dp.gates.signal import BallProjection, CotangentGate, SphereScaling
from clipless_dp.modules import Unscripted

_Form = Callable[[Any], nn.Module]
_FORMS: dict[type[nn.Module], _Form] = {}
_Made = TypeVar("_Made", bound=_Form)


def plain_form(kind: type[nn.Module]) -> Callable[[_Made], _Made]:
    """Registers what makes the plain form of modules of one exact type.

    Args:
        kind: the type.
    """

    def add(form: _Made) -> _Made:
        _FORMS[kind] = form
        return form

    return add


def plain_copy(net: nn.Module) -> nn.Module:
    """A copy of a network in ``eval`` mode with plain forms in place of the modules that have one.

    Args:
        net: of which nothing is shared with the copy, and nothing is changed.
    """
    return _replaced(copy.deepcopy(net), {}).eval().requires_grad_(False)


def _replaced(part: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """One part and all below it; what is used at several places stays one module."""
    if id(part) in known:
        return known[id(part)]
    if (form := _FORMS.get(type(part))) is not None:
        known[id(part)] = form(part)
        return known[id(part)]
    if (kind := UNGATED.get(type(part))) is not None:
        known[id(part)] = _twin(part, kind)
        return known[id(part)]
    known[id(part)] = part
    for name, child in list(part._modules.items()):
        if child is not None:
            part._modules[name] = _replaced(child, known)
    return part


def scaled(values: Tensor, cap: float, floor: float, largest: float) -> tuple[Tensor, Tensor]:
    """``cap·x/max(‖x‖, floor)`` per sample, and which samples have a norm of at most ``largest``; others become zero.

    Args:
        values: ``(B, ...)``.
        cap: radius of the gate.
        floor: norm below which samples are scaled by one factor.
        largest: see above.
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=wide)
    known = norms <= largest
    factors = torch.where(norms <= largest_norm(cap, wide), cap / norms.clamp(min=floor), torch.zeros_like(norms))
    moved = values * per_sample(factors, values).to(values.dtype)
    return torch.where(per_sample(known, values), moved, torch.zeros_like(moved)), known


class PlainScaling(Unscripted, nn.Module):
    """``cap·x/max(‖x‖, floor)`` per sample: a sphere, or where the floor is the cap a ball.

    Args:
        cap: radius.
        floor: norm below which samples are scaled by ``cap/floor`` only.

    Shape:
        ``(B, ...)`` to the same shape.
    """

    def __init__(self, cap: float, floor: float) -> None:
        super().__init__()
        self.cap, self.floor = cap, floor

    def forward(self, values: Tensor) -> Tensor:
        """Scales each sample."""
        return scaled(values, self.cap, self.floor, LARGEST_NORM)[0]

    def extra_repr(self) -> str:
        """Radius and floor."""
        return f"cap={self.cap:g}, floor={self.floor:g}"


class InputBall(Unscripted, nn.Module):
    """The input gate: samples on a ball, and which of them have a norm.

    Args:
        radius: of the ball; infinite: samples stay as they are.

    Shape:
        ``(B, ...)`` to the same shape and ``(B,)``.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Projects each sample."""
        if math.isinf(self.radius):
            known = values.flatten(1).isfinite().all(1)
            return torch.where(per_sample(known, values), values, torch.zeros_like(values)), known
        return scaled(values, self.radius, self.radius, largest_norm(self.radius, values.dtype))


@plain_form(SphereScaling)
def _of_sphere(gate: SphereScaling) -> nn.Module:
    return PlainScaling(gate.radius, gate.floor)


@plain_form(BallProjection)
def _of_ball(gate: BallProjection) -> nn.Module:
    return PlainScaling(gate.radius, gate.radius)


@plain_form(CotangentGate)
def _of_cotangents(gate: CotangentGate) -> nn.Module:
    return nn.Identity()


def _twin(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A layer of the type that another one is the gated form of, with the very same parameters."""
    made = kind.__new__(kind)
    made.__dict__.update(layer.__dict__)
    return made
