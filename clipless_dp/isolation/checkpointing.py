"""Activation checkpointing in a network that runs sample by sample: what a part of it saves is computed again.

The graph of a pass stays as it is, with its gates and its edges, and one backward pass goes through it. Only what the
operations within ``torch.utils.checkpoint.checkpoint(function, ...)`` save for their way back is let go, and computed
again when the first of them asks for it (Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*, §4): by
the same code, sample by sample under ``torch.func.vmap``, behind the same mode, with the same random numbers. Each call
that is handed something of a sample must be that of the first time, down to the bits of what samples share
(:mod:`clipless_dp.isolation.repetition`), as code may read what was changed between. So what a gate sees of a sample
is what it would have seen without; and what is computed again is of weights that lead nowhere, so that no gradient can
come to a parameter by it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

# By their names: while a network runs, these names in torch are refused.
from torch._C import DisableTorchFunction
from torch._C._functorch import get_unwrapped, is_batchedtensor, maybe_current_level, maybe_get_bdim, maybe_get_level
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import noop_context_fn

from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.gating import Gating
from clipless_dp.isolation.repetition import Calls, changed
from clipless_dp.noise.randomness import Moment

Hook = Callable[[Any], Any]
_Kind = tuple[torch.Size, torch.dtype, torch.device]

OVERWRITTEN = (
    "the network writes into a tensor that it has handed to torch.utils.checkpoint, from which the part is computed "
    "again: write into a copy (values.clone()), or use functions that return what they make"
)
_SELECTIVE = (
    "context_fn of torch.utils.checkpoint (selective checkpointing) runs code of its own on all samples at once: leave "
    "it out, so that the whole part is computed again"
)


_READ = "what a part of a network saves that is computed again can be read by its way back alone: leave it out"
_OLD = "to compute parts of a network again that runs sample by sample needs torch 2.8: leave checkpointing out"


class _Saved:
    """Stands for a tensor that an operation has saved.

    Attributes:
        place: the number of tensors that the region had saved before it.
    """

    __slots__ = ("__weakref__", "place", "region")

    def __init__(self, region: Region, place: int) -> None:
        self.region, self.place = region, place


class Region:
    """One call of a function whose operations save nothing but the call itself.

    Args:
        gating: the run that the call is in.
        function: what is called.
        args: its arguments by position.
        kwargs: and by name.
    """

    def __init__(self, gating: Gating, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        assert gating.rerun is not None
        self._rerun = gating.rerun
        # No value of the run itself is kept, but what it is wrapped around, and by which axis samples are told apart.
        leaves, self._spec = pytree.tree_flatten((*_opened(function), tuple(args), dict(kwargs)))
        level = maybe_get_level(gating.sample)
        self._sample = get_unwrapped(gating.sample)
        # One for each tensor, however often it is handed over: code may ask whether two are the same.
        self._inputs: list[tuple[Tensor, int, int]] = []
        self._places: list[tuple[int, int]] = []
        self._named: list[tuple[int, str]] = []
        given: dict[int, Tensor] = {}
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            name = gating.name_of(leaf)
            if name is not None:
                self._named.append((place, name))
                leaves[place] = None
            elif is_batchedtensor(leaf) and maybe_get_level(leaf) == level:
                if id(leaf) not in given:
                    value = get_unwrapped(leaf)
                    self._inputs.append((value, maybe_get_bdim(leaf), value._version))
                    given[id(leaf)] = leaf
                self._places.append((place, list(given).index(id(leaf))))
                leaves[place] = None
        self._leaves = leaves
        self._reshaped = [gating.is_reshaped(value) for value in given.values()]
        self.calls = Calls(gating.name_of, given.values(), None)
        self._moment = Moment(gating.sample.device)
        self._kinds: list[_Kind] = []
        self._saved: list[ref[_Saved]] = []
        self._found: dict[int, Tensor] = {}
        # Backward passes go through the operations of each device in a thread of its own.
        self._lock = threading.Lock()

    def pack(self, value: Tensor) -> _Saved:
        """What an operation keeps in place of a tensor."""
        saved = _Saved(self, len(self._kinds))
        self._kinds.append(_kind(value))
        self._saved.append(ref(saved))
        return saved

    def refuse_overwritten(self) -> None:
        """Refuses a call whose arguments are no longer what they were.

        Raises:
            PrivacyError: they are not.
        """
        if any(value._version != version for value, _, version in self._inputs):
            raise PrivacyError(OVERWRITTEN)

    def value(self, place: int) -> Tensor:
        """What an operation has saved, computed again, and handed out once."""
        if torch._C._current_graph_task_id() == -1:
            # Values of all samples in memory that no run knows of.
            raise PrivacyError(_READ)
        with self._lock:
            if place not in self._found:
                self._compute()
            return self._found.pop(place)

    def _compute(self) -> None:
        self.refuse_overwritten()
        kinds: list[_Kind] = []

        def keep(value: Tensor) -> None:
            place = len(kinds)
            kinds.append(_kind(value))
            # What nobody holds any more is not asked for.
            if place < len(self._saved) and self._saved[place]() is not None:
                self._found[place] = value

        def run(gating: Gating, *own: Tensor) -> None:
            leaves = list(self._leaves)
            for value, reshaped in zip(own, self._reshaped, strict=True):
                if reshaped:
                    gating.take_reshaped(value)
            for place, index in self._places:
                leaves[place] = own[index]
            for place, name in self._named:
                leaves[place] = gating.stands_for(name)
            build, held, args, kwargs = pytree.tree_unflatten(leaves, self._spec)
            calls = Calls(gating.name_of, own, self.calls)
            with hooked(gating, calls, keep, _unasked):
                build(*held)(*args, **kwargs)
            calls.finish()

        self._found.clear()
        values = [value.detach().requires_grad_(value.requires_grad) for value, _, _ in self._inputs]
        with self._moment.again(), torch.enable_grad():
            self._rerun(run, self._sample, values, [axis for _, axis, _ in self._inputs])
        if kinds != self._kinds:
            raise changed("it saves other tensors for its way back")


def _kind(value: Tensor) -> _Kind:
    with DisableTorchFunction():
        return value.shape, value.dtype, value.device


def _unpack(saved: _Saved) -> Tensor:
    return saved.region.value(saved.place)


def _unasked(value: Any) -> Tensor:
    raise PrivacyError("a network differentiates within a part of it that is computed again: leave that out")


def _opened(function: Any) -> tuple[Any, tuple[Any, ...]]:
    """What makes a function of the values that it holds, and these: what they are in a later run, it is called with."""
    if isinstance(function, partial):
        build, held = _opened(function.func)
        return _Bound(build, len(held)), (*held, function.args, dict(function.keywords))
    if isinstance(function, FunctionType) and (function.__closure__ or function.__defaults__):
        try:
            cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        except ValueError:
            # A variable that is not there yet.
            return (lambda: function), ()
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((cells, function.__defaults__))):
            return _Closed(function), (cells, function.__defaults__)
    return (lambda: function), ()


class _Bound:
    """Makes a partial function anew."""

    def __init__(self, build: Any, count: int) -> None:
        self._build, self._count = build, count

    def __call__(self, *held: Any) -> Any:
        args, kwargs = held[self._count :]
        return partial(self._build(*held[: self._count]), *args, **kwargs)


class _Closed:
    """Makes a function anew, of the variables around it and its defaults."""

    def __init__(self, function: FunctionType) -> None:
        self._code, self._globals = function.__code__, function.__globals__
        self._name, self._named = function.__name__, function.__kwdefaults__

    def __call__(self, cells: Sequence[Any], defaults: Any) -> Any:
        made = FunctionType(self._code, self._globals, self._name, defaults, tuple(map(CellType, cells)))
        made.__kwdefaults__ = self._named
        return made


@contextmanager
def hooked(gating: Gating, calls: Calls, pack: Hook, unpack: Hook) -> Iterator[None]:
    """Within, calls are noted, and what operations save goes through these hooks; the run refuses any other ones."""
    autograd = torch._C._autograd
    told = autograd._saved_tensors_hooks_get_disabled_error_message()
    autograd._saved_tensors_hooks_enable()
    try:
        autograd._push_saved_tensors_default_hooks(pack, unpack)
        gating.packs, gating.calls = pack, calls
        try:
            yield
        finally:
            gating.packs = gating.calls = None
            autograd._pop_saved_tensors_default_hooks()
    finally:
        if told is not None:
            autograd._saved_tensors_hooks_disable(told)


_repeated: dict[int, tuple[int, Any]] = {}
_guard = threading.Lock()


@contextmanager
def repeating(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within, what these modules compute is computed again on the way back, in whichever thread they run behind gates.

    The first thread that enters changes their ``forward``, and the last one that leaves gives it back.
    """
    chosen = {id(part): part for part in parts}
    with _guard:
        for key, part in chosen.items():
            count, own = _repeated.get(key, (0, vars(part).get("forward")))
            if not count:
                vars(part)["forward"] = partial(_called_again, part.forward)
            _repeated[key] = count + 1, own
    try:
        yield
    finally:
        with _guard:
            for key, part in chosen.items():
                count, own = _repeated.pop(key)
                if count > 1:
                    _repeated[key] = count - 1, own
                elif own is None:
                    del vars(part)["forward"]
                else:
                    vars(part)["forward"] = own


