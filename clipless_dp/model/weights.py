"""The weights of a wrapped model: their projections after a step, and the bounds as long as they stay the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

from torch import Tensor, nn

from accounting.errors import warn_caller
from clipless_dp.bounds.sensitivity import Relation, Sensitivity
from clipless_dp.bounds.stamp import Stamp, stamp
from clipless_dp.bounds.tracker import SensitivityTracker
from clipless_dp.constraints import Constraint
from clipless_dp.distributed.placement import Change, Placement, local
from clipless_dp.errors import NormError, PrivacyError
from clipless_dp.gates import adapting_among
from clipless_dp.model.rescaling import shrinkage
from clipless_dp.modules import buffers_of, parameters_in
from clipless_dp.norms.operators import Operator
from clipless_dp.norms.rounding import exact_float64
from clipless_dp.sampling.fingerprints import of_all

_SHRUNK = 2.0
"""By how much a weight shrinks that is warned about: of networks just made, many shrink by less."""


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says which parameter has no certified norm."""
    try:
        yield
    except NormError as error:
        raise NormError(f"{name}: {error}") from error


def _project_(
    name: str, constraint: Constraint, operators: tuple[Operator, ...], weight: Tensor, *, settling: bool
) -> None:
    with _naming(name):
        if not (settling and constraint.holds(weight, operators)):
            constraint.project_(weight, operators)


def _project_gradient_(
    name: str, constraint: Constraint, operators: tuple[Operator, ...], gradient: Tensor, weight: Tensor
) -> None:
    with _naming(name):
        constraint.project_gradient_(gradient, weight, operators)


def _may_be_fresh(weight: Tensor, operators: tuple[Operator, ...]) -> bool:
    """Whether no entry is larger than torch's own initial values are: one over the root of an output's inputs."""
    inputs = operators[0].matrix(weight).shape[2]
    return float(weight.abs().max()) <= 1.0 / math.sqrt(max(1, inputs)) * (1.0 + 1e-6)


Mark = object
"""What tells that a weight has changed."""


def _mark(values: Tensor) -> tuple[int, int, object]:
    return values._version, values.data_ptr(), of_all(values)


def _bits(buffer: Tensor | None) -> object:
    """Of a buffer, which a pass may write and put back."""
    return None if buffer is None else of_all(buffer)


