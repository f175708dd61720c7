"""Any network, run on its samples one by one, with every trainable parameter behind a gradient gate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.gates.adaptive import Adapting, AdaptiveLimit, adapting, set_adapting
from clipless_dp.gates.arithmetic import FLOOR_SHARE, checked_cap
from clipless_dp.gates.signal import GateMode
from clipless_dp.isolation import recurrent  # noqa: F401 (registers what runs in place of recurrent layers)
from clipless_dp.isolation.checkpointing import repeating
from clipless_dp.isolation.foreign import prepare
from clipless_dp.isolation.functions import Cap
from clipless_dp.isolation.gating import WRITTEN, Gating
from clipless_dp.isolation.hidden import refuse_coded_tensors, refuse_other_ways
from clipless_dp.isolation.joint import Gathered, Together
from clipless_dp.isolation.refusals import FROZEN, refuse_parts
from clipless_dp.isolation.running import KEPT, mapped, seeded_once
from clipless_dp.isolation.uses import refuse_further
from clipless_dp.packing import Packing

Joint = Literal["layer", "network"] | None
"""What one cap is for: a parameter, a weight and the bias that it is used with, or all parameters together."""

Select = str | int | Callable[[Any], Tensor] | None
"""Which of the network's outputs is the model's: a key, an index, or a function of what the network returns."""


class Isolated(nn.Module):
    """A network that runs under ``torch.func.vmap``, which gives it one sample at a time: samples cannot meet.

    Each trainable parameter is used through gradient gates alone, whatever the network computes with it. So its
    per-sample gradient has norm at most its cap for each gate that it goes through, and nothing else needs to be known
    of the network: no Lipschitz constant is claimed (per-layer clipping in one backward pass: He et al. 2022,
    *Exploring the Limits of Differentially Private Deep Learning with Group-wise Clipping*, §3). Made by
    :func:`clipless_dp.gradient_gated`.

    Args:
        net: the network. It is called as without isolation, with a batch axis of size 1. Its parameters and
            submodules keep their names.
        select: which of its outputs is the model's. By default a tensor as it is, and ``logits`` of what has them.
        limit: see :meth:`set_gates`, with ``bias_limit``, ``mode``, ``floor``.
        joint: ``"layer"``: one cap for the gradients of a weight and of the bias that it is used with, together;
            ``"network"``: one for all gradients of a sample, which keeps what comes back to each layer until the
            backward pass is through (Bu et al. 2023). ``None``: one for each parameter.
        checkpoint: ``fnmatch`` patterns of the paths of modules whose activations are computed again on the way back.

    Shape:
        ``(B, ...)`` to ``(B, ...)``.

    Raises:
        UnsupportedModuleError: layers that keep statistics of batches, or hooks on backward passes.
    """

    select: Select
    isolation: str
    uses: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] | None
    _still: tuple[str, ...]
    _caps: tuple[tuple[str, float, float], ...]
    joint: Joint
    groups: tuple[tuple[str, ...], ...]
    adaptive: tuple[float, ...]

    def __init__(
        self,
        net: nn.Module,
        *,
        select: Select = None,
        limit: float | AdaptiveLimit = 1.0,
        bias_limit: float | None = None,
        mode: GateMode = "normalize",
        floor: float = FLOOR_SHARE,
        joint: Joint = None,
        checkpoint: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if joint not in (None, "layer", "network"):
            raise ConfigurationError(f"joint must be 'layer', 'network' or None, got {joint!r}")
        if any(isinstance(part, Isolated) for part in net.modules()):
            raise ConfigurationError(
                "a part of the network runs sample by sample already: leave gradient_gated out there, and call it for "
                "the whole network, or use isolation='graph', where such a part is a layer among others"
            )
        paths = [path for path, _ in net.named_modules(remove_duplicate=False) if path]
        for pattern in checkpoint:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ConfigurationError(f"checkpoint: no module matches {pattern!r}; there are {paths}")
        refuse_parts(net)
        refuse_coded_tensors(net)
        prepare(net)
        # The network's own: its parameters keep their names, and are where it looks for them.
        self._parameters, self._modules, self._buffers = net._parameters, net._modules, net._buffers
        self._non_persistent_buffers_set = net._non_persistent_buffers_set
        # Not by attribute: a part of the network may have the name.
        self.__dict__.update(
            {
                "__wrapped__": net,
                "__packing__": None,
                "__limits__": (),
                "select": select,
                "isolation": "vmap",
                "uses": None,
                "_still": tuple(name for name, part in net.named_modules() if isinstance(part, FROZEN)),
                "_caps": (),
                "joint": joint,
                # No setting: it changes neither bounds nor gradients, so that a run may go on with another one.
                "__checkpoint__": tuple(checkpoint),
                "groups": (),
                "adaptive": (),
            }
        )
        self.training = net.training
        self.set_gates(limit, bias_limit=bias_limit, mode=mode, floor=floor)

    @property
    def net(self) -> nn.Module:
        """The network itself."""
        return cast(nn.Module, self.__dict__["__wrapped__"])

    @property
    def checkpoint(self) -> tuple[str, ...]:
        """Patterns of the paths of modules whose activations are computed again on the way back."""
        return cast("tuple[str, ...]", self.__dict__["__checkpoint__"])

    @property
    def packing(self) -> Packing | None:
        """How the network's inputs lie in the rows that it is given; ``None`` of a single one."""
        return cast("Packing | None", self.__dict__["__packing__"])

    @property
    def limits(self) -> tuple[int, ...]:
        """For each entry of a row the length of the table that it is looked up in; 0 where it is in none.

        Of several tables the shortest. What was computed of an entry, and then looked up, is not known.
        """
        return cast("tuple[int, ...]", self.__dict__["__limits__"])

    def take(self, packing: Packing | None) -> None:
        """Says how the network's inputs lie in the rows that it is given."""
        self.__dict__["__packing__"] = packing

    def set_gates(
        self,
        limit: float | AdaptiveLimit,
        *,
        bias_limit: float | None = None,
        mode: GateMode = "normalize",
        floor: float = FLOOR_SHARE,
        layers: Sequence[str] = ("*",),
    ) -> None:
        """Sets the gates of the parameters whose names, or whose layers' names, match; others stay as they are.

        Args:
            limit: the cap of a parameter's per-sample gradient, at least 1e-8; of a joint one, of what it is for. Or
                how it adapts: in the same way wherever it does.
            bias_limit: the cap of parameters named ``bias``; by default the same. A joint cap knows none.
            mode: ``"clip"``: ``G·min(1, c/‖G‖)``; ``"normalize"``: ``G·c/max(‖G‖, floor·c)``.
            floor: for ``"normalize"``, the share of the cap below which a gradient is scaled by ``1/floor`` only.
            layers: ``fnmatch`` patterns.

        Raises:
            ConfigurationError: a value is out of range, or a pattern matches nothing.
        """
        if mode not in ("clip", "normalize"):
            raise ConfigurationError(f"mode must be 'clip' or 'normalize', got {mode!r}")
        if not (isinstance(floor, (int, float)) and 1e-8 <= floor <= 1.0):
            raise ConfigurationError(f"floor is a share of the cap, from 1e-8 to 1, got {floor!r}")
        if self.joint is not None and bias_limit is not None:
            raise ConfigurationError(f"joint={self.joint!r} takes no bias_limit: one cap is for weights and biases")
        if self.joint == "network" and tuple(layers) != ("*",):
            raise ConfigurationError("joint='network' is one cap for all parameters: it takes no other layers than '*'")
        adaptive = limit if isinstance(limit, AdaptiveLimit) else None
        limit = checked_cap("limit", limit if adaptive is None else adaptive.start)  # type: ignore[arg-type]
        bias_limit = limit if bias_limit is None else checked_cap("bias_limit", bias_limit)
        share = float(floor) if mode == "normalize" else 1.0
        named = dict(self.named_parameters(remove_duplicate=False))
        names = list(named)
        for pattern in layers:
            if not any(is_named(name, pattern) for name in names):
                raise ConfigurationError(f"no parameter matches {pattern!r}; there are {names}")
        caps = {name: (cap, least) for name, cap, least in self._caps}
        # A parameter of several names has one gate, whichever it is called by.
        meant = {id(value) for name, value in named.items() if any(is_named(name, pattern) for pattern in layers)}
        chosen = [name for name, value in named.items() if id(value) in meant]
        for name in chosen:
            cap = bias_limit if name.rpartition(".")[2] == "bias" else limit
            caps[name] = cap, max(share * cap, 1e-8)
        self._adapt(adaptive, chosen, caps)
        self.__dict__["_caps"] = tuple((name, *cap) for name, cap in caps.items())

    def _adapt(
        self, limit: AdaptiveLimit | None, chosen: Sequence[str], caps: Mapping[str, tuple[float, float]]
    ) -> None:
        """Lets the caps of some parameters adapt, or no longer; of a joint one all are meant or none."""
        known = adapting(self)
        starts = {} if known is None else dict(known.caps)
        own = {name for name, _ in self.named_parameters()}
        touched = {self._gate(name) for name in chosen if name in own}
        for gate in touched:
            starts.pop(gate, None)
        if self.joint is not None and touched & {self._gate(name) for name in own if name not in chosen}:
            raise ConfigurationError("a joint cap is set for all parameters of a layer at once: name whole layers")
        if limit is not None:
            if known is not None and starts and known.settings[1:] != astuple(limit)[1:]:
                raise ConfigurationError("caps of one network adapt alike: give the same quantile, rate and share")
            starts |= {self._gate(name): caps[name][0] for name in chosen if name in own}
        if starts:
            settings = limit if limit is not None else cast(Adapting, known).limit
            found = Adapting(settings, starts)
            self.__dict__["adaptive"] = found.settings
            set_adapting(self, found)
        else:
            self.__dict__["adaptive"] = ()
            set_adapting(self, None)

    def _gate(self, name: str) -> str:
        """The gate of a parameter."""
        if self.joint is None:
            return name
        return "network" if self.joint == "network" else name.rpartition(".")[0] or "network"

    @property
    def caps(self) -> dict[str, Cap]:
        """The gate of each parameter, as it is now."""
        found = adapting(self)
        if found is None:
            return {name: Cap(limit, least) for name, limit, least in self._caps}
        now = {name: found.caps.get(self._gate(name), limit) for name, limit, _ in self._caps}
        return {
            name: Cap(now[name], max(least / limit * now[name], 1e-8) if now[name] != limit else least)
            for name, limit, least in self._caps
        }

    def _counters(self) -> dict[str, Tensor]:
        """What the gate of each parameter leaves its count in, where its cap adapts."""
        found = adapting(self)
        known = {} if found is None else found.counters()
        return {name: known[gate] for name, _, _ in self._caps if (gate := self._gate(name)) in known}

    def counted(self) -> dict[str, int]:
        """How often the gates whose caps adapt count a sample, as far as what they cap is trained."""
        found = adapting(self)
        if found is None:
            return {}
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        times: Counter[str] = Counter()
        for group in self.groups:
            held = [name for name in group if name in trained]
            if self.joint == "network":
                times["network"] = int(bool(held) or times["network"])
            elif self.joint == "layer":
                # A weight and a bias of two modules that meet in one operation count for the weight's.
                times.update({self._gate(held[0])} if held else ())
            else:
                times.update(held)
        return {gate: count for gate, count in times.items() if gate in found.caps and count}

    def train(self, mode: bool = True) -> Isolated:
        """As of any module; but statistics of batches that were frozen, by ``eval()``, stay so."""
        super().train(mode)
        self.net.training = mode
        for name in self._still:
            self.net.get_submodule(name).training = False
        return self

    def forward(self, values: Tensor) -> Tensor:
        """Runs each sample by itself.

        Raises:
            ConfigurationError: ``select`` finds no output, or one without a batch axis.
            UnsupportedModuleError: the network branches on values, or does what cannot be done for one sample alone.
            PrivacyError: it keeps something of a sample, or a parameter is used past its gate, or more often than when
                the network was wrapped.
        """
        refuse_parts(self.net)
        held = dict(self._held())
        caps, counters = self.caps, self._counters()
        if new := [name for name in held if name not in caps]:
            raise ConfigurationError(
                f"the parameter {new[0]!r} was added after the network was put behind gates: call gradient_gated when "
                "all layers are there"
            )
        # The first pass counts the uses of frozen parameters too, which may be trained later.
        sources = {name: value for name, value in held.items() if value.requires_grad or self.uses is None}
        also = {**self._known(held), **{id(value): name for name, value in held.items()}}
        ends, together = list(counters.values()), None
        if self.joint == "network":
            sources, together = self._gathered(sources, caps, counters)
            counters = {}
        batch = [values] if self.packing is None else self.packing.unpack(values)
        first = self.uses is None
        if first:
            # Each in memory of its own, so that look-ups tell which of them they are of.
            batch = [value.clone(memory_format=torch.contiguous_format) for value in batch]
        gatings: list[Gating] = []
        kept: list[bool] = []
        gated = {name: (held[name], held[name]._version, value.requires_grad) for name, value in sources.items()}
        rerun = partial(self._rerun, gated)

        def one(sample: Tensor, *own: Tensor) -> Tensor:
            gating = Gating(
                sample,
                sources,
                also,
                caps,
                batch if first else (),
                counters=counters,
                joint=self.joint == "layer",
                together=together,
                rerun=rerun,
            )
            gatings.append(gating)
            lifted = [value.unsqueeze(0) for value in own]
            gating.admit(lifted)
            with gating:
                returned = self._call(lifted)
                output = self._selected(returned)
            del returned, lifted
            gating.refuse_written()
            kept.append(gating.kept([output, *own]))
            return output

        versions = [(value, value._version) for value in held.values() if value.requires_grad]
        with seeded_once():
            outputs = self._mapped(one, batch)
        if any(value._version != version for value, version in versions):
            raise PrivacyError(WRITTEN)
        if kept[0]:
            raise PrivacyError(KEPT)
        self._count(gatings[0])
        if outputs.requires_grad:
            trained = {name: value for name, value in sources.items() if value.requires_grad}
            refuse_other_ways(outputs, trained, [*batch, *ends], also)
        return outputs

    def _rerun(
        self,
        gated: Mapping[str, tuple[Tensor, int, bool]],
        code: Callable[..., None],
        sample: Tensor,
        values: Sequence[Tensor],
        axes: Sequence[int],
    ) -> None:
        """Runs a part of the network once more, for what the way back needs; see :data:`Rerun`.

        Args:
            gated: the parameters that had gates in the pass, how often they had been written into, and whether they
                took gradients.
            code: of the part.
            sample: ``(B,)``, zeros.
            values: of all samples.
            axes: of samples in these.

        Raises:
            PrivacyError: weights have changed since, or as :meth:`forward`.
        """
        if any(value._version != version for value, version, _ in gated.values()):
            raise PrivacyError(
                "weights were written into between a forward pass and its backward pass, which computes a part of the "
                "network again (torch.utils.checkpoint): change weights between steps"
            )
        # They lead nowhere, so that all that gradients come to is what the pass itself has; and they are of the weights
        # of the pass, whatever stands for these now.
        sources = {name: value.detach().requires_grad_(trains) for name, (value, _, trains) in gated.items()}
        held = dict(self._held())
        also = {**self._known(held), **{id(value): name for name, value in held.items()}}
        also |= {id(value): name for name, (value, *_) in gated.items()}

        def one(lifted: Tensor, *own: Tensor) -> Tensor:
            gating = Gating(lifted, sources, also, self.caps, joint=self.joint == "layer")
            gating.admit(own)
            with gating:
                code(gating, *own)
            gating.refuse_written()
            if gating.kept(own):
                raise PrivacyError(KEPT)
            return lifted

        mapped(one, sample, values, axes, type(self.net).__name__)

    def _gathered(
        self, sources: Mapping[str, Tensor], caps: Mapping[str, Cap], counters: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Together]:
        """What stands for the trained parameters where one cap is for all of them."""
        cap = next(iter(caps.values()))
        together = Together(cap.limit, cap.least)
        names = [name for name, value in sources.items() if value.requires_grad]
        if not (names and torch.is_grad_enabled()):
            return dict(sources), together
        made = Gathered.apply(  # type: ignore[no-untyped-call]
            together, names, next(iter(counters.values()), None), *(sources[name] for name in names)
        )
        return {**sources, **dict(zip(names, made, strict=True))}, together

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters, or what stands for them in this pass, each once."""
        seen: set[int] = set()
        for path, part in self.named_modules():
            for name, value in part._parameters.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def _known(self, held: Mapping[str, Tensor]) -> dict[int, str]:
        """The parameters themselves, which the network may hold in lists of its own too."""
        known: dict[int, str] = self.__dict__.setdefault("__known__", {})
        found = {id(value): name for name, value in held.items() if isinstance(value, nn.Parameter)}
        if found:
            known.clear()
            known.update(found)
        return known

    def _call(self, own: Sequence[Tensor]) -> Any:
        places, names = (own, {}) if self.packing is None else self.packing.call(own)
        named = self.net.named_modules(remove_duplicate=False) if self.checkpoint else ()
        chosen = [part for path, part in named if any(fnmatchcase(path, pattern) for pattern in self.checkpoint)]
        with repeating(chosen):
            return self.net(*places, **names)

    def _selected(self, returned: Any) -> Tensor:
        select = self.select
        if callable(select):
            returned = select(returned)
        elif isinstance(select, str):
            returned = returned[select] if isinstance(returned, Mapping) else getattr(returned, select, None)
        elif select is not None:
            returned = returned[select]
        elif isinstance(returned, Mapping):
            returned = returned.get("logits", returned)
        if not isinstance(returned, Tensor):
            kinds = [*returned] if isinstance(returned, Mapping) else type(returned).__name__
            raise ConfigurationError(
                f"the network returns {kinds}: say which of them is the model's output, by select= (a key, an index or "
                "a function)"
            )
        if returned.dim() == 0 or returned.shape[0] != 1:
            raise ConfigurationError(
                f"the network returns a tensor of shape {tuple(returned.shape)} for a batch of one sample: its first "
                "axis must be the batch's"
            )
        return returned.squeeze(0)

    def _mapped(self, one: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
        sample = torch.zeros(len(batch[0]), device=batch[0].device, dtype=self._dtype())
        try:
            return mapped(one, sample, batch, [0] * len(batch), type(self.net).__name__)
        except IndexError as error:
            # Torch's words for a look-up; not those of a list of the network's own, or of an axis.
            if self.uses is None or not any(words in str(error) for words in ("out of range in self", "out of bounds")):
                raise
            raise InputError(f"a sample holds a number that the network has no entry for: {error}") from error

    def _dtype(self) -> torch.dtype:
        return next((value.dtype for value in self.parameters()), torch.float32)

    def _count(self, gating: Gating) -> None:
        found = {name: tuple(uses) for name, uses in gating.uses.items()}
        if self.uses is None:
            self.__dict__["uses"] = tuple(sorted(found.items()))
            self.__dict__["groups"] = tuple(sorted(gating.groups))
            self.__dict__["__limits__"] = tuple(int(limit) for limits in gating.limits for limit in limits)
            return
        refuse_further(found, gating.groups, self.uses, self.groups if self.joint == "layer" else None)

    def forget(self) -> None:
        """Lets the next pass say how often each parameter is used."""
        self.__dict__["uses"] = None
        self.__dict__["groups"] = ()
        self.__dict__["__limits__"] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("__checkpoint__", self.__dict__.pop("checkpoint", ()))
        # In a new process the library that the network is from was told nothing.
        prepare(self.net)


def is_named(name: str, pattern: str) -> bool:
    """Whether a parameter's name, or its layer's, matches a pattern."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
