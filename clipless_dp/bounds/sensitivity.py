"""What the sweeps find: how much one sample can change the summed gradient, and each layer's line in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from clipless_dp.display import Table, Tabular

Relation = Literal["add-or-remove-one", "replace-one"]

RELATIONS: dict[str, float] = {"add-or-remove-one": 1.0, "replace-one": 2.0}
"""By how much more a sample moves the sum than its own gradient's norm: replaced, once out and once in."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One parametrised layer's line in the report.

    Attributes:
        path: where the layer is in the network.
        kind: its type.
        input_norm: ``X``; of T tokens ``√T``, the norm of their one-hot rows. Infinite where gradient gates bound all
            that is trained, or bounds do not depend on it (layers of distances), and ``X`` would need weights.
        cotangent_norm: ``G`` at its output; infinite in the same cases.
        coverage: ``N`` for windows, else ``None``.
        certified_norm: of its weight, where the sweeps needed it, else ``None``.
        sensitivity: ``Δ`` over the layer's trainable parameters, under the report's relation.
    """

    path: str
    kind: str
    input_norm: float
    cotangent_norm: float
    coverage: int | None
    certified_norm: float | None
    sensitivity: float


@dataclass(frozen=True)
class Sensitivity(Tabular):
    """How much one sample can change the summed gradient.

    Attributes:
        per_parameter: ``Δ_θ`` for each trainable parameter, by its name in ``model.net``.
        total: ``(Σ Δ_θ²)^½``.
        relation: the neighbouring relation that the numbers hold for.
        layers: the report, a line for each parametrised layer.
        joint: sets of parameters whose gradients together are bounded by less than ``(Σ Δ_θ²)^½``, each parameter in
            one at most: names, and the bound. ``total`` counts each once.
        counted: how often a sample counts, by a half at most, at each gate whose cap adapts.

    Guarantee:
        For two batches that differ as the relation says, the summed gradient of each parameter θ differs by at
        most ``per_parameter[θ]`` in Euclidean norm, whatever the samples, targets, loss values and scales.
    """

    per_parameter: Mapping[str, float]
    total: float
    relation: Relation
    layers: tuple[LayerSensitivity, ...]
    joint: tuple[tuple[tuple[str, ...], float], ...] = ()
    counted: Mapping[str, int] = field(default_factory=dict)

    def blocks(self, names: Iterable[str]) -> list[tuple[list[str], float]]:
        """Some of the parameters in sets that are bounded together, and the bounds, whose squares add up."""
        places = {name: index for index, (members, _) in enumerate(self.joint) for name in members}
        found: dict[object, list[str]] = {}
        for name in names:
            found.setdefault(places.get(name, name), []).append(name)
        return [
            (members, self.joint[key][1] if isinstance(key, int) else self.per_parameter[members[0]])
            for key, members in found.items()
        ]

    @property
    def of_counts(self) -> float:
        """How much one sample can change the counts of all gates whose caps adapt, in Euclidean norm."""
        return 0.5 * RELATIONS[self.relation] * math.hypot(*self.counted.values())

    def joined(self, *others: Sensitivity) -> Sensitivity:
        """The bounds that hold for rows of any of several passes: for each parameter the largest."""
        bounds, counted, joint = dict(self.per_parameter), dict(self.counted), dict(self.joint)
        for other in others:
            for name, bound in other.per_parameter.items():
                bounds[name] = max(bound, bounds.get(name, 0.0))
            for name, count in other.counted.items():
                counted[name] = max(count, counted.get(name, 0))
            theirs = dict(other.joint)
            joint = {members: max(joint[members], theirs[members]) for members in joint.keys() & theirs.keys()}
        found = replace(self, per_parameter=bounds, counted=counted, joint=tuple(sorted(joint.items())))
        return replace(found, total=math.hypot(*(bound for _, bound in found.blocks(bounds))))

    def _table(self) -> Table:
        def shown(value: float | None) -> str:
            return "–" if value is None or math.isinf(value) else f"{value:.4g}"

        rows = [
            (
                layer.path,
                layer.kind,
                shown(layer.input_norm),
                shown(layer.cotangent_norm),
                shown(layer.coverage),
                shown(layer.certified_norm),
                shown(layer.sensitivity),
            )
            for layer in self.layers
        ]
        notes = [
            f"{len(members)} parameters together, {members[0]} to {members[-1]}: Δ = {bound:.6g}"
            for members, bound in self.joint
        ]
        if self.counted:
            notes.append(f"counts of {len(self.counted)} caps that adapt: Δ = {self.of_counts:.6g}")
        notes.append(f"total Δ = {self.total:.6g} ({self.relation})")
        headers = ("layer", "type", "X", "G", "coverage", "norm", "Δ")
        return Table(headers, rows, ("left", "left", *("right",) * 5), notes)