class Weights:
    """The weights of a wrapped network, and what is known of them as long as they are the same.

    Args:
        net: the network.
        constraints: those of its parameters, by name.
        tracker: knows the bounds and the operators that weights act as.
    """

    def __init__(self, net: nn.Module, constraints: Mapping[str, Constraint], tracker: SensitivityTracker) -> None:
        self._net, self._constraints, self._tracker = net, constraints, tracker
        # Looked up by path, they take as long as what is done with them. Layers that are exchanged are refused.
        self._holders = {
            f"{path}.{name}" if path else name: (module, name)
            for path, module in net.named_modules(remove_duplicate=False)
            for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
        }
        self._projected: dict[str, tuple[Stamp, float]] = {}
        self._kept: dict[Relation, tuple[object, Sensitivity, dict[str, Stamp]]] = {}

    def initialise_(self) -> None:
        """Gives weights that train values that their constraints do not shrink, and warns where trained ones shrank.

        Raises:
            NormError: a weight holds a NaN or an infinity.
        """
        for name, parameter in self._net.named_parameters():
            exact_float64(parameter, name)
        shrunk: dict[str, float] = {}
        for name, constraint in self._trained():
            values = self._values(name)
            before = values.clone()
            with _naming(name):
                constraint.initialize_(values, self._tracker.operators[name])
            factor = shrinkage(before, values)
            if factor > _SHRUNK and not _may_be_fresh(before, self._tracker.operators[name]):
                shrunk[name] = factor
        if shrunk:
            listed = ", ".join(f"{name} by {factor:.3g}" for name, factor in shrunk.items())
            warn_caller(
                f"constraints shrink weights that seem to be trained: {listed}. Biases keep their size, so that the "
                "network is another function: DPLipModel(..., rescale=True) divides them too, by the product of the "
                "factors so far, where all between the layers is positively homogeneous; or give larger limits",
                UserWarning,
            )

    def project_(self, here: Placement, *, settling: bool = False) -> None:
        """Projects the weights that train, or only those for which their constraints do not hold: ``settling``."""
        self._projected = {}
        project = partial(_project_, settling=settling)
        changes = [
            Change(name, partial(project, name, constraint, self._tracker.operators[name]), (self._values(name),))
            for name, constraint in self._trained()
        ]

        def projected(name: str) -> None:
            # A penalty promises none.
            if math.isfinite(self._constraints[name].limit):
                self._projected[name] = self._stamp(name, here), self._established(name, here)

        # Each weight is stamped before another is touched: what changes it from here on shows.
        here.change_(changes, projected)

    def _established(self, name: str, here: Placement) -> float:
        """The norm that a projection has just established, of each operator that the weight acts as."""
        constraint, (first, *_) = self._constraints[name], self._tracker.operators[name]
        if type(constraint).implied is Constraint.implied:
            return constraint.limit
        weight = self._parameter(name)
        implied = constraint.implied(weight.shape[0], math.prod(weight.shape[1:]))
        # Limits of other norms say little of this one, and the weight is public by now.
        return min(implied, first.norm(self._values(name))) if here.is_whole else implied

    def project_gradients_(self, here: Placement) -> None:
        """Lets the constraints turn gradients into directions that projections keep."""
        changes: list[Change] = []
        for name, constraint in self._trained():
            gradient = self._parameter(name).grad
            if gradient is not None and constraint.changes_gradients():
                change = partial(_project_gradient_, name, constraint, self._tracker.operators[name])
                changes.append(Change(name, change, (gradient, self._values(name))))
        here.change_(changes)

    def limits(self, here: Placement) -> tuple[dict[str, float], dict[str, Stamp]]:
        """Limits that projections established, for the parameters that have not changed since; and stamps of all."""
        stamps = {name: self._stamp(name, here) for name in self._projected}
        # What one process finds changed in its part is certified anew by all of them, together.
        changed = here.on_any_part([stamps[name] != stamp for name, (stamp, _) in self._projected.items()])
        limits = {
            name: limit for (name, (_, limit)), new in zip(self._projected.items(), changed, strict=True) if not new
        }
        return limits, stamps

    def sensitivity(
        self, here: Placement, parts: Sequence[nn.Module], relation: Relation = "add-or-remove-one"
    ) -> tuple[Sensitivity, frozenset[str] | None]:
        """The bounds, and the names of the weights that they rest on; ``None``: a rule of a user's own may read any.

        Args:
            here: where the model is.
            parts: the network's modules.
            relation: what neighbours are.
        """
        limits, stamps = self.limits(here)
        caps = tuple([tuple(found.caps.values()) for found in adapting_among(parts)])
        key = relation, tuple(sorted(limits.items())), tuple([p.requires_grad for p in parameters_in(parts)]), caps
        known, now = self._kept.get(relation), dict[str, Stamp]()
        if known is not None and known[0] == key:
            _, sensitivity, read = known
            now = {name: self._stamp(name, here) for name in read}
            if now == read:
                return sensitivity, frozenset((*stamps, *now))
        whole = here.is_whole
        sensitivity, read_names = self._tracker.evaluate(limits, relation, whole=whole)
        self._kept.pop(relation, None)
        # What a rule of the user's own may have read is known to nobody.
        named = whole and all(name in now or name in self._holders for name in read_names)
        # Who writes to a weight in the meantime is noticed by a stamp from before.
        read = {name: now[name] if name in now else self._stamp(name, here) for name in read_names} if named else {}
        if len(read) == len(read_names):
            self._kept[relation] = key, sensitivity, read
        return sensitivity, frozenset((*stamps, *read)) if named else None

    def sensitivity_at_limits(self, here: Placement) -> Sensitivity:
        """The bounds as behind a projection, of weights for which the constraints hold, though it may be long ago."""
        limits, _ = self.limits(here)
        for name, constraint in self._trained():
            values, operators = self._values(name), self._tracker.operators[name]
            if math.isfinite(constraint.limit) and constraint.holds(values, operators):
                limits[name] = self._established(name, here)
        return self._tracker.evaluate(limits, "add-or-remove-one", whole=here.is_whole)[0]

    def marks(self, names: Iterable[str] | None) -> dict[str, Mark]:
        """As stamps, but faster: for the time between a forward pass and its backward pass.

        Args:
            names: of the weights; ``None``: all, and the bits of the buffers that files hold.
        """
        # Of a weight that is shared by several layers once.
        found = {self._parameter(name): name for name in (self._holders if names is None else names)}
        marks: dict[str, Mark] = {name: _mark(one) for one, name in found.items()}
        if names is None:
            marks.update((name, _bits(buffer)) for name, buffer in buffers_of(self._net).items())
        return marks

    def refuse_others(self, marks: Mapping[str, Mark]) -> None:
        """Refuses weights that are not what they were when they were marked."""
        buffers = {} if marks.keys() <= self._holders.keys() else buffers_of(self._net)
        for name, known in marks.items():
            now = _mark(self._parameter(name)) if name in self._holders else _bits(buffers.get(name))
            if now != known:
                raise PrivacyError(
                    f"the weight {name!r} was changed between a forward pass and its backward pass, so that no one "
                    "bound holds for it: change weights before the forward pass, and put them back after the backward "
                    "pass"
                )

    def marks_of_parts(self, parameters: Iterable[Tensor]) -> list[Mark]:
        """The same of the parts that this process holds of all weights, which a pass gathers and frees elsewhere."""
        # What they were made of, before they were split, is nowhere any more.
        return [_mark(part) for one in parameters if hasattr(one, "placements") for part in (local(one.detach()),)]

    def refuse_other_parts(self, parameters: Iterable[Tensor], marks: list[Mark]) -> None:
        """Refuses parts of weights that are not what they were when they were marked."""
        if self.marks_of_parts(parameters) != marks:
            raise PrivacyError(
                "a weight was changed between a pass and its step, whose bounds are those of the weights at the step "
                "where they are split among ranks: change weights between steps"
            )

    def _parameter(self, name: str) -> nn.Parameter:
        module, own = self._holders[name]
        found = module._parameters.get(own)
        return cast(nn.Parameter, getattr(module, own) if found is None else found)

    def _values(self, name: str) -> Tensor:
        return self._parameter(name).detach()

    def _stamp(self, name: str, here: Placement) -> Stamp:
        return stamp(here.held(self._parameter(name)))

    def _trained(self) -> Iterator[tuple[str, Constraint]]:
        return ((name, c) for name, c in self._constraints.items() if self._parameter(name).requires_grad)
