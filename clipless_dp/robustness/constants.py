"""Lipschitz constants of the differences of scores, for wrapped models and for what is stated of any module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipless_dp.arguments import not_negative, shown
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import DPLipModel
from clipless_dp.norms.rounding import above_zero, exact_float64, row_distances

Lipschitz = float | Sequence[float] | Tensor | None
"""What is stated of a module: ``L`` of all scores together, one constant for each, or a matrix for each pair."""

ROUNDING = 1.0 + 1e-10
"""Covers the few float64 roundings of what is multiplied here."""


class Constants(NamedTuple):
    """What is known of how fast scores move apart.

    Attributes:
        pairs: ``K``, ``(C, C)`` in float64: ``f_i - f_j`` is ``K_ij``-Lipschitz; infinite where nothing is known.
        joint: ``L`` of the scores together; NaN where constants of scores or pairs were stated.
        method: in words.
        reason: why nothing is certified; ``None`` where something is.
    """

    pairs: Tensor
    joint: float
    method: str
    reason: str | None = None


def margin_constants(model: nn.Module, *, lipschitz: Lipschitz = None, classes: int | None = None) -> Tensor:
    """Constants ``K_ij`` with which ``f_i - f_j`` is Lipschitz, for all pairs of classes.

    Args:
        model: a wrapped model, whose own certificate it is (:meth:`clipless_dp.DPLipModel.margin_constants`); or any
            module, with
        lipschitz: ``L`` with ``‖f(x) - f(y)‖ ≤ L·‖x - y‖``: then ``√2·L``; one constant ``L_i`` for each score: then
            ``L_i + L_j``; or the matrix itself (:func:`last_layer_constants`).
        classes: number of scores of such a module, needed for a single ``L``; a single output counts as two, ``(-f,
            f)``, and its constant as ``2L``.

    Returns:
        ``(C, C)`` in float64, with zeros on the diagonal; infinite where nothing is known.

    Raises:
        ConfigurationError: constants are stated of a wrapped model, are no numbers of at least 0, or not as many as
            there are scores.
    """
    if not isinstance(getattr(model, "_orig_mod", model), DPLipModel) and classes is None:
        raise ConfigurationError("say how many classes the module has scores of: classes=...")
    return constants_of(model, lipschitz, classes or 0).pairs


def constants_of(model: nn.Module, lipschitz: Lipschitz, classes: int, *, norm: Literal[2, "inf"] = 2) -> Constants:
    """What is known of a model's scores, or stated; arguments as :func:`margin_constants`, ``classes`` at least 2.

    In the maximum norm each of two scores that are together L-Lipschitz moves by ``L`` of its own: ``2L``.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DPLipModel):
        if lipschitz is not None:
            raise ConfigurationError("a wrapped model certifies its own constant: leave lipschitz out")
        if norm == "inf":
            joint = model.lipschitz_constant(norm="inf")
            pairs = _off_diagonal(2.0 * joint * ROUNDING, max(2, math.prod(model.output_shape)))
            return Constants(pairs, joint, "constants of the layers in the maximum norm, composed over the network")
        pairs = model.margin_constants()
        joint = model.lipschitz_constant()
        reason = None
        if not math.isfinite(joint):
            reason = "no finite Lipschitz constant is known of the network: isolated parts, or caps on cotangents alone"
        return Constants(pairs, joint, "certified operator norms of the layers, composed over the network", reason)
    classes = max(classes, 2)
    if lipschitz is None:
        reason = "no Lipschitz constant was stated (lipschitz=...): wrap the network in DPLipModel to have it certified"
        return Constants(_off_diagonal(math.inf, classes), math.inf, "none", reason)
    if isinstance(lipschitz, Tensor) and lipschitz.dim() == 0:
        lipschitz = float(lipschitz)
    if isinstance(lipschitz, (Tensor, list, tuple)):
        try:
            stated = torch.as_tensor(lipschitz, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"lipschitz must hold numbers, got {shown(lipschitz)}: {error}") from error
        if not bool((stated >= 0).all()):
            raise ConfigurationError("lipschitz must hold numbers of at least 0")
        if stated.shape == (classes,):
            pairs = (stated + stated[:, None]) * ROUNDING
        elif stated.shape == (classes, classes):
            pairs = torch.maximum(stated, stated.T)
        else:
            raise ConfigurationError(
                f"lipschitz must be one number, or of shape ({classes},) or ({classes}, {classes}) for {classes} "
                f"scores, got {tuple(stated.shape)}"
            )
        pairs = pairs.clone().fill_diagonal_(0.0)
        return Constants(pairs, math.nan, "constants that were stated of each score or pair, not checked")
    if lipschitz == math.inf:
        return Constants(_off_diagonal(math.inf, classes), math.inf, "none", "the constant that was stated is infinite")
    joint = not_negative("lipschitz", lipschitz)
    pairs = _off_diagonal((math.sqrt(2.0) * joint if norm == 2 else 2.0 * joint) * ROUNDING, classes)
    return Constants(pairs, joint, "a constant that was stated of the scores together, not checked")


def of_single_output(constants: Constants) -> Constants:
    """The same where the module has one output: a constant that was stated of ``f`` is ``2L`` of ``(-f, f)``."""
    if math.isnan(constants.joint) or not math.isfinite(constants.joint):
        return constants
    return constants._replace(pairs=_off_diagonal(2.0 * constants.joint, 2))


def last_layer_constants(weight: Tensor, lipschitz: float) -> Tensor:
    """``K_ij = ‖w_i - w_j‖·L_b`` for scores ``W·h(x) + b`` behind a body ``h`` that is ``L_b``-Lipschitz.

    Args:
        weight: ``W``, ``(C, n)``.
        lipschitz: ``L_b``.

    Returns:
        ``(C, C)`` in float64, rounded up: above 0 wherever rows differ.

    Raises:
        ConfigurationError: the weight is no matrix, or the constant no number of at least 0.
        NormError: the weight is not finite.
    """
    body = not_negative("lipschitz", lipschitz)
    if weight.dim() != 2:
        raise ConfigurationError(f"weight must be a matrix (classes, features), got {tuple(weight.shape)}")
    rows = exact_float64(weight).cpu()
    apart = row_distances(rows)
    return above_zero(apart * body * ROUNDING, (apart > 0.0) & (body > 0.0)).fill_diagonal_(0.0)


def _off_diagonal(value: float, classes: int) -> Tensor:
    return torch.full((classes, classes), value, dtype=torch.float64).fill_diagonal_(0.0)
