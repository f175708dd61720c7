"""The outermost gate: at the output of a wrapped network, where a backward pass enters, in compiled graphs too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipless_dp.gates import cotangent_gate
from clipless_dp.gates.arithmetic import drop_rows_, largest_norm, per_sample, sample_norms, scale_factors
from clipless_dp.model.own_loss import Own
from clipless_dp.model.register import registers
from clipless_dp.precision import outside_autocast
from clipless_dp.uncompiled import uncompiled

Enter = Callable[[Tensor | None, bool], None]
"""Told that a backward pass begins; with the norms of its cotangents, where a look at them waits for no device; and
whether some of these are known to come from elsewhere than ``model.loss``."""


class _OutermostGate(torch.autograd.Function):
    """The cotangent gate at the output, by which a backward pass enters."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, limit: float, enter: Enter | None, token: Tensor | None, own: Own | None
    ) -> Tensor:
        ctx.limit, ctx.enter, ctx.own = limit, enter, own
        ctx.save_for_backward(token)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None, None]:
        (cotangent,) = cotangents
        other = False
        if ctx.own is not None:
            cotangent, other = ctx.own.part_of(cotangent)
        norms = sample_norms(cotangent)
        (token,) = ctx.saved_tensors
        looks = norms.device.type == "cpu" and token is None
        if token is not None:
            norms = torch.ops.clipless_dp_passes.enter_pass(norms, token)
        else:
            ctx.enter(norms if looks else None, other)
        norms = outside_autocast(norms)
        if looks and len(norms) and float(norms.max()) <= ctx.limit:
            return cotangent, None, None, None, None
        factors = scale_factors(norms, cap=ctx.limit, floor=ctx.limit)
        gated = cotangent * per_sample(factors, cotangent).to(cotangent.dtype)
        return drop_rows_(gated, norms, largest_norm(ctx.limit, norms.dtype)), None, None, None, None


def outermost_gate(values: Tensor, limit: float, enter: Enter | Tensor | None, own: Own | None = None) -> Tensor:
    """Caps each sample's cotangent at ``limit``, and lets a backward pass through a pass once.

    Args:
        values: ``(B, ...)``.
        limit: the cap.
        enter: where a backward pass enters, or in a compiled graph the token of the pass; ``None`` of nobody's.
        own: where nothing but what ``model.loss`` sends may enter; ``None``: anything.
    """
    if enter is None:
        return cotangent_gate(values, limit)
    entry, token = (None, enter) if isinstance(enter, Tensor) else (enter, None)
    gated: Tensor = _OutermostGate.apply(values, limit, entry, token, own)  # type: ignore[no-untyped-call]
    return gated


@uncompiled
def _open_compiled(inputs: Tensor, key: int) -> Tensor:
    return torch.tensor([key, registers[key].open_compiled(inputs)])


@uncompiled
def _enter_compiled(norms: Tensor, token: Tensor) -> Tensor:
    key, number = token.tolist()
    # Within the operator gradients are off, whatever they are around it.
    with torch.set_grad_enabled(norms.requires_grad):
        registers[key].enter_compiled(number, norms.detach() if norms.device.type == "cpu" else None)
    return norms.detach().clone()


# Opaque to compilers: what is written in Python runs while a graph is traced, and never again. The tag keeps two passes
# of the same rows apart, which would be merged into one.
_library = torch.library.Library("clipless_dp_passes", "DEF")
_library.define("open_pass(Tensor inputs, int key) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define("enter_pass(Tensor norms, Tensor token) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.impl("open_pass", _open_compiled, "CompositeExplicitAutograd")
_library.impl("enter_pass", _enter_compiled, "CompositeExplicitAutograd")
torch.library.register_fake(
    "clipless_dp_passes::open_pass", lambda inputs, key: torch.empty(2, dtype=torch.int64, device="cpu"), lib=_library
)
torch.library.register_fake(
    "clipless_dp_passes::enter_pass", lambda norms, token: torch.empty_like(norms), lib=_library
)


def open_operator(inputs: Tensor, key: int) -> Tensor | None:
    """Opens a pass in a compiled graph, and returns its token; ``None`` where it is nobody's."""
    if is_exported():
        # A step refuses what it adds to a gradient.
        return None
    token: Tensor = torch.ops.clipless_dp_passes.open_pass(inputs, key)
    return token


def is_exported() -> bool:
    """Whether this is recorded for a graph of its own, in which the count would be a constant, and a pass nobody's."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return exporting is not None and bool(exporting())
