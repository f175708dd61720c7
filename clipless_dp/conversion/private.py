"""``make_private``: an ordinary network, optimizer and ``DataLoader``, as private ones for the same loop."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accounting import Accountant
from accounting.errors import warn_caller
from clipless_dp.arguments import cap, choice, multiplier, positive, share, shown, whole
from clipless_dp.conversion.criteria import loss_of
from clipless_dp.conversion.loaders import poisson_loader, refuse_loaders
from clipless_dp.errors import ConfigurationError, PrivacyWarning
from clipless_dp.gates import GradientGated
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.isolation import Isolated
from clipless_dp.model import DPLipModel
from clipless_dp.modules import kept_modes
from clipless_dp.noise import Allocation, NoiseSource
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.optim.base_state import has_stepped
from clipless_dp.optim.checks import refuse_closures
from clipless_dp.packing import LABELS
from clipless_dp.training import Plan

Route = Literal["gradient gates", "signal gates"]


@dataclass(frozen=True)
class PrivateTraining:
    """What :func:`make_private` returns: unpacks into model, optimizer and loader; prints what was changed.

    Attributes:
        model: the wrapped network; ``model.net`` holds the parameters of the one that was given.
        optimizer: around the one that was given, whose parameter groups and schedules it shares; it holds the ledger.
        data_loader: Poisson draws; one iteration is an epoch in expectation.
        noise_multiplier: ``σ``.
        sample_rate: ``q``.
        steps: what the target pays for; ``None`` where ``σ`` was given without a target.
        delta: the δ that the target is at, or ``None``.
        changes: what was changed, a sentence each.
    """

    model: DPLipModel
    optimizer: CliplessDPOptimizer
    data_loader: DataLoader[Any]
    noise_multiplier: float
    sample_rate: float
    steps: int | None
    delta: float | None
    changes: tuple[str, ...] = field(repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.optimizer, self.data_loader))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """:meth:`clipless_dp.DPLipModel.loss`: a sum over samples, to be called ``backward()`` on as it is."""
        return self.model.loss(output, target)

    def get_epsilon(self, delta: float | None = None) -> float:
        """ε spent so far, an upper bound, under add-or-remove-one adjacency.

        Warns with :class:`clipless_dp.PrivacyWarning` where the weights are not those that the last private step left:
        ε says nothing of what else has changed them.

        Args:
            delta: by default that of the target.

        Raises:
            ConfigurationError: there is no δ.
        """
        delta = self.delta if delta is None else delta
        if delta is None:
            raise ConfigurationError("make_private was given no target_delta: say which δ, get_epsilon(delta=1e-5)")
        if not self.optimizer.weights_are_counted():
            warn_caller(
                "the weights are not those that the last private step left, and ε does not include what changed them: "
                "an optimizer that is not private, or weights that were loaded. Take steps by the optimizer that "
                "make_private returned",
                PrivacyWarning,
            )
        return self.optimizer.get_epsilon(delta)

    def summary(self) -> str:
        """What was changed, a line each, and what was kept; the same as ``print`` shows."""
        return "\n".join(["make_private:", *(f"  {line}" for line in self.changes)])

    def __str__(self) -> str:
        return self.summary()


def make_private(
    net: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    *,
    loss: Any = None,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    epochs: float | None = None,
    noise_multiplier: float | None = None,
    route: Route = "gradient gates",
    max_grad_norm: float | None = None,
    gates: Mapping[str, Any] | None = None,
    input_norm: float | None = None,
    dataset_size: int | None = None,
    accountant: str | Accountant = "prv",
    allocation: Allocation = "min-variance",
    noise: NoiseSource | str | None = None,
) -> PrivateTraining:
    """Makes network, optimizer and loader of an existing loop private.

    Three lines of a loop change: this call, the loss, which becomes ``model.loss``, and where ε is read::

        model, optimizer, loader = make_private(net, optimizer, loader, loss=nn.CrossEntropyLoss(),
                                                target_epsilon=3.0, target_delta=1e-5, epochs=10)
        for epoch in range(10):
            for inputs, targets in loader:
                model.loss(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()

    Kept are the optimizer, with its groups, learning rates and schedules, and of the loader data set, expected batch
    size, ``collate_fn``, workers and how they read. What is changed, ``print`` of the result says.

    Args:
        net: any network, in training mode as it is to be trained. Its parameters are shared, and trained in place. Or a
            :class:`clipless_dp.DPLipModel`, bounded as you like: then neither loss nor gates are given.
        optimizer: any first-order ``torch.optim.Optimizer`` over its parameters that has not stepped yet: its state
            tells, or a schedule of it (of plain SGD without either nothing does).
        data_loader: with a ``batch_size``; ``shuffle`` or not. Of several processes the same in each, and its
            ``batch_size`` that of all together.
        loss: one of :mod:`clipless_dp.losses`, or of torch's ``CrossEntropyLoss``, ``BCEWithLogitsLoss``, ``L1Loss``,
            ``HuberLoss``, ``SmoothL1Loss``, as a module or a function, with means over the batch.
        target_epsilon: ε that ``epochs`` together may spend, at ``target_delta``; the step beyond is refused with
            :class:`clipless_dp.BudgetExhaustedError`.
        target_delta: δ in (0, 1).
        epochs: passes over the loader that the target is to pay for.
        noise_multiplier: ``σ``, in place of a target; with ``target_epsilon`` and ``target_delta`` beside it, these
            limit the number of steps.
        route: ``"gradient gates"``: each sample's gradient of a parameter is scaled to a norm of 1 as it is computed,
            for any network. ``"signal gates"``: activations and cotangents of each sample are scaled around each layer,
            the fastest with convolutions; it needs ``input_norm`` and layers with rules (docs/routes.md).
        max_grad_norm: flat clipping as Opacus does it: a sample's whole gradient is cut to this norm. Short for
            ``gates={"joint": "network", "mode": "clip", "limit": max_grad_norm}``.
        gates: arguments of :func:`clipless_dp.gradient_gated`, or of :func:`clipless_dp.gated`.
        input_norm: samples of larger norm are projected onto this ball. ``None``, with gradient gates: they stay as
            they are, and the network runs sample by sample, which takes a little longer.
        dataset_size: public number of samples; by default the length of the data set, which is then taken to be public.
        accountant, allocation, noise: as of :class:`clipless_dp.CliplessDPOptimizer`.

    Raises:
        ConfigurationError: a loader or an optimizer whose meaning cannot be kept (a batch sampler, samples that are
            weighted or drawn with replacement, an ``IterableDataset``, steps that were taken already, parameters of
            another network), or an argument out of range.
        UnsupportedModuleError: a part of the network lets samples meet, such as a batch norm; with its replacement.
        LossBoundError: nothing bounds the gradient of the loss.
        PrivacyError: a sample is in the data more than once. In the loop: a loss computed other than by ``model.loss``.
        UnreachableTargetError: no noise meets the target.

    Guarantee:
        That of :class:`clipless_dp.CliplessDPOptimizer`, for weights of ``net`` that no private data entered before.
    """
    epsilon, delta, planned = _targets(target_epsilon, target_delta, epochs, noise_multiplier)
    refuse_loaders(data_loader)
    _refuse_optimizers(optimizer, net)
    size = whole("dataset_size", len(data_loader.dataset) if dataset_size is None else dataset_size)  # type: ignore[arg-type]
    assert data_loader.batch_size is not None
    batch = min(data_loader.batch_size, size)
    per_epoch = math.ceil(size / batch)
    steps = None if planned is None else max(1, math.ceil(planned * per_epoch - 1e-9))
    rate = batch / size
    loader, changes = poisson_loader(data_loader, rate, per_epoch)
    with kept_modes(net):
        model, told = _model(net, data_loader, loss, route, _gates(route, gates, max_grad_norm), input_norm)
    if noise_multiplier is None:
        assert epsilon is not None
        assert delta is not None
        assert steps is not None
        plan = Plan(steps * rate, batch, size, steps, None)
        sigma = plan.noise_multiplier(epsilon, delta, accountant)
    else:
        sigma = multiplier("noise_multiplier", noise_multiplier)
    private = CliplessDPOptimizer(
        model,
        optimizer,
        noise_multiplier=sigma,
        sample_rate=rate,
        dataset_size=size,
        accountant=accountant,
        allocation=allocation,
        noise=noise,
        budget=None if epsilon is None or delta is None else (epsilon, delta),
    )
    model.require_own_loss()
    changes = [
        *told,
        f"optimizer: {_shown(optimizer)}, behind noise of σ = {sigma:.4g} on each sum of gradients",
        *changes,
    ]
    if epsilon is not None and delta is not None:
        paid = "" if steps is None else f", which {steps} steps spend"
        changes.append(f"target: ε = {epsilon:g} at δ = {delta:g}{paid}; a step beyond is refused")
    return PrivateTraining(model, private, loader, sigma, rate, steps, delta, tuple(changes))


def _targets(
    epsilon: float | None, delta: float | None, epochs: float | None, sigma: float | None
) -> tuple[float | None, float | None, float | None]:
    """The arguments of what is promised, once they say one thing."""
    if sigma is None and (epsilon is None or delta is None or epochs is None):
        raise ConfigurationError(
            "give target_epsilon, target_delta and epochs, from which the noise follows; or noise_multiplier"
        )
    if sigma is not None and epochs is not None:
        raise ConfigurationError("epochs and noise_multiplier say twice how much noise there is: leave one out")
    if (epsilon is None) != (delta is None) and not (sigma is not None and epsilon is None):
        raise ConfigurationError("target_epsilon holds at a δ: give target_delta")
    return (
        None if epsilon is None else positive("target_epsilon", epsilon),
        None if delta is None else share("target_delta", delta, "(0, 1)"),
        None if epochs is None else positive("epochs", epochs),
    )


def _refuse_optimizers(optimizer: object, net: object) -> None:
    if isinstance(optimizer, CliplessDPOptimizer):
        raise ConfigurationError("the optimizer is private already: give make_private the one that it is around")
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"optimizer must be a torch.optim.Optimizer, got {shown(optimizer)}")
    refuse_closures(optimizer)
    if has_stepped(optimizer):
        raise ConfigurationError(
            "the optimizer has taken steps: its momentum, and the weights, may hold what no noise protects. Make a "
            "new one, over weights that no private data entered; of an interrupted private run, load its state_dict() "
            "into the optimizer that make_private returns (docs/saving.md)"
        )
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"net must be a torch.nn.Module, got {shown(net)}")
    known = set(map(id, net.parameters()))
    if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigurationError(
            "the optimizer holds parameters that are not of net, whose gradients nothing would bound: make it over "
            "net.parameters(), after whatever replaces layers or moves them"
        )


def _gates(route: object, gates: Mapping[str, Any] | None, max_grad_norm: float | None) -> dict[str, Any]:
    choice("route", route, "gradient gates", "signal gates")
    if gates is not None:
        if not isinstance(gates, Mapping):
            raise ConfigurationError(f"gates must be a mapping of arguments, got {shown(gates)}")
        known = inspect.signature(gradient_gated if route == "gradient gates" else gated).parameters.keys() - {"net"}
        if unknown := sorted(str(name) for name in gates.keys() - known):
            raise ConfigurationError(f"gates hold {', '.join(unknown)}: arguments are {', '.join(sorted(known))}")
    if max_grad_norm is None:
        return dict(gates or {})
    if gates is not None or route != "gradient gates":
        raise ConfigurationError("max_grad_norm is of gradient gates, and says what gates= would: give one of the two")
    return {"joint": "network", "mode": "clip", "limit": cap("max_grad_norm", max_grad_norm)}


def _model(
    net: nn.Module, loader: DataLoader[Any], loss: Any, route: Route, gates: dict[str, Any], input_norm: float | None
) -> tuple[DPLipModel, list[str]]:
    """The wrapped network, left in training, and what became of it in words."""
    if isinstance(net, DPLipModel):
        if loss is not None or gates or input_norm is not None:
            raise ConfigurationError("the model is wrapped already, with a loss and bounds of its own: leave these out")
        return net, ["model: as it was wrapped"]
    if any(isinstance(part, (Isolated, GradientGated)) for part in net.modules()):
        raise ConfigurationError("the network is behind gradient gates already: give it as it was, and gates=")
    if loss is None:
        raise ConfigurationError("give loss=, such as nn.CrossEntropyLoss(), with the network")
    known, told = loss_of(loss)
    example = _example(loader)
    numbers = isinstance(example, Tensor) and example.is_floating_point()
    if not net.training:
        # Of a network in training, parts that are frozen in evaluation stay so.
        net.train()
    try:
        if route == "signal gates":
            if input_norm is None:
                raise ConfigurationError("route='signal gates' needs input_norm, the largest norm of a sample")
            inner: nn.Module = gated(net, **gates)
            how = "activations and cotangents of each sample are scaled around each layer: predict by model, not by net"
        else:
            if input_norm is None and (numbers or not isinstance(example, Tensor)):
                gates = {"isolation": "vmap", **gates}
            inner = gradient_gated(net, **gates)
            how = "each sample's gradient is bounded by gates as it is computed"
            how += ", sample by sample" if isinstance(inner, Isolated) else ""
        shape: Any = example
        if isinstance(example, Tensor):
            # Of tokens, an isolated network is told their type by an example.
            shape = (example,) if isinstance(inner, Isolated) and not numbers else tuple(example.shape[1:])
        model = DPLipModel(inner, input_shape=shape, input_norm=input_norm, loss=known)
    except ConfigurationError as error:
        said = str(error)
        fits = "where it was run on zeros" not in said and "input_shape does not fit" not in said
        if fits or not isinstance(example, Tensor):
            raise
        raise ConfigurationError(
            f"{said}. make_private ran it on samples of the loader, of shape {tuple(example.shape[1:])}: where "
            "the loop reshapes them ahead of the network (inputs.view(len(inputs), -1)), let the network do so, with "
            "nn.Flatten() in front"
        ) from error
    ball = "" if input_norm is None else f"; samples of a norm above {input_norm:g} are projected onto that"
    return model, [f"model: {type(net).__name__}, {how}{ball}", *filter(None, [told])]


def _example(loader: DataLoader[Any]) -> Any:
    """Inputs of the first sample, in a batch of one."""
    batch = loader.collate_fn([loader.dataset[0]])
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in LABELS}
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise ConfigurationError(
            f"a batch must be inputs and targets, or a mapping with targets in it as {' or '.join(LABELS)}: got "
            f"{type(batch).__name__}"
        )
    return batch[0]


def _shown(optimizer: Optimizer) -> str:
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups if "lr" in group})
    return f"your {type(optimizer).__name__} with lr = {', '.join(f'{rate:g}' for rate in rates)}"
