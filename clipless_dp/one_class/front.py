"""Fixed features before a one-class network, through which its certificates hold for rows as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features import FrozenFeatures, Scattering2d
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.one_class.box import BoxProjection

_SLACK = 1.0 + 1e-5


class FixedFeatures(nn.Module):
    """``Π(F(x) - μ)``: features of a row, from a public middle, and projected on the ball that the network is made for.

    A projection onto a ball moves no two points apart, so that the whole is as steep as ``F`` is at most: what is
    certified behind it holds for rows, divided by ``L_F``.

    Args:
        features: ``F``, which takes each sample by itself: copied, frozen, in evaluation mode.
        centre: of the box: forward takes rows as they are seen from it.
        middle: ``μ``, public: of the features of one sample.
        radius: of the ball, public.

    Attributes:
        lipschitz: ``L_F``, that of the features.
        feature_shape: of one sample's features.
    """

    centre: Tensor
    middle: Tensor

    def __init__(self, features: nn.Module, centre: Tensor, middle: Tensor, radius: float) -> None:
        super().__init__()
        self.features, self.radius = features, radius
        self.lipschitz = constant_of(features)
        self.register_buffer("centre", centre.clone(), persistent=False)
        self.register_buffer("middle", middle.clone())
        self.feature_shape = tuple(middle.shape)

    def forward(self, points: Tensor) -> Tensor:
        """What the network sees of points of the box, from its centre."""
        return self.seen(self.features(points + self.centre))

    def seen(self, features: Tensor) -> Tensor:
        """The same of features that were computed before."""
        found = features - self.middle
        norms = found.flatten(1).norm(dim=1).clamp(min=self.radius)
        return found * per_sample(self.radius / norms, found)

    def extra_repr(self) -> str:
        """The radius."""
        return f"radius={self.radius:.6g}"


def fixed(features: object) -> tuple[nn.Module, FrozenFeatures]:
    """A frozen copy of a module, and what computes its features of a data set, once it is known to be fit for that.

    Raises:
        ConfigurationError: it is no module with a finite constant, or cannot be copied.
    """
    module = features.module if isinstance(features, FrozenFeatures) else features
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"features must be a module that takes rows (N, ...), such as features.Scattering2d, got {shown(features)}"
        )
    constant_of(module)
    if isinstance(features, FrozenFeatures):
        return copy.deepcopy(module), features
    computed = FrozenFeatures(copy.deepcopy(module))
    return computed.module, computed


def constant_of(features: nn.Module) -> float:
    """The attribute ``lipschitz``.

    Raises:
        ConfigurationError: there is none, or it is not a positive finite number.
    """
    found = getattr(features, "lipschitz", None)
    number = math.nan if isinstance(found, bool) or not isinstance(found, (int, float)) else float(found)
    if not (math.isfinite(number) and number > 0.0):
        raise ConfigurationError(
            f"{type(features).__name__} has lipschitz={shown(found)}: features need an attribute lipschitz, a finite "
            "number c with ‖F(x) - F(y)‖ ≤ c·‖x - y‖, as features.Scattering2d has: it goes into all certificates"
        )
    return number


def computed(frozen: FrozenFeatures, box: BoxProjection, points: Tensor) -> Tensor:
    """Features of points of the box, seen from its centre, each by itself.

    Raises:
        InputError: they are not finite, or no float32.
        PrivacyError: a sample's features depend on others.
    """
    found = frozen.compute(points + box.centre)
    if found.dtype != torch.float32 or found.dim() < 2 or not bool(found.isfinite().all()):
        raise InputError(
            f"features must be finite and float32, (N, ...), got {found.dtype} {tuple(found.shape)}, or numbers that "
            "are not finite. Nothing was charged for this call"
        )
    return found


def around(module: nn.Module, box: BoxProjection, negatives: Tensor | None, frozen: FrozenFeatures) -> FixedFeatures:
    """The front whose middle and radius tell of no row: of public negatives' features, or of the box alone.

    Args:
        module: ``F``.
        box: that rows lie in.
        negatives: features of public rows, ``(M, ...)``: their mean is the middle, their largest distance from it the
            radius. ``None``: the features of the box's centre, and as far as those of the box can be from them.
        frozen: computes features.
    """
    if negatives is None:
        middle = computed(frozen, box, torch.zeros(1, *box.input_shape))[0]
        return FixedFeatures(module, box.centre, middle, constant_of(module) * box.radius)
    middle = negatives.double().mean(0).float()
    radius = float((negatives - middle).flatten(1).norm(dim=1).max()) * _SLACK
    if not radius > 0.0:
        raise InputError("the features of all public negatives are the same: there is nothing to tell apart")
    return FixedFeatures(module, box.centre, middle, radius)


def settings_of(front: FixedFeatures | None) -> dict[str, Any] | None:
    """What a file holds of the front: the arguments of a scattering transform; of other modules, the radius alone."""
    if front is None:
        return None
    found: dict[str, Any] = {"radius": front.radius, "shape": list(front.feature_shape), "scattering": None}
    if type(front.features) is Scattering2d:
        one = front.features
        found["scattering"] = [list(one.image_size), one.scales, one.angles, one.padding]
    return found


def rebuilt_front(settings: Mapping[str, Any], box: BoxProjection, module: nn.Module | None) -> FixedFeatures:
    """The front of a file, before it is given its middle; the module of features that are not known by their name."""
    if module is None:
        size, scales, angles, padding = settings["scattering"]
        module = Scattering2d((int(size[0]), int(size[1])), int(scales), int(angles), padding)
    middle = torch.zeros(*(int(side) for side in settings["shape"]))
    return FixedFeatures(module.requires_grad_(False).eval(), box.centre, middle, float(settings["radius"]))
