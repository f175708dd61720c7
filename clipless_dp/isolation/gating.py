"""Lets every use of a trainable parameter go through a gate, whatever code it is in.

The network's own code runs within ``torch.func.vmap``, on one sample. A mode of torch sees each function that the
code calls. Where a parameter is among the arguments, the function is replaced by one of
:mod:`clipless_dp.isolation.functions`; for functions that have none, each sample gets a copy of the parameter.
Afterwards the graph is walked: a gradient may come to a parameter through gates alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.isolation.dispatch import applied
from clipless_dp.isolation.functions import Affine, Cap, Expanded, Sizes, Spread
from clipless_dp.isolation.hidden import PACKING, foreign_mode
from clipless_dp.isolation.joint import Together
from clipless_dp.isolation.repetition import Calls
from clipless_dp.isolation.seen import Seen

Handler = Callable[..., Any]
"""Takes the gating and a function's own arguments; returns its value, or ``NotImplemented``."""

Rerun = Callable[[Callable[..., None], Tensor, Sequence[Tensor], Sequence[int]], None]
"""Runs code of the network on one sample once more, after its pass: ``code(gating, *inputs)``, given what tells samples
apart, the inputs of all samples, and the axes of samples in these. What it computes leads to no parameter."""

_HANDLERS: dict[Any, Handler] = {}
_ALWAYS: set[Any] = set()

_ATTRIBUTES: tuple[Any, ...] = (
    Tensor.shape, Tensor.dtype, Tensor.device, Tensor.requires_grad, Tensor.ndim, Tensor.is_leaf, Tensor.layout,
    Tensor.is_cuda, Tensor.is_sparse,
)  # fmt: skip
_ABOUT = {attribute.__get__ for attribute in _ATTRIBUTES} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.is_contiguous, Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.data_ptr,
    Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
"""What tells about a parameter, and reads nothing of it."""

_CUT = {cast(Any, Tensor.data).__get__, Tensor.detach}
"""What reads a parameter without a way back for a gradient."""

_INTERLEAVED = (torch.channels_last, torch.channels_last_3d)
_ASKING = {Tensor.requires_grad_, cast(Any, Tensor.requires_grad).__set__}
_HOOKS = {Tensor.register_hook, Tensor.retain_grad}
_TOLD = {Tensor.__repr__, Tensor.__format__}
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_NAMESPACES = {"aten", "prims", "torchvision", "profiler"}
"""Whose operators are known to have rules of ``vmap``, to be run for one sample after the other, or to read none."""
_OVERWRITING = {
    "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__",
    "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__setitem__", "__set__", "__delete__",
}  # fmt: skip

_MATHS = (
    "add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "matmul", "mm", "bmm", "addmm",
    "baddbmm", "pow", "eq", "ne", "lt", "le", "gt", "ge", "where", "maximum", "minimum",
)  # fmt: skip
_READING: set[Any] = {
    found
    for name in _MATHS
    for found in (getattr(torch, name), getattr(Tensor, name), getattr(Tensor, f"__{name}__", None))
    if found is not None
} | {
    Tensor.__rsub__, Tensor.__rdiv__, Tensor.__rtruediv__, Tensor.__rpow__, Tensor.__rmatmul__, torch.cat, torch.stack,
    functional.linear, functional.embedding, functional.layer_norm, functional.scaled_dot_product_attention,
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
"""What writes into none of its arguments, and returns memory of its own."""

_SPREADING: set[Any] = {
    found
    for name in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide")
    for found in (getattr(torch, name), getattr(Tensor, name))
} | {Tensor.__rsub__, Tensor.__rdiv__}
"""What repeats the smaller of its arguments."""

_SHAPING = {
    Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.squeeze, Tensor.flatten, Tensor.__getitem__, Tensor.transpose,
    Tensor.permute, torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten, torch.transpose, torch.permute,
}  # fmt: skip
"""What returns the entries of its first argument in another shape."""

_LOOKING = _READING | {
    torch.einsum, functional.rms_norm,
    Tensor.__getitem__, Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.gather,
    Tensor.index_select, Tensor.masked_fill, torch.gather, torch.index_select, torch.masked_fill,
}  # fmt: skip
"""What writes into none of its arguments."""


def handles(*functions: Any, always: bool = False) -> Callable[[Handler], Handler]:
    """Registers what runs in place of functions of torch that meet a parameter, or wherever they are called."""

    def decorate(handler: Handler) -> Handler:
        for function in functions:
            _HANDLERS[function] = handler
            if always:
                _ALWAYS.add(function)
        return handler

    return decorate


WRITTEN = (
    "the network writes into a trainable parameter in its forward, which would take values of the samples into a "
    "weight past every gate, or is lost: write into a copy (weight.clone()), or constrain weights by a parametrization"
)


def _differ(values: Iterable[Any]) -> bool:
    return any(
        is_batchedtensor(value) if isinstance(value, Tensor) else isinstance(value, (list, tuple)) and _differ(value)
        for value in values
    )


def _same(first: Tensor, second: Tensor) -> bool:
    if torch.equal(first, second):
        return True
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())


