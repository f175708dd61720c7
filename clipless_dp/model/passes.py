"""Forward passes of a wrapped model: what each of them rests on, and what its rows are declared to be."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import InitVar, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.errors import InputError, PrivacyError
from clipless_dp.model import nodes
from clipless_dp.model.own_loss import leaves_beside
from clipless_dp.sampling import draws, fingerprints
from clipless_dp.sampling.series import Draw, Rows

SPENT = (
    "What is done with private gradients, their norm or their direction, would decide what a step releases (skipped "
    "batches, sharpness-aware steps), and no noise covers that. Take the step with what came in; skip_draw() says that "
    "a batch is left out for another reason, clipless_dp.passes.unwitnessed() that nothing of a pass trains anything, "
    "passes.public() that its rows are nobody's, such as a generator's"
)

LEFT_OUT = (
    "backward(inputs=...) filled the gradients of some parameters and left others out: which they are must not depend "
    "on a batch. Freeze parameters by requires_grad_(False)"
)

DROPPED = "The gradients are dropped; nothing was released"


class _Declared(threading.local):
    """What the passes of this thread are told about their rows, and whether they are passes at all.

    Public rows that this package has made up itself need not be compared with those of draws.
    """

    tensor: Tensor | None = None
    fingerprint: object = None
    weights: Tensor | None = None
    rows: Rows | None = None
    beside: Draw | None = None
    public = False
    made_up = False
    unwitnessed = False
    alike = False


_declared = _Declared()


@dataclass(eq=False, repr=False)
class Pass:
    """One forward pass, and the backward pass through it.

    Attributes:
        sensitivity: the bounds that hold for each of its rows; ``None`` where they are those of the step.
        fingerprint: of what they rest on.
        rows: what came in; ``None`` of public rows.
        beside: the draw that was in hand while what came in was of none.
        public: whether the rows are declared to be no one's.
        entered: whether a backward pass has come through it.
        declared: whether the rows are those that were announced with :func:`announcing`.
        trains: of each parameter, whether it took gradients when the pass began.
        parts: the passes that it stands for, if it is not one by itself.
        lost: whether its draw was left out for good, together with its gradients.
        beside_inputs: what would fill gradients of what the inputs were computed from.
        divided: which of its rows came in by :meth:`Register.apart`, and what their gradients were divided by.
        weights: of its rows, ``(B,)``, by which gates are to multiply; ``None`` where all are whole.
        weighed: whether a forward pass gave its layers these.
        hooks: how many others had put when it began.
        entry: where a backward pass has entered it, as long as that is there, and how many hooks there were then.
    """

    sensitivity: Sensitivity | None
    fingerprint: object
    rows: Rows | None
    beside: Draw | None = field(kw_only=True)
    public: bool = field(kw_only=True)
    inputs: InitVar[Tensor | None] = field(default=None, kw_only=True)
    entered: bool = field(default=False, init=False)
    trains: tuple[bool, ...] = field(default=(), init=False)
    parts: Sequence[Pass] = field(default=(), init=False)
    lost: bool = field(default=False, init=False)
    divided: Sequence[tuple[Rows, int]] = field(default=(), init=False)
    weighed: bool = field(default=False, init=False)
    entry: tuple[Callable[[], Any], int] | None = field(default=None, init=False)

    def __post_init__(self, inputs: Tensor | None) -> None:
        self.hooks = nodes.count()
        learned = inputs is not None and inputs.requires_grad and not self.public
        self.beside_inputs = leaves_beside(inputs) if learned and inputs is not None else []
        self.declared = _declared.tensor is not None and inputs is _declared.tensor
        self.weights = _declared.weights if self.declared else None
        self._inputs = None if inputs is None else (inputs, _fingerprint_of(self.rows, inputs))

    def private_parts(self) -> Sequence[Pass]:
        """The passes of private rows that it stands for."""
        return () if self.public else self.parts or (self,)

    def is_of_open_draw(self) -> bool:
        """Whether its rows are of a draw that no step has used up."""
        return self.rows is not None and self.rows.draw is not None and not self.rows.draw.used

    def refuse_again(self) -> None:
        """Refuses to be back-propagated twice, or at second order."""
        if torch.is_grad_enabled():
            raise PrivacyError(
                "a second derivative through the wrapped model (a gradient penalty, a Jacobian, create_graph=True) "
                "passes by the gates, and no bound holds for it. A constraint on the weights "
                "(constraints.Spectral, constraints.Orthogonal) bounds the slope of the network without one. " + DROPPED
            )
        if self.entered:
            raise PrivacyError(
                "a pass was back-propagated twice, so that its samples would count twice: back-propagate one loss "
                "that adds both terms, without retain_graph. " + DROPPED
            )

    def refuse_hooked(self) -> None:
        """Refuses hooks that others have put on nodes since it began, where a backward pass enters it.

        Of public rows, nodes are the concern of what made these.
        """
        here, put = nodes.current(), nodes.count()
        if put != self.hooks and not self.public:
            nodes.refuse_hooked(here)
        self.entry = nodes.weakly(here), put

    def refuse_later_hooks(self, *filling: Any) -> bool:
        """Refuses those that were put behind that, also on what fills gradients; tells whether there may be any.

        Args:
            filling: the nodes that do.
        """
        if self.public or self.entry is None:
            return False
        node, put = self.entry
        if put != nodes.count():
            nodes.refuse_hooked(node(), *filling)
        return self.hooks != nodes.count()

    def refuse_other_inputs(self) -> None:
        """Refuses rows that are not what they were on the way forward, as in a buffer that was filled again.

        And a backward pass that fills gradients of what they were computed from.
        """
        self._refuse_learned_inputs()
        kept, self._inputs = self._inputs, None
        if kept is not None and fingerprints.fingerprint(*kept) != kept[1]:
            raise PrivacyError(
                "the rows of a pass were overwritten between its forward pass and its backward pass, which caps them "
                f"for what they were: give each batch memory of its own. {DROPPED}"
            )

    def _refuse_learned_inputs(self) -> None:
        """Refuses a backward pass that fills gradients of what the inputs were computed from: a layer ahead, a scale.

        Slopes of the inputs, by ``autograd.grad`` or in their own ``.grad``, are of one row each.
        """
        nodes, self.beside_inputs = self.beside_inputs, []
        for node in nodes:
            try:
                fills = torch._C._will_engine_execute_node(node)
            except RuntimeError:
                # autograd.grad, which fills no .grad.
                continue
            if fills:
                raise PrivacyError(
                    "the model's inputs were computed from a tensor that requires gradients (a layer ahead of the "
                    "model, a learned scale or prompt): its gradient is a sum over samples that has no bound and gets "
                    f"no noise. Make it a part of the network, or detach the inputs. {DROPPED}"
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
        behind = norms[max(0, rows.draw.rows - rows.start) :].detach()
        # NumPy takes a tenth of the time for so few.
        few = behind.numpy() if behind.is_cpu else behind
        if bool(((few > 0.0) & (few < math.inf)).any()):
            raise PrivacyError(
                "rows that pad a draw count in this loss: give model.loss the mask of the batch, or pass the rows that "
                f"are samples only. {DROPPED}"
            )


def _fingerprint_of(rows: Rows | None, inputs: Tensor) -> object:
    return fingerprints.fingerprint(inputs) if rows is None else draws.fingerprint_of(rows, inputs)


def opened(
    inputs: Tensor, sensitivity: Sensitivity | None, fingerprint: object, names: frozenset[int] = frozenset()
) -> Pass:
    """A pass of these rows, which begins now; bounds and fingerprint as :class:`Pass` has them.

    Args:
        inputs: the rows.
        sensitivity: the bounds.
        fingerprint: of what they rest on.
        names: see :func:`origin`.

    Raises:
        PrivacyError: rows that were announced have changed since.
        InputError: rows that were declared public are those of the draw in hand.
    """
    if _declared.public:
        if not _declared.made_up:
            _refuse_private_rows(inputs)
        return Pass(sensitivity, fingerprint, None, beside=None, public=True, inputs=inputs)
    if inputs is _declared.tensor:
        if _announced(inputs) != _declared.fingerprint:
            raise PrivacyError(
                "the loss changed the rows that it was given before the model saw them, so that a sample may count "
                f"for more than its bound: change rows one by one with augment=..., or in the data set. {DROPPED}"
            )
        rows, beside = _declared.rows, _declared.beside
    else:
        rows, beside = origin(inputs, names)
    return Pass(sensitivity, fingerprint, rows, beside=beside, public=False, inputs=inputs)


def _refuse_private_rows(inputs: Tensor) -> None:
    if not len(inputs):
        return
    ours = {row.tobytes() for row in inputs.detach().flatten(1).cpu().numpy()}
    # Rows of several inputs at once are known by these.
    private = draws.find(inputs).draw is not None
    for tensor, rows in [] if private else draws.batches_in_hand():
        if tensor.shape[1:] == inputs.shape[1:]:
            theirs = tensor[:rows].to(inputs.dtype).detach().flatten(1).cpu().numpy()
            private = private or any(row.tobytes() in ours for row in theirs)
    if private:
        raise InputError(
            "a row that was declared public is a row of a draw in hand: public rows are nobody's data, such as "
            "noise or what a model trained privately has generated"
        )


def origin(inputs: Tensor, names: frozenset[int] = frozenset()) -> tuple[Rows, Draw | None]:
    """Where rows come from; and the draw in hand, if they are of none.

    Args:
        inputs: the rows.
        names: by which draws that were left out know the model: copies of these are theirs.
    """
    found = draws.find(inputs)
    if found.draw is None:
        found = draws.left_out(inputs, names) or found
    return found, draws.in_hand() if found.draw is None else None


def _announced(rows: Tensor) -> object:
    return rows._version, fingerprints.fingerprint(rows)


@contextmanager
def declaring(**values: Any) -> Iterator[None]:
    """Passes within are told so of their rows."""
    before = {name: getattr(_declared, name) for name in values}
    vars(_declared).update(values)
    try:
        yield
    finally:
        vars(_declared).update(before)


def announcing(seen: Tensor, weights: Tensor | None = None) -> AbstractContextManager[None]:
    """Passes within of this very tensor are of the rows that are declared, and of these weights, ``(B,)``."""
    return declaring(tensor=seen, fingerprint=_announced(seen), weights=weights)


@contextmanager
def public() -> Iterator[None]:
    """Passes within are of rows that are nobody's: they are charged to none and count as rows of no draw."""
    with declaring(public=True):
        yield


