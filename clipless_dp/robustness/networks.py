"""What is certified and attacked: the deployed forward pass of a network, with the gradient that calculus gives it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clipless_dp.arguments import positive, shown, whole
from clipless_dp.errors import CliplessError, ConfigurationError, InputError
from clipless_dp.gates import CotangentGate, input_gate
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.losses import class_scores
from clipless_dp.model import DPLipModel
from clipless_dp.model.surroundings import refuse_interference
from clipless_dp.sampling import Samples
from clipless_dp.tensor_types import plain, refuse_coded
from clipless_dp.training import Data

Units = float | Sequence[float] | Tensor | None
"""By how many units of the raw input each channel moves when the model's input moves by one: standard deviations."""

UNCHECKED_ROUNDING = 2.0**-40
"""Of a module that is not wrapped: what a float64 forward pass is taken to err by, relative to ``‖z‖ + L·‖x‖``."""


def wrapped_model(model: nn.Module) -> DPLipModel | None:
    """The model, compiled or not, where it is a wrapped one."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, DPLipModel) else None


class PlainNetwork(nn.Module):
    """The forward pass that a model is deployed with, without what its training does to gradients.

    Of a wrapped model that is its graph, whose bounds its constants are: what ``model(inputs)`` runs. ``model.net``, a
    module of Python code, may compute something else where it was changed after wrapping, has hooks, or does in
    ``eval`` mode what it was not traced with. It is compared, in ``eval`` mode, on a few random inputs.

    Gates on cotangents and gradients change the way back and not the values. An attack, a saliency map or a sampler
    needs the slope of the values themselves: this is a copy of the network without such gates, in ``eval`` mode, whose
    parameters take no gradients. Nothing that is done with it reaches the model.

    Args:
        model: a wrapped model, whose input gate is part of its forward pass; or any module.
        dtype: of the copy; ``None``: as the network is.
        front: what runs before the network, copied likewise; or ``None``.

    Shape:
        ``(B, *input_shape)`` of any floating-point dtype to scores ``(B, C)``; of one output ``f`` to ``(-f, f)``. Rows
        that the input gate drops are NaN.

    Raises:
        ConfigurationError: the model reads tokens, between which there is no distance; or several inputs; or
            ``model.net`` returns other values than the graph; or it cannot be copied.
        PrivacyError: a layer of a wrapped model was replaced or hooked, or a global module hook is registered.

    Attributes:
        input_shape: of one sample behind the front, of a wrapped model; else ``None``.
        input_norm: of the input gate of a wrapped model; infinite without one.
        is_single: whether the network was seen to return one output.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype | None = torch.float64, front: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.input_norm = math.inf
        self.input_shape: tuple[int, ...] | None = None
        self.is_single = False
        refuse_interference()
        net, wrapped = getattr(model, "_orig_mod", model), wrapped_model(model)
        for part in (net, front):
            if isinstance(part, nn.Module):
                refuse_coded(part)
        if wrapped is not None:
            reads_numbers = wrapped.vocabulary is None and wrapped.packing is None
            if not (reads_numbers and wrapped.graph.reads.is_floating_point):
                raise ConfigurationError(
                    "the model reads tokens or several inputs, between which there is no Euclidean distance: neither "
                    "radii nor attacks are defined; certify the part of the network behind the embedding"
                )
            # Traces anew where settings were changed, and refuses what is not bounded.
            wrapped.lipschitz_constant()
            self.input_norm, self.input_shape = wrapped.input_norm, wrapped.input_shape
            net = wrapped.graph.copied()
        self.net = _without_gates(net)
        self.front = None if front is None else _without_gates(front)
        self.eval()
        self.requires_grad_(False)
        # What has no floating-point parameter is told by its buffers, and else runs as it is asked.
        held = next((one for one in (*self.parameters(), *self.buffers()) if one.is_floating_point()), torch.empty(0))
        self.device = torch.device("cpu") if held.device.type == "mps" and dtype == torch.float64 else held.device
        self.dtype = held.dtype if dtype is None else dtype
        self.to(self.device, self.dtype)
        if wrapped is not None:
            self._refuse_other_code(wrapped)

    @torch.no_grad()
    def _refuse_other_code(self, model: DPLipModel) -> None:
        """Refuses a model whose ``net``, in ``eval`` mode, does not return what its graph does."""
        if model._forward_hooks or model._forward_pre_hooks:
            raise ConfigurationError("a hook is registered on the model itself, which bounds do not follow: remove it")
        inputs = model.random_inputs(8, torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        inputs = inputs * per_sample(torch.logspace(-1.0, 1.0, 8).to(inputs), inputs)
        if math.isfinite(self.input_norm):
            inputs, _ = input_gate(inputs, self.input_norm)
        expected = self.net(inputs)
        reason = "it returns other values"
        try:
            found = copy.deepcopy(model.net).eval().to(self.device, self.dtype)(inputs)
        except Exception as error:
            found, reason = None, f"{type(error).__name__}: {error}"
        # Half of the digits: fused and other kernels may round otherwise, other code is not that close.
        share = math.sqrt(torch.finfo(self.dtype).eps)
        allowed = share * float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max())
        if (
            not isinstance(found, Tensor)
            or found.shape != expected.shape
            or not torch.allclose(found, expected, rtol=share, atol=allowed, equal_nan=True)
        ):
            raise ConfigurationError(
                f"model.net in eval mode is not the network whose bounds the model knows ({reason}): its forward "
                "depends on the mode, on an attribute that was changed after wrapping, on a hook or on chance, which "
                "the traced graph does not follow. Wrap the network as it is deployed in a new DPLipModel, its mode "
                "and attributes set before, and what depends on them in layers"
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of the classes.

        Raises:
            InputError: the network returns anything but ``(B, C)`` or ``(B,)`` of floating-point numbers.
            ConfigurationError: it casts them to a coarser type than it computes in.
        """
        scores = self.outputs(inputs)
        if not isinstance(scores, Tensor) or scores.dim() not in (1, 2) or len(scores) != len(inputs):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"expected scores (batch, classes) or (batch,), got {found}")
        if not scores.is_floating_point():
            raise InputError(f"scores must be floating-point numbers, got {scores.dtype}")
        if torch.finfo(scores.dtype).eps > torch.finfo(self.dtype).eps:
            raise ConfigurationError(
                f"the network computes in {self.dtype} and returns scores in {scores.dtype}, rounded further than any "
                "bound knows: leave out what casts them, as scores.float() does"
            )
        self.is_single = scores.numel() == len(scores)
        return class_scores(scores)

    def parts(self, inputs: Tensor, labels: Tensor | None, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """So many samples at a time: which these are, as the network takes them, and their classes.

        Args:
            inputs: ``(N, ...)``.
            labels: ``(N,)`` the classes; ``None``: those that are predicted.
            rows: samples at a time.
        """
        for start in range(0, len(inputs), rows):
            part = slice(start, start + rows)
            some = inputs[part].to(self.device, self.dtype)
            with torch.no_grad():
                scores = self(some).nan_to_num(0.0)
            yield part, some, scores.argmax(1) if labels is None else labels[part].to(self.device)

    def classes(self, inputs: Tensor) -> int:
        """How many scores there are of these inputs, by their first row, whose scores must not hang on its company.

        Raises:
            InputError: the network does not read inputs of this shape.
            ConfigurationError: scores of the first row are others among other rows than alone.
        """
        first = inputs[:1]
        try:
            with torch.no_grad():
                alone = self(first)
                others = inputs[1:3] if len(inputs) > 1 else 0.5 * first
                among = self(torch.cat((first, others, first)))[[0, -1]]
        except CliplessError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            raise InputError(f"the network does not read inputs {tuple(inputs.shape)}: {error}") from error
        # Half of the digits: sums of a larger batch may round otherwise.
        share = math.sqrt(torch.finfo(alone.dtype).eps)
        allowed = share * float(alone.abs().nan_to_num(0.0, 0.0, 0.0).max())
        if not torch.allclose(among, alone.expand_as(among), rtol=share, atol=allowed, equal_nan=True):
            raise ConfigurationError(
                "the scores of a sample are others among other samples than alone: the network mixes the rows of a "
                "batch (a batch norm without running statistics, say), or draws random numbers. Neither radii nor maps "
                "of one sample are defined: replace what does"
            )
        return int(alone.shape[1])

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the network itself returns, of any shape ``(B, ...)``; NaN in rows that the input gate drops."""
        return self.behind(self.before(inputs))

    def before(self, inputs: Tensor) -> Tensor:
        """What the front makes of inputs: in the network's dtype, and else as they are without one."""
        refuse_interference()
        # A copy, as code of a user's own may compute in place.
        values = plain(inputs, "the input").to(self.device, self.dtype, copy=True)
        return values if self.front is None else self.front(values)

    def behind(self, values: Tensor) -> Tensor:
        """The same as :meth:`outputs`, from what the front returned."""
        if self.input_shape is not None and tuple(values.shape[1:]) != self.input_shape:
            raise InputError(f"the model reads inputs (batch, *{self.input_shape}), got {tuple(values.shape)}")
        if math.isfinite(self.input_norm):
            values, known = input_gate(values, self.input_norm)
        else:
            known = values.flatten(1).isfinite().all(1)
        # The gate keeps what it returned for the way back, which a first layer may overwrite.
        outputs: Tensor = self.net(values.clone() if values.requires_grad else values)
        if not isinstance(outputs, Tensor) or bool(known.all()):
            return outputs
        return outputs.masked_fill(~per_sample(known, outputs), math.nan)


def plain_network(
    model: nn.Module, *, dtype: torch.dtype | None = torch.float64, front: nn.Module | None = None
) -> PlainNetwork:
    """A copy of a model's deployed forward pass that differentiates as what it computes (:class:`PlainNetwork`).

    Args:
        model: a wrapped model, or any module; or such a copy, which is returned as it is.
        dtype: of the copy; ``None``: as the model is.
        front: what runs before it.

    Raises:
        ConfigurationError: the model is no module, or such a copy already and a front is given.
    """
    if isinstance(model, PlainNetwork):
        if front is not None:
            raise ConfigurationError("the model is a plain network already: give its front where it is made")
        return model
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch module, got {shown(model)}")
    return PlainNetwork(model, dtype=dtype, front=front)


def _held(net: nn.Module) -> set[int]:
    """The modules, parameters and buffers of a network, by ``id``."""
    return {id(one) for one in (*net.modules(), *net.parameters(), *net.buffers())}


def _refuse_uncopied(net: object) -> None:
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"what runs before the network must be a torch module, got {shown(net)}")
    if any(isinstance(part, torch.jit.ScriptModule) for part in net.modules()):
        raise ConfigurationError("the network is scripted or traced (torch.jit): give the module that it was made of")
    values = [*net.parameters(), *net.buffers()]
    if any(is_lazy(one) or one.is_meta for one in values):
        raise ConfigurationError(
            "the network has weights without values, of a lazy layer that has seen no input or on the meta device: "
            "load them first"
        )


