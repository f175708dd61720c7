"""Lets every use of a trainable parameter go through a gate, whatever code it is in.

The network's own code runs within ``torch.func.vmap``, on one sample. A mode of torch sees each function that the
code calls. Where a parameter is among the arguments, the function is replaced by one of
:mod:`clipless_dp.isolation.functions`; for functions that have none, each sample gets a copy of the parameter.
Afterwards the graph is walked: a gradient may come to a parameter through gates alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.functions import GATES, Affine, Cap, Expanded
from clipless_dp.isolation.joint import Together

Handler = Callable[..., Any]
"""Takes the gating and a function's own arguments; returns its value, or ``NotImplemented``."""

_HANDLERS: dict[Any, Handler] = {}
_ALWAYS: set[Any] = set()
_NODES = tuple(cast(Any, gate)._backward_cls for gate in GATES)

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
        counters: what each gate leaves its count in, by parameter; those of gates that count.
        joint: whether a weight and the bias that it is used with have one cap.
        together: what waits for the gradients of all parameters, where these have one cap.

    Attributes:
        uses: for each parameter the gates that it went through: their kinds, and the entries that they sum over.
        groups: the parameters that were used in one operation, for each use.
        tables: the lengths of the tables that a sample's own numbers were looked up in.
    """

    def __init__(
        self,
        sample: Tensor,
        sources: Mapping[str, Tensor],
        also: Mapping[int, str],
        caps: Mapping[str, Cap],
        counters: Mapping[str, Tensor] | None = None,
        *,
        joint: bool = False,
        together: Together | None = None,
    ) -> None:
        super().__init__()
        self.sample = sample
        self.uses: dict[str, list[tuple[str, int]]] = {}
        self.tables: list[int] = []
        self._sources = sources
        self._names = {key: name for key, name in also.items() if name in sources}
        self._names |= {id(source): name for name, source in sources.items()}
        self.groups: list[tuple[str, ...]] = []
        self._caps = caps
        self._counters = counters or {}
        self._joint, self._together = joint, together
        self._copies: dict[str, Tensor] = {}
        self._made: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces functions that meet a parameter."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            return func(*args, **kwargs)
        if func in _HOOKS:
            raise PrivacyError(
                "the network hooks a tensor (register_hook, retain_grad) within its forward: a hook sees the gradients "
                "of all samples at once. Remove it"
            )
        met = self._meets(args) or bool(kwargs and self._meets(kwargs.values()))
        result: Any = NotImplemented
        if met or func in _ALWAYS:
            handler = _HANDLERS.get(func)
            if handler is not None:
                result = handler(self, *args, **kwargs)
        if result is NotImplemented:
            if met:
                args = [self._expanded(value) for value in args]
                kwargs = {name: self._expanded(value) for name, value in kwargs.items()}
            result = func(*args, **kwargs)
        self._note(result)
        return result

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
                self._made.append(ref(result))
        elif isinstance(result, (list, tuple)):
            for value in result:
                self._note(value)

    def name_of(self, value: Any) -> str | None:
        """The parameter that a value stands for."""
        return self._names.get(id(value)) if isinstance(value, Tensor) else None

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

    def source(self, value: Any) -> Any:
        """What stands for a parameter in this pass; another value as it is."""
        name = self.name_of(value)
        return value if name is None else self._sources[name]

    def copy(self, name: str) -> Tensor:
        """A copy of a parameter for this sample."""
        if name not in self._copies:
            source = self._sources[name]
            gates = self.gates("expand", (name, source.numel()))
            self._copies[name] = cast(
                Tensor,
                Expanded.apply(self.sample, source, gates, self.counter(name)),  # type: ignore[no-untyped-call]
            )
        return self._copies[name]

    def _expanded(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._expanded(entry) for entry in value)
        name = self.name_of(value)
        return value if name is None else self.copy(name)

    def expanded(self, value: Any) -> Any:
        """A value for functions without a gate of their own: of a parameter its copy."""
        return self._expanded(value)

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
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not isinstance(node, _NODES):
            _refuse_rule_of_its_own(node)
        for following in node.next_functions:
            behind, _ = following
            if behind is None:
                continue
            name = ours.get(following)
            if name is not None:
                if not isinstance(node, _NODES):
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


def _refuse_rule_of_its_own(node: Any) -> None:
    made = getattr(type(node), "_forward_cls", None)
    if (
        made is None
        or made.__module__.partition(".")[0] == "torch"
        or made.__module__.startswith("clipless_dp.isolation")
    ):
        return
    if not getattr(made, "generate_vmap_rule", False):
        raise PrivacyError(
            f"the autograd function {made.__name__} has a vmap rule of its own, which sees all samples at once: set "
            "generate_vmap_rule = True in it, or write it in functions of torch"
        )
