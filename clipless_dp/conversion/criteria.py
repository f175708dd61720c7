"""Losses of torch as losses that state the bound of their gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError, LossBoundError
from clipless_dp.losses import BinaryCrossEntropy, Huber, Loss, MeanAbsoluteError, TauCrossEntropy

_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.l1_loss: nn.L1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.mse_loss: nn.MSELoss,
    functional.nll_loss: nn.NLLLoss,
    functional.binary_cross_entropy: nn.BCELoss,
}
"""What a function of torch's computes where it is called with outputs and targets only."""

_REMEDIES: dict[type[nn.Module], str] = {
    nn.MSELoss: "its gradient has no bound: losses.Huber() is a square up to a residual of 1, and a line beyond",
    nn.NLLLoss: "it takes logarithms of probabilities: leave the log-softmax out of the network, and take "
    "nn.CrossEntropyLoss",
    nn.BCELoss: "its gradient has no bound: leave the sigmoid out of the network, and take nn.BCEWithLogitsLoss",
}


def loss_of(given: object) -> tuple[Loss, str | None]:
    """The loss of this package that a loss of torch's is, and what became of it in words.

    Each is a sum over samples; the optimizer divides by the *expected* batch size, in place of the drawn one.

    Args:
        given: a :class:`clipless_dp.losses.Loss`, or a module or function of torch's that averages over the batch.

    Raises:
        LossBoundError: nothing bounds its gradient, or nothing is known of it.
        ConfigurationError: it has an option that no loss here has.
    """
    if isinstance(given, Loss):
        return given, None
    module = _module_of(given)
    made = _made(module)
    if made is None:
        why = _REMEDIES.get(type(module), "nothing states the bound of its gradient")  # type: ignore[arg-type]
        raise LossBoundError(
            f"loss={shown(given)}: {why}; or give losses.BoundedLoss(function, bound), with a function of outputs and "
            "targets that returns one number a sample: gradients above the bound are clipped"
        )
    if getattr(module, "reduction", "mean") != "mean":
        raise ConfigurationError(
            f"loss={shown(given)} has reduction={module.reduction!r}, and a private step is by a mean: "  # type: ignore[attr-defined]
            "give it with reduction='mean', and a learning rate that is made for means"
        )
    name = getattr(getattr(given, "func", given), "__name__", type(module).__name__)
    told = f"loss: {name} became model.loss, {made!r}, summed over samples; the optimizer makes it a mean"
    if isinstance(module, nn.CrossEntropyLoss) and module.weight is not None:
        told += ": over samples, where torch's divides by the sum of their weights, which would join them"
    return made, told


def _module_of(given: object) -> object:
    """The module that a function of torch's, with options of its own or without, is; or what was given."""
    function, options = given, {}
    if isinstance(given, partial) and not given.args:
        function, options = given.func, given.keywords
    try:
        return _FUNCTIONS[function](**options)
    except (KeyError, TypeError):
        # Nothing of torch's, or no options of it.
        return given


def _made(module: object) -> Loss | None:
    """The loss, or ``None`` where there is none; subclasses compute what they like."""
    kind = type(module)
    if kind is nn.CrossEntropyLoss:
        assert isinstance(module, nn.CrossEntropyLoss)
        if module.ignore_index >= 0:
            raise ConfigurationError(
                f"ignore_index={module.ignore_index} is a class that no sample may have: mark what is to be ignored by "
                "-100, which no loss counts"
            )
        weights = None if module.weight is None else tuple(_numbers(module.weight))
        return TauCrossEntropy(1.0, label_smoothing=module.label_smoothing, class_weights=weights)
    if kind is nn.BCEWithLogitsLoss:
        assert isinstance(module, nn.BCEWithLogitsLoss)
        if module.weight is not None or (module.pos_weight is not None and module.pos_weight.numel() != 1):
            raise ConfigurationError(
                "BCEWithLogitsLoss with weight, or a pos_weight for each of several outputs, has no loss here: give "
                "losses.BinaryCrossEntropy(class_weights=(1.0, w)), or losses.BoundedLoss"
            )
        positive = module.pos_weight
        return BinaryCrossEntropy(class_weights=None if positive is None else (1.0, _numbers(positive)[0]))
    if kind is nn.L1Loss:
        return MeanAbsoluteError()
    if kind is nn.HuberLoss:
        assert isinstance(module, nn.HuberLoss)
        return Huber(module.delta)
    if kind is nn.SmoothL1Loss:
        assert isinstance(module, nn.SmoothL1Loss)
        if module.beta != 1.0:
            raise ConfigurationError(
                f"SmoothL1Loss(beta={module.beta:g}) is 1/beta times losses.Huber(beta): give that"
            )
        return Huber(1.0)
    return None


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.detach().flatten().tolist()]
