"""How far each output of a layer moves with each single coordinate of its input: intervals, pulled back layer by layer.

For inputs ``x`` and ``y`` of a network of linear maps, sorts and scalar functions there is a matrix ``J`` with
``f(y) - f(x) = J(y - x)``: a linear map is its own; a scalar function of slopes in ``[a, b]`` is a diagonal matrix of
entries in there; and a sort is an average of permutations, along the segment between its two inputs. So each row ``v``
of what follows a layer becomes ``Wᵀv``, ``Dv``, or ``Mᵀv`` with ``M`` doubly stochastic within each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from clipless_dp.errors import Unsupported, UnsupportedModuleError
from clipless_dp.gates import BallProjection, CotangentGate, GradientGatedLinear, SphereScaling
from clipless_dp.layers.householder import Householder
from clipless_dp.layers.sorting import FullSort, GroupSort, MaxMin
from clipless_dp.layers.standardisation import SampleGroupNorm
from clipless_dp.modules import kind_of
from clipless_dp.norms.rounding import UNIT, exact_float64, gamma


class Slopes(NamedTuple):
    """What is known of ``J``, of ``k`` outputs and ``n`` inputs.

    Attributes:
        low: lower bounds of its entries, ``(k, n)``, in float64.
        high: upper bounds.
        total: upper bounds of ``Σ_i |J_oi|``, ``(k,)``.
    """

    low: Tensor
    high: Tensor
    total: Tensor

    @staticmethod
    def identity(size: int) -> Slopes:
        """Of a value itself."""
        eye = torch.eye(size, dtype=torch.float64)
        return Slopes(eye, eye, torch.ones(size, dtype=torch.float64))

    def plus(self, other: Slopes) -> Slopes:
        """Two ways from one input to the outputs."""
        # Of one sum floating-point arithmetic has the sign, and the size up to a rounding.
        low, high = _rounded(self.low + other.low, self.high + other.high, 2.0 * UNIT)
        return Slopes(low, high, (self.total + other.total) * (1.0 + 4.0 * UNIT))

    def magnitude(self) -> Tensor:
        """Upper bounds of ``|J|``, ``(k, n)``."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def linear(self, weight: Tensor) -> Slopes:
        """Through ``x ↦ Wx``: ``J_oi = Σ_j v_j W_ji``, term by term, and at most ``‖v‖₁·max_j|W_ji|``."""
        size = weight.abs()
        terms = gamma(len(weight))
        above, below = weight.clamp(min=0.0), weight.clamp(max=0.0)
        # A sum errs relative to the sizes of its terms: where they have one sign, to itself.
        low = self.low @ above + self.high @ below - 2.0 * terms * (self.low.abs() @ above - self.high.abs() @ below)
        high = self.high @ above + self.low @ below + 2.0 * terms * (self.high.abs() @ above - self.low.abs() @ below)
        cap = self.total[:, None] * size.amax(0) * (1.0 + terms)
        low, high = torch.maximum(low, -cap), torch.minimum(high, cap)
        rows = size.sum(1).amax() * (1.0 + gamma(weight.shape[1]))
        return Slopes(low, high, self.total * rows * (1.0 + terms)).settled()

    def scaled(self, least: float, largest: float) -> Slopes:
        """Through scalar functions of slopes in ``[least, largest]``."""
        ends = torch.stack([end * slope for end in (self.low, self.high) for slope in (least, largest)])
        low, high = _rounded(ends.amin(0), ends.amax(0), 2.0 * UNIT)
        return Slopes(low, high, self.total * max(abs(least), abs(largest)) * (1.0 + 4.0 * UNIT)).settled()

    def sorted(self, groups: Tensor) -> Slopes:
        """Through a sort of groups of entries, of indices ``(groups, size)``: averages over the group."""
        low, high = self.low[:, groups], self.high[:, groups]
        low, high = shared(low.amin(2, keepdim=True), groups), shared(high.amax(2, keepdim=True), groups)
        return Slopes(low, high, self.total).settled()

    def settled(self) -> Slopes:
        """The same, with the total that the entries allow for if that is less."""
        summed = self.magnitude().sum(1) * (1.0 + gamma(self.low.shape[1]))
        return Slopes(self.low, self.high, torch.minimum(self.total, summed))


def shared(values: Tensor, groups: Tensor) -> Tensor:
    """Gives a value of each group ``(..., groups, 1)`` to all its entries, where these are: ``(..., n)``."""
    spread = values.expand(*values.shape[:-1], groups.shape[1]).flatten(-2)
    return spread[..., groups.flatten().argsort()]


