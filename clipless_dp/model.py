"""The wrapped model: input gate, the user's network, cotangent gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp import distributed, sharding
from clipless_dp.constraints import Constraint, ConstraintSpec, assign
from clipless_dp.errors import ConfigurationError, InputError, LossBoundError, NormError, PrivacyError
from clipless_dp.fusion import Entry, FusedNet
from clipless_dp.gates import _can_look, _largest, cotangent_gate, input_gate, rounding_slack, sample_norms, token_gate
from clipless_dp.losses import Loss
from clipless_dp.norms.operators import Operator
from clipless_dp.norms.rounding import exact_float64
from clipless_dp.precision import coarse_products, refuse_autocast
from clipless_dp.randomness import Randomness, may_draw, replace_dropout_
from clipless_dp.row_invariance import RowInvariance, Twin, Values, copied
from clipless_dp.rules.base import kind_of
from clipless_dp.tightness import TightnessReport, measure
from clipless_dp.tracing import TracedNet, is_hooked, is_leaf, parameters_of, trace
from clipless_dp.tracker import (
    Relation,
    Sensitivity,
    SensitivityTracker,
    Stamp,
    parameter_device_and_dtype,
    stamp,
)


class DPLipModel(nn.Module):
    """A network whose per-sample gradients are bounded, whatever it is fed.

    The network is traced with ``torch.fx`` and the traced graph is what runs, so the bounds are those of the code
    that is executed. ``model.net`` is the network itself, trained in place under its own parameter names.

    Args:
        net: the network. It takes one tensor ``(B, *input_shape)`` and returns one tensor ``(B, ...)``.
        input_shape: shape of one sample, without the batch axis.
        input_norm: ``X₀``: samples of larger Euclidean norm are projected onto this ball. ``None`` where embeddings
            read the input: samples are integers then, and one with a token that they do not know contributes nothing.
        loss: a loss that states the bound ``G`` of its gradient.
        constraint: projections that bound the weights' norms, applied now and after each step: one for all, or a
            mapping from patterns to constraints (:func:`clipless_dp.constraints.assign`). ``None``: norms follow
            from the weights' values, or from gates.
        row_invariant: whether passes with gradients run at numbers of rows at which the library returns the same bits
            for a sample whatever its place and its company (:mod:`clipless_dp.row_invariance`). ``None``, the default:
            the same activations, on a CPU. ``True``: also the same cotangents, on any device. ``False``: neither.
            Compiled and sharded passes run at the sizes that they are given.

    Raises:
        UnsupportedModuleError: lists every part of the network for which no bound is known.
        LossBoundError: the loss is not a :class:`clipless_dp.losses.Loss`.
        ConfigurationError: an argument is out of range or does not fit the network.
        NormError: a parameter holds a NaN or an infinity.

    Guarantee:
        For every batch, target, loss value and scale, each sample's gradient of the summed loss with respect to
        parameter θ has norm at most ``sensitivity().per_parameter[θ]``, in real arithmetic over the stored
        values, gates' rounding included. The samples do not interact. It covers gradients that reach the
        parameters through this module's own ``forward``, each sample being passed once between two optimizer steps.

    Attributes:
        net: the user's network.
        nonfinite_samples: how many samples :meth:`loss` has dropped because input, target or loss was not finite
            or out of range: an int64 tensor, for the data's owner only (it is not protected by noise).
        changes: how often the settings of layers (a dropout rate, a gate's value) were found changed.
        randomness: what dropout and layers of your own draw from: the operating system, whatever was seeded.
    """

    nonfinite_samples: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        input_shape: tuple[int, ...],
        input_norm: float | None = None,
        loss: Loss,
        constraint: ConstraintSpec = None,
        row_invariant: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise ConfigurationError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        if not isinstance(loss, Loss):
            raise LossBoundError(
                f"{loss!r} does not state the bound of its gradient; use one of clipless_dp.losses, or "
                "losses.BoundedLoss(function, bound=...) around a per-sample function"
            )
        if input_norm is not None and not (
            isinstance(input_norm, (int, float)) and math.isfinite(input_norm) and input_norm >= 1e-8
        ):
            raise ConfigurationError(f"input_norm must be a finite number of at least 1e-8, got {input_norm!r}")
        distributed.refuse_averages(net)
        sharding.refuse_shards(net)
        self.net = net
        self.randomness = Randomness()
        self._row_invariant = row_invariant
        self._input_shape = tuple(int(size) for size in input_shape)
        self._input_norm = None if input_norm is None else float(input_norm)
        self.loss_function = loss
        device, dtype = parameter_device_and_dtype(net)
        self.register_buffer("nonfinite_samples", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self._trace(device, dtype)
        self._constraints = assign(constraint, self._tracker.operators)
        self.changes = 0
        self._projected: dict[str, tuple[Stamp, float]] = {}
        for name, parameter in net.named_parameters():
            exact_float64(parameter, name)
        for name, constraint in self._trainable_constraints():
            with _naming(name):
                constraint.initialize_(self._parameter(name), self._tracker.operators[name])
        self.settle_()

    def _trace(self, device: torch.device, dtype: torch.dtype) -> None:
        traced = trace(self.net, self.input_shape, device=device, dtype=dtype)
        if traced.vocabulary is None and self._input_norm is None:
            raise ConfigurationError("input_norm must be given: a finite number, the cap of a sample's norm")
        if traced.vocabulary is not None and self._input_norm is not None:
            raise ConfigurationError("input_norm must be None: the network embeds its input, and tokens have no norm")
        replace_dropout_(traced.module, self.randomness)
        self._may_draw = may_draw(traced.module)
        self._traced: TracedNet = traced
        self._vocabulary = traced.vocabulary
        self._placed = device, dtype
        self.output_shape = traced.shapes[traced.output]
        bound = self.loss_function.gradient_bound(self.output_shape)
        if not (math.isfinite(bound) and bound >= 1e-8):
            raise LossBoundError(
                f"{self.loss_function!r} states the gradient bound {bound!r}; it must be at least 1e-8"
            )
        self._cotangent_norm = float(bound)
        self._tracker = SensitivityTracker(
            traced,
            input_norm=self.input_norm * rounding_slack(math.prod(self.input_shape), dtype),
            cotangent_norm=self.cotangent_norm * rounding_slack(math.prod(self.output_shape), dtype),
        )
        # Held in a tuple: as a registered submodule the graph would double every key of the state dict.
        self._graph = (traced.module,)
        self._fused = FusedNet(traced)
        self._rows = RowInvariance(backward=self._row_invariant is True)
        self._gathering: tuple[nn.Module | None] | None = None
        self._kept: tuple[object, Sensitivity] | None = None
        self._leaves = [
            _Leaf(() if is_leaf(self.net) else tuple(str(node.target).split(".")), traced.leaf(node))
            for node in traced.tensor_nodes()
            if node.op == "call_module"
        ]

    def forward(self, inputs: Tensor) -> Tensor:
        """Runs the gated network.

        Args:
            inputs: ``(B, *input_shape)``, of the parameters' dtype and device, or tokens: integers; ``B`` may be 0.

        Returns:
            ``(B, *output_shape)``. Rows of samples without a finite norm, or with an unknown token, are NaN: they
            contribute no gradient.

        Raises:
            InputError: wrong shape, dtype or device.
            PrivacyError: autocast is on, now or while the gradients are computed.
        """
        self.check_inputs(inputs)
        if sharding.is_sharded(self):
            sharding.sum_shards_(self)
            if self._gathering is None:
                self._gathering = (sharding.gathering(self._graph[0], self),)
        if inputs.shape[0] == 0:
            # A copy: what hooks on a view are told may be lost.
            return self._run(inputs.new_zeros(1, *self.input_shape))[:0].clone()
        if self._may_draw and not self.randomness.visiting and (self.training or torch.is_grad_enabled()):
            return self.randomness.run(self._run, inputs)  # type: ignore[no-any-return]
        return self._run(inputs)

    def _run(self, inputs: Tensor, net: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        own = net is None and self._gathering is None
        net = net or (self._gathering and self._gathering[0])
        fused = own and FusedNet.can_run(inputs)
        values = partial(self._values, net or (self._fused.module if fused else self._graph[0]), fused)
        if own and self._chooses_rows(inputs):
            outputs, finite, whole = self._rows.run(values, inputs, partial(self._twin, fused))
        else:
            outputs, finite, whole = values(inputs)
        outputs = cotangent_gate(outputs, self.cotangent_norm)
        if whole:
            # Not the gate's view: what is returned may be overwritten.
            return outputs.clone()
        return outputs.masked_fill(~finite.reshape(-1, *([1] * len(self.output_shape))), math.nan)

    def _values(self, net: Callable[..., Tensor], fused: bool, inputs: Tensor) -> Values:
        """Input gate and network."""
        if fused and self._fused.takes_entry and not inputs.requires_grad:
            norms = sample_norms(inputs)
            finite = norms <= _largest(self.input_norm, norms.dtype)
            whole = bool(finite.all())
            return Values(net(inputs, Entry(norms, self.input_norm, whole)), finite, whole)
        if self._vocabulary is None:
            gated, finite = input_gate(inputs, self.input_norm)
        else:
            gated, finite = token_gate(inputs, self._vocabulary)
        return Values(net(gated), finite, _can_look(finite) and bool(finite.all()))

    def _chooses_rows(self, inputs: Tensor) -> bool:
        """Whether this pass may run at other numbers of rows than the one that it is given."""
        # Without gradients too, while training: a checkpointed pass is computed so first.
        enabled = torch.is_grad_enabled() or self.training
        return enabled and not torch.compiler.is_compiling() and self._wants_rows(inputs.device)

    def _wants_rows(self, device: torch.device) -> bool:
        wanted = device.type == "cpu" if self._row_invariant is None else self._row_invariant
        return wanted and not sharding.is_sharded(self)

    def _twin(self, fused: bool) -> Twin:
        """A copy of the network with random weights, which shows how the library computes."""
        net, run = copied(self.net, self._fused.module if fused else self._graph[0])
        device, dtype = self.device_and_dtype()

        def samples(count: int, generator: torch.Generator) -> Tensor:
            shape = count, *self.input_shape
            if self._vocabulary is not None:
                return torch.randint(self._vocabulary, shape, generator=generator)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return Twin(partial(self._values, run, fused), net, samples, device)

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum of the samples' losses.

        Args:
            output: what :meth:`forward` returned.
            target: ``(B, ...)``, as the loss documents.
            mask: boolean ``(B,)``, false for rows that are padding; ``None`` means that all rows count.

        Returns:
            A scalar: the sum, never the mean, over rows that count and whose loss is finite.

        Raises:
            InputError: the mask or the target does not fit the output.
            PrivacyError: autocast is on.
        """
        refuse_autocast(output.device)
        if mask is not None and (mask.shape != output.shape[:1] or mask.dtype != torch.bool):
            raise InputError(
                f"mask must be boolean of shape {tuple(output.shape[:1])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if target.shape[:1] != output.shape[:1] or target.device != output.device:
            raise InputError(
                f"target {tuple(target.shape)} on {target.device} does not fit output {tuple(output.shape)} "
                f"on {output.device}"
            )
        losses = self.loss_function.per_sample(output, target)
        if _can_look(losses):
            total = losses.sum() if mask is None else losses.masked_fill(~mask, 0.0).sum()
            if math.isfinite(total.detach()):
                return total
        counted = torch.isfinite(losses)
        dropped = ~counted if mask is None else mask & ~counted
        if torch.is_grad_enabled():
            self.nonfinite_samples += dropped.sum()
        if mask is not None:
            counted = counted & mask
        return torch.where(counted, losses, torch.zeros_like(losses)).sum()

    def sensitivity(self, relation: Relation = "add-or-remove-one") -> Sensitivity:
        """Per-sample gradient bounds at the current weights.

        Args:
            relation: ``"add-or-remove-one"`` or ``"replace-one"`` (twice as large).

        Raises:
            PrivacyError: a submodule was replaced after wrapping, or a bound is not finite.
        """
        self._follow_changes()
        limits = self._limits()
        key = (relation, tuple(sorted(limits.items())), tuple(p.requires_grad for p in parameters_of(self.net)))
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        whole = not sharding.is_sharded(self)
        sensitivity, lasting = self._tracker.evaluate(limits, relation, whole=whole)
        self._kept = (key, sensitivity) if lasting else None
        return sensitivity

    @property
    def compiling_pays(self) -> bool:
        """Whether a compiled graph may be faster than ``forward`` as it is.

        Not on a CPU with signal gates around layers, or with convolutions in front of a max pooling: what is fused for
        the CPU is not for compiled graphs, which take 1.5 times and more of its time.
        """
        device, dtype = self.device_and_dtype()
        return not (self._fused.beats_compiled and FusedNet.can_run(torch.empty(0, device=device, dtype=dtype)))

    @property
    def row_invariant(self) -> bool | None:
        """Whether all passes so far ran where no sample's activations depend on its company; ``None`` before the first.

        False where no such numbers of rows were found, or it was switched off; compiled passes do not count.
        """
        device, _ = self.device_and_dtype()
        return self._rows.found if self._wants_rows(device) else False

    def lipschitz_constant(self) -> float:
        """Certified Lipschitz constant of the network at the current weights, in Euclidean norms.

        Returns:
            ``L`` with ``‖f(x) - f(y)‖ ≤ L·‖x - y‖`` for all inputs; infinite where none is known (tokens, say).
        """
        self._follow_changes()
        return self._tracker.lipschitz_constant(self._limits())

    def tightness(self, batch: tuple[Tensor, Tensor]) -> TightnessReport:
        """How much of each layer's bounds a small batch uses, and which gate or constraint would help.

        Runs the samples one at a time, in the model's own mode, and changes nothing: neither gradients nor counters
        nor the state of random numbers.

        Args:
            batch: inputs ``(B, *input_shape)`` and targets ``(B, ...)``; public or synthetic, as the report tells
                about them.

        Returns:
            Worst observed/bound for each layer's activations, cotangents and gradients; prints as a table.

        Raises:
            InputError: the batch is empty, or does not fit the model.
            PrivacyError: an observation is above its bound: the rule of a layer is wrong.
        """
        inputs, targets = batch
        self.check_inputs(inputs)
        if sharding.is_sharded(self):
            raise ConfigurationError(
                "tightness runs on whole weights, of which each rank holds a part: ask before fully_shard"
            )
        sensitivity = self.sensitivity()
        trainable = {name: p for name, p in self.net.named_parameters() if name in sensitivity.per_parameter}

        def loss(net: Callable[[Tensor], Tensor], index: int) -> Tensor:
            row = slice(index, index + 1)
            return self.loss(self._run(inputs[row], net), targets[row])

        counted = self.nonfinite_samples.clone()
        devices = [inputs.device] if inputs.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                return measure(self._traced, sensitivity, len(inputs), loss, trainable)
        finally:
            self.nonfinite_samples.copy_(counted)

    def project_(self) -> None:
        """Applies the constraints to the trainable weights; frozen ones are left as they are and certified."""
        self._project_(_project_)

    def project_gradients_(self) -> None:
        """Lets the constraints turn noisy gradients into directions that :meth:`project_` keeps: post-processing."""
        changes: list[_Change] = []
        for name, constraint in self._trainable_constraints():
            gradient = self.net.get_parameter(name).grad
            if gradient is not None and type(constraint).project_gradient_ is not Constraint.project_gradient_:
                change = partial(_project_gradient_, constraint, self._tracker.operators[name])
                changes.append((name, change, (gradient, self._parameter(name))))
        self._change_(changes)

    def settle_(self) -> None:
        """Checks the constraints after weights were loaded or moved; projects only those that do not hold."""
        self._project_(_settle_)

    def _project_(self, project: Callable[[Constraint, tuple[Operator, ...], Tensor], None]) -> None:
        self._projected = {}
        constraints = list(self._trainable_constraints())
        changes: list[_Change] = [
            (name, partial(project, constraint, self._tracker.operators[name]), (self._parameter(name),))
            for name, constraint in constraints
        ]
        self._change_(changes)
        self._projected = {name: (self._stamp(name), constraint.limit) for name, constraint in constraints}

    def _change_(self, changes: list[_Change]) -> None:
        """Changes tensors in place, those of which each rank holds a part as wholes."""

        def named(name: str, change: Callable[..., None], *tensors: Tensor) -> None:
            with _naming(name):
                change(*tensors)

        if sharding.is_sharded(self):
            sharding.change_wholes_([(partial(named, name, change), tensors) for name, change, tensors in changes])
            return
        for name, change, tensors in changes:
            named(name, change, *tensors)

    def _parameter(self, name: str) -> Tensor:
        return self.net.get_parameter(name).detach()

    def _stamp(self, name: str) -> Stamp:
        return stamp(self.net.get_parameter(name))

    def _trainable_constraints(self) -> Iterator[tuple[str, Constraint]]:
        return ((name, c) for name, c in self._constraints.items() if self.net.get_parameter(name).requires_grad)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample; fixed, as the bounds rest on it."""
        return self._input_shape

    @property
    def input_norm(self) -> float:
        """``X₀``, for T tokens that of T one-hot rows, ``√T``; fixed, as the bounds rest on it."""
        return math.sqrt(math.prod(self.input_shape)) if self._input_norm is None else self._input_norm

    @property
    def cotangent_norm(self) -> float:
        """``G``: the loss's bound, which the cotangent gate enforces; fixed, as the bounds rest on it."""
        return self._cotangent_norm

    @property
    def constraints(self) -> dict[str, Constraint]:
        """The constraint of each constrained parameter, by its name in ``net``."""
        return dict(self._constraints)

    def operators(self, name: str) -> tuple[Operator, ...]:
        """The linear operators that a parameter of ``net`` acts as."""
        return self._tracker.operators.get(name, ())

    def _limits(self) -> dict[str, float]:
        """Limits that projections established, for the parameters that have not changed since."""
        changed = [self._stamp(name) != stamp for name, (stamp, _) in self._projected.items()]
        if changed and sharding.is_sharded(self):
            # What one rank finds changed is certified anew by all of them, together.
            changed = distributed.total(torch.tensor(changed).long()).bool().tolist()
        return {
            name: limit for (name, (_, limit)), new in zip(self._projected.items(), changed, strict=True) if not new
        }

    def _follow_changes(self) -> None:
        """Traces anew when a layer's settings (a dropout rate, a gate's value) were changed; refuses other layers."""
        sharding.part_(self)
        sharded = sharding.is_sharded(self)
        for leaf in self._leaves:
            kind, known = type(leaf.module), None
            if sharded:
                kind, known = kind_of(leaf.module), sharding.hooks_of_sharding(leaf.module)
            if leaf.find(self.net) is not leaf.module or kind is not leaf.kind or is_hooked(leaf.module, besides=known):
                raise PrivacyError(
                    f"the module {'.'.join(leaf.path)!r} of model.net was replaced or given hooks after wrapping: the "
                    "bounds are not its own. Wrap the changed network in a new DPLipModel"
                )
        remedy = coarse_products(self._placed[0])
        if remedy is not None:
            raise PrivacyError(f"float32 products are set to round more coarsely than the bounds cover: {remedy}")
        if parameter_device_and_dtype(self.net) != self._placed:
            raise PrivacyError(
                "model.net was cast or moved by itself after wrapping, which the bounds do not cover: call the "
                "wrapping model's own .to()"
            )
        unknown = any(id(parameter) not in self._traced.names for parameter in parameters_of(self.net))
        if sharded or (unknown and sharding.has_shards(self)):
            self._check_shards(adopt=unknown)
        elif unknown:
            raise PrivacyError(
                "a parameter of model.net was added or replaced after wrapping: wrap the network in a new DPLipModel"
            )
        if any(leaf.settings() != leaf.known for leaf in self._leaves):
            if sharded:
                raise ConfigurationError(
                    "change the settings of layers before fully_shard, which no rank traces behind"
                )
            self._trace(*parameter_device_and_dtype(self.net))
            self.settle_()
            self.changes += 1

    def _check_shards(self, *, adopt: bool) -> None:
        """Knows the parameters, after ``fully_shard(model)``, by the parts that this rank holds."""
        sharding.check_shards(self, self.net.parameters())
        if not adopt:
            return
        named = {id(parameter): name for name, parameter in self.net.named_parameters()}
        if sorted(named.values()) != sorted(self._traced.names.values()):
            raise ConfigurationError(
                "a parameter that two layers share was split apart: call fully_shard on a module that holds both"
            )
        self._traced.names.clear()
        self._traced.names.update(named)
        # The ranks may have started from different weights.
        self.settle_()

    def check_inputs(self, inputs: Tensor) -> None:
        """Raises :class:`InputError` where a batch does not fit the model, :class:`PrivacyError` under autocast."""
        if tuple(inputs.shape[1:]) != self.input_shape or inputs.dim() == 0:
            raise InputError(
                f"expected inputs of shape (batch, {', '.join(map(str, self.input_shape))}), got {tuple(inputs.shape)}"
            )
        device, dtype = self.device_and_dtype()
        if self._vocabulary is not None:
            if inputs.dtype not in (torch.int32, torch.int64):
                raise InputError(f"tokens are {inputs.dtype}; convert the data set first, with tokens.long()")
            dtype = inputs.dtype
        elif not inputs.is_floating_point():
            raise InputError(f"inputs are {inputs.dtype}; convert them first, e.g. images.float() / 255")
        if inputs.dtype != dtype or inputs.device != device:
            raise InputError(f"inputs are {inputs.dtype} on {inputs.device}, the model is {dtype} on {device}")
        refuse_autocast(device)

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the parameters are, and their dtype: what inputs must have."""
        for parameter in self.net.parameters():
            return parameter.device, parameter.dtype
        return self.nonfinite_samples.device, torch.float32

    def _apply(self, fn: Any, recurse: bool = True) -> DPLipModel:
        if sharding.is_sharded(self):
            raise ConfigurationError("move or cast the model before fully_shard(model), which places its parts")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._trace(*parameter_device_and_dtype(self.net))
        self.settle_()
        return self

    def __getstate__(self) -> dict[str, Any]:
        derived = {"_traced", "_tracker", "_graph", "_fused", "_gathering", "_rows", "_kept", "_projected", "_leaves"}
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._trace(*parameter_device_and_dtype(self.net))
        self.settle_()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says which parameter has no certified norm."""
    try:
        yield
    except NormError as error:
        raise NormError(f"{name}: {error}") from error


def _project_(constraint: Constraint, operators: tuple[Operator, ...], weight: Tensor) -> None:
    constraint.project_(weight, operators)


def _settle_(constraint: Constraint, operators: tuple[Operator, ...], weight: Tensor) -> None:
    if not constraint.holds(weight, operators):
        constraint.project_(weight, operators)


def _project_gradient_(
    constraint: Constraint, operators: tuple[Operator, ...], gradient: Tensor, weight: Tensor
) -> None:
    constraint.project_gradient_(gradient, weight, operators)


_Change = tuple[str, Callable[..., None], tuple[Tensor, ...]]
"""A parameter's name, and a function with the tensors that it takes, of which it changes the first."""


class _Leaf:
    """A bounded module, where it was found, and the settings that its bounds rest on."""

    def __init__(self, path: tuple[str, ...], module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.kind = kind_of(module)
        self._names = [
            name
            for name, value in vars(module).items()
            if isinstance(value, (int, float, str, tuple, NoneType)) and name != "training" and name[0] != "_"
        ]
        self.known = self.settings()

    def settings(self) -> list[Any]:
        values = vars(self.module)
        return [values.get(name) for name in self._names]

    def find(self, net: nn.Module) -> nn.Module | None:
        found: nn.Module | None = net
        for name in self.path:
            found = None if found is None else found._modules.get(name)
        return found
