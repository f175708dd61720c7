"""Monotone networks: what is certain of the slopes of a network in each single feature.

A certificate is read off the weights, which were trained privately, so that it costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipless_dp.bounds import coordinates
from clipless_dp.bounds.tracker import SensitivityTracker
from clipless_dp.errors import ConfigurationError, Unsupported, UnsupportedModuleError
from clipless_dp.graph.shapes import WRITTEN_IN_PLACE
from clipless_dp.graph.tracing import TracedNet, function_name, place, trace
from clipless_dp.layers.coordinates import Slopes
from clipless_dp.layers.monotone import MonotoneLift, MonotoneResidual
from clipless_dp.model import DPLipModel
from clipless_dp.modules import parameter_device_and_dtype

__all__ = ["FeatureSlope", "MonotoneCertificate", "certificate"]


@dataclass(frozen=True)
class FeatureSlope:
    """What is certain of one feature.

    Attributes:
        name: of the feature.
        sign: 1 or -1 where the network is meant to be monotone in it, else 0.
        low: no output changes by less than this per unit of the feature, whatever all features are.
        high: nor by more than this.
    """

    name: str
    sign: int
    low: float
    high: float

    @property
    def slope(self) -> float:
        """The most that any output moves per unit of the feature, up or down."""
        return max(abs(self.low), abs(self.high))

    @property
    def is_increasing(self) -> bool:
        """Whether more of it never lowers an output."""
        return self.low >= 0.0

    @property
    def is_decreasing(self) -> bool:
        """Whether more of it never raises an output."""
        return self.high <= 0.0

    @property
    def holds(self) -> bool:
        """Whether the network is as monotone in it as it is meant to be."""
        return (self.sign < 1 or self.is_increasing) and (self.sign > -1 or self.is_decreasing)


@dataclass(frozen=True)
class MonotoneCertificate:
    """What is certain of a network's slopes: prints as a table, one line for each feature.

    Attributes:
        features: one for each coordinate of the input.
        input_norm: inputs of at most this Euclidean norm are spoken for; infinite: all finite ones.
        rounding: in floating-point arithmetic of :attr:`dtype`, without ``torch.autocast``, a comparison of two outputs
            may be off by this much at most. Infinite where nothing bounds the inputs, as without a box.
        dtype: that the network computes in.
        total: the most that any output moves if every feature moves by at most one unit.
    """

    features: tuple[FeatureSlope, ...]
    input_norm: float
    rounding: float
    dtype: str
    total: float

    @property
    def holds(self) -> bool:
        """Whether the network is monotone in all features that it is meant to be monotone in."""
        return all(feature.holds for feature in self.features)

    def __getitem__(self, feature: int | str) -> FeatureSlope:
        """By position, or by name."""
        if isinstance(feature, str):
            return next(one for one in self.features if one.name == feature)
        return self.features[feature]

    def __str__(self) -> str:
        width = max(7, *(len(one.name) for one in self.features))
        lines = [f"{'feature':{width}}  sign  {'slope at most':>13}  monotone"]
        for one in self.features:
            sign = {1: "+1", -1: "-1", 0: "–"}[one.sign]
            shape = "increasing" if one.is_increasing else "decreasing" if one.is_decreasing else "no"
            if one.is_increasing and one.is_decreasing:
                shape = "constant"
            told = shape if one.sign == 0 else f"yes, {shape}" if one.holds else "NO"
            lines.append(f"{one.name:{width}}  {sign:>4}  {one.slope:>13.4g}  {told}")
        where = "all finite inputs" if math.isinf(self.input_norm) else f"inputs of norm at most {self.input_norm:g}"
        known = "unknown" if math.isinf(self.rounding) else f"at most {self.rounding:.2g}"
        return "\n".join([*lines, f"of {where}; rounding of a difference of outputs in {self.dtype}: {known}"])


def certificate(
    model: nn.Module, *, names: Sequence[str] | None = None, columns: int | None = None
) -> MonotoneCertificate:
    """Slopes of a network in each feature, at its weights, for all inputs.

    Of inputs ``x`` and ``y``, outputs differ by ``J(y - x)`` with entries of ``J`` between the bounds of each feature:
    see the proof in the documentation. It holds in real arithmetic over the stored weights; computed outputs are within
    :attr:`MonotoneCertificate.rounding` of that.

    Args:
        model: a wrapped model, or any module that reads rows ``(B, columns)``.
        names: of the features; by default their positions.
        columns: of a module, how many features it reads; by default those of the first
            :class:`clipless_dp.layers.MonotoneResidual` or linear layer in it.

    Raises:
        UnsupportedModuleError: lists every part of which slopes are not known, with the reason.
        ConfigurationError: the input gate of a wrapped model, a projection on a ball, may act where no box comes first:
            more of one feature would be less of all others.
    """
    if isinstance(model, DPLipModel):
        slopes, traced, norm = model.coordinate_slopes(), model.graph, model.input_norm
        _refuse_ball(traced, norm)
        rounding, dtype = model.coordinate_rounding(), model.device_and_dtype()[1]
    else:
        device, dtype = parameter_device_and_dtype(model)
        traced, norm = trace(model, (_columns(model, columns),), device=device, dtype=dtype), math.inf
        _refuse_written_in_place(traced)
        coordinates.refuse(traced)
        # The rules of layers and functions refuse here what they refuse in a wrapped model.
        tracker = SensitivityTracker(traced, input_norm=norm, cotangent_norm=1.0)
        slopes, rounding = tracker.coordinate_slopes(), tracker.rounding(dtype)
    signs = _signs(traced, slopes.low.shape[1])
    return _made(slopes, signs, names, norm, 2.0 * rounding, dtype)


def _made(
    slopes: Slopes, signs: Sequence[int], names: Sequence[str] | None, norm: float, rounding: float, dtype: torch.dtype
) -> MonotoneCertificate:
    named = [str(index) for index in range(len(signs))] if names is None else [str(name) for name in names]
    if len(named) != len(signs):
        raise ConfigurationError(f"names must be one for each of {len(signs)} features, got {len(named)}")
    low, high = slopes.low.amin(0).tolist(), slopes.high.amax(0).tolist()
    features = tuple(FeatureSlope(*each) for each in zip(named, signs, low, high, strict=True))
    return MonotoneCertificate(features, norm, rounding, str(dtype).rpartition(".")[2], float(slopes.total.amax()))


def _refuse_ball(traced: TracedNet, norm: float) -> None:
    boxes = coordinates.boxes(traced)
    if not boxes:
        raise ConfigurationError(
            "the input gate of the model is a projection on a ball, which makes less of all features where one grows, "
            "and no box comes first: begin the network with layers.BoxProjection(lo, hi), and leave out input_norm"
        )
    columns = next(math.prod(traced.shapes[node]) for node in traced.tensor_nodes())
    widest = max(box.norm(columns) for box in boxes)
    if norm < widest:
        raise ConfigurationError(
            f"input_norm={norm:g} is below the norm {widest:.4g} of the box's corners: in the box, too, the input gate "
            "would make less of all features where one grows. Leave input_norm out"
        )


def _refuse_written_in_place(traced: TracedNet) -> None:
    reason = "it is written in place, as h += t, which overwrites a value that other parts may read: write h = h + t"
    written = [node for node in traced.tensor_nodes() if node.meta.get(WRITTEN_IN_PLACE)]
    if written:
        raise UnsupportedModuleError(
            [Unsupported(place(node), function_name(node), reason) for node in written], monotone=True
        )


def _columns(net: nn.Module, columns: int | None) -> int:
    if columns is not None:
        return columns
    for part in net.modules():
        if isinstance(part, MonotoneResidual):
            return len(part.lift.signs)
        if isinstance(part, nn.Linear):
            return part.in_features
    raise ConfigurationError("columns must be given: how many features the network reads")


def _signs(traced: TracedNet, columns: int) -> list[int]:
    """What features are meant to be monotone in, of the residuals that read them."""
    found: Tensor = torch.zeros(columns, dtype=torch.int64)
    for node in traced.tensor_nodes():
        leaf = traced.leaf(node) if node.op == "call_module" else None
        if isinstance(leaf, MonotoneLift) and len(leaf.signs) == columns:
            signs = torch.tensor(leaf.signs)
            found = torch.where(found == 0, signs, found)
    return [int(sign) for sign in found]