@contextmanager
def unwitnessed() -> Iterator[None]:
    """Passes within may be differentiated as often as one likes; what they add to a ``.grad`` is refused by a step."""
    with declaring(unwitnessed=True):
        yield


@contextmanager
def viewing() -> Iterator[None]:
    """As :func:`unwitnessed`, for views of rows: passes run as those of the rows themselves do."""
    with declaring(unwitnessed=True, alike=True):
        yield


def chooses_rows() -> bool:
    """Whether a pass now may run at numbers of rows that are chosen for it."""
    return _declared.alike or not _declared.unwitnessed


def is_unwitnessed() -> bool:
    """Whether passes now are nobody's, so that no step may release what they add."""
    return _declared.unwitnessed


def is_private() -> bool:
    """Whether a pass now is one that the register keeps, and of somebody's rows."""
    return is_witnessed() and not _declared.public


def is_witnessed() -> bool:
    """Whether a pass now is one that the register keeps."""
    return torch.is_grad_enabled() and not _declared.unwitnessed


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


class Watched(Protocol):
    """What a register asks of the model whose passes it keeps."""

    def bounds_of_pass(self) -> tuple[Sensitivity | None, object]:
        """The bounds that hold now, and a fingerprint of all that they rest on."""
        ...

    def check_pass(self, fingerprint: object) -> None:
        """Raises :class:`PrivacyError` where what the bounds of a pass rest on is not what it was."""
        ...

    def reached(self, begun: Pass) -> set[int]:
        """The parameters (by ``id``) that a pass has gradients of."""
        ...
