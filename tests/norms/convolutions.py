"""Random and adversarial convolutions, small enough to be written out as a matrix."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.norms.truth import conv_matrix, spectral


@dataclass(frozen=True)
class Case:
    """One convolution with the norm of its matrix."""

    weight: Tensor
    size: tuple[int, int]
    sides: tuple[tuple[int, int], tuple[int, int]]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)
    padding_mode: str = "zeros"
    kind: str = "gaussian"
    truth: float = field(default=0.0, compare=False)

    def arguments(self) -> dict[str, Any]:
        """What `conv2d_norm` takes, without the input size."""
        return {
            "stride": self.stride,
            "padding": self.sides,
            "dilation": self.dilation,
            "groups": self.groups,
            "transposed": self.transposed,
            "output_padding": self.output_padding,
            "padding_mode": self.padding_mode,
        }

    def matrix(self) -> Tensor:
        """The operator written out."""
        options = self.arguments()
        del options["padding"]
        return conv_matrix(self.weight, self.size, self.sides, **options)


def gaussian(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def positive(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).abs()


def constant(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape)


def checkerboard(shape: tuple[int, ...]) -> Tensor:
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])[None, :]
    return (1.0 - 2.0 * ((rows + columns) % 2)).expand(shape).to(torch.float32)


def wave(shape: tuple[int, ...]) -> Tensor:
    """A kernel tuned to a frequency that lies between the points of most grids."""
    rows, columns = torch.arange(shape[-2])[:, None], torch.arange(shape[-1])[None, :]
    return torch.cos(0.37 * rows + 1.93 * columns) * torch.randn(*shape[:2], 1, 1)


def rank_one(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[0], 1, 1, 1) * torch.randn(1, *shape[1:])


def orthogonal_taps(shape: tuple[int, ...]) -> Tensor:
    """Orthogonal over (output, everything else): a flat spectrum for the reshaped kernel, not for the layer."""
    rows, columns = shape[0], shape[1] * shape[2] * shape[3]
    basis = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
    return (basis if rows >= columns else basis.T).reshape(shape)


def decaying(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.1 ** torch.arange(shape[0], dtype=torch.float32)[:, None, None, None]


def one_tap(shape: tuple[int, ...]) -> Tensor:
    weight = torch.zeros(shape)
    weight[..., shape[-2] // 2, shape[-1] - 1] = torch.randn(shape[:2])
    return weight


def corner_heavy(shape: tuple[int, ...]) -> Tensor:
    """One tap 10²⁰ times the others: on small maps it may meet only padding."""
    weight = torch.randn(shape)
    weight[..., 0, 0] *= 1e20
    return weight


KINDS = {
    kind.__name__: kind
    for kind in (
        gaussian,
        positive,
        constant,
        checkerboard,
        wave,
        rank_one,
        orthogonal_taps,
        decaying,
        one_tap,
        corner_heavy,
    )
}


def random_cases(count: int, seed: int, largest: int = 9) -> Iterator[Case]:
    """Convolutions of every geometry on maps of 1×1 to `largest`×`largest`, with their truths."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    made = 0
    while made < count:
        kind = draw.choice(sorted(KINDS))
        groups = draw.choice([1, 1, 1, 2, 3])
        shape = (
            groups * draw.choice([1, 2, 3]),
            draw.choice([1, 2, 3]),
            draw.choice([1, 2, 3, 4, 5]),
            draw.choice([1, 2, 3, 5]),
        )
        transposed = draw.random() < 0.3
        stride = (draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3, 4]))
        size = (draw.randint(1, largest), draw.randint(1, largest))
        circular = not transposed and draw.random() < 0.3
        caps = size if circular else (4, 4)
        scale = 10.0 ** draw.choice([0, 0, 0, -30, 18])
        case = Case(
            weight=KINDS[kind](shape) * scale,
            size=size,
            sides=(
                (draw.randint(0, min(4, caps[0])), draw.randint(0, min(4, caps[0]))),
                (draw.randint(0, min(4, caps[1])), draw.randint(0, min(4, caps[1]))),
            ),
            stride=stride,
            dilation=(draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 4])),
            groups=groups,
            transposed=transposed,
            output_padding=(draw.randrange(stride[0]), draw.randrange(stride[1])) if transposed else (0, 0),
            padding_mode="circular" if circular else "zeros",
            kind=kind,
        )
        if not bool(torch.isfinite(case.weight).all()):
            continue
        matrix = case.matrix()
        if matrix.shape[0] == 0:
            continue
        made += 1
        yield Case(**{**case.__dict__, "truth": spectral(matrix)})
