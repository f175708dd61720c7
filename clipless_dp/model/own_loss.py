"""What ``model.loss`` sends back into a network, told apart from what other terms of a loop send beside it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle, unserializable_hook

from accounting.errors import warn_caller
from clipless_dp.errors import PrivacyError, PrivacyWarning
from clipless_dp.gates.arithmetic import flat_rows
from clipless_dp.graph.numbers import Numbers, moved_by, note_moved, numbers_of
from clipless_dp.model import nodes
from clipless_dp.model.rowwise import EVERY, random_numbers
from clipless_dp.sampling import fingerprints
from clipless_dp.tensor_types import is_coded
from clipless_dp.uncompiled import uncompiled

_ROUNDING = 1e-5
"""Of the largest number: sums of several terms in another order differ by some 1e-6 in float32."""


class Own:
    """What came from the sums of one model to the output of one pass, by backward pass.

    Attributes:
        returned: what the pass returned; nothing lies between it and a loss of it.
        rows: of the pass.
    """

    def __init__(self) -> None:
        self._sent: dict[int, Tensor] = {}
        self.returned: Callable[[], Tensor | None] = lambda: None
        self.rows = 0
        self._written: tuple[int, object] = 0, None

    def return_(self, returned: Tensor) -> None:
        """The pass returns this."""
        self.returned, self.rows, self._written = ref(returned), len(returned), _graph_of(returned)

    def is_as_returned(self, output: Tensor) -> bool:
        """Whether this is what the pass returned, and nothing was computed in its place since."""
        return self.returned() is output and _graph_of(output) == self._written

    def note(self, cotangent: Tensor) -> None:
        """A sum has sent this, in the backward pass under way."""
        task = torch._C._current_graph_task_id()
        before = self._sent.get(task)
        # Of a backward pass that did not get here nothing is kept.
        self._sent = {task: cotangent if before is None else before + cotangent}

    def part_of(self, cotangent: Tensor) -> tuple[Tensor, bool]:
        """What sums have sent, of all that arrives, and whether there is more; accelerators are not asked."""
        sent = self._sent.pop(torch._C._current_graph_task_id(), None)
        if sent is None:
            return cotangent, True
        if not cotangent.is_cpu:
            return sent, False
        largest = float(cotangent.detach().abs().nan_to_num(0.0).max()) if cotangent.numel() else 0.0
        same = torch.allclose(cotangent, sent, rtol=_ROUNDING, atol=_ROUNDING * largest, equal_nan=True)
        # What is within rounding is left out too: a small term of all rows is a term of all rows.
        return sent, not same


class Between:
    """What lies between the outputs of one model and its loss, which a loop computes."""

    def __init__(self) -> None:
        self._due = True
        self._warned = False

    def own_output(self, output: Tensor, parameters: Iterable[nn.Parameter], drop: Callable[[], None]) -> Tensor:
        """A copy of a loss's input, which tells the passes that it comes from what the loss sends back to them.

        Args:
            output: what a loss is computed of, by a loop from what the network returned.
            parameters: of the network.
            drop: drops the gradients, where hooks have changed what comes back.

        Raises:
            PrivacyError: another leaf, a temperature of the loop's own, say, has a part in it; or, in a batch that is
                looked at, a row of it comes from several rows of the network's.
        """
        if not output.requires_grad:
            return output
        passes, names = _ways(output, set(map(id, parameters)))
        if not passes:
            return output
        edge = GradientEdge(output.grad_fn, output.output_nr)  # type: ignore[arg-type]
        ends = [GradientEdge(node, 0) for node in passes]
        direct = len(passes) == 1 and passes[0].own.is_as_returned(output)
        if not direct:
            self._look(output, edge, ends)
            self._warn_of_choices(len(output), sum(node.own.rows for node in passes), names)

        def send(cotangent: Tensor) -> None:
            if not direct and output._backward_hooks:
                _surround(output, drop)
            # Ahead of what is between the loss and the network, which goes through its graph once more behind this.
            found = torch.autograd.grad([edge], ends, [cotangent.detach()], retain_graph=True, allow_unused=True)
            for node, part in zip(passes, found, strict=True):
                if part is not None:
                    node.own.note(part)

        copy = output.clone()
        nodes.put(copy.register_hook, send)
        return copy

    def _look(self, output: Tensor, edge: GradientEdge, ends: Sequence[GradientEdge]) -> None:
        """Refuses a row that comes from several, in the first batch and in one of :data:`EVERY`, as losses are."""
        if len(output) < 2 or not (self._due or secrets.randbelow(EVERY) == 0):
            return
        cotangent = torch.zeros_like(output)
        cotangent[secrets.randbelow(len(output))] = 0.5 + random_numbers(torch.rand, 1, *output.shape[1:])[0].to(output)
        found = torch.autograd.grad([edge], ends, [cotangent], retain_graph=True, allow_unused=True)
        reached = [flat_rows(part) for part in found if part is not None]
        # What is NaN throughout, as rows that do not count, is no way.
        if sum(int(((rows != 0.0) & ~rows.isnan()).any(1).sum()) for rows in reached) > 1:
            raise PrivacyError(
                "a row of what model.loss is given comes from several rows of the model's output: rows meet in what "
                "the loop computes in between (a batch norm, a mean over the batch, a division by its maximum, mixed "
                "rows), so that one sample changes what all others contribute. Compute each row from its own alone, "
                "or within the network. Nothing was released"
            )
        self._due = False

    def _warn_of_choices(self, given: int, returned: int, names: Set[str]) -> None:
        if given < returned and not self._warned and not names.isdisjoint(_CHOOSING):
            self._warned = True
            warn_caller(
                "model.loss is given some of the rows that the model returned. Whether a row is left out must follow "
                "from that row alone: choosing the hardest of a batch, or those above its mean loss, lets one sample "
                "decide on others, and no noise covers that",
                PrivacyWarning,
            )


_CHOOSING = frozenset({"IndexBackward0", "IndexSelectBackward0", "MaskedSelectBackward0", "TakeBackward0"})
"""Operations by which rows are chosen for what is in them, as slices are not."""


@uncompiled
def guarded(values: Tensor, drop: Callable[[], None]) -> Tensor:
    """A copy, whose hooks may look at what comes back to it and not change it.

    Args:
        values: what an operation has returned.
        drop: drops the gradients, where they do.
    """
    copy = values.clone()
    if copy.requires_grad:
        nodes.put(values.register_hook, _comparing(copy, drop))
    return copy


class Sealing:
    """Seals what one layer's run may not have changed under it until its way back, in one model.

    Args:
        drop: drops the gradients, where later hooks change something, or numbers were written over.
        watching: looks at all weights, which a layer's own operations read; what it returns refuses other ones.
    """

    def __init__(self, drop: Callable[[], None], watching: Callable[[], Callable[[], None]]) -> None:
        self._drop, self._watching = drop, watching

    def value(self, value: Tensor) -> Sealed:
        """A tensor that the layer was given, or has returned, and may keep."""
        return Sealed(value, self._drop, self._watching)

    def settings(self, layer: nn.Module) -> SealedNumbers:
        """What the layer's own attributes say, as it has left them."""
        return SealedNumbers(layer, self._drop)


