"""How fast a network does move: a lower bound of its Lipschitz constant, to hold against the certified one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp.arguments import positive, seed, whole
from clipless_dp.errors import InputError
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.robustness.networks import PlainNetwork, read
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
    evaluated, in float64: up to the rounding of their difference, a relative ``1e-8``, which is taken off, it is below
    every Lipschitz constant. A certified constant far above it is loose there, or the search is weak.

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
    generator = torch.Generator().manual_seed((seed("rng_seed", rng_seed) or 0) % 2**63)
    inputs, _ = read(data)
    if not len(inputs):
        raise InputError("there are no samples to start from")
    plain = PlainNetwork(model, front=front)
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
                apart = (plain.outputs(moved) - plain.outputs(points)).flatten(1).norm(dim=1)
                ratios = apart / (moved - points).flatten(1).norm(dim=1)
            largest = max(largest, float(ratios.nan_to_num(0.0, 0.0).max()) * (1.0 - 1e-8))
            points, drawn = moved, steepest
    return largest


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
