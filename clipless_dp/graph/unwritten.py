"""Buffers that a pass must leave as they are: files hold them, or the next pass reads them, without any noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accounting.errors import warn_caller
from clipless_dp.errors import PrivacyError, PrivacyWarning
from clipless_dp.isolation import Isolated
from clipless_dp.modules import kind_of


def _held(net: nn.Module) -> list[tuple[str, dict[str, Any], str, bool]]:
    """Where buffers are, and whether a state holds them; but for this package's, and what torch derives of weights."""
    apart = [f"{path}." if path else "" for path, part in net.named_modules() if isinstance(part, Isolated)]
    return [
        (f"{path}.{name}".lstrip("."), part._buffers, name, name not in part._non_persistent_buffers_set)
        for path, part in net.named_modules()
        if not kind_of(part).__module__.startswith(("clipless_dp.", "torch.nn.utils."))
        or ".testing" in kind_of(part).__module__
        for name in part._buffers
        # What a network that runs sample by sample keeps for its next call is refused there.
        if name not in part._non_persistent_buffers_set or not any(path.startswith(one) for one in apart)
    ]


def _parameters(net: nn.Module) -> list[tuple[str, dict[str, Any], str, bool]]:
    """Where parameters are, as :func:`_held` tells it of buffers."""
    return [
        (f"{path}.{name}".lstrip("."), part._parameters, name, True)
        for path, part in net.named_modules()
        for name in part._parameters
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
    """Within, what runs leaves buffers as they are, bit by bit: what it writes to those of no file is taken back.

    Else a layer whose rule is true whatever they hold might carry to the next batch what it has seen in this one. What
    is made where there was nothing, as a mask of the inputs' shape, is made anew each time; so it is after an error.

    Args:
        net: a network, or a layer of one.

    Raises:
        PrivacyError: one was written, and is as it was before.
    """
    before, there = [], _held(net)
    known = {(id(where), name) for _, where, name, *_ in (*there, *_parameters(net))}
    for path, where, name, saved in there:
        value = where[name]
        if value is None or (value.layout is torch.strided and value.device.type != "meta"):
            before.append((path, where, name, saved, value, None if value is None else value.detach().clone()))
    written, taken_back = [], []
    try:
        yield
    finally:
        # After an error, too: what a pass has written by then is of its samples.
        for path, where, name, saved, value, copy in before:
            now = where.get(name)
            if (now is not None) if copy is None else not _same(copy, now):
                if not saved:
                    # Another tensor: the way back may need what was written.
                    where[name] = copy
                    taken_back += [path] if copy is not None else []
                    continue
                written.append(path)
                if value is not None and copy is not None:
                    with torch.no_grad():
                        value.data.copy_(copy)
                where[name] = value
        for path, where, name, saved in (*_held(net), *_parameters(net)):
            if (id(where), name) not in known:
                # Made by this pass; as a mask of the inputs' shape is, anew each time.
                del where[name]
                written += [path] if saved else []
    if taken_back:
        warn_caller(
            f"a pass wrote the buffer {', '.join(map(repr, taken_back))} of the network, which is as it was again: the "
            "next pass would read what follows from samples, which no noise is on. A setting that changes from step to "
            "step is set outside of passes",
            PrivacyWarning,
        )
    if written:
        raise PrivacyError(
            f"a pass wrote the buffer {', '.join(map(repr, written))} of the network, or made it: files of the model "
            "hold it, and what follows from samples is there without noise. Keep it out of buffers, or let it be a "
            "public constant that code outside of passes sets. The buffer is as it was"
        )