class SealedNumbers:
    """Numbers in a layer's own attributes, which its way back may read; those that it sets itself are its own.

    Args:
        layer: the layer, after it has run.
        drop: as of :class:`Sealing`.
    """

    def __init__(self, layer: nn.Module, drop: Callable[[], None]) -> None:
        self._layer, self._drop, self._known = ref(layer), drop, numbers_of(layer)
        self._ahead: Numbers = {}

    def hold(self) -> None:
        """Called where the layer's own operations are next.

        Raises:
            PrivacyError: a number is another one.
        """
        layer = self._layer()
        if layer is None:
            return
        now, paths = numbers_of(layer), {path for path, _ in layer.named_modules()}
        for (path, name), value in self._known.items():
            if path in paths and now.get((path, name)) != value and (path, name) not in moved_by(layer):
                self._drop()
                raise PrivacyError(
                    f"{'.'.join(filter(None, (path, name)))!r} of a layer of your own, a {type(layer).__name__}, was "
                    "set to another value between the forward and the backward pass, which may read it, so that no "
                    "one bound holds for both: set it before the forward pass. The gradients are dropped; nothing was "
                    "released"
                )

    def close(self, together: Iterable[SealedNumbers | Sealed]) -> None:
        """As :meth:`hold`."""
        self.hold()
        layer = self._layer()
        self._ahead = {} if layer is None else numbers_of(layer)

    def require(self) -> None:
        """Called behind the layer's own graph, which may count what it does."""
        layer = self._layer()
        if layer is not None:
            note_moved(layer, self._ahead)


