"""What one certificate is of: a network and what runs before it, copied once, with all that is said of the copy."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipless_dp.arguments import not_negative
from clipless_dp.errors import ConfigurationError
from clipless_dp.model.functions import answers_of, function_of
from clipless_dp.modules import digest_of
from clipless_dp.robustness.constants import ROUNDING, Constants, Lipschitz, constants_of, of_single_output
from clipless_dp.robustness.networks import UNCHECKED_ROUNDING, PlainNetwork, wrapped_model


class Frozen:
    """A model and its front as they are when this is made: whatever happens to them later does not reach it.

    Scores, constants, rounding and hashes of one certificate all come from one of these, so that they are of the same
    weights, settings and front.

    Args:
        model: a wrapped model, or any module.
        front: what runs before it.
        deployed: whether the forward pass in the model's own dtype is wanted too.
        norm: in which constants and rounding are: 2, or ``"inf"``.

    Attributes:
        plain: the forward pass in float64.
        deployed: the same in the model's own dtype, if it was asked for.
        known_error: what a float64 pass errs by, of a wrapped model; else ``None``.

    Raises:
        ConfigurationError: see :class:`PlainNetwork`.
        PrivacyError: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        front: nn.Module | None,
        *,
        deployed: bool = False,
        norm: Literal[2, "inf"] = 2,
    ) -> None:
        own = wrapped_model(model)
        self.plain = PlainNetwork(model, front=front)
        self.deployed = PlainNetwork(model, dtype=None, front=front) if deployed else self.plain
        self._certified = None if own is None else constants_of(own, None, 0, norm=norm)
        self.known_error = None if own is None else own.forward_error(norm=norm)
        self._norm = norm
        self._has_front = front is not None
        self._of_front = getattr(front, "lipschitz", math.inf)
        self._identity: dict[str, Any] = {
            "weights": digest_of(model if own is None else own.net),
            "function": function_of(model if own is None else own.graph),
            # A copy that was made before holds its gate.
            "input_norm": model.input_norm if isinstance(model, PlainNetwork) else self.plain.input_norm,
        }
        self._front_hash = None if front is None else f"{function_of(front)} {digest_of(front)}"

    def identity(self, inputs: Tensor) -> dict[str, Any]:
        """What a certificate says of what it is of, by the names of its attributes.

        Args:
            inputs: ``(N, ...)``, of which the shape counts.
        """
        plain, front, shape = self.plain, None, inputs.shape[1:]
        if self._front_hash is not None:
            answers = answers_of(plain.before, shape, plain.device)
            front = hashlib.sha256(f"{self._front_hash} {answers}".encode()).hexdigest()
            with torch.no_grad():
                shape = plain.before(inputs[:1]).shape[1:]
        return {**self._identity, "front": front, "answers": answers_of(plain.behind, shape, plain.device)}

    def constants(
        self, lipschitz: Lipschitz, front_lipschitz: float | None, classes: int, *, used: bool = True
    ) -> Constants:
        """What is known of the scores, from the inputs in front of everything; nothing where it is not to be ``used``.

        Args:
            lipschitz: what is stated of a module that is not wrapped.
            front_lipschitz: what is stated of the front; ``None``: its attribute.
            classes: number of scores.
            used: see above.

        Raises:
            ConfigurationError: what is stated is no constant, or of what has its own, or of a front that is missing.
        """
        stretch = self._front_constant(front_lipschitz)
        if not used:
            nothing = torch.full((classes, classes), math.inf, dtype=torch.float64).fill_diagonal_(0.0)
            return Constants(nothing, math.inf, "none", "none is to be used (lipschitz=None)")
        found = self._of_model(lipschitz, classes)
        if not self._has_front or found.reason is not None:
            return found
        if math.isinf(stretch):
            return Constants(
                torch.full_like(found.pairs, math.inf),
                math.inf,
                "none",
                "no Lipschitz constant is known of what runs before the model: state it by front_lipschitz",
            )
        whose = "by its own attribute" if stretch == self._of_front else "which was stated, not checked"
        method = f"{found.method}, times {stretch:g} of what runs before it, {whose}"
        factor = 1.0 if stretch == 1.0 else stretch * ROUNDING
        return Constants(found.pairs * factor, found.joint * stretch, method)

    def _of_model(self, lipschitz: Lipschitz, classes: int) -> Constants:
        if self._certified is None:
            found = constants_of(nn.Identity(), lipschitz, classes, norm=self._norm)
            return of_single_output(found) if self.plain.is_single else found
        if lipschitz is not None:
            raise ConfigurationError("a wrapped model certifies its own constant: leave lipschitz out")
        return self._certified

    def _front_constant(self, stated: float | None) -> float:
        if not self._has_front:
            if stated is not None:
                raise ConfigurationError("front_lipschitz is the constant of a front: give front too")
            return 1.0
        known = self._of_front if stated is None else stated
        return math.inf if known == math.inf else not_negative("front_lipschitz", known)


def unchecked_rounding(inputs: Tensor, scores: Tensor, pairs: Tensor) -> Tensor:
    """What each score of a float64 pass is taken to be off by where nothing is known of the layers, ``(B,)``."""
    lengths = inputs.double().flatten(1).norm(dim=1).cpu()
    finite = pairs[pairs.isfinite()]
    slope = float(finite.max()) if len(finite) else 0.0
    error: Tensor = UNCHECKED_ROUNDING * (scores.norm(dim=1).nan_to_num(0.0) + slope * lengths)
    return error
