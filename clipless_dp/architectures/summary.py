"""A wrapped network in one line."""

from __future__ import annotations

from clipless_dp.model import DPLipModel


def summary(model: DPLipModel) -> str:
    """Trainable parameters, Δ in all and of each layer, and the certified Lipschitz constant, at the current weights.

    Args:
        model: any wrapped network.

    Returns:
        One line.

    Raises:
        PrivacyError: a bound is not finite.
    """
    sensitivity = model.sensitivity()
    count = sum(parameter.numel() for parameter in model.net.parameters() if parameter.requires_grad)
    layers = ", ".join(f"{layer.path} {layer.sensitivity:.4g}" for layer in sensitivity.layers)
    constant = model.lipschitz_constant()
    return f"{count:,} parameters, Δ = {sensitivity.total:.4g} ({layers}), Lipschitz constant {constant:.4g}"
