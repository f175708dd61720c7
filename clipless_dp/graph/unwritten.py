"""Buffers that a pass must leave as they are: files hold them, and no noise is on what a layer writes there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipless_dp.errors import PrivacyError
from clipless_dp.modules import kind_of


def _held(net: nn.Module) -> list[tuple[str, dict[str, Tensor | None], str]]:
    """Where the buffers are that a state holds, but for this package's own, and what torch derives from weights."""
    return [
        (f"{path}.{name}".lstrip("."), part._buffers, name)
        for path, part in net.named_modules()
        if not kind_of(part).__module__.startswith(("clipless_dp.", "torch.nn.utils."))
        or ".testing" in kind_of(part).__module__
        for name in part._buffers
        if name not in part._non_persistent_buffers_set
    ]


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _same(old: Tensor, new: Tensor | None) -> bool:
    return (
        new is not None
        and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
        and torch.equal(_bits(old), _bits(new))
    )


@contextmanager
def buffers_unwritten(net: nn.Module) -> Iterator[None]:
    """Within, what runs leaves persistent buffers as they are, bit by bit.

    Args:
        net: a network, or a layer of one.

    Raises:
        PrivacyError: one was written, and is as it was before.
    """
    before = []
    for path, where, name in _held(net):
        value = where[name]
        if value is None or (value.layout is torch.strided and value.device.type != "meta"):
            before.append((path, where, name, value, None if value is None else value.detach().clone()))
    yield
    written = []
    for path, where, name, value, copy in before:
        now = where.get(name)
        if (now is not None) if copy is None else not _same(copy, now):
            written.append(path)
            if value is not None and copy is not None:
                with torch.no_grad():
                    value.data.copy_(copy)
            where[name] = value
    if written:
        raise PrivacyError(
            f"a pass wrote the buffer {', '.join(map(repr, written))} of the network: files of the model hold it, and "
            "what follows from samples is there without noise. Keep it out of buffers, or let the buffer be a public "
            "constant that code outside of passes sets. The buffer is as it was"
        )
