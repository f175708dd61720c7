"""The wrapped model: input gate, the user's network, cotangent gate."""
# Over 500 lines: one public class, a third of it documentation of what may be asked of it; what it does is elsewhere.

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clipless_dp.arguments import flag
from clipless_dp.bounds.maximum_norm import carries_l1
from clipless_dp.bounds.sensitivity import Relation, Sensitivity
from clipless_dp.bounds.tightness import TightnessReport, measure
from clipless_dp.bounds.tracker import SensitivityTracker
from clipless_dp.constraints import Constraint, ConstraintSpec, assign
from clipless_dp.distributed import placement
from clipless_dp.distributed.placement import OneProcess, Placement
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError, UnsupportedModuleError
from clipless_dp.fusion import FusedNet
from clipless_dp.gates import (
    adapting_among,
    adapting_in,
    cotangent_gate_l1,
    rounding_slack,
    takes_row_weights,
    weighing,
)
from clipless_dp.graph.apart import join_, set_apart_
from clipless_dp.graph.dropout import may_draw, replace_dropout_
from clipless_dp.graph.tracing import TracedNet, trace
from clipless_dp.graph.unwritten import buffers_unwritten
from clipless_dp.layers.coordinates import Slopes
from clipless_dp.losses import Loss
from clipless_dp.model import checks, description, exported, lineage, passes, saved
from clipless_dp.model.factors import Factors, summed
from clipless_dp.model.network import Network
from clipless_dp.model.outermost import is_exported, open_operator, outermost_gate
from clipless_dp.model.own_loss import Between, Own, Sealing, guarded
from clipless_dp.model.register import Register
from clipless_dp.model.rescaling import rescaled
from clipless_dp.model.rowwise import RowLosses
from clipless_dp.model.turns import in_turn
from clipless_dp.model.valid_inputs import random_rows
from clipless_dp.model.watch import Watch
from clipless_dp.model.weights import Mark, Weights
from clipless_dp.modules import Unscripted, kept_modes, modules_of, parameter_device_and_dtype, parameters_in
from clipless_dp.noise.randomness import Randomness
from clipless_dp.norms.operators import Operator
from clipless_dp.packing import Packing, Structure
from clipless_dp.sampling import draws
from clipless_dp.tensor_types import plain

_Net = Callable[[Tensor], Tensor]
_Opened = passes.Pass | Tensor | None
"""A pass, or in a compiled graph its token; ``None`` where it is nobody's."""


