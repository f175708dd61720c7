"""Lets every use of a trainable parameter go through a gate, whatever code it is in.

The network's own code runs within ``torch.func.vmap``, on one sample. A mode of torch sees each function that the
code calls. Where a parameter is among the arguments, the function is replaced by one of
:mod:`clipless_dp.isolation.functions`; for functions that have none, each sample gets a copy of the parameter.
Afterwards the graph is walked: a gradient may come to a parameter through gates alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.dispatch import applied
from clipless_dp.isolation.functions import GATES, Affine, Cap, Expanded
from clipless_dp.isolation.joint import Together
from clipless_dp.isolation.recurrence import GatedRecurrence

Handler = Callable[..., Any]
"""Takes the gating and a function's own arguments; returns its value, or ``NotImplemented``."""

_HANDLERS: dict[Any, Handler] = {}
_ALWAYS: set[Any] = set()
_UNGATED = {cast(Any, gate)._backward_cls: gate.ungated for gate in (*GATES, GatedRecurrence)}

_ATTRIBUTES: tuple[Any, ...] = (
    Tensor.shape, Tensor.dtype, Tensor.device, Tensor.requires_grad, Tensor.ndim, Tensor.is_leaf, Tensor.layout,
    Tensor.is_cuda, Tensor.is_sparse, Tensor.data,
)  # fmt: skip
_ABOUT = {attribute.__get__ for attribute in _ATTRIBUTES} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.is_contiguous, Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.data_ptr, Tensor.detach,
    Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
"""What tells about a parameter, or reads it, without a way back for a gradient."""

_HOOKS = {Tensor.register_hook, Tensor.retain_grad}
_TOLD = {Tensor.__repr__, Tensor.__format__}
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_NAMESPACES = {"aten", "prims", "torchvision"}
"""Whose operators are known to have rules of ``vmap``, or to be run for one sample after the other."""
_CALLABLES = (FunctionType, MethodType, partial, nn.Module)


