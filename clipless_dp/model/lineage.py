"""Where a model's weights come from: the runs that took private steps on them, and what the last step left.

Weights that something else has changed since (training without privacy, a step of the base optimizer itself, a file
that was loaded) are not those that a ledger is about, and nor are other buffers: these are in every file of the model.
Nothing prevents that, but it is seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from clipless_dp.distributed.placement import local
from clipless_dp.model.bounds_taken import BoundsTaken
from clipless_dp.model.sums import Mark, Numbers, Sums, agree
from clipless_dp.modules import bits_of, buffers_of, parameters_of

Bits = dict[str, int]
"""For each parameter by name two sums of its bit patterns in one number, the same in every layout and on every device;
for each buffer that files hold a hash of its own.

States of before hold the first of the sums alone, which does not see the order, and no buffers.
"""


@dataclass(eq=False)
class _Trace:
    """What is known of one parameter, or buffer, whichever networks it is in.

    Attributes:
        runs: how many private steps of each run its values come from; not changed in place, so that many may share it.
        changed: before how many steps weights were not those that a step had left.
        known: sums (of buffers, hashes) of the values that a step left; of several, each is as good.
        counted: whether they are those of a step, and not the first ones.
        mark: of the last of them.
        numbers: where they lie.
    """

    runs: Mapping[str, int] = field(default_factory=dict)
    changed: int = 0
    known: list[Sums | int] = field(default_factory=list)
    counted: bool = False
    mark: Mark | tuple[int, int] | None = None
    numbers: Numbers | None = None

    def found(self, parameter: nn.Parameter) -> Numbers:
        if self.numbers is None or not self.numbers.are_of(parameter):
            self.numbers = Numbers(parameter)
        return self.numbers


_noted = 0
"""How often runs were noted on any parameter: as long as it is the same, those of all are."""


def _note() -> None:
    global _noted
    _noted += 1


class _Held:
    """A trace as an attribute of its parameter: a network may be wrapped again, with new gates or a new head.

    A weak reference to the parameter would forbid torch to swap it with another tensor. What copies of the parameter
    take along is for another one, and tells nothing.
    """

    NAME = "_clipless_dp_trace"

    def __init__(self, parameter: Tensor, trace: _Trace) -> None:
        self.owner, self.trace = id(parameter), trace

    def __del__(self) -> None:
        # A network that the parameter was in may know the trace still; the memory is not to live on in it.
        self.trace.numbers = None

    def __reduce__(self) -> tuple[type[OrderedDict[Any, Any]], tuple[()]]:
        # Something that files of weights alone may hold.
        return OrderedDict, ()


def _known_of(parameter: Tensor) -> _Trace | None:
    held = parameter.__dict__.get(_Held.NAME)
    # Several times in each step.
    return held.trace if type(held) is _Held and held.owner == id(parameter) else None


def _trace_of(parameter: Tensor) -> _Trace:
    trace = _known_of(parameter)
    if trace is None:
        trace = _Trace()
        _hang(trace, parameter)
    return trace


def _hang(trace: _Trace, parameter: Tensor) -> None:
    setattr(parameter, _Held.NAME, _Held(parameter, trace))


def _is_followed(trace: _Trace, buffer: Tensor, *, quick: bool) -> bool:
    if quick and _known_of(buffer) is trace and trace.mark is not None and trace.mark == _mark_of(buffer):
        return True
    return bits_of(local(buffer)) in trace.known


def _mark_of(buffer: Tensor) -> tuple[int, int] | None:
    """What tells, without a look at the numbers, that a buffer may have changed; ``None`` where nothing does."""
    return None if buffer.is_inference() else (buffer._version, local(buffer).data_ptr())


def _followed(buffer: Tensor) -> _Trace:
    """What is known of a buffer, where it is as that says; as it is now, where not."""
    trace = _known_of(buffer)
    strided = buffer.layout == torch.strided and not buffer.is_nested
    if trace is None or trace.mark is None or trace.mark != _mark_of(buffer):
        trace = _Trace(known=[bits_of(local(buffer))], mark=_mark_of(buffer) if strided else None)
        _hang(trace, buffer)
    return trace


def _sum(trace: _Trace, parameter: nn.Parameter) -> int:
    return int(trace.found(parameter).sums())


def _settle(trace: _Trace, parameter: nn.Parameter, *, counted: bool, or_before: bool = False) -> None:
    numbers = trace.found(parameter)
    trace.known = [*(trace.known[-1:] if or_before else []), numbers.sums()]
    trace.counted, trace.mark = counted, numbers.mark(parameter)


def _joined(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Of each run the larger number of steps."""
    joined: dict[str, int] = {}
    for runs in {id(runs): runs for runs in several}.values():
        for run, count in runs.items():
            joined[run] = max(count, joined.get(run, 0))
    return joined