class DPLipModel(Unscripted, nn.Module):
    """A network whose per-sample gradients are bounded, whatever it is fed.

    The network is traced with ``torch.fx`` and the traced graph is what runs, so the bounds are those of the code
    that is executed. ``model.net`` is the network itself, trained in place under its own parameter names.

    Args:
        net: the network. It takes one tensor ``(B, *input_shape)`` and returns one tensor ``(B, ...)``.
        input_shape: shape of one sample, without the batch axis. Of a network with several inputs, which
            :func:`clipless_dp.gradient_gated` isolates: a mapping from their names, or a sequence; each entry a shape,
            a pair ``(shape, dtype)``, or an example ``(B, ...)`` of which shape and dtype are read.
        input_norm: ``X₀``: samples of larger Euclidean norm are projected onto this ball. ``None`` where embeddings
            read the input: samples are integers then, and one with a token that they do not know contributes nothing;
            and where all that is trained is isolated, or the input first goes through a
            :class:`clipless_dp.layers.BoxProjection`, if samples are to stay as they are.
        loss: a loss that states the bound ``G`` of its gradient.
        constraint: projections that bound the weights' norms, applied now and after each step: one for all, or a
            mapping from patterns to constraints (:func:`clipless_dp.constraints.assign`). ``None``: norms follow
            from the weights' values, or from gates.
        row_invariant: whether passes with gradients run at numbers of rows at which the library returns the same bits
            for a sample whatever its place and its company (:mod:`clipless_dp.model.row_invariance`). ``None``: the
            same activations, on a CPU, and the same cotangents where gates normalise. ``True``: both, on any device.
            ``False``: neither. A size is asked about when it comes up first, which takes several passes: some sixty
            steps in a run. Compiled and sharded passes run at the sizes that they are given.
        rescale: whether what a constraint shrinks weights by is taken from biases too, so that a network that is
            positively homogeneous between its layers predicts what it did (:func:`clipless_dp.rescale_`): for weights
            that were trained before. Otherwise a warning says where such weights shrink to less than half.

    Raises:
        UnsupportedModuleError: lists every part of the network for which no bound is known.
        LossBoundError: the loss is not a :class:`clipless_dp.losses.Loss`.
        ConfigurationError: an argument is out of range or does not fit the network, or parameters share memory.
        NormError: a parameter holds a NaN or an infinity.

    Guarantee:
        For every batch, target, loss value and scale, each sample's gradient of the summed loss with respect to
        parameter θ has norm at most ``sensitivity().per_parameter[θ]``, in real arithmetic over the stored
        values, gates' rounding included. The samples do not interact. It covers gradients that reach the
        parameters through this module's own ``forward``, each sample being passed once between two optimizer steps.

    Attributes:
        net: the user's network.
        row_losses: what evaluates the loss, so that rows do not meet in it.
        changes: how often the settings of layers (a dropout rate, a gate's value) were found changed.
        randomness: what dropout and layers of your own draw from: the operating system, whatever was seeded.
    """

    _placement: Placement = OneProcess()
    _placement_of: type | None = None

    def __init__(
        self,
        net: nn.Module,
        *,
        input_shape: Any,
        input_norm: float | None = None,
        loss: Loss,
        constraint: ConstraintSpec = None,
        row_invariant: bool | None = False,
        rescale: bool = False,
    ) -> None:
        super().__init__()
        checks.refuse_arguments(net, input_norm, loss, row_invariant)
        self.net = net
        self.randomness = Randomness()
        self._row_invariant = None if row_invariant is None else bool(row_invariant)
        self._packing = checks.packing_of(net, input_shape)
        self._input_shape = checks.checked_shape(input_shape) if self._packing is None else (self._packing.entries,)
        self._input_norm = None if input_norm is None else float(input_norm)
        self.loss_function = loss
        self.row_losses = RowLosses()
        self._factors = Factors()
        self._between = Between()
        self._dropped_samples = torch.zeros((), dtype=torch.int64)
        self._constraints: dict[str, Constraint] = {}
        self._count_()
        self.register = Register(self, net)
        self._trace()
        self._constraints.update(assign(constraint, self._tracker.operators))
        description.remember(self)
        self.changes = 0
        if flag("rescale", rescale) and self._constraints:
            rescaled(net, self._traced, self._tracker.operators, self._constraints, self.input_shape)
        self._weights.initialise_()
        self.settle_()
        self._beside = saved.first(self, net)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As of any module: parameters and buffers of the network under ``net.``, and what layers add.

        Warns, with a :class:`PrivacyWarning`, of what it holds beside (``get_extra_state``, hooks) and did not hold
        when the network was wrapped: nothing says whether that is of samples. ``model.net.state_dict()`` does not ask.
        """
        # As torch takes them, in order too.
        given: list[Any] = [*args, *[destination, prefix, keep_vars][len(args) :]]
        destination, prefix, keep_vars = given
        there = frozenset(destination or ())
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        saved.warn_of_others(self.net, self._beside, state, prefix, there)
        return state

    def _count_(self) -> None:
        """Gives gates whose caps adapt what they leave their counts in."""
        device, dtype = parameter_device_and_dtype(self.net)
        for path, caps in adapting_in(self.net).items():
            caps.count_(path, device, dtype)

    def _trace(self) -> None:
        device, dtype = parameter_device_and_dtype(self.net)
        counts = {name: description.integers_of(part) for name, part in self.net.named_modules()}
        description.make_room(self.net)
        traced = trace(self.net, self.input_shape, device=device, dtype=dtype)
        watch = Watch(self.net, traced, device, dtype)
        checks.refuse_norm(self._input_norm, traced, self._packing)
        replace_dropout_(traced.module, self.randomness)
        self._may_draw = may_draw(traced.module)
        sealing = Sealing(self.register.drop, self._watching_weights)
        self._has_own_layers = set_apart_(traced.module, passes.is_witnessed, self.register.resting, sealing)
        self._traced: TracedNet = traced
        self._counted = {
            f"layers.{name}.{count}"
            for name, part in self.net.named_modules()
            for count in description.moved(counts.get(name, {}), description.integers_of(part))
        }
        self.output_shape = traced.shapes[traced.output]
        loss, shape = self.loss_function, self.output_shape
        self._cotangent_norm = checks.checked_bound(loss, shape)
        self._cotangent_norm_l1 = (
            checks.checked_bound_l1(loss, shape, self._cotangent_norm) if carries_l1(traced) else None
        )
        limit_l1 = self._cotangent_norm_l1
        self._tracker = SensitivityTracker(
            traced,
            input_norm=self.input_norm * rounding_slack(math.prod(self.input_shape), dtype),
            cotangent_norm=self.cotangent_norm * rounding_slack(math.prod(self.output_shape), dtype),
            weights=self.placement,
            cotangent_norm_l1=None if limit_l1 is None else limit_l1 * rounding_slack(math.prod(shape), dtype),
        )
        self._network = Network(
            self.net, traced, self.input_norm, self._row_invariant, self.register.resting, self._packing
        )
        self._weights = Weights(self.net, self._constraints, self._tracker)
        self._watch = watch
        self._dropped_samples = self._dropped_samples.to(device)

    def forward(self, inputs: Tensor | Structure | None = None, **named: Tensor) -> Tensor:
        """Runs the gated network.

        Args:
            inputs: ``(B, *input_shape)``, of the parameters' dtype and device, or tokens: integers; ``B`` may be 0. Of
                a network with several inputs: these, by name or in order, or rows of them (:meth:`rows`).
            named: several inputs by name, as a batch of a data set's own is passed: ``model(**batch)``.

        Returns:
            ``(B, *output_shape)``. Rows of samples without a finite norm, or with an unknown token, are NaN: they
            contribute no gradient.

        Raises:
            InputError: wrong shape, dtype or device, or a tensor of a type with code of its own.
            PrivacyError: autocast is on, now or while the gradients are computed; or a layer of your own writes a
                buffer that files of the model hold.
        """
        if torch.compiler.is_compiling() and self.graph.isolated:
            raise ConfigurationError(
                "a network that runs sample by sample is not compiled or exported, as its operations would run unseen "
                "by what keeps parameters behind their gates: run the model as it is, or use gradient_gated(net, "
                "isolation='graph') where each of its parts has a rule"
            )
        inputs = self.rows(inputs, named)
        self.check_inputs(inputs)
        net = self.placement.opened(self._traced.module)
        opened: _Opened = None
        if passes.is_witnessed():
            if torch.compiler.is_compiling():
                # An exported program is nobody's pass: a step refuses what it adds to a gradient.
                opened = open_operator(inputs, self.register.key)
            else:
                opened = self.register.open(inputs)
                self._factors.begin()
        if inputs.shape[0] == 0:
            # A copy: what hooks on a view are told may be lost.
            return self._run(inputs.new_zeros(1, *self.input_shape), net, opened)[:0].clone()
        if self._may_draw and not self.randomness.visiting and (self.training or torch.is_grad_enabled()):
            return self.randomness.run(partial(self._run, net=net, opened=opened), inputs)
        return self._run(inputs, net, opened)

    def _run(self, inputs: Tensor, net: _Net | None = None, opened: _Opened = None) -> Tensor:
        looks = self._has_own_layers and self.placement.is_whole and not torch.compiler.is_compiling()
        # Around the aliases of parameters, as layers of a user's own write to what is there without them.
        with self._unwritten() if looks else nullcontext():
            if isinstance(opened, passes.Pass) and not self.register.sharded:
                with self.register.lock, self.register.running(opened):
                    return self._gated(inputs, net, opened)
            return self._gated(inputs, net, opened)

    def _gated(self, inputs: Tensor, net: _Net | None, opened: _Opened) -> Tensor:
        if net is None:
            weights = opened.weights if isinstance(opened, passes.Pass) else None
            # Said of whole rows, too: an interrupted pass may have left its own.
            with nullcontext() if torch.compiler.is_compiling() else weighing(weights):
                outputs, finite, whole = self._network.run(inputs, training=self.training)
            if weights is not None:
                # What another road of calls has left out, a compiled graph say, is refused.
                cast(passes.Pass, opened).weighed = True
        else:
            outputs, finite, whole = self._network.values(net, False, inputs)
        if self._cotangent_norm_l1 is not None:
            outputs = cotangent_gate_l1(outputs, self._cotangent_norm_l1)
        entry = partial(self._enter, opened) if isinstance(opened, passes.Pass) else opened
        own = Own() if self._factors.required and isinstance(opened, passes.Pass) else None
        outputs = outermost_gate(outputs, self.cotangent_norm, entry, own)
        if not whole:
            outputs = outputs.masked_fill(~finite.reshape(-1, *([1] * len(self.output_shape))), math.nan)
        if not isinstance(opened, passes.Pass) or opened.public:
            # Not the gate's view: what is returned may be overwritten.
            return outputs.clone() if whole else outputs
        returned = guarded(outputs, self.register.drop)
        if own is not None:
            own.return_(returned)
        return returned

    @contextmanager
    def _unwritten(self) -> Iterator[None]:
        own = [leaf.module for leaf in self._watch.leaves if not leaf.is_ours]
        # In turn, as a step of another thread, through another wrapper say, writes parameters by right.
        with self.register.turns.resting(math.inf), buffers_unwritten(self.net, own):
            yield

    def _enter(self, entering: passes.Pass, norms: Tensor | None, other: bool) -> None:
        enter = self.register.enter_by_engine if self.register.sharded else self.register.enter
        enter(entering, norms)
        try:
            self._factors.refuse_other_losses(other)
        except PrivacyError:
            self.register.drop()
            raise

    def rows(self, inputs: Tensor | Structure | None, named: Mapping[str, Tensor] | None = None) -> Tensor:
        """The inputs of a batch as one tensor ``(B, *input_shape)``: as it is, or packed.

        Rows that are packed of one draw's tensors are known as that draw's, as long as none of these was changed.

        Args:
            inputs: the tensor, or a mapping or a sequence of several; targets in it, under ``labels`` or ``label``, are
                left out.
            named: the same by name, where ``inputs`` is ``None``.

        Raises:
            InputError: they are not those that the model was wrapped for, or no plain tensors
                (:func:`clipless_dp.tensor_types.plain`).
        """
        packing = self._packing
        if isinstance(inputs, Tensor) and not named:
            inputs = plain(inputs, "the input")
            if packing is not None and packing.is_single(inputs):
                return inputs.reshape(len(inputs), packing.entries)
            return inputs
        if packing is not None and isinstance(inputs, Tensor) and packing.has("inputs"):
            # An input of the network's own that is called as the argument here.
            named = {"inputs": inputs, **(named or {})}
            inputs = None
        if packing is None or isinstance(inputs, Tensor) or (inputs is not None and named):
            raise InputError("expected one tensor; several inputs are told of by input_shape, by name or in order")
        parts = packing.ordered(packing.without_labels((named or {}) if inputs is None else inputs))
        packed = packing.packed(parts)
        if passes.is_witnessed() and not torch.compiler.is_compiling():
            draws.note_packed(packed, parts)
        return packed

    @property
    def packing(self) -> Packing | None:
        """How the inputs of a sample lie in one row; ``None`` where it is a single one."""
        return self._packing

    def random_inputs(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples that the network can read, ``(count, *input_shape)``, on the model's device, as passes take them.

        Numbers are normal, tokens uniform among those that the tables know which they are looked up in; other integers
        are 0 or 1, as in a mask.

        Args:
            count: how many.
            generator: of the CPU, which draws them.
        """
        device, dtype = self.device_and_dtype()
        drawn = random_rows(self._traced, self._packing, self.input_shape, count, generator)
        return drawn.to(device, dtype if drawn.is_floating_point() else None)

    def expect_rows(self, count: float) -> None:
        """About so many rows will come in at once: a public number, by which the sizes of passes are chosen."""
        self._network.rows.expect(count)

    @property
    def counted(self) -> set[str]:
        """Where calls of layers and of the loss have counted on, as a description names it: no settings."""
        return {*self._counted, *(f"loss.{name}" for name in self.row_losses.counted)}

    def forget_factors(self) -> None:
        """What losses are multiplied by from now on may differ from what it was."""
        self._factors.forget()

    def loss(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum of the samples' losses.

        Args:
            output: what :meth:`forward` returned.
            target: ``(B, ...)``, as the loss documents.
            mask: boolean ``(B,)``, false for rows that are padding; ``None`` means that all rows count.

        Returns:
            A scalar: the sum, never the mean, over rows that count and whose loss is finite; times
            :attr:`loss_weight`. On a CPU its backward pass refuses, with a ``PrivacyError``, a factor other than in the
            passes before: a function of the sum, or of the batch's size.

        Raises:
            InputError: the mask or the target does not fit the output, or is no plain tensor
                (:func:`clipless_dp.tensor_types.plain`), or the loss is not one real number a row.
            PrivacyError: the target requires gradients, or the output hangs on another tensor that does
                (:meth:`require_own_loss`).
            PrivacyError: autocast is on, or the loss of a row depends on other rows, on chance or on earlier calls
                (:class:`clipless_dp.model.rowwise.RowLosses`).
        """
        output, target = plain(output, "the output"), plain(target, "the target")
        mask = None if mask is None else plain(mask, "the mask")
        checks.check_targets(output, target, mask)
        if target.requires_grad and passes.is_private():
            checks.refuse_trained_targets()
        if self._factors.required and passes.is_witnessed() and not torch.compiler.is_compiling():
            output = self._between.own_output(output, self.register.parameters, self.register.drop)
        losses = self.row_losses(self.loss_function, output, target, mask, bound=self.cotangent_norm)
        total, dropped = summed(losses, mask)
        if dropped is not None and torch.is_grad_enabled() and not is_exported():
            if self._dropped_samples.device != dropped.device:
                # What moves parameters by itself, as fully_shard does, knows nothing of it.
                self._dropped_samples = self._dropped_samples.to(dropped.device)
            self._dropped_samples.add_(dropped.sum())
        return self._factors.watched(total, self.register)

    def require_own_loss(self) -> None:
        """From now on a backward pass that does not come through :meth:`loss` is refused with a ``PrivacyError``.

        So is one of whose cotangents a term beside it has a part in; on an accelerator that part is left out. And
        :meth:`loss` refuses what hangs on other tensors that require gradients than the network's own. In compiled
        graphs none of it is seen.
        """
        self._factors.required = True

    @property
    def loss_weight(self) -> float:
        """What :meth:`loss` multiplies the sum by, 1 at first: for a public schedule, which must not follow the data.

        Whatever else a loop multiplies the sum by must be the same positive number in every pass; on a CPU, outside
        of compiled graphs, another one is refused on the way back.

        Raises:
            ConfigurationError: it is set to anything but a positive finite number.
        """
        return self._factors.weight

    @loss_weight.setter
    def loss_weight(self, weight: float) -> None:
        self._factors.set_weight(weight)

    @property
    def nonfinite_samples(self) -> Tensor:
        """How many samples :meth:`loss` has dropped because input, target or loss was not finite or out of range.

        An int64 tensor, for the data's owner only: an exact count, which no noise protects. It stays in this object: it
        is no buffer, and no part of pickles, copies, state dicts, exported graphs or results of a search.
        """
        return self._dropped_samples

    @in_turn
    def sensitivity(self, relation: Relation = "add-or-remove-one") -> Sensitivity:
        """Per-sample gradient bounds at the current weights.

        Args:
            relation: ``"add-or-remove-one"`` or ``"replace-one"`` (twice as large).

        Raises:
            PrivacyError: a submodule was replaced after wrapping, or a bound is not finite.
        """
        # Weights are those of a new trace where settings were changed.
        parts = self._follow_changes()
        return self._weights.sensitivity(self.placement, parts, relation)[0]

    @in_turn
    def sensitivity_at_limits(self) -> Sensitivity:
        """The same by the limits of constraints that hold, which norms may be below: as behind a projection."""
        self._follow_changes()
        return self._weights.sensitivity_at_limits(self.placement)

    def bounds_of_pass(self) -> tuple[Sensitivity | None, object]:
        """The bounds that hold for a pass that begins now, and a fingerprint of what they rest on.

        Of a model of which each rank holds a part, the bounds are those of the step, at the same weights.

        Raises:
            PrivacyError: as :meth:`sensitivity`.
        """
        if not self.placement.is_whole:
            return None, (self._watch, self._weights.marks_of_parts(self.register.parameters))
        parts = self._follow_changes()
        sensitivity, names = self._weights.sensitivity(self.placement, parts)
        return sensitivity, (self._watch, self._weights.marks(names))

    def _watching_weights(self) -> Callable[[], None]:
        """Looks at all weights in the middle of a pass; what it returns refuses other ones, and drops the gradients.

        Where processes hold parts of them, nothing does.
        """
        whole = self.placement.is_whole
        marks = self._weights.marks(None) if whole else {}

        def require() -> None:
            try:
                self._weights.refuse_others(marks)
            except PrivacyError:
                self.register.drop()
                raise

        return require

    def check_pass(self, fingerprint: object) -> None:
        """Makes sure that a backward pass meets the weights, settings and hooks of its forward pass.

        So must the step of a model of which each rank holds a part.

        Raises:
            PrivacyError: it does not.
        """
        if fingerprint is None:
            return
        watch, marks = cast("tuple[Watch, dict[str, Mark] | list[Mark]]", fingerprint)
        self._watch.refuse_interference(self.placement.is_whole)
        watch.refuse_other_settings()
        if isinstance(marks, dict):
            self._weights.refuse_others(marks)
        else:
            self._weights.refuse_other_parts(self.register.parameters, marks)

    def reached(self, begun: passes.Pass) -> set[int]:
        """The parameters (by ``id``) that a pass has gradients of, if any of them can contribute."""
        bounds = {} if begun.sensitivity is None else begun.sensitivity.per_parameter
        return {id(self.net.get_parameter(name)) for name, bound in bounds.items() if bound > 0.0}

    @property
    def takes_row_weights(self) -> bool:
        """Whether rows of several weights may come in one pass: gates multiply what they return of each by its own.

        So it is where all that trains is the parameters of linear layers and convolutions behind gradient gates of
        their own, neither joint nor adaptive, and the pass is neither compiled nor of a subclass's own.
        """
        plain = type(self).forward is DPLipModel.forward and type(self).__call__ is nn.Module.__call__
        if not plain or "forward" in vars(self) or self._compiled_call_impl is not None or not self.placement.is_whole:
            return False
        return not self.graph.isolated and self.graph.trains_in_layers(takes_row_weights)

    @property
    def compiling_pays(self) -> bool:
        """Whether a compiled graph may be faster than ``forward`` as it is; :attr:`why_eager` says why not."""
        return not self.why_eager

    @property
    def why_eager(self) -> str:
        """Why a compiled graph cannot be faster than ``forward`` as it is, in words; empty where it may be.

        Not on a CPU with signal gates around layers, or with convolutions in front of a max pooling: what is fused for
        the CPU is not for compiled graphs, which take 1.5 times and more of its time. Nor where a network is isolated,
        which runs as it is, or where caps adapt, which are counted in eager passes.
        """
        if self.graph.isolated:
            return (
                "the network runs sample by sample, and is not compiled, as its operations would run unseen: "
                "isolation='graph' may be, where its parts have rules"
            )
        if adapting_in(self.net):
            return "its caps adapt, and are counted in eager passes"
        device, dtype = self.device_and_dtype()
        if self._network.fused.beats_compiled and FusedNet.can_run(torch.empty(0, device=device, dtype=dtype)):
            return (
                "its gates or pooled convolutions run as operations fused by hand on a CPU, and compiled graphs took "
                "1.5 to 1.9 times as long (benchmarks/step.py). The name of a backend, compile='inductor', compiles "
                "nevertheless"
            )
        return ""

    @property
    def row_invariant(self) -> bool | None:
        """Whether all passes so far ran where no sample's activations depend on its company; ``None`` before the first.

        False where no such numbers of rows were found, or it was switched off; compiled passes do not count.
        """
        device, _ = self.device_and_dtype()
        return self._network.rows.found if self.placement.is_whole and self._network.chooses_rows(device) else False

    @in_turn
    def lipschitz_constant(self, *, norm: Literal[2, "inf"] | tuple[float, float] = 2) -> float:
        """Certified Lipschitz constant of the network at the current weights, from behind the input gate.

        Args:
            norm: 2: in Euclidean norms; ``"inf"``: in maximum norms, in which layers of distances are 1-Lipschitz. Or a
                pair ``(p, q)``, of inputs and of outputs: ``(1, inf)``, the most that any output moves with any single
                coordinate, and ``(inf, inf)``, with all of them at once, from the slopes in single coordinates
                (:meth:`coordinate_slopes`) where those are known; ``(2, 2)`` is 2.

        Returns:
            ``L`` with ``‖f(x) - f(y)‖_q ≤ L·‖x - y‖_p`` for all inputs; infinite where none is known (tokens, say). The
            input gate, a Euclidean projection, keeps the first; others are of inputs that it leaves as they are.

        Raises:
            ConfigurationError: the norm is another one.
            UnsupportedModuleError: of ``"inf"``: names the layers of which no constant is known there.
        """
        self._follow_changes()
        chosen = checks.checked_norm(norm)
        if chosen == "inf":
            return self._tracker.lipschitz_constant_inf(self._weights.limits(self.placement)[0])
        if chosen != 2:
            slopes = self._coordinate_slopes()
            if slopes is None:
                return math.inf
            return float(slopes.magnitude().amax() if chosen == (1.0, math.inf) else slopes.total.amax())
        return self._tracker.lipschitz_constant(self._weights.limits(self.placement)[0])

    def _coordinate_slopes(self) -> Slopes | None:
        try:
            return self._tracker.coordinate_slopes()
        except UnsupportedModuleError:
            return None

    @in_turn
    def coordinate_slopes(self) -> Slopes:
        """Bounds of the slopes of each output in each coordinate of the input, at the current weights.

        Raises:
            UnsupportedModuleError: lists every part of the network of which none are known, with the reason.
        """
        self._follow_changes()
        return self._tracker.coordinate_slopes()

    @in_turn
    def coordinate_rounding(self) -> float:
        """How far an output in the model's dtype may lie from that of real arithmetic; infinite without a box in front.

        Raises:
            UnsupportedModuleError: as :meth:`coordinate_slopes`.
        """
        self.coordinate_slopes()
        return self._tracker.rounding(self.device_and_dtype()[1])

    @in_turn
    def margin_constants(self) -> Tensor:
        """Certified Lipschitz constants of the differences of scores: ``K_ij`` for ``f_i - f_j``, at most ``√2·L``.

        Returns:
            ``(C, C)`` in float64, on the CPU; of one output ``f`` those of the scores ``(-f, f)``. Infinite where none
            is known (tokens, say). See :func:`clipless_dp.bounds.margins.margin_constants`.

        Raises:
            ConfigurationError: the network does not return ``(B, C)`` or ``(B,)``.
        """
        self._follow_changes()
        return self._tracker.margin_constants(self._weights.limits(self.placement)[0])

    @in_turn
    def forward_error(self, *, norm: Literal[2, "inf"] = 2) -> float:
        """How far scores of a float64 forward pass may lie from those of real arithmetic, in Euclidean norm.

        Args:
            norm: ``"inf"``: in the maximum norm.
        """
        self._follow_changes()
        if norm == "inf":
            return self._tracker.forward_error_inf(self._weights.limits(self.placement)[0])
        return self._tracker.forward_error(self._weights.limits(self.placement)[0])

    def export_net(self) -> exported.ExportedNet:
        """What the model predicts as a plain module, for ``torch.export``, ONNX and ``torch.jit.trace``.

        Input gate and gates of signals are ordinary operations in it, which change what flows; gates of cotangents and
        gradients, which change the way back alone, are gone. ``model.net`` has no input gate, and tracing the wrapped
        model records one of the ways that its gates go. A copy of the weights, in ``eval`` mode, that takes no
        gradients; it is compared with the model on made-up rows first.

        Returns:
            A module from ``(B, *input_shape)`` to what the model returns: rows that the input gate drops are NaN.

        Raises:
            ConfigurationError: the model computes something else by ordinary operations; or it reads several inputs, or
                each rank holds a part of it only.
        """
        if not self.placement.is_whole:
            raise ConfigurationError("each rank holds a part of the weights: gather them before they are exported")
        inputs = self.random_inputs(exported.ROWS, torch.Generator().manual_seed(0))
        counted = self.nonfinite_samples.clone()
        devices = [inputs.device] if inputs.is_cuda else []
        try:
            with torch.random.fork_rng(devices=devices), passes.unwitnessed(), kept_modes(self):
                return exported.export_net(self.graph, self.input_norm, inputs, self.eval()._run)
        finally:
            self.nonfinite_samples.copy_(counted)

    def tightness(self, batch: tuple[Tensor | Structure, Tensor]) -> TightnessReport:
        """How much of each layer's bounds a small batch uses, and which gate or constraint would help.

        Runs the samples one at a time, in the model's own mode, and changes nothing: neither gradients nor counters
        nor the state of random numbers.

        Args:
            batch: inputs ``(B, *input_shape)``, or several of them, and targets ``(B, ...)``; public or synthetic, as
                the report tells about them.

        Returns:
            Worst observed/bound for each layer's activations, cotangents and gradients; prints as a table.

        Raises:
            InputError: the batch is empty, or does not fit the model.
            PrivacyError: an observation is above its bound: the rule of a layer is wrong.
        """
        inputs, targets = self.rows(batch[0]), batch[1]
        self.check_inputs(inputs)
        if not self.placement.is_whole:
            raise ConfigurationError(
                "tightness runs on whole weights, of which each rank holds a part: ask before fully_shard"
            )

        def loss(net: _Net, index: int) -> Tensor:
            row = slice(index, index + 1)
            return self.loss(self._run(inputs[row], net), targets[row])

        counted = self.nonfinite_samples.clone()
        devices = [inputs.device] if inputs.is_cuda else []
        sensitivity, named = self.sensitivity(), dict(self.net.named_parameters())
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad(), passes.unwitnessed():
                return measure(self._traced, sensitivity, len(inputs), loss, named)
        finally:
            self.nonfinite_samples.copy_(counted)

    def project_(self) -> None:
        """Applies the constraints to the trainable weights; frozen ones are left as they are and certified."""
        self._weights.project_(self.placement)

    def project_gradients_(self) -> None:
        """Lets the constraints turn noisy gradients into directions that :meth:`project_` keeps: post-processing."""
        self._weights.project_gradients_(self.placement)

    def settle_(self) -> None:
        """Checks the constraints after weights were loaded or moved; projects only those that do not hold."""
        self._weights.project_(self.placement, settling=True)

    @property
    def placement(self) -> Placement:
        """Where the weights are: found anew after ``fully_shard``, which makes a model of another class of this one."""
        return self._placement if self._placement_of is type(self) else self._take(placement.of(self))

    def place(self) -> Placement:
        """Finds out anew where the model is, among the processes that are there by now, as who trains it does first.

        Raises:
            ConfigurationError: as :func:`clipless_dp.distributed.placement.joined`.
        """
        return self._take(placement.joined(self, self.net))

    def _take(self, found: Placement) -> Placement:
        if not found.is_whole:
            join_(self._traced.module)
            self.register.noted.sharded = True
            self._tracker.weights = found
        self._placement, self._placement_of = found, type(self)
        return found

    @property
    def graph(self) -> TracedNet:
        """The network as the graph that runs between the gates, and that the bounds are of; it is not to be changed."""
        return self._traced

    @property
    def vocabulary(self) -> int | None:
        """How many tokens all of the network's embeddings know; ``None`` where it reads numbers."""
        return self._traced.vocabulary

    @property
    def may_draw(self) -> bool:
        """Whether layers that are not known may draw random numbers by themselves in passes; dropout does not."""
        return self._may_draw

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample; fixed, as the bounds rest on it."""
        return self._input_shape

    @property
    def input_norm(self) -> float:
        """``X₀``, for T tokens that of T one-hot rows, ``√T``; fixed, as the bounds rest on it; infinite if none do."""
        if self._input_norm is not None:
            return self._input_norm
        return math.inf if self.vocabulary is None else math.sqrt(math.prod(self.input_shape))

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

    def _follow_changes(self) -> list[nn.Module]:
        """Traces anew when a layer's settings (a dropout rate, a gate's value) were changed; refuses other layers.

        Returns:
            The network's modules.
        """
        here = self.placement
        here.reshard_()
        self.register.aliases.mend()
        self.register.unhook()
        parts = modules_of(self.net)
        if any(caps.counts is None for caps in adapting_among(parts)):
            self._count_()
            self.register.follow(self.net)
        self._watch.refuse_interference(here.is_whole)
        held = parameters_in(parts)
        self._watch.refuse_moved(held)
        unknown = any(id(parameter) not in self._traced.names for parameter in held)
        if here.check(self.net, unknown):
            self._traced.rename(self.net)
            self.register.follow(self.net)
            # The processes may have started from different weights.
            self.settle_()
        elif unknown:
            raise PrivacyError(
                "a parameter of model.net was added or replaced after wrapping: wrap the network in a new DPLipModel"
            )
        if here.is_whole:
            self._watch.refuse_overlaps(held)
        if not self._watch.settings_hold():
            if not here.is_whole:
                raise ConfigurationError(
                    "change the settings of layers before fully_shard, which no rank traces behind"
                )
            self._trace()
            self.settle_()
            self.changes += 1
        return parts

    def check_inputs(self, inputs: Tensor) -> None:
        """Raises :class:`InputError` where a batch does not fit the model, :class:`PrivacyError` under autocast."""
        device, dtype = self.device_and_dtype()
        checks.check_inputs(inputs, self.input_shape, self._traced.reads.is_floating_point, device, dtype)

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the parameters are, and their dtype: what inputs must have."""
        for parameter in self.net.parameters():
            return parameter.device, parameter.dtype
        return self.nonfinite_samples.device, torch.float32

    def _apply(self, fn: Any, recurse: bool = True) -> DPLipModel:
        if not self.placement.is_whole:
            raise ConfigurationError("move or cast the model before fully_shard(model), which places its parts")
        if torch.__future__.get_swap_module_params_on_conversion():
            # A step on what is in the gradients now is refused then.
            self.register.noted.clear()
        with lineage.kept(self.net):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._count_()
        self.register.follow(self.net)
        self._trace()
        self.settle_()
        return self

    @in_turn
    def __deepcopy__(self, memo: dict[int, Any]) -> DPLipModel:
        known, made = {*memo}, type(self).__new__(type(self))
        memo[id(self)] = made
        try:
            made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        except BaseException:
            # What fails half-way, by a pass of another wrapper, leaves no halves behind.
            for key in memo.keys() - known:
                del memo[key]
            raise
        return made

    def __getstate__(self) -> dict[str, Any]:
        derived = {"register", "_traced", "_tracker", "_network", "_weights", "_watch", "_placement", "_placement_of"}
        # Who gets a copy or a file is not the data's owner, whom alone the count is for.
        left = {*derived, "_dropped_samples"}
        state = {name: value for name, value in self.__dict__.items() if name not in left}
        return {**state, "lineage": lineage.of(self).record()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        past = state.pop("lineage", None)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Files of former versions hold the count as a buffer, which would go on into new ones.
        self._buffers.pop("nonfinite_samples", None)
        self.__dict__.setdefault("_factors", Factors())
        self.__dict__.setdefault("_between", Between())
        self.__dict__.setdefault("_packing", None)
        self.__dict__.setdefault("_beside", {})
        self._dropped_samples = torch.zeros((), dtype=torch.int64)
        self._count_()
        self.register = Register(self, self.net)
        self._trace()
        description.forget(self)
        self.settle_()
        if past is not None:
            lineage.of(self).restore(past)


def require_wrapped(model: Any) -> DPLipModel:
    """The model, once it is known to be a wrapped one, compiled or not.

    Raises:
        ConfigurationError: it is none.
    """
    if not isinstance(getattr(model, "_orig_mod", model), DPLipModel):
        if isinstance(model, nn.Module):
            placement.refuse_averages(model)
        raise ConfigurationError(
            "model must be a network in its wrapper, DPLipModel(net, input_shape=..., loss=...), got a "
            f"{type(model).__name__}"
        )
    return cast("DPLipModel", model)
