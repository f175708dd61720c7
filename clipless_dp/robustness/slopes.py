"""How fast a network does move: a lower bound of its Lipschitz constant, to hold against the certified one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipless_dp.arguments import positive, whole
from clipless_dp.errors import InputError
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.robustness.networks import UNCHECKED_ROUNDING, PlainNetwork, generator_of, read, wrapped_model
from clipless_dp.training import Data


def lipschitz_lower_bound(
    model: nn.Module,
    data: Data | Tensor,
    *,
    front: nn.Module | None = None,
    steps: int = 20,
    reach: float = 1e-2,
    rng_seed: int = 0,
    batch_size: int = 256,
) -> float:
    """The largest ``‖f(x) - f(y)‖/‖x - y‖`` that a search finds, of the network's own outputs.

    At each step a point's direction becomes the one that the Jacobian there stretches most (power iteration, one
    product with it and one with its transpose), and the point moves along it. The ratio is of two points that were both
    evaluated, in float64, and what the two passes may err by is taken off their difference: of a wrapped model its
    certified bound (:meth:`clipless_dp.DPLipModel.forward_error`), of other modules and fronts what :func:`certify`
    takes them to err by. So it is below every Lipschitz constant.

    A certified constant far above it is loose there, or the search is weak.

    Args:
        model: a wrapped model, or any module.
        data: where the search starts, as for :func:`attack`.
        front: what runs before the model.
        steps: of the search.
        reach: how far points are moved, relative to the norm of the samples, halfway between near and far.
        rng_seed: of the first directions.
        batch_size: samples at once.

    Raises:
        ConfigurationError: an argument is out of range.
        InputError: there are no samples.
    """
    steps, rows, reach = whole("steps", steps), whole("batch_size", batch_size), positive("reach", reach)
    generator = generator_of(rng_seed)
    inputs, _ = read(data)
    if not len(inputs):
        raise InputError("there are no samples to start from")
    plain = PlainNetwork(model, front=front)
    own = wrapped_model(model)
    known = math.inf if own is None or front is not None else own.forward_error()
    largest = 0.0
    for some in inputs.split(rows):
        points = some.to(plain.device, plain.dtype)
        drawn = torch.randn(points.shape, generator=generator, dtype=torch.float64).to(points)
        for step in range(steps):
            steepest = _unit(_turned(plain, points, _unit(drawn)))
            # Short steps see the slope where a point is, long ones leave the piece that it is on.
            length = reach * float(points.flatten(1).norm(dim=1).mean().clamp(min=1e-3)) * (0.1 if step % 2 else 1.0)
            moved = points + length * steepest
            with torch.no_grad():
                before, after = plain.outputs(points).flatten(1), plain.outputs(moved).flatten(1)
                apart, way = (after - before).norm(dim=1), (moved - points).flatten(1).norm(dim=1)
                error = _rounding((before, after), (points, moved), apart / way) if math.isinf(known) else 2.0 * known
                ratios = (apart - error) / way
            largest = max(largest, float(ratios.nan_to_num(0.0, 0.0).max()) * (1.0 - 1e-8))
            points, drawn = moved, steepest
    return largest


def _rounding(outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor], slope: Tensor) -> Tensor:
    """What both passes together are taken to err by where nothing is known of the layers, ``(B,)``."""
    ends = sum(one.norm(dim=1) for one in outputs)
    starts = sum(one.flatten(1).norm(dim=1) for one in inputs)
    error: Tensor = UNCHECKED_ROUNDING * (ends + slope * starts)
    return error


def _unit(values: Tensor) -> Tensor:
    return values / per_sample(values.flatten(1).norm(dim=1).clamp(min=1e-300), values)


def _turned(plain: PlainNetwork, points: Tensor, directions: Tensor) -> Tensor:
    """``JᵀJv`` of each sample; the direction itself where that is zero."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        outputs = plain.outputs(points).nan_to_num(0.0)
        dual = torch.ones_like(outputs, requires_grad=True)
        # Jᵀu is linear in u, so that its derivative along v is Jv: one more way back in place of one forwards.
        (transposed,) = torch.autograd.grad(outputs, points, dual, create_graph=True, materialize_grads=True)
        if not transposed.requires_grad:
            return directions
        (along,) = torch.autograd.grad(transposed, dual, directions, materialize_grads=True)
        outputs = plain.outputs(points).nan_to_num(0.0)
        (turned,) = torch.autograd.grad(outputs, points, along.detach(), materialize_grads=True)
    vanishes = per_sample(turned.flatten(1).norm(dim=1) == 0.0, turned)
    return torch.where(vanishes, directions, turned)
