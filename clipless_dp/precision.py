"""Settings under which torch computes float32 products more coarsely than float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clipless_dp.errors import PrivacyError


def refuse_autocast(device: torch.device) -> None:
    """Refuses autocast on a device.

    Autocast rounds a weight's gradient to 8 bits *after* the sum over the batch, an error of up to ``2⁻⁸`` of that
    sum's norm, which depends on every other sample: no bound on one sample's gradient covers it. Activations and
    cotangents that are rounded to 8 bits differ by as much where the order of summation, which libraries choose by
    the batch's size, changes their last float32 bit.

    Raises:
        PrivacyError: autocast is on.
    """
    if torch.is_autocast_enabled(device.type):
        raise PrivacyError(
            "autocast rounds the gradient of the whole batch to 8 bits or so, which the bounds do not cover: run the "
            "model's forward, loss and backward outside of torch.autocast"
        )


def outside_autocast(values: Tensor) -> Tensor:
    """The values, or :func:`refuse_autocast` at the time they are computed, in compiled graphs too."""
    if torch.compiler.is_compiling():
        copied: Tensor = _outside_autocast(values)
        return copied
    refuse_autocast(values.device)
    return values


def _checked_copy(values: Tensor) -> Tensor:
    refuse_autocast(values.device)
    return values.clone()


# Opaque to compilers: a check in plain Python runs while a graph is traced and never again.
_outside_autocast = torch.library.custom_op(
    "clipless_dp::outside_autocast", _checked_copy, mutates_args=(), schema="(Tensor values) -> Tensor"
)
_outside_autocast.register_fake(torch.empty_like)


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
