"""Settings under which torch computes float32 products more coarsely than float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

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
    if device.type == "cpu" and _onednn_mode() != "STRICT":
        return "unset ONEDNN_DEFAULT_FPMATH_MODE, which lets products on a CPU use bfloat16, and start again"
    try:
        if torch.get_float32_matmul_precision() != "highest":
            return "call torch.set_float32_matmul_precision('highest')"
        if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            return "set torch.backends.cudnn.allow_tf32 = False"
    except RuntimeError:
        # Newer versions refuse to read the old settings once the finer ones below differ from them.
        pass
    for name, setting in _fine_settings(device.type):
        if setting.fp32_precision not in ("none", "ieee"):
            return f"set torch.backends.{name}.fp32_precision = 'ieee'"
    return None


def _onednn_mode() -> str:
    names = "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"
    return next((os.environ[name].upper() for name in names if name in os.environ), "STRICT")


@lru_cache
def _fine_settings(*devices: str) -> list[tuple[str, Any]]:
    """Where newer versions of torch keep the precision of products and convolutions on devices, by name."""
    backends = torch.backends
    settings: list[tuple[str, Any]] = []
    if "cpu" in devices:
        settings += [(f"mkldnn.{name}", getattr(backends.mkldnn, name, None)) for name in ("matmul", "conv")]
    if "cuda" in devices:
        settings += [("cuda.matmul", backends.cuda.matmul), ("cudnn.conv", getattr(backends.cudnn, "conv", None))]
    return [(name, setting) for name, setting in settings if hasattr(setting, "fp32_precision")]


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes float32 products in float32, and puts the settings back afterwards."""
    fine = [(setting, setting.fp32_precision) for _, setting in _fine_settings("cpu", "cuda")]
    older: tuple[str, bool] | None
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # As above: then the finer ones are all that is asked.
        older = None
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        for setting, _ in fine:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in fine:
            setting.fp32_precision = value
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            torch.backends.cudnn.allow_tf32 = older[1]
