"""Convolutions of maps of one channel that torch's CPU kernel gets wrong where these, or the kernel, lie channels last.

In float32 oneDNN then reads beyond a map, in memory of other rows, where the map's strides leave open in which order it
lies (one channel), steps along rows are of two or more, and outputs are one column wide: measured with torch 2.13. The
way back of a transposed convolution is such a convolution of the cotangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipless_dp.norms.geometry import Axis

TRANSPOSED = (
    "a transposed convolution, by itself or of a convex potential, that makes maps of one channel of maps one column "
    "wide, with a stride of two or more along rows: on its way back torch may read beyond a map, in other samples' "
    "memory. Use stride 1 along rows, or turn the maps around it (x.transpose(2, 3))"
)

NOT_COMPILED = (
    "the network has a convolution of maps of one channel with a stride of two or more along rows and outputs one "
    "column wide, which torch may compute wrongly in the layouts that a compiler chooses: train without compile"
)


class FreshLayouts(TorchDispatchMode):
    """Within, such convolutions are of copies in torch's usual order.

    Attributes:
        met: whether there was one.
        transposed: whether there was a transposed one, of whose way back the same is true.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.met = self.transposed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and not kwargs and args[0].dim() > 3:
            values, weight, bias, stride, *rest = args
            steps = stride[-1] > 1
            transposed, groups = rest[2], rest[4]
            if transposed and steps and weight.shape[1] == 1 and values.shape[-1] == 1:
                self.transposed = True
            elif not transposed and steps and weight.shape[1] == 1:
                padding, dilation = rest[0][-1], rest[1][-1]
                row = Axis(values.shape[-1], weight.shape[-1], stride[-1], dilation, padding, padding)
                self.met = self.met or row.outputs() == 1
                if groups == 1:
                    args = _fresh(values), _fresh(weight), bias, stride, *rest
        return func(*args, **(kwargs or {}))


def _fresh(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)