def _called_again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _again(function, args, kwargs)


def checkpointed(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    context_fn: Any = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    **kwargs: Any,
) -> Any:
    """Runs in place of ``torch.utils.checkpoint.checkpoint`` while a network runs; arguments as of that.

    Which of torch's two ways is asked for makes no difference, nor do ``determinism_check``, ``debug`` and
    ``early_stop``; random numbers are always the same the second time. What is called within runs as it is.

    Raises:
        PrivacyError: ``context_fn`` is given, or arguments are overwritten; or torch is older than 2.8.
    """
    if context_fn is not noop_context_fn:
        raise PrivacyError(_SELECTIVE)
    return _again(function, args, kwargs)


def _again(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        # By which hooks of the network's own are noticed.
        raise PrivacyError(_OLD)
    modes = reversed(_get_current_function_mode_stack())
    gating = next((mode for mode in modes if isinstance(mode, Gating)), None)
    rerun = None if gating is None else gating.rerun
    if gating is None or rerun is None or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    if maybe_current_level() != maybe_get_level(gating.sample):
        # Within a transform of the network's own.
        return function(*args, **kwargs)
    with DisableTorchFunction():
        region = Region(gating, function, args, kwargs)
    gating.rerun = None
    try:
        with hooked(gating, region.calls, region.pack, _unpack):
            returned = function(*args, **kwargs)
    finally:
        gating.rerun = rerun
    with DisableTorchFunction():
        region.refuse_overwritten()
    return returned
