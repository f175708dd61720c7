"""The register of passes: what entered the gradients of a step is witnessed, not inferred.

Each forward pass of a wrapped model with gradients on opens a :class:`clipless_dp.model.passes.Pass`. It notes the
bounds at its weights and settings, and which rows came in. The network runs on aliases of its parameters, which lead
back to them through one door; at its output stands the outermost gate. A backward pass enters by the gate, once and at
first order, and ends at the door, which alone adds to ``.grad``. So whatever else adds to a gradient, or changes one,
shows.

A compiled graph has the gate, as opaque operators, but no door, and a sharded model's gradients are summed and split
elsewhere: there each ``.grad`` may change once for a backward pass that entered by the gate, and is noted right then.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.distributed import placement
from clipless_dp.errors import PrivacyError
from clipless_dp.model import nodes
from clipless_dp.model.door import Aliases
from clipless_dp.model.noted import Noted, is_coded
from clipless_dp.model.owed import Owed, for_all
from clipless_dp.model.passes import DROPPED, LEFT_OUT, SPENT, Pass, Watched, declaring, joined, opened
from clipless_dp.model.surroundings import is_out_of_memory, refuse_interference
from clipless_dp.model.turns import Turns
from clipless_dp.sampling.series import Draw, Rows
from clipless_dp.uncompiled import uncompiled

_MOST_OPEN = 4096
"""Compiled passes that wait for a backward pass; those that never get one are forgotten."""

registers: WeakValueDictionary[int, Register] = WeakValueDictionary()
_keys = itertools.count(1)


def count_from(start: int) -> None:
    """Registers and passes to come are numbered from here on, so that no number tells how many there were."""
    global _keys
    _keys = itertools.count(start)


class Register:
    """The passes of one model since its gradients were last empty.

    Args:
        model: the model.
        net: its network.

    Attributes:
        parameters: those whose gradients it keeps, what gates leave their counts in among them.
        counts: the latter.
        passes: those that have added to the gradients.
        noted: the gradients as the register left them.
        lock: held while the network runs on aliases of its parameters.
        turns: of passes and steps.
        key: names it in compiled graphs.
        aliases: of the parameters, for the time of a pass.
        taker: the optimizer that the last gradients of passes went to, as long as it lives.
    """

    taker: ReferenceType[object] | None = None

    def __init__(self, model: Watched, net: nn.Module) -> None:
        self._model = ref(model)
        self.passes: list[Pass] = []
        self._owed: list[Owed] = []
        self._filled: set[int] = set()
        self.lock = threading.RLock()
        self.turns = Turns(self.lock)
        self.key = next(_keys)
        self.noted = Noted()
        self._taint: str | None = None
        self._handles: list[Any] = []
        self._pending: list[Pass] = []
        self._awaited: set[int] = set()
        self._engine_task: int | None = None
        self._open: dict[int, Pass] = {}
        self._task: tuple[int, bool] | None = None
        registers[self.key] = self
        self.follow(net)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the gradients, which are summed and split elsewhere."""
        return self.noted.sharded

    def follow(self, net: nn.Module) -> None:
        """Notes where the parameters of the network are held."""
        self.aliases = Aliases(net)
        self.parameters, self.counts = self.aliases.parameters, self.aliases.counts
        self.turns.follow(self.parameters)

    @uncompiled
    def open(self, inputs: Tensor) -> Pass:
        """A pass of these rows.

        Raises:
            PrivacyError: hooks or modes in force may change what is computed; or, as an InputError, see :func:`opened`.
        """
        refuse_interference()
        model = self._model()
        assert model is not None
        with self.lock:
            begun = opened(inputs, *model.bounds_of_pass(), self.names())
            begun.trains = self._trains()
            if not self.owed():
                self.turns.begin(begun)
        return begun

    def _trains(self) -> tuple[bool, ...]:
        return tuple([parameter.requires_grad for parameter in self.parameters])

    def _training(self) -> list[nn.Parameter]:
        """For which passes are owed: what is frozen is moved by none, and other models may share it."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def running(self, begun: Pass) -> AbstractContextManager[None]:
        """With the lock held, the network reads aliases of its parameters within, whose gradients are delivered."""
        return self.aliases.running(partial(self.deliver, begun), self.turns.passing)

    def resting(self) -> AbstractContextManager[None]:
        """The network holds its parameters within, in the middle of a pass too."""
        return self.aliases.resting()

    def enter(self, entering: Pass, norms: Tensor | None = None) -> None:
        """A backward pass begins at the outermost gate.

        Args:
            entering: the pass.
            norms: of the rows' cotangents, where a look at them does not wait for a device.

        Raises:
            PrivacyError: it has been there before, or is to be differentiated itself, or what the bounds rest on has
                changed, or private and public rows come back together, or rows that pad a draw do.
        """
        with self._dropping():
            entering.refuse_again()
            refuse_interference()
            entering.refuse_other_inputs()
            if (model := self._model()) is not None:
                model.check_pass(entering.fingerprint)
            task = torch._C._current_graph_task_id()
            if self._task is not None and self._task[0] == task and self._task[1] != entering.public:
                raise PrivacyError(
                    "public and private rows came back from one loss, through which private ones may change what "
                    "public ones contribute: call backward() once for each kind. " + DROPPED
                )
            if norms is not None:
                entering.refuse_padding(norms)
            entering.refuse_hooked()
            self._task = task, entering.public
            entering.entered = True

    @torch.no_grad()
    def deliver(self, closing: Pass, gradients: Sequence[Tensor | None], filling: Sequence[Any]) -> list[Tensor | None]:
        """Adds the gradients of a pass to those of the parameters; returns those that somebody else asked for.

        Args:
            closing: the pass.
            gradients: one for each parameter.
            filling: the nodes through which autograd would add them.
        """
        returned: list[Tensor | None] = [None] * len(gradients)
        self.reconcile()
        with self._dropping():
            if closing.refuse_later_hooks() and (model := self._model()) is not None:
                # They may have written to weights.
                model.check_pass(closing.fingerprint)
        counted, left_out = False, False
        self._note_computed(closing)
        added: list[tuple[nn.Parameter, Tensor]] = []
        given: set[int] = set()
        for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                continue
            try:
                if not torch._C._will_engine_execute_node(filling[index]):
                    left_out = True
                    continue
            except RuntimeError:
                # autograd.grad, which fills no .grad.
                returned[index] = gradient
                continue
            if not counted:
                # Before anything is added: what fails half-way has come in all the same.
                counted = True
                self.passes.append(closing)
                if not closing.entered:
                    self._taint = (
                        "a gradient came back from within the network, around the gate at its output: from a value "
                        "that a layer has kept, say. Let all that is trained on be a loss of the model's output"
                    )
            self._filled.add(id(parameter))
            if parameter.grad is not None:
                added.append((parameter, gradient))
            else:
                own = gradient.stride() == parameter.stride() and gradient.data_ptr() not in given
                parameter.grad = gradient.detach() if own else torch.empty_like(parameter).copy_(gradient)
                given.add(gradient.data_ptr())
                self.noted.note(parameter)
        if counted and left_out:
            self._taint = LEFT_OUT
        if added:
            torch._foreach_add_([cast(Tensor, parameter.grad) for parameter, _ in added], [own for _, own in added])
            for parameter, _ in added:
                self.noted.note(parameter)
        return returned

    def owed(self) -> list[Pass]:
        """The passes whose private gradients were computed, here or by another wrapper, and that are not settled."""
        self._owed = for_all(self._training(), self._owed)
        return list({id(one): one for some in self._owed for one in some.passes}.values())

    def names(self) -> frozenset[int]:
        """By which draws that were left out know this model's parameters."""
        self._owed = for_all(self._training(), self._owed)
        return frozenset(some.key for some in self._owed)

    def _note_computed(self, computed: Pass) -> None:
        """Private gradients exist from here on, whatever becomes of them."""
        if not computed.public:
            self._owed = for_all(self._training(), self._owed)
            for some in self._owed:
                some.note(computed)

    def _strike(self, done: Iterable[Pass]) -> None:
        for some in self._owed:
            some.strike(done)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Passes within are of made-up rows and leave nothing behind, not even that they were."""
        before = self.owed()
        try:
            yield
        finally:
            self.drop()
            known = {id(one) for one in before}
            self._strike([one for one in self.owed() if id(one) not in known])

    def open_compiled(self, inputs: Tensor) -> int:
        """As :meth:`open`, for a graph, which knows the pass by a number."""
        self._open[number := next(_keys)] = self.open(inputs)
        while len(self._open) > _MOST_OPEN:
            del self._open[next(iter(self._open))]
        return number

    def enter_compiled(self, number: int, norms: Tensor | None = None) -> None:
        """As :meth:`enter`, for a graph."""
        entering = self._open.get(number)
        if entering is None:
            raise PrivacyError("this pass was opened too long ago to be back-propagated: run it again")
        self.enter_by_engine(entering, norms)

    def enter_by_engine(self, entering: Pass, norms: Tensor | None = None) -> None:
        """As :meth:`enter`, for passes whose gradients arrive elsewhere than at the door."""
        task = torch._C._current_graph_task_id()
        self._unhook()
        if task != self._engine_task or not self._pending:
            # Of several passes in one backward pass none has added to a gradient yet.
            self.reconcile()
            self._awaited = {id(parameter) for parameter in self.parameters if parameter.requires_grad}
        self._engine_task = task
        trained = self._training()
        with self._dropping():
            nodes.refuse_hooked(*(() if self.sharded else map(nodes.filling, trained)))
        self.enter(entering, norms)
        self._note_computed(entering)
        self._pending.append(entering)
        self._handles = [nodes.put(one.register_post_accumulate_grad_hook, self._added_by_engine) for one in trained]

    @uncompiled
    def _added_by_engine(self, parameter: Tensor) -> None:
        """Notes a gradient right where it was added to, once for a backward pass."""
        held = cast(nn.Parameter, parameter)
        if id(held) not in self._awaited:
            return
        self._awaited.discard(id(held))
        self._filled.add(id(held))
        if self.noted.was_added_to(held):
            self.noted.note(held)
        with self._dropping():
            for one in () if self.sharded else self._pending:
                one.refuse_later_hooks(nodes.filling(held))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def unhook(self) -> None:
        """Removes what was to note the gradients of a pass that the engine fills; what has come is counted.

        Within its backward pass nothing is said yet.
        """
        self._unhook()
        if not self._pending or torch._C._current_graph_task_id() == self._engine_task:
            return
        came, self._pending = self._pending, []
        reached = {id(parameter) for parameter in self.parameters if parameter.requires_grad} - self._awaited
        if not reached:
            # autograd.grad, which fills no .grad: it stays owed.
            return
        self.passes += came
        model = self._model()
        if not self.sharded and model is not None and self._awaited & model.reached(came[0]):
            self._taint = LEFT_OUT
        self._awaited = set()

    def reconcile(self) -> None:
        """Follows what was done to the gradients elsewhere: those that are gone are forgotten, changed ones taint."""
        with self.turns.holding():
            self._reconcile()

    def _reconcile(self) -> None:
        self.unhook()
        if self.counts and all(p.grad is None for p in self.parameters[: len(self.parameters) - len(self.counts)]):
            # Who clears the parameters' gradients knows of no others.
            for count in self.counts:
                count.grad = None
        kept, altered, emptied = False, None, False
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is None:
                self.noted.forget(parameter)
                emptied |= id(parameter) in self._filled
                continue
            if self.noted.knows(parameter):
                if self.noted.has_values(parameter):
                    kept = True
                    continue
                altered = parameter
            elif not (is_coded(gradient) or bool(placement.local(gradient).any())):
                self.noted.note(parameter)
                emptied |= id(parameter) in self._filled
            else:
                altered = parameter
        if altered is not None:
            self._taint = (
                "gradients were changed, or added to, by something else than passes through the wrapped model: a loss "
                "of model.net or of an exported copy, a hook, clip_grad_norm_, a scaled .grad, or one with code of its "
                "own. Scale the learning rate by a public number instead, call model(...) for all that is trained on"
            )
        elif not kept:
            self.passes, self._taint = [], None
            self._filled.clear()
        elif emptied:
            self._taint = "the gradients of some parameters were dropped, and those of others kept. " + SPENT

    def forget(self) -> None:
        """No pass is in the gradients any more, and none is owed: all were released, or are left out by word."""
        self.passes, self._taint, self._filled = [], None, set()
        self.turns.end()
        self._strike(self.owed())

    def drop(self) -> None:
        """Drops the gradients, so that no later step releases them. What was computed stays owed."""
        with self.turns.holding():
            for parameter in self.parameters:
                parameter.grad = None
            self.noted.clear()
            self.passes, self._pending, self._taint = [], [], None
            self._filled.clear()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """What is refused within drops the gradients."""
        try:
            yield
        except BaseException:
            self.drop()
            raise

    @contextmanager
    def apart(
        self,
        rows: Rows | None,
        beside: Draw | None,
        *,
        views: int = 1,
        divided: Sequence[tuple[Rows, int]] = (),
        divisor: int = 1,
        public: bool = False,
        unseen: bool = False,
    ) -> Iterator[None]:
        """Passes within start from empty gradients and count as one pass of these rows, which joins those before.

        After an error the gradients are as before, and what was computed is owed.

        Args:
            rows: what comes in.
            beside: see :class:`Pass`.
            views: how often each row comes in; the gradients are divided by it.
            divided: which of the rows the passes within divide by what by themselves.
            divisor: what the gradients are divided by besides: of how many of a person's rows each is one.
            public: see :class:`Pass`.
            unseen: whether no code of a user's runs within that could look at a gradient. Then nothing is owed where
                memory was too small, and the same rows may be passed in smaller pieces.
        """
        self.reconcile()
        parameters = self.parameters
        before = [parameter.grad for parameter in parameters]
        earlier, self.passes = self.passes, []
        owed = {id(one) for one in self.owed()}
        taint, filled, self._filled = self._taint, self._filled, set()
        noted = self.noted.put_aside()

        def computed() -> list[Pass]:
            return [one for one in self.owed() if id(one) not in owed]

        try:
            for parameter in parameters:
                parameter.grad = None
            with declaring(rows=rows, beside=beside, public=public):
                yield
            self.reconcile()
            if self._taint is None and not public and len(computed()) != len(self.passes):
                self._taint = "the loss computed private gradients and did not leave them in place. " + SPENT
            aside = {id(p): gradient for p, gradient in zip(parameters, before, strict=True) if gradient is not None}
            if taint is None and not self.noted.are_as(noted, aside):
                self._taint = "gradients that were there were changed while a loss was computed, which adds to them"
            if self._taint is not None and taint is None:
                raise PrivacyError(f"{self._taint}. Of this batch nothing was added")
            if views * divisor > 1:
                held_now = [parameter.grad for parameter in parameters if parameter.grad is not None]
                torch._foreach_div_(held_now, views * divisor)
        except BaseException as error:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            self.passes, self._taint = earlier, taint
            self.noted.put_back(noted)
            self._filled, self._pending = filled, []
            if unseen and is_out_of_memory(error):
                self._strike(computed())
            raise
        made, self.passes = self.passes, earlier
        self._filled = filled | self._filled
        if made:
            known = (
                None if made[0].sensitivity is None else joined(made, lambda: cast(Sensitivity, made[0].sensitivity))
            )
            self.passes.append(one := Pass(known, None, rows, beside=beside, public=public))
            one.parts = [part for whole in made for part in whole.parts or [whole]]
            one.divided = [some for whole in made for some in whole.divided]
            if rows is not None and not one.divided:
                one.divided = divided or [(rows, divisor)]
            self._strike(computed())
            self._note_computed(one)
        self._taint = self._taint or taint
        with torch.no_grad():
            for parameter, gradient in zip(parameters, before, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
        self.noted.note_all(self.parameters)

    def witnessed(self) -> list[Pass]:
        """The passes that the gradients consist of.

        Raises:
            PrivacyError: something else is in them, or something is missing.
        """
        self.reconcile()
        reason = self._taint
        if reason is None:
            there = {id(one) for one in self.passes}
            missing = [one for one in self.owed() if id(one) not in there]
            if any(not one.lost for one in missing):
                reason = "private gradients were computed that are not in this step: they were dropped or read. "
                reason += SPENT
            elif missing and not all(one.public or one.is_of_open_draw() for one in self.passes):
                reason = "rows of no draw come after a draw that was left out with a refused step. " + SPENT
            elif any(one.trains != self._trains() for some in self.passes for one in some.private_parts()):
                reason = (
                    "requires_grad of a parameter was changed between a pass and its step: what trains must not depend "
                    "on a gradient. Freeze parameters before the forward pass, or after the step"
                )
        if reason is not None:
            self.drop()
            raise PrivacyError(f"{reason}. {DROPPED}")
        model = self._model()
        if self.sharded and model is not None:
            for whole in self.passes:
                for one in whole.private_parts():
                    model.check_pass(one.fingerprint)
        return list(self.passes)