@contextmanager
def kept(net: nn.Module) -> Iterator[None]:
    """What is known of a network's parameters stays so, where torch swaps them with converted ones."""
    known = [(parameter, _known_of(parameter)) for parameter in net.parameters()]
    yield
    for parameter, trace in known:
        if trace is not None and _known_of(parameter) is None:
            _hang(trace, parameter)


class Lineage:
    """What is known of one model's weights: of its network, and of each of its parameters.

    Args:
        net: the network.

    Attributes:
        bounds: by which its steps were charged, whichever optimizer took them.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = ref(net)
        self.bounds = BoundsTaken()
        self._runs: Mapping[str, int] = {}
        self._changed = 0
        # The parameters that a step left here, and what is known of them: others may take their places.
        self._names: dict[str, tuple[int, _Trace]] = {}
        self._buffers: dict[str, _Trace] | None = None
        self._beside: list[ref[nn.Module]] = []
        self._loaded: tuple[Bits | None, Mapping[str, int]] = {}, {}
        # The parameters that runs were found of, when, and these.
        self._found: tuple[list[nn.Parameter], int, dict[str, int]] | None = None

    def named(self) -> dict[str, nn.Parameter]:
        """The network's parameters."""
        net = self._net()
        return {} if net is None else dict(net.named_parameters())

    def _parameters(self) -> list[nn.Parameter]:
        net = self._net()
        return [] if net is None else parameters_of(net)

    def _traced(self) -> list[_Trace]:
        return [trace for parameter in self._parameters() if (trace := _known_of(parameter)) is not None]

    @property
    def runs(self) -> dict[str, int]:
        """How many private steps each run took on these weights, those of loaded states included."""
        self._notice_loaded()
        parameters = self._parameters()
        found = self._found
        if found is None or found[1] != _noted or [*map(id, found[0])] != [*map(id, parameters)]:
            found = parameters, _noted, _joined([self._runs, *(trace.runs for trace in self._traced())])
            self._found = found
        return dict(found[2])

    @property
    def changed(self) -> int:
        """Before how many of the steps the weights were not those that a step had left."""
        return max([self._changed, *(trace.changed for trace in self._traced())])

    @changed.setter
    def changed(self, changed: int) -> None:
        self._changed = changed
        for parameter in self._parameters():
            _trace_of(parameter).changed = changed

    @property
    def started(self) -> bool:
        """Whether something is known of these weights in this network, that others can be compared with."""
        return bool(self._names)

    def start(self, named: Mapping[str, nn.Parameter]) -> None:
        """These are the first weights that are seen here; what is known of some from elsewhere stays so."""
        if self.started:
            return
        for parameter in named.values():
            trace = _trace_of(parameter)
            if not trace.known:
                _settle(trace, parameter, counted=False)
        self._hold(named)
        self.start_buffers()

    def start_buffers(self) -> None:
        """These are the first buffers that are seen here; what is known of some from elsewhere stays so."""
        net = self._net()
        if self._buffers is None and net is not None:
            self._buffers = {
                name: trace if (trace := _known_of(buffer)) is not None else _followed(buffer)
                for name, buffer in buffers_of(net).items()
            }

    def settle_buffers(self) -> None:
        """These are the buffers that belong to the weights of the last step."""
        net = self._net()
        self._buffers = {} if net is None else {name: _followed(one) for name, one in buffers_of(net).items()}

    def goes_with(self, module: nn.Module) -> None:
        """Statistics that were released before training are in what is published with these weights."""
        of(module).start_buffers()
        self._beside.append(ref(module))

    def _hold(self, named: Mapping[str, nn.Parameter]) -> None:
        self._names = {name: (id(parameter), _trace_of(parameter)) for name, parameter in named.items()}

    def keep(self) -> None:
        """Hangs what is known of parameters on them again: torch may have swapped their attributes, too."""
        net = self._net()
        if net is not None and None in map(_known_of, parameters_of(net)):
            for name, parameter in net.named_parameters():
                owner, trace = self._names.get(name, (0, None))
                if trace is not None and owner == id(parameter) and _known_of(parameter) is None:
                    _hang(trace, parameter)

    def settle(self, named: Mapping[str, nn.Parameter]) -> None:
        """These are the weights that the last step left."""
        traces = self._traces(named)
        # Sums stay on the device, so that nothing waits for it.
        for parameter, trace in zip(named.values(), traces, strict=True):
            _settle(_trace_of(parameter) if trace is None else trace, parameter, counted=True)
        if None in traces or [*self._names] != [*named] or [held for _, held in self._names.values()] != traces:
            self._hold(named)
        self.settle_buffers()
        self._loaded = {}, {}

    def _traces(self, named: Mapping[str, nn.Parameter]) -> list[_Trace | None]:
        """What is known of each of the network's parameters, hung on them again where torch has swapped it off."""
        traces = [*map(_known_of, named.values())]
        if None in traces:
            self.keep()
            traces = [*map(_known_of, named.values())]
        return traces

    def leave(self) -> None:
        """Weights and buffers are those that a file says that a step left."""
        self.settle(self.named())

    def follow(self, named: Mapping[str, nn.Parameter]) -> None:
        """These weights were computed from those that were known and from counted ones; both are as good."""
        for parameter in named.values():
            trace = _trace_of(parameter)
            if trace.known:
                _settle(trace, parameter, counted=trace.counted, or_before=True)

    def expect(self, bits: Bits | None, runs: Mapping[str, int]) -> None:
        """Weights of a loaded state, and of its runs, may come next; ``None`` if it does not tell which: any may."""
        self._loaded = bits, dict(runs)
        net = self._net()
        for name, parameter in () if net is None else net.named_parameters():
            trace = _trace_of(parameter)
            trace.mark = None
            if bits is None:
                trace.known, trace.counted = [], False
            elif name in bits:
                trace.known = [*(trace.known[:2] if trace.counted else []), bits[name]]
                trace.counted = True
        buffers = {} if net is None else buffers_of(net)
        if bits is None or not buffers.keys() <= bits.keys():
            # Which they are to be, nothing says.
            self._buffers = None
        else:
            here = self._buffers or {}
            self._buffers = {
                name: _Trace(known=[*(here[name].known[:2] if name in here else []), bits[name]]) for name in buffers
            }

    def _notice_loaded(self) -> None:
        """Notes the runs of a loaded state once the weights are those of it."""
        bits, runs = self._loaded
        if bits and runs and self.are(bits):
            self._loaded = {}, {}
            self.add_runs(runs)

    def are(self, bits: Bits) -> bool:
        """Whether the weights are those of which a state holds these sums, whatever the buffers are."""
        net = self._net()
        named = {} if net is None else dict(net.named_parameters())
        others = set() if net is None else buffers_of(net).keys()
        return named.keys() == bits.keys() - others and all(
            agree(_sum(_trace_of(parameter), parameter), bits[name]) for name, parameter in named.items()
        )

    def add_runs(
        self, runs: Mapping[str, int], *, frozen: bool = True, parameters: Iterable[nn.Parameter] | None = None
    ) -> None:
        """Notes that these weights come from steps of runs, each from the past of all.

        Args:
            runs: how many steps of each.
            frozen: whether that is true of parameters that take no gradients, too.
            parameters: of the network, where they are at hand.
        """
        self._notice_loaded()
        parameters = self._parameters() if parameters is None else parameters
        traces = [(parameter, _trace_of(parameter)) for parameter in parameters]
        self._runs = joined = _joined([self._runs, *(trace.runs for _, trace in traces), runs])
        for parameter, trace in traces:
            if frozen or parameter.requires_grad:
                trace.runs = joined
        _note()
        self._found = [parameter for parameter, _ in traces], _noted, dict(joined)

    def restart(self, runs: Mapping[str, int]) -> None:
        """The weights come from these runs, and what else is known of their past is part of them."""
        self._runs = {}
        for trace in self._traced():
            trace.runs = {}
        self.add_runs(runs)

    def record(self, *, as_now: bool = False) -> dict[str, Any]:
        """What copies and files of the model hold of this: plain values; here nothing changes by it.

        Args:
            as_now: hold the copy's buffers against those of now, whichever a step left.
        """
        self.keep()
        net = self._net()
        return {
            "runs": self.runs,
            "changed": self.changed,
            "bounds": self.bounds.record(),
            "buffers": {name: [bits_of(local(one))] for name, one in buffers_of(net).items()}
            if as_now and net is not None
            else None
            if self._buffers is None
            else {name: [int(value) for value in one.known] for name, one in self._buffers.items()},
            "parameters": {
                name: {
                    "runs": dict(trace.runs),
                    "changed": trace.changed,
                    "known": [int(value) for value in trace.known],
                    "counted": trace.counted,
                }
                for name, parameter in (() if net is None else net.named_parameters())
                if (trace := _known_of(parameter)) is not None
            },
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """The model is the copy of one of which `record` told this."""
        net = self._net()
        named = {} if net is None else dict(net.named_parameters())
        self._runs, self._changed = _joined([self._runs, record["runs"]]), max(self._changed, record["changed"])
        if "bounds" in record:
            # Pickles of former versions tell of none.
            self.bounds.take(record["bounds"])
        for name, known in record["parameters"].items():
            if name in named and _known_of(named[name]) is None:
                trace = _trace_of(named[name])
                trace.runs, trace.changed = dict(known["runs"]), known["changed"]
                trace.known, trace.counted = list(known["known"]), known["counted"]
        if self._buffers is None and record.get("buffers") is not None:
            self._buffers = {name: _Trace(known=list(known)) for name, known in record["buffers"].items()}
        _note()

    def unchanged(self, named: Mapping[str, nn.Parameter], *, quick: bool = False, buffers: bool = True) -> bool:
        """Whether the weights are such as a step left; true where nothing is known.

        Args:
            named: the network's parameters.
            quick: trust autograd's counters of changes, and some of the entries, where they say that there was none.
            buffers: whether those that files hold, statistics beside the network included, must be the same too.
        """
        traces = self._traces(named)
        if self.started and named.keys() != self._names.keys():
            return False
        if not all(
            self._as_known(name, parameter, trace, quick=quick)
            for (name, parameter), trace in zip(named.items(), traces, strict=True)
        ):
            return False
        beside = [of(module) for one in self._beside if (module := one()) is not None]
        return not buffers or all(known.buffers_unchanged(quick=quick) for known in (self, *beside))

    def is_as_left(self) -> bool:
        """Whether weights and buffers are those that a step, or a file, left; true where nothing is known."""
        return self.unchanged(self.named())

    def buffers_unchanged(self, *, quick: bool = False) -> bool:
        """Whether the buffers that files hold are those that belong to the weights; true where nothing is known."""
        net = self._net()
        if net is None or self._buffers is None:
            return True
        here = buffers_of(net)
        return here.keys() == self._buffers.keys() and all(
            _is_followed(self._buffers[name], buffer, quick=quick) for name, buffer in here.items()
        )

    def _as_known(self, name: str, parameter: nn.Parameter, trace: _Trace | None, *, quick: bool) -> bool:
        held = self._names.get(name)
        if held is None or held[1] is trace:
            if trace is None or not trace.known:
                return True
            if quick and trace.mark is not None and trace.mark == trace.found(parameter).mark(parameter):
                return True
            candidates = trace.known
        elif held[1].known:
            # Another object than that which the last step left: it has the same values, or those of other steps.
            candidates = [*held[1].known, *(trace.known if trace is not None and trace.counted else [])]
        else:
            return True
        now = _sum(_trace_of(parameter), parameter)
        return any(agree(now, int(known)) for known in candidates)

    def bits(self) -> Bits | None:
        """The sums of the weights that the last step left, and of their buffers; ``None`` where they are not known."""
        self.keep()
        net = self._net()
        sums: Bits = {}
        for name, parameter in () if net is None else net.named_parameters():
            trace = _known_of(parameter)
            if trace is None or not (trace.known and trace.counted):
                return None
            known = [int(value) for value in trace.known]
            # Of an average and the weights that it has replaced, those that are there.
            sums[name] = known[-1]
            if len(known) > 1 and any(agree(now := _sum(trace, parameter), value) for value in known):
                sums[name] = now
        sums.update({name: int(trace.known[-1]) for name, trace in (self._buffers or {}).items() if trace.known})
        return sums or None


_lineages: WeakKeyDictionary[nn.Module, Lineage] = WeakKeyDictionary()


def of(model: nn.Module) -> Lineage:
    """The lineage of a wrapped model in this process: of its network, which may be wrapped more than once."""
    inner: Any = getattr(model, "_orig_mod", model)
    # Of a module of a user's own, what it calls ``net`` is a part.
    net: nn.Module = inner.net if hasattr(type(inner), "_placement_of") else inner
    lineage = _lineages.get(net)
    if lineage is None:
        lineage = _lineages[net] = Lineage(net)
    return lineage