def _rounded(low: Tensor, high: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    """Outwards, by a share of each: what is 0 stays it."""
    return low - relative * low.abs(), high + relative * high.abs()


_LINEAR = (nn.Linear, GradientGatedLinear)
_SORTS = (GroupSort, MaxMin)
_UNCHANGED = (nn.Identity, CotangentGate, nn.Flatten)

INCREASING: dict[type[nn.Module], tuple[float, float]] = {
    **dict.fromkeys(_UNCHANGED, (1.0, 1.0)),
    **dict.fromkeys((nn.ReLU, nn.Tanh, nn.Sigmoid), (0.0, 1.0)),
}
"""Slopes of scalar functions, by the modules that apply them to each entry."""

_SCALES = (
    "it scales all coordinates of a sample by one factor, so that more of one makes less of the others: cut each "
    "coordinate by layers.BoxProjection(lo, hi), and gate cotangents or gradients, which leave what flows forwards"
)
_BATCH = "it takes statistics of a batch, in which samples meet, and whose factors may turn signs: leave it out"
_UNKNOWN = (
    "how its outputs move with single coordinates is not known; of a monotone network the layers are nn.Linear, "
    "nn.ReLU, nn.LeakyReLU, nn.Tanh, layers.GroupSort, MaxMin, FullSort and BoxProjection, on rows (batch, columns)"
)
OVERWRITES = (
    "it overwrites its input, which other parts may read too, so that the network is another function than its graph "
    "says: use inplace=False"
)
"""Why nothing in a network of known slopes works in place."""
_REASONS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((BallProjection, SphereScaling, SampleGroupNorm, nn.LayerNorm, nn.GroupNorm), _SCALES),
    ((nn.modules.batchnorm._BatchNorm, nn.modules.batchnorm._LazyNormBase), _BATCH),
    (
        (Householder,),
        "it reflects pairs, which stretches single coordinates by up to √2 and turns signs (norms other than the "
        "Euclidean one grow): sort, by layers.GroupSort or MaxMin",
    ),
)


def reason_against(layer: nn.Module) -> str | None:
    """Why a layer cannot be in a network of known slopes; ``None`` if it can."""
    kind = kind_of(layer)
    if getattr(layer, "inplace", False):
        return OVERWRITES
    if kind in INCREASING or kind in (*_LINEAR, *_SORTS, FullSort, nn.LeakyReLU):
        return None
    return next((reason for kinds, reason in _REASONS if isinstance(layer, kinds)), _UNKNOWN)


def pulled_back(layer: nn.Module, slopes: Slopes, weight: Tensor | None = None) -> Slopes:
    """Slopes with respect to a layer's input, of those with respect to its output ``(n,)``.

    Args:
        layer: one that :func:`reason_against` has nothing against.
        slopes: of what follows.
        weight: of a linear layer, if not its own.
    """
    kind = kind_of(layer)
    if kind in _LINEAR:
        return slopes.linear(exact_float64(layer.weight if weight is None else weight).cpu())  # type: ignore[arg-type]
    if kind in INCREASING:
        return slopes.scaled(*INCREASING[kind])
    if isinstance(layer, nn.LeakyReLU):
        return slopes.scaled(*sorted((layer.negative_slope, 1.0)))
    return slopes.sorted(cast(GroupSort | FullSort, layer).groups(slopes.low.shape[1]))


def parts_of(net: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of a chain, in order, with their paths: those of ``nn.Sequential`` within ``nn.Sequential``."""
    if kind_of(net) is not nn.Sequential:
        return [(path, net)]
    return [part for name, child in net.named_children() for part in parts_of(child, f"{path}.{name}".lstrip("."))]


def refuse_parts(parts: Sequence[tuple[str, nn.Module]]) -> None:
    """Refuses layers whose slopes by coordinate are not known.

    Raises:
        UnsupportedModuleError: lists every such layer, with the reason.
    """
    refused = [
        Unsupported(path, type(layer).__name__, reason)
        for path, layer in parts
        if (reason := reason_against(layer)) is not None
    ]
    if refused:
        raise UnsupportedModuleError(refused, monotone=True)


@torch.no_grad()
def chain_slopes(net: nn.Module) -> Slopes:
    """Of a chain of layers, at its weights.

    Raises:
        UnsupportedModuleError: it has layers of other kinds, or none that is linear.
    """
    parts = parts_of(net)
    refuse_parts(parts)
    linear = [layer for _, layer in parts if kind_of(layer) in _LINEAR]
    if not linear:
        raise UnsupportedModuleError([Unsupported("net", type(net).__name__, _UNKNOWN)], monotone=True)
    slopes = Slopes.identity(cast(Tensor, linear[-1].weight).shape[0])
    for _, layer in reversed(parts):
        slopes = pulled_back(layer, slopes)
    return slopes
