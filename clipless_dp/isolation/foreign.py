"""What other libraries must be told before their networks run on one sample at a time."""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

import torch
from torch import nn


def prepare(net: nn.Module) -> None:
    """Tells the library that a network is from that values cannot be read.

    ``transformers`` leaves masks out where all of a batch's are ones, unless it finds a value that cannot be read.
    """
    if not any(type(part).__module__.partition(".")[0] == "transformers" for part in net.modules()):
        return
    library: Any = sys.modules.get("transformers.utils.import_utils")
    reads = getattr(library, "is_fake_tensor", None)
    if reads is None or getattr(reads, "_knows_vmap", False):
        return

    @wraps(reads)
    def cannot_be_read(value: Any) -> bool:
        return bool(reads(value)) or (isinstance(value, torch.Tensor) and torch._C._functorch.is_batchedtensor(value))

    cannot_be_read._knows_vmap = True  # type: ignore[attr-defined]
    library.is_fake_tensor = cannot_be_read