def _without_gates(net: nn.Module) -> nn.Module:
    _refuse_uncopied(net)
    # What a module keeps of its last pass, a weight that a hook computes say, hangs on a graph and cannot be copied.
    kept = [value for part in net.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if value.grad_fn is not None}
    try:
        copied = nn.Sequential(copy.deepcopy(net, memo))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"the network, or what runs before it, cannot be copied ({error}): let no module keep tensors of a pass, "
            "or what deepcopy refuses"
        ) from error
    if not _held(net).isdisjoint(_held(copied)):
        raise ConfigurationError(
            "copy.deepcopy returns the network, or what runs before it, or a part of it, itself: the certificate would "
            "be of weights that may change, and would cast them. Leave __deepcopy__ out of it"
        )
    for part in list(copied.modules()):
        for name, child in part.named_children():
            if isinstance(child, CotangentGate):
                setattr(part, name, nn.Identity())
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def value_and_gradient(function: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Values ``(B,)`` of a function of inputs, and the gradient of each with respect to its own sample.

    Zeros stand for what is not finite, and where no way leads from a value to the inputs.
    """
    inputs = inputs.detach().requires_grad_()
    with torch.enable_grad():
        values = function(inputs)
        (gradient,) = torch.autograd.grad(values.sum(), inputs, materialize_grads=True)
    return values.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)


def generator_of(rng_seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of a seed.

    Raises:
        ConfigurationError: it is no whole number in [0, 2³²), of which alone torch's generator on the CPU tells any two
            apart.
    """
    return torch.Generator(device).manual_seed(whole("rng_seed", rng_seed, 0, 2**32 - 1))


def read(data: Data | Tensor) -> tuple[Tensor, Tensor | None]:
    """Inputs ``(N, ...)`` and labels ``(N,)`` of some samples; no labels of inputs alone.

    Raises:
        ConfigurationError: it is no data set.
        InputError: labels are no integers, one for each sample.
    """
    if isinstance(data, Tensor):
        data = plain(data, "the input")
        if data.dim() < 2 or not data.is_floating_point():
            raise InputError(f"expected inputs (batch, ...) of floating-point numbers, got {data.dtype} {data.shape}")
        return data, None
    inputs, labels = Samples.of(data).all()
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise InputError(f"expected integer labels (batch,), got {labels.dtype} {tuple(labels.shape)}")
    return inputs, labels.long().cpu()


def refuse_other_labels(labels: Tensor, classes: int | None = None) -> None:
    """Refuses labels that are no class.

    Raises:
        InputError: one is below 0, or at least as large as the number of classes, where that is known.
    """
    if bool((labels < 0).any()) or (classes is not None and bool((labels >= classes).any())):
        limits = "" if classes is None else f", and below {classes}, of which there are scores"
        raise InputError(f"labels must be classes, 0 or above{limits}: leave out samples without a class")


def scale_of(units: Units, inputs: Tensor) -> Tensor:
    """Raw units of each channel, ``(C, 1, ...)`` in float64: what a step of the model's input is multiplied by.

    Raises:
        ConfigurationError: they are no positive numbers, one in all or one for each channel.
    """
    if units is None:
        return torch.ones((), dtype=torch.float64)
    values = units.tolist() if isinstance(units, Tensor) else units
    if not isinstance(values, (list, tuple)):
        return torch.tensor(positive("units", values), dtype=torch.float64)
    numbers = [positive("units", value) for value in values]
    if len(numbers) != inputs.shape[1]:
        raise ConfigurationError(
            f"units must be one number, or one for each of the {inputs.shape[1]} channels, got {len(numbers)}"
        )
    return torch.tensor(numbers, dtype=torch.float64).reshape(-1, *([1] * (inputs.dim() - 2)))
