"""Fixed features before a one-class network, through which its certificates hold for rows as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.features import FrozenFeatures, Scattering2d
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.model.settings import settings_of as settings_of_module
from clipless_dp.modules import is_hooked
from clipless_dp.one_class.box import BoxProjection

_Arguments = tuple[tuple[int, int], int, int, Any]
_SLACK = 1.0 + 1e-5


class FixedFeatures(nn.Module):
    """``Π(F(x) - μ)``: features of a row, from a public middle, and projected on the ball that the network is made for.

    A projection onto a ball moves no two points apart, so that the whole is as steep as ``F`` is at most: what is
    certified behind it holds for rows, divided by ``L_F``.

    Args:
        features: ``F``, which takes each sample by itself: frozen, in evaluation mode.
        centre: of the box: forward takes rows as they are seen from it.
        middle: ``μ``, public: of the features of one sample.
        radius: of the ball, public.

    Attributes:
        feature_shape: of one sample's features.
    """

    centre: Tensor
    middle: Tensor

    def __init__(self, features: Scattering2d, centre: Tensor, middle: Tensor, radius: float) -> None:
        super().__init__()
        self.features, self.radius = features, radius
        self._arguments = arguments_of(features)
        self.register_buffer("centre", centre.clone(), persistent=False)
        self.register_buffer("middle", middle.clone())
        self.feature_shape = tuple(middle.shape)

    def forward(self, points: Tensor) -> Tensor:
        """What the network sees of points of the box, from its centre."""
        return self.seen(self.features(points + self.centre))

    @property
    def lipschitz(self) -> float:
        """``L_F``, of features, and what is around them, that are as they were made.

        Raises:
            PrivacyError: they were changed since, or hooked: no constant is known of them.
        """
        plain = type(self) is FixedFeatures and settings_of_module(self).keys() == _OWN and not is_hooked(self)
        # Another ball, or middle, moves no two points apart either.
        plain = plain and isinstance(self.radius, float) and 0.0 < self.radius < math.inf
        made = _made(self._arguments)
        if not plain or not _are_same(self.features, made):
            raise PrivacyError(
                "the features before the network are not as they were made, so that no certificate speaks for them: "
                "load the file of the model, or train with other features"
            )
        return made.lipschitz

    def seen(self, features: Tensor) -> Tensor:
        """The same of features that were computed before."""
        found = features - self.middle
        norms = found.flatten(1).norm(dim=1).clamp(min=self.radius)
        return found * per_sample(self.radius / norms, found)

    def extra_repr(self) -> str:
        """The radius."""
        return f"radius={self.radius:.6g}"


def fixed(features: object) -> FrozenFeatures:
    """What computes a transform's features of a data set: of one made anew, by the arguments of what is given.

    Nothing of the module that was given is kept, so that what somebody has changed of it, or hung on it, is not there.

    Raises:
        ConfigurationError: it is no scattering transform. Of any other module nobody knows here whether it is as steep
            as it says, or keeps something of the rows that it sees, which files would hold without noise.
    """
    module = features.module if isinstance(features, FrozenFeatures) else features
    if type(module) is not Scattering2d:
        raise ConfigurationError(
            f"features must be a features.Scattering2d, or a FrozenFeatures of one, got {shown(features)}: features of "
            "other modules are rows, which you compute first, by FrozenFeatures(module).compute(rows), and which "
            "certificates are then about"
        )
    made = _made(arguments_of(module))
    if not isinstance(features, FrozenFeatures):
        return FrozenFeatures(made)
    return FrozenFeatures(
        made, cache_dir=features.cache_dir, batch_size=features.batch_size, progress=features.progress
    )


def arguments_of(features: Scattering2d) -> _Arguments:
    """Those by which the same is made."""
    return features.image_size, features.scales, features.angles, features.padding


def _made(arguments: _Arguments) -> Scattering2d:
    size, *rest = arguments
    made = Scattering2d((int(size[0]), int(size[1])), *rest)
    return made.requires_grad_(False).eval()


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


_OWN = {"radius", "_arguments", "feature_shape"}
"""What a front sets on itself."""


def _are_same(held: nn.Module, made: nn.Module) -> bool:
    if type(held) is not type(made) or is_hooked(held) or settings_of_module(held) != settings_of_module(made):
        return False
    own, its = dict(held.named_buffers()), dict(made.named_buffers())
    return own.keys() == its.keys() and all(torch.equal(own[name].cpu(), its[name]) for name in own)


def around(box: BoxProjection, negatives: Tensor | None, frozen: FrozenFeatures) -> FixedFeatures:
    """The front whose middle and radius tell of no row: of public negatives' features, or of the box alone.

    Args:
        box: that rows lie in.
        negatives: features of public rows, ``(M, ...)``: their mean is the middle, their largest distance from it the
            radius. ``None``: the features of the box's centre, and as far as those of the box can be from them.
        frozen: computes features.
    """
    module = cast(Scattering2d, frozen.module)
    if negatives is None:
        middle = computed(frozen, box, torch.zeros(1, *box.input_shape))[0]
        return FixedFeatures(module, box.centre, middle, module.lipschitz * box.radius)
    middle = negatives.double().mean(0).float()
    radius = float((negatives - middle).flatten(1).norm(dim=1).max()) * _SLACK
    if not radius > 0.0:
        raise InputError("the features of all public negatives are the same: there is nothing to tell apart")
    return FixedFeatures(module, box.centre, middle, radius)


def settings_of(front: FixedFeatures | None) -> dict[str, Any] | None:
    """What a file holds of the front: the arguments of the transform, and the radius."""
    if front is None:
        return None
    # Of features that are as they were made: a file has no others.
    _ = front.lipschitz
    size, scales, angles, padding = arguments_of(front.features)
    return {
        "radius": front.radius,
        "shape": list(front.feature_shape),
        "scattering": [list(size), scales, angles, padding],
    }


def rebuilt_front(settings: Mapping[str, Any], box: BoxProjection) -> FixedFeatures:
    """The front of a file, before it is given its middle."""
    size, scales, angles, padding = settings["scattering"]
    made = _made(((int(size[0]), int(size[1])), int(scales), int(angles), padding))
    middle = torch.zeros(*(int(side) for side in settings["shape"]))
    return FixedFeatures(made, box.centre, middle, float(settings["radius"]))
