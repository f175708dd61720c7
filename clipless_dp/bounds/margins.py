"""Lipschitz constants of the differences of two scores, and the rounding of a forward pass, from the sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from clipless_dp.bounds.sweep import FLOAT64_ROUNDING, Sweep, named_parameters
from clipless_dp.distributed.placement import Placement
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import CotangentGate, GradientGatedLinear
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.modules import kind_of
from clipless_dp.norms.rounding import above_zero, certified_arithmetic, exact_float64, gamma, row_distances

_UNCHANGED = (CotangentGate, nn.Identity)
_LINEAR = (nn.Linear, GradientGatedLinear)


class _Scores(NamedTuple):
    """Scores as linear functions of a node's value.

    Attributes:
        rows: ``(C, n)``, one for each score.
        error: by how much a row may err from the exact one, in Euclidean norm, ``(C,)``.
        node: of whose value.
    """

    rows: Tensor
    error: Tensor
    node: fx.Node


def margin_constants(sweep: Sweep, weights: Placement) -> Tensor:
    """``K`` with ``|(f_i - f_j)(x) - (f_i - f_j)(y)| ≤ K_ij·‖x - y‖`` for all inputs.

    Going back from the output as long as layers are affine, score ``i`` is ``⟨a_i, h⟩`` up to a constant, of a value
    ``h`` that is ``L_h``-Lipschitz in the input: ``K_ij = ‖a_i - a_j‖·L_h`` at each such value, and the least of them
    holds. At the output itself that is ``√2·L``; behind a last linear layer ``W``, ``‖w_i - w_j‖·L_h``.

    Args:
        sweep: over the network.
        weights: where its weights are.

    Returns:
        ``(C, C)`` in float64 on the CPU, rounding included. One output ``f`` stands for the scores ``(-f, f)``.

    Raises:
        ConfigurationError: the network does not return one score for each class.
    """
    traced = sweep.traced
    shape = traced.shapes[traced.output]
    if len(shape) > 1:
        raise ConfigurationError(f"margins are those of scores (batch, classes), and the network returns {shape}")
    classes = math.prod(shape)
    single = classes == 1
    rows = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) if single else torch.eye(classes, dtype=torch.float64)
    found: _Scores | None = _Scores(rows, torch.zeros(len(rows), dtype=torch.float64), traced.output)
    constants = torch.full((len(rows), len(rows)), math.inf, dtype=torch.float64)
    while found is not None:
        reach = sweep.reach(found.node) * FLOAT64_ROUNDING
        apart = row_distances(found.rows) + found.error + found.error[:, None]
        # A score that another never leaves stays at its side however far the input moves, unless nothing bounds that.
        if math.isfinite(reach):
            moving = (apart > 0.0) & (reach > 0.0)
            constants = torch.minimum(constants, above_zero(apart * reach, moving))
        found = _pulled_back(sweep, found, weights)
    return constants.fill_diagonal_(0.0)


def _pulled_back(sweep: Sweep, scores: _Scores, weights: Placement) -> _Scores | None:
    """The same scores as linear functions of the value before; ``None`` where that is no affine layer of one value."""
    traced, node = sweep.traced, scores.node
    if node.op != "call_module":
        return None
    leaf, operands = traced.leaf(node), traced.operands(node)
    if len(operands) != 1:
        return None
    (source,) = operands
    if _overwritten_behind(traced, source):
        return None
    if kind_of(leaf) in _UNCHANGED:
        return _Scores(scores.rows, scores.error, source)
    if kind_of(leaf) not in _LINEAR or len(traced.shapes[source]) != 1:
        return None
    weight = exact_float64(weights.whole(named_parameters(leaf)["weight"])).cpu()
    with certified_arithmetic(weight):
        rows = scores.rows @ weight
        if torch.equal(scores.rows, torch.eye(len(scores.rows), dtype=torch.float64)):
            # Products with one and sums with zero round nothing.
            return _Scores(weight, scores.error, source)
        size = float(torch.linalg.matrix_norm(weight)) * (1.0 + gamma(weight.numel()))
        lengths = torch.linalg.vector_norm(scores.rows, dim=1)
        # Higham 2002, §3.5, for the product; what the rows erred by before is stretched by the weight.
        error = scores.error * size + gamma(len(weight)) * lengths * size
    return _Scores(rows, error, source)


def _overwritten_behind(traced: TracedNet, source: fx.Node) -> bool:
    """Whether something works in place after a value is there: what reads it then may read another."""
    nodes = list(traced.tensor_nodes())
    return any(traced.overwrites(node) for node in nodes[nodes.index(source) + 1 :])


def forward_error(sweep: Sweep) -> float:
    """How far a float64 forward pass may lie from the network in real arithmetic, in Euclidean norm.

    Each layer adds at most ``γ_n·√n·(X + Y)``, with ``n`` the larger number of entries of its inputs and its output,
    ``X`` and ``Y`` bounds of their norms, and ``γ`` that of :func:`clipless_dp.norms.rounding.gamma`: every output of a
    layer here is a few roundings of a sum of at most ``n`` products ``w·x``, off by at most ``γ_n·Σ|w||x|``, and
    ``‖|W||x|‖ ≤ ‖W‖_F‖x‖ ≤ √n·‖W‖‖x‖``. What earlier layers are off by is stretched as their values are. Layers whose
    rules are a user's own are taken to round no worse.

    Returns:
        The bound; infinite where no norm of a value, or no slope, is known.
    """

    def values(node: fx.Node, sources: Sequence[fx.Node], n: int) -> float:
        if node.op == "placeholder":
            # The input gate scales: a factor of one norm.
            return math.sqrt(n) * 2.0 * sweep.input_norm
        return math.sqrt(n) * (sweep.norm(node) + sum(sweep.norm(source) for source in sources))

    return _accumulated(sweep.traced, sweep.slope, values)


def forward_error_inf(sweep: Sweep) -> float:
    """How far any output of a float64 forward pass may lie from that of the network in real arithmetic.

    As :func:`forward_error` in maximum norms, without its ``√n``: an output is a few roundings of a sum of at most
    ``n`` products, off by at most ``γ_n·Σ|w||x|``, and ``Σ|w||x| ≤ K_∞·max|x|``; of differences ``|x - w|``, whose
    sums, maxima and roots are off by a share ``γ_n`` of what bounds them, ``Y_∞``.

    Returns:
        The bound; infinite where no size of a value, or no slope, is known.
    """

    def values(node: fx.Node, sources: Sequence[fx.Node], n: int) -> float:
        if node.op == "placeholder":
            return 2.0 * sweep.input_norm
        reached = (sweep.factor_inf(node, position) * sweep.norm_inf(source) for position, source in enumerate(sources))
        return sweep.norm_inf(node) + sum(reached)

    return _accumulated(sweep.traced, sweep.slope_inf, values)


def _accumulated(
    traced: TracedNet, slope: Callable[[fx.Node], float], values: Callable[[fx.Node, Sequence[fx.Node], int], float]
) -> float:
    """What an output may be off by: each value by ``γ_n`` of what it is made of, stretched on its way.

    Args:
        traced: the network.
        slope: by how much a change of a value reaches the output at most.
        values: what a value and its operands, of ``n`` entries at most, amount to.
    """
    total = 0.0
    for node in traced.tensor_nodes():
        reached = slope(node)
        if reached > 0.0:
            sources = () if node.op == "placeholder" else traced.operands(node)
            n = max(math.prod(traced.shapes[one]) for one in (node, *sources))
            total += reached * gamma(n) * values(node, sources, n)
    return total * FLOAT64_ROUNDING if math.isfinite(total) else math.inf
