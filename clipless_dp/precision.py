"""Settings under which torch computes float32 products more coarsely than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def coarse_products(device: torch.device) -> str | None:
    """The setting that makes float32 products on a device coarser (TF32, bfloat16), with its remedy, or ``None``.

    On CUDA, torch's default lets convolutions use TF32, whose operands keep 11 bits: a gradient could exceed its
    bound by about a thousandth.
    """
    if torch.get_float32_matmul_precision() != "highest":
        return "call torch.set_float32_matmul_precision('highest')"
    if device.type == "cuda" and _convolutions_use_tf32():
        return "set torch.backends.cudnn.allow_tf32 = False"
    return None


def _convolutions_use_tf32() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # Newer versions refuse to read the old flag where the finer ones differ from it.
        return bool(getattr(torch.backends.cudnn, "conv").fp32_precision == "tf32")  # noqa: B009


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes float32 products in float32, and puts the settings back afterwards."""
    matmul = torch.get_float32_matmul_precision()
    convolutions = _convolutions_use_tf32()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