class Sealed:
    """Lets others look at a tensor that a layer keeps, and at what comes back to it, and not change them.

    Args:
        value: the tensor; hooks that it has are its layer's own, of which the rule is.
        drop: as of :class:`Sealing`.
        watching: as of :class:`Sealing`.
    """

    def __init__(self, value: Tensor, drop: Callable[[], None], watching: Callable[[], Callable[[], None]]) -> None:
        self._drop, self._watching = drop, watching
        known = frozenset(value._backward_hooks or ())
        self._behind = _comparing(value, drop, known) if value.requires_grad else None
        self._hooks: Any = ref(value._backward_hooks) if value.requires_grad else None
        # By their numbers: one that is removed may make room for another.
        self._met = frozenset(value._backward_hooks or ())
        # The tensor itself would hold its graph, and would not tell of an alias that has outlived it.
        self._held, self._value = value.detach(), ref(value)
        self._bits = fingerprints.of_all(self._held)

    def close(self, together: Iterable[SealedNumbers | Sealed]) -> None:
        """Called by a backward pass before it gets there.

        Args:
            together: all that is sealed of the layer's run: what one hook writes over, the next may put back.

        Raises:
            PrivacyError: as :meth:`hold`.
        """
        now = None if self._hooks is None else self._hooks()
        if now is not None and not now.keys() <= self._met:
            compare, require_weights = cast(Any, self._behind), self._watching()

            def behind(cotangent: Tensor | None) -> None:
                compare(cotangent)
                for one in together:
                    one.hold()
                require_weights()

            now[nodes.put(RemovableHandle, now).id] = behind
        if now is not None:
            self._met |= now.keys()
        self.hold()

    def require(self) -> None:
        """As :meth:`hold`; called once more behind the layer's own graph.

        Raises:
            PrivacyError: a hook has come meanwhile.
        """
        now = None if self._hooks is None else self._hooks()
        if now is not None and not now.keys() <= self._met:
            self._drop()
            raise PrivacyError(
                "a hook was put on what a layer of your own was given or has returned while a backward pass ran: put "
                "hooks before it begins. The gradients are dropped; nothing was released"
            )
        self.hold()

    def hold(self) -> None:
        """Called wherever others may have been.

        Raises:
            PrivacyError: the numbers were written over since.
        """
        value = self._value()
        elsewhere = value is not None and value.device == self._held.device and not _share(value, self._held)
        if elsewhere or fingerprints.of_all(self._held) != self._bits:
            self._drop()
            raise PrivacyError(
                "what a layer of your own was given or has returned, and has kept, was written to between the forward "
                "and the backward pass (through .data or NumPy, say), which differentiates by it: write to a copy "
                "(kept.detach().clone()). The gradients are dropped; nothing was released"
            )


def _share(value: Tensor, held: Tensor) -> bool:
    if value.layout != torch.strided or value.is_nested:
        return True
    return value.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()


def _surround(output: Tensor, drop: Callable[[], None]) -> None:
    """Lets what comes back to a tensor be compared before its hooks and behind them."""
    behind = _comparing(output, drop)
    hooks: Any = output._backward_hooks
    # Autograd follows the order in which they were put in.
    *others, first = hooks.items()
    hooks.clear()
    hooks.update([first, *others])
    nodes.put(output.register_hook, behind)