class Gating(TorchFunctionMode):
    """One run of a network's code on one sample.

    Args:
        sample: differs from sample to sample.
        sources: the tensors that stand for trainable parameters in this pass, by name.
        also: the names by which the code may hold the parameters themselves, by ``id``.
        caps: the gate of each.
        fields: the inputs of all samples, each contiguous and in memory of its own, if look-ups are to be noted.
        counters: what each gate leaves its count in, by parameter; those of gates that count.
        joint: whether a weight and the bias that it is used with have one cap.
        together: what waits for the gradients of all parameters, where these have one cap.
        rerun: where parts of the network may be computed again on the way back.

    Attributes:
        packs: takes what operations save, in a part that is computed again; ``None`` elsewhere.
        calls: notes what is called there.
        uses: for each parameter the gates that it went through: their kinds, and the entries that they sum over.
        groups: the parameters that were used in one operation, for each use.
        limits: for each input, and each entry of a sample's, the length of the shortest table that it was looked up in;
            0 where it was in none.
    """

    def __init__(
        self,
        sample: Tensor,
        sources: Mapping[str, Tensor],
        also: Mapping[int, str],
        caps: Mapping[str, Cap],
        fields: Sequence[Tensor] = (),
        *,
        counters: Mapping[str, Tensor] | None = None,
        joint: bool = False,
        together: Together | None = None,
        rerun: Rerun | None = None,
    ) -> None:
        super().__init__()
        self.sample, self.rerun = sample, rerun
        self.packs: Any = None
        self.calls: Calls | None = None
        self.uses: dict[str, list[tuple[str, int]]] = {}
        self.limits = [torch.zeros(field[0].numel(), dtype=torch.int64) for field in fields]
        self._fields = fields
        self._sources = sources
        self._called = {**also, **{id(source): name for name, source in sources.items()}}
        # Frozen parameters have no gate.
        self._names = {held: name for held, name in self._called.items() if name in sources}
        self.groups: list[tuple[str, ...]] = []
        self._caps = caps
        self._counters = counters or {}
        self._joint, self._together = joint, together
        self._copies: dict[str, Tensor] = {}
        self._shaped: dict[int, tuple[ref[Tensor], Sizes]] = {}
        self._lent: dict[str, tuple[Tensor, int]] = {}
        self._seed = torch.initial_seed()
        self._modes = torch._C._len_torch_dispatch_stack()
        self._seen = Seen(sample, self._called, sources.values())

    def admit(self, values: Iterable[Tensor]) -> None:
        """These may be read in this run, as all that comes of them may."""
        self._seen.admit(values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces functions that meet a parameter."""
        kwargs = kwargs or {}
        if kwargs.get("memory_format") in _INTERLEAVED:
            # How values lie in memory is not a sample's, and says nothing of what they are.
            if func is Tensor.is_contiguous:
                return False
            kwargs = {**kwargs, "memory_format": torch.contiguous_format}
        if func in _ABOUT:
            return func(*args, **kwargs)
        if func in _HOOKS:
            raise PrivacyError(
                "the network hooks a tensor (register_hook, retain_grad) within its forward: a hook sees the gradients "
                "of all samples at once. Remove it"
            )
        if func in _ASKING and self._seen.knows(args[0]):
            return self._asked_for_gradients(*args, **kwargs)
        if torch._C._is_any_autocast_enabled():
            raise PrivacyError(
                "the network opens torch.autocast in its forward, which rounds gradients of the whole batch to 8 "
                "bits or so, and the bounds do not cover that: leave it out (enabled=False)"
            )
        if torch._C._len_torch_dispatch_stack() != self._modes:
            self._refuse_modes()
        if self.packs is not None:
            self._refuse_hooks()
        self._seen.refuse_strangers(args)
        if kwargs:
            self._seen.refuse_strangers(kwargs.values())
        if types:
            self._seen.refuse_strangers(types)
        if func in _TOLD or torch.initial_seed() != self._seed or isinstance(func, _OPERATORS):
            self._refuse_other_functions(func)
        # As the code has them.
        given, named = args, kwargs
        met = func not in _CUT and (self._meets(args) or bool(kwargs and self._meets(kwargs.values())))
        result: Any = NotImplemented
        if met or func in _ALWAYS:
            handler = _HANDLERS.get(func)
            if handler is not None:
                result = handler(self, *args, **kwargs)
        if result is NotImplemented:
            if met:
                self._refuse_writing(func, args, kwargs)
                lend = func not in _READING
                args = [self.expanded(value, lend=lend) for value in args]
                kwargs = {name: self.expanded(value, lend=lend) for name, value in kwargs.items()}
            if func in _SPREADING and self._shaped:
                args = self._spread(args)
            result = func(*args, **kwargs) if func in _LOOKING else self._guarded(func, args, kwargs)
        self._seen.note(result)
        if self.calls is not None:
            self.calls.note(func, given, named, result)
        if func in _SHAPING and args and isinstance(result, Tensor) and self.is_reshaped(args[0]):
            self._shaped[id(result)] = ref(result), self._shaped[id(args[0])][1]
        return result

    @staticmethod
    def _asked_for_gradients(value: Tensor, requires_grad: bool = True) -> Tensor:
        """Leaves what was computed as it is: as a leaf, it would lead to no parameter.

        Libraries ask so for the sake of one kind of activation checkpointing, which ours does without.
        """
        if not requires_grad and (is_batchedtensor(value) or value.requires_grad):
            raise ConfigurationError(
                "the network calls requires_grad_(False) on what it computes, which changes it for all that have it: "
                "use detach()"
            )
        return value

    def _spread(self, args: Sequence[Any]) -> Sequence[Any]:
        """Copies of parameters, as they are or in another shape, in the shape of what they meet in arithmetic."""
        try:
            shape = torch.broadcast_shapes(*(value.shape for value in args if isinstance(value, Tensor)))
        except RuntimeError:
            return args

        def spread(value: Any) -> Any:
            if not self.is_reshaped(value) or cast(Tensor, value).shape == shape:
                return value
            return Spread.apply(value, tuple(shape), self._shaped[id(value)][1])  # type: ignore[no-untyped-call]

        return [spread(value) for value in args]

    def is_reshaped(self, value: Tensor) -> bool:
        """Whether a value is a copy of a parameter, as it is or in another shape."""
        known = self._shaped.get(id(value))
        return known is not None and known[0]() is value

    def take_reshaped(self, value: Tensor) -> None:
        """Has a value for such a copy, of whose gradient nobody is told."""
        self._shaped[id(value)] = ref(value), Sizes()

    def _refuse_modes(self) -> None:
        """Refuses what was entered within the forward and is handed the values of all samples; not what only counts."""
        # Modes of functions are handed what the network's code has, one sample, and what they call comes here.
        foreign = foreign_mode(torch._C._len_torch_dispatch_stack(), torch._C._get_dispatch_stack_at)
        if foreign is not None:
            raise PrivacyError(
                f"the network enters the mode {foreign} (TorchDispatchMode) in its forward, which sees all samples at "
                "once: leave it out"
            )

    def _refuse_hooks(self) -> None:
        """Refuses hooks of the network's own on what is saved, which elsewhere cannot be set."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None or hooks[0] is not self.packs:
            raise PrivacyError(PACKING)

    def _refuse_writing(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = str(getattr(func, "__name__", ""))
        overwrites = name in _OVERWRITING or (name.endswith("_") and not name.endswith("__"))
        if (overwrites and self._meets(args[:1])) or self._meets([kwargs.get("out")]):
            raise PrivacyError(WRITTEN)

    def _guarded(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls a function of which it is not known what it writes: what all samples share it gets copies of.

        Some of torch's kernels write into arguments without saying so, and ``vmap`` runs them for one sample after the
        other: the next sample would read what the last one wrote.
        """
        if not _differ((*args, *kwargs.values())):
            return func(*args, **kwargs)
        shared: list[tuple[Tensor, Tensor]] = []

        def copied(value: Any) -> Any:
            if type(value) in (list, tuple):
                return type(value)(map(copied, value))
            if not isinstance(value, Tensor) or is_batchedtensor(value) or value.layout != torch.strided:
                return value
            shared.append((value, value.clone()))
            return shared[-1][1]

        result = func(*map(copied, args), **{name: copied(value) for name, value in kwargs.items()})
        if not all(_same(*pair) for pair in shared):
            raise PrivacyError(
                f"{getattr(func, '__name__', func)} writes values of a sample into what all samples share, a buffer "
                "say, where the others and later batches read them: leave it out"
            )
        return result

    def _refuse_other_functions(self, func: Any) -> None:
        if func in _TOLD:
            raise PrivacyError("the network writes a value of all samples as text, which none may read: leave it out")
        if torch.initial_seed() != self._seed:
            raise PrivacyError(
                "the network seeds torch's generator in its forward, so that a sample's numbers follow from its place "
                "in the batch: leave manual_seed out"
            )
        space = (
            func.namespace if isinstance(func, torch._ops.OpOverload) else func._qualified_op_name.partition("::")[0]
        )
        if space not in _NAMESPACES:
            raise PrivacyError(
                f"the operator {func} is none of torch's own, and may see all samples at once: write it in functions "
                "of torch"
            )

    def _meets(self, values: Iterable[Any]) -> bool:
        names = self._names
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in names:
                    return True
            elif isinstance(value, (list, tuple)) and any(id(entry) in names for entry in value):
                return True
        return False

    def name_of(self, value: Any) -> str | None:
        """The parameter that a value stands for."""
        return self._names.get(id(value)) if isinstance(value, Tensor) else None

    def told_of(self, value: Tensor) -> str:
        """What a parameter is called in messages, frozen ones too."""
        return self._called.get(id(value), f"of shape {tuple(value.shape)}")

    def gates(
        self,
        kind: str,
        weight: tuple[str | None, int],
        bias: tuple[str | None, int] = (None, 0),
        settings: tuple[Any, ...] = (),
    ) -> Affine:
        """The gates of one more use of a weight and a bias.

        Args:
            kind: what the gates are in.
            weight: its name, ``None`` of what is none, and the entries of one sample that the gate's sums are of.
            bias: of the bias.
            settings: of the operation.
        """
        names = tuple(name for name, _ in (weight, bias) if name is not None)
        for name, entries in (weight, bias):
            if name is not None:
                self.uses.setdefault(name, []).append((kind, entries))
        if names:
            self.groups.append(names)
        caps = [None if name is None else self._caps[name] for name, _ in (weight, bias)]
        return Affine(
            caps[0], caps[1], settings, joint=self._joint, names=(weight[0], bias[0]), together=self._together
        )

    def counter(self, name: str | None) -> Tensor | None:
        """What the gate of a parameter leaves its count in."""
        return None if name is None else self._counters.get(name)

    def looked_up(self, tokens: Tensor, rows: int) -> None:
        """Notes which entries of the inputs are looked up in a table of so many rows, if they are as they came in."""
        for field, limits in zip(self._fields, self.limits, strict=True):
            held: Any = tokens
            while is_functorch_wrapped_tensor(held):
                held = get_unwrapped(held)
            if held.untyped_storage().data_ptr() == field.untyped_storage().data_ptr():
                numbers = torch.arange(field.numel()).as_strided(held.shape, held.stride(), held.storage_offset())
                places = numbers.flatten() % len(limits)
                known = limits[places]
                limits[places] = torch.where(known > 0, known.clamp(max=rows), rows)

    def source(self, value: Any) -> Any:
        """What stands for a parameter in this pass; another value as it is."""
        name = self.name_of(value)
        return value if name is None else self._sources[name]

    def stands_for(self, name: str) -> Tensor:
        """What stands for a parameter in this pass, by its name."""
        return self._sources[name]

    def copy(self, name: str) -> Tensor:
        """A parameter as this sample sees it, in memory that all samples share: to be read only."""
        if name not in self._copies:
            source = self._sources[name]
            gates = replace(self.gates("expand", (name, source.numel())), sizes=Sizes())
            # What first reads it may do so without gradients, and another one with them.
            with torch.enable_grad():
                made = cast(Tensor, applied(Expanded, self.sample, source, gates, self.counter(name)))
            self._copies[name] = made
            self.admit([made])
            self._shaped[id(made)] = ref(made), cast(Sizes, gates.sizes)
        return self._copies[name]

    def _lend(self, name: str) -> Tensor:
        """A copy of a parameter for this sample, in memory of its own."""
        if name not in self._lent:
            with torch.enable_grad():
                made = self.copy(name).clone(memory_format=torch.contiguous_format)
            self._lent[name] = made, get_unwrapped(made)._version
            self._shaped[id(made)] = ref(made), self._shaped[id(self.copy(name))][1]
            self.admit([made])
        return self._lent[name][0]

    def expanded(self, value: Any, *, lend: bool = False) -> Any:
        """A value for functions without a gate of their own: of a parameter its copy.

        Args:
            value: an argument.
            lend: whether the function, or one that is given what it returns, may write into it, or look at how it lies
                in memory.
        """
        if type(value) in (list, tuple):
            return type(value)(self.expanded(entry, lend=lend) for entry in value)
        name = self.name_of(value)
        if name is None:
            return value
        return self._lend(name) if lend else self.copy(name)

    def refuse_written(self) -> None:
        """Refuses what has written into its copy of a parameter, by a view of it say."""
        if any(get_unwrapped(made)._version != version for made, version in self._lent.values()):
            raise PrivacyError(WRITTEN)

    def kept(self, returned: Iterable[Any]) -> bool:
        """Whether anything that was computed outlives the run, besides what it returned."""
        lent = [made for made, _ in self._lent.values()]
        known = {id(value) for value in (*returned, *self._copies.values(), *lent, self.sample)}

        if not self._seen.alive_besides(known):
            return False
        gc.collect()
        return self._seen.alive_besides(known)
