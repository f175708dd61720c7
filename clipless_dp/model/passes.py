"""The register of passes: what entered the gradients of a step is witnessed, not inferred.

Each forward pass of a wrapped model with gradients on opens a :class:`Pass`. It notes the bounds at its weights and
settings, and which rows came in. The network runs on aliases of its parameters, which lead back to them through one
:class:`_Door`; at its output stands the outermost gate. A backward pass enters by the gate, once and at first order,
and ends at the door, which alone adds to ``.grad``. So whatever else adds to a gradient, or changes one, shows.

A compiled graph has the gate, as opaque operators, but no door: there each ``.grad`` may change once for each pass that
entered by the gate.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.errors import InputError, PrivacyError
from clipless_dp.gates.arithmetic import drop_rows_, largest_norm, per_sample, sample_norms, scale_factors
from clipless_dp.model.surroundings import refuse_interference
from clipless_dp.precision import outside_autocast
from clipless_dp.sampling import draws, fingerprints
from clipless_dp.sampling.draws import Draw, Rows

_DROPPED = "The gradients are dropped; nothing was released"
_SPENT = (
    "What is done with private gradients, their norm or their direction, would decide what a step releases (skipped "
    "batches, sharpness-aware steps), and no noise covers that. Take the step with what came in; skip_draw() says that "
    "a batch is left out for another reason, clipless_dp.passes.unwitnessed() that nothing of a pass trains anything, "
    "passes.public() that its rows are nobody's, such as a generator's"
)


class Watched(Protocol):
    """What a register asks of the model whose passes it keeps."""

    def bounds_of_pass(self) -> tuple[Sensitivity | None, object]:
        """The bounds that hold now, and a fingerprint of all that they rest on."""
        ...

    def check_pass(self, fingerprint: object) -> None:
        """Raises :class:`PrivacyError` where what the bounds of a pass rest on is not what it was."""
        ...


class Pass:
    """One forward pass, and the backward pass through it.

    Attributes:
        sensitivity: the bounds that hold for each of its rows; ``None`` where they are those of the step.
        fingerprint: of what they rest on.
        rows: what came in; ``None`` of public rows.
        beside: the draw that was in hand while what came in was of none.
        public: whether the rows are declared to be no one's.
        entered: whether a backward pass has come through it.
        declared: whether the rows are those that :meth:`Register.rows` announced.
    """

    def __init__(
        self,
        register: Register,
        sensitivity: Sensitivity | None,
        fingerprint: object,
        rows: Rows | None,
        *,
        beside: Draw | None,
        public: bool,
        inputs: Tensor | None = None,
    ) -> None:
        self.register = register
        self.sensitivity = sensitivity
        self.fingerprint = fingerprint
        self.rows = rows
        self.beside = beside
        self.public = public
        self.entered = False
        self.declared = _declared.tensor is not None and inputs is _declared.tensor
        self._inputs = None if inputs is None else (inputs, _fingerprint_of(rows, inputs))

    def refuse_other_inputs(self) -> None:
        """Refuses rows that are not what they were on the way forward, as in a buffer that was filled again."""
        kept, self._inputs = self._inputs, None
        if kept is not None and fingerprints.fingerprint(kept[0]) != kept[1]:
            raise PrivacyError(
                "the rows of a pass were overwritten between its forward pass and its backward pass, which caps them "
                f"for what they were: give each batch memory of its own. {_DROPPED}"
            )

    def refuse_padding(self, norms: Tensor) -> None:
        """Refuses cotangents of rows that pad a draw: how many they are depends on what was drawn.

        Padding is NaN, whose loss does not count; of integers, and where it was zeroed, it is not.

        Args:
            norms: of the rows' cotangents.
        """
        rows = self.rows
        if rows is None or rows.draw is None or rows.stop <= rows.draw.rows:
            return
        behind = norms[max(0, rows.draw.rows - rows.start) :]
        if bool(((behind > 0.0) & torch.isfinite(behind)).any()):
            self.register.drop()
            raise PrivacyError(
                "rows that pad a draw count in this loss: give model.loss the mask of the batch, or pass the rows that "
                f"are samples only. {_DROPPED}"
            )


def _fingerprint_of(rows: Rows | None, inputs: Tensor) -> object:
    return fingerprints.fingerprint(inputs) if rows is None else draws.fingerprint_of(rows, inputs)


class _Held(NamedTuple):
    """A gradient as the register left it."""

    gradient: ref[Tensor]
    version: int
    sample: object


class _Declared(threading.local):
    """What the passes of this thread are told about their rows, and whether they are passes at all."""

    tensor: Tensor | None = None
    fingerprint: object = None
    rows: Rows | None = None
    beside: Draw | None = None
    public = False
    unwitnessed = False


_declared = _Declared()
_registers: WeakValueDictionary[int, Register] = WeakValueDictionary()
_keys = itertools.count(1)


def count_from(start: int) -> None:
    """Registers and passes to come are numbered from here on, so that no number tells how many there were."""
    global _keys
    _keys = itertools.count(start)


class Register:
    """The passes of one model since its gradients were last empty.

    Args:
        model: the model.

    Attributes:
        passes: those that have added to the gradients.
        lock: held while the network runs on aliases of its parameters.
        key: names it in compiled graphs.
        taker: the optimizer that the last gradients of passes went to, as long as it lives.
    """

    taker: ReferenceType[object] | None = None

    def __init__(self, model: Watched) -> None:
        self._model = ref(model)
        self.passes: list[Pass] = []
        self._computed: list[Pass] = []
        self._filled: set[int] = set()
        self.lock = threading.RLock()
        self.key = next(_keys)
        self._parameters: list[nn.Parameter] = []
        self._places: list[tuple[dict[str, nn.Parameter | None], str, int]] = []
        self._held: dict[nn.Parameter, _Held] = {}
        self._taint: str | None = None
        self._handles: list[Any] = []
        self._awaited: set[int] = set()
        self._compiled_task: int | None = None
        self._open: dict[int, Pass] = {}
        self._task: tuple[int, bool] | None = None
        self.sharded = False
        _registers[self.key] = self

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients it keeps."""
        return self._parameters

    def follow(self, net: nn.Module) -> None:
        """Notes where the parameters of the network are held."""
        found: dict[int, int] = {}
        self._parameters, self._places = [], []
        for part in net.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in found:
                    found[id(parameter)] = len(self._parameters)
                    self._parameters.append(parameter)
                self._places.append((cast(Any, part._parameters), name, found[id(parameter)]))

    def open(self, inputs: Tensor) -> Pass:
        """A pass of these rows.

        Raises:
            PrivacyError: hooks or modes in force may change what the network computes.
            InputError: rows that were declared public are those of the draw in hand.
        """
        refuse_interference()
        model = self._model()
        assert model is not None
        with self.lock:
            sensitivity, fingerprint = model.bounds_of_pass()
        if _declared.public:
            _refuse_private_rows(inputs)
            return Pass(self, sensitivity, fingerprint, None, beside=None, public=True, inputs=inputs)
        if inputs is _declared.tensor:
            if _fingerprint(inputs) != _declared.fingerprint:
                raise PrivacyError(
                    "the loss changed the rows that it was given before the model saw them, so that a sample may count "
                    f"for more than its bound: change rows one by one with augment=..., or in the data set. {_DROPPED}"
                )
            rows, beside = _declared.rows, _declared.beside
        else:
            rows, beside = origin(inputs)
        return Pass(self, sensitivity, fingerprint, rows, beside=beside, public=False, inputs=inputs)

    @contextmanager
    def running(self, opened: Pass) -> Iterator[None]:
        """The network reads aliases of its parameters within, through which gradients come back to the door."""
        parameters = self._parameters
        if not parameters:
            yield
            return
        with self.lock:
            if any(held.get(name) is not parameters[index] for held, name, index in self._places):
                raise PrivacyError(
                    "a parameter of model.net was removed or replaced after wrapping: wrap the network anew"
                )
            aliases = _Door.apply(opened, *parameters)  # type: ignore[no-untyped-call]
            try:
                for held, name, index in self._places:
                    held[name] = aliases[index]
                yield
            finally:
                for held, name, index in self._places:
                    held[name] = parameters[index]

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The network holds its parameters within, in the middle of a pass too."""
        kept = [held.get(name) for held, name, _ in self._places]
        for held, name, index in self._places:
            held[name] = self._parameters[index]
        try:
            yield
        finally:
            for (held, name, _), value in zip(self._places, kept, strict=True):
                held[name] = value

    def enter(self, entering: Pass) -> None:
        """A backward pass begins at the outermost gate.

        Raises:
            PrivacyError: it has been there before, or is to be differentiated itself, or what the bounds rest on has
                changed, or private and public rows come back together.
        """
        try:
            if torch.is_grad_enabled():
                raise PrivacyError(
                    "a second derivative through the wrapped model (a gradient penalty, a Jacobian, create_graph=True) "
                    "passes by the gates, and no bound holds for it. A constraint on the weights "
                    "(constraints.Spectral, constraints.Orthogonal) bounds the slope of the network without one. "
                    + _DROPPED
                )
            if entering.entered:
                raise PrivacyError(
                    "a pass was back-propagated twice, so that its samples would count twice: back-propagate one loss "
                    "that adds both terms, without retain_graph. " + _DROPPED
                )
            refuse_interference()
            entering.refuse_other_inputs()
            model = self._model()
            if model is not None:
                model.check_pass(entering.fingerprint)
            task = torch._C._current_graph_task_id()
            if self._task is not None and self._task[0] == task and self._task[1] != entering.public:
                raise PrivacyError(
                    "public and private rows came back from one loss, through which private ones may change what "
                    "public ones contribute: call backward() once for each kind. " + _DROPPED
                )
            self._task = task, entering.public
            entering.entered = True
            if self.sharded:
                self.reconcile()
                self._note_computed(entering)
                self.passes.append(entering)
        except BaseException:
            self.drop()
            raise

    @torch.no_grad()
    def deliver(self, closing: Pass, gradients: Sequence[Tensor | None], nodes: Sequence[Any]) -> list[Tensor | None]:
        """Adds the gradients of a pass to those of the parameters; returns those that somebody else asked for.

        Args:
            closing: the pass.
            gradients: one for each parameter.
            nodes: through which autograd would add them.
        """
        returned: list[Tensor | None] = [None] * len(gradients)
        self.reconcile()
        counted, left_out = False, False
        self._note_computed(closing)
        added: list[tuple[nn.Parameter, Tensor]] = []
        given: set[int] = set()
        for index, (parameter, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            if gradient is None:
                continue
            try:
                if not torch._C._will_engine_execute_node(nodes[index]):
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
                self._note(parameter)
        if counted and left_out:
            self._taint = (
                "backward(inputs=...) filled the gradients of some parameters and left others out: which they are must "
                "not depend on a batch. Freeze parameters by requires_grad_(False)"
            )
        if added:
            torch._foreach_add_([cast(Tensor, parameter.grad) for parameter, _ in added], [own for _, own in added])
            for parameter, _ in added:
                self._note(parameter)
        return returned

    def _note_computed(self, computed: Pass) -> None:
        """Private gradients exist from here on, whatever becomes of them."""
        if not computed.public and all(computed is not other for other in self._computed):
            self._computed.append(computed)

    def entered_compiled(self, entering: Pass) -> None:
        """As :meth:`enter`, for a graph whose gradients autograd adds afterwards."""
        task = torch._C._current_graph_task_id()
        self.unhook()
        if task != self._compiled_task:
            # Of several passes in one backward pass none has added to a gradient yet.
            self.reconcile()
        self._compiled_task = task
        self.enter(entering)
        self._note_computed(entering)
        self.passes.append(entering)
        self._awaited = {id(parameter) for parameter in self._parameters}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._added_by_engine)
            for parameter in self._parameters
            if parameter.requires_grad
        ]

    def _added_by_engine(self, parameter: Tensor) -> None:
        """Notes a gradient right where autograd has added to it, once for a backward pass."""
        held = cast(nn.Parameter, parameter)
        if id(held) not in self._awaited:
            return
        self._awaited.discard(id(held))
        self._filled.add(id(held))
        known, gradient = self._held.get(held), cast(Tensor, held.grad)
        if known is None or known.gradient() is None or known.version == gradient._version - 1:
            self._note(held)

    def unhook(self) -> None:
        """Removes what was to note the gradients of a compiled pass: it is over."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._awaited.clear()

    def reconcile(self) -> None:
        """Follows what was done to the gradients elsewhere: those that are gone are forgotten, changed ones taint."""
        if self.sharded:
            # What ``fully_shard`` sums and splits goes by no door.
            if all(parameter.grad is None for parameter in self._parameters):
                self.forget()
            return
        self.unhook()
        kept, altered, emptied = False, None, False
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is None:
                self._held.pop(parameter, None)
                emptied |= id(parameter) in self._filled
                continue
            known = self._held.get(parameter)
            if known is not None and known.gradient() is gradient and known.version == gradient._version:
                if known.sample is None or known.sample == fingerprints.sample(gradient):
                    kept = True
                    continue
                altered = parameter
            elif not bool(gradient.any()):
                self._note(parameter)
                emptied |= id(parameter) in self._filled
            else:
                altered = parameter
        if altered is not None:
            self._taint = (
                "gradients were changed, or added to, by something else than passes through the wrapped model: a loss "
                "of model.net or of an exported copy, a hook, clip_grad_norm_, a scaled .grad. Scale the learning rate "
                "by a public number instead, and call model(...) for all that is trained on"
            )
        elif not kept:
            self.passes, self._taint = [], None
            self._filled.clear()
        elif emptied:
            self._taint = "the gradients of some parameters were dropped, and those of others kept. " + _SPENT

    def _note(self, parameter: nn.Parameter, *, sampled: bool = True) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self._held[parameter] = _Held(
            ref(gradient), gradient._version, fingerprints.sample(gradient) if sampled else None
        )

    def note_all(self, *, sampled: bool = True) -> None:
        """Takes the gradients as they are for the register's own; those that are private need not be sampled."""
        if not self.sharded:
            self._held.clear()
            for parameter in self._parameters:
                if parameter.grad is not None:
                    self._note(parameter, sampled=sampled)

    def let_go(self) -> None:
        """Lets torch swap the gradients with converted ones; a step on what is in them now is refused then."""
        self._held.clear()

    def forget(self) -> None:
        """No pass is in the gradients any more, and none is missing from them."""
        self.passes, self._computed, self._taint = [], [], None
        self._filled.clear()

    def drop(self) -> None:
        """Drops the gradients, so that no later step releases them."""
        for parameter in self._parameters:
            parameter.grad = None
        self._held.clear()
        self.forget()

    @contextmanager
    def apart(self, rows: Rows | None, beside: Draw | None, *, views: int = 1, public: bool = False) -> Iterator[None]:
        """Passes within start from empty gradients and count as one pass of these rows, which joins those before.

        After an error the gradients are as before.

        Args:
            rows: what comes in.
            beside: see :class:`Pass`.
            views: how often each row comes in; the gradients are divided by it.
            public: see :class:`Pass`.
        """
        self.reconcile()
        parameters = self._parameters
        before = [parameter.grad for parameter in parameters]
        earlier, self.passes = self.passes, []
        computed, self._computed = self._computed, []
        filled, self._filled = self._filled, set()
        taint = self._taint
        held, self._held = self._held, {}
        try:
            for parameter in parameters:
                parameter.grad = None
            with _declaring(rows=rows, beside=beside, public=public):
                yield
            self.reconcile()
            if self._taint is None and not public and len(self._computed) != len(self.passes):
                self._taint = "the loss computed private gradients and did not leave them in place. " + _SPENT
            if self._taint is not None and taint is None:
                raise PrivacyError(f"{self._taint}. Of this batch nothing was added")
            if views > 1:
                torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], views)
        except BaseException:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            self.passes, self._held, self._taint = earlier, held, taint
            self._computed, self._filled = computed, filled
            raise
        made, self.passes = self.passes, earlier
        self._computed, self._filled = computed, self._filled | filled
        if made:
            known = (
                None if made[0].sensitivity is None else joined(made, lambda: cast(Sensitivity, made[0].sensitivity))
            )
            self.passes.append(Pass(self, known, None, rows, beside=beside, public=public))
            self._note_computed(self.passes[-1])
        self._taint = self._taint or taint
        with torch.no_grad():
            for parameter, gradient in zip(parameters, before, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
        self.note_all()

    @contextmanager
    def rows(self, seen: Tensor, counts: Tensor) -> Iterator[None]:
        """Within :meth:`apart`, one pass of this tensor and nothing else, forth and back.

        Args:
            seen: the rows.
            counts: boolean, which of them count; a loss may leave a piece out of which none does.

        Raises:
            PrivacyError: the model was passed other rows, or these more than once or not at all.
        """
        before = len(self.passes)
        with _declaring(tensor=seen, fingerprint=_fingerprint(seen)):
            yield
        made = self.passes[before:]
        if len(made) > 1 or not all(some.declared for some in made):
            raise PrivacyError(
                "the loss passed the model other rows than those that it was given, or passed them more than once, "
                "so that they would count twice: call the model once, on the very tensor that comes in"
            )
        if not made and bool(counts.any()):
            raise PrivacyError(
                "the loss left rows out that it was given: whether a sample enters may then depend on others. Pass the "
                "model the very tensor that comes in, and leave rows out with the mask"
            )

    def witnessed(self) -> list[Pass]:
        """The passes that the gradients consist of.

        Raises:
            PrivacyError: something else is in them.
        """
        self.reconcile()
        reason = self._taint
        if reason is None and any(all(one is not other for other in self.passes) for one in self._computed):
            reason = "private gradients were computed that are not in this step: they were dropped or read. " + _SPENT
        if reason is not None:
            self.drop()
            raise PrivacyError(f"{reason}. {_DROPPED}")
        return list(self.passes)


class _Door(torch.autograd.Function):
    """The parameters as the network sees them; what comes back goes to the register."""

    @staticmethod
    def forward(ctx: Any, opened: Pass, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.opened = opened
        ctx.set_materialize_grads(False)
        return parameters

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        opened: Pass = ctx.opened
        nodes = [node for node, _ in ctx.next_functions]
        return None, *opened.register.deliver(opened, gradients, nodes[-len(gradients) :])


class _OutermostGate(torch.autograd.Function):
    """The cotangent gate at the output, by which a backward pass enters."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, limit: float, opened: Pass | None, token: Tensor | None) -> Tensor:
        ctx.limit, ctx.opened = limit, opened
        ctx.save_for_backward(token)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None]:
        (cotangent,) = cotangents
        norms = sample_norms(cotangent)
        (token,) = ctx.saved_tensors
        if token is not None:
            norms = torch.ops.clipless_dp_passes.enter_pass(norms, token)
        else:
            ctx.opened.register.enter(ctx.opened)
        norms = outside_autocast(norms)
        looks = norms.device.type == "cpu" and token is None
        if looks:
            ctx.opened.refuse_padding(norms)
        if looks and len(norms) and float(norms.max()) <= ctx.limit:
            return cotangent, None, None, None
        factors = scale_factors(norms, cap=ctx.limit, floor=ctx.limit)
        gated = cotangent * per_sample(factors, cotangent).to(cotangent.dtype)
        return drop_rows_(gated, norms, largest_norm(ctx.limit, norms.dtype)), None, None, None


def outermost_gate(values: Tensor, limit: float, opened: Pass | Tensor) -> Tensor:
    """Caps each sample's cotangent at ``limit``, and lets a backward pass through a pass once.

    Args:
        values: ``(B, ...)``.
        limit: the cap.
        opened: the pass, or in a compiled graph its token.
    """
    seen, token = (None, opened) if isinstance(opened, Tensor) else (opened, None)
    gated: Tensor = _OutermostGate.apply(values, limit, seen, token)  # type: ignore[no-untyped-call]
    return gated


def _open_compiled(inputs: Tensor, key: int) -> Tensor:
    register = _registers[key]
    opened = register.open(inputs)
    number = next(_keys)
    register._open[number] = opened
    while len(register._open) > _MOST_OPEN:
        del register._open[next(iter(register._open))]
    return torch.tensor([key, number])


def _enter_compiled(norms: Tensor, token: Tensor) -> Tensor:
    key, number = token.tolist()
    opened = _registers[key]._open.get(number)
    if opened is None:
        raise PrivacyError("this pass was opened too long ago to be back-propagated: run it again")
    # Within the operator gradients are off, whatever they are around it.
    with torch.set_grad_enabled(norms.requires_grad):
        opened.register.entered_compiled(opened)
    return norms.detach().clone()


_MOST_OPEN = 4096
"""Compiled passes that wait for a backward pass; those that never get one are forgotten."""

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


def open_operator(inputs: Tensor, key: int) -> Tensor:
    """Opens a pass in a compiled graph, and returns its token."""
    token: Tensor = torch.ops.clipless_dp_passes.open_pass(inputs, key)
    return token


def origin(inputs: Tensor) -> tuple[Rows, Draw | None]:
    """Where rows come from; and the draw in hand, if they are of none."""
    found = draws.find(inputs)
    return found, draws.in_hand() if found.draw is None else None


def _fingerprint(rows: Tensor) -> object:
    return rows._version, fingerprints.fingerprint(rows)


@contextmanager
def _declaring(**values: Any) -> Iterator[None]:
    before = {name: getattr(_declared, name) for name in values}
    vars(_declared).update(values)
    try:
        yield
    finally:
        vars(_declared).update(before)


@contextmanager
def public() -> Iterator[None]:
    """Passes within are of rows that are nobody's: they are charged to none and count as rows of no draw."""
    with _declaring(public=True):
        yield


@contextmanager
def unwitnessed() -> Iterator[None]:
    """Passes within may be differentiated as often as one likes; what they add to a ``.grad`` is refused by a step."""
    with _declaring(unwitnessed=True):
        yield


def is_unwitnessed() -> bool:
    """Whether passes now are nobody's, so that no step may release what they add."""
    return _declared.unwitnessed


def is_private() -> bool:
    """Whether a pass now is one that the register keeps, and of somebody's rows."""
    return is_witnessed() and not _declared.public


def is_witnessed() -> bool:
    """Whether a pass now is one that the register keeps."""
    return torch.is_grad_enabled() and not _declared.unwitnessed


def _refuse_private_rows(inputs: Tensor) -> None:
    if not len(inputs):
        return
    ours = {row.tobytes() for row in inputs.detach().flatten(1).cpu().numpy()}
    for tensor, rows in draws.batches_in_hand():
        if tensor.shape[1:] != inputs.shape[1:]:
            continue
        theirs = tensor[:rows].to(inputs.dtype).detach().flatten(1).cpu().numpy()
        if any(row.tobytes() in ours for row in theirs):
            raise InputError(
                "a row that was declared public is a row of a draw in hand: public rows are nobody's data, such as "
                "noise or what a model trained privately has generated"
            )


def joined(passed: Sequence[Pass], now: Callable[[], Sensitivity]) -> Sensitivity:
    """The bounds that hold for the rows of all passes: for each parameter the largest.

    Args:
        passed: the passes; public ones do not count.
        now: the bounds to take where there is none.
    """
    kinds: list[Sensitivity] = []
    for some in passed:
        if some.public:
            continue
        if some.sensitivity is None:
            kinds = []
            break
        if all(some.sensitivity is not known for known in kinds):
            kinds.append(some.sensitivity)
    if not kinds:
        return now()
    return kinds[0] if len(kinds) == 1 else kinds[0].joined(*kinds[1:])


def drawn_by(passed: Sequence[Pass]) -> list[Draw]:
    """The draws that the rows of the passes are of."""
    found = {id(some.rows.draw): some.rows.draw for some in passed if some.rows is not None and some.rows.draw}
    return list(found.values())