def _comparing(
    hooked: Tensor, drop: Callable[[], None], unless: Set[int] | None = None
) -> Callable[[Tensor | None], None]:
    """A hook that refuses what is not as it came to a tensor, which a first one, put there, notes.

    Args:
        hooked: the tensor.
        drop: drops the gradients, where it is not.
        unless: nothing is noted where there are no hooks but these, by their numbers.
    """
    came: list[tuple[Tensor | None, int, object]] = []

    def ahead(cotangent: Tensor | None) -> None:
        others = hooks()
        if others is not None and unless is not None and others.keys() <= {*unless, handle.id}:
            return
        # Where there is no other one, nobody is given what could be written to.
        alone = others is not None and len(others) == 1
        looked_at = None if alone or cotangent is None else _numbers(cotangent)
        came[:] = [(cotangent, 0 if cotangent is None else cotangent._version, looked_at)]

    def behind(cotangent: Tensor | None) -> None:
        known = came.pop() if came else None
        if known is not None and _changed(*known, cotangent):
            drop()
            raise PrivacyError(
                "a hook on an output of the model, on a value that a layer has kept, or on what model.loss was given, "
                "has changed what comes back: by a number that follows from the batch it would put one sample into the "
                "gradients of all others. Hooks may look, not change; what a row is to count for belongs into the "
                "loss. The gradients are dropped; nothing was released"
            )

    # Who saves an output is not warned of them.
    unserializable_hook(ahead)
    handle = nodes.put(hooked.register_hook, ahead)
    # Which outlive the tensor, as a part of the graph, and would hold themselves.
    hooks: ref[Any] = ref(hooked._backward_hooks)
    return behind


def _numbers(cotangent: Tensor) -> object:
    """What tells whether a tensor was written to beneath its counter; ``None`` on accelerators."""
    if type(cotangent) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(cotangent):
        return None
    return fingerprints.fingerprint(cotangent)


def _changed(before: Tensor | None, version: int, numbers: object, now: Tensor | None) -> bool:
    if before is None or now is None:
        # Nothing comes this way, where something else came back that is refused.
        return now is not before
    if is_coded(type(now)):
        # Its numbers are those that came, and what is computed with it is another function.
        return True
    if before._version != version or before.shape != now.shape:
        return True
    if numbers is not None and _numbers(before) != numbers:
        return True
    return now is not before and not bool(((now == before) | (now.isnan() & before.isnan())).all())


def _graph_of(output: Tensor) -> tuple[int, object]:
    """How often a tensor was written to, and what computes it: the node itself would hold all of the pass."""
    node = output.grad_fn
    return output._version, None if node is None else (node.name(), node._sequence_nr())


def leaves_beside(inputs: Tensor) -> list[Any]:
    """What would fill gradients of tensors that a pass's inputs were computed from; none of the inputs themselves."""
    return [] if inputs.grad_fn is None else [node for node in _nodes(inputs.grad_fn) if hasattr(node, "variable")]


def _nodes(root: Any) -> Iterator[Any]:
    """The nodes of a graph, down to the gates of passes, behind which each sample is bounded."""
    seen, left = set(), [root]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not node.name().startswith("_OutermostGate"):
            left += [below for below, _ in node.next_functions]


def _ways(output: Tensor, known: set[int]) -> tuple[list[Any], set[str]]:
    """The gates of passes that an output comes from, and the names of operations in between."""
    found, names = [], set()
    for node in _nodes(output.grad_fn):
        if isinstance(getattr(node, "own", None), Own):
            found.append(node)
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise PrivacyError(
                "what model.loss is given hangs on a tensor that requires gradients and is not of the network, a "
                "temperature beside it, say: its gradient is a sum over samples that no noise is added to. Make it a "
                "parameter of the network, or detach it. Nothing was released"
            )
        names.add(node.name())
    return found, names