def handles(*functions: Any, always: bool = False) -> Callable[[Handler], Handler]:
    """Registers what runs in place of functions of torch that meet a parameter, or wherever they are called."""

    def decorate(handler: Handler) -> Handler:
        for function in functions:
            _HANDLERS[function] = handler
            if always:
                _ALWAYS.add(function)
        return handler

    return decorate


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

    Attributes:
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
    ) -> None:
        super().__init__()
        self.sample = sample
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
        self._made: list[Any] = []
        self._seed = torch.initial_seed()
        self._ids = {id(sample)}

    def admit(self, values: Iterable[Tensor]) -> None:
        """These may be read in this run, as all that comes of them may."""
        self._ids.update(map(id, values))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces functions that meet a parameter."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            told = func(*args, **kwargs)
            self._note(told)
            return told
        if func in _HOOKS:
            raise PrivacyError(
                "the network hooks a tensor (register_hook, retain_grad) within its forward: a hook sees the gradients "
                "of all samples at once. Remove it"
            )
        self._refuse_strangers(args)
        if kwargs:
            self._refuse_strangers(kwargs.values())
        if func in _TOLD or torch.initial_seed() != self._seed or isinstance(func, _OPERATORS):
            self._refuse_other_functions(func)
        met = self._meets(args) or bool(kwargs and self._meets(kwargs.values()))
        result: Any = NotImplemented
        if met or func in _ALWAYS:
            handler = _HANDLERS.get(func)
            if handler is not None:
                result = handler(self, *args, **kwargs)
        if result is NotImplemented:
            if met:
                args = [self.expanded(value) for value in args]
                kwargs = {name: self.expanded(value) for name, value in kwargs.items()}
            result = func(*args, **kwargs)
        self._note(result)
        return result

    def _refuse_strangers(self, values: Iterable[Any]) -> None:
        """Refuses arguments that are not of this run, or that see more than one sample of it."""
        for value in values:
            if isinstance(value, Tensor):
                if torch._C._functorch.is_batchedtensor(value) and id(value) not in self._ids:
                    raise PrivacyError(
                        "the network reads a value that is not of this pass and sample: one that it kept of an earlier "
                        "pass, or one within a transform (torch.func.vmap, grad) or a scripted function. Keep nothing, "
                        "and use functions of torch"
                    )
            elif isinstance(value, (list, tuple)):
                self._refuse_strangers(value)
            elif isinstance(value, torch.Generator):
                raise PrivacyError(
                    "the network draws from a generator of its own, whose numbers a sample gets by its place in the "
                    "batch: leave generator= out"
                )
            elif isinstance(value, type):
                if issubclass(value, torch.autograd.Function) and value.__module__.partition(".")[0] != "torch":
                    raise PrivacyError(
                        f"the autograd function {value.__name__} runs code of its own behind torch.func.vmap, which "
                        "may see all samples at once: write it in functions of torch"
                    )
            elif isinstance(value, _CALLABLES):
                raise PrivacyError(
                    f"a function of torch is handed code to call ({value!r}), which runs unseen: call it directly"
                )

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

    def _note(self, result: Any) -> None:
        if isinstance(result, Tensor):
            if torch._C._functorch.is_batchedtensor(result):
                self._ids.add(id(result))
                self._made.append(ref(result))
        elif isinstance(result, (list, tuple)):
            for value in result:
                self._note(value)

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
            while torch._C._functorch.is_functorch_wrapped_tensor(held):
                held = torch._C._functorch.get_unwrapped(held)
            if held.untyped_storage().data_ptr() == field.untyped_storage().data_ptr():
                numbers = torch.arange(field.numel()).as_strided(held.shape, held.stride(), held.storage_offset())
                places = numbers.flatten() % len(limits)
                known = limits[places]
                limits[places] = torch.where(known > 0, known.clamp(max=rows), rows)

    def source(self, value: Any) -> Any:
        """What stands for a parameter in this pass; another value as it is."""
        name = self.name_of(value)
        return value if name is None else self._sources[name]

    def copy(self, name: str) -> Tensor:
        """A copy of a parameter for this sample."""
        if name not in self._copies:
            source = self._sources[name]
            gates = self.gates("expand", (name, source.numel()))
            self._copies[name] = cast(Tensor, applied(Expanded, self.sample, source, gates, self.counter(name)))
            self._ids.add(id(self._copies[name]))
        return self._copies[name]

    def expanded(self, value: Any) -> Any:
        """A value for functions without a gate of their own: of a parameter its copy."""
        if type(value) in (list, tuple):
            return type(value)(self.expanded(entry) for entry in value)
        name = self.name_of(value)
        return value if name is None else self.copy(name)

    def kept(self, returned: Iterable[Any]) -> bool:
        """Whether anything that was computed outlives the run, besides what it returned."""
        known = {id(value) for value in returned} | {id(copy) for copy in self._copies.values()} | {id(self.sample)}

        def alive() -> bool:
            return any((value := made()) is not None and id(value) not in known for made in self._made)

        if not alive():
            return False
        gc.collect()
        return alive()


def refuse_other_ways(
    output: Tensor, sources: Mapping[str, Tensor], inputs: Iterable[Tensor], names: Mapping[int, str]
) -> None:
    """Walks the graph behind an output: to what takes gradients, they come through gates alone.

    Args:
        output: of all samples.
        sources: what stands for the trainable parameters, by name.
        inputs: of the network.
        names: of the parameters themselves, by ``id``.

    Raises:
        PrivacyError: a parameter is used past its gate, or something else takes gradients.
    """
    edge = torch.autograd.graph.get_gradient_edge
    ours = {(found.node, found.output_nr): name for name, source in sources.items() for found in (edge(source),)}
    ends = {(found.node, found.output_nr) for value in inputs if value.requires_grad for found in (edge(value),)}
    beyond = {node for node, _ in [*ours, *ends]}
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for slot, following in enumerate(node.next_functions):
            behind, _ = following
            if behind is None:
                continue
            name = ours.get(following)
            if name is not None:
                if slot < _UNGATED.get(type(node), slot + 1):
                    raise PrivacyError(
                        f"the parameter {name!r} is used past its gate, by {type(node).__name__}: use it in the "
                        "network's forward through functions of torch"
                    )
            elif following in ends:
                continue
            elif behind in beyond:
                raise PrivacyError("a gradient leaves the network through a value that is none of its inputs")
            elif (variable := getattr(behind, "variable", None)) is not None:
                found = names.get(id(variable))
                raise PrivacyError(
                    f"the tensor {'of shape ' + str(tuple(variable.shape)) if found is None else repr(found)} takes "
                    "gradients without a gate: make it a parameter of the network before it is wrapped, or detach it"
                )
            else:
                stack.append(behind)
